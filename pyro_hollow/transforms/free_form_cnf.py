# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous normalizing flows of any vector field, with its divergence exact or estimated: the peers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from pyro.distributions import TransformModule
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.util import copy_docs_from
from torch import Tensor
from torch.distributions import Transform
from torch.nn.utils.parametrize import type_before_parametrizations

from pyro_hollow.nn.arguments import check_widths
from pyro_hollow.ode import Solver
from pyro_hollow.ops.arguments import closest_keywords
from pyro_hollow.ops.derivatives import alias_of
from pyro_hollow.ops.vector_field import VectorField

from .continuous import ConditionalCNF, ConditionedCNF

__all__ = [
    "ConditionalFreeFormCNF",
    "ConditionedFreeFormCNF",
    "FreeFormCNF",
    "FreeFormNN",
    "LowRankFreeFormNN",
    "conditional_free_form_cnf",
    "free_form_cnf",
]

DIVERGENCES = ("exact", "hutchinson")
PROBES = ("rademacher", "gaussian")
#: Activations that act on each number by itself.
_ELEMENTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.LogSigmoid, nn.Mish, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh
)  # fmt: skip


def _check_nonlinearity(nonlinearity: nn.Module | None) -> nn.Module:
    if nonlinearity is None:
        return nn.Softplus()
    if not isinstance(nonlinearity, nn.Module):
        raise TypeError(f"nonlinearity must be a module, for example nn.Tanh(), but got {nonlinearity!r}")
    return nonlinearity


