# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Compiles kernel.c."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

__all__ = ["TYPES", "library"]

#: In this order. Not all compilers know them.
_OPTIONS = (("-march=native", "-fopenmp"), ("-march=native",), ())
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


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise RuntimeError(f"compile=True needs a C compiler, but {command[0]!r} cannot be run") from error


def cache_folder() -> Path:
    """
    The folder where compiled code is kept: that of the environment variable PYRO_HOLLOW_CACHE, or pyro_hollow in the
    user's folder for caches, which XDG_CACHE_HOME names.
    """
    own = os.environ.get("PYRO_HOLLOW_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pyro_hollow"


def _command(dtype: torch.dtype, options: Sequence[str]) -> tuple[list[str], str]:
    """
    The command that compiles, without the output, and a name for its result: a hash of all that it depends on.

    :raises RuntimeError: when the compiler fails.
    """
    real, integer = TYPES[dtype]
    source = Path(__file__).with_name("kernel.c")
    command = [*_compiler(), "-std=c11", "-O3", "-fno-fast-math", "-ffp-contract=fast", "-fPIC", "-shared"]
    command += [f"-DREAL={real}", f"-DUINT={integer}", *options]
    # The macros tell the version of the compiler, and the instructions of the processor.
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    if macros.returncode:
        raise RuntimeError(f"compile=True failed: {shlex.join(command)}\n{macros.stderr}")
    parts = [*command, source.read_text(), macros.stdout]
    return [*command, str(source)], hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _compile(command: list[str], path: Path) -> ctypes.CDLL:
    """
    Compiles to a path, where the result appears complete: other processes may compile to it, and load it.

    :raises RuntimeError: when the compiler fails.
    :raises OSError: when nothing can be written to the folder.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        part = Path(folder) / path.name
        done = _run([*command, "-o", str(part), "-lm"])
        if done.returncode:
            raise RuntimeError(f"compile=True failed: {shlex.join(command)}\n{done.stderr}")
        try:
            loaded = ctypes.CDLL(str(part))
        except OSError as error:
            raise RuntimeError(
                f"compile=True could compile, but not load the result: {error}. If programs must not be run from "
                f"there, name another folder in the environment variable PYRO_HOLLOW_CACHE"
            ) from error
        part.replace(path)
        return loaded


def _load(dtype: torch.dtype, options: Sequence[str]) -> ctypes.CDLL:
    command, name = _command(dtype, options)
    path = cache_folder() / f"kernel-{name}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # not there yet, or not complete
        pass
    try:
        return _compile(command, path)
    except OSError as error:
        warnings.warn(
            f"compiled code cannot be kept in {str(path.parent)!r} ({error}), and is compiled anew in each process: "
            "name another folder in the environment variable PYRO_HOLLOW_CACHE",
            stacklevel=2,
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _compile(command, Path(folder) / path.name)


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """
    The compiled code for a type, kept in :func:`cache_folder`.

    :raises RuntimeError: without a C compiler, or when it fails.
    """
    for options in _OPTIONS:
        try:
            library = _load(dtype, options)
            break
        except RuntimeError as error:
            failure = error
    else:
        raise failure
    library.step.restype = _DOUBLE
    library.step.argtypes = [*(_POINTER,) * 2, _DOUBLE, _DOUBLE, _POINTER, _INT, *(_POINTER,) * 4, _DOUBLE, _DOUBLE]
    library.step_vjp.argtypes = [*(_POINTER,) * 3, _DOUBLE, _DOUBLE, *(_POINTER,) * 3]
    library.step_score.argtypes = [*(_POINTER,) * 2, _DOUBLE, _DOUBLE, *(_POINTER,) * 3]
    library.pack.argtypes = [*(_POINTER,) * 2, _INT, *(_POINTER,) * 3]
    library.lanes.restype = library.saved_size.restype = _INT
    library.lanes.argtypes, library.saved_size.argtypes = [], [_POINTER]
    return library
