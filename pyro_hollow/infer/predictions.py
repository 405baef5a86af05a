# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Quantities of a model that belong to draws of its latents: deterministic sites, log-likelihoods, predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_hollow.infer.log_joint import enumerated, log_likelihood

__all__ = ["PARTICLES", "Predictions"]

PARTICLES = "num_particles_vectorized"  # the plate of samples, by its name in Pyro's ELBOs
_MAX_BYTES = 2**31  # of a group or a deterministic site


class Predictions:
    """
    A model with its data, to be run at draws of its latents.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param trace: a trace of the model that shows the shapes of its sites.
    :param latents: the names of the sites that the draws are of. Others are drawn from the model, or marginalised if
        they are marked for enumeration.
    :param int max_plate_nesting: the number of dimensions of the model's plates.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        trace: poutine.Trace,
        latents: list[str],
        max_plate_nesting: int,
    ) -> None:
        self.model, self.args, self.kwargs, self.max_plate_nesting = model, args, kwargs, max_plate_nesting
        sites = {name: site for name, site in prune_subsample_sites(trace).nodes.items() if site["type"] == "sample"}
        self.latents = {name: sites[name]["value"] for name in latents}
        self._event_dims = {name: sites[name]["fn"].event_dim for name in latents}
        fixed = {name: site for name, site in sites.items() if site["is_observed"]}
        self.deterministic = {n: site["value"] for n, site in fixed.items() if site["infer"].get("_deterministic")}
        self._keep: dict[str, Tensor] = {}
        self.observed: dict[str, Tensor] = {}
        for name, site in fixed.items():
            if name in self.deterministic or site["infer"].get("is_auxiliary"):  # pyro.factor is auxiliary
                continue
            value, fn = torch.as_tensor(site["value"]), site["fn"]
            batch_dim = value.dim() - fn.event_dim
            batch_shape = torch.broadcast_shapes(value.shape[:batch_dim], fn.batch_shape)
            value = value.expand(batch_shape + value.shape[batch_dim:])  # one value may stand for a whole plate
            keep = _mask(site).to(value.device).expand(batch_shape)
            if keep.any() or not keep.numel():
                self._keep[name], self.observed[name] = keep, value if keep.all() else value[keep]

    def groups(
        self,
        draws: Mapping[str, Tensor],
        batch_size: int | None,
        log_likelihood: bool,
        posterior_predictive: bool,
    ) -> dict[str, dict[str, Tensor]]:
        """
        Runs the model at draws.

        :param draws: of all latents, in the first dimension.
        :param int batch_size: how many draws to run at once, under a plate. None for one at a time, without it.
        :param bool log_likelihood: True to add the log densities of the observed elements.
        :param bool posterior_predictive: True to add draws of the observed sites.
        :return: the groups "deterministic", "log_likelihood" and "posterior_predictive", with draws in the first
            dimension, and "observed_data".
        """
        count = len(next(iter(draws.values())))
        step = 1 if batch_size is None else batch_size
        batches = [{name: v[i : i + step] for name, v in draws.items()} for i in range(0, count, step)]
        vectorize = batch_size is not None
        # A density is a float of its site's precision, or of single precision at least.
        size = sum(int(keep.sum()) * max(4, self.observed[name].element_size()) for name, keep in self._keep.items())
        log_likelihood = log_likelihood and _fits("group log_likelihood", count, size)
        size = sum(value.nbytes for value in self.observed.values())
        posterior_predictive = posterior_predictive and _fits("group posterior_predictive", count, size)
        sites = self.deterministic.items()
        self.deterministic = {n: v for n, v in sites if _fits(f"deterministic site {n!r}", count, v.nbytes)}
        groups: dict[str, dict[str, Tensor]] = {"deterministic": {}, "log_likelihood": {}, "posterior_predictive": {}}
        if self.deterministic or log_likelihood and self.observed:
            runs = [self._conditioned(batch, vectorize, log_likelihood) for batch in batches]
            deterministic, densities = (_join([run[i] for run in runs]) for i in range(2))
            if vectorize:
                self._check_first(draws, deterministic)
            groups |= {"deterministic": deterministic, "log_likelihood": densities}
        if posterior_predictive and self.observed:
            try:
                groups["posterior_predictive"] = _join([self._predicted(batch, vectorize) for batch in batches])
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]  # Pyro appends a table of shapes
                warnings.warn(
                    "the group posterior_predictive is left out, as the model cannot draw its observed sites "
                    f"({reason}); posterior_predictive=False silences this",
                    stacklevel=4,
                )
        return groups | {"observed_data": self.observed}

    def _run(
        self, model: Callable[..., Any], draws: Mapping[str, Tensor], vectorize: bool, enumerates: bool
    ) -> poutine.Trace:
        """A trace at given draws, under a plate of them or at the only one without it."""
        nesting = self.max_plate_nesting
        values = {name: value[0].to(self.latents[name]) for name, value in draws.items()}
        if vectorize:
            count = len(next(iter(draws.values())))
            model = pyro.plate(PARTICLES, count, dim=-1 - nesting)(model)
            for name, value in draws.items():
                batch_dim = value.dim() - 1 - self._event_dims[name]
                shape = count, *(1,) * (nesting - batch_dim), *value.shape[1:]
                values[name] = value.reshape(shape).to(self.latents[name])
            nesting += 1
        model = poutine.condition(model, values)
        if enumerates:
            model = poutine.enum(model, first_available_dim=-1 - nesting)
        return prune_subsample_sites(poutine.trace(model).get_trace(*self.args, **self.kwargs))

    def _conditioned(
        self, draws: Mapping[str, Tensor], vectorize: bool, densities: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Deterministic values, and log densities of observed elements."""
        count, trace = len(next(iter(draws.values()))), self._run(self.model, draws, vectorize, True)
        deterministic = {}
        for name, like in self.deterministic.items():
            value = trace.nodes[name]["value"].cpu()
            if value.numel() == count * like.numel():
                deterministic[name] = value.reshape(count, *like.shape)
            elif value.numel() == like.numel():  # the same for all draws
                deterministic[name] = value.reshape(like.shape).expand(count, *like.shape)
        if not densities:
            return deterministic, {}
        trace.compute_log_prob()
        if enumerated(trace):
            trace.pack_tensors()
        result = {}
        for name, keep in self._keep.items():
            density = log_likelihood(trace, name, count)
            if density is not None:
                density = density.reshape(count, *keep.shape)
                result[name] = (density if keep.all() else density[:, keep]).cpu()
        return deterministic, result

    def _predicted(self, draws: Mapping[str, Tensor], vectorize: bool) -> dict[str, Tensor]:
        """Draws of observed sites, with all sites that are no latents of the draws sampled from the model."""
        count = len(next(iter(draws.values())))
        trace, result = self._run(_Unobserved(self.observed)(self.model), draws, vectorize, False), {}
        for name, keep in self._keep.items():
            value = trace.nodes[name]["value"]
            event = value.shape[value.dim() - trace.nodes[name]["fn"].event_dim :]
            value = value.reshape(count, *keep.shape, *event)
            result[name] = (value if keep.all() else value[:, keep]).cpu()
        return result

    def _check_first(self, draws: Mapping[str, Tensor], deterministic: dict[str, Tensor]) -> None:
        """Leaves out those that mix draws, which no density shows."""
        first, _ = self._conditioned({name: value[:1] for name, value in draws.items()}, False, False)
        for name in self.deterministic:
            value, alone = deterministic.get(name), first.get(name)
            if alone is None:  # depends on an enumerated site
                deterministic.pop(name, None)
            elif value is None or not torch.allclose(value[:1].double(), alone.double(), 1e-3, 1e-3, equal_nan=True):
                deterministic.pop(name, None)
                warnings.warn(
                    f"deterministic site {name!r} is left out, as its value for a draw alone differs from that next to "
                    "others; reduce and index single dimensions, as sum(-1) and [..., 0] do, or use vectorize=False",
                    stacklevel=5,
                )


class _Unobserved(Messenger):
    """Samples sites that are observed. ``poutine.uncondition`` would sample deterministic sites, too."""

    def __init__(self, names: Container[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.names:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _fits(what: str, count: int, size: int) -> bool:
    if count * size <= _MAX_BYTES:
        return True
    remedy = f", or {what.split()[1]}=False to silence this" if what.startswith("group") else ""
    warnings.warn(
        f"the {what} is left out, as {count} draws of it take {count * size / 1e9:.1f} GB; use a smaller num_draws "
        f"for it{remedy}",
        stacklevel=5,
    )
    return False


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if all(name in part for part in parts)}


def _mask(site: Any) -> Tensor:
    """True for elements of the batch that count."""
    mask = torch.as_tensor(True if site["mask"] is None else site["mask"])
    fn = site["fn"]
    while isinstance(fn, dist.MaskedDistribution):
        mask = mask & torch.as_tensor(fn._mask, device=mask.device)
        fn = fn.base_dist
    return mask
