# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The base of transforms in closed form whose parameters come from a context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from .cache import CachedTransform, module_tensors

__all__ = ["ClosedFormTransform", "matvec"]


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, with shapes ``(*, m, n)`` and ``(*, n)``."""
    # Unlike matmul, einsum broadcasts matrices over samples without a copy.
    return torch.einsum("...mn,...n->...m", matrix, vector)


class ClosedFormTransform(CachedTransform):
    """
    A transform of vectors in closed form whose context is fixed.

    :param ~torch.nn.Module flow: the conditional transform, with its ``input_dim``.
    :param Tensor context: the context with shape ``(*, context_dim)``.
    :raises ValueError: from every evaluation, for an input of the wrong size, or to whose batch shape the context's
        does not broadcast.
    """

    def __init__(self, flow: Module, context: Tensor) -> None:
        super().__init__()
        self.flow: Any = flow
        self.context = context

    def _tensors(self) -> list[Tensor]:
        return [*module_tensors(self.flow), self.context]

    def _check(self, x: Tensor) -> None:
        d = self.flow.input_dim
        if x.dim() == 0 or x.shape[-1] != d:
            raise ValueError(f"input must have shape (*, {d}), but got {tuple(x.shape)}")
        try:
            self.context.expand(*x.shape[:-1], -1)
        except RuntimeError:
            raise ValueError(
                f"context has batch shape {tuple(self.context.shape[:-1])}, which does not broadcast to the input's "
                f"{tuple(x.shape[:-1])}; expand the base distribution, or the data that is scored, to the batch shape "
                "of the context"
            ) from None
