# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Every executor of explicit steps, on every network, against torchdiffeq and against one another."""

import contextlib
import copy
import dataclasses
import gc
import math
import os
import shutil
import weakref
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn

from pyro_hollow.nn import BoundConditioner, ConditionalHollowNN, Conditioner, GraphConditioner
from pyro_hollow.nn.activations import ACTIVATIONS
from pyro_hollow.nn.hollow_stepper import HollowStepper
from pyro_hollow.nn.layout import add_offset, columns, flatten_offset, flatten_time, project
from pyro_hollow.nn.native.stepper import NativeStepper
from pyro_hollow.ode import Solver, SolverError
from pyro_hollow.ode.explicit import TABLEAUS
from pyro_hollow.ops.stepper import AutogradStepper
from pyro_hollow.ops.vector_field import VectorField

CONTEXT_DIM = 2
COMPILER = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def parametrize(name, cases):
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


# Networks. That of a user shows all that a new conditioner takes.


class SineConditioner(Conditioner):
    """sin(w_i sum of the others + b_i + t), where the context shifts b_i."""

    def __init__(self, input_dim, hidden_dim, context_dim=0):
        super().__init__(input_dim, hidden_dim, context_dim)
        self.weight = nn.Parameter(torch.randn(input_dim, hidden_dim, 1))
        self.bias = nn.Parameter(torch.randn(input_dim * hidden_dim, 1))
        self.context_weight = nn.Parameter(torch.randn(input_dim * hidden_dim, context_dim)) if context_dim else None

    def bind(self, context=None):
        return BoundSine(
            self.weight, self.bias if context is None else project(context, self.context_weight, self.bias)
        )


class BoundSine(BoundConditioner):
    def __init__(self, weight, offset):
        self.weight, self.offset = self.tensors = weight, offset

    def __call__(self, t, x):
        h, _ = self.flattened(x.shape[:-1]).evaluate(flatten_time(t, x), columns(x))
        return h.permute(2, 0, 1).reshape(*x.shape, -1)

    def flattened(self, batch_shape):
        return BoundSine(self.weight, flatten_offset(self.offset, 1, batch_shape))

    def evaluate(self, t, x):
        others = (x.sum(0) - x).unsqueeze(1)
        z = self.weight * others + self.offset.view(*self.weight.shape[:2], -1) + t
        return z.sin(), (others, z)

    def vjp(self, saved, h_bar, x_bar):
        z_bar = h_bar * saved[1].cos()
        others_bar = (self.weight * z_bar).sum(1)
        return x_bar + others_bar.sum(0) - others_bar, (saved[0], z_bar)

    def accumulate(self, times, operands, sums):
        others, z_bar = operands
        sums[0] += (z_bar * others).sum(-1, keepdim=True)
        add_offset(sums[1], torch.zeros_like(self.offset[:, :1]), z_bar.flatten(0, 1), times)


class PlainConditioner(Conditioner):
    """Nothing but values."""

    def __init__(self, input_dim, hidden_dim, context_dim=0):
        super().__init__(input_dim, hidden_dim, context_dim)
        self.scale = nn.Parameter(torch.ones(()))
        self.context_weight = nn.Parameter(torch.ones(context_dim)) if context_dim else None

    def forward(self, t, x, context=None):
        shift = 0.0 if context is None else (context * self.context_weight).sum(-1, keepdim=True)
        total = x.sum(-1, keepdim=True) - x
        return torch.sin(self.scale * total + shift + t).unsqueeze(-1).expand(*x.shape, self.hidden_dim)


def on_a_graph(hidden_dims, max_degree, **settings):
    """A conditioner on a path, whose inner coordinates are hubs if they may have one edge only."""

    def make(d, _, context_dim):
        path = torch.ones(d, d).triu(-1).tril(1).bool()
        return GraphConditioner(d, hidden_dims, context_dim, adjacency=path, max_degree=max_degree, **settings)

    return network(BY_HAND if settings["activation"] == "softplus" else ALL, conditioner=make)


def network(executors, hidden_dims=None, **settings):
    """The executors of a network, and how it is made; parts of a user's are made with it."""

    def make(d, context_dim=0):
        own = {
            name: value(d, 4, context_dim) if callable(value) else value
            for name, value in ({"transformer_dim": 4} | settings).items()
        }
        return ConditionalHollowNN(d, context_dim, hidden_dims, **own)

    return executors, make


