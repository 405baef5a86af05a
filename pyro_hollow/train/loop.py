# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The loop that minimises an objective by Adam."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pyro_hollow.ode import SolverError

from .progress import Progress
from .schedule import SCHEDULES, Schedule, gain, mean

__all__ = ["Training", "train"]

#: Errors of an objective that stand for a loss that is not finite: a solver, a distribution with parameters out of its
#: support, a matrix without Cholesky factor.
FAILURES = (SolverError, ArithmeticError, torch.linalg.LinAlgError, ValueError)

#: Steps between two copies of the state, and failed steps in a row after which the last copy is restored.
KEEP_INTERVAL, MAX_FAILURES = 25, 3

#: The smallest gain of a loss that still falls, and the fewest losses by which convergence can be told.
LEAST_GAIN, FEWEST_LOSSES = 0.01, 100

#: Seconds between two updates of the bar.
BAR_INTERVAL = 0.5

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


@dataclass
class Training:
    """
    The course of a training, and the state from which another call of :func:`train` can go on. With ``resume`` it
    covers the earlier training, too.

    :ivar losses: the loss before each step with shape ``(num_steps,)``, float64 on the CPU; NaN for steps without one.
    :ivar rates: the learning rate of each step, likewise; of a parameter group without a rate of its own.
    :ivar num_steps: the number of steps, skipped ones included.
    :ivar seconds: the wall time.
    :ivar converged: the loss no longer fell: the test for a plateau said so, patience ran out, or the same test
        passes at the end. Fewer than 100 losses are not enough to tell, and leave a resumed training as it was.
    :ivar stopped: the reason: "plateau", "num_steps", "max_steps", "time_limit", "patience" or "interrupted".
    :ivar restarts: how many times an earlier state was restored.
    :ivar validations: pairs of the number of steps until then and the value of ``validate``.
    :ivar events: sentences on all that did not go by plan.
    :ivar optimizer: the state of Adam, from its ``state_dict``.
    :ivar factor: the factor of the rates that is left of restarts, 1 or a power of a half.
    """

    losses: Tensor
    rates: Tensor
    num_steps: int
    seconds: float
    converged: bool
    stopped: str
    restarts: int
    validations: list[tuple[int, float]]
    events: list[str]
    optimizer: dict[str, Any] = field(repr=False)
    factor: float = 1.0

    def __str__(self) -> str:
        finite = self.losses[self.losses.isfinite()][-100:]
        loss = f"mean loss of the last {len(finite)} {finite.mean():.4g}" if len(finite) else "no finite loss"
        verdict = "converged" if self.converged else "not converged"
        lines = [f"{self.num_steps} steps in {self.seconds:.1f} s, {loss}, {verdict}, stopped by {self.stopped}"]
        if self.validations:
            step, value = min(self.validations, key=lambda pair: (math.isnan(pair[1]), pair[1]))
            lines.append(f"best validation {value:.4g} after {step} steps")
        return "\n".join([*lines, *self.events])


