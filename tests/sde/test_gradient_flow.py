# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from pyro_hollow.experiments.sde_gradient_flow import VARIANCE, Config, simulate, truth
from pyro_hollow.sde import DiagonalSDE, fit_gradient_flow
from pyro_hollow.sde.assignments import _assign
from pyro_hollow.sde.identification import _crossing, draw_waves, profile_interval
from pyro_hollow.sde.potentials import PotentialBasis
from pyro_hollow.sde.pushed_cosines import Estimate, Objective, Snapshots, fit_moments
from pyro_hollow.sde.starts import gaussian_start, transport_start
from pyro_hollow.sde.transitions import noise_directions, transition

not_identified = pytest.mark.filterwarnings("ignore:the data do not identify")


def quadratic(basis, hessian):
    """Coefficients of x H x / 2, by regression, as the basis holds it."""
    x = torch.randn(200, len(hessian))
    slopes = basis.slopes(x)[..., basis.band < 0].flatten(0, 1)
    c = torch.zeros(len(basis))
    c[basis.band < 0] = torch.linalg.lstsq(slopes, (x @ hessian).flatten().unsqueeze(-1)).solution.squeeze(-1)
    return c


def wide_basis(d):
    """A basis whose box holds all that the tests sample."""
    return PotentialBasis(torch.cat([10 * torch.eye(d), -10 * torch.eye(d), torch.randn(50, d)]))


def ornstein_uhlenbeck(hessian, variance, x, h):
    """The transition of dx = -H x dt + noise with one variance per coordinate: mean and covariance, by quadrature."""
    s, weights = (torch.arange(2000) + 0.5) * h / 2000, h / 2000
    flows = torch.matrix_exp(-s[:, None, None] * hessian)
    covariance = (flows @ torch.diag(variance) @ flows.mT).sum(0) * weights
    return x @ torch.matrix_exp(-h * hessian), covariance


@pytest.mark.parametrize("d", [1, 2, 5])
def test_basis_against_autograd(d):
    basis = PotentialBasis(torch.randn(300, d) + 2)
    c = torch.randn(len(basis))
    x = (3 * torch.randn(20, d) + 2).requires_grad_()  # in the box of the data and beyond
    gradient, hessian = basis.derivatives(c, x.detach())
    expected = torch.autograd.grad((basis.values(x) @ c).sum(), x, create_graph=True)[0]
    rows = [torch.autograd.grad(expected[:, i].sum(), x, retain_graph=True)[0] for i in range(d)]
    assert_close(gradient, expected.detach())
    assert_close(hessian, torch.stack(rows, 1))
    assert_close(torch.einsum("ndm,m->nd", basis.slopes(x.detach()), c), gradient)
    value, slope = basis.beyond(x)
    assert_close(slope.detach(), torch.autograd.grad(value.sum(), x)[0])


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("diagonal", [False, True])
def test_transition_of_ornstein_uhlenbeck(diagonal, steps):
    basis, hessian = wide_basis(2), torch.tensor([[2.0, 0.7], [0.7, -0.5]])
    variance = torch.tensor([0.3, 0.9]) if diagonal else torch.tensor([0.4])
    x = torch.randn(5, 2)
    found = transition(basis, quadratic(basis, hessian), variance, x, 0.6, noise_directions(2, diagonal), steps=steps)
    mean, covariance = ornstein_uhlenbeck(hessian, variance.expand(2), x, 0.6)
    assert_close(found.mean, mean, rtol=1e-6, atol=1e-6)
    assert_close(found.covariance(variance), covariance.expand(5, 2, 2), rtol=1e-6, atol=1e-6)


