# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive, iterated
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from pyro.poutine.util import site_is_subsample
from scipy.integrate import solve_ivp
from torch.autograd import grad
from torch.distributions import biject_to

from pyro_hollow.experiments import posterior_models
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.peers import NUMPYRO
from pyro_hollow.experiments.posterior_models import MORE_POSTERIORS, POSTERIORS, load

SYNTHETIC = ("funnel", "banana", "ring", "bent")
POSTERIORDB = ("eight_schools", "ark", "garch", "kidscore", *MORE_POSTERIORS)
ALL = (*POSTERIORS, *MORE_POSTERIORS)
DIMENSIONS = dict(zip(ALL, (10, 2, 2, 50, 10, 7, 4, 5, 8, 3, 5, 10, 6, 3, 6, 8, 26, 4), strict=True))
QUANTITIES = {
    "eight_schools-eight_schools_noncentered": ["mu", "tau", *(f"theta[{i}]" for i in range(1, 9))],
    "arK-arK": ["alpha", *(f"beta[{i}]" for i in range(1, 6)), "sigma"],
    "garch-garch11": ["mu", "alpha0", "alpha1", "beta1"],
    "kidiq-kidscore_interaction": [*(f"beta[{i}]" for i in range(1, 5)), "sigma"],
    "mesquite-logmesquite": [*(f"beta[{i}]" for i in range(1, 8)), "sigma"],
    "kilpisjarvi_mod-kilpisjarvi": ["alpha", "beta", "sigma"],
    "earnings-logearn_interaction": [*(f"beta[{i}]" for i in range(1, 5)), "sigma"],
    "nes2000-nes": [*(f"beta[{i}]" for i in range(1, 10)), "sigma"],
    "sblri-blr": [*(f"beta[{i}]" for i in range(1, 6)), "sigma"],
    "gp_pois_regr-gp_regr": ["rho", "alpha", "sigma"],
    "bball_drive_event_0-hmm_drive_0": [
        f"{name}[{i}]" for name in ("theta1", "theta2", "phi", "lambda") for i in (1, 2)
    ],
    "hudson_lynx_hare-lotka_volterra": [
        *(f"theta[{i}]" for i in range(1, 5)),
        *(f"{name}[{i}]" for name in ("z_init", "sigma") for i in (1, 2)),
    ],
    "diamonds-diamonds": [*(f"b[{i}]" for i in range(1, 25)), "Intercept", "sigma"],
    "one_comp_mm_elim_abs-one_comp_mm_elim_abs": ["k_a", "K_m", "V_m", "sigma"],
}


