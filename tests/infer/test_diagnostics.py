# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    init_to_median,
)
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import nn
from torch.distributions import biject_to, constraints
from torch.testing import assert_close
from transform_checks import QUICK

from pyro_hollow import hollow_cnf
from pyro_hollow.infer import GuideDiagnostics, diagnose
from pyro_hollow.infer.importance import resample

arviz = pytest.importorskip("arviz")

X = torch.tensor([0.4, 1.6, 0.9, 2.1], dtype=torch.float64)
MEAN, SD = (X.sum() / 5).item(), math.sqrt(1 / 5)  # of the posterior of location
EVIDENCE = dist.MultivariateNormal(torch.zeros(4).to(X), torch.eye(4).to(X) + 1).log_prob(X).item()

WAYS = {
    "at once": {},
    "in batches": {"batch_size": 7},
    "one batch each": {"batch_size": 1},
    "loop": {"vectorize": False},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def location(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(shift=0.0, ratio=1.0):
    """A guide of location that is off by so many standard deviations, and whose own is too large by a ratio."""

    def guide(x):
        pyro.sample("z", dist.Normal(torch.tensor(MEAN + shift * SD).to(x), ratio * SD))

    return guide


def draws(result, group="posterior", name="z"):
    """With the shape (draws,) + that of the site."""
    return torch.from_numpy(result.posterior[group][name].values).flatten(0, 1)


def groups(result):
    """Those of an InferenceData, or of the DataTree that it is since ArviZ 1."""
    names = result.posterior.groups
    return {name.strip("/") for name in (names() if callable(names) else names)} - {""}


def hierarchy(x):
    """Sites in either plate, in both and in none, with events and constraints."""
    columns, rows = pyro.plate("columns", 2, dim=-2), pyro.plate("rows", len(x), dim=-1)
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    with columns:
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        with rows:
            local = pyro.sample("local", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((local * simplex).sum(-1) + offset, scale), obs=x)
    with rows:
        pyro.sample("row", dist.Normal(scale, 1.0))


SHAPES = {"scale": (), "simplex": (3,), "offset": (2, 1), "local": (2, 4, 3), "row": (4,)}


def hierarchy_guide(x):
    columns, rows = pyro.plate("columns", 2, dim=-2), pyro.plate("rows", len(x), dim=-1)
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    with columns:
        pyro.sample("offset", dist.Normal(0.1, 0.5))
        with rows:
            pyro.sample("local", dist.LogNormal(torch.full((3,), -0.5), 0.4 * scale.unsqueeze(-1)).to_event(1))
    with rows:
        pyro.sample("row", dist.Normal(scale + x, 0.8))


# Closed forms


@pytest.mark.parametrize("batch_size", [None, 50])
def test_samples_are_drawn_and_predicted_in_parts_that_fit(monkeypatch, batch_size):
    sizes = []

    def guide(x):
        z = pyro.sample("z", dist.Normal(torch.tensor(MEAN).to(x), SD))
        sizes.append(z.numel())

    def deterministic(x):
        location(x)
        pyro.deterministic("one", torch.ones(()))

    monkeypatch.setattr("pyro_hollow.ops.memory.MAX_BYTES", 20_000)
    result = diagnose(deterministic, guide, X, num_samples=200, batch_size=batch_size)
    assert result.log_weights.shape == (200,) and draws(result).shape == (200,)
    assert_close(result.log_weights, torch.full((200,), EVIDENCE))
    drawn = sizes[sizes.index(2) :]
    assert sum(size for size in drawn if size > 2) == 200
    assert max(drawn) == 50 if batch_size else 2 < max(drawn) < 100


@every_way
def test_exact_guide(way):
    result = diagnose(location, normal_guide(), X, num_samples=200, **way)
    assert_close(result.log_weights, torch.full((200,), EVIDENCE))
    assert result.elbo == pytest.approx(EVIDENCE)
    assert result.iw_bound == pytest.approx(EVIDENCE)
    assert result.elbo_error < 1e-12 and result.iw_bound_error < 1e-12
    assert result.khat == 0.0
    assert result.ess == pytest.approx(200)
    assert_close(draws(result), draws(result, "guide"))  # each of them once


@pytest.mark.parametrize("shift, ratio", [(0.0, 1.5), (0.0, 0.85), (0.5, 1.3), (-1.0, 2.0)])
def test_normal_guide(shift, ratio):
    guide = normal_guide(shift, ratio)
    result = diagnose(location, guide, X, num_samples=10_000)
    divergence = (ratio**2 + shift**2 - 1) / 2 - math.log(ratio)
    assert result.elbo == pytest.approx(EVIDENCE - divergence, abs=4 * result.elbo_error)
    assert 0 < result.elbo_error < 0.05
    assert result.iw_bound == pytest.approx(EVIDENCE, abs=4 * result.iw_bound_error)
    assert 0 < result.iw_bound_error < 0.05
    # E_q[w^2] of two normal distributions, from the sum of the squares in the exponent
    second = ratio**2 / math.sqrt(2 * ratio**2 - 1) * math.exp(shift**2 / (2 * ratio**2 - 1))
    assert result.ess == pytest.approx(10_000 / second, rel=0.1)
    assert result.khat < 0.5


@pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5, 0.3])
def test_khat_of_a_narrow_guide(ratio):
    """The weights have a tail u^{-1 / k} with k = 1 - ratio^2."""
    result = diagnose(location, normal_guide(ratio=ratio), X, num_samples=20_000)
    assert result.khat == pytest.approx(1 - ratio**2, abs=0.2)


