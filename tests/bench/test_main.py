"""`python -m bench` and `pytest bench`: one entry point, and every contestant as a test."""

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


def test_the_entry_point_lists_the_commands_and_refuses_others():
    listed = python_m_bench("--help").stdout
    assert all(f"\n  {command} " in listed for command in COMMANDS)
    refused = python_m_bench("reprot")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"python -m bench: got 'reprot', wants one of {', '.join(COMMANDS)}\n"


def test_without_a_command_it_measures(tmp_path):
    figures = tmp_path / "figures.json"
    done = python_m_bench("--quick", "--only", "no such case", "--json", str(figures))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("s; figures in figures.json\n")


def test_pytest_bench_finds_every_contestant_and_plays_their_seconds_back(run_python):
    done = run_python(
        "-m", "pytest", str(ROOT / "bench"), "--quick", "--collect-only", "-q", "-c", str(ROOT / "pyproject.toml")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for case in cases.every(quick=True):
        for contestant in case.make(True).contestants:
            assert not contestant.name.isascii() or f", {contestant.name}]" in done.stdout
