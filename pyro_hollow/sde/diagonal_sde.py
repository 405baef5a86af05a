# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Stochastic differential equations with diagonal noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_hollow.nn import ConditionalHollowNN, HollowField
from pyro_hollow.nn.standardization import Standardization, check_finite
from pyro_hollow.ops import field_derivatives

__all__ = ["BoundSDE", "DiagonalSDE"]

Coefficient = Callable[[Tensor, Tensor], Tensor]


class _PositiveField:
    """``softplus(field)`` with its dimension-wise derivatives, by the chain rule."""

    def __init__(self, field: HollowField) -> None:
        self._field = field

    def dimwise_derivatives(self, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
        if order > 2:
            raise ValueError(f"order must be at most 2 for the diffusion, but got {order}")
        z, *dz = self._field.dimwise_derivatives(t, x, order)
        results = [F.softplus(z)]
        if order >= 1:
            slope = torch.sigmoid(z)
            results.append(slope * dz[0])
        if order == 2:
            results.append(slope * ((1 - slope) * dz[0].square() + dz[1]))
        return tuple(results)


class _InUnits:
    """``unit * field + floor`` as a function of t and x, where the field is one of standardised time and state."""

    def __init__(
        self, field: HollowField | _PositiveField, time: Standardization, state: Standardization, unit: Tensor,
        floor: Tensor | float = 0.0,
    ) -> None:  # fmt: skip
        self._field = field
        self._time, self._state = time, state
        self._unit = unit
        self._floor = floor

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.dimwise_derivatives(t, x, 0)[0]

    def dimwise_derivatives(self, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
        value, *derivatives = self._field.dimwise_derivatives(self._time(t), self._state(x), order)
        unit, results = self._unit, [self._unit * value + self._floor]
        for derivative in derivatives:
            unit = unit / self._state.scale
            results.append(unit * derivative)
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
        self._unit: Tensor | None = None
        if isinstance(value, nn.Parameter):
            self.value = value
        else:
            self.register_buffer("value", value)

    @contextmanager
    def in_units(self, unit: Tensor) -> Iterator[None]:
        """
        Keeps the parameter in standard units meanwhile, as an optimizer's steps have the size of its learning rate.

        :param Tensor unit: the unit of each coordinate, with shape ``(d,)``.
        """
        if self.value.shape != unit.shape:
            unit = unit.log().mean().exp()  # one value for all coordinates
        with torch.no_grad():
            self.value.div_(unit)
        self._unit = unit
        try:
            yield
        finally:
            self._unit = None
            with torch.no_grad():
                self.value.mul_(unit)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        value = self.value if self._unit is None else self._unit * self.value
        return value.to(x.dtype).expand_as(x)

    def dimwise_derivatives(self, t: Tensor, x: Tensor, order: int) -> tuple[Tensor, ...]:
        return self(t, x), *[torch.zeros_like(x)] * order


class DiagonalSDE(nn.Module):
    r"""
    An Ito stochastic differential equation with diagonal noise,

        :math:`dx_i = f_i(t, x) \, dt + g_i(t, x) \, dW_i, \qquad i = 1, \dots, d,`

    with independent Brownian motions :math:`W_i`. If f and g are hollow networks, all derivatives that the
    Fokker-Planck equation asks for, :math:`\partial_i f_i, \partial_i g_i, \partial_i^2 g_i`, cost no more than an
    elementwise pass; of other functions they are taken by automatic differentiation, in d and 2 d backward passes.

    Hollow networks see standardised time and state, and return f and g in standard units: with the location m and the
    scale s of each coordinate, the first time :math:`t_0` and the span T,

        :math:`f_i(t, x) = \frac{s_i}{T} \, \text{drift}_i\!\left(\frac{t - t_0}{T}, \frac{x - m}{s}\right), \qquad
        g_i(t, x) = \frac{s_i}{\sqrt{T}} \, \text{softplus}(\text{diffusion}_i(\cdot, \cdot)) + \text{min_diffusion}.`

    :meth:`standardize` sets them from samples, once, and they are saved with the state; until then they are 0 and 1.
    Functions and modules of your own are functions of t and x in the units of the data, and so are :meth:`f`,
    :meth:`g`, :meth:`bind` and :meth:`sample`.

    It speaks the protocol of torchsde: ``torchsde.sdeint(sde, x0, times, dt=1e-2)`` samples it where torchsde is
    installed, :meth:`sample` does without.

    Example usage:

    >>> sde = DiagonalSDE(HollowNN(2), HollowNN(2))
    >>> sde.sample(torch.zeros(100, 2), times=[0., 0.5, 1.], dt=0.01).shape
    torch.Size([3, 100, 2])

    :param drift: f, a :class:`~pyro_hollow.nn.HollowNN` or any function or module of t and x with shape ``(*, d)`` that
        returns ``(*, d)``, sample by sample; t is a scalar or one time per sample.
    :param diffusion: g, or a number or tensor for a constant one, a Parameter for one that is learned. A HollowNN's is
        positive, see above; any other function is used as it is (only :math:`g^2` matters to the law of x, so its sign
        is free).
    :param float min_diffusion: the smallest g of a network, in units of x per square root of time; None for a
        thousandth of :math:`s / \sqrt{T}`. Set it where g is to be learned from marginals together with a free drift,
        as they do not determine it; see :class:`~pyro_hollow.sde.FokkerPlanckMatching`.
    :raises ValueError: if min_diffusion is negative or infinite, or a network takes a context.
    """

    noise_type = "diagonal"
    sde_type = "ito"

    def __init__(
        self,
        drift: nn.Module | Coefficient,
        diffusion: nn.Module | Coefficient | Tensor | float,
        *,
        min_diffusion: float | None = None,
    ) -> None:
        super().__init__()
        if min_diffusion is not None and not (min_diffusion >= 0 and math.isfinite(min_diffusion)):
            raise ValueError(f"min_diffusion must not be negative and be finite, but got {min_diffusion}")
        for name, net in (("drift", drift), ("diffusion", diffusion)):
            if isinstance(net, ConditionalHollowNN) and net.context_dim:
                raise ValueError(f"{name} must take no context, but takes one of size {net.context_dim}")
        if not callable(diffusion):
            diffusion = _Constant(torch.as_tensor(diffusion))
        self.drift = drift
        self.diffusion = diffusion
        self.min_diffusion = min_diffusion
        networks = [net for net in (drift, diffusion) if isinstance(net, ConditionalHollowNN)]
        like = torch.zeros(networks[0].input_dim if networks else 0).to(next(self.parameters(), torch.zeros(())))
        self.time_units = Standardization(like.new_zeros(()))
        self.units = Standardization(like) if networks else None

    def standardize(self, t: Tensor, x: Tensor) -> None:
        """
        Sets the units of the networks from samples, unless they have been set already:
        :func:`~pyro_hollow.sde.fit` does so, and before a training loop of your own one call of
        :meth:`FokkerPlanckMatching.standardize <pyro_hollow.sde.FokkerPlanckMatching.standardize>`.

        :param Tensor t: times with shape ``(n,)``.
        :param Tensor x: samples with shape ``(n, d)``.
        :raises ValueError: for another shape or type, values that are not finite and a constant column of x.
        """
        if self.time_units.is_set:
            return
        if self.units is not None:
            self.units.fit("x", x)
        self.time_units.fit_interval("t", t)

    def bind(self) -> BoundSDE:
        """The coefficients for many evaluations; bind anew after changing parameters."""
        drift, diffusion = self.drift, self.diffusion
        if self.units is not None:
            time, state = self.time_units, self.units
            if isinstance(drift, ConditionalHollowNN):
                drift = _InUnits(drift.bind(), time, state, state.scale / time.scale)
            if isinstance(diffusion, ConditionalHollowNN):
                unit = state.scale / time.scale.sqrt()
                floor = 1e-3 * unit if self.min_diffusion is None else self.min_diffusion
                diffusion = _InUnits(_PositiveField(diffusion.bind()), time, state, unit, floor)
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
        :raises ValueError: for states or times that are not finite, times that do not increase, a dt that is not
            positive and finite, and an unknown method.
        :raises ArithmeticError: if a path leaves the numbers.
        """
        check_finite("x0", x0)
        ticks = [float(time) for time in times]
        check_finite("times", torch.tensor(ticks))
        if len(ticks) < 2 or any(not b > a for a, b in zip(ticks[:-1], ticks[1:], strict=True)):
            raise ValueError(f"times must be two or more that increase, but got {ticks}")
        if not 0 < dt < math.inf:
            raise ValueError(f"dt must be positive and finite, but got {dt}")
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
