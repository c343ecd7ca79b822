"""A table of results by columns: what stands for an example that was not analysed, as a `Geometry`, as a file."""

import dataclasses
import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsal.files import MARK, extra, replacing, write_csv
from fastsal.tensor.geometry import Geometry

# A column [N] for each scalar of Geometry, `index`, perhaps `name` and `y` (the true class), and `error`, which is "" for an
# example that was analysed. For the others the scalars are what MISSING says.
Columns = dict[str, np.ndarray[Any, Any]]
NO_CLASS = -1
KEPT = ("distances", "saliency", "binarized_saliency")  # arrays, kept beside a table if asked for
MISSING: dict[str, Any] = {field.name: math.nan for field in dataclasses.fields(Geometry) if field.name not in KEPT} | {
    "prediction": -1,
    "runner_up": -1,
    "vjps": -1,
    "jvps": -1,
    "certified": False,
    "method": "",
}
KEY = "fastsal"  # of the record in the metadata of a Parquet file


def as_geometry(columns: Columns, **others: Any) -> Geometry:
    """The columns that are called as fields of Geometry, as one on the CPU; fields that are in neither argument are None."""
    fields: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Geometry))
    for name in ("method", "failure_probability"):  # of a Geometry one value each, and no tensor
        if name in columns:
            analysed = columns[name][columns["error"] == ""]
            others[name] = next(iter(analysed[:1].tolist()), MISSING[name])
    tensors = {name: torch.tensor(columns[name]) for name in fields if name in columns and name not in others}
    return Geometry(**fields | tensors | others)


def arrow() -> Any:
    """The module pyarrow, with pyarrow.parquet loaded; ImportError says how to install it."""
    extra("pyarrow.parquet", "'fastsal[dataset]'")
    return importlib.import_module("pyarrow")


def as_arrow(columns: Columns, record: dict[str, Any]) -> Any:
    """The columns as a pyarrow.Table with the record in its metadata; null where an example was not analysed."""
    pa = arrow()
    failed = columns["error"] != ""
    arrays = {}
    for name, values in columns.items():
        null = failed
        if name in ("index", "name"):
            null = np.zeros_like(failed)
        elif name == "y":
            null = values == NO_CLASS
        elif name == "error":
            null = ~failed
        arrays[name] = pa.array(values, mask=null, type=pa.string() if values.dtype.kind in "OU" else None)
    return pa.table(arrays).replace_schema_metadata({KEY: json.dumps(record)})


def write(path: Path, columns: Columns) -> None:
    """A table into one file. Where an example was not analysed, .csv and .parquet leave a gap, .npz the values of `Columns`."""
    failed = columns["error"] != ""
    if not failed.any() and path.suffix != ".parquet":
        columns = {name: column for name, column in columns.items() if name != "error"}
    with replacing(path, columns=tuple(columns)) as file:
        if path.suffix == ".npz":
            texts = {name: column.astype(str) for name, column in columns.items() if column.dtype.kind == "O"}
            np.savez(file, **columns | texts)
            file.seek(-2, os.SEEK_END)  # an empty comment is what a ZIP archive ends with
            file.write(len(MARK).to_bytes(2, "little") + MARK.encode())
        elif path.suffix == ".parquet":
            arrow().parquet.write_table(as_arrow(columns, {"file": MARK}), file)
        else:
            cells = {name: column.tolist() for name, column in columns.items()}
            for name in cells.keys() & MISSING.keys():
                cells[name] = [None if gap else value for gap, value in zip(failed, cells[name], strict=True)]
            write_csv(file, cells, zip(*cells.values(), strict=True))
