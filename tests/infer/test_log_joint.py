# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Models with discrete sites that are marginalised, in the weights and in what ArviZ gets."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.optim import Adam
from torch.testing import assert_close
from transform_checks import QUICK

from pyro_hollow.infer import AutoHollowCNF, diagnose

pytest.importorskip("arviz")

X = torch.tensor([0.4, 1.6, -0.9, 2.1], dtype=torch.float64)
PROBS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
TRANSITION = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)


def components():
    with pyro.plate("components", 3):
        return pyro.sample("locs", dist.Normal(0.0, 2.0))


def pick(locs, k):
    """The location of each class, in a further plate, too."""
    return torch.where(k == 0, locs[..., 0:1], torch.where(k == 1, locs[..., 1:2], locs[..., 2:3]))


def mixture():
    locs = components()
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(pick(locs, k), 1.0), obs=X)


def two_observations():
    locs = components()
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(pick(locs, k), 1.0), obs=X)
        pyro.sample("y", dist.Normal(-pick(locs, k), 2.0), obs=X.flip(0))


def one_for_all():
    """Of the plate's elements no one is independent of the others."""
    locs = components()
    with pyro.plate("one", 1):
        k = pyro.sample("k", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
        loc = pick(locs, k)
    with pyro.plate("data", 4):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=X)


def nested():
    """A class of each row and one of each element; the latter depends on the former."""
    loc = pyro.sample("locs", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", 2, dim=-2):
        row = pyro.sample("row", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with pyro.plate("columns", 2, dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.2 + 0.5 * row), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc * (1 + k) + row, 1.0), obs=X.reshape(2, 2))


def chain():
    locs = components()
    with pyro.plate("one", 1):
        k = 0
        for t in pyro.markov(range(4)):
            probs = PROBS if t == 0 else TRANSITION[k]
            k = pyro.sample(f"k_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(pick(locs, k), 1.0), obs=X[t])


def scaled():
    locs = components()
    with pyro.plate("data", 4), poutine.scale(scale=2.5):
        k = pyro.sample("k", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(pick(locs, k), 1.0), obs=X)


def masked():
    locs = components()
    with pyro.plate("data", 4), poutine.mask(mask=torch.tensor([True, False, True, True])):
        k = pyro.sample("k", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(pick(locs, k), 1.0), obs=X)


MODELS = {fn.__name__: fn for fn in (mixture, two_observations, one_for_all, nested, chain, scaled, masked)}
WAYS = {"at once": {}, "in batches": {"batch_size": 7}, "loop": {"vectorize": False}}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def guide_of(model):
    def guide():
        if model is nested:
            pyro.sample("locs", dist.Normal(0.5, 1.0))
        else:
            with pyro.plate("components", 3):
                pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 0.5, 1.5]), 0.5))

    return guide


def guide_draws(result):
    return torch.from_numpy(result.posterior["guide"]["locs"].values)[0]


def log_guide(model, value):
    return poutine.trace(poutine.condition(guide_of(model), {"locs": value})).get_trace().log_prob_sum()


@every_way
@every_model
def test_enumerated_sites_are_marginalised_as_trace_enum_elbo_does(model, way):
    result = diagnose(model, guide_of(model), num_samples=25, **way)
    nesting = 2 if model is nested else 1
    for log_weight, value in zip(result.log_weights[::6], guide_draws(result)[::6], strict=True):

        def at(value=value):
            fn = dist.Delta(value)
            if model is nested:
                pyro.sample("locs", fn)
            else:
                with pyro.plate("components", 3):
                    pyro.sample("locs", fn)

        log_joint = -TraceEnum_ELBO(max_plate_nesting=nesting).loss(model, at)
        assert_close(log_weight, log_joint - log_guide(model, value))


SUPPORTS = {
    mixture: {"k": (3, 4)},
    two_observations: {"k": (3, 4)},
    one_for_all: {"k": (3, 1)},
    chain: {f"k_{t}": (3, 1) for t in range(4)},
}


@pytest.mark.parametrize("model", SUPPORTS, ids=lambda model: model.__name__)
def test_enumerated_sites_are_marginalised_as_by_a_sum_over_all_of_their_values(model):
    result = diagnose(model, guide_of(model), num_samples=25)
    supports = SUPPORTS[model]
    for log_weight, value in zip(result.log_weights[:2], guide_draws(result)[:2], strict=True):
        terms = []
        for values in itertools.product(*(range(size) for size, count in supports.values() for _ in range(count))):
            given, rest = {"locs": value}, list(values)
            for name, (_, count) in supports.items():
                given[name], rest = torch.tensor(rest[:count]), rest[count:]
            terms.append(poutine.trace(poutine.condition(model, given)).get_trace().log_prob_sum())
        assert_close(log_weight, torch.stack(terms).logsumexp(0) - log_guide(model, value))


def test_a_masked_class_counts_once():
    """Its probabilities must be summed, or each masked element would add the logarithm of the number of classes."""
    result = diagnose(masked, guide_of(masked), num_samples=25)
    value = guide_draws(result)[0]
    rows = (PROBS.log() + dist.Normal(value, 1.0).log_prob(X.unsqueeze(-1))).logsumexp(-1)[[0, 2, 3]]
    prior = dist.Normal(0.0, 2.0).log_prob(value).sum()
    assert_close(result.log_weights[0], prior + rows.sum() - log_guide(masked, value))


