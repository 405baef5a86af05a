# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

from collections.abc import Iterator
from pathlib import Path

import pyro
import pytest
import torch

torch.set_num_threads(1)  # several times faster for problems this small


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data-dir", type=Path, help="folder with real data; tests that need it are skipped without")


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--data-dir")
    if folder is None:
        pytest.skip("needs real data: give its folder with --data-dir")
    return folder


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Every test starts from the same seed, in float64, with an empty param store."""
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)
