# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jacobian

from pyro_hollow.nn import (
    ConditionalHollowNN,
    Conditioner,
    GraphConditioner,
    GroupedConditioner,
    HollowNN,
    LeaveOneOutConditioner,
    MaskedConditioner,
)

CONDITIONERS = {
    "grouped": GroupedConditioner,
    "masked": MaskedConditioner,
    "leave-one-out": LeaveOneOutConditioner,
}
SHALLOW = {"grouped": [5], "masked": [16, 4], "leave-one-out": [5]}
DEEP = {"grouped": [6, 5, 4], "masked": [16, 14, 6], "leave-one-out": [6, 5, 4]}
CONTEXT_DIM = 2

each_conditioner = pytest.mark.parametrize("name", CONDITIONERS)
each_depth = pytest.mark.parametrize("hidden_dims", [SHALLOW, DEEP], ids=["shallow", "deep"])
each_dim = pytest.mark.parametrize("d", [1, 2, 5, 12])
each_context_dim = pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["no context", "context"])


class LinearConditioner(Conditioner):
    """A conditioner as a user writes it, by forward alone: h_i = tanh(sum_j W_ij x_j + t + V_i c), j != i or leaky."""

    def __init__(self, input_dim, context_dim=0, *, leaks=()):
        super().__init__(input_dim, 3, context_dim)
        mask = 1 - torch.eye(input_dim)
        for i in leaks:
            mask[i, i] = 1
        self.register_buffer("mask", mask.unsqueeze(-1))
        self.weight = nn.Parameter(torch.randn(input_dim, input_dim, 3))
        self.context_weight = nn.Parameter(torch.randn(input_dim, 3, context_dim)) if context_dim else None

    def forward(self, t, x, context=None):
        z = torch.einsum("...j,ijk->...ik", x, self.weight * self.mask) + t
        if context is not None:
            z = z + torch.einsum("...c,ikc->...ik", context, self.context_weight)
        return z.tanh()


class FunctionConditioner(Conditioner):
    """Two units per coordinate, by a function of (t, x, context)."""

    def __init__(self, function, input_dim, context_dim=0):
        super().__init__(input_dim, 2, context_dim)
        self.function = function

    def forward(self, t, x, context=None):
        return self.function(t, x, context)


