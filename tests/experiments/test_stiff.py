# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import json
import re

import numpy as np
import pytest
import torch

from pyro_hollow.experiments import stiff, stiff_problems
from pyro_hollow.experiments.stiff_problems import PROBLEMS, linear, load
from pyro_hollow.ode import Solver, SolverError


@pytest.mark.parametrize("name", [name for name in PROBLEMS if "512" not in name])
def test_diagonals_are_exact(name, monkeypatch):
    monkeypatch.setattr(stiff_problems.hollow_network, "__defaults__", (4, 2))
    problem, t = load(name), torch.tensor(0.3)
    x = (problem.x + 0.1 * torch.rand_like(problem.x)).requires_grad_()
    f, diagonal = problem.with_diagonal(t, x)
    torch.testing.assert_close(f, problem(t, x))
    jacobian = torch.autograd.functional.jacobian(lambda x: problem(t, x.unsqueeze(0)).squeeze(0), x[0])
    torch.testing.assert_close(diagonal[0].detach(), jacobian.diagonal())


def test_linear_problems_are_what_they_are_called():
    def jacobi_radius(problem):
        matrix = torch.autograd.functional.jacobian(lambda x: problem(torch.tensor(0.0), x), problem.x[0])
        assert torch.linalg.eigvals(matrix).real.max() < -0.5
        # For long steps 1 - h D is -h D.
        return torch.linalg.eigvals(matrix / matrix.diagonal().unsqueeze(-1) - torch.eye(8)).abs().max()

    assert jacobi_radius(linear(8, False)) < 0.5
    assert jacobi_radius(linear(8, True)) > 1.0


def test_known_solution_of_hires():
    expected = [
        0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4, 0.1175651343283149e-2,
        0.2386356198831331e-2, 0.6238968252742796e-2, 0.2849998395185769e-2, 0.2850001604814231e-2,
    ]  # fmt: skip
    problem = load("hires")
    end = Solver("bdf", 1e-7, 1e-10).integrate(problem, problem.x, 0.0, problem.time).state
    torch.testing.assert_close(end[0], torch.tensor(expected), rtol=1e-3, atol=1e-7)


def test_the_hollow_network_learns_to_be_stiff():
    problem = stiff_problems.hollow_network(d=3, steps=300)
    diagonal = problem.diagonal(torch.tensor(0.0), torch.ones(1, 3))[0]
    assert diagonal[0] > -10 and diagonal[2] < -300


def test_evaluations_of_scipy_are_all_counted():
    problem = linear(3, False)
    found, count = stiff.scipy_solve(problem, "BDF", 1e-3)
    assert count >= found.nfev + 3 * found.njev  # differences for its Jacobians, of which nfev knows nothing
    assert stiff.scipy_solve(problem, "BDF", 1e-3, max_nfe=5) == (None, 6)


def test_why_a_run_did_not_reach_the_end_is_told_apart():
    config = stiff.Config("linear", "dopri5", 1e-3, 1500)
    cells = {}
    for name, solver, field in (
        ("long", Solver(max_nfe=1500), lambda t, x: -1e5 * x),
        ("diverging", Solver(max_nfe=1500), lambda t, x: x * float("nan")),
    ):
        with pytest.raises(SolverError) as raised:
            solver.integrate(field, torch.ones(1, 1), 0.0, 1.0)
        runs = {"dopri5": [stiff.Result(config, failure=str(raised.value))]}
        cells[name] = stiff.format_table("title", runs, 1e-3).splitlines()[-1]
    assert "more than 1,500" in cells["long"]
    assert "failed" in cells["diverging"] and "more than" not in cells["diverging"]


def test_tables_figures_and_kept_runs(tmp_path, capsys):
    command = [
        "--problem", "rotated-8", "--solver", "dopri5", "bdf-jacobi", "bdf-fixed", "scipy-bdf", "--tolerance", "1e-2",
        "1e-3", "--show", "1e-3", "--max-nfe", "1500", "--dims", "2", "--repeats", "1", "--steps", "2",
        "--output", str(tmp_path),
    ]  # fmt: skip
    stiff.main(command)
    printed = capsys.readouterr().out
    rows = {line.split(" | ")[0]: line for line in printed.splitlines() if line.startswith("| ")}
    assert "more than 1,500" in rows["| dopri5"]
    fallbacks = int(rows["| bdf-jacobi"].split(" | ")[5])
    assert fallbacks > 0
    assert re.search(r"\| rotated-8 \| - \| \d+ \(", printed)
    assert len(rows["| 2"].split(" | ")) == 6 and rows["| 1"].count(" (0)") == 3
    assert {"rotated-8.png", "training-likelihood.png", "training-stiff.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    # A second time all comes from what was kept, failures too; another limit is another run.
    path = tmp_path / "rotated-8" / "bdf-jacobi-0.001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fallbacks": 12345}))
    command += ["--dims", "--steps", "0"]
    stiff.main(command)
    assert "| 12345 |" in capsys.readouterr().out
    stiff.main([*command, "--max-nfe", "1600", "--solver", "bdf-jacobi"])
    assert "| 12345 |" not in capsys.readouterr().out


def test_errors_are_relative_to_what_matters():
    problem = load("robertson")
    assert stiff.error_of(problem, np.array([1.0, 2e-4, 0.0]), np.array([1.0, 1e-4, 0.0])) == pytest.approx(0.5)
