"""Every example in a docstring of the installed package runs, and every one of the README."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import fastsal

NATIVE = ("fastsal._cpu", "fastsal._cuda")
MODULES = ["fastsal", *(module.name for module in pkgutil.walk_packages(fastsal.__path__, "fastsal."))]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in NATIVE and not name.endswith("__main__")])
def test_examples(name):
    if "triton" in name:
        pytest.importorskip("triton")
    if name.startswith("fastsal.integrations."):
        pytest.importorskip(name.rpartition(".")[2])
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_readme():
    results = doctest.testfile(str(Path(__file__).resolve().parent.parent / "README.md"), module_relative=False)
    assert results.attempted > 5
    assert results.failed == 0
