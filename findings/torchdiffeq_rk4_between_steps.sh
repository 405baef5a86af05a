#!/usr/bin/env bash
# torchdiffeq's fixed-step methods return straight lines between their steps, so that rk4 is of order 2 there.
#
# Versions: torchdiffeq 0.2.5 with torch 2.13.0.
# Seen: y' = -y by rk4 with step_size in float64, asked for the times 0, 1/3 and 1.
# With step_size 0.1 the error at time 1 is 3e-7.
# At time 1/3, sooner on the same trajectory, it is 8e-4.
# Halving the step divides the first error by 16, and the second by 4.
# The time 1/3 is no multiple of the step, and such times are read off a line between two steps by default.
# With options interp="cubic" the error at time 1/3 falls to 7e-8.
# One would have guessed: each requested time is a step's end, as without step_size, or is as accurate as the method.
# Why it matters: losses on observations at irregular times, films of a flow, and path penalties read such times.
# Comparing solvers there makes all orders above two look alike.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 torchdiffeq==0.2.5 numpy==2.4.6 scipy==1.17.1
cat > "$dir/check.py" <<'PY'
import torch
from torchdiffeq import odeint

times = torch.tensor([0.0, 1.0 / 3.0, 1.0], dtype=torch.float64)
start = torch.ones((), dtype=torch.float64)


def errors(step, **options):
    y = odeint(lambda t, y: -y, start, times, method="rk4", options={"step_size": step, **options})
    return (y - torch.exp(-times)).abs().tolist()[1:]


between, end = errors(0.1)
between_half, end_half = errors(0.05)
cubic = errors(0.1, interp="cubic")[0]
print(f"step 0.1:  error at 1/3 {between:.1e}, at 1 {end:.1e}")
print(f"step 0.05: error at 1/3 {between_half:.1e}, at 1 {end_half:.1e}")
print(f"step 0.1 with cubic interpolation: error at 1/3 {cubic:.1e}")
assert between > 1000 * end and cubic < 1e-6
assert 3 < between / between_half < 5 and 14 < end / end_half < 18
PY
"$dir/venv/bin/python" "$dir/check.py"
