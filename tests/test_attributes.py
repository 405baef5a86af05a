# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""Objects of all public classes can be looked at: reading an attribute raises AttributeError or nothing."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hollow
from pyro_hollow import infer, nn, ode, sde, transforms

CONTEXT = torch.zeros(3, dtype=torch.float64)
X = torch.zeros(4, 2, dtype=torch.float64)


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))


def used(transform, x=X):
    transform(x)
    return transform


OBJECTS = {
    "hollow network": lambda: nn.HollowNN(2),
    "bound network": lambda: nn.HollowNN(2).bind(),
    "conditional network": lambda: nn.ConditionalHollowNN(2, 3),
    "conditioner": lambda: nn.HollowNN(2, conditioner="masked").conditioner,
    "transformer": lambda: nn.HollowNN(2).transformer,
    "solver": lambda: ode.Solver("bdf"),
    "solution": lambda: ode.Solver().integrate(nn.HollowNN(2).bind(), X, 0.0, 1.0),
    "SDE": lambda: sde.DiagonalSDE(nn.HollowNN(2), nn.HollowNN(2)),
    "bound SDE": lambda: sde.DiagonalSDE(nn.HollowNN(2), nn.HollowNN(2)).bind(),
    "flow": lambda: transforms.hollow_cnf(2),
    "used flow": lambda: used(transforms.hollow_cnf(2)),
    "inverse": lambda: transforms.hollow_cnf(2).inv,
    "regularized flow": lambda: transforms.hollow_cnf(2, regularize=True),
    "used regularized flow": lambda: used(transforms.hollow_cnf(2, regularize=True)),
    "conditional flow": lambda: transforms.conditional_hollow_cnf(2, 3),
    "conditioned flow": lambda: used(transforms.conditional_hollow_cnf(2, 3).condition(CONTEXT)),
    "free-form flow": lambda: used(transforms.free_form_cnf(2)),
    "conditional free-form flow": lambda: transforms.conditional_free_form_cnf(2, 3, rank=1),
    "conditioned free-form flow": lambda: transforms.conditional_free_form_cnf(2, 3).condition(CONTEXT),
    "low-rank map": lambda: transforms.conditional_low_rank_linear(2, 3),
    "conditioned low-rank map": lambda: used(transforms.conditional_low_rank_linear(2, 3).condition(CONTEXT)),
    "Sylvester flow": lambda: transforms.conditional_sylvester(2, 3),
    "conditioned Sylvester flow": lambda: used(transforms.conditional_sylvester(2, 3).condition(CONTEXT)),
    "standardized flow": lambda: used(transforms.standardized(transforms.hollow_cnf(2), torch.randn(9, 2))),
    "conditional standardized flow": lambda: transforms.ConditionalStandardizedFlow(
        transforms.conditional_hollow_cnf(2, 3), torch.zeros(2), torch.ones(2)
    ),
    "conditioned standardized flow": lambda: transforms.ConditionalStandardizedFlow(
        transforms.conditional_hollow_cnf(2, 3), torch.zeros(2), torch.ones(2)
    ).condition(CONTEXT),
    "guide": lambda: infer.AutoHollowCNF(model),
    "used guide": lambda: infer.AutoHollowCNF(model, penalty=0.1).setup(),
    "diagnostics": lambda: infer.diagnose(model, infer.AutoHollowCNF(model), num_samples=50),
}


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_all_attributes_can_be_read(make):
    names = dict(inspect.getmembers(make()))
    assert "__class__" in names


def test_every_public_class_of_transforms_and_guides_is_among_them():
    made = {type(make()) for make in OBJECTS.values()}
    public = {getattr(module, name) for module in (pyro_hollow, transforms, infer) for name in module.__all__}
    abstract = {transforms.ConditionalCNF, transforms.ConditionedCNF}
    missing = {cls for cls in public if isinstance(cls, type) and issubclass(cls, torch.distributions.Transform)}
    assert missing - made - abstract == set()
