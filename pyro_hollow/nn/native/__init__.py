# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Runge-Kutta steps in C, and how they are built."""

from .stepper import NativeStepper

__all__ = ["NativeStepper"]
