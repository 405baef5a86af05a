# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Everyday models of Stan's users in Pyro, with 2 to 1,006 latents: those of Agrawal, Sheldon and Domke (2020).

The programs and their data are Stan's example models (https://github.com/stan-dev/example-models): ARM (Gelman and
Hill), BPA (Kéry and Schaub), the examples of BUGS, and its folder misc. :func:`load` looks for the data in the folder
"stan" of ``data_dir``, in files NAME.data.json. Latents have Stan's constraints, thus the same unconstrained
coordinates.

Stan drops the constants of "~" statements, Pyro keeps them; the difference is counted model by model, so that evidences
can be compared.

References:

[1] Abhinav Agrawal, Daniel Sheldon, Justin Domke. Advances in Black-Box VI: Normalizing Flows, Importance Weighting,
and Optimization. NeurIPS 2020
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

from pyro_hollow.experiments.data import Source
from pyro_hollow.experiments.posterior_models import flat, flat_positive

SOURCE = Source("stan", "Stan's example models (https://github.com/stan-dev/example-models)")


@dataclass(frozen=True)
class StanModel:
    """A Pyro model of a Stan program and its data."""

    model: Callable[[], Any]  #: without arguments; its particles can be vectorised.
    dropped: float  #: Stan's log density minus that of Pyro, a constant.


def load(name: str, data_dir: str | Path | None = None) -> StanModel:
    """
    Makes a model; its tensors are of the default dtype.

    :param str name: a name in :data:`MODELS`.
    :param data_dir: the folder with a folder "stan" that has the data.
    :raises ValueError: for an unknown name.
    :raises DataError: for files that are missing or cannot be read.
    """
    if name not in _LOADERS:
        raise ValueError(f"name must be one of {MODELS}, but got {name!r}")
    return _LOADERS[name](None if data_dir is None else Path(data_dir))


def _read(data_dir: Path | None, name: str, *keys: str) -> list[Tensor]:
    return SOURCE.read(data_dir, f"{name}.data.json", *keys)


def _index(column: Tensor) -> Tensor:
    """Stan's indices start at 1."""
    return column.long() - 1


def _normals(count: int, scale: float = 1.0) -> float:
    """Constants of normal densities, given how many and their standard deviation unless it is a latent."""
    return count * (0.5 * math.log(2 * math.pi) + math.log(scale))


def _uniforms(count: int, width: float) -> float:
    return count * math.log(width)


def _inverse_gammas(count: int, shape: float, scale: float) -> float:
    return count * (math.lgamma(shape) - shape * math.log(scale))


def _normal(loc: float, scale: float, size: int) -> dist.TorchDistribution:
    return dist.Normal(loc, scale).expand([size]).to_event(1)


def _uniform(high: float, size: int) -> dist.TorchDistribution:
    return dist.Uniform(torch.zeros(size), high).to_event(1)


def _scalar(name: str, prior: dist.TorchDistribution) -> Tensor:
    """Samples a latent number; the dimension of size 1 broadcasts with vectors."""
    return pyro.sample(name, prior).unsqueeze(-1)


def _observe_normal(loc: Tensor, scale: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=y)


def _observe_binary(logits: Tensor, y: Tensor) -> None:
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


# ARM: regression and multilevel models


def _wells_model(switched: Tensor, distance: Tensor) -> None:
    beta = pyro.sample("beta", flat(2))
    _observe_binary(beta[..., :1] + beta[..., 1:] * distance, switched)


def _wells(data_dir: Path | None, unit: float) -> StanModel:
    switched, distance = _read(data_dir, "wells", "switched", "dist")
    return StanModel(partial(_wells_model, switched, distance / unit), 0.0)


def _dogs_model(shocked: Tensor, avoidances: Tensor, shocks: Tensor) -> None:
    beta = pyro.sample("beta", _normal(0.0, 100.0, 3))
    _observe_binary(beta[..., :1] + beta[..., 1:2] * avoidances + beta[..., 2:] * shocks, shocked)


