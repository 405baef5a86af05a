# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Whole Runge-Kutta steps of hollow fields in compiled code: see compiled.c."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .tape import HollowTape

if TYPE_CHECKING:
    from .conditioner import BoundDense
    from .transformer import BoundClosedForm

__all__ = ["CompiledTape", "prepare"]

_TYPES = {torch.float32: ("float", "int32_t"), torch.float64: ("double", "int64_t")}
# Of samples and weights; with more torch's matrix products are as fast, and use all cores.
_MAX_PRODUCTS = 5_000_000
_INT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class _Coefficients(Hashable, Protocol):
    """Of an explicit Runge-Kutta method; see :class:`pyro_hollow.ode.runge_kutta.Tableau`."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...]


class _Net(ctypes.Structure):
    _fields_ = [
        *((name, _INT) for name in ("d", "batch", "depth", "width", "logistic_units", "logistic_terms")),
        *((name, _INT) for name in ("offset_columns", "term_columns")),
        ("max_rate", _DOUBLE),
        *((name, _POINTER) for name in ("units", "weight", "offset", "biases", "weights", "term_weight")),
        *((name, _POINTER) for name in ("term_slope", "term_offset", "input_weight", "output_weight", "slopes")),
    ]


class _Sums(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("weight", "offset", "biases", "weights", "term_weight")),
        *((name, _POINTER) for name in ("term_slope", "term_offset", "input_weight", "output_weight", "slopes")),
    ]


class _Tableau(ctypes.Structure):
    _fields_ = [("stages", _INT), *((name, _POINTER) for name in ("a", "b", "c", "error"))]


def _doubles(values: list[float]) -> Any:
    return (_DOUBLE * len(values))(*values)


@cache
def _tableau(method: _Coefficients) -> tuple[_Tableau, tuple[Any, ...]]:
    """The coefficients, and what they point to."""
    stages = len(method.b)
    rows = [weight for row in method.a for weight in (*row, *(0.0,) * (stages - len(row)))]
    arrays = tuple(_doubles(list(values)) for values in (rows, method.b, method.c, method.error))
    pointers = [ctypes.addressof(array) if len(array) else None for array in arrays]
    return _Tableau(stages, *pointers), arrays


def prepare(like: Tensor) -> None:
    """
    Compiles, where that was not done yet, what states of this type and on this device will need.

    :raises RuntimeError: without a C compiler, or when it fails.
    """
    if like.device.type == "cpu" and like.dtype in _TYPES:
        _library(like.dtype)


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled code for a type, once per process."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError(
            "compile=True needs a C compiler, but there is no cc, gcc or clang: install one, name yours in the "
            "environment variable CC, or leave compile=False"
        )
    real, integer = _TYPES[dtype]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "compiled.so")
        source = str(Path(__file__).with_suffix(".c"))
        command = [*shlex.split(compiler), "-std=c11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared"]
        command += [f"-DREAL={real}", f"-DINT={integer}", source, "-o", path, "-lm"]
        for options in (["-march=native"], []):  # which not all compilers know
            try:
                done = subprocess.run([*command, *options], capture_output=True, text=True)
            except OSError as error:
                raise RuntimeError(f"compile=True needs a C compiler, but {compiler!r} cannot be run") from error
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"compile=True failed: {shlex.join(command)}\n{done.stderr}")
        library = ctypes.CDLL(path)
    library.step.restype = _DOUBLE
    library.step.argtypes = [*(_POINTER,) * 2, _DOUBLE, _DOUBLE, *(_POINTER,) * 2, _INT, *(_POINTER,) * 5]
    library.step.argtypes += [_DOUBLE, _DOUBLE]
    library.back.restype = library.carry.restype = None
    library.back.argtypes = [*(_POINTER,) * 3, _DOUBLE, _DOUBLE, *(_POINTER,) * 3]
    library.carry.argtypes = [*(_POINTER,) * 2, _DOUBLE, _DOUBLE, *(_POINTER,) * 2]
    return library


def _addresses(tensors: list[Tensor]) -> Any:
    return (_POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class CompiledTape(HollowTape):
    """
    A tape that takes whole steps at once; see :class:`HollowTape` for its parameters.

    :raises RuntimeError: where nothing can be compiled.
    """

    @staticmethod
    def suits(conditioner: BoundDense, transformer: BoundClosedForm, batch_shape: torch.Size) -> bool:
        """Whether there is compiled code for a field, and it is faster."""
        known = [ACTIVATIONS[name] for name in ("silu", "tanh")]
        matrices = [conditioner.weight, *(weight for _, weight in conditioner.layers), transformer.weight]
        return (
            conditioner.streams == 1
            and conditioner.activation in known
            and transformer.activation in known
            and all(m.device.type == "cpu" and m.dtype in _TYPES and m.dtype == matrices[0].dtype for m in matrices)
            and batch_shape.numel() * sum(matrix.numel() for matrix in matrices) <= _MAX_PRODUCTS
        )

    def __init__(self, conditioner: BoundDense, transformer: BoundClosedForm, batch_shape: torch.Size) -> None:
        super().__init__(conditioner, transformer, batch_shape)
        own, terms = self._conditioner, self._transformer
        self._d, self._width = len(transformer.weight), transformer.width
        self._units = [len(conditioner.weight) // self._d, *(weight.shape[1] for _, weight in conditioner.layers)]
        self._batch = batch_shape.numel()
        self._library = _library(conditioner.weight.dtype)
        biases, weights = ([pair[k].detach().contiguous() for pair in conditioner.layers] for k in (0, 1))
        tensors = [conditioner.weight, own._offset]
        tensors += [
            terms._weight,
            terms._slope,
            terms._offset,
            terms._input_weight,
            terms._output_weight,
            terms._slopes,
        ]
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        arrays = (_INT * len(self._units))(*self._units), _addresses(biases), _addresses(weights)
        units, bias, weight = map(ctypes.addressof, arrays)
        first, offset, *others = (tensor.data_ptr() for tensor in tensors)
        tanh = ACTIVATIONS["tanh"]
        self._net = _Net(
            self._d,
            self._batch,
            len(self._units),
            self._width,
            conditioner.activation == tanh,
            transformer.activation == tanh,
            own._offset.shape[-1],
            terms._offset.shape[-1],
            transformer.max_rate or 0.0,
            units,
            first,
            offset,
            bias,
            weight,
            *others,
        )
        self._alive: tuple[Any, ...] = biases, weights, tensors, arrays
        self._gradients: _Sums | None = None

    def step(
        self,
        method: _Coefficients,
        t: float,
        h: float,
        x: Tensor,
        integral: Tensor,
        first: tuple[Tensor, Tensor] | None,
        tolerances: tuple[float, float] | None,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], float]:
        """
        Takes a step.

        :param method: the coefficients.
        :param float t: the time at its beginning.
        :param float h: its length.
        :param Tensor x: the state at its beginning, with shape ``(d, batch)``.
        :param Tensor integral: the integral of the divergence, with shape ``(batch,)``.
        :param first: f and the divergence there, if known.
        :param tolerances: relative and absolute, for an estimate of the error.
        :returns: state and integral at the end; the states of the stages, with shape ``(stages, d, batch)``; f and the
            divergence at the beginning and, with an estimate, at the end; the mean square of its ratio to
            the tolerance.
        """
        stages, like = len(method.b), x
        states = like.new_empty(stages, *x.shape)
        slopes, integrands = like.new_empty(stages + 1, *x.shape), like.new_empty(stages + 1, x.shape[1])
        if first is not None:
            slopes[0], integrands[0] = first
        x_end, integral_end = torch.empty_like(x), torch.empty_like(integral)
        tableau = _tableau(method)[0]
        if tolerances is None:
            tableau = _Tableau(stages, tableau.a, tableau.b, tableau.c, None)
        outputs = (states, slopes, integrands, x_end, integral_end)
        square = self._library.step(
            ctypes.byref(self._net), ctypes.byref(tableau), t, h, x.data_ptr(), integral.data_ptr(),
            first is not None, *(tensor.data_ptr() for tensor in outputs), *(tolerances or (1.0, 1.0)),
        )  # fmt: skip
        return x_end, integral_end, states, (slopes[0], integrands[0]), (slopes[-1], integrands[-1]), square

    def back(
        self, method: _Coefficients, t: float, h: float, states: Tensor, x_bar: Tensor, integral_bar: Tensor
    ) -> Tensor:
        """
        Pulls gradients back through a step; :meth:`gradients` gets its share.

        :param method: the coefficients.
        :param float t: the time at its beginning.
        :param float h: its length.
        :param Tensor states: those of its stages.
        :param Tensor x_bar: the gradient of the state at its end, with shape ``(d, batch)``.
        :param Tensor integral_bar: the gradient of the integral, with shape ``(batch,)``.
        :returns: the gradient of the state at its beginning.
        """
        x_bar = x_bar.clone(memory_format=torch.contiguous_format)
        self._library.back(
            ctypes.byref(self._net), ctypes.byref(self._sums()), ctypes.byref(_tableau(method)[0]), t, h,
            states.data_ptr(), x_bar.data_ptr(), integral_bar.contiguous().data_ptr(),
        )  # fmt: skip
        return x_bar

    def _sums(self) -> _Sums:
        """Where the gradients are added up."""
        if self._gradients is None:
            weight, offset, *pairs = self._conditioner.gradients()
            arrays = _addresses(pairs[::2]), _addresses(pairs[1::2])
            others = (tensor.data_ptr() for tensor in self._transformer.sums())
            self._gradients = _Sums(weight.data_ptr(), offset.data_ptr(), *map(ctypes.addressof, arrays), *others)
            self._alive += arrays
        return self._gradients

    def carry(self, method: _Coefficients, t: float, h: float, states: Tensor, score: Tensor) -> Tensor:
        """
        Carries a score through a step.

        :param method: the coefficients.
        :param float t: the time at its beginning.
        :param float h: its length.
        :param Tensor states: those of its stages.
        :param Tensor score: the score at its beginning, with shape ``(d, batch)``.
        """
        score = score.clone(memory_format=torch.contiguous_format)
        self._library.carry(
            ctypes.byref(self._net), ctypes.byref(_tableau(method)[0]), t, h, states.data_ptr(), score.data_ptr()
        )
        return score
