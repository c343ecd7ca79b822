"""Peak memory of one contestant, in a fresh process: the growth of the resident set from just before the work to its peak."""

import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench import ROOT

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def growth(run: Callable[[], object]) -> int:
    """Bytes by which the peak during `run` exceeds what the process holds before it."""
    gc.collect()
    if not _CLEAR.exists():  # not Linux: only the peak since the process began is known, in bytes on macOS
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    _CLEAR.write_text("5", encoding="ascii")  # the peak starts anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def in_fresh_process(case: str, contestant: str, quick: bool, threads: int) -> int | None:
    """`growth` of the work of a contestant of a registered case, after a warm-up; None where the process did not survive."""
    command = [sys.executable, "-m", "bench.tools.peak_memory", case, contestant]
    command += ["--threads", str(threads), *(["--quick"] if quick else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
