# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

from pyro_hollow.nn import HollowNN
from pyro_hollow.ops import (
    HollowOperator,
    dimwise_derivatives,
    divergence,
    field_derivatives,
    split_jacobian,
    time_derivative,
)
from pyro_hollow.ops import jacobian as jacobian_by_rows

D = 4
TIME = torch.tensor(0.3, dtype=torch.float64)


class PlainField(nn.Module):
    """A hollow function in a few plain operations: f_i = sin(x_i h_i1) + h_i2 x_i^2, h = tanh(W x), W hollow."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 2, D))
        self.register_buffer("mask", (1 - torch.eye(D)).unsqueeze(1))

    def conditioner(self, x):
        return torch.einsum("ikj,...j->...ik", self.weight * self.mask, x).tanh()

    @staticmethod
    def transformer(x, h):
        return (x * h[..., 0]).sin() + h[..., 1] * x.square()


class NetField(nn.Module):
    """The two parts of a HollowNN, as functions of x and h."""

    def __init__(self, **kwargs):
        super().__init__()
        self.net = HollowNN(D, [8, 4], **kwargs)
        for parameter in self.net.transformer.parameters():
            nn.init.normal_(parameter)

    def conditioner(self, x):
        return self.net.conditioner(TIME, x)

    def transformer(self, x, h):
        return self.net.transformer.bind().derivatives(TIME, x, h, 0)[0]


FIELDS = {
    "plain": PlainField,
    "grouped": NetField,
    "masked": lambda: NetField(conditioner="masked", activation="softplus"),
    "leave-one-out": lambda: NetField(conditioner="leave-one-out", activation="silu"),
}
each_field = pytest.mark.parametrize("make", FIELDS.values(), ids=FIELDS)
each_net = pytest.mark.parametrize("make", [FIELDS[name] for name in FIELDS if name != "plain"], ids=list(FIELDS)[1:])
each_batch_shape = pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
each_x = pytest.mark.parametrize("x_requires_grad", [True, False], ids=["x with grad", "x without grad"])


def evaluate(field, x):
    return field.transformer(x, field.conditioner(x))


def dense_jacobian(field, x):
    """By brute force, shape (*batch, d, d)."""
    rows = x.reshape(-1, D)
    return torch.stack([jacobian(lambda row: evaluate(field, row), row) for row in rows]).view(*x.shape, D)


def nested_autograd(field, x, order):
    """Each component of f by itself, differentiated through the whole of f, one coordinate at a time."""
    x = x.detach().requires_grad_()
    results = [[f_i] for f_i in evaluate(field, x).unbind(-1)]
    for i, values in enumerate(results):
        for _ in range(order):
            (gradient,) = torch.autograd.grad(values[-1].sum(), x, create_graph=True)
            values.append(gradient[..., i])
    return [torch.stack(values, dim=-1).detach() for values in zip(*results, strict=True)]


def gradients(value, field, x):
    """Of a fixed random projection of a value, in all parameters and x."""
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    leaves = [*field.parameters(), x]
    return torch.autograd.grad((value * weights).sum(), leaves, retain_graph=True, materialize_grads=True)


def assert_close(actual, expected, tolerance=1e-11):
    """Up to a tolerance relative to the largest element."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def assert_all_close(actual, expected, tolerance=1e-11):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)


@each_field
@each_batch_shape
@each_x
def test_dimwise_derivatives(make, batch_shape, x_requires_grad):
    field, x = make(), torch.randn(*batch_shape, D, requires_grad=x_requires_grad)
    results = dimwise_derivatives(field.transformer, x, field.conditioner(x), 4)
    assert_all_close(results, nested_autograd(field, x, 4))
    assert x.requires_grad == x_requires_grad


@each_net
def test_closed_form_agrees(make):
    # Two independent ways to the same derivatives; each checks the other.
    field, x = make(), torch.randn(5, D)
    expected = field.net.bind().dimwise_derivatives(TIME, x, 4)
    assert_all_close(dimwise_derivatives(field.transformer, x, field.conditioner(x), 4), expected)


