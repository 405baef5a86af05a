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

More posteriors need::

    mesquite.json             mesquite-logmesquite.reference_draws.npz
    kilpisjarvi_mod.json      kilpisjarvi_mod-kilpisjarvi.reference_draws.npz
    earnings.json             earnings-logearn_interaction.reference_draws.npz
    nes2000.json              nes2000-nes.reference_draws.npz
    sblri.json                sblri-blr.reference_draws.npz
    gp_pois_regr.json         gp_pois_regr-gp_regr.reference_draws.npz
    bball_drive_event_0.json  bball_drive_event_0-hmm_drive_0.reference_draws.npz
    hudson_lynx_hare.json     hudson_lynx_hare-lotka_volterra.reference_draws.npz
    diamonds.json             diamonds-diamonds.reference_draws.npz
    one_comp_mm_elim_abs.json one_comp_mm_elim_abs-one_comp_mm_elim_abs.reference_draws.npz
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hollow.experiments import defaults
from pyro_hollow.experiments.data import Source

NUM_DRAWS = 10_000
SOURCE = Source("posteriordb", "posteriordb (https://github.com/stan-dev/posteriordb, folder posterior_database)")
SUBSTEPS = 2  #: Runge-Kutta steps from one observation of an ODE to the next.


@dataclass(frozen=True)
class Posterior:
    """
    A posterior with draws to compare with.

    Quantities are the scalars that are compared, named as in Stan: "tau", "theta[1]".
    """

    name: str  #: a name in :data:`POSTERIORS` or :data:`MORE_POSTERIORS`.
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

    :param str name: a name in :data:`POSTERIORS` or :data:`MORE_POSTERIORS`.
    :param data_dir: the folder with a folder "posteriordb" that has the files named above. "ark", "garch", "kidscore"
        and :data:`MORE_POSTERIORS` need it; "eight_schools" has no reference draws without it.
    :raises ValueError: for an unknown name.
    :raises DataError: for files that are missing or cannot be read.
    """
    if name not in _LOADERS:
        raise ValueError(f"name must be one of {(*POSTERIORS, *MORE_POSTERIORS)}, but got {name!r}")
    return _LOADERS[name](None if data_dir is None else Path(data_dir))


def _names(name: str, size: int) -> tuple[str, ...]:
    return tuple(f"{name}[{i}]" for i in range(1, size + 1))


def _rename(sites: dict[str, tuple[str, ...]], samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantities that are the coordinates of sites, given the names of the coordinates of each site."""
    columns = {site: samples[site].reshape(len(samples[site]), -1).unbind(-1) for site in sites}
    return {name: column for site in sites for name, column in zip(sites[site], columns[site], strict=True)}


def flat(size: int) -> dist.TorchDistribution:
    """The constant density on real vectors; unlike ImproperUniform it has samples, from which autoguides start."""
    return dist.Normal(0.0, 1.0).expand([size]).to_event(1).mask(False)


def flat_positive(*shape: int) -> dist.TorchDistribution:
    """The constant density on positive numbers, or on vectors of them."""
    return dist.LogNormal(0.0, 1.0).expand(shape).to_event(len(shape)).mask(False)


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
    x = pyro.sample("x", flat(size))
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
    order, y = _read(data_dir, "arK", "K", "y")
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
    alpha0 = pyro.sample("alpha0", flat_positive())
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
    y, sigma1 = _read(data_dir, "garch", "y", "sigma1")
    return Posterior(
        "garch", "GARCH(1,1) (4-d)", "nearly Gaussian", partial(_garch_model, y, sigma1), _garch_quantities,
        ("alpha1", "beta1"), reference=_read_draws(data_dir, "garch-garch11"),
    )  # fmt: skip


def _regression_model(y: Tensor, design: Tensor, beta: dist.TorchDistribution, sigma: dist.TorchDistribution) -> None:
    """Linear regression, given the priors of the coefficients and of the standard deviation."""
    beta = pyro.sample("beta", beta)
    sigma = pyro.sample("sigma", sigma)
    pyro.sample("y", dist.Normal(beta @ design.T, sigma.unsqueeze(-1)).to_event(1), obs=y)


