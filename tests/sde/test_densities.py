# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.testing import assert_close
from transform_checks import TIGHT, strengthen

from pyro_hollow import conditional_hollow_cnf, standardized
from pyro_hollow.sde import FlowMarginals, GaussianMixtureMarginals, log_density_derivatives

TIMES = {"one time": torch.tensor(0.7, dtype=torch.float64), "times": 3 * torch.rand(5, dtype=torch.float64)}
each_time = pytest.mark.parametrize("t", TIMES.values(), ids=TIMES)
each_covariance = pytest.mark.parametrize("covariance", ["full", "diagonal"])


def mixture(d, covariance="full", components=3):
    density = GaussianMixtureMarginals(d, components, (-1.0, 3.0), covariance=covariance)
    for parameter in (density.curve.bias, density.curve.slope, density.curve.weight):
        nn.init.normal_(parameter, std=0.5)
    return density


def reference(density, t):
    """The mixture at one time, by torch.distributions."""
    logits, means, log_diagonal, lower = density._split(density.curve(t)[0])
    factor = torch.diag_embed(log_diagonal.exp()) + (0 if lower is None else lower)
    components = MultivariateNormal(means, precision_matrix=factor @ factor.mT)
    return MixtureSameFamily(Categorical(logits=logits), components)


@each_covariance
@each_time
@pytest.mark.parametrize("d", [1, 2, 4])
def test_mixture_is_that_of_torch(covariance, t, d):
    density, x = mixture(d, covariance), torch.randn(5, d)
    assert_close(density.log_prob(t, x), reference(density, t).log_prob(x))


@each_covariance
@each_time
@pytest.mark.parametrize("d", [1, 2, 4])
def test_derivatives_of_mixture(covariance, t, d):
    density, x = mixture(d, covariance), torch.randn(5, d)
    closed = density.derivatives(t, x)
    automatic = log_density_derivatives(density.log_prob, t, x)
    assert_close(closed, automatic)
    assert all(value.abs().max() > 1e-2 for value in closed)
    gradients = [
        torch.autograd.grad(sum((v * (k + 1)).sin().sum() for k, v in enumerate(values)), [*density.parameters()])
        for values in (closed, automatic)
    ]
    assert_close(*gradients)


@each_covariance
@pytest.mark.parametrize("batch_shape", [(), (3,), (2, 3)], ids=str)
def test_shapes(covariance, batch_shape):
    density, x = mixture(2, covariance), torch.randn(*batch_shape, 2)
    for t in (torch.tensor(0.5), torch.full(batch_shape, 0.5)):
        values = density.derivatives(t, x)
        assert [tuple(v.shape) for v in values] == [batch_shape, batch_shape, tuple(x.shape), tuple(x.shape)]
        assert_close(density.log_prob(t, x), values.log_prob)


def test_mixture_is_normalised():
    density = mixture(2)
    axis = torch.linspace(-40, 40, 401)
    grid = torch.cartesian_prod(axis, axis)
    for t in (-1.0, 0.5, 3.0):
        integral = density.log_prob(torch.tensor(t), grid).exp().sum() * (axis[1] - axis[0]) ** 2
        assert abs(integral - 1) < 1e-3


@each_covariance
def test_samples_of_mixture(covariance):
    density, t = mixture(2, covariance, components=2), torch.tensor(0.5)
    x = density.sample(t.expand(50_000))
    expected = reference(density, t)
    assert not x.requires_grad
    assert ((x.mean(0) - expected.mean).abs() < 5 * (expected.variance / 50_000).sqrt()).all()
    assert ((x.var(0) / expected.variance - 1).abs() < 0.1).all()
    direct = expected.sample((50_000,))
    assert_close(x.T.cov(), direct.T.cov(), rtol=0.1, atol=0.05)


def test_each_sample_has_its_time():
    density = GaussianMixtureMarginals(1, 1, (0.0, 1.0))
    with torch.no_grad():
        density.curve.slope.view(1, -1)[:, 1] = 100.0  # the mean runs from -100 to 100
    x = density.sample(torch.tensor([0.0, 1.0]).repeat(50))
    assert (x[::2] < -50).all() and (x[1::2] > 50).all()


