# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Search for the modes of a posterior, and for those near which a guide has no draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .gaussian import GaussianFit, ValueAndGradient
from .log_density import LogDensity

__all__ = [
    "Mode",
    "Modes",
    "find_modes",
    "judge_modes",
    "projected",
    "search",
    "search_around",
    "search_starts",
]

# A mode with a smaller share of the evidence is not reported.
_MIN_MASS = 0.01
# A mode is missed if the draws nearest to it have less than this share of its mass.
_MIN_SHARE = 0.1
# Draws of the guide from which searches start, too: they lead to the modes that it has found.
_GUIDE_STARTS = 16
# Of the inverse Hessians of all searches.
_MAX_ELEMENTS = 10**8
_EVALUATIONS = 150
_WIDEST = 30.0  # standard deviations of a guide, around which searches start
_RADIUS = 2.0  # of the uniform starts in the unconstrained space
# Starts of the first round, also of a model that is evaluated one by one or has many latents, whose matrices take
# longer than the density; and of each of some further rounds.
_STARTS, _FEW_STARTS, _MORE_STARTS, _ROUNDS = 64, 16, 256, 6
_MANY = 64
_MOST_MODES = 128  # more than a mixture has components
_DECREMENT = 0.05  # twice the nats that a quadratic model still promises at a mode


@dataclass(frozen=True, eq=False)
class Modes:
    r"""
    Modes of a density, highest first, with Laplace's approximation of each, a Gaussian.

    :ivar int num_starts: from how many points the search has started.
    :ivar Tensor points: the modes with shape ``(k, d)``, in float64.
    :ivar Tensor values: the log densities there.
    :ivar Tensor scale_trils: the Cholesky factors of the Gaussians' covariances, with shape ``(k, d, d)``.
    :ivar torch.dtype dtype: that of the density's latents.
    """

    num_starts: int
    points: Tensor
    values: Tensor
    scale_trils: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.points)

    @property
    def log_masses(self) -> Tensor:
        r"""Laplace's approximations :math:`\log p(m) + \tfrac{d}{2} \log 2 \pi + \log \det L` of the modes' masses."""
        log_det = self.scale_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.values + 0.5 * self.points.shape[-1] * math.log(2 * math.pi) + log_det

    def densities(self, x: Tensor) -> Tensor:
        """The log densities of all Gaussians at points, up to one constant, with shape ``(n, k)``."""
        columns = []
        for point, factor in zip(self.points, self.scale_trils, strict=True):
            noise = torch.linalg.solve_triangular(factor, (x - point).mT, upper=False)
            columns.append(-0.5 * noise.square().sum(0) - factor.diagonal().log().sum())
        return torch.stack(columns, -1)


@dataclass(frozen=True, eq=False)
class Mode:
    r"""
    A mode of a posterior, beside a guide.

    :ivar values: the latent sites at the mode.
    :ivar float weight: the share of the posterior that belongs to the mode by the guide's weighted draws.
    :ivar float mass: that share by Laplace's approximation, :math:`Z_m / (Z + Z_m)` with the guide's evidence Z.
    :ivar bool missed: True if the guide has almost no draws near it.
    """

    values: dict[str, Tensor]
    weight: float
    mass: float
    missed: bool


