# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ExponentialLR
from torch.testing import assert_close

from pyro_hollow.experiments import verdict
from pyro_hollow.infer import AutoHollowCNF, diagnose
from pyro_hollow.infer.importance import faults, fit_generalized_pareto, limits, smooth


def pareto(shape, scale, size):
    """Quantiles of a generalized Pareto distribution at even levels."""
    levels = (torch.arange(size) + 0.5) / size
    return scale * torch.expm1(-shape * torch.log1p(-levels)) / shape


@pytest.mark.parametrize("shape", [-0.3, 0.2, 0.5, 0.9, 1.5])
def test_fit_recovers_shape_and_scale(shape):
    k, sigma = fit_generalized_pareto(pareto(shape, 2.0, 5000))
    assert k == pytest.approx(shape, abs=0.02) and sigma == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_fit_is_equivariant_to_the_scale(factor):
    excesses = pareto(0.4, 1.0, 200)
    k, sigma = fit_generalized_pareto(excesses)
    assert fit_generalized_pareto(factor * excesses) == pytest.approx((k, factor * sigma))


WEIGHTS = {
    "normal": lambda size: torch.randn(size),
    "wide": lambda size: 300 * torch.randn(size),
    "Cauchy": lambda size: dist.Cauchy(0.0, 1.0).sample((size,)),
    "bounded": lambda size: torch.rand(size),
    "some impossible": lambda size: torch.where(torch.rand(size) < 0.3, -math.inf, torch.randn(size)),
}


@pytest.mark.parametrize("size", [25, 100, 4000])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_smoothing_is_that_of_arviz(weights, size):
    arviz = pytest.importorskip("arviz")
    if not hasattr(arviz, "psislw"):
        pytest.skip("ArviZ has no psislw from version 1 on")
    log_weights = weights(size)
    smoothed = smooth(log_weights)
    expected, khat = arviz.psislw(log_weights.numpy().copy())
    assert smoothed.khat == pytest.approx(float(khat))
    assert_close(smoothed.weights, torch.from_numpy(expected).exp())


def test_smoothing_ignores_a_constant():
    log_weights = torch.randn(500)
    first, second = smooth(log_weights), smooth(log_weights + 1e3)
    assert second.khat == pytest.approx(first.khat, abs=1e-6)
    assert second.unseen == pytest.approx(first.unseen, abs=1e-6)
    assert_close(first.weights, second.weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [-0.5, 0.3, 0.6])
def test_unseen_weight_is_the_mean_of_the_fit_beyond_its_last_quantile(shape):
    """By quadrature of the quantile function."""
    body, tail = torch.full((900,), 1e-3), 1.0 + pareto(shape, 0.5, 95)
    smoothed = smooth(torch.cat([body, torch.ones(5), tail]).log())
    k, sigma = fit_generalized_pareto(tail - 1.0)
    middle = (torch.arange(2_000_000) + 0.5) / 2_000_000 / 95  # of 1 - level
    beyond = (1.0 + sigma * torch.expm1(-k * middle.log()) / k).mean()
    total = body.sum() + 5 + smoothed.weights.topk(95).values.sum() / smoothed.weights.min() * 1e-3
    assert smoothed.khat == pytest.approx(k)
    assert smoothed.unseen == pytest.approx((beyond / total).item(), rel=0.02)


@pytest.mark.parametrize("size", [25, 50, 100, 1000])
def test_equal_weights_are_trusted_at_any_number_of_samples(size):
    smoothed = smooth(1e-14 * torch.randn(size))
    assert smoothed.khat == 0.0 and smoothed.unseen == pytest.approx(1 / size)
    assert not faults(size, smoothed.unseen, size)


def test_limits():
    assert limits(4000) == limits(1000) == (100.0, 0.035)
    assert limits(100)[0] == 50 and 0.035 < limits(100)[1] < 0.1
    assert len(faults(math.nan, math.nan, 1000)) == 2


# The verdict


def cases(*names):
    found = [case for case in verdict.CASES if case.name in names]
    assert len(found) == len(names)
    return pytest.mark.parametrize("case", found, ids=lambda case: f"{case.kind}: {case.name}")


@pytest.mark.parametrize("d", [1, 2, 10])
@cases(
    "Normal by itself", "Student (5) by itself", "amplitude 0.02", "scale 0.95", "scale 1.05", "by 0.1 sd",
    "Student (10) by Normal", "Student (30) by Normal", "Normal by Student (10)", "50%",
)  # fmt: skip
def test_no_false_alarm_for_a_good_guide(case, d):
    row = verdict.evaluate(case, d, 1000, 60)
    assert max(row.errors) < 0.065
    assert row.alarms == 0


@pytest.mark.parametrize("d", [1, 2, 10])
@cases("scale 0.3", "scale 0.1", "0.9 in pairs", "by 3.0 sd", "97%")
def test_no_missed_alarm_for_a_bad_guide(case, d):
    row = verdict.evaluate(case, d, 1000, 60)
    assert max(row.errors) > 0.15
    assert row.alarms > 0.95


def test_no_false_alarm_for_a_flat_clumped_tail():
    """The k-hat of bounded weights that crowd at their maximum may be anything."""

    def log_joint(z):
        return dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, 1.0).log_prob(torch.tensor(1.0))

    grid = torch.linspace(-5, 5, 100_001)
    cumulative = log_joint(grid).exp().cumsum(0)
    for seed in range(20):
        torch.manual_seed(seed)
        index = torch.searchsorted(cumulative, torch.rand(4000) * cumulative[-1]).clamp(max=100_000)
        z = grid[index]
        smoothed = smooth(0.03 * torch.cos(2 * z) - 0.02 * z.abs() ** 0.5)
        assert not faults(1 / smoothed.weights.square().sum().item(), smoothed.unseen, 4000)


def test_no_false_alarm_for_a_trained_guide_whose_largest_weights_are_equal():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z**2, 1.0), obs=torch.tensor(1.0))

    guide = AutoHollowCNF(model, warm_up=50)
    rate = ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.01 ** (1 / 200)})
    svi = SVI(model, guide, rate, Trace_ELBO(num_particles=32, vectorize_particles=True))
    for _ in range(200):
        svi.step()
        rate.step()
    for seed in range(5):
        pyro.set_rng_seed(seed)
        result = diagnose(model, guide, posterior_predictive=False)
        assert result.ess > 3800 and result.reliable, str(result)


def test_high_khat_of_a_negligible_tail_is_trusted():
    def model():
        pyro.sample("z", dist.StudentT(10.0, 0.0, math.sqrt(0.8)))

    result = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    assert result.khat > 1 and result.reliable and "can be trusted where" in str(result)


def test_impossible_samples_are_told_and_not_trusted_where_few_are_left():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("above", torch.where(z > 1.88, -z, -math.inf))

    result = diagnose(model, lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), num_samples=1000)
    assert 0.95 < result.impossible < 0.99 and result.khat < 0.7
    assert not result.reliable
    assert f"Impossible samples         {result.impossible:.1%}" in str(result)
    assert "neither the guide nor its correction can be trusted: the effective sample size is below 100" in str(result)


def test_text_says_that_modes_were_not_looked_for():
    guide = model = lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
    assert "modes without any were not looked for (restarts=64 would)" in str(diagnose(model, guide))


# The experiment


def test_table(capsys):
    verdict.main(["--kind", "right", "too wide", "--dims", "1", "3", "--num-samples", "100", "--repeats", "5"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 6 * 2 + 3
    assert rows[2].startswith("| right | Normal by itself | 1 | 100 | ")
