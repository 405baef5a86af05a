# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
The formulas of implicit methods, apart from how their equations are solved and their steps are chosen.

Each knows the past of the solution by a *history*, a tensor whose row 0 is the state and whose row 1 is the step times
a slope. A step solves one or more equations :math:`y = c + \eta f(t, y)` and is linear in all else, so that the same
lines serve a solve and its derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["METHODS", "Adams", "Bdf", "Esdirk", "Method", "Solve"]

#: Solves y = constant + coefficient f(t, y): maps t, coefficient, constant and a guess of y to y.
Solve = Callable[[float, float, Tensor, Tensor], Tensor]
#: The history after a step, and by order of the formula an estimate of the error of the step.
Stepped = tuple[Tensor, dict[int, Tensor]]


class Method(Protocol):
    """A family of formulas, one for each order."""

    @property
    def first_order(self) -> int:
        """The order to begin with."""

    def begin(self, y: Tensor, slope: Tensor) -> Tensor:
        """The history of a state and a slope, multiplied by the step."""

    def equal_steps(self, order: int) -> int:
        """Number of steps of one length before order and step may change."""

    def rescale(self, history: Tensor, order: int, factor: float) -> Tensor:
        """The history as if the steps had been longer by a factor; good for this order and those below."""

    def step(self, solve: Solve, t: float, h: float, history: Tensor, order: int) -> Stepped:
        """One step from t to t + h."""


@dataclass(frozen=True)
class Esdirk:
    r"""
    A diagonally implicit Runge-Kutta method whose first stage is explicit and whose last one is the step,

        :math:`Y_i = y_n + h \sum_{j < i} a_{ij} f(Y_j) + h \gamma f(Y_i), \qquad y_{n+1} = Y_s.`

    :ivar a: the weights of the earlier slopes in stages 2, ..., s.
    :ivar gamma: the weight of each stage's own slope.
    :ivar error: the weights of all slopes in the estimate of the error.
    :ivar order: of the embedded method, which is one less than the method's.
    :raises ValueError: for coefficients of an inconsistent method.
    """

    a: tuple[tuple[float, ...], ...]
    gamma: float
    error: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        if [len(row) for row in self.a] != list(range(1, len(self.a) + 1)) or len(self.error) != len(self.a) + 1:
            raise ValueError("stage i must have i - 1 weights of earlier slopes, and error one weight of each slope")
        if abs(sum(self.a[-1]) + self.gamma - 1) > 1e-12 or abs(sum(self.error)) > 1e-12:
            raise ValueError("the weights of the last stage must sum to 1, and those of error to 0")

    @property
    def first_order(self) -> int:
        return self.order

    def begin(self, y: Tensor, slope: Tensor) -> Tensor:
        return torch.stack([y, slope])

    def equal_steps(self, order: int) -> int:
        return 1

    def rescale(self, history: Tensor, order: int, factor: float) -> Tensor:
        return torch.stack([history[0], factor * history[1]])

    def step(self, solve: Solve, t: float, h: float, history: Tensor, order: int) -> Stepped:
        y, *slopes = history.unbind()  # slopes times the step
        for row in self.a:
            constant = _combine(y, row, slopes)
            c = sum(row) + self.gamma
            stage = solve(t + c * h, self.gamma * h, constant, constant + self.gamma * slopes[-1])
            # Not f(stage), in which a stiff field magnifies what the equation's solution is off by.
            slopes.append((stage - constant) / self.gamma)
        error = _combine(torch.zeros_like(y), self.error, slopes)
        return torch.stack([stage, slopes[-1]]), {self.order: error}


def _combine(start: Tensor, weights: tuple[float, ...], rows: list[Tensor]) -> Tensor:
    total = start
    for weight, row in zip(weights, rows, strict=True):
        if weight:
            total = total + weight * row
    return total


