# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy
import gc
import pickle
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.testing import assert_close
from transform_checks import CONTEXT_DIM, base, brute_force_ladj, check_metadata

from pyro_hollow import PathGradientDistribution, conditional_hollow_cnf
from pyro_hollow.transforms import ConditionalLowRank, ConditionedLowRank, conditional_low_rank

#: By name: dimension and rank.
CASES = {"usual": (5, 2), "one direction": (5, 1), "all directions": (4, 4), "one dimension": (1, 1)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def strong(input_dim, rank):
    """Fresh maps are close to the identity, where most mistakes would not show."""
    transform = conditional_low_rank(input_dim, CONTEXT_DIM, rank)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_(std=0.5)
    return transform


def matrices(transform, context):
    """I + U V^T, entry by entry."""
    d, r = transform.input_dim, transform.rank
    rows = []
    for numbers in transform.nn(context).view(-1, 2 * d * r).tolist():
        u = torch.tensor(numbers[: d * r]).view(d, r)
        v = torch.tensor(numbers[d * r :]).view(d, r)
        rows.append(torch.eye(d) + sum((torch.outer(u[:, k], v[:, k]) for k in range(r)), torch.zeros(d, d)))
    return torch.stack(rows)


@every_case
def test_second_implementation(case):
    transform, context = strong(*case), torch.randn(6, CONTEXT_DIM)
    conditioned, x = transform.condition(context), torch.randn(6, case[0])
    matrix = matrices(transform, context)
    y, ladj = conditioned.call_and_ladj(x)
    assert (y - x).abs().max() > 0.1
    assert_close(y, (matrix @ x.unsqueeze(-1)).squeeze(-1))
    assert_close(ladj, torch.linalg.slogdet(matrix).logabsdet)
    assert_close(ladj, brute_force_ladj(conditioned, x))
    assert_close(conditioned._inverse(y), x)
    assert_close(conditioned.log_abs_det_jacobian(conditioned._inverse(y), y), ladj)
    check_metadata(conditioned)


@every_case
def test_score(case):
    """As that of the Gaussian that the map makes of a standard Normal."""
    transform, context = strong(*case), torch.randn(6, CONTEXT_DIM)
    conditioned, x = transform.condition(context), torch.randn(6, case[0])
    y, ladj, score = conditioned.call_and_score(x, -x)
    matrix = matrices(transform, context)
    value = y.detach().requires_grad_()
    log_density = dist.MultivariateNormal(torch.zeros(case[0]), matrix @ matrix.mT).log_prob(value)
    assert_close(score, torch.autograd.grad(log_density.sum(), value)[0], rtol=1e-6, atol=1e-6)
    assert_close(base(case[0]).log_prob(x) - ladj, log_density, rtol=1e-6, atol=1e-6)
    assert not score.requires_grad


@every_case
def test_gradients(case):
    transform, x = strong(*case), torch.randn(3, case[0], requires_grad=True)
    context = torch.randn(3, CONTEXT_DIM, requires_grad=True)

    def both(x, context):
        return transform.condition(context).call_and_ladj(x)

    def backward(x, context):
        conditioned = transform.condition(context)
        return conditioned._inverse(x), conditioned.log_abs_det_jacobian(x, x)

    assert torch.autograd.gradcheck(both, (x, context))
    assert torch.autograd.gradcheck(backward, (x, context))


def test_float32():
    torch.set_default_dtype(torch.float32)
    transform = strong(5, 2)
    conditioned, x = transform.condition(torch.randn(6, CONTEXT_DIM)), torch.randn(6, 5)
    y, ladj, score = conditioned.call_and_score(x, -x)
    assert y.dtype == ladj.dtype == score.dtype == torch.float32
    assert_close(conditioned._inverse(y), x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("context_shape, sample_shape", [((), (4,)), ((1,), (4,)), ((4,), (4,)), ((3, 1), (2, 3, 4))])
def test_shapes(context_shape, sample_shape):
    transform, context = strong(5, 2), torch.randn(*context_shape, CONTEXT_DIM)
    conditioned, x = transform.condition(context), torch.randn(*sample_shape, 5)
    y, ladj = conditioned.call_and_ladj(x)
    assert y.shape == x.shape and ladj.shape == sample_shape
    every = context.expand(*sample_shape, -1).reshape(-1, CONTEXT_DIM)
    expected = (matrices(transform, every) @ x.reshape(-1, 5, 1)).view_as(x)
    assert_close(y, expected)
    assert_close(conditioned._inverse(y), x)
    assert conditioned.forward_shape(x.shape) == conditioned.inverse_shape(x.shape) == x.shape


def test_a_fresh_map_is_close_to_the_identity():
    transform, x = conditional_low_rank(20, CONTEXT_DIM), torch.randn(100, 20)
    assert transform.rank == 16 and conditional_low_rank(3, CONTEXT_DIM).rank == 3
    y = transform.condition(torch.randn(100, CONTEXT_DIM))(x)
    assert 0 < (y - x).square().mean().sqrt() < 0.2


# In distributions


def distribution(transform, context):
    shape = *context.shape[:-1], transform.input_dim
    return dist.ConditionalTransformedDistribution(base(*shape), [transform]).condition(context)


def test_scoring_a_sample_inverts_nothing(monkeypatch):
    made = distribution(strong(5, 2), torch.randn(3, CONTEXT_DIM))
    z = made.rsample()
    with monkeypatch.context() as patch:
        patch.setattr(ConditionedLowRank, "_inverse", None)
        of_sample = made.log_prob(z)
    assert_close(made.log_prob(z.clone()), of_sample)


def test_score_of_a_sample_without_gradients_has_its_own():
    transform, context = strong(5, 2), torch.randn(3, CONTEXT_DIM)
    made = distribution(transform, context)
    z = made.sample()
    gradients = [
        torch.autograd.grad(made.log_prob(value).sum(), list(transform.parameters()), retain_graph=True)
        for value in (z, z.clone())
    ]
    assert all(map(torch.equal, *gradients)) and gradients[0][0].abs().max() > 0


def test_with_a_flow_and_the_path_gradient():
    """The same density as without, and the score of the whole."""
    flow, transform, context = conditional_hollow_cnf(4, CONTEXT_DIM), strong(4, 2), torch.randn(3, CONTEXT_DIM)
    parts = [flow.condition(context), transform.condition(context)]
    posterior = PathGradientDistribution(base(3, 4), parts)
    z = posterior.rsample()
    log_q = posterior.log_prob(z)
    other = dist.TransformedDistribution(base(3, 4), [flow.condition(context), transform.condition(context)])
    value = z.detach().requires_grad_()
    expected = other.log_prob(value)
    assert_close(log_q, expected, rtol=1e-4, atol=1e-4)
    weight = list(transform.parameters())[0]
    (score,) = torch.autograd.grad(expected.sum(), value)
    gradient = torch.autograd.grad(log_q.sum(), weight, retain_graph=True)[0]
    assert_close(gradient, torch.autograd.grad(z, weight, score)[0], rtol=1e-4, atol=1e-4)


def test_nothing_outlives_a_step():
    gc.collect()
    gc.disable()
    try:
        made = distribution(strong(5, 2), torch.randn(3, CONTEXT_DIM))
        z = made.rsample()
        made.log_prob(z).sum().backward()
        references = [weakref.ref(z), weakref.ref(made.transforms[0])]
        del made, z
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


def test_svi_finds_correlations():
    """A Gaussian posterior with a correlation that depends on the data."""
    torch.manual_seed(0)
    contexts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    correlation = torch.tensor([0.8, -0.8])
    covariance = torch.stack([torch.tensor([[1.0, r], [r, 1.0]]) for r in correlation.tolist()])
    transform = conditional_low_rank(2, 2, 1)

    def model():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))

    def guide():
        pyro.module("transform", transform)
        with pyro.plate("data", 2):
            pyro.sample("z", dist.TransformedDistribution(base(2, 2), [transform.condition(contexts)]))

    svi = SVI(model, guide, Adam({"lr": 0.03}), Trace_ELBO(num_particles=32, vectorize_particles=True))
    for _ in range(300):
        svi.step()
    matrix = matrices(transform, contexts)
    assert_close(matrix @ matrix.mT, covariance, rtol=0, atol=0.3)


