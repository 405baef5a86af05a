# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The ELBO of guides over flat unconstrained latents, with the model as a LogDensity, as objectives of a training."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation, AutoNormal
from torch import Tensor

from pyro_hollow.transforms import HollowCNF

from .autoguide import AutoHollowCNF
from .gaussian_mixture import GaussianMixture
from .guide_posterior import spread_normal
from .importance import resample, smooth
from .log_density import LogDensity

__all__ = ["DensityELBO", "InclusiveKL", "PathELBO", "supports"]

_WINDOW = 50  # steps over which the spread of log weights is averaged
# The share of the particles that are stretched, and the largest factor.
_STRETCHED = 0.25
_LARGEST_FACTOR = 3.0
_LEAST_GAIN = 0.02  # nats that are worth further steps
# While a flow is further than this from the posterior, in nats, it gains little in each step, but much in all: its rate
# falls after so many steps at the earliest.
_CLOSE, _FEWEST_STEPS = 0.03, 800
# Of InclusiveKL: how many samples, those of a batch, the calls for which they serve, and which of them are stretched.
_SAMPLES, _BATCH_SIZE, _REDRAWN = 6000, 128, 60
_SHARE, _FACTOR = 0.2, 2.0
_CALM = 20  # solves without a rejected step, after which longer steps are tried


def supports(guide: Any) -> bool:
    """
    True for guides whose distribution over all flat latents is available without Pyro's handlers.

    :param guide: a guide.
    """
    if isinstance(guide, AutoLaplaceApproximation):
        return False  # a point until it is fitted
    return isinstance(guide, (AutoContinuous, AutoNormal))


