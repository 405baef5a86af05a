# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import copy
import gc
import itertools
import math
import weakref
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torchdiffeq._impl import bosh3, dopri5

from pyro_hollow import HollowCNF, HollowNN, Solver, SolverError, conditional_hollow_cnf, hollow_cnf
from pyro_hollow.nn import Conditioner
from pyro_hollow.nn.tape import HollowTape
from pyro_hollow.ode import runge_kutta
from pyro_hollow.ode.runge_kutta import TABLEAUS, Tableau
from pyro_hollow.ode.solver import METHODS

CONTEXT_DIM = 2
FIXED = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAPTIVE = {"bosh3": 3, "dopri5": 5}
ORDERS = {**FIXED, **ADAPTIVE}

#: torchdiffeq's tableaus, to which a method's error estimate is compared.
PEERS = {"bosh3": bosh3._BOGACKI_SHAMPINE_TABLEAU, "dopri5": dopri5._DORMAND_PRINCE_SHAMPINE_TABLEAU}


def parametrize(name, cases):
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


each_method = pytest.mark.parametrize("method", TABLEAUS)
each_fixed = pytest.mark.parametrize("method", FIXED)
each_adaptive = pytest.mark.parametrize("method", ADAPTIVE)
one_of_each = pytest.mark.parametrize("method", ("rk4", "dopri5"))
forward_or_inverse = parametrize("inverse", {"forward": False, "inverse": True})


# Which way a solve takes


@contextlib.contextmanager
def generic_path():
    """Sends every solve to torchdiffeq."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "_by_tape", lambda *args: None)
        yield


@contextlib.contextmanager
def watched_path():
    """Yields a list that tells for every solve whether it went by tape."""
    ways, integrate = [], Solver.integrate

    def watched(*args, **kwargs):
        ways.append(False)  # also of a solve that fails
        solution = integrate(*args, **kwargs)
        ways[-1] = solution.stats.backend in ("tape", "compiled")
        return solution

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "integrate", watched)
        yield ways


@contextlib.contextmanager
def by_tape():
    """Makes sure that every solve goes by tape."""
    with watched_path() as ways:
        yield
    assert ways and all(ways)


@contextlib.contextmanager
def not_by_tape():
    """Makes sure that no solve goes by tape, though it may be tried."""
    with watched_path() as ways:
        yield
    assert ways and not any(ways)


# Fields and flows


class FunctionTape:
    """A tape of any function of (t, x) and tensors that gives (f, q), differentiated automatically."""

    def __init__(self, field, batch_shape):
        self.field, self.batch_shape = field, batch_shape
        self.totals = [torch.zeros_like(tensor) for tensor in field.tensors]

    def pack(self, x):
        return x.reshape(-1, x.shape[-1]).mT

    def unpack(self, x):
        return x.mT.reshape(*self.batch_shape, -1)

    def _evaluate(self, t, x):
        f, q = self.field.function(torch.tensor(t, dtype=x.dtype), x.mT.reshape(*self.batch_shape, -1))
        return self.pack(f), q.reshape(-1)

    def record(self, t, x):
        self.field.times.append(t)
        self.field.states.append(weakref.ref(x))
        with torch.no_grad():
            return *self._evaluate(t, x), (x,)

    def pull(self, t, saved, f_bar, q_bar):
        with torch.enable_grad():
            x = saved[0].detach().requires_grad_()
            gradients = torch.autograd.grad(
                self._evaluate(t, x), (x, *self.field.tensors), (f_bar, q_bar), materialize_grads=True
            )
        for total, gradient in zip(self.totals, gradients[1:], strict=True):
            total += gradient
        return gradients[0]

    def gradients(self):
        return tuple(self.totals)


class Known:
    """A field of pairs (state, integral) with a tape, which remembers the times of its evaluations."""

    def __init__(self, function, *tensors):
        self.function, self.tensors = function, tensors
        self.times, self.states = [], []

    def __call__(self, t, state):
        self.times.append(float(t.detach()))
        return self.function(t, state[0])

    def tape(self, batch_shape):
        return FunctionTape(self, batch_shape)


def pulsed(w):
    """
    The field y' = w cos(3 t) y (1 - y) in each coordinate with its divergence: neither linear nor autonomous, and its
    solution is known.
    """

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
    return solver.integrate(field, (y0, y0.new_zeros(y0.shape[:-1])), t0, t1)


def strengthen(flow, std=0.3):
    """Fresh flows are close to the identity, where most mistakes would not show."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += std * torch.randn_like(parameter)
    return flow


def make_flow(d=3, hidden_dims=(6, 5), method="rk4", step_size=0.4, tolerance=1e-5, transformer_dim=4, **kwargs):
    options = {"step_size": step_size} if method in FIXED else {}
    solver = Solver(method, tolerance, tolerance, options=options)
    flow = hollow_cnf(d, list(hidden_dims), solver=solver, cache_size=0, transformer_dim=transformer_dim, **kwargs)
    return strengthen(flow)


def make_conditional(d=3, method="rk4", **kwargs):
    options = {"step_size": 0.4} if method in FIXED else {}
    solver = Solver(method, options=options)
    flow = conditional_hollow_cnf(d, CONTEXT_DIM, [6, 5], solver=solver, cache_size=0, transformer_dim=4, **kwargs)
    return strengthen(flow)


def both(flow, x, inverse=False):
    """Value and log-determinant."""
    return flow.inv.call_and_ladj(x) if inverse else flow.call_and_ladj(x)


def loss_of(y, ladj):
    """Depends on each element in its own way."""
    weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype, device=y.device).view(y.shape).cos()
    others = torch.arange(1.0, ladj.numel() + 1, dtype=y.dtype, device=y.device).view(ladj.shape).sin()
    return (y * weights).sum() + (ladj * others).sum()


