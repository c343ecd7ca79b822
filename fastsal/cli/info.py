"""show what a report of a failure needs: versions, processor, threads, devices, settings, which backends can run and why not"""

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import fastsal
from fastsal.model import private

PACKAGES = (
    "captum",
    "foolbox",
    "matplotlib",
    "pandas",
    "pyarrow",
    "safetensors",
    "timm",
    "torchattacks",
    "torchvision",
)
SETTINGS = ("CUDA_", "FASTSAL_", "GOMP_", "KMP_", "MKL_", "OMP_", "OPENBLAS_", "PYTORCH_", "TORCH_", "TRITON_")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds none: the command has no options."""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    if not torch.cuda.is_available():
        return f"none (torch is built {'for CUDA ' + torch.version.cuda if torch.version.cuda else 'without CUDA'})"
    properties = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{one.name} (sm_{one.major}{one.minor})" for one in properties)


def _lines(file: str) -> list[str]:
    """The lines of a file of Linux's; none elsewhere."""
    path = Path(file)
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _processor() -> str:
    named = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return f"{next(named, platform.processor() or 'unknown')}, {os.cpu_count()} threads"


def _openmp() -> str:
    """The OpenMP libraries in this process: of two, each keeps threads of its own, which wait for work at each other's cost."""
    files = {line.split()[-1] for line in _lines("/proc/self/maps") if "/lib" in line}
    found = sorted(file for file in files if Path(file).name.startswith(("libgomp", "libomp", "libiomp")))
    return ", ".join(found) or "unknown"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def run(arguments: argparse.Namespace) -> int:
    """Prints all of it; returns 0."""
    found = fastsal.info()
    lines = {
        "fastsal": f"{fastsal.__version__} in {Path(fastsal.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "processor": _processor(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "other packages": ", ".join(
            f"{name} {_version(name)}" for name in PACKAGES if _version(name) != "not installed"
        ),
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads())",
        "OpenMP": _openmp(),
        "traces": private.MISSING or "available",
        "settings": " ".join(
            f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)
        ),
        "CUDA devices": _devices(),
    }
    for backend, state in found["backends"].items():
        lines[f"backend {backend}"] = state if state == "available" else f"not available: {state}"
        for name, value in found.get(backend, {}).items():
            lines[f"  {name}"] = _text(value)
    for name, text in lines.items():
        print(f"{name:18} {text}".rstrip())
    return 0