def test_khat_of_tails():
    def heavy(scale=1.0):
        pyro.sample("z", dist.Cauchy(torch.zeros(5), scale).to_event(1))

    def light(scale=1.0):
        pyro.sample("z", dist.Normal(torch.zeros(5), scale).to_event(1))

    result = diagnose(heavy, lambda: light(0.5))
    assert result.khat > 0.7
    assert result.ess < 0.1 * result.num_samples
    assert diagnose(light, heavy).khat < 0.5


def test_corrected_draws():
    result = diagnose(location, normal_guide(0.6, 1.4), X, num_samples=5000)
    before, after = draws(result, "guide"), draws(result)
    assert abs(after.mean() - MEAN) < 0.05 * SD < 0.5 * SD < abs(before.mean() - MEAN)
    assert abs(after.std() / SD - 1) < 0.05 < 0.3 < abs(before.std() / SD - 1)
    grid = torch.linspace(0.05, 0.95, 19)
    assert_close(after.quantile(grid), dist.Normal(MEAN, SD).icdf(grid), rtol=0, atol=0.1 * SD)
    assert arviz.ess(result.posterior)["z"].item() == pytest.approx(result.ess, rel=0.15)


def test_ties():
    """Weights that are either 0 or 1, the best that a proposal from outside the support can do."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(z > 0.0, 0.0, -math.inf))

    result = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=1000)
    positive = draws(result, "guide") > 0
    count = int(positive.sum())
    assert result.log_weights[positive].eq(0).all() and result.log_weights[~positive].isneginf().all()
    assert result.elbo == -math.inf and math.isnan(result.elbo_error)
    assert result.iw_bound == pytest.approx(math.log(count / 1000))
    assert result.khat == 0.0
    assert result.ess == pytest.approx(count)
    assert draws(result).min() > 0
    assert draws(result).unique().numel() == count


def test_weight_on_a_few_samples():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("far", torch.where(z > 2.5, 0.0, -math.inf))

    result = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=300)
    assert 1 <= result.weights.count_nonzero() < 5
    assert result.khat == math.inf
    assert "neither" in str(result)


@pytest.mark.parametrize("limit, rounding", [(2.0, 0.0), (2.6, 1e-14)], ids=["fit fails", "fit overflows"])
def test_weights_of_few_values(limit, rounding):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("steps", torch.where(z > limit, 0.01, rounding * z))

    for seed in range(4):
        pyro.set_rng_seed(seed)
        result = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
        assert not math.isnan(result.khat)
        assert_close(result.weights, torch.full((4000,), 1 / 4000), rtol=0.02, atol=0)


# Weights and draws


@every_way
def test_weights_are_those_of_single_traces(way):
    result = diagnose(hierarchy, hierarchy_guide, X, num_samples=30, **way)
    samples = {name: draws(result, "guide", name) for name in SHAPES}
    assert draws(result, "guide", "scale").unique().numel() == 30
    for index, log_weight in enumerate(result.log_weights):
        values = {name: sample[index] for name, sample in samples.items()}
        model, guide = (poutine.trace(poutine.condition(fn, values)) for fn in (hierarchy, hierarchy_guide))
        expected = model.get_trace(X).log_prob_sum() - guide.get_trace(X).log_prob_sum()
        assert_close(log_weight, expected)


def test_loop_is_that_of_trace_and_replay():
    pyro.set_rng_seed(1)
    result = diagnose(hierarchy, hierarchy_guide, X, num_samples=25, vectorize=False)
    pyro.set_rng_seed(1)
    expected = []
    for _ in range(26):
        guide_trace = poutine.trace(hierarchy_guide).get_trace(X)
        model_trace = poutine.trace(poutine.replay(hierarchy, trace=guide_trace)).get_trace(X)
        expected.append(model_trace.log_prob_sum() - guide_trace.log_prob_sum())
    assert_close(result.log_weights, torch.stack(expected[1:]))  # the first run is for the structure


@pytest.mark.parametrize("auto", [AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
def test_weights_of_automatic_guides(auto):
    """They sample an auxiliary site for all latents, which are deterministic functions of it."""
    guide = auto(hierarchy, init_scale=0.3)
    result = diagnose(hierarchy, guide, X, num_samples=30)
    for index, log_weight in enumerate(result.log_weights):
        values = {name: draws(result, "guide", name)[index] for name in SHAPES}
        trace = poutine.trace(poutine.condition(hierarchy, values)).get_trace(X)
        latent, log_det = [], 0.0
        for name in guide.prototype_trace.stochastic_nodes:
            transform = biject_to(trace.nodes[name]["fn"].support)
            unconstrained = transform.inv(values[name])
            log_det += transform.log_abs_det_jacobian(unconstrained, values[name]).sum()
            latent.append(unconstrained.flatten())
        log_guide = guide.get_posterior().log_prob(torch.cat(latent)) - log_det
        assert_close(log_weight, trace.log_prob_sum() - log_guide)


def in_two_parts(model):
    """The second one is not Pyro's own."""
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["scale"])))
    guide.append(lambda x: {"scale": pyro.sample("scale", dist.LogNormal(0.0, 0.3))})
    return guide


