# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Potential and diffusion of a gradient flow with noise, :math:`dx = -\nabla \Psi(x) \, dt + \sigma \, dW`, from samples
at several times.

**What can be learned.** For a drift that is the gradient of a potential free of time, and a constant diffusion, the law
of the process is determined by its marginals if they are not in equilibrium [1]. Samples say less: where they are few,
or times so close that noise moves the particles by less than sampling errors do, a wide range of variances fits. The
profile of the fit tells the range.

References:

[1] Vincent Guan, Joseph Janssen, Nicolas Lanzetti, Antonio Terpin, et al. Identifying drift, diffusion, and causal
structure of gradient flows from marginals, 2025. [arXiv:2505.21770]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyro_hollow.nn.standardization import check_finite
from pyro_hollow.train.progress import Progress

from .assignments import fit_assignments
from .diagonal_sde import DiagonalSDE
from .identification import fit_stages, make_plan, profile_interval
from .potentials import PotentialBasis
from .pushed_cosines import Estimate, Snapshots
from .transitions import noise_directions

__all__ = ["GradientFlowFit", "fit_gradient_flow"]

#: The fewest particles of a time; chi^2 per moment that a fit should not exceed.
FEWEST, MISFIT = 50, 1.5
#: The ratio of the ends of an interval, and chi^2 per moment, up to which a variance counts as identified.
BOUNDED, WRONG = 2.0, 2.0
#: Factors by which the two starts of the assignments differ from the variance of the moments, and by which their
#: results may differ from each other, and from the interval of the moments.
EM_STARTS, EM_SPREAD, OUTSIDE = (2.0, 0.5), 1.2, 1.25


