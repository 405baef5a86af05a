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

from ..conditioner import BoundConditioner, BoundDense, BoundLeaveOneOut
from ..graph_conditioner import BoundGraph
from ..hollow_stepper import HollowStepper, Saved
from ..transformer import BoundClosedForm, BoundTransformer
from .build import TYPES, library
from .packing import Packed, empty

__all__ = ["NativeStepper"]

_INT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
#: The fewest products of weights and samples in an evaluation that are worth a thread, which has to be woken.
_PRODUCTS_OF_A_THREAD = 500_000


class _Net(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("d", "batch", "groups", "streams", "depth", "width")),
        *((name, _INT) for name in ("features", "neighbours")),
        *((name, _INT) for name in ("logistic_units", "logistic_terms", "offset_rows", "inner_rows", "term_rows")),
        ("threads", _INT),
        ("max_rate", _DOUBLE),
        *((name, _POINTER) for name in ("units", "index", "hubs", "tensors", "transposed")),
    ]


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


def _by_row(offset: Tensor, groups: int) -> Tensor:
    """``(groups * units, 1 or batch)`` to ``(1 or batch, groups, units)``."""
    return offset.unflatten(0, (groups, -1)).movedim(-1, 0)


def _by_column(offset: Tensor) -> Tensor:
    """The inverse of :func:`_by_row`."""
    return offset.flatten(1).mT


Tensors = dict[str, Tensor]


class _Dense:
    """The tensors of a :class:`BoundDense` by their names in kernel.c, and their gradients in its own order."""

    @staticmethod
    def to_native(bound: BoundDense) -> Tensors:
        weight, slope = bound.weight.unflatten(0, (bound.groups, -1)).tensor_split([-1], dim=2)
        return {"FRONT": weight, "OFFSET": _by_row(bound.offset, bound.groups), "SLOPE": slope.mT}

    @staticmethod
    def to_torch(sums: Tensors) -> list[Tensor]:
        return [torch.cat([sums["FRONT"], sums["SLOPE"].mT], dim=2).flatten(0, 1), _by_column(sums["OFFSET"])]


class _Graph:
    """The same for a :class:`BoundGraph`."""

    @staticmethod
    def to_native(bound: BoundGraph) -> Tensors:
        d, units, _ = bound.weight.shape
        hubs = {} if bound.hub_weight is None else {"HUBS": bound.hub_weight.view(-1, units, d)}
        return {
            "FRONT": bound.weight, "OFFSET": _by_row(bound.offset, d), "SLOPE": bound.slope.view(d, 1, -1), **hubs
        }  # fmt: skip

    @staticmethod
    def to_torch(sums: Tensors) -> list[Tensor]:
        hubs = [] if sums["HUBS"] is None else [sums["HUBS"].flatten(0, 1)]
        return [sums["FRONT"], *hubs, _by_column(sums["OFFSET"]), sums["SLOPE"].reshape(-1, 1)]


class _LeaveOneOut:
    """The same for a :class:`BoundLeaveOneOut`."""

    @staticmethod
    def to_native(bound: BoundLeaveOneOut) -> Tensors:
        d = bound.groups
        return {
            "FRONT": bound.pool_weight,
            "OFFSET": _by_row(bound.outer[0], d) + bound.shift.squeeze(-1),
            "SLOPE": bound.outer[1].view(d, 1, -1),
            "FEATURE": bound.weight.mT,
            "INNER_OFFSET": _by_row(bound.inner[0], d),
            "INNER_SLOPE": bound.inner[1].view(d, 1, -1),
        }

    @staticmethod
    def to_torch(sums: Tensors) -> list[Tensor]:
        offset = sums["OFFSET"]
        inner = _by_column(sums["INNER_OFFSET"]), sums["INNER_SLOPE"].reshape(-1, 1)
        outer = _by_column(offset), sums["SLOPE"].reshape(-1, 1)
        return [sums["FEATURE"].mT, *inner, *outer, sums["FRONT"], offset.sum(0).unsqueeze(-1)]


_KINDS: dict[type[BoundConditioner], Any] = {
    BoundDense: _Dense, BoundGraph: _Graph, BoundLeaveOneOut: _LeaveOneOut
}  # fmt: skip
#: The tensors of kernel.c, in its order; behind them, bias and weight of each of the later layers.
_NAMES = (
    "FRONT", "OFFSET", "SLOPE", "HUBS", "FEATURE", "INNER_OFFSET", "INNER_SLOPE",
    "TERMS", "TERM_OFFSET", "TERM_SLOPE", "INPUT", "OUTPUT", "SLOPES",
)  # fmt: skip
_MATRICES = ("FRONT", "HUBS", "TERMS")


