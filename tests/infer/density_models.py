# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Models of many kinds, without arguments, whose log joint densities can be evaluated for particles in a plate."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from torch.nn.functional import pad, softplus


def design(rows, columns):
    """A fixed matrix without structure."""
    return torch.sin(torch.arange(1.0, 1.0 + rows * columns).square()).reshape(rows, columns)


def poisson_regression():
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    exposure = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0])
    with pyro.plate("data", 5):
        rate = exposure * (beta * design(5, 3)).sum(-1).exp()
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0]))


def logistic_regression():
    with pyro.plate("columns", 3, dim=-2):
        beta = pyro.sample("beta", dist.StudentT(4.0, 0.0, 2.5))
    intercept = pyro.sample("intercept", dist.Cauchy(0.0, 5.0))
    logits = intercept + (beta * design(3, 7)).sum(-2, keepdim=True)
    with pyro.plate("data", 7):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]))


def negative_binomial_regression():
    concentration = pyro.sample("concentration", dist.Gamma(2.0, 0.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6):
        mean = (1.0 + slope * design(1, 6)[0]).exp()
        fn = dist.NegativeBinomial(concentration, logits=mean.log() - concentration.log())
        pyro.sample("y", fn, obs=torch.tensor([0.0, 2.0, 9.0, 4.0, 1.0, 3.0]))


def nested_plates():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    noise = pyro.sample("noise", dist.Exponential(1.0))
    with pyro.plate("schools", 4, dim=-2):
        school = pyro.sample("school", dist.Normal(mu, tau))
        with pyro.plate("classes", 3, dim=-1):
            effect = pyro.sample("class", dist.Normal(school, 0.5))
            pyro.sample("y", dist.Normal(effect, noise), obs=3.0 * design(4, 3))


def varying_intercepts():
    """Groups of unequal size by an index."""
    group = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 4):
        intercept = pyro.sample("intercept", dist.Normal(mu, 0.7))
    kept = torch.tensor([True, True, False, True, True, True, True])
    with pyro.plate("data", 6):
        pyro.sample("y", dist.Normal(intercept[..., group][..., kept], 0.4), obs=design(1, 7)[0][kept])


def mixture():
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0])))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    scales = pyro.sample("scales", dist.LogNormal(torch.zeros(2), 0.5).to_event(1))
    with pyro.plate("data", 4):
        fn = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, scales))
        pyro.sample("x", fn, obs=torch.tensor([0.4, 1.6, -0.9, 2.1]))


def mixture_prior():
    """A latent whose prior is a mixture."""
    fn = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Gamma(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 2.0]))
    )
    rate = pyro.sample("rate", fn)
    pyro.sample("x", dist.Exponential(rate), obs=torch.tensor(0.7))


@config_enumerate
def enumerated_mixture():
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0])))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(weights))
        loc = torch.where(k == 0, locs[..., :1], locs[..., 1:])
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.4, 1.6, -0.9, 2.1]))


@config_enumerate
def enumerated_chain():
    stay = pyro.sample("stay", dist.Beta(4.0, 2.0))
    shift = pyro.sample("shift", dist.Normal(1.0, 1.0))
    k = 0
    for t in pyro.markov(range(5)):
        prob = 0.5 if t == 0 else torch.where(k == 1, stay, 1 - stay)
        k = pyro.sample(f"k_{t}", dist.Bernoulli(prob))
        pyro.sample(f"x_{t}", dist.Normal(shift * k, 0.5), obs=design(1, 5)[0, t])


