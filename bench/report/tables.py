"""Tables of what implementations did: everything about one case, and one figure of many cases side by side."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from bench.report.words import Record, count, seconds, table, times

NOTHING = {"skipped", ""}  # cells that tell nothing
NEAR = "error on near-identical rows"
ABREAST = 5  # cases side by side: more would not fit a page of 900 pixels
Cell = Callable[
    [Record, Record], str
]  # what a table says about a row of a record; KeyError where it has no such figure


def _or_nothing(cell: Cell, record: Record, row: Record) -> str:
    try:
        return cell(record, row)
    except KeyError:
        return ""


def _time(record: Record, row: Record) -> str:
    """The time, and the ratio to the baseline's with its quartiles."""
    if row["status"] != "right":
        return row["status"]
    if "ratio" not in row:
        return seconds(row["seconds"][1])
    low, middle, high = row["ratio"]
    quartiles = "" if low == high else f" ({times(low)} to {times(high)})"
    return f"{seconds(row['seconds'][1])}, {times(middle)}{quartiles}"


def _memory(record: Record, row: Record) -> str:
    return f"{row['peak memory'] / 2**20:.0f} MiB" if row["peak memory"] is not None else "?"


def _passes(record: Record, row: Record) -> str:
    """Mean, median and most."""
    each = row.get("passes of each", [row["passes"]])
    return f"{row['passes']:.0f} ({median(each):.0f}, {max(each):.0f})"


def reasons(notes: dict[str, str]) -> list[str]:
    """A line for each reason, with all implementations that have it."""
    return [
        f"{'; '.join(name for name in notes if notes[name] == why)}: {why}" for why in dict.fromkeys(notes.values())
    ]


def notes(record: Record) -> dict[str, str]:
    """What was skipped or failed, and why."""
    return {f"{row['implementation']} {row['status']}": row["reason"] for row in record["results"] if "reason" in row}


FIGURES: dict[str, Cell] = {
    "error": lambda _, row: f"{row['error']:.1e}",
    NEAR: lambda _, row: f"{row[NEAR]:.1e}",
    "wrong answers": lambda _, row: f"{row['wrong answers']:.0%}",
    "equal to exact": lambda _, row: f"{row['equal']} of {row['images']}",
    "passes: mean (median, most)": _passes,
    "a pass, in backward passes": lambda _, row: times(row["pass"]),
    "first batch longer by": lambda _, row: seconds(row["start"]),
    "peak memory": _memory,
    "success": lambda _, row: f"{row['success']:.3g}",
    "median distance": lambda _, row: f"{row['median distance']:.5g}",
}


Cells = tuple[str, dict[str, str]]  # a row of a table: what it is about, and its cells by their heads


def _found(records: list[Record]) -> list[Cells]:
    """All that was found in one case, a row for each implementation.

    The times of several numbers of threads stand side by side; the other figures are those of the last record.
    """
    shown: dict[str, list[Record]] = {}
    for record in records:
        for row in record["results"]:
            if row["status"] != "skipped":
                name = f"{row['implementation']}: {row['what']}" if "what" in row else row["implementation"]
                shown.setdefault(name, []).append(row)
    found = []
    for name, rows in shown.items():
        cells = {
            f"{count(record['threads'])}: time, and relative to {record['baseline']}": _or_nothing(_time, record, row)
            for record, row in zip(records, rows, strict=True)
        }
        figures = {head: _or_nothing(cell, records[-1], rows[-1]) for head, cell in FIGURES.items()}
        found.append((name, cells | figures))
    return found


def _grid(rows: list[Cells]) -> str:
    """A table of these rows, without the columns in which nothing stands."""
    heads = dict.fromkeys(head for _, cells in rows for head, cell in cells.items() if cell)
    return table(["implementation", *heads], [[name, *(cells.get(head, "") for head in heads)] for name, cells in rows])


def _busy(records: list[Record]) -> str:
    load = max(record["other load in cores"] or 0.0 for record in records)
    return f"; other processes kept {load:.1f} cores busy" if load >= 0.1 else ""


