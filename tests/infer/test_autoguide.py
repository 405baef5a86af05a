# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The automatic guide. Networks and solvers are small for speed, and flows mostly strong, so that mistakes show."""

import copy
import io
import math
import os
import pickle
import runpy
import subprocess
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGuideList,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_mean,
    init_to_median,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam, ClippedAdam
from torch.distributions import biject_to
from torch.testing import assert_close
from transform_checks import QUICK, TIGHT, strengthen

from pyro_hollow import Solver, conditional_hollow_cnf
from pyro_hollow.infer import AutoHollowCNF, autoguide, guide_posterior
from pyro_hollow.nn.activations import get_activation
from pyro_hollow.nn.conditioner import GroupedConditioner, LeaveOneOutConditioner

LATENT = "_AutoHollowCNF_latent"
COARSE = Solver("rk4", options={"step_size": 1.0})  # where only shapes and copies matter
FINE = Solver("rk4", options={"step_size": 0.1})  # for float32, which does not reach tight tolerances

small = partial(AutoHollowCNF, hidden_dims=[8, 8], solver=QUICK, warm_up=0)
both_affine = pytest.mark.parametrize("affine", ["full", "diagonal"])


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request, reproducible):
    torch.set_default_dtype(request.param)
    return request.param


def ready(guide, *args):
    """Set up, without a call that counts as training."""
    with torch.no_grad():
        guide(*args)
    return guide


def strong(guide, *args):
    """Far from where guides start."""
    ready(guide, *args)
    with torch.no_grad():
        guide.affine.add_(0.1 * torch.randn_like(guide.affine))
    for flow in guide.flows:
        strengthen(flow)
    return guide


def flow_state(guide):
    return {name: value.detach().clone() for name, value in guide.flows.named_parameters()}


def moved(guide, before):
    """Whether any parameter of the flows has."""
    return any(not torch.equal(value, before[name]) for name, value in guide.flows.named_parameters())


def same_parameters(guide, other):
    own, others = guide.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)


@pytest.fixture
def solves(monkeypatch):
    """Every solve adds the batch shape of its state."""
    calls = []
    integrate = Solver.integrate_with_divergence

    def counting(self, field, state, *args):
        calls.append(tuple(state.shape[:-1]))
        return integrate(self, field, state, *args)

    monkeypatch.setattr(Solver, "integrate_with_divergence", counting)
    return calls


# Models


def vector(d=3):
    z = pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.square().sum(-1), 1.0), obs=torch.tensor(2.0))


def scalar():
    z = pyro.sample("z", dist.Normal(1.0, 2.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))


def plated():
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Normal(torch.arange(3.0), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))


def constrained():
    scale = pyro.sample("scale", dist.LogNormal(0.3, 1.0))
    pyro.sample("share", dist.Beta(2.0, 3.0))
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    pyro.sample("x", dist.Normal(simplex[..., 0], scale), obs=torch.tensor(0.5))


def hierarchy(x=None):
    """Sites in either plate, in both and in none, with events and constraints."""
    columns, rows = pyro.plate("columns", 2, dim=-2), pyro.plate("rows", 4, dim=-1)
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    simplex = pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
    with columns:
        offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
        with rows:
            local = pyro.sample("local", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((local * simplex).sum(-1) + offset, scale), obs=x)
    with rows:
        pyro.sample("row", dist.Beta(2.0, 2.0))


HIERARCHY = {"scale": (), "simplex": (3,), "offset": (2, 1), "local": (2, 4, 3), "row": (4,)}


