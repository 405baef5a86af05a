# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Tableaus, the choice of steps, plain functions as fields, and failures of explicit methods."""

import dataclasses
import math
import re
import weakref

import pytest
import torch
from torchdiffeq._impl import bosh3, dopri5

from pyro_hollow.ode import METHODS, Solver, SolverError
from pyro_hollow.ode.explicit import TABLEAUS, fixed
from pyro_hollow.ops import stepper
from pyro_hollow.ops.stepper import AutogradStepper, Tableau
from pyro_hollow.ops.vector_field import VectorField

FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE = {"bosh3": 3, "dopri5": 5}
ORDERS = {**FIXED, **ADAPTIVE}
#: torchdiffeq's tableaus.
PEERS = {"bosh3": bosh3._BOGACKI_SHAMPINE_TABLEAU, "dopri5": dopri5._DORMAND_PRINCE_SHAMPINE_TABLEAU}


def parametrize(name, cases):
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


each_method = pytest.mark.parametrize("method", TABLEAUS)
each_fixed = pytest.mark.parametrize("method", FIXED)
each_adaptive = pytest.mark.parametrize("method", ADAPTIVE)
forward_or_backward = parametrize("times", {"forward": (0.3, 1.5), "backward": (1.5, 0.3)})


class Known(VectorField):
    """A field given with its divergence, which remembers the times of its evaluations."""

    def __init__(self, function, *tensors):
        self.function, self.tensors, self.times = function, tensors, []

    def with_divergence(self, t, x):
        self.times.append(float(t.detach()))
        return self.function(t, x)


def pulsed(w):
    """y' = w cos(3 t) y (1 - y) in each coordinate: neither linear nor autonomous, and its solution is known."""

    def function(t, y):
        rate = w * torch.cos(3 * t)
        return rate * y * (1 - y), (rate * (1 - 2 * y)).sum(-1)

    return Known(function, w)


def exact_pulsed(y0, w, t0, t1):
    time = w * (math.sin(3 * t1) - math.sin(3 * t0)) / 3
    y1 = y0 * time.exp() / (1 + y0 * torch.expm1(time))
    return y1, (time - 2 * torch.log1p(y0 * torch.expm1(time))).sum(-1)


def pulsed_leaves(*batch):
    return 0.1 + 0.8 * torch.rand(*batch, 2), torch.tensor(1.3)


def integrate(solver, field, y0, t0=0.0, t1=1.0):
    return solver.integrate_with_divergence(field, y0, t0, t1)


def by_torchdiffeq(solver):
    options = {"min_step": 0.0} if solver.adaptive else {"perturb": False}
    return dataclasses.replace(solver, options={**solver.options, **options})


def loss_of(y, integral):
    """Depends on each element in its own way."""
    weights, others = (torch.arange(1.0, part.numel() + 1).view(part.shape) for part in (y, integral))
    return (y * weights.cos()).sum() + (integral * others.sin()).sum()


def assert_close(actual, expected, tolerance):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item())


# Tableaus

HEUN = dict(a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0))
INVALID = {
    "a stage too few": (dict(HEUN, a=((),)), "stage i"),
    "a stage too many": (dict(HEUN, a=((), (1.0,), (0.5, 0.5))), "stage i"),
    "a row too long": (dict(HEUN, a=((), (0.5, 0.5))), "stage i"),
    "an implicit stage": (dict(HEUN, a=((0.0,), (1.0,))), "stage i"),
    "a time too few": (dict(HEUN, c=(0.0,)), "stage i"),
    "a time too many": (dict(HEUN, c=(0.0, 1.0, 1.0)), "stage i"),
    "a row of another sum": (dict(HEUN, a=((), (0.9,))), "sum to its c"),
    "a first time that is not 0": (dict(HEUN, c=(0.1, 1.0)), "sum to its c"),
    "weights of another sum": (dict(HEUN, b=(1 / 2, 1 / 3)), "b to 1"),
    "an error weight too few": (dict(HEUN, error=(1.0, -1.0)), "one weight more"),
    "an error weight too many": (dict(HEUN, error=(1.0, -1.0, 1.0, -1.0)), "one weight more"),
    "error weights of another sum": (dict(HEUN, error=(1.0, -1.0, 0.1)), "sum to 0"),
}


