# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Learning a stochastic differential equation from samples of its marginals, by matching the Fokker-Planck equation

    :math:`\partial_t p = \sum_{i=1}^d \left[ -\partial_i (f_i p) + \tfrac{1}{2} \partial_i^2 (g_i^2 p) \right].`

Every term is a dimension-wise derivative. Expanded, with :math:`\ell = \log p` and :math:`s = \nabla \ell`,

    :math:`\partial_t \ell = \sum_{i=1}^d \left[ -\partial_i f_i - f_i s_i + (\partial_i g_i)^2 + g_i \partial_i^2 g_i +
    2 g_i (\partial_i g_i) s_i + \tfrac{1}{2} g_i^2 (\partial_i s_i + s_i^2) \right],`

and :math:`\partial_t p` is p times that. (An expansion that is in circulation has :math:`\partial_i^2 g_i` and
:math:`2 (\partial_i g_i) s_i` for the third to fifth terms. It is wrong unless g is constant.)

**What can be learned.** The marginals do not determine the equation. For any g > 0 there is a drift with the same
marginals, :math:`f_i = v_i + g_i \, \partial_i g_i + \frac{1}{2} g_i^2 s_i`, where v is the velocity of the probability
flow; and in two dimensions or more v may be joined by any field u with :math:`\nabla \cdot (p u) = 0`, such as a
rotation of an isotropic density. Judge what was learned by its simulated marginals. The drift is determined where g is
known and, in two dimensions or more, the drift is known to be a gradient. Both are determined where the drift is the
gradient of a potential that does not depend on time, g is constant, and the process is not in equilibrium [2]; then
use :func:`~pyro_hollow.sde.fit_gradient_flow`, which also tells how much the samples at hand say about g.

References:

[1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]

[2] Vincent Guan, Joseph Janssen, Nicolas Lanzetti, Antonio Terpin, et al. Identifying drift, diffusion, and causal
structure of gradient flows from marginals, 2025. [arXiv:2505.21770]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_hollow.nn.standardization import check_finite, location_and_scale
from pyro_hollow.train import train

from .densities import DensityDerivatives, LogDensity, TimeDensity, log_density_derivatives
from .diagonal_sde import BoundSDE, DiagonalSDE, _Constant

__all__ = ["FokkerPlanckMatching", "MatchingLoss", "fit", "fokker_planck_rhs", "probability_flow"]

SDE = DiagonalSDE | BoundSDE


def _bind(sde: SDE) -> BoundSDE:
    return sde.bind() if isinstance(sde, DiagonalSDE) else sde


def fokker_planck_rhs(density: TimeDensity | LogDensity, sde: SDE, t: Tensor, x: Tensor, form: str = "log") -> Tensor:
    r"""
    The right-hand side of the Fokker-Planck equation for a density of x, where x obeys the stochastic differential
    equation: :math:`\partial_t \ell` or :math:`\partial_t p`.

    :param density: a density with the method ``derivatives``, or a function of t and x that returns the log-density
        with shape ``(*,)``; see :func:`~pyro_hollow.sde.log_density_derivatives` for the cost.
    :param sde: the stochastic differential equation.
    :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
    :param Tensor x: positions with shape ``(*, d)``.
    :param str form: "log" for the rate of the log-density, which stays informative where the density is small, or
        "density" for that of the density.
    :returns: the rate, per time, with shape ``(*,)``.
    :raises ValueError: for another form, and for t or x that is not finite.
    """
    if form not in ("log", "density"):
        raise ValueError(f"form must be 'log' or 'density', but got {form!r}")
    derivatives = log_density_derivatives(density, t, x)
    rate = _log_rhs(derivatives, _bind(sde), t, x)
    return rate if form == "log" else derivatives.log_prob.exp() * rate


