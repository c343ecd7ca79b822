"""The numbers of a study: files with a row for every model and image, and what must hold in them."""

import csv
import math

import numpy as np
import pytest
from study.small import LABELS

from fastsal.study import results
from fastsal.study.attacks import ATTACKS


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_numbers(study):
    """A row a model and image, a row a model, medians that are the medians, and accuracy on the whole test split."""
    images, models = rows(study / "images.csv"), rows(study / "models.csv")
    assert [row["model"] for row in models] == LABELS
    assert len(images) == 24 * 3
    page = (study / "report.html").read_text(encoding="utf-8")
    for model in models:
        own = [row for row in images if row["model"] == model["model"]]
        assert [int(row["image"]) for row in own] == list(range(24))
        for name, symbol in results.TABLE.items():
            median = np.median([float(row[name]) for row in own])
            assert float(model[f"median {name}"]) == pytest.approx(median, rel=1e-6)
            assert symbol in page
            assert f"<td>{median:.3f}</td>" in page
        assert (float(model["accuracy"]) * 450) % 1 == pytest.approx(0, abs=1e-9)
        assert sum(int(model[f"smallest by {name}"]) for name in ATTACKS) == 24


def test_what_must_hold(study):
    """ρ is its attack's and the smallest; the terms add up to the bound, which holds; β is the sum over the biases."""
    for row in rows(study / "images.csv"):
        value = {name: float(text) for name, text in row.items() if name not in ("model", "training", "attack")}
        assert value["rho"] == value[f"rho {row['attack']}"] == min(value[f"rho {name}"] for name in ATTACKS)
        assert math.isfinite(value["rho"])
        terms = value["alignment"] + value["gap_term"] + value["offset_term"]
        assert terms == pytest.approx(value["bound"], rel=1e-6)
        assert value["linearized_robustness"] <= value["bound"] * (1 + 1e-6)
        assert abs(value["binarized_degree"]) * value["linearized_robustness"] == pytest.approx(
            value["binarized_alignment"], rel=1e-4, abs=1e-5
        )
        # A float32 forward and backward pass of a few thousand terms a logit.
        assert max(value["bias_sum_error"], value["binarized_bias_sum_error"]) < 1e-5
        assert max(value["float64 bias_sum_error"], value["float64 binarized_bias_sum_error"]) < 1e-13


def test_rank_correlation():
    assert results.rank_correlation([1, 2, 3, math.inf, 5], [10, 200, 3000, 0, math.nan]) == pytest.approx(1)
    assert results.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(results.rank_correlation([1, 2], [1, 2]))
    assert math.isnan(results.rank_correlation([1, 1, 1], [1, 2, 3]))
