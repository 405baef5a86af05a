# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Fits a posterior to a Pyro model, in one call."""

from __future__ import annotations

import math
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation
from torch import Tensor

from pyro_hollow.infer.autoguide import AutoHollowCNF
from pyro_hollow.infer.diagnostics import GuideDiagnostics, Pair, describe, diagnose
from pyro_hollow.infer.elbo import DensityELBO, InclusiveKL, PathELBO, supports
from pyro_hollow.infer.gaussian import GaussianFit, fit_gaussian
from pyro_hollow.infer.gaussian_mixture import GaussianMixture
from pyro_hollow.infer.graph import MANY, independent_groups, sparse_conditioner
from pyro_hollow.infer.guide_posterior import spread_normal
from pyro_hollow.infer.importance import smooth
from pyro_hollow.infer.inference_data import import_arviz
from pyro_hollow.infer.log_density import LogDensity
from pyro_hollow.infer.mixture import are_apart, fit_mixture, fit_mixtures, has_several, max_components
from pyro_hollow.infer.model_density import is_marked
from pyro_hollow.infer.modes import Mode, Modes, judge_modes, search, search_around
from pyro_hollow.infer.particles import MixedParticles
from pyro_hollow.infer.report import draw, page
from pyro_hollow.infer.saving import check_latents, latents, parameters, restore_parameters, traced, write
from pyro_hollow.nn import GraphConditioner
from pyro_hollow.train import ELBO, Training, train
from pyro_hollow.train.loop import FEWEST_LOSSES
from pyro_hollow.train.schedule import mean

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["Fit", "fit"]

_NUM_PARTICLES = 32  # of models and guides that are run by Pyro's handlers, or one particle at a time
_BACKENDS = {"handlers": "by Pyro's handlers", "graph": "as a graph", "compiled": "as a compiled graph"}
_PARTICLES = {"plate": "particles in a plate", "vmap": "particles by vmap", "one by one": "one particle at a time"}
_RATE = 0.01
_INITIAL_SCALE = 0.1
_UNIFORM_STARTS = 8
# The most latents for which a search for modes is worth its time, and, where that finds none, a second Gaussian.
_SEARCHED, _TWO_STARTS = 256, 64
# Shares of a time limit, at most, as the flow gains more in what is left.
_GAUSSIAN_TIME, _GRAPH_TIME = 0.5, 0.1
_RESTARTS = 64  # of the search for modes around other guides than the default one
_MAX_RATE = 8.0  # e^8 is the most by which the flow changes a scale: the necks of hierarchical models are narrow
_MAX_STEPS = 4000
_NUM_SAMPLES = 4000  # that are weighed
# Weights with a smaller k-hat are light. Without a flow they must be worth a large share of the samples, too.
_LIGHT, _GAUSSIAN_SHARE = 0.5, 0.95
# Training goes on while they are worth a smaller share: how often, how many steps, with how many times the particles.
_LOW_SHARE, _EXTENSIONS, _EXTENSION_STEPS, _MORE_PARTICLES = 0.1, 2, 300, 3
# Weights that are not light are made lighter in so many steps, unless they are worth a smaller share.
_TAIL_STEPS, _TAIL_RATE, _LEAST_SHARE = 180, 0.001, 0.02
_COMPARED = 3 * _NUM_SAMPLES  # before and after, as a k-hat of fewer scatters by as much as it may fall
_TRIALS = 10  # draws, one of which the model must allow
_MIXED = "particles were mixed in training, so that the guide is none of this model; resume() trains one at a time"


