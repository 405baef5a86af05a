# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The flows that are tested, by name, and the checks that each of them must pass: those of Pyro's own transforms."""

from functools import partial

import pyro.distributions as dist
import torch
from torch.testing import assert_close

from pyro_hollow import (
    ConditionalHollowNN,
    Solver,
    conditional_free_form_cnf,
    conditional_hollow_cnf,
    free_form_cnf,
    hollow_cnf,
)
from pyro_hollow.nn.conditioner import CONDITIONERS

CONTEXT_DIM = 3
TIGHT = Solver("dopri5", rtol=1e-8, atol=1e-8)
QUICK = Solver("rk4", options={"step_size": 0.25})


def free_form(flow):
    return not isinstance(flow.nn, ConditionalHollowNN)


def strengthen(flow):
    """Fresh flows are close to the identity, where most mistakes would not show."""
    network = flow.nn
    weights = [layer.weight for layer in network.layers] if free_form(flow) else [network.transformer.output_weight]
    with torch.no_grad():
        for weight in weights:
            weight.normal_(std=0.4 if free_form(flow) else 0.3)
    return flow


def _strong(make, *args, solver=QUICK, **kwargs):
    return strengthen(make(*args, solver=solver, hidden_dims=[16, 16], **kwargs))


def _conditioned(make, input_dim, **kwargs):
    return make(input_dim, **kwargs).condition(torch.randn(1, CONTEXT_DIM))


#: Constructors of flows that do something, called with the dimension and a solver.
MODULES = {name: partial(_strong, hollow_cnf, conditioner=name) for name in CONDITIONERS}
MODULES["free-form"] = partial(_strong, free_form_cnf, nonlinearity=torch.nn.Tanh())

#: The same for flows that wait for a context.
CONDITIONAL = {
    name: partial(_strong, conditional_hollow_cnf, context_dim=CONTEXT_DIM, conditioner=name) for name in CONDITIONERS
}
CONDITIONAL["free-form"] = partial(
    _strong, conditional_free_form_cnf, context_dim=CONTEXT_DIM, nonlinearity=torch.nn.Tanh()
)

#: Both, the latter conditioned on a context of batch shape (1,), as Pyro tests its own.
FLOWS = {**MODULES, **{f"conditional {name}": partial(_conditioned, make) for name, make in CONDITIONAL.items()}}


def base(*shape):
    return dist.Normal(torch.zeros(shape), torch.ones(shape)).to_event(1)


def draw(flow, *batch_shape):
    return torch.randn(*batch_shape, flow.nn.input_dim)


def brute_force_ladj(flow, x):
    """From the Jacobian of the whole flow by automatic differentiation; x has shape (n, d)."""
    # Samples do not interact, so the sum over them loses nothing.
    jacobian = torch.autograd.functional.jacobian(lambda x: flow._call(x).sum(0), x)
    return torch.linalg.slogdet(jacobian.transpose(0, 1)).logabsdet


def gradients(flow, x, *others):
    """Of a function of value and log-determinant, with respect to x, other tensors and the parameters."""
    x = x.detach().requires_grad_()
    y, ladj = flow.call_and_ladj(x)
    loss = (y * torch.arange(1.0, y.numel() + 1).view_as(y).cos()).sum() + ladj.pow(2).sum()
    return torch.autograd.grad(loss, [x, *others, *flow.nn.parameters()])


def check_metadata(flow):
    assert flow.domain.event_dim == flow.codomain.event_dim == flow.event_dim == 1
    assert flow.domain is flow.codomain is dist.constraints.real_vector
    assert flow.bijective and flow.inv.bijective
    assert flow.sign == flow.inv.sign == 1
    # Pyro takes a transform with one of these for a triangular one.
    assert not hasattr(flow, "autoregressive") and not hasattr(flow, "arn")


def check_inverse(flow, batch_shape):
    """The round trip past the cache, and the log-determinant at both ends."""
    x = draw(flow, *batch_shape)
    y = flow._call(x)
    assert (y - x).abs().max() > 0.1  # or the check would be of the identity
    back = flow._inverse(y)
    assert_close(back, x, rtol=0, atol=1e-6)
    ladj = flow.log_abs_det_jacobian(x, y)
    assert ladj.shape == batch_shape
    assert_close(flow.log_abs_det_jacobian(back, y), ladj, rtol=0, atol=1e-6)
    flow.clear_cache()
    back = flow.inv(y)  # remembers the log-determinant of the backward solve
    assert_close(-flow.inv.log_abs_det_jacobian(y, back), ladj, rtol=0, atol=1e-6)


def check_jacobian(flow):
    x = draw(flow, 4)
    ladj = flow.log_abs_det_jacobian(x, flow(x))
    assert ladj.abs().max() > 0.01
    assert_close(ladj, brute_force_ladj(flow, x), rtol=0, atol=1e-6)


def check_shapes(flow, batch_shape):
    shape = (*batch_shape, flow.nn.input_dim)
    assert flow.forward_shape(shape) == flow.inverse_shape(shape) == shape
    flow_dist = dist.TransformedDistribution(base(*shape), [flow])
    assert flow_dist.batch_shape == batch_shape and flow_dist.event_shape == shape[-1:]
    for sample_shape in [(), (2,)]:
        x = flow_dist.rsample(sample_shape)
        assert x.shape == (*sample_shape, *shape)
        assert flow_dist.log_prob(x).shape == (*sample_shape, *batch_shape)
        assert flow.log_abs_det_jacobian(x, flow(x)).shape == (*sample_shape, *batch_shape)


def check_training(flow):
    """Three steps on the same data, without clearing any cache."""
    x = draw(flow, 8)
    flow_dist = dist.TransformedDistribution(base(flow.nn.input_dim), [flow])
    optimizer = torch.optim.Adam(flow.nn.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -flow_dist.log_prob(x).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[1] > losses[2] > -flow_dist.log_prob(x).mean()


def check_call_and_ladj(flow):
    x = draw(flow, 4)
    y, ladj = flow.call_and_ladj(x)
    assert_close(flow._call(x), y, rtol=0, atol=0)
    flow.clear_cache()
    assert_close(flow(x), y, rtol=0, atol=0)
    flow.clear_cache()
    assert_close(flow.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=0)
