# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Runge-Kutta steps of hollow fields in compiled code: see kernel.c."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyro_hollow.ops.stepper import Slope, Step, Tableau, Tolerances, Unsupported
from pyro_hollow.ops.vector_field import VectorField

from ..activations import ACTIVATIONS
from ..conditioner import BoundConditioner, BoundDense
from ..hollow_stepper import HollowStepper, Saved, Sums
from ..layout import rows
from ..transformer import BoundClosedForm, BoundTransformer
from .build import TYPES, library

__all__ = ["NativeStepper"]

# Of samples and weights; with more torch's matrix products are as fast, and use all cores.
_MAX_PRODUCTS = 4_000_000
_INT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p

#: The order of tensors in the structs of kernel.c.
_BOUND = ("weight", "offset", "term_weight", "term_time", "term_offset", "input_weight", "output_weight", "slopes")


class _Net(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("d", "batch", "depth", "width", "logistic_units", "logistic_terms")),
        *((name, _INT) for name in ("offset_columns", "term_columns")),
        ("max_rate", _DOUBLE),
        *((name, _POINTER) for name in ("units", "biases", "weights", *_BOUND)),
    ]


class _Sums(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("biases", "weights", *_BOUND)]


class _Tableau(ctypes.Structure):
    _fields_ = [("stages", _INT), *((name, _POINTER) for name in ("a", "b", "c", "error"))]


@cache
def _tableau(method: Tableau, with_error: bool) -> tuple[Any, tuple[Any, ...]]:
    """The coefficients, and what they point to."""
    stages = len(method.b)
    rows = [weight for row in method.a for weight in (*row, *(0.0,) * (stages - len(row)))]
    arrays = tuple((_DOUBLE * len(values))(*values) for values in (rows, method.b, method.c, method.error))
    addresses = [ctypes.addressof(array) for array in arrays]
    return ctypes.byref(_Tableau(stages, *addresses[:3], addresses[3] if with_error else None)), arrays


def _check(status: float) -> None:
    if status < 0:
        raise MemoryError("no memory for a solve in compiled code: use smaller batches")