def test_copies():
    transform, context, x = strong(5, 2), torch.randn(3, CONTEXT_DIM), torch.randn(3, 5)
    y = transform.condition(context)(x)
    other = conditional_low_rank(5, CONTEXT_DIM, 2)
    other.load_state_dict(transform.state_dict())
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), other):
        assert_close(twin.condition(context)(x), y)


# Errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: conditional_low_rank(0, 3), "input_dim must be at least 1, but got 0"),
        (lambda: conditional_low_rank(5, 0), "context_dim must be at least 1, but got 0"),
        (lambda: conditional_low_rank(5, 3, 0), "rank must be from 1 to input_dim, 5, but got 0"),
        (lambda: conditional_low_rank(5, 3, 6), "rank must be from 1 to input_dim, 5, but got 6"),
        (
            lambda: ConditionalLowRank(5, nn.Linear(3, 19), 2).condition(torch.zeros(3)),
            "width 2 \\* 5 \\* 2, but its last dimension is 19",
        ),
        (lambda: strong(5, 2).condition(torch.zeros(3))(torch.zeros(4)), "shape \\(\\*, 5\\), but got \\(4,\\)"),
        (lambda: strong(5, 2).condition(torch.zeros(3))(torch.zeros(())), "shape \\(\\*, 5\\), but got \\(\\)"),
        (
            lambda: strong(5, 2).condition(torch.zeros(7, 3))(torch.zeros(4, 5)),
            "context has batch shape \\(7,\\), which does not broadcast to the input's \\(4,\\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
