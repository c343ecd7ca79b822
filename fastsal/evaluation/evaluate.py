"""Whole data sets: `evaluate` runs `analyze` on every example, on one process or several, into a folder that survives kills.

Batch b holds the examples from b · batch_size on, whichever process analyses it and whatever is done already, so that the
finished table does not depend on how the work was shared or interrupted. Processes share through torch.distributed: the
first lists what is missing, and a counter in the rendezvous store deals it out, a few batches at a time.
"""

import contextlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal import methods, validation
from fastsal.evaluation import shards
from fastsal.evaluation.batches import Analysis, Batches, Data
from fastsal.evaluation.fingerprint import made_from
from fastsal.evaluation.sharing import Bar, Team, Work
from fastsal.evaluation.summary import Summary, summarize
from fastsal.evaluation.tables import KEPT, Columns, arrow, as_geometry
from fastsal.files import changes
from fastsal.model.calling import Model
from fastsal.tensor import results


def checked(data: Any, batch_size: Any, names: Sequence[str] | None) -> Batches:
    """The data by batches; raises for what is no data set, and for names of other examples."""
    if not isinstance(data, Tensor) and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(f"data: got {type(data).__name__}, wants a tensor or a map-style Dataset (with a length)")
    if batch_size is not None:
        validation.positive("batch_size", batch_size, "None or an integer >= 1")
    batches = Batches(data, batch_size or 0)
    if not batches.examples:
        raise ValueError("data: holds no example, wants at least one")
    if names is not None and len(names) != batches.examples:
        raise ValueError(f"names: got {len(names)}, wants one for each of the {batches.examples} examples")
    return batches


def _options(
    norm: float | str = 2,
    method: str | methods.Method = "auto",
    chunk_size: int | None = None,
    backend: str = "auto",
    **others: Any,
) -> dict[str, Any]:
    """Of `analyze`, those that it takes as they are given and those that are resolved first."""
    p = validation.norm(norm)
    given = {name: value for name, value in others.items() if value is not None}
    if given.get("target", "y") != "y":
        raise ValueError(f"target: got {given['target']!r}, wants 'y' for the true classes, or None")
    return {"norm": p, "method": methods.resolve(method, p), "chunk_size": chunk_size, "backend": backend} | given


def _check_kept(keep: Sequence[str], options: dict[str, Any]) -> None:
    """Raises where what is asked for is not there to be kept. Distances of all classes want "exact", which "auto" becomes."""
    if isinstance(keep, str) or (unknown := [name for name in keep if name not in KEPT]):
        raise ValueError(f"keep: got {keep if isinstance(keep, str) else unknown[0]!r}, wants some of {list(KEPT)}")
    if "layer" in options and any("saliency" in name for name in keep):
        raise ValueError("keep: got saliency maps with a layer, whose shape is not that of x; wants none of them")
    if "distances" in keep and isinstance(options["method"], methods.Auto):
        options["method"] = methods.Exact()
    if "distances" in keep and not isinstance(options["method"], methods.Exact):
        raise ValueError(f"keep: got 'distances' with method={options['method'].name!r}, wants method='exact'")


