# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The dynamics of a state with its log-determinant and score, for solvers that know of neither."""

from __future__ import annotations

from torch import Tensor

from pyro_hollow.ops.stepper import score_slope
from pyro_hollow.ops.vector_field import VectorField

__all__ = ["Augmented", "Scored"]


class Augmented:
    """
    The dynamics of the state, its log-determinant and what else a field integrates along.

    :param VectorField field: the field.
    """

    def __init__(self, field: VectorField) -> None:
        self.tensors = field.tensors
        self.network = field.network
        #: The dynamics of the state alone, of which the rest is an integral.
        self.state_field: VectorField | None = field
        self._field = field

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._field.augmented(t, state)


class Scored(Augmented):
    """
    The dynamics of (state, log-determinant, score), the last without gradients.

    :param VectorField field: the field.
    """

    def __init__(self, field: VectorField) -> None:
        super().__init__(field)
        self.state_field = None

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pair = state[:2]
        return *super().__call__(t, pair), score_slope(self._field.augmented, t, pair, state[2].detach())
