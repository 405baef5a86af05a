# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import json
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import linprog

from pyro_hollow.experiments import fits, samplers
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.samplers import anneal, load
from pyro_hollow.infer import LogDensity

DIMENSIONS = {
    "seeds": 26, "credit_flat": 25, "credit": 25, "ionosphere": 35, "funnel": 10, "brownian": 32, "cancer": 31
}  # fmt: skip
BUILT_IN = ("seeds", "funnel", "brownian")


def test_annealing_of_a_gaussian():
    """The density is exp(1.5) times a correlated Gaussian, whose constant is known."""
    loc, scale_tril = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([[0.7, 0.0, 0.0], [0.5, 1.3, 0.0], [0.2, 0.4, 0.9]])
    target, base = dist.MultivariateNormal(loc, scale_tril=scale_tril), dist.Normal(torch.zeros(3), 1.0).to_event(1)

    def excess(x):
        return 1.5 + target.log_prob(x) - base.log_prob(x)

    value, error = anneal(excess, 3, 4000, temperatures=16)
    assert error < 0.02 and abs(value - 1.5) < 4 * error
    _, error_at_once = anneal(excess, 3, 4000, temperatures=1)
    assert error < error_at_once / 2


def test_annealing_onto_a_bounded_density():
    """Particles outside have no density: half a Gaussian has the constant 1/2."""
    value, error = anneal(lambda x: torch.where(x[:, 0] > 0, 0.0 * x[:, 0], -math.inf), 2, 4000)
    assert abs(value - math.log(0.5)) < 4 * error


def test_annealing_of_the_same_density_is_exact():
    assert anneal(lambda x: 0.7 + 0.0 * x.sum(-1), 5, 10) == pytest.approx((0.7, 0.0))


# The targets


def normal(x, loc, scale):
    return float(np.sum(-0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * math.log(2 * math.pi)))


