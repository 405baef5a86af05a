# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from problems import PROBLEMS, NonAutonomous, Rotation, start, with_log_det
from pyro import poutine
from torch import nn

from pyro_hollow.ode import METHODS, Solver, SolverError
from pyro_hollow.transforms import free_form_cnf, hollow_cnf

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}

DIRECTIONS = {"forward": (0.3, 1.5), "backward": (1.5, 0.3)}


class Field:
    """A field that remembers the times of its evaluations."""

    def __init__(self, function, *tensors):
        self.function, self.tensors, self.times = function, tensors, []

    def __call__(self, t, state):
        self.times.append(float(t.detach()))
        return self.function(t, state)


def parametrize(name, cases):
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


directions = parametrize("times", DIRECTIONS)
problems = parametrize("make_problem", PROBLEMS)
adaptive_methods = pytest.mark.parametrize("method", ADAPTIVE)
adjoint_or_not = parametrize("adjoint", {"direct": False, "adjoint": True})
tensor_or_tuple = parametrize("as_tuple", {"tensor": False, "tuple": True})


def fixed(method, step_size, **options):
    return Solver(method, 1e-9, 1e-9, options={"step_size": step_size, **options})


# A solver and a bound of its error over a time of 1.2. Adams methods of the highest orders are unstable but for tiny
# steps; the error of fehlberg2 is not proportional to its tolerance, as its estimate is of lower order in the step.
ACCURACY = {
    "dopri5": (Solver("dopri5", 1e-8, 1e-8), 1e-7),
    "dopri8": (Solver("dopri8", 1e-9, 1e-9), 1e-8),
    "bosh3": (Solver("bosh3", 1e-6, 1e-6), 2e-5),
    "fehlberg2": (Solver("fehlberg2", 1e-6, 1e-6), 1e-3),
    "adaptive_heun": (Solver("adaptive_heun", 1e-4, 1e-4), 1e-3),
    "euler": (fixed("euler", 0.01), 5e-2),
    "midpoint": (fixed("midpoint", 0.01), 4e-4),
    "heun2": (fixed("heun2", 0.01), 4e-4),
    "heun3": (fixed("heun3", 0.02), 2e-5),
    "rk4": (fixed("rk4", 0.04), 3e-6),
    "explicit_adams": (fixed("explicit_adams", 0.02, max_order=4), 1e-4),
    "implicit_adams": (fixed("implicit_adams", 0.02, max_iters=20), 1e-6),
    "scipy_solver": (Solver("scipy_solver", 1e-8, 1e-8), 1e-6),
    "adams_moulton": (Solver("adams_moulton", 1e-6, 1e-6), 1e-4),
    "bdf": (Solver("bdf", 1e-6, 1e-6), 1e-4),
    "kencarp4": (Solver("kencarp4", 1e-7, 1e-7), 1e-5),
    "kvaerno3": (Solver("kvaerno3", 1e-6, 1e-6), 1e-4),
}


def test_accuracy_is_tested_of_every_method():
    assert set(ACCURACY) == set(METHODS)


# A state that is a tensor, not a tuple, is one way for all problems: for the others it is slow.
@directions
@pytest.mark.parametrize(
    "make_problem, as_tuple",
    [
        pytest.param(problem, tuple_, id=f"{name}-{'tuple' if tuple_ else 'tensor'}", marks=marks)
        for name, problem in PROBLEMS.items()
        for tuple_, marks in ((True, ()), (False, () if name == "non-autonomous" else pytest.mark.slow))
    ],
)
@parametrize("case", ACCURACY)
def test_reaches_the_exact_solution(case, as_tuple, make_problem, times):
    solver, bound = case
    problem = make_problem()
    y0 = start(problem, 2, 3)
    if as_tuple:
        y1, log_det = solver.integrate(with_log_det(problem), (y0, torch.zeros(2, 3)), *times).state
        assert log_det.shape == (2, 3)
        assert (log_det - problem.log_det(y0, *times)).abs().max() < bound
    else:
        y1 = solver.integrate(problem, y0, *times).state
    assert y1.shape == y0.shape
    assert (y1 - problem.exact(y0, *times)).abs().max() < bound


@directions
@problems
def test_default_solver_in_single_precision(make_problem, times):
    problem = make_problem()
    y0 = start(problem, 10, dtype=torch.float32)
    y1 = Solver().integrate(problem, y0, *times).state
    assert y1.dtype == torch.float32
    assert (y1 - problem.exact(y0, *times)).abs().max() < 1e-4


