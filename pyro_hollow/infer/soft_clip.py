# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates of latents with two bounds, between the latents' own and their logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import logsigmoid, softplus

__all__ = ["SoftClip"]

_FAR = -15.0  # from here on two terms of a series do


class SoftClip(Transform):
    r"""
    The map :math:`w \mapsto \operatorname{logit} s(w / \tanh(k / 2))` of the chosen elements of a vector, with

        :math:`s(v) = \frac{\log(1 + e^{k (v + 1)}) - \log(1 + e^{k (v - 1)})}{2 k},`

    which is nearly :math:`(1 + v) / 2` between -1 and 1, and goes to 0 and 1 outside. ``biject_to`` maps the logit to
    an interval. For a large k, w is the latent in the interval up to a linear map, but for the edges: a posterior that
    is much narrower than the interval has the same shape wherever it lies. For a small k, w is half the logit: a
    posterior as wide as the interval has no edges.

    :param Tensor mask: the chosen elements, with shape ``(d,)``; the others are left as they are.
    :param Tensor sharpness: k, positive, with shape ``(*, d)``; edges are as wide as 1 / k halves of the interval.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, mask: Tensor, sharpness: Tensor) -> None:
        super().__init__()
        self.mask, self.sharpness = mask, sharpness

    def _call(self, x: Tensor) -> Tensor:
        v = x / (self.sharpness / 2).tanh()
        return torch.where(self.mask, self._log_share(v) - self._log_share(-v), x)

    def _inverse(self, y: Tensor) -> Tensor:
        # exp(k v) = (exp(p) - 1) / (exp(k) - exp(p - k)) with p = 2 k s.
        k = self.sharpness
        below, above = ((2 * k).log() + logsigmoid(end) for end in (y, -y))
        v = (below.exp() - k + _log1mexp(below) - _log1mexp(above)) / k
        return torch.where(self.mask, v * (k / 2).tanh(), y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the logarithms of the derivatives."""
        k = self.sharpness
        v = x / (k / 2).tanh()
        slope = logsigmoid(k * (v + 1)) + logsigmoid(k * (1 - v)) + torch.log1p(-(-2 * k).exp()) - math.log(2)
        ladj = slope - (k / 2).tanh().log() - self._log_share(v) - self._log_share(-v)
        return torch.where(self.mask, ladj, 0.0).sum(-1)

    def _log_share(self, v: Tensor) -> Tensor:
        """The logarithm of s."""
        k = self.sharpness
        outer, inner = _log_softplus(k * (v + 1)), _log_softplus(k * (v - 1))
        return outer + torch.log(-torch.expm1(inner - outer)) - (2 * k).log()


def _log_softplus(x: Tensor) -> Tensor:
    """log(log(1 + exp(x))), also where exp(x) is no number."""
    return torch.where(x < _FAR, _series(x), softplus(x.clamp(min=_FAR)).log())


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-exp(x))), likewise."""
    return torch.where(x < _FAR, _series(x), torch.log(-torch.expm1(-x.clamp(min=_FAR).exp())))


def _series(x: Tensor) -> Tensor:
    """The first two terms of both."""
    x = x.clamp(max=_FAR)  # the branch that is not taken must have a finite gradient, too
    return x - x.exp() / 2
