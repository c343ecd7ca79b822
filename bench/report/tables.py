"""Tables of figures: everything about one case, one figure of many cases side by side, and two that stand alone."""

import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from bench.report.words import Record, count, seconds, table, times, when, where

NOTHING = {"skipped", ""}  # cells that tell nothing
NEAR = "error on near-identical rows"
UNSTABLE = "have gradients that differ by up to"  # in fastsal's warning of a network that is its own noise
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


def _equal(record: Record, row: Record) -> str:
    return f"{row['equal']} of {row['images']}"


def _passes(record: Record, row: Record) -> str:
    return f"{row['passes']:.0f}"


def _each(record: Record, row: Record) -> str:
    each = row.get("passes of each", [row["passes"]])
    return f"{_passes(record, row)} ({median(each):.0f}, {max(each):.0f})"


def _pass(record: Record, row: Record) -> str:
    return times(row["pass"])


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
        "equal to exact": _equal,
        "passes": _passes,
        "a pass, in backward passes": _pass,
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


def side_by_side(records: list[Record], figure: Cell) -> str:
    """One figure: contestants by cases; empty where nobody has that figure."""

    def cell(record: Record, name: str) -> str:
        row = next((row for row in record["results"] if row["contestant"] == name), {"status": ""})
        if row["status"] in ("wrong", "failed"):
            return f"wrong: {row['error']:.0e}" if row["status"] == "wrong" else "failed"
        return _or_nothing(figure, record, row) or row["status"].removeprefix("right")

    names = list(dict.fromkeys(row["contestant"] for record in records for row in record["results"]))
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


def faster(record: Record, row: Record) -> str:
    """The time, and how many times as fast as the yardstick it is; ≈ where it is extrapolated."""
    about = "≈ " if row.get("rough") else ""
    return f"{about}{seconds(row['seconds'][1])} ({times(1 / row['ratio'][1])}×)"


def _start(record: Record, row: Record) -> str:
    return seconds(row["start"])


LEVELS = {
    "imagenet": Level(
        "Trained on ImageNet",
        "ρ̃ of fourteen squares of eleven photographs, by EfficientNet-Lite0 with its weights of ImageNet (n = 1000, D = "
        "3·224·224), for perturbations in the 2-norm, and in the largest entry (p = ∞). Figures are those of one image. Who "
        "takes a backward pass for every class is measured on one batch, or, where that would last more than a minute (≈), on "
        "the first 2 and 20 classes, of which each costs the same. The price of a pass is its time in units of the backward "
        "pass of one class through a recorded batch, for each image of it.",
        {
            "Time of an image, and how many times as fast as `fastsal exact, rows`": faster,
            "Passes of an image, backward and forward-mode: mean (median, most)": _each,
            "Time of a pass, in backward passes": _pass,
            "How much longer than a later batch the first one of its size takes": _start,
            "Peak memory of a batch in a fresh process, beyond what it held before": _memory,
            "Answers equal to the exact one": _equal,
        },
        "time relative to fastsal exact, rows",
    ),
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


def photographs(records: list[Record]) -> str:
    """The README's words and table on the network trained on ImageNet."""
    threads = count(records[0]["threads"])
    certified = [
        next(row for row in record["results"] if row["contestant"] == "fastsal certified") for record in records
    ]
    equal, asked = (sum(row[key] for row in certified) for key in ("equal", "images"))
    passes = ", ".join(_passes(record, row) for record, row in zip(records, certified, strict=True))
    return (
        "Time of a photograph on EfficientNet-Lite0, trained on ImageNet (n = 1000, D = 3·224·224), and how many times as fast "
        f"as exact rows, with {threads} (≈: extrapolated from 20 classes):\n\n{side_by_side(records, faster)}\n\n"
        f"Certified took {passes} passes a photograph on average, and {equal} of {asked} answers are equal to exact."
    )


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
    batches = [
        [f"{row['batch']:.0f}", f"{row['passes']:.0f}", times(row["faster"]), f"{row['rows a pass']:.2f}"]
        for row in found.get("batches", [])
    ]
    limits = [
        [
            f"{row['limit']:.0f}",
            *(f"{row[key]:.2f}" for key in ("lower", "least lower", "value", "largest value")),
            f"{row['certified']:.0%}",
        ]
        for row in found.get("limits", [])
    ]
    return [
        "Passes an example, median (95th percentile), and how many times faster than exact rows, on networks trained for the "
        f"purpose, {count(found['threads'])}, {where(found['environment'])}; {when([found])}:",
        table(["", *(NETWORKS[name] for name in networks)], rows),
        "The first of these networks once its derivative has been traced, by the size of the batch: passes, times faster than "
        "exact rows, and what a pass costs in exact rows of the same batch:",
        table(["batch", "passes, mean", "times faster", "rows a pass"], batches),
        "The same network under a limit of passes: the lower bound and the value found, relative to ρ̃:",
        table(["limit", "lower, median", "lower, least", "value, median", "value, largest", "certified"], limits),
        *grown,
        "How often something false was said (a wrong answer called certified, or a lower bound above the truth) of random "
        "Jacobians, at a failure probability of 0.2 that allows one in five, with the 95 % confidence interval:",
        table(["Jacobians", "limit of passes", "examples", "certified", "false"], missed),
    ]


def zoo_summary(records: dict[str, Record], measured: str) -> list[str]:
    """What bench/cases/zoo.py found, in a few sentences."""
    whole = [found for found in records.values() if "failed" not in found]
    failed = [name for name, found in records.items() if "failed" in found]
    equal = sum(found["equal"] == found["examples"] for found in whole)
    certain = sum(found["certified"] == found["examples"] for found in whole)
    unstable = [name for name, found in records.items() if any(UNSTABLE in said for said in found.get("warnings", ()))]
    passes = median(found["passes"] for found in whole)
    sizes = {(found["examples"], found["classes"]) for found in whole}
    ((examples, classes),) = sizes
    return [
        f"{len(records)} networks with seeded random weights, {classes} classes and {examples} random images of the smallest "
        f"size that they take, measured on {measured}. The answers of {equal} are equal to those of exact rows, {certain} are "
        f"certified, with a median of {passes:.0f} passes. The price of a pass is its time in units of a backward pass of one "
        "class through a recorded batch, for each image of it; instability is how far the gradient of an image is from itself "
        "when another image shares the batch, relative to its norm.",
        *([f"Warned of as unstable: {', '.join(unstable)}."] if unstable else []),
        *([f"Failed: {', '.join(failed)}."] if failed else []),
    ]


def zoo(records: dict[str, Record]) -> str:
    """What bench/cases/zoo.py found, by the names of the networks."""

    def line(name: str, found: Record) -> list[str]:
        if "failed" in found:
            return [f"{name} {found['size']}", *[""] * 5, f"{found['failed']} ({found['where']})"]
        examples = found["examples"]
        certain = "certified" if found["certified"] == examples else f"{found['certified']} of {examples} certified"
        answer = "equal" if found["equal"] == examples else f"{found['equal']} of {examples} equal"
        faster = found["seconds"]["exact rows"] / found["seconds"]["certified"]
        figures = [f"{found['passes']:.0f}", times(found["pass"]), times(found["exact pass"]), f"{times(faster)}×"]
        return [f"{name} {found['size']}", *figures, f"{found['instability']:.0e}", f"{answer}, {certain}"]

    head = ["network, pixels", "passes", "price", "exact's", "faster", "unstable", "answers"]
    return table(head, [line(name, found) for name, found in records.items()])
