"""The CUDA kernels on the CPU. As a pytest plugin: every test of `cases.each_target` runs on them.

FASTSAL_EMULATED_CUDA names the module that `build` made. The tests' device stays "cpu"; only the launch context is
replaced in fastsal/tensor/backends/cuda.py, so that its own code runs too.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("c++")


def build(folder: Path) -> Path:
    """csrc/cuda as a module for the CPU, in `folder`."""
    import pybind11

    includes = [ROOT / "csrc/include", ROOT / "csrc/cuda", ROOT / "tests/cuda_emulation", pybind11.get_include()]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    flags += [f"-I{path}" for path in (*includes, sysconfig.get_paths()["include"])]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.name}.o")
        subprocess.run([str(COMPILER), *flags, "-x", "c++", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "csrc/cuda/bind_cuda.cpp"]))
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([str(COMPILER), "-shared", *objects, "-o", str(module)], check=True)
    return module


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _launching(on: torch.Tensor) -> Iterator[int]:
    yield 0


def replacements(module: ModuleType) -> dict[str, Any]:
    """What fastsal/tensor/backends/cuda.py needs in place of its own to run the emulated module."""
    return {
        "_cuda": module,
        "_reason": "",
        "_launching": _launching,
        "unavailable": lambda: "",
        "why_not": lambda jacobian: "",
    }


def pytest_configure(config: pytest.Config) -> None:
    import cases

    from fastsal.tensor import ops
    from fastsal.tensor.backends import cuda

    for name, value in replacements(load(Path(os.environ["FASTSAL_EMULATED_CUDA"]))).items():
        setattr(cuda, name, value)
    ops.BACKENDS["cuda"] = cuda
    cases.TARGETS[:] = cases.KERNELS[:] = [pytest.param(cases.Target("cuda", "cpu"), id="emulated")]