def test_initialize():
    x = torch.tensor([5.0, -3.0]) + torch.tensor([2.0, 0.1]) * torch.randn(1000, 2)
    density = GaussianMixtureMarginals(2, 8, (0.0, 1.0))
    before = density.log_prob(torch.rand(1000), x).mean()
    density.initialize(x)
    after = density.log_prob(torch.rand(1000), x).mean()
    best = MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x).mean()
    assert before < best - 10 and after > best - 3


@pytest.mark.parametrize("c", [1e-6, 1e-4, 1e-2, 1.0, 1e6])
def test_initial_means_stay_among_the_data_at_any_scale(c):
    x = torch.tensor([5.0, -3.0]) + torch.randn(1000, 2)
    density = GaussianMixtureMarginals(2, 8, (0.0, 1.0))
    density.initialize(c * x)
    drawn = density.sample(torch.rand(4000)) / c
    assert ((drawn.mean(0) - x.mean(0)).abs() < x.std(0)).all() and (drawn.std(0) < 2 * x.std(0)).all()


@each_covariance
def test_derivatives_in_units_of_the_data(covariance):
    density, t = mixture(2, covariance), torch.rand(5)
    x = torch.tensor([1e3, 0.0]) + torch.tensor([10.0, 1e-2]) * torch.randn(5, 2)
    density.standardize(t, x)
    closed = density.derivatives(t, x)
    assert_close(closed, log_density_derivatives(density.log_prob, t, x))
    z, scale = (x - x.mean(0)) / x.std(0, correction=0), x.std(0, correction=0)
    assert_close(closed.log_prob, reference(density, t).log_prob(z) - scale.log().sum())


def test_flow_with_maps_of_its_own_keeps_them():
    t, x = torch.rand(50), 1e3 + torch.randn(50, 2)
    flow = standardized(conditional_hollow_cnf(2, 1), x, t.unsqueeze(-1))
    density = FlowMarginals(flow, dist.Normal(torch.zeros(2), 1.0).to_event(1))
    before = density.log_prob(t, x)
    density.standardize(t, x)
    assert not density.units.is_set
    assert_close(density.log_prob(t, x), before, rtol=0, atol=0)


def test_flow_in_units_of_the_data():
    density, t, x = flow_marginals(2), 1960 + 50 * torch.rand(5), 1e3 * torch.randn(5, 2) + 1e4
    density.standardize(t, x)
    values = density.derivatives(t, x)
    s, z = density.time_units(t), density.units(x)
    plain = FlowMarginals(density.flow, density.base).derivatives(s, z)
    span, scale = t.max() - t.min(), x.std(0, correction=0)
    assert_close(values.log_prob, plain.log_prob - scale.log().sum())
    assert_close(values.rate, plain.rate / span)
    assert_close(values.score, plain.score / scale)
    assert_close(values.curvature, plain.curvature / scale**2)
    assert ((density.sample(t) - 1e4).abs() < 1e4).all()
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 2\), but got \(5, 1\)"):
        density.log_prob(t, x[:, :1])


def test_single_precision():
    density, x = mixture(3), torch.randn(5, 3)
    expected = density.derivatives(TIMES["times"], x)
    values = density.float().derivatives(TIMES["times"].float(), x.float())
    assert all(value.dtype == torch.float32 for value in values)
    assert_close(tuple(values), tuple(v.float() for v in expected), rtol=1e-3, atol=1e-3)


BAD = {
    "input_dim must be at least 1": {"input_dim": 0},
    "num_components must be at least 1": {"num_components": 0},
    "hidden_dim must be at least 1": {"hidden_dim": 0},
    "interval must run from a time to a later one": {"interval": (1.0, 1.0)},
    "both finite": {"interval": (0.0, float("inf"))},
    "covariance must be 'full' or 'diagonal'": {"covariance": "low-rank"},
}


@pytest.mark.parametrize("message, changes", BAD.items(), ids=BAD)
def test_bad_settings(message, changes):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureMarginals(**{"input_dim": 2, "num_components": 2, "interval": (0.0, 1.0), **changes})


