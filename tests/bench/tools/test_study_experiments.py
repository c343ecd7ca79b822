"""The experiments of the study: what each network is, and the tables at a tiny size."""

import csv
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.tools import study_experiments as experiments
from fastsal.study.data import Data, InMemory
from fastsal.study.train import Recipe


@pytest.fixture
def data():
    """Too few images of noise to learn anything from, of a size that three poolings leave something of."""
    x, y = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    return Data("few", InMemory(x, y), InMemory(x[:9], y[:9]), 3, (1, 8, 8))


def test_what_every_change_changes(data):
    x = data.test.x.double()
    for name, change in experiments.CHANGES.items():
        torch.manual_seed(0)
        model = change.make(data).double().eval()
        kinds = {type(module) for module in model.modules()}
        assert (nn.ReLU in kinds, nn.Softplus in kinds) == (name != "smooth", name == "smooth")
        # Without biases ReLU networks are homogeneous, and no others are.
        assert torch.allclose(model(3 * x), 3 * model(x), rtol=1e-12, atol=0) == (name == "biases")
        assert (change.epochs > 6, change.box) == (name == "epochs", name == "box")
        if name == "centred":
            assert torch.equal(model(x), model.network(x - data.train.x.double().mean(0).float()))


@pytest.mark.parametrize("name", ["centred", "box"])
def test_tables(data, tmp_path, monkeypatch, name):
    pytest.importorskip("foolbox")
    change = replace(experiments.CHANGES[name], epochs=1, recipes=(Recipe(), Recipe(radius=0.5), Recipe(penalty=0.1)))
    study = experiments.experiment(name, change, data, 6, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}-penalty-0.1.pt",
        f"{name}-plain.pt",
        f"{name}-radius-0.5.pt",
    ]
    table = tmp_path / "table.csv"
    experiments.write_rows(table, "no biases", [{"model": "of another change"}])
    for _ in range(2):
        experiments.write_rows(table, change.text, [experiments.row(result) for result in study.results])
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["plain", "ε = 0.5", "λ = 0.1", "of another change"]
    assert float(rows[1]["alignment"]) == pytest.approx(study.results[1].median("alignment"), abs=1e-4)
    claims = experiments.judged(study)
    assert len(claims) == 12
    assert {claim["confirmed"] for claim in claims} <= {"yes", "no"}
