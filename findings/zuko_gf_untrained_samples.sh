#!/usr/bin/env bash
# A fresh Gaussianization flow of zuko puts a good part of its samples exactly on the edge of a box.
#
# Versions: zuko 1.6.0 with torch 2.13.0.
# Seen: zuko.flows.GF(2), as it comes, asked for samples with their log-densities, no data involved.
# More than 0.3 of the samples have a coordinate that is -10 or 10.
# For these, the log-density that comes with a sample differs from log_prob of the same sample by up to tens of nats.
# In one dimension, log_prob integrates to 0.61 rather than to one.
# Stages saturate, so that the whole flow reaches only a bounded interval of the base.
# Base draws outside it have no preimage, and the bisection for the inverse stops at its bracket.
# The documentation speaks of features that should be standardized, and here are none.
# After training on standardized data the samples leave the edge, so that it goes unnoticed there.
# One would have guessed: a fresh flow is a normalized density, and samples agree with log_prob.
# Why it matters: as a guide a flow is trained from its own samples, and the first steps see nothing else.
# Their log-densities are wrong by nats, with no error and no warning.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 zuko==1.6.0 numpy==2.4.6
cat > "$dir/check.py" <<'PY'
import torch
import zuko


@torch.no_grad()
def look(name):
    torch.manual_seed(0)
    flow = getattr(zuko.flows, name)(2)()
    z, log_density = flow.rsample_and_log_prob((4000,))
    share = ((z.abs() - 10.0).abs() < 1e-3).any(-1).double().mean().item()
    return share, (log_density - flow.log_prob(z)).abs().max().item()


share, gap = look("GF")
control_share, control_gap = look("NSF")
torch.manual_seed(0)
x = torch.linspace(-200.0, 200.0, 40001)[:, None]
with torch.no_grad():
    mass = zuko.flows.GF(1)().log_prob(x).exp().sum().item() * 0.01
print(f"GF:  share of samples at the edge {share:.2f}, largest gap of the log-density {gap:.1f}")
print(f"NSF: share of samples at the edge {control_share:.2f}, largest gap of the log-density {control_gap:.1e}")
print(f"GF in one dimension: log_prob integrates to {mass:.2f}")
assert share > 0.3 and gap > 5.0 and 0.4 < mass < 0.8
assert control_share == 0.0 and control_gap < 1e-3
PY
"$dir/venv/bin/python" "$dir/check.py"
