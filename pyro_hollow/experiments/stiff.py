# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Implicit solvers with three correctors beside explicit ones and SciPy's, on stiff equations.

Jacobi-Newton asks for the diagonal of the Jacobian alone, which hollow networks give away and which each other problem
here knows exactly. Evaluations are counted by the right-hand side itself, those that SciPy spends on differences for
its Jacobian included; errors are relative to a solve at much tighter tolerances. A solver that has not reached the end
within the limit of evaluations is not asked for tighter tolerances.

    python -m pyro_hollow.experiments.stiff

Finished runs are kept and reused. Seconds are those of the processor, which other processes disturb less than those of
a clock.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pyro_hollow.experiments import harness
from pyro_hollow.experiments.stiff_problems import PROBLEMS, Problem, error_of_stiff_field, linear, load
from pyro_hollow.nn import HollowNN
from pyro_hollow.ode import Solver, SolverError
from pyro_hollow.transforms import HollowCNF

CORRECTORS = {"fixed": "fixed-point", "jacobi": "jacobi-newton", "newton": "newton"}
#: Ours, as pairs of method and corrector, and SciPy's.
SOLVERS: dict[str, tuple[str, str]] = {
    "dopri5": ("dopri5", ""),
    **{
        f"{short}-{name}": (method, corrector)
        for short, method in (("bdf", "bdf"), ("kencarp4", "kencarp4"), ("adams", "adams_moulton"))
        for name, corrector in CORRECTORS.items()
    },
    **{f"scipy-{name.lower()}": ("scipy", name) for name in ("Radau", "BDF", "LSODA")},
}
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True)
class Config:
    """All that decides the result of a run, but for the machine."""

    problem: str
    solver: str
    tolerance: float
    max_nfe: int


@dataclass
class Result:
    """Findings of a run."""

    config: Config  #: its settings.
    failure: str = ""  #: the error that ended it, or "".
    error: float = math.nan  #: the largest error of a coordinate, over its size plus the problem's scale.
    evaluations: int = 0  #: of the right-hand side.
    diagonals: int = 0  #: evaluations, among them, with the diagonal.
    jacobians: int = 0  #: dense Jacobians.
    fallbacks: int = 0  #: equations that dense Newton solved for Jacobi-Newton.
    steps: int = 0  #: accepted steps.
    rejected: int = 0  #: rejected steps.
    seconds: float = math.nan  #: of the processor.


def solver_of(name: str, tolerance: float, scale: float, max_nfe: int) -> Solver:
    """A solver of this package by its name in SOLVERS; ``scale`` is the absolute tolerance over the relative one."""
    method, corrector = SOLVERS[name]
    options = {"corrector": corrector} if corrector else {}
    return Solver(method, tolerance, tolerance * scale, options=options, max_nfe=max_nfe)


class _TooMany(Exception):
    """The limit of evaluations is reached."""


