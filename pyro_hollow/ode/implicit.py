# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Implicit methods for stiff equations, whose equations :math:`y = c + \eta f(t, y)` are solved by a corrector of choice.

"jacobi-newton" divides by the diagonal :math:`1 - \eta D f(t, y)` alone, which a hollow network gives away with f; or
it solves with the diagonal blocks, where coordinates come in blocks. It converges where these dominate. Where its
measured rate says that it will not, dense Newton takes over, and the statistics tell how often. "newton" factorises the
dense Jacobian of each sample, by d backward passes, and keeps it as long as it serves; "fixed-point" needs neither, and
steps as small as those of an explicit method. Difference quotients replace a derivative that is not finite where the
field is, such as that of :math:`\sqrt{x^2}` at 0.

A solve is a search without gradients for steps and for the roots of their equations. Gradients come from a replay of
the accepted steps, in which every root is differentiated by the implicit function theorem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pyro_hollow.ops import (
    RootOptions,
    RootResult,
    attach,
    fill_by_differences,
    fixed_point,
    jacobi_newton,
    jacobian,
    newton,
)
from pyro_hollow.ops.stepper import largest_rms

from .implicit_methods import METHODS, Method
from .monitor import Monitor, State, are_finite, parts

__all__ = ["CORRECTORS", "check_options", "integrate", "names_of_options"]

#: With the number of iterations after which each gives up.
CORRECTORS = {"fixed-point": 10, "jacobi-newton": 10, "newton": 6}

_OPTIONS = frozenset({"corrector", "first_step", "max_iterations"})
#: The error of a root, in units of the tolerance of a step.
_ROOT_ERROR = 0.02
#: The slowest rate at which a corrector goes on.
_MAX_RATE = 0.9
#: For how many equations dense Newton stays when it has taken over.
_STAY = 20
#: Steps aim at this part of the length that would just do.
_SAFETY = 0.9


def names_of_options(method: str) -> frozenset[str]:
    """The options that a method knows."""
    return _OPTIONS | {"max_order"} if isinstance(METHODS[method], type) else _OPTIONS


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """
    :raises ValueError: for values that make no sense.
    """
    if (corrector := options.get("corrector", "newton")) not in CORRECTORS:
        raise ValueError(f"options['corrector'] must be one of {sorted(CORRECTORS)}, but got {corrector!r}")
    if not options.get("first_step", 1) > 0:
        raise ValueError(f"options['first_step'] must be positive, but got {options['first_step']}")
    iterations = options.get("max_iterations", 1)
    if not (isinstance(iterations, int) and iterations > 0):
        raise ValueError(f"options['max_iterations'] must be a positive whole number, but got {iterations!r}")
    _make_method(method, options)


def _make_method(name: str, options: Mapping[str, Any]) -> Method:
    return METHODS[name](**({"max_order": options["max_order"]} if "max_order" in options else {}))


