# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""What transforms with an inverse in closed form have in common."""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

__all__ = ["Bijection"]


class Bijection(Transform):
    """
    Keeps its latest pair, so that scoring a sample inverts nothing; but not one that has lost its gradients. Its
    parameters are those it was made with.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    sign = +1

    def __init__(self) -> None:
        super().__init__(cache_size=1)

    @property
    def inv(self) -> _InverseTransform:
        """The inverse. Made anew each time: a stored one would form a cycle that keeps graphs alive."""
        return _InverseTransform(self)

    def _inv_call(self, y: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not y.requires_grad:
            return self._inverse(y)
        return super()._inv_call(y)
