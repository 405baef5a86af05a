# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from matplotlib.figure import Figure
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_hollow import AutoHollowCNF, Fit, fit
from pyro_hollow.infer import fitting, report
from pyro_hollow.infer.diagnostics import Pair
from pyro_hollow.infer.elbo import InclusiveKL, PathELBO
from pyro_hollow.infer.log_density import LogDensity
from pyro_hollow.nn import GraphConditioner
from pyro_hollow.train import train

DATA = torch.tensor([0.5, 1.5, 2.5])
QUICK = {"num_steps": 60, "num_particles": 32, "seed": 0, "compile": False, "progress": False}


def conjugate(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


# Of z given DATA: precision 1 + 3.
MEAN, SCALE = DATA.sum().item() / 4, 0.5
EVIDENCE = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1.0).log_prob(DATA).item()


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 1.5))
    pyro.sample("x", dist.Normal(torch.zeros(3), (v / 2).exp().unsqueeze(-1)).to_event(1))


def check_conjugate(result, tolerance=0.05):
    draws = torch.as_tensor(result.posterior["posterior"]["z"].values)
    assert draws.mean().item() == pytest.approx(MEAN, abs=tolerance)
    assert draws.std().item() == pytest.approx(SCALE, rel=2 * tolerance)
    assert result.log_evidence == pytest.approx(EVIDENCE, abs=tolerance)


def test_conjugate_posterior_and_evidence():
    result = fit(conjugate, DATA, **QUICK)
    check_conjugate(result, 0.03)
    assert result.elbo == pytest.approx(EVIDENCE, abs=0.03)
    assert result.ess > 3700 and result.diagnostics.reliable
    assert result.log_evidence_error < 0.01
    assert result.num_steps == 60 == len(result.losses) and result.seconds > 0
    assert result.backend == "model as a graph, particles in a plate; flow by the hollow stepper"
    assert not result.reasons


def test_many_latents_with_few_neighbours():
    def walk():
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([70]).to_event(1))
        pyro.factor("steps", dist.Normal(h[..., :-1], 0.5).log_prob(h[..., 1:]).sum(-1))

    result = fit(walk, **{**QUICK, "num_steps": 3})
    assert result.backend.endswith("flow by the hollow stepper, on a graph with 69 edges and 0 hub(s)")
    assert isinstance(result.guide.flows[0].nn.conditioner, GraphConditioner)
    # The prior is Gaussian, and so is the chain of its steps.
    assert result.ess > 1000


def test_shares_of_a_time_limit():
    run = fitting._Run(conjugate, (DATA,), {}, None, None, False, "auto")
    assert not run._time_is_over() and not run._time_is_over(0.5)
    run.begin -= 60
    run.deadline = run.begin + 100
    assert run._time_is_over(0.5) and not run._time_is_over()


def test_all_else_is_left_alone():
    pyro.param("mine", torch.tensor(1.0))
    state = torch.get_rng_state()
    fit(conjugate, DATA, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == ["mine"] or all(
        name == "mine" or name.startswith("AutoHollowCNF_") for name in pyro.get_param_store()
    )


def test_seed_decides():
    first, second = (fit(conjugate, DATA, **QUICK) for _ in range(2))
    assert torch.equal(first.losses, second.losses)
    assert first.elbo == second.elbo
    other = fit(conjugate, DATA, **{**QUICK, "seed": 1})
    assert not torch.equal(first.losses, other.losses)


def test_fits_of_two_models_do_not_share_parameters():
    first = fit(conjugate, DATA, **QUICK)
    second = fit(conjugate, DATA + 10, **QUICK)
    for result, data in ((first, DATA), (second, DATA + 10)):
        median = result.guide.median(data)["z"].item()
        assert median == pytest.approx(data.sum().item() / 4, abs=0.1)
        drawn = Predictive(conjugate, guide=result.guide, num_samples=200)(data)["z"]
        assert drawn.mean().item() == pytest.approx(data.sum().item() / 4, abs=0.2)


def test_flow_improves_on_the_gaussian():
    result = fit(funnel, **{**QUICK, "num_steps": 300})
    # By quadrature the best Gaussian is no better than this; the evidence is 0.
    assert result.gaussian.elbo < -0.3
    assert -0.1 < result.elbo < 0.01


def test_model_that_allows_no_plate():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[0] + z[1], 1.0), obs=x)

    result = fit(model, torch.tensor(1.5), **QUICK)
    assert result.backend.startswith("model as a graph, particles by vmap")
    assert result.log_evidence == pytest.approx(dist.Normal(0.0, 3**0.5).log_prob(torch.tensor(1.5)).item(), abs=0.05)
    draws = torch.as_tensor(result.posterior["posterior"]["z"].values).reshape(-1, 2)
    torch.testing.assert_close(draws.mean(0), torch.tensor([0.5, 0.5]), atol=0.1, rtol=0)
    assert set(result.posterior.groups()) >= {"posterior", "log_likelihood", "posterior_predictive", "observed_data"}


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoIAFNormal])
def test_guides_of_pyro(kind):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=torch.zeros(2))

    guide = kind(model)
    result = fit(model, DATA, guide=guide, **{**QUICK, "num_steps": 350})
    assert result.guide is guide
    assert result.backend.startswith("model as a graph")
    draws = torch.as_tensor(result.posterior["posterior"]["z"].values)
    assert draws.mean().item() == pytest.approx(MEAN, abs=0.1)


