# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Stiff initial value problems, each with the exact diagonal of its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pyro_hollow.experiments.harness import minimise
from pyro_hollow.nn import ConditionalHollowNN, HollowNN

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """An initial value problem in double precision; a field for :class:`~pyro_hollow.ode.Solver`."""

    title: str  #: what it is.
    function: Function  #: maps time and a state with shape ``(*, d)`` to the derivative.
    diagonal: Function  #: maps them to the diagonal of the Jacobian.
    x: Tensor  #: the initial state at time 0, with shape ``(1, d)``.
    time: float  #: the end time.
    scale: float = 1.0  #: the size of states that matter: the absolute tolerance over the relative one.
    #: maps time and state to derivative and diagonal at once, where that is cheaper.
    both: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.function(t, x)

    def with_diagonal(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative and the diagonal of its Jacobian."""
        return (self.function(t, x), self.diagonal(t, x)) if self.both is None else self.both(t, x)


def _columns(*columns: Tensor | float) -> Tensor:
    like = next(column for column in columns if isinstance(column, Tensor))
    return torch.stack([torch.as_tensor(column).to(like).expand_as(like) for column in columns], dim=-1)


def linear(d: int, rotated: bool, stiffness: float = 1e3) -> Problem:
    """
    x' = A (x - cos t) with rates from 1 to the stiffness: with couplings of at most 0.3 times the diagonal in each row,
    or in a random orthogonal basis.

    :param int d: the dimension.
    :param bool rotated: in a random basis.
    :param float stiffness: the largest rate.
    """
    generator = torch.Generator().manual_seed(d)
    noise = torch.randn(d, d, generator=generator, dtype=torch.float64)
    rates = torch.logspace(math.log10(stiffness), 0, d, dtype=torch.float64)
    if rotated:
        basis = torch.linalg.qr(noise).Q
        matrix = -(basis * rates) @ basis.T
    else:
        noise = noise.fill_diagonal_(0.0)
        coupling = noise / noise.abs().sum(-1, keepdim=True).clamp(min=1e-300)
        matrix = rates.unsqueeze(-1) * (0.3 * coupling - torch.eye(d, dtype=torch.float64))
    transposed, diagonal = matrix.T.contiguous(), matrix.diagonal().clone()
    return Problem(
        f"linear, {'rotated' if rotated else 'dominant'}, d = {d}",
        lambda t, x: (x - torch.cos(t)) @ transposed,
        lambda t, x: diagonal.expand_as(x),
        torch.zeros(1, d, dtype=torch.float64),
        1.0,
    )


def van_der_pol() -> Problem:
    """Van der Pol's oscillator with mu = 1000, over a little more than a period."""

    def function(t: Tensor, x: Tensor) -> Tensor:
        y, z = x.unbind(-1)
        return _columns(z, 1e3 * (1 - y * y) * z - y)

    return Problem(
        "Van der Pol, mu = 1000",
        function,
        lambda t, x: _columns(0.0, 1e3 * (1 - x[..., 0] ** 2)),
        torch.tensor([[2.0, 0.0]], dtype=torch.float64),
        2000.0,
    )


def robertson() -> Problem:
    """Robertson's reaction of three species."""

    def function(t: Tensor, x: Tensor) -> Tensor:
        a, b, c = x.unbind(-1)
        first, last = -0.04 * a + 1e4 * b * c, 3e7 * b * b
        return _columns(first, -first - last, last)

    return Problem(
        "Robertson",
        function,
        lambda t, x: _columns(-0.04, -1e4 * x[..., 2] - 6e7 * x[..., 1], 0.0),
        torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64),
        1e4,
        scale=1e-4,
    )


def hires() -> Problem:
    """The growth of a plant under light, of eight species (Schaefer; HIRES of the test set for IVP solvers)."""

    def function(t: Tensor, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g, h = x.unbind(-1)
        pair = 280 * f * h - 1.81 * g
        return _columns(
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            pair,
            -pair,
        )

    return Problem(
        "HIRES",
        function,
        lambda t, x: _columns(-1.71, -8.75, -10.03, -1.12, -1.745, -280 * x[..., 7] - 0.43, -1.81, -280 * x[..., 5]),
        torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0057]], dtype=torch.float64),
        321.8122,
        scale=1e-2,
    )


def reaction_diffusion(points: int = 100) -> Problem:
    """
    The Allen-Cahn equation :math:`u_t = 0.01 u_{ss} + u - u^3` on (0, 1) with u = 0 at its ends, on a grid. Of each row
    of the Jacobian the diagonal balances its neighbours: it dominates for short steps alone.

    :param int points: the number of inner grid points.
    """
    s = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1]
    rate = 0.01 * (points + 1) ** 2

    def function(t: Tensor, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (1, 1))
        return rate * (padded[..., 2:] - 2 * x + padded[..., :-2]) + x - x**3

    return Problem(
        f"reaction-diffusion, d = {points}",
        function,
        lambda t, x: 1 - 2 * rate - 3 * x**2,
        (torch.sin(3 * math.pi * s) + 0.3 * torch.sin(11 * math.pi * s)).unsqueeze(0),
        2.0,
    )


def error_of_stiff_field(net: ConditionalHollowNN) -> Callable[[], Tensor]:
    """
    The objective of a hollow network that follows :math:`x_i' = -r_i (x_i - \\sin x_{i+1})` with rates from 1 to 1000,
    where the samples of a standard normal distribution are and a little beyond: the squared relative error.

    :param net: the network, in double precision.
    """
    d = net.input_dim
    rates = torch.logspace(0, 3, d, dtype=torch.float64)

    def loss() -> Tensor:
        x, t = 1.5 * torch.randn(128, d, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        return ((net(t, x) + rates * (x - torch.sin(x.roll(-1, -1)))) / rates).square().mean()

    return loss


def hollow_network(d: int = 8, steps: int = 400) -> Problem:
    """
    A hollow network that was trained to be stiff; see :func:`error_of_stiff_field`.

    :param int d: the dimension.
    :param int steps: of training.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = HollowNN(d, [16]).double()
        minimise(error_of_stiff_field(net), net.parameters(), num_steps=steps, lr=0.1, clip_norm=None, progress=False)
    field = net.requires_grad_(False).bind()
    return Problem(
        f"hollow network, d = {d}",
        field,
        lambda t, x: field.with_diagonal(t, x)[1],
        torch.linspace(-1.5, 1.5, d, dtype=torch.float64).unsqueeze(0),
        1.0,
        both=field.with_diagonal,
    )


#: The problems by name.
PROBLEMS: dict[str, Callable[[], Problem]] = {
    **{f"dominant-{d}": partial(linear, d, False) for d in (8, 64, 512)},
    **{f"rotated-{d}": partial(linear, d, True) for d in (8, 64, 512)},
    "van-der-pol": van_der_pol,
    "robertson": robertson,
    "hires": hires,
    "reaction-diffusion": reaction_diffusion,
    "hollow": hollow_network,
}


def load(name: str) -> Problem:
    """A problem by name."""
    return PROBLEMS[name]()
