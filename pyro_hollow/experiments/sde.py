# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Stochastic differential equations learned from samples at several times: simulated processes and a data set.

Ways to learn, none of which is tuned for a process:

- matching: density, drift and diffusion together, by Fokker-Planck matching. It sees no paths, only which samples
  belong to which time. As marginals do not determine the diffusion, which would shrink, it is kept above half of the
  data's standard deviation over the square root of the span of time.
- known-noise: the same, with the true diffusion given.
- gradient: the same, with the drift made the gradient of a potential, free of time, as well.
- gradient-flow: potential and constant noise together, by fit_gradient_flow, with the samples at all times taken for
  the same particles in unknown order.
- transitions: the same networks by maximum likelihood of Euler-Maruyama transitions between neighbouring times, for
  which the paths must be known; those that are simulated at ten times as many times, for smaller steps.

What was learned is simulated from training samples at the first time, and its marginals are compared with held-out
ones: energy distance and sliced Wasserstein distance, in units of x, and the energy test at 5%. "fresh" is another
sample of the true process of the same size, which tells what a perfect equation would score.

    python -m pyro_hollow.experiments.sde

With ``--gradient-flow`` potentials of a benchmark are simulated instead, to see how well fit_gradient_flow finds drift
and noise, and where it says that it cannot.

The process "fertility" needs statsmodels. Finished runs are kept and reused.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_hollow.experiments import harness, sde_gradient_flow
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.sde_processes import PROCESSES, Process, divide, load
from pyro_hollow.experiments.two_sample import energy_distance, energy_test, sliced_wasserstein
from pyro_hollow.nn import HollowNN
from pyro_hollow.ops import field_derivatives
from pyro_hollow.sde import (
    DiagonalSDE,
    FokkerPlanckMatching,
    GaussianMixtureMarginals,
    fit,
    fit_gradient_flow,
    fokker_planck_rhs,
)

METHODS = ("matching", "known-noise", "gradient", "gradient-flow", "transitions")
LEARNING_RATE, BATCH_SIZE, WEIGHT = 1e-2, 256, 0.01
#: Beyond this dimension a step by plain autograd takes minutes and many gigabytes.
PLAIN_LIMIT = 16
#: How often simulated paths are observed from one time to the next where transitions are learned.
PARTS = 10


@dataclass(frozen=True)
class Config:
    """All that decides the result of a run, but for the machine."""

    process: str
    method: str
    steps: int
    seed: int
    train: int
    test: int
    weight: float = WEIGHT
    noise: float = 0.5


@dataclass
class Result:
    """Findings of a run."""

    config: Config  #: its settings.
    times: list[float] = field(default_factory=list)  #: when the marginals are compared: all times but the first.
    #: by what is compared with held-out data ("equation", "density", "fresh"), for each time the energy distance, the
    #: sliced Wasserstein distance and the p-value of the energy test.
    distances: dict[str, list[list[float]]] = field(default_factory=dict)
    #: root mean square error of the drift relative to the drift's root mean square, over held-out data; nan if
    #: unknown.
    drift_error: float = math.nan
    drift_error_inside: float = math.nan  #: the same over the 95% of them where the learned density is the highest.
    diffusion_error: float = math.nan  #: as drift_error.
    seconds: float = math.nan  #: of training.
    #: steps, negative log-likelihoods and residuals, means over a fiftieth of the steps each.
    history: list[list[float]] = field(default_factory=list)
    report: str = ""  #: what a fit of a gradient flow says of itself.


@dataclass
class Scale:
    """Standardises: the networks see z = (x - loc) / scale, and their equation is one for z."""

    loc: Tensor
    scale: Tensor

    def to_z(self, x: Tensor) -> Tensor:
        """Standardised."""
        return (x - self.loc) / self.scale

    def to_x(self, z: Tensor) -> Tensor:
        """Returns to the units of the data."""
        return self.loc + self.scale * z


