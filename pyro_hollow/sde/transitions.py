# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Transitions of :math:`dx = -\nabla \Psi(x) \, dt + \sigma \, dW` over a gap of time, by local linearisation: with the
Hessian H at the middle of a step, the flow of the linearised drift is exact, and so is its covariance
:math:`\int_0^h e^{-H s} \Sigma e^{-H s} \, ds`. For a quadratic potential there is no error at all.

References:

[1] Isao Shoji, Tohru Ozaki. Estimation for nonlinear stochastic differential equations by a local linearization method.
Stochastic Analysis and Applications 16, 1998.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .potentials import PotentialBasis

__all__ = ["Transition", "cholesky", "noise_directions", "transition"]

#: The largest exponent of growth in a step; particles on a ridge leave it by less in any case.
MAX_GROWTH = 10.0


class Transition(NamedTuple):
    r"""
    A Gaussian for each particle, :math:`\mathcal{N}(F, \sum_g v_g V_g)`, where the variance v has one value, or one per
    coordinate.

    :ivar mean: F with shape ``(n, d)``.
    :ivar covariances: V with shape ``(n, g, d, d)``.
    :ivar slopes: derivatives of F with respect to coefficients and variances, ``(n, d, m + g)``; None if not asked for.
    """

    mean: Tensor
    covariances: Tensor
    slopes: Tensor | None

    def covariance(self, variance: Tensor) -> Tensor:
        """The covariances with shape ``(n, d, d)``."""
        return torch.einsum("g,ngij->nij", variance, self.covariances)


def noise_directions(d: int, diagonal: bool) -> Tensor:
    """Covariances of the noise, per unit of variance and time, with shape ``(1, d, d)`` or ``(d, d, d)``."""
    eye = torch.eye(d, dtype=torch.float64)
    return torch.diag_embed(eye) if diagonal else eye.unsqueeze(0)


class _Linear:
    """The flow of a drift that was linearised, from eigenvalues of the Hessian."""

    def __init__(self, hessian: Tensor, h: float) -> None:
        growth, self.vectors = torch.linalg.eigh(-hessian)
        self.growth, self.h = growth.clamp(max=MAX_GROWTH / h), h
        self.factor = (self.growth * h).exp()

    def flow(self, v: Tensor) -> Tensor:
        """exp(J h) v for v with shape ``(n, d, k)``."""
        return self.vectors @ (self.factor.unsqueeze(-1) * (self.vectors.mT @ v))

    def integral(self, v: Tensor) -> Tensor:
        """The integral of exp(J s) v over the step."""
        return self.vectors @ (_integral(self.growth, self.h).unsqueeze(-1) * (self.vectors.mT @ v))

    def covariances(self, noise: Tensor) -> Tensor:
        """The integral of exp(J s) Sigma exp(J s), for each Sigma of shape ``(g, d, d)``."""
        pairs = _integral(self.growth.unsqueeze(-1) + self.growth.unsqueeze(-2), self.h)
        q = self.vectors.unsqueeze(1)
        return q @ ((q.mT @ noise @ q) * pairs.unsqueeze(1)) @ q.mT


def _integral(rate: Tensor, h: float) -> Tensor:
    small = (rate * h).abs() < 1e-8
    return torch.where(small, h, torch.expm1(rate * h) / torch.where(small, 1.0, rate))


def cholesky(covariance: Tensor) -> Tensor:
    """The factors of covariances that may be close to singular, such as those of particles on a ridge."""
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    return torch.linalg.cholesky(covariance + 1e-10 * trace[:, None, None] * eye)


def transition(
    basis: PotentialBasis, c: Tensor, variance: Tensor, x: Tensor, gap: float, noise: Tensor, *, steps: int = 1,
    draws: Tensor | None = None, slopes: bool = False,
) -> Transition:  # fmt: skip
    r"""
    The Gaussian transition over a gap.

    :param basis: the functions of the potential.
    :param Tensor c: its coefficients.
    :param Tensor variance: v with shape ``(g,)``.
    :param Tensor x: the particles with shape ``(n, d)``.
    :param float gap: the time.
    :param Tensor noise: the covariance per unit of each variance, with shape ``(g, d, d)``.
    :param int steps: the number of steps in each part of the gap.
    :param draws: standard normal numbers with shape ``(parts - 1, n, d)``: the gap is cut in equal parts, and noise is
        drawn at the end of all but the last, so that only that one has to be short enough for a Gaussian. None for one
        part.
    :param bool slopes: compute the derivatives, too.
    """
    n, d, parts = len(x), x.shape[1], 1 if draws is None else len(draws) + 1
    h = gap / (parts * steps)
    tangent = x.new_zeros(n, d, len(c) + len(variance)) if slopes else None
    for part in range(parts):
        covariances = x.new_zeros(n, len(variance), d, d)
        for _ in range(steps):
            gradient, hessian = basis.derivatives(c, x)
            middle = x - _Linear(hessian, h / 2).integral(gradient.unsqueeze(-1)).squeeze(-1)
            gradient, hessian = basis.derivatives(c, middle)
            linear = _Linear(hessian, h)
            force = torch.einsum("nij,nj->ni", hessian, middle - x) - gradient
            x = x + linear.integral(force.unsqueeze(-1)).squeeze(-1)
            flow = linear.flow(torch.eye(d).to(x).expand(n, d, d))
            flows = flow.unsqueeze(1)
            covariances = flows @ covariances @ flows.mT + linear.covariances(noise)
            if tangent is not None:
                tangent = flow @ tangent
                tangent[..., : len(c)] -= linear.integral(basis.slopes(middle))
        if draws is not None and part < parts - 1:
            root = cholesky(torch.einsum("g,ngij->nij", variance, covariances))
            x = x + (root @ draws[part].unsqueeze(-1)).squeeze(-1)
            if tangent is not None:
                tangent[..., len(c) :] += _root_slopes(root, covariances, draws[part])
    return Transition(x, covariances, tangent)


def _root_slopes(root: Tensor, covariances: Tensor, draws: Tensor) -> Tensor:
    """Derivatives of the Cholesky factor times draws with respect to the variances, with shape ``(n, d, g)``."""
    factor = root.unsqueeze(1)
    inner = torch.linalg.solve_triangular(factor, covariances, upper=False)
    inner = torch.linalg.solve_triangular(factor, inner.mT, upper=False).tril()
    inner = inner - 0.5 * torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    return (factor @ inner @ draws[:, None, :, None]).squeeze(-1).mT
