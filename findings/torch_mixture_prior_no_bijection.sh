#!/usr/bin/env bash
# A mixture as a prior stops every automatic guide of Pyro, and NUTS, on torch's own type of support.
#
# Versions: torch 2.13.0 with pyro-ppl 1.9.1.
# Seen: x ~ MixtureSameFamily of two normals, whose support is the real line.
# torch wraps the support of the components in a type of its own, MixtureSameFamilyConstraint.
# Neither biject_to nor transform_to knows that type, and both raise NotImplementedError.
# So do AutoNormal, AutoDelta, AutoIAFNormal and NUTS, which ask for the bijection of each latent.
# The support of the components themselves has a bijection in the same registries.
# Sampling, log_prob and support.check all work, so that the prior looks fine until the guide is set up.
# One would have guessed: a mixture over the real line has the bijection of the real line.
# Why it matters: mixtures as priors are what guides by flows are for.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile torch==2.13.0 pyro-ppl==1.9.1 numpy==2.4.6
cat > "$dir/check.py" <<'PY'
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoNormal
from torch.distributions import biject_to, transform_to


def mixture():
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([-2.0, 2.0]), 1.0))


def model():
    pyro.sample("x", mixture())


def sample_by_nuts():
    MCMC(NUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True).run()


prior = mixture()
print(f"support {prior.support}; components {prior.component_distribution.support}")
print(f"bijection of the components' support: {biject_to(prior.component_distribution.support)}")
assert prior.support.check(prior.sample()) and torch.isfinite(prior.log_prob(prior.sample()))
attempts = {
    "biject_to": lambda: biject_to(prior.support),
    "transform_to": lambda: transform_to(prior.support),
    "AutoNormal": lambda: AutoNormal(model)(),
    "AutoDelta": lambda: AutoDelta(model)(),
    "AutoIAFNormal": lambda: AutoIAFNormal(model)(),
    "NUTS": sample_by_nuts,
}
for name, attempt in attempts.items():
    try:
        attempt()
    except NotImplementedError as error:
        print(f"{name}: {str(error).splitlines()[0]}")
    else:
        raise SystemExit(f"{name} works now")
PY
"$dir/venv/bin/python" "$dir/check.py"
