# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Pyro's NUTS or :func:`pyro_hollow.fit` on a posterior, in a process of its own: seconds count from its start.

    python -m pyro_hollow.experiments.pyro_peers eight_schools nuts

It prints one line of JSON with the findings, as ``numpyro_peers.py`` does for NumPyro.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

from pyro_hollow import infer
from pyro_hollow.experiments.harness import Parser, positive_real
from pyro_hollow.experiments.posterior_models import MORE_POSTERIORS, POSTERIORS, Posterior, load

WARM_UP, CHUNK = 500, 100


class _Enough(Exception):
    """Ends a sampler, which has a fixed number of draws otherwise."""


def sample(
    kernel: NUTS,
    effective: float,
    seconds: float,
    elapsed: Callable[[], float],
    density: infer.LogDensity | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    Draws until the smallest effective sample size of a coordinate is reached, or the time is over.

    :param kernel: the kernel of the sampler.
    :param float effective: effective draws to reach.
    :param float seconds: the most time.
    :param elapsed: returns the seconds until now.
    :param density: the density whose potential the kernel has; None for a kernel of a model.
    :returns: the findings (seconds until the end and until the end of the warm-up, draws, their smallest effective
        sample size) and the draws by site.
    """
    found: dict[str, Any] = {"warm_up_seconds": math.nan, "seconds": math.nan, "ess": 0.0, "num_draws": 0}
    draws: list[dict[str, Tensor]] = []

    def constrain(kernel: NUTS, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if density is not None:
            return density.constrain(params["z"])
        return {name: kernel.transforms[name].inv(u) if name in kernel.transforms else u for name, u in params.items()}

    def stop(kernel: NUTS, params: dict[str, Tensor], stage: str, i: int) -> None:
        if stage.lower().startswith("warm"):
            found["warm_up_seconds"] = elapsed()
        else:
            draws.append(constrain(kernel, params))
        late = elapsed() > seconds
        if len(draws) > 3 and (late or len(draws) % CHUNK == 0):
            values = [torch.stack([draw[name] for draw in draws]).unsqueeze(0) for name in draws[0]]
            found["ess"] = min(float(effective_sample_size(x).min()) for x in values)
        found.update(seconds=elapsed(), num_draws=len(draws))
        if late or found["ess"] >= effective:
            raise _Enough

    start = None if density is None else {"z": density.start}
    sampler = MCMC(
        kernel, num_samples=10**9, warmup_steps=WARM_UP, hook_fn=stop, initial_params=start, disable_progbar=True
    )
    try:
        sampler.run()
    except _Enough:
        pass
    return found, {name: torch.stack([draw[name] for draw in draws]) for name in (draws[0] if draws else ())}


def fit(posterior: Posterior, seed: int, elapsed: Callable[[], float]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """
    Fits the posterior by :func:`pyro_hollow.fit` with its defaults.

    :returns: the findings (seconds until it was fitted and judged, draws and their effective sample size by importance
        weights, k-hat, evidence lower bound) and the corrected draws by site.
    """
    result = infer.fit(posterior.model, seed=seed, progress=False)
    found = {"seconds": elapsed(), "ess": result.ess, "elbo": result.elbo, "khat": result.khat}
    draws = {name: torch.as_tensor(values.values[0]) for name, values in result.posterior["posterior"].items()}
    return {**found, "num_draws": len(next(iter(draws.values())))}, draws


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a method on a posterior; see ``--help``."""
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add("posterior", choices=[*POSTERIORS, *MORE_POSTERIORS])
    add("method", choices=("nuts", "log-density-nuts", "fit"))
    add("--seconds", type=positive_real, default=60.0, help="the most time (default: 60)")
    add("--effective", type=positive_real, default=1000.0, help="effective draws (default: 1000)")
    add("--begin", type=float, default=time.time(), help="when the process began, by time.time() (default: now)")
    add("--seed", type=int, default=0, help="seed (default: 0)")
    add("--data-dir", type=Path, help="the folder with the folder posteriordb")
    add("--draws", type=Path, help="the file for draws of the sites (NPZ)")
    args = parser.begin(argv)
    posterior = load(args.posterior, args.data_dir)
    pyro.set_rng_seed(args.seed)

    def elapsed() -> float:
        return time.time() - args.begin

    if args.method == "fit":
        found, draws = fit(posterior, args.seed, elapsed)
    elif args.method == "nuts":
        found, draws = sample(NUTS(posterior.model), args.effective, args.seconds, elapsed)
    else:
        density = infer.LogDensity(posterior.model)
        kernel = NUTS(potential_fn=density.potential)
        found, draws = sample(kernel, args.effective, args.seconds, elapsed, density)
    if draws and args.draws:
        np.savez(args.draws, **{name: x.numpy() for name, x in draws.items()})  # type: ignore[arg-type]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
