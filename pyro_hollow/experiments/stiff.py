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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pyro_hollow.experiments.arguments import positive
from pyro_hollow.experiments.figures import pyplot
from pyro_hollow.experiments.files import write
from pyro_hollow.experiments.progress import Progress
from pyro_hollow.experiments.stiff_problems import PROBLEMS, Problem, follow_stiff_field, linear, load
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
    """
    Findings of a run.

    :ivar config: its settings.
    :ivar failure: the error that ended it, or "".
    :ivar error: the largest error of a coordinate, over its size plus the problem's scale.
    :ivar evaluations: of the right-hand side.
    :ivar diagonals: evaluations, among them, with the diagonal.
    :ivar jacobians: dense Jacobians.
    :ivar fallbacks: equations that dense Newton solved for Jacobi-Newton.
    :ivar steps: accepted steps.
    :ivar rejected: rejected steps.
    :ivar seconds: of the processor.
    """

    config: Config
    failure: str = ""
    error: float = math.nan
    evaluations: int = 0
    diagonals: int = 0
    jacobians: int = 0
    fallbacks: int = 0
    steps: int = 0
    rejected: int = 0
    seconds: float = math.nan


def solver_of(name: str, tolerance: float, scale: float, max_nfe: int) -> Solver:
    """
    One of ours.

    :param str name: a key of SOLVERS.
    :param float tolerance: the relative tolerance.
    :param float scale: the absolute tolerance over the relative one.
    :param int max_nfe: the limit of evaluations.
    """
    method, corrector = SOLVERS[name]
    options = {"corrector": corrector} if corrector else {}
    return Solver(method, tolerance, tolerance * scale, options=options, max_nfe=max_nfe)


class _TooMany(Exception):
    pass


def scipy_solve(problem: Problem, method: str, tolerance: float, max_nfe: float = math.inf) -> tuple[Any, int]:
    """
    The same problem by SciPy.

    :param problem: the problem.
    :param str method: of solve_ivp.
    :param float tolerance: the relative tolerance.
    :param float max_nfe: the limit of evaluations.
    :returns: what solve_ivp returns, or None beyond the limit, and the number of evaluations.
    """
    count = 0

    def function(t: float, x: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        if count > max_nfe:
            raise _TooMany
        return problem.function(torch.tensor(t, dtype=torch.float64), torch.from_numpy(x)).numpy()

    x = problem.x[0].numpy()
    try:
        found = solve_ivp(
            function,
            (0.0, problem.time),
            x,
            method,
            rtol=tolerance,
            atol=tolerance * problem.scale,
            t_eval=[problem.time],
        )
    except _TooMany:
        return None, count
    return found, count


def error_of(problem: Problem, x: np.ndarray, reference: np.ndarray) -> float:
    """
    :param problem: the problem.
    :param x: a state.
    :param reference: the right one.
    """
    return float(np.max(np.abs(x - reference) / (np.abs(reference) + problem.scale)))


def solve(problem: Problem, config: Config, reference: np.ndarray) -> Result:
    """
    One solve.

    :param problem: the problem.
    :param config: the settings.
    :param reference: the state at the end.
    """
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
    """
    The state at the end, by SciPy's Radau at tight tolerances, or what is left of an earlier run.

    :param str name: of a problem.
    :param folder: where results are kept.
    :param bool force: run again.
    """
    path = folder / name / "reference.json"
    if path.exists() and not force:
        return np.array(json.loads(path.read_text()))
    problem = load(name)
    # Its factorisations are complex matrices of the size of the problem.
    method, tolerance = ("LSODA", 1e-11) if problem.x.shape[-1] > 100 else ("Radau", 1e-10)
    found, _ = scipy_solve(problem, method, tolerance)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(found.y[:, -1].tolist()))
    return found.y[:, -1]


