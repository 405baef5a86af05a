# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Targets of the diffusion samplers: pyro_hollow.fit beside published evidence lower bounds (ELBOs).

Every target is fitted with the defaults of :func:`pyro_hollow.fit`. Its log evidence comes two ways: by the importance
weights of the guide, and by annealed importance sampling from the guide's base to the posterior, with Hamiltonian moves
in the coordinates of the base. No ELBO can lie above the log evidence; a published one that does, by its noise or its
estimator, is marked.

    python -m pyro_hollow.experiments.samplers --data-dir FOLDER

The folder has a folder "samplers" with german.data-numeric (UCI, Statlog German credit) and ionosphere.npz (UCI, arrays
X and y). Breast cancer is the data set that scikit-learn ships. Finished runs are kept and reused.

References:

[1] Denis Blessing et al. Beyond ELBOs: A Large-Scale Evaluation of Variational Methods for Sampling. ICML 2024

[2] Junhua Chen et al. Sequential Controlled Langevin Diffusions. ICLR 2025

[3] Sebastian Sanokowski et al. Rethinking Losses for Diffusion Bridge Samplers. NeurIPS 2025
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hollow.experiments import fits
from pyro_hollow.experiments.data import DataError, Source
from pyro_hollow.experiments.harness import extra, table, write
from pyro_hollow.experiments.posterior_models import flat
from pyro_hollow.infer import AutoHollowCNF, Fit, LogDensity

SOURCE = Source("samplers", "UCI (https://archive.ics.uci.edu)")
NAN = math.nan
#: Published ELBOs by target: PIS and DDS [1], the best known (mostly SCLD [2]), and a bridge sampler [3].
PUBLISHED: dict[str, tuple[float, float, float, float]] = {
    "seeds": (-88.92, -75.21, -73.45, -73.48),
    "credit_flat": (-846.74, -514.74, -504.46, -504.62),
    "credit": (NAN, NAN, -585.0, NAN),
    "ionosphere": (NAN, NAN, -111.9, -113.0),
    "funnel": (-3.198, -0.597, -0.011, -0.245),
    "brownian": (NAN, 0.56, 1.00, 1.00),
    "cancer": (NAN, NAN, NAN, NAN),
}
PARTICLES, TEMPERATURES, LEAPFROGS, STEP = 2000, 8, 4, 0.35


def _seeds_model(germinated: Tensor, seeds: Tensor, design: Tensor) -> None:
    """A random effect for each plate of seeds, with a vague prior of its precision."""
    tau = pyro.sample("tau", dist.Gamma(0.01, 0.01))
    a = pyro.sample("a", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    scale = tau.rsqrt().unsqueeze(-1)
    b = pyro.sample("b", dist.Normal(0.0, scale).expand([*tau.shape, len(seeds)]).to_event(1))
    pyro.sample("r", dist.Binomial(seeds, logits=a @ design.T + b).to_event(1), obs=germinated)


def _seeds(data_dir: Path | None) -> Callable[[], Any]:
    germinated = [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3]
    seeds = [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]
    kind = torch.tensor([0.0] * 11 + [1.0] * 10)
    extract = torch.tensor([0.0] * 5 + [1.0] * 6 + [0.0] * 5 + [1.0] * 5)
    design = torch.stack([torch.ones(21), kind, extract, kind * extract], dim=-1)
    return partial(_seeds_model, torch.tensor(germinated).to(design), torch.tensor(seeds).to(design), design)


def _logistic_model(y: Tensor, design: Tensor, prior: dist.TorchDistribution) -> None:
    w = pyro.sample("w", prior)
    pyro.sample("y", dist.Bernoulli(logits=w @ design.T).to_event(1), obs=y)


def _logistic(y: np.ndarray, x: np.ndarray, scale: float | None, centre: bool = False) -> Callable[[], Any]:
    """
    Logistic regression with an intercept, on columns of standard deviation 1.

    :param scale: the standard deviation of the prior; None for a flat one.
    """
    deviation = x.std(0)
    x = (x - (x.mean(0) if centre else 0.0)) / np.where(deviation > 0, deviation, 1.0)
    design = torch.from_numpy(np.column_stack([np.ones(len(x)), x])).to(torch.get_default_dtype())
    size = design.shape[-1]
    prior = flat(size) if scale is None else dist.Normal(0.0, scale).expand([size]).to_event(1)
    return partial(_logistic_model, torch.from_numpy(y).to(design), design, prior)


def _credit(data_dir: Path | None, scale: float | None) -> Callable[[], Any]:
    path = SOURCE.find(data_dir, "german.data-numeric")
    try:
        data = np.array([line.split() for line in path.read_text().splitlines()], dtype=float)
        return _logistic(data[:, -1] - 1, data[:, :-1], scale)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} is not a table of numbers: {error}") from error


