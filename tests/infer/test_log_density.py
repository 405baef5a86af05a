# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import itertools
import math
import os
import random
import signal
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from density_models import MODELS, SUPPORTS, design
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, config_enumerate
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch.distributions import biject_to
from torch.testing import assert_close

from pyro_hollow.infer import LogDensity
from pyro_hollow.infer.compiling import Compilation, _module


def sample_sites(trace):
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def by_handlers(model, prototypes, z, given=None):
    """
    The log density of one particle by Pyro's handlers alone: the sum of a trace's log densities and log-determinants,
    with a sum over all values of discrete sites.
    """
    given = dict(given or {})
    start = sample_sites(poutine.trace(poutine.condition(model, prototypes | given)).get_trace())
    values, total, position = {}, 0.0, 0
    for name in (name for name in start if name in prototypes):
        transform = biject_to(start[name]["fn"].support)
        shape = transform.inv(prototypes[name]).shape
        part = z[position : position + shape.numel()].reshape(shape)
        position += shape.numel()
        values[name] = transform(part)
        total = total + transform.log_abs_det_jacobian(part, values[name]).sum()
    assert position == len(z)
    discrete = [
        name
        for name, site in start.items()
        if name not in prototypes and not site["is_observed"] and not site_is_subsample(site)
    ]
    supports = [start[name]["fn"].enumerate_support(expand=False).reshape(-1) for name in discrete]
    shapes = [start[name]["value"].shape for name in discrete]
    assignments = [itertools.product(each, repeat=shape.numel()) for each, shape in zip(supports, shapes, strict=True)]
    terms = []
    for assignment in itertools.product(*assignments):
        chosen = {
            name: torch.stack(each).reshape(shape)
            for name, each, shape in zip(discrete, assignment, shapes, strict=True)
        }
        conditioned = poutine.condition(model, values | chosen | given)
        terms.append(prune_subsample_sites(poutine.trace(conditioned).get_trace()).log_prob_sum())
    return torch.stack(terms).logsumexp(0) + total


def with_gradient(function, rows):
    """Values and gradients of a function of one row."""
    rows = rows.detach().requires_grad_()
    value = torch.stack([function(row) for row in rows])
    (gradient,) = torch.autograd.grad(value.sum(), rows)
    return value.detach(), gradient


def check(log_density, model, sizes=(1, 5, 32, 70), given=None, seed=0, **tolerance):
    """Compares a density and its gradient with the handlers at random points, which are used again in large batches."""
    tolerance = tolerance or ({"rtol": 1e-8, "atol": 1e-8} if log_density.start.dtype == torch.float64 else {})
    prototypes = log_density.constrain(log_density.start)
    points = log_density.start + 0.5 * torch.randn(3, log_density.dim).to(log_density.start)
    expected = with_gradient(lambda row: by_handlers(model, prototypes, row, given), points)
    for size in sizes:
        index = torch.arange(size) % len(points)
        pyro.set_rng_seed(seed)  # of subsamples
        value, gradient = log_density.value_and_gradient(points[index])
        assert not value.requires_grad and not gradient.requires_grad
        assert_close(value, expected[0][index], **tolerance)
        assert_close(gradient, expected[1][index], **tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_density_is_that_of_the_handlers(name):
    log_density = LogDensity(MODELS[name], compile=False, batch_size=32)
    assert (log_density.backend, log_density.particles, log_density.reason) == ("graph", "plate", "")
    check(log_density, MODELS[name])
    assert log_density.backend == "graph"


@pytest.mark.parametrize("name", ["nested plates", "correlated normal", "enumerated mixture", "in place, views"])
def test_density_in_single_precision(name):
    torch.set_default_dtype(torch.float32)
    log_density = LogDensity(MODELS[name], compile=False, batch_size=32)
    assert (log_density.start.dtype, log_density.backend) == (torch.float32, "graph")
    check(log_density, MODELS[name], sizes=(1, 5), rtol=1e-4, atol=1e-4)


def test_type_is_that_of_the_latents():
    """Data and latents in double precision, in a program whose default is another."""
    x = torch.tensor([0.2, -1.0])

    def model():
        loc = pyro.sample("loc", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(loc, x.new_ones(())), obs=x)

    torch.set_default_dtype(torch.float32)
    log_density = LogDensity(model, compile=False, batch_size=32)
    value, _ = log_density.value_and_gradient(torch.full((3, 1), 0.5, dtype=torch.float64))
    expected = -0.5 * (0.25 + 0.09 + 2.25 + 3 * math.log(2 * math.pi))
    assert_close(value, torch.full((3,), expected, dtype=torch.float64))


@pytest.mark.parametrize("name", SUPPORTS)
def test_density_on_supports(name):
    support = SUPPORTS[name]
    event_shape = torch.Size({0: (), 1: (3,), 2: (3, 3)}[support.event_dim])

    def model():
        with pyro.plate("plate", 2):
            value = pyro.sample("value", dist.ImproperUniform(support, (), event_shape))
            elements = value.reshape(value.shape[: value.dim() - support.event_dim] + (-1,))
            pyro.factor("f", -(elements * torch.arange(1.0, 1.0 + event_shape.numel()) - 0.3).square().sum(-1))

    log_density = LogDensity(model, compile=False, batch_size=32)
    assert (log_density.backend, log_density.particles, log_density.reason) == ("graph", "plate", "")
    check(log_density, model, sizes=(1, 5))
    z = log_density.start + torch.randn(2, 3, log_density.dim)
    values = log_density.constrain(z)
    assert values["value"].shape == (2, 3, 2, *event_shape) and bool(support.check(values["value"]).all())
    assert_close(log_density.unconstrain(values), z)


UNREACHABLE = {
    "lower_cholesky": dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)),
    "positive_definite": dist.ImproperUniform(constraints.positive_definite, (), (2, 2)),
    "sphere": dist.ProjectedNormal(torch.ones(3)),
}


