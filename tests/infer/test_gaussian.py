# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from torch import Tensor

from pyro_hollow.infer.gaussian import GaussianFit, fit_gaussian


class Normal:
    """A normal density by its precision, with its gradient; counts the evaluations."""

    def __init__(self, loc: Tensor, covariance: Tensor) -> None:
        self.loc, self.precision = loc, covariance.inverse()
        self.constant = -0.5 * (covariance.logdet() + len(loc) * math.log(2 * math.pi))

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        gradient = -(z - self.loc) @ self.precision
        return self.constant + 0.5 * (gradient * (z - self.loc)).sum(-1), gradient


def badly_scaled(dim: int) -> Normal:
    factor = torch.randn(dim, dim) * torch.logspace(-3, 2, dim).unsqueeze(-1)
    return Normal(torch.linspace(-5, 50, dim), factor @ factor.mT + 1e-6 * torch.eye(dim))


def at_zero(dim: int) -> GaussianFit:
    return GaussianFit(torch.zeros(dim), 0.1 * torch.eye(dim))


@pytest.mark.parametrize("dim", [1, 2, 12, 40])
def test_normal_density_is_found_exactly(dim):
    target = badly_scaled(dim)
    found = fit_gaussian(target, at_zero(dim))
    assert found.elbo == pytest.approx(0.0, abs=1e-2)
    scale = target.precision.inverse().diagonal().sqrt()
    torch.testing.assert_close(found.loc / scale, target.loc / scale, atol=1e-2, rtol=1e-3)
    whitened = found.scale_tril.mT @ target.precision @ found.scale_tril
    torch.testing.assert_close(whitened, torch.eye(dim), atol=2e-2, rtol=0)


def test_steps_do_not_depend_on_coordinates():
    target = badly_scaled(5)
    matrix = torch.randn(5, 5).tril(-1) + torch.diag(torch.tensor([1e-2, 3.0, 1e3, 0.5, 7.0]))
    shift = torch.randn(5)

    def moved(y: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = target(torch.linalg.solve_triangular(matrix, (y - shift).mT, upper=False).mT)
        return value, torch.linalg.solve_triangular(matrix.mT, gradient.mT, upper=True).mT

    torch.manual_seed(1)
    found = fit_gaussian(target, at_zero(5), max_steps=100)
    torch.manual_seed(1)
    other = fit_gaussian(moved, GaussianFit(shift, 0.1 * matrix), max_steps=100)
    torch.testing.assert_close(other.loc, matrix @ found.loc + shift, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other.scale_tril, matrix @ found.scale_tril, rtol=1e-6, atol=1e-6)


def test_elbo_of_a_skewed_density_is_the_best_of_a_gaussian():
    shape = 3.0

    def log_gamma(z: Tensor) -> tuple[Tensor, Tensor]:
        value = shape * z - z.exp() - math.lgamma(shape)
        return value.sum(-1), shape - z.exp()

    found = fit_gaussian(log_gamma, at_zero(1))
    variance = 1 / shape  # from E exp(z) = shape = 1 / variance
    loc = math.log(shape) - variance / 2
    elbo = shape * loc - shape - math.lgamma(shape) + 0.5 * math.log(2 * math.pi * math.e * variance)
    assert found.loc.item() == pytest.approx(loc, abs=0.03)
    assert found.scale_tril.item() ** 2 == pytest.approx(variance, rel=0.1)
    assert found.elbo == pytest.approx(elbo, abs=0.02)


def test_particles_without_density_are_left_out():
    target = Normal(torch.tensor([1.0, -1.0]), torch.tensor([[0.04, 0.0], [0.0, 0.09]]))

    def half(z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = target(z)
        bad = z[:, 0] < 0.0
        return value.where(~bad, torch.nan), gradient.where(~bad.unsqueeze(-1), torch.inf)

    found = fit_gaussian(half, GaussianFit(torch.tensor([0.5, 0.0]), 0.1 * torch.eye(2)))
    torch.testing.assert_close(found.loc, target.loc, atol=0.02, rtol=0)


def test_start_is_kept_where_there_is_no_density():
    def nowhere(z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(z[:, 0], torch.nan), torch.zeros_like(z)

    found = fit_gaussian(nowhere, at_zero(3), max_steps=50)
    assert torch.equal(found.loc, torch.zeros(3)) and torch.equal(found.scale_tril, 0.1 * torch.eye(3))


def test_blocks_that_lead_astray_are_taken_back():
    target = Normal(torch.tensor([1.0, -2.0]), torch.eye(2))
    calls = 0

    def misleading(z: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        value, gradient = target(z)
        return (value, gradient) if calls <= 100 else (value - 1e4 * (z - target.loc).square().sum(-1), -gradient)

    found = fit_gaussian(misleading, at_zero(2))
    assert found.num_retreats > 0
    torch.testing.assert_close(found.loc, target.loc, atol=0.02, rtol=0)


def test_report_ends_the_ascent():
    seen = []

    def report(num_steps: int, elbo: float) -> bool:
        seen.append(num_steps)
        return len(seen) == 2

    found = fit_gaussian(badly_scaled(3), at_zero(3), report=report)
    assert seen == [25, 50] and found.num_steps == 50
