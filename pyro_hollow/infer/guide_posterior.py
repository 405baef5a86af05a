# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Parts of an automatic guide's posterior besides its flows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Transform
from torch.distributions.transforms import _InverseTransform

from .gaussian_mixture import GaussianMixture
from .path_gradient import PathGradientDistribution

__all__ = ["Affine", "PathPosterior", "Posterior", "Stretching", "Tails", "spread_normal"]

# Up to here the particles of a step are spread evenly; more have little to gain.
_MAX_SPREAD = 4096
# Only the tails of a standard Normal lie beyond: one sample in eight.
_TAILS_FROM = 1.5
# The share of samples that may have to be restrained, and how fast the stretching recedes while more are.
_MAX_RESTRAINED = 0.15
_RECESSION = 0.1
_LEAST_EXCESS = 1e-3


class _Bijection(Transform):
    """
    Keeps its latest pair, so that scoring a sample inverts nothing; but not for a sample that has lost its gradients or
    was edited. As it is made anew for each step, of tensors that nobody else has, torch's own cache is enough.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    sign = +1

    def __init__(self) -> None:
        super().__init__(cache_size=1)

    @property
    def inv(self) -> _InverseTransform:
        """The inverse. Made anew each time: a stored one would form a cycle that keeps graphs alive."""
        return _InverseTransform(self)

    def _inv_call(self, y: Tensor) -> Tensor:
        edited = not y.is_inference() and y._version > 0
        if edited or (torch.is_grad_enabled() and not y.requires_grad):
            return self._inverse(y)
        return super()._inv_call(y)


class Affine(_Bijection):
    r""":math:`y = \mu + \mathrm{diag}(\sigma) (I + U) x` with a strictly lower triangular U, or without."""

    def __init__(self, loc: Tensor, log_scale: Tensor, lower: Tensor | None) -> None:
        super().__init__()
        self.loc, self.log_scale, self.lower = loc, log_scale, lower

    def _call(self, x: Tensor) -> Tensor:
        mixed = x if self.lower is None else x + x @ self.lower.mT
        return torch.addcmul(self.loc, mixed, self.log_scale.exp())

    def _inverse(self, y: Tensor) -> Tensor:
        mixed = (y - self.loc) * (-self.log_scale).exp()
        return mixed if self.lower is None else self._solve(self.lower, mixed, upper=False)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.log_scale.sum().expand(x.shape[:-1])

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, log-determinant, and the gradient of the log-density of y from that of x."""
        y = self(x)
        with torch.no_grad():
            mixed = score if self.lower is None else self._solve(self.lower.mT, score, upper=True)
            return y, self.log_abs_det_jacobian(x, y), mixed * (-self.log_scale).exp()

    def transposed(self) -> Callable[[Tensor], Tensor]:
        """The transpose of the Jacobian, by a function that holds no pair and no graph."""
        scale, lower = self.log_scale.detach().exp(), self.lower
        if lower is None:
            return lambda rows: rows * scale
        matrix = scale.diag() + scale.unsqueeze(-1) * lower.detach()
        return lambda rows: rows @ matrix

    @staticmethod
    def _solve(matrix: Tensor, rows: Tensor, upper: bool) -> Tensor:
        # One system for all rows: one for each would copy the matrix as often.
        flat = rows.reshape(-1, rows.shape[-1])
        return torch.linalg.solve_triangular(matrix.mT, flat, upper=not upper, left=False, unitriangular=True).view_as(
            rows
        )


