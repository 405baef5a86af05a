# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy
import io
import math
import pickle
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.conditional import ConditionalComposeTransformModule
from pyro.distributions.torch_transform import ComposeTransformModule
from torch import nn
from torch.testing import assert_close
from transform_checks import (
    CONDITIONAL,
    CONTEXT_DIM,
    FLOWS,
    MODULES,
    QUICK,
    TIGHT,
    base,
    brute_force_ladj,
    check_call_and_ladj,
    check_inverse,
    check_jacobian,
    check_metadata,
    check_shapes,
    check_training,
    draw,
    free_form,
    gradients,
)

from pyro_hollow import (
    ConditionalHollowCNF,
    ConditionalHollowNN,
    HollowCNF,
    HollowNN,
    Solver,
    SolverError,
    conditional_hollow_cnf,
    hollow_cnf,
)
from pyro_hollow.transforms import (
    ConditionalFreeFormCNF,
    ConditionedHollowCNF,
    FreeFormCNF,
    FreeFormNN,
    LowRankFreeFormNN,
    conditional_free_form_cnf,
    free_form_cnf,
)


def own_transformer(input_dim, **settings):
    """A flow whose transformer is differentiated automatically."""
    transformer = nn.Sequential(nn.Linear(2 + 16, 8), nn.Tanh(), nn.Linear(8, 1))
    return hollow_cnf(input_dim, [16, 16], transformer=transformer, **settings)


every_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
every_conditional = pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL)
every_derivative = pytest.mark.parametrize("make", [*FLOWS.values(), own_transformer], ids=[*FLOWS, "own transformer"])
input_dims = pytest.mark.parametrize("input_dim", [1, 2, 5])

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


# The checks that Pyro makes of its own transforms


@every_flow
def test_metadata(make):
    check_metadata(make(2))


@every_flow
@pytest.mark.parametrize("input_dim, batch_shape", [(1, (3, 4, 5)), (2, (3,)), (5, (3, 4, 5))])
def test_inverse(make, input_dim, batch_shape):
    check_inverse(make(input_dim, solver=TIGHT), batch_shape)


@every_flow
@input_dims
def test_log_determinant_is_that_of_the_jacobian(make, input_dim):
    check_jacobian(make(input_dim, solver=TIGHT))


@every_flow
@input_dims
@pytest.mark.parametrize("batch_shape", [(3,), (3, 4), (3, 4, 5)])
def test_shapes(make, input_dim, batch_shape):
    check_shapes(make(input_dim), batch_shape)


@every_flow
@input_dims
def test_training(make, input_dim):
    check_training(make(input_dim))


@every_flow
def test_call_and_ladj(make):
    check_call_and_ladj(make(3))


# Densities and gradients


@every_flow
def test_density_integrates_to_one(make):
    torch.manual_seed(2)  # flows smooth enough for the grid, and bent enough for the last line
    axis = torch.linspace(-8, 8, 121)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        flow_dist = dist.TransformedDistribution(base(2), [make(2, solver=Solver())])
        log_density = flow_dist.log_prob(points)
    mass = log_density.exp() * (axis[1] - axis[0]) ** 2
    assert_close(mass.sum(), torch.tensor(1.0), rtol=0, atol=1e-3)
    # A flow that is affine would pass with a wrong divergence; negentropy is zero for Gaussians alone.
    centred = points - mass @ points
    covariance = centred.T @ (centred * mass.unsqueeze(-1))
    gaussian_entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance)
    assert gaussian_entropy + (mass * log_density).sum() > 0.02


@pytest.mark.parametrize("make", [*MODULES.values(), own_transformer], ids=[*MODULES, "own transformer"])
def test_adjoint_gradients(make):
    flow = make(3, solver=TIGHT)
    x = draw(flow, 4)
    expected = gradients(flow, x)
    flow.solver = replace(TIGHT, adjoint=True)
    assert_close(gradients(flow, x), expected, rtol=1e-5, atol=1e-5)


