# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0


import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.distributions import biject_to
from torch.testing import assert_close

from pyro_hollow.infer import diagnose
from pyro_hollow.infer.modes import LogJoint

RESTARTS = 24


def product():
    """Two modes, at a = b = 1.984 and at their negatives."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.factor("c", dist.Normal(4.0, 0.5).log_prob(a * b))


def one_branch():
    a = pyro.sample("a", dist.Normal(-2.2, 0.5))
    pyro.sample("b", dist.Normal(4.0 / a, 0.3))


def both_branches():
    sign = 2 * pyro.sample("sign", dist.Bernoulli(0.5), infer={"is_auxiliary": True}) - 1
    a = pyro.sample("a", dist.Normal(2.2 * sign, 0.5))
    pyro.sample("b", dist.Normal(4.0 / a, 0.3))


def test_missed_mode_is_found_and_not_trusted():
    result = diagnose(product, one_branch, restarts=RESTARTS)
    assert result.restarts == RESTARTS and result.num_modes == 2
    (mode,) = result.missed_modes
    assert_close(mode["a"], torch.tensor(1.9843), rtol=0, atol=1e-2)
    assert_close(mode["b"], torch.tensor(1.9843), rtol=0, atol=1e-2)
    assert result.missed_mass == pytest.approx(0.5, abs=0.1)
    assert not result.reliable
    assert "the guide has almost no draws near 1 of 2 modes, which hold about 5" in str(result)


def test_missed_mode_of_positive_sites_in_plates_is_told_in_the_support():
    """The mixture's modes are at 1 and at 20."""

    def model():
        with pyro.plate("plate", 2, dim=-2):
            pyro.sample("other", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 3.0))
        far = dist.Normal(torch.tensor([0.0, 3.0]), 0.1).log_prob(scale.log().unsqueeze(-1)).logsumexp(-1)
        pyro.factor("far", far)

    def guide():
        with pyro.plate("plate", 2, dim=-2):
            pyro.sample("other", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("scale", dist.LogNormal(0.0, 0.1))

    result = diagnose(model, guide, num_samples=1000, restarts=RESTARTS)
    (mode,) = result.missed_modes
    assert mode["other"].shape == (2, 1, 3)
    assert mode["scale"].log().item() == pytest.approx(3.0, abs=0.02)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


def gaussian():
    with pyro.plate("plate", 20):
        pyro.sample("z", dist.Normal(torch.arange(20.0), 1.0))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("plate", 2):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def constrained():
    pyro.sample("rate", dist.Gamma(3.0, 2.0))
    pyro.sample("share", dist.Beta(2.0, 5.0))
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))


MODELS = {"banana": banana, "Gaussian": gaussian, "funnel": funnel, "constrained": constrained}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_no_missed_mode_where_there_is_one_at_most(model):
    for guide in (model, AutoNormal(model, init_scale=0.5)):
        result = diagnose(model, guide, num_samples=500, restarts=8)
        assert not result.missed_modes and result.num_modes <= 1


def test_no_missed_mode_where_both_have_draws():
    result = diagnose(product, both_branches, restarts=RESTARTS)
    assert result.num_modes == 2 and not result.missed_modes and result.missed_mass == 0


def test_text_where_no_mode_exists():
    """The density of a scale is unbounded at 0."""

    def model():
        scale = pyro.sample("scale", dist.Gamma(0.5, 1.0).mask(False))
        pyro.factor("zero", -scale.log())

    result = diagnose(model, lambda: pyro.sample("scale", dist.Exponential(1.0)), num_samples=50, restarts=2)
    assert result.num_modes == 0


def test_log_joint_is_that_of_a_single_trace():
    trace = poutine.trace(constrained).get_trace()
    values = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    log_joint = LogJoint(constrained, (), {}, 0, values)
    points = log_joint.unconstrain(3, {name: value.expand(3, *value.shape) for name, value in values.items()})
    expected = trace.log_prob_sum()
    for name, value in values.items():
        transform = biject_to(trace.nodes[name]["fn"].support)
        point = transform.inv(value)
        expected = expected + transform.log_abs_det_jacobian(point, value)
    assert points.shape == (3, 4)
    assert_close(log_joint(points), expected.expand(3))
    for name, value in log_joint.constrain(points).items():
        assert_close(value, values[name].expand(3, *values[name].shape))
    numeric = torch.autograd.functional.hessian(lambda x: log_joint(x[None])[0], points[0])
    assert_close(log_joint.precision(points)[0], -numeric)


def test_rng_free_default_leaves_results_alone():
    results = []
    for restarts in (0, 4):
        pyro.set_rng_seed(0)
        results.append(diagnose(product, one_branch, num_samples=100, restarts=restarts))
    assert torch.equal(results[0].log_weights, results[1].log_weights)


# Errors


def test_discrete_latents_cannot_be_searched():
    model = guide = lambda: pyro.sample("k", dist.Bernoulli(0.5))
    with pytest.raises(ValueError, match="restarts must be 0 for a model with latents that are discrete.*'k'"):
        diagnose(model, guide, restarts=4)


def test_models_that_cannot_be_vectorised_cannot_be_searched():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("branch", z if z > 0 else -z)

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="restarts must be 0 for this model.*ambiguous"):
        diagnose(model, guide, num_samples=25, vectorize=False, restarts=4)


def test_models_that_mix_samples_cannot_be_searched():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("factor", -(z**4).sum())

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match="restarts must be 0 for this model.*together"):
        diagnose(model, guide, num_samples=25, vectorize=False, restarts=4)


def test_models_without_gradients_cannot_be_searched():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
        pyro.factor("step", -(z.detach() ** 2))

    with pytest.raises(ValueError, match="restarts must be 0 for this model.*grad"):
        diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=25, restarts=4)


def test_negative_restarts():
    with pytest.raises(ValueError, match="restarts must be at least 0, but got -1"):
        diagnose(product, one_branch, restarts=-1)
