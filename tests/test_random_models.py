"""A search over random compositions of models: whatever is certified is right, and no lower bound is above the truth."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import CHOICES, examine

from fastsal.model import traced

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"classes": (70, 90, 130), "entries": (5, 20, 60), "batch": (1, 2, 3), "seed": range(1 << 30)}


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    properties=st.fixed_dictionaries({name: st.sampled_from(choices) for name, choices in (CHOICES | SMALL).items()})
)
def test_nothing_false_is_said(monkeypatch, properties):
    with monkeypatch.context() as patched, torch.random.fork_rng(devices=[]):
        if properties["traced"]:
            patched.setattr(traced, "PAYS", 0)
        examine(**properties)