def banana():
    """Its evidence is that of x1 = x0^2 - 0.5 + noise; a normal guide cannot bend."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
    pyro.sample("x", dist.Normal(z[..., 1] - z[..., 0] ** 2, 0.2), obs=torch.tensor(-0.5))


def banana_evidence():
    axis = torch.linspace(-6, 6, 601)
    z = torch.cartesian_prod(axis, axis)
    joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    joint += dist.Normal(z[:, 1] - z[:, 0] ** 2, 0.2).log_prob(torch.tensor(-0.5))
    return (joint.logsumexp(0) + 2 * (axis[1] - axis[0]).log()).item()


def data_model(data, subsample_size=None):
    """A global latent only, with subsampled data."""
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data), subsample_size=subsample_size) as index:
        pyro.sample("y", dist.Normal(loc, 1.0), obs=data[index])


def local_model(data, subsample_size=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data), subsample_size=subsample_size) as index:
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=data[index])


# Where it starts


VALUES = {
    "scalar": (scalar, {"z": 1.5}),
    "vector": (vector, {"z": [0.5, -1.0, 2.0]}),
    "plate": (plated, {"z": [0.5, -1.0, 2.0]}),
    "constrained": (constrained, {"scale": 2.0, "share": 0.7, "simplex": [0.2, 0.5, 0.3]}),
}
STARTS = {
    **{f"value, {name}": (model, ("value", values)) for name, (model, values) in VALUES.items()},
    **{f"mean, {name}": (model, ("mean", None)) for name, (model, _) in VALUES.items()},
    "median, constrained": (constrained, ("median", None)),
}


def location_function(name, values):
    if name == "value":
        return init_to_value(values={site: torch.tensor(value) for site, value in values.items()})
    return init_to_mean if name == "mean" else init_to_median


@both_affine
@pytest.mark.parametrize("model, start", STARTS.values(), ids=STARTS)
def test_starts_as_a_normal_guide(dtype, model, start, affine):
    guides = []
    for make in (partial(small, affine=affine, num_transforms=2), AutoDiagonalNormal):
        pyro.set_rng_seed(1)  # init_to_median draws
        guides.append(ready(make(model, init_loc_fn=location_function(*start), init_scale=0.05)))
    guide, normal = guides
    x = normal.get_posterior().sample((5,)) + 0.05
    assert x.dtype is dtype
    assert_close(guide.get_posterior().log_prob(x), normal.get_posterior().log_prob(x))
    for grad in (True, False):
        losses = []
        for candidate in guides:
            pyro.set_rng_seed(2)
            with torch.set_grad_enabled(grad):
                losses.append(Trace_ELBO().loss(model, candidate))
        assert losses[0] == pytest.approx(losses[1], rel=1e-9 if dtype is torch.float64 else 1e-4)
    if start[0] == "value":
        for name, value in start[1].items():
            assert_close(guide.median()[name], torch.tensor(value), rtol=1e-3, atol=1e-3)


@both_affine
@pytest.mark.parametrize("model", [scalar, vector, plated], ids=["scalar", "vector", "plate"])
def test_starts_as_auto_normal(model, affine):
    losses = []
    for make in (partial(AutoHollowCNF, affine=affine), AutoNormal):
        pyro.set_rng_seed(1)
        guide = ready(make(model, init_loc_fn=init_to_mean))
        pyro.set_rng_seed(2)
        losses.append(Trace_ELBO(num_particles=5).loss(model, guide))
    assert losses[0] == pytest.approx(losses[1])


def test_the_flow_starts_at_the_identity_and_learns():
    guide = ready(small(vector, num_transforms=2))
    z = torch.randn(6, 3)
    for flow in guide.flows:
        assert torch.equal(flow(z), z)
    before = flow_state(guide)
    svi = SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    for index in range(2):
        assert not torch.equal(
            guide.flows[index].nn.transformer.output_weight, before[f"{index}.nn.transformer.output_weight"]
        )
    svi.step()
    still = [name for name, value in guide.flows.named_parameters() if torch.equal(value, before[name])]
    assert not still


# Warm-up


def stored(guide):
    """The parameters in Pyro's store, without the guide's own account of its progress."""
    return [value for name, value in pyro.get_param_store().named_parameters() if name != "AutoHollowCNF.progress"]


@pytest.mark.parametrize("num_transforms", [1, 2])
def test_warm_up(solves, num_transforms):
    guide = ready(small(vector, warm_up=3, num_transforms=num_transforms))
    solves.clear()
    pyro.clear_param_store()
    flows, affine = flow_state(guide), guide.affine.detach().clone()
    svi = SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
        assert not moved(guide, flows)
        assert not torch.equal(guide.affine, affine)
        assert set(stored(guide)) == set(guide.parameters())  # a store that is saved now must hold the flows, too
        assert list(svi.optim.optim_objs) == [guide.affine]
    assert not solves
    svi.step()
    assert moved(guide, flows)
    assert len(solves) == num_transforms
    assert set(svi.optim.optim_objs) == set(guide.parameters())


def without_gradients(guide):
    with torch.no_grad():
        guide()


def evaluated(guide):
    SVI(vector, guide, Adam({}), Trace_ELBO()).evaluate_loss()


def in_evaluation_mode(guide):
    guide.eval()
    guide()
    guide.train()


NOT_TRAINING = {
    "no_grad": without_gradients,
    "evaluate_loss": evaluated,
    "eval": in_evaluation_mode,
    "median": lambda guide: guide.median(),
    "quantiles": lambda guide: guide.quantiles([0.1, 0.9]),
    "posterior": lambda guide: guide.get_posterior().rsample(),
    "predictive": lambda guide: Predictive(vector, guide=guide, num_samples=3)(),
}


@pytest.mark.parametrize("call", NOT_TRAINING.values(), ids=NOT_TRAINING)
def test_other_calls_do_not_count(call):
    guide = ready(small(vector, warm_up=2))
    before = flow_state(guide)
    svi = SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for step in range(3):
        for _ in range(3):
            call(guide)
        assert not moved(guide, before)
        svi.step()
        assert moved(guide, before) == (step == 2)


def test_no_result_depends_on_the_counter():
    results = []
    for warm_up in (0, 100):
        pyro.clear_param_store()
        guide = ready(small(vector, warm_up=warm_up, init_loc_fn=init_to_mean))
        for _ in range(2):
            pyro.set_rng_seed(2)
            guide.zero_grad()
            loss = Trace_ELBO(num_particles=3).loss_and_grads(vector, guide)
        results.append((loss, guide.affine.grad))
        assert loss == pytest.approx(results[0][0])
    assert_close(*(gradient for _, gradient in results))
    guide = strong(small(vector, warm_up=100))
    for training in (True, False):
        guide.train(training)
        trace = poutine.trace(guide).get_trace()
        latent = trace.nodes[LATENT]
        trace.compute_log_prob()
        assert_close(latent["log_prob"], guide.get_posterior().log_prob(latent["value"].detach()), rtol=1e-3, atol=1e-3)


COPIES = {
    "state_dict": lambda guide, make: load(make(), guide.state_dict()),
    "state_dict, called": lambda guide, make: load(ready(make()), guide.state_dict()),
    "deepcopy": lambda guide, make: copy.deepcopy(guide),
    "pickle": lambda guide, make: pickled(guide),
}


def load(guide, state):
    assert str(guide.load_state_dict(state)) == "<All keys matched successfully>"
    return guide


def pickled(guide):
    model = guide._model
    clone = pickle.loads(pickle.dumps(guide))
    clone._model = model
    return clone


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_trained_state_does_not_warm_up_again(solves, duplicate):
    make = partial(small, vector, warm_up=50)
    guide = make()
    guide._warm_up = 0
    svi = SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    guide._warm_up = 50
    pyro.clear_param_store()
    clone = duplicate(guide, make)
    pyro.clear_param_store()
    before = flow_state(clone)
    solves.clear()
    SVI(vector, clone, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert solves and moved(clone, before)


# The density


DENSITIES = {
    "one latent": (1, {}),
    "one latent, two flows": (1, {"num_transforms": 2}),
    "three latents": (3, {}),
    "two flows": (3, {"num_transforms": 2}),
    "diagonal": (3, {"affine": "diagonal"}),
    "penalty": (3, {"penalty": 0.1}),
    "masked": (3, {"conditioner": "masked"}),
    "leave-one-out": (3, {"conditioner": "leave-one-out", "num_transforms": 2}),
}
every_density = pytest.mark.parametrize("d, settings", DENSITIES.values(), ids=DENSITIES)


@every_density
def test_density(dtype, d, settings):
    double = dtype is torch.float64
    guide = strong(small(partial(vector, d), solver=TIGHT if double else FINE, **settings))
    transform = guide.get_transform()
    z = torch.randn(4, d)
    jacobian = torch.autograd.functional.jacobian(lambda z: transform(z).sum(0), z).transpose(0, 1)
    x = guide.get_transform()(z).detach()
    ladj = torch.linalg.slogdet(jacobian).logabsdet
    assert (x - z).abs().max() > 0.1 and ladj.abs().max() > 0.1  # or the check would be of little
    expected = dist.Normal(torch.zeros(d), torch.ones(d)).to_event(1).log_prob(z) - ladj
    tolerance = {"rtol": 0, "atol": 1e-6} if double else {"rtol": 1e-3, "atol": 2e-3}
    assert expected.dtype is dtype
    assert_close(guide.get_posterior().log_prob(x), expected, **tolerance)
    assert_close(guide.get_transform().inv(x), z, **tolerance)
    assert_close(guide.get_transform().log_abs_det_jacobian(z, x), ladj, **tolerance)


def gradients(guide, score):
    guide.zero_grad()
    score.backward()
    return {name: parameter.grad for name, parameter in guide.named_parameters()}


def assert_same_gradients(guide, score, other, expected, **tolerance):
    own, others = gradients(guide, score), gradients(other, expected)
    assert sum(value.abs().max() > 0.01 for value in others.values()) > 4
    for name in others:
        assert own[name] is not None, name
        assert_close(own[name], others[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@every_density
def test_score_of_a_sample(solves, d, settings):
    """At no further solve, with the gradients that a guide without a cache has."""
    guide = strong(small(partial(vector, d), solver=FINE, **settings))
    others = {key: value for key, value in settings.items() if key != "penalty"}  # which needs the cache
    uncached = ready(load(small(partial(vector, d), solver=FINE, cache_size=0, **others), guide.state_dict()))
    scores = []
    for candidate in (guide, uncached):
        solves.clear()
        pyro.set_rng_seed(3)
        posterior = candidate.get_posterior()
        x = posterior.rsample((4,))
        scores.append(posterior.log_prob(x).sum())
        assert candidate is uncached or len(solves) == settings.get("num_transforms", 1)
        assert_close(candidate.get_posterior().log_prob(x.detach().clone()).sum(), scores[-1], rtol=1e-3, atol=1e-3)
    assert_close(*scores, rtol=1e-3, atol=1e-3)
    assert_same_gradients(guide, scores[0], uncached, scores[1], rtol=2e-3, atol=2e-3)


@every_density
def test_score_of_a_sample_drawn_without_gradients(d, settings):
    guide = strong(small(partial(vector, d), solver=FINE, **settings))
    for name in ("sample", "rsample"):
        posterior = guide.get_posterior()
        with torch.no_grad():
            x = getattr(posterior, name)((4,))
        fresh = copy.deepcopy(guide)
        expected = fresh.get_posterior().log_prob(x.clone()).sum()
        assert_same_gradients(guide, posterior.log_prob(x).sum(), fresh, expected)


def test_score_of_a_draw_made_under_gradients_by_sample():
    """TorchDistribution.sample draws without gradients; what is scored afterwards must have them."""
    guide = strong(small(vector, solver=FINE))
    posterior = guide.get_posterior()
    x = posterior.sample((4,))
    assert not x.requires_grad
    fresh = copy.deepcopy(guide)
    expected = fresh.get_posterior().log_prob(x.clone()).sum()
    assert_same_gradients(guide, posterior.log_prob(x).sum(), fresh, expected)


@pytest.mark.parametrize("num_transforms", [1, 2])
@pytest.mark.parametrize("penalty", [0.0, 0.1], ids=["plain", "penalty"])
def test_one_solve_per_step(solves, num_transforms, penalty):
    guide = ready(small(vector, num_transforms=num_transforms, penalty=penalty))
    loss = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(vector, guide, Adam({"lr": 0.01}), loss)
    for _ in range(3):
        solves.clear()
        svi.step()
        assert solves == [(7,)] * num_transforms


@pytest.mark.parametrize("optimizer", [Adam, ClippedAdam], ids=["Adam", "ClippedAdam"])
def test_steps_see_new_parameters(optimizer):
    """Whatever writes through .data goes unnoticed by version counters."""
    guide = strong(small(vector))
    svi = SVI(vector, guide, optimizer({"lr": 0.05}), Trace_ELBO())
    for _ in range(3):
        svi.step()
        pyro.set_rng_seed(1)
        loss = Trace_ELBO().loss(vector, guide)
        pyro.set_rng_seed(1)
        assert loss == Trace_ELBO().loss(vector, copy.deepcopy(guide))


# Path gradients


def loss_gradients(model, guide, loss, seed=3):
    pyro.set_rng_seed(seed)
    guide.zero_grad()
    loss.loss_and_grads(model, guide)
    return torch.cat([parameter.grad.flatten() for parameter in guide.parameters()])


@pytest.fixture
def independent_samples(monkeypatch):
    """The samples of get_posterior(), not evenly spread ones."""
    monkeypatch.setattr(guide_posterior, "_spread_sample", lambda posterior, shape: posterior.base_dist.rsample(shape))


@pytest.mark.parametrize("num_transforms", [1, 2])
@both_affine
def test_path_gradient(affine, num_transforms, independent_samples):
    """The density depends on parameters through the sample alone."""
    guide = strong(small(vector, num_transforms=num_transforms, affine=affine, solver=FINE, path_gradient=True))
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    own = loss_gradients(vector, guide, loss)
    frozen = copy.deepcopy(guide).requires_grad_(False)
    pyro.set_rng_seed(3)
    x = guide.get_posterior().rsample((4,))
    moving = x.clone()  # the frozen guide knows nothing of how it came about
    joint = dist.Normal(0.0, 1.0).log_prob(x).sum(-1) + dist.Normal(x.square().sum(-1), 1.0).log_prob(torch.tensor(2.0))
    expected = (frozen.get_posterior().log_prob(moving) - joint).mean()
    gradients = torch.autograd.grad(expected, list(guide.parameters()))
    assert_close(own, torch.cat([gradient.flatten() for gradient in gradients]), rtol=1e-3, atol=1e-3)


@both_affine
def test_path_gradient_has_the_expectation_of_the_total_one(affine):
    guide = strong(small(vector, affine=affine, path_gradient=True))
    total = load(small(vector, affine=affine), guide.state_dict())
    ready(total)
    loss = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=0)
    differences = torch.stack(
        [loss_gradients(vector, guide, loss, s) - loss_gradients(vector, total, loss, s) for s in range(10)]
    )
    error = differences.std(0) / math.sqrt(10)
    assert (error > 1e-4).sum() > 20
    assert ((differences.mean(0) / error.clamp(min=1e-6)).abs() < 7.0).all()


@both_affine
def test_path_gradient_vanishes_where_the_guide_is_exact(affine):
    def model():
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -2.0]), 0.5).to_event(1))

    values = {"z": torch.tensor([1.0, -2.0])}
    settings = {"affine": affine, "init_loc_fn": init_to_value(values=values), "init_scale": 0.5}
    for path in ({}, {"path_gradient": True}, {"path_gradient": True, "overdispersion": 3.0}):
        pyro.clear_param_store()
        guide = ready(small(model, **path, **settings))
        if guide._stretching is not None:
            guide.tails.data.fill_(-math.inf)  # those of a Gaussian
        largest = loss_gradients(model, guide, Trace_ELBO()).abs().max()
        assert (largest < 1e-6) == bool(path)


def test_overdispersion(dtype):
    """Samples are stretched in training alone, after the warm-up."""
    guide = ready(small(vector, solver=COARSE, init_scale=0.5, path_gradient=True, overdispersion=3.0, warm_up=1))
    guide.tails.data.fill_(-math.inf)  # those of a Gaussian

    def mean_square():
        with pyro.plate("particles", 1000, dim=-1):
            z = guide()["z"].detach()
        loc = guide.affine[:, 0].detach() * autoguide._AFFINE_RATE
        return float((z - loc).square().mean() / 0.25)

    stretched = pytest.approx(13 / 3, abs=0.5)  # the mean of u^2 for u from 1 to 3
    plain = pytest.approx(1.0, abs=0.1)
    with torch.no_grad():
        assert mean_square() == plain
    assert mean_square() == plain  # warms up
    assert mean_square() == stretched
    assert Predictive(vector, guide=guide, num_samples=1000, parallel=True)()["z"].var() < 0.5
    guide.eval()
    assert mean_square() == plain
    for clone in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        guide = clone.train()
        assert mean_square() == stretched


@pytest.mark.parametrize("num_transforms", [1, 2])
def test_stretched_samples_are_scored_by_the_guide(num_transforms, dtype, independent_samples):
    guide = strong(small(vector, num_transforms=num_transforms, solver=FINE, path_gradient=True, overdispersion=3.0))
    values = []
    for training in (True, False):
        guide.train(training)
        pyro.set_rng_seed(5)
        with pyro.plate("particles", 4, dim=-1):
            trace = poutine.trace(guide).get_trace()
        trace.compute_log_prob()
        site = trace.nodes[LATENT]
        values.append(site["value"].detach())
        expected = guide.get_posterior().log_prob(values[-1])
        assert_close(site["log_prob"], expected, rtol=1e-4, atol=1e-4)
    assert ((values[0] - values[1]).abs() > 1e-3).any(-1).all()


def fit_by_path(model, steps=150, **settings):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoHollowCNF(model, path_gradient=True, hidden_dims=[8, 8], warm_up=50, **settings)
    optimizer = ClippedAdam({"lr": 0.02, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=32, vectorize_particles=True))
    for _ in range(steps):
        svi.step()
    return guide.eval()


def test_overdispersion_finds_the_tails():
    """A posterior with exponential tails, on which Gaussian ones end too early."""

    def model():
        pyro.sample("z", dist.Laplace(torch.zeros(2), 1.0).to_event(1))

    def spread(**settings):
        guide = fit_by_path(model, **settings)
        with torch.no_grad():
            return float(guide.get_posterior().sample((20000,)).abs().quantile(0.999))

    exact = -math.log(0.001)
    assert abs(spread(overdispersion=2.0) - exact) < abs(spread() - exact)


@pytest.mark.parametrize("slope", [1e3, math.nan], ids=["steep", "undefined"])
def test_stretched_samples_do_not_outweigh_the_others(slope):
    """Where samples of the guide hardly ever lie, the model's gradient is large or undefined."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        alias = z.view_as(z)
        if alias.requires_grad:
            alias.register_hook(lambda gradient: torch.where(alias.abs() > 4.0, slope * alias.sign(), gradient))
        pyro.factor("cliff", 0.0 * alias.sum(-1))

    guide = fit_by_path(model, overdispersion=3.0)
    z = guide.get_posterior().sample((20000,))
    assert_close(z.std(0), torch.ones(3), rtol=0.2, atol=0.0)


