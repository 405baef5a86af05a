# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import doctest
import importlib
import pkgutil

import pyro
import pyro.distributions
import pytest
import torch

import pyro_hollow
import pyro_hollow.nn
import pyro_hollow.ode
import pyro_hollow.ops
import pyro_hollow.sde
import pyro_hollow.train
import pyro_hollow.transforms

# The experiments have dependencies of their own.
MODULES = [
    info.name
    for info in pkgutil.walk_packages(pyro_hollow.__path__, "pyro_hollow.")
    if not info.name.startswith("pyro_hollow.experiments")
]
NAMES = {"torch": torch, "pyro": pyro, "dist": pyro.distributions}
for module in (
    pyro_hollow.nn, pyro_hollow.ops, pyro_hollow.ode, pyro_hollow.train, pyro_hollow.transforms, pyro_hollow.sde,
    pyro_hollow,
):  # fmt: skip
    NAMES |= {name: getattr(module, name) for name in module.__all__}


def doctests(name):
    return doctest.DocTestFinder().find(importlib.import_module(name), name, globs=NAMES)


@pytest.mark.parametrize("name", ["pyro_hollow", *MODULES])
def test_doctests(name):
    torch.set_default_dtype(torch.float32)  # as for those who read them
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    for test in doctests(name):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_doctests_are_found():
    assert sum(bool(test.examples) for name in MODULES for test in doctests(name)) >= 8
