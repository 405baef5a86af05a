# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Watches a solve from inside: what it costs, and, should it fail, where and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hollow.ops.stepper import is_batched

from .implicit_methods import METHODS as IMPLICIT_METHODS

State = Tensor | tuple[Tensor, ...]
Dynamics = Callable[[Tensor, Any], State]


class SolverError(RuntimeError):
    """
    A solve that could not be finished. The message says what happened, where, and what to change.

    :ivar solver: the :class:`~pyro_hollow.ode.Solver` that was used.
    :ivar time: the time that was reached.
    :ivar sample: the index of the worst sample in the batch.
    :ivar nfe: the number of evaluations until then.
    """

    # Only the message is positional: Pyro's handlers and pickle make a copy of an error from its message alone.
    def __init__(
        self,
        message: str,
        *,
        solver: Any = None,
        time: float = math.nan,
        sample: tuple[int, ...] = (),
        nfe: int = 0,
    ) -> None:
        super().__init__(message)
        self.solver, self.time, self.sample, self.nfe = solver, time, sample, nfe


@dataclass
class SolverStats:
    """
    Cost of a solve.

    :ivar nfe: evaluations of the vector field in the forward solve; of implicit methods with gradients by
        backpropagation, those of the replay of their steps included.
    :ivar accepted: accepted steps.
    :ivar rejected: rejected steps; 0 for methods of fixed step.
    :ivar nfe_backward: evaluations in the backward pass of the adjoint method, so far.
    :ivar diagonals: evaluations, among all of them, that also gave the diagonal of the Jacobian.
    :ivar jacobians: dense Jacobians of implicit methods, by d backward passes each.
    :ivar fallbacks: equations that dense Newton had to solve for Jacobi-Newton.
    :ivar difference_jacobians: dense Jacobians, among all of them, that were not finite where the field was, and whose
        entries were replaced by difference quotients.
    :ivar method: the name of the method.
    :ivar backend: the executor: "native" (compiled code), "hollow" (derivatives by hand, in torch), "autograd",
        "torchdiffeq", "implicit" or "scipy"; empty if there was nothing to solve.
    :ivar reason: why no faster executor ran; else empty.
    """

    nfe: int = 0
    accepted: int = 0
    rejected: int = 0
    nfe_backward: int = 0
    diagonals: int = 0
    jacobians: int = 0
    fallbacks: int = 0
    difference_jacobians: int = 0
    method: str = field(default="", compare=False)
    backend: str = field(default="", compare=False)
    reason: str = field(default="", compare=False)


#: What can go wrong: a word in torchdiffeq's message to what we say and advise.
_FAILURES = {
    "non-finite": (
        "state became non-finite",
        "The field diverges or overflows: check the inputs, train with a lower learning rate or clipped gradients, or "
        "use float64.",
    ),
    "underflow": (
        "step size underflowed",
        "The field has a singularity or is too stiff for this tolerance: raise rtol and atol (float32 resolves about "
        "1e-6, use float64 below).",
    ),
    "max_nfe": (
        "solve needs more than max_nfe evaluations",
        "Raise rtol and atol, raise max_nfe, or, if training made the field diverge, lower the learning rate or clip "
        "gradients.",
    ),
    "max_num_steps": (
        "solve needs more than max_num_steps steps",
        "Raise options['max_num_steps'], rtol or atol.",
    ),
    "Functional iteration": (
        "the corrector of implicit_adams did not converge",
        "Take smaller steps: lower options['step_size'], or raise options['max_iters'].",
    ),
    "corrector": (
        "the corrector of an implicit method does not converge, however short the step",
        "The field may be discontinuous or have a singularity: check it, raise options['max_iterations'], raise rtol "
        "and atol, or use float64.",
    ),
    "diagonal": (
        "diagonal of the Jacobian is not finite where the field is",
        "Dense Newton does not converge either. "
        "Check the field's with_diagonal, or set options['corrector'] to 'newton' or 'fixed-point'.",
    ),
    "jacobian": (
        "Jacobian is not finite where the field is, and the equations of the steps do not converge with difference "
        "quotients in its place",
        "Write the field so that its derivative is finite, such as with torch.where on the input of sqrt, not only on "
        "its output; or set options['corrector'] to 'fixed-point'.",
    ),
    "gradient": (
        "gradient is not finite: the Jacobian of the field is not finite there, or the gradient overflows",
        "Write the field so that its derivative is finite, such as with torch.where on the input of sqrt, not only on "
        "its output.",
    ),
    "tolerance": (
        "tolerances are finer than the numbers of the state",
        "Raise rtol (float32 resolves about 1e-6, float64 about 1e-15) or atol, or use float64.",
    ),
    "scipy": (
        "scipy's solver did not reach the end",
        "The field may be singular, stiff or not finite: raise rtol and atol, or name another of scipy's methods in "
        "options['solver'].",
    ),
}


