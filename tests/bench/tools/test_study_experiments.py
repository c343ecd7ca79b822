"""The experiments of the study: what each network is, and the tables and the figure at a tiny size."""

import csv

import pytest
import torch
from torch import nn

from bench.tools import study_experiments as experiments
from fastsal.study.attacks import BOX, EVERYWHERE
from fastsal.study.data import Data, InMemory
from fastsal.study.train import Recipe


@pytest.fixture
def data():
    """Too few images of noise to learn anything from."""
    x, y = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
    return Data("digits", InMemory(x, y), InMemory(x[:9], y[:9]), 3, (1, 8, 8))


def test_what_every_change_changes(data):
    x = data.test.x.double()
    for name, change in experiments.CHANGES.items():
        torch.manual_seed(0)
        model = change.make(data).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        kinds = {type(module) for module in model.modules()}
        assert (nn.ReLU in kinds, nn.Softplus in kinds) == (name != "smooth", name == "smooth")
        # Without biases ReLU networks are homogeneous, and no others are.
        assert torch.allclose(model(3 * x), 3 * model(x), rtol=1e-12, atol=0) == (name == "biases")
        assert change.bounds == (EVERYWHERE if name == "box" else BOX)
        assert (change.own, change.centred) == (name not in ("study", "box", "origin"), name in ("origin", "centred"))
        if name == "centred":
            assert torch.equal(model(x), model.network(x - data.train.x.double().mean(0).float()))


def test_tables_and_figure(data, tmp_path, monkeypatch):
    """The study's own networks are not trained again; those of a change are, beside them."""
    pytest.importorskip("foolbox")
    monkeypatch.setattr(experiments, "ROBUSTIFIED", (Recipe(), Recipe(penalty=0.1)))
    monkeypatch.setattr(experiments, "RADII", {"digits": (0.5,)})
    for name in ("study", "box", "adversarial"):
        before = {path.name for path in tmp_path.iterdir()}
        study = experiments.experiment(name, experiments.CHANGES[name], data, 6, 1, tmp_path)
        written = {path.name for path in tmp_path.iterdir() if path.suffix == ".pt"} - before
        assert len(written) == {"study": 2, "adversarial": 2}.get(name, 0)
        table = tmp_path / "table.csv"
        # What stood there of other data goes; what stood there of the same change is replaced.
        for source in ("digits" if table.exists() else "mnist5k", "digits"):
            experiments.write_rows(table, source, experiments.CHANGES[name].text, experiments.judged(study))
    rows = experiments.read(table)
    assert [row["change"] for row in rows] == [
        experiments.CHANGES[name].text for name in ("study", "box", "adversarial") for _ in range(6)
    ]
    assert {row["data"] for row in rows} == {"digits"}
    assert {row["confirmed"] for row in rows} <= {"yes", "no"}
    assert rows[0]["text"] == "ρ̃ approximates ρ"
    experiments.draw(rows, tmp_path / "changes.png")
    assert (tmp_path / "changes.png").read_bytes().startswith(b"\x89PNG")
    line = experiments.row(study.results[1])
    assert line["network"] == "ε = 0.5"
    assert line["cosine at 1.0 x"] == pytest.approx(line["cosine"], rel=1e-5)
    experiments.write_table(tmp_path / "networks.csv", [line])
    with (tmp_path / "networks.csv").open(encoding="utf-8", newline="") as file:
        assert float(next(csv.DictReader(file))["alignment"]) == pytest.approx(line["alignment"], rel=1e-5)