@every_conditional
@pytest.mark.parametrize("context_shape", [(), (1,), (4,)], ids=str)
def test_adjoint_gradients_of_context(make, context_shape):
    cond = make(3, solver=TIGHT)
    x = torch.randn(4, 3)
    context = torch.randn(*context_shape, CONTEXT_DIM, requires_grad=True)
    expected = gradients(cond.condition(context), x, context)
    assert expected[1].abs().min() > 0
    cond.solver = replace(TIGHT, adjoint=True)
    assert_close(gradients(cond.condition(context), x, context), expected, rtol=1e-5, atol=1e-5)


@every_flow
def test_gradients_are_those_of_finite_differences(make):
    # Steps of the same size always, so that the result is smooth; no cache, for what is checked is changed unseen.
    flow = make(2, solver=QUICK).with_cache(0)
    inputs = [draw(flow, 3).requires_grad_(), *flow.nn.parameters()]
    if flow.context is not None:
        inputs.append(flow.context.requires_grad_())
    for function in (flow.call_and_ladj, flow._inverse):
        assert torch.autograd.gradcheck(lambda x, *others, f=function: f(x), inputs, fast_mode=True)


@every_derivative
def test_inference_mode(make):
    """Derivatives that are taken automatically are switched off there, unless one insists."""
    flow = make(2, solver=QUICK)
    x = draw(flow, 4)
    expected = flow.with_cache(0).call_and_ladj(x)
    assert expected[1].abs().max() > 1e-3
    with torch.inference_mode():
        assert_close(flow.call_and_ladj(x), expected)
        assert_close(flow.call_and_ladj(x.clone()), expected)


@every_derivative
def test_outputs_require_gradients_only_if_something_does(make):
    flow = make(2, solver=QUICK)
    x = draw(flow, 4)
    assert all(part.requires_grad for part in flow.call_and_ladj(x))
    for parameter in flow.nn.parameters():
        parameter.requires_grad_(False)
    assert not any(part.requires_grad for part in flow.with_cache(0).call_and_ladj(x))
    assert all(part.requires_grad for part in flow.with_cache(0).call_and_ladj(x.requires_grad_()))


# Single precision resolves 1e-7, and the default tolerances are 1e-5: errors of a round trip may add up to 1e-3.
@every_flow
def test_float32(make):
    double = make(5, solver=TIGHT)
    single = copy.deepcopy(double)
    single.solver = Solver()
    single.nn.float()
    if single.context is not None:
        single.context = single.context.float()
    x = draw(double, 16)
    y, ladj = single.call_and_ladj(x.float())
    assert y.dtype == ladj.dtype == torch.float32
    assert_close((y.double(), ladj.double()), double.call_and_ladj(x), rtol=0, atol=1e-3)
    assert_close(single._inverse(y), x.float(), rtol=0, atol=1e-3)


# Time


