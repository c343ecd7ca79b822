"""The folder of shards: what a shard says, what is noticed about one, locks."""

import math
import multiprocessing
import re

import numpy as np
import pyarrow.parquet
import pytest

from fastsal.evaluation import shards


def rows(first, last):
    index = np.arange(first, last + 1)
    blank = np.full(len(index), "", dtype=object)
    return {
        "index": index,
        "y": index % 3 - 1,
        "value": index / 2,
        "certified": index > 3,
        "method": blank,
        "error": blank,
    }


def write(folder, first, last, **made_from):
    return shards.write(folder, rows(first, last), {"made_from": made_from})


def test_null_is_not_nan(tmp_path):
    columns = rows(0, 3)
    columns["value"] = np.array([math.nan, math.nan, 1, math.inf], dtype=np.float32)
    columns["name"] = np.array(["a", "b", "c", ""], dtype=object)
    columns["error"] = np.array(["", "bad", "", ""], dtype=object)
    path = shards.write(tmp_path, columns, {"made_from": {}})
    found = pyarrow.parquet.read_table(path)
    assert found["value"].is_null().to_pylist() == [False, True, False, False]
    assert found["certified"].is_null().to_pylist() == [False, True, False, False]
    assert found["y"].to_pylist() == [None, 0, 1, None]
    assert found["name"].to_pylist() == ["a", "b", "c", ""]
    assert found["error"].to_pylist() == [None, "bad", None, None]
    got = shards.read([path])
    assert {name: column.dtype for name, column in got.items()} == {
        name: column.dtype for name, column in columns.items()
    }
    columns["certified"][1] = False
    for name, column in columns.items():
        np.testing.assert_array_equal(got[name], column)


def test_pandas_is_not_needed(tmp_path, run_python):
    """pyarrow before 26 imports it to name a type."""
    columns = rows(0, 3)
    columns["error"][1] = "bad"
    path = shards.write(tmp_path, columns, {"made_from": {}})
    code = (
        "import importlib.abc, pathlib, sys\n"
        "class Blocked(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] == 'pandas':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from fastsal.evaluation import shards\n"
        f"print({{name: column.tolist() for name, column in shards.read([pathlib.Path({str(path)!r})]).items()}})"
    )
    result = run_python("-c", code)
    got = {name: column.tolist() for name, column in shards.read([path]).items()}
    assert result.stdout == f"{got}\n", result.stderr


def test_finished_checks_every_shard(tmp_path):
    paths = [write(tmp_path, first, first + 4, a=1, b="x") for first in (10, 0, 5)]
    assert shards.finished(tmp_path, {"a": 1, "b": "x"}) == [paths[1], paths[2], paths[0]]
    assert [shards.span(path) for path in paths] == [range(10, 15), range(5), range(5, 10)]
    with pytest.raises(ValueError, match=re.escape("a was 1, is 2; c was None, is 3; wants another folder")):
        shards.finished(tmp_path, {"a": 2, "b": "x", "c": 3})
    write(tmp_path, 3, 7, a=1, b="x")
    with pytest.raises(
        ValueError, match=r"000000003-000000007\.parquet holds examples that an earlier shard holds too"
    ):
        shards.finished(tmp_path, {"a": 1, "b": "x"})


def test_a_shard_that_is_none(tmp_path):
    path = write(tmp_path, 0, 4, a=1)
    content = path.read_bytes()
    for damaged in (b"", b"neither fish nor fowl", content[:-10], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000000004\.parquet is no shard of fastsal's .*remove it"):
            shards.record(path)
    pyarrow.parquet.write_table(pyarrow.table({"index": [0]}), path)
    with pytest.raises(ValueError, match="is no shard of fastsal's"):
        shards.record(path)
    path.write_bytes(content)
    shorter = path.rename(tmp_path / "examples-000000000-000000003.parquet")
    with pytest.raises(ValueError, match="holds 5 rows, wants 4"):
        shards.record(shorter)


def hold(folder, alone, ready, leave):
    with shards.locked(folder, alone=alone):
        ready.set()
        leave.wait(60)


@pytest.mark.parametrize("alone", [True, False])
def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path, alone):
    fork = multiprocessing.get_context("fork")
    ready, leave = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path, alone, ready, leave))
    other.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match="out: another run is writing into"), shards.locked(tmp_path, alone=True):
        pass
    if not alone:
        with shards.locked(tmp_path, alone=False):  # of the same run
            pass
    other.kill()
    other.join()
    with shards.locked(tmp_path, alone=True) as share:
        share()
        with shards.locked(tmp_path, alone=False):
            pass


def test_sweep_takes_its_own_only(tmp_path):
    names = (
        ".examples-000000000-000000003.parquet.77.tmp",
        ".other.tmp",
        "examples-000000000-000000003.parquet",
        "a.tmp",
    )
    for name in names:
        (tmp_path / name).touch()
    shards.remove_partial_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
