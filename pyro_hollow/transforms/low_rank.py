# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Linear maps of low rank that depend on a context: correlations of each sample's own, for a flow to bend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.util import copy_docs_from
from torch import Tensor, nn
from torch.distributions import Transform

from .cache import breaks_graph
from .closed_form import ClosedFormTransform, matvec

__all__ = ["ConditionalLowRankLinear", "ConditionedLowRankLinear", "conditional_low_rank_linear"]


@copy_docs_from(Transform)
class ConditionedLowRankLinear(ClosedFormTransform):
    r"""
    The linear map :math:`\mathbf{y} = (I + U V^T) \mathbf{x}` whose context is fixed, as
    :meth:`ConditionalLowRankLinear.condition` returns it. Determinant and inverse take matrices of size r alone, by the
    determinant lemma and Woodbury's identity.

    :param ConditionalLowRankLinear flow: the map.
    :param Tensor context: the context with shape ``(*, context_dim)``.
    """

    def _transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        u, v, small = self.flow._factors(self.context)
        return x + matvec(u, matvec(v.mT, x)), small

    def _invert(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check(y)
        u, v, small = self.flow._factors(self.context)
        return y - matvec(u, _solve(small, matvec(v.mT, y))), small

    def _ladj(self, x: Tensor, results: Sequence[Tensor]) -> Tensor:
        return torch.linalg.slogdet(results[0]).logabsdet.expand(x.shape[:-1])

    @breaks_graph
    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""
        The value, the log-determinant and the score of the density that is carried along,
        :math:`\nabla_{\mathbf{y}} \log p(\mathbf{y}) = (I + U V^T)^{-T} \nabla_{\mathbf{x}} \log p(\mathbf{x})`.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor score: the gradient of the log-density at x, of the same shape.
        :returns: y, the log-determinant and the score at y, the latter without gradients.
        :raises ValueError: for an input of the wrong size, to whose batch shape the context's does not broadcast, or
            whose shape is not that of the score.
        """
        self._check(x)
        if score.shape != x.shape:
            raise ValueError(f"score must have the shape of x, {tuple(x.shape)}, but got {tuple(score.shape)}")
        u, v, small = self.flow._factors(self.context)
        y = x + matvec(u, matvec(v.mT, x))
        self._store(x, y, (small,))
        with torch.no_grad():
            return y, self._ladj(x, (small,)), score - matvec(v, _solve(small.mT, matvec(u.mT, score)))


def _solve(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, vector.unsqueeze(-1)).squeeze(-1)


@copy_docs_from(ConditionalTransformModule)
class ConditionalLowRankLinear(ConditionalTransformModule):
    r"""
    A linear map whose departure from the identity is of low rank and depends on a context,

        :math:`\mathbf{y} = (I + U V^T) \mathbf{x}, \qquad \log\left|\det\frac{\partial\mathbf{y}}{\partial
        \mathbf{x}}\right| = \log\left|\det(I + V^T U)\right|, \qquad U, V \in \mathbb{R}^{d \times r}`

    where :math:`\mathbf{x}` are the inputs with dimension d, :math:`\mathbf{y}` are the outputs, and U and V are what
    a network makes of the context. Between a Hollow-CNF of a standard Normal and the location and scale of an encoder
    it gives every sample r directions of its own in which latents vary together, as the Cholesky factor does in
    :class:`~pyro_hollow.infer.AutoHollowCNF`, where there is but one posterior.

    Together with :class:`~pyro.distributions.ConditionalTransformedDistribution` this provides a way to create richer
    variational approximations, for example the posterior of a variational autoencoder, with the context from the
    encoder.

    Example usage:

    >>> base_dist = dist.Normal(torch.zeros(7, 10), torch.ones(7, 10)).to_event(1)
    >>> transform = ConditionalLowRankLinear(10, torch.nn.Linear(4, 2 * 10 * 3), rank=3)
    >>> _ = pyro.module("my_transform", transform)
    >>> flow_dist = dist.ConditionalTransformedDistribution(base_dist, [transform]).condition(torch.randn(7, 4))
    >>> flow_dist.rsample().shape
    torch.Size([7, 10])

    The inverse is computed in closed form. Nothing keeps :math:`I + V^T U` from being singular, where the
    log-determinant is minus infinity and the inverse raises ``torch.linalg.LinAlgError``; but training starts near the
    identity, and an ELBO keeps away from there.

    :param input_dim: the dimension d of the input (and output) variable.
    :type input_dim: int
    :param nn: a network from the context to a tensor of width 2 d r: U, then V, row by row.
    :type nn: ~torch.nn.Module
    :param rank: the rank r, from 1 to d.
    :type rank: int
    :raises ValueError: for a dimension or a rank out of range.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, input_dim: int, nn: nn.Module, rank: int) -> None:
        super().__init__()
        _check_sizes(input_dim, rank)
        self.input_dim = input_dim
        self.nn = nn
        self.rank = rank

    def condition(self, context: Tensor) -> ConditionedLowRankLinear:
        """
        Conditions on a context variable, returning a non-conditional transform.

        :param Tensor context: the context with shape ``(*, context_dim)``; its batch broadcasts against the input's.
        """
        return ConditionedLowRankLinear(self, context)

    def _factors(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U and V, both with shape ``(*, d, r)``, and I + V^T U."""
        params = self.nn(context).to(context.dtype)
        if params.shape[-1] != 2 * self.input_dim * self.rank:
            raise ValueError(
                f"nn must return a tensor of width 2 * {self.input_dim} * {self.rank}, but its last dimension is "
                f"{params.shape[-1]}"
            )
        u, v = params.unflatten(-1, (2, self.input_dim, self.rank)).unbind(-3)
        # Under autocast the product is of a lower precision, in which there are no determinants.
        return u, v, torch.eye(self.rank, dtype=u.dtype, device=u.device) + (v.mT @ u).to(u.dtype)


def _check_sizes(input_dim: int, rank: int) -> None:
    if input_dim < 1:
        raise ValueError(f"input_dim must be at least 1, but got {input_dim}")
    if not 1 <= rank <= input_dim:
        raise ValueError(f"rank must be from 1 to input_dim, {input_dim}, but got {rank}")


def conditional_low_rank_linear(input_dim: int, context_dim: int, rank: int | None = None) -> ConditionalLowRankLinear:
    """
    A helper function to create a :class:`~pyro_hollow.transforms.ConditionalLowRankLinear` object that takes care of
    constructing a linear network with the correct input/output dimensions. A fresh map is close to the identity.

    :param input_dim: Dimension of input variable
    :type input_dim: int
    :param context_dim: Dimension of context variable
    :type context_dim: int
    :param rank: How many directions. Defaults to using 16, or input_dim if that is less
    :type rank: int
    :raises ValueError: for dimensions and a rank out of range.
    """
    if context_dim < 1:
        raise ValueError(f"context_dim must be at least 1, but got {context_dim}")
    rank = min(16, input_dim) if rank is None else rank
    _check_sizes(input_dim, rank)
    network = nn.Linear(context_dim, 2 * input_dim * rank)
    with torch.no_grad():
        for parameter in network.parameters():
            # A small U; V stays large, or the gradient of U would vanish.
            parameter[: input_dim * rank].mul_(1e-2)
    return ConditionalLowRankLinear(input_dim, network, rank)
