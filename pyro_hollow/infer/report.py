# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A fit as a page of text, and as a figure."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoContinuous, AutoNormal

from .importance import limits
from .inference_data import element_names

__all__ = ["draw", "page"]

_ROWS, _WIDTH = 20, 100  # of the table of latents, and of paragraphs
_MODES = 8  # whose weights are shown
_PANELS = 4  # marginals in the figure
_STOPPED = {"max_steps": "the limit of steps; resume() goes on", "interrupted": "Ctrl-C"}
_PRIOR_DRAWS = 4000


def _elements(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The draws of each element of the sites, by a name such as "theta[0]", of arrays with a dimension of draws."""
    result: dict[str, np.ndarray] = {}
    for name, each in values.items():
        result.update(zip(element_names(name, each.shape[1:]), each.reshape(len(each), -1).T, strict=True))
    return result


def _draws(fit: Any, group: str) -> dict[str, np.ndarray]:
    """The draws of each element of the latents in a group of ArviZ."""
    values = {name: fit.posterior[group][name].values for name in _latents(fit)}
    return _elements({name: each.reshape(-1, *each.shape[2:]) for name, each in values.items()})


def _latents(fit: Any) -> list[str]:
    return list(fit.posterior["guide"].data_vars)  # an error of `posterior` says why there are none


def page(fit: Any) -> str:
    """
    Describes a fit: the verdict, the findings on which it rests, a table of the posterior, and notes.

    :param fit: a :class:`~pyro_hollow.infer.Fit`.
    """
    if fit.guide is None:
        return "Posterior without a guide: call pyro_hollow.fit"
    training, found = fit.training, fit.diagnostics
    lines = [f"Posterior by {type(fit.guide).__name__}", *_paragraph(_verdict(fit)), ""]
    lines += [f"{name:12} {text}" for name, text in _findings(fit)]
    table = _table(fit) if found is not None else _guide_table(fit)
    lines += ["", *table, ""] if table else [""]
    events = [] if training is None else training.events
    for note in [*fit.reasons, *events]:
        lines += _paragraph(f"Note: {note}", "  ")
    return "\n".join(lines)


def _paragraph(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _verdict(fit: Any) -> str:
    found = fit.diagnostics
    if found is None:
        return "NOT JUDGED: no draws were weighed; the notes tell why."
    if not found.reliable:
        return (
            f"NOT RELIABLE: neither the guide nor its corrected draws can be trusted, as "
            f"{'; and '.join(found.faults)}. fit.resume() trains on; NUTS runs on LogDensity(model, ...).potential."
        )
    if found.num_modes:
        plural = "modes, all" if found.num_modes > 1 else "mode,"
        return (
            f"RELIABLE: the corrected draws can be trusted. Searches from {found.restarts:,} points found "
            f"{found.num_modes:,} {plural} with draws."
        )
    searched = (
        f"Searches from {found.restarts:,} points found no mode at all, and say nothing of those without any."
        if found.restarts
        else "Modes without any were not looked for: diagnose(model, fit.guide, ..., restarts=64) does."
    )
    return f"RELIABLE: the corrected draws can be trusted where the guide has draws. {searched}"


def _findings(fit: Any) -> list[tuple[str, str]]:
    """Names and values of the findings."""
    found, rows = fit.diagnostics, []
    if found is None:
        rows.append(("ELBO", f"{fit.elbo:.3f}, over the last steps"))
    else:
        weight = "light" if found.khat < 0.5 else "moderate" if found.khat <= 0.7 else "heavy"
        scale = "light below 0.5, heavy above 0.7"
        rows.append(("k-hat", f"{found.khat:.2f}: the importance weights have a {weight} tail ({scale})"))
        most = limits(found.num_samples)[1]
        rows.append(("unseen", f"{found.unseen:.1%} of the weight may lie beyond the draws; {most:.1%} is tolerated"))
        rows.append(("draws", f"{found.num_samples:,}, worth {found.ess:,.0f} independent ones (ESS)"))
        if found.impossible:
            rows.append(("", f"{found.impossible:.1%} of them are impossible under the model"))
        if found.num_modes > 1:
            largest = sorted((mode.weight for mode in found.modes), reverse=True)
            shares = ", ".join(f"{weight:.0%}" for weight in largest[:_MODES])
            more = ", ..." if len(largest) > _MODES else ""
            rows.append(("modes", f"{found.num_modes:,}, with {shares}{more} of the weight of the draws"))
        rows.append(("ELBO", f"{found.elbo:.3f} +- {found.elbo_error:.3f}"))
        rows.append(("log evidence", f"{found.iw_bound:.3f} +- {found.iw_bound_error:.3f} (importance-weighted bound)"))
    rows.append(("training", f"{_training(fit)}, {fit.seconds:.1f} s"))
    rows.append(("evaluation", fit.backend))
    return rows


def _training(fit: Any) -> str:
    training = fit.training
    if fit.gaussian_suffices:
        return f"the Gaussian of the start suffices ({fit.gaussian.num_steps} steps)"
    if training is None:
        return "no steps"
    steps = f"{fit.num_steps:,} step{'s' if fit.num_steps != 1 else ''} of {fit.num_particles} particles"
    if fit.converged:
        return f"{steps}, converged"
    return f"{steps}, not converged (stopped by {_STOPPED.get(training.stopped, training.stopped)})"


def _table(fit: Any) -> list[str]:
    """Moments and quantiles of the corrected draws, latents before deterministic sites."""
    posterior = fit.posterior["posterior"]
    latents = _latents(fit)
    deterministic = [name for name in posterior.data_vars if name not in latents]
    draws = {name: posterior[name].values for name in [*latents, *deterministic]}
    draws = {name: values.reshape(math.prod(values.shape[:2]), *values.shape[2:]) for name, values in draws.items()}
    table = _rows(draws, ["mean", "sd", "5 %", "median", "95 %"], deterministic, _summary)
    return [*table, "* deterministic"] if deterministic else table


def _summary(draws: np.ndarray) -> np.ndarray:
    """Moments and quantiles of each column."""
    draws = draws.astype(float)  # only those that are shown, as there may be many; booleans have no quantiles
    return np.stack([draws.mean(0), draws.std(0), *np.quantile(draws, [0.05, 0.5, 0.95], axis=0)])


def _guide_table(fit: Any) -> list[str]:
    """Quantiles of the guide, if it has any."""
    if not isinstance(fit.guide, (AutoContinuous, AutoNormal)):
        return []
    with torch.no_grad():
        found = fit.guide.quantiles([0.05, 0.5, 0.95], *fit.args, **fit.kwargs)
    arrays = {n: (torch.stack(v) if isinstance(v, list) else v).numpy(force=True) for n, v in found.items()}
    return ["Quantiles of the guide:", *_rows(arrays, ["5 %", "median", "95 %"], [])]


def _rows(
    numbers: dict[str, np.ndarray],
    columns: list[str],
    marked: list[str],
    summary: Callable[[np.ndarray], np.ndarray] = lambda rows: rows,
) -> list[str]:
    """A table of the first elements of each site, of which alone there is a summary, and how many are left out."""
    sizes = [math.prod(each.shape[1:]) for each in numbers.values()]
    counts = _shares(sizes, _ROWS)
    lines: list[tuple[str, str]] = []
    for name, size, count in zip(numbers, sizes, counts, strict=True):
        mark = " *" if name in marked else ""
        each = numbers[name]
        shown = summary(each.reshape(len(each), size)[:, :count])
        for label, values in zip(element_names(name, each.shape[1:]), shown.T, strict=False):
            lines.append((label + mark, "".join(f" {value:10.4g}" for value in values)))
        if 0 < count < size:
            lines.append((f"{name}[...]{mark}", f"  {size - count:,} more"))
    width = max(map(len, ["latent", *(label for label, _ in lines)]))
    table = ["latent".ljust(width) + "".join(f" {column:>10}" for column in columns)]
    table += [f"{label:{width}}{text}" for label, text in lines]
    if sum(sizes) > sum(counts):
        left = f"{sum(sizes) - sum(counts):,} of {sum(sizes):,} elements are left out"
        sites = f", {counts.count(0)} sites among them" if 0 in counts else ""
        table.append(f"{left}{sites}; arviz.summary(fit.posterior) has all")
    return table


def _shares(sizes: list[int], total: int) -> list[int]:
    """Divides a number of rows among sites: small ones are shown whole, large ones get equal shares."""
    shares, left = [0] * len(sizes), total
    chosen = sorted(range(len(sizes))[:total], key=lambda k: sizes[k])
    for rank, k in enumerate(chosen):
        shares[k] = min(sizes[k], left // (len(chosen) - rank))
        left -= shares[k]
    return shares


def draw(fit: Any) -> Any:
    """
    Draws a fit: the loss, the largest weights, the pair of latents with the largest rank correlation (among the first
    50), and the marginals of the first four latents beside the prior.

    :param fit: a :class:`~pyro_hollow.infer.Fit`.
    :return: the figure.
    :raises ImportError: without matplotlib.
    :raises ValueError: for a fit without draws.
    """
    from matplotlib.figure import Figure

    draws, guide = (_draws(fit, group) for group in ("posterior", "guide"))
    figure = Figure(figsize=(12, 6), layout="constrained")
    top = figure.subplots(2, _PANELS)
    _draw_loss(top[0, 0], fit)
    _draw_weights(top[0, 1], fit)
    _draw_pair(top[0, 2], draws, guide)
    top[0, 3].axis("off")
    paragraphs = [_verdict(fit), *(f"{name} {text}".strip() for name, text in _findings(fit))]
    text = "\n".join("\n".join(textwrap.wrap(paragraph, 50)) for paragraph in paragraphs)
    top[0, 3].text(0, 1, text, va="top", fontsize=7)
    _draw_marginals(top[1], fit, draws)
    # Notebooks show a figure that pyplot has not made only once pyplot has made another one.
    vars(figure)["_repr_png_"] = partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_loss(axis: Any, fit: Any) -> None:
    losses = fit.losses.numpy()
    finite = losses[np.isfinite(losses)]
    axis.plot(losses, ".", markersize=1, color="0.7")
    if len(finite) >= 20:
        smooth = np.convolve(finite, np.ones(20) / 20, "valid")
        axis.plot(np.arange(len(smooth)) + 19, smooth)
        axis.set_ylim(*np.quantile(finite, [0.0, 0.98]) + np.array([-0.1, 0.1]))
    axis.set(title="negative ELBO", xlabel="step", ylabel="nats")


def _draw_weights(axis: Any, fit: Any) -> None:
    log_weights = fit.diagnostics.log_weights.sort(descending=True).values[:400]
    relative = (log_weights - fit.diagnostics.log_weights.logsumexp(0)).exp() * len(fit.diagnostics.log_weights)
    axis.loglog(np.arange(1, len(relative) + 1), relative.numpy(), ".", markersize=3)
    axis.axhline(1.0, color="0.8")
    axis.set(title=f"largest weights, k-hat {fit.khat:.2f}", xlabel="rank", ylabel="times the mean weight")


def _draw_pair(axis: Any, draws: dict[str, np.ndarray], guide: dict[str, np.ndarray]) -> None:
    names = list(draws)[:50]
    if len(names) < 2:
        axis.axis("off")
        return
    ranks = np.stack([draws[name].argsort().argsort() for name in names]).astype(float)
    bound = np.abs(np.nan_to_num(np.corrcoef(ranks))) - 2 * np.eye(len(names))
    x, y = (names[k] for k in np.unravel_index(bound.argmax(), bound.shape))
    axis.plot(guide[x][:1000], guide[y][:1000], ".", markersize=2, color="0.7", label="guide")
    axis.plot(draws[x][:1000], draws[y][:1000], ".", markersize=2, label="corrected")
    axis.set(title="most bound pair", xlabel=x, ylabel=y)
    axis.legend(fontsize=7)


def _draw_marginals(axes: Any, fit: Any, draws: dict[str, np.ndarray]) -> None:
    prior = _prior(fit)
    for axis, name in zip(axes, list(draws), strict=False):
        low, high = np.quantile(draws[name], [0.001, 0.999])
        axis.hist(draws[name], 40, range=(low, high), density=True, histtype="step", label="posterior")
        if name in prior:
            # With its true density: most of a prior may lie outside.
            share = np.full(len(prior[name]), 40 / (len(prior[name]) * max(high - low, 1e-300)))
            axis.hist(prior[name], 40, range=(low, high), weights=share, color="0.85", label="prior", zorder=0)
        axis.set(title=name)
        axis.legend(fontsize=7)
    for axis in axes[len(draws) :]:
        axis.axis("off")


def _prior(fit: Any) -> dict[str, np.ndarray]:
    """Draws of the prior; empty if the model cannot be sampled from it."""
    names = _latents(fit)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), pyro.validation_enabled(False):
            sampled = Predictive(fit.model, num_samples=_PRIOR_DRAWS, return_sites=names)(*fit.args, **fit.kwargs)
    except Exception:  # improper priors, or whatever a model raises far from its posterior
        return {}
    shapes = {name: fit.posterior["guide"][name].shape[2:] for name in names}
    values = {name: sampled[name].numpy(force=True).reshape(-1, *shapes[name]) for name in names if name in sampled}
    return {name: each for name, each in _elements(values).items() if math.isfinite(each.sum())}
