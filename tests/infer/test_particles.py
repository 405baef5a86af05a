# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.util import get_rng_state

from pyro_hollow.infer.particles import check_independence, check_observed

DESIGN = torch.arange(12.0, dtype=torch.float64).reshape(4, 3).cos()


def coefficients():
    return pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


def regression(loc):
    def model():
        w = coefficients()
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(loc(w), 1.0), obs=torch.ones(4))

    return model


def factor(term):
    def model():
        pyro.factor("y", term(coefficients()))

    return model


def two_particles(nesting, **latents):
    """Values as a plate of particles at dimension -1 - nesting makes them, from the shapes of batch and event."""
    torch.manual_seed(1)
    return {
        name: torch.randn(2, *(1,) * (nesting - len(batch)), *batch, *event) for name, (batch, event) in latents.items()
    }


MIXED = {
    "matrix product": (regression(lambda w: w @ DESIGN.T), 1),
    "sum": (factor(lambda w: -(w**4).sum()), 0),
    "mean": (factor(lambda w: -(w**2).mean() + w[..., 0]), 0),
    "centred": (factor(lambda w: -((w - w.mean(0)) ** 2).sum(-1)), 0),
}
SEPARATE = {
    "sum of one dimension": (regression(lambda w: (w * DESIGN).sum(-1)), 1),
    "scalar product": (regression(lambda w: torch.linalg.vecdot(w, DESIGN)), 1),
    "last index": (factor(lambda w: w[..., 0]), 0),
}


@pytest.mark.parametrize("model, nesting", MIXED.values(), ids=MIXED)
def test_models_that_mix_particles_are_refused(model, nesting):
    with pytest.raises(ValueError, match="model must treat samples independently, .* site 'y' .* use vectorize=False"):
        check_independence(model, (), {}, two_particles(nesting, w=((), (3,))), nesting)


@pytest.mark.parametrize("model, nesting", SEPARATE.values(), ids=SEPARATE)
def test_models_that_keep_particles_apart_pass(model, nesting):
    check_independence(model, (), {}, two_particles(nesting, w=((), (3,))), nesting)


def test_the_message_names_both_densities_and_the_remedy():
    values = two_particles(0, w=((), (3,)))
    both, one = (f"{-(w**4).sum().item():.6g}" for w in (values["w"], values["w"][0]))
    with pytest.raises(ValueError, match=f"is {both} for one next to another, and {one} .*vectorize_particles=False$"):
        check_independence(factor(lambda w: -(w**4).sum()), (), {}, values, 0, "vectorize_particles=False")


def nested():
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("columns", 2, dim=-2):
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4, dim=-1):
            local = pyro.sample("local", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(local.sum(-1) + offset, scale), obs=torch.ones(2, 4))


@pytest.mark.parametrize("nesting", [2, 3])
def test_sites_get_the_shapes_that_they_have_alone(nesting):
    values = two_particles(nesting, scale=((), ()), offset=((2, 1), ()), local=((2, 4), (3,)))
    check_independence(nested, (), {}, values | {"scale": values["scale"].exp()}, nesting)


def test_particles_within_other_handlers_leave_them_as_they_are():
    """A guide is called within a trace, a plate of particles and perhaps the enumeration of TraceEnum_ELBO."""
    model, nesting = SEPARATE["sum of one dimension"]
    values = two_particles(nesting, w=((), (3,)))
    with poutine.trace() as trace, pyro.plate("num_particles_vectorized", 2, dim=-2):
        check_independence(model, (), {}, values, nesting)
        assert pyro.sample("z", dist.Normal(0.0, 1.0)).shape == (2, 1)
        with pytest.raises(ValueError, match="samples independently"):
            check_independence(MIXED["matrix product"][0], (), {}, values, nesting)
    assert set(trace.trace.nodes) == {"num_particles_vectorized", "z"}


def random_model():
    """Draws more than the given sites, as a model with dropout does."""
    w = coefficients()
    pyro.factor("y", -((w * torch.randn(3)) ** 2).sum(-1))


def subsampling():
    w = coefficients()
    with pyro.plate("data", 4, subsample_size=2) as index:
        pyro.sample("y", dist.Normal((w * DESIGN[index]).sum(-1), 0.01), obs=torch.arange(4.0)[index])


def without_density(value):
    def model():
        w = coefficients().sum()
        pyro.sample("y", dist.Delta(w, log_density=value, validate_args=False), obs=w)

    return model


@pytest.mark.parametrize(
    "model, nesting",
    [(random_model, 0), (subsampling, 1), (without_density(-math.inf), 0), (without_density(math.nan), 0)],
    ids=["random", "subsampled", "impossible", "nan"],
)
def test_models_that_cannot_be_judged_pass(model, nesting):
    for seed in range(5):
        pyro.set_rng_seed(seed)
        check_independence(model, (), {}, two_particles(nesting, w=((), (3,))), nesting)


