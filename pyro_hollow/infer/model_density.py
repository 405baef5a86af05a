# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The log joint density of a Pyro model as a function of flat unconstrained latents, by Pyro's handlers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to

from .log_joint import particle_sums, row_sums
from .masked import MaskedElements, element_support, is_improper
from .particles import check_supports
from .plates import plates, subsampled
from .start import check_data, choose_start

__all__ = ["ImproperAtZero", "ModelDensity", "is_marked"]

_PARTICLES = "_particles"
_RANDOM_POINTS = 4  # at which supports are looked at, after the start
_SPREAD = 0.1  # of the points that a start is chosen by, as in AutoHollowCNF


class ModelDensity:
    r"""
    The log joint density of a model, in the unconstrained space of its latents,

        :math:`\log p(\mathbf{x}, T(\mathbf{z})) + \log |\det \partial T / \partial \mathbf{z}|,`

    with T the bijections of torch's ``biject_to`` to the supports of the sites. Sites that are marked for parallel
    enumeration are summed. Elements of latents that the model masks, and on which nothing in it depends, are left out.

    :ivar int dim: the number d of latents.
    :ivar Tensor start: the latents at the start, with shape ``(d,)``.
    :ivar int elements: the number of elements of all sites' values.
    :ivar subsamples: the size of each subsampled plate and that of its subsamples, by name.
    :ivar bool observes: the model has observed sites or factors.
    :ivar parameters: the unconstrained parameters of the model, by name.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :raises ValueError: for a model without latents, with discrete latents that are not marked for parallel enumeration,
        or with data that are not finite, or outside of the support of a distribution that validates them.
    :raises NotImplementedError: for latents in a subsampled plate.
    """

    def __init__(self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            proper = ImproperAtZero()(model)
            continuous = poutine.block(proper, hide_fn=is_marked)
            check_data(continuous, args, kwargs)
            init = choose_start(continuous, _SPREAD, args, kwargs)
            trace = self._record(init)
            check_supports(self._traces(trace))
            latents = poutine.block(InitMessenger(init)(continuous), prototype_hide_fn)
            prototype = poutine.block(poutine.trace(latents).get_trace)(*args, **kwargs)
        self.sites = dict(prototype.iter_stochastic_nodes())
        self._check_sites(trace)
        self.nesting = max((-frame.dim for frame in plates(trace) if frame.vectorized), default=0)
        self._enumerates = any(map(is_marked, trace.nodes.values()))
        values = [site["value"] for site in trace.nodes.values() if site["type"] == "sample"]
        self.elements = sum(value.numel() for value in values if isinstance(value, Tensor))
        self.subsamples = {
            name: (site["fn"].size, len(site["value"]))
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and site_is_subsample(site) and len(site["value"]) < site["fn"].size
        }
        self.observes = any(
            site["type"] == "sample" and site["is_observed"] and not site["infer"].get("_deterministic")
            for site in trace.nodes.values()
        )
        self.parameters = {
            name: pyro.get_param_store()._params[name] for name, site in trace.nodes.items() if site["type"] == "param"
        }
        self.masked = MaskedElements(poutine.block(model, hide_fn=is_marked), args, kwargs, prototype)
        self._bijections = {name: _bijection(site) for name, site in self.sites.items()}
        self._shapes = {name: self._bijections[name].inv(site["value"]).shape for name, site in self.sites.items()}
        self.start = self.masked.start[self.masked.index]
        self.dim = len(self.start)
        if self.dim == 0:
            raise ValueError("the model masks all of its latents, so that there is no density to evaluate")

    def _record(self, init: Callable[..., Any]) -> poutine.Trace:
        """A trace at a start."""
        # Sites that are enumerated are hidden from InitMessenger, which knows no start for them.
        recorder = poutine.trace(ImproperAtZero()(self.model))
        poutine.block(InitMessenger(init)(poutine.block(recorder, hide_fn=is_marked)))(*self.args, **self.kwargs)
        return recorder.trace

    def _traces(self, first: poutine.Trace) -> Iterator[poutine.Trace]:
        """Traces at the start and at a few random points, except where the model cannot be evaluated."""
        yield first
        for _ in range(_RANDOM_POINTS):
            with suppress(ArithmeticError, RuntimeError, ValueError):
                yield self._record(init_to_uniform(radius=2.0))

    def _check_sites(self, trace: poutine.Trace) -> None:
        if not self.sites:
            raise ValueError("the model has no continuous latents, so that there is no density of them")
        for name, site in self.sites.items():
            if site["fn"].support.is_discrete:
                raise ValueError(
                    f"site {name!r} of the model is a discrete latent: mark it for parallel enumeration, as "
                    "pyro.infer.config_enumerate(model) does, or marginalise it out of the model"
                )
            _bijection(site)
            for frame in subsampled(site["cond_indep_stack"]):
                raise NotImplementedError(
                    f"plate {frame.name!r} subsamples {frame.size} of {frame.full_size}, but holds the latent "
                    f"{name!r}, which would be another one for each subsample; use all the data"
                )

    def unpack(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
        """
        Latents in their supports, and the log-determinant of the map to there.

        :param Tensor z: with shape ``(d,)``, or ``(P, d)`` for particles in a plate outside of the model's own.
        :return: values by site, and the log-determinant with shape ``()`` or ``(P,)``.
        """
        if self.masked:
            z = self.masked.fill(z, self.masked.start.to(z))
        batch = z.shape[:-1]
        values: dict[str, Tensor] = {}
        total: Tensor | float = 0.0
        parts = z.split([shape.numel() for shape in self._shapes.values()], -1)
        for (name, shape), part in zip(self._shapes.items(), parts, strict=True):
            site = self.sites[name]
            if batch:
                batch_dim = site["value"].dim() - site["fn"].event_dim
                shape = torch.Size((*batch, *(1,) * (self.nesting - batch_dim), *shape))
            values[name], ladj = self._constrain(name, part.reshape(shape).to(site["value"].dtype))
            total = total + row_sums(ladj, batch.numel()).reshape(batch)
        return values, total

    def _constrain(self, name: str, part: Tensor) -> tuple[Tensor, Tensor]:
        """A site's value, and the log-determinant of its elements with a density."""
        bijection, kept = self._bijections[name], self.masked.kept.get(name)
        value = bijection(part)
        if kept is None:
            return value, bijection.log_abs_det_jacobian(part, value)
        support = element_support(self.sites[name]["fn"])
        ladj = biject_to(support).log_abs_det_jacobian(part, value).where(kept, 0.0)
        return value, sum_rightmost(ladj, self.sites[name]["fn"].event_dim - support.event_dim)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """
        Flat unconstrained latents of values of the sites.

        :param values: by site, each with the site's own shape after those of a batch.
        :return: with shape ``(*, d)``.
        """
        parts = []
        for name, site in self.sites.items():
            batch = values[name].shape[: values[name].dim() - site["value"].dim()]
            parts.append(self._bijections[name].inv(values[name]).reshape(*batch, -1))
        return torch.cat(parts, -1)[..., self.masked.index]

    def _trace(self, z: Tensor, subsamples: tuple[Tensor, ...]) -> tuple[poutine.Trace, Tensor | float]:
        """A trace with its log densities at one particle or several, and the log-determinant of :meth:`unpack`."""
        values, ladj = self.unpack(z)
        values |= dict(zip(self.subsamples, subsamples, strict=True))
        size = len(z) if z.dim() == 2 else None
        model, dim = poutine.condition(self.model, values), -1 - self.nesting
        if self._enumerates:
            model = poutine.enum(model, first_available_dim=dim - (size is not None))
        with poutine.block(), _Unvalidated(), nullcontext() if size is None else pyro.plate(_PARTICLES, size, dim=dim):
            trace = prune_subsample_sites(poutine.trace(model).get_trace(*self.args, **self.kwargs))
        trace.compute_log_prob()
        return trace, ladj

    def of_particles(self, z: Tensor, *subsamples: Tensor) -> Tensor:
        """
        Evaluates all particles at once, in a plate.

        :param Tensor z: with shape ``(P, d)``.
        :param subsamples: the indices of each of :attr:`subsamples`.
        :return: with shape ``(P,)``.
        """
        trace, ladj = self._trace(z, subsamples)
        return particle_sums(trace, len(z), _PARTICLES, dtype=z.dtype, device=z.device) + ladj

    def of_one(self, z: Tensor, *subsamples: Tensor) -> Tensor:
        """
        Evaluates one particle.

        :param Tensor z: with shape ``(d,)``.
        :param subsamples: the indices of each of :attr:`subsamples`.
        :return: a scalar.
        """
        trace, ladj = self._trace(z, subsamples)
        return particle_sums(trace, 1, None, dtype=z.dtype, device=z.device).reshape(()) + ladj

    def mapped(self, z: Tensor, *subsamples: Tensor) -> Tensor:
        """Evaluates particles as :meth:`of_particles` does, but by ``torch.vmap``, without a further plate."""
        return torch.vmap(self.of_one, in_dims=(0, *(None,) * len(subsamples)))(z, *subsamples)

    def one_by_one(self, z: Tensor, *subsamples: Tensor) -> Tensor:
        """Evaluates particles as :meth:`of_particles` does, but one after the other."""
        return torch.stack([self.of_one(row, *subsamples) for row in z])

    def prior(self, count: int) -> Tensor:
        """
        Draws of the prior, of the latents that have one; the others are at zero.

        :param int count: the number of draws.
        :return: with shape ``(n, d)`` for n of at most ``count``, as a model may fail, or overflow, at some of them.
        """
        draws = []
        with torch.no_grad(), pyro.validation_enabled(False):
            for _ in range(count):
                with suppress(ArithmeticError, RuntimeError, ValueError):
                    sites = poutine.block(poutine.trace(ImproperAtZero()(self.model)).get_trace)(
                        *self.args, **self.kwargs
                    ).nodes
                    draws.append(self.pack({name: sites[name]["value"] for name in self.sites}))
        points = torch.stack(draws) if draws else self.start.new_zeros(0, self.dim)
        return points[points.isfinite().all(-1)]

    def draw_subsamples(self) -> list[Tensor]:
        """Indices of a new subsample for each of :attr:`subsamples`."""
        return [torch.randperm(full)[:size] for full, size in self.subsamples.values()]

    def infinite_sites(self, z: Tensor, *subsamples: Tensor) -> list[str]:
        """The names of sites whose log densities at one particle are not finite."""
        sites = self._trace(z, subsamples)[0].nodes.items()
        return [n for n, site in sites if site["type"] == "sample" and not bool(site["log_prob"].isfinite().all())]

    def moving_support(self, z: Tensor, *subsamples: Tensor) -> str | None:
        """The first site whose support at one particle is not that of the start."""
        for name, site in self._trace(z, subsamples)[0].nodes.items():
            if name in self.sites:
                own = biject_to(site["fn"].support).inv(site["value"])
                known = self._bijections[name].inv(site["value"])
                if own.shape != known.shape or not torch.allclose(own, known, 1e-3, 1e-3, equal_nan=True):
                    return name
        return None


class ImproperAtZero(Messenger):
    """Gives latents with improper priors, which cannot be sampled, the values of unconstrained zeros."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and not msg["is_observed"] and is_improper(msg["fn"]):
            bijection = _bijection(msg)
            msg["value"] = bijection(torch.zeros(bijection.inverse_shape(msg["fn"].shape())))
            msg["done"] = True


def _bijection(site: Any) -> Transform:
    support = site["fn"].support
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"site {site['name']!r} of the model has the support {support}, to which torch's biject_to knows no "
            "bijection; sample parts of it instead: scales and an LKJCholesky factor for a covariance, a normal vector "
            "for a direction"
        ) from error


class _Unvalidated(Messenger):
    """Switches validation off for distributions that were made where it was on: it decides by values."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = _unvalidated(msg["fn"])


def _unvalidated(fn: Any) -> Any:
    """The same distribution, or a copy of it and of what it is made of that validates nothing."""
    parts = {name: part for name, part in vars(fn).items() if isinstance(part, torch.distributions.Distribution)}
    changed = {name: new for name, part in parts.items() if (new := _unvalidated(part)) is not part}
    if vars(fn).get("_validate_args"):
        changed["_validate_args"] = False
    if changed:
        fn = copy.copy(fn)
        vars(fn).update(changed)
    return fn


def is_marked(site: Any) -> bool:
    """True for a discrete latent that is marked for parallel enumeration."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and site["infer"].get("enumerate") == "parallel"
        and getattr(site["fn"], "has_enumerate_support", False)
    )
