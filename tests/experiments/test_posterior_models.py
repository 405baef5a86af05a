# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import json
import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from pyro.poutine.util import site_is_subsample
from torch.autograd import grad
from torch.distributions import biject_to

from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.posterior_models import POSTERIORS, load

SYNTHETIC = ("funnel", "banana", "ring", "bent")
POSTERIORDB = ("eight_schools", "ark", "garch", "kidscore")
DIMENSIONS = dict(zip(POSTERIORS, (10, 2, 2, 50, 10, 7, 4, 5), strict=True))
QUANTITIES = {
    "eight_schools-eight_schools_noncentered": ["mu", "tau", *(f"theta[{i}]" for i in range(1, 9))],
    "arK-arK": ["alpha", *(f"beta[{i}]" for i in range(1, 6)), "sigma"],
    "garch-garch11": ["mu", "alpha0", "alpha1", "beta1"],
    "kidiq-kidscore_interaction": [*(f"beta[{i}]" for i in range(1, 5)), "sigma"],
}


@pytest.fixture
def folder(tmp_path):
    """Small files in the layout of posteriordb."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=200)
    data = {
        "arK": {"K": 5, "T": 200, "y": y.tolist()},
        "garch": {"T": 200, "y": (5 + 2 * y).tolist(), "sigma1": 0.5},
        "kidiq": {
            "N": 30,
            "kid_score": (87 + 20 * y[:30]).tolist(),
            "mom_hs": [int(i % 3 > 0) for i in range(30)],
            "mom_iq": rng.normal(100, 15, 30).tolist(),
        },
    }
    (tmp_path / "posteriordb").mkdir()
    for name, content in data.items():
        (tmp_path / "posteriordb" / f"{name}.json").write_text(json.dumps(content))
    for name, quantities in QUANTITIES.items():
        draws = {quantity: rng.uniform(0, 0.5, 20).astype(np.float32) for quantity in quantities}
        np.savez(tmp_path / "posteriordb" / f"{name}.reference_draws.npz", **draws)
    return tmp_path


def content(folder, name):
    return json.loads((folder / "posteriordb" / f"{name}.json").read_text())


def supports(model):
    """Name to (bijection from the real line, shape) of each latent site."""
    trace = poutine.trace(model).get_trace()
    latent = [(name, trace.nodes[name]) for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])]
    return {name: (biject_to(site["fn"].support), site["value"].shape) for name, site in latent}


def log_joint(model, points):
    """The log-joint in unconstrained coordinates, (n, *shape) by site, of n vectorised particles."""
    n, log_det, values = len(next(iter(points.values()))), 0.0, {}
    for name, (bijection, _) in supports(model).items():
        x = bijection(points[name])
        log_det = log_det + bijection.log_abs_det_jacobian(points[name], x).reshape(n, -1).sum(-1)
        # The sites that are in no plate have a dimension of size 1 for it.
        values[name] = x if name == "theta" else x.unsqueeze(1)
    with pyro.plate("particles", n, dim=-2):
        trace = poutine.trace(poutine.condition(model, values)).get_trace()
    trace.compute_log_prob()
    sites = [site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)]
    return sum(site["log_prob"].sum(-1) for site in sites) + log_det


def random_points(model, n=5, scale=0.7):
    return {name: scale * torch.randn(n, *shape) for name, (_, shape) in supports(model).items()}


# Log-joints of one point in unconstrained coordinates (lists of numbers), written out in plain Python.


def normal(x, mean, scale):
    return -0.5 * ((x - mean) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def half_cauchy(x, scale):
    return math.log(2 / (math.pi * scale)) - math.log1p((x / scale) ** 2)


def sigmoid(u):
    return 1 / (1 + math.exp(-u))


def plain_funnel(u, folder):
    return normal(u["v"], 0, 1.5) + sum(normal(x, 0, math.exp(u["v"])) for x in u["x"])


def plain_banana(u, folder):
    return normal(u["x1"], 0, 1) + normal(u["x2"], u["x1"] ** 2, 0.3)


def plain_ring(u, folder):
    centres = [(2 * math.cos(k * math.pi / 4), 2 * math.sin(k * math.pi / 4)) for k in range(8)]
    return math.log(sum(math.exp(normal(u["x"][0], a, 0.4) + normal(u["x"][1], b, 0.4)) for a, b in centres) / 8)


def plain_bent(u, folder):
    x = u["x"]
    return normal(x[0], 0, 1) + sum(normal(x[i], math.sin(2 * x[i - 1]), 0.4) for i in range(1, 50))


def plain_eight_schools(u, folder):
    y, sigma = [28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]
    tau = math.exp(u["tau"])
    prior = normal(u["mu"], 0, 5) + half_cauchy(tau, 5) + u["tau"]
    theta = u["theta"]
    return prior + sum(normal(theta[j], u["mu"], tau) + normal(y[j], theta[j], sigma[j]) for j in range(8))


def plain_ark(u, folder):
    y, sigma = content(folder, "arK")["y"], math.exp(u["sigma"])
    total = normal(u["alpha"], 0, 10) + sum(normal(b, 0, 10) for b in u["beta"]) + half_cauchy(sigma, 2.5) + u["sigma"]
    for t in range(6, len(y) + 1):  # as in Stan, from 1
        mean = u["alpha"]
        for k in range(1, 6):
            mean += u["beta"][k - 1] * y[t - k - 1]
        total += normal(y[t - 1], mean, sigma)
    return total


def plain_garch(u, folder):
    data = content(folder, "garch")
    y, sigma = data["y"], [data["sigma1"]]
    a, b = sigmoid(u["alpha1"]), sigmoid(u["fraction"])
    alpha0, alpha1, beta1 = math.exp(u["alpha0"]), a, (1 - a) * b
    for t in range(1, len(y)):
        sigma.append(math.sqrt(alpha0 + alpha1 * (y[t - 1] - u["mu"]) ** 2 + beta1 * sigma[-1] ** 2))
    # alpha0, alpha1 and beta1 with their bounds 0, (0, 1), (0, 1 - alpha1), as in Stan.
    jacobian = u["alpha0"] + math.log(a * (1 - a)) + math.log((1 - a) * b * (1 - b))
    return jacobian + sum(normal(value, u["mu"], scale) for value, scale in zip(y, sigma, strict=True))


def plain_kidscore(u, folder):
    data, sigma, b = content(folder, "kidiq"), math.exp(u["sigma"]), u["beta"]
    total = half_cauchy(sigma, 2.5) + u["sigma"]
    for score, hs, iq in zip(data["kid_score"], data["mom_hs"], data["mom_iq"], strict=True):
        total += normal(score, b[0] + b[1] * hs + b[2] * iq + b[3] * hs * iq, sigma)
    return total


PLAIN = {name: globals()[f"plain_{name}"] for name in POSTERIORS}


@pytest.mark.parametrize("name", POSTERIORS)
def test_log_joint(name, folder):
    model = load(name, folder).model
    points = random_points(model)
    expected = [PLAIN[name]({site: u[i].tolist() for site, u in points.items()}, folder) for i in range(5)]
    assert torch.allclose(log_joint(model, points), torch.tensor(expected), rtol=1e-9)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("alpha1, fraction", [(-80, 0), (80, 0), (0, -80), (0, 80), (-80, 80), (-80, -80), (-12, 12)])
def test_garch_at_its_bounds(alpha1, fraction, dtype, folder):
    torch.set_default_dtype(dtype)
    points = {"mu": 5.0, "alpha0": 0.0, "alpha1": alpha1, "fraction": fraction}
    points = {name: torch.tensor([float(value)], requires_grad=True) for name, value in points.items()}
    value = log_joint(load("garch", folder).model, points)
    assert value.dtype == dtype and value.isfinite()
    assert all(g.isfinite() for g in grad(value.sum(), list(points.values())))


@pytest.mark.parametrize("guide", (AutoNormal, AutoMultivariateNormal, AutoNormalizingFlow))
@pytest.mark.parametrize("name", POSTERIORS)
def test_autoguides(name, guide, folder):
    torch.set_default_dtype(torch.float32)
    posterior = load(name, folder)
    if guide is AutoNormalizingFlow:
        guide = partial(guide, init_transform_fn=partial(iterated, 1, affine_autoregressive))
    guide = guide(posterior.model)
    svi = SVI(posterior.model, guide, pyro.optim.Adam({}), Trace_ELBO(num_particles=32, vectorize_particles=True))
    assert all(math.isfinite(svi.step()) for _ in range(3))
    samples = Predictive(posterior.model, guide=guide, num_samples=7, parallel=True)()
    quantities = posterior.quantities(samples)
    assert len(quantities) == DIMENSIONS[name] and quantities.keys() == posterior.reference.keys()
    assert all(value.shape == (7,) and value.dtype == torch.float32 for value in quantities.values())


@pytest.mark.parametrize("name", POSTERIORS)
def test_description(name, folder):
    posterior = load(name, str(folder))
    assert posterior.name == name
    assert f"({DIMENSIONS[name]}-d)" in posterior.title
    assert posterior.shape == ("nearly Gaussian" if name in ("ark", "garch", "kidscore") else "curved")
    assert posterior.log_evidence == (0 if name in SYNTHETIC else None)
    assert set(posterior.log_scale) <= set(posterior.pair) <= posterior.reference.keys()


def to_sites(name, model, draws):
    """What the model's sites are where the quantities are the draws: the inverse of ``quantities``."""
    draws = {key: value.double() for key, value in draws.items()}
    if name == "garch":
        draws["fraction"] = draws["beta1"] / (1 - draws["alpha1"])
    if name == "banana":
        draws = {"x1": draws["x[1]"], "x2": draws["x[2]"]}
    return {
        site: torch.stack([draws[f"{site}[{i + 1}]"] for i in range(shape[0])], dim=-1) if shape else draws[site]
        for site, (_, shape) in supports(model).items()
    }


