# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Initial value problems, solved by torchdiffeq, with per-sample error control, statistics and errors that help."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torchdiffeq
from torch import Tensor, nn

__all__ = ["METHODS", "Solution", "Solver", "SolverError", "SolverStats"]

State = Tensor | tuple[Tensor, ...]
AnyState = TypeVar("AnyState", Tensor, tuple[Tensor, ...])
VectorField = Callable[[Tensor, Any], State]

_ADAPTIVE_OPTIONS = frozenset(
    "first_step min_step max_step safety ifactor dfactor max_num_steps dtype step_t jump_t norm".split()
)
_FIXED_OPTIONS = frozenset("step_size grid_constructor perturb interp".split())
_ADAMS_OPTIONS = _FIXED_OPTIONS | {"max_iters", "max_order"}
_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
_ADAMS = ("explicit_adams", "implicit_adams")

#: The names of the methods, with the options that each one knows.
METHODS: dict[str, frozenset[str]] = {
    **dict.fromkeys(_ADAPTIVE, _ADAPTIVE_OPTIONS),
    **dict.fromkeys(_FIXED, _FIXED_OPTIONS),
    **dict.fromkeys(_ADAMS, _ADAMS_OPTIONS),
    "scipy_solver": frozenset({"solver", "min_step", "max_step"}),
}


class SolverError(RuntimeError):
    """
    A solve that could not be finished. The message says what happened, where, and what to change.

    :ivar solver: the :class:`Solver` that was used.
    :ivar time: the time that was reached.
    :ivar sample: the index of the worst sample in the batch.
    :ivar nfe: the number of evaluations until then.
    """

    def __init__(
        self, reason: str, advice: str, solver: Solver, time: float, sample: tuple[int, ...], nfe: int
    ) -> None:
        self.solver, self.time, self.sample, self.nfe = solver, time, sample, nfe
        super().__init__(
            f"{reason} at t = {time:.6g} after {nfe} evaluations (method {solver.method!r}, rtol = {solver.rtol:g}, "
            f"atol = {solver.atol:g}); worst sample: {sample}. {advice}"
        )


@dataclass
class SolverStats:
    """
    What a solve cost.

    :ivar nfe: evaluations of the vector field in the forward solve.
    :ivar accepted: accepted steps.
    :ivar rejected: rejected steps; 0 for methods of fixed step.
    :ivar nfe_backward: evaluations in the backward solve of the adjoint method, so far.
    """

    nfe: int = 0
    accepted: int = 0
    rejected: int = 0
    nfe_backward: int = 0


@dataclass(frozen=True)
class Solution:
    """
    The result of a solve.

    :ivar state: the state at the end time, a tensor or a tuple of tensors as the initial state was.
    :ivar stats: what it cost.
    """

    state: Any
    stats: SolverStats