def _ionosphere(data_dir: Path | None) -> Callable[[], Any]:
    arrays = SOURCE.read_arrays(data_dir, "ionosphere.npz", "X", "y")
    x, y = (arrays[name].double().numpy() for name in ("X", "y"))
    return _logistic((y + 1) / 2, x, 1.0, centre=True)


def _cancer(data_dir: Path | None) -> Callable[[], Any]:
    """The classes are linearly separable, so that with a flat prior there would be no posterior."""
    with extra():
        from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return _logistic(np.float64(y), x, 10.0)


def _funnel_model() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(v.new_zeros(9), (v / 2).exp().unsqueeze(-1)).to_event(1))


def _funnel(data_dir: Path | None) -> Callable[[], Any]:
    return _funnel_model


def _brownian_model(first: Tensor, last: Tensor) -> None:
    """A Brownian motion with unknown scales, observed in the first and in the last third of 30 times."""
    scales = dist.LogNormal(0.0, 2.0)
    innovation, noise = (pyro.sample(name, scales) for name in ("innovation_noise_scale", "observation_noise_scale"))
    x = pyro.sample("x", flat(30))
    steps = torch.diff(x, dim=-1, prepend=torch.zeros_like(x[..., :1]))
    pyro.factor("motion", dist.Normal(0.0, innovation.unsqueeze(-1)).log_prob(steps).sum(-1))
    seen = torch.cat([x[..., :10], x[..., 20:]], dim=-1)
    y = torch.cat([first, last])
    pyro.sample("y", dist.Normal(seen, noise.unsqueeze(-1)).to_event(1), obs=y)


def _brownian(data_dir: Path | None) -> Callable[[], Any]:
    """The data of inference_gym (Sountsov, Radul et al., 2020)."""
    first = [0.21592641, 0.118771404, -0.07945447, 0.037677474, -0.27885845, -0.1484156, -0.3250906, -0.22957903,
             -0.44110894, -0.09830782]  # fmt: skip
    last = [-0.8786016, -0.83736074, -0.7384849, -0.8939254, -0.7774566, -0.70238715, -0.87771565, -0.51853573,
            -0.6948214, -0.6202789]  # fmt: skip
    return partial(_brownian_model, torch.tensor(first), torch.tensor(last))


_LOADERS: dict[str, Callable[[Path | None], Callable[[], Any]]] = {
    "seeds": _seeds,
    "credit_flat": partial(_credit, scale=None),
    "credit": partial(_credit, scale=10.0),
    "ionosphere": _ionosphere,
    "funnel": _funnel,
    "brownian": _brownian,
    "cancer": _cancer,
}
#: The names that :func:`load` knows.
TARGETS: tuple[str, ...] = tuple(_LOADERS)


def load(name: str, data_dir: str | Path | None = None) -> Callable[[], Any]:
    """
    Makes a Pyro model without arguments; its tensors are of the default dtype.

    :param str name: a name in :data:`TARGETS`.
    :param data_dir: the folder with a folder "samplers" that has the data.
    :raises ValueError: for an unknown name.
    :raises DataError: for files that are missing or cannot be read.
    """
    if name not in _LOADERS:
        raise ValueError(f"name must be one of {TARGETS}, but got {name!r}")
    return _LOADERS[name](None if data_dir is None else Path(data_dir))


def anneal(
    excess: Callable[[Tensor], Tensor], dim: int, num_particles: int, temperatures: int = TEMPERATURES
) -> tuple[float, float]:
    r"""
    Annealed importance sampling [1] from a standard Normal to the density that it has times :math:`e^{excess}`. At each
    temperature particles move once by Hamiltonian dynamics.

    :param excess: the difference of the log densities, ``(n, d)`` to ``(n,)``.
    :param int dim: the dimension d.
    :param int num_particles: the number of particles n.
    :param int temperatures: the number of steps from the one density to the other.
    :returns: the log of the normalising constant and its standard error.

    References:

    [1] Radford Neal. Annealed importance sampling. Statistics and Computing 11 (2001).
    """

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = excess(x)
            (gradient,) = torch.autograd.grad(value.sum(), x)
        usable = value.isfinite()
        return value.detach().where(usable, -math.inf), gradient.where(usable.unsqueeze(-1), 0.0)

    x = torch.randn(num_particles, dim)
    value, gradient = evaluate(x)
    log_weights = torch.zeros(num_particles)
    for step in range(1, temperatures + 1):
        log_weights = log_weights + value / temperatures
        if step < temperatures:
            x, value, gradient = _move(evaluate, step / temperatures, x, value, gradient)
    weights = (log_weights.double() - log_weights.max()).exp()
    estimate = float(log_weights.max()) + float(weights.mean().log())
    return estimate, float(weights.std() / weights.mean()) / math.sqrt(num_particles)


