# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import importlib.util
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pyro_hollow.experiments import sde as experiment
from pyro_hollow.experiments import sde_gradient_flow
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.sde import Config, Result, Scale, format_summary, format_times, make_sde, run
from pyro_hollow.experiments.sde_processes import PROCESSES, divide, load
from pyro_hollow.nn import HollowNN
from pyro_hollow.ops import field_derivatives
from pyro_hollow.sde import DiagonalSDE, GaussianMixtureMarginals

SIMULATED = [name for name in PROCESSES if name != "fertility"]
SMALL = ["--steps", "3", "--seed", "0", "--train", "20", "--test", "15"]


@pytest.fixture(autouse=True)
def float32():
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", SIMULATED)
def test_processes(name):
    process = load(name)
    train, test = process.split(30, 20)
    assert process.name == name
    assert train.shape[:2] == (len(process.times), 30) and test.shape[:2] == (len(process.times), 20)
    assert train.shape[2] == test.shape[2] and torch.isfinite(train).all()
    assert (train[1:] != train[:-1]).all()


def test_finer_paths_for_learning():
    assert divide((0.0, 1.0, 3.0), 2) == [0.0, 0.5, 1.0, 2.0, 3.0]
    process = load("gbm")
    train, test = process.split(30, 20, parts=4)
    assert train.shape == (21, 30, 2) and test.shape == (6, 20, 2)
    # Observed more often, the steps are smaller.
    steps = process.paths(2000, 4).log().diff(dim=0)
    assert_close(steps.std((0, 1)), torch.tensor([0.3, 0.5]) * math.sqrt(0.05), rtol=0.05, atol=0)


def test_noise_of_what_is_learned():
    process, scale = load("ou-2"), Scale(torch.zeros(2), torch.ones(2))
    config = Config("ou-2", "matching", 3, 0, 20, 15, noise=2.0)
    x = 10 * torch.randn(200, 2)
    assert make_sde(process, config, 2, scale).g(torch.tensor(0.5), x).min() >= 2 / math.sqrt(1.5)
    assert make_sde(process, replace(config, method="transitions"), 2, scale).g(torch.tensor(0.5), x).min() < 1
    assert (make_sde(process, replace(config, method="known-noise"), 2, scale).g(torch.tensor(0.5), x) == 0.7).all()


def test_moments_of_ornstein_uhlenbeck():
    process = load("ou-2")
    x = process.paths(2000)
    t = torch.tensor(process.times)
    # The skew-symmetric part turns the mean by one radian per time.
    radius, angle = (
        1.5 * math.sqrt(2) * (-t).exp(),
        math.pi / 4 + t * torch.sign(process.sde.f(t[0], torch.eye(2))[0, 1]),
    )
    mean = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    var = 0.7**2 / 2 + (0.3**2 - 0.7**2 / 2) * (-2 * t).exp()
    assert_close(x.mean(1), mean, rtol=0, atol=0.07)
    assert_close(x.var(1), var.unsqueeze(-1).expand(-1, 2), rtol=0.15, atol=0)


def test_moments_of_geometric_brownian_motion():
    x = load("gbm").paths(4000)
    assert_close(x[-1].mean(0), torch.tensor([0.2, -0.1]).exp() * math.exp(0.02), rtol=0.05, atol=0)
    assert_close(x[-1].log().std(0), torch.tensor([0.13, 0.29]).sqrt(), rtol=0.06, atol=0)


@pytest.mark.parametrize("d", [1, 2])
def test_drift_of_the_double_well_is_a_gradient(d):
    def potential(t, x):
        return (x[..., 0] ** 2 - 1) ** 2 + ((x[..., 1] - x[..., 0] / 2) ** 2 if d == 2 else 0)

    x, t = torch.randn(10, d), torch.tensor(0.0)
    assert_close(load(f"double-well-{d}").sde.f(t, x), -field_derivatives(potential, t, x, 1)[1])


def test_data_set_that_is_not_installed(monkeypatch):
    for name in ("statsmodels", "statsmodels.datasets", "statsmodels.datasets.fertility"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match="pip install statsmodels"):
        load("fertility")


