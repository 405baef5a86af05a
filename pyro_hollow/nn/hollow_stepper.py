# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Runge-Kutta steps of hollow fields with their divergence, differentiated by hand, in torch."""

from __future__ import annotations

from functools import partial
from itertools import chain

import torch
from torch import Tensor

from pyro_hollow.ops.stepper import (
    AutogradStepper,
    DifferentiatedStepper,
    Slope,
    Step,
    Tableau,
    Tolerances,
    Unsupported,
    error_ratio,
    is_functional,
    weights,
)
from pyro_hollow.ops.vector_field import VectorField

from .conditioner import BoundConditioner
from .layout import by_coordinate, rows, unflatten_offset
from .transformer import BoundTransformer

__all__ = ["HollowStepper"]

Saved = tuple[Tensor, ...]
Sums = tuple[list[Tensor], list[Tensor]]
#: Of the transformer and of the conditioner.
Operands = list[Saved]

#: The largest size of a packed state for which the gradients of the weights are taken for all stages of a step at a
#: time. Beyond it, joining the stages costs more than it saves.
_JOINED = 512

_zeros = partial(torch.zeros_like, memory_format=torch.contiguous_format)
_side_by_side = partial(torch.cat, dim=-1)


class HollowStepper(DifferentiatedStepper):
    """
    Steps of a hollow field. Packed states have the shape ``(d + 1, batch)``, the integral of the divergence in the last
    row.

    :param Tableau tableau: the method.
    :param VectorField field: the field.
    :param conditioner: its conditioner.
    :param transformer: its transformer.
    :param state: the pair (x, integral) at the beginning, with shapes ``(*, d)`` and ``(*,)``.
    :raises Unsupported: for conditioners and transformers without derivatives by hand, under a transform of torch.func,
        and under autocast.
    """

    name = "hollow"

    def __init__(
        self,
        tableau: Tableau,
        field: VectorField,
        conditioner: BoundConditioner,
        transformer: BoundTransformer,
        state: Saved,
    ) -> None:
        super().__init__(tableau, field.tensors)
        if is_functional():
            raise Unsupported("the solve is transformed")
        if torch.is_autocast_enabled(state[0].device.type):
            raise Unsupported("autocast is on")
        self._field = field
        self._shapes = [part.shape for part in state]
        self._batch_shape = self._shapes[0][:-1]
        self._block = transformer.block_dim
        self.trust = conditioner.trust
        self._bound = (*conditioner.tensors, *transformer.tensors)
        with torch.no_grad():
            self._conditioner = conditioner.flattened(self._batch_shape)
            self._transformer = transformer.flattened(self._batch_shape)
        self._rows, self._columns = weights(tableau, state[0].dtype, state[0].device)

    def pack(self, state: Saved) -> Tensor:
        """``(d + 1, batch)``."""
        x, integral = state
        return torch.cat([x.reshape(-1, x.shape[-1]).mT, integral.reshape(1, -1)])

    def unpack(self, y: Tensor) -> Saved:
        """See :meth:`Stepper.unpack`."""
        return rows(y[:-1], self._batch_shape), y[-1].view(self._batch_shape)

    def step(
        self, t: float, h: float, y: Tensor, first: Slope | None, tolerances: Tolerances | None, keep: bool = True
    ) -> Step:
        """See :meth:`Stepper.step`."""
        times = [t + c * h for c in (*self.tableau.c, 1.0)]
        stages = len(times) - 1
        # All stages and the end in one tensor each, so that a stage takes one product and no view of its own.
        states, slopes = y.new_empty(stages + 1, *y.shape), y.new_zeros(stages + 1, *y.shape)
        states[0] = y
        start, flat, rest = y.view(-1), slopes.flatten(1).mT, states.flatten(1).unbind()
        x, f, divergence = states[:, :-1], slopes[:, :-1], slopes[:, -1:]
        blocks, f = (part.view(stages + 1, -1, self._block, y.shape[1]) for part in (x, f))
        parts = list(zip(x.unbind(), blocks.unbind(), f.unbind(), divergence.unbind(), strict=True))
        saved: list[Saved] = []
        if first is not None:
            slopes[0] = first[0]
            saved.append(first[1])
        for i, time in enumerate(times):
            if i:
                torch.addmv(start, flat, self._rows[i], alpha=h, out=rest[i])
            if i == len(saved) and (i < stages or tolerances is not None):
                x, block, f, divergence = parts[i]
                hidden, units = self._conditioner.evaluate(time, x)
                terms = self._transformer.evaluate(time, block, hidden, f, divergence)
                self._count = len(terms)
                saved.append((*terms, *units) if keep else ())
        end, kept, before = states[stages], tuple(chain.from_iterable(saved[:stages])), (slopes[0], saved[0])
        if tolerances is None:
            return Step(end, kept, before, None, 0.0)
        error = torch.addmv(start, flat, self._rows[-1], beta=0, alpha=h).view_as(y)
        ratio = error_ratio(error, y, end, (y.shape[0] - 1, 1), 0, tolerances)
        return Step(end, kept, before, (slopes[stages], saved[stages]), ratio)

    def _vjp(self, saved: Saved, f_bar: Tensor, divergence_bar: Tensor) -> tuple[Tensor, Saved, Saved]:
        """The gradient of x, and tensors for the gradients of the weights: the transformer's and the conditioner's."""
        direct, h_bar, operands = self._transformer.vjp(saved[: self._count], f_bar, divergence_bar)
        x_bar, others = self._conditioner.vjp(saved[self._count :], h_bar, by_coordinate(direct))
        return x_bar, operands, others

    def new_sums(self) -> Sums:
        """See :meth:`DifferentiatedStepper.new_sums`."""
        return list(map(_zeros, self._conditioner.tensors)), list(map(_zeros, self._transformer.tensors))

    def step_vjp(self, t: float, h: float, saved: Saved, y_bar: Tensor, sums: Sums) -> Tensor:
        """See :meth:`DifferentiatedStepper.step_vjp`."""
        b, c = self.tableau.b, self.tableau.c
        x_bar, integral_bar = y_bar[:-1], y_bar[-1]
        bars = y_bar.new_zeros(len(c), *x_bar.shape)  # the gradients of the states of the stages
        start, flat, rest = x_bar.view(-1), bars.flatten(1).mT, bars.unbind()
        shape = -1, self._block, y_bar.shape[1]
        divergence_bars = torch.outer(self._rows[len(c)] * h, integral_bar).unbind()
        times = y_bar.new_tensor([[t + x * h] for x in c]).expand(-1, y_bar.shape[1]).contiguous()
        operands: list[Operands] = []
        size = len(saved) // len(c)
        for i in reversed(range(len(c))):
            f_bar = torch.addmv(start, flat, self._columns[i], beta=h * b[i], alpha=h).view(shape)
            bar, *found = self._vjp(saved[i * size : (i + 1) * size], f_bar, divergence_bars[i])
            rest[i].copy_(bar)
            operands.insert(0, found)
            if y_bar.numel() > _JOINED:
                self._accumulate(times[i : i + 1], operands, sums)
                operands = []
        self._accumulate(times, operands, sums)
        return torch.cat([bars.sum(0).add_(x_bar), y_bar[-1:]])

    def _accumulate(self, times: Tensor, operands: list[Operands], sums: Sums) -> None:
        """Adds the gradients of the weights in several evaluations."""
        if operands and self.tensors:
            terms, units = operands[0]
            if len(operands) > 1:
                both = zip(*operands, strict=True)
                terms, units = [tuple(map(_side_by_side, zip(*each, strict=True))) for each in both]
            self._transformer.accumulate(times, terms, sums[1])
            self._conditioner.accumulate(times, units, sums[0])

    def gradients(self, sums: Sums) -> Saved:
        """See :meth:`DifferentiatedStepper.gradients`."""
        gradients = (*sums[0], *self._transformer.gradients(sums[1]))
        known: dict[int, Tensor] = {}
        for tensor, gradient in zip(self._bound, gradients, strict=True):
            if gradient.shape != tensor.shape:
                gradient = unflatten_offset(gradient, tensor, self._batch_shape)
            known[id(tensor)] = known[id(tensor)] + gradient if id(tensor) in known else gradient
        return tuple([known[id(tensor)] for tensor in self.tensors])

    def step_score(self, t: float, h: float, saved: Saved, score: Tensor) -> Tensor:
        """See :meth:`Stepper.step_score`."""
        start = score.reshape(-1, score.shape[-1]).mT.contiguous()
        one = start.new_ones(start.shape[1])
        slopes = start.new_zeros(len(self.tableau.b) + 1, *start.shape)
        flat, rest = slopes.flatten(1).mT, slopes.unbind()
        size = len(saved) // len(self.tableau.b)
        for i in range(len(self.tableau.b)):
            stage = torch.addmv(start.view(-1), flat, self._rows[i], alpha=-h).view(-1, self._block, start.shape[1])
            rest[i].copy_(self._vjp(saved[i * size : (i + 1) * size], stage, one)[0])
        end = torch.addmv(start.view(-1), flat, self._rows[-2], alpha=-h).view_as(start)
        return rows(end, self._batch_shape).contiguous()

    def recorded(self) -> AutogradStepper:
        """See :meth:`DifferentiatedStepper.recorded`."""
        return AutogradStepper(self.tableau, self._field.augmented, self._shapes)
