# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import nn
from torch.testing import assert_close
from transform_checks import QUICK, base

from pyro_hollow import conditional_hollow_cnf, free_form_cnf, hollow_cnf, standardized
from pyro_hollow.train import ELBO, FlowMatching, MaximumLikelihood, train


def fit(objective, parameters, **kwargs):
    return train(objective, parameters, **{"progress": False, **kwargs})


# Maximum likelihood


def test_maximum_likelihood_reaches_the_entropy():
    x = 3 + torch.randn(500, 2) * torch.tensor([0.2, 5.0])
    loc, log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    objective = MaximumLikelihood(lambda: dist.Normal(loc, log_scale.exp()).to_event(1), x)
    training = fit(objective, [loc, log_scale], lr=0.1, num_steps=800)
    scale = x.std(0, correction=0)
    assert_close(loc.detach(), x.mean(0), rtol=1e-4, atol=1e-4)
    assert_close(log_scale.detach().exp(), scale, rtol=1e-4, atol=0)
    entropy = (0.5 + 0.5 * math.log(2 * math.pi) + scale.log()).sum()
    assert_close(training.losses[-1], entropy, rtol=1e-7, atol=0)


def test_maximum_likelihood_with_context_is_least_squares():
    c = torch.randn(100, 3)
    x = c @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.1 * torch.randn(100, 1)
    weights = nn.Parameter(torch.zeros(3, 1))
    objective = MaximumLikelihood(lambda c: dist.Normal(c @ weights, 1.0).to_event(1), x, context=c)
    fit(objective, [weights], lr=0.1, num_steps=600)
    assert_close(weights.detach(), torch.linalg.lstsq(c, x).solution, rtol=1e-4, atol=1e-5)


def test_maximum_likelihood_of_flows():
    x, c = torch.randn(50, 2), torch.randn(50, 1)
    flow, conditional = hollow_cnf(2, [4], solver=QUICK), conditional_hollow_cnf(2, 1, [4], solver=QUICK)
    flow_dist = dist.TransformedDistribution(base(2), [flow])
    assert_close(MaximumLikelihood(flow_dist, x)(), -flow_dist.log_prob(x).mean())
    waiting = dist.ConditionalTransformedDistribution(base(2), [conditional])
    loss = MaximumLikelihood(waiting, x, context=c)()
    assert_close(loss, -waiting.condition(c).log_prob(x).mean())
    loss.backward()
    assert all(parameter.grad is not None for parameter in conditional.parameters())


def test_minibatches_keep_data_and_context_together():
    c = torch.arange(1000.0)
    x = c.unsqueeze(-1) * 2
    seen = []

    def make(context):
        seen.append(context)
        return dist.Normal(2 * context.unsqueeze(-1), 1.0).to_event(1)

    losses = [
        MaximumLikelihood(make, x, context=c, batch_size=10, generator=torch.Generator().manual_seed(seed))()
        for seed in (0, 0, 1)
    ]
    assert_close(torch.stack(losses), torch.full((3,), 0.5 * math.log(2 * math.pi)))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2]) and seen[0].shape == (10,)
    MaximumLikelihood(make, x, context=c, batch_size=2000)()
    assert torch.equal(seen[-1], c)


# Flow matching

M, S = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])


class Exact:
    """A flow with the known velocity from the standard normal distribution to that of mean M and deviation S."""

    def __init__(self, time=1.0, error=0.0):
        self.time, self.error = time, error

    def velocity(self, t, x):
        s = (t / self.time).unsqueeze(-1)
        variance = (1 - s) ** 2 + (s * S) ** 2
        slope = (s * S**2 - (1 - s)) / variance
        return (M + slope * (x - s * M) + self.error * torch.sin(3 * x)) / self.time


def test_known_velocity_of_gaussians_is_the_minimum():
    x = M + S * torch.randn(100_000, 2)
    s = torch.linspace(0, 1, 10_001).unsqueeze(-1)
    least = (1 + S**2 - (s * S**2 - (1 - s)) ** 2 / ((1 - s) ** 2 + (s * S) ** 2)).mean(0).sum()
    for time in (1.0, 2.5):
        loss = FlowMatching(Exact(time), x)()
        assert_close(loss, least, rtol=0.02, atol=0)
    off = FlowMatching(Exact(error=0.3), x)()
    assert off > least + 0.05


def test_flow_matching_of_gaussians():
    x = M + S * torch.randn(5000, 2)
    flow = hollow_cnf(2, [16], time=2.0)
    fit(FlowMatching(flow, x, batch_size=256), flow.parameters(), num_steps=1000, lr=0.02)
    t = 2 * torch.rand(1000)
    points = (1 - t / 2).unsqueeze(-1) * torch.randn(1000, 2) + (t / 2).unsqueeze(-1) * (M + S * torch.randn(1000, 2))
    exact = Exact(2.0).velocity(t, points)
    with torch.no_grad():
        assert (flow.velocity(t, points) - exact).square().mean().sqrt() < 0.1 * exact.square().mean().sqrt()
        excess = dist.Normal(M, S).to_event(1).log_prob(x) - dist.TransformedDistribution(base(2), [flow]).log_prob(x)
    assert excess.mean() < 0.03