@problems
@pytest.mark.parametrize("method", ORDERS)
def test_order_of_convergence(method, make_problem):
    problem, times, steps = make_problem(), (0.3, 1.3), (32, 64, 128)
    y0 = start(problem, 5)
    ends = [fixed(method, 1 / n).integrate(problem, y0, *times).state for n in steps]
    errors = [(end - problem.exact(y0, *times)).norm().item() for end in ends]
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([ORDERS[method]] * 2, abs=0.3)


def test_tight_tolerance_of_dopri8_is_met_at_the_end_time():
    # Without a step that ends there the end state is an interpolation, with an error of 3e-6.
    problem = NonAutonomous()
    y0 = start(problem, 20)
    y1 = Solver("dopri8", 1e-9, 1e-9).integrate(problem, y0, 0.0, 1.0).state
    assert (y1 - problem.exact(y0, 0.0, 1.0)).abs().max() < 1e-8


@directions
@adaptive_methods
@parametrize("speed", {"slow": 1e-3, "moderate": 1.0, "fast": 30.0})
def test_adaptive_methods_stay_between_the_times(method, times, speed):
    field = Field(lambda t, y: -speed * (y - torch.cos(t)))
    Solver(method, 1e-3, 1e-3).integrate(field, torch.ones(4, 2), *times)
    assert min(field.times) >= min(times) - 1e-12
    assert max(field.times) <= max(times) + 1e-12
    assert field.times[-1] == pytest.approx(times[1])


# Fields that are not smooth at t = 0.7, with their integral from 0.3 to 1.5.
KINKS = {"step_t": (torch.abs, (0.8**2 + 0.4**2) / 2), "jump_t": (torch.sign, 0.8 - 0.4)}


@directions
@pytest.mark.parametrize("option", KINKS)
def test_steps_end_where_they_are_told_to(option, times):
    # No step is rejected, as none goes across the kink; and the end times are still kept.
    function, integral = KINKS[option]
    field = Field(lambda t, y: function(t - 0.7).expand_as(y))
    solver = Solver("dopri5", 1e-8, 1e-8, options={option: torch.tensor([0.7])})
    solution = solver.integrate(field, torch.zeros(3, 1), *times)
    assert (solution.state - math.copysign(integral, times[1] - times[0])).abs().max() < 1e-10
    assert solution.stats.rejected == 0
    assert min(abs(t - 0.7) for t in field.times) < 1e-12


STEP_SIZES = {"default": (None, 10), "third": (1 / 3, 3), "tenth": (0.1, 10), "uneven": (0.4, 3), "long": (7.0, 1)}