def test_transition_in_parts_has_the_same_law():
    basis, hessian = wide_basis(2), torch.tensor([[2.0, 0.7], [0.7, 1.5]])
    variance, x = torch.tensor([0.4]), torch.tensor([[1.0, -0.5]]).expand(20_000, 2)
    found = transition(
        basis, quadratic(basis, hessian), variance, x, 0.6, noise_directions(2, False), draws=torch.randn(2, 20_000, 2)
    )
    mean, covariance = ornstein_uhlenbeck(hessian, variance.expand(2), x, 0.6)
    assert_close(found.mean.mean(0), mean[0], rtol=0, atol=0.02)
    assert_close(torch.cov(found.mean.T) + found.covariance(variance)[0], covariance, rtol=0, atol=0.01)


def test_slopes_of_the_transition():
    basis = PotentialBasis(torch.randn(100, 2))
    c, v, x = 0.02 * torch.randn(len(basis)), torch.tensor([0.2, 0.5]), torch.randn(6, 2)
    draws, noise, h = torch.randn(1, 6, 2), noise_directions(2, True), 1e-4

    def mean(c, v, draws=draws):
        return transition(basis, c, v, x, 0.2, noise, draws=draws).mean

    # Of coefficients: exact but for the dependence of the linearisation on the Hessian, of higher order in the gap.
    calm = torch.zeros_like(draws)
    slopes = transition(basis, c, v, x, 0.2, noise, draws=calm, slopes=True).slopes
    direction = torch.where(basis.band <= 0, torch.randn(len(basis)), 0.0)
    numeric = (mean(c + h * direction, v, calm) - mean(c - h * direction, v, calm)) / (2 * h)
    assert_close(slopes[..., :-2] @ direction, numeric, rtol=0, atol=0.02 * float(numeric.abs().max()))
    # Of variances: exact but for the effect on later Hessians.
    slopes = transition(basis, 0 * c, v, x, 0.2, noise, draws=draws, slopes=True).slopes
    for i in range(2):
        step = h * torch.eye(2)[i]
        assert_close(slopes[..., i - 2], (mean(0 * c, v + step) - mean(0 * c, v - step)) / (2 * h))


def snapshots(basis, times, same, missing=0):
    """Times of a Brownian motion, of 400 particles."""
    n, overlap = 400, 1 / 400 if same else 0.0
    x = [torch.randn(n, 1)]
    for k in range(1, times):
        later = x[-1] + 0.3 * torch.randn(n, 1)
        x.append(later if same else math.sqrt(1 + 0.09 * k) * torch.randn(n, 1))
    kept = [y[torch.randperm(n)[missing:]] for y in x]
    return Snapshots(kept, [1.0] * (times - 1), overlap, noise_directions(1, False), basis)


@pytest.mark.parametrize("missing", [0, 100], ids=["all", "some missing"])
@pytest.mark.parametrize("same", [False, True], ids=["fresh", "same"])
def test_covariance_of_moments_against_simulation(same, missing):
    """Of two gaps, among them the covariance between neighbours."""
    basis, v = PotentialBasis(torch.randn(100, 1)), torch.tensor([0.09])
    c, waves = torch.zeros(len(basis)), [torch.tensor([[0.7], [2.0]])] * 2
    first = Objective(snapshots(basis, 3, same, missing), waves, [(1, 1)] * 2, torch.Generator())
    moments, covariances = [], []
    for k in range(150):
        objective = Objective(snapshots(basis, 3, same, missing), waves, [(1, 1)] * 2, torch.Generator())
        objective.maps, objective.count = first.maps, first.count  # the same combinations of waves
        objective.observed = [
            torch.cat([(y @ w.T).cos(), (y @ w.T).sin()], -1) @ m
            for y, w, m in zip(objective.data.x[1:], waves, first.maps, strict=True)
        ]
        moments.append(objective.residual(c, v))
        if k < 20:
            covariances.append(objective.linearise(c, v, slopes=False)[1])
    expected = torch.cov(torch.stack(moments).T)
    scale = expected.diagonal().sqrt()
    unit = scale * scale.unsqueeze(-1)
    assert_close(torch.stack(covariances).mean(0) / unit, expected / unit, rtol=0, atol=0.35)
    assert (torch.stack(moments).mean(0) / scale).abs().max() < 4 / math.sqrt(150)