def test_guide_by_hand_goes_by_the_handlers():
    def guide(x):
        loc, log_scale = pyro.param("loc", torch.tensor(0.0)), pyro.param("log_scale", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    result = fit(conjugate, DATA, guide=guide, **{**QUICK, "num_steps": 400})
    check_conjugate(result, 0.1)
    assert result.backend == "model and guide by Pyro's handlers"
    assert "function is sampled by Pyro's handlers" in result.reasons[0]


def test_guide_with_settings():
    guide = AutoHollowCNF(conjugate, hidden_dims=[8], transformer_dim=4)
    result = fit(conjugate, DATA, guide=guide, **QUICK)
    check_conjugate(result)
    assert result.guide is guide and result.gaussian is not None
    assert guide.flows[0].solver == AutoHollowCNF(conjugate).solver  # as before the training


def test_guide_that_was_trained_is_not_started_anew():
    guide = fit(conjugate, DATA, **QUICK).guide
    result = fit(conjugate, DATA, guide=guide, **{**QUICK, "num_steps": 1})
    assert result.gaussian is None
    check_conjugate(result)


def test_discrete_latents_are_summed():
    def mixture(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + 4 * k, 1.0), obs=x)

    x = torch.tensor([0.1, -0.4, 4.3])
    result = fit(mixture, x, **QUICK)
    grid = torch.linspace(-10, 10, 4001)
    terms = torch.stack([dist.Normal(grid.unsqueeze(-1) + 4 * k, 1.0).log_prob(x) for k in (0, 1)])
    joint = (terms + torch.tensor([0.7, 0.3]).log().view(2, 1, 1)).logsumexp(0).sum(-1)
    joint = joint + dist.Normal(0.0, 3.0).log_prob(grid)
    assert result.log_evidence == pytest.approx((joint.logsumexp(0) + math.log(20 / 4000)).item(), abs=0.03)
    assert list(result.posterior["guide"].data_vars) == ["loc"]


def test_parameters_of_the_model_are_trained():
    def empirical(x):
        prior = pyro.param("prior", torch.tensor(0.0))
        z = pyro.sample("z", dist.Normal(prior, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    result = fit(empirical, DATA, **{**QUICK, "num_steps": 450})
    assert pyro.param("prior").item() == pytest.approx(DATA.mean().item(), abs=0.1)  # maximises the evidence
    assert "parameters (prior)" in result.reasons[0]


def test_subsampled_data():
    x = 1 + 0.5 * torch.randn(200)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 200, subsample_size=50) as batch:
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[batch])

    result = fit(model, **{**QUICK, "num_steps": 300})
    assert result.guide.median()["z"].item() == pytest.approx(x.mean().item(), abs=0.05)
    assert math.isnan(result.khat) and math.isfinite(result.elbo)
    assert "plate 'data' subsamples" in result.reasons[-1]
    text = str(result)
    assert "NOT JUDGED: no draws were weighed" in text and "subsamples" in text
    low, median, high = map(float, text.split("\nz ")[1].splitlines()[0].split())
    assert low < median < high and median == pytest.approx(x.mean().item(), abs=0.05)
    with pytest.raises(ValueError, match="diagnose"):
        _ = result.posterior
    with pytest.raises(ValueError, match="diagnose"):
        result.plot()


def test_time_limit():
    result = fit(funnel, seed=0, compile=False, progress=False, time_limit=0.5)
    assert result.training.stopped == "time_limit" and not result.converged
    assert "time_limit" in str(result)


def test_gaussian_posterior_needs_no_flow():
    result = fit(conjugate, DATA, seed=0, compile=False, progress=False)
    assert result.num_particles == 64
    assert result.gaussian_suffices and result.converged
    assert result.num_steps == 0 and "the Gaussian of the start suffices" in str(result)
    check_conjugate(result, 0.03)
    result.resume(20, progress=False)
    assert result.num_steps == 20 and not result.gaussian_suffices
    assert result.converged and "not converged" not in str(result)  # 20 steps tell nothing else


