# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy
import functools
import gc
import math
import pickle
import re
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch.testing import assert_close
from transform_checks import CONDITIONAL, CONTEXT_DIM, MODULES, QUICK, base, brute_force_ladj, check_metadata

from pyro_hollow import PathGradientDistribution, Solver, conditional_hollow_cnf, hollow_cnf, standardized
from pyro_hollow.nn.standardization import location_and_scale
from pyro_hollow.transforms import (
    ConditionalStandardizedFlow,
    ConditionalSylvester,
    StandardizedFlow,
    conditional_low_rank_linear,
    conditional_sylvester,
)

OTHERS = {
    "low rank": lambda d, context_dim: conditional_low_rank_linear(d, context_dim, 1),
    "Sylvester": lambda d, context_dim: conditional_sylvester(d, context_dim, 1),
    "Pyro's affine autoregressive": lambda d, context_dim: transforms.conditional_affine_autoregressive(
        d, context_dim, [8]
    ),
}
WAITING = {**{name: lambda d, context_dim, make=make: make(d) for name, make in CONDITIONAL.items()}, **OTHERS}
LOC, SCALE = torch.tensor([1e3, -2.0], dtype=torch.float64), torch.tensor([10.0, 1e-4], dtype=torch.float64)


def data(n=50):
    return LOC + SCALE * torch.randn(n, 2)


def contexts(n=50):
    return torch.randn(n, CONTEXT_DIM) * torch.tensor([1.0, 1e6, 1e-6]) + torch.tensor([0.0, 3e6, 1.0])


def given(flow, context):
    return dist.ConditionalTransformedDistribution(base(*context.shape[:-1], 2), [flow]).condition(context)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_density_is_that_of_standardised_data(make):
    x, flow = data(), make(2)
    both = standardized(flow, x)
    z, scale = (x - x.mean(0)) / x.std(0, correction=0), x.std(0, correction=0)
    expected = dist.TransformedDistribution(base(2), [flow]).log_prob(z) - scale.log().sum()
    assert_close(dist.TransformedDistribution(base(2), [both]).log_prob(x), expected, rtol=1e-6, atol=1e-6)
    check_metadata(both)


