# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Pareto-smoothed importance sampling: smoothed weights, and how far to trust them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SmoothedWeights", "faults", "fit_generalized_pareto", "limits", "resample", "smooth"]

# Weights below this share of the largest underflow; none of them is a part of the tail.
_LOG_TINY = math.log(torch.finfo(torch.float64).tiny)
# For the weight that is unseen.
_MAX_SHAPE = 0.7


def fit_generalized_pareto(excesses: Tensor) -> tuple[float, float]:
    r"""
    Fits a generalized Pareto distribution with the density
    :math:`\sigma^{-1} (1 + k y / \sigma)^{-1 - 1 / k}` on :math:`y > 0`.

    The estimate is the posterior mean of Zhang and Stephens [1] under their data-dependent prior on a grid, with the
    shape shrunk towards 0.5 by the weight of ten observations [2].

    :param Tensor excesses: y in ascending order, with shape ``(n,)`` for n of at least 5, in float64.
    :returns: the shape k and the scale :math:`\sigma`; not finite where the values leave nothing to fit.

    References:

    [1] Jin Zhang, Michael A. Stephens. A New and Efficient Estimation Method for the Generalized Pareto Distribution.
    Technometrics 51, 2009.

    [2] Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry. Pareto Smoothed Importance Sampling.
    [arXiv:1507.02646]
    """
    n = len(excesses)
    grid = 30 + int(n**0.5)
    quartile, largest = excesses[int(n / 4 + 0.5) - 1], excesses[-1]
    steps = torch.arange(1, grid + 1).to(excesses) - 0.5
    theta = 1 / largest + (1 - (grid / steps).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-theta.unsqueeze(-1) * excesses).mean(-1)
    log_likelihood = n * ((-theta / shapes).log() - shapes - 1)
    mean_theta = (log_likelihood.softmax(0) * theta).sum()
    shape = torch.log1p(-mean_theta * excesses).mean()
    return ((n * shape + 5) / (n + 10)).item(), (-shape / mean_theta).item()


@dataclass(frozen=True, eq=False)
class SmoothedWeights:
    """
    Result of :func:`smooth`.

    :ivar Tensor weights: the smoothed weights with shape ``(S,)``, which sum to 1.
    :ivar float khat: the fitted shape k; 0 if there is no tail to fit, inf if it cannot be fitted.
    :ivar float unseen: the share of the total weight that the fit expects where the sample has less than one weight.
    """

    weights: Tensor
    khat: float
    unseen: float


def smooth(log_weights: Tensor) -> SmoothedWeights:
    r"""
    Replaces the largest :math:`M = \min(S / 5, 3 \sqrt{S})` of S importance weights by quantiles of a generalized
    Pareto distribution that is fitted to them, at most as large as the largest weight.

    The fit expects this part of M weights above a threshold u beyond its quantile of level :math:`1 - 1 / M`:

        :math:`u + \frac{\sigma}{1 - k} \Bigl(\frac{M^k - 1}{k} + 1\Bigr),`

    here with k of at most 0.7. Divided by the sum of all smoothed weights it bounds the error that weights larger than
    those drawn can cause. It is small for a tail that matters little, whatever its k.

    :param Tensor log_weights: with shape ``(S,)``, in float64, some of them finite.
    :returns: the smoothed weights. If the largest weights are equal to a thousandth, there is no tail to fit, and k
        is 0. If fewer than five exceed the threshold, or the fit fails, k is inf and all of the weight counts as
        unseen. The weights are not smoothed in either case.
    """
    size = len(log_weights)
    log_ratios = log_weights - log_weights.max()
    ordered, order = log_ratios.sort()
    raw = log_weights.softmax(0)
    threshold = ordered[-math.ceil(min(size / 5, 3 * size**0.5)) - 1]
    if threshold > -1e-3:
        # A fit to equal weights fails, and one to weights that differ by rounding returns any number.
        return SmoothedWeights(raw, 0.0, raw.max().item())
    threshold = threshold.clamp(min=_LOG_TINY)
    tail = order[ordered > threshold]
    if len(tail) < 5:
        return SmoothedWeights(raw, math.inf, 1.0)
    smallest = threshold.exp()
    shape, scale = fit_generalized_pareto(log_ratios[tail].exp() - smallest)
    levels = (torch.arange(len(tail)).to(log_ratios) + 0.5) / len(tail)
    exponent = -torch.log1p(-levels)
    quantiles = scale * (exponent if shape == 0 else torch.expm1(shape * exponent) / shape)
    smoothed = (smallest + quantiles).log().clamp(max=0.0)
    if not (math.isfinite(shape) and bool(smoothed.isfinite().all())):
        return SmoothedWeights(raw, math.inf, 1.0)
    log_smoothed = log_ratios.index_copy(0, tail, smoothed)
    # Of heavier tails a sample tells too little: their means would be anything up to infinite.
    k, log_size = min(shape, _MAX_SHAPE), math.log(len(tail))
    excess = (log_size if k == 0 else math.expm1(k * log_size) / k) + 1
    unseen = (smallest.item() + scale * excess / (1 - k)) / log_smoothed.logsumexp(0).exp().item()
    return SmoothedWeights(log_smoothed.softmax(0), shape, min(unseen, 1.0))


def resample(weights: Tensor, num_draws: int) -> Tensor:
    """
    Draws indices by systematic resampling: each occurs num_draws times its weight, rounded up or down.

    :param Tensor weights: weights that sum to 1, with shape ``(S,)``.
    :param int num_draws: the number of indices.
    :return: the indices in ascending order, with shape ``(num_draws,)``.
    """
    cumulative = weights.cumsum(0)
    offset = 1 - torch.rand_like(weights[0])  # in (0, 1], which never meets a weight of 0
    positions = (torch.arange(num_draws, dtype=weights.dtype, device=weights.device) + offset) / num_draws
    return torch.searchsorted(cumulative, positions * cumulative[-1])


def limits(num_samples: int) -> tuple[float, float]:
    r"""
    Smallest effective sample size, and largest unseen share of the weight, of draws that can be trusted.

    They are 100 and 0.035; below 200 samples half their number, and below 1000 samples :math:`0.035 (1000 / S)^{1/3}`.
    On the guides of ``pyro_hollow.experiments.verdict`` they separate two classes: corrected means, standard
    deviations and evidence as exact as those of 400 independent draws, and no better than those of 16.

    :param int num_samples: the number S of importance weights.
    """
    return min(100.0, num_samples / 2), 0.035 * max(1.0, (1000 / num_samples) ** (1 / 3))


def faults(ess: float, unseen: float, num_samples: int) -> list[str]:
    """
    Reasons against trusting importance-corrected draws, in words; none if they can be trusted.

    :param float ess: the effective sample size.
    :param float unseen: of :class:`SmoothedWeights`.
    :param int num_samples: the number of importance weights.
    """
    least, most = limits(num_samples)
    found = []
    if not ess >= least:
        found.append(f"the effective sample size is below {least:.0f}")
    if not unseen <= most:
        found.append(f"weights larger than those drawn may hold {unseen:.0%} of the total, more than {most:.1%}")
    return found
