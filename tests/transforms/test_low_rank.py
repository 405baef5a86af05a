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
from pyro_hollow.transforms import ConditionalLowRankLinear, ConditionedLowRankLinear, conditional_low_rank_linear

#: By name: dimension and rank.
CASES = {"usual": (5, 2), "one direction": (5, 1), "all directions": (4, 4), "one dimension": (1, 1)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def strong(input_dim, rank):
    """Fresh maps are close to the identity, where most mistakes would not show."""
    transform = conditional_low_rank_linear(input_dim, CONTEXT_DIM, rank)
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
    transform, x = conditional_low_rank_linear(20, CONTEXT_DIM), torch.randn(100, 20)
    assert transform.rank == 16 and conditional_low_rank_linear(3, CONTEXT_DIM).rank == 3
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
        patch.setattr(ConditionedLowRankLinear, "_inverse", None)
        of_sample = made.log_prob(z)
    assert_close(made.log_prob(z.clone()), of_sample)


def test_score_of_a_sample_without_gradients_has_its_own():
    transform, context = strong(5, 2), torch.randn(3, CONTEXT_DIM)
    made = distribution(transform, context)
    z = made.sample()
    gradients = [
        torch.autograd.grad(made.log_prob(value).sum(), list(transform.parameters())) for value in (z, z.clone())
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


def test_training_with_one_condition():
    """Several steps with the same transform, data and context, as in Pyro's own tests."""
    transform, data = strong(5, 2), torch.randn(8, 5)
    made = distribution(transform, torch.randn(8, CONTEXT_DIM))
    optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = -made.log_prob(data).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2] > losses[3]
    for _ in range(2):
        z = made.rsample()
        made.log_prob(z).sum().backward()


# The cache


def test_a_pair_is_dropped_when_something_changes():
    transform, context = strong(5, 2), torch.randn(3, CONTEXT_DIM)
    conditioned, x = transform.condition(context), torch.randn(3, 5)
    tensors = {"input": x, "context": context, "parameter": transform.nn.weight}
    for name, tensor in tensors.items():
        before = conditioned(x)
        assert conditioned(x) is before
        with torch.no_grad():
            tensor.mul_(1.5)
        after, ladj = conditioned.call_and_ladj(x)
        expected = transform.condition(context).call_and_ladj(x)
        assert_close((after, ladj), expected), name
        assert (after - before).abs().max() > 0.1, name
    y = conditioned(x).detach().clone()
    for change in (lambda y: y, lambda y: y.mul_(2.0)):
        with torch.no_grad():
            z = conditioned(x)
            change(z)
            assert_close(conditioned.inv(z), conditioned._inverse(z))
    assert_close(conditioned.inv(y), x)


def test_gradients_where_they_are_wanted():
    """A pair made without, or with tensors that did not require them, is not used."""
    transform = strong(5, 2)
    conditioned, x = transform.condition(torch.randn(3, CONTEXT_DIM)), torch.randn(3, 5)
    with torch.no_grad():
        y = conditioned(x)
    assert conditioned(x).requires_grad
    transform.requires_grad_(False)
    made = distribution(transform, torch.randn(3, CONTEXT_DIM))
    z = made.rsample()
    assert made.transforms[0].inv(z) is made.transforms[0]._cache.latest.x
    z.requires_grad_()
    (score,) = torch.autograd.grad(made.log_prob(z).sum(), z)
    other = z.detach().clone().requires_grad_()
    assert_close(score, torch.autograd.grad(made.log_prob(other).sum(), other)[0])
    conditioned(x.requires_grad_())
    assert conditioned(x).requires_grad
    assert not y.requires_grad


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
    transform = conditional_low_rank_linear(2, 2, 1)

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
    other = conditional_low_rank_linear(5, CONTEXT_DIM, 2)
    other.load_state_dict(transform.state_dict())
    for twin in (copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), other):
        assert_close(twin.condition(context)(x), y)
    conditioned = transform.condition(context)
    assert_close(conditioned(x), y)
    for twin in (copy.deepcopy(conditioned), pickle.loads(pickle.dumps(conditioned))):
        assert_close(twin(x), y)


def test_no_samples():
    y, ladj, score = strong(5, 2).condition(torch.randn(CONTEXT_DIM)).call_and_score(*torch.randn(2, 0, 5))
    assert y.shape == score.shape == (0, 5) and ladj.shape == (0,)


def test_singular():
    """y = x - x: the log-determinant tells, and only the inverse fails."""
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([1.0, -1.0]))
    conditioned = ConditionalLowRankLinear(1, linear, 1).condition(torch.zeros(1))
    y, ladj = conditioned.call_and_ladj(torch.ones(3, 1))
    assert (y == 0).all() and (ladj == -torch.inf).all()
    with pytest.raises(torch.linalg.LinAlgError):
        conditioned._inverse(y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    transform = strong(5, 2).cuda()
    conditioned, x = transform.condition(torch.randn(3, CONTEXT_DIM).cuda()), torch.randn(3, 5).cuda()
    y, ladj, score = conditioned.call_and_score(x, -x)
    assert y.is_cuda and ladj.is_cuda and score.is_cuda
    assert_close(conditioned._inverse(y), x)


def test_autocast():
    torch.set_default_dtype(torch.float32)
    conditioned, x = strong(5, 2).condition(torch.randn(3, CONTEXT_DIM)), torch.randn(3, 5)
    expected = conditioned.call_and_ladj(x)
    conditioned.clear_cache()
    with torch.autocast("cpu", torch.bfloat16):
        y, ladj = conditioned.call_and_ladj(x)
    assert_close((y, ladj), expected, rtol=0.1, atol=0.1)
    assert y.dtype == ladj.dtype == torch.float32


# Errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: conditional_low_rank_linear(0, 3), "input_dim must be at least 1, but got 0"),
        (lambda: conditional_low_rank_linear(5, 0), "context_dim must be at least 1, but got 0"),
        (lambda: conditional_low_rank_linear(5, 3, 0), "rank must be from 1 to input_dim, 5, but got 0"),
        (lambda: conditional_low_rank_linear(5, 3, 6), "rank must be from 1 to input_dim, 5, but got 6"),
        (
            lambda: ConditionalLowRankLinear(5, nn.Linear(3, 19), 2).condition(torch.zeros(3))(torch.zeros(5)),
            "width 2 \\* 5 \\* 2, but its last dimension is 19",
        ),
        (lambda: strong(5, 2).condition(torch.zeros(3))(torch.zeros(4)), "shape \\(\\*, 5\\), but got \\(4,\\)"),
        (lambda: strong(5, 2).condition(torch.zeros(3))(torch.zeros(())), "shape \\(\\*, 5\\), but got \\(\\)"),
        (
            lambda: strong(5, 2).condition(torch.zeros(7, 3))(torch.zeros(4, 5)),
            "context has batch shape \\(7,\\), which does not broadcast to the input's \\(4,\\)",
        ),
        (
            lambda: strong(5, 2).condition(torch.zeros(3)).log_abs_det_jacobian(torch.zeros(7), torch.zeros(7)),
            "shape \\(\\*, 5\\), but got \\(7,\\)",
        ),
        (
            lambda: strong(5, 2).condition(torch.zeros(3)).call_and_score(torch.zeros(2, 5), torch.zeros(5)),
            "score must have the shape of x, \\(2, 5\\), but got \\(5,\\)",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
