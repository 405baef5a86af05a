# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pyro.infer import NUTS

import pyro_hollow
from pyro_hollow.experiments import peers, posteriors, pyro_peers
from pyro_hollow.experiments.peers import PEERS, PeerConfig, PeerResult, format_peers, run
from pyro_hollow.experiments.posterior_models import load
from pyro_hollow.infer import LogDensity

FOUND = {"seconds": 3.5, "warm_up_seconds": 2.0, "num_draws": 40, "ess": 12.5}


def config(peer="numpyro-nuts", seed=0):
    return PeerConfig("banana", peer, seed, seconds=2.0, effective=10.0)


def program(folder, text):
    """An executable in place of NumPyro's Python, which is given the command line."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def prints(folder, found=FOUND):
    return program(folder, f"echo \"$@\" > {folder}/command; echo a warning; echo '{json.dumps(found)}'")


def call(numpyro, folder, settings=None, data_dir=None, force=False):
    return run(load("banana"), settings or config(), data_dir, numpyro, folder / "results", force)


def test_findings_are_those_of_the_program(tmp_path):
    found = call(prints(tmp_path), tmp_path, data_dir=Path("data"))
    assert {name: getattr(found, name) for name in FOUND} == FOUND and found.config == config()
    assert all(math.isnan(value) for value in (found.elbo, found.khat, found.mean_error, found.scale_error))
    words = (tmp_path / "command").read_text().split()
    assert words[0].endswith("numpyro_peers.py") and words[1:3] == ["banana", "nuts"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options.pop("--draws").endswith(".npz") and 0 <= time.time() - float(options.pop("--begin")) < 60
    assert options == {"--seed": "0", "--seconds": "2.0", "--effective": "10.0", "--data-dir": "data"}


def test_finished_runs_are_reused(tmp_path):
    first = call(prints(tmp_path), tmp_path)
    (tmp_path / "command").unlink()
    assert call(tmp_path / "missing", tmp_path).seconds == first.seconds == 3.5
    call(prints(tmp_path, {**FOUND, "seconds": 9.0}), tmp_path, force=True)
    assert call(tmp_path / "missing", tmp_path).seconds == 9.0
    assert call(prints(tmp_path), tmp_path, config(seed=1)).seconds == 3.5


def test_failure_is_recorded(tmp_path):
    found = call(program(tmp_path, "echo trace >&2; echo 'ValueError: no' >&2; exit 1"), tmp_path)
    assert found.failure == "ValueError: no" and math.isnan(found.seconds)
    assert call(program(tmp_path, "exit 3"), tmp_path, config(seed=1)).failure == "exit status 3"


def test_a_run_that_does_not_end_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "GRACE", -1.8)
    assert "no result after 0 s" in call(program(tmp_path, "exec sleep 20"), tmp_path).failure


def test_draws_are_compared_with_the_reference(tmp_path):
    reference = load("banana").reference
    draws = {"x1": reference["x[1]"].numpy() + 0.5, "x2": reference["x[2]"].numpy() * 1.25}
    np.savez(tmp_path / "draws.npz", **draws)
    # The path after --draws, in whatever place.
    copy = f'while [ "$1" != --draws ]; do shift; done; cp {tmp_path}/draws.npz "$2"; echo \'{json.dumps(FOUND)}\''
    found = call(program(tmp_path, copy), tmp_path)
    loc, scale = reference["x[2]"].mean(), reference["x[2]"].std()
    assert found.mean_error == pytest.approx(max(0.5 / float(reference["x[1]"].std()), float(0.25 * loc / scale)))
    assert found.scale_error == pytest.approx(0.25)


def test_table():
    runs = {
        "numpyro-nuts": [PeerResult(config(), **FOUND), PeerResult(config(seed=1), **{**FOUND, "ess": 11.0})],
        "numpyro-iaf": [PeerResult(config("numpyro-iaf"), seconds=2.0, elbo=-1.25, num_steps=100)],
        "pyro-nuts": [PeerResult(config("pyro-nuts"), failure="ValueError: no")],
    }
    lines = format_peers(load("banana"), runs).splitlines()[-3:]
    assert lines == [
        "| numpyro-nuts | 3.5 | 2.0 | 40 (ESS 11) | - | - | - | - |",
        "| numpyro-iaf | 2.0 | - | - | -1.250 | - | - | - |",
        "| pyro-nuts (1 failed) | - | - | - | - | - | - | - |",
    ]


def test_from_the_command_line(tmp_path, capsys):
    numpyro = prints(tmp_path)
    arguments = ["--posterior", "banana", "--guide", "--peer", "numpyro-nuts", "numpyro-iaf", "--seed", "0", "1"]
    posteriors.main([*arguments, "--numpyro", str(numpyro), "--output", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    table = (tmp_path / "results" / "banana-peers.md").read_text()
    assert table in printed and "| numpyro-iaf | 3.5 |" in table
    assert len(list((tmp_path / "results" / "banana").glob("*.json"))) == 4


def test_without_numpyro(tmp_path, capsys):
    arguments = ["--posterior", "banana", "--guide", "--peer", "numpyro-nuts", "--output", str(tmp_path)]
    posteriors.main([*arguments, "--numpyro", str(tmp_path / "missing")])
    printed = capsys.readouterr().out
    assert "Skipped numpyro-nuts" in printed and "make numpyro" in printed
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("by", ["model", "LogDensity"])
def test_nuts_of_pyro(by, monkeypatch):
    """It stops at the effective draws, with the draws of the sites in their supports."""
    monkeypatch.setattr(pyro_peers, "WARM_UP", 20)
    monkeypatch.setattr(pyro_peers, "CHUNK", 10)
    posterior, begin = load("eight_schools"), time.perf_counter()
    density = LogDensity(posterior.model) if by == "LogDensity" else None
    options = {"model": posterior.model} if density is None else {"potential_fn": density.potential}
    kernel = NUTS(**options, max_tree_depth=4)
    found, draws = pyro_peers.sample(kernel, 0.1, 100.0, lambda: time.perf_counter() - begin, density)
    assert found["ess"] >= 0.1 and found["num_draws"] % 10 == 0
    assert 0 < found["warm_up_seconds"] < found["seconds"]
    assert {name: x.shape[1:] for name, x in draws.items()} == {"mu": (), "tau": (), "theta": (8,)}
    assert all(len(x) == found["num_draws"] for x in draws.values()) and (draws["tau"] > 0).all()


def test_nuts_of_pyro_stops_in_time():
    found, draws = pyro_peers.sample(NUTS(load("banana").model), 1e9, 0.5, iter(range(100)).__next__)
    assert found["num_draws"] == 0 and found["ess"] == 0 and found["seconds"] > 0.5 and draws == {}


def test_program_of_pyro_prints_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pyro_peers, "WARM_UP", 20)
    monkeypatch.setattr(pyro_peers, "CHUNK", 10)
    torch.set_default_dtype(torch.float32)
    pyro_peers.main(["banana", "nuts", "--effective", "2", "--draws", str(tmp_path / "draws.npz")])
    found = json.loads(capsys.readouterr().out)
    with np.load(tmp_path / "draws.npz") as draws:
        assert {name: draws[name].shape for name in draws} == dict.fromkeys(("x1", "x2"), (found["num_draws"],))


@pytest.mark.slow
@pytest.mark.parametrize("peer", PEERS)
def test_every_peer(peer, tmp_path):
    numpyro = Path(pyro_hollow.__file__).parents[1] / peers.NUMPYRO
    if peer.startswith("numpyro-") and not numpyro.exists():
        pytest.skip("needs NumPyro: run `make numpyro`")
    settings = PeerConfig("banana", peer, 0, seconds=60.0, effective=20.0)
    found = run(load("banana"), settings, None, numpyro, tmp_path, force=False)
    assert found.failure == "" and found.seconds > 0
    assert found.ess >= 20 if peer.endswith(("nuts", "fit")) else found.elbo < 0.1 and found.num_steps > 0
    assert found.mean_error < 1 and found.scale_error < 1
