# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Cost of an exact divergence: ratios of times measured side by side in one run, and the memory of a training step.

Every time is the median over repetitions in which the candidates take turns. One repetition binds the field, evaluates
it 8 times, as two Runge-Kutta steps do, and, for "forward + backward", backpropagates from a random linear function of
all results. The peers are a free-form dense network with as many parameters (two hidden layers, softplus), with its
trace by one Hutchinson probe, as FFJORD takes it; by batched vector-Jacobian products, as zuko's CNF does; and in
closed form, as :class:`~pyro_hollow.transforms.FreeFormCNF` does for a network of this form.

    python -m pyro_hollow.experiments.speed
    python -m pyro_hollow.experiments.speed --device cuda
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoIAFNormal, AutoMultivariateNormal, AutoNormalizingFlow
from torch import Tensor, nn

from pyro_hollow.experiments.harness import Parser, Progress, interleaved, positive, table
from pyro_hollow.infer import AutoHollowCNF, LogDensity, fit
from pyro_hollow.infer.elbo import PathELBO
from pyro_hollow.infer.model_density import ModelDensity
from pyro_hollow.nn import ConditionalHollowNN, GraphConditioner, HollowField, HollowNN
from pyro_hollow.nn.native import NativeStepper
from pyro_hollow.ode import Solver
from pyro_hollow.ode.explicit import TABLEAUS
from pyro_hollow.ops import dimwise_derivatives
from pyro_hollow.ops.stepper import Stepper, Tableau
from pyro_hollow.ops.vector_field import VectorField
from pyro_hollow.transforms import FreeFormCNF, FreeFormNN, HollowCNF

EVALUATIONS = 8
CONDITIONERS = ("grouped", "masked", "leave-one-out")
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def free_form_peer(d: int, parameters: int) -> FreeFormNN:
    """
    A free-form network with two hidden layers of equal width and about as many parameters.

    :param int d: the number of coordinates.
    :param int parameters: the number of parameters.
    """
    b = 2 * d + 3  # w^2 + (2 d + 3) w + d parameters for layers d + 1 -> w -> w -> d
    width = round((math.sqrt(b * b + 4 * (parameters - d)) - b) / 2)
    return FreeFormNN(d, 0, [width, width])


def hollow_field(net: HollowNN) -> Callable[[], Evaluate]:
    """The hollow field alone."""
    return lambda: _tuple(net.bind())


def _tuple(field: Callable[[Tensor, Tensor], Tensor]) -> Evaluate:
    return lambda t, x: (field(t, x),)


def hollow_divergence(net: HollowNN) -> Callable[[], Evaluate]:
    """The hollow field with its divergence in closed form."""
    return lambda: net.bind().with_divergence


