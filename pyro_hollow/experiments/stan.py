# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Everyday Stan models with 2 to 1,006 latents: pyro_hollow.fit beside published variational fits.

Every model is fitted with the defaults of :func:`pyro_hollow.fit`, in double precision, as Stan computes. The published
evidence lower bounds (ELBOs) are medians over three seeds, each the best of five step sizes after 30,000 steps of 100
evaluations [1].

    python -m pyro_hollow.experiments.stan --data-dir FOLDER

The folder has a folder "stan"; see :mod:`pyro_hollow.experiments.stan_models`. Finished runs are kept and reused.

References:

[1] Abhinav Agrawal, Daniel Sheldon, Justin Domke. Advances in Black-Box VI: Normalizing Flows, Importance Weighting,
and Optimization. NeurIPS 2020
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence

import torch

from pyro_hollow.experiments import fits
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.harness import table, write
from pyro_hollow.experiments.stan_models import MODELS, load

NAN = math.nan
#: Published by model: latents, ADVI, full-rank Gaussian, real-NVP, the same with sticking the landing (STL), and the
#: importance-weighted bound of 10 samples of the last.
PUBLISHED: dict[str, tuple[int, float, float, float, float, float]] = {
    "wells": (2, NAN, -2041.90, -2041.90, -2041.90, -2041.90),
    "wells_dist": (2, NAN, -2046.51, -2046.51, -2046.51, -2046.51),
    "dogs": (3, NAN, -298.26, -298.26, -298.26, -298.26),
    "congress": (4, NAN, 738.79, 738.79, 738.79, 738.79),
    "cjs_t_t": (22, -452.67, -452.58, -451.68, -451.54, -451.50),
    "Dynocc": (29, -2126.62, -2126.50, -2125.48, -2125.23, -2125.16),
    "election88": (55, -7556.69, -7533.57, -7533.58, -7533.40, -7533.39),
    "radon_redundant_chr": (88, -299.64, -467.57, -217.25, -216.91, -216.86),
    "electric_chr": (100, -514.01, -511.53, -510.90, -510.64, -510.60),
    "electric_1a_chr": (112, -429.28, -423.59, -420.86, -420.29, -420.10),
    "electric_1c_chr": (116, -287.42, -284.92, -279.25, -278.28, -277.67),
    "hiv_chr": (173, -74.32, -160.78, -74.25, -73.16, -72.82),
    "endo3": (184, -127.30, -127.43, -125.44, -124.14, -119.06),
    "hepatitis": (218, -54.16, -159.03, -52.03, -51.15, -50.80),
    "oxford": (244, -4460.78, NAN, -4332.39, -4331.71, -4330.93),
    "gp_predict": (265, 300.03, 300.34, 300.94, 278.33, 287.61),
    "Mth": (394, -152.67, -152.57, -152.10, -151.91, -151.79),
    "irt": (501, -15460.27, -15424.07, -15425.01, -15424.27, -15423.88),
    "lsat": (1006, NAN, -4091.57, -1558.08, -1557.77, -1557.36),
}
#: The published numbers are rounded.
ROUNDING = 0.005


def format_table(runs: dict[str, fits.Runs]) -> str:
    """A table in Markdown of runs by guide by model, beside the published ELBOs."""
    rows = []
    for name, guides in runs.items():
        dim, *published = PUBLISHED[name]
        columns = ["-" if math.isnan(value) else f"{value:.2f}" for value in published]
        for guide, results in guides.items():
            failed = sum(bool(result.failure) for result in results)
            title = f"{name} ({dim})" + (f", {guide}" if guide != "fit" else "")
            rows.append([title + (f" ({failed} failed)" if failed else ""), *columns, *fits.cells(results)])
    header = f"model (latents) | ADVI | Gaussian | NF | NF, STL | NF, STL, IW | {fits.HEADER}"
    return "\n".join(table(header, rows))


def verdict(runs: dict[str, fits.Runs]) -> str:
    """Tells how often the median ELBO of ``fit`` is at or above the published ones within rounding; "" without runs."""
    medians = {name: _median(guides["fit"]) for name, guides in runs.items() if "fit" in guides}
    if not medians:
        return ""
    lines = []
    for label, column in (("ADVI", 1), ("NF, STL", 4)):
        pairs = {n: (m, PUBLISHED[n][column]) for n, m in medians.items() if not math.isnan(PUBLISHED[n][column])}
        behind = [name for name, (ours, theirs) in pairs.items() if not ours >= theirs - ROUNDING]
        below = f"; below on {', '.join(behind)}" if behind else ""
        lines.append(f"At or above {label}: {len(pairs) - len(behind)} of {len(pairs)} models{below}.")
    return "\n".join(lines)


def _median(results: Sequence[fits.Result]) -> float:
    """A run that failed counts as the worst."""
    elbos = sorted(result.elbo if math.isfinite(result.elbo) else -math.inf for result in results)
    return elbos[(len(elbos) - 1) // 2]


def run_all(args: argparse.Namespace) -> Iterable[dict[str, fits.Runs]]:
    """Runs of all models, after each model."""
    runs: dict[str, fits.Runs] = {}
    for name in args.models:
        stan = load(name, args.data_dir)
        runs[name] = {}
        for guide in args.guides:
            runs[name][guide] = fits.run_seeds(stan.model, name, guide, args, offset=stan.dropped)
        yield runs


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = fits.make_parser(__file__, __doc__, MODELS, "the folder with the folder stan")
    args = parser.begin(argv)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        runs: dict[str, fits.Runs] = {}
        for runs in run_all(args):
            name = list(runs)[-1]
            print(format_table({name: runs[name]}), end="\n\n", flush=True)
    except DataError as error:
        parser.error(str(error))
    finally:
        torch.set_default_dtype(previous)
    every = [result for guides in runs.values() for results in guides.values() for result in results]
    lines = "\n\n".join(part for part in (format_table(runs), verdict(runs), "\n".join(fits.failures(every))) if part)
    print(lines, flush=True)
    write(args.output / "table.md", lines + "\n")


if __name__ == "__main__":
    main()
