# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import copy
import functools
import math
import pickle
import re

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pyro_hollow import Solver, conditional_hollow_cnf
from pyro_hollow.nn import HollowNN
from pyro_hollow.sde import (
    DiagonalSDE,
    FlowMarginals,
    FokkerPlanckMatching,
    GaussianMixtureMarginals,
    fit,
    fokker_planck_rhs,
    log_density_derivatives,
    probability_flow,
)

#: Most tests learn a diffusion, as a convention.
pytestmark = pytest.mark.filterwarnings("ignore:a learned diffusion is a convention:UserWarning")


class OrnsteinUhlenbeck:
    r""":math:`dx = -\theta \odot x \, dt + \sigma \odot dW` from a Gaussian, whose marginals stay Gaussian."""

    start_mean, start_var = 1.0, 0.2

    def __init__(self, d):
        self.theta, self.sigma = torch.linspace(0.5, 2.0, d), torch.linspace(0.3, 1.0, d)
        self.sde = DiagonalSDE(lambda t, x: -self.theta * x, lambda t, x: self.sigma.expand_as(x))

    def moments(self, t):
        decay = (-self.theta * t.unsqueeze(-1)).exp()
        stationary = self.sigma**2 / (2 * self.theta)
        return self.start_mean * decay, stationary + (self.start_var - stationary) * decay**2

    def log_prob(self, t, x):
        mean, var = self.moments(t)
        return -0.5 * ((x - mean) ** 2 / var + (2 * math.pi * var).log()).sum(-1)

    def score(self, t, x):
        mean, var = self.moments(t)
        return (mean - x) / var

    def rate(self, t, x):
        """Of the log-density, from the rates of mean and variance."""
        mean, var = self.moments(t)
        d_mean, d_var = -self.theta * mean, self.sigma**2 - 2 * self.theta * var
        z = x - mean
        return (z * d_mean / var + 0.5 * d_var / var * (z**2 / var - 1)).sum(-1)

    def sample(self, t, d):
        mean, var = self.moments(t)
        return mean + var.sqrt() * torch.randn(*t.shape, d)


class GeometricBrownianMotion:
    """dx = mu x dt + sigma x dW from 1 at time 0: log-normal."""

    mu, sigma = 0.1, 0.5

    def __init__(self, d):
        self.sde = DiagonalSDE(lambda t, x: self.mu * x, lambda t, x: self.sigma * x)

    def _standard(self, t, x):
        t = t.unsqueeze(-1)
        return t, (x.log() - (self.mu - self.sigma**2 / 2) * t) / (self.sigma * t.sqrt())

    def log_prob(self, t, x):
        t, z = self._standard(t, x)
        return (-0.5 * z**2 - (x * self.sigma * (2 * math.pi * t).sqrt()).log()).sum(-1)

    def rate(self, t, x):
        t, z = self._standard(t, x)
        dz = -(self.mu - self.sigma**2 / 2) / (self.sigma * t.sqrt()) - z / (2 * t)
        return (-z * dz - 0.5 / t).sum(-1)

    def sample(self, t, d):
        return (
            (self.mu - self.sigma**2 / 2) * t[:, None] + self.sigma * t[:, None].sqrt() * torch.randn(len(t), d)
        ).exp()


PROCESSES = {"OU": OrnsteinUhlenbeck, "GBM": GeometricBrownianMotion}
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
each_form = pytest.mark.parametrize("form", ["log", "density"])


@each_process
@each_form
@pytest.mark.parametrize("d", [1, 2, 10])
def test_closed_forms(process, form, d):
    process, t = process(d), 0.5 + torch.rand(20)
    x = process.sample(t, d)
    expected = process.rate(t, x) * (1 if form == "log" else process.log_prob(t, x).exp())
    value = fokker_planck_rhs(process.log_prob, process.sde, t, x, form)
    assert_close(value, expected, rtol=1e-8, atol=1e-8)
    assert expected.abs().max() > 1e-4
    assert_close(log_density_derivatives(process.log_prob, t, x).rate, process.rate(t, x), rtol=1e-8, atol=1e-8)


