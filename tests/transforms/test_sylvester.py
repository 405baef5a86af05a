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
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from torch.testing import assert_close
from transform_checks import CONTEXT_DIM, base, brute_force_ladj, check_metadata

from pyro_hollow.transforms import ConditionalSylvester, conditional_sylvester
from pyro_hollow.transforms.sylvester import orthonormalize, reflections

#: By name: dimension, number of vectors, kind.
CASES = {
    "orthogonal": (5, 3, "orthogonal"),
    "orthogonal, one vector": (5, 1, "orthogonal"),
    "orthogonal, all vectors": (4, 4, "orthogonal"),
    "orthogonal, one dimension": (1, 1, "orthogonal"),
    "householder": (5, 3, "householder"),
    "householder, one reflection": (5, 1, "householder"),
    "householder, more than dimensions": (3, 7, "householder"),
    "householder, one dimension": (1, 1, "householder"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_kind = pytest.mark.parametrize("kind", ["orthogonal", "householder"])


def strong(input_dim, num_vectors, kind):
    """Fresh flows are close to the identity, where most mistakes would not show."""
    flow = conditional_sylvester(input_dim, CONTEXT_DIM, num_vectors, kind=kind)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_()
    return flow


def distribution(flow, context):
    shape = *context.shape[:-1], flow.input_dim
    return dist.ConditionalTransformedDistribution(base(*shape), [flow]).condition(context)


def by_loops(flow, context, x):
    """Value and log-determinant of one sample, from the paper's equations, entry by entry."""
    d, k = flow.input_dim, flow.num_vectors
    m = k if flow.kind == "orthogonal" else d
    params = iter(flow.nn(context).tolist())
    vectors = torch.tensor([[next(params) for _ in range(k)] for _ in range(d)])
    matrix = [[next(params) for _ in range(m)] for _ in range(m)]
    r1, r2 = torch.zeros(m, m), torch.zeros(m, m)
    for i in range(m):
        for j in range(m):
            if i < j:
                r1[i, j] = matrix[i][j]
            elif i > j:
                r2[j, i] = matrix[i][j]
    for r in (r1, r2):
        for i in range(m):
            r[i, i] = (1 - 1e-6) * torch.tensor(next(params)).tanh()
    bias = torch.tensor([next(params) for _ in range(m)])
    if flow.kind == "orthogonal":
        columns = []
        for j in range(k):
            v = vectors[:, j] - sum((vectors[:, j] @ u * u for u in columns), torch.zeros(d))
            columns.append(v / v.norm())
        q = torch.stack(columns, dim=1)
    else:
        q = torch.eye(d)
        for j in range(k):
            v = vectors[:, j]
            q = q @ (torch.eye(d) - 2 * torch.outer(v, v) / (v @ v))
    pre = r2 @ q.T @ x + bias
    y = x + q @ r1 @ pre.tanh()
    return y, sum((1 + (1 - pre[i].tanh() ** 2) * r1[i, i] * r2[i, i]).abs().log() for i in range(m))


# Q


def paper_iteration(matrix):
    """What van den Berg et al. do to make columns orthonormal."""
    q = matrix / matrix.norm()
    for _ in range(50):
        q = q + q @ (torch.eye(q.shape[-1]) - q.T @ q) / 2
    return q


@pytest.mark.parametrize("shape", [(1, 1), (6, 1), (6, 4), (5, 5)])
def test_orthonormal_columns_and_what_they_span(shape):
    """The same as by the paper's iteration, and how it changes with the vectors."""
    matrix, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[0], shape[0])
    q, other = orthonormalize(matrix), paper_iteration(matrix)
    assert_close(q.T @ q, torch.eye(shape[1]), rtol=0, atol=1e-12)
    assert_close(q @ q.T, other @ other.T, rtol=0, atol=1e-10)
    gradient, expected = (torch.autograd.grad((p @ p.T * weight).sum(), matrix)[0] for p in (q, other))
    assert_close(gradient, expected, rtol=0, atol=1e-8)


def test_orthonormal_columns_do_not_jump():
    """LAPACK's own columns change their signs with those of pivots; the smallest angles would show it."""
    angles = torch.linspace(0, 6.28, 200)
    matrices = torch.stack([angles.cos(), angles.sin(), angles.sin(), -angles.cos()], dim=-1).view(-1, 2, 2)
    q = orthonormalize(matrices)
    assert (q[1:] - q[:-1]).abs().max() < 0.05
    assert (torch.linalg.qr(matrices).Q.diff(dim=0)).abs().max() > 1.0  # or the check would be of nothing


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_columns_are_orthonormal_even_for_dependent_vectors(value):
    q = orthonormalize(torch.full((5, 3), value))
    assert_close(q.T @ q, torch.eye(3), rtol=0, atol=1e-12)


def test_reflections():
    vectors = torch.randn(2, 5, 7)
    vectors[..., 2] = 0.0  # which reflects nothing
    q = reflections(vectors)
    expected = torch.eye(5).expand(2, 5, 5)
    for v in vectors.unbind(-1):
        norm = v.square().sum(-1)[:, None, None]
        expected = expected @ (torch.eye(5) - 2 * v[:, :, None] * v[:, None] / norm.where(norm > 0, 1.0))
    assert_close(q, expected, rtol=0, atol=1e-12)
    assert_close(q.mT @ q, torch.eye(5).expand(2, 5, 5), rtol=0, atol=1e-12)


# Value and log-determinant


@every_case
def test_second_implementation(case):
    flow = strong(*case)
    contexts, x = torch.randn(4, CONTEXT_DIM), torch.randn(4, case[0])
    y, ladj = flow.condition(contexts).call_and_ladj(x)
    assert (y - x).abs().max() > 0.1 and ladj.abs().max() > 0.01
    for i in range(4):
        assert_close((y[i], ladj[i]), by_loops(flow, contexts[i], x[i]), rtol=0, atol=1e-12)


@every_case
def test_jacobian(case):
    conditioned = strong(*case).condition(torch.randn(4, CONTEXT_DIM))
    x = torch.randn(4, case[0])
    ladj = conditioned.log_abs_det_jacobian(x, conditioned(x))
    assert_close(ladj, brute_force_ladj(conditioned, x), rtol=0, atol=1e-10)


@every_case
def test_metadata(case):
    check_metadata(strong(*case).condition(torch.randn(CONTEXT_DIM)))


@every_kind
def test_gradients(kind):
    """With respect to the input, and to all that the network gives: here, the context itself."""
    flow = ConditionalSylvester(3, nn.Identity(), 2, kind=kind)
    x = torch.randn(2, 3, requires_grad=True)
    params = torch.randn(2, sum(flow.param_dims), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, params: flow.condition(params)._transform(x), (x, params))


@every_kind
def test_float32(kind):
    flow = strong(8, 4, kind)
    context, x = torch.randn(6, CONTEXT_DIM), torch.randn(6, 8)
    expected = flow.condition(context).call_and_ladj(x)
    result = flow.float().condition(context.float()).call_and_ladj(x.float())
    assert result[0].dtype == result[1].dtype == torch.float32
    assert_close(result, tuple(part.float() for part in expected), rtol=0, atol=1e-4)


@every_kind
@pytest.mark.parametrize(
    "sample, batch, own",
    [
        ((), (), ()),
        ((4,), (), ()),
        ((4,), (3,), (3,)),
        ((4, 2), (3, 5), (3, 5)),
        ((2,), (3, 5), (3, 1)),
        ((), (3,), ()),
    ],
    ids=str,
)
def test_broadcasting(kind, sample, batch, own):
    """Against one sample at a time, with contexts of a batch shape of their own."""
    flow = strong(4, 2, kind)
    context, x = torch.randn(*own, CONTEXT_DIM), torch.randn(*sample, *batch, 4)
    y, ladj = flow.condition(context).call_and_ladj(x)
    assert y.shape == x.shape and ladj.shape == (*sample, *batch)
    contexts = context.expand(*x.shape[:-1], -1).reshape(-1, CONTEXT_DIM)
    for one, each, *expected in zip(contexts, x.view(-1, 4), y.view(-1, 4), ladj.view(-1), strict=True):
        assert_close(flow.condition(one).call_and_ladj(each), tuple(expected), rtol=0, atol=1e-12)


@every_case
def test_context_matters(case):
    flow, x = strong(*case), torch.randn(case[0])
    y, other = (flow.condition(torch.randn(CONTEXT_DIM))(x) for _ in range(2))
    assert (y - other).abs().max() > 1e-3


@every_case
def test_start_is_near_the_identity_and_can_be_left(case):
    input_dim, num_vectors, kind = case
    flow = conditional_sylvester(input_dim, CONTEXT_DIM, num_vectors, kind=kind)
    x = torch.randn(50, input_dim)
    y, ladj = flow.condition(torch.randn(50, CONTEXT_DIM)).call_and_ladj(x)
    assert 0 < (y - x).abs().max() < 0.2
    assert 0 < ladj.abs().max() < 0.2


@every_case
def test_start_can_be_left(case):
    """Gradients do not vanish at it, not even for a wide context that says nothing."""
    input_dim, num_vectors, kind = case
    flow = conditional_sylvester(input_dim, 400, num_vectors, kind=kind)
    y, ladj = flow.condition(torch.zeros(400)).call_and_ladj(torch.randn(1000, input_dim))
    (2 * y.square().sum(-1) - ladj).mean().backward()
    _, _, diagonal, _, _ = flow.nn.bias.grad.split(flow.param_dims)
    assert diagonal.abs().min() > 0.7


# Distributions


@every_kind
def test_samples_are_scored(kind):
    flow, context = strong(4, 2, kind), torch.randn(3, CONTEXT_DIM)
    flow_dist = distribution(flow, context)
    assert flow_dist.batch_shape == (3,) and flow_dist.event_shape == (4,)
    torch.manual_seed(1)
    y = flow_dist.rsample((2,))
    log_prob = flow_dist.log_prob(y)
    torch.manual_seed(1)
    x = base(3, 4).rsample((2,))
    expected, ladj = flow.condition(context).call_and_ladj(x)
    assert_close(y, expected, rtol=0, atol=0)
    assert_close(log_prob, base(3, 4).log_prob(x) - ladj, rtol=0, atol=1e-12)
    gradients, wanted = (torch.autograd.grad(v.sum(), flow.nn.weight)[0] for v in (log_prob, -ladj))
    assert_close(gradients, wanted, rtol=0, atol=1e-12)


def stack(kind, count=3, cache_size=1):
    return ConditionalComposeTransformModule([strong(4, 2, kind) for _ in range(count)], cache_size=cache_size)


@every_kind
@pytest.mark.parametrize("cache_size", [0, 1])
def test_composition(kind, cache_size):
    flows, context = stack(kind, cache_size=cache_size), torch.randn(3, CONTEXT_DIM)
    flow_dist = dist.ConditionalTransformedDistribution(base(3, 4), [flows]).condition(context)
    torch.manual_seed(1)
    y = flow_dist.rsample()
    log_prob = flow_dist.log_prob(y)
    torch.manual_seed(1)
    x = base(3, 4).rsample()
    expected = base(3, 4).log_prob(x)
    for flow in flows:
        x, ladj = flow.condition(context).call_and_ladj(x)
        expected = expected - ladj
    assert_close((y, log_prob), (x, expected), rtol=0, atol=1e-12)
    assert len(list(flows.parameters())) == 6
    log_prob.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in flows.parameters())


