# Copyright Contributors to the pyro_hollow project.
# SPDX-License-Identifier: Apache-2.0

import torch

from pyro_hollow.ops import memory


def test_counts_what_operations_return_but_no_views():
    x = torch.ones(3, 4)  # float64, 96 bytes
    assert memory.allocated_bytes(lambda: (x.exp() + x).mT[:2]) == 2 * 96
    assert memory.allocated_bytes(lambda: x.T) == 0


def test_counts_parts_of_a_result():
    assert memory.allocated_bytes(lambda: torch.ones(6).sort()) == 3 * 48  # values and indices


def test_part_size(monkeypatch):
    monkeypatch.setattr(memory, "MAX_BYTES", 1000)
    assert [memory.part_size(size) for size in (0, 3.0, 300, 2000)] == [1000, 333, 3, 1]
