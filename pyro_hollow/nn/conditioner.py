# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Conditioners: the part :math:`h_i = c_i(t, x_{-i})` of a hollow network, whose Jacobian has a zero diagonal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from pyro_hollow.ops.arguments import closest_keywords
from pyro_hollow.ops.stepper import Unsupported

from .activations import Activation, get_activation
from .arguments import check_block_dim, check_widths
from .layout import (
    add_offset,
    add_product,
    by_block,
    by_coordinate,
    columns,
    flatten_offset,
    flatten_time,
    offset_at,
    project,
)

Saved = tuple[Tensor, ...]

#: The number of coordinates whose features are summed by one product.
_BLOCK = 64

__all__ = [
    "BoundConditioner",
    "Conditioner",
    "GroupedConditioner",
    "LeaveOneOutConditioner",
    "MaskedConditioner",
]


class BoundConditioner:
    r"""
    A conditioner with everything that does not depend on :math:`(t, x)` computed: ``h = bound(t, x)``.

    Whoever writes :meth:`evaluate`, :meth:`vjp` and :meth:`accumulate` gets solves whose gradients are taken by hand.
    There tensors are coordinate-major, ``(d, batch)`` and ``(d, units, batch)``, and carry no graph. Where coordinates
    come in blocks, hidden units have the number of blocks, ``d / block_dim``, in the place of d.

    :param function: maps time and inputs of shape ``(*, d)`` to hidden units of shape ``(*, d, d_h)``.
    :param tensors: the tensors whose gradients determine those of the parameters and of the context; none of them may
        depend on another.
    """

    #: The largest error, in tolerances, with which a step over a whole interval passes. Smaller where estimates of the
    #: error are often too small by chance: a rejected step costs more than it gains elsewhere.
    trust = 0.1

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], tensors: Sequence[Tensor]) -> None:
        self._function = function
        self.tensors = tuple(tensors)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self._function(t, x)

    def flattened(self, batch_shape: torch.Size) -> BoundConditioner:
        """
        The conditioner for states of this batch shape, with offsets of shape ``(units, 1 or batch)``.

        :raises Unsupported: for a conditioner that has no derivatives by hand.
        """
        raise Unsupported("the conditioner has no vector-Jacobian product by hand")

    def evaluate(self, t: float, x: Tensor) -> tuple[Tensor, Saved]:
        """
        Evaluates the conditioner.

        :param float t: time.
        :param Tensor x: inputs with shape ``(d, batch)``.
        :returns: hidden units with shape ``(d, d_h, batch)``, and tensors for :meth:`vjp`.
        """
        raise NotImplementedError

    def vjp(self, saved: Saved, h_bar: Tensor, x_bar: Tensor) -> tuple[Tensor, Saved]:
        """
        The vector-Jacobian product of an evaluation.

        :param saved: tensors of :meth:`evaluate`.
        :param Tensor h_bar: the gradient of the hidden units with shape ``(d, d_h, batch)``.
        :param Tensor x_bar: the gradient of x by another path, to be added to.
        :returns: the gradient of x with shape ``(d, batch)``, and tensors for :meth:`accumulate`, whose last dimension
            is the batch.
        """
        raise NotImplementedError

    def accumulate(self, times: Tensor, operands: Saved, sums: Sequence[Tensor]) -> None:
        """
        Adds the gradients of the tensors.

        :param Tensor times: the times of the evaluations, with shape ``(evaluations, batch)``.
        :param operands: tensors of :meth:`vjp`, those of several evaluations side by side in the last dimension.
        :param sums: of the shapes of the tensors, with flattened offsets.
        """
        raise NotImplementedError