@pytest.mark.skipif(importlib.util.find_spec("statsmodels") is None, reason="needs statsmodels")
@pytest.mark.filterwarnings("ignore")
def test_data_set():
    process = load("fertility")
    train, test = process.split(0, 0)
    assert train.shape == test.shape == (11, 94, 1) and process.sde is None
    assert 1.4 < train[0].mean() < 1.9 and train[-1].mean() < 1.2  # births per woman, logarithms
    assert not (train[:, :, None] == test[:, None]).all(0).any()  # no country in both


def test_gradient_drift_is_a_gradient_in_the_units_of_the_data():
    process = load("double-well-2")
    scale = Scale(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0]))
    sde = make_sde(process, Config("double-well-2", "gradient", 3, 0, 20, 15), 2, scale)
    x, t = torch.randn(2), torch.tensor(0.3)
    jacobian = torch.autograd.functional.jacobian(lambda x: sde.f(t, scale.to_z(x)) * scale.scale, x)
    assert_close(jacobian, jacobian.T)
    assert jacobian[0, 1].abs() > 1e-4
    assert_close(sde.g(t, scale.to_z(x)) * scale.scale, process.sde.g(t, x))


def table_rows(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_command(tmp_path, capsys, monkeypatch):
    arguments = ["--process", "ou-1", "gbm", "--output", str(tmp_path), *SMALL]
    experiment.main(arguments)
    first = capsys.readouterr().out
    assert [line.split(" | ")[1] for line in table_rows(first) if line.startswith("| geometric")] == [
        "matching", "density of matching", "transitions", "fresh",
    ]  # fmt: skip
    assert (tmp_path / "ou-1.png").stat().st_size > 10_000 and (tmp_path / "gbm.png").stat().st_size > 10_000
    (path,) = tmp_path.glob("gbm/matching-*.json")
    saved = json.loads(path.read_text())
    assert len(saved["times"]) == 5 and all(len(rows) == 5 for rows in saved["distances"].values())
    assert saved["drift_error"] > 0 and saved["diffusion_error"] > 0
    # A second time nothing is computed; the figures are of the same results.
    monkeypatch.setattr(experiment, "draw", lambda *args: None)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    experiment.main(arguments)
    assert capsys.readouterr().out == first
    assert stamps == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}


def test_runs_repeat(tmp_path):
    config = Config("gbm", "known-noise", 3, 5, 20, 15)
    first = run(load("gbm"), config, tmp_path / "a")
    again = run(load("gbm"), config, tmp_path / "b")
    other = run(load("gbm"), replace(config, seed=6), tmp_path / "b")
    assert first.distances == again.distances != other.distances
    assert first.diffusion_error < 1e-5 and 0 < first.drift_error_inside != first.drift_error


def test_transitions_are_learned_from_finer_paths(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment, "fit_transitions", lambda times, sde, z, config: seen.append((times, z)))
    run(load("ou-1"), Config("ou-1", "transitions", 3, 0, 20, 15), tmp_path)
    ((times, z),) = seen
    assert len(times) == len(z) == 6 * experiment.PARTS + 1
    assert_close(times, torch.linspace(0, 1.5, len(times)))


def test_each_start_once_where_there_are_just_enough(tmp_path):
    for train, once in ((15, True), (20, False)):
        run(load("ou-1"), Config("ou-1", "known-noise", 1, 0, train, 15), tmp_path)
        (path,) = tmp_path.glob(f"ou-1/*-{train}-15-0.npz")
        starts = np.load(path)["equation"][0]
        assert (len(np.unique(starts)) == 15) == once


def test_tables():
    def result(seed, energy, p, drift=math.nan):
        config = Config("ou-1", "matching", 3, seed, 20, 15)
        rows = [[energy, 0.5, p], [energy, 0.5, 0.9]]
        return Result(config, [0.5, 1.0], {"equation": rows, "density": rows}, drift_error=drift, seconds=7.0)

    runs = {"matching": [result(0, 0.1, 0.05, 0.2), result(1, 0.3, 0.06, 0.4)]}
    lines = table_rows(format_times(load("ou-1"), runs))
    assert lines[1:] == ["| 0.5 | 0.200 / 0.500 | 0.200 / 0.500 |", "| 1 | 0.200 / 0.500 | 0.200 / 0.500 |"]
    lines = table_rows(format_summary({"OU": runs}))
    assert lines[1] == "| OU | matching | 1 of 4 | 0 of 2 | 0.200 | 0.500 | 30.0% | - | - | 7 |"
    assert lines[2].endswith("| 0.500 | - | - | - | - |")


