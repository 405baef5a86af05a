# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The plates of a program, and those of them that hold a part of the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame

__all__ = ["plates", "subsampled"]


def plates(trace: poutine.Trace) -> list[CondIndepStackFrame]:
    """Plates of all sites, one after the other."""
    return [frame for site in trace.nodes.values() for frame in site.get("cond_indep_stack", ())]


def subsampled(frames: Iterable[CondIndepStackFrame]) -> Iterator[CondIndepStackFrame]:
    """Plates whose subsample is smaller than the plate."""
    return (frame for frame in frames if frame.full_size is not None and frame.size < frame.full_size)