GUIDES = {
    "hand-written": lambda model: hierarchy_guide,
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoIAFNormal": AutoIAFNormal,
    "AutoNormalizingFlow": lambda model: AutoNormalizingFlow(model, lambda dim: hollow_cnf(dim, [8], solver=QUICK)),
    "AutoGuideList": in_two_parts,
    "AutoNormalMessenger": lambda model: AutoNormalMessenger(model, init_loc_fn=init_to_median),
}
every_guide = pytest.mark.parametrize("auto", GUIDES.values(), ids=GUIDES)


GROUPS = {"posterior", "sample_stats", "guide", "log_likelihood", "posterior_predictive", "observed_data"}


@every_guide
@every_way
def test_shapes(auto, way):
    result = diagnose(hierarchy, auto(hierarchy), X, num_samples=25, num_draws=11, **way)
    assert isinstance(result, GuideDiagnostics) and groups(result) == GROUPS
    assert result.log_weights.shape == result.weights.shape == (25,)
    assert result.weights.sum() == pytest.approx(1)
    for group, size in {"posterior": 11, "guide": 25}.items():
        dataset = result.posterior[group]
        assert {name: dataset[name].shape for name in dataset} == {
            name: (1, size, *shape) for name, shape in SHAPES.items()
        }
        assert (dataset["scale"] > 0).all() and (dataset["local"] > 0).all()
        assert_close(draws(result, group, "simplex").sum(-1), torch.ones(size))
    for name, shape in SHAPES.items():
        assert result.posterior.posterior[name].dims == (
            "chain",
            "draw",
            *(f"{name}_dim_{index}" for index in range(len(shape))),
        )


@every_guide
def test_elbo_is_that_of_svi(auto):
    guide = auto(hierarchy)
    result = diagnose(hierarchy, guide, X, num_samples=2000)
    with torch.no_grad():
        loss = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=2).loss(hierarchy, guide, X)
    assert result.elbo == pytest.approx(-loss, abs=6 * result.elbo_error)


def test_draws_belong_together():
    """All latents of a draw, and its log weight, come from one sample."""
    result = diagnose(hierarchy, hierarchy_guide, X, num_samples=50)
    index = torch.searchsorted(*(draws(result, "guide", "scale").sort()[0], draws(result, name="scale")))
    index = draws(result, "guide", "scale").argsort()[index]
    for name in SHAPES:
        assert torch.equal(draws(result, name=name), draws(result, "guide", name)[index])
    assert torch.equal(draws(result, "sample_stats", "log_weight"), result.log_weights[index])
    assert (index.diff() >= 0).all()