@parametrize("ends", {"forward": (0.0, 1.0), "backward": (1.0, 0.0)})
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@parametrize("step_size_and_steps", STEP_SIZES)
@pytest.mark.parametrize("method", STAGES)
def test_fixed_steps_are_equal(method, step_size_and_steps, dtype, ends):
    step_size, steps = step_size_and_steps
    field = Field(lambda t, y: -y)
    options = {} if step_size is None else {"step_size": step_size}
    stats = Solver(method, options=options).integrate(field, torch.ones(2, 1, dtype=dtype), *ends).stats
    assert stats.nfe == len(field.times) == steps * STAGES[method]
    assert (stats.accepted, stats.rejected) == (steps, 0)
    begins = torch.tensor(field.times[:: STAGES[method]])
    assert torch.allclose(begins, torch.linspace(*ends, steps + 1)[:-1], atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
def test_rounding_adds_no_step(dtype):
    # 0.4 - 0.1 is a little more than 3 times 0.1.
    stats = fixed("euler", 0.1).integrate(Rotation(), torch.ones(2, 2, dtype=dtype), 0.1, 0.4).stats
    assert stats.nfe == 3


def one_hard_among_many(options):
    """The errors of one stiff sample and of 999 easy ones."""
    rates = torch.ones(1000, 1)
    rates[321] = 200.0
    start = torch.full((1000, 1), 2.0)
    solver = Solver("dopri5", 1e-3, 1e-3, options=options)
    end = solver.integrate(lambda t, y: rates * (torch.cos(t) - y) - torch.sin(t), start, 0.0, 1.0).state
    error = (end - math.cos(1.0) - torch.exp(-rates)).abs().squeeze(-1)
    return error[321], error[rates[:, 0] == 1].max()


def test_every_sample_meets_the_tolerance():
    hard, easy = one_hard_among_many({})
    assert hard < 2e-3 and easy < 2e-3
    drowned, _ = one_hard_among_many({"norm": lambda state: state.pow(2).mean().sqrt()})
    assert drowned > 5 * hard


# Gradients


class Affine:
    """
    The field y' = cos(3 t) (w mask y + c) with parameters w and a context c, elementwise, in d coordinates.

    Its tensors are not leaves, as those of a field with masked weights are.
    """

    def __init__(self, w, mask, context):
        self.tensors = (w * mask, 1.0 * context)

    def __call__(self, t, y):
        return torch.cos(3 * t) * (self.tensors[0] * y + self.tensors[1])


def exact_affine(y0, w, mask, context, t1):
    # In homogeneous coordinates (y, 1) the field is linear.
    rate = (w * mask).expand_as(y0)
    matrix = torch.stack([torch.stack([rate, context.expand_as(y0)], -1), torch.zeros(*y0.shape, 2)], -2)
    flow = torch.matrix_exp(matrix * math.sin(3 * t1) / 3)
    return flow[..., 0, 0] * y0 + flow[..., 0, 1]


def affine_leaves():
    y0, w, context = torch.randn(4, 3), torch.randn(3), torch.randn(4, 1)
    return [tensor.requires_grad_() for tensor in (y0, w, context)]


GRADIENT_SOLVERS = {
    "dopri5": Solver("dopri5", 1e-9, 1e-9),
    "dopri8": Solver("dopri8", 1e-9, 1e-9),
    "bosh3": Solver("bosh3", 1e-8, 1e-8),
    "rk4": fixed("rk4", 0.02),
}


@adjoint_or_not
@tensor_or_tuple
@parametrize("solver", GRADIENT_SOLVERS)
def test_gradients_reach_state_tensors_and_context(solver, as_tuple, adjoint):
    y0, w, context = leaves = affine_leaves()
    mask = torch.tensor([1.0, 0.0, 1.0])
    field, solver = Affine(w, mask, context), replace(solver, adjoint=adjoint)
    exact = exact_affine(y0, w, mask, context, 1.0)
    weights = torch.randn(4, 4)
    if as_tuple:
        # The second part of the state is the sum over coordinates of what the first part gains.
        pair = Field(lambda t, state: (field(t, state[0]), field(t, state[0]).sum(-1)), *field.tensors)
        y1, gain = solver.integrate(pair, (y0, torch.zeros(4)), 0.0, 1.0).state
        actual, expected = torch.column_stack([y1, gain]), torch.column_stack([exact, (exact - y0).sum(-1)])
    else:
        weights = weights[:, :3]
        actual, expected = solver.integrate(field, y0, 0.0, 1.0).state, exact
    assert (actual - expected).abs().max() < 1e-6
    gradients = torch.autograd.grad(actual, leaves, weights)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, leaves, weights), strict=True):
        assert (gradient - wanted).abs().max() < 1e-6


