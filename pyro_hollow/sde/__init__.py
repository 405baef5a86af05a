# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Stochastic differential equations, learned from samples of their marginals.

Marginals do not determine a diffusion together with a free drift: :class:`FokkerPlanckMatching` needs it as an input.
They determine a constant one together with the gradient of a potential, out of equilibrium:
:func:`fit_gradient_flow` learns both and tells how far the samples at hand suffice.
"""

from .densities import (
    DensityDerivatives,
    FlowMarginals,
    GaussianMixtureMarginals,
    TimeDensity,
    log_density_derivatives,
)
from .diagonal_sde import BoundSDE, DiagonalSDE
from .fokker_planck import FokkerPlanckMatching, MatchingLoss, fit, fokker_planck_rhs, probability_flow
from .gradient_flow import GradientFlowFit, fit_gradient_flow

__all__ = [
    "BoundSDE",
    "DensityDerivatives",
    "DiagonalSDE",
    "FlowMarginals",
    "FokkerPlanckMatching",
    "GaussianMixtureMarginals",
    "GradientFlowFit",
    "MatchingLoss",
    "TimeDensity",
    "fit",
    "fit_gradient_flow",
    "fokker_planck_rhs",
    "log_density_derivatives",
    "probability_flow",
]
