# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jacobian

from pyro_hollow.nn import ClosedFormTransformer, ModuleTransformer

ACTIVATIONS = {"tanh": torch.tanh, "softplus": F.softplus, "silu": F.silu}
D, HIDDEN_DIM, CONTEXT_DIM, WIDTH = 3, 4, 2, 5
TIME = torch.tensor(0.3, dtype=torch.float64)

each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
each_max_rate = pytest.mark.parametrize("max_rate", [None, 0.5, 4.0], ids=["unbounded", "max_rate 0.5", "max_rate 4"])
each_context_dim = pytest.mark.parametrize("context_dim", [0, CONTEXT_DIM], ids=["no context", "context"])


def make_closed_form(activation="tanh", context_dim=0, max_rate=None):
    net = ClosedFormTransformer(D, HIDDEN_DIM, context_dim, width=WIDTH, activation=activation, max_rate=max_rate)
    # A fresh transformer is nearly zero, and errors would hide.
    return randomize(net)


def randomize(net):
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def make_inputs(context_dim=0, batch_shape=(6,), dtype=None):
    """(x, h, context or None), with gradients."""
    x = torch.randn(*batch_shape, D, dtype=dtype, requires_grad=True)
    h = torch.randn(*batch_shape, D, HIDDEN_DIM, dtype=dtype, requires_grad=True)
    return x, h, torch.randn(*batch_shape, context_dim, dtype=dtype, requires_grad=True) if context_dim else None


def smooth_module():
    return nn.Sequential(nn.Linear(2 + HIDDEN_DIM, 8), nn.Tanh(), nn.Linear(8, 1))


class LinearInX(nn.Module):
    """x times a function of the rest."""

    def __init__(self):
        super().__init__()
        self.rest = nn.Linear(1 + HIDDEN_DIM, 1)

    def forward(self, features):
        return features[..., :1] * self.rest(features[..., 1:])


class ConstantInX(LinearInX):
    def forward(self, features):
        return self.rest(features[..., 1:])


class Constant(nn.Module):
    """Depends on nothing at all, not even on a parameter."""

    def forward(self, features):
        return torch.ones_like(features[..., :1])


#: Modules, and the first order at which their derivatives vanish.
MODULES = {
    "smooth": (smooth_module, None),
    "linear in x": (LinearInX, 2),
    "constant in x": (ConstantInX, 1),
    "constant": (Constant, 1),
}
each_module = pytest.mark.parametrize("make, vanishing", MODULES.values(), ids=MODULES)

#: Transformers that do not depend on a context, but on all else.
TRANSFORMERS = {
    "closed form": make_closed_form,
    "closed form, max_rate": lambda: make_closed_form(max_rate=2.0),
    "module": lambda: ModuleTransformer(smooth_module(), D, HIDDEN_DIM),
}
each_transformer = pytest.mark.parametrize("make", TRANSFORMERS.values(), ids=TRANSFORMERS)


def nested_autograd(f, x, order):
    """Values and derivatives in x of an f that acts elementwise on x."""
    values = [f(x)]
    for _ in range(order):
        total = (values[-1] + 0 * x).sum()  # in the graph of x, even if the value is not
        values.append(torch.autograd.grad(total, x, create_graph=True)[0])
    return values


def assert_all_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max()


def plain_closed_form(net, x, h, context):
    """The formula of the docstring, word by word."""
    weight, bias, time_weight = net.weight.split([h.shape[-1], 1, 1], dim=-1)
    rows = torch.einsum("irk,...ik->...ir", weight, h) + (bias + time_weight * TIME).squeeze(-1)
    if context is not None:
        context_weight = net.context_weight.view(D, WIDTH + 2, CONTEXT_DIM)
        rows = rows + torch.einsum("irc,...c->...ir", context_weight, context)
    p, a, b = rows[..., :WIDTH], rows[..., WIDTH], rows[..., WIDTH + 1]
    if net.max_rate is not None:
        a = net.max_rate * torch.tanh(a / net.max_rate)
    u, v = net.input_weight.squeeze(-1), net.output_weight.squeeze(-2)
    return a * x + b + (v * ACTIVATIONS[net.activation](u * x.unsqueeze(-1) + p)).sum(-1)


@each_activation
@each_context_dim
def test_closed_form_against_its_own_value(activation, context_dim):
    x, h, context = make_inputs(context_dim)
    bound = make_closed_form(activation, context_dim).bind(context)
    expected = nested_autograd(lambda x: bound.derivatives(TIME, x, h, 0)[0], x, 4)
    assert_all_close(bound.derivatives(TIME, x, h, 4), expected, 1e-11)


