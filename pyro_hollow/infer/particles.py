# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of a model before many particles of it are trusted: that they do not mix, and that its data are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch import Independent
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

__all__ = ["MixedParticles", "check_independence", "check_observed", "check_supports", "explained"]

_TOLERANCE = 1e-3  # of the log density of a site, relative and absolute
_ROUNDING = 4  # by how many units in the last place a value is moved to see how the density is conditioned


class MixedParticles(ValueError):
    """The density of a particle depends on the particles next to it."""


def check_independence(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    max_plate_nesting: int,
    remedy: str = "vectorize=False",
) -> None:
    """
    Compares the log density of each site of a model for one particle alone with that of the same particle next to
    another. A model that mixes particles, by a sum over all dimensions or a dimension too few, say, runs without error
    under a plate of particles, but its density is wrong.

    Costs two runs of the model, with one particle and with two. It can be called within other handlers and plates, and
    leaves Pyro's random state as it is. Nothing is said about sites whose density is not finite, nor of models that
    are themselves random (subsampling, dropout), nor of differences that rounding explains. Enumerated sites without a
    value are set to the first one of their support.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param values: of latent sites, two particles of each in the first dimension, as under a plate of particles.
    :param int max_plate_nesting: the number of dimensions of the model's own plates.
    :param str remedy: the setting that the message recommends.
    :raises MixedParticles: if the densities differ, with the name of the site.
    :raises ValueError: if the model runs with one particle but not with two.
    """
    state = get_rng_state()
    try:
        with torch.no_grad(), poutine.block():
            first = {name: value[:1] for name, value in values.items()}
            alone = _log_densities(model, args, kwargs, first)
            with explained("model", remedy):
                together = _log_densities(model, args, kwargs, values, max_plate_nesting)
            suspects = [name for name in alone if name in together and not _close(together[name], alone[name])]
            if not suspects:
                return
            with pyro.validation_enabled(False):  # the values may leave the support
                moved = _log_densities(model, args, kwargs, {name: _moved(value) for name, value in first.items()})
    finally:
        set_rng_state(state)
    for name in suspects:
        difference = abs(together[name] - alone[name])
        if abs(moved.get(name, math.nan) - alone[name]) < 0.1 * difference:
            raise MixedParticles(
                f"model must treat samples independently, but the log density of site {name!r} is "
                f"{together[name]:.6g} for one next to another, and {alone[name]:.6g} for the same alone; reduce "
                f"single dimensions, as sum(-1) does, write products with data as (w * X).sum(-1), or use {remedy}"
            )


@contextmanager
def explained(owner: str, remedy: str) -> Iterator[None]:
    """Chains an error of a model or guide that fails in a further plate to a ValueError that names a remedy."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]  # Pyro appends a table of shapes
        raise ValueError(
            f"{owner} runs with one sample, but not with two in a further plate ({reason}); use {remedy}"
        ) from error


def _close(together: float, alone: float) -> bool:
    """True for densities that are equal up to rounding, and those that cannot be compared."""
    finite = math.isfinite(together) and math.isfinite(alone)
    return not finite or math.isclose(together, alone, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def _moved(value: Tensor) -> Tensor:
    return value * (1 - _ROUNDING * torch.finfo(value.dtype).eps) if value.is_floating_point() else value


def _log_densities(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    values: Mapping[str, Tensor],
    max_plate_nesting: int | None = None,
) -> dict[str, float]:
    """The log densities of all sites for the first particle: alone, or next to others under a plate of them."""
    size = 1
    if max_plate_nesting is not None:
        size = len(next(iter(values.values()), torch.zeros(2)))
        model = _Particles(size, -1 - max_plate_nesting)(model)
    trace = poutine.trace(_Given(values)(model)).get_trace(*args, **kwargs)
    sites = prune_subsample_sites(trace).nodes.items()
    densities = {name: _log_prob(site) for name, site in sites if site["type"] == "sample"}
    return {name: density.reshape(size, -1)[0].double().sum().item() for name, density in densities.items()}


def _log_prob(site: Any) -> Tensor:
    """The masked log density of a site, without a scale."""
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, mask=site["mask"])


class _Particles(Messenger):
    """A plate of particles. Unlike Pyro's it can be entered within another one of the same dimension."""

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.frame = CondIndepStackFrame("particles", dim, size, 0)

    def _pyro_sample(self, msg: Any) -> None:
        msg["cond_indep_stack"] = (self.frame, *msg["cond_indep_stack"])
        BroadcastMessenger._pyro_sample(msg)