def test_assignments_against_brute_force():
    basis = PotentialBasis(torch.randn(100, 2))
    v, x, y = torch.tensor([0.3]), torch.randn(7, 2), torch.randn(9, 2)
    pushed = transition(basis, 0.01 * torch.randn(len(basis)), v, x, 0.5, noise_directions(2, False))
    normal = torch.distributions.MultivariateNormal(pushed.mean, pushed.covariance(v))
    joint = normal.log_prob(y.unsqueeze(1))
    r = joint.softmax(-1)
    offset = y.unsqueeze(1) - pushed.mean
    found = _assign(pushed, pushed.covariance(v), y)
    assert_close(found.weight, r.sum(0))
    assert_close(found.first, torch.einsum("ji,jid->id", r, offset))
    assert_close(found.second, torch.einsum("ji,jid,jie->ide", r, offset, offset))
    assert_close(found.log_prob, float((joint.logsumexp(-1) - math.log(7)).sum()))


def test_starts_find_the_contraction():
    x = torch.randn(600, 2) @ torch.tensor([[1.0, 0.3], [0.0, 0.8]])
    hessian = torch.tensor([[0.5, 0.2], [0.2, 0.3]])
    later = x @ torch.matrix_exp(-hessian)
    data = Snapshots([x, later], [1.0], 0.0, noise_directions(2, False), PotentialBasis(torch.cat([x, later])))
    assert_close(data.basis.derivatives(gaussian_start(data), x)[0], x @ hessian, rtol=1e-4, atol=1e-4)
    gradient = data.basis.derivatives(transport_start(data), x)[0]
    assert torch.cosine_similarity(gradient, x @ hessian, dim=-1).mean() > 0.95


def test_ends_of_the_profile():
    values = [1.0, 2.0, 4.0, 8.0]
    excess = [0.0, 1.0, 4.0, 9.0]  # its root is linear in the logarithm
    assert _crossing(values, excess, 2.25) == pytest.approx(2**1.5)
    assert _crossing(values, excess, 10.0) is None


@pytest.mark.parametrize("same", [False, True], ids=["fresh", "same"])
def test_profile_of_brownian_motion(same):
    """With the same particles chi^2 alone prefers a larger variance than together with the log-determinant."""
    basis = PotentialBasis(torch.randn(400, 1))
    data = snapshots(basis, 3, same)
    generator = torch.Generator().manual_seed(1)
    objective = Objective(data, [draw_waves(y, 4.0, 2, generator) for y in data.x[1:]], [(1, 1)] * 2, generator)
    start = Estimate(torch.zeros(len(basis)), torch.tensor([0.09]), torch.full((len(basis),), 1e6))
    estimate = fit_moments(objective, start, steps=5, evidence=False)
    best, low, high = profile_interval(objective, estimate, 0, lambda stage: None)
    assert low < 0.09 < high and low < best.v < high
    if same:
        values = [0.03, 0.06, 0.09, 0.12, 0.18, 0.27]
        found = [fit_moments(objective, Estimate(start.c, torch.tensor([v]), start.precision), steps=0) for v in values]
        chi2, loss = [e.chi2 for e in found], [e.loss for e in found]
        assert chi2.index(min(chi2)) > loss.index(min(loss))


def ou_samples(t, n, d=1, theta=2.0, variance=0.5, start=2.0, same=False):
    """Of dx = -theta x dt + sqrt(variance) dW from N(start, 0.3^2), fresh at each time or along paths."""
    x, found, last = start + 0.3 * torch.randn(n, d), [], 0.0
    for time in t:
        if not same:
            x, last = start + 0.3 * torch.randn(n, d), 0.0
        decay = math.exp(-theta * (time - last))
        x = decay * x + math.sqrt(variance * (1 - decay**2) / (2 * theta)) * torch.randn(n, d)
        last = time
        found.append(x[torch.randperm(n)])
    return found


