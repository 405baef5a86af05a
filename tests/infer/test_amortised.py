# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam, ClippedAdam
from torch import nn
from torch.testing import assert_close

from pyro_hollow import AmortisedPosterior, diagnose, fit_amortised
from pyro_hollow.infer.amortised import _next_plan, _Plan
from pyro_hollow.infer.amortised_density import Moments, StackedMixture, stack
from pyro_hollow.infer.calibration import calibrate
from pyro_hollow.infer.simulation import Simulator

QUICK = {"num_simulations": 300, "num_steps": 30, "num_flows": 2, "seed": 0, "progress": False}


def conjugate(x=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 3):
        return pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def bounded():
    low = torch.tensor([-1.0, 2.0])
    theta = pyro.sample("theta", dist.Uniform(low, low + 3.0).to_event(1))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    pyro.sample("x", dist.Normal(torch.cat([theta, share], -1), 0.1).to_event(1))


@pytest.fixture(scope="module")
def fitted():
    """Of the conjugate model, good enough for comparisons with the exact posterior."""
    torch.set_default_dtype(torch.float64)
    return fit_amortised(
        conjugate, observed=["x"], num_simulations=3000, num_steps=300, num_flows=2, seed=0, progress=False
    )


@pytest.fixture(scope="module")
def quick():
    """Of the bounded model, hardly trained."""
    torch.set_default_dtype(torch.float64)
    return fit_amortised(bounded, observed=["x"], **QUICK)


# The posterior


@pytest.mark.parametrize("data", [[0.5, 1.5, 2.5], [-1.0, 0.3, -0.2]])
def test_posterior_of_a_conjugate_model(fitted, data):
    x = torch.tensor(data)
    draws = fitted.posterior(x).draws(4000)["z"]
    assert draws.mean().item() == pytest.approx(x.sum().item() / 4, abs=0.08)
    assert draws.std().item() == pytest.approx(0.5, rel=0.1)
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.25)
    assert fitted.log_prob == pytest.approx(-entropy, abs=0.1)


def test_order_of_exchangeable_data_does_not_matter(fitted):
    x, z = torch.tensor([0.5, 1.5, 2.5]), torch.tensor([[0.3]])
    assert_close(fitted.posterior(x).log_prob(z), fitted.posterior(x.flip(0)).log_prob(z))


def test_density_integrates_to_one(fitted):
    grid = torch.linspace(-4.0, 5.0, 2001).unsqueeze(-1)
    with torch.no_grad():
        density = fitted.posterior(torch.tensor([0.5, 1.5, 2.5])).log_prob(grid).exp()
    assert torch.trapezoid(density, grid.squeeze(-1)).item() == pytest.approx(1.0, abs=1e-3)


def test_many_data_are_a_batch(fitted):
    x = torch.randn(4, 3)
    posterior = fitted.posterior(x)
    z = posterior.sample((5,))
    assert posterior.batch_shape == (4,) and z.shape == (5, 4, 1)
    with torch.no_grad():
        one_by_one = torch.stack([fitted.posterior(x[i]).log_prob(z[:, i]) for i in range(4)], 1)
        assert_close(posterior.log_prob(z), one_by_one, rtol=1e-3, atol=1e-3)


def test_sites_and_vectors_are_the_same(quick):
    posterior = quick.posterior(torch.tensor([0.0, 3.0, 0.2, 0.3, 0.5]))
    vector = posterior.sample((6,))
    named = {"theta": vector[:, :2], "share": vector[:, 2:]}
    assert_close(posterior.log_prob(named), posterior.log_prob(vector))
    assert {name: value.shape for name, value in posterior.draws(7).items()} == {"theta": (7, 2), "share": (7, 3)}


def test_density_in_the_support_by_a_change_of_variables(quick):
    posterior = quick.posterior(torch.tensor([0.0, 3.0, 0.2, 0.3, 0.5]))
    with torch.no_grad():
        u = posterior.base.sample((5,))
        values, ladjs = posterior.unpack(u)
        assert_close(posterior.log_prob(values), posterior.base.log_prob(u) - sum(ladjs.values()), rtol=1e-4, atol=1e-4)


def test_no_mass_outside_of_hard_edges(quick):
    posterior = quick.posterior(torch.tensor([-1.0, 5.0, 0.2, 0.3, 0.5]))
    draws = posterior.draws(2000)
    assert bool(((draws["theta"] >= torch.tensor([-1.0, 2.0])) & (draws["theta"] <= torch.tensor([2.0, 5.0]))).all())
    outside = {"theta": torch.tensor([-1.5, 3.0]), "share": torch.tensor([0.2, 0.3, 0.5])}
    assert posterior.log_prob(outside) == -math.inf


