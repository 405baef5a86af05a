# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""What ``regularize=True`` integrates along, against Jacobians by brute force along a path that is solved tightly."""

import copy
import inspect
import itertools
import pickle
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.func import jacrev
from torch.testing import assert_close
from transform_checks import CONTEXT_DIM, QUICK, TIGHT, base, draw

from pyro_hollow import (
    ConditionalHollowCNF,
    ConditionalHollowNN,
    HollowCNF,
    HollowNN,
    Solver,
    conditional_hollow_cnf,
    hollow_cnf,
)
from pyro_hollow.nn import BoundTransformer, Transformer
from pyro_hollow.nn.conditioner import CONDITIONERS
from pyro_hollow.transforms.hollow_cnf import Regularization

MEDIUM = Solver(rtol=1e-6, atol=1e-6)


def strong(flow):
    """Fresh flows are close to the identity, where all integrals are close to 0."""
    if hasattr(flow.nn.transformer, "output_weight"):
        with torch.no_grad():
            flow.nn.transformer.output_weight.normal_(std=0.25)
    return flow


def module():
    return nn.Sequential(nn.Linear(2 + 6, 8), nn.Tanh(), nn.Linear(8, 1))


class Mixing(Transformer):
    """The field f_i = w sin(x_i) (1 + sum_{j != i} x_j) + h_i1, most of whose hollow part is no path through h."""

    def __init__(self, input_dim, hidden_dim):
        super().__init__(input_dim, hidden_dim)
        self.weight = nn.Parameter(torch.tensor(0.7))

    def bind(self, context=None):
        return BoundMixing(self.weight)


class BoundMixing(BoundTransformer):
    def __init__(self, weight):
        self.weight, self.tensors = weight, (weight,)

    def derivatives(self, t, x, h, order):
        others = self.weight * (1 + x.sum(-1, keepdim=True) - x)
        return (x.sin() * others + h[..., 0], x.cos() * others)[: order + 1]


def unconditional(d, **kwargs):
    return strong(hollow_cnf(d, [8, 6], regularize=True, **kwargs))


def conditioned(d, batch_shape=(1,), **kwargs):
    flow = strong(conditional_hollow_cnf(d, CONTEXT_DIM, [8, 6], regularize=True, **kwargs))
    return flow.condition(torch.randn(*batch_shape, CONTEXT_DIM))


CASES = {name: partial(unconditional, conditioner=name) for name in CONDITIONERS}
CASES |= {f"conditional {name}": partial(conditioned, conditioner=name) for name in CONDITIONERS}
CASES["module of the user"] = lambda d, **kwargs: unconditional(d, transformer=module(), **kwargs)
CASES["conditional, module of the user"] = lambda d, **kwargs: conditioned(d, transformer=module(), **kwargs)
CASES["transformer that mixes coordinates"] = lambda d, **kwargs: unconditional(d, transformer=Mixing(d, 6), **kwargs)
CASES["short time, silu"] = partial(unconditional, time=0.6, activation="silu")
CASES["constructors"] = lambda d, **kwargs: strong(HollowCNF(HollowNN(d, [8, 6]), regularize=True, **kwargs))