@pytest.mark.parametrize("make", WAITING.values(), ids=WAITING)
def test_conditional_density_is_that_of_standardised_data_and_context(make):
    x, context, flow = data(), contexts(), make(2, CONTEXT_DIM)
    both, noise = standardized(flow, x, context), torch.randn(50, 2)
    c, loc, scale = (context - context.mean(0)) / context.std(0, correction=0), x.mean(0), x.std(0, correction=0)
    conditioned, plain = both.condition(context), flow.condition(c)
    y, z = conditioned(noise), plain(noise)
    assert_close(y, loc + scale * z)
    expected = plain.log_abs_det_jacobian(noise, z) + scale.log().sum()
    assert_close(conditioned.log_abs_det_jacobian(noise, y), expected, rtol=1e-6, atol=1e-6)
    made = given(both, context)
    of_sample = made.log_prob(sample := made.rsample())
    assert of_sample.shape == (50,) and sample.shape == (50, 2)
    log_prob = given(both, context).log_prob
    if not isinstance(flow, ConditionalSylvester):  # has no inverse at data
        assert_close(given(flow, c).log_prob((x - loc) / scale) - scale.log().sum(), log_prob(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_jacobian_inverse_and_shapes(make):
    flow = standardized(make(2), data())
    for shape in [(), (3,), (2, 3)]:
        x = torch.randn(*shape, 2)
        y, ladj = flow.call_and_ladj(x)
        assert y.shape == x.shape and ladj.shape == shape
        assert_close(flow.inv(y.clone()), x, rtol=0, atol=1e-4)
        back, inverse_ladj = flow.inv.call_and_ladj(y.detach().clone())
        assert_close(back, x, rtol=0, atol=1e-4)
        assert_close(inverse_ladj, -ladj, rtol=0, atol=1e-3)
    x = torch.randn(4, 2)
    assert_close(flow.log_abs_det_jacobian(x, flow(x)), brute_force_ladj(flow, x), rtol=0, atol=1e-4)
    assert_close(flow(x), flow._call(x), rtol=0, atol=0)
    assert_close(flow._inverse(flow(x)), x, rtol=0, atol=1e-4)


def test_in_compositions():
    x, flow = data(), standardized(hollow_cnf(2), data())
    composed = torch.distributions.ComposeTransform([flow.inv, flow])
    assert_close(composed(x), x, rtol=1e-5, atol=0)
    assert_close(composed.log_abs_det_jacobian(x, composed(x)), torch.zeros(50), rtol=0, atol=1e-4)
    inverse = standardized(conditional_hollow_cnf(2, CONTEXT_DIM), x, contexts()).inv.condition(contexts())
    assert inverse(x).shape == x.shape


def test_score_and_path_gradient():
    flow = standardized(hollow_cnf(2, solver=Solver(rtol=1e-9, atol=1e-9)), data())
    x = torch.randn(5, 2)
    y, ladj, score = flow.call_and_score(x, -x)
    value = y.detach().requires_grad_()
    log_prob = dist.TransformedDistribution(base(2), [flow]).log_prob(value)
    assert_close(score, torch.autograd.grad(log_prob.sum(), value)[0], rtol=1e-5, atol=1e-6)
    posterior = PathGradientDistribution(base(2), [flow])
    z = posterior.rsample((5,))
    assert_close(
        posterior.log_prob(z),
        dist.TransformedDistribution(base(2), [flow]).log_prob(z.detach().clone()),
        rtol=1e-6,
        atol=1e-6,
    )


# Solves, and the cache


@pytest.fixture
def solves(monkeypatch):
    calls, integrate = [], Solver.integrate_with_divergence
    monkeypatch.setattr(Solver, "integrate_with_divergence", lambda *args: calls.append(1) or integrate(*args))
    return calls


def test_one_solve_as_without(solves):
    x, flow = data(), standardized(hollow_cnf(2), data())
    flow_dist = dist.TransformedDistribution(base(2), [flow])
    for call in (
        lambda: flow_dist.log_prob(x),
        lambda: flow_dist.log_prob(flow_dist.rsample((5,))),
        lambda: flow.call_and_ladj(torch.randn(5, 2)),
        lambda: flow.inv.call_and_ladj(x),
    ):
        solves.clear()
        call()
        assert len(solves) == 1


def test_latest_pair_is_dropped_when_something_changes():
    flow, x = standardized(hollow_cnf(2), data()), torch.randn(3, 2)
    assert flow(x) is flow(x)
    changes = {
        "parameter": flow.flow.nn.transformer.output_weight,
        "location": flow.units.loc,
        "scale": flow.units.scale,
        "input": x,
    }
    for name, tensor in changes.items():
        before = flow(x)
        with torch.no_grad():
            tensor.add_(0.5)
        fresh = StandardizedFlow(flow.flow.with_cache(0), flow.units.loc, flow.units.scale)
        assert_close(flow(x), fresh(x)), name
        assert (flow(x) - before).abs().max() > 0, name
    y = flow(x).detach()
    assert_close(flow.inv(y), x, rtol=0, atol=1e-4)
    y.add_(1e-4)
    assert_close(flow.inv(y), flow._inverse(y))


def test_data_with_gradients_can_be_scored_again():
    flow_dist = dist.TransformedDistribution(base(2), [standardized(hollow_cnf(2), data())])
    x = data().requires_grad_()
    with torch.no_grad():
        flow_dist.log_prob(x)
    first, second = (torch.autograd.grad(flow_dist.log_prob(x).sum(), x)[0] for _ in range(2))
    assert_close(first, second) and first.abs().max() > 0
    for _ in range(2):
        flow_dist.transforms[0].inv(x).sum().backward()


def test_nothing_outlives_a_step():
    gc.collect()
    gc.disable()
    try:
        flow, x = standardized(conditional_hollow_cnf(2, CONTEXT_DIM), data(), contexts()), data()
        made = given(flow, contexts())
        made.log_prob(x).sum().backward()
        made.log_prob(made.rsample()).sum().backward()
        references = [weakref.ref(x), weakref.ref(made.transforms[0])]
        del made, x
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


# State


def score(flow, x, context):
    if hasattr(flow, "condition"):
        return given(flow, context).log_prob(x)
    return dist.TransformedDistribution(base(2), [flow]).log_prob(x)


def test_units_are_saved_and_not_trained():
    x, context = data(), contexts()
    flows = [
        (standardized(hollow_cnf(2), x), StandardizedFlow(hollow_cnf(2), torch.zeros(2), torch.ones(2))),
        (
            standardized(conditional_hollow_cnf(2, CONTEXT_DIM), x, context),
            ConditionalStandardizedFlow(
                conditional_hollow_cnf(2, CONTEXT_DIM), *torch.ones(2, 2), *torch.ones(2, CONTEXT_DIM)
            ),
        ),
    ]
    for flow, fresh in flows:
        assert len(list(flow.parameters())) == len(list(flow.flow.parameters()))
        fresh_units = fresh.units.scale.add_(1.0)  # of another value than those that are loaded
        fresh.load_state_dict(flow.state_dict())
        assert_close(fresh_units, flow.units.scale)
        expected = score(flow, x, context)
        for twin in (fresh, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
            assert_close(score(twin, x, context), expected, rtol=0, atol=0)
    pyro.module("flow", flows[0][0])
    assert any(name.startswith("flow$$$flow.nn") for name in pyro.get_param_store())


def test_type_moves_with_the_module():
    flow = standardized(hollow_cnf(2), data()).float()
    assert flow(torch.randn(3, 2).float()).dtype == torch.float32
    with pytest.raises(ValueError, match="input is torch.float64 on cpu, but the flow's units are torch.float32"):
        dist.TransformedDistribution(base(2), [flow]).log_prob(data())


# Fits


def fitted(x, context=None, steps=12, seed=1):
    torch.manual_seed(seed)
    flow = hollow_cnf(2, [8], solver=QUICK) if context is None else conditional_hollow_cnf(2, 1, [8], solver=QUICK)
    flow = standardized(flow, x, context)
    density = dist.TransformedDistribution(base(len(x), 2), [flow]) if context is None else given(flow, context)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -density.log_prob(x).mean()
        loss.backward()
        optimizer.step()
    return density.log_prob(x).detach()


def bent(n=100):
    """A bent density, whose log-density is known."""
    z = torch.randn(n, 2)
    return torch.stack([z[:, 0], z[:, 1] + z[:, 0] ** 2], -1), base(2).log_prob(z)


@functools.cache
def reference(dtype):
    """Samples in float64, and their log-density under a fit to them in another type, which no test changes."""
    torch.manual_seed(0)
    x = bent()[0].double()
    return x, fitted(x.to(dtype))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("c", [1e-6, 1e-4, 1e-2, 1.0, 1e6])
def test_fits_of_x_and_of_c_x_plus_b_differ_by_log_c(c, offset):
    x, expected = reference(torch.float64)
    assert_close(fitted(c * (x + offset)) + 2 * math.log(c), expected, rtol=0, atol=1e-6)
    torch.set_default_dtype(torch.float32)
    x, expected = reference(torch.float32)
    # The offset takes the data's last digits away.
    difference = fitted((c * (x + offset)).float()) + 2 * math.log(c) - expected
    assert difference.abs().max() < (1e-2 if offset else 1e-3)


def test_columns_of_unlike_scales():
    x, _ = bent()
    factors = torch.tensor([1e-6, 1e6])
    assert_close(fitted(x * factors), fitted(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("c, b", [(1e6, 0.0), (1e-6, 0.0), (1.0, 1e6), (1e6, 1e9)])
def test_fits_do_not_depend_on_the_units_of_the_context(c, b):
    x, _ = bent()
    context = torch.rand(100, 1)
    x = x + 3 * context
    assert_close(fitted(x, c * context + b), fitted(x, context), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("c", [1e-4, 1e-2, 1.0, 1e4])
def test_density_is_learned_at_any_scale(c):
    x, truth = bent(1000)
    learned = fitted(c * x, steps=600).mean()
    assert abs(learned - (truth.mean() - 2 * math.log(c))) < 0.1


@pytest.mark.slow
def test_context_of_a_million_helps_as_much_as_one_of_one():
    torch.manual_seed(0)
    context = torch.randint(2, (1000, 1)).double()
    z = 0.3 * torch.randn(1000, 2)
    x, truth = z + 4 * context, dist.Normal(0.0, 0.3).log_prob(z).sum(-1).mean()
    assert abs(fitted(x, 1e6 * context, steps=300).mean() - truth) < 0.1


# Location and scale


def test_location_and_scale():
    x = data(1000)
    assert_close(location_and_scale("x", x), (x.mean(0), x.std(0, correction=0)))
    assert_close(location_and_scale("x", x.view(10, 100, 2)), location_and_scale("x", x))


@pytest.mark.parametrize("exponent", [-160, -30, 0, 30, 160])
def test_squares_neither_overflow_nor_underflow(exponent):
    x = torch.randn(100, 1)
    dtypes = [torch.float64] + [torch.float32] * (abs(exponent) < 38)
    for dtype in dtypes:
        scaled = (10.0**exponent * x).to(dtype)
        assert_close(
            location_and_scale("x", scaled)[1].double() / 10.0**exponent, x.std(0, correction=0), rtol=1e-6, atol=0
        )


def test_digits_of_data_far_from_0_are_kept():
    x = (1e6 + torch.randn(1000, 1)).float()
    loc, scale = location_and_scale("x", x)
    assert_close((x - loc).std(0) / scale, torch.ones(1).float(), rtol=1e-3, atol=0)
    assert_close(scale.double(), x.double().std(0), rtol=1e-3, atol=0)


def test_constant_column_of_the_context_is_centred():
    constant = torch.full((50, 1), 0.1)
    assert location_and_scale("context", constant, allow_constant=True)[1] == 1
    flow = standardized(conditional_hollow_cnf(2, 1), data(), constant)
    assert (flow.context_units(constant).abs() < 1e-12).all()
    standardized(conditional_hollow_cnf(2, 1), data(), torch.zeros(1, 1))


# Errors

CNF, WITH_CONTEXT = hollow_cnf, conditional_hollow_cnf
BAD = {
    "x must vary in every column, but column 1 is constant": lambda: standardized(
        CNF(2), torch.stack([torch.randn(1000), torch.full((1000,), 0.1)], -1)
    ),
    "x must vary in every column, but column 0 is constant": lambda: standardized(CNF(2), torch.randn(1, 2)),
    "x must be finite, but is nan at index (0, 1)": lambda: standardized(CNF(2), torch.tensor([[0.0, math.nan]])),
    "context must be finite, but is inf at index (1, 0)": lambda: standardized(
        WITH_CONTEXT(2, 1), data(), torch.tensor([[0.0], [math.inf]])
    ),
    "x must have a last dimension of size 2 as the flow has, but got 3": lambda: standardized(
        CNF(2), torch.randn(9, 3)
    ),
    "context must have a last dimension of size 1 as the flow has, but got 2": lambda: standardized(
        WITH_CONTEXT(2, 1), data(), data()
    ),
    "x must hold samples with shape (n, d) and n of at least 1, but has shape (9,)": lambda: standardized(
        CNF(1), torch.randn(9)
    ),
    "but has shape (0, 2)": lambda: standardized(CNF(2), torch.randn(0, 2)),
    "context must hold samples with shape": lambda: standardized(WITH_CONTEXT(2, 1), data(), torch.randn(50)),
    "x must be of a floating-point type, but got torch.int64; convert": lambda: standardized(
        CNF(2), torch.arange(8).view(4, 2)
    ),
    "context must be of a floating-point type, but got torch.bool": lambda: standardized(
        WITH_CONTEXT(2, 1), data(), torch.ones(3, 1).bool()
    ),
    "x is torch.float32 on cpu, but the flow torch.float64 on cpu": lambda: standardized(CNF(2), data().float()),
    "context is torch.float32 on cpu, but the flow torch.float64": lambda: standardized(
        WITH_CONTEXT(2, 1), data(), torch.randn(50, 1).float()
    ),
    "context is missing": lambda: standardized(WITH_CONTEXT(2, 1), data()),
    "context is given, but the flow takes none": lambda: standardized(CNF(2), data(), torch.randn(50, 1)),
    "flow must take no context": lambda: StandardizedFlow(WITH_CONTEXT(2, 1), LOC, SCALE),
    "flow must take a context": lambda: ConditionalStandardizedFlow(CNF(2), LOC, SCALE),
    "context_loc and context_scale must both be given": lambda: ConditionalStandardizedFlow(
        WITH_CONTEXT(2, 1), LOC, SCALE, torch.zeros(1)
    ),
    "scale must be positive, but got": lambda: StandardizedFlow(CNF(2), LOC, -SCALE),
    "scale must have shape (2,)": lambda: StandardizedFlow(CNF(2), LOC, torch.ones(())),
    "loc must be of a floating-point type with shape (d,)": lambda: StandardizedFlow(CNF(2), torch.tensor(0.0), SCALE),
    "x must have shape (*, 2), but got (5, 1)": lambda: standardized(CNF(2), data()).inv(torch.randn(5, 1)),
    "context must have shape (*, 1), but got (5, 2)": lambda: standardized(
        WITH_CONTEXT(2, 1), data(), torch.randn(5, 1)
    ).condition(torch.randn(5, 2)),
    "context is torch.float32, but the flow torch.float64": lambda: standardized(
        WITH_CONTEXT(2, 1), data(), torch.randn(5, 1)
    ).condition(torch.randn(5, 1).float()),
}


@pytest.mark.parametrize("message, call", BAD.items(), ids=BAD)
def test_bad_arguments_are_named(message, call):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
