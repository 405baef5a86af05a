# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Gradient flows with known potentials and variance 0.2, and how well :func:`~pyro_hollow.sde.fit_gradient_flow` finds
both.

The potentials and the start, a random mixture of Gaussians, are those of a published benchmark [1]. Particles are the
same at the three times or fresh ones, or fresh ones at equilibrium, where the variance is not determined.

References:

[1] Vincent Guan, Joseph Janssen, Nicolas Lanzetti, Antonio Terpin, et al. Identifying drift, diffusion, and causal
structure of gradient flows from marginals, 2025. [arXiv:2505.21770]
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_hollow.experiments import harness
from pyro_hollow.ops import field_derivatives
from pyro_hollow.sde import DiagonalSDE, fit_gradient_flow

VARIANCE, TIMES = 0.2, 3
KINDS = ("same", "fresh", "equilibrium")
GAPS = (0.01, 0.05, 0.1, 0.3)
#: The time that leads to equilibrium in each well.
BURN_IN = 3.0


def quadratic(x: Tensor) -> Tensor:
    """5 |x|^2."""
    return 5 * x.square().sum(-1)


def styblinski_tang(x: Tensor) -> Tensor:
    """Two wells along each axis."""
    return 0.5 * (x**4 - 16 * x**2 + 5 * x).sum(-1)


def bohachevsky(x: Tensor) -> Tensor:
    """A bowl with ripples, in two dimensions, whose Hessian reaches 670."""
    a, b = x.unbind(-1)
    return 10 * (a**2 + 2 * b**2 - 0.3 * torch.cos(3 * math.pi * a) - 0.4 * torch.cos(4 * math.pi * b))


def wavy_plateau(x: Tensor) -> Tensor:
    """Several wells along each axis."""
    return (torch.cos(math.pi * x) + 0.5 * x**4 - 3 * x**2 + 1).sum(-1)


def oakley_ohagan(x: Tensor) -> Tensor:
    """A bowl with a gentle wave."""
    return 5 * (torch.sin(x) + torch.cos(x) + x**2 + x).sum(-1)


#: Potentials by name; all but one are sums over coordinates, in any dimension.
POTENTIALS: dict[str, Callable[[Tensor], Tensor]] = {
    "quadratic": quadratic,
    "styblinski-tang": styblinski_tang,
    "bohachevsky": bohachevsky,
    "wavy-plateau": wavy_plateau,
    "oakley-ohagan": oakley_ohagan,
}


@dataclass(frozen=True)
class Config:
    """All that decides the result of a run, but for the machine."""

    potential: str
    kind: str
    gap: float
    dim: int
    seed: int
    particles: int = 2000


@dataclass
class Result:
    """Findings of a run."""

    config: Config  #: its settings.
    variance: float = math.nan
    low: float = math.nan  #: the interval's ends; an upper end of infinity is kept as such.
    high: float = math.nan
    identified: bool = False
    chi2_per_moment: float = math.nan
    #: mean absolute error of the drift over its mean absolute value, at the particles of the second time.
    drift_error: float = math.nan
    drift_cosine: float = math.nan  #: the mean cosine of the angle to the true drift, likewise.
    seconds: float = math.nan  #: of the processor.
    warnings: list[str] = field(default_factory=list)


def truth(potential: str) -> DiagonalSDE:
    """The equation of a potential."""
    function = POTENTIALS[potential]
    return DiagonalSDE(
        lambda t, x: -field_derivatives(lambda t, x: function(x), t, x, 1)[1],
        torch.tensor(math.sqrt(VARIANCE)).double(),
    )


def _mixture(dim: int) -> Callable[[int], Tensor]:
    """Samples of a random mixture of up to ten Gaussians."""
    count = int(torch.randint(1, 11, ()))
    means = 6 * torch.rand(count, dim, dtype=torch.float64) - 3
    scales = (0.5 + 0.5 * torch.rand(count, dtype=torch.float64)).sqrt()
    weights = -torch.rand(count, dtype=torch.float64).log()

    def draw(n: int) -> Tensor:
        index = torch.multinomial(weights, n, replacement=True)
        return means[index] + scales[index].unsqueeze(-1) * torch.randn(n, dim, dtype=torch.float64)

    return draw


