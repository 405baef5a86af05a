# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The graph of a model, and guides that find it by themselves."""

import copy
import io
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch.distributions import constraints

from pyro_hollow.experiments.defaults import bent
from pyro_hollow.infer import AutoHollowCNF, LogDensity, latent_adjacency
from pyro_hollow.infer.graph import sparse_conditioner
from pyro_hollow.nn import GraphConditioner
from pyro_hollow.nn.activations import ACTIVATIONS

Y = torch.tensor([0.4, 1.6, -0.9, 2.1, 0.3, -0.2], dtype=torch.float64)


def graph(d, edges):
    adjacency = torch.zeros(d, d, dtype=torch.bool)
    for i, j in edges:
        adjacency[i, j] = adjacency[j, i] = True
    return adjacency


def all_of(*latents):
    return [(i, j) for i in latents for j in latents if i != j]


def flat(d):
    return pyro.sample("x", dist.Normal(0.0, 1.0).expand([d]).to_event(1).mask(False))


def bent_chain():
    pyro.factor("density", bent(flat(8)))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 1.5))
    pyro.sample("x", dist.Normal(torch.zeros(4), v.exp().unsqueeze(-1)).to_event(1))


def state_space():
    """Sites one by one, and parameters of constrained supports."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    phi = pyro.sample("phi", dist.Beta(20.0, 1.5))
    h = pyro.sample("h_0", dist.Normal(mu, 1.0))
    for t in range(5):
        pyro.sample(f"y_{t}", dist.Normal(0.0, (h / 2).exp()), obs=Y[t])
        h = pyro.sample(f"h_{t + 1}", dist.Normal(mu + phi * (h - mu), 0.5))


def hierarchical():
    """Two groups of two, each with a mean; a mean and a scale of the means."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("groups", 2, dim=-1):
        mean = pyro.sample("mean", dist.Normal(mu, tau))
        with pyro.plate("members", 2, dim=-2):
            theta = pyro.sample("theta", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=Y[:4].view(2, 2))


def regression():
    """Weights of which each pair meets in a row of the design, but for the last one, which meets none."""
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
    design = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=beta.dtype)
    design[:, 3] = 0.0
    pyro.sample("y", dist.Normal(beta @ design.T, 1.0).to_event(1), obs=Y)


def simplex():
    """Three unconstrained latents of four probabilities, and a scalar that nothing else depends on."""
    pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    pyro.sample("z", dist.Gamma(2.0, 1.0))


def linear():
    """A gradient without a point, and a density that no latent changes."""
    with poutine.mask(mask=False):
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("linear", 2.0 * x[..., 0])


def single_precision():
    x = pyro.sample("x", dist.Normal(torch.zeros(2).float(), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.double().sum(-1), 1.0), obs=Y[0])


def with_parameters():
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    a = pyro.sample("a", dist.Normal(0.0, scale))
    pyro.sample("b", dist.Normal(a, scale))
    pyro.sample("c", dist.Normal(0.0, scale))


GRAPHS = {
    "bent chain": (bent_chain, graph(8, [(i, i + 1) for i in range(7)])),
    "funnel": (funnel, graph(5, [(0, i) for i in range(1, 5)])),
    "state space": (
        state_space,
        graph(
            8, [(0, 1), (0, 2)] + [(i, j) for i in range(2, 8) for j in ([0] if i == 2 else [0, 1, i - 1])] + [(1, 2)]
        ),
    ),
    "hierarchical": (
        hierarchical,
        graph(8, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 4), (3, 5), (2, 6), (3, 7)]),
    ),
    "regression": (regression, graph(4, all_of(0, 1, 2))),
    "simplex": (simplex, graph(4, all_of(0, 1, 2))),
    "linear": (linear, graph(3, [])),
    "single precision": (single_precision, graph(2, [(0, 1)])),
    "parameters": (with_parameters, graph(3, [(0, 1)])),
}
each_graph = pytest.mark.parametrize("model, expected", GRAPHS.values(), ids=GRAPHS)


