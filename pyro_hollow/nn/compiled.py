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
from typing_extensions import Self

from .activations import ACTIVATIONS
from .tape import HollowTape

if TYPE_CHECKING:
    from .conditioner import BoundDense
    from .transformer import BoundClosedForm

__all__ = ["CompiledTape"]

_TYPES = {torch.float32: ("float", "uint32_t"), torch.float64: ("double", "uint64_t")}
# Of samples and weights; with more torch's matrix products are as fast, and use all cores.
_MAX_PRODUCTS = 4_000_000
_INT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class _Coefficients(Hashable, Protocol):
    """Coefficients of an explicit Runge-Kutta method; see :class:`pyro_hollow.ode.runge_kutta.Tableau`."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    error: tuple[float, ...]


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
def _tableau(method: _Coefficients, with_error: bool) -> tuple[Any, tuple[Any, ...]]:
    """The coefficients, and what they point to."""
    stages = len(method.b)
    rows = [weight for row in method.a for weight in (*row, *(0.0,) * (stages - len(row)))]
    arrays = tuple((_DOUBLE * len(values))(*values) for values in (rows, method.b, method.c, method.error))
    addresses = [ctypes.addressof(array) for array in arrays]
    return ctypes.byref(_Tableau(stages, *addresses[:3], addresses[3] if with_error else None)), arrays


def _compiler() -> list[str]:
    """The command that the environment variable CC names, or what there is."""
    if os.environ.get("CC"):
        try:
            return shlex.split(os.environ["CC"])
        except ValueError as error:
            raise RuntimeError(f"compile=True cannot read the environment variable CC: {error}") from error
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        raise RuntimeError(
            "compile=True needs a C compiler, but there is no cc, gcc or clang: install one, name yours in the "
            "environment variable CC, or leave compile=False"
        )
    return [found]


@cache
def _library(dtype: torch.dtype) -> ctypes.CDLL:
    """
    The compiled code for a type, once per process.

    :raises RuntimeError: without a C compiler, or when it fails.
    """
    real, integer = _TYPES[dtype]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "compiled.so")
        command = [*_compiler(), "-std=c11", "-O3", "-fno-fast-math", "-ffp-contract=fast", "-fPIC", "-shared"]
        command += [f"-DREAL={real}", f"-DUINT={integer}", str(Path(__file__).with_suffix(".c")), "-o", path, "-lm"]
        for options in (["-march=native"], []):  # which not all compilers know
            try:
                done = subprocess.run([*command, *options], capture_output=True, text=True)
            except OSError as error:
                raise RuntimeError(f"compile=True needs a C compiler, but {command[0]!r} cannot be run") from error
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"compile=True failed: {shlex.join(command)}\n{done.stderr}")
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(
                f"compile=True could compile, but not load the result: {error}. If programs must not be run from "
                "there, name another folder in the environment variable TMPDIR"
            ) from error
    library.step.restype = _DOUBLE
    library.step.argtypes = [*(_POINTER,) * 2, _DOUBLE, _DOUBLE, *(_POINTER,) * 2, _INT, *(_POINTER,) * 5]
    library.step.argtypes += [_DOUBLE, _DOUBLE]
    library.back.argtypes = [*(_POINTER,) * 3, _DOUBLE, _DOUBLE, *(_POINTER,) * 3]
    library.carry.argtypes = [*(_POINTER,) * 2, _DOUBLE, _DOUBLE, *(_POINTER,) * 2]
    return library


def _check(status: float) -> None:
    if status < 0:
        raise MemoryError("no memory for a solve in compiled code: use smaller batches")


def _addresses(tensors: list[Tensor]) -> Any:
    return (_POINTER * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class CompiledTape(HollowTape):
    """
    A tape that takes whole steps at once; see :class:`HollowTape` for its parameters.

    :raises RuntimeError: where nothing can be compiled.
    """

    takes_steps = True

    @staticmethod
    def obstacle(conditioner: BoundDense, transformer: BoundClosedForm, batch_shape: torch.Size) -> str:
        """Why there is no compiled code for a field, or none that is faster; empty if there is."""
        tensors = (*conditioner.tensors, *transformer.tensors)
        dtype, d, width = conditioner.weight.dtype, conditioner.weight.shape[1] - 1, transformer.width
        matrices = [conditioner.weight, *(weight for _, weight in conditioner.layers), transformer.weight]
        known = [ACTIVATIONS[name] for name in ("silu", "tanh")]
        if conditioner.streams != 1:
            return "there is no compiled code for a masked conditioner"
        if conditioner.activation not in known or transformer.activation not in known:
            return "there is no compiled code for the activation 'softplus'"
        if any(tensor.dtype != dtype for tensor in tensors):
            return "there is no compiled code for weights of several types"
        if dtype not in _TYPES:
            return f"there is no compiled code for {dtype}"
        if any(tensor.device.type != "cpu" for tensor in tensors):
            return f"there is no compiled code for the device type {conditioner.weight.device.type!r}"
        if (
            transformer.input_weight.shape != (d, width, 1)
            or transformer.output_weight.shape != (d, 1, width)
            or transformer.weight.shape[:2] != (d, width + 2)
        ):
            return "there is no compiled code for a transformer whose weights have other shapes"
        if batch_shape.numel() * sum(matrix.numel() for matrix in matrices) > _MAX_PRODUCTS:
            return "network and batch are too large for it to be faster"
        return ""

    def __init__(self, conditioner: BoundDense, transformer: BoundClosedForm, batch_shape: torch.Size) -> None:
        super().__init__(conditioner, transformer, batch_shape)
        own, terms, tanh = self._conditioner, self._transformer, ACTIVATIONS["tanh"]
        self._library = _library(conditioner.weight.dtype)
        d = len(transformer.weight)
        units = [len(conditioner.weight) // d, *(weight.shape[1] for _, weight in conditioner.layers)]
        biases, weights = ([pair[k].detach().contiguous() for pair in conditioner.layers] for k in (0, 1))
        tensors = [conditioner.weight, own._offset, terms._weight, terms._slope, terms._offset]
        tensors += [terms._input_weight, terms._output_weight, terms._slopes]
        tensors = [tensor.detach().contiguous() for tensor in tensors]
        arrays = (_INT * len(units))(*units), _addresses(biases), _addresses(weights)
        self._net = _Net(
            d,
            batch_shape.numel(),
            len(units),
            transformer.width,
            conditioner.activation == tanh,
            transformer.activation == tanh,
            own._offset.shape[-1],
            terms._offset.shape[-1],
            transformer.max_rate or 0.0,
            *map(ctypes.addressof, arrays),
            *(tensor.data_ptr() for tensor in tensors),
        )
        self._alive: tuple[Any, ...] = biases, weights, tensors, arrays  # as long as C has their addresses
        self._gradients: _Sums | None = None

    def renewed(self) -> Self:
        """See :meth:`HollowTape.renewed`."""
        tape = super().renewed()
        tape._gradients = None
        return tape

    def pack(self, x: Tensor) -> Tensor:
        """See :meth:`HollowTape.pack`."""
        like = self._bound[0]
        if x.dtype != like.dtype or x.device != like.device:
            raise RuntimeError(f"state must be {like.dtype} on {like.device}, but got {x.dtype} on {x.device}")
        return super().pack(x)

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
            divergence at the beginning and, with an estimate, at the end; the mean square of its ratio to the
            tolerance.
        :raises MemoryError: if there is too little, here and below.
        """
        stages = len(method.b)
        states, slopes = x.new_empty(stages, *x.shape), x.new_empty(stages + 1, *x.shape)
        integrands = x.new_empty(stages + 1, x.shape[1])
        if first is not None:
            slopes[0], integrands[0] = first
        x_end, integral_end = torch.empty_like(x), torch.empty_like(integral)
        tableau = _tableau(method, tolerances is not None)[0]
        outputs = (states, slopes, integrands, x_end, integral_end)
        square = self._library.step(
            ctypes.byref(self._net), tableau, t, h, x.data_ptr(), integral.data_ptr(),
            first is not None, *(tensor.data_ptr() for tensor in outputs), *(tolerances or (1.0, 1.0)),
        )  # fmt: skip
        _check(square)
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
        # By names, as C has nothing but addresses of them; hooks for saved tensors may change strides.
        states, integral_bar = states.contiguous(), integral_bar.contiguous()
        sums = ctypes.byref(self._sums()) if any(tensor.requires_grad for tensor in self._bound) else None
        status = self._library.back(
            ctypes.byref(self._net), sums, _tableau(method, False)[0], t, h, states.data_ptr(),
            x_bar.data_ptr(), integral_bar.data_ptr(),
        )  # fmt: skip
        _check(status)
        return x_bar

    def _sums(self) -> _Sums:
        """Buffers in which the gradients are added up."""
        if self._gradients is None:
            weight, offset, *pairs = self._conditioner.gradients()
            arrays = _addresses(pairs[::2]), _addresses(pairs[1::2])
            tensors = weight, offset, *self._transformer.sums()
            self._gradients = _Sums(*map(ctypes.addressof, arrays), *(tensor.data_ptr() for tensor in tensors))
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
        score, states = score.clone(memory_format=torch.contiguous_format), states.contiguous()
        status = self._library.carry(
            ctypes.byref(self._net), _tableau(method, False)[0], t, h, states.data_ptr(), score.data_ptr()
        )
        _check(status)
        return score