@pytest.mark.parametrize("fn", UNREACHABLE.values(), ids=UNREACHABLE)
def test_support_without_a_bijection_is_refused(fn):
    with pytest.raises(ValueError, match="site 'z' .* no bijection; sample parts .*LKJCholesky.* normal vector"):
        LogDensity(lambda: pyro.sample("z", fn))


def regression(x, y, size=None):
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 2, dim=-2):
        shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x), subsample_size=size, dim=-1) as index:
            pyro.sample("y", dist.Normal(weight * x[index] + shift, 0.5), obs=y[..., index])


def regression_by_subsample(x, y, size=None):
    weight = pyro.sample("weight", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size):
        batch = pyro.subsample(x, event_dim=0)
        pyro.sample("y", dist.Normal(weight * batch, 0.5), obs=pyro.subsample(y[0], event_dim=0))


@pytest.mark.parametrize("model", [regression, regression_by_subsample])
def test_subsamples_are_drawn_for_each_call(model):
    """For any one of them the density is that of the handlers, and on average it is that of all data."""
    x, y = design(1, 6)[0], design(2, 6)
    log_density = LogDensity(model, x, y, 2, compile=False, batch_size=32)
    assert log_density.subsamples == {"data": (6, 2)}
    assert (log_density.backend, log_density.reason) == ("graph", "")
    for seed in range(3):
        pyro.set_rng_seed(seed)
        given = {"data": log_density._density.draw_subsamples()[0]}
        check(log_density, lambda: model(x, y, 2), sizes=(5,), given=given, seed=seed)
    point = log_density.start + 0.5
    values = torch.stack([log_density(point) for _ in range(400)])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean() - LogDensity(model, x, y, compile=False, batch_size=32)(point)) < 4 * error


def test_latents_in_a_subsampled_plate_are_refused():
    def model():
        with pyro.plate("data", 6, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="plate 'data' subsamples 2 of 6, but holds the latent 'z'"):
        LogDensity(model)


