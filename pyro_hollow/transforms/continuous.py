# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The base of all continuous normalizing flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from pyro_hollow.ode import Solver, SolverStats
from pyro_hollow.ode.monitor import ADVICE, blame_parameters
from pyro_hollow.ops.arguments import closest_keywords
from pyro_hollow.ops.memory import allocated_bytes, part_size
from pyro_hollow.ops.stepper import is_batched, is_functional
from pyro_hollow.ops.vector_field import VectorField

from .cache import CachedTransform, breaks_graph, module_tensors

__all__ = ["ConditionalCNF", "ConditionedCNF"]

# Elements of the state from which on it is found out what memory a sample takes.
_MANY_ELEMENTS = 100_000


class _Record:
    """Holds the statistics of the latest solve, shared by a conditional flow and what it makes of contexts."""

    last: SolverStats | None = None


class _HasSolver:
    """An attribute that is assigned a solver or a method's name, and holds a solver."""

    @property
    def solver(self) -> Solver:
        """Solver of the flow; may be assigned a :class:`~pyro_hollow.ode.Solver` or a method's name."""
        if "solver" not in vars(self):
            raise AttributeError("a flow has a solver once it is made")
        return vars(self)["solver"]

    @solver.setter
    def solver(self, solver: Solver | str) -> None:
        vars(self)["solver"] = Solver.of(solver)