def _addresses(tensors: list[Tensor]) -> Any:
    return (_POINTER * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


class NativeStepper(HollowStepper):
    """
    Steps of a hollow field in compiled code; see :class:`HollowStepper` for its parameters.

    :raises Unsupported: for a field that there is no compiled code for, or none that is faster.
    :raises RuntimeError: where nothing can be compiled.
    """

    name = "native"

    def __init__(
        self,
        tableau: Tableau,
        field: VectorField,
        conditioner: BoundConditioner,
        transformer: BoundTransformer,
        state: Saved,
    ) -> None:
        super().__init__(tableau, field, conditioner, transformer, state)
        units, terms = _supported(self._conditioner, self._transformer, self._batch_shape.numel())
        x = state[0]
        if x.dtype != units.weight.dtype or x.device != units.weight.device:
            raise RuntimeError(
                f"state must be {units.weight.dtype} on {units.weight.device}, but got {x.dtype} on {x.device}"
            )
        self._library = library(x.dtype)
        d, tanh = len(terms.weight), ACTIVATIONS["tanh"]
        widths = [len(units.weight) // d, *(weight.shape[1] for _, weight in units.layers.pairs)]
        biases, weights = ([pair[k].detach().contiguous() for pair in units.layers.pairs] for k in (0, 1))
        # In the order of _BOUND.
        tensors = [units.weight, units.offset, terms.weight, terms.time_weight, terms.offset]
        tensors += [terms.input_weight, terms.output_weight, terms.slopes]
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        arrays = (_INT * len(widths))(*widths), _addresses(biases), _addresses(weights)
        self._net = _Net(
            d,
            self._batch_shape.numel(),
            len(widths),
            terms.width,
            units.activation == tanh,
            terms.activation == tanh,
            units.offset.shape[-1],
            terms.offset.shape[-1],
            terms.max_rate or 0.0,
            *map(ctypes.addressof, arrays),
            *[tensor.data_ptr() for tensor in tensors],
        )
        self._alive: tuple[Any, ...] = biases, weights, tensors, arrays  # as long as C has their addresses

    def step(self, t: float, h: float, y: Tensor, first: Slope | None, tolerances: Tolerances | None) -> Step:
        """
        See :meth:`Stepper.step`.

        :raises MemoryError: if there is too little, here and below.
        """
        stages = len(self.tableau.b)
        states, slopes = y.new_empty(stages, *y.shape), y.new_empty(stages + 1, *y.shape)
        if first is not None:
            slopes[0] = first[0]
        end = torch.empty_like(y)
        square = self._library.step(
            ctypes.byref(self._net), _tableau(self.tableau, tolerances is not None)[0], t, h, y.data_ptr(),
            first is not None, states.data_ptr(), slopes.data_ptr(), end.data_ptr(), *(tolerances or (1.0, 1.0)),
        )  # fmt: skip
        _check(square)
        return Step(end, (states,), (slopes[0], ()), (slopes[-1], ()), math.sqrt(square))

    def step_vjp(self, t: float, h: float, saved: Saved, y_bar: Tensor, sums: Sums) -> Tensor:
        """See :meth:`DifferentiatedStepper.step_vjp`."""
        y_bar = y_bar.clone(memory_format=torch.contiguous_format)
        # By name, as C has nothing but addresses. Hooks of saved tensors may change strides.
        states, biases, weights = saved[0].contiguous(), _addresses(sums[0][2::2]), _addresses(sums[0][3::2])
        bound = [tensor.data_ptr() for tensor in (*sums[0][:2], *sums[1])]
        totals = _Sums(ctypes.addressof(biases), ctypes.addressof(weights), *bound)
        status = self._library.step_vjp(
            ctypes.byref(self._net), ctypes.byref(totals) if self.tensors else None,
            _tableau(self.tableau, False)[0], t, h, states.data_ptr(), y_bar.data_ptr(),
        )  # fmt: skip
        _check(status)
        return y_bar

    def step_score(self, t: float, h: float, saved: Saved, score: Tensor) -> Tensor:
        """See :meth:`Stepper.step_score`."""
        states = saved[0].contiguous()
        columns = score.reshape(-1, score.shape[-1]).mT.clone(memory_format=torch.contiguous_format)
        status = self._library.step_score(
            ctypes.byref(self._net), _tableau(self.tableau, False)[0], t, h, states.data_ptr(), columns.data_ptr()
        )
        _check(status)
        return rows(columns, self._batch_shape).contiguous()


def _supported(
    conditioner: BoundConditioner, transformer: BoundTransformer, batch: int
) -> tuple[BoundDense, BoundClosedForm]:
    """
    The parts of the field that there is compiled code for.

    :raises Unsupported: if there is none, or none that is faster.
    """
    if not isinstance(transformer, BoundClosedForm) or not isinstance(conditioner, BoundDense):
        raise Unsupported("there is compiled code for a grouped conditioner and a closed-form transformer alone")
    tensors = (*conditioner.tensors, *transformer.tensors)
    dtype, device = conditioner.weight.dtype, conditioner.weight.device
    d, width = conditioner.weight.shape[1] - 1, transformer.width
    matrices = [conditioner.weight, *(weight for _, weight in conditioner.layers.pairs), transformer.weight]
    known = [ACTIVATIONS[name] for name in ("silu", "tanh")]
    if conditioner.streams != 1:
        raise Unsupported("there is no compiled code for a masked conditioner")
    if conditioner.activation not in known or transformer.activation not in known:
        raise Unsupported("there is no compiled code for the activation 'softplus'")
    if any([tensor.dtype != dtype for tensor in tensors]):
        raise Unsupported("there is no compiled code for weights of several types")
    if dtype not in TYPES:
        raise Unsupported(f"there is no compiled code for {dtype}")
    if any([tensor.device.type != "cpu" for tensor in tensors]):
        raise Unsupported(f"there is no compiled code for the device type {device.type!r}")
    if (
        transformer.input_weight.shape != (d, width, 1)
        or transformer.output_weight.shape != (d, 1, width)
        or transformer.weight.shape[:2] != (d, width + 2)
    ):
        raise Unsupported("there is no compiled code for a transformer whose weights have other shapes")
    if batch * sum([matrix.numel() for matrix in matrices]) > _MAX_PRODUCTS:
        raise Unsupported("network and batch are too large for it to be faster")
    return conditioner, transformer
