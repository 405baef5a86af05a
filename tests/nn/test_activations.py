# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from pyro_hollow.nn.activations import ACTIVATIONS, get_activation

REFERENCES = {"tanh": torch.tanh, "softplus": F.softplus, "silu": F.silu}
ORDER = 6

each_activation = pytest.mark.parametrize("name", ACTIVATIONS)
each_order = pytest.mark.parametrize("order", range(ORDER + 1))


def grid(dtype=torch.float64):
    return torch.linspace(-5, 5, 101, dtype=dtype, requires_grad=True)


def nested_autograd(function, z, order):
    values = [function(z)]
    for _ in range(order):
        values.append(torch.autograd.grad(values[-1].sum(), z, create_graph=True)[0])
    return values


def assert_all_close(actual, expected):
    """Orders 0, 1, ...: the terms of the polynomials, ever larger, cancel ever more digits, about 4 times per order."""
    assert len(actual) == len(expected)
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        tolerance = 10 * 4**k * torch.finfo(a.dtype).eps
        assert a.dtype == e.dtype and a.shape == e.shape
        assert (a - e).abs().max() <= tolerance * e.abs().max()


def composed(s, z, order):
    """Derivatives in z of scale * g(rate * z) + shift, which is how layers use an activation."""
    values = [s.scale * s.rate**k * g for k, g in enumerate(s.derivatives(s.rate * z, order))]
    return [values[0] + s.shift, *values[1:]]


def test_every_activation_has_a_reference():
    assert sorted(REFERENCES) == sorted(ACTIVATIONS)


@each_activation
def test_value(name):
    s, z = get_activation(name), grid().detach()
    assert_all_close([s.scale * s.apply(s.rate * z) + s.shift], [REFERENCES[name](z)])


@each_activation
def test_derivatives_of_g(name):
    s, z = get_activation(name), grid()
    # g may overwrite its argument, so it gets a copy.
    assert_all_close(s.derivatives(z, ORDER), nested_autograd(lambda z: s.apply(z.clone()), z, ORDER))


@each_activation
def test_derivatives_of_the_activation(name):
    s, z = get_activation(name), grid()
    assert_all_close(composed(s, z, ORDER), nested_autograd(REFERENCES[name], z, ORDER))


@each_activation
def test_derivatives_of_the_activation_in_float32(name):
    # To float32's precision: from 1e-6 for the value to 5e-3 for order 6.
    s, z = get_activation(name), grid(torch.float32)
    exact = nested_autograd(REFERENCES[name], z.detach().double().requires_grad_(), ORDER)
    expected = [value.float() for value in exact]
    assert_all_close(composed(s, z, ORDER), expected)


@each_activation
@each_order
def test_order_decides_how_many_not_which(name, order):
    s, z = get_activation(name), grid()
    assert_all_close(s.derivatives(z, order), s.derivatives(z, ORDER)[: order + 1])


@each_activation
@each_order
def test_derivatives_leave_their_argument_alone(name, order):
    z = grid().detach()
    get_activation(name).derivatives(z, order)
    assert torch.equal(z, grid().detach())


@each_activation
@each_order
def test_gradient_of_a_derivative_is_the_next(name, order):
    # Whatever is asked for at once, as orders may have backward passes of their own.
    s, z = get_activation(name), grid()
    expected = s.derivatives(z.detach(), order + 1)
    values = s.derivatives(z, order)
    slopes = [torch.autograd.grad(value.sum(), z, retain_graph=True)[0] for value in values]
    assert_all_close([values[0], *slopes], expected)


@each_activation
@pytest.mark.parametrize("order", range(3))
def test_derivatives_can_be_differentiated_twice_in_both_modes(name, order):
    s, z = get_activation(name), torch.randn(4, requires_grad=True)

    def function(z):
        return tuple(s.derivatives(z, order))

    assert torch.autograd.gradcheck(function, z, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, z)


@each_activation
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd], ids=["reverse", "forward"])
def test_derivatives_of_single_elements(name, order, transform):
    s, z = get_activation(name), grid().detach()
    slope = torch.func.vmap(transform(lambda z: s.derivatives(z, order)[order]))(z)
    expected = s.derivatives(z, order + 1)
    assert_all_close([*expected[:-1], slope], expected)


@each_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_vjp(name, dtype):
    s = get_activation(name)
    z = torch.linspace(-30, 30, 121, dtype=dtype, requires_grad=True)
    gradient = torch.randn(121, dtype=dtype)
    (expected,) = torch.autograd.grad(s.apply(z.clone()), z, gradient)
    argument = z.detach().clone()
    s.apply(argument)  # may overwrite its argument, which is what vjp gets
    inputs = [tensor.clone() for tensor in (gradient, argument)]
    actual = s.vjp(gradient, argument)
    # torch takes softplus for linear beyond 20, where its slope is 2e-9 from 1.
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() <= (1e-8 if dtype == torch.float64 else 1e-6) * expected.abs().max()
    assert all(torch.equal(a, b) for a, b in zip((gradient, argument), inputs, strict=True))


@pytest.mark.parametrize("name", ["relu", "Tanh", "", None])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="activation must be one of"):
        get_activation(name)


def test_copies_are_the_activation_itself():
    """Which has operators of torch that cannot be pickled."""
    for activation in ACTIVATIONS.values():
        assert copy.deepcopy(activation) is activation is pickle.loads(pickle.dumps(activation))
