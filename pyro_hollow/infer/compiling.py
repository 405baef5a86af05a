# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""
Compilation of graphs by torch's AOTInductor, in a process of its own, so that nobody has to wait for it.

What was compiled is kept in the folder that PYRO_HOLLOW_CACHE names, under a hash of the graph, its constants, torch's
version and the processor. Run as a program, this file compiles one graph.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hollow.nn.native.build import cache_folder

__all__ = ["Compilation"]

_NICE = 10
_WATCH_INTERVAL = 1.0  # seconds between two looks at the parent


class Compilation:
    """
    A graph that is being compiled, or was.

    :ivar str failure: why it cannot be compiled; empty while that is not known.

    :param module: the graph.
    :param inputs: examples of its inputs.
    """

    def __init__(self, module: GraphModule, inputs: Sequence[Tensor]) -> None:
        self._module, self._inputs = module, [each.clone() for each in inputs]
        self._package = cache_folder() / f"density-{_digest(module, inputs)}.pt2"
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self.failure = ""

    @property
    def started(self) -> bool:
        """True once a process was started."""
        return self._process is not None

    @property
    def exists(self) -> bool:
        """True if the compiled graph is on disk."""
        return self._package.is_file()

    def start(self, nice: bool = True) -> None:
        """
        Starts the process. It ends with this object or this process at the latest.

        :param bool nice: to leave the processor to others.
        """
        self._folder = folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        # Unpickling a GraphModule would trace it by proxies, which operations that take lists of tensors refuse.
        torch.save((self._module.code, dict(self._module.named_buffers()), self._inputs), folder / "graph.pt")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            self._package.parent.mkdir(parents=True, exist_ok=True)
            with open(folder / "log", "wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(folder / "graph.pt"), str(self._package), str(os.getpid()),
                     *["nice"] * nice],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            self.failure = f"{type(error).__name__}: {error}"
            return
        weakref.finalize(self, _stop, self._process)

    def result(self, wait: bool = False) -> Callable[..., list[Tensor]] | None:
        """
        The compiled function once there is one, which takes the inputs of the graph and returns its outputs.

        :param bool wait: until the process has ended.
        """
        if self._process is not None:
            if not wait and self._process.poll() is None:
                return None
            status = self._process.wait()
            if status != 0 and self._folder is not None:
                self.failure = f"status {status}: {_last_line(self._folder / 'log')}"
        if self.failure or not self.exists:
            return None
        try:
            # As torch._inductor.aoti_load_package does, whose imports take seconds.
            loader = torch._C._aoti.AOTIModelPackageLoader(str(self._package), "model", False, 1, -1)
        except Exception as error:  # of a file that this torch cannot use
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        return lambda *inputs: loader.run(list(inputs))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)  # and the compilers it has started
        process.kill()
        process.wait()


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "the compiler said nothing"


def _digest(module: GraphModule, inputs: Sequence[Tensor]) -> str:
    hash_ = hashlib.sha256()
    about = [
        module.code,
        torch.__version__,
        platform.machine(),
        platform.processor(),
        torch.backends.cpu.get_cpu_capability(),
    ]
    about += [f"{tuple(each.shape)} {each.dtype} {each.device}" for each in inputs]
    hash_.update(repr(about).encode())
    for name, buffer in sorted(module.named_buffers()):
        hash_.update(f"{name} {tuple(buffer.shape)} {buffer.dtype}".encode())
        hash_.update((buffer.double() if buffer.is_floating_point() else buffer).numpy(force=True).tobytes())
    return hash_.hexdigest()[:32]


def _module(code: str, buffers: dict[str, Tensor]) -> torch.nn.Module:
    """A module that runs the code of a graph."""
    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    exec(code, names)
    module: torch.nn.Module = type("Graph", (torch.nn.Module,), {"forward": names["forward"]})()
    for name, buffer in buffers.items():
        module.register_buffer(name, buffer)
    return module


def _follow(parent: int) -> None:
    """Ends this process, with the compilers it has started, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(_WATCH_INTERVAL)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # of which it is the leader
    os._exit(1)


def _compile(source: str, package: str, parent: str, priority: str = "") -> None:
    threading.Thread(target=_follow, args=(int(parent),), daemon=True).start()
    if priority == "nice" and hasattr(os, "nice"):
        os.nice(_NICE)
    code, buffers, inputs = torch.load(source)
    module = _module(code, buffers)
    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs))
        partial = f"{package}.{os.getpid()}.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=partial)
    os.replace(partial, package)


if __name__ == "__main__":
    _compile(*sys.argv[1:])
