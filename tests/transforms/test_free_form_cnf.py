# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transform_checks import (
    CONDITIONAL,
    CONTEXT_DIM,
    MODULES,
    QUICK,
    TIGHT,
    check_inverse,
    check_jacobian,
    check_metadata,
    check_shapes,
    check_training,
    draw,
    gradients,
)

from pyro_hollow import (
    ConditionalFreeFormCNF,
    ConditionalHollowCNF,
    FreeFormCNF,
    HollowCNF,
    Solver,
    conditional_free_form_cnf,
    free_form_cnf,
)
from pyro_hollow.transforms import ConditionedFreeFormCNF, FreeFormNN, LowRankFreeFormNN
from pyro_hollow.transforms.free_form_cnf import _ELEMENTWISE

every_probe = pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
strong_free_form = MODULES["free-form"]
strong_conditional_free_form = CONDITIONAL["free-form"]


class Elementwise(nn.Module):
    """A field with a diagonal Jacobian."""

    def __init__(self, input_dim):
        super().__init__()
        self.input_dim = input_dim
        self.weight = nn.Parameter(torch.randn(input_dim))

    def forward(self, t, x):
        return (self.weight * x + t).tanh()


class Rotation(nn.Module):
    """A field without parameters, whose solution is known."""

    input_dim = 2

    def forward(self, t, x):
        return torch.stack([-x[..., 1], x[..., 0]], dim=-1)


class Still(nn.Module):
    """A field that depends on nothing."""

    input_dim = 2

    def forward(self, t, x):
        return torch.ones_like(x)


class Pulled(nn.Module):
    """A field that pulls the state towards the context."""

    input_dim = context_dim = 2

    def __init__(self):
        super().__init__()
        self.log_rate = nn.Parameter(torch.tensor(-0.5))

    def forward(self, t, x, context):
        return self.log_rate.exp() * (context - x)


def log_determinants(flow, x, count):
    """One estimate a row, each of them with a probe of its own."""
    with torch.no_grad():
        return flow.call_and_ladj(x.expand(count, *x.shape))[1]


# Exact divergence


@pytest.mark.parametrize("input_dim", [1, 2, 5])
def test_exact_divergence(input_dim):
    flow = strong_free_form(input_dim)
    t, x = torch.tensor(0.3), draw(flow, 3, 4)
    value, divergence = flow._bind().with_divergence(t, x)
    assert_close(value, flow.nn(t, x))
    jacobians = torch.vmap(torch.func.jacrev(lambda x: flow.nn(t, x)))(x.view(-1, input_dim))
    assert_close(divergence, jacobians.diagonal(dim1=1, dim2=2).sum(-1).view(3, 4))


HIDDEN = pytest.mark.parametrize(
    "hidden_dims", [(), (5,), (5, 6), (5, 6, 4)], ids=["no hidden layer", "one", "two", "three"]
)


def dense(kind, hidden_dims=(5, 6), nonlinearity=None):
    """A network with parameters that are far from zero, and a context for it, or None."""
    if kind == "low rank":
        network = LowRankFreeFormNN(3, CONTEXT_DIM, hidden_dims, 2, nonlinearity)
    else:
        network = FreeFormNN(3, CONTEXT_DIM if kind == "context" else 0, hidden_dims, nonlinearity)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    return network, None if kind == "no context" else torch.randn(4, CONTEXT_DIM, requires_grad=True)


def by_jacobian(network, t, x, context):
    """The trace of each sample's whole Jacobian."""
    jacobian = torch.autograd.functional.jacobian(lambda x: network(t, x, context).sum((0, 1)), x)
    return jacobian.diagonal(dim1=0, dim2=-1).sum(-1)


every_kind = pytest.mark.parametrize("kind", ["no context", "context", "low rank"])


@every_kind
@HIDDEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_trace_in_closed_form(kind, hidden_dims, dtype):
    torch.set_default_dtype(dtype)
    network, context = dense(kind, hidden_dims, nn.Tanh())
    t, x = torch.tensor(0.3), torch.randn(2, 4, 3)
    field = ConditionedFreeFormCNF(network, context)._bind()
    assert (field._kernel is None) == (len(hidden_dims) == 3)
    value, divergence = field.with_divergence(t, x)
    assert_close(value, network(t, x, context))
    assert_close(divergence, by_jacobian(network, t, x, context))
    with torch.no_grad():
        assert_close(field.with_divergence(t, x), (value.detach(), divergence.detach()))


