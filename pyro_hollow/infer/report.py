# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""A fit as a page of text, and as a figure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Predictive

__all__ = ["draw", "page"]

_ROWS = 20  # of the table of latents
_PANELS = 4  # marginals in the figure
_STOPPED = {"max_steps": "the limit of steps; resume() goes on", "interrupted": "Ctrl-C"}
_PRIOR_DRAWS = 4000


def _elements(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The draws of each element of the sites, by a name such as "theta[0]", of arrays with a dimension of draws."""
    result = {}
    for name, each in values.items():
        for index in np.ndindex(each.shape[1:]):
            label = name + (f"[{', '.join(map(str, index))}]" if index else "")
            result[label] = each[(slice(None),) + index]
    return result


def _draws(fit: Any, group: str) -> dict[str, np.ndarray]:
    """The draws of each element of the latents in a group of ArviZ."""
    values = {name: fit.posterior[group][name].values for name in _latents(fit)}
    return _elements({name: each.reshape(-1, *each.shape[2:]) for name, each in values.items()})


def _latents(fit: Any) -> list[str]:
    return list(fit.posterior["guide"].data_vars)  # which tells where there are none


def page(fit: Any) -> str:
    """
    Describes a fit in words and a table.

    :param fit: a :class:`~pyro_hollow.infer.Fit`.
    """
    training, found = fit.training, fit.diagnostics
    if fit.guide is None:
        return "Posterior without a guide: call pyro_hollow.fit"
    steps = "no steps" if training is None else f"{fit.num_steps} steps of {fit.num_particles} particles"
    if fit.gaussian_suffices:
        steps = f"the Gaussian of its start suffices ({fit.gaussian.num_steps} steps)"
    elif training is not None and not fit.converged:
        steps += f", not converged (stopped by {_STOPPED.get(training.stopped, training.stopped)})"
    lines = [f"Posterior by {type(fit.guide).__name__}: {steps}, {fit.seconds:.1f} s", ""]
    if found is None:
        lines += [f"ELBO of the last steps     {fit.elbo:.3f}"]
    else:
        text = str(found).replace("(restarts=64 would)", "(diagnose(model, fit.guide, ..., restarts=64) would)")
        lines += [text, "", *_table(fit)]
    lines += ["", f"Evaluated: {fit.backend}."]
    events = [] if training is None else training.events
    return "\n".join([*lines, *(f"Note: {reason}" for reason in [*fit.reasons, *events])])


def _table(fit: Any) -> list[str]:
    draws = _draws(fit, "posterior")
    width = max(len("latent"), *(len(name) for name in list(draws)[:_ROWS]))
    lines = [f"{'latent':{width}} {'mean':>10} {'sd':>10} {'5 %':>10} {'median':>10} {'95 %':>10}"]
    for name, values in list(draws.items())[:_ROWS]:
        numbers = [values.mean(), values.std(), *np.quantile(values, [0.05, 0.5, 0.95])]
        lines.append(f"{name:{width}} " + " ".join(f"{number:10.4g}" for number in numbers))
    if len(draws) > _ROWS:
        lines.append(f"and {len(draws) - _ROWS} more; arviz.summary(fit.posterior) has all")
    return lines


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
    top[0, 3].text(
        0, 1, str(fit.diagnostics).replace(": ", ":\n").replace("; ", ";\n"), va="top", fontsize=7, wrap=True
    )
    _draw_marginals(top[1], fit, draws)
    return figure


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
