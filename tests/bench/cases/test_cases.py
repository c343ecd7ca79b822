"""Every case at a tiny size: every contestant is right or has a reason not to be there."""

import pytest

from bench import cases
from bench.report import tables

NOT_ON_A_CPU = {"fastsal cuda", "fastsal triton"}
CASES = [*cases.every(), *cases.every(quick=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.title}{' quick' * case.quick}")
def test_every_contestant_of_every_case_is_right_or_skipped_with_a_reason(case, measured):
    record = measured(case.make(True))
    for row in record["results"]:
        if row["status"] == "skipped":
            assert row["reason"]
            known = "not installed (pip install ", "float32 only"
            assert row["contestant"] in NOT_ON_A_CPU or row["reason"].startswith(known)
        else:
            assert row["status"] == "right", row
            assert row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2]
        if row["contestant"] == "fastsal cpu" and tables.NEAR in row:
            assert row[tables.NEAR] <= 1e-6
        if "wrong answers" in row:
            assert row["wrong answers"] == 0 or "9 classes" in row["what"]
    assert case.title.split(": ")[1] in tables.everything(record | {"case": case.name})


def test_every_case_has_a_name_of_its_own():
    for quick in (False, True):
        titles = [case.title for case in cases.every(quick)]
        assert len(set(titles)) == len(titles) > 0
