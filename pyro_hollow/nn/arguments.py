# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Checks of the arguments that networks and flows are made with."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

__all__ = ["check_widths", "closest_keywords"]

Function = TypeVar("Function", bound=Callable[..., Any])


def closest_keywords(*passed_on_to: Callable[..., Any]) -> Callable[[Function], Function]:
    """
    Makes a function answer an unknown keyword by a TypeError that names the closest one that it knows.

    :param passed_on_to: the functions and classes that the function hands its ``**kwargs`` to.
    :returns: a decorator.
    """

    def decorate(function: Function) -> Function:
        functions: tuple[Callable[..., Any], ...] = (function, *passed_on_to)
        names = [
            name
            for each in functions
            for name, parameter in inspect.signature(each).parameters.items()
            if name != "self" and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        known = list(dict.fromkeys(names))
        title = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in known:
                    closest = difflib.get_close_matches(name, known, n=1)
                    hint = f"did you mean {closest[0]!r}? " if closest else ""
                    raise TypeError(f"{title}() has no keyword {name!r}: {hint}It takes {', '.join(known)}")
            return function(*args, **kwargs)

        return cast(Function, checked)

    return decorate


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
