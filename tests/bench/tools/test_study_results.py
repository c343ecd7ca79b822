"""docs/study.md says what the committed tables say, and these what the committed numbers of every image say."""

import re

import numpy as np
import pytest
import torch

from bench.tools import study_results
from bench.tools.study_experiments import read
from bench.tools.study_results import FOLDER
from fastsal.study import claims, page, results
from fastsal.study.claims import verdicts
from fastsal.study.results import Result, Study
from fastsal.study.train import Recipe

pytest.importorskip("scipy")


def rows(name):
    return read(FOLDER / name)


@pytest.fixture(scope="module")
def studies():
    """The committed study from its two tables."""
    columns = {}
    for row in rows("images.csv"):
        for name, cell in row.items():
            columns.setdefault((row["seed"], row["model"]), {}).setdefault(name, []).append(cell)
    found = {}
    for row in rows("models.csv"):
        kind = {"double backpropagation": "penalty", "adversarial": "radius"}.get(row["training"])
        recipe = Recipe(**{kind: float(row["strength"])} if kind else {})
        numbers = {
            name: np.array([float(cell or "nan") for cell in cells])
            for name, cells in columns[row["seed"], row["model"]].items()
            if name != "model"
        }
        result = Result(recipe, float(row["accuracy"]), numbers, torch.empty(0), int(row["seed"]))
        found.setdefault(result.seed, []).append(result)
    return [Study("", 0, 0, torch.empty(0), result, seed) for seed, result in found.items()]


def test_the_guide_is_what_the_tables_say():
    text = study_results.GUIDE.read_text(encoding="utf-8")
    assert study_results.filled(text) == text
    assert text.count("<!-- end -->") == len(study_results.BLOCKS)


def test_the_guide_has_no_other_numbers():
    """Every number of it with a fraction is in its blocks, but for those of the training that it describes."""
    text = re.sub(r"<!-- \w+ -->\n.*?<!-- end -->", "", study_results.GUIDE.read_text(encoding="utf-8"), flags=re.S)
    assert re.findall(r"\d+\.\d+", text.replace("1905.04172", "")) == ["0.9", "0.05", "0.4", "0.8"]


def test_verdicts_from_the_numbers_of_every_image(studies, monkeypatch):
    monkeypatch.setattr(claims, "ROUNDING", 1e-5)  # |ρ̃ − α†| = |β†|/‖g†‖ almost everywhere, and the file has six digits
    report = (FOLDER / "report.md").read_text(encoding="utf-8")
    for row in page.verdict_table(verdicts(studies)):
        assert f"| {' | '.join(row.values())} |" in report


def test_medians_from_the_numbers_of_every_image(studies):
    table = iter(rows("models.csv"))
    for result in (result for study in studies for result in study.results):
        row = next(table)
        for name in results.TABLE.keys() - set(results.LEFT_OUT):
            assert float(row[f"median {name}"]) == pytest.approx(result.median(name), rel=1e-5)
    assert next(table, None) is None


def test_experiments_and_photographs():
    """The changes' verdicts are of four networks each; the photographs' terms add up to the bound."""
    claims, networks = rows("experiments_claims.csv"), rows("experiments.csv")
    changes = list(dict.fromkeys(row["change"] for row in claims))
    assert len(claims) == 6 * len(changes)
    assert [row["change"] for row in networks] == [change for change in changes for _ in range(4)]
    for row in rows("photographs.csv"):
        terms = sum(float(row[name]) for name in ("alignment", "gap_term", "offset_term"))
        assert terms == pytest.approx(float(row["bound"]), rel=1e-4)
        assert float(row["linearized_robustness"]) <= float(row["bound"])


def test_what_the_guide_says_of_contrasts():
    """The degree is below 1 at ε = 2 alone, and every network's images align more where they are darker."""
    networks = [row for row in rows("experiments.csv") if row["change"] == "adversarial training"]
    assert [row["network"] for row in networks if float(row["degree"]) < 1] == ["ε = 2"]
    for row in networks:
        half, most, full = (float(row[f"cosine at {t} x"]) for t in (0.5, 0.75, 1.0))
        assert half > most > full