every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES)
both_directions = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
KINDS = {"unconditional": CASES["grouped"], "conditional": CASES["conditional grouped"]}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def jacobians(flow, x, nodes=12):
    """Weights of a quadrature in time, and f and its Jacobian there, with shapes (n, d) and (n, d, d)."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    field = flow.nn.bind(flow.context)
    state, before = x, 0.0
    for point, weight in zip(points, weights, strict=True):
        time = flow.time * (1 + point) / 2
        with torch.no_grad():
            state = TIGHT.integrate(field, state, before, time).state
        t, before = torch.tensor(time), time
        # Samples do not interact, so the sum over them loses nothing.
        jacobian = jacrev(lambda x, t=t: field(t, x).sum(0))(state).transpose(0, 1)
        yield flow.time * weight / 2, field(t, state).detach(), jacobian.detach()


def brute_force(flow, x):
    kinetic = diagonal = hollow = 0.0
    for weight, f, jacobian in jacobians(flow, x):
        own = jacobian.diagonal(dim1=-2, dim2=-1)
        kinetic = kinetic + weight * f.square().sum(-1)
        diagonal = diagonal + weight * own.square().sum(-1)
        hollow = hollow + weight * (jacobian - own.diag_embed()).square().sum((-2, -1))
    return Regularization(kinetic, diagonal, hollow)


def call(flow, x, inverse=False):
    """The result of a call from the start or the end of the path from x."""
    if not inverse:
        return flow.call_and_ladj(x)
    with torch.no_grad():
        y = flow._call(x)
    return flow.inv.call_and_ladj(y)


# Values


@every_case
def test_values(make):
    flow = make(3, solver=TIGHT)
    x = draw(flow, 4)
    flow(x)
    found, expected = flow.regularization, brute_force(flow, x)
    assert expected.kinetic.min() > 1e-3 and expected.diagonal.min() > 1e-5 and expected.hollow.min() > 1e-6
    assert_close(found.kinetic, expected.kinetic, rtol=1e-6, atol=1e-8)
    assert_close(found.diagonal, expected.diagonal, rtol=1e-6, atol=1e-8)
    assert (found.hollow > 0).all()


@every_case
def test_in_two_dimensions_a_probe_of_signs_is_exact_even_backward(make):
    flow = make(2, solver=TIGHT)
    x = draw(flow, 4)
    call(flow, x, inverse=True)
    assert_close(flow.regularization, brute_force(flow, x), rtol=1e-6, atol=1e-8)


@both_directions
@every_kind
def test_values_in_single_precision(make, inverse):
    flow = make(2, solver=MEDIUM)
    x = draw(flow, 4)
    expected = brute_force(flow, x)
    flow.nn.float()
    if flow.context is not None:
        flow.context = flow.context.float()
    torch.set_default_dtype(torch.float32)
    call(flow, x.float(), inverse)
    assert all(part.dtype == torch.float32 for part in flow.regularization)
    found = Regularization(*(part.double() for part in flow.regularization))
    assert_close(found, expected, rtol=2e-4, atol=1e-6)


@every_case
def test_hollow_part_is_unbiased(make):
    flow = make(4, solver=QUICK)
    x = draw(flow, 1)
    with torch.no_grad():
        flow(x.expand(2000, 4).contiguous())
        hollow = flow.regularization.hollow
    exact = brute_force(flow, x).hollow.item()
    error = hollow.std().item() / 2000**0.5
    assert abs(hollow.mean().item() - exact) < 4 * error + 1e-3 * exact
    # An estimate that is too certain would be one of the same probe for all samples, or none at all.
    assert 4 * error < 0.2 * exact and len(hollow.unique()) > 2


def test_each_estimate_is_that_of_one_probe_for_the_whole_path():
    flow = unconditional(3, solver=MEDIUM)
    x = draw(flow, 1)
    with torch.no_grad():
        call(flow, x.expand(200, 3).contiguous())
        found = flow.regularization.hollow
    possible = []
    for signs in itertools.product([-1.0, 1.0], repeat=2):
        probe, total = torch.tensor([1.0, *signs]), 0.0
        for weight, _, jacobian in jacobians(flow, x):
            hollow = jacobian - jacobian.diagonal(dim1=-2, dim2=-1).diag_embed()
            total = total + weight * (probe @ hollow).square().sum(-1)
        possible.append(total)
    distance = (found - torch.cat(possible).unsqueeze(-1)).abs()
    assert distance.min(0).values.max() < 1e-4 * found.max()
    assert distance.argmin(0).unique().numel() == 4


def test_probes_are_new_in_each_call():
    flow = unconditional(4, solver=QUICK)
    x = draw(flow, 16)
    values = []
    for _ in range(2):
        flow.clear_cache()
        flow(x)
        values.append(flow.regularization)
    assert_close(values[0].kinetic, values[1].kinetic, rtol=0, atol=0)
    assert (values[0].hollow - values[1].hollow).abs().max() > 1e-3


@both_directions
@every_kind
def test_value_and_log_determinant_are_the_same(make, inverse):
    flow = make(3, solver=MEDIUM)
    plain = copy.deepcopy(flow)
    plain.regularize = False
    x = draw(flow, 5)
    assert_close(call(flow, x, inverse), call(plain, x, inverse), rtol=0, atol=2e-5)
    assert flow.last_solve.nfe > 0
    plain.solver = flow.solver = QUICK
    assert_close(flow._call(x), plain._call(x), rtol=0, atol=1e-12)


@every_case
def test_of_one_coordinate(make):
    flow = make(1, solver=TIGHT)
    x = draw(flow, 5).requires_grad_()
    flow(x)
    found, expected = flow.regularization, brute_force(flow, x.detach())
    assert (found.hollow == 0).all() and (expected.hollow == 0).all()
    assert_close(found, expected, rtol=1e-6, atol=1e-9)
    found.penalty().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().min() > 0


@both_directions
@pytest.mark.parametrize("batch_shape", [(), (1,), (5,), (2, 3), (0,), (2, 0)], ids=str)
@every_kind
def test_batch_shapes(make, batch_shape, inverse):
    flow = make(3, solver=QUICK)
    if flow.context is not None:
        flow.context = flow.context.squeeze(0)
    x = draw(flow, *batch_shape)
    call(flow, x, inverse)
    found = flow.regularization
    assert found.penalty().shape == batch_shape
    assert all(part.shape == batch_shape and (part > 0).all() for part in found)
    expected = brute_force(flow, x.reshape(-1, 3)) if x.numel() else found
    assert_close(found.kinetic, expected.kinetic.reshape(batch_shape), rtol=1e-2, atol=1e-6)
    assert_close(found.diagonal, expected.diagonal.reshape(batch_shape), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("context_shape", [(), (1,), (4,), (2, 1), (2, 4)], ids=str)
def test_each_sample_has_its_context(context_shape):
    flow = conditioned(2, context_shape, solver=TIGHT)
    x = draw(flow, 2, 4)
    flow(x)
    found, contexts = flow.regularization, flow.context.expand(2, 4, CONTEXT_DIM)
    for index in [(0, 1), (1, 3)]:
        flow.context = contexts[index]
        expected = brute_force(flow, x[index].unsqueeze(0))
        assert_close([part[index] for part in found], [part[0] for part in expected], rtol=1e-6, atol=1e-8)


# Gradients


def objective(flow, x, inverse=False):
    """Of all that a call gives, with a probe that is the same every time."""
    flow.clear_cache()
    torch.manual_seed(1)
    y, ladj = (flow.inv if inverse else flow).call_and_ladj(x)
    kinetic, diagonal, hollow = flow.regularization
    return (y.cos().sum(-1) + ladj.sin() + kinetic + 2 * diagonal.sqrt() + 3 * hollow).sum()


def leaves(flow, x):
    """All that a gradient reaches."""
    context = () if flow.context is None else (flow.context.requires_grad_(),)
    return [x.requires_grad_(), *context, *flow.nn.parameters()]


@both_directions
@every_case
def test_gradients_against_finite_differences(make, inverse):
    flow = make(3, solver=Solver("rk4", options={"step_size": 0.5}))
    x = draw(flow, 4)
    tensors = leaves(flow, x)
    gradients = torch.autograd.grad(objective(flow, x, inverse), tensors)
    step = 1e-5
    for tensor, gradient in zip(tensors, gradients, strict=True):
        direction, ends = torch.randn_like(tensor), []
        for sign in (1, -2, 1):  # there, to the other side, and back
            with torch.no_grad():
                tensor.add_(direction, alpha=sign * step)
                ends.append(objective(flow, x, inverse))
        difference = (ends[0] - ends[1]) / (2 * step)
        assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("part", range(3), ids=Regularization._fields)
def test_gradients_of_each_part(part):
    # The hollow part must train the conditioner, and the diagonal part must not lose its path through it.
    flow = unconditional(3, solver=QUICK)
    x = draw(flow, 4)
    tensors = leaves(flow, x)
    flow(x)
    gradients = torch.autograd.grad(flow.regularization[part].sum(), tensors)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert gradients[0].abs().max() > 0
    for name, gradient in zip(dict(flow.nn.named_parameters()), gradients[1:], strict=True):
        if "conditioner" in name and "weight" in name:
            assert gradient.abs().max() > 0, name


@both_directions
@pytest.mark.parametrize("name", ["grouped", "conditional masked", "conditional leave-one-out", "module of the user"])
def test_adjoint_method(name, inverse):
    flow = CASES[name](3)
    x = draw(flow, 3)
    tensors = leaves(flow, x)
    values, gradients = [], []
    for adjoint in (False, True):
        flow.solver = Solver(rtol=1e-7, atol=1e-7, adjoint=adjoint)
        values.append(objective(flow, x, inverse))
        gradients.append(torch.autograd.grad(values[-1], tensors))
    assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)  # by different solvers, to their tolerance
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_adjoint_method_of_one_coordinate():
    flow = unconditional(1, solver=Solver(adjoint=True))
    x = draw(flow, 3).requires_grad_()
    flow(x)
    flow.regularization.penalty().sum().backward()
    assert x.grad.abs().min() > 0 and all(p.grad is None or p.grad.isfinite().all() for p in flow.nn.parameters())


@every_kind
def test_frozen_network(make):
    flow = make(3, solver=QUICK)
    flow.nn.requires_grad_(False)
    x = draw(flow, 4)
    flow(x)
    assert not any(part.requires_grad for part in flow.regularization)
    x.requires_grad_()
    flow(x)
    (gradient,) = torch.autograd.grad(flow.regularization.penalty().sum(), x)
    assert gradient.abs().min() > 0


def test_gradients_reach_the_context_only():
    flow = conditioned(3, (4,), solver=QUICK)
    flow.nn.requires_grad_(False)
    flow.context.requires_grad_()
    flow(draw(flow, 4))
    (gradient,) = torch.autograd.grad(flow.regularization.penalty().sum(), flow.context)
    assert gradient.abs().sum(-1).min() > 0


# Modes


@both_directions
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["grouped", "conditional leave-one-out", "module of the user"])
def test_without_gradients(name, mode, inverse):
    flow = CASES[name](2, solver=QUICK)
    x = draw(flow, 4)
    call(flow, x, inverse)
    expected = flow.regularization
    assert all(part.requires_grad for part in expected)
    y = flow._call(x)
    flow.clear_cache()
    with mode():
        (flow.inv(y) if inverse else flow(x))
        found = flow.regularization
        assert not any(part.requires_grad for part in found)
        assert_close(found, Regularization(*(part.detach() for part in expected)), rtol=1e-9, atol=1e-9)
        assert (found.penalty() > 0).all()


def test_samples_in_inference_mode_are_not_remembered():
    # They do not count their changes, so no pair is known to be right. A sample is as it is without regularize.
    flow = unconditional(2, solver=QUICK)
    with torch.inference_mode():
        flow(draw(flow, 4))
        with pytest.raises(AttributeError, match="inference"):
            _ = flow.regularization


def test_changing_the_mode_of_gradients_forgets():
    flow = unconditional(2, solver=QUICK)
    flow(draw(flow, 4))
    with torch.no_grad(), pytest.raises(AttributeError, match="latest call"):
        _ = flow.regularization


# The latest call


def test_is_that_of_the_latest_call():
    flow = unconditional(2, solver=QUICK)
    x, other = draw(flow, 4), draw(flow, 3)
    y = flow(x)
    assert flow.regularization.kinetic.shape == (4,)
    flow.inv(other)
    assert flow.regularization.kinetic.shape == (3,)
    flow(x)
    first = flow.regularization
    assert flow(x) is not y and flow.inv(flow(x)) is x  # the latter two by the cache
    assert_close(flow.regularization, first, rtol=0, atol=0)


def test_survives_the_score_of_a_sample():
    flow = unconditional(2, solver=QUICK)
    flow_dist = dist.TransformedDistribution(base(2), [flow])
    x = flow_dist.rsample((5,))
    before = flow.regularization
    flow_dist.log_prob(x)
    assert_close(flow.regularization, before, rtol=0, atol=0)


def test_for_a_density():
    # A score of data forgets the pair; value and log-determinant with the penalty come from the inverse.
    flow = unconditional(2, solver=QUICK)
    flow_dist = dist.TransformedDistribution(base(2), [flow])
    data = draw(flow, 5)
    log_prob = flow_dist.log_prob(data)
    with pytest.raises(AttributeError, match="log_prob"):
        _ = flow.regularization
    x, ladj = flow.inv.call_and_ladj(data)
    assert_close(base(2).log_prob(x) + ladj, log_prob, rtol=1e-9, atol=1e-9)
    (flow.regularization.penalty() - log_prob).mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.nn.parameters())


@every_kind
def test_error_without_regularize(make):
    flow = make(2, solver=QUICK)
    flow.regularize = False
    flow(draw(flow, 3))
    with pytest.raises(AttributeError, match="regularize=True"):
        _ = flow.regularization
    flow.regularize = True  # too late for the pair, which has none
    with pytest.raises(AttributeError, match="latest call"):
        _ = flow.regularization


def test_default_is_without():
    context = torch.randn(CONTEXT_DIM)
    flows = [
        hollow_cnf(2),
        HollowCNF(HollowNN(2)),
        conditional_hollow_cnf(2, CONTEXT_DIM).condition(context),
        ConditionalHollowCNF(ConditionalHollowNN(2, CONTEXT_DIM)).condition(context),
    ]
    for flow in flows:
        flow(torch.randn(3, 2))
        assert not flow.regularize
        with pytest.raises(AttributeError, match="regularize=True"):
            _ = flow.regularization


@every_kind
def test_error_without_a_call(make):
    with pytest.raises(AttributeError, match="call the flow first"):
        _ = make(2).regularization


def _backward(flow):
    flow(draw(flow, 3)).sum().backward()


def _backward_of_the_penalty(flow):
    flow(draw(flow, 3))
    flow.regularization.penalty().sum().backward()


def _backward_of_the_log_determinant(flow):
    flow.call_and_ladj(draw(flow, 3))[1].sum().backward()


def _optimizer_step(flow):
    for parameter in flow.nn.parameters():
        parameter.grad = torch.ones_like(parameter)
    flow(draw(flow, 3))
    torch.optim.SGD(flow.nn.parameters(), lr=0.01).step()


def _clear(flow):
    flow(draw(flow, 3))
    flow.clear_cache()


def _past_the_cache(flow):
    flow._call(draw(flow, 3))


def _change_in_place(flow):
    x = draw(flow, 3)
    flow(x)
    x.add_(1)


def _other_solver(flow):
    flow(draw(flow, 3))
    flow.solver = MEDIUM


FORGETFUL = {
    "backward": _backward,
    "backward of the penalty": _backward_of_the_penalty,
    "backward of the log-determinant": _backward_of_the_log_determinant,
    "optimizer step": _optimizer_step,
    "clear_cache": _clear,
    "past the cache": _past_the_cache,
    "input changed in place": _change_in_place,
    "other solver": _other_solver,
}


@pytest.mark.parametrize("change", FORGETFUL.values(), ids=FORGETFUL)
@every_kind
def test_error_without_a_latest_pair(make, change):
    flow = make(2, solver=QUICK)
    change(flow)
    with pytest.raises(AttributeError, match="before the backward pass"):
        _ = flow.regularization


@every_kind
def test_error_without_cache(make):
    flow = make(2, solver=QUICK, cache_size=0)
    flow(draw(flow, 3))
    with pytest.raises(AttributeError, match="cache_size=1"):
        _ = flow.regularization
    cached = flow.with_cache(1)
    cached(draw(flow, 3))
    assert (cached.regularization.penalty() > 0).all()
    uncached = cached.with_cache(0)
    with pytest.raises(AttributeError, match="cache_size=1"):
        _ = uncached.regularization


# Penalty


def test_weights_of_the_penalty():
    parts = Regularization(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0]))
    assert parts.penalty().tolist() == [111, 222]
    assert parts.penalty(kinetic=0.5, jacobian=2.0).tolist() == [220.5, 441]
    assert parts.penalty(2.0, 0.0).tolist() == [2, 4]
    assert parts.penalty(0.0, 1.0).tolist() == [110, 220]


# Copies


COPIES = {"pickle": lambda flow: pickle.loads(pickle.dumps(flow)), "deepcopy": copy.deepcopy, "copy": copy.copy}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@every_kind
def test_copies(make, duplicate):
    flow = make(2, solver=QUICK)
    x = draw(flow, 3)
    flow(x)
    twin = duplicate(flow)
    assert twin.regularize
    with pytest.raises(AttributeError, match="latest call"):
        _ = twin.regularization
    twin(x)
    assert_close(twin.regularization, flow.regularization, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_a_flow_that_waits_for_context(duplicate):
    flow = strong(conditional_hollow_cnf(2, CONTEXT_DIM, regularize=True, solver=QUICK))
    context, x = torch.randn(3, CONTEXT_DIM), torch.randn(3, 2)
    values = []
    for each in (flow, duplicate(flow)):
        transform = each.condition(context)
        assert each.regularize and transform.regularize
        transform(x)
        values.append(transform.regularization)
    assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)


# In a guide


def model():
    pyro.sample("z", dist.Normal(torch.tensor([3.0, -2.0]), 0.5).to_event(1))


def make_guide(flow, weight, seen=None):
    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(base(2), [flow]))
        penalty = flow.regularization.penalty()
        if seen is not None:
            seen.append(penalty)
        if weight is not None:
            pyro.factor("penalty", weight * penalty, has_rsample=True)

    return guide


ELBOS = {
    "one particle": partial(Trace_ELBO),
    "particles": partial(Trace_ELBO, num_particles=6),
    "vectorised particles": partial(Trace_ELBO, num_particles=6, vectorize_particles=True),
}


@pytest.mark.parametrize("make_elbo", ELBOS.values(), ids=ELBOS)
def test_elbo_is_lower_by_the_penalty(make_elbo):
    flow = unconditional(2, solver=QUICK)
    weight, losses, gradients = 0.3, [], []
    for each in (None, weight):
        pyro.set_rng_seed(0)
        seen = []
        losses.append(make_elbo(max_plate_nesting=0).differentiable_loss(model, make_guide(flow, each, seen)))
        penalty = torch.stack([part.mean() for part in seen]).mean()
        wanted = losses[-1] if each is not None else losses[-1] + weight * penalty
        gradients.append(torch.autograd.grad(wanted, list(flow.nn.parameters())))
    assert penalty > 0.01
    assert_close(losses[1] - losses[0], weight * penalty, rtol=1e-9, atol=1e-9)
    assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)


def test_amortised_guide():
    # In a subsampled plate the penalty counts for all the data, as the rest of the ELBO does.
    encoder = nn.Linear(2, CONTEXT_DIM)
    flow = strong(conditional_hollow_cnf(2, CONTEXT_DIM, regularize=True, solver=QUICK))
    data, seen = torch.randn(12, 2), []

    def amortised_model(data):
        with pyro.plate("data", 12, subsample_size=4) as batch:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=data[batch])

    def amortised_guide(data, weight):
        pyro.module("encoder", encoder)
        pyro.module("flow", flow)
        with pyro.plate("data", 12, subsample_size=4) as batch:
            transform = flow.condition(encoder(data[batch]))
            pyro.sample("z", dist.TransformedDistribution(base(4, 2), [transform]))
            seen.append(transform.regularization.penalty())
            pyro.factor("penalty", weight * seen[-1], has_rsample=True)

    losses = []
    for weight in (0.0, 0.5):
        pyro.set_rng_seed(0)
        loss = Trace_ELBO().differentiable_loss(
            lambda data, weight: amortised_model(data), amortised_guide, data, torch.tensor(weight)
        )
        losses.append(loss)
    assert_close(losses[1] - losses[0], 0.5 * 12 / 4 * seen[-1].sum(), rtol=1e-9, atol=1e-9)
    losses[1].backward()
    assert encoder.weight.grad.abs().min() > 0


def test_training_with_a_penalty():
    start = unconditional(2, solver=QUICK)
    penalties = {}
    for weight in (None, 3.0):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        flow = copy.deepcopy(start)
        elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)
        svi = SVI(model, make_guide(flow, weight), pyro.optim.Adam({"lr": 0.02}), elbo)
        losses = [svi.step() for _ in range(25)]
        assert np.isfinite(losses).all() and losses[-1] < losses[0]
        with torch.no_grad():
            flow(torch.randn(500, 2))
            penalties[weight] = flow.regularization.penalty().mean()
    assert penalties[3.0] < 0.8 * penalties[None]


def test_reading_an_attribute_raises_nothing_but_attribute_error():
    for flow in (unconditional(2), hollow_cnf(2), conditional_hollow_cnf(2, 1).condition(torch.zeros(1))):
        assert not hasattr(flow, "regularization")
        inspect.getmembers(flow)
        with pytest.raises(AttributeError, match="regularization (needs|is that of the latest call)"):
            _ = flow.regularization
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = flow.nonsense
