# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The rules of the cache, which are the same for all flows that have it: continuous, standardised, in closed form."""

import copy
import gc
import pickle
import weakref

import pyro.distributions as dist
import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close
from transform_checks import CONTEXT_DIM, base

from pyro_hollow.ode import Solver
from pyro_hollow.transforms import (
    ConditionedStandardizedFlow,
    ConditionedSylvester,
    conditional_hollow_cnf,
    conditional_low_rank_linear,
    conditional_sylvester,
    standardized,
)

SHAPE = (4, 3)
FINE = Solver("rk4", options={"step_size": 0.1})


def of_context(flow):
    with torch.no_grad():
        for parameter in flow.parameters():  # most are close to the identity at first
            parameter.add_(0.1 * torch.randn_like(parameter))
    return flow.condition(torch.randn(SHAPE[0], CONTEXT_DIM))


def make_standardized():
    data, contexts = 1.0 + 2.0 * torch.randn(9, SHAPE[-1]), torch.randn(9, CONTEXT_DIM)
    return of_context(standardized(conditional_hollow_cnf(SHAPE[-1], CONTEXT_DIM, solver=FINE), data, contexts))


TRANSFORMS = {
    "hollow": lambda: of_context(conditional_hollow_cnf(SHAPE[-1], CONTEXT_DIM, solver=FINE)),
    "standardised": make_standardized,
    "low rank": lambda: of_context(conditional_low_rank_linear(SHAPE[-1], CONTEXT_DIM)),
    "Sylvester": lambda: of_context(conditional_sylvester(SHAPE[-1], CONTEXT_DIM)),
}
every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
#: Those with an inverse of their own.
every_invertible = pytest.mark.parametrize("name", sorted(set(TRANSFORMS) - {"Sylvester"}))


def watched(transform):
    """All tensors that decide the result."""
    inner = watched(transform.flow) if isinstance(transform, ConditionedStandardizedFlow) else []
    return [*inner, *(tensor for tensor in transform._tensors() if tensor.is_floating_point())]


def learnable(make):
    transform = make()
    watched(transform)[0].requires_grad_()
    return transform


@every_transform
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_changes_in_place_are_noticed(make, gradients):
    transform, x = make(), torch.randn(SHAPE)
    for tensor in (*watched(transform), x):
        with torch.set_grad_enabled(gradients):
            y, ladj = transform.call_and_ladj(x)
            assert transform(x) is y and transform.inv(y) is x
            assert_close(transform.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=0)
            with torch.no_grad():
                tensor.mul_(1.1).add_(0.01)
            assert transform(x) is not y
            assert_close(transform.call_and_ladj(x), copy.deepcopy(transform).call_and_ladj(x), rtol=0, atol=0)


@every_transform
def test_changed_outputs_are_not_inverted_from_the_cache(make):
    transform, x = make(), torch.randn(SHAPE)
    with torch.no_grad():
        y = transform(x)
        y.mul_(1.01)
        if isinstance(transform, ConditionedSylvester):
            with pytest.raises(KeyError):
                transform.inv(y)
        else:
            assert_close(transform.inv(y), transform._inverse(y), rtol=0, atol=0)


@every_transform
def test_changes_of_type_are_noticed(make):
    transform, x = make(), torch.randn(SHAPE)
    for tensor in transform._tensors():
        if tensor.is_floating_point():
            transform(x)
            assert transform._lookup() is not None
            data = tensor.data
            tensor.data = data.float()  # as Module.to() does
            assert transform._lookup() is None
            tensor.data = data


@every_transform
def test_a_pair_serves_one_grad_mode(make):
    transform, x = learnable(make), torch.randn(SHAPE)
    with torch.no_grad():
        y = transform(x)
        assert not y.requires_grad
    assert transform(x).requires_grad
    y = transform(x)
    with torch.no_grad():
        assert not any(part.requires_grad for part in transform.call_and_ladj(x))


@every_transform
def test_gradients_that_are_wanted_only_later(make):
    transform, x = make(), torch.randn(SHAPE)
    for tensor in watched(transform):
        tensor.requires_grad_(False)
    assert not transform(x).requires_grad
    for tensor in (watched(transform)[0], x):
        tensor.requires_grad_()
        assert transform(x).requires_grad
        tensor.requires_grad_(False)


@every_transform
def test_inference_tensors_are_not_used_again(make):
    """Their changes cannot be noticed."""
    transform, outer = make(), torch.randn(SHAPE)
    with torch.inference_mode():
        for x in (torch.randn(SHAPE), outer):
            y, ladj = transform.call_and_ladj(x)
            assert transform(x) is not y or not (x.is_inference() or y.is_inference())
            assert_close(transform.log_abs_det_jacobian(x, y), ladj)
        x = torch.randn(SHAPE)
        y = transform(x).clone()
        x.mul_(2.0)
        assert (transform(x) - y).abs().max() > 0.1
    assert torch.equal(transform(outer), transform(outer.clone()))


