# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_hollow.experiments import dw4


def strong(flow):
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow


def test_energy():
    # A square with sides of 5: four pairs are 1 from the top of the barrier, two are 5 sqrt(2) - 4.
    square = torch.tensor([0.0, 0.0, 5.0, 0.0, 5.0, 5.0, 0.0, 5.0])
    across = 5 * math.sqrt(2) - 4
    expected = 4 * (0.9 - 4) + 2 * (0.9 * across**4 - 4 * across**2)
    torch.testing.assert_close(dw4.energy(square), torch.tensor(expected))
    turned = square.view(4, 2) @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]) + torch.tensor([1.0, -2.0])
    moved = turned[torch.tensor([2, 0, 3, 1])].flatten()
    torch.testing.assert_close(dw4.energy(moved), torch.tensor(expected))
    mean = moved.view(4, 2).mean(0)
    torch.testing.assert_close(dw4.log_density(moved), -torch.tensor(expected) - 2 * mean.square().sum())


def test_base():
    torch.manual_seed(0)
    x, log_prob = dw4.base(4)
    centring = torch.eye(4) - 0.25
    # The mean has the covariance 1 / 4, and deviations from it that of SPREAD^2 times the centring matrix.
    covariance = torch.kron(dw4.SPREAD**2 * centring + 0.25, torch.eye(2))
    torch.testing.assert_close(log_prob, MultivariateNormal(torch.zeros(8), covariance).log_prob(x))


def test_forces_between_pairs():
    flow, t = strong(dw4.make_flow("pairs")), torch.tensor(0.3)
    field, x = flow.nn.bind(), 2 * torch.randn(3, 8)
    f, divergence = field.with_divergence(t, x)
    matrix = torch.stack([torch.func.jacrev(lambda x: field(t, x))(row) for row in x])
    torch.testing.assert_close(divergence, matrix.diagonal(dim1=-2, dim2=-1).sum(-1))
    torch.testing.assert_close(f.unflatten(-1, (4, 2)).sum(-2), torch.zeros(3, 2))
    torch.testing.assert_close(
        field.dimwise_derivatives(t, x, 2)[1], matrix.diagonal(dim1=-2, dim2=-1), rtol=1e-9, atol=1e-9
    )
    order = torch.tensor([2, 0, 3, 1])
    turn = torch.tensor([[0.6, 0.8], [0.8, -0.6]])  # a reflection
    for change in (lambda x: x.unflatten(-1, (4, 2))[..., order, :], lambda x: x.unflatten(-1, (4, 2)) @ turn):
        torch.testing.assert_close(field(t, change(x).flatten(-2)), change(f).flatten(-2))


@pytest.mark.parametrize("kind", dw4.KINDS)
def test_log_weights(kind):
    flow = strong(dw4.make_flow(kind))
    torch.manual_seed(1)
    weights = dw4.log_weights(flow, 2)
    torch.manual_seed(1)
    x, log_prob = dw4.base(2)
    for k in range(2):

        def move(x):
            return dw4.EXACT.integrate(flow.nn.bind(), x.unsqueeze(0), 0.0, 1.0).state.squeeze(0)

        slogdet = torch.linalg.slogdet(torch.autograd.functional.jacobian(move, x[k]))[1]
        expected = dw4.log_density(move(x[k])) + slogdet - log_prob[k]
        torch.testing.assert_close(weights[k], expected, rtol=1e-3, atol=1e-3)


def test_program(capsys):
    dw4.main(["--steps", "2", "--kind", "pairs", "--samples", "20"])
    assert "ESS" in capsys.readouterr().out