# The penalty


@pytest.mark.parametrize("num_transforms", [1, 2])
def test_penalty(dtype, num_transforms, independent_samples):
    weight = 0.3
    make = partial(small, vector, num_transforms=num_transforms)
    guide = strong(make(penalty=weight))
    plain = ready(load(make(), guide.state_dict()))
    loss = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)

    def run(candidate):
        pyro.set_rng_seed(4)
        candidate.zero_grad()
        value = loss.loss_and_grads(vector, candidate)
        return value, {name: parameter.grad for name, parameter in candidate.named_parameters()}

    (value, gradient), (plain_value, plain_gradient) = run(guide), run(plain)
    pyro.set_rng_seed(4)
    guide.get_posterior().rsample((4,))
    regularizations = [flow.regularization for flow in guide.flows]
    extra = weight * sum((r.kinetic + r.diagonal + r.hollow).mean() for r in regularizations)
    assert extra > 0.01
    tolerance = {} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(torch.tensor(value - plain_value), extra.detach(), **tolerance)
    flows = dict(guide.flows.named_parameters())
    explicit = torch.autograd.grad(extra, list(flows.values()))
    for name, expected in zip(flows, explicit, strict=True):
        assert_close(gradient[f"flows.{name}"] - plain_gradient[f"flows.{name}"], expected, **tolerance)
    assert_close(gradient["affine"], plain_gradient["affine"], **tolerance)
    with torch.no_grad():
        values = []
        for candidate in (guide, plain):
            pyro.set_rng_seed(4)
            values.append(loss.loss(vector, candidate))
    assert values[0] == pytest.approx(values[1], rel=1e-9 if dtype is torch.float64 else 1e-4)