def missing_data():
    """Elements that were not observed are latents; the others are masked, and no latents."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    x, seen = torch.tensor([0.3, 0.1, 1.0, 0.1]), torch.tensor([True, False, True, False])
    with pyro.plate("data", 4):
        x = pyro.sample("x", dist.LogNormal(mu, 1.0), obs=x, obs_mask=seen)
        pyro.sample("y", dist.Normal(2.0 * x, 0.5), obs=torch.tensor([0.5, 1.0, 2.0, 0.0]))


def by_hand(z):
    """The density of :func:`missing_data`."""
    mu, x = z[0], torch.stack([torch.tensor(0.3).log(), z[1], torch.tensor(1.0).log(), z[2]]).exp()
    total = dist.Normal(0.0, 1.0).log_prob(mu) + dist.LogNormal(mu, 1.0).log_prob(x).sum() + z[1] + z[2]
    return total + dist.Normal(2.0 * x, 0.5).log_prob(torch.tensor([0.5, 1.0, 2.0, 0.0])).sum()


def test_masked_elements_are_no_latents():
    log_density = LogDensity(missing_data, compile=False, batch_size=32)
    assert (log_density.dim, log_density.backend, log_density.particles) == (3, "graph", "plate")
    points = torch.randn(5, 3)
    for size in (1, 5, 70):
        rows = points[torch.arange(size) % 5]
        expected, slopes = with_gradient(by_hand, rows)
        value, gradient = log_density.value_and_gradient(rows)
        assert_close(value, expected)
        assert_close(gradient, slopes)
    assert_close(log_density.constrain(points)["x_unobserved"][:, [1, 3]], points[:, 1:].exp())
    assert_close(log_density.unconstrain(log_density.constrain(points)), points)


def test_all_latents_masked_is_refused():
    def model():
        with poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="masks all of its latents"):
        LogDensity(model)


def test_subsample_with_masks_and_enumeration_together():
    x = design(1, 6)[0]

    @config_enumerate
    def model():
        shift = pyro.sample("shift", dist.Normal(1.0, 1.0))
        with pyro.plate("data", 6, subsample_size=3) as index, poutine.mask(mask=x[index] > -0.9):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(shift * k, 0.5), obs=x[index])

    log_density = LogDensity(model, compile=False, batch_size=32)
    assert (log_density.backend, log_density.reason) == ("graph", "")
    (index,), point = log_density._density.draw_subsamples(), torch.tensor([0.6])
    kept = x[index] > -0.9
    terms = torch.stack([dist.Normal(0.6 * k, 0.5).log_prob(x[index]) + math.log((0.7, 0.3)[k]) for k in (0, 1)])
    expected = dist.Normal(1.0, 1.0).log_prob(point[0]) + 2 * (terms.logsumexp(0) * kept).sum()
    assert_close(log_density._density.of_one(point, index), expected)
    graph = log_density._runners[32]
    assert_close(graph(point.expand(32, 1), index)[0], expected.expand(32))


def by_item():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 2.0 if z.item() > 0.3 else 0.5), obs=torch.tensor(0.4))


def by_truth():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2):
        pyro.sample("x", dist.Normal(z if z > 0.3 else -z, 1.0), obs=torch.tensor([0.4, 0.1]))


def by_any():
    """Control flow that a plate of particles allows, and mixes."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 2.0 if bool((z > 0.0).any()) else 0.5), obs=torch.tensor(0.4))


def by_numbers():
    """A way around everything that torch records."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0 + abs(z.detach().numpy().item())), obs=torch.tensor(0.4))


def by_selection():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("f", -z[z > 0.1].sum())


def by_position():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("f", -z[(z > 0.1).nonzero().squeeze(-1)].exp().sum())


DECIDES = "the model decides by values of latents"
SHAPES = "has tensors whose shapes depend on values of latents"
CONTROL = {
    "item": (by_item, DECIDES),
    "if": (by_truth, DECIDES),
    "any": (by_any, DECIDES),
    "numpy": (by_numbers, "its control flow depends on values"),
    "mask as index": (by_selection, SHAPES),
    "nonzero": (by_position, SHAPES),
}


@pytest.mark.parametrize("name", CONTROL)
def test_control_flow_by_values_goes_by_the_handlers(name):
    model, reason = CONTROL[name]
    log_density = LogDensity(model)
    assert (log_density.backend, log_density.particles) == ("handlers", "one by one")
    assert "allows no plate of particles" in log_density.reason and reason in log_density.reason
    check(log_density, model)
    assert log_density.backend == "handlers"


def test_control_flow_of_every_particle_in_a_plate():
    """A plate that agrees with particles alone at the first points, whose graph would be wrong elsewhere."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -z if bool((z > 5.0).any()) else z)

    log_density = LogDensity(model, compile=False, batch_size=32)
    assert (log_density.backend, log_density.particles) == ("handlers", "plate")
    assert DECIDES in log_density.reason