@each_net
def test_gradients_agree_with_closed_form(make):
    field, x = make(), torch.randn(5, D, requires_grad=True)
    results = dimwise_derivatives(field.transformer, x, field.conditioner(x), 4)
    expected = field.net.bind().dimwise_derivatives(TIME, x, 4)
    for result, value in zip(results, expected, strict=True):
        assert_all_close(gradients(result, field, x), gradients(value, field, x), 1e-10)


@each_field
@pytest.mark.parametrize("order", range(4))
def test_order_decides_how_many_not_which(make, order):
    field, x = make(), torch.randn(5, D)
    h = field.conditioner(x)
    expected = dimwise_derivatives(field.transformer, x, h, 3)[: order + 1]
    assert_all_close(dimwise_derivatives(field.transformer, x, h, order), expected, 1e-13)


@each_field
@each_batch_shape
def test_divergence(make, batch_shape):
    field, x = make(), torch.randn(*batch_shape, D)
    expected = dense_jacobian(field, x).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_close(divergence(field.transformer, x, field.conditioner(x)), expected)


@each_field
def test_divergence_in_float32(make):
    # Rounding in float32 leaves about 1e-6 of the largest value.
    field, x = make(), torch.randn(5, D)
    expected = divergence(field.transformer, x, field.conditioner(x))
    field, x = field.float(), x.float()
    assert_close(divergence(field.transformer, x, field.conditioner(x)), expected.float(), 1e-5)


@each_field
def test_gradient_of_divergence_is_complete(make):
    field, x = make(), torch.randn(5, D, requires_grad=True)
    components = evaluate(field, x).unbind(-1)
    trace = sum(torch.autograd.grad(f.sum(), x, create_graph=True)[0][:, i] for i, f in enumerate(components))
    actual = gradients(divergence(field.transformer, x, field.conditioner(x)), field, x)
    assert_all_close(actual, gradients(trace, field, x))


