# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch.testing import assert_close

from pyro_hollow.infer import LogDensity, diagnose
from pyro_hollow.infer.gaussian import GaussianFit
from pyro_hollow.infer.modes import Modes, find_modes, judge_modes, search

RESTARTS = 24


def product():
    """Two modes, at a = b = 1.984 and at their negatives."""
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.factor("c", dist.Normal(4.0, 0.5).log_prob(a * b))


def one_branch():
    a = pyro.sample("a", dist.Normal(-2.2, 0.5))
    pyro.sample("b", dist.Normal(4.0 / a, 0.3))


def both_branches():
    sign = 2 * pyro.sample("sign", dist.Bernoulli(0.5), infer={"is_auxiliary": True}) - 1
    a = pyro.sample("a", dist.Normal(2.2 * sign, 0.5))
    pyro.sample("b", dist.Normal(4.0 / a, 0.3))


def test_missed_mode_is_found_and_not_trusted():
    result = diagnose(product, one_branch, restarts=RESTARTS)
    assert result.restarts == RESTARTS and result.num_modes == 2
    (mode,) = result.missed_modes
    assert_close(mode["a"], torch.tensor(1.9843), rtol=0, atol=1e-2)
    assert_close(mode["b"], torch.tensor(1.9843), rtol=0, atol=1e-2)
    assert result.missed_mass == pytest.approx(0.5, abs=0.1)
    assert not result.reliable
    assert "the guide has almost no draws near 1 of 2 modes, which hold about 5" in str(result)


def test_missed_mode_of_positive_sites_in_plates_is_told_in_the_support():
    """The mixture's modes are at 1 and at 20."""

    def model():
        with pyro.plate("plate", 2, dim=-2):
            pyro.sample("other", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 3.0))
        far = dist.Normal(torch.tensor([0.0, 3.0]), 0.1).log_prob(scale.log().unsqueeze(-1)).logsumexp(-1)
        pyro.factor("far", far)

    def guide():
        with pyro.plate("plate", 2, dim=-2):
            pyro.sample("other", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("scale", dist.LogNormal(0.0, 0.1))

    result = diagnose(model, guide, num_samples=1000, restarts=RESTARTS)
    (mode,) = result.missed_modes
    assert mode["other"].shape == (2, 1, 3)
    assert mode["scale"].log().item() == pytest.approx(3.0, abs=0.02)


def banana():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x**2, 0.3))


def gaussian():
    with pyro.plate("plate", 20):
        pyro.sample("z", dist.Normal(torch.arange(20.0), 1.0))


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("plate", 2):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


def constrained():
    pyro.sample("rate", dist.Gamma(3.0, 2.0))
    pyro.sample("share", dist.Beta(2.0, 5.0))
    pyro.sample("simplex", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))


MODELS = {"banana": banana, "Gaussian": gaussian, "funnel": funnel, "constrained": constrained}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_no_missed_mode_where_there_is_one_at_most(model):
    for guide in (model, AutoNormal(model, init_scale=0.5)):
        result = diagnose(model, guide, num_samples=500, restarts=8)
        assert not result.missed_modes and result.num_modes <= 1


def test_no_missed_mode_where_both_have_draws():
    result = diagnose(product, both_branches, restarts=RESTARTS)
    assert result.num_modes == 2 and not result.missed_modes and result.missed_mass == 0


def test_text_where_no_mode_exists():
    """The density of a scale is unbounded at 0."""

    def model():
        scale = pyro.sample("scale", dist.Gamma(0.5, 1.0).mask(False))
        pyro.factor("zero", -scale.log())

    result = diagnose(model, lambda: pyro.sample("scale", dist.Exponential(1.0)), num_samples=50, restarts=2)
    assert result.num_modes == 0


def log_density(model, *args):
    return LogDensity(model, *args, compile=False)


