# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from pyro_hollow import ops
from pyro_hollow.nn import (
    BoundConditioner,
    ClosedFormTransformer,
    ConditionalHollowNN,
    Conditioner,
    GroupedConditioner,
    HollowField,
    HollowNN,
    ModuleTransformer,
)

CONDITIONERS = ["grouped", "masked", "leave-one-out"]
CONTEXT_DIM = 2

each_conditioner = pytest.mark.parametrize("conditioner", CONDITIONERS)
each_activation = pytest.mark.parametrize("activation", ["tanh", "softplus", "silu"])
each_context_dim = pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["no context", "context"])


def make_net(input_dim, context_dim=0, hidden_dims=None, **kwargs):
    if context_dim:
        net = ConditionalHollowNN(input_dim, context_dim, hidden_dims, **kwargs)
    else:
        net = HollowNN(input_dim, hidden_dims, **kwargs)
    if hasattr(net.transformer, "output_weight"):
        # A fresh field is nearly zero, and errors would hide.
        nn.init.normal_(net.transformer.output_weight)
    return net


def make_inputs(input_dim, context_dim=0, batch_shape=(3,), context_shape=None, dtype=None):
    """(t, x, context or None); the context has x's batch shape where none is given."""
    context_shape = batch_shape if context_shape is None else context_shape
    context = torch.randn(*context_shape, context_dim, dtype=dtype) if context_dim else None
    return torch.tensor(0.3, dtype=dtype), torch.randn(*batch_shape, input_dim, dtype=dtype), context


def module_of(hidden_dim):
    return nn.Sequential(nn.Linear(2 + hidden_dim, 8), nn.Tanh(), nn.Linear(8, 1))


class CustomConditioner(Conditioner):
    """One of a user's own, bound by the base class: h_i = tanh(sum_{j != i} W_ij x_j + t + V_i c)."""

    def __init__(self, input_dim, context_dim):
        super().__init__(input_dim, 4, context_dim)
        self.weight = nn.Parameter(torch.randn(input_dim, 4, input_dim))
        self.context_weight = nn.Parameter(torch.randn(input_dim, 4, context_dim)) if context_dim else None
        self.register_buffer("mask", (1 - torch.eye(input_dim)).unsqueeze(1))

    def forward(self, t, x, context=None):
        z = (x @ (self.weight * self.mask).flatten(0, 1).mT).unflatten(-1, (self.input_dim, 4)) + t
        return (z if context is None else z + torch.einsum("ikc,...c->...ik", self.context_weight, context)).tanh()


#: Networks of all kinds, by constructors of an input_dim, a context_dim and small layers.
NETS = {
    **{name: lambda d, c, name=name: make_net(d, c, [8, 4], conditioner=name) for name in CONDITIONERS},
    "module": lambda d, c: make_net(d, c, [8, 4], transformer=module_of(4)),
    "custom": lambda d, c: make_net(d, c, conditioner=CustomConditioner(d, c)),
}
each_net = pytest.mark.parametrize("make", NETS.values(), ids=NETS)


