"""The summary of a table: every number beside NumPy's on the same columns, and the lines that are printed."""

import dataclasses
import math

import numpy as np
import pytest

from fastsal.evaluation.summary import Group, summarize
from fastsal.evaluation.tables import MISSING
from fastsal.tensor.reference import SCALARS

QUANTITIES = (*SCALARS, "lower_bound")


@pytest.fixture
def columns():
    """60 examples, of which 6 failed; two NaN, an infinity, a tie."""
    rng = np.random.default_rng(0)
    found = {"index": np.arange(60), "y": rng.integers(0, 4, 60)}
    for name, missing in MISSING.items():
        if isinstance(missing, float):
            found[name] = rng.standard_normal(60).astype(np.float32)
        else:
            found[name] = np.full(60, missing, dtype=object if missing == "" else None)
    found["prediction"], found["method"][:] = rng.integers(0, 4, 60), "certified"
    found["certified"], found["failure_probability"] = rng.random(60) < 0.7, np.full(60, 1e-6)
    found["vjps"], found["jvps"] = rng.integers(3, 30, 60), rng.integers(0, 9, 60)
    found["linearized_robustness"][[3, 8]], found["linearized_robustness"][[50, 12]] = math.nan, -9
    found["bound"][4] = math.inf
    failed = np.arange(60) % 10 == 5
    found["error"] = np.where(failed, "bad", "").astype(object)
    for name, missing in MISSING.items():
        found[name][failed] = missing
    found["y"][[5, 20]] = -1
    return found


def quartiles(values):
    known = np.sort(values[~np.isnan(values)])
    return [known[math.ceil(share * len(known)) - 1] for share in (0.25, 0.5, 0.75)]


def test_is_what_the_columns_say(columns):
    summary = summarize(columns, (3, 8, 8), 4, "2")
    good = columns["error"] == ""
    assert (summary.examples, summary.failed, summary.all.examples) == (60, 6, 54)
    assert (summary.shape, summary.classes, summary.norm, summary.method) == ((3, 8, 8), 4, "2", "certified")
    for name in ("certified", "vjps", "jvps", "failure_probability"):
        assert getattr(summary, name) == pytest.approx(columns[name][good].mean(), rel=1e-14)
    groups = {y: good & (columns["y"] == y) for y in range(4)}
    assert sorted(summary.by_class) == [0, 1, 2, 3]
    for group, rows in [(summary.all, good), *((summary.by_class[y], rows) for y, rows in groups.items())]:
        assert isinstance(group, Group)
        assert group.examples == rows.sum()
        known = rows & (columns["y"] >= 0)
        assert group.accuracy == pytest.approx((columns["prediction"] == columns["y"])[known].mean(), rel=1e-14)
        assert tuple(group.quantities) == QUANTITIES
        for name, spread in group.quantities.items():
            assert [spread.lower, spread.median, spread.upper] == quartiles(columns[name][rows])
            assert spread.nan == np.isnan(columns[name][rows]).sum()
    rho = columns["linearized_robustness"]
    order = sorted(np.flatnonzero(good & ~np.isnan(rho)), key=lambda i: (rho[i], i))
    assert [one.index for one in summary.least_robust] == order[:10]
    assert [one.index for one in summary.least_robust[:2]] == [12, 50]
    assert [(one.index, one.error) for one in summary.failures] == [(i, "bad") for i in range(5, 60, 10)]


def test_text(columns):
    text = str(summarize(columns, (3, 8, 8), 4, "2"))
    assert text.startswith("60 examples of shape (3, 8, 8), 4 classes, norm 2, method certified\n")
    assert "least robust: 12 at -9, 50 at -9, " in text
    assert (
        "not analysed, their rows are null: 6 of 60 examples, 5, 15, 25, 35, 45, 55; the column error says why" in text
    )
    assert f"certified: {(columns['certified'] & (columns['error'] == '')).sum()} of 54 examples" in text
    (line,) = (line for line in text.splitlines() if line.startswith("linearized_robustness"))
    assert line.endswith("(2 NaN left out)")
    assert text.count("\n       ") == 2 + 4 - 1  # a heading and a line for each class


def test_many_classes_are_cut_in_the_text_only(columns):
    columns["y"] = np.arange(60) // 2
    summary = summarize(columns, (3, 8, 8), 30, "2")
    assert len(summary.by_class) == 30
    text = str(summary).partition("by true class")[2]
    assert text.startswith(", the 10 least robust of 30 (--json has all):\n")
    middle = {y: group.quantities["linearized_robustness"].median for y, group in summary.by_class.items()}
    least = sorted((value, y) for y, value in middle.items() if not math.isnan(value))[:10]
    assert [int(line.split()[0]) for line in text.splitlines()[2:12]] == [y for _, y in least]


def test_nothing_analysed_and_no_classes(columns):
    del columns["y"]
    columns["error"][:] = "bad"
    summary = summarize(columns, (6,), 4, "inf")
    assert (summary.failed, summary.method, summary.by_class, summary.least_robust) == (60, "", {}, ())
    assert summary.all.accuracy is None
    assert math.isnan(summary.vjps)
    assert "60 of 60 examples, 5, 15" not in str(summary)
    assert "and 50 more; the column error says why" in str(summary)
    assert dataclasses.asdict(summary)["failures"][0] == {"index": 0, "name": "", "error": "bad"}
