# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math
from functools import reduce

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_hollow.nn import HollowNN
from pyro_hollow.ops import differential_operator, dimwise_derivatives, field_derivatives, time_derivative

D = 3
TIMES = {"one time": torch.tensor(0.4, dtype=torch.float64), "times": torch.rand(5, dtype=torch.float64)}
each_time = pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
NETS = {
    "grouped": {},
    "masked": {"conditioner": "masked", "activation": "softplus"},
    "leave-one-out": {"conditioner": "leave-one-out", "activation": "silu"},
}
each_net = pytest.mark.parametrize("kwargs", NETS.values(), ids=NETS)


def network(d=D, **kwargs):
    net = HollowNN(d, [8, 4], **kwargs)
    for parameter in net.transformer.parameters():
        nn.init.normal_(parameter)
    return net


class SumOfProducts(nn.Module):
    r"""
    A scalar hollow field, :math:`u = \sum_m \prod_i \phi_{mi}(t, x_i)`: for every i it is a function of x_i and of
    hidden units that are free of x_i, the products over the other coordinates.
    """

    def __init__(self, d=D, width=8, features=1):
        super().__init__()
        self.inner = nn.Linear(1 + features, 16)
        self.outer = nn.Parameter(torch.randn(d, 16, width) / 4)

    def factors(self, t, x, features=None):
        """(*, d, width)"""
        features = x.unsqueeze(-1) if features is None else features
        t = t.expand(x.shape[:-1])[..., None, None].expand(*x.shape, 1)
        return torch.einsum("...ij,ijm->...im", torch.tanh(self.inner(torch.cat([t, features], -1))), self.outer)

    def forward(self, t, x):
        return _product(self.factors(t, x).unbind(-2)).sum(-1)

    def dimwise_derivatives(self, t, x, order):
        factors = self.factors(t, x).unbind(-2)
        others = torch.stack([_product(factors[:i] + factors[i + 1 :]) for i in range(len(factors))], -2)
        u, *derivatives = dimwise_derivatives(lambda x, h: (self.factors(t, x) * h).sum(-1), x, others, order)
        return u[..., 0], *derivatives


def _product(factors):
    return reduce(torch.mul, factors)  # higher derivatives of torch.prod lose digits next to zeros


@each_net
@each_time
@pytest.mark.parametrize("order", range(4))
def test_field_and_automatic_differentiation_agree(kwargs, t, order):
    net, x = network(**kwargs), torch.randn(5, D, requires_grad=True)
    own = field_derivatives(net.bind(), t, x, order)
    automatic = field_derivatives(lambda t, x: net(t, x), t, x, order)
    assert_close(automatic, own)
    gradients = [
        torch.autograd.grad(sum((k + 1) * v.sin().sum() for k, v in enumerate(values)), [*net.parameters(), x])
        for values in (own, automatic)
    ]
    assert_close(*gradients)


@each_time
@pytest.mark.parametrize("order", range(4))
def test_scalar_field_and_automatic_differentiation_agree(t, order):
    u, x = SumOfProducts(), torch.randn(5, D, requires_grad=True)
    own = field_derivatives(u, t, x, order)
    automatic = field_derivatives(lambda t, x: u(t, x), t, x, order)
    assert own[0].shape == (5,) and all(value.shape == x.shape for value in own[1:])
    assert_close(automatic, own)
    gradients = [
        torch.autograd.grad(sum((k + 1) * v.sin().sum() for k, v in enumerate(values)), [*u.parameters(), x])
        for values in (own, automatic)
    ]
    assert_close(*gradients)


@pytest.mark.parametrize("batch_shape", [(), (4,), (2, 3)], ids=str)
def test_derivatives_of_a_product(batch_shape):
    x = torch.randn(*batch_shape, D)
    t = torch.tensor(2.0)
    u, slope, curvature, third = field_derivatives(lambda t, x: t * (x**3).prod(-1), t, x, 3)
    assert_close(u, 2 * x.prod(-1) ** 3)
    assert_close(slope, 3 * u.unsqueeze(-1) / x)
    assert_close(curvature, 6 * u.unsqueeze(-1) / x**2)
    assert_close(third, 6 * u.unsqueeze(-1) / x**3)


@pytest.mark.parametrize("make", [network, SumOfProducts], ids=["vector", "scalar"])
def test_without_gradients(make):
    net, x = make(), torch.randn(5, D)
    expected = field_derivatives(lambda t, x: net(t, x), TIMES["one time"], x, 2)
    with torch.no_grad():
        values = field_derivatives(lambda t, x: net(t, x), TIMES["one time"], x, 2)
    assert all(value.requires_grad for value in expected) and not any(value.requires_grad for value in values)
    assert_close(values, tuple(value.detach() for value in expected))


def test_single_precision():
    net, x = network(), torch.randn(5, D)
    expected = field_derivatives(lambda t, x: net(t, x), TIMES["one time"], x, 2)
    net.float()
    values = field_derivatives(lambda t, x: net(t, x), TIMES["one time"].float(), x.float(), 2)
    assert all(value.dtype == torch.float32 for value in values)
    assert_close(values, tuple(value.float() for value in expected), rtol=1e-3, atol=1e-4)


@each_net
@each_time
def test_time_derivative(kwargs, t):
    net, x = network(**kwargs), torch.randn(5, D)
    value, rate = time_derivative(net.bind(), t, x)
    h = 1e-5
    assert_close(value, net(t, x))
    assert_close(rate, (net(t + h, x) - net(t - h, x)) / (2 * h), rtol=1e-6, atol=1e-7)