def hidden_markov():
    probs = pyro.sample("probs", dist.Dirichlet(torch.tensor([[5.0, 1.0], [1.0, 4.0]])).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    initial, emission = torch.full((2,), -math.log(2.0)), dist.Normal(locs.unsqueeze(-2), 0.6)
    fn = dist.DiscreteHMM(initial, probs.log().unsqueeze(-3), emission, duration=9)
    pyro.sample("x", fn, obs=design(1, 9)[0])


def correlated_normal():
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    with pyro.plate("data", 4):
        fn = dist.MultivariateNormal(torch.zeros(3), scale_tril=scale.unsqueeze(-1) * factor)
        pyro.sample("x", fn, obs=design(4, 3))


def multinomial():
    concentration = pyro.sample("concentration", dist.Gamma(torch.full((3,), 2.0), 1.0).to_event(1))
    with pyro.plate("data", 2):
        probs = pyro.sample("probs", dist.Dirichlet(concentration))
        counts = torch.tensor([[3.0, 0.0, 5.0], [1.0, 1.0, 2.0]])
        pyro.sample("x", dist.Multinomial(probs=probs, validate_args=False), obs=counts)


def horseshoe():
    tau = pyro.sample("tau", dist.HalfCauchy(0.1))
    with pyro.plate("columns", 5):
        width = pyro.sample("width", dist.HalfCauchy(1.0))
        beta = pyro.sample("beta", dist.Normal(0.0, tau * width))
    loc = (beta.unsqueeze(-2) * design(8, 5)).sum(-1)
    sigma = pyro.sample("sigma", dist.InverseGamma(2.0, 1.0))
    with pyro.plate("data", 8):
        pyro.sample("y", dist.Normal(loc, sigma), obs=design(1, 8)[0])


def gaussian_process():
    x = torch.linspace(0.0, 1.0, 7)
    lengthscale = pyro.sample("lengthscale", dist.InverseGamma(5.0, 2.0))
    amplitude = pyro.sample("amplitude", dist.HalfNormal(1.0))
    lengthscale, amplitude = lengthscale[..., None, None], amplitude[..., None, None]
    kernel = amplitude**2 * (-0.5 * ((x[:, None] - x) / lengthscale) ** 2).exp()
    factor = torch.linalg.cholesky(kernel + 0.01 * torch.eye(7))
    eta = pyro.sample("eta", dist.Normal(torch.zeros(7), 1.0).to_event(1))
    rate = (factor @ eta.unsqueeze(-1)).squeeze(-1).exp()
    pyro.sample("y", dist.Poisson(rate).to_event(1), obs=torch.arange(7.0))


def state_space():
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    state = torch.zeros(())
    for t in range(12):
        state = pyro.sample(f"state_{t}", dist.Normal(phi * state, sigma))
        pyro.sample(f"y_{t}", dist.Normal(0.0, (state / 2).exp()), obs=design(1, 12)[0, t])


def survival():
    """Times that are censored, by a mask and by a factor."""
    shape = pyro.sample("shape", dist.Gamma(2.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    times = torch.tensor([0.5, 1.5, 2.0, 3.0, 3.0])
    observed = torch.tensor([True, True, False, True, False])
    with pyro.plate("data", 5):
        with poutine.mask(mask=observed):
            pyro.sample("time", dist.Weibull(scale, shape), obs=times)
        with poutine.mask(mask=~observed):
            pyro.factor("survived", -((times / scale) ** shape))


def ordinal():
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    base = dist.Normal(torch.zeros(3), 2.0).to_event(1)
    cutpoints = pyro.sample("cutpoints", dist.TransformedDistribution(base, dist.transforms.OrderedTransform()))
    with pyro.plate("data", 6):
        predictor = slope * design(1, 6)[0]
        fn = dist.OrderedLogistic(predictor, cutpoints, validate_args=False)
        pyro.sample("y", fn, obs=torch.tensor([0, 3, 1, 2, 2, 1]))


def hurdle():
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    counts = torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0, 2.0])
    with pyro.plate("data", 6):
        pyro.sample("zero", dist.Bernoulli(gate), obs=(counts == 0).to(gate.dtype))
        with poutine.mask(mask=counts > 0):
            pyro.sample("count", dist.Poisson(rate), obs=counts)
            pyro.factor("truncated", -torch.log1p(-(-rate).exp()))


def zero_inflated():
    gate = pyro.sample("gate", dist.Beta(1.0, 3.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0]))


