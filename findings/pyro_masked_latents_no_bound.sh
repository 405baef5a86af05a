#!/usr/bin/env bash
# A latent that is masked in the model makes the ELBO of Pyro's automatic guides grow without bound.
#
# Versions: pyro-ppl 1.9.1 with torch 2.13.0.
# Seen: four latents with an observation each, under poutine.mask, the last masked as padding is.
# AutoNormal and AutoDiagonalNormal trace the model, mask included, and work without a word.
# The mask drops the last latent's prior, but the guide's entropy of it stays in the ELBO.
# Its scale grows for as long as training goes on: it passes 10 within 500 steps, where the others stay near 0.7.
# The loss falls below the negative log evidence of what is observed, which no ELBO should do.
# A mask in the guide as well, written by hand, gives the right bound.
# One would have guessed: a masked latent takes no part, so that its parameters do not move.
# Why it matters: masks are the way to pad ragged data in plates.
# Losses of two guides cannot be compared, and the one whose padding widens faster wins.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 pyro-ppl==1.9.1 numpy==2.4.6
cat > "$dir/check.py" <<'PY'
import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal

mask = torch.tensor([True, True, True, False])
y = torch.tensor([1.0, 2.0, 3.0, 0.0])


def model():
    with pyro.plate("data", 4), poutine.mask(mask=mask):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def fit(guide):
    """The ELBO after 500 steps, averaged over 200 draws."""
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(500):
        svi.step()
    return -sum(svi.evaluate_loss() for _ in range(200)) / 200


def masked_by_hand():
    loc = pyro.param("loc", torch.zeros(4))
    scale = pyro.param("scale", torch.ones(4), constraint=dist.constraints.positive)
    with pyro.plate("data", 4), poutine.mask(mask=mask):
        pyro.sample("z", dist.Normal(loc, scale))


# Each observation by itself is normal with variance 2.
evidence = dist.Normal(0.0, math.sqrt(2.0)).log_prob(y)[mask].sum().item()
for guide_type in (AutoNormal, AutoDiagonalNormal):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = guide_type(model)
    elbo = fit(guide)
    scales = guide.scales.z if guide_type is AutoNormal else guide.scale
    print(f"{guide_type.__name__}: scales {[round(s, 2) for s in scales.tolist()]}")
    print(f"  ELBO {elbo:.2f}, above the log evidence {evidence:.2f}")
    assert scales[:3].max() < 2.0 and scales[3] > 10.0 and elbo > evidence + 1.0
pyro.clear_param_store()
pyro.set_rng_seed(0)
elbo = fit(masked_by_hand)
print(f"a guide that is masked by hand: ELBO {elbo:.2f}")
assert elbo < evidence + 0.1
PY
"$dir/venv/bin/python" "$dir/check.py"
