"""fastsal info: what is there, and why the rest is not."""

import fastsal
from fastsal.cli import main


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in ("fastsal", "python", "torch", "numpy", "threads", "CUDA devices", "backend reference"):
        assert f"\n{name} " in f"\n{out}"
    for name, state in fastsal.info()["backends"].items():
        assert any(line.startswith(f"backend {name} ") and state in line for line in out.splitlines())
