# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A variational autoencoder in two sizes, and the posteriors that are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro import poutine
from pyro.distributions.conditional import ConditionalComposeTransformModule
from torch import Tensor, nn

from pyro_hollow.infer import PathGradientDistribution
from pyro_hollow.nn import ConditionalHollowNN
from pyro_hollow.ode import Solver
from pyro_hollow.transforms import (
    ConditionalCNF,
    ConditionalFreeFormCNF,
    ConditionalHollowCNF,
    conditional_free_form_cnf,
    conditional_hollow_cnf,
    conditional_low_rank_linear,
    conditional_sylvester,
)

NETWORKS = ("mlp", "conv")

#: A test -ELBO is only reported for a solve that has converged, whatever the training took.
TEST_SOLVER = Solver("dopri5", rtol=1e-5, atol=1e-5)


def _compose(layers: int, make: Callable[..., nn.Module], **kwargs: Any) -> Callable[..., nn.Module]:
    def make_all(d: int, context_dim: int, solver: Solver) -> nn.Module:
        return ConditionalComposeTransformModule([make(d, context_dim, **kwargs) for _ in range(layers)], cache_size=1)

    return make_all


def _hollow(d: int, context_dim: int, solver: Solver) -> ConditionalHollowCNF:
    return conditional_hollow_cnf(d, context_dim, solver=solver)


def _hollow_stochastic(d: int, context_dim: int, solver: Solver) -> nn.Module:
    network = _hollow(d, context_dim, solver).nn
    return ConditionalFreeFormCNF(network, divergence="hutchinson", probe="gaussian", solver=solver)


