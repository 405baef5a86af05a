# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Networks that act on blocks of coordinates, against brute force."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_hollow.infer import AutoHollowCNF
from pyro_hollow.nn import (
    BoundConditioner,
    ClosedFormTransformer,
    ConditionalHollowNN,
    Conditioner,
    GraphConditioner,
    HollowNN,
    ModuleTransformer,
)
from pyro_hollow.ode import Solver
from pyro_hollow.ops import block_jacobian, differential_operator, dimwise_derivatives, field_derivatives, jacobi_newton
from pyro_hollow.transforms import ConditionalHollowCNF, HollowCNF, conditional_hollow_cnf, hollow_cnf, standardized

CONTEXT_DIM = 2
TIGHT = Solver("dopri5", rtol=1e-10, atol=1e-10)


class Others(Conditioner):
    """The coordinates of the other blocks."""

    def __init__(self, input_dim, block_dim, leak=0.0):
        super().__init__(input_dim, input_dim - block_dim, block_dim=block_dim)
        groups = input_dim // block_dim
        self.index = torch.tensor([[j for j in range(groups) if j != k] for k in range(groups)], dtype=torch.long)
        self.leak = leak

    def forward(self, t, x, context=None):
        blocks = x.unflatten(-1, (-1, self.block_dim))
        others = blocks[..., self.index, :].flatten(-2)
        return others + self.leak * blocks[..., :1].roll(1, -2) + self.leak * blocks[..., :1]


def module(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs))


def grouped(d, b, context_dim=0, **settings):
    return ConditionalHollowNN(d, context_dim, [6, 5], transformer_dim=4, block_dim=b, **settings)


def leave_one_out(d, b, context_dim=0):
    return grouped(d, b, context_dim, conditioner="leave-one-out")


def gated(d, b, context_dim=0):
    return grouped(d, b, context_dim, max_rate=2.0, activation=("silu", "softplus"))


def of_a_module(d, b, context_dim=0):
    return ConditionalHollowNN(d, context_dim, [5], transformer=module(b + 6, b), block_dim=b)


def of_a_user(d, b, context_dim=0):
    assert context_dim == 0
    return HollowNN(d, conditioner=Others(d, b), transformer=module(1 + d, b), block_dim=b)


NETWORKS = {"grouped": grouped, "leave-one-out": leave_one_out, "gated": gated, "module": of_a_module}
every_network = pytest.mark.parametrize("make", [*NETWORKS.values(), of_a_user], ids=[*NETWORKS, "user"])
every_known = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
every_size = pytest.mark.parametrize("size", [(4, 2), (6, 3), (6, 2), (2, 2), (3, 1)], ids=str)


def strong(net, std=0.4):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += std * torch.randn_like(parameter)
    return net


def jacobians(function, x):
    """The Jacobian of each sample with shape ``(n, d, d)``."""
    return torch.stack([torch.autograd.functional.jacobian(function, row, create_graph=True) for row in x])


def blocks_of(matrix, b):
    return torch.stack([matrix[..., k : k + b, k : k + b] for k in range(0, matrix.shape[-1], b)], dim=-3)


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Fields


@every_network
@every_size
def test_divergence_and_blocks(make, size):
    d, b = size
    net, x, t = strong(make(d, b)), torch.randn(5, d), torch.tensor(0.3)
    field = net.bind()
    assert field.block_dim == b
    matrix = jacobians(lambda x: field(t, x), x)
    f, divergence = field.with_divergence(t, x)
    assert_close(f, field(t, x))
    assert_close(divergence, matrix.diagonal(dim1=-2, dim2=-1).sum(-1))
    f, blocks = field.with_blocks(t, x)
    assert_close(f, field(t, x))
    assert_close(blocks, blocks_of(matrix, b))


@every_network
def test_gradients_of_the_blocks(make):
    net, x, t = strong(make(4, 2)), torch.randn(3, 4, requires_grad=True), torch.tensor(0.3)
    field = net.bind()
    blocks = blocks_of(jacobians(lambda x: field(t, x), x), 2)
    leaves = (x, *net.parameters())
    for actual, expected in (
        (field.with_blocks(t, x)[1], blocks),
        (field.with_divergence(t, x)[1], blocks.diagonal(dim1=-2, dim2=-1).sum((-1, -2))),
    ):
        weight = torch.randn_like(expected)
        first, second = (
            torch.autograd.grad(value, leaves, weight, retain_graph=True, materialize_grads=True, allow_unused=True)
            for value in (actual, expected)
        )
        assert_close(first, second)