def scores(name, posterior):
    """The coordinates of the unconstrained draws and of the log-joint's gradient, by site."""
    sites = to_sites(name, posterior.model, posterior.reference)
    points = {
        site: bijection.inv(sites[site]).detach().requires_grad_()
        for site, (bijection, _) in supports(posterior.model).items()
    }
    gradients = grad(log_joint(posterior.model, points).sum(), list(points.values()))
    return dict(zip(points, zip(points.values(), gradients, strict=True), strict=True))


def assert_zero_mean(values):
    """Within 4.5 standard errors, in each column of (n, *)."""
    assert (values.mean(0).abs() < 4.5 * values.std(0) / math.sqrt(len(values))).all()


def check_score(name, posterior):
    """E[score] = 0 and E[(u - E[u]) score] = -1 (Stein) hold at the draws of the model's own posterior only."""
    for site, (u, score) in scores(name, posterior).items():
        u = u.detach()
        # A weight that does not depend on the coordinate keeps the first identity, and makes the variance finite
        # where the density has the scale of another coordinate.
        if name == "eight_schools" and site != "tau":
            assert_zero_mean(score.reshape(len(score), -1) * posterior.reference["tau"].unsqueeze(-1) ** 2)
        elif name == "funnel" and site == "x":
            assert_zero_mean(score * posterior.reference["v"].exp().unsqueeze(-1))
        else:
            assert_zero_mean(score)
            assert_zero_mean((u - u.mean(0)) * score + 1)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_exact_draws_satisfy_score_identities(name):
    check_score(name, load(name))


