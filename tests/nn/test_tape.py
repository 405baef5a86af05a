# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy

import pytest
import torch
from torch import nn

from pyro_hollow.nn import ConditionalHollowNN, Conditioner, GroupedConditioner, HollowNN
from pyro_hollow.nn.activations import ACTIVATIONS, get_activation

CONTEXT_DIM = 2
TIMES = (0.0, 0.3, -1.2)

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_dim = pytest.mark.parametrize("d", [1, 2, 5])
each_depth = pytest.mark.parametrize("hidden_dims", [[5], [6, 5], [4, 6, 5]], ids=["1 layer", "2 layers", "3 layers"])

#: Batch shapes of the state and of the context, if any.
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
each_batch = pytest.mark.parametrize("batch_shape, context_shape", BATCHES.values(), ids=BATCHES)


def make_net(d, hidden_dims=(4, 3), context_dim=0, **kwargs):
    """A network far from its initial state, in which many gradients are next to nothing."""
    net = ConditionalHollowNN(d, context_dim, list(hidden_dims), transformer_dim=4, **kwargs)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return net


def make_field(d, batch_shape=(4,), context_shape=None, **kwargs):
    """The network, its field, and its context or None."""
    net = make_net(d, context_dim=0 if context_shape is None else CONTEXT_DIM, **kwargs)
    context = None if context_shape is None else torch.randn(*context_shape, CONTEXT_DIM, requires_grad=True)
    return net, net.bind(context), context


def assert_close(actual, expected, tolerance=1e-12):
    """Up to a tolerance relative to the largest element."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def weights_of(batch_shape, d):
    return torch.randn(*batch_shape, d), torch.randn(batch_shape)


def by_tape(field, times, states, weights):
    """Gradients of sum(weights * (f, divergence)), over all times, in the states and in the field's tensors."""
    batch_shape = states[0].shape[:-1]
    with torch.no_grad():
        tape = field.tape(batch_shape)
        records = [tape.record(t, tape.pack(x))[2] for t, x in zip(times, states, strict=True)]
        states_bar = [
            tape.unpack(tape.pull(t, saved, tape.pack(f_bar), q_bar.reshape(-1)))
            for t, saved, (f_bar, q_bar) in zip(times, records, weights, strict=True)
        ]
        return [*states_bar, *tape.gradients()]


def by_autograd(field, times, states, weights):
    states = [x.detach().requires_grad_() for x in states]
    loss = 0
    for t, x, (f_bar, q_bar) in zip(times, states, weights, strict=True):
        f, divergence = field.with_divergence(x.new_tensor(t), x)
        loss = loss + (f * f_bar).sum() + (divergence * q_bar).sum()
    return list(torch.autograd.grad(loss, [*states, *field.tensors], retain_graph=True, materialize_grads=True))


def check_gradients(field, batch_shape, d, tolerance=1e-11):
    states = [torch.randn(*batch_shape, d) for _ in TIMES]
    weights = [weights_of(batch_shape, d) for _ in TIMES]
    actual, expected = (way(field, TIMES, states, weights) for way in (by_tape, by_autograd))
    assert len(actual) == len(expected) == len(TIMES) + len(field.tensors)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)


def check_record(field, batch_shape, d):
    x = torch.randn(*batch_shape, d)
    with torch.no_grad():
        tape = field.tape(batch_shape)
        for t in TIMES:
            f, divergence, _ = tape.record(t, tape.pack(x))
            expected = field.with_divergence(torch.tensor(t), x)
            assert_close(tape.unpack(f), expected[0])
            assert_close(divergence.view(batch_shape), expected[1])


# One evaluation


@each_activation
@each_dim
@each_depth
def test_record_is_the_field_with_its_divergence(activation, d, hidden_dims):
    _, field, _ = make_field(d, hidden_dims=hidden_dims, activation=activation)
    check_record(field, (4,), d)


@each_batch
def test_record_of_every_batch_shape(batch_shape, context_shape):
    _, field, _ = make_field(3, batch_shape, context_shape)
    check_record(field, batch_shape, 3)


@each_batch
def test_pack_and_unpack(batch_shape, context_shape):
    _, field, _ = make_field(3, batch_shape, context_shape)
    tape, x = field.tape(batch_shape), torch.randn(*batch_shape, 3)
    assert torch.equal(tape.unpack(tape.pack(x)), x)
    # Expanded tensors, as gradients of a sum are.
    x = torch.randn(3).expand(*batch_shape, 3)
    assert torch.equal(tape.unpack(tape.pack(x)), x)


@each_activation
@each_dim
@each_depth
@pytest.mark.parametrize("context_shape", [None, (4,)], ids=["no context", "context"])
def test_gradients(activation, d, hidden_dims, context_shape):
    _, field, _ = make_field(d, (4,), context_shape, hidden_dims=hidden_dims, activation=activation)
    check_gradients(field, (4,), d)


