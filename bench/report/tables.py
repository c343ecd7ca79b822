"""Tables of figures: everything about one case, one figure of many cases side by side, and two that stand alone."""

import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from bench.report.words import Record, count, seconds, table, times, when, where

NOTHING = {"skipped", ""}  # cells that tell nothing
NEAR = "error on near-identical rows"
ABREAST = 5  # contestants or cases side by side: more would not fit a page of 900 pixels
T = TypeVar("T")
Cell = Callable[
    [Record, Record], str
]  # what a table says about a row of a record; KeyError where it has no such figure


def _or_nothing(cell: Cell, record: Record, row: Record) -> str:
    try:
        return cell(record, row)
    except KeyError:
        return ""


def _time(record: Record, row: Record) -> str:
    return seconds(row["seconds"][1]) if row["status"] == "right" else row["status"]


def _quartiles(record: Record, row: Record) -> str:
    low, middle, high = row["ratio"]
    return times(middle) if low == high else f"{times(middle)} ({times(low)} to {times(high)})"


def _bandwidth(record: Record, row: Record) -> str:
    return f"{record['bytes'] / row['seconds'][1] / 1e9:.2f}" if record["bytes"] else ""


def _memory(record: Record, row: Record) -> str:
    return f"{row['peak memory'] / 2**20:.0f} MiB" if row["peak memory"] is not None else "?"


def of(level: str, records: Iterable[Record]) -> list[Record]:
    """The records of a level."""
    return [record for record in records if record["level"] == level]


def reasons(notes: dict[str, str]) -> list[str]:
    """A line for each reason, with everyone whose it is."""
    return [f"{'; '.join(who for who in notes if notes[who] == why)}: {why}" for why in dict.fromkeys(notes.values())]


def notes(record: Record) -> dict[str, str]:
    """Who was skipped or failed, and why."""
    return {f"{row['contestant']} {row['status']}": row["reason"] for row in record["results"] if "reason" in row}


def everything(record: Record, known: Container[str] = ()) -> str:
    """All that was found in one case: a line that says which, a table, and the notes, but for those that are `known`."""
    if record["level"] == "edge":
        return edge(record)
    columns: dict[str, Cell] = {
        "time": _time,
        f"relative to {record['yardstick']}": _quartiles,
        "rounds": lambda _, row: str(len(row["rounds"])),
        "GB/s": _bandwidth,
        "error": lambda _, row: f"{row['error']:.1e}",
        NEAR: lambda _, row: f"{row[NEAR]:.1e}",
        "wrong answers": lambda _, row: f"{row['wrong answers']:.0%}",
        "peak memory": _memory,
    }
    shown = [row for row in record["results"] if row["status"] != "skipped"]
    grid = {head: [_or_nothing(cell, record, row) for row in shown] for head, cell in columns.items()}
    grid = {head: cells for head, cells in grid.items() if any(cells)}
    names = [f"{row['contestant']}: {row['what']}" if "what" in row else row["contestant"] for row in shown]
    rows = [list(cells) for cells in zip(names, *grid.values(), strict=True)]
    load = record["other load in cores"]
    busy = "" if load is None or load < 0.1 else f"; other processes kept {load:.1f} cores busy"
    title = f"{record['level']}: {record['case']}, {count(record['threads'])}; {when([record])}{busy}"
    unknown = {who: why for who, why in notes(record).items() if who not in known}
    return "\n\n".join([title, table(["contestant", *grid], rows), *reasons(unknown)])


def side_by_side(records: list[Record], figure: Cell, only: tuple[str, ...] = ()) -> str:
    """One figure: contestants (or `only` some of them) by cases; empty where nobody has that figure."""

    def cell(record: Record, name: str) -> str:
        row = next((row for row in record["results"] if row["contestant"] == name), {"status": ""})
        if row["status"] in ("wrong", "failed"):
            return f"wrong: {row['error']:.0e}" if row["status"] == "wrong" else "failed"
        return _or_nothing(figure, record, row) or row["status"].removeprefix("right")

    names = only or tuple(dict.fromkeys(row["contestant"] for record in records for row in record["results"]))
    columns = [[_split(record["case"])[0], *(cell(record, name) for name in names)] for record in records]
    columns = [column for column in columns if set(column[1:]) - NOTHING]
    head, *rows = (list(cells) for cells in zip(["", *names], *columns, strict=True))
    return table(head, [row for row in rows if set(row[1:]) - NOTHING]) if columns else ""


def _split(case: str) -> tuple[str, str]:
    """The shape in the name of a case, and what follows it; the whole name where it begins with no shape."""
    shape, bracket, rest = case.partition(")")
    return (shape + bracket, rest.strip()) if case.startswith("(") else (case, "")


@dataclass(frozen=True)
class Level:
    """How a level is shown: what its cases are, the figures that get tables with what they say, and the axis of the plot."""

    title: str
    meaning: str
    figures: dict[str, Cell]
    axis: str


def speed(record: Record, row: Record) -> str:
    """GB/s, and the fraction of the yardstick's."""
    return f"{record['bytes'] / row['seconds'][1] / 1e9:.1f} ({times(1 / row['ratio'][1])})"


def time(record: Record, row: Record) -> str:
    """The time, and how many times the yardstick's."""
    return f"{seconds(row['seconds'][1])} ({times(row['ratio'][1])}×)"