@each_graph
def test_known_graphs(model, expected):
    assert torch.equal(latent_adjacency(model), expected)


@pytest.mark.parametrize("name", ["funnel", "state space", "hierarchical", "regression"])
def test_mixed_differences_of_the_density_that_the_guide_learns(name):
    """In the order of its latents. Supports are those of single latents, so that log-determinants do not mix any."""
    model, expected = GRAPHS[name]
    guide = AutoHollowCNF(model, [4], warm_up=0).setup()
    start, steps = 0.3 * torch.randn(len(expected)), torch.eye(len(expected))

    def density(i, j, a, b):
        values = guide._values(start + a * steps[i] + b * steps[j])
        return poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum().item()

    for i in range(len(expected)):
        for j in range(i):
            mixed = density(i, j, 1, 1) - density(i, j, 1, 0) - density(i, j, 0, 1) + density(i, j, 0, 0)
            assert (abs(mixed) > 1e-9) == expected[i, j]


def test_arguments_of_the_model():
    def model(data, *, coupled):
        x = flat(len(data))
        pyro.sample("y", dist.Normal(x + coupled * x.flip(-1), 1.0).to_event(1), obs=data)

    assert torch.equal(latent_adjacency(model, Y[:4], coupled=True), graph(4, [(0, 3), (1, 2)]))
    assert not latent_adjacency(model, Y[:4], coupled=False).any()


def test_nothing_else_changes():
    state = torch.get_rng_state()
    with poutine.trace() as trace:
        latent_adjacency(hierarchical)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(trace.trace.nodes) == [] or set(trace.trace.nodes) <= {"_INPUT", "_RETURN"}
    assert len(pyro.get_param_store()) == 0


class Square(torch.autograd.Function):
    """Without a rule for torch.vmap."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return Square.apply(x + gradient / 2) - Square.apply(x - gradient / 2)  # 2 x gradient


def test_an_operation_that_takes_one_row_at_a_time():
    def model():
        x = flat(5)
        pyro.factor("density", -Square.apply(x[..., 1:] - x[..., :-1]).sum(-1) * x[..., 0].exp())

    expected = latent_adjacency(lambda: pyro.factor("y", -(flat(5).diff(dim=-1) ** 2).sum(-1)))
    assert torch.equal(expected, graph(5, [(i, i + 1) for i in range(4)]))
    expected[0, 1:] = expected[1:, 0] = True
    assert torch.equal(latent_adjacency(model), expected)


def test_an_entry_that_is_never_finite_is_an_edge():
    def model():
        x = flat(3)
        # The derivatives of the square root at 0 are not finite.
        pyro.factor("density", -x.square().sum(-1) + (0.0 * x[..., 0] * x[..., 1]).abs().sqrt())

    assert latent_adjacency(model)[0, 1]


def test_points_at_which_the_model_fails_do_not_count():
    failures = []

    def model():
        x = flat(3)
        if x.abs().max() > 1.5:
            failures.append(x)
            raise ValueError("far from the posterior")
        pyro.factor("density", -x.diff(dim=-1).square().sum(-1))

    assert torch.equal(latent_adjacency(model), graph(3, [(0, 1), (1, 2)]))
    assert len(failures) > 0


def test_a_density_that_is_not_finite():
    def model():
        pyro.factor("density", flat(3).sum(-1) * torch.nan)

    with pytest.raises(ValueError, match="log_factor: nan"):
        latent_adjacency(model)
    message = "the joint density of the model has no finite second derivatives"
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=message):
        latent_adjacency(model)


class Once(torch.autograd.Function):
    """The square, whose second derivative raises an error."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * Once.slope(*ctx.saved_tensors)

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no second derivative")

    slope = Slope.apply


def test_a_density_without_second_derivatives():
    def model():
        pyro.factor("density", -Once.apply(flat(3)).sum(-1))

    with pytest.raises(ValueError, match="give the adjacency to a GraphConditioner") as caught:
        latent_adjacency(model)
    assert "no second derivative" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="give the adjacency to a GraphConditioner"):
        small(model).setup()


