"""python bench/tools/kill_resume.py: kills `fastsal analyze` with SIGKILL at random moments and compares what comes of it.

One process is killed and started again 20 times and then left to finish; the same with torchrun and 2, then 3 processes on
loopback, of which one, or all and torchrun too, are killed 5 times each. In the end every table is compared, value for value,
with that of a run that nobody disturbed. The exit status is 1 where any differs. Needs pyarrow.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fastsal.evaluation import shards

EXAMPLES, BATCH = 3003, 4
MODEL = """
import time
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 20))

    def forward(self, x):
        time.sleep({pause})
        return self.layers(x)
"""


class Runs:
    """A folder of its own with a slow model and data, and the commands that are run there."""

    def __init__(self, folder: Path, seed: int, pause: float) -> None:
        self.folder, self.moments = folder, random.Random(seed)
        (folder / "slow.py").write_text(MODEL.replace("{pause}", str(pause)))
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((EXAMPLES, 3, 4, 4)).astype(np.float32)
        np.savez(folder / "x.npz", x=x, y=rng.integers(0, 20, EXAMPLES))

    def start(self, out: str, processes: int) -> subprocess.Popen[bytes]:
        """Starts the command, under torchrun for several processes, in a session of its own."""
        head = [sys.executable]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            head += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            head += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = ["-m", "fastsal", "analyze", "--model", "slow:Network", "--data", "x.npz", "--out", out]
        command += ["--batch-size", str(BATCH), "--save-every", "0.05"]
        return subprocess.Popen(
            head + command,
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def shards(self, out: str) -> int:
        """How many shards there are."""
        return len(shards.shards(self.folder / out)) if (self.folder / out).is_dir() else 0

    def killed(self, out: str, processes: int) -> str:
        """Starts the command and kills it, one time in four as it starts, else while it writes. Says what fell."""
        run, before = self.start(out, processes), self.shards(out)
        if self.moments.random() < 0.25:
            time.sleep(self.moments.uniform(0, 3))
        else:
            while run.poll() is None and self.shards(out) == before:
                time.sleep(0.002)
            time.sleep(self.moments.uniform(0, 0.5))
        if run.poll() is not None:
            return ""
        workers = self._children(run.pid)
        victim = self.moments.randrange(len(workers) + 1)
        fallen = "all" if victim == len(workers) else f"one of {processes}"
        for pid in [run.pid, *workers] if fallen == "all" else [workers[victim]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait()
        return fallen

    def _children(self, parent: int) -> list[int]:
        """The processes that a process has started, which for torchrun are its workers."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                    found.append(int(stat.parent.name))
        return found

    def finish(self, out: str, processes: int) -> dict[str, np.ndarray]:
        """Runs the command to its end and returns the table."""
        run = self.start(out, processes)
        if run.wait() != 0:
            raise SystemExit(f"{out}: the last run ended with status {run.returncode}")
        return shards.read(shards.shards(self.folder / out))


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> bool:
    """Whether two tables agree, value for value, NaN being NaN."""
    return list(got) == list(want) and all(
        got[name].dtype == column.dtype and np.array_equal(got[name], column, equal_nan=column.dtype.kind == "f")
        for name, column in want.items()
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of one process; default: %(default)s")
    parser.add_argument("--group-kills", type=int, default=5, help="of each torchrun; default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31))
    parser.add_argument(
        "--pause", type=float, default=0.004, help="seconds that the model sleeps; default: %(default)s"
    )
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), arguments.seed, arguments.pause)
        want = runs.finish("undisturbed", 1)
        for processes, kills in ((1, arguments.kills), (2, arguments.group_kills), (3, arguments.group_kills)):
            out, fallen, start = f"killed-{processes}", [], time.monotonic()
            while len(fallen) < kills:
                victim = runs.killed(out, processes)
                if not victim:
                    break
                fallen.append(victim)
                print(f"  {processes}: killed {victim}, {runs.shards(out)} shards", flush=True)
            equal = same(runs.finish(out, {1: 1, 2: 3, 3: 2}[processes]), want)
            wrong += not equal or len(fallen) < kills
            print(
                f"{processes} process{'es' if processes > 1 else ''}: {len(fallen)} kills, "
                f"{runs.shards(out)} shards, table {'the same' if equal else 'DIFFERENT'} "
                f"({time.monotonic() - start:.0f} s)",
                flush=True,
            )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
