# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy
import math

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
        T.affine_autoregressive(DIM, [8]), hollow_cnf(DIM, solver=FINE), T.AffineTransform(1.0, torch.tensor(-2.0))
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


class Plain(T.Transform):
    """A transform without a score of its own."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform
        self.domain, self.codomain, self.bijective = transform.domain, transform.codomain, True
        self._call, self.log_abs_det_jacobian = transform, transform.log_abs_det_jacobian


def conditioned(make, *args, **kwargs):
    return lambda: make(DIM, CONTEXT, *args, **kwargs).condition(torch.randn(BATCH, CONTEXT))


def hollow():
    return hollow_cnf(DIM, solver=FINE if torch.get_default_dtype() == torch.float64 else Solver())


#: Some have no inverse; Sylvester flows are scored at the output of their latest call alone.
TRANSFORMS = {
    "hollow": hollow,
    "hollow, differentiated": lambda: Plain(hollow()),
    "composed": lambda: T.ComposeTransform([T.ComposeTransform([hollow()]), T.TanhTransform()]),
    "planar": conditioned(T.conditional_planar, [8]),
    "Sylvester": conditioned(conditional_sylvester),
    "Householder": conditioned(conditional_sylvester, kind="householder"),
    "neural": lambda: T.neural_autoregressive(DIM, [8]),
    "elementwise": lambda: T.ELUTransform(),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("name", TRANSFORMS)
def test_score_by_brute_force(name, dtype):
    """That of the base, less that of the log-determinant of the whole Jacobian, pulled to the image."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    transform = TRANSFORMS[name]()
    x = torch.randn(BATCH, DIM)

    def jacobian(x):
        return torch.autograd.functional.jacobian(lambda x: transform(x).sum(0), x, create_graph=True).transpose(0, 1)

    fixed = x.clone().requires_grad_()
    pulled = -fixed - torch.autograd.grad(jacobian(fixed).slogdet().logabsdet.sum(), fixed)[0]
    expected = torch.linalg.solve(jacobian(fixed).mT, pulled.unsqueeze(-1)).squeeze(-1)
    base = dist.Normal(torch.zeros(BATCH, DIM), 1.0).to_event(1)
    q = PathGradientDistribution(base, [transform])
    q._map(x)
    score = q._latest[3]
    assert score.dtype == dtype and not score.requires_grad
    tolerance = 1e-5 if dtype == torch.float64 else 1e-3
    assert_close(score, expected, rtol=tolerance, atol=tolerance)


def test_expectation_is_that_of_the_total_gradient():
    torch.manual_seed(0)
    posterior = Posterior(T.conditional_affine_autoregressive(DIM, CONTEXT, [8]))
    means, errors = [], []
    for family in (PathGradientDistribution, dist.TransformedDistribution):
        parts = []
        for _ in range(40):
            q = posterior(family)
            x = q.rsample((500,))
            parts.append(gradients((q.log_prob(x) + x.square().sum(-1)).mean(), posterior))
        parts = torch.stack(parts)
        means.append(parts.mean(0))
        errors.append(parts.std(0) / math.sqrt(len(parts)))
    error = (errors[0].square() + errors[1].square()).sqrt()
    assert (error > 1e-5).sum() > 20
    assert ((means[0] - means[1]).abs() <= 5 * error + 1e-8).all()


def test_composed_hollow_flows_take_one_solve_each():
    flows = [hollow_cnf(DIM, solver=FINE) for _ in range(2)]
    counts = []
    for transforms in (flows, [T.ComposeTransform(flows)]):
        torch.manual_seed(0)
        PathGradientDistribution(dist.Normal(torch.zeros(DIM), 1.0).to_event(1), transforms).rsample((5,))
        counts.append([flow.last_solve.nfe for flow in flows])
    assert counts[0] == counts[1]


def test_a_sample_that_was_edited_is_like_any_other_value():
    posterior = make("flow")
    q = posterior()
    x = q.rsample()
    before = q.log_prob(x)
    with torch.no_grad():
        x.mul_(3.0)
    assert_close(q.log_prob(x), posterior(dist.TransformedDistribution).log_prob(x))
    assert (q.log_prob(x) - before).abs().max() > 1.0


def test_copies_forget_the_latest_sample():
    q = PathGradientDistribution(dist.Normal(torch.zeros(DIM), 1.0).to_event(1), [*make("flow").flows])
    x = q.rsample()
    copied = copy.deepcopy(q)
    assert copied._latest is None
    assert_close(copied.log_prob(x), q.log_prob(x), rtol=1e-6, atol=1e-6)


def test_samples_that_are_no_vectors_are_refused():
    with pytest.raises(ValueError, match=r"vectors.*\(2, 3\)"):
        PathGradientDistribution(dist.Normal(torch.zeros(2, 3), 1.0).to_event(2), []).rsample()


@pytest.mark.parametrize(
    "transform", (T.ReshapeTransform((6,), (2, 3)), T.StickBreakingTransform()), ids=("reshape", "stick-breaking")
)
def test_transforms_that_change_the_shape_are_refused(transform):
    transforms = [transform] if len(transform.forward_shape((6,))) == 1 else [transform, transform.inv]
    q = PathGradientDistribution(dist.Normal(torch.zeros(6), 1.0).to_event(1), transforms)
    with pytest.raises(ValueError, match=type(transform).__name__):
        q.rsample()


@pytest.mark.parametrize("fixed", (True, False))
def test_a_base_without_a_score_is_refused(fixed):
    high = torch.ones(DIM, requires_grad=not fixed)
    q = PathGradientDistribution(dist.Uniform(torch.zeros(DIM), high).to_event(1), [])
    with pytest.raises(ValueError, match=r"base_distribution must have a score.*has none"):
        q.rsample()
