# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The parts of the automatic guide's posterior, one by one."""

import gc
import math
import weakref

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


def test_gradients_of_tails_without_a_graph(dtype):
    weight = torch.rand(4, 2).requires_grad_()
    x, bar = 3.0 * torch.randn(2, 25, 4), torch.randn(2, 25, 4)
    leaf = x.clone().requires_grad_()
    y, ladj, score = Tails(weight).call_and_score(leaf, -x)
    expected = torch.autograd.grad((y * bar).sum(), [leaf, weight])
    *found, pull = Tails(weight).call_and_pull(x, -x)
    assert_close(found, [y.detach(), ladj, score])
    assert_close([pull(bar), weight.grad], list(expected), rtol=1e-4, atol=1e-4)


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


def posterior(stretching, shape=(6, 3), loc=None, scale=1.0):
    """Of samples around a location, as a guide has them."""
    loc = torch.zeros(3, requires_grad=True) if loc is None else loc
    log_scale = torch.full((3,), math.log(scale))
    made = PathPosterior(normal(*shape), [Affine(loc, log_scale, torch.randn(3, 3).tril(-1))])
    made.stretching = stretching
    return made


def test_every_coordinate_is_stretched_by_a_factor_of_its_own(dtype):
    def draw(limit):
        made = PathPosterior(normal(3), [])
        made.stretching = None if limit is None else Stretching(limit)
        pyro.set_rng_seed(2)
        return made.expand([4, 1]).expand([4, 5]).rsample((2,))

    factors = draw(3.0) / draw(None)
    assert factors.dtype == dtype and ((factors >= 0.9999) & (factors <= 3.0001)).all()
    assert len(factors.unique()) == 120
    assert factors.min() < 1.2 and factors.max() > 2.8


def test_restrain(dtype):
    """Up to its largest norm a gradient stays as it is, beyond it keeps its direction, and others are left out."""
    nan, inf = math.nan, math.inf
    gradient = torch.tensor([[0.3, -0.4], [30.0, -40.0], [nan, 1.0], [-inf, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    largest = torch.tensor([0.6, 0.5, 1.0, 1.0, 1.0, 0.0, inf])
    expected = torch.tensor([[0.3, -0.4], [0.3, -0.4], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert_close(Stretching(2.0).restrain(gradient, gradient.norm(dim=-1), largest), expected)


@pytest.mark.parametrize("size", [1, 10])
def test_stretching_recedes(size, dtype):
    """While too many samples must be restrained, and comes back; but not beyond its limit."""
    gradient, norm = torch.ones(size, 2), torch.ones(size)
    stretching = Stretching(3.0)
    stretching.restrain(gradient, norm, 2 * norm)
    assert stretching.excess == 2.0
    stretching.restrain(gradient, norm, 0.5 * norm)
    assert 1.0 < stretching.excess < 2.0
    for _ in range(500):
        stretching.restrain(gradient, norm, 0.5 * norm)
    assert stretching.excess == pytest.approx(1e-3)
    for _ in range(1000):
        stretching.restrain(gradient, norm, 2 * norm)
    assert stretching.excess == 2.0


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_stretching_settles_by_the_share_of_samples(share, dtype):
    """It is the share in the long run that counts, whatever the number of samples."""
    excesses = []
    for size, steps in ((1, 4000), (50, 400)):
        stretching = Stretching(2.0)
        for _ in range(steps):
            norm = torch.ones(size)
            stretching.restrain(torch.ones(size, 2), norm, torch.where(torch.rand(size) < share, 0.5, 2.0))
        excesses.append(float(stretching.excess))
    assert all(excess > 0.2 if share < 0.2 else excess < 0.05 for excess in excesses)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("weight", [1.0, 1 / 32], ids=["sum", "mean"])
def test_gradients_of_stretched_samples_are_restrained_by_their_score(weight, scale, dtype):
    """By the score's part in them, whatever weight an objective gives to samples and whatever their units."""
    gradients = []
    for steep in (0.5, 1e6, math.nan):
        loc = torch.zeros(3, requires_grad=True)
        pyro.set_rng_seed(0)
        made = posterior(Stretching(2.0), loc=loc, scale=scale)
        z = made.rsample()
        z.retain_grad()
        score = made._latest[-1]
        log_p = (steep * score * z).sum(-1)  # the residual is (1 - steep) times the score
        (weight * (0.25 * made.log_prob(z) + 0.75 * made.log_prob(z) - log_p)).sum().backward()
        gradients.append((z.grad / weight, score, loc.grad))
    assert_close(gradients[0][0], 0.5 * gradients[0][1])
    assert_close(gradients[1][0], -gradients[1][1])
    assert all((part == 0).all() for part in gradients[2][::2])


def test_restraint_does_not_depend_on_units(dtype):
    """Samples of which one coordinate is measured in other units are restrained as much."""
    cuts = []
    for unit in (torch.ones(3), torch.tensor([1e-3, 1.0, 1e3])):
        pyro.set_rng_seed(0)
        lower = torch.randn(3, 3).tril(-1)
        made = PathPosterior(normal(6, 3), [Affine(torch.zeros(3, requires_grad=True), unit.log(), lower)])
        made.stretching = Stretching(2.0)
        z = made.rsample()
        z.retain_grad()
        (made.log_prob(z) + (torch.tensor([0.1, 30.0, -2.0]) * z / unit).sum(-1)).sum().backward()
        cuts.append(z.grad * unit)
    assert_close(*cuts, rtol=1e-4, atol=1e-4)


def test_each_sample_is_restrained_by_its_own_score(dtype):
    """Also if there is a later one before the backward pass."""
    gradients = []
    for again in (False, True):
        pyro.set_rng_seed(0)
        made = posterior(Stretching(2.0))
        z = made.rsample()
        z.retain_grad()
        loss = (made.log_prob(z) + 1e6 * z.sum(-1)).sum()
        if again:
            made.rsample()
        loss.backward()
        gradients.append(z.grad)
    assert_close(*gradients)


def test_samples_that_no_density_scores_keep_their_gradients(dtype):
    loc = torch.zeros(3, requires_grad=True)
    (1e6 * posterior(Stretching(2.0), loc=loc).rsample()).sum().backward()
    assert_close(loc.grad, torch.full((3,), 6e6))


@pytest.mark.parametrize("backward", [True, False])
def test_a_posterior_is_not_kept_alive(backward, dtype):
    made = posterior(Stretching(2.0))
    z = made.rsample()
    loss = (made.log_prob(z) + z.sum(-1)).sum()
    if backward:
        loss.backward()
    known = weakref.ref(made)
    del made, z, loss
    gc.collect()
    assert known() is None


def test_a_sample_that_was_edited_is_scored_anew():
    loc = torch.randn(3, requires_grad=True)
    transforms = [Tails(torch.rand(3, 2)), Affine(loc, torch.randn(3), torch.randn(3, 3).tril(-1))]
    made = Posterior(normal(6, 3), transforms)
    z = made.rsample()
    before = made.log_prob(z)
    with torch.no_grad():
        z.mul_(1.5)
    after = made.log_prob(z)
    assert (after - before).abs().max() > 0.1
    assert_close(after, Posterior(normal(6, 3), transforms).log_prob(z.clone()))
