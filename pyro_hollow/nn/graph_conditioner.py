# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A conditioner whose hidden units see the neighbours of their coordinate on a graph, at the price of its edges."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hollow.ops.arguments import closest_keywords

from .activations import get_activation
from .arguments import check_integer, check_widths
from .conditioner import BoundConditioner, Conditioner, Saved, _from_columns, _Layers, _Offset, _uniform
from .layout import add_offset, columns, flatten_offset, flatten_time, offset_at

__all__ = ["GraphConditioner"]

# By default. On a bent chain of 50 latents 2 to 6 were as good as each other, and better than 16; on a stochastic
# volatility model 6 was better than 2.
_MAX_RADIUS = 6
_MAX_SEEN = 32


class GraphConditioner(Conditioner):
    r"""
    Networks :math:`c_i(t, x_{N(i)}, \text{context})` as those of :class:`GroupedConditioner`, of which each sees the
    neighbours :math:`N(i)` of its coordinate on a graph alone. Along the time of the differential equation, information
    travels on to their neighbours. A sample costs :math:`O(d k)` operations, and :math:`O(d)` for each hub, with the
    largest number k of neighbours of a coordinate that is no hub.

    Coordinate j is in :math:`N(i)` if a path of at most ``radius`` edges leads from i to j. A coordinate with more than
    ``max_degree`` edges, such as a parameter that all data depend on, is a hub: it is seen by those that have an edge
    to it, but no path leads through it, or everything would be everything's neighbour.

    :class:`~pyro_hollow.infer.AutoHollowCNF` finds the graph of a model by itself, for ``conditioner="graph"``; see
    :func:`~pyro_hollow.infer.latent_adjacency`.

    Example usage:

    >>> chain = torch.ones(50, 50).triu(-1).tril(1) > 0
    >>> net = HollowNN(50, conditioner=GraphConditioner(50, [32, 32], adjacency=chain))
    >>> net.conditioner.weight.shape
    torch.Size([50, 32, 12])

    :param int input_dim: the number d of coordinates.
    :param hidden_dims: widths of each coordinate's layers; the last one is d_h.
    :param int context_dim: the size of the context; 0 for none.
    :param adjacency: a boolean matrix with shape ``(d, d)``, a dense or sparse tensor or nested sequences, whose row i
        is True for the coordinates that i has an edge to. Its diagonal does not matter; it need not be symmetric.
    :param int radius: the largest number of edges between a coordinate and those that it sees. Defaults to the largest
        one up to 6 with which no coordinate but hubs sees more than 32 others.
    :param int max_degree: the largest number of edges, be it from or to it, of a coordinate that is no hub. Defaults to
        the square root of d, and to no less than 8.
    :param str activation: "tanh", "softplus" or "silu".
    :raises TypeError: for an adjacency that is not boolean, and a radius and a max_degree that are not integers.
    :raises ValueError: for an adjacency of another shape, a radius below 1 and a negative max_degree.
    """

    edges: Tensor
    limits: Tensor
    index: Tensor
    mask: Tensor
    hubs: Tensor
    hub_mask: Tensor

    @closest_keywords()
    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        context_dim: int = 0,
        *,
        adjacency: Tensor | Sequence[Sequence[bool]],
        radius: int | None = None,
        max_degree: int | None = None,
        activation: str = "tanh",
    ) -> None:
        widths = check_widths(hidden_dims, of="a graph conditioner")
        super().__init__(input_dim, widths[-1], context_dim)
        self._activation = get_activation(activation)
        edges = _edges(adjacency, input_dim)
        adjacent: list[list[int]] = [[] for _ in range(input_dim)]
        for i, j in edges.T.tolist():
            adjacent[i].append(j)
        max_degree = max(8, math.isqrt(input_dim)) if max_degree is None else _integer("max_degree", max_degree, 0)
        degrees = torch.stack([side.bincount(minlength=input_dim) for side in edges]).amax(0)
        hubs = (degrees > max_degree).nonzero().flatten()
        passed = set(range(input_dim)).difference(hubs.tolist())
        radius = _default_radius(adjacent, passed) if radius is None else _integer("radius", radius, 1)
        # Saved, as parameters mean nothing without their graph.
        self.register_buffer("edges", edges)
        self.register_buffer("limits", torch.tensor([radius, max_degree]))
        self._register_neighbours([_seen(i, adjacent, passed, radius) for i in range(input_dim)], hubs)
        # As small as the weights of a grouped conditioner: larger ones were worse.
        self.weight = nn.Parameter(_uniform((input_dim, widths[0], self.index.shape[1]), input_dim))
        self.hub_weight: nn.Parameter | None = None
        if len(hubs):
            self.hub_weight = nn.Parameter(_uniform((len(hubs), widths[0], input_dim), input_dim))
        self.offset = _Offset(input_dim * widths[0], context_dim)
        self.layers = _Layers(input_dim, widths)

    def _register_neighbours(self, neighbours: list[list[int]], hubs: Tensor) -> None:
        """
        Makes the buffers of the first layer: ``index`` and ``mask``, with shapes ``(d, k)`` and ``(d, 1, k)``, list up
        to k neighbours of each coordinate that is no hub. The rows of ``hub_mask``, with shape ``(hubs, 1, d)``, show
        those of hubs.
        """
        d, rows = len(neighbours), hubs.tolist()
        hub_mask = torch.zeros(len(rows), 1, d)
        for row, i in zip(hub_mask, rows, strict=True):
            row[0, neighbours[i]] = 1
        others = [[] if i in rows else own for i, own in enumerate(neighbours)]
        k = max(1, *map(len, others))
        # In the place of a missing neighbour another one, or the next coordinate where there is none.
        index = [(own + (own[:1] or [(i + 1) % d]) * k)[:k] for i, own in enumerate(others)]
        counts = torch.tensor([[len(own)] for own in others])
        mask = (torch.arange(k) < counts).unsqueeze(1).to(hub_mask.dtype)
        for name, value in {"index": torch.tensor(index), "mask": mask, "hubs": hubs, "hub_mask": hub_mask}.items():
            self.register_buffer(name, value, persistent=False)

    def bind(self, context: Tensor | None = None) -> BoundConditioner:
        """See :meth:`Conditioner.bind`."""
        return BoundGraph(self, context)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("edges", "limits"):
            own, saved = getattr(self, name), state_dict.get(prefix + name)
            if saved is not None and not torch.equal(saved.to(own.device), own):
                raise ValueError(
                    "the state is that of a conditioner on another graph, or with another radius or max_degree"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        radius, max_degree = self.limits.tolist()
        return f"{super().extra_repr()}, edges={self.edges.shape[1]}, radius={radius}, max_degree={max_degree}"


class BoundGraph(BoundConditioner):
    """
    A conditioner on a graph; see :class:`GraphConditioner`.

    :ivar index: the neighbours of each coordinate, with shape ``(d, k)``. Those of a hub do not count.
    :ivar weight: of the first layer, with shape ``(d, units, k)``; zero for what does not count.
    :ivar hubs: the coordinates that are hubs, in ascending order.
    :ivar hub_weight: of the first layer of hubs, with shape ``(hubs * units, d)``; None if there are none.
    :ivar offset: of the first layer at time 0, with shape ``(d * units, 1 or *context_batch)``.
    :ivar slope: of this offset in time, with shape ``(d * units, 1)``.
    :ivar layers: the later layers.
    """

    trust = 1.0
    streams = 1

    def __init__(self, net: GraphConditioner, context: Tensor | None) -> None:
        self.activation = s = net._activation
        self.groups = net.input_dim
        self.index, self.hubs = net.index, net.hubs
        self.weight = net.weight * (net.mask * s.rate)
        self.hub_weight = None
        if net.hub_weight is not None:
            self.hub_weight = (net.hub_weight * (net.hub_mask * s.rate)).flatten(0, 1)
        self.offset, self.slope = net.offset.bind(context, s.rate)
        self.layers = net.layers.bind(s)
        self.tensors = self._tensors()

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        h, _ = self.flattened(x.shape[:-1]).evaluate(flatten_time(t, x), columns(x))
        return _from_columns(h, x.shape[:-1])

    def flattened(self, batch_shape: torch.Size) -> BoundGraph:
        """See :meth:`BoundConditioner.flattened`."""
        bound = copy.copy(self)
        bound.offset = flatten_offset(self.offset, 1, batch_shape)
        bound.tensors = bound._tensors()
        return bound

    def _tensors(self) -> Saved:
        first = (self.weight,) if self.hub_weight is None else (self.weight, self.hub_weight)
        return *first, self.offset, self.slope, *self.layers.tensors

    def _neighbours(self, x: Tensor) -> Tensor:
        """``(d, batch)`` to ``(d, k, batch)``."""
        return x.index_select(0, self.index.flatten()).view(*self.index.shape, -1)

    def _of_hubs(self, z_bar: Tensor) -> Tensor:
        """``(d, units, batch)`` to ``(hubs * units, batch)``."""
        return z_bar.index_select(0, self.hubs).flatten(0, 1)

    def evaluate(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Saved]:
        """See :meth:`BoundConditioner.evaluate`."""
        d, units, _ = self.weight.shape
        offset = offset_at(self.offset, self.slope, t).view(d, units, -1)
        z = torch.baddbmm(offset, self.weight, self._neighbours(x))
        if self.hub_weight is not None:
            z.index_add_(0, self.hubs, torch.mm(self.hub_weight, x).view(-1, units, x.shape[1]))
        h, saved = self.layers.evaluate(z)
        return h, (x, *saved)

    def vjp(self, saved: Saved, h_bar: Tensor, x_bar: Tensor) -> tuple[Tensor, Saved]:
        """See :meth:`BoundConditioner.vjp`."""
        z_bar, operands = self.layers.vjp(saved[1:], h_bar)
        neighbours_bar = torch.bmm(self.weight.mT, z_bar).flatten(0, 1)
        x_bar = x_bar.index_add(0, self.index.flatten(), neighbours_bar)
        if self.hub_weight is not None:
            x_bar.addmm_(self.hub_weight.mT, self._of_hubs(z_bar))
        return x_bar, (saved[0], z_bar, *operands)

    def accumulate(self, times: Tensor, operands: Saved, sums: Sequence[Tensor]) -> None:
        """See :meth:`BoundConditioner.accumulate`."""
        (x, z_bar, *later), (weight_bar, *others) = operands, sums
        weight_bar.baddbmm_(z_bar, self._neighbours(x).mT)
        if self.hub_weight is not None:
            others.pop(0).addmm_(self._of_hubs(z_bar), x.mT)
        offset_bar, slope_bar, *others = others
        add_offset(offset_bar, slope_bar, z_bar.flatten(0, 1), times)
        self.layers.accumulate(tuple(later), others)


def _integer(name: str, value: int, least: int) -> int:
    value = check_integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but got {value}")
    return value


def _edges(adjacency: Tensor | Sequence[Sequence[bool]], d: int) -> Tensor:
    """The pairs (i, j), i != j, for which a matrix is True, in the order of i and j, with shape ``(2, edges)``."""
    try:
        matrix = torch.as_tensor(adjacency)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"adjacency must be a boolean matrix with shape ({d}, {d}), but: {error}") from error
    if matrix.shape != (d, d):
        raise ValueError(f"adjacency must have shape ({d}, {d}), but got {tuple(matrix.shape)}")
    if matrix.dtype != torch.bool:
        raise TypeError(f"adjacency must be boolean, but got {matrix.dtype}; give adjacency != 0")
    if matrix.layout != torch.strided:
        matrix = matrix.to_dense()
    edges = matrix.cpu().nonzero().T
    return edges[:, edges[0] != edges[1]].contiguous()


def _seen(i: int, adjacent: list[list[int]], passed: set[int], radius: int) -> list[int]:
    """The others to which paths of at most ``radius`` edges lead, by way of coordinates that are passed."""
    seen, ends = {i}, {i}
    for _ in range(radius):
        ends = {j for end in ends if end == i or end in passed for j in adjacent[end]} - seen
        seen |= ends
    return sorted(seen - {i})


def _default_radius(adjacent: list[list[int]], passed: set[int]) -> int:
    for radius in range(2, _MAX_RADIUS + 1):
        if any(len(_seen(i, adjacent, passed, radius)) > _MAX_SEEN for i in passed):
            return radius - 1
    return _MAX_RADIUS
