# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Solvers of ordinary differential equations."""

from .solver import METHODS, Solution, Solver, SolverError, SolverStats

__all__ = ["METHODS", "Solution", "Solver", "SolverError", "SolverStats"]
