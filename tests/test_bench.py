"""The benchmark suite at tiny sizes: what it refuses to report, what it keeps, what it writes into the README."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmark suite is not part of this distribution", allow_module_level=True)
sys.path.append(str(ROOT))  # last: fastsal stays the installed one

from bench import cases, report  # noqa: E402
from bench.cases import edge, model, pairs, tensor  # noqa: E402
from bench.contestants import models  # noqa: E402
from bench.suite import core, memory, session, store  # noqa: E402
from bench.tools import profiling  # noqa: E402

SHAPE = (3, 30, 50)
NOT_ON_A_CPU = {"fastsal cuda", "fastsal triton"}
CASES = [*cases.every(), *cases.every(quick=True)]


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    """torch.compile takes longer than everything else here together."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def _measure(work: core.Work) -> dict:
    case = core.Case("tensor", "tiny", lambda tiny: work)
    return core.measure(case, work, 1, budget=0.0) | {"commit": "abc", "date": "2026-01-01"}


def _tensor() -> core.Work:
    return tensor.work(SHAPE, torch.float32, tiny=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.title}{' quick' * case.quick}")
def test_every_contestant_of_every_case_is_right_or_skipped_with_a_reason(case):
    record = _measure(case.make(True))
    for row in record["results"]:
        if row["status"] == "skipped":
            assert row["reason"]
            known = "not installed (pip install ", "float32 only"
            assert row["contestant"] in NOT_ON_A_CPU or row["reason"].startswith(known)
        else:
            assert row["status"] == "right", row
            assert row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2]
        if row["contestant"] == "fastsal cpu" and report.NEAR in row:
            assert row[report.NEAR] <= 1e-6
        if "wrong answers" in row:
            assert row["wrong answers"] == 0 or "9 classes" in row["what"]
    assert case.title.split(": ")[1] in report.long_table(record | {"case": case.name})


def test_a_gradient_that_is_wrong_is_found_out():
    logits, jacobian = torch.randn(2, 4), torch.randn(2, 4, 9)
    weight = torch.randn(2, 4, 4)
    weight.diagonal(dim1=1, dim2=2).zero_()
    leaf = jacobian.clone().requires_grad_()
    (right,) = torch.autograd.grad((pairs.differences(leaf) * weight).sum(), leaf)
    checks = pairs.Checks(logits, jacobian)
    assert checks.gradient(weight, right) < 1e-6
    assert checks.gradient(weight, 1.01 * right) > tensor.LOOSE


def test_a_missing_peer_is_skipped_with_a_line(monkeypatch):
    name, peer = next(iter(model.PEERS.items()))
    monkeypatch.setitem(model.PEERS, name, dataclasses.replace(peer, module="not_there_at_all"))
    record = _measure(model.work("", tiny=True))
    (row,) = (row for row in record["results"] if row["contestant"] == name)
    assert row == {"contestant": name, "status": "skipped", "reason": f"not installed (pip install {peer.install})"}


def test_answers_of_the_highest_logits_only_are_right_between_the_two_ratios():
    truth = model.Truth(torch.nn.Linear(5, 3), torch.rand(2, 5))
    truth.ratios = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0])
    assert truth.error(torch.tensor([1.2, 2.0]), limited=True) == 0
    assert truth.error(torch.tensor([1.2, 2.0]), limited=False) == pytest.approx(0.2)
    assert truth.error(torch.tensor([1.0, 1.8]), limited=True) == pytest.approx(0.1)
    assert truth.error(torch.tensor([float("nan"), 2.0]), limited=True) == float("inf")
    assert truth.wrong(1e-3, torch.tensor([1.2, 2.0])) == {"wrong answers": 0.5}


