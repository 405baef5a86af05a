# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Objectives for :func:`~pyro_hollow.train.train`: maximum likelihood, flow matching, and the evidence lower bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import ConditionalDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = ["ELBO", "FlowMatching", "MaximumLikelihood"]


class _Batches:
    """Random minibatches of data and their contexts, drawn with replacement."""

    def __init__(
        self, data: Tensor, context: Tensor | None, batch_size: int | None, generator: torch.Generator | None
    ) -> None:
        if data.dim() == 0 or not len(data):
            raise ValueError(f"data must hold at least one sample, but has shape {tuple(data.shape)}")
        if context is not None and (context.dim() == 0 or len(context) != len(data)):
            raise ValueError(
                f"context must have a row for each of the {len(data)} samples, but has shape {tuple(context.shape)}"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but got {batch_size}")
        self.data, self.context, self.generator = data, context, generator
        self.size = None if batch_size is None or batch_size >= len(data) else batch_size

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """A minibatch; all data if they are no more."""
        if self.size is None:
            return self.data, self.context
        device = self.data.device if self.generator is None else self.generator.device
        index = torch.randint(len(self.data), (self.size,), generator=self.generator, device=device)
        index = index.to(self.data.device)
        return self.data[index], None if self.context is None else self.context[index]


class MaximumLikelihood:
    r"""
    The negative mean log-likelihood of a minibatch, :math:`-\frac{1}{n} \sum_k \log p(x_k | c_k)` in nats per sample.

    Example usage:

    >>> from pyro_hollow.transforms import hollow_cnf
    >>> x = torch.randn(200, 2) * torch.tensor([1.0, 0.5])
    >>> flow = hollow_cnf(2, [8, 8])
    >>> flow_dist = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.).to_event(1), [flow])
    >>> training = train(MaximumLikelihood(flow_dist, x, batch_size=64), flow.parameters(), num_steps=5, progress=False)

    :param distribution: a distribution; one that waits for its context; or a function that makes a distribution of the
        parameters as they are now, of the context if there is one.
    :param Tensor data: the samples with shape ``(n, *event_shape)``.
    :param Tensor context: the contexts with shape ``(n, context_dim)``; None for none.
    :param batch_size: the samples of a minibatch, drawn with replacement; None for all.
    :param generator: draws the minibatches; None for the global one.
    :raises ValueError: for no samples, a context of another length, and from a call for log-likelihoods whose shape is
        not that of the batch.
    """

    def __init__(
        self,
        distribution: Distribution | ConditionalDistribution | Callable[..., Distribution],
        data: Tensor,
        *,
        context: Tensor | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.distribution = distribution
        self._batches = _Batches(data, context, batch_size, generator)

    def __call__(self) -> Tensor:
        """The loss of a new minibatch."""
        return self.loss(*self._batches.draw())

    def loss(self, data: Tensor, context: Tensor | None = None) -> Tensor:
        """
        The loss of given data, such as those of a validation.

        :param Tensor data: the samples with shape ``(n, *event_shape)``.
        :param Tensor context: the contexts with shape ``(n, context_dim)``; None for none.
        """
        made: Any = self.distribution
        arguments = () if context is None else (context,)
        if isinstance(made, ConditionalDistribution):
            made = made.condition(*arguments)
        elif not isinstance(made, Distribution):
            made = made(*arguments)
        log_prob = made.log_prob(data)
        if log_prob.shape != data.shape[:1]:
            raise ValueError(
                f"distribution must give {len(data)} samples log-densities with shape ({len(data)},), but gave "
                f"{tuple(log_prob.shape)}: its event shape is {tuple(made.event_shape)}; .to_event makes dimensions of "
                "a batch those of an event"
            )
        return -log_prob.mean()


class FlowMatching:
    r"""
    The objective that fits a continuous flow to data without solving a differential equation (Lipman et al., 2023):
    the vector field is regressed on the velocity of straight lines from samples of the base to samples of the data,

        :math:`\mathbb{E} \left\| T f(t, x_t) - (x_1 - x_0) \right\|^2, \qquad x_t = (1 - t/T) x_0 + t/T \, x_1, \quad
        x_0 \sim \text{base}, \; x_1 \sim \text{data}, \; t \sim \mathcal{U}(0, T),`

    whose minimum, the conditional mean of the velocity, carries the base to the data. The times of a batch are evenly
    spaced behind a random first one. The minimum is not 0: the lines cross.

    The likelihood of the result is that of the flow, exact as always:
    ``TransformedDistribution(base, [flow]).log_prob(x)``. Matching costs one evaluation of the field per step where
    :class:`MaximumLikelihood` costs a solve, but its optimum among the fields of a network is another one: a few steps
    of maximum likelihood afterwards gain likelihood.

    Example usage:

    >>> from pyro_hollow.transforms import hollow_cnf, standardized
    >>> x = torch.randn(500, 2) * torch.tensor([1.0, 0.5]) + 3.0
    >>> flow = standardized(hollow_cnf(2, [8, 8]), x)
    >>> training = train(FlowMatching(flow, x, batch_size=128), flow.parameters(), num_steps=5, progress=False)
    >>> base_dist = dist.Normal(torch.zeros(2), 1.).to_event(1)
    >>> dist.TransformedDistribution(base_dist, [flow]).log_prob(x).shape
    torch.Size([500])

    :param flow: a continuous flow of this package, with context or without, or one of
        :func:`~pyro_hollow.transforms.standardized` data, where lines run in standard units.
    :param Tensor data: the samples with shape ``(n, d)``.
    :param Tensor context: the contexts with shape ``(n, context_dim)``; None for a flow without.
    :param base: the base distribution with event shape ``(d,)``; None for the standard normal one.
    :param batch_size: the samples of a minibatch, drawn with replacement; None for all.
    :param generator: draws the minibatches; None for the global one.
    :raises ValueError: for data, context or base of another shape, and a context that is missing or one too many.
    :raises TypeError: for a flow without vector field.

    References:

    [1] Yaron Lipman, Ricky T. Q. Chen, Heli Ben-Hamu, Maximilian Nickel, Matt Le.
    Flow Matching for Generative Modeling. [arXiv:2210.02747]
    """

    def __init__(
        self,
        flow: nn.Module,
        data: Tensor,
        *,
        context: Tensor | None = None,
        base: Distribution | None = None,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if data.dim() != 2:
            raise ValueError(f"data must have shape (n, d), but got {tuple(data.shape)}")
        if base is not None and (base.batch_shape or base.event_shape != data.shape[1:]):
            raise ValueError(
                f"base must have batch shape () and event shape {tuple(data.shape[1:])}, but has "
                f"{tuple(base.batch_shape)} and {tuple(base.event_shape)}"
            )
        if hasattr(flow, "condition") != (context is not None):
            raise ValueError(
                "context is given, but the flow takes none" if context is not None else "context is missing"
            )
        self.flow: Any = flow
        self.base = base
        self._batches = _Batches(data, context, batch_size, generator)

    def __call__(self) -> Tensor:
        """The loss of a new minibatch."""
        return self.loss(*self._batches.draw())

    def loss(self, data: Tensor, context: Tensor | None = None) -> Tensor:
        """
        The loss of given data, such as those of a validation, with new times and samples of the base.

        :param Tensor data: the samples with shape ``(n, d)``.
        :param Tensor context: the contexts with shape ``(n, context_dim)``; None for none.
        """
        flow = self.flow if context is None else self.flow.condition(context)
        while hasattr(flow, "units"):
            flow, data = flow.flow, flow.units(data)
        if not hasattr(flow, "velocity"):
            raise TypeError(f"flow must be a continuous flow with a method velocity, but got {type(flow).__name__}")
        start = torch.randn_like(data) if self.base is None else self.base.sample(data.shape[:1]).to(data)
        steps = torch.arange(len(data), dtype=data.dtype, device=data.device) / len(data)
        share = (steps + torch.rand((), dtype=data.dtype, device=data.device)).remainder(1.0)
        velocity = data - start
        field = flow.velocity(flow.time * share, start + share.unsqueeze(-1) * velocity)
        return (flow.time * field - velocity).square().sum(-1).mean()


class ELBO:
    r"""
    The negative evidence lower bound of a Pyro model and a guide, by Pyro's handlers.

    Example usage:

    >>> def model(x):
    ...     loc = pyro.sample("loc", dist.Normal(0., 10.))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(loc, 1.), obs=x)
    >>> objective = ELBO(model, pyro.infer.autoguide.AutoNormal(model), torch.randn(20) + 3.)
    >>> training = train(objective, objective.parameters(), num_steps=5, progress=False)

    :param model: a Pyro model.
    :param guide: a guide for it.
    :param args: arguments of both.
    :param loss: an estimator with a method ``differentiable_loss``, such as :class:`pyro.infer.TraceEnum_ELBO`; None
        for :class:`pyro.infer.Trace_ELBO` with one particle.
    :param kwargs: keyword arguments of both.
    :raises RuntimeError: from a call in which a parameter appears that :meth:`parameters` did not know.
    """

    def __init__(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, loss: Any = None, **kwargs: Any
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.estimator = pyro.infer.Trace_ELBO() if loss is None else loss
        self._known: dict[int, Tensor] = {}

    def parameters(self) -> list[Tensor]:
        """
        Unconstrained parameters of model and guide: those that they use now, and all parameters of modules. The first
        call makes those that do not exist yet, and evaluates the loss to this end.
        """
        if not self._known:
            found = [tensor for _, tensor in self._evaluate()[1]]
            for module in (self.model, self.guide):
                if isinstance(module, nn.Module):
                    found += module.parameters()
            self._known = {id(tensor): tensor for tensor in found if tensor.requires_grad}
        return list(self._known.values())

    def __call__(self) -> Tensor:
        """An estimate of the loss, whose gradient is an estimate of the gradient."""
        self.parameters()
        loss, used = self._evaluate()
        for name, tensor in used:
            if tensor.requires_grad and id(tensor) not in self._known:
                raise RuntimeError(
                    f"parameter {name!r} is new: it would not be trained. Make a new ELBO once all parameters exist"
                )
        return loss

    def _evaluate(self) -> tuple[Tensor, list[tuple[str, Tensor]]]:
        with poutine.trace(param_only=True) as capture:
            loss = self.estimator.differentiable_loss(self.model, self.guide, *self.args, **self.kwargs)
        return loss, [(name, site["value"].unconstrained()) for name, site in capture.trace.nodes.items()]