class GradientDrift(nn.Module):
    r"""
    The drift :math:`-\nabla U` of a learned potential that does not depend on time, in coordinates that are
    standardised by a scale: a gradient in x is none in z unless it is accounted for.
    """

    def __init__(self, dim: int, scale: Tensor) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.scale = scale

    def potential(self, t: Tensor, z: Tensor) -> Tensor:
        """U with shape ``(*,)``."""
        return self.net(z).squeeze(-1)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """The drift of z."""
        return -field_derivatives(self.potential, t, z, 1)[1] / self.scale.square()


def make_sde(process: Process, config: Config, dim: int, scale: Scale) -> DiagonalSDE:
    """The equation to learn, for standardised coordinates; the method decides what is known of the process."""
    if config.method == "matching":
        floor = config.noise / math.sqrt(process.times[-1] - process.times[0])
        return DiagonalSDE(HollowNN(dim), HollowNN(dim), min_diffusion=floor)
    if config.method == "transitions":
        return DiagonalSDE(HollowNN(dim), HollowNN(dim))
    if process.sde is None:
        raise DataError(f"the diffusion of {process.name} is not known, as {config.method} needs it")
    truth = process.sde
    drift = HollowNN(dim) if config.method == "known-noise" else GradientDrift(dim, scale.scale)
    return DiagonalSDE(drift, lambda t, z: truth.g(t, scale.to_x(z)) / scale.scale)


def _matching(density: nn.Module, sde: DiagonalSDE, **options: Any) -> FokkerPlanckMatching:
    """The objective without its warning of a learned diffusion, about which the tables tell."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a learned diffusion")
        return FokkerPlanckMatching(density, sde, **options)


def fit_matching(
    process: Process, sde: DiagonalSDE, z: Tensor, config: Config, result: Result
) -> GaussianMixtureMarginals:
    """
    Learns an equation, and the density that is returned, from marginals: standardised samples z with shape
    ``(times, n, d)``. The result gets the history.
    """
    dim = z.shape[-1]
    density = GaussianMixtureMarginals(dim, process.components, (process.times[0], process.times[-1]))
    density.initialize(z.flatten(0, 1))
    times = torch.tensor(process.times).repeat_interleave(z.shape[1])
    losses: list[tuple[float, float]] = []
    every = max(1, config.steps // 50)
    with harness.Progress(total=config.steps, desc=_label(config)) as bar:

        def progress(step: int, loss: Any) -> None:
            bar.update()
            losses.append((float(loss.nll), float(loss.residual)))
            if step % every == 0:
                result.history.append([step, *np.mean(losses[-every:], axis=0).tolist()])

        matching = _matching(density, sde, weight=config.weight)
        x = z.flatten(0, 1)
        fit(matching, times, x, steps=config.steps, batch_size=BATCH_SIZE, lr=LEARNING_RATE, progress=progress)
    return density


def fit_transitions(times: Tensor, sde: DiagonalSDE, z: Tensor, config: Config) -> None:
    """
    Learns an equation by maximum likelihood of Euler-Maruyama transitions between times of observation, from
    standardised paths z with shape ``(times, n, d)``.
    """

    def loss() -> Tensor:
        k, path = torch.randint(len(times) - 1, (BATCH_SIZE,)), torch.randint(z.shape[1], (BATCH_SIZE,))
        h, start, bound = (times[k + 1] - times[k]).unsqueeze(-1), z[k, path], sde.bind()
        mean, scale = start + h * bound.drift(times[k], start), h.sqrt() * bound.diffusion(times[k], start)
        return (0.5 * ((z[k + 1, path] - mean) / scale).square() + scale.log()).sum(-1).mean()

    harness.minimise(loss, sde.parameters(), num_steps=config.steps, lr=LEARNING_RATE, progress=_label(config))


def learn_gradient_flow(process: Process, x: Tensor, scale: Scale, config: Config) -> tuple[DiagonalSDE, str]:
    """The equation of a gradient flow for standardised coordinates, from samples in the units of the data; a report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the report
        found = fit_gradient_flow(process.times, x, same_particles=True, seed=config.seed)
    noise = found.variance.sqrt().to(x.dtype) / scale.scale
    return DiagonalSDE(lambda t, z: found.drift(scale.to_x(z)) / scale.scale, noise), str(found)


