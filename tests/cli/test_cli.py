"""The command line as a whole: help, exit statuses, `python -m fastsal`, and what importing it costs."""

import fastsal
from fastsal.cli import COMMANDS, main


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastsal {fastsal.__version__}\n"
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 128


def test_without_a_command(capsys):
    assert main([]) == 2
    assert "fastsal demo" in capsys.readouterr().err
    assert main(["dance"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_module(run_python):
    result = run_python("-m", "fastsal", "info")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("fastsal ")


def test_imports_are_light(run_python):
    code = (
        "import sys, torch; before = set(sys.modules); import fastsal.cli\n"
        "print({'sklearn', 'matplotlib', 'tqdm', 'safetensors', 'foolbox', 'scipy'} & (set(sys.modules) - before))"
    )
    assert run_python("-c", code).stdout == "set()\n"
