# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math
import pickle

import pytest
import torch
from torch.testing import assert_close

from pyro_hollow.ops import RootError, fill_by_differences, fixed_point, jacobi_newton, jacobian, newton


def parametrize(name, cases):
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


class Smooth:
    """F(x) = A x + tanh(x) - b with a diagonal that dominates, for all three iterations alike."""

    def __init__(self, d=4, batch=(3, 2), dtype=None):
        noise = torch.randn(d, d, dtype=dtype)
        self.matrix = (0.5 * torch.eye(d, dtype=dtype) + 0.2 / d * noise).requires_grad_()
        self.b = torch.randn(*batch, d, dtype=dtype).requires_grad_()

    def residual(self, x):
        return x @ self.matrix.T + torch.tanh(x) - self.b

    def with_diagonal(self, x):
        return self.residual(x), self.matrix.diagonal() + 1 - torch.tanh(x) ** 2


SOLVERS = {
    "fixed_point": lambda problem, x, **kw: fixed_point(problem.residual, x, **{"damping": 0.6, **kw}),
    "jacobi_newton": lambda problem, x, **kw: jacobi_newton(problem.with_diagonal, x, **kw),
    "newton": lambda problem, x, **kw: newton(problem.residual, x, **kw),
}
solvers = parametrize("solve", SOLVERS)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@solvers
def test_finds_roots(solve, dtype, tolerance):
    problem = Smooth(dtype=dtype)
    result = solve(problem, torch.zeros(3, 2, 4, dtype=dtype), tolerance=tolerance)
    assert result.value.dtype == dtype and result.value.shape == (3, 2, 4)
    assert result.converged.all() and result.iterations.shape == (3, 2)
    assert problem.residual(result.value).abs().max() < 20 * tolerance


@solvers
def test_error_is_below_the_tolerance(solve):
    problem = Smooth()
    exact = newton(problem.residual, torch.zeros(3, 2, 4), tolerance=1e-13).value
    for tolerance in (1e-2, 1e-4, 1e-7):
        error = (solve(problem, torch.zeros(3, 2, 4), tolerance=tolerance).value - exact).square().mean(-1).sqrt()
        assert error.max() < 3 * tolerance


def test_rates_are_those_of_the_theory():
    # Linear: the rates are the spectral radii of I - J and of I - J / diag(J).
    matrix = torch.tensor([[1.1, 0.3], [0.2, 0.8]])
    target = torch.tensor([[1.0, 2.0]])

    def residual(x):
        return x @ matrix.T - target

    def radius(a):
        return torch.linalg.eigvals(a).abs().max()

    result = fixed_point(residual, torch.zeros(1, 2), tolerance=1e-12)
    torch.testing.assert_close(result.rate[0], radius(torch.eye(2) - matrix), rtol=1e-2, atol=0)
    result = jacobi_newton(lambda x: (residual(x), matrix.diagonal()), torch.zeros(1, 2), tolerance=1e-12)
    # With two coordinates the updates alternate between them: two steps shrink by the square of the radius.
    expected = radius(torch.eye(2) - matrix / matrix.diagonal().unsqueeze(-1))
    ratios = matrix[0, 1] / matrix[0, 0], matrix[1, 0] / matrix[1, 1]
    assert min(ratios) - 1e-6 <= result.rate[0] <= max(ratios) + 1e-6
    torch.testing.assert_close((ratios[0] * ratios[1]).sqrt(), expected)


def test_a_linear_function_without_hollow_part_takes_one_step():
    rates = torch.tensor([1.0, 1e3, 1e6])
    result = jacobi_newton(lambda x: (rates * x - 1, rates.expand_as(x)), torch.zeros(5, 3), tolerance=1e-12)
    torch.testing.assert_close(result.value, (1 / rates).expand(5, 3))
    assert result.iterations.max() <= 2
    with pytest.raises(RootError):
        fixed_point(lambda x: rates * x - 1, torch.zeros(5, 3))


def test_samples_stop_moving_when_they_have_converged():
    # The second sample is a hundred times harder; the first must be what it is alone.
    slow = torch.tensor([[0.1], [0.95]])
    result = fixed_point(lambda x: x - slow * torch.cos(x), torch.ones(2, 1), tolerance=1e-8)
    alone = fixed_point(lambda x: x - slow[:1] * torch.cos(x), torch.ones(1, 1), tolerance=1e-8)
    assert torch.equal(result.value[:1], alone.value)
    assert result.iterations[0] == alone.iterations[0] < result.iterations[1]


