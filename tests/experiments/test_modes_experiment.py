# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_hollow.experiments import fits, modes
from pyro_hollow.infer import LogDensity


def log_joint(target, x):
    return LogDensity(target.model, compile=False, batch_size=20_000)(x)


@pytest.mark.parametrize("name", ["ring", "forty", "product", "regression"])
def test_log_evidence_by_quadrature_in_two_dimensions(name):
    target = modes.TARGETS[name]()
    width = {"forty": 50.0, "product": 14.0}.get(name, 8.0)
    axis = torch.linspace(-width, width, 401)
    grid = torch.cartesian_prod(axis, axis)
    log_evidence = log_joint(target, grid).logsumexp(0) + 2 * math.log(axis[1] - axis[0])
    assert log_evidence.item() == pytest.approx(target.log_evidence, abs=2e-3)


def test_log_evidence_of_many_wells():
    one, three, sixteen = modes.many_well(2), modes.many_well(6), modes.many_well(32)
    axis = torch.linspace(-5, 5, 501)
    log_evidence = log_joint(one, torch.cartesian_prod(axis, axis)).logsumexp(0) + 2 * math.log(0.02)
    assert one.log_evidence == pytest.approx(log_evidence.item(), abs=1e-5)
    assert (three.log_evidence, sixteen.log_evidence) == pytest.approx((3 * one.log_evidence, 16 * one.log_evidence))
    assert three.log_evidence == pytest.approx(30.880, abs=1e-3)  # the prototypes' quadrature


def test_log_evidence_of_the_lattice_by_quadrature(monkeypatch):
    monkeypatch.setattr(modes, "SITES", 2)
    target, axis = modes.lattice(), torch.linspace(-2.5, 2.5, 26)
    log_evidence = log_joint(target, torch.cartesian_prod(*4 * [axis])).logsumexp(0) + 4 * math.log(0.2)
    assert target.log_evidence == pytest.approx(log_evidence.item(), abs=1e-3)


@pytest.mark.parametrize("name", modes.TARGETS)
def test_masses_and_modes(name):
    target = modes.TARGETS[name]()
    assert float(target.masses.sum()) == pytest.approx(1.0)
    density = LogDensity(target.model, compile=False)
    assert math.isfinite(density(density.start).item())


def test_share_found():
    target = modes.many_well(6)
    left, right = -1.7, 1.7
    draws = torch.zeros(1000, 6)
    draws[:, 0::2] = right
    assert modes.share_found(target, {"x": draws}) == 1 / 8
    draws[:200, 0] = left
    assert modes.share_found(target, {"x": draws}) == 2 / 8
    wide = modes.many_well(32)
    draws = torch.full((100, 32), right)
    assert modes.share_found(wide, {"x": draws}) == 1 / 2
    draws[:50, 0] = left
    assert modes.share_found(wide, {"x": draws}) == 17 / 32
    labels = modes.labels()
    assert modes.share_found(labels, {"locs": torch.tensor([[-3.0, 0.0, 4.0], [4.0, -3.0, 0.0]])}) == 2 / 6


def result(guide, seed, trusted, **found):
    more = {"share": 1.0, "error": -0.01, "modes": 8.0, "trusted": float(trusted)}
    return fits.Result(fits.Config("ring", guide, seed, 300.0), more=more, num_samples=4000, ess=2000.0, **found)


def chain(share):
    return fits.Result(fits.Config("ring", "nuts", 0, 0.0), seconds=12.0, more={"share": share, "error": math.nan})


def test_table():
    runs = {
        "ring": {
            "fit": [result("fit", 0, True, elbo=-0.3, log_evidence=-0.1), result("fit", 1, False, elbo=-0.3)],
            "nuts": [chain(0.5)],
        }
    }
    lines = modes.format_table(runs).splitlines()
    assert lines[2].startswith("| ring, fit | 1.00 | -0.010 | -0.210 | 50 | - | 1 of 2 |")
    assert lines[3] == "| ring, nuts | 0.50 | - | - | - | - | - | 12 |"


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(modes, "NUTS_STEPS", 20)
    torch.set_default_dtype(torch.float32)
    command = ["--models", "ring", "--guides", "fit", "nuts", "--seeds", "0", "--time-limit", "10"]
    modes.main([*command, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in printed and "| ring, fit | 1.00 |" in printed
    modes.main([*command, "--output", str(tmp_path)])  # from the folder
    assert capsys.readouterr().out == printed