class Tails(_Bijection):
    r"""
    Heavier tails, coordinate by coordinate and side by side,

        :math:`y = \operatorname{sign}(x) \bigl(\min(|x|, c) + r \sqrt{1 + b r^2}\bigr), \qquad r = \max(|x| - c, 0),`

    with c = 1.5. For b = 0 it is the identity; for b > 0 it grows like the square of x in the end, which makes
    exponential tails of Gaussian ones.

    :param Tensor weight: b for the left and the right tail, with shape ``(d, 2)``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The part of x within the tails' thresholds, that beyond them, and the weights of the tails."""
        inner = x.clamp(-_TAILS_FROM, _TAILS_FROM)
        return inner, x - inner, torch.where(x < 0, self.weight[:, 0], self.weight[:, 1])

    def _call(self, x: Tensor) -> Tensor:
        inner, r, b = self._split(x)
        return inner + r * (1 + b * r.square()).sqrt()

    def _inverse(self, y: Tensor) -> Tensor:
        inner, s, b = self._split(y)
        return inner + s * (2 / (1 + (1 + 4 * b * s.square()).sqrt())).sqrt()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        _, r, b = self._split(x)
        return self._log_slope(b * r.square()).sum(-1)

    @staticmethod
    def _log_slope(q: Tensor) -> Tensor:
        return torch.log1p(2 * q) - 0.5 * torch.log1p(q)

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, log-determinant, and the gradient of the log-density of y from that of x."""
        y = self(x)
        with torch.no_grad():
            *_, log_slope, _, score = self._carry(x, score)
        return y, log_slope.sum(-1), score

    def _carry(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Beyond the thresholds r, its square, q = b r^2; and the log slope, the slope, and the score of the image."""
        _, r, b = self._split(x)
        square = r.square()
        q = b * square
        log_slope = self._log_slope(q)
        slope = log_slope.exp()
        gradient = b * r * (4 / (1 + 2 * q) - 1 / (1 + q))
        return r, square, q, log_slope, slope, (score - gradient) / slope

    @torch.no_grad()
    def call_and_pull(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """See :meth:`~pyro_hollow.transforms.HollowCNF.call_and_pull`."""
        r, square, q, log_slope, slope, score = self._carry(x, score)
        root = (1 + q).sqrt()

        def pull(y_bar: Tensor) -> Tensor:
            b_bar = y_bar * (square * r / (2 * root))
            sides = torch.stack([b_bar * (x < 0), b_bar * (x >= 0)], dim=-1)
            self.weight.backward(sides.reshape(-1, *self.weight.shape).sum(0))
            return y_bar * slope

        return x - r + r * root, log_slope.sum(-1), score, pull


@lru_cache(maxsize=8)
def _sobol_points(size: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.quasirandom.SobolEngine(dim).draw(size, dtype=dtype).to(device)


def spread_normal(size: int, dim: int, like: Tensor) -> Tensor:
    """
    Standard normal samples that are evenly spread: the normal images of Sobol points under one random shift. Each is
    distributed as it should be, and their mean varies less than that of independent samples. More than can be spread
    are independent.

    :param int size: the number of samples.
    :param int dim: their dimension.
    :param Tensor like: of the wanted type and device.
    :return: with shape ``(size, dim)``.
    """
    if not (2 <= size <= _MAX_SPREAD and dim <= torch.quasirandom.SobolEngine.MAXDIM):
        return torch.randn(size, dim, dtype=like.dtype, device=like.device)
    shift = torch.rand(dim, dtype=like.dtype, device=like.device)
    uniform = (_sobol_points(size, dim, like.dtype, like.device) + shift).frac()
    eps = torch.finfo(like.dtype).eps
    return torch.special.ndtri(uniform.clamp(eps, 1 - eps))


def _spread_sample(posterior: dist.TransformedDistribution, sample_shape: torch.Size) -> Tensor:
    """Samples of the base; evenly spread for training."""
    base = posterior.base_dist
    batch_shape, (dim,) = sample_shape + posterior.batch_shape, posterior.event_shape
    if not torch.is_grad_enabled():
        return base.rsample(sample_shape)
    if isinstance(base, GaussianMixture):
        size = batch_shape.numel()
        return base.place(spread_normal(size, dim, base.locs), base.stratify(size)).view(*batch_shape, dim)
    return spread_normal(batch_shape.numel(), dim, base.mean).view(*batch_shape, dim)


class Posterior(dist.TransformedDistribution):
    """Flows and an affine map, with evenly spread samples."""

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        x = _spread_sample(self, sample_shape)
        for transform in self.transforms:
            x = transform(x)
        return x


class Stretching(nn.Module):
    """
    Stretches samples of the base, so that a guide is trained in its tails, and restrains their gradients: far out a
    model's gradient can be as large as any number, and one sample outweigh all others.

    :param float limit: the largest factor.
    """

    excess: Tensor

    def __init__(self, limit: float) -> None:
        super().__init__()
        self._max_excess = limit - 1.0
        self.register_buffer("excess", torch.tensor(self._max_excess))

    def forward(self, x: Tensor) -> Tensor:
        """Stretches each coordinate by a factor drawn evenly from 1 to the largest one at present."""
        return x * (1.0 + self.excess * torch.rand_like(x))

    @torch.no_grad()
    def shrink(self) -> bool:
        """Halves the stretching, for samples at which a model cannot be evaluated; False if there is none to halve."""
        least = min(_LEAST_EXCESS, self._max_excess)
        stretched = bool(self.excess > least)
        self.excess.mul_(0.5).clamp_(min=least)
        return stretched

    @torch.no_grad()
    def restrain(self, gradient: Tensor, size: Tensor, largest: Tensor) -> Tensor:
        """
        Cuts the gradients of samples to a largest size each. The stretching recedes while too many have to be cut.

        :param Tensor gradient: with shape ``(*, d)``.
        :param Tensor size: that of each gradient, with shape ``(*,)``; where it is not finite, nothing is left.
        :param Tensor largest: with shape ``(*,)``.
        """
        excessive = ~(size <= largest)
        share = excessive.to(self.excess.dtype).mean()
        self.excess.mul_(torch.exp(_RECESSION * (_MAX_RESTRAINED - share)))
        self.excess.clamp_(min(_LEAST_EXCESS, self._max_excess), self._max_excess)
        cut = torch.where(excessive, largest / size, 1.0).unsqueeze(-1)
        return torch.where(size.isfinite().unsqueeze(-1), gradient * cut, 0.0)


class PathPosterior(PathGradientDistribution):
    """
    A :class:`Posterior` with the path gradient. With :attr:`stretching`, samples with gradients are those of a
    stretched base, but scored by the density of the one that is not; the gradient that reaches a sample is at most as
    large as the score's part in it. For that the last transform must be affine: sizes are those in its coordinates.
    """

    # Set afterwards, as torch refuses to expand a distribution that has an __init__ of its own.
    stretching: Stretching | None = None
    # Tells whether the model can be evaluated at samples.
    is_valid: Callable[[Tensor], bool] | None = None
    # By what the gradient of the log-density of each latest sample is multiplied; known in the backward pass.
    _weights: list[Tensor]

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> PathPosterior:
        expanded = super().expand(batch_shape, _instance)
        expanded.stretching, expanded.is_valid = self.stretching, self.is_valid
        return expanded

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        sample = super().rsample(sample_shape)
        if self.stretching is not None and self.is_valid is not None and torch.is_grad_enabled():
            while not self.is_valid(sample.detach()) and self.stretching.shrink():
                sample = super().rsample(sample_shape)
        return sample

    def _base_sample(self, sample_shape: torch.Size) -> Tensor:
        x = _spread_sample(self, sample_shape)
        return x if self.stretching is None else self.stretching(x)

    def _map(self, x: Tensor) -> Tensor:
        x = super()._map(x)
        if self.stretching is not None and x.requires_grad and self._latest is not None:
            # A hook that held this distribution would keep it alive for ever, with the sample that it caches.
            self._weights = []
            transposed = self.transforms[-1].transposed()
            x.register_hook(partial(_restrain, self.stretching, transposed, self._latest[-1], self._weights))
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        log_density = super().log_prob(value)
        if self.stretching is not None and self._recall(value) is not None and log_density.requires_grad:
            log_density.register_hook(self._weights.append)
        return log_density


def _restrain(
    stretching: Stretching,
    transposed: Callable[[Tensor], Tensor],
    score: Tensor,
    weights: list[Tensor],
    gradient: Tensor,
) -> Tensor:
    """A sample's gradient, at most as large as the part of the score, once the weights of the latter are known."""
    if not weights:
        return gradient
    weight = torch.stack(weights).sum(0)
    weights.clear()
    with torch.no_grad():
        size, largest = (transposed(rows).norm(dim=-1) for rows in (gradient, score))
    return stretching.restrain(gradient, size, weight.abs() * largest)
