# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives and root finding as pure functions on tensors."""

from .derivatives import HollowOperator, SplitJacobian, dimwise_derivatives, divergence, jacobian, split_jacobian
from .roots import RootError, RootResult, attach, fixed_point, jacobi_newton, newton

__all__ = [
    "HollowOperator",
    "RootError",
    "RootResult",
    "SplitJacobian",
    "attach",
    "dimwise_derivatives",
    "divergence",
    "fixed_point",
    "jacobi_newton",
    "jacobian",
    "newton",
    "split_jacobian",
]
