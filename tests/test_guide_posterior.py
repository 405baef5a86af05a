# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The parts of the automatic guide's posterior, one by one."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_hollow.infer.guide_posterior import Affine, PathPosterior, Posterior, Stretching, Tails
from pyro_hollow.infer.path_gradient import _call_and_score


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request, reproducible):
    torch.set_default_dtype(request.param)
    return request.param


def normal(*shape):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(1)


@pytest.mark.parametrize("size", [2, 7, 64])
@pytest.mark.parametrize("dim", [1, 5])
def test_training_samples_are_spread_evenly(size, dim, dtype):
    """Each as the base distribution has it, and their mean nearer to its mean than that of independent ones."""
    base = normal(size, dim)
    pyro.set_rng_seed(0)
    z = torch.stack([Posterior(base, []).rsample() for _ in range(2000)])
    assert z.shape == (2000, size, dim) and z.dtype == dtype and z.isfinite().all()
    for k in range(min(size, 3)):
        probabilities = dist.Normal(0.0, 1.0).cdf(z[:, k, 0]).sort().values
        grid = (torch.arange(2000) + 0.5) / 2000
        assert (probabilities - grid).abs().max() < 1.95 / math.sqrt(2000)  # Kolmogorov and Smirnov's test at 0.1 %
    assert (z.mean(1).var(0) < 0.8 / size).all()
    with torch.no_grad():
        independent = torch.stack([Posterior(base, []).rsample() for _ in range(2000)])
    assert (independent.mean(1).var(0) > 0.8 / size).all()


# Transforms

WEIGHTS = {"none": 0.0, "weak": 1e-3, "usual": 0.05, "strong": 3.0, "left alone": (0.5, 0.0)}
TRANSFORMS = {name: lambda weight=weight: Tails(torch.tensor(weight).expand(4, 2)) for name, weight in WEIGHTS.items()}
TRANSFORMS["full affine"] = lambda: Affine(torch.randn(4), torch.randn(4), torch.randn(4, 4).tril(-1))
TRANSFORMS["diagonal affine"] = lambda: Affine(torch.randn(4), torch.randn(4), None)
all_transforms = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())


class Plain(torch.distributions.Transform):
    """Another transform without its own score, which is then taken by automatic differentiation."""

    bijective = True

    def __init__(self, transform):
        super().__init__()
        self._transform = transform
        self.domain, self.codomain = transform.domain, transform.codomain

    def _call(self, x):
        return self._transform._call(x)

    def log_abs_det_jacobian(self, x, y):
        return self._transform.log_abs_det_jacobian(x, y)


@all_transforms
def test_transforms_against_their_jacobian(make, dtype):
    transform = make()
    x = torch.cat([3.0 * torch.randn(50, 4), torch.tensor([[0.0, 1.5, -1.5, 30.0]])])
    y = transform(x)
    jacobian = torch.stack([torch.autograd.functional.jacobian(transform._call, row) for row in x])
    assert_close(transform.log_abs_det_jacobian(x, y), torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-4, atol=1e-5)
    assert_close(transform.inv(y.clone()), x, rtol=1e-3, atol=1e-4)
    score = torch.randn_like(x)
    for own, other in zip(transform.call_and_score(x, score), _call_and_score(Plain(transform), x, score), strict=True):
        assert_close(own, other, rtol=1e-3, atol=1e-4)


@all_transforms
def test_a_pair_without_gradients_is_not_kept(make, dtype):
    transform = make()
    parameter = transform.weight if isinstance(transform, Tails) else transform.loc
    parameter.requires_grad_()
    x = 3.0 * torch.randn(5, 4)
    with torch.no_grad():
        y = transform(x)
    assert transform.inv(y).requires_grad


