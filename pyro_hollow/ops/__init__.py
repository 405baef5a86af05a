# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Vector fields, their derivatives and steps, and root finding."""

from .derivatives import (
    HollowOperator,
    SplitJacobian,
    block_jacobian,
    dimwise_derivatives,
    divergence,
    fill_by_differences,
    jacobian,
    split_jacobian,
)
from .operators import DimwiseField, differential_operator, field_derivatives, time_derivative
from .roots import RootError, RootOptions, RootResult, attach, fixed_point, jacobi_newton, newton
from .stepper import AutogradStepper, DifferentiatedStepper, Step, Stepper, Tableau, Unsupported
from .vector_field import VectorField

__all__ = [
    "AutogradStepper",
    "DifferentiatedStepper",
    "DimwiseField",
    "HollowOperator",
    "RootError",
    "RootOptions",
    "RootResult",
    "SplitJacobian",
    "Step",
    "Stepper",
    "Tableau",
    "Unsupported",
    "VectorField",
    "attach",
    "block_jacobian",
    "differential_operator",
    "dimwise_derivatives",
    "divergence",
    "field_derivatives",
    "fill_by_differences",
    "fixed_point",
    "jacobi_newton",
    "jacobian",
    "newton",
    "split_jacobian",
    "time_derivative",
]