@dataclass(frozen=True)
class Solver:
    r"""
    How to integrate :math:`dx/dt = f(t, x)`: a method of torchdiffeq and its settings.

    Adaptive methods ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun") choose their steps such that for every
    sample of the batch the root mean square of error / (atol + rtol \|x\|) stays below 1 in each part of the state (an
    average over the batch would let one hard sample drown among many easy ones), and end exactly at the end time.
    Methods of fixed step ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams") divide the
    interval into equal steps of at most options["step_size"], by default 10 of them. "scipy_solver" is
    :func:`scipy.integrate.solve_ivp`, which knows no gradients except with ``adjoint=True``.

    Gradients come by backpropagation through the solver's operations; or with ``adjoint=True`` by solving the adjoint
    equation backward, which needs no memory for intermediate states, but more evaluations, is accurate to solver
    tolerance only, and cannot be differentiated again. Both reach the initial state and ``field.tensors``.

    :param str method: a name in :data:`METHODS`.
    :param float rtol: relative tolerance of adaptive methods.
    :param float atol: absolute tolerance of adaptive methods.
    :param options: further options of the method, by name, as in torchdiffeq.
    :param bool adjoint: gradients by the adjoint method.
    :param int max_nfe: the number of evaluations, forward and again backward, beyond which a solve is given up.
    :raises ValueError: for unknown methods and options, and for tolerances that are not positive.

    References:

    [1] Ricky T. Q. Chen. torchdiffeq. https://github.com/rtqichen/torchdiffeq

    [2] Patrick Kidger, Ricky T. Q. Chen, Terry Lyons. "Hey, that's not an ODE": Faster ODE Adjoints via Seminorms.
    [arXiv:2009.09457]
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    adjoint: bool = False
    max_nfe: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, but got {self.method!r}")
        if unknown := set(self.options) - METHODS[self.method]:
            raise ValueError(
                f"options of method {self.method!r} are {sorted(METHODS[self.method])}, but got {sorted(unknown)}"
            )
        for name in ("rtol", "atol", "max_nfe"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, but got {value}")
        step_size = self.options.get("step_size", 1.0)
        if not step_size > 0:
            raise ValueError(f"options['step_size'] must be positive, but got {step_size}")

    @property
    def adaptive(self) -> bool:
        """Whether the method chooses its steps by itself."""
        return self.method in _ADAPTIVE

    def integrate(self, field: VectorField, state: AnyState, t0: float, t1: float) -> Solution:
        r"""
        Integrates from t0 to t1, which may be the earlier of the two.

        :param field: maps a scalar time and a state to the state's time derivative. For ``adjoint=True`` it has the
            attribute ``tensors``, all tensors that gradients must reach besides the state, or is a
            :class:`~torch.nn.Module`.
        :param state: a tensor with shape ``(*, d)``, or a tuple of tensors whose shapes begin with the same batch shape
            ``(*,)``, the first one having shape ``(*, d)``.
        :param float t0: the initial time.
        :param float t1: the end time.
        :returns: the state at t1 and statistics.
        :raises SolverError: on step underflow, non-finite values, a corrector that does not converge, or more than
            max_nfe evaluations.
        :raises RuntimeError: if an adaptive solve is traced: the trace would repeat the steps of this one input.
        """
        first = state if isinstance(state, Tensor) else state[0]
        stats = SolverStats()
        if first.numel() == 0 or t0 == t1:
            return Solution(state, stats)
        if torch.jit.is_tracing() and self.adaptive:
            raise RuntimeError(
                f"method {self.method!r} cannot be traced: its steps depend on the input, and a trace would repeat "
                "those of the example. Use a method of fixed step, for example Solver('rk4')."
            )
        tensors = self._check_gradients(field, state)
        monitor = _Monitor(field, self, stats, first.shape[:-1])
        times = first.new_tensor([t0, t1], dtype=first.dtype)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Functional iteration did not converge")
                result = self._odeint(monitor, state, times, tensors)
        except AssertionError as error:  # how torchdiffeq reports all that goes wrong in a solve
            raise monitor.failure(str(error)) from error
        except UserWarning as error:
            if "Functional iteration" not in str(error):
                raise
            raise monitor.failure(str(error)) from error
        end = result[-1] if isinstance(result, Tensor) else tuple(part[-1] for part in result)
        if not all(bool(torch.isfinite(part).all()) for part in _parts(end)):
            raise monitor.first_non_finite(state, times)
        monitor.forget()
        if self.adjoint:
            for part in _parts(end):
                if part.requires_grad:
                    part.register_hook(_refuse_second_derivative)
        return Solution(end, stats)

    def _odeint(self, monitor: _Monitor, state: State, times: Tensor, tensors: tuple[Tensor, ...]) -> Any:
        options = self._options(monitor.batch_shape, times)
        settings = {"rtol": self.rtol, "atol": self.atol, "method": self.method}
        if not self.adjoint:
            return torchdiffeq.odeint(monitor, state, times, **settings, options=options)
        adjoint_options = {name: value for name, value in options.items() if name != "norm"}
        if self.adaptive:
            adjoint_options["norm"] = "seminorm"
        return torchdiffeq.odeint_adjoint(
            monitor, state, times, **settings, options=options, adjoint_options=adjoint_options, adjoint_params=tensors
        )

    def _options(self, batch_shape: torch.Size, times: Tensor) -> dict[str, Any]:
        options = dict(self.options)
        if self.adaptive:
            options.setdefault("norm", _per_sample_norm(len(batch_shape)))
            # Without it torchdiffeq steps past the end and interpolates back, with an error that no tolerance controls.
            ends = [times] if "step_t" not in options else [times, torch.as_tensor(options["step_t"]).to(times)]
            options["step_t"] = torch.cat(ends).unique()
        elif self.method != "scipy_solver" and "grid_constructor" not in options:
            step_size = options.pop("step_size", None)
            options["grid_constructor"] = lambda func, y0, t: _equal_steps(t, step_size)
        return options

    def _check_gradients(self, field: VectorField, state: State) -> tuple[Tensor, ...]:
        tensors = getattr(field, "tensors", None)
        if tensors is None and isinstance(field, nn.Module):
            tensors = tuple(field.parameters())
        if tensors is None and self.adjoint:
            raise TypeError(
                "field needs an attribute tensors (all that gradients must reach; () for none) for adjoint=True"
            )
        tensors = tuple(tensor for tensor in tensors or () if tensor.requires_grad)
        if self.method == "scipy_solver" and not self.adjoint and torch.is_grad_enabled():
            if tensors or any(part.requires_grad for part in _parts(state)):
                raise ValueError(
                    "method 'scipy_solver' has no gradients of its own: use adjoint=True or torch.no_grad()"
                )
        return tensors


class _Monitor:
    """The vector field as torchdiffeq sees it: counts evaluations and steps, and remembers where the solve is."""

    def __init__(self, field: VectorField, solver: Solver, stats: SolverStats, batch_shape: torch.Size) -> None:
        self.field = field
        self.solver = solver
        self.stats = stats
        self.batch_shape = batch_shape
        self._last: tuple[Tensor, State] | None = None
        self._backward = False
        # Only the callbacks that the method knows, for torchdiffeq warns of the others.
        if solver.adaptive:
            self.callback_accept_step = self._accept
            self.callback_reject_step = self._reject
        elif solver.method != "scipy_solver":
            self.callback_step = self._accept

    def __call__(self, t: Tensor, state: Any) -> State:
        stats = self.stats
        if self._backward:
            stats.nfe_backward += 1
        else:
            stats.nfe += 1
        derivative = self.field(t, state)
        self._last = (t, derivative)
        if max(stats.nfe, stats.nfe_backward) > self.solver.max_nfe:
            raise self._error(
                f"solve needs more than max_nfe = {self.solver.max_nfe} evaluations",
                "The field may be stiff or diverging: raise rtol and atol, raise max_nfe, take a Solver of fixed step, "
                "or train with a lower learning rate or clipped gradients.",
            )
        return derivative

    def _accept(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.stats.accepted += 1

    def _reject(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.stats.rejected += 1

    def forget(self) -> None:
        """The forward solve is over: keeps no tensor alive, and counts what follows as backward."""
        self._last = None
        self._backward = True

    def failure(self, message: str) -> SolverError:
        """Translates a failure that torchdiffeq reports."""
        if "non-finite" in message or not self._is_finite():
            return self._error(
                "state became non-finite",
                "The field diverges or overflows: check the inputs, train with a lower learning rate or clipped "
                "gradients, or use float64.",
            )
        if "underflow" in message:
            return self._error(
                "step size underflowed",
                "The field has a singularity or is too stiff for this tolerance: raise rtol and atol (float32 resolves "
                "about 1e-6, use float64 below), or take a Solver of fixed step.",
            )
        if "max_num_steps" in message:
            return self._error("solve needs more than max_num_steps steps", "Raise max_num_steps, rtol or atol.")
        if "Functional iteration" in message:
            return self._error(
                "the corrector of implicit_adams did not converge",
                "Take smaller steps: lower options['step_size'], or raise options['max_iters'].",
            )
        return self._error(f"solve failed ({message})", "Check the times, options and tolerances of the Solver.")

    def first_non_finite(self, state: State, times: Tensor) -> SolverError:
        """Solves once more to find where a state first became non-finite; methods of fixed step do not look."""
        probe = _Probe(self)
        try:
            with torch.no_grad():
                torchdiffeq.odeint(
                    probe, state, times, rtol=self.solver.rtol, atol=self.solver.atol, method=self.solver.method,
                    options=self.solver._options(self.batch_shape, times),
                )  # fmt: skip
        except _Found:
            pass
        self._last = probe.last
        return self.failure("non-finite")

    def _is_finite(self) -> bool:
        return self._last is None or all(bool(torch.isfinite(part).all()) for part in _parts(self._last[1]))

    def _error(self, reason: str, advice: str) -> SolverError:
        if self._last is None:
            return SolverError(reason, advice, self.solver, math.nan, (), self.stats.nfe)
        t, derivative = self._last
        with torch.no_grad():
            parts = [part.detach().reshape(*self.batch_shape, -1) for part in _parts(derivative)]
            size = torch.cat(parts, dim=-1).abs().nan_to_num(nan=math.inf, posinf=math.inf).amax(-1)
        worst = int(size.argmax())
        sample = []
        for length in reversed(self.batch_shape):
            worst, index = divmod(worst, length)
            sample.append(index)
        nfe = self.stats.nfe + self.stats.nfe_backward
        return SolverError(reason, advice, self.solver, float(t), tuple(reversed(sample)), nfe)


class _Found(Exception):
    pass


class _Probe:
    """Stops at the first evaluation whose state or derivative is not finite."""

    def __init__(self, monitor: _Monitor) -> None:
        self._monitor = monitor
        self.last: tuple[Tensor, State] | None = None

    def __call__(self, t: Tensor, state: Any) -> State:
        derivative = self._monitor.field(t, state)
        self.last = (t, derivative)
        if not all(bool(torch.isfinite(part).all()) for part in (*_parts(state), *_parts(derivative))):
            raise _Found
        return derivative


def _parts(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def _refuse_second_derivative(gradient: Tensor) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "gradients of a solve with adjoint=True cannot be differentiated again (create_graph=True); "
            "use a Solver with adjoint=False"
        )


def _per_sample_norm(batch_dims: int) -> Callable[[State], Tensor]:
    def norm(state: State) -> Tensor:
        sizes = [
            part.abs() if part.dim() == batch_dims else part.flatten(batch_dims).pow(2).mean(-1).sqrt()
            for part in _parts(state)
        ]
        return torch.stack([size.max() for size in sizes]).max()

    return norm


def _equal_steps(t: Tensor, step_size: float | None) -> Tensor:
    length = float((t[-1] - t[0]).abs())
    steps = 10 if step_size is None else max(1, math.ceil(length / step_size * (1 - 1e-6)))
    grid = t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, steps + 1, dtype=t.dtype, device=t.device)
    return torch.cat([grid[:-1], t[-1:]])
