# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The score that a flow carries along, against that of the density it makes."""

import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close
from transform_checks import TIGHT, strengthen

from pyro_hollow import Solver, conditional_hollow_cnf, free_form_cnf, hollow_cnf
from pyro_hollow.experiments.speed import can_compile

#: With a tape: grouped, masked and context; without: the others.
FLOWS = {
    "grouped": lambda d, solver: hollow_cnf(d, solver=solver),
    "masked": lambda d, solver: hollow_cnf(d, conditioner="masked", solver=solver),
    "leave-one-out": lambda d, solver: hollow_cnf(d, conditioner="leave-one-out", solver=solver),
    "context": lambda d, solver: conditional_hollow_cnf(d, 2, solver=solver).condition(torch.tensor([0.5, -1.0])),
    "free-form": lambda d, solver: free_form_cnf(d, divergence="exact", solver=solver),
}
NEEDS_COMPILER = pytest.mark.skipif(not can_compile("cpu"), reason="needs a C compiler")
every_flow = pytest.mark.parametrize("name", FLOWS)


def make(name, d, solver):
    torch.manual_seed(0)
    flow = FLOWS[name](d, solver)
    strengthen(flow)
    return flow


def brute_force(flow, y):
    """The gradient of the log-density by automatic differentiation through the inverse."""
    d = y.shape[-1]
    density = dist.TransformedDistribution(dist.Normal(torch.zeros(d), 1.0).to_event(1), [flow.with_cache(0)])
    y = y.detach().requires_grad_()
    return torch.autograd.grad(density.log_prob(y).sum(), y)[0]


@every_flow
@pytest.mark.parametrize("d, batch_shape", [(3, ()), (1, (4,)), (3, (2, 3))])
def test_score_is_that_of_the_density(name, d, batch_shape):
    flow = make(name, d, TIGHT)
    x = torch.randn(*batch_shape, d)
    y, ladj, score = flow.call_and_score(x, -x)
    assert_close((y, ladj), flow.with_cache(0).call_and_ladj(x))
    assert score.shape == x.shape and not score.requires_grad
    assert_close(score, brute_force(flow, y), rtol=1e-5, atol=1e-5)
    assert (score + y).abs().max() > 1e-2  # that of another density than the base


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "bosh3", "dopri5"])
def test_score_converges_with_the_solver(method):
    flow = make("grouped", 3, TIGHT)
    x = torch.randn(5, 3)
    expected = brute_force(flow, flow(x))
    errors = []
    for level in (1, 2):
        adaptive = method in ("bosh3", "dopri5")
        tolerances = {"rtol": 10.0 ** (-2 * level), "atol": 10.0 ** (-2 * level)}
        flow.solver = Solver(method, **tolerances) if adaptive else Solver(method, options={"step_size": 0.1**level})
        errors.append((flow.call_and_score(x, -x)[2] - expected).abs().max())
    assert errors[1] < errors[0] / 3


@every_flow
def test_gradients_are_those_of_the_flow(name):
    """Asking for the score changes no gradient of value and log-determinant."""
    flow = make(name, 3, Solver("rk4", options={"step_size": 0.5}))
    x, weight = torch.randn(4, 3), torch.randn(4, 3)
    gradients = []
    for values in (flow.call_and_score(x, -x)[:2], flow.with_cache(0).call_and_ladj(x)):
        y, ladj = values
        gradients.append(torch.autograd.grad((y * weight).sum() + ladj.square().sum(), list(flow.nn.parameters())))
    assert_close(*gradients)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "adaptive_heun"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=NEEDS_COMPILER)])
@every_flow
def test_gradients_without_a_graph(name, compile, method):
    """They are those of the graph, in place; by hand where the executor can, and else by a graph of its own."""
    compile = compile and method != "adaptive_heun" and name not in ("free-form",)
    flow = make(name, 3, Solver(method, compile=compile))
    x, weight = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    leaf = x.clone().requires_grad_()
    y, ladj, score = flow.call_and_score(leaf, -x)
    expected = torch.autograd.grad((y * weight).sum(), [leaf, *flow.nn.parameters()])
    with torch.no_grad():
        *found, pull = flow.call_and_pull(x, -x)
    assert not any(value.requires_grad for value in found)
    assert_close(found, [y.detach(), ladj.detach(), score])
    assert_close([pull(weight), *(p.grad for p in flow.nn.parameters())], list(expected))


def test_the_pair_is_remembered():
    flow = make("grouped", 3, TIGHT)
    x = torch.randn(4, 3)
    y, ladj, _ = flow.call_and_score(x, -x)
    assert flow(x) is y and flow.log_abs_det_jacobian(x, y) is ladj


def test_single_precision():
    flow = make("grouped", 3, Solver(rtol=1e-4, atol=1e-4))
    x = torch.randn(4, 3)
    expected = flow.call_and_score(x, -x)
    flow.nn.float()
    values = flow.call_and_score(x.float(), -x.float())
    assert all(value.dtype == torch.float32 for value in values)
    assert_close([value.double() for value in values], list(expected), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("score", [torch.zeros(4, 2), torch.zeros(4, 3).float()], ids=["shape", "type"])
def test_score_must_fit(score):
    with pytest.raises(ValueError, match="score must have the shape and type"):
        make("grouped", 3, TIGHT).call_and_score(torch.zeros(4, 3), score)


def test_regularization_is_not_integrated_along():
    flow = hollow_cnf(3, regularize=True)
    x = torch.randn(4, 3)
    flow.call_and_score(x, -x)
    with pytest.raises(AttributeError, match="regularization"):
        flow.regularization  # noqa: B018