class Conditioner(nn.Module):
    r"""
    The base class of conditioners :math:`h_i = c_i(t, x_{-i})`, :math:`i = 1, \dots, d`, with :math:`h_i` in
    :math:`\mathbb{R}^{d_h}`; with ``block_dim``, i counts blocks of coordinates. Those of this package return the units
    of their last layer, for the activation "tanh" in the form :math:`(1 + \tanh z) / 2`. To write your own, override
    :meth:`forward`; :class:`~pyro_hollow.nn.HollowNN` checks that :math:`h_i` is free of :math:`x_i`. Override
    :meth:`bind` instead where work can be done once per solve.

    :param int input_dim: the number d of coordinates.
    :param int hidden_dim: the number d_h of hidden units that each block of coordinates receives.
    :param int context_dim: the size of the context; 0 for none.
    :param int block_dim: the number of coordinates of a block; block k has the coordinates ``k * block_dim``, ...,
        ``k * block_dim + block_dim - 1``.
    :raises ValueError: for a block_dim that does not divide input_dim.
    """

    block_dim = 1

    def __init__(self, input_dim: int, hidden_dim: int, context_dim: int = 0, block_dim: int = 1) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.hidden_dim = hidden_dim
        self.context_dim = context_dim
        self.block_dim = check_block_dim(block_dim, input_dim)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """
        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: inputs with shape ``(*, d)``.
        :param Tensor context: the context, whose shape ``(*, context_dim)`` broadcasts against x's batch.
        :returns: hidden units with shape ``(*, d / block_dim, d_h)``.
        """
        if type(self).bind is Conditioner.bind:
            raise NotImplementedError("a Conditioner must override forward or bind")
        return self.bind(context)(t, x)

    def bind(self, context: Tensor | None = None) -> BoundConditioner:
        """
        Computes, once per solve, what does not depend on time and state.

        :param Tensor context: the context with shape ``(*, context_dim)``; None where ``context_dim == 0``.
        """
        if context is None:
            return BoundConditioner(self.forward, tuple(self.parameters()))
        # An alias, so that nothing else that is made of the context depends on this tensor.
        alias = context.view_as(context)
        return BoundConditioner(lambda t, x: self.forward(t, x, alias), (*self.parameters(), alias))

    def extra_repr(self) -> str:
        blocks = f", block_dim={self.block_dim}" if self.block_dim > 1 else ""
        return f"{self.input_dim}, {self.hidden_dim}, context_dim={self.context_dim}{blocks}"


def _uniform(shape: Sequence[int], fan_in: float) -> Tensor:
    bound = 1 / math.sqrt(max(fan_in, 1))
    return torch.empty(*shape).uniform_(-bound, bound)


class _Offset(nn.Module):
    """
    Offset of the first layer by bias, time and context: the columns of one matrix, as every parameter costs an
    optimizer's call per step.

    :param int units: the number of units of the layer.
    :param int context_dim: the size of the context; 0 for none.
    """

    def __init__(self, units: int, context_dim: int) -> None:
        super().__init__()
        parts = [_uniform((units, 2), 1)]
        if context_dim:
            parts.append(_uniform((units, context_dim), context_dim))
        self.weight = nn.Parameter(torch.cat(parts, dim=1))

    def bind(self, context: Tensor | None, rate: float) -> tuple[Tensor, Tensor]:
        """``rate`` times the offset at time 0, of shape ``(units, 1 or *context_batch)``, and its slope."""
        bias, slope, weight = (self.weight * rate).split_with_sizes((1, 1, self.weight.shape[1] - 2), 1)
        return (bias if context is None else project(context, weight, bias)), slope


