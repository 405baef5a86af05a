# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Draws and predictions as ArviZ's users expect to find them, with ArviZ before and since version 1."""

import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

from pyro_hollow.infer import diagnose, predictions

arviz = pytest.importorskip("arviz")

X = torch.tensor([0.4, 1.6, 0.9, 2.1, 1.2, 0.1, 1.4, 0.8], dtype=torch.float64)
WAYS = {"at once": {}, "in batches": {"batch_size": 7}, "loop": {"vectorize": False}}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def location(x=X):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(*args):
    """Close to the posterior of location."""
    pyro.sample("z", dist.Normal(X.sum() / 9 + 0.1, 0.4))


def groups(result):
    names = result.posterior.groups
    return {name.strip("/") for name in (names() if callable(names) else names)} - {""}


def values(result, name, group="posterior"):
    """With the shape (draws,) + that of the site."""
    return torch.from_numpy(result.posterior[group][name].values).flatten(0, 1)


# ArviZ


@pytest.fixture(scope="module")
def result():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("square", z**2)
        with pyro.plate("data", len(X)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    return diagnose(model, guide)


def test_arviz_summarises_without_warnings(result):
    table = arviz.summary(result.posterior)
    assert set(table.index) == {"z", "square"}
    assert float(table["r_hat"]["z"]) < 1.02


def test_arviz_computes_loo_without_warnings(result):
    """Against the closed form: leave-one-out predictions of a normal model are normal."""
    loo = arviz.loo(result.posterior)
    mean, precision = (X.sum() - X) / 8, 8.0  # of the seven others and the prior
    expected = dist.Normal(mean, math.sqrt(1 + 1 / precision)).log_prob(X).sum().item()
    elpd = loo.elpd_loo if hasattr(loo, "elpd_loo") else loo.elpd
    assert elpd == pytest.approx(expected, abs=0.05)


@pytest.mark.skipif(not hasattr(arviz, "waic"), reason="not in ArviZ since version 1")
def test_arviz_computes_waic_without_warnings(result):
    assert arviz.waic(result.posterior).elpd_waic == pytest.approx(arviz.loo(result.posterior).elpd_loo, abs=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Matplotlib, about ArviZ
@pytest.mark.filterwarnings("ignore:Passing a dict or None")
@pytest.mark.parametrize("name", ["plot_ppc", "plot_ppc_dist", "plot_trace", "plot_loo_pit"])
def test_arviz_plots_without_warnings(result, name):
    if not hasattr(arviz, name):
        pytest.skip("not in this version of ArviZ")
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    settings = {"plot_ppc": {"num_pp_samples": 10}, "plot_loo_pit": {"y": "x"} if hasattr(arviz, "psislw") else {}}
    getattr(arviz, name)(result.posterior, **settings.get(name, {}))
    matplotlib.pyplot.close("all")


def test_files_keep_all_groups(result, tmp_path):
    pytest.importorskip("h5netcdf")
    result.posterior.to_netcdf(str(tmp_path / "posterior.nc"))
    loaded = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    assert_close(torch.from_numpy(loaded["posterior"]["z"].values).flatten(), values(result, "z"))
    assert loaded.attrs["khat"] == result.khat


def test_chains_agree_where_the_guide_is_good_and_differ_where_few_weights_decide():
    good = diagnose(location, guide)
    assert arviz.rhat(good.posterior)["z"].item() < 1.01
    assert arviz.ess(good.posterior)["z"].item() == pytest.approx(good.ess, rel=0.25)
    far = diagnose(location, lambda: pyro.sample("z", dist.Normal(3.0, 0.3)))
    assert arviz.rhat(far.posterior)["z"].item() > 1.2
    assert arviz.ess(far.posterior)["z"].item() < 100


@pytest.mark.parametrize("num_draws, chains", [(4000, 4), (16, 4), (18, 3), (50, 2), (11, 1), (1, 1), (12, 3)])
def test_draws_are_split_into_chains_of_equal_length(num_draws, chains):
    result = diagnose(location, guide, num_samples=100, num_draws=num_draws)
    for group in ("posterior", "sample_stats", "log_likelihood", "posterior_predictive"):
        assert dict(result.posterior[group].sizes)["chain"] == chains
        assert dict(result.posterior[group].sizes)["draw"] == num_draws // chains
    assert dict(result.posterior["guide"].sizes)["chain"] == 1
    order = torch.searchsorted(*(values(result, "z", "guide").sort()[0], values(result, "z")))
    order = values(result, "z", "guide").argsort()[order]
    assert (order.diff() >= 0).all()


# Groups


@every_way
def test_deterministic_sites_are_those_of_each_draw(way):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("constant", torch.tensor([1.0, 2.0]))
        with pyro.plate("data", len(X)):
            local = pyro.sample("local", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            shifted = pyro.deterministic("shifted", z + local.sum(-1))
            pyro.deterministic("events", local * 2, event_dim=1)
            pyro.sample("x", dist.Normal(shifted, 1.0), obs=X)

    result = diagnose(model, AutoNormal(model), num_samples=25, **way)
    z, local = values(result, "z"), values(result, "local")
    assert_close(values(result, "shifted"), z.unsqueeze(-1) + local.sum(-1))
    assert_close(values(result, "events"), local * 2)
    assert_close(values(result, "constant"), torch.tensor([1.0, 2.0]).expand(25, 2))
    assert set(result.posterior["guide"]) == {"z", "local"}


@every_way
def test_log_likelihoods_are_those_of_each_draw(way):
    result = diagnose(location, guide, num_samples=25, **way)
    expected = dist.Normal(values(result, "z").unsqueeze(-1), 1.0).log_prob(X)
    assert_close(values(result, "x", "log_likelihood"), expected)
    assert_close(torch.from_numpy(result.posterior["observed_data"]["x"].values), X)


@every_way
def test_predictions_are_those_of_each_draw(way):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(X)):
            pyro.sample("x", dist.Normal(z + 100 * torch.arange(8.0), 0.1), obs=X)

    result = diagnose(model, guide, num_samples=400, **way)
    error = values(result, "x", "posterior_predictive") - values(result, "z").unsqueeze(-1) - 100 * torch.arange(8.0)
    assert error.abs().max() < 0.6 and error.std().item() == pytest.approx(0.1, rel=0.1)


@every_way
def test_predictions_of_a_series_follow_each_other(way):
    """Not the data: a step depends on the one that was predicted before."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        last = torch.tensor(0.0)
        for t in range(5):
            last = pyro.sample(f"x_{t}", dist.Normal(last + z, 0.01), obs=torch.tensor(1.0 + t))

    result = diagnose(model, lambda: pyro.sample("z", dist.Normal(1.0, 0.01)), num_samples=50, **way)
    last = [values(result, f"x_{t}", "posterior_predictive") for t in range(5)]
    assert_close(last[4], 5 * values(result, "z"), rtol=0, atol=0.1)
    assert_close(last[4] - last[3], values(result, "z"), rtol=0, atol=0.06)


@every_way
def test_observed_sites_of_all_kinds_have_their_shapes(way):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("factor", -(z**2))
        pyro.sample("scalar", dist.Normal(z, 1.0), obs=torch.tensor(0.3))
        pyro.sample("vector", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=torch.ones(3))
        with pyro.plate("rows", 2, dim=-2):
            pyro.sample("column", dist.Normal(z, 1.0), obs=torch.zeros(2, 1))
            with pyro.plate("columns", 4, dim=-1):
                pyro.sample("count", dist.Poisson(z.exp()), obs=torch.arange(8.0).reshape(2, 4))
                pyro.sample("one for all", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    result = diagnose(model, AutoNormal(model), num_samples=25, **way)
    shapes = {"scalar": (), "vector": (3,), "column": (2, 1), "count": (2, 4), "one for all": (2, 4)}
    assert {name: v.shape for name, v in result.posterior["observed_data"].items()} == shapes
    predicted = result.posterior["posterior_predictive"]
    assert {name: v.shape[2:] for name, v in predicted.items()} == shapes
    densities = result.posterior["log_likelihood"]
    assert {name: v.shape[2:] for name, v in densities.items()} == {**shapes, "vector": ()}


def test_observed_values_may_be_longer_than_the_event_of_their_distribution():
    """As those of a homogeneous hidden Markov model are."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z.unsqueeze(-1) + torch.tensor([-1.0, 1.0])
        chain = dist.DiscreteHMM(torch.zeros(2), torch.zeros(1, 2, 2), dist.Normal(loc.unsqueeze(-2), 1.0), duration=5)
        pyro.sample("x", chain, obs=torch.arange(5.0))

    result = diagnose(model, AutoNormal(model), num_samples=25)
    assert result.posterior["observed_data"]["x"].shape == (5,)
    assert values(result, "x", "log_likelihood").shape == (25,)


def masked(how):
    mask = torch.tensor([True, False, True, True, False, True, True, True])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(X)):
            if how == "obs_mask":
                pyro.sample("x", dist.Normal(z, 1.0), obs=X, obs_mask=mask)
            elif how == ".mask()":
                pyro.sample("x", dist.Normal(z, 1.0).mask(mask), obs=X)
            else:
                with poutine.mask(mask=mask):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=X)
        with poutine.mask(mask=False):
            pyro.sample("hidden", dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    return model, mask


@every_way
@pytest.mark.parametrize("how", ["poutine.mask", ".mask()", "obs_mask"])
def test_masked_observations_are_no_part_of_the_groups(how, way):
    model, mask = masked(how)
    result = diagnose(model, AutoNormal(model), num_samples=25, **way)
    name = "x_observed" if how == "obs_mask" else "x"
    assert list(result.posterior["observed_data"]) == [name]
    assert_close(torch.from_numpy(result.posterior["observed_data"][name].values), X[mask])
    expected = dist.Normal(values(result, "z").unsqueeze(-1), 1.0).log_prob(X[mask])
    assert_close(values(result, name, "log_likelihood"), expected)
    assert values(result, name, "posterior_predictive").shape == (25, 6)


def test_data_that_are_not_finite_are_named():
    x = X.clone()
    x[3] = math.inf
    with pytest.raises(ValueError, match=r"observed value of site 'x' is inf at index \(3,\) \(1 of 8 elements"):
        diagnose(location, AutoNormal(location), x)


def test_groups_can_be_left_out():
    result = diagnose(location, guide, num_samples=25, log_likelihood=False)
    assert groups(result) == {"posterior", "sample_stats", "guide", "posterior_predictive", "observed_data"}
    result = diagnose(location, guide, num_samples=25, posterior_predictive=False)
    assert groups(result) == {"posterior", "sample_stats", "guide", "log_likelihood", "observed_data"}


@pytest.mark.parametrize("group", ["log_likelihood", "posterior_predictive"])
def test_groups_that_are_too_large_are_left_out_aloud(group, monkeypatch):
    monkeypatch.setattr(predictions, "_MAX_BYTES", 25 * 8 * 8 - 1)
    others = {"log_likelihood": True, "posterior_predictive": True, group: True}
    others[next(name for name in others if name != group)] = False
    with pytest.warns(UserWarning, match=f"the group {group} is left out, as 25 draws of it take .*{group}=False"):
        result = diagnose(location, guide, num_samples=25, **others)
    assert group not in groups(result)


def test_deterministic_sites_that_are_too_large_are_left_out_aloud(monkeypatch):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.deterministic("large", z * torch.ones(4))
        pyro.deterministic("small", -z)

    monkeypatch.setattr(predictions, "_MAX_BYTES", 25 * 4 * 8 - 1)
    with pytest.warns(UserWarning, match="deterministic site 'large' is left out, as 25 draws of it take"):
        result = diagnose(model, AutoNormal(model), num_samples=25)
    assert set(result.posterior["posterior"]) == {"z", "small"}


def test_models_without_data_have_no_groups_of_data():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert groups(diagnose(model, model, num_samples=25)) == {"posterior", "sample_stats", "guide"}


def test_models_that_cannot_be_sampled_have_no_predictions_and_say_so():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()), obs=z.detach() * 0)

    with pytest.warns(UserWarning, match="posterior_predictive is left out, .*NotImplementedError.*=False"):
        result = diagnose(model, guide, num_samples=25)
    assert "posterior_predictive" not in groups(result)


