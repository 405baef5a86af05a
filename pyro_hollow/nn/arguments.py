# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of the arguments that networks and flows are made with."""

from __future__ import annotations

import operator
from collections.abc import Iterable

__all__ = ["check_block_dim", "check_integer", "check_widths"]


def check_widths(hidden_dims: Iterable[int], least: int = 1, of: str = "") -> list[int]:
    """
    Checks the widths of layers.

    :param hidden_dims: the widths, each at least 1.
    :param int least: the smallest number of widths.
    :param str of: what the layers belong to, for the error.
    :returns: the widths.
    :raises TypeError: for anything but a sequence of integers.
    :raises ValueError: for too few widths and for those below 1.
    """
    rule = f"hidden_dims{of and ' of '}{of} must be {'one' if least else 'zero'} or more positive widths"
    if isinstance(hidden_dims, int | float):
        raise TypeError(f"{rule} in a list, for example [{max(int(hidden_dims), 1)}], but got {hidden_dims!r}")
    try:
        widths = [operator.index(width) for width in hidden_dims]
    except TypeError as error:
        raise TypeError(f"{rule}, integers, for example [64, 32], but got {hidden_dims!r}") from error
    if len(widths) < least or min(widths, default=1) < 1:
        raise ValueError(f"{rule}, for example [64], but got {widths}")
    return widths


def check_integer(name: str, value: int) -> int:
    """
    Checks an integer, of any type that stands for one.

    :raises TypeError: for anything else.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, but got {value!r}") from error


def check_block_dim(block_dim: int, input_dim: int) -> int:
    """
    Checks the number of coordinates of a block.

    :raises TypeError: for anything but an integer.
    :raises ValueError: for one below 1 and one that does not divide ``input_dim``.
    """
    size = check_integer("block_dim", block_dim)
    if size < 1 or input_dim % size:
        raise ValueError(f"block_dim must be at least 1 and divide input_dim = {input_dim}, but got {size}")
    return size