def _dogs(data_dir: Path | None) -> StanModel:
    (y,) = _read(data_dir, "dogs", "y")
    shocks = y.cumsum(-1) - y
    avoidances = torch.arange(y.shape[-1]) - shocks
    return StanModel(partial(_dogs_model, y.flatten(), avoidances.flatten(), shocks.flatten()), _normals(3, 100.0))


def _congress_model(now: Tensor, before: Tensor, incumbency: Tensor) -> None:
    beta = pyro.sample("beta", flat(3))
    sigma = _scalar("sigma", flat_positive())
    _observe_normal(beta[..., :1] + beta[..., 1:2] * before + beta[..., 2:] * incumbency, sigma, now)


def _congress(data_dir: Path | None) -> StanModel:
    now, before, incumbency = _read(data_dir, "congress", "vote_88", "vote_86", "incumbency_88")
    return StanModel(partial(_congress_model, now, before, incumbency), _normals(len(now)))


def _election88_model(y: Tensor, black: Tensor, female: Tensor, state: Tensor, states: int) -> None:
    mu_a = _scalar("mu_a", dist.Normal(0.0, 1.0))
    sigma_a = _scalar("sigma_a", dist.Uniform(0.0, 100.0))
    a = pyro.sample("a", dist.Normal(mu_a, sigma_a).expand([*mu_a.shape[:-1], states]).to_event(1))
    b = pyro.sample("b", _normal(0.0, 100.0, 2))
    _observe_binary(b[..., :1] * black + b[..., 1:] * female + a[..., state], y)


def _election88(data_dir: Path | None) -> StanModel:
    y, black, female, state, states = _read(data_dir, "election88", "y", "black", "female", "state", "n_state")
    size = int(states)
    dropped = _normals(1 + size) + _normals(2, 100.0) + _uniforms(1, 100.0)
    return StanModel(partial(_election88_model, y, black, female, _index(state), size), dropped)


def _electric_model(y: Tensor, treatment: Tensor, pair: Tensor, pairs: int) -> None:
    beta = _scalar("beta", dist.Normal(0.0, 1.0))
    eta = pyro.sample("eta", _normal(0.0, 1.0, pairs))
    mu_a = _scalar("mu_a", dist.Normal(0.0, 1.0))
    sigma_a = _scalar("sigma_a", dist.Uniform(0.0, 100.0))
    sigma_y = _scalar("sigma_y", dist.Uniform(0.0, 100.0))
    a = 100 * mu_a + sigma_a * eta
    _observe_normal(a[..., pair] + beta * treatment, sigma_y, y)


def _electric(data_dir: Path | None) -> StanModel:
    y, treatment, pair, pairs = _read(data_dir, "electric_chr", "y", "treatment", "pair", "n_pair")
    dropped = _normals(2 + int(pairs) + len(y)) + _uniforms(2, 100.0)
    return StanModel(partial(_electric_model, y, treatment, _index(pair), int(pairs)), dropped)


def _electric_1_model(
    y: Tensor, treatment: Tensor, pre_test: Tensor | None, pair: Tensor, grade: Tensor, grade_pair: Tensor, unit: float
) -> None:
    """Electric_1a, and electric_1c with the test before the treatment."""
    grades, grade_pairs = int(grade.max()) + 1, int(grade_pair.max()) + 1
    eta = pyro.sample("eta_a", _normal(0.0, 1.0, len(grade_pair)))
    mu = pyro.sample("mu_a", _normal(0.0, 1.0, grade_pairs))
    sigma_a = pyro.sample("sigma_a", _uniform(100.0, grade_pairs))
    sigma_y = pyro.sample("sigma_y", _uniform(100.0, grades))
    b = pyro.sample("b", _normal(0.0, 100.0, grades))
    a = unit * mu[..., grade_pair] + sigma_a[..., grade_pair] * eta
    y_hat = a[..., pair] + b[..., grade] * treatment
    if pre_test is not None:
        c = pyro.sample("c", _normal(0.0, 100.0, grades))
        y_hat = y_hat + c[..., grade] * pre_test
    _observe_normal(y_hat, sigma_y[..., grade], y)


