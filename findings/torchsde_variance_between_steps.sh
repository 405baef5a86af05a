#!/usr/bin/env bash
# torchsde returns too small a variance at times between its steps, even where the scheme is exact.
#
# Versions: torchsde 0.2.6 with torch 2.13.0.
# Seen: Brownian motion, dY = dW, for which an Euler step of any length is exact in law.
# Its variance at time 0.5 is 0.5.
# With dt = 1, sdeint gives 0.25 at time 0.5, for euler, milstein and srk alike.
# With dt = 0.4 it gives 0.42, while the variance at time 1 is right.
# A time between two steps is read off a straight line between them, which leaves out the noise in between.
# The adaptive solver does so, too: at rtol = atol = 1e-3 and a first step of 0.3 it gives 0.40.
# One would have guessed: a step ends at each requested time, or the missing noise is added as a bridge.
# Why it matters: an SDE learned from snapshots is compared with data at the times of the snapshots.
# Where these are no multiples of dt, its diffusion is learned too large to make up, without a word.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 torchsde==0.2.6 numpy==2.4.6 scipy==1.17.1
cat > "$dir/check.py" <<'PY'
import torch
import torchsde


class Brownian(torch.nn.Module):
    noise_type = "diagonal"
    sde_type = "ito"

    def f(self, t, y):
        return torch.zeros_like(y)

    def g(self, t, y):
        return torch.ones_like(y)


torch.manual_seed(0)
start = torch.zeros(20000, 1)
times = torch.tensor([0.0, 0.5, 1.0])


def variances(**options):
    return torchsde.sdeint(Brownian(), start, times, **options).detach().var(1).squeeze(-1).tolist()[1:]


for method in ("euler", "milstein", "srk"):
    middle, end = variances(dt=1.0, method=method)
    print(f"{method}, dt 1: variance {middle:.2f} at 0.5 and {end:.2f} at 1")
    assert abs(middle - 0.25) < 0.02 and abs(end - 1.0) < 0.05
middle, end = variances(dt=0.4, method="euler")
print(f"euler, dt 0.4: variance {middle:.2f} at 0.5 and {end:.2f} at 1")
assert middle < 0.46 and abs(end - 1.0) < 0.05
middle, end = variances(dt=0.3, method="srk", adaptive=True, rtol=1e-3, atol=1e-3)
print(f"srk, adaptive: variance {middle:.2f} at 0.5 and {end:.2f} at 1")
assert middle < 0.46 and abs(end - 1.0) < 0.05
middle, end = variances(dt=0.5, method="euler")
print(f"euler, dt 0.5, whose steps end at 0.5: variance {middle:.2f}")
assert abs(middle - 0.5) < 0.03
PY
"$dir/venv/bin/python" "$dir/check.py"
