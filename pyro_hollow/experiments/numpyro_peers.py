# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
NumPyro on the posteriors of :mod:`~pyro_hollow.experiments.posterior_models`: NUTS, AutoIAFNormal and AutoBNAFNormal.

This file is run by the Python of an environment that has NumPyro (``make numpyro``) and imports nothing of this
package::

    .venv-numpyro/bin/python pyro_hollow/experiments/numpyro_peers.py eight_schools nuts

It prints one line of JSON with the findings of the method. The densities are those of the Pyro models, with the same
sites and the same constants.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoBNAFNormal, AutoIAFNormal

Model = Callable[[], None]

LEARNING_RATE, PARTICLES = 1e-2, 32  #: those of the guides of the experiment.
CHUNK, STEPS, JUDGED = 500, 100, 4000


def flat(*shape: int) -> dist.Distribution:
    """The constant density on real vectors."""
    return dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)).mask(False)


def flat_positive(*shape: int) -> dist.Distribution:
    """The constant density on positive numbers, or on vectors of them."""
    return dist.LogNormal(0.0, 1.0).expand(shape).to_event(len(shape)).mask(False)


def normal(loc: float, scale: float, size: int) -> dist.Distribution:
    """Independent normal numbers, as a vector."""
    return dist.Normal(loc, scale).expand([size]).to_event(1)


def funnel() -> None:
    """Neal's funnel."""
    v = numpyro.sample("v", dist.Normal(0.0, 1.5))
    numpyro.sample("x", normal(0.0, jnp.exp(v), 9))


def banana() -> None:
    """The banana."""
    x1 = numpyro.sample("x1", dist.Normal(0.0, 1.0))
    numpyro.sample("x2", dist.Normal(x1**2, 0.3))


def ring() -> None:
    """The ring of eight Gaussians."""
    x = numpyro.sample("x", flat(2))
    angle = jnp.arange(8) * (math.pi / 4)
    centres = 2 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
    components = dist.Normal(centres, 0.4).log_prob(x).sum(-1)
    numpyro.factor("log_density", jax.scipy.special.logsumexp(components) - math.log(8))


def bent() -> None:
    """The bent chain."""
    x = numpyro.sample("x", flat(50))
    log_density = dist.Normal(0.0, 1.0).log_prob(x[0]) + dist.Normal(jnp.sin(2 * x[:-1]), 0.4).log_prob(x[1:]).sum()
    numpyro.factor("log_density", log_density)


def eight_schools() -> None:
    """Eight schools, centered."""
    y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def ark(data: Any) -> None:
    """Autoregression."""
    y, k = data.y, int(data.K)
    lags = jnp.stack([y[k - lag : len(y) - lag] for lag in range(1, k + 1)], -1)
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", normal(0.0, 10.0, k))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma).to_event(1), obs=y[k:])


def garch(data: Any) -> None:
    """GARCH(1,1); beta1 is fraction * (1 - alpha1)."""
    mu = numpyro.sample("mu", flat())
    alpha0 = numpyro.sample("alpha0", flat_positive())
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    fraction = numpyro.sample("fraction", dist.Uniform(0.0, 1.0))
    numpyro.factor("jacobian", jnp.log1p(-alpha1))

    def step(variance: Any, y: Any) -> Any:
        return alpha0 + alpha1 * (y - mu) ** 2 + fraction * (1 - alpha1) * variance, variance

    _, variance = lax.scan(step, data.sigma1**2, data.y)
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)).to_event(1), obs=data.y)


def regression(y: Any, columns: Any, beta: dist.Distribution | None = None, sigma: Any = None) -> None:
    """Linear regression; priors that are not given are flat."""
    design = jnp.stack(jnp.broadcast_arrays(*columns), -1)
    beta = numpyro.sample("beta", beta or flat(design.shape[-1]))
    sigma = numpyro.sample("sigma", sigma or flat_positive())
    numpyro.sample("y", dist.Normal(design @ beta, sigma).to_event(1), obs=y)