def test_bad_shapes():
    density = mixture(2)
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 2\), but got \(5, 3\)"):
        density.log_prob(torch.tensor(0.0), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 2\), but got \(5, 3\)"):
        density.derivatives(torch.tensor(0.0), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(n, 2\)"):
        density.initialize(torch.zeros(1, 2))


def flow_marginals(d):
    flow = conditional_hollow_cnf(d, 1, [8], solver=TIGHT)
    strengthen(flow)
    return FlowMarginals(flow, dist.Normal(torch.zeros(d), 1.0).to_event(1))


@each_time
def test_derivatives_of_flow(t):
    density, x = flow_marginals(2), torch.randn(5, 2)
    value, rate, score, curvature = density.derivatives(t, x)
    h = 1e-4
    assert_close(value, density.log_prob(t, x))
    difference = (density.log_prob(t + h, x) - density.log_prob(t - h, x)) / (2 * h)
    assert_close(rate, difference, rtol=1e-4, atol=1e-5)
    for i, step in enumerate(h * torch.eye(2)):
        ahead, behind = density.log_prob(t, x + step), density.log_prob(t, x - step)
        assert_close(score[:, i], (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-5)
        slopes = [density.derivatives(t, x + sign * step).score[:, i] for sign in (1, -1)]
        assert_close(curvature[:, i], (slopes[0] - slopes[1]) / (2 * h), rtol=1e-4, atol=1e-5)
    assert all(v.abs().max() > 1e-2 for v in (rate, score, curvature))


def test_score_of_flow_is_the_one_it_carries():
    density, t, z = flow_marginals(2), torch.tensor([[0.3]]).expand(5, 1), torch.randn(5, 2)
    x, _, carried = density.flow.condition(t).call_and_score(z, -z)
    assert_close(density.derivatives(t[:, 0], x.detach()).score.detach(), carried, rtol=1e-4, atol=1e-5)


def test_flow_is_trained_by_its_derivatives():
    density, x = flow_marginals(1), torch.randn(3, 1)
    values = density.derivatives(torch.tensor(0.5), x)
    gradients = torch.autograd.grad(values.curvature.sum(), [*density.parameters()], allow_unused=True)
    assert max(g.abs().max() for g in gradients if g is not None) > 1e-3
    with torch.no_grad():
        assert not any(v.requires_grad for v in density.derivatives(torch.tensor(0.5), x))


def test_samples_of_flow():
    density, t = flow_marginals(1), torch.full((4000,), 0.5)
    x = density.sample(t)
    axis = torch.linspace(-15, 15, 3001).unsqueeze(-1)
    p = density.log_prob(torch.tensor(0.5), axis).exp().detach() * 0.01
    mean = (p * axis[:, 0]).sum()
    assert abs(p.sum() - 1) < 1e-2
    assert abs(x.mean() - mean) < 5 * x.std() / 4000**0.5


def test_constant_column_is_named():
    x = torch.stack([torch.randn(5), torch.ones(5)], dim=-1)
    with pytest.raises(ValueError, match="column 1 is constant"):
        GaussianMixtureMarginals(2, 3, (0.0, 1.0)).initialize(x)


@pytest.mark.parametrize("shape", [(5, 1), (4,), (1, 5, 1)], ids=str)
@each_covariance
def test_times_that_do_not_broadcast(shape, covariance):
    """A column of times would pair each time with each sample."""
    density, x = mixture(1, covariance), torch.randn(5, 1)
    for call in (density.log_prob, density.derivatives):
        with pytest.raises(ValueError, match=r"t must be a scalar or broadcast to the batch shape of x, \(5,\)"):
            call(torch.rand(shape), x)


def test_density_of_another_shape():
    with pytest.raises(ValueError, match=r"density must return shape \(5,\), but returned \(5, 1\)"):
        log_density_derivatives(
            lambda t, x: torch.distributions.Normal(t, 1.0).log_prob(x), torch.tensor(0.3), torch.randn(5, 1)
        )
