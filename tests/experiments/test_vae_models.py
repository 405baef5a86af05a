# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.testing import assert_close

from pyro_hollow import ConditionalFreeFormCNF, ConditionalHollowCNF, Solver
from pyro_hollow.experiments.vae_models import (
    FLOWS,
    INNER,
    NETWORKS,
    PATH_GRADIENT,
    TEST_SOLVER,
    VAE,
    exact,
    make_flow,
    make_inner,
)
from pyro_hollow.transforms import ConditionalCNF, ConditionalLowRankLinear

QUICK = Solver("dopri5", rtol=1e-3, atol=1e-3)
STOCHASTIC = ("ffjord", "hollow-stochastic")
#: How many differential equations a sample takes, where it takes any.
SOLVES = {"hollow-low-rank-2": 2} | dict.fromkeys((*STOCHASTIC, "hollow", "hollow-low-rank", "free-form-exact"), 1)
EXACT = (
    "hollow",
    "hollow-path",
    "hollow-low-rank-2",
    "hollow-low-rank-2-path",
    "free-form-exact",
    "free-form-exact-path",
)
CONTINUOUS = (*STOCHASTIC, *EXACT)

flows = pytest.mark.parametrize("name", FLOWS)


def make_vae(name="none", pixels=64, latent_dim=4, hidden_dim=16, network="mlp"):
    flow, inner = (make(name, latent_dim, hidden_dim, QUICK) for make in (make_flow, make_inner))
    return VAE(pixels, latent_dim, hidden_dim, flow, network, name in PATH_GRADIENT, inner)


def strengthen(flow):
    """Fresh flows are close to the identity, where most mistakes would not show."""
    with torch.no_grad():
        for parameter in flow.parameters() if flow is not None else ():
            parameter.add_(0.1 * torch.randn_like(parameter))


def binary(n, pixels=64):
    return torch.bernoulli(torch.full((n, pixels), 0.3))


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Networks


def test_parameters_of_the_networks():
    # By hand: two hidden layers of 16 on either side, and the base distribution.
    encoder, to_base, decoder = 65 * 16 + 17 * 16, 17 * 8, 5 * 16 + 17 * 16 + 17 * 64
    assert parameters(make_vae()) == encoder + to_base + decoder
    # That of the code of van den Berg et al.
    assert parameters(VAE(784, 64, 256, None, "conv")) == 3_067_105


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("network, pixels", (("mlp", 64), ("conv", 784)))
def test_shapes_of_the_networks(network, pixels, dtype):
    torch.set_default_dtype(dtype)
    vae = make_vae(pixels=pixels, network=network)
    x = binary(3, pixels)
    assert vae.encoder(x).shape == (3, 16)
    posterior = vae.posterior(x)
    assert posterior.batch_shape == (3,) and posterior.event_shape == (4,)
    z = posterior.rsample((2,))
    assert vae.logits(z).shape == vae.decode(z).shape == (2, 3, pixels)
    assert vae.decode(z).dtype == dtype
    assert_close(vae.decode(z), vae.logits(z).sigmoid())
    # Each image by itself.
    assert_close(vae.logits(z)[1, 2], vae.decoder(z[1, 2].unsqueeze(0)).squeeze(0))
    assert_close(vae.encoder(x)[2], vae.encoder(x[2:])[0])


