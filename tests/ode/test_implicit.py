# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import NonAutonomous, Rotation, with_log_det
from torch import nn

from pyro_hollow.nn import ConditionalHollowNN, HollowNN
from pyro_hollow.ode import Solver, SolverError
from pyro_hollow.ode.implicit import CORRECTORS
from pyro_hollow.ode.implicit_methods import METHODS, Adams, Bdf, Esdirk, _respace
from pyro_hollow.transforms import ConditionalHollowCNF, HollowCNF, free_form_cnf

ESDIRK = {name: make() for name, make in METHODS.items() if not isinstance(make, type)}
ORDERS = {"kencarp4": 4, "kvaerno3": 3}

methods = pytest.mark.parametrize("method", METHODS)
correctors = pytest.mark.parametrize("corrector", CORRECTORS)
esdirk = pytest.mark.parametrize("name", ESDIRK)
multistep = pytest.mark.parametrize("family", (Adams, Bdf), ids=("adams_moulton", "bdf"))


def implicit(method, tolerance, corrector=None, **kwargs):
    options = {} if corrector is None else {"corrector": corrector}
    return Solver(method, tolerance, tolerance, options=options, **kwargs)


class Stiff:
    """x' = A x with its diagonal, for one matrix or one for each sample."""

    def __init__(self, matrix):
        self.matrix, self.tensors, self.evaluations = matrix, (matrix,), 0

    def __call__(self, t, x):
        self.evaluations += 1
        return (self.matrix @ x.unsqueeze(-1)).squeeze(-1)

    def with_diagonal(self, t, x):
        return self(t, x), self.matrix.diagonal(dim1=-2, dim2=-1).expand_as(x)

    def exact(self, x, time):
        return (torch.matrix_exp(self.matrix * time) @ x.unsqueeze(-1)).squeeze(-1)


def dominant(d=4, stiffness=1e3):
    """Rates from 1 to the stiffness, and couplings of a tenth of them in each row."""
    rates = torch.logspace(0, math.log10(stiffness), d)
    noise = torch.randn(d, d).fill_diagonal_(0)
    return Stiff(torch.diag(-rates) + 0.1 * rates.unsqueeze(-1) * noise / noise.abs().sum(-1, keepdim=True))


def rotated(d=4, stiffness=1e3):
    """The same rates in a random basis: stable and as stiff, but without a diagonal that dominates."""
    basis = torch.linalg.qr(torch.randn(d, d)).Q
    return Stiff(basis @ torch.diag(-torch.logspace(0, math.log10(stiffness), d)) @ basis.T)


# Coefficients


def butcher(method):
    """The matrix of a tableau, its weights, and those of the embedded method."""
    a = np.zeros((len(method.a) + 1,) * 2)
    for i, row in enumerate(method.a, start=1):
        a[i, : i + 1] = [*row, method.gamma]
    return a, a[-1], a[-1] - np.array(method.error)


def order_conditions(a, b):
    """By order, what is 0 for a method of that order."""
    c = a.sum(1)
    return {
        1: [b.sum() - 1],
        2: [b @ c - 1 / 2],
        3: [b @ c**2 - 1 / 3, b @ a @ c - 1 / 6],
        4: [b @ c**3 - 1 / 4, (b * c) @ a @ c - 1 / 8, b @ a @ c**2 - 1 / 12, b @ a @ a @ c - 1 / 24],
    }


@esdirk
def test_order_conditions(name):
    method = ESDIRK[name]
    a, b, embedded = butcher(method)
    assert method.order == ORDERS[name] - 1
    for weights, order in ((b, ORDERS[name]), (embedded, method.order)):
        for k, residuals in order_conditions(a, weights).items():
            satisfied = np.abs(residuals).max() < 1e-12
            assert satisfied == (k <= order)


def stability(a, b, z):
    return 1 + z * b @ np.linalg.solve(np.eye(len(b)) - z * a, np.ones(len(b)))


@esdirk
def test_esdirk_is_l_stable(name):
    # Stable on the imaginary axis, without a pole in the left half plane (as gamma > 0), so stable in all of it.
    a, b, _ = butcher(ESDIRK[name])
    assert max(abs(stability(a, b, 1j * y)) for y in np.logspace(-3, 5, 400)) <= 1 + 1e-9
    assert ESDIRK[name].gamma > 0
    assert abs(stability(a, b, -1e6)) < 1e-5


@pytest.mark.parametrize(
    "coefficients",
    (
        dict(a=((0.5,), (0.2, 0.1)), error=(0.1, -0.1, 0.0)),
        dict(a=((0.5,), (0.3, 0.2)), error=(0.1, 0.1, 0.0)),
        dict(a=((0.5,), (0.5,)), error=(0.1, -0.1, 0.0)),
    ),
    ids=("last stage", "error", "size"),
)
def test_inconsistent_coefficients_are_refused(coefficients):
    with pytest.raises(ValueError, match="weights"):
        Esdirk(gamma=0.5, order=1, **coefficients)