def gaussian_fit(dim, scale=1.0):
    return GaussianFit(torch.zeros(dim), scale * torch.eye(dim), 0.0)


def quadratic(x):
    """An unnormalised Gaussian with the precision A A^T at (1, 2, 3)."""
    factor = torch.tensor([[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-1.0, 0.3, 3.0]])
    noise = (x - torch.tensor([1.0, 2.0, 3.0])) @ factor
    return -0.5 * noise.square().sum(-1), -noise @ factor.mT


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_laplace_approximation_of_a_gaussian_is_exact(scale):
    modes = find_modes(quadratic, torch.randn(5, 3) * 4, torch.ones(3), scale * torch.eye(3))
    factor = torch.tensor([[2.0, 0.0, 0.0], [0.5, 1.0, 0.0], [-1.0, 0.3, 3.0]])
    assert len(modes) == 1 and modes.num_starts == 5
    assert_close(modes.points, torch.tensor([[1.0, 2.0, 3.0]]), rtol=0, atol=1e-4)
    assert_close(modes.scale_trils[0] @ modes.scale_trils[0].mT, torch.linalg.inv(factor @ factor.mT))
    assert_close(modes.log_masses, 1.5 * torch.log(torch.tensor([2 * torch.pi])) - factor.det().log())


def test_float32_density_with_large_values():
    """Their rounding hides what the last steps would gain, so that the climb ends a little below the top."""
    modes = find_modes(
        lambda x: (quadratic(x)[0] - 3e4, quadratic(x)[1]),
        torch.randn(5, 3, dtype=torch.float32),
        torch.zeros(3, dtype=torch.float32),
        torch.eye(3, dtype=torch.float32),
    )
    assert len(modes) == 1
    assert_close(modes.points, torch.tensor([[1.0, 2.0, 3.0]]).double(), rtol=0, atol=0.3)


def test_ridge_is_no_mode():
    def ridge(x):
        return -0.5 * x[:, 0].square(), torch.stack([-x[:, 0], torch.zeros_like(x[:, 0])], -1)

    assert not len(find_modes(ridge, torch.randn(9, 2), torch.zeros(2), torch.eye(2)))


def test_saddle_is_no_mode():
    def saddle(x):
        return 0.5 * x[:, 1].square() - 0.5 * x[:, 0].square(), torch.stack([-x[:, 0], x[:, 1]], -1)

    assert not len(find_modes(saddle, torch.zeros(1, 2), torch.zeros(2), torch.eye(2)))


def grid_of_gaussians():
    """Twelve Gaussians with means 10 apart."""
    means = 10 * torch.cartesian_prod(torch.arange(4.0), torch.arange(3.0)) + 2.0
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    pyro.factor("x_density", dist.Normal(means, 1.0).log_prob(x.unsqueeze(-2)).sum(-1).logsumexp(-1))


def test_search_goes_on_while_it_finds_more():
    modes = search(log_density(grid_of_gaussians), gaussian_fit(2))
    assert len(modes) == 12 and modes.num_starts > 300
    assert_close(modes.log_masses, torch.zeros(12), rtol=0, atol=1e-3)


def test_search_stops_when_it_is_told():
    modes = search(log_density(grid_of_gaussians), gaussian_fit(2), lambda: True)
    assert modes.num_starts == 64 and not len(modes)


def test_an_angle_has_one_mode_a_turn():
    """A von Mises density repeats itself after a full turn, but its support is the real line."""

    def model():
        angle = pyro.sample("angle", dist.VonMises(0.5, 4.0))
        pyro.sample("y", dist.Normal(2 * angle.cos(), 0.3), obs=torch.tensor(1.0))

    modes = search(log_density(model), gaussian_fit(1))
    assert len(modes) == 2  # at about one and minus one
    assert bool((modes.points.abs() < torch.pi).all())


