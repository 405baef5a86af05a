# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Training: objectives, and the loop that minimises them."""

from .loop import Training, train
from .objectives import ELBO, FlowMatching, MaximumLikelihood

__all__ = ["ELBO", "FlowMatching", "MaximumLikelihood", "Training", "train"]
