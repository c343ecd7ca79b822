"""The benchmark suite at tiny sizes: what it refuses to report, what it keeps, what it writes into the README."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench").is_dir():
    pytest.skip("the benchmark suite is not part of this distribution", allow_module_level=True)
sys.path.append(str(ROOT))  # last: fastsal stays the installed one

from bench import core, report, store, tensor  # noqa: E402


def _measure(work: core.Work) -> dict:
    case = core.Case("tensor", "tiny", lambda: work)
    return core.measure(case, case.make(), 1, budget=0.0)


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
    assert "wrong: 1e-02" in report._matrix([record])


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
