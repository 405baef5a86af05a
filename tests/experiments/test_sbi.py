# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_hollow
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
        "| slcp | 10,000 | 0.901 | 0.845 | 0.713 | fit_amortised | 0.750 | 0.80 | 0.500 | 51.0 / 90.0 | 0.00% | 100 | "
        "0.20 |"
    )
    peer = sbi.Result(sbi.Config("slcp", 1000, 0, "npe"), [0.9], seconds=7.0, draw_seconds=1.0)
    line = sbi.format_table([result, peer]).splitlines()[-1]
    assert line == "| slcp | 1,000 | 0.975 | 0.965 | 0.921 | npe | 0.900 | - | - | - | - | 7 | 1.00 |"


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
    found = kept(tmp_path / "results" / "two_moons" / "fit_amortised-100-3.json", sbi.Result)
    assert len(found.c2st) == 1 and found.leakage == 0 and 0 < found.draw_seconds < math.inf
    monkeypatch.setattr(sbi.infer, "fit_amortised", None)  # not needed again
    sbi.main([*command, "--output", str(tmp_path / "results")])


PEER = """
import json, sys
import numpy as np
words = sys.argv[1:]
assert words[0] == "-I" and words[1].endswith("sbi_peers.py") and words[5:] == ["--count", "50", "--seed", "2"], words
arrays = np.load(words[3])
print(json.dumps({name: arrays[name].tolist() for name in arrays}), file=open(FOUND, "w"))
np.savez(words[4], draws_1=np.full((50, 2), 3.0))
print("a line")
print(json.dumps({"seconds": 1.5, "draw_seconds": 0.5}))
"""


@pytest.fixture
def program(tmp_path):
    """An executable in place of the Python of sbi, and the file to which it writes what it was given."""
    path, found = tmp_path / "python", tmp_path / "found.json"
    path.write_text(f"#!{sys.executable}\n{PEER.replace('FOUND', repr(str(found)))}")
    path.chmod(0o755)
    return path, found


def test_peer_gets_the_simulations_of_the_seed_and_the_prior(tmp_path, program, monkeypatch):
    monkeypatch.setattr(sbi, "DRAWS", 50)
    config = sbi.Config("two_moons", 30, 2, "npe")
    observation = torch.tensor([0.1, 0.2])
    result = sbi.run(config, [(observation, torch.randn(50, 2))], tmp_path / "results", sbi=program[0])
    assert (result.seconds, result.draw_seconds) == (1.5, 0.5) and result.c2st[0] > 0.9 and math.isnan(result.p_value)
    given = json.loads(program[1].read_text())
    assert given["low"] == [-1.0, -1.0] and given["high"] == [1.0, 1.0]
    assert given["observation_1"] == pytest.approx([0.1, 0.2])
    torch.manual_seed(2)
    theta, x = simulate("two_moons", 30)
    torch.testing.assert_close(torch.tensor(given["theta"]), theta, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(given["x"]), x, rtol=1e-6, atol=1e-6)
    assert sbi.run(config, [], tmp_path / "results", sbi=tmp_path / "missing").seconds == 1.5  # kept


def test_priors():
    assert torch.equal(sbi._prior(TASKS["slcp"])["high"], torch.full((5,), 3.0))
    covariance = sbi._prior(TASKS["bernoulli_glm"])["covariance"]
    assert covariance[0, 0].item() == pytest.approx(2.0) and covariance.shape == (10, 10)


@pytest.mark.slow
@pytest.mark.parametrize("method", sbi.PEERS)
def test_sbi(method, tmp_path):
    python = Path(pyro_hollow.__file__).parents[1] / sbi.SBI
    if not python.exists():
        pytest.skip("needs the sbi package: run `make sbi`")
    config = sbi.Config("bernoulli_glm", 500, 0, method)
    result = sbi.run(config, [(torch.ones(10), torch.randn(100, 10))], tmp_path, sbi=python)
    assert result.seconds > 0 and 0.5 < result.c2st[0] <= 1


def test_errors(tmp_path, capsys):
    (tmp_path / "sbibm").mkdir()
    np.savez(tmp_path / "sbibm" / "slcp.npz", observation_1=np.zeros(8), reference_1=np.zeros((9, 5)))
    with pytest.raises(SystemExit):
        sbi.main(["--tasks", "slcp", "--data-dir", str(tmp_path), "--peer", "npe", "--sbi", str(tmp_path / "no")])
    assert "run `make sbi`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sbi.main(["--data-dir", str(tmp_path)])
    assert "two_moons.npz is missing" in capsys.readouterr().err
    with pytest.raises(DataError, match="is needed"):
        load("slcp", None)