def _label(config: Config) -> str:
    return f"{config.process}, {config.method}, seed {config.seed}"


def compare(samples: Tensor, test: Tensor) -> list[list[float]]:
    """The three distances of samples from held-out ones with the same shape ``(times, n, d)``, time by time."""
    pairs = list(zip(samples, test, strict=True))
    return [[energy_distance(x, y), sliced_wasserstein(x, y), energy_test(x, y)] for x, y in pairs]


@torch.no_grad()
def _judge_coefficients(
    process: Process, sde: DiagonalSDE, density: GaussianMixtureMarginals | None, scale: Scale, test: Tensor,
    result: Result,
) -> None:  # fmt: skip
    """Finds the errors of drift and diffusion over the held-out data, where the truth is known."""
    if process.sde is None:
        return
    times = torch.tensor(process.times).repeat_interleave(test.shape[1])
    x = test.flatten(0, 1)
    z = scale.to_z(x)
    drift, diffusion = process.sde.f(times, x), process.sde.g(times, x)
    errors = sde.f(times, z) * scale.scale - drift
    result.drift_error = float(errors.norm() / drift.norm())
    result.diffusion_error = float((sde.g(times, z) * scale.scale - diffusion).norm() / diffusion.norm())
    if density is not None:
        log_prob = density.log_prob(times, z)
        inside = log_prob >= log_prob.quantile(0.05)
        result.drift_error_inside = float(errors[inside].norm() / drift[inside].norm())


def _file(folder: Path, config: Config) -> Path:
    """The file that keeps a run, as JSON; one in ".npz" has the samples."""
    numbers = (config.weight, config.noise, config.steps, config.train, config.test, config.seed)
    return folder / config.process / ("-".join(map(str, (config.method, *numbers))) + ".json")


def run(process: Process, config: Config, folder: Path, force: bool = False) -> Result:
    """Learns and judges an equation, or reads an earlier run from the folder, unless ``force``."""
    path = _file(folder, config)
    found = harness.kept(path, Result, force)
    if found is not None:
        return found
    torch.manual_seed(config.seed)
    parts = PARTS if config.method == "transitions" and process.sde is not None else 1
    train, test = process.split(config.train, config.test, parts)
    fresh = None if process.sde is None else process.paths(config.test)
    pooled = train.flatten(0, 1)
    scale = Scale(pooled.mean(0), pooled.std(0))
    z, dim = scale.to_z(train), train.shape[-1]
    density = None
    result = Result(config, times=list(process.times[1:]))
    begin = time.perf_counter()
    if config.method == "gradient-flow":
        sde, result.report = learn_gradient_flow(process, train, scale, config)
        print(f"{_label(config)}: {result.report}", flush=True)
    else:
        sde = make_sde(process, config, dim, scale)
        if config.method == "transitions":
            fit_transitions(torch.tensor(divide(process.times, parts)), sde, z, config)
        else:
            density = fit_matching(process, sde, z, config, result)
    result.seconds = time.perf_counter() - begin
    dt = (process.times[-1] - process.times[0]) / 200
    n, m = z.shape[1], test.shape[1]
    # Each sample once where there are just enough: of few, a draw with replacement is a worse sample.
    start = z[0, torch.randperm(n) if n == m else torch.randint(n, (m,))]
    drawn = {"equation": scale.to_x(sde.sample(start, process.times, dt))}
    if density is not None:
        drawn["density"] = scale.to_x(density.sample(torch.tensor(process.times).unsqueeze(-1).expand(test.shape[:2])))
    if fresh is not None:
        drawn["fresh"] = fresh
    result.distances = {name: compare(samples[1:], test[1:]) for name, samples in drawn.items()}
    _judge_coefficients(process, sde, density, scale, test, result)
    arrays = {name: samples.numpy() for name, samples in {**drawn, "data": test}.items()}
    if density is not None and dim == 2:
        arrays["grid"], arrays["values"] = _on_grid(density, scale, test, process.times)
    return harness.keep(path, result, arrays)