def test_fastsal_is_right_on_every_awkward_input_and_the_table_tells_who_is_not():
    record = edge.record()
    for name in (name for name in record["rows"] if name.startswith("fastsal")):
        row = dict(record["rows"][name])
        assert row.pop("n = 1") == "ValueError"
        assert set(row.values()) == {"right"}
    assert record["rows"]["eager torch"]["gradients of 1e-25"] == "inf"
    assert record["rows"]["Gram by bmm"]["rows 1e-4 apart"] != "right"
    assert edge._one(0.0, float("inf")) == "0"
    assert edge._one(1.0, 2.0) == "0.5×"


def test_memory_is_what_the_work_takes():
    assert memory.growth(lambda: torch.ones(2**25).sum()) / 2**20 == pytest.approx(128, rel=0.1)


def test_every_case_has_a_name_of_its_own():
    for quick in (False, True):
        titles = [case.title for case in cases.every(quick)]
        assert len(set(titles)) == len(titles) > 0


def test_a_wrong_contestant_gets_its_error_and_no_speed():
    work = _tensor()
    checks = tensor.Checks(work.inputs[0])

    def wrong(inputs):
        result = dict(tensor.formulas.eager(*inputs))
        result["linearized_robustness"] = result["linearized_robustness"] * torch.tensor([1.0, 1.0, 1.01])
        return result

    work.contestants.append(core.Contestant("wrong", wrong, lambda result: checks("wrong", result), tensor.LOOSE))
    record = _measure(work)
    row = record["results"][-1 - len(work.skipped)]
    assert row["contestant"] == "wrong"
    assert row["status"] == "wrong"
    assert row["error"] == pytest.approx(0.01, rel=1e-3)
    assert "seconds" not in row
    assert "ratio" not in row
    assert "wrong: 1e-02" in report._matrix([record], report._speed)
    assert "wrong" in report.long_table(record)


