# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Hollow networks: conditioners, transformers, and the vector fields made of them."""

from .conditioner import (
    BoundConditioner,
    Conditioner,
    GroupedConditioner,
    LeaveOneOutConditioner,
    MaskedConditioner,
)
from .graph_conditioner import GraphConditioner
from .hollow_nn import ConditionalHollowNN, HollowField, HollowNN
from .transformer import BoundTransformer, ClosedFormTransformer, ModuleTransformer, Transformer

__all__ = [
    "BoundConditioner",
    "BoundTransformer",
    "ClosedFormTransformer",
    "ConditionalHollowNN",
    "Conditioner",
    "GraphConditioner",
    "GroupedConditioner",
    "HollowField",
    "HollowNN",
    "LeaveOneOutConditioner",
    "MaskedConditioner",
    "ModuleTransformer",
    "Transformer",
]
