# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous normalizing flows of hollow networks: an exact log-determinant at almost no cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.util import copy_docs_from
from torch import Tensor
from torch.distributions import Transform

from pyro_hollow.nn import ConditionalHollowNN, Conditioner, HollowField, HollowNN
from pyro_hollow.ode import Solver
from pyro_hollow.ops.arguments import closest_keywords
from pyro_hollow.ops.derivatives import alias_of
from pyro_hollow.ops.stepper import Stepper, Tableau
from pyro_hollow.ops.vector_field import VectorField

from .continuous import ConditionalCNF, ConditionedCNF, _check_time

__all__ = [
    "ConditionalHollowCNF",
    "ConditionedHollowCNF",
    "HollowCNF",
    "Regularization",
    "conditional_hollow_cnf",
    "hollow_cnf",
]


class Regularization(NamedTuple):
    r"""
    Kinetic energy and squared Jacobian norm of a flow (Finlay et al., 2020), which make it expensive to integrate,
    along the path of each sample. As the Jacobian is split, only its hollow part needs an estimate.

    :ivar kinetic: the kinetic energy :math:`\int_0^T \|f\|^2 dt` with shape ``(*,)``.
    :ivar diagonal: :math:`\int_0^T \sum_i (\partial f_i / \partial x_i)^2 dt` with shape ``(*,)``, exact. Of a network
        with blocks of coordinates, the squared norm of the diagonal blocks.
    :ivar hollow: an unbiased estimate of :math:`\int_0^T \sum_{i, j \ne i} (\partial f_i / \partial x_j)^2 dt` with
        shape ``(*,)``, by one random probe. Of a network with blocks, for i and j in different blocks.

    References:

    [1] Chris Finlay, Joern-Henrik Jacobsen, Levon Nurbekyan, Adam Oberman.
    How to Train Your Neural ODE: the World of Jacobian and Kinetic Regularization. [arXiv:2002.02798]
    """

    kinetic: Tensor
    diagonal: Tensor
    hollow: Tensor

    def penalty(self, kinetic: float = 1.0, jacobian: float = 1.0) -> Tensor:
        """
        The weighted sum, with shape ``(*,)``.

        :param float kinetic: the weight of the kinetic energy.
        :param float jacobian: the weight of the squared Frobenius norm of the Jacobian, diagonal and hollow.
        """
        return kinetic * self.kinetic + jacobian * (self.diagonal + self.hollow)


