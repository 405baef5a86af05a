# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A mixture of Gaussians that is fitted to the modes of a density."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .gaussian import GaussianFit, ValueAndGradient
from .gaussian_mixture import GaussianMixture
from .guide_posterior import spread_normal
from .importance import smooth
from .modes import Modes, projected

__all__ = ["are_apart", "fit_mixture", "fit_mixtures", "has_several", "max_components"]

_MAX_COMPONENTS = 64
_NEGLIGIBLE = 1e-3  # a share of the posterior that no component is kept for
_MAX_SIZE = 1024  # of components times latents, from nine components on
_STEPS = 150
_MIN_PARTICLES, _MAX_PARTICLES, _RATE, _CUT = 32, 256, 0.3, 3.0  # of each component, as of a Gaussian alone
_NEAR, _APART = 2.0, 3.0  # standard deviations between a Gaussian and a mode that it covers, and between Gaussians
_ROUNDS, _SAMPLES, _LEAST_WEIGHT = 10, 3000, 0.02  # of the estimate of weights


@torch.no_grad()
def fit_mixture(
    value_and_gradient: ValueAndGradient,
    modes: Modes,
    other: GaussianFit | None = None,
    report: Callable[[], bool] | None = None,
) -> GaussianMixture:
    r"""
    Fits a mixture of Gaussians, one at each mode, by ascending its ELBO along natural gradients [1],

        :math:`\mathbf{r} = L_k^T \bigl(\nabla \log p(\mathbf{x}) - \nabla \log q(\mathbf{x})\bigr), \qquad
        \mathbf{x} = \mathbf{m}_k + L_k \epsilon,`

    from which the mean and the factor of a component change as in :func:`~pyro_hollow.infer.gaussian.fit_gaussian`. The
    start is Laplace's approximation of each mode. Then each weight is the share of its component in the posterior, by
    Pareto-smoothed importance samples of the mixture [2]. Components with less than a thousandth are dropped.

    :param value_and_gradient: log densities with shape ``(n,)`` and gradients with shape ``(n, d)`` at points.
    :param Modes modes: the modes of the density, one at least.
    :param GaussianFit other: a Gaussian from elsewhere, which is a component, too, if no mode is near.
    :param report: called after each step; True ends the ascent.
    :return: the mixture; a component may be all that is left.

    References:

    [1] Oleg Arenz, Philipp Dahlinger, Zihan Ye, Michael Volpp, Gerhard Neumann. A Unified Perspective on Natural
    Gradient Variational Inference with Gaussian Mixture Models. [arXiv:2209.11533]

    [2] Olivier Cappé, Randal Douc, Arnaud Guillin, Jean-Michel Marin, Christian P. Robert.
    Adaptive Importance Sampling in General Mixture Classes. [arXiv:0710.4242]
    """
    masses = modes.log_masses
    order = masses.argsort(descending=True)[: max_components(modes.points.shape[-1])]
    order = order[masses[order] > masses.max() + math.log(_NEGLIGIBLE)]
    locs, factors, logs = modes.points[order], modes.scale_trils[order], masses[order]
    if other is not None and not _near(other, modes):
        locs = torch.cat([locs, other.loc.unsqueeze(0).to(locs)])
        factors = torch.cat([factors, other.scale_tril.unsqueeze(0).to(locs)])
        logs = torch.cat([logs, logs.new_full((1,), other.elbo)])
    logs, locs, factors = (each.to(modes.dtype) for each in (logs - logs.max(), locs, factors))
    mixture = GaussianMixture(logs, locs, factors)
    ascent = _Ascent(value_and_gradient, mixture)
    for step in range(_STEPS):
        if report is not None and report():
            break
        mixture = ascent.step(mixture, min(1.0, 0.95 ** (step - _STEPS // 2)))
    return _weighed(value_and_gradient, mixture)


def max_components(dim: int) -> int:
    """The most components of a mixture of so many latents."""
    return min(_MAX_COMPONENTS, max(_MAX_SIZE // dim, 8))


def fit_mixtures(
    value_and_gradient: ValueAndGradient,
    modes: Modes,
    groups: list[Tensor],
    report: Callable[[], bool] | None = None,
) -> GaussianMixture:
    """
    Fits a mixture to each of some groups of latents that are independent of each other. The density may then have more
    modes than any mixture can list: the product of the numbers of the groups' modes.

    :param value_and_gradient: log densities with shape ``(n,)`` and gradients with shape ``(n, d)`` at points.
    :param Modes modes: some modes of the density, among which are all modes of each group.
    :param groups: the indices of the latents of each group.
    :param report: called after each step; True ends the ascent.
    :return: the mixtures side by side.
    """
    d, base = modes.points.shape[-1], modes.points[0].to(modes.dtype)
    parts = []
    for index in groups:

        def function(z: Tensor, index: Tensor = index) -> tuple[Tensor, Tensor]:
            points = base.repeat(len(z), 1)
            points[:, index] = z
            value, gradient = value_and_gradient(points)
            return value, gradient[:, index]

        fitted = fit_mixture(function, projected(modes, index, function), None, report)
        count = len(fitted.locs)
        locs, factors = base.new_zeros(count, d), torch.eye(d).to(base).repeat(count, 1, 1)
        members = torch.zeros(count, d, dtype=torch.bool, device=base.device)
        locs[:, index], members[:, index] = fitted.locs, True
        factors[:, index.unsqueeze(-1), index] = fitted.scale_trils
        parts.append((fitted.log_weights, locs, factors, members))
    log_weights, locs, factors, members = map(torch.cat, zip(*parts, strict=True))
    return GaussianMixture(log_weights, locs, factors, members)


def are_apart(one: GaussianFit, other: GaussianFit) -> bool:
    """True for Gaussians whose means are more than three standard deviations (of their mean covariance) apart."""
    offset = (one.loc - other.loc).unsqueeze(-1)
    covariance = (one.scale_tril @ one.scale_tril.mT + other.scale_tril @ other.scale_tril.mT) / 2
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return bool(failed) or bool(torch.linalg.solve_triangular(factor, offset, upper=False).norm() > _APART)


def has_several(mixture: GaussianMixture) -> bool:
    """True for a mixture whose components do not all lie around the largest one."""
    gaussians = [GaussianFit(*each) for each in zip(mixture.locs, mixture.scale_trils, strict=True)]
    largest = gaussians[int(mixture.log_weights.argmax())]
    return any(are_apart(largest, each) for each in gaussians)


def _near(gaussian: GaussianFit, modes: Modes) -> bool:
    """True if a mode is less than two standard deviations of a Gaussian from its mean."""
    offsets = (modes.points.to(gaussian.loc) - gaussian.loc).mT
    noises = torch.linalg.solve_triangular(gaussian.scale_tril, offsets, upper=False)
    return bool((noises.square().sum(0) < _NEAR**2).any())


class _Ascent:
    """Steps along the natural gradients of all components of a mixture."""

    def __init__(self, value_and_gradient: ValueAndGradient, mixture: GaussianMixture) -> None:
        self._function = value_and_gradient
        dim = mixture.event_shape[0]
        self._size = min(max(dim, _MIN_PARTICLES), _MAX_PARTICLES)
        self._rate = min(_RATE, (1 + math.sqrt(dim / self._size)) ** -2)

    def step(self, mixture: GaussianMixture, annealing: float) -> GaussianMixture:
        """The next mixture; components whose particles have no finite density stay."""
        (count, dim), size, rate = mixture.locs.shape, self._size, self._rate * annealing
        noise = spread_normal(count * size, dim, mixture.locs)
        x = mixture.place(noise, torch.arange(count, device=noise.device).repeat_interleave(size).unsqueeze(-1))
        value, gradient = self._function(x)
        log_q, score = mixture.log_prob_and_score(x)
        noise = noise.view(count, size, dim)
        residual = (gradient - score).view(count, size, dim) @ mixture.scale_trils
        reward = (value - log_q).view(count, size)
        valid = residual.isfinite().all(-1) & reward.isfinite()
        residual = residual.where(valid.unsqueeze(-1), 0.0)
        length = residual.norm(dim=-1)
        cut = (_CUT * length.median(-1, keepdim=True).values / length.clamp(min=1e-30)).clamp(max=1.0)
        residual = residual * cut.unsqueeze(-1)
        shift = rate * residual.mean(1)
        largest = 0.5 * math.sqrt(max(dim, 4))
        shift = shift * (largest / shift.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
        change = (residual.mT @ noise).tril() * (rate / size)
        change.diagonal(dim1=-2, dim2=-1).mul_(0.5)
        change = change * (0.5 / torch.linalg.matrix_norm(change).clamp(min=1e-30)).clamp(max=1.0).view(-1, 1, 1)
        scale = change.diagonal(dim1=-2, dim2=-1)
        locs = mixture.locs + (mixture.scale_trils @ shift.unsqueeze(-1)).squeeze(-1)
        factors = mixture.scale_trils @ (change.tril(-1) + scale.exp().diag_embed())
        mean = (reward.where(valid, 0.0).sum(-1) / valid.sum(-1).clamp(min=1)).where(valid.any(-1), -1.0)
        gain = rate * (mean - mixture.log_weights.exp() @ mean).clamp(-1.0, 1.0)
        return GaussianMixture(mixture.log_weights + gain, locs, factors)


@torch.no_grad()
def _weighed(value_and_gradient: ValueAndGradient, mixture: GaussianMixture) -> GaussianMixture:
    """The mixture with weights by importance sampling and expectation maximisation, without negligible components."""
    floor = math.log(_LEAST_WEIGHT)  # or a component of little weight would have no samples that could raise it
    proposal = GaussianMixture(mixture.log_weights.clamp(min=floor), mixture.locs, mixture.scale_trils)
    x = proposal.place(torch.randn(_SAMPLES, mixture.locs.shape[-1]).to(mixture.locs), proposal.stratify(_SAMPLES))
    log_weights = (value_and_gradient(x)[0].double() - proposal.log_prob(x).double()).nan_to_num(nan=-math.inf)
    if log_weights.max() == -math.inf:
        return mixture
    weights = smooth(log_weights.cpu()).weights.to(x.device)
    for _ in range(_ROUNDS):
        shares = mixture.explain(x)[2].exp().to(weights) @ weights
        kept = shares > _NEGLIGIBLE
        mixture = GaussianMixture(shares[kept].log().to(x), mixture.locs[kept], mixture.scale_trils[kept])
    return mixture
