# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
The frame of every experiment: options of the command line, results kept as JSON, tables, figures and progress bars.

An experiment has a dataclass of settings, whose values name a file, and a dataclass of results with these settings as
its ``config``. :func:`keep` writes a result to the file, and :func:`kept` reads it, so that a finished run is not
repeated. :func:`table` and :func:`figure` show results.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

import numpy as np
import torch

from pyro_hollow.train import train
from pyro_hollow.train.progress import Progress

R = TypeVar("R")


@contextmanager
def extra(name: str = "experiments") -> Iterator[None]:
    """
    Tells which extra of the package to install if an import in the block finds no module.

    :param str name: the extra that has the modules.
    :raises ImportError: for a missing module, with the command that installs it; an experiment that runs as a program
        ends with this line instead.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'{error.name} is not installed: pip install "pyro_hollow[{name}]"'
        program = getattr(sys.modules.get("__main__"), "__spec__", None)
        if program is not None and program.name.startswith("pyro_hollow.experiments."):
            sys.exit(f"python -m {program.name}: {message}")
        raise ImportError(message, name=error.name) from error


class Parser(argparse.ArgumentParser):
    """
    The command line of an experiment.

    :param str file: the experiment's ``__file__``, which names the program.
    :param doc: its docstring, whose first paragraphs describe the program.
    :param int paragraphs: their number.
    :param needs: modules of the extra "experiments" without which the program would fail later.
    :param threads: the default of the option ``--threads``; None for no such option.
    """

    def __init__(
        self, file: str, doc: str | None, *, paragraphs: int = 1, needs: Sequence[str] = (), threads: int | None = 1
    ) -> None:
        description = " ".join((doc or "").split("\n\n")[:paragraphs])
        super().__init__(f"python -m pyro_hollow.experiments.{Path(file).stem}", description=description)
        self.needs = needs
        if threads is not None:
            text = f"threads of torch (default: {threads})"
            self.add_argument("--threads", type=positive, default=threads, help=text)

    def add_kept(self, folder: str, more: str = "") -> None:
        """
        Adds the options ``--output`` and ``--force``.

        :param str folder: the default folder of results.
        :param str more: more help on the folder.
        """
        where = f"where results are kept{more} (default: {folder})"
        self.add_argument("--output", type=Path, default=Path(folder), help=where)
        self.add_argument("--force", action="store_true", help="run anew what is kept there")

    def begin(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """
        Reads the command line, sees to it that nothing is missing, and sets the threads of torch.

        :param argv: the command line; None for that of the process.
        """
        args = self.parse_args(argv)
        with extra():
            for name in self.needs:
                if find_spec(name) is None:
                    raise ModuleNotFoundError(name=name)
        if "threads" in args:
            torch.set_num_threads(args.threads)
        return args


def call(command: Sequence[object], folder: Path | None = None, timeout: float | None = None) -> dict[str, Any]:
    """
    Runs a program with as many threads as torch has here, and reads the JSON in the last line that it prints.

    :param command: the program and its arguments.
    :param folder: its working folder; None for this one.
    :param timeout: the most seconds it may take.
    :raises RuntimeError: if it fails, with the last line of its error, or takes longer.
    """
    threads = str(torch.get_num_threads())
    # NPROC is what JAX reads.
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "NPROC": threads}
    words = list(map(str, command))
    try:
        process = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no result after {error.timeout:.0f} s") from error
    if process.returncode:
        raise RuntimeError((process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1])
    return json.loads(process.stdout.splitlines()[-1])


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, int(text))


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, int(text))


def _at_least(least: int, value: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, but got {value}")
    return value


def positive_real(text: str) -> float:
    """A finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite, but got {text}")
    return float(text)


def not_negative_real(text: str) -> float:
    """A finite number of at least 0."""
    if not 0 <= float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0 and finite, but got {text}")
    return float(text)