TIMES = [0.0, 0.2, 0.5, 1.0]  # gaps of different lengths


def test_fresh_particles_in_one_dimension():
    sizes = ou_samples(TIMES, 500)
    sizes[1] = sizes[1][:300]  # particles may be missing
    fit = fit_gradient_flow(TIMES, sizes, seed=0, progress=False)
    low, high = fit.variance_interval
    assert fit.identified and low < 0.5 < high
    assert 0.5 < fit.chi2_per_moment < 1.5 and fit.sizes == (500, 300, 500, 500)
    x = torch.linspace(0.2, 2.0, 10).unsqueeze(-1)
    assert (fit.drift(x) + 2 * x).abs().max() < 0.6
    text = str(fit)
    assert "fresh particles" in text and "The data identify it." in text and "Warning" not in text
    # Derivatives, types and units of what is public.
    points = (4 * torch.randn(20, 1)).requires_grad_()
    assert_close(-torch.autograd.grad(fit.potential(points).sum(), points)[0], fit.drift(points).detach())
    assert fit.drift(x.float()).dtype == torch.float32 and fit.potential(x.expand(3, 10, 1)).shape == (3, 10)
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 1\), but got \(5, 2\)"):
        fit.potential(torch.zeros(5, 2))
    # Far away it does not run away.
    far = torch.tensor([[-100.0], [100.0]])
    assert (fit.drift(far) * far < 0).all() and fit.drift(far).abs().max() < 1e4
    assert isinstance(fit.sde, DiagonalSDE)
    assert_close(fit.sde.sample(sizes[0], TIMES, 0.02)[-1].mean(), sizes[3].mean(), rtol=0, atol=0.1)