def bayesian_network():
    first = pyro.sample("first", dist.Normal(torch.zeros(2, 4), 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    second = pyro.sample("second", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    hidden = torch.tanh(design(6, 2) @ first + bias.unsqueeze(-2))
    loc = (hidden @ second.unsqueeze(-1)).squeeze(-1)
    pyro.sample("y", dist.Normal(loc, 0.3).to_event(1), obs=design(1, 6)[0])


def predator_and_prey():
    """An ordinary differential equation, by the classical method of order 4."""
    theta = pyro.sample("theta", dist.LogNormal(torch.tensor([-0.6, -3.0, -0.2, -3.0]), 0.3).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0))

    def field(y):
        growth, predation, death, feeding = theta.unbind(-1)
        u, v = y
        return torch.stack([(growth - predation * v) * u, (feeding * u - death) * v])

    y, h, states = torch.tensor([30.0, 4.0]).reshape(2, *(1,) * noise.dim()), 0.5, []
    for _ in range(6):
        k1 = field(y)
        k2 = field(y + h / 2 * k1)
        k3 = field(y + h / 2 * k2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(y + h * k3))
        states.append(y[0])
    fn = dist.LogNormal(torch.stack(states, -1).log(), noise.unsqueeze(-1)).to_event(1)
    pyro.sample("hares", fn, obs=torch.full((6,), 30.0))


@poutine.reparam(config={"theta": LocScaleReparam(centered=0.3)})
def reparametrised():
    """With a scale, a mask, and sites that a handler makes."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        theta = pyro.sample("theta", dist.Normal(mu, 2.0))
        with poutine.scale(scale=2.5), poutine.mask(mask=torch.tensor([True, False, True])):
            pyro.sample("y", dist.Normal(theta, 0.5), obs=torch.tensor([0.1, 0.2, -0.4]))


def writes_in_place():
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    total = torch.tensor([1.0, 2.0, 3.0])
    total = total + 0 * z
    total += z
    total.mul_(z).clamp_(min=-0.5)
    pyro.factor("f", -total.square().sum(-1))


def writes_to_views():
    z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    weights = torch.zeros(*z.shape[:-1], 5)
    weights[..., 1:] = z.exp()
    weights[..., 0] += 1.0
    first = weights[..., :2]
    first *= 2.0
    pyro.factor("f", -(weights * torch.arange(5.0)).sum(-1))


def writes_to_data():
    """A running sum into a copy of data, of increments that change."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    total = torch.tensor([0.5, -0.5]).expand(*z.shape, 2).clone()
    row = torch.tensor([1.0, 1.0])
    for k in range(3):
        total[..., k % 2] += z + row[k % 2]
        row[k % 2] = 3.0
    pyro.factor("f", -total.square().sum(-1))


def garch():
    """A recursion of variances."""
    share = pyro.sample("share", dist.Uniform(0.0, 1.0))
    base = pyro.sample("base", dist.HalfNormal(1.0))
    variance, total = base + 0.5, 0.0
    for t in range(8):
        y = design(1, 8)[0, t]
        total = total + dist.Normal(0.0, variance.sqrt()).log_prob(y)
        variance = base + share * y**2 + 0.5 * share * variance
    pyro.factor("y", total)


def stick_breaking():
    with pyro.plate("sticks", 4):
        beta = pyro.sample("beta", dist.Beta(1.0, 2.0))
    rest = pad((1 - beta).cumprod(-1), (1, 0), value=1.0)
    weights = pad(beta, (0, 1), value=1.0) * rest
    pyro.factor("counts", (weights.log() * torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])).sum(-1, keepdim=beta.dim() > 1))


def state_space_by_matrices():
    """A linear Gaussian state space model without its states."""
    noise = softplus(pyro.sample("noise", dist.Normal(0.0, 1.0)))
    observed = dist.MultivariateNormal(torch.zeros(1), noise[..., None, None, None] * torch.eye(1))
    start, move = (dist.MultivariateNormal(torch.zeros(2), scale * torch.eye(2)) for scale in (1.0, 0.1))
    rotation = torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    fn = dist.GaussianHMM(start, rotation, move, torch.tensor([[1.0], [0.0]]), observed, duration=6)
    pyro.sample("x", fn, obs=design(6, 1))


MODELS = {
    "Poisson regression": poisson_regression,
    "logistic regression": logistic_regression,
    "negative binomial regression": negative_binomial_regression,
    "nested plates": nested_plates,
    "varying intercepts": varying_intercepts,
    "mixture": mixture,
    "mixture as a prior": mixture_prior,
    "enumerated mixture": enumerated_mixture,
    "enumerated chain": enumerated_chain,
    "hidden Markov": hidden_markov,
    "correlated normal": correlated_normal,
    "multinomial": multinomial,
    "horseshoe": horseshoe,
    "Gaussian process": gaussian_process,
    "state space": state_space,
    "state space by matrices": state_space_by_matrices,
    "survival": survival,
    "ordinal": ordinal,
    "hurdle": hurdle,
    "zero-inflated": zero_inflated,
    "Bayesian network": bayesian_network,
    "predator and prey": predator_and_prey,
    "reparametrised": reparametrised,
    "GARCH": garch,
    "stick breaking": stick_breaking,
    "in place": writes_in_place,
    "in place, views": writes_to_views,
    "in place, data": writes_to_data,
}
SUPPORTS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "greater than": constraints.greater_than(-2.0),
    "less than": constraints.less_than(1.5),
    "unit interval": constraints.unit_interval,
    "interval": constraints.interval(-1.0, 3.0),
    "half-open interval": constraints.half_open_interval(0.0, 2.0),
    "simplex": constraints.simplex,
    "ordered": constraints.ordered_vector,
    "positive ordered": constraints.positive_ordered_vector,
    "softplus positive": constraints.softplus_positive,
    "corr_cholesky": constraints.corr_cholesky,
    "corr_matrix": constraints.corr_matrix,
}