def _move(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], beta: float, x: Tensor, value: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A Hamiltonian move of particles with log density :math:`-x^2 / 2 + \\beta \\, excess`; -inf stays where it is."""
    p = torch.randn_like(x)
    step = STEP * (0.8 + 0.4 * torch.rand(len(x), 1))
    new, new_value, new_gradient = x, value, gradient
    momentum = p + step / 2 * (beta * gradient - x)
    for i in range(LEAPFROGS):
        new = new + step * momentum
        new_value, new_gradient = evaluate(new)
        momentum = momentum + (step if i < LEAPFROGS - 1 else step / 2) * (beta * new_gradient - new)
    before = beta * value - (x**2 + p**2).sum(-1) / 2
    after = beta * new_value - (new**2 + momentum**2).sum(-1) / 2
    accepted = (after - before > torch.rand(len(x)).log()) & value.isfinite()
    rows = accepted.unsqueeze(-1)
    return new.where(rows, x), new_value.where(accepted, value), new_gradient.where(rows, gradient)


def examine(model: Callable[[], Any], fitted: Fit) -> dict[str, float]:
    """The log evidence by annealing from the base of the guide, an AutoHollowCNF."""
    guide = fitted.guide
    if not isinstance(guide, AutoHollowCNF):
        return {}
    base, transform, density = guide.get_base_dist(), guide.get_transform(), LogDensity(model)

    def excess(u: Tensor) -> Tensor:
        z = transform(u)
        return density(z) + transform.log_abs_det_jacobian(u, z) - base.log_prob(u)

    value, error = anneal(excess, guide.latent_dim, PARTICLES)
    return {"annealed": value, "annealed_error": error}


def format_table(runs: dict[str, fits.Runs]) -> str:
    """A table in Markdown of runs by guide by target, beside the published ELBOs."""
    rows, marked = [], False
    for name, guides in runs.items():
        for guide, results in guides.items():
            columns = [_published(value, results) for value in PUBLISHED[name]]
            marked = marked or any(column.endswith("*") for column in columns)
            failed = sum(bool(result.failure) for result in results)
            title = name + (f", {guide}" if guide != "fit" else "") + (f" ({failed} failed)" if failed else "")
            more = [r.more for r in results if r.more]
            annealed = fits.middle([found["annealed"] for found in more], 3)
            error = fits.middle([max((found["annealed_error"] for found in more), default=NAN)], 3)
            rows.append([title, *columns, f"{annealed} ± {error}", *fits.cells(results, 3)])
    lines = table(f"target | PIS | DDS | best known | bridge | log evidence, annealed | {fits.HEADER}", rows)
    note = "\n\\* above the log evidence by more than five standard errors, which no bound can be."
    return "\n".join([*lines, *([note] if marked else [])])


def _published(value: float, results: Sequence[fits.Result]) -> str:
    """A published ELBO; with a mark if it lies above the log evidence."""
    if math.isnan(value):
        return "-"
    bounds = [r.more["annealed"] + 5 * r.more["annealed_error"] for r in results if r.more]
    return f"{value:g}" + ("\\*" if bounds and value > max(bounds) else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = fits.make_parser(__file__, __doc__, TARGETS, "the folder with the folder samplers")
    args = parser.begin(argv)
    try:
        runs = {name: _run_target(name, args) for name in args.models}
    except DataError as error:
        parser.error(str(error))
    every = [result for guides in runs.values() for results in guides.values() for result in results]
    lines = "\n\n".join(part for part in (format_table(runs), "\n".join(fits.failures(every))) if part)
    print(lines, flush=True)
    write(args.output / "table.md", lines + "\n")


def _run_target(name: str, args: argparse.Namespace) -> fits.Runs:
    model = load(name, args.data_dir)
    further = partial(examine, model)
    return {guide: fits.run_seeds(model, name, guide, args, examine=further) for guide in args.guides}


if __name__ == "__main__":
    main()
