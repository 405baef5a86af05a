# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Simulation-based calibration and expected coverage of a posterior that depends on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .inference_data import element_names

__all__ = ["Calibration", "calibrate"]

_BINS = 20
_LEVELS = (0.5, 0.9)
_SAMPLES = 50_000  # posterior draws at once


@dataclass(frozen=True, eq=False)
class Calibration:
    r"""
    The ranks of latents among draws of their posteriors, over simulations of latents and data. They are uniform if the
    posteriors are right on average (the converse does not hold: the prior passes, too).

    :ivar Tensor ranks: for each simulation and latent, how many of the draws are smaller, with shape ``(n, D)``.
    :ivar Tensor density_ranks: for each simulation, how many of the draws have a larger density than the latents that
        made the data, with shape ``(n,)``: that share is the credible level of the smallest region that holds them.
    :ivar int num_draws: the number L of draws.
    :ivar names: the names of the D latents.

    References:

    [1] Sean Talts, Michael Betancourt, Daniel Simpson, Aki Vehtari, Andrew Gelman. Validating Bayesian Inference
    Algorithms with Simulation-Based Calibration. [arXiv:1804.06788]

    [2] Joeri Hermans et al. A Trust Crisis In Simulation-Based Inference? Your Posterior Approximations Can Be
    Unfaithful. [arXiv:2110.06581]
    """

    ranks: Tensor
    density_ranks: Tensor
    num_draws: int
    names: list[str]

    @property
    def p_values(self) -> Tensor:
        """The p-values of chi-squared tests of uniform ranks in 20 bins, one for each latent, with shape ``(D,)``."""
        position = (self.ranks + torch.rand(self.ranks.shape, dtype=torch.float64)) / (self.num_draws + 1)
        bins = (position * _BINS).long().clamp(max=_BINS - 1)
        counts = torch.nn.functional.one_hot(bins, _BINS).sum(0).double()
        expected = len(self.ranks) / _BINS
        statistic = ((counts - expected).square() / expected).sum(-1)
        return torch.special.gammaincc(torch.tensor((_BINS - 1) / 2, dtype=torch.float64), statistic / 2)

    def coverage(self, level: float) -> float:
        """
        The share of simulations whose latents lie in the smallest region of their posterior with this probability.

        :param float level: the probability, between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, but got {level}")
        return float((self.density_ranks < level * self.num_draws).double().mean())

    @property
    def calibrated(self) -> bool:
        """True if no latent fails at 1 % over their number, and coverage is within 3 % and chance of its level."""
        chance = [2 * (level * (1 - level) / len(self.ranks)) ** 0.5 for level in _LEVELS]
        near = (abs(self.coverage(p) - p) <= 0.03 + e for p, e in zip(_LEVELS, chance, strict=True))
        return bool(self.p_values.min() * len(self.names) > 0.01) and all(near)

    def __str__(self) -> str:
        p_values = self.p_values
        worst = int(p_values.argmin())
        covered = ", ".join(f"{self.coverage(level):.1%} at {level:.0%}" for level in _LEVELS)
        verdict = "calibrated" if self.calibrated else "NOT CALIBRATED"
        return (
            f"{verdict} on {len(self.ranks):,} simulations, {self.num_draws} draws each\n"
            f"ranks      smallest p-value {p_values[worst]:.3f}, of {self.names[worst]} (of {len(p_values)} latents)\n"
            f"coverage   {covered}"
        )

    def plot(self) -> Any:
        """
        Draws the distribution functions of the ranks less the uniform one, and the coverage over the level.

        :return: the figure.
        :raises ImportError: without matplotlib.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        grid = torch.linspace(0, 1, 101, dtype=torch.float64)
        band = 2.6 * (grid * (1 - grid) / len(self.ranks)).sqrt()
        left.fill_between(grid, -band, band, color="0.9", label="99 % of uniform ranks, each level")
        for name, ranks in zip(self.names, self.ranks.T, strict=True):
            position = (ranks.double() + 0.5) / (self.num_draws + 1)
            share = (position.unsqueeze(-1) <= grid).double().mean(0)
            left.plot(grid, share - grid, label=name if len(self.names) <= 8 else None)
        left.set(xlabel="rank", ylabel="distribution function - rank", title="simulation-based calibration")
        left.legend(fontsize="small")
        levels = grid[1:-1]
        right.plot([0, 1], [0, 1], color="0.7")
        right.plot(levels, [self.coverage(float(level)) for level in levels])
        right.set(xlabel="credible level", ylabel="share of simulations inside", title="expected coverage")
        return figure


def calibrate(
    posterior: Callable[[Any], Any], theta: Mapping[str, Tensor], x: Mapping[str, Tensor], num_draws: int
) -> Calibration:
    """
    Ranks latents among draws of their posteriors.

    :param posterior: returns the posterior given data, with methods ``sample`` and ``log_prob`` of flat latents.
    :param theta: the latents by site, with simulations in the first dimension.
    :param x: the data by site, likewise.
    :param int num_draws: the draws of each.
    """
    count = len(next(iter(theta.values())))
    if not count:
        raise ValueError("calibrate needs at least one simulation, but none is usable")
    truth = torch.cat([value.reshape(count, -1) for value in theta.values()], -1)
    size = max(1, _SAMPLES // num_draws)
    ranks, density_ranks = [], []
    for start in range(0, count, size):
        rows, data = truth[start : start + size], {name: value[start : start + size] for name, value in x.items()}
        own = posterior(data)
        draws = own.sample((num_draws,))
        ranks.append((draws < rows).sum(0))
        density_ranks.append((own.log_prob(draws) > own.log_prob(rows)).sum(0))
    names = [label for name, value in theta.items() for label in element_names(name, value.shape[1:])]
    return Calibration(torch.cat(ranks).cpu(), torch.cat(density_ranks).cpu(), num_draws, names)