@pytest.mark.parametrize("steps", [0, 20])
def test_interrupt_returns_what_there_is(steps, monkeypatch):
    calls = 0
    evaluate = PathELBO.__call__

    def interrupted(self):
        nonlocal calls
        calls += 1
        if calls > steps:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(PathELBO, "__call__", interrupted)
    result = fit(conjugate, DATA, **QUICK)
    assert result.num_steps == steps and result.training.stopped == "interrupted"
    check_conjugate(result)


def test_interrupt_before_there_is_anything(monkeypatch):
    def interrupted(self, z):
        raise KeyboardInterrupt

    monkeypatch.setattr(LogDensity, "value_and_gradient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(conjugate, DATA, **QUICK)


def test_interrupt_while_draws_are_weighed(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_hollow.infer.fitting.diagnose", interrupted)
    result = fit(conjugate, DATA, **QUICK)
    assert result.num_steps == 60 and result.diagnostics is None
    assert "Ctrl-C" in str(result)


def test_interrupt_between_gaussian_and_flow(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_hollow.infer.fitting.train", interrupted)
    result = fit(conjugate, DATA, **QUICK)
    assert result.training is None and "Ctrl-C ended the fit before it was done" in str(result)
    check_conjugate(result, 0.1)


def test_interrupt_before_training_is_resumed(monkeypatch):
    result = fit(conjugate, DATA, **QUICK)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_hollow.infer.fitting.LogDensity", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.resume(1, progress=False)
    assert result.num_steps == 60
    check_conjugate(result)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [None, AutoNormal])
def test_where_gradients_are_off(mode, kind):
    guide = None if kind is None else kind(conjugate)
    with mode():
        result = fit(conjugate, DATA, guide=guide, **QUICK)
    assert result.num_steps == 60
    trained = [p for name, p in result.guide.named_parameters() if name != "affine"]
    assert all(parameter.grad is not None for parameter in trained)


def test_improper_priors():
    def model(x):
        loc = pyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
        scale = pyro.sample("scale", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    x = torch.linspace(-4.0, 10.0, 30)
    result = fit(model, x, **QUICK)
    draws = {name: torch.as_tensor(result.posterior["posterior"][name].values) for name in ("loc", "scale")}
    # The sum of squares over the variance is chi-squared with n - 2 degrees of freedom.
    squares = (x - x.mean()).square().sum().item()
    assert draws["loc"].mean().item() == pytest.approx(3.0, abs=0.1)
    assert draws["scale"].square().mean().item() == pytest.approx(squares / 26, rel=0.05)


def test_guide_with_latents_that_the_model_masks():
    def model(x, mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=mask)

    x, mask = torch.tensor([0.5, 1.5, 2.5, 0.0]), torch.tensor([True, True, True, False])
    result = fit(model, x, mask, guide=AutoNormal(model), **{**QUICK, "num_steps": 400})
    assert result.backend == "model and guide by Pyro's handlers"
    assert "some that the model masks" in result.reasons[0]
    assert result.guide.median()["z"].item() == pytest.approx(MEAN, abs=0.1)


def test_guide_with_latents_in_another_order():
    def model(first, last, x):
        z = {name: pyro.sample(name, dist.Normal(0.0, 1.0)) for name in (first, last)}
        pyro.sample("x", dist.Normal(z["a"], 0.5), obs=x)

    guide = AutoNormal(model)
    guide("b", "a", torch.tensor(2.0))
    result = fit(model, "a", "b", torch.tensor(2.0), guide=guide, **{**QUICK, "num_steps": 400})
    assert "in another order" in result.reasons[0]
    assert result.guide.median()["a"].item() == pytest.approx(1.6, abs=0.15)
    assert result.guide.median()["b"].item() == pytest.approx(0.0, abs=0.15)


def test_failed_diagnostics_are_told_in_a_line(monkeypatch):
    def failing(*args, **kwargs):
        raise ValueError("Expected parameter scale to be positive, but found:\ntensor([1.0, 2.0,\n -1.0])")

    monkeypatch.setattr("pyro_hollow.infer.fitting.diagnose", failing)
    monkeypatch.setattr("pyro_hollow.infer.fitting.describe", failing)
    with pytest.warns(UserWarning, match="no diagnostics, as diagnose failed: Expected parameter scale .* found:$"):
        result = fit(conjugate, DATA, **QUICK)
    assert result.diagnostics is None
    assert result.reasons[-1].endswith("found:)")


def test_resume_goes_on():
    result = fit(funnel, **QUICK)
    before, seconds = result.elbo, result.seconds
    again = result.resume(300, seed=1, progress=False)
    assert again is result and result.num_steps == 360
    assert result.elbo > before and result.seconds > seconds


def test_save_and_load(tmp_path):
    result = fit(conjugate, DATA, **QUICK)
    result.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", conjugate, DATA)
    assert (loaded.elbo, loaded.khat, loaded.num_steps) == (result.elbo, result.khat, result.num_steps)
    assert torch.equal(loaded.losses, result.losses)
    torch.testing.assert_close(loaded.guide.median(DATA), result.guide.median(DATA))
    loaded.resume(30, seed=0, progress=False)
    assert loaded.num_steps == 90
    check_conjugate(loaded)


@pytest.mark.parametrize("in_module", [False, True])
def test_load_restores_the_parameters_of_the_model(in_module, tmp_path):
    def make():
        net = torch.nn.Linear(1, 1)

        def model(x):
            scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            z = pyro.sample("z", dist.Normal(0.0, scale))
            loc = pyro.module("net", net)(x.unsqueeze(-1).double()).squeeze(-1) if in_module else 0.0
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z + loc, 1.0), obs=x)

        return model, net

    model, net = make()
    result = fit(model, DATA, **{**QUICK, "num_steps": 3})
    result.save(tmp_path / "fit.pt")
    scale = pyro.param("scale").item()
    assert scale != 1.0
    pyro.clear_param_store()
    other, other_net = make()
    loaded = Fit.load(tmp_path / "fit.pt", other, DATA)
    assert pyro.param("scale").item() == pytest.approx(scale)
    if in_module:
        torch.testing.assert_close(other_net.state_dict(), net.state_dict())
    loaded.resume(2, seed=0, progress=False)
    assert pyro.param("scale").item() != scale
    with pytest.raises(ValueError, match=r"must have the parameters of the fit, \{'scale': \(\).*but has \{\}"):
        Fit.load(tmp_path / "fit.pt", conjugate, DATA)


def test_load_names_latents_that_differ(tmp_path):
    def model(size, support):
        pyro.sample("a", {"real": dist.Normal(0.0, 1.0), "positive": dist.LogNormal(0.0, 1.0)}[support])
        pyro.sample("b" if size < 4 else "c", dist.Uniform(torch.zeros(size), 1.0).to_event(1))

    fit(model, 2, "real", **{**QUICK, "num_steps": 1}).save(tmp_path / "fit.pt")
    Fit.load(tmp_path / "fit.pt", model, 2, "real")
    differences = {
        (3, "real"): r"site 'b' has shape \(3,\) in the model and \(2,\) in the guide",
        (2, "positive"): r"site 'a' has support GreaterThan\(lower_bound=0.0\) in the model and Real\(\) in the guide",
        (4, "real"): "the guide has no site 'c'; the model has no site 'b'",
    }
    for args, message in differences.items():
        with pytest.raises(ValueError, match=message):
            Fit.load(tmp_path / "fit.pt", model, *args)


def test_page():
    text = str(fit(funnel, **QUICK))
    assert text.startswith("Posterior by AutoHollowCNF\nRELIABLE: ")
    assert "60 steps of 32 particles, not converged" in text and "observes no data" in text
    for part in ("k-hat  ", "(ESS)", "\nELBO  ", "\nx[2]  ", "95 %", "as a graph"):
        assert part in text
    assert "left out" not in text and "deterministic" not in text
    assert repr(Fit(conjugate)).startswith("Posterior without a guide")


def test_page_of_many_latents():
    def model():
        many = pyro.sample("many", dist.Normal(torch.zeros(30), 1.0).to_event(1))
        pyro.sample("matrix", dist.Normal(torch.zeros(5, 5), 1.0).to_event(2))
        pyro.sample("last", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * many, event_dim=1)

    text = str(fit(model, guide=AutoNormal(model), **{**QUICK, "num_steps": 1, "num_particles": 4}))
    rows = [line.split("  ")[0] for line in text.splitlines()]
    shown = {name: [row for row in rows if row.startswith(name)] for name in ("many", "matrix", "last", "double")}
    assert shown["many"] == [*(f"many[{k}]" for k in range(6)), "many[...]"]
    assert shown["matrix"][:6] == [f"matrix[{k // 5}, {k % 5}]" for k in range(6)] and shown["last"] == ["last"]
    assert shown["double"] == [*(f"double[{k}] *" for k in range(7)), "double[...] *"] and "* deterministic" in rows
    assert "66 of 86 elements are left out; arviz" in text and all(len(line) <= 100 for line in text.splitlines())


def test_page_of_deterministic_sites_without_fractions():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("positive", z > 0)

    text = str(fit(model, guide=AutoNormal(model), **{**QUICK, "num_steps": 1, "num_particles": 4}))
    assert "\npositive * " in text


def test_page_of_many_sites():
    def model():
        for k in range(25):
            pyro.sample(f"z_{k}", dist.Normal(0.0, 1.0))

    text = str(fit(model, guide=AutoNormal(model), **{**QUICK, "num_steps": 1, "num_particles": 4}))
    assert "\nz_19 " in text and "z_20" not in text
    assert "5 of 25 elements are left out, 5 sites among them; arviz" in text


def test_page_of_a_bad_fit():
    def far():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.factor("f", -8 * (z[..., 1] - 2 * z[..., 0] ** 2 + 4) ** 2)

    guide = AutoNormal(far, init_scale=0.01)
    text = " ".join(str(fit(far, guide=guide, **{**QUICK, "num_steps": 1})).split())
    assert "NOT RELIABLE: neither the guide nor its corrected draws can be trusted, as " in text
    assert "fit.resume() trains on; NUTS runs on LogDensity(model, ...).potential." in text


def test_figure():
    result = fit(funnel, **QUICK)
    figure = result.plot()
    assert isinstance(figure, Figure)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["negative ELBO", f"largest weights, k-hat {result.khat:.2f}", "most bound pair"]
    assert titles[4:] == ["v", "x[0]", "x[1]", "x[2]"]
    assert figure._repr_png_().startswith(b"\x89PNG")  # for notebooks
    labels = [text.get_text() for text in figure.axes[4].get_legend().get_texts()]
    assert sorted(labels) == ["posterior", "prior"]


def test_reason_is_told_when_the_model_cannot_be_traced():
    def branches(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 1.0 if (z > 100).any() else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    result = fit(branches, DATA, **QUICK)
    check_conjugate(result)
    assert "by Pyro's handlers" in result.backend
    assert any("decides by values of latents" in reason for reason in result.reasons)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": 0}, "num_steps must be at least 1, but got 0"),
        ({"num_particles": 0}, "num_particles must be at least 1, but got 0"),
        ({"compile": "yes"}, "compile must be True, False or 'auto', but got 'yes'"),
        ({"time_limit": -1.0}, "time_limit must be positive and finite, but got -1.0"),
        ({"time_limit": math.inf}, "time_limit must be positive and finite, but got inf"),
        ({"guide": AutoLaplaceApproximation(conjugate)}, r"guide.laplace_approximation\(...\) to diagnose"),
    ],
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(conjugate, DATA, **{**QUICK, **settings})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": "9"}, "num_steps must be a whole number, but got '9'"),
        ({"num_steps": 2.5}, "num_steps must be a whole number, but got 2.5"),
        ({"num_steps": True}, "num_steps must be a whole number, but got True"),
        ({"num_particles": 8.0}, "num_particles must be a whole number, but got 8.0"),
        ({"seed": "1"}, "seed must be a whole number, but got '1'"),
        ({"time_limit": "60"}, "time_limit must be a number of seconds, but got '60'"),
        ({"guide": AutoNormal}, r"guide must be an instance, but got the class AutoNormal: pass guide=AutoNormal\(m"),
        ({"guide": 3}, "guide must be a guide of Pyro, but got 3"),
    ],
)
def test_arguments_of_wrong_types(settings, message):
    with pytest.raises(TypeError, match=message):
        fit(conjugate, DATA, **{**QUICK, **settings})


