"""`pytest bench [--quick]`: one test an implementation, over the cases of `python -m bench`."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option of `python -m bench`."""
    parser.addoption("--quick", action="store_true", help="the cases of `python -m bench --quick`")
