# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_hollow.infer.soft_clip import SoftClip

SHARPNESS = [0.5, 4.0, 40.0]


def clip(sharpness, size=1):
    return SoftClip(torch.ones(size, dtype=torch.bool), sharpness)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_map_is_the_logit_of_a_difference_of_softplus(sharpness):
    v = torch.linspace(-1.2, 1.2, 49).unsqueeze(-1)
    outer, inner = (torch.nn.functional.softplus(sharpness * (v + side), threshold=700.0) for side in (1, -1))
    share = (outer - inner) / (2 * sharpness)
    torch.testing.assert_close(clip(sharpness)(v), share.logit(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_log_determinant_is_that_of_autograd(sharpness):
    v = torch.linspace(-4.0, 4.0, 81).unsqueeze(-1).requires_grad_()
    made = clip(sharpness)(v)
    (slope,) = torch.autograd.grad(made.sum(), v)
    ladj = clip(sharpness).log_abs_det_jacobian(v, made)
    torch.testing.assert_close(ladj, slope.log().squeeze(-1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_also_far_outside(sharpness, dtype):
    y = torch.tensor([-300.0, -90.0, -20.0, -1.0, 0.0, 1e-3, 5.0, 90.0, 300.0], dtype=dtype).unsqueeze(-1)
    v = clip(sharpness).inv(y)
    assert bool(v.isfinite().all())
    torch.testing.assert_close(clip(sharpness)(v), y, rtol=1e-5, atol=1e-5)


def test_sharp_edges_keep_the_geometry_between_the_bounds():
    v = torch.linspace(-0.7, 0.7, 15).unsqueeze(-1)
    torch.testing.assert_close(clip(40.0)(v).sigmoid(), (1 + v) / 2, rtol=0, atol=1e-6)


def test_blunt_edges_leave_the_logit():
    y = torch.linspace(-3.0, 3.0, 7).unsqueeze(-1)
    blunt = clip(1e-2).inv(y)
    torch.testing.assert_close(blunt / blunt[-1], y / y[-1], rtol=0, atol=1e-3)


def test_elements_that_are_not_chosen():
    part = SoftClip(torch.tensor([False, True]), 10.0)
    v = torch.tensor([[5.0, 0.3], [-2.0, -0.9]])
    made = part(v)
    assert torch.equal(made[:, 0], v[:, 0]) and torch.equal(part.inv(v)[:, 0], v[:, 0])
    torch.testing.assert_close(
        part.log_abs_det_jacobian(v, made), clip(10.0).log_abs_det_jacobian(v[:, 1:], made[:, 1:])
    )


def test_equality():
    assert clip(2.0) == clip(2.0) and clip(2.0) != clip(3.0) and clip(2.0) != clip(2.0, 2)
    assert clip(2.0, 2) != SoftClip(torch.tensor([True, False]), 2.0) and clip(2.0) != math.inf
