# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Normalised densities :math:`p(t, x)` that depend on time, with the derivatives of :math:`\ell = \log p` that the
Fokker-Planck equation is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from pyro.distributions import Distribution, TransformedDistribution
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor, nn

from pyro_hollow.nn.standardization import Standardization, check_finite
from pyro_hollow.ops import field_derivatives, time_derivative

__all__ = [
    "DensityDerivatives",
    "FlowMarginals",
    "GaussianMixtureMarginals",
    "TimeDensity",
    "log_density_derivatives",
]

LogDensity = Callable[[Tensor, Tensor], Tensor]


class DensityDerivatives(NamedTuple):
    r"""
    :math:`\ell = \log p(t, x)` and its derivatives.

    :ivar log_prob: :math:`\ell` with shape ``(*,)``.
    :ivar rate: :math:`\partial_t \ell` with shape ``(*,)``.
    :ivar score: :math:`\nabla \ell` with shape ``(*, d)``.
    :ivar curvature: the diagonal :math:`\partial_i^2 \ell` of the Hessian, with shape ``(*, d)``.
    """

    log_prob: Tensor
    rate: Tensor
    score: Tensor
    curvature: Tensor


class TimeDensity(Protocol):
    """A density with derivatives of its own; see :func:`log_density_derivatives` for any other."""

    def log_prob(self, t: Tensor, x: Tensor) -> Tensor:
        """The log-density, with shape ``(*,)``, at times that broadcast to ``(*,)`` and x with shape ``(*, d)``."""

    def derivatives(self, t: Tensor, x: Tensor) -> DensityDerivatives:
        """The log-density with its derivatives."""


def log_density_derivatives(density: TimeDensity | LogDensity, t: Tensor, x: Tensor) -> DensityDerivatives:
    """
    The derivatives of a log-density: from its method ``derivatives`` if it has one; of a function that returns the
    log-density by automatic differentiation, in one forward-mode pass and 1 + d backward passes.

    :param density: a :class:`TimeDensity`, or a function of t and x with shape ``(*, d)`` that returns ``(*,)``.
    :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
    :param Tensor x: positions with shape ``(*, d)``.
    :raises ValueError: for t or x that is not finite, and for a function that returns another shape.
    """
    _check_finite(t, x)
    own = getattr(density, "derivatives", None)
    if own is not None:
        return own(t, x)
    log_prob = cast(LogDensity, density)
    value, score, curvature = field_derivatives(log_prob, t, x, 2)
    if value.shape != x.shape[:-1]:
        raise ValueError(f"density must return shape {tuple(x.shape[:-1])}, but returned {tuple(value.shape)}")
    return DensityDerivatives(value, time_derivative(log_prob, t, x)[1], score, curvature)


def _check_shapes(t: Tensor, x: Tensor, dim: int) -> None:
    if x.dim() == 0 or x.shape[-1] != dim:
        raise ValueError(f"x must have shape (*, {dim}), but got {tuple(x.shape)}")
    try:
        t.expand(x.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"t must be a scalar or broadcast to the batch shape of x, {tuple(x.shape[:-1])}, but has shape "
            f"{tuple(t.shape)}"
        ) from None


def _check_finite(t: Tensor, x: Tensor) -> None:
    check_finite("t", t)
    check_finite("x", x)


