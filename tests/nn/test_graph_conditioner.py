# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The conditioner on a graph; the tests that all conditioners share are in test_conditioners and test_steppers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.testing import assert_close

from pyro_hollow import hollow_cnf
from pyro_hollow.nn import ConditionalHollowNN, GraphConditioner, GroupedConditioner, HollowNN

CONTEXT_DIM = 2
D = 12


def pairs(*edges, both=True):
    adjacency = torch.zeros(D, D, dtype=torch.bool)
    for i, j in edges:
        adjacency[i, j] = True
        adjacency[j, i] |= both
    return adjacency


def parity(d=D):
    """Each coordinate has edges to the half of the same parity."""
    order = torch.arange(d) % 2
    return order == order.unsqueeze(1)


CHAIN = [(i, i + 1) for i in range(D - 1)]
STAR = [(3, j) for j in range(D) if j != 3]
GRAPHS = {
    "chain": pairs(*CHAIN),
    "directed chain": pairs(*CHAIN, both=False),
    "ring": pairs(*CHAIN, (D - 1, 0)),
    "grid": pairs(*((i, i + 1) for i in range(D) if i % 4 < 3), *((i, i + 4) for i in range(D - 4))),
    "star": pairs(*STAR),
    "chain with a hub": pairs(*CHAIN, *STAR),
    "chain with two hubs": pairs(*CHAIN, *STAR, *((8, j) for j in range(D) if j != 8)),
    "all see one": pairs(*CHAIN, *((j, 5) for j in range(D)), both=False),
    "one sees all": pairs(*CHAIN, *((5, j) for j in range(D)), both=False),
    "tree": pairs(*((i, (i - 1) // 3) for i in range(1, D))),
    "two halves": parity(),
    "pair": pairs((4, 9)),
    "no edges": pairs(),
    "complete": torch.ones(D, D, dtype=torch.bool),
}
each_graph = pytest.mark.parametrize("adjacency", GRAPHS.values(), ids=GRAPHS)
each_radius = pytest.mark.parametrize("radius", [1, 2, 3])
#: Hubs by default, of all that have edges, of some, and of none.
each_max_degree = pytest.mark.parametrize("max_degree", [None, 0, 2, D])


def reached(adjacency, radius, max_degree):
    """Sums of powers of the adjacency, in which paths stop at hubs: A + A P A + A P A P A with a projection P."""
    edges = adjacency.double().fill_diagonal_(0)
    degrees = torch.maximum(edges.sum(0), edges.sum(1))
    passed = torch.diag((degrees <= (8 if max_degree is None else max_degree)).double())
    paths = total = edges
    for _ in range(radius - 1):
        paths = paths @ passed @ edges
        total = total + paths
    return (total > 0).fill_diagonal_(False)


@each_graph
@each_radius
@each_max_degree
def test_jacobian_is_that_of_the_graph(adjacency, radius, max_degree):
    conditioner = GraphConditioner(D, [5, 4], adjacency=adjacency, radius=radius, max_degree=max_degree)
    jac = jacobian(lambda x: conditioner(torch.tensor(0.3), x), torch.randn(D))
    # Zero means zero to the bit: rounding errors on the diagonal would add up to a wrong divergence.
    assert torch.equal((jac != 0).any(1), reached(adjacency, radius, max_degree))


@each_graph
def test_a_coordinate_that_is_not_seen_does_not_change_a_bit(adjacency):
    conditioner = GraphConditioner(D, [5, 4], adjacency=adjacency, radius=2)
    seen, x = reached(adjacency, 2, None), torch.randn(D)
    h = conditioner(torch.tensor(0.3), x)
    for j in range(D):
        moved = x.clone()
        moved[j] += 100
        changed = (conditioner(torch.tensor(0.3), moved) != h).any(-1)
        assert torch.equal(changed, seen[:, j])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("graph", ["chain", "ring", "grid", "tree", "two halves"])
def test_a_coordinate_that_is_not_finite_stays_where_it_is_seen(graph, value):
    """Rows of fewer neighbours are padded by zeros times one of them."""
    conditioner = GraphConditioner(D, [5, 4], adjacency=GRAPHS[graph], radius=1)
    x = torch.randn(D)
    h = conditioner(torch.tensor(0.3), x)
    x[7] = value
    others = ~reached(GRAPHS[graph], 1, None)[:, 7]
    assert torch.equal(conditioner(torch.tensor(0.3), x)[others], h[others])


def dense_copy(net, activation):
    """A grouped conditioner with the weights of one on a graph, and zeros elsewhere."""
    widths = [net.weight.shape[1], *(weight.shape[1] for weight in net.layers.weights)]
    dense = GroupedConditioner(net.input_dim, widths, net.context_dim, activation=activation)
    weight = torch.zeros(net.input_dim, widths[0], net.input_dim)
    for i, (row, mask) in enumerate(zip(net.index.tolist(), net.mask[:, 0].tolist(), strict=True)):
        for k, j in enumerate(row):
            weight[i, :, j] += net.weight[i, :, k].detach() * mask[k]
    for i, own, mask in zip(net.hubs.tolist(), net.hub_weight, net.hub_mask, strict=True):
        weight[i] = own.detach() * mask
    with torch.no_grad():
        dense.weight.copy_(weight.flatten(0, 1))
    dense.offset, dense.layers = copy.deepcopy(net.offset), copy.deepcopy(net.layers)
    return dense


@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu"])
@pytest.mark.parametrize("graph", ["chain with a hub", "chain with two hubs", "all see one", "one sees all"])
def test_against_a_grouped_conditioner_with_masked_weights(graph, activation):
    net = GraphConditioner(D, [6, 5, 4], CONTEXT_DIM, adjacency=GRAPHS[graph], radius=2, activation=activation)
    dense = dense_copy(net, activation)
    t, x, context = torch.randn(7), torch.randn(7, D, requires_grad=True), torch.randn(7, CONTEXT_DIM)
    actual, expected = net(t, x, context), dense(t, x, context)
    assert_close(actual, expected, rtol=0, atol=1e-13)
    direction = torch.randn_like(actual)
    gradients = [torch.autograd.grad((h * direction).sum(), x)[0] for h in (actual, expected)]
    assert_close(*gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d, hub", [(9, False), (10, True), (400, True), (21, True)])
def test_hubs_by_default(d, hub):
    star = torch.zeros(d, d, dtype=torch.bool)
    star[0] = True
    hubs = GraphConditioner(d, [2], adjacency=star).hubs.tolist()
    assert hubs == ([0] if hub else [])


def lattice(side, both):
    """A square lattice, of four or of all eight directions."""
    x, y = torch.arange(side**2) // side, torch.arange(side**2) % side
    across, along = (x - x.unsqueeze(1)).abs(), (y - y.unsqueeze(1)).abs()
    return torch.maximum(across, along) <= 1 if both else across + along <= 1


RADII = {
    "short chain": (pairs(*CHAIN), 6),
    "chain": (torch.ones(50, 50).triu(-1).tril(1).bool(), 6),
    "lattice": (lattice(15, both=False), 3),
    "lattice with diagonals": (lattice(15, both=True), 2),
    "many neighbours": (torch.ones(80, 80).triu(-4).tril(4).bool(), 4),
    "hubs alone": (torch.ones(60, 60, dtype=torch.bool), 6),
}


@pytest.mark.parametrize("adjacency, radius", RADII.values(), ids=RADII)
def test_radius_by_default(adjacency, radius):
    """The largest up to 6 with which none but hubs sees more than 32."""
    net = GraphConditioner(len(adjacency), [2], adjacency=adjacency)
    assert net.limits[0] == radius and net.index.shape[1] <= 32
    if radius < 6:
        assert GraphConditioner(len(adjacency), [2], adjacency=adjacency, radius=radius + 1).index.shape[1] > 32


def test_weights_are_those_of_the_edges():
    d = 500
    chain = torch.ones(d, d).triu(-1).tril(1).bool()
    net = GraphConditioner(d, [3], adjacency=chain, radius=2)
    assert net.weight.shape == (d, 3, 4) and net.hub_weight is None
    chain[:, 7] = chain[7] = True
    net = GraphConditioner(d, [3], adjacency=chain, radius=2)
    assert net.weight.shape == (d, 3, 5) and net.hub_weight.shape == (1, 3, d)


CHAIN_FORMS = {
    "nested lists": lambda a: a.tolist(),
    "array": lambda a: a.numpy(),
    "sparse": lambda a: a.to_sparse(),
    "with a diagonal": lambda a: a | torch.eye(D, dtype=torch.bool),
    "not contiguous": lambda a: a.mT.contiguous().mT,
}


@pytest.mark.parametrize("form", CHAIN_FORMS.values(), ids=CHAIN_FORMS)
def test_forms_of_the_adjacency(form):
    adjacency = GRAPHS["directed chain"]
    net = GraphConditioner(D, [4], adjacency=form(adjacency))
    assert torch.equal(net.edges, torch.stack([torch.arange(D - 1), torch.arange(1, D)]))


INVALID = {
    "no matrix": (dict(adjacency=3), ValueError, r"adjacency must have shape \(12, 12\), but got \(\)"),
    "no tensor": (dict(adjacency="chain"), TypeError, "adjacency must be a boolean matrix"),
    "None": (dict(adjacency=None), TypeError, "adjacency must be a boolean matrix"),
    "ragged": (dict(adjacency=[[True], [True, False]]), TypeError, "adjacency must be a boolean matrix"),
    "another size": (
        dict(adjacency=torch.ones(3, 3, dtype=torch.bool)),
        ValueError,
        r"shape \(12, 12\), but got \(3, 3\)",
    ),
    "a vector": (dict(adjacency=torch.ones(D, dtype=torch.bool)), ValueError, r"but got \(12,\)"),
    "floats": (dict(adjacency=torch.ones(D, D).float()), TypeError, "adjacency must be boolean, but got torch.float32"),
    "integers": (dict(adjacency=torch.ones(D, D).long()), TypeError, "adjacency must be boolean, but got torch.int64"),
    "radius 0": (dict(radius=0), ValueError, "radius must be at least 1, but got 0"),
    "radius 1.5": (dict(radius=1.5), TypeError, "radius must be an integer, but got 1.5"),
    "max_degree": (dict(max_degree=-1), ValueError, "max_degree must be at least 0, but got -1"),
    "fractional max_degree": (dict(max_degree=2.5), TypeError, "max_degree must be an integer, but got 2.5"),
    "activation": (dict(activation="relu"), ValueError, "activation"),
    "no layers": (dict(hidden_dims=[]), ValueError, "hidden_dims of a graph conditioner"),
    "zero width": (dict(hidden_dims=[4, 0]), ValueError, "hidden_dims of a graph conditioner"),
    "width without a list": (dict(hidden_dims=4), TypeError, "hidden_dims of a graph conditioner"),
    "unknown keyword": (dict(adjacancy=None), TypeError, "did you mean 'adjacency'"),
}


@pytest.mark.parametrize("settings, error, message", INVALID.values(), ids=INVALID)
def test_invalid_arguments(settings, error, message):
    with pytest.raises(error, match=message):
        GraphConditioner(D, **{"hidden_dims": [4], "adjacency": GRAPHS["chain"], **settings})


OTHERS = {
    "graph": dict(adjacency=GRAPHS["ring"]),
    "direction": dict(adjacency=GRAPHS["directed chain"].mT),
    "radius": dict(radius=3),
    "max_degree": dict(max_degree=1),
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_state_of_another_graph(settings):
    """Also where the shapes are the same, as those of the two directions."""
    source = GraphConditioner(D, [4], adjacency=GRAPHS["directed chain"])
    target = GraphConditioner(D, [4], **{"adjacency": GRAPHS["directed chain"], **settings})
    with pytest.raises(ValueError, match="the state is that of a conditioner on another graph"):
        target.load_state_dict(source.state_dict())


def test_moves_and_copies():
    net = GraphConditioner(D, [6, 4], adjacency=GRAPHS["chain with a hub"])
    t, x = torch.tensor(0.3), torch.randn(5, D)
    expected = net(t, x)
    assert torch.equal(copy.deepcopy(net)(t, x), expected)
    single = copy.deepcopy(net).float()
    assert single.index.dtype == single.hubs.dtype == single.edges.dtype == torch.int64
    h = single(t.float(), x.float())
    assert h.dtype == torch.float32
    assert_close(h.double(), expected, rtol=0, atol=1e-5)
    assert {tensor.device.type for tensor in net.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    net = GraphConditioner(D, [6, 4], adjacency=GRAPHS["chain with a hub"].cuda())
    t, x = torch.tensor(0.3), torch.randn(5, D)
    assert_close(net.cuda()(t.cuda(), x.cuda()).cpu(), net.cpu()(t, x), rtol=0, atol=1e-12)


@each_graph
def test_network(adjacency):
    conditioner = GraphConditioner(D, [6, 4], CONTEXT_DIM, adjacency=adjacency)
    net = ConditionalHollowNN(D, CONTEXT_DIM, conditioner=conditioner)
    nn.init.normal_(net.transformer.output_weight)
    t, x, context = torch.tensor(0.3), torch.randn(D), torch.randn(CONTEXT_DIM)
    dx, divergence = net.bind(context).with_divergence(t, x)
    jac = jacobian(lambda x: net(t, x, context), x)
    assert_close(divergence, jac.trace(), rtol=1e-12, atol=1e-13)
    seen = reached(adjacency, 6, None)
    assert torch.equal((jac != 0).fill_diagonal_(False), seen)


def test_flow():
    flow = hollow_cnf(4, conditioner=GraphConditioner(4, [6, 4], adjacency=GRAPHS["chain"][:4, :4], radius=1))
    nn.init.normal_(flow.nn.transformer.output_weight)
    x = torch.randn(4)
    y, ladj = flow.call_and_ladj(x)
    assert flow.last_solve.backend == "hollow"
    jac = jacobian(flow._call, x)
    assert_close(ladj, torch.linalg.slogdet(jac).logabsdet, rtol=0, atol=1e-4)
    # Along time, information travels to all.
    assert (jac.abs() > 1e-8).all()


def test_a_name_alone_names_no_graph():
    with pytest.raises(ValueError, match=r"conditioner 'graph' needs a graph: give GraphConditioner\(5"):
        HollowNN(5, conditioner="graph")


def test_hidden_dims_beside_the_conditioner():
    with pytest.raises(ValueError, match="hidden_dims has no effect"):
        HollowNN(D, [8], conditioner=GraphConditioner(D, [4], adjacency=GRAPHS["chain"]))
