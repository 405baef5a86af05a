# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import io
import json
import math
import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_hollow import SolverError
from pyro_hollow.experiments import posteriors
from pyro_hollow.experiments.posterior_models import load
from pyro_hollow.experiments.posteriors import (
    GUIDES,
    VARIANTS,
    Config,
    Result,
    draw,
    equal_time,
    format_table,
    judge,
    leaders,
    run,
)
from pyro_hollow.infer import AutoHollowCNF

STEPS, SAMPLES = 12, 200


@pytest.fixture(autouse=True)
def float32():
    torch.set_default_dtype(torch.float32)


def command(output, *more, posterior=("banana",), guide=("no-warm-up", "normal"), seed=(0,), steps=STEPS):
    return [
        "--posterior", *posterior, "--guide", *guide, "--seed", *map(str, seed), "--steps", str(steps),
        "--num-samples", str(SAMPLES), "--output", str(output), *more,
    ]  # fmt: skip


def result(guide="normal", seed=0, steps=100, **found):
    return Result(Config("banana", guide, steps, seed), **found)


def rows(table):
    """Guide to cells."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def read(path):
    return json.loads(path.read_text())


def marks(folder):
    """What tells whether a file was written again."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*-*"))}


def age(folder):
    """Time stamps of file systems may be too coarse for what follows within a second."""
    for path in folder.rglob("*-*"):
        os.utime(path, (1, 1))


class Fails:
    """A guide that fails in its k-th call."""

    error = ValueError("the guide diverges")

    def __init__(self, model, after=0):
        self.guide, self.calls, self.after = AutoNormal(model), 0, after

    def __call__(self):
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        return self.guide()


class FailsToSolve(Fails):
    error = SolverError("step size underflow")


class FailsLater(Fails):
    def __init__(self, model):
        super().__init__(model, after=5)


FAILURES = {"ValueError": Fails, "SolverError": FailsToSolve, "later": FailsLater}


@pytest.fixture
def failing(request, monkeypatch):
    """The name of a guide that fails, with a SolverError unless a test asks for other errors."""
    monkeypatch.setitem(GUIDES, "planar", getattr(request, "param", FailsToSolve))
    return "planar"


every_failure = pytest.mark.parametrize("failing", FAILURES.values(), ids=FAILURES, indirect=True)