def results(flow, x, *others, inverse=False):
    """Value, log-determinant and all gradients."""
    x = x.detach().requires_grad_()
    y, ladj = both(flow, x, inverse)
    leaves = [x, *others, *flow.nn.parameters()]
    gradients = torch.autograd.grad(loss_of(y, ladj), leaves, materialize_grads=True)
    return [y.detach(), ladj.detach(), *gradients]


def both_ways(function):
    with by_tape():
        taped = function()
    with generic_path():
        return taped, function()


def assert_close(actual, expected, tolerance=1e-10):
    """Up to a tolerance, relative for elements larger than 1."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = a.detach(), e.detach()
        assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item())


# Tableaus


def test_every_method_has_an_order_here():
    assert set(ORDERS) == set(TABLEAUS) <= set(METHODS)


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
    tableau = Tableau(**HEUN, error=(0.5, 0.0, -0.5), order=2)
    assert hash(tableau) == hash(Tableau(**HEUN, error=(0.5, 0.0, -0.5), order=2))


@each_method
def test_quadrature_is_exact_up_to_the_order(method):
    tableau, order = TABLEAUS[method], ORDERS[method]
    moments = [sum(b * c**k for b, c in zip(tableau.b, tableau.c, strict=True)) for k in range(order)]
    assert moments == pytest.approx([1 / (k + 1) for k in range(order)], abs=1e-14)


@each_adaptive
def test_error_weights_vanish_on_polynomials(method):
    # The embedded method is of one order less, so that the error of a step goes with the method's order.
    tableau = TABLEAUS[method]
    assert tableau.order == ORDERS[method]
    moments = [
        sum(e * c**k for e, c in zip(tableau.error, (*tableau.c, 1.0), strict=True)) for k in range(tableau.order)
    ]
    assert moments[:-1] == pytest.approx([0.0] * (tableau.order - 1), abs=1e-15)
    assert abs(moments[-1]) > 1e-4


@each_adaptive
def test_coefficients_are_those_of_torchdiffeq(method):
    tableau, peer = TABLEAUS[method], PEERS[method]
    assert tableau.error == pytest.approx(peer.c_error.tolist(), abs=1e-15)
    assert (*tableau.b, 0.0) == pytest.approx(peer.c_sol.tolist(), abs=1e-15)
    assert (*tableau.c[1:], 1.0) == pytest.approx(peer.alpha.tolist(), abs=1e-15)
    for row, expected in zip(tableau.a[1:], peer.beta, strict=False):
        assert row == pytest.approx(expected.tolist(), abs=1e-15)


@parametrize("times", {"forward": (0.3, 1.5), "backward": (1.5, 0.3)})
@each_method
def test_order_of_convergence(method, times):
    # Of values and of gradients, for those of the steps are the steps of the gradients.
    y0, w = (leaf.requires_grad_() for leaf in pulsed_leaves(5))
    t0, t1 = times
    exact = exact_pulsed(y0, w, t0, t1)
    exact = [*exact, *torch.autograd.grad(loss_of(*exact), (y0, w))]
    errors = []
    for steps in (32, 64) if ORDERS[method] == 5 else (64, 128):
        grid = torch.linspace(t0, t1, steps + 1).tolist()
        tableau = TABLEAUS[method]
        end, path = runge_kutta.solve(pulsed(w), None, tableau, runge_kutta.fixed(tableau, grid), y0)
        assert path.nfe == steps * len(tableau.b)
        end += torch.autograd.grad(loss_of(*end), (y0, w))
        parts = [(a - e).norm().item() for a, e in zip(end, exact, strict=True)]
        errors.append((math.hypot(*parts[:2]), math.hypot(*parts[2:])))
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(*errors, strict=True)]
    assert slopes == pytest.approx([ORDERS[method]] * 2, abs=0.4)


@each_adaptive
def test_order_of_the_error_estimate(method):
    y0, w = pulsed_leaves(5)
    tableau, errors = TABLEAUS[method], []
    for h in (0.1, 0.05, 0.025):
        tape = pulsed(w).tape((5,))
        x = tape.pack(y0)
        slopes = [f for f, *_ in runge_kutta._stages(tape, tableau, 0.3, h, x, [])]
        end = runge_kutta._step(x, h, tableau.b, slopes)
        slopes.append(tape.record(0.3 + h, end)[0])
        errors.append(runge_kutta._error(tableau, h, x, end, slopes, 0.0, 1.0).mean().sqrt().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([tableau.order] * 2, abs=0.3)


@parametrize("times", {"forward": (0.3, 1.5), "backward": (1.5, 0.3)})
@each_fixed
def test_fixed_methods_are_those_of_torchdiffeq(method, times):
    y0, w = pulsed_leaves(2, 3)
    solver = Solver(method, options={"step_size": 0.25})
    taped, generic = both_ways(lambda: integrate(solver, pulsed(w), y0, *times))
    assert_close(taped.state, generic.state, 1e-14)
    assert taped.stats == generic.stats


@each_adaptive
def test_a_step_of_adaptive_methods_is_that_of_torchdiffeq(method):
    y0, w = pulsed_leaves(2, 3)
    taped = integrate(Solver(method, 10.0, 10.0), pulsed(w), y0)
    peer = Solver(method, 10.0, 10.0, options={"first_step": 1.0})
    with not_by_tape():
        generic = integrate(peer, pulsed(w), y0)
    assert taped.stats.accepted == generic.stats.accepted == 1
    assert_close(taped.state, generic.state, 1e-14)


# Steps


@parametrize("ends", {"forward": (0.0, 1.0), "backward": (1.0, 0.0), "awkward": (0.1, 0.7), "short": (0.1, 0.1001)})
@pytest.mark.parametrize("step_size", (None, 1 / 3, 0.1, 7.0))
@each_fixed
def test_statistics_of_fixed_steps(method, step_size, ends):
    y0, w = pulsed_leaves(3)
    solver = Solver(method, options={} if step_size is None else {"step_size": step_size})
    field = pulsed(w)
    with by_tape():
        stats = integrate(solver, field, y0, *ends).stats
    with generic_path():
        expected = integrate(solver, pulsed(w), y0, *ends).stats
    assert stats == expected
    assert stats.nfe == len(field.times)
    assert (stats.rejected, stats.nfe_backward) == (0, 0)


INTERVALS = {
    "forward": (0.0, 1.0),
    "backward": (1.0, 0.0),
    "awkward": (0.1, 0.7),
    "awkward, backward": (0.7, 0.1),
    "negative": (-0.3, 0.1),
    "far": (1000.1, 1000.7),
}


@parametrize("ends", INTERVALS)
@pytest.mark.parametrize("tolerance", (1e-2, 1e-4, 1e-7))
@each_adaptive
def test_statistics_of_adaptive_steps(method, tolerance, ends):
    y0, w = pulsed_leaves(3)
    speed = 7 * w
    field = Known(lambda t, y: (speed * torch.cos(20 * t) * y, torch.cos(20 * t) * y[..., 0]))
    with by_tape():
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


@pytest.mark.parametrize("speed", (1e-3, 1.0))
@each_adaptive
def test_a_smooth_field_takes_one_step(method, speed):
    y0, _ = pulsed_leaves(3)
    stats = integrate(Solver(method, 1e-3, 1e-3), pulsed(torch.tensor(1e-3 * speed)), y0).stats
    assert (stats.accepted, stats.rejected, stats.nfe) == (1, 0, 1 + len(TABLEAUS[method].b))


@parametrize("ends", INTERVALS)
@pytest.mark.parametrize("tolerance", (1e-2, 1e-4, 1e-6))
@each_adaptive
def test_what_is_left_is_divided_evenly(method, tolerance, ends):
    # A rotation is equally hard everywhere: once its step is found, all are alike, and the last one is no remainder.
    turn = torch.tensor([[0.0, 30.0], [-30.0, 0.0]])
    field = Known(lambda t, y: (y @ turn, y.new_zeros(y.shape[:-1])))
    stats = integrate(Solver(method, rtol=1e-12, atol=tolerance), field, torch.eye(2), *ends).stats
    stages = len(TABLEAUS[method].b)
    # Of all attempts; those at the end are accepted. (The last of all times has no attempt after it.)
    sizes = [abs(b - a) for a, b in zip(field.times[::stages], field.times[stages::stages], strict=False)]
    latest = sizes[-(stats.accepted // 2) :]
    assert stats.rejected <= 6 and stats.accepted >= 4
    assert max(latest) < 1.2 * min(latest)


@parametrize("times", {"forward": (0.3, 1.5), "backward": (1.5, 0.3)})
@pytest.mark.parametrize("tolerance", (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7))
@each_adaptive
def test_rejected_steps_do_no_harm(method, tolerance, times):
    y0 = torch.rand(4, 2, requires_grad=True)
    w = torch.tensor(2.0, requires_grad=True)
    field = Known(lambda t, y: (w * torch.cos(20 * t) * y, w * torch.cos(20 * t) * y.sum(-1)), w)
    solution = integrate(Solver(method, tolerance, tolerance), field, y0, *times)
    assert solution.stats.rejected > 0
    growth = (w * (math.sin(20 * times[1]) - math.sin(20 * times[0])) / 20).exp()
    exact = y0 * growth, (y0 * (growth - 1)).sum(-1)
    actual, expected = ([*end, *torch.autograd.grad(loss_of(*end), (y0, w))] for end in (solution.state, exact))
    assert_close(actual, expected, 100 * tolerance)


@each_adaptive
def test_float32_adaptive(method):
    y0, w = (leaf.float() for leaf in pulsed_leaves(4))
    with by_tape():
        solution = integrate(Solver(method, 1e-4, 1e-4), pulsed(w), y0, 0.1, 1.7)
    assert_close(solution.state, exact_pulsed(y0, w, 0.1, 1.7), 1e-3)


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
    # In an average over the batch it would drown.
    average = runge_kutta._error
    monkeypatch.setattr(runge_kutta, "_error", lambda *args: average(*args).mean(-1, keepdim=True))
    assert worst() > 1.5 * bound


def test_the_integral_goes_on_from_where_it_was():
    y0, w = pulsed_leaves(3)
    start = torch.randn(3, requires_grad=True)
    for method in ("rk4", "dopri5"):
        with by_tape():
            y1, integral = Solver(method).integrate(pulsed(w), (y0, start), 0.0, 1.0).state
        assert_close([y1, integral - start], integrate(Solver(method), pulsed(w), y0).state, 1e-14)
        assert torch.equal(torch.autograd.grad(integral.sum(), start)[0], torch.ones(3))


# Whole flows


@pytest.mark.parametrize("activation", ("tanh", "softplus", "silu"))
@forward_or_inverse
@pytest.mark.parametrize("hidden_dims", ((5,), (6, 5), (4, 6, 5)), ids=str)
@each_fixed
def test_flows_of_fixed_step(method, hidden_dims, inverse, activation):
    flow, x = make_flow(3, hidden_dims, method, activation=activation), torch.randn(4, 3)
    taped, generic = both_ways(lambda: results(flow, x, inverse=inverse))
    # torch takes softplus for linear beyond 20, where its slope is 2e-9 from 1; the tape does not.
    assert_close(taped, generic, 1e-8 if activation == "softplus" else 1e-10)
    assert all(gradient.any() for gradient in taped[2:])


@pytest.mark.parametrize("batch_shape", ((), (1,), (2, 3), (1, 4), (3, 1)), ids=str)
@pytest.mark.parametrize("d", (1, 2, 5))
def test_batch_shapes(d, batch_shape):
    flow, x = make_flow(d), torch.randn(*batch_shape, d)
    taped, generic = both_ways(lambda: results(flow, x))
    assert_close(taped, generic)
    assert taped[0].shape == x.shape and taped[1].shape == batch_shape


CONTEXTS = {
    "each its own": ((4,), (4,)),
    "single": ((4,), ()),
    "one": ((5, 4), (1,)),
    "row": ((5, 4), (4,)),
    "column": ((5, 4), (5, 1)),
    "one of one": ((1, 1), (1,)),
    "single of single": ((), ()),
}


@parametrize("shapes", CONTEXTS)
@forward_or_inverse
def test_conditional_flows(shapes, inverse):
    batch_shape, context_shape = shapes
    flow, x = make_conditional(), torch.randn(*batch_shape, 3)
    context = torch.randn(*context_shape, CONTEXT_DIM, requires_grad=True)
    taped, generic = both_ways(lambda: results(flow.condition(context), x, context, inverse=inverse))
    assert_close(taped, generic)
    assert taped[3].any()


@each_method
def test_float32(method):
    flow = make_flow(method=method)
    single, x = copy.deepcopy(flow).float(), torch.randn(4, 3)
    with by_tape():
        expected = results(flow, x)
        actual = results(single, x.float())
    assert_close(actual, [value.float() for value in expected], 1e-3 if method in ADAPTIVE else 1e-4)


@cache
def reference(inverse):
    """A flow, an input and what a tight solve by torchdiffeq gives."""
    torch.manual_seed(0)
    flow, x = make_flow(3, (6, 5)), torch.randn(5, 3)
    flow.solver = Solver("dopri8", 1e-10, 1e-10)
    return flow, x, results(flow, x, inverse=inverse)


@pytest.mark.parametrize("tolerance", (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7))
@forward_or_inverse
@each_adaptive
def test_flows_of_adaptive_step(method, inverse, tolerance):
    flow, x, expected = reference(inverse)
    flow = HollowCNF(flow.nn, solver=Solver(method, tolerance, tolerance), cache_size=0)
    with by_tape():
        actual = results(flow, x, inverse=inverse)
    assert_close(actual, expected, 100 * tolerance)


@one_of_each
def test_inverse_undoes(method):
    flow, x = make_flow(method=method, step_size=0.02, tolerance=1e-7), torch.randn(4, 3)
    with by_tape():
        y, ladj = flow.call_and_ladj(x)
        back, inverse_ladj = flow.inv.call_and_ladj(y)
    assert (y - x).abs().max() > 0.1
    assert_close([back, inverse_ladj], [x, -ladj], 1e-4)


# Backward passes


@one_of_each
def test_backward_twice(method):
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    leaves = [x, *flow.parameters()]
    with by_tape():
        loss = loss_of(*both(flow, x))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@one_of_each
def test_gradients_accumulate(method):
    flow, x = make_flow(method=method), torch.randn(4, 3)
    loss_of(*both(flow, x)).backward()
    once = [parameter.grad.clone() for parameter in flow.parameters()]
    loss_of(*both(flow, x)).backward()
    assert_close([parameter.grad for parameter in flow.parameters()], [2 * gradient for gradient in once], 1e-14)


LOSSES = {
    "value": lambda y, ladj: y.square().sum(),
    "log-determinant": lambda y, ladj: ladj.square().sum(),
    "a coordinate of a sample": lambda y, ladj: y[1, 2],
    "log-determinant of a sample": lambda y, ladj: ladj[1],
    "both": loss_of,
}


@parametrize("loss", LOSSES)
@one_of_each
def test_losses(loss, method):
    flow, x = make_flow(method=method, tolerance=1e-9), torch.randn(4, 3, requires_grad=True)
    leaves = [x, *flow.parameters()]
    taped, generic = both_ways(lambda: torch.autograd.grad(loss(*both(flow, x)), leaves, materialize_grads=True))
    assert_close(taped, generic, 1e-10 if method == "rk4" else 1e-6)


@pytest.mark.parametrize("wanted", ("x", "parameters", "some parameters", "context"))
@one_of_each
def test_what_requires_gradients(wanted, method):
    flow, x = make_conditional(method=method), torch.randn(4, 3, requires_grad=wanted == "x")
    context = torch.randn(4, CONTEXT_DIM, requires_grad=wanted == "context")
    for name, parameter in flow.named_parameters():
        parameter.requires_grad_(wanted == "parameters" or wanted == "some parameters" and "transformer" in name)
    leaves = [leaf for leaf in (x, context, *flow.parameters()) if leaf.requires_grad]

    def gradients():
        return torch.autograd.grad(loss_of(*both(flow.condition(context), x)), leaves)

    taped, generic = both_ways(gradients)
    assert leaves
    assert_close(taped, generic, 1e-10 if method == "rk4" else 1e-3)


@one_of_each
def test_nothing_requires_gradients(method):
    flow, x = make_flow(method=method), torch.randn(4, 3)
    with by_tape():
        expected = both(flow, x)
    assert all(value.requires_grad for value in expected)
    flow.requires_grad_(False)
    with by_tape():
        actual = both(flow, x)
    assert not any(value.requires_grad for value in actual)
    assert_close(actual, [value.detach() for value in expected], 1e-14)


@parametrize("context", {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode})
@one_of_each
def test_without_gradients(context, method):
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    with by_tape():
        expected = both(flow, x)
        with context():
            actual = both(flow, x)
    assert not any(value.requires_grad for value in actual)
    assert_close(actual, [value.detach() for value in expected], 1e-14)


@one_of_each
def test_double_backward(method):
    flow, x = make_flow(method=method, tolerance=1e-9), torch.randn(4, 3, requires_grad=True)
    leaves = [x, *flow.parameters()]

    def penalty():
        y, ladj = both(flow, x)
        gradients = torch.autograd.grad(loss_of(y, ladj), leaves, create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients) + y.square().sum()
        return [*gradients, *torch.autograd.grad(total, leaves, materialize_grads=True)]

    taped, generic = both_ways(penalty)
    assert all(gradient.any() for gradient in taped)
    assert_close(taped, generic, 1e-10 if method == "rk4" else 1e-6)


def test_gradients_by_finite_differences():
    flow = make_flow(2, (2,), step_size=0.5, transformer_dim=2)
    x = torch.randn(2, 2, requires_grad=True)

    def function(x, *_):
        return both(flow, x)

    with by_tape():
        assert torch.autograd.gradcheck(function, (x, *flow.parameters()))
    assert torch.autograd.gradgradcheck(lambda x: both(flow, x), x)


@each_method
def test_gradients_in_tensors_of_many_kinds(method):
    # Tensors that are leaves, or depend on leaves.
    y0, w = (leaf.requires_grad_() for leaf in pulsed_leaves(4))
    solver = Solver(method, 1e-9, 1e-9, options={"step_size": 0.25} if method in FIXED else {})
    for make in (lambda: pulsed(w), lambda: pulsed(w.square())):
        taped, generic = both_ways(
            lambda make=make: torch.autograd.grad(loss_of(*integrate(solver, make(), y0).state), (y0, w))
        )
        assert_close(taped, generic, 1e-12 if method in FIXED else 1e-6)


def test_an_input_that_was_overwritten_is_noticed():
    flow, x = make_flow(), torch.randn(4, 3)
    loss = loss_of(*both(flow, x))
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@one_of_each
def test_results_may_be_overwritten(method):
    # As those of torchdiffeq may be.
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(*both(flow, x)), x)
    y, ladj = both(flow, x)
    y *= 2
    ladj += 1
    assert_close(torch.autograd.grad(loss_of(y / 2, ladj - 1), x), [expected], 1e-14)


@pytest.mark.parametrize("grad", (False, True), ids=("without gradients", "with gradients"))
@one_of_each
def test_results_are_contiguous(method, grad):
    # As those of torchdiffeq are: views of them can be taken.
    flow, x = make_flow(method=method), torch.randn(4, 3)
    with torch.set_grad_enabled(grad):
        y, ladj = both(flow, x)
    assert y.is_contiguous() and ladj.is_contiguous()
    assert y.view(-1).shape == (12,)


@one_of_each
def test_checkpointing(method):
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(*both(flow, x)), x)
    end = torch.utils.checkpoint.checkpoint(lambda x: both(flow, x), x, use_reentrant=False)
    assert_close(torch.autograd.grad(loss_of(*end), x), [expected], 1e-14)


@one_of_each
def test_saved_tensors_hooks(method):
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    leaves = [x, *flow.parameters()]

    def gradients():
        first = torch.autograd.grad(loss_of(*both(flow, x)), leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)]

    expected, packed = gradients(), []
    with by_tape(), torch.autograd.graph.save_on_cpu():
        assert_close(gradients(), expected, 1e-14)
    with by_tape(), torch.autograd.graph.saved_tensors_hooks(lambda v: packed.append(v) or v, lambda v: v):
        loss = loss_of(*both(flow, x))
        assert_close(torch.autograd.grad(loss, leaves), expected[: len(leaves)], 1e-3)
    assert len(packed) > 10


@pytest.mark.parametrize("where", ("forward", "forward and backward", "backward"))
def test_autocast(where):
    # In the half precision of the generic path, or better.
    flow = make_flow().float()
    x = torch.randn(4, 3, dtype=torch.float32, requires_grad=True)
    leaves = [x, *flow.parameters()]
    expected = torch.autograd.grad(loss_of(*both(flow, x)), leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled="forward" in where):
        loss = loss_of(*both(flow, x))
    with torch.autocast("cpu", torch.bfloat16, enabled="backward" in where):
        gradients = torch.autograd.grad(loss, leaves)
    assert_close(gradients, expected, 0.1)


# Other ways to differentiate. The adaptive methods of torchdiffeq know neither functorch's transforms nor forward mode.

steps_that_transform = pytest.mark.parametrize("method", ("euler", "rk4"))


@steps_that_transform
def test_reverse_mode_transforms(method):
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    with by_tape():
        end = both(flow, x)
    (expected,) = torch.autograd.grad(loss_of(*end), x)
    with not_by_tape():
        actual = torch.func.grad(lambda x: loss_of(*both(flow, x)))(x.detach())
        end, pull = torch.func.vjp(lambda x: both(flow, x), x.detach())
        (ones,) = pull(tuple(torch.ones_like(value) for value in end))
    y, ladj = both(flow, x)
    assert_close([actual, ones], [expected, *torch.autograd.grad(y.sum() + ladj.sum(), x)])


def rows_of_jacobian(flow, x):
    """The Jacobian of value and log-determinant, by one backward pass for each element."""
    y, ladj = both(flow, x)
    return torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0] for v in (*y, ladj)])


@parametrize("transform", {"jacrev": torch.func.jacrev, "jacfwd": torch.func.jacfwd})
@steps_that_transform
def test_jacobians_by_transforms(transform, method):
    flow, x = make_flow(method=method), torch.randn(3, requires_grad=True)
    with by_tape():
        expected = rows_of_jacobian(flow, x)
    with not_by_tape():
        actual = transform(lambda x: torch.cat([both(flow, x)[0], both(flow, x)[1].unsqueeze(0)]))(x.detach())
    assert_close([actual], [expected])


def test_transforms_of_parameters():
    flow, x = make_flow(), torch.randn(4, 3)
    parameters = dict(flow.named_parameters())
    with by_tape():
        expected = torch.autograd.grad(flow(x).square().sum(), list(parameters.values()), materialize_grads=True)

    def loss(values):
        return torch.func.functional_call(flow, values, (x,)).square().sum()

    with not_by_tape():
        actual = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    assert_close(list(actual.values()), expected)


@steps_that_transform
def test_forward_mode(method):
    flow, x, direction = make_flow(method=method), torch.randn(4, 3), torch.randn(4, 3)
    inputs = x.clone().requires_grad_()
    with by_tape():
        y, ladj = both(flow, inputs)
    (gradient,) = torch.autograd.grad(loss_of(y, ladj), inputs)
    with not_by_tape(), forward_ad.dual_level():
        end = both(flow, forward_ad.make_dual(x, direction))
        actual = forward_ad.unpack_dual(loss_of(*end)).tangent
    assert_close([actual], [(gradient * direction).sum()])
    with not_by_tape():
        _, tangent = torch.func.jvp(lambda x: loss_of(*both(flow, x)), (x,), (direction,))
    assert_close([tangent], [actual], 1e-12)


@one_of_each
def test_forward_mode_over_a_backward_pass(method):
    flow, x = make_flow(method=method, tolerance=1e-9), torch.randn(4, 3, requires_grad=True)
    direction = torch.randn(4, 3)
    with by_tape():
        y, _ = both(flow, x)
    (expected,) = torch.autograd.grad(y, x, direction, retain_graph=True)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), direction))
        tangent = forward_ad.unpack_dual(gradient).tangent
    assert_close([tangent], [expected], 1e-10 if method == "rk4" else 1e-6)


@one_of_each
def test_batched_gradients(method):
    # Many backward passes at a time.
    flow, x = make_flow(method=method, tolerance=1e-9), torch.randn(4, 3, requires_grad=True)
    leaves, weights = [x, *flow.parameters()], torch.randn(2, 4, 3)
    with by_tape():
        y, _ = both(flow, x)
    each = [torch.autograd.grad(y, leaves, w, retain_graph=True, materialize_grads=True) for w in weights]
    actual = torch.autograd.grad(y, leaves, weights, is_grads_batched=True, materialize_grads=True)
    assert_close(actual, [torch.stack(pair) for pair in zip(*each, strict=True)], 1e-10 if method == "rk4" else 1e-6)


def test_vectorized_jacobian():
    flow, x = make_flow(), torch.randn(3)
    expected = torch.autograd.functional.jacobian(flow, x)
    assert_close([torch.autograd.functional.jacobian(flow, x, vectorize=True)], [expected])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_fixed
def test_tracing(method):
    flow = make_flow(method=method).requires_grad_(False)
    with not_by_tape():
        traced = torch.jit.trace(lambda x: both(flow, x), torch.randn(4, 3), check_trace=False)
    x = torch.randn(4, 3)  # a trace of a hollow network keeps the batch shape
    with by_tape():
        expected = both(flow, x)
    assert_close(traced(x), expected)


# What goes the generic way


class CustomConditioner(Conditioner):
    def __init__(self):
        super().__init__(3, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, t, x, context=None):
        total = x.sum(-1, keepdim=True) - x
        return torch.sin(self.scale * total + t).unsqueeze(-1).expand(*x.shape, self.hidden_dim)


WITHOUT = {
    "leave-one-out": lambda: HollowNN(3, [8, 4], conditioner="leave-one-out"),
    "conditioner of a user": lambda: HollowNN(3, conditioner=CustomConditioner()),
    "transformer of a user": lambda: HollowNN(3, [8, 4], transformer=nn.Sequential(nn.Linear(6, 1), nn.Tanh())),
}


@parametrize("make", WITHOUT)
@one_of_each
def test_networks_without_a_tape(make, method):
    flow = strengthen(HollowCNF(make(), solver=Solver(method, 1e-9, 1e-9), cache_size=0))
    x = torch.randn(4, 3)
    with not_by_tape():
        actual = results(flow, x)
    assert flow.last_solve.backend == "autograd"
    with generic_path():
        expected = results(flow, x)
    assert flow.last_solve.backend == "torchdiffeq"
    assert_close(actual, expected, 1e-11 if method == "rk4" else 1e-6)


def test_a_lucky_estimate_over_the_whole_interval_is_not_trusted_without_a_tape():
    """Strongly perturbed networks, whose first step used to be accepted with errors of 19 and 28 tolerances."""
    exact, coarse = (Solver(rtol=tolerance, atol=tolerance) for tolerance in (1e-9, 1e-3))
    for d, strength, seed in itertools.product((2, 10), (0.1, 0.2), range(5)):
        torch.manual_seed(seed)
        flow = strengthen(hollow_cnf(d, conditioner="leave-one-out", cache_size=0), strength)
        x = torch.randn(32, d)
        ends = []
        for flow.solver in (coarse, exact):
            with torch.no_grad():
                ends.append(flow.call_and_ladj(x)[0])
        assert (((ends[0] - ends[1]) / (1 + ends[1].abs())).square().mean(-1).sqrt() < 1e-2).all()


def test_a_pair_of_coupled_states_is_not_taken_for_a_state_and_its_integral():
    """Harmonic motion: both parts depend on both."""

    def end(x):
        return Solver("rk4").integrate(lambda t, y: (y[1], -y[0]), (x, 0 * x), 0.0, 1.0).state[0]

    x = torch.ones(1, 1)
    assert_close([end(x), torch.func.jacrev(end)(x).reshape(1, 1)], [x * math.cos(1.0)] * 2, 1e-5)


def grid_of_three(func, y0, t):
    return torch.linspace(float(t[0]), float(t[-1]), 4, dtype=t.dtype)


SOLVERS_WITHOUT = {
    "first_step": Solver(options={"first_step": 0.1}),
    "norm": Solver(options={"norm": lambda state: torch.cat([part.flatten() for part in state]).norm()}),
    "grid_constructor": Solver("rk4", options={"grid_constructor": grid_of_three}),
    "perturb": Solver("rk4", options={"perturb": True}),
    "adjoint": Solver(adjoint=True),
    "adjoint, rk4": Solver("rk4", adjoint=True),
    "dopri8": Solver("dopri8"),
    "explicit_adams": Solver("explicit_adams"),
}


@parametrize("solver", SOLVERS_WITHOUT)
def test_solvers_without_a_tape(solver):
    flow, x = make_flow(), torch.randn(4, 3)
    flow.solver = solver
    with not_by_tape():
        actual = results(flow, x)
    flow.solver = Solver(rtol=1e-9, atol=1e-9)
    assert_close(actual, results(flow, x), 1e-2)


@pytest.mark.parametrize("samples", (1, 2, 4))
@pytest.mark.parametrize("method", ("rk4", "dopri5", "euler"))
def test_a_field_without_its_divergence(method, samples):
    # A hollow field has a tape, but the state is a single tensor here.
    field, x = make_flow(2).nn.bind(), torch.randn(samples, 2)
    solver = Solver(method)
    end = solver.integrate(field, x, 0.0, 1.0).state
    with generic_path():
        expected = solver.integrate(field, x, 0.0, 1.0).state
    assert torch.equal(end, expected)


def one_large():
    """A batch whose sample (1, 2) meets a pole at t = 1 / 2."""
    batch = torch.full((2, 3, 1), 0.1)
    batch[1, 2] = 2.0
    return batch


def square(t, y):
    return y.square(), 2 * y[..., 0]


def undefined(t, y):
    return torch.where(t > 0.4, math.nan, 1.0) * y, y[..., 0]


FAILURES = {
    "underflow": (Solver(rtol=1e-2, atol=1e-2, max_nfe=100_000), square, "underflow"),
    "underflow, bosh3": (Solver("bosh3", 1e-2, 1e-2, max_nfe=100_000), square, "underflow"),
    "max_nfe": (Solver(max_nfe=50), square, "max_nfe = 50"),
    "max_nfe, bosh3": (Solver("bosh3", max_nfe=50), square, "max_nfe = 50"),
    "max_nfe, rk4": (Solver("rk4", max_nfe=39), square, "max_nfe = 39"),
    "non-finite": (Solver(), undefined, "non-finite|underflow"),
    "non-finite, rk4": (Solver("rk4"), undefined, "non-finite"),
    "overflow, rk4": (Solver("rk4", options={"step_size": 0.01}), lambda t, y: square(t, 3 * y), "non-finite"),
    "overflow of the integral": (Solver("rk4"), lambda t, y: (y, (800 * y[..., 0]).exp()), "non-finite"),
}


@parametrize("failure", FAILURES)
@pytest.mark.parametrize("grad", (False, True), ids=("without gradients", "with gradients"))
def test_failures_are_those_of_the_generic_path(failure, grad):
    solver, function, reason = failure
    y0 = one_large().requires_grad_(grad)
    errors = []
    for path in (not_by_tape, generic_path):
        with path(), pytest.raises(SolverError, match=reason) as raised:
            integrate(solver, Known(function), y0)
        errors.append(raised.value)
    taped, generic = errors
    assert str(taped) == str(generic)
    assert (taped.time, taped.sample, taped.nfe) == (generic.time, generic.sample, generic.nfe)


def spoil(value):
    def spoil_flow(flow):
        with torch.no_grad():
            flow.nn.transformer.weight[0, -1] = value

    return spoil_flow


def enlarge(flow):
    with torch.no_grad():
        flow.nn.transformer.weight[:, -2:] += 1e5


BROKEN = {"nan": spoil(math.nan), "infinite": spoil(math.inf), "diverging": enlarge}


@parametrize("breaks", BROKEN)
@one_of_each
def test_flows_that_fail(breaks, method):
    flow, x = make_flow(method=method, max_rate=None), torch.randn(4, 3)  # with a maximal rate, it would not diverge
    flow.solver = Solver(method, max_nfe=500)
    breaks(flow)

    def outcome():
        try:
            return [value.detach() for value in both(flow, x)]
        except SolverError as error:
            return str(error)

    with watched_path() as ways:
        actual = outcome()
    with generic_path():
        expected = outcome()
    if isinstance(expected, str):
        assert actual == expected and ways == [False]
    else:
        assert method == "rk4" and not isinstance(actual, str)
        assert all(torch.allclose(a, e, rtol=1e-9, equal_nan=False) for a, e in zip(actual, expected, strict=True))


@each_method
def test_max_nfe_is_a_bound(method):
    # What a solve takes is enough, and one evaluation less is not.
    y0, w = pulsed_leaves(3)
    tableau = TABLEAUS[method]
    nfe = integrate(Solver(method), pulsed(w), y0).stats.nfe
    times = torch.linspace(0, 1, 11).tolist()
    with by_tape():
        assert integrate(Solver(method, max_nfe=nfe), pulsed(w), y0).stats.nfe == nfe
    if method in FIXED:
        assert nfe == (len(times) - 1) * len(tableau.b)
        with pytest.raises(SolverError, match="max_nfe"):
            integrate(Solver(method, max_nfe=nfe - 1), pulsed(w), y0)
    else:
        march = runge_kutta.adaptive(tableau, 0.0, 1.0, 1e-5, 1e-5, nfe - 1)
        with pytest.raises(ArithmeticError, match="out of reach"):
            runge_kutta.solve(pulsed(w), None, tableau, march, y0)


def test_errors_of_the_field_are_not_hidden():
    def broken(t, y):
        raise ValueError("a bug of the user")

    with pytest.raises(ValueError, match="a bug of the user"):
        integrate(Solver(), Known(broken), torch.ones(2, 3))


# Memory


@pytest.fixture
def no_garbage_collection():
    """Without it nothing is freed that is part of a cycle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def recorded(monkeypatch):
    """What hollow tapes save, weakly."""
    seen, record = [], HollowTape.record

    def watched(self, t, x):
        f, divergence, saved = record(self, t, x)
        seen.extend(map(weakref.ref, (f, divergence, *saved)))
        return f, divergence, saved

    monkeypatch.setattr(HollowTape, "record", watched)

    def alive(*results):
        """How many are alive, but for views of results."""
        own = {result.data_ptr() for result in results}
        return len({id(v) for r in seen if (v := r()) is not None and v.data_ptr() not in own})

    return SimpleNamespace(count=lambda: len(seen), alive=alive)


