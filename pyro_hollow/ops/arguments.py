# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A check of the keywords that functions are called with."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["closest_keywords"]

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