def test_elements_between_two_bounds(quick):
    assert quick.flows[0].bounded.tolist() == [True, True, False, False]  # theta, and two unconstrained shares


def test_draws_have_the_density_of_the_unconstrained_ones(quick):
    posterior = quick.posterior(torch.tensor([0.5, 3.0, 0.2, 0.3, 0.5]))
    u = posterior.base.sample((50,))
    values, ladjs = posterior.unpack(u)
    assert_close(posterior.log_prob(values), posterior.base.log_prob(u) - sum(ladjs.values()), rtol=1e-5, atol=1e-5)


def test_plans_of_the_flows():
    first, second = _Plan(True, 50), _Plan(False, 50)
    assert [_next_plan(k, 4, 99, {}) for k in (0, 1)] == [first, second]
    assert _next_plan(2, 4, 99, {first: 1.0, second: 0.5}) == _Plan(False, 99)
    assert _next_plan(3, 4, 99, {first: 1.0, second: 0.5, _Plan(False, 99): 0.7}) == second
    assert _next_plan(3, 4, 99, {first: 1.0, second: 0.5, _Plan(False, 99): 0.4}) == _Plan(False, 99)
    assert _next_plan(0, 1, 99, {}) == _Plan(True, 99)


def test_save_and_load(fitted, tmp_path):
    fitted.save(tmp_path / "posterior.pt")
    loaded = AmortisedPosterior.load(tmp_path / "posterior.pt")
    x, z = torch.tensor([0.5, 1.5, 2.5]), torch.tensor([[0.3], [0.9]])
    assert_close(loaded.posterior(x).log_prob(z), fitted.posterior(x).log_prob(z))
    with pytest.raises(ValueError, match="guide needs the model"):
        loaded.guide(x)
    with pytest.raises(ValueError, match="calibrate needs pairs"):
        loaded.calibrate()


def test_inference_data(fitted):
    group = fitted.inference_data(torch.tensor([0.5, 1.5, 2.5]), 400)["posterior"]
    assert group["z"].shape == (4, 100)


def test_page(fitted):
    page = str(fitted)
    assert "Amortised posterior of z given x (3,)" in page and "simulations  3,000" in page and "Note" not in page


def test_seed_decides_the_result():
    first, second = (fit_amortised(conjugate, observed=["x"], **QUICK) for _ in range(2))
    x = torch.zeros(3)
    assert_close(first.posterior(x).log_prob(x[:1]), second.posterior(x).log_prob(x[:1]), rtol=0, atol=0)


def test_float32():
    torch.set_default_dtype(torch.float32)
    result = fit_amortised(conjugate, observed=["x"], **QUICK)
    assert result.posterior(torch.zeros(3)).sample().dtype == torch.float32


# Guides


def test_guide_is_corrected_by_importance_weights(fitted):
    x = torch.tensor([0.5, 1.5, 2.5])
    found = diagnose(conjugate, fitted.guide(x), x, num_samples=1000)
    exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(x).item()
    assert found.reliable and found.iw_bound == pytest.approx(exact, abs=0.02)


def test_guide_is_trained_by_svi(fitted):
    x = torch.tensor([2.0, 2.5, 3.5])
    guide = copy.deepcopy(fitted).guide(x, conjugate)
    exact = -dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(x).item()
    svi = SVI(conjugate, guide, Adam({"lr": 1e-3}), Trace_ELBO(num_particles=16, vectorize_particles=True))
    losses = [svi.step(x) for _ in range(150)]
    assert sum(losses[-20:]) / 20 == pytest.approx(exact, abs=0.02)


def test_guide_of_another_model_is_refused(fitted):
    def other(x):
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="latents"):
        fitted.guide(torch.zeros(3), other)(torch.zeros(3))


def groups(y, size):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("groups", len(y), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1), obs=y[index])


def one_group():
    z = pyro.sample("z", dist.Normal(1.0, 1.0))
    pyro.sample("y", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 0.5).to_event(1))


def test_local_latents_in_minibatches():
    amortised = fit_amortised(one_group, observed=["y"], **QUICK | {"num_flows": 1})
    y = 1.0 + torch.randn(40, 1) + 0.5 * torch.randn(40, 2)

    def local(y, size):
        with guide.plates["groups"] as index:
            return amortised.sample_sites(y[index])

    guide = AutoGuideList(groups, create_plates=lambda y, size: pyro.plate("groups", len(y), subsample_size=size))
    guide.append(AutoNormal(pyro.poutine.block(groups, expose=["mu"])))
    guide.append(local)
    svi = SVI(groups, guide, Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(y, 10) for _ in range(120)]
    assert sum(losses[-40:]) < sum(losses[:40])
    assert any(name.startswith("amortised") for name in pyro.get_param_store())


