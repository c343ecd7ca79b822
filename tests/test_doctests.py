"""Every example runs: those in docstrings of the installed package, and those of the guides."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fastsal

NATIVE = ("fastsal._cpu", "fastsal._cuda")
MODULES = ["fastsal", *(module.name for module in pkgutil.walk_packages(fastsal.__path__, "fastsal."))]
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", [name for name in MODULES if name not in NATIVE and not name.endswith("__main__")])
def test_examples(name):
    if "triton" in name:
        pytest.importorskip("triton")
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.parametrize("guide", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_guides(guide):
    """The sessions of a guide, which say what comes out."""
    assert doctest.testfile(str(guide), module_relative=False).failed == 0


def test_toy_theory_is_among_the_examples():
    assert doctest.testfile(str(ROOT / "docs" / "quantities.md"), module_relative=False).attempted > 5


def test_readme():
    """The README's Python, from first to last in one session."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 2
    exec("".join(blocks), {})