def test_gradient_of_divergence_of_toy():
    # f_i = x_i w x_{-i} has divergence w (x_1 + x_2); with h detached its gradient in w would be 0.
    x, w = torch.tensor([2.0, 5.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    value = divergence(lambda x, h: x * h[..., 0], x, w * x.flip(-1).unsqueeze(-1))
    in_w, in_x = torch.autograd.grad(value, (w, x))
    assert value == 21 and in_w == 7
    assert torch.equal(in_x, torch.tensor([3.0, 3.0]))


#: Polynomials in x_i, and the derivatives that they leave of x = (1, 2) and h = (2, 3).
POLYNOMIALS = {
    "cubic": (lambda x, h: x**3 * h[..., 0], [[2, 24], [6, 36], [12, 36], [12, 18], [0, 0], [0, 0]]),
    "linear": (lambda x, h: x * h[..., 0], [[2, 6], [2, 3], [0, 0], [0, 0]]),
    "constant in x": (lambda x, h: h[..., 0] * 1, [[2, 3], [0, 0], [0, 0]]),
    "constant": (lambda x, h: torch.ones_like(x), [[1, 1], [0, 0], [0, 0]]),
}


@pytest.mark.parametrize("transformer, expected", POLYNOMIALS.values(), ids=POLYNOMIALS)
@pytest.mark.parametrize("h_requires_grad", [True, False], ids=["h with grad", "h without grad"])
@pytest.mark.parametrize("enabled", [True, False], ids=["grad enabled", "no grad"])
def test_derivatives_of_polynomials_end(transformer, expected, h_requires_grad, enabled):
    x, h = torch.tensor([1.0, 2.0]), torch.tensor([[2.0], [3.0]], requires_grad=h_requires_grad)
    with torch.set_grad_enabled(enabled):
        results = dimwise_derivatives(transformer, x, h, len(expected) - 1)
    assert [result.tolist() for result in results] == expected


@each_field
@each_x
@pytest.mark.parametrize("order", range(3))
def test_without_gradients(make, x_requires_grad, order):
    field, x = make(), torch.randn(5, D, requires_grad=x_requires_grad)
    expected = dimwise_derivatives(field.transformer, x, field.conditioner(x), order)
    with torch.no_grad():
        results = dimwise_derivatives(field.transformer, x, field.conditioner(x), order)
    assert all(value.requires_grad for value in expected)
    assert not any(value.requires_grad for value in results)
    assert_all_close(results, expected, 1e-13)


@each_field
def test_graph_of_hidden_units_survives(make):
    # Without a graph of its own, the backward pass must not free what others made.
    field, x = make(), torch.randn(5, D, requires_grad=True)
    h = field.conditioner(x)
    with torch.no_grad():
        dimwise_derivatives(field.transformer, x, h, 2)
    assert torch.autograd.grad(h.sum(), x)[0].abs().max() > 0


@pytest.mark.parametrize("order", [-1, -3])
def test_negative_order(order):
    with pytest.raises(ValueError, match="order"):
        dimwise_derivatives(lambda x, h: x, torch.zeros(2), torch.zeros(2, 1), order)


@each_field
@each_batch_shape
@each_x
def test_split_jacobian_is_the_jacobian(make, batch_shape, x_requires_grad):
    field, x = make(), torch.randn(*batch_shape, D, requires_grad=x_requires_grad)
    split = split_jacobian(field.transformer, field.conditioner, x)
    expected = dense_jacobian(field, x)
    diagonal = expected.diagonal(dim1=-2, dim2=-1)
    hollow = split.hollow.dense()
    assert_close(split.diagonal, diagonal)
    assert_close(split.dense(), expected)
    assert_close(hollow, expected - torch.diag_embed(diagonal))
    assert (hollow.diagonal(dim1=-2, dim2=-1) == 0).all()  # to the bit
    assert (expected != 0).all()


@each_field
@each_batch_shape
@each_x
def test_products(make, batch_shape, x_requires_grad):
    field, x = make(), torch.randn(*batch_shape, D, requires_grad=x_requires_grad)
    split = split_jacobian(field.transformer, field.conditioner, x)
    v = torch.randn_like(x)
    whole = dense_jacobian(field, x)
    hollow = whole * (1 - torch.eye(D))
    for part, matrix in ((split, whole), (split.hollow, hollow)):
        assert_close(part.jvp(v), (matrix @ v.unsqueeze(-1)).squeeze(-1))
        assert_close(part.vjp(v), (matrix.mT @ v.unsqueeze(-1)).squeeze(-1))


@each_field
@pytest.mark.parametrize("product", ["jvp", "vjp"])
def test_products_are_differentiable(make, product):
    field, x = make(), torch.randn(D, requires_grad=True)
    v = torch.randn(D)
    split = split_jacobian(field.transformer, field.conditioner, x)
    whole = jacobian(lambda x: evaluate(field, x), x, create_graph=True)
    hollow = whole * (1 - torch.eye(D))
    for part, matrix in ((split, whole), (split.hollow, hollow)):
        expected = matrix @ v if product == "jvp" else matrix.mT @ v
        actual = getattr(part, product)(v)
        assert_all_close(gradients(actual, field, x), gradients(expected, field, x))


@each_field
def test_products_are_differentiable_in_the_vector(make):
    # A product is linear in v, so its gradient in v is a product with the transposed matrix.
    field, x = make(), torch.randn(D)
    split = split_jacobian(field.transformer, field.conditioner, x)
    v, w = torch.randn(D, requires_grad=True), torch.randn(D)
    assert_close(torch.autograd.grad(split.jvp(v) @ w, v)[0], split.vjp(w).detach())
    assert_close(torch.autograd.grad(split.vjp(v) @ w, v)[0], split.jvp(w).detach())


@each_field
@each_x
def test_split_jacobian_without_gradients(make, x_requires_grad):
    field, x = make(), torch.randn(5, D, requires_grad=x_requires_grad)
    v = torch.randn_like(x)

    def everything():
        split = split_jacobian(field.transformer, field.conditioner, x)
        parts = [split.diagonal]
        for part in (split, split.hollow):
            parts += [part.dense(), part.jvp(v), part.vjp(v)]
        return parts

    expected = everything()
    with torch.no_grad():
        results = everything()
    assert all(value.requires_grad for value in expected)
    assert not any(value.requires_grad for value in results)
    assert_all_close(results, expected, 1e-13)


def test_one_coordinate_has_no_hollow_part():
    net, x, v = HollowNN(1), torch.randn(5, 1), torch.randn(5, 1)
    bound = net.transformer.bind()
    split = split_jacobian(lambda x, h: bound.derivatives(TIME, x, h, 0)[0], lambda x: net.conditioner(TIME, x), x)
    assert torch.equal(split.dense().squeeze(-1), split.diagonal) and (split.diagonal != 0).all()
    assert (split.hollow.dense() == 0).all()
    assert (split.hollow.jvp(v) == 0).all() and (split.hollow.vjp(v) == 0).all()


def test_hidden_units_without_x_have_no_hollow_part():
    x, h = torch.tensor([2.0, 3.0, 5.0]), torch.ones(3, 1)
    split = split_jacobian(lambda x, h: x.square() * h[..., 0], lambda x: h, x)
    assert torch.equal(split.dense(), torch.diag(2 * x))
    assert torch.equal(split.hollow.jvp(x), torch.zeros(3))
    assert torch.equal(split.hollow.vjp(x), torch.zeros(3))
    assert torch.equal(split.jvp(x), 2 * x.square())


def test_tangents_pass_through():
    # Divergence of x_i^3 x_j: 3 x_i^2 x_j + 3 x_j^2 x_i, whose derivative in x_1 at (1, 2) is 24.
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
        value = divergence(lambda x, h: x**3 * h[..., 0], x, x.flip(-1).unsqueeze(-1))
        assert forward_ad.unpack_dual(value).tangent.item() == 24.0


def test_inference_mode_is_refused():
    x = torch.tensor([1.0, 2.0])
    jacobian = split_jacobian(lambda x, h: x * h[..., 0], lambda x: x.flip(-1).unsqueeze(-1), x)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="inference_mode"):
            divergence(lambda x, h: x * h[..., 0], x, x.flip(-1).unsqueeze(-1))
        with pytest.raises(RuntimeError, match="inference_mode"):
            jacobian.hollow.dense()


MODULE_NET = HollowNN(D, transformer=nn.Linear(34, 1)).double().requires_grad_(False)
VMAPPED = {
    "divergence": lambda field, x: divergence(field.transformer, x, field.conditioner(x)),
    "split": lambda field, x: split_jacobian(field.transformer, field.conditioner, x).hollow.vjp(x),
    "jacobian": lambda field, x: jacobian_by_rows(lambda x: field.transformer(x, field.conditioner(x)), x),
    "field": lambda field, x: field_derivatives(lambda t, x: field.transformer(x, field.conditioner(x)), TIME, x, 1)[1],
    "module": lambda field, x: MODULE_NET.bind().with_divergence(TIME, x)[1],
}


@pytest.mark.parametrize("function", VMAPPED.values(), ids=VMAPPED)
def test_vmap_is_refused(function):
    """There tensors do not require gradients, and what does not would have no derivative."""
    field = PlainField()
    for parameter in field.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match="vmap leaves no derivatives to take; give the samples as a batch"):
        torch.func.vmap(lambda x: function(field, x))(torch.randn(5, D))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", ["functions", "module"])
