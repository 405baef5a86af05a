# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Hollow-CNFs for Pyro: continuous normalizing flows with an exact log-determinant at almost no cost.

Which part for which need?

- a guide for a model: :class:`AutoHollowCNF`, and :func:`diagnose` to check any guide;
- a posterior flow or a density: :func:`hollow_cnf`, or :func:`conditional_hollow_cnf` where an encoder or other context
  decides; :class:`HollowCNF` and :class:`ConditionalHollowCNF` around a network of your own making;
- such a flow in the units of the data (and of the context) that it is fitted to: :func:`standardized`;
- behind such a flow, directions in which the latents of each data point vary together:
  :func:`conditional_low_rank_linear`;
- gradients with less noise near the optimum, in a guide of your own: :class:`PathGradientDistribution`;
- a vector field with exact divergence and dimension-wise derivatives of any order: :class:`HollowNN`;
- a stochastic differential equation learned from samples at several times: :class:`DiagonalSDE` and
  :class:`FokkerPlanckMatching`;
- the solver's method and tolerances: :class:`Solver`;
- the free-form flow to compare with: :func:`free_form_cnf`.
"""

from pyro_hollow.infer import AutoHollowCNF, PathGradientDistribution, diagnose
from pyro_hollow.nn import ConditionalHollowNN, HollowNN
from pyro_hollow.ode import Solver, SolverError
from pyro_hollow.sde import DiagonalSDE, FokkerPlanckMatching
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
    "AutoHollowCNF",
    "ConditionalFreeFormCNF",
    "ConditionalHollowCNF",
    "ConditionalHollowNN",
    "DiagonalSDE",
    "FokkerPlanckMatching",
    "FreeFormCNF",
    "HollowCNF",
    "HollowNN",
    "PathGradientDistribution",
    "Solver",
    "SolverError",
    "conditional_free_form_cnf",
    "conditional_hollow_cnf",
    "conditional_low_rank_linear",
    "diagnose",
    "free_form_cnf",
    "hollow_cnf",
    "standardized",
]
