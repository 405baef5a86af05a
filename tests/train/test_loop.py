# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import io
import math
import sys

import pytest
import torch
from torch import nn

from pyro_hollow.ode import SolverError
from pyro_hollow.train import loop as loop_module
from pyro_hollow.train import progress as progress_module
from pyro_hollow.train import train


def parameter(*values):
    return nn.Parameter(torch.tensor(values))


def quadratic(x, scale=(1.0, 30.0)):
    return (x * torch.tensor(scale)).square().sum() / 2


def fit(objective, parameters, **kwargs):
    return train(objective, parameters, **{"progress": False, **kwargs})


# The steps


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_steps_are_those_of_adam(clip_norm):
    x, y = parameter(1.0, -2.0), parameter(1.0, -2.0)
    training = fit(lambda: quadratic(x), [x], num_steps=7, lr=0.1, schedule="constant", ramp=0, clip_norm=clip_norm)
    optimizer = torch.optim.Adam([y], lr=0.1)
    for loss in training.losses:
        torch.testing.assert_close(loss, quadratic(y).detach())
        y.grad = y.detach() * torch.tensor([1.0, 900.0])
        y.grad *= min(1.0, (clip_norm or math.inf) / float(y.grad.norm()))
        optimizer.step()
    torch.testing.assert_close(x, y)


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_minimum_of_a_quadratic(schedule):
    x = parameter(0.0, 0.0)
    training = fit(lambda: quadratic(x - torch.tensor([3.0, -1.0])), [x], num_steps=600, lr=0.1, schedule=schedule)
    torch.testing.assert_close(x.detach(), torch.tensor([3.0, -1.0]), atol=1e-4, rtol=0)
    assert training.num_steps == 600 and training.stopped == "num_steps" and training.converged
    assert not training.events and not training.restarts
    assert str(training).startswith("600 steps in ")


def test_gradients_that_the_objective_sets_itself():
    x, y = parameter(1.0, -2.0), parameter(1.0, -2.0)

    def objective():
        assert x.grad is None
        with torch.no_grad():
            x.grad = x * torch.tensor([1.0, 900.0])
            return quadratic(x)

    ours, theirs = (fit(f, [p], num_steps=50) for f, p in ((objective, x), (lambda: quadratic(y), y)))
    assert torch.equal(ours.losses, theirs.losses) and torch.equal(x, y)


def test_groups_have_their_own_rates_and_settings():
    x, y = parameter(1.0), parameter(1.0)
    groups = [{"params": [x], "lr": 0.001}, {"params": [y], "weight_decay": 0.0}]
    fit(lambda: x.sum() + y.sum(), groups, num_steps=10, lr=0.01, schedule="constant", ramp=4)
    moved = 0.25 + 0.5 + 0.75 + 7.0  # Adam moves by the rate while the gradient stays the same
    torch.testing.assert_close(1 - x.detach(), torch.tensor([0.001 * moved]))
    torch.testing.assert_close(1 - y.detach(), torch.tensor([0.01 * moved]))


def test_parameter_without_gradient_stays():
    x, y = parameter(1.0), parameter(1.0)
    fit(lambda: x.square().sum(), [x, y], num_steps=30)
    assert y == 1.0 and x < 1.0


def test_callback_gets_the_loss_before_each_step():
    x, seen = parameter(1.0), []
    training = fit(lambda: quadratic(x, (1.0,)), [x], num_steps=5, callback=lambda *args: seen.append(args))
    assert seen == list(zip(range(1, 6), training.losses.tolist(), strict=True))


# Schedules


def cosine(k, n):
    return (1 + math.cos(math.pi * k / n)) / 2


RATES = {
    "constant": [0.25, 0.5, 0.75] + [1.0] * 17,
    "cosine": [0.25, 0.5, 0.75] + [cosine(k, 16) for k in range(-1, 16)],
    "plateau": [0.25, 0.5, 0.75] + [1.0] * 10 + [cosine(k, 7) for k in range(7)],
}


@pytest.mark.parametrize("schedule", RATES)
def test_rates(schedule):
    x = parameter(1.0)
    training = fit(lambda: quadratic(x, (1.0,)), [x], num_steps=20, lr=0.2, schedule=schedule, ramp=4)
    expected = [0.2 * factor for factor in RATES[schedule]]
    if schedule == "cosine":
        expected[3] = 0.2
    torch.testing.assert_close(training.rates, torch.tensor(expected), atol=1e-15, rtol=1e-15)


