# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The cache of transforms in closed form whose parameters come from a context."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform
from torch.nn import Module

__all__ = ["CachedTransform", "apply"]


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, with shapes ``(*, m, n)`` and ``(*, n)``."""
    # Unlike matmul, einsum broadcasts matrices over samples without a copy.
    return torch.einsum("...mn,...n->...m", matrix, vector)


class _Cached(NamedTuple):
    x: Tensor
    y: Tensor
    ladj: Tensor
    stamp: list[tuple[Tensor, int, bool]]
    grad_mode: bool


class CachedTransform(Transform):
    """
    A transform of vectors whose context is fixed. It keeps the latest pair of input and output together with its
    log-determinant, until a parameter, the context or one of the pair has changed.

    :param ~torch.nn.Module flow: the conditional transform, with its ``input_dim``.
    :param Tensor context: the context with shape ``(*, context_dim)``.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    sign = +1

    def __init__(self, flow: Module, context: Tensor) -> None:
        super().__init__(cache_size=1)
        self.flow: Any = flow
        self.context = context
        self._cached: _Cached | None = None
        self._spent = False

    @abstractmethod
    def _transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and log-determinant, past the cache."""

    @property
    def inv(self) -> _InverseTransform:
        """The inverse. Made anew each time: a stored one would form a cycle that keeps graphs alive."""
        return _InverseTransform(self)

    def __call__(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Value and log-determinant together.

        :param Tensor x: the input with shape ``(*, d)``.
        :returns: y with shape ``(*, d)`` and the log-determinant of its Jacobian with shape ``(*,)``.
        :raises ValueError: for an input of the wrong size, or to whose batch shape the context's does not broadcast.
        """
        cached = self._lookup()
        if cached is None or x is not cached.x or self._spent or cached.grad_mode != torch.is_grad_enabled():
            self._check(x)
            cached = self._store(x, *self._transform(x))
        return cached.y, cached.ladj

    def _call(self, x: Tensor) -> Tensor:
        """
        :param x: the input into the bijection
        :type x: torch.Tensor

        Invokes the bijection x=>y, past the cache.
        """
        self._check(x)
        return self._transform(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """
        Calculates the logarithm of the absolute value of the determinant of the Jacobian, at no cost for the pair of
        the latest call.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor y: the output for that input.
        :returns: the log-determinant with shape ``(*,)``.
        """
        cached = self._lookup()
        if cached is None or x is not cached.x or y is not cached.y or self._spent:
            self._check(x)
            return self._transform(x)[1]
        return cached.ladj

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

    def _store(self, x: Tensor, y: Tensor, ladj: Tensor) -> _Cached:
        self._cached = _Cached(x, y, ladj, self._stamp(x, y), torch.is_grad_enabled())
        self._spent = False
        # A second backward pass through the pair's graph would fail. The hook must not keep the transform alive.
        reference = weakref.ref(self)

        def spend(gradient: Tensor) -> None:
            transform = reference()
            if transform is not None:
                transform._spent = True

        for tensor in (y, ladj):
            if tensor.requires_grad:
                tensor.register_hook(spend)
        return self._cached

    def _stamp(self, x: Tensor, y: Tensor) -> list[tuple[Tensor, int, bool]]:
        tensors = (*self.flow.parameters(), *self.flow.buffers(), self.context, x, y)
        # Tensors made in inference mode do not count their changes.
        versions = (-1 if tensor.is_inference() else tensor._version for tensor in tensors)
        return [(tensor, version, tensor.requires_grad) for tensor, version in zip(tensors, versions, strict=True)]

    def _lookup(self) -> _Cached | None:
        """The latest pair, if nothing that decides it has changed."""
        cached = self._cached
        if cached is None:
            return None
        stamps = zip(self._stamp(cached.x, cached.y), cached.stamp, strict=False)
        return cached if all(new[0] is old[0] and new[1:] == old[1:] for new, old in stamps) else None

    def clear_cache(self) -> None:
        """Forgets the latest pair."""
        self._cached = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None, "_inv": None}
