"""A few networks of timm, one of each family, and what is said of those that fail."""

import pytest
import torch

from bench.baselines import models, zoo
from bench.cases import zoo as case
from bench.report import studies

SOME = ("mobilenetv3_small_050", "vit_tiny_patch16_224", "levit_128s", "gmlp_ti16_224", "efficientvim_m1")


@pytest.mark.parametrize("name", SOME)
def test_equal_to_exact_and_certified_or_named_as_unstable(name, torchvision):
    pytest.importorskip("timm")
    found = case.record(name)
    assert "failed" not in found, found
    assert found["classes"] == zoo.CLASSES
    assert found["equal"] == found["examples"] == zoo.EXAMPLES
    assert found["certified"] == found["examples"] or found["instability"] > studies.UNSTABLE


def test_every_name_is_known_and_of_one_family(torchvision):
    timm = pytest.importorskip("timm")
    names = [name for networks in zoo.FAMILIES.values() for name in networks]
    assert len(set(names)) == len(names) >= 40
    assert set(names) <= set(timm.list_models())


def test_a_gradient_that_depends_on_the_batch_is_measured():
    alone = torch.tensor([3e-30, 4e-30], dtype=torch.float64)
    assert case.instability(alone, alone) == 0
    assert case.instability(alone, alone + torch.tensor([0.0, 1e-30])) == pytest.approx(0.2)
    assert case.instability(0 * alone, 0 * alone) == 0


def test_a_network_that_breaks_fastsal_is_reported_and_the_others_are_measured(monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise IndexError("out of range\nand more")

    monkeypatch.setattr(zoo, "create", lambda name: (Broken(), torch.ones(2, 3)))
    broken = case.record("broken")
    assert broken["failed"] == "IndexError: out of range"
    assert broken["where"].endswith(", forward")
    monkeypatch.setattr(zoo, "create", lambda name: models.tiny())
    found = case.record("tiny")
    assert (found["equal"], found["certified"], found["warnings"]) == (3, 3, [])
    names = zoo.FAMILIES["mixer"][:2]
    first, table, *rest = studies.zoo([broken | {"case": names[0]}, found | {"case": names[1]}])
    assert first.startswith("2 networks with seeded random weights, 12 classes and 3 random images")
    assert "The answers of 1 are equal to those of exact rows, 1 are certified." in first
    assert "| mixer  |        1 |" in table
    assert f"Failed: {names[0]}, IndexError: out of range (test_zoo.py, line " in rest[0]
    assert any(line.startswith(f"mixer: {names[1]} ") for line in rest)
