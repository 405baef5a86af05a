# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Compiles kernel.c."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

__all__ = ["TYPES", "library"]

TYPES = {torch.float32: ("float", "uint32_t"), torch.float64: ("double", "uint64_t")}
_INT, _DOUBLE, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def _compiler() -> list[str]:
    """The command that the environment variable CC names, or what there is."""
    if os.environ.get("CC"):
        try:
            return shlex.split(os.environ["CC"])
        except ValueError as error:
            raise RuntimeError(f"compile=True cannot read the environment variable CC: {error}") from error
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        raise RuntimeError(
            "compile=True needs a C compiler, but there is no cc, gcc or clang: install one, name yours in the "
            "environment variable CC, or leave compile=False"
        )
    return [found]


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """
    The compiled code for a type, once per process.

    :raises RuntimeError: without a C compiler, or when it fails.
    """
    real, integer = TYPES[dtype]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder) / "kernel.so")
        command = [*_compiler(), "-std=c11", "-O3", "-fno-fast-math", "-ffp-contract=fast", "-fPIC", "-shared"]
        command += [f"-DREAL={real}", f"-DUINT={integer}", str(Path(__file__).with_name("kernel.c")), "-o", path, "-lm"]
        for options in (["-march=native"], []):  # which not all compilers know
            try:
                done = subprocess.run([*command, *options], capture_output=True, text=True)
            except OSError as error:
                raise RuntimeError(f"compile=True needs a C compiler, but {command[0]!r} cannot be run") from error
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"compile=True failed: {shlex.join(command)}\n{done.stderr}")
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            raise RuntimeError(
                f"compile=True could compile, but not load the result: {error}. If programs must not be run from "
                "there, name another folder in the environment variable TMPDIR"
            ) from error
    library.step.restype = _DOUBLE
    library.step.argtypes = [*(_POINTER,) * 2, _DOUBLE, _DOUBLE, _POINTER, _INT, *(_POINTER,) * 3, _DOUBLE, _DOUBLE]
    library.step_vjp.argtypes = [*(_POINTER,) * 3, _DOUBLE, _DOUBLE, *(_POINTER,) * 2]
    library.step_score.argtypes = [*(_POINTER,) * 2, _DOUBLE, _DOUBLE, *(_POINTER,) * 2]
    return library
