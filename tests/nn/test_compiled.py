# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Solves in compiled code, against those by tape."""

import copy
import dataclasses
import gc
import os
import pickle
import shutil
import weakref
from contextlib import contextmanager, nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_hollow.infer import AutoHollowCNF
from pyro_hollow.nn import compiled
from pyro_hollow.nn.compiled import CompiledTape
from pyro_hollow.nn.tape import HollowTape
from pyro_hollow.ode import Solver, SolverError
from pyro_hollow.ode.runge_kutta import TABLEAUS
from pyro_hollow.transforms import conditional_hollow_cnf, hollow_cnf

COMPILER = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="compile=True needs a C compiler")

SOLVERS = {
    **{name: Solver(name, options={"step_size": 0.4}) for name in TABLEAUS if not TABLEAUS[name].error},
    "bosh3": Solver("bosh3", 1e-4, 1e-4),
    "dopri5": Solver(rtol=1e-6, atol=1e-6),
}
#: What a flow is made of, and the batch.
FLOWS = {
    "defaults": (dict(input_dim=10), (32,)),
    "a sample": (dict(input_dim=3, hidden_dims=[5]), ()),
    "one dimension": (dict(input_dim=1, hidden_dims=[4]), (7,)),
    "three layers": (dict(input_dim=4, hidden_dims=[9, 3, 17], transformer_dim=1), (2, 3, 11)),
    "tanh": (dict(input_dim=5, hidden_dims=[20, 12], activation="tanh"), (33,)),
    "silu": (dict(input_dim=5, hidden_dims=[20, 12], activation="silu", transformer_dim=19), (16,)),
    "both": (dict(input_dim=2, hidden_dims=[8], activation=("silu", "tanh")), (100,)),
    "any rate": (dict(input_dim=3, hidden_dims=[8], activation=("tanh", "silu"), max_rate=None), (5,)),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


def strengthen(flow, std=0.3):
    """Fresh flows are close to the identity, where most mistakes would not show."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += std * torch.randn_like(parameter)
    return flow


@contextmanager
def counted_tapes():
    """Yields the classes of the tapes that are made."""
    kinds = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (HollowTape, CompiledTape):
            make = kind.__init__

            def init(self, *args, make=make):
                kinds.append(type(self))
                make(self, *args)

            patch.setattr(kind, "__init__", init)
        yield kinds


def both_ways(flow, function):
    """The results by tape and in compiled code."""
    answers, solver = [], flow.solver
    for kind in (HollowTape, CompiledTape):
        flow.solver = dataclasses.replace(solver, compile=kind is CompiledTape)
        with counted_tapes() as kinds, pytest.MonkeyPatch.context() as patch:
            # Or torchdiffeq would take over where compiled code fails.
            patch.setattr(Solver, "_odeint", lambda *args: pytest.fail("not solved by tape"))
            answers.append(function())
        assert kinds and kind in kinds
        assert kind is CompiledTape or CompiledTape not in kinds
    return answers


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def gradients_of(flow, transform, x, *others, inverse=False):
    """Value, log-determinant and the gradients of all there is."""
    x = x.detach().requires_grad_()
    y, ladj = (transform.inv if inverse else transform).call_and_ladj(x)
    weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view(y.shape).cos()
    loss = (weights * y.square()).sum() + (weights[..., 0] * ladj).sum()
    leaves = [x, *others, *flow.nn.parameters()]
    return [y.detach(), ladj.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("name", FLOWS)
def test_as_by_tape(name, method, dtype):
    kwargs, batch_shape = FLOWS[name]
    flow = strengthen(hollow_cnf(**kwargs, solver=SOLVERS[method], cache_size=0)).to(dtype)
    x = torch.randn(*batch_shape, kwargs["input_dim"], dtype=dtype)
    if dtype == torch.float32:
        flow.solver = dataclasses.replace(flow.solver, rtol=1e-3, atol=1e-3)
    for inverse in (False, True):
        expected, actual = both_ways(flow, lambda inverse=inverse: gradients_of(flow, flow, x, inverse=inverse))
        # Of one coordinate alone nothing reaches the conditioner.
        assert kwargs["input_dim"] == 1 or all(gradient.any() for gradient in expected[2:])
        assert_close(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("shape", [(1,), (6,), (4, 6), (4, 1)])
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_contexts(method, shape):
    """Offsets of each sample's own, and one for all."""
    flow = strengthen(conditional_hollow_cnf(3, 2, [9, 5], activation="silu", solver=SOLVERS[method], cache_size=0))
    context, x = torch.randn(*shape, 2, requires_grad=True), torch.randn(4, 6, 3)
    expected, actual = both_ways(flow, lambda: gradients_of(flow, flow.condition(context), x, context))
    assert expected[3].any()
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("method", SOLVERS)
def test_statistics(method):
    flow = strengthen(hollow_cnf(4, solver=SOLVERS[method], cache_size=0))

    def statistics():
        with torch.no_grad():
            flow(torch.linspace(-3, 3, 40).view(10, 4))
        return flow.last_solve

    expected, actual = both_ways(flow, statistics)
    assert actual == dataclasses.replace(expected, backend="compiled")


@pytest.mark.parametrize("method", ["heun2", "dopri5"])
def test_scores(method):
    flow = strengthen(hollow_cnf(6, solver=SOLVERS[method], cache_size=0))
    x = torch.randn(20, 6)
    expected, actual = both_ways(flow, lambda: [v.detach() for v in flow.call_and_score(x, -x)])
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_saturation(activation, dtype, size):
    """Arguments of exponentials from tiny to far beyond what they can take."""
    flow = hollow_cnf(3, [6], activation=activation, solver=Solver("euler", options={"step_size": 1.0}), cache_size=0)
    strengthen(flow, size).to(dtype)
    x = torch.randn(50, 3, dtype=dtype)
    expected, actual = both_ways(flow, lambda: gradients_of(flow, flow, x))
    assert all(value.isfinite().all() for value in actual)
    assert_close(actual, expected, TOLERANCES[dtype])


GRADIENTS = {
    "sum of log-determinants": lambda y, ladj: (torch.zeros_like(y), torch.ones(()).expand(ladj.shape)),
    "sum of values": lambda y, ladj: (torch.ones(()).expand(y.shape), torch.zeros_like(ladj)),
    "sums": lambda y, ladj: (torch.tensor(0.3).expand(y.shape), torch.tensor(-0.7).expand(ladj.shape)),
    "strided": lambda y, ladj: (torch.randn(*y.shape[::-1]).permute(2, 1, 0), torch.randn(*ladj.shape[::-1]).mT),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_incoming_gradients(method, name):
    """Such as are expanded or strided."""
    flow = strengthen(hollow_cnf(3, [5], solver=SOLVERS[method], cache_size=0))
    x = torch.randn(4, 6, 3, requires_grad=True)
    torch.manual_seed(0)
    given = GRADIENTS[name](*flow.call_and_ladj(x))

    def gradients():
        return torch.autograd.grad(flow.call_and_ladj(x), [x, *flow.nn.parameters()], given)

    expected, actual = both_ways(flow, gradients)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_frozen_parameters(method):
    """Gradients of x alone, and of a few parameters."""
    flow = strengthen(hollow_cnf(3, [5, 4], solver=SOLVERS[method], cache_size=0))
    x = torch.randn(7, 3, requires_grad=True)
    for parameter in flow.nn.parameters():
        parameter.requires_grad_(False)
    for kept in (None, flow.nn.transformer.input_weight, flow.nn.conditioner.offset.weight):
        leaves = [x] if kept is None else [x, kept.requires_grad_()]

        def gradients(leaves=leaves):
            y, ladj = flow.call_and_ladj(x)
            return torch.autograd.grad(y.pow(3).sum() + ladj.sum(), leaves)

        expected, actual = both_ways(flow, gradients)
        assert_close(actual, expected, 1e-12)


def test_hooks_of_saved_tensors():
    """They may give back what was saved in another layout."""
    flow = strengthen(hollow_cnf(3, [5], solver=SOLVERS["rk4"], cache_size=0))
    x = torch.randn(7, 3, requires_grad=True)

    def gradients():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda v: v.mT.contiguous() if v.dim() > 1 else v, lambda v: v.mT if v.dim() > 1 else v
        ):
            y, ladj = flow.call_and_ladj(x)
        return torch.autograd.grad(y.pow(3).sum() + ladj.sum(), [x, *flow.nn.parameters()])

    expected, actual = both_ways(flow, gradients)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_nothing_outlives_a_solve(method, monkeypatch):
    """Neither states nor tapes wait for the garbage collector."""
    alive, step = [], CompiledTape.step

    def watched(tape, *args):
        found = step(tape, *args)
        alive.extend(map(weakref.ref, (tape, found[2])))
        return found

    monkeypatch.setattr(CompiledTape, "step", watched)
    flow = strengthen(hollow_cnf(3, [5], solver=dataclasses.replace(SOLVERS[method], compile=True)))
    gc.disable()
    try:
        y, ladj = flow.call_and_ladj(torch.randn(4, 3, requires_grad=True))
        assert alive and any(reference() is not None for reference in alive)
        (y.sum() + ladj.sum()).backward()
        del y, ladj
        assert all(reference() is None for reference in alive)
    finally:
        gc.enable()


def test_mixed_types_go_by_tape():
    flow = strengthen(hollow_cnf(3, [5], solver=Solver("rk4", compile=True), cache_size=0))
    flow.nn.transformer.input_weight.data = flow.nn.transformer.input_weight.data.float()
    with counted_tapes() as kinds, pytest.warns(UserWarning, match="compile=True has no effect"):
        flow(torch.randn(7, 3))
    assert kinds == [HollowTape]


@pytest.mark.parametrize("nan", [0x7FF8000000000000, 0x7FF00000000007A2, 0xFFF8000000000001])
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_nan_stays_nan(activation, nan):
    """Whatever its payload."""
    bits = torch.tensor([nan - 2**64 if nan >= 2**63 else nan])
    flow = hollow_cnf(2, [4], activation=activation, solver=Solver("euler", compile=True), cache_size=0)
    with torch.no_grad():
        flow.nn.conditioner.offset.weight[:, 0] = bits.view(torch.float64)
    with pytest.raises(SolverError, match="non-finite"):
        flow(torch.randn(3, 2))


def test_gradients_twice():
    """A second pass through the same graph, and second derivatives, which compiled code leaves to autograd."""
    flow = strengthen(hollow_cnf(3, [5], solver=dataclasses.replace(SOLVERS["rk4"], compile=True), cache_size=0))
    x = torch.randn(4, 3, requires_grad=True)
    y, ladj = flow.call_and_ladj(x)
    loss = (y.pow(3).sum(-1) + ladj.square()).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.autograd.gradcheck(flow.call_and_ladj, x)
    assert torch.autograd.gradgradcheck(flow.call_and_ladj, x)


def test_gradients_leave_their_arguments_alone():
    """With one dimension what arrives may be used in place, as nothing is copied on the way."""
    flow = strengthen(hollow_cnf(1, [4], solver=dataclasses.replace(SOLVERS["rk4"], compile=True), cache_size=0))
    x = torch.randn(5, 1, requires_grad=True)
    outgoing = torch.ones(5, 1)
    flow(x).backward(outgoing)
    assert (outgoing == 1).all()


NOT_COMPILED = {
    "masked": (dict(input_dim=3, conditioner="masked", hidden_dims=[8, 4]), "masked conditioner"),
    "softplus": (dict(input_dim=3, hidden_dims=[8], activation="softplus"), "activation 'softplus'"),
    "large": (dict(input_dim=64), "network and batch are too large"),
}


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_others_go_by_tape_and_say_why_once(name):
    settings, reason = NOT_COMPILED[name]
    flow = hollow_cnf(**settings, solver=Solver("rk4", compile=True), cache_size=0)
    x = torch.randn(32, flow.nn.input_dim)
    with counted_tapes() as kinds, pytest.warns(UserWarning, match=f"compile=True has no effect.*{reason}.*'silu'"):
        flow(x)
    flow(x)
    assert set(kinds) == {HollowTape}
    assert flow.last_solve.backend == "tape"
    assert reason in flow.last_solve.reason


NO_TAPE = {
    "leave-one-out": (dict(conditioner="leave-one-out"), {}, "grouped or masked conditioner"),
    "regularized": (dict(regularize=True), {}, "without regularize=True"),
    "of torchdiffeq": ({}, dict(method="adaptive_heun"), "method 'adaptive_heun'"),
    "implicit": ({}, dict(method="bdf"), "method 'bdf'"),
    "adjoint": ({}, dict(adjoint=True), "adjoint=True"),
    "options": ({}, dict(options={"first_step": 0.1}), r"options \['first_step'\]"),
}


@pytest.mark.parametrize("name", NO_TAPE)
def test_others_without_a_tape_are_solved_as_ever_and_say_why_once(name):
    network, settings, reason = NO_TAPE[name]
    flow = strengthen(hollow_cnf(3, [8], **network, cache_size=0), 0.1)
    x, answers = torch.randn(4, 3), []
    flow.solver = Solver(**settings)
    torch.manual_seed(0)
    answers.append(gradients_of(flow, flow, x))
    flow.solver = Solver(**settings, compile=True)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"compile=True has no effect.*{reason}"):
        answers.append(gradients_of(flow, flow, x))
    flow(x)
    assert_close(*answers, 0)
    assert flow.last_solve.backend == {"implicit": "implicit", "leave-one-out": "autograd"}.get(name, "torchdiffeq")