def test_inference_mode():
    with torch.inference_mode():
        assert torch.equal(latent_adjacency(hierarchical), GRAPHS["hierarchical"][1])


def test_no_latents():
    with pytest.raises(ValueError, match="the model has no latents"):
        latent_adjacency(lambda: pyro.sample("y", dist.Normal(0.0, 1.0), obs=Y[0]))


def test_a_density_without_curvature_is_not_seen():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Laplace(a, 1.0))

    assert not latent_adjacency(model).any()


# Guides


def small(model, *args, **settings):
    settings = {"warm_up": 0, "conditioner": "graph", "transformer_dim": 3, **settings}
    return AutoHollowCNF(model, *args, **settings)


def step(model, guide):
    return SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()


def conditioners(guide):
    found = [flow.nn.conditioner for flow in guide.flows]
    assert all(type(each) is GraphConditioner for each in found)
    return found


def adjacency_of(conditioner):
    matrix = torch.zeros(conditioner.input_dim, conditioner.input_dim, dtype=torch.bool)
    matrix[conditioner.edges.unbind()] = True
    return matrix


@each_graph
def test_a_guide_finds_the_graph(model, expected):
    if model is linear:
        pytest.skip("has elements without a density")
    (conditioner,) = conditioners(small(model, [5]).setup())
    assert torch.equal(adjacency_of(conditioner), expected)


def test_settings_reach_the_conditioner():
    guide = small(bent_chain, num_transforms=2).setup()
    first, second = conditioners(guide)
    assert first is not second and first.hidden_dim == 32 and first.weight.shape == (8, 32, 7)
    assert first.limits.tolist() == [6, 8]
    assert [flow.nn.transformer.activation for flow in guide.flows] == ["tanh"] * 2
    assert all(each.bind().activation is ACTIVATIONS["silu"] for each in (first, second))
    (conditioner,) = conditioners(small(bent_chain, [7, 5], activation="tanh").setup())
    assert conditioner.weight.shape == (8, 7, 7) and conditioner.hidden_dim == 5
    assert conditioner.bind().activation.rate == 2.0


def test_a_conditioner_with_the_graph_of_the_model():
    adjacency = latent_adjacency(bent_chain)
    own = GraphConditioner(8, [5], adjacency=adjacency, radius=3)
    guide = AutoHollowCNF(bent_chain, conditioner=own, warm_up=0).setup()
    (conditioner,) = conditioners(guide)
    assert conditioner is not own and torch.equal(conditioner.weight, own.weight)
    assert step(bent_chain, guide) < 1e3


def test_the_random_state_is_that_of_other_guides():
    states = []
    for conditioner in ("grouped", "graph"):
        pyro.set_rng_seed(3)
        guide = small(state_space, [5], conditioner=conditioner).setup()
        states.append(guide.affine.detach())
    assert torch.equal(*states)


def test_elements_that_the_model_masks_are_not_on_the_graph():
    mask = torch.tensor([True, False, True, True])

    def model():
        with pyro.plate("plate", 4), poutine.mask(mask=mask):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("density", -((x[..., 2] - x[..., 3]) ** 2))

    (conditioner,) = conditioners(small(model, [5]).setup())
    assert torch.equal(adjacency_of(conditioner), graph(3, [(1, 2)]))


@pytest.mark.parametrize("set_up", [False, True], ids=["before the model is seen", "after"])
def test_state_dict(set_up):
    source = small(hierarchical, [5]).setup()
    step(hierarchical, source)
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    expected = source()
    pyro.clear_param_store()
    target = small(hierarchical, [5])
    if set_up:
        target.setup()
    target.load_state_dict(torch.load(stream))
    assert torch.equal(adjacency_of(*conditioners(target)), GRAPHS["hierarchical"][1])
    outcomes = []
    for guide in (source, target):
        pyro.set_rng_seed(5)
        pyro.clear_param_store()
        outcomes.append(guide())
    assert expected.keys() == outcomes[0].keys()
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in expected)