@dataclass(frozen=True)
class GradientFlowFit:
    r"""
    A potential and the variance :math:`\sigma^2` per time of the noise, with the range that the data leave to it.

    :ivar variance: the estimate, a scalar, or with shape ``(d,)`` for a diagonal diffusion; in units of x squared per
        time.
    :ivar variance_interval: lower and upper ends of the 95 % profile set, of the same shape. It reaches 0 or infinity
        if the data do not bound it. For the same particles it is that of the moments, so wider than the error of the
        estimate by assignments.
    :ivar identified: whether the data bound every variance away from 0 and infinity, to within a factor of 2, by a
        model that fits.
    :ivar chi2_per_moment: near 1 if the model fits.
    :ivar warnings: what did not go well, one sentence each.
    """

    variance: Tensor
    variance_interval: tuple[Tensor, Tensor]
    identified: bool
    chi2_per_moment: float
    same_particles: bool
    sizes: tuple[int, ...]
    warnings: tuple[str, ...]
    _basis: PotentialBasis = field(repr=False)
    _c: Tensor = field(repr=False)
    _loc: Tensor = field(repr=False)
    _scale: Tensor = field(repr=False)
    _time: float = field(repr=False)
    _stiffness: Tensor = field(repr=False)

    def _standard(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != len(self._loc):
            raise ValueError(f"x must have shape (*, {len(self._loc)}), but got {tuple(x.shape)}")
        return ((x.to(self._loc) - self._loc) / self._scale).reshape(-1, len(self._loc))

    def potential(self, x: Tensor) -> Tensor:
        r"""
        :math:`\Psi`, up to a constant, with shape ``(*,)``. Outside of the box of the data the fitted functions level
        off within half the box's half width, and a parabola takes over that is as stiff as :math:`\Psi` is in the mean
        over the data.

        :param Tensor x: positions with shape ``(*, d)``.
        """
        z = self._standard(x)
        inside, beyond = self._basis.values(z) @ self._c, self._stiffness * self._basis.beyond(z)[0]
        return ((inside + beyond) * self._scale.square() / self._time).reshape(x.shape[:-1]).to(x.dtype)

    def drift(self, x: Tensor) -> Tensor:
        r"""
        :math:`-\nabla \Psi(x)`, in units of x per time, with the shape of x; see :meth:`potential`.

        :param Tensor x: positions with shape ``(*, d)``.
        """
        z = self._standard(x)
        gradient = self._basis.derivatives(self._c, z)[0] + self._stiffness * self._basis.beyond(z)[1]
        return (-gradient * self._scale / self._time).reshape(x.shape).to(x.dtype)

    @property
    def sde(self) -> DiagonalSDE:
        """The equation, to simulate."""
        return DiagonalSDE(lambda t, x: self.drift(x), self.variance.sqrt())

    def __str__(self) -> str:
        low, high = self.variance_interval
        kind = "the same particles" if self.same_particles else "fresh particles"
        sizes = f"{min(self.sizes)}" if len(set(self.sizes)) == 1 else f"{min(self.sizes)} to {max(self.sizes)}"
        lines = [f"Gradient flow in {len(self._loc)} dimensions from {len(self.sizes)} times with {sizes} of {kind}"]
        rows = zip(*(v.reshape(-1).tolist() for v in (self.variance, low, high)), strict=True)
        for k, (value, a, b) in enumerate(rows):
            name = "Variance per time" if self.variance.dim() == 0 else f"Variance per time of coordinate {k}"
            lines.append(f"{name}: {value:.4g}, 95 % between {a:.4g} and {b:.4g}")
        lines.append(
            "The data identify it." if self.identified else
            "The data do not identify it: equilibrium, few particles, times too close, or a model that does not fit."
        )  # fmt: skip
        lines.append(f"chi^2 per moment: {self.chi2_per_moment:.2f} (near 1 if the model fits)")
        return "\n".join([*lines, *(f"Warning: {text}" for text in self.warnings)])


def fit_gradient_flow(
    t: Tensor | Sequence[float],
    x: Tensor | Sequence[Tensor],
    *,
    same_particles: bool = False,
    diagonal: bool = False,
    seed: int | None = None,
    progress: bool = True,
) -> GradientFlowFit:
    r"""
    Learns the potential and the noise of :math:`dx = -\nabla \Psi(x) \, dt + \sigma \, dW` from samples at several
    times, without pairs, and tells what the data say about the noise.

    The potential is a sum of polynomials to degree 4 and of cosines whose ridge the evidence chooses; in more than four
    dimensions it is a sum of functions of one coordinate and of products of two. Transitions are exact for quadratic
    potentials. The fit compares means of cosines at each time with those that the particles of the time before
    predict, weighted by their covariance, in stages of rising frequency and from several starts. A profile of the same
    :math:`\chi^2`, with the potential fitted anew for each variance, gives the interval.

    If the particles are the same at all times, expectation-maximisation of their assignments goes on from there, from a
    higher and from a lower variance. It is many times as precise where the noise of a gap is about as large as the
    distance to the nearest neighbour, and wrong for fresh particles.

    Example usage:

    >>> t, x = [0.0, 0.1, 0.2], torch.randn(3, 500, 2) * torch.tensor([2.0, 1.2, 0.8])[:, None, None]
    >>> fit = fit_gradient_flow(t, x, seed=0, progress=False)  # doctest: +SKIP

    :param t: the times, two or more that increase, with shape ``(n,)``.
    :param x: the particles with shape ``(n, N, d)``, or a list of n tensors with shapes ``(N_k, d)``, whose units
        should be alike in all coordinates. The order of rows does not matter. For the same particles, a row of NaN is
        one that is missing at a time, at random.
    :param bool same_particles: the particles are the same ones at all times, in unknown order, rather than fresh ones.
    :param bool diagonal: one variance per coordinate instead of one for all.
    :param seed: seed of the random frequencies; None for one from torch's generator.
    :param bool progress: show a progress bar.
    :raises ValueError: for times that are fewer than two, not finite or do not increase, other shapes or types, values
        that are not finite, fewer than 50 particles at a time, and a coordinate that is constant.
    :warns UserWarning: if the data do not identify the variance, the model does not fit, or the checks of the
        assignments fail.
    """
    times, particles, total = _checked(t, x, same_particles)
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.cat(particles)
    loc, scale = pooled.mean(0), pooled.var(0, correction=0).mean().sqrt()
    unit = float((times[1:] - times[:-1]).median())
    standard = [((y - loc) / scale)[torch.randperm(len(y), generator=generator)] for y in particles]
    data = Snapshots(
        standard, ((times[1:] - times[:-1]) / unit).tolist(), 1 / total if same_particles else 0.0,
        noise_directions(pooled.shape[1], diagonal), PotentialBasis(torch.cat(standard), generator),
    )  # fmt: skip
    with Progress(desc="gradient flow", disable=not progress) as bar:

        def report(stage: str) -> None:
            bar.set_postfix_str(stage, refresh=False)
            bar.update()

        found = _estimate(data, generator, report)
    estimate, low, high, chi2, notes = found
    for text in notes:
        warnings.warn(text, stacklevel=2)
    rate = float(scale.square()) / unit
    shape = (lambda v: v * rate) if diagonal else (lambda v: v[0] * rate)
    hessian = data.basis.derivatives(estimate.c, torch.cat(standard))[1].diagonal(dim1=-2, dim2=-1)
    return GradientFlowFit(
        shape(estimate.v), (shape(low), shape(high)), _identified(low, high, chi2), chi2, same_particles,
        tuple(len(y) for y in particles), notes, data.basis, estimate.c, loc, scale, unit,
        hessian.square().mean().sqrt(),
    )  # fmt: skip


def _checked(t: Tensor | Sequence[float], x: Tensor | Sequence[Tensor], same: bool) -> tuple[Tensor, list[Tensor], int]:
    """Times and particles in double precision, without those that are missing, and the number of rows."""
    times = torch.as_tensor(t).detach().to("cpu", torch.float64)
    if times.dim() != 1 or len(times) < 2:
        raise ValueError(f"t must hold two or more times, with shape (n,), but has shape {tuple(times.shape)}")
    check_finite("t", times)
    if not bool((times[1:] > times[:-1]).all()):
        raise ValueError(f"t must increase, but got {times.tolist()}")
    found = list(x)
    if len(found) != len(times):
        raise ValueError(f"x must hold particles for each of the {len(times)} times of t, but holds {len(found)}")
    for k, y in enumerate(found):
        if y.dim() != 2 or y.shape[1] == 0 or y.shape[1:] != found[0].shape[1:]:
            raise ValueError(
                f"x must have shape (n, N, d), or be a list of tensors with shapes (N_k, d), but x[{k}] has shape "
                f"{tuple(y.shape)}"
            )
        if not y.is_floating_point():
            raise ValueError(f"x must be of a floating-point type, but x[{k}] is {y.dtype}; convert it with .float()")
    rows = [len(y) for y in found]
    if same and len(set(rows)) > 1:
        raise ValueError(
            f"x must have the same number of rows at all times for same_particles=True, but has {rows}; fill the rows "
            "of particles that are missing at a time with NaN"
        )
    kept = [_complete(f"x[{k}]", y.detach().to("cpu", torch.float64), same) for k, y in enumerate(found)]
    return times, kept, max(rows)


def _complete(name: str, y: Tensor, same: bool) -> Tensor:
    """The rows of particles that are there, for which no number may be missing."""
    y = y[~y.isnan().all(-1)] if same else y
    check_finite(name, y)
    if len(y) < FEWEST:
        raise ValueError(f"x must hold at least {FEWEST} particles at each time, but {name} holds {len(y)}")
    constant = (y == y[0]).all(0)
    if bool(constant.any()):
        column = int(constant.int().argmax())
        raise ValueError(f"x must vary in every coordinate, but coordinate {column} of {name} is constant")
    return y


def _estimate(
    data: Snapshots, generator: torch.Generator, report: Callable[[str], object]
) -> tuple[Estimate, Tensor, Tensor, float, tuple[str, ...]]:
    """The estimate, ends of the profile sets, chi^2 per moment, and what did not go well."""
    estimate, objective = fit_stages(data, generator, report)
    notes, ends = [], []
    for index in range(len(estimate.v)):
        best, low, high = profile_interval(objective, estimate, index, report)
        ends.append((low, high))
        if best.loss < estimate.loss:
            estimate = best
    low, high = torch.tensor(ends, dtype=torch.float64).T
    chi2 = estimate.chi2 / objective.freedom(estimate)
    if chi2 > MISFIT:
        notes.append(f"chi^2 per moment is {chi2:.1f}: the model does not fit, or the fit ended in a wrong optimum")
    if data.overlap:
        estimate, more = _assign(data, estimate, low, high, report)
        notes += more
    if not _identified(low, high, chi2):
        notes.append("the data do not identify the variance of the noise; see variance_interval")
    return estimate, low, high, chi2, tuple(notes)


def _identified(low: Tensor, high: Tensor, chi2: float) -> bool:
    return bool((low > 0).all() and (high <= BOUNDED * low).all()) and chi2 <= WRONG


def _assign(
    data: Snapshots, estimate: Estimate, low: Tensor, high: Tensor, report: Callable[[str], object]
) -> tuple[Estimate, list[str]]:
    """Expectation-maximisation from a high and a low start, with checks; the estimate of the moments if they fail."""
    plan, found = make_plan(data, estimate), []
    for factor in EM_STARTS:
        found.append(fit_assignments(data, replace(estimate, v=estimate.v * factor), plan))
        report("assignments")
    best = min(found, key=lambda e: e.loss)
    ratio = float((found[0].v / found[1].v).log().abs().max())
    notes = []
    if ratio > math.log(EM_SPREAD):
        notes.append(
            f"starts of the assignments from a higher and a lower variance end at variances whose ratio is "
            f"{math.exp(ratio):.2f}; the likelier one was taken"
        )
    if bool((best.v < low / OUTSIDE).any()):
        notes.append("assignments of particles ask for less noise than their distributions do; the model may not fit")
    if bool((best.v > high * OUTSIDE).any()):
        notes.append(
            "assignments of particles ask for far more noise than their distributions do, as those of fresh particles "
            "would; the estimate from the distributions was kept (are the particles the same at all times?)"
        )
        return estimate, notes
    return best, notes
