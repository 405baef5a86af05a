# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Stages of a fit by pushed cosines, from several starts, and the profile that tells what the data determine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .pushed_cosines import CLOSED, FREE, Estimate, Objective, Snapshots, fit_moments
from .starts import gaussian_start, transport_start

__all__ = ["fit_stages", "make_plan", "profile_interval"]

#: Frequencies of the stages, in units of one over the standard deviations of the later samples.
START_STAGES, STAGES = (1.0, 2.0, 4.0), (4.0, 8.0, 16.0, 32.0, 64.0)
#: Frequencies are spread evenly up to a cap, and evenly in their logarithm from the lowest one beyond.
LINEAR_CAP, LOWEST = 4.0, 0.5
#: Starts: factors of the potential, variances in units of the data's variance per median gap, how many are pursued, and
#: the samples of each time that they see.
START_FACTORS, START_VARIANCES, NUM_STARTS, START_SIZE = (1.0, 2.0, 4.0, 8.0), (0.1, 0.01), 3, 700
#: Frequencies of a gap and of all gaps, and samples for each frequency, at most.
MOST_WAVES, ALL_WAVES, SAMPLES_PER_WAVE = 60, 240, 20
#: Growth, and change of the Hessian along a path, times the length of a step.
MODERATE = 1.5
#: Of the profile: steps of Gauss-Newton at each point; its rise at the ends of the interval, the 97.5 % quantile
#: of chi^2 with one degree of freedom, as the 95 % quantile covers too seldom where covariance and ridge come from the
#: same data; and how far it is followed, by factors of the variance.
PROFILE_STEPS, THRESHOLD, FACTORS = 5, 5.02, (1.15, 1.4, 1.8, 2.5, 4.0, 7.0, 12.0, 20.0)