def test_diagnose_ignores_the_penalty():
    pytest.importorskip("arviz")
    from pyro_hollow.infer import diagnose

    guide = strong(small(vector, penalty=100.0))  # of several nats by weight one
    plain = ready(load(small(vector), guide.state_dict()))
    first, second = (diagnose(vector, candidate, num_samples=500) for candidate in (guide, plain))
    assert first.elbo == pytest.approx(second.elbo, abs=5 * (first.elbo_error + second.elbo_error))
    assert first.elbo_error < 1.0


@pytest.mark.parametrize("warm_up", [0, 2])
def test_penalty_in_training(warm_up):
    guide = small(hierarchy, penalty=0.1, warm_up=warm_up)
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(hierarchy, guide, Adam({"lr": 0.01}), loss)
    x = torch.randn(2, 4)
    assert all(math.isfinite(svi.step(x)) for _ in range(5))


# Plates, events and supports


def weights(model, guide, *args):
    """log p - log q of a run of the guide."""
    guide_trace = poutine.trace(guide).get_trace(*args)
    model_trace = poutine.trace(poutine.replay(model, guide_trace)).get_trace(*args)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()

    def total(trace):
        return [site["log_prob"] for site in trace.nodes.values() if site["type"] == "sample"]

    return guide_trace, total(model_trace), total(guide_trace)


def per_particle(log_probs, n):
    """Sums all but the outermost of three batch dimensions."""
    return sum(value.reshape(n, -1).sum(-1) if value.dim() == 3 else value.sum().expand(n) for value in log_probs)


@both_affine
def test_vectorised_particles_equal_sequential_ones(dtype, affine):
    x, n = torch.randn(2, 4), 5
    guide = strong(small(hierarchy, solver=FINE, affine=affine), x)
    with torch.no_grad():
        with pyro.plate("particles", n, dim=-3):
            trace, model_terms, guide_terms = weights(hierarchy, guide, x)
        together = per_particle(model_terms, n) - per_particle(guide_terms, n)
        latent = trace.nodes[LATENT]["value"].reshape(n, -1)
        single = []
        for particle in latent:
            conditioned = poutine.condition(guide, {LATENT: particle})
            trace, model_terms, guide_terms = weights(hierarchy, conditioned, x)
            single.append(sum(t.sum() for t in model_terms) - sum(t.sum() for t in guide_terms))
            for name, shape in HIERARCHY.items():
                assert trace.nodes[name]["value"].shape == shape
    assert together.std() > 0.1
    assert_close(together, torch.stack(single), rtol=1e-3, atol=1e-2)


def test_vectorised_elbo_equals_the_sequential_one():
    x = torch.randn(2, 4)
    guide = ready(small(hierarchy, init_scale=0.02), x)
    means = []
    with torch.no_grad():
        for vectorize in (True, False):
            loss = Trace_ELBO(num_particles=100, vectorize_particles=vectorize, max_plate_nesting=2)
            means.append(loss.loss(hierarchy, guide, x))
        loss = Trace_ELBO(max_plate_nesting=2)
        spread = torch.tensor([loss.loss(hierarchy, guide, x) for _ in range(30)]).std().item()
    assert means[0] == pytest.approx(means[1], abs=5 * spread * math.sqrt(2 / 100))


def test_shapes_are_those_of_pyros_guides():
    x = torch.randn(2, 4)
    guide, normal = strong(small(hierarchy, solver=COARSE), x), ready(AutoDiagonalNormal(hierarchy), x)
    assert guide.latent_dim == 1 + 2 + 2 + 24 + 4

    def shapes(values):
        return {name: tuple(value.shape) for name, value in values.items()}

    assert shapes(guide(x)) == shapes(normal(x)) == HIERARCHY
    assert shapes(guide.median()) == shapes(normal.median())
    levels = [0.1, 0.5, 0.9]
    assert shapes(guide.quantiles(levels)) == shapes(normal.quantiles(levels))
    with pyro.plate("particles", 5, dim=-3), pyro.plate("more", 2, dim=-4):
        assert shapes(guide(x)) == shapes(normal(x))


PRIORS = {
    "Normal": dist.Normal(0.0, 1.0),
    "LogNormal": dist.LogNormal(0.0, 1.0),
    "HalfCauchy": dist.HalfCauchy(1.0),
    "Beta": dist.Beta(2.0, 3.0),
    "Gamma": dist.Gamma(2.0, 3.0),
    "Uniform": dist.Uniform(-1.0, 2.0),
}


def typed(prior, dtype):
    """The same prior with parameters of another type."""
    parameters = {name: getattr(prior, name).to(dtype) for name in prior.arg_constraints}
    return type(prior)(**parameters)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_density_in_the_support_integrates_to_one(prior):
    prior = typed(prior, torch.float64)

    def model():
        pyro.sample("z", prior)

    guide = strong(small(model, solver=FINE, init_scale=0.3))
    with torch.no_grad():
        loc, scale = guide.get_transform()(torch.zeros(1)).item(), guide.get_posterior().sample((200,)).std().item()
        grid = torch.linspace(loc - 12 * scale, loc + 12 * scale, 801)
        with pyro.plate("grid", len(grid), dim=-1):
            trace = poutine.trace(poutine.condition(guide, {LATENT: grid.unsqueeze(-1)})).get_trace()
    trace.compute_log_prob()
    density = (trace.nodes[LATENT]["log_prob"] + trace.nodes["z"]["log_prob"]).exp()
    value = trace.nodes["z"]["value"]
    assert prior.support.check(value).all()
    assert torch.trapezoid(density, value).item() == pytest.approx(1.0, abs=5e-3)


VECTOR_PRIORS = {
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(4)),
    "LKJ": lambda: dist.LKJCholesky(3, torch.tensor(1.0)),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3)),
    "matrix": lambda: dist.Gamma(2.0, torch.ones(2, 3)).to_event(2),
    "plain batch in a plate": lambda: dist.Beta(torch.ones(3, 1), 1.0).expand([3, 2]).to_event(1),
}


@pytest.mark.parametrize("prior", VECTOR_PRIORS.values(), ids=VECTOR_PRIORS)
def test_supports(dtype, prior):
    def model():
        with pyro.plate("rows", 3):
            z = pyro.sample("z", prior() if prior().batch_shape else prior().expand([3]))
            total = z.sum(tuple(range(-prior().event_dim, 0)))
            pyro.sample("x", dist.Normal(total, 1.0), obs=torch.ones(3))

    guide = strong(small(model))
    with torch.no_grad():
        value = guide()["z"]
    assert value.dtype is dtype
    assert value.shape == (3, *prior().event_shape)
    assert prior().support.check(value).all()
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(model, guide, Adam({"lr": 1e-3}), loss)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    latent = guide.get_posterior().sample()
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(guide, {LATENT: latent})).get_trace()
    trace.compute_log_prob()
    (unconstrained,) = (u for _, u in guide._unpack_latent(latent))
    ladj = biject_to(prior().support).log_abs_det_jacobian(unconstrained, trace.nodes["z"]["value"])
    assert_close(trace.nodes["z"]["log_prob"].sum(), -ladj.sum())


# Subsampled data


def test_subsampled_data():
    data = torch.randn(50) + 2.0
    guide = small(data_model, warm_up=0)
    svi = SVI(data_model, guide, Adam({"lr": 0.05}), Trace_ELBO(num_particles=2))
    for _ in range(80):
        svi.step(data, 10)
    assert guide.median()["loc"] == pytest.approx(data.mean().item(), abs=0.3)