def _electric_1(data_dir: Path | None, name: str, unit: float) -> StanModel:
    names = ("y", "treatment", "pre_test", "pair", "grade", "grade_pair")
    y, treatment, before, pair, grade, grade_pair = _read(data_dir, name, *names)
    grades, grade_pairs = int(grade.max()), int(grade_pair.max())
    pre_test, slopes = (before, 2 * grades) if name == "electric_1c_chr" else (None, grades)
    dropped = _normals(len(grade_pair) + grade_pairs + len(y)) + _normals(slopes, 100.0)
    model = partial(_electric_1_model, y, treatment, pre_test, _index(pair), _index(grade), _index(grade_pair), unit)
    return StanModel(model, dropped + _uniforms(grades + grade_pairs, 100.0))


def _radon_model(y: Tensor, county: Tensor, counties: int) -> None:
    et = pyro.sample("et", _normal(0.0, 1.0, counties))
    mu_eta = _scalar("mu_eta", dist.Normal(0.0, 1.0))
    sigma_eta = _scalar("sigma_eta", dist.Uniform(0.0, 100.0))
    sigma_y = _scalar("sigma_y", dist.Uniform(0.0, 100.0))
    _observe_normal((100 * mu_eta + sigma_eta * et)[..., county], sigma_y, y)


def _radon(data_dir: Path | None) -> StanModel:
    y, county, counties = _read(data_dir, "radon_redundant_chr", "y", "county", "J")
    dropped = _normals(1 + int(counties) + len(y)) + _uniforms(2, 100.0)
    return StanModel(partial(_radon_model, y, _index(county), int(counties)), dropped)


def _hiv_model(y: Tensor, time: Tensor, person: Tensor, persons: int) -> None:
    eta1 = pyro.sample("eta1", _normal(0.0, 1.0, persons))
    eta2 = pyro.sample("eta2", _normal(0.0, 1.0, persons))
    mu_a1 = _scalar("mu_a1", dist.Normal(0.0, 1.0))
    mu_a2 = _scalar("mu_a2", dist.Normal(0.0, 1.0))
    sigma_a1, sigma_a2, sigma_y = (
        _scalar(name, dist.Uniform(0.0, 100.0)) for name in ("sigma_a1", "sigma_a2", "sigma_y")
    )
    a1 = mu_a1 + sigma_a1 * eta1
    a2 = 0.1 * mu_a2 + sigma_a2 * eta2
    _observe_normal(a1[..., person] + a2[..., person] * time, sigma_y, y)


def _hiv(data_dir: Path | None) -> StanModel:
    y, time, person, persons = _read(data_dir, "hiv_chr", "y", "time", "person", "J")
    dropped = _normals(2 + 2 * int(persons) + len(y)) + _uniforms(3, 100.0)
    return StanModel(partial(_hiv_model, y, time, _index(person), int(persons)), dropped)


# BPA: animals that are seen now and then


def _cjs_model(survived: Tensor, seen: Tensor, missed: Tensor, last: Tensor) -> None:
    """
    Cormack-Jolly-Seber with parameters that vary in time; individuals matter by counts.

    :param Tensor survived: the number of individuals known to survive from each occasion to the next, n - 1 in all.
    :param Tensor seen: the number of them that are seen at the next one.
    :param Tensor missed: the number that are not.
    :param Tensor last: the number last seen at each of the n - 1 occasions before the last.
    """
    phi = pyro.sample("phi_t", _uniform(1.0, len(survived)))
    p = pyro.sample("p_t", _uniform(1.0, len(survived)))
    chi = [torch.ones_like(phi[..., 0])]  # the probability never to be seen after an occasion, from the last one on
    for phi_t, p_t in zip(phi.unbind(-1)[::-1], p.unbind(-1)[::-1], strict=True):
        chi.append(1 - phi_t + phi_t * (1 - p_t) * chi[-1])
    never = torch.stack(chi[:0:-1], dim=-1)
    log_likelihood = survived * phi.log() + seen * p.log() + missed * torch.log1p(-p) + last * never.log()
    pyro.factor("y", log_likelihood.sum(-1))


