#!/usr/bin/env bash
# A perfect guide gets the worst k-hat there is from Pyro and ArviZ, with the advice to draw more.
#
# Versions: pyro-ppl 1.9.1 with torch 2.13.0, and ArviZ 0.22.0.
# Seen: a guide that is the model's prior itself, with no data, so that all importance weights are equal.
# Pyro's psis_diagnostic returns inf and warns to increase num_particles.
# With ten times the particles it returns inf and warns again.
# ArviZ's psislw of 4000 equal log weights returns inf as well.
# Noise of 1e-8 on the log weights brings ArviZ's k-hat from inf to below zero.
# Both need draws above a cutoff, and where the largest weights are equal there are none.
# One would have guessed: constant weights have the lightest tail, and a k-hat of zero or less.
# Why it matters: k-hat below 0.7 is the test of whether to trust a guide, and here the best one fails it.
# A capped weight and a conjugate model solved exactly come near this case.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile \
    torch==2.13.0 pyro-ppl==1.9.1 arviz==0.22.0 xarray==2026.9.0 numpy==2.4.6 scipy==1.17.1
cat > "$dir/check.py" <<'PY'
import math
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
from pyro.infer.importance import psis_diagnostic


def model():
    pyro.sample("x", dist.Normal(0.0, 1.5))


pyro.set_rng_seed(0)
for particles in (1000, 10000):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        k = psis_diagnostic(model, model, num_particles=particles)
    advice = [str(w.message) for w in caught if "num_particles" in str(w.message)]
    print(f"Pyro, {particles} particles: k-hat {k}; {advice}")
    assert math.isinf(k) and len(advice) == 1

equal = np.zeros(4000)
noise = 1e-8 * np.random.default_rng(0).standard_normal(4000)
k, k_noise = float(arviz.psislw(equal)[1]), float(arviz.psislw(noise)[1])
print(f"ArviZ: k-hat {k} of equal weights, {k_noise:.2f} with noise of 1e-8")
assert math.isinf(k) and k_noise < 0.0
PY
"$dir/venv/bin/python" "$dir/check.py"