def kidscore(data: Any) -> None:
    """Kid scores with interaction."""
    hs, iq = data.mom_hs, data.mom_iq
    regression(data.kid_score, [1.0, hs, iq, hs * iq], sigma=dist.HalfCauchy(2.5))


def mesquite(data: Any) -> None:
    """Mesquite bushes."""
    sizes = [data.diam1, data.diam2, data.canopy_height, data.total_height, data.density]
    regression(jnp.log(data.weight), [1.0, *map(jnp.log, sizes), data.group])


def kilpisjarvi(data: Any) -> None:
    """Summers of Kilpisjärvi."""
    loc, scale = (jnp.stack(pair) for pair in ((data.pmualpha, data.pmubeta), (data.psalpha, data.psbeta)))
    regression(data.y, [1.0, data.x], dist.Normal(loc, scale).to_event(1))


def earnings(data: Any) -> None:
    """Earnings with interaction."""
    regression(jnp.log(data.earn), [1.0, data.height, data.male, data.height * data.male])


def nes(data: Any) -> None:
    """Party identification."""
    ages = [1.0 * (data.age_discrete == group) for group in (2, 3, 4)]
    regression(data.partyid7, [1.0, data.real_ideo, data.race_adj, *ages, data.educ1, data.gender, data.income])


def sblri(data: Any) -> None:
    """Linear regression."""
    regression(data.y, data.X.T, normal(0.0, 10.0, data.X.shape[-1]), dist.HalfNormal(10.0))