def run(problem: Problem, config: Config, reference: np.ndarray, folder: Path, force: bool) -> Result:
    """
    One run, or what is left of an earlier one.

    :param problem: the problem.
    :param config: the settings.
    :param reference: the state at the end.
    :param folder: where results are kept.
    :param bool force: run again.
    """
    path = folder / config.problem / f"{config.solver}-{config.tolerance:g}.json"
    if path.exists() and not force:
        saved = json.loads(path.read_text())
        if saved["config"] == asdict(config):
            return Result(**{**saved, "config": config})
    result = solve(problem, config, reference)
    write(path, json.dumps(asdict(result)))
    return result


Runs = dict[str, list[Result]]


def compare(name: str, args: argparse.Namespace) -> Runs:
    """
    All solvers on one problem, at all tolerances.

    :param str name: of the problem.
    :param args: the command line.
    """
    problem, reference = load(name), reference_of(name, args.output, args.force)
    runs: Runs = {}
    bar = Progress(args.solver, desc=name)
    for solver in bar:
        runs[solver] = []
        for tolerance in sorted(args.tolerance, reverse=True):
            config = Config(name, solver, tolerance, args.max_nfe)
            runs[solver].append(run(problem, config, reference, args.output, args.force))
            if runs[solver][-1].failure:
                break
    return runs


def format_table(title: str, runs: Runs, tolerance: float) -> str:
    """
    A table in Markdown: one row for each solver at one tolerance.

    :param str title: of the problem.
    :param runs: by solver.
    :param float tolerance: the tolerance.
    """
    lines = [
        f"{title}, at a tolerance of {tolerance:g}\n",
        "| solver | error | evaluations | with diagonal | Jacobians | fallbacks | steps (rejected) | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for solver, results in runs.items():
        found = [r for r in results if r.config.tolerance == tolerance]
        if not found or found[0].failure:
            # What failed at a looser tolerance was not asked for this one.
            lines.append(f"| {solver} | - | {_cut(results[-1])} | - | - | - | - | - |")
            continue
        (r,) = found
        steps = f"{r.steps} ({r.rejected})" if r.steps else "-"
        lines.append(
            f"| {solver} | {r.error:.1e} | {r.evaluations:,} | {r.diagonals:,} | {r.jacobians} | {r.fallbacks} | "
            f"{steps} | {r.seconds:.2f} |"
        )
    return "\n".join(lines)


def _cut(result: Result) -> str:
    """Why a run did not reach the end, in short."""
    # Ours ends every message with its settings, max_nfe among them; SciPy's stands alone.
    exhausted = result.failure == "max_nfe" or "more than max_nfe" in result.failure
    return f"more than {result.config.max_nfe:,}" if exhausted else "failed"


def summarise(tables: dict[str, Runs], tolerance: float) -> str:
    """
    A table in Markdown: evaluations (and errors in units of the tolerance) by problem and solver.

    :param tables: by problem, runs by solver.
    :param float tolerance: the tolerance.
    """
    solvers = list(next(iter(tables.values())))
    lines = [
        f"Evaluations to the end at a tolerance of {tolerance:g} (error over tolerance)\n",
        f"| problem | {' | '.join(solvers)} |",
        f"|---|{'---|' * len(solvers)}",
    ]
    for name, runs in tables.items():
        cells = []
        for solver in solvers:
            found = [r for r in runs[solver] if r.config.tolerance == tolerance and not r.failure]
            cells.append(f"{found[0].evaluations:,} ({found[0].error / tolerance:.2g})" if found else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(title: str, runs: Runs, path: Path) -> None:
    """
    Draws error against evaluations, evaluations with diagonal, and seconds: PNG.

    :param str title: of the problem.
    :param runs: by solver.
    :param path: the file.
    """
    plt = pyplot()
    panels = {"evaluations": "evaluations", "diagonals": "evaluations with diagonal", "seconds": "processor time [s]"}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.5), sharey=True, layout="constrained")
    styles: dict[str, tuple[str, str]] = {}  # one for each of our methods and of SciPy's
    lines = {"fixed": ":", "jacobi": "-", "newton": "--"}
    for solver in runs:
        family, _, corrector = solver.partition("-")
        number = len(styles)
        color, marker = styles.setdefault(solver if family == "scipy" else family, (f"C{number}", "osD^vP*X"[number]))
        done = [r for r in runs[solver] if not r.failure]
        for axis, attribute in zip(axes, panels, strict=True):
            pairs = [(getattr(r, attribute), max(r.error, 1e-14)) for r in done if getattr(r, attribute) > 0]
            if pairs:
                line = lines.get(corrector, "-.")
                axis.loglog(*zip(*pairs, strict=True), line, marker=marker, markersize=4, color=color, label=solver)
    for axis, label in zip(axes, panels.values(), strict=True):
        axis.set(xlabel=label)
        axis.xaxis.set_minor_formatter(plt.NullFormatter())  # its labels would overlap within a decade
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error at the end")
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def growth(dims: Sequence[int], method: str, tolerance: float, repeats: int) -> list[str]:
    """
    A table in Markdown: how the cost of the dominant linear problem grows with its dimension.

    :param dims: the dimensions.
    :param str method: an implicit method.
    :param float tolerance: the tolerance.
    :param int repeats: solves by turns, of which the fastest counts.
    """
    lines = [
        f"{method} at a tolerance of {tolerance:g} on the dominant linear problem: evaluations, seconds\n",
        "| d | jacobi-newton | newton | fixed-point | seconds newton / jacobi-newton | fixed-point / jacobi-newton |",
        "|---|---|---|---|---|---|",
    ]
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
        ratios = [seconds[c] / seconds["jacobi-newton"] for c in ("newton", "fixed-point")]
        lines.append(f"| {d} | {' | '.join(cells)} | {' | '.join(f'{r:.2f}' for r in ratios)} |")
    return lines


