# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Densities of latents given data: a Gaussian whose moments depend on the data, bent by a Hollow-CNF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, TransformedDistribution, constraints
from torch import Tensor, nn
from torch.distributions import AffineTransform

from pyro_hollow.nn.standardization import Standardization
from pyro_hollow.ode import Solver
from pyro_hollow.transforms import ConditionalHollowCNF, conditional_hollow_cnf

from .soft_clip import SoftClip

__all__ = ["ConditionalDensity", "Features", "Moments", "StackedMixture", "stack"]

_ONE = torch.Size()

_WIDTH = 128  # of the layers between features and the context of a flow
_POINT_WIDTH = 16  # of the layers of single points
_CORRELATED = 8  # the most columns of points whose correlations are features
_SHARPNESS, _LOG_SHARPNESS = 20.0, (-1.0, 5.0)  # of the edges at the start, and its range
_TINY = 1e-4  # the least scale of points, in units of the data


class Moments(nn.Module):
    """
    The means, log standard deviations and correlations of independent points, which do not depend on their order, and
    the mean of features of the points.

    :param int dim: the dimension of the points, from the left.
    :param shape: the shape of the data.
    """

    def __init__(self, dim: int, shape: torch.Size) -> None:
        super().__init__()
        self.dim, self.shape = dim, shape
        self.size = size = shape.numel() // shape[dim]
        self.points = _layers([size, _POINT_WIDTH, _POINT_WIDTH])
        rows, columns = torch.tril_indices(size, size, -1) if size <= _CORRELATED else torch.zeros(2, 0).long()
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    rows: Tensor
    columns: Tensor

    def statistics(self, x: Tensor) -> Tensor:
        """The moments of data with shape ``(n, *shape)``."""
        points = self._points(x)
        mean, scale = points.mean(-2), points.std(-2)
        z = (points - mean.unsqueeze(-2)) / (scale.unsqueeze(-2) + _TINY)
        correlations = (z[..., self.rows] * z[..., self.columns]).sum(-2) / (points.shape[-2] - 1)
        limit = 1 - 1e-4
        return torch.cat([mean, (scale + _TINY).log(), correlations.clamp(-limit, limit).atanh()], -1)

    def forward(self, x: Tensor) -> Tensor:
        """The mean features of data with shape ``(n, *shape)``."""
        return self.points(self._points(x)).mean(-2)

    def _points(self, x: Tensor) -> Tensor:
        return x.movedim(1 + self.dim, 1).flatten(2) if x.dim() > 2 else x.unsqueeze(-1)