class _Curve(nn.Module):
    r"""
    A curve in R^n with its velocity, :math:`c(t) = b + a s + V \tanh(u s + p)` in the scaled time s that runs from -1
    to 1 over an interval.
    """

    def __init__(self, size: int, hidden_dim: int, interval: tuple[float, float]) -> None:
        super().__init__()
        start, end = interval
        self.rate = 2 / (end - start)
        self.start = start
        self.bias = nn.Parameter(torch.zeros(size))
        self.slope = nn.Parameter(torch.zeros(size))
        self.weight = nn.Parameter(0.1 * torch.randn(size, hidden_dim) / math.sqrt(hidden_dim))
        # Kinks spread evenly over the interval, and as sharp as they are close.
        self.frequency = nn.Parameter(torch.full((hidden_dim,), max(1.0, hidden_dim / 4)))
        self.phase = nn.Parameter(-self.frequency.detach() * torch.linspace(-1, 1, hidden_dim))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Value and velocity, each with the shape of t and one more dimension."""
        s = ((t - self.start) * self.rate - 1).unsqueeze(-1)
        units = torch.tanh(self.frequency * s + self.phase)
        value = F.linear(units, self.weight, self.bias) + self.slope * s
        velocity = F.linear((1 - units.square()) * self.frequency, self.weight, self.slope)
        return value, self.rate * velocity


class GaussianMixtureMarginals(nn.Module):
    r"""
    A mixture of Gaussians whose weights, means and precisions are smooth functions of time,

        :math:`p(t, x) = \sum_{k=1}^K w_k(t) \, \mathcal{N}\!\left(x; m_k(t), (L_k(t) L_k(t)^T)^{-1}\right),`

    with the lower triangular factor :math:`L_k` of the precision matrix. With :math:`z_k = L_k^T (x - m_k)` and the
    responsibilities :math:`r_k`, all derivatives are closed forms,

        :math:`\nabla \ell = -\sum_k r_k L_k z_k, \qquad \partial_i^2 \ell = \sum_k r_k \left((L_k z_k)_i^2 - \|L_{k,i}
        \|^2\right) - (\partial_i \ell)^2,`

    and :math:`\partial_t \ell` the mean under r of what the components' logarithms change by. All of them together
    cost two to three times the log-density alone: :math:`O(K d)` operations a sample for diagonal precisions,
    :math:`O(K d^2)` for full ones.

    The parameters describe standardised x: a fixed location and scale of each coordinate, set from samples by
    :meth:`initialize` or :meth:`standardize` and saved with the state. All that is public is in the units of x, and
    fits of x and of :math:`c x + b` are the same fit.

    Example usage:

    >>> density = GaussianMixtureMarginals(2, num_components=4, interval=(0., 3.))
    >>> density.derivatives(torch.tensor(1.), torch.randn(7, 2)).curvature.shape
    torch.Size([7, 2])

    :param int input_dim: the dimension d of x.
    :param int num_components: the number K of components.
    :param interval: the first and the last time of interest, both finite.
    :param str covariance: "full" or "diagonal". Diagonal ones are cheaper, and need more components for correlated x.
    :param int hidden_dim: the number of units that the functions of time share.
    :raises ValueError: for sizes that are not positive, an empty interval and an unknown covariance.
    """

    def __init__(
        self,
        input_dim: int,
        num_components: int,
        interval: tuple[float, float],
        *,
        covariance: str = "full",
        hidden_dim: int = 8,
    ) -> None:
        super().__init__()
        for name, size in (("input_dim", input_dim), ("num_components", num_components), ("hidden_dim", hidden_dim)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, but got {size}")
        if not (interval[0] < interval[1] and math.isfinite(interval[1] - interval[0])):
            raise ValueError(f"interval must run from a time to a later one, both finite, but got {interval}")
        if covariance not in ("full", "diagonal"):
            raise ValueError(f"covariance must be 'full' or 'diagonal', but got {covariance!r}")
        self.input_dim = input_dim
        self.num_components = num_components
        self.interval = interval
        self.covariance = covariance
        # Logit, means, logarithms of the diagonal of L, and what is below the diagonal.
        below = input_dim * (input_dim - 1) // 2 if covariance == "full" else 0
        self._parts = (1, input_dim, input_dim, below)
        self.units = Standardization(torch.zeros(input_dim))
        self.curve = _Curve(num_components * sum(self._parts), hidden_dim, interval)
        with torch.no_grad():
            self.curve.bias.view(num_components, -1)[:, 1 : 1 + input_dim].normal_()

    def standardize(self, t: Tensor, x: Tensor) -> None:
        """
        Sets location and scale to mean and standard deviation of samples, unless they have been set already.

        :param Tensor t: times, which the interval standardises; not used.
        :param Tensor x: samples with shape ``(n, d)``.
        :raises ValueError: for another shape or type, values that are not finite and a constant column.
        """
        if not self.units.is_set:
            self.units.fit("x", x)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """
        Starts anew: sets location and scale as :meth:`standardize` does, puts the means at random samples, for all
        times, and makes the components as wide as the samples' standard deviations over :math:`K^{1/d}`.

        :param Tensor x: samples with shape ``(n, d)``, such as the training samples of all times.
        :raises ValueError: for another shape or type, values that are not finite and a constant column.
        """
        k, d = self.num_components, self.input_dim
        if x.dim() != 2 or x.shape[-1] != d or len(x) < 2:
            raise ValueError(f"x must have shape (n, {d}) with n of at least 2, but got {tuple(x.shape)}")
        self.units.fit("x", x)
        bias = self.curve.bias.view(k, -1)
        bias[:, 1 : 1 + d] = self.units(x[torch.randint(len(x), (k,))]) if k > 1 else 0.0
        bias[:, 1 + d : 1 + 2 * d] = math.log(k) / d

    def log_prob(self, t: Tensor, x: Tensor) -> Tensor:
        """
        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: positions with shape ``(*, d)``.
        :returns: the log-density with shape ``(*,)``.
        :raises ValueError: for other shapes, and for t or x that is not finite.
        """
        _check_shapes(t, x, self.input_dim)
        logits, means, log_diagonal, lower = self._split(self.curve(t)[0])
        z = self._transposed(log_diagonal.exp(), lower, self.units(x).unsqueeze(-2) - means)
        log_prob = torch.logsumexp(self._joint(logits, log_diagonal, z), -1)
        self._check_finite(t, x, log_prob)
        return log_prob - self.units.log_scale()

    def derivatives(self, t: Tensor, x: Tensor) -> DensityDerivatives:
        """
        All that the Fokker-Planck equation asks for, in closed form.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: positions with shape ``(*, d)``.
        :raises ValueError: for other shapes, and for t or x that is not finite.
        """
        _check_shapes(t, x, self.input_dim)
        value, velocity = self.curve(t)
        logits, means, log_diagonal, lower = self._split(value)
        d_logits, d_means, d_log_diagonal, d_lower = self._split(velocity)
        diagonal, offset = log_diagonal.exp(), self.units(x).unsqueeze(-2) - means
        z = self._transposed(diagonal, lower, offset)
        joint = self._joint(logits, log_diagonal, z)
        log_prob = torch.logsumexp(joint, -1)
        self._check_finite(t, x, log_prob)
        r = (joint - log_prob.unsqueeze(-1)).exp()

        dz = self._transposed(diagonal * d_log_diagonal, d_lower, offset) - self._transposed(diagonal, lower, d_means)
        d_log_weights = d_logits - (logits.softmax(-1) * d_logits).sum(-1, keepdim=True)
        rate = (r * (d_log_weights + d_log_diagonal.sum(-1) - (z * dz).sum(-1))).sum(-1)

        scores = -self._times(diagonal, lower, z)
        score = (r.unsqueeze(-1) * scores).sum(-2)
        precision = diagonal.square() + (0 if lower is None else lower.square().sum(-1))
        curvature = (r.unsqueeze(-1) * (scores.square() - precision)).sum(-2) - score.square()
        scale = self.units.scale
        return DensityDerivatives(log_prob - self.units.log_scale(), rate, score / scale, curvature / scale.square())

    @torch.no_grad()
    def sample(self, t: Tensor) -> Tensor:
        """
        Draws one sample for each time, without gradients.

        :param Tensor t: times with shape ``(*,)``.
        :returns: samples with shape ``(*, d)``.
        :raises ValueError: for t that is not finite.
        """
        check_finite("t", t)
        logits, means, log_diagonal, lower = self._split(self.curve(t)[0])
        index = torch.distributions.Categorical(logits=logits).sample()[..., None, None]
        mean, log_diagonal = (v.take_along_dim(index, -2).squeeze(-2) for v in (means, log_diagonal))
        noise = torch.randn_like(mean)
        if lower is None:
            return self.units.inverse(mean + noise / log_diagonal.exp())
        factor = lower.take_along_dim(index.unsqueeze(-1), -3).squeeze(-3) + torch.diag_embed(log_diagonal.exp())
        offset = torch.linalg.solve_triangular(factor.mT, noise.unsqueeze(-1), upper=True).squeeze(-1)
        return self.units.inverse(mean + offset)

    @staticmethod
    def _check_finite(t: Tensor, x: Tensor, log_prob: Tensor) -> None:
        """Looks at t and x only if the result is not finite, which takes one pass less."""
        try:
            check_finite("log_prob", log_prob)
        except ValueError:
            _check_finite(t, x)

    def _split(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Logits ``(*, K)``, means and logarithms of the diagonal ``(*, K, d)``, and the rest of L ``(*, K, d, d)``."""
        d = self.input_dim
        values = values.unflatten(-1, (self.num_components, -1))
        logits, means, log_diagonal, below = values.split(self._parts, dim=-1)
        if self.covariance == "diagonal":
            return logits.squeeze(-1), means, log_diagonal, None
        rows, columns = torch.tril_indices(d, d, -1, device=values.device)
        lower = values.new_zeros(*below.shape[:-1], d * d).index_copy(-1, rows * d + columns, below)
        return logits.squeeze(-1), means, log_diagonal, lower.unflatten(-1, (d, d))

    @staticmethod
    def _transposed(diagonal: Tensor, lower: Tensor | None, v: Tensor) -> Tensor:
        """L^T v. Matrices are many and small: a sum of products beats a batched matrix product."""
        return diagonal * v if lower is None else diagonal * v + (lower * v.unsqueeze(-1)).sum(-2)

    @staticmethod
    def _times(diagonal: Tensor, lower: Tensor | None, v: Tensor) -> Tensor:
        """L v."""
        return diagonal * v if lower is None else diagonal * v + (lower * v.unsqueeze(-2)).sum(-1)

    def _joint(self, logits: Tensor, log_diagonal: Tensor, z: Tensor) -> Tensor:
        """The logarithms of w_k N(x; m_k, P_k), with shape ``(*, K)``."""
        normalizer = log_diagonal.sum(-1) - 0.5 * self.input_dim * math.log(2 * math.pi)
        return logits.log_softmax(-1) + normalizer - 0.5 * z.square().sum(-1)


