# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
NPE and FMPE of the sbi package with their defaults, for :mod:`~pyro_hollow.experiments.sbi`.

This file is run by the Python of an environment that has sbi (``make sbi``) and imports nothing of this package::

    .venv-sbi/bin/python -I pyro_hollow/experiments/sbi_peers.py npe pairs.npz draws.npz

The first file has simulations ("theta" and "x", a row each), observations ("observation_1", ...), and the prior: "low"
and "high" of a uniform one, or "loc" and "covariance" of a Gaussian. Draws are written to the second ("draws_1", ...).
The program prints one line of JSON: the seconds of the training, and the median of those of the draws.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sbi.inference import FMPE, NPE
from sbi.utils import BoxUniform
from torch.distributions import MultivariateNormal

METHODS = {"npe": NPE, "fmpe": FMPE}


def prior(arrays: dict[str, torch.Tensor]) -> Any:
    """The prior that a file describes."""
    if "low" in arrays:
        return BoxUniform(arrays["low"], arrays["high"])
    return MultivariateNormal(arrays["loc"], arrays["covariance"])


def run(method: str, arrays: dict[str, torch.Tensor], count: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """
    Fits a posterior and draws from it given every observation.

    :param method: a name in :data:`METHODS`.
    :param arrays: the first file.
    :param count: the number of draws.
    :returns: the second file, and what is printed.
    """
    begin = time.perf_counter()
    inference = METHODS[method](prior(arrays), show_progress_bars=False)
    inference.append_simulations(arrays["theta"], arrays["x"])
    inference.train()
    posterior = inference.build_posterior()
    seconds, times, draws = time.perf_counter() - begin, [], {}
    for i in range(1, 1 + sum(name.startswith("observation_") for name in arrays)):
        begin = time.perf_counter()
        drawn = posterior.sample((count,), x=arrays[f"observation_{i}"], show_progress_bars=False)
        times.append(time.perf_counter() - begin)
        draws[f"draws_{i}"] = drawn.numpy()
    return draws, {"seconds": seconds, "draw_seconds": sorted(times)[len(times) // 2]}


def main() -> None:
    """Runs the program; see above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("pairs", type=Path)
    parser.add_argument("draws", type=Path)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    with np.load(args.pairs) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    with contextlib.redirect_stdout(sys.stderr):  # sbi prints; the last line is ours
        draws, found = run(args.method, arrays, args.count)
    np.savez(args.draws, **draws)  # type: ignore[arg-type]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
