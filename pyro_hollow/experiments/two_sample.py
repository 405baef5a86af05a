# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Distances between two samples, and the energy test of whether they come from one distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""
    :math:`\sqrt{2 \, \mathbb{E} |x - y| - \mathbb{E} |x - x'| - \mathbb{E} |y - y'|}` of two samples, in units of x.

    :param Tensor x: with shape ``(n, d)``.
    :param Tensor y: with shape ``(m, d)``.

    References:

    [1] Gábor J. Székely, Maria L. Rizzo. Energy statistics: A class of statistics based on distances.
    Journal of Statistical Planning and Inference 143 (2013).
    """
    return float(_statistics(*_pooled(x, y))[0].clamp(min=0).sqrt())


def energy_test(x: Tensor, y: Tensor, permutations: int = 199) -> float:
    """
    The p-value of the energy test by random permutations: small if the samples come from different distributions.

    :param Tensor x: with shape ``(n, d)``.
    :param Tensor y: with shape ``(m, d)``.
    :param int permutations: their number; the p-value is at least 1 / (permutations + 1).
    """
    distances, signs = _pooled(x, y)
    shuffled = torch.stack([signs[0, torch.randperm(signs.shape[1])] for _ in range(permutations)])
    observed, *others = _statistics(distances, torch.cat([signs, shuffled])).tolist()
    return (1 + sum(other >= observed for other in others)) / (permutations + 1)


def _pooled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """All distances, and 1/n for each of x and -1/m for each of y, a row."""
    pooled = torch.cat([x, y]).double()
    signs = torch.cat([torch.full((len(x),), 1 / len(x)), torch.full((len(y),), -1 / len(y))]).double()
    return torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist"), signs.unsqueeze(0)


def _statistics(distances: Tensor, signs: Tensor) -> Tensor:
    return -((signs @ distances) * signs).sum(-1)


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 200) -> float:
    """
    The 1-Wasserstein distance of projections on random directions, averaged over the directions, in units of x.

    :param Tensor x: with shape ``(n, d)``.
    :param Tensor y: with the same shape.
    :param int projections: the number of directions; in one dimension they are all alike.
    """
    directions = torch.randn(x.shape[-1], projections, dtype=x.dtype)
    directions = directions / directions.norm(dim=0)
    return float(((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean())
