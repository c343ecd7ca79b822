"""The cases with figures of their own, at a tiny size."""

import pytest
import torch

from bench import cases
from bench.baselines import imagenet, models
from bench.cases import data_sets, margin_training
from bench.harness import memory


def test_certified_is_right_on_random_jacobians():
    found = {case.name: case.figures for case in cases.every(["certified"], quick=True)}
    assert list(found)[:2] == ["p = 2, growth", "p = 2, calibration"]
    for name, figures in found.items():
        if "growth" in name:
            assert all(row["certified and right"] == row["examples"] for row in figures()["rows"])
    rows = found["p = ∞, calibration"]()["rows"]
    assert all(row["misses"] <= 0.4 * row["trials"] and row["interval"][0] <= 0.2 for row in rows)


def test_margin_losses_are_trained_with(monkeypatch):
    monkeypatch.setattr(margin_training, "ATTACKED", 4)
    variant = list(margin_training.VARIANTS)[1]
    found = margin_training.record(variant, seed=0, epochs=1)
    assert (found["loss"], found["seed"], found["epochs"]) == (variant, 0, 1)
    assert 0.2 < found["accuracy"] < 1
    assert 0 < found["median ρ"]


def test_memory_of_a_data_set_is_read_after_every_batch(monkeypatch):
    pytest.importorskip("pyarrow")
    sizes = iter(range(10))
    monkeypatch.setattr(memory, "resident", lambda: next(sizes) * 2**20)
    found = data_sets.resident(250)
    assert (found["MiB after the first batch"], found["MiB after the last batch"]) == (0, 4)
    assert found["MiB more for 1,000 examples"] == pytest.approx(20)


def test_time_outside_analyze_is_a_share(monkeypatch):
    pytest.importorskip("pyarrow")
    model, x = models.tiny()
    monkeypatch.setattr(imagenet, "network", lambda: model)
    monkeypatch.setattr(imagenet, "images", lambda: x.repeat(5, 1)[:14])
    assert torch.equal(data_sets.photographs(15)[14], data_sets.photographs(15)[0])
    found = data_sets.overhead(8)
    assert 0 < found["share outside analyze"] < 1
