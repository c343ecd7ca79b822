"""Work shared by processes: every batch dealt once, and torchrun with real processes on loopback, one of which is killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastsal
from fastsal.evaluation import shards, sharing
from fastsal.evaluation.evaluate import in_memory
from fastsal.evaluation.sharing import Team, Work

MODEL = """
import os, time
import torch
from torch import nn

class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.02 if "RANK" in os.environ else 0)
        if (x > 100).any():
            raise ArithmeticError("too large")
        return super().forward(x)

def make():
    with open(f"pid.{os.environ.get('RANK')}", "w") as file:
        file.write(str(os.getpid()))
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), Slow(6, 8), nn.Tanh(), nn.Linear(8, 4))
"""


class Counting(Team):
    """A team of several in one process: they share the counters."""

    def __init__(self, size, counters):
        super().__init__()
        self.size, self._counters = size, counters

    def count(self, name, amount):
        self._counters[name] = self._counters.get(name, 0) + amount
        return self._counters[name]


class TestDeal:
    @pytest.mark.parametrize("size", [1, 2, 3, 7])
    @pytest.mark.parametrize("pace", [0.0, 1e-9, 0.01, 0.4, 100.0])
    def test_everything_once(self, size, pace):
        """Whatever the order in which the processes come, and however fast they are."""
        missing = sorted({*range(500)} - {*range(0, 500, 7)})
        for left_over in (missing, missing[:1], missing[:size], []):
            counters = {}
            works = [Work(Counting(size, counters), left_over, None, None, 2.0) for _ in range(size)]
            for place, work in enumerate(works):
                work.pace = pace * (1 + place)
            draws = [work._deal() for work in works]
            order = np.random.default_rng(0)
            dealt = []
            while draws:
                draw = draws[order.integers(len(draws))]
                number = next(draw, None)
                if number is None:
                    draws.remove(draw)
                else:
                    dealt.append(number)
            assert sorted(dealt) == left_over

    def test_as_many_at_once_as_fill_half_of_save_every(self):
        work = Work(Counting(2, counters := {}), [*range(1000)], None, None, 10.0)
        work.pace = 0.5
        next(work._deal())
        assert counters["dealt"] == 10

    def test_no_more_than_half_a_fair_share(self):
        work = Work(Counting(4, counters := {}), [*range(80)], None, None, 10.0)
        work.pace = 1e-3
        next(work._deal())
        assert counters["dealt"] == 10

    def test_consecutive_batches_are_saved_together(self):
        saved = []
        work = Work(Team(), [], None, saved.append, 0.0)
        work.waiting = [{"index": np.array(rows)} for rows in ([0, 1], [2, 3], [6, 7], [8], [4, 5])]
        work.flush()
        assert [part["index"].tolist() for part in saved] == [[0, 1, 2, 3], [6, 7, 8], [4, 5]]
        assert work.waiting == []


def test_two_calls_in_one_process_group_count_apart(monkeypatch):
    """Kills: a constant prefix in the store, with which a second call finds the first one's batches dealt already."""
    counted = {}

    class Store:
        def add(self, key, amount):
            counted[key] = counted.get(key, 0) + amount
            return counted[key]

    class Distributed:
        distributed_c10d = SimpleNamespace(_get_default_store=Store)
        is_available = is_initialized = staticmethod(lambda: True)
        get_world_size, get_rank = staticmethod(lambda: 2), staticmethod(lambda: 0)
        broadcast_object_list = staticmethod(lambda values: None)

    monkeypatch.setattr(sharing, "dist", Distributed)
    for _ in range(2):
        work = Work(Team(), [*range(100)], None, None, 1.0)
        assert next(work._deal()) == 0
    assert [*counted.values()] == [1, 1]


@pytest.fixture
def torchrun(tmp_path):
    """`torchrun(N)` starts N processes of the command on loopback, in a session of their own; what is left is killed."""
    home = str(Path(fastsal.__file__).resolve().parent.parent)
    started = []

    def start(processes, *options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            *("-m", "fastsal", "analyze", "--model", "slow:make", "--data", "x.npz", "--out", "results"),
            *("--batch-size", "4", "--save-every", "0", *options),
        ]
        search = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_torchrun_with_a_process_killed_and_another_number_afterwards(torchrun, tmp_path):
    (tmp_path / "slow.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((203, 2, 3)).astype(np.float32), np.arange(203) % 4
    x[[17, 201], 0, 0] = 1000
    np.savez(tmp_path / "x.npz", x=x, y=y)
    results = tmp_path / "results"

    run = torchrun(2)
    deadline = time.monotonic() + 120
    while (
        run.poll() is None and time.monotonic() < deadline and (not results.is_dir() or len(shards.shards(results)) < 3)
    ):
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
    out, err = run.communicate(timeout=120)
    assert run.returncode != 0
    assert out == ""
    assert re.search(r"Signal 9 \(SIGKILL\)|another process of this run has ended", err)
    finished = {path: path.read_bytes() for path in shards.shards(results)}
    assert 3 <= len(finished) < 51

    run = torchrun(3, "--json")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1, err  # two examples are bad
    summary = json.loads(out)  # once, from the first process
    assert [one["index"] for one in summary["failures"]] == [17, 201]
    for path, content in finished.items():
        assert path.read_bytes() == content
    spans = [shards.span(path) for path in shards.shards(results)]
    assert [index for span in spans for index in span] == [*range(203)]

    sys.path.insert(0, str(tmp_path))
    try:
        model = __import__("slow").make()
    finally:
        sys.path.remove(str(tmp_path))
        os.remove("pid.None")
    with pytest.warns(UserWarning, match="too large"):
        columns, want = in_memory(model, Pairs(x, y), batch_size=4)
    got = shards.read(shards.shards(results))
    assert list(got) == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)
    assert summary["all"]["quantities"]["bound"]["median"] == want.all.quantities["bound"].median
    assert summary["examples"] == want.examples == 203


class Pairs(list):
    """x and y as a data set."""

    def __init__(self, x, y):
        super().__init__(zip(x, y, strict=True))