class Finished(NamedTuple):
    folder: object
    printed: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of everything, small."""
    folder, printed = tmp_path_factory.mktemp("posteriors"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        posteriors.main(command(folder, guide=("no-warm-up", "normal", "multivariate"), seed=(0, 1)))
    return Finished(folder, printed.getvalue())


# From the command line


def test_table_is_printed_and_written(finished):
    table = (finished.folder / "banana.md").read_text()
    assert table in finished.printed
    assert table.startswith("banana (2-d) (curved)")
    (_, *header), *cells = ((guide, *cells) for guide, cells in rows(table).items())
    assert len(header) == 7 and all(len(row) == 8 for row in cells)
    assert [row[0] for row in cells] == ["no-warm-up", "normal", "multivariate"]
    for row in cells:
        assert "±" in row[1] and "±" in row[2]
        numbers = [float(cell.split(" ± ")[0]) for cell in row[1:-1]]
        assert all(math.isfinite(number) for number in numbers)
    assert float(cells[0][-1]) > 0 and cells[1][-1] == cells[2][-1] == "-"
    assert "At equal steps no-warm-up has the best ELBO on: " in finished.printed
    assert "At equal seconds no-warm-up has the best ELBO on: " in finished.printed


def test_files(finished):
    assert (finished.folder / "banana.png").read_bytes().startswith(b"\x89PNG")
    for guide in ("no-warm-up", "normal", "multivariate"):
        for seed in (0, 1):
            stem = finished.folder / "banana" / f"{guide}-{STEPS}-{seed}"
            saved = read(stem.with_suffix(".json"))
            settings = {"posterior": "banana", "guide": guide, "steps": STEPS, "seed": seed, "schedule": "cosine"}
            assert saved["config"] == settings
            assert saved["failure"] == "" and math.isfinite(saved["elbo"]) and saved["milliseconds"] > 0
            assert 0 < saved["ess"] <= 1 and saved["mean_error"] > 0 and saved["scale_error"] > 0
            assert [row[0] for row in saved["history"]] == list(range(1, STEPS + 1))
            draws = np.load(stem.with_suffix(".npz"))
            assert sorted(draws) == ["x[1]", "x[2]"]
            assert all(draws[name].shape == (SAMPLES,) and np.isfinite(draws[name]).all() for name in draws)


def test_evaluations_of_a_flow_only(finished):
    flow, normal = (read(finished.folder / "banana" / f"{g}-{STEPS}-0.json") for g in ("no-warm-up", "normal"))
    assert flow["evaluations"] > 0 and flow["tight_evaluations"] >= flow["evaluations"]
    assert abs(flow["solver_error"]) < 0.05
    assert all(math.isnan(normal[name]) for name in ("evaluations", "tight_evaluations", "solver_error"))


def test_runs_at_equal_seconds(finished):
    # The first guide sets the time: it is not repeated, and others get as many steps as take them as long.
    folder = finished.folder / "banana"
    assert len(list(folder.glob("no-warm-up-*.json"))) == 2
    for seed in (0, 1):
        first, own = (read(folder / f"{g}-{STEPS}-{seed}.json") for g in ("no-warm-up", "normal"))
        steps = max(1, round(first["milliseconds"] * STEPS / own["milliseconds"]))
        assert (folder / f"normal-{steps}-{seed}.json").exists()


def test_finished_runs_are_reused(tmp_path, capsys):
    posteriors.main(command(tmp_path))
    table, before = capsys.readouterr().out, marks(tmp_path)
    age(tmp_path)
    aged = marks(tmp_path)
    posteriors.main(command(tmp_path))
    assert capsys.readouterr().out == table
    assert marks(tmp_path) == aged and list(aged) == list(before)


def test_unfinished_runs_are_added(tmp_path, capsys):
    posteriors.main(command(tmp_path, "--no-equal-seconds"))
    age(tmp_path)
    before = marks(tmp_path)
    posteriors.main(command(tmp_path, "--no-equal-seconds", seed=(0, 3)))
    after = marks(tmp_path)
    assert {path: after[path] for path in before} == before
    assert sorted(path.name for path in after.keys() - before.keys()) == sorted(
        f"{guide}-{STEPS}-3.{kind}" for guide in ("no-warm-up", "normal") for kind in ("json", "npz")
    )
    assert "At equal steps" in (printed := capsys.readouterr().out) and "At equal seconds" not in printed


def test_force_repeats(tmp_path):
    posteriors.main(command(tmp_path, "--no-equal-seconds", guide=("normal",)))
    stem = tmp_path / "banana" / f"normal-{STEPS}-0"
    before = read(stem.with_suffix(".json"))
    age(tmp_path)
    posteriors.main(command(tmp_path, "--no-equal-seconds", "--force", guide=("normal",)))
    after = read(stem.with_suffix(".json"))
    assert all(path.stat().st_mtime > 1 for path in (stem.with_suffix(".json"), stem.with_suffix(".npz")))
    # The same settings and seed give the same guide.
    assert (after["elbo"], after["khat"], after["mean_error"]) == (before["elbo"], before["khat"], before["mean_error"])


def test_force_repeats_each_run_once(tmp_path, monkeypatch):
    # Otherwise the time of the first guide changes after it has set that of the others.
    configs = []
    fit = posteriors.fit

    def remember(posterior, guide, config, found):
        configs.append(config)
        fit(posterior, guide, config, found)

    monkeypatch.setattr(posteriors, "fit", remember)
    posteriors.main(command(tmp_path, "--force", guide=("multivariate",)))
    # Others may wake Pyro up.
    assert [c for c in configs if c.guide == "multivariate"] == [Config("banana", "multivariate", STEPS, 0)]


@pytest.mark.parametrize("schedule, fractions", [("cosine", [0.5, 0.0]), ("constant", [1.0, 1.0])])
def test_schedules(schedule, fractions, monkeypatch):
    """Pyro makes an optimizer in the first step, from when on the rate can be set."""
    rates = []

    class Watched(posteriors.SVI):
        def step(self):
            rates.append({own.param_groups[0]["lr"] for own in self.optim.optim_objs.values()})
            return super().step()

    monkeypatch.setattr(posteriors, "SVI", Watched)
    posterior, config = load("banana"), Config("banana", "normal", 4, 0, schedule)
    posteriors.fit(posterior, AutoNormal(posterior.model), config, Result(config))
    assert rates[0] == set() and all(len(rate) == 1 for rate in rates[1:])
    assert [rate.pop() for rate in rates[1::2]] == pytest.approx([posteriors.LEARNING_RATE * f for f in fractions])


def test_schedules_are_kept_apart(tmp_path):
    for schedule in ("cosine", "constant"):
        posteriors.main([*command(tmp_path, "--no-equal-seconds", guide=("normal",)), "--schedule", schedule])
    folders = {"cosine": tmp_path, "constant": tmp_path / "constant"}
    kept = {}
    for schedule, folder in folders.items():
        (path,) = (folder / "banana").glob("*.json")
        kept[schedule] = read(path)
        assert kept[schedule]["config"]["schedule"] == schedule
        assert (folder / "banana.md").exists() and (folder / "banana.png").exists()
    assert kept["cosine"]["elbo"] != kept["constant"]["elbo"]


def test_equal_time_keeps_the_schedule():
    reference = Result(Config("banana", "hollow", 100, 0, "constant"), milliseconds=2.0)
    other = Result(Config("banana", "normal", 100, 1, "constant"), milliseconds=1.0)
    assert equal_time(reference, other) == Config("banana", "normal", 200, 1, "constant")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 4])
def test_overdispersion_with_separate_modes(seed, tmp_path):
    """Where a fifth of the samples may be restrained, these go astray halfway, with 600 evaluations a solve."""
    torch.set_default_dtype(torch.float32)  # as users have it; conftest resets it
    found = run(load("ring"), Config("ring", "overdispersed", 2000, seed), 10_000, tmp_path, force=False)
    assert not found.failure and found.elbo > -0.15 and found.evaluations < 100 and found.khat < 0.7


def test_variants_get_a_figure_of_evaluations(tmp_path):
    posteriors.main(command(tmp_path, "--no-equal-seconds", guide=("no-warm-up", "rk4-4"), steps=3))
    assert (tmp_path / "evaluations.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["ark", "garch", "kidscore"])
@pytest.mark.parametrize("more", [(), ("--data-dir", "nowhere")], ids=["without", "wrong"])
def test_missing_data(name, more, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        posteriors.main(command(tmp_path / "output", *more, posterior=("banana", name)))
    assert caught.value.code == 2
    assert "--data-dir" in capsys.readouterr().err.split("error: ")[-1]
    assert not (tmp_path / "output").exists()  # before any training


def test_without_a_reference(tmp_path, capsys):
    posteriors.main(command(tmp_path, "--no-equal-seconds", posterior=("eight_schools",), guide=("normal",)))
    saved = read(tmp_path / "eight_schools" / f"normal-{STEPS}-0.json")
    assert saved["failure"] == "" and math.isfinite(saved["elbo"])
    assert math.isnan(saved["mean_error"]) and math.isnan(saved["scale_error"])
    cells = rows(capsys.readouterr().out)["normal"]
    assert cells[3] == cells[4] == "-"
    assert (tmp_path / "eight_schools.png").read_bytes().startswith(b"\x89PNG")


# Guides


@pytest.mark.parametrize("name", [*GUIDES, *VARIANTS])
def test_every_guide_takes_steps(name, tmp_path):
    found = run(load("banana"), Config("banana", name, 2, 0), 50, tmp_path, force=False)
    assert found.failure == ""
    assert len(found.history) == 2 and all(math.isfinite(loss) for _, loss, _ in found.history)
    assert math.isfinite(found.elbo) and found.milliseconds > 0
    hollow = name in VARIANTS or name == "hollow"
    assert math.isnan(found.solver_error) != hollow
    if name in ("hollow", "normal"):
        # Both start as a normal distribution around 0 with a scale of 0.1, whose ELBO is this, and the flow sits out.
        assert found.elbo == pytest.approx(-2.46, abs=0.1)


def test_names_of_guides_make_names_of_files():
    names = [*GUIDES, *VARIANTS]
    assert len(names) == len(set(names))
    assert not any(set(name) & set("./\\ ") for name in names)


def test_seeds_differ():
    posterior, losses = load("banana"), []
    for seed in (0, 1, 0):
        found = result(seed=seed, steps=3)
        posteriors.fit(posterior, GUIDES["normal"](posterior.model), found.config, found)
        losses.append([loss for _, loss, _ in found.history])
    assert losses[0] == losses[2] != losses[1]


def test_history_has_means():
    posterior, found = load("banana"), result(steps=120)
    posteriors.fit(posterior, GUIDES["normal"](posterior.model), found.config, found)
    assert [row[0] for row in found.history] == list(range(2, 121, 2))
    assert found.history[-1][1] < found.history[0][1]


# Failures


@every_failure
def test_failure_is_recorded(failing, tmp_path):
    config = Config("banana", failing, STEPS, 0)
    found = run(load("banana"), config, SAMPLES, tmp_path, force=False)
    error = GUIDES[failing].error
    # Pyro adds the shapes of its trace to the message.
    assert found.failure.startswith(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    assert math.isnan(found.elbo) and math.isnan(found.khat)
    stem = tmp_path / "banana" / f"{failing}-{STEPS}-0"
    assert read(stem.with_suffix(".json"))["failure"] == found.failure
    assert not stem.with_suffix(".npz").exists()
    # It is a finding, not to be repeated.
    again = run(load("banana"), config, SAMPLES, tmp_path, force=False)
    assert again.failure == found.failure and again.config == config


@every_failure
def test_failure_does_not_stop_the_others(failing, tmp_path, capsys):
    posteriors.main(command(tmp_path, guide=("normal", failing)))
    table = rows(printed := capsys.readouterr().out)
    assert math.isfinite(float(table["normal"][0]))
    (cells,) = (cells for name, cells in table.items() if name.startswith(f"{failing} ("))
    assert cells[:2] == ["-", "-"] and "failed" in printed
    assert (tmp_path / "banana.png").exists()


def test_failure_of_the_guide_that_sets_the_time(failing, tmp_path, capsys):
    posteriors.main(command(tmp_path, guide=(failing, "normal")))
    printed = capsys.readouterr().out
    assert math.isfinite(float(rows(printed)["normal"][0]))
    assert f"{failing} has the best ELBO on: none" in printed


def test_failure_of_all_guides(failing, tmp_path, capsys):
    posteriors.main(command(tmp_path, "--no-equal-seconds", guide=(failing,)))
    assert f"{failing} has the best ELBO on: none" in capsys.readouterr().out
    assert read(tmp_path / "banana" / f"{failing}-{STEPS}-0.json")["failure"]


def test_failure_leaves_no_draws_of_an_earlier_run(failing, tmp_path, monkeypatch):
    config = Config("banana", failing, 2, 0)
    with monkeypatch.context() as patch:
        patch.setitem(GUIDES, failing, AutoNormal)
        assert run(load("banana"), config, 50, tmp_path, force=False).failure == ""
    assert run(load("banana"), config, 50, tmp_path, force=True).failure
    assert not (tmp_path / "banana" / f"{failing}-2-0.npz").exists()


def test_mistakes_are_not_findings(tmp_path, monkeypatch):
    class Mistaken(Fails):
        error = AttributeError("a mistake")

    monkeypatch.setitem(GUIDES, "planar", Mistaken)
    with pytest.raises(AttributeError):
        run(load("banana"), Config("banana", "planar", 2, 0), 50, tmp_path, force=False)
    assert not list(tmp_path.rglob("*.json"))


# Judging


def gaussian():
    """A posterior that a normal guide has exactly."""
    banana = load("banana")

    def model():
        pyro.sample("x1", dist.Normal(1.0, 2.0))
        pyro.sample("x2", dist.Normal(-1.0, 0.5))

    eps = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    return replace(banana, model=model, reference={"x[1]": 1 + 2 * eps[:, 0], "x[2]": -1 + 0.5 * eps[:, 1]})


def exact(posterior, kind):
    if kind == "function":
        return posterior.model
    guide = AutoNormal(posterior.model) if kind == "normal" else AutoHollowCNF(posterior.model)
    guide()
    with torch.no_grad():
        if kind == "normal":
            guide.locs.x1.fill_(1.0), guide.locs.x2.fill_(-1.0)
            guide.scales.x1, guide.scales.x2 = torch.tensor(2.0), torch.tensor(0.5)
        else:
            loc, scale = torch.tensor([1.0, -1.0]), torch.tensor([2.0, 0.5])
            guide.affine.copy_(torch.cat([loc.unsqueeze(-1), scale.log().diag()], dim=-1) / 3)
    return guide


@pytest.mark.parametrize("kind", ["function", "normal", "hollow"])
def test_exact_guide_has_no_errors(kind):
    posterior, found = gaussian(), result()
    draws = judge(posterior, exact(posterior, kind), 6000, found)
    # Two sets of draws: the standard errors of mean and standard deviation are about 0.016 and 0.012.
    assert found.mean_error < 0.07 and found.scale_error < 0.05
    assert found.elbo == pytest.approx(0, abs=1e-4) and found.khat == 0
    assert found.ess == pytest.approx(1, abs=1e-4)
    assert {name: values.shape for name, values in draws.items()} == {"x[1]": (5000,), "x[2]": (5000,)}
    if kind == "hollow":
        assert found.solver_error == pytest.approx(0, abs=1e-5) and found.tight_evaluations > 0
    else:
        assert math.isnan(found.solver_error) and math.isnan(found.tight_evaluations)


def test_errors_are_in_units_of_the_reference():
    posterior, found = gaussian(), result()

    def guide():
        pyro.sample("x1", dist.Normal(1.0 + 2 * 0.5, 2.0))  # half a standard deviation off
        pyro.sample("x2", dist.Normal(-1.0, 0.5 * 1.3))

    judge(posterior, guide, 6000, found)
    assert found.mean_error == pytest.approx(0.5, abs=0.07)
    assert found.scale_error == pytest.approx(0.3, abs=0.06)
    # Minus the divergence: 0.5 * 0.5**2, and 0.5 * (1.3**2 - 1) - log(1.3).
    assert found.elbo == pytest.approx(-0.125 - 0.345 + math.log(1.3), abs=0.05)


def test_solver_error_of_a_flow():
    posterior, found = load("banana"), result("no-warm-up", steps=20)
    guide = VARIANTS["no-warm-up"](posterior.model)
    posteriors.fit(posterior, guide, found.config, found)
    own = guide.solver
    judge(posterior, guide, 500, found)
    assert guide.solver is own and guide.flows[0].solver is own
    assert 0 < abs(found.solver_error) < 0.02
    assert found.tight_evaluations > found.evaluations > 0


def test_judging_has_a_seed_of_its_own():
    posterior, elbos = gaussian(), []

    def guide():
        pyro.sample("x1", dist.Normal(0.0, 2.0))
        pyro.sample("x2", dist.Normal(-1.0, 0.5))

    for seed in (0, 1, 0):
        pyro.set_rng_seed(100 + len(elbos))
        found = result(seed=seed)
        judge(posterior, guide, 100, found)
        elbos.append(found.elbo)
    assert elbos[0] == elbos[2] != elbos[1]


# Arithmetic


def test_equal_time():
    reference = result("hollow", steps=3000, milliseconds=20.0)
    assert equal_time(reference, result("normal", seed=2, steps=3000, milliseconds=4.0)) == Config(
        "banana", "normal", 15_000, 2
    )
    assert equal_time(reference, reference) == reference.config
    assert equal_time(reference, result(steps=100, milliseconds=4.0)).steps == 15_000
    assert equal_time(reference, result(milliseconds=7.0)).steps == 8571
    assert equal_time(reference, result(milliseconds=1e9)).steps == 1
    # The run of a guide that has failed is not repeated for longer.
    assert equal_time(reference, result(steps=3000, failure="ValueError: no")).steps == 3000


def test_equal_time_without_a_reference():
    failed = result("hollow", steps=3000, failure="SolverError: no")
    assert equal_time(failed, result(steps=3000, milliseconds=4.0)).steps == 3000
    assert equal_time(failed, failed) == failed.config


def test_format_table():
    steps = {
        "hollow": [
            result("hollow", 0, elbo=-1.0, khat=0.3, mean_error=0.1, scale_error=0.2, milliseconds=5, evaluations=20),
            result("hollow", 1, elbo=-2.0, khat=0.5, mean_error=0.3, scale_error=0.4, milliseconds=7, evaluations=30),
        ],
        "normal": [result(elbo=-3.14159, khat=1.234, mean_error=0.5, scale_error=0.25, milliseconds=1.26)],
    }
    seconds = {"hollow": steps["hollow"], "normal": [result(elbo=-2.5)]}
    table = format_table(load("banana"), steps, seconds)
    assert rows(table)["hollow"] == ["-1.500 ± 0.707", "-1.500 ± 0.707", "0.50", "0.20", "0.30", "6.0", "25"]
    assert rows(table)["normal"] == ["-3.142", "-2.500", "1.23", "0.50", "0.25", "1.3", "-"]
    assert rows(format_table(load("banana"), steps, {}))["normal"][:2] == ["-3.142", "-"]


def test_format_table_with_failures():
    failed = result(failure="ValueError: no")
    runs = {"normal": [failed, failed], "iaf": [result("iaf", elbo=-1.0, khat=0.4, milliseconds=2.0)]}
    table = rows(format_table(load("banana"), runs, {"normal": [failed], "iaf": [failed]}))
    assert table["normal (1 failed)"] == ["-"] * 7
    assert table["iaf (1 failed)"] == ["-1.000", "-", "0.40", "-", "-", "2.0", "-"]


@pytest.mark.parametrize("order", [1, -1])
def test_format_table_where_some_seeds_failed(order):
    runs = [result(elbo=-1.0, khat=0.4), result(elbo=-2.0, khat=0.6), result(failure="ValueError: no")]
    table = rows(format_table(load("banana"), {"normal": runs[::order]}, {}))
    assert table["normal (1 failed)"][:3] == ["-1.500 ± 0.707", "-", "0.60"]


def test_format_table_of_infinite_values():
    table = rows(format_table(load("banana"), {"normal": [result(elbo=-math.inf, khat=math.inf)]}, {}))
    assert table["normal"][0] == "-" and table["normal"][2] == "inf"


def elbos(**values):
    return {guide: [result(guide, seed, elbo=elbo) for seed, elbo in enumerate(own)] for guide, own in values.items()}


def test_leaders():
    nan = math.nan
    tables = {
        "first": elbos(hollow=[-1.0, -1.0], normal=[-2.0, -2.0]),
        "tie": elbos(hollow=[-1.0], normal=[-1.0]),
        "close": elbos(hollow=[-1.04], normal=[-1.0]),
        "behind": elbos(hollow=[-1.1], normal=[-1.0]),
        "by the mean": elbos(hollow=[0.0, -4.0], normal=[-1.0, -1.0]),
        "others failed": elbos(hollow=[-9.0], normal=[nan]),
        "a seed failed": elbos(hollow=[-1.0, nan], normal=[-2.0, -2.0]),
        "failed": elbos(hollow=[nan], normal=[-9.0]),
        "all failed": elbos(hollow=[nan, nan], normal=[nan]),
        "missing": elbos(normal=[-1.0]),
        "alone": elbos(hollow=[-1.0]),
        "empty": {},
    }
    best = ["first", "tie", "others failed", "alone"]
    assert leaders(tables, "hollow", 0.0) == best
    assert sorted(leaders(tables, "hollow", 0.05)) == sorted([*best, "close"])
    assert leaders(tables, "normal", 0.0) == [
        "tie", "close", "behind", "by the mean", "a seed failed", "failed", "missing",
    ]  # fmt: skip
    assert leaders({}, "hollow", 0.0) == []


# Figures


def save_draws(folder, name, guide, **draws):
    (folder / name).mkdir(exist_ok=True)
    np.savez(folder / name / f"{guide}-100-0.npz", **draws)
    return [Result(Config(name, guide, 100, 0))]


@pytest.mark.parametrize("guides", [["hollow"], ["hollow", "normal", "iaf", "block", "planar"], ["planar"]], ids=str)
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no reference"])
def test_figure(guides, reference, tmp_path):
    posterior = load("banana") if reference else replace(load("banana"), reference=None)
    draws = dict(zip(["x[1]", "x[2]"], np.random.default_rng(0).normal(size=(2, 300)), strict=True))
    runs = {guide: save_draws(tmp_path, "banana", guide, **draws) for guide in guides}
    runs["failed"] = [Result(Config("banana", "failed", 100, 0), failure="ValueError: no")]
    draw(posterior, runs, tmp_path)
    assert (tmp_path / "banana.png").read_bytes().startswith(b"\x89PNG")


def test_figure_on_a_logarithmic_axis(tmp_path):
    posterior, rng = load("eight_schools"), np.random.default_rng(0)
    names = ["mu", "tau", *(f"theta[{i}]" for i in range(1, 9))]
    draws = {name: np.exp(rng.normal(size=300)) if name == "tau" else rng.normal(size=300) for name in names}
    draw(posterior, {"hollow": save_draws(tmp_path, "eight_schools", "hollow", **draws)}, tmp_path)
    assert (tmp_path / "eight_schools.png").exists()


def test_figure_of_evaluations_has_all_variants(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    labels = []
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda f: labels.extend(line.get_label() for line in f.axes[0].lines) or close(f))
    variants = ["hollow", *VARIANTS]
    runs = {"banana": {name: result(name, history=[[1, 2.0, 10.0], [2, 1.0, 20.0]]) for name in variants}}
    posteriors.draw_evaluations(runs, tmp_path / "evaluations.png")
    assert labels == variants
