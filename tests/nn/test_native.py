# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""What is special to compiled code; tests/ode/test_steppers.py tests it with the other executors."""

import copy
import dataclasses
import os
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_hollow.infer import AutoHollowCNF
from pyro_hollow.nn.native import build, packing, stepper
from pyro_hollow.ode import Solver, SolverError
from pyro_hollow.transforms import hollow_cnf

COMPILER = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="compile=True needs a C compiler")

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}


def strengthen(flow, std=0.3):
    """Fresh flows are close to the identity, where most mistakes would not show."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += std * torch.randn_like(parameter)
    return flow


def gradients_of(flow, x):
    """Value, log-determinant and the gradients of all there is."""
    x = x.detach().requires_grad_()
    y, ladj = flow.call_and_ladj(x)
    weights = torch.arange(1.0, y.numel() + 1, dtype=y.dtype).view(y.shape).cos()
    loss = (weights * y.square()).sum() + (weights[..., 0] * ladj).sum()
    return [y.detach(), ladj.detach(), *torch.autograd.grad(loss, [x, *flow.nn.parameters()])]


def assert_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_saturation(activation, dtype, size):
    """Arguments of exponentials from tiny to far beyond what they can take."""
    solver = Solver("euler", options={"step_size": 1.0})
    flow = strengthen(hollow_cnf(3, [6], activation=activation, cache_size=0), size).to(dtype)
    x, answers = torch.randn(50, 3, dtype=dtype), []
    for compile in (False, True):
        flow.solver = dataclasses.replace(solver, compile=compile)
        answers.append(gradients_of(flow, x))
        assert flow.last_solve.backend == ("native" if compile else "hollow")
    assert all(value.isfinite().all() for value in answers[1])
    assert_close(*answers, TOLERANCES[dtype])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("conditioner", ["grouped", "masked", "leave-one-out"])
def test_large_batches_threads_and_defaults(conditioner, threads, monkeypatch):
    """Several blocks of samples, the last one smaller, on one thread and on more than there may be processors."""
    monkeypatch.setattr(stepper, "_PRODUCTS_OF_A_THREAD", 1)
    flow = strengthen(hollow_cnf(10, conditioner=conditioner, cache_size=0), 0.1)
    x, answers = torch.randn(3, 37, 10), []
    for compile in (False, True):
        torch.set_num_threads(threads if compile else 1)
        try:
            flow.solver = Solver(rtol=1e-6, atol=1e-6, compile=compile)
            answers.append([*gradients_of(flow, x), flow.last_solve.nfe * torch.ones(())])
            with torch.inference_mode():
                assert_close(flow.call_and_ladj(x), answers[-1][:2], 1e-14)
        finally:
            torch.set_num_threads(1)
        assert flow.last_solve.backend == ("native" if compile else "hollow")
    assert_close(*answers, 1e-12)


def test_memory_is_used_again(monkeypatch):
    """And not before all that shares it is gone."""
    monkeypatch.setattr(packing, "_waiting", {})
    tensor = packing.empty(100_000, torch.float32)
    address, part = tensor.data_ptr(), tensor[5:10].fill_(1.0)
    assert address % 64 == 0
    del tensor
    other = packing.empty(100_000, torch.float32).fill_(2.0)
    assert other.data_ptr() != address and torch.equal(part, torch.ones(5, dtype=torch.float32))
    del part
    assert packing.empty(60_000, torch.float32).data_ptr() == address
    assert packing.empty(1_000, torch.float32).data_ptr() != address  # much smaller


def test_memory_that_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(packing, "_MOST", 1_000_000)
    monkeypatch.setattr(packing, "_waiting", {})
    tensors = [packing.empty(100_000, torch.float32) for _ in range(5)]
    del tensors
    assert 0 < sum(map(len, packing._waiting.values())) <= 1_000_000


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


def mixed(flow):
    flow.nn.transformer.input_weight.data = flow.nn.transformer.input_weight.data.float()


#: Networks, settings of the solver, the reason and the executor.
NOT_COMPILED = {
    "transformer": (
        dict(transformer=torch.nn.Sequential(torch.nn.Linear(34, 1, dtype=torch.float64))),
        {},
        "closed-form",
        "autograd",
    ),
    "softplus": (dict(hidden_dims=[8], activation="softplus"), {}, "activation 'softplus'", "hollow"),
    "mixed types": (dict(hidden_dims=[5]), {}, "weights of several types", "hollow"),
    "of torchdiffeq": ({}, dict(method="adaptive_heun"), "method 'adaptive_heun'", "torchdiffeq"),
    "implicit": ({}, dict(method="bdf"), "method 'bdf'", "implicit"),
    "adjoint": ({}, dict(adjoint=True), "adjoint=True", "torchdiffeq"),
    "options": ({}, dict(options={"min_step": 0.0}), r"options \['min_step'\]", "torchdiffeq"),
    "regularized": (dict(regularize=True), {}, "regularize=True has no derivatives by hand", "autograd"),
}


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_others_are_solved_as_ever_and_say_why_once(name):
    network, settings, reason, executor = NOT_COMPILED[name]
    flow = strengthen(hollow_cnf(**{"input_dim": 3} | network, cache_size=0), 0.1)
    x, answers = torch.randn(4, 3), []
    if name == "mixed types":
        mixed(flow)
    for compile in (False, True):
        flow.solver = Solver(**settings, compile=compile)
        torch.manual_seed(0)
        said = pytest.warns(UserWarning, match=f"compile=True has no effect.*{reason}.*'silu'")
        with said if compile else nullcontext():
            answers.append(
                [v.detach() for v in flow.call_and_ladj(x)] if name == "mixed types" else gradients_of(flow, x)
            )
    flow(x)
    assert_close(*answers, 0)
    assert flow.last_solve.backend == executor


def test_the_statistics_tell_that_compiled_code_ran():
    flow = hollow_cnf(2, [4], solver=Solver(compile=True), cache_size=0)
    flow(torch.randn(3, 2))
    assert (flow.last_solve.backend, flow.last_solve.reason) == ("native", "")
    flow.solver = "dopri5"
    flow(torch.randn(3, 2))
    assert (flow.last_solve.backend, flow.last_solve.reason) == ("hollow", "")


def test_python_and_c_name_the_tensors_in_one_order():
    source = Path(build.__file__).with_name("kernel.c").read_text()
    names = re.search(r"enum \{(.*?)\blayers\b", source.replace("LAYERS /*", "layers /*"), re.DOTALL).group(1)
    assert tuple(re.findall(r"\w+", names)) == stepper._NAMES
    for struct, expected in (("Net", stepper._Net), ("Tableau", stepper._Tableau)):
        body = re.search(r"typedef struct \{([^}]*)\} " + struct, source).group(1)
        body = re.sub(r"/\*.*?\*/|const|int64_t|REAL|double|\*", " ", body, flags=re.DOTALL)
        assert re.findall(r"\w+", body) == [name for name, _ in expected._fields_]


def test_solver_is_copied_and_saved():
    solver = Solver("rk4", compile=True)
    for other in (copy.deepcopy(solver), pickle.loads(pickle.dumps(solver))):
        assert other == solver and other.compile
    assert solver != Solver("rk4")


# Compilers


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing has been compiled yet."""
    monkeypatch.setenv("PYRO_HOLLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stepper, "library", cache(build.library.__wrapped__))
    return tmp_path / "cache"


def test_compiled_code_is_kept(fresh, monkeypatch):
    """And is compiled anew if the file is not complete, or the compiler another one."""
    solver = Solver(compile=True)
    hollow_cnf(2, solver=solver)(torch.randn(3, 2))
    (path,) = fresh.iterdir()
    first = path.stat().st_mtime_ns
    monkeypatch.setattr(stepper, "library", cache(build.library.__wrapped__))
    hollow_cnf(2, solver=solver)(torch.randn(3, 2))
    assert [path] == list(fresh.iterdir()) and path.stat().st_mtime_ns == first
    other = fresh / f"kernel-{build._command(torch.float32, build._OPTIONS[0])[1]}.so"
    other.write_bytes(b"no library")
    hollow_cnf(2, solver=solver).float()(torch.randn(3, 2, dtype=torch.float32))
    assert other.stat().st_size > 10_000
    monkeypatch.setenv("CC", f"{COMPILER} -DSOMETHING_ELSE")
    assert build._command(torch.float32, build._OPTIONS[0])[1] not in other.name


@pytest.mark.parametrize("set_to", ["a file", "a folder in a file"])
def test_folder_that_cannot_be_written(fresh, monkeypatch, tmp_path, set_to):
    """Nothing is kept, and all works."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYRO_HOLLOW_CACHE", str(tmp_path / ("file" if set_to == "a file" else "file/folder")))
    with pytest.warns(UserWarning, match="cannot be kept in .*PYRO_HOLLOW_CACHE"):
        hollow_cnf(2, solver=Solver(compile=True))(torch.randn(3, 2))


def test_folder_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("PYRO_HOLLOW_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "pyro_hollow"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / ".cache" / "pyro_hollow"


def test_two_processes_compile_at_once(fresh):
    """Each of them works, and one file is left."""
    code = "import torch; from pyro_hollow.nn.native.build import library; print(library(torch.float64).lanes())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    answers = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and answers[0] == answers[1] != b""
    assert len(list(fresh.iterdir())) == 1


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
    for kwargs in ({"penalty": 1e-3}, {"activation": "softplus"}):
        pyro.clear_param_store()
        said = nullcontext() if "penalty" in kwargs else pytest.warns(UserWarning, match="compile=True has no effect")
        with said:  # a penalty begins after the warm-up
            AutoHollowCNF(two_normals, compile=True, **kwargs)()  # nothing to compile
    monkeypatch.undo()
    if compiler is None:  # once, as it takes seconds
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
def test_guide(kwargs, monkeypatch):
    """The same steps, up to errors of rounding; also with a penalty, which nothing is compiled for."""
    losses, executors, integrate = [], [], Solver.integrate_with_divergence

    def watched(*args):
        solution = integrate(*args)
        executors.append(solution.stats.backend)
        return solution

    monkeypatch.setattr(Solver, "integrate_with_divergence", watched)
    for compile in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoHollowCNF(two_normals, compile=compile, warm_up=5, **kwargs)
        svi = SVI(two_normals, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO(8, vectorize_particles=True))
        silent = not compile or "penalty" not in kwargs
        said = (
            nullcontext() if silent else pytest.warns(UserWarning, match="regularize=True has no derivatives by hand")
        )
        with said as warned:
            losses.append([svi.step() for _ in range(12)])
        assert silent or len(warned) == 1  # once, not every step
        used, executors[:] = set(executors[-6:]), []
        assert used == {"autograd" if "penalty" in kwargs else "native" if compile else "hollow"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert len(set(losses[1])) == 12


def test_guide_keeps_its_solver():
    solver = Solver("rk4", options={"step_size": 0.5})
    guide = AutoHollowCNF(two_normals, solver=solver, compile=True)
    assert guide.solver == dataclasses.replace(solver, compile=True)
    assert not AutoHollowCNF(two_normals, solver=solver).solver.compile
    assert AutoHollowCNF(two_normals, solver=guide.solver).solver.compile