def test_conv_uses_every_pixel_and_every_latent():
    torch.set_default_dtype(torch.float32)
    vae = make_vae(pixels=784, network="conv")
    x = binary(1, 784).requires_grad_()
    (gradient,) = torch.autograd.grad(vae.encoder(x).sum(), x)
    assert (gradient != 0).all()
    logits = vae.logits(torch.cat([torch.zeros(1, 4), torch.eye(4)]))
    assert ((logits[1:] - logits[0]).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("pixels", (64, 783, 785))
def test_conv_is_for_one_size_only(pixels):
    with pytest.raises(ValueError, match=f"28 x 28 pixels, but these have {pixels}; take 'mlp'"):
        VAE(pixels, 4, 16, None, "conv")


def test_unknown_network():
    with pytest.raises(ValueError, match="resnet") as raised:
        VAE(64, 4, 16, None, "resnet")
    assert all(network in str(raised.value) for network in NETWORKS)


# Flows


def test_no_flow_and_unknown_flow():
    assert make_flow("none", 4, 8, QUICK) is None
    with pytest.raises(ValueError, match="spline") as raised:
        make_flow("spline", 4, 8, QUICK)
    assert all(flow in str(raised.value) for flow in FLOWS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@flows
def test_samples_of_the_posterior(name, dtype):
    torch.set_default_dtype(dtype)
    vae = make_vae(name)
    posterior = vae.posterior(binary(3))
    for shape in ((), (2,)):
        z = posterior.rsample(shape)
        assert z.shape == (*shape, 3, 4) and z.dtype == dtype
        assert posterior.log_prob(z).shape == (*shape, 3)


def test_transforms_on_either_side_of_location_and_scale():
    tight = Solver(rtol=1e-9, atol=1e-9)
    name = "hollow-low-rank-2"
    vae = VAE(64, 4, 16, make_flow(name, 4, 16, tight), inner=make_inner(name, 4, 16, tight))
    strengthen(vae.flow)
    strengthen(vae.inner)
    x, noise = binary(3), torch.randn(3, 4)
    hidden = vae.encoder(x)
    loc, raw = vae.to_base(hidden).chunk(2, dim=-1)
    scale = torch.nn.functional.softplus(raw) + 1e-5
    (flow, first, second), outer = (part.condition(hidden) for part in vae.inner), vae.flow.condition(hidden)

    def through(noise):
        return outer(loc + scale * second(first(flow(noise))))

    posterior, z = vae.posterior(x), noise
    for transform in posterior.transforms:
        z = transform(z)
    assert_close(z, through(noise))
    jacobian = torch.autograd.functional.jacobian(lambda noise: through(noise).sum(0), noise).permute(1, 0, 2)
    log_q = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1) - jacobian.det().abs().log()
    assert_close(posterior.log_prob(z), log_q, rtol=1e-6, atol=1e-6)


@flows
def test_what_is_before_location_and_scale(name):
    flows = [ConditionalHollowCNF] if name.startswith("hollow-low-rank") else []
    maps = [ConditionalLowRankLinear] * 2 if "low-rank" in name else []
    assert [type(part) for part in make_inner(name, 4, 16, QUICK)] == [*flows, *maps]
    assert (name.removesuffix("-path") in INNER) == ("low-rank" in name)


@flows
def test_gradients_reach_encoder_and_flow(name):
    vae = make_vae(name)
    strengthen(vae.flow)
    strengthen(vae.inner)
    (-vae.log_weights(binary(5), 1).mean()).backward()
    for key, parameter in vae.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and gradient.isfinite().all(), key
        assert gradient.abs().max() > 0, key


@flows
def test_context_decides_the_flow(name):
    vae = make_vae(name)
    parts = [part for part in (*vae.inner, vae.flow) if part is not None]
    assert (parts == []) == name.startswith("none")
    for part in parts:
        strengthen(part)
        z, context = torch.randn(4).expand(2, 4), torch.randn(2, 16)
        y = part.condition(context)(z)
        assert (y[0] - y[1]).abs().max() > 1e-3


@flows
def test_continuous_flows_use_the_solver_of_training(name):
    vae = make_vae(name)
    vae.posterior(binary(3)).rsample()
    continuous = [part for part in (*vae.inner, vae.flow) if isinstance(part, ConditionalCNF)]
    assert len(continuous) == SOLVES.get(name.removesuffix("-path"), 0)
    for part in continuous:
        solver = part.solver
        assert (solver.method, solver.rtol, solver.atol, solver.adjoint) == ("dopri5", 1e-3, 1e-3, False)
        # One step over the whole interval, if it is good enough, for hollow and free-form fields alike.
        assert part.last_solve.nfe in (6, 7, 8)


def test_what_is_in_front_is_judged_as_what_is_behind():
    flow, *maps = make_inner("hollow-low-rank", 4, 16, QUICK)
    judged = exact(flow)
    assert isinstance(judged, ConditionalHollowCNF) and judged.nn is flow.nn and judged.solver is TEST_SOLVER
    assert [exact(part) for part in maps] == maps


def test_stochastic_flows_draw_a_probe_and_exact_ones_none():
    x = torch.randn(5, 4)
    for name in CONTINUOUS:
        flow = make_flow(name, 4, 16, QUICK)
        strengthen(flow)
        conditioned = flow.condition(torch.randn(5, 16))
        first = conditioned.log_abs_det_jacobian(x, x)
        second = conditioned.log_abs_det_jacobian(x, x)
        assert torch.equal(first, second) == (name not in STOCHASTIC), name


def test_hollow_and_hollow_stochastic_begin_alike():
    models = []
    for name in ("hollow", "hollow-stochastic"):
        torch.manual_seed(3)
        models.append(make_vae(name))
    assert repr(models[0].flow.nn) == repr(models[1].flow.nn)
    hollow, stochastic = (model.state_dict() for model in models)
    assert list(hollow) == list(stochastic)
    assert all(torch.equal(hollow[key], stochastic[key]) for key in hollow)


def test_ffjord_and_free_form_exact_begin_alike():
    models = []
    for name in ("ffjord", "free-form-exact"):
        torch.manual_seed(3)
        models.append(make_vae(name).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize("name, peer", (("hollow-stochastic", "hollow"), ("ffjord", "free-form-exact")))
def test_stochastic_trace_is_right_on_average(name, peer):
    torch.manual_seed(3)
    stochastic, context = make_flow(name, 4, 16, QUICK), torch.randn(1, 16)
    strengthen(stochastic)
    other = make_flow(peer, 4, 16, QUICK)
    other.load_state_dict(stochastic.state_dict())
    t, x, n = torch.tensor(0.3), torch.randn(1, 4), 20_000
    # Every row has a probe of its own.
    f, estimates = stochastic.condition(context)._bind().with_divergence(t, x.expand(n, 4))
    value, divergence = other.condition(context)._bind().with_divergence(t, x)
    assert_close(f, value.expand(n, 4))
    assert estimates.std() > 1e-3
    assert abs(estimates.mean() - divergence) < 4 * estimates.std() / math.sqrt(n)


@flows
def test_exact_flow_has_the_log_determinant_of_brute_force(name):
    flow = make_flow(name, 4, 16, QUICK)
    strengthen(flow)
    judged = exact(flow)
    if name not in CONTINUOUS:
        assert judged is flow
        if flow is None:
            return
    else:
        assert judged.nn is flow.nn and judged.solver is TEST_SOLVER
        assert isinstance(judged, ConditionalHollowCNF if "hollow" in name else ConditionalFreeFormCNF)
        if "hollow" not in name:
            assert judged.divergence == "exact"
    x = torch.randn(3, 4)
    conditioned = judged.condition(torch.randn(1, 16))
    y = conditioned(x)
    ladj = conditioned.log_abs_det_jacobian(x, y).expand(3)
    jacobian = torch.autograd.functional.jacobian(lambda x: conditioned(x).sum(0), x).transpose(0, 1)
    assert ladj.abs().max() > 0.01
    assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-4)


# ELBO


def normal_log_density(z, loc, scale):
    return (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


@pytest.mark.parametrize("num_samples", (1, 5))
@flows
def test_log_weights_by_hand(name, num_samples):
    vae, x = make_vae(name), binary(7)
    strengthen(vae.flow)
    torch.manual_seed(1)
    log_w = vae.log_weights(x, num_samples)
    assert log_w.shape == (num_samples, 7)
    torch.manual_seed(1)
    hidden = vae.encoder(x)
    loc, raw_scale = vae.to_base(hidden).chunk(2, dim=-1)
    scale = torch.log1p(raw_scale.exp()) + 1e-5
    shape = (num_samples, 7, 4)
    noise, ladj = torch.normal(torch.zeros(shape), torch.ones(shape)), scale.log().sum(-1)
    bent = noise
    for part in vae.inner:
        inner, x0 = part.condition(hidden), bent
        bent = inner(x0)
        ladj = ladj + inner.log_abs_det_jacobian(x0, bent)
    z = z0 = loc + scale * bent
    if vae.flow is not None:
        transform = vae.flow.condition(hidden)
        z = transform(z0)  # with the probe, if any
        ladj = ladj + transform.log_abs_det_jacobian(z0, z)
    log_q = normal_log_density(noise, torch.zeros(()), torch.ones(())) - ladj
    p = vae.decode(z)
    log_p = normal_log_density(z, torch.zeros(()), torch.ones(())) + torch.where(x == 1, p, 1 - p).log().sum(-1)
    assert_close(log_w, log_p - log_q)


@flows
def test_log_weight_is_the_elbo_of_pyro(name):
    vae, x = make_vae(name), binary(3)
    strengthen(vae.flow)
    torch.manual_seed(1)
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    torch.manual_seed(1)
    assert_close(loss, -vae.log_weights(x, 1).sum())


@pytest.mark.parametrize("name", ("none", "iaf", "hollow"))
def test_kl_weight_scales_the_latent_part_alone(name):
    vae, x = make_vae(name), binary(5)
    losses = []
    for kl_weight in (0.25, 0.5, 1.0):
        torch.manual_seed(0)
        losses.append(Trace_ELBO().loss(vae.model, vae.guide, x, kl_weight))
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[1]) / 2)
    # What does not scale is the reconstruction.
    torch.manual_seed(0)
    posterior = vae.posterior(x)
    logits = vae.logits(posterior.rsample())
    reconstruction = dist.Bernoulli(logits=logits).log_prob(x).sum().item()
    assert 2 * losses[0] - losses[1] == pytest.approx(-reconstruction)


def constant_decoder(name):
    """A VAE whose decoder ignores its input: every binary image has the probability 2**-pixels."""
    vae = make_vae(name)
    torch.nn.init.zeros_(vae.decoder[-1].weight)
    torch.nn.init.zeros_(vae.decoder[-1].bias)
    return vae


@flows
def test_weights_average_to_the_likelihood(name):
    # Whatever the posterior. It is made wider than the prior, so that the weights have a variance; much wider before
    # the planar layers, each of which contracts.
    vae, num_samples = constant_decoder(name), 1000
    vae.inner, vae.flow = torch.nn.ModuleList(map(exact, vae.inner)), exact(vae.flow)
    with torch.no_grad():
        vae.to_base.bias[4:] = 5.0 if name == "planar" else 2.0
        weights = (vae.log_weights(binary(3), num_samples) + 64 * math.log(2)).exp()
    assert (weights.std(0) > 0.1).all()
    assert ((weights.mean(0) - 1).abs() < 5 * weights.std(0) / math.sqrt(num_samples)).all()
