# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Stochastic differential equations, learned from samples of their marginals."""

from .densities import (
    DensityDerivatives,
    FlowMarginals,
    GaussianMixtureMarginals,
    TimeDensity,
    log_density_derivatives,
)
from .diagonal_sde import BoundSDE, DiagonalSDE
from .fokker_planck import FokkerPlanckMatching, MatchingLoss, fit, fokker_planck_rhs, probability_flow

__all__ = [
    "BoundSDE",
    "DensityDerivatives",
    "DiagonalSDE",
    "FlowMarginals",
    "FokkerPlanckMatching",
    "GaussianMixtureMarginals",
    "MatchingLoss",
    "TimeDensity",
    "fit",
    "fokker_planck_rhs",
    "log_density_derivatives",
    "probability_flow",
]
