# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The fit of a mixture of Gaussians to the modes of a density, and a guide on top of one."""

import copy
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_hollow import Fit, fit
from pyro_hollow.infer import AutoHollowCNF, LogDensity, fitting
from pyro_hollow.infer.elbo import InclusiveKL, PathELBO
from pyro_hollow.infer.gaussian import GaussianFit
from pyro_hollow.infer.gaussian_mixture import GaussianMixture
from pyro_hollow.infer.graph import independent_groups
from pyro_hollow.infer.mixture import are_apart, fit_mixture, fit_mixtures, has_several
from pyro_hollow.infer.modes import search
from pyro_hollow.nn import GraphConditioner

QUICK = {"seed": 0, "compile": False, "progress": False}


def improper(dim):
    return dist.ImproperUniform(dist.constraints.real_vector, (), (dim,))


def three():
    """Three Gaussians with weights 1 / 8, 2 / 8 and 5 / 8, two of which overlap."""
    x = pyro.sample("x", improper(2))
    locs = torch.tensor([[-20.0, 0.0], [0.0, 0.0], [2.5, 1.0]])
    scales = torch.tensor([[0.5, 3.0], [1.0, 1.0], [0.5, 0.5]])
    logs = dist.Normal(locs, scales).log_prob(x.unsqueeze(-2)).sum(-1)
    pyro.factor("density", (logs + torch.tensor([1 / 8, 2 / 8, 5 / 8]).log()).logsumexp(-1))


def product():
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    pyro.sample("c", dist.Normal(a * b, 0.5), obs=torch.tensor(4.0))


def wells():
    """Eight double wells, each beside a Gaussian: 256 modes."""
    x = pyro.sample("x", improper(16))
    a, b = x[..., 0::2], x[..., 1::2]
    pyro.factor("wells", (-4 * (a.square() - 1).square() + a - 0.5 * b.square()).sum(-1))


def wells_log_evidence():
    grid = torch.linspace(-4, 4, 8001)
    one = (-4 * (grid.square() - 1).square() + grid).logsumexp(0) + math.log(1e-3)
    return 8 * (float(one) + 0.5 * math.log(2 * math.pi))


def density_of(model):
    return LogDensity(model, compile=False)


def gaussian(dim, scale=1.0, loc=0.0, elbo=-1.0):
    return GaussianFit(torch.full((dim,), loc), scale * torch.eye(dim), elbo)


def test_mixture_is_found_exactly():
    density = density_of(three)
    found = fit_mixture(density.value_and_gradient, search(density, gaussian(2, 5.0)))
    order = found.locs[:, 0].argsort()
    assert_close(found.log_weights[order].exp(), torch.tensor([1 / 8, 2 / 8, 5 / 8]), rtol=0, atol=0.02)
    x = found.rsample((2000,))
    assert_close(found.log_prob(x).mean(), density(x).mean(), rtol=0, atol=5e-3)


def test_components_without_mass_are_dropped():
    def model():
        x = pyro.sample("x", improper(1))
        logs = dist.Normal(torch.tensor([0.0, 30.0]), 1.0).log_prob(x)
        pyro.factor("density", (logs + torch.tensor([0.0, -9.0])).logsumexp(-1))

    density = density_of(model)
    modes = search(density, gaussian(1))
    assert len(modes) == 2
    found = fit_mixture(density.value_and_gradient, modes)
    assert len(found.locs) == 1 and not has_several(found)
    assert_close(found.locs[0], torch.zeros(1), rtol=0, atol=1e-2)


def test_gaussian_from_elsewhere_is_a_component():
    """The search is told of one of two modes; the other Gaussian covers the second."""

    def model():
        x = pyro.sample("x", improper(1))
        pyro.factor("density", dist.Normal(torch.tensor([0.0, 30.0]), 1.0).log_prob(x).logsumexp(-1) - math.log(2))

    density = density_of(model)
    modes = search(density, gaussian(1))
    lone = type(modes)(1, modes.points[:1], modes.values[:1], modes.scale_trils[:1], modes.dtype)
    other = GaussianFit(30.0 - lone.points[0], 0.9 * torch.eye(1), -1.0)
    found = fit_mixture(density.value_and_gradient, lone, other)
    assert_close(found.log_weights.exp(), torch.tensor([0.5, 0.5]), rtol=0, atol=0.02)
    assert_close(found.locs.flatten().sort().values, torch.tensor([0.0, 30.0]), rtol=0, atol=0.02)


def test_gaussians_apart():
    assert not are_apart(gaussian(2), gaussian(2, loc=1.0))
    assert are_apart(gaussian(2), gaussian(2, loc=3.0))
    assert not are_apart(gaussian(2, 5.0), gaussian(2, 5.0, loc=3.0))


def test_independent_groups():
    groups = independent_groups(density_of(wells))
    assert sorted(map(len, groups)) == [1] * 16
    assert sorted(map(len, independent_groups(density_of(product)))) == [2]


