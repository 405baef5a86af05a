# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates of latents with bounds in which they keep the geometry that they have between the bounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import logsigmoid, softplus

__all__ = ["SoftClip"]

_FAR = -15.0  # from here on two terms of a series do


class SoftClip(Transform):
    r"""
    The map :math:`v \mapsto \operatorname{logit} s(v)` of the chosen elements of a vector, with

        :math:`s(v) = \frac{\log(1 + e^{k (v + 1)}) - \log(1 + e^{k (v - 1)})}{2 k},`

    which is nearly :math:`(1 + v) / 2` between -1 and 1, and goes to 0 and 1 outside. ``biject_to`` maps the logit to
    an interval, so that v is a latent in the interval up to a linear map, but for the edges. A posterior whose place
    depends on data keeps its shape in v wherever it lies; in the logit it does not.

    :param Tensor mask: the chosen elements, with shape ``(d,)``; the others are left as they are.
    :param float sharpness: k; edges are as wide as 1 / k halves of the interval.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, mask: Tensor, sharpness: float) -> None:
        super().__init__()
        self.mask, self.sharpness = mask, sharpness

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, SoftClip)
            and self.sharpness == other.sharpness
            and self.mask.shape == other.mask.shape
            and bool((self.mask == other.mask).all())
        )

    def _call(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self._log_share(x) - self._log_share(-x), x)

    def _inverse(self, y: Tensor) -> Tensor:
        # exp(k v) = (exp(p) - 1) / (exp(k) - exp(p - k)) with p = 2 k s.
        k = self.sharpness
        below, above = (math.log(2 * k) + logsigmoid(end) for end in (y, -y))
        v = (below.exp() - k + _log1mexp(below) - _log1mexp(above)) / k
        return torch.where(self.mask, v, y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the logarithms of the derivatives."""
        k = self.sharpness
        slope = logsigmoid(k * (x + 1)) + logsigmoid(k * (1 - x)) + math.log1p(-math.exp(-2 * k)) - math.log(2)
        ladj = slope - self._log_share(x) - self._log_share(-x)
        return torch.where(self.mask, ladj, 0.0).sum(-1)

    def _log_share(self, v: Tensor) -> Tensor:
        """The logarithm of s."""
        k = self.sharpness
        outer, inner = _log_softplus(k * (v + 1)), _log_softplus(k * (v - 1))
        return outer + torch.log(-torch.expm1(inner - outer)) - math.log(2 * k)


def _log_softplus(x: Tensor) -> Tensor:
    """log(log(1 + exp(x))), also where exp(x) is no number."""
    far = x < _FAR
    return torch.where(far, x - x.exp() / 2, softplus(torch.where(far, 0.0, x)).log())


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-exp(x))), likewise."""
    far = x < _FAR
    return torch.where(far, x - x.exp() / 2, torch.log(-torch.expm1(-torch.where(far, 0.0, x).exp())))
