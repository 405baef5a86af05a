# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Ways in which a cache of the latest pair can go wrong; most of them do, in other flows."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transform_checks import CONDITIONAL, CONTEXT_DIM, MODULES, QUICK, TIGHT, base, draw

from pyro_hollow import Solver, hollow_cnf

# The cache is the same for all flows: one of either kind is enough.
KINDS = {"hollow": MODULES["leave-one-out"], "free-form": MODULES["free-form"]}
CONDITIONAL_KINDS = {"hollow": CONDITIONAL["leave-one-out"], "free-form": CONDITIONAL["free-form"]}

every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
every_conditional_kind = pytest.mark.parametrize("make", CONDITIONAL_KINDS.values(), ids=CONDITIONAL_KINDS)


def distribution(flow):
    return dist.TransformedDistribution(base(flow.nn.input_dim), [flow])


def fresh(flow):
    """The same flow without a past."""
    return copy.deepcopy(flow)


def frozen(flow):
    for parameter in flow.nn.parameters():
        parameter.requires_grad_(False)
    return flow


def parameter_gradients(value, flow):
    return torch.autograd.grad(value.sum(), list(flow.nn.parameters()))


@pytest.fixture
def solves(monkeypatch):
    """A list that grows by one with each solve."""
    calls = []
    integrate = Solver.integrate_with_divergence

    def counted(self, *args):
        calls.append(self)
        return integrate(self, *args)

    monkeypatch.setattr(Solver, "integrate_with_divergence", counted)
    return calls


# What it is for


@every_kind
def test_one_solve_for_a_sample_and_its_score(make, solves):
    flow = make(2, solver=TIGHT)
    loc = torch.zeros(2, requires_grad=True)

    def sample_and_score(flow):
        torch.manual_seed(0)
        flow_dist = dist.TransformedDistribution(dist.Normal(loc, 1.0).to_event(1), [flow])
        x = flow_dist.rsample((3,))
        log_prob = flow_dist.log_prob(x)
        gradients = torch.autograd.grad(
            (x.cos() + log_prob.unsqueeze(-1)).sum(), [loc, *flow.nn.parameters()], allow_unused=True
        )
        return x, log_prob, gradients

    cached = sample_and_score(flow)
    assert len(solves) == 1
    uncached = sample_and_score(flow.with_cache(0))
    assert len(solves) > 2
    assert cached[2][0].abs().min() > 0
    assert_close(cached, uncached, rtol=0, atol=1e-6)


@every_kind
def test_one_solve_for_the_score_of_data(make, solves):
    flow = make(2)
    flow_dist = distribution(flow)
    for count in (1, 2):
        assert flow_dist.log_prob(draw(flow, 3)).requires_grad
        assert len(solves) == count


@every_kind
def test_one_solve_for_call_and_log_determinant(make, solves):
    flow = make(2)
    x = draw(flow, 3)
    y = flow(x)
    assert flow(x) is y and flow.inv(y) is x
    flow.log_abs_det_jacobian(x, y)
    flow.inv.log_abs_det_jacobian(y, x)
    flow.call_and_ladj(x)
    assert len(solves) == 1


@every_conditional_kind
def test_one_solve_for_a_conditional(make, solves):
    cond = make(2)
    context = torch.randn(3, CONTEXT_DIM, requires_grad=True)
    flow_dist = dist.ConditionalTransformedDistribution(base(3, 2), [cond]).condition(context)
    flow_dist.log_prob(flow_dist.rsample()).sum().backward()
    assert len(solves) == 1
    assert context.grad.abs().min() > 0


def test_without_cache_nothing_is_remembered(solves):
    flow = KINDS["hollow"](2).with_cache(0)
    x = draw(flow, 3)
    flow(x), flow(x)
    assert len(solves) == 2


# Stale pairs


@every_kind
def test_scores_follow_an_optimizer(make):
    flow = make(2)
    flow_dist = distribution(flow)
    x = draw(flow, 3)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.1)
    before = flow_dist.log_prob(x)
    before.mean().backward()
    flow_dist.log_prob(x)  # fills the cache again
    optimizer.step()
    after = flow_dist.log_prob(x)
    assert (after - before).abs().max() > 1e-3
    assert_close(after, distribution(fresh(flow)).log_prob(x), rtol=0, atol=0)


@every_kind
def test_samples_follow_an_optimizer(make):
    flow = make(2)
    x = draw(flow, 3)
    y = flow(x).detach()
    with torch.no_grad():
        next(flow.parameters()).add_(0.5)
    assert (flow(x) - y).abs().max() > 1e-3
    assert_close(flow(x), fresh(flow)(x), rtol=0, atol=0)