@every_known
def test_contexts_and_times_of_samples(make):
    net, x = strong(make(4, 2, CONTEXT_DIM)), torch.randn(3, 4)
    context, t = torch.randn(3, CONTEXT_DIM), torch.rand(3)
    field = net.bind(context)
    f, divergence = field.with_divergence(t, x)
    for k in range(3):
        single = net.bind(context[k])
        matrix = torch.func.jacrev(lambda x, single=single, time=t[k]: single(time, x))(x[k])
        assert_close(f[k], single(t[k], x[k]))
        assert_close(divergence[k], matrix.trace())
        assert_close(field.with_blocks(t, x)[1][k], blocks_of(matrix, 2))


@every_network
def test_dimwise_derivatives(make):
    net, x, t = strong(make(4, 2)), torch.randn(3, 4), torch.tensor(0.3)
    field = net.bind()
    derivatives = field.dimwise_derivatives(t, x, 3)
    expected = field_derivatives(lambda t, x: field(t, x), t, x, 3)  # d passes each
    assert_close(derivatives, expected, 1e-9)
    heat = differential_operator(field, t, x, [1.0, 0.0, -0.5])
    assert_close(heat, expected[0] - 0.5 * expected[2], 1e-9)


@every_network
def test_hidden_units_are_free_of_their_block(make):
    net, x = strong(make(6, 2)), torch.randn(6)
    bound = net.conditioner.bind()
    matrix = torch.func.jacrev(lambda x: bound(torch.tensor(0.3), x))(x)
    assert matrix.shape[:1] == (3,)
    for k in range(3):
        own = matrix[k].unflatten(-1, (3, 2))
        assert not own[:, k].any()
        assert own[:, torch.arange(3) != k].any()


def test_many_blocks_of_features():
    # The sums over the other blocks are taken in parts.
    net, x = strong(leave_one_out(140, 2), 0.1), torch.randn(2, 140)
    field = net.bind()
    matrix = torch.func.jacrev(lambda x: field(torch.tensor(0.3), x))(x[0])
    assert_close(field.with_divergence(torch.tensor(0.3), x)[1][0], matrix.trace())


@pytest.mark.parametrize("conditioner", ["grouped", "leave-one-out"])
def test_blocks_of_one_coordinate_change_nothing(conditioner):
    fields = []
    for settings in ({}, {"block_dim": 1}):
        torch.manual_seed(0)
        net = HollowNN(3, conditioner=conditioner, **settings)
        assert net.block_dim == net.conditioner.block_dim == net.transformer.block_dim == 1
        fields.append(net.bind())
    x = torch.randn(4, 3)
    first, second = (field.dimwise_derivatives(torch.tensor(0.3), x, 3) for field in fields)
    assert all(map(torch.equal, first, second))
    assert_close(fields[0].with_blocks(torch.tensor(0.3), x)[1].flatten(-3), first[1])


def test_a_fresh_network_is_small():
    x = torch.randn(50, 6)
    assert HollowNN(6, block_dim=3)(torch.tensor(0.3), x).abs().max() < 0.5


# Functions


def test_derivatives_of_a_function_of_blocks():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    h = torch.tensor([[5.0], [7.0]])

    def function(x, h):
        blocks = x.unflatten(-1, (2, 2))
        return (h * blocks**2 * blocks.flip(-1)).flatten()  # (h x^2 y, h y^2 x)

    f, first, second = dimwise_derivatives(function, x, h, 2, block_dim=2)
    assert f.tolist() == [10.0, 20.0, 252.0, 336.0]
    assert first.tolist() == [20.0, 20.0, 168.0, 168.0]  # 2 h x y
    assert second.tolist() == [20.0, 10.0, 56.0, 42.0]  # 2 h y
    f, blocks = block_jacobian(function, x, h, 2)
    assert blocks.tolist() == [[[20.0, 5.0], [20.0, 20.0]], [[168.0, 63.0], [112.0, 168.0]]]


def test_error_for_a_function_of_another_shape():
    with pytest.raises(ValueError, match="must return the shape of x"):
        block_jacobian(lambda x, h: x[:1], torch.ones(2), torch.ones(1, 1), 2)


# Flows


def brute_force(flow, x):
    """y and the log-determinant of the Jacobian of the whole flow."""
    y = flow(x)
    matrix = jacobians(lambda x: flow._transform(x.unsqueeze(0))[0].squeeze(0), x)
    return y, torch.linalg.slogdet(matrix)[1]


