# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Models and settings that break guides elsewhere, and what must hold here."""

import copy
import functools
import inspect
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, JitTrace_ELBO, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList
from pyro.infer.autoguide.initialization import init_to_feasible, init_to_median
from pyro.optim import Adam, ClippedAdam
from torch.distributions import biject_to, transform_to
from torch.testing import assert_close

from pyro_hollow import AutoHollowCNF, Solver, diagnose

COARSE = Solver("rk4", options={"step_size": 0.5})
KEEP = torch.tensor([True, True, False])
Y = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
BULK = Trace_ELBO(num_particles=16, vectorize_particles=True)


def small(model, **settings):
    return AutoHollowCNF(
        model, **{"hidden_dims": [4], "transformer_dim": 4, "solver": COARSE, "warm_up": 0, **settings}
    )


def train(model, guide, steps, lr=0.03, elbo=BULK):
    svi = SVI(model, guide, ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / steps)}), elbo)
    return [svi.step() for _ in range(steps)]


@functools.cache
def trained(model):
    """Returns a guide that several tests share, none of which changes it, and its loss at the end."""
    guide = small(model)
    losses = train(model, guide, 150, lr=0.05)
    pyro.set_rng_seed(1)  # all continue alike
    return guide, sum(losses[-20:]) / 20


def particles(guide, size=2000):
    with torch.no_grad():
        return poutine.trace(pyro.plate("particles", size, dim=-2)(guide)).get_trace()


# Latents without a density


def by_handler():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3), poutine.mask(mask=KEEP):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=Y)


def by_method():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3):
        z = pyro.sample("z", dist.Normal(mu, 1.0).mask(KEEP))
        pyro.sample("y", dist.Normal(z, 1.0).mask(KEEP), obs=Y)


def within_an_event():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0)).unsqueeze(-1)
    z = pyro.sample("z", dist.Normal(mu, 1.0).expand((*mu.shape[:-1], 3)).mask(KEEP).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0).mask(KEEP).to_event(1), obs=Y)


def of_positive_values():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", 3), poutine.mask(mask=KEEP):
        z = pyro.sample("z", dist.LogNormal(mu, 1.0))
        pyro.sample("y", dist.Normal(z.log(), 1.0), obs=Y)


MASKED = {each.__name__: each for each in (by_handler, by_method, within_an_event, of_positive_values)}


@pytest.mark.parametrize("model", MASKED.values(), ids=MASKED)
def test_masked_elements_are_samples_of_the_prior_and_no_part_of_the_elbo(model):
    """y_i ~ Normal(mu, sqrt(2)), i = 1, 2: mu has mean 3/4 and variance 1/2, and the log evidence has a closed form."""
    guide, loss = trained(model)
    evidence = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + 2 * torch.eye(2)).log_prob(Y[:2])
    assert guide.latent_dim == 3
    assert_close(loss, -float(evidence), atol=0.02, rtol=0)
    nodes = particles(guide).nodes
    mu, z = nodes["mu"]["value"].squeeze(), nodes["z"]["value"].reshape(-1, 3)
    assert_close(mu.mean(), torch.tensor(0.75), atol=0.06, rtol=0)
    assert_close(mu.std(), torch.tensor(0.5**0.5), atol=0.05, rtol=0)
    rest = (z.log() if model is of_positive_values else z)[:, 2] - mu  # given mu a standard Normal
    assert abs(rest.mean()) < 0.08 and abs(rest.std() - 1) < 0.06
    assert abs(torch.corrcoef(torch.stack([rest, mu]))[0, 1]) < 0.08


def test_diagnose_of_masked_elements():
    guide, _ = trained(by_handler)
    result = diagnose(by_handler, guide)
    evidence = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + 2 * torch.eye(2)).log_prob(Y[:2])
    assert result.elbo == pytest.approx(float(evidence), abs=0.01)


def test_missing_data_by_obs_mask():
    """The missing element is a latent; those that were observed are no part of it."""

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=Y, obs_mask=KEEP)

    guide = small(model)
    train(model, guide, 150, lr=0.05)
    mu = particles(guide).nodes["mu"]["value"]
    assert guide.latent_dim == 2
    assert_close(mu.mean(), torch.tensor(1.0), atol=0.06, rtol=0)
    assert_close(mu.std(), torch.tensor(3**-0.5), atol=0.05, rtol=0)