class _Multistep:
    """
    Formulas on backward differences. The history is good for steps of equal length and is interpolated
    when the step changes; the estimate of a formula of order k is a multiple of row k + 1.
    """

    first_order = 1
    #: By order, the error of the formula over row order + 1 of the new history.
    error: tuple[float, ...]

    def __init__(self, max_order: int = 5) -> None:
        if max_order not in range(1, len(self.error)):
            raise ValueError(f"max_order must be 1, ..., {len(self.error) - 1}, but got {max_order}")
        self.max_order = max_order

    def begin(self, y: Tensor, slope: Tensor) -> Tensor:
        return torch.stack([y, slope, *[torch.zeros_like(y)] * (self.max_order + 1)])

    def equal_steps(self, order: int) -> int:
        return order + 1

    def step(self, solve: Solve, t: float, h: float, history: Tensor, order: int) -> Stepped:
        rows = self._next(solve, t, h, list(history.unbind()), order)
        # The error of the next order up is known once the history is filled that far.
        orders = range(max(1, order - 1), min(order + 1, self.max_order) + 1)
        return torch.stack(rows), {k: self.error[k] * rows[k + 1] for k in orders}

    def _next(self, solve: Solve, t: float, h: float, rows: list[Tensor], order: int) -> list[Tensor]:
        raise NotImplementedError


class Bdf(_Multistep):
    r"""
    Numerical differentiation formulas of orders 1 to 5, which are BDF with a term that makes the error smaller at
    little cost in stability (Shampine and Reichelt, 1997),

        :math:`\sum_{j=1}^k \frac{1}{j} \nabla^j y_{n+1} - \kappa_k \gamma_k (y_{n+1} - y_{n+1}^{(0)}) =
        h f(t_{n+1}, y_{n+1}), \qquad \gamma_k = \sum_{j=1}^k \frac{1}{j},`

    with the extrapolation :math:`y_{n+1}^{(0)} = \sum_{j=0}^k \nabla^j y_n`. Row j of the history is
    :math:`\nabla^j y_n`.

    :param int max_order: the highest order, 1 to 5.

    References:

    [1] Lawrence F. Shampine, Mark W. Reichelt. The MATLAB ODE Suite. SIAM Journal on Scientific Computing, 1997.
    """

    KAPPA = (0.0, -0.1850, -1 / 9, -0.0823, -0.0415, 0.0)
    GAMMA = tuple(sum(1 / j for j in range(1, k + 1)) for k in range(6))
    error = tuple(kappa * gamma + 1 / (k + 1) for k, (kappa, gamma) in enumerate(zip(KAPPA, GAMMA, strict=True)))

    def rescale(self, history: Tensor, order: int, factor: float) -> Tensor:
        return history if factor == 1 else torch.cat([_respace(history[: order + 1], factor), history[order + 1 :]])

    def _next(self, solve: Solve, t: float, h: float, rows: list[Tensor], order: int) -> list[Tensor]:
        alpha = (1 - self.KAPPA[order]) * self.GAMMA[order]
        guess = _combine(rows[0], (1.0,) * order, rows[1 : order + 1])
        constant = _combine(guess, tuple(-gamma / alpha for gamma in self.GAMMA[1 : order + 1]), rows[1 : order + 1])
        correction = solve(t + h, h / alpha, constant, guess) - guess
        return _difference(rows, order + 1, correction, 0)


