# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Compares a model with the guide of a saved fit, and restores the model's parameters."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from .model_density import ImproperAtZero, is_marked

__all__ = ["check_latents", "latents", "parameters", "restore_parameters", "traced", "write"]


def latents(guide: AutoGuide) -> dict[str, Any]:
    """
    Returns the latent sites of a guide's model, by name.

    :param guide: an automatic guide that is set up.
    """
    trace: Any = guide.prototype_trace
    return dict(trace.iter_stochastic_nodes())


def traced(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], of_guide: dict[str, Any]
) -> poutine.Trace:
    """
    Traces a model at the latents at which its guide was set up; others are zero in the unconstrained space.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param of_guide: the latents of the guide, from :func:`latents`.
    """

    def start(site: Any) -> Tensor:
        known = of_guide.get(site["name"], site)["value"]
        return known if known is not None and known.shape == site["fn"].shape() else init_to_feasible(site)

    recorder = poutine.trace(ImproperAtZero()(model))
    started = InitMessenger(start)(poutine.block(recorder, hide_fn=is_marked))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False), poutine.block():
        started(*args, **kwargs)
    return prune_subsample_sites(recorder.trace)


def parameters(trace: poutine.Trace) -> dict[str, Tensor]:
    """
    Returns the unconstrained parameters of a model, by name.

    :param trace: a trace of the model.
    """
    return {name: site["value"].unconstrained() for name, site in trace.nodes.items() if site["type"] == "param"}


def check_latents(trace: poutine.Trace, of_guide: dict[str, Any]) -> None:
    """
    Refuses a model whose latents are not those of a guide.

    :param trace: a trace of the model, from :func:`traced`.
    :param of_guide: the latents of the guide, from :func:`latents`.
    :raises ValueError: with each difference of names, shapes and supports.
    """
    own = {name: site for name, site in trace.iter_stochastic_nodes() if not is_marked(site)}
    faults = [f"the guide has no site {name!r}" for name in own if name not in of_guide]
    faults += [f"the model has no site {name!r}" for name in of_guide if name not in own]
    for name in (name for name in own if name in of_guide):
        value, shape = own[name]["value"], tuple(of_guide[name]["value"].shape)
        if tuple(value.shape) != shape:
            faults.append(f"site {name!r} has shape {tuple(value.shape)} in the model and {shape} in the guide")
            continue
        supports = own[name]["fn"].support, of_guide[name]["fn"].support
        here, there = (biject_to(support).inv(value) for support in supports)
        if here.shape != there.shape or not torch.allclose(here, there.to(here), 1e-3, 1e-3):
            faults.append(f"site {name!r} has support {supports[0]} in the model and {supports[1]} in the guide")
    if faults:
        raise ValueError(f"model must have the latents of the fit, but {'; '.join(faults)}")


@torch.no_grad()
def restore_parameters(trace: poutine.Trace, saved: dict[str, Tensor]) -> None:
    """
    Copies saved values into the parameters of a model, in Pyro's store or in modules.

    :param trace: a trace of the model, which has put its parameters into the store.
    :param saved: the unconstrained values, by name.
    :raises ValueError: if names or shapes differ.
    """
    own = parameters(trace)
    here, there = ({name: tuple(value.shape) for name, value in each.items()} for each in (own, saved))
    if here != there:
        raise ValueError(f"model must have the parameters of the fit, {there}, but has {here}")
    for name, value in saved.items():
        own[name].copy_(value)


class _Pickler(pickle.Pickler):
    """Leaves out the weak references that constrained parameters hold to unconstrained ones; Pyro makes them anew."""

    def reducer_override(self, obj: Any) -> Any:
        return (type(None), ()) if isinstance(obj, weakref.ReferenceType) else NotImplemented


def write(content: Any, path: str | Path) -> None:
    """
    Writes a pickle as ``torch.save`` does, of objects that may hold constrained parameters of Pyro's.

    :param content: the objects.
    :param path: the path of the file.
    """
    torch.save(content, path, pickle_module=SimpleNamespace(__name__="pickle", Pickler=_Pickler))
