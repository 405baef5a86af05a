# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The factor of the learning rates at each step, and the test that says when a loss no longer falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SCHEDULES", "Schedule", "gain", "mean"]

#: Names of schedules.
SCHEDULES = ("plateau", "cosine", "constant")

#: Steps before the first test for a plateau, and between two tests.
FIRST_TEST, TEST_INTERVAL = 300, 50


@dataclass
class Schedule:
    r"""
    A factor of the learning rates: it rises linearly in the steps of the ramp, is 1 until step ``decay``, and falls as
    :math:`(1 + \cos(\pi (k - \text{decay}) / (\text{end} - \text{decay}))) / 2` until step ``end``.

    :ivar ramp: the steps of the ramp.
    :ivar decay: the step at which the cosine begins.
    :ivar end: the number of steps.
    :ivar start: the first step of the losses that the test for a plateau looks at.
    :ivar adaptive: the decay may begin earlier.
    """

    ramp: int
    decay: int
    end: int
    start: int = 0
    adaptive: bool = False

    @classmethod
    def of(cls, name: str, num_steps: int | None, max_steps: int, ramp: int, first: int = 0) -> Schedule:
        """
        Makes the schedule with a name; for the parameters see :func:`~pyro_hollow.train.train`.

        :param int first: the number of steps that an earlier training took.
        """
        steps = max_steps if num_steps is None else num_steps
        decay = {"plateau": 2 * steps // 3, "cosine": 0, "constant": steps}[name]
        return cls(ramp, max(first + decay, ramp), first + steps, first, num_steps is None)

    def factor(self, step: int) -> float:
        """The factor in a step; steps count from 0."""
        if step < self.ramp:
            return (step + 1) / self.ramp
        if step < self.decay:
            return 1.0
        return (1 + math.cos(math.pi * (step - self.decay) / (self.end - self.decay))) / 2

    def due(self, step: int) -> bool:
        """Tells that the test for a plateau is to be made before a step."""
        early = self.adaptive and step < self.decay
        return early and step - self.start >= FIRST_TEST and step % TEST_INTERVAL == 0

    def begin_decay(self, step: int) -> None:
        """Lets the cosine begin now, and take half of the steps since the start."""
        self.decay, self.end = step, min(self.end, step + (step - self.start) // 2)


def gain(losses: Sequence[float]) -> float:
    """
    The mean of the middle third of the losses less the mean of the last third; values that are not finite do not count.
    """
    third = len(losses) // 3
    return mean(losses[-2 * third : -third]) - mean(losses[-third:]) if third else math.inf


def mean(values: Sequence[float]) -> float:
    """The mean of those values that are finite; NaN without any."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