def test_sites_that_are_masked_as_a_whole_are_samples_of_the_prior():
    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=False):
            w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        return w

    guide = small(model)
    train(model, guide, 50)
    w = particles(guide).nodes["w"]["value"].reshape(-1, 3)
    assert guide.latent_dim == 1
    assert_close(w.mean(0), torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    assert_close(w.sum(-1), torch.ones(len(w)))


def test_a_masked_prior_under_data_is_flat():
    def model():
        with pyro.plate("n", 3):
            with poutine.mask(mask=False):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    guide = small(model)
    train(model, guide, 120, lr=0.05)
    z = particles(guide).nodes["z"]["value"].reshape(-1, 3)
    assert guide.latent_dim == 3
    assert_close(z.mean(0), Y, atol=0.1, rtol=0)
    assert_close(z.std(0), torch.ones(3), atol=0.1, rtol=0)


def test_predictions_and_quantiles_of_masked_elements():
    guide, _ = trained(by_handler)
    draws = Predictive(by_handler, guide=guide, num_samples=500, parallel=True)()
    assert draws["z"].reshape(500, 3)[:, 2].std() == pytest.approx(1.5**0.5, abs=0.15)
    low, median, high = guide.quantiles([0.05, 0.5, 0.95])["z"][:, 2]
    assert_close(median, torch.tensor(0.75), atol=0.1, rtol=0)
    assert_close(high - low, torch.tensor(2 * 1.645 * 1.5**0.5), atol=0.3, rtol=0)
    before = torch.get_rng_state()
    assert_close(guide.median()["z"], guide.median()["z"], rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())
    pyro.clear_param_store()
    assert small(by_handler, init_loc_fn=init_to_median).setup().latent_dim == 3


def test_models_without_any_density_and_improper_priors_without_data_are_refused():
    def masked():
        with poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="masks all of its latents"):
        small(masked)()

    def improper(data):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (2,), ()).to_event(1))
        pyro.sample("y", dist.Normal(z if data else z[..., :1].expand(z.shape), 1.0).to_event(1), obs=Y[:2])

    start = {"init_loc_fn": lambda site: torch.zeros(2)}
    with pytest.raises(ValueError, match="'z' .* improper prior, and no data depend on 1 of its 2 elements"):
        small(improper, **start)(False)
    assert small(improper, **start)(True)["z"].shape == (2,)


# One parameter store, several models


def vector(d=3, name="z", scale=1.0):
    pyro.sample(name, dist.Normal(torch.zeros(d), scale).to_event(1))


OTHERS = {
    "fewer latents, in the warm-up": ((4, "z"), {"warm_up": 9}, (3, "z"), {"warm_up": 9}),
    "diagonal, more latents": ((1, "z"), {"affine": "diagonal"}, (3, "z"), {"affine": "diagonal"}),
    "full, then diagonal": ((3, "z"), {"warm_up": 9}, (3, "z"), {"affine": "diagonal", "warm_up": 9}),
    "another model of the same size": ((3, "z"), {}, (3, "w"), {}),
    "another model, in the warm-up": ((3, "z"), {"warm_up": 9}, (3, "w"), {"warm_up": 9}),
    "overdispersion after a plain one": ((3, "z"), {}, (3, "z"), {"path_gradient": True, "overdispersion": 2.0}),
    "another activation": ((3, "z"), {}, (3, "z"), {"activation": "tanh"}),
}


@pytest.mark.parametrize("first, settings, second, others", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("trained", [True, False])
def test_a_store_of_another_guide_is_refused(first, settings, second, others, trained):
    guide = small(vector, **settings)
    if trained:
        SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO()).step(*first)
    else:
        guide(*first)
    other = small(vector, **others)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"pyro.clear_param_store\(\)|another setting of overdispersion"):
            other(*second)
    pyro.clear_param_store()
    assert other(*second)[second[1]].shape == (second[0],)


