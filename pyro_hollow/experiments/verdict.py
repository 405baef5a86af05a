# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Verdicts of ``diagnose`` against the truth, on guides that are known to be good or bad.

Samples of each guide are weighed, many times, by a target with known moments and the log evidence 0. The truth is the
root mean square error of the corrected mean (in standard deviations), the logarithm of the standard deviation, and the
log evidence. A guide is good, for a number of samples, if the largest of these errors is at most 0.05, that of the mean
of 400 independent draws. It is bad from 0.25 on, that of 16 draws. In between no verdict is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hollow.experiments.harness import Parser, positive, table
from pyro_hollow.infer.importance import faults, smooth

GOOD, BAD = 0.05, 0.25
_CHUNK = 2_000_000  # elements of the samples at once


class Target:
    """A distribution on the line, with its mean and standard deviation by quadrature."""

    def __init__(self, log_prob: Callable[[Tensor], Tensor]) -> None:
        self.log_prob = log_prob
        grid = torch.linspace(-60, 60, 1_200_001, dtype=torch.float64)
        mass = log_prob(grid).exp()
        mass = mass / mass.sum()
        self.mean = (mass * grid).sum().item()
        self.sd = (mass * (grid - self.mean).square()).sum().sqrt().item()


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).squeeze()


def _normal(loc: float = 0.0, scale: float = 1.0) -> dist.Normal:
    return dist.Normal(_tensor(loc), _tensor(scale))


def _student(df: float, scale: float = 1.0) -> dist.StudentT:
    return dist.StudentT(_tensor(df), _tensor(0.0), _tensor(scale))


def _gumbel(sign: float = 1.0) -> dist.TransformedDistribution:
    """Gumbel's distribution with mean 0 and standard deviation 1, or its mirror image."""
    scale = math.sqrt(6) / math.pi
    gumbel = dist.Gumbel(_tensor(-0.5772156649015329 * scale), _tensor(scale))
    return dist.TransformedDistribution(gumbel, dist.transforms.AffineTransform(0.0, sign))


def _half(share: float) -> Callable[[Tensor], Tensor]:
    """A standard Normal without its lower part."""
    normal = _normal()
    cut = normal.icdf(_tensor(share))
    return lambda x: torch.where(x > cut, normal.log_prob(x) - math.log(1 - share), -math.inf)


def _rippled(amplitude: float) -> Callable[[Tensor], Tensor]:
    """A standard Normal times :math:`\\exp(a \\cos 3 x)`: weights of it are bounded, and crowd at their maximum."""
    normal = _normal()
    grid = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    log_norm = (normal.log_prob(grid) + amplitude * (3 * grid).cos()).logsumexp(0) + math.log(1e-4)
    return lambda x: normal.log_prob(x) + amplitude * (3 * x).cos() - log_norm


