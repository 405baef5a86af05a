# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Explicit Runge-Kutta methods, and the choice of their steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_hollow.ops.stepper import Loop, Path, Stepper, Tableau, Tolerances

from .monitor import are_finite

__all__ = ["TABLEAUS", "Failure", "adaptive", "fixed"]

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


class Failure(ArithmeticError):
    """
    A solve that does not come to its end.

    :ivar word: the kind of the failure; see :class:`~pyro_hollow.ode.monitor.Monitor`.
    :ivar time: the time that was reached.
    :ivar packed: the packed slope there, or the state, to tell the worst sample.
    :ivar nfe: the number of evaluations until then.
    """

    def __init__(self, word: str, time: float, packed: Tensor, nfe: int) -> None:
        super().__init__(word)
        self.word, self.time, self.packed, self.nfe = word, time, packed, nfe


def fixed(times: Sequence[float], max_nfe: int) -> Loop:
    """
    Steps along a grid of times. The loop raises :class:`Failure` where it takes too many evaluations, and where the
    state at the end is not finite.

    :param times: the grid.
    :param int max_nfe: the most evaluations.
    """

    def loop(stepper: Stepper, y: Tensor, keep: bool) -> Path:
        path = Path(y, list(times))
        sums = []  # of slopes and states, looked at in case of a failure alone
        for t, end in zip(times[:-1], times[1:], strict=True):
            if path.nfe + len(stepper.tableau.b) > max_nfe:
                raise Failure("max_nfe", t, path.end, path.nfe)
            step = stepper.step(t, end - t, path.end, None, None, keep)
            path.end = step.end
            path.saved += [step.saved] if keep else ()
            path.nfe += len(stepper.tableau.b)
            sums += [step.first[0].detach().sum(), step.end.detach().sum()]
        if not are_finite(path.end):
            first = next((i for i, total in enumerate(sums) if not are_finite(total)), len(sums) - 1)
            nfe = (first // 2 + 1) * len(stepper.tableau.b)
            raise Failure("non-finite", times[(first + 1) // 2], path.end, nfe)
        return path

    return loop


def adaptive(t0: float, t1: float, tolerances: Tolerances, max_nfe: int, first_step: float | None = None) -> Loop:
    r"""
    Steps such that for every sample the root mean square of error / (atol + rtol \|x\|) stays below 1 in each part of
    the state. The loop raises :class:`Failure` if the end is out of reach.

    Later steps divide the rest of the interval evenly: into as many steps as the latest error asks for, with a safety
    factor of 0.95 and the exponent 1 / (order - 0.5). In training a rejected step costs less than one more step to
    backpropagate through.

    :param float t0: the initial time.
    :param float t1: the end time, which may be the earlier one.
    :param tolerances: relative and absolute.
    :param int max_nfe: the most evaluations.
    :param float first_step: the length of the first step; None for the stepper's own choice.
    """

    def loop(stepper: Stepper, y: Tensor, keep: bool) -> Path:
        path, tableau = Path(y, [t0]), stepper.tableau
        path.nfe = 1
        smallest = torch.finfo(y.dtype).eps * max(abs(t0), abs(t1))
        known, ratio, rejected = None, 0.0, math.inf
        length = first_step
        if length is None:
            length, known, nfe = stepper.first_step(t0, t1 - t0, y, tolerances)
            path.nfe += nfe
        steps = _number(abs((t1 - t0) / length))
        while (t := path.times[-1]) != t1:
            end = t1 if steps == 1 else t + (t1 - t) / steps
            slope = path.end if known is None else known[0]
            if path.nfe + len(tableau.b) > max_nfe:
                raise Failure("max_nfe", t, slope, path.nfe)
            if abs(end - t) < smallest or abs(end - t) >= abs(rejected - t):
                if math.isfinite(ratio):
                    raise Failure("underflow", t, slope, path.nfe)
                raise Failure("non-finite", rejected, slope, path.nfe)
            step = stepper.step(t, end - t, path.end, known, tolerances, keep)
            path.nfe += len(tableau.b)
            ratio = step.ratio
            accepted = ratio <= (stepper.trust if end - t == t1 - t0 else 1.0)
            if accepted:
                path.end, known = step.end, step.last
                path.times.append(end)
                path.saved += [step.saved] if keep else ()
                rejected = math.inf
            elif are_finite(step.first[0]):
                path.rejected += 1
                known, rejected = step.first, end
            else:
                raise Failure("non-finite", t, step.first[0], path.nfe)
            # A state that is not finite has no ratio.
            factor = 0.95 * max(ratio, 1e-10) ** (-1 / (tableau.order - 0.5)) if ratio < math.inf else 0.0
            longest = (end - t) * min(10.0, max(0.2, factor))
            steps = max(1 if accepted else 2, _number((t1 - path.times[-1]) / longest))
        return path

    return loop


def _number(ratio: float) -> int:
    """The number of even steps in an interval so many times as long as the longest one."""
    return max(1, math.ceil(ratio - 1e-6)) if ratio < math.inf else 1 << 62
