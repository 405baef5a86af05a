# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Variational guides beside each other, Pyro's and AutoHollowCNF: eight posteriors, at equal steps and at equal seconds.

Every guide is fitted by the same optimiser with the same settings, none is tuned for a posterior; then its samples are
compared with the posterior's. A Hollow-CNF is judged by a solve at tight tolerances, whatever it was trained with.
At equal seconds each guide gets as many steps as take it as long as the first guide that is named takes for its own.

    python -m pyro_hollow.experiments.posteriors --data-dir FOLDER

The folder has a folder "posteriordb"; see :mod:`pyro_hollow.experiments.posterior_models`. Without it, use
``--posterior funnel banana ring bent eight_schools``. Finished runs are kept and reused.

With ``--peer`` other methods than guides of Pyro run beside them, seconds counted from the start of a process; see
:mod:`pyro_hollow.experiments.peers`. Those of NumPyro need ``make numpyro``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions.transforms as T
import torch
from pyro.infer import SVI, Trace_ELBO, autoguide
from pyro.infer.autoguide import AutoGuide, AutoNormal

from pyro_hollow.experiments import peers
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.harness import (
    Parser,
    Progress,
    figure,
    keep,
    kept,
    positive,
    positive_real,
    spread,
    table,
    write,
)
from pyro_hollow.experiments.posterior_models import MORE_POSTERIORS, POSTERIORS, Posterior, load
from pyro_hollow.infer import AutoHollowCNF, diagnose
from pyro_hollow.ode import Solver, SolverError

TIGHT = Solver(rtol=1e-6, atol=1e-6)
LEARNING_RATE, PARTICLES = 1e-2, 32


def _flow(init: Callable[..., Any], repeats: int = 1, **kwargs: Any) -> Callable[[Any], AutoGuide]:
    return lambda model: autoguide.AutoNormalizingFlow(model, lambda d: T.iterated(repeats, partial(init, d, **kwargs)))


def _hollow(**kwargs: Any) -> Callable[[Any], AutoGuide]:
    return lambda model: AutoHollowCNF(model, **kwargs)


#: The guides that are compared, and variants of AutoHollowCNF that tell what its defaults bring.
GUIDES: dict[str, Callable[[Any], AutoGuide]] = {
    "hollow": _hollow(),
    "normal": AutoNormal,
    "multivariate": autoguide.AutoMultivariateNormal,
    "iaf": lambda model: autoguide.AutoIAFNormal(model, num_transforms=2),
    "spline": _flow(T.spline_autoregressive, 2),
    "neural": _flow(T.neural_autoregressive),
    "block": _flow(T.block_autoregressive),
    "planar": _flow(T.planar, 16),
}
VARIANTS: dict[str, Callable[[Any], AutoGuide]] = {
    "penalty": _hollow(penalty=1e-3),
    "no-warm-up": _hollow(warm_up=0),
    "tanh": _hollow(activation="tanh"),
    "no-max-rate": _hollow(max_rate=None),
    "diagonal": _hollow(affine="diagonal"),
    "path-gradient": _hollow(path_gradient=True),
    "overdispersed": _hollow(path_gradient=True, overdispersion=2.0),
    "compiled": _hollow(compile=True),
    "rtol-1e-1": _hollow(solver=Solver(rtol=1e-1, atol=1e-1)),
    "rtol-1e-2": _hollow(solver=Solver(rtol=1e-2, atol=1e-2)),
    "rtol-1e-4": _hollow(solver=Solver(rtol=1e-4, atol=1e-4)),
    "bosh3": _hollow(solver=Solver("bosh3", rtol=1e-3, atol=1e-3)),
    "rk4-4": _hollow(solver=Solver("rk4", options={"step_size": 0.25})),
}


@dataclass(frozen=True)
class Config:
    """All that decides the result of a run, but for the machine."""

    posterior: str
    guide: str
    steps: int
    seed: int
    schedule: str = "cosine"  #: of the learning rate: "cosine", down to 0, or "constant".


