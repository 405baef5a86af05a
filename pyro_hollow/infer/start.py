# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The start of an automatic guide: a finite and moderate point for any proper prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_feasible,
    init_to_median,
    init_to_uniform,
    init_to_value,
)
from torch import Tensor
from torch.distributions import biject_to

from .particles import check_observed

__all__ = ["check_data", "choose_start", "log_density"]

# How many perturbed copies of a start are scored, and how many random starts there are where no other is finite.
_PERTURBATIONS = 4
_RANDOM_STARTS = 8
# By so many nats per latent must another start be better than the prior's median. Heavy-tailed hyperpriors put the
# median many orders of magnitude away; elsewhere it is as good a start as any.
_MARGIN = 10.0


class _Scored(NamedTuple):
    init_loc_fn: Callable[..., Any]
    score: float
    latent_dim: int


@torch.no_grad()
def choose_start(
    model: Callable[..., Any], spread: float, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., Any]:
    """
    A per-site initialization function that leads to a finite and moderate point.

    The prior's median is taken, unless the log joint density of perturbed copies is not finite there or much lower
    than at the zero of the unconstrained space. Where neither is finite, it is the best of a few points that are
    uniform between -2 and 2 there. Costs a dozen runs of the model.

    :param model: the model.
    :param float spread: the standard deviation of the perturbations, in the unconstrained space.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    """
    score = partial(_score, model, spread, args, kwargs)
    median = score(init_to_median)
    zero = score(init_to_feasible)
    if median.score > -math.inf and median.score + _MARGIN * median.latent_dim >= zero.score:
        return median.init_loc_fn
    candidates = [zero]
    if zero.score == -math.inf:
        candidates = [score(init_to_uniform(radius=2.0)) for _ in range(_RANDOM_STARTS)]
    best = max(candidates, key=lambda each: each.score)
    return best.init_loc_fn if best.score > -math.inf else init_to_median


def _score(
    model: Callable[..., Any],
    spread: float,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    init_loc_fn: Callable[..., Any],
) -> _Scored:
    """The mean log joint density of perturbed copies of a start; -inf where the model cannot be evaluated."""
    try:
        started = poutine.block(InitMessenger(init_loc_fn)(model), prototype_hide_fn)
        trace = poutine.block(poutine.trace(started).get_trace)(*args, **kwargs)
        sites = dict(trace.iter_stochastic_nodes())
        bijections = {name: biject_to(site["fn"].support) for name, site in sites.items()}
        start = {name: bijections[name].inv(site["value"]) for name, site in sites.items()}
        total = 0.0
        for _ in range(_PERTURBATIONS):
            moved = {name: value + spread * torch.randn_like(value) for name, value in start.items()}
            values = {name: bijections[name](value) for name, value in moved.items()}
            ladj = sum(bijections[name].log_abs_det_jacobian(moved[name], values[name]).sum() for name in moved)
            total += float(log_density(model, args, kwargs, values) + ladj) / _PERTURBATIONS
    # Whatever a model raises far from its posterior; an error of the model itself is raised again by its next run.
    except (ArithmeticError, RuntimeError, ValueError):
        return _Scored(init_loc_fn, -math.inf, 0)
    score = total if math.isfinite(total) else -math.inf
    latent_dim = sum(value.numel() for value in start.values())
    if init_loc_fn is not init_to_median:  # which is to be the same as elsewhere, for the same random state
        init_loc_fn = init_to_value(values={name: site["value"] for name, site in sites.items()})
    return _Scored(init_loc_fn, score, latent_dim)


def log_density(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[str, Tensor]
) -> Tensor:
    """
    The log joint density of a model and its data, a scalar, hidden from all handlers around.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param values: of latents in their supports, by site.
    """
    return poutine.block(poutine.trace(poutine.condition(model, values)).get_trace)(*args, **kwargs).log_prob_sum()


def check_data(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """
    Refuses observed values that are not finite.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :raises ValueError: with the name of the site.
    """
    try:
        started = InitMessenger(init_to_feasible)(model)
        trace = poutine.block(poutine.trace(started).get_trace)(*args, **kwargs)
    except (ArithmeticError, RuntimeError, ValueError):
        return  # the model may be defined at another start
    check_observed(trace)
