"""The benchmark suite at tiny sizes: what it refuses to report, what it keeps, what it writes into the README."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmark suite is not part of this distribution", allow_module_level=True)
sys.path.append(str(ROOT))  # last: fastsal stays the installed one

from bench import cases, core, edge, memory, model, pairs, report, store, tensor  # noqa: E402


def _measure(work: core.Work) -> dict:
    case = core.Case("tensor", "tiny", lambda: work)
    return core.measure(case, work, 1, budget=0.0)


def _tiny(monkeypatch: pytest.MonkeyPatch, shape=(3, 4, 50), dtype=torch.float32) -> core.Work:
    monkeypatch.setattr(tensor, "CACHES", 0)
    return tensor.work(shape, dtype, compiled=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 50), (70, 3, 8), (1, 30, 20)])
def test_every_contestant_at_tensor_level_is_right(shape, dtype, monkeypatch):
    record = _measure(_tiny(monkeypatch, shape, dtype))
    status = {row["contestant"]: row["status"] for row in record["results"]}
    skipped = {"fastsal cuda", "fastsal triton", *(["NumPy"] if dtype == torch.bfloat16 else [])}
    assert {name for name, what in status.items() if what == "skipped"} <= skipped
    assert {what for name, what in status.items() if name not in skipped} == {"right"}
    assert all(row["reason"] for row in record["results"] if row["status"] == "skipped")


@pytest.mark.parametrize("shape", [(3, 4, 50), (1, 30, 20), (2, 2, 7)])
def test_every_contestant_on_pairs_is_right(shape, monkeypatch):
    monkeypatch.setattr(tensor, "CACHES", 0)
    for work in (pairs.forward(shape), pairs.backward(shape)):
        rows = _measure(work)["results"]
        assert {row["status"] for row in rows if row["contestant"] not in ("fastsal cuda", "fastsal triton")} == {
            "right"
        }
        for row in rows:
            if row["contestant"] == "fastsal cpu" and "error on near-identical rows" in row:
                assert row["error on near-identical rows"] <= 1e-6


def test_a_gradient_that_is_wrong_is_found_out():
    logits, jacobian = torch.randn(2, 4), torch.randn(2, 4, 9)
    weight = torch.randn(2, 4, 4)
    weight.diagonal(dim1=1, dim2=2).zero_()
    leaf = jacobian.clone().requires_grad_()
    (right,) = torch.autograd.grad((pairs.differences(leaf) * weight).sum(), leaf)
    checks = pairs.Checks(logits, jacobian)
    assert checks.gradient(weight, right) < 1e-6
    assert checks.gradient(weight, 1.001 * right) > 1e-5


def test_every_contestant_at_model_level_is_right_or_not_installed():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 12)).eval()
    record = _measure(model.work(net, 0.4 + 0.2 * torch.rand(3, 20)))
    for row in record["results"]:
        if row["status"] == "skipped":
            assert row["reason"].startswith("not installed (pip install ")
        else:
            assert row["status"] == "right", row
            assert 0 <= row["wrong answers"] <= 1
            assert row["wrong answers"] == 0 or "9 classes" in row["what"]


def test_a_missing_peer_is_skipped_with_a_line(monkeypatch):
    name, peer = next(iter(model.PEERS.items()))
    monkeypatch.setitem(model.PEERS, name, dataclasses.replace(peer, module="not_there_at_all"))
    record = _measure(model.work(torch.nn.Linear(5, 3), torch.rand(2, 5)))
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
    for name in ("fastsal reference", "fastsal cpu"):
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


def test_a_wrong_contestant_gets_its_error_and_no_speed(monkeypatch):
    work = _tiny(monkeypatch)
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
    record |= {"commit": "abc", "date": "today"}
    assert "wrong: 1e-02" in report._matrix([record], report._speed)
    assert "wrong" in report.long_table(record)


def test_a_contestant_that_raises_is_reported_and_the_others_go_on(monkeypatch):
    work = _tiny(monkeypatch)

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


def test_report_is_idempotent_and_tells_stale_and_broken_markers(tmp_path, monkeypatch, capsys):
    figures = store.Store(tmp_path / "bench.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"# x\n\n{report.BEGIN}\nold\n{report.END}\n\ntail\n")
    assert report.write(figures.path, readme, check=False) == 1
    assert "holds no figures" in capsys.readouterr().out

    figures.begin(fresh=True)
    figures.put("a", _measure(_tiny(monkeypatch)), "abc")
    assert report.write(figures.path, readme, check=True) == 1
    assert "stale" in capsys.readouterr().out
    assert "old" in readme.read_text()
    assert report.write(figures.path, readme, check=False) == 0
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("# x\n\n" + report.BEGIN)
    assert text.endswith(report.END + "\n\ntail\n")
    assert "commit abc" in text
    assert report.write(figures.path, readme, check=True) == 0
    assert report.write(figures.path, readme, check=False) == 0
    assert readme.read_text() == text

    readme.write_text(text.replace(report.END, ""))
    assert report.write(figures.path, readme, check=False) == 1
    assert "wants one line" in capsys.readouterr().out
    assert report.BEGIN in (ROOT / "README.md").read_text()