def noisy():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z + torch.randn(()), 0.5), obs=torch.tensor(0.4))


def dropped_out():
    z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(torch.nn.functional.dropout(z, 0.5).sum(-1), 0.5), obs=torch.tensor(0.4))


def noisy_python():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z + random.random(), 0.1), obs=torch.tensor(0.4))


RANDOM = {
    "torch": (noisy, "the model draws random numbers (aten.randn"),
    "dropout": (dropped_out, "the model draws random numbers"),
    "Python": (noisy_python, "or on random numbers"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_models_go_by_the_handlers(name):
    model, reason = RANDOM[name]
    log_density = LogDensity(model)
    assert (log_density.backend, log_density.particles) == ("handlers", "one by one")
    assert log_density.reason.startswith("the model is random: two evaluations") and reason in log_density.reason
    point = torch.full((3, log_density.dim), 0.5)
    first, second = log_density(point), log_density(point)
    assert first.isfinite().all() and not torch.allclose(first, second)


def test_random_numbers_that_are_not_used():
    def model():
        torch.randn(3)
        pyro.sample("z", dist.Normal(0.0, 1.0))

    log_density = LogDensity(model, compile=False, batch_size=32)
    assert (log_density.backend, log_density.reason) == ("graph", "")


def test_parameters_are_not_frozen():
    """They keep their gradients, and go by the handlers."""

    def model():
        scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.4))

    log_density = LogDensity(model)
    assert (log_density.backend, log_density.particles) == ("handlers", "plate")
    assert log_density.reason == "the model has parameters (scale), which a graph would freeze"
    z = torch.tensor([[0.3], [1.0]])
    check(log_density, model, sizes=(1, 5))
    (before,) = torch.autograd.grad(log_density(z).sum(), log_density.parameters["scale"])
    assert_close(before, ((z / 2) ** 2 - 1).sum())
    with torch.no_grad():
        log_density.parameters["scale"].fill_(math.log(5.0))
    check(log_density, model, sizes=(1, 5))


@pytest.mark.parametrize("registered", [True, False])
def test_modules_are_not_frozen(registered):
    network = torch.nn.Linear(2, 1)

    def model():
        if registered:
            pyro.module("network", network)
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(network(z).squeeze(-1), 1.0), obs=torch.tensor(0.4))

    log_density = LogDensity(model)
    assert (log_density.backend, log_density.particles) == ("handlers", "plate")
    assert "freeze" in log_density.reason
    check(log_density, model, sizes=(1, 5))
    with torch.no_grad():
        network.weight += 1.0
    check(log_density, model, sizes=(1, 5))


def test_modules_without_gradients_are_data():
    network = torch.nn.Linear(2, 1).requires_grad_(False)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(network(z).squeeze(-1), 1.0), obs=torch.tensor(0.4))

    log_density = LogDensity(model, compile=False, batch_size=32)
    assert (log_density.backend, log_density.reason) == ("graph", "")
    check(log_density, model, sizes=(1, 5))


def mixed_by_a_sum():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("f", -z.exp().sum())


def mixed_by_broadcasting():
    """Particles meet the elements of data."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    fn = dist.Normal((design(2, 2) * z).sum(0), 1.0)
    pyro.factor("f", fn.log_prob(torch.tensor([0.4, 0.1])).sum())


def without_a_plate():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(design(3, 2) @ z, 1.0).to_event(1), obs=torch.tensor([0.4, 0.1, 0.3]))


@pytest.mark.parametrize("model", [mixed_by_a_sum, mixed_by_broadcasting, without_a_plate])
def test_models_that_allow_no_plate_are_mapped(model):
    log_density = LogDensity(model, compile=False, batch_size=32)
    assert (log_density.backend, log_density.particles) == ("graph", "vmap")
    assert "the model allows no plate of particles (" in log_density.reason
    assert ("particles are mixed" in log_density.reason) == (model is not without_a_plate)
    check(log_density, model)


def test_models_that_allow_neither_a_plate_nor_vmap():
    """Each particle is evaluated by a graph of its own, in place though it writes."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        loc = torch.zeros(3)
        loc[:2] = z[:2]
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=torch.tensor([0.4, 0.1, 0.2]))

    log_density = LogDensity(model, compile=False, batch_size=32)
    assert (log_density.backend, log_density.particles) == ("graph", "vmap")  # of the graph of one
    check(log_density, model)
    assert log_density.backend == "graph"