@parametrize("coefficients_and_message", INVALID)
def test_invalid_tableaus(coefficients_and_message):
    coefficients, message = coefficients_and_message
    with pytest.raises(ValueError, match=message):
        Tableau(**coefficients)


def test_valid_tableau():
    assert set(ORDERS) == set(TABLEAUS) <= set(METHODS)
    tableau = Tableau(**HEUN, error=(0.5, 0.0, -0.5), order=2)
    assert hash(tableau) == hash(Tableau(**HEUN, error=(0.5, 0.0, -0.5), order=2))


@each_method
def test_coefficients(method):
    tableau, order = TABLEAUS[method], ORDERS[method]
    moments = [sum(b * c**k for b, c in zip(tableau.b, tableau.c, strict=True)) for k in range(order)]
    assert moments == pytest.approx([1 / (k + 1) for k in range(order)], abs=1e-14)
    if method in FIXED:
        return
    # The embedded method is of one order less, so that the error of a step goes with the method's order.
    assert tableau.order == order
    times = (*tableau.c, 1.0)
    moments = [sum(e * c**k for e, c in zip(tableau.error, times, strict=True)) for k in range(order)]
    assert moments[:-1] == pytest.approx([0.0] * (order - 1), abs=1e-15)
    assert abs(moments[-1]) > 1e-4
    peer = PEERS[method]
    assert tableau.error == pytest.approx(peer.c_error.tolist(), abs=1e-15)
    assert (*tableau.b, 0.0) == pytest.approx(peer.c_sol.tolist(), abs=1e-15)
    assert (*tableau.c[1:], 1.0) == pytest.approx(peer.alpha.tolist(), abs=1e-15)
    for row, expected in zip(tableau.a[1:], peer.beta, strict=False):
        assert row == pytest.approx(expected.tolist(), abs=1e-15)


@forward_or_backward
@each_method
def test_order_of_convergence(method, times):
    # Of values and of gradients, for those of the steps are the steps of the gradients.
    y0, w = (leaf.requires_grad_() for leaf in pulsed_leaves(5))
    exact = exact_pulsed(y0, w, *times)
    exact = [*exact, *torch.autograd.grad(loss_of(*exact), (y0, w))]
    errors = []
    for steps in (32, 64) if ORDERS[method] == 5 else (64, 128):
        field, grid = pulsed(w), torch.linspace(*times, steps + 1).tolist()
        executor, _ = field.stepper(TABLEAUS[method], field.initial_state(y0))
        end, path = executor.solve(fixed(grid, 10_000), field.initial_state(y0))
        assert path.nfe == len(field.times) == steps * len(TABLEAUS[method].b)
        end += torch.autograd.grad(loss_of(*end), (y0, w))
        parts = [(a - e).norm().item() for a, e in zip(end, exact, strict=True)]
        errors.append((math.hypot(*parts[:2]), math.hypot(*parts[2:])))
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True)]
    assert slopes == pytest.approx([ORDERS[method]] * 2, abs=0.4)


@each_adaptive
def test_order_of_the_error_estimate(method):
    y0, w = pulsed_leaves(5)
    executor, _ = pulsed(w).stepper(TABLEAUS[method], (y0, torch.zeros(5)))
    y = executor.pack((y0, torch.zeros(5)))
    errors = [executor.step(0.3, h, y, None, (0.0, 1.0)).ratio for h in (0.05, 0.025, 0.0125)]
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([TABLEAUS[method].order] * 2, abs=0.3)


