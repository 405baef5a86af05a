# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Fourteen posteriors of posteriordb: pyro_hollow.fit beside the reference draws.

Every posterior is fitted with the defaults of :func:`pyro_hollow.fit`. Its draws, corrected by importance weights, are
compared with 10,000 reference draws: the largest error of a mean, in standard deviations of the reference, and the
largest relative error of a standard deviation. By chance alone 4,000 independent draws are off by 0.03 and by 0.02 or
more. In one_comp the standard deviations of K_m and V_m are infinite, and their errors say nothing.

    python -m pyro_hollow.experiments.posteriordb --data-dir FOLDER

The folder has a folder "posteriordb"; see :mod:`pyro_hollow.experiments.posterior_models`. Finished runs are kept and
reused.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from pyro_hollow.experiments import fits
from pyro_hollow.experiments.data import DataError
from pyro_hollow.experiments.harness import table, write
from pyro_hollow.experiments.posterior_models import MORE_POSTERIORS, POSTERIORS, Posterior, load
from pyro_hollow.experiments.posteriors import errors
from pyro_hollow.infer import Fit

#: Those of :mod:`~pyro_hollow.experiments.posterior_models` that come from posteriordb.
NAMES = (*POSTERIORS[4:], *MORE_POSTERIORS)
LARGEST_KHAT = 0.7  #: of weights that can be trusted.


def examine(posterior: Posterior, fitted: Fit) -> dict[str, float]:
    """The largest errors of the corrected draws and of the guide's own."""
    found = {}
    for label, group in (("corrected", "posterior"), ("guide", "guide")):
        draws = {name: torch.as_tensor(x.values).flatten(0, 1) for name, x in fitted.posterior[group].items()}
        found[f"{label}_mean"], found[f"{label}_scale"] = errors(posterior, posterior.quantities(draws))
    return found


def format_table(runs: dict[str, list[fits.Result]], guide: str) -> str:
    """A table in Markdown of the runs of a guide by posterior: medians and ranges over seeds."""
    rows = []
    for name, results in runs.items():
        title = name + (f" ({failed} failed)" if (failed := sum(bool(r.failure) for r in results)) else "")
        more = [
            fits.middle([r.more[key] for r in results if key in r.more], 2)
            for key in ("corrected_mean", "corrected_scale", "guide_mean", "guide_scale")
        ]
        rows.append([title, *more, *fits.cells(results)])
    header = "posterior | error of a mean | of a sd | of the guide's mean | of its sd"
    good = sum(all(r.khat < LARGEST_KHAT for r in results) for results in runs.values())
    lines = table(f"{header} | {fits.HEADER}", rows, guide)
    return "\n".join([*lines, f"\nk-hat below {LARGEST_KHAT} for every seed: {good} of {len(runs)}."])


def run_all(guide: str, args: argparse.Namespace) -> dict[str, list[fits.Result]]:
    """Runs of a guide by posterior."""
    runs = {}
    for name in args.models:
        posterior = load(name, args.data_dir)
        runs[name] = fits.run_seeds(posterior.model, name, guide, args, examine=partial(examine, posterior))
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = fits.make_parser(__file__, __doc__, NAMES, "the folder with the folder posteriordb")
    args = parser.begin(argv)
    parts = []
    try:
        for guide in args.guides:
            runs = run_all(guide, args)
            parts.append(format_table(runs, guide))
            parts.extend(fits.failures([result for results in runs.values() for result in results]))
    except DataError as error:
        parser.error(str(error))
    lines = "\n\n".join(parts)
    print(lines, flush=True)
    write(args.output / "table.md", lines + "\n")


if __name__ == "__main__":
    main()