def everything(record: Record) -> str:
    """All that is in a record, for a terminal."""
    title = f"{record['level']}: {record['case']}, {count(record['threads'])}"
    if "results" in record:
        return "\n\n".join([title + _busy([record]), _grid(_found([record])), *reasons(notes(record))])
    if record["level"] == "edge":
        return f"{title}\n\n{edge(record)}"
    figures = []
    for name in [name for name in record if name not in ("level", "case", "threads")]:
        several = isinstance(record[name], list)
        figures += [f"  {name}: {value}" for value in (record[name] if several else [record[name]])]
    return "\n".join([title, *figures])


def edge(record: Record) -> str:
    """Awkward inputs: which answers of every implementation are not right, and what they are."""
    alike: dict[str, list[str]] = {}
    for name, answers in record["rows"].items():
        wrong: dict[str, list[str]] = {}
        for column in record["columns"]:
            if answers[column] != "right":
                wrong.setdefault(answers[column], []).append(column)
        cells = [f"{answer} for {', '.join(columns)}" for answer, columns in wrong.items()]
        alike.setdefault("; ".join(cells).replace(", gradients of", ","), []).append(name)
    lines = [f"- {'; '.join(names)}: {answers}" for answers, names in alike.items()]
    return "\n\n".join(
        ["\n".join(lines), *reasons({f"{name} skipped": why for name, why in record["skipped"].items()})]
    )


def side_by_side(records: list[Record], figure: Cell) -> str:
    """One figure: implementations by cases; empty where none has that figure."""

    def cell(record: Record, name: str) -> str:
        row = next((row for row in record["results"] if row["implementation"] == name), {"status": ""})
        if row["status"] in ("wrong", "failed"):
            return f"wrong: {row['error']:.0e}" if row["status"] == "wrong" else "failed"
        return _or_nothing(figure, record, row) or row["status"].removeprefix("right")

    names = list(dict.fromkeys(row["implementation"] for record in records for row in record["results"]))
    columns = [[_split(record["case"])[0], *(cell(record, name) for name in names)] for record in records]
    columns = [column for column in columns if set(column[1:]) - NOTHING]
    head, *rows = (list(cells) for cells in zip(["", *names], *columns, strict=True))
    return table(head, [row for row in rows if set(row[1:]) - NOTHING]) if columns else ""


def _split(case: str) -> tuple[str, str]:
    """The shape in the name of a case, and what follows it; the whole name where it begins with no shape."""
    shape, bracket, rest = case.partition(")")
    return (shape + bracket, rest.strip()) if case.startswith("(") else (case, "")


@dataclass(frozen=True)
class Section:
    """How a level is shown: what its cases are, the figures that get tables with what they say, and the axis of the plot."""

    title: str
    meaning: str
    figures: dict[str, Cell]
    axis: str


def speed(record: Record, row: Record) -> str:
    """GB/s, and the fraction of the baseline's."""
    return f"{record['bytes'] / row['seconds'][1] / 1e9:.1f} ({times(1 / row['ratio'][1])})"


def time(record: Record, row: Record) -> str:
    """The time, and how many times the baseline's."""
    return f"{seconds(row['seconds'][1])} ({times(row['ratio'][1])}×)"


def faster(record: Record, row: Record) -> str:
    """The time, and how many times as fast as the baseline it is; ≈ where it is extrapolated."""
    about = "≈ " if row.get("rough") else ""
    return f"{about}{seconds(row['seconds'][1])} ({times(1 / row['ratio'][1])}×)"