def test_resume_checks_its_arguments():
    result = Fit(conjugate, (DATA,))
    with pytest.raises(TypeError, match="num_steps must be a whole number, but got 0.5"):
        result.resume(0.5)
    with pytest.raises(ValueError, match="time_limit must be positive"):
        result.resume(time_limit=0)


def test_guide_without_parameters():
    guide = AutoLaplaceApproximation(conjugate)
    guide(DATA)
    with pytest.raises(ValueError, match="guide AutoMultivariateNormal has no parameters to train: judge it by diag"):
        fit(conjugate, DATA, guide=guide.laplace_approximation(DATA), **QUICK)


def test_no_finite_start():
    def nowhere():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", -math.inf * (1 + z**2))

    message = r"finite around none of 11 starts \(at 11 of them log_prob of site 'f' is not finite\)"
    with pytest.raises(ArithmeticError, match=message):
        fit(nowhere, **QUICK)


def test_no_start_with_a_finite_gradient():
    def steep():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z > -math.inf, 0.0, (z - z).sqrt()))

    with pytest.raises(ArithmeticError, match=r"at 11 of them the gradient is not finite"):
        fit(steep, **QUICK)


@pytest.mark.parametrize(
    "likelihood, value, support",
    [
        (lambda z: dist.Bernoulli(logits=z), 2.0, r"Boolean\(\) of Bernoulli"),
        (lambda z: dist.Exponential(z.exp()), -1.0, r"GreaterThanEq\(lower_bound=0.0\) of Exponential"),
    ],
)
def test_data_out_of_the_support(likelihood, value, support):
    def model(x, mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("x", likelihood(z), obs=x)

    x = torch.tensor([1.0, value, 0.0])
    message = rf"observed value of site 'x' is {value} at index \(1,\), outside of the support {support} \(1 of 3"
    with pytest.raises(ValueError, match=message):
        fit(model, x, torch.tensor(True), **QUICK)
    LogDensity(model, x, x != value, compile=False)  # masked
    with pyro.validation_enabled(False):
        LogDensity(model, x, torch.tensor(True), compile=False)


def test_data_of_numpy():
    with pytest.raises(TypeError, match="value of site 'x' must be a tensor, but is a ndarray of NumPy: pass torch.as"):
        fit(conjugate, DATA.numpy(), **QUICK)


def test_support_that_depends_on_latents_is_no_fault():
    def model(x):
        bound = pyro.sample("bound", dist.Pareto(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Uniform(0.0, bound), obs=x)

    LogDensity(model, torch.tensor([1.2, 2.5]), compile=False)  # the median of the bound is 2


def test_draws_at_which_the_model_is_invalid_have_no_weight():
    def model(x):
        scale = pyro.sample("scale", dist.Normal(1.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, scale), obs=x)

    x = torch.tensor([0.3, -0.5])
    result = fit(model, x, **{**QUICK, "num_steps": 1})
    grid = torch.linspace(1e-3, 8.0, 8000)
    joint = dist.Normal(1.0, 1.0).log_prob(grid) + dist.Normal(0.0, grid.unsqueeze(-1)).log_prob(x).sum(-1)
    assert result.log_evidence == pytest.approx((joint.logsumexp(0) + math.log(1e-3)).item(), abs=0.05)
    assert "Expected parameter scale" in result.reasons[-1] and "have no weight" in result.reasons[-1]
    assert 0 < result.diagnostics.impossible < 0.5
    assert (result.posterior["posterior"]["scale"].values > 0).all()
    assert result.posterior["posterior_predictive"]["x"].shape == (4, 1000, 2)


def test_particles_that_mix_away_from_the_start(monkeypatch):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = 3.0 if (z > 1.0).any() else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    monkeypatch.setattr("pyro_hollow.infer.log_density._FIRST_CHECK", 10**6)
    monkeypatch.setattr("pyro_hollow.infer.fitting._NUM_SAMPLES", 400)
    with pytest.warns(UserWarning, match="one particle at a time: the density of a particle depends on those next to"):
        result = fit(model, DATA, **{**QUICK, "num_steps": 5})
    assert "particles were mixed in training" in str(result)
    assert result.backend.startswith("model by Pyro's handlers, one particle at a time")
    grid = torch.linspace(-8.0, 8.0, 4001)
    scale = torch.where(grid > 1.0, 3.0, 1.0)
    joint = dist.Normal(0.0, 1.0).log_prob(grid)
    joint = joint + dist.Normal(grid.unsqueeze(-1), scale.unsqueeze(-1)).log_prob(DATA).sum(-1)
    assert result.log_evidence == pytest.approx((joint.logsumexp(0) + math.log(16 / 4000)).item(), abs=0.3)


def test_model_without_latents():
    with pytest.raises(ValueError, match="latent"):
        fit(lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0)), **QUICK)


