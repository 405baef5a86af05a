# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Posteriors that depend on data: from a Pyro model, or from pairs of latents and data, to an amortised posterior."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyro_hollow.nn.standardization import check_finite
from pyro_hollow.ode import Solver
from pyro_hollow.train import MaximumLikelihood, Training, train
from pyro_hollow.train.progress import Progress

from .amortised_density import ConditionalDensity, Features, StackedMixture, stack
from .calibration import Calibration, calibrate
from .inference_data import inference_data
from .posterior_given_data import PosteriorGivenData, unpack
from .saving import write
from .simulation import Simulator, Site, drop_rows

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["AmortisedGuide", "AmortisedPosterior", "fit_amortised"]

_LEAST_ROWS = 20
_VALIDATION = 0.1  # of the simulations
_VALIDATE_EVERY, _PATIENCE = 100, 10
_GAUSSIAN_STEPS = 1500
_CONTEXT_DIM = 32
_SCORED = 1000  # samples whose densities are computed at once


def fit_amortised(
    model: Callable[..., Any] | None = None,
    *args: Any,
    observed: Sequence[str] | None = None,
    sites: Sequence[str] | None = None,
    theta: Tensor | Mapping[str, Tensor] | None = None,
    x: Tensor | Mapping[str, Tensor] | None = None,
    support: constraints.Constraint | Mapping[str, constraints.Constraint] | None = None,
    num_simulations: int = 10_000,
    embedding: nn.Module | None = None,
    hidden_dims: Sequence[int] | None = None,
    num_flows: int = 4,
    num_steps: int = 3000,
    batch_size: int = 256,
    lr: float = 3e-3,
    time_limit: float | None = None,
    seed: int | None = None,
    compile: bool | str = "auto",
    progress: bool = True,
    **kwargs: Any,
) -> AmortisedPosterior:
    r"""
    Fits a posterior for all data that a model can simulate, :math:`q(\theta | x) \approx p(\theta | x)`. The likelihood
    need not be known: the model is run as a prior and a simulator, and q maximises :math:`\sum_k \log q(\theta_k |
    x_k)` over the pairs.

    Usage::

        def model(x=None):
            rate = pyro.sample("rate", dist.LogNormal(0., 1.))
            with pyro.plate("days", 10):
                pyro.sample("x", dist.Poisson(rate), obs=x)

        amortised = fit_amortised(model, observed=["x"])
        print(amortised)
        amortised.posterior(x_observed).draws(1000)["rate"]

    1.  The model is run num_simulations times: in a plate on the outside of its own if it gives the same there as
        alone, and else one by one, with a warning. Runs that raise an error and draws that are NaN or infinite are left
        out, with a warning that counts them.
    2.  Latents are mapped to the real line, so that the posterior has no mass outside of their supports: by
        ``biject_to``, and those between two bounds by maps that are as linear between them as the data ask
        for, :class:`~pyro_hollow.infer.soft_clip.SoftClip`. Latents and data are standardised.
    3.  A Gaussian whose moments depend on the data is fitted, and then, by exact maximum likelihood, the same Gaussian
        in front of which a Hollow-CNF with the data as context stands, in half of the steps; a second flow goes without
        the Gaussian. The third is like the better of the two, in all steps, and the others are like the best. A tenth
        of the simulations is kept for the validation, which chooses, whose best parameters are restored, and which
        weighs the flows in the mixture that is the result.

    :param model: a Pyro model with its prior and simulator; None to give pairs.
    :param args: positional arguments of the model.
    :param observed: the names of the sites that are data; they may be deterministic, such as summary statistics. None
        for the sites that are observed with these arguments, whose values are not used.
    :param sites: the names of the latents of interest; the others, discrete ones among them, are integrated over. None
        for all.
    :param theta: in place of a model, latents with shape ``(n, d)`` or, by name, ``(n, ...)``.
    :param x: the data that belong to them, likewise.
    :param support: of theta, a constraint for each name; None for the real line.
    :param num_simulations: the number of runs of the model.
    :param embedding: a network that maps data with shape ``(n, ...)``, scaled as a whole, to ``(n, features)``, and is
        trained with the flow. Data of several sites are flattened and joined. None to flatten the data and scale each
        column; or, where the only site of the data stands in a plate whose elements have one distribution, for moments
        and mean features that do not depend on their order.
    :param hidden_dims: widths of the flow's conditioner; see :func:`~pyro_hollow.transforms.conditional_hollow_cnf`.
    :param num_flows: the number of flows in the mixture; more cost more, and overfit less.
    :param num_steps: the most training steps of each flow.
    :param batch_size: the simulations of a step.
    :param lr: the learning rate, which falls along half a cosine.
    :param time_limit: seconds of wall time for the training.
    :param seed: the seed of torch's random numbers, whose global state is then restored. None to use the global state.
    :param compile: "auto" to solve the flow in compiled code if there is a C compiler; True to warn where there is
        none; False for no compiled code.
    :param progress: False for no bar.
    :param kwargs: keyword arguments of the model.
    :returns: the posterior.
    :raises TypeError: for both a model and pairs, or neither.
    :raises ValueError: for discrete latents, subsampled plates, factors, supports that depend on other sites, latents
        that are constant or outside of their support, fewer than 20 usable pairs, and settings out of range.

    References:

    [1] George Papamakarios, Iain Murray. Fast epsilon-free Inference of Simulation Models with Bayesian Conditional
    Density Estimation. [arXiv:1605.06376]

    [2] David S. Greenberg, Marcel Nonnenmacher, Jakob H. Macke. Automatic Posterior Transformation for Likelihood-Free
    Inference. [arXiv:1905.07488]
    """
    _check_settings(num_simulations=num_simulations, num_flows=num_flows, num_steps=num_steps, batch_size=batch_size)
    if (model is None) == (theta is None) or (theta is None) != (x is None):
        raise TypeError("give either a model, or both theta and x")
    begin = time.perf_counter()
    label = "simulations" if progress else False
    settings = {"num_steps": num_steps, "batch_size": batch_size, "lr": lr, "time_limit": time_limit}
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if model is not None:
            result = _simulated(model, args, kwargs, observed, sites, num_simulations, label)
        else:
            result = _paired(theta, x, support)
        result._train(embedding, hidden_dims, num_flows, compile, settings, progress)
    result.seconds = time.perf_counter() - begin
    return result


