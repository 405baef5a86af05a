#!/usr/bin/env bash
# The first optimizer of a process imports torch's compiler and sympy, though nothing is compiled.
#
# Versions: torch 2.13.0 (Adam, and pyro.optim's with pyro-ppl 1.9.2).
# Seen: torch.optim.Adam([p]) loads 820 modules, among them torch._dynamo and sympy, and takes two seconds on a CPU, more
# with a cold disk; the second one takes 0.2 ms. `import torch` and `import pyro` load neither.
# The decorator of Optimizer.add_param_group that keeps dynamo out imports it on its first call.
# One would have guessed: a constructor that stores references and takes microseconds.
# Why it matters: a fit of a small posterior takes a second. Of what a user waits for, the first step of SVI then is the
# smaller part, and a benchmark that times from the first optimizer on, or from the import on, measures this instead.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 pyro-ppl==1.9.2 numpy==2.4.6
cat > "$dir/check.py" <<'PY'
import sys
import time

import pyro
import torch


def loaded():
    return {name for name in ("torch._dynamo", "sympy") if name in sys.modules}


def seconds(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


parameter, before, modules = torch.nn.Parameter(torch.zeros(1)), loaded(), len(sys.modules)
first = seconds(lambda: torch.optim.Adam([parameter]))
added = len(sys.modules) - modules
second = seconds(lambda: torch.optim.Adam([parameter]))
print(f"before: {sorted(before)}; after: {sorted(loaded())}, {added} modules more")
print(f"the first constructor takes {first:.2f} s, the second {second * 1e3:.2f} ms")
assert not before and loaded() == {"torch._dynamo", "sympy"}
assert added > 500
PY
"$dir/venv/bin/python" "$dir/check.py"
