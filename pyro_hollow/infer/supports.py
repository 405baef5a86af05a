# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
A bijection to the support of mixtures, for which torch has none (2.13).

Importing this module registers it in torch's ``biject_to`` and ``transform_to``, as Pyro does for its own constraints,
so that a :class:`~torch.distributions.MixtureSameFamily` can be a prior for every automatic guide.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

__all__ = ["mixture_bijection"]


def mixture_bijection(constraint: constraints.Constraint) -> Transform:
    """
    Returns the bijection from the unconstrained space to the support that all components of a mixture share.

    :param constraint: the support of a :class:`~torch.distributions.MixtureSameFamily`.
    :raises NotImplementedError: for components with different supports.
    """
    return biject_to(_shared(constraint.base_constraint, -1))  # type: ignore[attr-defined]


def _shared(constraint: Any, dim: int) -> constraints.Constraint:
    """A support without the dimension of the components in its bounds."""
    if isinstance(constraint, constraints.independent):
        base = _shared(constraint.base_constraint, dim - constraint.reinterpreted_batch_ndims)
        return constraints.independent(base, constraint.reinterpreted_batch_ndims)
    if hasattr(constraint, "base_constraint"):  # the components are mixtures themselves
        return type(constraint)(_shared(constraint.base_constraint, dim - 1))
    bounds = {name: getattr(constraint, name) for name in ("lower_bound", "upper_bound") if hasattr(constraint, name)}
    shared = {name: bound for name, bound in bounds.items() if not (isinstance(bound, Tensor) and bound.dim() >= -dim)}
    if len(shared) == len(bounds):
        return constraint
    for name in bounds.keys() - shared.keys():
        shared[name] = bounds[name].select(dim, 0)
        if not bool((bounds[name] == shared[name].unsqueeze(dim)).all()):
            raise NotImplementedError(
                f"components of a mixture must have one support for an automatic guide, but their {name} is "
                f"{bounds[name].tolist()}; use components that share it, or a discrete site that is enumerated"
            )
    return type(constraint)(**shared)


_constraint = getattr(constraints, "MixtureSameFamilyConstraint", None)  # older releases have that of the components
for _registry in (biject_to, transform_to):
    if _constraint is not None and _constraint not in _registry._registry:
        _registry.register(_constraint, mixture_bijection)