def plain_seeds(values):
    """As in numpyro's program of Blessing et al.; binomial coefficients count."""
    tau, a, b = (values[name].numpy() for name in ("tau", "a", "b"))
    total = 0.01 * math.log(0.01) - math.lgamma(0.01) - 0.99 * math.log(tau) - 0.01 * tau + math.log(tau)
    total += normal(a, 0, 10) + normal(b, 0, np.full(21, 1 / math.sqrt(tau)))
    r = [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
    n = [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]
    x1, x2 = [0] * 11 + [1] * 10, [0] * 5 + [1] * 6 + [0] * 5 + [1] * 5
    for i in range(21):
        p = 1 / (1 + math.exp(-(a[0] + a[1] * x1[i] + a[2] * x2[i] + a[3] * x1[i] * x2[i] + b[i])))
        total += math.log(math.comb(n[i], r[i])) + r[i] * math.log(p) + (n[i] - r[i]) * math.log(1 - p)
    return total


def plain_funnel(values):
    v = float(values["v"])
    return normal(v, 0, 3) + normal(values["x"].numpy(), 0, np.full(9, math.exp(v / 2)))


def plain_brownian(values):
    innovation, noise = (float(values[f"{name}_noise_scale"]) for name in ("innovation", "observation"))
    x = values["x"].numpy()
    first, last = (part.numpy() for part in load("brownian").args)
    total = normal(math.log(innovation), 0, 2) + normal(math.log(noise), 0, 2)  # of the unconstrained logarithms
    for t in range(30):
        total += normal(x[t], x[t - 1] if t else 0.0, innovation)
    return total + normal(first, x[:10], np.full(10, noise)) + normal(last, x[20:], np.full(10, noise))


@pytest.mark.parametrize("name", BUILT_IN)
def test_log_density(name):
    density = LogDensity(load(name), compile=False)
    z = 0.5 * torch.randn(4, density.dim)
    expected = [globals()[f"plain_{name}"](density.constrain(point)) for point in z]
    assert density(z).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", samplers.TARGETS)
def test_dimension(name, request):
    if name == "cancer":
        pytest.importorskip("sklearn")
    data_dir = None if name in (*BUILT_IN, "cancer") else request.getfixturevalue("data_dir")
    density = LogDensity(load(name, data_dir), compile=False)
    assert (density.dim, density.particles) == (DIMENSIONS[name], "plate")


def test_credit(tmp_path):
    rng = np.random.default_rng(0)
    table = np.column_stack([rng.integers(1, 5, (12, 24)), rng.integers(1, 3, 12)])
    (tmp_path / "samplers").mkdir()
    np.savetxt(tmp_path / "samplers" / "german.data-numeric", table, fmt="%d")
    w = rng.normal(size=25) / 5
    design = np.column_stack([np.ones(12), table[:, :-1] / table[:, :-1].std(0)])
    expected = sum(-math.log1p(math.exp(-z if y == 2 else z)) for z, y in zip(design @ w, table[:, -1], strict=True))
    for name, prior in (("credit_flat", 0.0), ("credit", normal(w, 0, np.full(25, 10.0)))):
        density = LogDensity(load(name, tmp_path), compile=False)
        assert float(density(torch.tensor(w))) == pytest.approx(expected + prior, rel=1e-10)


def test_ionosphere(tmp_path):
    rng = np.random.default_rng(0)
    x, y = np.float32(rng.normal(2, 3, (9, 4))), np.array([1.0, -1, 1, 1, -1, -1, 1, 1, -1])
    x[:, 1] = 7  # a constant column counts as zeros
    (tmp_path / "samplers").mkdir()
    np.savez(tmp_path / "samplers" / "ionosphere.npz", X=x, y=y)
    w, x = rng.normal(size=5), np.float64(x)
    design = np.column_stack([np.ones(9), (x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)])
    expected = normal(w, 0, np.ones(5)) - float(np.log1p(np.exp(-y * (design @ w))).sum())
    density = LogDensity(load("ionosphere", tmp_path), compile=False)
    assert float(density(torch.tensor(w))) == pytest.approx(expected, rel=1e-10)


def test_classes_of_breast_cancer_are_separable():
    """A direction with which all margins are at least 1: the likelihood has no maximum, a flat prior no posterior."""
    pytest.importorskip("sklearn")
    y, design, prior = load("cancer").args
    margins = (2 * y - 1).unsqueeze(-1) * design
    found = linprog(np.zeros(31), A_ub=-margins.numpy(), b_ub=-np.ones(len(y)), bounds=(None, None))
    assert found.status == 0 and prior.base_dist.scale.unique().item() == 10


@pytest.mark.parametrize("name, file", [("credit", "german.data-numeric"), ("ionosphere", "ionosphere.npz")])
def test_missing_and_broken_files_are_named(name, file, tmp_path):
    with pytest.raises(DataError, match=f"samplers/{file} with --data-dir"):
        load(name)
    (tmp_path / "samplers").mkdir()
    for broken in (b"", b"x", b"PK\x03\x04"):
        (tmp_path / "samplers" / file).write_bytes(broken)
        with pytest.raises(DataError, match=file):
            load(name, tmp_path)
    with pytest.raises(ValueError, match="rosenbrock"):
        load("rosenbrock")


# The experiment


def result(name="credit_flat", seed=0, **found):
    return fits.Result(fits.Config(name, "fit", seed, 300.0), **found)


def test_bounds_above_the_evidence_are_marked():
    more = {"annealed": -504.484, "annealed_error": 0.002}
    lines = samplers.format_table({"credit_flat": {"fit": [result(elbo=-504.512, more=more)]}})
    row = lines.splitlines()[2]
    assert row.startswith("| credit_flat | -846.74 | -514.74 | -504.46\\* | -504.62 | -504.484 ± 0.002 | -504.512 |")
    assert lines.endswith("no bound can be.")
    lines = samplers.format_table({"credit_flat": {"fit": [result(failure="ValueError: no")]}})
    assert "| credit_flat (1 failed) |" in lines and "*" not in lines


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(samplers, "PARTICLES", 200)
    command = ["--models", "funnel", "--seeds", "0", "--output", str(tmp_path), "--time-limit", "3"]
    samplers.main(command)
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed
    found = json.loads((tmp_path / "funnel" / "fit-3-0.json").read_text())
    assert found["failure"] == "" and abs(found["more"]["annealed"]) < 1 and found["more"]["annealed_error"] < 1
    samplers.main([*command, "--models", "seeds", "--guides", "multivariate"])
    assert "| seeds, multivariate |" in capsys.readouterr().out
    assert json.loads((tmp_path / "seeds" / "multivariate-3-0.json").read_text())["more"] == {}


def test_missing_data_end_the_program(capsys):
    with pytest.raises(SystemExit):
        samplers.main(["--models", "credit"])
    assert "german.data-numeric is needed" in capsys.readouterr().err
