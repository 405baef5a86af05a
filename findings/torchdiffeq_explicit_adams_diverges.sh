#!/usr/bin/env bash
# torchdiffeq's explicit Adams method, with its default options, gets worse the smaller the step.
#
# Versions: torchdiffeq 0.2.5 with torch 2.13.0.
# Seen: y' = -y from 0 to 1 in float64, the easiest equation there is.
# With step_size 0.1 the end is missed by 2e-4.
# With step_size 0.05 it is missed by 2e-3.
# With step_size 0.025 it is missed by 5e-2, and from 0 to 10 with 0.0125 by more than 1e50.
# The default max_order is 12, and the explicit formula of that order is stable only for very small steps.
# A large step hides it: with ten steps the order has no time to rise that far.
# With options max_order=4 the error falls with the step as it should.
# One would have guessed: halving the step of a high-order method lowers the error, above all on a decaying solution.
# Why it matters: halving the step is how users of flows check that their solve is accurate.
# Trained fields contract somewhere, as this equation does, and no warning is given.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 torchdiffeq==0.2.5 numpy==2.4.6 scipy==1.17.1
cat > "$dir/check.py" <<'PY'
import math

import torch
from torchdiffeq import odeint


def error(step, end=1.0, **options):
    times = torch.tensor([0.0, end], dtype=torch.float64)
    options["step_size"] = step
    y = odeint(lambda t, y: -y, torch.ones(1, dtype=torch.float64), times, method="explicit_adams", options=options)
    return abs(y[-1].item() - math.exp(-end))


steps = (0.1, 0.05, 0.025)
default = [error(step) for step in steps]
low = [error(step, max_order=4) for step in steps]
long = error(0.0125, end=10.0)
for step, a, b in zip(steps, default, low):
    print(f"step {step}: default order {a:.1e}, max_order=4 {b:.1e}")
print(f"step 0.0125 until 10: default order {long:.1e}")
assert default[0] < default[1] < default[2] and default[2] > 0.01 and long > 1e10
assert low[0] > low[1] > low[2]
PY
"$dir/venv/bin/python" "$dir/check.py"