def test_a_sample_that_diverges_does_not_spoil_the_others():
    factor = torch.tensor([[0.5], [3.0], [math.nan]])
    result = fixed_point(lambda x: x - factor * (x + 1), torch.zeros(3, 1), throw=False)
    assert result.converged.tolist() == [True, False, False]
    assert result.rate[1] == pytest.approx(3.0) and result.rate[2] == math.inf
    assert result.iterations[1] <= 4 and result.iterations[2] == 1
    assert result.value.isfinite().all()
    torch.testing.assert_close(result.value[0], torch.ones(1))


def test_scale_is_what_errors_are_relative_to():
    problem = Smooth()
    fine = newton(problem.residual, torch.zeros(3, 2, 4), tolerance=1e-3, scale=torch.full((4,), 1e-9))
    coarse = newton(problem.residual, torch.zeros(3, 2, 4), tolerance=1e-3)
    assert fine.iterations.min() > coarse.iterations.max()


def test_damping_makes_an_iteration_converge():
    # J = -9 I + ... : x - F(x) has the factor 1 - 2.5, and with damping 1/2 the factor 1 - 1.25.
    with pytest.raises(RootError, match="diverges"):
        fixed_point(lambda x: 2.5 * x - 1, torch.zeros(1, 2))
    damped = fixed_point(lambda x: 2.5 * x - 1, torch.zeros(1, 2), damping=0.5)
    torch.testing.assert_close(damped.value, torch.full((1, 2), 0.4))


def test_a_diagonal_that_changes_its_sign_is_not_divided_by():
    # The way from 2 to the only root, near -2.1, leads across both extrema, where a plain iteration is thrown about.
    result = jacobi_newton(
        lambda x: (x**3 - 3 * x + 3, 3 * x**2 - 3), torch.full((1, 1), 2.0), max_rate=math.inf, max_iterations=25
    )
    torch.testing.assert_close(result.value, torch.full((1, 1), -2.1038034027355))


def test_a_singular_diagonal_is_said_to_be_one():
    with pytest.raises(RootError, match="diagonal is singular") as raised:
        jacobi_newton(lambda x: (x**2 - 2, 2 * x), torch.tensor([[1.0], [0.0]]))
    assert raised.value.result.converged.tolist() == [True, False]
    assert "1 of 2 samples" in str(raised.value) and "(1,)" in str(raised.value)
    for diagonal in (math.inf, math.nan):
        with pytest.raises(RootError, match="diagonal is singular"):
            jacobi_newton(lambda x, d=diagonal: (x - 1, torch.full_like(x, d)), torch.zeros(2, 3))
    with pytest.raises(RootError, match="singular"):
        newton(lambda x: x.sum(-1, keepdim=True).expand_as(x) - 1, torch.zeros(2, 3))


def test_too_few_iterations_are_said_to_be():
    with pytest.raises(RootError, match="raise max_iterations"):
        newton(Smooth().residual, torch.full((3, 2, 4), 5.0), max_iterations=1, tolerance=1e-12)


@pytest.mark.parametrize("name", ("tolerance", "damping", "max_iterations"))
@solvers
def test_invalid_settings_are_named(solve, name):
    with pytest.raises(ValueError, match=name):
        solve(Smooth(), torch.zeros(3, 2, 4), **{name: 0})


@solvers
def test_an_unknown_setting_is_answered_by_the_closest(solve, request):
    finder = request.node.callspec.id
    with pytest.raises(
        TypeError, match=rf"{finder}\(\) has no keyword 'tolerence': did you mean 'tolerance'\? It takes "
    ):
        solve(Smooth(), torch.zeros(3, 2, 4), tolerence=1e-3)
    with pytest.raises(TypeError, match=rf"{finder}\(\) has no keyword 'atol': .*max_rate, first_rate, damping, throw"):
        solve(Smooth(), torch.zeros(3, 2, 4), atol=1e-3)


def test_errors_can_be_sent_to_another_process():
    with pytest.raises(RootError) as raised:
        fixed_point(lambda x: 3 * x - 1, torch.zeros(1, 1))
    assert str(pickle.loads(pickle.dumps(RootError(str(raised.value))))) == str(raised.value)


# Gradients