@pytest.mark.parametrize(("B", "n", "D"), [(3, 20, 32768), (200, 30, 784)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_yardsticks_read_every_number(B, n, D, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = torch.randn(B, n), torch.randn(B, n, D).round(decimals=1), torch.randn(B, D).round(decimals=1)
    _, jacobian, x = (each.double() for each in inputs)
    assert tensor.pure_read(inputs) == pytest.approx(float(jacobian.sum() + x.sum()), rel=1e-5, abs=0.5)
    first, second = jacobian[:, 0], jacobian[:, 1]
    expected = (first.unsqueeze(1) - jacobian).square().sum() + ((first + second) * x).sum()
    assert tensor.read_in_tiles(inputs) == pytest.approx(float(expected), rel=1e-5)


def test_one_example_is_read_in_halves_by_two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    inputs = torch.randn(1, 40), torch.randn(1, 40, 32768), torch.zeros(1, 32768)
    halves = inputs[1].double().reshape(2, 20, -1)
    expected = float((halves[:, :1] - halves).square().sum())
    assert tensor.read_in_tiles(inputs) == pytest.approx(expected, rel=1e-5)


def test_everyone_takes_a_turn_in_every_round_and_nobody_is_always_first_or_always_after_the_same():
    played = []
    runs = {name: lambda _, name=name: played.append(name) or time.sleep(core.SHORTEST) for name in "abc"}
    times = core.take_turns(runs, [None], budget=1.0)
    assert [len(seconds) for seconds in times.values()] == [15] * 3
    rounds = ["".join(played[at : at + 3]) for at in range(3, len(played), 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert {one[0] for one in rounds} == set("abc")
    assert {one[at : at + 2] for one in rounds for at in (0, 1)} == {"ab", "ac", "ba", "bc", "ca", "cb"}


def test_a_contestant_that_raises_is_reported_and_the_others_go_on():
    work = _tensor()

    def broken(_):
        raise RuntimeError("out of order\nand more")

    work.contestants.insert(1, core.Contestant("broken", broken, lambda _: 0.0, 0.0))
    row = _measure(work)["results"][1]
    assert row == {"contestant": "broken", "status": "failed", "reason": "RuntimeError: out of order"}


def test_figures_are_kept_case_by_case_and_forgotten_with_the_machine(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    first = store.Store(path)
    first.begin(fresh=False)
    first.put("a", {"level": "tensor"}, "abc")
    again = store.Store(path)
    again.begin(fresh=False)
    assert again.has("a", "abc")
    assert not again.has("a", "abd")
    assert not again.has("a", "abc+")
    elsewhere = {**store.environment(), "machine": {}}
    monkeypatch.setattr(store, "environment", lambda: elsewhere)
    again.begin(fresh=False)
    assert not again.has("a", "abc")
    assert "/" not in path.read_text().replace("GB/s", "")


def test_report_is_idempotent_and_tells_stale_and_broken_markers(tmp_path, capsys):
    figures = store.Store(tmp_path / "bench.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"# x\n\n{report.BEGIN}\nold\n{report.END}\n\ntail\n")
    assert report.write(figures.path, readme, check=False) == 1
    assert "holds no figures" in capsys.readouterr().out

    figures.begin(fresh=True)
    figures.put("a", _measure(_tensor()), "abc")
    figures.put("b", {**_measure(model.work("", tiny=True)), "level": "model"}, "abc")
    figures.put("c", {**_measure(pairs.forward(SHAPE, tiny=True)), "level": "pairs"}, "abc")
    figures.put("edge", edge.record(), "abc")
    assert report.write(figures.path, readme, check=True) == 1
    assert "stale" in capsys.readouterr().out
    assert "old" in readme.read_text()
    assert report.write(figures.path, readme, check=False) == 0
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("# x\n\n" + report.BEGIN)
    assert text.endswith(report.END + "\n\ntail\n")
    assert "commit abc" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"tensor.png", "pairs.png", "model.png"}
    assert "fastsal triton: skipped" in (tmp_path / "tables.md").read_text()
    assert report.write(figures.path, readme, check=True) == 0
    assert report.write(figures.path, readme, check=False) == 0
    assert readme.read_text() == text

    readme.write_text(text.replace(report.END, ""))
    assert report.write(figures.path, readme, check=False) == 1
    assert "wants one line" in capsys.readouterr().out
    assert report.BEGIN in (ROOT / "README.md").read_text()


def test_a_session_measures_what_the_file_lacks_and_nothing_twice(tmp_path, monkeypatch):
    made = []
    case = core.Case("tensor", "tiny", lambda tiny: made.append(tiny) or _tensor())
    monkeypatch.setattr(session, "commit", lambda: "abc")
    monkeypatch.setattr(session, "QUICK_BUDGET", 0.0)
    path = tmp_path / "bench.json"
    first = session.Session(quick=True, path=path)
    record = first.record(case, 1)
    assert first.record(case, 1) is record
    assert session.Session(quick=True, path=path).record(case, 1) == json.loads(json.dumps(record))
    assert made == [False]
    session.Session(quick=True, path=path, fresh=True).record(case, 1)
    monkeypatch.setattr(session, "commit", lambda: "abd")
    session.Session(quick=True, path=path).record(case, 1)
    assert made == [False] * 3


@pytest.mark.parametrize("method", list(model.METHODS))
def test_the_profile_counts_every_moment_once(method, monkeypatch):
    monkeypatch.setattr(profiling.models, "load", lambda _: models.tiny())
    elapsed, seconds = profiling.profile("", model.METHODS[method][0])
    assert all(value > 0 for part, value in seconds.items() if part != "probes")
    assert sum(seconds.values()) <= elapsed


def test_pytest_bench_finds_every_contestant_and_plays_their_seconds_back(run_python):
    done = run_python(
        "-m", "pytest", str(ROOT / "bench"), "--quick", "--collect-only", "-q", "-c", str(ROOT / "pyproject.toml")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for case in cases.every(quick=True):
        for contestant in case.make(True).contestants:
            assert not contestant.name.isascii() or f", {contestant.name}]" in done.stdout
