# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Initial value problems with exact solutions.

A problem is called as a vector field, with a time and a state of shape ``(*, dim)``. It knows its divergence, the
solution at t1 for a state y0 at t0, and the log-determinant of the Jacobian of that solution, with shape ``(*,)``.
"""

import math

import torch


class Linear:
    """y' = A y, for a matrix A that is neither symmetric nor normal."""

    dim = 3

    def __init__(self):
        self.matrix = torch.tensor([[-0.5, 1.0, 0.3], [-2.0, 0.1, 0.7], [0.0, -0.4, 0.9]])

    def __call__(self, t, y):
        return y @ self.matrix.to(y).T

    def divergence(self, t, y):
        return self.matrix.to(y).trace().expand(y.shape[:-1])

    def exact(self, y0, t0, t1):
        return y0 @ torch.matrix_exp(self.matrix.to(y0) * (t1 - t0)).T

    def log_det(self, y0, t0, t1):
        return (self.matrix.to(y0).trace() * (t1 - t0)).expand(y0.shape[:-1])


class NonAutonomous:
    """y' = cos(3 t) y in each of two coordinates."""

    dim = 2

    def __call__(self, t, y):
        return torch.cos(3 * t) * y

    def divergence(self, t, y):
        return (self.dim * torch.cos(3 * t)).expand(y.shape[:-1])

    def exact(self, y0, t0, t1):
        return y0 * math.exp((math.sin(3 * t1) - math.sin(3 * t0)) / 3)

    def log_det(self, y0, t0, t1):
        return y0.new_full(y0.shape[:-1], self.dim * (math.sin(3 * t1) - math.sin(3 * t0)) / 3)


class Rotation:
    """A rotation of the plane with angular velocity 2, which preserves volume."""

    dim = 2
    velocity = 2.0

    def __call__(self, t, y):
        return self.velocity * torch.stack([-y[..., 1], y[..., 0]], dim=-1)

    def divergence(self, t, y):
        return y.new_zeros(y.shape[:-1])

    def exact(self, y0, t0, t1):
        cos, sin = math.cos(self.velocity * (t1 - t0)), math.sin(self.velocity * (t1 - t0))
        return torch.stack([cos * y0[..., 0] - sin * y0[..., 1], sin * y0[..., 0] + cos * y0[..., 1]], dim=-1)

    def log_det(self, y0, t0, t1):
        return y0.new_zeros(y0.shape[:-1])


class Logistic:
    """y' = y (1 - y) in each of three coordinates; a solution stays finite while y0 is in (0, 1)."""

    dim = 3

    def __call__(self, t, y):
        return y * (1 - y)

    def divergence(self, t, y):
        return (1 - 2 * y).sum(-1)

    def exact(self, y0, t0, t1):
        growth = math.exp(t1 - t0)
        return y0 * growth / (1 + y0 * (growth - 1))

    def log_det(self, y0, t0, t1):
        return (t1 - t0 - 2 * torch.log1p(y0 * math.expm1(t1 - t0))).sum(-1)


PROBLEMS = {"linear": Linear, "non-autonomous": NonAutonomous, "rotation": Rotation, "logistic": Logistic}


def start(problem, *batch, dtype=None):
    """Initial states in (0, 1), where all the solutions are of moderate size."""
    return 0.1 + 0.8 * torch.rand(*batch, problem.dim, dtype=dtype)


def with_log_det(problem):
    """The dynamics of the pair (state, log-determinant), with shapes ``(*, dim)`` and ``(*,)``."""
    return lambda t, state: (problem(t, state[0]), problem.divergence(t, state[0]))
