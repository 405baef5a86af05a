# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior that scores its samples with the path gradient."""

from __future__ import annotations

from functools import partial

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Transform

__all__ = ["PathGradientDistribution"]


def _call_and_score(transform: Transform, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""
    Value, log-determinant and score by automatic differentiation: :math:`J^T s_y = s_x - \nabla \log |\det J|`.

    The other pass comes first, so that what the transform remembers is of the values that are returned.
    """
    fixed = x.detach().requires_grad_()
    image = transform(fixed)
    d = x.shape[-1]
    units = torch.eye(d).to(x).view(d, *(1,) * (x.dim() - 1), d).expand(d, *x.shape)
    (jacobian,) = torch.autograd.grad(image, fixed, units, retain_graph=True, is_grads_batched=True)
    ladj = _log_det(transform, fixed, image)
    if ladj.requires_grad:
        score = score - torch.autograd.grad(ladj.sum(), fixed, materialize_grads=True)[0]
    score = torch.linalg.solve(jacobian.movedim(0, -1), score.unsqueeze(-1)).squeeze(-1)
    y = transform(x)
    return y, _log_det(transform, x, y), score.detach()


def _log_det(transform: Transform, x: Tensor, y: Tensor) -> Tensor:
    """Of the vector, also if the transform acts on its elements."""
    return sum_rightmost(transform.log_abs_det_jacobian(x, y), 1 - transform.domain.event_dim)


class PathGradientDistribution(dist.TransformedDistribution):
    r"""
    A :class:`~pyro.distributions.TransformedDistribution` for guides, whose log-density of its own latest sample
    depends on parameters through the sample alone [1, 2]:

        :math:`\nabla_\phi \log q_\phi(x_\phi) \to \left. \nabla_x \log q(x) \right|_{x_\phi} \nabla_\phi x_\phi.`

    What is left out, the gradient of :math:`\log q_\phi` at a fixed point, is noise of mean zero. So the gradient of
    the ELBO keeps its mean, and loses all of its variance where the guide is exact: as many steps get further.

    The score of a Hollow-CNF comes out of its own solve (:meth:`~pyro_hollow.transforms.HollowCNF.call_and_score`).
    Any other transform, such as one of Pyro's, is differentiated: a backward pass for each of the d dimensions, and a
    linear system of that size.

    Example usage, for the posterior of a VAE:

    >>> flow = conditional_hollow_cnf(input_dim=8, context_dim=16)
    >>> base = dist.Normal(torch.zeros(5, 8), torch.ones(5, 8)).to_event(1)
    >>> posterior = PathGradientDistribution(base, [flow.condition(torch.randn(5, 16))])
    >>> z = posterior.rsample()
    >>> posterior.log_prob(z).shape
    torch.Size([5])

    The log-density of any other value, and without gradients, is that of a TransformedDistribution. The path gradient
    is for objectives that are linear in the log-density, as :class:`~pyro.infer.Trace_ELBO` is;
    :class:`~pyro.infer.RenyiELBO` would be biased.

    :param base_distribution: a distribution with ``rsample`` and a differentiable ``log_prob``.
    :param transforms: flows whose log-determinant is exact, and whose samples do not depend on each other; or none, for
        the base alone.
    :param bool validate_args: as for any distribution.
    :raises ValueError: for samples that are not vectors, on the first of them.

    References:

    [1] Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for
    Variational Inference. [arXiv:1703.09194]

    [2] Lorenz Vaitl, Kim Andrea Nicoli, Shinichi Nakajima, Pan Kessel.
    Path-Gradient Estimators for Continuous Normalizing Flows. [arXiv:2206.09016]
    """

    _latest: tuple[Tensor, Tensor, Tensor] | None = None

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """
        Samples that carry gradients, and the score to go with them.

        :param sample_shape: the shape of independent samples of the whole batch.
        """
        if not torch.is_grad_enabled():
            return super().rsample(sample_shape)
        return self._carry(self.base_dist.rsample(sample_shape))

    def _carry(self, x: Tensor) -> Tensor:
        """The image of samples of the base, whose log-density and score are kept."""
        if len(self.event_shape) != 1:
            raise ValueError(f"samples must be vectors, but the event shape is {tuple(self.event_shape)}")
        fixed = x.detach().requires_grad_()
        log_density = self.base_dist.log_prob(fixed)
        (score,) = torch.autograd.grad(log_density.sum(), fixed)
        for transform in self.transforms:
            carry = getattr(transform, "call_and_score", None) or partial(_call_and_score, transform)
            x, ladj, score = carry(x, score)
            log_density = log_density - ladj
        self._latest = x, log_density.detach(), score
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        """
        The log-density, with the path gradient where the value is the latest sample itself.

        :param Tensor value: with the shape of a sample.
        """
        if self._latest is None or value is not self._latest[0]:
            return super().log_prob(value)
        x, log_density, score = self._latest
        return log_density + (score * (x - x.detach())).sum(-1)