@pytest.mark.parametrize("name", POSTERIORDB)
def test_reference_draws_satisfy_score_identities(name, data_dir):
    posterior = load(name, data_dir)
    assert all(value.shape == (10_000,) and value.isfinite().all() for value in posterior.reference.values())
    check_score(name, posterior)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_exact_draws_are_the_same_every_time(name):
    state = torch.get_rng_state()
    first = load(name).reference
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    second = load(name).reference
    assert all(torch.equal(first[key], second[key]) for key in first)


def standardised(name, draws):
    """Independent standard normal numbers, if the draws are right."""
    if name == "funnel":
        return [draws["v"] / 1.5, *(draws[f"x[{i}]"] / draws["v"].exp() for i in range(1, 10))]
    if name == "banana":
        return [draws["x[1]"], (draws["x[2]"] - draws["x[1]"] ** 2) / 0.3]
    x = [draws[f"x[{i}]"] for i in range(1, 51)]
    return [x[0], *((b - torch.sin(2 * a)) / 0.4 for a, b in zip(x[:-1], x[1:], strict=True))]


@pytest.mark.parametrize("name", ("funnel", "banana", "bent"))
def test_moments_of_exact_draws(name):
    z = torch.stack(standardised(name, load(name).reference), dim=-1)
    assert z.shape == (10_000, DIMENSIONS[name])
    assert_zero_mean(z)
    assert_zero_mean(z**2 - 1)
    assert_zero_mean(z**4 - 3)
    correlation = torch.corrcoef(z.T) - torch.eye(z.shape[1])
    assert correlation.abs().max() < 4.5 / math.sqrt(10_000)