def test_parameter_store():
    source = small(hierarchical, [5])
    for _ in range(2):
        step(hierarchical, source)
    state = pyro.get_param_store().get_state()
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    target = small(hierarchical, [5])
    target()
    assert torch.equal(target.flows[0].nn.conditioner.weight, source.flows[0].nn.conditioner.weight)


def test_a_state_of_another_graph():
    def chain(order):
        pyro.factor("density", -flat(4)[..., order].diff(dim=-1).square().sum(-1))

    source = small(partial(chain, [0, 1, 2, 3]), [5]).setup()
    target = small(partial(chain, [0, 2, 1, 3]), [5]).setup()
    with pytest.raises(ValueError, match="the state is that of a conditioner on another graph"):
        target.load_state_dict(source.state_dict())


def test_copies():
    guide = small(bent_chain, [5]).setup()
    for copied in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert torch.equal(adjacency_of(*conditioners(copied)), GRAPHS["bent chain"][1])


INVALID = {
    "hidden_dims": (dict(hidden_dims=[0]), "hidden_dims"),
    "activation": (dict(activation="relu"), "activation must be one of"),
    "three activations": (dict(activation=("tanh",) * 3), "activation must be one of"),
    "conditioner": (dict(conditioner="graphs"), "conditioner must be one of"),
}


@pytest.mark.parametrize("settings, message", INVALID.values(), ids=INVALID)
def test_invalid_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        small(bent_chain, **settings)


# fit chooses


def autoregression(d):
    """A chain within one vector site, and a scale that all of it depends on."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5)).unsqueeze(-1)
    h = flat_of(d)
    pyro.factor("steps", dist.Normal(0.9 * h[..., :-1], scale).log_prob(h[..., 1:]).sum(-1))
    pyro.sample("y", dist.Normal(0.0, (h / 2).exp()).to_event(1), obs=torch.linspace(-1.0, 1.0, d))


def flat_of(d):
    return pyro.sample("h", dist.Normal(0.0, 1.0).expand([d]).to_event(1).mask(False))


def test_graph_within_a_vector_site_of_a_density():
    conditioner = sparse_conditioner(LogDensity(autoregression, 80, compile=False))
    edges = [(0, i) for i in range(1, 81)] + [(i, i + 1) for i in range(1, 80)]
    assert torch.equal(conditioner.edges, graph(81, edges).nonzero().T)
    assert conditioner.hubs.tolist() == [0]
    assert conditioner.index.shape[1] == 13  # six on either side, and the hub


def test_no_graph_for_few_latents_or_many_neighbours():
    def dense(d):
        x = flat(d)
        pyro.factor("density", -x.sum(-1).exp() - 0.5 * x.square().sum(-1))

    assert sparse_conditioner(LogDensity(autoregression, 40, compile=False)) is None
    assert sparse_conditioner(LogDensity(dense, 70, compile=False)) is None


def test_no_graph_where_second_derivatives_take_too_long(monkeypatch):
    monkeypatch.setattr("pyro_hollow.infer.graph._PATIENCE", 1e-9)
    assert sparse_conditioner(LogDensity(autoregression, 80, compile=False)) is None


def test_no_graph_of_subsampled_data():
    def model(y):
        x = flat(70)
        with pyro.plate("data", len(y), subsample_size=3):
            pyro.sample("y", dist.Normal(x[..., :1], 1.0), obs=pyro.subsample(y, event_dim=0))

    assert sparse_conditioner(LogDensity(model, Y, compile=False)) is None


def test_second_derivatives_are_taken_in_parts_that_fit(monkeypatch):
    whole = latent_adjacency(bent_chain)
    monkeypatch.setattr("pyro_hollow.infer.graph.part_size", lambda num_bytes: 3)
    assert torch.equal(latent_adjacency(bent_chain), whole)