def find_modes(
    value_and_gradient: ValueAndGradient,
    starts: Tensor,
    loc: Tensor,
    scale_tril: Tensor,
    known: Modes | None = None,
    report: Callable[[], bool] | None = None,
) -> Modes:
    r"""
    Climbs from each start by BFGS, all at once, and returns the distinct modes that were reached.

    The climb is in the coordinates :math:`L^{-1} (\mathbf{z} - \mu)` of a Gaussian that is roughly as wide as the modes
    are. A point is a mode if the negative Hessian there, by differences of gradients, is positive definite, and
    promises an increase of less than 0.025 nats. Along a ridge there is no mode. Two points are one mode if they are
    less than a standard deviation apart.

    :param value_and_gradient: log densities with shape ``(n,)`` and gradients with shape ``(n, d)`` at points.
    :param Tensor starts: with shape ``(n, d)``.
    :param Tensor loc: :math:`\mu`, with shape ``(d,)``.
    :param Tensor scale_tril: L, lower triangular with shape ``(d, d)``.
    :param Modes known: earlier ones, to which those are added.
    :param report: called before each step; True ends the climb.
    """
    dtype = starts.dtype
    loc, scale_tril = loc.double(), scale_tril.double()

    def function(u: Tensor) -> tuple[Tensor, Tensor]:
        # A LogDensity would make a graph of its own for a point alone.
        rows = u if len(u) > 1 else u.expand(2, -1)
        value, gradient = value_and_gradient((loc + rows @ scale_tril.mT).to(dtype))
        value, gradient = value[: len(u)].double(), gradient[: len(u)].double() @ scale_tril
        finite = value.isfinite() & gradient.isfinite().all(-1)
        return value.where(finite, -math.inf), gradient.where(finite.unsqueeze(-1), 0.0)

    u = torch.linalg.solve_triangular(scale_tril, (starts.double() - loc).mT, upper=False).mT
    climb = _Climb(function, u.contiguous(), torch.finfo(dtype).eps)
    climb.run(report)
    found = _distinct(climb, 10 * max(1.0, float(u.std(0, correction=0).max())))
    modes = Modes(len(starts), *found, dtype)
    modes = replace(modes, points=loc + modes.points @ scale_tril.mT, scale_trils=scale_tril @ modes.scale_trils)
    return modes if known is None else _merged(known, modes)


def _merged(*parts: Modes) -> Modes:
    """The distinct ones of all modes, highest first."""
    points, values, factors = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("points", "values", "scale_trils")
    )
    chosen: list[int] = []
    for k in values.argsort(descending=True).tolist():
        if not chosen or not _is_near(points[k], points[chosen], factors[chosen]):
            chosen.append(k)
    return Modes(
        sum(part.num_starts for part in parts), points[chosen], values[chosen], factors[chosen], parts[0].dtype
    )


def projected(modes: Modes, index: Tensor, value_and_gradient: ValueAndGradient) -> Modes:
    """
    The distinct modes of some latents that do not depend on the others.

    :param Modes modes: those of all latents.
    :param Tensor index: the latents, with shape ``(m,)``.
    :param value_and_gradient: the density of these latents alone.
    """
    points, factors = modes.points[:, index], modes.scale_trils[:, index][:, :, index]
    values = value_and_gradient(points.to(modes.dtype))[0].double()
    return _merged(replace(modes, points=points, values=values, scale_trils=factors))


def search(density: LogDensity, gaussian: GaussianFit, report: Callable[[], bool] | None = None) -> Modes:
    """
    Searches for all modes of a density: from 64 points (:func:`search_starts`), or 16 with more than 64 latents. If
    these lead to several modes, it goes on from 256 more, or 16, in the box that holds those, while it finds others.

    :param LogDensity density: that of the model.
    :param GaussianFit gaussian: a Gaussian that was fitted to it.
    :param report: called before each step; True ends the search.
    """
    loc, scale_tril = gaussian.loc, gaussian.scale_tril
    few = density.batch_size == 1 or density.dim > _MANY
    starts = search_starts(density, loc, scale_tril, _FEW_STARTS if few else _STARTS)
    angles = _angles(density, loc)
    modes = _in_one_turn(find_modes(density.value_and_gradient, starts, loc, scale_tril, None, report), angles, loc)
    for _ in range(_ROUNDS if density.batch_size > 1 else 0):
        count = len(modes)
        if not 2 <= count <= _MOST_MODES or (report is not None and report()):
            break
        widths = modes.scale_trils.square().sum(-1).sqrt().amax(0)  # standard deviations of the latents
        low, high = modes.points.amin(0) - 2 * widths, modes.points.amax(0) + 2 * widths
        centre, half = (low + high) / 2, 1.1 * (high - low) / 2
        more = _FEW_STARTS if few else _MORE_STARTS
        starts = centre + half * (2 * torch.rand(more, density.dim, dtype=torch.float64) - 1).to(centre)
        modes = find_modes(density.value_and_gradient, starts.to(loc), loc, scale_tril, modes, report)
        modes = _in_one_turn(modes, angles, loc)
        if len(modes) == count:
            break
    return modes