class Adams(_Multistep):
    r"""
    Adams-Moulton formulas of orders 1 to 8: :math:`f` is replaced by the polynomial through its latest k values,

        :math:`y_{n+1} = y_n + h \sum_{j=0}^{k-1} \gamma_j^* \nabla^j f_{n+1}.`

    The orders 1 and 2, backward Euler and trapezoidal rule, are stable for all stable linear equations; the higher ones
    for steps that are a few times shorter than the fastest decay at most. Row 0 of the history is y, row j + 1 is
    :math:`h \nabla^j f_n`.

    :param int max_order: the highest order, 1 to 8.

    References:

    [1] Ernst Hairer, Syvert P. Nørsett, Gerhard Wanner. Solving Ordinary Differential Equations I, section III.1.
    """

    #: The weights of the explicit formulas; those of the implicit ones are their differences.
    GAMMA = (1, 1 / 2, 5 / 12, 3 / 8, 251 / 720, 95 / 288, 19087 / 60480, 5257 / 17280, 1070017 / 3628800)
    error = (0.0, *(new - old for old, new in zip(GAMMA[:-1], GAMMA[1:], strict=True)))

    def rescale(self, history: Tensor, order: int, factor: float) -> Tensor:
        if factor == 1:
            return history
        return torch.cat([history[:1], factor * _respace(history[1 : order + 1], factor), history[order + 1 :]])

    def _next(self, solve: Solve, t: float, h: float, rows: list[Tensor], order: int) -> list[Tensor]:
        explicit = _combine(rows[0], self.GAMMA[: order - 1], rows[1:order])
        slope = _combine(torch.zeros_like(rows[0]), (1.0,) * (order - 1), rows[1:order])
        gamma = self.GAMMA[order - 1]
        guess = explicit + gamma * rows[order]
        y = solve(t + h, gamma * h, explicit - gamma * slope, guess)
        return [y, *_difference(rows, order, (y - explicit) / gamma, 1)[1:]]


def _difference(rows: list[Tensor], top: int, value: Tensor, bottom: int) -> list[Tensor]:
    """The rows, which are differences of each other from the bottom on, one step later; value is that of row top."""
    new = [*rows[:top], value]
    for j in range(top, len(rows) - 1):
        new.append(new[j] - rows[j])
    for j in range(top - 1, bottom - 1, -1):
        new[j] = rows[j] + new[j + 1]
    return new


def _respace(rows: Tensor, factor: float) -> Tensor:
    """Backward differences of the same polynomial for a spacing that is longer by a factor."""
    weights = rows.new_tensor(_respacing(len(rows), factor))
    # Not as a matrix product, which autocast and TF32 would round.
    return (weights.view(*weights.shape, *(1,) * (rows.dim() - 1)) * rows).sum(1)


@lru_cache(64)
def _respacing(size: int, factor: float) -> list[list[float]]:
    # p(-s) = sum_j C(j - 1 - s, j) D_j in units of the old spacing, and D'_i = sum_m (-1)^m C(i, m) p(-m factor).
    def basis(s: float, j: int) -> float:
        return math.prod((i - s) / (i + 1) for i in range(j))

    return [
        [sum((-1) ** m * math.comb(i, m) * basis(m * factor, j) for m in range(i + 1)) for j in range(size)]
        for i in range(size)
    ]


def _kvaerno3() -> Esdirk:
    # The root of g^3 - 3 g^2 + 3/2 g - 1/6 that makes the method L-stable.
    g = 0.43586652150845899942
    third = ((-4 * g**2 + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g))
    last = ((6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g**2 + 6 * g - 1) / (6 * g - 3))
    error = tuple(a - b for a, b in zip((*last, g), (*third, g, 0.0), strict=True))
    return Esdirk(((g,), third, last), g, error, 2)


def _kencarp4() -> Esdirk:
    last = (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211)
    embedded = (
        4586570599 / 29645900160, 0.0, 178811875 / 945068544, 814220225 / 1159782912, -3700637 / 11593932,
        61727 / 225920,
    )  # fmt: skip
    return Esdirk(
        (
            (1 / 4,),
            (8611 / 62500, -1743 / 31250),
            (5012029 / 34652500, -654441 / 2922500, 174375 / 388108),
            (15267082809 / 155376265600, -71443401 / 120774400, 730878875 / 902184768, 2285395 / 8070912),
            last,
        ),
        1 / 4,
        tuple(a - b for a, b in zip((*last, 1 / 4), embedded, strict=True)),
        3,
    )


#: Methods by name; those of variable order take the highest one.
METHODS: dict[str, Callable[..., Method]] = {
    "adams_moulton": Adams,
    "bdf": Bdf,
    "kencarp4": _kencarp4,
    "kvaerno3": _kvaerno3,
}