class ConditionedCNF(_HasSolver, CachedTransform):
    r"""
    A continuous normalizing flow with its context, if any, fixed,

        :math:`\mathbf{y} = \mathbf{x}(T), \qquad \frac{d\mathbf{x}}{dt} = f(t, \mathbf{x}), \qquad \mathbf{x}(0) =
        \mathbf{x}, \qquad \log\left|\det\frac{\partial\mathbf{y}}{\partial\mathbf{x}}\right| = \int_0^T \nabla \cdot
        f(t, \mathbf{x}(t)) \, dt.`

    One solve gives both value and log-determinant; everything public is a view of it. A subclass says, in
    :meth:`_bind`, what the vector field is.

    Without gradients, large batches are solved in parts that take at most 1 GB
    (:data:`~pyro_hollow.ops.memory.MAX_BYTES`), each with steps of its own, unless the context has a batch.

    With ``cache_size=1`` the latest pair is kept together with its log-determinant, so that sampling and scoring the
    sample costs one solve. The pair is dropped as soon as it would be wrong or useless: when a parameter, the context,
    the solver or one of the pair itself has changed, when gradients are switched on or off, when it has been scored as
    data, and after a backward pass. (What writes through ``.data`` goes unnoticed, pyro.optim.ClippedAdam and fused
    optimizers of torch among them: to score an old *sample* again after such a step without a backward pass, call
    :meth:`clear_cache` first, or use ``cache_size=0``.) As with every cached transform of torch, the score of a sample
    is not differentiable with respect to the sample itself: detach it first.

    :param ~torch.nn.Module nn: the network of the vector field, which has an attribute ``input_dim``.
    :param Tensor context: the context with shape ``(*, context_dim)``, or None.
    :param solver: how to integrate, a Solver or a method's name; None for ``Solver()``.
    :param float time: the end time T.
    :param int cache_size: 0 or 1.
    :raises ValueError: for a time that is not positive, and from every evaluation for inputs of the wrong size or type
        and for inputs that are not finite.
    """

    @closest_keywords()
    def __init__(
        self,
        nn: nn.Module,
        context: Tensor | None = None,
        *,
        solver: Solver | str | None = None,
        time: float = 1.0,
        cache_size: int = 1,
    ) -> None:
        super().__init__(cache_size=cache_size)
        _check_time(time)
        self.nn = nn
        self.context = context
        self.solver = Solver() if solver is None else solver
        self.time = float(time)
        self._record = _Record()

    def _bind(self) -> VectorField:
        """Makes the vector field for one solve."""
        raise NotImplementedError

    def _bind_with_integrals(self, x: Tensor) -> VectorField:
        """The same with all that is integrated along; for an input with shape ``(*, d)``."""
        return self._bind()

    @property
    def last_solve(self) -> SolverStats | None:
        """Statistics of the latest solve; None before the first."""
        return self._record.last

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """
        The vector field, without solving anything.

        :param Tensor t: time between 0 and T, a scalar, or one per sample with shape ``(*,)``.
        :param Tensor x: the state with shape ``(*, d)``.
        :returns: :math:`f(t, x)` with shape ``(*, d)``.
        """
        self._check(x)
        return self._bind()(t, x)

    @breaks_graph
    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""
        Value, log-determinant and score by one solve. The score :math:`s = \nabla \log p` of the density that the
        flow carries obeys :math:`ds/dt = -(\partial f / \partial x)^T s - \nabla (\nabla \cdot f)` (Vaitl et al.,
        2022); it is what a gradient estimator of low variance needs.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor score: the gradient of the log-density of x, with shape ``(*, d)``.
        :returns: y, the log-determinant with shape ``(*,)``, and the gradient of the log-density of y at y, which has
            no gradient itself.
        :raises ValueError: for a score of another shape or type than x.

        References:

        [1] Lorenz Vaitl, Kim Andrea Nicoli, Shinichi Nakajima, Pan Kessel.
        Path-Gradient Estimators for Continuous Normalizing Flows. [arXiv:2206.09016]
        """
        if score.shape != x.shape or score.dtype != x.dtype:
            raise ValueError(
                f"score must have the shape and type of x, {tuple(x.shape)} and {x.dtype}, "
                f"but got {tuple(score.shape)} and {score.dtype}"
            )
        y, ladj, score = self._integrate(x, 0.0, self.time, score.detach())
        self._store(x, y, (ladj,))
        return y, ladj, score.detach()

    @breaks_graph
    def call_and_pull(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """
        Value, log-determinant and score as by :meth:`call_and_score`, without a graph, for a loss that depends on the
        value alone.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor score: the gradient of the log-density of x, with shape ``(*, d)``.
        :returns: y, the log-determinant, the score at y, and a function that maps the gradient of a loss with respect
            to y to that with respect to x, and adds those of the parameters to their ``grad``.
        :raises RuntimeError: in inference mode, which would lose the gradients.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError("call_and_pull adds gradients, which inference mode has none of: leave it first")
        self._check(x)
        with torch.enable_grad():
            x, field = x.detach().requires_grad_(), self._bind()
            field.network = self.nn
            solution = self.solver.integrate_with_divergence(field, x, 0.0, self.time, score, by_hand=True)
        self._record.last = solution.stats
        y, ladj, score = solution.state

        def pull(y_bar: Tensor) -> Tensor:
            if solution.pull is None:
                y.backward(y_bar)
                return x.new_zeros(x.shape) if x.grad is None else x.grad
            (x_bar, _), gradients = solution.pull((y_bar, torch.zeros_like(ladj)))
            if field.tensors:
                torch.autograd.backward(field.tensors, gradients)
            return x_bar

        return y.detach(), ladj.detach(), score.detach(), pull

    def _transform(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._integrate(x, 0.0, self.time)

    def _invert(self, y: Tensor) -> tuple[Tensor, ...]:
        x, *integrals = self._integrate(y, self.time, 0.0)
        return x, *map(torch.neg, integrals)

    def _integrate(self, state: Tensor, t0: float, t1: float, score: Tensor | None = None) -> tuple[Tensor, ...]:
        """
        The state at t1, and the integrals of the divergence and of what else there is from t0 to t1; or, instead of
        what else there is, the score at t1 if one is given.
        """
        self._check(state)
        if torch.is_inference_mode_enabled():
            # There no derivative can be taken, not even the one that a divergence by automatic differentiation needs.
            with torch.inference_mode(False), torch.no_grad():
                return self._integrate(state.clone(), t0, t1, None if score is None else score.clone())
        batch, given = state.shape[:-1], [state] if score is None else [state, score]
        size = self._part_size(state, t0)
        if size >= batch.numel():
            return self._solve(t0, t1, *given)
        parts = zip(*(tensor.flatten(0, -2).split(size) for tensor in given), strict=True)
        results = zip(*(self._solve(t0, t1, *part) for part in parts), strict=True)
        return tuple([torch.cat(each).unflatten(0, batch) for each in results])

    def _part_size(self, state: Tensor, t0: float) -> int:
        """The number of samples that are solved at a time."""
        d, count = state.shape[-1], state.shape[:-1].numel()
        whole = torch.is_grad_enabled() or is_functional() or torch.jit.is_tracing()
        if whole or d * count < _MANY_ELEMENTS or (self.context is not None and self.context.dim() > 1):
            return count
        field, few = self._bind(), state.flatten(0, -2)[:2]
        # What an evaluation leaves is freed in the next one. A step of the default method has 8 states and slopes.
        evaluation = allocated_bytes(lambda: field.with_divergence(state.new_tensor(t0), few))
        return part_size(2 * evaluation / len(few) + 16 * few[0].nbytes)

    def _solve(self, t0: float, t1: float, state: Tensor, score: Tensor | None = None) -> tuple[Tensor, ...]:
        """The same for a batch that memory suffices for."""
        field = self._bind_with_integrals(state) if score is None else self._bind()
        field.network = self.nn
        solution = self.solver.integrate_with_divergence(field, state, t0, t1, score)
        self._record.last = solution.stats
        return solution.state

    def _check(self, x: Tensor) -> None:
        d = self.nn.input_dim
        parameter = next(self.nn.parameters(), None)
        if x.dim() == 0 or x.shape[-1] != d:
            raise ValueError(f"input must have shape (*, {d}), but got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"input must be of a floating-point type, but got {x.dtype}; convert it with .float()")
        if parameter is not None and (x.dtype, x.device) != (parameter.dtype, parameter.device):
            raise ValueError(
                f"input is {x.dtype} on {x.device}, but the network is {parameter.dtype} on {parameter.device}; "
                "convert one of them with .to()"
            )
        if self.context is not None:
            if parameter is not None and (self.context.dtype, self.context.device) != (x.dtype, x.device):
                raise ValueError(
                    f"context is {self.context.dtype} on {self.context.device}, but the network is {parameter.dtype} "
                    f"on {parameter.device}; convert it with .to()"
                )
            batch, own = self.context.shape[:-1], x.shape[:-1]
            if len(batch) > len(own) or any(a not in (1, b) for a, b in zip(batch[::-1], own[::-1], strict=False)):
                raise ValueError(
                    f"context has batch shape {tuple(batch)}, which does not broadcast to the input's {tuple(own)}; "
                    "expand the base distribution, or the data that is scored, to the batch shape of the context"
                )
            _check_finite("context", self.context, self.nn)
        _check_finite("input", x, self.nn)

    def _tensors(self) -> list[Tensor]:
        tensors = module_tensors(self.nn)
        return tensors if self.context is None else [*tensors, self.context]

    def _settings(self) -> tuple[Any, ...]:
        return self.solver, self.time


def _check_finite(name: str, value: Tensor, network: nn.Module) -> None:
    if is_batched(value):
        return  # vmap allows no decision by values
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        sample = tuple((~finite).any(-1).nonzero()[0].tolist())
        blame = blame_parameters(network)
        first, last = (f"{blame}; and ", f". {ADVICE}") if blame else ("", "")
        raise ValueError(f"{first}{name} must be finite, but sample {sample} is not{last}")


def _check_time(time: float) -> None:
    if not (time > 0 and math.isfinite(time)):
        raise ValueError(f"time must be positive and finite, but got {time}")


class ConditionalCNF(_HasSolver, ConditionalTransformModule):
    """
    A continuous normalizing flow that waits for its context. A subclass says, in :meth:`_condition`, what transform a
    context makes.

    :param ~torch.nn.Module nn: the network of the vector field, with attributes ``input_dim`` and ``context_dim``.
    :param solver: how to integrate, a Solver or a method's name; None for ``Solver()``.
    :param float time: the end time T.
    :param int cache_size: the cache size of the conditioned transforms.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    @closest_keywords()
    def __init__(
        self, nn: nn.Module, *, solver: Solver | str | None = None, time: float = 1.0, cache_size: int = 1
    ) -> None:
        super().__init__()
        _check_time(time)
        if cache_size not in (0, 1):
            raise ValueError(f"cache_size must be 0 or 1, but got {cache_size}")
        self.nn = nn
        self.solver = Solver() if solver is None else solver
        self.time = time
        self.cache_size = cache_size
        self._record = _Record()

    @property
    def last_solve(self) -> SolverStats | None:
        """Statistics of the latest solve of any transform that came from :meth:`condition`; None before the first."""
        return self._record.last

    def condition(self, context: Tensor) -> ConditionedCNF:
        """
        Conditions on a context variable, returning a non-conditional transform.

        :param Tensor context: the context with shape ``(*, context_dim)``; its batch broadcasts against the input's.
        :raises ValueError: if the context has another size.
        """
        if context.dim() == 0 or context.shape[-1] != self.nn.context_dim:
            raise ValueError(f"context must have shape (*, {self.nn.context_dim}), but got {tuple(context.shape)}")
        transform = self._condition(context, {"solver": self.solver, "time": self.time, "cache_size": self.cache_size})
        transform._record = self._record
        return transform

    def _condition(self, context: Tensor, settings: dict[str, Any]) -> ConditionedCNF:
        """Makes the transform."""
        raise NotImplementedError
