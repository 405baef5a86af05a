#!/usr/bin/env bash
# Pyro's Sylvester flow reports a log-determinant that is not that of its map.
#
# Versions: pyro-ppl 1.9.1 with torch 2.13.0.
# Seen: `log_abs_det_jacobian` is compared with the determinant of the Jacobian by autograd, in float64.
# The orthogonal matrix is orthogonal to rounding, so that is not the reason.
# At the initial parameters the two agree to 1e-6, since the map is then almost the identity.
# With parameters moved by 0.3 they differ by up to 0.2 nats in eight dimensions.
# That is more than the log-determinant itself varies from sample to sample.
# The map multiplies a row by S Q' and then by Q R, where the formula for the determinant holds for Q S and then R Q'.
# The orthogonal matrices thus do not cancel, and the determinant is not a product of diagonals.
# The planar flow of the same package agrees to 1e-12 in the same comparison.
# One would have guessed: a published transform's log-determinant is exact to rounding, as all the others' are.
# Why it matters: it is offered as a guide's flow. The ELBO and all importance weights carry the error.
# No warning appears, and a test at the initial parameters passes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 pyro-ppl==1.9.1 numpy==2.4.6
cat > "$dir/check.py" <<'PY'
import pyro.distributions.transforms as T
import torch

torch.set_default_dtype(torch.float64)


def largest_error(transform, x):
    y = transform(x)
    claimed = transform.log_abs_det_jacobian(x, y).detach()
    jacobians = [torch.autograd.functional.jacobian(lambda v: transform(v), row) for row in x]
    true = torch.linalg.slogdet(torch.stack(jacobians))[1]
    return (claimed - true).abs().max().item(), true.std().item()


x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
torch.manual_seed(0)
sylvester = T.sylvester(8, 2)
start, _ = largest_error(sylvester, x)
with torch.no_grad():
    for p in sylvester.parameters():
        p.add_(0.3 * torch.randn_like(p))
q = sylvester.Q(x).detach()
orthogonal = (q.T @ q - torch.eye(8)).abs().max().item()
moved, spread = largest_error(sylvester, x)

torch.manual_seed(0)
planar = T.planar(8)
with torch.no_grad():
    for p in planar.parameters():
        p.add_(0.3 * torch.randn_like(p))
control, _ = largest_error(planar, x)

print(f"Sylvester at the start: the largest error of the log-determinant is {start:.1e}")
print(f"Sylvester, parameters moved: {moved:.3f}, where the log-determinant itself spreads by {spread:.3f}")
print(f"its orthogonal matrix is orthogonal to {orthogonal:.1e}; planar flow: {control:.1e}")
assert start < 1e-5 and orthogonal < 1e-12 and control < 1e-12
assert moved > 0.05
PY
"$dir/venv/bin/python" "$dir/check.py"