def train(
    objective: Callable[[], Tensor],
    parameters: Parameters,
    *,
    num_steps: int | None = None,
    lr: float = 0.01,
    schedule: Literal["plateau", "cosine", "constant"] = "plateau",
    ramp: int = 25,
    clip_norm: float | None = 10.0,
    max_steps: int = 4000,
    time_limit: float | None = None,
    threshold: Callable[[], float] | None = None,
    validate: Callable[[], float] | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    max_restarts: int | None = 6,
    callback: Callable[[int, float], object] | None = None,
    progress: bool | str = True,
    resume: Training | None = None,
) -> Training:
    r"""
    Minimises an objective by Adam, and takes care of the learning rate, the number of steps, gradients that are too
    large, and values that are not finite.

    Schedules. Each begins with a linear ramp.

    - "plateau": the rate is constant until the loss no longer falls, and then falls along half a cosine for half as
      many steps as there were until then. The test is made from step 300 on, every 50 steps: the mean loss of the last
      third of the steps is less than 0.01 below that of the third before. If it does not pass, the cosine begins at two
      thirds of ``max_steps`` or ``time_limit``. With ``num_steps`` it begins at two thirds of them, without a test.
    - "cosine": half a cosine from the ramp to ``num_steps``.
    - "constant": the same rate from the ramp to ``num_steps``.

    Failures. A step fails if its loss or the norm of its gradient is not finite, or if the objective raises a
    :class:`~pyro_hollow.ode.SolverError`, ArithmeticError, :class:`torch.linalg.LinAlgError` or ValueError (this one
    once there was a good step: before, it is a mistake and goes through). A failed step is skipped. After three in a
    row, or if a parameter is not finite, the last good state (one is kept every 25 steps) is restored, and the rates
    are halved. :attr:`Training.events` tells of each.

    Example usage:

    >>> x = torch.nn.Parameter(torch.zeros(2))
    >>> training = train(lambda: (x - 1).square().sum(), [x], num_steps=200, lr=0.1, progress=False)
    >>> x.detach().round(decimals=2)
    tensor([1., 1.])

    :param objective: returns the loss, a scalar tensor; called once a step, when all gradients are None. The loop calls
        ``backward`` if the loss requires a gradient. If it does not, the objective itself has put the gradients into
        ``.grad`` of the parameters.
    :param parameters: the parameters, or groups of them as for :class:`torch.optim.Adam`. The "lr" of a group replaces
        ``lr`` and is scheduled likewise; other settings of Adam may stand there, too.
    :param num_steps: the number of steps; None lets the schedule "plateau" decide.
    :param float lr: the learning rate between ramp and decay.
    :param str schedule: "plateau", "cosine" or "constant".
    :param int ramp: the steps in which the rate rises; 0 for none.
    :param clip_norm: the norm to which the gradient of all parameters together is clipped; None not to clip.
    :param int max_steps: the most steps where ``num_steps`` is None.
    :param time_limit: seconds of wall time after which no further step begins.
    :param threshold: returns the gain below which the loss counts as no longer falling; such as the standard error of a
        noisy loss. None for a gain of 0.01.
    :param validate: returns a number that is lower for better parameters; called without gradients. The parameters of
        the best one are restored at the end.
    :param int validate_every: the steps between two validations; one more is made at the end.
    :param patience: stops after as many validations in a row that are not better than the best; None never does.
    :param max_restarts: how often an earlier state may be restored. None to skip and restore nothing: the first step
        that fails raises an ArithmeticError, or the error of the objective, and changes no parameter.
    :param callback: called after each step with the number of steps until then and the loss before it.
    :param progress: True for a bar, a text for a bar with this text beside it, False for none. Where there is no
        terminal, lines appear instead of a bar, one a minute.
    :param Training resume: an earlier training of the same parameters, to go on with. Its steps count for the ramp, not
        for ``num_steps``, ``max_steps`` and ``time_limit``.
    :returns: the course of the training. ``Ctrl-C`` ends it early.
    :raises ArithmeticError: if steps fail in spite of ``max_restarts`` restarts; the parameters are those of the last
        good state.
    :raises ValueError: for arguments out of range, parameters that are not finite at the start, and an objective whose
        result is no scalar or leaves all parameters without a gradient.
    """
    if patience is not None and validate is None:
        raise ValueError("patience counts validations: give validate, too")
    _check_schedule(schedule, num_steps)
    _check_counts(0, ramp=ramp, max_restarts=max_restarts)
    _check_counts(1, num_steps=num_steps, max_steps=max_steps, validate_every=validate_every, patience=patience)
    _check_positive(lr=lr, clip_norm=clip_norm, time_limit=time_limit)
    settings = SimpleNamespace(
        lr=lr, clip_norm=clip_norm, time_limit=time_limit, threshold=threshold, validate=validate,
        validate_every=validate_every, patience=patience, max_restarts=max_restarts, callback=callback,
    )  # fmt: skip
    loop = _Loop(objective, parameters, settings, resume)
    loop.schedule = Schedule.of(schedule, num_steps, max_steps, ramp, loop.step)
    label = progress if isinstance(progress, str) else None
    with Progress(total=loop.schedule.end, initial=loop.step, desc=label, disable=progress is False) as bar:
        loop.run(bar)
    return loop.result()


def _check_schedule(schedule: str, num_steps: int | None) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(map(repr, SCHEDULES))}, but got {schedule!r}")
    if num_steps is None and schedule != "plateau":
        raise ValueError(f"schedule {schedule!r} needs num_steps; the schedule 'plateau' finds it")


