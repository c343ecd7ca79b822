"""The JSON file of figures: rewritten after every case, so that a run that dies loses none."""

import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastsal
from bench import ROOT

FILES = "imagenet.json", "bench.json"  # the files of figures that have the form of this module, as the page shows them
PEERS = ("foolbox", "torchattacks", "adversarial-robustness-toolbox", "adv-lib")


def commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty outside git."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "--", "fastsal", "csrc", "bench/*.py", "bench/*.cpp")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


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


def environment() -> dict[str, Any]:
    """The machine and the versions. Figures of other machines or versions do not belong into the same file."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {"python": platform.python_version(), "torch": torch.__version__, "fastsal": fastsal.__version__}
    return {
        "machine": {
            "processor": f"{_processor()} ({platform.machine()})",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory in GiB": round(memory),
            "SIMD": fastsal.info()["cpu"].get("simd", "?"),
            "system": platform.system(),
        },
        "versions": versions | {name: found for name in ("numpy", *PEERS) if (found := _version(name))},
    }


def stores(results: Path) -> "list[Store]":
    """Those of FILES that a folder has."""
    return [Store(results / name) for name in FILES if (results / name).exists()]


class Store:
    """Records of one machine, by case and thread count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment: dict[str, Any] = {}
        self.records: dict[str, dict[str, Any]] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            self.environment, self.records = content["environment"], content["records"]

    def begin(self, fresh: bool) -> None:
        """Before measuring: forgets all records if they are of another machine or of other versions, or if `fresh`."""
        now = environment()
        if fresh or now != self.environment:
            self.environment, self.records = now, {}

    def has(self, key: str, at: str) -> bool:
        """Whether this was measured at this commit, with nothing changed since."""
        return key in self.records and self.records[key]["commit"] == at and not at.endswith("+")

    def put(self, key: str, record: dict[str, Any], at: str) -> None:
        """Keeps a record, on the disk too."""
        self.records[key] = {**record, "commit": at, "date": time.strftime("%Y-%m-%d")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        content = {"environment": self.environment, "records": self.records}
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(self.path)