def test_groups_have_mixtures_of_their_own():
    density = density_of(wells)
    modes = search(density, gaussian(16))
    groups = [torch.tensor([2 * i, 2 * i + 1]) for i in range(8)]
    found = fit_mixtures(density.value_and_gradient, modes, groups)
    assert len(found.locs) == 16
    x = found.rsample((4000,))
    log_weights = density(x) - found.log_prob(x)
    assert float(log_weights.logsumexp(0)) - math.log(4000) == pytest.approx(wells_log_evidence(), abs=0.1)


# A guide on a mixture


def mixture_guide(**settings):
    guide = AutoHollowCNF(product, hidden_dims=[8], path_gradient=True, warm_up=0, **settings).setup()
    factors = torch.tensor([[[0.4, 0.0], [-0.2, 0.3]], [[0.5, 0.0], [0.1, 0.4]]])
    mixture = GaussianMixture(torch.tensor([0.0, 0.5]), torch.tensor([[-2.0, -2.1], [2.0, 1.9]]), factors)
    guide.set_mixture(mixture)
    return guide, mixture


@pytest.mark.parametrize("affine", ["full", "diagonal"])
def test_guide_is_the_mixture(affine):
    guide, mixture = mixture_guide(affine=affine)
    x = mixture.rsample((50,))
    posterior = guide.get_posterior()
    assert_close(posterior.log_prob(x), mixture.log_prob(x))
    assert_close(guide.median()["a"], mixture.rsample((50_000,))[:, 0].median(), rtol=0, atol=0.1)
    loc, scale_tril = mixture.moments()
    draws = posterior.sample((20_000,))
    assert_close(draws.mean(0), loc, rtol=0, atol=0.1)
    assert_close(draws.mT.cov(), scale_tril @ scale_tril.mT, rtol=0.05, atol=0.1)


def test_mixture_of_other_latents():
    guide, mixture = mixture_guide()
    other = GaussianMixture(torch.zeros(1), torch.zeros(1, 3), torch.eye(3).unsqueeze(0))
    with pytest.raises(ValueError, match="mixture must be of 2 latents, but it is of 3"):
        guide.set_mixture(other)


def test_state_and_copies_keep_the_mixture():
    guide, mixture = mixture_guide()
    x = mixture.rsample((5,))
    other = AutoHollowCNF(product, hidden_dims=[8], path_gradient=True, warm_up=0)
    other.load_state_dict(guide.state_dict())
    for each in (other.setup(), copy.deepcopy(guide)):
        assert_close(each.get_posterior().log_prob(x), mixture.log_prob(x))
    plain = AutoHollowCNF(product, hidden_dims=[8], path_gradient=True, warm_up=0).setup()
    guide.load_state_dict(plain.state_dict())
    assert guide.base_locs is None


def trained_gradient(guide, objective, parameters):
    for parameter in parameters:
        parameter.grad = None
    objective()
    return [parameter.grad.clone() for parameter in parameters]


def test_gradient_by_hand_is_that_of_autograd(monkeypatch):
    """At particles that are not stretched, against the path gradient of torch's graph on the same particles."""
    monkeypatch.setattr("pyro_hollow.infer.elbo._STRETCHED", 0.0)
    guide, _ = mixture_guide()
    density = density_of(product)
    objective = PathELBO(guide, density, 16)
    for parameter in guide.flows.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    parameters = list(guide.flows.parameters())
    torch.manual_seed(1)
    found = trained_gradient(guide, objective, parameters)
    torch.manual_seed(1)
    x, _, log_q, _ = objective._base_sample()
    transform = guide.get_transform()
    with torch.enable_grad():
        y = transform(x)
        fixed = y.detach().requires_grad_()
        (score,) = torch.autograd.grad(guide.get_posterior().log_prob(fixed).sum(), fixed)
        _, gradient = density.value_and_gradient(y.detach())
        scale = transform.parts[-1].transposed()
        bars = scale(torch.stack([score - gradient, score]))
        lengths, largest = bars.norm(dim=-1)
        cut = (largest / lengths).clamp(max=1.0).unsqueeze(-1)
        loss = (cut * (score - gradient) * y).sum(-1).mean()
        expected = torch.autograd.grad(loss, parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=2e-2, atol=2e-3)  # of two solves with errors of their own


@pytest.mark.parametrize("distance", [2.0, 200.0])
def test_stretched_samples_of_a_mixture_have_their_density(distance):
    guide, mixture = mixture_guide()
    guide.set_mixture(GaussianMixture(mixture.log_weights, mixture.locs.sign() * distance, mixture.scale_trils))
    objective = PathELBO(guide, density_of(product), 32)
    x, log_q = InclusiveKL(objective)._base_sample()
    base = guide.get_base_dist()
    weights = (base.log_prob(x) - log_q).exp()
    assert weights.mean().item() == pytest.approx(1.0, abs=0.01)
    assert weights.max() <= 1 / (1 - 0.2) + 1e-6
    assert_close((weights.unsqueeze(-1) * x).mean(0), torch.zeros(2), rtol=0, atol=0.05)
    assert_close((weights.unsqueeze(-1) * x.square()).mean(0), torch.ones(2), rtol=0, atol=0.05)


