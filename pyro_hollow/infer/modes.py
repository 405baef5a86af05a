# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Search for modes of a posterior near which a guide has no draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["LogJoint", "MissedModes", "find_missed_modes"]

# A mode with a smaller share of the evidence is not reported.
_MIN_MASS = 0.01
# A mode is missed if the draws nearest to it have less than this share of its mass.
_MIN_SHARE = 0.1
# Draws of the guide from which searches start, too: they lead to the modes that it has found.
_GUIDE_STARTS = 16
# Of the inverse Hessians of all searches.
_MAX_ELEMENTS = 10**8
_DISCRETE = (
    "restarts must be 0 for a model with latents that are discrete, or that the guide does not sample, as {!r}: the "
    "search for modes needs gradients; marginalise them out of the model"
)


@dataclass(frozen=True)
class MissedModes:
    """
    Result of :func:`find_missed_modes`.

    :ivar int num_found: the number of modes that were found, missed ones included.
    :ivar list values: for each missed mode, largest mass first, the values of the latent sites.
    :ivar float mass: the share of the posterior that the missed modes hold, by Laplace's approximation.
    """

    num_found: int
    values: list[dict[str, Tensor]]
    mass: float


class _Unconstrained(Messenger):
    """Gives each latent site the image of its columns of a matrix, and sums the log-determinants of these maps."""

    def __init__(self, points: Tensor, prototypes: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.points, self.prototypes = points, prototypes
        self.log_det = torch.zeros(len(points)).to(points)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.prototypes:
            return
        transform = biject_to(msg["fn"].support)
        shape = transform.inverse_shape(msg["fn"].shape())
        columns = shape.numel() // len(self.points)
        part, self.points = self.points[:, :columns], self.points[:, columns:]
        part = part.reshape(shape).to(self.prototypes[msg["name"]])
        msg["value"], msg["done"] = transform(part), True
        log_det = transform.log_abs_det_jacobian(part, msg["value"])
        self.log_det = self.log_det + log_det.reshape(len(self.log_det), -1).sum(-1).to(self.log_det)


class LogJoint:
    r"""
    Log joint density of a model's latents at points of the unconstrained space :math:`\mathbb{R}^d` that
    :func:`~torch.distributions.biject_to` maps to their supports, with the log-determinant of that map.

    :param model: the model, of continuous latents, in which a further plate is possible.
    :param args: its positional arguments.
    :param kwargs: its keyword arguments.
    :param int max_plate_nesting: the largest number of nested plates.
    :param values: one value of each latent site, by name.
    :raises ValueError: for discrete latents, or those without a value.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        max_plate_nesting: int,
        values: Mapping[str, Tensor],
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.nesting = max_plate_nesting + 1
        trace = poutine.trace(poutine.condition(model, dict(values))).get_trace(*args, **kwargs)
        for name, _ in prune_subsample_sites(trace).iter_stochastic_nodes():
            raise ValueError(_DISCRETE.format(name))
        for name in values:
            if trace.nodes[name]["fn"].support.is_discrete:
                raise ValueError(_DISCRETE.format(name))
        # In the order of the model, which is that of the columns.
        self.prototypes = {name: values[name] for name in trace.nodes if name in values}
        self.eps = max(torch.finfo(value.dtype).eps for value in self.prototypes.values())
        self.batch_dims = {name: values[name].dim() - trace.nodes[name]["fn"].event_dim for name in self.prototypes}

    def _trace(self, count: int, messenger: Messenger | None = None) -> poutine.Trace:
        model = pyro.plate("num_particles_vectorized", count, dim=-self.nesting)(self.model)
        if messenger is not None:
            model = messenger(model)
        return poutine.trace(model).get_trace(*self.args, **self.kwargs)

    def unconstrain(self, count: int, samples: Mapping[str, Tensor] | None = None) -> Tensor:
        """
        Maps samples to unconstrained points.

        :param int count: the number of samples.
        :param samples: values by site, with the shapes ``(count,)`` + those of the sites. Defaults to prior draws.
        :returns: points with shape ``(count, d)``, in float64 on the CPU.
        """
        messenger = None
        if samples is not None:
            padded = {}
            for name, prototype in self.prototypes.items():
                ones = (1,) * (self.nesting - 1 - self.batch_dims[name])
                padded[name] = samples[name].to(prototype).reshape(count, *ones, *prototype.shape)
            messenger = poutine.condition(data=padded)
        sites = self._trace(count, messenger).nodes
        parts = [biject_to(sites[name]["fn"].support).inv(sites[name]["value"]) for name in self.prototypes]
        return torch.cat([part.reshape(count, -1).to("cpu", torch.float64) for part in parts], -1)

    def constrain(self, points: Tensor) -> dict[str, Tensor]:
        """Maps unconstrained points to values by site, with the shapes ``(count,)`` + those of the sites."""
        with torch.no_grad(), pyro.validation_enabled(False):
            sites = self._trace(len(points), _Unconstrained(points, self.prototypes)).nodes
        return {
            name: sites[name]["value"].reshape(len(points), *prototype.shape).cpu()
            for name, prototype in self.prototypes.items()
        }

    def __call__(self, points: Tensor) -> Tensor:
        """Evaluates the log density, with shape ``(count,)``, at points with shape ``(count, d)``; it may be nan."""
        messenger, total = _Unconstrained(points, self.prototypes), torch.zeros(len(points)).to(points)
        # At extreme points parameters may be invalid: the density is nan there, and the point is given up.
        with pyro.validation_enabled(False):
            trace = prune_subsample_sites(self._trace(len(points), messenger))
            trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] == "sample":
                total = total + site["log_prob"].reshape(len(points), -1).sum(-1).to(total)
        return total + messenger.log_det

    def gradient(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluates the log density, -inf where it is not finite, and its gradient."""
        try:
            with torch.enable_grad():
                points = points.detach().requires_grad_()
                value = self(points)
                (gradient,) = torch.autograd.grad(value.sum(), points)
        except torch.linalg.LinAlgError:  # of one point or more
            if len(points) == 1:
                return torch.full((1,), -math.inf).to(points), torch.zeros_like(points)
            values, gradients = zip(*map(self.gradient, points.detach().tensor_split(2)), strict=True)
            return torch.cat(values), torch.cat(gradients)
        finite = value.isfinite() & gradient.isfinite().all(-1)
        return torch.where(finite, value.detach(), -math.inf), torch.where(finite.unsqueeze(-1), gradient, 0.0)

    def precision(self, points: Tensor) -> Tensor:
        """Evaluates the negative Hessians with shape ``(count, d, d)``."""
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self(points).sum(), points, create_graph=True)
            rows = []
            for column in gradient.sum(0):
                (row,) = torch.autograd.grad(column, points, retain_graph=True, allow_unused=True)
                rows.append(torch.zeros_like(points) if row is None else -row)
        hessian = torch.stack(rows, 1)
        return (hessian + hessian.mT) / 2


