"""fastsal.evaluate in one process: the table beside analyze, forms of data, and arguments."""

import dataclasses
import json
import math
import re

import numpy as np
import pyarrow.parquet
import pytest
import torch
from evaluation.small import BATCH, Items, N, assert_same, evaluate, table
from torch.utils.data import TensorDataset

import fastsal
from fastsal.evaluation import batches as batches_module
from fastsal.evaluation import shards, sharing
from fastsal.evaluation.batches import Analysis, Batches
from fastsal.evaluation.evaluate import _options, in_memory
from fastsal.evaluation.tables import MISSING

pytestmark = pytest.mark.usefixtures("one_thread")


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
        assert about["made_from"]["method"] == "Auto()"
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
        geometry = fastsal.load(tmp_path)
        for name in MISSING:
            value = getattr(geometry, name)
            want = columns[name]
            assert np.array_equal(value.numpy(), want) if isinstance(value, torch.Tensor) else {value} == set(want)
        assert geometry.distances is geometry.saliency is geometry.binarized_saliency is None
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"results: .* holds no results"):
            fastsal.load(tmp_path / "empty")

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
            ({"batch_size": 0}, "batch_size: got 0, wants None or an integer >= 1"),
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


class TestKept:
    def test_arrays_are_those_of_analyze(self, model, data, x, tmp_path):
        keep = ["saliency", "distances", "binarized_saliency"]
        evaluate(model, data, tmp_path, keep=keep)
        want = fastsal.cat(fastsal.analyze(model, part, keep_saliency=True) for part in x.split(BATCH))
        assert fastsal.load(tmp_path) == want
        shards.shards(tmp_path)[3].unlink()
        model.calls = 0
        evaluate(model, data, tmp_path, keep=keep)
        assert 0 < model.calls < 10
        assert fastsal.load(tmp_path) == want
        evaluate(model, data, tmp_path / "one", keep=keep, save_every=1e6)
        assert fastsal.load(tmp_path / "one") == want

    def test_a_bad_example_is_nan_in_them(self, model, data, x, tmp_path):
        model.hated = x.flatten(1)[10, :1].clone()
        with pytest.warns(UserWarning, match="example 10"):
            evaluate(model, data, tmp_path, keep=["distances", "saliency"])
        found = fastsal.load(tmp_path)
        rows = found.distances.isnan().all(1), found.saliency.isnan().flatten(1).all(1), found.prediction == -1
        assert [row.nonzero().tolist() for row in rows] == [[[10]]] * 3
        assert found.binarized_saliency is None

    def test_distances_make_auto_exact(self, x, tmp_path):
        torch.manual_seed(0)
        many = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 150), torch.nn.Tanh())
        assert evaluate(many, x[:9], tmp_path / "a", keep=["distances"]).method == "exact"
        assert evaluate(many, x[:9], tmp_path / "b", keep=["saliency"]).method == "certified"
        assert fastsal.load(tmp_path / "a").distances.shape == (9, 150)
        with pytest.warns(UserWarning, match="distances: None, since method='certified'"):
            assert fastsal.load(tmp_path / "b").distances is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"keep": "distances"},
                "keep: got 'distances', wants some of ['distances', 'saliency', 'binarized_saliency']",
            ),
            ({"keep": ["alignment"]}, "keep: got 'alignment', wants some of"),
            ({"keep": ["distances"], "method": "certified"}, "keep: got 'distances' with method='certified', wants"),
        ],
    )
    def test_what_cannot_be_kept(self, model, data, tmp_path, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluate(model, data, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_arrays_without_their_shard_are_removed(self, model, data, tmp_path):
        evaluate(model, data, tmp_path, keep=["distances"])
        for name in ("distances-000000000-000000099.npy", ".distances-000000000-000000007.npy.3.tmp"):
            (tmp_path / name).write_bytes(b"")
        evaluate(model, data, tmp_path, keep=["distances"])
        arrays = sorted(path.name for path in tmp_path.iterdir() if "distances" in path.name)
        assert arrays == [path.name.replace("examples", "distances")[:-7] + "npy" for path in shards.shards(tmp_path)]


class TestBatches:
    @pytest.mark.parametrize(
        ("n", "shape", "options", "size"),
        [
            (4, (6,), {}, 64),
            (1000, (3, 64, 64), {}, 64),
            (1000, (3, 224, 224), {}, 8),
            (1000, (3, 224, 224), {"method": "exact"}, 1),
            (1000, (3, 224, 224), {"norm": 1}, 1),
            (1000, (3, 64, 64), {"method": "exact"}, 10),
            (10, (3, 224, 224), {"method": "exact"}, 64),
        ],
    )
    def test_are_smaller_where_passes_are_many_and_examples_large(self, n, shape, options, size):
        batches = Batches(torch.zeros(1, *shape), 0)
        Analysis(lambda x: x.flatten(1)[:, :1].expand(-1, n), batches, None, _options(**options))
        assert batches.size == size

    def test_belong_to_the_results(self, model, x, tmp_path, monkeypatch):
        fastsal.evaluate(model, x, tmp_path)
        model.calls = 0
        fastsal.evaluate(model, x, tmp_path)
        assert model.calls == 1  # of the first example
        monkeypatch.setattr(batches_module, "BATCH", 16)
        with pytest.raises(ValueError, match="batch_size was 64, is 16"):
            fastsal.evaluate(model, x, tmp_path)

    def test_progress_within_a_batch(self, model, data, tmp_path, monkeypatch):
        shown = []
        monkeypatch.setattr(sharing.Bar, "reach", lambda self, done: shown.append(done))
        evaluate(model, data, tmp_path, batch_size=40, chunk_size=1)
        assert shown == [10, 20, 30, 40, 40, 41, 42, 43, 45, 45]


class TestAsked:
    """A layer, some classes, and the margins of the labels."""

    def problem(self):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5)).double()
        x, y = torch.randn(23, 6, dtype=torch.float64), torch.randint(5, (23,))
        return model, x, y, torch.utils.data.TensorDataset(x, y)

    def test_equal_to_analyze(self, tmp_path):
        model, x, y, data = self.problem()
        classes = torch.tensor([True, True, False, True, True])
        options = {"layer": "0", "classes": classes}
        summary = fastsal.evaluate(model, data, tmp_path / "out", batch_size=5, target="y", **options)
        found, want = fastsal.load(tmp_path / "out"), fastsal.analyze(model, x, target=y, **options)
        for name in ("linearized_robustness", "runner_up", "prediction", "alignment"):
            torch.testing.assert_close(getattr(found, name), getattr(want, name))
        least = want.linearized_robustness.argsort()[:3].tolist()
        assert [one.index for one in summary.least_robust[:3]] == least
        assert (want.linearized_robustness < 0).any()
        for others in ({"layer": "1"}, {"classes": ~classes | classes}, {"layer": None}):
            with pytest.raises(ValueError, match=next(iter(others))):
                fastsal.evaluate(model, data, tmp_path / "out", batch_size=5, target="y", **(options | others))

    def test_errors(self, tmp_path):
        model, x, _, data = self.problem()
        with pytest.raises(ValueError, match="target: got 'label', wants 'y'"):
            fastsal.evaluate(model, data, tmp_path / "a", target="label")
        with pytest.raises(ValueError, match="target: got 'y', wants data of"):
            fastsal.evaluate(model, x, tmp_path / "b", target="y")
        with pytest.raises(ValueError, match="keep: got saliency maps with a layer"):
            fastsal.evaluate(model, data, tmp_path / "c", layer="0", keep=["saliency"])
