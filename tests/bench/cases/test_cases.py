"""Every case at a tiny size: every implementation is right or has a reason not to be there."""

import pickle

import pytest

from bench import cases
from bench.cases import tensor
from bench.report import tables

NOT_ON_A_CPU = {"fastsal cuda", "fastsal triton"}
CASES = [*cases.every(), *cases.every(quick=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_every_implementation_of_every_case_is_right_or_skipped_with_a_reason(case, measured):
    record = measured(case.make(True), case.level, case.name)
    for row in record["results"]:
        if row["status"] == "skipped":
            assert row["reason"]
            known = "not installed (pip install ", "float32 only"
            assert row["implementation"] in NOT_ON_A_CPU or row["reason"].startswith(known)
        else:
            assert row["status"] == "right", row
            assert row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2]
        if row["implementation"] == "fastsal cpu" and tables.NEAR in row:
            assert row[tables.NEAR] <= 1e-6
        if "wrong answers" in row:
            assert row["wrong answers"] == 0 or "9 classes" in row["what"]
    assert tables.everything(record).startswith(f"{case.title}, 1 thread")


@pytest.mark.parametrize("quick", [False, True])
def test_every_case_has_a_title_of_its_own_and_can_be_made_in_another_process(quick):
    found = list(cases.every(cases.LEVELS, quick))
    assert len({case.title for case in found}) == len(found) > 0
    assert {case.level for case in found} == set(cases.LEVELS)
    assert all(pickle.loads(pickle.dumps(case.make or case.figures)) for case in found)


def test_on_a_gpu_graphs_are_timed_too_and_one_number_of_threads(measured, monkeypatch):
    """Where "cpu:0" stands for a GPU, whose clock is a CPU's and whose graphs are plain calls."""
    monkeypatch.setattr(tensor, "Captured", lambda run: run)
    for case in cases.every(cases.ON_A_GPU, quick=True, device="cpu:0"):
        assert case.threads == (None,)
        rows = {row["implementation"]: row for row in measured(case.make(True))["results"]}
        assert {row["status"] for row in rows.values()} == {"right", "skipped"}
        if case.level == "tensor":
            assert rows["fastsal cpu, graph"]["status"] == "right"
            assert rows["NumPy"]["reason"] == "on the CPU only"
            assert "read in tiles" not in rows