@pytest.mark.slow
def test_units_of_time_and_space_do_not_matter():
    x = ou_samples(TIMES, 200)
    fit = fit_gradient_flow(TIMES, x, seed=0, progress=False)
    other = fit_gradient_flow([10 * t + 5 for t in TIMES], [100 * y - 7 for y in x], seed=0, progress=False)
    assert_close(other.variance, fit.variance * 1e4 / 10, rtol=1e-3, atol=0)
    points = torch.tensor([[0.5], [1.0]])
    assert_close(other.drift(100 * points - 7), fit.drift(points) * 100 / 10, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@not_identified
def test_single_precision_is_converted():
    x = ou_samples(TIMES, 100)
    fit = fit_gradient_flow(torch.tensor(TIMES).float(), [y.float() for y in x], seed=0, progress=False)
    assert fit.variance.dtype == torch.float64


@not_identified
def test_equilibrium_is_not_identified():
    x = [0.5 * torch.randn(200, 1) for _ in range(3)]
    with pytest.warns(UserWarning, match="the data do not identify the variance"):
        fit = fit_gradient_flow([0.0, 0.5, 1.0], x, seed=0, progress=False)
    assert not fit.identified
    assert "The data do not identify it" in str(fit) and "Warning: the data do not identify" in str(fit)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # so few particles do not identify the variance to a factor of 2
def test_same_particles_with_some_missing():
    t = [0.0, 0.05, 0.1]
    x = torch.stack(ou_samples(t, 300, d=2, same=True))
    x[1, :10] = math.nan
    fit = fit_gradient_flow(t, x, same_particles=True, seed=0, progress=False)
    assert fit.sizes == (300, 290, 300) and "the same particles" in str(fit)
    assert abs(float(fit.variance) / 0.5 - 1) < 0.25
    low, high = fit.variance_interval
    assert low < 0.5 < high


@pytest.mark.slow
def test_diagonal_diffusion():
    first, second = ou_samples(TIMES, 1500), ou_samples(TIMES, 1500, variance=1.5, theta=1.0)
    x = [torch.cat(pair, -1) for pair in zip(first, second, strict=True)]
    fit = fit_gradient_flow(TIMES, x, diagonal=True, seed=0, progress=False)
    assert fit.variance.shape == fit.variance_interval[0].shape == (2,) and fit.identified
    assert_close(fit.variance, torch.tensor([0.5, 1.5]), rtol=0.15, atol=0)
    assert "coordinate 1" in str(fit)


GOOD = [torch.randn(60, 2, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in range(3)]


@pytest.mark.parametrize(
    "t, x, options, message",
    [
        ([0.0], GOOD[:1], {}, "t must hold two or more times"),
        ([0.0, 1.0, 1.0], GOOD, {}, "t must increase, but got"),
        ([0.0, math.inf, 1.0], GOOD, {}, "t must be finite"),
        ([0.0, 1.0], GOOD, {}, "x must hold particles for each of the 2 times of t, but holds 3"),
        ([0.0, 1.0], torch.zeros(2, 60), {}, r"x must have shape \(n, N, d\)"),
        ([0.0, 1.0], [GOOD[0], GOOD[1][:, :1]], {}, r"x\[1\] has shape \(60, 1\)"),
        ([0.0, 1.0], torch.zeros(2, 60, 1, dtype=torch.int64), {}, "x must be of a floating-point type"),
        ([0.0, 1.0], [GOOD[0], GOOD[1].where(GOOD[1] < 0, math.nan)], {}, r"x\[1\] must be finite, but is nan"),
        ([0.0, 1.0], [GOOD[0], GOOD[1] / 0], {}, r"x\[1\] must be finite, but is -?inf"),
        ([0.0, 1.0], [GOOD[0], GOOD[1][:5]], {}, r"at least 50 particles at each time, but x\[1\] holds 5"),
        ([0.0, 1.0], [GOOD[0], GOOD[1][:55]], {"same_particles": True}, "the same number of rows at all times"),
        ([0.0, 1.0], [GOOD[0], GOOD[1] * torch.tensor([1.0, 0.0])], {}, r"coordinate 1 of x\[1\] is constant"),
    ],
)  # fmt: skip
def test_errors(t, x, options, message):
    with pytest.raises(ValueError, match=message):
        fit_gradient_flow(t, x, progress=False, **options)


def simulated(potential, kind, gap, seed, dim=2):
    config = Config(potential, kind, gap, dim, seed)
    times, x = simulate(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of runs that do not identify the variance
        fit = fit_gradient_flow(times, x, same_particles=kind == "same", seed=seed, progress=False)
    true = truth(potential).f(times[1], x[1]).detach()
    return fit, float((fit.drift(x[1]) - true).abs().sum() / true.abs().sum())


@pytest.mark.slow
@pytest.mark.parametrize("potential", ["quadratic", "styblinski-tang", "wavy-plateau", "oakley-ohagan"])
def test_ten_seeds_of_the_same_particles(potential):
    runs = [simulated(potential, "same", 0.01, seed) for seed in range(10)]
    errors = torch.tensor([abs(float(fit.variance) / VARIANCE - 1) for fit, _ in runs])
    assert errors.median() < 0.05 and errors.max() < 0.1
    assert torch.tensor([drift for _, drift in runs]).median() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.1, 0.3])
def test_ten_seeds_of_fresh_particles(gap):
    runs = [simulated("quadratic", "fresh", gap, seed)[0] for seed in range(10)]
    assert sum(bool(fit.variance_interval[0] <= VARIANCE <= fit.variance_interval[1]) for fit in runs) >= 9
    assert sum(fit.identified for fit in runs) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("kind, gap", [("fresh", 0.01), ("equilibrium", 0.1)])
def test_ten_seeds_without_information(kind, gap):
    assert sum(simulated("quadratic", kind, gap, seed)[0].identified for seed in range(10)) <= 1


@pytest.mark.slow
def test_ten_dimensions():
    fit, drift = simulated("quadratic", "same", 0.01, 0, dim=10)
    assert abs(float(fit.variance) / VARIANCE - 1) < 0.1 and drift < 0.1