class _Climb:
    """
    Climbs from each of some points by BFGS. A step that is too long is cut to a third, while the other points go on, so
    that each evaluation serves all of them.

    :param function: the density.
    :param Tensor start: the points.
    :param float eps: the precision of the density.
    """

    def __init__(self, function: ValueAndGradient, start: Tensor, eps: float) -> None:
        self.function, self.x, self.eps = function, start.clone(), eps
        self.value, self.gradient = function(start)
        count, d = start.shape
        self.inverse = torch.eye(d).to(start) / self.gradient.norm(dim=-1).clamp(min=1.0).view(count, 1, 1)
        self._unscaled = torch.ones(count, dtype=torch.bool, device=start.device)

    def run(self, report: Callable[[], bool] | None) -> None:
        """Climbs until no point gains anything, for at most 150 evaluations."""
        active = self.value.isfinite().nonzero().squeeze(-1)
        size = torch.ones_like(self.value)
        direction = (self.inverse @ self.gradient.unsqueeze(-1)).squeeze(-1)
        for _ in range(_EVALUATIONS):
            slope = (direction * self.gradient).sum(-1)  # twice the increase that a quadratic model predicts
            rounding = 4 * self.eps * (1 + self.value.abs())
            active = active[(slope > 1e-9 + rounding)[active] & (size > 1e-6)[active]]
            if not len(active) or (report is not None and report()):
                break
            x = self.x[active] + size[active].unsqueeze(-1) * direction[active]
            value, gradient = self.function(x)
            good = value >= (self.value + 1e-4 * size * slope - rounding)[active]
            moved = active[good]
            dx, dg = x[good] - self.x[moved], self.gradient[moved] - gradient[good]
            self.x[moved], self.value[moved], self.gradient[moved] = x[good], value[good], gradient[good]
            self._update(moved, dx, dg)
            direction[moved] = (self.inverse[moved] @ self.gradient[moved].unsqueeze(-1)).squeeze(-1)
            size[moved] = 1.0
            size[active[~good]] /= 3

    def _update(self, moved: Tensor, dx: Tensor, dg: Tensor) -> None:
        """Updates inverse Hessians of the negative log density, where it is convex along the step."""
        curvature = (dx * dg).sum(-1)
        convex = curvature > 1e-12 * dx.norm(dim=-1) * dg.norm(dim=-1)
        moved, dx, dg, curvature = moved[convex], dx[convex], dg[convex], curvature[convex].view(-1, 1, 1)
        first = self._unscaled[moved]
        if bool(first.any()):
            scale = curvature[first] / dg[first].square().sum(-1).view(-1, 1, 1)
            self.inverse[moved[first]] = torch.eye(dx.shape[-1]).to(dx) * scale
            self._unscaled[moved] = False
        old = self.inverse[moved]
        image, step = old @ dg.unsqueeze(-1), dx.unsqueeze(-1)
        # old - image step^T - step image^T + (1 + dg^T image) step step^T, over the curvature, as one product
        half = 0.5 * (1 + dg.unsqueeze(-2) @ image / curvature) * step - image
        left, right = torch.cat([half, step], -1) / curvature, torch.cat([step, half], -1)
        self.inverse[moved] = torch.baddbmm(old, left, right.mT)


