# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The graph of a model: which of its latents the joint density binds together."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_hollow.nn import GraphConditioner
from pyro_hollow.ops.memory import allocated_bytes, part_size

from .log_density import LogDensity
from .start import choose_start, log_density

__all__ = ["adjacency_of_trace", "independent_groups", "latent_adjacency", "sparse_conditioner"]

_POINTS = 3  # at which the joint density is differentiated
_ROWS = 64  # of the second derivatives that are taken together
_SPREAD = 0.1  # of the points that a start is chosen by, as in AutoHollowCNF
# Fewer latents gain little from a conditioner on a graph, and those that see a larger share of the others nothing.
MANY, _SEEN_SHARE = 64, 0.5
_PATIENCE = 30.0  # seconds that finding a graph may take
# As good as two layers of 32 units after as many steps, each of which takes half the time.
_WIDTHS = [16]


def latent_adjacency(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    r"""
    Finds the graph of a model: two latents are neighbours if the joint density is no product of a function that is free
    of the one and a function that is free of the other,

        :math:`\frac{\partial^2 \log p(\mathbf{x}, \mathbf{z})}{\partial z_i \partial z_j} \ne 0`

    at one of a few random points of the unconstrained space, for which it takes a backward pass for each latent.
    An entry that is finite at none of them counts as an edge. Factors without curvature are not seen, such as a Laplace
    density in its value and location; nor are those that a discrete latent, sampled anew at each point, happens to
    switch off. The graph then lacks their edges: add them by hand.

    Usage::

        adjacency = latent_adjacency(model, data)
        conditioner = GraphConditioner(len(adjacency), [32, 32], adjacency=adjacency, radius=3)
        guide = AutoHollowCNF(model, conditioner=conditioner)

    The random state is left as it is.

    :param callable model: a Pyro model with continuous latents.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :return: a symmetric boolean matrix with shape ``(d, d)`` and a diagonal of False. Its rows are the elements of the
        unconstrained latents, site by site in the order of the model, as in :class:`AutoHollowCNF` unless the model
        masks some.
    :raises ValueError: for a model without latents, and where no second derivative is finite at any of the points.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        start = choose_start(model, _SPREAD, args, kwargs)
        started = poutine.block(InitMessenger(start)(model), prototype_hide_fn)
        with torch.no_grad():
            trace = poutine.block(poutine.trace(started).get_trace)(*args, **kwargs)
        return adjacency_of_trace(model, args, kwargs, trace)


def adjacency_of_trace(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], trace: poutine.Trace
) -> Tensor:
    """
    Finds the graph of a model around the latents of a trace; see :func:`latent_adjacency`.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param trace: the model's trace at a start, such as a guide's prototype.
    :return: the adjacency.
    :raises ValueError: as there.
    """
    sites = dict(trace.iter_stochastic_nodes())
    if not sites:
        raise ValueError("the model has no latents, so that there is no graph of them")
    bijections = {name: biject_to(site["fn"].support) for name, site in sites.items()}
    latents = {name: bijections[name].inv(site["value"].detach()) for name, site in sites.items()}
    sizes = [latent.numel() for latent in latents.values()]

    def log_joint(point: Tensor) -> Tensor:
        parts = zip(latents.items(), point.split(sizes), strict=True)
        points = {name: part.view(latent.shape).to(latent) for (name, latent), part in parts}
        values = {name: bijections[name](value) for name, value in points.items()}
        ladj = sum(bijections[name].log_abs_det_jacobian(points[name], values[name]).sum() for name in points)
        return log_density(model, args, kwargs, values) + ladj

    return _adjacency(log_joint, torch.cat([latent.reshape(-1) for latent in latents.values()]))


def sparse_conditioner(density: LogDensity, patience: float = math.inf) -> GraphConditioner | None:
    """
    Makes a conditioner on the graph of a model with many latents, if few others are seen by each of them.

    :param LogDensity density: the density of the model.
    :param float patience: seconds that finding the graph may take, half a minute at most.
    :return: the conditioner. None for fewer than 64 latents, where one sees more than half of the others, where the
        graph is unknown, and for subsampled data, which have edges of their own.
    """
    if density.dim < MANY or density.subsamples:
        return None
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            adjacency = _adjacency(density.model.of_one, density.start, min(_PATIENCE, patience))
    except (TimeoutError, ValueError):
        return None
    # The largest number seen is that of neighbours at least, and a hub costs as much as all others.
    conditioner = GraphConditioner(density.dim, _WIDTHS, adjacency=adjacency, activation="silu")
    num_seen = conditioner.index.shape[1] + len(conditioner.hubs)
    return conditioner if num_seen <= _SEEN_SHARE * density.dim else None


def independent_groups(density: LogDensity, patience: float = math.inf) -> list[Tensor]:
    """
    Finds groups of latents that the joint density does not bind together, the connected components of its graph.

    :param LogDensity density: the density of the model.
    :param float patience: seconds that finding the graph may take, half a minute at most.
    :return: the indices of each group; a single one where the graph is unknown.
    """
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            adjacency = _adjacency(density.model.of_one, density.start, min(_PATIENCE, patience))
    except (TimeoutError, ValueError):
        return [torch.arange(density.dim)]
    reached = adjacency.double().fill_diagonal_(1.0)
    for _ in range(density.dim.bit_length()):  # paths of twice the length each time
        reached = (reached @ reached > 0).double()
    return [row.nonzero().squeeze(-1) for row in reached.unique(dim=0)]


def _adjacency(log_joint: Callable[[Tensor], Tensor], start: Tensor, patience: float = math.inf) -> Tensor:
    """The graph of a function around a point."""
    known = edge = torch.zeros(len(start), len(start), dtype=torch.bool, device=start.device)
    cause = None
    for _ in range(_POINTS):
        try:
            hessian = _hessian(log_joint, start + torch.randn_like(start), patience / _POINTS)
        except (ArithmeticError, RuntimeError, ValueError) as error:  # whatever a model raises far from its posterior
            cause = error
            continue
        known, edge = known | hessian.isfinite(), edge | (hessian.isfinite() & (hessian != 0))
    if not bool(known.any()):
        raise ValueError(
            "the joint density of the model has no finite second derivatives around its start, so that its graph is "
            "unknown; give the adjacency to a GraphConditioner, or use another conditioner"
        ) from cause
    edge = edge | ~known
    return (edge | edge.mT).fill_diagonal_(False)


def _hessian(function: Callable[[Tensor], Tensor], point: Tensor, patience: float) -> Tensor:
    """
    The matrix of second derivatives; NaN where the function or a first derivative is not finite.

    :raises TimeoutError: if it is going to take more seconds than there is patience for.
    """
    point = point.detach().requires_grad_()
    with torch.enable_grad():
        value = function(point)
        gradient = torch.zeros_like(point)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value, point, create_graph=True, materialize_grads=True)
        basis = torch.eye(len(point)).to(point)
        size = min(_ROWS, part_size(allocated_bytes(lambda: _rows(gradient, point, basis[:1]))))
        rows, begin = [], time.perf_counter()
        for part in basis.split(size):
            rows.append(_rows(gradient, point, part))
            if (time.perf_counter() - begin) * len(basis) > patience * len(rows) * size:
                raise TimeoutError("second derivatives of the density take too long")
    hessian = torch.cat(rows)
    hessian[~(value.isfinite() & gradient.isfinite())] = torch.nan
    return hessian


def _rows(gradient: Tensor, point: Tensor, basis: Tensor) -> Tensor:
    """Rows of the matrix of second derivatives; together, unless an operation has no rule for it."""
    if not gradient.requires_grad:
        return torch.zeros_like(basis)
    grad = partial(torch.autograd.grad, gradient, point, retain_graph=True, materialize_grads=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return grad(basis, is_grads_batched=True)[0]
    except RuntimeError:
        return torch.stack([grad(row)[0] for row in basis])