@one_of_each
def test_nothing_outlives_a_solve(method, no_garbage_collection, recorded):
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    with by_tape():
        y, ladj = both(flow, x)
    loss_of(y, ladj).backward()
    assert recorded.count() > 10
    references = {
        name: weakref.ref(value)
        for name, value in (
            ("x", x),
            ("y", y),
            ("ladj", ladj),
            ("network", flow.nn),
            ("weight", flow.nn.transformer.weight),
        )
    }
    del flow, x, y, ladj
    assert [name for name, reference in references.items() if reference() is not None] == []
    assert recorded.alive() == 0


@one_of_each
def test_nothing_outlives_a_solve_without_a_backward_pass(method, no_garbage_collection, recorded):
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    y, ladj = both(flow, x)
    references = [weakref.ref(value) for value in (x, y, ladj, flow.nn)]
    del flow, x, y, ladj
    assert [reference() for reference in references] == [None] * 4
    assert recorded.count() > 10 and recorded.alive() == 0


@one_of_each
def test_records_are_gone_after_the_backward_pass(method, no_garbage_collection, recorded):
    flow, x = make_flow(method=method), torch.randn(4, 3, requires_grad=True)
    y, ladj = both(flow, x)
    loss_of(y, ladj).backward()
    assert y.requires_grad and recorded.count() > 10
    assert recorded.alive(y, ladj) == 0