@config_enumerate
def indexed_mixture(x):
    """Written for one particle, as Pyro's tutorials are: no plate outside, and vmap fails in enumeration."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)


def test_graph_of_one_particle_is_mapped_where_enumeration_cannot_be(recwarn):
    x = torch.tensor([-3.0, -2.5, 3.1, 2.0, 2.9])
    log_density = LogDensity(indexed_mixture, x, compile=False, batch_size=32)
    assert (log_density.backend, log_density.particles) == ("graph", "vmap")
    assert "Shape mismatch" in log_density.reason
    z = log_density.start + torch.randn(40, log_density.dim)
    values = log_density.constrain(z)
    weights, loc = values["weights"], values["loc"]
    terms = weights.log().unsqueeze(1) + dist.Normal(loc.unsqueeze(1), 1.0).log_prob(x.unsqueeze(-1))
    joint = terms.logsumexp(-1).sum(-1) + dist.Normal(0.0, 5.0).log_prob(loc).sum(-1)
    # A uniform density of 1, and the log-determinant of the map from one number to the first weight.
    joint = joint + weights.log().sum(-1)
    assert_close(log_density(z), joint)
    assert not recwarn.list


def test_enumeration_where_the_median_of_the_prior_is_no_start():
    @config_enumerate
    def model():
        z = pyro.sample("z", dist.Normal(100.0, 1.0))
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(z + k, 0.01), obs=torch.tensor(0.0))

    assert LogDensity(model, compile=False, batch_size=32).start.item() == 0.0


def test_compilation_ends_with_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_HOLLOW_CACHE", str(tmp_path))
    compilation = Compilation(torch.fx.symbolic_trace(torch.nn.Identity()), [torch.zeros(1)])
    with monkeypatch.context() as patches:
        patches.setattr(os, "getpid", lambda: 0)  # of no process
        compilation.start()
    assert compilation.result(wait=True) is None
    assert compilation.failure.startswith(f"status {-signal.SIGKILL}") and not compilation.exists


def test_support_that_depends_on_latents_is_refused():
    def model():
        upper = pyro.sample("upper", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Uniform(0.0, upper))

    with pytest.raises(ValueError, match="support of site 'z' depends on other latents"):
        LogDensity(model)


@pytest.mark.parametrize("infer", [{}, {"enumerate": "sequential"}])
def test_discrete_latents_are_refused(infer):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Bernoulli(torch.sigmoid(z)), infer=infer)

    with pytest.raises(ValueError, match="site 'k' of the model is a discrete latent: mark it .*config_enumerate"):
        LogDensity(model)


def test_models_without_latents_are_refused():
    with pytest.raises(ValueError, match="no continuous latents"):
        LogDensity(lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.4)))


def test_data_that_are_not_finite_are_refused():
    x = torch.tensor([0.1, math.nan])

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    with pytest.raises(ValueError, match="site 'x' is nan at index"):
        LogDensity(model)


def test_errors_of_a_model_are_its_own():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2))

    with pytest.raises(RuntimeError, match="size of tensor a .2. must match"):
        LogDensity(model)


def test_models_that_cannot_be_differentiated():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        row = torch.ones(1)
        f = row[0] * z
        row[0] = 2.0
        pyro.factor("f", f)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        LogDensity(model)


def cholesky():
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    eye = torch.eye(2)
    factor = torch.linalg.cholesky(eye + z[..., :1, None] * (1 - eye))  # positive definite for |z| < 1
    pyro.sample("x", dist.Normal((factor @ z.unsqueeze(-1)).squeeze(-1), 1.0).to_event(1), obs=torch.ones(2))


def test_points_at_which_the_model_fails():
    """The density is -inf there, and others in the batch keep theirs."""
    log_density = LogDensity(cholesky, compile=False, batch_size=32)
    assert log_density.backend == "graph"
    z = torch.tensor([[0.5, 0.1], [2.0, 0.3], [-0.4, 1.0]])
    value, gradient = log_density.value_and_gradient(z)
    expected, slopes = with_gradient(lambda row: by_handlers(cholesky, log_density.constrain(row), row), z[[0, 2]])
    assert_close(value[[0, 2]], expected)
    assert_close(gradient[[0, 2]], slopes)
    assert value[1] == -math.inf and bool((gradient[1] == 0).all())
    assert log_density(z[1]) == -math.inf


def test_shapes_and_types_of_points():
    log_density = LogDensity(MODELS["reparametrised"], compile=False, batch_size=32)
    for shape in ((4,), (1, 4), (2, 3, 4), (0, 4)):
        z = torch.randn(shape)
        value, gradient = log_density.value_and_gradient(z)
        assert value.shape == shape[:-1] and gradient.shape == shape
    with pytest.raises(ValueError, match=r"z must have shape \(\*, 4\), but got \(2, 3\)"):
        log_density(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"but got \(\)"):
        log_density(torch.zeros(()))
    with pytest.raises(ValueError, match=r"torch.float64 on cpu.* but got torch.float32 on cpu.*\.to\("):
        log_density(torch.zeros(4, dtype=torch.float32))


def test_arguments():
    with pytest.raises(ValueError, match="compile must be True, False or 'auto', but got 'yes'"):
        LogDensity(by_item, compile="yes")
    with pytest.raises(ValueError, match="batch_size must be at least 1, but got 0"):
        LogDensity(by_item, batch_size=0)


def test_call_is_differentiated_by_the_gradient():
    log_density = LogDensity(MODELS["reparametrised"], compile=False, batch_size=32)
    z = torch.randn(3, 4, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5])
    (slope,) = torch.autograd.grad((weights * log_density(z)).sum(), z)
    value, gradient = log_density.value_and_gradient(z)
    assert_close(slope, weights.unsqueeze(-1) * gradient)
    assert_close(log_density.potential({"z": z[1]}), -value[1])


def test_model_that_changes_is_noticed():
    """At a check that comes after some calls, with a warning, and not before."""
    scale = [1.0]

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale[0]), obs=torch.tensor(0.4))

    log_density = LogDensity(model, compile=False, batch_size=32)
    z = torch.tensor([[0.5], [1.0]])
    for _ in range(100):
        log_density(z)
    scale[0] = 3.0
    with pytest.warns(UserWarning, match="goes on by Pyro's handlers: after 128 calls its graph gave"):
        for _ in range(100):
            log_density(z)
    assert log_density.backend == "handlers" and "after 128 calls" in log_density.reason
    check(log_density, model, sizes=(1, 5))


def test_data_that_change_in_place_are_noticed():
    x = torch.tensor([0.4, 0.2])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=x)

    log_density = LogDensity(model, compile=False, batch_size=32)
    x += 1.0
    with pytest.warns(UserWarning, match="goes on by Pyro's handlers"):
        for _ in range(64):
            log_density(torch.tensor([[0.5], [1.0]]))
    check(log_density, model, sizes=(1, 5))
    assert log_density.backend == "handlers"  # no graph of another size is trusted
    log_density(torch.tensor([[0.5]]))
    assert log_density.backend == "handlers"


def test_random_state_and_parameter_store_are_left_alone():
    state = torch.get_rng_state()
    log_density = LogDensity(MODELS["nested plates"], compile=False, batch_size=32)
    log_density(log_density.start)
    assert torch.equal(torch.get_rng_state(), state) and not list(pyro.get_param_store().keys())


def test_handlers_around_see_nothing():
    log_density = LogDensity(by_item)
    with poutine.trace() as tracer:
        LogDensity(MODELS["reparametrised"], compile=False, batch_size=32)(torch.zeros(2, 4))
        log_density(torch.zeros(2, 1))
    assert not tracer.trace.nodes


def test_models_that_write_to_what_outlives_them():
    total = torch.zeros(2)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        total[0] += 1.0
        pyro.sample("x", dist.Normal(z, 1.0 + total.sum()), obs=torch.tensor(0.4))

    log_density = LogDensity(model, compile=False, batch_size=32)
    assert log_density.backend == "handlers"
    assert log_density.reason.startswith("the model is random"), log_density.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", ["varying intercepts", "correlated normal", "hidden Markov", "in place, views"])
def test_compiled_density_is_that_of_the_handlers(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_HOLLOW_CACHE", str(tmp_path))
    log_density = LogDensity(MODELS[name], compile=True)
    assert (log_density.backend, log_density.reason) == ("compiled", "")
    check(log_density, MODELS[name], sizes=(5, 32, 70))
    assert log_density.backend == "compiled"
    assert len(list(tmp_path.glob("density-*.pt2"))) == 1


@pytest.mark.slow
def test_graph_is_compiled_while_it_runs_and_found_again(tmp_path, monkeypatch):
    """With fresh subsamples for each call, in the meantime and afterwards."""
    monkeypatch.setenv("PYRO_HOLLOW_CACHE", str(tmp_path))
    monkeypatch.setattr("pyro_hollow.infer.log_density._WORTH_LOADING", 0.0)
    monkeypatch.setattr("pyro_hollow.infer.log_density._WORTH_COMPILING", 0.0)
    x, y = design(1, 6)[0], design(2, 6)
    log_density = LogDensity(regression, x, y, 2)
    points = log_density.start + torch.randn(32, log_density.dim)
    log_density(points)
    assert log_density.backend == "graph"
    end = time.monotonic() + 600
    while log_density.backend == "graph" and time.monotonic() < end:
        log_density(points)
        time.sleep(0.1)
    assert (log_density.backend, log_density.reason) == ("compiled", "")
    again = LogDensity(regression, x, y, 2)
    again(points), again(points)
    assert again.backend == "compiled"
    given = {"data": log_density._density.draw_subsamples()[0]}
    for each in (log_density, again):
        pyro.set_rng_seed(0)
        given = {"data": each._density.draw_subsamples()[0]}
        check(each, lambda: regression(x, y, 2), sizes=(32,), given=given)


@pytest.mark.parametrize("name", MODELS)
def test_code_of_a_graph_is_enough_to_run_it(name):
    """As the process does that compiles it."""
    log_density = LogDensity(MODELS[name], compile=False, batch_size=32)
    graph = log_density._runners[32]._graph
    z = log_density.start + 0.5 * torch.randn(32, log_density.dim)
    ours = _module(graph.code, dict(graph.named_buffers()))(z)
    assert_close(ours, graph(z), rtol=0, atol=0)


def test_compilation_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_HOLLOW_CACHE", str(tmp_path / "file" / "folder"))
    (tmp_path / "file").write_text("")  # so that no folder can be made there
    with pytest.warns(UserWarning, match="compile=True has no effect, as its graph cannot be compiled .NotADirectory"):
        log_density = LogDensity(MODELS["reparametrised"], compile=True, batch_size=32)
    assert log_density.backend == "graph" and "cannot be compiled" in log_density.reason
    check(log_density, MODELS["reparametrised"], sizes=(5,))


def test_compiled_file_that_is_broken_is_told(tmp_path, monkeypatch):
    """The graph goes on."""
    monkeypatch.setenv("PYRO_HOLLOW_CACHE", str(tmp_path))
    log_density = LogDensity(MODELS["reparametrised"], batch_size=32)
    package = log_density._runners[32]._compilation._package
    package.write_bytes(b"PK")
    with pytest.warns(UserWarning, match="compile=True has no effect, as its graph cannot be compiled"):
        log_density = LogDensity(MODELS["reparametrised"], compile=True, batch_size=32)
    assert log_density.backend == "graph"


def test_no_effect_of_compilation_on_models_without_a_graph():
    with pytest.warns(UserWarning, match="compile=True has no effect, as the model allows no plate .* decides by"):
        log_density = LogDensity(by_item, compile=True)
    assert log_density.backend == "handlers"


@pytest.mark.parametrize("model", [MODELS["reparametrised"], by_item], ids=["graph", "handlers"])
def test_in_inference_mode(model):
    with torch.inference_mode():
        log_density = LogDensity(model, compile=False, batch_size=32)
        point = log_density.start + torch.randn(5, log_density.dim)
        inside = [*log_density.value_and_gradient(point), *log_density.value_and_gradient(point[0])]
    point = point.clone()
    outside = [*log_density.value_and_gradient(point), *log_density.value_and_gradient(point[0])]
    for ours, theirs in zip(inside, outside, strict=True):
        assert_close(ours, theirs)


def test_distributions_made_with_validation_are_traced():
    prior = dist.Normal(0.0, 2.0).expand([3]).to_event(1)  # remembers that validation was on
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0))

    def model():
        z = pyro.sample("z", prior)
        w = pyro.sample("w", mixture)
        pyro.sample("x", dist.Normal(z.sum(-1) + w, 1.0), obs=torch.tensor(0.5))

    log_density = LogDensity(model, compile=False, batch_size=32)
    assert (log_density.backend, log_density.reason) == ("graph", "")
    assert prior._validate_args and prior.base_dist._validate_args
    z = torch.tensor([0.1, 0.2, -0.5, 1.0])
    expected = prior.log_prob(z[:3]) + mixture.log_prob(z[3]) + dist.Normal(z.sum(), 1.0).log_prob(torch.tensor(0.5))
    torch.testing.assert_close(log_density(z), expected)


def test_nuts_by_the_density():
    """Draws of a posterior in closed form, in its support."""
    x = torch.tensor([1.2, 0.4, 0.8])

    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Exponential(rate), obs=x)

    log_density = LogDensity(model, compile=False, batch_size=32)
    nuts = NUTS(potential_fn=log_density.potential)
    mcmc = MCMC(nuts, 300, 100, {"z": log_density.start}, disable_progbar=True)
    mcmc.run()
    rate = log_density.constrain(mcmc.get_samples()["z"])["rate"]
    assert abs(rate.mean() - 5.0 / 3.4) < 5 * math.sqrt(5.0) / 3.4 / math.sqrt(100)


@pytest.mark.slow
def test_nuts_by_the_density_and_by_pyro():
    """Eight schools, with effects in units of their scale: means and deviations within the errors of 100 draws."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, errors), obs=y)

    log_density = LogDensity(model, compile=False, batch_size=32)
    samples = []
    for nuts, start in ((NUTS(potential_fn=log_density.potential), {"z": log_density.start}), (NUTS(model), None)):
        pyro.set_rng_seed(1)
        mcmc = MCMC(nuts, 400, 200, start, disable_progbar=True)
        mcmc.run()
        samples.append(mcmc.get_samples())
    ours, theirs = log_density.constrain(samples[0]["z"]), samples[1]
    for name, values in theirs.items():
        deviation = values.std(0)
        assert bool(((ours[name].mean(0) - values.mean(0)).abs() < 0.4 * deviation).all()), name
        assert bool(((ours[name].std(0) / deviation).log().abs() < 0.4).all()), name