@each_batch
@each_dim
def test_gradients_of_every_batch_shape(batch_shape, context_shape, d):
    _, field, _ = make_field(d, batch_shape, context_shape)
    check_gradients(field, batch_shape, d)


@each_activation
@each_dim
@pytest.mark.parametrize("hidden_dims", [[5, 4], [6, 5, 2]], ids=["2 layers", "3 layers"])
@pytest.mark.parametrize("context_shape", [None, (4,)], ids=["no context", "context"])
def test_masked(activation, d, hidden_dims, context_shape):
    settings = {"conditioner": "masked", "hidden_dims": hidden_dims, "activation": activation}
    _, field, _ = make_field(d, (4,), context_shape, **settings)
    check_record(field, (4,), d)
    check_gradients(field, (4,), d)


def test_activations_of_two_kinds():
    _, field, _ = make_field(3, activation=("silu", "tanh"))
    check_record(field, (4,), 3)
    check_gradients(field, (4,), 3)


@each_activation
@pytest.mark.parametrize("context_shape", [None, (4,)], ids=["no context", "context"])
@pytest.mark.parametrize("max_rate", [0.5, 4.0])
def test_maximal_rate(activation, context_shape, max_rate):
    _, field, _ = make_field(3, (4,), context_shape, activation=activation, max_rate=max_rate)
    check_record(field, (4,), 3)
    check_gradients(field, (4,), 3)


@each_batch
def test_masked_of_every_batch_shape(batch_shape, context_shape):
    _, field, _ = make_field(3, batch_shape, context_shape, conditioner="masked", hidden_dims=[4, 6])
    check_record(field, batch_shape, 3)
    check_gradients(field, batch_shape, 3)


@each_batch
def test_gradients_reach_parameters_and_context(batch_shape, context_shape):
    # What the gradients of the field's tensors are for.
    net, field, context = make_field(3, batch_shape, context_shape)
    leaves = [*net.parameters(), *(() if context is None else (context,))]
    arguments = field, TIMES[:1], [torch.randn(*batch_shape, 3)], [weights_of(batch_shape, 3)]
    actual, expected = (
        torch.autograd.grad(field.tensors, leaves, way(*arguments)[1:], retain_graph=True)
        for way in (by_tape, by_autograd)
    )
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-11)


def freeze(*names):
    return lambda net: [net.get_parameter(name).requires_grad_(False) for name in names]


FROZEN = {
    "conditioner": lambda net: net.conditioner.requires_grad_(False),
    "transformer": lambda net: net.transformer.requires_grad_(False),
    "all but the context": lambda net: net.requires_grad_(False),
    "first layer": freeze("conditioner.weight", "conditioner.offset.weight"),
    "a later layer": freeze("conditioner.layers.weights.0"),
    "hidden units": freeze("transformer.weight"),
    "output": freeze("transformer.output_weight"),
    "input": freeze("transformer.input_weight"),
}


@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("context_shape", [None, (2, 1)], ids=["no context", "context"])
def test_frozen_parameters(freeze, context_shape):
    # For the activation "tanh" the biases of a field would depend on the weights, too.
    net, field, context = make_field(3, (2, 3), context_shape, activation="silu")
    total = len(field.tensors)
    freeze(net)
    field = net.bind(context)
    assert len(field.tensors) < total
    if field.tensors:
        check_gradients(field, (2, 3), 3)
    else:
        assert context is None
        assert field.tape(torch.Size((2, 3))).gradients() == ()


class Evaluate(torch.autograd.Function):
    """An evaluation of a field and its divergence as a node of the graph, by the tape."""

    @staticmethod
    def forward(ctx, field, t, x, *tensors):
        ctx.field, ctx.t, ctx.batch_shape = field, t, x.shape[:-1]
        tape = field.tape(ctx.batch_shape)
        f, divergence, ctx.saved = tape.record(t, tape.pack(x))
        return tape.unpack(f).clone(), divergence.reshape(ctx.batch_shape)

    @staticmethod
    def backward(ctx, f_bar, divergence_bar):
        tape = ctx.field.tape(ctx.batch_shape)
        x_bar = tape.pull(ctx.t, ctx.saved, tape.pack(f_bar), divergence_bar.reshape(-1))
        return None, None, tape.unpack(x_bar), *tape.gradients()


@each_activation
@pytest.mark.parametrize("d", [1, 2])
def test_gradients_by_finite_differences(activation, d):
    net, _, context = make_field(d, (2,), (1,), hidden_dims=[2, 2], activation=activation)

    def function(x, context, *_):
        field = net.bind(context)
        return Evaluate.apply(field, 0.3, x, *field.tensors)

    x = torch.randn(2, d, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, context, *net.parameters()))


# A tape