def started(model, scale):
    """A guide that is a Gaussian around zero, and its objective."""
    guide = AutoHollowCNF(model, path_gradient=True).setup()
    dim = guide.latent_dim
    guide.set_affine(torch.zeros(dim), scale * torch.eye(dim))
    return guide, PathELBO(guide, LogDensity(model, compile=False), 32)


def test_stretched_base_samples_have_their_density():
    _, objective = started(funnel, 1.0)
    x, log_q = InclusiveKL(objective)._base_sample()
    weights = (dist.Normal(0.0, 1.0).log_prob(x).sum(-1) - log_q).exp()
    assert weights.mean().item() == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close((weights.unsqueeze(-1) * x**2).mean(0), torch.ones(4), atol=0.1, rtol=0)
    assert weights.max() <= 1 / (1 - 0.2)
    assert x.abs().max() > 5  # as far as six thousand samples hardly come unstretched


def test_inclusive_divergence_widens_a_narrow_guide():
    def normal():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide, objective = started(normal, 0.6)
    parameters = [guide.affine]
    train(InclusiveKL(objective), parameters, num_steps=200, lr=0.01, schedule="cosine", progress=False)
    scale = guide.get_posterior().sample((4000,)).std(0)
    torch.testing.assert_close(scale, torch.ones(2), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    "khats, event", [((0.9, 0.4), "trained the tails in 20 steps"), ((0.9, 1.1), "undid 20 steps")]
)
def test_tails_are_trained_where_weights_are_heavy(khats, event, monkeypatch):
    found = iter([(2.0, 0.9), (0.6, 0.9), *((khat, 0.9) for khat in khats)])  # start, extension, before and after

    class Weights:
        def __init__(self, objective, num_samples=0):
            self.khat, self.share = next(found)

    monkeypatch.setattr(fitting, "_Weights", Weights)
    monkeypatch.setattr(fitting, "_TAIL_STEPS", 20)
    monkeypatch.setattr(fitting, "_MAX_STEPS", 30)
    trained = []
    objective_of = fitting.train

    def remember(objective, *args, **kwargs):
        training = objective_of(objective, *args, **kwargs)
        trained.append([p.detach().clone() for p in kwargs_guide[0].parameters()])
        return training

    kwargs_guide = [AutoHollowCNF(funnel, hidden_dims=[8], tails=True)]
    monkeypatch.setattr(fitting, "train", remember)
    result = fit(funnel, guide=kwargs_guide[0], num_particles=16, seed=0, compile=False, progress=False)
    assert event in result.training.events[0]
    undone = "undid" in event
    kept = trained[0] if undone else trained[1]
    for parameter, value in zip(result.guide.parameters(), kept, strict=True):
        torch.testing.assert_close(parameter.detach(), value)