ALL = ("autograd", "hollow", "native")
BY_HAND = ("autograd", "hollow")
LAYERS = {"1 layer": [5], "2 layers": [6, 5], "3 layers": [4, 6, 5]}
MASKED_LAYERS = {"2 layers": [5, 4], "3 layers": [6, 5, 2]}
#: The executors of a network, and how it is made.
NETWORKS = {
    **{
        f"{conditioner}, {activation}, {layers}": network(
            BY_HAND if activation == "softplus" else ALL,
            hidden_dims,
            conditioner=conditioner,
            activation=activation,
        )
        for conditioner in ("grouped", "masked", "leave-one-out")
        for activation in ACTIVATIONS
        for layers, hidden_dims in (MASKED_LAYERS if conditioner == "masked" else LAYERS).items()
    },
    "silu and tanh": network(ALL, [6, 5], activation=("silu", "tanh")),
    "tanh and softplus": network(BY_HAND, [6, 5], activation=("tanh", "softplus")),
    "a low rate": network(ALL, [6, 5], max_rate=0.5),
    "a high rate": network(ALL, [6, 5], max_rate=4.0, activation="silu"),
    "any rate": network(ALL, [6, 5], max_rate=None),
    "wide": network(ALL, [9, 3, 17], transformer_dim=19),
    "one unit": network(ALL, [8], transformer_dim=1),
    **{
        f"graph, {activation}, {layers}, {hubs}": on_a_graph(
            LAYERS[layers], 1 if hubs == "hubs" else 2, activation=activation
        )
        for activation in ACTIVATIONS
        for layers, hubs in (("1 layer", "no hubs"), ("2 layers", "hubs"), ("3 layers", "no hubs"))
    },
    **{
        f"blocks, {conditioner}, {activation}": network(
            BY_HAND, [6, 5], conditioner=conditioner, activation=activation, block_dim=2, max_rate=2.0
        )
        for conditioner in ("grouped", "leave-one-out")
        for activation in ACTIVATIONS
    },
    "blocks, any rate": network(BY_HAND, [6, 5], block_dim=2),
    "blocks, transformer of a user": network(
        ("autograd",), [5], transformer=lambda *_: nn.Linear(8, 2), transformer_dim=None, block_dim=2
    ),
    "conditioner of a user, by hand": network(BY_HAND, conditioner=SineConditioner),
    "conditioner of a user": network(("autograd",), conditioner=PlainConditioner),
    "transformer of a user": network(
        ("autograd",), [5], transformer=lambda *_: nn.Sequential(nn.Linear(7, 1), nn.Tanh()), transformer_dim=None
    ),
}


class Executor(NamedTuple):
    name: str
    make: Callable


def pairs(*networks, whole=()):
    """Pairs of executors and networks: all executors of some networks, of the others only those that derive steps."""
    cases = []
    for network in networks:
        executors, make = NETWORKS[network]
        for name in executors if network in whole else executors[1:] or executors:
            missing = pytest.mark.skipif(name == "native" and COMPILER is None, reason="needs a C compiler")
            cases.append(pytest.param(Executor(name, make), id=f"{name}, {network}", marks=missing))
    return pytest.mark.parametrize("executor", cases)


GROUPED, MASKED, LEAVE_ONE_OUT = (f"{name}, tanh, 2 layers" for name in ("grouped", "masked", "leave-one-out"))
GRAPH = "graph, tanh, 2 layers, hubs"
OWN = "conditioner of a user, by hand"
every_pair = pairs(*NETWORKS, whole=NETWORKS)
each_derived = pairs(*(name for name, (executors, _) in NETWORKS.items() if "hollow" in executors))
each_executor = pairs(GROUPED, MASKED, LEAVE_ONE_OUT, GRAPH, OWN, "conditioner of a user", whole=[GROUPED])
each_of_grouped = pairs(GROUPED, GRAPH, "conditioner of a user", whole=[GROUPED])
one_of_each = pytest.mark.parametrize("method", ("rk4", "dopri5"))

SOLVERS = {
    **{name: Solver(name, options={"step_size": 0.5}) for name, tableau in TABLEAUS.items() if not tableau.error},
    "bosh3": Solver("bosh3", 1e-3, 1e-3),
    "dopri5": Solver("dopri5", 1e-4, 1e-4),
}
STEP = Solver("euler", options={"step_size": 2.0})
SHORT = Solver("midpoint", options={"step_size": 0.6})


class Plain(VectorField):
    """A field without an executor of its own."""

    def __init__(self, field):
        self.field, self.tensors = field, field.tensors

    def __call__(self, t, x):
        return self.field(t, x)

    def with_divergence(self, t, x):
        return self.field.with_divergence(t, x)


def make_net(executor, d=3, context_dim=0, std=0.3):
    """A network far from its initial state, in which many gradients are next to nothing."""
    net = executor.make(d, context_dim)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += std * torch.randn_like(parameter)
    return net


def solve(executor, solver, net, x, context=None, score=None, inverse=False):
    """The state, the integral of the divergence and the score at the end, by an executor or by torchdiffeq."""
    field, times = net.bind(context), ((1.3, 0.1) if inverse else (0.1, 1.3))
    if executor.name == "torchdiffeq":
        options = {"min_step": 0.0} if solver.adaptive else {"perturb": False}
        solver = dataclasses.replace(solver, options={**solver.options, **options})
    else:
        solver = dataclasses.replace(solver, compile=executor.name == "native")
        field = Plain(field) if executor.name == "autograd" else field
    solution = solver.integrate_with_divergence(field, x, *times, score)
    assert solution.stats.backend == executor.name
    solve.stats = solution.stats
    return solution.state


TORCHDIFFEQ = Executor("torchdiffeq", None)