def _log_rhs(density: DensityDerivatives, sde: BoundSDE, t: Tensor, x: Tensor) -> Tensor:
    f, df = sde.drift_derivatives(t, x)
    g, dg, d2g = sde.diffusion_derivatives(t, x)
    s, ds = density.score, density.curvature
    drift = -df - f * s
    diffusion = dg.square() + g * d2g + 2 * g * dg * s + 0.5 * g.square() * (ds + s.square())
    return (drift + diffusion).sum(-1)


def probability_flow(score: Callable[[Tensor, Tensor], Tensor], sde: SDE) -> Callable[[Tensor, Tensor], Tensor]:
    r"""
    The vector field of the ordinary differential equation that has the marginals of the stochastic one,

        :math:`v_i = f_i - \tfrac{1}{2} \partial_i (g_i^2) - \tfrac{1}{2} g_i^2 s_i, \qquad s = \nabla \log p.`

    :class:`~pyro_hollow.ode.Solver` integrates it, as it does any function of t and x.

    :param score: maps t and x with shape ``(*, d)`` to s with shape ``(*, d)``; of a density with the method
        ``derivatives``, ``lambda t, x: density.derivatives(t, x).score``.
    :param sde: the stochastic differential equation, with its parameters as they are now.
    :returns: the function v of t and x.

    References:

    [1] Yang Song, Jascha Sohl-Dickstein, Diederik P. Kingma, Abhishek Kumar, Stefano Ermon, Ben Poole.
    Score-Based Generative Modeling through Stochastic Differential Equations. [arXiv:2011.13456]
    """
    bound = _bind(sde)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        g, dg = bound.diffusion_derivatives(t, x, 1)
        return bound.drift(t, x) - g * dg - 0.5 * g.square() * score(t, x)

    return velocity


class MatchingLoss(NamedTuple):
    """
    The value of the objective and its parts, each a scalar.

    :ivar total: nll + weight * residual, with the weight of the objective.
    :ivar nll: the negative mean log-density of the data.
    :ivar residual: the mean squared residual of the Fokker-Planck equation, per time squared.
    """

    total: Tensor
    nll: Tensor
    residual: Tensor


