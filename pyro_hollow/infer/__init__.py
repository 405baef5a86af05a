# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Inference: automatic guides for Pyro models, amortised posteriors, and checks of what they have learned."""

from . import supports  # noqa: F401  # registers a bijection
from .amortised import AmortisedGuide, AmortisedPosterior, fit_amortised
from .autoguide import AutoHollowCNF
from .calibration import Calibration
from .diagnostics import GuideDiagnostics, diagnose
from .fitting import Fit, fit
from .gaussian_mixture import GaussianMixture
from .graph import latent_adjacency
from .log_density import LogDensity
from .modes import Mode
from .path_gradient import PathGradientDistribution
from .posterior_given_data import PosteriorGivenData

__all__ = [
    "AmortisedGuide",
    "AmortisedPosterior",
    "AutoHollowCNF",
    "Calibration",
    "Fit",
    "GaussianMixture",
    "GuideDiagnostics",
    "LogDensity",
    "Mode",
    "PathGradientDistribution",
    "PosteriorGivenData",
    "diagnose",
    "fit",
    "fit_amortised",
    "latent_adjacency",
]