def scipy_solve(problem: Problem, method: str, tolerance: float, max_nfe: float = math.inf) -> tuple[Any, int]:
    """
    Solves a problem by SciPy.

    :returns: the result of ``solve_ivp``, None beyond the limit of evaluations, and the number of evaluations.
    """
    count = 0

    def function(t: float, x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        if count > max_nfe:
            raise _TooMany
        return problem.function(torch.tensor(t, dtype=torch.float64), torch.from_numpy(x)).numpy()

    span, tolerances = (0.0, problem.time), {"rtol": tolerance, "atol": tolerance * problem.scale}
    try:
        return solve_ivp(function, span, problem.x[0].numpy(), method, t_eval=[problem.time], **tolerances), count
    except _TooMany:
        return None, count


def error_of(problem: Problem, x: np.ndarray, reference: np.ndarray) -> float:
    """The largest error of a coordinate of a state, over the size of the right one plus the problem's scale."""
    return float(np.max(np.abs(x - reference) / (np.abs(reference) + problem.scale)))


def solve(problem: Problem, config: Config, reference: np.ndarray) -> Result:
    """Solves a problem once; ``reference`` is the right state at the end."""
    method, variant = SOLVERS[config.solver]
    result = Result(config)
    begin = time.process_time()
    if method == "scipy":
        found, result.evaluations = scipy_solve(problem, variant, config.tolerance, config.max_nfe)
        result.seconds = time.process_time() - begin
        if found is None or not found.success:
            result.failure = "max_nfe" if found is None else str(found.message)
            return result
        result.jacobians, result.error = int(found.njev), error_of(problem, found.y[:, -1], reference)
        return result
    solver = solver_of(config.solver, config.tolerance, problem.scale, config.max_nfe)
    try:
        solution = solver.integrate(problem, problem.x, 0.0, problem.time)
    except SolverError as error:
        result.failure, result.evaluations = str(error), error.nfe
        return result
    result.seconds, stats = time.process_time() - begin, solution.stats
    result.error = error_of(problem, solution.state[0].numpy(), reference)
    result.evaluations, result.diagonals, result.jacobians = stats.nfe, stats.diagonals, stats.jacobians
    result.fallbacks, result.steps, result.rejected = stats.fallbacks, stats.accepted, stats.rejected
    return result


def reference_of(name: str, folder: Path, force: bool) -> np.ndarray:
    """The state at the end of a problem, by SciPy at tight tolerances or from an earlier run in the folder."""
    path = folder / name / "reference.json"
    if path.exists() and not force:
        return np.array(json.loads(path.read_text()))
    problem = load(name)
    # Radau's factorisations are complex matrices of the size of the problem.
    method, tolerance = ("LSODA", 1e-11) if problem.x.shape[-1] > 100 else ("Radau", 1e-10)
    end = scipy_solve(problem, method, tolerance)[0].y[:, -1]
    harness.write(path, json.dumps(end.tolist()))
    return end


def run(problem: Problem, config: Config, reference: np.ndarray, folder: Path, force: bool) -> Result:
    """Solves a problem once, or reads an earlier run with the same settings from the folder, unless ``force``."""
    path = folder / config.problem / f"{config.solver}-{config.tolerance:g}.json"
    found = harness.kept(path, Result, force)
    if found is not None and found.config == config:
        return found
    return harness.keep(path, solve(problem, config, reference))


Runs = dict[str, list[Result]]


def compare(name: str, args: argparse.Namespace) -> Runs:
    """Runs by solver on one problem, from loose to tight tolerances, up to the first that fails."""
    problem, reference = load(name), reference_of(name, args.output, args.force)
    runs: Runs = {}
    for solver in harness.Progress(args.solver, desc=name):
        runs[solver] = []
        for tolerance in sorted(args.tolerance, reverse=True):
            config = Config(name, solver, tolerance, args.max_nfe)
            runs[solver].append(run(problem, config, reference, args.output, args.force))
            if runs[solver][-1].failure:
                break
    return runs


def _at(results: Sequence[Result], tolerance: float) -> Result | None:
    """The run at a tolerance; None if it failed, or was not asked for as it failed at a looser one."""
    return next((r for r in results if r.config.tolerance == tolerance and not r.failure), None)


def format_table(title: str, runs: Runs, tolerance: float) -> str:
    """A table in Markdown of the runs on one problem at one tolerance, with a row for each solver."""
    header = "solver | error | evaluations | with diagonal | Jacobians | fallbacks | steps (rejected) | seconds"
    rows = []
    for solver, results in runs.items():
        r = _at(results, tolerance)
        if r is None:
            rows.append([solver, "-", _cut(results[-1]), *"-----"])
            continue
        steps = f"{r.steps} ({r.rejected})" if r.steps else "-"
        counts = f"{r.evaluations:,}", f"{r.diagonals:,}", r.jacobians, r.fallbacks
        rows.append([solver, f"{r.error:.1e}", *counts, steps, f"{r.seconds:.2f}"])
    return "\n".join(harness.table(header, rows, f"{title}, at a tolerance of {tolerance:g}"))


def _cut(result: Result) -> str:
    """Why a run did not reach the end, in short."""
    # Ours ends every message with its settings, max_nfe among them; SciPy's stands alone.
    exhausted = result.failure == "max_nfe" or "more than max_nfe" in result.failure
    return f"more than {result.config.max_nfe:,}" if exhausted else "failed"


def summarise(tables: dict[str, Runs], tolerance: float) -> str:
    """A table in Markdown of evaluations (and errors in units of the tolerance), problems by solvers."""
    header = " | ".join(["problem", *next(iter(tables.values()))])
    rows = []
    for name, runs in tables.items():
        found = [_at(results, tolerance) for results in runs.values()]
        rows.append([name, *(f"{r.evaluations:,} ({r.error / tolerance:.2g})" if r else "-" for r in found)])
    title = f"Evaluations to the end at a tolerance of {tolerance:g} (error over tolerance)"
    return "\n".join(harness.table(header, rows, title))


def draw(title: str, runs: Runs, path: Path) -> None:
    """Draws error against evaluations, evaluations with diagonal, and seconds of the runs on one problem: PNG."""
    panels = {"evaluations": "evaluations", "diagonals": "evaluations with diagonal", "seconds": "processor time [s]"}
    styles: dict[str, tuple[str, str]] = {}  # one for each of our methods and of SciPy's
    lines = {"fixed": ":", "jacobi": "-", "newton": "--"}
    with harness.figure(path, 1, 3, (13, 4.5), sharey=True) as (whole, axes):
        for solver in runs:
            family, _, corrector = solver.partition("-")
            number = len(styles)
            key = solver if family == "scipy" else family
            color, marker = styles.setdefault(key, (f"C{number}", "osD^vP*X"[number]))
            done = [r for r in runs[solver] if not r.failure]
            for axis, attribute in zip(axes, panels, strict=True):
                pairs = [(getattr(r, attribute), max(r.error, 1e-14)) for r in done if getattr(r, attribute) > 0]
                if pairs:
                    line = lines.get(corrector, "-.")
                    axis.loglog(*zip(*pairs, strict=True), line, marker=marker, markersize=4, color=color, label=solver)
        for axis, label in zip(axes, panels.values(), strict=True):
            axis.set(xlabel=label)
            axis.xaxis.set_minor_formatter(harness.pyplot().NullFormatter())  # its labels would overlap within a decade
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("relative error at the end")
        whole.suptitle(title)
        whole.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)


