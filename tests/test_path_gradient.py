# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.testing import assert_close

from pyro_hollow import PathGradientDistribution, Solver, conditional_hollow_cnf, hollow_cnf
from pyro_hollow.transforms import conditional_sylvester

BATCH, DIM, CONTEXT = 4, 3, 2
FINE = Solver(rtol=1e-7, atol=1e-7)


class Posterior(nn.Module):
    """A base with parameters of its own and flows after it."""

    def __init__(self, *flows, batch_shape=(BATCH,)):
        super().__init__()
        self.loc = nn.Parameter(torch.randn(*batch_shape, DIM))
        self.log_scale = nn.Parameter(0.3 * torch.randn(*batch_shape, DIM))
        self.context = nn.Parameter(torch.randn(*batch_shape, CONTEXT))
        self.flows = flows
        self.modules_ = nn.ModuleList(flow for flow in flows if isinstance(flow, nn.Module))
        with torch.no_grad():  # fresh flows are close to the identity
            for parameter in self.modules_.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))

    def forward(self, family=PathGradientDistribution):
        flows = [flow.condition(self.context) if hasattr(flow, "condition") else flow for flow in self.flows]
        return family(dist.Normal(self.loc, self.log_scale.exp()).to_event(1), flows)


POSTERIORS = {
    "no flow": lambda: Posterior(),
    "flow": lambda: Posterior(hollow_cnf(DIM, solver=FINE)),
    "two flows": lambda: Posterior(*(hollow_cnf(DIM, solver=FINE) for _ in range(2))),
    "context": lambda: Posterior(conditional_hollow_cnf(DIM, CONTEXT, solver=FINE)),
    "no batch": lambda: Posterior(hollow_cnf(DIM, solver=FINE), batch_shape=()),
    "spline": lambda: Posterior(T.spline_autoregressive(DIM, [8], bound=9.0)),
    "IAF and context": lambda: Posterior(T.conditional_affine_autoregressive(DIM, CONTEXT, [8])),
    "IAF, hollow and elementwise": lambda: Posterior(
        T.affine_autoregressive(DIM, [8]), hollow_cnf(DIM, solver=FINE), T.LeakyReLUTransform()
    ),
    "elementwise, no batch": lambda: Posterior(T.AffineTransform(1.0, torch.tensor([2.0, -0.5, 1.5])), batch_shape=()),
}
every_posterior = pytest.mark.parametrize("name", POSTERIORS)


def make(name):
    torch.manual_seed(0)
    return POSTERIORS[name]()


def gradients(value, module):
    values = torch.autograd.grad(value, list(module.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in values])