def differences(values):
    """Backward differences of values at equal steps, latest first."""
    table = [values[0]]
    while len(values) > 1:
        values = [a - b for a, b in zip(values[:-1], values[1:], strict=True)]
        table.append(values[0])
    return torch.stack(table)


def polynomial_history(family, p, slope, t, h, rows):
    """The history of a known solution."""
    values = [torch.tensor([p(t - k * h)]) for k in range(rows)]
    slopes = [h * torch.tensor([slope(t - k * h)]) for k in range(rows - 1)]
    return differences(values) if family is Bdf else torch.cat([values[0].unsqueeze(0), differences(slopes)])


@multistep
@pytest.mark.parametrize("factor", (0.3, 1.0, 2.0))
def test_polynomials_are_integrated_exactly(family, factor):
    # A formula of order k is exact for polynomials of degree k, after any change of the step, and estimates no error.
    top = len(family.error) - 1
    for order in range(1, top + 1):
        power = order
        p, slope = (lambda t, n=power: t**n), (lambda t, n=power: n * t ** (n - 1))
        method = family(top)
        history = polynomial_history(family, p, slope, 1.0, 0.1, top + 3)
        h = 0.1 * factor
        history = method.rescale(history, order, factor)
        after, errors = method.step(lambda t, eta, c, _, s=slope: c + eta * s(t), 1.0, h, history, order)
        torch.testing.assert_close(after[0], torch.tensor([p(1.0 + h)]))
        assert errors[order].abs() < 1e-12


def test_respacing_is_exact_for_polynomials():
    values = [torch.tensor(1.3 + 2 * t - t**2 + 0.5 * t**3) for t in (0.0, -0.1, -0.2, -0.3)]
    longer = [torch.tensor(1.3 + 2 * t - t**2 + 0.5 * t**3) for t in (0.0, -0.17, -0.34, -0.51)]
    torch.testing.assert_close(_respace(differences(values), 1.7), differences(longer))


# Orders and stability, measured. The equation y' = cos(3 t) y is solved by hand in each step.


def march(method, order, steps, slope=lambda t: math.cos(3 * t), exact=lambda t: math.exp(math.sin(3 * t) / 3)):
    """The end at t = 1, from 0.2, in steps of a fixed length and order, from an exact history."""
    start, h = 0.2, 0.8 / steps
    if isinstance(method, Esdirk):
        history = method.begin(torch.tensor([exact(start)]), torch.tensor([h * slope(start) * exact(start)]))
    else:
        derivative = lambda t: slope(t) * exact(t)  # noqa: E731
        history = polynomial_history(type(method), exact, derivative, start, h, method.max_order + 3)
    for n in range(steps):
        history, errors = method.step(lambda t, eta, c, _: c / (1 - eta * slope(t)), start + n * h, h, history, order)
    return float(history[0]), errors


def test_orders_are_the_nominal_ones():
    cases = [(method, ORDERS[name], method.order) for name, method in ESDIRK.items()]
    cases += [(family(5), k, k) for family in (Adams, Bdf) for k in range(1, 6)]
    exact = math.exp(math.sin(3) / 3)
    for method, order, formula in cases:
        errors = [abs(march(method, formula, steps)[0] - exact) for steps in (40, 80, 160)]
        slopes = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
        assert slopes[-1] == pytest.approx(order, abs=0.25), (method, order, slopes)


def test_estimates_follow_the_local_error():
    # One step. Of Adams the estimate is right, of BDF it is on the safe side.
    for method, order in [(family(5), k) for family in (Adams, Bdf) for k in range(1, 5)]:
        h = 0.8 / 200
        history = polynomial_history(
            type(method), lambda t: math.exp(-t), lambda t: -math.exp(-t), 0.2, h, method.max_order + 3
        )
        after, errors = method.step(lambda t, eta, c, _: c / (1 + eta), 0.2, h, history, order)
        error = float(after[0]) - math.exp(-0.2 - h)
        ratio = abs(float(errors[order]) / error)
        assert 0.8 < ratio < (1.2 if isinstance(method, Adams) else 3.0), (method, order)


@esdirk
def test_stiff_decay_is_damped_in_one_step(name):
    method, z = ESDIRK[name], -1e6
    history = method.begin(torch.ones(1), torch.tensor([z]))
    after, _ = method.step(lambda t, eta, c, _: c / (1 - eta * z), 0.0, 1.0, history, method.order)
    assert abs(float(after[0])) < 1e-5


