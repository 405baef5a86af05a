# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import re
import runpy

import pytest
import torch

from pyro_hollow.experiments import defaults, overview, speed
from pyro_hollow.nn import HollowNN


@pytest.fixture(autouse=True)
def float32():
    torch.set_default_dtype(torch.float32)


def numbers(row):
    return [float(cell) for cell in re.findall(r"(?<=\| )[\d.]+(?= )", row)]


@pytest.mark.parametrize("target", defaults.TARGETS)
def test_targets_are_normalised(target):
    # Each is defined for any dimension; in two, a grid tells its integral.
    log_density, _ = defaults.TARGETS[target]
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, torch.linspace(-60, 60, 3001, dtype=torch.float64))
    cell = (axis[1] - axis[0]) * 120 / 3000
    inside = log_density(grid).exp().sum() * cell
    # The funnel is wider than the grid: P(|x| > 60) is below 0.01.
    assert abs(inside - 1) < (1e-2 if "funnel" in target else 1e-3)


def test_tables_of_the_defaults(capsys):
    defaults.main(["--variant", "default", "transformer_dim 8", "--target", "ring 2-d", "--steps", "2"])
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row.split(" | ")[0] for row in rows] == [
        "| setting", "| default", "| transformer_dim 8", "| rtol = atol", "| 0.01", "| 0.001", "| 0.0001", "| 1e-05",
        "| 1e-06",
    ]  # fmt: skip
    assert all(torch.tensor(numbers(row)).isfinite().all() for row in rows)


def test_fits_get_better():
    torch.manual_seed(0)
    before, _ = defaults.fit("banana 2-d", 1, 0)
    after, _ = defaults.fit("banana 2-d", 100, 0)
    assert defaults._test(after, "banana 2-d", defaults.TEST_SOLVER) < defaults._test(
        before, "banana 2-d", defaults.TEST_SOLVER
    )


def test_speed_of_the_divergence():
    rows = speed.divergence_over_field([2, 3], batch=4, repeats=1)[2:]
    assert [tuple(numbers(row))[0] for row in rows] == [2, 3] * len(speed.CONDITIONERS)
    assert all(ratio > 0 for row in rows for ratio in numbers(row)[-2:])


