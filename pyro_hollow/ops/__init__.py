# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives as pure functions on tensors."""

from .derivatives import HollowOperator, SplitJacobian, dimwise_derivatives, divergence, split_jacobian

__all__ = ["HollowOperator", "SplitJacobian", "dimwise_derivatives", "divergence", "split_jacobian"]