#: With one on a complete graph, and one of a user's own, whose binding is that of the base class.
MAKERS = {
    **{name: lambda d, c, name=name: CONDITIONERS[name](d, DEEP[name], c) for name in CONDITIONERS},
    "graph": lambda d, c: GraphConditioner(d, [6, 5, 4], c, adjacency=torch.ones(d, d, dtype=torch.bool)),
    "custom": LinearConditioner,
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def make_inputs(d, context_dim, batch_shape, context_shape=None, dtype=None):
    """(t, x, context or None); the context has x's batch shape where none is given."""
    context_shape = batch_shape if context_shape is None else context_shape
    context = torch.randn(*context_shape, context_dim, dtype=dtype) if context_dim else None
    return torch.tensor(0.3, dtype=dtype), torch.randn(*batch_shape, d, dtype=dtype), context


def one_by_one(conditioner, t, x, context):
    """The same, a sample at a time."""
    batch_shape = x.shape[:-1]
    if context is not None:
        context = context.expand(*batch_shape, -1)
    h = x.new_empty(*x.shape, conditioner.hidden_dim)
    for index in itertools.product(*map(range, batch_shape)):
        h[index] = conditioner(t, x[index], None if context is None else context[index])
    return h


def assert_hollow(conditioner, t, x, context):
    batch, d = x.shape
    jac = jacobian(lambda x: conditioner(t, x, context), x)  # (batch, d, d_h, batch, d)
    assert jac.shape == (batch, d, conditioner.hidden_dim, batch, d)
    for b, c in itertools.product(range(batch), repeat=2):
        depends = (jac[b, :, :, c] != 0).any(1)  # (i, j): does any unit of h_i depend on x_j?
        # Zero means zero to the bit: rounding errors on the diagonal would add up to a wrong divergence.
        assert torch.equal(depends, (b == c) & ~torch.eye(d, dtype=torch.bool))


@each_conditioner
@each_depth
@each_dim
@each_context_dim
def test_jacobian_is_hollow(name, hidden_dims, d, context_dim):
    conditioner = CONDITIONERS[name](d, hidden_dims[name], context_dim)
    assert_hollow(conditioner, *make_inputs(d, context_dim, (2,)))


@each_conditioner
@pytest.mark.parametrize("activation", ["softplus", "silu"])
def test_jacobian_is_hollow_for_other_activations(name, activation):
    conditioner = CONDITIONERS[name](5, DEEP[name], CONTEXT_DIM, activation=activation)
    assert_hollow(conditioner, *make_inputs(5, CONTEXT_DIM, (2,)))


@each_maker
@each_dim
def test_own_coordinate_does_not_change_a_bit(make, d):
    # Without autograd, which a detached path would deceive.
    conditioner = make(d, CONTEXT_DIM)
    t, x, context = make_inputs(d, CONTEXT_DIM, ())
    h = conditioner(t, x, context)
    for i in range(d):
        moved = x.clone()
        moved[i] += 100
        changed = (conditioner(t, moved, context) != h).any(-1)
        assert torch.equal(changed, torch.arange(d) != i)


@each_conditioner
@each_depth
@each_dim
def test_depends_on_time_and_context(name, hidden_dims, d):
    conditioner = CONDITIONERS[name](d, hidden_dims[name], CONTEXT_DIM)
    t, x, context = make_inputs(d, CONTEXT_DIM, ())
    in_time = jacobian(lambda t: conditioner(t, x, context), t)
    in_context = jacobian(lambda context: conditioner(t, x, context), context)
    assert (in_time != 0).any(1).all()
    assert (in_context != 0).any(1).all()


@each_conditioner
@each_context_dim
def test_one_coordinate_leaves_time_and_context(name, context_dim):
    conditioner = CONDITIONERS[name](1, DEEP[name], context_dim)
    t, x, context = make_inputs(1, context_dim, (4,), ())
    h = conditioner(t, x, context)
    assert torch.equal(h, h[:1].expand_as(h))
    assert (conditioner(t + 1, x, context) != h).all()
    if context_dim:
        assert (conditioner(t, x, context + 1) != h).all()


def plain_offset(offset, t, context):
    """What a first layer adds for a bias, time and context."""
    return offset.weight[:, 0] + offset.weight[:, 1] * t + offset.weight[:, 2:] @ context


def plain_layers(conditioner, s, h, group, masks=None):
    """The layers behind the first, of one group."""
    for k, weight in enumerate(conditioner.layers.weights):
        matrix, bias = weight[group, :, :-1], weight[group, :, -1]
        h = s((matrix if masks is None else matrix * masks[k]) @ h + bias)
    return h


def plain_grouped(net, s, t, x, context):
    """Network i is given all coordinates but its own."""
    h = []
    for i, (rows, offset) in enumerate(
        zip(net.weight.chunk(len(x)), plain_offset(net.offset, t, context).chunk(len(x)), strict=True)
    ):
        others = [j for j in range(len(x)) if j != i]
        h.append(plain_layers(net, s, s(rows[:, others] @ x[others] + offset), i))
    return torch.stack(h)


def plain_masked(net, s, t, x, context):
    """Each stream is an autoregressive network; unit k of a layer may see the first k % d coordinates."""
    d, half = len(x), net.hidden_dim // 2
    weights = net.weight.chunk(2)
    widths = [len(weights[0]), *(weight.shape[1] for weight in net.layers.weights)]
    seen = [[k % d for k in range(width)] for width in widths[:-1]] + [[k // half for k in range(widths[-1])]]
    masks = [torch.tensor([[float(a <= b) for a in inp] for b in out]) for inp, out in itertools.pairwise(seen)]
    streams = []
    for group, order in enumerate([list(range(d)), list(range(d))[::-1]]):
        offset = plain_offset(net.offset, t, context).chunk(2)[group]
        z = [weights[group][k, order[:n]] @ x[order[:n]] + offset[k] for k, n in enumerate(seen[0])]
        # The last layer's units are in the order of the coordinates, in both streams.
        own = [mask if mask is not masks[-1] else mask.view(d, half, -1)[order].flatten(0, 1) for mask in masks]
        streams.append(plain_layers(net, s, s(torch.stack(z)), group, own).view(d, half))
    return torch.cat(streams, dim=1)


def plain_leave_one_out(net, s, t, x, context):
    """Features of the single coordinates, and the sum over the others' written out."""
    inner, outer = (plain_offset(o, t, context).chunk(len(x)) for o in (net.offset, net.pool_offset))
    features = [net.pool_weight[j] @ s(net.weight[j, :, 0] * x[j] + inner[j]) for j in range(len(x))]
    pooled = [sum(features[:i] + features[i + 1 :]) + outer[i] for i in range(len(x))]
    return torch.stack([plain_layers(net, s, s(z), i) for i, z in enumerate(pooled)])


PLAIN = {"grouped": plain_grouped, "masked": plain_masked, "leave-one-out": plain_leave_one_out}
PLAIN_ACTIVATIONS = {"tanh": torch.tanh, "softplus": F.softplus, "silu": F.silu}


@each_conditioner
@each_depth
@pytest.mark.parametrize("activation", PLAIN_ACTIVATIONS)
@pytest.mark.parametrize("d", [2, 5])
def test_against_a_plain_implementation(name, hidden_dims, activation, d):
    conditioner = CONDITIONERS[name](d, hidden_dims[name], CONTEXT_DIM, activation=activation)
    inputs = make_inputs(d, CONTEXT_DIM, ())
    expected = PLAIN[name](conditioner, PLAIN_ACTIVATIONS[activation], *inputs)
    if activation == "tanh":
        expected = (1 + expected) / 2  # the form in which the last layer is handed on
    torch.testing.assert_close(conditioner(*inputs), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("d", [1, 64, 65, 130], ids=["one", "one block", "an almost empty block", "three blocks"])
def test_sums_over_the_other_coordinates_in_blocks(d):
    conditioner = LeaveOneOutConditioner(d, [3], CONTEXT_DIM)
    t, x, context = make_inputs(d, CONTEXT_DIM, ())
    expected = (1 + plain_leave_one_out(conditioner, torch.tanh, t, x, context)) / 2
    torch.testing.assert_close(conditioner(t, x, context), expected, rtol=0, atol=1e-13)
    slopes = jacobian(lambda x: conditioner(t, x, context).sum(-1), x)
    assert (slopes.diagonal() == 0).all()
    assert (slopes[~torch.eye(d, dtype=torch.bool)] != 0).all()


BATCHES = {
    "single": ((), None),
    "vector": ((3,), None),
    "matrix": ((3, 4), None),
    "single, single context": ((), ()),
    "vector, single context": ((3,), ()),
    "matrix, single context": ((3, 4), ()),
    "vector, vector of contexts": ((7,), (7,)),
    "matrix, row of contexts": ((3, 7), (7,)),
    "matrix, matrix of contexts": ((6, 5), (6, 5)),
    "matrix, column of contexts": ((6, 5), (6, 1)),
    "cube, matrix of contexts": ((2, 6, 5), (6, 5)),
    "matrix, one context": ((3, 4), (1, 1)),
}


@each_maker
@pytest.mark.parametrize("batch_shape, context_shape", BATCHES.values(), ids=BATCHES)
def test_batch_shapes(make, batch_shape, context_shape):
    context_dim = 0 if context_shape is None else CONTEXT_DIM
    conditioner = make(4, context_dim)
    inputs = make_inputs(4, context_dim, batch_shape, context_shape)
    expected = one_by_one(conditioner, *inputs)
    assert expected.shape == (*batch_shape, 4, conditioner.hidden_dim)
    torch.testing.assert_close(conditioner(*inputs), expected, rtol=0, atol=1e-13)


@each_maker
@pytest.mark.parametrize("context_shape", [None, (), (0,)], ids=["no context", "single context", "empty context"])
def test_empty_batch(make, context_shape):
    context_dim = 0 if context_shape is None else CONTEXT_DIM
    conditioner = make(4, context_dim)
    h = conditioner(*make_inputs(4, context_dim, (0,), context_shape))
    assert h.shape == (0, 4, conditioner.hidden_dim)


def bind_with_loss(make, context_dim):
    """A conditioner's leaves (parameters and context), its bound tensors, and a random scalar made of its output."""
    conditioner = make(5, context_dim)
    t, x, context = make_inputs(5, context_dim, (3,))
    leaves = list(conditioner.parameters())
    if context is not None:
        leaves.append(context.requires_grad_())
    bound = conditioner.bind(context)
    h = bound(t, x)
    return leaves, bound.tensors, (h * torch.randn_like(h)).sum()


@each_maker
@each_context_dim
def test_bound_tensors_carry_all_gradients(make, context_dim):
    # An adjoint method takes gradients in the bound tensors, and autograd takes them on from there.
    leaves, tensors, loss = bind_with_loss(make, context_dim)
    in_tensors = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in in_tensors)
    via_tensors = torch.autograd.grad(tensors, leaves, in_tensors, retain_graph=True)
    for actual, expected in zip(via_tensors, torch.autograd.grad(loss, leaves), strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@each_maker
@each_context_dim
def test_no_bound_tensor_depends_on_another(make, context_dim):
    # Otherwise a gradient would be counted twice.
    _, tensors, _ = bind_with_loss(make, context_dim)
    assert all(tensor.requires_grad for tensor in tensors)
    for a, b in itertools.permutations(tensors, 2):
        assert torch.autograd.grad(a.sum(), b, allow_unused=True, retain_graph=True) == (None,)


@each_maker
def test_state_dict_round_trip(make):
    source, target = make(5, CONTEXT_DIM), make(5, CONTEXT_DIM)
    inputs = make_inputs(5, CONTEXT_DIM, (3,))
    assert not torch.equal(source(*inputs), target(*inputs))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*inputs), target(*inputs))


@each_conditioner
@each_context_dim
def test_float32(name, context_dim):
    # Rounding in float32 leaves about 1e-6 of units of order 1; the diagonal stays zero to the bit.
    conditioner = CONDITIONERS[name](5, DEEP[name], context_dim)
    t, x, context = make_inputs(5, context_dim, (2,), dtype=torch.float32)
    expected = conditioner(t.double(), x.double(), None if context is None else context.double())
    conditioner.float()
    h = conditioner(t, x, context)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h.double(), expected, rtol=0, atol=1e-5)
    assert_hollow(conditioner, t, x, context)


INVALID = {
    "no layers": [],
    "zero width": [0],
    "zero width at the end": [8, 0],
    "negative width": [-4, 4],
}


@each_conditioner
@pytest.mark.parametrize("hidden_dims", INVALID.values(), ids=INVALID)
def test_invalid_hidden_dims(name, hidden_dims):
    with pytest.raises(ValueError, match="hidden_dims"):
        CONDITIONERS[name](5, hidden_dims)


INVALID_MASKED = {
    "narrower than x": [4, 4],
    "narrower than x behind": [8, 4, 4],
    "odd d_h": [8, 5],
    "d_h alone": [8],
}


@pytest.mark.parametrize("hidden_dims", INVALID_MASKED.values(), ids=INVALID_MASKED)
def test_invalid_hidden_dims_of_masked(hidden_dims):
    with pytest.raises(ValueError, match="hidden_dims"):
        MaskedConditioner(5, hidden_dims)


@each_conditioner
def test_unknown_activation(name):
    with pytest.raises(ValueError, match="activation"):
        CONDITIONERS[name](5, DEEP[name], activation="relu")


@each_maker
@each_context_dim
def test_conditioner_of_ones_own(make, context_dim):
    net = ConditionalHollowNN(4, context_dim, conditioner=make(4, context_dim))
    nn.init.normal_(net.transformer.output_weight)
    t, x, context = make_inputs(4, context_dim, ())
    dx, divergence = net.bind(context).with_divergence(t, x)
    jac = jacobian(lambda x: net(t, x, context), x)
    torch.testing.assert_close(dx, net(t, x, context), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(divergence, jac.trace(), rtol=1e-12, atol=1e-13)
    assert (jac != 0).all()  # its hidden units are really used


@pytest.mark.parametrize("leaks", [[0], [1, 3], [0, 1, 2, 3]], ids=str)
@each_context_dim
def test_leak_is_named(leaks, context_dim):
    conditioner = LinearConditioner(4, context_dim, leaks=leaks)
    with pytest.raises(ValueError, match=f"depends on x_i for i in {leaks}".replace("[", r"\[")):
        ConditionalHollowNN(4, context_dim, conditioner=conditioner)


#: Leaks that a check at one special place, or of one special combination of units, would miss.
HIDDEN_LEAKS = {
    "grows with time": lambda t, x, context: torch.stack([t * x, 0 * x], -1),
    "grows with context": lambda t, x, context: torch.stack([context.sum(-1, keepdim=True) * x, 0 * x], -1),
    "cancels between units": lambda t, x, context: torch.stack([x, -x], -1),
    "normalised units": lambda t, x, context: torch.stack([x, 2 * x], -1).softmax(-1),
}


@pytest.mark.parametrize("function", HIDDEN_LEAKS.values(), ids=HIDDEN_LEAKS)
def test_hidden_leak_is_found(function):
    with pytest.raises(ValueError, match=r"depends on x_i for i in \[0, 1, 2\]"):
        ConditionalHollowNN(3, CONTEXT_DIM, conditioner=FunctionConditioner(function, 3, CONTEXT_DIM))


def test_leak_is_found_without_gradients():
    with torch.no_grad(), pytest.raises(ValueError, match="not hollow"):
        HollowNN(4, conditioner=LinearConditioner(4, leaks=[2]))


WRONG_SHAPES = {
    "units first": lambda t, x, context: x.new_zeros(*x.shape[:-1], 2, x.shape[-1]),
    "no units": lambda t, x, context: torch.zeros_like(x),
    "too many units": lambda t, x, context: x.new_zeros(*x.shape, 3),
    "no batch": lambda t, x, context: x.new_zeros(x.shape[-1], 2),
}


@pytest.mark.parametrize("function", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_wrong_output_shape(function):
    with pytest.raises(ValueError, match="conditioner must map"):
        HollowNN(4, conditioner=FunctionConditioner(function, 4))


WRONG_SIZES = {
    "input_dim": (5, CONTEXT_DIM),
    "context_dim": (4, CONTEXT_DIM + 1),
    "no context": (4, 0),
}


@pytest.mark.parametrize("sizes", WRONG_SIZES.values(), ids=WRONG_SIZES)
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match="conditioner was made for input_dim, context_dim"):
        ConditionalHollowNN(4, CONTEXT_DIM, conditioner=LinearConditioner(*sizes))


@pytest.mark.parametrize("input_dim", [65, 200])
@pytest.mark.parametrize("end", [0, -1], ids=["first", "last"])
def test_leak_at_an_end_is_found(end, input_dim):
    """As a neighbourhood has that repeats the border."""

    def function(t, x, context):
        leak = torch.zeros_like(x)
        leak[..., end] = x[..., end]
        return torch.stack([leak, 0 * x], -1)

    with pytest.raises(ValueError, match=rf"depends on x_i for i in \[{end % input_dim}\]"):
        HollowNN(input_dim, conditioner=FunctionConditioner(function, input_dim))


def test_leak_behind_zeros_is_found():
    conditioner = LinearConditioner(4, leaks=[1])
    nn.init.zeros_(conditioner.weight)
    with pytest.raises(ValueError, match="not hollow"):
        HollowNN(4, conditioner=conditioner)
    assert not conditioner.weight.any()
    hollow = LinearConditioner(4)
    nn.init.zeros_(hollow.weight)
    assert HollowNN(4, conditioner=hollow).conditioner is hollow and not hollow.weight.any()