def gp(data: Any) -> None:
    """Gaussian process."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    kernel = alpha**2 * jnp.exp(-0.5 * ((data.x[:, None] - data.x) / rho) ** 2)
    covariance = kernel + sigma * jnp.eye(len(data.x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros_like(data.x), covariance), obs=data.y)


def hmm(data: Any) -> None:
    """Hidden Markov model with two states, by the forward algorithm."""
    theta = jnp.stack([numpyro.sample(f"theta{k + 1}", dist.Dirichlet(data.alpha[k])) for k in (0, 1)])
    rates = jnp.stack([jnp.cumsum(numpyro.sample(f"{name}_steps", flat_positive(2))) for name in ("phi", "lambda")])
    numpyro.factor("prior", dist.Normal(jnp.array([0.0, 3.0]), 1.0).log_prob(rates).sum())
    emissions = dist.Exponential(rates).log_prob(jnp.stack([data.u, data.v], -1)[..., None]).sum(-2)

    def step(forward: Any, emission: Any) -> Any:
        return jax.scipy.special.logsumexp(forward[:, None] + jnp.log(theta), 0) + emission, None

    forward, _ = lax.scan(step, emissions[0] - math.log(2), emissions[1:])
    numpyro.factor("y", jax.scipy.special.logsumexp(forward))


def lynx_hare(data: Any, substeps: int = 2) -> None:
    """Lotka-Volterra equations by the Runge-Kutta method in logarithms, as in the Pyro model."""
    mean, deviation = jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05])
    theta = numpyro.sample("theta", dist.LogNormal(jnp.log(mean), 1.0).to_event(1).mask(False))
    numpyro.factor("prior", dist.Normal(mean, deviation).log_prob(theta).sum())
    z_init = numpyro.sample("z_init", dist.LogNormal(math.log(10.0), 1.0).expand([2]).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    signed, h = theta * jnp.array([1.0, -1.0, -1.0, 1.0]), 1 / substeps

    def slope(log_z: Any) -> Any:
        return signed[::2] + signed[1::2] * jnp.exp(jnp.minimum(log_z[::-1], 10.0))

    def step(log_z: Any, _: Any) -> Any:
        k1 = slope(log_z)
        k2 = slope(log_z + h / 2 * k1)
        k3 = slope(log_z + h / 2 * k2)
        k4 = slope(log_z + h * k3)
        return log_z + h / 6 * (k1 + 2 * (k2 + k3) + k4), log_z

    y = jnp.concatenate([data.y_init[None], data.y])
    _, log_z = lax.scan(step, jnp.log(z_init), length=(len(y) - 1) * substeps + 1)
    numpyro.sample("y", dist.LogNormal(log_z[::substeps], sigma).to_event(2), obs=y)


def diamonds(data: Any) -> None:
    """Prices of diamonds, with centred columns."""
    design = data.X[:, 1:] - data.X[:, 1:].mean(0)
    b = numpyro.sample("b", normal(0.0, 1.0, design.shape[-1]))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = numpyro.sample("sigma", flat_positive())
    numpyro.factor("prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma) + math.log(2))
    numpyro.sample("y", dist.Normal(intercept + design @ b, sigma).to_event(1), obs=data.Y)


def one_comp(data: Any, substeps: int = 2) -> None:
    """Pharmacokinetics by the Runge-Kutta method in the cubic root of time, as in the Pyro model."""
    k_a, k_m, v_m, sigma = (numpyro.sample(name, dist.HalfCauchy(1.0)) for name in ("k_a", "K_m", "V_m", "sigma"))
    ends = jnp.cbrt(data.times)
    begins = jnp.concatenate([jnp.zeros(1), ends[:-1]])
    sizes = jnp.repeat((ends - begins) / substeps, substeps)
    starts = jnp.repeat(begins, substeps) + sizes * jnp.tile(jnp.arange(substeps), len(ends))

    def slope(s: Any, c: Any) -> Any:
        left = jnp.maximum(c, 0.0)
        intake = data.D * k_a * jnp.exp(-k_a * s**3)
        return 3 * s**2 / data.V * (intake - v_m * left / (k_m + left))

    def step(c: Any, span: Any) -> Any:
        s, h = span
        k1 = slope(s, c)
        k2 = slope(s + h / 2, c + h / 2 * k1)
        k3 = slope(s + h / 2, c + h / 2 * k2)
        c = c + h / 6 * (k1 + 2 * (k2 + k3) + slope(s + h, c + h * k3))
        return c, c

    _, found = lax.scan(step, jnp.zeros(()), (starts, sizes))
    mean = jnp.log(jnp.maximum(found[substeps - 1 :: substeps], 1e-10))
    numpyro.sample("y", dist.LogNormal(mean, sigma).to_event(1), obs=data.C_hat)


#: The models by name, each with the data set that it takes.
MODELS: dict[str, tuple[Callable[..., None], str | None]] = {
    "funnel": (funnel, None),
    "banana": (banana, None),
    "ring": (ring, None),
    "bent": (bent, None),
    "eight_schools": (eight_schools, None),
    "ark": (ark, "arK"),
    "garch": (garch, "garch"),
    "kidscore": (kidscore, "kidiq"),
    "mesquite": (mesquite, "mesquite"),
    "kilpisjarvi": (kilpisjarvi, "kilpisjarvi_mod"),
    "earnings": (earnings, "earnings"),
    "nes": (nes, "nes2000"),
    "sblri": (sblri, "sblri"),
    "gp": (gp, "gp_pois_regr"),
    "hmm": (hmm, "bball_drive_event_0"),
    "lynx_hare": (lynx_hare, "hudson_lynx_hare"),
    "diamonds": (diamonds, "diamonds"),
    "one_comp": (one_comp, "one_comp_mm_elim_abs"),
}


def load(name: str, data_dir: Path | None) -> Model:
    """A model without arguments, given the folder with the folder "posteriordb"."""
    model, data = MODELS[name]
    if data is None:
        return model
    if data_dir is None:
        raise SystemExit(f"{name} needs --data-dir")
    content = json.loads((data_dir / "posteriordb" / f"{data}.json").read_text())
    return partial(model, argparse.Namespace(**{key: jnp.asarray(x, float) for key, x in content.items()}))


def nuts(model: Model, args: argparse.Namespace, elapsed: Callable[[], float]) -> dict[str, Any]:
    """
    Draws by NUTS until the smallest effective sample size of a coordinate is reached, or the time is over.

    The first chunk is the warm-up. All are compiled once; calls of ``MCMC.run`` compile anew each time.

    :returns: seconds until then and until the end of the warm-up, draws and their smallest effective sample size.
    """
    kernel = NUTS(model)
    state = kernel.init(jax.random.PRNGKey(args.seed), CHUNK, None, (), {})

    def step(state: Any, _: Any) -> Any:
        state = kernel.sample(state, (), {})
        return state, state.z

    chunk = jax.jit(lambda state: lax.scan(step, state, length=CHUNK))
    constrain = jax.jit(jax.vmap(kernel.postprocess_fn((), {})))
    state, _ = jax.block_until_ready(chunk(state))
    found = {"warm_up_seconds": elapsed(), "seconds": elapsed(), "num_draws": 0, "ess": 0.0}
    chunks: list[dict[str, Any]] = []
    while found["ess"] < args.effective and elapsed() < args.seconds:
        state, z = chunk(state)
        chunks.append({name: np.asarray(x) for name, x in constrain(z).items()})
        draws = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        found["ess"] = min(float(np.min(effective_sample_size(x[None]))) for x in draws.values())
        found.update(seconds=elapsed(), num_draws=len(chunks) * CHUNK)
    if chunks and args.draws:
        np.savez(args.draws, **draws)  # type: ignore[arg-type]
    return found


def optimizer(rate: Any) -> Any:
    """Adam with the clipped gradients of the experiment's guides."""
    return numpyro.optim.ClippedAdam(lambda _: rate, clip_norm=10.0)


