# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Four tasks of the benchmark of simulation-based inference [1] as Pyro programs, with its observations and references.

References:

[1] Jan-Matthis Lueckmann, Jan Boelts, David S. Greenberg, Pedro J. Gonçalves, Jakob H. Macke. Benchmarking
Simulation-Based Inference. [arXiv:2101.04653]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hollow.experiments.data import Source

SOURCE = Source("sbibm", "sbi-benchmark/sbibm (MIT licence)")
_BINS = 100  # of the spike train


@dataclass(frozen=True)
class Task:
    """A task."""

    model: Callable[[], object]  #: with the latent site "theta" and the data "x".
    dim: int  #: the size of theta.
    published: dict[str, tuple[float, float]]  #: mean C2ST at 1,000 and 10,000 simulations, by algorithm.
    aim: float  #: the mean C2ST aimed at with 10,000 simulations.


def uniform(size: int, bound: float) -> Tensor:
    """Samples theta uniformly between -bound and bound."""
    low = torch.full((size,), -bound)
    return pyro.sample("theta", dist.Uniform(low, -low).to_event(1))


def two_moons() -> None:
    """A crescent, of which the data tell the place up to a reflection."""
    theta = uniform(2, 1.0)
    angle = pyro.sample("angle", dist.Uniform(-math.pi / 2, math.pi / 2))
    radius = pyro.sample("radius", dist.Normal(0.1, 0.01))
    first, second = theta.unbind(-1)
    x = radius * angle.cos() + 0.25 - (first + second).abs() / math.sqrt(2)
    y = radius * angle.sin() + (second - first) / math.sqrt(2)
    pyro.deterministic("x", torch.stack([x, y], -1), event_dim=1)


def slcp() -> None:
    """Four points of a Gaussian, whose scales are known up to their signs."""
    theta = uniform(5, 3.0)
    first, second = theta[..., 2].square(), theta[..., 3].square()
    # The benchmark adds 1e-6 to both variances.
    a = (first.square() + 1e-6).sqrt()
    b = theta[..., 4].tanh() * first * second / a
    c = (second.square() + 1e-6 - b.square()).sqrt()
    scale_tril = torch.stack([torch.stack([a, torch.zeros_like(a)], -1), torch.stack([b, c], -1)], -2)
    with pyro.plate("points", 4):
        pyro.sample("x", dist.MultivariateNormal(theta[..., :2], scale_tril=scale_tril))


def gaussian_mixture() -> None:
    """A point from one of two Gaussians with the same mean."""
    theta = uniform(2, 10.0)
    narrow = pyro.sample("narrow", dist.Bernoulli(0.5))
    scale = torch.where(narrow > 0, 0.1, 1.0).unsqueeze(-1)
    pyro.sample("x", dist.Normal(theta, scale).to_event(1))


def _stimulus() -> tuple[Tensor, Tensor]:
    """White noise, the same as the benchmark's, and the design matrix of a filter of nine steps with an offset."""
    noise = torch.from_numpy(np.random.RandomState(42).randn(_BINS)).to(torch.get_default_dtype())
    columns = [torch.cat([torch.zeros(lag), noise[: _BINS - lag]]) for lag in range(9)]
    return noise, torch.stack([torch.ones(_BINS), *columns], -1)


def bernoulli_glm() -> None:
    """Spikes of a neuron whose filter is smooth; the data are their number and their correlation with the stimulus."""
    noise, design = _stimulus()
    size = 9
    difference = torch.eye(size) - torch.diag(torch.ones(size - 1), -1)
    factor = difference @ difference + torch.diag((torch.arange(size) / size).sqrt())
    precision = torch.block_diag(torch.tensor([[0.5]]), factor.mT @ factor)
    theta = pyro.sample("theta", dist.MultivariateNormal(torch.zeros(size + 1), precision_matrix=precision))
    spikes = pyro.sample("spikes", dist.Bernoulli(logits=theta @ design.mT).to_event(1))
    lagged = [(spikes[..., lag:] * noise[: _BINS - lag]).sum(-1) for lag in range(9)]
    pyro.deterministic("x", torch.stack([spikes.sum(-1), *lagged], -1), event_dim=1)


TASKS = {
    "two_moons": Task(
        two_moons, 2, {"NPE": (0.725, 0.606), "SNPE": (0.643, 0.554), "best other": (0.657, 0.571)}, 0.56
    ),
    "slcp": Task(slcp, 5, {"NPE": (0.975, 0.901), "SNPE": (0.965, 0.845), "best other": (0.921, 0.713)}, 0.80),
    "gaussian_mixture": Task(
        gaussian_mixture, 2, {"NPE": (0.716, 0.615), "SNPE": (0.669, 0.551), "best other": (0.673, 0.578)}, 0.56
    ),
    "bernoulli_glm": Task(
        bernoulli_glm, 10, {"NPE": (0.863, 0.678), "SNPE": (0.855, 0.614), "best other": (0.634, 0.553)}, 0.60
    ),
}


def load(name: str, data_dir: Path | None) -> list[tuple[Tensor, Tensor]]:
    """
    Reads the observations of a task and the draws from their reference posteriors.

    :param str name: a name in :data:`TASKS`.
    :param data_dir: the folder with a folder "sbibm".
    :raises DataError: for a file that is missing or cannot be read.
    """
    arrays = SOURCE.read_arrays(data_dir, f"{name}.npz")
    numbers = sorted(int(key.rpartition("_")[2]) for key in arrays if key.startswith("observation_"))
    shape = (4, 2) if name == "slcp" else (-1,)
    return [(arrays[f"observation_{i}"].reshape(shape), arrays[f"reference_{i}"]) for i in numbers]