def simulate(config: Config) -> tuple[Tensor, Tensor]:
    """Times, and particles with shape ``(times, n, d)`` in random order."""
    torch.manual_seed(config.seed)
    sde, draw, n = truth(config.potential), _mixture(config.dim), config.particles
    times = config.gap * torch.arange(TIMES, dtype=torch.float64)
    dt = 2e-4 if config.potential == "bohachevsky" else 5e-4
    if config.kind == "same":
        paths = sde.sample(draw(n), times, dt)
        return times, torch.stack([x[torch.randperm(n)] for x in paths])
    start = BURN_IN if config.kind == "equilibrium" else 0.0
    ends = [start + float(t) for t in times]
    return times, torch.stack([sde.sample(draw(n), [0.0, end], dt)[-1] if end else draw(n) for end in ends])


def run(config: Config, folder: Path, force: bool = False) -> Result:
    """Fits a simulated flow, or reads an earlier run from the folder, unless ``force``."""
    name = f"{config.potential}-{config.kind}-{config.gap:g}-{config.dim}-{config.particles}-{config.seed}.json"
    path = folder / "gradient-flow" / name
    found = harness.kept(path, Result, force)
    if found is not None:
        return found
    times, x = simulate(config)
    begin = time.process_time()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        fit = fit_gradient_flow(times, x, same_particles=config.kind == "same", seed=config.seed, progress=False)
    seconds = time.process_time() - begin
    drift, true = fit.drift(x[1]), truth(config.potential).f(times[1], x[1]).detach()
    error = float((drift - true).abs().sum() / true.abs().sum())
    cosine = float(torch.cosine_similarity(drift, true, dim=-1).mean())
    low, high = (float(end) for end in fit.variance_interval)
    return harness.keep(
        path,
        Result(
            config, float(fit.variance), low, high, fit.identified, fit.chi2_per_moment, error, cosine, seconds,
            list(fit.warnings),
        ),
    )  # fmt: skip


def configs(
    potentials: Iterable[str], kinds: Iterable[str], gaps: Iterable[float], dims: Iterable[int], seeds: Iterable[int],
    particles: int,
) -> list[Config]:  # fmt: skip
    """All combinations, seeds together, without potentials that a dimension does not have."""
    return [
        Config(potential, kind, gap, dim, seed, particles)
        for dim in dims
        for kind in kinds
        for gap in gaps
        for potential in potentials
        if dim == 2 or potential != "bohachevsky"
        for seed in seeds
    ]


def format_results(results: list[Result]) -> str:
    """A table in Markdown, a row for each setting: medians over seeds, and the worst."""
    settings: dict[tuple[str, str, float, int], list[Result]] = {}
    for r in results:
        settings.setdefault((r.config.potential, r.config.kind, r.config.gap, r.config.dim), []).append(r)
    rows = [
        [f"{name}, {dim}-d", kind, f"{gap:g}", *_cells(found)] for (name, kind, gap, dim), found in settings.items()
    ]
    header = (
        "potential | particles | gap | seeds | variance | error | worst | covered | identified | width | warned "
        "| drift error | worst | cosine | worst | seconds"
    )
    return "\n".join(harness.table(header, rows, f"Gradient flows: variance (true {VARIANCE}) and drift"))


def _cells(found: list[Result]) -> list[str]:
    """Median and worst of a setting."""
    variance = np.array([r.variance for r in found])
    errors = np.abs(variance / VARIANCE - 1)
    covered = sum(r.low <= VARIANCE <= r.high for r in found)
    known = [r for r in found if r.identified]
    width = f"{np.median([(r.high - r.low) / r.variance for r in known]):.0%}" if known else "-"
    drift, cosine = np.array([r.drift_error for r in found]), np.array([r.drift_cosine for r in found])
    return [
        str(len(found)), f"{np.median(variance):.3f}", f"{np.median(errors):.1%}", f"{errors.max():.1%}",
        f"{covered} of {len(found)}", f"{len(known)} of {len(found)}", width,
        str(sum(bool(r.warnings) for r in found)), f"{np.median(drift):.3f}", f"{drift.max():.3f}",
        f"{np.median(cosine):.3f}", f"{cosine.min():.3f}", f"{np.median([r.seconds for r in found]):.0f}",
    ]  # fmt: skip