@dataclass
class Result:
    """Findings of a run."""

    config: Config  #: its settings.
    failure: str = ""  #: the error that ended it, or "".
    elbo: float = math.nan  #: the evidence lower bound.
    khat: float = math.nan  #: of the importance weights; see :func:`~pyro_hollow.infer.diagnose`.
    ess: float = math.nan  #: the effective sample size over the number of samples.
    #: the largest error of a mean, in standard deviations of the reference; nan without a reference.
    mean_error: float = math.nan
    scale_error: float = math.nan  #: the largest relative error of a standard deviation.
    milliseconds: float = math.nan  #: per step.
    evaluations: float = math.nan  #: per solve of a Hollow-CNF, mean over the last tenth of the steps.
    tight_evaluations: float = math.nan  #: per solve when it is judged.
    solver_error: float = math.nan  #: ELBO with the guide's own solver minus that of the tight one.
    num_samples: int = 0  #: the samples it was judged by.
    #: steps, losses and evaluations, means over a fiftieth of the steps each.
    history: list[list[float]] = field(default_factory=list)


Runs = dict[str, list[Result]]
Draws = dict[str, np.ndarray]


def fit(posterior: Posterior, guide: AutoGuide, config: Config, result: Result) -> None:
    """Fits a guide by Adam with clipped gradients and a schedule of the learning rate; adds history and time."""
    pyro.clear_param_store()
    pyro.set_rng_seed(config.seed)
    optimizer = pyro.optim.ClippedAdam({"lr": LEARNING_RATE, "clip_norm": 10.0})
    svi = SVI(posterior.model, guide, optimizer, Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True))
    label = f"{config.posterior}, {config.guide}, seed {config.seed}"
    every = max(1, config.steps // 50)
    losses: list[float] = []
    evaluations: list[float] = []
    begin = time.perf_counter()
    for step in Progress(range(1, config.steps + 1), desc=label):
        fraction = (1 + math.cos(math.pi * step / config.steps)) / 2 if config.schedule == "cosine" else 1.0
        for own in optimizer.optim_objs.values():
            own.param_groups[0]["lr"] = LEARNING_RATE * fraction
        losses.append(svi.step())
        evaluations.append(_evaluations(guide))
        if step % every == 0:
            result.history.append([step, float(np.mean(losses[-every:])), float(np.mean(evaluations[-every:]))])
    result.milliseconds = (time.perf_counter() - begin) / config.steps * 1e3
    result.evaluations = float(np.mean(evaluations[-max(1, config.steps // 10) :]))


def _evaluations(guide: AutoGuide) -> float:
    """Evaluations of the latest solve; nan for other guides, 0 while the flow sits out."""
    if not isinstance(guide, AutoHollowCNF):
        return math.nan
    return float(sum(flow.last_solve.nfe for flow in guide._modules["flows"] if flow.last_solve is not None))


def judge(posterior: Posterior, guide: AutoGuide, num_samples: int, result: Result) -> Draws:
    """
    Compares samples of a fitted guide with its posterior; adds the findings to the result.

    :returns: draws of the posterior's quantities from the guide.
    """

    def check() -> Any:
        pyro.set_rng_seed(1_000_000 + result.config.seed)
        return diagnose(posterior.model, guide, num_samples=num_samples, batch_size=2500)

    found = check()
    if isinstance(guide, AutoHollowCNF):
        own_elbo, own_solver = found.elbo, guide.solver
        guide.solver = TIGHT
        try:
            found = check()
        finally:
            guide.solver = own_solver
        result.solver_error = own_elbo - found.elbo
        result.tight_evaluations = _evaluations(guide)
    result.elbo, result.khat, result.ess = found.elbo, found.khat, found.ess / num_samples
    samples = {name: torch.as_tensor(values.values[0]) for name, values in found.posterior["guide"].items()}
    draws = {name: values.double() for name, values in posterior.quantities(samples).items()}
    if posterior.reference is not None:
        result.mean_error, result.scale_error = errors(posterior, draws)
    return {name: values[:5000].numpy() for name, values in draws.items()}


def errors(posterior: Posterior, draws: dict[str, torch.Tensor]) -> tuple[float, float]:
    """
    Compares draws of the quantities with the reference.

    :returns: the largest error of a mean, in standard deviations of the reference, and the largest relative error of a
        standard deviation.
    """
    assert posterior.reference is not None
    pairs = [(draws[name].double(), values.double()) for name, values in posterior.reference.items()]
    mean_error = max(float((q.mean() - p.mean()).abs() / p.std()) for q, p in pairs)
    return mean_error, max(float((q.std() / p.std() - 1).abs()) for q, p in pairs)


def _file(folder: Path, config: Config) -> Path:
    """The file that keeps a run, as JSON; one in ".npz" has the draws."""
    return folder / config.posterior / f"{config.guide}-{config.steps}-{config.seed}.json"


def run(posterior: Posterior, config: Config, num_samples: int, folder: Path, force: bool) -> Result:
    """Fits and judges a guide, or reads an earlier run from the folder, unless ``force``."""
    path = _file(folder, config)
    found = kept(path, Result, force)
    if found is not None and found.num_samples == num_samples:
        return found
    result, draws = Result(config, num_samples=num_samples), None
    guide = {**GUIDES, **VARIANTS}[config.guide](posterior.model)
    try:
        fit(posterior, guide, config, result)
        draws = judge(posterior, guide, num_samples, result)
    except (ValueError, SolverError) as error:  # a guide that diverges is a finding; Pyro says ValueError of NaN
        result.failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return keep(path, result, draws)


def equal_time(reference: Result, result: Result) -> Config:
    """The settings of a run with the number of steps that takes as long as the reference took."""
    steps = reference.milliseconds * reference.config.steps / result.milliseconds
    return replace(result.config, steps=max(1, round(steps))) if math.isfinite(steps) else result.config


def format_table(posterior: Posterior, at_steps: Runs, at_seconds: Runs) -> str:
    """A table in Markdown of runs by guide, at equal steps and at equal seconds: means over seeds."""

    def mean(results: Sequence[Result], name: str, digits: int) -> str:
        """Leaves out runs that failed: the guide's cell counts them."""
        finite = [value for r in results if math.isfinite(value := getattr(r, name))]
        return spread(finite, digits, deviation=name == "elbo")

    rows = []
    for guide, results in at_steps.items():
        late = at_seconds.get(guide, [])
        failures = {r.config for r in [*results, *late] if r.failure}
        name = guide + (f" ({len(failures)} failed)" if failures else "")
        khats = [r.khat for r in results if not math.isnan(r.khat)]
        cells = [mean(results, "elbo", 3), mean(late, "elbo", 3), f"{max(khats):.2f}" if khats else "-"]
        others = {"mean_error": 2, "scale_error": 2, "milliseconds": 1, "evaluations": 0}
        rows.append([name, *cells, *(mean(results, name, digits) for name, digits in others.items())])
    header = "guide | ELBO | ELBO at equal seconds | k-hat | error of a mean | of a sd | ms per step | evaluations"
    return "\n".join(table(header, rows, f"{posterior.title} ({posterior.shape})"))


def leaders(tables: dict[str, Runs], guide: str, margin: float) -> list[str]:
    """The posteriors on which a guide's mean ELBO is the highest, or within a margin of it in nats."""
    found = []
    for name, runs in tables.items():
        means = {g: float(np.mean([_or_worst(r.elbo) for r in results])) for g, results in runs.items()}
        if means.get(guide, -math.inf) > -math.inf and means[guide] >= max(means.values()) - margin:
            found.append(name)
    return found


def _or_worst(elbo: float) -> float:
    """A run that failed counts as the worst."""
    return elbo if math.isfinite(elbo) else -math.inf


def draw(posterior: Posterior, runs: Runs, folder: Path) -> None:
    """Draws the posterior's telling pair and its marginals, guide by guide, against the reference: PNG."""
    paths = {guide: _file(folder, results[0].config).with_suffix(".npz") for guide, results in runs.items()}
    draws = {guide: dict(np.load(path)) for guide, path in paths.items() if path.exists()}
    if not draws:
        return
    horizontal, vertical = posterior.pair
    reference = None if posterior.reference is None else {k: v[:5000].numpy() for k, v in posterior.reference.items()}
    first = next(iter(draws.values()))
    names = list(dict.fromkeys([*posterior.pair, *first]))[:4]
    scale = {name: "log" if name in posterior.log_scale else "linear" for name in names}
    limits = _limits(first if reference is None else reference, scale)
    columns = min(4, len(draws))
    rows = math.ceil(len(draws) / columns) + 1
    size = 3 * columns, 3 * rows
    with figure(folder / f"{posterior.name}.png", rows, columns, size, squeeze=False) as (whole, axes):
        for axis in axes.flat:
            axis.set_visible(False)
        for axis, (guide, sample) in zip(axes.flat, draws.items(), strict=False):
            axis.set_visible(True)
            dots = {"markersize": 2, "rasterized": True}
            if reference is not None:
                axis.plot(reference[horizontal], reference[vertical], ".", color="0.7", **dots)
            axis.plot(sample[horizontal][:2000], sample[vertical][:2000], ".", color="C0", alpha=0.4, **dots)
            axis.set(title=guide, xlabel=horizontal, ylabel=vertical, xscale=scale[horizontal], yscale=scale[vertical])
            axis.set(xlim=limits[horizontal], ylim=limits[vertical])
        for axis, name in zip(axes[-1], names, strict=False):
            axis.set_visible(True)
            _draw_marginal(axis, name, scale[name], limits[name], reference, draws)
        if axes[-1, 0].get_legend_handles_labels()[0]:
            axes[-1, 0].legend(loc="upper right", fontsize=7)
        whole.suptitle(f"{posterior.title}: draws of the guides on those of the posterior (grey)")


def _limits(sample: Draws, scale: dict[str, str]) -> dict[str, tuple[float, float]]:
    limits = {}
    for name, kind in scale.items():
        values = np.log(sample[name]) if kind == "log" else sample[name]
        low, high = np.quantile(values, [0.002, 0.998])
        low, high = low - 0.15 * (high - low), high + 0.15 * (high - low)
        limits[name] = (math.exp(low), math.exp(high)) if kind == "log" else (low, high)
    return limits


def _draw_marginal(
    axis: Any, name: str, scale: str, limits: tuple[float, float], reference: Draws | None, draws: dict[str, Draws]
) -> None:
    edges = np.geomspace(*limits, 40) if scale == "log" else np.linspace(*limits, 40)
    if reference is not None:
        axis.hist(reference[name], edges, density=True, color="0.8", label="reference")
    styles = [("hollow", "C0", "-"), ("normal", "C1", ":"), ("multivariate", "C2", "--"), ("iaf", "C3", "-.")]
    for guide, color, line in styles:
        if guide in draws:
            style = {"histtype": "step", "color": color, "linestyle": line}
            axis.hist(draws[guide][name], edges, density=True, label=guide, **style)
    axis.set(xlabel=name, xscale=scale, xlim=limits, ylabel="density")


def draw_evaluations(runs: dict[str, dict[str, Result]], path: Path) -> None:
    """Draws evaluations per solve over training, of runs by posterior and variant: PNG."""
    with figure(path, 1, len(runs), (3 * len(runs), 3), squeeze=False, sharey=True) as (_, axes):
        for axis, (name, results) in zip(axes[0], runs.items(), strict=True):
            for (guide, result), line in zip(results.items(), cycle(("-", "--", ":", "-.")), strict=False):
                steps, _, evaluations = zip(*result.history, strict=True)
                axis.plot(steps, evaluations, line, label=guide)
            axis.set(title=name, xlabel="step")
        axes[0, 0].set_ylabel("evaluations per solve")
        if axes[0, 0].get_legend_handles_labels()[0]:
            axes[0, 0].legend(loc="upper right")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(__file__, __doc__, needs=("arviz", "matplotlib"))
    add, names, schedules = parser.add_argument, [*GUIDES, *VARIANTS], ("cosine", "constant")
    known = [*POSTERIORS, *MORE_POSTERIORS]
    add("--posterior", nargs="+", choices=known, default=list(POSTERIORS), help=f"default: {', '.join(POSTERIORS)}")
    add("--guide", nargs="*", choices=names, default=list(GUIDES), help=f"default: {', '.join(GUIDES)}")
    add("--peer", nargs="+", choices=peers.PEERS, default=[], help="other methods (default: none)")
    add("--seconds", type=positive_real, default=60.0, help="of a flow of --peer, at most of NUTS (default: 60)")
    add("--effective", type=positive_real, default=1000.0, help="effective draws that end NUTS (default: 1000)")
    add("--numpyro", type=Path, default=peers.NUMPYRO, help=f"NumPyro's Python (default: {peers.NUMPYRO})")
    add("--steps", type=positive, default=2000, help="steps (default: 2000)")
    add("--schedule", choices=schedules, default="cosine", help="of the learning rate (default: cosine)")
    add("--seed", nargs="+", type=int, default=[0, 1, 2], help="seeds (default: 0 1 2)")
    add("--num-samples", type=positive, default=10_000, help="to judge a guide by (default: 10000)")
    add("--no-equal-seconds", action="store_true", help="equal steps only")
    add("--data-dir", type=Path, help="the folder with the folder posteriordb")
    parser.add_kept("results/posteriors", ", those of a constant rate in a folder of their own")
    return parser


def _wake_up() -> None:
    """The first steps in a process take longer."""
    posterior, config = load("banana"), Config("banana", "normal", 5, 0)
    fit(posterior, AutoNormal(posterior.model), config, Result(config))


def _run_guides(posterior: Posterior, args: argparse.Namespace, folder: Path) -> tuple[Runs, Runs]:
    """Runs of the guides at equal steps and, if asked for, at equal seconds; prints and draws them."""
    # Each run once, though at equal seconds the first guide has the same again.
    one = cache(partial(run, posterior, num_samples=args.num_samples, folder=folder, force=args.force))
    runs: Runs = {
        g: [one(Config(posterior.name, g, args.steps, seed, args.schedule)) for seed in args.seed] for g in args.guide
    }
    late: Runs = {}
    if not args.no_equal_seconds:
        pairs = {g: zip(runs[args.guide[0]], own, strict=True) for g, own in runs.items()}
        late = {g: [one(equal_time(*pair)) for pair in own] for g, own in pairs.items()}
    lines = format_table(posterior, runs, late)
    print(lines, end="\n\n", flush=True)
    write(folder / f"{posterior.name}.md", lines + "\n")
    draw(posterior, runs, folder)
    return runs, late


def _run_peers(posterior: Posterior, names: Sequence[str], args: argparse.Namespace) -> None:
    """Runs other methods, and prints their table."""
    runs = {}
    for name in names:
        configs = [peers.PeerConfig(posterior.name, name, s, args.seconds, args.effective) for s in args.seed]
        runs[name] = [peers.run(posterior, c, args.data_dir, args.numpyro, args.output, args.force) for c in configs]
    lines = peers.format_peers(posterior, runs)
    print(lines, end="\n\n", flush=True)
    write(args.output / f"{posterior.name}-peers.md", lines + "\n")


def _conclude(args: argparse.Namespace, steps: dict[str, Runs], seconds: dict[str, Runs], folder: Path) -> None:
    """Prints where the first guide leads, and draws the evaluations of variants."""
    for label, tables in (("steps", steps), ("seconds", seconds)):
        if tables:
            first = leaders(tables, args.guide[0], 0.0)
            close = [name for name in leaders(tables, args.guide[0], 0.05) if name not in first]
            print(f"At equal {label} {args.guide[0]} has the best ELBO on: {', '.join(first) or 'none'}; "
                  f"is within 0.05 nat of it on: {', '.join(close) or 'none'}")  # fmt: skip
    variants = [g for g in args.guide if g in (args.guide[0], *VARIANTS)]
    if len(variants) > 1:
        shown = {name: {g: runs[g][0] for g in variants if runs[g][0].history} for name, runs in steps.items()}
        draw_evaluations(shown, folder / "evaluations.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = make_parser()
    args = parser.begin(argv)
    try:
        posteriors = [load(name, args.data_dir) for name in args.posterior]
    except DataError as error:
        parser.error(str(error))
    names = [name for name in args.peer if args.numpyro.exists() or not name.startswith("numpyro-")]
    if len(names) < len(args.peer):
        print(f"Skipped {', '.join(p for p in args.peer if p not in names)}: there is no {args.numpyro}; "
              "run `make numpyro`, or name the Python of an environment with NumPyro with --numpyro")  # fmt: skip
    folder = args.output if args.schedule == "cosine" else args.output / args.schedule
    steps: dict[str, Runs] = {}
    seconds: dict[str, Runs] = {}
    if args.guide:
        _wake_up()
    for posterior in posteriors:
        if args.guide:
            steps[posterior.name], late = _run_guides(posterior, args, folder)
            if late:
                seconds[posterior.name] = late
        if names:
            _run_peers(posterior, names, args)
    _conclude(args, steps, seconds, folder)


if __name__ == "__main__":
    main()
