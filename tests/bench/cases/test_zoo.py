"""A few networks of timm, one of each family, and what is said of those that fail."""

import pytest
import torch

from bench.baselines import models, zoo
from bench.cases import zoo as case
from bench.report import tables

SOME = ("mobilenetv3_small_050", "vit_tiny_patch16_224", "levit_128s", "gmlp_ti16_224", "efficientvim_m1")


@pytest.mark.parametrize("name", SOME)
def test_equal_to_exact_and_certified_or_named_as_unstable(name, torchvision):
    pytest.importorskip("timm")
    (size,) = (networks[name] for networks in zoo.FAMILIES.values() if name in networks)
    found = case.record(name, size)
    assert "failed" not in found, found
    assert found["classes"] == zoo.CLASSES
    assert found["equal"] == found["examples"] == zoo.EXAMPLES
    unstable = any(tables.UNSTABLE in warning for warning in found["warnings"])
    assert found["certified"] == found["examples"] or unstable


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


def test_a_network_that_breaks_fastsal_is_reported_and_the_others_go_on(monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise IndexError("out of range\nand more")

    monkeypatch.setattr(zoo, "create", lambda name, size: (Broken(), torch.ones(2, 3)))
    broken = case.record("broken", 3)
    assert broken["failed"] == "IndexError: out of range"
    assert broken["where"].endswith(", forward")
    monkeypatch.setattr(zoo, "create", lambda name, size: models.tiny())
    found = case.record("tiny", 20)
    assert (found["equal"], found["certified"], found["warnings"]) == (3, 3, [])
    table = tables.zoo({"broken": broken, "tiny": found})
    assert "IndexError: out of range (test_zoo.py, line " in table
    assert "equal, certified" in table
    summary = "\n".join(tables.zoo_summary({"broken": broken, "tiny": found}, "here"))
    assert summary.startswith("2 networks with seeded random weights, 12 classes and 3 random images")
    assert "The answers of 1 are equal to those of exact rows, 1 are certified" in summary
    assert summary.endswith("Failed: broken.")
