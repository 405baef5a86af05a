# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Posteriors with several modes: pyro_hollow.fit beside guides of Pyro and NUTS.

The table tells the share of the modes that have at least a quarter of their mass among the draws, the error of the log
evidence, the effective sample size of 4,000 draws, and the verdict. The draws are those of the guide before they are
corrected, which could not bring back a mode. NUTS runs one chain on the same LogDensity, with 1,000 steps of warm-up;
its effective sample size is not that of a chain which stays in one mode, and is left out.

    python -m pyro_hollow.experiments.modes

References:

[1] Laurence Illing Midgley et al. Flow Annealed Importance Sampling Bootstrap. ICLR 2023 (40 Gaussians, Many Well)

[2] Frank Noé et al. Boltzmann generators. Science 365, 2019 (the double well of Many Well)

[3] Daniel C. Hackett et al. Flow-based sampling for multimodal distributions in lattice field theory.
[arXiv:2107.00734]
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_hollow.experiments import defaults, fits
from pyro_hollow.experiments.harness import keep, kept, table, write
from pyro_hollow.experiments.posterior_models import flat
from pyro_hollow.infer import Fit, LogDensity

NAN = math.nan
NUTS_STEPS = 1000  #: of warm-up, and so many draws.
SITES, COUPLING, WELL, MUTUAL = 6, 1.0, 1.5, 0.5  #: of the lattice.
GRID = 33  #: points on each axis of the lattice's transfer matrix.


@dataclass(frozen=True)
class Target:
    """
    A posterior with several modes.

    :ivar model: the Pyro model, without arguments.
    :ivar masses: the shares of the modes, with shape ``(K,)``.
    :ivar nearest: the modes of draws by site, with shape ``(n,)``, or ``(n, G)`` for G groups with the same modes each.
    :ivar log_evidence: nan where it is not known.
    """

    model: Callable[[], Any]
    masses: Tensor
    nearest: Callable[[dict[str, Tensor]], Tensor]
    log_evidence: float = NAN


def _density(dim: int, log_density: Callable[[Tensor], Tensor]) -> None:
    x = pyro.sample("x", flat(dim))
    pyro.factor("density", log_density(x))


def _closest(centres: Tensor, draws: dict[str, Tensor]) -> Tensor:
    return torch.cdist(draws["x"], centres.to(draws["x"])).argmin(-1)


def ring() -> Target:
    """Eight Gaussians on a circle."""
    angle = torch.arange(8) * (math.pi / 4)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return Target(partial(_density, 2, defaults.ring), torch.full((8,), 1 / 8), partial(_closest, centres), 0.0)


def forty() -> Target:
    """A mixture of 40 Gaussians with means uniform in a square of side 80, and standard deviations log(1 + e)."""
    centres = 80 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 40
    scale = math.log1p(math.e)

    def log_density(x: Tensor) -> Tensor:
        return dist.Normal(centres.to(x), scale).log_prob(x.unsqueeze(-2)).sum(-1).logsumexp(-1) - math.log(40)

    return Target(partial(_density, 2, log_density), torch.full((40,), 1 / 40), partial(_closest, centres), 0.0)


