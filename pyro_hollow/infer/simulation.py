# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Joint draws of latents and data from a Pyro model, whose prior and simulator it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_factor
from torch import Tensor
from torch.distributions import biject_to, constraints

from .particles import check_independence
from .plates import subsampled
from .predictions import PARTICLES

__all__ = ["Simulations", "Site", "Simulator", "drop_rows"]

_BATCH = 1000  # runs of the model at once
_TRIALS = 10  # of a first run
_SHIFTS = 3  # runs in which data are shifted along a plate
_FAILURES = (ArithmeticError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Site:
    """
    A latent site.

    :ivar str name: its name.
    :ivar shape: the shape of its value.
    :ivar support: its support.
    """

    name: str
    shape: torch.Size
    support: constraints.Constraint

    @property
    def unconstrained_shape(self) -> torch.Size:
        """The shape of the value in the unconstrained space."""
        return torch.Size(biject_to(self.support).inverse_shape(self.shape))

    @property
    def is_bounded(self) -> bool:
        """True for elements between two bounds."""
        own: Any = self.support
        while isinstance(own, constraints.independent):
            own = own.base_constraint
        return isinstance(own, (constraints.interval, constraints.half_open_interval))

    def check(self, value: Tensor) -> None:
        """Refuses discrete sites, and supports to which there is no bijection."""
        if self.support.is_discrete or not value.is_floating_point():
            raise ValueError(
                f"site {self.name!r} is discrete, and has no density; leave it out of sites, which integrates over it"
            )
        try:
            biject_to(self.support)
        except NotImplementedError as error:
            raise ValueError(
                f"site {self.name!r} has the support {self.support}, to which torch knows no bijection"
            ) from error


@dataclass(frozen=True)
class Simulations:
    """
    Joint draws of latents and data.

    :ivar theta: the latents by site, with draws in the first dimension.
    :ivar x: the data by site, likewise.
    :ivar int failed: how many runs of the model raised an error.
    :ivar str error: the last one.
    """

    theta: dict[str, Tensor]
    x: dict[str, Tensor]
    failed: int = 0
    error: str = ""


class Simulator:
    """
    A Pyro model as a sampler of latents and data: its observed sites are sampled, too.

    :param model: the model.
    :param args: positional arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param observed: the names of the sites that are data, deterministic ones among them. None for the sites that are
        observed with these arguments.
    :param sites: the names of the latents of interest; the others are integrated over. None for all.
    :ivar latents: the latents of interest.
    :ivar data: the shapes of the data by site.
    :ivar bool vectorized: many runs of the model are made at once, in a plate.
    :ivar str reason: the reason why not.
    :ivar exchangeable: the dimension, from the left, of the data of the only site along which they are independent and
        identically distributed: that of a plate whose elements have one distribution. None if there is none.
    :raises ValueError: for names that the model does not have, no data or latents, discrete latents, subsampled plates
        and factors.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observed: Sequence[str] | None,
        sites: Sequence[str] | None,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        conditioned = self._first_run()
        given = [name for name, site in conditioned.items() if site["is_observed"] and not _is_deterministic(site)]
        factors = [name for name in given if site_is_factor(conditioned[name])]
        if factors:
            raise ValueError(
                f"model must be a prior and a simulator, but has factors, {factors}, which cannot be simulated"
            )
        names = _as_list("observed", observed, given)
        _check_known("observed", names, conditioned)
        if not names:
            raise ValueError("observed must name the sites that are data, but the model has no observed sites")
        if others := [name for name in given if name not in names]:
            raise ValueError(f"observed must name all sites that are observed, but lacks {others}")
        free = [n for n, site in conditioned.items() if n not in names and not site["is_observed"]]
        latents = _as_list("sites", sites, free)
        _check_known("sites", latents, conditioned)
        if wrong := [name for name in latents if name not in free]:
            raise ValueError(f"sites must name latents, but {wrong} are data or deterministic")
        if not latents:
            raise ValueError("sites must name at least one latent, but the model has none")
        for frame in subsampled(frame for site in conditioned.values() for frame in site["cond_indep_stack"]):
            raise ValueError(f"plate {frame.name!r} is subsampled; simulate with all of it")
        self.nesting = max(
            (-f.dim for site in conditioned.values() for f in site["cond_indep_stack"] if f.vectorized), default=0
        )
        kept = {name: conditioned[name] for name in free if name in latents}
        self.latents = [Site(name, site["value"].shape, site["fn"].support) for name, site in kept.items()]
        for latent in self.latents:
            latent.check(conditioned[latent.name]["value"])
        self.data = {name: torch.as_tensor(conditioned[name]["value"]).shape for name in names}
        self.reason = self._why_one_by_one()
        self.vectorized = not self.reason
        self.exchangeable = self._exchangeable_dim()

    def _first_run(self) -> dict[str, Any]:
        """The sample sites of a run that does not fail."""
        with torch.no_grad():
            for trial in range(_TRIALS):
                with suppress(*(_FAILURES if trial < _TRIALS - 1 else ())):
                    return _nodes(poutine.block(poutine.trace(self.model).get_trace)(*self.args, **self.kwargs))
        raise AssertionError

    def draw(self, count: int, bar: Any = None) -> Simulations:
        """
        Runs the model. Runs that raise an error are left out and counted.

        :param int count: the number of runs.
        :param bar: a progress bar.
        :raises ValueError: if all runs fail, and for a support that moves.
        """
        found: list[dict[str, Tensor]] = []
        failed, error = 0, ""
        sizes = [min(_BATCH, count - start) for start in range(0, count, _BATCH)] if self.vectorized else [1] * count
        with torch.no_grad(), pyro.validation_enabled(False):
            for size in sizes:
                for part, problem in self._attempt(size):
                    found += [part] if part else []
                    failed, error = failed + bool(problem), problem or error
                if bar is not None:
                    bar.update(size)
        if not found:
            raise ValueError(f"model must run, but all {count} simulations failed, the last with {error}")
        joined = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        theta = {latent.name: joined[latent.name] for latent in self.latents}
        return Simulations(theta, {name: joined[name] for name in self.data}, failed, error)

    def _attempt(self, size: int) -> Iterator[tuple[dict[str, Tensor], str]]:
        """The values of runs, or the error of one."""
        try:
            yield self._run(size), ""
        except MovingSupport:
            raise
        except _FAILURES as error:
            if size == 1:
                yield {}, f"{type(error).__name__}: {error}".splitlines()[0]
            else:  # to leave out those that fail
                for _ in range(size):
                    yield from self._attempt(1)

    def _run(self, size: int) -> dict[str, Tensor]:
        model: Callable[..., Any] = _Unobserved()(self.model)
        if self.vectorized or size > 1:
            model = pyro.plate(PARTICLES, size, dim=-1 - self.nesting)(model)
        nodes = _nodes(poutine.block(poutine.trace(model).get_trace)(*self.args, **self.kwargs))
        values = {}
        for name, shape in self._shapes().items():
            value = torch.as_tensor(nodes[name]["value"])
            if value.numel() != size * shape.numel():
                raise _Unshaped(f"site {name!r} has shape {tuple(shape)} in one run and {tuple(value.shape)} in {size}")
            values[name] = value.reshape(size, *shape)
        for latent in self.latents:
            self._check_support(latent, nodes[latent.name])
        return values

    def _shapes(self) -> dict[str, torch.Size]:
        return {latent.name: latent.shape for latent in self.latents} | self.data

    @staticmethod
    def _check_support(latent: Site, site: Any) -> None:
        value = site["value"]
        known, own = (biject_to(support).inv(value) for support in (latent.support, site["fn"].support))
        if known.shape != own.shape or not torch.allclose(known, own, 1e-3, 1e-3, equal_nan=True):
            raise MovingSupport(
                f"site {latent.name!r} has a support that depends on other sites, {site['fn'].support}; sample it in "
                "fixed bounds and scale it"
            )

    def _exchangeable_dim(self) -> int | None:
        """Compares densities of data with those of data that are shifted along a plate, in a few runs."""
        (name, shape), *more = self.data.items()
        if more:
            return None
        found: set[int] | None = None
        with torch.no_grad(), pyro.validation_enabled(False):
            for _ in range(_SHIFTS):
                with suppress(*_FAILURES):
                    trace = poutine.block(poutine.trace(_Unobserved()(self.model)).get_trace)(*self.args, **self.kwargs)
                    dims = set(_shiftable(_nodes(trace), name, [latent.name for latent in self.latents]))
                    found = dims if found is None else found & dims
        return min(found) if found else None

    def _why_one_by_one(self) -> str:
        """Tries two runs in a plate, and compares one of them with the same run alone."""
        self.vectorized = True
        plated = pyro.plate(PARTICLES, 2, dim=-1 - self.nesting)(_Unobserved()(self.model))
        try:
            with torch.no_grad(), pyro.validation_enabled(False):
                self._run(2)
                nodes = _nodes(poutine.block(poutine.trace(plated).get_trace)(*self.args, **self.kwargs))
                drawn = {n: s["value"] for n, s in nodes.items() if not _is_deterministic(s)}
                check_independence(_Unobserved()(self.model), self.args, self.kwargs, drawn, self.nesting)
                self._compare(nodes, drawn)
        except MovingSupport:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return ""

    def _compare(self, nodes: dict[str, Any], drawn: dict[str, Tensor]) -> None:
        """Compares the deterministic sites of the first of two runs with those of the same run alone."""
        given = poutine.condition(_Unobserved()(self.model), data={name: value[:1] for name, value in drawn.items()})
        alone = pyro.plate(PARTICLES, 1, dim=-1 - self.nesting)(given)
        first = _nodes(poutine.block(poutine.trace(alone).get_trace)(*self.args, **self.kwargs))
        for name in (name for name in self.data if _is_deterministic(nodes[name])):
            pair = nodes[name]["value"].reshape(2, -1)[0], first[name]["value"].reshape(-1)
            if not torch.allclose(*pair, 1e-3, 1e-4, equal_nan=True):
                raise _Unshaped(f"site {name!r} depends on the runs next to it")


def _shiftable(nodes: dict[str, Any], name: str, latents: list[str]) -> Iterator[int]:
    """The dimensions of the data along which densities shift as the data do."""
    site = nodes[name]
    if _is_deterministic(site):
        return
    value, fn = site["value"], site["fn"]
    local = {frame.name for latent in latents for frame in nodes[latent]["cond_indep_stack"]}
    density = fn.log_prob(value)
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized or frame.size < 2 or frame.name in local:
            continue
        dim = value.dim() - fn.event_dim + frame.dim
        if torch.allclose(fn.log_prob(value.roll(1, dim)), density.roll(1, frame.dim), 1e-4, 1e-4):
            yield dim


class MovingSupport(ValueError):
    """A latent's support differs from run to run."""


class _Unshaped(ValueError):
    """A model that mixes the runs of a plate."""


class _Unobserved(Messenger):
    """Samples observed sites."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not _is_deterministic(msg):
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _is_deterministic(site: Any) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _nodes(trace: poutine.Trace) -> dict[str, Any]:
    """The sample sites of a trace, without subsamples."""
    nodes = prune_subsample_sites(trace).nodes.items()
    return {name: site for name, site in nodes if site["type"] == "sample"}


def _as_list(name: str, names: Sequence[str] | None, default: list[str]) -> list[str]:
    if isinstance(names, str):
        raise TypeError(f"{name} must be a list of names, but got the text {names!r}: write [{names!r}]")
    return default if names is None else list(names)


def _check_known(name: str, names: list[str], known: dict[str, Any]) -> None:
    if missing := [each for each in names if each not in known]:
        raise ValueError(f"{name} must name sites of the model, which has {list(known)}, but got {missing}")


def drop_rows(theta: dict[str, Tensor], x: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """
    Leaves out draws with a value that is NaN or infinite.

    :param theta: the latents by site, with draws in the first dimension.
    :param x: the data by site, likewise.
    :returns: latents, data, and how many were left out.
    """
    groups = theta, x
    finite = torch.stack([v.reshape(len(v), -1).isfinite().all(-1) for group in groups for v in group.values()]).all(0)
    kept = [{name: value[finite] for name, value in group.items()} for group in groups]
    return kept[0], kept[1], int((~finite).sum())