@methods
@pytest.mark.parametrize("corrector", ("jacobi-newton", "newton"))
def test_stiff_decay_is_damped(method, corrector):
    # h lambda is -1e6 for the whole interval; explicit methods would need 3e5 steps.
    field = Stiff(torch.tensor([[-1e6, 0.0], [0.0, -1.0]]))
    solution = implicit(method, 1e-4, corrector).integrate(field, torch.ones(3, 2), 0.0, 1.0)
    assert solution.state[:, 0].abs().max() < 1e-4
    assert (solution.state[:, 1] - math.exp(-1)).abs().max() < 1e-3
    assert solution.stats.nfe < 1000


# Solves


@correctors
@methods
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.float64, 1e-5)])
def test_stiff_equations_are_solved_to_tolerance(method, corrector, dtype, tolerance):
    field = dominant(stiffness=1e2 if corrector == "fixed-point" else 1e3)
    field.matrix = field.matrix.to(dtype)
    x = torch.rand(5, 2, 4, dtype=dtype)
    solution = implicit(method, tolerance, corrector, max_nfe=100_000).integrate(field, x, 0.0, 0.7)
    assert solution.state.dtype == dtype
    assert (solution.state - field.exact(x, 0.7)).abs().max() < 50 * tolerance
    assert solution.stats.nfe == field.evaluations
    assert solution.stats.accepted > 0 and solution.stats.fallbacks == 0
    assert (solution.stats.jacobians > 0) == (corrector == "newton")
    assert (solution.stats.diagonals > 0) == (corrector == "jacobi-newton")


@methods
def test_backward_in_time(method):
    problem = NonAutonomous()
    y0 = torch.rand(4, 2)
    end = implicit(method, 1e-7).integrate(problem, y0, 1.5, 0.3).state
    assert (end - problem.exact(y0, 1.5, 0.3)).abs().max() < 2e-5


@methods
@pytest.mark.parametrize("tolerance", (1e-3, 1e-6))
def test_jacobi_newton_needs_fewer_evaluations_than_the_others_where_the_diagonal_dominates(method, tolerance):
    # Fixed-point iterations and explicit methods alike are bound by the fastest rate.
    if method == "kvaerno3" and tolerance < 1e-5:
        pytest.skip("a method of order 3 takes steps so short here that nothing is stiff")
    field, x = dominant(stiffness=500.0), torch.rand(3, 4)
    ours = implicit(method, tolerance, "jacobi-newton").integrate(field, x, 0.0, 2.0).stats.nfe
    as_few = {"max_nfe": ours}
    for other in (
        implicit(method, tolerance, "fixed-point", **as_few), Solver("dopri5", tolerance, tolerance, **as_few)
    ):  # fmt: skip
        with pytest.raises(SolverError, match="more than max_nfe"):
            other.integrate(field, x, 0.0, 2.0)


@methods
def test_dense_newton_takes_over_where_the_diagonal_does_not_dominate(method):
    field, x = rotated(8), torch.rand(3, 8)
    solution = implicit(method, 1e-5, "jacobi-newton").integrate(field, x, 0.0, 1.0)
    assert (solution.state - field.exact(x, 1.0)).abs().max() < 5e-4
    assert solution.stats.fallbacks > 0 and solution.stats.jacobians > 0
    assert solution.stats.nfe == field.evaluations
    # Where it dominates, there is nothing to take over.
    assert implicit(method, 1e-5).integrate(dominant(8), x, 0.0, 1.0).stats.fallbacks == 0


@pytest.mark.parametrize("method", ("bdf", "kencarp4"))
def test_samples_of_different_stiffness_do_not_spoil_each_other(method):
    matrices = torch.stack([dominant().matrix, dominant(stiffness=2.0).matrix, rotated().matrix, dominant().matrix])
    field, x = Stiff(matrices), torch.rand(4, 4)
    solver = implicit(method, 1e-5)
    together = solver.integrate(field, x, 0.0, 1.0)
    errors = (together.state - field.exact(x, 1.0)).abs().amax(-1)
    assert errors.max() < 3e-4
    assert together.stats.fallbacks > 0
    for i in range(4):
        alone = solver.integrate(Stiff(matrices[i]), x[i : i + 1], 0.0, 1.0)
        assert (alone.state - together.state[i]).abs().max() < 3e-4
        assert (alone.stats.fallbacks > 0) == (i == 2)


