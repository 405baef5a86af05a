# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Four particles in the plane, whose density is fitted by its energy.

DW4 is the double-well system of Köhler, Klein and Noé (2020),

    :math:`E(x) = \sum_{i < j} b (r_{ij} - r_0)^2 + c (r_{ij} - r_0)^4`

with distances :math:`r_{ij}`, :math:`b = -4`, :math:`c = 0.9` and :math:`r_0 = 4`, at temperature 1: each pair counts
once, as in the authors' library bgflow. Translations do not change it. So :math:`2 \|\bar{x}\|^2` is added, which gives
the mean of the particles the density of a mean of four standard normal ones: all 8 coordinates have a proper density,
and that of the other 6 stays as it is.

The field acts on blocks of two coordinates, the particles:

    :math:`f_k = \sum_j (x_k - x_j) \, \phi_{kj}, \qquad \phi_{kj} = \sum_l \phi(t, r_{kj}, r_{kl} + r_{jl}, |r_{kl} -
    r_{jl}|)`

where l are the other two particles. It has the symmetries of the energy, rotations, reflections and permutations, and
leaves the mean alone. In terms of a hollow network, the conditioner passes the positions of the others on. The program
also fits closed-form transformers, of blocks and of coordinates, which have no symmetries.

    python -m pyro_hollow.experiments.dw4

References:

[1] Jonas Köhler, Leon Klein, Frank Noé.
Equivariant Flows: Exact Likelihood Generative Learning for Symmetric Densities. [arXiv:2006.02425]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hollow.experiments.harness import Parser, minimise, positive
from pyro_hollow.nn import BoundTransformer, Conditioner, HollowNN, Transformer
from pyro_hollow.ode import Solver
from pyro_hollow.ops import dimwise_derivatives
from pyro_hollow.train import Training
from pyro_hollow.transforms import HollowCNF, hollow_cnf

PARTICLES, BLOCK_DIM = 4, 2
DIM = PARTICLES * BLOCK_DIM
#: The spread of the particles around their mean, before the flow.
SPREAD = 2.0
SOLVER = Solver("rk4", options={"step_size": 0.25})
LR = 1.5e-2
KINDS = ("pairs", "blocks", "coordinates")
EXACT = Solver("dopri5", rtol=1e-6, atol=1e-6)


def energy(x: Tensor) -> Tensor:
    """
    The energy of DW4, which does not depend on the mean of the particles.

    :param Tensor x: positions with shape ``(*, 8)``, particle after particle.
    :returns: the energy in units of the temperature, with shape ``(*,)``.
    """
    particles = x.unflatten(-1, (PARTICLES, BLOCK_DIM))
    i, j = torch.triu_indices(PARTICLES, PARTICLES, 1, device=x.device)
    offset = (particles[..., i, :] - particles[..., j, :]).norm(dim=-1) - 4.0
    return (-4.0 * offset**2 + 0.9 * offset**4).sum(-1)


def log_density(x: Tensor) -> Tensor:
    """The logarithm of the density, not normalised, with the mean of the particles held; see :func:`energy`."""
    mean = x.unflatten(-1, (PARTICLES, BLOCK_DIM)).mean(-2)
    return -energy(x) - 0.5 * PARTICLES * mean.square().sum(-1)


def base(n: int) -> tuple[Tensor, Tensor]:
    """Samples with a wide spread around a mean that is distributed as that of the target, and their log-density."""
    z = torch.randn(n, PARTICLES, BLOCK_DIM)
    mean = z.mean(-2, keepdim=True)
    volume = (PARTICLES - 1) * BLOCK_DIM * math.log(SPREAD)
    log_prob = -0.5 * z.square().sum((-1, -2)) - 0.5 * DIM * math.log(2 * math.pi) - volume
    return (SPREAD * (z - mean) + mean).flatten(-2), log_prob


class _Others(Conditioner):
    """The positions of the other particles."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__(DIM, DIM - BLOCK_DIM, block_dim=BLOCK_DIM)
        index = [[j for j in range(PARTICLES) if j != k] for k in range(PARTICLES)]
        self.register_buffer("index", torch.tensor(index))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See :meth:`Conditioner.forward`."""
        return x.unflatten(-1, (PARTICLES, BLOCK_DIM))[..., self.index, :].flatten(-2)


