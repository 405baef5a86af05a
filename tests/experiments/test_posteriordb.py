# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import numpy as np
import pytest
import torch

from pyro_hollow.experiments import fits, posteriordb
from pyro_hollow.experiments.posterior_models import load
from pyro_hollow.experiments.posteriors import errors


def result(name, seed=0, **found):
    return fits.Result(fits.Config(name, "fit", seed, 300.0), **found)


def test_names_are_those_of_posteriordb(data_dir):
    assert len(posteriordb.NAMES) == len(list((data_dir / "posteriordb").glob("*.npz"))) == 14
    assert all(load(name, data_dir).reference is not None for name in posteriordb.NAMES)


def test_errors():
    posterior = load("banana")
    shifted = {name: 2 * values for name, values in posterior.reference.items()}
    mean_error, scale_error = errors(posterior, shifted)
    expected = max(float(abs(values.mean()) / values.std()) for values in posterior.reference.values())
    assert mean_error == pytest.approx(expected) and scale_error == pytest.approx(1)
    assert errors(posterior, posterior.reference) == (0, 0)


def test_table():
    more = dict.fromkeys(("corrected_mean", "corrected_scale", "guide_mean", "guide_scale"), 0.0123)
    runs = {
        "gp": [result("gp", khat=0.2, more=more, elbo=-10.0), result("gp", 1, khat=0.3, more=more, elbo=-10.5)],
        "garch": [result("garch", khat=0.3, more=more), result("garch", 1, failure="ValueError: no")],
    }
    lines = posteriordb.format_table(runs, "fit").splitlines()
    assert "| gp | 0.01 | 0.01 | 0.01 | 0.01 | -10.25 (-10.50 to -10.00) |" in lines[4]
    assert lines[5].startswith("| garch (1 failed) | 0.01 |")
    assert lines[-1] == "k-hat below 0.7 for every seed: 1 of 2."


def test_command_line(tmp_path, capsys):
    names = ["mu", "tau", *(f"theta[{i}]" for i in range(1, 9))]
    (tmp_path / "posteriordb").mkdir()
    file = tmp_path / "posteriordb" / "eight_schools-eight_schools_noncentered.reference_draws.npz"
    np.savez(file, **{name: np.random.default_rng(0).normal(4, 5, 100) for name in names})
    torch.set_default_dtype(torch.float32)
    command = ["--models", "eight_schools", "--seeds", "0", "--time-limit", "5", "--data-dir", str(tmp_path)]
    posteriordb.main([*command, "--output", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    assert (tmp_path / "results" / "table.md").read_text() in printed
    found = fits.kept(tmp_path / "results" / "eight_schools" / "fit-5-0.json", fits.Result)
    assert found.failure == "" and all(math.isfinite(value) for value in found.more.values())
    assert len(found.more) == 4


def test_missing_data_end_the_program(tmp_path, capsys):
    with pytest.raises(SystemExit):
        posteriordb.main(["--models", "garch", "--data-dir", str(tmp_path)])
    assert "garch.json is missing" in capsys.readouterr().err