def test_a_store_of_the_same_guide_goes_on():
    guide = small(vector)
    SVI(vector, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    other = small(vector, path_gradient=True)  # which changes the training alone
    other()
    assert_close(other.affine, guide.affine)


def test_a_state_of_another_model_is_refused():
    guide = small(vector)
    guide(3, "z")
    pyro.clear_param_store()
    other = small(vector)
    other.load_state_dict(guide.state_dict())
    with pytest.raises(ValueError, match="another model"):
        other(3, "w")


# State


def by_store(guide, make):
    file = io.BytesIO()
    torch.save(pyro.get_param_store().get_state(), file)
    pyro.clear_param_store()
    file.seek(0)
    pyro.get_param_store().set_state(torch.load(file, weights_only=False))
    return make()


def by_state_dict(guide, make):
    state = copy.deepcopy(guide.state_dict())
    pyro.clear_param_store()
    other = make()
    other.load_state_dict(state)
    return other


def by_pickle(guide, make):
    data, model = pickle.dumps(guide), guide._model
    pyro.clear_param_store()
    other = pickle.loads(data)
    other._model = model
    return other


@pytest.mark.parametrize("way", [by_store, by_state_dict, by_pickle], ids=lambda way: way.__name__)
@pytest.mark.parametrize("calls", [2, 6], ids=["in the warm-up", "after it"])
@pytest.mark.parametrize(
    "settings", [{}, {"path_gradient": True, "overdispersion": 3.0}], ids=["plain", "overdispersed"]
)
def test_a_saved_training_goes_on_as_if_it_had_not_stopped(way, calls, settings):
    def make():
        return small(vector, warm_up=4, **settings)

    def steps(guide, optim, count):
        svi = SVI(vector, guide, optim, BULK)
        return [svi.step() for _ in range(count)]

    guide, optim = make(), Adam({"lr": 0.05})
    steps(guide, optim, calls)
    state, random = copy.deepcopy(optim.get_state()), torch.get_rng_state()
    uninterrupted = copy.deepcopy(guide)
    losses = []
    for each in (way(guide, make), uninterrupted):
        if each is uninterrupted:
            pyro.clear_param_store()
        optim = Adam({"lr": 0.05})
        optim.set_state(copy.deepcopy(state))
        torch.set_rng_state(random)
        losses.append(steps(each, optim, 5))
    assert losses[0] == losses[1]


# Particles


def mixing(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=w @ X.T), obs=y)


def apart(X, y):
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=(w.unsqueeze(-2) * X).sum(-1).reshape(*w.shape[:-2], -1)), obs=y)


def test_the_first_step_refuses_a_model_that_mixes_particles():
    X, y = torch.randn(16, 3), torch.ones(16)
    with pytest.raises(ValueError, match="treat samples independently.*vectorize_particles=False"):
        SVI(mixing, small(mixing), Adam({"lr": 0.01}), BULK).step(X, y)
    pyro.clear_param_store()
    SVI(mixing, small(mixing), Adam({"lr": 0.01}), Trace_ELBO(num_particles=2)).step(X, y)


# Steps that go wrong


def test_samples_at_which_the_model_cannot_be_evaluated_make_the_stretching_shrink():
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if bool((z.abs() > 6).any()):
            raise torch.linalg.LinAlgError("not positive definite")
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    guide = small(model, path_gradient=True, overdispersion=8.0, init_scale=1.0)
    losses = train(model, guide, 60)
    assert all(map(math.isfinite, losses))
    assert float(guide._stretching.excess) < 6.0


def test_an_error_of_the_model_itself_is_raised():
    broken = False

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        if broken:
            raise RuntimeError("broken for other reasons")

    guide = small(model, path_gradient=True, overdispersion=2.0)
    train(model, guide, 2)
    broken = True
    with pytest.raises(RuntimeError, match="for other reasons"):
        train(model, guide, 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"path_gradient": True}], ids=["plain", "path gradient"])
def test_a_step_without_a_finite_gradient_changes_no_parameter(bad, settings):
    factor = 1.0

    def model():
        z = pyro.sample("z", dist.Normal(torch.ones(2), 1.0).to_event(1))
        y = z.square()
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * factor)
        pyro.factor("factor", -y.sum(-1))

    guide = small(model, **settings)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step()
    before = copy.deepcopy(guide.state_dict())
    factor = bad
    with pytest.warns(Warning, match="a gradient of the guide was not finite"):
        svi.step()
    after = guide.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "progress")
    factor = 1.0
    assert math.isfinite(svi.step())
    assert not torch.equal(guide.affine, before["affine"])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_parameters_that_are_not_finite_are_named(bad):
    guide = small(vector).setup()
    guide.affine.data[0, 0] = bad
    with pytest.raises(ArithmeticError, match="parameters of the guide are not finite: affine"):
        guide()


def test_no_guide_is_kept_alive_by_its_gradients():
    import gc
    import weakref

    guide = small(vector)
    train(vector, guide, 2)
    reference = weakref.ref(guide)
    pyro.clear_param_store()
    del guide
    gc.collect()
    assert reference() is None


# Start


def underflow():
    tau = pyro.sample("tau", dist.Gamma(0.01, 0.01))
    with pyro.plate("groups", 5):
        b = pyro.sample("b", dist.Normal(0.0, tau**-0.5))
        pyro.sample("y", dist.Binomial(10, logits=b), obs=torch.tensor([3.0, 5.0, 4.0, 6.0, 2.0]))