def assert_close(actual, expected, tolerance):
    """Up to a tolerance relative to the largest element."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def brute_force_dimwise(f, x, order):
    """D^0, ..., D^order of f at x of shape (batch, d), by nested backward passes through the whole of f."""
    d = x.shape[-1]
    # The i-th copy of x is for f_i alone, so that one pass serves all coordinates.
    copies = x.repeat(d, 1, 1).requires_grad_()
    values = [f(copies).diagonal(dim1=0, dim2=2)]  # (batch, d)
    for _ in range(order):
        (gradient,) = torch.autograd.grad(values[-1].sum(), copies, create_graph=True)
        values.append(gradient.diagonal(dim1=0, dim2=2))
    return [value.detach() for value in values]


def brute_force_divergence(f, x):
    """The trace of the Jacobian, differentiable."""
    components = f(x).unbind(-1)
    gradients = [torch.autograd.grad(f_i.sum(), x, create_graph=True)[0] for f_i in components]
    return sum(gradient[..., i] for i, gradient in enumerate(gradients))


@each_conditioner
@each_activation
@pytest.mark.parametrize("d", [1, 2, 5, 64])
def test_dimwise_derivatives(conditioner, activation, d):
    net = make_net(d, conditioner=conditioner, activation=activation)
    t, x, _ = make_inputs(d, batch_shape=(2,))
    field = net.bind()
    with torch.no_grad():
        results = field.dimwise_derivatives(t, x, 4)
    assert len(results) == 5
    for result, expected in zip(results, brute_force_dimwise(lambda x: field(t, x), x, 4), strict=True):
        assert_close(result, expected, 1e-10)


@each_net
def test_dimwise_derivatives_with_context(make):
    net = make(4, CONTEXT_DIM)
    t, x, context = make_inputs(4, CONTEXT_DIM)
    field = net.bind(context)
    results = field.dimwise_derivatives(t, x, 3)
    for result, expected in zip(results, brute_force_dimwise(lambda x: field(t, x), x, 3), strict=True):
        assert_close(result, expected, 1e-10)


@each_net
@each_context_dim
@pytest.mark.parametrize("d", [1, 2, 5])
def test_divergence_is_the_trace(make, context_dim, d):
    net = make(d, context_dim)
    t, x, context = make_inputs(d, context_dim)
    dx, divergence = net.bind(context).with_divergence(t, x)
    full = jacobian(lambda x: net(t, x, context), x)  # (batch, d, batch, d)
    assert_close(divergence, torch.einsum("bibi->b", full), 1e-12)
    assert_close(dx, net(t, x, context), 1e-13)


@each_net
@pytest.mark.parametrize("d", [2, 5])
def test_jacobian_is_full(make, d):
    # Otherwise a field that ignores its hidden units would pass.
    net = make(d, 0)
    t, x, _ = make_inputs(d, batch_shape=())
    assert (jacobian(lambda x: net(t, x), x) != 0).all()


@each_net
@each_context_dim
@pytest.mark.parametrize("d", [1, 2, 5])
def test_gradient_of_the_divergence(make, context_dim, d):
    net = make(d, context_dim)
    t, x, context = make_inputs(d, context_dim)
    leaves = [*net.parameters(), x.requires_grad_()]
    if context is not None:
        leaves.append(context.requires_grad_())
    field = net.bind(context)
    weights = torch.randn(3)
    losses = [field.with_divergence(t, x)[1] @ weights, brute_force_divergence(lambda x: field(t, x), x) @ weights]
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True) for loss in losses]
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, 1e-8)
    assert all(gradient.abs().max() > 0 for gradient in gradients[1][len(list(net.parameters())) :])


@each_net
def test_detached_hidden_units_would_lose_gradient(make):
    # Why h is never detached: the values stay right, but the conditioner's share of the gradient is gone.
    net = make(4, 0)
    t, x, _ = make_inputs(4)
    bound = net.transformer.bind()
    h = net.conditioner(t, x)
    complete = net.bind().with_divergence(t, x)[1]
    detached = ops.dimwise_derivatives(lambda x, h: bound.derivatives(t, x, h, 0)[0], x, h.detach(), 1)[1].sum(-1)
    assert_close(detached, complete, 1e-12)
    parameters = list(net.conditioner.parameters())
    lost = torch.autograd.grad(detached.sum(), parameters, allow_unused=True)
    assert all(gradient is None for gradient in lost)
    kept = torch.autograd.grad(complete.sum(), parameters)
    assert all(gradient.abs().max() > 0 for gradient in kept)


def test_detached_hidden_units_would_lose_gradient_of_toy():
    # f_i = x_i w x_{-i} has divergence w (x_1 + x_2).
    x, w = torch.tensor([2.0, 5.0]), torch.tensor(3.0, requires_grad=True)

    def gradient(detach):
        h = (w * x.flip(-1)).unsqueeze(-1)
        value = ops.divergence(lambda x, h: x * h[..., 0] + 0 * w, x, h.detach() if detach else h)
        assert value == w * x.sum()
        return torch.autograd.grad(value + 0 * w, w)[0]

    assert gradient(detach=True) == 0
    assert gradient(detach=False) == x.sum()


@each_conditioner
@each_activation
@each_context_dim
def test_second_derivatives_of_the_divergence(conditioner, activation, context_dim):
    # Against finite differences: a penalty on the divergence's gradient can be trained.
    net = make_net(2, context_dim, [4, 4], conditioner=conditioner, activation=activation, transformer_dim=3)
    t, x, context = make_inputs(2, context_dim, (2,))
    inputs = [tensor.requires_grad_() for tensor in (x, context) if tensor is not None]

    def divergence(x, context=None):
        return net.bind(context).with_divergence(t, x)[1]

    assert torch.autograd.gradcheck(divergence, inputs)
    assert torch.autograd.gradgradcheck(divergence, inputs)


@each_conditioner
@each_context_dim
@pytest.mark.parametrize("d", [2, 10, 64])
def test_fresh_field_is_small(conditioner, context_dim, d):
    # A fresh flow is to be close to the identity.
    net = ConditionalHollowNN(d, context_dim, conditioner=conditioner)
    t, x, context = make_inputs(d, context_dim, (500,))
    with torch.no_grad():
        field = net.bind(context)
        rms = [field(t, x).square().mean().sqrt() for t in (t, 0 * t, 0 * t + 1)]
    assert 0 < min(rms) and max(rms) < 0.1


BATCHES = {
    "single": ((), None),
    "vector": ((3,), None),
    "matrix": ((3, 4), None),
    "single, single context": ((), ()),
    "matrix, single context": ((3, 4), ()),
    "vector, vector of contexts": ((7,), (7,)),
    "matrix, row of contexts": ((3, 7), (7,)),
    "matrix, matrix of contexts": ((6, 5), (6, 5)),
    "matrix, column of contexts": ((6, 5), (6, 1)),
}


@each_net
@pytest.mark.parametrize("batch_shape, context_shape", BATCHES.values(), ids=BATCHES)
def test_batch_shapes(make, batch_shape, context_shape):
    # As in Pyro's ConditionalDenseNN, the context is expanded to the batch of x.
    net = make(4, 0 if context_shape is None else CONTEXT_DIM)
    t, x, context = make_inputs(4, net.context_dim, batch_shape, context_shape)
    each = None if context is None else context.expand(*batch_shape, CONTEXT_DIM)
    dx, divergence = net.bind(context).with_divergence(t, x)
    assert dx.shape == x.shape and divergence.shape == batch_shape
    for index in itertools.product(*map(range, batch_shape)):
        expected = net.bind(None if each is None else each[index]).with_divergence(t, x[index])
        assert_close(dx[index], expected[0], 1e-12)
        torch.testing.assert_close(divergence[index], expected[1], rtol=0, atol=1e-12)


@each_net
@pytest.mark.parametrize("context_shape", [None, (), (0,)], ids=["no context", "single context", "empty context"])
def test_empty_batch(make, context_shape):
    net = make(4, 0 if context_shape is None else CONTEXT_DIM)
    t, x, context = make_inputs(4, net.context_dim, (0,), context_shape)
    dx, divergence = net.bind(context).with_divergence(t, x)
    assert dx.shape == (0, 4) and divergence.shape == (0,)


@each_net
@each_context_dim
def test_call_is_bind_and_call(make, context_dim):
    net = make(4, context_dim)
    t, x, context = make_inputs(4, context_dim)
    assert torch.equal(net(t, x, context), net.bind(context)(t, x))


@each_net
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_time_of_another_dtype(make, dtype):
    # A time is a scalar; it does not change the type of what is computed from the state.
    net = make(4, 0)
    _, x, _ = make_inputs(4)
    t = torch.tensor(1, dtype=dtype)
    for result, expected in zip(
        net.bind().with_divergence(t, x), net.bind().with_divergence(t.double(), x), strict=True
    ):
        assert_close(result, expected, 1e-13)


@each_net
def test_float64_time_in_float32(make):
    net = make(4, 0).float()
    t, x, _ = make_inputs(4, dtype=torch.float32)
    for result, expected in zip(
        net.bind().with_divergence(t.double(), x), net.bind().with_divergence(t, x), strict=True
    ):
        assert_close(result, expected, 1e-5)


@each_net
@pytest.mark.parametrize("wrong", [1, 3, 5])
def test_state_of_a_wrong_size(make, wrong):
    # A single coordinate must not be broadcast in silence.
    t, x, _ = make_inputs(wrong)
    with pytest.raises((ValueError, RuntimeError)):
        make(4, 0)(t, x)


def test_hollow_nn_takes_no_context_in_a_call():
    net = HollowNN(4)
    t, x, _ = make_inputs(4)
    assert torch.equal(net(t, x), net.bind()(t, x))


@each_net
def test_depends_on_time_and_context(make):
    net = make(4, CONTEXT_DIM)
    t, x, context = make_inputs(4, CONTEXT_DIM, ())
    assert (jacobian(lambda t: net(t, x, context), t) != 0).all()
    assert (jacobian(lambda context: net(t, x, context), context) != 0).all()


@each_net
@each_context_dim
def test_without_gradients(make, context_dim):
    net = make(4, context_dim)
    t, x, context = make_inputs(4, context_dim)
    expected = net.bind(context).with_divergence(t, x)
    with torch.no_grad():
        results = net.bind(context).with_divergence(t, x)
    assert not any(result.requires_grad for result in results)
    for result, value in zip(results, expected, strict=True):
        assert_close(result, value, 1e-13)


@each_net
@each_context_dim
def test_tensors_of_a_field(make, context_dim):
    net = make(4, context_dim)
    t, x, context = make_inputs(4, context_dim)
    leaves = list(net.parameters())
    if context is not None:
        leaves.append(context.requires_grad_())
    field = net.bind(context)
    assert len({id(tensor) for tensor in field.tensors}) == len(field.tensors)
    assert all(tensor.requires_grad for tensor in field.tensors)
    for a, b in itertools.permutations(field.tensors, 2):
        assert torch.autograd.grad(a.sum(), b, allow_unused=True, retain_graph=True) == (None,)

    # The gradients in them are all that it takes to compute those of the parameters and of the context.
    dx, divergence = field.with_divergence(t, x)
    loss = (dx * torch.randn_like(dx)).sum() + (divergence * torch.randn_like(divergence)).sum()
    in_tensors = torch.autograd.grad(loss, field.tensors, retain_graph=True)
    via_tensors = torch.autograd.grad(field.tensors, leaves, in_tensors, retain_graph=True)
    for actual, expected in zip(via_tensors, torch.autograd.grad(loss, leaves), strict=True):
        assert_close(actual, expected, 1e-12)


@each_net
@each_context_dim
def test_tensors_of_a_frozen_field(make, context_dim):
    net = make(4, context_dim).requires_grad_(False)
    _, _, context = make_inputs(4, context_dim)
    assert net.bind(context).tensors == ()
    if context is not None:
        assert net.bind(context.requires_grad_()).tensors


def test_tensors_that_are_shared_are_listed_once():
    transformer = ModuleTransformer(module_of(4), 3, 4).bind()
    conditioner = BoundConditioner(lambda t, x: x, transformer.tensors)
    assert [id(tensor) for tensor in HollowField(3, conditioner, transformer).tensors] == list(
        map(id, transformer.tensors)
    )


def memory(net):
    """All that the modules hold, with the members of their dictionaries."""
    held = {(name, key): value for name, module in net.named_modules() for key, value in vars(module).items()}
    for key, value in list(held.items()):
        if isinstance(value, dict):
            held.update({(*key, member): item for member, item in value.items()})
    return held


@each_net
@each_context_dim
def test_nothing_is_remembered(make, context_dim):
    net = make(4, context_dim)
    t, x, context = make_inputs(4, context_dim)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before = memory(net)
    net.bind(context).dimwise_derivatives(t, x.requires_grad_(), 2)[2].sum().backward()
    after = memory(net)
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in state.items())


@each_net
@each_context_dim
def test_state_dict_round_trip(make, context_dim):
    source, target = make(4, context_dim), make(4, context_dim)
    inputs = make_inputs(4, context_dim)
    assert not torch.equal(source(*inputs), target(*inputs))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*inputs), target(*inputs))


@each_net
@each_context_dim
@pytest.mark.parametrize("d", [1, 5])
def test_float32(make, context_dim, d):
    # In float32 up to 1e-4 relative; about 1e-6 is usual.
    net = make(d, context_dim).float()
    t, x, context = make_inputs(d, context_dim, dtype=torch.float32)
    dx, divergence = net.bind(context).with_divergence(t, x)
    full = jacobian(lambda x: net(t, x, context), x)
    assert dx.dtype == torch.float32
    assert_close(divergence, torch.einsum("bibi->b", full), 1e-4)


def test_activations_of_conditioner_and_transformer():
    net = make_net(3, hidden_dims=[5, 4], activation=("silu", "softplus"))
    conditioner = GroupedConditioner(3, [5, 4], activation="silu")
    same = HollowNN(3, conditioner=conditioner, activation="softplus")
    same.load_state_dict(net.state_dict())
    t, x, _ = make_inputs(3)
    assert torch.equal(net(t, x), same(t, x))


def test_conditioner_may_be_an_instance():
    conditioner = GroupedConditioner(4, [8, 6])
    net = make_net(4, conditioner=conditioner)
    assert net.conditioner is conditioner
    t, x, _ = make_inputs(4, batch_shape=())
    assert_close(net.bind().with_divergence(t, x)[1], jacobian(lambda x: net(t, x), x).trace(), 1e-12)


@pytest.mark.parametrize("d, width", [(2, 64), (64, 256)])
def test_default_widths(d, width):
    assert make_net(d).conditioner.hidden_dim == 32
    masked = make_net(d, conditioner="masked").conditioner
    assert masked.hidden_dim == 32 and masked.weight.shape == (2 * width, d)
    assert make_net(d, transformer_dim=7).transformer.width == 7


INVALID = {
    "input_dim 0": (lambda: HollowNN(0), "input_dim must"),
    "input_dim negative": (lambda: ConditionalHollowNN(-1, 2), "input_dim must"),
    "context_dim negative": (lambda: ConditionalHollowNN(2, -1), "context_dim must"),
    "unknown conditioner": (lambda: HollowNN(2, conditioner="dense"), "conditioner must be one of"),
    "conditioner that is no Conditioner": (
        lambda: HollowNN(2, conditioner=nn.Linear(2, 2)),
        "conditioner must be one of",
    ),
    "no conditioner": (lambda: HollowNN(2, conditioner=None), "conditioner must be one of"),
    "unknown activation": (lambda: HollowNN(2, activation="relu"), "activation must be one of"),
    "unknown activation of two": (lambda: HollowNN(2, activation=("tanh", "relu")), "activation must be one of"),
    "three activations": (lambda: HollowNN(2, activation=("tanh",) * 3), "activation must be one of .* or two of them"),
    "no activation": (lambda: HollowNN(2, activation=None), "activation must be one of .* or two of them"),
    "no hidden layers": (lambda: HollowNN(2, []), "hidden_dims"),
    "no units": (lambda: HollowNN(2, transformer_dim=0), "width must"),
    "context for a network without": (lambda: HollowNN(2).bind(torch.zeros(1)), "context was given"),
    "context for a call without": (lambda: HollowNN(2)(torch.zeros(()), torch.zeros(2), torch.zeros(1)), "takes none"),
    "missing context": (lambda: ConditionalHollowNN(2, 3).bind(), "context is missing"),
    "context of a wrong size": (lambda: ConditionalHollowNN(2, 3).bind(torch.zeros(7, 2)), r"\(7, 2\)"),
    "context of size 1": (lambda: ConditionalHollowNN(2, 3).bind(torch.zeros(7, 1)), r"\(7, 1\)"),
    "scalar context": (lambda: ConditionalHollowNN(2, 3).bind(torch.zeros(())), "context must have shape"),
}


@pytest.mark.parametrize("call, message", INVALID.values(), ids=INVALID)
def test_invalid(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_number_of_parameters():
    def counts(name):
        return [sum(p.numel() for p in HollowNN(d, [64, 4], conditioner=name).parameters()) for d in (16, 32, 64)]

    # Linear in the dimension for "leave-one-out", more for "grouped".
    small, medium, large = counts("leave-one-out")
    assert large - medium == 2 * (medium - small)
    small, medium, large = counts("grouped")
    assert large - medium > 2 * (medium - small)


@pytest.mark.parametrize("conditioner", ("grouped", "masked", "leave-one-out"))
@pytest.mark.parametrize("transformer", (None, 4), ids=("closed-form", "module"))
@pytest.mark.parametrize("shape", ((6,), (2, 3)))
def test_every_sample_may_have_its_own_time(conditioner, transformer, shape):
    module = None if transformer is None else torch.nn.Sequential(torch.nn.Linear(34, transformer), torch.nn.Tanh())
    module = None if module is None else module.append(torch.nn.Linear(transformer, 1))
    net = HollowNN(3, conditioner=conditioner, transformer=module)
    t, x = torch.rand(shape), torch.randn(*shape, 3)
    results = net.bind().dimwise_derivatives(t, x, 2)
    for index in itertools.product(*map(range, shape)):
        single = net.bind().dimwise_derivatives(t[index], x[index], 2)
        for value, expected in zip(results, single, strict=True):
            torch.testing.assert_close(value[index], expected)


@each_conditioner
@pytest.mark.parametrize("max_rate, power", [(None, 2), (4.0, 1)])
def test_growth_far_out(conditioner, max_rate, power):
    # Linear growth is what makes a flow exist everywhere; a gate of unbounded units times the state is quadratic.
    net = make_net(3, conditioner=conditioner, activation=("silu", "tanh"), max_rate=max_rate)
    near, far = (net(torch.tensor(0.3), torch.full((1, 3), size)).abs().max().item() for size in (1e5, 1e7))
    assert math.log10(far / near) / 2 == pytest.approx(power, abs=0.05)


def test_settings_without_effect_are_refused():
    with pytest.raises(ValueError, match="hidden_dims"):
        HollowNN(3, [8, 8], conditioner=GroupedConditioner(3, [8, 8]))
    for setting in ({"transformer_dim": 8}, {"max_rate": 4.0}):
        with pytest.raises(ValueError, match=f"{next(iter(setting))} has no effect"):
            HollowNN(3, transformer=torch.nn.Linear(34, 1), **setting)


def test_conditioner_that_overrides_nothing():
    with pytest.raises(NotImplementedError, match="forward or bind"):
        HollowNN(3, conditioner=Conditioner(3, 4))


@each_context_dim
def test_transformer_may_be_an_instance(context_dim):
    transformer = ClosedFormTransformer(4, 6, context_dim, width=5)
    net = ConditionalHollowNN(4, context_dim, [8, 6], transformer=transformer)
    assert net.transformer is transformer
    t, x, context = make_inputs(4, context_dim, ())
    expected = jacobian(lambda x: net(t, x, context), x).trace()
    assert_close(net.bind(context).with_divergence(t, x)[1], expected, 1e-12)


@pytest.mark.parametrize("sizes", [(3, 6, 0), (4, 5, 0), (4, 6, 2)], ids=str)
def test_transformer_of_other_sizes(sizes):
    with pytest.raises(ValueError, match=r"transformer was made for .* but the network has \(4, 6, 0\)"):
        HollowNN(4, [8, 6], transformer=ClosedFormTransformer(*sizes))