@every_kind
def test_svi(kind):
    """Of a posterior for each context: correlated, and known."""
    flows = ConditionalComposeTransformModule(
        [conditional_sylvester(2, 1, 1 if kind == "orthogonal" else 2, kind=kind) for _ in range(4)], cache_size=1
    )
    context = torch.tensor([[-1.0], [1.0]])
    scale_tril = torch.tensor([[[0.6, 0.0], [-0.4, 0.5]], [[0.6, 0.0], [0.4, 0.5]]])

    def model():
        with pyro.plate("data", 2):
            pyro.sample("z", dist.MultivariateNormal(context.expand(2, 2), scale_tril=scale_tril))

    def guide():
        pyro.module("flows", flows)
        with pyro.plate("data", 2):
            pyro.sample("z", dist.ConditionalTransformedDistribution(base(2), [flows]).condition(context))

    svi = SVI(model, guide, Adam({"lr": 0.04}), Trace_ELBO(num_particles=32, vectorize_particles=True))
    losses = torch.tensor([svi.step() for _ in range(150)])
    assert losses[:10].mean() > 2.0
    assert -0.05 < losses[-50:].mean() < 0.5 * losses[:10].mean()  # zero is the divergence that is left at best


# Cache


def make(count=3):
    flow, context = strong(4, 2, "orthogonal"), torch.randn(count, CONTEXT_DIM)
    return flow, context, flow.condition(context), torch.randn(count, 4)