# fit


def test_both_branches_of_a_product(tmp_path):
    result = fit(product, num_steps=150, **QUICK)
    draws = torch.as_tensor(result.posterior["posterior"]["a"].values)
    assert draws.mean().item() == pytest.approx(0.0, abs=0.1)
    assert (draws > 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert result.log_evidence == pytest.approx(-3.3768, abs=0.05)
    assert result.trusted and [mode.missed for mode in result.modes] == [False, False]
    assert [mode.weight for mode in result.modes] == pytest.approx([0.5, 0.5], abs=0.05)
    page = str(result)
    assert "found 2 modes, all with draws" in " ".join(page.split()) and "modes        2, with 5" in page
    result.save(tmp_path / "fit.pt")
    loaded = Fit.load(tmp_path / "fit.pt", product)
    assert torch.equal(loaded.guide.base_locs, result.guide.base_locs)
    loaded.resume(5, progress=False)
    assert loaded.num_steps == 155 and len(loaded.modes) == 2


def test_a_missed_mode_is_not_trusted():
    guide = AutoHollowCNF(product, hidden_dims=[8], path_gradient=True, warm_up=0).setup()
    guide.set_affine(torch.tensor([2.0, 2.0]), 0.4 * torch.eye(2))
    guide.progress[0] = 1  # has been trained: it starts where it is
    result = fit(product, guide=guide, num_steps=100, **QUICK)
    assert not result.trusted and sorted(mode.missed for mode in result.modes) == [False, True]
    assert "the guide has almost no draws near 1 of 2 modes" in " ".join(str(result).split())


def test_no_search():
    result = fit(product, modes=False, num_steps=10, **QUICK)
    assert result.search is None and not result.modes and result.guide.base_locs is None
    assert "Modes without any were not looked for" in " ".join(str(result).split()) or not result.trusted


def test_more_modes_than_a_mixture_can_list():
    result = fit(wells, num_steps=1, **QUICK)
    assert len(result.guide.base_locs) == 24  # two for each well, and one for each Gaussian
    assert result.log_evidence == pytest.approx(wells_log_evidence(), abs=0.3)
    assert not result.diagnostics.missed_modes


def test_start_with_the_largest_mode():
    """The Gaussian of the start ends in the mode at zero, which holds a ten-thousandth."""

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        near, far = (dist.Normal(loc, 0.1).log_prob(x).sum(-1) for loc in (0.0, 4.0))
        pyro.factor("density", torch.logaddexp(near - 9.2, far))

    result = fit(model, num_steps=1, **QUICK)
    assert result.guide.base_locs is None and result.trusted
    assert_close(result.gaussian.loc, torch.full((3,), 4.0), rtol=0, atol=0.01)


def test_graphs_and_mixtures_go_together():
    """From 64 latents on the flow has a conditioner on the graph of the density."""

    def chain():
        h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([70]).to_event(1))
        pyro.factor("steps", dist.Normal(h[..., :-1], 0.3).log_prob(h[..., 1:]).sum(-1))
        side = dist.Normal(torch.tensor([-2.0, 2.0]), 0.1).log_prob(h[..., 35:36]).logsumexp(-1)
        pyro.factor("side", side)

    result = fit(chain, num_steps=1, **QUICK)
    assert len(result.guide.base_locs) == 2 and [mode.missed for mode in result.modes] == [False, False]
    assert isinstance(result.guide.flows[0].nn.conditioner, GraphConditioner)


@pytest.mark.parametrize("modes", [True, "all", 3])
def test_modes_out_of_range(modes):
    with pytest.raises(ValueError, match="modes must be 'auto' or False, but got"):
        fit(product, modes=modes, **QUICK)


@pytest.mark.parametrize("where", ["search", "fit_mixture"])
def test_interrupted_search_does_not_lose_the_fit(where, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, where, interrupted)
    result = fit(product, num_steps=5, **QUICK)
    assert result.diagnostics is not None and "Ctrl-C ended the fit of the Gaussian" in result.reasons


@pytest.mark.parametrize("error", [KeyboardInterrupt(), IndexError("far out")])
def test_failed_judgement_of_modes_does_not_lose_the_fit(error, monkeypatch):
    def failed(*args, **kwargs):
        raise error

    monkeypatch.setattr(fitting, "judge_modes", failed)
    warned = pytest.warns(UserWarning, match="fit found no modes, as the search failed: far out")
    with warned if isinstance(error, Exception) else nullcontext():
        result = fit(product, num_steps=5, **QUICK)
    assert result.diagnostics is not None and not result.modes
    assert any("modes without draws were not looked for" in reason for reason in result.reasons)
