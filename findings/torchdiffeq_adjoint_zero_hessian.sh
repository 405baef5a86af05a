#!/usr/bin/env bash
# Through torchdiffeq's odeint_adjoint, torch.autograd.functional.hessian is zero, without a word.
#
# Versions: torchdiffeq 0.2.5 with torch 2.13.0.
# Seen: for dx/dt = 0.7 sin(x) from (0.3, 1.1), the Hessian of |x(1)|^2 has the diagonal 6.166, -0.490.
# Through odeint, hessian and hvp of torch.autograd.functional find it.
# Through odeint_adjoint both return zeros, while values and gradients are right.
# The backward pass of the adjoint leaves a gradient without a graph, which they take for a constant.
# One would have guessed: an error, as torch.autograd.grad of the gradient raises, and hessian with strict=True.
# Why it matters: a Laplace approximation or a Newton step on the parameters of a neural ODE gets a singular or wrong
# Hessian, in which the prior's part alone is left, and looks as if the data told nothing.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 torchdiffeq==0.2.5 numpy==2.4.6
cat > "$dir/check.py" <<'PY'
import torch
from torch.autograd.functional import hessian, hvp
from torchdiffeq import odeint, odeint_adjoint

torch.set_default_dtype(torch.float64)


class Field(torch.nn.Module):
    def forward(self, t, x):
        return 0.7 * torch.sin(x)


def loss(solver):
    field, times = Field(), torch.tensor([0.0, 1.0])
    return lambda x: solver(field, x, times, rtol=1e-9, atol=1e-9)[-1].square().sum()


x, step = torch.tensor([0.3, 1.1]), 1e-4
found = {}
for solver in (odeint, odeint_adjoint):
    f, z = loss(solver), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(z), z)
    matrix, product = hessian(f, x), hvp(f, x, torch.ones(2))[1]
    found[solver.__name__] = gradient, matrix
    print(f"{solver.__name__}: gradient {gradient.tolist()}, diagonal {matrix.diagonal().tolist()}")
    assert torch.allclose(matrix.sum(1), product)
    differences = [
        (f(x + step * e) - 2 * f(x) + f(x - step * e)).item() / step**2 for e in torch.eye(2).unbind()
    ]
    print(f"  by differences of its values: {differences}")
    right = torch.allclose(matrix.diagonal(), torch.tensor(differences), atol=1e-2)
    assert right == (solver is odeint) and abs(differences[0]) > 1
assert torch.allclose(found["odeint"][0], found["odeint_adjoint"][0], atol=1e-6)
assert not found["odeint_adjoint"][1].any()
try:
    hessian(loss(odeint_adjoint), x, strict=True)
except RuntimeError as error:
    print("strict=True:", str(error)[:60])
else:
    raise AssertionError("strict=True raises no error")
PY
"$dir/venv/bin/python" "$dir/check.py"