@every_known
def test_log_determinant(make):
    flow = HollowCNF(strong(make(4, 2), 0.2), solver=TIGHT)
    x = torch.randn(3, 4)
    y, expected = brute_force(flow, x)
    assert_close(flow.log_abs_det_jacobian(x, y), expected, 1e-8)
    flow.clear_cache()
    assert_close(flow.inv(y), x, 1e-8)
    base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    log_prob = dist.TransformedDistribution(base, [flow]).log_prob(y.detach())
    assert_close(log_prob, base.log_prob(x) - expected, 1e-8)


@every_known
def test_score(make):
    flow = HollowCNF(strong(make(4, 2), 0.2), solver=TIGHT)
    x, base = torch.randn(3, 4), dist.Normal(torch.zeros(4), 1.0).to_event(1)
    y, _, score = flow.call_and_score(x, -x)
    data = y.detach().requires_grad_()
    log_prob = dist.TransformedDistribution(base, [flow]).log_prob(data)
    (expected,) = torch.autograd.grad(log_prob.sum(), data)
    assert_close(score, expected, 1e-7)


def quadrature(field, solver, x):
    """Kinetic energy, and squared norms of the blocks and of the rest of the Jacobian, along the path."""

    def slope(t, state):
        f, matrix = field(t, state[0]), jacobians(lambda x: field(t, x), state[0])
        own = blocks_of(matrix, field.block_dim).square().sum((-1, -2, -3))
        return f, torch.stack([f.square().sum(-1), own, matrix.square().sum((-1, -2)) - own], -1)

    return solver.integrate(slope, (x, x.new_zeros(*x.shape[:-1], 3)), 0.0, 1.0).state[1]


@every_known
def test_regularization(make, monkeypatch):
    flow = HollowCNF(strong(make(4, 2), 0.2), regularize=True, solver=Solver("rk4", options={"step_size": 0.25}))
    x = torch.randn(2, 4)
    expected = quadrature(flow.nn.bind(), flow.solver, x)
    # With two blocks of two, four probes in turn have the exact mean: those signs are orthogonal.
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    found = []
    for probe in signs:
        monkeypatch.setattr(torch, "randint_like", lambda x, _, probe=probe: ((probe + 1) // 2).to(x).expand_as(x) + 0)
        flow.clear_cache()
        flow(x)
        found.append(torch.stack(flow.regularization, dim=-1))
    mean = torch.stack(found).mean(0)
    assert_close(mean, expected, 1e-9)
    leaves = list(flow.nn.parameters())
    first, second = (
        torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
        for value in (mean, expected)
    )
    assert_close(first, second, 1e-8)


def test_one_block_has_no_hollow_part():
    flow = HollowCNF(strong(grouped(2, 2), 0.2), regularize=True)
    flow(torch.randn(3, 2))
    assert not flow.regularization.hollow.any() and flow.regularization.diagonal.all()


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "kencarp4"])
def test_gradients_by_other_solvers(method, adjoint):
    net, x = strong(grouped(4, 2), 0.2), torch.randn(3, 4)
    results = []
    for solver in (TIGHT, Solver(method, 1e-9, 1e-9, adjoint=adjoint)):
        flow = HollowCNF(net, solver=solver)
        y, ladj = flow.call_and_ladj(x)
        results.append([y, ladj, *torch.autograd.grad((y.sin() + ladj[:, None]).sum(), list(net.parameters()))])
    assert_close(*results, 1e-6)


def test_contexts_of_flows():
    flow = conditional_hollow_cnf(4, CONTEXT_DIM, [6, 5], block_dim=2, solver=TIGHT)
    strong(flow.nn, 0.2)
    context, x = torch.randn(3, CONTEXT_DIM), torch.randn(3, 4)
    y, ladj = flow.condition(context).call_and_ladj(x)
    for k in range(3):
        _, expected = brute_force(flow.condition(context[k]), x[k : k + 1])
        assert_close(ladj[k], expected[0], 1e-8)
    assert isinstance(flow, ConditionalHollowCNF) and y.shape == x.shape