def evaluate(
    model: Model,
    data: Data,
    out: str | Path,
    *,
    layer: nn.Module | str | None = None,
    classes: Tensor | None = None,
    target: str | None = None,
    norm: float | str = 2,
    method: str | methods.Method = "auto",
    batch_size: int | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
    workers: int = 0,
    save_every: float = 30.0,
    names: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    progress: bool | None = None,
) -> Summary:
    """`analyze` for every example of a data set, into a folder of Parquet shards; called again, it resumes.

    Every shard is written beside, synced and renamed, so that whenever the process is killed, SIGKILL included, the same call
    resumes from the last shard. The batches depend on nothing but `batch_size`, and with the same number of threads so does the
    table, value for value, for any number of kills and processes.

    Where `torch.distributed` is initialised, all processes call this alike and share the work, each with its own copy of the
    model; all get the summary. When one dies the others raise RuntimeError, and a later call with any number resumes.

    Args:
        model: As for `analyze`. A module is used where its parameters are, and x is moved there and takes their dtype.
        data: A map-style `torch.utils.data.Dataset` of x [*S], or of (x, true class), the same each time it is read; or the
            tensor x [N, *S].
        out: The folder, made where it is missing; one that holds anything and was not made by this function is refused. A row
            for each example: `index`, `name` and `y` where given, the scalars of `Geometry`, and `error`, null but for an
            example that could not be read or analysed, where the others are null.
            `fastsal.load(out)` gives it back as one `Geometry`; any reader of Parquet reads it.
        layer: As for `analyze`.
        classes: As for `analyze`, the same for all examples: bool [n].
        target: "y" for the signed margin of each example's true class: the least robust examples are those whose labels the
            model doubts most. None (default) for the predicted one's.
        norm: As for `analyze`.
        method: As for `analyze`.
        batch_size: How many examples are analysed together: what is lost when a run is stopped. Results may differ in the last
            bits with it, so it belongs to the table. None (default) for 64, or for fewer where passes are many and examples
            large: as many as take 2^27 entries of gradients, with n passes each, or 100 where not every class is looked at.
        chunk_size: As for `analyze`.
        backend: As for `analyze`.
        workers: How many processes read the data ahead; with 0 (default) this one reads.
        save_every: Seconds between shards: what a kill costs at most, besides the batch in flight.
        names: Names of the examples, such as their files, for the table and for messages.
        keep: What to keep besides, among "distances", "saliency" and "binarized_saliency": arrays in files of NumPy's beside
            the shards, in float32 for x below that, which `load` puts into the `Geometry`. With distances, "auto" is exact.
        progress: Whether to show a bar (with tqdm); None (default) does in a terminal or a notebook.

    Returns:
        A `Summary`: quartiles of every quantity, for all and for each true class, accuracy, the share
        certified, passes, and the ten least robust examples.

    Raises:
        ValueError: An argument is out of its range; or the folder is not fastsal's, or holds results of another model (its
            text, parameters and buffers; only the name of a callable that is no module), data (their length and a sample),
            option, kind of device or version of fastsal, and the message says what changed.
        TypeError: An argument has the wrong type.
        OSError: The disk is full. What was finished stays.
        RuntimeError: The model fails as such: on examples that it took before, for want of memory, or on a batch of examples
            that it takes one at a time. Or another process of this run has ended.

    Examples:
        >>> import tempfile, torch, fastsal
        >>> _ = torch.manual_seed(0)
        >>> data = torch.utils.data.TensorDataset(torch.rand(100, 6), torch.arange(100) % 3)
        >>> model = torch.nn.Linear(6, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     summary = fastsal.evaluate(model, data, folder)
        ...     geometry = fastsal.load(folder)
        >>> torch.equal(geometry.runner_up, fastsal.analyze(model, data.tensors[0]).runner_up)
        True
        >>> summary.examples, summary.certified, sorted(summary.by_class)
        (100, 1.0, [0, 1, 2])
    """
    if not isinstance(save_every, int | float) or not save_every >= 0:
        raise ValueError(f"save_every: got {save_every!r}, wants seconds from 0")
    options = _options(norm, method, chunk_size, backend, layer=layer, classes=classes, target=target)
    _check_kept(keep, options)
    batches = checked(data, batch_size, names)
    arrow()
    folder = Path(out)
    shards.check_own(folder)
    analysis = None if batches.size else Analysis(model, batches, names, options, keep)
    folder.mkdir(parents=True, exist_ok=True)
    team = Team()
    origin = made_from(model, batches, names, options, keep)
    written: list[str] = []
    with contextlib.ExitStack() as held:
        share = held.enter_context(shards.locked(folder, alone=True)) if team.rank == 0 else None

        def survey() -> tuple[shards.Record, list[str]]:
            shards.remove_partial_files(folder)
            return origin, [shard.name for shard in shards.finished(folder, origin)]

        first, finished = team.decided(survey)
        if first != origin:
            raise ValueError(
                f"process {team.rank} of {team.size} was given something else than the first one (random weights, perhaps): "
                f"{changes(first, origin)}"
            )
        if share is None:
            held.enter_context(shards.locked(folder, alone=False))
        else:
            share()
        done = [index for name in finished for index in shards.span(folder / name)]
        missing = sorted({*range(len(batches))} - {index // batches.size for index in done})
        if missing:
            analysis = analysis or Analysis(model, batches, names, options, keep)
            about: shards.Record = {
                "made_from": origin,
                "shape": list(analysis.example.shape[1:]),
                "classes": analysis.classes,
                "torch": torch.__version__,
            }

            def save(columns: Columns) -> None:
                try:
                    written.append(shards.write(folder, columns, about).name)
                except OSError as error:
                    raise OSError(
                        error.errno,
                        f"{error.strerror or error}, writing into {folder}; the shards that are there stay: put that right "
                        "and call again",
                    ) from error

            with Bar(team, batches.examples, len(done), progress) as bar:
                Work(team, missing, batches, save, save_every).run(analysis, workers, bar)
        found = [folder / name for name in sorted({*finished, *itertools.chain(*team.gathered(written))})]
        if (there := sum(len(shards.span(shard)) for shard in found)) != batches.examples:
            raise RuntimeError(
                f"out: {folder} holds {there} of {batches.examples} examples after all processes have ended; call again for "
                "the others"
            )
        about = shards.record(found[0])
        return summarize(shards.read(found), tuple(about["shape"]), about["classes"], f"{options['norm']:g}")


def in_memory(
    model: Model,
    data: Data,
    *,
    batch_size: int | None = None,
    workers: int = 0,
    names: Sequence[str] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> tuple[Columns, Summary]:
    """What `evaluate` finds, in this process, as one table instead of a folder, and its summary."""
    options = _options(**options)
    batches = checked(data, batch_size, names)
    team = Team()
    if team.size > 1:
        raise ValueError("out: several processes share a folder only, wants one for the results")
    analysis = Analysis(model, batches, names, options)
    parts: list[Columns] = []
    with Bar(team, batches.examples, 0, progress) as bar:
        Work(team, [*range(len(batches))], batches, parts.append, math.inf).run(analysis, workers, bar)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return columns, summarize(columns, tuple(analysis.example.shape[1:]), analysis.classes, f"{options['norm']:g}")


def load(path: str | Path) -> Any:
    """The results that a result's `save` wrote into a file, or `evaluate` into a folder, on the CPU. Nothing is unpickled.

    Those in a folder, which may be still being written, are one `Geometry`, in the order of their index. Examples that were not
    analysed are NaN, with prediction -1. `distances` and saliency maps are those that `evaluate` was told to keep.

    Args:
        path: The file or the folder.

    Returns:
        What was saved: a `Geometry`, `Adversarial` or `PairwiseMargins`. For a folder the `Geometry` of the N examples that are
        there, its tensors [N].

    Raises:
        ValueError: There are no results.
        FileNotFoundError: There is nothing.
        ImportError: pyarrow is missing, for a folder.

    Examples:
        >>> import tempfile, torch, fastsal
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fastsal.evaluate(torch.nn.Linear(6, 3), torch.rand(20, 6), folder)
        ...     fastsal.load(folder).linearized_robustness.shape
        torch.Size([20])
    """
    if Path(path).is_file():
        return results.read(Path(path))
    found = shards.shards(Path(path))
    if not found:
        raise ValueError(f"results: {path} holds no results of fastsal.evaluate")
    return as_geometry(shards.read(found), **shards.read_kept(found))
