"""Peak memory, and fresh processes."""

import os
import signal

import pytest
import torch

from bench.harness import memory


def test_memory_is_what_the_work_takes():
    assert memory.growth(lambda: torch.ones(2**25).sum()) / 2**20 == pytest.approx(128, rel=0.1)


def test_a_fresh_process_is_another_one_with_as_many_threads(one_thread):
    assert memory.in_fresh_process(os.getpid) != os.getpid()
    assert memory.in_fresh_process(torch.get_num_threads) == 1


def test_a_process_that_is_killed_has_no_figure():
    assert memory.in_fresh_process(signal.raise_signal, signal.SIGKILL) is None
