# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Dimension-wise derivatives of any hollow function :math:`f_i(x) = \tau_i(x_i, h_i)`, :math:`h_i = c_i(x_{-i})`, by
automatic differentiation.

The transformer :math:`\tau` is evaluated at an alias of x that the hidden units know nothing of. Differentiating with
respect to the alias follows the direct path only; as each output depends on its own input alone, one backward pass
yields all the diagonal, and k passes yield the k-th derivatives. Nothing is detached, so gradients of the results reach
x and the parameters of the conditioner in full. (Detaching h gives the right values, too, but loses the gradient of
the divergence that comes through the conditioner: for :math:`f_i = x_i w x_{-i}` in two dimensions the divergence is
:math:`w (x_1 + x_2)`, and its gradient in w would be 0.)

References:

[1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "HollowOperator",
    "SplitJacobian",
    "block_jacobian",
    "dimwise_derivatives",
    "divergence",
    "fill_by_differences",
    "jacobian",
    "split_jacobian",
]

Transformer = Callable[[Tensor, Tensor], Tensor]
Conditioner = Callable[[Tensor], Tensor]


def dimwise_derivatives(
    transformer: Transformer, x: Tensor, h: Tensor, order: int, block_dim: int = 1
) -> tuple[Tensor, ...]:
    r"""
    :math:`f_i = \tau_i(x_i, h_i)` and :math:`D^k f = (\partial^k \tau_1 / \partial x_1^k, \dots, \partial^k \tau_d /
    \partial x_d^k)` at fixed :math:`h` for :math:`k = 1, \dots,` order, by one backward pass each through the
    transformer. Where it acts on blocks of coordinates, it takes ``block_dim`` passes each.

    :param transformer: maps x with shape ``(*, d)`` and h with shape ``(*, d, d_h)`` to f with shape ``(*, d)``, such
        that :math:`f_i` depends on :math:`x_i` and :math:`h_i` alone.
    :param Tensor x: inputs with shape ``(*, d)``.
    :param Tensor h: hidden units with shape ``(*, d, d_h)``, attached to the graph that made them.
    :param int order: the highest order, 0 or more.
    :param int block_dim: the number of coordinates of a block: :math:`f_i` may depend on all x in the block of
        :math:`x_i`.
    :returns: ``(f, D1, ..., Dk)``, each with shape ``(*, d)``; differentiable where gradients are enabled.
    :raises ValueError: if order is negative, or f has another shape than x.
    :raises RuntimeError: in inference mode and under vmap, where nothing can be differentiated.

    Example usage:

    >>> x = torch.tensor([1., 2.])
    >>> f, d1, d2 = dimwise_derivatives(lambda x, h: x**3 * h[..., 0], x, h=x.flip(-1).unsqueeze(-1), order=2)
    >>> d1.tolist(), d2.tolist()  # 3 x_i^2 x_j and 6 x_i x_j
    ([6.0, 12.0], [12.0, 12.0])
    """
    if order < 0:
        raise ValueError(f"order must be 0 or more, but got {order}")
    create_graph = _wants_graph()
    with torch.enable_grad():
        alias = alias_of(x)
        results = [_checked(transformer(alias, h), x)]
        for k in range(1, order + 1):
            if block_dim == 1:
                results.append(_sum_gradient(results[-1], alias, create_graph or k < order))
            else:
                results.append(_blocks(results[-1], alias, block_dim, True).diagonal(dim1=-2, dim2=-1).flatten(-2))
    return tuple(results) if create_graph else tuple(result.detach() for result in results)


def block_jacobian(transformer: Transformer, x: Tensor, h: Tensor, block_dim: int) -> tuple[Tensor, Tensor]:
    r"""
    :math:`f_k = \tau_k(x_k, h_k)` for blocks :math:`x_k, f_k \in \mathbb{R}^b` of coordinates, and
    :math:`\partial \tau_k / \partial x_k` at fixed :math:`h`, by b backward passes through the transformer.

    :param transformer: maps x with shape ``(*, d)`` and h with shape ``(*, d / b, d_h)`` to f with shape ``(*, d)``,
        such that block k of f depends on block k of x and :math:`h_k` alone.
    :param Tensor x: inputs with shape ``(*, d)``.
    :param Tensor h: hidden units with shape ``(*, d / b, d_h)``, attached to the graph that made them.
    :param int block_dim: the number b of coordinates of a block.
    :returns: f with shape ``(*, d)`` and the blocks with shape ``(*, d / b, b, b)``; differentiable where gradients are
        enabled.
    :raises ValueError: if f has another shape than x.
    :raises RuntimeError: in inference mode and under vmap, where nothing can be differentiated.

    Example usage:

    >>> x = torch.tensor([1., 2.])
    >>> f, blocks = block_jacobian(lambda x, h: x.prod() * x, x, h=torch.zeros(1, 1), block_dim=2)
    >>> blocks.tolist()
    [[[4.0, 1.0], [4.0, 4.0]]]
    """
    create_graph = _wants_graph()
    with torch.enable_grad():
        alias = alias_of(x)
        f = _checked(transformer(alias, h), x)
        blocks = _blocks(f, alias, block_dim, create_graph)
    return (f, blocks) if create_graph else (f.detach(), blocks.detach())


