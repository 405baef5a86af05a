# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior that scores its samples with the path gradient."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import ComposeTransform, Transform

__all__ = ["PathGradientDistribution"]


def _flatten(transforms: Iterable[Transform]) -> Iterator[Transform]:
    for transform in transforms:
        if isinstance(transform, ComposeTransform):
            yield from _flatten(transform.parts)
        else:
            yield transform


def _call_and_score(transform: Transform, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Value, log-determinant and score, :math:`J^T s_y = s_x - \nabla \log |\det J|`: from the transform itself if it has
    them, or else by automatic differentiation.
    """
    if hasattr(transform, "call_and_score"):
        return transform.call_and_score(x, score)
    # Another name for x, so that gradients can be taken of this transform alone.
    x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    y = transform(x)
    if y.shape != x.shape:
        raise ValueError(
            f"transforms must keep the shape of a vector, but {type(transform).__name__} makes {tuple(y.shape)} of "
            f"{tuple(x.shape)}"
        )
    event_dim = transform.domain.event_dim
    ladj = sum_rightmost(transform.log_abs_det_jacobian(x, y), 1 - event_dim)
    if ladj.requires_grad:
        score = score - torch.autograd.grad(ladj.sum(), x, retain_graph=True, materialize_grads=True)[0]
    if event_dim == 0:
        return y, ladj, score / torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    d = x.shape[-1]
    units = torch.eye(d).to(x).view(d, *(1,) * (x.dim() - 1), d).expand(d, *x.shape)
    (jacobian,) = torch.autograd.grad(y, x, units, retain_graph=True, is_grads_batched=True)
    return y, ladj, torch.linalg.solve(jacobian.movedim(0, -1), score.unsqueeze(-1)).squeeze(-1)


class PathGradientDistribution(dist.TransformedDistribution):
    r"""
    A :class:`~pyro.distributions.TransformedDistribution` for guides, whose log-density of its own latest sample
    depends on parameters through the sample alone [1, 2]:

        :math:`\nabla_\phi \log q_\phi(x_\phi) \to \left. \nabla_x \log q(x) \right|_{x_\phi} \nabla_\phi x_\phi.`

    What is left out, the gradient of :math:`\log q_\phi` at a fixed point, has mean zero. So the gradient of the ELBO
    keeps its mean, and where the guide is exact it has no variance at all. Far from there it can have more than
    without: a learning rate that decays helps.

    The score :math:`\nabla_x \log q` of a Hollow-CNF comes out of its own solve
    (:meth:`~pyro_hollow.transforms.HollowCNF.call_and_score`), that of a low-rank map out of a method of the same name.
    Any other transform of vectors, such as one of Pyro's, is differentiated: a backward pass for each of the d
    dimensions, and a linear system of that size.

    Example usage, for the posterior of a VAE:

    >>> flow = conditional_hollow_cnf(input_dim=8, context_dim=16)
    >>> base = dist.Normal(torch.zeros(5, 8), torch.ones(5, 8)).to_event(1)
    >>> posterior = PathGradientDistribution(base, [flow.condition(torch.randn(5, 16))])
    >>> z = posterior.rsample()
    >>> posterior.log_prob(z).shape
    torch.Size([5])

    Score a sample before parameters change. The log-density of any other value, and without gradients, is that of a
    TransformedDistribution.

    When not to use it: where the density jumps, as that of a uniform base or behind a leaky ReLU, for then what is left
    out has another mean than zero; with objectives that are not linear in the log-density, such as
    :class:`~pyro.infer.RenyiELBO`; and for a site of the guide whose parameters depend on another site, as the density
    forgets that, too: it has the right mean, but not less variance. Flows with ``regularize=True`` integrate no penalty
    on this way.

    :param base_distribution: a distribution over vectors with ``rsample``, whose ``log_prob`` takes any value and has a
        gradient.
    :param transforms: a list of transforms of vectors that keep their size, by which the samples of a batch do not
        depend on each other; or none, for the base alone.
    :param bool validate_args: as for any distribution.
    :raises ValueError: by ``rsample`` for samples that are not vectors, a base without a score, and a transform that
        changes the shape.

    References:

    [1] Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for
    Variational Inference. [arXiv:1703.09194]

    [2] Lorenz Vaitl, Kim Andrea Nicoli, Shinichi Nakajima, Pan Kessel.
    Path-Gradient Estimators for Continuous Normalizing Flows. [arXiv:2206.09016]
    """

    # The latest sample and its version, its log-density and its score.
    _latest: tuple[weakref.ref[Tensor], int, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_latest": None}

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """
        Samples that carry gradients, and the score to go with them.

        :param sample_shape: the shape of independent samples of the whole batch.
        """
        if not torch.is_grad_enabled():
            return super().rsample(sample_shape)
        return self._map(self._base_sample(sample_shape))

    def _base_sample(self, sample_shape: torch.Size) -> Tensor:
        return self.base_dist.rsample(sample_shape)

    def _map(self, x: Tensor) -> Tensor:
        """The image of samples of the base, whose log-density and score are kept."""
        if len(self.event_shape) != 1:
            raise ValueError(f"samples must be vectors, but the event shape is {tuple(self.event_shape)}")
        fixed = x.detach().requires_grad_()
        log_density = self.base_dist.log_prob(fixed)
        score = None
        if log_density.requires_grad:
            (score,) = torch.autograd.grad(log_density.sum(), fixed, allow_unused=True)
        if score is None:
            raise ValueError(f"base_distribution must have a score, but the log-density of {self.base_dist} has none")
        for transform in _flatten(self.transforms):
            x, ladj, score = _call_and_score(transform, x, score)
            log_density = log_density - ladj
        self._latest = weakref.ref(x), x._version, log_density.detach(), score.detach()
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        """
        The log-density, with the path gradient where the value is the latest sample itself.

        :param Tensor value: with the shape of a sample.
        """
        latest = self._recall(value)
        if latest is None:
            return super().log_prob(value)
        log_density, score = latest
        return log_density + (score * (value - value.detach())).sum(-1)

    def _recall(self, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """The log-density and the score of a value that is the latest sample; None of any other."""
        if self._latest is None:
            return None
        sample, version, log_density, score = self._latest
        return (log_density, score) if value is sample() and value._version == version else None
