# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A Gaussian that is fitted to a density by natural gradients, the start of a flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .guide_posterior import spread_normal

__all__ = ["GaussianFit", "fit_gaussian"]

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

_MIN_PARTICLES, _MAX_PARTICLES = 32, 256
_BLOCK = 25  # steps, after which progress is judged
_MAX_RATE = 0.3
_TRUST = 0.5  # the most that a step moves the mean, in units of sqrt(d) / 2 standard deviations, and changes the factor
_STRAIGHT, _GROWTH = 0.8, 1.5  # the cosine of steps in one direction, and the growth of the region along it
_CUT = 3.0  # gradients of particles are at most so many times as long as the median one
_ANNEALING_STEPS, _ANNEALING = 100, 0.98
_MAX_RETREATS = 6


@dataclass
class GaussianFit:
    """
    A fitted Gaussian.

    :ivar Tensor loc: the mean with shape ``(d,)``.
    :ivar Tensor scale_tril: the Cholesky factor of the covariance, with shape ``(d, d)``.
    :ivar float elbo: the evidence lower bound, an average over the last steps.
    :ivar int num_steps: the number of steps.
    :ivar int num_retreats: the number of times that the best state was restored and the rate halved.
    :ivar bool interrupted: ``Ctrl-C`` ended the ascent.
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: float = -math.inf
    num_steps: int = 0
    num_retreats: int = 0
    interrupted: bool = False


@torch.no_grad()
def fit_gaussian(
    value_and_gradient: ValueAndGradient,
    start: GaussianFit,
    max_steps: int = 600,
    report: Callable[[int, float], bool] | None = None,
) -> GaussianFit:
    r"""
    Fits a Gaussian :math:`\mathcal{N}(\mu, L L^T)` by ascending its ELBO along the natural gradient, which does not
    depend on the coordinates [1],

        :math:`\mu \leftarrow \mu + a L \, \mathbb{E} \, r, \qquad
        L \leftarrow L \exp_\mathrm{diag} \bigl(a \, \mathrm{tril}(\mathbb{E} \, r \epsilon^T)\bigr), \qquad
        r = L^T \nabla \log p(\mu + L \epsilon) + \epsilon,`

    where tril halves the diagonal. The estimate r is the path gradient in the coordinates of the Gaussian: it vanishes
    for every particle where the density is Gaussian and the fit is exact. The more latents there are per particle, the
    noisier is the estimated matrix, and the lower is the rate a. A step is confined to a trust region. A block of 25
    steps whose median log weight falls far below that of the best block is taken back, and the rate halved.

    :param value_and_gradient: log densities with shape ``(P,)`` and gradients with shape ``(P, d)`` at points.
    :param start: the Gaussian to start from.
    :param int max_steps: the largest number of steps.
    :param report: called after each block with the number of steps and the ELBO; True ends the ascent.
    :return: the best Gaussian found. It is the start if the density is finite nowhere.

    References:

    [1] Mohammad Emtiyaz Khan, Haavard Rue. The Bayesian Learning Rule. [arXiv:2107.04562]
    """
    fitted, interrupted = _Ascent(value_and_gradient, start), False
    try:
        _ascend(fitted, max_steps, report)
    except KeyboardInterrupt:
        interrupted = True
    return replace(fitted.result(), interrupted=interrupted)


def _ascend(fitted: _Ascent, max_steps: int, report: Callable[[int, float], bool] | None) -> None:
    """Takes blocks of steps until they gain nothing, and some with a rate that falls."""
    stop, annealing = max_steps, False
    recent: list[float] = []
    while fitted.num_steps < stop and fitted.retreats <= _MAX_RETREATS:
        score = fitted.block(_ANNEALING if annealing else 1.0)
        if score is None:
            recent = []
            continue
        if report is not None and report(fitted.num_steps, fitted.elbo):
            break
        recent.append(score)
        tolerance = 0.05 * math.sqrt(fitted.dim / 10)
        stalls = len(recent) >= 4 and (sum(recent[-2:]) - sum(recent[-4:-2])) / 2 < tolerance
        if not annealing and (stalls or fitted.num_steps >= max_steps - _ANNEALING_STEPS):
            annealing, stop = True, fitted.num_steps + _ANNEALING_STEPS


class _Ascent:
    """The state of an ascent, in blocks of steps."""

    def __init__(self, value_and_gradient: ValueAndGradient, start: GaussianFit) -> None:
        self._function = value_and_gradient
        self.dim = len(start.loc)
        self._particles = min(max(self.dim, _MIN_PARTICLES), _MAX_PARTICLES)
        self._rate = min(_MAX_RATE, (1 + math.sqrt(self.dim / self._particles)) ** -2)
        self._loc, self._factor = start.loc, start.scale_tril
        self._radius, self._shift = 0.0, torch.zeros_like(start.loc)
        self._best = -math.inf, start.loc, start.scale_tril, -math.inf
        self.num_steps = self.retreats = 0
        self.elbo = self._score = -math.inf

    def block(self, annealing: float) -> float | None:
        """A block of steps; its median log weight, or None if it was taken back."""
        before = self._loc, self._factor
        weights = []
        for _ in range(_BLOCK):
            weights.append(self._step())
            self._rate = max(self._rate * annealing, 1e-3)
        self.num_steps += _BLOCK
        late = torch.stack(weights[_BLOCK // 2 :])
        self._score, self.elbo = late.median(-1).values.mean().item(), late.mean().item()
        finite = bool(self._loc.isfinite().all()) and bool(self._factor.isfinite().all())
        best = self._best[0]
        if best == -math.inf and finite:
            self._best = self._score, *before, self.elbo
        elif not finite or not self._score > best - max(20.0, 0.2 * abs(best)):
            _, self._loc, self._factor, _ = self._best
            self._radius, self._shift = 0.0, torch.zeros_like(self._loc)
            self._rate /= 2
            self.retreats += 1
            return None
        if self._score >= self._best[0]:
            self._best = self._score, self._loc, self._factor, self.elbo
        return self._score

    def _step(self) -> Tensor:
        """One step; the log weights of its particles."""
        loc, factor = self._loc, self._factor
        noise = spread_normal(self._particles, self.dim, loc)
        value, gradient = self._function(loc + noise @ factor.mT)
        entropy = 0.5 * self.dim * math.log(2 * math.pi) + factor.diagonal().double().log().sum()
        weights = value.double() + 0.5 * noise.double().square().sum(-1) + entropy
        residual = gradient @ factor + noise
        valid = residual.isfinite().all(-1) & weights.isfinite()
        if not bool(valid.any()):
            return torch.full_like(weights, -1e30)
        length = residual.norm(dim=-1).where(valid, 1.0)
        cut = (_CUT * length[valid].median() / length.clamp(min=1e-30)).clamp(max=1.0).where(valid, 0.0)
        residual = residual.where(valid.unsqueeze(-1), 0.0) * cut.unsqueeze(-1)
        shift = self._rate * residual.mean(0)
        change = (residual.mT @ noise).tril() * (self._rate / self._particles)
        change.diagonal().mul_(0.5)
        shift *= self._trust(shift)
        change *= (_TRUST / _spectral_norm(change).clamp(min=1e-30)).clamp(max=1.0)
        self._loc = loc + factor @ shift
        self._factor = factor @ (change.tril(-1) + change.diagonal().exp().diag())
        return weights.where(valid, -1e30)

    def _trust(self, shift: Tensor) -> float:
        """
        The factor that confines a step of the mean. The region grows while one step after the other leaves it in one
        direction, for a density that is far away and narrow.
        """
        length, before = shift.norm().item(), self._shift
        cosine = torch.dot(shift, before).item() / max(length * before.norm().item(), 1e-30)
        if cosine > _STRAIGHT and length > self._radius:
            self._radius *= _GROWTH
        elif cosine < _STRAIGHT:
            self._radius = max(self._radius / _GROWTH**2, _TRUST * math.sqrt(max(self.dim, 4)))
        self._shift = shift.clone()
        return min(1.0, self._radius / max(length, 1e-30))

    def result(self) -> GaussianFit:
        """The latest Gaussian, or the best one if the latest is far worse."""
        best, loc, factor, elbo = self._best
        if math.isfinite(self._score) and self._score >= best - max(1.0, 0.02 * abs(best)):
            loc, factor, elbo = self._loc, self._factor, self.elbo
        return GaussianFit(loc, factor, elbo, self.num_steps, self.retreats)


def _spectral_norm(matrix: Tensor) -> Tensor:
    """The largest singular value, by a few iterations."""
    vector = torch.ones(matrix.shape[1]).to(matrix) + torch.rand(matrix.shape[1]).to(matrix)
    for _ in range(6):
        vector = matrix.mT @ (matrix @ vector)
        vector = vector / vector.norm().clamp(min=1e-30)
    return (matrix @ vector).norm()