@every_flow
def test_time_is_when_the_flow_ends(make):
    """Two flows of half the time, one after the other, are one of the whole if the field does not depend on time."""
    whole = make(2, solver=TIGHT)
    with torch.no_grad():
        if free_form(whole):
            whole.nn.layers[0].weight[:, 2] = 0.0  # the column of time, behind those of x
        for name, parameter in whole.nn.named_parameters():
            if "offset" in name:
                parameter[:, 1] = 0.0
            elif name == "transformer.weight":
                parameter[..., -1] = 0.0
    half = copy.deepcopy(whole)
    half.time = 0.5
    x = draw(whole, 4)
    middle, first = half.call_and_ladj(x)
    end, second = half.call_and_ladj(middle)
    assert_close((end, first + second), whole.call_and_ladj(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("time", [0.0, -1.0, math.nan, math.inf])
def test_time_must_be_positive(time):
    with pytest.raises(ValueError, match="time must be positive"):
        hollow_cnf(2, time=time)
    with pytest.raises(ValueError, match="time must be positive"):
        conditional_hollow_cnf(2, 3, time=time).condition(torch.zeros(3))


# Contexts


@every_conditional
@pytest.mark.parametrize("batch_shape", [(), (7,), (6, 5)], ids=str)
def test_inverse_of_a_conditional(make, batch_shape):
    cond = make(2, solver=QUICK)
    context, x = torch.randn(*batch_shape, CONTEXT_DIM), torch.randn(*batch_shape, 2)
    assert cond.inv.inv is cond
    assert_close(cond.inv.condition(context)(x), cond.condition(context).inv(x), rtol=0, atol=0)
    assert (cond.inv.condition(context)(x) - cond.condition(context)(x)).abs().max() > 0.1


@every_conditional
@pytest.mark.parametrize("batch_shape", [(), (7,), (6, 5), (6, 1), (1, 5)], ids=str)
def test_context_broadcasts(make, batch_shape):
    cond = make(2)
    context = torch.randn(*batch_shape, CONTEXT_DIM)
    x = torch.randn((7, 2) if batch_shape == (7,) else (6, 5, 2))
    y, ladj = cond.condition(context).call_and_ladj(x)
    full = context.expand(*x.shape[:-1], CONTEXT_DIM)
    for index in [(0,) * (x.dim() - 1), tuple(size - 1 for size in x.shape[:-1])]:
        single = cond.condition(full[index]).call_and_ladj(x[index])
        assert_close((y[index], ladj[index]), single)


@every_conditional
def test_context_matters(make):
    cond = make(2)
    x = torch.randn(4, 2)
    first, second = (cond.condition(torch.randn(CONTEXT_DIM))(x) for _ in range(2))
    assert (first - second).abs().max() > 1e-2


@every_conditional
def test_conditional_transformed_distribution(make):
    cond = make(2, solver=TIGHT)
    context, x = torch.randn(4, CONTEXT_DIM), torch.randn(4, 2)
    flow_dist = dist.ConditionalTransformedDistribution(base(4, 2), [cond]).condition(context)
    assert flow_dist.rsample((3,)).shape == (3, 4, 2)
    origin = cond.condition(context)._inverse(x)
    expected = base(2).log_prob(origin) - brute_force_ladj(cond.condition(context), origin)
    assert_close(flow_dist.log_prob(x), expected, rtol=0, atol=1e-6)


# Bad input


@every_flow
@pytest.mark.parametrize("direction", ["__call__", "inv"])
def test_input_must_fit(make, direction):
    flow = make(3)
    evaluate = getattr(flow, direction)
    with pytest.raises(ValueError, match=r"shape \(\*, 3\), but got \(4, 2\)"):
        evaluate(torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"shape \(\*, 3\), but got \(\)"):
        evaluate(torch.tensor(1.0))
    with pytest.raises(ValueError, match="floating-point type, but got torch.int64"):
        evaluate(torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input is torch.float32 .* network is torch.float64"):
        evaluate(torch.randn(4, 3, dtype=torch.float32))


@every_flow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_input_must_be_finite(make, value):
    flow = make(3)
    x = draw(flow, 2, 4)
    x[1, 2, 0] = value
    for evaluate in (flow, flow.inv, flow.call_and_ladj, flow._call, flow._inverse):
        with pytest.raises(ValueError, match=r"must be finite, but sample \(1, 2\) is not"):
            evaluate(x)


@every_conditional
def test_context_must_fit(make):
    cond = make(2)
    for context in (torch.zeros(5, CONTEXT_DIM + 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"context must have shape \(\*, 3\)"):
            cond.condition(context)
    for context_shape, batch_shape in [((5,), (4,)), ((5,), ()), ((2, 4), (4,)), ((5,), (4, 1))]:
        flow = cond.condition(torch.zeros(*context_shape, CONTEXT_DIM))
        with pytest.raises(ValueError, match="context has batch shape .* does not broadcast"):
            flow(torch.randn(*batch_shape, 2))


@every_conditional
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64], ids=str)
def test_context_must_be_of_the_type_of_the_network(make, dtype):
    context = torch.zeros(4, CONTEXT_DIM, dtype=dtype)
    with pytest.raises(ValueError, match=f"context .*{dtype}"):
        make(2).condition(context)(torch.randn(4, 2))


@every_conditional
def test_context_that_is_not_finite(make):
    context = torch.zeros(4, CONTEXT_DIM)
    context[2, 1] = math.nan
    with pytest.raises((ValueError, SolverError), match="finite"):
        make(2, solver=Solver()).condition(context)(torch.randn(4, 2))


@every_flow
@pytest.mark.parametrize("solver", [Solver(), QUICK], ids=["adaptive", "fixed"])
def test_parameters_that_are_not_finite(make, solver):
    flow = make(2, solver=solver)
    with torch.no_grad():
        next(flow.nn.parameters()).fill_(math.nan)
    with pytest.raises(SolverError, match="finite"):
        flow(draw(flow, 4))


@every_flow
def test_diverging_field(make):
    flow = make(2, solver=Solver(max_nfe=100))
    with torch.no_grad():
        for parameter in flow.nn.parameters():
            parameter.mul_(1e4)
    with pytest.raises(SolverError, match="worst sample"):
        flow(draw(flow, 4))


@every_flow
@pytest.mark.parametrize("batch_shape", [(0,), (3, 0)], ids=str)
def test_empty_batch(make, batch_shape):
    flow = make(2)
    x = draw(flow, *batch_shape)
    y, ladj = flow.call_and_ladj(x)
    assert y.shape == flow.inv(x).shape == x.shape
    assert ladj.shape == batch_shape


# Cache sizes and inverses; the cache itself has its own file


@every_flow
def test_with_cache(make):
    flow = make(2)
    assert flow.with_cache(1) is flow
    uncached = flow.with_cache(0)
    assert type(uncached) is type(flow) and uncached.nn is flow.nn
    assert uncached.with_cache(0) is uncached
    assert flow.inv.with_cache(0).inv.nn is flow.nn
    x = draw(flow, 4)
    assert flow(x) is flow(x)
    assert uncached(x) is not uncached(x)
    assert_close(uncached(x), flow(x), rtol=0, atol=0)
    assert uncached.with_cache(1)(x) is not flow(x)
    with pytest.raises(ValueError, match="cache_size must be 0 or 1"):
        flow.with_cache(2)


@every_flow
def test_inverse_of_the_inverse(make):
    flow = make(2)
    assert flow.inv.inv is flow
    assert flow.inv == flow.inv


def test_cache_size_is_checked():
    with pytest.raises(ValueError, match="cache_size must be 0 or 1"):
        HollowCNF(HollowNN(2), cache_size=2)


# Statistics


@every_module
def test_last_solve(make):
    flow = make(2)
    assert flow.last_solve is None
    flow(draw(flow, 4))
    forward = flow.last_solve
    assert forward.nfe == 16  # four steps of four stages
    flow.inv(draw(flow, 4))
    assert flow.last_solve is not forward and flow.last_solve.nfe == 16


@every_conditional
def test_last_solve_of_a_conditional(make):
    cond = make(2, solver=Solver())
    flow = cond.condition(torch.zeros(CONTEXT_DIM))
    assert cond.last_solve is None and flow.last_solve is None
    flow(torch.randn(4, 2))
    assert cond.last_solve is flow.last_solve
    assert cond.last_solve.nfe > 0 and cond.last_solve.accepted > 0


# Copies


@every_module
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_copies(make, duplicate, used):
    flow = make(2)
    x = draw(flow, 4)
    if used:
        flow_dist = dist.TransformedDistribution(base(2), [flow])
        flow_dist.log_prob(flow_dist.rsample((3,)))
        flow.inv(x)
    twin = duplicate(flow)
    assert_close(twin.call_and_ladj(x), flow.call_and_ladj(x), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert (twin(x) - flow(x)).abs().max() > 1e-3


@every_conditional
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_a_conditional(make, duplicate):
    cond = make(2)
    context, x = torch.randn(4, CONTEXT_DIM), torch.randn(4, 2)
    flow = cond.condition(context)
    y = flow(x)
    assert_close(duplicate(cond).condition(context)(x), y, rtol=0, atol=0)
    assert_close(duplicate(flow)(x), y, rtol=0, atol=0)


def saved(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_module
def test_state_dict(make):
    flow, other = make(2), make(2)
    x = draw(flow, 4)
    assert (flow(x) - other(x)).abs().max() > 1e-3
    other.load_state_dict(saved(flow), strict=True)
    assert_close(other.call_and_ladj(x), flow.call_and_ladj(x), rtol=0, atol=0)


@every_conditional
def test_state_dict_of_a_conditional(make):
    cond, other = make(2), make(2)
    context, x = torch.randn(4, CONTEXT_DIM), torch.randn(4, 2)
    other.load_state_dict(saved(cond), strict=True)
    assert_close(other.condition(context)(x), cond.condition(context)(x), rtol=0, atol=0)


@every_module
def test_to_float32(make):
    flow = make(2).to(torch.float32)
    assert {tensor.dtype for tensor in [*flow.parameters(), *flow.buffers()]} == {torch.float32}
    y, ladj = flow.call_and_ladj(draw(flow, 4).float())
    assert y.dtype == ladj.dtype == torch.float32
    with pytest.raises(ValueError, match="float64"):
        flow(draw(flow, 4))


# In Pyro's containers


@every_module
def test_pyro_module(make):
    flow = make(2)
    assert pyro.module("flow", flow) is flow
    names = {f"flow$$${name}" for name, _ in flow.named_parameters()}
    assert names == set(pyro.get_param_store().keys())


def check_composition(flow, parts, parameters):
    """The flow is that of the parts, one after the other, and its parameters are theirs, each of them once."""
    x = torch.randn(4, 2)
    end, ladj = x, 0.0
    for part in parts:
        start, end = end, part._call(end)
        ladj = ladj + brute_force_ladj(part, start)
    y = flow(x)
    assert_close(y, end)
    assert_close(flow.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=1e-6)
    assert_close(flow.inv(y.clone()), x, rtol=0, atol=1e-6)
    expected = [id(parameter) for part in parts for parameter in part.nn.parameters()]
    assert sorted(id(parameter) for parameter in parameters) == sorted(expected)


@every_module
def test_iterated(make):
    flow = dist.transforms.iterated(2, partial(make, solver=TIGHT), 2)
    check_composition(flow, list(flow), flow.parameters())


def test_iterated_helper():
    flow = dist.transforms.iterated(2, hollow_cnf, 2)
    x = torch.randn(3, 2)
    assert len(flow) == 2 and flow(x).shape == x.shape


@pytest.mark.parametrize("cache_size", [0, 1])
def test_composition(cache_size):
    parts = [make(2, solver=TIGHT) for make in MODULES.values()]
    flow = ComposeTransformModule(parts, cache_size=cache_size)
    check_composition(flow, parts, flow.parameters())


@pytest.mark.parametrize("cache_size", [0, 1])
def test_conditional_composition(cache_size):
    parts = [make(2, solver=TIGHT) for make in CONDITIONAL.values()]
    plain = MODULES["grouped"](2, solver=TIGHT)
    flow = ConditionalComposeTransformModule([*parts, plain], cache_size=cache_size)
    context = torch.randn(4, CONTEXT_DIM)
    conditioned = [part.condition(context) for part in parts]
    check_composition(flow.condition(context), [*conditioned, plain], flow.parameters())


# Devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_flow
def test_cuda(make):
    host = make(3, solver=TIGHT)
    device = copy.deepcopy(host)
    device.nn.cuda()
    if device.context is not None:
        device.context = device.context.cuda()
    x = draw(host, 4)
    y, ladj = device.call_and_ladj(x.cuda())
    assert y.is_cuda and ladj.is_cuda
    assert_close((y.cpu(), ladj.cpu()), host.call_and_ladj(x), rtol=0, atol=1e-6)
    assert_close(device._inverse(y).cpu(), x, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="input is torch.float64 on cpu, but the network"):
        device(x)


def test_inverse_gives_both_by_one_solve():
    flow = hollow_cnf(3, cache_size=0, solver=Solver(rtol=1e-9, atol=1e-9))
    y = torch.randn(4, 3)
    x, ladj = flow.inv.call_and_ladj(y)
    torch.testing.assert_close(flow(x), y, rtol=0.0, atol=1e-6)
    torch.testing.assert_close(ladj, -flow.log_abs_det_jacobian(x, y), rtol=0.0, atol=1e-6)


def test_sibling_has_registers_of_its_own():
    flow = hollow_cnf(3)
    sibling = flow.with_cache(0)
    assert sibling.nn is flow.nn
    network = flow.nn
    sibling.nn = hollow_cnf(3).nn
    assert flow.nn is network


def test_zero_inputs_have_finite_gradients():
    x = torch.randn(5, 3)
    x[2] = 0
    x.requires_grad_()
    hollow_cnf(3)(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("make", [hollow_cnf, lambda *args, **kwargs: conditional_hollow_cnf(*args, 3, **kwargs)])
def test_flows_bound_their_rates_by_default(make):
    assert make(2).nn.transformer.max_rate == 4.0
    assert make(2, time=0.5).nn.transformer.max_rate == 8.0
    assert make(2, max_rate=None).nn.transformer.max_rate is None
    make(2, transformer=torch.nn.Linear(34, 1))  # to which a maximal rate does not apply


def test_conditional_flow_without_a_context():
    with pytest.raises(ValueError, match="context_dim must be at least 1, but got 0; hollow_cnf takes no context"):
        conditional_hollow_cnf(2, 0)


MAKERS = {
    "hollow_cnf": partial(hollow_cnf, 2),
    "conditional_hollow_cnf": partial(conditional_hollow_cnf, 2, 3),
    "free_form_cnf": partial(free_form_cnf, 2),
    "conditional_free_form_cnf": partial(conditional_free_form_cnf, 2, 3),
}
CLASSES = {
    "HollowCNF": lambda **kwargs: HollowCNF(HollowNN(2), **kwargs),
    "ConditionedHollowCNF": lambda **kwargs: ConditionedHollowCNF(ConditionalHollowNN(2, 0), **kwargs),
    "ConditionalHollowCNF": lambda **kwargs: ConditionalHollowCNF(ConditionalHollowNN(2, 3), **kwargs),
    "FreeFormCNF": lambda **kwargs: FreeFormCNF(FreeFormNN(2, 0, [4]), **kwargs),
    "ConditionalFreeFormCNF": lambda **kwargs: ConditionalFreeFormCNF(FreeFormNN(2, 3, [4]), **kwargs),
}
NETWORKS = {
    "HollowNN": partial(HollowNN, 2),
    "ConditionalHollowNN": partial(ConditionalHollowNN, 2, 3),
    "FreeFormNN": partial(FreeFormNN, 2, 0, hidden_dims=[4]),
    "LowRankFreeFormNN": partial(LowRankFreeFormNN, 2, 3, hidden_dims=[4], rank=1),
}
WITH_SOLVER, WITH_WIDTHS = {**MAKERS, **CLASSES}, {**MAKERS, **NETWORKS}


@pytest.mark.parametrize("make", WITH_SOLVER.values(), ids=WITH_SOLVER)
def test_a_solver_is_given_and_assigned_by_name(make):
    flow = make(solver="rk4")
    assert flow.solver == Solver("rk4")
    flow.solver = "bosh3"
    assert flow.solver == Solver("bosh3")
    if hasattr(flow, "condition"):
        assert flow.condition(torch.zeros(3)).solver is flow.solver
    for copied in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert copied.solver == flow.solver
    for wrong, error in ((1e-5, TypeError), ("dopri", ValueError)):
        with pytest.raises(error, match="dopri5"):
            make(solver=wrong)
        with pytest.raises(error, match="dopri5"):
            flow.solver = wrong


@pytest.mark.parametrize("make", WITH_SOLVER.values(), ids=WITH_SOLVER)
def test_a_misspelled_keyword_is_answered_by_the_closest(make, request):
    with pytest.raises(
        TypeError, match=rf"{request.node.callspec.id}\(\) has no keyword 'sovler': did you mean 'solver'"
    ):
        make(sovler="rk4")


@pytest.mark.parametrize("make", WITH_WIDTHS.values(), ids=WITH_WIDTHS)
def test_misspelled_widths_are_answered_by_hidden_dims(make):
    with pytest.raises(TypeError, match="no keyword 'hiden_dims': did you mean 'hidden_dims'"):
        make(hiden_dims=[4])
    with pytest.raises(TypeError, match="no keyword 'zzzz': It takes input_dim"):
        make(zzzz=1)


@pytest.mark.parametrize("name", ["hollow_cnf", "conditional_hollow_cnf", "HollowNN", "ConditionalHollowNN"])
def test_keywords_of_the_network_are_known(name):
    with pytest.raises(TypeError, match="did you mean 'activation'"):
        WITH_WIDTHS[name](activaton="silu")
    with pytest.raises(ValueError, match=r"activation must be one of \['silu', 'softplus', 'tanh'\]"):
        WITH_WIDTHS[name](activation="relu")
    with pytest.raises(ValueError, match=r"activation must be one of \['silu', 'softplus', 'tanh'\]"):
        WITH_WIDTHS[name](activation=torch.tanh)
    with pytest.raises(ValueError, match=r"conditioner must be one of \['grouped', 'leave-one-out', 'masked'\]"):
        WITH_WIDTHS[name](conditioner="group")


WRONG_WIDTHS = {
    "integer": (64, TypeError, r"\[64\]"),
    "number": (6.5, TypeError, r"\[6\]"),
    "zero": ([0], ValueError, r"got \[0\]"),
    "negative": ([8, -1], ValueError, r"got \[8, -1\]"),
    "floats": ([8.0], TypeError, "integers.*got"),
    "string": ("64", TypeError, "integers.*got '64'"),
}


@pytest.mark.parametrize("widths, error, message", WRONG_WIDTHS.values(), ids=WRONG_WIDTHS)
@pytest.mark.parametrize("make", WITH_WIDTHS.values(), ids=WITH_WIDTHS)
def test_wrong_widths_are_refused_with_what_to_write(make, widths, error, message):
    with pytest.raises(error, match=f"hidden_dims.*{message}"):
        make(hidden_dims=widths)


def test_a_nonlinearity_must_be_a_module():
    with pytest.raises(TypeError, match=r"nonlinearity must be a module, for example nn.Tanh\(\), but got 'tanh'"):
        free_form_cnf(2, nonlinearity="tanh")


# Memory


@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
def test_large_batches_are_solved_in_parts(monkeypatch, context):
    torch.manual_seed(0)
    flow = hollow_cnf(3, solver="rk4")  # a fixed step, so that parts make no difference
    if context:
        flow = conditional_hollow_cnf(3, 2, solver="rk4").condition(torch.tensor([0.5, -1.0]))
    flow, x, score = flow.with_cache(0), torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    calls = [lambda: flow.call_and_ladj(x), lambda: flow.inv.call_and_ladj(x), lambda: flow.call_and_score(x, score)]
    with torch.no_grad():
        whole = [call() for call in calls]
    sizes, solve = [], ConditionedHollowCNF._solve

    def record(self, t0, t1, state, *score):
        sizes.append(state.shape)
        return solve(self, t0, t1, state, *score)

    monkeypatch.setattr(ConditionedHollowCNF, "_solve", record)
    monkeypatch.setattr("pyro_hollow.transforms.continuous._MANY_ELEMENTS", 0)
    monkeypatch.setattr("pyro_hollow.transforms.continuous.part_size", lambda num_bytes: 7)
    with torch.no_grad():
        for call, expected in zip(calls, whole, strict=True):
            assert_close(call(), expected)
    assert sizes == 3 * [(7, 3), (7, 3), (6, 3)]
    flow(x)  # with gradients
    assert sizes[-1] == x.shape


def test_a_part_takes_no_more_memory_than_allowed(monkeypatch):
    monkeypatch.setattr("pyro_hollow.ops.memory.MAX_BYTES", 2**20)
    flow, x = hollow_cnf(10), torch.randn(20_000, 10)
    with torch.no_grad():
        size = flow._part_size(x, 0.0)
        assert 1 < size < 1000
        field = flow._bind()
        assert sum(tensor.nbytes for tensor in field.with_divergence(x.new_zeros(()), x[:size])) < 2**20


def test_gradients_by_hand_are_refused_in_inference_mode():
    flow = hollow_cnf(2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="call_and_pull adds gradients"):
        flow.call_and_pull(torch.zeros(1, 2), torch.zeros(1, 2))