def _maximise(log_joint: LogJoint, start: Tensor, num_steps: int = 100) -> tuple[Tensor, Tensor]:
    """
    Climbs from each point by BFGS with a backtracking line search.

    :returns: the points reached, with shape ``(count, d)``, and the log densities there.
    """
    count, d = start.shape
    x, (value, gradient) = start.clone(), log_joint.gradient(start)
    inverse = torch.eye(d).to(x) / gradient.norm(dim=-1).clamp(min=1.0).view(count, 1, 1)
    active = torch.arange(count)[value.isfinite()]
    for step in range(num_steps):
        direction = (inverse[active] @ gradient[active].unsqueeze(-1)).squeeze(-1)
        slope = (direction * gradient[active]).sum(-1)
        climbing = slope > 1e-9  # twice the increase that a quadratic model predicts
        active, direction, slope = active[climbing], direction[climbing], slope[climbing]
        if not len(active):
            break
        new_x, new_value, new_gradient = x.clone(), value.clone(), gradient.clone()
        size, left = 1.0, torch.arange(len(active))
        for _ in range(12):
            index = active[left]
            trial = x[index] + size * direction[left]
            trial_value, trial_gradient = log_joint.gradient(trial)
            good = trial_value >= value[index] + 1e-4 * size * slope[left]
            new_x[index[good]], new_value[index[good]] = trial[good], trial_value[good]
            new_gradient[index[good]] = trial_gradient[good]
            left, size = left[~good], size / 3
            if not len(left):
                break
        moved = torch.ones(len(active), dtype=torch.bool)
        moved[left] = False
        active = active[moved]
        dx, dg = (new_x - x)[active], (gradient - new_gradient)[active]
        x, value, gradient = new_x, new_value, new_gradient
        _update(inverse, active, dx, dg, first=step == 0)
    return x, value


