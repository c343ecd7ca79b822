"""How implementations are checked and timed, and what is not reported."""

import functools

import pytest
import torch

from bench.cases import tensor
from bench.harness import case, memory
from bench.report import tables


def test_a_wrong_implementation_gets_its_error_and_no_speed(measured, work_on_a_jacobian):
    work = work_on_a_jacobian()
    checks = tensor.Checks(work.inputs[0])

    def wrong(inputs):
        result = dict(tensor.formulas.eager(*inputs))
        result["linearized_robustness"] = result["linearized_robustness"] * torch.tensor([1.0, 1.0, 1.01])
        return result

    check = functools.partial(checks, "wrong")
    work.implementations.append(case.Implementation("wrong", wrong, check, tensor.LOOSE))
    record = measured(work)
    row = record["results"][-1 - len(work.skipped)]
    assert row["implementation"] == "wrong"
    assert row["status"] == "wrong"
    assert row["error"] == pytest.approx(0.01, rel=1e-3)
    assert "seconds" not in row
    assert "ratio" not in row
    assert "wrong: 1e-02" in tables.side_by_side([record], tables.speed)
    assert "wrong" in tables.everything(record)


def test_an_implementation_that_raises_is_reported_and_the_others_are_measured(measured, work_on_a_jacobian):
    work = work_on_a_jacobian()

    def broken(_):
        raise RuntimeError("out of order\nand more")

    work.implementations.insert(1, case.Implementation("broken", broken, lambda _: 0.0, 0.0))
    record = measured(work)
    assert record["results"][1] == {
        "implementation": "broken",
        "status": "failed",
        "reason": "RuntimeError: out of order",
    }
    assert "seconds" in record["results"][2]


def test_the_peak_memory_is_that_of_the_second_run_in_a_fresh_process(monkeypatch):
    monkeypatch.setattr(memory, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(memory, "growth", lambda run: run())
    runs = []

    def make(tiny):
        def run(given, name="run"):
            runs.append((name, given))
            return len(runs)

        brief = functools.partial(run, name="brief")
        return case.Work([tiny], [case.Implementation("one", run, lambda _: 0.0, 0.0, brief=brief)])

    found = case.Case("level", "name", make, budget=0.0, memory=True).record()
    assert runs[-2:] == [("brief", True), ("brief", False)]
    assert found["results"][0]["peak memory"] == len(runs)


def test_every_number_of_threads_is_measured_once_and_put_back(monkeypatch):
    before, held = torch.get_num_threads(), {}

    class Memory:
        def keep(self, key, make):
            return held.setdefault(key, make())

    measured = case.Case("level", "name", figures=lambda: {"figure": 1}, threads=(1, 1, None))
    found = list(measured.records(Memory()))
    assert torch.get_num_threads() == before
    assert list(held) == [f"level: name, threads: {threads}" for threads in dict.fromkeys((1, before))]
    assert found[0] == {"level": "level", "case": "name", "threads": 1, "figure": 1}