@pytest.mark.parametrize("num_draws", [1, 50, 1000, 5000])
def test_resampling_is_systematic(num_draws):
    result = diagnose(location, normal_guide(0.5, 0.8), X, num_samples=1000, num_draws=num_draws)
    assert draws(result).shape == (num_draws,)
    counts = (draws(result, "guide").unsqueeze(-1) == draws(result)).sum(-1)
    assert (counts - num_draws * result.weights).abs().max() < 1


def test_resampling_is_unbiased():
    weights = torch.tensor([0.0, 0.05, 0.3, 0.0, 0.2, 0.45, 0.0])
    indices = torch.cat([resample(weights, 3) for _ in range(4000)])
    assert_close(indices.bincount(minlength=7) / 12_000, weights, rtol=0, atol=0.02)


@pytest.mark.skipif(not hasattr(arviz, "psislw"), reason="since ArviZ 1 only within arviz_stats")
def test_weights_are_smoothed():
    result = diagnose(location, normal_guide(ratio=0.6), X)
    log_weights, khat = arviz.psislw(result.log_weights.numpy())
    assert_close(result.weights, torch.from_numpy(log_weights).exp())
    assert result.khat == pytest.approx(float(khat))
    assert result.weights.max() < 0.999 * result.log_weights.softmax(0).max()


def test_summary_is_stored_with_the_draws():
    result = diagnose(location, normal_guide(ratio=1.2), X, num_samples=100)
    names = ("elbo", "elbo_error", "iw_bound", "iw_bound_error", "khat", "ess")
    assert result.posterior.attrs == {name: getattr(result, name) for name in names}
    assert set(arviz.summary(result.posterior).index) == {"z"}


# Sites


def test_auxiliary_sites():
    def model():
        pyro.sample("z", dist.LogNormal(0.0, 1.0))

    def guide():
        latent = pyro.sample("latent", dist.Normal(0.3, 1.2), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(latent.exp(), log_density=-latent))

    result = diagnose(model, guide, num_samples=100)
    z = draws(result, "guide")
    assert list(result.posterior.posterior) == ["z"]
    assert_close(result.log_weights, dist.LogNormal(0.0, 1.0).log_prob(z) - dist.LogNormal(0.3, 1.2).log_prob(z))


def test_observed_factor_and_deterministic_sites():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("square", z**2)
        pyro.factor("quartic", -(z**4))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))

    result = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=100)
    z = draws(result, "guide")
    assert list(result.posterior.posterior) == ["z", "square"] and list(result.posterior.guide) == ["z"]
    assert_close(result.log_weights, dist.Normal(z, 1.0).log_prob(torch.tensor(0.7)) - z**4)


def test_discrete_sites():
    probs, guess = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.4, 0.4, 0.2])
    result = diagnose(
        lambda: pyro.sample("k", dist.Categorical(probs)), lambda: pyro.sample("k", dist.Categorical(guess))
    )
    assert draws(result, name="k").dtype == torch.int64
    assert_close(draws(result, name="k").bincount() / 4000, probs, rtol=0, atol=0.03)


def test_sequential_plates():
    def model(x):
        for index in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{index}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x_{index}", dist.Normal(z, 1.0), obs=x[index])

    def guide(x):
        for index in pyro.plate("data", len(x)):
            pyro.sample(f"z_{index}", dist.Normal(x[index] / 2, math.sqrt(0.5)))

    result = diagnose(model, guide, X, num_samples=50)
    evidence = dist.Normal(0.0, math.sqrt(2)).log_prob(X).sum()
    assert_close(result.log_weights, evidence.expand(50))
    assert set(result.posterior.posterior) == {f"z_{index}" for index in range(4)}


@pytest.mark.parametrize("max_plate_nesting", [None, 1, 3])
def test_max_plate_nesting(max_plate_nesting):
    result = diagnose(location, normal_guide(), X, num_samples=50, max_plate_nesting=max_plate_nesting)
    assert_close(result.log_weights, torch.full((50,), EVIDENCE))
    assert draws(result).shape == (50,)