def more_data(rng):
    """Data sets of MORE_POSTERIORS with a few observations."""

    def positive(*shape):
        return rng.uniform(0.5, 3, shape).tolist()

    def integers(low, high):
        return rng.integers(low, high + 1, 12).tolist()

    sizes = ("weight", "diam1", "diam2", "canopy_height", "total_height", "density")
    answers = {"partyid7": 7, "real_ideo": 7, "educ1": 4, "gender": 2, "income": 5, "age_discrete": 4}
    prior = {"pmualpha": 9.3, "psalpha": 100, "pmubeta": 0, "psbeta": 0.03}
    return {
        "mesquite": {**{name: positive(12) for name in sizes}, "group": integers(0, 1)},
        "kilpisjarvi_mod": {"x": list(range(12)), "y": positive(12), **prior},
        "earnings": {"earn": positive(12), "height": positive(12), "male": integers(0, 1)},
        "nes2000": {**{name: integers(1, high) for name, high in answers.items()}, "race_adj": integers(0, 1)},
        "sblri": {"X": positive(12, 5), "y": positive(12)},
        "gp_pois_regr": {"x": list(range(-6, 6)), "y": positive(12)},
        "bball_drive_event_0": {"u": positive(13), "v": positive(13), "alpha": [[4, 2], [2, 4]]},
        "hudson_lynx_hare": {"y_init": positive(2), "y": positive(12, 2)},
        "diamonds": {"X": positive(12, 25), "Y": positive(12)},
        "one_comp_mm_elim_abs": {"D": 30, "V": 2, "times": np.linspace(0.5, 6, 12).tolist(), "C_hat": positive(12)},
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
        **more_data(rng),
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


def latents(model):
    """Name to node of each latent site."""
    trace = poutine.trace(model).get_trace()
    return {name: trace.nodes[name] for name in trace.stochastic_nodes if not site_is_subsample(trace.nodes[name])}


def supports(model):
    """Name to (bijection from the real line, unconstrained shape) of each latent site."""
    bijections = {name: (biject_to(site["fn"].support), site["value"].shape) for name, site in latents(model).items()}
    return {name: (bijection, bijection.inverse_shape(shape)) for name, (bijection, shape) in bijections.items()}


def log_joint(model, points):
    """The log-joint in unconstrained coordinates, (n, *shape) by site, of n vectorised particles."""
    n, log_det, values = len(next(iter(points.values()))), 0.0, {}
    plates = {name: site["cond_indep_stack"] for name, site in latents(model).items()}
    for name, (bijection, _) in supports(model).items():
        x = bijection(points[name])
        log_det = log_det + bijection.log_abs_det_jacobian(points[name], x).reshape(n, -1).sum(-1)
        # The sites that are in no plate have a dimension of size 1 for it.
        values[name] = x if plates[name] else x.unsqueeze(1)
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


def plain_regression(u, rows, y):
    """Linear regression with flat priors of the coefficients and of sigma."""
    means = [sum(b * x for b, x in zip(u["beta"], row, strict=True)) for row in rows]
    return u["sigma"] + sum(normal(value, mean, math.exp(u["sigma"])) for value, mean in zip(y, means, strict=True))


def plain_mesquite(u, folder):
    data, logs = content(folder, "mesquite"), ("diam1", "diam2", "canopy_height", "total_height", "density")
    rows = [[1, *(math.log(data[name][i]) for name in logs), data["group"][i]] for i in range(12)]
    return plain_regression(u, rows, [math.log(weight) for weight in data["weight"]])


def plain_kilpisjarvi(u, folder):
    data = content(folder, "kilpisjarvi_mod")
    prior = normal(u["beta"][0], 9.3, 100) + normal(u["beta"][1], 0, 0.03)
    return prior + plain_regression(u, [[1, x] for x in data["x"]], data["y"])


def plain_earnings(u, folder):
    data = content(folder, "earnings")
    rows = [[1, height, male, height * male] for height, male in zip(data["height"], data["male"], strict=True)]
    return plain_regression(u, rows, [math.log(earn) for earn in data["earn"]])


def plain_nes(u, folder):
    data = content(folder, "nes2000")
    rows = [
        [1, data["real_ideo"][i], data["race_adj"][i], *(data["age_discrete"][i] == age for age in (2, 3, 4)),
         data["educ1"][i], data["gender"][i], data["income"][i]] for i in range(12)
    ]  # fmt: skip
    return plain_regression(u, rows, data["partyid7"])


def plain_sblri(u, folder):
    data = content(folder, "sblri")
    prior = sum(normal(b, 0, 10) for b in u["beta"]) + math.log(2) + normal(math.exp(u["sigma"]), 0, 10)
    return prior + plain_regression(u, data["X"], data["y"])


def plain_gp(u, folder):
    """The kernel and the Gaussian density by numpy."""
    data = content(folder, "gp_pois_regr")
    x, y, rho, alpha, sigma = np.array(data["x"]), np.array(data["y"]), *map(math.exp, u.values())
    covariance = alpha**2 * np.exp(-((x[:, None] - x) ** 2) / (2 * rho**2)) + sigma * np.eye(12)
    prior = 25 * math.log(4) - math.lgamma(25) + 24 * math.log(rho) - 4 * rho  # Gamma(25, 4)
    prior += 2 * math.log(2) + normal(alpha, 0, 2) + normal(sigma, 0, 1) + sum(u.values())
    log_det = np.linalg.slogdet(2 * math.pi * covariance)[1]
    return prior - 0.5 * (log_det + y @ np.linalg.solve(covariance, y))


def plain_hmm(u, folder):
    """The forward algorithm, each of the two states with probability 1/2 at first."""
    data, theta, total = content(folder, "bball_drive_event_0"), [], 0.0
    for name, prior in (("theta1", (4, 2)), ("theta2", (2, 4))):
        p = sigmoid(u[name][0])
        # The Dirichlet density has the constant 5! / (3! 1!), the Jacobian determinant is p (1 - p).
        total += math.log(20) + prior[0] * math.log(p) + prior[1] * math.log(1 - p)
        theta.append((p, 1 - p))
    rates = []
    for name in ("phi_steps", "lambda_steps"):
        first, step = map(math.exp, u[name])
        total += normal(first, 0, 1) + normal(first + step, 3, 1) + sum(u[name])
        rates.append((first, first + step))
    emission = [
        [
            math.prod(rate[k] * math.exp(-rate[k] * value) for rate, value in zip(rates, pair, strict=True))
            for k in (0, 1)
        ]
        for pair in zip(data["u"], data["v"], strict=True)
    ]
    forward = [0.5 * e for e in emission[0]]
    for e in emission[1:]:
        forward = [e[k] * sum(forward[j] * theta[j][k] for j in (0, 1)) for k in (0, 1)]
    return total + math.log(sum(forward))


def plain_lynx_hare(u, folder):
    """The populations by an adaptive solver, in their own coordinates."""
    data = content(folder, "hudson_lynx_hare")
    (a, b, c, d), z, sigma = ([math.exp(value) for value in u[name]] for name in ("theta", "z_init", "sigma"))
    total = sum(normal(x, 1, 0.5) for x in (a, c)) + sum(normal(x, 0.05, 0.05) for x in (b, d)) + sum(u["theta"])
    total += sum(normal(x, math.log(10), 1) for x in u["z_init"]) + sum(normal(x, -1, 1) for x in u["sigma"])
    y, times = np.array([data["y_init"], *data["y"]]), range(13)

    def slope(t, z):
        return [(a - b * z[1]) * z[0], (-c + d * z[0]) * z[1]]

    solved = solve_ivp(slope, (0, 12), z, "DOP853", times, rtol=1e-10, atol=1e-12).y.T
    for k in (0, 1):
        # LogNormal: the density of log y over y.
        total += sum(normal(math.log(y[t, k]), math.log(solved[t, k]), sigma[k]) - math.log(y[t, k]) for t in times)
    return total


def student_t(x, mean, scale):
    """With three degrees of freedom."""
    return math.log(2 / (math.pi * math.sqrt(3) * scale)) - 2 * math.log1p(((x - mean) / scale) ** 2 / 3)


def plain_diamonds(u, folder):
    data, sigma = content(folder, "diamonds"), math.exp(u["sigma"])
    x = np.array(data["X"])[:, 1:]
    mean = u["Intercept"] + (x - x.mean(0)) @ np.array(u["b"])
    total = sum(normal(b, 0, 1) for b in u["b"]) + student_t(u["Intercept"], 8, 10)
    total += math.log(2) + student_t(sigma, 0, 10) + u["sigma"]
    return total + sum(normal(y, m, sigma) for y, m in zip(data["Y"], mean, strict=True))


def plain_one_comp(u, folder):
    """The concentration by an adaptive solver, in time itself."""
    data = content(folder, "one_comp_mm_elim_abs")
    k_a, k_m, v_m, sigma = map(math.exp, u.values())

    def slope(t, c):
        return k_a * data["D"] / data["V"] * math.exp(-k_a * t) - v_m / data["V"] * c / (k_m + c)

    solved = solve_ivp(slope, (0, 6), [0.0], "DOP853", data["times"], rtol=1e-12, atol=1e-13).y[0]
    total = sum(half_cauchy(x, 1) for x in (k_a, k_m, v_m, sigma)) + sum(u.values())
    return total + sum(
        normal(math.log(y), math.log(c), sigma) - math.log(y) for y, c in zip(data["C_hat"], solved, strict=True)
    )


PLAIN = {name: globals()[f"plain_{name}"] for name in ALL}


def test_runge_kutta_of_the_lotka_volterra_equations():
    """Errors of the fourth order."""
    growth, interaction = torch.tensor([0.55, -0.8]), torch.tensor([-0.028, 0.024])
    log_init = torch.tensor([34.0, 5.9]).log()
    solve = partial(posterior_models._lotka_volterra, growth, interaction, log_init, 20)
    exact = solve(64)
    errors = [float((solve(substeps) - exact).abs().max()) for substeps in (4, 8, 16)]
    assert errors[0] < 1e-3 and all(12 < a / b < 24 for a, b in zip(errors, errors[1:], strict=False))


def test_runge_kutta_of_the_concentration():
    """Steps of the model's size are close enough, at an ordinary K_m and at one of the smallest; more are closer."""
    k_a, k_m, v_m = torch.tensor([[0.76, 0.76], [1.0, 2e-3], [0.45, 0.3]])
    solve = partial(posterior_models._concentration, k_a, k_m, v_m, 15.0, torch.arange(1, 21) / 2)
    exact = solve(200).log()
    errors = [float((solve(substeps).log() - exact).abs().max()) for substeps in (2, 4, 8)]
    assert errors[0] < 1e-3 and errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


@pytest.mark.parametrize("name", ALL)
def test_log_joint(name, folder, monkeypatch):
    monkeypatch.setattr(posterior_models, "SUBSTEPS", 200)
    model = load(name, folder).model
    points = random_points(model, scale=0.3 if name == "lynx_hare" else 0.7)  # further out the ODE is too stiff
    expected = [PLAIN[name]({site: u[i].tolist() for site, u in points.items()}, folder) for i in range(5)]
    assert torch.allclose(log_joint(model, points), torch.tensor(expected), rtol=1e-9)


#: Prints the log-joints of NumPyro's models, given the values of their sites.
NUMPYRO_LOG_JOINTS = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_enable_x64", True)
import numpyro_peers
from numpyro.infer.util import log_density

found = {}
for name, sites in json.load(sys.stdin).items():
    model = numpyro_peers.load(name, pathlib.Path(sys.argv[2]))
    sites = {site: jax.numpy.asarray(value) for site, value in sites.items()}
    found[name] = float(log_density(model, (), {}, sites)[0])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_log_joints_of_numpyro(folder):
    source = Path(posterior_models.__file__).parent
    python = source.parents[1] / NUMPYRO
    if not python.exists():
        pytest.skip("needs NumPyro: run `make numpyro`")
    sites, expected = {}, {}
    for name in ALL:
        model = load(name, folder).model
        points = random_points(model, n=1, scale=0.3)
        bijections = {site: bijection for site, (bijection, _) in supports(model).items()}
        values = {site: bijections[site](u[0]) for site, u in points.items()}
        sites[name] = {site: x.tolist() for site, x in values.items()}
        expected[name] = float(poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum())
    command = [python, "-c", NUMPYRO_LOG_JOINTS, source, folder]
    printed = subprocess.run(command, input=json.dumps(sites), capture_output=True, text=True, check=True).stdout
    assert json.loads(printed.splitlines()[-1]) == pytest.approx(expected, rel=1e-8)


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
@pytest.mark.parametrize("name", ALL)
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
    assert quantities.keys() == posterior.reference.keys()
    assert all(value.shape == (7,) and value.dtype == torch.float32 for value in quantities.values())


@pytest.mark.parametrize("name", ALL)
def test_description(name, folder):
    posterior = load(name, str(folder))
    assert posterior.name == name
    assert f"({DIMENSIONS[name]}-d)" in posterior.title
    assert DIMENSIONS[name] == sum(shape.numel() for _, shape in supports(posterior.model).values())
    assert posterior.shape == ("curved" if name in (*SYNTHETIC, "eight_schools", "one_comp") else "nearly Gaussian")
    assert posterior.log_evidence == (0 if name in SYNTHETIC else None)
    assert set(posterior.log_scale) <= set(posterior.pair) <= posterior.reference.keys()


def to_sites(name, model, draws):
    """What the model's sites are where the quantities are the draws: the inverse of ``quantities``."""
    draws = {key: value.double() for key, value in draws.items()}
    if name == "garch":
        draws["fraction"] = draws["beta1"] / (1 - draws["alpha1"])
    if name == "banana":
        draws = {"x1": draws["x[1]"], "x2": draws["x[2]"]}
    if name == "kilpisjarvi":
        draws = {"beta[1]": draws["alpha"], "beta[2]": draws["beta"], "sigma": draws["sigma"]}
    if name == "hmm":
        steps = {rate: draws[f"{rate}[2]"] - draws[f"{rate}[1]"] for rate in ("phi", "lambda")}
        draws |= {f"{rate}_steps[1]": draws[f"{rate}[1]"] for rate in steps}
        draws |= {f"{rate}_steps[2]": step for rate, step in steps.items()}
    return {
        site: torch.stack([draws[f"{site}[{i + 1}]"] for i in range(node["value"].shape[0])], dim=-1)
        if node["value"].shape else draws[site]
        for site, node in latents(model).items()
    }  # fmt: skip


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
@pytest.mark.parametrize("name", ALL)
def test_dtype(name, dtype, folder):
    torch.set_default_dtype(dtype)
    assert all(value.dtype == dtype for value in load(name, folder).reference.values())


def test_unknown_name():
    with pytest.raises(ValueError, match="rosenbrock") as raised:
        load("rosenbrock")
    assert all(name in str(raised.value) for name in ALL)


FILES = {
    name: (f"{draws.split('-')[0]}.json", f"{draws}.reference_draws.npz")
    for name, draws in zip(POSTERIORDB, QUANTITIES, strict=True)
    if name != "eight_schools"
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
