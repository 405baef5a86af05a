# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Inference: an automatic guide for any Pyro model, and a check of what a guide has learned."""

from . import supports  # noqa: F401  # registers a bijection
from .autoguide import AutoHollowCNF
from .diagnostics import GuideDiagnostics, diagnose
from .fitting import Fit, fit
from .graph import latent_adjacency
from .log_density import LogDensity
from .path_gradient import PathGradientDistribution

__all__ = [
    "AutoHollowCNF",
    "Fit",
    "GuideDiagnostics",
    "LogDensity",
    "PathGradientDistribution",
    "diagnose",
    "fit",
    "latent_adjacency",
]
