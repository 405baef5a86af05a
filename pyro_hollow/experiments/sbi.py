# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Simulation-based inference: pyro_hollow.fit_amortised on four tasks of the benchmark of Lueckmann et al. (2021).

Every task is a Pyro program, from which all posteriors are fitted with the defaults. Draws from the posterior given
each observation are compared with 10,000 reference draws by the accuracy of a classifier (C2ST, 0.5 is perfect), as the
benchmark defines it: a perceptron with two layers of 10 d units, 5 folds, draws standardised by the reference. The
published columns are means over 10 observations; here there are as many as the file has.

    python -m pyro_hollow.experiments.sbi --data-dir FOLDER

The folder has a folder "sbibm"; see :mod:`pyro_hollow.experiments.sbi_tasks`. Finished runs are kept and reused. With
``--peer`` the sbi package's NPE and FMPE run on the same simulations with their defaults (``make sbi`` first).
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_hollow import infer
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.harness import Parser, call, extra, keep, kept, positive, spread, table, write
from pyro_hollow.experiments.sbi_tasks import TASKS, Task, load
from pyro_hollow.infer.simulation import Simulator

DRAWS = 10_000  #: as many as in a reference.
CALIBRATION_RUNS, CALIBRATION_DRAWS = 2000, 200
SIMULATIONS = (1000, 10_000)  #: for which there are published values here.
OURS, PEERS = "fit_amortised", ("npe", "fmpe")
SBI = Path(".venv-sbi/bin/python")  #: the Python that ``make sbi`` makes.


@dataclass(frozen=True)
class Config:
    """All that decides the result of a run, but for the machine."""

    task: str
    simulations: int
    seed: int
    method: str = OURS  #: that, or one of :data:`PEERS`.


@dataclass
class Result:
    """Findings of a run."""

    config: Config  #: its settings.
    c2st: list[float] = field(default_factory=list)  #: for each observation.
    log_prob: float = math.nan  #: mean log density of the latents on the validation set.
    seconds: float = math.nan  #: of simulation and training.
    draw_seconds: float = math.nan  #: of 10,000 draws given an observation, the median.
    p_value: float = math.nan  #: the smallest of the tests of uniform ranks, times the number of latents, at most 1.
    coverage_50: float = math.nan  #: the share of latents in the credible regions of 50 %.
    coverage_90: float = math.nan  #: likewise of 90 %.
    leakage: float = math.nan  #: the share of draws outside of the prior's support.
    weights: list[float] = field(default_factory=list)  #: of the flows.


def c2st(reference: Tensor, draws: Tensor, seed: int = 1) -> float:
    """
    The accuracy of a classifier between two samples as the benchmark defines it; 0.5 if it cannot tell them apart.

    :param Tensor reference: with shape ``(n, d)``, which gives location and scale.
    :param Tensor draws: with shape ``(n, d)``.
    :param int seed: of classifier and folds.
    """
    with extra():
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    loc, scale = reference.mean(0), reference.std(0)
    x = torch.cat([(reference - loc) / scale, (draws - loc) / scale]).float().numpy()
    label = np.repeat([0.0, 1.0], [len(reference), len(draws)])
    width = 10 * x.shape[1]
    classifier = MLPClassifier((width, width), max_iter=10_000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, x, label, cv=folds, scoring="accuracy").mean())


def run(
    config: Config, observations: Sequence[tuple[Tensor, Tensor]], folder: Path, force: bool = False, sbi: Path = SBI
) -> Result:
    """
    Fits a posterior and judges it, or reads an earlier run from the folder.

    :param Config config: the settings.
    :param observations: pairs of an observation and its reference draws.
    :param ~pathlib.Path folder: the folder of results.
    :param bool force: run anew what is kept there.
    :param ~pathlib.Path sbi: the Python that has sbi.
    """
    path = folder / config.task / f"{config.method}-{config.simulations}-{config.seed}.json"
    found = kept(path, Result, force)
    if found is not None:
        return found
    result = Result(config)
    drawn = _fit(result, observations) if config.method == OURS else _fit_peer(result, observations, sbi)
    for draws, (_, reference) in zip(drawn, observations, strict=True):
        result.c2st.append(c2st(reference, draws[: len(reference)]))
        print(config, "C2ST", round(result.c2st[-1], 3), flush=True)
    return keep(path, result)


