# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Lists the experiments: ``python -m pyro_hollow.experiments``."""

from __future__ import annotations

import ast
from pathlib import Path


def experiments() -> dict[str, str]:
    """Names of the modules with a function ``main``, and the first lines of their docstrings; none is imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body):
            found[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0]
    return found


def main() -> None:
    """Prints the list."""
    found = experiments()
    width = max(map(len, found))
    for name, line in found.items():
        print(f"{name:{width}}  {line}")
    print("\nRun one with `python -m pyro_hollow.experiments.NAME`; --help tells its options.")


if __name__ == "__main__":
    main()