class DensityELBO:
    r"""
    The negative ELBO, a mean over particles,

        :math:`-\mathbb{E}_{\mathbf{z} \sim q} \bigl[\log p(\mathbf{x}, \mathbf{z}) - \log q(\mathbf{z})\bigr],`

    of a guide whose distribution q is reparameterised, of flat unconstrained latents.

    :ivar num_particles: the number of particles.

    :param guide: an AutoContinuous or AutoNormal that is set up.
    :param LogDensity log_density: that of the model.
    :param int num_particles: the number of particles.
    :param args: positional arguments of the model, and so kwargs.
    """

    def __init__(self, guide: Any, log_density: LogDensity, num_particles: int, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.guide, self.log_density, self.num_particles = guide, log_density, num_particles
        self._variances: deque[Tensor] = deque(maxlen=_WINDOW)

    def __call__(self) -> Tensor:
        """Evaluates the negative ELBO of new particles."""
        posterior = self.posterior()
        z = posterior.rsample((self.num_particles,))
        log_weights = self.log_density(z) - posterior.log_prob(z)
        self._note(log_weights.detach()[log_weights.isfinite()])
        return -log_weights.mean()

    def posterior(self) -> Any:
        """The distribution of the guide over flat latents."""
        if isinstance(self.guide, AutoContinuous):
            return self.guide.get_posterior(*self.args, **self.kwargs)
        locs, scales = [], []
        for name, _ in self.guide.prototype_trace.iter_stochastic_nodes():
            loc, scale = self.guide._get_loc_and_scale(name)
            locs.append(loc.reshape(-1))
            scales.append(scale.reshape(-1))
        return dist.Normal(torch.cat(locs), torch.cat(scales)).to_event(1)

    @torch.no_grad()
    def weigh(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """
        Log weights of samples of the guide, and the samples.

        :param int num_samples: the number S of samples.
        :return: with shapes ``(S,)`` and ``(S, d)``.
        """
        posterior = self.posterior()
        z = posterior.sample((num_samples,))
        return self.log_density(z) - posterior.log_prob(z), z

    def _note(self, log_weights: Tensor) -> None:
        self._variances.append(log_weights.double().var(correction=0))

    def divergence(self) -> float:
        """
        Half the variance of the log weights of the last steps, which comes close to the Kullback-Leibler divergence
        from the posterior as that becomes small.
        """
        return torch.stack(list(self._variances)).median().item() / 2 if self._variances else math.inf

    def threshold(self) -> float:
        """The gain of the loss below which it counts as no longer falling."""
        divergence = self.divergence()
        return max(_LEAST_GAIN, 0.1 * divergence) if math.isfinite(divergence) else _LEAST_GAIN


class PathELBO(DensityELBO):
    r"""
    The negative ELBO of an :class:`AutoHollowCNF`, differentiated along the path of each particle alone [1],

        :math:`\nabla_\phi = \mathbb{E} \, (\partial \mathbf{z} / \partial \phi)^T
        \nabla_\mathbf{z} \bigl(\log q - \log p\bigr),`

    which has no noise where the guide is exact. The ODE solve that computes z also computes the score of q.

    In a quarter of the particles one coordinate of the base sample is multiplied by U(1, 3), so that the guide learns
    tails in which hardly any sample would lie. Where the guide is exact, the gradient of these particles vanishes, too.
    Far out the gradient of a model may have any size: each particle's gradient is clipped to the norm of its score, in
    the coordinates of the affine map.

    :ivar int num_calls: the number of steps that the flow has been trained for.

    :param guide: an AutoHollowCNF that is set up.
    :param LogDensity log_density: that of the model.
    :param int num_particles: the number of particles.

    References:

    [1] Geoffrey Roeder, Yuhuai Wu, David Duvenaud. Sticking the Landing: Simple, Lower-Variance Gradient Estimators for
    Variational Inference. [arXiv:1703.09194]
    """

    guide: AutoHollowCNF

    def __init__(
        self, guide: AutoHollowCNF, log_density: LogDensity, num_particles: int, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(guide, log_density, num_particles, *args, **kwargs)
        self.num_calls = 0
        base = guide.get_base_dist()
        self._mixture = base if isinstance(base, GaussianMixture) else None
        flows: Any = guide.flows
        self._lengths = [_StepLength(flow) for flow in flows if flow.solver.adaptive]

    def close(self) -> None:
        """Restores the solvers of the flows."""
        for each in self._lengths:
            each.flow.solver = each.solver

    def __call__(self) -> Tensor:
        """Evaluates the negative ELBO of new particles, and adds its gradient to those of the parameters."""
        self.num_calls += 1
        y, near, log_q, score = self._base_sample()
        parts: Any = self.guide.get_transform().parts  # type: ignore[attr-defined]
        *transforms, affine = parts
        pulls = []
        for transform in transforms:
            y, ladj, score, pull = transform.call_and_pull(y, score)
            log_q -= ladj
            pulls.append(pull)
        for each in self._lengths:
            each.update()
        with torch.no_grad():  # the affine map is not trained
            y, ladj, score = affine.call_and_score(y, score)
            value, gradient = self.log_density.value_and_gradient(y)
            log_weights = value - log_q + ladj
            bar = _restrained(score - gradient, score, affine.transposed()).div_(self.num_particles)
            finite = value.isfinite()  # from other particles nothing can be learned
            bar = torch.where(finite.unsqueeze(-1), bar, 0.0)
        for pull in reversed(pulls):
            bar = pull(bar)
        log_weights = log_weights[near][finite[near]]
        if len(log_weights) == 0:
            return log_weights.new_full((), math.inf)
        self._note(log_weights)
        return -log_weights.mean()

    def threshold(self) -> float:
        """See :meth:`DensityELBO.threshold`; minus infinity in the first steps of a flow that is not close."""
        early = self.num_calls < _FEWEST_STEPS and self.divergence() > _CLOSE
        return -math.inf if early else super().threshold()

    def _base_sample(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Base samples, the indices of those that are not stretched, the log densities of all, and the scores."""
        size, dim = self.num_particles, self.log_density.dim
        noise = spread_normal(size, dim, self.guide.affine)
        count = max(min(int(_STRETCHED * size), size - 2), 0)
        if count:
            chosen = torch.randint(dim, (count, 1), device=noise.device)
            factor = 1.0 + (_LARGEST_FACTOR - 1.0) * torch.rand(count, 1).to(noise)
            # Sobol points come in no order, so that the first ones are as good as any.
            head = noise[:count].scatter(1, chosen, noise[:count].gather(1, chosen) * factor)
            noise = torch.cat([head, noise[count:]])
        near = torch.arange(count, size)
        if self._mixture is None:
            log_density = -0.5 * noise.double().square().sum(-1) - 0.5 * dim * math.log(2 * math.pi)
            return noise, near, log_density, -noise
        x = self._mixture.place(noise, self._mixture.stratify(size))
        return x, near, *self._mixture.log_prob_and_score(x)


class InclusiveKL:
    r"""
    The divergence that the ELBO leaves out, up to a constant,

        :math:`\mathrm{KL}(p \,\|\, q) = -\mathbb{E}_{\mathbf{z} \sim p} \log q(\mathbf{z}) + \mathrm{const},`

    on samples of the guide that are resampled by their importance weights [1]. It is large where the guide misses a
    part of the posterior, however small, while the ELBO hardly notices: it makes importance weights lighter. Base
    samples have a coordinate stretched now and then, which their weights allow for.

    :param PathELBO objective: of a guide that is close to the posterior already.

    References:

    [1] Olivier Cappé, Randal Douc, Arnaud Guillin, Jean-Michel Marin, Christian P. Robert.
    Adaptive Importance Sampling in General Mixture Classes. [arXiv:0710.4242]
    """

    def __init__(self, objective: PathELBO) -> None:
        self.objective = objective
        self._calls, self._draws = 0, objective.guide.affine.new_zeros(0)

    def __call__(self) -> Tensor:
        """Evaluates it on a batch; every few calls the samples are drawn anew."""
        if self._calls % _REDRAWN == 0:
            self._draws = self._resampled()
        self._calls += 1
        batch = self._draws[torch.randint(len(self._draws), (_BATCH_SIZE,), device=self._draws.device)]
        return -self.objective.posterior().log_prob(batch).mean()

    @torch.no_grad()
    def _resampled(self) -> Tensor:
        x, log_q = self._base_sample()
        y = x
        for transform in self.objective.posterior().transforms:
            before, y = y, transform(y)
            log_q = log_q - transform.log_abs_det_jacobian(before, y)
        log_weights = self.objective.log_density(y) - log_q
        weights = smooth(log_weights.to("cpu", torch.float64).nan_to_num(nan=-math.inf)).weights
        return y[resample(weights, len(y)).to(y.device)]

    def _base_sample(self) -> tuple[Tensor, Tensor]:
        r"""
        Samples of whose noise a share a has one coordinate stretched by s, and their log densities,
        :math:`\log q(x) + \log (1 - a + \frac{a}{d} \sum_k p(k | x) \sum_i r(\epsilon_i)`, for the components k of a
        mixture and the coordinates i of each, with :math:`r(\epsilon) = \phi(\epsilon / s) / (s \phi(\epsilon))`.
        """
        dim, like, mixture = self.objective.log_density.dim, self.objective.guide.affine, self.objective._mixture
        noise = torch.randn(_SAMPLES, dim).to(like)
        chosen = torch.randint(dim, (_SAMPLES, 1)).to(like.device)
        stretched = noise.scatter(1, chosen, _FACTOR * noise.gather(1, chosen))
        noise = torch.where((torch.rand(_SAMPLES, 1) < _SHARE).to(like.device), stretched, noise)
        growth = 0.5 * (1 - _FACTOR**-2)
        if mixture is None:
            x, squares = noise, noise.double().square()
            log_density = -0.5 * (squares.sum(-1) + dim * math.log(2 * math.pi))
            log_ratio = (growth * squares).logsumexp(-1)
        else:
            x = mixture.place(noise, mixture.stratify(_SAMPLES))
            log_density, noises, log_probabilities = mixture.explain(x)
            # In logarithms, as a component far away has a tiny probability and a huge ratio.
            logs = growth * noises.double().square() + log_probabilities.unsqueeze(-1)
            log_ratio = logs.masked_fill(~mixture.members.unsqueeze(1), -math.inf).logsumexp((0, -1))
        return x, log_density.double() + torch.log1p(_SHARE * (log_ratio.exp() / (_FACTOR * dim) - 1))


class _StepLength:
    """
    Begins each solve of a flow in training with steps as long as the one before needed: a step that is rejected costs
    an evaluation of every stage. Longer ones are tried now and then.

    :ivar solver: the flow's own solver.

    :param flow: the flow.
    """

    def __init__(self, flow: HollowCNF) -> None:
        self.flow, self.solver = flow, flow.solver
        self._count, self._calm = 1, 0

    def update(self) -> None:
        """Looks at the latest solve."""
        stats, before = self.flow.last_solve, self._count
        if stats is None:
            return
        self._calm = 0 if stats.rejected else self._calm + 1
        if stats.rejected:
            self._count = stats.accepted
        elif self._calm >= _CALM and self._count > 1:
            self._count, self._calm = self._count - 1, 0
        if self._count != before and not self.solver.options:
            options = {"first_step": self.flow.time / self._count} if self._count > 1 else {}
            self.flow.solver = replace(self.solver, options=options)


def _restrained(gradient: Tensor, score: Tensor, transposed: Any) -> Tensor:
    """
    Gradients behind a linear map, pulled back through it; they are at most as long as the scores there, and zero where
    they are not finite.
    """
    gradient, score = transposed(torch.stack([gradient, score])).unbind()
    length, largest = gradient.norm(dim=-1), score.norm(dim=-1)
    cut = (largest / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1.0).unsqueeze(-1)
    return (gradient * cut).nan_to_num_(0.0, 0.0, 0.0)
