# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
The picture of the README: how the Jacobian of a hollow network splits, and a Hollow-CNF on its way to a density.

    python -m pyro_hollow.experiments.overview --output tutorials/overview.png
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hollow.experiments.defaults import bent, ring
from pyro_hollow.experiments.harness import Parser, minimise, positive, pyplot
from pyro_hollow.nn import HollowNN
from pyro_hollow.ops import jacobian
from pyro_hollow.transforms import HollowCNF

#: The standard deviation of what the flows start from.
WIDTH = 1.5
#: How far the flow has come in each picture of the strip.
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


def train(log_density: Callable[[Tensor], Tensor], dim: int, steps: int) -> HollowNN:
    """Fits a Hollow-CNF to a log density of ``(*, dim)`` by the KL divergence from the flow; its base is WIDTH wide."""
    net = HollowNN(dim)
    flow = HollowCNF(net)

    def loss() -> Tensor:
        y, ladj = flow.call_and_ladj(WIDTH * torch.randn(256, dim))
        return -(log_density(y) + ladj).mean()

    minimise(loss, flow.parameters(), num_steps=steps, clip_norm=None, progress=log_density.__name__)
    return net


def split(net: HollowNN, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """
    The Jacobian of a network at t = 0.5 and a point with shape ``(d,)``, by automatic differentiation of the whole; its
    diagonal, in closed form; and the difference of the two.
    """
    t = torch.tensor(0.5)
    whole = jacobian(lambda x: net(t, x), x).detach()
    diagonal = net.bind().dimwise_derivatives(t, x, 1)[1].detach().diag()
    return whole, diagonal, whole - diagonal


@torch.no_grad()
def densities(net: HollowNN, size: int) -> list[Tensor]:
    """The density of a flow at the times of TIMES, on a grid from -4 to 4 with ``size`` points along an axis."""
    axis = torch.linspace(-4, 4, size)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 2)
    base = dist.Normal(torch.zeros(2), WIDTH).to_event(1)
    ways = [[HollowCNF(net, time=time)] if time else [] for time in TIMES]
    return [dist.TransformedDistribution(base, way).log_prob(grid).exp().view(size, size) for way in ways]


def draw(parts: Sequence[Tensor], strip: Sequence[Tensor], path: Path) -> None:
    """Draws the Jacobian, its diagonal and its hollow part, and below densities on a grid from -4 to 4: PNG."""
    plt = pyplot()
    fig = plt.figure(figsize=(10, 4.4), layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=[1, 1.05])
    axes = above.subplots(1, 5, width_ratios=[1, 0.25, 1, 0.25, 1])
    limit = max(float(part.abs().max()) for part in parts)
    titles = (
        "Jacobian of f",
        "diagonal: through $x_i$ alone,\nexact in an elementwise pass",
        "hollow: through the others",
    )
    for ax, part, title in zip(axes[::2], parts, titles, strict=True):
        ax.matshow(part.numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
        ax.set_title(title, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    for ax, sign in zip(axes[1::2], "=+", strict=True):
        ax.text(0.5, 0.5, sign, ha="center", va="center", fontsize=22)
        ax.set_axis_off()
    _draw_strip(below.subplots(1, len(strip)), strip)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _draw_strip(axes: Any, strip: Sequence[Tensor]) -> None:
    for ax, density, time in zip(axes, strip, TIMES, strict=True):
        ax.imshow(density.numpy(), origin="lower", extent=(-4, 4, -4, 4), cmap="viridis", vmin=0)
        ax.set_title(f"p(x), t = {time:g}", fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment; see ``--help``."""
    parser = Parser(__file__, __doc__, needs=("matplotlib",))
    path = Path("results/overview.png")
    parser.add_argument("--steps", type=positive, default=1500, help="of training (default: 1500)")
    parser.add_argument("--output", type=Path, default=path, help=f"default: {path}")
    args = parser.begin(argv)
    torch.manual_seed(0)
    parts = split(train(bent, 8, args.steps), torch.randn(8))
    draw(parts, densities(train(ring, 2, args.steps), 120), args.output)


if __name__ == "__main__":
    main()
