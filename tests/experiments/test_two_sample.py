# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from scipy import stats

from pyro_hollow.experiments.two_sample import energy_distance, energy_test, sliced_wasserstein


@pytest.mark.parametrize("n, m", [(50, 50), (40, 70)])
def test_one_dimension_is_that_of_scipy(n, m):
    x, y = torch.randn(n, 1), 0.5 + 2 * torch.randn(m, 1)
    expected = stats.energy_distance(x[:, 0].numpy(), y[:, 0].numpy())
    assert energy_distance(x, y) == pytest.approx(expected)
    if n == m:
        assert sliced_wasserstein(x, y) == pytest.approx(stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy()))


def test_energy_distance_by_brute_force():
    x, y = torch.randn(7, 3), 1 + torch.randn(5, 3)

    def mean(a, b):
        return sum((u - v).norm() for u in a for v in b) / (len(a) * len(b))

    assert energy_distance(x, y) ** 2 == pytest.approx((2 * mean(x, y) - mean(x, x) - mean(y, y)).item())


def test_distances_of_a_sample_to_itself():
    x = torch.randn(20, 3)
    assert energy_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert sliced_wasserstein(x, x.flip(0)) == 0


def test_sliced_wasserstein_of_a_shift():
    # A shift of length 2 has the mean projection 2 E|cos|, in the plane 4 / pi.
    x = torch.randn(30, 2)
    distance = sliced_wasserstein(x, x + torch.tensor([2.0, 0.0]), projections=20_000)
    assert distance == pytest.approx(4 / math.pi, rel=0.02)


def test_energy_test_holds_its_level_and_has_power():
    same = [energy_test(torch.randn(30, 2), torch.randn(30, 2), 99) <= 0.05 for _ in range(300)]
    assert 3 <= sum(same) <= 30  # 15 expected
    other = [energy_test(torch.randn(100, 2), 0.8 + torch.randn(100, 2), 99) for _ in range(5)]
    assert max(other) == 0.01


def test_single_precision():
    x, y = torch.randn(20, 2).float(), 1 + torch.randn(20, 2).float()
    assert energy_distance(x, y) == pytest.approx(energy_distance(x.double(), y.double()), rel=1e-5)
