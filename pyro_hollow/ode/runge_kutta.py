# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Explicit Runge-Kutta methods of fixed step whose backward pass is written by hand.

torchdiffeq solves, and automatic differentiation records, one small operation at a time. A field that can record an
evaluation and pull gradients back through it (a :class:`Taped` field) needs neither: the solve becomes one node of the
graph, with the same values and the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["TABLEAUS", "Tableau", "Tape", "Taped", "solve"]


@dataclass(frozen=True)
class Tableau:
    """
    The coefficients of an explicit Runge-Kutta method.

    :ivar a: for each stage the weights of the slopes of the stages before it.
    :ivar b: the weights of the slopes in the step.
    :ivar c: for each stage its time within the step.
    :raises ValueError: for coefficients of an inconsistent method.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.a]
        if rows != list(range(len(self.b))) or len(self.c) != len(self.b):
            raise ValueError(f"stage i of a tableau must have i weights, but got {rows} for {len(self.b)} stages")
        if any(abs(sum(row) - c) > 1e-12 for row, c in zip(self.a, self.c, strict=True)) or abs(sum(self.b) - 1) > 1e-12:
            raise ValueError("each row of a must sum to its c, and b to 1")


#: The methods of torchdiffeq of the same names ("rk4" is the 3/8 rule).
TABLEAUS = {
    "euler": Tableau(((),), (1.0,), (0.0,)),
    "midpoint": Tableau(((), (1 / 2,)), (0.0, 1.0), (0.0, 1 / 2)),
    "heun2": Tableau(((), (1.0,)), (1 / 2, 1 / 2), (0.0, 1.0)),
    "heun3": Tableau(((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), (0.0, 1 / 3, 2 / 3)),
    "rk4": Tableau(
        ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), (0.0, 1 / 3, 2 / 3, 1.0)
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

    def pull(self, t: float, saved: tuple[Tensor, ...], f_bar: Tensor, q_bar: Tensor) -> Tensor:
        """The gradient of the state from those of f and q; remembers what :meth:`gradients` will need."""

    def gradients(self) -> tuple[Tensor, ...]:
        """The gradients of ``field.tensors`` from all calls of :meth:`pull`."""


class Taped(Protocol):
    """A field of pairs (state, integral) that may have a tape."""

    tensors: tuple[Tensor, ...]

    def tape(self, batch_shape: torch.Size) -> Tape | None:
        """A tape for states of this batch shape; None if it has none for any."""


def solve(
    field: Taped, generic: Callable[[Tensor], tuple[Tensor, Tensor]], method: str, x: Tensor, times: Sequence[float]
) -> tuple[Tensor, Tensor] | None:
    """
    Integrates along a grid of times.

    :param field: the field.
    :param generic: the same solve for automatic differentiation, which second derivatives fall back on.
    :param str method: a name in :data:`TABLEAUS`.
    :param Tensor x: the initial state with shape ``(*, d)``.
    :param times: the grid.
    :returns: the state at the last time and the integral of q, with shapes ``(*, d)`` and ``(*,)``; None if the field
        has no tape.
    """
    tape = field.tape(x.shape[:-1])
    if tape is None:
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *field.tensors)):
        return _Solve.apply(field, generic, tape, TABLEAUS[method], tuple(times), x, *field.tensors)
    return _forward(tape, TABLEAUS[method], times, x, None)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        field: Taped,
        generic: Callable[[Tensor], tuple[Tensor, Tensor]],
        tape: Tape,
        tableau: Tableau,
        times: tuple[float, ...],
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        records: list[tuple[Tensor, ...]] = []
        result = _forward(tape, tableau, times, x, records)
        ctx.field, ctx.generic, ctx.tableau, ctx.times = field, generic, tableau, times
        ctx.size = len(records[0])
        ctx.save_for_backward(x, *tensors, *(tensor for record in records for tensor in record))
        return result

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor, integral_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.field.tensors)
        tensors, saved = saved[:count], saved[count:]
        if torch.is_grad_enabled():  # the gradients are to be differentiated, too
            wanted = [v for v in (x, *tensors) if v.requires_grad]
            gradients = iter(torch.autograd.grad(
                ctx.generic(x), wanted, (x_bar, integral_bar), create_graph=True, materialize_grads=True
            ))
            return *[None] * 5, *(next(gradients) if v.requires_grad else None for v in (x, *tensors))
        tape = ctx.field.tape(x.shape[:-1])  # a fresh one, as another backward pass may follow
        records = [tuple(saved[i : i + ctx.size]) for i in range(0, len(saved), ctx.size)]
        start_bar = _backward(tape, ctx.tableau, ctx.times, x_bar, integral_bar, records)
        return *[None] * 5, start_bar, *tape.gradients()


def _forward(
    tape: Tape, tableau: Tableau, times: Sequence[float], x: Tensor, records: list[tuple[Tensor, ...]] | None
) -> tuple[Tensor, Tensor]:
    batch_shape, x = x.shape[:-1], tape.pack(x)
    integral = None
    for start, end in zip(times[:-1], times[1:], strict=True):
        h = end - start
        slopes: list[Tensor] = []
        for row, b, c in zip(tableau.a, tableau.b, tableau.c, strict=True):
            f, q, saved = tape.record(start + c * h, _step(x, h, row, slopes))
            slopes.append(f)
            integral = q * (h * b) if integral is None else integral.add_(q, alpha=h * b)
            if records is not None:
                records.append(saved)
        x = _step(x, h, tableau.b, slopes)
    assert integral is not None
    return tape.unpack(x), integral.view(batch_shape)


def _step(x: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """``x + h * sum(weights * slopes)`` in a new tensor, or x itself where there is nothing to add."""
    total = x
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total = torch.add(x, slope, alpha=h * weight) if total is x else total.add_(slope, alpha=h * weight)
    return total


def _backward(
    tape: Tape,
    tableau: Tableau,
    times: Sequence[float],
    x_bar: Tensor,
    integral_bar: Tensor,
    records: list[tuple[Tensor, ...]],
) -> Tensor:
    x_bar, integral_bar = tape.pack(x_bar), integral_bar.reshape(-1)
    stages = range(len(tableau.b))
    for start, end in zip(times[-2::-1], times[:0:-1], strict=True):
        h = end - start
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
    return tape.unpack(x_bar)