PRIORS = {
    "spike at 0": lambda: dist.Gamma(0.01, 0.01),
    "heavy tails": lambda: dist.HalfCauchy(1e3),
    "bounded": lambda: dist.Beta(0.01, 0.01),
    "wide": lambda: dist.Normal(0.0, 1e3),
    "far": lambda: dist.Normal(1e4, 1.0),
    "log-normal": lambda: dist.LogNormal(0.0, 20.0),
    "no moments": lambda: dist.StudentT(0.2),
    "spike and slab": lambda: mixture(dist.Normal(torch.zeros(2), torch.tensor([1e-3, 10.0]))),
    "mixture of positive": lambda: mixture(dist.LogNormal(torch.tensor([0.0, 20.0]), torch.ones(2))),
    "mixture of bounded": lambda: mixture(dist.Uniform(torch.zeros(2), torch.ones(2))),
    "masked mixture": lambda: dist.MaskedMixture(torch.tensor(True), dist.Normal(0.0, 1.0), dist.Normal(0.0, 1e3)),
}


def mixture(components):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(components.batch_shape)), components)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_any_proper_prior_has_a_finite_start(prior):
    def model():
        scale = pyro.sample("scale", prior())
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1e-3 + scale.abs()))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    guide = small(model)
    assert all(map(math.isfinite, train(model, guide, 20, lr=0.01)))


def test_a_guide_of_a_mixture_of_equal_components_is_that_of_the_component():
    bounds = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 3.0]])
    results = []
    for prior in (mixture(dist.Uniform(*bounds)), dist.Uniform(1.0, 3.0)):

        def model(prior=prior):
            with pyro.plate("n", 4):
                pyro.sample("z", prior.expand([4]))

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = small(model, init_loc_fn=init_to_feasible).setup()
        pyro.set_rng_seed(0)  # the priors draw different numbers of random numbers
        results.append((guide.quantiles([0.1, 0.9])["z"], BULK.loss(model, guide)))
    assert_close(*results)


MIXTURES = {
    "scalar": lambda: mixture(dist.Uniform(torch.ones(2), torch.full((2,), 3.0))),
    "batch": lambda: mixture(dist.Uniform(torch.ones(4, 2), torch.full((4, 2), 3.0))),
    "vector": lambda: mixture(dist.Uniform(torch.ones(2, 3), torch.full((2, 3), 3.0)).to_event(1)),
    "bound without components": lambda: mixture(dist.Uniform(torch.ones(3), torch.full((2, 3), 3.0)).to_event(1)),
    "mixture": lambda: mixture(mixture(dist.Uniform(torch.ones(2, 5), torch.full((2, 5), 3.0)))),
    "mixture of vectors": lambda: mixture(
        mixture(dist.Uniform(torch.ones(2, 5, 3), torch.full((2, 5, 3), 3.0)).to_event(1))
    ),
}


@pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)
def test_the_bijection_of_a_mixture_keeps_shapes_and_ends_in_the_support(make):
    prior = make()
    for registry in (biject_to, transform_to):
        bijection, x = registry(prior.support), torch.randn(prior.shape())
        y = bijection(x)
        assert y.shape == prior.shape() and prior.support.check(y).all()
        assert_close(y, 1 + 2 * x.sigmoid())


@pytest.mark.parametrize("shape", [(2,), (2, 1), (3, 2)], ids=str)
def test_mixture_components_of_different_supports_are_refused(shape):
    upper = 1.0 + torch.arange(2.0).reshape(2, *shape[1:]) if shape[0] == 2 else torch.tensor([1.0, 2.0]).expand(shape)

    def model():
        components = dist.Uniform(torch.zeros(shape), upper)
        pyro.sample("z", mixture(components.to_event(1) if shape == (2, 1) else components).to_event())

    with pytest.raises(NotImplementedError, match="one support.*upper_bound is"):
        small(model).setup()