def _cjs(data_dir: Path | None) -> StanModel:
    (y,) = _read(data_dir, "cjs_t_t", "y")
    y = y[y.sum(-1) > 0]
    first, last = y.argmax(-1), y.shape[-1] - 1 - y.flip(-1).argmax(-1)
    occasion = torch.arange(y.shape[-1])[1:]
    between = (first.unsqueeze(-1) < occasion) & (occasion <= last.unsqueeze(-1))
    seen = (y[:, 1:] * between).sum(0)
    survived = between.sum(0).to(y.dtype)
    ends = torch.bincount(last, minlength=y.shape[-1])[:-1].to(y.dtype)
    return StanModel(partial(_cjs_model, survived, seen, survived - seen, ends), 0.0)


def _dynocc_model(counts: Tensor, replicates: int) -> None:
    """
    Occupancy of sites over the years, a hidden Markov model. The fractions of ps that stay or become occupied are the
    first coordinates of Stan's simplices.

    :param Tensor counts: the number of surveys in which the animal was found, with shape ``(sites, years)``.
    """
    years = counts.shape[-1]
    psi1 = _scalar("psi1", dist.Uniform(0.0, 1.0))
    p = pyro.sample("p", _uniform(1.0, years))
    persists = pyro.sample("persists", _uniform(1.0, years - 1))
    colonised = pyro.sample("colonised", _uniform(1.0, years - 1))
    # The probabilities of a year's counts, times those of the years before, over the same in all years before.
    occupied, empty = psi1.expand(*psi1.shape[:-1], len(counts)), 1 - psi1
    total = torch.zeros_like(psi1[..., 0])
    for year in range(years):
        found = dist.Binomial(replicates, probs=p[..., year, None], validate_args=False).log_prob(counts[:, year])
        occupied, empty = occupied * found.exp(), empty * (counts[:, year] == 0)
        both = occupied + empty
        total = total + both.log().sum(-1)
        if year < years - 1:
            stay, come = persists[..., year, None], colonised[..., year, None]
            occupied = (occupied * stay + empty * come) / both
            empty = 1 - occupied
    pyro.factor("y", total)


def _dynocc(data_dir: Path | None) -> StanModel:
    (y,) = _read(data_dir, "Dynocc", "y")  # sites, replicates, years
    return StanModel(partial(_dynocc_model, y.sum(1), y.shape[1]), 0.0)


def _mth_model(y: Tensor) -> None:
    """Closed population with data augmentation: capture varies in time and between individuals."""
    omega = _scalar("omega", dist.Uniform(0.0, 1.0))
    mean_p = pyro.sample("mean_p", _uniform(1.0, y.shape[-1]))
    sigma = _scalar("sigma", dist.Uniform(0.0, 5.0))
    eps = sigma * pyro.sample("eps_raw", _normal(0.0, 1.0, len(y)))
    logits = mean_p.logit().unsqueeze(-2) + eps.unsqueeze(-1)
    member = omega.log() + dist.Bernoulli(logits=logits, validate_args=False).log_prob(y).sum(-1)
    either = torch.logaddexp(member, torch.log1p(-omega))
    pyro.factor("y", torch.where(y.sum(-1) > 0, member, either).sum(-1))


def _mth(data_dir: Path | None) -> StanModel:
    (y,) = _read(data_dir, "Mth", "y")
    return StanModel(partial(_mth_model, y), _normals(len(y)) + _uniforms(1, 5.0))


# Examples of BUGS


def _lsat_model(responses: Tensor) -> None:
    """
    Item response.

    :param Tensor responses: 0 or 1, with shape ``(questions, students)``.
    """
    questions, students = responses.shape
    alpha = pyro.sample("alpha", _normal(0.0, 100.0, questions))
    theta = pyro.sample("theta", _normal(0.0, 1.0, students))
    beta = _scalar("beta", dist.HalfNormal(100.0))
    logits = (beta * theta).unsqueeze(-2) - alpha.unsqueeze(-1)
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=responses)