def two_moons(n):
    angle, upper = math.pi * torch.rand(n), torch.rand(n) < 0.5
    moon = torch.stack([torch.cos(angle), torch.sin(angle)], -1)
    return torch.where(upper.unsqueeze(-1), moon, torch.tensor([1.0, 0.5]) - moon) + 0.1 * torch.randn(n, 2)


def test_flow_matching_of_two_moons_gains_likelihood():
    x, test = two_moons(2000), two_moons(1000)
    flow = standardized(hollow_cnf(2, [16, 16], solver=QUICK), x)
    flow_dist = dist.TransformedDistribution(base(2), [flow])
    objective, likelihood = FlowMatching(flow, x, batch_size=256), MaximumLikelihood(flow_dist, x)
    with torch.no_grad():
        before = likelihood.loss(test)
    fit(objective, flow.parameters(), num_steps=1000, lr=0.02)
    with torch.no_grad():
        after = likelihood.loss(test)
    assert after < before - 0.5


def test_flow_matching_with_context():
    c = torch.randn(4000, 1)
    x = 3 * c + 0.5 * torch.randn(4000, 1)
    flow = standardized(conditional_hollow_cnf(1, 1, [16], solver=QUICK), x, c)
    fit(FlowMatching(flow, x, context=c, batch_size=256), flow.parameters(), num_steps=600, lr=0.02)
    with torch.no_grad():
        found = dist.ConditionalTransformedDistribution(base(1), [flow]).condition(c).log_prob(x).mean()
    assert found > dist.Normal(3 * c, 0.5).log_prob(x).mean() - 0.1


def test_flow_matching_does_not_depend_on_units():
    x, flow = torch.randn(100, 2) * M + S, hollow_cnf(2, [4])
    for data in (x, 1e3 * x - 7):
        torch.manual_seed(3)
        loss = FlowMatching(standardized(flow, data), data, base=base(2))()
        torch.manual_seed(3)
        assert_close(loss, FlowMatching(standardized(flow, x), x, base=base(2))())


def test_flow_matching_of_free_forms():
    flow, x = free_form_cnf(2, [8]), torch.randn(30, 2)
    t = torch.rand(30)
    one_by_one = torch.stack([flow.velocity(a, b) for a, b in zip(t, x, strict=True)])
    assert_close(flow.velocity(t, x), one_by_one)
    FlowMatching(flow, x)().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())


# ELBO


def model(x):
    z = pyro.sample("z", dist.Normal(pyro.param("prior", torch.tensor(0.0)), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_elbo_trains_model_and_guide():
    """The posterior is normal, and the prior's mean that maximises the evidence is the mean of the data."""
    x = 2 + torch.randn(20)
    objective = ELBO(
        model, AutoDiagonalNormal(model), x, loss=Trace_ELBO(num_particles=16, vectorize_particles=True)
    )  # fmt: skip
    assert len(objective.parameters()) == 3
    fit(objective, objective.parameters(), lr=0.05, num_steps=400)
    assert_close(pyro.param("prior").detach(), x.mean(), atol=0.02, rtol=0)
    assert_close(pyro.param("AutoDiagonalNormal.loc").detach(), x.mean().expand(1), atol=0.02, rtol=0)
    assert_close(pyro.param("AutoDiagonalNormal.scale").detach(), torch.tensor([21**-0.5]), rtol=0.05, atol=0)


def test_elbo_by_enumeration():
    @pyro.infer.config_enumerate
    def mixture(x):
        weight = pyro.param("weight", torch.tensor(0.5), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(weight))
            pyro.sample("x", dist.Normal(6 * k, 1.0), obs=x)

    x = torch.cat([torch.randn(30), 6 + torch.randn(10)])
    objective = ELBO(mixture, lambda x: None, x, loss=TraceEnum_ELBO())
    fit(objective, objective.parameters(), lr=0.1, num_steps=300)
    assert_close(pyro.param("weight").detach(), torch.tensor(0.25), atol=0.01, rtol=0)


def test_elbo_refuses_a_parameter_that_it_would_not_train():
    late = [False]

    def model():
        scale = pyro.param("late", torch.tensor(1.0)) if late[0] else 1.0
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale), obs=torch.tensor(1.0))

    objective = ELBO(model, lambda: None)
    objective()
    late[0] = True
    with pytest.raises(RuntimeError, match="parameter 'late' is new"):
        objective()


X = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaximumLikelihood(base(2), X[:0]), "data must hold at least one sample"),
        (lambda: MaximumLikelihood(base(2), X, batch_size=0), "batch_size must be at least 1, but got 0"),
        (lambda: MaximumLikelihood(base(2), X, context=X[:3]), "context must have a row for each of the 5 samples"),
        (lambda: MaximumLikelihood(dist.Normal(0.0, 1.0), X)(), r"shape \(5,\), but gave \(5, 2\): its event shape"),
        (lambda: FlowMatching(hollow_cnf(2), X[0]), r"data must have shape \(n, d\), but got \(2,\)"),
        (lambda: FlowMatching(hollow_cnf(2), X, base=dist.Normal(0.0, 1.0)), "base must have batch shape"),
        (lambda: FlowMatching(hollow_cnf(2), X, context=X), "context is given, but the flow takes none"),
        (lambda: FlowMatching(conditional_hollow_cnf(2, 1), X), "context is missing"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_flow_without_a_vector_field():
    with pytest.raises(TypeError, match="must be a continuous flow with a method velocity, but got Planar"):
        FlowMatching(dist.transforms.planar(2), X)()