def test_models_that_cannot_be_vectorised_are_searched():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.factor("factor", -(z**4).sum())  # mixes particles

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(3), 0.4).to_event(1))

    result = diagnose(model, guide, num_samples=100, vectorize=False, restarts=4)
    assert result.num_modes == 1 and not result.missed_modes


def many_modes():
    """Each of ten coordinates is near one of two values, so that every one of the 1,024 modes has a small mass."""
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (10,)))
    pyro.factor("wells", -8 * (x.square() - 1).square().sum(-1))


def test_small_modes_count_together():
    def corner():
        pyro.sample("x", dist.Normal(torch.ones(10), 0.13).to_event(1))

    def everywhere():
        sign = 2 * pyro.sample("sign", dist.Bernoulli(0.5).expand([10]).to_event(1), infer={"is_auxiliary": True}) - 1
        pyro.sample("x", dist.Normal(sign, 0.13).to_event(1))

    missed = diagnose(many_modes, corner, restarts=RESTARTS)
    assert len(missed.missed_modes) > 10 and not missed.reliable
    assert all(mode.mass < 0.6 for mode in missed.modes)
    found = diagnose(many_modes, everywhere, restarts=RESTARTS)
    assert found.num_modes > 10 and not found.missed_modes


def test_modes_are_told_with_their_weights():
    result = diagnose(product, both_branches, restarts=RESTARTS)
    assert [mode.weight for mode in result.modes] == pytest.approx([0.5, 0.5], abs=0.1)
    assert sum(mode.weight for mode in result.modes) == pytest.approx(1.0)
    assert result.modes[0].mass >= result.modes[1].mass


def test_rng_free_default_leaves_results_alone():
    results = []
    for restarts in (0, 4):
        pyro.set_rng_seed(0)
        results.append(diagnose(product, one_branch, num_samples=100, restarts=restarts))
    assert torch.equal(results[0].log_weights, results[1].log_weights)


# Errors


def test_discrete_latents_cannot_be_searched():
    model = guide = lambda: pyro.sample("k", dist.Bernoulli(0.5))
    with pytest.raises(
        ValueError,
        match="restarts must be 0 for this model.*'k'|restarts must be 0 for this model.*no continuous latents",
    ):
        diagnose(model, guide, restarts=4)


def test_models_without_gradients_cannot_be_searched():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
        pyro.factor("step", -(z.detach() ** 2))

    with pytest.raises(ValueError, match="restarts must be 0 for this model.*grad"):
        diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=25, restarts=4)


def test_negative_restarts():
    with pytest.raises(ValueError, match="restarts must be at least 0, but got -1"):
        diagnose(product, one_branch, restarts=-1)


def test_no_mode_is_missed_along_a_ridge_that_the_guide_covers():
    """Rounding makes modes of points along a ridge, whose Gaussians are much too long."""

    def circle():
        x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        pyro.factor("radius", dist.Normal(x.square().sum(-1), 0.3).log_prob(torch.tensor(4.0)))

    density, log_evidence = log_density(circle), math.log(math.pi)  # the square of the radius is uniform
    angle = torch.linspace(0, 2 * math.pi, 41)[:-1]
    normal = torch.stack([angle.cos(), angle.sin()], -1)
    tangent = torch.stack([-angle.sin(), angle.cos()], -1)
    factors = torch.stack([0.075 * normal, 10 * tangent], -1)
    values = density(2 * normal)
    modes = Modes(64, 2 * normal, values, torch.linalg.cholesky(factors @ factors.mT), torch.float64)
    turn = 2 * math.pi * torch.rand(4000)
    samples = {"x": 2 * torch.stack([turn.cos(), turn.sin()], -1)}
    weights = torch.full((4000,), 1 / 4000)
    found = judge_modes(density, modes, samples, weights, log_evidence)
    assert sum(mode.missed for mode in found) > 20
    found = judge_modes(density, modes, samples, weights, log_evidence, lambda x: density(x) - log_evidence)
    assert not any(mode.missed for mode in found)
