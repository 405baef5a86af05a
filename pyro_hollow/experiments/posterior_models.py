# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Posteriors on which guides are compared: Pyro models without arguments, with draws from the exact posterior.

Four are densities with normalising constant 1 and draws by ancestral sampling: Neal's funnel (Neal, 2003, "Slice
sampling", section 8), and the banana, ring and bent chain of :mod:`~pyro_hollow.experiments.defaults`. Four are
posteriors of posteriordb (https://github.com/stan-dev/posteriordb), with its data and its reference draws.

:func:`load` looks for the files of posteriordb in the folder "posteriordb" of ``data_dir``. NAME.json is a data set as
posterior_database/data/data/NAME.json.zip has it. MODEL.reference_draws.npz has the draws of
posterior_database/reference_posteriors/draws/draws/MODEL.json.zip: an array per quantity, named as in Stan
("theta[1]"), the chains one after the other::

    (data are built in)    eight_schools-eight_schools_noncentered.reference_draws.npz
    arK.json               arK-arK.reference_draws.npz
    garch.json             garch-garch11.reference_draws.npz
    kidiq.json             kidiq-kidscore_interaction.reference_draws.npz
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hollow.experiments import defaults
from pyro_hollow.experiments.data import DataError

NUM_DRAWS = 10_000


@dataclass(frozen=True)
class Posterior:
    """
    A posterior with draws to compare with.

    Quantities are the scalars that are compared, named as in Stan: "tau", "theta[1]".
    """

    name: str  #: a name in :data:`POSTERIORS`.
    title: str  #: the name in tables and figures.
    shape: str  #: "curved" or "nearly Gaussian".
    model: Callable[[], Any]  #: the Pyro model; its particles can be vectorised, and autoguides can sample from it.
    #: turns samples of the model's latent sites, with one leading sample dimension and any dimensions of size 1 that
    #: plates leave, into quantities with shape ``(n,)``.
    quantities: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    pair: tuple[str, str]  #: the two quantities that tell most in a scatter plot.
    log_scale: tuple[str, ...] = ()  #: those of the pair that are best drawn on a logarithmic axis.
    #: draws of the quantities, each with shape ``(n,)``; None where their file is missing.
    reference: dict[str, Tensor] | None = None
    log_evidence: float | None = None  #: the logarithm of the normalising constant; None if it is not known.


def load(name: str, data_dir: str | Path | None = None) -> Posterior:
    """
    Makes a posterior; its tensors are of the default dtype.

    :param str name: a name in :data:`POSTERIORS`.
    :param data_dir: the folder with a folder "posteriordb" that has the files named above. "ark", "garch" and
        "kidscore" need it; "eight_schools" has no reference draws without it.
    :raises ValueError: for an unknown name.
    :raises DataError: for files that are missing or cannot be read.
    """
    if name not in _LOADERS:
        raise ValueError(f"name must be one of {POSTERIORS}, but got {name!r}")
    return _LOADERS[name](None if data_dir is None else Path(data_dir))


def _names(name: str, size: int) -> tuple[str, ...]:
    return tuple(f"{name}[{i}]" for i in range(1, size + 1))


def _rename(sites: dict[str, tuple[str, ...]], samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantities that are the coordinates of sites, given the names of the coordinates of each site."""
    columns = {site: samples[site].reshape(len(samples[site]), -1).unbind(-1) for site in sites}
    return {name: column for site in sites for name, column in zip(sites[site], columns[site], strict=True)}


def _flat(size: int) -> dist.TorchDistribution:
    """The constant density on real vectors; unlike ImproperUniform it has samples, from which autoguides start."""
    return dist.Normal(0.0, 1.0).expand([size]).to_event(1).mask(False)


def _funnel_model() -> None:
    v = pyro.sample("v", dist.Normal(0.0, 1.5))
    pyro.sample("x", dist.Normal(v.new_zeros(9), v.exp().unsqueeze(-1)).to_event(1))


def _funnel(data_dir: Path | None) -> Posterior:
    eps = torch.randn(NUM_DRAWS, 10, generator=torch.Generator().manual_seed(0))
    v = 1.5 * eps[:, 0]
    quantities = partial(_rename, {"v": ("v",), "x": _names("x", 9)})
    return Posterior(
        "funnel", "Neal's funnel (10-d)", "curved", _funnel_model, quantities, ("x[1]", "v"), log_evidence=0.0,
        reference=quantities({"v": v, "x": v.exp().unsqueeze(-1) * eps[:, 1:]}),
    )  # fmt: skip


def _banana_model() -> None:
    x1 = pyro.sample("x1", dist.Normal(0.0, 1.0))
    pyro.sample("x2", dist.Normal(x1**2, 0.3))


def _banana(data_dir: Path | None) -> Posterior:
    eps = torch.randn(NUM_DRAWS, 2, generator=torch.Generator().manual_seed(0))
    quantities = partial(_rename, {"x1": ("x[1]",), "x2": ("x[2]",)})
    return Posterior(
        "banana", "banana (2-d)", "curved", _banana_model, quantities, ("x[1]", "x[2]"), log_evidence=0.0,
        reference=quantities({"x1": eps[:, 0], "x2": eps[:, 0] ** 2 + 0.3 * eps[:, 1]}),
    )  # fmt: skip


def _density_model(log_density: Callable[[Tensor], Tensor], size: int) -> None:
    x = pyro.sample("x", _flat(size))
    pyro.factor("log_density", log_density(x))


def _ring(data_dir: Path | None) -> Posterior:
    generator = torch.Generator().manual_seed(0)
    angle = torch.randint(8, (NUM_DRAWS,), generator=generator) * (math.pi / 4)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    quantities = partial(_rename, {"x": _names("x", 2)})
    return Posterior(
        "ring", "ring of eight Gaussians (2-d)", "curved", partial(_density_model, defaults.ring, 2), quantities,
        ("x[1]", "x[2]"), log_evidence=0.0,
        reference=quantities({"x": centres + 0.4 * torch.randn(NUM_DRAWS, 2, generator=generator)}),
    )  # fmt: skip


def _bent(data_dir: Path | None) -> Posterior:
    first, *others = torch.randn(50, NUM_DRAWS, generator=torch.Generator().manual_seed(0))
    x = [first]
    for eps in others:
        x.append(torch.sin(2 * x[-1]) + 0.4 * eps)
    quantities = partial(_rename, {"x": _names("x", 50)})
    return Posterior(
        "bent", "bent chain (50-d)", "curved", partial(_density_model, defaults.bent, 50), quantities,
        ("x[1]", "x[2]"), log_evidence=0.0, reference=quantities({"x": torch.stack(x, dim=-1)}),
    )  # fmt: skip


def _eight_schools_model(y: Tensor, sigma: Tensor) -> None:
    """Centered, which makes it a funnel."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _eight_schools(data_dir: Path | None) -> Posterior:
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    draws = "eight_schools-eight_schools_noncentered"
    available = data_dir is not None and (data_dir / "posteriordb" / f"{draws}.reference_draws.npz").is_file()
    return Posterior(
        "eight_schools", "eight schools, centered (10-d)", "curved", partial(_eight_schools_model, y, sigma),
        partial(_rename, {"mu": ("mu",), "tau": ("tau",), "theta": _names("theta", 8)}), ("theta[1]", "tau"),
        log_scale=("tau",), reference=_read_draws(data_dir, draws) if available else None,
    )  # fmt: skip


def _ark_model(y: Tensor, lags: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([lags.shape[-1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = alpha.unsqueeze(-1) + beta @ lags.T
    pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def _ark(data_dir: Path | None) -> Posterior:
    order, y = _read_data(data_dir, "arK", "K", "y")
    k = int(order)
    lags = y.unfold(0, k, 1)[:-1].flip(-1)  # row t: y[t - 1], ..., y[t - k]
    return Posterior(
        "ark", f"AR({k}) ({k + 2}-d)", "nearly Gaussian", partial(_ark_model, y[k:], lags),
        partial(_rename, {"alpha": ("alpha",), "beta": _names("beta", k), "sigma": ("sigma",)}), ("beta[1]", "beta[2]"),
        reference=_read_draws(data_dir, "arK-arK"),
    )  # fmt: skip


def _garch_variance(c: Tensor, beta: Tensor) -> Tensor:
    """
    Solves :math:`s_t = c_t + \\beta s_{t-1}` with :math:`s_0 = c_0` along the last dimension, by doubling.

    :param Tensor c: inputs with shape ``(*, n)``.
    :param Tensor beta: coefficients with shape ``(*, 1)``.
    """
    # Before each round s_t sums the last `shift` inputs and `beta` is raised to that power: log2(n) rounds, and nothing
    # is subtracted or divided, so that positive inputs give positive variances.
    s, shift = c, 1
    while shift < c.shape[-1]:
        s = s + beta * torch.nn.functional.pad(s[..., :-shift], (shift, 0))
        beta, shift = beta * beta, 2 * shift
    return s


def _garch_model(y: Tensor, sigma1: Tensor) -> None:
    """
    In Stan beta1 is flat on (0, 1 - alpha1). A guide's support cannot depend on another site, so the site here is the
    fraction beta1 / (1 - alpha1), whose density is that of beta1 times d beta1 / d fraction = 1 - alpha1.
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    alpha0 = pyro.sample("alpha0", dist.LogNormal(0.0, 1.0).mask(False))
    alpha1 = pyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    fraction = pyro.sample("fraction", dist.Uniform(0.0, 1.0))
    pyro.factor("jacobian", torch.log1p(-alpha1))
    mu, alpha0, alpha1, beta1 = (z.unsqueeze(-1) for z in (mu, alpha0, alpha1, fraction * (1 - alpha1)))
    later = alpha0 + alpha1 * (y[:-1] - mu) ** 2
    variance = _garch_variance(torch.cat([(sigma1**2).expand_as(later[..., :1]), later], dim=-1), beta1)
    pyro.sample("y", dist.Normal(mu, variance.sqrt()).to_event(1), obs=y)


def _garch_quantities(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("mu", "alpha0", "alpha1", "fraction")
    quantities = _rename({name: (name,) for name in names}, samples)
    fraction = quantities.pop("fraction")
    return {**quantities, "beta1": fraction * (1 - quantities["alpha1"])}


def _garch(data_dir: Path | None) -> Posterior:
    y, sigma1 = _read_data(data_dir, "garch", "y", "sigma1")
    return Posterior(
        "garch", "GARCH(1,1) (4-d)", "nearly Gaussian", partial(_garch_model, y, sigma1), _garch_quantities,
        ("alpha1", "beta1"), reference=_read_draws(data_dir, "garch-garch11"),
    )  # fmt: skip


def _kidscore_model(score: Tensor, design: Tensor) -> None:
    beta = pyro.sample("beta", _flat(4))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    pyro.sample("kid_score", dist.Normal(beta @ design.T, sigma.unsqueeze(-1)).to_event(1), obs=score)


def _kidscore(data_dir: Path | None) -> Posterior:
    score, hs, iq = _read_data(data_dir, "kidiq", "kid_score", "mom_hs", "mom_iq")
    design = torch.stack([torch.ones_like(hs), hs, iq, hs * iq], dim=-1)
    return Posterior(
        "kidscore", "kid scores with interaction (5-d)", "nearly Gaussian", partial(_kidscore_model, score, design),
        partial(_rename, {"beta": _names("beta", 4), "sigma": ("sigma",)}), ("beta[1]", "beta[3]"),
        reference=_read_draws(data_dir, "kidiq-kidscore_interaction"),
    )  # fmt: skip


def _check(data_dir: Path | None, file: str) -> Path:
    source = (
        "it comes from posteriordb (https://github.com/stan-dev/posteriordb, folder posterior_database); name the "
        f"folder that has posteriordb/{file} with --data-dir"
    )
    if data_dir is None:
        raise DataError(f"{file} is needed: {source}")
    path = data_dir / "posteriordb" / file
    if not path.is_file():
        raise DataError(f"{path} is missing: {source}")
    return path


def _read_data(data_dir: Path | None, name: str, *keys: str) -> list[Tensor]:
    path = _check(data_dir, f"{name}.json")
    try:
        content = json.loads(path.read_text())
        return [torch.tensor(content[key], dtype=torch.get_default_dtype()) for key in keys]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a data set of posteriordb with {', '.join(keys)}: {error!r}") from error


def _read_draws(data_dir: Path | None, model: str) -> dict[str, Tensor]:
    path = _check(data_dir, f"{model}.reference_draws.npz")
    try:
        with open(path, "rb") as file, np.load(file) as arrays:
            return {name: torch.from_numpy(arrays[name]).to(torch.get_default_dtype()) for name in arrays}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a file of draws, one array per quantity: {error!r}") from error


_LOADERS: dict[str, Callable[[Path | None], Posterior]] = {
    "funnel": _funnel,
    "banana": _banana,
    "ring": _ring,
    "bent": _bent,
    "eight_schools": _eight_schools,
    "ark": _ark,
    "garch": _garch,
    "kidscore": _kidscore,
}

#: The names that :func:`load` knows.
POSTERIORS: tuple[str, ...] = tuple(_LOADERS)
