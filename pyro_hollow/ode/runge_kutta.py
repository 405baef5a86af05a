# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Explicit Runge-Kutta methods whose backward pass is written by hand.

torchdiffeq solves, and automatic differentiation records, one small operation at a time. A field that can record an
evaluation and pull gradients back through it (a :class:`Taped` field) needs neither: the solve becomes one node of the
graph, with exact gradients of the steps that it took.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeGuard, cast

import torch
from torch import Tensor

__all__ = [
    "TABLEAUS",
    "Path",
    "AutogradTape",
    "OutOfReach",
    "Tableau",
    "Tape",
    "Taped",
    "adaptive",
    "fixed",
    "is_batched",
    "is_functional",
    "is_transformed",
    "solve",
]


@dataclass(frozen=True)
class Tableau:
    """
    The coefficients of an explicit Runge-Kutta method.

    :ivar a: for each stage the weights of the slopes of the stages before it.
    :ivar b: the weights of the slopes in the step.
    :ivar c: for each stage its time within the step.
    :ivar error: the weights of the slopes, and of the slope at the end of the step, in the estimate of the step's
        error; empty for a method of fixed step.
    :ivar order: the order of the method.
    :raises ValueError: for coefficients of an inconsistent method.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] = ()
    order: int = 0

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.a]
        if rows != list(range(len(self.b))) or len(self.c) != len(self.b):
            raise ValueError(f"stage i of a tableau must have i weights, but got {rows} for {len(self.b)} stages")
        if (
            any(abs(sum(row) - c) > 1e-12 for row, c in zip(self.a, self.c, strict=True))
            or abs(sum(self.b) - 1) > 1e-12
        ):
            raise ValueError("each row of a must sum to its c, and b to 1")
        if self.error and (len(self.error) != len(self.b) + 1 or abs(sum(self.error)) > 1e-12):
            raise ValueError("error must have one weight more than b, and they must sum to 0")


#: The methods of torchdiffeq of the same names ("rk4" is the 3/8 rule).
TABLEAUS = {
    "euler": Tableau(((),), (1.0,), (0.0,)),
    "midpoint": Tableau(((), (1 / 2,)), (0.0, 1.0), (0.0, 1 / 2)),
    "heun2": Tableau(((), (1.0,)), (1 / 2, 1 / 2), (0.0, 1.0)),
    "heun3": Tableau(((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), (0.0, 1 / 3, 2 / 3)),
    "rk4": Tableau(
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), (0.0, 1 / 3, 2 / 3, 1.0)
    ),
    "bosh3": Tableau(
        ((), (1 / 2,), (0.0, 3 / 4)),
        (2 / 9, 1 / 3, 4 / 9),
        (0.0, 1 / 2, 3 / 4),
        (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
        3,
    ),
    "dopri5": Tableau(
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        # Shampine's, two thirds of the difference to the embedded method of order 4.
        tuple(2 / 3 * e for e in (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)),
        5,
    ),
}


class Tape(Protocol):
    r"""
    Evaluates :math:`(f, q)(t, x)`, where q is to be integrated along the solution, and pulls gradients back.

    Inside a solve the state has whatever shape suits the field; ``pack`` and ``unpack`` translate.
    """

    def pack(self, x: Tensor) -> Tensor:
        """A state of shape ``(*, d)`` as the tape wants it."""

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`pack`."""

    def record(self, t: float, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """f, q, of shape ``(batch,)``, and what :meth:`pull` will need."""

    def pull(
        self, t: float, saved: tuple[Tensor, ...], f_bar: Tensor, q_bar: Tensor, accumulate: bool = True
    ) -> Tensor:
        """The gradient of the state from those of f and q; if accumulate, :meth:`gradients` gets its share."""

    def gradients(self) -> tuple[Tensor, ...]:
        """The gradients of ``field.tensors`` from all calls of :meth:`pull`."""


Slope = tuple[Tensor, Tensor]


class StepTape(Tape, Protocol):
    """A tape that takes whole steps at once; of these it keeps the states of their stages alone."""

    takes_steps: bool

    def step(
        self,
        tableau: Tableau,
        t: float,
        h: float,
        x: Tensor,
        integral: Tensor,
        first: Slope | None,
        tolerances: tuple[float, float] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Slope, Slope, float]:
        """
        State and integral at the end, the states of the stages, f and q at the beginning (which may be known) and, for
        given tolerances, at the end, and the square of the error's ratio to these.
        """

    def back(self, tableau: Tableau, t: float, h: float, states: Tensor, x_bar: Tensor, integral_bar: Tensor) -> Tensor:
        """The gradient of the state at the beginning of a step."""

    def carry(self, tableau: Tableau, t: float, h: float, states: Tensor, score: Tensor) -> Tensor:
        """The score at the end of a step."""


def _takes_steps(tape: Tape) -> TypeGuard[StepTape]:
    return getattr(tape, "takes_steps", False)


class Taped(Protocol):
    """A field of pairs (state, integral) that may have a tape."""

    tensors: tuple[Tensor, ...]

    def tape(self, batch_shape: torch.Size, compile: bool = False) -> Tape | None:
        """A tape for states of this batch shape, compiled where possible if told to; None if it has none for any."""


@dataclass
class Path:
    """
    A solve, with what it takes to go back.

    :ivar x: the state at the end, packed.
    :ivar integral: the integral of q, with shape ``(batch,)``.
    :ivar times: where the accepted steps begin, and the end.
    :ivar records: what the tape saved in each stage of each accepted step; the states of the stages of each accepted
        step if it is a :class:`StepTape`.
    :ivar nfe: evaluations.
    :ivar rejected: rejected steps.
    :ivar compiled: whether the tape took whole steps in compiled code.
    :ivar reason: what kept the tape from being compiled.
    """

    x: Tensor
    integral: Tensor
    times: list[float]
    records: list[tuple[Tensor, ...]] = field(default_factory=list)
    nfe: int = 0
    rejected: int = 0
    compiled: bool = False
    reason: str = ""


def _start(tape: Tape, x: Tensor, times: list[float]) -> Path:
    return Path(x, x.new_zeros(x.shape[1:]), times, compiled=_takes_steps(tape), reason=getattr(tape, "reason", ""))


Record = tuple[Tensor, Tensor, tuple[Tensor, ...]]
#: Solves from a packed state; keeps what it takes to go back if told to.
March = Callable[[Tape, Tensor, bool], Path]


class OutOfReach(ArithmeticError):
    """An adaptive solve that does not come to its end."""


def is_transformed() -> bool:
    """True if operations are traced, or differentiated by other means than a backward pass."""
    return torch.jit.is_tracing() or is_functional()


def is_functional() -> bool:
    """True if a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """True if vmap has hidden a dimension of a tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


class AutogradTape:
    """
    Evaluates the dynamics of a pair (state, integral) by operations that automatic differentiation records, and that
    every transform of torch.func knows; the gradients are left to these.

    :param dynamics: maps a scalar time and the pair to its time derivative.
    :param batch_shape: the batch shape ``(*,)`` of the states.
    """

    def __init__(self, dynamics: Callable[[Tensor, Any], Any], batch_shape: torch.Size) -> None:
        self._dynamics = dynamics
        self._batch_shape = batch_shape

    def pack(self, x: Tensor) -> Tensor:
        """``(*, d)`` to ``(d, batch)``."""
        return x.reshape(-1, x.shape[-1]).mT

    def unpack(self, x: Tensor) -> Tensor:
        """``(d, batch)`` to ``(*, d)``."""
        return x.mT.reshape(*self._batch_shape, x.shape[0])

    def record(self, t: float, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """f and the integrand, with shapes ``(d, batch)`` and ``(batch,)``; nothing is saved."""
        state = self.unpack(x)
        time = torch.tensor(t, dtype=x.dtype, device=x.device)
        f, q = self._dynamics(time, (state, state.new_zeros(self._batch_shape)))
        if f.shape != state.shape or q.shape != self._batch_shape:  # which would broadcast
            raise ValueError(
                f"field must return shapes {tuple(state.shape)} and {tuple(self._batch_shape)} for value and "
                f"divergence, but returned {tuple(f.shape)} and {tuple(q.shape)}"
            )
        return self.pack(f), q.reshape(-1), ()

    def pull(
        self, t: float, saved: tuple[Tensor, ...], f_bar: Tensor, q_bar: Tensor, accumulate: bool = True
    ) -> Tensor:
        """:raises RuntimeError: always, as automatic differentiation takes the gradients."""
        raise RuntimeError("nothing was kept to go back by: automatic differentiation takes the gradients")

    def gradients(self) -> tuple[Tensor, ...]:
        """Nothing, as automatic differentiation takes the gradients."""
        return ()


def fixed(tableau: Tableau, times: Sequence[float]) -> March:
    """Steps along a grid of times."""

    def march(tape: Tape, x: Tensor, keep: bool) -> Path:
        path = _start(tape, x, list(times))
        for t, end in zip(times[:-1], times[1:], strict=True):
            step = _take(tape, tableau, t, end, path, None, None)
            path.x, path.integral = step.x, step.integral
            path.records += step.records if keep else ()
            path.nfe += len(tableau.b)
        return path

    return march


def adaptive(
    tableau: Tableau, t0: float, t1: float, rtol: float, atol: float, max_nfe: int, trust: float = 1.0
) -> March:
    """
    Steps chosen such that for every sample the root mean square of error / (atol + rtol \\|x\\|) stays below 1, and the
    same of the integral. The first step tries the whole interval, which a smooth field often allows; later ones divide
    what is left of it evenly. The first try passes up to a ratio of trust: an estimate of the error over the whole
    interval can be small by chance.

    The march raises :class:`OutOfReach` if the end is.
    """

    def march(tape: Tape, x: Tensor, keep: bool) -> Path:
        path, steps = _start(tape, x, [t0]), 1
        path.nfe = 1
        known = None  # of the field at the beginning of the next step
        smallest = torch.finfo(x.dtype).eps * max(abs(t0), abs(t1))
        while path.times[-1] != t1:
            t = path.times[-1]
            end = t1 if steps == 1 else t + (t1 - t) / steps
            if path.nfe + len(tableau.b) > max_nfe or abs(end - t) < smallest:
                raise OutOfReach(f"the end is out of reach from t = {t}")
            step = _take(tape, tableau, t, end, path, known, (rtol, atol))
            path.nfe += len(tableau.b)
            accepted = step.ratio <= (trust if end - t == t1 - t0 else 1)
            if accepted:
                path.x, path.integral, known = step.x, step.integral, step.last
                path.times.append(end)
                path.records += step.records if keep else ()
            elif bool(step.first[0].isfinite().all()):
                path.rejected += 1
                known = step.first
            else:
                raise OutOfReach(f"the field is not finite at t = {t}")
            # Bolder than by the book (0.9 and the order): far from the tolerance errors fall more slowly than by the
            # order, and in the flows of guides a few more rejected steps cost less than more steps to go back through.
            # A state that is not finite has no ratio.
            factor = 0.95 * max(step.ratio, 1e-10) ** (-1 / (tableau.order - 0.5)) if step.ratio < math.inf else 0.0
            longest = (end - t) * min(10.0, max(0.2, factor))
            steps = max(1 if accepted else 2, math.ceil((t1 - path.times[-1]) / longest - 1e-6))
        return path

    return march


class _Step(NamedTuple):
    x: Tensor
    integral: Tensor
    records: list[tuple[Tensor, ...]]
    first: Any
    last: Any
    ratio: float


def _take(
    tape: Tape, tableau: Tableau, t: float, end: float, path: Path, known: Any, tolerances: tuple[float, float] | None
) -> _Step:
    """A step from where a path has come to; with tolerances, also the evaluation at its end and the error's ratio."""
    h = end - t
    if _takes_steps(tape):
        x, integral, states, begin, after, square = tape.step(tableau, t, h, path.x, path.integral, known, tolerances)
        return _Step(x, integral, [(states,)], begin, after, math.sqrt(square))
    records = _stages(tape, tableau, t, h, path.x, [] if known is None else [known])
    slopes, integrands, saved = zip(*records, strict=True)
    x, integral = _step(path.x, h, tableau.b, slopes), _step(path.integral, h, tableau.b, integrands)
    if tolerances is None:
        return _Step(x, integral, list(saved), records[0], None, 0.0)
    last = tape.record(end, x)
    with torch.no_grad():
        error = torch.maximum(
            _error(tableau, h, path.x, x, (*slopes, last[0]), *tolerances).mean(0).max(),
            _error(tableau, h, path.integral, integral, (*integrands, last[1]), *tolerances).max(),
        )
    return _Step(x, integral, list(saved), records[0], last, math.sqrt(float(error.detach())))


def _stages(tape: Tape, tableau: Tableau, t: float, h: float, x: Tensor, known: list[Record]) -> list[Record]:
    """Records of the stages of a step, of which the first ones may be known."""
    records = known
    for row, c in zip(tableau.a[len(known) :], tableau.c[len(known) :], strict=True):
        records = [*records, tape.record(t + c * h, _step(x, h, row, [slope for slope, *_ in records]))]
    return records


def _error(
    tableau: Tableau, h: float, start: Tensor, end: Tensor, slopes: Sequence[Tensor], rtol: float, atol: float
) -> Tensor:
    """The squares of the errors of a step, relative to the tolerance."""
    error = _step(slopes[-1] * (h * tableau.error[-1]), h, tableau.error[:-1], slopes[:-1])
    return error.div_(torch.maximum(start.abs(), end.abs()).mul_(rtol).add_(atol)).square_()


def _step(x: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """``x + h * sum(weights * slopes)`` in a new tensor, or x itself where there is nothing to add."""
    total = x
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total = torch.add(x, slope, alpha=h * weight) if total is x else total.add_(slope, alpha=h * weight)
    return total


def solve(
    field: Taped,
    generic: Callable[[Tensor], tuple[Tensor, ...]],
    tableau: Tableau,
    march: March,
    x: Tensor,
    score: Tensor | None = None,
    compile: bool = False,
) -> tuple[tuple[Tensor, ...], Path] | None:
    """
    Solves, with gradients.

    :param field: the field.
    :param generic: the same solve for automatic differentiation, which second derivatives fall back on.
    :param tableau: the method.
    :param march: its steps, :func:`fixed` or :func:`adaptive`.
    :param Tensor x: the initial state with shape ``(*, d)``.
    :param Tensor score: where q is the divergence of f, the gradient of a log-density at x, to be carried along.
    :param bool compile: whether to take a compiled tape where there is one.
    :returns: the state at the end, the integral of q and, without gradients, the score if one was given, with shapes
        ``(*, d)``, ``(*,)`` and ``(*, d)``; and how it went. None if the field has no tape.
    :raises OutOfReach: if the end is.
    """
    tape = _make_tape(field, x, compile)
    if tape is None:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *field.tensors)):
        paths: list[Path] = []
        return _Solve.apply(field, generic, tape, tableau, march, paths, score, x, *field.tensors), paths[0]
    path = march(tape, tape.pack(x), score is not None)
    return _finish(tape, tableau, path, x, score), path


def _make_tape(field: Taped, x: Tensor, compile: bool) -> Tape | None:
    return field.tape(x.shape[:-1], compile) if compile else field.tape(x.shape[:-1])


def _finish(tape: Tape, tableau: Tableau, path: Path, x: Tensor, score: Tensor | None) -> tuple[Tensor, ...]:
    ends = [path.x] if score is None else [path.x, _carry(tape, tableau, path, tape.pack(score))]
    end, *scores = (tape.unpack(part).clone(memory_format=torch.contiguous_format) for part in ends)
    return end, path.integral.view(x.shape[:-1]), *scores


def _carry(tape: Tape, tableau: Tableau, path: Path, score: Tensor) -> Tensor:
    r"""The score at the end: it obeys :math:`ds/dt = -(\partial f / \partial x)^T s - \nabla (\nabla \cdot f)`."""
    records = iter(path.records)
    one = score.new_ones(score.shape[1])
    for t, end in zip(path.times[:-1], path.times[1:], strict=True):
        if _takes_steps(tape):
            (states,) = next(records)
            score = tape.carry(tableau, t, end - t, states, score)
            continue
        slopes: list[Tensor] = []
        for row, c in zip(tableau.a, tableau.c, strict=True):
            stage = _step(score, end - t, row, slopes)
            slopes.append(tape.pull(t + c * (end - t), next(records), stage, one, accumulate=False).neg_())
        score = _step(score, end - t, tableau.b, slopes)
    return score


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        field: Taped,
        generic: Callable[[Tensor], tuple[Tensor, ...]],
        tape: Tape,
        tableau: Tableau,
        march: March,
        paths: list[Path],
        score: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        path = march(tape, tape.pack(x), True)
        result = _finish(tape, tableau, path, x, score)
        ctx.mark_non_differentiable(*result[2:])
        ctx.field, ctx.generic, ctx.tableau, ctx.times = field, generic, tableau, path.times
        ctx.compile = _takes_steps(tape)
        ctx.size = len(path.records[0])
        ctx.save_for_backward(x, *tensors, *chain.from_iterable(path.records))
        path.records = []
        paths.append(path)
        return result

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor, integral_bar: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.field.tensors)
        tensors, saved = saved[:count], saved[count:]
        nothing = [None] * 7
        create_graph = torch.is_grad_enabled()
        if (
            create_graph
            or is_transformed()
            or any(map(torch._C._functorch.is_legacy_batchedtensor, (x_bar, integral_bar)))
        ):
            wanted = [v for v in (x, *tensors) if v.requires_grad]
            with torch.enable_grad():
                end = ctx.generic(x)
            gradients = iter(
                torch.autograd.grad(
                    end,
                    wanted,
                    (x_bar, integral_bar),
                    retain_graph=True,  # of what was bound before the solve
                    create_graph=create_graph,
                    materialize_grads=True,
                )
            )
            return *nothing, *(next(gradients) if v.requires_grad else None for v in (x, *tensors))
        tape = cast(Tape, _make_tape(ctx.field, x, ctx.compile))  # a fresh one, as another backward pass may follow
        records = [tuple(saved[i : i + ctx.size]) for i in range(0, len(saved), ctx.size)]
        start_bar = _backward(tape, ctx.tableau, ctx.times, tape.pack(x_bar), integral_bar.reshape(-1), records)
        return *nothing, tape.unpack(start_bar), *tape.gradients()


def _backward(
    tape: Tape,
    tableau: Tableau,
    times: Sequence[float],
    x_bar: Tensor,
    integral_bar: Tensor,
    records: list[tuple[Tensor, ...]],
) -> Tensor:
    """The gradient of the initial state."""
    stages = range(len(tableau.b))
    for start, end in zip(times[-2::-1], times[:0:-1], strict=True):
        h = end - start
        if _takes_steps(tape):
            (states,) = records.pop()
            x_bar = tape.back(tableau, start, h, states, x_bar, integral_bar)
            continue
        # The gradients of the states at which the stages are evaluated, latest first.
        states_bar: list[Tensor] = []
        total = x_bar
        for i in reversed(stages):
            later = [tableau.a[j][i] for j in reversed(stages[i + 1 :])]
            slope_bar = _step(x_bar * (h * tableau.b[i]), h, later, states_bar)
            t = start + tableau.c[i] * h
            states_bar.append(tape.pull(t, records.pop(), slope_bar, integral_bar * (h * tableau.b[i])))
            total = total + states_bar[-1]
        x_bar = total
    return x_bar
