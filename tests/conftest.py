"""Makes every test see the installed package, and gives tests a fresh interpreter that sees the same one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Threads that spin while they wait cost a busy machine more than the tests do. libgomp reads this when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["MPLBACKEND"] = "agg"  # figures without a display

# `python -m pytest` puts the checkout first: its ./fastsal shadows the installed one and, unless they were built in
# place, lacks the native modules.
if not list((ROOT / "fastsal").glob("_cpu.*")):
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
sys.path.append(str(ROOT))  # for bench; last, so that fastsal stays the installed one


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread, for a file of many small operations: a second thread would only wait, for long on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in forward mode, as a convolutional network's, for every model."""
    monkeypatch.setattr("fastsal.model.products.FEW", -1.0)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python(*arguments, **environment)`: a fresh interpreter in an empty folder, with this process's fastsal."""
    import fastsal

    package_home = str(Path(fastsal.__file__).resolve().parent.parent)
    search = os.pathsep.join(filter(None, (package_home, os.environ.get("PYTHONPATH"))))

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": search, **environment},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )

    return run


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, of which the tests need data sets and models alone."""
    pytest.importorskip("PIL")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    from bench.baselines.zoo import mend_torchvision

    return mend_torchvision()
