# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
The ground of the defaults: variants of the Hollow-CNF, fitted to densities with a known normalising constant.

Each variant changes one setting and is fitted by minimising KL(q || p); the table tells the KL that is left, in nats,
from fresh samples and a solve at tolerances of 1e-7. A second table tells what the solver's tolerance costs and brings.

    python -m pyro_hollow.experiments.defaults
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hollow.experiments.harness import Parser, Progress, minimise, positive, spread, table
from pyro_hollow.ode import Solver
from pyro_hollow.transforms import HollowCNF, hollow_cnf


def funnel(x: Tensor) -> Tensor:
    """Neal's funnel: a variance over several orders of magnitude. Shapes ``(*, d)`` to ``(*,)``."""
    width = torch.exp(x[..., :1])
    neck = dist.Normal(0.0, 1.5).log_prob(x[..., 0])
    return neck + dist.Normal(0.0, width).log_prob(x[..., 1:]).sum(-1)


def banana(x: Tensor) -> Tensor:
    """A Gaussian bent along a parabola. Shapes ``(*, 2)`` to ``(*,)``."""
    return dist.Normal(0.0, 1.0).log_prob(x[..., 0]) + dist.Normal(x[..., 0] ** 2, 0.3).log_prob(x[..., 1])


def ring(x: Tensor) -> Tensor:
    """Eight Gaussians on a circle of radius 2. Shapes ``(*, 2)`` to ``(*,)``."""
    angle = torch.arange(8, dtype=x.dtype, device=x.device) * (math.pi / 4)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return dist.Normal(centres, 0.4).log_prob(x.unsqueeze(-2)).sum(-1).logsumexp(-1) - math.log(8)


def bent(x: Tensor) -> Tensor:
    """A chain in which each coordinate follows the sine of the one before. Shapes ``(*, d)`` to ``(*,)``."""
    first = dist.Normal(0.0, 1.0).log_prob(x[..., 0])
    return first + dist.Normal(torch.sin(2 * x[..., :-1]), 0.4).log_prob(x[..., 1:]).sum(-1)


#: Densities with normalising constant 1: name to (log-density, dimension).
TARGETS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "funnel 10-d": (funnel, 10),
    "banana 2-d": (banana, 2),
    "ring 2-d": (ring, 2),
    "bent 20-d": (bent, 20),
}

#: What differs from the defaults: name to keyword arguments of :func:`~pyro_hollow.transforms.hollow_cnf`.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "max_rate None": {"max_rate": None},
    "activation silu, tanh": {"activation": ("silu", "tanh")},
    "activation silu": {"activation": "silu"},
    "activation softplus": {"activation": "softplus"},
    "hidden_dims [32]": {"hidden_dims": [32]},
    "hidden_dims [32, 16]": {"hidden_dims": [32, 16]},
    "hidden_dims [64, 64]": {"hidden_dims": [64, 64]},
    "transformer_dim 8": {"transformer_dim": 8},
    "transformer_dim 32": {"transformer_dim": 32},
    "conditioner masked": {"conditioner": "masked"},
    "conditioner leave-one-out": {"conditioner": "leave-one-out"},
}

TRAIN_SOLVER = Solver("rk4", options={"step_size": 0.25})
TEST_SOLVER = Solver(rtol=1e-7, atol=1e-7)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def fit(target: str, steps: int, seed: int, **kwargs: Any) -> tuple[HollowCNF, float]:
    """
    Fits a Hollow-CNF to a target by Adam on 64 samples a step.

    :param str target: a name in :data:`TARGETS`.
    :param int steps: the number of steps.
    :param int seed: the seed.
    :param kwargs: for :func:`~pyro_hollow.transforms.hollow_cnf`.
    :returns: the flow and the milliseconds per step.
    """
    log_density, d = TARGETS[target]
    pyro.set_rng_seed(seed)
    flow = hollow_cnf(d, **{"solver": TRAIN_SOLVER, **kwargs})
    loss = partial(kl_divergence, flow, log_density, 64)
    training = minimise(loss, flow.parameters(), num_steps=steps, lr=5e-3, progress=False)
    return flow, training.seconds / steps * 1e3


def kl_divergence(flow: HollowCNF, log_density: Callable[[Tensor], Tensor], num_samples: int) -> Tensor:
    """An estimate of KL(q || p), with a gradient."""
    d = flow.nn.input_dim
    base = dist.Normal(torch.zeros(d), 1.0).to_event(1)
    z = base.sample((num_samples,))
    x, ladj = flow.call_and_ladj(z)
    return (base.log_prob(z) - ladj - log_density(x)).mean()


@torch.no_grad()
def _test(flow: HollowCNF, target: str, solver: Solver, num_samples: int = 10_000) -> float:
    torch.manual_seed(1)
    flow.solver = solver
    return kl_divergence(flow, TARGETS[target][0], num_samples).item()


def variants_table(variants: Sequence[str], targets: Sequence[str], steps: int, seeds: Sequence[int]) -> list[str]:
    """Rows: the KL that each variant leaves, mean over seeds."""
    rows = []
    with Progress(total=len(variants) * len(targets) * len(seeds), desc="variants") as progress:
        for name in variants:
            cells, times = [], []
            for target in targets:
                losses = []
                for seed in seeds:
                    flow, milliseconds = fit(target, steps, seed, **VARIANTS[name])
                    losses.append(_test(flow, target, TEST_SOLVER))
                    times.append(milliseconds)
                    progress.update()
                cells.append(spread(losses, 3, deviation=False))
            rows.append([name, *cells, spread(times, 1, deviation=False)])
    return table(" | ".join(["setting", *targets, "ms per step"]), rows)


def tolerance_table(targets: Sequence[str], steps: int) -> list[str]:
    """Rows: bias of the KL and evaluations for flows that were trained, and are evaluated, at a tolerance."""
    rows = []
    for tolerance in Progress(TOLERANCES, desc="tolerances"):
        solver = Solver(rtol=tolerance, atol=tolerance)
        errors, evaluations, losses, times = [], [], [], []
        for target in targets:
            flow, milliseconds = fit(target, steps, 0, solver=solver)
            own = _test(flow, target, solver)
            assert flow.last_solve is not None
            evaluations.append(flow.last_solve.nfe)
            losses.append(_test(flow, target, TEST_SOLVER))
            errors.append(abs(own - losses[-1]))
            times.append(milliseconds)
        left = " / ".join(f"{loss:.3f}" for loss in losses)
        count = f"{min(evaluations)} to {max(evaluations)}"
        rows.append([f"{tolerance:g}", f"{max(errors):.1e}", count, left, spread(times, 1, deviation=False)])
    return table("rtol = atol | largest error of the KL | evaluations | KL after training | ms per step", rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="variants (default: all)")
    add("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="targets (default: all)")
    add("--steps", type=positive, default=1000, help="steps of training (default: 1000)")
    add("--seed", nargs="+", type=int, default=[0], help="seeds (default: 0)")
    args = parser.begin(argv)
    print(f"KL(q || p) in nats after {args.steps} steps, mean over {len(args.seed)} seeds:\n")
    print("\n".join(variants_table(args.variant, args.target, args.steps, args.seed)), flush=True)
    print(f"\ndopri5, default network, by tolerance; KL after training for {', '.join(args.target)}:\n")
    print("\n".join(tolerance_table(args.target, args.steps)))


if __name__ == "__main__":
    main()
