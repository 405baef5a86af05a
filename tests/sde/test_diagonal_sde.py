# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_hollow.nn import ConditionalHollowNN, HollowNN
from pyro_hollow.ops import field_derivatives
from pyro_hollow.sde import DiagonalSDE

TIME = torch.tensor(0.3, dtype=torch.float64)
MU, SIGMA = 0.1, 0.5


def network(d):
    net = HollowNN(d, [8, 4])
    for parameter in net.transformer.parameters():
        nn.init.normal_(parameter)
    return net


def geometric():
    """Geometric Brownian motion."""
    return DiagonalSDE(lambda t, x: MU * x, lambda t, x: SIGMA * x)


@pytest.mark.parametrize("d", [1, 4])
@pytest.mark.parametrize("order", range(3))
def test_derivatives_of_the_coefficients(d, order):
    sde, x = DiagonalSDE(network(d), network(d)), torch.randn(5, d, requires_grad=True)
    own = sde.bind().diffusion_derivatives(TIME, x, order)
    automatic = field_derivatives(sde.g, TIME, x, order)
    assert len(own) == order + 1
    assert_close(own, automatic)
    gradients = [
        torch.autograd.grad(sum((v * (k + 1)).sin().sum() for k, v in enumerate(values)), [*sde.diffusion.parameters()])
        for values in (own, automatic)
    ]
    assert_close(*gradients)
    assert_close(sde.bind().drift_derivatives(TIME, x), field_derivatives(sde.f, TIME, x, 1))


def test_diffusion_of_a_network_is_positive():
    sde = DiagonalSDE(HollowNN(2), HollowNN(2), min_diffusion=0.2)
    assert (sde.g(TIME, torch.randn(100, 2)) > 0.2).all()
    with torch.no_grad():
        for parameter in sde.diffusion.parameters():
            parameter.mul_(100)
    g = sde.g(TIME, 100 * torch.randn(100, 2))
    assert (g >= 0.2).all() and g.min() < 0.3


def test_default_floor_is_a_thousandth_of_the_unit():
    t, x = torch.tensor([0.0, 4.0]), 1e-6 * torch.tensor([[1.0], [3.0]])
    sde = DiagonalSDE(HollowNN(1), HollowNN(1))
    sde.standardize(t, x)
    with torch.no_grad():
        for parameter in sde.diffusion.parameters():
            parameter.mul_(100)
    g = sde.g(t, 1e-6 * torch.tensor([[-1000.0], [1000.0]]))
    assert g.min() >= 1e-3 * 1e-6 / 2


def test_function_is_used_as_it_is():
    x = torch.randn(5, 3)
    assert_close(geometric().g(TIME, x), SIGMA * x)
    assert_close(geometric().f(TIME, x), MU * x)


def test_protocol_of_torchsde():
    torchsde = pytest.importorskip("torchsde")
    sde, x0 = geometric(), torch.ones(4000, 2)
    with torch.no_grad():
        end = torchsde.sdeint(sde, x0, torch.tensor([0.0, 1.0]), dt=0.02, method="milstein")[-1]
    assert abs(end.log().mean() - (MU - SIGMA**2 / 2)) < 5 * SIGMA / math.sqrt(8000)


def test_parameters_are_found():
    sde = DiagonalSDE(network(2), network(2))
    assert len(list(sde.parameters())) == 2 * len(list(network(2).parameters()))
    assert (sde.noise_type, sde.sde_type) == ("diagonal", "ito")
    copy = DiagonalSDE(network(2), network(2))
    copy.load_state_dict(sde.state_dict())
    x = torch.randn(5, 2)
    assert_close(copy.g(TIME, x), sde.g(TIME, x))


@pytest.mark.parametrize("method", ["euler", "milstein"])
def test_moments_of_ornstein_uhlenbeck(method):
    theta, sigma, times = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.8]), [0.0, 0.5, 2.0]
    sde = DiagonalSDE(lambda t, x: -theta * x, lambda t, x: sigma.expand_as(x))
    paths = sde.sample(torch.ones(20_000, 2), times, dt=0.005, method=method)
    assert paths.shape == (3, 20_000, 2) and (paths[0] == 1).all() and not paths.requires_grad
    for t, x in zip(times[1:], paths[1:], strict=True):
        mean, var = (-theta * t).exp(), sigma.square() / (2 * theta) * (1 - (-2 * theta * t).exp())
        assert ((x.mean(0) - mean).abs() < 5 * (var / 20_000).sqrt() + 0.005).all()
        assert ((x.var(0) / var - 1).abs() < 0.06).all()


def strong_error(method, steps):
    """Of geometric Brownian motion at time 1, along the Brownian paths that the sampler draws."""
    torch.manual_seed(1)
    w = sum(torch.randn(2000, 1) for _ in range(steps)) / math.sqrt(steps)
    torch.manual_seed(1)
    end = geometric().sample(torch.ones(2000, 1), [0.0, 1.0], dt=1 / steps, method=method)[-1]
    return (end - ((MU - SIGMA**2 / 2) + SIGMA * w).exp()).abs().mean().item()