def test_particles_that_mix_away_from_the_start_are_separated():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", -torch.where(z.max() > 3.0, 2.0, 1.0) * z.square().sum(-1))

    log_density = LogDensity(model, compile=False)
    assert log_density.particles == "plate" and log_density.backend == "graph"
    z = torch.randn(8, 2)
    assert log_density.check(z)
    z[5] += 4.0
    with pytest.warns(UserWarning, match="goes on with particles by vmap: the density of a particle depends on those"):
        assert not log_density.check(z)
    factor = torch.where(z.max(-1).values > 3.0, 2.0, 1.0)
    value, gradient = log_density.value_and_gradient(z)
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - factor * z.square().sum(-1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, -z * (1 + 2 * factor.unsqueeze(-1)))
    assert log_density.check(z) and "those next to it" in log_density.reason


def test_check_of_points_at_which_the_model_fails_alone():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z.dim() == 0 and float(z.detach()) > 3.0:
            raise ValueError("impossible")
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    log_density = LogDensity(model, compile=False)
    assert log_density.particles == "plate" and log_density.backend == "graph"
    assert log_density.check(torch.ones(2, 1)) and log_density.check(torch.ones(0, 1))
    with pytest.warns(UserWarning, match="goes on one particle at a time"):
        assert not log_density.check(torch.full((2, 1), 5.0))


def test_fault_names_sites():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sqrt(), 1.0), obs=x)

    log_density = LogDensity(model, torch.tensor(1.0), compile=False)
    assert log_density.fault(torch.tensor([-1.0])) == "log_prob of site 'x' is not finite"
    assert log_density.fault(torch.tensor([0.0])) == "the gradient is not finite"