@pytest.mark.parametrize(
    "auto", [AutoNormal, lambda model: AutoHollowCNF(model, [8], warm_up=5, solver=QUICK)], ids=["normal", "flow"]
)
def test_guides_of_the_blocked_model_are_diagnosed(auto):
    """The way of Pyro's tutorials: a guide of all but the enumerated sites, trained by TraceEnum_ELBO."""
    guide = auto(poutine.block(mixture, hide=["k"]))
    elbo = TraceEnum_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(mixture, guide, Adam({"lr": 0.05}), elbo)
    for _ in range(10):
        svi.step()
    result = diagnose(mixture, guide, num_samples=2000)
    elbo.num_particles = 2000
    expected = -svi.evaluate_loss()
    assert result.elbo == pytest.approx(expected, abs=6 * result.elbo_error)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_class_of_the_guide_is_not_marginalised(way):
    @config_enumerate
    def model():
        switch = pyro.sample("switch", dist.Bernoulli(0.4))
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(PROBS))
            noise = pyro.sample("noise", dist.Normal(k.to(X), 0.5))
            pyro.sample("x", dist.Normal(noise * (1 + switch), 1.0), obs=X)

    def guide():
        pyro.sample("switch", dist.Bernoulli(0.7))
        with pyro.plate("data", 4):
            pyro.sample("noise", dist.Normal(X / 2, 1.0))

    result = diagnose(model, guide, num_samples=25, **way)
    switch, noise = (torch.from_numpy(result.posterior["guide"][name].values)[0] for name in ("switch", "noise"))
    classes = (PROBS.log() + dist.Normal(torch.arange(3.0), 0.5).log_prob(noise.unsqueeze(-1))).logsumexp(-1)
    likelihood = dist.Normal(noise * (1 + switch.unsqueeze(-1)), 1.0).log_prob(X)
    log_joint = dist.Bernoulli(0.4).log_prob(switch) + (classes + likelihood).sum(-1)
    log_guide = dist.Bernoulli(0.7).log_prob(switch) + dist.Normal(X / 2, 1.0).log_prob(noise).sum(-1)
    assert_close(result.log_weights, log_joint - log_guide)


# Log-likelihoods


def densities(result, name="x"):
    return torch.from_numpy(result.posterior["log_likelihood"][name].values).flatten(0, 1)


def posterior_draws(result):
    return torch.from_numpy(result.posterior["posterior"]["locs"].values).flatten(0, 1)


@every_way
def test_log_likelihoods_are_those_of_the_mixture(way):
    result = diagnose(two_observations, guide_of(two_observations), num_samples=40, **way)
    locs = posterior_draws(result).unsqueeze(-2)
    for name, loc, scale, data in [("x", locs, 1.0, X), ("y", -locs, 2.0, X.flip(0))]:
        expected = (PROBS.log() + dist.Normal(loc, scale).log_prob(data.unsqueeze(-1))).logsumexp(-1)
        assert_close(densities(result, name), expected)


def test_log_likelihoods_of_classes_that_depend_on_others():
    def model():
        loc = pyro.sample("locs", dist.Normal(0.0, 2.0))
        with pyro.plate("data", 4):
            parent = pyro.sample("parent", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            k = pyro.sample("k", dist.Bernoulli(0.2 + 0.5 * parent), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc * (1 + k), 1.0), obs=X)

    result = diagnose(model, guide_of(nested), num_samples=40)
    one, two = (dist.Normal(posterior_draws(result).unsqueeze(-1) * n, 1.0).log_prob(X).exp() for n in (1, 2))
    share = 0.7 * 0.2 + 0.3 * 0.7
    assert_close(densities(result), ((1 - share) * one + share * two).log())


@pytest.mark.parametrize("model", [one_for_all, nested], ids=lambda model: model.__name__)
def test_observations_that_share_a_class_have_no_log_likelihood_each(model):
    groups = diagnose(model, guide_of(model), num_samples=40).posterior
    assert "log_likelihood" not in groups and "observed_data" in groups


# Errors


def test_discrete_sites_that_are_neither_marked_nor_in_the_guide_are_named():
    unmarked = poutine.infer_config(mixture, lambda site: {"enumerate": None})
    with pytest.raises(ValueError, match=r"does not sample \['k'\].* mark \['k'\] for parallel .*config_enumerate"):
        diagnose(unmarked, guide_of(mixture))


def test_continuous_sites_are_not_said_to_be_enumerable():
    with pytest.raises(ValueError, match=r"does not sample \['locs'\].*out of the model$"):
        diagnose(mixture, lambda: None)


def test_sites_that_are_sampled_several_times_are_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0), infer={"enumerate": "parallel", "num_samples": 5})
        pyro.sample("w", dist.Normal(z, 1.0))

    with pytest.raises(ValueError, match=r"does not sample \['z'\]"):
        diagnose(model, lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))


def test_messengers_are_refused_for_enumerated_models():
    guide = AutoNormalMessenger(poutine.block(mixture, hide=["k"]))
    with pytest.raises(ValueError, match="guide must not be a messenger"):
        diagnose(mixture, guide)


def test_scales_that_differ_are_refused():
    def model():
        locs = components()
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(pick(locs, k), 1.0), obs=X)

    with pytest.raises(ValueError, match="must have one scale"):
        diagnose(model, guide_of(mixture))


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")
def test_densities_that_are_nan_for_a_class_are_named():
    def model():
        locs = components()
        with pyro.plate("data", 4):
            k = pyro.sample("k", dist.Categorical(PROBS), infer={"enumerate": "parallel"})
            loc = pick(locs, k)
            density = torch.where((k == 2) & (loc > 1.5), math.nan, 0.0)
            x = X.expand((density + X).shape)
            pyro.sample("x", dist.Delta(x, log_density=density.expand(x.shape), validate_args=False), obs=X)

    with pytest.raises(ValueError, match="log_prob of site 'x' of the model is nan for [0-9]+ of 100 samples"):
        diagnose(model, guide_of(mixture), num_samples=100)
