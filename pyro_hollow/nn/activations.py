# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Smooth activations together with their derivatives of any order, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "get_activation"]


@dataclass(frozen=True)
class Activation:
    r"""
    A smooth elementwise function, written as an affine image of one that is cheap to evaluate,

        :math:`s(z) = \text{scale} \cdot g(\text{rate} \cdot z) + \text{shift}`.

    Layers multiply their weights by rate and scale once per solve, so that :math:`g` is all that is left to do per
    evaluation. For the hyperbolic tangent, :math:`\tanh z = 2 \sigma(2 z) - 1`, that is 9 times cheaper on a CPU
    (:func:`torch.sigmoid` is vectorised there, :func:`torch.tanh` hardly is), and works in place.

    :param str name: its name in :data:`ACTIVATIONS`, by which copies and pickles find it again.
    :param apply: :math:`g`; may overwrite its argument.
    :param derivatives: maps z and an order k to :math:`[g(z), g'(z), \dots, g^{(k)}(z)]`; leaves z alone.
    :param vjp: maps a gradient of :math:`g(z)` and the argument of apply as it was left to the gradient of z.
    """

    name: str
    apply: Callable[[Tensor], Tensor]
    derivatives: Callable[[Tensor, int], list[Tensor]]
    vjp: Callable[[Tensor, Tensor], Tensor]
    rate: float = 1.0
    scale: float = 1.0
    shift: float = 0.0

    def __reduce__(self) -> tuple[Callable[[str], Activation], tuple[str]]:
        return get_activation, (self.name,)  # operators of torch cannot be pickled


@cache
def _logistic_polynomials(order: int) -> tuple[tuple[float, ...], ...]:
    """
    Polynomials of the logistic function u: since :math:`u' = u - u^2`, :math:`u^{(k)} = P_k(u)` with
    :math:`P_0(u) = u` and :math:`P_{k+1} = (u - u^2) P_k'`. Polynomials are tuples of coefficients, lowest power first.
    """
    polynomials: list[tuple[float, ...]] = [(0.0, 1.0)]
    for _ in range(order):
        slope = [power * c for power, c in enumerate(polynomials[-1])]  # u P'(u)
        polynomials.append(tuple(a - b for a, b in zip([*slope, 0.0], [0.0, *slope], strict=True)))
    return tuple(polynomials)


class _LogisticWithSlope(torch.autograd.Function):
    r"""
    The logistic function :math:`u` and its slope :math:`u - u^2`. Their common backward pass,
    :math:`\bar z = u' (\bar u + (1 - 2u) \bar u')`, is a third of what automatic differentiation would do, and can
    itself be differentiated.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.sigmoid(z)
        return u, torch.addcmul(u, u, u, value=-1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, grad_slope: Tensor) -> Tensor:
        u, slope = ctx.saved_tensors
        total = grad_value + grad_slope
        if torch.is_grad_enabled():
            return slope * torch.addcmul(total, grad_slope, u, value=-2.0)
        return total.addcmul_(grad_slope, u, value=-2.0).mul_(slope)  # in one buffer

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        u, slope = ctx.saved_tensors
        change = slope * tangent
        return change, (1.0 - 2.0 * u) * change


def _logistic(z: Tensor, order: int) -> list[Tensor]:
    # torch.compile cannot trace a function with a jvp, and fuses the plain formula by itself.
    if order == 1 and z.requires_grad and not torch.compiler.is_compiling():
        return list(_LogisticWithSlope.apply(z))
    u = torch.sigmoid(z)
    values = [u]
    if order >= 1:
        values.append(torch.addcmul(u, u, u, value=-1.0))
    if order >= 2:
        values.append(torch.addcmul(values[1], values[1], u, value=-2.0))  # u'' = u' (1 - 2 u)
    for coefficients in _logistic_polynomials(order)[3:]:
        # P_k(u) = u Q(u) by Horner's scheme.
        *lower, c, top = coefficients[1:]
        value = u * top + c
        for c in reversed(lower):
            value = value * u + c
        values.append(value * u)
    return values


def _softplus(z: Tensor, order: int) -> list[Tensor]:
    return [F.softplus(z), *(_logistic(z, order - 1) if order else [])]


def _silu(z: Tensor, order: int) -> list[Tensor]:
    # Leibniz: (z u)^(k) = z u^(k) + k u^(k-1).
    u = _logistic(z, order)
    return [z * u[0], *(torch.addcmul(k * u[k - 1], z, u[k]) for k in range(1, order + 1))]


#: The activations, by name. All are smooth: the divergence of a ReLU field would be piecewise constant.
ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("tanh", torch.sigmoid_, _logistic, torch.ops.aten.sigmoid_backward, rate=2.0, scale=2.0, shift=-1.0),
        Activation(
            "softplus", F.softplus, _softplus, partial(torch.ops.aten.softplus_backward, beta=1.0, threshold=20.0)
        ),
        Activation("silu", F.silu, _silu, torch.ops.aten.silu_backward),
    )
}


def get_activation(name: str) -> Activation:
    """
    Looks up a smooth activation by name.

    :param str name: "tanh", "softplus" or "silu".
    :raises ValueError: for any other name.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, but got {name!r}")
    return ACTIVATIONS[name]
