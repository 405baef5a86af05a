#!/usr/bin/env bash
# Pyro's vectorized particles pair up in an ordinary regression, and the loss grows with their number.
#
# Versions: pyro-ppl 1.9.1 with torch 2.13.0.
# Seen: a logistic regression with `logits = w @ X.T`, where w has three coefficients, and a plate over the data.
# With Trace_ELBO(num_particles=4) the loss is about 16.
# With vectorize_particles=True and the same four particles it is about 62.
# With 16 particles it is about 245, in place of 16 again.
# A vectorized w has shape (4, 1, 3), so that the logits have shape (4, 1, 20).
# There the plate of the data is the last dimension, and the particles are expected just left of it.
# The product has an extra dimension of size one, to which the particles' plate is broadcast.
# Each particle's likelihood thus counts once for every particle, so that the prior counts for a fraction.
# With the data in `.to_event(1)` and no plate the loss does not depend on the number.
# One would have guessed: an error of shapes, as Pyro raises for others, or the loss of the loop.
# Why it matters: fits look fine, and are by far too sure. Vectorized particles are the usual way to train flows fast.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 pyro-ppl==1.9.1 numpy==2.4.6
cat > "$dir/check.py" <<'PY'
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

generator = torch.Generator().manual_seed(0)
X = torch.randn(20, 3, generator=generator)
y = (X @ torch.tensor([1.0, -1.0, 0.5]) > 0).float()


def plated():
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    logits = w @ X.T
    with pyro.plate("data", 20):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def joined():
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Bernoulli(logits=w @ X.T).to_event(1), obs=y)


def loss(model, particles, vectorize):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoNormal(model, init_scale=0.5)
    guide()  # makes its parameters before the particles are vectorized
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=vectorize)
    return sum(elbo.loss(model, guide) for _ in range(100)) / 100


loop, four, sixteen = loss(plated, 4, False), loss(plated, 4, True), loss(plated, 16, True)
control = loss(joined, 16, True)
print(f"with a plate: a loop over four particles {loop:.1f}, vectorized {four:.1f}, with sixteen {sixteen:.1f}")
print(f"without a plate: sixteen vectorized particles {control:.1f}")
assert abs(control - loop) < 2.0
assert 3 < four / loop < 5 and 12 < sixteen / loop < 18
PY
"$dir/venv/bin/python" "$dir/check.py"