@every_posterior
@pytest.mark.parametrize("shape", ((), (2,)), ids=str)
def test_density_depends_on_parameters_through_the_sample_alone(name, shape):
    posterior = make(name)
    frozen = copy.deepcopy(posterior).requires_grad_(False)
    torch.manual_seed(1)
    q = posterior()
    x = q.rsample(shape)
    log_prob = q.log_prob(x)
    expected = frozen(dist.TransformedDistribution).log_prob(x.clone())  # the clone has no history in any cache
    assert_close(log_prob, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(log_prob.shape)
    own = gradients((weights * log_prob).sum(), posterior)
    torch.manual_seed(1)
    again = posterior(dist.TransformedDistribution).rsample(shape)
    assert_close(x, again)
    score = torch.autograd.grad((weights * frozen(dist.TransformedDistribution).log_prob(x)).sum(), x)[0]
    assert_close(own, gradients((score * again).sum(), posterior), rtol=1e-5, atol=1e-5)
    # The total gradient is another.
    total = posterior(dist.TransformedDistribution)
    assert (own - gradients((weights * total.log_prob(total.rsample(shape))).sum(), posterior)).abs().max() > 1e-2


@every_posterior
def test_other_values_have_the_total_gradient(name):
    posterior = make(name)
    q, peer = posterior(), posterior(dist.TransformedDistribution)
    value = torch.randn(q.shape())
    for scored in (value, q.rsample().detach()):
        densities = [family.log_prob(scored) for family in (q, peer)]
        assert_close(*densities)
        assert_close(*(gradients(density.sum(), posterior) for density in densities))


@every_posterior
def test_without_gradients(name):
    posterior = make(name)
    samples = []
    for family in (PathGradientDistribution, dist.TransformedDistribution):
        torch.manual_seed(1)
        q = posterior(family)
        for draw in (q.sample, torch.no_grad()(q.rsample)):
            x = draw((2,))
            assert not x.requires_grad
            samples.append((x, q.log_prob(x)))
    assert_close(samples[:2], samples[2:])


def test_an_earlier_sample_is_like_any_other_value():
    posterior = make("flow")
    q = posterior()
    first, second = q.rsample(), q.rsample()
    expected = posterior(dist.TransformedDistribution).log_prob(first)
    assert_close(gradients(q.log_prob(first).sum(), posterior), gradients(expected.sum(), posterior))
    assert not torch.equal(q.log_prob(second), q.log_prob(first))


def test_expand():
    posterior = Posterior(hollow_cnf(DIM, solver=FINE), batch_shape=())
    q = posterior()
    q.rsample()
    wide = q.expand((5, 2))
    assert isinstance(wide, PathGradientDistribution) and wide.batch_shape == (5, 2)
    x = wide.rsample()
    assert x.shape == (5, 2, DIM)
    assert_close(wide.log_prob(x), q.log_prob(x.clone()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vectorize", (False, True), ids=("loop", "vectorised"))
def test_gradient_of_the_elbo_vanishes_where_the_guide_is_exact(vectorize):
    loc, scale = torch.randn(BATCH, DIM), torch.rand(BATCH, DIM) + 0.5

    def guide_with(family):
        posterior = Posterior(batch_shape=(BATCH,))
        with torch.no_grad():
            posterior.loc.copy_(loc)
            posterior.log_scale.copy_(scale.log())

        def guide():
            pyro.module("posterior", posterior)
            with pyro.plate("data", BATCH, dim=-1):
                pyro.sample("z", posterior(family))

        return posterior, guide

    def model():
        with pyro.plate("data", BATCH, dim=-1):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
    for family in (PathGradientDistribution, dist.TransformedDistribution):
        posterior, guide = guide_with(family)
        elbo.differentiable_loss(model, guide).backward()
        largest = max(parameter.grad.abs().max() for parameter in (posterior.loc, posterior.log_scale))
        assert (largest < 1e-10) == (family is PathGradientDistribution)


def test_float32():
    torch.set_default_dtype(torch.float32)
    posterior = make("context")
    posterior.flows[0].solver = Solver()
    q = posterior()
    x = q.rsample()
    log_prob = q.log_prob(x)
    assert x.dtype == log_prob.dtype == torch.float32
    assert gradients(log_prob.sum(), posterior).isfinite().all()


@pytest.mark.parametrize("shape", ((), (2,)), ids=str)
def test_hollow_flow_by_automatic_differentiation(shape):
    class Plain(T.ComposeTransform):
        """Without a score of its own."""

    torch.manual_seed(0)
    flow, x = hollow_cnf(DIM, solver=FINE), torch.randn(*shape, BATCH, DIM)
    base = dist.Normal(torch.zeros(BATCH, DIM), 1.0).to_event(1)
    own, plain = (PathGradientDistribution(base, [transform]) for transform in (flow, Plain([flow])))
    samples = [(q._carry(x), q._latest) for q in (own, plain)]
    assert_close(*samples, rtol=1e-5, atol=1e-5)


def test_flows_without_an_inverse():
    """Pyro's planar flow and Sylvester flows are scored at the output of their latest call."""
    posterior = Posterior(T.conditional_planar(DIM, CONTEXT, [8]), conditional_sylvester(DIM, CONTEXT))
    q = posterior()
    x = q.rsample()
    assert_close(q.log_prob(x), dist.TransformedDistribution.log_prob(q, x))


def test_samples_that_are_no_vectors_are_refused():
    with pytest.raises(ValueError, match=r"vectors.*\(2, 3\)"):
        PathGradientDistribution(dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), []).rsample()