def many_well(dim: int) -> Target:
    """A double well beside a Gaussian, for each of half the dimensions; all wells of a dimension have to be found."""

    def well(a: Tensor) -> Tensor:
        return -(a**4) + 6 * a**2 + 0.5 * a

    def log_density(x: Tensor) -> Tensor:
        return (well(x[..., 0::2]) - 0.5 * x[..., 1::2] ** 2).sum(-1)

    grid = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    log_mass = torch.stack([well(side).logsumexp(0) for side in (grid[grid < 0], grid[grid > 0])])
    log_evidence = float(log_mass.logsumexp(0)) + math.log(12 / 100_000) + 0.5 * math.log(2 * math.pi)

    def nearest(draws: dict[str, Tensor]) -> Tensor:
        return (draws["x"][:, 0::2] > 0).long()

    masses = log_mass.softmax(0)
    if dim <= 6:  # of all joint modes
        power = 2 ** torch.arange(dim // 2)
        masses = torch.stack([masses[list(k)].prod() for k in itertools.product((0, 1), repeat=dim // 2)])
        joint = partial(lambda power, draws: (nearest(draws) * power.flip(0)).sum(-1), power)
        return Target(partial(_density, dim, log_density), masses, joint, log_evidence * (dim // 2))
    return Target(partial(_density, dim, log_density), masses, nearest, log_evidence * (dim // 2))


def product() -> Target:
    """Two numbers of which only the product is observed."""

    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(0.0, 2.0))
        pyro.sample("c", dist.Normal(a * b, 0.5), obs=torch.tensor(4.0))

    axis = torch.linspace(-16, 16, 1601, dtype=torch.float64)
    prior = dist.Normal(0.0, 2.0).log_prob(axis)
    log_joint = prior.unsqueeze(-1) + prior + dist.Normal(4.0, 0.5).log_prob(axis.unsqueeze(-1) * axis)
    log_evidence = float(log_joint.flatten().logsumexp(0)) + 2 * math.log(0.02)
    return Target(model, torch.full((2,), 0.5), lambda draws: (draws["a"] > 0).long(), log_evidence)


def labels() -> Target:
    """A mixture of three Gaussians with weights, whose labels can be exchanged in six ways."""
    generator = torch.Generator().manual_seed(0)
    centres, sizes = torch.tensor([-3.0, 0.0, 4.0]), [30, 40, 30]
    data = torch.cat([c + torch.randn(n, generator=generator) for c, n in zip(centres, sizes, strict=True)])

    def model() -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
        locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([3]).to_event(1))
        logs = dist.Normal(locs.unsqueeze(-2), 1.0).log_prob(data.unsqueeze(-1))
        pyro.factor("data", (logs + weights.log().unsqueeze(-2)).logsumexp(-1).sum(-1))

    orders = torch.tensor(list(itertools.permutations(range(3))))

    def nearest(draws: dict[str, Tensor]) -> Tensor:
        return (draws["locs"].argsort(-1).unsqueeze(1) == orders).all(-1).long().argmax(-1)

    return Target(model, torch.full((6,), 1 / 6), nearest)


def regression() -> Target:
    """A line through points of which a part follows another line, under errors with heavy tails."""
    x = torch.linspace(-2, 2, 24)
    noise = 0.3 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    y = torch.where(torch.arange(24) % 2 == 0, 1.5 * x, -1.5 * x) + noise

    def log_likelihood(slope: Tensor, intercept: Tensor) -> Tensor:
        return dist.StudentT(1.0, intercept.unsqueeze(-1) + slope.unsqueeze(-1) * x, 0.3).log_prob(y.to(slope)).sum(-1)

    def model() -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
        pyro.factor("y", log_likelihood(slope, intercept))

    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)
    slope, intercept = axis.unsqueeze(-1).expand(401, 401), axis.expand(401, 401)
    log_joint = dist.Normal(0.0, 2.0).log_prob(slope) + dist.Normal(0.0, 1.0).log_prob(intercept)
    log_joint = log_joint + log_likelihood(slope, intercept)
    sides = torch.stack([log_joint[:200].flatten().logsumexp(0), log_joint[200:].flatten().logsumexp(0)])
    log_evidence = float(sides.logsumexp(0)) + 2 * math.log(0.02)
    return Target(model, sides.softmax(0), lambda draws: (draws["slope"] > 0).long(), log_evidence)


def _bond(one: Tensor, two: Tensor) -> Tensor:
    """Minus the part of the lattice's action between neighbouring sites, of their two fields in the last dimension."""
    return -0.5 * COUPLING * (one - two).square().sum(-1)


def _site(fields: Tensor) -> Tensor:
    """Minus the part of the lattice's action at a site."""
    return -WELL * (fields.square() - 1).square().sum(-1) - MUTUAL * fields.square().prod(-1)


def lattice() -> Target:
    """Two scalar fields on a ring of sites, each of which has two signs; its evidence by the transfer matrix."""

    def log_density(x: Tensor) -> Tensor:
        fields = x.unflatten(-1, (SITES, 2))
        return _site(fields).sum(-1) + _bond(fields, fields.roll(1, -2)).sum(-1)

    axis = torch.linspace(-2.5, 2.5, GRID, dtype=torch.float64)
    states = torch.cartesian_prod(axis, axis)
    half = 0.5 * _site(states)
    log_transfer = half.unsqueeze(-1) + half + _bond(states.unsqueeze(1), states)
    largest = log_transfer.max()
    eigenvalues = torch.linalg.eigvalsh((log_transfer - largest).exp())
    log_evidence = float(SITES * largest + (eigenvalues**SITES).sum().log()) + 2 * SITES * math.log(
        float(axis[1] - axis[0])
    )

    def nearest(draws: dict[str, Tensor]) -> Tensor:
        signs = (draws["x"].unflatten(-1, (SITES, 2)).sum(-2) > 0).long()
        return 2 * signs[:, 0] + signs[:, 1]

    return Target(partial(_density, 2 * SITES, log_density), torch.full((4,), 0.25), nearest, log_evidence)


#: The targets by name.
TARGETS: dict[str, Callable[[], Target]] = {
    "ring": ring,
    "forty": forty,
    "many_well_6": partial(many_well, 6),
    "many_well_32": partial(many_well, 32),
    "product": product,
    "labels": labels,
    "regression": regression,
    "lattice": lattice,
}


def share_found(target: Target, draws: dict[str, Tensor]) -> float:
    """
    The share of the modes that have at least a quarter of their mass among draws.

    :param Target target: the posterior.
    :param draws: by site, with the draws in the first dimension.
    """
    nearest = target.nearest(draws)
    columns = nearest.reshape(len(nearest), -1).mT
    counts = torch.stack([torch.bincount(column, minlength=len(target.masses)) for column in columns])
    return float((counts / len(nearest) >= target.masses / 4).double().mean())


def examine(target: Target, fitted: Fit) -> dict[str, float]:
    """Findings of a fit, beside the truth."""
    draws = {name: torch.as_tensor(x.values).flatten(0, 1) for name, x in fitted.posterior["guide"].items()}
    return {
        "share": share_found(target, draws),
        "error": fitted.log_evidence - target.log_evidence,
        "modes": float(len(fitted.modes)),
        "trusted": float(fitted.trusted),
    }


def run_nuts(target: Target, config: fits.Config, args: argparse.Namespace) -> fits.Result:
    """A chain of Pyro's NUTS on the LogDensity of a target."""
    path = args.output / config.posterior / f"{config.guide}-{config.seed}.json"
    found = kept(path, fits.Result, args.force)
    if found is not None:
        return found
    pyro.set_rng_seed(config.seed)
    begin = time.perf_counter()
    density = LogDensity(target.model)
    kernel = NUTS(potential_fn=density.potential)
    start = {"z": density.start + torch.randn(density.dim)}
    mcmc = MCMC(kernel, NUTS_STEPS, NUTS_STEPS, initial_params=start, disable_progbar=True)
    mcmc.run()
    draws = density.constrain(mcmc.get_samples()["z"])
    result = fits.Result(config, seconds=time.perf_counter() - begin)
    result.more = {"share": share_found(target, draws), "error": NAN, "modes": NAN, "trusted": NAN}
    return keep(path, result)


def format_table(runs: dict[str, fits.Runs]) -> str:
    """A table in Markdown of runs by guide by target: medians and ranges over seeds."""
    rows = []
    for name, guides in runs.items():
        for guide, results in guides.items():
            more = [
                fits.middle([r.more[key] for r in results if r.more], digits)
                for key, digits in (("share", 2), ("error", 3))
            ]
            gap = fits.middle([r.elbo - r.log_evidence + r.more["error"] for r in results if r.more], 3)
            ess = fits.middle([100 * r.ess / r.num_samples for r in results if r.num_samples], 0)
            khat = fits.middle([r.khat for r in results], 2)
            trusted = sum(r.more.get("trusted", 0) == 1 for r in results)
            said = "-" if guide == "nuts" else f"{trusted} of {len(results)}"
            seconds = fits.middle([r.seconds for r in results], 0)
            rows.append([f"{name}, {guide}", more[0], more[1], gap, ess, khat, said, seconds])
    header = "target, method | modes found | error of log evidence | ELBO - log evidence | ESS, % | k-hat | trusted"
    return "\n".join(table(f"{header} | seconds", rows))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = fits.make_parser(__file__, __doc__, tuple(TARGETS), "", ["nuts"])
    args = parser.begin(argv)
    runs: dict[str, fits.Runs] = {}
    for name in args.models:
        target, runs[name] = TARGETS[name](), {}
        for guide in args.guides:
            if guide == "nuts":
                configs = [fits.Config(name, guide, seed, 0.0) for seed in args.seeds]
                runs[name][guide] = [run_nuts(target, config, args) for config in configs]
            else:
                further = partial(examine, target)
                runs[name][guide] = fits.run_seeds(target.model, name, guide, args, examine=further)
    every = [result for guides in runs.values() for results in guides.values() for result in results]
    lines = "\n\n".join(part for part in (format_table(runs), "\n".join(fits.failures(every))) if part)
    print(lines, flush=True)
    write(args.output / "table.md", lines + "\n")


if __name__ == "__main__":
    main()