def test_only_the_latest_pair_is_inverted():
    _, _, conditioned, x = make()
    y = conditioned(x)
    assert conditioned.inv(y) is x and conditioned(x) is y
    conditioned._call(torch.randn(3, 4))  # past the cache
    assert conditioned.inv(y) is x
    for foreign in (y.clone(), y.detach()):
        with pytest.raises(KeyError, match="output of its latest call"):
            conditioned.inv(foreign)
    conditioned(torch.randn(3, 4))
    with pytest.raises(KeyError, match="output of its latest call"):
        conditioned.inv(y)


def test_foreign_pairs_get_their_own_log_determinant():
    flow, context, conditioned, x = make()
    other = torch.randn(3, 4)
    ladj, other_ladj = (flow.condition(context).call_and_ladj(v)[1] for v in (x, other))
    y = conditioned(x)
    assert_close(conditioned.log_abs_det_jacobian(other, y), other_ladj, rtol=0, atol=0)
    assert_close(conditioned.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=0)
    assert_close(conditioned.inv.log_abs_det_jacobian(y, x), -ladj, rtol=0, atol=0)


def _parameter(flow, context, x, y):
    flow.nn.bias.add_(0.5)


def _context(flow, context, x, y):
    context.mul_(-1.0)


def _input(flow, context, x, y):
    x.mul_(2.0)


