# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Inference: an automatic guide for any Pyro model, and a check of what a guide has learned."""

from . import supports  # noqa: F401  # registers a bijection
from .autoguide import AutoHollowCNF
from .diagnostics import GuideDiagnostics, diagnose
from .graph import latent_adjacency
from .path_gradient import PathGradientDistribution

__all__ = ["AutoHollowCNF", "GuideDiagnostics", "PathGradientDistribution", "diagnose", "latent_adjacency"]
