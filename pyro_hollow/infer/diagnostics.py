# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Diagnostics of a fitted guide, and draws that are corrected by importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.poutine.util import prune_subsample_sites
from pyro.util import get_rng_state, set_rng_state
from torch import Tensor

from pyro_hollow.infer.elbo import DensityELBO, supports
from pyro_hollow.infer.importance import faults, resample, smooth
from pyro_hollow.infer.inference_data import check_names, import_arviz, inference_data
from pyro_hollow.infer.log_density import LogDensity
from pyro_hollow.infer.log_joint import log_densities
from pyro_hollow.infer.modes import Mode, judge_modes, search_around
from pyro_hollow.infer.particles import check_independence, check_observed, explained
from pyro_hollow.infer.plates import plates, subsampled
from pyro_hollow.infer.predictions import PARTICLES, Predictions
from pyro_hollow.ops.memory import allocated_bytes, part_size

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["GuideDiagnostics", "Pair", "describe", "diagnose"]

_MIN_SAMPLES = 25  # the largest fifth of them are the tail, and ArviZ fits none of fewer than five
_FALLBACK_BATCH = 1000  # samples at once where two of them have failed


@dataclass(frozen=True, eq=False)
class GuideDiagnostics:
    r"""
    Findings of :func:`diagnose`; ``print`` them for a summary that ends with advice.

    :attr:`reliable` says whether the corrected draws can be trusted, which needs an effective sample size of at least
    100, and weights larger than those drawn that hold at most 3.5 % of the total (:attr:`unseen`); with few samples
    less is asked. The k-hat is the shape of a generalized Pareto distribution fitted to the largest weights, of which
    only moments of orders below 1 / k exist. Alone it is no verdict: it may exceed 1 where the guide is close to the
    posterior, for a tail that hardly matters. The weights judge the guide where it samples. Of a mode without draws
    they know nothing; ``restarts`` looks for such modes.

    :ivar float elbo: the evidence lower bound, the mean of the log weights; -inf if one of them is.
    :ivar float elbo_error: its standard error; nan if it is -inf.
    :ivar float iw_bound: the importance-weighted bound, the logarithm of the mean weight. It is at least the ELBO, and
        tends to the log evidence as num_samples grows.
    :ivar float iw_bound_error: its standard error, by the delta method; far too small where the k-hat is large.
    :ivar float khat: the k-hat; 0 if the largest weights are equal to a thousandth, so that there is no tail to fit,
        and inf if there are too few weights to fit. It supposes weights of many values, not those of discrete latents.
    :ivar float ess: the effective sample size :math:`1 / \sum_s w_s^2` of the smoothed weights: about so many
        independent draws from the posterior are as good as the corrected ones.
    :ivar int num_samples: the number of samples from the guide.
    :ivar Tensor log_weights: the raw log weights with shape ``(num_samples,)``, in float64 on the CPU.
    :ivar Tensor weights: the Pareto-smoothed weights :math:`w` with shape ``(num_samples,)``, which sum to 1.
    :ivar InferenceData posterior: the corrected draws (group "posterior", with deterministic sites) in four chains,
        their log weights (group "sample_stats"), the data and predictions that ArviZ works with (groups
        "observed_data", "log_likelihood" and "posterior_predictive"), and all the guide's own draws (group "guide") to
        compare them with. Since ArviZ 1 it is an ``xarray.DataTree`` with the same groups.
    :ivar float unseen: the share of the total weight that the fitted tail expects beyond the weights drawn, for a k of
        at most 0.7; 1 if no tail could be fitted.
    :ivar int restarts: how many searches for missed modes were started.
    :ivar list modes: the :class:`~pyro_hollow.infer.modes.Mode` objects of the modes that they found, largest first.
    """

    elbo: float
    elbo_error: float
    iw_bound: float
    iw_bound_error: float
    khat: float
    ess: float
    num_samples: int
    log_weights: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    posterior: InferenceData = field(repr=False)
    unseen: float
    restarts: int = 0
    modes: list[Mode] = field(default_factory=list, repr=False)

    @property
    def num_modes(self) -> int:
        """The number of modes that were found, those of the guide included."""
        return len(self.modes)

    @property
    def missed_modes(self) -> list[dict[str, Tensor]]:
        """The modes with almost no draws, largest first, as values of the latent sites."""
        return [mode.values for mode in self.modes if mode.missed]

    @property
    def missed_mass(self) -> float:
        """The share of the posterior that the missed modes hold, by Laplace's approximation."""
        odds = sum(mode.mass / max(1 - mode.mass, 1e-300) for mode in self.modes if mode.missed)
        return odds / (1 + odds)

    @property
    def impossible(self) -> float:
        """The share of the guide's samples that have no density under the model."""
        return self.log_weights.isneginf().double().mean().item()

    @property
    def reliable(self) -> bool:
        """True if the corrected draws can be trusted, and no mode is known to be missed."""
        return not self.faults

    @property
    def faults(self) -> list[str]:
        """The reasons against trusting the corrected draws, in words; none if they can be trusted."""
        reasons = faults(self.ess, self.unseen, self.num_samples)
        if self.missed_modes:
            reasons.append(
                f"the guide has almost no draws near {len(self.missed_modes)} of {self.num_modes} modes, which hold "
                f"about {self.missed_mass:.0%} of the posterior"
            )
        return reasons

    @property
    def verdict(self) -> str:
        """The advice in words: what can be trusted, the reasons why not, and what is not known."""
        reasons = self.faults
        if reasons:
            return (
                f"neither the guide nor its correction can be trusted: {'; '.join(reasons)}. Train longer, use a "
                "richer guide, or NUTS."
            )
        if not self.restarts:
            unknown = "modes without any were not looked for (restarts=64 would)"
        elif not self.num_modes:
            unknown = f"{self.restarts} restarts found no mode at all, and say nothing of those without any"
        else:
            unknown = f"{self.restarts} restarts found {self.num_modes} mode(s), all with draws"
        return f"importance-corrected draws can be trusted where the guide has draws; {unknown}."

    def __str__(self) -> str:
        impossible = f"Impossible samples         {self.impossible:.1%}\n" if self.impossible else ""
        return (
            f"ELBO                       {self.elbo:.3f} +- {self.elbo_error:.3f}\n"
            f"Importance-weighted bound  {self.iw_bound:.3f} +- {self.iw_bound_error:.3f}\n"
            f"Effective sample size      {self.ess:.0f} of {self.num_samples}\n"
            f"{impossible}"
            f"k-hat {self.khat:.2f}, unseen weight {self.unseen:.1%}: {self.verdict}"
        )