class _Pairs(Transformer):
    r"""
    Forces between pairs, :math:`f_k = \sum_j (x_k - x_j) \, \phi_{kj}`, with two layers for :math:`\phi`.

    :param int width: the width of the layers.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__(DIM, DIM - BLOCK_DIM, block_dim=BLOCK_DIM)
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.last.weight)

    def bind(self, context: Tensor | None = None) -> _BoundPairs:
        """See :meth:`Transformer.bind`."""
        return _BoundPairs(self)


class _BoundPairs(BoundTransformer):
    block_dim = BLOCK_DIM

    def __init__(self, net: _Pairs) -> None:
        self.net = net
        self.tensors = tuple(net.parameters())
        #: For each of the three others the two others.
        self.rest = torch.tensor([[1, 2], [2, 0], [0, 1]], device=net.last.weight.device)

    def _features(self, t: Tensor, apart: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """``(*, k, j, l, 4)`` for each triangle, and the derivatives in the position of k, ``(*, k, j, l, 2, 3)``."""
        side = _norm(apart)
        direction = (apart / side.unsqueeze(-1)).unsqueeze(-2)  # (*, k, j, 1, 2)
        third, own = _norm(others.unsqueeze(-2) - others[..., self.rest, :]), side[..., self.rest]
        toward = direction.squeeze(-2)[..., self.rest, :]
        skew = (own - third).square().add(0.1).sqrt()
        first = side.unsqueeze(-1).expand_as(own)
        time = t.view(*t.shape, 1, 1, 1).to(own).expand_as(own)
        tilt = 0.5 * toward, ((own - third) / skew).unsqueeze(-1) * toward
        slopes = torch.stack([direction.expand_as(toward), *tilt], -1)
        return torch.stack([first - 4.0, 0.5 * (own + third) - 4.0, skew, time], -1), slopes

    def _forces(self, t: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """f and the diagonal of its Jacobian."""
        others = h.unflatten(-1, (PARTICLES - 1, BLOCK_DIM))
        apart = x.unflatten(-1, (PARTICLES, 1, BLOCK_DIM)) - others  # (*, k, j, 2)
        features, slopes = self._features(t, apart, others)
        first = torch.sigmoid(self.net.first(features))
        slopes = (first - first**2).unsqueeze(-2) * (slopes @ self.net.first.weight[:, :3].mT)
        second = torch.sigmoid(self.net.second(first))
        slopes = (second - second**2).unsqueeze(-2) * (slopes @ self.net.second.weight.mT)
        phi = self.net.last(second.sum(-2))  # (*, k, j, 1)
        slope = self.net.last(slopes.sum(-3)).squeeze(-1)  # (*, k, j, 2)
        return (apart * phi).sum(-2).flatten(-2), (phi + apart * slope).sum(-2).flatten(-2)

    def derivatives(self, t: Tensor, x: Tensor, h: Tensor, order: int) -> tuple[Tensor, ...]:
        """See :meth:`BoundTransformer.derivatives`."""
        if order > 1:
            return dimwise_derivatives(lambda x, h: self._forces(t, x, h)[0], x, h, order, BLOCK_DIM)
        return self._forces(t, x, h)[: order + 1]


def _norm(x: Tensor) -> Tensor:
    return (x.square().sum(-1) + 1e-6).sqrt()


def make_flow(kind: str) -> HollowCNF:
    """
    A fresh flow.

    :param str kind: "pairs" for forces between pairs; "blocks" and "coordinates" for a closed-form transformer, of
        blocks or single coordinates, and the conditioner "grouped".
    """
    if kind == "pairs":
        return HollowCNF(HollowNN(DIM, conditioner=_Others(), transformer=_Pairs(), block_dim=BLOCK_DIM), solver=SOLVER)
    block_dim = BLOCK_DIM if kind == "blocks" else 1
    return hollow_cnf(DIM, transformer_dim=32, activation=("silu", "tanh"), block_dim=block_dim, solver=SOLVER)


def log_weights(flow: HollowCNF, n: int) -> Tensor:
    """The logarithms of the importance weights of n samples of a flow, which is solved at tight tolerances."""
    solver, flow.solver = flow.solver, EXACT
    try:
        with torch.no_grad():
            x, log_prob = base(n)
            y, ladj = flow.call_and_ladj(x)
            return log_density(y) + ladj - log_prob
    finally:
        flow.solver = solver


def fit(flow: HollowCNF, steps: int, n: int = 128, lr: float = LR, **kwargs: Any) -> Training:
    """
    Fits a flow by the KL divergence from it to the density.

    :param HollowCNF flow: the flow.
    :param int steps: the number of steps of Adam.
    :param int n: the number of samples of a step.
    :param float lr: the learning rate at the first step.
    :param kwargs: for :func:`~pyro_hollow.train.train`.
    :returns: the course of the training, whose losses are up to a constant.
    """

    def loss() -> Tensor:
        x, log_prob = base(n)
        y, ladj = flow.call_and_ladj(x)
        data = y.detach().requires_grad_()
        (force,) = torch.autograd.grad(log_density(data).sum(), data)
        # Particles that meet, or are far apart at first, must not outweigh the others.
        force = force * (100.0 / force.norm(dim=-1, keepdim=True).clamp_min(100.0))
        surrogate = (force * y).sum(-1)
        return (log_prob - ladj - log_density(data.detach()) - surrogate + surrogate.detach()).mean()

    return minimise(loss, flow.parameters(), num_steps=steps, lr=lr, **kwargs)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program."""
    parser = Parser(__file__, __doc__)
    parser.add_argument("--kind", choices=KINDS, default="pairs", help="the field (default: pairs)")
    parser.add_argument("--steps", type=positive, default=4000, help="steps (default: 4000)")
    parser.add_argument("--samples", type=positive, default=10_000, help="samples of the result (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    flow = make_flow(options.kind)
    fit(flow, options.steps, progress=options.kind)
    weights = log_weights(flow, options.samples).double()
    evidence = float(weights.logsumexp(0)) - math.log(len(weights))
    ess = math.exp(2 * float(weights.logsumexp(0)) - float((2 * weights).logsumexp(0))) / len(weights)
    print(f"{options.kind}: ESS {100 * ess:.1f} %, log Z {evidence:.3f}, ELBO {float(weights.mean()):.3f}")


if __name__ == "__main__":
    main()
