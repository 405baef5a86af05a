# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Root finding, sample by sample and differentiable: :math:`F(x) = 0` by

- :func:`fixed_point`, :math:`x \leftarrow x - F(x)`;
- :func:`jacobi_newton`, :math:`x \leftarrow x - F(x) / D F(x)`, elementwise, with the diagonal :math:`D F` of the
  Jacobian, which a hollow function gives away;
- :func:`newton`, :math:`x \leftarrow x - (\partial F / \partial x)^{-1} F(x)`.

The first two converge linearly, at the spectral radius of :math:`I - \partial F / \partial x` and of
:math:`I - D^{-1} \partial F / \partial x`: the latter wherever the diagonal dominates, and in one step of a linear
function whose off-diagonal part is 0.

A root depends on all that F depends on. Its gradients follow from the implicit function theorem,
:math:`dx = -(\partial F / \partial x)^{-1} dF`, whatever path led to it; nothing is unrolled.

References:

[1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from .arguments import closest_keywords
from .derivatives import fill_by_differences, jacobian

__all__ = ["RootError", "RootOptions", "RootResult", "attach", "fixed_point", "jacobi_newton", "newton"]

Residual = Callable[[Tensor], Tensor]
ResidualWithDiagonal = Callable[[Tensor], tuple[Tensor, Tensor]]

#: Advice about a derivative that is not finite.
_ADVICE = "write F so that its derivative is finite, as by torch.where on the input of sqrt, not only on its output"
#: A diagonal that has fallen below this part of its first value, or has changed its sign, is not divided by.
_SAFE = 1e-2


class RootError(RuntimeError):
    """
    A root that was not found. The message says in which sample, how far it was, and what to change.

    :ivar result: what was found.
    """

    # Only the message is positional: pickle and Pyro's handlers make a copy of an error from its message alone.
    def __init__(self, message: str, *, result: RootResult | None = None) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class RootResult:
    """
    Result of an iteration.

    :ivar value: the roots with shape ``(*, d)``; of a sample that has not converged, the last finite iterate, without
        gradients.
    :ivar iterations: of each sample, with shape ``(*,)``.
    :ivar converged: True for each sample that has converged.
    :ivar rate: the ratio of the last update of each sample to the one before; 0 if there was only one,
        infinite if the sample could not be evaluated.
    """

    value: Tensor
    iterations: Tensor
    converged: Tensor
    rate: Tensor


class RootOptions(TypedDict, total=False):
    """
    Keyword arguments of the three root finders.

    :ivar float tolerance: of the error, relative to the scale; 1e-8 by default.
    :ivar Tensor scale: what errors are relative to, of a shape that broadcasts to x's; 1 by default.
    :ivar int max_iterations: the number of iterations after which a sample is given up; 100 by default.
    :ivar float max_rate: the largest rate that counts as converging; 1 by default.
    :ivar first_rate: the rate to assume when there is one update only, for each sample or for all; 0.5 by default.
    :ivar float damping: :math:`\\omega`, in (0, 1] to be safe; 1 by default.
    :ivar bool throw: raise an error if any sample has not converged; True by default.
    """

    tolerance: float
    scale: Tensor | None
    max_iterations: int
    max_rate: float
    first_rate: Tensor | float
    damping: float
    throw: bool


@dataclass(frozen=True)
class _Iteration:
    """The iteration by which a root is found, sample by sample; its settings are those of :class:`RootOptions`."""

    tolerance: float = 1e-8
    scale: Tensor | None = None
    max_iterations: int = 100
    max_rate: float = 1.0
    first_rate: Tensor | float = 0.5
    damping: float = 1.0
    throw: bool = True

    def __post_init__(self) -> None:
        for name in ("tolerance", "damping", "max_iterations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, but got {getattr(self, name)}")

    @torch.no_grad()
    def run(self, update: Callable[[Tensor], Tensor], x: Tensor) -> RootResult:
        """Adds the damped update to x until all samples have converged or are given up; without gradients."""
        x = x.detach()
        active = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        converged, slow = torch.zeros_like(active), torch.zeros_like(active)
        iterations = torch.zeros_like(active, dtype=torch.long)
        rate = x.new_zeros(active.shape)
        last: Tensor | None = None
        for _ in range(self.max_iterations):
            dx = self.damping * update(x)
            size, finest = _norm(dx, self.scale), 4 * torch.finfo(x.dtype).eps * _norm(x, self.scale)
            finite = size.isfinite()
            x = torch.where((active & finite).unsqueeze(-1), x + dx, x)
            iterations += active
            theta = (
                torch.as_tensor(self.first_rate).to(size).expand_as(size)
                if last is None
                else torch.where(last > 0, size / last, 0.0)
            )
            left = torch.where(theta < 1, theta / (1 - theta), math.inf) * size
            done = active & finite & ((left <= self.tolerance) | (size <= finest))
            too_slow = torch.zeros_like(slow) if last is None else theta >= self.max_rate
            if last is not None:
                rate = torch.where(active, theta, rate)
            rate = torch.where(active & ~finite, math.inf, rate)
            converged |= done
            active = active & finite & ~done & ~(slow & too_slow)
            slow, last = too_slow, size
            if not bool(active.any()):
                break
        return RootResult(x, iterations, converged, rate)


@closest_keywords(_Iteration)
def fixed_point(residual: Residual, x: Tensor, **options: Unpack[RootOptions]) -> RootResult:
    r"""
    Solves :math:`F(x) = 0` by :math:`x \leftarrow x - \omega F(x)`.

    A sample has converged, and stops moving, when the root mean square of its error / scale is estimated to be below
    the tolerance: with the rate :math:`\theta` at which its updates shrink, the error left is
    :math:`\theta / (1 - \theta)` of the last one. It is given up when it is not finite, or has shrunk by less than
    max_rate twice in a row.

    :param residual: maps x with shape ``(*, d)`` to F with that shape, each sample by itself.
    :param Tensor x: where to begin, with shape ``(*, d)``.
    :param options: see :class:`RootOptions`.
    :returns: the roots, with gradients to all that F depends on, and how they were found.
    :raises RootError: if a sample has not converged, unless throw is False.
    :raises ValueError: for a tolerance, damping or number of iterations that is not positive.

    Example usage:

    >>> target = torch.tensor([[0.3], [0.5]])
    >>> fixed_point(lambda x: x - target * x.cos(), torch.zeros(2, 1), tolerance=1e-6).converged.tolist()
    [True, True]
    """
    iteration = _Iteration(**options)
    result = iteration.run(lambda x: -residual(x), x)
    return _finish(lambda x: (residual(x), torch.ones_like(x)), result, iteration.throw)


@closest_keywords(_Iteration)
def jacobi_newton(residual: ResidualWithDiagonal, x: Tensor, **options: Unpack[RootOptions]) -> RootResult:
    r"""
    Solves :math:`F(x) = 0` by :math:`x \leftarrow x - \omega F(x) / D F(x)`, elementwise, or with the diagonal
    blocks of the Jacobian in the place of DF.

    Where the diagonal has changed its sign since the first iterate, has all but vanished, or is no longer finite, the
    first one is taken in its place; a sample in which it is 0 or not finite from the first is given up. So are blocks,
    for whose determinants the same holds.

    :param residual: maps x with shape ``(*, d)`` to F with that shape, and to the diagonal of its Jacobian with that
        shape or its blocks with shape ``(*, d / b, b, b)``.
    :param Tensor x: where to begin, with shape ``(*, d)``.

    Example usage:

    >>> a = torch.tensor([2.0, 3.0])
    >>> jacobi_newton(lambda x: (x**2 - a, 2 * x), torch.ones(2), tolerance=1e-6).value
    tensor([1.4142, 1.7321])
    """
    iteration, update = _Iteration(**options), _Jacobi(residual)
    result = iteration.run(update, x)
    return _finish(residual, result, iteration.throw, "diagonal of the Jacobian" if update.is_spoilt else None)


@closest_keywords(_Iteration)
def newton(
    residual: Residual,
    x: Tensor,
    *,
    inverse: Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[RootOptions],
) -> RootResult:
    r"""
    Solves :math:`F(x) = 0` by :math:`x \leftarrow x - \omega (\partial F / \partial x)^{-1} F(x)` with the dense
    Jacobian of each sample. Entries that are not finite where F is are replaced by difference quotients.

    :param residual: maps x with shape ``(*, d)`` to F with that shape, each sample by itself.
    :param Tensor x: where to begin, with shape ``(*, d)``.
    :param inverse: maps F to the solution of a linear system with an approximate Jacobian that was factorised before;
        None for the Jacobian of every iterate, by automatic differentiation.

    Example usage:

    >>> a = torch.tensor([[0.3, 0.5]])
    >>> newton(lambda x: x * x.flip(-1).exp() - a, torch.zeros(1, 2), tolerance=1e-6).converged.tolist()
    [True]
    """
    iteration, spoilt = _Iteration(**options), False

    def update(x: Tensor) -> Tensor:
        nonlocal spoilt
        f = residual(x)
        if inverse is not None:
            return -inverse(f)
        matrix = jacobian(residual, x)
        if not bool(matrix.isfinite().all()):
            spoilt |= bool((~matrix.isfinite().flatten(-2).all(-1) & f.isfinite().all(-1)).any())
            smallest = iteration.tolerance * (1.0 if iteration.scale is None else iteration.scale)
            matrix = fill_by_differences(matrix, residual, x, f, smallest)
        solution, info = torch.linalg.solve_ex(matrix, f.unsqueeze(-1))
        return -solution.squeeze(-1).masked_fill(info.unsqueeze(-1) != 0, math.inf)

    result = iteration.run(update, x)
    return _finish(lambda x: (residual(x), None), result, iteration.throw, "Jacobian" if spoilt else None)


class _Jacobi:
    """The update of Jacobi-Newton, which remembers the diagonal, or the blocks, of the first iterate."""

    def __init__(self, residual: ResidualWithDiagonal) -> None:
        self._residual = residual
        self._first: tuple[Tensor, Tensor] | None = None
        #: True if the first diagonal was not finite where F was.
        self.is_spoilt = False

    def __call__(self, x: Tensor) -> Tensor:
        f, diagonal = self._residual(x)
        blocks = diagonal.dim() > f.dim()
        size = _determinant(diagonal) if blocks else diagonal
        if self._first is None:
            self._first = diagonal, size
            finite = f.unflatten(-1, diagonal.shape[-3:-1]).isfinite().all(-1) if blocks else f.isfinite()
            self.is_spoilt = bool((finite & ~size.isfinite()).any())
        # The ratio is not finite where the first diagonal was 0; a coordinate that is a root already may stay.
        safe = size.isfinite() & (size / self._first[1] > _SAFE)
        used = torch.where(safe[..., None, None] if blocks else safe, diagonal, self._first[0])
        update = _divide(-f, used)
        usable = update.isfinite() if blocks else used.isfinite()
        return torch.where(f == 0, 0.0, torch.where(usable, update, math.inf))


def _determinant(blocks: Tensor) -> Tensor:
    """The determinant of each block, NaN if the block is not finite."""
    return torch.where(blocks.isfinite().flatten(-2).all(-1), torch.linalg.det(blocks), math.nan)


def _divide(v: Tensor, diagonal: Tensor) -> Tensor:
    """``v / diagonal``, or the solution of a linear system with each block, infinite if it is singular."""
    if diagonal.dim() <= v.dim():
        return v / diagonal
    solution, info = torch.linalg.solve_ex(diagonal, v.unflatten(-1, diagonal.shape[-3:-1]).unsqueeze(-1))
    return solution.masked_fill(info[..., None, None] != 0, math.inf).flatten(-3)


def _norm(x: Tensor, scale: Tensor | None) -> Tensor:
    """Root mean square of each sample."""
    return (x if scale is None else x / scale).square().mean(-1).sqrt()


def _finish(
    function: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    result: RootResult,
    throw: bool,
    spoilt: str | None = None,
) -> RootResult:
    """The result with gradients, or an error, which names a derivative that was not finite where F was."""
    if throw and not bool(result.converged.all()):
        failed = (~result.converged).nonzero()
        sample = tuple(failed[0].tolist())
        reason = f". The {spoilt} is not finite where F is: {_ADVICE}" if spoilt else ""
        raise RootError(
            f"{len(failed)} of {result.converged.numel()} samples have not converged, the first being {sample} after "
            f"{int(result.iterations[sample])} iterations at a rate of {float(result.rate[sample]):.3g} (infinite: F "
            "or its update is not finite, the Jacobian or its diagonal is singular; 1 or more: it diverges). Begin "
            f"closer to the root, raise max_iterations or tolerance, lower damping, or use newton{reason}",
            result=result,
        )
    if not torch.is_grad_enabled():
        return result
    value = attach(function(result.value)[0], result.value, function)
    # Samples that did not converge get no gradient.
    value = torch.where(result.converged.unsqueeze(-1), value, result.value)
    return RootResult(value, result.iterations, result.converged, result.rate)


def attach(residual: Tensor, root: Tensor, function: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> Tensor:
    r"""
    A root of F with its gradients to all that F depends on: the transposed system :math:`(\partial F / \partial x)^T v
    = g` is solved in the backward pass, iteratively by its diagonal or blocks where that converges, otherwise densely.

    :param Tensor residual: F at the root, attached to all that it depends on but the root.
    :param Tensor root: the root with shape ``(*, d)``.
    :param function: maps x to F, or what of it depends on x, and to the diagonal of its Jacobian, its diagonal blocks
        or, for a dense solve, None; it is called at once, as what it depends on may be another thing at the time of the
        backward pass.
    :returns: a tensor equal to the root; without gradients if the residual has none.
    :raises RootError: in the backward pass, if the Jacobian at the root is not finite.
    """
    if not residual.requires_grad:
        return root
    with torch.enable_grad():
        x = root.detach().requires_grad_()
        f, diagonal = function(x)

    def vjp(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # nothing depends on the root
            return None
        if torch.is_grad_enabled():
            raise RuntimeError("gradients of a root cannot be differentiated again (create_graph=True)")
        return _solve_transposed(f, x, None if diagonal is None else diagonal.detach(), gradient)

    attached = root - (residual - residual.detach())
    attached.register_hook(vjp)
    return attached


def _solve_transposed(f: Tensor, x: Tensor, diagonal: Tensor | None, gradient: Tensor) -> Tensor:
    def product(v: Tensor) -> Tensor:
        return torch.autograd.grad(f, x, v, retain_graph=True, materialize_grads=True)[0]

    if diagonal is not None:
        finfo = torch.finfo(x.dtype)
        small = (finfo.eps ** (2 / 3) * _norm(gradient, None)).clamp_min(finfo.tiny)
        diagonal = diagonal.mT if diagonal.dim() > gradient.dim() else diagonal
        v, last = _divide(gradient, diagonal), math.inf
        for _ in range(100):
            rest = gradient - product(v)
            size = _norm(rest, None)
            if bool((size <= small).all()):
                return v
            # The largest over samples may pause while samples take turns, but not grow.
            worst = float((size / small).max())
            if not worst < last:
                break
            v, last = v + _divide(rest, diagonal), worst
    basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    dense = torch.stack([product(row.expand_as(x)) for row in basis], dim=-2)
    # A sample without a gradient, such as one that has not converged, may have a singular Jacobian.
    used = (gradient != 0).any(-1)[..., None, None]
    dense = torch.where(used, dense, basis)
    if not bool(dense.isfinite().all()):
        raise RootError(f"gradients of a root need its Jacobian, which is not finite there: {_ADVICE}")
    return torch.linalg.solve(dense.mT, gradient.unsqueeze(-1)).squeeze(-1)
