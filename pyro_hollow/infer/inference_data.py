# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The object in which ArviZ keeps draws, for ArviZ before and since version 1."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import pyro
from torch import Tensor

__all__ = ["check_names", "element_names", "import_arviz", "inference_data"]

_MIN_CHAIN = 4  # draws in a chain, for fewer of which ArviZ computes no effective sample size


def import_arviz() -> Any:
    """Imports ArviZ. Raises ImportError, with what to install, where it is missing."""
    try:
        with warnings.catch_warnings():
            # Once a day ArviZ announces version 1 to whoever imports it.
            warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
            import arviz
    except ImportError as error:
        raise ImportError("diagnose needs ArviZ: pip install 'arviz>=0.17'") from error
    return arviz


def inference_data(groups: Mapping[str, Mapping[str, Tensor]], attrs: dict[str, Any]) -> Any:
    """
    Makes an ``arviz.InferenceData``, or since ArviZ 1 an ``xarray.DataTree``.

    Consecutive draws make a chain. There are four chains, or as many as divide the number of draws, so that ArviZ can
    compare them; the group "guide" has one.

    :param groups: the variables of each group, by name, with draws in the first dimension except for "observed_data".
    :param attrs: attributes of the whole.
    """
    import xarray

    arviz = import_arviz()
    datasets = {name: _dataset(xarray, values, _chains(name, values)) for name, values in groups.items()}
    if "InferenceData" in vars(arviz):  # since version 1 it is an alias of DataTree that warns when it is read
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="guide group is not defined")  # by some versions
            return arviz.InferenceData(attrs=attrs, **datasets)
    tree = xarray.DataTree.from_dict(datasets)
    tree.attrs.update(attrs)
    return tree


def _chains(group: str, values: Mapping[str, Tensor]) -> int | None:
    if group == "observed_data":
        return None
    size = len(next(iter(values.values())))
    usable = (n for n in (4, 3, 2) if size % n == 0 and size // n >= _MIN_CHAIN)
    return 1 if group == "guide" else next(usable, 1)


def _dataset(xarray: Any, values: Mapping[str, Tensor], chains: int | None) -> Any:
    variables = {}
    sizes: dict[str, int] = {}
    for name, value in values.items():
        shape = list(value.shape) if chains is None else [chains, len(value) // chains, *value.shape[1:]]
        leading = [] if chains is None else ["chain", "draw"]
        dims = [*leading, *dimensions(name, len(shape) - len(leading))]
        variables[name] = dims, value.reshape(shape).cpu().numpy()
        sizes.update(zip(dims, shape, strict=True))
    attrs = {"inference_library": "pyro", "inference_library_version": pyro.__version__}
    return xarray.Dataset(variables, {dim: range(size) for dim, size in sizes.items()}, attrs)


def dimensions(name: str, count: int) -> list[str]:
    """Returns the names that ArviZ gives to the dimensions of a variable."""
    return [f"{name}_dim_{i}" for i in range(count)]


def element_names(name: str, shape: Sequence[int]) -> Iterator[str]:
    """
    The names of the elements of a variable, as ArviZ shows them: "theta[0]", or the name itself for a scalar.

    :param str name: the name of the variable.
    :param shape: its shape.
    """
    for index in product(*map(range, shape)):
        yield name + (f"[{', '.join(map(str, index))}]" if index else "")


def check_names(values: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a site with the name of a dimension, which a data set of xarray would take it for."""
    names: Iterable[str] = (dim for name, value in values.items() for dim in dimensions(name, value.dim()))
    for name in {"chain", "draw", *names} & set(values):
        raise ValueError(
            f"site {name!r} of the model has a name that ArviZ gives to a dimension of its data sets; rename it"
        )