class FlowMarginals(nn.Module):
    r"""
    The density that a normalizing flow with time for its context makes of a fixed base,

        :math:`\log p(t, x) = \log p_0(z) - \log\left|\det \frac{\partial x}{\partial z}\right|, \qquad x = T_t(z).`

    Exact to the tolerance of the flow's solver, and dear: the log-density costs a solve, its rate and its score a
    backward pass through it, and the diagonal of the Hessian d more passes, as the score of a flow is no hollow
    function. For a few dimensions, and where a mixture of Gaussians is too crude.

    The flow gets standardised x and time, by a fixed affine map that :meth:`standardize` sets and that is saved with
    the state. All that is public is in the units of t and x.

    Example usage:

    >>> from pyro_hollow import conditional_hollow_cnf
    >>> density = FlowMarginals(conditional_hollow_cnf(2, context_dim=1), dist.Normal(torch.zeros(2), 1.).to_event(1))
    >>> density.log_prob(torch.tensor(0.5), torch.randn(7, 2)).shape
    torch.Size([7])

    :param flow: a conditional flow of Pyro, such as :class:`~pyro_hollow.ConditionalHollowCNF`; its ``condition`` gets
        times with shape ``(*, 1)``.
    :param base: the base distribution, whose event shape is ``(d,)``; made on the device of the flow, as no
        distribution moves with a module.
    """

    def __init__(self, flow: ConditionalTransformModule, base: Distribution) -> None:
        super().__init__()
        self.flow = flow
        self.base = base
        parameter = next(flow.parameters(), torch.zeros(()))
        self.units = Standardization(parameter.new_zeros(base.event_shape))
        self.time_units = Standardization(parameter.new_zeros(()))

    def standardize(self, t: Tensor, x: Tensor) -> None:
        """
        Sets the affine maps of time and x from samples, unless they have been set already or the flow has maps of its
        own, as :func:`~pyro_hollow.transforms.standardized` makes them.

        :param Tensor t: times with shape ``(n,)``.
        :param Tensor x: samples with shape ``(n, d)``.
        :raises ValueError: for another shape or type, values that are not finite and a constant column of x.
        """
        if self.units.is_set or any(isinstance(module, Standardization) for module in self.flow.modules()):
            return
        self.units.fit("x", x)
        self.time_units.fit_interval("t", t)

    def log_prob(self, t: Tensor, x: Tensor) -> Tensor:
        """
        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: positions with shape ``(*, d)``.
        :returns: the log-density with shape ``(*,)``.
        :raises ValueError: for other shapes, and for t or x that is not finite.
        """
        _check_shapes(t, x, self.base.event_shape[-1])
        _check_finite(t, x)
        transform = self.flow.condition(self.time_units(t.to(x.dtype)).expand(x.shape[:-1]).unsqueeze(-1))
        density = TransformedDistribution(self.base.expand(x.shape[:-1]), [transform])
        return density.log_prob(self.units(x)) - self.units.log_scale()

    def derivatives(self, t: Tensor, x: Tensor) -> DensityDerivatives:
        """
        The log-density with its derivatives, by one solve and 1 + d backward passes.

        :param Tensor t: time, a scalar, or one per sample with a shape that broadcasts to ``(*,)``.
        :param Tensor x: positions with shape ``(*, d)``.
        :raises ValueError: for other shapes, and for t or x that is not finite.
        """
        _check_shapes(t, x, self.base.event_shape[-1])
        _check_finite(t, x)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            times = t.to(x.dtype).expand(x.shape[:-1]).clone()  # each sample with a time of its own
            times = times if times.requires_grad else times.requires_grad_()
            x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            value = self.log_prob(times, x)
            rate, score = torch.autograd.grad(value.sum(), (times, x), create_graph=True)
            rows = [
                torch.autograd.grad(s.sum(), x, create_graph=True)[0][..., i] for i, s in enumerate(score.unbind(-1))
            ]
        results = DensityDerivatives(value, rate, score, torch.stack(rows, -1))
        return results if create_graph else DensityDerivatives(*(result.detach() for result in results))

    @torch.no_grad()
    def sample(self, t: Tensor) -> Tensor:
        """
        Draws one sample for each time, without gradients, by one solve.

        :param Tensor t: times with shape ``(*,)``.
        :returns: samples with shape ``(*, d)``.
        :raises ValueError: for t that is not finite.
        """
        check_finite("t", t)
        transform = self.flow.condition(self.time_units(t).unsqueeze(-1))
        return self.units.inverse(transform(self.base.expand(t.shape).sample()))
