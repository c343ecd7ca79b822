"""How contestants are checked and timed, and what is not reported."""

import time

import pytest
import torch

from bench.cases import tensor
from bench.harness import core
from bench.report import tables


def test_a_wrong_contestant_gets_its_error_and_no_speed(measured, work_on_a_jacobian):
    work = work_on_a_jacobian()
    checks = tensor.Checks(work.inputs[0])

    def wrong(inputs):
        result = dict(tensor.formulas.eager(*inputs))
        result["linearized_robustness"] = result["linearized_robustness"] * torch.tensor([1.0, 1.0, 1.01])
        return result

    work.contestants.append(core.Contestant("wrong", wrong, lambda result: checks("wrong", result), tensor.LOOSE))
    record = measured(work)
    row = record["results"][-1 - len(work.skipped)]
    assert row["contestant"] == "wrong"
    assert row["status"] == "wrong"
    assert row["error"] == pytest.approx(0.01, rel=1e-3)
    assert "seconds" not in row
    assert "ratio" not in row
    assert "wrong: 1e-02" in tables.side_by_side([record], tables.speed)
    assert "wrong" in tables.everything(record)


def test_everyone_takes_a_turn_in_every_round_and_nobody_is_always_first_or_always_after_the_same():
    played = []
    runs = {name: lambda _, name=name: played.append(name) or time.sleep(core.SHORTEST) for name in "abc"}
    times = core.take_turns(runs, [None], budget=1.0)
    assert [len(seconds) for seconds in times.values()] == [15] * 3
    rounds = ["".join(played[at : at + 3]) for at in range(3, len(played), 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert {one[0] for one in rounds} == set("abc")
    assert {one[at : at + 2] for one in rounds for at in (0, 1)} == {"ab", "ac", "ba", "bc", "ca", "cb"}


def test_a_contestant_that_raises_is_reported_and_the_others_go_on(measured, work_on_a_jacobian):
    work = work_on_a_jacobian()

    def broken(_):
        raise RuntimeError("out of order\nand more")

    work.contestants.insert(1, core.Contestant("broken", broken, lambda _: 0.0, 0.0))
    row = measured(work)["results"][1]
    assert row == {"contestant": "broken", "status": "failed", "reason": "RuntimeError: out of order"}