@one_of_each
def test_records_are_gone_without_gradients(method, no_garbage_collection, recorded):
    flow, x = make_flow(method=method), torch.randn(4, 3)
    with torch.no_grad():
        y, ladj = both(flow, x)
    assert y is not None and recorded.count() > 10
    assert recorded.alive(y, ladj) == 0


def test_rejected_steps_keep_nothing(no_garbage_collection):
    w = torch.tensor(2.0, requires_grad=True)
    field = Known(lambda t, y: (w * torch.cos(20 * t) * y, torch.cos(20 * t) * y[..., 0]), w)
    solution = integrate(Solver(), field, torch.rand(4, 2))
    stats, stages = solution.stats, len(TABLEAUS["dopri5"].b)
    assert stats.rejected > 0
    alive = sum(state() is not None for state in field.states)
    # Views by which the state is known to the tape are its own; what is kept is at most a state for each stage.
    assert alive <= stages * stats.accepted + 1 < len(field.states)
    solution.state[0].sum().backward()
    assert sum(state() is not None for state in field.states) <= 1


def test_nothing_outlives_a_failed_solve(no_garbage_collection, recorded):
    flow, x = make_flow(method="dopri5"), torch.randn(4, 3, requires_grad=True)
    flow.solver = Solver(rtol=1e-9, atol=1e-9, max_nfe=20)
    with contextlib.suppress(SolverError):
        both(flow, x)
    references = [weakref.ref(value) for value in (x, flow.nn, flow.nn.transformer.weight)]
    assert recorded.count() > 10 and recorded.alive() == 0
    del flow, x
    assert [reference() for reference in references] == [None] * 3


# Devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_method
def test_cuda(method):
    host, x = make_flow(method=method, tolerance=1e-7), torch.randn(4, 3)
    device = copy.deepcopy(host).cuda()
    with by_tape():
        actual, expected = results(device, x.cuda()), results(host, x)
    assert all(value.is_cuda for value in actual)
    assert_close([value.cpu() for value in actual], expected, 1e-9 if method in FIXED else 1e-4)


def test_default_device_does_not_matter():
    flow, x = make_flow(), torch.randn(4, 3)
    expected = results(flow, x)
    with torch.device("meta"), by_tape():
        y, ladj = both(flow, x)
    assert_close([y.detach(), ladj.detach()], expected[:2], 1e-14)