def growth(dims: Sequence[int], method: str, tolerance: float, repeats: int) -> list[str]:
    """
    A table in Markdown: how the cost of the dominant linear problem grows with its dimension. The solves are repeated
    by turns, and the fastest counts.
    """
    rows = []
    for d in dims:
        problem = linear(d, False)
        seconds = dict.fromkeys(CORRECTORS.values(), math.inf)
        count = {}
        for turn in range(repeats):
            for corrector in seconds:
                if corrector == "fixed-point" and turn > 0:  # long enough to be measured once
                    continue
                solver = Solver(method, tolerance, tolerance, options={"corrector": corrector}, max_nfe=100_000)
                begin = time.process_time()
                count[corrector] = solver.integrate(problem, problem.x, 0.0, problem.time).stats.nfe
                seconds[corrector] = min(seconds[corrector], time.process_time() - begin)
        cells = [f"{count[c]:,}, {seconds[c]:.3f}" for c in ("jacobi-newton", "newton", "fixed-point")]
        ratios = [f"{seconds[c] / seconds['jacobi-newton']:.2f}" for c in ("newton", "fixed-point")]
        rows.append([d, *cells, *ratios])
    return harness.table(
        "d | jacobi-newton | newton | fixed-point | seconds newton / jacobi-newton | fixed-point / jacobi-newton",
        rows,
        f"{method} at a tolerance of {tolerance:g} on the dominant linear problem: evaluations, seconds",
    )


@dataclass
class Training:
    """Evaluations per solve while a flow is trained."""

    kind: str  #: "likelihood" or "stiff".
    steps: list[int] = field(default_factory=list)  #: the steps of training.
    losses: list[float] = field(default_factory=list)  #: the losses at these.
    #: by solver, of a solve of the test batch at these; nan where it failed.
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    fallbacks: dict[str, list[float]] = field(default_factory=dict)  #: by solver, likewise.


#: What is trained, with the name of its loss.
TRAININGS = {"likelihood": "negative log-likelihood [nats]", "stiff": "relative error of the field"}


def narrow_modes(size: int, d: int) -> Tensor:
    """Samples of a mixture of modes at the corners of a cube, whose coordinates are as narrow as 0.3, ..., 0.003."""
    corners = torch.randint(2, (size, d)).double() * 2 - 1
    widths = torch.logspace(math.log10(0.3), math.log10(0.003), d, dtype=torch.float64)
    return corners + widths * torch.randn(size, d, dtype=torch.float64)


def likelihood_of_modes(flow: HollowCNF) -> Callable[[], Tensor]:
    """The objective of a flow in double precision that is fitted to :func:`narrow_modes`."""
    d = flow.nn.input_dim

    def loss() -> Tensor:
        x, ladj = flow.inv.call_and_ladj(narrow_modes(128, d))
        return (x.square().sum(-1) / 2 - ladj).mean() + d / 2 * math.log(2 * math.pi)

    return loss


def train(kind: str, steps: int, solvers: Sequence[str], tolerance: float) -> Training:
    """
    Trains a Hollow-CNF by maximum likelihood, or to follow a stiff field. Measures on the way how many evaluations each
    solver takes to sample from it with log-determinants.
    """
    torch.manual_seed(0)
    d = 4 if kind == "likelihood" else 8
    flow = HollowCNF(HollowNN(d, [16]).double(), solver=Solver(rtol=1e-4, atol=1e-4), cache_size=0)
    test, found = torch.randn(64, d, dtype=torch.float64), Training(kind)
    likelihood = kind == "likelihood"
    loss, counter = likelihood_of_modes(flow) if likelihood else error_of_stiff_field(flow.nn), count()

    def objective() -> Tensor:
        value, step = loss(), next(counter)
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            found.steps.append(step)
            found.losses.append((value if likelihood else value.sqrt()).item())
            for name in solvers:
                nfe, fallbacks = _measure(flow, name, tolerance, test)
                found.evaluations.setdefault(name, []).append(nfe)
                found.fallbacks.setdefault(name, []).append(fallbacks)
        return value

    settings: dict[str, Any] = {"schedule": "constant"} if likelihood else {"lr": 0.1, "clip_norm": None}
    harness.minimise(objective, flow.parameters(), num_steps=steps, progress=kind, **settings)
    return found