@each_process
def test_single_precision(process):
    process, t = process(2), 0.5 + torch.rand(20)
    x = process.sample(t, 2)
    expected = fokker_planck_rhs(process.log_prob, process.sde, t, x)
    for name in ("theta", "sigma"):
        if isinstance(getattr(process, name, None), torch.Tensor):
            setattr(process, name, getattr(process, name).float())
    value = fokker_planck_rhs(process.log_prob, process.sde, t.float(), x.float())
    assert value.dtype == torch.float32
    assert_close(value, expected.float(), rtol=1e-3, atol=1e-3)


def slides_rhs(density, sde, t, x):
    """The expansion of the slides, divided by p: in the terms of D^2 g and 2 D g a factor g is missing, and (D g)^2."""
    _, _, s, ds = log_density_derivatives(density, t, x)
    f, df = sde.bind().drift_derivatives(t, x)
    g, dg, d2g = sde.bind().diffusion_derivatives(t, x)
    return (-df - f * s + d2g + 2 * dg * s + 0.5 * g**2 * (ds + s**2)).sum(-1)


def test_expansion_of_the_slides_fails():
    process = GeometricBrownianMotion(1)
    t, x = torch.ones(3), torch.tensor([[0.5], [1.0], [2.0]])
    exact = torch.tensor([0.4597, -0.5013, 0.4597])
    assert_close(process.rate(t, x), exact, rtol=0, atol=1e-4)
    assert_close(fokker_planck_rhs(process.log_prob, process.sde, t, x), process.rate(t, x))
    wrong = torch.tensor([2.72, -1.30, 0.21])
    assert_close(slides_rhs(process.log_prob, process.sde, t, x), wrong, rtol=0, atol=1e-2)
    # Constant diffusion hides the error.
    process, t, x = OrnsteinUhlenbeck(2), torch.rand(5), torch.randn(5, 2)
    assert_close(slides_rhs(process.log_prob, process.sde, t, x), process.rate(t, x))


def conservation_form(log_prob, sde, t, x):
    r""":math:`-\sum_i \partial_i (f_i p) + \frac{1}{2} \sum_i \partial_i^2 (g_i^2 p)` as it stands, term by term."""
    x = x.detach().requires_grad_()
    p = log_prob(t, x).exp()
    total = torch.zeros_like(p)
    for i, (flux, spread) in enumerate(
        zip((sde.f(t, x) * p[:, None]).unbind(-1), (sde.g(t, x) ** 2 * p[:, None] / 2).unbind(-1), strict=True)
    ):
        slope = torch.autograd.grad(spread.sum(), x, create_graph=True)[0][:, i]
        total = total - torch.autograd.grad(flux.sum(), x, create_graph=True)[0][:, i]
        total = total + torch.autograd.grad(slope.sum(), x, create_graph=True)[0][:, i]
    return total


def networks(d, **kwargs):
    sde = DiagonalSDE(HollowNN(d, [8, 4], **kwargs), HollowNN(d, [8, 4], **kwargs))
    for net in (sde.drift, sde.diffusion):
        for parameter in net.transformer.parameters():
            nn.init.normal_(parameter, std=0.5)
    return sde


def mixture(d, **kwargs):
    density = GaussianMixtureMarginals(d, 3, (0.0, 1.0), **kwargs)
    nn.init.normal_(density.curve.bias, std=0.5)
    return density


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("conditioner", ["grouped", "masked"])
def test_conservation_form(d, conditioner):
    density, sde, t, x = mixture(d), networks(d, conditioner=conditioner), torch.rand(6), torch.randn(6, d)
    expected = conservation_form(density.log_prob, sde, t, x)
    assert_close(fokker_planck_rhs(density, sde, t, x, "density"), expected)
    assert_close(fokker_planck_rhs(density, sde.bind(), t, x), expected / density.log_prob(t, x).exp())
    gradients = [
        torch.autograd.grad(value.sin().sum(), [*sde.parameters()], allow_unused=True, materialize_grads=True)
        for value in (fokker_planck_rhs(density, sde, t, x, "density"), expected)
    ]
    assert_close(*gradients)


def test_form_must_be_known():
    process = OrnsteinUhlenbeck(1)
    with pytest.raises(ValueError, match="form must be 'log' or 'density', but got 'p'"):
        fokker_planck_rhs(process.log_prob, process.sde, torch.tensor(0.0), torch.zeros(1, 1), "p")


