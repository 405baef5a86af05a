# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Hollow-CNFs for Pyro: continuous normalizing flows with an exact log-determinant at almost no cost.

Which part for which need?

- a posterior, in one call: :func:`fit`;
- a posterior for all data that a model can simulate, without its likelihood: :func:`fit_amortised`;
- a guide for a model, in a loop of your own: :class:`AutoHollowCNF`, and :func:`diagnose` to check any guide;
- the log density of a model as a fast function, for samplers: :class:`LogDensity`;
- a posterior flow or a density: :func:`hollow_cnf`, or :func:`conditional_hollow_cnf` where an encoder or other context
  decides; :class:`HollowCNF` and :class:`ConditionalHollowCNF` around a network of your own making;
- such a flow in the units of the data (and of the context) that it is fitted to: :func:`standardized`;
- such a flow or another density fitted to data: :class:`MaximumLikelihood` or, without solving anything,
  :class:`FlowMatching`, and the loop :func:`pyro_hollow.train.train`;
- behind such a flow, directions in which the latents of each data point vary together:
  :func:`conditional_low_rank_linear`;
- gradients with less noise near the optimum, in a guide of your own: :class:`PathGradientDistribution`;
- a vector field with exact divergence and dimension-wise derivatives of any order: :class:`HollowNN`;
- a stochastic differential equation learned from samples at several times: :class:`DiagonalSDE` and
  :class:`FokkerPlanckMatching`;
- the solver's method and tolerances: :class:`Solver`;
- the free-form flow to compare with: :func:`free_form_cnf`.
"""

from pyro_hollow.infer import (
    AmortisedPosterior,
    AutoHollowCNF,
    Fit,
    LogDensity,
    PathGradientDistribution,
    diagnose,
    fit,
    fit_amortised,
)
from pyro_hollow.nn import ConditionalHollowNN, HollowNN
from pyro_hollow.ode import Solver, SolverError
from pyro_hollow.sde import DiagonalSDE, FokkerPlanckMatching
from pyro_hollow.train import FlowMatching, MaximumLikelihood
from pyro_hollow.transforms import (
    ConditionalFreeFormCNF,
    ConditionalHollowCNF,
    FreeFormCNF,
    HollowCNF,
    conditional_free_form_cnf,
    conditional_hollow_cnf,
    conditional_low_rank_linear,
    free_form_cnf,
    hollow_cnf,
    standardized,
)

__version__ = "0.1.0"

__all__ = [
    "AmortisedPosterior",
    "AutoHollowCNF",
    "ConditionalFreeFormCNF",
    "ConditionalHollowCNF",
    "ConditionalHollowNN",
    "DiagonalSDE",
    "Fit",
    "FlowMatching",
    "FokkerPlanckMatching",
    "FreeFormCNF",
    "HollowCNF",
    "HollowNN",
    "LogDensity",
    "MaximumLikelihood",
    "PathGradientDistribution",
    "Solver",
    "SolverError",
    "conditional_free_form_cnf",
    "conditional_hollow_cnf",
    "conditional_low_rank_linear",
    "diagnose",
    "fit",
    "fit_amortised",
    "free_form_cnf",
    "hollow_cnf",
    "standardized",
]
