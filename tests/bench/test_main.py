"""`python -m bench` and `pytest bench`: one entry point, and every implementation as a test."""

import os
import subprocess
import sys

import pytest

from bench import ROOT, cases
from bench.__main__ import COMMANDS


def python_m_bench(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_options(command):
    if command == "triton_matrix":
        pytest.importorskip("triton")
    done = python_m_bench(command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m bench {command} [-h]")


def test_the_entry_point_lists_levels_and_commands_and_refuses_others():
    listed = python_m_bench("--help").stdout
    assert all(f"\n  {name} " in listed for name in (*cases.LEVELS, *COMMANDS))
    for arguments, error in {
        ("reprot",): f"got 'reprot', wants of {', '.join((*cases.LEVELS, *COMMANDS))}",
        ("zoo", "--device", "cuda"): "--device cuda: got zoo, wants of tensor, pairs",
    }.items():
        refused = python_m_bench(*arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.endswith(f"python -m bench: error: {error}\n")


def test_a_level_is_measured_into_a_file(tmp_path):
    figures = tmp_path / "figures.json"
    done = python_m_bench("edge", "--out", str(figures), "--only", "awkward")
    assert done.returncode == 0, done.stderr
    assert "\nedge: awkward inputs, " in done.stdout
    assert done.stdout.endswith("s; figures in figures.json\n")
    assert figures.is_file()
    nothing = python_m_bench("--quick", "--only", "no such case", "--out", str(tmp_path / "none.json"))
    assert nothing.stdout.endswith("s; figures in no file\n")
    assert not (tmp_path / "none.json").exists()


def test_pytest_bench_finds_every_implementation(run_python):
    done = run_python(
        "-m", "pytest", str(ROOT / "bench"), "--quick", "--collect-only", "-q", "-c", str(ROOT / "pyproject.toml")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for case in cases.every(quick=True):
        for one in case.make(True).implementations:
            assert not one.name.isascii() or f", {one.name}]" in done.stdout