@pytest.mark.parametrize("method, order", [("euler", 0.5), ("milstein", 1.0)])
def test_strong_order(method, order):
    coarse, fine = strong_error(method, 16), strong_error(method, 256)
    assert abs(math.log(coarse / fine, 16) - order) < 0.12


def test_milstein_with_a_network():
    # The closed-form derivative of g in the scheme is that of automatic differentiation.
    sde = DiagonalSDE(network(2), network(2))
    paths = []
    for model in (sde, DiagonalSDE(sde.f, sde.g)):
        torch.manual_seed(2)
        paths.append(model.sample(torch.zeros(3, 2), [0.0, 1.0], dt=0.1, method="milstein"))
    assert_close(*paths)


def test_steps_fit_the_times():
    seen = []
    sde = DiagonalSDE(lambda t, x: seen.append(t.item()) or x, lambda t, x: torch.zeros_like(x))
    sde.sample(torch.ones(1, 1), [0.0, 0.3, 0.35], dt=0.1)
    assert_close(torch.tensor(seen), torch.tensor([0.0, 0.1, 0.2, 0.3]))


def test_single_precision():
    sde = DiagonalSDE(HollowNN(2), HollowNN(2)).float()
    assert sde.sample(torch.zeros(3, 2).float(), [0.0, 1.0], dt=0.1).dtype == torch.float32


def test_path_that_leaves_the_numbers():
    sde = DiagonalSDE(lambda t, x: x**3, lambda t, x: torch.ones_like(x))
    with pytest.raises(ArithmeticError, match="not finite at t = 5.0; a smaller dt than 0.5"):
        sde.sample(torch.ones(10, 1), [0.0, 5.0], dt=0.5)


BAD = {
    "times must be two or more that increase": {"times": [0.0, 0.0]},
    "increase, but got": {"times": [0.0]},
    "dt must be positive": {"dt": 0.0},
    "dt must be positive and finite, but got inf": {"dt": math.inf},
    r"times must be finite, but is inf at index \(1,\)": {"times": [0.0, math.inf]},
    "method must be 'euler' or 'milstein'": {"method": "heun"},
}


@pytest.mark.parametrize("message, changes", BAD.items(), ids=BAD)
def test_bad_settings(message, changes):
    with pytest.raises(ValueError, match=message):
        geometric().sample(torch.ones(2, 1), **{"times": [0.0, 1.0], "dt": 0.1, **changes})


def test_bad_coefficients():
    with pytest.raises(ValueError, match="min_diffusion must not be negative"):
        DiagonalSDE(HollowNN(2), HollowNN(2), min_diffusion=-1.0)
    with pytest.raises(ValueError, match="diffusion must take no context, but takes one of size 3"):
        DiagonalSDE(HollowNN(2), ConditionalHollowNN(2, 3))


@pytest.mark.parametrize("g", (0.5, torch.tensor([0.5, 2.0])), ids=("number", "tensor"))
def test_constant_diffusion(g):
    x = torch.randn(3, 2)
    value, *derivatives = DiagonalSDE(HollowNN(2), g).bind().diffusion_derivatives(torch.tensor(0.0), x)
    assert_close(value, torch.as_tensor(g, dtype=x.dtype).expand(3, 2))
    assert all(not derivative.any() for derivative in derivatives)


def test_constant_diffusion_that_learns():
    sde = DiagonalSDE(lambda t, x: -x, nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in sde.named_parameters()] == ["diffusion.value"]
    sde.g(TIME, torch.zeros(5, 2)).sum().backward()
    assert sde.diffusion.value.grad == 10.0
    fixed = DiagonalSDE(lambda t, x: -x, torch.tensor(0.3))
    assert not list(fixed.parameters()) and "diffusion.value" in fixed.state_dict()


@pytest.mark.parametrize(
    "function", [lambda t, x: x[..., 0], lambda t, x: x.sum(-1, keepdim=True)], ids=["less", "one"]
)
@pytest.mark.parametrize("name", ["drift", "diffusion"])
def test_coefficients_of_another_shape(name, function):
    """Of one dimension a missing axis would broadcast, and mix samples."""
    functions = {"drift": lambda t, x: -x, "diffusion": lambda t, x: x} | {name: function}
    sde, x = DiagonalSDE(functions["drift"], functions["diffusion"]), torch.randn(5, 2)
    calls = {
        "sample": lambda: sde.sample(x, [0.0, 0.1], 0.1),
        "protocol": lambda: (sde.f(TIME, x), sde.g(TIME, x)),
        "derivatives": lambda: (sde.bind().drift_derivatives(TIME, x), sde.bind().diffusion_derivatives(TIME, x)),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=rf"{name} must return the shape of the state, \(5, 2\), but returned"):
            call()
