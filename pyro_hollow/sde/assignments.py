# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

r"""
Expectation-maximisation for the same particles at several times, whose pairs are not known. Each particle y at the
later time is assigned to particles x at the earlier one,

    :math:`R_{ij} \propto \mathcal{N}(y_j; F(x_i), V_i), \qquad \sum_i R_{ij} = 1.`

Assignments are normalised over the sources only; if they are balanced (by Sinkhorn's algorithm), the variance is
overestimated by 30 to 50 %.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .pushed_cosines import Estimate, Snapshots, update_ridge
from .transitions import Transition, cholesky

__all__ = ["fit_assignments"]

#: Entries of the matrix of assignments that are in memory at once.
CHUNK = 2_000_000
#: A step of the logarithm of the variance is this much longer than EM's, which are short.
RELAXATION = 1.6


class _Assigned(NamedTuple):
    """
    Sums over targets of the assignments to each source: of 1, y - F and its outer product; the log-likelihood; and the
    inverse of the covariance of each source.
    """

    weight: Tensor
    first: Tensor
    second: Tensor
    log_prob: float
    inverse: Tensor


def _assign(pushed: Transition, covariance: Tensor, y: Tensor) -> _Assigned:
    n, d = pushed.mean.shape
    factor = cholesky(covariance)
    inverse = torch.cholesky_inverse(factor)
    middle = pushed.mean.mean(0)  # a square distance is a sum of products, with few digits lost near the origin
    mean, y = pushed.mean - middle, y - middle
    pulled = (inverse @ mean.unsqueeze(-1)).squeeze(-1)
    constant = -0.5 * (mean * pulled).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    source = torch.cat([-0.5 * inverse.flatten(1), pulled, constant.unsqueeze(-1)], -1)
    target = torch.cat([(y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(1), y, torch.ones(len(y), 1).to(y)], -1)
    sums, log_prob = torch.zeros_like(source), 0.0
    for part in target.split(max(1, CHUNK // n)):
        logits = part @ source.T
        normalizer = torch.logsumexp(logits, -1, keepdim=True)
        log_prob += float(normalizer.sum()) - len(part) * (0.5 * d * math.log(2 * math.pi) + math.log(n))
        sums += logits.sub_(normalizer).exp_().T @ part
    second, first, weight = sums[:, : d * d].view(n, d, d), sums[:, d * d : -1], sums[:, -1]
    cross = first.unsqueeze(-1) * mean.unsqueeze(-2)
    outer = weight[:, None, None] * mean.unsqueeze(-1) * mean.unsqueeze(-2)
    return _Assigned(weight, first - weight.unsqueeze(-1) * mean, second - cross - cross.mT + outer, log_prob, inverse)


def fit_assignments(
    data: Snapshots, start: Estimate, plan: list[tuple[int, int]], *, steps: int = 40, tolerance: float = 2e-3
) -> Estimate:
    """
    EM from a start, with a ridge that the evidence chooses for each band of functions.

    :param data: the samples.
    :param start: coefficients and variances to start from.
    :param plan: the steps of each gap are the product of its parts and steps, as no noise is drawn.
    :param int steps: the largest number of steps.
    :param float tolerance: stop when the logarithms of the variances change by less.
    :returns: the estimate, whose ``loss`` is minus twice the log-likelihood of the targets, plus the penalty.
    """
    c, v, precision = start.c, start.v, start.precision
    best = replace(start, converged=False, chi2=math.nan)
    for _ in range(steps):
        size, groups = len(c), len(v)
        normal, gradient = torch.diag(precision), -precision * c
        information, score, count, log_prob = torch.zeros(groups, groups).to(v), torch.zeros(groups).to(v), 0, 0.0
        for k, y in enumerate(data.x[1:]):
            pushed = data.push(k, c, v, steps=math.prod(plan[k]), slopes=True)
            found = _assign(pushed, pushed.covariance(v), y)
            inverse = found.inverse
            assert pushed.slopes is not None
            slopes = pushed.slopes[..., :size]
            weighted = found.weight[:, None, None] * (inverse @ slopes)
            normal = normal + slopes.flatten(0, 1).T @ weighted.flatten(0, 1)
            gradient = gradient + torch.einsum("nim,nij,nj->m", slopes, inverse, found.first)
            scaled = inverse.unsqueeze(1) @ pushed.covariances @ inverse.unsqueeze(1)  # P V_g P
            information += torch.einsum("n,ngij,nhji->gh", found.weight, scaled, pushed.covariances)
            score += torch.einsum("ngij,nji->g", scaled, found.second)
            count += y.numel()
            log_prob += found.log_prob
        loss = -2 * log_prob + float(precision @ c.square())
        root = torch.linalg.cholesky(normal + torch.diag(1e-10 * normal.diagonal()))
        c_new = c + torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)
        precision, effective = update_ridge(data.basis, precision, c_new, torch.cholesky_inverse(root).diagonal())
        target = torch.linalg.solve(information, score).clamp_min(1e-12) * count / max(count - effective, count / 2)
        change = (RELAXATION * (target / v).log()).clamp(-1, 1)
        best = replace(best, c=c, v=v, precision=precision, loss=loss, effective=effective)
        c, v = c_new, v * change.exp()
        if bool((change.abs() < tolerance).all()):
            return replace(best, c=c, v=v, converged=True)
    return replace(best, c=c, v=v)