class SourceField(VectorField):
    """A hollow field with its divergence by a backward pass through the transformer: the source's way."""

    def __init__(self, net: ConditionalHollowNN) -> None:
        self._field = net.bind()
        self.tensors = self._field.tensors

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self._field(t, x)

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~pyro_hollow.nn.HollowField`."""
        field = self._field
        f, diagonal = dimwise_derivatives(lambda x, h: field.transformer(t, x, h), x, field.conditioner(t, x), 1)
        return f, diagonal.sum(-1)


def source_divergence(net: HollowNN) -> Callable[[], Evaluate]:
    """The hollow field with its divergence the source's way."""
    return lambda: SourceField(net).with_divergence


class SourceCNF(HollowCNF):
    """A Hollow-CNF that takes the divergence the source's way."""

    def _bind(self) -> VectorField:
        return SourceField(self.nn)


class AutogradField(HollowField):
    """A hollow field whose steps are differentiated automatically."""

    def stepper(self, tableau: Tableau, state: tuple[Tensor, ...], compile: bool = False) -> tuple[Stepper, str]:
        """See :class:`~pyro_hollow.nn.HollowField`."""
        return VectorField.stepper(self, tableau, state)


class AutogradCNF(HollowCNF):
    """A Hollow-CNF whose steps are differentiated automatically."""

    def _bind(self) -> VectorField:
        field = self.nn.bind()
        return AutogradField(self.nn.input_dim, field.conditioner, field.transformer)


def free_form_divergence(net: nn.Module, divergence: str) -> Callable[[], Evaluate]:
    """The free-form field with its divergence by a method of :class:`~pyro_hollow.transforms.FreeFormCNF`."""
    return lambda: FreeFormCNF(net, divergence=divergence)._bind().with_divergence


class Opaque(nn.Module):
    """Hides the structure of a network, so that its exact trace takes backward passes."""

    def __init__(self, net: FreeFormNN) -> None:
        super().__init__()
        self.input_dim = net.input_dim
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """See :class:`~pyro_hollow.transforms.FreeFormNN`."""
        return self.net(t, x)


def _forward(bind: Callable[[], Evaluate], x: Tensor) -> Callable[[], None]:
    t = x.new_tensor(0.3)

    @torch.no_grad()
    def function() -> None:
        evaluate = bind()
        for _ in range(EVALUATIONS):
            evaluate(t, x)

    return function


def _forward_backward(bind: Callable[[], Evaluate], x: Tensor, evaluations: int) -> Callable[[], None]:
    t, x = x.new_tensor(0.3), x.clone().requires_grad_()
    weights = torch.randn_like(x), torch.randn_like(x[..., 0])

    def function() -> None:
        evaluate = bind()
        loss = x.new_zeros(())
        for _ in range(evaluations):
            for value, weight in zip(evaluate(t, x), weights, strict=False):
                loss = loss + (value * weight).sum()
        loss.backward()

    return function


def divergence_over_field(dims: Sequence[int], batch: int, repeats: int, device: str = "cpu") -> list[str]:
    """Rows: the price of the divergence relative to the field alone."""
    rows = []
    for name in CONDITIONERS:
        for d in dims:
            net = HollowNN(d, conditioner=name).to(device)
            x = torch.randn(batch, d, device=device)
            binds = {"field": hollow_field(net), "divergence": hollow_divergence(net)}
            turns = repeats if d <= 256 else max(3, repeats // 5)
            label = f"{name}, d = {d}"
            forward = interleaved({k: _forward(bind, x) for k, bind in binds.items()}, turns, label)
            both = interleaved({k: _forward_backward(b, x, EVALUATIONS) for k, b in binds.items()}, turns, label)
            ratios = [f"{times['divergence'] / times['field']:.2f}" for times in (forward, both)]
            rows.append([name, d, f"{_count(net):,}", *ratios])
    return table("conditioner | d | parameters | forward | forward + backward", rows)


def peers_over_hollow(dims: Sequence[int], batch: int, repeats: int, device: str = "cpu") -> list[str]:
    """Rows: how many times longer the peers take, forward + backward."""
    rows = []
    for d in dims:
        net = HollowNN(d).to(device)
        peer = free_form_peer(d, _count(net)).to(device)
        x = torch.randn(batch, d, device=device)
        binds = {
            "hollow": hollow_divergence(net),
            "source": source_divergence(net),
            "hutchinson": free_form_divergence(peer, "hutchinson"),
            "exact": free_form_divergence(peer, "exact"),
        }
        label = f"peers, d = {d}"
        times = interleaved({k: _forward_backward(b, x, EVALUATIONS) for k, b in binds.items()}, repeats, label)
        forward = interleaved({k: _forward(binds[k], x) for k in ("hollow", "source")}, repeats, label)
        pairs = ((times, "source"), (forward, "source"), (times, "hutchinson"), (times, "exact"))
        ratios = [f"{measured[name] / measured['hollow']:.2f}" for measured, name in pairs]
        # Backward passes take seconds and gigabytes: one evaluation against one.
        passes = "-"
        if d <= 64:
            pair = {"hollow": hollow_divergence(net), "passes": free_form_divergence(Opaque(peer), "exact")}
            alone = interleaved({k: _forward_backward(b, x, 1) for k, b in pair.items()}, max(3, repeats // 8), label)
            passes = f"{alone['passes'] / alone['hollow']:.0f}"
        milliseconds = f"{times['hollow'] / EVALUATIONS * 1e3:.2f}"
        rows.append([d, f"{_count(net):,} / {_count(peer):,}", milliseconds, *ratios, passes])
    header = (
        "d | parameters | hollow (ms per evaluation) | autograd through the transformer | the same, forward only | "
        "one Hutchinson probe | exact trace in closed form | exact trace by backward passes"
    )
    return table(header, rows)


SOLVERS = {
    "rk4, 4 steps": Solver("rk4", options={"step_size": 0.25}),
    "dopri5, 1e-3": Solver(rtol=1e-3, atol=1e-3),
    "dopri5, 1e-5": Solver(rtol=1e-5, atol=1e-5),
}


def can_compile(device: str) -> bool:
    """True if compile=True makes a difference."""
    try:
        HollowCNF(HollowNN(1), solver=Solver("euler", compile=True))(torch.zeros(1))
    except RuntimeError:
        return False
    return device == "cpu"


def on_a_ring(d: int) -> GraphConditioner:
    """A conditioner whose graph is a ring."""
    ring = torch.eye(d, dtype=torch.bool).roll(1, 0)
    return GraphConditioner(d, [32, 32], adjacency=ring | ring.T)


def _hollow(conditioner: str | GraphConditioner, d: int) -> HollowCNF:
    return HollowCNF(HollowNN(d, max_rate=4.0, conditioner=conditioner))  # as in hollow_cnf


FIELDS: dict[str, Callable[[int], HollowCNF | FreeFormCNF]] = {
    **{name: partial(_hollow, name) for name in CONDITIONERS},
    "graph": lambda d: _hollow(on_a_ring(d), d),
    "free-form": lambda d: FreeFormCNF(free_form_peer(d, 100 * d + 5000)),
}


def solves(sizes: Sequence[tuple[int, int]], repeats: int, device: str = "cpu") -> list[str]:
    """Rows: whole solves, forward + backward, by torchdiffeq and by each executor."""
    lines = [
        "| field | d, batch | solver | torchdiffeq (ms) | evaluations | autograd | evaluations | hollow | native |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (kind, make), (d, batch), (name, solver) in itertools.product(FIELDS.items(), sizes, SOLVERS.items()):
        flow = make(d)
        with torch.no_grad():  # a field that has learned something
            for parameter in flow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        flow.to(device).solver = solver
        x = torch.randn(batch, d, device=device)
        flows: dict[str, HollowCNF | FreeFormCNF] = {"autograd": flow}
        if isinstance(flow.nn, HollowNN):
            flows = {"autograd": AutogradCNF(flow.nn, solver=solver), "hollow": flow}
            if can_compile(device):
                flows["native"] = HollowCNF(flow.nn, solver=replace(solver, compile=True))
        steps: dict[str, Callable[[], object]] = {k: partial(_step_of_density, f, x) for k, f in flows.items()}
        steps["torchdiffeq"] = partial(_step_by_torchdiffeq, flow, x)
        times = interleaved(steps, repeats, f"solve of {kind}, d = {d}, {name}")
        found = flows["autograd"].last_solve
        ratios = [f"{times[k] / times['torchdiffeq']:.2f}" if k in times else "-" for k in ("hollow", "native")]
        lines.append(
            f"| {kind} | {d}, {batch} | {name} | {times['torchdiffeq'] * 1e3:.1f} | {_step_by_torchdiffeq(flow, x)} | "
            f"{times['autograd'] / times['torchdiffeq']:.2f} | {found.nfe if found else 0} | {' | '.join(ratios)} |"
        )
    return lines


def arithmetic(dims: Sequence[int], batch: int, repeats: int) -> list[str]:
    """
    Rows: the arithmetic of compiled code, 2 operations per parameter and sample in an evaluation and 4 more in its
    backward pass, in GFLOP/s and as a share of a product of matrices in torch.

    :param dims: dimensions.
    :param int batch: samples.
    :param int repeats: repetitions.
    """
    square, rows = torch.randn(512, 512), []
    for (kind, make), d in itertools.product(list(FIELDS.items())[:-1], dims):
        flow, x = make(d), torch.randn(batch, d)
        field: VectorField = flow._bind()
        state = field.initial_state(x)
        stepper, _ = field.stepper(TABLEAUS["rk4"], state, compile=True)
        assert isinstance(stepper, NativeStepper)
        y, sums, tolerances = stepper.pack(state), stepper.new_sums(), None
        saved = stepper.step(0.0, 0.25, y, None, tolerances).saved
        candidates: dict[str, Callable[[], object]] = {
            "product": partial(torch.mm, square, square),
            "forward": partial(stepper.step, 0.0, 0.25, y, None, tolerances),
            "backward": partial(stepper.step_vjp, 0.0, 0.25, saved, torch.ones_like(y), sums),
        }
        # Several in a row, as in a solve, so that each finds its own data in the cache.
        series = {name: partial(_repeat, function, 10) for name, function in candidates.items()}
        times = interleaved(series, repeats, f"arithmetic of {kind}, d = {d}")
        work = 10 * 4 * 2 * batch * _count(flow.nn)  # of 4 evaluations each
        product = 10 * 2 * 512**3 / times["product"]
        rates = [work / times["forward"], 3 * work / (times["forward"] + times["backward"])]
        rows.append([kind, str(d), f"{product / 1e9:.0f}", *(f"{r / 1e9:.0f} ({r / product:.2f})" for r in rates)])
    return table("conditioner | d | torch.mm | forward | forward + backward", rows)


def _repeat(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def _step_by_torchdiffeq(flow: HollowCNF | FreeFormCNF, x: Tensor) -> int:
    """A training step of a density that torchdiffeq solves; returns the number of evaluations."""
    options = {"min_step": 0.0} if flow.solver.adaptive else {"perturb": False}  # its defaults, which we do not know
    solver = replace(flow.solver, options={**flow.solver.options, **options})
    z, ladj = (solution := solver.integrate_with_divergence(flow._bind(), x, flow.time, 0.0)).state
    (z.pow(2).sum(-1) / 2 - ladj).mean().backward()
    return solution.stats.nfe


def _step_of_density(flow: HollowCNF | FreeFormCNF, x: Tensor) -> None:
    z, ladj = flow.inv.call_and_ladj(x)
    (z.pow(2).sum(-1) / 2 - ladj).mean().backward()


def _count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


MEMORY_CASES = ("hollow", "source", "hutchinson", "exact", "passes")


def memory_of_step(case: str, adjoint: bool, d: int, batch: int, device: str = "cpu") -> float:
    """
    Peak memory of one training step of a density, in MiB beyond what is held before it, for a fresh process.

    :param str case: "hollow", "source" (autograd through the transformer), or the free-form peer's "hutchinson",
        "exact" (in closed form) or "passes" (exact by backward passes).
    :param bool adjoint: gradients by the adjoint method instead of backpropagation through the solver.
    :param int d: the number of coordinates.
    :param int batch: the batch size.
    :param str device: "cpu" or "cuda".
    """
    net = HollowNN(d)
    solver = Solver("rk4", options={"step_size": 0.25}, adjoint=adjoint)
    transform: HollowCNF | FreeFormCNF = (SourceCNF if case == "source" else HollowCNF)(net, solver=solver)
    if case in ("hutchinson", "exact", "passes"):
        peer = free_form_peer(d, _count(net))
        divergence = "hutchinson" if case == "hutchinson" else "exact"
        transform = FreeFormCNF(Opaque(peer) if case == "passes" else peer, divergence=divergence, solver=solver)
    transform.to(device)
    x = torch.randn(batch, d, device=device)
    torch.randn(2, 2, requires_grad=True, device=device).mm(torch.randn(2, 2, device=device)).sum().backward()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        _step_of_density(transform, x)
        return torch.cuda.max_memory_allocated() / 2**20 - before
    before = _peak_memory()
    _step_of_density(transform, x)
    return _peak_memory() - before


def _peak_memory() -> float:
    """The largest resident size of this process so far, in MiB; elsewhere than on Linux, of its parents, too."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def memory_table(
    d: int, batch: int, threads: int, cases: Sequence[str] = MEMORY_CASES, device: str = "cpu"
) -> list[str]:
    """Rows: peak memory of a training step, each measured in a process of its own."""
    rows = []
    for case in Progress(cases, desc="memory"):
        cells = []
        for adjoint in (False, True):
            code = (
                f"import torch; torch.set_num_threads({threads})\n"
                "from pyro_hollow.experiments.speed import memory_of_step\n"
                f"print(memory_of_step({case!r}, {adjoint}, {d}, {batch}, {device!r}))"
            )
            output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
            cells.append(f"{float(output):.0f}")
        rows.append([case, *cells])
    return table("divergence | backpropagation (MiB) | adjoint (MiB)", rows)


def svi_guides(device: str = "cpu") -> dict[str, Callable[[Any], AutoGuide]]:
    """The guides whose steps are timed."""
    compiled: dict[str, Callable[[Any], AutoGuide]] = {
        "AutoHollowCNF, compiled": lambda model: AutoHollowCNF(model, warm_up=0, compile=True),
        "AutoHollowCNF, tanh, compiled": lambda model: AutoHollowCNF(model, warm_up=0, activation="tanh", compile=True),
    }
    return {
        **(compiled if can_compile(device) else {}),
        "AutoHollowCNF": lambda model: AutoHollowCNF(model, warm_up=0),
        "AutoHollowCNF, tanh": lambda model: AutoHollowCNF(model, warm_up=0, activation="tanh"),
        "AutoHollowCNF, warming up": lambda model: AutoHollowCNF(model, warm_up=10**9),
        "AutoMultivariateNormal": AutoMultivariateNormal,
        "AutoIAFNormal": AutoIAFNormal,
        "AutoIAFNormal, 2 transforms": lambda model: AutoIAFNormal(model, num_transforms=2),
        "block-autoregressive": lambda model: AutoNormalizingFlow(model, T.block_autoregressive),
        "neural-autoregressive": lambda model: AutoNormalizingFlow(model, T.neural_autoregressive),
    }


def svi_steps(dims: Sequence[int], repeats: int, device: str = "cpu", before: int = 0) -> list[str]:
    """Rows: the time of an SVI step with 32 particles relative to that with AutoIAFNormal, after so many steps."""
    columns: list[dict[str, str]] = []
    for d in dims:

        def model(d: int = d) -> None:
            width = pyro.sample("width", dist.Normal(torch.zeros((), device=device), 1.0))
            scale = torch.exp(width / 2).unsqueeze(-1)
            pyro.sample("x", dist.Normal(scale.new_zeros(d - 1), scale).to_event(1))

        pyro.clear_param_store()
        steps = {}
        for name, make in svi_guides(device).items():
            guide = make(model)
            guide._pyro_name = name.replace(" ", "_")  # guides of one class would share their parameters in the store
            svi = SVI(
                model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(num_particles=32, vectorize_particles=True)
            )
            steps[name] = svi.step
            with torch.device(device):  # where Pyro's guides make their transforms, at the first step
                for _ in range(1 + before):
                    svi.step()
        steps["fit"] = fit_step(model, before)
        times = interleaved(steps, repeats, f"SVI, d = {d}")
        ratios = {name: seconds / times["AutoIAFNormal"] for name, seconds in times.items()}
        columns.append({name: f"{ratio:.2f} ({times[name] * 1e3:.1f} ms)" for name, ratio in ratios.items()})
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    return table(" | ".join(["guide", *(f"d = {d}" for d in dims)]), rows)


def fit_step(model: Callable[..., Any], before: int) -> Callable[[], None]:
    """A step as ``fit`` takes it, after so many steps."""
    guide: Any = fit(model, num_steps=1 + before, num_particles=32, progress=False).guide
    objective = PathELBO(guide, LogDensity(model, batch_size=32), 32)
    optimizer = torch.optim.Adam(guide.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        objective()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 10.0)
        optimizer.step()

    return step


def eight_schools() -> None:
    """The centred model of eight schools, with 10 latents."""
    effects = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    errors = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, errors), obs=effects)


def _covariates(rows: int, columns: int) -> Tensor:
    """A fixed matrix without structure."""
    return torch.sin(torch.arange(1.0, 1.0 + rows * columns).square()).reshape(rows, columns)


def hierarchical_regression(groups: int = 10, rows: int = 200) -> None:
    """A regression with varying intercepts, with 16 latents."""
    x, group = _covariates(rows, 3), torch.arange(rows) % groups
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("groups", groups):
        intercepts = pyro.sample("intercepts", dist.Normal(mu, tau))
    with pyro.plate("data", rows):
        pyro.sample("y", dist.Normal(intercepts[..., group] + (slopes * x).sum(-1), sigma), obs=x[:, 0])


def paired_groups(pairs: int = 96, grades: int = 4) -> None:
    """Effects of pairs within grades, with 112 latents."""
    grade, x = torch.arange(pairs) % grades, _covariates(2, pairs)
    with pyro.plate("grades", grades):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.HalfCauchy(1.0))
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("pairs", pairs):
        level = pyro.sample("level", dist.Normal(mean[..., grade], spread[..., grade]))
        pyro.sample("control", dist.Normal(level, noise[..., grade]), obs=x[0])
        pyro.sample("treated", dist.Normal(level + effect[..., grade], noise[..., grade]), obs=x[1])


def state_space(steps: int = 100) -> None:
    """A stochastic volatility model, written as a loop, with 102 latents."""
    x = _covariates(1, steps)[0]
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    state = torch.zeros(())
    for t in range(steps):
        state = pyro.sample(f"state_{t}", dist.Normal(phi * state, sigma))
        pyro.sample(f"x_{t}", dist.Normal(0.0, (state / 2).exp()), obs=x[t])


DENSITIES: dict[str, Callable[[], None]] = {
    "eight schools": eight_schools,
    "hierarchical regression": hierarchical_regression,
    "paired groups": paired_groups,
    "state space": state_space,
}


def densities(names: Sequence[str], batch: int, repeats: int, compile: bool = True) -> list[str]:
    """
    Rows: a log joint density with its gradient, by Pyro's handlers, as a graph and compiled.

    :param names: of :data:`DENSITIES`.
    :param int batch: particles.
    :param int repeats: repetitions.
    :param bool compile: to compile the graphs, which takes up to a minute each.
    """
    rows = []
    for name in names:
        begin = time.perf_counter()
        graph = LogDensity(DENSITIES[name], compile=False, batch_size=batch)
        seconds = time.perf_counter() - begin
        z = graph.start + 0.1 * torch.randn(batch, graph.dim)
        handlers = ModelDensity(DENSITIES[name], (), {})
        candidates: dict[str, Callable[[], object]] = {
            "handlers": partial(_by_handlers, handlers, z),
            "graph": partial(graph.value_and_gradient, z),
        }
        if compile:
            compiled = LogDensity(DENSITIES[name], compile=True, batch_size=batch)
            candidates["compiled"] = partial(compiled.value_and_gradient, z)
        times = interleaved(candidates, repeats, f"density of {name}")
        ratios = [f"{times['handlers'] / times[k]:.1f}" if k in times else "-" for k in ("graph", "compiled")]
        rows.append([name, graph.dim, f"{times['handlers'] * 1e3:.2f}", *ratios, f"{seconds:.1f}"])
    return table("model | latents | handlers (ms) | graph, times faster | compiled, times faster | traced in (s)", rows)


def _by_handlers(density: ModelDensity, z: Tensor) -> None:
    z = z.clone().requires_grad_()
    with pyro.validation_enabled(False):
        torch.autograd.grad(density.of_particles(z).sum(), z)


#: What is measured: name to a title and the rows, by the command line.
TABLES: dict[str, tuple[str, Callable[[argparse.Namespace], list[str]]]] = {
    "divergence": (
        "Time of the field with its divergence, relative to the field alone",
        lambda args: divergence_over_field(args.dims, args.batch_size, args.repeats, args.device),
    ),
    "peers": (
        "Time of the peers relative to the hollow field with divergence, forward + backward",
        lambda args: peers_over_hollow([d for d in args.dims if d <= 256], args.batch_size, args.repeats, args.device),
    ),
    "solves": (
        "Time of a training step of a density relative to torchdiffeq's, by each executor",
        lambda args: solves([(2, 32), (10, 32), (40, 32), (64, 256)], args.repeats, args.device),
    ),
    "arithmetic": (
        "Arithmetic of compiled code, in GFLOP/s and as a share of a product of matrices in torch, batch 32",
        lambda args: arithmetic((10, 40, 100), 32, args.repeats),
    ),
    "svi": (
        "Time of an SVI step with 32 particles, relative to that with AutoIAFNormal, after 450 steps",
        lambda args: svi_steps((10, 100), 7 * args.repeats, args.device, 450),
    ),
    "density": (
        "Log joint density of a Pyro model with its gradient, 32 particles",
        lambda args: densities(list(DENSITIES), 32, 7 * args.repeats),
    ),
    "memory": (
        "Peak memory of a training step of a density (rk4, 4 steps), d = 64",
        lambda args: memory_table(64, args.batch_size, args.threads, device=args.device),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = Parser(__file__, __doc__, threads=2)
    add = parser.add_argument
    add("--table", nargs="+", choices=tuple(TABLES), default=list(TABLES), help="what to measure (default: all)")
    add("--dims", nargs="+", type=positive, default=[16, 64, 256, 1024], help="dimensions d of the first two tables")
    add("--batch-size", type=positive, default=256, help="samples a batch (default: 256)")
    add("--repeats", type=positive, default=15, help="repetitions (default: 15)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: cpu)")
    args = parser.begin(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU that it can use")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {device}, float32, batch {args.batch_size}")
    for name in args.table:
        title, rows = TABLES[name]
        print(f"\n{title}:\n")
        print("\n".join(rows(args)), flush=True)


if __name__ == "__main__":
    main()