def draw_waves(y: Tensor, cap: float, gaps: int, generator: torch.Generator) -> Tensor:
    """Frequencies up to a cap for one gap, in random directions; in many dimensions along one or two axes each."""
    n, d = y.shape
    count = min(max(MOST_WAVES, 8 * d), ALL_WAVES * max(1, d // 4) // gaps, n // SAMPLES_PER_WAVE, int(15 * cap) * d)
    count = max(count, 2)
    direction = torch.randn(count, d, generator=generator, dtype=torch.float64)
    if d > 4:
        place = torch.arange(count).unsqueeze(-1)
        partner = torch.randint(1, d, (count, 1), generator=generator)
        axis = torch.arange(d)
        keep = (axis == place % d) | ((axis == (place + partner) % d) & (place % 2 == 1))
        direction = torch.where(keep, direction, 0.0)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    place = (torch.arange(count) + 0.5) / count
    length = cap * place if cap <= LINEAR_CAP else LOWEST * (cap / LOWEST) ** place
    length = length[torch.randperm(count, generator=generator)]
    if d > 4:
        return length.unsqueeze(-1) * direction / y.std(0)
    factor = torch.linalg.cholesky(torch.cov(y.T).reshape(d, d) + 1e-12 * torch.eye(d).to(y))
    return torch.linalg.solve_triangular(factor, (length.unsqueeze(-1) * direction).T, upper=False).T


def make_plan(data: Snapshots, estimate: Estimate) -> list[tuple[int, int]]:
    """
    Parts and steps of each gap: parts where particles leave ridges, so that a Gaussian for all of the gap would not do;
    steps where the Hessian changes along a path.
    """
    plan = []
    for k, gap in enumerate(data.gaps):
        x = data.x[k][:START_SIZE]
        before = data.basis.derivatives(estimate.c, x)[1]
        growth = torch.linalg.eigvalsh(-before)[:, -1].clamp_min(0).quantile(0.9)
        end = replace(data, x=[x], gaps=[gap]).push(0, estimate.c, estimate.v).mean
        change = (data.basis.derivatives(estimate.c, end)[1] - before).norm(dim=(-2, -1)).quantile(0.9)
        parts = min(max(math.ceil(float(growth) * gap / MODERATE), 1), 4) if not data.overlap else 1
        plan.append((parts, min(max(math.ceil(float(change) * gap / (parts * MODERATE)), 1), 2)))
    return plan


def _objective(
    data: Snapshots, cap: float, generator: torch.Generator, plan: list[tuple[int, int]] | None = None
) -> Objective:
    waves = [draw_waves(y, cap, len(data.gaps), generator) for y in data.x[1:]]
    return Objective(data, waves, plan or [(1, 1)] * len(data.gaps), generator)


def _candidates(data: Snapshots, generator: torch.Generator) -> list[Estimate]:
    """Starts that fit the lowest frequencies best, of several potentials, times several factors, and variances."""
    band = data.basis.band
    precision = torch.where(band < 0, FREE, torch.where(band <= 1, 1e2, CLOSED)).to(torch.float64)
    objective = _objective(data, START_STAGES[1], generator)
    variance = objective.crude_covariance().diagonal()
    found = []
    for c in (transport_start(data), gaussian_start(data)):
        ranked = []
        for factor in START_FACTORS:
            for value in START_VARIANCES:
                v = torch.full((len(data.noise),), value, dtype=torch.float64)
                chi2 = float((objective.residual(factor * c, v).square() / variance).sum())
                ranked.append(Estimate(factor * c, v, precision, chi2))
        found += sorted(ranked, key=lambda e: e.chi2)[:2]
    return sorted(found, key=lambda e: e.chi2)[:NUM_STARTS]


def _start(data: Snapshots, estimate: Estimate, generator: torch.Generator) -> Estimate:
    """A fit of low frequencies, at first with simple weights and with the variance held."""
    low, middle, high = START_STAGES
    estimate = fit_moments(_objective(data, low, generator), estimate, steps=8, held=slice(None), crude=True)
    objective = _objective(data, middle, generator, make_plan(data, estimate))
    estimate = fit_moments(objective, estimate, steps=8, crude=True)
    objective = _objective(data, middle, generator, make_plan(data, estimate))
    estimate = fit_moments(objective, replace(estimate, precision=_opened(estimate.precision)), steps=8)
    return fit_moments(_objective(data, high, generator, make_plan(data, estimate)), estimate, steps=6)


def _noise_scale(data: Snapshots, estimate: Estimate) -> float:
    """The smallest standard deviation of a typical particle's transition, relative to that of the later samples."""
    found = []
    for k, y in enumerate(data.x[1:]):
        variance = data.push(k, estimate.c, estimate.v).covariance(estimate.v).diagonal(dim1=-2, dim2=-1)
        found.append(float((variance / y.var(0)).mean(-1).median().sqrt()))
    return min(found)


def _opened(precision: Tensor) -> Tensor:
    return torch.where(precision >= CLOSED, 1e3, precision)


def fit_stages(
    data: Snapshots, generator: torch.Generator, report: Callable[[str], object]
) -> tuple[Estimate, Objective]:
    """
    The fit by pushed cosines: several starts at low frequencies on a part of the data, the best of which goes on to
    higher ones.

    :returns: the estimate, and the objective of the last stage.
    """
    thin, found = data.thin(START_SIZE), []
    for start in _candidates(thin, generator):
        state = generator.get_state()  # the same frequencies for all of them
        found.append(_start(thin, start, generator))
        generator.set_state(state)
        report("starts")
    estimate = min(found, key=lambda e: e.loss)
    for cap in STAGES:
        if cap > 8 and cap > 2 / _noise_scale(thin, estimate):
            break
        objective = _objective(data, cap, generator, make_plan(data, estimate))
        estimate = fit_moments(objective, estimate, steps=12)
        report(f"frequencies to {cap:g}")
    return estimate, objective


def profile_interval(
    objective: Objective, estimate: Estimate, index: int, report: Callable[[str], object]
) -> tuple[Estimate, float, float]:
    """
    The best estimate found, and the set of variances whose best potential fits no worse than chance allows: the
    profile is at most :data:`THRESHOLD` above its minimum, times the chi^2 per degree of freedom if that is above 1.

    :param objective: the moments.
    :param estimate: the estimate.
    :param int index: the variance.
    :returns: the best estimate, the lower end (0 if there is none) and the upper end (infinity if there is none).
    """
    threshold = THRESHOLD * max(1.0, estimate.chi2 / objective.freedom(estimate))
    # The prior stays; a free prior would choose a simpler potential at each variance.
    centre = fit_moments(objective, estimate, steps=6, held=index, evidence=False)
    points, best = {float(centre.v[index]): centre}, centre
    for sign in (1, -1):
        at = centre
        for factor in FACTORS:
            at = _refit(objective, at, index, float(centre.v[index]) * factor**sign)
            points[float(at.v[index])] = at
            best = min(best, at, key=lambda e: e.loss)
            report("profile")
            if at.loss > best.loss + threshold:
                break
    values = sorted(points)
    place = values.index(float(best.v[index]))
    loss = [points[value].loss - best.loss for value in values]
    low = _crossing(values[place::-1], loss[place::-1], threshold)
    high = _crossing(values[place:], loss[place:], threshold)
    return best, 0.0 if low is None else low, math.inf if high is None else high


def _refit(objective: Objective, near: Estimate, index: int, value: float) -> Estimate:
    """The best potential for a variance, from a neighbour's; at equilibrium the two are proportional."""
    v = near.v.clone()
    v[index] = value
    starts = [replace(near, v=v), replace(near, c=near.c * value / float(near.v[index]), v=v)]
    losses = [fit_moments(objective, start, steps=0).loss for start in starts]
    start = starts[losses.index(min(losses))]
    return fit_moments(objective, start, steps=PROFILE_STEPS, held=index, evidence=False)


def _crossing(values: list[float], excess: list[float], threshold: float) -> float | None:
    """Where the excess first passes the threshold; its root is nearly linear in the logarithm of the value."""
    for a, b, low, high in zip(values[:-1], values[1:], excess[:-1], excess[1:], strict=True):
        if high > threshold:
            low = min(max(low, 0.0), threshold)
            share = (math.sqrt(threshold) - math.sqrt(low)) / (math.sqrt(high) - math.sqrt(low))
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return None
