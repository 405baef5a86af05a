# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import csv
import functools
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import pyro_hollow
from pyro_hollow.experiments import vae
from pyro_hollow.experiments.data import load_images
from pyro_hollow.experiments.vae import FLOWS, Result, format_table, make_config, make_parser, parse, write_csv
from pyro_hollow.experiments.vae_training import Config, Estimate, Task, estimate
from pyro_hollow.ode import SolverError

SETTINGS = {
    "epochs": 3,
    "warmup": 1,
    "latent-dim": 4,
    "hidden-dim": 16,
    "batch-size": 32,
    "lr": 0.01,
    "num-samples": 3,
}
ROOT = Path(__file__).parents[2]
FIGURES = ("reconstructions.png", "samples.png")
HOLLOW = ("hollow", "hollow-stochastic", "hollow-low-rank", "hollow-low-rank-2")
CONTINUOUS = ("ffjord", "free-form-exact", "free-form-exact-path", *HOLLOW, *(f"{name}-path" for name in HOLLOW))

# Some of each kind: without a flow, of discrete layers, with random probes, with exact traces, behind low-rank linear
# maps, and with the path gradient. The others are slow.
QUICK = (
    "none",
    "planar",
    "iaf",
    "ffjord",
    "hollow",
    "hollow-low-rank-2",
    "hollow-stochastic",
    "sylvester-path",
    "hollow-low-rank-path",
)
REPEATED = ("planar", "ffjord", "hollow-low-rank-path")


def quick(names):
    return pytest.mark.parametrize(
        "flow", [pytest.param(flow, marks=[] if flow in names else pytest.mark.slow) for flow in FLOWS]
    )


flows = quick(QUICK)