def _check_settings(**counts: int) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, but got {value!r}")


def _simulated(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observed: Sequence[str] | None,
    sites: Sequence[str] | None,
    count: int,
    label: str | bool,
) -> AmortisedPosterior:
    """A posterior without networks, with the simulations of a model."""
    simulator = Simulator(model, args, kwargs, observed, sites)
    notes = []
    if not simulator.vectorized:
        notes.append(f"the model is run one by one, as in a plate it is not the same ({simulator.reason})")
        warnings.warn(notes[-1], stacklevel=3)
    with Progress(total=count, desc=label or None, disable=label is False) as bar:
        found = simulator.draw(count, bar)
    if found.failed:
        notes.append(f"{found.failed} of {count} simulations failed and are left out, the last with {found.error}")
        warnings.warn(notes[-1], stacklevel=3)
    return AmortisedPosterior(simulator.latents, found.theta, found.x, notes, simulator)


def _paired(theta: Any, x: Any, support: Any) -> AmortisedPosterior:
    """A posterior without networks, with pairs of the user's."""
    thetas, xs = _by_name("theta", theta), _by_name("x", x)
    count = {len(value) for group in (thetas, xs) for value in group.values()}
    if len(count) > 1:
        raise ValueError(f"theta and x must have as many rows, but have {sorted(count)}")
    given = support if isinstance(support, Mapping) else dict.fromkeys(thetas, support or constraints.real)
    if unknown := [name for name in given if name not in thetas]:
        raise ValueError(f"support must have the names of theta, {list(thetas)}, but has {unknown}")
    latents = []
    for name, value in thetas.items():
        own: Any = given.get(name, constraints.real)
        latents.append(Site(name, value.shape[1:], own))
        latents[-1].check(value)
        finite = value.isfinite().reshape(*value.shape[: value.dim() - own.event_dim], -1).all(-1)
        inside = own.check(value) | ~finite
        if not bool(inside.all()):
            raise ValueError(f"theta must lie in its support, but {name!r} has values outside of {own}")
    return AmortisedPosterior(latents, thetas, xs, [], None)