def test_cost():
    (row,) = experiment.cost_table([3], batch=4, repeats=1)[2:]
    assert all(float(cell) > 0 for cell in row.strip(" |").split(" | "))


def test_plain_and_cheap_step_have_the_same_gradients():
    torch.set_default_dtype(torch.float64)
    density = GaussianMixtureMarginals(3, 4, (0.0, 1.0), covariance="diagonal")
    matching = experiment._matching(density, DiagonalSDE(HollowNN(3), HollowNN(3)), where="data")
    candidates = experiment.cost_candidates(matching, torch.rand(6), torch.randn(6, 3))
    gradients = []
    for name in ("step", "plain"):
        candidates[name]()
        gradients.append([parameter.grad.clone() for parameter in matching.parameters()])
    assert_close(*gradients)


def test_gradient_flows(tmp_path, capsys):
    arguments = ["--gradient-flow", "--potential", "quadratic", "--particles", "fresh", "--gap", "0.1"]
    arguments += ["--dim", "2", "--size", "50", "--seeds", "0", "--output", str(tmp_path)]
    experiment.main(arguments)
    table = capsys.readouterr().out
    experiment.main(arguments)  # reads what is kept
    assert capsys.readouterr().out == table
    rows = table_rows(table)
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| quadratic, 2-d"]
    assert len(list(tmp_path.glob("gradient-flow/*.json"))) == 1


def flow_result(seed, variance, low, high, identified):
    config = sde_gradient_flow.Config("quadratic", "fresh", 0.1, 2, seed)
    return sde_gradient_flow.Result(config, variance, low, high, identified, 1.0, 0.1 * (seed + 1), 0.9, 5.0, [])


def test_table_of_gradient_flows():
    found = [flow_result(0, 0.21, 0.18, 0.25, True), flow_result(1, 0.30, 0.22, math.inf, False)]
    (row,) = table_rows(sde_gradient_flow.format_results(found))[1:]
    expected = "quadratic, 2-d | fresh | 0.1 | 2 | 0.255 | 27.5% | 50.0% | 1 of 2 | 1 of 2 | 33% | 0 | 0.150 | 0.200"
    assert row == f"| {expected} | 0.900 | 0.900 | 5 |"


@pytest.mark.parametrize("kind", ["same", "fresh", pytest.param("equilibrium", marks=pytest.mark.slow)])
def test_simulated_gradient_flows(kind):
    times, x = sde_gradient_flow.simulate(sde_gradient_flow.Config("quadratic", kind, 0.3, 2, 0, 2000))
    assert x.shape == (3, 2000, 2) and times.tolist() == pytest.approx([0.0, 0.3, 0.6])
    # The quadratic contracts by exp(-10 t) towards the variance 0.2 / 20.
    assert_close(x[2].var(0), torch.full((2,), 0.01, dtype=x.dtype), rtol=0.15, atol=0)
    if kind == "equilibrium":
        assert_close(x[0].var(0), torch.full((2,), 0.01, dtype=x.dtype), rtol=0.15, atol=0)


def test_drift_of_a_gradient_flow_is_in_the_units_of_the_data(monkeypatch):
    found = SimpleNamespace(drift=lambda x: -3 * x, variance=torch.tensor(0.25, dtype=torch.float64))
    monkeypatch.setattr(experiment, "fit_gradient_flow", lambda *args, **kwargs: found)
    scale, z = Scale(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0])), torch.randn(5, 2)
    config = Config("ou-2", "gradient-flow", 3, 0, 20, 15)
    sde, _ = experiment.learn_gradient_flow(load("ou-2"), torch.zeros(7, 20, 2), scale, config)
    x, t = scale.to_x(z), torch.tensor(0.0)
    assert_close(sde.f(t, z) * scale.scale, -3 * x)
    assert_close(sde.g(t, z) * scale.scale, torch.full_like(x, 0.5))
