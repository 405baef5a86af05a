# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Types of command-line arguments that the experiments share, and how they write files."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["not_negative", "positive", "write"]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but got {value}")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, but got {value}")
    return value


def write(path: Path, text: str) -> None:
    """Writes a file by way of another one, so that whatever stops the program, what is there is complete."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)
