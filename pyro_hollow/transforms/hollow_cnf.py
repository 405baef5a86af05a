# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous normalizing flows of hollow networks: an exact log-determinant at almost no cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.util import copy_docs_from
from torch import Tensor
from torch.distributions import Transform

from pyro_hollow.nn import ConditionalHollowNN, Conditioner, HollowField, HollowNN
from pyro_hollow.ode import Solver

from .continuous import ConditionalCNF, ConditionedCNF

__all__ = ["ConditionalHollowCNF", "ConditionedHollowCNF", "HollowCNF", "conditional_hollow_cnf", "hollow_cnf"]


@copy_docs_from(Transform)
class ConditionedHollowCNF(ConditionedCNF):
    """A Hollow-CNF whose context is fixed, as :meth:`ConditionalHollowCNF.condition` returns it."""

    nn: ConditionalHollowNN

    def _bind(self) -> HollowField:
        return self.nn.bind(self.context)


@copy_docs_from(TransformModule)
class HollowCNF(ConditionedHollowCNF, TransformModule):
    r"""
    An implementation of the continuous normalizing flow whose vector field is a hollow network (Chen and Duvenaud,
    2019),

        :math:`\mathbf{y} = \mathbf{x}(T), \qquad \frac{dx_i}{dt} = \tau_i(t, x_i, h_i), \qquad h_i = c_i(t,
        \mathbf{x}_{-i}), \qquad \mathbf{x}(0) = \mathbf{x}`

    where :math:`\mathbf{x}` are the inputs, :math:`\mathbf{y}` are the outputs, :math:`\tau_i` is the transformer and
    :math:`c_i` the conditioner of coordinate i, which sees all coordinates except the i-th. The logarithm of the
    determinant of the Jacobian is the integral of the divergence :math:`\sum_i \partial \tau_i / \partial x_i`, which
    is exact and costs one more elementwise pass, where a free-form network needs d backward passes or a noisy estimate.

    Together with :class:`~pyro.distributions.TransformedDistribution` this provides a way to create richer variational
    approximations.

    Example usage:

    >>> base_dist = dist.Normal(torch.zeros(10), torch.ones(10)).to_event(1)
    >>> transform = HollowCNF(HollowNN(10))
    >>> _ = pyro.module("my_transform", transform)
    >>> flow_dist = dist.TransformedDistribution(base_dist, [transform])
    >>> flow_dist.rsample((3,)).shape
    torch.Size([3, 10])

    The inverse is computed by integrating the same differential equation backward in time, to solver tolerance; it
    costs the same as the forward operation. The log-determinant comes with either, at no further cost.

    :param nn: the network of the vector field.
    :type nn: HollowNN
    :param solver: how to integrate; None for ``Solver()``, which is "dopri5" at tolerances of 1e-5.
    :type solver: Solver
    :param time: the end time T; a longer time is a larger budget of change for the same network.
    :type time: float
    :param cache_size: 1 to keep the latest pair of input and output, 0 not to.
    :type cache_size: int

    References:

    [1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]

    [2] Ricky T. Q. Chen, Yulia Rubanova, Jesse Bettencourt, David Duvenaud. Neural Ordinary Differential Equations.
    [arXiv:1806.07366]
    """

    def __init__(self, nn: HollowNN, *, solver: Solver | None = None, time: float = 1.0, cache_size: int = 1) -> None:
        super().__init__(nn, solver=solver, time=time, cache_size=cache_size)


