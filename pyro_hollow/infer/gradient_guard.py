# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Steps without finite gradients, which must not reach an optimizer."""

from __future__ import annotations

import warnings
import weakref
from functools import partial

import torch
from torch import Tensor, nn

__all__ = ["guard_gradients"]


def guard_gradients(sample: Tensor, module: nn.Module) -> None:
    """
    Drops the gradients of all parameters after a backward pass in which one of them is not finite, so that no optimizer
    moves any. (A gradient of zero would not do: Adam follows its momentum.) The first time there is a warning.

    Where several processes train together nothing is dropped: they would no longer agree.

    :param Tensor sample: what the module has made; the backward pass comes through it.
    :param ~torch.nn.Module module: the module, which is not kept alive.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if sample.requires_grad and not distributed:
        sample.register_hook(partial(_at_end_of_backward, weakref.ref(module)))


def _at_end_of_backward(module: weakref.ref[nn.Module], gradient: Tensor) -> None:
    # Gradients of parameters are complete at the end alone.
    torch.autograd.Variable._execution_engine.queue_callback(partial(_drop, module))


def _drop(reference: weakref.ref[nn.Module]) -> None:
    module = reference()
    if module is None:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    # The largest absolute value: unlike a sum of squares it does not overflow, and it is NaN if an element is.
    if not gradients or bool(torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all()):
        return
    for parameter in module.parameters():
        parameter.grad = None
    if not getattr(module, "_warned", False):
        module._warned = True  # type: ignore[assignment]
        warnings.warn(
            "a gradient of the guide was not finite: its parameters are left as they are in such steps. If the loss "
            "does not recover, lower the learning rate, or look at the model where its latents are extreme",
            RuntimeWarning,
            stacklevel=2,
        )
