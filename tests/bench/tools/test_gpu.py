"""`python -m bench gpu`: what succeeded is not done again, and what is tested and measured."""

import sys
import time
from types import SimpleNamespace

import pytest
from _pytest.mark.expression import Expression

from bench import ROOT
from bench.harness.store import Store
from bench.tools import gpu


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """opened(): the store of outcomes, in a run of its own at a clean commit."""
    monkeypatch.setattr("bench.harness.store.commit", lambda: "abc")
    return lambda: Store(tmp_path / "gpu.json").begin()


def test_what_succeeded_is_not_done_again(opened, capsys):
    gpu.step(opened(), "build", lambda: {"code": 0, "tail": "much"})
    gpu.step(opened(), "build", lambda: pytest.fail("done again"))
    gpu.step(opened(), "test", lambda: {"code": 1})
    gpu.step(opened(), "test", lambda: {"code": 0})
    assert {name: found["code"] for name, found in opened().records.items()} == {"build": 0, "test": 0}
    assert capsys.readouterr().out == "[build] code 0\n[build] code 0\n[test] code 1\n[test] code 0\n"


def test_each_backend_has_its_own_tests(opened, monkeypatch):
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
    gpu.test(opened(), "cpu", 100)
    assert chosen == [
        ["test_values[cuda-cuda-float32]", "test_streams[cuda-2.0]"],
        ["test_values[triton-cuda-float32]"],
    ]


def test_the_tests_that_every_backend_shares_are_there():
    assert all((ROOT / path).is_file() for path in gpu.SHARED_TESTS)


def test_the_small_run_calls_every_kernel(capsys):
    gpu.small_run("cpu")
    assert capsys.readouterr().out == "small run done\n"


def test_what_is_measured_runs_in_a_process_of_its_own(opened, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu, "run", lambda command, deadline: commands.append(command[1:]) or {"code": 0, "tail": ""})
    gpu.bench(opened(), "cpu", 100)
    assert commands[0][:5] == ["-m", "bench", "tensor", "pairs", "--quick"]


def test_a_command_ends_at_its_deadline():
    """Though a descendant still holds its output, and with the output that it made."""
    code = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    result = gpu.run([sys.executable, "-c", code], 3)
    assert time.monotonic() - start < 20
    assert (result["code"], result["tail"]) == (124, "begun\n")
    result = gpu.run(["sh", "-c", "sleep 60 & echo done"], 30)
    assert (result["code"], result["tail"]) == (0, "done\n")
    assert time.monotonic() - start < 40


@pytest.fixture
def main(opened, monkeypatch):
    """main(run): the whole command on a GPU that is none, `run` in place of what it starts."""
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(gpu, "Store", lambda _: SimpleNamespace(begin=lambda *_: opened(), records={}))
    monkeypatch.setattr(sys, "argv", ["gpu"])

    def main(run):
        monkeypatch.setattr(gpu, "run", run)
        return gpu.main()

    return main


def test_all_phases_end_within_eight_minutes(main, opened, monkeypatch, capsys):
    """Whatever takes too long, the next phase begins, and what came of it is written."""
    now = [0.0]

    def slow(command, deadline, *_, **__):
        now[0] += max(deadline, 1)
        return {"code": 124, "tail": ""}

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert main(slow) == 1
    assert 400 < now[0] <= 470
    steps = "build", "test cuda", "test triton", *gpu.SANITIZERS, "bench"
    assert {name: found["code"] for name, found in opened().records.items()} == dict.fromkeys(steps, 124)
    assert capsys.readouterr().out.endswith(f"failed: {', '.join(steps)}\n")


def test_what_was_tested_without_a_build_is_tested_again(main, opened):
    """Where the module could not be built, its tests are skipped, which is no failure, and its cases too."""
    codes = iter([1, 0])
    commands = []

    def run(command, *_, **__):
        commands.append(command)
        return {"code": next(codes) if "build_ext" in command else 0, "tail": "33 skipped"}

    assert main(run) == 1
    first = len(commands)
    assert main(run) == 0
    assert len(commands) == 2 * first
    assert "--fresh" in commands[-1]
    assert main(run) == 0
    assert len(commands) == 2 * first