def _blocks(value: Tensor, x: Tensor, size: int, create_graph: bool) -> Tensor:
    """The diagonal blocks, ``(*, d / b, b, b)``, of the Jacobian of a function that acts on blocks."""
    # One pass yields row i of all blocks. All passes share one graph.
    rows = [
        _sum_gradient(value[..., i::size], x, create_graph or i < size - 1).unflatten(-1, (-1, size))
        for i in range(size)
    ]
    return torch.stack(rows, dim=-2)


def _wants_graph() -> bool:
    """True if results are differentiated further, be it forward, for which gradients need not be enabled."""
    return torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0


def alias_of(x: Tensor) -> Tensor:
    """A tensor equal to x to differentiate with respect to; gradients and tangents of x pass through it."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode() leaves no derivatives to take; use torch.no_grad()")
    alias = x.view_as(x) if x.requires_grad else x + torch.zeros_like(x, requires_grad=True)
    if not alias.requires_grad:
        raise RuntimeError("torch.vmap leaves no derivatives to take; give the samples as a batch instead")
    return alias


def _checked(f: Tensor, x: Tensor) -> Tensor:
    if f.shape != x.shape:
        raise ValueError(f"transformer must return the shape of x, {tuple(x.shape)}, but returned {tuple(f.shape)}")
    return f


def _sum_gradient(value: Tensor, x: Tensor, create_graph: bool) -> Tensor:
    if not value.requires_grad:  # a polynomial whose derivatives have come to an end
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def divergence(transformer: Transformer, x: Tensor, h: Tensor) -> Tensor:
    r"""
    :math:`\nabla \cdot f = \sum_i \partial \tau_i(x_i, h_i) / \partial x_i`, by one backward pass through the
    transformer.

    :param transformer: as for :func:`dimwise_derivatives`.
    :param Tensor x: inputs with shape ``(*, d)``.
    :param Tensor h: hidden units with shape ``(*, d, d_h)``.
    :returns: the divergence with shape ``(*,)``.
    """
    return dimwise_derivatives(transformer, x, h, 1)[1].sum(-1)


class HollowOperator:
    r"""
    The hollow part :math:`H = \frac{\partial \tau}{\partial h} \frac{\partial h}{\partial x}` of a Jacobian, known by
    its products: its diagonal is zero, its off-diagonal elements are those of the Jacobian.
    """

    def __init__(self, transformer: Transformer, conditioner: Conditioner, x: Tensor) -> None:
        self._transformer = transformer
        self._conditioner = conditioner
        self._x = x

    def _evaluate(self) -> tuple[Tensor, Tensor]:
        """f, and the alias of x that it depends on through the hidden units alone."""
        alias = alias_of(self._x)
        return _checked(self._transformer(self._x, self._conditioner(alias)), alias), alias

    def vjp(self, v: Tensor) -> Tensor:
        r"""
        :param Tensor v: with shape ``(*, d)``.
        :returns: :math:`H^T v` with shape ``(*, d)``, by one backward pass.
        """
        create_graph = _wants_graph()
        with torch.enable_grad():
            f, alias = self._evaluate()
            return _vjp(f, alias, v, create_graph)

    def jvp(self, v: Tensor) -> Tensor:
        r"""
        :param Tensor v: with shape ``(*, d)``.
        :returns: :math:`H v` with shape ``(*, d)``, by two backward passes: :math:`H^T u` is linear in u, and its own
            vector-Jacobian product in u with v is :math:`H v`.
        """
        create_graph = _wants_graph()
        with torch.enable_grad():
            f, alias = self._evaluate()
            u = torch.zeros_like(f, requires_grad=True)
            return _vjp(_vjp(f, alias, u, True), u, v, create_graph)

    def dense(self) -> Tensor:
        """The matrix with shape ``(*, d, d)``, by d products."""
        basis = torch.eye(self._x.shape[-1], dtype=self._x.dtype, device=self._x.device)
        return torch.stack([self.vjp(row.expand_as(self._x)) for row in basis], dim=-2)


def _vjp(f: Tensor, x: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    if not f.requires_grad:
        return torch.zeros_like(x)
    (product,) = torch.autograd.grad(f, x, v, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(x) if product is None else product


@dataclass(frozen=True)
class SplitJacobian:
    r"""
    The Jacobian :math:`\partial f / \partial x = \text{diag}(D f) + H` of a hollow function.

    :ivar diagonal: :math:`D f = (\partial f_1 / \partial x_1, \dots, \partial f_d / \partial x_d)`, shape ``(*, d)``.
    :ivar hollow: the rest, an operator.
    """

    diagonal: Tensor
    hollow: HollowOperator

    def jvp(self, v: Tensor) -> Tensor:
        """The Jacobian times v, both with shape ``(*, d)``."""
        return self.diagonal * v + self.hollow.jvp(v)

    def vjp(self, v: Tensor) -> Tensor:
        """The transposed Jacobian times v, both with shape ``(*, d)``."""
        return self.diagonal * v + self.hollow.vjp(v)

    def dense(self) -> Tensor:
        """The matrix with shape ``(*, d, d)``."""
        return torch.diag_embed(self.diagonal) + self.hollow.dense()


def split_jacobian(transformer: Transformer, conditioner: Conditioner, x: Tensor) -> SplitJacobian:
    r"""
    Splits the Jacobian of :math:`f(x) = \tau(x, c(x))`,

        :math:`\frac{\partial f}{\partial x} = \frac{\partial \tau}{\partial x} + \frac{\partial \tau}{\partial h}
        \frac{\partial h}{\partial x}`,

    into its diagonal, computed now by one backward pass, and its hollow part, an operator.

    :param transformer: as for :func:`dimwise_derivatives`.
    :param conditioner: maps x with shape ``(*, d)`` to h with shape ``(*, d, d_h)``, such that :math:`h_i` is free of
        :math:`x_i`.
    :param Tensor x: inputs with shape ``(*, d)``.

    Example usage:

    >>> x = torch.tensor([1., 2.])
    >>> jacobian = split_jacobian(lambda x, h: x * h[..., 0], lambda x: x.flip(-1).unsqueeze(-1), x)
    >>> jacobian.diagonal.tolist(), jacobian.hollow.dense().tolist()
    ([2.0, 1.0], [[0.0, 1.0], [2.0, 0.0]])
    """
    return SplitJacobian(
        dimwise_derivatives(transformer, x, conditioner(x), 1)[1], HollowOperator(transformer, conditioner, x)
    )


def jacobian(function: Conditioner, x: Tensor) -> Tensor:
    r"""
    The dense Jacobian :math:`\partial f / \partial x` of any function of one sample at a time, by a batch of d backward
    passes; a constant, without gradients of its own. Where it is not finite, see :func:`fill_by_differences`.

    :param function: maps x with shape ``(*, d)`` to f with shape ``(*, d)``.
    :param Tensor x: inputs with shape ``(*, d)``.
    :returns: the matrices with shape ``(*, d, d)``.
    :raises RuntimeError: in inference mode, where nothing can be differentiated.

    Example usage:

    >>> jacobian(lambda x: x.flip(-1) ** 2, torch.tensor([1.0, 2.0])).tolist()
    [[0.0, 4.0], [2.0, 0.0]]
    """
    with torch.enable_grad():
        alias = alias_of(x.detach())
        f = function(alias)
        if not f.requires_grad:
            return x.new_zeros(*x.shape, x.shape[-1])
        basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        basis = basis.view(-1, *(1,) * (x.dim() - 1), x.shape[-1]).expand(-1, *x.shape)
        (rows,) = torch.autograd.grad(f, alias, basis, is_grads_batched=True, allow_unused=True, materialize_grads=True)
    return rows.movedim(0, -2)


def fill_by_differences(
    matrix: Tensor, function: Conditioner, x: Tensor, f: Tensor, smallest: Tensor | float = 0.0
) -> Tensor:
    r"""
    Replaces the entries of a Jacobian that are not finite where f is, such as NaN of the derivative of
    :math:`\sqrt{x^2}` at 0, by central difference quotients :math:`(f_i(x + h e_j) - f_i(x - h e_j)) / 2 h`; two
    evaluations for each column with such an entry. The other entries stay what they are.

    :param Tensor matrix: the Jacobians with shape ``(*, d, d)``.
    :param function: maps x with shape ``(*, d)`` to f with shape ``(*, d)``, each sample by itself.
    :param Tensor x: inputs with shape ``(*, d)``.
    :param Tensor f: the function's values at x; samples in which they are not finite are left as they are.
    :param smallest: the smallest h, of a shape that broadcasts to x's; by default h depends on the size of x alone.
    :returns: matrices with shape ``(*, d, d)``, without gradients; an entry whose quotient is not finite either stays
        not finite.

    Example usage:

    >>> x, f = torch.tensor([0.0]), lambda x: (x**2).sqrt()
    >>> jacobian(f, x), fill_by_differences(jacobian(f, x), f, x, f(x))
    (tensor([[nan]]), tensor([[0.]]))
    """
    x, matrix = x.detach(), matrix.detach()
    bad = ~matrix.isfinite() & f.isfinite().all(-1)[..., None, None]
    rms = x.square().mean(-1, keepdim=True).sqrt()
    size = torch.maximum(x.abs(), torch.where(rms > 0, rms, 1.0))
    # The cube root balances the errors of rounding and of truncation.
    steps = torch.maximum(torch.finfo(x.dtype).eps ** (1 / 3) * size, torch.as_tensor(smallest).to(x))
    with torch.no_grad():
        for j in bad.flatten(0, -2).any(0).nonzero().flatten().tolist():
            step = torch.zeros_like(x)
            step[..., j] = steps[..., j]
            ahead, behind = x + step, x - step
            quotient = (function(ahead) - function(behind)) / (ahead - behind)[..., j, None]
            matrix = torch.where(bad & (torch.arange(x.shape[-1], device=x.device) == j), quotient[..., None], matrix)
    return matrix
