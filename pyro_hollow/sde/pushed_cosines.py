# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Moments that compare samples at one time with those at the time before, pushed through the transition,

    :math:`g_w = \frac{1}{n'} \sum_j e^{i w \cdot y_j} - \frac{1}{n} \sum_i e^{i w \cdot F(x_i) - w^T V(x_i) w / 2},`

their covariance, and the fit of a potential and of variances by Gauss-Newton. No path is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .potentials import PotentialBasis
from .transitions import Transition, cholesky, transition

__all__ = ["Estimate", "Objective", "Snapshots", "fit_moments", "update_ridge"]

#: Prior precisions: of free functions, of bands not in use yet, and the range of those in use.
FREE, CLOSED, RANGE = 1e-6, 1e8, (1e-4, 1e8)
#: The smallest variance of a combination of waves that is used, in units of the largest.
SMALLEST = 1e-3
#: How often a step is shortened at most.
MAX_DAMPINGS = 8


@dataclass(frozen=True)
class Snapshots:
    """
    Samples at several times, in standard units.

    :ivar x: one tensor for each time, with shape ``(n_k, d)``.
    :ivar gaps: the time between each and the next.
    :ivar overlap: 1 / N if the samples show the same N particles, 0 if each is a fresh one.
    :ivar noise: covariances per unit of the variances, with shape ``(g, d, d)``.
    """

    x: list[Tensor]
    gaps: list[float]
    overlap: float
    noise: Tensor
    basis: PotentialBasis

    def push(
        self, k: int, c: Tensor, v: Tensor, *, steps: int = 1, draws: Tensor | None = None, slopes: bool = False
    ) -> Transition:
        """The transition over gap k."""
        return transition(
            self.basis, c, v, self.x[k], self.gaps[k], self.noise, steps=steps, draws=draws, slopes=slopes
        )

    def thin(self, size: int) -> Snapshots:
        """The first few samples of each time, as fresh ones."""
        return replace(self, x=[x[:size] for x in self.x], overlap=0.0)


@dataclass(frozen=True)
class Estimate:
    """
    A point of the fit.

    :ivar c: coefficients of the potential.
    :ivar v: variances with shape ``(g,)``.
    :ivar precision: prior precision of each coefficient.
    :ivar chi2: the squared length of the whitened moments.
    :ivar loss: chi2, the prior's penalty and, for the same particles, the log-determinant of the covariance.
    :ivar effective: the effective number of coefficients.
    """

    c: Tensor
    v: Tensor
    precision: Tensor
    chi2: float = math.inf
    loss: float = math.inf
    effective: float = 0.0
    converged: bool = field(default=False, compare=False)