def test_models_that_cannot_be_vectorised():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 1.0 if z > 0 else 2.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    with pytest.raises(ValueError, match="model runs with one sample, but not with two .*ambiguous.* vectorize=False"):
        diagnose(model, normal_guide(), X)
    result = diagnose(model, normal_guide(-2.0), X, num_samples=100, vectorize=False)
    z = draws(result, "guide").unsqueeze(-1)
    assert (z > 0).any() and (z < 0).any()
    log_likelihood = dist.Normal(z, torch.where(z > 0, 1.0, 2.0)).log_prob(X).sum(-1)
    prior, guide = dist.Normal(0.0, 1.0).log_prob(z), dist.Normal(MEAN - 2 * SD, SD).log_prob(z)
    assert_close(result.log_weights, log_likelihood + (prior - guide).squeeze(-1))


@pytest.mark.parametrize("factor", [lambda z: -(z**4).sum(), lambda z: -(z**2).mean() + z[..., 0]], ids=["sum", "mean"])
def test_models_that_mix_samples(factor):
    """They run in a further plate, but their densities are wrong."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("factor", factor(z))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match="model must treat samples independently, .* use vectorize=False"):
        diagnose(model, guide)
    result = diagnose(model, guide, num_samples=100, vectorize=False)
    assert_close(result.log_weights, torch.stack([factor(z) for z in draws(result, "guide")]))


def logistic_regression(x, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    sizes.append(w.numel() // 3)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=w @ x.T), obs=y)


sizes: list[int] = []


def test_two_samples_are_tried_before_thousands_are_allocated():
    """The density of all pairs of 4,000 samples would take 128 GB."""
    sizes.clear()
    x, y = torch.randn(2000, 3), torch.ones(2000)
    with pytest.raises(ValueError, match="model must treat samples independently, .* site 'y' .* use vectorize=False"):
        diagnose(logistic_regression, AutoNormal(logistic_regression), x, y)
    assert max(sizes) == 2


class Linear(PyroModule):
    """A layer of PyTorch with priors on its weights, which takes no matrix of them for each sample."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x):
        mean = self.linear(x.unsqueeze(-1)).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=x)


def unbinds(x):
    """Takes a vector apart by its first dimension, which is that of the samples where there are some."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    a, b, c = z.unbind(0)
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a + b * c, 1.0), obs=x)


@pytest.mark.parametrize("make", [Linear, lambda: unbinds], ids=["layer", "unbind"])
def test_models_that_take_no_further_plate_name_the_setting(make):
    model = make()
    message = "model runs with one sample, but not with two in a further plate .*use vectorize=False"
    with pytest.raises(ValueError, match=message) as info:
        diagnose(model, AutoNormal(model), X, num_samples=25)
    assert info.value.__cause__ is not None
    assert diagnose(model, AutoNormal(model), X, num_samples=25, vectorize=False).elbo < 0


def test_guides_that_take_no_further_plate_name_the_setting():
    def guide(x):
        z = pyro.sample("latent", dist.Normal(torch.zeros(1), 1.0).to_event(1), infer={"is_auxiliary": True})
        z = float(z)
        pyro.sample("z", dist.Delta(torch.tensor(z)))

    message = "guide runs with one sample, but not with two in a further plate .*use vectorize=False"
    with pytest.raises(ValueError, match=message):
        diagnose(location, guide, X, num_samples=25)
    assert diagnose(location, guide, X, num_samples=25, vectorize=False).num_samples == 25


def test_models_that_draw_for_themselves_have_unbiased_weights():
    """Dropout, or a site that is hidden, is drawn from its prior, and needs no density."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + torch.randn_like(z), 1.0), obs=x)

    x = torch.tensor(0.7)
    result = diagnose(model, lambda x: pyro.sample("z", dist.Normal(x / 3, 1.0)), x, num_samples=20_000)
    evidence = dist.Normal(0.0, math.sqrt(3)).log_prob(x).item()
    assert result.iw_bound == pytest.approx(evidence, abs=4 * result.iw_bound_error)


# What is left alone


@every_guide
def test_guides_that_were_not_called(auto):
    guide = auto(hierarchy)
    diagnose(hierarchy, guide, X, num_samples=50)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    assert all(value.requires_grad for value in pyro.get_param_store().values())
    svi = SVI(hierarchy, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(X))
    assert set(before) == set(pyro.get_param_store())
    assert all(not torch.equal(value, before[name]) for name, value in pyro.get_param_store().items())