def test_nonlinear_problems_of_the_literature():
    # Robertson's reaction: rates from 4e-2 to 3e7, and a sum that is conserved.
    def field(t, x):
        a, b, c = x.unbind(-1)
        back, fast = -0.04 * a + 1e4 * b * c, 3e7 * b * b
        return torch.stack([back, -back - fast, fast], -1)

    x = torch.tensor([[1.0, 0.0, 0.0]])
    for method in ("bdf", "kencarp4"):
        end = Solver(method, 1e-6, 1e-10).integrate(field, x, 0.0, 40.0).state
        expected = torch.tensor([[0.7158270688, 9.185534765e-6, 0.2841637457]])
        torch.testing.assert_close(end, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("order", (1, 2, 5))
@pytest.mark.parametrize("method", ("adams_moulton", "bdf"))
def test_higher_orders_take_fewer_steps(method, order):
    def steps(max_order):
        solver = Solver(method, 1e-5, 1e-5, options={"max_order": max_order})
        return solver.integrate(NonAutonomous(), torch.ones(1, 2), 0.0, 2.0).stats.accepted

    assert order == 1 or steps(order) < steps(order - 1 if order == 2 else 2)


def test_first_step_is_the_one_asked_for():
    times = []

    def field(t, x):
        times.append(float(t))
        return -x

    Solver("bdf", options={"first_step": 1e-3}).integrate(field, torch.ones(1, 1), 0.0, 1.0)
    assert times[1] == pytest.approx(1e-3)


@methods
def test_the_log_determinant_is_no_root(method):
    # The iterations see the state alone: each evaluation of the pair belongs to a stage that was solved.
    problem = Rotation()

    class Pair:
        def __init__(self):
            self.state_field, self.calls = problem, 0

        def __call__(self, t, state):
            self.calls += 1
            return with_log_det(problem)(t, state)

    pair, y0 = Pair(), torch.rand(3, 2)
    y1, log_det = (solution := implicit(method, 1e-7).integrate(pair, (y0, torch.zeros(3)), 0.0, 1.0)).state
    assert (y1 - problem.exact(y0, 0.0, 1.0)).abs().max() < 1e-5
    assert (log_det - problem.log_det(y0, 0.0, 1.0)).abs().max() < 1e-5
    assert 0 < pair.calls < solution.stats.nfe / 2


# Gradients


def gradients(flow, x, *context):
    transform = flow.condition(*context) if context else flow
    y, ladj = transform.call_and_ladj(x)
    objective = (y.square().sum(-1) * torch.arange(len(x)) + ladj).sum()
    return objective.detach(), torch.autograd.grad(objective, (x, *context, *flow.parameters()))


@pytest.mark.parametrize("adjoint", (False, True), ids=("direct", "adjoint"))
@pytest.mark.parametrize("corrector", ("jacobi-newton", "newton", "fixed-point", "rotated"))
@pytest.mark.parametrize("method", ("adams_moulton", "bdf"))
def test_gradients_are_those_of_a_tight_explicit_solve(method, corrector, adjoint):
    flow = ConditionalHollowCNF(ConditionalHollowNN(3, 2, [8]), time=0.5, cache_size=0)
    for parameter in flow.parameters():
        parameter.data.mul_(3.0 if corrector == "rotated" else 1.5)
    x, context = torch.randn(4, 3, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    flow.solver = Solver(rtol=1e-11, atol=1e-11)
    value, expected = gradients(flow, x, context)
    corrector = "jacobi-newton" if corrector == "rotated" else corrector
    flow.solver = implicit(method, 1e-8, corrector, adjoint=adjoint)
    actual_value, actual = gradients(flow, x, context)
    stats = flow.last_solve
    assert abs(actual_value - value) < 1e-5
    assert max((a - b).abs().max() / b.abs().max().clamp(min=1) for a, b in zip(actual, expected, strict=True)) < 1e-5
    assert (stats.nfe_backward > 0) == adjoint


@pytest.mark.parametrize("adjoint", (False, True), ids=("direct", "adjoint"))
@pytest.mark.parametrize("make", (dominant, rotated))
@pytest.mark.parametrize("method", ("bdf", "kencarp4"))
def test_gradients_of_stiff_equations(method, make, adjoint):
    field, x = make(), torch.rand(3, 4, requires_grad=True)
    matrix = field.matrix.requires_grad_()
    wanted = torch.autograd.grad(field.exact(x, 1.0).square().sum(), (x, matrix))
    end = implicit(method, 1e-6, adjoint=adjoint).integrate(field, x, 0.0, 1.0).state
    for actual, expected in zip(torch.autograd.grad(end.square().sum(), (x, matrix)), wanted, strict=True):
        assert (actual - expected).abs().max() < 1e-5


@methods
def test_adjoint_and_direct_gradients_are_the_same(method):
    flow = HollowCNF(HollowNN(3, [8]), cache_size=0)
    x = torch.randn(4, 3, requires_grad=True)
    found = []
    for adjoint in (False, True):
        flow.solver = implicit(method, 1e-4, adjoint=adjoint)
        found.append(gradients(flow, x)[1])
    for direct, adjoint in zip(*found, strict=True):
        torch.testing.assert_close(direct, adjoint, rtol=1e-8, atol=1e-8)


class Decay(nn.Module):
    """A field with parameters and no attribute tensors."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(50.0))

    def forward(self, t, y):
        return -self.rate * (y - torch.cos(t))


@pytest.mark.parametrize("adjoint", (False, True), ids=("direct", "adjoint"))
def test_a_module_is_a_field_with_its_parameters(adjoint):
    field = Decay()
    end = implicit("bdf", 1e-8, adjoint=adjoint).integrate(field, torch.zeros(2, 1), 0.0, 1.0).state
    (actual,) = torch.autograd.grad(end.sum(), field.rate)
    rate = field.rate
    exact = (rate**2 * (math.cos(1.0) - torch.exp(-rate)) + rate * math.sin(1.0)) / (1 + rate**2)
    torch.testing.assert_close(actual, torch.autograd.grad(2 * exact, rate)[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("adjoint", (False, True), ids=("direct", "adjoint"))
def test_second_derivatives_are_refused(adjoint):
    field = Decay()
    end = implicit("bdf", 1e-4, adjoint=adjoint).integrate(field, torch.zeros(2, 1), 0.0, 1.0).state
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(end.sum(), field.rate, create_graph=True)


@pytest.mark.parametrize("adjoint", (False, True), ids=("direct", "adjoint"))
@methods
def test_nothing_outlives_a_solve(method, adjoint):
    gc.disable()
    try:
        field, x = dominant(), torch.rand(2, 4, requires_grad=True)
        field.matrix.requires_grad_()
        end = implicit(method, 1e-3, adjoint=adjoint).integrate(field, x, 0.0, 1.0).state
        end.sum().backward()
        references = [weakref.ref(thing) for thing in (field, x, end)]
        del field, x, end
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


# Flows


@correctors
@methods
def test_flows_agree_with_the_explicit_solver(method, corrector):
    flow = HollowCNF(HollowNN(3, [8]))
    x = torch.randn(6, 3)
    flow.solver = Solver(rtol=1e-10, atol=1e-10)
    y, ladj = flow.call_and_ladj(x)
    flow = replace_solver(flow, implicit(method, 1e-7, corrector))
    actual_y, actual_ladj = flow.call_and_ladj(x)
    assert (actual_y - y).abs().max() < 1e-5 and (actual_ladj - ladj).abs().max() < 1e-5
    assert (flow.inv(y) - x).abs().max() < 1e-5


def replace_solver(flow, solver):
    flow.solver = solver
    flow.clear_cache()
    return flow


@pytest.mark.parametrize("kind", ("free-form", "score", "regularized"))
def test_other_dynamics_of_flows(kind):
    x, score = torch.randn(4, 3), torch.randn(4, 3)
    net = HollowNN(3, [8])
    flow = free_form_cnf(3, [8]) if kind == "free-form" else HollowCNF(net, regularize=kind == "regularized")
    found = []
    for solver in (Solver(rtol=1e-9, atol=1e-9), implicit("kencarp4", 1e-8, "newton")):
        torch.manual_seed(1)
        flow = replace_solver(flow, solver)
        results = flow.call_and_score(x, score) if kind == "score" else flow.call_and_ladj(x)
        found.append((*results, *(flow.regularization if kind == "regularized" else ())))
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# Errors. The batch has shape (2, 3), and the sample (1, 2) is the one that fails.


def one_large(value=2.0):
    batch = torch.full((2, 3, 2), 0.1)
    batch[1, 2] = value
    return batch


def undefined_from(time):
    return lambda t, x: torch.where((t >= time) & (x > 1), math.nan, 0.0 * x)


class BadDiagonal:
    def __init__(self, diagonal):
        self.diagonal = diagonal

    def __call__(self, t, x):
        return -x

    def with_diagonal(self, t, x):
        return -x, torch.where(x > 1, self.diagonal, -1.0)


@methods
@pytest.mark.parametrize("time", (0.0, 0.3))
def test_a_field_that_is_not_finite_is_reported(method, time):
    with pytest.raises(SolverError, match="(?s)non-finite.*check the inputs") as raised:
        implicit(method, 1e-4).integrate(undefined_from(time), one_large(), 0.0, 1.0)
    assert raised.value.sample == (1, 2)
    assert raised.value.time == pytest.approx(time, abs=0.02)
    assert raised.value.solver.method == method


@methods
def test_a_pole_is_reported(method):
    with pytest.raises(SolverError, match="(?s)(underflow|converge|max_nfe).*raise") as raised:
        implicit(method, 1e-4, max_nfe=1500).integrate(lambda t, x: x.square(), one_large(), 0.0, 1.0)
    assert raised.value.time == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("diagonal", (math.nan, math.inf), ids=("nan", "inf"))
def test_dense_newton_takes_over_where_the_diagonal_is_not_finite(diagonal):
    solution = implicit("bdf", 1e-4).integrate(BadDiagonal(diagonal), one_large(), 0.0, 0.1)
    assert (solution.state - one_large() * math.exp(-0.1)).abs().max() < 1e-3
    assert solution.stats.fallbacks > 0 and solution.stats.difference_jacobians == 0


@pytest.mark.parametrize("diagonal", (math.nan, math.inf), ids=("nan", "inf"))
def test_a_diagonal_that_is_not_finite_is_reported_where_dense_newton_fails_too(diagonal):
    class Jump:
        def __call__(self, t, x):
            return -1e3 * torch.sign(x - 0.05)

        def with_diagonal(self, t, x):
            return self(t, x), torch.full_like(x, diagonal)

    with pytest.raises(SolverError, match="(?s)diagonal.*not finite.*with_diagonal"):
        implicit("bdf", 1e-8).integrate(Jump(), torch.full((1, 1), 0.1), 0.0, 1.0)


def test_a_wrong_diagonal_costs_evaluations_but_no_accuracy():
    # 1 - h D = 0 at some step, and of the wrong sign beyond.
    solution = implicit("kencarp4", 1e-5).integrate(BadDiagonal(30.0), one_large(), 0.0, 1.0)
    assert solution.stats.fallbacks > 0
    assert (solution.state - one_large() * math.exp(-1)).abs().max() < 1e-4


@methods
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_impossible_tolerances_are_reported(method, dtype):
    solver = Solver(method, 1e-18, 1e-18)
    with pytest.raises(SolverError, match="Raise rtol"):
        solver.integrate(lambda t, x: -x, one_large().to(dtype), 0.0, 1.0)


def test_a_corrector_that_cannot_converge_is_reported():
    # A discontinuous field: no step is short enough for its equation to have a solution.
    def field(t, x):
        return -1e3 * torch.sign(x - 0.05)

    with pytest.raises(SolverError, match="(?s)(converge|underflow|max_nfe).*options") as raised:
        implicit("kvaerno3", 1e-8, "newton", max_nfe=3000).integrate(field, torch.full((1, 1), 0.1), 0.0, 1.0)
    assert raised.value.nfe > 0


def test_jacobi_newton_needs_a_diagonal():
    with pytest.raises(TypeError, match="with_diagonal"):
        implicit("bdf", 1e-4, "jacobi-newton").integrate(lambda t, x: -x, torch.ones(1, 2), 0.0, 1.0)


INVALID = {
    "corrector": {"corrector": "bisection"},
    "max_iterations": {"max_iterations": 0},
    "first_step": {"first_step": -0.1},
    "max_order": {"max_order": 9},
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_options_are_named(name):
    with pytest.raises(ValueError, match=name):
        Solver("bdf", options=INVALID[name])


def test_methods_of_one_order_have_no_highest_one():
    with pytest.raises(ValueError, match="max_order"):
        Solver("kencarp4", options={"max_order": 3})


def test_max_nfe_is_kept():
    with pytest.raises(SolverError, match="max_nfe = 50"):
        implicit("bdf", 1e-6, max_nfe=50).integrate(dominant(), torch.rand(2, 4), 0.0, 1.0)


def test_a_solver_is_a_value():
    first, second = (implicit("bdf", 1e-4, "newton") for _ in range(2))
    assert first == second and first.adaptive
    assert replace(first, adjoint=True) != first


def test_overflowing_field_is_named():
    with pytest.raises(SolverError, match="non-finite|underflow"):
        Solver("bdf").integrate(lambda t, x: (x - 1) * 1e30, torch.full((1, 1), 1.001), 0.0, 1.0)


def test_autocast_does_not_round_the_state():
    with torch.autocast("cpu", torch.bfloat16):
        end = (
            Solver("bdf", 1e-5, 1e-5).integrate(lambda t, x: -x, torch.ones(1, 1, dtype=torch.float32), 0.0, 1.0).state
        )
    assert end.dtype == torch.float32 and abs(end.item() - math.exp(-1)) < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_what_acts_later(method):
    """A dose, or a switch: at the beginning nothing depends on the weight."""
    weight = torch.tensor([1.5, 0.5], requires_grad=True)
    x = torch.tensor([[1.0, 2.0]])

    def field(t, x):
        return -x * weight if 0.5 < float(t) else -x

    end = Solver(method, 1e-6, 1e-6, options={"corrector": "newton"}).integrate(field, x, 0.0, 1.0).state
    (gradient,) = torch.autograd.grad(end.sum(), weight)
    exact = x[0] * torch.exp(-0.5 - 0.5 * weight.detach())
    torch.testing.assert_close(gradient, -0.5 * exact, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_backward_past_a_state_that_nobody_uses(method):
    rate = torch.tensor(1.5, requires_grad=True)
    end = Solver(method, 1e-4, 1e-4, options={"corrector": "newton"}).integrate(
        lambda t, x: -rate * x, torch.ones(1, 2), 0.0, 1.0
    )
    (gradient,) = torch.autograd.grad(Undefined.apply(end.state), rate, torch.ones(1, 2), allow_unused=True)
    assert gradient is None or gradient == 0


class Undefined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("method, advised", [("dopri5", True), ("bdf", False), ("kencarp4", False)])
def test_advice_on_stiff_fields(method, advised):
    with pytest.raises(SolverError, match="raise max_nfe") as raised:
        Solver(method, 1e-6, 1e-6, max_nfe=12).integrate(lambda t, x: -50 * x, torch.ones(1, 2), 0.0, 1.0)
    assert ("Solver('bdf')" in str(raised.value)) == advised


# Fields that are finite where their derivative is not


def attraction(y):
    """Of bodies on a line, with a force that is masked for a body with itself; autograd's Jacobian is NaN."""
    d = y.unsqueeze(-2) - y.unsqueeze(-1)
    r = d.square().sqrt()
    return torch.where(torch.eye(y.shape[-1], dtype=torch.bool), 0.0, d / (1 + r) ** 3).sum(-1)


def safe_attraction(y):
    d = y.unsqueeze(-2) - y.unsqueeze(-1)
    return (d / (1 + d.abs()) ** 3).sum(-1)


def attracted(t, y):
    return attraction(y)


class Attracted:
    """With the diagonal of the Jacobian by automatic differentiation, NaN as well."""

    def __call__(self, t, y):
        return attraction(y)

    def with_diagonal(self, t, y):
        return attraction(y), torch.full_like(y, math.nan)


BODIES = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)


@methods
@pytest.mark.parametrize("field", (attracted, Attracted()), ids=("newton", "jacobi-newton"))
@pytest.mark.parametrize("scale", (1.0, 1e-6), ids=("unit", "small"))
def test_a_jacobian_that_is_not_finite_where_the_field_is_does_not_stop_a_solve(method, field, scale):
    y, tolerance = scale * BODIES, {"rtol": 1e-6, "atol": 1e-8 * scale}
    solution = Solver(method, **tolerance).integrate(field, y, 0.0, 1.0)
    reference = Solver("dopri5", 1e-10, 1e-12 * scale).integrate(field, y, 0.0, 1.0).state
    torch.testing.assert_close(solution.state, reference, rtol=1e-5, atol=1e-6 * scale)
    stats = solution.stats
    assert 0 < stats.difference_jacobians <= stats.jacobians
    finite = Solver(method, **tolerance).integrate(lambda t, y: safe_attraction(y), y, 0.0, 1.0)
    assert finite.stats.difference_jacobians == 0
    if field is attracted:  # quotients are as good as derivatives
        torch.testing.assert_close(solution.state, finite.state, rtol=1e-8, atol=1e-9 * scale)
        assert stats.accepted == finite.stats.accepted


@methods
def test_difference_quotients_serve_a_stiff_field(method):
    """The attraction and a decay at the rate 1e4, where steps of an explicit method's length were thousands."""

    def field(t, y):
        return attraction(y) - 1e4 * (y - torch.cos(t))

    solution = implicit(method, 1e-5).integrate(field, BODIES, 0.0, 1.0)
    torch.testing.assert_close(solution.state, torch.full_like(BODIES, math.cos(1.0)), rtol=0, atol=1e-3)
    assert solution.stats.accepted < 600 and solution.stats.difference_jacobians > 0


@methods
def test_a_jacobian_that_is_not_finite_in_one_sample_leaves_the_others_alone(method):
    # Along sqrt(x^2), whose derivative is NaN at 0 alone, the first sample rests.
    def field(t, x):
        return x.square().sqrt() * (1 - x)

    def mended(t, x):
        return x.abs() * (1 - x)

    x = torch.tensor([[0.0, 0.5], [0.3, 0.1], [0.2, 0.7]])
    bad, good = (implicit(method, 1e-7).integrate(f, x, 0.0, 1.0) for f in (field, mended))
    torch.testing.assert_close(bad.state[1:], good.state[1:], rtol=1e-9, atol=1e-10)
    exact = 1 / (1 + (1 / x - 1) * math.exp(-1))
    torch.testing.assert_close(bad.state, exact, rtol=0, atol=1e-5)
    assert bad.stats.difference_jacobians > 0 and good.stats.difference_jacobians == 0


@methods
def test_a_jacobian_may_cease_to_be_finite_halfway(method):
    def field(t, y):
        return 30 * attraction(y) if t > 0.5 else safe_attraction(y)

    def mended(t, y):
        return 30 * safe_attraction(y) if t > 0.5 else safe_attraction(y)

    solution, finite = (implicit(method, 1e-6).integrate(f, BODIES, 0.0, 0.7) for f in (field, mended))
    torch.testing.assert_close(solution.state, finite.state, rtol=1e-7, atol=1e-8)
    reference = Solver("dopri5", 1e-9, 1e-9).integrate(mended, BODIES, 0.0, 0.7).state
    torch.testing.assert_close(solution.state, reference, rtol=1e-3, atol=1e-3)
    assert 0 < solution.stats.difference_jacobians <= solution.stats.jacobians


# Problem C5 of DETEST (Hull, Enright, Fellen, Sedgwick, 1972): the five outer planets, in astronomical units and
# hundreds of days.
PLANET_MASSES = torch.tensor(
    [[9.54786104043e-4], [2.85583733151e-4], [4.37273164546e-5], [5.17759138449e-5], [2.77777777778e-6]],
    dtype=torch.float64,
)
PLANETS = torch.tensor(
    [
        [3.42947415189, 3.35386959711, 1.35494901715],
        [6.64145542550, 5.97156957878, 2.18231499728],
        [11.2630437207, 14.6952576794, 6.27960525067],
        [-30.1552268759, 1.65699966404, 1.43785752721],
        [-21.1238353380, 28.4465098142, 15.3882659679],
        [-0.557160570446, 0.505696783289, 0.230578543901],
        [-0.415570776342, 0.365682722812, 0.169143213293],
        [-0.325325669158, 0.189706021964, 0.0877265322780],
        [-0.0240476254170, -0.287659532608, -0.117219543175],
        [-0.176860753121, -0.216393453025, -0.0148647893090],
    ],
    dtype=torch.float64,
)


def planets(t, y):
    mass = PLANET_MASSES
    x, v = y.unflatten(-1, (2, 5, 3)).unbind(-3)
    d = x.unsqueeze(-3) - x.unsqueeze(-2)
    pair = d / d.square().sum(-1, keepdim=True).sqrt() ** 3
    pull = torch.where(torch.eye(5, dtype=torch.bool).unsqueeze(-1), 0.0, mass * pair).sum(-2)
    sun = x / x.square().sum(-1, keepdim=True).sqrt() ** 3
    indirect = (mass * sun).sum(-2, keepdim=True) - mass * sun
    acceleration = 2.95912208286 * (pull - (1.00000597682 + mass) * sun - indirect)
    return torch.stack([v, acceleration], dim=-3).flatten(-3)


@methods
def test_five_planets_with_masked_pairs_agree_with_an_explicit_method(method):
    y = PLANETS.reshape(1, -1)
    reference = Solver("dopri5", 1e-11, 1e-11).integrate(planets, y, 0.0, 5.0).state
    solution = implicit(method, 1e-6).integrate(planets, y, 0.0, 5.0)
    torch.testing.assert_close(solution.state, reference, rtol=0, atol=1e-3)
    assert solution.stats.difference_jacobians > 0


@methods
def test_a_field_without_derivatives_is_integrated(method):
    solution = implicit(method, 1e-6).integrate(lambda t, y: safe_attraction(y.detach()), BODIES, 0.0, 1.0)
    reference = Solver("dopri5", 1e-9, 1e-9).integrate(attracted, BODIES, 0.0, 1.0).state
    torch.testing.assert_close(solution.state, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ("adams_moulton", "bdf", "kvaerno3"))
def test_where_difference_quotients_fail_too_the_jacobian_is_named(method):
    def field(t, x):
        return -1e3 * torch.sign(x - 0.05) + (x - x).square().sqrt()

    with pytest.raises(SolverError, match="(?s)Jacobian is not finite where the field is.*torch.where.*sqrt"):
        implicit(method, 1e-8, "newton").integrate(field, torch.full((1, 1), 0.1), 0.0, 1.0)


@methods
@pytest.mark.parametrize("adjoint", (True, False), ids=("adjoint", "backpropagation"))
def test_gradients_by_a_jacobian_that_is_not_finite_are_an_error(method, adjoint):
    strength, y = torch.tensor(1.0, requires_grad=True), BODIES.clone().requires_grad_()
    solver = replace(implicit(method, 1e-5), adjoint=adjoint)

    def field(t, y):
        return strength * attraction(y)

    field.tensors = (strength,)
    end = solver.integrate(field, y, 0.0, 1.0).state
    with pytest.raises(RuntimeError, match="Jacobian.*not finite.*torch.where"):
        end.sum().backward()


@pytest.mark.parametrize("adjoint", (True, False), ids=("adjoint", "backpropagation"))
def test_a_gradient_that_was_not_finite_before_is_not_blamed_on_the_field(adjoint):
    y = BODIES.clone().requires_grad_()
    field = Stiff(-torch.eye(3))
    end = replace(implicit("bdf", 1e-5, "newton"), adjoint=adjoint).integrate(field, y, 0.0, 1.0).state
    (gradient,) = torch.autograd.grad(end, y, torch.full_like(end, math.nan))
    assert gradient.isnan().all()