def test_an_underflowing_median_is_no_start():
    for seed in range(3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = small(underflow)
        losses = train(underflow, guide, 20, lr=0.01)
        assert max(losses) < 1e4
        assert guide.median()["b"].abs().max() < 100


def test_the_start_is_the_priors_median_where_that_is_moderate():
    def model():
        z = pyro.sample("z", dist.LogNormal(3.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(20.0))

    pyro.set_rng_seed(3)
    default = small(model).setup()
    pyro.set_rng_seed(3)
    median = small(model, init_loc_fn=init_to_median).setup()
    assert_close(default.affine, median.affine, rtol=0, atol=0)


@pytest.mark.slow
def test_seeds():
    """The log evidence of this model of the BUGS book is -73.409, by quadrature and long runs of NUTS."""
    torch.set_default_dtype(torch.float32)
    r = torch.tensor([10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3.0])
    n = torch.tensor([39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7.0])
    x1, x2 = torch.tensor([0.0] * 11 + [1.0] * 10), torch.tensor([0.0] * 5 + [1.0] * 6 + [0.0] * 5 + [1.0] * 5)

    def model():
        a = [pyro.sample(f"a{i}", dist.Normal(0.0, 10.0)) for i in range(4)]
        tau = pyro.sample("tau", dist.Gamma(0.01, 0.01))
        with pyro.plate("plates", 21):
            b = pyro.sample("b", dist.Normal(0.0, tau**-0.5))
            pyro.sample("r", dist.Binomial(n, logits=a[0] + a[1] * x1 + a[2] * x2 + a[3] * x1 * x2 + b), obs=r)

    guide = AutoHollowCNF(model, path_gradient=True)
    train(model, guide, 1500, lr=0.01, elbo=Trace_ELBO(num_particles=32, vectorize_particles=True))
    result = diagnose(model, guide, log_likelihood=False, posterior_predictive=False)
    assert result.elbo == pytest.approx(-73.42, abs=0.03)
    assert result.iw_bound == pytest.approx(-73.409, abs=0.02)


# Errors at the right time, before the first call and in other programs


@pytest.mark.parametrize(
    "settings, error, name",
    [
        ({"hiden_dims": [4]}, TypeError, "hiden_dims"),
        ({"conditioner": "grupped"}, ValueError, "grupped"),
        ({"solver": "dopri"}, ValueError, "dopri"),
        ({"solver": 5}, TypeError, "solver"),
    ],
)
def test_settings_are_refused_at_construction(settings, error, name):
    with pytest.raises(error, match=name):
        AutoHollowCNF(vector, **settings)


def test_construction_draws_no_random_numbers():
    before = torch.get_rng_state()
    AutoHollowCNF(vector)
    assert torch.equal(before, torch.get_rng_state())


def test_a_solver_may_be_given_by_its_name():
    assert AutoHollowCNF(vector, solver="rk4").solver == Solver("rk4")


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_data_that_are_not_finite_are_named(bad):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor([0.0, bad, 1.0]))

    with pytest.raises(ValueError, match=f"observed value of site 'y' is {bad}"):
        small(model)()


def test_setup_makes_parameters_and_without_it_they_are_missed_aloud():
    guide = AutoHollowCNF(vector, [4])
    with pytest.raises(RuntimeError, match="guide.setup"):
        torch.optim.Adam(guide.parameters())
    assert guide.setup(2) is guide
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    before = guide.affine.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        Trace_ELBO().differentiable_loss(vector, guide, 2).backward()
        optimizer.step()
    assert not torch.equal(before, guide.affine)


def test_a_guide_that_was_moved_before_it_is_set_up_is_made_there():
    guide = AutoHollowCNF(vector, [4]).to(torch.float32)
    assert guide.setup(2).affine.dtype == torch.float32
    pyro.clear_param_store()
    guide()


def test_the_median_of_a_fresh_guide_is_its_start():
    def model():
        pyro.sample("z", dist.Normal(torch.tensor([1.0, -2.0, 30.0]), 1.0).to_event(1))
        pyro.sample("s", dist.LogNormal(torch.zeros(3), 1.0).to_event(1))

    guide = AutoHollowCNF(model, init_loc_fn=lambda site: torch.ones(3), init_scale=1.0)
    for value in guide.median().values():
        assert_close(value, torch.ones(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_elbo_is_refused_with_one_clear_error(warm_up, vectorized):
    elbo = JitTrace_ELBO(num_particles=2, vectorize_particles=vectorized)
    with pytest.raises(RuntimeError, match="use Trace_ELBO, and compile=True"):
        SVI(vector, small(vector, warm_up=warm_up), Adam({"lr": 0.01}), elbo).step()


def test_in_a_guide_list_masked_elements_work_too():
    guide = AutoGuideList(by_handler)
    guide.append(small(poutine.block(by_handler, hide=["mu"])))
    guide.append(small(poutine.block(by_handler, expose=["mu"])))
    assert all(map(math.isfinite, train(by_handler, guide, 20)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_a_trained_guide_is_exported_by_trace_module():
    guide = small(vector)
    train(vector, guide, 2)
    exported = torch.jit.trace_module(guide.requires_grad_(False), {"call": ()}, check_trace=False)
    first, second = exported.call(), exported.call()
    assert first[0].shape == (3,) and not torch.equal(first[0], second[0])


def test_all_attributes_of_a_guide_can_be_read():
    for guide in (AutoHollowCNF(vector), small(vector).setup()):
        assert dict(inspect.getmembers(guide))["solver"] == guide.solver