def test_rounding_in_float32_is_not_taken_for_mixing():
    """A density so narrow that the order of a sum changes it: the same for each order alone."""
    torch.set_default_dtype(torch.float32)
    design = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 1e4

    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([300]).to_event(1))
        with pyro.plate("data", 50):
            product = (design @ w.unsqueeze(-1)).squeeze(-1) if w.dim() == 1 else (w * design).flip(-1).sum(-1)
            pyro.sample("y", dist.Normal(product, 1e-3), obs=torch.zeros(50))

    check_independence(model, (), {}, {"w": 1e-3 * torch.randn(2, 1, 300)}, 1)


def test_random_state_is_kept():
    values = two_particles(0, w=((), (3,)))
    before = get_rng_state()["torch"]
    check_independence(random_model, (), {}, values, 0)
    assert torch.equal(before, get_rng_state()["torch"])


@pytest.mark.parametrize("mixing", [False, True])
def test_enumerated_sites_are_held_fixed(mixing):
    @config_enumerate
    def model():
        locs = coefficients()
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Bernoulli(0.5)).long()
            loc = locs.sum() if mixing else torch.where(k == 0, locs[..., 0], locs[..., 1])
            pyro.sample("y", dist.Normal(loc, 0.1), obs=torch.ones(4))

    values = two_particles(1, w=((), (3,)))
    if mixing:
        with pytest.raises(ValueError, match="site 'y'"):
            check_independence(model, (), {}, values, 1)
    else:
        check_independence(model, (), {}, values, 1)


def test_draws_of_a_guide_can_be_checked():
    guide = AutoNormal(nested)
    with pyro.plate("num_particles_vectorized", 2, dim=-3):
        values = guide()
    check_independence(nested, (), {}, values, 2)


# Observed values


def observing(value, mask=None, how="plain"):
    with pyro.plate("data", len(value)):
        if how == "event":
            fn = dist.Normal(torch.zeros(2), 1.0).mask(mask.unsqueeze(-1)).to_event(1)
            pyro.sample("y", fn, obs=torch.stack([torch.ones_like(value), value], -1))
        elif how == "obs_mask":
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=value, obs_mask=mask)
        elif how == ".mask()":
            pyro.sample("y", dist.Normal(0.0, 1.0).mask(mask), obs=value)
        else:
            with poutine.mask(mask=True if mask is None else mask):
                pyro.sample("y", dist.Normal(0.0, 1.0), obs=value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_observed_values_that_are_not_finite_are_named(value):
    trace = poutine.trace(observing).get_trace(torch.tensor([0.0, 1.0, value, value]))
    message = rf"observed value of site 'y' is {value} at index \(2,\) \(2 of 4 elements are not finite\).* mask them"
    with pytest.raises(ValueError, match=message):
        check_observed(trace)


@pytest.fixture
def without_validation():
    """With it Pyro refuses to evaluate a nan, masked or not."""
    with pyro.validation_enabled(False):
        yield


@pytest.mark.parametrize("how", ["poutine.mask", ".mask()", "obs_mask", "event"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_masked_observations_may_be_missing(value, how, without_validation):
    data, mask = torch.tensor([0.0, value, value]), torch.tensor([True, False, False])
    check_observed(poutine.trace(observing).get_trace(data, mask, how))
    name, index = ("y_observed" if how == "obs_mask" else "y"), r"1, 1" if how == "event" else "1,"
    with pytest.raises(ValueError, match=rf"observed value of site '{name}' is {value} at index \({index}\)"):
        check_observed(poutine.trace(observing).get_trace(data, torch.tensor([True, True, False]), how))


def test_observations_next_to_particles_are_checked():
    data = torch.tensor([0.0, math.inf])
    trace = poutine.trace(pyro.plate("particles", 5, dim=-2)(observing)).get_trace(data)
    with pytest.raises(ValueError, match=r"is inf at index \(1,\)"):
        check_observed(trace)


def test_other_sites_may_have_any_value():
    def model():
        pyro.deterministic("ratio", torch.tensor([1.0, math.inf]))
        pyro.factor("factor", torch.tensor(0.5))
        pyro.sample("count", dist.Poisson(3.0), obs=torch.tensor(2))
        pyro.sample("validated", dist.Normal(0.0, 1.0, validate_args=True), obs=torch.tensor(0.0))

    check_observed(poutine.trace(model).get_trace())


def test_values_that_a_distribution_validates_are_named():
    def model():
        pyro.sample("y", dist.Gamma(1.0, 1.0, validate_args=True), obs=torch.tensor([math.nan]))

    with pytest.raises(ValueError, match="observed value of site 'y' is nan"):
        check_observed(poutine.trace(model).get_trace())