def test_plateau_ends_by_itself():
    x = parameter(5.0, -5.0)
    objective = lambda: quadratic(x, (1.0, 1.0)) + 0.1 * torch.randn(())  # noqa: E731
    training = fit(objective, [x], lr=0.05)
    begin = training.num_steps * 2 // 3
    assert training.stopped == "plateau" and training.converged
    assert 300 <= begin < 1000 and begin % 50 == 0
    assert training.rates[begin - 1] == 0.05 and training.rates[begin + 1] < 0.05 and training.rates[-1] < 1e-5
    losses = training.losses[:begin]
    third = begin // 3
    assert losses[third : 2 * third].mean() - losses[-third:].mean() < 0.01
    assert x.detach().abs().max() < 0.05


def test_plateau_by_a_threshold():
    x = parameter(5.0)
    steps = [fit(lambda: quadratic(x, (1.0,)), [x], lr=1e-3, threshold=lambda: 1e3).num_steps for _ in range(2)]
    assert steps == [450, 450]


def test_plateau_that_never_comes_ends_with_max_steps():
    x = parameter(0.0)
    training = fit(lambda: x.sum(), [x], max_steps=600)
    assert training.stopped == "max_steps" and not training.converged
    assert training.rates[400] == 0.01 and training.rates[401] < 0.01 and training.num_steps == 600