class FreeFormNN(nn.Module):
    """
    A dense network of time, state and context, without any structure in its Jacobian.

    :param int input_dim: Dimension of the state
    :param int context_dim: Dimension of the context; 0 for none
    :param hidden_dims: Widths of the hidden layers
    :param nonlinearity: a smooth activation module; None for softplus
    """

    @closest_keywords()
    def __init__(
        self, input_dim: int, context_dim: int, hidden_dims: Sequence[int], nonlinearity: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.input_dim = input_dim
        self.context_dim = context_dim
        widths = [input_dim + 1 + context_dim, *check_widths(hidden_dims, least=0), input_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.nonlinearity = _check_nonlinearity(nonlinearity)
        with torch.no_grad():  # a fresh flow is close to the identity
            for parameter in self.layers[-1].parameters():
                parameter.mul_(1e-2)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """
        :param Tensor t: time, a scalar.
        :param Tensor x: the state with shape ``(*, input_dim)``.
        :param Tensor context: the context, whose shape ``(*, context_dim)`` broadcasts against x's batch.
        """
        inputs = [x, t.to(x.dtype).expand(*x.shape[:-1], 1)]
        if context is not None:
            inputs.append(context.expand(*x.shape[:-1], -1))
        h = torch.cat(inputs, dim=-1)
        for layer in self.layers[:-1]:
            h = self.nonlinearity(layer(h))
        return self.layers[-1](h)


class LowRankFreeFormNN(nn.Module):
    r"""
    A dense network of time and state each of whose layers the context changes, by a matrix of low rank and a bias, as
    in the variational autoencoders of FFJORD,

        :math:`y = \left(W + \tfrac{1}{r} U(\mathbf{c}) V(\mathbf{c})^T\right) [x, t] + b(\mathbf{c})`

    where r is the rank, and U, V and b are linear functions of the context. They are computed once per solve, by
    :meth:`bind`; for a hidden layer of width w they take about 2 w r numbers a sample.

    :param int input_dim: Dimension of the state
    :param int context_dim: Dimension of the context
    :param hidden_dims: Widths of the hidden layers
    :param int rank: the rank, at least 1
    :param nonlinearity: a smooth activation module; None for softplus
    :raises ValueError: for a rank below 1.

    References:

    [1] Will Grathwohl, Ricky T. Q. Chen, Jesse Bettencourt, Ilya Sutskever, David Duvenaud. FFJORD: Free-form
    Continuous Dynamics for Scalable Reversible Generative Models. [arXiv:1810.01367]
    """

    @closest_keywords()
    def __init__(
        self,
        input_dim: int,
        context_dim: int,
        hidden_dims: Sequence[int],
        rank: int,
        nonlinearity: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, but got {rank}")
        self.input_dim = input_dim
        self.context_dim = context_dim
        self.rank = rank
        widths = [input_dim, *check_widths(hidden_dims, least=0), input_dim]
        layers = [nn.Linear(a + 1, b, bias=False) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.layers = nn.ModuleList(layers)
        # For each layer U, V and b, one after the other.
        self._sizes = [n for layer in layers for n in (*(rank * w for w in layer.weight.shape), len(layer.weight))]
        self.amortization = nn.Linear(context_dim, sum(self._sizes))
        self.nonlinearity = _check_nonlinearity(nonlinearity)
        with torch.no_grad():  # a fresh flow is close to the identity
            layers[-1].weight.mul_(1e-2)
            self.amortization.weight.mul_(math.sqrt(context_dim))  # see bind
            for parameter in self.amortization.parameters():
                parameter.mul_(1e-1)
                parameter[-sum(self._sizes[-3:]) :].mul_(1e-1)

    def bind(self, context: Tensor) -> _DenseField:
        """
        Computes what depends on the context alone.

        :param Tensor context: the context with shape ``(*, context_dim)``, whose batch broadcasts against the state's.
        :returns: the field, called with time and state.
        """
        # Adam's steps have one size for all weights: without the root, those of a large context would go too far.
        amortized = self.amortization(context / math.sqrt(self.context_dim))
        return _LowRankField(self, amortized.split(self._sizes, dim=-1))

    def forward(self, t: Tensor, x: Tensor, context: Tensor) -> Tensor:
        """
        :param Tensor t: time, a scalar.
        :param Tensor x: the state with shape ``(*, input_dim)``.
        :param Tensor context: the context, whose shape ``(*, context_dim)`` broadcasts against x's batch.
        """
        return self.bind(context)(t, x)


def _is_plain(network: nn.Module) -> bool:
    """True if a network computes what its layers' matrices and its activation say, and nothing else."""
    if type(network) not in (FreeFormNN, LowRankFreeFormNN) or "forward" in vars(network):
        return False
    activation, layers = network.nonlinearity, cast(Sequence[nn.Linear], network.layers)
    biased = type(network) is FreeFormNN  # in the other the context brings the bias
    return (
        type(activation) in _ELEMENTWISE
        and not getattr(activation, "inplace", False)
        and all(type_before_parametrizations(layer) is nn.Linear for layer in layers)
        and all((layer.bias is not None) == biased for layer in layers)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (network, activation, *layers))  # type: ignore[union-attr]
    )


def _suits(network: FreeFormNN, context: Tensor | None) -> bool:
    """True if there is a closed form, and the context is as it takes it; forward itself complains of any other."""
    size = 0 if context is None else context.shape[-1]
    return len(network.layers) <= 3 and size == network.context_dim


def _alias(tensor: Tensor) -> Tensor:
    """A view of its own, so that the adjoint method differentiates with respect to it and not to what it is made of."""
    return tensor.clone() if tensor.is_inference() else tensor.view_as(tensor)


class _DenseField:
    r"""
    A dense network with its context fixed.

    If its activation s acts on each number by itself, the trace of its Jacobian takes no derivative of the whole. For
    two hidden layers, with :math:`W_i` the matrix that layer i multiplies its input by, and :math:`z_i` what it gives,

        :math:`\operatorname{tr}(W_3 S_2 W_2 S_1 W_1) = s'(z_2)^T \left[W_2 \odot (W_1 W_3)^T\right] s'(z_1), \qquad
        S_i = \operatorname{diag} s'(z_i).`

    The matrix in brackets, the kernel, does not depend on the state and is made once per solve.

    :param nonlinearity: the activation.
    :param int depth: Number of layers
    """

    #: All that gradients must reach.
    tensors: tuple[Tensor, ...]

    def __init__(self, nonlinearity: nn.Module, depth: int) -> None:
        self._nonlinearity = nonlinearity
        self._depth = depth

    def _layer(self, i: int, t: Tensor, h: Tensor) -> Tensor:
        """Layer i without its activation."""
        raise NotImplementedError

    def _matrix(self, i: int) -> Tensor:
        """Matrix by which layer i multiplies its input, with shape ``(*, outputs, inputs)``."""
        raise NotImplementedError

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        h = self._layer(0, t, x)
        for i in range(1, self._depth):
            h = self._layer(i, t, self._nonlinearity(h))
        return h

    def kernel(self, adjoint: bool) -> Tensor | None:
        """The matrix in brackets, or what stands for it with fewer layers; None where there is none, or not to use."""
        if self._depth > 3:
            return None
        if self._depth == 1:
            return self._matrix(0).diagonal(dim1=-2, dim2=-1).sum(-1)
        first, last = self._matrix(0), self._matrix(self._depth - 1)
        if self._depth == 2:
            return (first * last.mT).sum(-1)
        return self._matrix(1) * (first @ last).mT

    def with_trace(self, t: Tensor, x: Tensor, kernel: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        """Value and trace of the Jacobian, for a state that requires gradients."""
        h = self._layer(0, t, x)
        slopes: list[Tensor] = []
        for i in range(1, self._depth):
            z, h = h, self._nonlinearity(h)
            slopes += torch.autograd.grad(h, z, torch.ones_like(h), create_graph=create_graph, retain_graph=True)
            h = self._layer(i, t, h)
        if not slopes:
            return h, kernel.expand(h.shape[:-1])
        # einsum does not copy a kernel that all samples share.
        weights = kernel if self._depth == 2 else torch.einsum("...j,...ji->...i", slopes[1], kernel)
        return h, (slopes[0] * weights).sum(-1)


class _FreeFormNNField(_DenseField):
    """A plain :class:`FreeFormNN` with its context fixed."""

    def __init__(self, network: FreeFormNN, context: Tensor | None) -> None:
        super().__init__(network.nonlinearity, len(network.layers))
        first, *others = cast(Sequence[nn.Linear], network.layers)
        state, time, outer = first.weight.split([network.input_dim, 1, network.context_dim], dim=-1)
        shift = first.bias if context is None else F.linear(_alias(context), outer, first.bias)
        self._matrices = [state, *(layer.weight for layer in others)]
        self._weights = [_alias(matrix) for matrix in self._matrices]
        self._biases = [_alias(bias) for bias in (shift, *(layer.bias for layer in others))]
        self._time = time.squeeze(-1)
        self.tensors = (*self._weights, *self._biases, self._time)

    def _layer(self, i: int, t: Tensor, h: Tensor) -> Tensor:
        if i > 0:
            return F.linear(h, self._weights[i], self._biases[i])
        return F.linear(h, self._weights[0]) + torch.addcmul(self._biases[0], t.to(h.dtype), self._time)

    def _matrix(self, i: int) -> Tensor:
        return self._matrices[i]


class _LowRankField(_DenseField):
    """A :class:`LowRankFreeFormNN` with its context fixed."""

    def __init__(self, network: LowRankFreeFormNN, amortized: Sequence[Tensor]) -> None:
        super().__init__(network.nonlinearity, len(network.layers))
        self._rank = network.rank
        self._plain = _is_plain(network)
        self._layers = network.layers
        self._originals = [layer.weight for layer in cast(Sequence[nn.Linear], network.layers)] if self._plain else []
        self._amortized = amortized
        aliases = [_alias(part) for part in amortized]
        self._changes = [self._change(i, aliases) for i in range(self._depth)]
        self._biases = aliases[2::3]
        self._weights = [_alias(weight) for weight in self._originals]
        own = self._weights if self._plain else (*network.layers.parameters(), *network.nonlinearity.parameters())
        self.tensors = (*own, *aliases)

    def _change(self, i: int, amortized: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        u, v = (part.unflatten(-1, (-1, self._rank)) for part in amortized[3 * i : 3 * i + 2])
        return u / self._rank, v

    def _layer(self, i: int, t: Tensor, h: Tensor) -> Tensor:
        u, v = self._changes[i]
        h = torch.cat([h, t.to(h.dtype).expand(*h.shape[:-1], 1)], dim=-1)
        inner = (h.unsqueeze(-2) @ v).squeeze(-2)  # (*, rank)
        z = F.linear(h, self._weights[i]) if self._plain else self._layers[i](h)
        return z + (u @ inner.unsqueeze(-1)).squeeze(-1) + self._biases[i]

    def _matrix(self, i: int) -> Tensor:
        u, v = self._change(i, self._amortized)
        return self._originals[i][:, :-1] + u @ v[..., :-1, :].mT

    def kernel(self, adjoint: bool) -> Tensor | None:
        """
        The kernel, as of any field; where each sample has its own, it must not take more memory than d backward passes
        do. The adjoint method carries its gradient along, several times.
        """
        if not self._plain:
            return None
        if self._depth == 3 and self._amortized[0].shape[:-1].numel() > 1:
            first, second, d = (len(weight) for weight in self._originals)
            if first * second > (0.25 if adjoint else 2.0) * d * (first + second):
                return None
        return super().kernel(adjoint)


class _Unbound:
    """A module without ``bind``, and its context, as a vector field."""

    def __init__(self, function: nn.Module, context: Tensor | None) -> None:
        self._arguments: tuple[Tensor, ...] = () if context is None else (_alias(context),)
        self._function = function
        self.tensors = (*function.parameters(), *self._arguments)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self._function(t, x, *self._arguments)


class _FreeFormField(VectorField):
    """A free-form vector field for one solve, during which the probe stays the same."""

    def __init__(
        self, function: nn.Module, context: Tensor | None, divergence: str, probe: str, adjoint: bool = False
    ) -> None:
        exact = divergence == "exact"
        self._field: Any
        if exact and type(function) is FreeFormNN and _is_plain(function) and _suits(function, context):
            self._field = _FreeFormNNField(function, context)
        elif hasattr(function, "bind"):
            self._field = function.bind(context)  # type: ignore[operator]
        else:
            self._field = _Unbound(function, context)
        self._exact = exact
        self._probe = probe
        self._noise: Tensor | None = None
        self._kernel = self._field.kernel(adjoint) if exact and isinstance(self._field, _DenseField) else None
        self.tensors = (*self._field.tensors, *(() if self._kernel is None else (self._kernel,)))

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self._field(t, x)

    def with_divergence(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`VectorField.with_divergence`."""
        if torch._C._are_functorch_transforms_active():
            return self._transformed(t, x)
        create_graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.tensors))
        create_graph |= torch.autograd.forward_ad._current_level >= 0  # a tangent needs the graph, too
        with torch.enable_grad():
            # An alias of its own, as an adjoint method cuts the state itself off from what is computed of it.
            x = alias_of(x)
            if self._kernel is not None:
                f, divergence = self._field.with_trace(t, x, self._kernel, create_graph)
            else:
                f = self._field(t, x)
                if not f.requires_grad:  # a field that depends neither on x nor on any parameter
                    return f, torch.zeros_like(f[..., 0])
                divergence = self._trace(f, x, create_graph) if self._exact else self._estimate(f, x, create_graph)
        return (f, divergence) if create_graph else (f.detach(), divergence.detach())

    def _transformed(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Value and divergence by torch.func alone, of which all its transforms can be taken."""
        f, pull = torch.func.vjp(partial(self._field, t), x)  # type: ignore[misc]
        if self._exact:
            (rows,) = torch.func.vmap(pull)(_basis(f))
            return f, rows.diagonal(dim1=0, dim2=-1).sum(-1)
        noise = self._draw(f)
        return f, (pull(noise)[0] * noise).sum(-1)

    def _trace(self, f: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        (rows,) = torch.autograd.grad(
            f, x, _basis(f), is_grads_batched=True, create_graph=create_graph, allow_unused=True
        )
        return torch.zeros_like(f[..., 0]) if rows is None else rows.diagonal(dim1=0, dim2=-1).sum(-1)

    def _estimate(self, f: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        noise = self._draw(f)
        (product,) = torch.autograd.grad(
            f, x, noise, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return (product * noise).sum(-1)

    def _draw(self, f: Tensor) -> Tensor:
        """The probe, drawn once."""
        if self._noise is None:
            noise = torch.randn_like(f)
            self._noise = noise.sign() if self._probe == "rademacher" else noise
        return self._noise


def _basis(f: Tensor) -> Tensor:
    """Unit vectors in a new first dimension, for each sample of f."""
    basis = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
    return basis.view(-1, *(1,) * (f.dim() - 1), f.shape[-1]).expand(-1, *f.shape)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, but got {value!r}")
    return value


@copy_docs_from(Transform)
class ConditionedFreeFormCNF(ConditionedCNF):
    """A free-form CNF whose context is fixed, as :meth:`ConditionalFreeFormCNF.condition` returns it."""

    @closest_keywords(ConditionedCNF)
    def __init__(
        self,
        nn: nn.Module,
        context: Tensor | None = None,
        *,
        divergence: str = "exact",
        probe: str = "rademacher",
        **kwargs: Any,
    ) -> None:
        super().__init__(nn, context, **kwargs)
        self.divergence = _check_choice("divergence", divergence, DIVERGENCES)
        self.probe = _check_choice("probe", probe, PROBES)

    def _bind(self) -> _FreeFormField:
        _check_choice("divergence", self.divergence, DIVERGENCES)  # they may have been assigned since
        _check_choice("probe", self.probe, PROBES)
        return _FreeFormField(self.nn, self.context, self.divergence, self.probe, self.solver.adjoint)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """See :meth:`ConditionedCNF.velocity`."""
        return super().velocity(t.unsqueeze(-1) if t.dim() else t, x)  # dense layers broadcast it against x

    def _settings(self) -> tuple[Any, ...]:
        return *super()._settings(), self.divergence, self.probe


@copy_docs_from(TransformModule)
class FreeFormCNF(ConditionedFreeFormCNF, TransformModule):
    r"""
    An implementation of the continuous normalizing flow of any vector field, FFJORD (Grathwohl et al., 2018) where the
    divergence is estimated,

        :math:`\mathbf{y} = \mathbf{x}(T), \qquad \frac{d\mathbf{x}}{dt} = f(t, \mathbf{x}), \qquad \mathbf{x}(0) =
        \mathbf{x}`

    where :math:`\mathbf{x}` are the inputs, :math:`\mathbf{y}` are the outputs and :math:`f` is a network without
    restrictions. The logarithm of the determinant of the Jacobian is the integral of the divergence of f: "exact", or
    "hutchinson", the unbiased estimate
    :math:`\boldsymbol\epsilon^T \frac{\partial f}{\partial \mathbf{x}} \boldsymbol\epsilon` by one backward pass, with
    one random probe :math:`\boldsymbol\epsilon` a solve. An estimate is different in each solve, so a round trip does
    not cancel; assign ``transform.divergence = "exact"`` to evaluate what was trained by estimates.

    For a dense network of at most two hidden layers, as :func:`free_form_cnf` makes it, the exact divergence has a
    closed form. With :math:`W_i` the matrices of its layers and :math:`z_i` what they give, before the activation s,

        :math:`\nabla \cdot f = s'(z_2)^T \left[W_2 \odot (W_1 W_3)^T\right] s'(z_1),`

    where the matrix in brackets is made once per solve; the rest takes about as long as one more layer. It is used if
    the activation is one of torch's that are smooth and act on each number by itself (nn.Softplus, nn.Tanh, nn.SiLU and
    their like, not in place) and no layer was replaced or has a hook; and with a ``rank`` if the input has dimensions
    enough for it to save memory. Otherwise the exact divergence takes d backward passes an evaluation.

    Together with :class:`~pyro.distributions.TransformedDistribution` this provides a way to create richer variational
    approximations.

    Example usage:

    >>> base_dist = dist.Normal(torch.zeros(10), torch.ones(10)).to_event(1)
    >>> transform = free_form_cnf(10, divergence="hutchinson")
    >>> _ = pyro.module("my_transform", transform)
    >>> flow_dist = dist.TransformedDistribution(base_dist, [transform])
    >>> flow_dist.rsample((3,)).shape
    torch.Size([3, 10])

    The inverse is computed by integrating the same differential equation backward in time, to solver tolerance; it
    costs the same as the forward operation.

    :param nn: the vector field, a smooth module called as ``nn(t, x)`` with an attribute ``input_dim``; if it has a
        method ``bind``, what ``bind(None)`` returns is called instead.
    :type nn: ~torch.nn.Module
    :param divergence: "exact" or "hutchinson".
    :type divergence: str
    :param probe: the distribution of Hutchinson's probe: "rademacher" or "gaussian".
    :type probe: str
    :param solver: how to integrate, a Solver or a method's name; None for ``Solver()``, which is "dopri5" at
        tolerances of 1e-5.
    :type solver: Solver or str
    :param time: the end time T.
    :type time: float
    :param cache_size: 1 to keep the latest pair of input and output, 0 not to.
    :type cache_size: int

    References:

    [1] Will Grathwohl, Ricky T. Q. Chen, Jesse Bettencourt, Ilya Sutskever, David Duvenaud. FFJORD: Free-form
    Continuous Dynamics for Scalable Reversible Generative Models. [arXiv:1810.01367]
    """

    @closest_keywords()
    def __init__(
        self,
        nn: nn.Module,
        *,
        divergence: str = "exact",
        probe: str = "rademacher",
        solver: Solver | str | None = None,
        time: float = 1.0,
        cache_size: int = 1,
    ) -> None:
        super().__init__(nn, divergence=divergence, probe=probe, solver=solver, time=time, cache_size=cache_size)


@copy_docs_from(ConditionalTransformModule)
class ConditionalFreeFormCNF(ConditionalCNF):
    r"""
    An implementation of the continuous normalizing flow of any vector field that also depends on a context (Grathwohl
    et al., 2018),

        :math:`\mathbf{y} = \mathbf{x}(T), \qquad \frac{d\mathbf{x}}{dt} = f(t, \mathbf{x}; \mathbf{c}), \qquad
        \mathbf{x}(0) = \mathbf{x}`

    where :math:`\mathbf{x}` are the inputs, :math:`\mathbf{y}` are the outputs, :math:`\mathbf{c}` is the context and
    :math:`f` is a network without restrictions; see :class:`FreeFormCNF`.

    Together with :class:`~pyro.distributions.ConditionalTransformedDistribution` this provides a way to create richer
    variational approximations.

    Example usage:

    >>> base_dist = dist.Normal(torch.zeros(7, 10), torch.ones(7, 10)).to_event(1)
    >>> transform = conditional_free_form_cnf(10, context_dim=4, divergence="hutchinson")
    >>> _ = pyro.module("my_transform", transform)
    >>> flow_dist = dist.ConditionalTransformedDistribution(base_dist, [transform]).condition(torch.randn(7, 4))
    >>> flow_dist.rsample().shape
    torch.Size([7, 10])

    :param nn: the vector field, a smooth module called as ``nn(t, x, context)`` with attributes ``input_dim`` and
        ``context_dim``; or one with a method ``bind(context)`` that is called once per solve and returns the field
        ``field(t, x)``, with an attribute ``tensors`` of all that gradients must reach, as hollow networks have.
    :type nn: ~torch.nn.Module
    :param divergence: "exact" or "hutchinson".
    :type divergence: str
    :param probe: the distribution of Hutchinson's probe: "rademacher" or "gaussian".
    :type probe: str
    :param solver: how to integrate, a Solver or a method's name; None for ``Solver()``, which is "dopri5" at
        tolerances of 1e-5.
    :type solver: Solver or str
    :param time: the end time T.
    :type time: float
    :param cache_size: the cache size of the conditioned transforms.
    :type cache_size: int

    References:

    [1] Will Grathwohl, Ricky T. Q. Chen, Jesse Bettencourt, Ilya Sutskever, David Duvenaud. FFJORD: Free-form
    Continuous Dynamics for Scalable Reversible Generative Models. [arXiv:1810.01367]
    """

    @closest_keywords(ConditionalCNF)
    def __init__(self, nn: nn.Module, *, divergence: str = "exact", probe: str = "rademacher", **kwargs: Any) -> None:
        super().__init__(nn, **kwargs)
        self.divergence = _check_choice("divergence", divergence, DIVERGENCES)
        self.probe = _check_choice("probe", probe, PROBES)

    def _condition(self, context: Tensor, settings: dict[str, Any]) -> ConditionedFreeFormCNF:
        return ConditionedFreeFormCNF(self.nn, context, divergence=self.divergence, probe=self.probe, **settings)


@closest_keywords(FreeFormCNF)
def free_form_cnf(
    input_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    divergence: str = "exact",
    solver: Solver | str | None = None,
    nonlinearity: nn.Module | None = None,
    **kwargs: Any,
) -> FreeFormCNF:
    """
    A helper function to create a :class:`~pyro_hollow.transforms.FreeFormCNF` object that takes care of constructing a
    dense network with the correct input/output dimensions.

    :param input_dim: Dimension of input variable
    :type input_dim: int
    :param hidden_dims: Widths of the hidden layers. Defaults to using [64, 64]
    :type hidden_dims: list[int]
    :param divergence: "exact" or "hutchinson"
    :type divergence: str
    :param solver: How to integrate, a Solver or a method's name. Defaults to "dopri5" at tolerances of 1e-5
    :type solver: Solver or str
    :param nonlinearity: Smooth activation module. Defaults to softplus
    :type nonlinearity: ~torch.nn.Module
    :param kwargs: probe, time and cache_size, as for :class:`~pyro_hollow.transforms.FreeFormCNF`
    """
    network = FreeFormNN(input_dim, 0, [64, 64] if hidden_dims is None else hidden_dims, nonlinearity)
    return FreeFormCNF(network, divergence=divergence, solver=solver, **kwargs)


@closest_keywords(ConditionalFreeFormCNF, ConditionalCNF)
def conditional_free_form_cnf(
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    *,
    divergence: str = "exact",
    solver: Solver | str | None = None,
    nonlinearity: nn.Module | None = None,
    rank: int | None = None,
    **kwargs: Any,
) -> ConditionalFreeFormCNF:
    """
    A helper function to create a :class:`~pyro_hollow.transforms.ConditionalFreeFormCNF` object that takes care of
    constructing a dense network with the correct input/output dimensions.

    :param input_dim: Dimension of input variable
    :type input_dim: int
    :param context_dim: Dimension of context variable
    :type context_dim: int
    :param hidden_dims: Widths of the hidden layers. Defaults to using [64, 64]
    :type hidden_dims: list[int]
    :param divergence: "exact" or "hutchinson"
    :type divergence: str
    :param solver: How to integrate, a Solver or a method's name. Defaults to "dopri5" at tolerances of 1e-5
    :type solver: Solver or str
    :param nonlinearity: Smooth activation module. Defaults to softplus
    :type nonlinearity: ~torch.nn.Module
    :param rank: The context changes every layer by a matrix of this rank, as in the variational autoencoders of
        FFJORD; see :class:`~pyro_hollow.transforms.LowRankFreeFormNN`. Defaults to the context as an input
    :type rank: int
    :param kwargs: probe, time and cache_size, as for :class:`~pyro_hollow.transforms.ConditionalFreeFormCNF`
    """
    widths = [64, 64] if hidden_dims is None else hidden_dims
    network: nn.Module
    if rank is None:
        network = FreeFormNN(input_dim, context_dim, widths, nonlinearity)
    else:
        network = LowRankFreeFormNN(input_dim, context_dim, widths, rank, nonlinearity)
    return ConditionalFreeFormCNF(network, divergence=divergence, solver=solver, **kwargs)
