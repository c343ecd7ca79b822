"""Peak memory."""

import pytest
import torch

from bench.harness import memory


def test_memory_is_what_the_work_takes():
    assert memory.growth(lambda: torch.ones(2**25).sum()) / 2**20 == pytest.approx(128, rel=0.1)