def _input_in_place(flow, x, y, make):
    x.mul_(2.0)


def _output_in_place(flow, x, y, make):
    y.mul_(2.0)


def _context_in_place(flow, x, y, make):
    flow.context.mul_(-1.0)


def _load(flow, x, y, make):
    flow.nn.load_state_dict(make(2).nn.state_dict())


def _other_context(flow, x, y, make):
    flow.context = -flow.context


def _other_solver(flow, x, y, make):
    flow.solver = Solver("euler", options={"step_size": 0.5})


def _other_options(flow, x, y, make):
    flow.solver = replace(flow.solver, options={"step_size": 1.0})


def _other_time(flow, x, y, make):
    flow.time = 0.5


# Other parameters, which have been written to as often as the old ones were.
def _load_and_assign(flow, x, y, make):
    flow.nn.load_state_dict(make(2).nn.state_dict(), assign=True)


def _other_network(flow, x, y, make):
    flow.nn = make(2).nn


IN_PLACE = {
    "input": _input_in_place,
    "output": _output_in_place,
    "context": _context_in_place,
    "load_state_dict": _load,
}
REPLACED = {
    "context": _other_context,
    "solver": _other_solver,
    "options": _other_options,
    "time": _other_time,
    "load_state_dict": _load_and_assign,
    "network": _other_network,
}
CHANGES = {f"{name} in place": change for name, change in IN_PLACE.items()}
CHANGES |= {f"{name} replaced": change for name, change in REPLACED.items()}


def check_change(change, direction):
    make = CONDITIONAL_KINDS["hollow"]
    flow = make(2).condition(torch.randn(3, CONTEXT_DIM))
    x = draw(flow, 3)
    y, ladj = flow.call_and_ladj(x)
    with torch.no_grad():
        change(flow, x, y, make)
    if direction == "forward":
        stale, result, expected = (y, ladj), flow.call_and_ladj(x), fresh(flow).call_and_ladj(x)
    else:
        stale, result, expected = (x,), (flow.inv(y),), (fresh(flow).inv(y),)
    assert not all(map(torch.equal, stale, expected))
    assert_close(result, expected, rtol=0, atol=0)


both_directions = pytest.mark.parametrize("direction", ["forward", "inverse"])


@both_directions
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(change, gradients, direction):
    with torch.set_grad_enabled(gradients):
        check_change(change, direction)


# Inference tensors do not count how often they were written to.
@both_directions
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_changes_in_place_are_noticed_in_inference_mode(change, direction):
    with torch.inference_mode():
        check_change(change, direction)


@every_kind
def test_change_of_type_is_noticed(make):
    flow = make(2)
    x = draw(flow, 3)
    y = flow(x)
    flow.to(torch.float32)
    for evaluate in (flow, flow.inv):
        with pytest.raises(ValueError, match="torch.float32"):
            evaluate(x if evaluate is flow else y)


def test_change_of_divergence_is_noticed():
    flow = MODULES["free-form"](2)
    x = draw(flow, 3)
    exact = flow.call_and_ladj(x)[1]
    flow.divergence = "hutchinson"
    assert (flow.call_and_ladj(x)[1] - exact).abs().max() > 1e-3
    flow.divergence = "exact"
    assert_close(flow.call_and_ladj(x)[1], exact, rtol=0, atol=0)


# Wrong pairs


@every_kind
def test_foreign_pairs(make, solves):
    """Log-determinants of pairs that are not the latest one, and do not replace it."""
    flow = make(2)
    foreign, x = draw(flow, 3), draw(flow, 3)
    foreign_y, foreign_ladj = fresh(flow).call_and_ladj(foreign)
    y, ladj = flow.call_and_ladj(x)
    flow._call(foreign)
    flow._inverse(foreign_y)
    assert_close(flow.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=0)
    assert_close(flow.log_abs_det_jacobian(foreign, foreign_y), foreign_ladj, rtol=0, atol=0)
    assert_close(flow.log_abs_det_jacobian(foreign, y), foreign_ladj, rtol=0, atol=0)
    assert_close(flow.log_abs_det_jacobian(x.clone(), y), ladj, rtol=0, atol=0)
    count = len(solves)
    assert_close(flow.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=0)
    assert len(solves) == count


