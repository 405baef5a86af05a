# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Differential operators on fields of time and space: the derivatives :math:`\partial_i^k` that partial differential
equations are made of.

A vector field :math:`f(t, x)` has the dimension-wise derivatives :math:`D^k f = (\partial_1^k f_1, \dots, \partial_d^k
f_d)`, a scalar field :math:`u(t, x)` has :math:`D^k u = (\partial_1^k u, \dots, \partial_d^k u)`. A field that knows
them, as the one that :meth:`~pyro_hollow.nn.HollowNN.bind` returns does, says so by a method
``dimwise_derivatives(t, x, order)``. Of any other function they are taken by automatic differentiation, at a cost that
grows with d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from .derivatives import _sum_gradient, _wants_graph, alias_of

__all__ = ["DimwiseField", "differential_operator", "field_derivatives", "time_derivative"]

FieldFunction = Callable[[Tensor, Tensor], Tensor]


class DimwiseField(Protocol):
    """A field that knows its dimension-wise derivatives."""

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        """The value, with shape ``(*, d)`` for a vector and ``(*,)`` for a scalar field."""

    def dimwise_derivatives(self, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
        """``(f, D1, ..., Dk)``; the derivatives have the shape ``(*, d)`` of x for scalar fields, too."""


def field_derivatives(field: FieldFunction | DimwiseField, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
    r"""
    A field with its dimension-wise derivatives :math:`D^k f`, :math:`k = 1, \dots,` order: from the field itself where
    it has a method ``dimwise_derivatives``, otherwise by automatic differentiation, in ``order * d`` backward passes
    (``1 + (order - 1) * d`` for a scalar field).

    :param field: maps t and x with shape ``(*, d)`` to ``(*, d)``, or to ``(*,)`` for a scalar field, sample by sample.
    :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
    :param Tensor x: positions with shape ``(*, d)``.
    :param int order: the highest order, 0 or more.
    :returns: ``(f, D1, ..., Dk)``, the derivatives with shape ``(*, d)``; differentiable where gradients are enabled.
    :raises ValueError: for a negative order, and for a function whose values have another shape.
    :raises RuntimeError: in inference mode and under vmap, where nothing can be differentiated.

    Example usage:

    >>> x = torch.tensor([[1., 2.]])
    >>> u, slope, curvature = field_derivatives(lambda t, x: (x**3).prod(-1), torch.tensor(0.), x, order=2)
    >>> slope.tolist(), curvature.tolist()
    ([[24.0, 12.0]], [[48.0, 12.0]])
    """
    if order < 0:
        raise ValueError(f"order must be 0 or more, but got {order}")
    own = getattr(field, "dimwise_derivatives", None)
    if own is not None:
        return own(t, x, order)
    create_graph = _wants_graph()
    with torch.enable_grad():
        alias = alias_of(x)
        value = field(t, alias)
        _check_shape(value, x)
        results = [value]
        for k in range(1, order + 1):
            results.append(_dimwise_gradient(results[-1], alias, create_graph or k < order))
    return tuple(results) if create_graph else tuple(result.detach() for result in results)


def _check_shape(value: Tensor, x: Tensor) -> None:
    if value.shape not in (x.shape, x.shape[:-1]):
        raise ValueError(
            f"field must map x of shape {tuple(x.shape)} to the same shape, or to {tuple(x.shape[:-1])} for a scalar "
            f"field, but its value has shape {tuple(value.shape)}"
        )


def _dimwise_gradient(value: Tensor, x: Tensor, create_graph: bool) -> Tensor:
    """Derivative of each component of the value in its own coordinate; of a scalar value in every coordinate."""
    if value.dim() < x.dim():
        return _sum_gradient(value, x, create_graph)
    # All passes share one graph, so none but the last may free it, and the caller needs it anyway.
    passes = [_sum_gradient(value[..., i], x, True)[..., i] for i in range(x.shape[-1])]
    derivative = torch.stack(passes, dim=-1)
    return derivative if create_graph else derivative.detach()


def time_derivative(field: FieldFunction, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""
    A field and its derivative :math:`\partial_t f(t, x)`, by one forward-mode pass.

    :param field: maps t and x with shape ``(*, d)`` to a value, sample by sample.
    :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
    :param Tensor x: positions with shape ``(*, d)``.
    :returns: the value and its derivative, of the same shape; differentiable where gradients are enabled.
    :raises RuntimeError: for a function that has no forward mode, such as a solve of torchdiffeq.

    Example usage:

    >>> value, rate = time_derivative(lambda t, x: t**2 * x, torch.tensor(3.), torch.tensor([1., 2.]))
    >>> rate.tolist()
    [6.0, 12.0]
    """
    t = t.to(x.dtype)
    return cast(tuple[Tensor, Tensor], torch.func.jvp(lambda time: field(time, x), (t,), (torch.ones_like(t),)))


def differential_operator(
    field: FieldFunction | DimwiseField, t: Tensor, x: Tensor, coefficients: Sequence[Tensor | float]
) -> Tensor:
    r"""
    A linear combination of dimension-wise derivatives in one call,

        :math:`(L f)_i = \sum_{k=0}^K a_{ki} \, \partial_i^k f_i, \qquad
        L u = a_0 u + \sum_{i=1}^d \sum_{k=1}^K a_{ki} \, \partial_i^k u`

    for a vector field f and a scalar field u. For a hollow field it costs one evaluation with the derivatives up to
    order K, whatever the dimension. (A scalar field is hollow if it can be written as :math:`u = \tau_i(x_i, h_i)` for
    every i, as a sum of products :math:`\sum_m \prod_i \phi_{mi}(t, x_i)` can; :func:`dimwise_derivatives` then gives
    its derivatives.) A partial differential equation :math:`\partial_t u = L u` is solved by making its residual
    ``time_derivative(field, t, x)[1] - differential_operator(field, t, x, coefficients)`` small.

    :param field: as for :func:`field_derivatives`.
    :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
    :param Tensor x: positions with shape ``(*, d)``.
    :param coefficients: :math:`a_0, \dots, a_K`, each a number or a tensor that broadcasts to ``(*, d)``; of a scalar
        field, :math:`a_0` broadcasts to ``(*,)``.
    :returns: :math:`L f` with shape ``(*, d)``, or :math:`L u` with shape ``(*,)``.
    :raises ValueError: if there are no coefficients, or one does not broadcast.

    Example usage, the heat equation :math:`\partial_t u = \frac{1}{4} \partial_x^2 u` on :math:`[0, \pi]` from
    :math:`\sin x`, with u = 0 at both ends; the solution is :math:`e^{-t/4} \sin x`:

    >>> net = HollowNN(1)
    >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    >>> ends = torch.tensor([[0.], [torch.pi]]).repeat(16, 1)
    >>> for step in range(300):
    ...     u, t, x = net.bind(), torch.rand(32), torch.pi * torch.rand(32, 1)
    ...     equation = time_derivative(u, t, x)[1] - differential_operator(u, t, x, [0, 0, 0.25])
    ...     start = u(torch.tensor(0.), x) - x.sin()
    ...     loss = equation.square().mean() + 10 * (start.square().mean() + u(t, ends).square().mean())
    ...     optimizer.zero_grad()
    ...     loss.backward()
    ...     _ = optimizer.step()
    >>> round(net(torch.tensor(1.), torch.tensor([torch.pi / 2])).item(), 1)  # exp(-1/4) = 0.78
    0.8
    """
    if len(coefficients) == 0:
        raise ValueError("coefficients must hold one or more of a_0, ..., a_K, but got none")
    value, *derivatives = field_derivatives(field, t, x, len(coefficients) - 1)
    for k, coefficient in enumerate(coefficients):
        _check_coefficient(k, coefficient, x.shape if k > 0 else value.shape)
    total = coefficients[0] * value
    terms = sum((a * d for a, d in zip(coefficients[1:], derivatives, strict=True)), torch.zeros_like(x))
    return total + (terms.sum(-1) if value.dim() < x.dim() else terms)


def _check_coefficient(k: int, coefficient: Tensor | float, shape: torch.Size) -> None:
    if not isinstance(coefficient, Tensor):
        return
    try:
        coefficient.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"coefficients[{k}] must be a number or a tensor that broadcasts to {tuple(shape)}, but has shape "
            f"{tuple(coefficient.shape)}"
        ) from None