def test_flows_that_are_not_close_get_more_steps():
    guide = AutoHollowCNF(funnel, hidden_dims=[8], tails=True, warm_up=0)
    guide.setup()
    objective = PathELBO(guide, LogDensity(funnel, compile=False, batch_size=16), 16)
    for variance, calls, least in ((0.2, 10, -math.inf), (0.2, 800, 0.02), (0.02, 10, 0.02), (1.0, 800, 0.05)):
        objective._variances.append(torch.tensor(variance))
        objective.num_calls = calls
        assert objective.threshold() == pytest.approx(least)
        objective._variances.clear()


def test_few_weighty_samples_ask_for_more_particles(monkeypatch):
    found = iter([(2.0, 0.01), (2.0, 0.01), (2.0, 0.5), (0.1, 0.5)])

    class Weights:
        def __init__(self, objective, num_samples=0):
            self.khat, self.share = next(found)

    monkeypatch.setattr(fitting, "_Weights", Weights)
    monkeypatch.setattr(fitting, "_MAX_STEPS", 20)
    monkeypatch.setattr(fitting, "_EXTENSION_STEPS", 10)
    result = fit(funnel, num_particles=32, seed=0, compile=False, progress=False)
    assert result.num_steps == 30
    assert "Step 20: few samples carried the weight, so that it went on with 96 particles." in result.training.events