@every_kind
def test_foreign_values_are_scored(make):
    """Flows that can be inverted only from their cache fail here with a KeyError."""
    flow = make(2, solver=TIGHT)
    flow_dist = distribution(flow)
    x = flow_dist.sample((3,))
    expected = flow_dist.log_prob(x)
    flow_dist.sample((5,))
    assert_close(flow_dist.log_prob(x.clone()), expected, rtol=0, atol=1e-6)
    assert_close(distribution(fresh(flow)).log_prob(x), expected, rtol=0, atol=1e-6)


# Gradients


@every_kind
def test_score_of_a_sample_has_gradients(make):
    flow = make(2, solver=TIGHT)
    flow_dist = distribution(flow)
    x = flow_dist.sample((3,))
    log_prob = flow_dist.log_prob(x)
    assert log_prob.requires_grad
    other = fresh(flow)
    expected = parameter_gradients(distribution(other).log_prob(x), other)
    assert_close(parameter_gradients(log_prob, flow), expected, rtol=0, atol=1e-6)


@every_kind
def test_second_backward(make):
    """Maximum likelihood on the same tensor, without clearing the cache: with and without a step in between."""
    flow = make(2)
    flow_dist = distribution(flow)
    x = draw(flow, 3)
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e-2)
    gradients = []
    for step in (False, True, False):
        flow.zero_grad()
        (-flow_dist.log_prob(x).mean()).backward()
        gradients.append([parameter.grad.clone() for parameter in flow.parameters()])
        if step:
            optimizer.step()
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    other = fresh(flow)
    expected = parameter_gradients(-distribution(other).log_prob(x) / 3, other)
    assert_close(gradients[2], list(expected))


@every_kind
@pytest.mark.parametrize("part", ["value", "log-determinant"])
def test_second_backward_through_one_part(make, part):
    flow = make(2)
    x = draw(flow, 3)
    for _ in range(2):
        y, ladj = flow.call_and_ladj(x)
        parameter_gradients(y if part == "value" else ladj, flow)
    y = y.detach()
    for _ in range(2):
        x = flow.inv(y)
        parameter_gradients(x if part == "value" else flow.log_abs_det_jacobian(x, y), flow)


def check_gradient(log_prob, wanted, flow, x):
    """Of a score, against that by a flow that has no pair to reuse."""
    gradient = torch.autograd.grad(log_prob.sum(), wanted, allow_unused=True, materialize_grads=True)
    uncached = flow.with_cache(0)
    flow_dist = dist.TransformedDistribution(base(*x.shape), [uncached])
    expected = torch.autograd.grad(flow_dist.log_prob(x).sum(), wanted)
    assert max(part.abs().max() for part in expected) > 0.01
    assert_close(gradient, expected, rtol=0, atol=1e-6)


@every_kind
def test_gradients_that_are_wanted_only_later_reach_a_sample(make):
    flow = frozen(make(2, solver=TIGHT))
    flow_dist = distribution(flow)
    x = flow_dist.rsample((3,))
    flow_dist.log_prob(x)
    x.requires_grad_()
    check_gradient(flow_dist.log_prob(x), [x], flow, x)


@every_kind
def test_gradients_that_are_wanted_only_later_reach_parameters(make):
    flow = frozen(make(2, solver=TIGHT))
    flow_dist = distribution(flow)
    x = flow_dist.rsample((3,))
    flow_dist.log_prob(x)
    wanted = [parameter.requires_grad_() for parameter in flow.parameters()]
    check_gradient(flow_dist.log_prob(x), wanted, flow, x)


@every_conditional_kind
def test_gradients_that_are_wanted_only_later_reach_a_context(make):
    context = torch.randn(3, CONTEXT_DIM)
    flow = frozen(make(2, solver=TIGHT).condition(context))
    flow_dist = dist.TransformedDistribution(base(3, 2), [flow])
    x = flow_dist.rsample()
    flow_dist.log_prob(x)
    context.requires_grad_()
    check_gradient(flow_dist.log_prob(x), [context], flow, x)


@every_kind
def test_gradients_that_are_off_stay_off(make):
    flow = make(2)
    flow_dist = distribution(flow)
    x = flow_dist.rsample((3,))
    with torch.no_grad():
        assert not flow_dist.log_prob(x).requires_grad


@every_kind
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(make, mode):
    flow = make(2, solver=TIGHT)
    flow_dist = distribution(flow)
    with mode():
        sample = flow_dist.sample((3,))
        log_prob = flow_dist.log_prob(sample)
        assert not log_prob.requires_grad
        assert_close(flow_dist.log_prob(sample.clone()), log_prob, rtol=0, atol=1e-6)
    # And back: an ordinary tensor of the same values has gradients again.
    x = sample.clone()
    later = flow_dist.log_prob(x)
    assert_close(later.detach(), log_prob.clone(), rtol=0, atol=1e-6)
    check_gradient(later, list(flow.parameters()), flow, x)


