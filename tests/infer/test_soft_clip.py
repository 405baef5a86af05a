# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from pyro_hollow.infer.soft_clip import SoftClip

SHARPNESS = [0.5, 4.0, 40.0]


def clip(sharpness, dtype=None):
    return SoftClip(torch.tensor([True]), torch.tensor([sharpness], dtype=dtype))


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_map_is_the_logit_of_a_difference_of_softplus(sharpness):
    v = torch.linspace(-1.2, 1.2, 49).unsqueeze(-1)
    w = v * math.tanh(sharpness / 2)
    outer, inner = (torch.nn.functional.softplus(sharpness * (v + side), threshold=700.0) for side in (1, -1))
    share = (outer - inner) / (2 * sharpness)
    torch.testing.assert_close(clip(sharpness)(w), share.logit(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_log_determinant_is_that_of_autograd(sharpness):
    w = torch.linspace(-4.0, 4.0, 81).unsqueeze(-1).requires_grad_()
    made = clip(sharpness)(w)
    (slope,) = torch.autograd.grad(made.sum(), w)
    ladj = clip(sharpness).log_abs_det_jacobian(w, made)
    torch.testing.assert_close(ladj, slope.log().squeeze(-1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_also_far_outside(sharpness, dtype):
    y = torch.tensor([-300.0, -90.0, -20.0, -1.0, 0.0, 1e-3, 5.0, 90.0, 300.0], dtype=dtype).unsqueeze(-1)
    w = clip(sharpness, dtype).inv(y)
    assert bool(w.isfinite().all())
    torch.testing.assert_close(clip(sharpness, dtype)(w), y, rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_far_outside():
    sharpness = torch.tensor([100.0], dtype=torch.float32, requires_grad=True)
    made = SoftClip(torch.tensor([True]), sharpness)
    y = torch.tensor([[-90.0], [0.0], [90.0]], dtype=torch.float32)
    w = made.inv(y)
    (w.sum() + made.log_abs_det_jacobian(w, y).sum()).backward()
    assert bool(sharpness.grad.isfinite().all())


def test_sharp_edges_keep_the_geometry_between_the_bounds():
    v = torch.linspace(-0.7, 0.7, 15).unsqueeze(-1)
    torch.testing.assert_close(clip(40.0)(v).sigmoid(), (1 + v) / 2, rtol=0, atol=1e-6)


def test_blunt_edges_leave_the_logit():
    y = torch.linspace(-3.0, 3.0, 7).unsqueeze(-1)
    torch.testing.assert_close(clip(1e-2).inv(y), y / 2, rtol=0, atol=1e-3)


def test_elements_that_are_not_chosen():
    part = SoftClip(torch.tensor([False, True]), torch.tensor([10.0, 10.0]))
    v = torch.tensor([[5.0, 0.3], [-2.0, -0.9]])
    made = part(v)
    assert torch.equal(made[:, 0], v[:, 0]) and torch.equal(part.inv(v)[:, 0], v[:, 0])
    torch.testing.assert_close(
        part.log_abs_det_jacobian(v, made), clip(10.0).log_abs_det_jacobian(v[:, 1:], made[:, 1:])
    )
