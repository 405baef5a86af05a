# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The processes that the SDE experiment learns: those that are simulated, and one data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from pyro_hollow.experiments.data import DataError
from pyro_hollow.sde import DiagonalSDE


@dataclass(frozen=True)
class Process:
    """Paths observed at several times."""

    name: str  #: for the command line.
    title: str  #: for people.
    times: tuple[float, ...]  #: when the paths are observed.
    #: maps a number n to n independent paths, with shape ``(len(times), n, d)``; of those that are simulated, a second
    #: number asks for a finer grid, see :func:`divide`. Of a data set, n is ignored.
    paths: Callable[..., Tensor]
    components: int  #: how many Gaussians the density gets.
    sde: DiagonalSDE | None = None  #: the truth, where it is known.
    axis: str = "x"  #: what x is, for figures.
    time_axis: str = "t"  #: what t is, with its unit.

    def split(self, train: int, test: int, parts: int = 1) -> tuple[Tensor, Tensor]:
        """
        Paths to learn from, on a grid of times that is so many times as fine, and paths held out; half of a data set
        each, on its own grid.
        """
        if self.sde is not None:
            return self.paths(train, parts), self.paths(test)
        paths = self.paths(0)
        paths = paths[:, torch.randperm(paths.shape[1])]
        half = paths.shape[1] // 2
        return paths[:, :half], paths[:, half : 2 * half]


def _simulated(
    name: str,
    title: str,
    times: tuple[float, ...],
    sde: DiagonalSDE,
    start: Callable[[int], Tensor],
    components: int,
    method: str = "euler",  # which for a constant g is the same as "milstein", and cheaper
) -> Process:
    def paths(n: int, parts: int = 1) -> Tensor:
        return sde.sample(start(n), divide(times, parts), dt=2e-3, method=method)

    return Process(name, title, times, paths, components, sde)


def divide(times: Sequence[float], parts: int) -> list[float]:
    """Increasing times with the intervals between them cut in equal parts."""
    index = np.arange(len(times))
    return np.interp(np.arange((len(times) - 1) * parts + 1) / parts, index, times).tolist()


def _times(end: float, count: int) -> tuple[float, ...]:
    return tuple(end * k / (count - 1) for k in range(count))


def _constant(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: torch.full_like(x, value)


def _ornstein_uhlenbeck(d: int) -> Process:
    """A spiral into the origin: neighbours drive each other by a skew-symmetric part."""
    turn = torch.eye(d).roll(1, 0) - torch.eye(d).roll(1, 0).T if d > 1 else torch.zeros(1, 1)
    matrix = -torch.eye(d) + turn

    def start(n: int) -> Tensor:
        return 1.5 * torch.ones(d) + 0.3 * torch.randn(n, d)

    sde = DiagonalSDE(lambda t, x: x @ matrix.to(x).T, _constant(0.7))
    return _simulated(f"ou-{d}", f"Ornstein-Uhlenbeck, {d}-d", _times(1.5, 7), sde, start, components=1)


def _geometric() -> Process:
    """Two prices, of which the second falls and is the more volatile."""
    mu, sigma = torch.tensor([0.2, -0.1]), torch.tensor([0.3, 0.5])
    sde = DiagonalSDE(lambda t, x: mu.to(x) * x, lambda t, x: sigma.to(x) * x)
    return _simulated(
        "gbm", "geometric Brownian motion, 2-d", _times(1.0, 6), sde, lambda n: (0.2 * torch.randn(n, 2)).exp(), 6,
        "milstein",
    )  # fmt: skip


def _double_well(d: int, components: int) -> Process:
    """From the ridge into two wells, of the potential (x_1^2 - 1)^2 and, in two dimensions, + (x_2 - x_1 / 2)^2."""

    def drift(t: Tensor, x: Tensor) -> Tensor:
        a, *rest = x.unbind(-1)
        force = -4 * a * (a.square() - 1)
        return torch.stack([force + sum(b - a / 2 for b in rest), *(a - 2 * b for b in rest)], -1)

    sde = DiagonalSDE(drift, _constant(0.7))
    return _simulated(
        f"double-well-{d}", f"double well, {d}-d", _times(1.0, 9), sde, lambda n: 0.3 * torch.randn(n, d), components
    )


def _ring() -> Process:
    """Held near the circle of radius 2, turning at 1.5 radians per time, from one side of it."""

    def drift(t: Tensor, x: Tensor) -> Tensor:
        turn = torch.stack([-x[..., 1], x[..., 0]], -1)
        return x * (4 - x.square().sum(-1, keepdim=True)) + 1.5 * turn

    def start(n: int) -> Tensor:
        return torch.tensor([2.0, 0.0]) + 0.2 * torch.randn(n, 2)

    return _simulated("ring", "ring, 2-d", _times(2.0, 9), DiagonalSDE(drift, _constant(0.8)), start, 24)


#: Rows of the table that are no countries.
_AGGREGATES = [
    "Latin America & Caribbean (all income levels)",
    "OECD members",
    "Other small states",
    "Pacific island small states",
]


def _fertility() -> Process:
    """Births per woman of 189 countries, every fifth year from 1960 to 2010 (World Bank, in statsmodels)."""
    try:
        data = import_module("statsmodels.datasets.fertility")
    except ImportError as error:
        raise DataError(
            "the data set fertility comes with statsmodels, which is not installed: pip install statsmodels or "
            'pip install "pyro_hollow[sde]", or leave fertility out of --process'
        ) from error
    table = data.load_pandas().data
    table = table[~table["Country Name"].isin(_AGGREGATES)]
    years = [str(year) for year in range(1960, 2011, 5)]
    values = table[years].dropna().to_numpy(dtype=np.float64)
    paths = torch.as_tensor(np.log(values)).float().T.unsqueeze(-1)
    times = tuple((int(year) - 1960) / 10 for year in years)
    return Process(
        "fertility", f"fertility of {paths.shape[1]} countries", times, lambda n: paths, 4,
        axis="log births per woman", time_axis="decades since 1960",
    )  # fmt: skip


PROCESSES: dict[str, Callable[[], Process]] = {
    "ou-1": lambda: _ornstein_uhlenbeck(1),
    "ou-2": lambda: _ornstein_uhlenbeck(2),
    "ou-10": lambda: _ornstein_uhlenbeck(10),
    "gbm": _geometric,
    "double-well-1": lambda: _double_well(1, components=24),
    "double-well-2": lambda: _double_well(2, components=8),
    "ring": _ring,
    "fertility": _fertility,
}


def load(name: str) -> Process:
    """A process by its name in PROCESSES; a DataError if its data are not installed."""
    return PROCESSES[name]()