@every_guide
def test_parameters_stay(auto):
    guide = auto(hierarchy)
    guide(X)
    before = {name: (value, value.detach().clone()) for name, value in pyro.get_param_store().named_parameters()}
    diagnose(hierarchy, guide, X, num_samples=50)
    after = dict(pyro.get_param_store().named_parameters())
    assert set(before) == set(after)
    for name, (parameter, value) in before.items():
        assert after[name] is parameter and torch.equal(parameter, value)
        assert parameter.requires_grad and parameter.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay(training):
    seen = []

    class Guide(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            pyro.sample("z", dist.Normal(MEAN, SD))

    guide = Guide().train(training)
    result = diagnose(location, guide, X, num_samples=50)
    assert set(seen) == {(training, False)}
    assert guide.training is training and torch.is_grad_enabled()
    assert not result.log_weights.requires_grad


def test_keyword_arguments():
    def guide(*, x):
        pyro.sample("z", dist.Normal(MEAN, SD))

    assert diagnose(location, guide, x=X, num_samples=50).elbo == pytest.approx(EVIDENCE)


@every_way
def test_reproducible(way):
    results = []
    for seed in (3, 3, 4):
        pyro.set_rng_seed(seed)
        results.append(diagnose(location, normal_guide(0.5, 1.3), X, num_samples=100, **way))
    first, same, other = results
    assert torch.equal(first.log_weights, same.log_weights)
    assert torch.equal(draws(first), draws(same))
    assert str(first) == str(same)
    assert not torch.equal(first.log_weights, other.log_weights)


def test_float32():
    torch.set_default_dtype(torch.float32)
    guide = AutoMultivariateNormal(location, init_scale=0.5)
    result = diagnose(location, guide, X.float())
    assert result.log_weights.dtype == result.weights.dtype == torch.float64
    assert draws(result).dtype == torch.float32
    z = draws(result, "guide").double()
    posterior, guess = dist.Normal(MEAN, SD), dist.Normal(guide.loc.item(), guide.scale.item())
    assert_close(result.log_weights, EVIDENCE + posterior.log_prob(z) - guess.log_prob(z), rtol=0, atol=1e-4)
    # The weights of an exact guide differ by rounding, which must not pass for a tail.
    exact = diagnose(location, normal_guide(), X.float())
    assert exact.log_weights.unique().numel() > 1
    assert exact.khat == 0.0
    assert exact.ess == pytest.approx(4000)


# Text


@pytest.mark.parametrize(
    "ratio, num_samples, advice",
    [
        (1.5, 4000, "importance-corrected draws can be trusted where the guide has draws; modes without any were not"),
        (0.3, 4000, "neither the guide nor its correction can be trusted: weights larger than those drawn may hold"),
        (0.1, 100, "neither the guide nor its correction can be trusted: the effective sample size is below 50"),
    ],
)
def test_text(ratio, num_samples, advice):
    result = diagnose(location, normal_guide(ratio=ratio), X, num_samples=num_samples)
    lines = str(result).splitlines()
    assert lines[0].split()[1] == f"{result.elbo:.3f}"
    assert lines[1].split()[2] == f"{result.iw_bound:.3f}"
    assert lines[2] == f"Effective sample size      {result.ess:.0f} of {num_samples}"
    assert lines[3].startswith(f"k-hat {result.khat:.2f}, unseen weight {result.unseen:.1%}: {advice}")
    assert result.reliable is (ratio == 1.5)
    assert len(repr(result)) < 400


# Errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_samples": 24}, "num_samples must be at least 25, but got 24"),
        ({"num_draws": 0}, "num_draws must be at least 1, but got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, but got 0"),
        ({"max_plate_nesting": 0}, "max_plate_nesting must be at least 1, but got 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        diagnose(location, normal_guide(), X, **settings)


def test_models_without_latents():
    with pytest.raises(ValueError, match="model has no latent sites"):
        diagnose(lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)), lambda: None)


def test_latents_that_the_guide_does_not_sample():
    with pytest.raises(ValueError, match=r"guide must sample .* does not sample \['scale', 'row'\]"):
        diagnose(hierarchy, poutine.block(hierarchy_guide, hide=["scale", "row"]), X)


@every_way
def test_guides_of_a_single_value(way):
    with pytest.raises(ValueError, match="guide has a single value for site 'z', as AutoDelta has"):
        diagnose(location, AutoDelta(location), X, num_samples=25, **way)


