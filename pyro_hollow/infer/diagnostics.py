# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Whether a fitted guide can be trusted, and draws that are corrected where it cannot quite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.enum import get_importance_trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_hollow.infer.importance import faults, smooth
from pyro_hollow.infer.modes import LogJoint, MissedModes, find_missed_modes
from pyro_hollow.infer.plates import plates, subsampled

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["GuideDiagnostics", "diagnose"]

_MIN_SAMPLES = 25  # the largest fifth of them are the tail, and ArviZ fits none of fewer than five


@dataclass(frozen=True, eq=False)
class GuideDiagnostics:
    r"""
    What :func:`diagnose` finds out; ``print`` it for a summary that ends with advice.

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
    :ivar InferenceData posterior: the corrected draws (group "posterior"), one chain of them, with their log weights
        (group "sample_stats"), and all the guide's own (group "guide") to compare them with.
    :ivar float unseen: the share of the total weight that the fitted tail expects beyond the weights drawn, for a k of
        at most 0.7; 1 if no tail could be fitted.
    :ivar int restarts: how many searches for missed modes were started.
    :ivar int num_modes: how many modes they found, those of the guide included.
    :ivar list missed_modes: the modes with almost no draws, largest first, as values of the latent sites.
    :ivar float missed_mass: their share of the posterior, by Laplace's approximation.
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
    num_modes: int = 0
    missed_modes: list[dict[str, Tensor]] = field(default_factory=list, repr=False)
    missed_mass: float = 0.0

    @property
    def impossible(self) -> float:
        """The share of the guide's samples that have no density under the model."""
        return self.log_weights.isneginf().double().mean().item()

    @property
    def reliable(self) -> bool:
        """True if the corrected draws can be trusted, and no mode is known to be missed."""
        return not self.missed_modes and not faults(self.ess, self.unseen, self.num_samples)

    @property
    def verdict(self) -> str:
        """The advice in words: what can be trusted, the reasons why not, and what is not known."""
        reasons = faults(self.ess, self.unseen, self.num_samples)
        if self.missed_modes:
            reasons.append(
                f"the guide has almost no draws near {len(self.missed_modes)} of {self.num_modes} modes, which hold "
                f"about {self.missed_mass:.0%} of the posterior"
            )
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
    restarts: int = 0,
    **kwargs: Any,
) -> GuideDiagnostics:
    r"""
    Weighs samples of a guide :math:`q(\mathbf{z})` by a model :math:`p(\mathbf{x}, \mathbf{z})`,

        :math:`\log w_s = \log p(\mathbf{x}, \mathbf{z}_s) - \log q(\mathbf{z}_s), \qquad \mathbf{z}_s \sim q`

    tells by Pareto-smoothed importance sampling (PSIS) whether the guide is close enough to the posterior, and draws
    from the posterior by resampling in proportion to the smoothed weights; :class:`GuideDiagnostics` says how to read
    it. The guide is any that Pyro knows; one that has not been called yet is set up. Corrected draws stay in the
    guide's order, so that repeated ones are neighbours and count in ArviZ's effective sample size, too.

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
    (True, True, (1, 4000))

    :param model: the model, with all the data: subsampled weights are not those of the posterior.
    :param guide: the guide, which samples all latent sites of the model; its auxiliary ones count as in the ELBO.
    :param args: positional arguments of both.
    :param int num_samples: how many samples to draw from the guide, at least 25; below 2200 the k-hat is less certain.
    :param int num_draws: how many corrected draws to make. Defaults to num_samples.
    :param int batch_size: how many samples to draw at once, where memory is short. Defaults to all.
    :param int max_plate_nesting: the largest number of nested plates. Defaults to that of a first run.
    :param bool vectorize: False for one sample at a time, if the model or guide does not allow a further plate.
    :param int restarts: how many searches for missed modes to start away from the guide, 64 say, for
        :attr:`GuideDiagnostics.missed_modes`; see :func:`~pyro_hollow.infer.modes.find_missed_modes`. Each climbs the
        log joint density, all at once, in at most some hundred evaluations of its gradient. Defaults to none.
    :param kwargs: keyword arguments of both; give those of the names above by position.
    :raises ValueError: for settings out of range, subsampled plates, latents that the guide does not sample or to which
        it gives a single value, or that are named as a dimension of ArviZ ("chain", "draw", "<site>_dim_0"), densities
        that are nan or mix samples, and if no sample has a positive density; for
        restarts with discrete latents, or where the model allows no further plate or second derivatives.
    :raises ImportError: without ArviZ.

    References:

    [1] Yuling Yao, Aki Vehtari, Daniel Simpson, Andrew Gelman. Yes, but Did It Work?: Evaluating Variational Inference.
    [arXiv:1802.02538]

    [2] Aki Vehtari, Daniel Simpson, Andrew Gelman, Yuling Yao, Jonah Gabry. Pareto Smoothed Importance Sampling.
    [arXiv:1507.02646]
    """
    arviz = _import_arviz()
    num_draws = num_samples if num_draws is None else num_draws
    batch_size = num_samples if batch_size is None else batch_size
    settings = {"num_samples": num_samples, "num_draws": num_draws, "batch_size": batch_size, "restarts": restarts}
    for name, value in settings.items():
        least = {"num_samples": _MIN_SAMPLES, "restarts": 0}.get(name, 1)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, but got {value}")
    with torch.no_grad():
        pair = _Pair(model, guide, args, kwargs, max_plate_nesting)
        log_weights, samples = pair.sample(num_samples, batch_size, vectorize)
    if log_weights.max() == -math.inf:
        raise ValueError(f"none of the {num_samples} samples of the guide has a positive density under the model")
    smoothed = smooth(log_weights)
    weights = smoothed.weights
    summary = _summarise(log_weights, weights) | {"khat": smoothed.khat}
    modes = MissedModes(0, [], 0.0)
    if restarts:
        log_joint = LogJoint(model, args, kwargs, pair.max_plate_nesting, pair.prototypes)
        modes = find_missed_modes(log_joint, samples, weights, summary["iw_bound"], restarts)
    chosen = _resample(weights, num_draws)
    groups = {
        "posterior": {name: values[chosen] for name, values in samples.items()},
        "sample_stats": {"log_weight": log_weights[chosen]},
        "guide": samples,
    }
    posterior = arviz.InferenceData(attrs=summary, **{name: _dataset(arviz, group) for name, group in groups.items()})
    return GuideDiagnostics(
        **summary,
        num_samples=num_samples,
        log_weights=log_weights,
        weights=weights,
        posterior=posterior,
        unseen=smoothed.unseen,
        restarts=restarts,
        num_modes=modes.num_found,
        missed_modes=modes.values,
        missed_mass=modes.mass,
    )