class Objective:
    """
    The moments of all gaps as a function of coefficients and variances.

    :param data: the samples.
    :param waves: frequencies w of each gap, with shape ``(m, d)`` each.
    :param plan: parts and steps of each gap, see :func:`~pyro_hollow.sde.transitions.transition`.
    :param generator: draws the noise, which stays the same for all evaluations.
    """

    def __init__(
        self, data: Snapshots, waves: list[Tensor], plan: list[tuple[int, int]], generator: torch.Generator
    ) -> None:
        self.data, self.waves, self.plan = data, waves, plan
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        shapes = [x.shape for x in data.x[:-1]]
        self.draws = [normal(k - 1, *s) if k > 1 else None for (k, _), s in zip(plan, shapes, strict=True)]
        self.last_draws = [normal(2, *s) for s in shapes]
        seen = [_waves(y, w) for y, w in zip(data.x[1:], waves, strict=True)]
        self.maps = [_principal(phi) for phi in seen]
        self.observed = [phi @ map for phi, map in zip(seen, self.maps, strict=True)]
        self.count = sum(phi.shape[1] for phi in self.observed)

    def freedom(self, estimate: Estimate) -> float:
        """The degrees of freedom that an estimate leaves to chi^2."""
        return max(self.count - estimate.effective, self.count / 4)

    def push(self, k: int, c: Tensor, v: Tensor, slopes: bool = False) -> Transition:
        """The transition over gap k."""
        return self.data.push(k, c, v, steps=self.plan[k][1], draws=self.draws[k], slopes=slopes)

    def residual(self, c: Tensor, v: Tensor) -> Tensor:
        """The moments g with shape ``(count,)``."""
        found = []
        for k, (w, phi) in enumerate(zip(self.waves, self.observed, strict=True)):
            found.append(phi.mean(0) - _expected(self.push(k, c, v), v, w)[0].mean(0) @ self.maps[k])
        return torch.cat(found)

    def linearise(self, c: Tensor, v: Tensor, slopes: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """The moments, their covariance, and their derivatives with respect to c and v."""
        moments, rows, conditional, means = [], [], [], []
        for k, (w, phi) in enumerate(zip(self.waves, self.observed, strict=True)):
            pushed = self.push(k, c, v, slopes)
            m, quadratic = _expected(pushed, v, w)
            if slopes:
                rows.append(-self.maps[k].T @ _mean_slopes(pushed, m, quadratic, w, len(c)))
            m = m @ self.maps[k]
            moments.append(phi.mean(0) - m.mean(0))
            means.append(m - m.mean(0))
            if self.data.overlap:
                root = cholesky(pushed.covariance(v))
                y = pushed.mean + torch.einsum("nij,rnj->rni", root, self.last_draws[k])
                conditional.append((_waves(y, w) @ self.maps[k] - m).flatten(0, 1))
        jacobian = torch.cat(rows) if slopes else torch.empty(0)
        return torch.cat(moments), self._covariance(conditional, means), jacobian

    def crude_covariance(self) -> Tensor:
        """The covariance of the moments if samples at all times had the same distribution, without correlations."""
        sizes = [1 / len(x) + 1 / len(y) for x, y in zip(self.data.x[:-1], self.data.x[1:], strict=True)]
        counts = torch.tensor([phi.shape[1] for phi in self.observed])
        return torch.diag(torch.tensor(sizes, dtype=torch.float64).repeat_interleave(counts))

    def _covariance(self, conditional: list[Tensor], means: list[Tensor]) -> Tensor:
        r"""
        The covariance of the moments. Samples at time k enter the moments of the gaps before and after it, so that
        their covariance counts for both, times 1 / n_k - nu with the overlap nu; and nu times E[Cov(phi(Y) | x)].
        """
        nu, total = self.data.overlap, torch.zeros(self.count, self.count, dtype=torch.float64)
        ends = [0]
        for m in means:
            ends.append(ends[-1] + m.shape[1])
        for k, x in enumerate(self.data.x):
            if k and nu:
                r, here = conditional[k - 1], slice(ends[k - 1], ends[k])
                total[here, here] += nu * (r.T @ r) / len(r)
            if 1 / len(x) > nu:
                target = [self.observed[k - 1] - self.observed[k - 1].mean(0)] if k else []
                both = torch.cat([*target, *(-m for m in means[k : k + 1])], -1)
                here = slice(ends[max(k - 1, 0)], ends[min(k + 1, len(means))])
                total[here, here] += both.T @ both / len(x) * (1 / len(x) - nu)
        diagonal = total.diagonal()
        diagonal += 1e-5 * diagonal
        return total


def _waves(y: Tensor, w: Tensor) -> Tensor:
    phase = y @ w.T
    return torch.cat([phase.cos(), phase.sin()], -1)


def _principal(phi: Tensor) -> Tensor:
    """The map to uncorrelated combinations of unit variance, without those that samples hardly tell from constants."""
    values, vectors = torch.linalg.eigh(torch.cov(phi.T))
    kept = values > SMALLEST * values[-1]
    return vectors[:, kept] / values[kept].sqrt()


def _expected(pushed: Transition, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Expected waves with shape ``(n, 2 m)``, and w V w with shape ``(n, g, m)``."""
    products = (w.unsqueeze(-1) * w.unsqueeze(-2)).flatten(1)
    quadratic = pushed.covariances.flatten(2) @ products.T
    damping = torch.exp(-0.5 * torch.einsum("g,ngm->nm", v, quadratic))
    return _waves(pushed.mean, w) * damping.repeat(1, 2), quadratic


def _mean_slopes(pushed: Transition, m: Tensor, quadratic: Tensor, w: Tensor, count: int) -> Tensor:
    """Derivatives of the mean of the expected waves, with shape ``(2 m, coefficients + variances)``."""
    assert pushed.slopes is not None
    cos, sin = m.chunk(2, -1)
    n, d = pushed.mean.shape
    rows = []
    for wave in (-sin, cos):
        weighted = torch.einsum("nm,mi->mni", wave, w).reshape(len(w), n * d)
        rows.append(weighted @ pushed.slopes.reshape(n * d, -1) / n)
    result = torch.cat(rows)
    result[:, count:] -= 0.5 * torch.cat([torch.einsum("nm,ngm->mg", part, quadratic) for part in (cos, sin)]) / n
    return result


def fit_moments(
    objective: Objective, start: Estimate, *, steps: int, held: int | slice | None = None, evidence: bool = True,
    tolerance: float = 0.02, crude: bool = False,
) -> Estimate:  # fmt: skip
    """
    Gauss-Newton on the whitened moments, whose covariance is evaluated anew in each step, with a ridge that the
    evidence chooses for each band of functions. For the same particles the covariance is proportional to the variances,
    which are scaled in each step so that chi^2 is the number of degrees of freedom.

    :param objective: the moments.
    :param start: where to start.
    :param int steps: the largest number of steps.
    :param held: index or slice of variances that are kept; None for none.
    :param bool evidence: choose the ridge anew in each step.
    :param bool crude: weigh the moments by their variance under equal distributions instead, which is smoother.
    :param float tolerance: stop when a step gains less than this.
    """
    c, v, precision = start.c, start.v, start.precision
    free = torch.ones(len(v), dtype=torch.bool)
    if held is not None:
        free[held] = False
    scaled = bool(objective.data.overlap) and held is None
    if scaled:  # the moments' covariance tells more about the variances than the moments do, and Gauss-Newton holds it
        free[:] = False
    best, damping = start, 0.0
    for step in range(steps + 1):
        last = step == steps or (best.converged and best is not start)
        g, covariance, jacobian = objective.linearise(c, v, not last)
        factor = torch.linalg.cholesky(objective.crude_covariance() if crude else covariance)
        r = _whiten(factor, g)
        chi2 = float(r @ r)
        logdet = 2 * float(factor.diagonal().log().sum()) if objective.data.overlap else 0.0
        loss = chi2 + float(precision @ c.square())
        if (
            scaled and step and loss + logdet > best.loss + 1
        ):  # scaling has left the basin: back, with the variance held
            c, v, scaled = best.c, best.v, False
            if not last:
                continue
            return best
        best = replace(best, c=c, v=v, precision=precision, chi2=chi2, loss=loss + logdet)
        if last:
            break
        slopes = _whiten(factor, jacobian[:, torch.cat([torch.ones(len(c), dtype=torch.bool), free])])
        c, v, root, new_loss, damping = _step(objective, best, factor, r, slopes, free, damping)
        best = replace(best, converged=loss - new_loss < tolerance)
        penalty = float(precision @ c.square())
        if evidence:
            posterior = torch.cholesky_inverse(root).diagonal()[: len(c)]
            precision, effective = update_ridge(objective.data.basis, precision, c, posterior)
            best = replace(best, effective=effective)
        if scaled:
            ratio = (new_loss - penalty) / objective.freedom(best)
            v = v * min(max(ratio, 1 / 3), 3.0)
            best = replace(best, converged=best.converged and abs(math.log(ratio)) < 0.02)
    return best


def _whiten(factor: Tensor, a: Tensor) -> Tensor:
    columns = a if a.dim() == 2 else a.unsqueeze(-1)
    return torch.linalg.solve_triangular(factor, columns, upper=False).view(a.shape)


def _step(
    objective: Objective, at: Estimate, factor: Tensor, r: Tensor, slopes: Tensor, free: Tensor, damping: float
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """
    A damped Gauss-Newton step for whitened moments r: coefficients and variances, the factor of the normal matrix, the
    loss for the same covariance, and the next damping.
    """
    c, v, precision = at.c, at.v, at.precision
    size, loss = len(c), float(r @ r + precision @ c.square())
    ridge = torch.cat([precision, torch.zeros(int(free.sum()), dtype=torch.float64)])
    normal = slopes.T @ slopes
    gradient = slopes.T @ r
    gradient[:size] += precision * c
    for _ in range(MAX_DAMPINGS):
        root = torch.linalg.cholesky(normal + torch.diag(ridge + (damping + 1e-10) * normal.diagonal()))
        delta = -torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)
        c_new, v_new = c + delta[:size], v.clone()
        v_new[free] = torch.clamp(v[free] + delta[size:], v[free] / 3, v[free] * 3)
        error = _whiten(factor, objective.residual(c_new, v_new))
        new = float(error @ error + precision @ c_new.square())
        if new < loss:
            return c_new, v_new, root, new, damping / 10 if damping > 1e-4 else 0.0
        damping = max(4 * damping, 1e-3)
    return c, v, root, loss, damping


def update_ridge(basis: PotentialBasis, precision: Tensor, c: Tensor, posterior: Tensor) -> tuple[Tensor, float]:
    """MacKay's update of the precision of each band that is in use, and the effective number of coefficients."""
    precision, effective = precision.clone(), float((basis.band < 0).sum())
    for band in range(basis.num_bands):
        members = basis.band == band
        if float(precision[members][0]) >= CLOSED:
            continue
        gamma = float(members.sum() - (precision[members] * posterior[members]).sum())
        gamma = max(gamma, 1e-3)
        effective += gamma
        precision[members] = min(max(gamma / float(c[members].square().sum() + 1e-12), RANGE[0]), 0.9 * RANGE[1])
    return precision, effective
