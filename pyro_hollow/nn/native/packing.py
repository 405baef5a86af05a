# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Memory for kernel.c, and tensors as it reads them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed", "empty"]

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_ALIGNMENT = 64
#: The bytes from which on memory is worth keeping.
_LEAST = 1 << 16
#: Together, blocks of memory that wait to be used again take no more bytes.
_MOST = 1 << 28
_waiting: dict[int, bytearray] = {}


def _keep(block: bytearray) -> None:
    _waiting[id(block)] = block
    while sum(map(len, list(_waiting.values()))) > _MOST:
        _waiting.pop(next(iter(_waiting)), None)


def _find(size: int) -> bytearray:
    """A block of at least this size that waits, unless it is much too large, or a new one."""
    fitting = [(len(block), key) for key, block in list(_waiting.items()) if size <= len(block) <= 2 * size]
    return (_waiting.pop(min(fitting)[1], None) if fitting else None) or bytearray(size)


def empty(size: int, dtype: torch.dtype) -> Tensor:
    """
    A tensor of arbitrary numbers. When all that shares its memory is gone, that waits for the next tensor of its size:
    the first touch of a fresh page can take longer than computing its contents.

    :param int size: the number of elements.
    :param dtype: their type.
    """
    if size * dtype.itemsize < _LEAST:
        return torch.empty(size, dtype=dtype, device="cpu")
    block = _find(size * dtype.itemsize + _ALIGNMENT)
    owner = (ctypes.c_char * len(block)).from_buffer(block)  # which the storage of the tensor keeps alive
    weakref.finalize(owner, _keep, block).atexit = False
    return torch.frombuffer(owner, dtype=dtype, count=size, offset=-ctypes.addressof(owner) % _ALIGNMENT)


Shape = tuple[int, int, int]


class _Layout(NamedTuple):
    """
    Where kernel.c finds tensors of given shapes.

    :ivar places: as it knows them.
    :ivar begins: of each tensor.
    :ivar strides: of each tensor, with padded columns.
    :ivar size: of all tensors.
    :ivar whole_size: with the transposed ones.
    """

    places: Any
    begins: list[int]
    strides: list[Shape]
    size: int
    whole_size: int


@lru_cache(maxsize=64)
def _layout(shapes: tuple[Shape, ...], matrices: tuple[int, ...], lanes: int) -> _Layout:
    strides = [(rows * -(-columns // lanes) * lanes, -(-columns // lanes) * lanes, 1) for _, rows, columns in shapes]
    *begins, size = accumulate([shape[0] * stride[0] for shape, stride in zip(shapes, strides, strict=True)], initial=0)
    transposed, end = [-1] * len(shapes), size
    for k in matrices:
        groups, rows, columns = shapes[k]
        transposed[k], end = end, end + groups * columns * -(-rows // lanes) * lanes
    values = [v for shape, *own in zip(shapes, begins, transposed, strict=True) for v in (*shape, *own)]
    return _Layout((_INT * len(values))(*values), begins, strides, size, end)


class Packed:
    """
    Copies of tensors as kernel.c reads them, one after the other and with padded columns; and sums of their gradients
    in the same places.

    :param library: the compiled code.
    :param tensors: with shape ``(groups, rows, columns)`` and any strides.
    :param matrices: the indices of those that are needed transposed, too.

    :ivar copies: their addresses.
    :ivar transposed: those of their transposes.
    """

    def __init__(self, library: ctypes.CDLL, tensors: Sequence[Tensor], matrices: tuple[int, ...]) -> None:
        self._like, number = tensors[0], len(tensors)
        self._shapes = tuple([tensor.shape for tensor in tensors])
        self._layout = _layout(self._shapes, matrices, library.lanes())
        self._memory = empty(self._layout.whole_size, self._like.dtype)  # as long as C has addresses in it
        values = [value for tensor in tensors for value in (tensor.data_ptr(), *tensor.stride())]
        self.copies, self.transposed = (_POINTER * number)(), (_POINTER * number)()
        library.pack(
            self._layout.places, (_INT * len(values))(*values), number, self._memory.data_ptr(), self.copies,
            self.transposed,
        )  # fmt: skip

    def new_sums(self) -> Tensor:
        """Zeros for the sums of the gradients."""
        return self._like.new_zeros(self._layout.size)

    def addresses(self, sums: Tensor) -> Any:
        """The addresses of the tensors in sums."""
        first, size = sums.data_ptr(), sums.element_size()
        return (_POINTER * len(self._shapes))(*[first + size * begin for begin in self._layout.begins])

    def views(self, sums: Tensor) -> list[Tensor | None]:
        """The sums in the shapes of the tensors; None for empty ones."""
        places = zip(self._shapes, self._layout.strides, self._layout.begins, strict=True)
        return [sums.as_strided(shape, strides, begin) if all(shape) else None for shape, strides, begin in places]