def test_gradients_of_the_time_derivative():
    net, x, t = network(), torch.randn(5, D), torch.rand(5, requires_grad=True)
    forward = torch.autograd.grad(time_derivative(net.bind(), t, x)[1].sin().sum(), list(net.parameters()))
    # By reverse mode, component by component.
    components = net(t, x).unbind(-1)
    rate = torch.stack([torch.autograd.grad(f.sum(), t, create_graph=True)[0] for f in components], -1)
    backward = torch.autograd.grad(rate.sin().sum(), list(net.parameters()))
    assert_close(forward, backward)


@each_time
def test_operator_on_vector_field(t):
    field, x = network().bind(), torch.randn(5, D)
    a = [torch.randn(D), 2.0, torch.randn(5, D)]
    f, d1, d2 = field.dimwise_derivatives(t, x, 2)
    assert_close(differential_operator(field, t, x, a), a[0] * f + 2 * d1 + a[2] * d2)
    assert_close(differential_operator(field, t, x, [3.0]), 3 * f)


def test_operator_on_scalar_field():
    # Of u = exp(k.x), every linear operator with constant coefficients makes a multiple.
    k, v, x = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]), torch.randn(4, D)
    symbol = -0.7 - (v * k).sum() + 0.3 * k.square().sum()
    result = differential_operator(lambda t, x: (x @ k).exp(), torch.tensor(0.0), x, [-0.7, -v, 0.3])
    assert_close(result, symbol * (x @ k).exp())


def test_advection_diffusion_by_residual_minimisation():
    r"""
    :math:`\partial_t u = -v \cdot \nabla u + \nu \Delta u` on the torus, from
    :math:`u = \sin(x_1) \cos(x_2)`: solved by :math:`e^{-2 \nu t} \sin(x_1 - v_1 t) \cos(x_2 - v_2 t)`.
    """
    speed, nu = torch.tensor([1.0, -0.5]), 0.1

    def exact(t, x):
        y = x - speed * t.unsqueeze(-1)
        return (-2 * nu * t).exp() * y[..., 0].sin() * y[..., 1].cos()

    class Solution(SumOfProducts):
        """Periodic, and with the initial values by construction."""

        def factors(self, t, x):
            start = torch.stack([x[..., 0].sin(), x[..., 1].cos()], -1).unsqueeze(-1)
            learned = super().factors(t, x, torch.stack([x.sin(), x.cos()], -1))
            late = torch.stack([t.expand(x.shape[:-1]), torch.ones_like(x[..., 0])], -1).unsqueeze(-1)
            return torch.cat([start, late * learned], -1)

    u = Solution(d=2, features=2)
    optimizer = torch.optim.Adam(u.parameters(), lr=0.04)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        t, x = torch.rand(128), 2 * math.pi * torch.rand(128, 2)
        residual = time_derivative(u, t, x)[1] - differential_operator(u, t, x, [0.0, -speed, nu])
        optimizer.zero_grad()
        residual.square().mean().backward()
        optimizer.step()
        schedule.step()
    t, x = torch.rand(1000), 2 * math.pi * torch.rand(1000, 2)
    error = (u(t, x) - exact(t, x)).square().mean().sqrt() / exact(t, x).square().mean().sqrt()
    unmoved = (exact(torch.zeros(1000), x) - exact(t, x)).square().mean().sqrt() / exact(t, x).square().mean().sqrt()
    assert error < 0.03 < unmoved


def test_errors():
    x = torch.zeros(4, D)
    with pytest.raises(ValueError, match="order must be 0 or more"):
        field_derivatives(lambda t, x: x, torch.tensor(0.0), x, -1)
    with pytest.raises(ValueError, match=r"field must map x of shape \(4, 3\).*has shape \(4, 2\)"):
        field_derivatives(lambda t, x: x[..., :2], torch.tensor(0.0), x, 1)
    with pytest.raises(ValueError, match="coefficients must hold"):
        differential_operator(lambda t, x: x, torch.tensor(0.0), x, [])
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        field_derivatives(lambda t, x: x.sin(), torch.tensor(0.0), x, 1)


@pytest.mark.parametrize("scalar", [False, True], ids=["vector", "scalar"])
@pytest.mark.parametrize("k, shape", [(0, (5, 1, 1)), (0, (2, 5, 3)), (1, (5,)), (1, (2, 5, 3)), (2, (4,))], ids=str)
def test_coefficients_that_do_not_broadcast(k, shape, scalar):
    """One of shape (*,) for a field in one dimension would make an outer product of samples."""
    coefficients = [0.0] * 3
    coefficients[k] = torch.ones(shape)
    field = (lambda t, x: x.square().sum(-1)) if scalar else (lambda t, x: x.square())
    with pytest.raises(ValueError, match=rf"coefficients\[{k}\] must be a number or a tensor that broadcasts to"):
        differential_operator(field, torch.tensor(0.0), torch.randn(5, 3), coefficients)


def test_coefficients_of_one_dimension():
    t, x = torch.tensor(0.3), torch.randn(5, 1)
    with pytest.raises(ValueError, match=r"coefficients\[1\] .* broadcasts to \(5, 1\), but has shape \(5,\)"):
        differential_operator(lambda t, x: x.sin().squeeze(-1), t, x, [0.0, torch.ones(5)])
    with pytest.raises(ValueError, match=r"coefficients\[0\] .* broadcasts to \(5,\), but has shape \(5, 1\)"):
        differential_operator(lambda t, x: x.sin().squeeze(-1), t, x, [torch.ones(5, 1)])
    weights = torch.randn(5)
    result = differential_operator(lambda t, x: x.sin().squeeze(-1), t, x, [weights, weights.unsqueeze(-1)])
    assert_close(result, weights * (x.sin() + x.cos()).squeeze(-1))
