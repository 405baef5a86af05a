# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Latents without a density: elements that a model masks, and on which nothing else in it depends.

They are no part of the joint density. A guide that learned a distribution of them would widen it without end, as its
entropy counts and nothing pays for it. Elements that are masked in their own site, but on which data or other latents
depend, have a flat prior and are latents as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to

from .start import log_density

__all__ = ["MaskedElements", "element_support", "is_improper"]

_POINTS = 3  # at which the joint density is differentiated


class MaskedElements:
    """
    The elements of a model's latents that have no density.

    :ivar index: the positions of the elements with a density among the flat unconstrained latents.
    :ivar start: the flat unconstrained latents at the start, with shape ``(n,)``.
    :ivar kept: True for elements with a density, of each site that also has others.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param trace: the guide's prototype trace of the model.
    :raises ValueError: for an improper prior, if no data depend on some of its elements.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], trace: poutine.Trace
    ) -> None:
        sites = dict(trace.iter_stochastic_nodes())
        values = {name: site["value"].detach() for name, site in sites.items()}
        bijections = {name: biject_to(site["fn"].support) for name, site in sites.items()}
        latents = {name: bijections[name].inv(value) for name, value in values.items()}
        event_dims = {name: element_support(site["fn"]).event_dim for name, site in sites.items()}
        shapes = {name: value.shape[: value.dim() - event_dims[name]] for name, value in values.items()}
        used = {name: _mask(site, shapes[name]) for name, site in sites.items()}
        improper = [name for name, site in sites.items() if is_improper(site["fn"])]
        if improper or not all(bool(mask.all()) for mask in used.values()):
            depends = _dependence(model, args, kwargs, bijections, latents)
            for name, shape in shapes.items():
                matters = depends[name].unsqueeze(-1).flatten(len(shape)).any(-1)
                if name in improper and not bool(matters.all()):
                    raise ValueError(
                        f"site {name!r} of the model has an improper prior, and no data depend on "
                        f"{int((~matters).sum())} of its {matters.numel()} elements; give it a proper prior"
                    )
                used[name] = used[name] | matters
        every = [_stretched(used[name], latent.shape).reshape(-1) for name, latent in latents.items()]
        self.index = torch.cat(every).nonzero().squeeze(-1)
        self.start = torch.cat([latent.reshape(-1) for latent in latents.values()])
        self.kept = {name: mask for name, mask in used.items() if not bool(mask.all())}
        #: The distribution and the unconstrained latents of each site, in the guide's present call.
        self.latents: dict[str, tuple[Any, Tensor]] = {}
        self._bijections = bijections

    def __bool__(self) -> bool:
        return bool(self.kept)

    def fill(self, latent: Tensor, others: Tensor) -> Tensor:
        """
        All unconstrained latents, flat.

        :param Tensor latent: those with a density, with shape ``(*, latent_dim)``.
        :param Tensor others: of which the rest is taken, with shape ``(n,)`` or ``(*, n)``.
        """
        return others.expand(*latent.shape[:-1], -1).index_copy(-1, self.index.to(latent.device), latent)

    @torch.no_grad()
    def draw(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        values: dict[str, Tensor],
        batch_shape: torch.Size,
    ) -> Tensor:
        """
        All unconstrained latents, flat, in which elements without a density are samples of the prior given the others.

        :param model: the model.
        :param args: positional arguments of the model.
        :param kwargs: keyword arguments of the model.
        :param values: of all latents in their supports, by site.
        :param batch_shape: the batch shape of the flat latents.
        """
        sampler = _PriorSampler(values, self.kept)
        poutine.block(sampler(model))(*args, **kwargs)
        parts = (self._bijections[name].inv(sampler.values[name]) for name in values)
        return torch.cat([part.reshape(*batch_shape, -1) for part in parts], dim=-1)

    def uncounted(self) -> Messenger:
        """Makes the sites of a guide leave elements without a density out of their log densities."""
        return _Uncounted(self)


def _mask(site: Any, shape: torch.Size) -> Tensor:
    """True for elements that the model does not mask, by a handler or in the distribution."""
    fn, batch_shape = site["fn"], site["fn"].batch_shape
    kept = torch.ones(shape, dtype=torch.bool, device=site["value"].device)
    masks = [(site["mask"], batch_shape)]
    while isinstance(fn, (ExpandedDistribution, Independent, MaskedDistribution)):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, batch_shape))
        if isinstance(fn, Independent):
            batch_shape = batch_shape + fn.event_shape[: fn.reinterpreted_batch_ndims]
        fn = fn.base_dist
    for mask, mask_shape in masks:
        if mask is not None:
            mask = torch.as_tensor(mask, dtype=torch.bool, device=kept.device).expand(mask_shape)
            kept = kept & _stretched(mask, shape)
    return kept


def _stretched(mask: Tensor, shape: torch.Size) -> Tensor:
    """A mask of the first dimensions of a shape, for all of them."""
    return mask.reshape((*mask.shape, *(1,) * (len(shape) - mask.dim()))).expand(shape)


def is_improper(fn: Any) -> bool:
    """
    Returns True for an improper uniform distribution.

    :param fn: a distribution.
    """
    while isinstance(fn, (ExpandedDistribution, Independent, MaskedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)


def element_support(fn: Any) -> constraints.Constraint:
    """
    Returns the support of one of a distribution's independent elements.

    :param fn: a distribution.
    """
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _dependence(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    bijections: dict[str, Transform],
    latents: dict[str, Tensor],
) -> dict[str, Tensor]:
    """True for unconstrained elements on which the joint density depends, by its gradient at a few random points."""
    depends = {name: torch.zeros_like(latent, dtype=torch.bool) for name, latent in latents.items()}
    for _ in range(_POINTS):
        with torch.enable_grad():
            points = {name: (latent + torch.randn_like(latent)).requires_grad_() for name, latent in latents.items()}
            total = log_density(model, args, kwargs, {name: bijections[name](point) for name, point in points.items()})
            if not total.requires_grad:
                continue
            gradients = torch.autograd.grad(total, list(points.values()), materialize_grads=True, allow_unused=True)
        for name, gradient in zip(points, gradients, strict=True):
            depends[name] |= gradient.isfinite() & (gradient != 0)
    return depends


class _PriorSampler(Messenger):
    """Gives latents their values, but samples elements without a density from the prior."""

    def __init__(self, values: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
        super().__init__()
        self.values, self._kept = dict(values), kept

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is None or msg["is_observed"]:
            return
        kept = self._kept.get(msg["name"])
        if kept is not None:
            fn = msg["fn"]
            # The prior may depend on no other latent, but each particle is to have a sample of its own.
            batch_shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            kept = kept.reshape((*kept.shape, *(1,) * element_support(fn).event_dim))
            value = torch.where(kept, value, fn.expand(batch_shape).sample())
            self.values[msg["name"]] = value
        msg["value"], msg["done"] = value, True


class _Uncounted(Messenger):
    """Leaves elements without a density out of the log-determinants at a guide's sites."""

    def __init__(self, masked: MaskedElements) -> None:
        super().__init__()
        self._masked = masked

    def _pyro_sample(self, msg: Any) -> None:
        kept = self._masked.kept.get(msg["name"])
        if kept is not None:
            fn, latent = self._masked.latents[msg["name"]]
            support, value = element_support(fn), msg["fn"].v
            ladj = biject_to(support).inv.log_abs_det_jacobian(value, latent).where(kept, 0.0)
            ladj = sum_rightmost(ladj, fn.event_dim - support.event_dim)
            msg["fn"] = dist.Delta(value, log_density=ladj, event_dim=fn.event_dim)