def test_probability_flow_carries_the_marginals():
    process, t0 = OrnsteinUhlenbeck(3), torch.zeros(50)
    x0 = process.sample(t0, 3)
    flow = probability_flow(process.score, process.sde)
    end = Solver(rtol=1e-8, atol=1e-8).integrate(flow, x0, 0.0, 1.0).state
    # Along the flow of Gaussians with diagonal covariance, the standardised position stays.
    (mean0, var0), (mean1, var1) = process.moments(t0), process.moments(t0 + 1)
    assert_close(end, mean1 + (x0 - mean0) * (var1 / var0).sqrt(), rtol=1e-6, atol=1e-6)


def test_probability_flow_with_state_dependent_noise():
    process = GeometricBrownianMotion(1)
    x0 = process.sample(torch.full((50,), 0.5), 1)
    flow = probability_flow(lambda t, x: log_density_derivatives(process.log_prob, t, x).score, process.sde)
    end = Solver(rtol=1e-8, atol=1e-8).integrate(flow, x0, 0.5, 1.5).state
    z = [process._standard(torch.full((50,), t), x)[1] for t, x in ((0.5, x0), (1.5, end))]
    assert_close(*z, rtol=1e-6, atol=1e-6)


def test_currents_are_not_identifiable():
    # A rotation of an isotropic density, and noise that the drift makes up for, leave the right-hand side as it is.
    density = GaussianMixtureMarginals(2, 1, (0.0, 1.0))
    density.initialize(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    t, x = torch.rand(20), torch.randn(20, 2)
    score = lambda t, x: density.derivatives(t, x).score  # noqa: E731
    calm = DiagonalSDE(lambda t, x: -0.25 * x, lambda t, x: 0.5 * torch.ones_like(x))
    with torch.no_grad():
        density.curve.weight.zero_()  # a stationary, isotropic Gaussian
    rotation = DiagonalSDE(lambda t, x: -0.25 * x + 3 * torch.stack([-x[:, 1], x[:, 0]], -1), calm.diffusion)
    louder = DiagonalSDE(lambda t, x: -0.25 * x + 0.5 * (1 - 0.25) * score(t, x), lambda t, x: torch.ones_like(x))
    expected = fokker_planck_rhs(density, calm, t, x)
    for other in (rotation, louder):
        assert (other.f(t, x) - calm.f(t, x)).abs().max() > 0.1
        assert_close(fokker_planck_rhs(density, other, t, x), expected)


class Exact(nn.Module):
    """A process's density as a module."""

    def __init__(self, process, d):
        super().__init__()
        self.process, self.d = process, d
        self.log_prob = process.log_prob

    def derivatives(self, t, x):
        return log_density_derivatives(self.process.log_prob, t, x)

    def sample(self, t):
        return self.process.sample(t, self.d)


@each_process
@pytest.mark.parametrize("where", ["data", "proposal", "both"])
def test_truth_has_no_residual(process, where):
    process, t = process(2), 0.5 + torch.rand(50)
    x = process.sample(t, 2)
    loss = FokkerPlanckMatching(Exact(process, 2), process.sde, where=where, weight=3.0, broadening=0.0)(t, x)
    assert loss.residual < 1e-16
    assert_close(loss.nll, -process.log_prob(t, x).mean())
    other = DiagonalSDE(process.sde.drift, lambda t, x: 1.1 * process.sde.diffusion(t, x))
    loss = FokkerPlanckMatching(Exact(process, 2), other, where=where, weight=3.0, broadening=0.0)(t, x)
    assert loss.residual > 1e-3
    assert_close(loss.total, loss.nll + 3 * loss.residual)


def test_proposal_is_broad_and_between_the_times():
    seen = []
    process, t = OrnsteinUhlenbeck(1), torch.tensor([0.0, 1.0]).repeat(500)
    x = process.sample(t, 1)

    def drift(t, x):
        seen.append((t, x))
        return -x

    for broadening in (0.0, 5.0):
        FokkerPlanckMatching(
            Exact(process, 1), DiagonalSDE(drift, process.sde.diffusion), where="proposal", broadening=broadening
        )(t, x)
    (times, points), (_, broad) = seen
    assert times.min() >= 0 and times.max() <= 1 and 0.4 < times.mean() < 0.6 and len(times.unique()) == 1000
    assert points.std() < 2 * x.std() and broad.std() > 4 * x.std()


@pytest.mark.parametrize(
    "learned", [lambda: HollowNN(2), lambda: nn.Parameter(torch.ones(()))], ids=["net", "constant"]
)
def test_a_learned_diffusion_warns_once(learned):
    with pytest.warns(UserWarning, match="a learned diffusion is a convention") as record:
        FokkerPlanckMatching(mixture(2), DiagonalSDE(HollowNN(2), learned(), min_diffusion=0.5))
    assert len(record) == 1 and record[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_a_given_diffusion_does_not_warn():
    for given in (0.5, torch.tensor([0.5, 1.0]), lambda t, x: torch.ones_like(x)):
        FokkerPlanckMatching(mixture(2), DiagonalSDE(HollowNN(2), given))


def test_every_parameter_is_trained():
    matching = FokkerPlanckMatching(mixture(2), networks(2))
    matching(torch.rand(20), torch.randn(20, 2)).total.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in matching.parameters())


def test_fit_learns_ornstein_uhlenbeck():
    """From marginals alone, with the noise known, to the drift that made them."""
    process = OrnsteinUhlenbeck(1)
    t = torch.linspace(0, 1, 6).repeat(500)
    x = process.sample(t, 1)
    density = GaussianMixtureMarginals(1, 1, (0.0, 1.0))
    density.initialize(x)
    sde = DiagonalSDE(HollowNN(1, [8]), process.sde.diffusion)
    losses = []
    fit(
        FokkerPlanckMatching(density, sde), t, x, steps=400, batch_size=256, lr=0.02,
        progress=lambda step, loss: losses.append((step, loss.total.item())),
    )  # fmt: skip
    assert [step for step, _ in losses] == list(range(1, 401))
    times = torch.rand(1000)
    points = process.sample(times, 1)
    error = (sde.f(times, points) - process.sde.f(times, points)).square().mean().sqrt()
    assert error < 0.15 * process.sde.f(times, points).square().mean().sqrt()


def test_fit_stops_at_what_is_not_finite():
    matching = FokkerPlanckMatching(mixture(1), DiagonalSDE(HollowNN(1), lambda t, x: x * math.inf))
    with pytest.raises(ArithmeticError, match="in step 1; a smaller lr than 0.01"):
        fit(matching, torch.rand(10), torch.randn(10, 1), steps=2, batch_size=4)


class Root(nn.Module):
    """A finite diffusion, whose derivative with respect to its parameter is infinite."""

    def __init__(self):
        super().__init__()
        self.square = nn.Parameter(torch.zeros(1))

    def forward(self, t, x):
        return (0.5 + self.square.sqrt()).expand_as(x)


def test_fit_stops_at_a_gradient_that_is_not_finite_and_changes_no_parameter():
    matching = FokkerPlanckMatching(mixture(1), DiagonalSDE(HollowNN(1), Root()))
    t, x, before = torch.rand(50), torch.randn(50, 1), copy.deepcopy([*matching.parameters()])
    assert matching(t, x).total.isfinite()
    with pytest.raises(ArithmeticError, match="norm of the gradient is (inf|nan) in step 1"):
        fit(matching, t, x, steps=2)
    assert_close([*matching.parameters()], before, rtol=0, atol=0)


def snapshots(n=300, dtype=None):
    """Two coordinates of unlike scales that drift apart."""
    torch.manual_seed(1)
    t = torch.rand(n, dtype=dtype)
    return t, torch.stack([2 * t + torch.randn(n, dtype=dtype), 0.1 * torch.randn(n, dtype=dtype) - t], -1)


def learned(t, x, steps=20, sde=lambda c: DiagonalSDE(HollowNN(2), HollowNN(2)), c=1.0, interval=(0.0, 1.0), **kwargs):
    """A fit from a seed of its own."""
    torch.manual_seed(2)
    density, equation = GaussianMixtureMarginals(2, 3, interval), sde(c)
    matching = FokkerPlanckMatching(density, equation, **kwargs).to(x.dtype)
    density.initialize(x)
    fit(matching, t, x, steps=steps, batch_size=64)
    return matching


def assert_same_fit(matching, other, t, x, c, b, tolerance, a=1.0, start=0.0):
    """The second one is of c x + b at times a t + start."""
    times, points = a * t + start, c * x + b
    with torch.no_grad():
        log_prob = other.density.log_prob(times, points) + x.shape[-1] * math.log(c)
        assert_close(log_prob, matching.density.log_prob(t, x), rtol=0, atol=tolerance)
        for ours, theirs, unit in (
            (matching.sde.f(t, x), other.sde.f(times, points), c / a),
            (matching.sde.g(t, x), other.sde.g(times, points), c / math.sqrt(a)),
        ):
            assert_close(theirs / unit, ours, rtol=tolerance, atol=tolerance)
        assert_close(
            (other.density.sample(times).std(0) / c).log(), matching.density.sample(t).std(0).log(), rtol=0, atol=0.3
        )


@functools.cache
def reference(dtype, **kwargs):
    """The fit of the snapshots themselves, which no test changes."""
    return learned(*snapshots(dtype=dtype), **kwargs)


SCALES = [1e-6, 1e-3, 1.0, 1e6]


@pytest.mark.parametrize("where", ["data", "both"])
@pytest.mark.parametrize("offset", [0.0, -30.0], ids=["at 0", "far from 0"])
@pytest.mark.parametrize("c", SCALES)
def test_fits_of_x_and_of_c_x_plus_b_differ_by_log_c(c, offset, where):
    t, x = snapshots()
    matching = learned(t, c * (x + offset), where=where)
    assert_same_fit(reference(t.dtype, where=where), matching, t, x, c, c * offset, 1e-6)


@pytest.mark.parametrize("c", SCALES)
def test_fits_of_x_and_of_c_x_plus_b_in_single_precision(c):
    t, x = snapshots(dtype=torch.float32)
    torch.set_default_dtype(torch.float32)
    # The offset takes the data's last digits away.
    matching, b = reference(t.dtype), 10 * c
    assert_same_fit(matching, learned(t, c * x), t, x, c, 0.0, 1e-2)
    assert_same_fit(matching, learned(t, c * x + b), t, x, c, b, 3e-2)


@pytest.mark.parametrize("a, start", [(1e-6, 0.0), (1e6, 1e6), (10.0, 1960.0)], ids=["short", "long", "years"])
def test_fits_do_not_depend_on_the_units_of_time(a, start):
    t, x = snapshots()
    other = learned(a * t + start, x, interval=(start, start + a))
    assert_same_fit(reference(t.dtype), other, t, x, 1.0, 0.0, 1e-6, a=a, start=start)


@pytest.mark.parametrize("sizes", [(), (2,)], ids=["one for all", "one each"])
@pytest.mark.parametrize("c", [1e-6, 1e6])
def test_constant_diffusion_is_learned_at_any_scale(c, sizes):
    t, x = snapshots()
    values = [nn.Parameter(torch.full(sizes, 0.3 * unit)) for unit in (1.0, c)]
    first, second = (
        learned(t, unit * x, sde=lambda c, value=value: DiagonalSDE(HollowNN(2), value))
        for unit, value in zip((1.0, c), values, strict=True)
    )
    assert_close(values[1] / c, values[0], rtol=1e-6, atol=0)
    assert (values[0] - 0.3).abs().min() > 1e-3
    assert first.sde.diffusion.value is values[0]
    assert_close(second.sde.g(t, c * x), values[1].expand_as(x), rtol=0, atol=0)


@pytest.mark.parametrize("c, offset", [(1e-6, 0.0), (1e6, -30.0)])
def test_fits_of_flows_do_not_depend_on_units(c, offset):
    t, x = snapshots(40)
    fits = []
    for unit, b in ((1.0, 0.0), (c, c * offset)):
        torch.manual_seed(3)
        flow = conditional_hollow_cnf(2, 1, [4], solver=Solver("rk4", options={"step_size": 0.5}))
        density = FlowMarginals(flow, dist.Normal(torch.zeros(2), 1.0).to_event(1))
        matching = FokkerPlanckMatching(density, DiagonalSDE(HollowNN(2), HollowNN(2)), where="data")
        fit(matching, t, unit * x + b, steps=3, batch_size=8)
        fits.append(matching)
    assert_same_fit(*fits, t, x, c, c * offset, 1e-5)


@pytest.mark.parametrize(
    "c", [1e-6, pytest.param(1e-3, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow), 1e6]
)
def test_data_of_any_scale_are_learned(c):
    """The log-likelihood of a Gaussian, of known variance at each time, to a few hundredths."""
    process, t = OrnsteinUhlenbeck(2), torch.rand(1000)
    x = process.sample(t, 2)
    density = GaussianMixtureMarginals(2, 1, (0.0, 1.0))
    density.initialize(c * x)
    fit(FokkerPlanckMatching(density, DiagonalSDE(HollowNN(2, [4]), HollowNN(2, [4]))), t, c * x, steps=200, lr=0.02)
    truth = process.log_prob(t, x).mean() - 2 * math.log(c)
    assert abs(density.log_prob(t, c * x).mean() - truth) < 0.05


def test_what_is_given_to_the_equation_keeps_its_units():
    t, x = snapshots()
    x = 1e-3 * x
    for diffusion in (0.5, torch.tensor([0.5, 0.5]), lambda t, x: torch.full_like(x, 0.5)):
        sde = DiagonalSDE(lambda t, x: -3 * x, diffusion)
        FokkerPlanckMatching(mixture(2), sde).standardize(t, x)
        assert_close(sde.g(t, x), torch.full_like(x, 0.5), rtol=0, atol=0)
        assert_close(sde.f(t, x), -3 * x, rtol=0, atol=0)
    for floor in (0.7, 0.0):
        sde = DiagonalSDE(HollowNN(2), HollowNN(2), min_diffusion=floor)
        FokkerPlanckMatching(mixture(2), sde).standardize(t, x)
        assert (sde.g(t, x) >= floor).all() and (sde.g(t, x) < floor + 5e-3).all()


def test_derivatives_of_networks_in_units_of_the_data():
    t, x = snapshots(20)
    x = 1e-3 * x + 1.0
    sde = networks(2)
    sde.standardize(7 * t, x)
    bound, plain = sde.bind(), DiagonalSDE(sde.f, sde.g).bind()
    assert_close(bound.drift_derivatives(t, x), plain.drift_derivatives(t, x))
    assert_close(bound.diffusion_derivatives(t, x), plain.diffusion_derivatives(t, x))


def test_own_loop_standardises_by_one_call():
    t, x = snapshots()
    fits = []
    for c in (1.0, 1e-6):
        torch.manual_seed(2)
        matching = FokkerPlanckMatching(GaussianMixtureMarginals(2, 3, (0.0, 1.0)), networks(2))
        matching.standardize(t, c * x)
        optimizer = torch.optim.Adam(matching.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            matching(t, c * x).total.backward()
            optimizer.step()
        fits.append(matching)
    assert_same_fit(*fits, t, x, 1e-6, 0.0, 1e-6)


def test_units_are_set_once_and_saved():
    t, x = snapshots()
    matching = learned(t, 1e-3 * x + 5.0)
    before = copy.deepcopy(matching.state_dict())
    fit(matching, t[:50], x[:50], steps=1)
    matching.standardize(t, 100 * x)
    names = [name for name in before if "units" in name]
    assert len(names) == 9
    for name in names:
        assert_close(matching.state_dict()[name], before[name], rtol=0, atol=0)
    twin = FokkerPlanckMatching(GaussianMixtureMarginals(2, 3, (0.0, 1.0)), DiagonalSDE(HollowNN(2), HollowNN(2)))
    twin.load_state_dict(matching.state_dict())
    for other in (twin, copy.deepcopy(matching), pickle.loads(pickle.dumps(matching))):
        assert_close(other(t, x).nll, matching(t, x).nll, rtol=0, atol=0)
        assert_close(other.sde.f(t, x), matching.sde.f(t, x), rtol=0, atol=0)
        assert_close(other.sde.g(t, x), matching.sde.g(t, x), rtol=0, atol=0)


def test_units_can_be_kept_as_they_are():
    t, x = snapshots()
    matching = FokkerPlanckMatching(mixture(2), networks(2))
    fit(matching, t, 1e-3 * x, steps=1, standardize=False)
    assert not matching.density.units.is_set and not matching.sde.units.is_set
    assert (matching.sde.units.scale == 1).all()


def test_weight_is_in_units_of_time_unless_it_is_left_out():
    t, x = snapshots()
    for weight, expected in ((None, 0.01 * 25), (0.3, 0.3)):
        matching = FokkerPlanckMatching(GaussianMixtureMarginals(2, 3, (0.0, 5.0)), networks(2), weight=weight)
        assert matching.weight == (weight or 0.01)
        matching.standardize(5 * (t - t.min()) / (t.max() - t.min()), x)
        loss = matching(t, x)
        assert_close(torch.as_tensor(matching.weight), torch.tensor(expected))
        assert_close(loss.total, loss.nll + expected * loss.residual)
        matching.weight = 2.0
        assert matching.weight == 2.0


NOT_FINITE = {
    "t must be finite, but is nan at index (3,)": (3, None, math.nan),
    "t must be finite, but is inf at index (0,)": (0, None, math.inf),
    "x must be finite, but is nan at index (2, 1)": (2, 1, math.nan),
    "x must be finite, but is -inf at index (4, 0)": (4, 0, -math.inf),
}


@pytest.mark.parametrize("message, case", NOT_FINITE.items(), ids=NOT_FINITE)
def test_times_and_positions_that_are_not_finite_are_named(message, case):
    row, column, value = case
    t, x = torch.rand(5), torch.randn(5, 2)
    if column is None:
        t[row] = value
    else:
        x[row, column] = value
    density, sde = mixture(2), networks(2)
    matching = FokkerPlanckMatching(density, sde)
    flow = FlowMarginals(conditional_hollow_cnf(2, 1), dist.Normal(torch.zeros(2), 1.0).to_event(1))
    calls = [
        lambda: fokker_planck_rhs(density, sde, t, x),
        lambda: fokker_planck_rhs(lambda t, x: -x.square().sum(-1), sde, t, x),
        lambda: matching(t, x),
        lambda: matching.standardize(t, x),
        lambda: fit(matching, t, x, steps=1),
        lambda: fit(matching, t, x, steps=1, standardize=False),
        lambda: log_density_derivatives(density, t, x),
        *(lambda method=method: method(t, x) for d in (density, flow) for method in (d.log_prob, d.derivatives)),
    ]
    if column is None:
        calls += [lambda: density.sample(t), lambda: flow.sample(t)]
    else:
        calls += [lambda: density.initialize(x), lambda: sde.sample(x, [0.0, 1.0], dt=0.1)]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message).replace(r"x\ must", r"x0?\ must")):
            call()


