# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


def test_code_blocks_run():
    torch.set_default_dtype(torch.float32)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    losses = namespace["losses"]
    assert sum(losses[-20:]) < sum(losses[:20])