@each_activation
@each_context_dim
@each_max_rate
def test_closed_form_against_the_formula(activation, context_dim, max_rate):
    net = make_closed_form(activation, context_dim, max_rate)
    x, h, context = make_inputs(context_dim)
    expected = nested_autograd(lambda x: plain_closed_form(net, x, h, context), x, 4)
    assert_all_close(net.bind(context).derivatives(TIME, x, h, 4), expected, 1e-11)


@each_activation
@each_context_dim
def test_closed_form_in_float32(activation, context_dim):
    # Up to order 2, where rounding leaves about 1e-6 of the largest value.
    net = make_closed_form(activation, context_dim)
    x, h, context = make_inputs(context_dim, dtype=torch.float32)
    wide = [None if tensor is None else tensor.double() for tensor in (x, h, context)]
    expected = net.bind(wide[2]).derivatives(TIME, *wide[:2], 2)
    actual = net.float().bind(context).derivatives(TIME.float(), x, h, 2)
    assert_all_close(actual, [value.float() for value in expected], 1e-5)


CONTEXTS = {
    "single": ((), ()),
    "one for all": ((3, 4), ()),
    "row": ((3, 7), (7,)),
    "column": ((6, 5), (6, 1)),
    "each": ((6, 5), (6, 5)),
}


@pytest.mark.parametrize("batch_shape, context_shape", CONTEXTS.values(), ids=CONTEXTS)
def test_closed_form_broadcasts_contexts(batch_shape, context_shape):
    net = make_closed_form("tanh", CONTEXT_DIM)
    x, h, _ = make_inputs(0, batch_shape)
    context = torch.randn(*context_shape, CONTEXT_DIM)
    each = context.expand(*batch_shape, CONTEXT_DIM)
    actual = net.bind(context).derivatives(TIME, x, h, 2)
    for index in itertools.product(*map(range, batch_shape)):
        expected = net.bind(each[index]).derivatives(TIME, x[index], h[index], 2)
        assert_all_close([value[index] for value in actual], expected, 1e-13)


@each_module
def test_module_against_autograd(make, vanishing):
    module = make()
    x, h, _ = make_inputs()
    features = [TIME.expand(6, D, 1), h]
    expected = nested_autograd(lambda x: module(torch.cat([x.unsqueeze(-1), *features], -1)).squeeze(-1), x, 3)
    results = ModuleTransformer(module, D, HIDDEN_DIM).bind().derivatives(TIME, x, h, 3)
    assert_all_close(results, expected, 1e-12)
    vanishes = [bool((value == 0).all()) for value in results]
    assert vanishes == [vanishing is not None and k >= vanishing for k in range(4)]


@each_module
@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("x_requires_grad", [True, False], ids=["x with grad", "x without grad"])
def test_module_without_gradients(make, vanishing, order, x_requires_grad):
    bound = ModuleTransformer(make(), D, HIDDEN_DIM).bind()
    x, h, _ = make_inputs()
    expected = bound.derivatives(TIME, x, h, order)
    x = x.detach().requires_grad_(x_requires_grad)
    with torch.no_grad():
        results = bound.derivatives(TIME, x, h, order)
    assert not any(value.requires_grad for value in results)
    assert_all_close(results, expected, 1e-14)
    assert x.requires_grad == x_requires_grad and x.grad is None


def test_module_with_frozen_parameters():
    # Nothing but x is left to differentiate in, and x asks for no gradient itself.
    module = LinearInX().requires_grad_(False)
    x, h = (tensor.detach() for tensor in make_inputs()[:2])
    f, first, second = ModuleTransformer(module, D, HIDDEN_DIM).bind().derivatives(TIME, x, h, 2)
    slope = module.rest(torch.cat([TIME.expand(6, D, 1), h], -1)).squeeze(-1)
    assert_all_close([f, first, second], [slope * x, slope, torch.zeros_like(x)], 1e-14)


@each_transformer
@pytest.mark.parametrize("order", range(4))
def test_order_decides_how_many_not_which(make, order):
    bound = make().bind()
    x, h, _ = make_inputs()
    assert_all_close(bound.derivatives(TIME, x, h, order), bound.derivatives(TIME, x, h, 3)[: order + 1], 1e-13)


@each_transformer
@pytest.mark.parametrize("batch_shape", [(), (3,), (3, 4), (0,)], ids=str)
def test_batch_shapes(make, batch_shape):
    bound = make().bind()
    x, h, _ = make_inputs(0, batch_shape)
    results = bound.derivatives(TIME, x, h, 3)
    assert [value.shape for value in results] == [x.shape] * 4
    for index in itertools.product(*map(range, batch_shape)):
        expected = bound.derivatives(TIME, x[index], h[index], 3)
        assert_all_close([value[index] for value in results], expected, 1e-13)