def test_standardized_data():
    flow = hollow_cnf(4, [6, 5], block_dim=2, solver=TIGHT)
    strong(flow.nn, 0.2)
    data = 100 + 10 * torch.randn(200, 4)
    whole = standardized(flow, data)
    base = dist.Normal(torch.zeros(4), 1.0).to_event(1)
    y = data[:2].clone()
    log_prob = dist.TransformedDistribution(base, [whole]).log_prob(y)
    x = whole.inv(y)
    matrix = jacobians(lambda y: whole.inv(y.unsqueeze(0)).squeeze(0), y)
    assert_close(log_prob, base.log_prob(x) + torch.linalg.slogdet(matrix)[1], 1e-7)


COPIES = {"pickle": lambda flow: pickle.loads(pickle.dumps(flow)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("conditioner", ["grouped", "leave-one-out"])
def test_copies_and_states(duplicate, conditioner):
    flow, x = hollow_cnf(4, conditioner=conditioner, block_dim=2), torch.randn(3, 4)
    strong(flow.nn, 0.2)
    twin, fresh = duplicate(flow), hollow_cnf(4, conditioner=conditioner, block_dim=2)
    fresh.load_state_dict(flow.state_dict())
    assert torch.equal(flow(x), twin(x)) and torch.equal(flow(x), fresh(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        hollow_cnf(4, conditioner=conditioner).load_state_dict(flow.state_dict())


def test_a_guide():
    def model():
        import pyro

        with pyro.plate("particles", 2):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoHollowCNF(model, block_dim=2).setup()
    assert guide.flows[0].nn.block_dim == 2
    assert guide()["x"].shape == (2, 2)


@pytest.mark.parametrize("make", [of_a_module, of_a_user])
def test_executor_of_modules(make):
    flow = HollowCNF(make(4, 2))
    flow(torch.randn(3, 4))
    assert flow.last_solve.backend == "autograd"


def test_no_compiled_code():
    flow = hollow_cnf(4, block_dim=2, solver=Solver(compile=True))
    with pytest.warns(UserWarning, match="no compiled code for block_dim=2"):
        flow(torch.randn(3, 4))
    assert flow.last_solve.backend == "hollow"


# Implicit methods


class Weak(Conditioner):
    """Of the other blocks little."""

    def __init__(self, input_dim, block_dim):
        super().__init__(input_dim, 1, block_dim=block_dim)

    def bind(self, context=None):
        def function(t, x):
            blocks = x.unflatten(-1, (-1, self.block_dim)).sum(-1)
            total = blocks @ (1 - torch.eye(blocks.shape[-1], dtype=x.dtype))
            return 0.1 * total.sin().unsqueeze(-1)

        return BoundConditioner(function, ())


class Spring(nn.Module):
    """A stiff spring within a block, whose diagonal does not dominate."""

    def __init__(self, rate):
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-rate, rate - 1], [rate - 1, -rate]]))

    def forward(self, rows):
        x, _, h = rows.split([2, 1, 1], dim=-1)
        return x @ self.matrix.T + h


@pytest.mark.parametrize("adjoint", [False, True])
def test_jacobi_newton_where_only_blocks_dominate(adjoint):
    spring = Spring(1000.0)
    net = HollowNN(4, conditioner=Weak(4, 2), transformer=spring, block_dim=2)
    solver = Solver("bdf", 1e-4, 1e-4, adjoint=adjoint, options={"corrector": "jacobi-newton"})
    x = torch.randn(3, 4)

    class Diagonal:
        """The same field with its diagonal alone."""

        def __init__(self, field):
            self.field, self.tensors = field, field.tensors

        def __call__(self, t, x):
            return self.field(t, x)

        def with_diagonal(self, t, x):
            return self.field.with_diagonal(t, x)

    by_blocks, by_diagonal = (solver.integrate(field, x, 0.0, 1.0) for field in (net.bind(), Diagonal(net.bind())))
    assert by_blocks.stats.fallbacks == 0 and by_blocks.stats.diagonals > 0
    assert by_diagonal.stats.fallbacks > 0
    expected = Solver("dopri5", 1e-8, 1e-8).integrate(net.bind(), x, 0.0, 1.0).state
    assert_close(by_blocks.state, expected, 2e-2)
    dense = Solver("bdf", 1e-4, 1e-4, options={"corrector": "newton"}).integrate(net.bind(), x, 0.0, 1.0).state
    gradients = [torch.autograd.grad(y.square().sum(), spring.matrix)[0] for y in (by_blocks.state, dense)]
    assert_close(*gradients, 2e-2)