def _kidscore(data_dir: Path | None) -> Posterior:
    score, hs, iq = _read(data_dir, "kidiq", "kid_score", "mom_hs", "mom_iq")
    design = torch.stack([torch.ones_like(hs), hs, iq, hs * iq], dim=-1)
    return Posterior(
        "kidscore", "kid scores with interaction (5-d)", "nearly Gaussian",
        partial(_regression_model, score, design, flat(4), dist.HalfCauchy(2.5)),
        partial(_rename, {"beta": _names("beta", 4), "sigma": ("sigma",)}), ("beta[1]", "beta[3]"),
        reference=_read_draws(data_dir, "kidiq-kidscore_interaction"),
    )  # fmt: skip


def _mesquite(data_dir: Path | None) -> Posterior:
    names = ("weight", "diam1", "diam2", "canopy_height", "total_height", "density", "group")
    weight, *sizes, group = _read(data_dir, "mesquite", *names)
    design = torch.stack([torch.ones_like(group), *(size.log() for size in sizes), group], dim=-1)
    return Posterior(
        "mesquite", "mesquite bushes (8-d)", "nearly Gaussian",
        partial(_regression_model, weight.log(), design, flat(7), flat_positive()),
        partial(_rename, {"beta": _names("beta", 7), "sigma": ("sigma",)}), ("beta[2]", "beta[4]"),
        reference=_read_draws(data_dir, "mesquite-logmesquite"),
    )  # fmt: skip


def _kilpisjarvi(data_dir: Path | None) -> Posterior:
    """The sites of Stan's alpha and beta are the two coordinates of "beta"."""
    x, y, *prior = _read(data_dir, "kilpisjarvi_mod", "x", "y", "pmualpha", "pmubeta", "psalpha", "psbeta")
    design = torch.stack([torch.ones_like(x), x], dim=-1)
    beta = dist.Normal(torch.stack(prior[:2]), torch.stack(prior[2:])).to_event(1)
    return Posterior(
        "kilpisjarvi", "summers of Kilpisjärvi (3-d)", "nearly Gaussian",
        partial(_regression_model, y, design, beta, flat_positive()),
        partial(_rename, {"beta": ("alpha", "beta"), "sigma": ("sigma",)}), ("alpha", "beta"),
        reference=_read_draws(data_dir, "kilpisjarvi_mod-kilpisjarvi"),
    )  # fmt: skip


def _earnings(data_dir: Path | None) -> Posterior:
    earn, height, male = _read(data_dir, "earnings", "earn", "height", "male")
    design = torch.stack([torch.ones_like(height), height, male, height * male], dim=-1)
    return Posterior(
        "earnings", "earnings with interaction (5-d)", "nearly Gaussian",
        partial(_regression_model, earn.log(), design, flat(4), flat_positive()),
        partial(_rename, {"beta": _names("beta", 4), "sigma": ("sigma",)}), ("beta[1]", "beta[3]"),
        reference=_read_draws(data_dir, "earnings-logearn_interaction"),
    )  # fmt: skip


def _nes(data_dir: Path | None) -> Posterior:
    names = ("partyid7", "real_ideo", "race_adj", "educ1", "gender", "income", "age_discrete")
    party, ideology, race, education, gender, income, age = _read(data_dir, "nes2000", *names)
    ages = [(age == group).to(age.dtype) for group in (2, 3, 4)]
    design = torch.stack([torch.ones_like(age), ideology, race, *ages, education, gender, income], dim=-1)
    return Posterior(
        "nes", "party identification (10-d)", "nearly Gaussian",
        partial(_regression_model, party, design, flat(9), flat_positive()),
        partial(_rename, {"beta": _names("beta", 9), "sigma": ("sigma",)}), ("beta[1]", "beta[3]"),
        reference=_read_draws(data_dir, "nes2000-nes"),
    )  # fmt: skip


