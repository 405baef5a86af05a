# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import torch.distributions as td
from torch.testing import assert_close

from pyro_hollow.infer.gaussian_mixture import GaussianMixture

GROUPS = {
    "one group": ([0, 0, 0, 0, 0], [[0, 1, 2, 3, 4]]),
    "two groups": ([0, 0, 0, 1, 1], [[0, 2], [1, 3, 4]]),
    "a single coordinate": ([0, 0, 0, 0, 1], [[0, 1, 2, 4], [3]]),
}


@pytest.fixture(params=GROUPS.values(), ids=GROUPS)
def mixture(request):
    """A mixture of five components in five dimensions, its components by group, and the coordinates of the groups."""
    group_of, coordinates = request.param
    members = torch.zeros(5, 5, dtype=torch.bool)
    for k, g in enumerate(group_of):
        members[k, coordinates[g]] = True
    factors = torch.randn(5, 5, 5)
    covariance = factors @ factors.mT + torch.eye(5)
    covariance = torch.where(members.unsqueeze(-1) & members.unsqueeze(-2), covariance, torch.eye(5))
    found = GaussianMixture(torch.randn(5), 2 * torch.randn(5, 5), torch.linalg.cholesky(covariance), members)
    parts = [[k for k in range(5) if group_of[k] == g] for g in range(len(coordinates))]
    return found, list(zip(parts, coordinates, strict=True))


def brute_force(mixture, parts, x):
    total = torch.zeros(len(x))
    for components, index in parts:
        normals = td.MultivariateNormal(
            mixture.locs[components][:, index],
            scale_tril=mixture.scale_trils[components][:, index][:, :, index],
        )
        weights = td.Categorical(logits=mixture.log_weights[components])
        total = total + td.MixtureSameFamily(weights, normals).log_prob(x[:, index])
    return total


def test_density_and_score(mixture):
    q, parts = mixture
    x = (3 * torch.randn(11, 5)).requires_grad_()
    expected = brute_force(q, parts, x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    log_density, score = q.log_prob_and_score(x.detach())
    assert_close(log_density, expected.detach())
    assert_close(score, gradient)
    assert_close(q.log_prob(x.detach().view(1, 11, 5)), expected.detach().view(1, 11))


def test_probabilities_of_components_sum_to_one_in_each_group(mixture):
    q, parts = mixture
    x = torch.randn(7, 5)
    _, noises, log_probabilities = q.explain(x)
    for components, index in parts:
        assert_close(log_probabilities[components].exp().sum(0), torch.ones(7))
        for k in components:
            placed = q.locs[k, index] + noises[k][:, index] @ q.scale_trils[k][index][:, index].mT
            assert_close(placed, x[:, index])


def test_moments_are_those_of_samples(mixture):
    q, _ = mixture
    loc, scale_tril = q.moments()
    assert torch.equal(scale_tril, scale_tril.tril()) and bool((scale_tril.diagonal() > 0).all())
    covariance = scale_tril @ scale_tril.mT
    for x in (q.rsample((100_000,)), q.place(torch.randn(100_000, 5), q.stratify(100_000))):
        deviation = covariance.diagonal().sqrt()
        assert_close((x.mean(0) - loc) / deviation, torch.zeros(5), rtol=0, atol=0.02)
        correlation = (x.mT.cov() - covariance) / (deviation.unsqueeze(-1) * deviation)
        assert_close(correlation, torch.zeros(5, 5), rtol=0, atol=0.03)


def test_affine_image(mixture):
    q, _ = mixture
    loc, scale_tril = q.moments()
    x = torch.randn(7, 5)
    image = q.affine(loc, scale_tril)
    u = torch.linalg.solve_triangular(scale_tril, (x - loc).mT, upper=False).mT
    assert_close(image.log_prob(u), q.log_prob(x) + scale_tril.diagonal().log().sum())
    mean, factor = image.moments()
    assert_close(mean, torch.zeros(5), rtol=0, atol=1e-12)
    assert_close(factor, torch.eye(5), rtol=0, atol=1e-12)


def test_components_are_stratified(mixture):
    q, parts = mixture
    components = q.stratify(1000)
    assert components.shape == (1000, len(parts))
    for column in components.mT:
        own = next(part for part, _ in parts if int(column[0]) in part)
        counts = torch.bincount(column, minlength=5)[own]
        assert_close(counts / 1000, q.log_weights[own].exp(), rtol=0, atol=1.1e-3)


def test_shapes_and_expansion(mixture):
    q, _ = mixture
    assert q.event_shape == (5,) and q.batch_shape == ()
    expanded = q.expand(torch.Size([3]))
    assert expanded.batch_shape == (3,) and expanded.rsample((2,)).shape == (2, 3, 5)
    x = torch.randn(2, 3, 5)
    assert_close(expanded.log_prob(x), q.log_prob(x))
