# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Steps of explicit Runge-Kutta methods, and their derivatives.

A :class:`Stepper` knows a field and a method. It takes a step, pulls gradients back through it, and carries a score
along it. There are three executors with this interface: :class:`AutogradStepper` for any function, whose operations
automatic differentiation records; and two whose derivatives are written by hand, in torch and in C, for the fields of
hollow networks. Their solve is one node of the graph: small networks are bound by the number of operations, of which
the backward pass by hand takes a fraction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "AutogradStepper",
    "DifferentiatedStepper",
    "FunctionStepper",
    "Path",
    "Pull",
    "Step",
    "Stepper",
    "Tableau",
    "Unsupported",
    "combine",
    "error_ratio",
    "is_batched",
    "is_functional",
    "largest_rms",
    "score_slope",
    "weights",
]

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Tableau:
    """
    The coefficients of an explicit Runge-Kutta method.

    :ivar a: for each stage the weights of the slopes of the stages before it.
    :ivar b: the weights of the slopes in the step.
    :ivar c: for each stage its time within the step.
    :ivar error: the weights of the slopes, and of the slope at the end of the step, in the estimate of the step's
        error; empty for a method of fixed step.
    :ivar order: the order of the method.
    :raises ValueError: for coefficients of an inconsistent method.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...] = ()
    order: int = 0

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.a]
        if rows != list(range(len(self.b))) or len(self.c) != len(self.b):
            raise ValueError(f"stage i of a tableau must have i weights, but got {rows} for {len(self.b)} stages")
        if (
            any(abs(sum(row) - c) > 1e-12 for row, c in zip(self.a, self.c, strict=True))
            or abs(sum(self.b) - 1) > 1e-12
        ):
            raise ValueError("each row of a must sum to its c, and b to 1")
        if self.error and (len(self.error) != len(self.b) + 1 or abs(sum(self.error)) > 1e-12):
            raise ValueError("error must have one weight more than b, and they must sum to 0")


class Unsupported(Exception):
    """An executor that does not take a field; the message says why."""


#: Relative and absolute.
Tolerances = tuple[float, float]
#: A derivative in time, and what an executor keeps of its evaluation.
Slope = tuple[Tensor, Parts]


class Step(NamedTuple):
    """
    A step.

    :ivar end: the packed state at its end.
    :ivar saved: tensors for the derivatives of the step.
    :ivar first: the slope at its beginning.
    :ivar last: the slope at its end, where the error is estimated.
    :ivar ratio: the error over the tolerance: the largest root mean square of a part of the state in any sample.
    """

    end: Tensor
    saved: Parts
    first: Slope
    last: Slope | None
    ratio: float


@dataclass
class Path:
    """
    A solve.

    :ivar end: the packed state at the end.
    :ivar times: where the accepted steps begin, and the end.
    :ivar saved: tensors for the derivatives of the accepted steps, where they are wanted.
    :ivar nfe: evaluations.
    :ivar rejected: rejected steps.
    """

    end: Tensor
    times: list[float]
    saved: list[Parts] = field(default_factory=list)
    nfe: int = 0
    rejected: int = 0


#: Chooses steps from a packed state on; keeps tensors for their derivatives if told to.
Loop = Callable[["Stepper", Tensor, bool], Path]
#: Maps the gradients of the parts at the end of a solve to those of the parts at its beginning, and of the tensors.
Pull = Callable[[Parts], tuple[Parts, Parts]]


class Stepper(ABC):
    r"""
    Steps of a Runge-Kutta method for the parts of a state, :math:`(x, q, \dots)`. Inside a solve they are packed in one
    tensor, whose layout suits the executor.

    :param Tableau tableau: the method.
    """

    #: The name of the executor.
    name: str
    #: The ratio up to which a step over the whole interval passes: an estimate of its error can be small by chance.
    trust = 0.1

    def __init__(self, tableau: Tableau) -> None:
        self.tableau = tableau

    @abstractmethod
    def pack(self, state: Parts) -> Tensor:
        """The parts in one tensor."""

    @abstractmethod
    def unpack(self, y: Tensor) -> Parts:
        """The inverse of :meth:`pack`."""

    @abstractmethod
    def step(
        self, t: float, h: float, y: Tensor, first: Slope | None, tolerances: Tolerances | None, keep: bool = True
    ) -> Step:
        """
        Takes a step.

        :param float t: the time at its beginning.
        :param float h: its length.
        :param Tensor y: the packed state at its beginning.
        :param first: the slope there, if known.
        :param tolerances: relative and absolute, for an estimate of the error.
        :param bool keep: whether derivatives of the step will be asked for.
        """

    @abstractmethod
    def step_score(self, t: float, h: float, saved: Parts, score: Tensor) -> Tensor:
        r"""
        Carries the score s of a density through a step of :math:`(x, \int \nabla \cdot f)`. It obeys :math:`ds/dt =
        -(\partial f / \partial x)^T s - \nabla (\nabla \cdot f)`.

        :param float t: the time at its beginning.
        :param float h: its length.
        :param saved: the tensors that the step has saved.
        :param Tensor score: with shape ``(*, d)``.
        """

    def first_step(
        self, t: float, longest: float, y: Tensor, tolerances: Tolerances
    ) -> tuple[float, Slope | None, int]:
        """
        The length of a first step, the slope at its beginning if known, and the number of evaluations in addition to
        that of the slope. It is the whole interval, as the smooth fields of flows allow.

        :param float t: the initial time.
        :param float longest: the signed length of the interval.
        :param Tensor y: the packed initial state.
        :param tolerances: relative and absolute.
        """
        return longest, None, 0

    def solve(self, loop: Loop, state: Parts, score: Tensor | None = None) -> tuple[Parts, Path]:
        """
        Solves, with gradients.

        :param loop: the steps.
        :param state: the parts of the initial state.
        :param Tensor score: the score of a density at the initial state, to be carried along without gradients.
        :returns: the parts at the end, with the score last if one was given; and how it went.
        """
        path = loop(self, self.pack(state), score is not None)
        return self._finish(path, score), path

    def _finish(self, path: Path, score: Tensor | None) -> Parts:
        # Copies: views of one tensor must not be overwritten.
        end = tuple([part.clone(memory_format=torch.contiguous_format) for part in self.unpack(path.end)])
        return end if score is None else (*end, self._carry(path, score.detach()))

    @torch.no_grad()
    def _carry(self, path: Path, score: Tensor) -> Tensor:
        for t, end, saved in zip(path.times[:-1], path.times[1:], path.saved, strict=True):
            score = self.step_score(t, end - t, saved, score)
        return score


def combine(x: Tensor, h: float, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    """``x + h * sum(weights * slopes)`` in a new tensor, or x itself where there is nothing to add."""
    total = x
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            total = torch.add(x, slope, alpha=h * weight) if total is x else total.add_(slope, alpha=h * weight)
    return total


def error_ratio(
    error: Tensor, start: Tensor, end: Tensor, sizes: Sequence[int], dim: int, tolerances: Tolerances
) -> float:
    r"""
    The largest root mean square of :math:`e / (\text{atol} + \text{rtol} \max(|y_0|, |y_1|))` over the elements of a
    part of the state, of all parts and samples: a mean over the batch would let one hard sample drown.

    :param Tensor error: the errors e, which are overwritten.
    :param Tensor start: the state :math:`y_0` that a step begins with.
    :param Tensor end: the state :math:`y_1` at its end.
    :param sizes: the sizes of the parts.
    :param int dim: the dimension along which they lie, of two; the other one is the batch.
    :param tolerances: relative and absolute.
    """
    rtol, atol = tolerances
    error.div_(torch.maximum(start.abs(), end.abs()).mul_(rtol).add_(atol))
    return float(largest_rms(error.split_with_sizes(list(sizes), dim), dim))


@torch.enable_grad()
def score_slope(function: Callable[[Tensor, Parts], Parts], t: Tensor, state: Parts, score: Tensor) -> Tensor:
    r"""
    The time derivative of a score s, as a constant, :math:`-(\partial f / \partial x)^T s - \nabla (\nabla \cdot f)`.

    :param function: maps a scalar time and (x, the integral of the divergence) to f and the divergence.
    :param Tensor t: the time.
    :param state: the pair.
    :param Tensor score: the score at x, with its shape.
    """
    x, integral = (part.detach() for part in state)
    f, divergence = function(t, (x.requires_grad_(), integral))
    (slope,) = torch.autograd.grad((f * score).sum() + divergence.sum(), x)
    return slope.neg_()


def largest_rms(parts: Sequence[Tensor], dim: int) -> Tensor:
    """
    The largest root mean square of a part in any sample.

    :param parts: tensors whose dimension ``dim`` holds the elements of a sample; those without elements do not count.
    :param int dim: the dimension.
    """
    return torch.stack([part.square().mean(dim).max() for part in parts if part.numel()]).max().sqrt()


class AutogradStepper(Stepper):
    """
    Steps of any function, by operations that automatic differentiation records and every transform of torch.func knows.

    :param Tableau tableau: the method.
    :param function: maps a scalar time and the parts of the state to their time derivatives.
    :param shapes: the shapes of the parts, which begin with the batch shape ``(*,)``, that of the first one being
        ``(*, d)``.
    """

    name = "autograd"

    def __init__(
        self, tableau: Tableau, function: Callable[[Tensor, Parts], Parts], shapes: Sequence[torch.Size]
    ) -> None:
        super().__init__(tableau)
        self._function = function
        self._shapes = shapes
        batch_shape = shapes[0][:-1]
        self._batch = batch_shape.numel()
        self._sizes = [shape[len(batch_shape) :].numel() for shape in shapes]

    def pack(self, state: Parts) -> Tensor:
        """``(batch, n)``, the parts side by side."""
        return torch.cat([part.reshape(self._batch, size) for part, size in zip(state, self._sizes, strict=True)], 1)

    def unpack(self, y: Tensor) -> Parts:
        """See :meth:`Stepper.unpack`."""
        parts = zip(y.split_with_sizes(self._sizes, 1), self._shapes, strict=True)
        return tuple([part.reshape(shape) for part, shape in parts])

    def evaluate(self, t: float, y: Tensor) -> Tensor:
        """The packed time derivative."""
        slope = self._function(torch.tensor(t, dtype=y.dtype, device=y.device), self.unpack(y))
        if len(slope) != len(self._shapes):
            raise ValueError(f"field must return the {len(self._shapes)} parts of the state, but returned {len(slope)}")
        return self.pack(tuple([_expanded(part, shape) for part, shape in zip(slope, self._shapes, strict=True)]))

    def step(
        self, t: float, h: float, y: Tensor, first: Slope | None, tolerances: Tolerances | None, keep: bool = True
    ) -> Step:
        """See :meth:`Stepper.step`."""
        tableau = self.tableau
        states, slopes = [y], [self.evaluate(t, y) if first is None else first[0]]
        for row, c in zip(tableau.a[1:], tableau.c[1:], strict=True):
            states.append(combine(y, h, row, slopes))
            slopes.append(self.evaluate(t + c * h, states[-1]))
        end = combine(y, h, tableau.b, slopes)
        if tolerances is None:
            return Step(end, tuple(states), (slopes[0], ()), None, 0.0)
        last = self.evaluate(t + h, end)
        with torch.no_grad():
            error = combine(last * (h * tableau.error[-1]), h, tableau.error[:-1], slopes)
            ratio = error_ratio(error, y, end, self._sizes, 1, tolerances)
        return Step(end, tuple(states), (slopes[0], ()), (last, ()), ratio)

    @torch.no_grad()
    def step_score(self, t: float, h: float, saved: Parts, score: Tensor) -> Tensor:
        """See :meth:`Stepper.step_score`."""
        slopes: list[Tensor] = []
        for row, c, y in zip(self.tableau.a, self.tableau.c, saved, strict=True):
            time = torch.tensor(t + c * h, dtype=y.dtype, device=y.device)
            slopes.append(score_slope(self._function, time, self.unpack(y), combine(score, h, row, slopes)))
        return combine(score, h, self.tableau.b, slopes)


def _expanded(slope: Tensor, shape: torch.Size) -> Tensor:
    if slope.shape == shape:
        return slope
    try:
        return slope.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"field must return the shape of the state, {tuple(shape)}, but returned {tuple(slope.shape)}"
        ) from None


class FunctionStepper(AutogradStepper):
    """Steps of a function of which nothing is known; see :class:`AutogradStepper` for its parameters."""

    @torch.no_grad()
    def first_step(
        self, t: float, longest: float, y: Tensor, tolerances: Tolerances
    ) -> tuple[float, Slope | None, int]:
        r"""
        The length of a cautious first step: an Euler step of length :math:`h_0` with :math:`\|h_0 f\| = \|y\| / 100`
        estimates the second derivative (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I,
        section II.4). See :meth:`Stepper.first_step` for the parameters.
        """

        def size(value: Tensor) -> float:
            return error_ratio(value.clone(), y, y, self._sizes, 1, tolerances)

        with torch.enable_grad():
            slope = self.evaluate(t, y)
        state, rate = size(y), size(slope)
        if not math.isfinite(rate):
            return longest, (slope, ()), 0
        h = math.copysign(min(0.01 * state / rate if min(state, rate) > 1e-5 else 1e-6, abs(longest)), longest)
        bend = size(self.evaluate(t + h, torch.add(y, slope, alpha=h)) - slope) / abs(h)
        steepest = max(rate, bend)
        guess = (0.01 / steepest) ** (1 / self.tableau.order) if steepest > 1e-15 else max(1e-6, 1e-3 * abs(h))
        return math.copysign(min(100 * abs(h), guess, abs(longest)), longest), (slope, ()), 1


class DifferentiatedStepper(Stepper):
    """
    Steps whose vector-Jacobian product is written by hand; the state is (x, the integral of the divergence).

    :param Tableau tableau: the method.
    :param tensors: the tensors besides the state that gradients must reach.
    """

    def __init__(self, tableau: Tableau, tensors: Parts) -> None:
        super().__init__(tableau)
        self.tensors = tensors

    @abstractmethod
    def new_sums(self) -> Any:
        """Zeros, to which :meth:`step_vjp` adds the gradients of the tensors."""

    @abstractmethod
    def step_vjp(self, t: float, h: float, saved: Parts, y_bar: Tensor, sums: Any) -> Tensor:
        """
        The vector-Jacobian product of a step.

        :param float t: the time at its beginning.
        :param float h: its length.
        :param saved: the tensors that the step has saved.
        :param Tensor y_bar: the gradient of the packed state at its end.
        :param sums: zeros or the sums of other steps, to which the gradients of the tensors are added.
        :returns: the gradient of the packed state at its beginning.
        """

    @abstractmethod
    def gradients(self, sums: Any) -> Parts:
        """The gradients of the tensors."""

    @abstractmethod
    def recorded(self) -> AutogradStepper:
        """The same steps by automatic differentiation, for second derivatives."""

    @torch.no_grad()
    def solve_by_hand(self, loop: Loop, state: Parts, score: Tensor | None = None) -> tuple[Parts, Path, Pull]:
        """Solves without a graph, and returns a function that pulls gradients back, too; see :meth:`Stepper.solve`."""
        path = loop(self, self.pack(state), True)
        return self._finish(path, score), path, partial(self.pull, path.times, path.saved)

    @torch.no_grad()
    def pull(self, times: Sequence[float], saved: Sequence[Parts], bars: Parts) -> tuple[Parts, Parts]:
        """
        Pulls gradients back through all steps of a solve.

        :param times: where the steps begin, and the end.
        :param saved: the tensors that each step has saved.
        :param bars: the gradients of the parts at the end.
        :returns: the gradients of the parts at the beginning, and of the tensors.
        """
        sums, y_bar = self.new_sums(), self.pack(bars)
        for t, end, kept in zip(times[-2::-1], times[:0:-1], reversed(saved), strict=True):
            y_bar = self.step_vjp(t, end - t, kept, y_bar, sums)
        return self.unpack(y_bar), self.gradients(sums)

    def solve(self, loop: Loop, state: Parts, score: Tensor | None = None) -> tuple[Parts, Path]:
        """See :meth:`Stepper.solve`."""
        if not (torch.is_grad_enabled() and any([v.requires_grad for v in (*state, *self.tensors)])):
            return super().solve(loop, state, score)
        paths: list[Path] = []
        return _Solve.apply(self, loop, paths, score, *state, *self.tensors), paths[0]


class _Solve(torch.autograd.Function):
    """A solve as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        stepper: DifferentiatedStepper,
        loop: Loop,
        paths: list[Path],
        score: Tensor | None,
        x: Tensor,
        integral: Tensor,
        *tensors: Tensor,
    ) -> Parts:
        path = loop(stepper, stepper.pack((x, integral)), True)
        result = stepper._finish(path, score)
        ctx.mark_non_differentiable(*result[2:])
        ctx.stepper, ctx.times = stepper, path.times
        ctx.sizes = [len(saved) for saved in path.saved]
        ctx.save_for_backward(x, integral, *tensors, *chain.from_iterable(path.saved))
        path.saved = []
        paths.append(path)
        return result

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor, integral_bar: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        x, integral, *rest = ctx.saved_tensors
        stepper: DifferentiatedStepper = ctx.stepper
        tensors, rest = rest[: len(stepper.tensors)], rest[len(stepper.tensors) :]
        nothing = (None,) * 4
        legacy = torch._C._functorch.is_legacy_batchedtensor
        if torch.is_grad_enabled() or is_functional() or legacy(x_bar) or legacy(integral_bar):
            return *nothing, *_recorded(stepper, ctx.times, (x, integral, *tensors), (x_bar, integral_bar))
        kept = iter(rest)
        saved = [tuple(islice(kept, size)) for size in ctx.sizes]
        bars, gradients = stepper.pull(ctx.times, saved, (x_bar, integral_bar))
        return *nothing, *bars, *gradients


