# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Runs of :func:`pyro_hollow.fit` that are kept and put into tables, for the experiments that compare with published ones.

Guides of Pyro are fitted by the same function. AutoIAFNormal clips the logarithm of the scale of each transform to
[-5, 3]; the scales of the two transforms used here multiply to 5e-5 at least, and 400 at most.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import autoguide

from pyro_hollow import infer
from pyro_hollow.experiments.harness import Parser, keep, kept, positive_real

#: The guides by name; "fit" is that of :func:`pyro_hollow.fit` itself.
GUIDES: dict[str, Callable[[Any], Any]] = {
    "fit": lambda model: None,
    "multivariate": autoguide.AutoMultivariateNormal,
    "low-rank": autoguide.AutoLowRankMultivariateNormal,
    "iaf": lambda model: autoguide.AutoIAFNormal(model, num_transforms=2),
}
#: What a fit may end with; all of it is a finding.
FAILURES = (ValueError, ArithmeticError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Config:
    """All that decides the result of a run, but for the machine."""

    posterior: str
    guide: str
    seed: int
    time_limit: float  #: seconds of training.


@dataclass
class Result:
    """Findings of a run; evidences are on the scale of the published ones."""

    config: Config  #: its settings.
    failure: str = ""  #: the error that ended it, or "".
    gaussian: float = math.nan  #: the evidence lower bound (ELBO) of the Gaussian that the flow starts from.
    elbo: float = math.nan  #: the ELBO.
    elbo_error: float = math.nan  #: its standard error.
    log_evidence: float = math.nan  #: by importance weights.
    log_evidence_error: float = math.nan  #: its standard error.
    khat: float = math.nan  #: of the importance weights; see :func:`~pyro_hollow.infer.diagnose`.
    ess: float = math.nan  #: the effective sample size of the weighted draws.
    num_samples: int = 0  #: the draws.
    steps: int = 0  #: of training.
    seconds: float = math.nan  #: of the fit, by the clock.
    processor: float = math.nan  #: of the fit, by the clock of the processor.
    events: list[str] = field(default_factory=list)  #: all that did not go by plan.
    more: dict[str, float] = field(default_factory=dict)  #: findings of an experiment of its own.


Runs = dict[str, list[Result]]
Examine = Callable[[infer.Fit], Mapping[str, float]]


def run(
    model: Callable[[], Any],
    config: Config,
    folder: Path,
    force: bool = False,
    *,
    offset: float = 0.0,
    examine: Examine | None = None,
) -> Result:
    """
    Fits a guide to a model, or reads an earlier run from the folder.

    :param model: the model.
    :param Config config: the settings.
    :param ~pathlib.Path folder: the folder of results.
    :param bool force: run anew what is kept there.
    :param float offset: what to add to evidences and their bounds.
    :param examine: returns further findings of a fit.
    :raises KeyboardInterrupt: if ``Ctrl-C`` ended the fit; it is not kept.
    """
    path = folder / config.posterior / f"{config.guide}-{config.time_limit:g}-{config.seed}.json"
    found = kept(path, Result, force)
    if found is not None:
        return found
    pyro.clear_param_store()  # or guides of Pyro would take the parameters of an earlier run
    result, begin = Result(config), time.process_time()
    try:
        guide, limit = GUIDES[config.guide](model), config.time_limit
        fitted = infer.fit(model, guide=guide, seed=config.seed, time_limit=limit, progress=False)
        if _interrupted(fitted):
            raise KeyboardInterrupt
        result.processor, result.seconds = time.process_time() - begin, fitted.seconds
        _note(fitted, offset, result)
        torch.manual_seed(config.seed)
        result.more = {} if examine is None else dict(examine(fitted))
    except FAILURES as error:
        result.failure = (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
    return keep(path, result)


def run_seeds(model: Callable[[], Any], name: str, guide: str, args: argparse.Namespace, **kwargs: Any) -> list[Result]:
    """
    Runs a guide with each seed of a command line; see :func:`run`.

    :param model: the model.
    :param str name: its name.
    :param str guide: a name in :data:`GUIDES`.
    :param args: the command line of :func:`make_parser`.
    :param kwargs: further keyword arguments of :func:`run`.
    """
    configs = [Config(name, guide, seed, args.time_limit) for seed in args.seeds]
    return [run(model, config, args.output, args.force, **kwargs) for config in configs]


def _interrupted(fitted: infer.Fit) -> bool:
    """True for a fit that ``Ctrl-C`` ended before it was done."""
    training, gaussian = fitted.training, fitted.gaussian
    if training is not None and training.stopped == "interrupted":
        return True
    return (gaussian is not None and gaussian.interrupted) or any("Ctrl-C" in reason for reason in fitted.reasons)


def _note(fitted: infer.Fit, offset: float, result: Result) -> None:
    """Adds the findings of a fit to the result."""
    if fitted.diagnostics is None:
        raise ValueError("; ".join(fitted.reasons))
    result.elbo, result.elbo_error = fitted.elbo + offset, fitted.diagnostics.elbo_error
    result.log_evidence, result.log_evidence_error = fitted.log_evidence + offset, fitted.log_evidence_error
    result.khat, result.ess, result.num_samples = fitted.khat, fitted.ess, fitted.diagnostics.num_samples
    result.steps = fitted.num_steps
    if fitted.gaussian is not None:
        result.gaussian = fitted.gaussian.elbo + offset
    result.events = [*fitted.reasons, *([] if fitted.training is None else fitted.training.events)]


def middle(values: Sequence[float], digits: int) -> str:
    """The median of values that are finite and their range, "-" without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    low, median, high = (f"{value:.{digits}f}" for value in (min(finite), np.median(finite), max(finite)))
    return median if low == high else f"{median} ({low} to {high})"


def cells(results: Sequence[Result], digits: int = 2) -> list[str]:
    """
    Cells of a row, under :data:`HEADER`: medians and ranges over seeds.

    :param results: those of the seeds.
    :param int digits: decimal places of evidences.
    """

    def of(name: str, digits: int) -> str:
        return middle([getattr(result, name) for result in results], digits)

    known = [r.log_evidence_error for r in results if math.isfinite(r.log_evidence_error)]
    error = middle([max(known, default=math.nan)], 3)
    evidence = f"{of('log_evidence', digits)} ± {error}"
    steps = middle([r.steps for r in results if not r.failure], 0)
    return [of("elbo", digits), evidence, of("khat", 2), of("ess", 0), steps, of("seconds", 0), of("processor", 0)]


#: The columns of :func:`cells`.
HEADER = "ELBO | log evidence | k-hat | ESS | steps | seconds | of the processor"


def failures(results: Sequence[Result]) -> list[str]:
    """Sentences on runs that failed."""
    return [f"{r.config.posterior}, {r.config.guide}, seed {r.config.seed}: {r.failure}" for r in results if r.failure]


def make_parser(file: str, doc: str | None, names: Sequence[str], data: str, methods: Sequence[str] = ()) -> Parser:
    """
    The command line of an experiment with fits.

    :param str file: the experiment's ``__file__``.
    :param doc: its docstring.
    :param names: the models.
    :param str data: help on the folder with data; "" for none.
    :param methods: the names of others than guides.
    """
    parser = Parser(file, doc, needs=("arviz",))
    add = parser.add_argument
    add("--models", nargs="+", choices=names, default=list(names), help="default: all")
    add("--guides", nargs="+", choices=[*GUIDES, *methods], default=["fit"], help="default: fit")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--time-limit", type=positive_real, default=300.0, help="seconds of a training at most (default: 300)")
    if data:
        add("--data-dir", type=Path, help=data)
    parser.add_kept(f"results/{Path(file).stem}")
    return parser