@dataclass
class Training:
    """
    Evaluations per solve while a flow is trained.

    :ivar kind: "likelihood" or "stiff".
    :ivar steps: the steps of training.
    :ivar losses: the losses at these.
    :ivar evaluations: by solver, of a solve of the test batch at these; nan where it failed.
    :ivar fallbacks: by solver, likewise.
    """

    kind: str
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: dict[str, list[float]] = field(default_factory=dict)
    fallbacks: dict[str, list[float]] = field(default_factory=dict)


#: What is trained, with the name of its loss.
TRAININGS = {"likelihood": "negative log-likelihood [nats]", "stiff": "relative error of the field"}


def narrow_modes(size: int, d: int) -> Tensor:
    """
    Samples of a mixture of modes at the corners of a cube, whose coordinates are as narrow as 0.3, ..., 0.003.

    :param int size: the number of samples.
    :param int d: the dimension.
    """
    corners = torch.randint(2, (size, d)).double() * 2 - 1
    widths = torch.logspace(math.log10(0.3), math.log10(0.003), d, dtype=torch.float64)
    return corners + widths * torch.randn(size, d, dtype=torch.float64)


def maximise_likelihood(flow: HollowCNF, steps: int) -> Iterator[float]:
    """
    Trains a flow on :func:`narrow_modes`.

    :param flow: the flow, in double precision.
    :param int steps: of training.
    :returns: the loss before each step.
    """
    d = flow.nn.input_dim
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        x, ladj = flow.inv.call_and_ladj(narrow_modes(128, d))
        loss = (x.square().sum(-1) / 2 - ladj).mean() + d / 2 * math.log(2 * math.pi)
        yield float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0, error_if_nonfinite=True)
        optimizer.step()


