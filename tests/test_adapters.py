# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

"""The adapters for other packages, as the page of the documentation has them."""

import re
from pathlib import Path

import pytest
import torch

import pyro_hollow

PAGE = Path(pyro_hollow.__file__).parent.parent / "tutorials" / "adapters.md"


def definitions(*packages):
    """Runs the blocks of the page up to the one of the last package; skips where one is missing."""
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is no dependency of this package")
    torch.set_default_dtype(torch.float32)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        if all(
            package in packages for package in re.findall(r"^(?:from|import) (zuko|lampe|sbi)", block, re.MULTILINE)
        ):
            exec(block, names)
    return names


@pytest.mark.filterwarnings("default")
def test_zuko():
    names = definitions("zuko")
    flow = names["hollow_flow"](2, 3)
    c = torch.randn(5, 3)
    x = flow(c).sample((4,))
    log_prob = flow(c).log_prob(x)
    assert x.shape == (4, 5, 2) and log_prob.shape == (4, 5)
    log_prob.sum().backward()
    assert all(parameter.grad is not None for parameter in flow.parameters())
    base, transform = torch.distributions.Normal(0.0, 1.0), flow.transform.flow.condition(c)
    z = transform.inv(x)
    expected = base.log_prob(z).sum(-1) - transform.log_abs_det_jacobian(z, x)
    torch.testing.assert_close(log_prob, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("default")
def test_lampe():
    names = definitions("zuko", "lampe")
    theta, x = torch.randn(64, 2), torch.randn(64, 3)
    loss = names["loss"](theta, x)
    loss.backward()
    assert loss.isfinite()


@pytest.mark.filterwarnings("default")
def test_sbi(tmp_path, monkeypatch):
    names = definitions("sbi")
    monkeypatch.chdir(tmp_path)  # sbi writes its logs to the working directory
    from sbi.inference import NPE

    theta = torch.randn(200, 2)
    x = theta + 0.1 * torch.randn(200, 2)
    prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    inference = NPE(prior, density_estimator=names["build"], show_progress_bars=False)
    estimator = inference.append_simulations(theta, x).train(max_num_epochs=2)
    posterior = inference.build_posterior(estimator)
    assert posterior.sample((10,), x=x[:1], show_progress_bars=False).shape == (10, 2)
