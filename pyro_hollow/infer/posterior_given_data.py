# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The distribution of a model's latents given data, as a distribution of Pyro."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to

from .simulation import Site

__all__ = ["PosteriorGivenData", "unpack"]

_ONE = torch.Size()


class PosteriorGivenData(TorchDistribution):
    r"""
    The distribution of the latents given data, as :meth:`AmortisedPosterior.posterior` returns it. A sample is a
    vector of the values of all sites, one after the other, each flattened, within their supports; :meth:`draws` returns
    them by name. The density is that of the values, exact but for the tolerance of the solver.

    :param base: the distribution in the unconstrained space.
    :param sites: the latent sites.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, base: Any, sites: Sequence[Site]) -> None:
        self.base, self.sites = base, list(sites)
        size = sum(site.shape.numel() for site in sites)
        super().__init__(base.batch_shape, torch.Size([size]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The supports of the sites side by side."""
        parts = [_flat_support(site) for site in self.sites]
        return parts[0] if len(parts) == 1 else constraints.cat(parts, -1, [site.shape.numel() for site in self.sites])

    def expand(self, batch_shape: Any, _instance: Any = None) -> PosteriorGivenData:
        """The same for more data."""
        return PosteriorGivenData(self.base.expand(batch_shape), self.sites)

    def rsample(self, sample_shape: Any = _ONE) -> Tensor:
        """Draws vectors with shape ``(*sample_shape, *batch_shape, D)``."""
        return self._join(self.unpack(self.base.rsample(sample_shape))[0])

    def draws(self, num_samples: int) -> dict[str, Tensor]:
        """
        Draws of the latents by name, without gradients.

        :param num_samples: how many.
        :returns: tensors with shapes ``(num_samples, *batch_shape, *site_shape)``.
        """
        with torch.no_grad():
            return self.unpack(self.base.sample((num_samples,)))[0]

    def log_prob(self, value: Tensor | Mapping[str, Tensor]) -> Tensor:
        """
        The log density of the latents; -inf outside of their supports.

        :param value: a vector of all sites as :meth:`sample` returns it, or the values by name.
        """
        values = value if isinstance(value, Mapping) else self._split(value)
        parts, ladj, inside = [], torch.zeros(()), torch.tensor(True)
        for site in self.sites:
            bijection, own = biject_to(site.support), values[site.name]
            u = bijection.inv(own)
            batch = own.shape[: own.dim() - len(site.shape)]
            valid = u.reshape(*batch, -1).isfinite().all(-1)
            check = site.support.check(own)
            inside = inside & valid & check.reshape(*batch, -1).all(-1)
            # Any value inside will do where the density is zero.
            u = torch.where(valid.reshape((*batch, *(1,) * (u.dim() - len(batch)))), u, torch.zeros_like(u))
            term = bijection.log_abs_det_jacobian(u, bijection(u))
            ladj = ladj + sum_rightmost(term, term.dim() - len(batch))
            parts.append(u.reshape(*batch, -1))
        density = self.base.log_prob(torch.cat(parts, -1)) - ladj
        return torch.where(inside, density, -torch.inf)

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """
        Values and log-determinants of the sites, which have the shape of the batch.

        :param u: unconstrained latents with shape ``(*, d)``.
        """
        return unpack(self.sites, u)

    def _join(self, values: Mapping[str, Tensor]) -> Tensor:
        parts = [
            values[s.name].reshape(*values[s.name].shape[: values[s.name].dim() - len(s.shape)], -1) for s in self.sites
        ]
        return torch.cat(parts, -1)

    def _split(self, value: Tensor) -> dict[str, Tensor]:
        sizes = [site.shape.numel() for site in self.sites]
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"value must have shape (*, {sum(sizes)}), but got {tuple(value.shape)}")
        parts = value.split(sizes, -1)
        return {s.name: part.reshape((*value.shape[:-1], *s.shape)) for s, part in zip(self.sites, parts, strict=True)}


def unpack(sites: Sequence[Site], u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """
    Values of sites, and the log-determinants of the maps to their supports, which have the shape of the batch.

    :param sites: the sites.
    :param u: unconstrained latents with shape ``(*, d)``.
    """
    values, ladjs = {}, {}
    batch = u.shape[:-1]
    for site, part in zip(sites, u.split([site.unconstrained_shape.numel() for site in sites], -1), strict=True):
        bijection = biject_to(site.support)
        part = part.reshape((*batch, *site.unconstrained_shape))
        values[site.name] = value = bijection(part)
        term = bijection.log_abs_det_jacobian(part, value)
        ladjs[site.name] = sum_rightmost(term, term.dim() - len(batch))
    return values, ladjs


def _flat_support(site: Site) -> constraints.Constraint:
    """The support of the flattened value of a site."""
    if len(site.shape) == 1 and site.support.event_dim == 1:
        return site.support
    uniform = site.support if site.support.event_dim == 0 else constraints.real
    return constraints.independent(uniform, 1) if not len(site.shape) else constraints.real_vector
