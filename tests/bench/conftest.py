"""Work so small that it takes no time."""

import pytest
import torch

from bench.cases import tensor
from bench.harness.case import Case


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """torch.compile takes longer than everything else here together."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def measured(one_thread):
    """measured(work): its record, as the file of figures holds it."""

    def measure(work, level="tensor", name="tiny"):
        case = Case(level, name, lambda tiny: work, budget=0.0)
        return case.record() | {"commit": "abc", "date": "2026-01-01"}

    return measure


@pytest.fixture
def work_on_a_jacobian():
    """A maker of work for every implementation of the tensor level."""
    return lambda: tensor.work((3, 30, 50), torch.float32, tiny=True)
