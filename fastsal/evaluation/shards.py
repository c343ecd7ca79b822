"""A folder of results: Parquet shards, written atomically, each of which says what it was made from. Needs pyarrow.

A shard holds the examples of consecutive batches, in order, and is called after the first and the last of them. So the files
in the order of their names are the table in the order of its index, and any reader of Parquet folders reads it. The
metadata of every shard holds the same record under the key `fastsal`, in JSON: `made_from`, which says what the results
depend on and must be the same in all, and what is worth knowing besides.
"""

import contextlib
import errno
import fcntl
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal.evaluation.tables import KEPT, KEY, NO_CLASS, Columns, arrow, as_arrow
from fastsal.files import LEFT_BEHIND, check_folder, check_same, whole_file

Record = dict[str, Any]
_NAME = re.compile(r"examples-(\d{9,})-(\d{9,})\.parquet")
_ARRAY = re.compile(r"([a-z_]+)-(\d{9,}-\d{9,})\.npy")
_LOCK = ".fastsal-results"  # by which a folder is known as one of these, too
# What stands for null in a column of numpy's, by kind of dtype; NaN needs no filling.
_NULL = {"i": NO_CLASS, "b": False, "O": ""}


def shards(folder: Path) -> list[Path]:
    """The finished shards of a folder, in the order of their examples."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def span(shard: Path) -> range:
    """The examples that a shard holds."""
    found = _NAME.fullmatch(shard.name)
    assert found is not None
    return range(int(found[1]), int(found[2]) + 1)


def record(shard: Path) -> Record:
    """What a shard was made from, after a check that it is whole."""
    parquet = arrow().parquet
    try:
        metadata = parquet.read_metadata(shard)
        found: Record = json.loads(metadata.metadata[KEY.encode()])
        whole = metadata.num_rows == len(span(shard))
    except (KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"out: {shard} is no shard of fastsal's ({error}); remove it to have it done again") from error
    if not whole:
        raise ValueError(f"out: {shard} holds {metadata.num_rows} rows, wants {len(span(shard))}; remove it")
    return found


def check_own(folder: Path, option: str = "out:") -> None:
    """Raises where the folder holds anything and is none that `evaluate` made: what is not fastsal's is never written to."""

    def is_own() -> bool:
        with contextlib.suppress(ValueError):
            return (folder / _LOCK).exists() or bool([record(shard) for shard in shards(folder)[:1]])
        return False

    check_folder(folder, is_own, option)


def finished(folder: Path, made_from: Record) -> list[Path]:
    """The shards of a folder after a check that all were made from the same; ValueError says what differs."""
    found = shards(folder)
    end = 0
    for shard in found:
        if span(shard).start < end:
            raise ValueError(f"out: {shard} holds examples that an earlier shard holds too; remove one of the two")
        end = span(shard).stop
        check_same(folder, record(shard)["made_from"], made_from, "out:")
    return found


@contextlib.contextmanager
def locked(folder: Path, *, alone: bool) -> Iterator[Any]:
    """Holds a lock on the folder, which the system frees when the process ends, however that comes about.

    alone: against every other process, else beside others that share it, waiting for those that do not. Yields a function
    that turns the exclusive lock into a shared one. A second run on the same folder is a RuntimeError. Where the file system
    has no locks, none is held.
    """
    with (folder / _LOCK).open("a") as file:

        def lock(how: int) -> None:
            try:
                fcntl.flock(file, how)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise RuntimeError(f"out: another run is writing into {folder}; wait for it, or end it") from error

        lock(fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        yield lambda: lock(fcntl.LOCK_SH)


def remove_partial_files(folder: Path) -> None:
    """Removes what killed processes left: partial files, and arrays without their shard. Only under an exclusive lock."""
    for path in folder.iterdir():
        found, array = LEFT_BEHIND.fullmatch(path.name), _ARRAY.fullmatch(path.name)
        partial = found and (_NAME.fullmatch(found[1]) or _ARRAY.fullmatch(found[1]))
        if partial or (array and not (folder / f"examples-{array[2]}.parquet").exists()):
            path.unlink(missing_ok=True)


def _array(shard: Path, name: str) -> Path:
    """Where an array of a shard's examples lies."""
    return shard.with_name(shard.name.replace("examples", name)).with_suffix(".npy")


def write(folder: Path, columns: Columns, about: Record) -> Path:
    """Writes one shard. The rows are consecutive examples."""
    first, last = int(columns["index"][0]), int(columns["index"][-1])
    path = folder / f"examples-{first:09}-{last:09}.parquet"
    kept = {name: column for name, column in columns.items() if name in KEPT}
    for name, column in kept.items():  # first, since a shard that is there says that all of it is
        with whole_file(_array(path, name)) as file:
            np.save(file, column)
    columns = {name: column for name, column in columns.items() if name not in kept}
    with whole_file(path) as file:
        arrow().parquet.write_table(as_arrow(columns, about), file)
    return path


def read(found: Sequence[Path]) -> Columns:
    """The columns of shards, one after the other; what is null is NaN, -1, False or ""."""
    parquet = arrow().parquet
    tables = [parquet.ParquetFile(shard).read() for shard in found]
    joined = arrow().concat_tables(tables)
    columns = {}
    for name in joined.column_names:
        values = joined[name]
        kind = values[:0].to_numpy().dtype.kind  # to_pandas_dtype() imports pandas where pyarrow is older than 26
        if values.null_count and kind in _NULL:
            values = values.fill_null(_NULL[kind])
        columns[name] = values.to_numpy()
    return columns


def read_kept(found: Sequence[Path]) -> dict[str, Tensor]:
    """The arrays beside shards, joined, by the name of their field."""
    names = [name for name in KEPT if _array(found[0], name).exists()]
    return {name: torch.from_numpy(np.concatenate([np.load(_array(shard, name)) for shard in found])) for name in names}


def read_kept_one(found: Sequence[Path], name: str, index: int) -> Tensor | None:
    """One example's entry of an array beside shards, or None where it was not kept."""
    for shard in found:
        if index in span(shard) and (path := _array(shard, name)).exists():
            return torch.from_numpy(np.load(path, mmap_mode="r")[index - span(shard).start].copy())
    return None
