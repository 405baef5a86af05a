# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Linear maps of low rank that depend on a context: correlations of each sample's own, for a flow to bend."""

from __future__ import annotations

import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.util import copy_docs_from
from torch import Tensor, nn
from torch.distributions import Transform

from .bijection import Bijection

__all__ = ["ConditionalLowRank", "ConditionedLowRank", "conditional_low_rank"]


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, with shapes ``(*, m, n)`` and ``(*, n)``, broadcast without copies."""
    return torch.einsum("...mn,...n->...m", matrix, vector)


@copy_docs_from(Transform)
class ConditionedLowRank(Bijection):
    r"""
    The linear map :math:`\mathbf{y} = (I + U V^T) \mathbf{x}`, as :meth:`ConditionalLowRank.condition` returns it.

    All but the map itself is done with matrices of size r, by Woodbury's identity and the determinant lemma; they are
    factorised once, when the map is made.

    :param Tensor u: U with shape ``(*, d, r)``.
    :param Tensor v: V with shape ``(*, d, r)``.
    """

    def __init__(self, u: Tensor, v: Tensor) -> None:
        super().__init__()
        self._u, self._v = u, v
        small = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device) + v.mT @ u
        self._factors = torch.linalg.lu_factor(small)
        self._log_det = self._factors[0].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)

    def _check(self, x: Tensor) -> None:
        d, batch_shape = self._u.shape[-2], self._u.shape[:-2]
        if x.dim() == 0 or x.shape[-1] != d:
            raise ValueError(f"input must have shape (*, {d}), but got {tuple(x.shape)}")
        try:
            self._log_det.expand(x.shape[:-1])
        except RuntimeError:
            raise ValueError(
                f"context has batch shape {tuple(batch_shape)}, which does not broadcast to the input's "
                f"{tuple(x.shape[:-1])}; expand the base distribution to the batch shape of the context"
            ) from None

    def _solve(self, rows: Tensor, adjoint: bool = False) -> Tensor:
        r""":math:`(I + V^T U)^{-1}`, or its transpose, times vectors of shape ``(*, r)``."""
        factors, pivots = self._factors
        shape = rows.shape[:-1]
        factors, pivots = factors.expand(*shape, -1, -1), pivots.expand(*shape, -1)
        return torch.linalg.lu_solve(factors, pivots, rows.unsqueeze(-1), adjoint=adjoint).squeeze(-1)

    def _call(self, x: Tensor) -> Tensor:
        """
        :param x: the input into the bijection
        :type x: torch.Tensor

        Invokes the bijection x=>y; adds to x a combination of r directions.
        """
        self._check(x)
        return x + _apply(self._u, _apply(self._v.mT, x))

    def _inverse(self, y: Tensor) -> Tensor:
        """
        :param y: the output of the bijection
        :type y: torch.Tensor

        Inverts y => x, in closed form.
        """
        self._check(y)
        return y - _apply(self._u, self._solve(_apply(self._v.mT, y)))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """
        Calculates the logarithm of the absolute value of the determinant, which is the same for all x.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor y: the output for that input.
        :returns: the log-determinant with shape ``(*,)``.
        """
        return self._log_det.expand(x.shape[:-1])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """
        Value and log-determinant together.

        :param Tensor x: the input with shape ``(*, d)``.
        :returns: y with shape ``(*, d)`` and the log-determinant with shape ``(*,)``.
        """
        y = self(x)
        return y, self.log_abs_det_jacobian(x, y)

    def call_and_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""
        The value, the log-determinant and the score of the density that is carried along,
        :math:`\nabla_{\mathbf{y}} \log p(\mathbf{y}) = (I + U V^T)^{-T} \nabla_{\mathbf{x}} \log p(\mathbf{x})`.

        :param Tensor x: the input with shape ``(*, d)``.
        :param Tensor score: the gradient of the log-density at x, of the same shape.
        :returns: y, the log-determinant and the score at y, the latter without gradients.
        """
        y, ladj = self.call_and_ladj(x)
        with torch.no_grad():
            return y, ladj, score - _apply(self._v, self._solve(_apply(self._u.mT, score), adjoint=True))


@copy_docs_from(ConditionalTransformModule)
class ConditionalLowRank(ConditionalTransformModule):
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
    >>> transform = ConditionalLowRank(10, torch.nn.Linear(4, 2 * 10 * 3), rank=3)
    >>> _ = pyro.module("my_transform", transform)
    >>> flow_dist = dist.ConditionalTransformedDistribution(base_dist, [transform]).condition(torch.randn(7, 4))
    >>> flow_dist.rsample().shape
    torch.Size([7, 10])

    The inverse is computed in closed form. The determinant is not zero in any but exceptional cases, from which its
    logarithm keeps an ELBO away.

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

    def condition(self, context: Tensor) -> ConditionedLowRank:
        """
        Conditions on a context variable, returning a non-conditional transform.

        :param Tensor context: the context with shape ``(*, context_dim)``; its batch broadcasts against the input's.
        """
        params = self.nn(context)
        if params.shape[-1] != 2 * self.input_dim * self.rank:
            raise ValueError(
                f"nn must return a tensor of width 2 * {self.input_dim} * {self.rank}, but its last dimension is "
                f"{params.shape[-1]}"
            )
        u, v = params.unflatten(-1, (2, self.input_dim, self.rank)).unbind(-3)
        return ConditionedLowRank(u, v)


def _check_sizes(input_dim: int, rank: int) -> None:
    if input_dim < 1:
        raise ValueError(f"input_dim must be at least 1, but got {input_dim}")
    if not 1 <= rank <= input_dim:
        raise ValueError(f"rank must be from 1 to input_dim, {input_dim}, but got {rank}")


def conditional_low_rank(input_dim: int, context_dim: int, rank: int | None = None) -> ConditionalLowRank:
    """
    A helper function to create a :class:`~pyro_hollow.transforms.ConditionalLowRank` object that takes care of
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
    return ConditionalLowRank(input_dim, network, rank)
