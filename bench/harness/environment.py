"""The machine, the versions and the commit that figures belong to."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastsal
from bench import ROOT

PACKAGES = ("numpy", "foolbox", "torchattacks", "adversarial-robustness-toolbox", "adv-lib")


def output_of(*command: str) -> str:
    """What a command prints; empty if it fails or is missing."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty outside git."""
    changed = output_of("git", "status", "--porcelain", "--", "fastsal", "csrc", "bench/*.py", "bench/*.cpp")
    return output_of("git", "rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "GPU": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "GPU memory in GiB": round(properties.total_memory / 2**30),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": (output_of("nvcc", "--version").splitlines() or [""])[-1],
    }


def environment(device: str = "cpu") -> dict[str, Any]:
    """The machine and the versions. Figures of other machines or versions do not belong into the same file."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = (*PACKAGES, "triton") if device == "cuda" else PACKAGES
    versions = {"python": platform.python_version(), "torch": torch.__version__, "fastsal": fastsal.__version__}
    return {
        "machine": {
            "processor": f"{_processor()} ({platform.machine()})",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory in GiB": round(memory),
            **({"SIMD": fastsal.info()["cpu"].get("simd", "?")} if device == "cpu" else _gpu()),
            "system": platform.system(),
        },
        "versions": versions | {name: found for name in packages if (found := _version(name))},
    }