LEVELS = {
    "tensor": Level(
        "From a Jacobian",
        "All quantities of `fastsal.margin_geometry`, from logits, a Jacobian J of shape (B, n, D) and x. The yardstick is a "
        "pure read of J and x; `read in tiles` reads the same bytes in the order of fastsal's kernel. `eager torch, ρ̃`, "
        "`torch.cdist`, `Gram by bmm` and `NumPy` compute ρ̃ alone.",
        {"GB/s of J and x, and the fraction of a pure read's": speed},
        "time relative to a pure read of J and x",
    ),
    "pairs": Level(
        "All pairs of logits",
        "The distances and margins of `fastsal.pairwise_margins`, from logits and a Jacobian of shape (B, n, D). The backward "
        "pass takes a weighted sum of the distances to its gradient in the Jacobian.",
        {
            "Time, and how many times that of `fastsal cpu`": time,
            "Relative error where rows differ by one part in ten thousand": lambda _, row: f"{row[NEAR]:.0e}",
        },
        "time relative to fastsal cpu",
    ),
    "model": Level(
        "From a model",
        "The linearised robustness ρ̃ of a batch: by `fastsal.analyze`, from a whole Jacobian by the eager formula, and as the "
        "length of one step of each peer's attack. `fastsal candidates` and peers with 10 candidates or gradients look at the "
        "ten highest logits only.",
        {
            "Time of a batch, and how many times that of `fastsal exact`": time,
            "Peak memory in a fresh process, beyond what it held before": _memory,
        },
        "time relative to fastsal exact",
    ),
}


def _groups(records: list[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Cases that are alike but for their shape, a few at a time, after what they have in common."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kind = ", ".join(filter(None, (_split(record["case"])[1], count(record["threads"]))))
        kinds.setdefault(kind, []).append(record)
    for kind, some in kinds.items():
        for group in abreast(some):
            yield kind, group


def abreast(items: list[T]) -> list[list[T]]:
    """In groups that fit a page, of nearly equal size."""
    size = math.ceil(len(items) / math.ceil(len(items) / ABREAST))
    return [items[start : start + size] for start in range(0, len(items), size)]


def figures(level: Level, records: list[Record]) -> list[str]:
    """Every figure of a level, in tables of a few cases each."""
    parts: list[str] = []
    for meaning, figure in level.figures.items():
        for kind, group in _groups(records):
            if (text := side_by_side(group, figure)) and text not in parts:  # some depend on no number of threads
                parts += [f"{meaning}; {kind}:", text]
    return parts


def edge(record: Record) -> str:
    """Awkward inputs by contestants."""
    tables = []
    for names in abreast(list(record["rows"])):
        rows = [[column, *(record["rows"][name][column] for name in names)] for column in record["columns"]]
        tables.append(table(["", *names], rows))
    return "\n\n".join([*tables, *reasons({f"{name} skipped": why for name, why in record["skipped"].items()})])


NETWORKS = {
    "narrow": "192 features, loss near zero",
    "wide": "1536 features, loss near zero",
    "plain": "192 features, noisy images",
}


def certified(found: Record) -> list[str]:
    """What bench/cases/certified.py found on trained networks of 1000 classes, and as the classes grow."""
    networks = {name: found[name] for name in NETWORKS if name in found}
    methods = list(dict.fromkeys(method for one in networks.values() for method in one["passes"]))

    def cell(network: Record, method: str) -> str:
        if method not in network["passes"]:
            return ""
        passes, faster = network["passes"][method], network["times faster than exact rows"][method]
        return f"{passes['median']:.0f} ({passes['p95']:.0f}), {times(faster)}×"

    def right(network: Record) -> str:
        return f"{network['same runner-up as exact']} of {network['images']}"

    rows = [[method, *(cell(network, method) for network in networks.values())] for method in methods]
    rows += [
        ["accuracy of the network", *(f"{network['accuracy']:.1%}" for network in networks.values())],
        ["certified gives the exact answer", *map(right, networks.values())],
    ]
    for habit in ("top-1", "top-5", "top-10"):
        habits = [network["habits"][habit] for network in networks.values()]
        cells = (f"{one['share wrong']:.1%}, {one['largest excess']:.0%}" for one in habits)
        rows.append([f"{habit} candidates: share wrong, worst excess", *cells])
    grown: list[str] = []
    for key, directions in (("growth", ""), ("growth along the coordinates", ", its directions being the coordinates")):
        if key in found:
            grown += [
                f"Passes of certified as classes grow, on random Jacobians with a falling spectrum{directions}:",
                table(
                    ["classes", "median", "95th percentile", "certified and right"],
                    [
                        [
                            *(f"{row[figure]:.0f}" for figure in ("n", "median", "p95")),
                            f"{row['certified and right']} of {row['examples']}",
                        ]
                        for row in found[key]
                    ],
                ),
            ]
    missed = [
        [
            row["kind"].replace("_", " "),
            str(row["max_passes"] or "none"),
            str(row["trials"]),
            str(row["certified"]),
            f"{row['misses'] / row['trials']:.1%} ({row['interval'][0]:.1%} to {row['interval'][1]:.1%})",
        ]
        for row in found["calibration"]
    ]
    return [
        "Passes an example, median (95th percentile), and how many times faster than exact rows, on networks trained for the "
        f"purpose, {count(found['threads'])}, {where(found['environment'])}; {when([found])}:",
        table(["", *(NETWORKS[name] for name in networks)], rows),
        *grown,
        "How often something false was said (a wrong answer called certified, or a lower bound above the truth) of random "
        "Jacobians, at a failure probability of 0.2 that allows one in five, with the 95 % confidence interval:",
        table(["Jacobians", "limit of passes", "examples", "certified", "false"], missed),
    ]
