# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
A bijection to the support of mixtures, for which torch (up to 2.13) has none.

Importing this module registers it in torch's ``biject_to`` and ``transform_to``, as Pyro does for its own constraints,
so that a :class:`~torch.distributions.MixtureSameFamily` can be a prior for every automatic guide.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

__all__ = ["mixture_bijection"]


def mixture_bijection(constraint: constraints.Constraint) -> Transform:
    """
    Returns the bijection from the unconstrained space to the support that all components of a mixture share.

    :param constraint: the support of a :class:`~torch.distributions.MixtureSameFamily`.
    :raises NotImplementedError: for components with different supports.
    """
    base = constraint.base_constraint  # type: ignore[attr-defined]
    bounds = {name: getattr(base, name) for name in ("lower_bound", "upper_bound") if hasattr(base, name)}
    if not any(isinstance(bound, Tensor) and bound.dim() for bound in bounds.values()):
        return biject_to(base)
    shared = {}
    for name, bound in bounds.items():
        if not (isinstance(bound, Tensor) and bound.dim()):
            shared[name] = bound
            continue
        shared[name] = bound[..., 0]
        if not bool((bound == bound[..., :1]).all()):
            raise NotImplementedError(
                f"components of a mixture must have one support for an automatic guide, but their {name} is "
                f"{bound.tolist()}; use components that share it, or a discrete site that is enumerated"
            )
    return biject_to(type(base)(**shared))


_constraint = getattr(constraints, "MixtureSameFamilyConstraint", None)  # older releases have that of the components
for _registry in (biject_to, transform_to):
    if _constraint is not None and _constraint not in _registry._registry:
        _registry.register(_constraint, mixture_bijection)