@pytest.mark.parametrize("name", ["chain", "draw", "x_dim_0"])
def test_names_of_dimensions(name):
    """ArviZ would lose the draws of these sites, or fail."""

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample(name, dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=f"site '{name}' of the model has a name that ArviZ gives to a dimension"):
        diagnose(model, AutoNormal(model))


@pytest.mark.parametrize("name", ["chains", "x_dim_1", "y_dim_0"])
def test_names_like_those_of_dimensions(name):
    def model():
        pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample(name, dist.Normal(0.0, 1.0))

    draws = diagnose(model, AutoNormal(model)).posterior.posterior
    assert set(draws) == {"x", name} and draws[name].shape == (4, 1000) and draws["x"].shape == (4, 1000, 3)


def test_sites_without_elements():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("none", dist.Normal(torch.zeros(0), 1.0).to_event(1))

    assert diagnose(model, AutoNormal(model)).posterior.posterior["none"].shape == (4, 1000, 0)


def test_structure_that_changes():
    def model():
        size = 2 + int(pyro.sample("size", dist.Bernoulli(0.5)))
        pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    with pytest.raises(ValueError, match="model must have the same latent sites with the same shapes"):
        diagnose(model, model, vectorize=False)


def subsampled(x, subsample_size=2):
    with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


def without_locals(x, subsample_size=2):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=subsample_size) as index:
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[index])


@pytest.mark.parametrize("way", [{}, {"vectorize": False}], ids=["at once", "loop"])
@pytest.mark.parametrize(
    "model, owner",
    [(subsampled, "guide"), (without_locals, "model")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_subsampled_plates(model, owner, way):
    with pytest.raises(ValueError, match=f"plate 'data' of the {owner} is subsampled, 2 of 4, .* pass the full data"):
        diagnose(model, AutoNormal(model), X, num_samples=25, **way)
    result = diagnose(model, AutoNormal(model), X, subsample_size=None, num_samples=25, **way)
    assert draws(result).shape == ((25, 4) if model is subsampled else (25,))


def test_guides_that_remember_a_subsample():
    guide = AutoNormal(subsampled)
    guide(X)
    with pytest.raises(ValueError, match="plate 'data' of the guide is subsampled, .* create_plates"):
        diagnose(subsampled, guide, X, subsample_size=None)

    def plates(x, subsample_size=2):
        return pyro.plate("data", len(x), subsample_size=subsample_size)

    guide = AutoNormal(subsampled, create_plates=plates)
    guide(X)
    assert draws(diagnose(subsampled, guide, X, subsample_size=None, num_samples=25)).shape == (25, 4)


@pytest.mark.parametrize(
    "owner, value, message",
    [
        ("model", math.nan, "log_prob of site 'odd' of the model is nan for [0-9]+ of 100 samples"),
        ("model", math.inf, "log_prob of site 'odd' of the model is inf"),
        ("guide", math.nan, "log_prob of site 'odd' of the guide is nan"),
        ("guide", math.inf, "log_prob of site 'odd' of the guide is inf"),
        ("guide", -math.inf, "log_prob of site 'odd' of the guide is -inf"),
    ],
)
@pytest.mark.filterwarnings("ignore:Encountered:UserWarning")
def test_densities_that_make_no_sense(owner, value, message):
    def program(name):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if name == owner:
            odd = dist.Delta(z, log_density=torch.where(z > 1.0, value, 0.0), validate_args=False)
            pyro.sample("odd", odd, obs=z if name == "model" else None, infer={"is_auxiliary": True})

    with pytest.raises(ValueError, match=message):
        diagnose(lambda: program("model"), lambda: program("guide"), num_samples=100)


def test_guides_outside_the_support():
    def model():
        pyro.sample("z", dist.Uniform(0.0, 1.0, validate_args=False))

    def guide(low):
        pyro.sample("z", dist.Uniform(low, low + 2.0))

    result = diagnose(model, lambda: guide(-1.0))
    assert constraints.unit_interval.check(draws(result)).all()
    assert result.iw_bound == pytest.approx(0.0, abs=4 * result.iw_bound_error)
    with pytest.raises(ValueError, match="none of the 4000 samples of the guide has a positive density"):
        diagnose(model, lambda: guide(1.0))


def test_announcements_of_arviz(monkeypatch, tmp_path):
    """It makes one on the first import of a day, of which it keeps account in a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delitem(sys.modules, "arviz")
    diagnose(location, normal_guide(), X)


def test_arviz_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="diagnose needs ArviZ: pip install"):
        diagnose(location, normal_guide(), X)