class FokkerPlanckMatching(nn.Module):
    r"""
    The objective that learns a density and a stochastic differential equation together, from samples of x at several
    times and without solving anything:

        :math:`-\mathbb{E}_\text{data} \log p(t, x) + \lambda \, \mathbb{E}\left[ (\partial_t \log p - R)^2 \right],`

    where R is the right-hand side of :func:`fokker_planck_rhs`. The density is fitted by maximum likelihood, and the
    mean square of the residual ties the equation to it. The square is smooth, and its mean under p is the squared
    length of the error of :math:`\partial_t p` in the Fisher-Rao metric. As the density is normalised, p = 0 is no
    solution.

    Where the residual is taken decides where the equation is learned:

    - "data": at the samples; nothing is asked at times between those of the data.
    - "proposal": at times drawn uniformly from the batch's range and positions drawn from the learned density (whose
      method ``sample`` they come from), spread by Gaussian noise.
    - "both": half of the terms each.

    The noise is yours to choose, as marginals do not determine it together with a free drift; a diffusion that is
    learned here raises a warning. (A constant one together with a gradient drift is another matter: see
    :func:`~pyro_hollow.sde.fit_gradient_flow`.) A free g shrinks to the smallest that its network
    allows: the terms with g bring errors of the learned score and curvature into the residual, and fewer the smaller g
    is. What is left is a transport, which never forgets an error. So give g if it is known, or else the
    ``min_diffusion`` of :class:`~pyro_hollow.sde.DiagonalSDE`: half of the data's standard deviation over the square
    root of the span of time is a fair convention. With noise the drift pulls towards p; with much of it the drift is
    mostly score, and harder to learn.

    The scale and the origin of x and t do not matter: density and equation are learned in standard units, which
    :func:`fit` or, before a loop of your own, one call of :meth:`standardize` sets from the data. Then a fit of
    :math:`c x + b` is that of x: the log-density differs by :math:`d \log c`, and drift and diffusion by c. (The
    same seed gives the same fit up to rounding, as far as the data themselves have kept their digits.) Functions,
    modules and constants that you give to the equation, ``min_diffusion`` and ``weight`` are in the units of the data.

    Example usage:

    >>> density = GaussianMixtureMarginals(2, num_components=4, interval=(0., 1.))
    >>> matching = FokkerPlanckMatching(density, DiagonalSDE(HollowNN(2), 0.5))
    >>> t, x = torch.rand(100), torch.randn(100, 2)
    >>> matching.standardize(t, x)
    >>> matching(t, x).total.backward()

    :param density: a module with the methods ``log_prob``, ``derivatives`` and, for a proposal, ``sample``, such as
        :class:`~pyro_hollow.sde.GaussianMixtureMarginals`.
    :param sde: the stochastic differential equation.
    :param float weight: :math:`\lambda`, in units of time squared; None for a hundredth of the squared span of the
        times that :meth:`standardize` has seen. It matters to the density: a large one bends it towards an equation
        that is easy to match. The equation is in the residual alone, whose scale Adam does not see (but the clipping of
        :func:`fit` does), so a small one hardly slows it down, and 0 trains the density alone; it learns the noise of
        the density, too.
    :param str where: "data", "proposal" or "both".
    :param float broadening: the standard deviation of the proposal's noise, in standard deviations of the batch.
    :raises ValueError: for a weight or broadening that is negative or infinite and an unknown place.
    :warns UserWarning: if the diffusion has parameters that are learned.
    """

    def __init__(
        self,
        density: nn.Module,
        sde: DiagonalSDE,
        *,
        weight: float | None = None,
        where: str = "both",
        broadening: float = 0.1,
    ) -> None:
        super().__init__()
        if where not in ("data", "proposal", "both"):
            raise ValueError(f"where must be 'data', 'proposal' or 'both', but got {where!r}")
        for name, value in (("weight", weight), ("broadening", broadening)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must not be negative and be finite, but got {value}")
        diffusion = sde.diffusion
        if isinstance(diffusion, nn.Module) and any(p.requires_grad for p in diffusion.parameters()):
            warnings.warn(
                "a learned diffusion is a convention: marginals do not determine it together with a free drift. Give "
                "it if it is known, or its smallest value as min_diffusion of DiagonalSDE; for the gradient of a "
                "potential and constant noise use fit_gradient_flow",
                stacklevel=2,
            )
        self.density: Any = density  # nn.Module would hide the types of the methods
        self.sde: DiagonalSDE = sde
        self._weight = weight
        self.where = where
        self.broadening = broadening

    @property
    def weight(self) -> float | Tensor:
        """The weight of the residual; assign None for the default."""
        return 0.01 * self.sde.time_units.scale.square() if self._weight is None else self._weight

    @weight.setter
    def weight(self, value: float | None) -> None:
        self._weight = value

    def standardize(self, t: Tensor, x: Tensor) -> None:
        """
        Sets the units of density and equation from the data, unless they have been set already.

        :param Tensor t: the times of the samples, with shape ``(n,)``.
        :param Tensor x: the samples with shape ``(n, d)``.
        :raises ValueError: for other shapes or types, values that are not finite and a constant column of x.
        """
        _check_shapes(t, x)
        _check_finite(t, x)
        for part in (self.density, self.sde):
            if hasattr(part, "standardize"):  # a density of the user's need not have it
                part.standardize(t, x)

    def forward(self, t: Tensor, x: Tensor) -> MatchingLoss:
        """
        :param Tensor t: the times of the samples, with shape ``(n,)``.
        :param Tensor x: the samples with shape ``(n, d)``.
        :raises ValueError: for other shapes, no samples, integers, and for t or x that is not finite.
        """
        _check_shapes(t, x)
        check_finite("t", t)  # before times are proposed
        given = x
        t = t.to(x.dtype)
        n, places = len(x), [(t, x)]
        if self.where != "data":
            places.append(self._propose(t, x))
        if self.where == "proposal":
            nll = -self.density.log_prob(*places.pop(0)).mean()
        t, x = (torch.cat(parts) for parts in zip(*places, strict=True))
        at = self.density.derivatives(t, x)
        if self.where != "proposal":
            nll = -at.log_prob[:n].mean()
        residual = (at.rate - _log_rhs(at, self.sde.bind(), t, x)).square().mean()
        total = nll + self.weight * residual
        if not math.isfinite(total.item()):
            check_finite("x", given)  # after all else, as most densities look for themselves
        return MatchingLoss(total, nll, residual)

    @torch.no_grad()
    def _propose(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        start, end = t.min(), t.max()
        times = start + (end - start) * torch.rand_like(t)
        points = self.density.sample(times)
        return times, points + self.broadening * x.std(0, correction=0) * torch.randn_like(points)


def _check_shapes(t: Tensor, x: Tensor) -> None:
    if x.dim() != 2 or t.shape != x.shape[:1]:
        raise ValueError(f"t and x must have shapes (n,) and (n, d), but got {tuple(t.shape)} and {tuple(x.shape)}")
    if not x.numel():
        raise ValueError(f"x must hold at least one sample, but has shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be of a floating-point type, but got {x.dtype}; convert it with .float()")


def _check_finite(t: Tensor, x: Tensor) -> None:
    check_finite("t", t)
    check_finite("x", x)


def fit(
    matching: FokkerPlanckMatching,
    t: Tensor,
    x: Tensor,
    *,
    steps: int,
    batch_size: int = 256,
    lr: float = 1e-2,
    standardize: bool = True,
    progress: Callable[[int, MatchingLoss], None] | None = None,
) -> None:
    """
    Trains by Adam on random batches, with clipped gradients and a learning rate that falls along half a cosine, in
    standard units. To train otherwise, call ``matching.standardize(t, x)`` and minimise the objective's ``total`` by
    :func:`~pyro_hollow.train.train` or a loop of your own.

    :param matching: the objective, whose density and equation are trained.
    :param Tensor t: the times of the samples, with shape ``(n,)``.
    :param Tensor x: the samples with shape ``(n, d)``.
    :param int steps: the number of steps, at least 1.
    :param int batch_size: the samples of a step, at least 1.
    :param float lr: the learning rate at the start. A constant diffusion that is learned is in standard units
        meanwhile.
    :param bool standardize: False to keep the units as they are, for networks that were trained without; see
        :meth:`FokkerPlanckMatching.standardize`, which keeps units that have been set already in any case.
    :param progress: called after each step with its number, from 1, and the loss before it.
    :raises ArithmeticError: if the loss or the norm of its gradient is not finite; that step changes no parameter.
    :raises ValueError: for other shapes, numbers or types, values that are not finite and a constant column of x.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
    _check_shapes(t, x)
    _check_finite(t, x)
    if standardize:
        matching.standardize(t, x)
    latest: list[MatchingLoss] = []

    def objective() -> Tensor:
        index = torch.randint(len(x), (batch_size,), device=x.device)
        loss = matching(t[index], x[index])
        latest[:] = [MatchingLoss(*(value.detach() for value in loss))]
        return loss.total

    with _constant_in_units(matching.sde.diffusion, t, x) if standardize else nullcontext():
        train(
            objective,
            matching.parameters(),
            num_steps=steps,
            lr=lr,
            schedule="cosine",
            ramp=0,
            max_restarts=None,
            callback=None if progress is None else lambda step, _: progress(step, latest[0]),
            progress=False,
        )


def _constant_in_units(diffusion: Any, t: Tensor, x: Tensor) -> AbstractContextManager[None]:
    """Keeps a constant diffusion that is learned in standard units meanwhile."""
    if not (isinstance(diffusion, _Constant) and diffusion.value.requires_grad):
        return nullcontext()
    scale = location_and_scale("x", x, allow_constant=True)[1]
    span = float(t.max() - t.min()) or 1.0
    return diffusion.in_units(scale / math.sqrt(span))
