# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Fixed affine maps that standardise data, so that networks see numbers near 1 whatever the units."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Standardization", "check_finite", "location_and_scale"]


def check_finite(name: str, value: Tensor) -> None:
    """
    Refuses values that are NaN or infinite.

    :param str name: the argument's name, for the message.
    :param Tensor value: any tensor; under ``torch.vmap``, which hides the values, nothing is checked.
    :raises ValueError: naming the argument and the first index that is not finite.
    """
    value = value.detach()
    try:
        total = value.sum().item()  # the cheapest pass that no NaN and no infinity survives
    except RuntimeError:
        return
    if math.isfinite(total) or bool(torch.isfinite(value).all()):
        return
    index = tuple((~torch.isfinite(value)).nonzero()[0].tolist())
    raise ValueError(f"{name} must be finite, but is {value[index].item()}" + (f" at index {index}" if index else ""))


def location_and_scale(name: str, x: Tensor, *, allow_constant: bool = False) -> tuple[Tensor, Tensor]:
    """
    The mean and the standard deviation of each column, computed in double precision.

    :param str name: the argument's name, for messages.
    :param Tensor x: samples with shape ``(*, d)`` and at least one batch dimension.
    :param bool allow_constant: True to give a constant column the scale 1 instead of refusing it.
    :returns: location and scale, both with shape ``(d,)`` and of the type and on the device of x.
    :raises ValueError: for a type that is not floating-point, another shape, no samples, values that are not finite,
        and a constant column.
    """
    if not x.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point type, but got {x.dtype}; convert it with .float()")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f"{name} must hold samples with shape (n, d) and n of at least 1, but has shape {tuple(x.shape)}; "
            "one-dimensional samples need a last dimension of size 1, as .unsqueeze(-1) gives them"
        )
    check_finite(name, x)
    values = x.detach().flatten(0, -2).to("cpu", torch.float64)
    loc = values.mean(0)
    largest = (values - loc).abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    scale = largest * ((values - loc) / largest).square().mean(0).sqrt()  # no square overflows or underflows
    # A mean that was rounded leaves a constant column a scale of its rounding error.
    constant = (values == values[0]).all(0) | (scale.to(x.dtype) == 0)
    if not allow_constant and bool(constant.any()):
        raise ValueError(f"{name} must vary in every column, but column {int(constant.int().argmax())} is constant")
    return loc.to(x), torch.where(constant, 1.0, scale).to(x)


class Standardization(nn.Module):
    r"""
    The affine map :math:`z_i = (x_i - l_i) / s_i`, whose location and scale are buffers: saved with the state, moved
    and converted with the module, and not trained. It starts as the identity.

    :param Tensor like: a tensor with the shape, type and device of location and scale.
    :ivar loc: the location l.
    :ivar scale: the scale s.
    :ivar is_set: whether location and scale have been set.
    """

    loc: Tensor
    scale: Tensor
    is_set: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros_like(like))
        self.register_buffer("scale", torch.ones_like(like))
        self.register_buffer("is_set", torch.tensor(False, device=like.device))

    def set(self, loc: Tensor, scale: Tensor) -> None:
        """
        Sets location and scale.

        :param Tensor loc: the location, of the shape that the map was made with.
        :param Tensor scale: the scale, likewise.
        :raises ValueError: for another shape or type, and for values that are not finite or scales that are not
            positive.
        """
        for name, value in (("loc", loc), ("scale", scale)):
            if value.shape != self.loc.shape or value.dtype != self.loc.dtype:
                raise ValueError(
                    f"{name} must have shape {tuple(self.loc.shape)} and be {self.loc.dtype}, but got "
                    f"{tuple(value.shape)} and {value.dtype}; convert data or module with .to()"
                )
            check_finite(name, value)
        if not bool((scale > 0).all()):
            raise ValueError(f"scale must be positive, but got {scale.tolist()}")
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.is_set.fill_(True)

    def fit(self, name: str, x: Tensor, *, allow_constant: bool = False) -> None:
        """
        Sets location and scale to mean and standard deviation of samples; see :func:`location_and_scale`.

        :param str name: the argument's name, for messages.
        :param Tensor x: samples with shape ``(*, d)``.
        :param bool allow_constant: True to give a constant column the scale 1.
        :raises ValueError: as :func:`location_and_scale` does, and for another d or type than those of the map.
        """
        d = self.loc.shape[-1]
        if x.dim() and x.shape[-1] != d:
            raise ValueError(f"{name} must have shape (*, {d}), but got {tuple(x.shape)}")
        if x.is_floating_point() and x.dtype != self.loc.dtype:
            raise ValueError(f"{name} is {x.dtype}, but the module {self.loc.dtype}; convert one of them with .to()")
        self.set(*location_and_scale(name, x, allow_constant=allow_constant))

    def fit_interval(self, name: str, t: Tensor) -> None:
        """
        Maps an interval to that from 0 to 1: sets the location to the first time and the scale to the span, or to 1 if
        all times are the same.

        :param str name: the argument's name, for messages.
        :param Tensor t: times of any shape.
        :raises ValueError: for no times, and for times that are not finite.
        """
        if t.numel() == 0:
            raise ValueError(f"{name} must hold at least one time, but has shape {tuple(t.shape)}")
        check_finite(name, t)
        start, end = (v.detach().to("cpu", torch.float64) for v in t.aminmax())
        self.set(start.to(self.loc), (end - start if end > start else torch.ones_like(end)).to(self.loc))

    def forward(self, x: Tensor) -> Tensor:
        """Standardises. Subtracting first keeps the digits of data far from 0."""
        if self.loc.dim() and (x.dim() == 0 or x.shape[-1] != len(self.loc)):  # or one column would broadcast
            raise ValueError(f"x must have shape (*, {len(self.loc)}), but got {tuple(x.shape)}")
        return (x - self.loc) / self.scale

    def inverse(self, z: Tensor) -> Tensor:
        """Goes back to the units of x."""
        return self.loc + self.scale * z

    def log_scale(self) -> Tensor:
        """The logarithm of the determinant of :meth:`inverse`."""
        return self.scale.log().sum()