def train(kind: str, steps: int, solvers: Sequence[str], tolerance: float) -> Training:
    """
    Trains a Hollow-CNF and measures on the way what it costs to sample from it with log-determinants: by maximum
    likelihood, or to follow a stiff field.

    :param str kind: "likelihood" or "stiff".
    :param int steps: of training.
    :param solvers: whose evaluations are measured.
    :param float tolerance: of the solves that are measured.
    """
    torch.manual_seed(0)
    d = 4 if kind == "likelihood" else 8
    flow = HollowCNF(HollowNN(d, [16]).double(), solver=Solver(rtol=1e-4, atol=1e-4), cache_size=0)
    test, found = torch.randn(64, d, dtype=torch.float64), Training(kind)
    losses = maximise_likelihood(flow, steps) if kind == "likelihood" else follow_stiff_field(flow.nn, steps)
    for step, loss in enumerate(Progress(losses, desc=kind, total=steps)):
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            found.steps.append(step)
            found.losses.append(loss)
            for name in solvers:
                nfe, fallbacks = _measure(flow, name, tolerance, test)
                found.evaluations.setdefault(name, []).append(nfe)
                found.fallbacks.setdefault(name, []).append(fallbacks)
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
    """
    Draws evaluations per solve over training: PNG.

    :param found: the measurements.
    :param path: the file.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, evaluations), line in zip(found.evaluations.items(), cycle(("-", "--", ":", "-.")), strict=False):
        axes[0].plot(found.steps, evaluations, line, label=name)
    axes[0].set(xlabel="step of training", ylabel="evaluations per solve", yscale="log")
    axes[0].legend(fontsize=8)
    axes[1].plot(found.steps, found.losses)
    axes[1].set(xlabel="step of training", ylabel=TRAININGS[found.kind])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def format_training(found: Training, rows: int = 6) -> str:
    """
    A table in Markdown: evaluations per solve over training.

    :param found: the measurements.
    :param int rows: how many.
    """
    names = list(found.evaluations)
    lines = [
        f"Evaluations of a solve (fallbacks) while a Hollow-CNF is trained ({found.kind})\n",
        f"| step | {TRAININGS[found.kind]} | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for i in sorted({round(k * (len(found.steps) - 1) / max(1, rows - 1)) for k in range(rows)}):
        cells = [f"{found.evaluations[n][i]:.0f} ({found.fallbacks[n][i]:.0f})" for n in names]
        lines.append(f"| {found.steps[i]} | {found.losses[i]:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m pyro_hollow.experiments.stiff", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--problem", nargs="*", choices=PROBLEMS, default=list(PROBLEMS), help="default: all")
    parser.add_argument("--solver", nargs="+", choices=SOLVERS, default=list(SOLVERS), help="default: all")
    parser.add_argument("--tolerance", nargs="+", type=float, default=TOLERANCES, help="relative tolerances")
    parser.add_argument("--show", type=float, default=1e-5, help="the tolerance of the tables (default: 1e-5)")
    parser.add_argument("--max-nfe", type=positive, default=20_000, help="limit of evaluations (default: 20000)")
    parser.add_argument("--dims", nargs="*", type=positive, default=[1, 8, 64, 256, 1024], help="of the growth table")
    parser.add_argument("--steps", type=int, default=500, help="of training a flow; 0 for none (default: 500)")
    parser.add_argument("--repeats", type=positive, default=3, help="of the growth table (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("results/stiff"), help="where results are kept")
    parser.add_argument("--force", action="store_true", help="repeat finished runs")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    return parser


def _kept_training(kind: str, args: argparse.Namespace) -> Training:
    names = [name for name in args.solver if SOLVERS[name][0] != "scipy"]
    path = args.output / f"{kind}-{args.steps}-{args.show:g}.json"
    if path.exists() and not args.force:
        found = Training(**json.loads(path.read_text()))
        if set(found.evaluations) == set(names):
            return found
    found = train(kind, args.steps, names, args.show)
    write(path, json.dumps(asdict(found)))
    return found


def _wake_up() -> None:
    """The first solves in a process take longer."""
    for method, corrector in SOLVERS.values():
        if corrector in CORRECTORS.values():
            problem = linear(2, False)
            Solver(method, options={"corrector": corrector}).integrate(problem, problem.x, 0.0, 0.1)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    args = make_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
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