def hierarchy(y, size):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    with pyro.plate("groups", len(y), subsample_size=size) as index:
        z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
        loc = torch.stack([z, z], -2)
        pyro.sample("y", dist.Normal(loc, 0.5).to_event(2), obs=y[index])


def any_group():
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    z = pyro.sample("z", dist.Normal(mu, 1.0).to_event(1))
    with pyro.plate("members", 2):
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1))


@pytest.mark.slow
def test_ten_thousand_groups_in_minibatches():
    """The evidence lower bound comes within 1 % of the exact evidence, which is known as the model is conjugate."""
    count, size = 10_000, 100
    y = torch.tensor([1.0, -2.0, 0.5]) + torch.randn(count, 1, 3) + 0.5 * torch.randn(count, 2, 3)
    amortised = fit_amortised(
        any_group, observed=["y"], sites=["z"], num_simulations=5000, num_steps=300, num_flows=1, progress=False
    )
    guide = AutoGuideList(hierarchy, create_plates=lambda y, size: pyro.plate("groups", len(y), subsample_size=size))

    def local(y, size):
        with guide.plates["groups"] as index:
            return amortised.sample_sites(y[index])

    guide.append(AutoNormal(pyro.poutine.block(hierarchy, expose=["mu"]), init_scale=0.1))
    guide.append(local)
    elbo = Trace_ELBO()
    svi = SVI(hierarchy, guide, ClippedAdam({"lr": 0.02, "lrd": 0.02 ** (1 / 500)}), elbo)
    for _ in range(500):
        svi.step(y, size)
    with torch.no_grad():
        bound = -sum(elbo.loss(hierarchy, guide, y, 1000) for _ in range(20)) / 20
    assert bound == pytest.approx(evidence(y), rel=0.01)


def evidence(y):
    """Of the hierarchy: the means of groups are sufficient for mu, and the differences within them independent."""
    total = dist.Normal(0.0, 0.5 * math.sqrt(2)).log_prob(y[:, 0] - y[:, 1]).sum()
    mean, variance = y.mean(1), 1.0 + 0.25 / 2
    total = total + dist.Normal(0.0, math.sqrt(variance)).log_prob(mean - mean.mean(0)).sum()
    # The integral over mu of a Gaussian in the mean of all groups.
    n = len(y)
    constant = 0.5 * math.log(2 * math.pi * variance / n)
    return float(total + (constant + dist.Normal(0.0, math.sqrt(4.0 + variance / n)).log_prob(mean.mean(0))).sum())


# Simulations


def test_plates_and_deterministic_data_are_vectorised():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            b = pyro.sample("b", dist.Gamma(2.0, a.exp()))
        pyro.deterministic("mean", b.mean((-1, -2)))

    simulator = Simulator(model, (), {}, ["mean"], None)
    assert simulator.vectorized, simulator.reason
    found = simulator.draw(1500)
    assert found.theta["b"].shape == (1500, 2, 3) and found.x["mean"].shape == (1500,)
    assert_close(found.theta["b"].mean((-1, -2)), found.x["mean"])


@pytest.mark.parametrize("mixing", ["sum of all", "decision"])
def test_a_model_that_cannot_be_vectorised_runs_one_by_one(mixing):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z - z.mean() + z if mixing == "sum of all" else (z if z > 0 else -z)
        pyro.sample("x", dist.Normal(loc, 0.1))

    with pytest.warns(UserWarning, match="one by one"):
        result = fit_amortised(model, observed=["x"], **QUICK | {"num_simulations": 60})
    assert result.num_simulations == 60 and "one by one" in str(result)


def test_runs_that_fail_are_counted():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if bool(z > 1.0):
            raise ValueError("the simulator diverged")
        pyro.sample("x", dist.Normal(z, 0.1))

    torch.manual_seed(1)
    failed = pytest.warns(UserWarning, match=r"of 200 simulations failed.*diverged")
    with pytest.warns(UserWarning, match="one by one"), failed:
        result = fit_amortised(model, observed=["x"], **QUICK | {"num_simulations": 200})
    assert 100 < result.num_simulations < 200