def _check_counts(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and (value < least or value != int(value)):
            raise ValueError(f"{name} must be a whole number of at least {least}, but got {value}")


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, but got {value}")


class _State:
    """A copy of the parameters and of the optimizer's state, after a number of steps."""

    def __init__(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.restored = step, False
        self._kept = [
            (parameter, parameter.detach().clone(), _clones(optimizer.state.get(parameter, {})))
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    @torch.no_grad()
    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Copies back; the state can be restored again."""
        self.restored = True
        for parameter, value, state in self._kept:
            parameter.copy_(value)
            parameter.grad = None
            optimizer.state[parameter] = _clones(state)


def _clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items()}


class _Loop:
    """The state of a training; the settings are those of :func:`train`."""

    schedule: Schedule

    def __init__(
        self,
        objective: Callable[[], Tensor],
        parameters: Parameters,
        settings: SimpleNamespace,
        resume: Training | None,
    ) -> None:
        self.objective, self.settings = objective, settings
        self.optimizer = torch.optim.Adam(parameters, lr=settings.lr, fused=True)
        self.group_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not self._is_finite():
            raise ValueError("parameters must be finite at the start, but at least one is not")
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.events: list[str] = []
        self.validations: list[tuple[int, float]] = []
        self.factor, self.restarts, self.seconds = 1.0, 0, 0.0
        self.best: tuple[float, _State] | None = None
        if resume is not None:
            self._resume(resume)
        self.first, self.converged = self.step, resume is not None and resume.converged
        self.tolerant = settings.max_restarts is not None
        self.restarts_left = settings.max_restarts
        # The first, and the latest if there is one.
        self.states = [_State(self.step, self.optimizer)] if self.tolerant else []
        self.stopped = ""  # why, unless all steps were taken
        self.plateau = False
        self.skipped: list[int] = []
        self.failures = 0  # in a row
        self.error: Exception | None = None
        self.worse = 0  # validations since the best
        self.begin = self.shown = time.perf_counter()

    def _resume(self, earlier: Training) -> None:
        # A copy, as Adam writes in place and the earlier training may be resumed again.
        self.optimizer.load_state_dict(copy.deepcopy(earlier.optimizer))
        self.losses, self.rates = earlier.losses.tolist(), earlier.rates.tolist()
        self.events, self.validations = list(earlier.events), list(earlier.validations)
        self.factor, self.restarts, self.seconds = earlier.factor, earlier.restarts, earlier.seconds
        values = [value for _, value in self.validations if not math.isnan(value)]
        if values:  # whose parameters have been restored
            self.best = min(values), _State(self.step, self.optimizer)

    @property
    def step(self) -> int:
        """The number of steps until now."""
        return len(self.losses)

    def run(self, bar: Progress) -> None:
        """Takes all steps."""
        validate, every = self.settings.validate, self.settings.validate_every
        try:
            stop = False
            while not stop and self.step < self.schedule.end:
                if self.schedule.due(self.step) and self._has_plateau():
                    self.stopped, self.plateau = "plateau", True
                    self.schedule.begin_decay(self.step)
                self._take_step()
                if self.settings.callback is not None:
                    self.settings.callback(self.step, self.losses[-1])
                if validate is not None and (self.step - self.first) % every == 0:
                    stop = self._validate()
                stop = self._look_at_clock(bar) or stop
            if self.tolerant and not self._is_finite():
                self._restore("a parameter is not finite")
            if validate is not None and (not self.validations or self.validations[-1][0] != self.step):
                self._validate()
        except KeyboardInterrupt:
            self.stopped = "interrupted"

    def _take_step(self) -> None:
        factor = self.factor * self.schedule.factor(self.step)
        loss, norm, problem = self._differentiate()
        self.rates.append(self.settings.lr * factor)
        self.losses.append(loss)
        if problem:
            self._fail(problem)
            return
        clip_norm = self.settings.clip_norm
        if clip_norm is not None and not norm + 1e-6 <= clip_norm:
            clip_grads_with_norm_(self.parameters, clip_norm, self.norm)
        for group, rate in zip(self.optimizer.param_groups, self.group_rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.failures = 0
        if self.tolerant and self.step % KEEP_INTERVAL == 0:
            if self._is_finite():
                self.states[1:] = [_State(self.step, self.optimizer)]
            else:
                self._restore("a parameter is not finite")

    def _differentiate(self) -> tuple[float, float, str]:
        """The loss, the norm of the gradient and what is wrong with them."""
        for parameter in self.parameters:
            parameter.grad = None
        try:
            loss = self.objective()
            _check_loss(loss)
            if needs_backward := loss.requires_grad:
                loss.backward()
        except FAILURES as error:
            first = len(self.skipped) == self.step - self.first
            if not self.tolerant or (first and isinstance(error, ValueError)):
                raise
            self.error = error
            return math.nan, math.nan, f"{type(error).__name__}: {error}".rstrip(".")
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not gradients and not needs_backward:
            raise ValueError("objective must return a loss that requires a gradient, or set .grad of parameters itself")
        self.norm = get_total_norm(gradients)
        value, norm = torch.stack((loss.detach(), self.norm.to(loss))).tolist()  # one synchronisation
        if not math.isfinite(value):
            return value, norm, f"the loss is {value}"
        if not gradients or not math.isfinite(norm):
            return value, norm, f"the norm of the gradient is {norm}" if gradients else "no parameter has a gradient"
        return value, norm, ""

    def _fail(self, problem: str) -> None:
        if not self.tolerant:
            raise ArithmeticError(
                f"{problem} in step {self.step}; a smaller lr than {self.settings.lr} may help, or from the first step "
                "on an objective of smaller size. The step has changed no parameter"
            )
        self.skipped.append(self.step)
        self.failures += 1
        if self.failures == MAX_FAILURES:
            self._restore(f"{self.failures} steps in a row failed, the last because {problem}")

    def _restore(self, reason: str) -> None:
        if self.states[-1].restored and len(self.states) > 1:  # it leads nowhere
            self.states.pop()
        state = self.states[-1]
        state.restore(self.optimizer)
        if not self.restarts_left:
            raise ArithmeticError(
                f"training stopped after {self.step} steps and {self.restarts} restarts: {reason}. The parameters are "
                f"those of step {state.step}. Look at the objective there, or lower lr, which is {self.settings.lr}"
            ) from self.error
        self.restarts_left -= 1
        self.restarts += 1
        self.factor /= 2
        self.failures, self.converged = 0, False
        self.schedule.start = self.step  # losses of another rate tell nothing
        rate = self.settings.lr * self.factor
        self.events.append(
            f"Step {self.step}: {reason}. Restored the state of step {state.step}, lowered lr to {rate:g}."
        )

    def _is_finite(self) -> bool:
        return math.isfinite(get_total_norm([p.detach() for p in self.parameters], math.inf).item())

    def _has_plateau(self) -> bool:
        threshold = self.settings.threshold
        least = LEAST_GAIN if threshold is None else threshold()
        return gain(self.losses[self.schedule.start :]) < least

    def _validate(self) -> bool:
        """Validates, keeps the best state, and tells whether patience has run out."""
        try:
            with torch.no_grad():
                value = float(self.settings.validate())
        except FAILURES as error:
            if isinstance(error, ValueError) and not self.validations:
                raise
            value = math.nan
            self.events.append(f"Step {self.step}: the validation failed with {type(error).__name__}: {error}.")
        self.validations.append((self.step, value))
        if value < (math.inf if self.best is None else self.best[0]):
            self.best, self.worse = (value, _State(self.step, self.optimizer)), 0
        else:
            self.worse += 1
        if self.worse != self.settings.patience:
            return False
        self.stopped = "patience"
        return True

    def _look_at_clock(self, bar: Progress) -> bool:
        """Shows the progress, and tells whether the time is over."""
        now, limit = time.perf_counter(), self.settings.time_limit
        if not bar.disable and now - self.shown >= BAR_INTERVAL:
            self.shown = now
            bar.total, bar.n = self.schedule.end, self.step
            bar.set_postfix_str(f"loss {mean(self.losses[-50:]):.4g}, rate {self.rates[-1]:.2g}")
        if limit is None or 1.5 * (now - self.begin) < limit:
            return False
        if self.schedule.adaptive and self.step < self.schedule.decay:
            self.stopped = "time_limit"
            self.schedule.begin_decay(self.step)
        if now - self.begin < limit:
            return False
        self.stopped = "time_limit"
        return True

    def result(self) -> Training:
        """Restores the best state, if there were validations, and reports."""
        seconds = self.seconds + time.perf_counter() - self.begin
        enough = self.step - self.schedule.start >= FEWEST_LOSSES
        fell_no_longer = self._has_plateau() if enough else self.converged
        converged = self.plateau or self.stopped == "patience" or fell_no_longer
        if self.best is not None:
            self.best[1].restore(self.optimizer)
        if self.skipped:
            shown = ", ".join(map(str, self.skipped[:10])) + ", ..." * (len(self.skipped) > 10)
            self.events.append(f"Skipped steps that failed, {len(self.skipped)} in all: {shown}.")
        return Training(
            losses=torch.tensor(self.losses, dtype=torch.float64),
            rates=torch.tensor(self.rates[: self.step], dtype=torch.float64),
            num_steps=self.step,
            seconds=seconds,
            converged=converged,
            stopped=self.stopped or ("max_steps" if self.schedule.adaptive else "num_steps"),
            restarts=self.restarts,
            validations=self.validations,
            events=self.events,
            optimizer=self.optimizer.state_dict(),
            factor=self.factor,
        )


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.dim():
        got = f"a tensor with shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"objective must return a scalar tensor, but returned {got}")