@torch.no_grad()
def _on_grid(
    density: GaussianMixtureMarginals, scale: Scale, test: Tensor, times: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The two axes of a grid around the data, and the density on it at each time."""
    low, high = test.flatten(0, 1).min(0).values, test.flatten(0, 1).max(0).values
    axes = [torch.linspace(float(a), float(b), 80) for a, b in zip(low, high, strict=True)]
    z = scale.to_z(torch.cartesian_prod(*axes))
    values = [density.log_prob(torch.tensor(time), z).exp().view(80, 80).T / scale.scale.prod() for time in times]
    return torch.stack(axes).numpy(), torch.stack(values).numpy()


Runs = dict[str, list[Result]]


def _columns(runs: Runs) -> dict[str, list[list[list[float]]]]:
    """Columns of the table in their order, each with one list of rows (time by time) for each seed."""
    columns = {}
    for method, results in runs.items():
        columns[method] = [r.distances["equation"] for r in results]
        if method == "matching":
            columns["density of matching"] = [r.distances["density"] for r in results]
    fresh = [r.distances["fresh"] for r in next(iter(runs.values())) if "fresh" in r.distances]
    return columns | ({"fresh": fresh} if fresh else {})


def format_times(process: Process, runs: Runs) -> str:
    """A table in Markdown of energy / sliced Wasserstein distances, a row for each time: means over seeds."""
    columns, rows = _columns(runs), []
    for k, tick in enumerate(next(iter(runs.values()))[0].times):
        means = [np.mean([found[k][:2] for found in seeds], axis=0) for seeds in columns.values()]
        rows.append([f"{tick:.3g}", *(f"{a:.3f} / {b:.3f}" for a, b in means)])
    title = f"{process.title}: energy / sliced Wasserstein distance to held-out data"
    return "\n".join(harness.table(" | ".join([process.time_axis, *columns]), rows, title))


def format_summary(tables: dict[str, Runs]) -> str:
    """A table in Markdown of rejections by the energy test, distances and errors, by title of the process."""
    lines = []
    for title, runs in tables.items():
        for name, seeds in _columns(runs).items():
            rejections = [[row[2] <= 0.05 for row in rows] for rows in seeds]
            energy, sliced = np.mean([[row[:2] for row in rows] for rows in seeds], axis=(0, 1))
            count = f"{np.sum(rejections)} of {np.size(rejections)}"
            last = f"{sum(row[-1] for row in rejections)} of {len(seeds)}"
            errors = ["-"] * 4
            if name in runs:
                keys = ("drift_error", "drift_error_inside", "diffusion_error", "seconds")
                *relative, seconds = (float(np.mean([getattr(r, key) for r in runs[name]])) for key in keys)
                shown = ["-" if math.isnan(value) else f"{100 * value:.1f}%" for value in relative]
                errors = [*shown, f"{seconds:.0f}"]
            lines.append([title, name, count, last, f"{energy:.3f}", f"{sliced:.3f}", *errors])
    header = (
        "process | learned by | rejected at 5% | at the last time | energy distance | sliced Wasserstein | error of f "
        "| where p is high | error of g | seconds"
    )
    return "\n".join(harness.table(header, lines))


def draw(process: Process, results: Runs, folder: Path) -> None:
    """Draws held-out data, learned density and samples of the learned equation over time, "matching" only: PNG."""
    if "matching" not in results:
        return
    arrays = dict(np.load(_file(folder, results["matching"][0].config).with_suffix(".npz")))  # of the first seed
    shown = np.unique(np.linspace(0, len(process.times) - 1, min(5, len(process.times))).round().astype(int))
    line = arrays["data"].shape[-1] == 1
    rows, size = (1, (2.6 * len(shown), 2.8)) if line else (3, (2.4 * len(shown), 7.0))
    grid = {"sharex": True, "sharey": True, "squeeze": False}
    with harness.figure(folder / f"{process.name}.png", rows, len(shown), size, **grid) as (whole, axes):
        (_draw_line if line else _draw_plane)(axes, process, arrays, shown)
        whole.suptitle(process.title)


def _draw_line(axes: Any, process: Process, arrays: dict[str, np.ndarray], shown: np.ndarray) -> None:
    edges = np.linspace(arrays["data"].min(), arrays["data"].max(), 25)
    for axis, k in zip(axes[0], shown, strict=True):
        axis.hist(arrays["data"][k, :, 0], edges, density=True, color="0.8", label="held-out data")
        for kind, color, line in (("density", "C1", "--"), ("equation", "C0", "-")):
            style = {"histtype": "step", "color": color, "linestyle": line}
            axis.hist(arrays[kind][k, :, 0], edges, density=True, label=f"learned {kind}", **style)
        axis.set(title=f"{process.time_axis} = {process.times[k]:.3g}", xlabel=process.axis)
    axes[0, 0].set_ylabel("density")
    axes[0, 0].legend(fontsize=7)


def _draw_plane(axes: Any, process: Process, arrays: dict[str, np.ndarray], shown: np.ndarray) -> None:
    """Draws two dimensions, of more the first two, whose density is shown by samples instead of values."""
    rows = {"data": "held-out data", "density": "learned density", "equation": "learned equation"}
    low, high = (np.quantile(arrays["data"][..., :2].reshape(-1, 2), q, axis=0) for q in (0.001, 0.999))
    for row, (kind, label) in zip(axes, rows.items(), strict=True):
        for axis, k in zip(row, shown, strict=True):
            if kind == "density" and "grid" in arrays:
                axis.pcolormesh(*arrays["grid"], arrays["values"][k], cmap="cividis", shading="auto", rasterized=True)
            else:
                axis.plot(*arrays[kind][k, :, :2].T, ".", color="C0", markersize=2, alpha=0.5, rasterized=True)
            axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        row[0].set_ylabel(f"{label}\n{process.axis}$_2$")
    for top, bottom, k in zip(axes[0], axes[-1], shown, strict=True):
        top.set_title(f"{process.time_axis} = {process.times[k]:.3g}")
        bottom.set_xlabel(f"{process.axis}$_1$")


def cost_table(dims: Sequence[int], batch: int, repeats: int) -> list[str]:
    """
    Rows: the processor time of a training step (matching at the data, forward + backward), and of the same by automatic
    differentiation of all three functions, over one evaluation of f, g and log p without derivatives.
    """
    rows = []
    for d in dims:
        density = GaussianMixtureMarginals(d, 4, (0.0, 1.0), covariance="diagonal")
        matching = _matching(density, DiagonalSDE(HollowNN(d), HollowNN(d)), where="data")
        candidates = cost_candidates(matching, torch.rand(batch), torch.randn(batch, d))
        if d > PLAIN_LIMIT:
            del candidates["plain"]
        times = harness.interleaved(candidates, repeats, f"cost, d = {d}", time.process_time)
        plain = f"{times['plain'] / times['once']:.0f}" if "plain" in times else "-"
        rows.append([d, f"{times['once'] * 1e3:.2f}", f"{times['step'] / times['once']:.1f}", plain])
    return harness.table("d | f, g and log p, ms | a training step | the same by plain autograd", rows)


def cost_candidates(matching: FokkerPlanckMatching, t: Tensor, x: Tensor) -> dict[str, Callable[[], None]]:
    """
    Candidates to time, matching at the data alone: one evaluation, and a step the cheap and the plain way. Both steps
    leave the same gradients.
    """
    density, sde = matching.density, matching.sde

    def once() -> None:
        with torch.no_grad():
            bound = sde.bind()
            bound.drift(t, x), bound.diffusion(t, x), density.log_prob(t, x)

    def step() -> None:
        matching.zero_grad()
        matching(t, x).total.backward()

    def plain() -> None:
        matching.zero_grad()
        bound = sde.bind()
        opaque = DiagonalSDE(lambda t, x: bound.drift(t, x), lambda t, x: bound.diffusion(t, x))
        log_prob = lambda t, x: density.log_prob(t, x)  # noqa: E731
        times = t.clone().requires_grad_()
        value = density.log_prob(times, x)
        (rate,) = torch.autograd.grad(value.sum(), times, create_graph=True)
        residual = (rate - fokker_planck_rhs(log_prob, opaque, t, x)).square().mean()
        (matching.weight * residual - value.mean()).backward()

    return {"once": once, "step": step, "plain": plain}


def make_parser() -> harness.Parser:
    """The command line."""
    parser = harness.Parser(__file__, __doc__, needs=("matplotlib",))
    add, methods = parser.add_argument, ["matching", "transitions"]
    noise = "smallest diffusion, in standard deviations over the root of the time span (default: 0.5)"
    add("--process", nargs="*", choices=PROCESSES, default=list(PROCESSES), help="default: all")
    add("--method", nargs="+", choices=METHODS, default=methods, help=f"default: {' '.join(methods)}")
    add("--steps", type=harness.positive, default=4000, help="steps (default: 4000)")
    add("--weight", type=harness.not_negative_real, default=WEIGHT, help=f"of the residual (default: {WEIGHT})")
    add("--noise", type=harness.not_negative_real, default=0.5, help=noise)
    add("--seed", "--seeds", nargs="+", type=int, default=list(range(10)), help="seeds (default: 0 to 9)")
    add("--train", type=harness.positive, default=10_000, help="paths to learn from (default: 10000)")
    add("--test", type=harness.positive, default=500, help="paths held out (default: 500)")
    add("--gradient-flow", action="store_true", help="fit gradient flows of known potentials instead")
    potentials = list(sde_gradient_flow.POTENTIALS)
    add("--potential", nargs="+", choices=potentials, default=potentials, help="of gradient flows (default: all)")
    kinds = sde_gradient_flow.KINDS
    add("--particles", nargs="+", choices=kinds, default=kinds[:2], help="of gradient flows (default: same fresh)")
    gaps = list(sde_gradient_flow.GAPS)
    add("--gap", nargs="+", type=harness.positive_real, default=gaps, help="between their times (default: all four)")
    add("--dim", nargs="+", type=harness.positive, default=[2, 10], help="of gradient flows (default: 2 10)")
    add("--size", type=harness.positive, default=2000, help="particles of a gradient flow (default: 2000)")
    add("--cost", nargs="*", type=int, metavar="D", help="time a step in these dimensions, too")
    add("--batch-size", type=harness.positive, default=64, help="samples when the cost is timed (default: 64)")
    add("--repeats", type=harness.positive, default=7, help="repetitions when it is timed (default: 7)")
    parser.add_kept("results/sde")
    return parser


def _run_gradient_flows(args: argparse.Namespace) -> None:
    configs = sde_gradient_flow.configs(args.potential, args.particles, args.gap, args.dim, args.seed, args.size)
    bar = harness.Progress(configs, desc="gradient flows")
    print(sde_gradient_flow.format_results([sde_gradient_flow.run(c, args.output, args.force) for c in bar]))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = make_parser()
    args = parser.begin(argv)
    if args.gradient_flow:
        _run_gradient_flows(args)
        return
    torch.set_flush_denormal(True)  # responsibilities of far components
    tables: dict[str, Runs] = {}
    settings = args.train, args.test, args.weight, args.noise
    try:
        for process in [load(name) for name in args.process]:  # all of them, before anything takes time
            runs = {
                method: [
                    run(process, Config(process.name, method, args.steps, seed, *settings), args.output, args.force)
                    for seed in args.seed
                ]
                for method in args.method
            }
            tables[process.title] = runs
            print(format_times(process, runs), end="\n\n", flush=True)
            draw(process, runs, args.output)
    except DataError as error:
        parser.error(str(error))
    if tables:
        print(format_summary(tables), flush=True)
    if args.cost is not None:
        print(f"\nCost over f, g and log p once, batch {args.batch_size}:\n")
        print("\n".join(cost_table(args.cost or [2, 4, 8, 16, 64, 256], args.batch_size, args.repeats)))


if __name__ == "__main__":
    main()
