# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Hollow-CNFs in Pyro's own machinery; solvers are coarse here, for speed."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormalizingFlow
from pyro.optim import Adam
from torch import nn
from transform_checks import QUICK, base

from pyro_hollow import conditional_hollow_cnf, hollow_cnf

small_flow = partial(hollow_cnf, hidden_dims=[8, 8], solver=QUICK)


def banana():
    """A posterior that bends: far from any product of normals."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    pyro.sample("x", dist.Normal(z[..., 1] - z[..., 0] ** 2, 0.2), obs=torch.tensor(-0.5))


def flow_guide(flow):
    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(base(2), [flow]))

    return guide


def elbo(model, guide, num_particles=1000):
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=0)
        return -loss.loss(model, guide)


def fit(model, guide, steps, *args, **settings):
    """At a high learning rate first, then at a low one."""
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True, **settings)
    losses = []
    for lr, share in [(0.03, 2 / 3), (0.005, 1 / 3)]:
        svi = SVI(model, guide, Adam({"lr": lr}), loss)
        losses += [svi.step(*args) for _ in range(round(steps * share))]
    assert all(map(math.isfinite, losses))
    return losses


def banana_evidence():
    axis = torch.linspace(-6, 6, 601)
    z = torch.cartesian_prod(axis, axis)
    joint = base(2).log_prob(z) + dist.Normal(z[:, 1] - z[:, 0] ** 2, 0.2).log_prob(torch.tensor(-0.5))
    return (joint.logsumexp(0) + 2 * (axis[1] - axis[0]).log()).item()


# SVI


def test_svi():
    guide, normal = flow_guide(small_flow(2)), AutoDiagonalNormal(banana)
    start = elbo(banana, guide)
    fit(banana, guide, 200, max_plate_nesting=0)
    fit(banana, normal, 200, max_plate_nesting=0)
    trained = elbo(banana, guide)
    assert trained > start + 10.0
    assert trained > elbo(banana, normal) + 0.15
    assert trained < banana_evidence() + 0.05  # a wrong log-determinant would be rewarded without bound


def test_parameters_of_a_guide_are_in_the_store():
    flow = small_flow(2)
    before = {name: parameter.detach().clone() for name, parameter in flow.named_parameters()}
    fit(banana, flow_guide(flow), 3, max_plate_nesting=0)
    store = pyro.get_param_store()
    assert set(store.keys()) == {f"flow$$${name}" for name in before}
    for name, parameter in flow.named_parameters():
        assert store[f"flow$$${name}"] is parameter
        assert not torch.equal(parameter, before[name])


# Automatic guides


def regression(x, y=None):
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    log_scale = pyro.sample("log_scale", dist.Normal(-1.0, 0.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(offset + slope * x, log_scale.exp()), obs=y)


def test_auto_normalizing_flow():
    x = torch.randn(40)
    y = 1.0 - 2.0 * x + 0.3 * torch.randn(40)
    guide = AutoNormalizingFlow(regression, small_flow)
    losses = fit(regression, guide, 100, x, y, max_plate_nesting=1)
    assert sum(losses[-20:]) / 20 < 40 < losses[0]
    predictive = Predictive(regression, guide=guide, num_samples=500, parallel=True, return_sites=["offset", "y"])
    samples = predictive(x)
    assert samples["offset"].shape == (500, 1) and samples["y"].shape == (500, 40)
    assert (samples["offset"].mean() - 1.0).abs() < 0.2
    assert (samples["y"].mean(0) - (1.0 - 2.0 * x)).abs().mean() < 0.2


def location(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def test_auto_normalizing_flow_of_one_latent():
    y = torch.randn(3) + 1.0
    guide = AutoNormalizingFlow(location, small_flow)
    fit(location, guide, 100, y, max_plate_nesting=1)
    samples = Predictive(location, guide=guide, num_samples=2000, parallel=True, return_sites=["loc"])(y)["loc"]
    # The posterior is known: precision 1 + 3, mean sum(y) / 4.
    assert (samples.mean() - y.sum() / 4).abs() < 0.15
    assert (samples.std() - 0.5).abs() < 0.1


# Amortised guides


class Factors(nn.Module):
    """A linear model of data with latents of their own, whose evidence is known."""

    def __init__(self):
        super().__init__()
        self.weight = torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 0.5]])
        self.scale = 0.5
        self.flow = conditional_hollow_cnf(2, 3, hidden_dims=[8, 8], solver=QUICK)

    def evidence(self, x):
        covariance = self.weight.T @ self.weight + self.scale**2 * torch.eye(3)
        return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).sum()

    def model(self, x, subsample_size):
        with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
            z = pyro.sample("z", base(2))
            pyro.sample("x", dist.Normal(z @ self.weight, self.scale).to_event(1), obs=x[index])

    def guide(self, x, subsample_size):
        pyro.module("flow", self.flow)
        with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
            flow_dist = dist.ConditionalTransformedDistribution(base(2).expand([len(index)]), [self.flow])
            pyro.sample("z", flow_dist.condition(x[index]))


def test_amortised_guide():
    factors = Factors()
    x = torch.randn(200, 2) @ factors.weight + factors.scale * torch.randn(200, 3)
    svi = SVI(factors.model, factors.guide, Adam({"lr": 0.02}), Trace_ELBO())

    def gap():
        """To the evidence, per datum."""
        elbo = -sum(svi.evaluate_loss(x, None) for _ in range(20)) / 20
        return (factors.evidence(x).item() - elbo) / len(x)

    start = gap()
    for _ in range(150):
        svi.step(x, 50)
    assert start > 1.0
    assert -0.05 < gap() < 0.15


# Maximum likelihood


def test_density_estimation():
    """Full batches, always the same tensor, and nobody clears a cache."""
    first = torch.randn(300)
    x = torch.stack([first, first**2 - 1 + 0.3 * torch.randn(300)], dim=-1)
    flow = small_flow(2)
    flow_dist = dist.TransformedDistribution(base(2), [flow])
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss = -flow_dist.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    normal = dist.MultivariateNormal(x.mean(0), x.T.cov())
    assert loss < -normal.log_prob(x).mean() - 0.5
    sample = flow_dist.sample((1000,))
    curvature = (sample[:, 0] ** 2 * sample[:, 1]).mean() - (sample[:, 0] ** 2).mean() * sample[:, 1].mean()
    assert curvature > 0.5  # zero for anything symmetric