def test_particles_without_density_are_left_out():
    def half():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z < -0.5, -math.inf, 0.0))

    result = fit(half, **{**QUICK, "num_steps": 200})
    assert result.losses.isfinite().all()
    assert result.log_evidence == pytest.approx(math.log(1 - dist.Normal(0.0, 1.0).cdf(torch.tensor(-0.5))), abs=0.1)


def test_save_refuses_parameters_in_the_store(tmp_path):
    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    result = fit(conjugate, DATA, guide=guide, **{**QUICK, "num_steps": 2})
    with pytest.raises(ValueError, match="save keeps the parameters of automatic guides"):
        result.save(tmp_path / "fit.pt")


def test_narrow_posterior_is_not_lost_in_training():
    """Its scale is a thousandth of what the learning rate would move an affine map by."""
    x = 3.0 + 1e-3 * torch.tensor([0.5, -1.0, 0.2])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(z, 1e-3), obs=x)

    result = fit(model, **QUICK)
    covariance = torch.ones(3, 3) + 1e-6 * torch.eye(3)
    evidence = dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(x).item()
    assert result.elbo == pytest.approx(evidence, abs=0.05)


def test_a_model_that_raises_anything_at_a_draw_does_not_lose_the_fit(monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("value")

    monkeypatch.setattr(fitting, "diagnose", fail)
    monkeypatch.setattr(fitting._Run, "_weigh", fail)
    with pytest.warns(UserWarning, match="fit has no diagnostics, as diagnose failed"):
        result = fit(conjugate, DATA, **QUICK)
    assert result.diagnostics is None and not result.trusted and result.num_steps == 60
    with pytest.raises(ValueError, match="there are no corrected draws: .*no draws were weighed"):
        _ = result.posterior


@pytest.mark.parametrize("failing", [2, 3, 4], ids=["after training", "before the tails", "after the tails"])
def test_error_between_trainings_does_not_lose_the_fit(failing, monkeypatch):
    """The weights are computed before the training, after it, and before and after that of the tails."""
    guides, parameters = [], []

    def weigh(self, objective, *args):
        guides.append(objective.guide)
        if len(guides) == failing:
            raise IndexError("far out")
        self.khat, self.share = 0.6, 0.9
        parameters[:] = [parameter.detach().clone() for parameter in objective.guide.parameters()]

    monkeypatch.setattr(fitting._Weights, "__init__", weigh)
    monkeypatch.setattr(fitting, "_MAX_STEPS", 150)
    with pytest.warns(UserWarning, match="fit ended the training early: far out"):
        result = fit(conjugate, DATA, **{**QUICK, "num_steps": None})
    assert len(guides) == failing and result.num_steps >= 100 and result.diagnostics is not None
    assert "the training ended early (far out)" in result.reasons
    if failing == 4:  # the steps on the tails are undone
        assert all(map(torch.equal, parameters, result.guide.parameters()))


def test_errors_before_any_training_are_raised(monkeypatch):
    def fail(*args, **kwargs):
        raise IndexError("far out")

    monkeypatch.setattr(fitting, "train", fail)
    with pytest.raises(IndexError, match="far out"):
        fit(conjugate, DATA, **QUICK)


def test_an_error_at_one_draw_does_not_cost_all_draws(monkeypatch):
    def fail(*args, **kwargs):
        raise IndexError("far out")

    trials = []

    def pair(*args, **kwargs):
        trials.append(None)
        return Pair(*args, **kwargs) if len(trials) > 1 else fail()

    monkeypatch.setattr(fitting, "diagnose", fail)
    monkeypatch.setattr(fitting, "Pair", pair)
    result = fit(conjugate, DATA, **QUICK)
    check_conjugate(result)
    assert any("diagnose failed (far out)" in reason for reason in result.reasons)


def test_resume_counts_earlier_steps(monkeypatch):
    counts = []
    monkeypatch.setattr(PathELBO, "threshold", lambda self: counts.append(self.num_calls) or 1.0)
    result = fit(funnel, **{**QUICK, "num_steps": 20})
    result.resume(progress=False)
    assert min(counts) >= 20 + 100


def test_a_number_of_steps_may_converge():
    """The flow is too far from the posterior to stop by itself so early, but the rate has fallen to zero."""
    result = fit(funnel, **{**QUICK, "num_steps": 300})
    assert result.converged


def test_dense_model_with_many_latents_says_so():
    def dense():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([64]).to_event(1))
        pyro.factor("sum", -0.01 * z.sum(-1) ** 2)

    result = fit(dense, **{**QUICK, "num_steps": 2})
    assert any("no sparse graph of the latents was found" in reason for reason in result.reasons)


