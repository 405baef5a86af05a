# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Mixtures of Gaussians, the base of a guide that keeps several modes."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

__all__ = ["GaussianMixture"]


class GaussianMixture(dist.TorchDistribution):
    r"""
    A mixture of Gaussians, or several of them side by side, each over a group g of the coordinates,

        :math:`q(\mathbf{x}) = \prod_g \sum_{k \in g} w_k \, \mathcal{N}(\mathbf{x}_g; \mathbf{m}_k, L_k L_k^T).`

    A sample is :math:`\mathbf{m}_k + L_k \epsilon` for a component k of each group and a standard normal
    :math:`\epsilon`. It has no gradient with respect to the parameters.

    :param Tensor log_weights: :math:`\log w`, with shape ``(K,)``; they are normalised in each group.
    :param Tensor locs: the means with shape ``(K, d)``, whose elements outside of the group do not count.
    :param Tensor scale_trils: L, lower triangular with a positive diagonal and shape ``(K, d, d)``, likewise.
    :param Tensor members: True for the coordinates of each component, with shape ``(K, d)``. Components with the same
        ones make a group, and each coordinate belongs to one. None for a single group.
    :param batch_shape: for independent copies.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        log_weights: Tensor,
        locs: Tensor,
        scale_trils: Tensor,
        members: Tensor | None = None,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
    ) -> None:
        self.locs, self.scale_trils = locs, scale_trils
        self.members = torch.ones_like(locs, dtype=torch.bool) if members is None else members
        rows, groups = self.members.unique(dim=0, return_inverse=True)
        #: The group of each coordinate, and the components of each group.
        self._group_of = rows.long().argmax(0)
        self._parts = [(groups == g).nonzero().squeeze(-1) for g in range(len(rows))]
        self.log_weights = log_weights.clone()
        for part in self._parts:
            self.log_weights[part] = log_weights[part].log_softmax(0)
        eye = torch.eye(locs.shape[-1]).to(locs)
        self._inverses = torch.linalg.solve_triangular(scale_trils, eye, upper=False)
        log_scales = scale_trils.diagonal(dim1=-2, dim2=-1).log().where(self.members, 0.0)
        self._constants = self.log_weights - (log_scales + 0.5 * math.log(2 * math.pi) * self.members).sum(-1)
        super().__init__(batch_shape, locs.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GaussianMixture:
        """The same mixture for another batch shape."""
        return GaussianMixture(self.log_weights, self.locs, self.scale_trils, self.members, torch.Size(batch_shape))

    def place(self, noise: Tensor, components: Tensor) -> Tensor:
        r"""
        Samples of components, from their noise.

        :param Tensor noise: :math:`\epsilon` with shape ``(n, d)``.
        :param Tensor components: k for each group, with shape ``(n, G)``.
        """
        if components.shape[1] == 1:
            k = components[:, 0]
            return self.locs[k] + (self.scale_trils[k] @ noise.unsqueeze(-1)).squeeze(-1)
        coordinates = torch.arange(noise.shape[-1], device=noise.device)
        k = components[:, self._group_of]
        factors = self.scale_trils[k, coordinates] * self.members[k]
        return self.locs[k, coordinates] + (factors @ noise.unsqueeze(-1)).squeeze(-1)

    def stratify(self, size: int) -> Tensor:
        """
        Components of samples: each occurs its weight times their number, rounded up or down, in random order.

        :param int size: the number of samples.
        :return: with shape ``(size, G)``.
        """
        columns = []
        for part in self._parts:
            positions = (torch.randperm(size).to(self.locs) + torch.rand(1).to(self.locs)) / size
            cumulative = self.log_weights[part].exp().cumsum(0)
            columns.append(part[torch.searchsorted(cumulative, positions * cumulative[-1]).clamp(max=len(part) - 1)])
        return torch.stack(columns, -1)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """
        Samples, stratified over the components, so that their shares vary as little as they can.

        :param sample_shape: the shape of samples of the whole batch.
        """
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(shape.numel(), self.event_shape[0]).to(self.locs)
        return self.place(noise, self.stratify(shape.numel())).view(*shape, -1)

    def explain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""
        Explains points by the components.

        :param Tensor x: with shape ``(n, d)``.
        :return: the log densities; the noise by which each component would make each point, with shape ``(K, n, d)``
            and zero outside of its group; the log probability of each component in its group, with shape ``(K, n)``.
        """
        outside = ~self.members.unsqueeze(1)
        offsets = (x - self.locs.unsqueeze(1)).masked_fill(outside, 0.0)
        noises = (offsets @ self._inverses.mT).masked_fill(outside, 0.0)
        logs = self._constants.unsqueeze(-1) - 0.5 * noises.square().sum(-1)
        log_density, log_probabilities = torch.zeros_like(logs[0]), torch.empty_like(logs)
        for part in self._parts:
            log_density = log_density + logs[part].logsumexp(0)
            log_probabilities[part] = logs[part].log_softmax(0)
        return log_density, noises, log_probabilities

    def log_prob(self, value: Tensor) -> Tensor:
        """
        Log density.

        :param Tensor value: with shape ``(*, d)``.
        """
        return self.explain(value.reshape(-1, value.shape[-1]))[0].view(value.shape[:-1])

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log densities at points with shape ``(n, d)``, and their gradients."""
        log_density, noises, log_probabilities = self.explain(x)
        pulled = (noises @ self._inverses).masked_fill(~self.members.unsqueeze(1), 0.0)
        return log_density, -(log_probabilities.exp().unsqueeze(-1) * pulled).sum(0)

    def moments(self) -> tuple[Tensor, Tensor]:
        """The mean with shape ``(d,)``, and the Cholesky factor of the covariance."""
        d = len(self._group_of)
        mean, factor = self.locs.new_zeros(d), self.locs.new_zeros(d, d)
        for part in self._parts:
            index = self.members[part[0]].nonzero().squeeze(-1)
            weights, locs = self.log_weights[part].exp(), self.locs[part][:, index]
            mean[index] = weights @ locs
            spread = torch.cat([(locs - mean[index]).unsqueeze(-1), self.scale_trils[part][:, index][:, :, index]], -1)
            columns = (spread * weights.sqrt().view(-1, 1, 1)).transpose(0, 1).reshape(len(index), -1)
            # No covariance is formed, which would square its condition.
            lower = torch.linalg.qr(columns.mT, mode="r").R.mT
            factor[index.unsqueeze(-1), index] = lower * lower.diagonal().sign()
        return mean, factor

    def affine(self, loc: Tensor, scale_tril: Tensor) -> GaussianMixture:
        r"""The mixture of :math:`L^{-1} (\mathbf{x} - \mu)`, for an L that mixes no groups."""
        locs = torch.linalg.solve_triangular(scale_tril, (self.locs - loc).mT, upper=False).mT
        factors = torch.linalg.solve_triangular(scale_tril, self.scale_trils, upper=False)
        return GaussianMixture(self.log_weights, locs.contiguous(), factors.contiguous(), self.members)