def test_the_statistics_tell_that_compiled_code_ran():
    flow = hollow_cnf(2, [4], solver=Solver(compile=True), cache_size=0)
    flow(torch.randn(3, 2))
    assert (flow.last_solve.backend, flow.last_solve.reason) == ("compiled", "")
    flow.solver = "dopri5"
    flow(torch.randn(3, 2))
    assert (flow.last_solve.backend, flow.last_solve.reason) == ("tape", "")


def test_failures_are_told():
    flow = strengthen(hollow_cnf(2, [4], activation="tanh", solver=Solver(compile=True), cache_size=0))
    with torch.no_grad():
        next(flow.parameters())[0] = torch.nan
    with pytest.raises(SolverError, match="non-finite at t = 0"):
        flow(torch.randn(3, 2))
    strengthened = strengthen(hollow_cnf(2, [4], solver=Solver(compile=True, max_nfe=10), cache_size=0), 2.0)
    with pytest.raises(SolverError, match="max_nfe"):
        strengthened(torch.randn(3, 2))


def test_solver_is_copied_and_saved():
    solver = Solver("rk4", compile=True)
    for other in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert other == solver and other.compile
    assert solver != Solver("rk4")


# Compilers


@pytest.fixture
def fresh():
    """Nothing has been compiled yet."""
    compiled._library.cache_clear()
    yield
    compiled._library.cache_clear()


