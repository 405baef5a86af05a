# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Hollow fields with their divergence, recorded and differentiated by hand.

Small networks are bound by the number of torch operations, not by arithmetic. By hand the backward pass of an
evaluation takes a fraction of the operations of automatic differentiation, and the gradients of the weights are taken
for many evaluations at a time. Tensors are coordinate-major, ``(d, units, batch)``, throughout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import Self

from .layout import columns, flatten_offset, rows

if TYPE_CHECKING:
    from .conditioner import BoundDense
    from .transformer import BoundClosedForm

__all__ = ["HollowTape"]

Gradients = list[Tensor]


def _zeros_like(tensors: Iterable[Tensor]) -> Gradients:
    return [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _add_offset(t: float, z_bar: Tensor, offset_bar: Tensor, slope_bar: Tensor) -> None:
    """Adds the gradients of the offset and its slope in ``z = ... + offset + t * slope``."""
    total = z_bar.sum(-1, keepdim=True)
    offset_bar += total if offset_bar.shape[-1] == 1 else z_bar
    slope_bar.add_(total, alpha=t)


class _DenseTape:
    def __init__(self, bound: BoundDense, batch_shape: torch.Size) -> None:
        self._bound = bound
        self._s = bound.activation
        self._d = bound.weight.shape[1] - 1
        self._weight, self._slope = bound.weight.split([self._d, 1], dim=1)
        self._offset = flatten_offset(bound.offset, 1, batch_shape)
        self._layers = bound.layers
        self._gradients: Gradients | None = None

    def renewed(self) -> _DenseTape:
        tape = copy.copy(self)
        tape._gradients = None
        return tape

    def record(self, t: float, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden units with shape ``(d, d_h, batch)``, and what pull needs."""
        z = torch.addmm(torch.add(self._offset, self._slope, alpha=t), self._weight, x)
        z = z.unflatten(0, (self._bound.groups, -1))
        h = self._s.apply(z)
        saved = [x, z, h]
        for bias, weight in self._layers:
            z = torch.baddbmm(bias, weight, h)
            h = self._s.apply(z)
            saved += [z, h]
        return self._bound.by_coordinate(h), tuple(saved)

    def pull(self, t: float, saved: tuple[Tensor, ...], h_bar: Tensor, accumulate: bool) -> Tensor:
        """The gradient of x from that of the hidden units."""
        x, *pairs = saved
        h_bar = self._bound.by_group(h_bar)
        for k in range(len(self._layers), 0, -1):
            z_bar = self._s.pull(h_bar, *pairs[2 * k : 2 * k + 2])
            if accumulate:
                bias_bar, matrix_bar = self.gradients()[2 * k : 2 * k + 2]
                matrix_bar.baddbmm_(z_bar, pairs[2 * k - 1].mT)
                bias_bar += z_bar.sum(-1, keepdim=True)
            h_bar = torch.bmm(self._layers[k - 1][1].mT, z_bar)
        z_bar = self._s.pull(h_bar, *pairs[:2]).flatten(0, 1)
        if accumulate:
            weight_bar, offset_bar = self.gradients()[:2]
            weight_bar[:, :-1].addmm_(z_bar, x.mT)
            _add_offset(t, z_bar, offset_bar, weight_bar[:, -1:])
        return self._weight.mT @ z_bar

    def gradients(self) -> Gradients:
        """Gradients of the bound tensors, with the offset still flattened."""
        if self._gradients is None:
            layers = chain.from_iterable(self._layers)
            self._gradients = _zeros_like(
                ((self._offset.new_empty(len(self._weight), self._d + 1)), self._offset, *layers)
            )
        return self._gradients


class _ClosedFormTape:
    def __init__(self, bound: BoundClosedForm, batch_shape: torch.Size) -> None:
        self._s = bound.activation
        self._width = bound.width
        self._max_rate = bound.max_rate
        self._weight, self._slope = bound.weight, bound.time_weight
        offset = flatten_offset(bound.offset, 2, batch_shape)
        p, b = offset.split([self._width + 1, 1], dim=1)
        self._offset = torch.cat([p, b + bound.shift], dim=1)
        self._input_weight, self._output_weight = bound.input_weight, bound.output_weight
        self._slopes = bound.slopes
        self._totals: Gradients | None = None

    def renewed(self) -> _ClosedFormTape:
        tape = copy.copy(self)
        tape._totals = None
        return tape

    def record(self, t: float, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """f and the divergence, with shapes ``(d, batch)`` and ``(batch,)``, and what pull needs."""
        p = torch.baddbmm(torch.add(self._offset, self._slope, alpha=t), self._weight, h)
        a = p[:, self._width]
        if self._max_rate is not None:
            a = torch.sigmoid(a).mul_(2.0 * self._max_rate).sub_(self._max_rate)
        z = torch.addcmul(p[:, : self._width], self._input_weight, x.unsqueeze(1))
        s = self._s.derivatives(z, 2)
        affine = torch.addcmul(p[:, self._width + 1], a, x)
        f = torch.baddbmm(affine.unsqueeze(1), self._output_weight, s[0]).squeeze(1)
        diagonal = torch.baddbmm(a.unsqueeze(1), self._slopes, s[1]).squeeze(1)
        return f, diagonal.sum(0), (x, h, a, *s)

    def pull(
        self, t: float, saved: tuple[Tensor, ...], f_bar: Tensor, divergence_bar: Tensor, accumulate: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x (the direct path alone) and of the hidden units."""
        x, h, a, value, slope, curvature = saved
        f_row = f_bar.unsqueeze(1)
        p_bar = x.new_empty(len(x), self._width + 2, x.shape[1])
        z_bar = torch.mul(self._slopes.mT * divergence_bar, curvature, out=p_bar[:, : self._width])
        z_bar.addcmul_(self._output_weight.mT * f_row, slope)
        a_bar = torch.addcmul(divergence_bar, f_bar, x, out=p_bar[:, self._width])
        if self._max_rate is not None:
            half = 0.5 * self._max_rate  # the slope of the gate is half - a^2 / (4 half)
            torch.addcmul(half * a_bar, a_bar * a, a, value=-0.25 / half, out=a_bar)
        p_bar[:, self._width + 1] = f_bar
        if accumulate:
            weight_bar, slope_bar, offset_bar, input_bar, output_bar, slopes_bar = self.sums()
            weight_bar.baddbmm_(p_bar, h.mT)
            _add_offset(t, p_bar, offset_bar, slope_bar)
            input_bar.baddbmm_(z_bar, x.unsqueeze(-1))
            output_bar.baddbmm_(f_row, value.mT)
            slopes_bar += slope @ divergence_bar
        x_bar = torch.baddbmm((f_bar * a).unsqueeze(1), self._input_weight.mT, z_bar).squeeze(1)
        return x_bar, torch.bmm(self._weight.mT, p_bar)

    def sums(self) -> Gradients:
        """Sums behind :meth:`gradients`, with those of the slopes by themselves."""
        if self._totals is None:
            tensors = (self._weight, self._slope, self._offset, self._input_weight, self._output_weight)
            self._totals = _zeros_like((*tensors, self._slopes.squeeze(1)))
        return self._totals

    def gradients(self) -> Gradients:
        """Gradients of the bound tensors, with the offset still flattened."""
        weight_bar, slope_bar, offset_bar, input_bar, output_bar, slopes_bar = self.sums()
        shift_bar = offset_bar[:, -1:].sum(-1, keepdim=True)
        row = slopes_bar.unsqueeze(1)
        input_bar = input_bar + (row * self._output_weight).mT
        output_bar = output_bar + row * self._input_weight.mT
        return [weight_bar, slope_bar, offset_bar, input_bar, output_bar, shift_bar]


class HollowTape:
    """
    Records evaluations of a grouped or masked conditioner and a closed-form transformer, and pulls gradients back
    through them.

    :param conditioner: the bound conditioner.
    :param transformer: the bound transformer.
    :param batch_shape: the batch shape ``(*,)`` of the states.
    """

    #: What kept it from being compiled, if that was asked for.
    reason = ""

    def __init__(self, conditioner: BoundDense, transformer: BoundClosedForm, batch_shape: torch.Size) -> None:
        self._batch_shape = batch_shape
        self._bound = (*conditioner.tensors, *transformer.tensors)
        self._conditioner = _DenseTape(conditioner, batch_shape)
        self._transformer = _ClosedFormTape(transformer, batch_shape)

    def renewed(self) -> Self:
        """Another one for the same network, without gradients."""
        tape = copy.copy(self)
        tape._conditioner, tape._transformer = self._conditioner.renewed(), self._transformer.renewed()
        return tape

    def pack(self, x: Tensor) -> Tensor:
        """``(*, d)`` to ``(d, batch)``."""
        return columns(x)

    def unpack(self, x: Tensor) -> Tensor:
        """``(d, batch)`` to ``(*, d)``."""
        return rows(x, self._batch_shape)

    def record(self, t: float, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """
        Evaluates the field.

        :param float t: time.
        :param Tensor x: the state with shape ``(d, batch)``.
        :returns: f, the divergence, and what :meth:`pull` needs.
        """
        h, saved = self._conditioner.record(t, x)
        f, divergence, own = self._transformer.record(t, x, h)
        return f, divergence, (*own, *saved)

    def pull(
        self,
        t: float,
        saved: tuple[Tensor, ...],
        f_bar: Tensor,
        divergence_bar: Tensor,
        accumulate: bool = True,
    ) -> Tensor:
        """
        Pulls gradients back through one evaluation.

        :param float t: time.
        :param saved: what :meth:`record` returned at the end.
        :param Tensor f_bar: the gradient of f with shape ``(d, batch)``.
        :param Tensor divergence_bar: the gradient of the divergence with shape ``(batch,)``.
        :param bool accumulate: whether :meth:`gradients` gets its share.
        :returns: the gradient of the state.
        """
        x_bar, h_bar = self._transformer.pull(t, saved[:6], f_bar, divergence_bar, accumulate)
        return x_bar + self._conditioner.pull(t, saved[6:], h_bar, accumulate)

    def gradients(self) -> tuple[Tensor, ...]:
        """The gradients, from all evaluations, of those bound tensors that require them."""
        gradients = [*self._conditioner.gradients(), *self._transformer.gradients()]
        return tuple(
            gradient if gradient.shape == tensor.shape else _unflatten(gradient, tensor, self._batch_shape)
            for gradient, tensor in zip(gradients, self._bound, strict=True)
            if tensor.requires_grad
        )


def _unflatten(gradient: Tensor, offset: Tensor, batch_shape: torch.Size) -> Tensor:
    """Undoes :func:`~pyro_hollow.nn.layout.flatten_offset` for the gradient of an offset."""
    lead = gradient.dim() - 1
    head, tail = offset.shape[:lead], offset.shape[lead:]
    missing = len(batch_shape) - len(tail)
    shape = batch_shape if gradient.shape[-1] == batch_shape.numel() else tail
    gradient = gradient.reshape(*head, *shape)
    return gradient.sum_to_size(*head, *(1,) * missing, *tail).reshape(offset.shape) if tail != shape else gradient