@solvers
def test_gradients_are_those_of_the_implicit_function_theorem(solve):
    problem = Smooth()

    def roots(matrix, b):
        problem.matrix, problem.b = matrix, b
        return solve(problem, torch.zeros(3, 2, 4), tolerance=1e-12, max_iterations=200).value

    arguments = problem.matrix, problem.b
    assert torch.autograd.gradcheck(roots, arguments, check_undefined_grad=False)
    # And against the closed form.
    root = roots(*arguments)
    (actual,) = torch.autograd.grad(root.sum(), problem.b)
    inverse = torch.linalg.inv(jacobian(problem.residual, root))
    torch.testing.assert_close(actual, inverse.sum(-2))


def test_gradients_where_the_iteration_would_not_converge():
    # A chord finds the root; the diagonal does not dominate, so that the backward pass has to solve densely.
    matrix = torch.eye(3) + 2 * torch.ones(3, 3)
    b = torch.randn(2, 3, requires_grad=True)

    def function(x):
        return x @ matrix.T - b, matrix.diagonal().expand_as(x)

    root = torch.linalg.solve(matrix, b.detach().T).T
    value = jacobi_newton(function, root, tolerance=1e-6).value
    (actual,) = torch.autograd.grad((value * torch.arange(3.0)).sum(), b)
    torch.testing.assert_close(actual, torch.linalg.solve(matrix.T, torch.arange(3.0)).expand(2, 3))


@solvers
def test_nothing_is_attached_without_need(solve):
    problem = Smooth()
    with torch.no_grad():
        assert not solve(problem, torch.zeros(3, 2, 4)).value.requires_grad
    problem.matrix, problem.b = problem.matrix.detach(), problem.b.detach()
    assert not solve(problem, torch.zeros(3, 2, 4, requires_grad=True)).value.requires_grad


def test_second_derivatives_are_refused():
    problem = Smooth()
    root = newton(problem.residual, torch.zeros(3, 2, 4)).value
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(root.sum(), problem.b, create_graph=True)


def test_a_chord_converges_at_its_own_rate():
    problem = Smooth()
    matrix = problem.matrix.detach() + torch.eye(4)

    def inverse(f):
        return torch.linalg.solve(matrix, f.unsqueeze(-1)).squeeze(-1)

    chord = newton(problem.residual, torch.zeros(3, 2, 4), inverse=inverse, tolerance=1e-10)
    exact = newton(problem.residual, torch.zeros(3, 2, 4), tolerance=1e-10)
    torch.testing.assert_close(chord.value, exact.value, rtol=0, atol=1e-9)
    assert (chord.iterations > exact.iterations).all()


def test_dense_jacobian():
    problem, x = Smooth(), torch.randn(3, 2, 4)
    expected = torch.stack([
        torch.autograd.functional.jacobian(lambda x, b=b: x @ problem.matrix.T + torch.tanh(x) - b, row)
        for row, b in zip(x.view(-1, 4), problem.b.view(-1, 4), strict=True)
    ]).view(3, 2, 4, 4)  # fmt: skip
    torch.testing.assert_close(jacobian(problem.residual, x), expected.detach())
    assert torch.equal(jacobian(lambda x: torch.ones_like(x), x), torch.zeros(3, 2, 4, 4))
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        jacobian(problem.residual, x)


def test_gradients_are_those_of_the_function_as_it_was():
    # Called again at the time of the backward pass, all of them would see the last c.
    a, values = torch.tensor([[2.0]], requires_grad=True), []
    for c in (1.0, 4.0):
        values.append(newton(lambda x: c * x**2 - a, torch.ones(1, 1)).value)  # noqa: B023
    for c, value in zip((1.0, 4.0), values, strict=True):
        (gradient,) = torch.autograd.grad(value.sum(), a)
        assert_close(gradient, 1 / (2 * (2.0 * c) ** 0.5) * torch.ones(1, 1))


def test_what_has_not_converged_has_no_gradient():
    q = torch.tensor([[0.5], [0.5]], requires_grad=True)
    rates = torch.tensor([[3.0], [0.5]])
    result = fixed_point(lambda x: x - (rates * x + q), torch.zeros(2, 1), throw=False)
    assert result.converged.tolist() == [False, True]
    (gradient,) = torch.autograd.grad(result.value.sum(), q)
    assert_close(gradient, torch.tensor([[0.0], [2.0]]))