def fit(
    model: Callable[..., Any],
    *args: Any,
    guide: Any = None,
    num_steps: int | None = None,
    num_particles: int | None = None,
    seed: int | None = None,
    compile: bool | str = "auto",
    time_limit: float | None = None,
    modes: bool | str = "auto",
    progress: bool = True,
    **kwargs: Any,
) -> Fit:
    r"""
    Fits a posterior to a Pyro model and its data, judges it, and corrects it by importance weights.

    Usage::

        result = fit(model, data)
        print(result)  # the verdict first
        arviz.summary(result.posterior)

    1.  A Gaussian over all latents is fitted by natural gradients from the best of a few moderate points
        (:func:`~pyro_hollow.infer.gaussian.fit_gaussian`).
    2.  Up to 256 latents, searches from 64 points (16 with more than 64 latents) look for modes
        (:func:`~pyro_hollow.infer.modes.search`). If there are several, a mixture of Gaussians is fitted to them
        (:func:`~pyro_hollow.infer.mixture.fit_mixture`), from which a flow need not tear a Gaussian apart. Where
        groups of latents are independent of each other, each has a mixture of its own.
    3.  From there an :class:`AutoHollowCNF` is trained by path gradients, until its ELBO no longer rises and the
        learning rate has fallen to zero, for at most 4,000 steps; :meth:`Fit.resume` takes more. The flow is skipped if
        the Gaussian or the mixture is so close that it would gain nothing. With 64 latents or more the second
        derivatives of the density show which of them it binds together; if these are few, the flow has a
        :class:`~pyro_hollow.nn.GraphConditioner` on that graph, and else the default one. While few samples carry the
        weight, training goes on with more particles; if the k-hat is large, the tails are trained on weighted samples
        (:class:`~pyro_hollow.infer.elbo.InclusiveKL`). Steps that fail are taken back
        (:func:`~pyro_hollow.train.train`).
    4.  :func:`diagnose` computes the importance weights of 4,000 draws, and the modes that were found are compared with
        the draws.

    The model is evaluated as a :class:`LogDensity`. If that allows no plate of particles, it is slower, and gets 1,000
    corrected draws in place of 4,000, as each is predicted by itself. ``Ctrl-C`` ends the training early; the guide
    trained so far is diagnosed.

    :param callable model: a Pyro model with continuous latents; discrete ones must be marked for enumeration.
    :param args: positional arguments of the model.
    :param guide: one of Pyro's guides, or an :class:`AutoHollowCNF` with settings of your own. None for the default.
        Parameters of the guide, and of the model, are trained where they are.
    :param num_steps: the number of training steps. None to train until the ELBO no longer rises, at most 4,000 steps.
    :param num_particles: the samples of the guide in each step. None for the batch size of :class:`LogDensity`, or 32
        where particles are evaluated one by one.
    :param seed: the seed of torch's random numbers, whose global state is then restored after the fit. None to use
        and advance the global state.
    :param compile: "auto" to solve the flow in compiled code if there is a C compiler, and to compile the model in the
        background once that is worthwhile; True to compile both first; False for neither.
    :param time_limit: seconds of wall time after which the training ends. What comes after it is not limited: weighing
        4,000 draws takes as long as a few dozen steps, and more than a hundred where particles are evaluated one by
        one.
    :param modes: "auto" to search for modes up to 256 latents, unless the data are subsampled; False for no search.
        With a guide of your own, the search comes after the training, and only judges its draws.
    :param bool progress: False for no bar.
    :param kwargs: keyword arguments of the model; pass arguments with one of the names above by position.
    :return: the fit.
    :raises TypeError: for arguments of another type, such as the class of a guide in place of an instance.
    :raises ValueError: for arguments out of range, and models and guides that :class:`LogDensity` or :func:`diagnose`
        refuse.
    :raises ArithmeticError: if the density is finite at no start, or steps fail again and again.
    :raises ImportError: without ArviZ.
    """
    import_arviz()  # before long work
    _check_counts(num_steps=num_steps, num_particles=num_particles)
    _check_limits(time_limit, seed)
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile must be True, False or 'auto', but got {compile!r}")
    _check_guide(guide)
    if modes not in (False, "auto"):
        raise ValueError(f"modes must be 'auto' or False, but got {modes!r}")
    run = _Run(model, args, kwargs, guide, num_particles, compile, modes)
    return run.go(Fit(model, args, kwargs), num_steps, time_limit, seed, progress)


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be a whole number, but got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")