class _Layers(nn.Module):
    """
    Dense layers that act on each of ``groups`` groups with weights of their own: ``(groups, units, batch)``. The last
    column of each matrix is the bias.
    """

    def __init__(self, groups: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.weights = nn.ParameterList([nn.Parameter(_uniform((groups, out, inp + 1), inp)) for inp, out in pairs])

    def bind(self, s: Activation, masks: Sequence[Tensor] = ()) -> _BoundLayers:
        """The layers, masked, with the affine part of the activation worked in; see Activation."""
        bound = []
        for k, whole in enumerate(self.weights):
            weight, bias = (whole * s.rate).split_with_sizes((whole.shape[-1] - 1, 1), -1)
            if masks:
                weight = weight * masks[k]
            if s.shift:
                bias = torch.add(bias, weight.sum(-1, keepdim=True), alpha=s.shift)
            bound.append((bias, weight if s.scale == 1 else weight * s.scale))
        return _BoundLayers(s, bound)


class _BoundLayers:
    """
    Dense layers behind the units of a first one; see :class:`_Layers`.

    :ivar pairs: bias and weight of each layer, with shapes ``(groups, units, 1)`` and ``(groups, units, inputs)``.
    """

    def __init__(self, activation: Activation, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.activation = activation
        self.pairs = pairs
        self.tensors = tuple(chain.from_iterable(pairs))
        self._transposed = [weight.mT for _, weight in pairs]

    def evaluate(self, z: Tensor) -> tuple[Tensor, Saved]:
        """The units of the last layer for arguments of the first units with shape ``(groups, units, batch)``."""
        h = self.activation.apply(z)
        saved = [z, h]
        for bias, weight in self.pairs:
            z = torch.baddbmm(bias, weight, h)
            h = self.activation.apply(z)
            saved += [z, h]
        return h, tuple(saved)

    def vjp(self, saved: Saved, h_bar: Tensor) -> tuple[Tensor, Saved]:
        """The gradient of the first units' arguments, and for each layer its inputs and its arguments' gradient."""
        operands: list[Tensor] = []
        for k in range(len(self.pairs), 0, -1):
            z_bar = self.activation.vjp(h_bar, saved[2 * k])
            operands += [saved[2 * k - 1], z_bar]
            h_bar = torch.bmm(self._transposed[k - 1], z_bar)
        return self.activation.vjp(h_bar, saved[0]), tuple(operands)

    def accumulate(self, operands: Saved, sums: Sequence[Tensor]) -> None:
        """See :meth:`BoundConditioner.accumulate`."""
        for k in range(len(self.pairs)):
            h, z_bar = operands[-2 * k - 2 :][:2]
            sums[2 * k].add_(z_bar.sum(-1, keepdim=True))
            sums[2 * k + 1].baddbmm_(z_bar, h.mT)


def _from_columns(h: Tensor, batch_shape: Sequence[int]) -> Tensor:
    """``(d, d_h, batch)`` to ``(*batch, d, d_h)``, a view."""
    return h.permute(2, 0, 1).view(*batch_shape, *h.shape[:2])


class GroupedConditioner(Conditioner):
    r"""
    The general conditioner: d separate networks :math:`c_i(t, x_{-i}, \text{context})`, evaluated together. The first
    layer of network i sees x with its own coordinate masked out; the later ones are d independent dense layers, one
    batched matrix product each. It costs :math:`O(d^2)` operations a sample: the best choice up to a few hundred
    dimensions. Of blocks of coordinates each has a network, whose first layer masks the block.

    :param int input_dim: the number d of coordinates.
    :param hidden_dims: widths of each coordinate's layers; the last one is d_h.
    :param int context_dim: the size of the context; 0 for none.
    :param str activation: "tanh", "softplus" or "silu".
    :param int block_dim: the number of coordinates of a block.
    """

    mask: Tensor
    streams = 1

    @closest_keywords()
    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        context_dim: int = 0,
        *,
        activation: str = "tanh",
        block_dim: int = 1,
    ) -> None:
        widths = check_widths(hidden_dims, of="a grouped conditioner")
        super().__init__(input_dim, widths[-1], context_dim, block_dim)
        self.groups = groups = input_dim // block_dim
        self._activation = get_activation(activation)
        self.weight = nn.Parameter(_uniform((groups * widths[0], input_dim), input_dim))
        self.offset = _Offset(groups * widths[0], context_dim)
        self.layers = _Layers(groups, widths)
        own = torch.eye(groups, dtype=self.weight.dtype).repeat_interleave(block_dim, dim=1)
        mask = self._activation.rate * (1 - own)
        self.register_buffer("mask", mask.repeat_interleave(widths[0], dim=0), persistent=False)

    def bind(self, context: Tensor | None = None) -> BoundConditioner:
        """See :meth:`Conditioner.bind`."""
        return BoundDense(self, self.weight * self.mask, self.layers.bind(self._activation), context)


class BoundDense(BoundConditioner):
    """
    A conditioner of dense layers, of which the first sees all of x and the later ones act on each of several groups
    with weights of their own; see :class:`GroupedConditioner` and :class:`MaskedConditioner`.

    :ivar weight: of the first layer, with shape ``(groups * units, d + 1)``; its last column belongs to time.
    :ivar offset: of the first layer, with shape ``(groups * units, 1 or *context_batch)``.
    :ivar layers: the later layers.
    :ivar groups: their number.
    :ivar streams: the number of groups that each coordinate gets a part of its hidden units from.
    """

    trust = 1.0
    # The parts of the weight, once flattened.
    _matrix: Tensor
    _transposed: Tensor
    _slope: Tensor

    def __init__(
        self,
        net: GroupedConditioner | MaskedConditioner,
        weight: Tensor,
        layers: _BoundLayers,
        context: Tensor | None,
    ) -> None:
        self.activation = s = net._activation
        self.offset, slope = net.offset.bind(context, s.rate)
        self.weight = torch.cat([weight, slope], dim=1)
        self.layers = layers
        self.groups = net.groups
        self.streams = net.streams
        self.tensors = (self.weight, self.offset, *layers.tensors)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        # Time may be one per sample: a row of the input instead of a part of the offset.
        inputs = x.reshape(-1, x.shape[-1]).mT
        inputs = torch.cat([inputs, flatten_time(t, x).expand(1, inputs.shape[1])])
        z = torch.addmm(flatten_offset(self.offset, 1, x.shape[:-1]), self.weight, inputs)
        h, _ = self.layers.evaluate(z.unflatten(0, (self.groups, -1)))
        return _from_columns(h if self.streams == 1 else self._by_coordinate(h), x.shape[:-1])

    def flattened(self, batch_shape: torch.Size) -> BoundDense:
        """See :meth:`BoundConditioner.flattened`."""
        bound = copy.copy(self)
        bound.offset = flatten_offset(self.offset, 1, batch_shape)
        bound.tensors = (self.weight, bound.offset, *self.layers.tensors)
        bound._matrix, bound._slope = self.weight.split([self.weight.shape[1] - 1, 1], dim=1)
        bound._transposed = bound._matrix.mT
        return bound

    def evaluate(self, t: float, x: Tensor) -> tuple[Tensor, Saved]:
        """See :meth:`BoundConditioner.evaluate`."""
        z = torch.addmm(torch.add(self.offset, self._slope, alpha=t), self._matrix, x)
        h, saved = self.layers.evaluate(z.view(self.groups, -1, x.shape[1]))
        return h if self.streams == 1 else self._by_coordinate(h), (x, *saved)

    def vjp(self, saved: Saved, h_bar: Tensor, x_bar: Tensor) -> tuple[Tensor, Saved]:
        """See :meth:`BoundConditioner.vjp`."""
        z_bar, operands = self.layers.vjp(saved[1:], h_bar if self.streams == 1 else self._by_group(h_bar))
        z_bar = z_bar.flatten(0, 1)
        return torch.addmm(x_bar, self._transposed, z_bar), (saved[0], z_bar, *operands)

    def accumulate(self, times: Tensor, operands: Saved, sums: Sequence[Tensor]) -> None:
        """See :meth:`BoundConditioner.accumulate`."""
        (x, z_bar, *later), (weight_bar, offset_bar, *others) = operands, sums
        weight_bar[:, :-1].addmm_(z_bar, x.mT)
        add_offset(offset_bar, weight_bar[:, -1:], z_bar, times)
        self.layers.accumulate(tuple(later), others)

    def _by_coordinate(self, h: Tensor) -> Tensor:
        """``(groups, units, batch)`` to ``(d, d_h, batch)``, to which each stream contributes a part of d_h."""
        d = self.weight.shape[1] - 1
        return h.unflatten(1, (d, h.shape[1] // d)).transpose(0, 1).flatten(1, 2)

    def _by_group(self, h: Tensor) -> Tensor:
        """The inverse of :meth:`_by_coordinate`."""
        return h.unflatten(1, (self.streams, h.shape[1] // self.streams)).transpose(0, 1).flatten(1, 2)


class MaskedConditioner(Conditioner):
    r"""
    Two masked autoregressive streams of opposite order, :math:`h_i = [l_i(x_{<i}), r_i(x_{>i})]`. Left and right
    coordinates are mixed in the transformer only; in return all coordinates share their layers, and the cost does not
    grow with :math:`d \, d_h^2`.

    :param int input_dim: the number d of coordinates.
    :param hidden_dims: widths of each stream's layers, none below d, and at the end the even d_h, to which both
        streams contribute one half.
    :param int context_dim: the size of the context; 0 for none.
    :param str activation: "tanh", "softplus" or "silu".

    References:

    [1] Mathieu Germain, Karol Gregor, Iain Murray, Hugo Larochelle.
    MADE: Masked Autoencoder for Distribution Estimation. [arXiv:1502.03509]
    """

    groups = streams = 2

    @closest_keywords()
    def __init__(
        self, input_dim: int, hidden_dims: Sequence[int], context_dim: int = 0, *, activation: str = "tanh"
    ) -> None:
        widths = check_widths(hidden_dims, of="a masked conditioner")
        if len(widths) < 2 or min(widths[:-1]) < input_dim or widths[-1] % 2:
            raise ValueError(
                "hidden_dims of a masked conditioner must be layer widths of at least input_dim and, at the end, the "
                f"even number of hidden units per coordinate, but got {widths} for input_dim {input_dim}"
            )
        super().__init__(input_dim, widths[-1], context_dim)
        self._activation = get_activation(activation)
        units = [*widths[:-1], input_dim * widths[-1] // 2]
        self.weight = nn.Parameter(_uniform((2 * units[0], input_dim), input_dim))
        self.offset = _Offset(2 * units[0], context_dim)
        self.layers = _Layers(2, units)
        # A unit of degree m sees the first m coordinates of its stream; degree 0 carries time and context alone.
        order = torch.arange(input_dim)
        degrees = [torch.stack([order, order.flip(0)]) + 1]
        degrees += [(torch.arange(width) % input_dim).expand(2, -1) for width in widths[:-1]]
        degrees += [(degrees[0] - 1).repeat_interleave(widths[-1] // 2, dim=1)]
        for k, (inp, out) in enumerate(zip(degrees[:-1], degrees[1:], strict=True)):
            mask = (out.unsqueeze(2) >= inp.unsqueeze(1)).to(self.weight.dtype)
            self.register_buffer(f"mask_{k}", mask, persistent=False)

    def bind(self, context: Tensor | None = None) -> BoundConditioner:
        """See :meth:`Conditioner.bind`."""
        first, *masks = (self.get_buffer(f"mask_{k}") for k in range(1 + len(self.layers.weights)))
        weight = self.weight * first.flatten(0, 1) * self._activation.rate
        return BoundDense(self, weight, self.layers.bind(self._activation, masks), context)


class LeaveOneOutConditioner(Conditioner):
    r"""
    Exclusive pooling of features of the single coordinates,

        :math:`h_i = \psi_i\Bigl(\sum_{j \ne i} V_j \, s(u_j x_j + c_j)\Bigr)`,

    with the sum taken as a product with a matrix of ones whose diagonal is zero, so that the diagonal of its Jacobian
    is zero to the bit (a total minus a part is not); in parts, so that its cost is linear in d. Blocks of coordinates
    have features of a block, with matrices :math:`u_j`.

    :param int input_dim: the number d of coordinates.
    :param hidden_dims: the number of features of a coordinate, then widths of the layers :math:`\psi_i` behind the sum;
        the last one is d_h.
    :param int context_dim: the size of the context; 0 for none.
    :param str activation: "tanh", "softplus" or "silu".
    :param int block_dim: the number of coordinates of a block.
    """

    others: Tensor

    @closest_keywords()
    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        context_dim: int = 0,
        *,
        activation: str = "tanh",
        block_dim: int = 1,
    ) -> None:
        widths = check_widths(hidden_dims, of="a leave-one-out conditioner")
        super().__init__(input_dim, widths[-1], context_dim, block_dim)
        self._activation = get_activation(activation)
        width, groups = widths[0], input_dim // block_dim
        self.weight = nn.Parameter(torch.randn(groups, width, block_dim))
        self.offset = _Offset(groups * width, context_dim)
        self.pool_weight = nn.Parameter(_uniform((groups, width, width), width * (groups - 1)))
        self.pool_offset = _Offset(groups * width, context_dim)
        self.layers = _Layers(groups, widths)
        others = 1 - torch.eye(min(groups, _BLOCK), dtype=self.weight.dtype)
        self.register_buffer("others", others, persistent=False)

    def bind(self, context: Tensor | None = None) -> BoundConditioner:
        """See :meth:`Conditioner.bind`."""
        return BoundLeaveOneOut(self, context)


class BoundLeaveOneOut(BoundConditioner):
    """
    A conditioner that pools the features of the other coordinates; see :class:`LeaveOneOutConditioner`.

    :ivar weight: of the features, with shape ``(groups, features, block_dim)``.
    :ivar inner: offset of the features at time 0, with shape ``(groups * features, 1 or *context_batch)``, and its
        slope.
    :ivar outer: the same of the pooled features.
    :ivar pool_weight: the matrices V_j, with shape ``(groups, features, features)``.
    :ivar shift: a part of the outer offset, by the shift of the activation.
    :ivar others: ones with a diagonal of zeros, for the sums over the other coordinates.
    """

    trust = 0.5
    streams = 1
    _offset: Tensor  # the outer one and the shift, once flattened

    def __init__(self, net: LeaveOneOutConditioner, context: Tensor | None) -> None:
        self.activation = s = net._activation
        self.groups = len(net.weight)
        self.weight = net.weight * s.rate
        self.inner = net.offset.bind(context, s.rate)
        self.outer = net.pool_offset.bind(context, s.rate)
        self.pool_weight = net.pool_weight * (s.rate * s.scale)
        self.others = net.others
        self.shift = _sum_of_others(net.pool_weight.sum(-1, keepdim=True), self.others) * (s.rate * s.shift)
        self.layers = net.layers.bind(s)
        self.tensors = self._tensors()

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        h, _ = self.flattened(x.shape[:-1]).evaluate(flatten_time(t, x), columns(x))
        return _from_columns(h, x.shape[:-1])

    def flattened(self, batch_shape: torch.Size) -> BoundLeaveOneOut:
        """See :meth:`BoundConditioner.flattened`."""
        bound = copy.copy(self)
        bound.inner = flatten_offset(self.inner[0], 1, batch_shape), self.inner[1]
        bound.outer = flatten_offset(self.outer[0], 1, batch_shape), self.outer[1]
        bound._offset = bound.outer[0] + self.shift.view(-1, 1)
        bound.tensors = bound._tensors()
        return bound

    def _tensors(self) -> Saved:
        return self.weight, *self.inner, *self.outer, self.pool_weight, self.shift, *self.layers.tensors

    def evaluate(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Saved]:
        """See :meth:`BoundConditioner.evaluate`."""
        shape = (*self.weight.shape[:2], -1)
        offset, x = offset_at(*self.inner, t).view(shape), by_block(x, self.weight.shape[2])
        z = add_product(offset, self.weight, x)
        features = self.activation.apply(z)
        pooled = _sum_of_others(torch.bmm(self.pool_weight, features), self.others)
        h, saved = self.layers.evaluate(pooled + offset_at(self._offset, self.outer[1], t).view(shape))
        return h, (x, z, features, *saved)

    def vjp(self, saved: Saved, h_bar: Tensor, x_bar: Tensor) -> tuple[Tensor, Saved]:
        """See :meth:`BoundConditioner.vjp`."""
        x, z, features, *rest = saved
        outer_bar, operands = self.layers.vjp(tuple(rest), h_bar)
        pooled_bar = _sum_of_others(outer_bar, self.others)  # which is symmetric
        z_bar = self.activation.vjp(torch.bmm(self.pool_weight.mT, pooled_bar), z)
        x_bar = torch.baddbmm(by_block(x_bar, x.shape[1]), self.weight.mT, z_bar)
        return by_coordinate(x_bar), (x, z_bar, features, pooled_bar, outer_bar, *operands)

    def accumulate(self, times: Tensor, operands: Saved, sums: Sequence[Tensor]) -> None:
        """See :meth:`BoundConditioner.accumulate`."""
        x, z_bar, features, pooled_bar, outer_bar, *later = operands
        weight_bar, inner_bar, inner_slope, offset_bar, offset_slope, pool_bar, shift_bar, *others = sums
        weight_bar.baddbmm_(z_bar, x.mT)
        add_offset(inner_bar, inner_slope, z_bar.flatten(0, 1), times)
        add_offset(offset_bar, offset_slope, outer_bar.flatten(0, 1), times)
        pool_bar.baddbmm_(pooled_bar, features.mT)
        shift_bar.add_(outer_bar.sum(-1, keepdim=True))
        self.layers.accumulate(tuple(later), others)


def _sum_of_others(values: Tensor, others: Tensor) -> Tensor:
    """
    For each i the sum over j != i of ``values[j]``, to which ``values[i]`` contributes a zero.

    :param Tensor values: with shape ``(n, *)``.
    :param Tensor others: ones with a diagonal of zeros, a square of the size n or that of a block.
    """
    n, size = len(values), len(others)
    if n <= size:
        return torch.mm(others[:n, :n], values.flatten(1)).view_as(values)
    # The sum within blocks, and that over the other blocks.
    padded = torch.cat([values, values.new_zeros(-n % size, *values.shape[1:])])
    blocks = padded.view(-1, size, values[0].numel())
    far = _sum_of_others(blocks.sum(1), others)
    return torch.add(torch.matmul(others, blocks), far.unsqueeze(1)).view_as(padded)[:n]


#: The conditioners of this package, by name.
CONDITIONERS: dict[str, Callable[..., Conditioner]] = {
    "grouped": GroupedConditioner,
    "masked": MaskedConditioner,
    "leave-one-out": LeaveOneOutConditioner,
}