def test_subsampled_data_with_plates_of_its_own():
    data = torch.randn(50) + 2.0
    drawn = []

    def create_plates(data, subsample_size):
        drawn.append(pyro.plate("data", len(data), subsample_size=subsample_size))
        return drawn[-1]

    guide = small(data_model, create_plates=create_plates)
    svi = SVI(data_model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(data, 10)) for _ in range(3))
    trace = poutine.trace(guide).get_trace(data, 10)
    model_trace = poutine.trace(poutine.replay(data_model, trace)).get_trace(data, 10)
    index = model_trace.nodes["data"]["value"]
    assert len(index) == 10 and torch.equal(index, drawn[-1].indices)


@pytest.mark.parametrize("warm_up", [0, 5])
def test_local_latents_of_a_subsampled_plate_are_refused(warm_up):
    data = torch.randn(50)
    guide = small(local_model, warm_up=warm_up)
    with pytest.raises(NotImplementedError, match="'data'.*10 of 50"):
        guide(data, 10)
    ready(small(local_model), data)  # all of the data is fine


def test_a_refused_guide_stays_refused():
    data = torch.randn(50)
    guide = small(local_model)
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="'data'"):
            guide(data, 10)


def test_a_refused_state_stays_refused():
    state = ready(small(partial(vector, 3))).state_dict()
    pyro.clear_param_store()
    fresh = load(small(partial(vector, 4)), state)
    for _ in range(2):
        with pytest.raises(ValueError, match="3 latents.*has 4"):
            fresh()


def test_beside_a_guide_of_local_latents():
    data = torch.randn(50) + 2.0

    def create_plates(data, subsample_size):
        return pyro.plate("data", len(data), subsample_size=subsample_size)

    guide = AutoGuideList(local_model, create_plates=create_plates)
    guide.append(small(poutine.block(local_model, expose=["loc"])))
    guide.append(AutoNormal(poutine.block(local_model, expose=["z"])))
    svi = SVI(local_model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(80):
        svi.step(data, 10)
    assert guide.median(data, 10)["loc"] == pytest.approx(data.mean().item(), abs=0.6)


def test_beside_an_amortised_flow():
    """As the docstring shows, with the plate that the list has made."""
    data, size = torch.randn(20, 1) + 2.0, 20
    flow = conditional_hollow_cnf(1, 1, hidden_dims=[8, 8], solver=QUICK)

    def model(batch):
        loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        with pyro.plate("data", size, subsample=batch):
            z = pyro.sample("z", dist.Normal(loc, torch.ones(1)).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=batch)

    def local_guide(batch):
        pyro.module("flow", flow)
        base = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        with guide.plates["data"]:
            pyro.sample("z", dist.TransformedDistribution(base.expand(batch.shape[:1]), [flow.condition(batch)]))

    guide = AutoGuideList(model, create_plates=lambda batch: pyro.plate("data", size, subsample=batch))
    guide.append(small(poutine.block(model, expose=["loc"])))
    guide.append(local_guide)
    svi = SVI(model, guide, Adam({"lr": 0.03}), Trace_ELBO())
    losses = [svi.step(data[torch.randperm(size)[:5]]) for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert guide[0].median()["loc"] == pytest.approx(2.0, abs=1.0)


# Medians and quantiles


@both_affine
@pytest.mark.parametrize("d", [1, 5])
def test_quantiles_of_a_normal(dtype, d, affine):
    guide = ready(small(partial(vector, d), affine=affine))
    with torch.no_grad():
        guide.affine.add_(0.3 * torch.randn_like(guide.affine))
        transform = guide.get_transform()
        loc = transform(torch.zeros(d))
        columns = torch.stack([transform(row) - loc for row in torch.eye(d)], dim=-1)
    scale = columns.square().sum(-1).sqrt()
    levels = [0.05, 0.3, 0.5, 0.95]
    expected = dist.Normal(loc, scale).icdf(torch.tensor(levels).unsqueeze(-1))
    assert expected.dtype is dtype
    for given in (levels, torch.tensor(levels)):
        quantiles = guide.quantiles(given)["z"]
        assert_close((quantiles - expected) / scale, torch.zeros(4, d), rtol=0, atol=0.06)
    assert_close((guide.median()["z"] - loc) / scale, torch.zeros(d), rtol=0, atol=0.06)


def test_quantiles_of_a_strong_flow():
    guide = strong(small(hierarchy, num_transforms=2, solver=COARSE))
    levels = [0.1, 0.5, 0.8]
    quantiles = guide.quantiles(levels)
    # Of samples of the sites themselves: the transforms are monotone where they act on each coordinate alone.
    with torch.no_grad(), pyro.plate("particles", 2000, dim=-3):
        samples = guide()
    for name in ("scale", "offset", "local", "row"):
        values = samples[name].reshape(2000, -1)
        own = quantiles[name].reshape(3, -1)
        for level, row in zip(levels, own, strict=True):
            assert_close((values <= row).double().mean(0), torch.full_like(row, level), rtol=0, atol=0.05)
    assert_close(quantiles["simplex"].sum(-1), torch.ones(3))


def test_quantiles_are_deterministic_and_draw_nothing():
    guide = strong(small(constrained))
    pyro.set_rng_seed(6)
    expected = torch.rand(3)
    first = guide.quantiles([0.2, 0.5])
    pyro.set_rng_seed(6)
    second, median = guide.quantiles([0.2, 0.5]), guide.median()
    assert torch.equal(torch.rand(3), expected)
    for name in first:
        assert torch.equal(first[name], second[name])
        assert torch.equal(median[name], first[name][1])
        assert not median[name].requires_grad
    assert (first["scale"][0] < first["scale"][1]).all()


def test_quantiles_before_the_first_call():
    def model(count):
        pyro.sample("z", dist.Normal(torch.arange(count) + 0.0, 1.0).to_event(1))

    guides = []
    for early in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guides.append(small(model))
        if early:
            median = guides[0].median(3)
            assert median["z"].shape == (3,)
        else:
            ready(guides[1], 3)
    assert torch.equal(guides[0].median()["z"], guides[1].median()["z"])


# Pyro's tools


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_predictive(dtype, parallel):
    x = torch.randn(2, 4)
    guide = strong(small(hierarchy, solver=COARSE), x)
    n = 400 if parallel else 6
    predictive = Predictive(hierarchy, guide=guide, num_samples=n, parallel=parallel)
    samples = predictive()
    assert samples["x"].shape == (n, 2, 4) and samples["x"].dtype is dtype
    if parallel:
        samples = Predictive(hierarchy, guide=guide, num_samples=n, parallel=True, return_sites=("scale", "local"))()
        assert samples["local"].shape == (n, 2, 4, 3)
        share = (samples["scale"].reshape(n) <= guide.median()["scale"]).to(dtype).mean()
        assert share == pytest.approx(0.5, abs=0.15)


def test_neutra():
    guide = strong(small(constrained, solver=Solver("rk4", options={"step_size": 0.5})))
    neutra = NeuTraReparam(guide)
    model = neutra.reparam(constrained)
    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    (z,) = (site["value"] for name, site in trace.nodes.items() if name.endswith("_shared_latent"))
    # The density of what is sampled: that of the model in the unconstrained space, and the flow's log-determinant.
    transform = guide.get_transform()
    unconstrained = transform(z)
    expected = transform.log_abs_det_jacobian(z, unconstrained)
    values = {}
    for site, u in guide._unpack_latent(unconstrained):
        bijection = biject_to(site["fn"].support)
        values[site["name"]] = bijection(u)
        expected = expected + bijection.log_abs_det_jacobian(u, bijection(u)).sum()
    expected = expected + poutine.trace(poutine.condition(constrained, values)).get_trace().log_prob_sum()
    assert_close(trace.log_prob_sum(), expected)

    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_samples=8, warmup_steps=8, disable_progbar=True)
    mcmc.run()
    (latent,) = mcmc.get_samples().values()
    with torch.no_grad():
        samples = neutra.transform_sample(latent)
    assert samples["simplex"].shape == (8, 3) and samples["scale"].shape == (8,)
    assert (samples["scale"] > 0).all() and samples["scale"].unique().numel() > 1


@pytest.mark.parametrize("warm_up", [0, 3])
def test_guide_list(warm_up):
    guide = AutoGuideList(constrained)
    guide.append(AutoNormal(poutine.block(constrained, expose=["share"])))
    guide.append(small(poutine.block(constrained, hide=["share"]), warm_up=warm_up))
    own = guide[1]
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(constrained, guide, Adam({"lr": 0.01}), loss)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    before = flow_state(own)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    assert moved(own, before)
    assert set(guide.median()) == set(guide.quantiles([0.5])) == {"scale", "share", "simplex"}
    assert own.latent_dim == 3
    clone = copy.deepcopy(guide)
    assert_close(clone[1].median(), own.median())
    assert_close(load(clone, guide.state_dict()).median(), guide.median())


def test_two_in_a_guide_list():
    guide = AutoGuideList(constrained)
    for names in (["scale"], ["share", "simplex"]):
        guide.append(small(poutine.block(constrained, expose=names)))
    svi = SVI(constrained, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(3))
    for part in guide:
        before = flow_state(part)
        svi.step()
        assert moved(part, before)


def test_beside_a_guide_of_discrete_latents():
    def model():
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("data", 4):
            kind = pyro.sample("kind", dist.Bernoulli(share).expand([4]))
            pyro.sample("x", dist.Normal(kind, 1.0), obs=torch.tensor([0.0, 1.0, 0.5, 1.5]))

    guide = AutoGuideList(model)
    guide.append(small(poutine.block(model, hide=["kind"])))
    guide.append(AutoDiscreteParallel(poutine.block(model, expose=["kind"])))
    svi = SVI(model, guide, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    assert all(math.isfinite(svi.step()) for _ in range(3))


def test_block():
    guide = strong(small(poutine.block(constrained, hide=["share"])))
    assert set(guide()) == {"scale", "simplex"}
    assert LATENT in poutine.trace(guide).get_trace()
    assert LATENT not in poutine.trace(poutine.block(guide, hide=[LATENT])).get_trace()


def test_model_with_random_parameters():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))

        def forward(self, x):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=x[:, 0])

    model, x = Regression(), torch.randn(5, 2)
    guide = small(model)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(x)) for _ in range(3))
    assert not any("model" in name for name, _ in guide.named_parameters())
    assert guide.latent_dim == 2