SECTIONS = {
    "imagenet": Section(
        "Trained on ImageNet",
        "ρ̃ of fourteen squares of eleven photographs, by EfficientNet-Lite0 with its weights of ImageNet (n = 1000, D = "
        "3·224·224), for perturbations in the 2-norm, and in the largest entry (p = ∞). Figures are those of one image. What "
        "takes a backward pass for every class is measured on one batch, or, where that would last more than a minute (≈), on "
        "the first 2 and 20 classes, of which each costs the same. The price of a pass is its time in units of the backward "
        "pass of one class through a recorded batch, for each image of it.",
        {
            "Time of an image, and how many times as fast as `fastsal exact, rows`": faster,
            "Passes of an image, backward and forward-mode: mean (median, most)": _passes,
        },
        "time relative to fastsal exact, rows",
    ),
    "tensor": Section(
        "From a Jacobian",
        "All quantities of `fastsal.margin_geometry`, from logits, a Jacobian J of shape (B, n, D) and x. The baseline is a "
        "pure read of J and x; `read in tiles` reads the same bytes in the order of fastsal's kernel. `eager torch, ρ̃`, "
        "`torch.cdist`, `Gram by bmm` and `NumPy` compute ρ̃ alone.",
        {"GB/s of J and x, and the fraction of a pure read's": speed},
        "time relative to a pure read of J and x",
    ),
    "pairs": Section(
        "All pairs of logits",
        "The distances and margins of `fastsal.pairwise_margins`, from logits and a Jacobian of shape (B, n, D). The backward "
        "pass takes a weighted sum of the distances to its gradient in the Jacobian. Near-identical rows differ by one part in "
        "ten thousand.",
        {"Time, and how many times that of `fastsal cpu`": time},
        "time relative to fastsal cpu",
    ),
    "model": Section(
        "From a model",
        "The linearised robustness ρ̃ of a batch: by `fastsal.analyze`, from a whole Jacobian by the eager formula, and as the "
        "length of one step of each peer's attack. `fastsal candidates` and peers with 10 candidates or gradients look at the "
        "ten highest logits only. Peak memory is that of a fresh process, beyond what it held before.",
        {"Time of a batch, and how many times that of `fastsal exact`": time},
        "time relative to fastsal exact",
    ),
}


def _groups(records: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Cases that are alike but for their shape, as many as fit a page, after what they have in common."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kind = ", ".join(filter(None, (_split(record["case"])[1], count(record["threads"]))))
        kinds.setdefault(kind, []).append(record)
    for kind, some in kinds.items():
        size = math.ceil(len(some) / math.ceil(len(some) / ABREAST))
        for start in range(0, len(some), size):
            yield kind, some[start : start + size]


def figures(section: Section, records: list[Record]) -> list[str]:
    """Every figure of a section, at the highest number of threads, in tables of a few cases each."""
    most = max(record["threads"] for record in records)
    parts: list[str] = []
    for meaning, figure in section.figures.items():
        for kind, group in _groups([record for record in records if record["threads"] == most]):
            parts += [f"{meaning}; {kind}:", side_by_side(group, figure)]
    return parts


def every_case(records: list[Record]) -> list[str]:
    """All that was found in every case of a level, in one table, after the notes that all of them share."""
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record["case"], []).append(record)
    first, *others = map(notes, records)
    everywhere = {name: why for name, why in first.items() if all(other.get(name) == why for other in others)}
    rows: list[Cells] = []
    own = {}
    for case, found in cases.items():
        rows += [(f"**{case}**{_busy(found)}", {}), *_found(found)]
        own |= {f"{case}: {name}": why for name, why in notes(found[-1]).items() if name not in everywhere}
    return [*reasons(everywhere), _grid(rows), *reasons(own)]


def photographs(records: list[Record]) -> str:
    """The README's words and table on the network trained on ImageNet."""
    certified = [row for record in records for row in record["results"] if row["implementation"] == "fastsal certified"]
    equal, asked = (sum(row[key] for row in certified) for key in ("equal", "images"))
    passes = ", ".join(f"{row['passes']:.0f}" for row in certified)
    return (
        "Time of a photograph on EfficientNet-Lite0, trained on ImageNet (n = 1000, D = 3·224·224), and how many times as fast "
        f"as exact rows, with {count(records[0]['threads'])} (≈: extrapolated from 20 classes):\n\n"
        f"{side_by_side(records, faster)}\n\n"
        f"Certified took {passes} passes a photograph on average, and {equal} of {asked} answers are equal to exact."
    )
