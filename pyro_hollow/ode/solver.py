# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Initial value problems, with error control for each sample, statistics, and errors that help."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torchdiffeq
from torch import Tensor, nn

from pyro_hollow.ops.stepper import (
    DifferentiatedStepper,
    FunctionStepper,
    Pull,
    Stepper,
    Tableau,
    is_batched,
    is_functional,
    largest_rms,
)
from pyro_hollow.ops.vector_field import VectorField

from . import explicit, implicit
from .augmented import Augmented, Scored
from .implicit_methods import METHODS as IMPLICIT_METHODS
from .monitor import Dynamics, Monitor, SolverError, SolverStats, State, StepMonitor, are_finite, parts

__all__ = ["METHODS", "Solution", "Solver", "SolverError", "SolverStats"]

AnyState = TypeVar("AnyState", Tensor, tuple[Tensor, ...])
#: Makes the executor of a method's steps, and says why it is not a faster one.
Executor = Callable[[Tableau], tuple[Stepper, str]]

_ADAPTIVE_OPTIONS = frozenset(
    "first_step min_step max_step safety ifactor dfactor max_num_steps dtype step_t jump_t norm".split()
)
_FIXED_OPTIONS = frozenset("step_size grid_constructor perturb interp".split())
_ADAMS_OPTIONS = _FIXED_OPTIONS | {"max_iters", "max_order"}
_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
_SCIPY = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
_ADAMS = ("explicit_adams", "implicit_adams")

#: The names of the methods, with the options that each one knows.
METHODS: dict[str, frozenset[str]] = {
    **dict.fromkeys(_ADAPTIVE, _ADAPTIVE_OPTIONS),
    **dict.fromkeys(_FIXED, _FIXED_OPTIONS),
    **dict.fromkeys(_ADAMS, _ADAMS_OPTIONS),
    "scipy_solver": frozenset({"solver", "min_step", "max_step"}),
    **{name: implicit.names_of_options(name) for name in IMPLICIT_METHODS},
}


@dataclass(frozen=True)
class Solution:
    """
    The result of a solve.

    :ivar state: the state at the end time, a tensor or a tuple of tensors as the initial state was.
    :ivar stats: what it cost.
    :ivar pull: maps the gradients of the parts of the state to those of the parts of the initial state, and of the
        field's tensors. None unless it was asked for, and where the executor has no derivatives by hand.
    """

    state: Any
    stats: SolverStats
    pull: Pull | None = None