# Memory


def _nothing(x, log_prob):
    pass


def _backward(x, log_prob):
    log_prob.sum().backward()


def _backward_through_both(x, log_prob):
    (x.sum() + log_prob.sum()).backward()


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@every_conditional_kind
@pytest.mark.parametrize("use", [_nothing, _backward, _backward_through_both])
@pytest.mark.parametrize("adjoint", [False, True], ids=["direct", "adjoint"])
def test_conditioned_flows_are_freed(make, use, adjoint):
    """Without the garbage collector: a cycle would keep the graph of each step of a training alive."""
    cond = make(2, solver=replace(QUICK, adjoint=adjoint))
    flow_dist = dist.ConditionalTransformedDistribution(base(3, 2), [cond])
    references = []
    for _ in range(3):
        conditioned = flow_dist.condition(torch.randn(3, CONTEXT_DIM, requires_grad=True))
        x = conditioned.rsample()
        log_prob = conditioned.log_prob(x)
        use(x, log_prob)
        transform = conditioned.transforms[0]
        ladj = transform.call_and_ladj(torch.zeros(3, 2))[1]
        tensors = [x, log_prob, ladj, transform.context]
        references += [weakref.ref(thing) for thing in [*tensors, transform, conditioned, transform.inv]]
        del conditioned, x, log_prob, transform, ladj, tensors
    assert [reference() for reference in references] == [None] * len(references)


@pytest.mark.usefixtures("without_collector")
@every_kind
@pytest.mark.parametrize("use", [_nothing, _backward])
def test_samples_are_freed(make, use):
    """A flow keeps its latest pair, until a backward pass or the next pair, and nothing after its own end."""
    flow = make(2)
    references = []
    for _ in range(3):
        flow_dist = distribution(flow)
        x = flow_dist.rsample((3,))
        log_prob = flow_dist.log_prob(x)
        use(x, log_prob)
        references += [weakref.ref(x), weakref.ref(log_prob)]
        del flow_dist, x, log_prob
    alive = [reference() is not None for reference in references]
    assert alive == [False] * 4 + [use is _nothing, False]
    references.append(weakref.ref(flow))
    del flow
    assert [reference() for reference in references] == [None] * len(references)


# Copies and clearing


@every_kind
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))])
def test_copies_after_use(make, duplicate, solves):
    flow = make(2)
    flow_dist = distribution(flow)
    x = flow_dist.rsample((3,))
    flow_dist.log_prob(x)
    twin = duplicate(flow)
    assert len(solves) == 1
    assert flow_dist.log_prob(x).requires_grad and len(solves) == 1  # the original has lost nothing
    twin(draw(flow, 3))
    assert flow.inv(x) is not None and len(solves) == 2  # the pairs are separate


@every_kind
def test_siblings_share_the_network_only(make):
    flow = make(2)
    sibling = flow.with_cache(0).with_cache(1)
    x = draw(flow, 3)
    y = flow(x)
    sibling(draw(flow, 3))
    assert flow.inv(y) is x
    with torch.no_grad():
        next(flow.parameters()).add_(0.5)
    assert_close(sibling(x), flow(x), rtol=0, atol=0)


def _clear_flow(flow_dist):
    flow_dist.transforms[0].clear_cache()


def _clear_distribution(flow_dist):
    flow_dist.clear_cache()


@every_kind
@pytest.mark.parametrize("clear", [_clear_flow, _clear_distribution])
def test_clear_cache(make, clear, solves):
    flow_dist = distribution(make(2))
    x = flow_dist.rsample((3,))
    clear(flow_dist)
    assert flow_dist.transforms[0].inv(x) is not None
    assert len(solves) == 2


def test_clear_cache_after_writing_past_autograd():
    """The documented limit of the cache."""
    flow = KINDS["hollow"](2)
    x = draw(flow, 3)
    flow(x)
    nn.init.normal_(next(flow.parameters()).data)
    flow.clear_cache()
    assert_close(flow(x), fresh(flow)(x), rtol=0, atol=0)


def test_solvers_are_told_apart_by_identity():
    # Options may hold tensors, which do not compare to one truth value.
    flow, x = hollow_cnf(2), torch.randn(3, 2)
    for _ in range(2):
        flow.solver = Solver(options={"jump_t": torch.tensor([0.3, 0.6])})
        flow(x)
        stats = flow.last_solve
        flow(x)
        assert flow.last_solve is stats