def _check_limits(time_limit: Any, seed: Any) -> None:
    if time_limit is not None:
        if isinstance(time_limit, bool) or not isinstance(time_limit, Real):
            raise TypeError(f"time_limit must be a number of seconds, but got {time_limit!r}")
        if not 0 < float(time_limit) < math.inf:
            raise ValueError(f"time_limit must be positive and finite, but got {time_limit}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
        raise TypeError(f"seed must be a whole number, but got {seed!r}")


def _check_guide(guide: Any) -> None:
    if isinstance(guide, type):
        name = guide.__name__
        raise TypeError(f"guide must be an instance, but got the class {name}: pass guide={name}(model)")
    if guide is not None and not callable(guide):
        raise TypeError(f"guide must be a guide of Pyro, but got {guide!r}")
    if isinstance(guide, AutoLaplaceApproximation):
        raise ValueError(
            "guide must not be an AutoLaplaceApproximation, which is a point without a density while it is trained: "
            "train it by SVI and give guide.laplace_approximation(...) to diagnose, or leave guide out"
        )


@dataclass(repr=False)
class Fit:
    """
    A fitted posterior; ``print`` it for a page with the verdict and a table of latents.

    :ivar guide: the guide.
    :ivar GuideDiagnostics diagnostics: the findings of :func:`diagnose`. None for a model that subsamples its data, as
        the weights would be those of another posterior.
    :ivar Training training: the course of the training; its ``events`` list failed steps, restarts and the like.
    :ivar GaussianFit gaussian: the Gaussian that the flow started from; None for other guides.
    :ivar bool gaussian_suffices: True if the flow was not trained, as the Gaussian alone was close enough.
    :ivar float seconds: the wall time of the fit and of all calls of :meth:`resume`.
    :ivar str backend: the way in which the model and the flow were evaluated.
    :ivar reasons: notes in words: why no faster way was possible, why no draws were weighed, and the like.
    :ivar int num_particles: the number of samples of the guide in each step.
    :ivar compile: the argument of :func:`fit`.
    :ivar search_modes: the argument ``modes`` of :func:`fit`.
    :ivar Modes search: the modes that were found, in the unconstrained space; None without a search.
    """

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    guide: Any = None
    diagnostics: GuideDiagnostics | None = None
    training: Training | None = None
    gaussian: GaussianFit | None = None
    gaussian_suffices: bool = False
    seconds: float = 0.0
    backend: str = ""
    reasons: list[str] = field(default_factory=list)
    num_particles: int | None = None
    compile: bool | str = "auto"
    search_modes: bool | str = "auto"
    search: Modes | None = None

    @property
    def trusted(self) -> bool:
        """
        True if the corrected draws can be trusted: light enough weights, and none of the modes that were found is
        missed. False without diagnostics.
        """
        return self.diagnostics is not None and self.diagnostics.reliable

    @property
    def modes(self) -> list[Mode]:
        """The modes that were found, largest first; see :class:`~pyro_hollow.infer.modes.Mode`."""
        return [] if self.diagnostics is None else self.diagnostics.modes

    @property
    def elbo(self) -> float:
        """The evidence lower bound: a mean over the weighted draws, or over the last 100 steps if there are none."""
        if self.diagnostics is not None:
            return self.diagnostics.elbo
        return -mean(self.losses[-100:].tolist())

    @property
    def log_evidence(self) -> float:
        """An estimate of the log evidence, the logarithm of the mean importance weight; nan without diagnostics."""
        return math.nan if self.diagnostics is None else self.diagnostics.iw_bound

    @property
    def log_evidence_error(self) -> float:
        """The standard error of :attr:`log_evidence`; far too small where the k-hat is large."""
        return math.nan if self.diagnostics is None else self.diagnostics.iw_bound_error

    @property
    def khat(self) -> float:
        """The k-hat of the importance weights; nan without diagnostics."""
        return math.nan if self.diagnostics is None else self.diagnostics.khat

    @property
    def ess(self) -> float:
        """The effective sample size of the weighted draws; nan without diagnostics."""
        return math.nan if self.diagnostics is None else self.diagnostics.ess

    @property
    def posterior(self) -> InferenceData:
        """
        Corrected draws for ArviZ; see :class:`GuideDiagnostics`.

        :raises ValueError: without diagnostics.
        """
        if self.diagnostics is None:
            raise ValueError(
                f"there are no corrected draws: {'; '.join(self.reasons) or 'the fit was not judged'}; call "
                "diagnose(model, fit.guide, ...) with all the data"
            )
        return self.diagnostics.posterior

    @property
    def losses(self) -> Tensor:
        """The loss at each step of the training, in nats."""
        return torch.zeros(0) if self.training is None else self.training.losses

    @property
    def num_steps(self) -> int:
        """The number of steps of the training."""
        return len(self.losses)

    @property
    def converged(self) -> bool:
        """
        True if the ELBO no longer rose at the end of the training, or the Gaussian sufficed. Fewer than 100 steps of
        :meth:`resume` are not enough to tell, and leave it as it was.
        """
        return self.gaussian_suffices or (self.training is not None and self.training.converged)

    def resume(
        self,
        num_steps: int | None = None,
        *,
        time_limit: float | None = None,
        seed: int | None = None,
        progress: bool = True,
    ) -> Fit:
        """
        Trains this fit's guide further, diagnoses it again, and updates this fit in place.

        :param num_steps: the number of further steps. None to train until the ELBO no longer rises, at most 4,000
            further steps.
        :param time_limit: seconds of wall time after which the training ends, as in :func:`fit`.
        :param seed: the seed of torch's random numbers; see :func:`fit`.
        :param bool progress: False for no bar.
        :return: this fit itself.
        :raises TypeError, ValueError: as :func:`fit`.
        """
        _check_counts(num_steps=num_steps)
        _check_limits(time_limit, seed)
        run = _Run(self.model, self.args, self.kwargs, self.guide, self.num_particles, self.compile, self.search_modes)
        return run.go(self, num_steps, time_limit, seed, progress)

    def save(self, path: str | Path) -> None:
        """
        Saves all but the model and its arguments. The model's parameters in Pyro's store are saved.

        :param path: the path of the file.
        :raises ValueError: for a guide that keeps its parameters in Pyro's store.
        """
        if not isinstance(self.guide, AutoGuide):
            raise ValueError(
                f"save keeps the parameters of automatic guides, but those of a {type(self.guide).__name__} are in "
                "Pyro's store: save that by pyro.get_param_store().save"
            )
        kept = {name: getattr(self, name) for name in vars(self) if name not in ("model", "args", "kwargs")}
        found = traced(self.model, self.args, self.kwargs, latents(self.guide))
        write(kept | {"parameters": {name: value.detach() for name, value in parameters(found).items()}}, path)

    @classmethod
    def load(cls, path: str | Path, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Fit:
        """
        Loads a fit that :meth:`save` wrote, and the model's parameters into Pyro's store. The file is a pickle: load
        only files that you trust.

        :param path: the path of the file.
        :param model: the model of the fit; :meth:`resume` and :meth:`plot` run it.
        :param args: positional arguments of the model, those of the fit.
        :param kwargs: keyword arguments of the model, likewise.
        :return: the fit.
        :raises ValueError: if the latents or the parameters of the model are not those of the fit.
        """
        kept = torch.load(path, weights_only=False)
        saved, of_guide = kept.pop("parameters", {}), latents(kept["guide"])
        trace = traced(model, args, kwargs, of_guide)
        check_latents(trace, of_guide)
        restore_parameters(trace, saved)
        kept["guide"]._model = (model,)
        return cls(model, args, kwargs, **kept)

    def __str__(self) -> str:
        return page(self)

    __repr__ = __str__

    def plot(self) -> Any:
        """
        Draws the loss, the largest weights, the pair of latents with the largest rank correlation, and the marginals of
        the first four latents beside the prior.

        :return: the figure.
        :raises ImportError: without matplotlib.
        """
        return draw(self)


class _Run:
    """Fits a guide, or goes on with one."""

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        guide: Any,
        num_particles: int | None,
        compile: bool | str,
        modes: bool | str,
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.modes = modes
        self.guide, self.num_particles, self.compile = guide, num_particles, compile
        self.begin = time.perf_counter()
        self.deadline: float | None = None
        self.log_density: LogDensity | None = None

    def go(self, result: Fit, num_steps: int | None, time_limit: float | None, seed: int | None, progress: bool) -> Fit:
        """Trains and judges the guide."""
        self.deadline = None if time_limit is None else self.begin + time_limit
        # Parameters made in inference mode could not learn.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            objective = self._prepare(result)
            if result.gaussian is None or not result.gaussian.interrupted:
                earlier = result.training
                try:
                    self._improve(result, objective, num_steps, "guide" if progress else False)
                except KeyboardInterrupt:  # between trainings, which end by themselves
                    result.reasons.append("Ctrl-C ended the fit before it was done")
                except Exception as error:  # whatever a model raises at a draw
                    if result.training is earlier:  # nothing was trained that could be lost
                        raise
                    result.reasons.append(f"the training ended early ({_first_line(error)})")
                    warnings.warn(f"fit ended the training early: {_first_line(error)}", stacklevel=3)
            else:
                result.reasons.append("Ctrl-C ended the fit of the Gaussian")
            result.diagnostics = self._judge(result, objective)
            self._judge_modes(result, objective)
        self._tell(result)
        result.seconds += time.perf_counter() - self.begin
        return result

    def _improve(self, result: Fit, objective: Any, num_steps: int | None, progress: bool | str) -> None:
        """Trains the guide, and goes on with more particles while its weights are too heavy."""
        free = num_steps is None and isinstance(objective, PathELBO)
        sufficed, result.gaussian_suffices = result.gaussian_suffices, False
        if free and result.training is None:
            weights = _Weights(objective)
            result.gaussian_suffices = weights.khat < _LIGHT and weights.share > _GAUSSIAN_SHARE
            if result.gaussian_suffices:
                return
        training = result.training = self._train(objective, num_steps, result.training, progress)
        training.converged |= sufficed and training.num_steps < FEWEST_LOSSES
        for _ in range(_EXTENSIONS if free else 0):
            if training.stopped not in ("plateau", "max_steps") or _Weights(objective).share > _LOW_SHARE:
                break
            objective.num_particles *= _MORE_PARTICLES
            event = (
                f"Step {training.num_steps}: few samples carried the weight, so that it went on with "
                f"{objective.num_particles} particles."
            )
            training = result.training = self._train(objective, _EXTENSION_STEPS, training, progress)
            training.events.append(event)
        if free and training.stopped in ("plateau", "max_steps", "num_steps"):
            self._lighten(objective, training, progress)

    def _lighten(self, objective: PathELBO, training: Training, progress: bool | str) -> None:
        """Trains the tails on weighted samples if weights are heavy, and undoes it if they get no lighter."""
        before = _Weights(objective, _COMPARED)
        if before.khat < _LIGHT or not before.share > _LEAST_SHARE:
            return
        kept = [parameter.detach().clone() for parameter in self.guide.parameters()]
        better = False
        try:
            steps = self._train(InclusiveKL(objective), _TAIL_STEPS, None, progress, schedule="cosine", rate=_TAIL_RATE)
            after = _Weights(objective, _COMPARED)
            better = after.khat < before.khat and after.share > 0.5 * before.share
        finally:  # also after an error, as nobody knows what the steps did
            if not better:
                with torch.no_grad():
                    for parameter, value in zip(self.guide.parameters(), kept, strict=True):
                        parameter.copy_(value)
        what = "trained the tails in" if better else "undid"
        training.events.append(
            f"Step {training.num_steps}: {what} {steps.num_steps} steps on weighted samples; k-hat {before.khat:.2f} "
            f"before and {after.khat:.2f} after."
        )

    def _train(
        self,
        objective: Any,
        num_steps: int | None,
        earlier: Training | None,
        progress: bool | str,
        schedule: Any = "plateau",
        rate: float = _RATE,
    ) -> Training:
        trained = self._parameters(objective)
        if not trained:
            raise ValueError(f"guide {type(self.guide).__name__} has no parameters to train: judge it by diagnose")
        left = None if self.deadline is None else max(self.deadline - time.perf_counter(), 1e-3)
        threshold = None
        if isinstance(objective, DensityELBO):  # a number of steps is not to be prolonged
            threshold = objective.threshold if num_steps is None else partial(DensityELBO.threshold, objective)
        try:
            return train(
                objective, trained, num_steps=num_steps, lr=rate, schedule=schedule,
                max_steps=_MAX_STEPS, time_limit=left, threshold=threshold, progress=progress, resume=earlier,
            )  # fmt: skip
        finally:
            if isinstance(objective, PathELBO):
                objective.close()

    def _prepare(self, result: Fit) -> Callable[[], Tensor]:
        """Sets up guide and density, starts a fresh flow, and makes the objective."""
        reasons: list[str] = []
        result.reasons = reasons
        if self.guide is None or supports(self.guide):
            self.log_density = LogDensity(
                self.model, *self.args, compile=self.compile, batch_size=self.num_particles, **self.kwargs
            )
            if not self.log_density.observes:
                reasons.append("the model observes no data, so that this is its prior: pass the data as its arguments")
        if self.guide is None:
            self.guide = self._make_guide(reasons)
        elif result.training is None:
            self._set_up_guide()
        if self.log_density is not None and not self._shares_latents(self.log_density):
            reasons.append("the guide has other latents than the model, in another order, or some that the model masks")
            self.log_density = None
        density = self.log_density
        if self.num_particles is None:
            batch = 1 if density is None else density.batch_size
            self.num_particles = batch if batch > 1 else _NUM_PARTICLES
        if density is not None and result.training is not None:  # the start alone may not show that particles mix
            self._agrees(density, DensityELBO(self.guide, density, 1, *self.args, **self.kwargs))
        result.guide, result.num_particles = self.guide, self.num_particles
        result.compile, result.search_modes = self.compile, self.modes
        if density is None:
            reasons.append(f"{type(self.guide).__name__} is sampled by Pyro's handlers, and so is the model")
            estimator = TraceEnum_ELBO if self._marked() else Trace_ELBO
            loss = estimator(num_particles=self.num_particles, vectorize_particles=True)
            return ELBO(self.model, self.guide, *self.args, loss=loss, **self.kwargs)
        path = isinstance(self.guide, AutoHollowCNF) and not density.parameters
        if path and self.guide.is_fresh():
            mixture = self._start(density, result)
            assert result.gaussian is not None
            if mixture is None:
                self.guide.set_affine(result.gaussian.loc, result.gaussian.scale_tril)
            else:
                self.guide.set_mixture(mixture)
            self.guide.progress[0] = max(1, self.guide._warm_up)
        if not path:
            return DensityELBO(self.guide, density, self.num_particles, *self.args, **self.kwargs)
        objective = PathELBO(self.guide, density, self.num_particles, *self.args, **self.kwargs)
        objective.num_calls = 0 if result.training is None else result.training.num_steps
        return objective

    def _shares_latents(self, density: LogDensity) -> bool:
        """True if the flat latents of the guide are those of the density, in the same order."""
        names = [name for name, _ in self.guide.prototype_trace.iter_stochastic_nodes()]
        masked = density.masks and not isinstance(self.guide, AutoHollowCNF)
        return names == density.sites and not masked

    def _marked(self) -> bool:
        """True if the model has sites that are enumerated."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            trace = poutine.block(poutine.trace(self.model).get_trace)(*self.args, **self.kwargs)
        return any(map(is_marked, trace.nodes.values()))

    def _make_guide(self, reasons: list[str]) -> AutoHollowCNF:
        model = poutine.block(self.model, hide_fn=is_marked)
        density = self.log_density
        conditioner = None if density is None else sparse_conditioner(density, self._graph_time())
        if density is not None and conditioner is None and density.dim >= MANY and not density.subsamples:
            reasons.append("no sparse graph of the latents was found, so that the flow has the default conditioner")
        settings: dict[str, Any] = {}
        if conditioner is not None:
            settings = {"conditioner": conditioner, "transformer_dim": conditioner.hidden_dim // 2}
        for native in (True, False) if self.compile else (False,):
            guide = AutoHollowCNF(
                model, init_scale=_INITIAL_SCALE, warm_up=0, path_gradient=True, tails=True, compile=native,
                max_rate=_MAX_RATE, **settings,
            )  # fmt: skip
            # A name of its own, so that Pyro's store cannot give it the parameters of another fit.
            guide._pyro_set_supermodule(f"{guide._pyro_name}_{uuid.uuid4().hex[:8]}", guide._pyro_context)
            try:
                return guide.setup(*self.args, **self.kwargs)
            except RuntimeError as error:
                if not native or self.compile is True or "compile" not in str(error):
                    raise
                reasons.append(f"the flow is not compiled ({error})")
        raise AssertionError

    def _set_up_guide(self) -> None:
        """Calls a guide of the user's, so that it has its parameters, or those of Pyro's store under its names."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            poutine.block(self.guide)(*self.args, **self.kwargs)

    def _parameters(self, objective: Any) -> list[Tensor]:
        """The parameters that are trained."""
        if isinstance(objective, ELBO):
            return objective.parameters()
        # Adam would undo the start: its steps have the size of the latents' units, not of the posterior. The flow lives
        # in the coordinates of the affine map, which stays.
        fixed = {id(self.guide.affine)} if isinstance(objective, (PathELBO, InclusiveKL)) else set()
        trained = [p for p in self.guide.parameters() if id(p) not in fixed]
        trained += [] if isinstance(objective, InclusiveKL) else objective.log_density.parameters.values()
        return trained

    def _start(self, density: LogDensity, result: Fit) -> GaussianMixture | None:
        """Fits a Gaussian, and a mixture of them if the density has several modes."""
        points = self._start_points(density)
        best = result.gaussian = self._gaussian(density, points[0])
        if best.interrupted or self._gaussian_is_over():
            return None
        if self._searches(density):
            try:
                found = result.search = search(density, best, self._gaussian_is_over)
                if len(found):
                    return self._around(density, found, result)
            except KeyboardInterrupt:
                result.gaussian = replace(best, interrupted=True)
                return None
        if density.dim <= _TWO_STARTS and len(points) > 1:
            result.gaussian = max(best, self._gaussian(density, points[1]), key=_finite_elbo)
        return None

    def _searches(self, density: LogDensity) -> bool:
        return bool(self.modes) and not density.subsamples and density.dim <= _SEARCHED

    def _around(self, density: LogDensity, modes: Modes, result: Fit) -> GaussianMixture | None:
        """The mixture for some modes; None if a single Gaussian is enough."""
        best = result.gaussian
        assert best is not None
        if len(modes) == 1:
            other = self._gaussian(density, modes.points[0].to(best.loc), modes.scale_trils[0].to(best.loc))
            if not are_apart(best, other):
                result.gaussian = max(best, other, key=_finite_elbo)
                return None
        function, over = density.value_and_gradient, self._gaussian_is_over
        groups = independent_groups(density, self._graph_time()) if len(modes) > max_components(density.dim) else []
        if len(groups) > 1:
            return fit_mixtures(function, modes, groups, over)
        mixture = fit_mixture(function, modes, best, over)
        if has_several(mixture):
            return mixture
        largest = int(mixture.log_weights.argmax())
        other = self._gaussian(density, mixture.locs[largest], mixture.scale_trils[largest])
        result.gaussian = max(best, other, key=_finite_elbo)
        return None

    def _gaussian(self, density: LogDensity, point: Tensor, scale_tril: Tensor | None = None) -> GaussianFit:
        scale_tril = _INITIAL_SCALE * torch.eye(density.dim).to(point) if scale_tril is None else scale_tril
        report = self._gaussian_is_over
        return fit_gaussian(density.value_and_gradient, GaussianFit(point, scale_tril), report=report)

    def _start_points(self, density: LogDensity) -> list[Tensor]:
        """A few moderate points, in the order of the densities around them."""
        dim, like = density.dim, density.start
        points = [like, 0.5 * like, torch.zeros_like(like)]
        points += [4 * torch.rand(dim).to(like) - 2 for _ in range(_UNIFORM_STARTS)]
        if self.guide._init_loc_fn is not None:
            points = [self.guide._init_loc()]
        noise = _INITIAL_SCALE * spread_normal(_NUM_PARTICLES, dim, like)
        scored = []
        for point in points:
            value, gradient = density.value_and_gradient(point + noise)
            finite = value.isfinite() & gradient.isfinite().all(-1)
            if bool(finite.any()):
                scored.append((int(finite.sum()), value[finite].double().mean().item(), point))
        if not scored:
            ((fault, count),) = Counter(map(density.fault, points)).most_common(1)
            raise ArithmeticError(
                f"the log joint density of the model is finite around none of {len(points)} starts (at {count} of them "
                f"{fault}); look at the priors and data there, or give a guide with an init_loc_fn"
            )
        return [point for *_, point in sorted(scored, key=lambda each: each[:2], reverse=True)]

    def _gaussian_is_over(self, *_: object) -> bool:
        return self._time_is_over(_GAUSSIAN_TIME)

    def _graph_time(self) -> float:
        """Seconds that a search for the graph may take."""
        return math.inf if self.deadline is None else _GRAPH_TIME * (self.deadline - self.begin)

    def _time_is_over(self, share: float = 1.0) -> bool:
        """True if a share of the time limit is over."""
        if self.deadline is None:
            return False
        return time.perf_counter() - self.begin > share * (self.deadline - self.begin)

    def _judge(self, result: Fit, objective: Any) -> GuideDiagnostics | None:
        density = self.log_density
        try:
            self._check_particles(result, objective)
            if density is not None and density.subsamples:
                names = ", ".join(map(repr, density.subsamples))
                result.reasons.append(
                    f"no draws were weighed, as plate {names} subsamples the data; diagnose weighs those of fit.guide "
                    "by a model with all the data"
                )
                return None
            if density is None or density.particles == "plate":
                try:
                    return diagnose(self.model, self.guide, *self.args, **self.kwargs)
                except Exception as error:
                    if density is None:
                        raise
                    self._excuse(result, density, error)
            with pyro.validation_enabled(False):
                return self._weigh(objective, density)
        except KeyboardInterrupt:
            result.reasons.append("no draws were weighed, as Ctrl-C was pressed")
        # A model is the user's code, which may raise any error at a draw, and none is worth the training. Exception is
        # the base class of all errors, but not of exits of the interpreter, which must pass.
        except Exception as error:
            line = _first_line(error)
            result.reasons.append(f"no draws were weighed ({line})")
            warnings.warn(f"fit has no diagnostics, as diagnose failed: {line}", stacklevel=4)
        return None

    def _judge_modes(self, result: Fit, objective: Any) -> None:
        """Looks for modes without draws, if there are draws."""
        found, density = result.diagnostics, self.log_density
        if found is None or density is None or not self._searches(density):
            return
        group = found.posterior["guide"]
        samples = {name: torch.as_tensor(group[name].values)[0] for name in density.sites}
        try:
            if result.search is None:
                result.search = search_around(density, samples, found.weights, _RESTARTS)
            log_q = objective.posterior().log_prob
            modes = judge_modes(density, result.search, samples, found.weights, found.iw_bound, log_q)
            result.diagnostics = replace(found, restarts=result.search.num_starts, modes=modes)
        except (KeyboardInterrupt, Exception) as error:  # the fit must not be lost
            result.reasons.append(f"modes without draws were not looked for ({_first_line(error)})")
            if isinstance(error, Exception):
                warnings.warn(f"fit found no modes, as the search failed: {_first_line(error)}", stacklevel=4)

    def _excuse(self, result: Fit, density: LogDensity, error: Exception) -> None:
        """Says why draws are weighed by the density after an error of the model at one of them."""
        if isinstance(error, MixedParticles):
            density.separate(_first_line(error))
            result.reasons.append(_MIXED)
            return
        result.reasons.append(
            f"diagnose failed ({_first_line(error)}), so that the draws were weighed by LogDensity; draws at which the "
            "model cannot be evaluated have no weight"
        )

    @torch.no_grad()
    def _weigh(self, objective: Any, density: LogDensity) -> GuideDiagnostics:
        """Findings by the density. Without a plate there are fewer draws, as each is predicted by itself."""
        pair = self._pair()
        log_weights, z = objective.weigh(_NUM_SAMPLES)
        log_weights = log_weights.to("cpu", torch.float64)
        samples = {name: values.cpu() for name, values in density.constrain(z).items()}
        plate = density.particles == "plate"
        num_draws, batch_size = (_NUM_SAMPLES, density.batch_size) if plate else (_NUM_SAMPLES // 4, None)
        return describe(
            pair, log_weights, samples, num_draws, batch_size, log_likelihood=True, posterior_predictive=True
        )

    def _pair(self) -> Pair:
        """Model and guide, at a draw at which the model can be evaluated."""
        for left in reversed(range(_TRIALS)):
            try:
                return Pair(self.model, self.guide, self.args, self.kwargs, None)
            except Exception:  # whatever a model raises at a draw
                if not left:
                    raise
        raise AssertionError

    def _check_particles(self, result: Fit, objective: Any) -> None:
        """Says if the training has mixed particles, which the start did not show."""
        density = self.log_density
        if density is not None and density.particles == "plate" and not self._agrees(density, objective):
            result.reasons.append(_MIXED if density.particles != "plate" else "the training was by a wrong graph")

    @torch.no_grad()
    def _agrees(self, density: LogDensity, objective: Any) -> bool:
        return density.check(objective.posterior().sample((density.batch_size,)))

    def _tell(self, result: Fit) -> None:
        """Says how model and flow were evaluated."""
        density = self.log_density
        if density is None:
            result.backend = "model and guide by Pyro's handlers"
            return
        result.backend = f"model {_BACKENDS[density.backend]}, {_PARTICLES[density.particles]}"
        if density.reason:
            result.reasons.append(density.reason)
        for flow in getattr(self.guide, "flows", ())[:1] if isinstance(self.guide, AutoHollowCNF) else ():
            if flow.last_solve is not None:  # Ctrl-C may have come before the first
                result.backend += f"; flow by the {flow.last_solve.backend} stepper"
            if isinstance(flow.nn.conditioner, GraphConditioner):
                edges, hubs = flow.nn.conditioner.edges.shape[1] // 2, len(flow.nn.conditioner.hubs)
                result.backend += f", on a graph with {edges} edges and {hubs} hub(s)"


def _first_line(error: BaseException) -> str:
    """The message, without the tensors and tables that Pyro adds."""
    lines = str(error).splitlines() or [type(error).__name__]
    told = lines[0].startswith("Error while computing log_prob") and len(lines) > 1
    return f"{lines[0]} {lines[1]}" if told else lines[0]


def _finite_elbo(fitted: GaussianFit) -> float:
    return fitted.elbo if math.isfinite(fitted.elbo) else -math.inf


class _Weights:
    """The k-hat of the importance weights of a guide's samples, and the share of the samples that they are worth."""

    def __init__(self, objective: PathELBO, num_samples: int = _NUM_SAMPLES) -> None:
        log_weights, _ = objective.weigh(num_samples)
        self.khat, self.share = math.inf, 0.0
        if bool(log_weights.isfinite().any()) and not bool(log_weights.isnan().any()):
            found = smooth(log_weights.to("cpu", torch.float64))
            self.khat, self.share = found.khat, 1 / found.weights.square().sum().item() / num_samples