def test_speed_of_densities():
    (row,) = speed.densities(["eight schools"], batch=4, repeats=1, compile=False)[2:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["eight schools", "10"] and float(cells[3]) > 0 and cells[4] == "-"


def test_speed_of_the_peers():
    (row,) = speed.peers_over_hollow([3], batch=4, repeats=1)[2:]
    assert numbers(row)[0] == 3 and len(numbers(row)) == 7


def test_closed_form_and_backward_passes_agree():
    peer, t, x = speed.free_form_peer(3, 500), torch.tensor(0.3), torch.randn(5, 3)
    closed, passes = (speed.FreeFormCNF(net)._bind() for net in (peer, speed.Opaque(peer)))
    assert closed._kernel is not None and passes._kernel is None
    torch.testing.assert_close(closed.with_divergence(t, x), passes.with_divergence(t, x))


@pytest.mark.parametrize("d", (2, 16, 64))
def test_peer_has_as_many_parameters(d):
    parameters = speed._count(HollowNN(d))
    assert abs(speed._count(speed.free_form_peer(d, parameters)) / parameters - 1) < 0.05


def test_source_and_closed_form_agree():
    net = HollowNN(3)
    t, x = torch.tensor(0.3), torch.randn(5, 3)
    for value, expected in zip(
        speed.SourceField(net).with_divergence(t, x), net.bind().with_divergence(t, x), strict=True
    ):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("case", speed.MEMORY_CASES)
def test_memory_is_never_negative(case):
    assert speed.memory_of_step(case, True, 2, 3) >= 0


@pytest.mark.slow
def test_memory_of_a_step():
    # Intermediate states of four steps take hundreds of MiB at this size, and less with the adjoint method.
    rows = speed.memory_table(32, 512, 1, cases=("hollow",))[2:]
    backpropagation, adjoint = numbers(rows[0])
    assert backpropagation > adjoint > 0


def test_speed_of_whole_solves():
    rows = [row.split(" | ") for row in speed.solves([(2, 4), (3, 2)], repeats=1)[2:]]
    assert len(rows) == 2 * len(speed.SOLVERS) * len(speed.FIELDS)
    for field, size, _, milliseconds, evaluations, ratio, others, hollow, native in rows:
        assert size in ("2, 4", "3, 2") and min(map(float, (milliseconds, ratio))) > 0
        assert min(int(evaluations), int(others)) >= 7
        assert (hollow == "-") == (field == "| free-form") and (native == "- |" or hollow != "-")


@pytest.mark.skipif(not speed.can_compile("cpu"), reason="needs a C compiler")
def test_arithmetic():
    rows = [row.strip("| ").split(" | ") for row in speed.arithmetic([2, 3], batch=4, repeats=1)[2:]]
    assert [row[:2] for row in rows] == [[kind, d] for kind in list(speed.FIELDS)[:-1] for d in "23"]
    assert all(0 <= float(cell.split("(")[1][:-1]) < 10 for row in rows for cell in row[3:])


def test_a_step_by_torchdiffeq_leaves_the_gradients_of_our_steps():
    for make in speed.FIELDS.values():
        flow, x, gradients = make(3), torch.randn(4, 3), []
        flow.solver = speed.SOLVERS["rk4, 4 steps"]
        for step in (speed._step_by_torchdiffeq, speed._step_of_density):
            flow.zero_grad()
            step(flow, x)
            gradients.append([parameter.grad for parameter in flow.parameters()])
        torch.testing.assert_close(*gradients)


def test_chosen_tables_of_speed(capsys):
    threads = torch.get_num_threads()
    speed.main("--table divergence --dims 2 --batch-size 3 --repeats 1 --threads 1".split())
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert printed.count("| grouped | 2 |") == 1 and "SVI" not in printed


def test_hollow_and_autograd_steps_agree():
    net, x = HollowNN(3, max_rate=4.0), torch.randn(5, 3)
    solver = speed.SOLVERS["rk4, 4 steps"]
    flows = speed.HollowCNF(net, solver=solver), speed.AutogradCNF(net, solver=solver)
    torch.testing.assert_close(*(flow.call_and_ladj(x) for flow in flows))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_speed_without_the_gpu_that_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--device", "cuda"])
    assert "--device cuda: torch finds no GPU" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_speed_on_a_gpu(capsys):
    sizes = "--dims 2 --batch-size 4 --repeats 1 --threads 1".split()
    speed.main([*"--device cuda --table divergence peers tape memory".split(), *sizes])
    assert torch.cuda.get_device_name() in capsys.readouterr().out
    assert len(speed.svi_steps((2, 3), 1, "cuda")) == 3 + len(speed.svi_guides())


def test_speed_of_svi_steps():
    rows = speed.svi_steps((2, 3), repeats=1)
    assert len(rows) == 3 + len(speed.svi_guides())
    assert all(row.count(" ms)") == 2 for row in rows[2:])
    (baseline,) = (row for row in rows if row.startswith("| AutoIAFNormal |"))
    assert baseline.count("1.00 (") == 2


def test_overview(tmp_path):
    pytest.importorskip("matplotlib")
    _, diagonal, hollow = overview.split(overview.train(defaults.bent, 3, steps=5), torch.randn(3))
    torch.testing.assert_close(hollow.diagonal(), torch.zeros(3))
    assert diagonal.count_nonzero() == 3
    assert hollow.count_nonzero() >= 6

    cell = (8 / 99) ** 2
    masses = [float(density.sum()) * cell for density in overview.densities(overview.train(defaults.ring, 2, 5), 100)]
    assert len(masses) == len(overview.TIMES)
    assert all(abs(mass - 1) < 0.05 for mass in masses)

    overview.main(["--steps", "1", "--output", str(tmp_path / "new" / "overview.png")])
    assert (tmp_path / "new" / "overview.png").stat().st_size > 10_000


def test_list_of_experiments(capsys):
    runpy.run_module("pyro_hollow.experiments", run_name="__main__")
    listed = dict(re.findall(r"^(\w+)  +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert {"defaults", "posteriors", "speed", "vae"} <= listed.keys()
    assert not {"__init__", "__main__", "harness", "data", "vae_models"} & listed.keys()
    assert listed["speed"] == speed.__doc__.strip().splitlines()[0]
    assert all(line.endswith(".") for line in listed.values())  # a whole sentence