@each_transformer
def test_coordinates_are_separate(make):
    bound = make().bind()
    x, h, _ = make_inputs(0, ())
    for k in range(3):
        in_x = jacobian(lambda x, k=k: bound.derivatives(TIME, x, h, 2)[k], x)
        in_h = jacobian(lambda h, k=k: bound.derivatives(TIME, x, h, 2)[k], h)
        own = torch.eye(D, dtype=torch.bool)
        assert torch.equal(in_x != 0, own)
        assert torch.equal((in_h != 0).all(-1), own) and torch.equal((in_h != 0).any(-1), own)


@each_transformer
def test_gradients_of_derivatives(make):
    # Against finite differences, in x and h: the conditioner is to get the gradient of the divergence.
    bound = make().bind()
    x, h, _ = make_inputs(0, (2,))
    assert torch.autograd.gradcheck(lambda x, h: bound.derivatives(TIME, x, h, 2), (x, h))


@each_transformer
def test_depends_on_time(make):
    bound = make().bind()
    x, h, _ = make_inputs()
    now, later = bound.derivatives(TIME, x, h, 2), bound.derivatives(TIME + 1, x, h, 2)
    assert all((a != b).all() for a, b in zip(now, later, strict=True))


def bind_with_loss(make_bound):
    """Leaves (parameters and context), bound tensors, and a random scalar made of the value and two derivatives."""
    x, h, context = make_inputs(CONTEXT_DIM)
    net = make_bound()
    bound = net.bind(context if net.context_dim else None)
    loss = sum((value * torch.randn_like(value)).sum() for value in bound.derivatives(TIME, x, h, 2))
    return [*net.parameters(), *([context] if net.context_dim else [])], bound.tensors, loss


BINDINGS = {
    **TRANSFORMERS,
    "closed form, softplus": lambda: make_closed_form("softplus"),
    "closed form, context": lambda: make_closed_form("tanh", CONTEXT_DIM),
}
each_binding = pytest.mark.parametrize("make", BINDINGS.values(), ids=BINDINGS)


@each_binding
def test_bound_tensors_carry_all_gradients(make):
    leaves, tensors, loss = bind_with_loss(make)
    in_tensors = torch.autograd.grad(loss, tensors, retain_graph=True)
    via_tensors = torch.autograd.grad(tensors, leaves, in_tensors, retain_graph=True)
    expected = torch.autograd.grad(loss, leaves)
    assert all(gradient.abs().max() > 0 for gradient in expected)
    assert_all_close(via_tensors, expected, 1e-12)


@each_binding
def test_no_bound_tensor_depends_on_another(make):
    _, tensors, _ = bind_with_loss(make)
    assert all(tensor.requires_grad for tensor in tensors)
    for a, b in itertools.permutations(tensors, 2):
        assert torch.autograd.grad(a.sum(), b, allow_unused=True, retain_graph=True) == (None,)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("features", [2, D])
def test_wrong_output_of_a_module(order, features):
    bound = ModuleTransformer(nn.Linear(2 + HIDDEN_DIM, features), D, HIDDEN_DIM).bind()
    x, h, _ = make_inputs()
    with pytest.raises(ValueError, match="one feature each"):
        bound.derivatives(TIME, x, h, order)


@pytest.mark.parametrize("max_rate", [0.0, -1.0, float("inf"), float("nan")])
def test_invalid_max_rate(max_rate):
    with pytest.raises(ValueError, match=f"max_rate must be positive and finite, or None, but got {max_rate}"):
        ClosedFormTransformer(D, HIDDEN_DIM, max_rate=max_rate)


def test_max_rate_bounds_the_slope_far_out():
    # Units of tanh are flat there, so that the affine part is all that is left.
    net = make_closed_form(context_dim=CONTEXT_DIM, max_rate=0.5)
    _, h, context = make_inputs(CONTEXT_DIM)
    _, slope = net.bind(1e3 * context).derivatives(TIME, torch.full((6, D), 1e8), 1e3 * h, 1)
    assert slope.abs().max() <= 0.5
    assert slope.abs().min() > 0.49


@pytest.mark.parametrize("width", [0, -1])
def test_invalid_width(width):
    with pytest.raises(ValueError, match="width"):
        ClosedFormTransformer(D, HIDDEN_DIM, width=width)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation"):
        ClosedFormTransformer(D, HIDDEN_DIM, activation="relu")
