"""The numbers of a study: files with a row for every model and image, and what must hold in them."""

import csv
import math

import numpy as np
import pytest
from study.small import IMAGES, LABELS, SEEDS

from fastsal.study import results
from fastsal.study.attacks import CHEAP


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_numbers(study, studies):
    """A row a network and image, a row a network, medians that are the medians, and accuracy on the whole test split."""
    images, models = rows(study / "images.csv"), rows(study / "models.csv")
    assert [(int(row["seed"]), row["model"]) for row in models] == [(seed, label) for seed in SEEDS for label in LABELS]
    assert len(images) == IMAGES * len(models)
    for model, result in zip(models, (r for one in studies for r in one.results), strict=True):
        own = [row for row in images if (row["seed"], row["model"]) == (model["seed"], model["model"])]
        assert [int(row["image"]) for row in own] == list(range(IMAGES))
        for name in results.TABLE.keys() - set(results.LEFT_OUT):
            median = np.median([float(row[name]) for row in own])
            assert float(model[f"median {name}"]) == pytest.approx(median, rel=1e-5)
            assert np.median(result.columns[name]) == pytest.approx(median, rel=1e-5)
        right = float(model["accuracy"]) * 450
        assert right == pytest.approx(round(right), abs=1e-2)
        assert sum(int(model[f"smallest by {name}"]) for name in CHEAP) == IMAGES


def test_what_must_hold(studies):
    """ρ is its attack's and the smallest; the terms add up to the bound, which holds; β is the sum over the biases."""
    for result in (r for one in studies for r in one.results):
        c = result.columns
        found = np.stack([c[f"rho {name}"] for name in CHEAP])
        assert np.isfinite(c["rho"]).all()
        assert np.array_equal(c["rho"], found.min(0))
        assert c["attack"].tolist() == [CHEAP[slot] for slot in found.argmin(0)]
        assert (c["linearized_robustness"] <= c["bound"] * (1 + 1e-9)).all()
        distance = np.abs(c["linearized_robustness"] - c["binarized_alignment"])
        assert (distance <= c["offset_term"] * (1 + 1e-9) + 1e-12).all()
        assert max(c["bias_error"].max(), c["binarized_bias_error"].max()) < 1e-13
        assert (np.abs(c["boundary cosine"]) <= 1 + 1e-9).all()


def test_rank_correlation():
    assert results.rank_correlation([1, 2, 3, math.inf, 5], [10, 200, 3000, 0, math.nan]) == pytest.approx(1)
    assert results.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(results.rank_correlation([1, 2], [1, 2]))
    assert math.isnan(results.rank_correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(results.rank_correlation([1, 1 + 1e-15, 1 - 1e-15], [1, 2, 3]))
    assert math.isnan(results.rank_correlation([3, 1, 2], [0, 0, 0]))
    assert results.rank_correlation([1e-30, 2e-30, 3e-30], [1, 1 + 1e-6, 1 + 2e-6]) == pytest.approx(1)
