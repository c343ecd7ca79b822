"""A data set by batches of fixed composition, and the rows that a model makes of a batch, bad examples set apart."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from fastsal import methods, validation
from fastsal.analysis import analyze
from fastsal.evaluation.tables import MISSING, NO_CLASS, Columns
from fastsal.files import one_line
from fastsal.model.calling import Model, logits_alone
from fastsal.model.chunking import is_out_of_memory
from fastsal.progress import Report, ignore
from fastsal.tensor.geometry import Geometry

Data = Tensor | Dataset[Any]

BATCH = 64  # examples, by default, or as many as take so many entries of gradients, one for each pass
ENTRIES = 1 << 27
FIRST = 8  # examples, of which one has to be good
WARNED = 10  # bad examples that are named at once; the table names all


@dataclasses.dataclass(frozen=True)
class Batch:
    """Consecutive examples: x [b, *S] of the b that could be read (None for none), which these are, and why the others not."""

    indices: range
    x: Tensor | None
    y: list[int]
    readable: list[int]
    errors: dict[int, str]

    def labels(self, indices: list[int]) -> list[int]:
        """The true classes of some of the examples."""
        return [self.y[index - self.indices[0]] for index in indices]


class Batches(Dataset[Batch]):
    """The data by batch number. It is read in the loader's worker processes, where there are any."""

    def __init__(self, data: Data, size: int) -> None:
        self.data = TensorDataset(data) if isinstance(data, Tensor) else data
        self.size = size
        self.examples = len(cast(Any, self.data))
        self.shape: tuple[int, ...] | None = None  # of every example; None: any

    def __len__(self) -> int:
        return -(-self.examples // self.size)

    def indices(self, number: int) -> range:
        """The examples of a batch."""
        return range(number * self.size, min((number + 1) * self.size, self.examples))

    def example(self, index: int) -> tuple[Tensor, int]:
        """x [*S] and the true class, or NO_CLASS, of one example."""
        item = self.data[index]
        parts = item if isinstance(item, tuple | list) else (item,)
        x = torch.tensor(parts[0]) if isinstance(parts[0], np.ndarray) else parts[0]
        validation.floating("x", x)
        return x, int(parts[1]) if len(parts) > 1 else NO_CLASS

    def __getitem__(self, number: int) -> Batch:
        xs, y, readable, errors = [], [], [], {}
        for index in self.indices(number):
            try:
                one, label = self.example(index)
                if self.shape is not None and one.shape != self.shape:
                    raise ValueError(f"x: got shape {tuple(one.shape)}, wants that of the other examples, {self.shape}")
            except Exception as error:
                errors[index] = one_line(error)
                label = NO_CLASS
            else:
                xs.append(one)
                readable.append(index)
            y.append(label)
        return Batch(self.indices(number), torch.stack(xs) if xs else None, y, readable, errors)


class Analysis:
    """A model on batches: `analyze` with options that stay the same, rows of a table out of it, bad examples set apart.

    A batch size that is not chosen yet, 0, is chosen here, by the first example, the number of classes and the method.
    """

    def __init__(
        self,
        model: Model,
        batches: Batches,
        names: Sequence[str] | None,
        options: dict[str, Any],
        keep: Sequence[str] = (),
    ) -> None:
        self.model, self.batches, self.names, self.options = model, batches, names, options
        self.keep, self.bad = keep, 0
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.example, self.dtype, self.classes, self.label = self._probe()
        self.labelled = self.label != NO_CLASS
        self.of_labels = bool(options.get("target"))
        if self.of_labels and not self.labelled:
            raise ValueError("target: got 'y', wants data of (x, true class)")
        if not batches.size:
            every = isinstance(options["method"], methods.Exact) or options["norm"] == 1
            passes = self.classes if every else min(self.classes, methods.FEW)
            batches.size = max(1, min(BATCH, ENTRIES // (passes * self.example.numel())))
        if batches.size > 1:
            batches.shape = tuple(self.example.shape[1:])

    def _probe(self) -> tuple[Tensor, torch.dtype, int, int]:
        """The first example [1, *S] that the model takes, its dtype, how many classes there are, and its own, or NO_CLASS."""
        weights = self.model.parameters() if isinstance(self.model, nn.Module) else ()
        dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), None)
        problem = ""
        for index in range(min(FIRST, self.batches.examples)):
            try:
                one, label = self.batches.example(index)
            except Exception as error:
                problem = problem or f"data: example {index}: {one_line(error)}"
                continue
            x = one.unsqueeze(0).to(self.device, dtype)
            try:
                return x, x.dtype, logits_alone(self.model, x).shape[1], label
            except Exception as error:
                problem = f"model: on x of shape {tuple(x.shape)}: {one_line(error)}"
        raise RuntimeError(problem)

    def _analyze(self, x: Tensor, y: Sequence[int], report: Report = ignore) -> Geometry:
        saliency = any("saliency" in name for name in self.keep)
        x = x.to(self.device, self.dtype)
        options = self.options | {"target": torch.tensor(y) if self.of_labels else None}
        return analyze(self.model, x, keep_saliency=saliency, progress=report, **options)

    def _complaint(self, x: Tensor, label: int) -> str:
        """What goes wrong with an example, or ""."""
        try:
            self._analyze(x, [label])
        except Exception as error:
            return one_line(error)
        return ""

    def table(self, batch: Batch, report: Report = ignore) -> Columns:
        """A row for every example of a batch. RuntimeError where the model, not an example, is at fault."""
        errors, readable, x = dict(batch.errors), batch.readable, batch.x
        result = None
        if x is None:
            self._blame_the_data(batch)
        else:
            try:
                result = self._analyze(x, batch.labels(readable), report)
            except Exception as error:
                found = self._complaints(batch, x, error)
                errors |= found
                readable = [index for index in readable if index not in found]
                if readable:
                    try:
                        kept = x[[batch.readable.index(index) for index in readable]]
                        result = self._analyze(kept, batch.labels(readable))
                    except Exception as again:
                        raise RuntimeError(self._where(batch, again)) from again
        self._warn(errors)
        return self._columns(batch, readable, result, errors)

    def _where(self, batch: Batch, error: Exception) -> str:
        return f"model: examples {batch.indices[0]} to {batch.indices[-1]}: {one_line(error)}"

    def _complaints(self, batch: Batch, x: Tensor, error: Exception) -> dict[int, str]:
        """Why the examples that the model cannot take alone cannot be analysed; raises where that explains nothing."""
        where = self._where(batch, error)
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise RuntimeError(f"{where}; a smaller batch size or chunk size needs less memory") from error
        examples = zip(batch.readable, x, batch.labels(batch.readable), strict=True)
        each = {index: self._complaint(one.unsqueeze(0), label) for index, one, label in examples}
        found = {index: text for index, text in each.items() if text}
        if not found or (len(found) == len(each) and self._complaint(self.example, self.label)):
            raise RuntimeError(where) from error
        return found

    def _blame_the_data(self, batch: Batch) -> None:
        """Raises where not even the first example can be read any more: the data are gone, not an example bad."""
        for index in range(min(FIRST, self.batches.examples)):
            with contextlib.suppress(Exception):
                self.batches.example(index)
                return
        first, last = batch.indices[0], batch.indices[-1]
        raise RuntimeError(
            f"data: examples {first} to {last}, and by now the first ones too: {batch.errors[batch.indices[0]]}"
        )

    def name(self, index: int) -> str:
        """The example as a message calls it."""
        return f"example {index}" + (f" ({self.names[index]})" if self.names else "")

    def _warn(self, errors: dict[int, str]) -> None:
        for index, text in sorted(errors.items()):
            self.bad += 1
            if self.bad <= WARNED:
                warnings.warn(f"{self.name(index)}: {text}; its row is null", stacklevel=2)
            elif self.bad == WARNED + 1:
                warnings.warn("more examples cannot be analysed; the column error has them all", stacklevel=2)

    def _columns(self, batch: Batch, readable: list[int], result: Geometry | None, errors: dict[int, str]) -> Columns:
        B = len(batch.indices)
        rows = np.asarray(readable, dtype=np.int64) - batch.indices[0]
        precision = str(validation.output_dtype(self.dtype)).removeprefix("torch.")
        columns: Columns = {"index": np.arange(batch.indices[0], batch.indices[-1] + 1)}
        if self.names:
            columns["name"] = np.array([self.names[index] for index in batch.indices], dtype=object)
        if self.labelled:
            columns["y"] = np.array(batch.y, dtype=np.int64)
        for name, missing in MISSING.items():
            kind: Any = {int: np.int64, bool: np.bool_, str: object}.get(type(missing), precision)
            column = np.full(B, missing, dtype=np.float64 if name == "failure_probability" else kind)
            if result is not None:
                value = getattr(result, name)
                column[rows] = value.cpu().numpy() if isinstance(value, Tensor) else value
            columns[name] = column
        for name in self.keep:
            shape = (self.classes,) if name == "distances" else self.example.shape[1:]
            columns[name] = np.full((B, *shape), math.nan, dtype=precision)
            if result is not None:
                columns[name][rows] = getattr(result, name).float().cpu().numpy()
        columns["error"] = np.array([errors.get(index, "") for index in batch.indices], dtype=object)
        return columns