class LinearModule(nn.Module):
    """A field with parameters and no attribute tensors."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 3))

    def forward(self, t, y):
        return y @ self.matrix.T


@adjoint_or_not
def test_a_module_is_a_field_with_its_parameters(adjoint):
    module, y0 = LinearModule(), torch.randn(5, 3)
    y1 = Solver("dopri5", 1e-9, 1e-9, adjoint=adjoint).integrate(module, y0, 0.0, 1.0).state
    exact = y0 @ torch.matrix_exp(module.matrix).T
    (actual,) = torch.autograd.grad(y1.square().sum(), module.matrix)
    (expected,) = torch.autograd.grad(exact.square().sum(), module.matrix)
    assert (actual - expected).abs().max() < 1e-6


def test_adjoint_needs_to_know_the_tensors():
    w = torch.ones((), requires_grad=True)
    with pytest.raises(TypeError, match="tensors"):
        Solver(adjoint=True).integrate(lambda t, y: w * y, torch.ones(2, 3), 0.0, 1.0)


def exponential():
    """The field w y, and w, whose solution at time 1 is y0 exp(w)."""
    w = torch.tensor(0.7, requires_grad=True)
    return Field(lambda t, y: w * y, w), w


def test_scipy_refuses_to_lose_gradients():
    field, _ = exponential()
    with pytest.raises(ValueError, match="adjoint=True"):
        Solver("scipy_solver").integrate(field, torch.ones(2, 3), 0.0, 1.0)
    with pytest.raises(ValueError, match="adjoint=True"):
        Solver("scipy_solver").integrate(lambda t, y: y, torch.ones(2, 3, requires_grad=True), 0.0, 1.0)


def test_scipy_with_and_without_gradients():
    field, w = exponential()
    y0 = torch.rand(2, 3, requires_grad=True)
    with torch.no_grad():
        y1 = Solver("scipy_solver", 1e-8, 1e-8).integrate(field, y0, 0.0, 1.0).state
    assert torch.allclose(y1, y0 * w.exp(), atol=1e-6)
    y1 = Solver("scipy_solver", 1e-8, 1e-8, adjoint=True).integrate(field, y0, 0.0, 1.0).state
    grad_y0, grad_w = torch.autograd.grad(y1.sum(), (y0, w))
    assert torch.allclose(grad_y0, w.exp().expand(2, 3), atol=1e-6)
    assert torch.allclose(grad_w, y1.sum(), atol=1e-6)


@parametrize("index", {"state": 0, "tensors": 1})
def test_second_derivatives_through_the_adjoint_are_refused(index):
    field, w = exponential()
    y0 = torch.ones(2, 3, requires_grad=True)
    y1 = Solver(adjoint=True).integrate(field, y0, 0.0, 1.0).state
    with pytest.raises(RuntimeError, match="adjoint=False"):
        torch.autograd.grad(y1.sum(), (y0, w)[index], create_graph=True)


@parametrize("solver", GRADIENT_SOLVERS)
def test_second_derivatives_of_a_direct_solve(solver):
    field, w = exponential()
    y0 = torch.ones(2, 3, requires_grad=True)
    y1 = solver.integrate(field, y0, 0.0, 1.0).state
    grad_y0, grad_w = torch.autograd.grad(y1.sum(), (y0, w), create_graph=True)
    (mixed,) = torch.autograd.grad(grad_y0.sum(), w, retain_graph=True)
    (second,) = torch.autograd.grad(grad_w, w)
    assert abs(mixed - 6 * w.exp()) < 1e-5
    assert abs(second - 6 * w.exp()) < 1e-5


# Statistics


@directions
@parametrize("first_step", {"chosen": None, "too long": 1.0})
def test_statistics_of_dopri5(first_step, times):
    options = {} if first_step is None else {"first_step": first_step}
    field = Field(lambda t, y: torch.cos(20 * t) * y)
    stats = Solver("dopri5", options=options).integrate(field, torch.rand(5, 2), *times).stats
    assert stats.nfe == len(field.times)
    # Six evaluations a step, one to begin with and another one to choose the first step.
    assert stats.nfe == 1 + (first_step is None) + 6 * (stats.accepted + stats.rejected)
    assert stats.accepted > 3
    assert first_step is None or stats.rejected > 0
    assert stats.nfe_backward == 0


@parametrize("solver", {**GRADIENT_SOLVERS, "scipy_solver": Solver("scipy_solver")})
def test_evaluations_of_the_adjoint_are_counted_apart(solver):
    field, w = exponential()
    solution = replace(solver, adjoint=True).integrate(field, torch.ones(2, 3), 0.0, 1.0)
    forward = solution.stats.nfe
    assert solution.stats.nfe_backward == 0
    solution.state.sum().backward()
    assert solution.stats.nfe == forward > 0
    assert solution.stats.nfe_backward == len(field.times) - forward > 0


@pytest.mark.parametrize("name", ("LSODA", "RK45", "Radau", "BDF"))
def test_solvers_of_scipy(name):
    field = Field(lambda t, y: -y)
    solution = Solver("scipy_solver", 1e-6, 1e-6, options={"solver": name}).integrate(field, torch.ones(2, 3), 0.0, 1.0)
    assert (solution.state - math.exp(-1)).abs().max() < 1e-4
    assert solution.stats.nfe == len(field.times) > 0


# Errors. The batch has shape (2, 3), and the sample (1, 2) is the one that fails.

SAMPLE = (1, 2)


def one_large():
    """A batch whose sample (1, 2) is 2, all others being 0.1."""
    batch = torch.full((2, 3, 1), 0.1)
    batch[SAMPLE] = 2.0
    return batch


def square(t, y):
    """Has a pole at t = 1 / y0."""
    return y.square()


def undefined_from(time):
    return lambda t, y: torch.where((t >= time) & (y > 1), math.nan, 1.0) * y


class Failure(NamedTuple):
    solver: Solver
    field: Callable
    reason: str
    advice: str
    times: tuple


FAILURES = {
    "pole, dopri5": Failure(Solver(), square, "underflow", "raise rtol and atol", (0.499, 0.501)),
    "pole, dopri8": Failure(Solver("dopri8"), square, "underflow", "raise rtol and atol", (0.499, 0.501)),
    "pole, rk4": Failure(fixed("rk4", 0.01), square, "non-finite", "learning rate", (0.5, 0.6)),
    "pole, LSODA": Failure(Solver("scipy_solver", max_nfe=500), square, "max_nfe = 500", "max_nfe", (0.4, 0.501)),
    "pole, RK45": Failure(Solver("scipy_solver", options={"solver": "RK45"}), square, "", "", (0.499, 0.501)),
    "undefined, dopri5": Failure(Solver(), undefined_from(0.3), "non-finite", "learning rate", (0.3, 1.0)),
    "undefined, rk4": Failure(fixed("rk4", 0.01), undefined_from(0.3), "non-finite", "learning rate", (0.299, 0.301)),
    "undefined, implicit_adams": Failure(
        fixed("implicit_adams", 0.01), undefined_from(0.3), "non-finite", "learning rate", (0.299, 0.311)
    ),
    "undefined, LSODA": Failure(Solver("scipy_solver"), undefined_from(0.3), "non-finite", "learning rate", (0.3, 1.0)),
    "undefined at once, dopri5": Failure(Solver(), undefined_from(0.0), "non-finite", "learning rate", (0.0, 0.01)),
    "undefined at once, euler": Failure(Solver("euler"), undefined_from(0), "non-finite", "learning rate", (0.0, 0.01)),
    "max_nfe, dopri5": Failure(Solver(max_nfe=50), square, "max_nfe = 50", "raise max_nfe", (0.1, 0.5)),
    "max_nfe, rk4": Failure(Solver("rk4", max_nfe=20), square, "max_nfe = 20", "raise max_nfe", (0.4, 0.6)),
    "max_num_steps": Failure(
        Solver(options={"max_num_steps": 9}), square, "max_num_steps", "Raise options", (0.1, 0.5)
    ),
    "corrector": Failure(
        Solver("implicit_adams"), lambda t, y: -50 * y, "corrector of implicit_adams", "step_size", (0.2, 0.5)
    ),
}


@tensor_or_tuple
@parametrize("failure", FAILURES)
def test_failures_are_explained(failure, as_tuple):
    solver, field, reason, advice, (earliest, latest) = failure
    y0 = one_large().requires_grad_(solver.method != "scipy_solver")
    state = (y0, torch.zeros(2, 3)) if as_tuple else y0
    watched = Field(lambda t, y: (field(t, y[0]), 0 * y[1]) if as_tuple else field(t, y))
    with pytest.raises(SolverError, match=f"(?s){reason}.*{advice}") as raised:
        solver.integrate(watched, state, 0.0, 1.0)
    error, message = raised.value, str(raised.value)
    assert error.solver == solver
    assert error.sample == SAMPLE
    assert earliest <= error.time <= latest
    assert 0 < error.nfe <= len(watched.times)
    for told in (solver.method, f"rtol = {solver.rtol:g}", f"atol = {solver.atol:g}", str(SAMPLE)):
        assert told in message
    assert f"t = {error.time:.6g} after {error.nfe} evaluations" in message


# What can be integrated forward need not be so backward: the steps of a stiff field are as small as accuracy wants,
# and a solution that was perturbed by a little meets a pole.
BACKWARD_FAILURES = {
    "max_nfe": (Solver(max_nfe=500), lambda t, y: -100 * y, 10.0, "max_nfe = 500"),
    "pole": (Solver(), lambda t, y: -(y**5), 30.0, "underflow"),
}


@parametrize("failure", BACKWARD_FAILURES)
def test_failures_of_the_backward_solve_are_explained(failure):
    solver, function, y0, reason = failure
    w = torch.ones((), requires_grad=True)
    field = Field(lambda t, y: w * function(t, y), w)
    solution = replace(solver, adjoint=True).integrate(field, torch.full((2, 1), y0), 0.0, 1.0)
    with pytest.raises(SolverError, match=reason) as raised:
        solution.state.sum().backward()
    assert solution.stats.nfe_backward > 0
    assert raised.value.nfe == len(field.times)


def test_implicit_adams_needs_no_corrector_backward():
    # Its corrector, which torchdiffeq would only warn of, does not converge for this adjoint equation.
    w = torch.ones((), requires_grad=True)
    solver = Solver("implicit_adams", options={"step_size": 0.02}, adjoint=True)
    solution = solver.integrate(Field(lambda t, y: 10 * w * y, w), torch.ones(2, 1), 0.0, 1.0)
    solution.state.sum().backward()
    torch.testing.assert_close(w.grad, 20 * torch.tensor(10.0).exp(), rtol=2e-3, atol=0.0)


def failing_solve():
    Solver(max_nfe=50).integrate(square, one_large(), 0.0, 1.0)


def test_errors_pass_through_the_handlers_of_pyro():
    # A trace adds the shapes of its sites to the message, for which it makes another error of the same type.
    with pytest.raises(SolverError, match="max_nfe = 50"):
        poutine.trace(failing_solve).get_trace()


def test_errors_can_be_sent_to_another_process():
    with pytest.raises(SolverError) as raised:
        failing_solve()
    received = pickle.loads(pickle.dumps(raised.value))
    assert str(received) == str(raised.value)
    assert (received.time, received.sample) == (raised.value.time, raised.value.sample)


def test_errors_of_the_field_are_not_hidden():
    def broken(t, y):
        raise AssertionError("a bug of the user")

    with pytest.raises(AssertionError, match="a bug of the user"):
        Solver().integrate(broken, torch.ones(2, 3), 0.0, 1.0)


def test_warnings_of_the_field_are_not_hidden():
    def warning(t, y):
        warnings.warn("a warning of the user", stacklevel=1)
        return y

    with pytest.warns(UserWarning, match="a warning of the user"):
        Solver("euler").integrate(warning, torch.ones(2, 3), 0.0, 1.0)


# Memory


@pytest.fixture
def no_garbage_collection():
    """Without it nothing is freed that is part of a cycle."""
    gc.disable()
    yield
    gc.enable()


@adjoint_or_not
@pytest.mark.parametrize("method", ("dopri5", "rk4", "implicit_adams"))
def test_nothing_outlives_a_solve(method, adjoint, no_garbage_collection):
    y0, w = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    field = Field(lambda t, y, w=w: w * y, w)
    y1 = Solver(method, adjoint=adjoint).integrate(field, y0, 0.0, 1.0).state
    y1.sum().backward()
    references = {name: weakref.ref(value) for name, value in (("y0", y0), ("w", w), ("field", field), ("y1", y1))}
    del y0, w, field, y1
    assert [name for name, reference in references.items() if reference() is not None] == []


@pytest.mark.parametrize("method", ("dopri5", "rk4", "implicit_adams"))
def test_what_waits_for_the_backward_solve_holds_no_derivative(method, no_garbage_collection):
    derivatives = []

    def field(t, y):
        derivative = w * y
        derivatives.append(weakref.ref(derivative))
        return derivative

    w = torch.ones(3, requires_grad=True)
    y1 = Solver(method, adjoint=True).integrate(Field(field, w), torch.ones(2, 3), 0.0, 1.0).state
    assert y1.requires_grad
    assert all(derivative() is None for derivative in derivatives)


def test_nothing_outlives_a_failed_solve(no_garbage_collection):
    y0, w = one_large().requires_grad_(), torch.ones((), requires_grad=True)
    field = Field(lambda t, y, w=w: w * y.square(), w)
    with contextlib.suppress(SolverError):
        Solver(max_nfe=50).integrate(field, y0, 0.0, 1.0)
    references = {name: weakref.ref(value) for name, value in (("y0", y0), ("w", w), ("field", field))}
    del y0, w, field
    assert [name for name, reference in references.items() if reference() is not None] == []


# Edges


@adjoint_or_not
@pytest.mark.parametrize("method", METHODS)
@parametrize("case", {"no sample": ((0, 3), 1.0), "no sample of 2 x 0": ((2, 0, 3), 1.0), "no time": ((2, 3), 0.25)})
@tensor_or_tuple
def test_nothing_to_integrate(case, method, adjoint, as_tuple):
    shape, t1 = case
    field = Field(lambda t, y: y)
    state = (torch.ones(shape), torch.zeros(shape[:-1])) if as_tuple else torch.ones(shape)
    solution = Solver(method, adjoint=adjoint).integrate(field, state, 0.25, t1)
    assert solution.state is state
    assert solution.stats.nfe == len(field.times) == 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@adaptive_methods
def test_adaptive_solves_cannot_be_traced(method):
    solve = partial(Solver(method).integrate, Rotation(), t0=0.0, t1=1.0)
    with pytest.raises(RuntimeError, match="fixed step"):
        torch.jit.trace(lambda y: solve(y).state, torch.rand(4, 2))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("method", STAGES)
def test_solves_of_fixed_step_can_be_traced(method):
    problem = Rotation()
    solve = partial(Solver(method).integrate, problem, t0=0.0, t1=1.0)
    traced = torch.jit.trace(lambda y: solve(y).state, start(problem, 4))
    other = start(problem, 7)
    assert torch.allclose(traced(other), solve(other).state)


INVALID = {
    "method": (dict(method="rk45"), "method"),
    "unknown option": (dict(options={"step": 0.1}), "step"),
    "option of another method": (dict(method="rk4", options={"first_step": 0.1}), "first_step"),
    "negative rtol": (dict(rtol=-1e-3), "rtol"),
    "zero rtol": (dict(rtol=0.0), "rtol"),
    "nan rtol": (dict(rtol=math.nan), "rtol"),
    "infinite rtol": (dict(rtol=math.inf), "rtol"),
    "negative atol": (dict(atol=-1e-3), "atol"),
    "zero atol": (dict(atol=0.0), "atol"),
    "nan atol": (dict(atol=math.nan), "atol"),
    "zero max_nfe": (dict(max_nfe=0), "max_nfe"),
    "zero step_size": (dict(method="rk4", options={"step_size": 0.0}), "step_size"),
    "negative step_size": (dict(method="rk4", options={"step_size": -0.1}), "step_size"),
    "nan step_size": (dict(method="rk4", options={"step_size": math.nan}), "step_size"),
}


@parametrize("settings_and_name", INVALID)
def test_invalid_settings_are_named(settings_and_name):
    settings, name = settings_and_name
    with pytest.raises(ValueError, match=name):
        Solver(**settings)


# A state, and what its error says.
TYPES = {
    "complex": (torch.ones(2, 3, dtype=torch.complex128), r"real, but got torch.complex128; .*view_as_real"),
    "complex part": ((torch.ones(2, 3), torch.ones(2) * 1j), "real, but got torch.complex"),
    "integers": (torch.ones(2, 3, dtype=torch.long), r"of a floating-point type, but got torch.int64; .*\.float\(\)"),
    "no sample": (torch.ones(0, 3, dtype=torch.bool), "of a floating-point type, but got torch.bool"),
}


@pytest.mark.parametrize("method", ("rk4", "dopri5", "dopri8", "bdf", "scipy_solver"))
@parametrize("case", TYPES)
def test_states_of_another_type_are_refused(case, method):
    state, message = case
    with pytest.raises(TypeError, match=f"^state must be {message}"):
        Solver(method).integrate(lambda t, state: state, state, 0.0, 1.0)


def test_a_complex_equation_side_by_side():
    state = torch.randn(4, 2, dtype=torch.complex128)

    def field(t, x):
        return torch.view_as_real(1j * torch.view_as_complex(x.unflatten(-1, (2, 2)))).flatten(-2)

    end = Solver(rtol=1e-8, atol=1e-8).integrate(field, torch.view_as_real(state).flatten(-2), 0.0, math.pi).state
    torch.testing.assert_close(torch.view_as_complex(end.unflatten(-1, (2, 2))), -state, rtol=0, atol=1e-6)


def test_a_solver_is_a_value():
    first, second = (Solver("rk4", options={"step_size": 0.1}) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert len({first, second, Solver("rk4")}) == 2
    assert first != Solver("rk4", options={"step_size": 0.2})
    assert first != replace(first, adjoint=True)
    with pytest.raises(FrozenInstanceError):
        first.method = "euler"


@pytest.mark.parametrize("adjoint", (False, True), ids=("direct", "adjoint"))
def test_a_sample_at_rest_does_not_spoil_gradients(adjoint):
    # The choice of the first step divides by norms, which are 0 for the second sample.
    w = torch.tensor(0.7, requires_grad=True)
    y0 = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    solver = Solver(rtol=1e-9, atol=1e-9, adjoint=adjoint)
    solver.integrate(Field(lambda t, y: -w * y, w), y0, 0.0, 1.0).state.sum().backward()
    torch.testing.assert_close(w.grad, -3 * torch.exp(-w.detach()), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(y0.grad, torch.exp(-w.detach()).expand(2, 2), rtol=1e-6, atol=0.0)


def test_every_backward_pass_has_its_own_budget():
    w = torch.ones((), requires_grad=True)
    solver = Solver("rk4", options={"step_size": 0.2}, adjoint=True, max_nfe=25)
    solution = solver.integrate(Field(lambda t, y: w * y, w), torch.ones(1, 1), 0.0, 1.0)
    for _ in range(3):
        torch.autograd.grad(solution.state.sum(), w, retain_graph=True)
    assert solution.stats.nfe_backward == 60


def test_options_are_the_solvers_own():
    options = {"step_size": 0.5}
    solver = Solver("rk4", options=options)
    options["step_size"] = 0.1
    assert solver.options["step_size"] == 0.5


def test_unknown_solver_of_scipy():
    with pytest.raises(ValueError, match=r"options\['solver'\].*FOO"):
        Solver("scipy_solver", options={"solver": "FOO"})


def test_filters_of_warnings_are_left_alone():
    before = list(warnings.filters)
    Solver("implicit_adams").integrate(lambda t, y: -y, torch.ones(1, 1), 0.0, 1.0)
    assert warnings.filters == before


def test_default_device_does_not_matter():
    with torch.device("meta"):
        state = Solver().integrate(lambda t, y: -y, torch.ones(1, 1, device="cpu"), 0.0, 1.0).state
    torch.testing.assert_close(state, torch.exp(torch.tensor([[-1.0]])), rtol=1e-4, atol=0.0)


def test_a_solver_is_returned_as_it_is_and_made_of_a_name() -> None:
    solver = Solver("rk4", options={"step_size": 0.1})
    assert Solver.of(solver) is solver
    assert Solver.of("bosh3") == Solver("bosh3")


@pytest.mark.parametrize("value", [None, 1e-5, Solver, {"method": "rk4"}], ids=["none", "float", "class", "dict"])
def test_what_is_not_a_solver_is_refused_by_name(value: object) -> None:
    with pytest.raises(TypeError, match="solver must be a Solver or a method's name.*'dopri5', but got"):
        Solver.of(value)  # type: ignore[arg-type]


def test_an_unknown_name_of_a_solver_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="method must be one of .*'dopri5'.*but got 'dopri'"):
        Solver.of("dopri")


def spoil(module: torch.nn.Module, value: float) -> torch.nn.Module:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.view(-1)[0] = value
    return module


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"method": "rk4"}, {"method": "bdf"}, {"adjoint": True}], ids=str)
def test_parameters_that_are_not_finite_are_named_before_the_field(value: float, settings: dict[str, Any]) -> None:
    for flow in (hollow_cnf(2, solver=Solver(**settings)), free_form_cnf(2, solver=Solver(**settings))):
        spoil(flow.nn, value)
        first = next(name for name, _ in flow.nn.named_parameters())
        with pytest.raises(SolverError, match=rf"^parameters are not finite: {first}, .* more: .*checkpoint"):
            flow(torch.zeros(3, 2))
        with pytest.raises(ValueError, match=rf"^parameters are not finite: {first}, .*input must be finite"):
            flow(torch.full((3, 2), math.nan))


def test_parameters_of_a_module_and_tensors_of_a_field_are_named() -> None:
    class Field(torch.nn.Linear):
        def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)

    module = spoil(Field(2, 2), math.nan)
    with pytest.raises(SolverError, match="^parameters are not finite: weight, bias: state"):
        Solver().integrate(module, torch.zeros(3, 2), 0.0, 1.0)
    module = Field(2, 2)
    torch.nn.init.constant_(module.weight, 1e300)
    with pytest.raises(SolverError, match="^(?!parameters)"):  # finite, so the field is at fault
        Solver().integrate(module, torch.ones(3, 2), 0.0, 1.0)
