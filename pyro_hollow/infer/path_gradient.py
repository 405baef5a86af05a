# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A posterior that scores its samples with the path gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform

__all__ = ["PathGradientDistribution"]


class PathGradientDistribution(dist.TransformedDistribution):
    r"""
    A :class:`~pyro.distributions.TransformedDistribution` for guides, whose log-density of its own latest sample
    depends on parameters through the sample alone [1, 2]:

        :math:`\nabla_\phi \log q_\phi(x_\phi) \to \left. \nabla_x \log q(x) \right|_{x_\phi} \nabla_\phi x_\phi.`

    What is left out, the gradient of :math:`\log q_\phi` at a fixed point, is noise of mean zero. So the gradient of
    the ELBO keeps its mean, and loses all of its variance where the guide is exact: as many steps get further. The
    score comes out of the flow's own solve, see :meth:`~pyro_hollow.transforms.HollowCNF.call_and_score`.

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
    :param transforms: flows with the method ``call_and_score``, such as :class:`~pyro_hollow.transforms.HollowCNF` and
        what :class:`~pyro_hollow.transforms.ConditionalHollowCNF` makes of a context; or none, for the base alone.
    :param bool validate_args: as for any distribution.
    :raises TypeError: for another transform.

    References:

    [1] Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for
    Variational Inference. [arXiv:1703.09194]

    [2] Lorenz Vaitl, Kim Andrea Nicoli, Shinichi Nakajima, Pan Kessel.
    Path-Gradient Estimators for Continuous Normalizing Flows. [arXiv:2206.09016]
    """

    _latest: tuple[Tensor, Tensor, Tensor] | None = None

    def __init__(
        self,
        base_distribution: dist.TorchDistribution,
        transforms: Transform | Sequence[Transform],
        validate_args: bool | None = None,
    ) -> None:
        transforms = [transforms] if isinstance(transforms, Transform) else list(transforms)
        for transform in transforms:
            if not hasattr(transform, "call_and_score"):
                raise TypeError(
                    "transforms must have the method call_and_score, as Hollow-CNFs have, but "
                    f"{type(transform).__name__} has not: take a TransformedDistribution for it"
                )
        super().__init__(base_distribution, transforms, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> PathGradientDistribution:
        """As for any distribution; the latest sample is not taken along."""
        new = self._get_checked_instance(PathGradientDistribution, _instance)
        return super().expand(batch_shape, _instance=new)

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
        fixed = x.detach().requires_grad_()
        log_density = self.base_dist.log_prob(fixed)
        (score,) = torch.autograd.grad(log_density.sum(), fixed)
        for transform in self.transforms:
            x, ladj, score = transform.call_and_score(x, score)
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
