"""`python -m bench gpu` resumes."""

import pytest
import torch
from _pytest.mark.expression import Expression

from bench.tools import gpu

CPU = torch.device("cpu")
ROW = {"op": "margin_geometry", "shape": [2, 3, 4], "dtype": "torch.float32"}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "machine", lambda device: {"device": device.type, "commit": "a"})
    return tmp_path / "gpu.json"


def test_what_succeeded_is_not_done_again(path):
    gpu.Report(path, CPU).step("build", lambda: {"code": 0})
    again = gpu.Report(path, CPU)
    again.step("build", lambda: pytest.fail("done again"))
    again.step("test", lambda: {"code": 1})
    gpu.Report(path, CPU).step("test", lambda: {"code": 0})
    assert gpu.Report(path, CPU).data["phases"] == {"build": {"code": 0}, "test": {"code": 0}}


def test_a_case_is_kept_once(path):
    report = gpu.Report(path, CPU)
    report.case(ROW, "cuda", failed="OutOfMemoryError")
    assert not report.has(ROW, "cuda")
    report.case(ROW, "cuda", times_us={"p50": 1.0})
    report.case(ROW, "triton", times_us={"p50": 2.0})
    again = gpu.Report(path, CPU)
    assert again.has(ROW, "cuda")
    assert not again.has({**ROW, "shape": [2, 3, 5]}, "cuda")
    assert [case["what"] for case in again.cases] == ["cuda", "triton"]


def test_each_backend_has_its_own_tests(path, monkeypatch):
    """The name of a test of Triton on a GPU holds the word cuda too."""
    chosen = []

    def run(command, deadline, **environment):
        expression = Expression.compile(command[command.index("-k") + 1])
        names = (
            "test_values[cuda-cuda-float32]",
            "test_values[triton-cuda-float32]",
            "test_streams[cuda-2.0]",
            "test_simd",
        )
        chosen.append([name for name in names if expression.evaluate(lambda word, name=name, **_: word in name)])
        return {"code": 0, "tail": ""}

    monkeypatch.setattr(gpu, "run", run)
    gpu.test(gpu.Report(path, CPU), CPU, 100)
    assert chosen == [
        ["test_values[cuda-cuda-float32]", "test_streams[cuda-2.0]"],
        ["test_values[triton-cuda-float32]"],
    ]


@pytest.mark.parametrize("fresh", [True, False])
def test_another_commit_begins_anew(path, monkeypatch, fresh):
    gpu.Report(path, CPU).case(ROW, "cuda", times_us={"p50": 1.0})
    if not fresh:
        monkeypatch.setattr(gpu, "machine", lambda device: {"device": device.type, "commit": "b"})
    assert gpu.Report(path, CPU, fresh).cases == []
