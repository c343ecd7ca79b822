"""A run resumes with what is missing, whenever it was killed, and refuses results of anything else."""

import copy
import errno
import importlib.metadata
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
import torch
from evaluation.small import BATCH, Items, N, Network, assert_same, evaluate, table
from torch import nn
from torch.utils.data import TensorDataset

import fastsal
from fastsal.evaluation import shards
from fastsal.evaluation.sharing import Work

pytestmark = pytest.mark.usefixtures("one_thread")


def test_does_what_is_missing_only(model, data, tmp_path):
    want = evaluate(model, data, tmp_path)
    before, model.calls = table(tmp_path), 0
    assert evaluate(model, data, tmp_path) == want
    assert model.calls == 0
    lost = shards.shards(tmp_path)[2]
    lost.unlink()
    (tmp_path / f".{lost.name}.123.tmp").write_text("half of it")
    (tmp_path / "notes.txt").write_text("mine")
    assert evaluate(model, data, tmp_path) == want
    assert model.calls == 4  # the first example; of the batch the first three, all, and the others without a graph
    assert_same(table(tmp_path), before)
    assert sorted(path.name for path in tmp_path.iterdir() if "tmp" in path.name or "txt" in path.name) == ["notes.txt"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda o: o["model"].layers[1].weight.data[0].mul_(1 + 1e-6), ["parameters"]),
        (lambda o: o["model"].register_buffer("running", torch.zeros(1)), ["parameters"]),
        (lambda o: o["model"].layers.__setitem__(2, nn.ReLU()), ["model"]),
        (lambda o: o["model"].double(), ["parameters"]),
        (lambda o: o.update(data=TensorDataset(o["data"].tensors[0] + 1e-6, o["data"].tensors[1])), ["data"]),
        (lambda o: o.update(data=TensorDataset(o["data"].tensors[0], o["data"].tensors[1] + 1)), ["data"]),
        (lambda o: o.update(data=TensorDataset(*(t[:-1] for t in o["data"].tensors))), ["data", "examples"]),
        (lambda o: o.update(names=["a"] * N), ["data"]),
        (lambda o: o.update(norm="inf"), ["norm"]),
        (lambda o: o.update(method="candidates"), ["method"]),
        (lambda o: o.update(method=fastsal.Exact(memory_limit=7)), ["method"]),
        (lambda o: o.update(batch_size=BATCH + 1), ["batch_size"]),
        (lambda o: o.update(chunk_size=3), ["chunk_size"]),
        (lambda o: o.update(backend="reference"), ["backend"]),
        (lambda o: o.update(keep=["distances"]), ["keep", "method"]),
    ],
)
def test_another_thing_is_refused_and_named(model, data, tmp_path, change, named):
    evaluate(model, data, tmp_path)
    before = table(tmp_path)
    options = {"model": copy.deepcopy(model), "data": data}
    change(options)
    with pytest.raises(ValueError, match=r"out: .* holds results of something else: ") as error:
        evaluate(**options, out=tmp_path)
    assert re.findall(r"(\w+) (?:was .+?, is|differ in) ", str(error.value)) == named
    assert_same(table(tmp_path), before)


def test_the_parameters_that_changed_are_named(model, data, tmp_path):
    evaluate(model, data, tmp_path)
    for name in ("layers.3.bias", "layers.1.weight"):
        changed = copy.deepcopy(model)
        dict(changed.named_parameters())[name].data.add_(1)
        with pytest.raises(ValueError, match=rf"something else: parameters differ in {name}; wants"):
            evaluate(changed, data, tmp_path)
    with pytest.raises(
        ValueError, match=r"differ in layers.1.weight, layers.1.bias, layers.3.weight and 1 more; wants"
    ):
        evaluate(model.double(), data, tmp_path)


def test_another_version_or_precision_is_refused(model, data, tmp_path, monkeypatch):
    evaluate(model, data, tmp_path)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"autocast was None, is 'torch.bf"),
    ):
        evaluate(model, data, tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99")
    with pytest.raises(ValueError, match=f"fastsal was '{fastsal.__version__}', is '99'"):
        evaluate(model, data, tmp_path)


def test_a_full_disk(model, data, tmp_path, monkeypatch):
    want = evaluate(model, data, tmp_path / "want")
    sync, count = os.fsync, iter(range(100))

    def full(descriptor):
        if next(count) >= 4:  # a file and the folder for each shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device, writing into .*; the shards that are there stay"):
            evaluate(model, data, tmp_path / "out")
    assert len(shards.shards(tmp_path / "out")) == 2
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]
    assert evaluate(model, data, tmp_path / "out") == want
    assert_same(table(tmp_path / "out"), table(tmp_path / "want"))


def test_ctrl_c_saves_what_is_finished(model, data, tmp_path):
    class Interrupted(Items):
        def __getitem__(self, index):
            if index == 20:
                raise KeyboardInterrupt
            return data[index]

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, Interrupted([0] * N), tmp_path, save_every=1e6)
    assert [shards.span(path) for path in shards.shards(tmp_path)] == [range(16)]


def test_killed_at_any_moment(data, tmp_path):
    """SIGKILL, again and again, one time in four as the run starts, else soon after it has written something."""
    want = evaluate(Network(), data, tmp_path / "want", batch_size=2)
    moments = random.Random(seed := random.randrange(1 << 32))
    out, kills = tmp_path / "out", 0
    out.mkdir()
    fork = multiprocessing.get_context("fork")
    while len(shards.shards(out)) < 20:
        before = len(shards.shards(out))
        child = fork.Process(target=evaluate, args=(Network(0.002), data, out), kwargs={"batch_size": 2}, daemon=True)
        child.start()
        if moments.random() < 0.25:
            time.sleep(moments.uniform(0, 0.1))
        else:
            while child.exitcode is None and len(shards.shards(out)) == before:
                time.sleep(0.0005)
            time.sleep(moments.uniform(0, 0.02))
        if child.exitcode is not None:
            assert child.exitcode == 0
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
    assert kills, seed
    assert evaluate(Network(), data, out, batch_size=2) == want, seed
    assert_same(table(out), table(tmp_path / "want"))
    assert not [path for path in out.iterdir() if path.suffix == ".tmp"]


def test_a_table_with_holes_is_not_summed_up(model, data, tmp_path, monkeypatch):
    """Work that nobody was dealt (a counter that another call had used up, say) is missed, and done by the next call."""
    dealt = Work.run
    monkeypatch.setattr(Work, "run", lambda self, *rest: (self.missing.pop(), dealt(self, *rest))[1])
    with pytest.raises(RuntimeError, match=r"holds \d+ of \d+ examples after all processes have ended; call again"):
        evaluate(model, data, tmp_path)
    monkeypatch.undo()
    evaluate(model, data, tmp_path)