@copy_docs_from(ConditionalTransformModule)
class ConditionalHollowCNF(ConditionalCNF):
    r"""
    An implementation of the continuous normalizing flow whose vector field is a hollow network that also depends on a
    context (Chen and Duvenaud, 2019),

        :math:`\mathbf{y} = \mathbf{x}(T), \qquad \frac{dx_i}{dt} = \tau_i(t, x_i, h_i; \mathbf{c}), \qquad h_i =
        c_i(t, \mathbf{x}_{-i}; \mathbf{c}), \qquad \mathbf{x}(0) = \mathbf{x}`

    where :math:`\mathbf{x}` are the inputs, :math:`\mathbf{y}` are the outputs, :math:`\mathbf{c}` is the context,
    :math:`\tau_i` is the transformer and :math:`c_i` the conditioner of coordinate i; see :class:`HollowCNF`.

    Together with :class:`~pyro.distributions.ConditionalTransformedDistribution` this provides a way to create richer
    variational approximations, for example the posterior of a variational autoencoder, with the context from the
    encoder.

    Example usage:

    >>> base_dist = dist.Normal(torch.zeros(7, 10), torch.ones(7, 10)).to_event(1)
    >>> transform = ConditionalHollowCNF(ConditionalHollowNN(10, context_dim=4))
    >>> _ = pyro.module("my_transform", transform)
    >>> flow_dist = dist.ConditionalTransformedDistribution(base_dist, [transform]).condition(torch.randn(7, 4))
    >>> flow_dist.rsample().shape
    torch.Size([7, 10])

    The inverse is computed by integrating the same differential equation backward in time, to solver tolerance; it
    costs the same as the forward operation.

    :param nn: the network of the vector field.
    :type nn: ConditionalHollowNN
    :param solver: how to integrate; None for ``Solver()``, which is "dopri5" at tolerances of 1e-5.
    :type solver: Solver
    :param time: the end time T.
    :type time: float
    :param cache_size: the cache size of the conditioned transforms.
    :type cache_size: int

    References:

    [1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]
    """

    def _condition(self, context: Tensor, settings: dict[str, Any]) -> ConditionedHollowCNF:
        return ConditionedHollowCNF(self.nn, context, **settings)


def hollow_cnf(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    conditioner: str | Conditioner = "grouped",
    solver: Solver | None = None,
    time: float = 1.0,
    cache_size: int = 1,
    **kwargs: Any,
) -> HollowCNF:
    """
    A helper function to create a :class:`~pyro_hollow.transforms.HollowCNF` object that takes care of constructing a
    hollow network with the correct input/output dimensions.

    :param input_dim: Dimension of input variable
    :type input_dim: int
    :param hidden_dims: Widths of the conditioner's layers; see :class:`~pyro_hollow.nn.ConditionalHollowNN`. Defaults
        to using [32, 32], and [max(4 * input_dim, 64), 32] for the masked conditioner
    :type hidden_dims: list[int]
    :param conditioner: "grouped", "masked", "leave-one-out" or a Conditioner of your own
    :param solver: How to integrate. Defaults to "dopri5" at tolerances of 1e-5
    :type solver: Solver
    :param time: The end time
    :type time: float
    :param cache_size: 1 to keep the latest pair of input and output, 0 not to
    :type cache_size: int
    :param kwargs: transformer, transformer_dim and activation of the network
    """
    network = HollowNN(input_dim, hidden_dims, conditioner=conditioner, **kwargs)
    return HollowCNF(network, solver=solver, time=time, cache_size=cache_size)


def conditional_hollow_cnf(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    conditioner: str | Conditioner = "grouped",
    solver: Solver | None = None,
    time: float = 1.0,
    cache_size: int = 1,
    **kwargs: Any,
) -> ConditionalHollowCNF:
    """
    A helper function to create a :class:`~pyro_hollow.transforms.ConditionalHollowCNF` object that takes care of
    constructing a hollow network with the correct input/output dimensions.

    :param input_dim: Dimension of input variable
    :type input_dim: int
    :param context_dim: Dimension of context variable
    :type context_dim: int
    :param hidden_dims: Widths of the conditioner's layers; see :class:`~pyro_hollow.nn.ConditionalHollowNN`. Defaults
        to using [32, 32], and [max(4 * input_dim, 64), 32] for the masked conditioner
    :type hidden_dims: list[int]
    :param conditioner: "grouped", "masked", "leave-one-out" or a Conditioner of your own
    :param solver: How to integrate. Defaults to "dopri5" at tolerances of 1e-5
    :type solver: Solver
    :param time: The end time
    :type time: float
    :param cache_size: 1 to keep the latest pair of input and output, 0 not to
    :type cache_size: int
    :param kwargs: transformer, transformer_dim and activation of the network
    """
    network = ConditionalHollowNN(input_dim, context_dim, hidden_dims, conditioner=conditioner, **kwargs)
    return ConditionalHollowCNF(network, solver=solver, time=time, cache_size=cache_size)