class NativeStepper(HollowStepper):
    """
    Steps of a hollow field in compiled code; see :class:`HollowStepper` for its parameters. Packed states have the
    shape ``(batch, d + 1)``, the integral of the divergence in the last column.

    :raises Unsupported: for a field that there is no compiled code for.
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
        _check_support(conditioner, transformer)
        super().__init__(tableau, field, conditioner, transformer, state)
        units: Any = self._conditioner
        terms: Any = self._transformer
        x, batch = state[0], self._batch_shape.numel()
        if x.dtype != terms.weight.dtype or x.device != terms.weight.device:
            raise RuntimeError(
                f"state must be {terms.weight.dtype} on {terms.weight.device}, but got {x.dtype} on {x.device}"
            )
        self._library = library(x.dtype)
        self._kind = _KINDS[type(units)]
        with torch.no_grad():
            tensors: Tensors = {
                **self._kind.to_native(units),
                "TERMS": terms.weight, "TERM_OFFSET": terms.offset.movedim(-1, 0), "TERM_SLOPE": terms.time_weight.mT,
                "INPUT": terms.input_weight.mT, "OUTPUT": terms.output_weight, "SLOPES": terms.slopes,
            }  # fmt: skip
            none = x.new_empty(1, 1, 0)
            ordered = [tensors.get(name, none) for name in _NAMES]
            for bias, weight in units.layers.pairs:
                ordered += [bias.mT, weight]
        matrices = (*map(_NAMES.index, _MATRICES), *range(len(_NAMES) + 1, len(ordered), 2))
        self._packed = Packed(self._library, ordered, matrices)
        d, _, width = terms.slopes.shape
        widths = [tensors["OFFSET"].shape[2], *[weight.shape[1] for _, weight in units.layers.pairs]]
        products = batch * sum([ordered[k].numel() for k in matrices])
        self._widths, self._graph = (_INT * len(widths))(*widths), _graph(units)
        graph = self._graph or [none, none]
        self._net = _Net(
            d, batch, units.groups, units.streams, len(widths), width,
            tensors.get("FEATURE", none).shape[2], graph[0].shape[-1],
            units.activation.name == "tanh", terms.activation.name == "tanh",
            *[tensors.get(name, none).shape[0] for name in ("OFFSET", "INNER_OFFSET", "TERM_OFFSET")],
            max(1, min(torch.get_num_threads(), products // _PRODUCTS_OF_A_THREAD)), terms.max_rate or 0.0,
            ctypes.addressof(self._widths), *[tensor.data_ptr() for tensor in graph],
            *map(ctypes.addressof, (self._packed.copies, self._packed.transposed)),
        )  # fmt: skip
        self._size: int = batch * self._library.saved_size(ctypes.byref(self._net))

    def pack(self, state: Saved) -> Tensor:
        """``(batch, d + 1)``."""
        x, integral = state
        return torch.cat([x.reshape(-1, x.shape[-1]), integral.reshape(-1, 1)], dim=1)

    def unpack(self, y: Tensor) -> Saved:
        """See :meth:`Stepper.unpack`."""
        return y[:, :-1].reshape(self._shapes[0]), y[:, -1].reshape(self._batch_shape)

    def step(
        self, t: float, h: float, y: Tensor, first: Slope | None, tolerances: Tolerances | None, keep: bool = True
    ) -> Step:
        """
        See :meth:`Stepper.step`.

        :raises MemoryError: if there is too little, here and below.
        """
        stages = len(self.tableau.b)
        evaluations = stages + (tolerances is not None)
        states, slopes = y.new_empty(stages, *y.shape), y.new_empty(evaluations, *y.shape)
        # What the evaluations keep; the first one may have been made in another step.
        known: Saved = (empty(self._size, y.dtype),) if keep and first is None else ()
        later: Saved = (empty((evaluations - 1) * self._size, y.dtype).view(-1, self._size),) if keep else ()
        if first is not None:
            slopes[0], known = first
        end = torch.empty_like(y)
        square = self._library.step(
            ctypes.byref(self._net), _tableau(self.tableau, tolerances is not None)[0], t, h, y.data_ptr(),
            first is not None, states.data_ptr(), slopes.data_ptr(), self._addresses(*known, *later) if keep else None,
            end.data_ptr(), *(tolerances or (1.0, 1.0)),
        )  # fmt: skip
        _check(square)
        last = None if tolerances is None else (slopes[-1], tuple([each[-1] for each in later]))
        return Step(end, (states, *known, *later), (slopes[0], known), last, math.sqrt(square))

    def _addresses(self, first: Tensor, later: Tensor) -> Any:
        """The addresses of what the first evaluation of a step keeps, and the later ones."""
        begin, size = later.data_ptr(), self._size * later.element_size()
        return (_POINTER * (1 + len(later)))(first.data_ptr(), *[begin + k * size for k in range(len(later))])

    def new_sums(self) -> Any:
        """See :meth:`DifferentiatedStepper.new_sums`."""
        return self._packed.new_sums()

    def step_vjp(self, t: float, h: float, saved: Saved, y_bar: Tensor, sums: Any) -> Tensor:
        """See :meth:`DifferentiatedStepper.step_vjp`."""
        y_bar = y_bar.clone(memory_format=torch.contiguous_format)
        states, *kept = [tensor.contiguous() for tensor in saved]  # hooks of saved tensors may change strides
        status = self._library.step_vjp(
            ctypes.byref(self._net), self._packed.addresses(sums) if self.tensors else None,
            _tableau(self.tableau, False)[0], t, h, states.data_ptr(), self._addresses(*kept), y_bar.data_ptr(),
        )  # fmt: skip
        _check(status)
        return y_bar

    def gradients(self, sums: Any) -> Saved:
        """See :meth:`DifferentiatedStepper.gradients`."""
        views: list[Any] = self._packed.views(sums)
        tensors = dict(zip(_NAMES, views, strict=False))
        later = views[len(_NAMES) :]
        layers = [sum_ if k % 2 else sum_.mT for k, sum_ in enumerate(later)]
        terms = [
            tensors["TERMS"], tensors["TERM_SLOPE"].mT, tensors["TERM_OFFSET"].movedim(0, -1),
            tensors["INPUT"].mT, tensors["OUTPUT"], tensors["SLOPES"],
        ]  # fmt: skip
        return super().gradients(([*self._kind.to_torch(tensors), *layers], terms))

    def step_score(self, t: float, h: float, saved: Saved, score: Tensor) -> Tensor:
        """See :meth:`Stepper.step_score`."""
        states, *kept = [tensor.contiguous() for tensor in saved]
        carried = score.clone(memory_format=torch.contiguous_format)
        status = self._library.step_score(
            ctypes.byref(self._net), _tableau(self.tableau, False)[0], t, h, states.data_ptr(), self._addresses(*kept),
            carried.data_ptr(),
        )  # fmt: skip
        _check(status)
        return carried


def _graph(conditioner: BoundConditioner) -> list[Tensor]:
    """The neighbours of each coordinate, and its row among the hubs or -1, if there is a graph."""
    if not isinstance(conditioner, BoundGraph):
        return []
    index, hubs = conditioner.index, conditioner.hubs
    rows = index.new_full(index.shape[:1], -1)
    rows[hubs] = torch.arange(len(hubs), device=index.device)
    return [index.contiguous(), rows]


def _check_support(conditioner: BoundConditioner, transformer: BoundTransformer) -> None:
    """
    :raises Unsupported: for a field that there is no compiled code for.
    """
    if not isinstance(transformer, BoundClosedForm) or type(conditioner) not in _KINDS:
        raise Unsupported("there is compiled code for the conditioners by name and a closed-form transformer alone")
    if transformer.block_dim > 1:
        raise Unsupported(f"there is no compiled code for block_dim={transformer.block_dim}")
    units: Any = conditioner
    tensors = (*conditioner.tensors, *transformer.tensors)
    dtype, device = transformer.weight.dtype, transformer.weight.device
    if not {units.activation.name, transformer.activation.name} <= {"silu", "tanh"}:
        raise Unsupported("there is no compiled code for the activation 'softplus'")
    if any([tensor.dtype != dtype for tensor in tensors]):
        raise Unsupported("there is no compiled code for weights of several types")
    if dtype not in TYPES:
        raise Unsupported(f"there is no compiled code for {dtype}")
    if any([tensor.device.type != "cpu" for tensor in tensors]):
        raise Unsupported(f"there is no compiled code for the device type {device.type!r}")
    d, width = len(transformer.weight), transformer.width
    if (
        transformer.input_weight.shape != (d, width, 1)
        or transformer.output_weight.shape != (d, 1, width)
        or transformer.weight.shape[:2] != (d, width + 2)
    ):
        raise Unsupported("there is no compiled code for a transformer whose weights have other shapes")