#: What to do about parameters that are not finite.
ADVICE = "Training has diverged: restore a checkpoint or start anew, with a lower learning rate or clipped gradients."


def blame_parameters(field: object) -> str:
    """
    Names the parameters and buffers that are not finite, the first few of them; empty where all are finite.

    :param field: a module; or dynamics with an attribute ``network``, its module, or ``tensors``.
    """
    module = field if isinstance(field, nn.Module) else getattr(field, "network", None)
    if module is None:
        named = [(f"tensors[{i}]", tensor) for i, tensor in enumerate(getattr(field, "tensors", None) or ())]
    else:
        named = [*module.named_parameters(), *module.named_buffers()]
    bad = [name for name, tensor in named if not are_finite(tensor)]
    rest = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"parameters are not finite: {', '.join(bad[:3])}{rest}" if bad else ""


class Monitor:
    """
    The vector field as torchdiffeq sees it: counts evaluations and steps, keeps time within the interval, and remembers
    where the solve is.
    """

    def __init__(
        self,
        field: Dynamics,
        solver: Any,
        stats: SolverStats,
        batch_shape: torch.Size,
        times: tuple[float, float],
    ) -> None:
        self.field = field
        self.solver = solver
        self.stats = stats
        self.batch_shape = batch_shape
        #: Whether the field itself raised an error, which then is none of the solver's.
        self.field_failed = False
        self._interval = min(times), max(times)
        self._count = 0
        self._last: tuple[Tensor, State] | None = None
        self._backward = False

    def __call__(self, t: Tensor, state: Any) -> State:
        return self.evaluate(self.field, t, state)

    def evaluate(self, function: Callable[[Tensor, Any], Any], t: Tensor, state: Any) -> Any:
        """Any function of time and state in place of the field, at the price of one evaluation."""
        if self.solver.adaptive:  # they look for a first step of any length
            t = t.clamp(*self._interval)
        try:
            derivative = function(t, state)
        except Exception:
            self.field_failed = True
            raise
        self._last = (t, tuple(part.detach() for part in parts(derivative)))
        self._count += 1
        if self._backward:
            self.stats.nfe_backward += 1
        else:
            self.stats.nfe += 1
        if self._count > self.solver.max_nfe:
            raise self.failure("max_nfe")
        if self._count == 1 and not self.is_finite():  # it would spoil the first step, and with it time and state
            raise self.failure("non-finite")
        return derivative

    def forget(self) -> None:
        """A solve is over: keeps no tensor alive, and counts what follows as backward, each pass by itself."""
        self._last = None
        self._backward = True
        self._count = 0

    def explain(self, message: str) -> SolverError | None:
        """Translates what torchdiffeq says of a failure; None if it is not one of a solve."""
        if not self.is_finite():
            return self.failure("non-finite")
        return next((self.failure(word) for word in _FAILURES if word in message), None)

    def first_non_finite(self, solve: Callable[[Dynamics], object]) -> SolverError:
        """Solves once more to find where a state first became non-finite; methods of fixed step do not look."""
        probe = _Probe(self.field)
        try:
            with torch.no_grad():
                solve(probe)
        except _Found:
            self._last = probe.last
        return self.failure("non-finite")

    def is_finite(self) -> bool:
        """True if the latest derivative is finite."""
        return self._last is None or are_finite(self._last[1])

    def failure(self, word: str, last: tuple[Tensor, State] | None = None) -> SolverError:
        """The error for an entry of the table above, at the latest evaluation or at another time and derivative."""
        last = self._last if last is None else last
        reason, advice = _FAILURES[word]
        if word in ("underflow", "max_nfe") and self.solver.method not in IMPLICIT_METHODS:
            advice += " A stiff field wants an implicit method, such as Solver('bdf')."
        time, sample = math.nan, (0,) * len(self.batch_shape)
        if last is not None and not any(map(is_batched, parts(last[1]))):
            time, sample = float(last[0].detach()), self._worst_sample(last[1])
        if blame := blame_parameters(self.field):
            reason, advice = f"{blame}: {reason}", ADVICE
        solver, nfe = self.solver, self.stats.nfe + self.stats.nfe_backward
        return SolverError(
            f"{reason} at t = {time:.6g} after {nfe} evaluations (method {solver.method!r}, rtol = {solver.rtol:g}, "
            f"atol = {solver.atol:g}, max_nfe = {solver.max_nfe}); worst sample: {sample}. {advice}",
            solver=solver,
            time=time,
            sample=sample,
            nfe=nfe,
        )

    def _worst_sample(self, derivative: State) -> tuple[int, ...]:
        rows = [part.reshape(self.batch_shape.numel(), -1) for part in parts(derivative)]
        size = torch.cat(rows, dim=-1).abs().nan_to_num(nan=math.inf, posinf=math.inf).amax(-1)
        return tuple(int(index) for index in torch.unravel_index(size.argmax(), self.batch_shape))