def test_tails(dtype):
    """The bulk stays as it is, each side has its own weight, and tails of a Gaussian become exponential."""
    x = torch.linspace(-6.0, 6.0, 25).unsqueeze(-1)
    y = Tails(torch.tensor([[0.0, 0.5]]))(x)
    bulk = x < 1.6
    assert_close(y[bulk], x[bulk], rtol=1e-4, atol=1e-4)
    assert (y[x > 2] > x[x > 2] + 0.05).all()
    far = torch.tensor([[20.0], [40.0], [80.0]])
    tails = Tails(torch.tensor([[0.25, 0.25]]))
    density = dist.TransformedDistribution(normal(1), [tails]).log_prob(tails(far).clone())
    slopes = density.diff() / tails(far).squeeze(-1).diff()
    assert_close(slopes, torch.full_like(slopes, -1.0), rtol=0.15, atol=0.0)


# Stretching


def test_every_coordinate_is_stretched_by_a_factor_of_its_own(dtype):
    def draw(limit):
        posterior = PathPosterior(normal(3), [])
        posterior.stretching = None if limit is None else Stretching(limit)
        pyro.set_rng_seed(2)
        return posterior.expand([4, 1]).expand([4, 5]).rsample((2,))

    factors = draw(3.0) / draw(None)
    assert ((factors >= 0.9999) & (factors <= 3.0001)).all()
    assert len(factors.unique()) == 120
    assert factors.min() < 1.2 and factors.max() > 2.8


def test_restrain(dtype):
    """Up to its largest norm a gradient stays as it is, beyond it keeps its direction, and others are left out."""
    nan, inf = math.nan, math.inf
    gradient = torch.tensor([[0.3, -0.4], [30.0, -40.0], [nan, 1.0], [-inf, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    largest = torch.tensor([0.6, 0.5, 1.0, 1.0, 1.0, 0.0, inf])
    expected = torch.tensor([[0.3, -0.4], [0.3, -0.4], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert_close(Stretching(2.0).restrain(gradient, largest), expected)


@pytest.mark.parametrize("excessive, recedes", [(0, False), (3, False), (4, True), (10, True)])
def test_stretching_recedes(excessive, recedes, dtype):
    """While more than three samples in ten must be restrained, and it comes back slowly; but not beyond its limit."""
    gradient = torch.ones(10, 2)
    largest = torch.full((10,), 2.0)
    largest[:excessive] = 1.0
    stretching = Stretching(3.0)
    stretching.restrain(gradient, largest)
    assert stretching.stretch(torch.ones(10000, 1)).max() == pytest.approx(1 + 2 * (1.01**-4 if recedes else 1.0), 1e-3)
    for _ in range(2000):
        stretching.restrain(gradient, largest)
    assert stretching.stretch(torch.ones(10000, 1)).max() == pytest.approx(1.001 if recedes else 3.0, rel=1e-3)
    for _ in range(2000):
        stretching.restrain(gradient, torch.full((10,), 2.0))
    assert stretching.stretch(torch.ones(10000, 1)).max() == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("weight", [1.0, 1 / 32], ids=["sum", "mean"])
def test_gradients_of_stretched_samples_are_restrained_by_their_score(weight, dtype):
    """By the score's part in them, whatever weight an objective gives to the samples."""
    loc = torch.zeros(3, requires_grad=True)
    gradients = []
    for steep in (0.5, 1e6, math.nan):
        posterior = PathPosterior(dist.Normal(torch.zeros(6, 3), 1.0).to_event(1), [Affine(loc, torch.zeros(3), None)])
        posterior.stretching = Stretching(2.0)
        pyro.set_rng_seed(0)
        z = posterior.rsample()
        z.retain_grad()
        log_p = -0.5 * steep * z.square().sum(-1)  # the residual is (steep - 1) times the score
        (weight * (posterior.log_prob(z) - log_p)).sum().backward()
        gradients.append(z.grad / weight)
    near, far, undefined = gradients
    score = -z.detach()
    assert_close(near, 0.5 * score)
    assert_close(far, -score)
    assert (undefined == 0).all() and loc.grad.isfinite().all()


def test_samples_that_no_density_scores_keep_their_gradients(dtype):
    loc = torch.zeros(3, requires_grad=True)
    posterior = PathPosterior(normal(6, 3), [Affine(loc, torch.zeros(3), None)])
    posterior.stretching = Stretching(2.0)
    (1e6 * posterior.rsample()).sum().backward()
    assert_close(loc.grad, torch.full((3,), 6e6))