def write(path: Path, text: str) -> None:
    """Writes a file by way of another one, so that it is complete whenever the program stops; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, newline="")
    draft.replace(path)


def keep(path: Path, result: R, arrays: Mapping[str, np.ndarray] | None = None) -> R:
    """
    Writes a result to a file as JSON, and arrays to a file beside it.

    :param ~pathlib.Path path: the file, whose name ends in ".json".
    :param result: a dataclass.
    :param arrays: arrays by name; without any, those of an earlier run are removed.
    :returns: the result.
    """
    beside = path.with_suffix(".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrays:
        np.savez_compressed(beside, **arrays)  # type: ignore[arg-type]
    else:
        beside.unlink(missing_ok=True)
    write(path, json.dumps(asdict(result)))  # type: ignore[call-overload]
    return result


def kept(path: Path, kind: type[R], force: bool = False) -> R | None:
    """
    Reads the result of an earlier run.

    :param ~pathlib.Path path: the file.
    :param kind: the dataclass of the result; if it has a ``config``, that is a dataclass, too.
    :param bool force: ignore earlier runs.
    :returns: the result, or None if there is none.
    """
    if force or not path.exists():
        return None
    saved = json.loads(path.read_text())
    if "config" in saved:
        saved["config"] = get_type_hints(kind)["config"](**saved["config"])
    return kind(**saved)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes rows as CSV; the keys of the first are the names of the columns."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write(path, text.getvalue())


def table(header: str, rows: Iterable[Sequence[object]], title: str = "") -> list[str]:
    """
    Lines of a table in Markdown.

    :param str header: the names of the columns, with " | " between them.
    :param rows: the cells.
    :param str title: a line above the table.
    """
    lines = [f"| {header} |", "|---" * (header.count(" | ") + 1) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [f"{title}\n", *lines] if title else lines


def spread(values: Sequence[float], digits: int, deviation: bool = True) -> str:
    """
    The mean of values, and their standard deviation; "-" without values or for any that is not finite.

    :param values: one for each seed.
    :param int digits: decimal places.
    :param bool deviation: tell the standard deviation if there are several values.
    """
    if not values or not np.isfinite(values).all():
        return "-"
    several = f" ± {np.std(values, ddof=1):.{digits}f}" if deviation and len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{several}"


def pyplot() -> ModuleType:
    """matplotlib for files, imported where it is needed."""
    with extra():
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

    return plt


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], dpi: int = 110, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """
    A figure with its axes, which is written to a PNG at the end of the block.

    :param ~pathlib.Path path: the file.
    :param int rows: rows of axes.
    :param int columns: columns of axes.
    :param size: width and height in inches.
    :param int dpi: dots per inch.
    :param options: for :func:`matplotlib.pyplot.subplots`.
    """
    plt = pyplot()
    whole, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **options)
    try:
        yield whole, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.savefig(path, dpi=dpi)
    finally:
        plt.close(whole)


#: Trains along half a cosine; a step without finite loss and gradient raises an ArithmeticError.
minimise = partial(train, schedule="cosine", ramp=0, max_restarts=None)


def interleaved(
    candidates: Mapping[str, Callable[[], object]], repeats: int, label: str, clock: Callable[[], float] | None = None
) -> dict[str, float]:
    """
    The median time of each candidate in seconds, taking turns.

    :param candidates: functions by name.
    :param int repeats: the number of turns, after one that does not count.
    :param str label: the text beside the progress bar.
    :param clock: returns seconds; None for :func:`time.perf_counter`. Other processes disturb
        :func:`time.process_time` less.
    """
    clock = clock or time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in Progress(range(repeats + 1), desc=label):
        for name, function in candidates.items():
            begin = clock()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn:
                times[name].append(clock() - begin)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def duration(seconds: float) -> str:
    """A time in words, rounded: "40 seconds", "12 minutes", "3.5 hours"."""
    if seconds < 90:
        count = max(1, round(seconds))
        return f"{count} second{'s' if count > 1 else ''}"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