def test_tangents_without_gradients(kind, frozen):
    net = HollowNN(D, transformer=nn.Sequential(nn.Linear(34, 8), nn.Tanh(), nn.Linear(8, 1)))
    net.requires_grad_(not frozen)
    x = torch.randn(5, D)
    if kind == "module":

        def second(t, x):
            return net.bind().dimwise_derivatives(t, x, 2)[2]

    else:

        def second(t, x):
            return field_derivatives(lambda t, x: (t * x).sin() * x.roll(1, -1), t, x, 2)[2]

    step = 1e-4
    expected = (second(TIME + step, x) - second(TIME - step, x)).detach() / (2 * step)
    assert expected.abs().max() > 1e-3
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            torch.testing.assert_close(time_derivative(second, TIME, x)[1].detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("function", [lambda x, h: x * h, lambda x, h: (x * h[..., 0]).sum(-1)], ids=["more", "less"])
def test_transformers_of_another_shape(function):
    x, h = torch.randn(D, D), torch.randn(D, D, 1)
    with pytest.raises(ValueError, match=r"transformer must return the shape of x, \(4, 4\), but returned"):
        dimwise_derivatives(function, x, h, 1)
    with pytest.raises(ValueError, match=r"transformer must return the shape of x, \(4, 4\), but returned"):
        HollowOperator(function, lambda x: h, x).vjp(x)