def _sblri(data_dir: Path | None) -> Posterior:
    y, design = _read(data_dir, "sblri", "y", "X")
    size = design.shape[-1]
    beta = dist.Normal(0.0, 10.0).expand([size]).to_event(1)
    return Posterior(
        "sblri", f"linear regression ({size + 1}-d)", "nearly Gaussian",
        partial(_regression_model, y, design, beta, dist.HalfNormal(10.0)),
        partial(_rename, {"beta": _names("beta", size), "sigma": ("sigma",)}), ("beta[1]", "beta[2]"),
        reference=_read_draws(data_dir, "sblri-blr"),
    )  # fmt: skip


def _gp_model(x: Tensor, y: Tensor) -> None:
    """Gaussian process with the squared exponential kernel; sigma is the variance of the noise, as in Stan."""
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    # In float32 the factorization fails where sigma is below 1e-6 alpha^2, as it may be in a guide's early samples.
    rho, alpha, sigma, times = (z.double().unsqueeze(-1) for z in (rho, alpha, sigma, x))
    kernel = alpha.unsqueeze(-1) ** 2 * torch.exp(-0.5 * ((times - times.mT) / rho.unsqueeze(-1)) ** 2)
    scale_tril = torch.linalg.cholesky(kernel + torch.diag_embed(sigma.expand(*sigma.shape[:-1], len(x)))).to(x.dtype)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), scale_tril=scale_tril), obs=y)


def _gp(data_dir: Path | None) -> Posterior:
    x, y = _read(data_dir, "gp_pois_regr", "x", "y")
    names = ("rho", "alpha", "sigma")
    return Posterior(
        "gp", "Gaussian process (3-d)", "nearly Gaussian", partial(_gp_model, x, y),
        partial(_rename, {name: (name,) for name in names}), ("rho", "alpha"),
        reference=_read_draws(data_dir, "gp_pois_regr-gp_regr"),
    )  # fmt: skip


def _hmm_model(observed: Tensor, prior: Tensor) -> None:
    """
    Hidden Markov model with two states and two exponential observations, whose rates increase with the state.

    The sites "phi_steps" and "lambda_steps" are the first rate and the increase to the second, which has Jacobian
    determinant 1: the logarithms of both are Stan's unconstrained coordinates of positive ordered vectors.
    """
    theta1 = pyro.sample("theta1", dist.Dirichlet(prior[0]))
    theta2 = pyro.sample("theta2", dist.Dirichlet(prior[1]))
    phi = pyro.sample("phi_steps", flat_positive(2)).cumsum(-1)
    lambda_ = pyro.sample("lambda_steps", flat_positive(2)).cumsum(-1)
    rates = torch.stack([phi, lambda_], dim=-1)  # (*, state, observation)
    pyro.factor("prior", dist.Normal(rates.new_tensor([[0.0], [3.0]]), 1.0).log_prob(rates).sum((-2, -1)))
    later = torch.stack([theta1, theta2], dim=-2).log().unsqueeze(-3)  # (*, 1, old, new)
    later = later.expand(*later.shape[:-3], len(observed) - 1, 2, 2)
    # DiscreteHMM makes a transition before the first observation: a uniform one, as Stan's model has none.
    transitions = torch.cat([torch.zeros_like(later[..., :1, :, :]), later], dim=-3)
    emissions = dist.Exponential(rates.unsqueeze(-3)).to_event(1)
    pyro.sample("y", dist.DiscreteHMM(observed.new_zeros(2), transitions, emissions), obs=observed)


