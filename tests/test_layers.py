# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Who may import whom. A file imports from its own sub-package and from lower floors; never up, never sideways."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_hollow

ROOT = Path(pyro_hollow.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {name.removesuffix("__init__.py"): name for name in FILES if name.endswith("__init__.py")}

#: By sub-package; the package's own __init__ is "".
FLOORS = {"nn": 1, "ops": 1, "ode": 2, "transforms": 3, "sde": 3, "infer": 4, "experiments": 5, "": 5}

#: Third-party packages with a single place to be imported in.
HOMES = {"torchdiffeq": "ode"}

VAGUE_NAMES = {"utils.py", "misc.py"}


def sub_package(name):
    """Of a file, such as "nn" for "nn/layout.py" and "" for "__init__.py"."""
    folder, slash, _ = name.partition("/")
    return folder if slash or folder != "__init__.py" else ""


def imported_names(source, name):
    """Full dotted names of all that a file imports, also inside functions; relative ones made absolute."""
    package = ["pyro_hollow", *name.split("/")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(source, name):
    own = sub_package(name)
    found = []
    for target in imported_names(source, name):
        top, *rest = target.split(".")
        if rest and rest[-1] == "*":
            found.append(f"star import of {target}")
        if top in HOMES and own != HOMES[top]:
            found.append(f"{top} outside {HOMES[top]}")
        if top == "pyro_hollow":
            # A name that is no sub-package comes from the package's __init__.
            other = rest[0] if rest and rest[0] in FLOORS else ""
            if other != own and FLOORS[other] >= FLOORS[own]:
                found.append(f"{own or '__init__'} imports {other or '__init__'}")
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports(name):
    assert violations(FILES[name].read_text(encoding="utf-8"), name) == []


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_a_floor_and_a_telling_name(name):
    assert sub_package(name) in FLOORS
    assert Path(name).name not in VAGUE_NAMES


def test_files_are_found():
    # Guards the tests above, which would pass without files.
    assert {"__init__.py", "nn/hollow_nn.py", "ops/derivatives.py", "ode/solver.py"} <= FILES.keys()
    assert "pyro_hollow.nn" in {n.rpartition(".")[0] for n in imported_names(FILES["__init__.py"].read_text(), "")}
    assert "torchdiffeq" in set(imported_names(FILES["ode/solver.py"].read_text(), "ode/solver.py"))


BAD = {
    "up": ("from pyro_hollow.ode import Solver", "nn/a.py", "nn imports ode"),
    "up, relative": ("from ..transforms.hollow_cnf import HollowCNF", "ode/a.py", "ode imports transforms"),
    "up, relative name": ("from .. import transforms", "ode/a.py", "ode imports transforms"),
    "up, relative from __init__": ("from ..infer import a", "transforms/__init__.py", "transforms imports infer"),
    "up, from deep below": ("from ...ode import Solver", "nn/deep/a.py", "nn imports ode"),
    "up, whole module": ("import pyro_hollow.infer.a as a", "sde/a.py", "sde imports infer"),
    "up, name of the package": ("from pyro_hollow import experiments", "infer/a.py", "infer imports experiments"),
    "up, in a function": ("def f():\n    from pyro_hollow.ode import Solver", "ops/a.py", "ops imports ode"),
    "up, after another": ("import torch, pyro_hollow.ode", "ops/a.py", "ops imports ode"),
    "sideways to ops": ("from pyro_hollow.ops import divergence", "nn/a.py", "nn imports ops"),
    "sideways to nn": ("from ..nn.layout import rows", "ops/a.py", "ops imports nn"),
    "sideways to sde": ("from pyro_hollow.sde import a", "transforms/a.py", "transforms imports sde"),
    "sideways to __init__": ("from pyro_hollow import HollowNN", "experiments/a.py", "experiments imports __init__"),
    "up to __init__": ("import pyro_hollow", "transforms/a.py", "transforms imports __init__"),
    "up to __init__, relative": ("from .. import HollowNN", "transforms/a.py", "transforms imports __init__"),
    "sideways to experiments": ("from .experiments import vae", "__init__.py", "__init__ imports experiments"),
    "star": ("from torch import *", "nn/a.py", "star import of torch.*"),
    "star, relative": ("from .layout import *", "nn/a.py", "star import of pyro_hollow.nn.layout.*"),
    "torchdiffeq": ("import torchdiffeq", "transforms/a.py", "torchdiffeq outside ode"),
    "from torchdiffeq": ("from torchdiffeq import odeint", "__init__.py", "torchdiffeq outside ode"),
}

GOOD = {
    "own module": ("from .layout import rows", "nn/a.py"),
    "own module, absolute": ("from pyro_hollow.experiments.data import load_images", "experiments/vae.py"),
    "own sibling by name": ("from . import layout", "nn/a.py"),
    "down": ("from pyro_hollow.nn import HollowNN\nimport pyro_hollow.ode.solver", "transforms/a.py"),
    "down, relative": ("from ..nn import HollowNN\nfrom .. import ode", "transforms/a.py"),
    "down, from __init__": ("from .nn import HollowNN\nfrom .infer import a", "__init__.py"),
    "third party": ("import torch\nfrom torch import nn\nfrom pyro import poutine", "nn/a.py"),
    "torchdiffeq": ("import torchdiffeq\nfrom torchdiffeq import odeint", "ode/a.py"),
    "namesake": ("import pyro_hollow_extras.transforms", "nn/a.py"),
}


@pytest.mark.parametrize("source, name, message", BAD.values(), ids=BAD)
def test_checker_finds(source, name, message):
    assert violations(source, name) == [message]


@pytest.mark.parametrize("source, name", GOOD.values(), ids=GOOD)
def test_checker_accepts(source, name):
    assert violations(source, name) == []


@pytest.mark.parametrize("folder", [folder for folder in PACKAGES if folder != "experiments/"])
def test_public_names(folder):
    module = importlib.import_module(".".join(["pyro_hollow", *folder.split("/")[:-1]]))
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
    assert imported and before["dtype"] == "torch.float32"
    assert before == after