def _distinct(climb: _Climb, widest: float) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct modes among the points of a climb, the log densities, and factors of the covariances."""
    x, value, gradient = climb.x, climb.value, climb.gradient
    promised = torch.einsum("ni,nij,nj->n", gradient, climb.inverse, gradient)
    order = value.argsort(descending=True)
    order = order[value[order].isfinite() & (promised[order] < 1.0)]
    chosen: list[int] = []
    factors: list[Tensor] = []
    for i in order.tolist():
        if chosen and _is_near(x[i], x[chosen], torch.stack(factors)):
            continue
        factor = _laplace_factor(climb, i, widest)
        if factor is not None:
            chosen.append(i)
            factors.append(factor)
    d = x.shape[-1]
    return x[chosen], value[chosen], torch.stack(factors) if factors else x.new_zeros(0, d, d)


def _is_near(x: Tensor, points: Tensor, factors: Tensor) -> bool:
    """True if a point is less than a standard deviation from one of some modes."""
    noises = torch.linalg.solve_triangular(factors, (x - points).unsqueeze(-1), upper=False)
    return bool((noises.square().sum((-2, -1)) < 1.0).any())


def _laplace_factor(climb: _Climb, i: int, widest: float) -> Tensor | None:
    """The Cholesky factor of the inverse of the negative Hessian at a point; None if the point is no mode."""
    x, gradient = climb.x[i], climb.gradient[i]
    root, failed = torch.linalg.cholesky_ex(climb.inverse[i])
    if bool(failed) or not bool(root.isfinite().all()):
        return None
    d, h = len(x), climb.eps**0.2  # balances truncation and rounding
    steps = h * root.mT
    _, gradients = climb.function(torch.cat([x + steps, x - steps]))
    precision = (gradients[d:] - gradients[:d]) @ root / (2 * h)
    precision = (precision + precision.mT) / 2  # in the coordinates of the root
    factor, failed = torch.linalg.cholesky_ex(precision)
    if bool(failed) or not bool(factor.isfinite().all()):
        return None
    pulled = root.mT @ gradient
    if torch.cholesky_solve(pulled.unsqueeze(-1), factor).squeeze(-1) @ pulled > _DECREMENT:
        return None
    covariance = root @ torch.cholesky_inverse(factor) @ root.mT
    # Along a ridge there is no mode: there the standard deviation would exceed the distances of the starts.
    if torch.linalg.eigvalsh(covariance)[-1] > widest**2:
        return None
    factor, failed = torch.linalg.cholesky_ex(covariance)
    return None if bool(failed) else factor


def search_starts(density: LogDensity, loc: Tensor, scale_tril: Tensor, count: int) -> Tensor:
    """
    Points from which to search for modes: a quarter of them draws of the prior if it has any, a quarter uniform between
    -2 and 2, and the others around a Gaussian, up to 30 times as wide.

    :param LogDensity density: that of the model, with d latents.
    :param Tensor loc: the Gaussian's mean, with shape ``(d,)``.
    :param Tensor scale_tril: its Cholesky factor, with shape ``(d, d)``.
    :param int count: the number of points.
    :return: with shape ``(count, d)``.
    """
    like = density.start
    prior = density.model.prior(count // 4).to(like)
    uniform = _RADIUS * (2 * torch.rand(count // 4, density.dim).to(like) - 1)
    left = count - len(prior) - len(uniform)
    width = (math.log(_WIDEST) * torch.rand(left, 1)).exp().to(like)
    return torch.cat([prior, uniform, loc + width * torch.randn(left, density.dim).to(like) @ scale_tril.mT])


def search_around(density: LogDensity, samples: Mapping[str, Tensor], weights: Tensor, restarts: int) -> Modes:
    """
    Searches for modes from :func:`search_starts` around the draws of a guide, and from a few of these.

    :param LogDensity density: that of the model.
    :param samples: draws of the guide by site, with the shapes ``(num_samples,)`` + those of the sites.
    :param Tensor weights: their importance weights, with shape ``(num_samples,)``, which sum to 1.
    :param int restarts: how many searches to start away from the guide.
    :raises ValueError: for searches that would not fit in memory.
    """
    if density.dim**2 * (restarts + _GUIDE_STARTS) > _MAX_ELEMENTS:
        raise ValueError(
            f"restarts must be fewer than {restarts} for {density.dim} latents, as a matrix of that size for each of "
            "them would not fit in memory"
        )
    draws = density.unconstrain(samples).to("cpu", torch.float64)
    usable = draws.isfinite().all(-1)
    own = draws[usable][torch.multinomial(weights[usable], _GUIDE_STARTS, replacement=True)].to(density.start)
    loc, scale_tril = (each.to(density.start) for each in _moments(draws[usable]))
    starts = torch.cat([own, search_starts(density, loc, scale_tril, restarts)])
    modes = find_modes(density.value_and_gradient, starts, loc, scale_tril)
    return _in_one_turn(modes, _angles(density, loc), loc)


@torch.no_grad()
def _angles(density: LogDensity, point: Tensor) -> Tensor:
    """The latents in which the density repeats itself after a full turn, as with a von Mises prior; True or False."""
    turns = math.pi * torch.cat([torch.eye(density.dim), 2 * torch.eye(density.dim)]).to(point)
    value, half, full = density(torch.cat([point.unsqueeze(0), point + turns])).split([1, density.dim, density.dim])
    tolerance = 1e3 * torch.finfo(value.dtype).eps * (1 + value.abs())
    return ((full - value).abs() < tolerance) & ((half - value).abs() > tolerance)


def _in_one_turn(modes: Modes, angles: Tensor, loc: Tensor) -> Modes:
    """The distinct modes within half a turn of a location."""
    if not bool(angles.any()):
        return modes
    offset = modes.points - loc
    turned = torch.where(angles, torch.remainder(offset + math.pi, 2 * math.pi) - math.pi, offset)
    return _merged(replace(modes, points=loc + turned))


def _moments(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Cholesky factor of the covariance of draws; a diagonal one if there are too few for it."""
    factor, failed = torch.linalg.cholesky_ex(draws.mT.cov().reshape(draws.shape[-1], -1))
    if bool(failed) or not bool(factor.isfinite().all()):
        factor = draws.std(0).clamp(min=1e-6).diag()
    return draws.mean(0), factor