ELBOS = {
    "Trace_ELBO": Trace_ELBO,
    "vectorised": partial(Trace_ELBO, num_particles=3, vectorize_particles=True),
    "TraceMeanField_ELBO": TraceMeanField_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "TraceEnum_ELBO": partial(TraceEnum_ELBO, strict_enumeration_warning=False, max_plate_nesting=2),
    "RenyiELBO": partial(RenyiELBO, alpha=0.5, num_particles=3),
    "RenyiELBO, vectorised": partial(RenyiELBO, alpha=0.5, num_particles=3, vectorize_particles=True),
}


@pytest.mark.parametrize("penalty", [0.0, 0.1], ids=["plain", "penalty"])
@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
def test_objectives(elbo, penalty):
    x = torch.randn(2, 4)
    guide = ready(small(hierarchy, penalty=penalty), x)
    svi = SVI(hierarchy, guide, Adam({"lr": 0.01}), elbo())
    assert math.isfinite(svi.step(x))
    before = flow_state(guide)
    assert math.isfinite(svi.step(x)) and moved(guide, before)
    assert math.isfinite(svi.evaluate_loss(x))


def test_elbo_as_a_module():
    with pyro.settings.context(module_local_params=True):
        guide = small(vector, warm_up=2)
        loss = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0)(vector, guide)
        ready(guide)
        before = flow_state(guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            assert math.isfinite(value.item()) and moved(guide, before) == (step >= 2)
    assert not pyro.get_param_store()
    assert {f"guide.{name}" for name, _ in guide.named_parameters()} == {name for name, _ in loss.named_parameters()}


def test_the_parameter_store_holds_all_parameters():
    guide = ready(small(vector, num_transforms=2))
    SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert {id(value) for value in stored(guide)} == {id(value) for value in guide.parameters()}


# Copies and files


def density(guide, x):
    with torch.no_grad():
        return guide.get_posterior().log_prob(x)


@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
def test_deepcopy(used):
    guide = small(constrained, num_transforms=2)
    if used:
        svi = SVI(constrained, strong(guide), Adam({"lr": 0.01}), Trace_ELBO())
        svi.step()
    model = guide.model
    clone = copy.deepcopy(guide)
    assert guide.model is model and clone.model is not None
    ready(guide)
    pyro.clear_param_store()  # or Pyro lets guides of one name share parameters
    ready(clone)
    x = torch.randn(3, 4)
    if used:
        assert_close(density(clone, x), density(guide, x), rtol=0, atol=0)
        pyro.clear_param_store()
        before = density(guide, x)
        SVI(constrained, clone, Adam({"lr": 0.1}), Trace_ELBO()).step()
        assert torch.equal(density(guide, x), before) and not torch.equal(density(clone, x), before)
        svi.step()
    assert not {id(p) for p in guide.flows.parameters()} & {id(p) for p in clone.flows.parameters()}
    if used:
        assert guide.affine is not clone.affine


@pytest.mark.parametrize("settings", [{}, {"num_transforms": 2}, {"affine": "diagonal"}, {"penalty": 0.1}], ids=str)
@pytest.mark.parametrize("d", [1, 3])
def test_state_of_a_guide_that_was_not_called(dtype, d, settings):
    model = partial(vector, d)
    guide = strong(small(model, **settings))
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    pyro.clear_param_store()
    fresh = load(small(model, **settings), torch.load(file))
    assert same_parameters(fresh, guide)
    ready(fresh)
    assert same_parameters(fresh, guide)
    x = torch.randn(3, d)
    assert torch.equal(density(fresh, x), density(guide, x))
    assert_close(fresh.median(), guide.median(), rtol=0, atol=0)
    pyro.clear_param_store()
    SVI(model, fresh, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert not torch.equal(density(fresh, x), density(guide, x))


def test_state_of_another_size():
    state = ready(small(partial(vector, 3))).state_dict()
    pyro.clear_param_store()
    fresh = small(partial(vector, 4))
    with pytest.raises(ValueError, match="3 latents.*has 4"):
        load(fresh, state)
        fresh()
    pyro.clear_param_store()
    with pytest.raises((ValueError, RuntimeError), match="size"):
        ready(small(partial(vector, 4))).load_state_dict(state)


@pytest.mark.parametrize("saved, loaded", [("full", "diagonal"), ("diagonal", "full")])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_state_of_another_affine_map(saved, loaded, d):
    state = ready(small(partial(vector, d), affine=saved)).state_dict()
    pyro.clear_param_store()
    fresh = small(partial(vector, d), affine=loaded)
    if d == 1:  # the same
        load(fresh, state)
    else:
        with pytest.raises(ValueError, match="affine"):
            load(fresh, state)


@pytest.mark.parametrize("saved, loaded", [(1.0, 2.0), (2.0, 1.0)])
def test_state_with_and_without_overdispersion(saved, loaded):
    make = partial(small, vector, path_gradient=True)
    state = ready(make(overdispersion=saved)).state_dict()
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="another setting of overdispersion"):
        load(make(overdispersion=loaded), state)
    pyro.clear_param_store()
    guide = load(make(overdispersion=max(1.5 * saved - 0.5, 1.0)), state)
    assert_close(guide.state_dict(), state)


@pytest.mark.parametrize("saved, loaded", [(1.0, 2.0), (2.0, 1.0)])
def test_param_store_with_and_without_overdispersion(saved, loaded):
    make = partial(small, vector, path_gradient=True)
    make(overdispersion=saved)()
    with pytest.raises(ValueError, match="another setting of overdispersion"):
        make(overdispersion=loaded)()


def test_overdispersion_needs_all_the_data():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample_size=10) as batch:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.ones(100)[batch])

    small(model, path_gradient=True)()
    pyro.clear_param_store()
    guide = small(model, path_gradient=True, overdispersion=2.0)
    for _ in range(2):
        with pytest.raises(ValueError, match="overdispersion.*'data' subsamples 10 of 100"):
            guide()