class _Pair:
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
        self.prototypes = _latents(model_trace)
        if not self.prototypes:
            raise ValueError("model has no latent sites, so that there is nothing for a guide to approximate")
        if missing := [name for name in self.prototypes if name not in guide_trace]:
            raise ValueError(
                f"guide must sample all latent sites of the model, but does not sample {missing}; "
                "add them to the guide, or marginalise them out of the model"
            )
        _check_names(self.prototypes)
        self.points = [name for name in self.prototypes if isinstance(guide_trace.nodes[name]["fn"], dist.Delta)]

    def sample(self, num_samples: int, batch_size: int, vectorize: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Log weights with shape (num_samples,), and the latents with shapes (num_samples,) + their own."""
        if vectorize:
            starts = range(0, num_samples, batch_size)
            batches = [self._sample_batch(min(batch_size, num_samples - start)) for start in starts]
        else:
            batches = [self._sample_batch(None) for _ in range(num_samples)]
        joints, guides, latents = zip(*batches, strict=True)
        log_joint, log_guide = torch.cat(joints), torch.cat(guides)
        samples = {name: torch.cat([values[name] for values in latents]) for name in self.prototypes}
        for name in self.points:  # where they vary, the density is that of an auxiliary site
            if samples[name].numel() and bool((samples[name] == samples[name][:1]).all()):
                raise ValueError(
                    f"guide has a single value for site {name!r}, as AutoDelta has, and so no density to weigh it by; "
                    "use a guide with a spread"
                )
        if vectorize:
            self._check_first(log_joint[0].item(), samples)
        return log_joint - log_guide, samples

    def _check_first(self, log_joint: float, samples: dict[str, Tensor]) -> None:
        """A sum over all dimensions, say, would not fail in a further plate, but mix the samples."""
        first = {name: values[0].to(self.prototypes[name]) for name, values in samples.items()}
        trace = poutine.trace(poutine.condition(self.model, first)).get_trace(*self.args, **self.kwargs)
        alone = float(trace.log_prob_sum())
        if not math.isclose(log_joint, alone, rel_tol=1e-3, abs_tol=1e-3):
            raise ValueError(
                f"model must treat samples independently, but the log density of one is {log_joint:.6g} next to others "
                f"and {alone:.6g} alone; reduce single dimensions, as sum(-1) does, or use vectorize=False. (If the "
                "model draws what the guide does not, as dropout or a hidden site does, it has no density to check.)"
            )

    def _sample_batch(self, size: int | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Log densities of model and guide and the latents; of one sample, without a further plate, for no size."""
        model, guide, nesting = self.model, self.guide, math.inf
        if size is not None:
            nesting = self.max_plate_nesting + 1
            model, guide = (pyro.plate("num_particles_vectorized", size, dim=-nesting)(fn) for fn in (model, guide))
        model_trace, guide_trace = get_importance_trace("flat", nesting, model, guide, self.args, self.kwargs)
        count = 1 if size is None else size
        log_joint, log_guide = _log_density(model_trace, count, "model"), _log_density(guide_trace, count, "guide")
        values = _latents(model_trace)
        sizes = {name: value.numel() for name, value in values.items()}
        if sizes != {name: count * value.numel() for name, value in self.prototypes.items()}:
            raise ValueError(
                "model must have the same latent sites with the same shapes for all samples, but the first had "
                f"{_shapes(self.prototypes)}, and {count} more have {_shapes(values)}"
            )
        # Plates of other sites leave dimensions of size 1 between that of the samples and the site's own.
        samples = {name: values[name].reshape(count, *first.shape).cpu() for name, first in self.prototypes.items()}
        return log_joint, log_guide, samples


def _import_arviz() -> Any:
    try:
        with warnings.catch_warnings():
            # Once a day ArviZ announces version 1 to whoever imports it.
            warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
            import arviz
    except ImportError as error:
        raise ImportError("diagnose needs ArviZ: pip install 'arviz<1'") from error
    if not hasattr(arviz, "InferenceData"):
        raise ImportError(f"diagnose needs ArviZ before version 1, not {arviz.__version__}: pip install 'arviz<1'")
    return arviz


def _dataset(arviz: Any, samples: dict[str, Tensor]) -> Any:
    """One chain of samples."""
    return arviz.dict_to_dataset({name: values[None].numpy() for name, values in samples.items()}, library=pyro)


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


def _check_names(latents: dict[str, Tensor]) -> None:
    """That no latent has the name of a dimension, which a data set of xarray would take it for."""
    dimensions = {f"{name}_dim_{i}" for name, value in latents.items() for i in range(value.dim())}
    for name in latents:
        if name in {"chain", "draw"} | dimensions:
            raise ValueError(
                f"site {name!r} of the model has a name that ArviZ gives to a dimension of its data sets; rename it"
            )


def _latents(trace: poutine.Trace) -> dict[str, Tensor]:
    return {name: site["value"] for name, site in prune_subsample_sites(trace).iter_stochastic_nodes()}


def _shapes(values: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items()}


def _log_density(trace: poutine.Trace, size: int, owner: str) -> Tensor:
    """The logarithm of the joint density with shape (size,), of all sites but those of plates."""
    total = torch.zeros(size, dtype=torch.float64, device="cpu")
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            log_prob = site["log_prob"].reshape(size, -1).sum(-1).to("cpu", torch.float64)
            # A model may well be impossible where the guide samples. Nothing else makes sense.
            bad = log_prob.isnan() | log_prob.isposinf() if owner == "model" else ~log_prob.isfinite()
            if bad.any():
                raise ValueError(
                    f"log_prob of site {name!r} of the {owner} is {log_prob[bad][0].item()} for {int(bad.sum())} of "
                    f"{size} samples; look at the distribution there, or use float64"
                )
            total += log_prob
    return total


def _resample(weights: Tensor, num_draws: int) -> Tensor:
    """Indices by systematic resampling: each occurs num_draws times its weight, rounded up or down."""
    cumulative = weights.cumsum(0)
    offset = 1 - torch.rand_like(weights[0])  # in (0, 1], which never meets a weight of 0
    positions = (torch.arange(num_draws, dtype=weights.dtype, device=weights.device) + offset) / num_draws
    return torch.searchsorted(cumulative, positions * cumulative[-1])


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