def _lsat(data_dir: Path | None) -> StanModel:
    response, culm = _read(data_dir, "lsat", "response", "culm")
    counts = torch.diff(culm, prepend=culm.new_zeros(1)).long()
    responses = response.repeat_interleave(counts, 0).mT.contiguous()
    questions, students = responses.shape
    dropped = _normals(students) + _normals(questions + 1, 100.0) - math.log(2)
    return StanModel(partial(_lsat_model, responses), dropped)


def _oxford_model(n0: Tensor, r0: Tensor, n1: Tensor, r1: Tensor, year: Tensor) -> None:
    mu = pyro.sample("mu", _normal(0.0, 1000.0, len(n0)))
    alpha, beta1, beta2 = (_scalar(name, dist.Normal(0.0, 1000.0)) for name in ("alpha", "beta1", "beta2"))
    sigma_sq = _scalar("sigma_sq", dist.InverseGamma(0.001, 0.001))
    b = pyro.sample("b", _normal(0.0, 1.0, len(n0)))
    exposed = alpha + mu + beta1 * year + beta2 * (year**2 - 22) + b * sigma_sq.sqrt()
    pyro.sample("r0", dist.Binomial(n0, logits=mu).to_event(1), obs=r0)
    pyro.sample("r1", dist.Binomial(n1, logits=exposed).to_event(1), obs=r1)


def _oxford(data_dir: Path | None) -> StanModel:
    n0, r0, n1, r1, year = _read(data_dir, "oxford", "n0", "r0", "n1", "r1", "year")
    binomials = sum(float(_log_choose(n, r).sum()) for n, r in ((n0, r0), (n1, r1)))
    dropped = _normals(len(n0)) + _normals(3 + len(n0), 1000.0) + _inverse_gammas(1, 0.001, 0.001) - binomials
    return StanModel(partial(_oxford_model, n0, r0, n1, r1, year), dropped)


def _log_choose(n: Tensor, r: Tensor) -> Tensor:
    n, r = n.double(), r.double()
    return torch.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)


def _endo_model(exposed: Tensor) -> None:
    """
    Matched case-control pairs. The log evidence has a closed form, as priors this wide are flat: of 43 pairs whose case
    alone is exposed, 7 whose control alone is, and 133 others it is log B(43, 7) - 133 log 2 = -112.40 on Stan's scale.

    :param Tensor exposed: 0 or 1, with shape ``(2, pairs)``: cases, then controls.
    """
    pairs = exposed.shape[-1]
    beta = _scalar("beta", dist.Normal(0.0, 1000.0))
    beta0 = pyro.sample("beta0", _normal(0.0, 1000.0, pairs))
    log_rate = beta0.unsqueeze(-2) + beta.unsqueeze(-1) * exposed
    # Poisson counts, 1 of cases and 0 of controls. The rate itself overflows at samples of the prior.
    pyro.factor("Y", log_rate[..., 0, :].sum(-1) - log_rate.exp().sum((-2, -1)))


def _endo(data_dir: Path | None) -> StanModel:
    n10, n01, n11, pairs = (int(n) for n in _read(data_dir, "endo3", "n10", "n01", "n11", "I"))
    exposed = torch.zeros(2, pairs)
    exposed[0, :n10] = exposed[1, n10 : n10 + n01] = 1
    exposed[:, n10 + n01 : n10 + n01 + n11] = 1
    return StanModel(partial(_endo_model, exposed), _normals(1 + pairs, 1000.0))


def _hepatitis_model(y: Tensor, time: Tensor, baseline: Tensor, person: Tensor) -> None:
    """
    Random intercepts and slopes; variances have the priors, as in BUGS.

    :param Tensor baseline: for each person, centred.
    """
    persons = len(baseline)
    sigma_y, sigma_alpha, sigma_beta = (
        _scalar(f"sigmasq_{name}", dist.InverseGamma(0.001, 0.001)).sqrt() for name in ("y", "alpha", "beta")
    )
    gamma, alpha0, beta0 = (_scalar(name, dist.Normal(0.0, 1000.0)) for name in ("gamma", "alpha0", "beta0"))
    shape = [*gamma.shape[:-1], persons]
    alpha = pyro.sample("alpha", dist.Normal(alpha0, sigma_alpha).expand(shape).to_event(1))
    beta = pyro.sample("beta", dist.Normal(beta0, sigma_beta).expand(shape).to_event(1))
    line = alpha + gamma * baseline
    _observe_normal(line[..., person] + beta[..., person] * (time - 6.5), sigma_y, y)