def flow(
    kind: Callable[..., Any], model: Model, args: argparse.Namespace, elapsed: Callable[[], float]
) -> dict[str, Any]:
    """
    Fits a guide until the time is over; then the learning rate has fallen to 0 along half a cosine.

    Steps are compiled once, as those of ``SVI.run`` in one call; several calls compile anew each time.

    :returns: seconds, steps and the evidence lower bound.
    """
    guide = kind(model)
    svi = SVI(model, guide, optimizer(LEARNING_RATE), Trace_ELBO(num_particles=PARTICLES))

    @jax.jit
    def chunk(state: Any, rate: Any) -> Any:
        svi.optim = optimizer(rate)
        return lax.scan(lambda state, _: svi.stable_update(state), state, length=STEPS)[0]

    state, steps = svi.init(jax.random.PRNGKey(args.seed)), 0
    while elapsed() < args.seconds:
        rate = LEARNING_RATE * (1 + math.cos(math.pi * elapsed() / args.seconds)) / 2
        state, steps = jax.block_until_ready(chunk(state, rate)), steps + STEPS
    found = {"seconds": elapsed(), "num_steps": steps}
    params, key = svi.get_params(state), jax.random.PRNGKey(1_000_000 + args.seed)
    found["elbo"] = -float(Trace_ELBO(num_particles=JUDGED).loss(key, params, model, guide))
    if args.draws:
        np.savez(args.draws, **guide.sample_posterior(key, params, sample_shape=(JUDGED,)))
    return found


#: The methods by name, given the model, the command line and the seconds until now.
METHODS: dict[str, Callable[..., dict[str, Any]]] = {
    "nuts": nuts,
    "iaf": partial(flow, AutoIAFNormal),
    "bnaf": partial(flow, AutoBNAFNormal),
}


def main() -> None:
    """Runs a method on a posterior; see ``--help``."""
    parser = argparse.ArgumentParser(description="NumPyro on a posterior; prints one line of JSON")
    add = parser.add_argument
    add("posterior", choices=MODELS)
    add("method", choices=METHODS)
    add("--seconds", type=float, default=60.0, help="time for a flow, and the most for NUTS (default: 60)")
    add("--effective", type=float, default=1000.0, help="effective draws, of NUTS (default: 1000)")
    add("--begin", type=float, default=time.time(), help="when the process began, by time.time() (default: now)")
    add("--seed", type=int, default=0, help="seed (default: 0)")
    add("--data-dir", type=Path, help="the folder with the folder posteriordb")
    add("--draws", type=Path, help="the file for draws of the sites (NPZ)")
    args = parser.parse_args()
    model = load(args.posterior, args.data_dir)
    print(json.dumps(METHODS[args.method](model, args, lambda: time.time() - args.begin)))


if __name__ == "__main__":
    main()