def loss_of(y, integral):
    """Depends on each element in its own way."""
    weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype, device=y.device).view(y.shape).cos()
    others = torch.arange(1.0, integral.numel() + 1, dtype=y.dtype, device=y.device).view(integral.shape).sin()
    return (y * weights).sum() + (integral * others).sum()


def results(executor, solver, net, x, context=None, inverse=False):
    """State, integral and all gradients."""
    x = x.detach().requires_grad_()
    end = solve(executor, solver, net, x, context, inverse=inverse)
    leaves = [x, *(() if context is None else (context,)), *net.parameters()]
    return [*end, *torch.autograd.grad(loss_of(*end), leaves, allow_unused=True, materialize_grads=True)]


def assert_close(actual, expected, tolerance=1e-11):
    """Up to a tolerance, relative for elements larger than 1."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = a.detach(), e.detach()
        assert (a - e).abs().max() <= tolerance * max(1.0, e.abs().max().item())


# Values and gradients


@every_pair
def test_values_and_gradients(executor):
    net, x = make_net(executor, 4, CONTEXT_DIM), torch.randn(4, 4)
    context = torch.randn(4, CONTEXT_DIM, requires_grad=True)
    actual, expected = (results(who, SHORT, net, x, context) for who in (executor, TORCHDIFFEQ))
    # torch takes softplus for linear beyond 20, where its slope is 2e-9 from 1.
    assert_close(actual, expected, 1e-8)
    if not any(isinstance(module, PlainConditioner) for module in net.modules()):
        assert all(gradient.any() for gradient in actual[2:])
    net = make_net(executor, 4)
    assert_close(*(results(who, SHORT, net, x, inverse=True) for who in (executor, TORCHDIFFEQ)), 1e-8)


@cache
def exact(make, inverse):
    """A network, an input and the results of a tight solve by torchdiffeq."""
    net, x = make_net(Executor("torchdiffeq", make)), torch.randn(4, 3)
    return net, x, results(TORCHDIFFEQ, Solver("dopri8", 1e-10, 1e-10), net, x, inverse=inverse)


@pairs(
    "grouped, silu, 2 layers",
    "masked, tanh, 3 layers",
    "leave-one-out, softplus, 2 layers",
    "graph, silu, 2 layers, hubs",
)
@pytest.mark.parametrize("inverse", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize("method", SOLVERS)
def test_methods(executor, method, inverse):
    net, x, expected = exact(executor.make, inverse)
    solver = SOLVERS[method]
    if solver.adaptive:
        for tolerance in (1e-2, 1e-4):
            solver = dataclasses.replace(solver, rtol=tolerance, atol=tolerance)
            assert_close(results(executor, solver, net, x, inverse=inverse), expected, 100 * tolerance)
    else:
        actual = results(executor, solver, net, x, inverse=inverse)
        stats = solve.stats
        expected = results(TORCHDIFFEQ, solver, net, x, inverse=inverse)
        assert_close(actual, expected, 1e-9)
        assert stats == solve.stats
    if inverse:
        return
    single, solver = copy.deepcopy(net).float(), dataclasses.replace(solver, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):  # a default device does not matter
        lower = results(executor, solver, single, x.float(), inverse=inverse)
    assert_close(lower, [value.float() for value in expected], 1e-2 if solver.adaptive else 1e-4)


@pairs(GROUPED, MASKED, LEAVE_ONE_OUT, GRAPH, OWN)
@pytest.mark.parametrize("method", SOLVERS)
def test_all_executors_take_the_same_steps(executor, method):
    net, x, solver = make_net(executor), 3 * torch.randn(10, 3), SOLVERS[method]
    if solver.adaptive:  # of a step over the whole interval they trust different estimates
        solver = dataclasses.replace(solver, rtol=1e-5, atol=1e-5, options={"first_step": 1.2})
    actual = results(executor, solver, net, x)
    stats = solve.stats
    assert_close(actual, results(executor._replace(name="autograd"), solver, net, x), 1e-10)
    assert stats == solve.stats and stats.accepted > 1
    assert (stats.rejected > 0) == solver.adaptive


BATCHES = {
    "single": ((), None),
    "one": ((1,), None),
    "vector": ((4,), None),
    "matrix": ((2, 3), None),
    "single, single context": ((), ()),
    "one, one context": ((1,), (1,)),
    "one, single context": ((1,), ()),
    "one of one, one context": ((1, 1), (1,)),
    "vector, single context": ((4,), ()),
    "vector, one context": ((4,), (1,)),
    "vector, vector of contexts": ((4,), (4,)),
    "matrix, single context": ((2, 3), ()),
    "matrix, one context": ((2, 3), (1,)),
    "matrix, row of contexts": ((2, 3), (3,)),
    "matrix, row of contexts, kept": ((2, 3), (1, 3)),
    "matrix, column of contexts": ((2, 3), (2, 1)),
    "matrix, matrix of contexts": ((2, 3), (2, 3)),
    "square, row of contexts": ((3, 3), (3,)),
    "square, column of contexts": ((3, 3), (3, 1)),
    "row, vector of contexts": ((1, 4), (4,)),
    "column, one context": ((4, 1), (1, 1)),
    "cube, middle of contexts": ((2, 3, 2), (3, 1)),
}


@pairs(GROUPED, MASKED, LEAVE_ONE_OUT, GRAPH, OWN)
@parametrize("shapes", BATCHES)
def test_batch_shapes(executor, shapes):
    batch_shape, context_shape = shapes
    for d in (1, 3) if len(batch_shape) < 3 else (3,):
        net, x = make_net(executor, d, 0 if context_shape is None else CONTEXT_DIM), torch.randn(*batch_shape, d)
        context = None if context_shape is None else torch.randn(*context_shape, CONTEXT_DIM, requires_grad=True)
        actual, expected = (results(who, STEP, net, x, context) for who in (executor, TORCHDIFFEQ))
        assert_close(actual, expected)
        assert actual[0].shape == x.shape and actual[1].shape == batch_shape
    assert context is None or actual[3].any()
    stepper = make_stepper(executor, net.bind(context), "rk4", x)
    # Expanded tensors, as gradients of a sum are.
    for state in ((x, torch.randn(batch_shape)), (torch.randn(3).expand_as(x), torch.ones(()).expand(batch_shape))):
        assert all(map(torch.equal, stepper.unpack(stepper.pack(state)), state))


@each_executor
@pytest.mark.parametrize("method", ("heun2", "rk4", "dopri5"))
def test_scores(executor, method):
    net, x, score = make_net(executor), torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    net = net.requires_grad_(method != "rk4")
    solver = SOLVERS[method]
    expected = solve(TORCHDIFFEQ, solver, net, x, score=score)
    actual = solve(executor, solver, net, x.requires_grad_(), score=score)
    assert_close(actual, expected, 1e-2 if solver.adaptive else 1e-12)
    assert actual[0].requires_grad and not actual[2].requires_grad
    leaves = [x, *(p for p in net.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(loss_of(*actual[:2]), leaves, materialize_grads=True)
    assert_close(gradients[0].unsqueeze(0), results(executor, solver, net.requires_grad_(), x)[2].unsqueeze(0), 1e-12)


@each_executor
def test_frozen_parameters(executor):
    # All but one of them, each one alone, and all of them.
    net, x = make_net(executor, 3, CONTEXT_DIM), torch.randn(2, 3, 3)
    context = torch.randn(2, 1, CONTEXT_DIM, requires_grad=True)
    everything = [x.requires_grad_(), context, *net.parameters()]
    loss = loss_of(*solve(TORCHDIFFEQ, SHORT, net, x, context))
    expected = torch.autograd.grad(loss, everything, allow_unused=True, materialize_grads=True)
    for chosen in (*({i} for i in range(len(everything))), *(set(range(len(everything))) - {i} for i in (0, 1, 2, 4))):
        for i, leaf in enumerate(everything):
            leaf.requires_grad_(i in chosen)
        end = solve(executor, SHORT, net, x, context)
        leaves = [everything[i] for i in sorted(chosen)]
        if end[0].requires_grad:  # not all parameters of a user's conditioner need be used
            actual = torch.autograd.grad(loss_of(*end), leaves, allow_unused=True, materialize_grads=True)
            assert_close(actual, [expected[i] for i in sorted(chosen)])
    for leaf in everything:
        leaf.requires_grad_(False)
    assert not any(value.requires_grad for value in solve(executor, SHORT, net, x, context))


LOSSES = {
    "value": lambda y, q: y.square().sum(),
    "integral": lambda y, q: q.square().sum(),
    "a coordinate of a sample": lambda y, q: y[1, 2, 0],
    "integral of a sample": lambda y, q: q[1, 2],
}
#: Gradients that come in, such as are expanded or strided.
GRADIENTS = {
    "sum of integrals": lambda y, q: (torch.zeros_like(y), torch.ones(()).expand(q.shape)),
    "sum of values": lambda y, q: (torch.ones(()).expand(y.shape), torch.zeros_like(q)),
    "sums": lambda y, q: (torch.tensor(0.3).expand(y.shape), torch.tensor(-0.7).expand(q.shape)),
    "strided": lambda y, q: (torch.randn(*y.shape[::-1]).permute(2, 1, 0), torch.randn(*q.shape[::-1]).mT),
}


@each_executor
@pytest.mark.parametrize("d", (1, 3))
def test_incoming_gradients(executor, d):
    net, x = make_net(executor, d), torch.randn(4, 6, d, requires_grad=True)
    leaves = [x, *net.parameters()]
    ends = [solve(who, SHORT, net, x) for who in (executor, TORCHDIFFEQ)]
    for name, make in GRADIENTS.items():
        given = make(*ends[0])
        before = [value.clone() for value in given]
        both = [torch.autograd.grad(end, leaves, given, retain_graph=True, allow_unused=True) for end in ends]
        assert_close(*([v for v in gradients if v is not None] for gradients in both)), name
        assert all(map(torch.equal, given, before))
    for loss in LOSSES.values() if d == 3 else ():
        both = [torch.autograd.grad(loss(*end), leaves, retain_graph=True, materialize_grads=True) for end in ends]
        assert_close(*both)


# Backward passes

STEPS = {
    "rk4": Solver("rk4", options={"step_size": 0.6}),
    "dopri5": Solver(rtol=1e-4, atol=1e-4, options={"first_step": 0.6}),
}


@each_executor
@one_of_each
def test_backward_passes(executor, method):
    net, x = make_net(executor), torch.randn(4, 3, requires_grad=True)
    leaves = [x, *net.parameters()]
    loss = loss_of(*solve(executor, STEPS[method], net, x))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    # Twice.
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)
    # Accumulated.
    for _ in range(2):
        loss_of(*solve(executor, STEPS[method], net, x)).backward()
    assert_close([leaf.grad for leaf in leaves], [2 * gradient for gradient in first], 1e-13)
    # Behind results that were overwritten; they are contiguous, such that views of them can be taken.
    y, integral = solve(executor, STEPS[method], net, x)
    assert y.is_contiguous() and integral.is_contiguous() and y.view(-1).shape == (12,)
    y *= 2
    integral += 1
    assert_close(torch.autograd.grad(loss_of(y / 2, integral - 1), leaves), first, 1e-13)
    # By checkpointing.
    end = torch.utils.checkpoint.checkpoint(lambda x: solve(executor, STEPS[method], net, x), x, use_reentrant=False)
    assert_close(torch.autograd.grad(loss_of(*end), leaves), first, 1e-13)
    # None.
    with torch.no_grad():
        actual = solve(executor, STEPS[method], net, x)
    assert not any(value.requires_grad for value in actual) and actual[0].is_contiguous()
    assert_close(actual, [y / 2, integral - 1], 1e-13)


@each_executor
@one_of_each
def test_second_derivatives(executor, method):
    net, x = make_net(executor), torch.randn(4, 3, requires_grad=True)
    leaves = [x, *net.parameters()]
    solver = STEPS[method]

    def penalty(who):
        y, integral = solve(who, solver, net, x)
        gradients = torch.autograd.grad(loss_of(y, integral), leaves, create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients) + y.square().sum()
        return [*gradients, *torch.autograd.grad(total, leaves, materialize_grads=True)]

    actual = penalty(executor)
    assert all(gradient.any() for gradient in actual)
    assert_close(actual, penalty(TORCHDIFFEQ if method == "rk4" else executor._replace(name="autograd")), 1e-10)


@each_executor
def test_gradients_by_finite_differences(executor):
    net, x = make_net(executor, 2), torch.randn(1, 2, requires_grad=True)
    solver = Solver("midpoint", options={"step_size": 2.0})
    leaves = x, *net.parameters()
    assert torch.autograd.gradcheck(lambda *_: solve(executor, solver, net, x), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: solve(executor, solver, net, x), x, fast_mode=True)


@each_executor
def test_an_input_that_was_overwritten_is_noticed(executor):
    net, x = make_net(executor), torch.randn(4, 3)
    expected = results(executor, SHORT, net, x)[3:]
    loss = loss_of(*solve(executor, SHORT, net, x))
    with torch.no_grad():
        x += 1
    if executor.name == "autograd":  # which packs copies
        assert_close(torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True), expected, 1e-13)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_executor
@one_of_each
def test_saved_tensors_hooks(executor, method):
    # They may give back what was saved in another layout.
    net, x = make_net(executor), torch.randn(4, 3, requires_grad=True)
    leaves, packed = [x, *net.parameters()], []
    expected = torch.autograd.grad(loss_of(*solve(executor, STEPS[method], net, x)), leaves)

    def turned(value):
        packed.append(value.shape)
        return value.mT.contiguous() if value.dim() > 1 else value

    for hooks in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.saved_tensors_hooks(turned, lambda v: v.mT if v.dim() > 1 else v),
    ):
        with hooks:
            loss = loss_of(*solve(executor, STEPS[method], net, x))
            assert_close(torch.autograd.grad(loss, leaves), expected, 1e-12)
    assert len(packed) > (3 if executor.name == "native" else 10)


@each_executor
def test_batched_gradients(executor):
    # Many backward passes at a time.
    net, x = make_net(executor), torch.randn(2, 3, requires_grad=True)
    leaves, weights = [x, *net.parameters()], torch.randn(2, 2, 3)
    y, _ = solve(executor, STEPS["rk4"], net, x)
    each = [torch.autograd.grad(y, leaves, w, retain_graph=True, materialize_grads=True) for w in weights]
    actual = torch.autograd.grad(y, leaves, weights, is_grads_batched=True, materialize_grads=True)
    assert_close(actual, [torch.stack(pair) for pair in zip(*each, strict=True)], 1e-11)
    rows = torch.autograd.functional.jacobian(lambda x: solve(executor, STEPS["rk4"], net, x)[0], x)
    vectorized = torch.autograd.functional.jacobian(
        lambda x: solve(executor, STEPS["rk4"], net, x)[0], x, vectorize=True
    )
    assert_close([vectorized], [rows])
    direction = torch.randn(2, 3)
    y, _ = solve(executor, STEPS["rk4"], net, x)
    (expected,) = torch.autograd.grad(y, x, direction, retain_graph=True)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), direction))
        assert_close([forward_ad.unpack_dual(gradient).tangent], [expected])


@each_of_grouped
@pytest.mark.filterwarnings("ignore:compile=True has no effect")
def test_transforms_take_the_same_steps_by_autograd(executor):
    net, x, solver = make_net(executor), torch.randn(2, 3, requires_grad=True), STEPS["rk4"]
    direction = torch.randn(2, 3)
    y, integral = solve(executor, solver, net, x)
    (expected,) = torch.autograd.grad(loss_of(y, integral), x, retain_graph=True)
    rows = torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0] for v in (*y.flatten(), *integral)])
    compiled = dataclasses.replace(solver, compile=executor.name == "native")
    field = net.bind()
    field = Plain(field) if executor.name == "autograd" else field

    def function(x):
        solution = compiled.integrate_with_divergence(field, x, 0.1, 1.3)
        assert solution.stats.backend == "autograd"
        assert executor.name == "autograd" or solution.stats.reason == "the solve is transformed"
        return solution.state

    def flat(x):
        y, integral = function(x)
        return torch.cat([y.flatten(), integral])

    x = x.detach()
    _, pull = torch.func.vjp(function, x)
    actual = [torch.func.grad(lambda x: loss_of(*function(x)))(x), *pull((torch.ones(2, 3), torch.ones(2)))]
    assert_close(actual, [expected, rows.sum(0)])
    assert_close([torch.func.jacrev(flat)(x), torch.func.jacfwd(flat)(x)], [rows, rows])
    _, tangent = torch.func.jvp(lambda x: loss_of(*function(x)), (x,), (direction,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss_of(*function(forward_ad.make_dual(x, direction)))).tangent
    assert_close([tangent, dual], [(expected * direction).sum()] * 2)

    def by_parameters(values):
        return torch.func.functional_call(Solved(net, solver, executor), values, (x,)).square().sum()

    parameters = {f"net.{name}": value for name, value in net.named_parameters()}
    expected = torch.autograd.grad(y.square().sum(), list(parameters.values()), materialize_grads=True)
    actual = torch.func.grad(by_parameters)({name: value.detach() for name, value in parameters.items()})
    assert_close(list(actual.values()), expected)


class Solved(nn.Module):
    def __init__(self, net, solver, executor):
        super().__init__()
        self.net, self.solver, self.executor = net, solver, executor

    def forward(self, x):
        field = Plain(self.net.bind()) if self.executor.name == "autograd" else self.net.bind()
        return self.solver.integrate_with_divergence(field, x, 0.1, 1.3).state[0]


@each_of_grouped
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing(executor):
    net, x = make_net(executor).requires_grad_(False), torch.randn(4, 3)
    with torch.no_grad():
        traced = torch.jit.trace(Solved(net, SHORT, executor), torch.randn(4, 3), check_trace=False)
    assert_close([traced(x)], [solve(executor, SHORT, net, x)[0]])


@each_of_grouped
@pytest.mark.filterwarnings("ignore:compile=True has no effect")
@pytest.mark.parametrize("where", ("forward", "forward and backward", "backward"))
def test_autocast(executor, where):
    # In half precision, or better.
    net, x = make_net(executor).float(), torch.randn(4, 3, dtype=torch.float32, requires_grad=True)
    leaves = [x, *net.parameters()]
    expected = torch.autograd.grad(loss_of(*solve(executor, SHORT, net, x)), leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled="forward" in where):
        loss = loss_of(*solve(executor._replace(name="autograd"), SHORT, net, x))
    with torch.autocast("cpu", torch.bfloat16, enabled="backward" in where):
        gradients = torch.autograd.grad(loss, leaves)
    assert_close(gradients, expected, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        stats = (
            dataclasses.replace(SHORT, compile=executor.name == "native")
            .integrate_with_divergence(net.bind(), x, 0.0, 1.0)
            .stats
        )
    assert stats.backend == "autograd"
    assert "autocast is on" in stats.reason or executor.make is NETWORKS["conditioner of a user"][1]


# Failures


def spoil(value, *, rates=False):
    def spoil_net(net):
        with torch.no_grad():
            weight = net.transformer.weight
            (weight[:, -2:] if rates else weight[0, -1]).add_(value)

    return spoil_net


BROKEN = {"nan": spoil(math.nan), "infinite": spoil(math.inf), "diverging": spoil(1e5, rates=True)}


@pairs("any rate", LEAVE_ONE_OUT)
@parametrize("breaks", BROKEN)
@one_of_each
def test_failures(executor, breaks, method):
    net, x = make_net(executor), torch.randn(4, 3)
    net.transformer.max_rate = None  # with a maximal rate, it would not diverge
    breaks(net)
    outcomes = []
    for who in (executor, executor._replace(name="autograd")):
        field = Plain(net.bind()) if who.name == "autograd" else net.bind()
        field.network = net
        solver = Solver(method, max_nfe=200, compile=who.name == "native")
        try:
            outcomes.append(solver.integrate_with_divergence(field, x, 0.0, 1.0).state)
        except SolverError as error:
            outcomes.append((error.time, error.nfe, error.sample, str(error).partition(" at t = ")[0]))
    actual, expected = outcomes
    if isinstance(expected[0], float):
        assert actual == expected
        blamed = "parameters are not finite: transformer.weight: " if breaks is not BROKEN["diverging"] else ""
        assert expected[-1].startswith(blamed)
    else:
        assert method == "rk4" and breaks is BROKEN["diverging"]
        assert all(torch.allclose(a, e, rtol=1e-9, equal_nan=False) for a, e in zip(actual, expected, strict=True))


# Memory


@pytest.fixture
def watched(monkeypatch):
    """What steps save, weakly, while nothing is freed that is part of a cycle."""
    seen = []

    def watch(kind):
        step = kind.step

        def watched_step(self, *args):
            found = step(self, *args)
            seen.extend(map(weakref.ref, (self, found.end, *found.saved, found.first[0], *found.first[1])))
            return found

        monkeypatch.setattr(kind, "step", watched_step)

    for kind in (AutogradStepper, HollowStepper, NativeStepper):
        watch(kind)

    def alive(*own):
        """How many are alive, but for views of those."""
        own = {id(tensor) for tensor in own} | {tensor.data_ptr() for tensor in own}
        found = {id(v): v for reference in seen if (v := reference()) is not None}
        return sum(id(v) not in own and (not torch.is_tensor(v) or v.data_ptr() not in own) for v in found.values())

    gc.disable()
    yield SimpleNamespace(count=lambda: len(seen), alive=alive)
    gc.enable()


@each_executor
@one_of_each
def test_nothing_outlives_a_solve(executor, method, watched):
    net, x = make_net(executor), torch.randn(4, 3)
    with torch.no_grad():
        y, integral = solve(executor, STEPS[method], net, x)
    assert watched.count() > 5 and watched.alive(x, y, integral) == 0
    x.requires_grad_()
    y, integral = solve(executor, STEPS[method], net, x)
    assert executor.name == "autograd" or watched.alive(x, y, integral) > 0
    del y, integral  # without a backward pass
    assert watched.alive(x) == 0
    y, integral = solve(executor, STEPS[method], net, x)
    loss_of(y, integral).backward()
    assert y.requires_grad
    names = {"x": x, "y": y, "integral": integral, "network": net, "weight": net.transformer.weight}
    references = {name: weakref.ref(value) for name, value in names.items()}
    # Automatic differentiation keeps what it recorded until the results are gone.
    assert executor.name == "autograd" or watched.alive(x, y, integral) <= 1
    del net, x, y, integral, names
    assert [name for name, reference in references.items() if reference() is not None] == []
    assert watched.alive() == 0


@each_executor
def test_nothing_outlives_a_failed_solve(executor, watched):
    net, x = make_net(executor), torch.randn(4, 3, requires_grad=True)
    with contextlib.suppress(SolverError):
        solve(executor, Solver(rtol=1e-9, atol=1e-9, max_nfe=20), net, x)
    references = [weakref.ref(value) for value in (x, net, net.transformer.weight)]
    assert watched.count() > 5 and watched.alive(x) == 0
    del net, x
    assert [reference() for reference in references] == [None] * 3


# Devices


@each_executor
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(executor):
    if executor.name == "native":
        pytest.skip("is for a CPU")
    net, x = make_net(executor), torch.randn(4, 3)
    for solver in SOLVERS.values():
        actual = results(executor, solver, copy.deepcopy(net).cuda(), x.cuda())
        assert all(value.is_cuda for value in actual)
        expected = results(executor, solver, net, x)
        assert_close([value.cpu() for value in actual], expected, 1e-2 if solver.adaptive else 1e-9)


# Steps


def make_stepper(executor, field, method, x):
    field = Plain(field) if executor.name == "autograd" else field
    stepper, _ = field.stepper(TABLEAUS[method], field.initial_state(x), executor.name == "native")
    assert stepper.name == executor.name
    return stepper


@contextlib.contextmanager
def left_alone(*tensors):
    before = [tensor.clone() for tensor in tensors]
    yield
    assert all(map(torch.equal, tensors, before))


@each_executor
@pytest.mark.parametrize("d", (1, 3))
@one_of_each
def test_steps_leave_their_arguments_alone_and_are_the_same_twice(executor, method, d):
    # Another backward pass may need them.
    field, x = make_net(executor, d).bind(), torch.randn(4, d)
    stepper, tolerances = make_stepper(executor, field, method, x), (None if method == "rk4" else (1e-3, 1e-3))
    y = stepper.pack((x, torch.randn(4)))
    with torch.no_grad(), left_alone(y, *field.tensors):
        first = stepper.step(0.3, 0.2, y, None, tolerances)
        with left_alone(first.first[0], *first.first[1], *first.saved):
            for second in (
                stepper.step(0.3, 0.2, y, None, tolerances),
                stepper.step(0.3, 0.2, y, first.first, tolerances),
            ):
                assert torch.equal(first.end, second.end) and first.ratio == second.ratio
                assert all(map(torch.equal, first.saved, second.saved))
        if tolerances:
            with left_alone(first.end, first.last[0], *first.last[1]):
                after = stepper.step(0.5, 0.2, first.end, first.last, tolerances)
            assert_close([after.end], [stepper.step(0.5, 0.2, first.end, None, tolerances).end], 1e-14)
        score = torch.randn(4, d)
        with left_alone(score, *first.saved):
            carried = stepper.step_score(0.3, 0.2, first.saved, score)
            assert torch.equal(carried, stepper.step_score(0.3, 0.2, first.saved, score))


@each_derived
def test_gradients_of_steps(executor):
    """Sums of gradients over two steps, against those of steps that automatic differentiation records."""
    net, x = make_net(executor, 4, CONTEXT_DIM), torch.randn(2, 3, 4)
    field = net.bind(torch.randn(3, CONTEXT_DIM, requires_grad=True))
    recorded = make_stepper(executor._replace(name="autograd"), field, "rk4", x)
    bars = [(torch.randn(2, 3, 4), torch.randn(2, 3)) for _ in range(2)]
    starts, total = [torch.randn(2, 3, 4).requires_grad_() for _ in range(2)], 0.0
    for start, (x_bar, q_bar), t in zip(starts, bars, (0.3, -1.2), strict=True):
        end = recorded.unpack(recorded.step(t, 0.4, recorded.pack((start, torch.zeros(2, 3))), None, None).end)
        total = total + (end[0] * x_bar).sum() + (end[1] * q_bar).sum()
    expected = torch.autograd.grad(total, [*starts, *field.tensors], retain_graph=True, materialize_grads=True)
    stepper = make_stepper(executor, field, "rk4", x)
    with torch.no_grad():
        sums, alone, actual = stepper.new_sums(), [stepper.new_sums() for _ in bars], []
        assert not any(gradient.any() for gradient in stepper.gradients(sums))
        for start, bar, t, own in zip(starts, bars, (0.3, -1.2), alone, strict=True):
            saved = stepper.step(t, 0.4, stepper.pack((start, torch.zeros(2, 3))), None, None).saved
            y_bar = stepper.pack(bar)
            with left_alone(*saved, y_bar, *field.tensors):
                x_bar = stepper.step_vjp(t, 0.4, saved, y_bar, sums)
                assert torch.equal(x_bar, stepper.step_vjp(t, 0.4, saved, y_bar, own))
            actual.append(stepper.unpack(x_bar)[0])
        gradients = stepper.gradients(sums)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in field.tensors]
    assert_close([*actual, *gradients], expected, 1e-8)
    for together, *each in zip(gradients, *map(stepper.gradients, alone), strict=True):
        assert_close([together], [sum(each)], 1e-12)


@each_of_grouped
@one_of_each
def test_a_field_without_its_divergence(executor, method):
    # A plain function, though a hollow field has an executor for more.
    net, x = make_net(executor), torch.randn(4, 3)
    solution = STEPS[method].integrate(net.bind(), x, 0.1, 1.3)
    assert (solution.stats.backend, solution.stats.reason) == ("autograd", "the field is a plain function")
    expected = solve(executor, STEPS[method], net, x)[0]
    assert_close([solution.state], [expected], 1e-13 if method == "rk4" else 1e-3)


def test_executors_of_a_new_conditioner():
    """Its own derivatives are taken where it has some, and automatic ones where not."""
    state = torch.randn(4, 3), torch.zeros(4)
    for conditioner, kind, reason in (
        (SineConditioner, HollowStepper, ""),
        (PlainConditioner, AutogradStepper, "the conditioner has no vector-Jacobian product by hand"),
    ):
        field = ConditionalHollowNN(3, 0, conditioner=conditioner(3, 4)).bind()
        stepper, why = field.stepper(TABLEAUS["rk4"], state)
        assert (type(stepper), why) == (kind, reason)
    field = ConditionalHollowNN(3, 0, [4], transformer=nn.Linear(6, 1)).bind()
    assert field.stepper(TABLEAUS["rk4"], state)[1] == "the transformer has no vector-Jacobian product by hand"


@pairs(LEAVE_ONE_OUT, whole=[LEAVE_ONE_OUT])
def test_a_lucky_estimate_over_the_whole_interval_is_not_trusted(executor):
    """Strongly perturbed networks, whose first step used to be accepted with errors of up to 28 tolerances."""
    coarse, fine = (Solver(rtol=tolerance, atol=tolerance) for tolerance in (1e-3, 1e-5))
    for d, strength in ((2, 0.2), (10, 0.1)):
        for seed in range(5):
            torch.manual_seed(seed)
            net = ConditionalHollowNN(d, 0, conditioner="leave-one-out")
            executor = executor._replace(make=lambda *_, net=net: net)
            net, x = make_net(executor, std=strength).requires_grad_(False), torch.randn(32, d)
            actual = solve(executor, coarse, net, x)[0]
            expected = solve(executor._replace(name="hollow"), fine, net, x)[0]
            assert (((actual - expected) / (1 + expected.abs())).square().mean(-1).sqrt() < 1e-2).all()