class _Regularized(VectorField):
    """
    A field with the integrals of a :class:`Regularization`.

    :param VectorField field: the field.
    :param Tensor probe: random signs with the shape ``(*, d)`` of the state.
    """

    def __init__(self, field: VectorField, probe: Tensor) -> None:
        self.tensors = field.tensors
        self.block_dim = field.block_dim
        self._field = field
        self._probe = probe

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self._field(t, x)

    def with_diagonal(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`HollowField.with_diagonal`."""
        f, diagonal = self._field.dimwise_derivatives(t, x, 1)
        return f, diagonal

    def with_blocks(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`HollowField.with_blocks`."""
        f, blocks = cast(HollowField, self._field).with_blocks(t, x)
        return f, blocks

    def _with_exact_part(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The field, its divergence, the known entries of its Jacobian, and the product of the probe with them."""
        if self.block_dim == 1:
            f, diagonal = self.with_diagonal(t, x)
            return f, diagonal.sum(-1), diagonal, diagonal * self._probe
        f, blocks = self.with_blocks(t, x)
        probe = self._probe.unflatten(-1, blocks.shape[-3:-1]).unsqueeze(-2)
        divergence = blocks.diagonal(dim1=-2, dim2=-1).sum((-1, -2))
        return f, divergence, blocks.flatten(-3), torch.matmul(probe, blocks).flatten(-3)

    def initial_state(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`VectorField.initial_state`."""
        return *super().initial_state(x), x.new_zeros(*x.shape[:-1], 3)

    def augmented(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See :meth:`VectorField.augmented`."""
        x = state[0]
        create_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.tensors))
        with torch.enable_grad():
            alias = alias_of(x)
            f, divergence, known, own = self._with_exact_part(t, alias)
            (product,) = torch.autograd.grad(f, alias, self._probe, create_graph=create_graph, materialize_grads=True)
            # Not by the path through h: the transformer may mix coordinates, too. One block has no hollow part.
            hollow = product - own if x.shape[-1] > self.block_dim else torch.zeros_like(x)
        costs = torch.stack([part.square().sum(-1) for part in (f, known, hollow)], dim=-1)
        derivative = f, divergence, costs
        return derivative if create_graph else tuple(part.detach() for part in derivative)

    def stepper(self, tableau: Tableau, state: tuple[Tensor, ...], compile: bool = False) -> tuple[Stepper, str]:
        """See :meth:`VectorField.stepper`."""
        return super().stepper(tableau, state)[0], "regularize=True has no derivatives by hand"


@copy_docs_from(Transform)
class ConditionedHollowCNF(ConditionedCNF):
    """
    A Hollow-CNF whose context is fixed, as :meth:`ConditionalHollowCNF.condition` returns it. For the parameters see
    :class:`HollowCNF`.
    """

    nn: ConditionalHollowNN

    @closest_keywords()
    def __init__(
        self,
        nn: ConditionalHollowNN,
        context: Tensor | None = None,
        *,
        solver: Solver | str | None = None,
        time: float = 1.0,
        cache_size: int = 1,
        regularize: bool = False,
    ) -> None:
        super().__init__(nn, context, solver=solver, time=time, cache_size=cache_size)
        self.regularize = regularize

    def _bind(self) -> VectorField:
        return self.nn.bind(self.context)

    def _bind_with_integrals(self, x: Tensor) -> VectorField:
        field = self._bind()
        return _Regularized(field, torch.randint_like(x, 2).mul_(2).sub_(1)) if self.regularize else field

    def _settings(self) -> tuple[Any, ...]:
        return *super()._settings(), self.regularize

    @property
    def regularization(self) -> Regularization:
        """
        Integrals that the latest call has carried along, with gradients; they are forgotten with the cached pair.

        :raises AttributeError: without ``regularize=True``, and if there is no latest pair.
        """
        pair = self._lookup() if self.regularize else None
        if pair is None or len(pair.results) < 2:
            raise AttributeError(_no_regularization(self.regularize))
        return Regularization(*pair.results[1].unbind(-1))

    def __getattr__(self, name: str) -> Any:
        # Reached when the property has raised, too; that of a module would say that there is no such attribute.
        if name == "regularization":
            raise AttributeError(_no_regularization(self.regularize))
        if isinstance(self, torch.nn.Module):
            return torch.nn.Module.__getattr__(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _no_regularization(regularize: bool) -> str:
    if not regularize:
        return "regularization needs regularize=True, so that it is integrated along"
    return (
        "regularization is that of the latest call, but there is none: call the flow first, and ask before "
        "parameters change, before the backward pass, and with cache_size=1. log_prob of data forgets its "
        "pair: use flow.inv.call_and_ladj(data); inputs made in inference mode are not remembered"
    )


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

    To fit data whose scale is not near 1, make the flow one of :func:`~pyro_hollow.transforms.standardized` data.

    :param nn: the network of the vector field.
    :type nn: HollowNN
    :param solver: how to integrate, a Solver or a method's name; None for ``Solver()``, which is "dopri5" at
        tolerances of 1e-5.
    :type solver: Solver or str
    :param time: the end time T; a longer time is a larger budget of change for the same network.
    :type time: float
    :param cache_size: 1 to keep the latest pair of input and output, 0 not to.
    :type cache_size: int
    :param regularize: True to integrate, within the same solve, what :attr:`regularization` then tells of the latest
        call, for a penalty on dynamics that are expensive to integrate, by one line in a guide:
        ``pyro.factor("penalty", 0.01 * flow.regularization.penalty(), has_rsample=True)``. (It stands in the guide,
        whose log-density the ELBO subtracts.) Each evaluation then costs a backward pass through the network.
    :type regularize: bool

    References:

    [1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]

    [2] Ricky T. Q. Chen, Yulia Rubanova, Jesse Bettencourt, David Duvenaud. Neural Ordinary Differential Equations.
    [arXiv:1806.07366]
    """

    @closest_keywords()
    def __init__(
        self,
        nn: HollowNN,
        *,
        solver: Solver | str | None = None,
        time: float = 1.0,
        cache_size: int = 1,
        regularize: bool = False,
    ) -> None:
        super().__init__(nn, solver=solver, time=time, cache_size=cache_size, regularize=regularize)


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

    To fit data, or with a context, whose scale is not near 1, make the flow one of
    :func:`~pyro_hollow.transforms.standardized` data and context.

    :param nn: the network of the vector field.
    :type nn: ConditionalHollowNN
    :param solver: how to integrate, a Solver or a method's name; None for ``Solver()``, which is "dopri5" at
        tolerances of 1e-5.
    :type solver: Solver or str
    :param time: the end time T.
    :type time: float
    :param cache_size: the cache size of the conditioned transforms.
    :type cache_size: int
    :param regularize: as for :class:`HollowCNF`; ask the conditioned transform for its regularization.
    :type regularize: bool

    References:

    [1] Ricky T. Q. Chen, David Duvenaud. Neural Networks with Cheap Differential Operators. [arXiv:1912.03579]
    """

    nn: ConditionalHollowNN

    @closest_keywords()
    def __init__(
        self,
        nn: ConditionalHollowNN,
        *,
        solver: Solver | str | None = None,
        time: float = 1.0,
        cache_size: int = 1,
        regularize: bool = False,
    ) -> None:
        super().__init__(nn, solver=solver, time=time, cache_size=cache_size)
        self.regularize = regularize

    def _condition(self, context: Tensor, settings: dict[str, Any]) -> ConditionedHollowCNF:
        return ConditionedHollowCNF(self.nn, context, **settings, regularize=self.regularize)


def _with_max_rate(time: float, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A flow bounds the rates of its affine part: scales by exp(4) are enough, and stiff equations are expensive."""
    _check_time(time)
    return {"max_rate": 4.0 / time, **kwargs} if kwargs.get("transformer") is None else kwargs


@closest_keywords(HollowNN)
def hollow_cnf(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    conditioner: str | Conditioner = "grouped",
    solver: Solver | str | None = None,
    time: float = 1.0,
    cache_size: int = 1,
    regularize: bool = False,
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
    :param solver: How to integrate, a Solver or a method's name. Defaults to "dopri5" at tolerances of 1e-5
    :type solver: Solver or str
    :param time: The end time
    :type time: float
    :param cache_size: 1 to keep the latest pair of input and output, 0 not to
    :type cache_size: int
    :param regularize: True to integrate a penalty along; see :class:`~pyro_hollow.transforms.HollowCNF`
    :type regularize: bool
    :param kwargs: transformer, transformer_dim, activation, max_rate and block_dim of the network; see
        :class:`~pyro_hollow.nn.ConditionalHollowNN`. The affine part of the closed form has a max_rate of 4 over the
        end time, unless you say otherwise; None is for no bound
    """
    network = HollowNN(input_dim, hidden_dims, conditioner=conditioner, **_with_max_rate(time, kwargs))
    return HollowCNF(network, solver=solver, time=time, cache_size=cache_size, regularize=regularize)


@closest_keywords(ConditionalHollowNN)
def conditional_hollow_cnf(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    conditioner: str | Conditioner = "grouped",
    solver: Solver | str | None = None,
    time: float = 1.0,
    cache_size: int = 1,
    regularize: bool = False,
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
    :param solver: How to integrate, a Solver or a method's name. Defaults to "dopri5" at tolerances of 1e-5
    :type solver: Solver or str
    :param time: The end time
    :type time: float
    :param cache_size: 1 to keep the latest pair of input and output, 0 not to
    :type cache_size: int
    :param regularize: True to integrate a penalty along; see :class:`~pyro_hollow.transforms.HollowCNF`
    :type regularize: bool
    :param kwargs: transformer, transformer_dim, activation, max_rate and block_dim of the network; see
        :class:`~pyro_hollow.nn.ConditionalHollowNN`. The affine part of the closed form has a max_rate of 4 over the
        end time, unless you say otherwise; None is for no bound
    """
    if context_dim < 1:
        raise ValueError(f"context_dim must be at least 1, but got {context_dim}; hollow_cnf takes no context")
    network = ConditionalHollowNN(
        input_dim, context_dim, hidden_dims, conditioner=conditioner, **_with_max_rate(time, kwargs)
    )
    return ConditionalHollowCNF(network, solver=solver, time=time, cache_size=cache_size, regularize=regularize)