def test_compiler_of_the_environment(fresh, monkeypatch):
    monkeypatch.setenv("CC", f"{shutil.which(COMPILER) or COMPILER} -w")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    hollow_cnf(2, solver=Solver(compile=True))(torch.randn(3, 2))


def test_compiler_in_a_folder_with_a_space(fresh, monkeypatch, tmp_path):
    (tmp_path / "a folder").mkdir()
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("needs gcc or cc in the path")
    (tmp_path / "a folder" / "cc").symlink_to(found)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'a folder'}{os.pathsep}{os.environ['PATH']}")
    hollow_cnf(2, solver=Solver(compile=True))(torch.randn(3, 2))


NO_COMPILERS = {
    "none": (None, "needs a C compiler, but there is no cc, gcc or clang"),
    "missing": ("no-such-compiler", "needs a C compiler, but 'no-such-compiler' cannot be run"),
    "failing": ("false", "compile=True failed: false "),
    "idle": ("true", "could compile, but not load the result"),
    "unreadable": ("cc '", "cannot read the environment variable CC"),
}


@pytest.mark.parametrize("name", NO_COMPILERS)
def test_no_compiler(fresh, monkeypatch, name):
    compiler, message = NO_COMPILERS[name]
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", "")
    else:
        monkeypatch.setenv("CC", compiler)
    flow = hollow_cnf(2, solver=Solver(compile=True))
    with pytest.raises(RuntimeError, match=message):
        flow(torch.randn(3, 2))
    pyro.clear_param_store()
    guide = AutoHollowCNF(two_normals, compile=True)
    with pytest.raises(RuntimeError, match=message):
        guide()
    for kwargs in ({"penalty": 1e-3}, {"activation": "softplus"}, {"conditioner": "masked", "hidden_dims": [4, 4]}):
        pyro.clear_param_store()
        said = nullcontext() if "penalty" in kwargs else pytest.warns(UserWarning, match="compile=True has no effect")
        with said:  # a penalty begins after the warm-up
            AutoHollowCNF(two_normals, compile=True, **kwargs)()  # nothing to compile
    monkeypatch.undo()
    pyro.clear_param_store()
    guide()  # and as if nothing had happened