def test_coordinate_that_is_a_root_may_have_no_slope():
    result = jacobi_newton(
        lambda x: (
            torch.stack([x[..., 0] ** 2 - 2, x[..., 1] ** 3], -1),
            torch.stack([2 * x[..., 0], 3 * x[..., 1] ** 2], -1),
        ),
        torch.tensor([[1.0, 0.0]]),
    )
    assert_close(result.value, torch.tensor([[2.0**0.5, 0.0]]))


@pytest.mark.parametrize("find", [jacobi_newton, newton], ids=["jacobi-newton", "newton"])
def test_gradients_against_differences(find):
    """gradcheck also asks for the gradient where nothing depends on the root."""
    weight = torch.rand(3, 2, requires_grad=True)

    def root(weight):
        def function(x):
            return x**3 + x - weight

        if find is newton:
            return newton(function, torch.zeros(3, 2)).value
        return jacobi_newton(lambda x: (function(x), 3 * x**2 + 1), torch.zeros(3, 2)).value

    assert torch.autograd.gradcheck(root, weight)


# Functions that are finite where their derivative is not


def length(x):
    """|x| with a derivative that is NaN at 0."""
    return x.square().sqrt()


def test_difference_quotients_replace_only_entries_that_are_not_finite():
    def function(x):
        return torch.stack([length(x[..., 0] - x[..., 0]) + x[..., 1] ** 3, 2 * x[..., 0]], dim=-1)

    x = torch.tensor([[0.0, 2.0], [1e-7, 1e-7], [3.0, -1.0]])
    matrix = jacobian(function, x)
    assert matrix[..., 0].isnan().all() and matrix[..., 1].isfinite().all()
    filled = fill_by_differences(matrix, function, x, function(x))
    torch.testing.assert_close(filled[..., 0], torch.tensor([[0.0, 2.0]] * 3))
    assert torch.equal(filled[matrix.isfinite()], matrix[matrix.isfinite()])
    everything = fill_by_differences(torch.full_like(matrix, math.nan), function, x, function(x))
    torch.testing.assert_close(everything, filled, rtol=1e-8, atol=1e-9)


def test_difference_quotients_leave_samples_alone_in_which_the_function_is_not_finite():
    matrix, f = torch.full((2, 1, 1), math.nan), torch.tensor([[math.nan], [1.0]])
    filled = fill_by_differences(matrix, lambda x: 2 * x, torch.ones(2, 1), f)
    assert filled[0].isnan().all() and filled[1] == pytest.approx(2.0)


def test_newton_goes_on_where_the_jacobian_is_not_finite():
    a = torch.tensor([[0.5, 1.0], [0.0, 2.0]])
    result = newton(lambda x: x + length(x - x) + x.flip(-1).square() / 8 - a, torch.zeros(2, 2))
    expected = newton(lambda x: x + x.flip(-1).square() / 8 - a, torch.zeros(2, 2))
    torch.testing.assert_close(result.value, expected.value, rtol=1e-8, atol=1e-8)


def test_newton_names_a_jacobian_that_is_not_finite():
    with pytest.raises(RootError, match="Jacobian is not finite where F is.*torch.where"):
        newton(lambda x: x.square() + 1 + length(x - x), torch.ones(2, 2), max_iterations=5)
    with pytest.raises(RootError) as raised:
        newton(lambda x: x.square() + 1, torch.ones(2, 2), max_iterations=5)
    assert "torch.where" not in str(raised.value)


def test_jacobi_newton_names_a_diagonal_that_is_not_finite():
    with pytest.raises(RootError, match="diagonal of the Jacobian is not finite where F is.*torch.where"):
        jacobi_newton(lambda x: (x - 1, torch.full_like(x, math.nan)), torch.zeros(2, 3))


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_jacobi_newton_keeps_the_first_diagonal_where_a_later_one_is_not_finite(value):
    result = jacobi_newton(lambda x: (2 * x - 1, torch.where(x == 0, 3.0, value)), torch.zeros(2, 3))
    torch.testing.assert_close(result.value, torch.full((2, 3), 0.5))


def test_gradients_of_a_root_name_a_jacobian_that_is_not_finite():
    a = torch.tensor([[0.5, 1.0]], requires_grad=True)
    root = newton(lambda x: x + length(x - x) - a, torch.zeros(1, 2)).value
    with pytest.raises(RootError, match="Jacobian, which is not finite.*torch.where"):
        root.sum().backward()