def _hepatitis(data_dir: Path | None) -> StanModel:
    y, time, person, y0 = _read(data_dir, "hepatitis", "Yvec1", "tvec1", "idxn1", "y0")
    dropped = _normals(len(y) + 2 * len(y0)) + _normals(3, 1000.0) + _inverse_gammas(3, 0.001, 0.001)
    return StanModel(partial(_hepatitis_model, y, time, y0 - y0.mean(), _index(person)), dropped)


# Stan's folder misc


def _irt_model(y: Tensor, student: Tensor, question: Tensor, students: int, questions: int) -> None:
    delta = _scalar("delta", dist.Normal(0.75, 1.0))
    alpha = pyro.sample("alpha", _normal(0.0, 1.0, students))
    beta = pyro.sample("beta", _normal(0.0, 1.0, questions))
    _observe_binary(alpha[..., student] - beta[..., question] + delta, y)


def _irt(data_dir: Path | None) -> StanModel:
    y, student, question, students, questions = _read(data_dir, "irt", "y", "jj", "kk", "J", "K")
    sizes = int(students), int(questions)
    return StanModel(partial(_irt_model, y, _index(student), _index(question), *sizes), _normals(1 + sum(sizes)))


def _gp_model(x: Tensor, y: Tensor) -> None:
    """
    A Gaussian process, of which the first points of ``x`` are observed. The Cholesky factor needs double precision.
    """
    alpha = _scalar("alpha", dist.HalfNormal(1.0))
    rho = _scalar("rho", dist.InverseGamma(5.0, 5.0))
    sigma = _scalar("sigma", dist.HalfNormal(1.0))
    eta = pyro.sample("eta", _normal(0.0, 1.0, len(x)))
    distance = (x.unsqueeze(-1) - x).double() / rho.unsqueeze(-1)
    kernel = alpha.unsqueeze(-1) ** 2 * torch.exp(-0.5 * distance**2) + 1e-9 * torch.eye(len(x), dtype=torch.double)
    f = (torch.linalg.cholesky(kernel) @ eta.double().unsqueeze(-1)).squeeze(-1).to(eta.dtype)
    _observe_normal(f[..., : len(y)], sigma, y)


def _gp(data_dir: Path | None) -> StanModel:
    y, x1, x2 = _read(data_dir, "gp-predict", "y1", "x1", "x2")
    x = torch.cat([x1, x2])
    dropped = _normals(2 + len(x) + len(y)) - 2 * math.log(2) + _inverse_gammas(1, 5.0, 5.0)
    return StanModel(partial(_gp_model, x, y), dropped)


_LOADERS: dict[str, Callable[[Path | None], StanModel]] = {
    "wells": partial(_wells, unit=100.0),
    "wells_dist": partial(_wells, unit=1.0),
    "dogs": _dogs,
    "congress": _congress,
    "cjs_t_t": _cjs,
    "Dynocc": _dynocc,
    "election88": _election88,
    "radon_redundant_chr": _radon,
    "electric_chr": _electric,
    "electric_1a_chr": partial(_electric_1, name="electric_1a_chr", unit=100.0),
    "electric_1c_chr": partial(_electric_1, name="electric_1c_chr", unit=50.0),
    "hiv_chr": _hiv,
    "endo3": _endo,
    "hepatitis": _hepatitis,
    "oxford": _oxford,
    "gp_predict": _gp,
    "Mth": _mth,
    "irt": _irt,
    "lsat": _lsat,
}

#: The names that :func:`load` knows, by the number of latents.
MODELS: tuple[str, ...] = tuple(_LOADERS)
