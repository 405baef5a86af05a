# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Solvers of ordinary differential equations."""

from .monitor import SolverError, SolverStats
from .solver import METHODS, Solution, Solver

__all__ = ["METHODS", "Solution", "Solver", "SolverError", "SolverStats"]