class _Given(Messenger):
    """Gives sites their values, in the shape of each, and the others the first value of a finite support."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["done"] or msg["is_observed"]:
            return
        fn, value = msg["fn"], self.values.get(msg["name"])
        if value is not None:
            shape = fn.shape()
            msg["value"] = value.reshape(shape) if value.numel() == shape.numel() else value
            msg["done"] = True
        elif msg["infer"].get("enumerate") == "parallel" and getattr(fn, "has_enumerate_support", False):
            msg["value"] = fn.enumerate_support(expand=True)[0]
            msg["done"] = True


def check_observed(trace: poutine.Trace) -> None:
    """
    Refuses observed values that are infinite or NaN. Those of masked elements, and any that a distribution gives a
    finite log density, are left alone.

    :param trace: a trace of the model with its data; densities need not have been computed.
    :raises ValueError: if there are such values, with the name of the site and the index of the first one.
    :raises TypeError: for values of NumPy, with which no distribution works.
    """
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or site["infer"].get("_deterministic"):
            continue
        value = site["value"]
        if type(value).__module__ == "numpy":
            raise TypeError(
                f"observed value of site {name!r} must be a tensor, but is a {type(value).__name__} of NumPy: pass "
                "torch.as_tensor(...)"
            )
        if not isinstance(value, Tensor) or bool(value.isfinite().all()):
            continue
        wrong = ~value.isfinite() & _lacks_density(site)
        if wrong.any():
            index = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"observed value of site {name!r} is {value[index].item()} at index {index} ({int(wrong.sum())} of "
                f"{value.numel()} elements are not finite); remove these elements, or set them to any finite value "
                "and mask them (poutine.mask, or obs_mask of pyro.sample)"
            )


def check_supports(traces: Iterable[poutine.Trace]) -> None:
    """
    Refuses observed values outside of the support of their distribution, at sites that validate their values. Some
    log densities are finite there, such as that of an exponential distribution at negative values.

    :param traces: of the model at different latents, on which supports may depend; read as far as needed.
    :raises ValueError: for values that are outside in all of the traces, with the name of the site.
    """
    found: dict[str, str] | None = None
    for trace in traces:
        outside = {name: text for name, site in trace.nodes.items() if (text := _outside(site))}
        found = outside if found is None else {name: text for name, text in found.items() if name in outside}
        if not found:
            return
    for text in (found or {}).values():
        raise ValueError(f"{text}; correct the data, choose another distribution, or mask these elements")


def _outside(site: Any) -> str:
    """Tells of observed elements outside of the support that are not masked; empty if there are none."""
    fn, value = site.get("fn"), site.get("value")
    observed = site["type"] == "sample" and site["is_observed"] and not site["infer"].get("_deterministic")
    if not observed or not isinstance(value, Tensor) or not value.numel() or not _validates(fn):
        return ""  # a factor has an empty value
    try:
        wrong = ~fn.support.check(value)
    except NotImplementedError:
        return ""
    inside = False  # of an event, where a mask has other dimensions than the check
    *layers, base = _layers(fn)
    for layer in layers:
        inside |= isinstance(layer, Independent)
        if isinstance(layer, MaskedDistribution):
            if inside:
                return ""
            wrong = scale_and_mask(wrong.to(torch.uint8), mask=layer._mask).bool()
    wrong = scale_and_mask(wrong.to(torch.uint8), mask=site["mask"]).bool()
    if not bool(wrong.any()):
        return ""
    index = tuple(wrong.nonzero()[0].tolist())
    example = f"{value[index].tolist()} at index {index}" if value.shape[: wrong.dim()] == wrong.shape else "not inside"
    return (
        f"observed value of site {site['name']!r} is {example}, outside of the support {site['fn'].support} of "
        f"{type(base).__name__} ({int(wrong.sum())} of {wrong.numel()} elements are)"
    )


def _validates(fn: Any) -> bool:
    """True if a distribution validates values. Its parts may do so where it does not, as those of a multinomial one."""
    return bool(getattr(_layers(fn)[-1], "_validate_args", False))


def _layers(fn: Any) -> list[Any]:
    """A distribution, and those that it wraps one in the other, which may be expanded, masked or independent."""
    layers = [fn]
    while isinstance(layers[-1], (Independent, ExpandedDistribution, MaskedDistribution)):
        layers.append(layers[-1].base_dist)
    return layers


def _lacks_density(site: Any) -> Tensor:
    """True where no finite log density belongs to an element of the site's value, in a shape that broadcasts."""
    try:
        with torch.no_grad():
            finite = _log_prob(site).isfinite()
    except ValueError:  # of a distribution that validates its arguments, before the mask
        return torch.tensor(True)
    event_dim = site["fn"].event_dim
    batch_dim = site["value"].dim() - event_dim
    while finite.dim() > batch_dim:  # those of particles
        finite = finite.all(0)
    return ~finite.reshape(*finite.shape, *(1,) * event_dim)