def test_a_model_that_always_fails():
    ran = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ran.append(1)
        if len(ran) > 4:
            raise ValueError("broken")
        pyro.sample("x", dist.Normal(z, 0.1))

    with pytest.raises(ValueError, match="all 10 simulations failed"):
        Simulator(model, (), {}, ["x"], None).draw(10)


def test_pairs_that_are_not_finite_are_dropped():
    theta = torch.randn(100, 2)
    x = theta + 0.1
    x[3, 0], x[7, 1], theta[9, 0] = math.nan, math.inf, math.nan
    with pytest.warns(UserWarning, match="3 of 100 pairs are NaN or infinite"):
        result = fit_amortised(theta=theta, x=x, **QUICK)
    assert result.num_simulations == 97 and "3 of 100" in str(result)


def test_constant_columns_of_data_are_told_of():
    theta = torch.randn(100, 1)
    with pytest.warns(UserWarning, match="1 of 2 columns of x are constant"):
        result = fit_amortised(theta=theta, x=torch.cat([theta, torch.ones(100, 1)], 1), **QUICK)
    assert result.posterior(torch.zeros(2)).sample().isfinite().all()


def test_pairs_by_name_with_supports():
    scale = torch.rand(200) + 0.1
    theta, x = {"scale": scale, "loc": torch.randn(200, 2)}, {"a": torch.randn(200, 2), "b": scale.log()}
    result = fit_amortised(theta=theta, x=x, support={"scale": constraints.positive}, **QUICK)
    draws = result.posterior({"a": torch.zeros(2), "b": torch.tensor(0.0)}).draws(50)
    assert draws["scale"].shape == (50,) and draws["loc"].shape == (50, 2) and bool((draws["scale"] > 0).all())


def test_discrete_nuisance_is_integrated_over():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(z, 0.1 + k))

    assert [site.name for site in fit_amortised(model, observed=["x"], sites=["z"], **QUICK).sites] == ["z"]
    with pytest.raises(ValueError, match="'k' is discrete.*leave it out of sites"):
        fit_amortised(model, observed=["x"], **QUICK)


def test_observed_defaults_to_the_sites_that_are_observed():
    assert list(Simulator(conjugate, (torch.zeros(3),), {}, None, None).data) == ["x"]
    drawn = Simulator(conjugate, (torch.zeros(3),), {}, None, None).draw(50).x["x"]
    assert bool((drawn != 0).all())


# Exchangeable data


def test_exchangeable_data_are_found():
    assert Simulator(conjugate, (), {}, ["x"], None).exchangeable == 0

    def regression():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z * torch.arange(3.0), 1.0))

    def local():
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    assert Simulator(regression, (), {}, ["x"], None).exchangeable is None
    assert Simulator(local, (), {}, ["x"], None).exchangeable is None


def test_moments():
    x = torch.randn(5, 2, 7)  # 7 points of size 2
    statistics = Moments(1, torch.Size([2, 7])).statistics(x)
    assert_close(statistics[:, :2], x.mean(-1))
    assert_close(statistics[:, 2:4], x.std(-1).log(), rtol=1e-3, atol=1e-3)
    correlation = torch.stack([torch.corrcoef(row)[0, 1] for row in x])
    assert_close(statistics[:, 4].tanh(), correlation, rtol=1e-3, atol=1e-3)


def test_embedding_of_the_users_own():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, x):
            assert x.shape[1:] == (3,)
            return self.layer(x.mean(-1, keepdim=True))

    embedding = Mean()
    before = embedding.layer.weight.detach().clone()
    result = fit_amortised(conjugate, observed=["x"], embedding=embedding, **QUICK)
    assert not torch.equal(before, embedding.layer.weight)
    assert result.posterior(torch.zeros(2, 4, 3)).sample().shape == (2, 4, 1)


# Mixtures


def test_stacked_mixture_and_weights():
    components = [dist.Normal(torch.tensor([loc]), 1.0).to_event(1) for loc in (-3.0, 3.0)]
    mixture = StackedMixture(components, torch.tensor([0.2, 0.8]))
    x = mixture.sample((20_000,))
    assert (x > 0).double().mean().item() == pytest.approx(0.8, abs=0.02)
    exact = torch.log(0.2 * components[0].log_prob(x).exp() + 0.8 * components[1].log_prob(x).exp())
    assert_close(mixture.log_prob(x), exact)
    weights = stack(torch.stack([component.log_prob(x) for component in components], -1))
    assert_close(weights, torch.tensor([0.2, 0.8]), rtol=0, atol=0.02)
    assert mixture.expand((4,)).sample((3,)).shape == (3, 4, 1)


