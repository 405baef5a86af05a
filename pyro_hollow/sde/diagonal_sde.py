# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Stochastic differential equations with diagonal noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_hollow.nn import ConditionalHollowNN, HollowField
from pyro_hollow.ops import field_derivatives

__all__ = ["BoundSDE", "DiagonalSDE"]

Coefficient = Callable[[Tensor, Tensor], Tensor]


class _PositiveField:
    """``softplus(field) + floor`` with its dimension-wise derivatives, by the chain rule."""

    def __init__(self, field: HollowField, floor: float) -> None:
        self._field = field
        self._floor = floor

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return F.softplus(self._field(t, x)) + self._floor

    def dimwise_derivatives(self, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
        if order > 2:
            raise ValueError(f"order must be at most 2 for the diffusion, but got {order}")
        z, *dz = self._field.dimwise_derivatives(t, x, order)
        results = [F.softplus(z) + self._floor]
        if order >= 1:
            slope = torch.sigmoid(z)
            results.append(slope * dz[0])
        if order == 2:
            results.append(slope * ((1 - slope) * dz[0].square() + dz[1]))
        return tuple(results)


@dataclass(frozen=True)
class BoundSDE:
    """
    A :class:`DiagonalSDE` whose networks are bound: what depends on neither time nor state is computed already.

    :ivar drift: maps t and x with shape ``(*, d)`` to f with shape ``(*, d)``.
    :ivar diffusion: the same for g.
    """

    drift: Coefficient
    diffusion: Coefficient

    def drift_derivatives(self, t: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        r""":math:`(f, D f)`, each with shape ``(*, d)``."""
        return field_derivatives(self.drift, t, x, 1)

    def diffusion_derivatives(self, t: Tensor, x: Tensor, order: int = 2) -> tuple[Tensor, ...]:
        r""":math:`(g, D g, D^2 g)` up to an order, each with shape ``(*, d)``."""
        return field_derivatives(self.diffusion, t, x, order)


def _checked(name: str, coefficient: Coefficient) -> Coefficient:
    """A coefficient that must not return what only broadcasts to the shape of the state."""
    if hasattr(coefficient, "dimwise_derivatives"):
        return coefficient

    def function(t: Tensor, x: Tensor) -> Tensor:
        value = coefficient(t, x)
        if value.shape != x.shape:
            raise ValueError(
                f"{name} must return the shape of the state, {tuple(x.shape)}, but returned {tuple(value.shape)}"
            )
        return value

    return function


class _Constant(nn.Module):
    """A constant field; of a parameter, one that learns."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        if isinstance(value, nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.value.to(x.dtype).expand_as(x)

    def dimwise_derivatives(self, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
        return self(t, x), *[torch.zeros_like(x)] * order


class DiagonalSDE(nn.Module):
    r"""
    An Ito stochastic differential equation with diagonal noise,

        :math:`dx_i = f_i(t, x) \, dt + g_i(t, x) \, dW_i, \qquad i = 1, \dots, d,`

    with independent Brownian motions :math:`W_i`. If f and g are hollow networks, all derivatives that the
    Fokker-Planck equation asks for, :math:`\partial_i f_i, \partial_i g_i, \partial_i^2 g_i`, cost no more than an
    elementwise pass; of other functions they are taken by automatic differentiation, in d and 2 d backward passes.

    It speaks the protocol of torchsde: ``torchsde.sdeint(sde, x0, times, dt=1e-2)`` samples it where torchsde is
    installed, :meth:`sample` does without.

    Example usage:

    >>> sde = DiagonalSDE(HollowNN(2), HollowNN(2))
    >>> sde.sample(torch.zeros(100, 2), times=[0., 0.5, 1.], dt=0.01).shape
    torch.Size([3, 100, 2])

    :param drift: f, a :class:`~pyro_hollow.nn.HollowNN` or any function or module of t and x with shape ``(*, d)`` that
        returns ``(*, d)``, sample by sample; t is a scalar or one time per sample.
    :param diffusion: g, or a number or tensor for a constant one, a Parameter for one that is learned. Of a HollowNN,
        :math:`g = \text{softplus}(\text{net}) + \text{min_diffusion}`, which is positive; any other function is used
        as it is (only :math:`g^2` matters to the law of x, so its sign is free).
    :param float min_diffusion: the smallest g of a network, in units of x per square root of time. Set it where g is to
        be learned from marginals, which do not determine it; see :class:`~pyro_hollow.sde.FokkerPlanckMatching`.
    :raises ValueError: if min_diffusion is negative, or a network takes a context.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(
        self,
        drift: nn.Module | Coefficient,
        diffusion: nn.Module | Coefficient | Tensor | float,
        *,
        min_diffusion: float = 1e-3,
    ) -> None:
        super().__init__()
        if not min_diffusion >= 0:
            raise ValueError(f"min_diffusion must not be negative, but got {min_diffusion}")
        for name, net in (("drift", drift), ("diffusion", diffusion)):
            if isinstance(net, ConditionalHollowNN) and net.context_dim:
                raise ValueError(f"{name} must take no context, but takes one of size {net.context_dim}")
        if not callable(diffusion):
            diffusion = _Constant(torch.as_tensor(diffusion))
        self.drift = drift
        self.diffusion = diffusion
        self.min_diffusion = min_diffusion

    def bind(self) -> BoundSDE:
        """The coefficients for many evaluations; bind anew after changing parameters."""
        drift, diffusion = self.drift, self.diffusion
        if isinstance(drift, ConditionalHollowNN):
            drift = drift.bind()
        if isinstance(diffusion, ConditionalHollowNN):
            diffusion = _PositiveField(diffusion.bind(), self.min_diffusion)
        return BoundSDE(_checked("drift", drift), _checked("diffusion", diffusion))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """
        The drift, in units of x per time.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor y: the state with shape ``(*, d)``.
        """
        return self.bind().drift(t, y)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """
        The diffusion, in units of x per square root of time.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor y: the state with shape ``(*, d)``.
        """
        return self.bind().diffusion(t, y)

    @torch.no_grad()
    def sample(self, x0: Tensor, times: Sequence[float] | Tensor, dt: float, method: str = "euler") -> Tensor:
        r"""
        Simulates paths, without gradients, by steps of equal size between consecutive times.

        - "euler": Euler-Maruyama, :math:`x + f h + g \Delta W`, of strong order 1/2 and weak order 1.
        - "milstein": adds :math:`\frac{1}{2} g \, Dg \, (\Delta W^2 - h)`; of strong order 1 where each :math:`g_i`
          depends on t and :math:`x_i` alone. Otherwise the noise does not commute and the order is that of "euler".

        :param Tensor x0: the states at the first time, with shape ``(*, d)``.
        :param times: two or more times that increase.
        :param float dt: the largest step.
        :param str method: "euler" or "milstein".
        :returns: the states at the times, with shape ``(len(times), *, d)``; the first is x0.
        :raises ValueError: for times that do not increase, a dt that is not positive and an unknown method.
        :raises ArithmeticError: if a path leaves the numbers.
        """
        ticks = [float(time) for time in times]
        if len(ticks) < 2 or any(not b > a for a, b in zip(ticks[:-1], ticks[1:], strict=True)):
            raise ValueError(f"times must be two or more that increase, but got {ticks}")
        if not dt > 0:
            raise ValueError(f"dt must be positive, but got {dt}")
        if method not in ("euler", "milstein"):
            raise ValueError(f"method must be 'euler' or 'milstein', but got {method!r}")
        bound, order = self.bind(), int(method == "milstein")
        states = [x0]
        for start, end in zip(ticks[:-1], ticks[1:], strict=True):
            count = math.ceil((end - start) / dt * (1 - 1e-9))  # no extra step for what rounding left
            h, x = (end - start) / count, states[-1]
            for k in range(count):
                x = _step(bound, x.new_tensor(start + k * h), x, h, order)
            if not bool(torch.isfinite(x).all()):
                raise ArithmeticError(f"a path is not finite at t = {end}; a smaller dt than {dt} may help")
            states.append(x)
        return torch.stack(states)


def _step(sde: BoundSDE, t: Tensor, x: Tensor, h: float, order: int) -> Tensor:
    """Euler-Maruyama for order 0, Milstein for order 1."""
    g, *slope = sde.diffusion_derivatives(t, x, order)
    noise = math.sqrt(h) * torch.randn_like(x)
    end = x + h * sde.drift(t, x) + g * noise
    return end + 0.5 * g * slope[0] * (noise.square() - h) if order else end