def _hmm_quantities(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    rates = {name: samples[f"{name}_steps"].cumsum(-1) for name in ("phi", "lambda")}
    return _rename({name: _names(name, 2) for name in ("theta1", "theta2", "phi", "lambda")}, {**samples, **rates})


def _hmm(data_dir: Path | None) -> Posterior:
    u, v, prior = _read(data_dir, "bball_drive_event_0", "u", "v", "alpha")
    return Posterior(
        "hmm", "hidden Markov model (6-d)", "nearly Gaussian",
        partial(_hmm_model, torch.stack([u, v], dim=-1), prior), _hmm_quantities, ("theta1[1]", "theta2[2]"),
        reference=_read_draws(data_dir, "bball_drive_event_0-hmm_drive_0"),
    )  # fmt: skip


def _lotka_volterra(growth: Tensor, interaction: Tensor, log_init: Tensor, years: int, substeps: int) -> Tensor:
    """
    Solves :math:`d\\log z / dt = growth + interaction \\cdot (z_2, z_1)` by the classical Runge-Kutta method.

    In logarithms populations stay positive. In the slope they are at most :math:`e^{10}`, which keeps the solution
    finite in float32 at the first samples of a guide, far from the posterior.

    :param Tensor growth: with shape ``(*, 2)``, as are ``interaction`` and ``log_init``.
    :returns: :math:`\\log z` at 0, 1, ..., ``years``, with shape ``(*, years + 1, 2)``.
    """

    def slope(log_z: Tensor) -> Tensor:
        return torch.addcmul(growth, interaction, log_z.flip(-1).clamp(max=10).exp())

    log_z, step = log_init, 1 / substeps
    found = [log_z]
    for _ in range(years):
        for _ in range(substeps):
            k1 = slope(log_z)
            k2 = slope(torch.add(log_z, k1, alpha=step / 2))
            k3 = slope(torch.add(log_z, k2, alpha=step / 2))
            k4 = slope(torch.add(log_z, k3, alpha=step))
            log_z = torch.add(log_z, torch.add(k1 + k4, k2 + k3, alpha=2), alpha=step / 6)
        found.append(log_z)
    return torch.stack(found, dim=-2)


def _lotka_volterra_model(y: Tensor) -> None:
    """Hares and lynxes in the years 0, 1, ... with shape ``(n, 2)``."""
    mean, deviation = y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05])
    theta = pyro.sample("theta", dist.LogNormal(mean.log(), 1.0).to_event(1).mask(False))
    pyro.factor("prior", dist.Normal(mean, deviation).log_prob(theta).sum(-1))
    z_init = pyro.sample("z_init", dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    signed = theta * y.new_tensor([1.0, -1.0, -1.0, 1.0])
    log_z = _lotka_volterra(signed[..., ::2], signed[..., 1::2], z_init.log(), len(y) - 1, SUBSTEPS)
    pyro.sample("y", dist.LogNormal(log_z, sigma.unsqueeze(-2)).to_event(2), obs=y)


def _lynx_hare(data_dir: Path | None) -> Posterior:
    y_init, y = _read(data_dir, "hudson_lynx_hare", "y_init", "y")
    names = {"theta": _names("theta", 4), "z_init": _names("z_init", 2), "sigma": _names("sigma", 2)}
    return Posterior(
        "lynx_hare", "lynxes and hares, an ODE (8-d)", "nearly Gaussian",
        partial(_lotka_volterra_model, torch.cat([y_init.unsqueeze(0), y])), partial(_rename, names),
        ("theta[1]", "theta[3]"), reference=_read_draws(data_dir, "hudson_lynx_hare-lotka_volterra"),
    )  # fmt: skip


def _diamonds_model(y: Tensor, design: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([design.shape[-1]]).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    # The density of Student's t on the positive half, twice as high.
    sigma = pyro.sample("sigma", flat_positive())
    pyro.factor("prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma) + math.log(2))
    mean = intercept.unsqueeze(-1) + b @ design.T
    pyro.sample("y", dist.Normal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def _diamonds(data_dir: Path | None) -> Posterior:
    y, design = _read(data_dir, "diamonds", "Y", "X")
    design = design[:, 1:] - design[:, 1:].mean(0)
    size = design.shape[-1]
    names = {"b": _names("b", size), "Intercept": ("Intercept",), "sigma": ("sigma",)}
    return Posterior(
        "diamonds", f"prices of diamonds ({size + 2}-d)", "nearly Gaussian", partial(_diamonds_model, y, design),
        partial(_rename, names), ("b[1]", "b[2]"), reference=_read_draws(data_dir, "diamonds-diamonds"),
    )  # fmt: skip


def _concentration(
    absorption: Tensor, michaelis: Tensor, elimination: Tensor, dose: float, times: Tensor, substeps: int
) -> Tensor:
    r"""
    Solves :math:`dC/dt = D k_a e^{-k_a t} - v_m C / (K_m + C), \; C(0) = 0` by the classical Runge-Kutta method.

    For a small :math:`K_m` the elimination sets in at once. Steps are therefore uniform in the cubic root of t.

    :param Tensor absorption: :math:`k_a` with shape ``(*)``, as are ``michaelis`` and ``elimination``, which is the
        largest rate over the volume.
    :param float dose: D, over the volume.
    :returns: C at the times with shape ``(*, len(times))``.
    """

    def slope(s: float, concentration: Tensor) -> Tensor:
        left = concentration.clamp(min=0)
        intake = dose * absorption * torch.exp(-absorption * s**3)
        return 3 * s**2 * (intake - elimination * left / (michaelis + left))

    concentration, begin = torch.zeros_like(absorption), 0.0
    found = []
    for end in times.double().pow(1 / 3).tolist():
        step = (end - begin) / substeps
        for i in range(substeps):
            s = begin + i * step
            k1 = slope(s, concentration)
            k2 = slope(s + step / 2, concentration + step / 2 * k1)
            k3 = slope(s + step / 2, concentration + step / 2 * k2)
            k4 = slope(s + step, concentration + step * k3)
            concentration = concentration + step / 6 * (k1 + 2 * (k2 + k3) + k4)
        found.append(concentration)
        begin = end
    return torch.stack(found, dim=-1)


def _one_compartment_model(y: Tensor, times: Tensor, dose: float, volume: float) -> None:
    """Oral absorption and Michaelis-Menten elimination."""
    k_a, k_m, v_m, sigma = (pyro.sample(name, dist.HalfCauchy(1.0)) for name in ("k_a", "K_m", "V_m", "sigma"))
    concentration = _concentration(k_a, k_m, v_m / volume, dose / volume, times, SUBSTEPS)
    mean = concentration.clamp(min=1e-10).log()  # far from the posterior everything is eliminated
    pyro.sample("y", dist.LogNormal(mean, sigma.unsqueeze(-1)).to_event(1), obs=y)


def _one_compartment(data_dir: Path | None) -> Posterior:
    y, times, dose, volume = _read(data_dir, "one_comp_mm_elim_abs", "C_hat", "times", "D", "V")
    names = ("k_a", "K_m", "V_m", "sigma")
    return Posterior(
        "one_comp", "pharmacokinetics, an ODE (4-d)", "curved",
        partial(_one_compartment_model, y, times, float(dose), float(volume)),
        partial(_rename, {name: (name,) for name in names}), ("K_m", "V_m"), log_scale=("K_m", "V_m"),
        reference=_read_draws(data_dir, "one_comp_mm_elim_abs-one_comp_mm_elim_abs"),
    )  # fmt: skip


def _read(data_dir: Path | None, name: str, *keys: str) -> list[Tensor]:
    return SOURCE.read(data_dir, f"{name}.json", *keys)


def _read_draws(data_dir: Path | None, model: str) -> dict[str, Tensor]:
    return SOURCE.read_arrays(data_dir, f"{model}.reference_draws.npz")


_LOADERS: dict[str, Callable[[Path | None], Posterior]] = {
    "funnel": _funnel,
    "banana": _banana,
    "ring": _ring,
    "bent": _bent,
    "eight_schools": _eight_schools,
    "ark": _ark,
    "garch": _garch,
    "kidscore": _kidscore,
    "mesquite": _mesquite,
    "kilpisjarvi": _kilpisjarvi,
    "earnings": _earnings,
    "nes": _nes,
    "sblri": _sblri,
    "gp": _gp,
    "hmm": _hmm,
    "lynx_hare": _lynx_hare,
    "diamonds": _diamonds,
    "one_comp": _one_compartment,
}

#: The names that :func:`load` knows: those of the experiment's own table, and more.
POSTERIORS: tuple[str, ...] = tuple(_LOADERS)[:8]
MORE_POSTERIORS: tuple[str, ...] = tuple(_LOADERS)[8:]