class _Equation:
    """
    The right-hand side for states in one tensor with shape ``(*, n)``. Of the columns the first ones, the state proper,
    are found as roots; the others are integrals along it, for which the same formula is a sum.
    """

    def __init__(self, monitor: Monitor, state: State) -> None:
        self.monitor = monitor
        self._shapes = [part.shape for part in parts(state)]
        self._is_tuple = not isinstance(state, Tensor)
        self._batch = self._shapes[0][:-1]
        self.sizes = [shape[len(self._batch) :].numel() for shape in self._shapes]
        field = getattr(monitor.field, "state_field", None) if self._is_tuple else monitor.field
        #: How many columns are found as roots: all of them where no field is known to be free of the others.
        self.size = sum(self.sizes) if field is None else self.sizes[0]
        self._field = self._flat if field is None else field
        self._block = getattr(field, "block_dim", 1)
        self._with_diagonal = getattr(field, "with_blocks" if self._block > 1 else "with_diagonal", None)
        self.has_diagonal = self._with_diagonal is not None

    def pack(self, state: State) -> Tensor:
        rows = [part.reshape(*self._batch, size) for part, size in zip(parts(state), self.sizes, strict=True)]
        return torch.cat(rows, dim=-1)

    def unpack(self, y: Tensor) -> State:
        rows = y.split(self.sizes, dim=-1)
        state = tuple(row.reshape(shape) for row, shape in zip(rows, self._shapes, strict=True))
        return state if self._is_tuple else state[0]

    def _flat(self, t: Tensor, y: Tensor) -> Tensor:
        return self.pack(self.monitor.field(t, self.unpack(y)))

    def slope(self, t: float, y: Tensor) -> Tensor:
        """The time derivative of all columns."""
        return self.monitor.evaluate(self._flat, y.new_tensor(t), y)

    def field(self, t: float, x: Tensor) -> Tensor:
        """The time derivative of the columns that are found as roots."""
        return self.monitor.evaluate(self._field, x.new_tensor(t), x)

    def with_diagonal(self, t: float, coefficient: float, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the diagonal, or the diagonal blocks, of the Jacobian of ``x - coefficient * field(t, x)``."""
        self.monitor.stats.diagonals += 1
        f, diagonal = self.monitor.evaluate(cast(Any, self._with_diagonal), x.new_tensor(t), x)
        one = 1 if self._block == 1 else torch.eye(self._block, dtype=x.dtype, device=x.device)
        return f, one - coefficient * diagonal

    def complete(self, t: float, coefficient: float, constant: Tensor, x: Tensor) -> Tensor:
        """All columns, given the roots."""
        if x.shape == constant.shape:
            return x
        y = torch.cat([x, constant[..., self.size :]], dim=-1)
        integrals = constant + coefficient * self.slope(t, y)
        return torch.cat([x, integrals[..., self.size :]], dim=-1)

    def norm(self, y: Tensor) -> float:
        """The largest root mean square of a part of the state in any sample."""
        return float(largest_rms(y.split(self.sizes, dim=-1), -1))


class _NotConverged(Exception):
    """A corrector has failed. Its rate tells how much shorter the step must be."""

    def __init__(self, rate: float, reason: str | None = None) -> None:
        super().__init__()
        self.reason = reason or ("corrector" if rate < math.inf else "non-finite")
        self.shrink = min(0.5, max(0.1, 0.5 / rate)) if 0 < rate < math.inf else 0.25


class _Corrector:
    r"""Solves :math:`y = c + \eta f(t, y)`, and remembers what helps with the next one."""

    def __init__(self, equation: _Equation, options: Mapping[str, Any]) -> None:
        self._equation = equation
        self._monitor = equation.monitor
        self.kind = options.get("corrector", "jacobi-newton" if equation.has_diagonal else "newton")
        if self.kind == "jacobi-newton" and not equation.has_diagonal:
            raise TypeError(
                "corrector 'jacobi-newton' needs a field with a method with_diagonal(t, x) -> (dx, diagonal); give it "
                "one, or set options['corrector'] to 'newton' or 'fixed-point'"
            )
        self._iterations = options.get("max_iterations", CORRECTORS[self.kind])
        self._scale = torch.ones(())
        #: The rate of a fixed-point iteration over the coefficient, as far as known, and the latest coefficient.
        self._stiffness, self._latest = 0.0, 0.0
        #: By sample, how fast the latest iteration converged.
        self._rate: Tensor | float = 0.5
        self._stay = 0
        self._jacobian: Tensor | None = None
        #: The derivative, by its name among failures, that was not finite where the field was.
        self._spoilt: str | None = None
        self._factors: tuple[Tensor, Tensor] | None = None
        self._coefficient = math.nan

    def begin(self, scale: Tensor) -> None:
        """A step begins, whose errors are relative to the scale."""
        self._scale = scale[..., : self._equation.size]
        self._stiffness *= 0.9

    @property
    def longest(self) -> float:
        """Factor by which the next step may be longer: the rate of a fixed-point iteration is proportional to it."""
        return 0.5 / (self._stiffness * self._latest) if self._stiffness > 0 else math.inf

    def __call__(self, t: float, coefficient: float, constant: Tensor, guess: Tensor) -> Tensor:
        """The solution; see :data:`~pyro_hollow.ode.implicit_methods.Solve`."""
        equation = self._equation
        c, x = constant[..., : equation.size], guess[..., : equation.size]
        if self.kind == "fixed-point":
            result = fixed_point(lambda x: x - c - coefficient * equation.field(t, x), x, **self._options(x))
        elif self.kind == "newton" or self._stay:
            result = self._newton(t, coefficient, c, x)
        else:
            result = self._jacobi_newton(t, coefficient, c, x)
        self._rate = torch.where(result.iterations > 1, result.rate, self._rate).clamp(0.1, _MAX_RATE)
        if self.kind == "fixed-point":
            rate, self._latest = float(result.rate.max()), abs(coefficient)
            self._stiffness = max(self._stiffness, rate / self._latest if math.isfinite(rate) else 0.0)
        if not bool(result.converged.all()):
            finite = self._monitor.is_finite()
            raise _NotConverged(float(result.rate[~result.converged].max()), self._spoilt if finite else None)
        return equation.complete(t, coefficient, constant, result.value)

    def _options(self, x: Tensor) -> RootOptions:
        finest = 10 * torch.finfo(x.dtype).eps / self._monitor.solver.rtol
        return {
            "tolerance": min(0.5, max(_ROOT_ERROR, finest)),
            "scale": self._scale,
            "max_iterations": self._iterations,
            "max_rate": _MAX_RATE,
            "first_rate": self._rate,
            "throw": False,
        }

    def _jacobi_newton(self, t: float, coefficient: float, c: Tensor, x: Tensor) -> RootResult:
        f = diagonal = x
        self._spoilt = None

        def residual(x: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal f, diagonal
            f, diagonal = self._equation.with_diagonal(t, coefficient, x)
            return x - c - coefficient * f, diagonal

        result = jacobi_newton(residual, x, **self._options(x))
        if bool(result.converged.all()):
            return result
        if are_finite(f) and not are_finite(diagonal):
            self._spoilt = "diagonal"
        self._stay, self._rate = _STAY, 0.5
        return self._newton(t, coefficient, c, torch.where(result.converged.unsqueeze(-1), result.value, x))

    def _newton(self, t: float, coefficient: float, c: Tensor, x: Tensor) -> RootResult:
        if self.kind == "jacobi-newton":
            self._stay -= 1
            self._monitor.stats.fallbacks += 1
        while True:
            fresh = self._jacobian is None
            if self._jacobian is None:
                self._jacobian, self._factors = self._fresh_jacobian(t, x), None
            if self._factors is None or coefficient != self._coefficient:
                matrix = torch.diag_embed(torch.ones_like(x)) - coefficient * self._jacobian
                factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
                self._factors, self._coefficient = (factors, pivots), coefficient
            factors, pivots = self._factors
            options = self._options(x)
            options["first_rate"] = 1.0  # an old Jacobian can make any update small: two of them have to tell the rate
            result = newton(
                lambda x: x - c - coefficient * self._equation.field(t, x),
                x,
                inverse=lambda f: torch.linalg.lu_solve(factors, pivots, f.unsqueeze(-1)).squeeze(-1),  # noqa: B023
                **options,
            )
            if fresh or bool(result.converged.all()):
                return result
            self._jacobian = None

    def _fresh_jacobian(self, t: float, x: Tensor) -> Tensor:
        f = x

        def field(x: Tensor) -> Tensor:
            nonlocal f
            f = self._equation.field(t, x)
            return f

        self._monitor.stats.jacobians += 1
        matrix = jacobian(field, x)
        if are_finite(matrix):
            self._spoilt = None if self._spoilt == "jacobian" else self._spoilt
        elif are_finite(f):
            self._spoilt = self._spoilt or "jacobian"
            self._monitor.stats.difference_jacobians += 1
            # States that differ by less than atol are the same.
            matrix = fill_by_differences(matrix, field, x, f.detach(), self._monitor.solver.atol)
        return matrix


@dataclass(frozen=True)
class _Step:
    """
    An accepted step.

    :ivar t: where it begins.
    :ivar h: its length, negative if backward.
    :ivar order: of its formula.
    :ivar factor: by what the history was stretched before it.
    :ivar history: the history before it and before it was stretched.
    :ivar roots: the solutions of its equations.
    """

    t: float
    h: float
    order: int
    factor: float
    history: Tensor
    roots: list[Tensor]


@dataclass(frozen=True)
class _Outcome:
    """
    Outcome of a tried step.

    :ivar history: after the step; None if it was rejected.
    :ivar order: what the next order should be.
    :ivar change: by what the next step should be longer.
    :ivar reason: the failure to report if this goes on.
    """

    history: Tensor | None
    order: int
    change: float
    reason: str = "underflow"


class _Search:
    """Finds the steps of one solve."""

    def __init__(self, method: Method, equation: _Equation, corrector: _Corrector, keep: bool) -> None:
        self._method, self._equation, self._corrector = method, equation, corrector
        self._monitor = equation.monitor
        self._keep = keep
        self.steps: list[_Step] = []

    def run(self, y: Tensor, slope: Tensor, t0: float, t1: float) -> Tensor:
        """The state at t1; the steps are kept if wanted."""
        self._check_tolerances(y)
        h = self._first_step(y, slope, t0, t1)
        history, order, t = self._method.begin(y, h * slope), self._method.first_order, t0
        factor, equal, failures, finest = 1.0, 0, 0, 4 * torch.finfo(y.dtype).eps
        while t != t1:
            if abs(t1 - t) <= abs(h) * (1 + 1e-6) and h != t1 - t:
                h, factor, equal = t1 - t, factor * (t1 - t) / h, 0
            step = _Step(t, h, order, factor, history, [])
            outcome = self._try(step)
            if outcome.history is None:
                self._monitor.stats.rejected += 1
                failures += 1
                # A history that cannot be trusted any longer is cut short.
                order = self._method.first_order if failures >= 3 else order
                h, factor, equal = h * outcome.change, factor * outcome.change, 0
                if abs(h) <= finest * max(abs(t), finest * abs(t1 - t0)):
                    raise self._monitor.failure(outcome.reason)
                continue
            self._monitor.stats.accepted += 1
            self.steps += [step] if self._keep else []
            history, t = outcome.history, t1 if h == t1 - t else t + h
            factor, equal, failures = 1.0, equal + 1, 0
            if equal >= self._method.equal_steps(order):
                order = outcome.order
                if outcome.change != 1:
                    h, factor, equal = h * outcome.change, outcome.change, 0
        return history[0]

    def _try(self, step: _Step) -> _Outcome:
        solver, corrector, start = self._monitor.solver, self._corrector, step.history[0]
        corrector.begin(solver.atol + solver.rtol * start.abs())

        def solve(*arguments: Any) -> Tensor:
            step.roots.append(corrector(*arguments))
            return step.roots[-1]

        history = self._method.rescale(step.history, step.order, step.factor)
        try:
            history, errors = self._method.step(solve, step.t, step.h, history, step.order)
        except _NotConverged as failure:
            return _Outcome(None, step.order, failure.shrink, failure.reason)
        scale = solver.atol + solver.rtol * torch.maximum(start.abs(), history[0].abs())
        changes = {k: _change(self._equation.norm(error / scale), k) for k, error in errors.items()}
        if not changes[step.order] >= _SAFETY:
            finite = changes[step.order] > 0
            return _Outcome(None, step.order, max(0.2, changes[step.order]), "underflow" if finite else "non-finite")
        order = max(changes, key=changes.__getitem__)
        change = min(10.0, changes[order], corrector.longest)
        # Small changes are not worth a new factorisation, nor a history of unequal steps.
        return _Outcome(history, order, change if not 0.95 < change < 1.2 else 1.0)

    def _check_tolerances(self, y: Tensor) -> None:
        solver = self._monitor.solver
        if bool((solver.atol + solver.rtol * y.abs() < 4 * torch.finfo(y.dtype).eps * y.abs()).any()):
            raise self._monitor.failure("tolerance")

    def _first_step(self, y: Tensor, slope: Tensor, t0: float, t1: float) -> float:
        """First step by the size of the first two derivatives, as in Hairer, Nørsett and Wanner, section II.4."""
        solver, norm = self._monitor.solver, self._equation.norm
        length = abs(t1 - t0)
        if "first_step" in solver.options:
            return math.copysign(min(length, solver.options["first_step"]), t1 - t0)
        scale = solver.atol + solver.rtol * y.abs()
        size, first = norm(y / scale), norm(slope / scale)
        if not math.isfinite(first):
            raise self._monitor.failure("non-finite")
        h = min(length, 1e-6 if min(size, first) < 1e-5 else 0.01 * size / first)
        h = max(h, 16 * torch.finfo(y.dtype).eps * length)
        signed = math.copysign(h, t1 - t0)
        second = norm((self._equation.slope(t0 + signed, y + signed * slope) - slope) / scale) / h
        steepest = max(first, second)
        best = max(1e-6, h * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1 / (self._method.first_order + 1))
        return math.copysign(min(length, 100 * h, best if math.isfinite(best) and best > 0 else h), t1 - t0)


def _change(error: float, order: int) -> float:
    """Factor by which a step may be longer for an error of 1; below the safety factor if the error was larger."""
    if not math.isfinite(error):
        return 0.0
    return _SAFETY * max(error, 1e-10) ** (-1 / (order + 1))


@dataclass(frozen=True)
class _Replay:
    """Repeats the steps of a solve with gradients."""

    method: Method
    equation: _Equation
    kind: str
    steps: list[_Step]

    def begin(self, y: Tensor, slope: Tensor) -> Tensor:
        """The history of the first step."""
        first = self.steps[0]
        return self.method.begin(y, first.h / first.factor * slope)

    def step(self, step: _Step, history: Tensor) -> Tensor:
        """The history after a step."""
        roots = iter(step.roots)

        def solve(t: float, coefficient: float, constant: Tensor, guess: Tensor) -> Tensor:
            return self._attach(t, coefficient, constant, next(roots))

        history = self.method.rescale(history, step.order, step.factor)
        return self.method.step(solve, step.t, step.h, history, step.order)[0]

    def check(self, t: float, bar: Tensor) -> None:
        """
        :param float t: when the history or state was.
        :param Tensor bar: its gradient, with shape ``(*, n)`` or ``(k, *, n)``.
        :raises SolverError: if it is not finite.
        """
        if not are_finite(bar):
            monitor = self.equation.monitor
            rows = bar if bar.dim() == len(monitor.batch_shape) + 1 else bar.movedim(0, -2)
            raise monitor.failure("gradient", (bar.new_tensor(t), rows))

    def _attach(self, t: float, coefficient: float, constant: Tensor, root: Tensor) -> Tensor:
        equation, x = self.equation, root[..., : self.equation.size]

        def function(x: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.kind == "jacobi-newton":
                f, diagonal = equation.with_diagonal(t, coefficient, x)
                return x - coefficient * f, diagonal
            return x - coefficient * equation.field(t, x), torch.ones_like(x) if self.kind == "fixed-point" else None

        residual = x - constant[..., : equation.size] - coefficient * equation.field(t, x)
        return equation.complete(t, coefficient, constant, attach(residual, x, function))


class _Adjoint(torch.autograd.Function):
    """The end of a solve, whose steps are replayed one at a time when gradients are wanted."""

    @staticmethod
    def forward(ctx: Any, replay: _Replay, end: Tensor, t0: float, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.replay, ctx.t0 = replay, t0
        ctx.save_for_backward(y, *tensors)
        return end.clone()

    @staticmethod
    def backward(ctx: Any, end_bar: Tensor) -> tuple[Tensor | None, ...]:
        replay: _Replay = ctx.replay
        y, *tensors = ctx.saved_tensors
        totals = [torch.zeros_like(tensor) for tensor in tensors]

        def vjp(out: Tensor, start: Tensor, bar: Tensor) -> Tensor:
            start_bar, *others = torch.autograd.grad(
                out, (start, *tensors), bar, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for total, other in zip(totals, others, strict=True):
                total += other
            return start_bar

        is_finite = are_finite(end_bar)
        bar = torch.zeros_like(replay.steps[0].history)
        bar[0] = end_bar
        for step in reversed(replay.steps):
            with torch.enable_grad():
                history = step.history.detach().requires_grad_()
                out = replay.step(step, history)
            bar = vjp(out, history, bar)
            if is_finite:
                replay.check(step.t, bar)
        with torch.enable_grad():
            start = y.detach().requires_grad_()
            out = replay.begin(start, replay.equation.slope(ctx.t0, start))
        bar = vjp(out, start, bar)
        if is_finite:
            replay.check(ctx.t0, bar)
        return None, None, None, bar, *totals


def _backpropagate(replay: _Replay, t0: float, y: Tensor, slope: Tensor) -> Tensor:
    """The end of a solve with gradients by backpropagation, which are checked where the steps begin."""
    is_finite = True

    def begin(bar: Tensor) -> None:
        nonlocal is_finite
        is_finite = are_finite(bar)

    def watch(t: float, tensor: Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda bar: replay.check(t, bar) if is_finite and bar is not None else None)

    watch(t0, y)
    history = replay.begin(y, slope)
    for step in replay.steps:
        watch(step.t, history)
        history = replay.step(step, history)
    end = history[0]
    if end.requires_grad:
        end.register_hook(lambda bar: None if bar is None else begin(bar))
    return end


def integrate(monitor: Monitor, state: State, t0: float, t1: float, tensors: tuple[Tensor, ...]) -> State:
    """
    Integrates from t0 to t1.

    :param monitor: the field, and the solver with its method, tolerances and options.
    :param state: the initial state, of at least one sample.
    :param float t0: the initial time.
    :param float t1: the end time, another one.
    :param tensors: what the adjoint method's gradients must reach besides the state.
    :returns: the state at t1.
    :raises SolverError: if the end cannot be reached.
    :raises TypeError: for the corrector "jacobi-newton" if the field offers no diagonal.
    """
    solver = monitor.solver
    equation = _Equation(monitor, state)
    method, corrector = _make_method(solver.method, solver.options), _Corrector(equation, solver.options)
    y = equation.pack(state)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not solver.adjoint):
        slope = equation.slope(t0, y)
    # Without the adjoint method what matters to gradients may first be met halfway.
    wanted = not solver.adjoint or any(part.requires_grad for part in (y, slope, *tensors))
    differentiate = torch.is_grad_enabled() and wanted
    search = _Search(method, equation, corrector, differentiate)
    with torch.no_grad():
        end = search.run(y.detach(), slope.detach(), t0, t1)
    replay = _Replay(method, equation, corrector.kind, search.steps)
    if not differentiate:
        return equation.unpack(end)
    if solver.adjoint:
        return equation.unpack(cast(Tensor, _Adjoint.apply(replay, end, t0, y, *tensors)))
    return equation.unpack(_backpropagate(replay, t0, y, slope))
