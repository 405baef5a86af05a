# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Transformers: the part :math:`f_i = \\tau_i(t, x_i, h_i)` of a hollow network, and its derivatives in :math:`x_i`."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from pyro_hollow.ops.derivatives import block_jacobian, dimwise_derivatives
from pyro_hollow.ops.stepper import Unsupported

from .activations import get_activation
from .arguments import check_block_dim
from .layout import (
    add_offset,
    add_product,
    by_block,
    by_coordinate,
    columns,
    flatten_offset,
    flatten_time,
    project,
    rows,
)

Saved = tuple[Tensor, ...]

__all__ = ["BoundTransformer", "ClosedFormTransformer", "ModuleTransformer", "Transformer"]


class BoundTransformer(ABC):
    r"""
    A transformer with everything that does not depend on :math:`(t, x, h)` computed.

    :ivar tensors: the tensors whose gradients determine those of the parameters and of the context; none of them
        depends on another.
    """

    tensors: tuple[Tensor, ...]
    block_dim = 1

    @abstractmethod
    def derivatives(self, t: Tensor, x: Tensor, h: Tensor, order: int) -> tuple[Tensor, ...]:
        r"""
        Evaluates :math:`f_i = \tau_i(t, x_i, h_i)` and :math:`\partial^k f_i / \partial x_i^k` at fixed :math:`h`, and
        likewise the coordinates of blocks :math:`f_k = \tau_k(t, x_k, h_k)`.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: inputs with shape ``(*, d)``.
        :param Tensor h: hidden units with shape ``(*, d / block_dim, d_h)``.
        :param int order: the highest derivative wanted; 0 asks for the value alone.
        :returns: ``(f, D1, ..., Dk)``, each with shape ``(*, d)``.
        """

    def blocks(self, t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        Evaluates :math:`f_k = \tau_k(t, x_k, h_k)` and :math:`\partial f_k / \partial x_k` at fixed :math:`h`, here by
        automatic differentiation. See :meth:`derivatives` for the parameters.

        :returns: f with shape ``(*, d)``, and the Jacobian's blocks with shape ``(*, d / b, b, b)``, b being block_dim.
        """
        wanted = torch.is_grad_enabled() and any(v.requires_grad for v in (x, h, *self.tensors))
        with torch.set_grad_enabled(wanted):
            return block_jacobian(partial(self.__call__, t), x, h, self.block_dim)

    def __call__(self, t: Tensor, x: Tensor, h: Tensor) -> Tensor:
        """The value alone."""
        return self.derivatives(t, x, h, 0)[0]

    def flattened(self, batch_shape: torch.Size) -> BoundTransformer:
        """
        The transformer for states of this batch shape; see :meth:`~pyro_hollow.nn.BoundConditioner.flattened`.

        :raises Unsupported: for a transformer that has no derivatives by hand.
        """
        raise Unsupported("the transformer has no vector-Jacobian product by hand")

    def evaluate(self, t: float, x: Tensor, h: Tensor, f: Tensor, divergence: Tensor) -> Saved:
        r"""
        Evaluates field and divergence.

        :param float t: time.
        :param Tensor x: inputs with shape ``(d / block_dim, block_dim, batch)``.
        :param Tensor h: hidden units with shape ``(d / block_dim, d_h, batch)``.
        :param Tensor f: filled with the field's value, of the shape of x.
        :param Tensor divergence: filled with the divergence, with shape ``(1, batch)``.
        :returns: tensors for :meth:`vjp`.
        """
        raise NotImplementedError

    def vjp(self, saved: Saved, f_bar: Tensor, divergence_bar: Tensor) -> tuple[Tensor, Tensor, Saved]:
        """
        The vector-Jacobian product of an evaluation.

        :param saved: tensors of :meth:`evaluate`.
        :param Tensor f_bar: the gradient of f with shape ``(d / block_dim, block_dim, batch)``.
        :param Tensor divergence_bar: the gradient of the divergence with shape ``(batch,)``.
        :returns: the gradients of x, by the direct path alone, and of the hidden units; and tensors for
            :meth:`accumulate`, whose last dimension is the batch.
        """
        raise NotImplementedError

    def accumulate(self, times: Tensor, operands: Saved, sums: Sequence[Tensor]) -> None:
        """Adds gradients to sums; see :meth:`~pyro_hollow.nn.BoundConditioner.accumulate`."""
        raise NotImplementedError

    def gradients(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of the tensors, with flattened offsets, from the sums."""
        return sums


class Transformer(nn.Module, ABC):
    """
    The base class of transformers.

    :param int input_dim: the number d of coordinates.
    :param int hidden_dim: the number d_h of hidden units that each block of coordinates receives.
    :param int context_dim: the size of the context; 0 for none.
    :param int block_dim: the number of coordinates of a block, which :attr:`BoundTransformer.block_dim` repeats.
    :raises ValueError: for a block_dim that does not divide input_dim.
    """

    block_dim = 1

    def __init__(self, input_dim: int, hidden_dim: int, context_dim: int = 0, block_dim: int = 1) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.context_dim = context_dim
        self.block_dim = check_block_dim(block_dim, input_dim)

    @abstractmethod
    def bind(self, context: Tensor | None = None) -> BoundTransformer:
        """
        Computes, once per solve, what does not depend on time and state.

        :param Tensor context: the context with shape ``(*, context_dim)``; None where ``context_dim == 0``.
        """


class ClosedFormTransformer(Transformer):
    r"""
    A gated affine part plus a single hidden layer of :math:`M` units per coordinate,

        :math:`f_i = a_i x_i + b_i + \sum_{m=1}^M v_{im} s(z_{im}), \qquad z_{im} = u_{im} x_i + p_{im}`,

    where :math:`(p_i, r_i, b_i)` are linear in the hidden units :math:`h_i`, in time and in the context, and :math:`a_i
    = r_i`, or :math:`a_i = A \tanh(r_i / A)` for a maximal rate A. Its derivatives in :math:`x_i` are

        :math:`D^1 f_i = a_i + \sum_m v_{im} u_{im} s'(z_{im}), \qquad D^k f_i = \sum_m v_{im} u_{im}^k
        s^{(k)}(z_{im}), \quad k > 1`,

    which costs one more elementwise pass per order, and no backward pass.
    The affine part lets the field expand and contract everywhere; the hidden layer bends it. A maximal rate
    keeps unusual states and contexts from making the affine part stiff; and hidden units without bound ("silu",
    "softplus") from making the field grow faster than the state, when a flow need not exist everywhere.

    Blocks of b coordinates have :math:`f_k = A_k x_k + b_k + V_k s(z_k)`, :math:`z_k = U_k x_k + p_k`, with
    :math:`x_k, f_k \in \mathbb{R}^b`, the entries of :math:`A_k` taking the place of :math:`a_i`, and the Jacobian's
    block :math:`A_k + V_k \, \text{diag}(s'(z_k)) \, U_k`.

    :param int input_dim: the number d of coordinates.
    :param int hidden_dim: the number d_h of hidden units that each block of coordinates receives.
    :param int context_dim: the size of the context; 0 for none.
    :param int width: the number M of units per block.
    :param str activation: the function s: "tanh", "softplus" or "silu".
    :param float max_rate: the bound A on the rates :math:`|a_i|`, per unit of time; None for no bound (rather
        than a large number, with which errors of rounding grow).
    :param int block_dim: the number b of coordinates of a block.
    :raises ValueError: for a width below 1, another activation, a maximal rate that is not positive and finite, and a
        block_dim that does not divide input_dim.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        context_dim: int = 0,
        *,
        width: int = 16,
        activation: str = "tanh",
        max_rate: float | None = None,
        block_dim: int = 1,
    ) -> None:
        super().__init__(input_dim, hidden_dim, context_dim, block_dim)
        if width < 1:
            raise ValueError(f"width must be at least 1, but got {width}")
        if max_rate is not None and not 0 < max_rate < math.inf:
            raise ValueError(f"max_rate must be positive and finite, or None, but got {max_rate}")
        self.width = width
        self.max_rate = max_rate
        self.activation = activation
        self._activation = get_activation(activation)
        groups, rows_ = input_dim // block_dim, width + block_dim**2 + block_dim
        # Of the hidden units, a bias and time: columns of one matrix, as every parameter costs an optimizer's call.
        self.weight = nn.Parameter(torch.empty(groups, rows_, hidden_dim + 2))
        self.context_weight = nn.Parameter(torch.empty(groups * rows_, context_dim)) if context_dim else None
        self.input_weight = nn.Parameter(torch.empty(groups, width, block_dim))
        self.output_weight = nn.Parameter(torch.empty(groups, block_dim, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters such that the initial field is small: a fresh flow is close to the identity."""
        small = 1e-2
        with torch.no_grad():
            bound = 1 / math.sqrt(self.hidden_dim)
            self.weight[..., :-2].uniform_(-bound, bound)
            self.weight[..., -2:].uniform_(-1.0, 1.0)
            self.input_weight.normal_()
            self.output_weight.normal_(std=small / math.sqrt(self.width))
            if self.context_weight is not None:
                bound = 1 / math.sqrt(self.context_dim)
                self.context_weight.uniform_(-bound, bound)
                self.context_weight.view(len(self.weight), -1, self.context_dim)[:, self.width :] *= small
            self.weight[:, self.width :] *= small

    def reset_to_zero(self) -> None:
        """Makes the field zero, and a flow the identity; the parameters still have gradients to learn from."""
        with torch.no_grad():
            self.output_weight.zero_()
            self.weight[:, self.width :] = 0.0

    def is_zero(self) -> bool:
        """True while the field is as :meth:`reset_to_zero` left it."""
        return not bool(self.output_weight.any())

    def bind(self, context: Tensor | None = None) -> BoundTransformer:
        """See :meth:`Transformer.bind`."""
        return BoundClosedForm(self, context)

    def extra_repr(self) -> str:
        sizes = f"{self.input_dim}, {self.hidden_dim}, width={self.width}"
        blocks = f", block_dim={self.block_dim}" if self.block_dim > 1 else ""
        return f"{sizes}, activation={self.activation!r}, max_rate={self.max_rate}{blocks}"


class BoundClosedForm(BoundTransformer):
    """
    A closed-form transformer; see :class:`ClosedFormTransformer`.

    Inside, tensors have the group of a block of coordinates first, ``(groups, features, batch)``, so that each layer is
    one batched matrix product. The activation's affine part is worked into the weights; see Activation.
    """

    def __init__(self, net: ClosedFormTransformer, context: Tensor | None) -> None:
        s = net._activation
        # A tanh(r / A) = 2 A sigmoid(2 r / A) - A, which is many times cheaper; see Activation.
        gate_rate = 1.0 if net.max_rate is None else 2.0 / net.max_rate
        self.block_dim = size = net.block_dim
        rates = net.weight.new_tensor([s.rate] * net.width + [gate_rate] * size**2 + [1.0] * size).view(-1, 1)
        self.width = net.width
        self.sizes = net.width, size**2, size  # of p, a and b
        self.max_rate = net.max_rate
        self.activation = s
        self.weight, offset, self.time_weight = (net.weight * rates).split([net.hidden_dim, 1, 1], dim=-1)
        if context is not None and net.context_weight is not None:
            offset = project(context, net.context_weight * rates.repeat(len(net.weight), 1), offset)
        self.offset = offset
        self.input_weight = net.input_weight * s.rate
        self.output_weight = net.output_weight * s.scale
        self.slopes = self.output_weight * self.input_weight.mT
        self.shift = net.output_weight.sum(-1, keepdim=True) * s.shift
        # Without the slopes: their gradient reaches the two weights on its own, and would count twice.
        self.tensors = (
            self.weight, self.time_weight, self.offset, self.input_weight, self.output_weight, self.shift
        )  # fmt: skip

    def _terms(self, t: Tensor, x: Tensor, h: Tensor, order: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """f and the rates with shape ``(groups, features, batch)``, and the derivatives of the units."""
        batch_shape = x.shape[:-1]
        t = flatten_time(t, x)
        x = by_block(columns(x), self.block_dim)
        h = h.reshape(-1, *h.shape[-2:]).permute(1, 2, 0)
        offset = torch.addcmul(flatten_offset(self.offset, 2, batch_shape), self.time_weight, t)
        p, a, b = torch.baddbmm(offset, self.weight, h).split_with_sizes(self.sizes, dim=1)
        if self.max_rate is not None:
            a = 2.0 * self.max_rate * torch.sigmoid(a) - self.max_rate
        s = self.activation.derivatives(add_product(p, self.input_weight, x), order)
        return torch.baddbmm(_add_rates(b + self.shift, a, x), self.output_weight, s[0]), a, s

    def derivatives(self, t: Tensor, x: Tensor, h: Tensor, order: int) -> tuple[Tensor, ...]:
        f, a, s = self._terms(t, x, h, order)
        results, slopes = [f], self.slopes
        if order >= 1:
            results.append(torch.baddbmm(_diagonal(a, self.block_dim), slopes, s[1]))
        for k in range(2, order + 1):
            slopes = slopes * self.input_weight.mT
            results.append(torch.bmm(slopes, s[k]))
        # Joined and parted again, the gradients of the results arrive contiguous: bmm is five times slower without.
        joined = torch.cat(results, dim=1)
        if self.block_dim > 1:
            joined = joined.unflatten(1, (-1, self.block_dim)).transpose(1, 2).flatten(0, 1)
        return tuple(rows(value, x.shape[:-1]) for value in joined.unbind(1))

    def blocks(self, t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BoundTransformer.blocks`. Here in closed form."""
        f, a, s = self._terms(t, x, h, 1)
        products = self.output_weight.unsqueeze(2) * self.input_weight.mT.unsqueeze(1)
        jacobian = torch.baddbmm(a, products.flatten(1, 2), s[1]).permute(2, 0, 1)
        shape = *x.shape[:-1], -1, self.block_dim, self.block_dim
        return rows(by_coordinate(f), x.shape[:-1]), jacobian.reshape(shape)

    def flattened(self, batch_shape: torch.Size) -> BoundClosedForm:
        """
        See :meth:`BoundTransformer.flattened`. Here the offset includes the shift, and the slopes, summed over the
        coordinates of a block, stand for it.
        """
        bound = copy.copy(self)
        p, b = flatten_offset(self.offset, 2, batch_shape).tensor_split([-self.block_dim], dim=1)
        bound.offset = torch.cat([p, b + self.shift], dim=1)
        if self.block_dim > 1:
            bound.slopes = self.slopes.sum(1, keepdim=True)
        bound.tensors = (
            self.weight, self.time_weight, bound.offset, self.input_weight, self.output_weight, bound.slopes
        )  # fmt: skip
        return bound

    # Made on demand, as the native executor does without. Rates are tensors because torch converts numbers to their
    # type at every operation.

    @cached_property
    def _transposed(self) -> tuple[Tensor, ...]:
        return self.weight.mT, self.input_weight.mT, self.output_weight.mT, self.slopes.mT

    @cached_property
    def _least_and_steepest(self) -> Saved:
        """-A and A / 2: the least rate of the gate, and its largest slope, the slope being (A^2 - a^2) / 2A."""
        rate = self.max_rate or 0.0
        return self.weight.new_tensor([[-rate], [0.5 * rate]]).unbind()

    def evaluate(self, t: float, x: Tensor, h: Tensor, f: Tensor, divergence: Tensor) -> Saved:
        """See :meth:`BoundTransformer.evaluate`."""
        p = torch.baddbmm(torch.add(self.offset, self.time_weight, alpha=t), self.weight, h)
        p, a, b = p.split_with_sizes(self.sizes, 1)
        if self.max_rate is not None:
            a = torch.add(self._least_and_steepest[0], torch.sigmoid(a), alpha=2.0 * self.max_rate)
        s = self.activation.derivatives(add_product(p, self.input_weight, x), 2)
        torch.baddbmm(_add_rates(b, a, x), self.output_weight, s[0], out=f)
        torch.sum(torch.baddbmm(_trace(a, self.block_dim), self.slopes, s[1]), dim=0, out=divergence)
        return x, h, a, *s

    def vjp(self, saved: Saved, f_bar: Tensor, divergence_bar: Tensor) -> tuple[Tensor, Tensor, Saved]:
        """See :meth:`BoundTransformer.vjp`."""
        x, h, a, value, slope, curvature = saved
        weight, input_weight, output_weight, slopes = self._transposed
        p_bar = x.new_empty(h.shape[0], sum(self.sizes), h.shape[2])
        z_bar, a_bar, b_bar = p_bar.split_with_sizes(self.sizes, 1)
        torch.mul(slopes * divergence_bar, curvature, out=z_bar)
        z_bar.addcmul_(_product(output_weight, f_bar), slope)
        _rates_vjp(f_bar, x, divergence_bar, a_bar)
        if self.max_rate is not None:
            a_bar.mul_(torch.addcmul(self._least_and_steepest[1], a, a, value=-0.5 / self.max_rate))
        b_bar.copy_(f_bar)
        x_bar = torch.baddbmm(_transposed_rates(a, f_bar), input_weight, z_bar)
        return x_bar, torch.bmm(weight, p_bar), (x, h, value, slope, p_bar, divergence_bar)

    def accumulate(self, times: Tensor, operands: Saved, sums: Sequence[Tensor]) -> None:
        """See :meth:`BoundTransformer.accumulate`."""
        x, h, value, slope, p_bar, divergence_bar = operands
        weight_bar, time_bar, offset_bar, input_bar, output_bar, slopes_bar = sums
        weight_bar.baddbmm_(p_bar, h.mT)
        add_offset(offset_bar, time_bar, p_bar, times)
        input_bar.baddbmm_(p_bar[:, : self.width], x.mT)
        output_bar.baddbmm_(p_bar[:, -self.block_dim :], value.mT)  # of b, as that of f
        slopes_bar.view(-1).addmv_(slope.view(-1, slope.shape[-1]), divergence_bar)

    def gradients(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """See :meth:`BoundTransformer.gradients`."""
        weight_bar, time_bar, offset_bar, input_bar, output_bar, slopes_bar = sums
        shift_bar = offset_bar[:, -self.block_dim :].sum(-1, keepdim=True)
        input_bar = input_bar + (slopes_bar * self.output_weight).mT
        output_bar = output_bar + slopes_bar * self.input_weight.mT
        return [weight_bar, time_bar, offset_bar, input_bar, output_bar, shift_bar]


# Products for blocks of b coordinates, which for b = 1 are elementwise.


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """``weight @ x``."""
    return weight * x if x.shape[1] == 1 else torch.bmm(weight, x)


def _square(a: Tensor, size: int) -> Tensor:
    """Rates ``(groups, b * b, batch)`` as matrices ``(groups, b, b, batch)``."""
    return a.unflatten(1, (size, size))


def _add_rates(b: Tensor, a: Tensor, x: Tensor) -> Tensor:
    """``b + A @ x`` with rates A of each group and sample."""
    size = x.shape[1]
    return torch.addcmul(b, a, x) if size == 1 else b + (_square(a, size) * x.unsqueeze(1)).sum(2)


def _transposed_rates(a: Tensor, f_bar: Tensor) -> Tensor:
    """``A.mT @ f_bar``."""
    size = f_bar.shape[1]
    return f_bar * a if size == 1 else (_square(a, size) * f_bar.unsqueeze(2)).sum(1)


def _rates_vjp(f_bar: Tensor, x: Tensor, divergence_bar: Tensor, a_bar: Tensor) -> None:
    """Fills the gradient of the rates, which reach the field by ``A @ x`` and the divergence by their trace."""
    size = x.shape[1]
    if size == 1:
        torch.addcmul(divergence_bar, f_bar, x, out=a_bar)
    else:
        torch.mul(f_bar.unsqueeze(2), x.unsqueeze(1), out=_square(a_bar, size))
        _diagonal(a_bar, size).add_(divergence_bar)


def _diagonal(a: Tensor, size: int) -> Tensor:
    """The diagonals of rates as ``(groups, b, batch)``, a view."""
    return a if size == 1 else a[:, :: size + 1]


def _trace(a: Tensor, size: int) -> Tensor:
    """The traces of rates as ``(groups, 1, batch)``."""
    return a if size == 1 else _diagonal(a, size).sum(1, keepdim=True)


class ModuleTransformer(Transformer):
    r"""
    Adapts a module of your own, :math:`f_i = m([x_i, t, h_i])`, shared by all blocks of coordinates. Derivatives are
    taken by automatic differentiation: k backward passes through the module alone for order k, and block_dim times as
    many for blocks, whatever the dimension.

    :param ~torch.nn.Module module: maps ``(*, block_dim + 1 + hidden_dim)`` to ``(*, block_dim)``, row by row, with
        smooth activations.
    :param int input_dim: the number d of coordinates.
    :param int hidden_dim: the number d_h of hidden units that each block of coordinates receives.
    :param int context_dim: ignored; the context reaches the module through the hidden units.
    :param int block_dim: the number of coordinates of a block.
    """

    def __init__(
        self, module: nn.Module, input_dim: int, hidden_dim: int, context_dim: int = 0, block_dim: int = 1
    ) -> None:
        super().__init__(input_dim, hidden_dim, context_dim, block_dim)
        self.module = module

    def bind(self, context: Tensor | None = None) -> BoundTransformer:
        """See :meth:`Transformer.bind`."""
        return _BoundModule(self.module, self.block_dim)


class _BoundModule(BoundTransformer):
    def __init__(self, module: nn.Module, block_dim: int) -> None:
        self.block_dim = block_dim
        self._module = module
        self.tensors = tuple(module.parameters())

    def derivatives(self, t: Tensor, x: Tensor, h: Tensor, order: int) -> tuple[Tensor, ...]:
        if order == 0:
            return (self._value(t, x, h),)
        wanted = torch.is_grad_enabled() and any(v.requires_grad for v in (x, h, *self.tensors))
        with torch.set_grad_enabled(wanted):
            return dimwise_derivatives(partial(self._value, t), x, h, order, self.block_dim)

    def _value(self, t: Tensor, x: Tensor, h: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, self.block_dim))
        t = t.to(x.dtype) if t.dim() == 0 else t.to(x.dtype)[..., None, None]
        value = self._module(torch.cat([x, t.expand(*x.shape[:-1], 1), h], dim=-1))
        if value.shape != x.shape:
            of, to = ("2", "one feature") if self.block_dim == 1 else (f"{self.block_dim + 1}", f"{self.block_dim}")
            raise ValueError(
                f"transformer must map {tuple(h.shape[:-1])} rows of {of} + {h.shape[-1]} features to {to} each, "
                f"but its output has shape {tuple(value.shape)}"
            )
        return value.flatten(-2)