def test_deterministic_sites_are_no_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * z)

    assert any("the model observes no data" in reason for reason in fit(model, **{**QUICK, "num_steps": 2}).reasons)


def test_page_of_a_fit_with_a_deterministic_site_without_elements():
    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(1.0))
        pyro.deterministic("empty", torch.zeros(0), event_dim=1)

    lines = str(fit(model, **{**QUICK, "num_steps": 2})).splitlines()
    assert any(line.startswith("z ") for line in lines) and not any(line.startswith("empty") for line in lines)


def test_factors_are_data():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("data", -(z**2))

    assert LogDensity(model, compile=False).observes


def test_graph_is_searched_for_in_a_share_of_the_time_limit(monkeypatch):
    def wide():
        pyro.sample("z", dist.Normal(0.0, 1.0).expand([64]).to_event(1))

    patience = []
    monkeypatch.setattr(fitting, "sparse_conditioner", lambda density, seconds: patience.append(seconds))
    for time_limit in (None, 50.0):
        fit(wide, time_limit=time_limit, modes=False, **{**QUICK, "num_steps": 2})
    assert patience == [math.inf, pytest.approx(5.0)]


def test_page_summarises_only_the_rows_that_it_shows(monkeypatch):
    values = np.arange(20_000, dtype=np.float32).reshape(1, 10, 2000)
    summarised, summary = [], report._summary
    monkeypatch.setattr(report, "_summary", lambda draws: summarised.append(draws) or summary(draws))
    datasets = {
        "guide": xarray.Dataset({"z": (("chain", "draw"), values[..., 0])}),
        "posterior": xarray.Dataset(
            {"z": (("chain", "draw"), values[..., 0]), "many": (("chain", "draw", "k"), values)}
        ),
    }
    table = report._table(SimpleNamespace(posterior=datasets))
    assert sum(draws.shape[1] for draws in summarised) <= report._ROWS
    assert all(np.shares_memory(draws, values) for draws in summarised)  # no others were copied
    assert table[1].split() == ["z", "9000", "5745", "900", "9000", "1.71e+04"]


def test_page_of_sites_without_elements():
    assert report._rows({"empty": np.zeros((5, 0))}, ["mean"], []) == ["latent       mean"]
