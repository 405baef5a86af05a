# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest
import torch

from pyro_hollow.experiments import sbi
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.harness import kept
from pyro_hollow.experiments.sbi_tasks import TASKS, load
from pyro_hollow.infer.simulation import Simulator

QUICK = {"num_flows": 1, "num_steps": 5}


def simulate(name, count):
    found = Simulator(TASKS[name].model, (), {}, ["x"], ["theta"]).draw(count)
    return found.theta["theta"], found.x["x"]


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_vectorised_with_the_shapes_of_the_observations(name):
    simulator = Simulator(TASKS[name].model, (), {}, ["x"], ["theta"])
    assert simulator.vectorized, simulator.reason
    theta, x = simulate(name, 10)
    assert theta.shape == (10, TASKS[name].dim) and simulator.exchangeable == (0 if name == "slcp" else None)
    assert x.shape[1:] == {"slcp": (4, 2), "bernoulli_glm": (10,)}.get(name, (2,))


def test_two_moons_are_crescents():
    theta, x = simulate("two_moons", 5000)
    shift = torch.stack([-(theta.sum(-1).abs()), theta[:, 1] - theta[:, 0]], -1) / math.sqrt(2)
    radius = (x - shift - torch.tensor([0.25, 0.0])).norm(dim=-1)
    assert radius.mean().item() == pytest.approx(0.1, abs=1e-3) and radius.std().item() == pytest.approx(0.01, rel=0.05)


def test_slcp_has_the_covariance_of_the_benchmark():
    theta, x = simulate("slcp", 20_000)
    scale = theta[:, 2:4].square()
    z = (x - theta[:, None, :2]) / scale[:, None]
    usual = (scale.min(-1).values > 0.3) & (theta[:, 4] > 0)
    expected = theta[usual, 4].tanh().mean().item()
    assert (z[usual, :, 0] * z[usual, :, 1]).mean().item() == pytest.approx(expected, abs=0.02)
    assert z[usual].var(0).mean().item() == pytest.approx(1.0, abs=0.02)


def test_mixture_has_two_scales():
    theta, x = simulate("gaussian_mixture", 20_000)
    assert (x - theta).var().item() == pytest.approx(0.5 * (1 + 0.01), rel=0.03)


def test_glm_has_a_smooth_filter_and_counts_spikes():
    theta, x = simulate("bernoulli_glm", 5000)
    assert theta[:, 0].var().item() == pytest.approx(2.0, rel=0.1)
    assert bool((x[:, 0] == x[:, 0].round()).all()) and 0 <= x[:, 0].min() and x[:, 0].max() <= 100


def test_observations_lie_where_the_model_simulates(data_dir):
    for name in TASKS:
        observations = load(name, data_dir)
        assert len(observations) >= 5
        _, x = simulate(name, 5000)
        for observation, reference in observations:
            low, high = x.flatten(1).aminmax(dim=0)
            assert reference.shape == (10_000, TASKS[name].dim)
            assert bool(((observation.flatten() > low - 1) & (observation.flatten() < high + 1)).all())


def test_accuracy_of_a_classifier():
    x = torch.randn(400, 2)
    assert sbi.c2st(x, torch.randn(400, 2)) == pytest.approx(0.5, abs=0.08)
    assert sbi.c2st(x, x + 3.0) > 0.95


def test_table():
    config = sbi.Config("slcp", 10_000, 0)
    result = sbi.Result(config, [0.7, 0.8], -1.0, 100.0, 0.2, 0.5, 0.51, 0.9, 0.0, [1.0])
    line = sbi.format_table([result]).splitlines()[-1]
    assert line == (
        "| slcp | 10,000 | 0.901 | 0.845 | 0.713 | 0.750 | 0.80 | 0.500 | 51.0 / 90.0 | 0.00% | 100 | 0.20 |"
    )


def test_command_line(tmp_path, capsys, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(sbi, "DRAWS", 200)
    monkeypatch.setattr(sbi, "CALIBRATION_RUNS", 50)
    real = sbi.infer.fit_amortised
    monkeypatch.setattr(sbi.infer, "fit_amortised", lambda *args, **kwargs: real(*args, **kwargs | QUICK))
    (tmp_path / "sbibm").mkdir()
    rng = np.random.default_rng(0)
    arrays = {"observation_1": np.zeros(2), "reference_1": rng.normal(size=(200, 2))}
    np.savez(tmp_path / "sbibm" / "two_moons.npz", **arrays)
    command = ["--tasks", "two_moons", "--simulations", "100", "--seeds", "3", "--data-dir", str(tmp_path)]
    sbi.main([*command, "--output", str(tmp_path / "results")])
    assert (tmp_path / "results" / "table.md").read_text() in capsys.readouterr().out
    found = kept(tmp_path / "results" / "two_moons" / "100-3.json", sbi.Result)
    assert len(found.c2st) == 1 and found.leakage == 0 and 0 < found.draw_seconds < math.inf
    monkeypatch.setattr(sbi.infer, "fit_amortised", None)  # not needed again
    sbi.main([*command, "--output", str(tmp_path / "results")])


def test_errors(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sbi.main(["--data-dir", str(tmp_path)])
    assert "two_moons.npz is missing" in capsys.readouterr().err
    with pytest.raises(DataError, match="is needed"):
        load("slcp", None)
