# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Between the layout that users see, ``(*batch, d)``, and the one that is fast, ``(d, batch)``.

A layer that acts on every coordinate with weights of its own is one batched matrix product if the coordinates come
first, and its operands are contiguous if the batch comes last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def columns(x: Tensor) -> Tensor:
    """``(*batch, n)`` to a contiguous ``(n, batch)``."""
    return x.reshape(-1, x.shape[-1]).mT.contiguous()


def rows(x: Tensor, batch_shape: Sequence[int]) -> Tensor:
    """``(n, batch)`` back to ``(*batch, n)``, a view."""
    return x.mT.reshape(*batch_shape, x.shape[0])


def by_block(x: Tensor, size: int) -> Tensor:
    """``(d, batch)`` to ``(d / size, size, batch)``, a view."""
    return x.unsqueeze(1) if size == 1 else x.unflatten(0, (-1, size))


def by_coordinate(x: Tensor) -> Tensor:
    """The inverse of :func:`by_block`."""
    return x.squeeze(1) if x.shape[1] == 1 else x.flatten(0, 1)


def add_product(z: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """``z + weight @ x`` for x with shape ``(groups, size, batch)``, which for size 1 is elementwise."""
    return torch.addcmul(z, weight, x) if x.shape[1] == 1 else torch.baddbmm(z, weight, x)


def project(context: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``weight @ context + bias`` for a bias of shape ``(*units, 1)``, as ``(*units, *context_batch)``."""
    units, batch_shape = bias.shape[:-1], context.shape[:-1]
    return columns(context @ weight.mT).view(*units, *batch_shape) + bias.view(*units, *(1,) * len(batch_shape))


def flatten_time(t: Tensor, x: Tensor) -> Tensor:
    """Time in the type of x: a scalar, or one per sample, flattened as the batch of x is."""
    t = t.to(x.dtype)
    return t if t.dim() == 0 else t.expand(x.shape[:-1]).reshape(-1)


def flatten_offset(offset: Tensor, lead: int, batch_shape: Sequence[int]) -> Tensor:
    """
    Makes the dimensions of an offset after the first ``lead`` one: the flattened batch, or 1 if all share the offset.
    """
    head, tail = offset.shape[:lead], offset.shape[lead:]
    if tail.numel() > 1 and tail != batch_shape:
        missing = len(batch_shape) - len(tail)
        offset = offset.reshape(*head, *(1,) * missing, *tail).expand(*head, *batch_shape)
    return offset.reshape(*head, -1)


def offset_at(offset: Tensor, slope: Tensor, t: float | Tensor) -> Tensor:
    """``offset + t * slope`` for the time of all samples, or one per sample, flattened."""
    if isinstance(t, float):
        return torch.add(offset, slope, alpha=t)
    return torch.addcmul(offset, slope, t)


def add_offset(offset_bar: Tensor, slope_bar: Tensor, z_bar: Tensor, times: Tensor) -> None:
    """
    Adds the gradients of the offset and its slope in ``z = ... + offset + t * slope``, of several evaluations.

    :param Tensor offset_bar: with shape ``(*units, 1)``, or one column for each sample.
    :param Tensor slope_bar: with shape ``(*units, 1)``.
    :param Tensor z_bar: with shape ``(*units, evaluations * samples)``.
    :param Tensor times: the times with shape ``(evaluations, samples)``.
    """
    if offset_bar.shape[-1] == 1:
        offset_bar += z_bar.sum(-1, keepdim=True)
    else:
        offset_bar += z_bar.view(*z_bar.shape[:-1], *times.shape).sum(-2)
    slope_bar.view(-1).addmv_(z_bar.reshape(-1, z_bar.shape[-1]), times.reshape(-1))


def unflatten_offset(gradient: Tensor, offset: Tensor, batch_shape: torch.Size) -> Tensor:
    """Undoes :func:`flatten_offset` for the gradient of an offset."""
    lead = gradient.dim() - 1
    head, tail = offset.shape[:lead], offset.shape[lead:]
    missing = len(batch_shape) - len(tail)
    shape = batch_shape if gradient.shape[-1] == batch_shape.numel() else tail
    gradient = gradient.reshape(*head, *shape)
    return gradient.sum_to_size(*head, *(1,) * missing, *tail).reshape(offset.shape) if tail != shape else gradient