def _output(flow, context, x, y):
    y.mul_(2.0)


def _assign(flow, context, x, y):
    flow.load_state_dict(strong(4, 2, "orthogonal").state_dict(), assign=True)


def _network(flow, context, x, y):
    flow.nn = nn.Sequential(nn.Linear(CONTEXT_DIM, 5), nn.Linear(5, sum(flow.param_dims)))


@pytest.mark.parametrize("change", [_parameter, _context, _input, _output, _assign, _network])
def test_stale_pairs_are_dropped(change):
    flow, context, conditioned, x = make()
    with torch.no_grad():
        y = conditioned(x)
        old = y.clone()
        change(flow, context, x, y)
        with pytest.raises(KeyError):
            conditioned.inv(y)
        assert_close(conditioned(x), flow.condition(context)(x), rtol=0, atol=0)
        assert change is _output or (conditioned(x) - old).abs().max() > 1e-3


def test_gradients_follow_the_mode():
    """What was drawn without gradients is scored without them; a call of the same input has them again."""
    flow, context, _, x = make()
    for transform in (flow, stack("orthogonal"), stack("orthogonal", cache_size=0)):
        flow_dist = dist.ConditionalTransformedDistribution(base(3, 4), [transform]).condition(context)
        sample = flow_dist.sample()
        assert not flow_dist.log_prob(sample).requires_grad
    conditioned = flow.condition(context)
    with torch.no_grad():
        conditioned(x)
    assert conditioned(x).requires_grad
    with torch.inference_mode():
        flow_dist.log_prob(flow_dist.sample())