def _free_form(divergence: str) -> Callable[..., nn.Module]:
    def make(d: int, context_dim: int, solver: Solver) -> nn.Module:
        width = max(64, 2 * d)
        return conditional_free_form_cnf(
            d, context_dim, [width, width], rank=max(4, d // 8), divergence=divergence, probe="gaussian",
            solver=solver,
        )  # fmt: skip

    return make


_sylvester_16 = _compose(4, lambda d, context_dim: conditional_sylvester(d, context_dim, min(16, d)))


def _no_flow(d: int, context_dim: int, solver: Solver) -> None:
    return None


def _low_rank(d: int, context_dim: int, solver: Solver) -> list[nn.Module]:
    return [conditional_low_rank_linear(d, context_dim) for _ in range(2)]


def _hollow_low_rank(d: int, context_dim: int, solver: Solver) -> list[nn.Module]:
    return [_hollow(d, context_dim, solver), *_low_rank(d, context_dim, solver)]


#: The posteriors, each by its flow behind the encoder's location and scale: those of the published table, those with
#: directions of each image's own, and two that separate what the hollow network brings from what the exact trace
#: brings. "none" is a diagonal Gaussian.
FLOWS: dict[str, Callable[..., nn.Module | None]] = {
    "none": _no_flow,
    "planar": _compose(16, lambda d, context_dim: T.conditional_planar(d, context_dim, [64])),
    "iaf": _compose(4, lambda d, context_dim: T.conditional_affine_autoregressive(d, context_dim, [320], stable=True)),
    "sylvester": _compose(4, conditional_sylvester, kind="orthogonal"),
    "householder": _compose(4, conditional_sylvester, kind="householder"),
    "ffjord": _free_form("hutchinson"),
    "hollow": _hollow,
    "sylvester-16": _sylvester_16,
    "low-rank": _no_flow,
    "sylvester-16-low-rank": _sylvester_16,
    "hollow-low-rank": _no_flow,
    "hollow-low-rank-2": _hollow,
    "hollow-stochastic": _hollow_stochastic,
    "free-form-exact": _free_form("exact"),
}
#: What some of them have before the encoder's location and scale: transforms of the standard Normal.
INNER: dict[str, Callable[..., list[nn.Module]]] = {
    "low-rank": _low_rank,
    "sylvester-16-low-rank": _low_rank,
    "hollow-low-rank": _hollow_low_rank,
    "hollow-low-rank-2": _hollow_low_rank,
}
#: Some of them once more, to be trained with the path gradient.
PATH_GRADIENT = tuple(
    f"{name}-path" for name in ("none", "sylvester", "sylvester-16", "hollow", "free-form-exact", *INNER)
)
FLOWS |= {name: FLOWS[name.removesuffix("-path")] for name in PATH_GRADIENT}
#: Those that solve differential equations.
CONTINUOUS = tuple(name for name in FLOWS if name.startswith(("ffjord", "hollow", "free-form")))


def make_flow(name: str, latent_dim: int, context_dim: int, solver: Solver) -> nn.Module | None:
    """
    The flow of a posterior, to be conditioned on what the encoder makes of an image.

    "none" is a diagonal Gaussian; "planar", 16 layers; "iaf", 4 affine autoregressive layers of 320 hidden units;
    "sylvester" and "householder", 4 layers with 8 orthogonal columns and with 8 Householder reflections;
    "sylvester-16", with 16 columns; "ffjord", a free-form network that the context changes by low rank, its trace by
    one Gaussian probe; "hollow", a Hollow-CNF; "low-rank", a Gaussian with correlations;
    "sylvester-16-low-rank", layers of "sylvester-16" behind these; "hollow-low-rank", a Hollow-CNF before these, and
    "hollow-low-rank-2", another one behind; "hollow-stochastic", the network of "hollow" with a stochastic trace;
    "free-form-exact", the network of ffjord with the exact one; and those in "-path", what is to be trained with the
    path gradient. For "low-rank" in a name see :func:`make_inner`.

    :param str name: one of ``FLOWS``.
    :param int latent_dim: Dimension of the latent variable
    :param int context_dim: Dimension of the context
    :param Solver solver: how the continuous ones integrate
    :raises ValueError: for any other name.
    """
    if name not in FLOWS:
        raise ValueError(f"flow must be one of {tuple(FLOWS)}, but got {name!r}")
    return FLOWS[name](latent_dim, context_dim, solver)


def make_inner(name: str, latent_dim: int, context_dim: int, solver: Solver) -> list[nn.Module]:
    """
    Transforms of the standard Normal before the encoder's location and scale are applied, as a list of
    conditional transforms; nothing for most.

    Those in "low-rank" apply two linear maps of low rank that depend on the image, behind a Hollow-CNF if there is one.
    In front of location and scale its latents are of one scale, whatever the image, and a flow takes few evaluations;
    behind, it can learn what images have in common.

    :param str name: one of ``FLOWS``.
    :param int latent_dim: Dimension of the latent variable
    :param int context_dim: Dimension of the context
    :param Solver solver: how the continuous ones integrate
    """
    make = INNER.get(name.removesuffix("-path"))
    return [] if make is None else make(latent_dim, context_dim, solver)


def exact(flow: nn.Module | None) -> nn.Module | None:
    """The flow as it is judged: a continuous one with its exact trace and a tight solver, on the same network."""
    if isinstance(flow, ConditionalCNF) and isinstance(flow.nn, ConditionalHollowNN):
        return ConditionalHollowCNF(flow.nn, solver=TEST_SOLVER)
    if isinstance(flow, ConditionalFreeFormCNF):
        return ConditionalFreeFormCNF(flow.nn, divergence="exact", solver=TEST_SOLVER)
    return flow


class Gated(nn.Module):
    """
    A gated convolution, :math:`a * x + b` times the sigmoid of another.

    :param convolution: the class, ``nn.Conv2d`` or ``nn.ConvTranspose2d``; the other arguments are for it.
    """

    def __init__(self, convolution: type[nn.Module], inputs: int, outputs: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.convolution = convolution(inputs, 2 * outputs, *args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """:param Tensor x: images with shape ``(n, inputs, height, width)``."""
        return nn.functional.glu(self.convolution(x), dim=1)


def _dense(pixels: int, latent_dim: int, hidden_dim: int) -> tuple[nn.Module, nn.Module]:
    def two_layers(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()]

    return nn.Sequential(*two_layers(pixels)), nn.Sequential(*two_layers(latent_dim), nn.Linear(hidden_dim, pixels))


def _convolutional(pixels: int, latent_dim: int, hidden_dim: int) -> tuple[nn.Module, nn.Module]:
    """The networks of van den Berg et al. (2018), for 28 x 28 pixels."""
    if pixels != 28 * 28:
        raise ValueError(f"network 'conv' is for images of 28 x 28 pixels, but these have {pixels}; take 'mlp'")
    down = [(1, 32, 5, 1, 2), (32, 32, 5, 2, 2), (32, 64, 5, 1, 2), (64, 64, 5, 2, 2), (64, 64, 5, 1, 2)]
    up = [(64, 64, 5, 1, 2, 0), (64, 32, 5, 2, 2, 1), (32, 32, 5, 1, 2, 0), (32, 32, 5, 2, 2, 1), (32, 32, 5, 1, 2, 0)]
    encoder = [nn.Unflatten(1, (1, 28, 28)), *(Gated(nn.Conv2d, *sizes) for sizes in down)]
    encoder += [Gated(nn.Conv2d, 64, hidden_dim, 7), nn.Flatten()]
    decoder = [nn.Unflatten(1, (latent_dim, 1, 1)), Gated(nn.ConvTranspose2d, latent_dim, 64, 7)]
    decoder += [*(Gated(nn.ConvTranspose2d, *sizes) for sizes in up), nn.Conv2d(32, 1, 1), nn.Flatten()]
    return nn.Sequential(*encoder), nn.Sequential(*decoder)


class VAE(nn.Module):
    """
    A variational autoencoder for binary images: model and guide are Pyro programs.

    :param int pixels: Number of pixels of an image
    :param int latent_dim: Dimension of the latent variable
    :param int hidden_dim: Dimension of what the encoder makes of an image, and so of the flow's context; with "mlp"
        also the width of the two hidden layers of encoder and decoder
    :param flow: the posterior's flow, see :func:`make_flow`; None for a diagonal Gaussian
    :param str network: "mlp", or "conv", the gated convolutions of van den Berg et al. (2018)
    :param bool path_gradient: train with the path gradient, see
        :class:`~pyro_hollow.infer.PathGradientDistribution`; not for flows with a stochastic trace
    :param inner: conditional transforms of the standard Normal, before the encoder's location and scale are applied,
        see :func:`make_inner`
    :raises ValueError: for another network, and for "conv" with images of another size than 28 x 28.

    References:

    [1] Rianne van den Berg, Leonard Hasenclever, Jakub M. Tomczak, Max Welling.
    Sylvester Normalizing Flows for Variational Inference. [arXiv:1803.05649]
    """

    def __init__(
        self,
        pixels: int,
        latent_dim: int,
        hidden_dim: int,
        flow: nn.Module | None = None,
        network: str = "mlp",
        path_gradient: bool = False,
        inner: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"network must be one of {NETWORKS}, but got {network!r}")
        self.latent_dim = latent_dim
        make = _dense if network == "mlp" else _convolutional
        self.encoder, self.decoder = make(pixels, latent_dim, hidden_dim)
        self.to_base = nn.Linear(hidden_dim, 2 * latent_dim)
        self.flow = flow
        self.inner = nn.ModuleList(inner)
        self.family = PathGradientDistribution if path_gradient else dist.TransformedDistribution

    def model(self, x: Tensor, kl_weight: float = 1.0) -> None:
        """
        :param Tensor x: binary images with shape ``(n, pixels)``.
        :param float kl_weight: weight of the latent variable's density, for warm-up.
        """
        with pyro.plate("data", len(x), dim=-1):
            with poutine.scale(scale=kl_weight):
                z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.logits(z), validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor, kl_weight: float = 1.0) -> None:
        """Takes the arguments of :meth:`model`."""
        with pyro.plate("data", len(x), dim=-1), poutine.scale(scale=kl_weight):
            pyro.sample("z", self.posterior(x))

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """The approximate posterior of the latent variables of images with shape ``(n, pixels)``."""
        hidden = self.encoder(x)
        loc, raw_scale = self.to_base(hidden).chunk(2, dim=-1)
        scale = nn.functional.softplus(raw_scale) + 1e-5
        flows = [] if self.flow is None else [self.flow.condition(hidden)]  # type: ignore[operator]
        if not self.inner:
            return self.family(dist.Normal(loc, scale).to_event(1), flows)
        standard = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        inner = [part.condition(hidden) for part in self.inner]  # type: ignore[operator]
        # Without its cache log_prob would have to invert what is before it.
        affine = T.AffineTransform(loc, scale, cache_size=1)
        return self.family(standard, [*inner, affine, *flows])

    def logits(self, z: Tensor) -> Tensor:
        """The log-odds of ink, with shape ``(*, pixels)``, for latent variables with shape ``(*, latent_dim)``."""
        return self.decoder(z.reshape(-1, self.latent_dim)).unflatten(0, z.shape[:-1])

    def decode(self, z: Tensor) -> Tensor:
        """The probabilities of ink, with shape ``(*, pixels)``, for latent variables with shape ``(*, latent_dim)``."""
        return torch.sigmoid(self.logits(z))

    def log_weights(self, x: Tensor, num_samples: int) -> Tensor:
        """
        :math:`\\log p(x, z) - \\log q(z | x)` for z drawn from the posterior.

        :param Tensor x: binary images with shape ``(n, pixels)``.
        :param int num_samples: samples an image.
        :returns: a tensor of shape ``(num_samples, n)``.
        """
        particles = pyro.plate("particles", num_samples, dim=-2)
        guide_trace = poutine.trace(particles(self.guide)).get_trace(x)
        model_trace = poutine.trace(poutine.replay(particles(self.model), trace=guide_trace)).get_trace(x)
        model_trace.compute_log_prob()
        guide_trace.compute_log_prob()
        log_p = model_trace.nodes["z"]["log_prob"] + model_trace.nodes["x"]["log_prob"]
        return (log_p - guide_trace.nodes["z"]["log_prob"]).expand(num_samples, len(x))
