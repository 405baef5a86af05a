# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Flows under the transforms of torch.func and under torch.compile."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.testing import assert_close

from pyro_hollow.nn import HollowNN
from pyro_hollow.ode import Solver
from pyro_hollow.transforms import conditional_free_form_cnf, conditional_hollow_cnf, free_form_cnf, hollow_cnf

SOLVERS = {
    "adaptive": Solver(rtol=1e-9, atol=1e-9),
    "bosh3": Solver("bosh3", rtol=1e-7, atol=1e-7),
    "fixed": Solver("rk4", options={"step_size": 0.25}),
    "compiled": Solver(rtol=1e-9, atol=1e-9, compile=True),
}
FLOWS = {
    "hollow": lambda solver: hollow_cnf(2, [4, 4], solver=solver),
    "conditional": lambda solver: conditional_hollow_cnf(2, 3, [4, 4], solver=solver).condition(torch.randn(3)),
    "free-form": lambda solver: free_form_cnf(2, [4, 4], solver=solver),
    "free-form of a context": lambda solver: conditional_free_form_cnf(2, 3, [4, 4], rank=1, solver=solver).condition(
        torch.randn(3)
    ),
}
VIEWS = {
    "value": lambda flow: flow,
    "inverse": lambda flow: flow.inv,
    "log-determinant": lambda flow: lambda x: flow.call_and_ladj(x)[1],
    "log-determinant by itself": lambda flow: lambda x: flow.log_abs_det_jacobian(x, x),
}


@pytest.mark.parametrize(
    "solver",
    [pytest.param(SOLVERS[name], id=name, marks=[pytest.mark.slow] if name == "bosh3" else []) for name in SOLVERS],
)
@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_jacobians_are_those_of_autograd(view, make, solver):
    function, x = view(make(solver)), torch.randn(2, 2)
    expected = torch.autograd.functional.jacobian(function, x)
    assert_close(jacrev(function)(x), expected, rtol=1e-6, atol=1e-7)
    assert_close(jacfwd(function)(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_gradient_of_parameters_by_functional_call(solver):
    flow, x = hollow_cnf(2, [4, 4], solver=solver), torch.randn(3, 2)
    parameters = {name: value.detach() for name, value in flow.named_parameters()}
    actual = grad(lambda values: functional_call(flow, values, (x,)).square().sum())(parameters)
    expected = torch.autograd.grad(flow(x).square().sum(), list(flow.parameters()), materialize_grads=True)
    assert_close(list(actual.values()), list(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", ("adaptive", "fixed"))
def test_second_derivatives_are_those_of_autograd(solver):
    flow, x = hollow_cnf(2, [4, 4], solver=SOLVERS[solver]), torch.randn(2)

    def log_det(x):
        return flow.call_and_ladj(x)[1]

    assert_close(hessian(log_det)(x), torch.autograd.functional.hessian(log_det, x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
def test_vmap_of_fixed_steps_is_the_batched_flow(make):
    flow, x = make(Solver("rk4")), torch.randn(3, 2)
    assert_close(vmap(flow)(x), flow(x))
    assert_close(vmap(flow.inv)(x), flow.inv(x))
    assert_close(vmap(lambda x: flow.call_and_ladj(x)[1])(x), flow.call_and_ladj(x)[1])


def test_vmap_of_an_estimated_divergence_has_one_probe():
    flow = free_form_cnf(2, [4, 4], divergence="hutchinson", solver=Solver("euler", options={"step_size": 1.0}))
    x = torch.randn(3, 2)
    estimate = vmap(lambda x: flow.call_and_ladj(x)[1], randomness="same")(x)
    jacobian = vmap(jacrev(lambda x: flow.nn(torch.tensor(0.0), x)))(x)
    trace, others = jacobian.diagonal(dim1=1, dim2=2).sum(-1), jacobian[:, 0, 1] + jacobian[:, 1, 0]
    sign = (estimate - trace)[0] / others[0]  # the product of the two elements of the probe
    assert_close(sign.abs(), torch.tensor(1.0))
    assert_close(estimate, trace + sign * others)


@pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS)
@pytest.mark.parametrize("method", ("dopri5", "dopri8", "bdf"))
def test_vmap_of_an_adaptive_solve_says_what_to_use(make, method):
    with pytest.raises(RuntimeError, match=r"whole batch.*Solver\('rk4'\).*functional\.jacobian"):
        vmap(make(Solver(method)))(torch.randn(3, 2))


@pytest.mark.parametrize("solver", [Solver("dopri8"), Solver("bdf"), Solver("rk4", adjoint=True)], ids=repr)
def test_other_solves_under_a_transform_say_what_to_use(solver):
    with pytest.raises(RuntimeError, match=r"Solver\('rk4'\).*functional\.jacobian"):
        jacrev(hollow_cnf(2, solver=solver))(torch.randn(2))


def test_cached_pairs_do_not_leak_out_of_a_transform():
    flow, x = hollow_cnf(2, [4, 4]), torch.randn(3, 2)
    grad(lambda scale: (scale * flow(x)).sum())(torch.tensor(1.0))
    y, _ = flow.call_and_ladj(x)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(y)
    y.sum().backward()


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:compile=True has no effect"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    # Dynamo looks at the gradient of every tensor that it wraps.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 3), nn.Linear(2, 5)
        self.flow = conditional_hollow_cnf(2, 3, [4, 4])

    def forward(self, data, noise):
        z, log_det = self.flow.condition(self.encoder(data).tanh()).call_and_ladj(noise)
        return (self.decoder(z) - data).square().sum() - log_det.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ("call_and_ladj", "inverse"))
def test_compiled_flow_is_the_eager_one(dynamo, view, backend):
    flow, x = hollow_cnf(2, [4, 4]), torch.randn(3, 2)
    function = flow.call_and_ladj if view == "call_and_ladj" else lambda x: flow.inv.call_and_ladj(x)
    compiled = torch.compile(function, backend=backend)
    for x in torch.randn(3, 4, 2):
        assert_close(compiled(x), function(x.clone()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_autoencoder_has_the_eager_gradients_and_does_not_recompile(dynamo, backend):
    model, data = Autoencoder(), torch.randn(4, 5)
    parameters = list(model.parameters())
    compiled = torch.compile(model, backend=backend)
    frames = []
    for noise in torch.randn(4, 4, 2):
        actual, expected = compiled(data, noise), model(data, noise.clone())
        assert_close(actual, expected)
        assert_close(torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters))
        frames.append(dynamo.utils.counters["frames"]["ok"])
    assert frames[1] == frames[-1]


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize(
    "activation",
    ("tanh", pytest.param("silu", marks=pytest.mark.slow), pytest.param("softplus", marks=pytest.mark.slow)),
)
def test_a_field_compiles_whole(dynamo, activation, backend):
    field, t = HollowNN(2, activation=activation).bind(), torch.tensor(0.5)
    x = torch.randn(3, 2, requires_grad=True)
    actual = torch.compile(field.with_divergence, fullgraph=True, backend=backend)(t, x)
    expected = field.with_divergence(t, x)
    assert_close(actual, expected)
    gradients = [torch.autograd.grad(f.sum() + q.square().sum(), x, retain_graph=True) for f, q in (actual, expected)]
    assert_close(*gradients)
