"""show versions, native modules, SIMD level, threads, devices, and which backends can run and why the others cannot"""

import argparse
import importlib.metadata
import platform

import torch

import fastsal


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


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def run(arguments: argparse.Namespace) -> int:
    """Prints all of it; returns 0."""
    found = fastsal.info()
    lines = {
        "fastsal": fastsal.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "threads": f"{torch.get_num_threads()} (torch.get_num_threads())",
        "CUDA devices": _devices(),
    }
    for backend, state in found["backends"].items():
        lines[f"backend {backend}"] = state if state == "available" else f"not available: {state}"
        for name, value in found.get(backend, {}).items():
            lines[f"  {name}"] = _text(value)
    for name, text in lines.items():
        print(f"{name:18} {text}")
    return 0
