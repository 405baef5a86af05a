# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import ast
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(blocks):
    """As in a program of its own, in float32."""
    torch.set_default_dtype(torch.float32)
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    return namespace


@pytest.mark.slow
def test_posterior_of_the_first_block_can_be_trusted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run([BLOCKS[0]])["result"]
    assert result.khat < 0.7
    assert result.ess > 0.7 * result.diagnostics.num_samples


def test_first_blocks_run(tmp_path, monkeypatch):
    """One program: the later ones use the model of the first."""
    monkeypatch.chdir(tmp_path)
    assert BLOCKS[0].count("fit(model)") == 1 and BLOCKS[2].count("range(800)") == 1
    blocks = [
        BLOCKS[0].replace("fit(model)", "fit(model, num_steps=50, compile=False)"),
        BLOCKS[1],
        BLOCKS[2].replace("range(800)", "range(100)"),
    ]
    namespace = run(blocks)
    assert namespace["result"].num_steps == 50 and (tmp_path / "fit.png").exists()
    assert namespace["draws"]["theta"].shape == (20, 8)
    losses, check = namespace["losses"], namespace["check"]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert 0 < check.ess <= check.num_samples


@pytest.mark.parametrize("block", BLOCKS[3:], ids=lambda block: f"{len(block)} characters")
def test_other_blocks_run(block):
    run([block.replace("num_flows=2", "num_flows=2, num_steps=50")])


def imported(source):
    """Top-level names of the modules that a program imports, at any place."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"pyro_hollow"}


def provided(extras):
    """Names of the distributions that pip installs with the package and these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pending = [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]
    found = set()
    while pending:
        requirement = Requirement(pending.pop())
        name = requirement.name.lower().replace("_", "-")
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            pending += metadata.requires(name) or []
    return found


def test_install_line_provides_what_the_first_block_needs():
    (first, *_) = re.findall(r"^    pip install \"?\.(?:\[(.*?)\])?\"?$", README, re.MULTILINE)
    assert README.index("pip install") < README.index(BLOCKS[0])
    parts = [path for path in (ROOT / "pyro_hollow").rglob("*.py") if "experiments" not in path.parts]
    needed = set().union(*(imported(source) for source in (BLOCKS[0], *(path.read_text() for path in parts))))
    distributions = metadata.packages_distributions()
    missing = {
        name
        for name in needed
        if not {d.lower().replace("_", "-") for d in distributions[name]} & provided(first.split(",") if first else [])
    }
    assert {"torch", "pyro", "arviz"} <= needed and not missing


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("options", "command"),
    [
        ([], 'install --quiet  "torch==2.13.0"'),
        (["TORCH=torch"], 'install --quiet  "torch"'),
        (["TORCH_INDEX=https://x/cpu"], 'install --quiet --index-url "https://x/cpu" "torch==2.13.0"'),
    ],
    ids=("default", "release", "index"),
)
def test_torch_can_be_chosen_and_is_named_before_it_is_installed(options, command, tmp_path):
    dry = ["make", "--dry-run", "vae", f"VENV={tmp_path / 'new'}", *options]
    commands = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said, installed = commands.index("Installing torch"), commands.index(command)
    assert said < installed < commands.index("Installed torch")
    assert "CUDA" in commands[said:installed]