def test_gradients_add_up():
    _, field, _ = make_field(3, (2, 3), (3,))
    states = [torch.randn(2, 3, 3) for _ in TIMES]
    weights = [weights_of((2, 3), 3) for _ in TIMES]
    together = by_tape(field, TIMES, states, weights)[len(TIMES) :]
    each = [by_tape(field, [t], [x], [w])[1:] for t, x, w in zip(TIMES, states, weights, strict=True)]
    for total, *terms in zip(together, *each, strict=True):
        assert_close(total, sum(terms))


def test_gradients_of_nothing_are_zero():
    _, field, _ = make_field(3, (2, 3), (2, 1))
    gradients = field.tape(torch.Size((2, 3))).gradients()
    assert [g.shape for g in gradients] == [tensor.shape for tensor in field.tensors]
    assert all(not gradient.any() for gradient in gradients)


@each_activation
def test_pull_leaves_its_arguments_alone(activation):
    # Another backward pass may need them.
    _, field, _ = make_field(3, (4,), (4,), activation=activation)
    with torch.no_grad():
        tape = field.tape(torch.Size((4,)))
        x, f_bar, q_bar = torch.randn(3, 4), torch.randn(3, 4), torch.randn(4)
        saved = tape.record(0.3, x)[2]
        arguments = [*saved, f_bar, q_bar, x, *field.tensors]
        before = [argument.clone() for argument in arguments]
        first = tape.pull(0.3, saved, f_bar, q_bar)
        assert torch.equal(first, tape.pull(0.3, saved, f_bar, q_bar))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@each_activation
def test_record_leaves_the_state_alone(activation):
    _, field, _ = make_field(3, activation=activation)
    x = torch.randn(3, 4)
    before = x.clone()
    with torch.no_grad():
        tape = field.tape(torch.Size((4,)))
        first, second = tape.record(0.3, x), tape.record(0.3, x)
    assert torch.equal(x, before)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_tapes_are_independent():
    _, field, _ = make_field(3)
    with torch.no_grad():
        tapes = [field.tape(torch.Size((4,))) for _ in range(2)]
        saved = tapes[0].record(0.3, torch.randn(3, 4))[2]
        tapes[0].pull(0.3, saved, torch.randn(3, 4), torch.randn(4))
    assert any(gradient.any() for gradient in tapes[0].gradients())
    assert not any(gradient.any() for gradient in tapes[1].gradients())


@each_activation
@pytest.mark.parametrize("context_shape", [None, (2, 1)], ids=["no context", "context"])
def test_float32(activation, context_shape):
    net, field, context = make_field(3, (2, 3), context_shape, activation=activation)
    single = copy.deepcopy(net).float().bind(None if context is None else context.detach().float().requires_grad_())
    states, weights = [torch.randn(2, 3, 3) for _ in TIMES], [weights_of((2, 3), 3) for _ in TIMES]
    expected = by_tape(field, TIMES, states, weights)
    actual = by_tape(single, TIMES, [x.float() for x in states], [(f.float(), q.float()) for f, q in weights])
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.float(), 1e-4)


# Who has one


class CustomConditioner(Conditioner):
    def forward(self, t, x, context=None):
        total = x.sum(-1, keepdim=True) - x
        return torch.sin(total + t).unsqueeze(-1).expand(*x.shape, self.hidden_dim)


WITHOUT = {
    "leave-one-out": lambda: HollowNN(3, [8, 4], conditioner="leave-one-out"),
    "conditioner of a user": lambda: HollowNN(3, conditioner=CustomConditioner(3, 4)),
    "transformer of a user": lambda: HollowNN(3, [8, 4], transformer=nn.Linear(6, 1)),
}


@pytest.mark.parametrize("make", WITHOUT.values(), ids=WITHOUT)
def test_no_tape(make):
    assert make().bind().tape(torch.Size((4,))) is None


def test_dense_conditioners_and_closed_form_have_one():
    assert HollowNN(3).bind().tape(torch.Size((4,))) is not None
    assert HollowNN(3, conditioner="masked").bind().tape(torch.Size((4,))) is not None
    assert HollowNN(3, conditioner=GroupedConditioner(3, [4])).bind().tape(torch.Size((4,))) is not None


# Activations


@each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pull_of_an_activation(activation, dtype):
    s = get_activation(activation)
    z = torch.linspace(-30, 30, 121, dtype=dtype, requires_grad=True)
    gradient = torch.randn(121, dtype=dtype)
    (expected,) = torch.autograd.grad(s.apply(z.clone()), z, gradient)
    argument = z.detach().clone()
    value = s.apply(argument)  # may overwrite its argument, which is what pull gets
    inputs = [tensor.clone() for tensor in (gradient, argument, value)]
    # torch takes softplus for linear beyond 20, where its slope is 2e-9 from 1.
    assert_close(s.pull(gradient, argument, value), expected, 1e-8 if dtype == torch.float64 else 1e-6)
    assert all(torch.equal(a, b) for a, b in zip((gradient, argument, value), inputs, strict=True))