@dataclass(frozen=True)
class Case:
    """A target and a guide of independent coordinates."""

    kind: str  #: in what the guide is wrong.
    name: str  #: the target and the guide.
    target: Callable[[Tensor], Tensor]  #: the log density of each coordinate.
    guide: tuple[dist.Distribution, ...]  #: the guides of the coordinates, in turn.
    first: bool = False  #: the guide is wrong in the first coordinate only; the others are standard Normal.

    def draw(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Samples with shape ``(*, S, d)`` and their log weights."""
        columns, log_weights = [], torch.zeros(shape[:-1], dtype=torch.float64)
        for i in range(shape[-1]):
            right = self.first and i > 0
            guide = _normal() if right else self.guide[i % len(self.guide)]
            columns.append(guide.sample(shape[:-1]))
            if not right:
                log_weights += self.target(columns[-1]) - guide.log_prob(columns[-1])
        return torch.stack(columns, -1), log_weights


def _cases() -> list[Case]:
    normal, gumbel = _normal().log_prob, _gumbel().log_prob
    unit_student = {df: _student(df, math.sqrt((df - 2) / df)) for df in (5, 10, 30)}
    cases = [
        Case("right", "Normal by itself", normal, (_normal(),)),
        Case("right", "Student (5) by itself", unit_student[5].log_prob, (unit_student[5],)),
        Case("right", "Gumbel by itself", gumbel, (_gumbel(),)),
    ]
    cases += [Case("rippled", f"amplitude {a}", _rippled(a), (_normal(),)) for a in (0.02, 0.2, 1.0)]
    for scale in (0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1):
        cases.append(Case("too narrow", f"scale {scale}", normal, (_normal(0.0, scale),)))
    for scale in (0.7, 0.5, 0.3):
        cases.append(Case("too narrow", f"scale {scale}, one coordinate", normal, (_normal(0.0, scale),), True))
    for rho in (0.3, 0.9):
        pair = (_normal(0.0, math.sqrt(1 - rho)), _normal(0.0, math.sqrt(1 + rho)))
        cases.append(Case("without correlation", f"{rho} in pairs", normal, pair))
    for scale in (1.05, 1.5, 3.0):
        cases.append(Case("too wide", f"scale {scale}", normal, (_normal(0.0, scale),)))
    for shift in (0.1, 1.0, 3.0):
        cases.append(Case("shifted", f"by {shift} sd", normal, (_normal(shift),)))
    for df, student in unit_student.items():
        cases.append(Case("tails too light", f"Student ({df}) by Normal", student.log_prob, (_normal(),)))
    for df in (1, 3, 10):
        cases.append(Case("tails too heavy", f"Normal by Student ({df})", normal, (_student(df),)))
    cases += [
        Case("wrong skew", "Gumbel by Normal", gumbel, (_normal(),)),
        Case("wrong skew", "Normal by Gumbel", normal, (_gumbel(),)),
        Case("wrong skew", "Gumbel by its mirror image", gumbel, (_gumbel(-1.0),)),
    ]
    for share in (0.5, 0.97):
        cases.append(Case("impossible samples", f"{share:.0%}", _half(share), (_normal(),), True))
    return cases


#: Targets with guides.
CASES = _cases()


@dataclass(frozen=True)
class Row:
    """Result of :func:`evaluate`."""

    case: Case  #: the target and the guide.
    d: int  #: the dimension.
    num_samples: int  #: the number of samples, S.
    #: root mean square errors of the mean, the logarithm of the standard deviation, and the log evidence.
    errors: tuple[float, float, float]
    alarms: float  #: the share of runs whose draws are not to be trusted.
    khat_alarms: float  #: the same if the k-hat alone would decide, by the limit of 0.7, or 1 - 1 / log10(S).
    khats: tuple[float, float, float]  #: the quantiles of the k-hat at 5, 50 and 95 %.

    @property
    def truth(self) -> str:
        """The guide's class: "good", "bad" or "between"."""
        worst = max(self.errors)
        return "good" if worst <= GOOD else "bad" if worst >= BAD else "between"


def evaluate(case: Case, d: int, num_samples: int, repeats: int) -> Row:
    """Weighs samples of a guide in repeated runs; see :class:`Row`."""
    target = Target(case.target)
    normal = Target(_normal().log_prob)
    limit = min(1 - 1 / math.log10(num_samples), 0.7)
    squares, alarms, khats = [], 0, []
    for left in range(repeats, 0, -max(1, _CHUNK // (num_samples * d))):
        samples, log_weights = case.draw(min(left, max(1, _CHUNK // (num_samples * d))), num_samples, d)
        for sample, log_weight in zip(samples[..., :2], log_weights, strict=True):
            smoothed = smooth(log_weight)
            weights = smoothed.weights.unsqueeze(-1)
            ess = 1 / weights.square().sum().item()
            alarms += bool(faults(ess, smoothed.unseen, num_samples))
            khats.append(smoothed.khat)
            mean = (weights * sample).sum(0)
            sd = (weights * (sample - mean).square()).sum(0).sqrt()
            truths = [normal if case.first and i else target for i in range(len(mean))]
            centre, scale = (_tensor(*(getattr(t, name) for t in truths)).view(-1) for name in ("mean", "sd"))
            log_evidence = (log_weight.logsumexp(0) - math.log(num_samples)).expand_as(mean)
            squares.append(torch.stack([(mean - centre) / scale, (sd / scale).log(), log_evidence]).square())
    error = torch.stack(squares).mean(0).sqrt().max(-1).values.tolist()
    quantiles = torch.tensor(sorted(khats))[[int(q * (len(khats) - 1) + 0.5) for q in (0.05, 0.5, 0.95)]].tolist()
    exceeding = sum(not khat < limit for khat in khats) / len(khats)
    return Row(case, d, num_samples, tuple(error), alarms / len(khats), exceeding, tuple(quantiles))


def format_table(rows: Sequence[Row]) -> str:
    """A Markdown table of results of :func:`evaluate`."""
    cells = []
    for row in rows:
        errors = ", ".join(f"{error:.3f}" for error in row.errors)
        low, middle, high = row.khats
        alarms = f"{row.alarms:.1%}", f"{row.khat_alarms:.1%}"
        khat = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        cells.append([row.case.kind, row.case.name, row.d, row.num_samples, errors, row.truth, *alarms, khat])
    header = "guide | target | d | S | error of mean, log sd, log evidence | truth | alarms | by k-hat alone | k-hat"
    return "\n".join(table(header, cells))


def format_rates(rows: Sequence[Row]) -> str:
    """A Markdown table of false and missed alarms among results of :func:`evaluate`, by number of samples."""
    cells = []
    for size in sorted({row.num_samples for row in rows}):
        cells.append([str(size)])
        for truth, sign in (("good", 1), ("bad", -1)):
            found = [row for row in rows if row.num_samples == size and row.truth == truth]
            cells[-1].append(str(len(found)))
            for name in ("alarms", "khat_alarms"):
                wrong = [getattr(row, name) if sign > 0 else 1 - getattr(row, name) for row in found]
                cells[-1].append(f"{sum(wrong) / len(wrong):.2%}" if wrong else "-")
    header = "S | good guides | false alarms | by k-hat alone | bad guides | missed alarms | by k-hat alone"
    return "\n".join(table(header, cells))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add("--kind", nargs="+", choices=sorted({case.kind for case in CASES}), help="default: all")
    add("--dims", nargs="+", type=positive, default=[1, 2, 10, 50, 100], help="dimensions")
    add("--num-samples", nargs="+", type=positive, default=[1000, 4000], help="at least 25")
    add("--repeats", type=positive, default=200, help="runs of each guide (default: 200)")
    add("--seed", type=int, default=0, help="of torch (default: 0)")
    args = parser.begin(argv)
    torch.manual_seed(args.seed)
    rows = []
    for case in CASES:
        if args.kind is None or case.kind in args.kind:
            for d in args.dims:
                rows += [evaluate(case, d, size, args.repeats) for size in args.num_samples]
    print(format_table(rows), end="\n\n")
    print(format_rates(rows))


if __name__ == "__main__":
    main()