def _by_name(name: str, value: Any) -> dict[str, Tensor]:
    values = dict(value) if isinstance(value, Mapping) else {name: value}
    for key, each in values.items():
        if not isinstance(each, Tensor):
            raise TypeError(f"{key} must be a tensor, but is a {type(each).__name__}: pass torch.as_tensor(...)")
        if each.dim() < 2 and name == "theta" and not isinstance(value, Mapping):
            raise ValueError(f"theta must have shape (n, d), but has {tuple(each.shape)}; .unsqueeze(-1) gives it")
        if not each.dim():
            raise ValueError(f"{key} must have draws in its first dimension, but is a scalar")
    return values


class AmortisedPosterior(nn.Module):
    """
    A posterior that depends on data, made by :func:`fit_amortised`; ``print`` it for what it rests on.

    :ivar sites: the latent sites.
    :ivar flows: the networks.
    :ivar trainings: the course of the training of each flow; ``losses`` in nats per simulation, of the unconstrained
        latents.
    :ivar int num_simulations: the number of pairs of latents and data that were used.
    :ivar float log_prob: the mean log density of the latents of the validation sets, in their own units.
    :ivar Tensor weights: the weights of the flows, which maximise that density.
    :ivar notes: all that did not go by plan, in words.
    :ivar float seconds: the wall time of simulation and training.
    """

    def __init__(
        self,
        latents: Sequence[Site],
        theta: dict[str, Tensor],
        x: dict[str, Tensor],
        notes: list[str],
        simulator: Simulator | None,
    ) -> None:
        super().__init__()
        self.sites, self.notes, self._simulator = list(latents), notes, simulator
        dtype = torch.get_default_dtype() if simulator is not None else next(iter(theta.values())).dtype
        x = {name: value.to(dtype) for name, value in x.items()}
        theta = {name: value.to(dtype) for name, value in theta.items()}
        theta, x, dropped = drop_rows(theta, x)
        self.num_simulations = len(next(iter(theta.values())))
        if dropped:
            notes.append(f"{dropped} of {dropped + self.num_simulations} pairs are NaN or infinite and are left out")
            warnings.warn(notes[-1], stacklevel=4)
        if self.num_simulations < _LEAST_ROWS:
            raise ValueError(f"at least {_LEAST_ROWS} pairs are needed, but {self.num_simulations} are usable")
        self._x_shapes = {name: value.shape[1:] for name, value in x.items()}
        u = torch.cat([biject_to(s.support).inv(theta[s.name]).reshape(self.num_simulations, -1) for s in latents], -1)
        if not bool(u.isfinite().all()):  # rounded onto the edge of the support
            kept = u.isfinite().all(-1)
            notes.append(f"{int((~kept).sum())} pairs with latents on the edge of the support are left out")
            warnings.warn(notes[-1], stacklevel=4)
            u, x = u[kept], {name: value[kept] for name, value in x.items()}
            self.num_simulations = len(u)
        self._pairs: tuple[Tensor, Tensor] | None = (u, self._joined(x))
        self._tell_of_constants()
        self.trainings: list[Training] = []
        self.seconds = 0.0
        self.flows = nn.ModuleList()
        self.log_prob = math.nan

    weights: Tensor

    def _tell_of_constants(self) -> None:
        """Warns of columns of the data that are constant."""
        assert self._pairs is not None
        _, x = self._pairs
        columns = x.reshape(len(x), -1)
        constant = int((columns == columns[0]).all(0).sum())
        if constant:
            self.notes.append(f"{constant} of {columns.shape[1]} columns of x are constant, and tell nothing")
            warnings.warn(self.notes[-1], stacklevel=5)

    def _joined(self, x: Mapping[str, Tensor]) -> Tensor:
        """The data of all sites in one tensor, of one site in its own shape."""
        if len(self._x_shapes) == 1:
            return x[next(iter(self._x_shapes))]
        parts = [x[name].reshape(*x[name].shape[: x[name].dim() - len(s)], -1) for name, s in self._x_shapes.items()]
        return torch.cat(parts, -1)

    def _train(
        self,
        embedding: nn.Module | None,
        hidden_dims: Sequence[int] | None,
        num_flows: int,
        compile: bool | str,
        settings: dict[str, Any],
        progress: bool,
    ) -> None:
        """Makes and trains the networks."""
        assert self._pairs is not None
        u, x = self._pairs
        with torch.no_grad():
            ladj = torch.stack([*unpack(self.sites, u)[1].values()]).sum(0)
        bounded = torch.cat([torch.full(s.unconstrained_shape, s.is_bounded).reshape(-1) for s in self.sites])
        bounded = bounded.to(u.device)
        solver = Solver("dopri5", rtol=1e-4, atol=1e-4, compile=_compiles(compile))
        limit = settings.pop("time_limit")
        deadline = None if limit is None else time.perf_counter() + limit
        held, used = torch.randperm(len(u), device=u.device).split(_parts(len(u)))
        exchangeable = None if self._simulator is None else self._simulator.exchangeable
        tried: dict[_Plan, float] = {}
        num_steps = settings.pop("num_steps")
        for k in range(num_flows):
            plan = _next_plan(k, num_flows, num_steps, tried)
            own = embedding if k == 0 or embedding is None else _fresh(embedding)
            features = Features(x, own, exchangeable)
            density = ConditionalDensity(u, bounded, features, hidden_dims, _CONTEXT_DIM, solver, plan.shifts).to(u)
            left = None if deadline is None else max((deadline - time.perf_counter()) / (num_flows - k), 1e-3)
            label = f"flow {k + 1} of {num_flows}" if progress else False
            training = _train_one(
                density, u, x, used, held, num_steps=plan.num_steps, time_limit=left, progress=label, **settings
            )
            self.flows.append(density)
            self.trainings.append(training)
            tried[plan] = min((v for _, v in training.validations if not math.isnan(v)), default=math.inf)
            if training.stopped in ("time_limit", "interrupted"):
                self.notes.append(f"training of flow {k + 1} was ended by {training.stopped}")
            self.notes += training.events
            if training.stopped == "interrupted":
                break
        with torch.no_grad():
            densities = torch.stack([_log_densities(density, u[held], x[held]) for density in self.flows], -1)
            self.register_buffer("weights", stack(densities.double()).to(u))
            mixed = (densities + self.weights.log()).logsumexp(-1).mean()
            self.log_prob = float(mixed - ladj[held].mean())
        self._pairs = None

    def posterior(self, x: Tensor | Mapping[str, Tensor]) -> PosteriorGivenData:
        """
        The posterior given data, a distribution of Pyro.

        :param x: the data, in the shape of the observed site, or by name if there are several; or many data in leading
            dimensions, which become the batch shape.
        :raises ValueError: for data of another shape, and values that are not finite.
        """
        return PosteriorGivenData(self._unconstrained(self._checked(x)), self.sites)

    def _checked(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        values = dict(x) if isinstance(x, Mapping) else {next(iter(self._x_shapes)): x}
        if set(values) != set(self._x_shapes):
            raise ValueError(f"x must have the sites {list(self._x_shapes)}, but has {list(values)}")
        for name, shape in self._x_shapes.items():
            value = torch.as_tensor(values[name]).to(self.weights)
            if value.shape[value.dim() - len(shape) :] != shape or value.dim() < len(shape):
                raise ValueError(
                    f"x must have shape (*, {', '.join(map(str, shape))}) at {name!r}, but has {tuple(value.shape)}"
                )
            check_finite("x", value)
            values[name] = value
        batches = {name: tuple(values[name].shape[: values[name].dim() - len(s)]) for name, s in self._x_shapes.items()}
        if len(set(batches.values())) > 1:
            got = ", ".join(f"{batch} at {name!r}" for name, batch in batches.items())
            raise ValueError(f"x must have the same leading dimensions at all sites, but has {got}")
        return self._joined(values)

    def _unconstrained(self, x: Tensor) -> Any:
        """The distribution of the unconstrained latents."""
        parts = [density(x) for density in self.flows]
        return parts[0] if len(parts) == 1 else StackedMixture(parts, self.weights)

    def inference_data(self, x: Tensor | Mapping[str, Tensor], num_samples: int = 4000) -> InferenceData:
        """
        Draws from the posterior given one data set, for ArviZ.

        :param x: the data.
        :param num_samples: the number of draws.
        """
        posterior = self.posterior(x)
        if posterior.batch_shape:
            raise ValueError(f"x must be one data set, but has batch shape {tuple(posterior.batch_shape)}")
        draws = posterior.draws(num_samples)
        return inference_data({"posterior": draws}, {"inference": "fit_amortised"})

    def guide(self, x: Tensor | Mapping[str, Tensor], model: Callable[..., Any] | None = None) -> AmortisedGuide:
        """
        A guide with these latents given data: for :func:`~pyro_hollow.diagnose`, which corrects its draws by importance
        weights where the model's likelihood is known, and for SVI, which trains the networks further.

        :param x: the data.
        :param model: the model whose latents are to be guided; None for that of :func:`fit_amortised`.
        :raises ValueError: for pairs without a model.
        """
        if model is None and self._simulator is None:
            raise ValueError("guide needs the model, as this posterior comes from pairs of theta and x")
        return AmortisedGuide(self, x, model if model is not None else self._simulator.model)  # type: ignore[union-attr]

    def sample_sites(self, x: Tensor | Mapping[str, Tensor], name: str = "amortised") -> dict[str, Tensor]:
        """
        Samples the sites as a part of a guide, in whatever plates it stands in, and puts the networks into Pyro's store
        for the optimizer: for local latents, in minibatches::

            guide = AutoGuideList(model, create_plates=lambda y: pyro.plate("groups", 10_000, subsample_size=100))

            def local(y):
                with guide.plates["groups"] as index:
                    return amortised.sample_sites(y[index])

            guide.append(AutoNormal(poutine.block(model, hide=["z"])))
            guide.append(local)

        :param x: the data, with the dimensions of the plates in front; the sites have the same.
        :param name: the name of the networks in Pyro's store, and of an auxiliary site.
        :returns: the values by site.
        """
        pyro.module(name, self)
        posterior = self.posterior(x)
        u = pyro.sample(f"_{name}_latent", posterior.base, infer={"is_auxiliary": True})
        values, ladjs = posterior.unpack(u)
        return {
            site.name: pyro.sample(
                site.name, dist.Delta(values[site.name], -ladjs[site.name], event_dim=len(site.shape))
            )
            for site in self.sites
        }

    def calibrate(
        self,
        num_simulations: int = 1000,
        num_draws: int = 200,
        *,
        theta: Tensor | Mapping[str, Tensor] | None = None,
        x: Tensor | Mapping[str, Tensor] | None = None,
        seed: int | None = None,
    ) -> Calibration:
        """
        Simulation-based calibration and expected coverage, by fresh simulations of the model or by pairs that the fit
        has not seen; see :class:`~pyro_hollow.infer.calibration.Calibration`.

        :param num_simulations: the number of simulations.
        :param num_draws: the draws from the posterior of each.
        :param theta: in place of simulations, latents as for :func:`fit_amortised`.
        :param x: the data that belong to them.
        :param seed: the seed of torch's random numbers, whose global state is then restored.
        :raises ValueError: without a model and without pairs.
        """
        with torch.random.fork_rng(enabled=seed is not None), torch.no_grad():
            if seed is not None:
                torch.manual_seed(seed)
            if theta is None or x is None:
                if self._simulator is None:
                    raise ValueError(
                        "calibrate needs pairs theta and x that the fit has not seen, as there is no model"
                    )
                found = self._simulator.draw(num_simulations)
                thetas, xs = found.theta, found.x
            else:
                thetas = dict(theta) if isinstance(theta, Mapping) else {self.sites[0].name: theta}
                xs = dict(x) if isinstance(x, Mapping) else {next(iter(self._x_shapes)): x}
            thetas, xs, _ = drop_rows({n: v.to(self.weights) for n, v in thetas.items()}, dict(xs))
            return calibrate(self.posterior, thetas, xs, num_draws)

    def save(self, path: str | Path) -> None:
        """
        Saves all but the model.

        :param path: the path of the file.
        """
        write(self, path)

    @staticmethod
    def load(path: str | Path) -> AmortisedPosterior:
        """
        Loads what :meth:`save` wrote. The file is a pickle: load only files that you trust. The result has no model:
        :meth:`guide` and :meth:`calibrate` need one, or pairs.

        :param path: the path of the file.
        """
        loaded: AmortisedPosterior = torch.load(path, weights_only=False)
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_simulator": None}

    def __str__(self) -> str:
        sites = ", ".join(f"{s.name} {tuple(s.shape)}" if s.shape else s.name for s in self.sites)
        data = ", ".join(f"{name} {tuple(shape)}" for name, shape in self._x_shapes.items())
        steps = " + ".join(f"{t.num_steps:,}" for t in self.trainings)
        weights = ", ".join(f"{weight:.2f}" for weight in self.weights.tolist())
        lines = [
            f"Amortised posterior of {sites} given {data}",
            f"simulations  {self.num_simulations:,}, a tenth of them for the validation",
            f"density      a mixture of {len(self.flows)} Hollow-CNFs, with weights {weights}",
            f"validation   {self.log_prob:.3f} nats per simulation, the mean log density of the latents",
            f"training     {steps} steps, {self.seconds:.1f} s",
            "It holds for data that the model simulates, where calibrate() tests it. With a known likelihood,",
            "diagnose(model, amortised.guide(x), ...) corrects draws by importance weights, and judges them.",
        ]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    __repr__ = __str__


class AmortisedGuide(AutoContinuous):
    """
    The guide of an :class:`AmortisedPosterior` given data; see :meth:`AmortisedPosterior.guide`.

    :param amortised: the posterior.
    :param x: the data.
    :param model: the model.
    """

    def __init__(
        self, amortised: AmortisedPosterior, x: Tensor | Mapping[str, Tensor], model: Callable[..., Any]
    ) -> None:
        names = [site.name for site in amortised.sites]
        super().__init__(model)
        self._names = names
        self.amortised = amortised
        self._data = amortised._checked(x)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        known = {name: site["value"].shape for name, site in self.prototype_trace.iter_stochastic_nodes()}
        expected = {site.name: site.shape for site in self.amortised.sites}
        if list(known.items()) != list(expected.items()):
            raise ValueError(f"model must have the latents {expected} of the posterior, but has {known}")

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the distribution of the unconstrained latents."""
        return self.amortised._unconstrained(self._data)


class _Plan(NamedTuple):
    """A density with a Gaussian behind its flow, or without, and the steps of its training."""

    shifts: bool
    num_steps: int


def _next_plan(k: int, num_flows: int, num_steps: int, tried: Mapping[_Plan, float]) -> _Plan:
    """
    The plan of flow k, given the validation losses of earlier ones. Two short trainings find the better density, and a
    full one whether it overfits; the others are like the best.
    """
    if k < 2:
        return _Plan(k == 0, num_steps if num_flows <= 2 else -(-num_steps // 2))
    best = min(tried, key=lambda plan: tried[plan])
    return best._replace(num_steps=num_steps) if k == 2 else best


def _fresh(embedding: nn.Module) -> nn.Module:
    """A copy of a network with parameters of its own, drawn anew where its layers know how."""
    fresh = copy.deepcopy(embedding)
    for module in fresh.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return fresh


def _compiles(compile: bool | str) -> bool:
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', but got {compile!r}")
    return bool(compile)


def _parts(count: int) -> list[int]:
    """The sizes of the validation set and of the training set."""
    held = max(1, int(_VALIDATION * count))
    return [held, count - held]


def _log_densities(distribution: Callable[[Tensor], Any], u: Tensor, x: Tensor) -> Tensor:
    pairs = zip(u.split(_SCORED), x.split(_SCORED), strict=True)
    return torch.cat([distribution(data).log_prob(rows) for rows, data in pairs])


def _train_one(
    density: ConditionalDensity,
    u: Tensor,
    x: Tensor,
    used: Tensor,
    held: Tensor,
    *,
    num_steps: int,
    batch_size: int,
    lr: float,
    time_limit: float | None,
    progress: str | bool,
) -> Training:
    """Trains one flow, after the Gaussian behind it."""

    def run(distribution: Any, parameters: Any, steps: int, limit: float | None, bar: str | bool) -> Training:
        return train(
            MaximumLikelihood(distribution, u[used], context=x[used], batch_size=batch_size),
            parameters,
            num_steps=steps,
            lr=lr,
            schedule="cosine",
            time_limit=limit,
            validate=lambda: -float(_log_densities(distribution, u[held], x[held]).mean()),
            validate_every=_VALIDATE_EVERY,
            patience=_PATIENCE,
            progress=bar,
        )

    if density.shifts:
        first = [p for name, p in density.named_parameters() if not name.startswith(("flow", "context"))]
        quarter = None if time_limit is None else time_limit / 4
        run(density.gaussian, first, min(_GAUSSIAN_STEPS, num_steps), quarter, False)
    return run(density, list(density.parameters()), num_steps, time_limit, progress)