@each_adaptive
def test_a_step_of_adaptive_methods_is_that_of_torchdiffeq(method):
    y0, w = pulsed_leaves(2, 3)
    solver = Solver(method, 10.0, 10.0, options={"first_step": 1.0})
    own, other = (integrate(s, pulsed(w), y0) for s in (solver, by_torchdiffeq(solver)))
    assert (own.stats.backend, other.stats.backend) == ("autograd", "torchdiffeq")
    assert own.stats.accepted == other.stats.accepted == 1
    assert_close(own.state, other.state, 1e-14)


# Steps

INTERVALS = {
    "forward": (0.0, 1.0),
    "backward": (1.0, 0.0),
    "awkward": (0.1, 0.7),
    "awkward, backward": (0.7, 0.1),
    "negative": (-0.3, 0.1),
    "far": (1000.1, 1000.7),
    "short": (0.1, 0.1001),
}


@parametrize("ends", INTERVALS)
@pytest.mark.parametrize("step_size", (None, 1 / 3, 0.1, 7.0))
@each_fixed
def test_fixed_steps_are_those_of_torchdiffeq(method, step_size, ends):
    y0, w = pulsed_leaves(2, 3)
    solver = Solver(method, options={} if step_size is None else {"step_size": step_size})
    field = pulsed(w)
    own, other = integrate(solver, field, y0, *ends), integrate(by_torchdiffeq(solver), pulsed(w), y0, *ends)
    assert_close(own.state, other.state, 1e-14)
    assert own.stats == other.stats and own.stats.nfe == len(field.times)
    assert (own.stats.rejected, own.stats.nfe_backward) == (0, 0)
    assert (own.stats.backend, other.stats.backend, own.stats.method) == ("autograd", "torchdiffeq", method)


@parametrize("ends", {name: ends for name, ends in INTERVALS.items() if name != "short"})
@pytest.mark.parametrize("tolerance", (1e-2, 1e-4, 1e-6))
@each_adaptive
def test_statistics_of_adaptive_steps(method, tolerance, ends):
    y0, w = pulsed_leaves(3)
    speed = 7 * w
    field = Known(lambda t, y: (speed * torch.cos(20 * t) * y, torch.cos(20 * t) * y[..., 0]))
    stats = integrate(Solver(method, tolerance, tolerance), field, y0, *ends).stats
    times, stages = field.times, len(TABLEAUS[method].b)
    assert stats.nfe == len(times) == 1 + stages * (stats.accepted + stats.rejected)
    # An attempt evaluates at t + c h and last at t + h, the next at the same t if it was rejected, or at t + h.
    attempts = [times[i : i + stages] for i in range(1, len(times), stages)]
    c = TABLEAUS[method].c[1]
    starts = [(attempt[0] - c * attempt[-1]) / (1 - c) for attempt in attempts]
    accepted = [abs(b - a[-1]) < abs(b - s) for a, s, b in zip(attempts, starts, starts[1:], strict=False)]
    assert stats.accepted == 1 + sum(accepted)
    assert stats.rejected > 0 and stats.accepted > 1
    # Never out of the interval but by rounding, and exactly at its end.
    assert times[0] == ends[0] and times[-1] == ends[1]
    assert min(ends) - 1e-12 <= min(times) and max(times) <= max(ends) + 1e-12
    assert stats.nfe_backward == 0


@each_adaptive
def test_a_smooth_field_takes_one_step(method):
    y0, _ = pulsed_leaves(3)
    for speed in (1e-6, 1e-3):
        stats = integrate(Solver(method, 1e-3, 1e-3), pulsed(torch.tensor(speed)), y0).stats
        assert (stats.accepted, stats.rejected, stats.nfe) == (1, 0, 1 + len(TABLEAUS[method].b))