def test_jacobi_newton_with_blocks_by_itself():
    matrix = torch.tensor([[0.1, 1.0], [-1.0, 0.1]])
    coupling = torch.tensor(0.05, requires_grad=True)
    target = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.5, 0.1, -0.3, 2.0]])

    def residual(x):
        blocks = x.unflatten(-1, (2, 2))
        f = blocks @ matrix.T + 0.1 * blocks**3 + coupling * blocks.flip(-2).sin()
        jacobian = matrix + torch.diag_embed(0.3 * blocks**2)
        return f.flatten(-2) - target, jacobian

    result = jacobi_newton(residual, torch.zeros(2, 4), tolerance=1e-12)
    assert result.converged.all() and residual(result.value)[0].abs().max() < 1e-11
    (gradient,) = torch.autograd.grad(result.value.sum(), coupling)
    step = 1e-5
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            coupling += sign * step
            ends.append(jacobi_newton(residual, torch.zeros(2, 4), tolerance=1e-12).value.sum())
            coupling -= sign * step
    assert_close(gradient, (ends[0] - ends[1]) / (2 * step), 1e-7)


def test_jacobi_newton_and_bad_blocks():
    def residual(x):
        blocks = torch.stack([torch.eye(2), torch.zeros(2, 2)]).expand(2, 2, 2, 2)
        return x - torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]), blocks

    # A block that is a root already may be singular; another one is given up.
    result = jacobi_newton(residual, torch.zeros(2, 4), throw=False)
    assert result.converged.tolist() == [True, False]

    def cubic(x):  # whose slope turns round between the start and the root
        jacobian = torch.diag_embed((x.unflatten(-1, (1, 2)) - 0.5).sign())
        return x - 1, jacobian

    assert not jacobi_newton(cubic, torch.zeros(1, 2), throw=False).converged.any()


# Errors


def test_errors():
    with pytest.raises(ValueError, match="block_dim must be at least 1 and divide input_dim = 5, but got 2"):
        HollowNN(5, block_dim=2)
    with pytest.raises(ValueError, match="block_dim must be at least 1"):
        hollow_cnf(4, block_dim=0)
    with pytest.raises(TypeError, match="block_dim must be an integer, but got 2.0"):
        hollow_cnf(4, block_dim=2.0)
    with pytest.raises(ValueError, match="needs the conditioner 'grouped' or 'leave-one-out', but got 'masked'"):
        HollowNN(4, conditioner="masked", block_dim=2)
    graph = GraphConditioner(4, [5], adjacency=torch.ones(4, 4).bool())
    for conditioner in (graph, Others(4, 4), Others(4, 1)):
        with pytest.raises(ValueError, match="conditioner was made for block_dim=[14], but the network has block_dim"):
            HollowNN(4, conditioner=conditioner, block_dim=2)
    transformer = ClosedFormTransformer(4, 32)
    with pytest.raises(ValueError, match="transformer was made for block_dim=1, but the network has block_dim=2"):
        HollowNN(4, transformer=transformer, block_dim=2)
    with pytest.raises(ValueError, match="divide input_dim"):
        ModuleTransformer(nn.Linear(3, 2), 5, 1, block_dim=2)
    with pytest.raises(ValueError, match=r"rows of 3 \+ 32 features to 2 each"):
        HollowNN(4, transformer=nn.Linear(35, 1), block_dim=2)(torch.tensor(0.0), torch.zeros(4))
    with pytest.raises(ValueError, match="x must have shape"):
        HollowNN(4, block_dim=2).bind().with_blocks(torch.tensor(0.0), torch.zeros(3))


def test_a_leak_within_a_block_is_found():
    # The other coordinate of the block, which a check by coordinates would overlook.
    class Leak(Others):
        def forward(self, t, x, context=None):
            return super().forward(t, x) + 1e-3 * x.unflatten(-1, (-1, 2))[..., 1:]

    with pytest.raises(ValueError, match=r"h_i depends on x_i for i in \[0, 1\] \(blocks of 2 coordinates\)"):
        HollowNN(4, conditioner=Leak(4, 2), transformer=module(5, 2), block_dim=2)


def test_a_conditioner_of_another_shape():
    class ByCoordinate(Others):
        def forward(self, t, x, context=None):
            return x.new_zeros(*x.shape, 2)

    with pytest.raises(ValueError, match=r"must map \(\*, 4\) to \(\*, 2, 2\)"):
        HollowNN(4, conditioner=ByCoordinate(4, 2), transformer=module(5, 2), block_dim=2)
