# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Files in which the experiments keep their results."""

from __future__ import annotations

from pathlib import Path

__all__ = ["write"]


def write(path: Path, text: str) -> None:
    """Writes a file by way of another one, so that whatever stops the program, what is there is complete."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)
