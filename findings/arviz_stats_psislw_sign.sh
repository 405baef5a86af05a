#!/usr/bin/env bash
# arviz-stats fits the tail of the negated input: log weights, passed as to ArviZ 0.x, get a plausible wrong k-hat.
#
# Versions: arviz-stats 1.3.3 (Python 3.12 or newer), against ArviZ 0.22.0.
# Seen: importance weights of a normal of scale 1.5 by draws of a standard normal, whose true k is 0.56.
# ArviZ's psislw(log_weights) gives a k-hat of 0.53.
# arviz-stats has a function of that name, in `arviz_stats.base.array_stats` and in its xarray accessor.
# With the same log weights it gives -1.78, the best verdict there is, and log weights that sum to one.
# What comes back are weights of the wrong order: the smallest have become the largest.
# With the negated log weights it gives 0.53, as before: it takes log likelihoods, as leave-one-out has them.
# Its documentation calls the argument `ary` and says only that log weights are computed.
# One would have guessed: the function of the same name in the successor takes the same argument, or raises an error.
# Why it matters: k-hat tells users of guides whether to trust one, and the wrong sign says yes to a bad one.
set -euo pipefail
python=
for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then python=$candidate; break; fi
done
if [ -z "$python" ]; then echo "needs Python 3.12 or newer; PYTHON may name one" >&2; exit 2; fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$python" -m venv "$dir/new"
"$dir/new/bin/pip" install --quiet --no-compile arviz-stats==1.3.3 arviz-base==1.3.1 xarray==2026.9.0 numpy==2.4.6 scipy==1.17.1
"$python" -m venv "$dir/old"
"$dir/old/bin/pip" install --quiet --no-compile arviz==0.22.0 xarray==2026.9.0 numpy==2.4.6 scipy==1.17.1
cat > "$dir/check.py" <<'PY'
import sys

import numpy as np

x = np.random.default_rng(0).standard_normal(4000)
log_weights = 0.5 * x**2 * (1.0 - 1.0 / 1.5**2)
if sys.argv[1] == "old":
    import arviz

    smoothed, k = arviz.psislw(log_weights)
    print(f"arviz: psislw(log_weights) has a k-hat of {float(k):.2f}")
    assert 0.4 < k < 0.7 and np.argmax(smoothed) == np.argmax(log_weights)
else:
    from arviz_stats.base import array_stats

    smoothed, k = array_stats.psislw(log_weights)
    _, k_negated = array_stats.psislw(-log_weights)
    print(f"arviz-stats: psislw(log_weights) has a k-hat of {float(k):.2f}, psislw(-log_weights) of {float(k_negated):.2f}")
    print(f"the weights of the former sum to {np.exp(smoothed).sum():.3f}")
    assert k < -1.0 and 0.4 < k_negated < 0.7
    assert np.argmin(smoothed) == np.argmax(log_weights) and abs(np.exp(smoothed).sum() - 1.0) < 1e-6
PY
"$dir/old/bin/python" "$dir/check.py" old
"$dir/new/bin/python" "$dir/check.py" new
