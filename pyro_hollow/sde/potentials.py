# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Potentials that are linear in their coefficients, with exact gradient and Hessian."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["PotentialBasis"]

#: The total degree of the polynomials, and the dimension from which on they are sums over axes and pairs of axes.
DEGREE, ADDITIVE_DIM = 4, 5
#: Frequencies along each axis, in half waves over the range of the data, those of sums over axes, and directions of
#: random cosines.
HALF_WAVES, ADDITIVE_HALF_WAVES, RANDOM_COSINES = 14, 10, 120


class PotentialBasis:
    r"""
    Functions :math:`\psi_m` of which potentials are sums, :math:`\Psi(x) = \sum_m c_m \psi_m(u(z))`, in standardised
    coordinates z. They are

    - polynomials to total degree 4; in more than four dimensions powers of one coordinate and products of two;
    - cosines and sines along each axis, divided by their frequency;
    - in two to four dimensions, cosines in random directions, likewise.

    Each belongs to a band of degree or frequency, with one prior variance per band; polynomials of degree 1 and 2 are
    free. The map u is the identity in the box of the data. Beyond, each coordinate approaches a constant (a tanh whose
    length is half of the box's half width), so that no function grows.

    :param Tensor x: the data with shape ``(n, d)``, which set location, scale and box.
    :param generator: draws the random directions.
    :ivar Tensor band: the index of the band of each function, -1 for those that are free.
    """

    def __init__(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        self.loc, self.scale = x.mean(0), x.std(0, correction=0)
        z = (x - self.loc) / self.scale
        low, high = z.amin(0), z.amax(0)
        self.middle, self.radius = (low + high) / 2, (high - low) / 2
        exponents = _exponents(x.shape[1])
        self._monomials = _closure(exponents)
        index = {e: k for k, e in enumerate(self._monomials)}
        self._selected = torch.tensor([index[e] for e in exponents])
        self._slopes = _slope_matrices(self._monomials, index).to(x)
        self._powers = torch.tensor(self._monomials)
        self._waves, self._phases, wave_band = self._draw_waves(x.shape[1], generator)
        degree = torch.tensor([sum(e) for e in exponents])
        self.band = torch.cat([torch.where(degree <= 2, -1, 0), wave_band])
        self.num_bands = int(self.band.max()) + 1

    def _draw_waves(self, d: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Frequencies with shape ``(m, d)``, phases and bands: three along the axes, three in random directions."""
        count = HALF_WAVES if d < ADDITIVE_DIM else ADDITIVE_HALF_WAVES
        halves = torch.arange(1, count + 1).to(self.loc)
        axes = torch.einsum("k,ij->kij", halves, torch.diag(math.pi / (2 * self.radius))).flatten(0, 1)
        third = ((torch.arange(count) * 3) // count).repeat_interleave(d) + 1
        shift = (axes * self.middle).sum(-1)
        waves, phases, bands = [axes, axes], [-shift, -shift - math.pi / 2], [third, third]
        if 2 <= d < ADDITIVE_DIM:
            direction = torch.randn(RANDOM_COSINES, d, generator=generator, dtype=torch.float64).to(self.loc)
            direction = direction / direction.norm(dim=-1, keepdim=True)
            place = torch.arange(RANDOM_COSINES).to(self.loc) / RANDOM_COSINES
            length = (0.5 + place * HALF_WAVES) * math.pi / (2 * self.radius.mean())
            phase = 2 * math.pi * torch.rand(RANDOM_COSINES, generator=generator, dtype=torch.float64).to(self.loc)
            waves, phases = [*waves, direction * length.unsqueeze(-1)], [*phases, phase]
            bands.append((place * 3).long() + 4)
        return torch.cat(waves), torch.cat(phases), torch.cat(bands)

    def __len__(self) -> int:
        return len(self.band)

    def _inner(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Standardised coordinates, u, and the first two derivatives of u with respect to x."""
        z = (x - self.loc) / self.scale
        offset = z - self.middle
        beyond = (offset.abs() - self.radius).clamp_min(0)
        length = self.radius / 2
        bend = torch.tanh(beyond / length)
        sign = offset.sign()
        u = self.middle + sign * (torch.minimum(offset.abs(), self.radius) + length * bend)
        slope = 1 - bend.square()
        return z, u, slope / self.scale, -2 * sign * bend * slope / length / self.scale.square()

    def _table(self, u: Tensor) -> Tensor:
        """All monomials with shape ``(n, number)``."""
        powers = u.unsqueeze(-1) ** torch.arange(DEGREE + 1).to(u)
        table = torch.ones(len(u), len(self._monomials)).to(u)
        for i in range(u.shape[1]):
            table = table * powers[:, i, self._powers[:, i]]
        return table

    def values(self, x: Tensor) -> Tensor:
        """The functions, with shape ``(n, m)``, at x with shape ``(n, d)``."""
        u = self._inner(x)[1]
        waves = torch.cos(u @ self._waves.T + self._phases) / self._waves.norm(dim=-1)
        return torch.cat([self._table(u)[:, self._selected], waves], -1)

    def slopes(self, x: Tensor) -> Tensor:
        """The gradients of the functions, with shape ``(n, d, m)``."""
        _, u, slope, _ = self._inner(x)
        matrices = self._slopes[..., self._selected]
        table = torch.einsum("nm,imk->nik", self._table(u), matrices)
        sine = torch.sin(u @ self._waves.T + self._phases) / self._waves.norm(dim=-1)
        waves = -sine.unsqueeze(1) * self._waves.T
        return torch.cat([table, waves], -1) * slope.unsqueeze(-1)

    def derivatives(self, c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient with shape ``(n, d)`` and Hessian with shape ``(n, d, d)`` of the potential with coefficients c."""
        _, u, slope, bend = self._inner(x)
        count = len(self._selected)
        full = torch.zeros(len(self._monomials)).to(c).index_add(0, self._selected, c[:count])
        table, first = self._table(u), self._slopes @ full  # (d, monomials)
        second = torch.einsum("imk,jk->mij", self._slopes, first)
        phase, a = u @ self._waves.T + self._phases, c[count:] / self._waves.norm(dim=-1)
        gradient = table @ first.T - torch.sin(phase) @ (a.unsqueeze(-1) * self._waves)
        products = (self._waves.unsqueeze(-1) * self._waves.unsqueeze(-2)).flatten(1) * a.unsqueeze(-1)
        hessian = (table @ second.flatten(1) - torch.cos(phase) @ products).view(*x.shape, x.shape[-1])
        hessian = hessian * slope.unsqueeze(-1) * slope.unsqueeze(-2) + torch.diag_embed(gradient * bend)
        return gradient * slope, hessian

    def beyond(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""
        A confinement that is zero in the box of the data, :math:`\frac{1}{2} \sum_i (x_i - u_i)^2`, with its gradient:
        shapes ``(n,)`` and ``(n, d)``.
        """
        z, u, slope, _ = self._inner(x)
        excess = (z - u) * self.scale
        return 0.5 * excess.square().sum(-1), excess * (1 - slope * self.scale)


def _exponents(d: int) -> list[tuple[int, ...]]:
    """Exponents of the monomials of a potential, without the constant."""
    if d < ADDITIVE_DIM:
        found: Iterator[tuple[int, ...]] = itertools.product(range(DEGREE + 1), repeat=d)
        return sorted((e for e in found if 1 <= sum(e) <= DEGREE), key=lambda e: (sum(e), e))
    axes = [tuple(k if j == i else 0 for j in range(d)) for k in range(1, DEGREE + 1) for i in range(d)]
    pairs = [tuple(int(k in pair) for k in range(d)) for pair in itertools.combinations(range(d), 2)]
    return axes + pairs


def _closure(exponents: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The monomials together with those that their first and second derivatives are made of."""
    found = set(exponents)
    for _ in range(2):
        lower = (tuple(n - (j == i) for j, n in enumerate(e)) for e in found for i in range(len(e)) if e[i])
        found = found | set(lower)
    return sorted(found)


def _slope_matrices(monomials: list[tuple[int, ...]], index: dict[tuple[int, ...], int]) -> Tensor:
    """Matrices D_i with shape ``(d, number, number)`` for which the monomials times D_i are their slopes along i."""
    d, count = len(monomials[0]), len(monomials)
    matrices = torch.zeros(d, count, count)
    for k, e in enumerate(monomials):
        for i in range(d):
            lower = tuple(n - (j == i) for j, n in enumerate(e))
            if e[i] and lower in index:
                matrices[i, index[lower], k] = e[i]
    return matrices
