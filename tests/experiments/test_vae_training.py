# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import csv
import functools
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from pyro_hollow.experiments import vae_training
from pyro_hollow.experiments.data import Images
from pyro_hollow.experiments.vae_models import VAE, make_flow, make_inner
from pyro_hollow.experiments.vae_training import (
    BatchSampler,
    Config,
    Task,
    estimate,
    expected_seconds,
    fit,
    gradient_variance,
    make_vae,
)
from pyro_hollow.ode import Solver
from pyro_hollow.train import progress

CONFIG = Config(
    flow="none",
    data="digits",
    source="stripes",
    binarization="static",
    network="mlp",
    seed=0,
    epochs=3,
    warmup=1,
    patience=0,
    latent_dim=4,
    hidden_dim=16,
    batch_size=16,
    lr=1e-2,
    schedule="cosine",
    tolerance=1e-3,
    adjoint=False,
)
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}


def images(train=40, validation=20, pixels=64):
    """Blurred stripes: something that can be learnt."""
    generator = torch.Generator().manual_seed(0)
    phase = torch.rand(train + validation, 1, generator=generator)
    grey = 0.5 + 0.4 * (6 * phase + torch.arange(pixels) / 3).sin()
    binary = torch.bernoulli(grey[train:], generator=generator)
    return Images(grey[:train], binary, binary, (8, pixels // 8), "stripes")


def state(task):
    return {name: value.clone() for name, value in task.vae.state_dict().items()}


def checkpoint(folder, name):
    return torch.load(folder / f"{name}.ckpt", weights_only=True)


def assert_same_state(first, second):
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def without_seconds(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


# Batches


def batches(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return [batch.tolist() for batch in sampler]


@pytest.mark.parametrize("size, batch_size", ((40, 8), (41, 8), (47, 8), (5, 8), (8, 8), (1, 1)))
@pytest.mark.parametrize("seed", (None, 0))
def test_every_image_once_an_epoch(size, batch_size, seed):
    sampler = BatchSampler(size, batch_size, seed)
    for epoch in range(3):
        parts = batches(sampler, epoch)
        assert len(parts) == len(sampler) == math.ceil(size / batch_size)
        assert [len(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
        assert 0 < len(parts[-1]) <= batch_size
        assert sorted(sum(parts, [])) == list(range(size))


def test_order_of_the_batches():
    assert batches(BatchSampler(5, 2)) == batches(BatchSampler(5, 2), 1) == [[0, 1], [2, 3], [4]]
    orders = [batches(BatchSampler(100, 10, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(first != second for i, first in enumerate(orders) for second in orders[:i])
    torch.manual_seed(5)
    assert batches(BatchSampler(100, 10, 1), 1) == orders[-1]
    assert batches(BatchSampler(100, 20, 1), 1)[0] == sum(orders[-1][:2], [])


@pytest.mark.parametrize("world_size", (2, 3))
@pytest.mark.parametrize("size", (48, 47, 45, 44, 41, 40))
def test_processes_together_see_the_batches_of_one(size, world_size):
    whole = batches(BatchSampler(size, 8, 0), 2)
    parts = [batches(BatchSampler(size, 8, 0, rank=rank, world_size=world_size), 2) for rank in range(world_size)]
    if 0 < size % 8 < world_size:
        whole.pop()  # too few for all
    assert [len(part) for part in parts] == [len(whole)] * world_size
    for rank in range(world_size):
        assert len(BatchSampler(size, 8, 0, rank=rank, world_size=world_size)) == len(whole)
    for i, batch in enumerate(whole):
        assert all(part[i] for part in parts)
        assert sorted(sum((part[i] for part in parts), [])) == sorted(batch)


def test_batch_smaller_than_the_number_of_processes():
    with pytest.raises(ValueError, match="batch_size must be at least the number of processes, 3, but got 2"):
        BatchSampler(10, 2, rank=0, world_size=3)


# Training


def test_model_is_drawn_by_the_seed():
    first, second, third = (make_vae(replace(CONFIG, seed=seed), 64).state_dict() for seed in (0, 0, 1))
    assert_same_state(first, second)
    assert not torch.equal(first["to_base.weight"], third["to_base.weight"])


def test_settings_reach_the_flow():
    vae = make_vae(replace(CONFIG, flow="hollow", tolerance=1e-2, adjoint=True), 64)
    assert (vae.flow.solver.rtol, vae.flow.solver.atol, vae.flow.solver.adjoint) == (1e-2, 1e-2, True)


@pytest.fixture
def steps(monkeypatch):
    """What each step of training had: epoch, KL weight, learning rate, grey images, and the images of the ELBO."""
    kept = []
    training_step = Task.training_step

    @functools.wraps(training_step)  # as Lightning looks at the arguments
    def step(self, batch, *others):
        elbo = self.elbo
        row = {
            "epoch": self.current_epoch,
            "kl_weight": self.kl_weight,
            "lr": self.trainer.optimizers[0].param_groups[0]["lr"],
            "grey": batch[0],
        }

        def watch(module, arguments):
            row["x"], row["used"] = arguments

        with elbo.register_forward_pre_hook(watch):
            loss = training_step(self, batch, *others)
        kept.append(row)
        return loss

    monkeypatch.setattr(Task, "training_step", step)
    return kept


def test_kl_weight_rises_over_the_warm_up(steps, tmp_path):
    task = fit(replace(CONFIG, epochs=4, warmup=2), images(), tmp_path, **QUIET)
    expected = [min(1, (i + 1) / 6) for i in range(12)]
    assert [step["kl_weight"] for step in steps] == pytest.approx(expected)
    assert [step["used"] for step in steps] == pytest.approx(expected)
    assert [row["epoch"] for row in task.history] == [1, 2, 3, 4]


def test_no_warm_up(steps, tmp_path):
    fit(replace(CONFIG, epochs=1, warmup=0), images(), tmp_path, **QUIET)
    assert [step["used"] for step in steps] == [1.0] * 3


def test_one_bar_spans_all_epochs_and_goes_on_after_a_stop(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    options = {name: value for name, value in QUIET.items() if name != "enable_progress_bar"}
    fit(replace(CONFIG, epochs=2), images(), tmp_path, **options)
    fit(replace(CONFIG, epochs=3), images(), tmp_path, **options)
    printed = capfd.readouterr()
    assert printed.out == ""
    first, second = (next(line for line in printed.err.splitlines() if f"/{total} [" in line) for total in (6, 9))
    assert first.startswith("none, seed 0:   0%") and second.startswith("none, seed 0:  67%")


def test_no_bar_if_there_is_to_be_none(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    fit(CONFIG, images(), tmp_path, **QUIET)
    assert capfd.readouterr() == ("", "")


def test_expected_seconds_count_all_batches(monkeypatch):
    monkeypatch.setattr(vae_training, "_seconds", lambda function, repeats=3: 1.0)
    data, device = images(train=40, validation=20), torch.device("cpu")
    # 3 batches of training and 2 of validation an epoch; 20 test images by 100 samples, of which 10 images are timed.
    assert expected_seconds(replace(CONFIG, epochs=4), data, device) == (4 * (3 + 2), 2)
    assert expected_seconds(CONFIG, data, device, nll_images=5) == (3 * (3 + 2), 1)
    assert expected_seconds(CONFIG, data, device, nll_images=0) == (3 * (3 + 2), 1)
    assert expected_seconds(CONFIG, data, device, num_samples=5000) == (3 * (3 + 2), 20)


@pytest.mark.parametrize("flow", ("none", "hollow", "sylvester-path"))
def test_expected_seconds_leave_the_random_numbers_alone(flow):
    before = torch.get_rng_state()
    assert all(seconds > 0 for seconds in expected_seconds(replace(CONFIG, flow=flow), images(), torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("schedule", ("cosine", "constant"))
def test_schedule_of_the_learning_rate(schedule, steps, tmp_path):
    fit(replace(CONFIG, schedule=schedule), images(), tmp_path, **QUIET)
    assert len(steps) == 9
    expected = [1e-2 * ((1 + math.cos(math.pi * i / 9)) / 2 if schedule == "cosine" else 1) for i in range(9)]
    assert [step["lr"] for step in steps] == pytest.approx(expected)


def test_images_are_binarised_anew_in_each_epoch(steps, tmp_path):
    data = images()
    fit(CONFIG, data, tmp_path, **QUIET)
    epochs = []
    for epoch in range(3):
        grey = torch.cat([step["grey"] for step in steps if step["epoch"] == epoch])
        x = torch.cat([step["x"] for step in steps if step["epoch"] == epoch])
        assert ((x == 0) | (x == 1)).all()
        # In the order of the data set, by the first pixel, which all have different.
        order = grey[:, 0].argsort()
        assert torch.equal(grey[order], data.train[data.train[:, 0].argsort()])
        epochs.append(x[order])
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert abs(torch.stack(epochs).mean() - data.train.mean()) < 0.03


def test_history_and_files(tmp_path):
    folder = tmp_path / "new" / "folder"
    task = fit(replace(CONFIG, flow="hollow", epochs=5, warmup=2), images(), folder, **QUIET)
    assert [row["epoch"] for row in task.history] == [1, 2, 3, 4, 5]
    assert [row["kl_weight"] for row in task.history] == [pytest.approx(4 / 6), 1, 1, 1, 1]
    assert task.history[-1]["validation"] < task.history[0]["validation"]
    assert all(row["nfe"] >= 6 for row in task.history)
    seconds = [row["seconds"] for row in task.history]
    assert 0 < seconds[0] and seconds == sorted(seconds)
    with open(folder / "history.csv", newline="") as file:
        assert [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)] == task.history
    assert len(list((folder / "logs").glob("events.*"))) == 1
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("adjoint", (False, True))
def test_evaluations_of_the_backward_pass(adjoint, tmp_path):
    task = fit(replace(CONFIG, flow="hollow", epochs=1, adjoint=adjoint), images(), tmp_path, **QUIET)
    assert (task.history[0]["nfe_backward"] > 0) == adjoint


def test_loss_of_an_epoch_is_the_mean_of_its_batches(monkeypatch, tmp_path):
    losses = []
    training_step = Task.training_step

    @functools.wraps(training_step)
    def step(self, *args):
        losses.append(training_step(self, *args))
        return losses[-1]

    monkeypatch.setattr(Task, "training_step", step)
    task = fit(replace(CONFIG, epochs=2), images(), tmp_path, **QUIET)
    expected = [sum(loss.item() for loss in part) / 3 for part in (losses[:3], losses[3:])]
    assert [row["loss"] for row in task.history] == pytest.approx(expected)


def test_validation_is_the_elbo_of_all_validation_images(tmp_path):
    """With the same random numbers in every epoch: where nothing is learnt, it stays the same."""
    task = fit(replace(CONFIG, lr=1e-30), images(validation=21), tmp_path, **QUIET)
    first, *others = [row["validation"] for row in task.history]
    assert others == [first] * 2
    with torch.no_grad():
        log_w = task.vae.log_weights(images(validation=21).validation, 1000)
    # Weighted by the sizes of the batches, of which the last is smaller.
    assert abs(first + log_w.mean()) < 4 * log_w.std() / math.sqrt(21)


def scripted(monkeypatch, values):
    """Replaces the validation -ELBO of each epoch."""
    log = Task.log

    def log_scripted(self, name, value, **kwargs):
        log(self, name, torch.tensor(values[self.current_epoch]) if name == "validation" else value, **kwargs)

    monkeypatch.setattr(Task, "log", log_scripted)


EARLY = {
    "after patience": (0, 2, [5.0, 4.0, 3.0, 3.0, 3.5, 1.0, 1.0], 5),
    "patience begins anew": (0, 2, [5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0], 7),
    "not in the warm-up": (3, 2, [1.0, 2.0, 3.0, 6.0, 7.0, 8.0, 9.0], 6),
    "never": (0, 0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 7),
}


@pytest.mark.parametrize("case", EARLY.values(), ids=EARLY.keys())
def test_early_stopping(case, monkeypatch, tmp_path):
    warmup, patience, values, epochs = case
    scripted(monkeypatch, values)
    task = fit(replace(CONFIG, epochs=7, warmup=warmup, patience=patience), images(), tmp_path, **QUIET)
    assert [row["validation"] for row in task.history] == values[:epochs]


def test_checkpoints_are_of_the_best_and_of_the_last_epoch(monkeypatch, tmp_path):
    scripted(monkeypatch, [5.0, 3.0, 4.0, 6.0])
    states = []
    on_train_epoch_end = Task.on_train_epoch_end

    def remember(self):
        states.append({name: value.clone() for name, value in self.state_dict().items()})
        on_train_epoch_end(self)

    monkeypatch.setattr(Task, "on_train_epoch_end", remember)
    task = fit(replace(CONFIG, epochs=4), images(), tmp_path, **QUIET)
    best, last = (checkpoint(tmp_path, name) for name in ("best", "last"))
    assert_same_state(best["state_dict"], states[1])
    assert_same_state(last["state_dict"], states[3])
    assert not torch.equal(states[1]["vae.to_base.weight"], states[3]["vae.to_base.weight"])
    assert [len(content["history"]) for content in (best, last)] == [2, 4]
    assert last["history"] == task.history
    assert last["config"] == asdict(replace(CONFIG, epochs=4))


def test_training_depends_on_the_seed_alone(tmp_path):
    first = fit(CONFIG, images(), tmp_path / "first", **QUIET)
    torch.manual_seed(1234)
    second = fit(CONFIG, images(), tmp_path / "second", **QUIET)
    other = fit(replace(CONFIG, seed=1), images(), tmp_path / "other", **QUIET)
    assert_same_state(state(first), state(second))
    assert without_seconds(first.history) == without_seconds(second.history) != without_seconds(other.history)


# Resuming


class Interrupted(Exception):
    pass


def interrupt(patch, method, count):
    """Raises in the call of that number of a method of the task."""
    original, calls = getattr(Task, method), []

    @functools.wraps(original)
    def interrupted(self, *args):
        calls.append(None)
        if len(calls) == count:
            raise Interrupted
        return original(self, *args)

    patch.setattr(Task, method, interrupted)


# Of three batches and two batches for validation an epoch.
INTERRUPTIONS = {
    "before the first checkpoint": [("training_step", 2)],
    "middle of an epoch": [("training_step", 8)],
    "first batch of an epoch": [("training_step", 7)],
    "last batch": [("training_step", 12)],
    "validation": [("validation_step", 4)],
    "before the checkpoint": [("on_train_epoch_end", 2)],
    "twice": [("training_step", 5), ("training_step", 2)],
}


def check_resuming(config, data, folder, interruptions):
    whole = fit(config, data, folder / "whole", **QUIET)
    for method, count in interruptions:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, method, count)
            fit(config, data, folder / "parts", **QUIET)
        torch.manual_seed(4321)
    resumed = fit(config, data, folder / "parts", **QUIET)
    assert_same_state(state(resumed), state(whole))
    assert without_seconds(resumed.history) == without_seconds(whole.history)
    seconds = [row["seconds"] for row in resumed.history]
    assert seconds == sorted(seconds)
    for name in ("best", "last"):
        contents = [checkpoint(folder / part, name) for part in ("whole", "parts")]
        assert_same_state(*(content["state_dict"] for content in contents))


@pytest.mark.parametrize("interruptions", INTERRUPTIONS.values(), ids=INTERRUPTIONS.keys())
def test_resumed_training_is_the_same(interruptions, tmp_path):
    check_resuming(replace(CONFIG, epochs=4, warmup=3), images(), tmp_path, interruptions)


@pytest.mark.parametrize("flow", ("iaf", "ffjord", "hollow"))
def test_resumed_training_of_flows_is_the_same(flow, tmp_path):
    check_resuming(replace(CONFIG, flow=flow), images(), tmp_path, [("training_step", 5)])


@pytest.mark.parametrize("schedule", ("cosine", "constant"))
def test_resumed_schedule_and_early_stopping_are_the_same(schedule, monkeypatch, tmp_path):
    scripted(monkeypatch, [5.0, 3.0, 4.0, 4.0, 4.0, 1.0])
    config = replace(CONFIG, epochs=6, patience=3, schedule=schedule)
    # In the fourth epoch, when one without a better value has passed.
    check_resuming(config, images(), tmp_path, [("training_step", 11)])
    assert len(checkpoint(tmp_path / "parts", "last")["history"]) == 5


@pytest.mark.parametrize("patience", (0, 2))
def test_complete_training_is_left_as_it_is(patience, monkeypatch, tmp_path):
    """As where a process was killed after the last epoch, before its result was written."""
    scripted(monkeypatch, [3.0, 4.0, 5.0, 1.0, 1.0])
    config = replace(CONFIG, epochs=4, warmup=0, patience=patience)
    first = fit(config, images(), tmp_path, **QUIET)
    again = fit(config, images(), tmp_path, **QUIET)
    assert again.history == first.history
    assert len(again.history) == (3 if patience else 4)
    assert_same_state(state(again), state(first))


# Several processes


def train_without_noise(folder, **options):
    """
    Trains a few models whose noise does not depend on how images are dealt out, and writes gradients, losses and
    parameters; also called in processes of their own.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "bernoulli", lambda p, **kwargs: (p > 0.5).to(p))
    noise = torch.linspace(-1, 1, 4)
    patch.setattr("torch.distributions.normal._standard_normal", lambda shape, **kwargs: noise.expand(shape).clone())
    gradients = []

    def keep(self, optimizer):
        gradients.append([parameter.grad.clone() for parameter in self.vae.parameters()])

    patch.setattr(Task, "on_before_optimizer_step", keep, raising=False)
    try:
        for name, config, data in DISTRIBUTED:
            gradients.clear()
            task = fit(config, data(), folder / name, enable_progress_bar=False, accelerator="cpu", **options)
            if task.global_rank == 0:
                result = {"gradients": gradients, "state": state(task), "history": task.history}
                torch.save(result, folder / f"{name}.pt")
    finally:
        patch.undo()


DISTRIBUTED = (
    ("even", replace(CONFIG, epochs=2), lambda: images(40, 20)),
    ("odd", replace(CONFIG, epochs=2), lambda: images(37, 21)),
    ("hollow", replace(CONFIG, flow="hollow", epochs=2), lambda: images(40, 20)),
)
SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
import test_vae_training
if __name__ == "__main__":
    test_vae_training.train_without_noise(Path({folder!r}), devices=2, strategy="ddp")
"""


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """Folders of what one process and two have trained."""
    folder = tmp_path_factory.mktemp("distributed")
    one, two = folder / "one", folder / "two"
    one.mkdir()
    two.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(two)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # In a session of its own, so that the second process can be stopped with the first.
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, start_new_session=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    assert process.returncode == 0, output
    torch.set_default_dtype(torch.float64)
    train_without_noise(one, devices=1)
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, *_ in DISTRIBUTED])
def test_two_processes_train_as_one(name, distributed):
    one, two = (torch.load(folder / f"{name}.pt", weights_only=True) for folder in distributed)
    assert len(one["gradients"]) == 6
    assert_close(two["gradients"], one["gradients"], rtol=1e-6, atol=1e-9)
    assert_close(two["state"], one["state"], rtol=1e-6, atol=1e-9)
    for first, second in zip(one["history"], two["history"], strict=True):
        assert second["loss"] == pytest.approx(first["loss"])
        assert second["validation"] == pytest.approx(first["validation"])
    best = [checkpoint(folder / name, "best")["state_dict"] for folder in distributed]
    assert_close(best[1], best[0], rtol=1e-6, atol=1e-9)


# Evaluation


def small_vae(flow="none"):
    """Its likelihood is an integral over one dimension."""
    torch.manual_seed(3)
    solver = Solver("dopri5", rtol=1e-3, atol=1e-3)
    vae = VAE(6, 1, 8, make_flow(flow, 1, 8, solver), inner=make_inner(flow, 1, 8, solver))
    with torch.no_grad():
        for parameter in (*vae.decoder.parameters(), *vae.to_base.parameters()):
            parameter.mul_(2.0)
    return vae


X = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
GRID = torch.linspace(-9, 9, 20_001, dtype=torch.float64)


def log_joint(vae):
    probabilities = vae.decode(GRID.unsqueeze(-1))
    log_p = torch.where(X == 1, probabilities, 1 - probabilities).log().sum(-1)
    return log_p - GRID.square() / 2 - math.log(2 * math.pi) / 2


@torch.no_grad()
@pytest.mark.parametrize("flow", ("none", "sylvester", "hollow", "hollow-low-rank-2", "ffjord"))
def test_estimate_of_a_known_likelihood(flow):
    vae = small_vae(flow)
    step = GRID[1] - GRID[0]
    expected = -(log_joint(vae).logsumexp(0) + step.log()).item()
    # Copies of one image, so that the standard error is that of the samples.
    result = estimate(vae, X.expand(20, 6), num_samples=500, chunk=300)
    assert 0 < result.nll_error < 0.05
    assert abs(result.nll - expected) < 4 * result.nll_error
    assert result.elbo > expected - 3 * result.elbo_error
    assert (result.nll_images, result.num_samples) == (20, 500)
    assert (result.nfe > 0) == (flow in ("hollow", "hollow-low-rank-2", "ffjord"))


@torch.no_grad()
def test_estimate_of_a_known_elbo():
    vae = small_vae()
    posterior = vae.posterior(X.unsqueeze(0)).base_dist
    log_q = posterior.log_prob(GRID.unsqueeze(-1).unsqueeze(-1)).flatten()
    step = GRID[1] - GRID[0]
    expected = -((log_q.exp() * (log_joint(vae) - log_q)).sum() * step).item()
    result = estimate(vae, X.expand(5000, 6), nll_images=0)
    assert 1e-4 < result.elbo_error < 0.1
    assert abs(result.elbo - expected) < 4 * result.elbo_error


class Scripted(VAE):
    """Its n-th weight of the image i is a number that is known."""

    def __init__(self, largest):
        super().__init__(2, 1, 4)
        self.counts = {}
        self.largest = largest
        self.asked = []

    def log_weights(self, x, num_samples):
        assert len(x) * num_samples <= self.largest
        self.asked.append(len(x))
        columns = []
        for i in x[:, 0].long().tolist():
            first = self.counts.get(i, 0)
            self.counts[i] = first + num_samples
            columns.append(weights(i, first, num_samples))
        return torch.stack(columns, dim=1)


def weights(i, first, num_samples):
    return (1.7 * i + 0.9 * torch.arange(first, first + num_samples) ** 2).sin() * (i + 1)


@pytest.mark.parametrize("num_samples", (1, 5, 12))
@pytest.mark.parametrize("chunk", (1, 2, 5, 7, 1000))
def test_chunks_do_not_change_the_estimator(num_samples, chunk):
    x = torch.stack([torch.arange(7), torch.zeros(7)], dim=1)
    vae = Scripted(chunk)
    result = estimate(vae, x, num_samples=num_samples, chunk=chunk)
    elbo = torch.stack([-weights(i, 0, 1)[0] for i in range(7)])
    nll = torch.stack([-weights(i, 1, num_samples).exp().mean().log() for i in range(7)])
    assert set(vae.counts.values()) == {1 + num_samples}
    for values, mean, error in ((elbo, result.elbo, result.elbo_error), (nll, result.nll, result.nll_error)):
        assert mean == pytest.approx(values.mean().item())
        assert error == pytest.approx(values.std().item() / math.sqrt(7))


def test_likelihood_of_a_part_of_the_images():
    x = torch.stack([torch.arange(50), torch.zeros(50)], dim=1)
    chosen = []
    for seed in (0, 0, 1):
        vae = Scripted(1000)
        result = estimate(vae, x, num_samples=3, nll_images=8, seed=seed)
        assert result.nll_images == 8
        chosen.append({i for i, count in vae.counts.items() if count == 4})
        assert len(chosen[-1]) == 8 and len(vae.counts) == 50
        nll = sum(-weights(i, 1, 3).exp().mean().log() for i in chosen[-1]) / 8
        assert result.nll == pytest.approx(nll.item())
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] != set(range(8))


def test_no_likelihood():
    x = torch.stack([torch.arange(50), torch.zeros(50)], dim=1)
    vae = Scripted(1000)
    result = estimate(vae, x, nll_images=0)
    assert set(vae.counts.values()) == {1}
    assert result.nll_images == 0 and math.isnan(result.nll) and math.isnan(result.nll_error)
    assert math.isfinite(result.elbo)


@pytest.mark.parametrize("flow", ("none", "hollow-stochastic", "hollow-low-rank-2", "ffjord"))
def test_estimate_leaves_no_trace(flow):
    vae = small_vae(flow)
    before, kept = (vae.inner, vae.flow), torch.get_rng_state()
    first = estimate(vae, X.expand(5, 6), num_samples=7)
    assert (vae.inner, vae.flow) == before
    assert torch.equal(torch.get_rng_state(), kept)
    torch.manual_seed(99)
    assert estimate(vae, X.expand(5, 6), num_samples=7) == first
    assert estimate(vae, X.expand(5, 6), num_samples=7, seed=1) != first


def test_failed_estimate_puts_the_flow_back(monkeypatch):
    vae = small_vae("ffjord")
    before = vae.flow

    def fail(*args):
        raise Interrupted

    monkeypatch.setattr(vae, "log_weights", fail)
    with pytest.raises(Interrupted):
        estimate(vae, X.expand(5, 6))
    assert vae.flow is before


# Variance of gradients


def noisy_vae(flow):
    torch.manual_seed(1)
    vae = make_vae(replace(CONFIG, flow=flow), 64)
    with torch.no_grad():
        for parameter in vae.flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return vae, images().validation[:10]


@pytest.mark.parametrize(
    "flow", ("hollow", "hollow-path", "hollow-low-rank-2-path", "free-form-exact", "hollow-stochastic", "ffjord")
)
def test_an_exact_trace_adds_no_variance(flow):
    anew, same = gradient_variance(*noisy_vae(flow), repeats=5)
    assert anew > 0
    if flow in ("hollow", "hollow-path", "hollow-low-rank-2-path", "free-form-exact"):
        assert same == 0
    else:
        assert same > 1e-6


@pytest.mark.parametrize("flow", ("hollow", "hollow-path", "hollow-stochastic", "ffjord"))
def test_variance_by_hand(flow, monkeypatch):
    """With a probe that is always the same, and the noise of the base put in by hand."""
    vae, x = noisy_vae(flow)
    monkeypatch.setattr(torch, "randn_like", lambda f: torch.arange(1.0, 1 + f.numel()).view_as(f).cos())
    anew, same = gradient_variance(vae, x, repeats=4, seed=7)
    torch.manual_seed(7)
    gradients = []
    for noise in torch.randn(4, 10, 4):
        monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *args, noise=noise, **kwargs: noise)
        vae.zero_grad()
        (-vae.log_weights(x, 1).mean()).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in vae.flow.parameters()]))
    assert anew == pytest.approx(torch.stack(gradients).var(0).sum().item())
    assert same == 0


def test_a_stochastic_trace_has_the_gradient_of_the_exact_one_on_average():
    exact_vae, x = noisy_vae("hollow")
    vae, _ = noisy_vae("hollow-stochastic")
    vae.load_state_dict(exact_vae.state_dict())
    vae.flow.solver = exact_vae.flow.solver = Solver("rk4", options={"step_size": 1.0})  # the same steps for both
    noise = torch.randn(len(x), 4)
    expected = vae_training._flow_gradient(exact_vae, x, noise)
    gradients = torch.stack([vae_training._flow_gradient(vae, x, noise) for _ in range(100)])
    # Over all parameters, the squared error of the mean is the variance by the number of gradients.
    error, variance = (gradients.mean(0) - expected).square().sum(), gradients.var(0).sum()
    assert error < 4 * variance / 100