def _update(inverse: Tensor, active: Tensor, dx: Tensor, dg: Tensor, first: bool) -> None:
    """Updates, in place, inverse Hessians of the negative log density by BFGS, where it is convex along the step."""
    curvature = (dx * dg).sum(-1)
    convex = curvature > 1e-12 * dx.norm(dim=-1) * dg.norm(dim=-1)
    active, dx, dg, curvature = active[convex], dx[convex], dg[convex], curvature[convex]
    if first:
        scale = curvature / dg.square().sum(-1)
        inverse[active] = torch.eye(dx.shape[-1]).to(dx) * scale.view(-1, 1, 1)
    old, rho = inverse[active], 1 / curvature.view(-1, 1, 1)
    image = old @ dg.unsqueeze(-1)
    cross = image @ dx.unsqueeze(-2) * rho
    outer = dx.unsqueeze(-1) * dx.unsqueeze(-2) * rho
    inverse[active] = old - cross - cross.mT + outer * (1 + rho * (dg.unsqueeze(-2) @ image))


def _modes(log_joint: LogJoint, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct local maxima, highest first, with shape ``(k, d)``; the log densities there, and the precisions."""
    x, value = _maximise(log_joint, starts)
    order = value.argsort(descending=True)
    order = order[value[order].isfinite()]
    x, value = x[order], value[order]
    precision, (_, gradient) = log_joint.precision(x), log_joint.gradient(x)
    # Along a ridge there is no mode: there the standard deviation would exceed the distances of the starts.
    flat = 1 / (10 * starts.std(0).max()).square()
    eigenvalues = torch.linalg.eigvalsh(precision.nan_to_num())
    proper = eigenvalues[:, 0] > (log_joint.eps * eigenvalues.shape[-1] * eigenvalues[:, -1]).clamp(min=flat)
    x, value, precision, gradient = x[proper], value[proper], precision[proper], gradient[proper]
    decrement = (torch.linalg.solve(precision, gradient) * gradient).sum(-1)
    distinct: list[int] = []
    for i in range(len(x)):
        offset = x[i] - x[distinct]
        squared = torch.einsum("ki,kij,kj->k", offset, precision[distinct], offset)
        if decrement[i] < 0.05 and bool((squared > 1.0).all()):
            distinct.append(i)
    return x[distinct], value[distinct], precision[distinct]


def _starts(log_joint: LogJoint, draws: Tensor, weights: Tensor, restarts: int) -> Tensor:
    """Start points: draws from the prior, points around the guide that are up to 30 times as wide, and its draws."""
    own = draws[torch.multinomial(weights, _GUIDE_STARTS, replacement=True)]
    wide = torch.empty(restarts, 1).to(draws).uniform_(0.0, math.log(30.0)).exp() * torch.randn(
        restarts, draws.shape[-1]
    ).to(draws)
    wide = draws.mean(0) + draws.std(0) * wide
    try:
        with torch.no_grad(), pyro.validation_enabled(False):
            prior = log_joint.unconstrain((restarts + 1) // 2)
    except NotImplementedError:  # an improper one
        prior = draws[:0]
    starts = torch.cat([own, prior, wide[len(prior) :]])
    return starts[starts.isfinite().all(-1)]


def find_missed_modes(
    log_joint: LogJoint, samples: Mapping[str, Tensor], weights: Tensor, log_evidence: float, restarts: int
) -> MissedModes:
    r"""
    Looks for modes of the posterior near which a guide has almost no draws.

    Searches by BFGS start from draws of the prior, from points around the guide and from a few of its own draws. They
    end in modes :math:`m` of the unconstrained density, with precisions P and, by Laplace's approximation, masses

        :math:`\log Z_m = \log p(\mathbf{x}, m) + \tfrac{d}{2} \log 2 \pi - \tfrac{1}{2} \log \det P.`

    Each draw of the guide belongs to the mode under whose Gaussian approximation its density is largest. A mode is
    missed if its share of the posterior, :math:`Z_m / (Z + Z_m)` with the guide's evidence Z, is at least 0.01, and its
    draws have less than a tenth of that share, counted and weighted.

    An unbounded density, or one without an isolated maximum, has no mode that this search could find.

    :param log_joint: the model's density.
    :param samples: draws of the guide by site, with the shapes ``(num_samples,)`` + those of the sites.
    :param Tensor weights: their importance weights, with shape ``(num_samples,)``, which sum to 1.
    :param float log_evidence: the guide's estimate of the log evidence.
    :param int restarts: how many searches to start away from the guide.
    :raises ValueError: if the model mixes samples, allows no further plate, or has no second derivatives.
    """
    count = len(weights)
    try:
        with torch.no_grad():
            draws = log_joint.unconstrain(count, samples)
            usable = draws.isfinite().all(-1)
            draws, weights = draws[usable], weights[usable]
            if draws.shape[-1] ** 2 * (restarts + _GUIDE_STARTS) > _MAX_ELEMENTS:
                raise ValueError(f"{restarts} matrices of {draws.shape[-1]} rows and columns would not fit in memory")
            _check_independence(log_joint, draws[:2])
        x, value, precision = _modes(log_joint, _starts(log_joint, draws, weights, restarts))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"restarts must be 0 for this model, or fewer: a search for modes evaluates the log joint density, its "
            f"gradient and its Hessian for many samples at once in a further plate, but got: {error}"
        ) from error
    if not len(x):
        return MissedModes(0, [], 0.0)
    factors = torch.linalg.cholesky(precision)
    half_log_det = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_odds = value + 0.5 * x.shape[-1] * math.log(2 * math.pi) - half_log_det - log_evidence
    density = [
        half_log_det[k] - 0.5 * ((draws - x[k]) @ factors[k]).square().sum(-1) for k in range(len(x))
    ]  # of the Gaussian approximations
    nearest = torch.stack(density).argmax(0)
    counted = torch.bincount(nearest, minlength=len(x)) / count
    weighted = torch.zeros(len(x)).to(weights).index_add_(0, nearest, weights)
    mass = log_odds.sigmoid()
    # A covered mode with an expected number of five draws has none of them with a probability below 0.01.
    missed = (mass > max(_MIN_MASS, 5 / count)) & (torch.maximum(counted, weighted) < _MIN_SHARE * mass)
    index = missed.nonzero().squeeze(-1)
    index = index[log_odds[index].argsort(descending=True)]
    if not len(index):
        return MissedModes(len(x), [], 0.0)
    values = log_joint.constrain(x[index])
    return MissedModes(
        len(x),
        [{name: value[i] for name, value in values.items()} for i in range(len(index))],
        log_odds[index].logsumexp(0).sigmoid().item(),
    )


def _check_independence(log_joint: LogJoint, points: Tensor) -> None:
    together, alone = log_joint(points), torch.cat([log_joint(point) for point in points.split(1)])
    if not torch.allclose(together, alone, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ValueError(f"log densities of two samples are {together.tolist()} together and {alone.tolist()} alone")