@every_transform
def test_scores_in_inference_mode(make):
    transform = make()
    flow_dist = dist.TransformedDistribution(base(*SHAPE), [transform])
    with torch.inference_mode():
        y = flow_dist.sample()
        log_prob = flow_dist.log_prob(y)
    if not isinstance(transform, ConditionedSylvester):
        assert_close(flow_dist.log_prob(y.clone()), log_prob.clone(), rtol=1e-4, atol=1e-4)


@every_transform
def test_results_do_not_leak_out_of_a_transform_of_functions(make):
    transform, x = learnable(make), torch.randn(SHAPE)
    grad(lambda scale: (scale * transform(x)).sum())(torch.tensor(1.0))
    vmap(lambda scale: scale * transform(x))(torch.ones(2))
    y, ladj = transform.call_and_ladj(x)
    assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, (y, ladj)))
    (y.sum() + ladj.sum()).backward()


@every_transform
def test_samples_are_scored_within_a_transform_of_functions(make):
    transform, x = make(), torch.randn(SHAPE)
    flow_dist = dist.TransformedDistribution(base(*SHAPE), [transform])

    def score(scale):
        return flow_dist.log_prob(transform(x if scale is None else scale * x)).sum()

    expected = score(None)
    for value in (score(None), vmap(lambda scale: score(None) * scale)(torch.ones(2))[0], score(torch.tensor(1.0))):
        assert_close(value, expected, rtol=1e-4, atol=1e-4)
    assert grad(score)(torch.tensor(1.0)).abs() > 1e-3


@every_transform
@pytest.mark.parametrize("part", [0, 1], ids=["value", "log-determinant"])
def test_second_backward(make, part):
    transform, x = learnable(make), torch.randn(SHAPE, requires_grad=True)
    gradients = []
    for _ in range(2):
        result = transform.call_and_ladj(x)[part]
        if result.requires_grad:
            gradients.append(torch.autograd.grad(result.sum(), watched(transform)[0], allow_unused=True)[0])
    assert len(gradients) == 0 or gradients[0] is None or torch.equal(*gradients)


@every_invertible
def test_data_scored_once_are_evaluated_anew(name):
    """Parameters may have changed unseen."""
    transform, y = TRANSFORMS[name](), 3.0 * torch.randn(SHAPE)
    flow_dist = dist.TransformedDistribution(base(*SHAPE), [transform])
    with torch.no_grad():
        before = flow_dist.log_prob(y)
        for tensor in watched(transform):
            tensor.data.mul_(1.1)
        assert (flow_dist.log_prob(y) - before).abs().max() > 1e-4


@every_transform
def test_inverse_and_its_log_determinant(make):
    transform, x = make(), torch.randn(SHAPE)
    y, ladj = transform.call_and_ladj(x)
    assert_close(transform.inv.call_and_ladj(y), (x, -ladj), rtol=0, atol=0)
    if not isinstance(transform, ConditionedSylvester):
        assert_close(transform.inv.call_and_ladj(y.clone()), (x, -ladj), rtol=1e-3, atol=1e-3)


@every_transform
def test_copies_and_siblings(make):
    transform, x = make(), torch.randn(SHAPE)
    y = transform(x)
    uncached = transform.with_cache(0)
    assert transform.with_cache(1) is transform and uncached.with_cache(0) is uncached
    assert uncached(x) is not uncached(x)
    for twin in (copy.copy(transform), copy.deepcopy(transform), pickle.loads(pickle.dumps(transform)), uncached):
        assert twin(x) is not y
        assert_close(twin(x), y, rtol=0, atol=0)
    assert transform(x) is y
    transform.clear_cache()
    assert transform(x) is not y
    with pytest.raises(ValueError, match="cache_size must be 0 or 1, but got 2"):
        transform.with_cache(2)


@every_transform
def test_nothing_is_kept_alive(make):
    gc.collect()
    gc.disable()
    try:
        transform = learnable(make)
        x = torch.randn(SHAPE, requires_grad=True)
        y, ladj = transform.call_and_ladj(x)
        (transform.inv(y).sum() + y.sum() + transform.log_abs_det_jacobian(x, y).sum()).backward()
        references = [weakref.ref(thing) for thing in (x, y, ladj, transform, transform.inv)]
        del x, y, ladj, transform
        assert [reference() for reference in references] == [None] * len(references)
    finally:
        gc.enable()