@dataclass(frozen=True)
class Solver:
    r"""
    A solver of :math:`dx/dt = f(t, x)`: a method, of torchdiffeq or implicit, and its settings.

    Adaptive methods ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun") choose their steps such that for every
    sample of the batch the root mean square of error / (atol + rtol \|x\|) stays below 1 in each part of the state (an
    average over the batch would let one hard sample drown among many easy ones), and end exactly at the end time.
    Methods of fixed step ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams") divide the
    interval into equal steps of at most options["step_size"], by default 10 of them; the order of the two of Adams is
    options["max_order"], by default 4. "scipy_solver" is
    :func:`scipy.integrate.solve_ivp`, which knows no gradients except with ``adjoint=True``.

    Stiff equations, whose fastest decay forces explicit methods to tiny steps, are for implicit methods: "kencarp4" and
    "kvaerno3" (ESDIRK, L-stable, orders 4 and 3), "bdf" (variable order up to 5) and "adams_moulton" (orders 1
    to 8; only orders 1 and 2 are A-stable). options["corrector"] says how their equations are solved: "jacobi-newton"
    by the diagonal of the Jacobian, for fields with a method ``with_diagonal(t, x) -> (dx, diagonal)`` as those of
    hollow networks, where it is the default; "newton" by the dense Jacobian; or "fixed-point". Of a field whose
    attribute ``block_dim`` is more than 1, Jacobi-Newton takes the diagonal blocks, from its method ``with_blocks``. It
    converges where the diagonal dominates; where it does not, dense Newton takes over, and the statistics count it.
    Further options are "first_step", "max_iterations" of the corrector and, for the last two methods, "max_order".
    Where a tuple is integrated and the field's attribute ``state_field`` is a field for the first part alone, the
    other parts are integrals along it and are left out of the root finding, as is the log-determinant of a flow.

    Gradients come by backpropagation through the solver's operations; or with ``adjoint=True`` by solving the adjoint
    equation backward ("implicit_adams" is followed by "rk4" there), which needs no memory for intermediate states, but
    more evaluations, is accurate to solver tolerance only, and cannot be differentiated again. Both reach the initial
    state and ``field.tensors``. The steps of an implicit method are replayed with gradients, each of its equations
    being differentiated by the implicit function theorem; with ``adjoint=True`` one at a time in the backward pass,
    from the stored states, for the same gradients in less memory. Neither can be differentiated again.

    The first five methods of fixed step, "dopri5" and "bosh3" run in one loop, whose step-size rule divides the rest of
    the interval evenly. Flows try the whole interval in one step first; for a plain function the first step is
    estimated, or it is options["first_step"]. One of three executors takes the steps, and :class:`SolverStats` say
    which: "autograd" for any field; "hollow", with derivatives by hand, for networks whose conditioner and transformer
    have them; and "native", compiled code. torchdiffeq serves the other methods and options, and ``adjoint=True``.

    ``compile=True`` uses the native executor if it supports the field: on a CPU, for the conditioners of this package
    and the closed-form transformer, with the activations "silu" and "tanh". Otherwise it warns once and has no effect;
    see ``stats.reason``. It takes a C compiler (the one that the environment variable CC names, or cc, gcc or clang).
    What is compiled, in some seconds, is kept for later processes in the folder that the environment variable
    PYRO_HOLLOW_CACHE names, or in ``~/.cache/pyro_hollow``. Large solves use as many threads as
    :func:`torch.get_num_threads` tells, if the compiler knows OpenMP.

    :param str method: a name in :data:`METHODS`.
    :param float rtol: relative tolerance of adaptive methods.
    :param float atol: absolute tolerance of adaptive methods.
    :param options: further options of the method, by name; those of torchdiffeq's methods as there.
    :param bool adjoint: gradients by the adjoint method.
    :param int max_nfe: the number of evaluations, forward and again backward, beyond which a solve is given up.
    :param bool compile: whether to run in compiled code what can be.
    :raises ValueError: for unknown methods and options, and for tolerances that are not positive.

    References:

    [1] Ricky T. Q. Chen. torchdiffeq. https://github.com/rtqichen/torchdiffeq

    [2] Patrick Kidger, Ricky T. Q. Chen, Terry Lyons. "Hey, that's not an ODE": Faster ODE Adjoints via Seminorms.
    [arXiv:2009.09457]

    [3] Anne Kvaerno. Singly Diagonally Implicit Runge-Kutta Methods with an Explicit First Stage. BIT, 2004.

    [4] Christopher A. Kennedy, Mark H. Carpenter. Additive Runge-Kutta Schemes for Convection-Diffusion-Reaction
    Equations. Applied Numerical Mathematics, 2003.

    [5] Lawrence F. Shampine, Mark W. Reichelt. The MATLAB ODE Suite. SIAM Journal on Scientific Computing, 1997.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    adjoint: bool = False
    max_nfe: int = 10_000
    compile: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, but got {self.method!r}")
        if unknown := set(self.options) - METHODS[self.method]:
            raise ValueError(
                f"options of method {self.method!r} are {sorted(METHODS[self.method])}, but got {sorted(unknown)}"
            )
        for name in ("rtol", "atol", "max_nfe"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, but got {value}")
        object.__setattr__(self, "options", dict(self.options))
        #: Why compile=True had no effect, as far as said: no field, as it is no setting.
        object.__setattr__(self, "_said", set())
        scipy_method = self.options.get("solver", "LSODA")
        if self.method == "scipy_solver" and scipy_method not in _SCIPY:
            raise ValueError(f"options['solver'] must be one of {_SCIPY}, but got {scipy_method!r}")
        for name in ("step_size", "first_step"):
            if not self.options.get(name, 1.0) > 0:
                raise ValueError(f"options[{name!r}] must be positive, but got {self.options[name]}")
        if self.method in IMPLICIT_METHODS:
            implicit.check_options(self.method, self.options)

    @classmethod
    def of(cls, solver: Solver | str) -> Solver:
        """
        Returns a solver as it is, and makes one with the default settings of a method's name.

        :param solver: a solver, or the name of a method in :data:`METHODS`.
        :raises TypeError: for anything else.
        :raises ValueError: for a name that is not a method's.
        """
        if isinstance(solver, cls):
            return solver
        if isinstance(solver, str):
            return cls(solver)
        raise TypeError(
            "solver must be a Solver or a method's name, for example Solver('dopri5', rtol=1e-6) or 'dopri5', but got "
            f"{solver!r}"
        )

    @property
    def adaptive(self) -> bool:
        """True if the method chooses its steps by itself."""
        return self.method in _ADAPTIVE or self.method in IMPLICIT_METHODS

    def integrate(self, field: Dynamics, state: AnyState, t0: float, t1: float) -> Solution:
        r"""
        Integrates from t0 to t1, which may be the earlier of the two.

        :param field: maps a scalar time and a state to the state's time derivative. For ``adjoint=True`` it has the
            attribute ``tensors``, all tensors that gradients must reach besides the state, or is a
            :class:`~torch.nn.Module`.
        :param state: a tensor with shape ``(*, d)``, or a tuple of tensors whose shapes begin with the same batch shape
            ``(*,)``, the first one having shape ``(*, d)``.
        :param float t0: the initial time.
        :param float t1: the end time.
        :returns: the state at t1 and statistics.
        :raises SolverError: on step underflow, non-finite values, a corrector that does not converge, or more than
            max_nfe evaluations.
        :raises TypeError: for a state that is complex, or whose first part is not of a floating-point type.
        :raises RuntimeError: if an adaptive solve is traced: the trace would repeat the steps of this one input.
            For compile=True without a C compiler that works.
        """
        single = isinstance(state, Tensor)

        def executor(tableau: Tableau) -> tuple[Stepper, str]:
            def function(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return parts(field(t, state[0] if single else state))

            shapes = [part.shape for part in parts(state)]
            return FunctionStepper(tableau, function, shapes), "the field is a plain function"

        return self._integrate(field, state, (), executor, t0, t1)

    def integrate_with_divergence(
        self, field: VectorField, x: Tensor, t0: float, t1: float, score: Tensor | None = None, by_hand: bool = False
    ) -> Solution:
        r"""
        Integrates a state, the divergence of its field along it, and the score of a density that the field carries.

        :param VectorField field: the field.
        :param Tensor x: the state at t0 with shape ``(*, d)``.
        :param float t0: the initial time.
        :param float t1: the end time.
        :param Tensor score: :math:`\nabla \log p` of the density of x, with shape ``(*, d)``; None to leave it out.
        :param bool by_hand: True for a solution with a function :attr:`Solution.pull` in place of a graph, if the
            executor has derivatives by hand.
        :returns: the state at t1, :math:`\int \nabla \cdot f \, dt` with shape ``(*,)``, other integrals that the field
            has and, if one was given, the score at t1 with shape ``(*, d)``, which carries no gradients; and
            statistics.
        :raises SolverError: as :meth:`integrate` does.
        """
        state = field.initial_state(x)

        def executor(tableau: Tableau) -> tuple[Stepper, str]:
            return field.stepper(tableau, state, self.compile)

        scores = () if score is None else (score,)
        dynamics = Scored(field) if scores else Augmented(field)
        return self._integrate(dynamics, state, scores, executor, t0, t1, by_hand)

    def _integrate(
        self,
        field: Dynamics,
        state: State,
        scores: tuple[Tensor, ...],
        executor: Executor,
        t0: float,
        t1: float,
        by_hand: bool = False,
    ) -> Solution:
        first = parts(state)[0]
        stats = SolverStats(method=self.method)
        times = torch.tensor([t0, t1], dtype=first.dtype, device="cpu")
        whole = (*state, *scores) if scores else state
        _check_types(parts(whole))
        if first.numel() == 0 or bool(times[0] == times[1]):
            return Solution(whole, stats)
        if torch.jit.is_tracing() and self.adaptive:
            raise RuntimeError(
                f"method {self.method!r} cannot be traced: its steps depend on the input, and a trace would repeat "
                "those of the example. Use a method of fixed step, for example Solver('rk4')."
            )
        tensors = self._check_gradients(field, state)
        stats.reason = self._why_not_explicit()
        self._check_functional((*parts(state), *tensors), bool(stats.reason))
        pull = None
        if stats.reason:
            end = self._elsewhere(field, whole, stats, times, tensors)
        else:
            choice = executor(explicit.TABLEAUS[self.method])
            end, pull = self._by_steps(field, state, scores, choice, stats, times, by_hand)
        self._warn_if_not_compiled(stats)
        return Solution(end, stats, pull)

    def _why_not_explicit(self) -> str:
        """The reason against explicit steps of our own; empty if there is none."""
        if self.method not in explicit.TABLEAUS:
            return f"the method {self.method!r} has no tableau here"
        if self.adjoint:
            return "adjoint=True has no steps here"
        if torch.jit.is_tracing():
            return "the solve is traced"
        if others := set(self.options) - ({"first_step"} if self.adaptive else {"step_size"}):
            return f"the options {sorted(others)} are torchdiffeq's"
        return ""

    def _by_steps(
        self,
        field: Dynamics,
        state: State,
        scores: tuple[Tensor, ...],
        choice: tuple[Stepper, str],
        stats: SolverStats,
        times: Tensor,
        by_hand: bool,
    ) -> tuple[State, Pull | None]:
        """The state at the end by explicit steps, and, if wanted, the function that pulls gradients back from there."""
        stepper, stats.reason = choice
        stats.backend = stepper.name
        t0, t1 = times.tolist()
        if self.adaptive:
            loop = explicit.adaptive(t0, t1, (self.rtol, self.atol), self.max_nfe, self.options.get("first_step"))
        else:
            loop = explicit.fixed(_equal_steps(times, self.options.get("step_size")).tolist(), self.max_nfe)
        try:
            if by_hand and isinstance(stepper, DifferentiatedStepper):
                end, path, pull = stepper.solve_by_hand(loop, parts(state), *scores)
            else:
                (end, path), pull = stepper.solve(loop, parts(state), *scores), None
        except explicit.Failure as failure:
            stats.nfe = failure.nfe
            monitor = Monitor(field, self, stats, parts(state)[0].shape[:-1], (t0, t1))
            last = times.new_tensor(failure.time), stepper.unpack(failure.packed.detach())
            raise monitor.failure(failure.word, last) from None
        stats.nfe, stats.accepted, stats.rejected = path.nfe, len(path.times) - 1, path.rejected
        return end[0] if isinstance(state, Tensor) else end, pull

    def _elsewhere(
        self, field: Dynamics, state: State, stats: SolverStats, times: Tensor, tensors: tuple[Tensor, ...]
    ) -> State:
        """The state at the end by torchdiffeq or an implicit method."""
        own = self.method in IMPLICIT_METHODS
        stats.backend = "implicit" if own else "scipy" if self.method == "scipy_solver" else "torchdiffeq"
        watch = Monitor if own or self.method == "scipy_solver" else StepMonitor
        first = parts(state)[0]
        t0, t1 = times.tolist()
        monitor = watch(field, self, stats, first.shape[:-1], (t0, t1))
        times = times.to(first.device)
        try:
            if own:
                end: State = implicit.integrate(monitor, state, t0, t1, tensors)
            else:
                end = self._odeint(monitor, state, times, tensors)
        except Exception as error:
            # torchdiffeq asserts and warns; a failed solve of scipy is too short, which torchdiffeq does not expect.
            known = isinstance(error, (AssertionError, UserWarning)) or self.method == "scipy_solver"
            message = f"{error} (scipy)" if self.method == "scipy_solver" else str(error)
            failure = monitor.explain(message) if known and not monitor.field_failed else None
            if failure is None or isinstance(error, SolverError):
                raise
            raise failure from error
        if not are_finite(end):
            raise monitor.first_non_finite(lambda probe: self._odeint(probe, state, times, None))
        monitor.forget()
        if self.adjoint:
            for part in parts(end):
                if part.requires_grad:
                    part.register_hook(_before_backward(monitor))
        return end

    def _warn_if_not_compiled(self, stats: SolverStats) -> None:
        """Says once per solver and reason that compile=True has no effect."""
        said: set[str] = vars(self).setdefault("_said", set())
        if not self.compile or stats.backend == "native" or stats.reason in said:
            return
        said.add(stats.reason)
        warnings.warn(
            f"compile=True has no effect on this solve: {stats.reason}. There is compiled code for the methods "
            f"{', '.join(explicit.TABLEAUS)} without adjoint=True, options of torchdiffeq and autocast; on a CPU, "
            "in float32 and float64; and for conditioners of this package and a closed-form transformer, both with the "
            "activation 'silu' or 'tanh'",
            UserWarning,
            stacklevel=4,
        )

    def _check_functional(self, tensors: tuple[Tensor, ...], elsewhere: bool) -> None:
        """Refuses solves that do not work under a transform of torch.func."""
        if not is_functional():
            return
        batched = any(map(is_batched, tensors))
        if (batched and self.adaptive) or (elsewhere and (batched or self.adaptive or self.adjoint)):
            raise RuntimeError(
                f"{self!r} cannot solve these dynamics under a transform of torch.func or in forward mode"
                + (": under vmap each sample would need steps of its own" if batched else "")
                + ". A flow is batched already: call it on the whole batch, use a fixed step (Solver('rk4')), or "
                "take derivatives by torch.autograd.functional.jacobian"
            )

    def _odeint(self, func: Dynamics, state: State, times: Tensor, tensors: tuple[Tensor, ...] | None) -> State:
        """The state at the end; with the adjoint method if tensors are given and it is wanted."""
        options = self._options(parts(state)[0].dim() - 1, times)
        settings = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": options}
        with _warnings_of(self.method):
            if self.adjoint and tensors is not None:
                result = torchdiffeq.odeint_adjoint(
                    func, state, times, **settings, **self._adjoint_settings(options), adjoint_params=tensors
                )
            else:
                result = torchdiffeq.odeint(func, state, times, **settings)
        if len(parts(result)[0]) != len(times):
            raise AssertionError("too few times")
        return result[-1] if isinstance(result, Tensor) else tuple(part[-1] for part in result)

    def _adjoint_settings(self, options: dict[str, Any]) -> dict[str, Any]:
        if self.method == "implicit_adams":
            # In a backward solve a corrector that does not converge would only warn. rk4 needs none, and is stable
            # wherever the functional iteration of the corrector converges.
            names = METHODS["rk4"]
            return {"adjoint_method": "rk4", "adjoint_options": {k: v for k, v in options.items() if k in names}}
        adjoint_options = {name: value for name, value in options.items() if name != "norm"}
        if self.adaptive:
            adjoint_options["norm"] = "seminorm"
        return {"adjoint_options": adjoint_options}

    def _options(self, batch_dims: int, times: Tensor) -> dict[str, Any]:
        options = dict(self.options)
        if self.adaptive:
            options.setdefault("norm", _per_sample_norm(batch_dims))
            # Without it torchdiffeq steps past the end and interpolates back, with an error that no tolerance controls.
            ends = [times] if "step_t" not in options else [times, torch.as_tensor(options["step_t"]).to(times)]
            options["step_t"] = torch.cat(ends).unique()
        elif self.method != "scipy_solver" and "grid_constructor" not in options:
            step_size = options.pop("step_size", None)
            options["grid_constructor"] = lambda func, y0, t: _equal_steps(t, step_size)
        if self.method in _ADAMS:
            options.setdefault("max_order", 4)  # torchdiffeq's 12 is unstable: smaller steps make it worse
        return options

    def _check_gradients(self, field: Dynamics, state: State) -> tuple[Tensor, ...]:
        tensors = getattr(field, "tensors", None)
        if tensors is None and isinstance(field, nn.Module):
            tensors = tuple(field.parameters())
        if tensors is None and self.adjoint:
            raise TypeError(
                "field needs an attribute tensors (all that gradients must reach; () for none) for adjoint=True"
            )
        tensors = tuple([tensor for tensor in tensors or () if tensor.requires_grad])
        if self.method == "scipy_solver" and not self.adjoint and torch.is_grad_enabled():
            if tensors or any(part.requires_grad for part in parts(state)):
                raise ValueError(
                    "method 'scipy_solver' has no gradients of its own: use adjoint=True or torch.no_grad()"
                )
        return tensors


def _check_types(state: tuple[Tensor, ...]) -> None:
    for part in state:
        if part.is_complex():
            raise TypeError(
                f"state must be real, but got {part.dtype}; integrate its real and imaginary parts side by side, "
                "torch.view_as_real(state).flatten(-2)"
            )
    if not state[0].is_floating_point():
        raise TypeError(f"state must be of a floating-point type, but got {state[0].dtype}; convert it with .float()")


@contextmanager
def _warnings_of(method: str) -> Iterator[None]:
    """Makes an error of the corrector's warning, and nothing of scipy's. Only where needed: filters are global."""
    if method not in ("implicit_adams", "scipy_solver"):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Functional iteration did not converge")
        warnings.filterwarnings("ignore", message=".*arguments have no effect", category=UserWarning)
        yield


def _before_backward(monitor: Monitor) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of a solve with adjoint=True cannot be differentiated again (create_graph=True); "
                "use a Solver with adjoint=False and a method that is not implicit"
            )
        monitor.forget()

    return hook


def _per_sample_norm(batch_dims: int) -> Callable[[State], Tensor]:
    # Without gradients: torchdiffeq differentiates through the choice of the first step, and the slope of a square root
    # is infinite at a sample that is 0.
    @torch.no_grad()
    def norm(state: State) -> Tensor:
        return largest_rms([part.reshape(*part.shape[:batch_dims], -1) for part in parts(state)], -1)

    return norm


def _equal_steps(t: Tensor, step_size: float | None) -> Tensor:
    length = float((t[-1] - t[0]).abs())
    steps = 10 if step_size is None else max(1, math.ceil(length / step_size * (1 - 1e-6)))
    grid = t[0] + (t[-1] - t[0]) * torch.linspace(0, 1, steps + 1, dtype=t.dtype, device=t.device)
    return torch.cat([grid[:-1], t[-1:]])