# Ends


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as the test says."""
    now = [0.0]
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: now[0])
    return now


def test_time_limit(clock):
    x = parameter(0.0)

    def objective():
        clock[0] += 0.5
        return x.sum()

    training = fit(objective, [x], time_limit=30.0)
    assert training.stopped == "time_limit" and training.seconds == 30.0 and training.num_steps == 60
    assert training.rates[39] == 0.01 and training.rates[59] < 1e-4  # the decay fits into the time
    clock[0] = 0.0
    training = fit(objective, [x], num_steps=100, time_limit=3.0)
    assert training.stopped == "time_limit" and training.num_steps == 6


def test_interrupt_returns_the_state():
    x, count = parameter(1.0), [0]

    def objective():
        count[0] += 1
        if count[0] == 8:
            raise KeyboardInterrupt
        return quadratic(x, (1.0,))

    training = fit(objective, [x], num_steps=20)
    assert training.stopped == "interrupted" and training.num_steps == 7
    assert len(training.losses) == len(training.rates) == 7 and x < 1.0


def test_validation_restores_the_best():
    x, seen = parameter(2.0), []

    def validate():
        assert not torch.is_grad_enabled()
        seen.append(x.item())
        return abs(x.item() - 1.0)

    training = fit(lambda: x.sum(), [x], num_steps=30, lr=0.1, schedule="constant", validate=validate, validate_every=4)
    assert [step for step, _ in training.validations] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert x.item() == min(seen, key=lambda value: abs(value - 1.0))
    assert f"best validation {abs(x.item() - 1.0):.4g}" in str(training)


def test_patience():
    x = parameter(1.0)
    values = iter([3.0, 2.0, math.nan, 2.5, 1.0, 1.0, 1.0, 1.0])
    training = fit(
        lambda: x.sum(), [x], num_steps=100, validate=lambda: next(values), validate_every=5, patience=3
    )  # fmt: skip
    assert training.stopped == "patience" and training.num_steps == 40 and training.converged


def test_validation_that_fails():
    x, count = parameter(1.0), [0]

    def validate():
        count[0] += 1
        if count[0] == 2:
            raise SolverError("too stiff")
        return 1.0

    training = fit(lambda: x.sum(), [x], num_steps=6, validate=validate, validate_every=2)
    assert math.isnan(training.validations[1][1])
    assert "the validation failed with SolverError: too stiff" in training.events[0]


# Failures


@pytest.mark.parametrize("error", [None, SolverError("too stiff"), ZeroDivisionError("by 0"), ValueError("scale < 0")])
def test_single_failures_are_skipped(error):
    x, y, count = parameter(1.0), parameter(1.0), [0]

    def objective():
        count[0] += 1
        if count[0] in (5, 9, 10):
            if error is not None:
                raise error
            return x.sum() * math.nan
        return quadratic(x, (1.0,))

    kwargs = {"schedule": "constant", "ramp": 0}
    training = fit(objective, [x], num_steps=13, **kwargs)
    fit(lambda: quadratic(y, (1.0,)), [y], num_steps=10, **kwargs)
    assert torch.equal(x, y) and training.restarts == 0 and training.losses.isnan().sum() == 3
    assert training.events == ["Skipped steps that failed, 3 in all: 5, 9, 10."]


def test_gradient_that_is_not_finite_is_skipped():
    x, count = parameter(1.0), [0]

    def objective():
        count[0] += 1
        return (x - 1).sqrt().sum() if count[0] == 2 else (x * 1e-3).sum()  # sqrt has an infinite slope at 0

    training = fit(objective, [x], num_steps=1, ramp=0)
    x.data.fill_(1.0)
    training = fit(objective, [x], num_steps=5)
    assert training.losses.isfinite().all() and x.isfinite().all()
    assert training.events == ["Skipped steps that failed, 1 in all: 1."]


def test_failures_forever_raise_with_the_last_good_parameters():
    x, values = parameter(1.0), []

    def objective():
        values.append(x.item())
        return quadratic(x, (1.0,)) if len(values) <= 30 else x.log().sum() * math.nan

    message = r"after 51 steps and 6 restarts: 3 steps in a row failed, the last because the loss is nan"
    with pytest.raises(ArithmeticError, match=message):
        fit(objective, [x], num_steps=100)
    assert x.item() == 1.0  # a second failure goes back to the start
    assert values[33] == values[25]  # and the first to the state of step 25


def test_errors_forever_are_the_cause():
    x, error = parameter(1.0), SolverError("too stiff")

    def objective():
        raise error

    with pytest.raises(ArithmeticError, match="SolverError: too stiff") as info:
        fit(objective, [x], num_steps=100, max_restarts=1)
    assert info.value.__cause__ is error


def test_no_failure_is_tolerated_on_request():
    x, y, error = parameter(1.0), parameter(0.0), SolverError("too stiff")

    def objective():
        raise error

    kwargs = {"num_steps": 5, "max_restarts": None, "lr": 0.1, "ramp": 0}
    with pytest.raises(ArithmeticError, match="the loss is nan in step 1; a smaller lr than 0.1 may help"):
        fit(lambda: x.sum() * math.nan, [x], **kwargs)
    with pytest.raises(ArithmeticError, match="the norm of the gradient is inf in step 1"):
        fit(lambda: y.sqrt().sum(), [y], **kwargs)
    with pytest.raises(SolverError, match="too stiff"):
        fit(objective, [x], **kwargs)
    assert x == 1.0 and y == 0.0


def test_too_high_rate_is_lowered():
    x = parameter(0.0)

    def objective():  # its domain is left by steps of 0.5
        return -(0.36 - (x - 0.25).square()).log().sum()

    training = fit(objective, [x], num_steps=300, lr=1.0, ramp=0)
    assert training.restarts >= 1 and training.factor == 0.5**training.restarts
    assert training.rates[0] == 1.0 and training.rates.max() == 1.0
    torch.testing.assert_close(x.detach(), torch.tensor([0.25]), atol=1e-3, rtol=0)
    assert "Restored the state of step 0, lowered lr to 0.5." in training.events[0]


def test_parameters_that_are_not_finite_are_restored():
    x = parameter(1.0)

    def callback(step, loss):
        if step == 30:
            x.data.fill_(math.inf)

    training = fit(lambda: 1e-3 * x.tanh().sum(), [x], num_steps=100, callback=callback)
    assert x.isfinite().all() and training.restarts == 1
    assert training.events[0].startswith("Step 50: a parameter is not finite. Restored the state of step 25")


def test_mistakes_of_the_objective_go_through():
    x = parameter(1.0)

    def wrong():
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        fit(wrong, [x], num_steps=3)
    with pytest.raises(RuntimeError, match="not a failure"):
        fit(lambda: (_ for _ in ()).throw(RuntimeError("not a failure")), [x], num_steps=3)
    with pytest.raises(ValueError, match=r"must return a scalar tensor, but returned a tensor with shape \(1,\)"):
        fit(lambda: x, [x], num_steps=3)
    with pytest.raises(ValueError, match="must return a scalar tensor, but returned float"):
        fit(lambda: 1.0, [x], num_steps=3)
    with pytest.raises(ValueError, match="must return a loss that requires a gradient"):
        fit(lambda: x.detach().sum(), [x], num_steps=3)


# Resuming


def test_resumed_training_equals_an_uninterrupted_one():
    x, y = parameter(1.0, -2.0), parameter(1.0, -2.0)
    kwargs = {"schedule": "constant", "lr": 0.1}
    whole = fit(lambda: quadratic(x), [x], num_steps=90, **kwargs)
    part = fit(lambda: quadratic(y), [y], num_steps=10, **kwargs)
    state = y.detach().clone()
    for _ in range(2):  # a training can be resumed again
        with torch.no_grad():
            y.copy_(state)
        both = fit(lambda: quadratic(y), [y], num_steps=80, resume=part, **kwargs)
        assert torch.equal(both.losses, whole.losses) and torch.equal(both.rates, whole.rates) and torch.equal(x, y)
        assert both.num_steps == 90


def test_resumed_plateau_has_no_ramp_and_looks_at_new_losses():
    x = parameter(5.0)
    objective = lambda: quadratic(x, (1.0,))  # noqa: E731
    first = fit(objective, [x], lr=0.1)
    second = fit(objective, [x], lr=0.1, resume=first)
    assert second.num_steps == first.num_steps + 450
    assert second.rates[first.num_steps] == 0.1


def test_few_resumed_steps_leave_the_verdict_as_it_was():
    x = parameter(5.0)
    objective = lambda: quadratic(x, (1.0,))  # noqa: E731
    early = fit(objective, [x], lr=0.1, num_steps=50)
    assert not early.converged and not fit(objective, [x], lr=0.1, num_steps=20, resume=early).converged
    first = fit(objective, [x], lr=0.1)
    assert fit(objective, [x], lr=0.1, num_steps=20, resume=first).converged
    assert not fit(lambda: x.sum(), [x], lr=0.1, num_steps=150, resume=first).converged  # enough to tell
    values = iter([1.0] * 20 + [math.nan] * 3 + [1.0] * 30)
    again = fit(lambda: x.sum() * 0 + next(values), [x], lr=0.1, num_steps=30, resume=first)
    assert again.restarts == 1 and not again.converged


def test_resumed_validation_keeps_the_best():
    x = parameter(1.0)
    kwargs = {"num_steps": 10, "validate": lambda: x.square().item(), "validate_every": 5}
    first = fit(lambda: x.sum(), [x], **kwargs)
    best = x.item()
    fit(lambda: -x.sum() * 10, [x], resume=first, lr=10.0, **{**kwargs, "validate": lambda: x.square().item() + 1})
    assert x.item() == best


# Words


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of 'plateau', 'cosine', 'constant', but got 'linear'"),
        ({"schedule": "cosine"}, "schedule 'cosine' needs num_steps"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, but got 0"),
        ({"num_steps": 1.5}, "num_steps must be a whole number of at least 1, but got 1.5"),
        ({"ramp": -1}, "ramp must be a whole number of at least 0, but got -1"),
        ({"max_restarts": -1}, "max_restarts must be a whole number of at least 0, but got -1"),
        ({"lr": math.inf}, "lr must be positive and finite, but got inf"),
        ({"clip_norm": 0.0}, "clip_norm must be positive and finite, but got 0.0"),
        ({"time_limit": -1.0}, "time_limit must be positive and finite, but got -1.0"),
        ({"patience": 2}, "patience counts validations: give validate, too"),
    ],
)
def test_bad_arguments(kwargs, message):
    x = parameter(1.0)
    with pytest.raises(ValueError, match=message):
        fit(lambda: x.sum(), [x], **kwargs)


def test_parameters_that_are_not_finite_at_the_start():
    x = parameter(math.nan)
    with pytest.raises(ValueError, match="parameters must be finite at the start"):
        fit(lambda: x.sum(), [x], num_steps=1)


@pytest.mark.parametrize("progress", [True, "a fit", False])
def test_lines_of_progress(progress, monkeypatch):
    now, file, x = [0.0], io.StringIO(), parameter(1.0)
    monkeypatch.setattr(sys, "stderr", file)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(progress_module.time, name, lambda: now[0])

    def objective():
        now[0] += 1.0
        return x.sum()

    train(objective, [x], num_steps=150, schedule="constant", progress=progress)
    lines = file.getvalue().splitlines()
    assert len(lines) == (2 if progress else 0)
    assert all("/150 [" in line and "loss " in line and "rate 0.01" in line for line in lines)
    assert all(line.startswith("a fit: ") for line in lines) == (progress != True)  # noqa: E712