class StepMonitor(Monitor):
    """For methods that tell of their steps, which those of scipy do not. torchdiffeq finds the callbacks by name."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Closures rather than methods, which would make a cycle that keeps the field alive; and only those that the
        # method knows, for torchdiffeq warns of the others.
        if self.solver.adaptive:
            self.callback_accept_step = _counter(self.stats, "accepted")
            self.callback_reject_step = _counter(self.stats, "rejected")
        else:
            self.callback_step = _counter(self.stats, "accepted")

    def callback_step_adjoint(self, t0: Tensor, state: tuple[Tensor, ...], dt: Tensor) -> None:
        """Looks at what torchdiffeq is about to assert in the backward solve, where no one could translate it."""
        if not are_finite(state):
            raise self.failure("non-finite")
        if t0 + dt == t0:
            raise self.failure("underflow")


def _counter(stats: SolverStats, name: str) -> Callable[[Tensor, Tensor, Tensor], None]:
    def callback(t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        setattr(stats, name, getattr(stats, name) + 1)

    return callback


class _Found(Exception):
    pass


class _Probe:
    """Stops at the first evaluation whose state or derivative is not finite."""

    def __init__(self, field: Dynamics) -> None:
        self._field = field
        self.last: tuple[Tensor, State] | None = None

    def __call__(self, t: Tensor, state: Any) -> State:
        derivative = self._field(t, state)
        self.last = (t, derivative)
        if not (are_finite(state) and are_finite(derivative)):
            raise _Found
        return derivative


def parts(state: State) -> tuple[Tensor, ...]:
    """The tensors of a state."""
    return (state,) if isinstance(state, Tensor) else state


def are_finite(state: State) -> bool:
    """True if all elements of a state are finite; and under vmap and tracing, which allow no decision by values."""
    if torch.jit.is_tracing():
        return True
    return all(is_batched(part) or bool(torch.isfinite(part).all()) for part in parts(state))
