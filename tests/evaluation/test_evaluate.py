"""fastsal.evaluate in one process: the table beside analyze, bad examples, what is noticed, and kills at any moment."""

import copy
import dataclasses
import errno
import importlib.metadata
import json
import math
import multiprocessing
import os
import random
import re
import signal
import time
import warnings

import numpy as np
import pyarrow.parquet
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import fastsal
from fastsal.evaluation import in_memory, load, shards
from fastsal.evaluation.batches import MISSING

pytestmark = pytest.mark.usefixtures("one_thread")

N, BATCH = 45, 8


@pytest.fixture
def x():
    return torch.randn(N, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data(x):
    return TensorDataset(x, torch.arange(N) % 4)


class Network(nn.Module):
    """A small network that counts its calls, takes its time, and raises on examples that begin with a given value."""

    def __init__(self, pause=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.calls, self.pause, self.hated, self.down = 0, pause, torch.empty(0), False

    def forward(self, x):
        self.calls += 1
        time.sleep(self.pause)
        if self.down:
            raise ArithmeticError("the model is down")
        if torch.isin(x.detach().flatten(1)[:, 0], self.hated).any():
            raise ArithmeticError("cannot take this")
        return self.layers(x)


@pytest.fixture
def model():
    return Network()


def evaluate(model, data, out, **options):
    return fastsal.evaluate(model, data, out, **{"batch_size": BATCH, "save_every": 0, "progress": False, **options})


def table(folder):
    return shards.read(shards.shards(folder))


def assert_same(got, want):
    assert list(got) == list(want)
    for name, values in want.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values, err_msg=name)


class Items(Dataset):
    """Examples as a list holds them; an exception is raised."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class TestTable:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"norm": "inf", "chunk_size": 2},
            {"method": "candidates", "norm": 1},
            {"method": fastsal.Certified()},
            {"method": "certified", "norm": "inf"},
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_what_analyze_returns_batch_by_batch(self, model, data, x, tmp_path, options, dtype):
        model.to(dtype)
        summary = evaluate(model, data, tmp_path, **options, names=[f"n{i}" for i in range(N)])
        got = table(tmp_path)
        parts = [fastsal.analyze(model, part.to(dtype), **options) for part in x.split(BATCH)]
        assert list(got) == ["index", "name", "y", *MISSING, "error"]
        fields = [field.name for field in dataclasses.fields(fastsal.Geometry)]
        assert [name for name in fields if name not in MISSING] == ["distances", "saliency", "binarized_saliency"]
        for name in set(MISSING) - {"method", "failure_probability"}:
            want = torch.cat([getattr(part, name) for part in parts]).numpy()
            assert got[name].dtype == want.dtype
            np.testing.assert_array_equal(got[name], want)
        assert set(got["method"]) == {parts[0].method} == {summary.method}
        assert set(got["failure_probability"]) == {parts[0].failure_probability}
        assert got["index"].tolist() == list(range(N))
        assert got["y"].tolist() == [i % 4 for i in range(N)]
        assert got["name"].tolist() == [f"n{i}" for i in range(N)]
        assert set(got["error"]) == {""}

    def test_is_read_by_any_reader_of_parquet(self, model, data, tmp_path):
        evaluate(model, data, tmp_path)
        found = pyarrow.parquet.read_table(tmp_path)
        assert found["index"].to_pylist() == list(range(N))
        assert found["error"].null_count == N
        about = json.loads(found.schema.metadata[b"fastsal"])
        assert (about["shape"], about["classes"], about["torch"]) == ([2, 3], 4, torch.__version__)
        assert about["made_from"]["method"] == "Exact(head=None, memory_limit=1073741824)"
        assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == [
            f"examples-{start:09}-{min(start + BATCH, N) - 1:09}.parquet" for start in range(0, N, BATCH)
        ]

    def test_takes_every_form_of_data(self, model, data, x, tmp_path):
        evaluate(model, data, tmp_path / "pairs")
        want = table(tmp_path / "pairs")
        pairs = [(one.numpy(), np.int64(i % 4)) for i, one in enumerate(x)]
        for name, form in {"list": Items(pairs), "workers": data}.items():
            evaluate(model, form, tmp_path / name, workers=2 if name == "workers" else 0)
            assert_same(table(tmp_path / name), want)
        del want["y"]
        for name, form in {"tensor": x, "single": TensorDataset(x), "plain": Items(list(x))}.items():
            assert evaluate(model, form, tmp_path / name).all.accuracy is None
            assert_same(table(tmp_path / name), want)

    def test_shards_are_as_long_as_save_every(self, model, data, tmp_path):
        evaluate(model, data, tmp_path / "one", save_every=1e6)
        evaluate(model, data, tmp_path / "many")
        assert [path.name for path in shards.shards(tmp_path / "one")] == ["examples-000000000-000000044.parquet"]
        assert_same(table(tmp_path / "one"), table(tmp_path / "many"))

    def test_in_memory_and_load(self, model, data, tmp_path):
        summary = evaluate(model, data, tmp_path)
        columns, same = in_memory(model, data, batch_size=BATCH)
        assert_same(columns, table(tmp_path))
        assert same == summary
        geometry = load(tmp_path)
        for name in MISSING:
            value = getattr(geometry, name)
            want = columns[name]
            assert np.array_equal(value.numpy(), want) if isinstance(value, torch.Tensor) else {value} == set(want)
        assert geometry.distances is geometry.saliency is geometry.binarized_saliency is None
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"results: .* holds no results"):
            load(tmp_path / "empty")

    def test_progress_where_it_is_wanted(self, model, data, tmp_path, capsys):
        evaluate(model, data, tmp_path)
        shards.shards(tmp_path)[0].unlink()
        assert capsys.readouterr() == ("", "")
        evaluate(model, data, tmp_path, progress=True)
        out, err = capsys.readouterr()
        assert (out, "37/45" in err, "45/45" in err, "example/s" in err) == ("", True, True, True)

    def test_callables(self, model, data, tmp_path):
        evaluate(model.layers.forward, data, tmp_path / "bound")
        evaluate(model, data, tmp_path / "module")
        assert_same(table(tmp_path / "bound"), table(tmp_path / "module"))


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size: got 0, wants an integer >= 1"),
            ({"save_every": -1}, "save_every: got -1, wants seconds from 0"),
            ({"save_every": math.nan}, "save_every: got nan"),
            ({"norm": 3}, "norm: got 3"),
            ({"norm": 1, "method": "certified"}, "norm: got 1 with method='certified', wants"),
            ({"method": "guess"}, "method: got 'guess'"),
            ({"names": ["a"]}, "names: got 1, wants one for each of the 45 examples"),
            ({"data": torch.empty(0, 3)}, "data: holds no example"),
        ],
    )
    def test_are_checked_first(self, model, data, tmp_path, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluate(model, **{"data": data, "out": tmp_path / "out", **options})
        assert model.calls == 0
        assert not (tmp_path / "out").exists()

    def test_data_of_another_kind(self, model, tmp_path):
        with pytest.raises(TypeError, match="data: got list_iterator, wants a tensor or a map-style Dataset"):
            evaluate(model, iter([1]), tmp_path)
        for item, text in ((torch.zeros(2, 3, dtype=torch.uint8), "x: got dtype torch.uint8"), ("x", "x: got str")):
            with pytest.raises(RuntimeError, match=f"data: example 0: TypeError: {text}, wants"):
                evaluate(model, Items([item] * 3), tmp_path)
        assert shards.shards(tmp_path) == []

    def test_a_model_that_takes_no_example(self, model, tmp_path):
        with pytest.raises(RuntimeError, match=r"model: on x of shape \(1, 7\): RuntimeError: mat1 and mat2"):
            evaluate(model, torch.zeros(5, 7), tmp_path)
        with pytest.raises(RuntimeError, match=r"model: examples 0 to 7: ValueError: backend: got 'abacus', wants"):
            evaluate(model, torch.zeros(9, 6), tmp_path, backend="abacus")

    def test_random_data(self, model, tmp_path):
        class Augmented(Items):
            def __getitem__(self, index):
                return torch.randn(6)

        with pytest.raises(ValueError, match="data: example 0 is not the same when read twice"):
            evaluate(model, Augmented([0] * 9), tmp_path)

    def test_without_pyarrow(self, model, data, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        with pytest.raises(ImportError, match=r"pip install 'fastsal\[dataset\]'"):
            evaluate(model, data, tmp_path)


class TestBadExamples:
    def test_are_named_counted_and_null(self, model, x, tmp_path):
        items = [(one, i % 4) for i, one in enumerate(x)]
        items[3] = OSError("torn\nfile")
        items[20] = (x[20, :, :2], 0)
        items[21] = (x[21], "a cat")
        for i in range(24, 32):  # a batch of its own
            items[i] = ValueError(f"no {i}")
        model.hated = x[[0, 44], 0, 0]
        bad = {0, 3, 20, 21, *range(24, 32), 44}
        with pytest.warns(UserWarning, match="row is null|column error") as caught:
            summary = evaluate(model, Items(items), tmp_path, names=[f"n{i}" for i in range(N)])
        texts = [str(warning.message) for warning in caught]
        assert texts[0].startswith("example 0 (n0): ArithmeticError: cannot take this (")
        assert texts[1].startswith("example 3 (n3): OSError: torn file (")
        assert "x: got shape (2, 2), wants that of the other examples, (2, 3)" in texts[2]
        assert len(texts) == 11  # ten, and that there are more
        assert "the column error has them all" in texts[10]
        found = pyarrow.parquet.read_table(tmp_path).to_pydict()
        for name in MISSING:
            assert {i for i, value in enumerate(found[name]) if value is None} == bad, name
        assert {i for i, value in enumerate(found["error"]) if value is not None} == bad
        assert {i for i, value in enumerate(found["y"]) if value is None} == bad - {0, 44}
        assert (summary.failed, [one.index for one in summary.failures]) == (len(bad), sorted(bad)[:10])
        assert summary.all.examples == N - len(bad)
        assert "not analysed, their rows are null: 13 of 45 examples, 0 (n0), 3 (n3)," in str(summary)
        assert torch.isnan(load(tmp_path).linearized_robustness).nonzero().flatten().tolist() == sorted(bad)
        # the others are what they are in a batch without them
        good = [i for i in range(8) if i not in bad]
        want = fastsal.analyze(model, x[good])
        np.testing.assert_array_equal(table(tmp_path)["bound"][good], want.bound)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what is finished is not said again
            assert evaluate(model, Items(items), tmp_path, names=[f"n{i}" for i in range(N)]) == summary

    def test_a_batch_of_one_may_be_bad(self, model, x, tmp_path):
        model.hated = x[[0, 5], 0, 0]
        with pytest.warns(UserWarning, match="cannot take this"):
            assert evaluate(model, x[:7], tmp_path, batch_size=1).failed == 2

    def test_shapes_may_differ_in_batches_of_one(self, tmp_path):
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        images = [torch.rand(1, 5 + i, 7) for i in range(4)]
        evaluate(model, Items(images), tmp_path, batch_size=1)
        want = torch.cat([fastsal.analyze(model, image[None]).alignment for image in images])
        np.testing.assert_array_equal(table(tmp_path)["alignment"], want)

    def test_a_model_that_breaks_down_ends_the_run(self, model, data, tmp_path):
        want = evaluate(model, data, tmp_path / "want")

        class Failing(Items):
            def __getitem__(self, index):
                model.down = index >= 20
                return data[index]

        with pytest.raises(RuntimeError, match="model: examples 16 to 23: ArithmeticError: the model is down"):
            evaluate(model, Failing([0] * N), tmp_path / "out", save_every=1e6)
        assert [path.name for path in shards.shards(tmp_path / "out")] == ["examples-000000000-000000015.parquet"]
        model.down = False
        assert evaluate(model, data, tmp_path / "out") == want
        assert_same(table(tmp_path / "out"), table(tmp_path / "want"))

    def test_a_failure_of_the_batch_alone_ends_the_run(self, tmp_path):
        class Mixing(nn.Linear):
            def forward(self, x):
                return super().forward(x) - x.mean()

        with pytest.raises(RuntimeError, match="examples 0 to 7: ValueError: model: mixes the examples of a batch"):
            evaluate(Mixing(6, 3), torch.randn(20, 6), tmp_path)

    def test_out_of_memory(self, model, data, tmp_path, monkeypatch):
        def full(*_, **__):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(fastsal.evaluation.batches, "analyze", full)
        with pytest.raises(
            RuntimeError, match=r"examples 0 to 7: .*; a smaller batch size or chunk size needs less memory"
        ):
            evaluate(model, data, tmp_path)

    def test_data_that_are_gone_end_the_run(self, model, x, tmp_path):
        class Vanishing(Items):
            def __getitem__(self, index):
                self.gone = getattr(self, "gone", False) or index == 16
                if self.gone and len(shards.shards(tmp_path)) == 2:
                    raise FileNotFoundError("no such folder")
                self.gone = False
                return x[index]

        with pytest.raises(
            RuntimeError, match="data: examples 16 to 23, and by now the first ones too: FileNotFoundError"
        ):
            evaluate(model, Vanishing([0] * N), tmp_path)
        assert len(shards.shards(tmp_path)) == 2


class TestResume:
    def test_does_what_is_missing_only(self, model, data, tmp_path):
        want = evaluate(model, data, tmp_path)
        before, model.calls = table(tmp_path), 0
        assert evaluate(model, data, tmp_path) == want
        assert model.calls == 0
        lost = shards.shards(tmp_path)[2]
        lost.unlink()
        (tmp_path / f".{lost.name}.123.tmp").write_text("half of it")
        (tmp_path / "notes.txt").write_text("mine")
        assert evaluate(model, data, tmp_path) == want
        assert model.calls == 3  # the first example, the check that examples are independent, the batch
        assert_same(table(tmp_path), before)
        assert sorted(path.name for path in tmp_path.iterdir() if "tmp" in path.name or "txt" in path.name) == [
            "notes.txt"
        ]

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda o: o["model"].layers[1].weight.data[0].mul_(1 + 1e-6), ["model"]),
            (lambda o: o["model"].register_buffer("running", torch.zeros(1)), ["model"]),
            (lambda o: o["model"].layers.__setitem__(2, nn.ReLU()), ["model"]),
            (lambda o: o["model"].double(), ["model"]),
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
        ],
    )
    def test_another_thing_is_refused_and_named(self, model, data, tmp_path, change, named):
        evaluate(model, data, tmp_path)
        before = table(tmp_path)
        options = {"model": copy.deepcopy(model), "data": data}
        change(options)
        with pytest.raises(ValueError, match=r"out: .* holds results of something else: ") as error:
            evaluate(**options, out=tmp_path)
        assert re.findall(r"(\w+) was .+?, is ", str(error.value)) == named
        assert_same(table(tmp_path), before)

    def test_another_version_or_precision_is_refused(self, model, data, tmp_path, monkeypatch):
        evaluate(model, data, tmp_path)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match=r"autocast was None, is 'torch.bf"),
        ):
            evaluate(model, data, tmp_path)
        monkeypatch.setattr(importlib.metadata, "version", lambda _: "99")
        with pytest.raises(ValueError, match=f"fastsal was '{fastsal.__version__}', is '99'"):
            evaluate(model, data, tmp_path)

    def test_a_full_disk(self, model, data, tmp_path, monkeypatch):
        want = evaluate(model, data, tmp_path / "want")
        sync, count = os.fsync, iter(range(100))

        def full(descriptor):
            if next(count) >= 4:  # a file and the folder for each shard
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                OSError, match=r"No space left on device, writing into .*; the shards that are there stay"
            ):
                evaluate(model, data, tmp_path / "out")
        assert len(shards.shards(tmp_path / "out")) == 2
        assert not [path for path in (tmp_path / "out").iterdir() if path.suffix == ".tmp"]
        assert evaluate(model, data, tmp_path / "out") == want
        assert_same(table(tmp_path / "out"), table(tmp_path / "want"))

    def test_ctrl_c_saves_what_is_finished(self, model, data, tmp_path):
        class Interrupted(Items):
            def __getitem__(self, index):
                if index == 20:
                    raise KeyboardInterrupt
                return data[index]

        with pytest.raises(KeyboardInterrupt):
            evaluate(model, Interrupted([0] * N), tmp_path, save_every=1e6)
        assert [shards.span(path) for path in shards.shards(tmp_path)] == [range(16)]

    def test_killed_at_any_moment(self, data, tmp_path):
        """SIGKILL, again and again, one time in four as the run starts, else soon after it has written something."""
        want = evaluate(Network(), data, tmp_path / "want", batch_size=2)
        moments = random.Random(seed := random.randrange(1 << 32))
        out, kills = tmp_path / "out", 0
        out.mkdir()
        fork = multiprocessing.get_context("fork")
        while len(shards.shards(out)) < 20:
            before = len(shards.shards(out))
            child = fork.Process(
                target=evaluate, args=(Network(0.002), data, out), kwargs={"batch_size": 2}, daemon=True
            )
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
