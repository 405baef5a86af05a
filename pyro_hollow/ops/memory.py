# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The memory that work on many samples may take, and how many samples are worked on at a time for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["MAX_BYTES", "allocated_bytes", "part_size"]

#: The most bytes that evaluations without gradients may take at a time, besides what they return.
MAX_BYTES = 10**9


class _Count(TorchDispatchMode):
    """Adds up the sizes of all tensors that operations return, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def allocated_bytes(function: Callable[[], Any]) -> int:
    """
    The bytes of all tensors that the operations of torch in a function return: a bound of the memory that it takes.

    :param function: called once.
    """
    with _Count() as count:
        function()
    return count.total


def part_size(num_bytes: float) -> int:
    """
    The number of samples that may be worked on at a time.

    :param float num_bytes: the bytes that the work takes for each of them.
    """
    return max(1, int(MAX_BYTES / max(num_bytes, 1.0)))