MIXED = {"first": lambda w: w[0], "mean": lambda w: w.mean(), "centred": lambda w: w - w.mean()}


@pytest.mark.parametrize("term", MIXED.values(), ids=MIXED)
def test_deterministic_sites_that_mix_draws_are_left_out_aloud(term):
    """No density shows it, so that training does not suffer."""

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("mixed", term(w))
        pyro.deterministic("sum", w.sum(-1))

    with pytest.warns(UserWarning, match=r"deterministic site 'mixed' is left out, .* vectorize=False"):
        result = diagnose(model, AutoNormal(model), num_samples=25)
    assert set(result.posterior["posterior"]) == {"w", "sum"}
    assert_close(values(result, "sum"), values(result, "w").sum(-1))
    result = diagnose(model, AutoNormal(model), num_samples=25, vectorize=False)
    assert_close(values(result, "mixed"), torch.stack([term(w) for w in values(result, "w")]))


@pytest.mark.parametrize("kind", ["deterministic", "observed"])
@pytest.mark.parametrize("name", ["draw", "v_dim_0"])
def test_names_of_dimensions_are_refused_for_all_sites(kind, name):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if kind == "deterministic":
            pyro.deterministic("v", torch.zeros(2))
            pyro.deterministic(name, z**2)
        else:
            pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=torch.zeros(2))
            pyro.sample(name, dist.Normal(z, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ValueError, match=f"site '{name}' of the model has a name that ArviZ gives to a dimension"):
        diagnose(model, guide, num_samples=25)


# The other line of ArviZ


@pytest.mark.slow
def test_the_other_line_of_arviz_works_alike(tmp_path):
    """The fast tests of this file and of diagnose, in an environment with ArviZ before or since version 1."""
    newer = int(arviz.__version__.split(".")[0]) >= 1
    # Version 1 says that it needs Python 3.12, but runs with 3.11. What else it needs is in this environment.
    packages = ["arviz==0.23.*"] if newer else [f"arviz{part}==1.3.*" for part in ("", "-base", "-stats", "-plots")]
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
    installed = subprocess.run([*pip, "lazy_loader", *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the other line of ArviZ cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    site = tmp_path / sysconfig.get_path("purelib", vars={"base": ""}).lstrip("/")
    (site / "zz_this_environment.pth").write_text(sysconfig.get_path("purelib"))  # after the new packages
    version = subprocess.run(
        [python, "-c", "import arviz; print(arviz.__version__)"], capture_output=True, text=True, check=True
    )
    assert (int(version.stdout.split(".")[0]) >= 1) is not newer
    tests = [Path(__file__), Path(__file__).with_name("test_diagnostics.py")]
    run = subprocess.run(
        [python, "-m", "pytest", "-q", *tests], capture_output=True, text=True, cwd=tests[0].parents[2]
    )
    assert run.returncode == 0, run.stdout[-3000:]
