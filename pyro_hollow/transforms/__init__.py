# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous normalizing flows as Pyro transforms."""

from .continuous import ConditionalCNF, ConditionedCNF
from .free_form_cnf import (
    ConditionalFreeFormCNF,
    ConditionedFreeFormCNF,
    FreeFormCNF,
    FreeFormNN,
    LowRankFreeFormNN,
    conditional_free_form_cnf,
    free_form_cnf,
)
from .hollow_cnf import (
    ConditionalHollowCNF,
    ConditionedHollowCNF,
    HollowCNF,
    Regularization,
    conditional_hollow_cnf,
    hollow_cnf,
)
from .low_rank import ConditionalLowRankLinear, ConditionedLowRankLinear, conditional_low_rank_linear
from .standardize import (
    ConditionalStandardizedFlow,
    ConditionedStandardizedFlow,
    StandardizedFlow,
    standardized,
)
from .sylvester import ConditionalSylvester, ConditionedSylvester, conditional_sylvester

__all__ = [
    "ConditionalCNF",
    "ConditionalFreeFormCNF",
    "ConditionalHollowCNF",
    "ConditionalLowRankLinear",
    "ConditionalStandardizedFlow",
    "ConditionalSylvester",
    "ConditionedCNF",
    "ConditionedFreeFormCNF",
    "ConditionedHollowCNF",
    "ConditionedLowRankLinear",
    "ConditionedStandardizedFlow",
    "ConditionedSylvester",
    "FreeFormCNF",
    "FreeFormNN",
    "HollowCNF",
    "LowRankFreeFormNN",
    "Regularization",
    "StandardizedFlow",
    "conditional_free_form_cnf",
    "conditional_hollow_cnf",
    "conditional_low_rank_linear",
    "conditional_sylvester",
    "free_form_cnf",
    "hollow_cnf",
    "standardized",
]