def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 4000,
    num_draws: int | None = None,
    batch_size: int | None = None,
    max_plate_nesting: int | None = None,
    vectorize: bool = True,
    log_likelihood: bool = True,
    posterior_predictive: bool = True,
    restarts: int = 0,
    **kwargs: Any,
) -> GuideDiagnostics:
    r"""
    Weighs samples of a guide :math:`q(\mathbf{z})` by a model :math:`p(\mathbf{x}, \mathbf{z})`,

        :math:`\log w_s = \log p(\mathbf{x}, \mathbf{z}_s) - \log q(\mathbf{z}_s), \qquad \mathbf{z}_s \sim q`

    tells by Pareto-smoothed importance sampling (PSIS) whether the guide is close enough to the posterior, and draws
    from the posterior by resampling in proportion to the smoothed weights; :class:`GuideDiagnostics` says how to read
    it. The guide is any that Pyro knows; one that has not been called yet is set up.

    Discrete sites that are marked for enumeration (:func:`~pyro.infer.config_enumerate`) and not in the guide are
    marginalised, as :class:`~pyro.infer.TraceEnum_ELBO` does.

    Corrected draws stay in the guide's order, so that repeated ones are neighbours and count in ArviZ's effective
    sample size, too. Consecutive quarters of them are the chains, which share a sample at their borders only: where a
    few large weights decide, chains differ, and ArviZ's r_hat shows it. If num_draws is no multiple of four there are
    three chains, two or one.

    ``arviz.loo`` and ``arviz.plot_ppc`` use the groups "log_likelihood" and "posterior_predictive". Each holds a number
    for each draw and observation: 32 MB for 4,000 draws and 1,000 observations in float64. Masked observations are left
    out of these groups and of "observed_data"; the others are then in one dimension. Deterministic sites that depend on
    marginalised ones are left out, and so are log-likelihoods of observations that share a marginalised value, as in a
    hidden Markov model: they are not independent. Predictions draw marginalised sites from the model.

    Example usage:

    >>> from pyro_hollow.infer import diagnose
    >>> def model(x):
    ...     z = pyro.sample("z", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
    >>> def guide(x):
    ...     pyro.sample("z", dist.Normal(0.4, 0.6))  # the posterior is Normal(0.5, 0.5)
    >>> result = diagnose(model, guide, torch.tensor([0., 0.5, 1.5]))
    >>> result.khat < 0.7, result.elbo < result.iw_bound, result.posterior.posterior["z"].shape
    (True, True, (4, 1000))

    :param model: the model, with all the data: subsampled weights are not those of the posterior.
    :param guide: the guide, which samples all latent sites of the model; its auxiliary ones count as in the ELBO.
    :param args: positional arguments of both.
    :param int num_samples: how many samples to draw from the guide, at least 25; below 2200 the k-hat is less certain.
    :param int num_draws: how many corrected draws to make. Defaults to num_samples.
    :param int batch_size: how many samples to draw or predict at once. Defaults to as many as take 1 GB
        (:data:`~pyro_hollow.ops.memory.MAX_BYTES`), by what the operations of two of them take.
    :param int max_plate_nesting: the largest number of nested plates. Defaults to that of a first run.
    :param bool vectorize: False for one sample at a time, if the model or guide does not allow a further plate. Each
        of the next two groups then takes about as long again.
    :param bool log_likelihood: False to leave out this group. One of more than 2 GiB is left out with a warning.
    :param bool posterior_predictive: False to leave out this group. One of more than 2 GiB, or of a model that cannot
        sample its observed sites, is left out with a warning.
    :param int restarts: how many searches for missed modes to start away from the guide, 64 say, for
        :attr:`GuideDiagnostics.missed_modes`; see :func:`~pyro_hollow.infer.modes.judge_modes`. Each climbs the
        log joint density, all at once, in at most some hundred evaluations of its gradient. Defaults to none.
    :param kwargs: keyword arguments of both; give those of the names above by position.
    :raises ValueError: for settings out of range, subsampled plates, observed values that are not finite, latents that
        the guide does not sample (and that are not marked for enumeration) or to which it gives a single value, sites
        that are named as a dimension of ArviZ ("chain", "draw", "<site>_dim_0"), models that mix samples or cannot be
        run in a further plate, densities that are nan, if no sample has a positive density, and for restarts of
        a model that :class:`LogDensity` refuses, or that has no gradient.
    :raises ImportError: without ArviZ.

    References:

    [1] Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman. Yes, but Did It Work?: Evaluating Variational Inference.
    [arXiv:1802.02538]

    [2] Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry. Pareto Smoothed Importance Sampling.
    [arXiv:1507.02646]
    """
    import_arviz()  # before long work
    num_draws = num_samples if num_draws is None else num_draws
    settings = {"num_samples": num_samples, "num_draws": num_draws, "batch_size": batch_size, "restarts": restarts}
    for name, value in settings.items():
        least = {"num_samples": _MIN_SAMPLES, "restarts": 0}.get(name, 1)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, but got {value}")
    with torch.no_grad():
        pair = Pair(model, guide, args, kwargs, max_plate_nesting)
        batch_size = pair.batch_size(batch_size) if vectorize else None
        log_weights, samples = pair.sample(num_samples, batch_size)
    groups = {"log_likelihood": log_likelihood, "posterior_predictive": posterior_predictive}
    return describe(pair, log_weights, samples, num_draws, batch_size, restarts, **groups)


