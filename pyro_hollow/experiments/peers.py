# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
:func:`pyro_hollow.fit`, NUTS of Pyro and NumPyro, and NumPyro's flows, for :mod:`~pyro_hollow.experiments.posteriors`.

Every run is a process of its own. Seconds count from its start: imports and compiling are included. NUTS runs until the
smallest effective sample size of a coordinate is reached, a flow until its time is over.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pyro_hollow.experiments import harness
from pyro_hollow.experiments.harness import keep, kept, spread, table
from pyro_hollow.experiments.posterior_models import Posterior

#: The methods that are compared, with the name that the program of the library gives each.
PEERS: dict[str, tuple[str, str]] = {
    "fit": ("pyro", "fit"),
    "pyro-nuts": ("pyro", "nuts"),
    "log-density-nuts": ("pyro", "log-density-nuts"),
    "numpyro-nuts": ("numpyro", "nuts"),
    "numpyro-iaf": ("numpyro", "iaf"),
    "numpyro-bnaf": ("numpyro", "bnaf"),
}
#: The Python that ``make numpyro`` makes.
NUMPYRO = Path(".venv-numpyro/bin/python")
#: Seconds after its time that a process has to end: to finish compiling, a chunk of draws, and to be judged.
GRACE = 600.0


@dataclass(frozen=True)
class PeerConfig:
    """All that decides the result of a run, but for the machine."""

    posterior: str
    peer: str  #: a name in :data:`PEERS`.
    seed: int
    seconds: float  #: the time of a flow, and the most time for NUTS.
    effective: float  #: effective draws that end NUTS.


@dataclass
class PeerResult:
    """Findings of a run; those that a method does not have are nan or 0."""

    config: PeerConfig  #: its settings.
    failure: str = ""  #: the last line of the error that ended it, or "".
    seconds: float = math.nan  #: until it was done, from the start of the process.
    warm_up_seconds: float = math.nan  #: until the end of the warm-up.
    num_draws: int = 0  #: draws after the warm-up.
    ess: float = math.nan  #: the smallest effective sample size of a coordinate, or that of the importance weights.
    khat: float = math.nan  #: of the importance weights.
    num_steps: int = 0  #: steps of a flow.
    elbo: float = math.nan  #: the evidence lower bound of a flow.
    mean_error: float = math.nan  #: the largest error of a mean, in standard deviations of the reference.
    scale_error: float = math.nan  #: the largest relative error of a standard deviation.


def run(
    posterior: Posterior, config: PeerConfig, data_dir: Path | None, numpyro: Path, folder: Path, force: bool
) -> PeerResult:
    """
    Runs a method in a process, or reads an earlier run from the folder, unless ``force``.

    :param ~pathlib.Path numpyro: the Python of NumPyro's environment.
    """
    name = f"{config.peer}-{config.seconds:g}-{config.effective:g}-{config.seed}.json"
    path = folder / config.posterior / name
    found = kept(path, PeerResult, force)
    if found is not None:
        return found
    library, method = PEERS[config.peer]
    program = Path(__file__).with_name("numpyro_peers.py")
    command = (
        [str(numpyro), str(program)] if library == "numpyro" else [sys.executable, "-m", f"{__package__}.pyro_peers"]
    )
    result = PeerResult(config)
    with tempfile.TemporaryDirectory() as scratch:
        draws = Path(scratch) / "draws.npz"
        command += [config.posterior, method, "--seed", str(config.seed), "--draws", str(draws)]
        command += ["--seconds", str(config.seconds), "--effective", str(config.effective)]
        command += ["--data-dir", str(data_dir)] if data_dir else []
        _call(command, result)
        if draws.exists():
            _compare(posterior, draws, result)
    return keep(path, result)


def _call(command: list[str], result: PeerResult) -> None:
    """Runs a program that prints its findings as JSON; adds them, or the failure, to the result."""
    try:
        found = harness.call([*command, "--begin", time.time()], timeout=result.config.seconds + GRACE)
    except RuntimeError as error:
        result.failure = str(error)
        return
    for key, value in found.items():
        setattr(result, key, value)


def _compare(posterior: Posterior, path: Path, result: PeerResult) -> None:
    """Adds errors of means and standard deviations, given a file with draws of the sites."""
    if posterior.reference is None:
        return
    with np.load(path) as arrays:
        draws = posterior.quantities({name: torch.from_numpy(arrays[name]).double() for name in arrays})
    pairs = [(draws[name], values.double()) for name, values in posterior.reference.items()]
    result.mean_error = max(float((q.mean() - p.mean()).abs() / p.std()) for q, p in pairs)
    result.scale_error = max(float((q.std() / p.std() - 1).abs()) for q, p in pairs)


def format_peers(posterior: Posterior, runs: Mapping[str, Sequence[PeerResult]]) -> str:
    """A table in Markdown of runs by method: means over seeds, and the smallest effective sample size."""
    rows = []
    digits = {"seconds": 1, "warm_up_seconds": 1, "num_draws": 0, "elbo": 3}
    digits |= dict.fromkeys(("khat", "mean_error", "scale_error"), 2)
    for peer, results in runs.items():
        failures = sum(bool(r.failure) for r in results)
        done = [r for r in results if not r.failure]
        cells = {name: spread([getattr(r, name) for r in done], n, name == "elbo") for name, n in digits.items()}
        smallest = min((r.ess for r in done if not math.isnan(r.ess)), default=math.nan)
        cells["num_draws"] = "-" if math.isnan(smallest) else f"{cells['num_draws']} (ESS {smallest:.0f})"
        rows.append([peer + (f" ({failures} failed)" if failures else ""), *cells.values()])
    header = "method | seconds | of these warm-up | draws (smallest ESS) | ELBO | k-hat | error of a mean | of a sd"
    return "\n".join(table(header, rows, f"{posterior.title}: seconds from the start of the process"))
