# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Potentials to start a fit of a gradient flow from, without noise: from Gaussians, and from optimal transport."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .pushed_cosines import Snapshots

__all__ = ["gaussian_start", "transport_start"]

#: Of the entropic transport: the last temperature, in squared standard units, its decay, and the sweeps.
TEMPERATURE, COOLING, SWEEPS = 0.01, 0.8, 60
#: The ridge of the regression on velocities, per function that is not free.
RIDGE = 3.0


def gaussian_start(data: Snapshots) -> Tensor:
    r"""
    Coefficients of the quadratic potential whose noiseless flow carries mean and covariance of each time to those of
    the next, in the mean over gaps: the map between the Gaussians is symmetric, so its logarithm is a Hessian.
    """
    velocities = []
    for x, y, gap in zip(data.x[:-1], data.x[1:], data.gaps, strict=True):
        before, after = _covariance(x), _covariance(y)
        root, inverse = _function(before, torch.sqrt), _function(before, torch.rsqrt)
        matrix = inverse @ _function(root @ after @ root, torch.sqrt) @ inverse
        ratio = lambda a: torch.where((a - 1).abs() < 1e-6, 1.0, a.log() / (a - 1))  # noqa: E731
        drift = (x - x.mean(0)) @ _function(matrix, torch.log) + _function(matrix, ratio) @ (y.mean(0) - x.mean(0))
        velocities.append(drift / gap)
    return _regression(data, velocities, -1)


def transport_start(data: Snapshots) -> Tensor:
    """
    Coefficients whose drift is the displacement by optimal transport over the gap, in the mean: for short gaps the
    transport map between the marginals is that of a gradient, as the flow is.
    """
    velocities = [(_transport(x, y) - x) / gap for x, y, gap in zip(data.x[:-1], data.x[1:], data.gaps, strict=True)]
    return _regression(data, velocities, 1)


def _regression(data: Snapshots, velocities: list[Tensor], last_band: int) -> Tensor:
    """Coefficients of the functions up to a band whose drift is closest to velocities at all times but the last."""
    basis = data.basis
    used = basis.band <= last_band
    slopes = basis.slopes(torch.cat(data.x[:-1]))[..., used].flatten(0, 1)
    normal = slopes.T @ slopes
    normal += torch.diag(torch.where(basis.band[used] < 0, 1e-6, RIDGE) + 1e-8 * normal.diagonal())
    c = torch.zeros(len(basis), dtype=torch.float64)
    c[used] = torch.linalg.solve(normal, -slopes.T @ torch.cat(velocities).flatten())
    return c


def _transport(x: Tensor, y: Tensor) -> Tensor:
    """The mean target of each source under entropic optimal transport, by Sinkhorn's algorithm."""
    cost = torch.cdist(x, y).square()
    temperature = float(cost.mean())
    f, g = torch.zeros(len(x), 1).to(x), torch.zeros(1, len(y)).to(x)
    for _ in range(SWEEPS):
        temperature = max(COOLING * temperature, TEMPERATURE * x.shape[1] / 2)
        g = -temperature * (torch.logsumexp((f - cost) / temperature, 0, keepdim=True) - math.log(len(x)))
        f = -temperature * (torch.logsumexp((g - cost) / temperature, 1, keepdim=True) - math.log(len(y)))
    return ((f + g - cost) / temperature).softmax(1) @ y


def _covariance(x: Tensor) -> Tensor:
    covariance = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
    return covariance + 1e-8 * covariance.diagonal().mean() * torch.eye(x.shape[1]).to(x)


def _function(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(function(values.clamp_min(1e-12))) @ vectors.mT