def describe(
    pair: Pair,
    log_weights: Tensor,
    samples: dict[str, Tensor],
    num_draws: int,
    batch_size: int | None,
    restarts: int = 0,
    **groups: bool,
) -> GuideDiagnostics:
    """
    Describes weighted samples; for the parameters see :func:`diagnose`.

    :param Pair pair: the model and the guide.
    :param Tensor log_weights: with shape ``(S,)``, in float64 on the CPU.
    :param samples: the latents, with shapes ``(S,)`` + those of the sites.
    :param batch_size: how many draws to predict at once; None for one at a time, without a further plate.
    """
    if log_weights.max() == -math.inf:
        raise ValueError(f"none of the {len(log_weights)} samples of the guide has a positive density under the model")
    smoothed = smooth(log_weights)
    weights = smoothed.weights
    summary = _summarise(log_weights, weights) | {"khat": smoothed.khat}
    modes = _search(pair, samples, weights, summary["iw_bound"], restarts) if restarts else []
    chosen = resample(weights, num_draws)
    draws = {name: values[chosen] for name, values in samples.items()}
    found = {"posterior": draws, "sample_stats": {"log_weight": log_weights[chosen]}, "guide": samples}
    with torch.no_grad():
        predictions = pair.predictions.groups(draws, batch_size, **groups)
    found["posterior"] |= predictions.pop("deterministic")
    found |= {name: group for name, group in predictions.items() if group}
    return GuideDiagnostics(
        **summary,
        num_samples=len(log_weights),
        log_weights=log_weights,
        weights=weights,
        posterior=inference_data(found, summary),
        unseen=smoothed.unseen,
        restarts=restarts,
        modes=modes,
    )