@parametrize("ends", INTERVALS)
@pytest.mark.parametrize("tolerance", (1e-2, 1e-5))
@each_adaptive
def test_what_is_left_is_divided_evenly(method, tolerance, ends):
    # A rotation is equally hard everywhere: once its step is found, all are alike, and the last one is no remainder.
    rate = 30.0 / min(1.0, 2 * abs(ends[1] - ends[0]))
    turn = torch.tensor([[0.0, rate], [-rate, 0.0]])
    field = Known(lambda t, y: (y @ turn, y.new_zeros(y.shape[:-1])))
    stats = integrate(Solver(method, rtol=1e-12, atol=tolerance), field, torch.eye(2), *ends).stats
    stages = len(TABLEAUS[method].b)
    # Of all attempts; those at the end are accepted. (The last of all times has no attempt after it.)
    sizes = [abs(b - a) for a, b in zip(field.times[::stages], field.times[stages::stages], strict=False)]
    latest = sizes[-(stats.accepted // 2) :]
    assert stats.rejected <= 6 and stats.accepted >= 4
    assert max(latest) < 1.2 * min(latest)


@forward_or_backward
@pytest.mark.parametrize("tolerance", (1e-2, 1e-3, 1e-5))
@each_adaptive
def test_rejected_steps_do_no_harm(method, tolerance, times):
    y0, w = torch.rand(4, 2, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    field = Known(lambda t, y: (w * torch.cos(20 * t) * y, w * torch.cos(20 * t) * y.sum(-1)), w)
    solution = integrate(Solver(method, tolerance, tolerance), field, y0, *times)
    assert solution.stats.rejected > 0
    growth = (w * (math.sin(20 * times[1]) - math.sin(20 * times[0])) / 20).exp()
    exact = y0 * growth, (y0 * (growth - 1)).sum(-1)
    actual, expected = ([*end, *torch.autograd.grad(loss_of(*end), (y0, w))] for end in (solution.state, exact))
    assert_close(actual, expected, 100 * tolerance)


def one_hard_among_many(part):
    """A field, its initial state and its exact solution at time 1: sample 321 is stiff, the 999 others are easy."""
    rates = torch.ones(1000, 1)
    rates[321] = 200.0
    start = torch.full((1000, 1), 2.0)
    if part == "state":
        field = Known(lambda t, y: (rates * (torch.cos(t) - y) - torch.sin(t), -rates[:, 0] + 0 * y[:, 0]))
        return field, start, (math.cos(1.0) + torch.exp(-rates), -rates[:, 0])
    field = Known(lambda t, y: (-y, (rates * torch.exp(-rates * t))[:, 0] + 0 * y[:, 0]))
    return field, start, (start * math.exp(-1.0), -torch.expm1(-rates)[:, 0])


@pytest.mark.parametrize("part, bound", {"state": 3e-3, "integral": 1.5e-2}.items())
@each_adaptive
def test_every_sample_meets_the_tolerance(method, part, bound, monkeypatch):
    def worst():
        field, start, exact = one_hard_among_many(part)
        end = integrate(Solver(method, 1e-3, 1e-3), field, start).state
        return max((a - e).abs().max().item() for a, e in zip(end, exact, strict=True))

    assert worst() < bound

    def average(error, start, end, sizes, dim, tolerances):
        scale = tolerances[1] + tolerances[0] * torch.maximum(start.abs(), end.abs())
        return max(math.sqrt(part.mean()) for part in (error / scale).square().split(sizes, dim))

    # In an average over the batch it would drown.
    monkeypatch.setattr(stepper, "error_ratio", average)
    assert worst() > 1.5 * bound


# Plain functions


def coupled(t, state):
    """Each part by all others: a vector, a number and a matrix for each sample, and something empty."""
    x, q, m, nothing = state
    turned = (m @ x.unsqueeze(-1)).squeeze(-1)
    return turned.sin() + t * q.unsqueeze(-1), x.sum(-1) * q.cos(), x.unsqueeze(-1) * x.unsqueeze(-2) - m, nothing


def coupled_state(*batch):
    shapes = (*batch, 3), batch, (*batch, 3, 3), (*batch, 0)
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


@each_method
@forward_or_backward
@pytest.mark.parametrize("batch", ((), (2, 3)), ids=str)
def test_states_of_any_parts(method, batch, times):
    state = coupled_state(*batch)
    options = {"first_step": 1.2} if method in ADAPTIVE else {"step_size": 0.4}
    solver = Solver(method, 100.0, 100.0, options=options)
    ends = [s.integrate(coupled, state, *times) for s in (solver, by_torchdiffeq(solver))]
    assert ends[0].stats.backend == "autograd" and ends[0].stats.reason == "the field is a plain function"
    gradients = [torch.autograd.grad(sum(part.sin().sum() for part in end.state), state[:3]) for end in ends]
    both = ([*end.state[:3], *gradient] for end, gradient in zip(ends, gradients, strict=True))
    assert_close(*both, 1e-11)
    assert [part.shape for part in ends[0].state] == [part.shape for part in state]
    if not batch:
        alone = solver.integrate(lambda t, x: x.cos(), state[0], *times)
        pair = solver.integrate(lambda t, x: (x[0].cos(),), (state[0],), *times)
        assert torch.equal(alone.state, pair.state[0])


def test_parts_are_not_taken_for_integrals_or_scores():
    """Harmonic motion, both parts of which depend on both; and a third part that decays."""

    def end(x):
        solution = Solver("rk4").integrate(lambda t, y: (y[1], -y[0], -y[2]), (x, 0 * x, x.detach()), 0.0, 1.0)
        assert solution.stats.backend == "autograd"
        return solution.state

    x = torch.ones(1, 1)
    assert_close(end(x), [x * math.cos(1.0), -x * math.sin(1.0), x * math.exp(-1.0)], 1e-5)
    assert_close([torch.func.jacrev(lambda x: end(x)[0])(x).reshape(1, 1)], [x * math.cos(1.0)], 1e-5)
    third = torch.ones(1, 1, requires_grad=True)
    state = Solver("rk4").integrate(lambda t, y: (-y[0], y[1], -y[2]), (x, x[..., 0], third), 0.0, 1.0).state
    assert_close(torch.autograd.grad(state[2].sum(), third), [x * math.exp(-1.0)], 1e-5)


def test_integrals_go_on_from_where_they_were():
    y0, w = pulsed_leaves(3)
    start = torch.randn(3, requires_grad=True)
    for solver in (Solver("rk4"), Solver(rtol=1e-12, atol=1e-12)):
        y1, integral = solver.integrate(pulsed(w).augmented, (y0, start), 0.0, 1.0).state
        assert_close([y1, integral - start], integrate(solver, pulsed(w), y0).state, 1e-11)
        assert torch.equal(torch.autograd.grad(integral.sum(), start)[0], torch.ones(3))


WRONG = {
    "a part of another shape": (lambda t, y: (y[0][..., :1].squeeze(-1), y[1]), (3, 2)),
    "a sum over the batch": (lambda t, y: (y[0], y[1].expand(2, 3)), (3,)),
}


@parametrize("wrong", WRONG)
def test_fields_that_return_other_shapes(wrong):
    function, shape = wrong
    for method in ("rk4", "dopri5"):
        with pytest.raises(ValueError, match=rf"field must return the shape of the state, \({shape[0]}"):
            Solver(method).integrate(function, (torch.ones(3, 2), torch.ones(3)), 0.0, 1.0)
        with pytest.raises(ValueError, match=r"field must return shapes \(3, 2\) and \(3,\) for value and divergence"):
            integrate(Solver(method), Known(lambda t, y: (y, y.sum())), torch.ones(3, 2))


@pytest.mark.parametrize("method", ("rk4", "dopri5"))
def test_fields_that_return_other_parts(method):
    state = torch.ones(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="must return the 2 parts of the state, but returned 1"):
        Solver(method).integrate(lambda t, y: (y[0],), state, 0.0, 1.0)


def test_what_broadcasts_to_the_state_is_taken():
    end = Solver("rk4").integrate(
        lambda t, y: (torch.ones(1), torch.ones(())), (torch.zeros(3, 2), torch.zeros(3)), 0.0, 2.0
    )
    assert_close(end.state, [torch.full((3, 2), 2.0), torch.full((3,), 2.0)], 1e-14)


@forward_or_backward
@each_adaptive
def test_first_step(method, times):
    seen = []

    def decay(t, y):
        seen.append(float(t))
        return -50 * y

    length = abs(times[1] - times[0])
    y0, tableau = torch.ones(3, 2), TABLEAUS[method]
    solver = Solver(method, 1e-6, 1e-6)
    stats = solver.integrate(decay, y0, *times).stats
    # A slope, one at the end of a short Euler step, and then a step that passes or almost does.
    assert stats.nfe == len(seen) == 2 + len(tableau.b) * (stats.accepted + stats.rejected)
    assert abs(seen[1] - times[0]) < 1e-3 * length and abs(seen[1 + len(tableau.b)] - times[0]) < 0.1 * length
    assert all(min(times) <= t <= max(times) for t in seen)
    seen.clear()
    given = dataclasses.replace(solver, options={"first_step": length / 8})
    stats = given.integrate(decay, y0, *times).stats
    assert stats.nfe == len(seen) == 1 + len(tableau.b) * (stats.accepted + stats.rejected)
    assert seen[len(tableau.b)] == pytest.approx(times[0] + (times[1] - times[0]) / 8)
    for at_rest in (torch.zeros(3, 2), torch.full((3, 2), 1e-9)):
        assert solver.integrate(lambda t, y: -y, at_rest, *times).stats.nfe < 70


OTHERS = {
    "min_step": (Solver(options={"min_step": 0.0}), r"options \['min_step'\] are torchdiffeq's"),
    "norm": (Solver(options={"norm": lambda state: torch.cat([p.flatten() for p in state]).norm()}), r"\['norm'\]"),
    "grid_constructor": (
        Solver("rk4", options={"grid_constructor": lambda func, y0, t: torch.linspace(*t.tolist(), 4)}),
        r"\['grid_constructor'\]",
    ),
    "perturb": (Solver("rk4", options={"perturb": True}), r"\['perturb'\]"),
    "adjoint": (Solver(adjoint=True), "adjoint=True"),
    "adjoint, rk4": (Solver("rk4", adjoint=True), "adjoint=True"),
    "dopri8": (Solver("dopri8"), "the method 'dopri8' has no tableau"),
    "explicit_adams": (
        Solver("explicit_adams", options={"step_size": 0.05}),
        "the method 'explicit_adams' has no tableau",
    ),
}


@parametrize("other", OTHERS)
def test_other_solvers(other):
    solver, reason = other
    y0, w = (leaf.requires_grad_() for leaf in pulsed_leaves(4))
    solution = integrate(solver, pulsed(w), y0)
    assert solution.stats.backend == "torchdiffeq"
    assert re.search(reason, solution.stats.reason)
    exact = exact_pulsed(y0, w, 0.0, 1.0)
    both = ([*end, *torch.autograd.grad(loss_of(*end), (y0, w))] for end in (solution.state, exact))
    assert_close(*both, 1e-2)


# Failures


def one_large():
    """A batch whose sample (1, 2) meets a pole at t = 1 / 2."""
    batch = torch.full((2, 3, 1), 0.1)
    batch[1, 2] = 2.0
    return batch


def square(t, y):
    return y.square(), 2 * y[..., 0]


def undefined(t, y):
    return torch.where(t > 0.4, math.nan, 1.0) * y, y[..., 0]


STEP = {"options": {"step_size": 0.01}}
#: With the text, and the earliest and latest time of the failure.
FAILURES = {
    "underflow": (Solver(rtol=1e-2, atol=1e-2), square, "step size underflowed", (0.4, 0.6)),
    "underflow, bosh3": (Solver("bosh3", 1e-2, 1e-2), square, "step size underflowed", (0.4, 0.6)),
    "max_nfe": (Solver(max_nfe=50), square, "more than max_nfe evaluations .*max_nfe = 50", (0.1, 0.5)),
    "max_nfe, bosh3": (Solver("bosh3", max_nfe=50), square, "max_nfe = 50", (0.1, 0.5)),
    "max_nfe, rk4": (Solver("rk4", max_nfe=39), square, "max_nfe = 39", (0.899, 0.901)),
    "non-finite": (Solver(), undefined, "state became non-finite", (0.39, 0.41)),
    "non-finite, rk4": (Solver("rk4", **STEP), undefined, "state became non-finite", (0.39, 0.42)),
    "non-finite at once": (Solver(), lambda t, y: (y / 0, y[..., 0]), "state became non-finite", (0.0, 0.0)),
    "non-finite at once, rk4": (Solver("rk4"), lambda t, y: (y / 0, y[..., 0]), "non-finite", (0.0, 0.0)),
    "overflow, rk4": (Solver("rk4", **STEP), lambda t, y: square(t, 3 * y), "non-finite", (0.05, 0.2)),
    "overflow of the integral": (Solver("rk4"), lambda t, y: (y, (800 * y[..., 0]).exp()), "non-finite", (0.0, 0.1)),
}


@parametrize("failure", FAILURES)
@pytest.mark.parametrize("grad", (False, True), ids=("without gradients", "with gradients"))
def test_failures(failure, grad):
    solver, function, text, (earliest, latest) = failure
    y0, errors = one_large().requires_grad_(grad), []
    for plain in (False, True):
        field = Known(function)
        with pytest.raises(SolverError, match=f"(?s){text}") as raised:
            if plain:
                solver.integrate(field.augmented, (y0, torch.zeros(2, 3)), 0.0, 1.0)
            else:
                integrate(solver, field, y0)
        error = raised.value
        assert earliest <= error.time <= latest
        assert function is not square or error.sample == (1, 2)
        assert f"t = {error.time:.6g} after {error.nfe} evaluations" in str(error)
        # Nothing is evaluated again to explain it; but steps of fixed size look at the state in the end alone.
        assert error.nfe == len(field.times) or not solver.adaptive and error.nfe < len(field.times)
        errors.append(error)
    assert errors[0].sample == errors[1].sample


@each_method
def test_max_nfe_is_a_bound(method):
    # What a solve takes is enough, and one evaluation less is not.
    y0, w = pulsed_leaves(3)
    for solve in (
        integrate,
        lambda solver, field, y0: solver.integrate(field.augmented, field.initial_state(y0), 0, 1),
    ):
        nfe = solve(Solver(method), pulsed(w), y0).stats.nfe
        assert method in ADAPTIVE or nfe == 10 * len(TABLEAUS[method].b)
        assert solve(Solver(method, max_nfe=nfe), pulsed(w), y0).stats.nfe == nfe
        field = pulsed(w)
        with pytest.raises(SolverError, match="max_nfe") as raised:
            solve(Solver(method, max_nfe=nfe - 1), field, y0)
        assert raised.value.nfe == len(field.times) < nfe


@each_method
def test_errors_of_the_field_are_not_hidden(method):
    def broken(t, y):
        raise ValueError("a bug of the user")

    with pytest.raises(ValueError, match="a bug of the user"):
        integrate(Solver(method), Known(broken), torch.ones(2, 3))
    with pytest.raises(ValueError, match="a bug of the user"):
        Solver(method).integrate(broken, torch.ones(2, 3), 0.0, 1.0)


def test_rejected_steps_keep_nothing(monkeypatch):
    seen, evaluate = [], AutogradStepper.evaluate
    monkeypatch.setattr(
        AutogradStepper, "evaluate", lambda self, t, y: seen.append(weakref.ref(y)) or evaluate(self, t, y)
    )
    w = torch.tensor(2.0, requires_grad=True)
    field = Known(lambda t, y: (w * torch.cos(20 * t) * y, torch.cos(20 * t) * y[..., 0]), w)
    solution = integrate(Solver(), field, torch.rand(4, 2))
    assert solution.stats.rejected > 0
    assert sum(state() is not None for state in seen) <= len(TABLEAUS["dopri5"].b) * solution.stats.accepted + 1
    del solution
    assert not any(state() is not None for state in seen)