def judge_modes(
    density: LogDensity,
    modes: Modes,
    samples: Mapping[str, Tensor],
    weights: Tensor,
    log_evidence: float,
    log_q: Callable[[Tensor], Tensor] | None = None,
) -> list[Mode]:
    r"""
    Describes modes beside a guide, that of the largest mass first.

    Modes :math:`m` have, by Laplace's approximation, masses
    :math:`\log Z_m = \log p(\mathbf{x}, m) + \tfrac{d}{2} \log 2 \pi + \log \det L_m`. Each draw of the guide belongs
    to the mode under whose Gaussian its density is largest. A mode is missed if its share of the posterior,
    :math:`Z_m / (Z + Z_m)` with the guide's evidence Z, is at least 0.01, and its draws have less than a tenth of that
    share, counted and weighted. Smaller modes are missed if all of them together are. Laplace's approximation is too
    large along a curved ridge: no mode is missed at which the guide has a density above
    :math:`p(\mathbf{x}, m) / (10 Z)`. An unbounded density, or one without an isolated maximum, has no mode to miss.

    :param LogDensity density: that of the model.
    :param Modes modes: those that were found.
    :param samples: draws of the guide by site, with the shapes ``(num_samples,)`` + those of the sites.
    :param Tensor weights: their importance weights, with shape ``(num_samples,)``, which sum to 1.
    :param float log_evidence: the guide's estimate of the log evidence.
    :param log_q: the guide's log density of unconstrained latents, if it is known.
    """
    if not len(modes):
        return []
    draws, count = density.unconstrain(samples).to(modes.points), len(weights)
    usable, weights = draws.isfinite().all(-1), weights.to(modes.points)
    mass = (modes.log_masses - log_evidence).sigmoid()
    nearest = modes.densities(draws[usable]).argmax(-1)
    counted = torch.bincount(nearest, minlength=len(modes)) / count
    weighted = torch.zeros(len(modes)).to(weights).index_add_(0, nearest, weights[usable])
    few = torch.maximum(counted, weighted) < _MIN_SHARE * mass
    # A covered mode with an expected number of five draws has none of them with a probability below 0.01. Modes that
    # are smaller count together.
    large = mass > max(_MIN_MASS, 5 / count)
    odds = (mass / (1 - mass))[~large].sum()
    share = max(counted[~large].sum(), weighted[~large].sum())
    missed = few & (large | bool((odds > _MIN_MASS) & (share < _MIN_SHARE * odds / (1 + odds))))
    points = modes.points.to(density.start)
    if log_q is not None and bool(missed.any()):
        with torch.no_grad():
            ratio = modes.values - log_evidence - log_q(points).to(modes.values)
        missed = missed & ~(ratio < -math.log(_MIN_SHARE))
    values = density.constrain(points)
    return [
        Mode(
            {name: value[k].cpu() for name, value in values.items()},
            weighted[k].item(),
            mass[k].item(),
            bool(missed[k]),
        )
        for k in mass.argsort(descending=True).tolist()
    ]
