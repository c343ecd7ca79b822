"""The report of a data set, `fastsal.report`: what a folder of results says, on one page that needs no other file."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastsal import plot
from fastsal.evaluation import shards
from fastsal.evaluation.batches import Batches, Data
from fastsal.evaluation.evaluate import checked
from fastsal.evaluation.fingerprint import data_fingerprint, model_fingerprint
from fastsal.evaluation.summary import PRINTED, Summary, summarize
from fastsal.evaluation.tables import NO_CLASS, Columns
from fastsal.files import changes, check_own
from fastsal.model.calling import Model, check_evaluation_mode
from fastsal.pages import distributions, examples
from fastsal.pages.page import Page

FAILURES = 100  # that are listed


def report(
    folder: str | Path,
    *,
    data: Data | None = None,
    model: Model | None = None,
    classes: Sequence[str] | None = None,
    out: str | Path = "report.html",
) -> Path:
    """One page of HTML from a folder of results, to be looked at in a browser: no server, no other file, no request.

    It has the quartiles of every quantity; how ρ̃, α, the bound and the homogeneity are distributed, for each true class too
    where classes are known; accuracy against ρ̃; the passes that were taken; the 24 least and the 24 most robust examples, to be
    sorted and filtered; and what could not be analysed, with the reason. With data, the examples are shown, and with a
    model, or where the results were made with `keep=["saliency", "binarized_saliency"]`, their saliency maps g and g† beside
    them. Needs matplotlib, pillow and pyarrow.

    Args:
        folder: What `fastsal.evaluate` or `fastsal analyze --out` wrote, finished or not.
        data: The data that the results were made from, as for `evaluate`; None (default) for a page without images.
        model: The model likewise, for the maps of the examples shown: two backward passes each. It wants `data`.
        classes: What the classes are called, n names; None (default) for their numbers.
        out: Where the page goes. A page that fastsal wrote is replaced, anything else is not.

    Returns:
        The page's path.

    Raises:
        ValueError: The folder holds no results; data or model are others than the results were made from; there are not n
            names; or something else stands at `out`.
        FileNotFoundError: There is no such folder.
        ImportError: A package is missing.

    Examples:
        >>> import tempfile, torch, fastsal
        >>> from pathlib import Path
        >>> model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3)), torch.rand(50, 1, 6, 6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = fastsal.evaluate(model, images, Path(folder, "results"))
        ...     page = fastsal.report(Path(folder, "results"), data=images, model=model, out=Path(folder, "report.html"))
        ...     page.read_text(encoding="utf-8").count("<img")  # a figure, and three pictures for each of 48 examples
        145
    """
    out, folder = Path(out), Path(folder)
    check_own(out, "out:")
    found = shards.shards(folder)
    if not found:
        raise ValueError(f"folder: {folder} holds no results of fastsal.evaluate")
    record, columns = shards.record(found[0]), shards.read(found)
    origin, n = record["made_from"], record["classes"]
    if classes is not None and len(classes) != n:
        raise ValueError(f"classes: got {len(classes)} names, wants one for each of the {n} classes")
    batches = None if data is None else checked(data, 1, None)
    if model is not None:
        check_evaluation_mode(model)
    _check(origin, batches, model, columns)
    called = _names(columns, classes)
    summary = summarize(columns, tuple(record["shape"]), n, origin["norm"])
    analysed = {name: column[columns["error"] == ""] for name, column in columns.items()}
    name = folder.resolve().name
    page = Page(f"{name}: how far {summary.examples} examples are from the nearest decision boundary")
    page.paragraph(_about(summary, record))
    page.heading("At a glance")
    page.table(_quartiles(summary))
    if summary.all.examples:
        _show_examples(page, analysed, found, batches, None if "layer" in origin else model, origin, called)
        drawn = distributions.draw(analysed, summary, called)
        for figure in drawn.values():
            page.heading(figure.title)
            page.figure(figure)
            if figure.name == "classes":
                page.table(_by_class(summary, called))
        page.heading("What it cost")
        page.paragraph(_cost(summary))
    if summary.failed:
        page.heading("What could not be analysed")
        for rows in _failures(columns):
            page.table(rows)
    return page.write(out, f"fastsal report: {name}", option="out:")


def _check(origin: dict[str, Any], batches: Batches | None, model: Model | None, columns: Columns) -> None:
    """Raises where data or model are others than the results were made from."""
    if model is not None and batches is None:
        raise ValueError("model: got one without data, wants both for saliency maps")
    given: dict[str, dict[str, Any]] = {}
    if batches is not None:
        names = columns["name"].tolist() if "name" in columns else None
        # The hash is of all names, which a table that is still being written does not have.
        unknown = names is not None and len(names) < origin["examples"]
        hashed = origin["data"] if unknown else data_fingerprint(batches, names)
        given["data"] = {"examples": batches.examples, "data": hashed}
    if model is not None:
        given["model"] = dict(zip(("model", "parameters"), model_fingerprint(model), strict=True))
    for what, now in given.items():
        before = {name: origin[name] for name in now}
        if before != now:
            raise ValueError(f"{what}: the results were made from something else: {changes(before, now)}")


def _names(columns: Columns, classes: Sequence[str] | None) -> Callable[[int], str]:
    """What a class is called: by name where names are given, by the folder of its images where they lie in folders."""
    known = {} if classes is None else dict(enumerate(classes))
    if classes is None and {"name", "y"} <= columns.keys():
        known = {
            int(y): name.partition("/")[0]
            for name, y in zip(columns["name"], columns["y"], strict=True)
            if y != NO_CLASS and "/" in name
        }
    return lambda y: known.get(y, str(y))


def _about(summary: Summary, record: dict[str, Any]) -> str:
    origin = record["made_from"]
    shape = " × ".join(map(str, summary.shape))
    text = (
        f"{summary.all.examples} of {origin['examples']} examples of {shape} entries were analysed, with {summary.classes} "
        f"classes and the norm {summary.norm}, by the method {summary.method!r}. The model is {origin['model']} (a hash of its "
        f"text); fastsal {origin['fastsal']} with torch {record['torch']} computed it. ρ̃ is the distance to the nearest of the "
        "linearised decision boundaries, and α says how well the gradient of the predicted logit aligns with the input; both "
        "are in units of x."
    )
    if summary.method == "candidates":
        text += " Of candidates, ρ̃ is an upper bound, from the highest logits only."
    for name, meaning in (
        ("layer", "All of it is in the space of the layer"),
        ("target", "In the place of the prediction stands"),
    ):
        if name in origin:
            text += f" {meaning} {origin[name]}."
    return text


def _quartiles(summary: Summary) -> list[dict[str, str]]:
    """A row for each quantity."""
    rows = []
    for name in PRINTED:
        spread = summary.all.quantities[name]
        numbers = {"lower quartile": spread.lower, "median": spread.median, "upper quartile": spread.upper}
        cells = {key: f"{value:.4g}" for key, value in numbers.items()}
        rows.append({"quantity": plot.LABELS[name]} | cells | {"not a number": str(spread.nan)})
    if not any(int(row["not a number"]) for row in rows):
        for row in rows:
            del row["not a number"]
    if summary.all.accuracy is not None:
        rows.append(dict.fromkeys(rows[0], "") | {"quantity": "accuracy", "median": f"{summary.all.accuracy:.4f}"})
    return rows


def _show_examples(
    page: Page,
    columns: Columns,
    found: Sequence[Path],
    batches: Batches | None,
    model: Model | None,
    origin: dict[str, Any],
    called: Callable[[int], str],
) -> None:
    target = "y" if origin.get("target") else "prediction"
    shown = list(examples.collect(columns, found, batches, model, target))
    page.heading("The least and the most robust")
    text = "A click on the head of a column sorts, and so does Enter. "
    if any(name != "image" for one in shown for name in one.arrays):
        text += (
            "g is the gradient of the predicted logit, g† that of the predicted logit minus the nearest other class's; "
            "channels are summed, each map on a scale of its own: light where more of the pixel speaks for the class, dark "
            "where it speaks against it, grey at 0. "
        )
    elif "layer" not in origin:
        text += "Images come with the data, and saliency maps with the model (--data, --model). "
    page.paragraph(text)
    page.raw(examples.table(columns, shown, called))


def _by_class(summary: Summary, called: Callable[[int], str]) -> list[dict[str, str]]:
    rows = []
    for y, group in sorted(summary.by_class.items()):
        rho = group.quantities["linearized_robustness"]
        medians = {symbol: group.quantities[name].median for name, symbol in distributions.QUANTITIES.items()}
        rows.append(
            {"class": called(y), "examples": str(group.examples)}
            | {"accuracy": "" if group.accuracy is None else f"{group.accuracy:.4f}"}
            | {"ρ̃, lower quartile": f"{rho.lower:.4g}"}
            | {f"{symbol}, median": f"{value:.4g}" for symbol, value in medians.items()}
        )
    return rows


def _cost(summary: Summary) -> str:
    N, taken = summary.all.examples, summary.vjps + summary.jvps
    text = (
        f"An example took {summary.vjps:.4g} backward and {summary.jvps:.4g} forward-mode passes on average, all {N:,} "
        f"together {round(taken * N):,}. A backward pass for each of {summary.classes} classes would be {summary.classes * N:,}"
    )
    text += f", {summary.classes / taken:.3g} times as many. " if summary.classes > 1.05 * taken else ". "
    if summary.method == "certified":
        text += (
            f"Certified, except with a probability of {summary.failure_probability:g} each: "
            f"{round(summary.certified * N)} of {N}."
        )
    return text


def _failures(columns: Columns) -> Iterator[list[dict[str, str]]]:
    """How often each reason was given, and then the examples, or the first of them."""
    rows = np.flatnonzero(columns["error"] != "")
    counts = Counter(columns["error"][rows].tolist()).most_common()
    if len(counts) < len(rows):
        yield [{"reason": reason, "examples": str(count)} for reason, count in counts[:FAILURES]]
    names = columns.get("name")
    listed = rows[:FAILURES]
    more = f" (the first {FAILURES} of {len(rows)})" if len(rows) > FAILURES else ""
    yield [
        {
            f"example{more}": str(names[row] if names is not None else columns["index"][row]),
            "reason": columns["error"][row],
        }
        for row in listed
    ]