def _recorded(
    stepper: DifferentiatedStepper, times: list[float], inputs: Sequence[Tensor], bars: Parts
) -> list[Tensor | None]:
    """Gradients of the same steps, to be differentiated again."""
    wanted = [v for v in inputs if v.requires_grad]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        recorded = stepper.recorded()
        y = recorded.pack(tuple(inputs[:2]))
        for t, end in zip(times[:-1], times[1:], strict=True):
            y = recorded.step(t, end - t, y, None, None).end
        gradients = torch.autograd.grad(
            recorded.unpack(y),
            wanted,
            bars,
            retain_graph=True,  # of what was bound before the solve
            create_graph=create_graph,
            materialize_grads=True,
        )
    known = iter(gradients)
    return [next(known) if v.requires_grad else None for v in inputs]


@lru_cache(maxsize=64)
def weights(tableau: Tableau, dtype: torch.dtype, device: torch.device) -> tuple[Parts, Parts]:
    """
    The coefficients of a method as tensors: the rows of a, then b and error, each with a weight for the slope of each
    stage and for that at the end of the step; and the columns of a.
    """
    stages = len(tableau.b)
    padded = [[*row, *[0.0] * (stages + 1 - len(row))] for row in (*tableau.a, tableau.b, tableau.error)]
    matrix = torch.tensor(padded, dtype=dtype, device=device)
    return matrix.unbind(), matrix[:stages, :stages].mT.contiguous().unbind()


def is_functional() -> bool:
    """True if a transform of torch.func or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """True if vmap has hidden a dimension of a tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False