# Calibration


@pytest.mark.parametrize(("factor", "calibrated"), [(1.0, True), (0.6, False), (1.6, False)])
def test_calibration_of_known_posteriors(factor, calibrated):
    z = torch.randn(1000)
    x = z.unsqueeze(-1) + torch.randn(1000, 3)

    def posterior(data):
        return dist.Normal(data["x"].sum(-1, keepdim=True) / 4, 0.5 * factor).to_event(1)

    found = calibrate(posterior, {"z": z}, {"x": x}, 100)
    assert found.calibrated is calibrated
    exact = math.erf(0.6744897501960817 * factor / math.sqrt(2))
    assert found.coverage(0.5) == pytest.approx(exact, abs=0.05)
    assert ("NOT CALIBRATED" in str(found)) is not calibrated
    assert len(found.plot().axes) == 2


def test_calibration_of_a_fit(fitted):
    found = fitted.calibrate(300, 100, seed=0)
    assert found.ranks.shape == (300, 1) and found.coverage(0.5) == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="level must be between"):
        found.coverage(1.0)


# Errors


def uniform_by_another():
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    pyro.sample("b", dist.Uniform(0.0, a))
    pyro.sample("x", dist.Normal(a, 1.0))


def with_factor():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", -z)
    pyro.sample("x", dist.Normal(z, 1.0))


@pytest.mark.parametrize(
    ("model", "settings", "error", "match"),
    [
        (conjugate, {}, ValueError, "no observed sites"),
        (conjugate, {"observed": "x"}, TypeError, "list of names"),
        (conjugate, {"observed": ["y"]}, ValueError, r"which has \['z', 'x'\], but got \['y'\]"),
        (conjugate, {"observed": ["x"], "sites": ["x"]}, ValueError, "must name latents"),
        (conjugate, {"observed": ["x", "z"]}, ValueError, "at least one latent"),
        (conjugate, {"observed": ["x"], "num_flows": 0}, ValueError, "num_flows must be a whole number"),
        (conjugate, {"observed": ["x"], "num_simulations": 5}, ValueError, "at least 20 pairs"),
        (conjugate, {"observed": ["x"], "compile": "yes"}, ValueError, "compile must be"),
        (uniform_by_another, {"observed": ["x"]}, ValueError, "support that depends on other sites"),
        (with_factor, {"observed": ["x"]}, ValueError, "has factors"),
        (None, {"theta": torch.zeros(30, 1)}, TypeError, "either a model, or both"),
        (None, {"theta": torch.zeros(30, 1), "x": torch.zeros(29, 1)}, ValueError, "as many rows"),
        (None, {"theta": torch.zeros(30), "x": torch.zeros(30, 1)}, ValueError, r"shape \(n, d\)"),
        (None, {"theta": torch.ones(30, 1), "x": torch.randn(30, 1)}, ValueError, "column 0 is constant"),
        (None, {"theta": torch.ones(30, 1).long(), "x": torch.randn(30, 1)}, ValueError, "discrete"),
    ],
)
def test_errors(model, settings, error, match):
    arguments = [] if model is None else [model]
    with pytest.raises(error, match=match):
        fit_amortised(*arguments, **QUICK | settings)


def test_values_outside_of_the_support_are_refused():
    theta = torch.linspace(-0.1, 1.0, 50).unsqueeze(-1)
    with pytest.raises(ValueError, match="must lie in its support"):
        fit_amortised(theta=theta, x=theta, support=constraints.unit_interval, **QUICK)


def test_subsampled_plates_are_refused():
    with pytest.raises(ValueError, match="plate 'groups' is subsampled"):
        fit_amortised(groups, torch.zeros(40, 2), 10, sites=["mu"], **QUICK)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(4), r"x must have shape \(\*, 3\)"),
        (torch.tensor([0.0, math.nan, 0.0]), "x must be finite"),
        ({"y": torch.zeros(3)}, r"must have the sites \['x'\]"),
    ],
)
def test_data_that_do_not_fit(fitted, x, match):
    with pytest.raises(ValueError, match=match):
        fitted.posterior(x)


def test_batches_of_data_that_do_not_fit_each_other():
    theta = torch.randn(200, 1)
    amortised = fit_amortised(theta=theta, x={"a": theta, "b": theta + 1}, **QUICK)
    with pytest.raises(ValueError, match=r"leading dimensions at all sites, but has \(5,\) at 'a', \(\) at 'b'"):
        amortised.posterior({"a": torch.zeros(5, 1), "b": torch.zeros(1)})