def _fit(result: Result, observations: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Draws given each observation; adds all findings but the accuracies to the result."""
    config, task = result.config, TASKS[result.config.task]
    fitted = infer.fit_amortised(
        task.model,
        observed=["x"],
        sites=["theta"],
        num_simulations=config.simulations,
        seed=config.seed,
        progress=False,
    )
    result.seconds, result.log_prob, result.weights = fitted.seconds, fitted.log_prob, fitted.weights.tolist()
    torch.manual_seed(config.seed)
    _judge_calibration(fitted, result)
    drawn, outside, times = [], [], []
    for observation, _ in observations:
        posterior, begin = fitted.posterior(observation), time.perf_counter()
        drawn.append(posterior.draws(DRAWS)["theta"])
        times.append(time.perf_counter() - begin)
        outside.append(float((~posterior.support.check(drawn[-1])).double().mean()))
    result.leakage, result.draw_seconds = max(outside), sorted(times)[len(times) // 2]
    return drawn


def _fit_peer(result: Result, observations: Sequence[tuple[Tensor, Tensor]], sbi: Path) -> list[Tensor]:
    """Likewise by a program that has sbi; the simulations are those of fit_amortised with this seed."""
    config, task = result.config, TASKS[result.config.task]
    torch.manual_seed(config.seed)
    found = Simulator(task.model, (), {}, ["x"], ["theta"]).draw(config.simulations)
    arrays = _prior(task) | {"theta": found.theta["theta"], "x": found.x["x"].flatten(1)}
    arrays |= {f"observation_{i}": observation.flatten() for i, (observation, _) in enumerate(observations, 1)}
    with tempfile.TemporaryDirectory() as scratch:
        pairs, draws = Path(scratch) / "pairs.npz", Path(scratch) / "draws.npz"
        np.savez(pairs, **{name: value.float().numpy() for name, value in arrays.items()})  # type: ignore[arg-type]
        program = Path(__file__).with_name("sbi_peers.py")
        # -I, or this file would be imported in place of the package sbi, which writes its logs to the working folder.
        command = [sbi.absolute(), "-I", program, config.method, pairs, draws, "--count", DRAWS, "--seed", config.seed]
        for key, value in call(command, Path(scratch)).items():
            setattr(result, key, value)
        with np.load(draws) as file:
            return [torch.from_numpy(file[f"draws_{i}"]) for i in range(1, len(observations) + 1)]


def _prior(task: Task) -> dict[str, Tensor]:
    """The bounds of a uniform prior, or the moments of a Gaussian one."""
    fn = poutine.trace(task.model).get_trace().nodes["theta"]["fn"]
    if isinstance(fn, MultivariateNormal):
        return {"loc": fn.loc, "covariance": fn.covariance_matrix}
    return {"low": fn.base_dist.low, "high": fn.base_dist.high}


def _judge_calibration(fitted: infer.AmortisedPosterior, result: Result) -> None:
    found = fitted.calibrate(CALIBRATION_RUNS, CALIBRATION_DRAWS)
    result.p_value = min(1.0, float(found.p_values.min()) * len(found.names))
    result.coverage_50, result.coverage_90 = found.coverage(0.5), found.coverage(0.9)


def format_table(results: Sequence[Result]) -> str:
    """A table in Markdown, beside the published values."""
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for result in results:
        config = result.config
        groups.setdefault((config.task, config.simulations, config.method), []).append(result)
    rows = []
    for (name, simulations, method), each in groups.items():
        task = TASKS[name]
        column = SIMULATIONS.index(simulations) if simulations in SIMULATIONS else None
        published = ["-" if column is None else f"{v[column]:.3f}" for v in task.published.values()]
        means = [float(np.mean(result.c2st)) for result in each]
        covered = [100 * float(np.mean([getattr(r, key) for r in each])) for key in ("coverage_50", "coverage_90")]
        calibration = [
            f"{min(r.p_value for r in each):.3f}",
            f"{covered[0]:.1f} / {covered[1]:.1f}",
            f"{max(r.leakage for r in each):.2%}",
        ]
        rows.append(
            [
                name,
                f"{simulations:,}",
                *published,
                method,
                spread(means, 3),
                f"{task.aim:.2f}" if simulations == 10_000 else "-",
                *(calibration if method == OURS else ["-"] * 3),
                f"{np.mean([r.seconds for r in each]):.0f}",
                f"{np.mean([r.draw_seconds for r in each]):.2f}",
            ]
        )
    header = (
        "task | simulations | NPE | SNPE | best other | method | C2ST | aim | p of ranks | coverage at 50 / 90 % | "
        "leakage | seconds | of 10,000 draws"
    )
    return "\n".join(
        table(
            header,
            rows,
            "C2ST, mean over observations and standard deviation over seeds; NPE, SNPE, best other: published",
        )
    )


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(__file__, __doc__, needs=("sklearn",))
    add = parser.add_argument
    add("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="default: all")
    add("--simulations", nargs="+", type=positive, default=list(SIMULATIONS), help="default: 1000 10000")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--observations", nargs="+", type=positive, help="their numbers (default: all in the file)")
    add("--data-dir", type=Path, help="the folder with the folder sbibm")
    add("--peer", nargs="+", choices=PEERS, default=[], help="methods of the sbi package (default: none)")
    add("--sbi", type=Path, default=SBI, help=f"the Python that has sbi (default: {SBI})")
    parser.add_kept("results/sbi")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = make_parser()
    args = parser.begin(argv)
    try:
        data = {name: _chosen(load(name, args.data_dir), args) for name in args.tasks}
    except DataError as error:
        parser.error(str(error))
    if args.peer and not args.sbi.exists():
        parser.error(f"--peer needs the sbi package, but there is no {args.sbi}; run `make sbi`")
    results = []
    for name, simulations, method in itertools.product(args.tasks, args.simulations, [OURS, *args.peer]):
        configs = [Config(name, simulations, seed, method) for seed in args.seeds]
        results += [run(config, data[name], args.output, args.force, args.sbi) for config in configs]
    text = format_table(results)
    print(text, flush=True)
    write(args.output / "table.md", text + "\n")


def _chosen(observations: list[tuple[Tensor, Tensor]], args: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    if args.observations is None:
        return observations
    wrong = [i for i in args.observations if i > len(observations)]
    if wrong:
        raise DataError(f"there are {len(observations)} observations, but not {wrong}")
    return [observations[i - 1] for i in args.observations]


if __name__ == "__main__":
    main()