def test_state_of_another_number_of_flows():
    state = ready(small(vector)).state_dict()
    pyro.clear_param_store()
    with pytest.raises(RuntimeError, match="flows.1"):
        small(vector, num_transforms=2).load_state_dict(state)


def test_state_in_a_module_that_holds_the_guide():
    """The key has a prefix."""

    class Holder(PyroModule):
        def __init__(self):
            super().__init__()
            self.guide = small(vector)

    guide = strong(small(vector))
    holder = Holder()
    holder.load_state_dict({f"guide.{name}": value for name, value in guide.state_dict().items()})
    assert same_parameters(holder.guide, guide)


def test_pickle_after_use():
    guide = strong(small(constrained))
    SVI(constrained, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    guide.get_posterior().rsample()
    clone = pickle.loads(pickle.dumps(guide))
    assert guide.model is not None
    assert same_parameters(clone, guide)
    assert_close(clone.median(), guide.median(), rtol=0, atol=0)
    x = torch.randn(3, 4)
    assert torch.equal(density(clone, x), density(guide, x))
    # With its whole self through a file, as torch users do.
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    assert same_parameters(torch.load(file, weights_only=False), guide)
    guide()


SCRIPT = """
import sys
import pyro, pyro.distributions as dist, torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from pyro_hollow import Solver
from pyro_hollow.infer import AutoHollowCNF

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)

def model():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z.square().sum(-1), s), obs=torch.tensor(2.0))

folder, action = sys.argv[1:]
solver = Solver("rk4", options={"step_size": 0.25})
x = torch.linspace(-1, 1, 8).view(2, 4)
for way in ("store", "state"):
    file = f"{folder}/{way}"
    pyro.clear_param_store()
    guide = AutoHollowCNF(model, [8, 8], num_transforms=2, solver=solver, warm_up=3)
    optim = Adam({"lr": 0.05})
    if action == "save":
        pyro.set_rng_seed(0)
        svi = SVI(model, guide, optim, Trace_ELBO())
        for _ in range(6):
            svi.step()
        if way == "state":
            torch.save(guide.state_dict(), file)
        else:
            pyro.get_param_store().save(file)
        torch.save(guide.get_posterior().log_prob(x).detach(), file + ".density")
    else:
        pyro.set_rng_seed(1)
        if way == "state":
            guide.load_state_dict(torch.load(file))
        else:
            pyro.get_param_store().load(file)
        with torch.no_grad():
            guide()
        density = guide.get_posterior().log_prob(x).detach()
        torch.testing.assert_close(density, torch.load(file + ".density"))
        before = {key: value.detach().clone() for key, value in guide.named_parameters()}
        svi = SVI(model, guide, optim, Trace_ELBO())
        svi.step()
        still = [key for key, value in guide.named_parameters() if torch.equal(value, before[key])]
        assert not still, f"{way}: do not learn any more: {still}"
"""


@pytest.mark.slow
def test_a_new_process(tmp_path, monkeypatch):
    """Of what is saved here, by the guide's state and by Pyro's store; AutoMultivariateNormal passes with the store."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), "save"])
    runpy.run_path(str(script))
    command = [sys.executable, "-W", "error::UserWarning", str(script), str(tmp_path), "load"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr[-2000:]


def test_parameter_store_in_this_process():
    """What a new process does, quickly: the flows must come back as the affine map does, and learn on."""
    guide = strong(small(vector))
    SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    x = torch.randn(3, 3)
    expected = density(guide, x)
    file = io.BytesIO()
    torch.save(pyro.get_param_store().get_state(), file)
    pyro.clear_param_store()
    file.seek(0)
    pyro.get_param_store().set_state(torch.load(file, weights_only=False))
    fresh = ready(small(vector))
    assert_close(density(fresh, x), expected)
    before = flow_state(fresh)
    SVI(vector, fresh, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert moved(fresh, before)


OTHER_SETTINGS = {
    "diagonal": ({}, {"affine": "diagonal"}),
    "full": ({"affine": "diagonal"}, {}),
    "fewer flows": ({"num_transforms": 2}, {}),
    "more flows": ({}, {"num_transforms": 2}),
    "other layers": ({}, {"hidden_dims": [4]}),
    "other conditioner": ({}, {"conditioner": "leave-one-out"}),
}


@pytest.mark.parametrize("saved, loaded", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_parameter_store_of_other_settings(saved, loaded):
    """Pyro would use what fits of it, and the guide be wrong without a word."""
    settings = {"hidden_dims": [3, 2], "warm_up": 0}

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    AutoHollowCNF(model, **{**settings, **saved})()
    other = AutoHollowCNF(model, **{**settings, **loaded})
    for _ in range(2):  # not at the first call alone
        with pytest.raises(ValueError, match="store has the parameters of a guide .* with other settings"):
            other()
    pyro.clear_param_store()
    assert other()["z"].shape == (2,)


def test_parameter_store_of_another_model():
    def model(d):
        pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))

    AutoHollowCNF(model, [3, 2], warm_up=0)(2)
    with pytest.raises(ValueError, match="another number of latents"):
        AutoHollowCNF(model, [3, 2], warm_up=0)(3)


def test_retraining_after_the_store_was_cleared():
    guide = strong(small(vector))
    SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    pyro.clear_param_store()
    before = flow_state(guide)
    SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert moved(guide, before)


# Settings


@pytest.mark.parametrize("called", [True, False], ids=["called", "not called"])
def test_solver_can_be_changed(called):
    guide = small(vector, num_transforms=2)
    if called:
        strong(guide)
    assert guide.solver is QUICK
    guide.solver = FINE
    ready(guide)
    assert guide.solver is FINE and all(flow.solver is FINE for flow in guide.flows)
    guide.get_posterior().rsample((2,))
    assert guide.flows[1].last_solve.nfe >= 40
    guide.solver = QUICK
    guide.get_posterior().rsample((2,))
    assert guide.flows[1].last_solve.nfe <= 20


def test_a_change_of_solver_survives_copies():
    guide = strong(small(vector))
    guide.solver = FINE
    assert copy.deepcopy(guide).solver == FINE
    fresh = small(vector)
    fresh.solver = FINE
    assert load(fresh, guide.state_dict()).flows[0].solver is FINE


def test_default_solver():
    guide = ready(AutoHollowCNF(vector, [4]))
    assert guide.solver == Solver("dopri5", rtol=1e-3, atol=1e-3)
    assert guide.flows[0].solver is guide.solver


@pytest.mark.parametrize("name, converted", [("double", torch.float64), ("float", torch.float32)])
def test_conversion(dtype, name, converted):
    guide = strong(small(constrained, num_transforms=2))
    x = guide.get_posterior().sample((3,))
    expected = density(guide, x)
    getattr(guide, name)()
    x = x.to(converted)
    assert guide.get_posterior().rsample().dtype is converted
    assert guide()["scale"].dtype is converted
    assert_close(density(guide, x), expected.to(converted), rtol=1e-3, atol=1e-3)
    for values in (guide.median(), guide.quantiles([0.1, 0.9])):
        assert all(value.dtype is converted for value in values.values())
    torch.set_default_dtype(converted)
    svi = SVI(constrained, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("called", [True, False], ids=["called", "not called"])
def test_cuda(called):
    x = torch.randn(5)

    def model(x):
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    guide = small(model)
    if called:
        strong(guide, x)
        inputs = guide.get_posterior().sample((3,))
        expected = density(guide, inputs)
        pyro.clear_param_store()
    guide.to("cuda")
    ready(guide, x.cuda())
    if called:
        assert_close(density(guide, inputs.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)
    loss = Trace_ELBO(num_particles=3, vectorize_particles=True)
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss)
    assert all(math.isfinite(svi.step(x.cuda())) for _ in range(3))
    assert all(parameter.is_cuda for parameter in guide.parameters())
    assert guide.median()["z"].is_cuda and guide.quantiles([0.1])["scale"].is_cuda
    assert Predictive(model, guide=guide, num_samples=4, parallel=True)(x.cuda())["x"].is_cuda
    state = {name: value.cpu() for name, value in guide.state_dict().items()}
    pyro.clear_param_store()
    assert same_parameters(load(small(model), state).cuda(), guide)


INVALID = {
    "no flow": ({"num_transforms": 0}, "num_transforms"),
    "affine": ({"affine": "low-rank"}, "affine.*low-rank"),
    "no scale": ({"init_scale": 0.0}, "init_scale"),
    "negative scale": ({"init_scale": -1.0}, "init_scale"),
    "infinite scale": ({"init_scale": math.inf}, "init_scale"),
    "nan scale": ({"init_scale": math.nan}, "init_scale"),
    "negative warm-up": ({"warm_up": -1}, "warm_up"),
    "infinite warm-up": ({"warm_up": math.inf}, "warm_up"),
    "negative penalty": ({"penalty": -0.1}, "penalty"),
    "nan penalty": ({"penalty": math.nan}, "penalty"),
    "penalty without cache": ({"penalty": 0.1, "cache_size": 0}, "cache_size"),
    "transformer": ({"transformer": torch.nn.Linear(34, 1)}, "transformer"),
    "low overdispersion": ({"overdispersion": 0.5, "path_gradient": True}, "overdispersion must.*0.5"),
    "infinite overdispersion": ({"overdispersion": math.inf, "path_gradient": True}, "overdispersion must"),
    "overdispersion alone": ({"overdispersion": 2.0}, "overdispersion needs path_gradient"),
    "overdispersion and penalty": (
        {"overdispersion": 2.0, "path_gradient": True, "penalty": 0.1},
        "overdispersion needs.*no penalty",
    ),
}


@pytest.mark.parametrize("settings, message", INVALID.values(), ids=INVALID)
def test_invalid_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoHollowCNF(vector, **settings)


FLOW_INVALID = {
    "conditioner": ({"conditioner": "none"}, ValueError, "conditioner"),
    "activation": ({"activation": "relu"}, ValueError, "activation"),
    "widths": ({"hidden_dims": [0]}, ValueError, "hidden_dims"),
    "time": ({"time": -1.0}, ValueError, "time"),
    "unknown": ({"width": 3}, TypeError, "width"),
}


@pytest.mark.parametrize("settings, error, message", FLOW_INVALID.values(), ids=FLOW_INVALID)
def test_invalid_arguments_of_the_flow(settings, error, message):
    with pytest.raises(error, match=message):
        AutoHollowCNF(vector, **settings)()


def test_no_latents():
    with pytest.raises(RuntimeError, match="no latent"):
        AutoHollowCNF(lambda: None)()


def test_settings_reach_the_flow():
    guide = ready(AutoHollowCNF(vector, [5], transformer_dim=3, activation="silu", time=2.0))
    (flow,) = guide.flows
    assert flow.time == 2.0 and flow.nn.transformer.activation == "silu" and flow.nn.transformer.width == 3


def test_default_activations():
    (flow,) = ready(AutoHollowCNF(vector)).flows
    assert flow.nn.conditioner.bind().activation is get_activation("silu")
    assert flow.nn.transformer.activation == "tanh"
    assert flow.nn.transformer.max_rate == 4.0


@pytest.mark.parametrize("d, conditioner", [(8, GroupedConditioner), (300, LeaveOneOutConditioner)])
def test_conditioner_by_dimension(d, conditioner):
    model = partial(vector, d)
    guide = ready(small(model, affine="diagonal" if d > 256 else "full"))
    assert type(guide.flows[0].nn.conditioner) is conditioner
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step()) for _ in range(2))


# Learning


def elbo(model, guide, *args, num_particles=1000):
    with torch.no_grad():
        return -Trace_ELBO(num_particles=num_particles, vectorize_particles=True).loss(model, guide, *args)


def fit(model, guide, steps, *args):
    loss = Trace_ELBO(num_particles=16, vectorize_particles=True)
    for lr, share in [(0.03, 2 / 3), (0.005, 1 / 3)]:
        svi = SVI(model, guide, Adam({"lr": lr}), loss)
        for _ in range(round(steps * share)):
            assert math.isfinite(svi.step(*args))
    return guide


@both_affine
def test_dirichlet(affine):
    """Pyro's own example: a conjugate posterior."""
    prior = torch.tensor([0.5, 1.0, 1.5, 3.0])
    data = torch.tensor([0] * 4 + [1] * 2 + [2] * 5)
    posterior = prior + torch.bincount(data, minlength=4)

    def model(data):
        p = pyro.sample("p", dist.Dirichlet(prior))
        with pyro.plate("data_plate", len(data)):
            pyro.sample("data", dist.Categorical(p), obs=data)

    counts = torch.bincount(data, minlength=4)
    evidence = prior.sum().lgamma() - posterior.sum().lgamma() + (posterior.lgamma() - prior.lgamma()).sum()
    assert counts.sum() == len(data)
    guide = fit(model, small(model, warm_up=50, affine=affine), 150, data)
    gap = evidence.item() - elbo(model, guide, data)
    assert -0.02 < gap < 0.1
    with torch.no_grad(), pyro.plate("particles", 2000, dim=-2):
        samples = guide(data)["p"].reshape(2000, 4)
    expected = dist.Dirichlet(posterior)
    assert_close(samples.mean(0), expected.mean, rtol=0, atol=0.02)
    assert_close(samples.std(0), expected.variance.sqrt(), rtol=0.2, atol=0)


def test_learns_what_a_normal_guide_cannot():
    guide = fit(banana, small(banana, warm_up=30), 150)
    normal = fit(banana, AutoMultivariateNormal(banana), 150)
    own = elbo(banana, guide)
    assert own > elbo(banana, normal) + 0.3
    assert own < banana_evidence() + 0.05  # a wrong log-determinant would be rewarded without bound


def test_median_first_in_inference_mode():
    guide = small(vector)
    with torch.inference_mode():
        guide.median()
    SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()


def correlated():
    pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))