def test_moments_of_the_ring():
    draws = load("ring").reference
    x = torch.stack([draws["x[1]"], draws["x[2]"]], dim=-1)
    assert_zero_mean(x)
    # The squared distance to the nearest centre, whose mean comes from quadrature.
    angle = torch.arange(8) * (math.pi / 4)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    axis = torch.linspace(-5, 5, 201)
    grid = torch.cartesian_prod(axis, axis)
    density = log_joint(load("ring").model, {"x": grid}).exp() * (axis[1] - axis[0]) ** 2
    assert abs(density.sum() - 1) < 1e-6
    expected = (density * torch.cdist(grid, centres).amin(-1) ** 2).sum()
    assert_zero_mean(torch.cdist(x, centres).amin(-1) ** 2 - expected)
    # Each of the eight sectors holds an eighth of the draws.
    sector = (torch.atan2(x[:, 1], x[:, 0]) / (math.pi / 4)).round().long() % 8
    assert_zero_mean(torch.nn.functional.one_hot(sector, 8).double() - 1 / 8)


@pytest.mark.parametrize("name", POSTERIORDB)
def test_quantities_are_those_of_the_draws(name, folder):
    posterior = load(name, folder)
    quantities = posterior.quantities(to_sites(name, posterior.model, posterior.reference))
    assert quantities.keys() == posterior.reference.keys()
    assert all(torch.allclose(quantities[key], posterior.reference[key]) for key in quantities)


def test_quantities_keep_the_order_of_coordinates():
    x = torch.randn(6, 50)
    quantities = load("bent").quantities({"x": x})
    assert all(torch.equal(quantities[f"x[{i + 1}]"], x[:, i]) for i in range(50))


def test_eight_schools_without_files(tmp_path):
    assert load("eight_schools").reference is None
    assert load("eight_schools", tmp_path).reference is None


def test_built_in_data_of_eight_schools(data_dir):
    data = content(data_dir, "eight_schools")
    trace = poutine.trace(load("eight_schools").model).get_trace()
    assert trace.nodes["y"]["value"].tolist() == data["y"]
    assert trace.nodes["y"]["fn"].scale.tolist() == data["sigma"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("name", POSTERIORS)
def test_dtype(name, dtype, folder):
    torch.set_default_dtype(dtype)
    assert all(value.dtype == dtype for value in load(name, folder).reference.values())


def test_unknown_name():
    with pytest.raises(ValueError, match="rosenbrock") as raised:
        load("rosenbrock")
    assert all(name in str(raised.value) for name in POSTERIORS)


FILES = {
    "ark": ("arK.json", "arK-arK.reference_draws.npz"),
    "garch": ("garch.json", "garch-garch11.reference_draws.npz"),
    "kidscore": ("kidiq.json", "kidiq-kidscore_interaction.reference_draws.npz"),
}


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named(name, folder):
    with pytest.raises(DataError, match=FILES[name][0]):
        load(name)
    for file in FILES[name]:
        path = folder / "posteriordb" / file
        hidden = path.rename(folder / file)
        with pytest.raises(DataError) as raised:
            load(name, folder)
        for told in (str(path), "https://github.com/stan-dev/posteriordb", "--data-dir"):
            assert told in str(raised.value)
        hidden.rename(path)
    load(name, folder)


def test_draws_in_other_formats_are_named(folder):
    path = folder / "posteriordb" / FILES["garch"][1]
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[:100] + whole[120:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=path.name):
            load("garch", folder)
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match=path.name):
        load("garch", folder)


@pytest.mark.parametrize("broken", (b"", b"\xff\xfe", b"<html>not found</html>", b"{}", b"[1, 2]", b"PK\x03\x04"))
@pytest.mark.parametrize("file", FILES["garch"], ids=("data", "draws"))
def test_broken_files_are_named(file, broken, folder):
    path = folder / "posteriordb" / file
    path.write_bytes(broken)
    with pytest.raises(DataError) as raised:
        load("garch", folder)
    assert str(path) in str(raised.value)
