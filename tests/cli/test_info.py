"""fastsal info: what is there, and why the rest is not."""

import sys

import pytest

import fastsal
from fastsal.cli import main


def test_info(capsys, monkeypatch):
    monkeypatch.setenv("OMP_SCHEDULE", "static")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    found = {line[:18].strip(): line[19:] for line in out.splitlines()}
    for name in ("fastsal", "python", "processor", "torch", "numpy", "threads", "CUDA devices", "backend reference"):
        assert found[name]
    assert found["traces"] == "available"
    assert "OMP_SCHEDULE=static" in found["settings"].split()
    for name, state in fastsal.info()["backends"].items():
        assert any(line.startswith(f"backend {name} ") and state in line for line in out.splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process has loaded from /proc")
def test_torch_and_fastsal_share_one_openmp(run_python):
    """Of two, each keeps threads of its own. Other packages may bring theirs: here there are none."""
    found = run_python("-m", "fastsal", "info").stdout.splitlines()
    if "  openmp           yes" not in found:
        pytest.skip("built without OpenMP")
    (libraries,) = (line for line in found if line.startswith("OpenMP "))
    assert "/torch/lib/libgomp" in libraries
    assert len(libraries.split(", ")) == 1