@pytest.mark.parametrize("affine", ["full", "diagonal"])
def test_set_affine_makes_the_guide_a_gaussian(affine):
    guide = AutoHollowCNF(correlated, affine=affine).setup()
    loc = torch.tensor([1.0, -2.0, 3.0])
    factor = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [-3.0, 0.2, 4.0]])
    guide.set_affine(loc, factor)
    exact = dist.MultivariateNormal(loc, scale_tril=factor)
    if affine == "diagonal":  # the best one with independent elements
        exact = dist.Normal(loc, exact.precision_matrix.diagonal().rsqrt()).to_event(1)
    z = exact.sample((5,))
    torch.testing.assert_close(guide.get_posterior().log_prob(z), exact.log_prob(z))


def test_set_affine_refuses_other_shapes():
    guide = AutoHollowCNF(correlated).setup()
    with pytest.raises(ValueError, match=r"must have shapes \(3,\) and \(3, 3\), but got \(2,\) and \(2, 2\)"):
        guide.set_affine(torch.zeros(2), torch.eye(2))


def test_guide_is_fresh_until_it_is_trained():
    guide = AutoHollowCNF(correlated).setup()
    assert guide.is_fresh()
    with torch.no_grad():
        guide()
    assert guide.is_fresh()
    SVI(correlated, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert not guide.is_fresh()


def test_tails_without_overdispersion():
    guide = AutoHollowCNF(correlated, tails=True).setup()
    assert guide.tails.shape == (3, 2) and "tails" in guide.state_dict()
    with torch.no_grad():
        far = guide.get_transform()(torch.tensor([[8.0, 0.0, -8.0]])) - guide.get_transform()(torch.zeros(1, 3))
    assert (far[0].abs() > torch.tensor([0.88, -1.0, 0.88])).all()  # 8 of the initial scales of 0.1, and more
    assert not hasattr(AutoHollowCNF(correlated, tails=False, overdispersion=2.0, path_gradient=True).setup(), "tails")
    with pytest.raises(ValueError, match="another setting of overdispersion or tails"):
        AutoHollowCNF(correlated).load_state_dict(guide.state_dict())