def test_second_backward():
    flow, _, conditioned, x = make()
    gradients = []
    for part in (0, 0, 1, 1):
        gradients.append(torch.autograd.grad(conditioned.call_and_ladj(x)[part].sum(), flow.nn.weight)[0])
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    assert_close(gradients[2], gradients[3], rtol=0, atol=0)
    y = conditioned(x)
    torch.autograd.grad(y.square().sum(), flow.nn.weight)
    assert conditioned.inv(y) is x
    conditioned.log_abs_det_jacobian(x, y).sum().backward()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_after_use(duplicate):
    flow, context, conditioned, x = make()
    y = conditioned(x)
    assert_close(duplicate(conditioned)(x), y, rtol=0, atol=0)
    assert_close(duplicate(flow).condition(context)(x), y, rtol=0, atol=0)
    assert conditioned.inv(y) is x


def test_clear_cache():
    _, _, conditioned, x = make()
    y = conditioned(x)
    conditioned.clear_cache()
    with pytest.raises(KeyError):
        conditioned.inv(y)


def test_state_dict():
    flow, context, conditioned, x = make()
    other = strong(4, 2, "orthogonal")
    other.load_state_dict(flow.state_dict())
    assert_close(other.condition(context)(x), conditioned(x), rtol=0, atol=0)


def test_conditioned_flows_are_freed():
    """Without the garbage collector: a cycle would keep the graph of each step of a training alive."""
    flows = stack("orthogonal")
    gc.collect()
    gc.disable()
    try:
        conditioned = dist.ConditionalTransformedDistribution(base(3, 4), list(flows)).condition(
            torch.randn(3, CONTEXT_DIM, requires_grad=True)
        )
        y = conditioned.rsample()
        conditioned.log_prob(y).sum().backward()
        references = [weakref.ref(thing) for thing in (y, conditioned, *conditioned.transforms)]
        del conditioned, y
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()


# Arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((4, 3, 5), "num_vectors must be at most input_dim, 4, .* got 5"),
        ((4, 3, 0), "num_vectors must be at least 1, but got 0"),
        ((0, 3), "input_dim must be at least 1, but got 0"),
        ((4, 0), "context_dim must be at least 1, but got 0"),
    ],
)
def test_bad_dimensions(arguments, message):
    with pytest.raises(ValueError, match=message):
        conditional_sylvester(*arguments)


def test_bad_kind():
    with pytest.raises(ValueError, match=r"kind must be one of \['householder', 'orthogonal'\], but got 'triangular'"):
        conditional_sylvester(4, 3, kind="triangular")


def test_bad_network():
    flow = ConditionalSylvester(4, nn.Linear(3, 17), num_vectors=2)
    with pytest.raises(ValueError, match=r"width 18, the sum of \[8, 4, 2, 2, 2\], but its last dimension is 17"):
        flow.condition(torch.randn(3))(torch.randn(4))


@pytest.mark.parametrize("shape", [(), (5,), (3, 5)])
def test_bad_input(shape):
    with pytest.raises(ValueError, match=r"input must have shape \(\*, 4\)"):
        make(count=3)[2](torch.randn(shape))


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 1, 4)])
def test_batches_that_do_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"context has batch shape \(3,\), which does not broadcast"):
        make(count=3)[2](torch.randn(shape))


@pytest.mark.parametrize("input_dim, expected", [(3, 3), (64, 8)])
def test_default_number_of_vectors(input_dim, expected):
    assert conditional_sylvester(input_dim, 2).num_vectors == expected


def test_log_determinant_of_saturated_diagonals_is_finite():
    # In float32 the tanh of 10 is 1, and -1 their product.
    params = [torch.full((n,), value) for n, value in zip((2, 1, 1, 1, 1), (1.0, 0.0, 10.0, -10.0, 0.0), strict=True)]
    flow = ConditionalSylvester(2, nn.Identity(), 1)
    transform = flow.condition(torch.cat(params).float())
    x = torch.zeros(2, dtype=torch.float32)
    assert transform.log_abs_det_jacobian(x, transform(x)).isfinite()
