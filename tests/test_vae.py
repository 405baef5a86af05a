# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import contextlib
import csv
import io
import json
import math
from dataclasses import asdict, replace
from typing import NamedTuple

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_hollow.experiments import vae
from pyro_hollow.experiments.data import load_images
from pyro_hollow.experiments.vae import FLOWS, VAE, Config, Result, binarized_test, format_table, make_flow

SETTINGS = {
    "epochs": 3,
    "latent-dim": 4,
    "hidden-dim": 16,
    "batch-size": 32,
    "lr": 0.01,
    "num-samples": 3,
}
CONFIG = Config(
    flow="none",
    data="digits",
    seed=0,
    epochs=100,
    warmup=25,
    latent_dim=4,
    hidden_dim=16,
    batch_size=32,
    lr=1e-3,
    num_samples=500,
)
FIGURES = ("reconstructions.png", "samples.png", "training.png")

flows = pytest.mark.parametrize("flow", FLOWS)


def command(output, *flow, **changed):
    settings = {**SETTINGS, **{name.replace("_", "-"): value for name, value in changed.items()}}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return ["--flow", *flow, "--output", str(output), *options]


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Every tenth image will do."""

    def load(name, data_dir=None):
        images = load_images(name, data_dir)
        return replace(images, train=images.train[::10], test=images.test[::10])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "load_images", load)
        yield


class Trained(NamedTuple):
    folder: object
    models: dict
    results: dict
    table: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_images):
    """All flows, trained by one command."""
    folder, models, printed = tmp_path_factory.mktemp("vae"), {}, io.StringIO()
    run = vae.run

    def run_and_remember(config, *arguments):
        models[config.flow], result = run(config, *arguments)
        return models[config.flow], result

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(vae, "run", run_and_remember)
        torch.set_default_dtype(torch.float64)
        try:
            results = vae.main(command(folder, *FLOWS))
        finally:
            torch.set_default_dtype(torch.float32)
    return Trained(folder / "digits", models, {result.config.flow: result for result in results}, printed.getvalue())


class TrainingStarted(Exception):
    pass


@pytest.fixture
def no_training(monkeypatch):
    def train(*args):
        raise TrainingStarted

    monkeypatch.setattr(vae, "train", train)


def make_vae(flow, pixels=64):
    return VAE(pixels, latent_dim=4, hidden_dim=16, flow=flow)


def binary(n, pixels=64):
    return torch.bernoulli(torch.full((n, pixels), 0.3))


# Command line


@flows
def test_training_improves_the_loss(flow, trained):
    result = trained.results[flow]
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 1
    assert result.nll <= result.elbo < 64 * math.log(2)
    assert result.parameters == sum(parameter.numel() for parameter in trained.models[flow].parameters())


@flows
def test_evaluations_are_those_of_the_two_solvers(flow, trained):
    result = trained.results[flow]
    if flow == "hollow":
        # Three steps of rk4 in training; dopri5 in the test.
        assert result.nfe_train == 12
        assert result.nfe_test >= 7 and result.nfe_test % 6 == 1
    else:
        assert result.nfe_train == result.nfe_test == 0


@flows
def test_files_of_a_run(flow, trained):
    from matplotlib import image

    folder = trained.folder / f"{flow}-0"
    assert json.loads((folder / "result.json").read_text()) == asdict(trained.results[flow])
    with open(folder / "history.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows == trained.results[flow].history
    for name in FIGURES:
        assert image.imread(folder / name)[..., :3].std() > 0.01
    assert image.imread(trained.folder / "training.png")[..., :3].std() > 0.01


@flows
def test_table_has_a_row_for_the_flow(flow, trained):
    result = trained.results[flow]
    (row,) = [line for line in trained.table.splitlines() if line.startswith(f"| {flow} |")]
    assert f"| {result.elbo:.2f} | {result.nll:.2f} | 1 | 3 |" in row
    assert f"| {result.parameters:,} |" in row


def test_results_are_used_again(trained, no_training, capsys):
    results = vae.main(command(trained.folder.parent, *FLOWS))
    assert results == list(trained.results.values())
    assert capsys.readouterr().out == trained.table


CHANGES = {
    "epochs": 2,
    "warmup": 2,
    "latent_dim": 5,
    "hidden_dim": 17,
    "batch_size": 33,
    "lr": 0.02,
    "num_samples": 4,
    "seed": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings_train_again(name, trained, no_training):
    with pytest.raises(TrainingStarted):
        vae.main(command(trained.folder.parent, "none", **{name: CHANGES[name]}))


@pytest.mark.parametrize("content", ("", "{", "[]", "{}", '{"config": {"flow": "none"}}'))
def test_incomplete_results_are_not_used(content, tmp_path, no_training):
    folder = tmp_path / "digits" / "none-0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(content)
    with pytest.raises(TrainingStarted):
        vae.main(command(tmp_path, "none"))


@flows
def test_same_seed_gives_same_numbers(flow, trained, tmp_path):
    # Nor does it matter what was trained before in the same process.
    (result,) = vae.main(command(tmp_path, flow))
    first = trained.results[flow]
    assert (result.elbo, result.nll) == (first.elbo, first.nll)
    assert [row["loss"] for row in result.history] == [row["loss"] for row in first.history]


def test_seeds_are_runs_of_their_own(trained, tmp_path, capsys):
    first, second = vae.main([*command(tmp_path, "none"), "--seed", "0", "1"])
    assert first.elbo == trained.results["none"].elbo != second.elbo
    assert f"| {(first.elbo + second.elbo) / 2:.2f} ± " in capsys.readouterr().out
    assert (tmp_path / "digits" / "none-1" / "model.pt").exists()


@flows
def test_saved_model_is_the_trained_one(flow, trained):
    state = torch.load(trained.folder / f"{flow}-0" / "model.pt", weights_only=True)
    model, fresh, x = trained.models[flow], make_vae(flow), binary(7)
    fresh.load_state_dict(state)
    if flow == "hollow":
        fresh.flow.solver = model.flow.solver
    weights = []
    for each in (model, fresh):
        pyro.set_rng_seed(1)
        weights.append(each.log_weights(x, 5))
    assert torch.equal(*weights)


# Arguments, and what standard error says of them. FILE is a file, EMPTY a folder.
BAD_COMMANDS = {
    "unwritable output": (["--output", "FILE/below"], "FILE"),
    "output is a file": (["--output", "FILE"], "FILE"),
    "no data": (["--data", "mnist", "--data-dir", "EMPTY"], "train-images-idx3-ubyte.gz is neither in EMPTY"),
    "no data folder": (["--data", "mnist", "--data-dir", "EMPTY/x"], "train-images-idx3-ubyte.gz is neither in EMPTY"),
    "unknown data": (["--data", "cifar"], "argument --data: invalid choice: 'cifar'"),
    "unknown flow": (["--flow", "spline"], "argument --flow: invalid choice: 'spline'"),
    "no epoch": (["--epochs", "0"], "argument --epochs: must be at least 1, but got 0"),
    "no number": (["--epochs", "many"], "argument --epochs: invalid"),
    "no sample": (["--num-samples", "0"], "argument --num-samples: must be at least 1, but got 0"),
    "negative warm-up": (["--warmup", "-1"], "--warmup"),
    "negative learning rate": (["--lr", "-0.1"], "--lr"),
    "learning rate nan": (["--lr", "nan"], "--lr"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "missing device": (["--device", "cuda:99"], "CUDA"),
}


@pytest.mark.parametrize("arguments_and_reason", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_bad_commands_are_explained(arguments_and_reason, tmp_path, capsys):
    (tmp_path / "FILE").touch()
    (tmp_path / "EMPTY").mkdir()

    def in_place(text):
        return text.replace("FILE", str(tmp_path / "FILE")).replace("EMPTY", str(tmp_path / "EMPTY"))

    arguments, reason = arguments_and_reason
    with pytest.raises(SystemExit) as exit:
        vae.main([*command(tmp_path / "results", "none"), *map(in_place, arguments)])
    assert exit.value.code == 2
    assert in_place(reason) in capsys.readouterr().err.splitlines()[-1]


# Model


@pytest.mark.parametrize("num_samples", (1, 5))
@flows
def test_shape_of_log_weights(flow, num_samples):
    assert make_vae(flow).log_weights(binary(7), num_samples).shape == (num_samples, 7)


@flows
def test_log_weights_average_to_the_elbo_of_pyro(flow):
    model, x, particles = make_vae(flow), binary(3), 2000
    with torch.no_grad():
        log_w = model.log_weights(x, particles).sum(-1)
        loss = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1).loss(
            model.model, model.guide, x
        )
    assert abs(log_w.mean() + loss) < 5 * log_w.std() * math.sqrt(2 / particles)


def constant_decoder(flow):
    """A VAE whose decoder ignores its input: every binary image has the probability 2**-pixels."""
    model = make_vae(flow)
    torch.nn.init.zeros_(model.decoder[-1].weight)
    torch.nn.init.zeros_(model.decoder[-1].bias)
    return model


@flows
def test_weights_average_to_the_likelihood(flow):
    # Whatever the posterior. It is made wider than the prior, so that the weights have a variance; much wider before
    # the planar layers, each of which contracts.
    model, num_samples = constant_decoder(flow), 5000
    with torch.no_grad():
        model.to_base.bias[4:] = 5.0 if flow == "planar" else 2.0
        weights = (model.log_weights(binary(3), num_samples) + 64 * math.log(2)).exp()
    assert (weights.std(0) > 0.1).all()
    assert ((weights.mean(0) - 1).abs() < 5 * weights.std(0) / math.sqrt(num_samples)).all()


def exact_posterior(flow):
    """As before, with a posterior that equals the prior."""
    model = constant_decoder(flow)
    torch.nn.init.zeros_(model.to_base.weight)
    with torch.no_grad():
        model.to_base.bias[:4] = 0.0
        model.to_base.bias[4:] = math.log(math.expm1(1 - 1e-5))
        for parameter in model.flow.parameters() if model.flow is not None else ():
            parameter.zero_()
    return model


identities = pytest.mark.parametrize("flow", ("none", "hollow"))


@identities
def test_weights_of_the_exact_posterior_are_constant(flow):
    log_w = exact_posterior(flow).log_weights(binary(7), 5)
    assert (log_w + 64 * math.log(2)).abs().max() < 1e-10


@pytest.mark.parametrize("chunk", (100, 5000))
@pytest.mark.parametrize("num_samples", (1, 5, 101))
@identities
def test_evaluate_in_parts(flow, num_samples, chunk):
    elbo, nll = vae.evaluate(exact_posterior(flow), binary(7), num_samples, chunk=chunk)
    assert elbo == pytest.approx(64 * math.log(2))
    assert nll == pytest.approx(64 * math.log(2))


def test_kl_weight_scales_the_latent_part_alone():
    model, x = make_vae("none"), binary(5)
    losses = []
    for kl_weight in (0.25, 0.5, 1.0):
        pyro.set_rng_seed(0)
        losses.append(Trace_ELBO().loss(model.model, model.guide, x, kl_weight))
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[1]) / 2)
    pyro.set_rng_seed(0)
    assert losses[2] == pytest.approx(-model.log_weights(x, 1).sum().item())


def test_kl_warm_up():
    history = []
    vae.train(make_vae("none"), torch.rand(64, 64), replace(CONFIG, epochs=4, warmup=2), history)
    assert [row["kl_weight"] for row in history] == [0.5, 1.0, 1.0, 1.0]


def test_no_flow_and_unknown_flow():
    assert make_flow("none", 4, 8) is None
    with pytest.raises(ValueError, match="spline") as raised:
        make_flow("spline", 4, 8)
    assert all(flow in str(raised.value) for flow in FLOWS)


def test_test_images_are_binarised_once_and_for_all():
    images = load_images("digits")
    before = torch.get_rng_state()
    first = binarized_test(images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    assert torch.equal(binarized_test(images), first)
    assert first.unique().tolist() == [0, 1]
    assert abs(first.mean() - images.test.mean()) < 0.01


# Table


def result(flow, seed, elbo, nll, **changed):
    values = {"parameters": 1234567, "seconds": 10.0 + 10 * seed, "nfe_train": 0, "nfe_test": 0, **changed}
    return Result(replace(CONFIG, flow=flow, seed=seed), elbo=elbo, nll=nll, **values)


def test_format_table():
    results = [
        result("none", 0, 20.0, 19.5),
        result("hollow", 0, 10.0, 8.0, nfe_train=12, nfe_test=26),
        result("hollow", 1, 11.0, 8.5, nfe_train=12, nfe_test=32),
        result("hollow", 2, 13.0, 8.25, nfe_train=12, nfe_test=32),
    ]
    header, rule, *rows = format_table(results).splitlines()
    assert "NLL (K = 500)" in header
    assert header.count("|") == rule.count("|") == rows[0].count("|") == rows[1].count("|")
    # The standard deviations of 10, 11, 13 and of 8, 8.5, 8.25 are sqrt(7 / 3) and 1 / 4.
    assert rows == [
        "| none | 20.00 | 19.50 | 1 | 100 | 10 | - | 1,234,567 |",
        "| hollow | 11.33 ± 1.53 | 8.25 ± 0.25 | 3 | 100 | 20 | 12 / 26 | 1,234,567 |",
    ]