# Guides


def two_normals():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.square(), 0.5))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"path_gradient": True}, {"path_gradient": True, "overdispersion": 2.0}, {"penalty": 1e-3}],
    ids=["default", "path", "overdispersed", "penalty"],
)
def test_guide(kwargs):
    """The same steps, up to errors of rounding; also with a penalty, which nothing is compiled for."""
    losses = []
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoHollowCNF(two_normals, compile=compile, warm_up=5, **kwargs)
        svi = SVI(two_normals, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(8, vectorize_particles=True))
        silent = not compile or "penalty" not in kwargs
        said = nullcontext() if silent else pytest.warns(UserWarning, match="without regularize=True")
        with counted_tapes() as kinds, said as warned:
            losses.append([svi.step() for _ in range(30)])
        assert silent or len(warned) == 1  # once, not every step
        assert (CompiledTape in kinds) == (compile and "penalty" not in kwargs)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len(set(losses[1])) == 30


def test_guide_keeps_its_solver():
    solver = Solver("rk4", options={"step_size": 0.5})
    guide = AutoHollowCNF(two_normals, solver=solver, compile=True)
    assert guide.solver == dataclasses.replace(solver, compile=True)
    assert not AutoHollowCNF(two_normals, solver=solver).solver.compile
    assert AutoHollowCNF(two_normals, solver=guide.solver).solver.compile
