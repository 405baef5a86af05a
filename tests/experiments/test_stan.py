# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pyro_hollow.experiments import fits, stan
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.stan_models import MODELS, load
from pyro_hollow.infer import LogDensity

#: The files of the models with two, or with other names.
FILES = {"wells_dist": "wells", "gp_predict": "gp-predict"}


def small_data(rng):
    """Data sets with a few observations, by file."""

    def bits(*shape):
        return rng.integers(0, 2, shape).tolist()

    def numbers(*shape):
        return rng.uniform(0.2, 2, shape).tolist()

    def indices(high, size):
        return [*range(1, high + 1), *rng.integers(1, high + 1, size - high).tolist()]

    electric = {
        "y": numbers(12), "treatment": bits(12), "pre_test": numbers(12), "pair": indices(6, 12), "n_pair": 6,
        "grade": indices(3, 12), "grade_pair": indices(3, 6),
    }  # fmt: skip
    return {
        "wells": {"switched": bits(9), "dist": (100 * rng.uniform(size=9)).tolist()},
        "dogs": {"y": bits(4, 6)},
        "congress": {"vote_88": numbers(8), "vote_86": numbers(8), "incumbency_88": bits(8)},
        "cjs_t_t": {"y": [[0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]},
        "Dynocc": {"y": bits(5, 3, 4)},
        "election88": {"y": bits(12), "black": bits(12), "female": bits(12), "state": indices(5, 12), "n_state": 5},
        "radon_redundant_chr": {"y": numbers(10), "county": indices(4, 10), "J": 4},
        **{name: electric for name in ("electric_chr", "electric_1a_chr", "electric_1c_chr")},
        "hiv_chr": {"y": numbers(10), "time": numbers(10), "person": indices(4, 10), "J": 4},
        "endo3": {"n10": 2, "n01": 1, "n11": 1, "I": 6},
        "hepatitis": {"Yvec1": numbers(9), "tvec1": numbers(9), "idxn1": indices(4, 9), "y0": numbers(4)},
        "oxford": {"n0": [5, 6, 7], "r0": [1, 0, 7], "n1": [4, 8, 9], "r1": [2, 3, 1], "year": [-1, 0, 2]},
        "gp-predict": {"y1": numbers(5), "x1": list(range(5)), "x2": [0.5, 2.0, 6.5]},
        "Mth": {"y": [[0, 1, 1], [0, 0, 0], [1, 1, 1], [0, 0, 0]]},
        "irt": {"y": bits(14), "jj": indices(5, 14), "kk": indices(4, 14), "J": 5, "K": 4},
        "lsat": {"response": [[0, 0, 1], [1, 0, 1], [1, 1, 1]], "culm": [2, 2, 5]},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stan").mkdir()
    for name, content in small_data(np.random.default_rng(0)).items():
        (tmp_path / "stan" / f"{name}.data.json").write_text(json.dumps(content))
    return tmp_path


# The Stan programs again, without the constants that "~" drops. Arguments are the data and the constrained parameters;
# `positive` and `bounded` are the log Jacobians of their constraints.


def kernel(y, mean, scale):
    """A normal log density up to all that depends on no parameter, if the scale is none."""
    return float(-0.5 * np.sum(((y - np.asarray(mean)) / scale) ** 2))


def normal(y, mean, scale):
    return kernel(y, mean, scale) - float(np.sum(np.log(scale) + np.zeros(np.shape(y))))


def positive(x):
    return float(np.sum(np.log(x)))


def bounded(x, high):
    return float(np.sum(np.log(x) + np.log(high - x) - np.log(high)))


def bernoulli_logit(y, logits):
    return sum(-math.log1p(math.exp(-z if k else z)) for k, z in zip(np.ravel(y), np.ravel(logits), strict=True))


def inverse_gamma(x, shape, scale):
    return -(shape + 1) * math.log(x) - scale / x


def at(values, indices):
    return np.asarray(values)[np.asarray(indices) - 1]


def plain_wells(d, p, unit=100):
    return bernoulli_logit(d["switched"], p["beta"][0] + p["beta"][1] * np.array(d["dist"]) / unit)


def plain_wells_dist(d, p):
    return plain_wells(d, p, 1)


def plain_dogs(d, p):
    total = kernel(p["beta"], 0, 100)
    for dog in d["y"]:
        avoided = shocked = 0
        for y in dog:
            total += bernoulli_logit(y, p["beta"][0] + p["beta"][1] * avoided + p["beta"][2] * shocked)
            avoided, shocked = avoided + 1 - y, shocked + y
    return total


def plain_congress(d, p):
    mean = p["beta"][0] + p["beta"][1] * np.array(d["vote_86"]) + p["beta"][2] * np.array(d["incumbency_88"])
    return positive(p["sigma"]) + normal(d["vote_88"], mean, p["sigma"])


def plain_cjs_t_t(d, p):
    phi, capture = p["phi_t"], p["p_t"]
    total = bounded(phi, 1) + bounded(capture, 1)
    for y in d["y"]:
        seen = [t for t, value in enumerate(y) if value]
        if not seen:
            continue
        chi = {len(y) - 1: 1.0}
        for t in reversed(range(len(y) - 1)):
            chi[t] = 1 - phi[t] + phi[t] * (1 - capture[t]) * chi[t + 1]
        for t in range(seen[0] + 1, seen[-1] + 1):
            total += math.log(phi[t - 1]) + math.log(capture[t - 1] if y[t] else 1 - capture[t - 1])
        total += math.log(chi[seen[-1]])
    return total


def plain_Dynocc(d, p):
    total = bounded(p["psi1"], 1) + sum(bounded(p[name], 1) for name in ("p", "persists", "colonised"))
    for site in np.array(d["y"]):
        counts = site.sum(0)
        emission = [
            (math.comb(3, k) * q**k * (1 - q) ** (3 - k), float(k == 0)) for k, q in zip(counts, p["p"], strict=True)
        ]
        occupied, empty = p["psi1"] * emission[0][0], (1 - p["psi1"]) * emission[0][1]
        for t in range(1, len(counts)):
            stay, come = p["persists"][t - 1], p["colonised"][t - 1]
            occupied, empty = (
                (occupied * stay + empty * come) * emission[t][0],
                (occupied * (1 - stay) + empty * (1 - come)) * emission[t][1],
            )
        total += math.log(occupied + empty)
    return total


def plain_election88(d, p):
    logits = p["b"][0] * np.array(d["black"]) + p["b"][1] * np.array(d["female"]) + at(p["a"], d["state"])
    prior = kernel(p["mu_a"], 0, 1) + kernel(p["b"], 0, 100) + bounded(p["sigma_a"], 100)
    return prior + normal(p["a"], p["mu_a"], p["sigma_a"]) + bernoulli_logit(d["y"], logits)


def plain_radon_redundant_chr(d, p):
    eta = 100 * p["mu_eta"] + p["sigma_eta"] * p["et"]
    prior = (
        kernel(p["mu_eta"], 0, 1) + kernel(p["et"], 0, 1) + bounded(p["sigma_eta"], 100) + bounded(p["sigma_y"], 100)
    )
    return prior + normal(d["y"], at(eta, d["county"]), p["sigma_y"])


def plain_electric_chr(d, p):
    prior = sum(kernel(p[name], 0, 1) for name in ("mu_a", "eta", "beta"))
    prior += bounded(p["sigma_a"], 100) + bounded(p["sigma_y"], 100)
    a = 100 * p["mu_a"] + p["sigma_a"] * p["eta"]
    return prior + normal(d["y"], at(a, d["pair"]) + p["beta"] * np.array(d["treatment"]), p["sigma_y"])


def plain_electric_1a_chr(d, p, unit=100, c=(0, 0, 0)):
    prior = kernel(p["mu_a"], 0, 1) + kernel(p["eta_a"], 0, 1) + kernel(p["b"], 0, 100)
    prior += bounded(p["sigma_a"], 100) + bounded(p["sigma_y"], 100)
    a = [
        unit * p["mu_a"][g - 1] + p["sigma_a"][g - 1] * eta for g, eta in zip(d["grade_pair"], p["eta_a"], strict=True)
    ]
    mean = at(a, d["pair"]) + at(p["b"], d["grade"]) * d["treatment"] + at(c, d["grade"]) * d["pre_test"]
    return prior + normal(d["y"], mean, at(p["sigma_y"], d["grade"]))


def plain_electric_1c_chr(d, p):
    return kernel(p["c"], 0, 100) + plain_electric_1a_chr(d, p, 50, p["c"])


def plain_hiv_chr(d, p):
    prior = sum(kernel(p[name], 0, 1) for name in ("mu_a1", "mu_a2", "eta1", "eta2"))
    prior += sum(bounded(p[name], 100) for name in ("sigma_a1", "sigma_a2", "sigma_y"))
    a1, a2 = p["mu_a1"] + p["sigma_a1"] * p["eta1"], 0.1 * p["mu_a2"] + p["sigma_a2"] * p["eta2"]
    return prior + normal(d["y"], at(a1, d["person"]) + at(a2, d["person"]) * np.array(d["time"]), p["sigma_y"])


def plain_endo3(d, p):
    est = np.array([[1, 1, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0]])
    total = kernel(p["beta"], 0, 1000) + kernel(p["beta0"], 0, 1000)
    for y, row in zip((1, 0), est, strict=True):
        log_rate = p["beta0"] + p["beta"] * row
        total += float(np.sum(y * log_rate - np.exp(log_rate)))
    return total


def plain_hepatitis(d, p):
    variances = [p[f"sigmasq_{name}"] for name in ("y", "alpha", "beta")]
    total = sum(inverse_gamma(v, 0.001, 0.001) + positive(v) for v in variances)
    total += sum(kernel(p[name], 0, 1000) for name in ("alpha0", "beta0", "gamma"))
    total += normal(p["alpha"], p["alpha0"], math.sqrt(variances[1]))
    total += normal(p["beta"], p["beta0"], math.sqrt(variances[2]))
    y0 = np.array(d["y0"])
    mean = at(p["alpha"], d["idxn1"]) + at(p["beta"], d["idxn1"]) * (np.array(d["tvec1"]) - 6.5)
    mean = mean + p["gamma"] * at(y0 - y0.mean(), d["idxn1"])
    return total + normal(d["Yvec1"], mean, math.sqrt(variances[0]))


def plain_oxford(d, p):
    total = inverse_gamma(p["sigma_sq"], 0.001, 0.001) + positive(p["sigma_sq"]) + kernel(p["b"], 0, 1)
    total += sum(kernel(p[name], 0, 1000) for name in ("mu", "alpha", "beta1", "beta2"))
    year = np.array(d["year"])
    exposed = p["alpha"] + p["mu"] + p["beta1"] * year + p["beta2"] * (year**2 - 22) + p["b"] * math.sqrt(p["sigma_sq"])
    for n, r, logits in ((d["n0"], d["r0"], p["mu"]), (d["n1"], d["r1"], exposed)):
        for count, hits, z in zip(n, r, logits, strict=True):
            total += bernoulli_logit([1] * hits + [0] * (count - hits), [z] * count)
    return total


def plain_gp_predict(d, p):
    x = np.array([*d["x1"], *d["x2"]])
    covariance = p["alpha"] ** 2 * np.exp(-((x[:, None] - x) ** 2) / (2 * p["rho"] ** 2)) + 1e-9 * np.eye(len(x))
    f = np.linalg.cholesky(covariance) @ p["eta"]
    total = sum(kernel(p[name], 0, 1) for name in ("alpha", "sigma", "eta")) + inverse_gamma(p["rho"], 5, 5)
    total += sum(positive(p[name]) for name in ("alpha", "rho", "sigma"))
    return total + normal(d["y1"], f[: len(d["y1"])], p["sigma"])


def plain_Mth(d, p):
    total = bounded(p["omega"], 1) + bounded(p["mean_p"], 1) + bounded(p["sigma"], 5) + kernel(p["eps_raw"], 0, 1)
    for y, eps in zip(d["y"], p["eps_raw"], strict=True):
        member = math.log(p["omega"]) + bernoulli_logit(y, np.log(p["mean_p"] / (1 - p["mean_p"])) + p["sigma"] * eps)
        total += member if any(y) else float(logsumexp([member, math.log(1 - p["omega"])]))
    return total


def plain_irt(d, p):
    total = kernel(p["alpha"], 0, 1) + kernel(p["beta"], 0, 1) + kernel(p["delta"], 0.75, 1)
    return total + bernoulli_logit(d["y"], at(p["alpha"], d["jj"]) - at(p["beta"], d["kk"]) + p["delta"])


def plain_lsat(d, p):
    total = kernel(p["alpha"], 0, 100) + kernel(p["theta"], 0, 1) + kernel(p["beta"], 0, 100) + positive(p["beta"])
    students = [pattern for pattern, count in zip(d["response"], (2, 0, 3), strict=True) for _ in range(count)]
    for theta, pattern in zip(p["theta"], students, strict=True):
        total += bernoulli_logit(pattern, p["beta"] * theta - p["alpha"])
    return total


@pytest.mark.parametrize("name", MODELS)
def test_log_density_is_that_of_stan(name, folder):
    model = load(name, folder)
    density = LogDensity(model.model, compile=False)
    assert density.particles == "plate"
    z = 0.5 * torch.randn(4, density.dim)
    data = json.loads((folder / "stan" / f"{FILES.get(name, name)}.data.json").read_text())
    for point, value in zip(z, density(z), strict=True):
        parameters = {site: x.squeeze().numpy() for site, x in density.constrain(point).items()}
        expected = globals()[f"plain_{name}"](data, parameters)
        assert float(value) + model.dropped == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_data_have_the_published_size(name, data_dir):
    density = LogDensity(load(name, data_dir).model, compile=False)
    assert density.dim == stan.PUBLISHED[name][0] and density.particles == "plate"


def laplace(density):
    """A Gaussian at the mode of a density of few latents, somewhat wider than it."""
    z = density.start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_change=0, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -density(z)
        value.backward()
        return value

    optimizer.step(loss)
    step = 1e-4 / density.value_and_gradient(z + 1e-4 * torch.eye(density.dim))[1].norm(dim=-1)
    shifts = step.diag()
    forward, backward = (density.value_and_gradient(z.detach() + sign * shifts)[1] for sign in (1, -1))
    precision = (backward - forward) / (2 * step.unsqueeze(-1))
    covariance = 1.2 * torch.linalg.inv((precision + precision.mT) / 2)
    return torch.distributions.MultivariateNormal(z.detach(), covariance)


@pytest.mark.parametrize("name", ("wells", "wells_dist", "dogs", "congress"))
def test_published_evidence(name, data_dir):
    """On these all published methods agree to the second decimal."""
    model = load(name, data_dir)
    density = LogDensity(model.model, compile=False)
    gaussian = laplace(density)
    z = gaussian.sample((20_000,))
    evidence = torch.logsumexp(density(z) - gaussian.log_prob(z), 0) - math.log(len(z)) + model.dropped
    assert float(evidence) == pytest.approx(stan.PUBLISHED[name][4], abs=0.01)


def test_missing_and_broken_files_are_named(folder):
    with pytest.raises(ValueError, match="rosenbrock"):
        load("rosenbrock", folder)
    path = folder / "stan" / "dogs.data.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="Stan's example models with y"):
        load("dogs", folder)
    path.unlink()
    with pytest.raises(DataError, match="https://github.com/stan-dev/example-models.*stan/dogs.data.json.*--data-dir"):
        load("dogs", folder)


# The experiment


def result(name="dogs", seed=0, guide="fit", **found):
    return fits.Result(fits.Config(name, guide, seed, 300.0), **{"num_samples": 4000, **found})


def test_error_of_the_evidence_beside_a_failure():
    assert fits.cells([result(failure="x"), result(log_evidence=1.0, log_evidence_error=0.1)])[1] == "1.00 ± 0.100"


def test_verdict_counts_failures_as_the_worst():
    good = [result(elbo=-298.26), result(seed=1, elbo=-298.27), result(seed=2, failure="ValueError: no")]
    bad = [result("irt", elbo=-15424.0), result("irt", seed=1, failure="ValueError"), result("irt", 2, failure="x")]
    lines = stan.verdict({"dogs": {"fit": good}, "irt": {"fit": bad}, "wells": {"iaf": good}})
    assert lines.splitlines() == [
        "At or above ADVI: 0 of 1 models; below on irt.",
        "At or above NF, STL: 0 of 2 models; below on dogs, irt.",
    ]
    assert stan.verdict({"dogs": {"fit": good[:1]}}).endswith("NF, STL: 1 of 1 models.")
    assert stan.verdict({"dogs": {"iaf": good}}) == ""


def test_table_has_failures_in_it():
    failed = result("lsat", failure="RuntimeError: no memory")
    lines = stan.format_table({"lsat": {"fit": [failed]}, "dogs": {"fit": [result(elbo=-298.26, steps=450)]}})
    _, _, lsat, dogs = lines.splitlines()
    assert "| lsat (1006) (1 failed) | - | -4091.57 | -1558.08 | -1557.77 | -1557.36 | - |" in lsat
    assert "| dogs (3) | - | -298.26 |" in dogs and "| 450 |" in dogs


def test_command_line(folder, tmp_path, capsys):
    output = tmp_path / "results"
    command = ["--models", "wells", "--guides", "fit", "multivariate", "--seeds", "0", "1", "--data-dir", str(folder)]
    command += ["--output", str(output), "--time-limit", "2"]
    stan.main(command)
    printed = capsys.readouterr().out
    assert "| wells (2) | - | -2041.90 |" in printed and "| wells (2), multivariate |" in printed
    assert (output / "table.md").read_text() in printed
    path = output / "wells" / "fit-2-0.json"
    found = json.loads(path.read_text())
    assert found["failure"] == "" and found["ess"] > 1 and found["num_samples"] == 4000
    assert found["elbo"] <= found["log_evidence"] + 3 * found["log_evidence_error"]
    before = path.stat().st_mtime_ns
    stan.main(command)
    assert path.stat().st_mtime_ns == before
    assert torch.get_default_dtype() == torch.float64


def test_missing_data_end_the_program(tmp_path, capsys):
    with pytest.raises(SystemExit):
        stan.main(["--models", "wells", "--data-dir", str(tmp_path)])
    assert "wells.data.json is missing" in capsys.readouterr().err


def test_failures_are_kept(tmp_path):
    def model():
        raise ValueError("no density\nanywhere")

    found = fits.run(model, fits.Config("none", "fit", 0, 1.0), tmp_path)
    assert found.failure == "ValueError: no density" and math.isnan(found.elbo)
    assert fits.run(None, found.config, tmp_path).failure == found.failure
    assert fits.failures([found]) == ["none, fit, seed 0: ValueError: no density"]


def test_interrupted_fits_are_not_kept(tmp_path, monkeypatch):
    fitted = fits.infer.Fit(None, reasons=["Ctrl-C ended the fit before it was done"])
    monkeypatch.setattr(fits.infer, "fit", lambda *args, **kwargs: fitted)
    with pytest.raises(KeyboardInterrupt):
        fits.run(None, fits.Config("none", "fit", 0, 1.0), tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_middle():
    assert fits.middle([3.0, 1.0, 2.0], 1) == "2.0 (1.0 to 3.0)"
    assert fits.middle([1.0, math.nan], 2) == "1.00" and fits.middle([], 1) == "-"


def test_every_model_has_published_numbers():
    assert list(stan.PUBLISHED) == list(MODELS)