def _density_of(pair: Pair, density: LogDensity) -> Callable[[Tensor], Tensor] | None:
    """The guide's density of unconstrained latents, if it is known without Pyro's handlers."""
    if density.masks or not supports(pair.guide) or list(pair.prototypes) != density.sites:
        return None
    return DensityELBO(pair.guide, density, 1, *pair.args, **pair.kwargs).posterior().log_prob


def _search(pair: Pair, samples: dict[str, Tensor], weights: Tensor, log_evidence: float, restarts: int) -> list[Mode]:
    try:
        density = LogDensity(pair.model, *pair.args, compile=False, **pair.kwargs)
        modes = search_around(density, samples, weights, restarts)
        return judge_modes(density, modes, samples, weights, log_evidence, _density_of(pair, density))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"restarts must be 0 for this model, as a search for modes evaluates its LogDensity and gradient: {error}"
        ) from error


class Pair:
    """A model and its guide, after one run of each that sets up the guide and shows their structure."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        max_plate_nesting: int | None,
    ) -> None:
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        # The guide is checked before the model runs, which may trip over a part of the data.
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        nesting = _plate_nesting(guide_trace, "guide")
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        nesting = max(nesting, _plate_nesting(model_trace, "model"))
        if max_plate_nesting is not None and max_plate_nesting < nesting:
            raise ValueError(f"max_plate_nesting must be at least {nesting}, but got {max_plate_nesting}")
        self.max_plate_nesting = nesting if max_plate_nesting is None else max_plate_nesting
        check_observed(model_trace)
        latents = dict(prune_subsample_sites(model_trace).iter_stochastic_nodes())
        if not latents:
            raise ValueError("model has no latent sites, so that there is nothing for a guide to approximate")
        self.marginalised = {name: site for name, site in latents.items() if name not in guide_trace}
        _check_marginalised(self.marginalised, guide)
        names = [name for name in latents if name in guide_trace]
        self.predictions = Predictions(model, args, kwargs, model_trace, names, self.max_plate_nesting)
        self.prototypes = self.predictions.latents
        check_names(self.prototypes | self.predictions.deterministic)
        check_names(self.predictions.observed)
        self.points = [name for name in names if isinstance(guide_trace.nodes[name]["fn"], dist.Delta)]

    def batch_size(self, wanted: int | None) -> int:
        """How many samples to draw at once: as many as are wanted, or else as many as memory suffices for."""
        self._check_two()
        if wanted is not None:
            return wanted
        state = get_rng_state()
        try:
            num_bytes = allocated_bytes(lambda: self._sample_batch(2))
        except (ArithmeticError, RuntimeError, ValueError):  # all samples together tell how many fail
            return _FALLBACK_BATCH
        finally:
            set_rng_state(state)
        return part_size(num_bytes / 2)

    def sample(self, num_samples: int, batch_size: int | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Log weights with shape (num_samples,), and the latents with shapes (num_samples,) + their own."""
        if batch_size is None:
            batches = [self._sample_batch(None) for _ in range(num_samples)]
        else:
            starts = range(0, num_samples, batch_size)
            batches = [self._sample_batch(min(batch_size, num_samples - start)) for start in starts]
        joints, guides, latents = zip(*batches, strict=True)
        log_joint, log_guide = torch.cat(joints), torch.cat(guides)
        samples = {name: torch.cat([values[name] for values in latents]) for name in self.prototypes}
        for name in self.points:  # where they vary, the density is that of an auxiliary site
            if samples[name].numel() and bool((samples[name] == samples[name][:1]).all()):
                raise ValueError(
                    f"guide has a single value for site {name!r}, as AutoDelta has, and so no density to weigh it by; "
                    "use a guide with a spread"
                )
        return log_joint - log_guide, samples

    def _check_two(self) -> None:
        """Tries two samples at once, before memory is spent on thousands."""
        guide = pyro.plate(PARTICLES, 2, dim=-1 - self.max_plate_nesting)(self.guide)
        state = get_rng_state()
        with explained("guide", "vectorize=False"):
            trace = poutine.trace(guide).get_trace(*self.args, **self.kwargs)
        set_rng_state(state)
        values = {name: trace.nodes[name]["value"] for name in self.prototypes}
        self._check_shapes(values, 2)
        check_independence(self.model, self.args, self.kwargs, values, self.max_plate_nesting)

    def _check_shapes(self, values: dict[str, Tensor], count: int) -> None:
        sizes = {name: value.numel() for name, value in values.items()}
        if sizes != {name: count * value.numel() for name, value in self.prototypes.items()}:
            raise ValueError(
                "model must have the same latent sites with the same shapes for all samples, but the first had "
                f"{_shapes(self.prototypes)}, and {count} more have {_shapes(values)}"
            )

    def _sample_batch(self, size: int | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log densities of model and guide and the latents; of one sample, without a further plate, for no size."""
        model, guide, nesting = self.model, self.guide, math.inf
        count, plate = (1, None) if size is None else (size, PARTICLES)
        if size is not None:
            nesting = self.max_plate_nesting + 1
            model, guide = (pyro.plate(PARTICLES, size, dim=-nesting)(fn) for fn in (model, guide))
        if self.marginalised:  # in dimensions to the left of all plates
            nesting = self.max_plate_nesting + (size is not None)
            model = poutine.enum(model, first_available_dim=-1 - nesting)
        model_trace, guide_trace = get_importance_trace("flat", nesting, model, guide, self.args, self.kwargs)
        log_joint = log_densities(model_trace, count, plate, "model")
        log_guide = log_densities(guide_trace, count, plate, "guide")
        latents = model_trace.iter_stochastic_nodes()
        values = {name: site["value"] for name, site in latents if name not in self.marginalised}
        self._check_shapes(values, count)
        # Plates of other sites leave dimensions of size 1 between that of the samples and the site's own.
        samples = {name: values[name].reshape(count, *first.shape).cpu() for name, first in self.prototypes.items()}
        return log_joint, log_guide, samples


def _check_marginalised(sites: dict[str, Any], guide: Callable[..., Any]) -> None:
    """Refuses latents that are neither in the guide nor enumerated."""
    marked = [name for name, site in sites.items() if site["infer"].get("enumerate") == "parallel"]
    marked = [name for name in marked if sites[name]["infer"].get("num_samples") is None]
    missing = [name for name in sites if name not in marked]
    discrete = [name for name in missing if getattr(sites[name]["fn"], "has_enumerate_support", False)]
    hint = f"; mark {discrete} for parallel enumeration, as pyro.infer.config_enumerate(model) does" if discrete else ""
    if missing:
        raise ValueError(
            f"guide must sample all latent sites of the model, but does not sample {missing}; "
            f"add them to the guide, or marginalise them out of the model{hint}"
        )
    if marked and isinstance(poutine.unwrap(guide), poutine.messenger.Messenger):
        raise ValueError(
            "guide must not be a messenger such as AutoNormalMessenger, which runs the model itself, where sites "
            f"are enumerated: {marked}; use another guide"
        )


def _plate_nesting(trace: poutine.Trace, owner: str) -> int:
    """The largest number of nested plates, which must not be subsampled."""
    frames = plates(prune_subsample_sites(trace))
    for frame in subsampled(frames):
        raise ValueError(
            f"plate {frame.name!r} of the {owner} is subsampled, {frame.size} of {frame.full_size}, and weights of "
            "a part of the data are not those of the posterior; pass the full data (an automatic guide remembers "
            "the size of its first call unless it has create_plates)"
        )
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def _shapes(values: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items()}


def _summarise(log_weights: Tensor, weights: Tensor) -> dict[str, float]:
    size = len(log_weights)
    iw_bound = log_weights.logsumexp(0) - math.log(size)
    return {
        "elbo": log_weights.mean().item(),
        "elbo_error": log_weights.std().item() / math.sqrt(size),
        "iw_bound": iw_bound.item(),
        "iw_bound_error": (log_weights - iw_bound).exp().std().item() / math.sqrt(size),
        "ess": 1 / weights.square().sum().item(),
    }
