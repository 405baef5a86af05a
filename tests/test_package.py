# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The package as a whole: names of files, public names, and that its import changes no setting."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_hollow

ROOT = Path(pyro_hollow.__file__).parent
PACKAGES = sorted(path.parent.relative_to(ROOT.parent).as_posix() for path in ROOT.rglob("__init__.py"))
VAGUE_NAMES = {"utils.py", "misc.py"}


def test_names_of_files_tell():
    names = {path.name for path in ROOT.rglob("*.py")}
    assert {"__init__.py", "hollow_nn.py"} <= names
    assert not names & VAGUE_NAMES


@pytest.mark.parametrize("folder", [folder for folder in PACKAGES if folder != "pyro_hollow/experiments"])
def test_public_names(folder):
    module = importlib.import_module(folder.replace("/", "."))
    assert module.__all__ == sorted(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


#: Prints the global settings after "import pyro", and again after "import pyro_hollow".
SETTINGS = """
import json, sys
import pyro, torch

def settings():
    from pyro.distributions import Distribution, Normal
    return {
        "dtype": str(torch.get_default_dtype()),
        "validation": torch.distributions.Distribution._validate_args,
        "validation of Pyro": [repr(getattr(cls, "_validate_args", None)) for cls in (Distribution, Normal)],
        "random state": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "anomalies": torch.is_anomaly_enabled(),
        "params": list(pyro.get_param_store().keys()),
        "compiler of torch": "torch._dynamo" in sys.modules,  # which takes seconds to import
    }

torch.manual_seed(0)
before = settings()
import pyro_hollow
json.dump([before, settings(), "pyro_hollow.nn" in sys.modules], sys.stdout)
"""


def test_import_changes_no_setting():
    paths = [str(ROOT.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.run([sys.executable, "-c", SETTINGS], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    before, after, imported = json.loads(process.stdout)
    assert imported and before["dtype"] == "torch.float32" and not before["compiler of torch"]
    assert before == after