def _measure(flow: HollowCNF, name: str, tolerance: float, test: Tensor) -> tuple[float, float]:
    own, flow.solver = flow.solver, solver_of(name, tolerance, 1.0, 20_000)
    try:
        with torch.no_grad():
            flow.call_and_ladj(test)
    except SolverError:
        return math.nan, math.nan
    finally:
        flow.solver = own
    stats = flow.last_solve
    return (math.nan, math.nan) if stats is None else (float(stats.nfe), float(stats.fallbacks))


def draw_training(found: Training, path: Path) -> None:
    """Draws evaluations per solve, and the loss, over training: PNG."""
    with harness.figure(path, 1, 2, (11, 4)) as (_, axes):
        for (name, evaluations), line in zip(found.evaluations.items(), cycle(("-", "--", ":", "-.")), strict=False):
            axes[0].plot(found.steps, evaluations, line, label=name)
        axes[0].set(xlabel="step of training", ylabel="evaluations per solve", yscale="log")
        axes[0].legend(fontsize=8)
        axes[1].plot(found.steps, found.losses)
        axes[1].set(xlabel="step of training", ylabel=TRAININGS[found.kind])


def format_training(found: Training, rows: int = 6) -> str:
    """A table in Markdown of evaluations per solve over training, in at most ``rows`` rows."""
    names, last = list(found.evaluations), len(found.steps) - 1
    lines = []
    for i in sorted({round(k * last / max(1, rows - 1)) for k in range(rows)}):
        cells = [f"{found.evaluations[n][i]:.0f} ({found.fallbacks[n][i]:.0f})" for n in names]
        lines.append([found.steps[i], f"{found.losses[i]:.2f}", *cells])
    title = f"Evaluations of a solve (fallbacks) while a Hollow-CNF is trained ({found.kind})"
    return "\n".join(harness.table(" | ".join(["step", TRAININGS[found.kind], *names]), lines, title))


def make_parser() -> harness.Parser:
    """The command line."""
    parser = harness.Parser(__file__, __doc__, needs=("matplotlib",))
    add = parser.add_argument
    add("--problem", nargs="*", choices=PROBLEMS, default=list(PROBLEMS), help="default: all")
    add("--solver", nargs="+", choices=SOLVERS, default=list(SOLVERS), help="default: all")
    add("--tolerance", nargs="+", type=float, default=TOLERANCES, help="relative tolerances")
    add("--show", type=float, default=1e-5, help="the tolerance of the tables (default: 1e-5)")
    add("--max-nfe", type=harness.positive, default=20_000, help="limit of evaluations (default: 20000)")
    add("--dims", nargs="*", type=harness.positive, default=[1, 8, 64, 256, 1024], help="of the growth table")
    add("--steps", type=harness.not_negative, default=500, help="of training a flow; 0 for none (default: 500)")
    add("--repeats", type=harness.positive, default=3, help="of the growth table (default: 3)")
    parser.add_kept("results/stiff")
    return parser


def _kept_training(kind: str, args: argparse.Namespace) -> Training:
    names = [name for name in args.solver if SOLVERS[name][0] != "scipy"]
    path = args.output / f"{kind}-{args.steps}-{args.show:g}.json"
    found = harness.kept(path, Training, args.force)
    if found is not None and set(found.evaluations) == set(names):
        return found
    return harness.keep(path, train(kind, args.steps, names, args.show))


def _wake_up() -> None:
    """The first solves in a process take longer."""
    problem = linear(2, False)
    for method, corrector in SOLVERS.values():
        if corrector in CORRECTORS.values():
            Solver(method, options={"corrector": corrector}).integrate(problem, problem.x, 0.0, 1e-3)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    args = make_parser().begin(argv)
    _wake_up()
    title = cache(lambda name: load(name).title)
    tables: dict[str, Runs] = {}
    for name in args.problem:
        tables[name] = compare(name, args)
        print(format_table(title(name), tables[name], args.show), end="\n\n", flush=True)
        draw(title(name), tables[name], args.output / f"{name}.png")
    if tables:
        print(summarise(tables, args.show), end="\n\n", flush=True)
    if args.dims:
        print("\n".join(growth(args.dims, "bdf", args.show, args.repeats)), end="\n\n", flush=True)
    for kind in TRAININGS if args.steps else ():
        found = _kept_training(kind, args)
        print(format_training(found), end="\n\n", flush=True)
        draw_training(found, args.output / f"training-{kind}.png")


if __name__ == "__main__":
    main()
