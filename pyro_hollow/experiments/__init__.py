# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Runnable experiments: ``python -m pyro_hollow.experiments`` lists them, and with ``.NAME`` runs one."""