def command(output, *flow, name="table", **changed):
    settings = {**SETTINGS, **{key.replace("_", "-"): value for key, value in changed.items()}}
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return [name, "--flow", *flow, "--output", str(output), *options]


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Every tenth image will do."""

    def load(*args):
        images = load_images(*args)
        parts = {part: getattr(images, part)[::10] for part in ("train", "validation", "test")}
        return replace(images, **parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "load_images", load)
        yield


class Trained(NamedTuple):
    folder: Path
    results: dict
    printed: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_images, request):
    """The flows of the tests that are to run, trained by one command."""
    folder, printed = tmp_path_factory.mktemp("vae"), io.StringIO()
    asked_for = {item.callspec.params.get("flow") for item in request.session.items if hasattr(item, "callspec")}
    chosen = [flow for flow in FLOWS if flow in asked_for | set(QUICK)]
    with contextlib.redirect_stdout(printed):
        torch.set_default_dtype(torch.float64)
        try:
            results = vae.main(command(folder, *chosen))
        finally:
            torch.set_default_dtype(torch.float32)
    return Trained(folder / "digits", {result.config.flow: result for result in results}, printed.getvalue())


class TrainingStarted(Exception):
    pass


@pytest.fixture
def no_training(monkeypatch):
    def fit(*args, **kwargs):
        raise TrainingStarted

    monkeypatch.setattr(vae, "fit", fit)


@pytest.fixture
def no_estimate(monkeypatch):
    def estimate(*args, **kwargs):
        raise AssertionError("must not be tested again")

    monkeypatch.setattr(vae, "estimate", estimate)


def refused(capsys, argv):
    with pytest.raises(SystemExit) as raised:
        vae.main(argv)
    assert raised.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


# Table


@flows
def test_training_improves_the_model(flow, trained):
    result = trained.results[flow]
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert result.history[-1]["validation"] < result.history[0]["validation"] - 0.5
    # Of other samples, so it need not be lower.
    assert result.estimate.nll < result.estimate.elbo + 3 * result.estimate.elbo_error
    assert result.estimate.elbo < 64 * math.log(2)
    assert (result.estimate.num_samples, result.estimate.nll_images) == (3, 36)
    assert result.seconds > 0


@flows
def test_evaluations_of_training_and_test(flow, trained):
    result = trained.results[flow]
    evaluations = [row["nfe"] for row in result.history] + [result.estimate.nfe]
    if flow in CONTINUOUS:
        assert all(nfe >= (12 if "-2" in flow else 6) for nfe in evaluations)
    else:
        assert evaluations == [0] * 4


@flows
def test_files_of_a_run(flow, trained):
    from matplotlib import image

    folder, result = trained.folder / f"{flow}-0", trained.results[flow]
    assert json.loads((folder / "config.json").read_text()) == asdict(result.config)
    kept = json.loads((folder / "training.json").read_text())
    assert kept.pop("software") == {"pyro_hollow": pyro_hollow.__version__, "torch": version("torch")}
    assert kept == asdict(replace(result, estimate=None))
    kept = json.loads((folder / "estimate.json").read_text())
    assert kept["estimate"] == asdict(result.estimate)
    with open(folder / "history.csv", newline="") as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == result.history
    for name in FIGURES:
        assert image.imread(folder / name)[..., :3].std() > 0.01
    assert not list(folder.glob("*.draft"))


def test_tables_and_figure_of_all_runs(trained):
    from matplotlib import image

    table = (trained.folder / "table.md").read_text()
    assert table in trained.printed
    assert table == format_table(list(trained.results.values())) + "\n"
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {flow}" for flow in trained.results]
    assert "scikit-learn's digits" in trained.printed and "K = 3" in trained.printed
    with open(trained.folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, result in zip(rows, trained.results.values(), strict=True):
        assert row["flow"] == result.config.flow
        assert int(row["parameters"]) == result.parameters
        assert (float(row["elbo"]), float(row["nll"])) == (result.estimate.elbo, result.estimate.nll)
        assert float(row["training_validation"]) == result.history[-1]["validation"]
    assert image.imread(trained.folder / "training.png")[..., :3].std() > 0.01


@flows
def test_kept_model_is_the_one_that_was_tested(flow, trained):
    result = trained.results[flow]
    images = vae.load_images("digits")
    model = vae.load(result.config, trained.folder.parent, images)
    settings = {"num_samples": 3, "nll_images": None}
    again = vae.evaluate(result.config, trained.folder.parent, images, torch.device("cpu"), **settings)
    assert result.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (again.history, again.parameters) == (result.history, result.parameters)
    # Random numbers are those of the test, whatever was drawn before.
    measured = estimate(model, images.test, num_samples=3)
    assert measured.elbo == pytest.approx(result.estimate.elbo)
    assert measured.nll == pytest.approx(result.estimate.nll)


def test_model_of_the_best_epoch_is_tested(trained):
    result = trained.results["hollow"]
    best = torch.load(trained.folder / "hollow-0" / "best.ckpt", weights_only=True)
    values = [row["validation"] for row in result.history]
    assert best["epoch"] == values.index(min(values))


def test_results_are_used_again(trained, no_training, no_estimate, capsys):
    results = vae.main(command(trained.folder.parent, *trained.results))
    assert results == list(trained.results.values())
    assert capsys.readouterr().out == trained.printed


def test_rows_of_the_table_can_be_chosen(trained, no_training, no_estimate, capsys):
    results = vae.main(command(trained.folder.parent, "iaf", "none"))
    assert [result.config.flow for result in results] == ["iaf", "none"]
    vae.main(command(trained.folder.parent, *trained.results))  # as the other tests expect


def test_more_samples_test_again_without_training(trained, tmp_path, no_training):
    shutil.copytree(trained.folder, tmp_path / "digits")
    (result,) = vae.main([*command(tmp_path, "none"), "--num-samples", "50"])
    assert result.estimate.num_samples == 50
    assert result.estimate.nll < trained.results["none"].estimate.nll
    assert result.estimate.elbo == trained.results["none"].estimate.elbo
    (result,) = vae.main([*command(tmp_path, "none"), "--nll-images", "7"])
    assert result.estimate.nll_images == 7


def test_no_likelihood(trained, tmp_path, no_training, capsys):
    shutil.copytree(trained.folder, tmp_path / "digits")
    (result,) = vae.main([*command(tmp_path, "none"), "--nll-images", "0"])
    assert math.isnan(result.estimate.nll)
    assert f"| none | {result.estimate.elbo:.2f} | - | 1 |" in capsys.readouterr().out


CHANGES = {
    "epochs": 2,
    "warmup": 2,
    "patience": 3,
    "latent_dim": 5,
    "hidden_dim": 17,
    "batch_size": 33,
    "lr": 0.02,
    "schedule": "constant",
    "tolerance": 0.1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings_are_refused(name, trained, no_training, capsys):
    before = {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")}
    message = refused(capsys, command(trained.folder.parent, "none", **{name: CHANGES[name]}))
    assert f"none-0 holds a run with other settings ({name})" in message and "--force" in message
    assert {path: path.stat().st_mtime_ns for path in trained.folder.rglob("*")} == before


def test_several_changed_settings_are_named(trained, no_training, capsys):
    message = refused(capsys, [*command(trained.folder.parent, "none", epochs=2, lr=0.1), "--adjoint"])
    assert "(epochs, lr, adjoint)" in message


def test_images_from_another_source_are_refused(trained, no_training, capsys, monkeypatch):
    load = vae.load_images
    monkeypatch.setattr(vae, "load_images", lambda *args: replace(load(*args), source="other digits"))
    assert "(source)" in refused(capsys, command(trained.folder.parent, "none"))


def test_a_new_seed_is_a_new_run(trained, no_training):
    with pytest.raises(TrainingStarted):
        vae.main([*command(trained.folder.parent, "none"), "--seed", "1"])
    assert not (trained.folder / "none-1" / "training.json").exists()


def test_force_begins_anew(tmp_path):
    (first,) = vae.main(command(tmp_path, "none"))
    (second,) = vae.main([*command(tmp_path, "none", epochs=2), "--force"])
    assert len(second.history) == 2
    # And leaves nothing of the first.
    (third,) = vae.main([*command(tmp_path, "none"), "--force"])
    assert without_seconds(third.history) == without_seconds(first.history)
    assert third.estimate == first.estimate


# A flow that solves nothing, one with random probes, and one with the path gradient; the others are slow.
@quick(REPEATED)
def test_same_seed_gives_same_numbers(flow, trained, tmp_path):
    # Nor does it matter what was trained before in the same process.
    (result,) = vae.main(command(tmp_path, flow))
    first = trained.results[flow]
    assert result.estimate == first.estimate
    assert without_seconds(result.history) == without_seconds(first.history)


def test_seeds_are_runs_of_their_own(trained, tmp_path, capsys):
    first, second = vae.main([*command(tmp_path, "none"), "--seed", "0", "1"])
    elbos = [result.estimate.elbo for result in (first, second)]
    assert elbos[0] == trained.results["none"].estimate.elbo != elbos[1]
    assert f"| none | {sum(elbos) / 2:.2f} ± {abs(elbos[0] - elbos[1]) / math.sqrt(2):.2f} |" in capsys.readouterr().out
    assert (tmp_path / "digits" / "none-1" / "best.ckpt").exists()


@pytest.mark.parametrize("flow", ("none", "hollow"))
def test_stopped_table_goes_on(flow, trained, tmp_path, monkeypatch):
    training_step, count = Task.training_step, []

    @functools.wraps(training_step)  # as Lightning looks at the arguments
    def stop(self, batch, *others):
        count.append(None)
        if len(count) == 7:  # of four batches an epoch, 126 images
            raise KeyError("stopped")
        return training_step(self, batch, *others)

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="stopped"):
        patch.setattr(Task, "training_step", stop)
        vae.main(command(tmp_path, flow))
    assert not (tmp_path / "digits" / f"{flow}-0" / "training.json").exists()
    (result,) = vae.main(command(tmp_path, flow))
    assert without_seconds(result.history) == without_seconds(trained.results[flow].history)
    assert result.estimate == trained.results[flow].estimate


@pytest.fixture
def minutes(monkeypatch):
    """A clock that stands in for training: a run takes 130 s, 100 s of which were expected; its test 50 s."""
    now = [0.0]

    def fit(*args, **kwargs):
        now[0] += 130.0
        raise SolverError("no training")

    monkeypatch.setattr(vae.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(vae, "expected_seconds", lambda *args, **kwargs: (100.0, 50.0))
    monkeypatch.setattr(vae, "fit", fit)


def test_time_that_is_left_is_printed_before_each_run(minutes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        vae.main(command(tmp_path, "none", "planar", "iaf"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "about" in line]
    assert [line.partition(":")[0] for line in lines] == [
        "none, seed 0 (run 1 of 3)", "planar, seed 0 (run 2 of 3)", "iaf, seed 0 (run 3 of 3)"
    ]  # fmt: skip
    # Three tests, and the runs that are left; from the second on each 30 s longer.
    for line, seconds in zip(lines, (3 * 100 + 150, 2 * 130 + 150, 130 + 150), strict=True):
        assert f"about {round(seconds / 60)} minutes left for training and test of all" in line


def test_settings_that_cannot_be_timed_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fail(config, *args, **kwargs):
        raise SolverError("too stiff")

    monkeypatch.setattr(vae, "expected_seconds", fail)
    assert [result.config.flow for result in vae.main(command(tmp_path, "none", epochs=1))] == ["none"]


def test_a_short_table_writes_no_bars_into_a_file(tmp_path, capfd):
    vae.main(command(tmp_path, "none", epochs=1, warmup=0, num_samples=1))
    printed = capfd.readouterr().err
    assert "\r" not in printed
    assert len(printed.splitlines()) < 10 and "about" in printed


@pytest.mark.slow
def test_a_table_by_the_command_line(tmp_path):
    arguments = command(tmp_path, "none", epochs=1, warmup=0, batch_size=500, num_samples=1)
    process = subprocess.run(
        [sys.executable, "-m", "pyro_hollow.experiments.vae", *arguments], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "\r" not in process.stderr
    assert len(process.stderr.splitlines()) < 10 and "about" in process.stderr
    assert "| none |" in process.stdout


def test_failed_run_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    fit = vae.fit

    def fail(config, *args, **kwargs):
        if config.flow == "planar":
            raise SolverError("too stiff")
        return fit(config, *args, **kwargs)

    monkeypatch.setattr(vae, "fit", fail)
    results = vae.main(command(tmp_path, "none", "planar", "householder"))
    assert [result.config.flow for result in results] == ["none", "householder"]
    assert "planar, seed 0 failed: too stiff" in capsys.readouterr().err
    trained = [(tmp_path / "digits" / f"{flow}-0" / "training.json").exists() for flow in ("none", "householder")]
    assert trained == [True, True]


KILLED = ["--epochs", "6", "--latent-dim", "4", "--hidden-dim", "16", "--num-samples", "3"]


@pytest.fixture
def start():
    """Starts the command in a process that does not outlive the test."""
    processes = []

    def start(flow, output):
        argv = ["table", "--flow", flow, *KILLED, "--output", str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "pyro_hollow.experiments.vae", *argv], env=environment, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )
        )  # fmt: skip
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("flow", ("none", "hollow"))
def test_killed_process_loses_an_epoch_at_most(flow, start, tmp_path):
    """SIGKILL in the middle of the training, twice; then the same command."""

    def epochs(output):
        history = output / "digits" / f"{flow}-0" / "history.csv"
        return max(0, len(history.read_text().splitlines()) - 1) if history.exists() else 0

    for kill_after in (2, 4):
        process, begin = start(flow, tmp_path / "killed"), time.monotonic()
        while epochs(tmp_path / "killed") < kill_after:
            assert process.poll() is None and time.monotonic() - begin < 120
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        last = torch.load(tmp_path / "killed" / "digits" / f"{flow}-0" / "last.ckpt", weights_only=True)
        assert len(last["history"]) >= epochs(tmp_path / "killed") - 1
    for name in ("killed", "whole"):
        process = start(flow, tmp_path / name)
        process.communicate(timeout=120)
        assert process.returncode == 0
    folders = [tmp_path / name / "digits" / f"{flow}-0" for name in ("killed", "whole")]
    histories = [json.loads((folder / "training.json").read_text())["history"] for folder in folders]
    assert without_seconds(histories[0]) == without_seconds(histories[1])
    first, second = (torch.load(folder / "best.ckpt", weights_only=True)["state_dict"] for folder in folders)
    assert all(torch.equal(first[key], second[key]) for key in second)
    tests = [json.loads((folder / "estimate.json").read_text()) for folder in folders]
    assert tests[0] == tests[1]


# Gradients


def test_table_of_gradients(trained, capsys, no_training, monkeypatch):
    monkeypatch.setattr(vae, "gradient_variance", functools.partial(vae.gradient_variance, repeats=3))
    chosen = ("hollow", "hollow-stochastic")
    assert vae.main(command(trained.folder.parent, *chosen, name="gradients")) == []
    header, rule, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == 7
    numbers = {}
    for flow, row in zip(chosen, rows, strict=True):
        name, seed, *values = row.strip("| ").split(" | ")
        assert (name, seed) == (flow, "0")
        numbers[flow] = [float(value) for value in values]
        assert len(values) == 4
    exact, stochastic = numbers["hollow"], numbers["hollow-stochastic"]
    assert exact[1] == exact[3] == 0 and exact[0] > 0 and exact[2] > 0
    assert all(value > 0 for value in stochastic)


def test_gradients_of_other_settings_are_refused(trained, capsys):
    message = refused(capsys, command(trained.folder.parent, "hollow", name="gradients", tolerance=0.1))
    assert "hollow-0 holds a run with other settings (tolerance)" in message


def test_gradients_of_what_is_not_trained(tmp_path, capsys):
    message = refused(capsys, command(tmp_path, "hollow", name="gradients"))
    assert str(tmp_path / "digits" / "hollow-0") in message


@pytest.mark.parametrize("flow", ("none", "iaf"))
def test_gradients_are_for_continuous_flows(flow, trained, capsys):
    message = refused(capsys, command(trained.folder.parent, flow, name="gradients"))
    assert flow in message


# Arguments, and what standard error says of them. FILE is a file, EMPTY a folder.
BAD_COMMANDS = {
    "unwritable output": (["--output", "FILE/below"], "FILE"),
    "output is a file": (["--output", "FILE"], "FILE"),
    "no data": (["--data", "mnist", "--data-dir", "EMPTY"], "binarized_mnist_train.amat is neither in EMPTY"),
    "no data folder": (["--data", "omniglot", "--data-dir", "EMPTY/x"], "chardata_rebuilt.mat is neither in EMPTY/x"),
    "unknown data": (["--data", "cifar"], "argument --data: invalid choice: 'cifar'"),
    "unknown flow": (["--flow", "spline"], "argument --flow: invalid choice: 'spline'"),
    "unknown network": (["--network", "resnet"], "argument --network: invalid choice: 'resnet'"),
    "unknown binarization": (["--binarization", "none"], "argument --binarization: invalid choice: 'none'"),
    "conv for digits": (["--network", "conv"], "28 x 28"),
    "no epoch": (["--epochs", "0"], "argument --epochs: must be at least 1, but got 0"),
    "no sample": (["--num-samples", "0"], "argument --num-samples: must be at least 1, but got 0"),
    "negative warm-up": (["--warmup", "-1"], "--warmup"),
    "negative patience": (["--patience", "-1"], "--patience"),
    "negative number of images": (["--nll-images", "-1"], "--nll-images"),
    "negative learning rate": (["--lr", "-0.1"], "--lr"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "unknown accelerator": (["--accelerator", "abacus"], "abacus"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_bad_commands_are_explained(case, tmp_path, capsys):
    (tmp_path / "FILE").touch()
    (tmp_path / "EMPTY").mkdir()

    def in_place(text):
        return text.replace("FILE", str(tmp_path / "FILE")).replace("EMPTY", str(tmp_path / "EMPTY"))

    arguments, reason = case
    message = refused(capsys, [*command(tmp_path / "results", "none"), *map(in_place, arguments)])
    assert in_place(reason) in message


# Configuration


def configured(tmp_path, content, *argv):
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return parse(make_parser(), ["table", "--config", str(path), *argv])


def without_config(args):
    return {name: value for name, value in vars(args).items() if name != "config"}


def test_yaml_says_what_options_say(tmp_path):
    content = {
        "flow": ["none", "hollow"], "seed": [0, 1], "epochs": 7, "lr": 0.005, "schedule": "constant", "adjoint": True,
        "force": False, "latent-dim": 8, "hidden_dim": 32, "output": "elsewhere", "nll_images": None,
    }  # fmt: skip
    argv = "table --flow none hollow --seed 0 1 --epochs 7 --lr 0.005 --schedule constant --adjoint --latent-dim 8"
    expected = parse(make_parser(), [*argv.split(), "--hidden-dim", "32", "--output", "elsewhere"])
    assert without_config(configured(tmp_path, content)) == without_config(expected)


@pytest.mark.parametrize("number", ("1e-3", "0.001"))
def test_numbers_in_yaml(number, tmp_path):
    # YAML reads "1e-3" as a text.
    assert configured(tmp_path, f"lr: {number}").lr == 1e-3


def test_command_line_comes_before_yaml(tmp_path):
    args = configured(tmp_path, {"epochs": 7, "flow": ["none", "hollow"], "lr": 0.5}, "--epochs", "9", "--flow", "iaf")
    assert (args.epochs, args.flow, args.lr) == (9, ["iaf"], 0.5)


def test_empty_yaml(tmp_path):
    assert without_config(configured(tmp_path, "")) == without_config(parse(make_parser(), ["table"]))


def test_command_may_follow_the_options(tmp_path):
    (tmp_path / "config.yaml").write_text("epochs: 7")
    args = parse(make_parser(), ["--config", str(tmp_path / "config.yaml"), "gradients"])
    assert (args.command, args.epochs) == ("gradients", 7)


def test_yaml_trains_the_same(trained, no_training, no_estimate, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "flow": list(trained.results), "output": str(trained.folder.parent)}))
    assert vae.main(["table", "--config", str(path)]) == list(trained.results.values())


BAD_YAML = {
    "unknown option": ("epoch-count: 7", "--epoch-count"),
    "bad value": ("epochs: 0", "argument --epochs: must be at least 1, but got 0"),
    "bad choice": ("flow: [none, spline]", "argument --flow: invalid choice: 'spline'"),
    "a list": ("- epochs", "config.yaml cannot be read: it must hold names of options"),
    "not YAML": ("epochs: [1, 2", "config.yaml cannot be read"),
    "a tab": ("epochs:\t- [", "config.yaml cannot be read"),
    "no text": (b"\xff\xfe\x00", "config.yaml cannot be read"),
}


@pytest.mark.parametrize("case", BAD_YAML.values(), ids=BAD_YAML.keys())
def test_bad_yaml_is_explained(case, tmp_path, capsys):
    content, reason = case
    (tmp_path / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as raised:
        parse(make_parser(), ["table", "--config", str(tmp_path / "config.yaml")])
    assert raised.value.code == 2
    assert reason in capsys.readouterr().err


def test_missing_yaml_is_explained(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(make_parser(), ["table", "--config", str(tmp_path / "no.yaml")])
    assert "no.yaml cannot be read" in capsys.readouterr().err


DEFAULTS = {
    "digits": ([], 100, 80, 16, 128, 64),
    "mnist": (["--data", "mnist"], 10, 8, 64, 512, 32),
    "omniglot": (["--data", "omniglot"], 20, 16, 64, 512, 32),
    "conv": (["--data", "mnist", "--network", "conv"], 10, 8, 64, 256, 32),
    "few epochs": (["--epochs", "2"], 2, 1, 16, 128, 64),
    "all given": ("--epochs 9 --warmup 0 --latent-dim 3 --hidden-dim 5 --batch-size 7".split(), 9, 0, 3, 5, 7),
}


@pytest.mark.parametrize("case", DEFAULTS.values(), ids=DEFAULTS.keys())
def test_defaults(case):
    argv, *expected = case
    config = make_config(parse(make_parser(), ["table", *argv]), "stripes", "hollow", 3)
    assert (config.flow, config.seed) == ("hollow", 3)
    assert [config.epochs, config.warmup, config.latent_dim, config.hidden_dim, config.batch_size] == expected


def test_flows_by_default():
    args = parse(make_parser(), ["table"])
    assert args.flow == ["none", "planar", "iaf", "sylvester", "householder", "ffjord", "hollow"]


# Format

CONFIG = make_config(parse(make_parser(), ["table"]), "stripes", "none", 0)


def result(flow, seed, elbo, nll, nfe=0.0, test_nfe=0.0, epochs=10, seconds=10.0):
    row = {"loss": 1.0, "validation": 2.0, "kl_weight": 1.0, "nfe": nfe, "nfe_backward": 0.0}
    history = [{"epoch": i + 1.0, "seconds": (i + 1) * seconds, **row} for i in range(epochs)]
    measured = Estimate(elbo, 0.1, nll, 0.1, 100, 500, test_nfe)
    return Result(replace(CONFIG, flow=flow, seed=seed), 1234567, history, measured)


def test_format_table():
    results = [
        result("none", 0, 20.0, 19.5),
        result("hollow", 0, 10.0, 8.0, nfe=12, test_nfe=26, seconds=20.0),
        result("iaf", 0, 15.0, math.nan, epochs=7),
        result("hollow", 1, 11.0, 8.5, nfe=13, test_nfe=32, seconds=30.0),
        result("hollow", 2, 13.0, 8.25, nfe=14, test_nfe=32, seconds=40.0, epochs=12),
    ]
    header, rule, *rows = format_table(results).splitlines()
    assert all(line.count("|") == header.count("|") for line in (rule, *rows))
    # The standard deviations of 10, 11, 13 and of 8, 8.5, 8.25 are sqrt(7 / 3) and 1 / 4.
    assert rows == [
        "| none | 20.00 | 19.50 | 1 | 10 | 10.0 | - | 1,234,567 |",
        "| hollow | 11.33 ± 1.53 | 8.25 ± 0.25 | 3 | 10 to 12 | 30.0 | 13 / 30 | 1,234,567 |",
        "| iaf | 15.00 | - | 1 | 7 | 10.0 | - | 1,234,567 |",
    ]


def test_write_csv(tmp_path):
    write_csv([result("none", 0, 20.0, 19.5), result("none", 1, 21.0, 18.5)], tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["elbo"], row["nll"], row["seconds_an_epoch"]) for row in rows] == [
        ("0", "20.0", "19.5", "10.0"),
        ("1", "21.0", "18.5", "10.0"),
    ]
    assert set(asdict(CONFIG)) < set(rows[0]) and set(Config.__dataclass_fields__) < set(rows[0])