@pytest.mark.parametrize("nonlinearity", _ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_trace_for_every_activation(nonlinearity):
    network, context = dense("context", nonlinearity=nonlinearity())
    t, x = torch.tensor(0.3), torch.randn(1, 4, 3)
    field = ConditionedFreeFormCNF(network, context)._bind()
    assert field._kernel is not None
    assert_close(field.with_divergence(t, x)[1], by_jacobian(network, t, x, context))


@every_kind
@pytest.mark.parametrize("nonlinearity", [nn.Softmax(-1), nn.Sequential(nn.Tanh())], ids=["softmax", "unknown"])
def test_trace_where_no_closed_form_is_known(kind, nonlinearity):
    """A softmax mixes the numbers of a layer, so the closed form would be wrong."""
    network, context = dense(kind, nonlinearity=nonlinearity)
    t, x = torch.tensor(0.3), torch.randn(1, 4, 3)
    field = ConditionedFreeFormCNF(network, context)._bind()
    assert field._kernel is None
    assert_close(field.with_divergence(t, x)[1], by_jacobian(network, t, x, context))


@every_kind
@HIDDEN
def test_gradients_of_the_trace(kind, hidden_dims):
    """Against backward passes, of a whole log-determinant."""
    network, context = dense(kind, hidden_dims)
    x, results = torch.randn(4, 3, requires_grad=True), []
    wanted = [x, *network.parameters(), *([] if context is None else [context])]
    for closed in (True, False):
        flow = ConditionedFreeFormCNF(network, context, solver=QUICK)
        if not closed:
            flow._bind = partial(bind_by_backward_passes, flow)
        y, ladj = flow.call_and_ladj(x)
        results.append(torch.autograd.grad((y.sin().sum(-1) + ladj.square()).sum(), wanted))
    assert_close(results[0], results[1])


def bind_by_backward_passes(flow):
    field = type(flow)._bind(flow)
    field._kernel, field.tensors = None, field._field.tensors
    return field


@every_kind
def test_second_derivatives_of_the_trace(kind):
    network, context = dense(kind)
    inputs = [torch.randn(4, 3, requires_grad=True), *([] if context is None else [context])]

    def divergence(x, context=None):
        return ConditionedFreeFormCNF(network, context)._bind().with_divergence(torch.tensor(0.3), x)[1]

    assert torch.autograd.gradcheck(divergence, inputs)
    assert torch.autograd.gradgradcheck(divergence, inputs)


def test_wide_layers_of_each_samples_own():
    """For 3 dimensions backward passes take less memory than a kernel of 64 x 64 numbers a sample."""
    network, context = dense("low rank", (64, 64))
    t, x = torch.tensor(0.3), torch.randn(1, 4, 3)
    field = ConditionedFreeFormCNF(network, context)._bind()
    assert field._kernel is None
    assert_close(field.with_divergence(t, x)[1], by_jacobian(network, t, x, context))


@pytest.mark.parametrize("context_dim", [0, 2])
def test_free_form_network_by_hand(context_dim):
    network = FreeFormNN(3, context_dim, [5, 6], nn.Tanh())
    t, x = torch.tensor(0.3), torch.randn(3)
    context = torch.randn(context_dim)
    h = torch.cat([x, t.view(1), context])
    for layer in network.layers[:-1]:
        h = layer(h).tanh()
    assert_close(network(t, x, context if context_dim else None), network.layers[-1](h))


def identity_hook(*args):
    return None


class Shifted(FreeFormNN):
    """Overrides forward, of which the layers know nothing."""

    def forward(self, t, x, context=None):
        return x.sin() + super().forward(t, x, context)


class Adapted(nn.Linear):
    """Overrides the forward of a layer."""

    def forward(self, x):
        return 2 * super().forward(x)


class Swish(nn.Module):
    """An activation that learns."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


def replace_layer(network):
    network.layers[1] = Adapted(5, 6)


NOT_PLAIN = {
    "in place": lambda network: setattr(network, "nonlinearity", nn.SiLU(inplace=True)),
    "activation that learns": lambda network: setattr(network, "nonlinearity", Swish()),
    "another layer": replace_layer,
    "no bias": lambda network: setattr(network.layers[1], "bias", None),
    "hook of the network": lambda network: network.register_forward_hook(lambda m, args, out: 2 * out),
    "hook of a layer": lambda network: network.layers[0].register_forward_hook(lambda m, args, out: 2 * out),
    "hook of the activation": lambda network: network.nonlinearity.register_forward_hook(
        lambda m, args, out: out.softmax(-1)
    ),
    "hook before": lambda network: network.layers[1].register_forward_pre_hook(identity_hook),
    "own forward": lambda network: setattr(network, "forward", lambda t, x, context=None: x.sin()),
    "old weight norm": lambda network: torch.nn.utils.weight_norm(network.layers[1]),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN)
@pytest.mark.parametrize("kind", ["no context", "context"])
def test_trace_of_networks_that_were_changed(kind, change):
    network, context = dense(kind)
    change(network)
    t, x = torch.tensor(0.3), torch.randn(1, 4, 3)
    field = ConditionedFreeFormCNF(network, context)._bind()
    assert field._kernel is None
    value, divergence = field.with_divergence(t, x)
    assert_close(value, network(t, x, context))
    assert_close(divergence, by_jacobian(network, t, x, context))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ["in place", "activation that learns", "hook of a layer", "hook of the activation"])
def test_trace_of_low_rank_networks_that_were_changed(name):
    network, context = dense("low rank")
    NOT_PLAIN[name](network)
    t, x = torch.tensor(0.3), torch.randn(1, 4, 3)
    field = ConditionedFreeFormCNF(network, context)._bind()
    assert field._kernel is None
    assert_close(field.with_divergence(t, x)[0], network(t, x, context))
    assert_close(field.with_divergence(t, x)[1], by_jacobian(network, t, x, context))


def test_trace_of_a_subclass():
    network = Shifted(3, 0, [5, 6])
    t, x = torch.tensor(0.3), torch.randn(1, 4, 3)
    value, divergence = FreeFormCNF(network)._bind().with_divergence(t, x)
    assert_close(value, network(t, x))
    assert_close(divergence, by_jacobian(network, t, x, None))


@every_kind
def test_trace_with_a_parametrization(kind):
    network, context = dense(kind)
    torch.nn.utils.parametrizations.weight_norm(network.layers[1])
    t, x = torch.tensor(0.3), torch.randn(1, 4, 3)
    field = ConditionedFreeFormCNF(network, context)._bind()
    assert field._kernel is not None
    assert_close(field.with_divergence(t, x)[1], by_jacobian(network, t, x, context))


@pytest.mark.parametrize("kind", ["no context", "low rank"])
@pytest.mark.parametrize("adjoint", [False, True], ids=["direct", "adjoint"])
def test_activation_that_learns(adjoint, kind):
    network, context = dense(kind, nonlinearity=Swish())
    flow = ConditionedFreeFormCNF(network, context, solver=replace(TIGHT, adjoint=adjoint))
    flow.call_and_ladj(torch.randn(4, 3))[1].sum().backward()
    assert network.nonlinearity.beta.grad.abs() > 1e-3


@pytest.mark.parametrize("context_dim, got", [(0, 2), (2, None), (2, 3)])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_context_of_a_wrong_size(divergence, context_dim, got):
    """In particular, one that is missing is not taken for zero."""
    context = None if got is None else torch.randn(4, got)
    flow = ConditionedFreeFormCNF(FreeFormNN(3, context_dim, [5]), context, divergence=divergence, solver=QUICK)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        flow(torch.randn(4, 3))


@every_kind
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("enabled", [False, True], ids=["no_grad", "grad"])
def test_forward_mode(kind, divergence, frozen, enabled):
    network, context = dense(kind)
    network.requires_grad_(not frozen)
    flow = ConditionedFreeFormCNF(network, context, divergence=divergence)
    field, t, x, tangent = flow._bind(), torch.tensor(0.3), torch.randn(4, 3), torch.randn(4, 3)
    field.with_divergence(t, x)  # draws the probe
    step = 1e-5
    ahead, behind = (field.with_divergence(t, x + sign * step * tangent) for sign in (1, -1))
    with torch.set_grad_enabled(enabled):
        _, tangents = torch.func.jvp(lambda x: field.with_divergence(t, x), (x,), (tangent,))
    for got, a, b in zip(tangents, ahead, behind, strict=True):
        assert_close(got, (a - b) / (2 * step), rtol=1e-4, atol=1e-6)


@every_kind
def test_context_made_in_inference_mode(kind):
    network, context = dense(kind)
    if context is not None:
        with torch.inference_mode():
            context = torch.randn(4, CONTEXT_DIM)
    ConditionedFreeFormCNF(network, context, solver=QUICK).call_and_ladj(torch.randn(4, 3))[1].sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    "batch, adjoint, kernel", [((4,), False, True), ((4,), True, False), ((1,), True, True), ((), True, True)]
)
def test_kernels_of_each_sample(batch, adjoint, kernel):
    """The adjoint method would carry the gradient of each along."""
    network, _ = dense("low rank", (8, 8))
    flow = ConditionedFreeFormCNF(network, torch.randn(*batch, CONTEXT_DIM), solver=replace(QUICK, adjoint=adjoint))
    assert (flow._bind()._kernel is not None) == kernel


# Estimated divergence


@every_probe
def test_estimate_is_unbiased(probe):
    """Of the whole log-determinant, for the state does not depend on the probe."""
    flow = strong_free_form(3, divergence="hutchinson", probe=probe)
    x = draw(flow)
    estimates = log_determinants(flow, x, 4000)
    flow.divergence = "exact"
    exact = log_determinants(flow, x, 1).squeeze(0)
    standard_error = estimates.std() / math.sqrt(len(estimates))
    assert 1e-4 < standard_error < 0.1
    assert (estimates.mean() - exact).abs() < 4 * standard_error


@every_probe
def test_estimate_for_a_diagonal_jacobian(probe):
    """Rademacher probes are exact there, Gaussian ones are not: so each is what its name says."""
    flow = FreeFormCNF(Elementwise(3), divergence="hutchinson", probe=probe, solver=QUICK)
    x = draw(flow)
    estimates = log_determinants(flow, x, 100)
    flow.divergence = "exact"
    exact = log_determinants(flow, x, 1)
    if probe == "rademacher":
        assert_close(estimates, exact.expand(100))
    else:
        assert (estimates - exact).abs().max() > 0.1


@every_probe
def test_probe_changes_between_solves_only(probe):
    flow = strong_free_form(3, divergence="hutchinson", probe=probe)
    t, x = torch.tensor(0.3), draw(flow, 4)
    field = flow._bind()
    first = field.with_divergence(t, x)[1]
    field.with_divergence(t + 0.1, x + 0.1)
    assert_close(field.with_divergence(t, x)[1], first, rtol=0, atol=0)
    assert (flow._bind().with_divergence(t, x)[1] - first).abs().max() > 1e-3


def test_solves_differ_and_repeat_with_the_seed():
    flow = strong_free_form(3, divergence="hutchinson")
    x = draw(flow, 4)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(flow.log_abs_det_jacobian(x, x))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[0] - results[2]).abs().max() > 1e-3


@every_probe
@pytest.mark.parametrize("adjoint", [False, True], ids=["direct", "adjoint"])
def test_sample_and_its_score_share_the_estimate(probe, adjoint):
    flow = strong_free_form(3, divergence="hutchinson", probe=probe, solver=replace(QUICK, adjoint=adjoint))
    x = draw(flow, 4)
    y, ladj = flow.call_and_ladj(x)
    assert_close(-flow.inv.log_abs_det_jacobian(y, flow.inv(y)), ladj, rtol=0, atol=0)


class Wrong(nn.Module):
    """A field of another shape than the state, which broadcasts."""

    input_dim = 3

    def __init__(self, reduce):
        super().__init__()
        self.layer, self.reduce = nn.Linear(3, 3), reduce

    def forward(self, t, x):
        return self.reduce(self.layer(x))


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("reduce", [lambda f: f[..., :1], lambda f: f.sum(0)], ids=["columns", "batch"])
def test_fields_of_another_shape_are_refused(reduce, divergence, solver):
    with pytest.raises((ValueError, RuntimeError), match=r"must return shapes|must match|shape mismatch|Mismatch"):
        FreeFormCNF(Wrong(reduce), divergence=divergence, solver=solver)(torch.randn(4, 3))


@pytest.mark.parametrize(
    "divergence, probe", [("exact", "rademacher"), ("hutchinson", "rademacher"), ("hutchinson", "gaussian")]
)
def test_adjoint_and_direct_gradients(divergence, probe):
    context = torch.randn(4, CONTEXT_DIM, requires_grad=True)
    x = torch.randn(4, 3)
    cond = strong_conditional_free_form(3, divergence=divergence, probe=probe, solver=TIGHT)
    results = []
    for adjoint in (False, True):
        cond.solver = replace(TIGHT, adjoint=adjoint)
        torch.manual_seed(0)
        results.append(gradients(cond.condition(context), x, context))
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


# An initial state that requires gradients arrives in the adjoint method's forward solve in a form of its own.
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_adjoint_value_does_not_depend_on_who_wants_gradients(divergence, method):
    flow = strong_free_form(3, divergence=divergence, solver=Solver(method, adjoint=True))
    x = draw(flow, 4)
    results = []
    for requires_grad in (False, True):
        torch.manual_seed(0)
        results.append(flow.call_and_ladj(x.clone().requires_grad_(requires_grad)))
    assert_close(results[0], results[1], rtol=0, atol=1e-9)


def test_flow_with_estimates_is_a_transform():
    flow = strong_free_form(2, divergence="hutchinson")
    check_metadata(flow)
    check_shapes(flow, (3, 4))
    x = draw(flow, 4)
    assert_close(flow._inverse(flow._call(x)), x, rtol=0, atol=1e-3)
    check_training(FreeFormCNF(Elementwise(2), divergence="hutchinson", solver=QUICK))  # where estimates are exact


# Settings


@pytest.mark.parametrize("make", [free_form_cnf, partial(conditional_free_form_cnf, context_dim=3)])
def test_unknown_names(make):
    with pytest.raises(ValueError, match="divergence must be one of .*'hutchinson'.* but got 'hutchison'"):
        make(2, divergence="hutchison")
    with pytest.raises(ValueError, match="probe must be one of .*'gaussian'.* but got 'normal'"):
        make(2, divergence="hutchinson", probe="normal")


@pytest.mark.parametrize("make", [free_form_cnf, partial(conditional_free_form_cnf, context_dim=3)])
def test_unknown_names_assigned_later(make):
    """What is not "exact" must not be taken for an estimate silently."""
    flow = make(2)
    with pytest.raises(ValueError, match="divergence must be one of"):
        flow.divergence = "Exact"
        (flow.condition(torch.zeros(3)) if hasattr(flow, "condition") else flow)(torch.randn(4, 2))


def test_divergence_can_be_switched():
    flow = strong_free_form(3, divergence="hutchinson", solver=TIGHT)
    flow.call_and_ladj(draw(flow, 4))[1].sum().backward()
    torch.optim.SGD(flow.parameters(), lr=1e-2).step()
    flow.divergence = "exact"
    check_jacobian(flow)
    check_inverse(flow, (3,))


def test_divergence_of_a_conditional_can_be_switched():
    cond = strong_conditional_free_form(3, divergence="hutchinson", solver=TIGHT)
    cond.divergence = "exact"
    check_jacobian(cond.condition(torch.randn(CONTEXT_DIM)))


# Fields of one's own


def test_own_field():
    flow = FreeFormCNF(Elementwise(3), solver=TIGHT)
    check_inverse(flow, (3, 4))
    check_jacobian(flow)
    check_training(flow)


@pytest.mark.parametrize("adjoint", [False, True], ids=["direct", "adjoint"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_field_without_parameters(divergence, adjoint):
    flow = FreeFormCNF(Rotation(), divergence=divergence, time=math.pi / 2, solver=replace(TIGHT, adjoint=adjoint))
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True)
    y = flow(x)
    assert_close(y.detach(), torch.tensor([[-2.0, 1.0], [1.0, 0.5]]), rtol=0, atol=1e-6)
    if divergence == "exact":
        assert_close(flow.log_abs_det_jacobian(x, y).detach(), torch.zeros(2), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(y[:, 0].sum(), x)
    assert_close(gradient, torch.tensor([[0.0, -1.0]] * 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_field_that_depends_on_nothing(divergence):
    flow = FreeFormCNF(Still(), divergence=divergence, solver=QUICK)
    y, ladj = flow.call_and_ladj(torch.zeros(3, 2))
    assert_close(y, torch.ones(3, 2))
    assert_close(ladj, torch.zeros(3))


def test_own_field_with_context():
    cond = ConditionalFreeFormCNF(Pulled(), solver=TIGHT)
    x, context = torch.randn(4, 2), torch.randn(4, 2, requires_grad=True)
    y, ladj = cond.condition(context).call_and_ladj(x)
    rate = cond.nn.log_rate.exp()
    assert_close(y, context + (x - context) * (-rate).exp(), rtol=0, atol=1e-6)
    assert_close(ladj, (-2 * rate).expand(4), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), context)
    assert_close(gradient, (1 - (-rate).exp()).expand(4, 2), rtol=0, atol=1e-6)


# A hollow network, seen as any other: a second implementation of its flow


@pytest.mark.parametrize("name", ["grouped", "masked", "leave-one-out"])
def test_hollow_network_as_a_free_form_field(name):
    hollow = MODULES[name](3, solver=QUICK)
    other = FreeFormCNF(hollow.nn, solver=QUICK)
    assert isinstance(hollow, HollowCNF)
    x = draw(hollow, 4)
    assert_close(other.call_and_ladj(x), hollow.call_and_ladj(x))
    assert_close(gradients(other, x), gradients(hollow, x))


@pytest.mark.parametrize("name", ["grouped", "masked", "leave-one-out"])
def test_conditional_hollow_network_as_a_free_form_field(name):
    hollow = CONDITIONAL[name](3, solver=QUICK)
    other = ConditionalFreeFormCNF(hollow.nn, solver=QUICK)
    assert isinstance(hollow, ConditionalHollowCNF)
    x, context = torch.randn(4, 3), torch.randn(4, CONTEXT_DIM, requires_grad=True)
    flows = [cond.condition(context) for cond in (other, hollow)]
    assert_close(*(flow.call_and_ladj(x) for flow in flows))
    assert_close(*(gradients(flow, x, context) for flow in flows))


def test_field_that_does_not_depend_on_the_state():
    class Constant(torch.nn.Module):
        input_dim = 2

        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.ones(2))

        def forward(self, t, x):
            return self.bias.expand_as(x)

    y, ladj = FreeFormCNF(Constant()).call_and_ladj(torch.zeros(4, 2))
    torch.testing.assert_close(y, torch.ones(4, 2))
    torch.testing.assert_close(ladj, torch.zeros(4))


# Networks that a context changes by low rank


def low_rank(rank=2, hidden_dims=(5, 6), **kwargs):
    """With parameters that are far from zero, unlike fresh ones."""
    network = LowRankFreeFormNN(3, CONTEXT_DIM, hidden_dims, rank, **kwargs)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


def low_rank_flow(**kwargs):
    return ConditionalFreeFormCNF(low_rank(), solver=Solver(rtol=1e-8, atol=1e-8), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("hidden_dims", [(), (5,), (5, 6)], ids=["no hidden layer", "one", "two"])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_low_rank_by_hand(rank, hidden_dims, dtype):
    """Matrix by matrix, for one sample."""
    torch.set_default_dtype(dtype)
    network = low_rank(rank, hidden_dims, nonlinearity=nn.Tanh())
    t, x, context = torch.tensor(0.3), torch.randn(3), torch.randn(CONTEXT_DIM)
    amortized, h = network.amortization(context / CONTEXT_DIM**0.5), x
    for i, layer in enumerate(network.layers):
        outputs, inputs = layer.weight.shape
        (u, v, b), amortized = (
            amortized[: rank * (outputs + inputs) + outputs].split([rank * outputs, rank * inputs, outputs]),
            amortized[rank * (outputs + inputs) + outputs :],
        )
        weight = layer.weight + u.view(outputs, rank) @ v.view(inputs, rank).T / rank
        h = weight @ torch.cat([h.tanh() if i > 0 else h, t.view(1)]) + b
    assert len(amortized) == 0
    assert_close(network(t, x, context), h)


def test_low_rank_shapes():
    network, t = low_rank(), torch.tensor(0.3)
    x, context = torch.randn(2, 4, 3), torch.randn(4, CONTEXT_DIM)
    value = network(t, x, context)
    assert value.shape == (2, 4, 3)
    for i in range(2):
        for j in range(4):
            assert_close(value[i, j], network(t, x[i, j], context[j]))
    assert_close(network(t, x, context[:1]), network(t, x, context[0]))


def test_low_rank_bind_is_the_network():
    network, t = low_rank(), torch.tensor(0.3)
    x, context = torch.randn(4, 3), torch.randn(4, CONTEXT_DIM)
    field = network.bind(context)
    assert_close(field(t, x), network(t, x, context), rtol=0, atol=0)
    network.amortization.forward = None  # what depends on the context alone is computed once
    field(t + 0.1, x)


def test_low_rank_tensors_are_all_that_gradients_must_reach():
    network, context = low_rank(), torch.randn(4, CONTEXT_DIM, requires_grad=True)
    field = network.bind(context)
    value = field(torch.tensor(0.3), torch.randn(4, 3)).square().sum()
    cut = torch.autograd.grad(value, field.tensors, retain_graph=True)
    wanted = [context, *network.parameters()]
    expected = torch.autograd.grad(value, wanted, retain_graph=True)
    # Through these tensors alone comes the whole gradient.
    through = torch.autograd.grad(field.tensors, wanted, cut, materialize_grads=True)
    assert_close(through, expected)
    assert all(gradient.abs().max() > 0 for gradient in expected)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_low_rank_adjoint_and_direct_gradients(divergence):
    context, x = torch.randn(4, CONTEXT_DIM, requires_grad=True), torch.randn(4, 3)
    cond, results = low_rank_flow(divergence=divergence), []
    for adjoint in (False, True):
        cond.solver = replace(cond.solver, adjoint=adjoint)
        torch.manual_seed(0)
        results.append(gradients(cond.condition(context), x, context))
    assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_low_rank_flow_is_a_transform():
    cond, context = low_rank_flow(), torch.randn(1, CONTEXT_DIM)
    check_inverse(cond.condition(context), (2,))
    check_jacobian(cond.condition(context))
    cond.solver = QUICK
    flow = cond.condition(context)
    check_metadata(flow)
    check_shapes(flow, (2, 4))
    check_training(flow)


def test_rank_chooses_the_network():
    context, x = torch.randn(4, CONTEXT_DIM), torch.randn(4, 3)
    flow = conditional_free_form_cnf(3, CONTEXT_DIM, [8], rank=2, divergence="hutchinson", probe="gaussian")
    assert isinstance(flow.nn, LowRankFreeFormNN)
    assert (flow.nn.rank, flow.nn.input_dim, flow.nn.context_dim) == (2, 3, CONTEXT_DIM)
    assert [tuple(layer.weight.shape) for layer in flow.nn.layers] == [(8, 4), (3, 9)]
    assert (flow.divergence, flow.probe) == ("hutchinson", "gaussian")
    assert isinstance(flow.nn.nonlinearity, nn.Softplus)
    # A fresh flow is close to the identity, but not the identity, and the context has a part in it.
    first, second = (flow.condition(c)(x) for c in (context, -context))
    assert 1e-4 < (first - x).abs().max() < 0.5
    assert (first - second).abs().max() > 1e-6
    assert isinstance(conditional_free_form_cnf(3, CONTEXT_DIM).nn, FreeFormNN)


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_below_one(rank):
    with pytest.raises(ValueError, match=f"rank must be at least 1, but got {rank}"):
        LowRankFreeFormNN(3, CONTEXT_DIM, [8], rank)
    with pytest.raises(ValueError, match=f"rank must be at least 1, but got {rank}"):
        conditional_free_form_cnf(3, CONTEXT_DIM, rank=rank)
