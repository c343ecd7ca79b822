"""Examples that cannot be read or analysed are named and null; where the model or the data as such fail, the run ends."""

import warnings

import numpy as np
import pyarrow.parquet
import pytest
import torch
from evaluation.small import Items, N, assert_same, evaluate, table
from torch import nn

import fastsal
from fastsal.evaluation import batches, shards
from fastsal.evaluation.tables import MISSING

pytestmark = pytest.mark.usefixtures("one_thread")


def test_are_named_counted_and_null(model, x, tmp_path):
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
    assert torch.isnan(fastsal.load(tmp_path).linearized_robustness).nonzero().flatten().tolist() == sorted(bad)
    # the others are what they are in a batch without them
    good = [i for i in range(8) if i not in bad]
    want = fastsal.analyze(model, x[good])
    np.testing.assert_array_equal(table(tmp_path)["bound"][good], want.bound)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is finished is not said again
        assert evaluate(model, Items(items), tmp_path, names=[f"n{i}" for i in range(N)]) == summary


def test_a_batch_of_one_may_be_bad(model, x, tmp_path):
    model.hated = x[[0, 5], 0, 0]
    with pytest.warns(UserWarning, match="cannot take this"):
        assert evaluate(model, x[:7], tmp_path, batch_size=1).failed == 2


def test_shapes_may_differ_in_batches_of_one(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    images = [torch.rand(1, 5 + i, 7) for i in range(4)]
    evaluate(model, Items(images), tmp_path, batch_size=1)
    want = torch.cat([fastsal.analyze(model, image[None]).alignment for image in images])
    np.testing.assert_array_equal(table(tmp_path)["alignment"], want)


def test_a_model_that_breaks_down_ends_the_run(model, data, tmp_path):
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


def test_a_failure_of_the_batch_alone_ends_the_run(tmp_path):
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x) - x.mean()

    with pytest.raises(RuntimeError, match="examples 0 to 7: ValueError: model: mixes the examples of a batch"):
        evaluate(Mixing(6, 3), torch.randn(20, 6), tmp_path)


def test_out_of_memory(model, data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(batches, "analyze", full)
    with pytest.raises(
        RuntimeError, match=r"examples 0 to 7: .*; a smaller batch size or chunk size needs less memory"
    ):
        evaluate(model, data, tmp_path)


def test_data_that_are_gone_end_the_run(model, x, tmp_path):
    class Vanishing(Items):
        def __getitem__(self, index):
            self.gone = getattr(self, "gone", False) or index == 16
            if self.gone and len(shards.shards(tmp_path)) == 2:
                raise FileNotFoundError("no such folder")
            self.gone = False
            return x[index]

    with pytest.raises(RuntimeError, match="data: examples 16 to 23, and by now the first ones too: FileNotFoundError"):
        evaluate(model, Vanishing([0] * N), tmp_path)
    assert len(shards.shards(tmp_path)) == 2