def test_fit_says_when_there_is_nothing_to_do():
    matching, t, x = FokkerPlanckMatching(mixture(2), networks(2)), torch.rand(5), torch.randn(5, 2)
    cases = {
        "steps must be at least 1, but got 0": lambda: fit(matching, t, x, steps=0),
        "batch_size must be at least 1, but got 0": lambda: fit(matching, t, x, steps=1, batch_size=0),
        "x must hold at least one sample": lambda: fit(matching, t[:0], x[:0], steps=1),
        "x must be of a floating-point type, but got torch.int64": lambda: fit(matching, t, x.long(), steps=1),
        "x must vary in every column, but column 1 is constant": lambda: fit(
            matching, t, torch.stack([t, torch.full_like(t, 0.1)], -1), steps=1
        ),
        "x is torch.float32, but the module torch.float64": lambda: fit(matching, t, x.float(), steps=1),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()


BAD = {
    "where must be 'data', 'proposal' or 'both', but got 'grid'": {"where": "grid"},
    "weight must not be negative": {"weight": -1.0},
    "broadening must not be negative": {"broadening": -1.0},
    "weight must not be negative and be finite, but got inf": {"weight": math.inf},
}


@pytest.mark.parametrize("message, kwargs", BAD.items(), ids=BAD)
def test_bad_settings(message, kwargs):
    with pytest.raises(ValueError, match=message):
        FokkerPlanckMatching(mixture(1), networks(1), **kwargs)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"t and x must have shapes \(n,\) and \(n, d\), but got \(\) and \(5, 2\)"):
        FokkerPlanckMatching(mixture(2), networks(2))(torch.tensor(0.0), torch.zeros(5, 2))