class Features(nn.Module):
    """
    Standardised data, or what a network makes of them.

    :param Tensor x: data with shape ``(n, *x_shape)``, whose location and scale are kept: of each element, or those of
        all elements together for a network of the user's own, which may rely on their order or symmetry.
    :param embedding: a network that maps ``(n, *x_shape)`` to ``(n, features)``; None to flatten the data.
    :param exchangeable: the dimension of ``x_shape`` along which data are independent and identically distributed, for
        features by :class:`Moments`; None for none.
    :raises ValueError: for data without elements, and for an embedding whose output has another shape.
    """

    def __init__(self, x: Tensor, embedding: nn.Module | None, exchangeable: int | None = None) -> None:
        super().__init__()
        self.shape = x.shape[1:]
        if not self.shape.numel():
            raise ValueError(f"x must have at least one element in a row, but has shape {tuple(x.shape)}")
        self.embedding = embedding
        self.moments = None if exchangeable is None or embedding is not None else Moments(exchangeable, self.shape)
        common = self.moments is not None or embedding is not None
        columns = x.reshape(-1, 1) if common else x.reshape(len(x), -1)
        self.units = Standardization(columns[0])
        self.units.fit("x", columns, allow_constant=True)
        if self.moments is not None:
            statistics = self.moments.statistics(self._standard(x))
            self.statistics_units = Standardization(statistics[0])
            self.statistics_units.fit("x", statistics, allow_constant=True)
        with torch.no_grad():
            out = self.to(x)(x[:2])
        if out.shape[:-1] != x[:2].shape[:1] or not out.shape[-1]:
            raise ValueError(f"embedding must map {tuple(x[:2].shape)} to (2, features), but gave {tuple(out.shape)}")
        self.size = out.shape[-1]

    def _standard(self, x: Tensor) -> Tensor:
        return self.units(x.reshape(-1, 1)).reshape(-1, *self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(*, *x_shape)`` to ``(*, features)``."""
        batch = x.shape[: x.dim() - len(self.shape)]
        if self.moments is None and self.embedding is None:
            return self.units(x.reshape(*batch, -1))
        x = self._standard(x)
        if self.moments is None:
            out = self.embedding(x)  # type: ignore[misc]
        else:
            out = torch.cat([self.statistics_units(self.moments.statistics(x)), self.moments(x)], -1)
        return out.reshape(*batch, -1)


def _layers(sizes: Sequence[int]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        modules += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*modules[:-1])


class ConditionalDensity(nn.Module):
    r"""
    The density of :math:`u = e(m(c) + s(c) \odot T(z; c))` for a standard normal z, a Hollow-CNF T and features c of
    the data; the mean m is a linear map plus a network. Or that of :math:`u = e(T(z; c))`. The map e leaves standard
    units; of elements with two bounds, it is a :class:`~pyro_hollow.infer.soft_clip.SoftClip`, too, whose sharpness
    depends on c.

    :param Tensor u: samples of u with shape ``(n, d)``, whose location and scale are kept.
    :param Tensor bounded: the elements with two bounds, of which u has the logit, with shape ``(d,)``.
    :param Features features: makes c of the data.
    :param hidden_dims: the widths of the flow's conditioner; None for its default.
    :param context_dim: the size of the flow's context.
    :param solver: the flow's solver.
    :param bool shifts: False for the latter.
    """

    def __init__(
        self,
        u: Tensor,
        bounded: Tensor,
        features: Features,
        hidden_dims: Sequence[int] | None,
        context_dim: int,
        solver: Solver,
        shifts: bool = True,
    ) -> None:
        super().__init__()
        self.features, self.shifts = features, shifts
        self.dim = dim = u.shape[1]
        self.register_buffer("bounded", bounded)
        self.units = Standardization(u[0])
        self.units.fit("theta", SoftClip(bounded, torch.full_like(u[0], _SHARPNESS)).inv(u))
        self.edges = _layers([features.size, _WIDTH, dim]) if bool(bounded.any()) else None
        if self.edges is not None:
            with torch.no_grad():
                self.edges[-1].weight.zero_()  # type: ignore[operator]
                self.edges[-1].bias.fill_(math.log(_SHARPNESS))  # type: ignore[operator]
        self.context = _layers([features.size, _WIDTH, _WIDTH, context_dim])
        if shifts:
            self.moments = _layers([features.size, _WIDTH, _WIDTH, 2 * dim])
            self.linear = nn.Linear(features.size, dim)
            with torch.no_grad():
                self.moments[-1].weight.mul_(0.1)  # type: ignore[operator]
                self.moments[-1].bias.zero_()  # type: ignore[operator]
        self.flow: ConditionalHollowCNF = conditional_hollow_cnf(dim, context_dim, hidden_dims, solver=solver)

    bounded: Tensor

    def _affine(self, features: Tensor) -> list[Any]:
        if not self.shifts:
            return []
        mean, log_scale = self.moments(features).chunk(2, -1)
        return [AffineTransform(self.linear(features) + mean, log_scale.exp(), event_dim=1)]

    def _made(self, features: Tensor, transforms: list[Any]) -> Any:
        base = dist.Normal(features.new_zeros(*features.shape[:-1], self.dim), 1.0).to_event(1)
        last: list[Any] = [AffineTransform(self.units.loc, self.units.scale, event_dim=1)]
        if self.edges is not None:
            sharpness = self.edges(features).clamp(*_LOG_SHARPNESS).exp()
            last.append(SoftClip(self.bounded, sharpness))
        return TransformedDistribution(base, [*transforms, *last])

    def gaussian(self, x: Tensor) -> Any:
        """The distribution without the flow, given data with shape ``(*, *x_shape)``."""
        features = self.features(x)
        return self._made(features, self._affine(features))

    def forward(self, x: Tensor) -> Any:
        """The distribution given data with shape ``(*, *x_shape)``."""
        features = self.features(x)
        return self._made(features, [self.flow.condition(self.context(features)), *self._affine(features)])


class StackedMixture(TorchDistribution):
    """
    A mixture of distributions of the same shapes with fixed weights. Samples are differentiable, as the choice of a
    component depends on no parameter.

    :param components: the distributions of vectors.
    :param Tensor weights: the weights, which sum to 1.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, components: Sequence[Any], weights: Tensor) -> None:
        self.components, self.weights = list(components), weights
        first = self.components[0]
        super().__init__(first.batch_shape, first.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the components."""
        return self.components[0].support

    def expand(self, batch_shape: Any, _instance: Any = None) -> StackedMixture:
        """The mixture of the expanded components."""
        return StackedMixture([component.expand(batch_shape) for component in self.components], self.weights)

    def rsample(self, sample_shape: Any = _ONE) -> Tensor:
        """Draws one component for each sample, and then from that."""
        size, batch = torch.Size(sample_shape).numel(), self.batch_shape
        if batch or size < len(self.components):  # a choice for each element
            draws = torch.stack([component.rsample(sample_shape) for component in self.components])
            count = torch.Size((*sample_shape, *batch)).numel()
            chosen = torch.multinomial(self.weights, count, replacement=True)
            index = chosen.reshape(1, *sample_shape, *batch, 1).expand(1, *draws.shape[1:])
            return draws.gather(0, index).squeeze(0)
        chosen = torch.multinomial(self.weights, size, replacement=True)
        counts = chosen.bincount(minlength=len(self.components)).tolist()
        draws = torch.cat([c.rsample((n,)) for c, n in zip(self.components, counts, strict=True) if n])
        return draws[torch.randperm(size, device=draws.device)].reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """The logarithm of the mean density."""
        densities = torch.stack([component.log_prob(value) for component in self.components], -1)
        return (densities + self.weights.log()).logsumexp(-1)


def stack(log_densities: Tensor, steps: int = 200) -> Tensor:
    """
    Weights of a mixture that maximise the mean log density of held-out samples (Yao et al., 2018), by the EM algorithm.

    :param Tensor log_densities: of each component, with shape ``(n, K)``.
    :param int steps: the iterations.
    :returns: the weights with shape ``(K,)``.

    References:

    [1] Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman. Using Stacking to Average Bayesian Predictive
    Distributions. [arXiv:1704.02030]
    """
    weights = log_densities.new_full(log_densities.shape[-1:], 1 / log_densities.shape[-1])
    for _ in range(steps):
        weights = (log_densities + weights.log()).softmax(-1).mean(0)
    return weights
