# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Log densities of the particles of a trace, with enumerated sites marginalised."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

__all__ = ["enumerated", "log_densities", "log_likelihood", "particle_sums", "row_sums"]


def enumerated(trace: poutine.Trace) -> list[str]:
    """Returns the names of the sites that ``poutine.enum`` has enumerated."""
    return [name for name, site in trace.nodes.items() if site.get("infer", {}).get("_enumerate_dim") is not None]


def log_densities(trace: poutine.Trace, size: int, plate: str | None, owner: str) -> Tensor:
    r"""
    Sums the log densities of all sites for each particle, as :func:`particle_sums` does, and checks them.

    :param trace: a trace with log densities, without the sites of plates.
    :param int size: the number of particles.
    :param str plate: the name of the outermost plate, that of the particles. None if there is none, and size is 1.
    :param str owner: "model", whose density may be 0, or "guide".
    :return: the densities with shape ``(size,)`` in float64 on the CPU.
    :raises ValueError: for densities that are not finite, and enumerated sites with several scales.
    """
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            _check(name, site["log_prob"], size, _dim(site, plate), owner)
    return particle_sums(trace, size, plate, dtype=torch.float64, device="cpu")


def particle_sums(trace: poutine.Trace, size: int, plate: str | None, **place: Any) -> Tensor:
    r"""
    Sums the log densities of all sites for each particle. Enumerated sites :math:`\mathbf{k}` are marginalised as
    :class:`~pyro.infer.TraceEnum_ELBO` does, by Pyro's tensor contraction,

        :math:`\log p(\mathbf{x}, \mathbf{z}) = \log \sum_{\mathbf{k}} p(\mathbf{x}, \mathbf{k}, \mathbf{z}).`

    :param trace: a trace with log densities, without the sites of plates.
    :param int size: the number of particles.
    :param str plate: the name of the outermost plate, that of the particles. None if there is none, and size is 1.
    :param place: type and device of the sums; those of the densities by default.
    :return: the densities with shape ``(size,)``.
    :raises ValueError: for enumerated sites with several scales.
    """
    total = torch.zeros(size, **place)
    names = enumerated(trace)
    if names:
        trace.pack_tensors()
    dims = {trace.nodes[name]["infer"]["_enumerate_symbol"] for name in names}
    summed = []
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
        if dims.isdisjoint(site["packed"]["log_prob"]._pyro_dims if names else ()):
            log_prob, dim = site["log_prob"].to(**place), _dim(site, plate)
            total = total + row_sums(log_prob if dim is None else log_prob.movedim(dim, 0), size)
        else:
            summed.append(site)
    if not summed:
        return total
    scale, *others = {float(site["scale"]) for site in summed}
    if others:
        raise ValueError(
            "enumerated sites and all that depend on them must have one scale (poutine.scale), but have "
            f"{[scale, *others]}"
        )
    for terms in _marginalise(trace, summed, dims).values():
        for term in terms:
            rows = packed.unpack(term, trace.symbol_to_dim)
            total = total + scale * row_sums(rows.to(**place), size)
    return total


def row_sums(terms: Tensor, size: int) -> Tensor:
    """
    Sums over all dimensions but the first, of which a row of one element needs none.

    :param Tensor terms: with ``size`` rows.
    :param int size: the number of rows.
    :return: the sums with shape ``(size,)``.
    """
    return terms.reshape(size) if terms.numel() == size else terms.reshape(size, -1).sum(-1)


def _dim(site: Any, plate: str | None) -> int | None:
    return next((frame.dim for frame in site["cond_indep_stack"] if frame.name == plate), None)


def _of_particles(log_prob: Tensor, size: int, dim: int | None) -> Tensor:
    """Elements in rows, one for each particle."""
    rows = log_prob if dim is None else log_prob.movedim(dim, 0)
    return rows.reshape(size, -1)


def _check(name: str, log_prob: Tensor, size: int, dim: int | None, owner: str) -> None:
    # A model may well be impossible where the guide samples. Nothing else makes sense.
    bad = log_prob.isnan() | log_prob.isposinf() if owner == "model" else ~log_prob.isfinite()
    if bad.any():
        count = int(_of_particles(bad, size, dim).any(-1).sum())
        raise ValueError(
            f"log_prob of site {name!r} of the {owner} is {log_prob[bad][0].item()} for {count} of {size} samples; "
            "look at the distribution there, or use float64"
        )


def _marginalise(trace: poutine.Trace, sites: Iterable[Any], dims: set[str]) -> Any:
    """The log densities without the enumerated dimensions, in lists by the symbols of their plates."""
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in sites:
        log_prob = site["packed"]["unscaled_log_prob"]
        if site["infer"].get("_enumerate_dim") is None:
            # An enumerated site is not masked, or its probabilities would no longer sum to one.
            log_prob = packed.scale_and_mask(log_prob, mask=site["packed"]["mask"])
        factors.setdefault(_ordinal(trace, site), []).append(log_prob)
    return contract_tensor_tree(factors, dims)


def _ordinal(trace: poutine.Trace, site: Any) -> frozenset[str]:
    return frozenset(trace.plate_to_symbol[frame.name] for frame in site["cond_indep_stack"] if frame.vectorized)


def log_likelihood(trace: poutine.Trace, name: str, size: int) -> Tensor | None:
    """
    Returns the log density of each element of an observed site, masked but not scaled, given the particle. Enumerated
    sites are marginalised.

    :param trace: a trace with log densities, packed if it has enumerated sites.
    :param str name: the observed site.
    :param int size: the number of particles.
    :return: the densities with shape ``(size, n)``; None if they are not independent of each other, as those of a
        hidden Markov model are not.
    """
    site = trace.nodes[name]
    symbols = {other: trace.nodes[other]["infer"]["_enumerate_symbol"] for other in enumerated(trace)}
    needed = set(symbols.values()).intersection(site["packed"]["log_prob"]._pyro_dims if symbols else ())
    if not needed:
        return scale_and_mask(site["unscaled_log_prob"], mask=site["mask"]).reshape(size, -1)
    # All that the site depends on. What depends on these in turn sums to one.
    sites = [site]
    for other in reversed(list(symbols)):
        if symbols[other] in needed:
            sites.append(trace.nodes[other])
            needed |= set(symbols.values()).intersection(sites[-1]["packed"]["unscaled_log_prob"]._pyro_dims)
    ((ordinal, (term,)),) = _marginalise(trace, sites, needed).items()
    if ordinal != _ordinal(trace, site):
        return None
    return packed.unpack(term, trace.symbol_to_dim).reshape(size, -1)
