"""Figures in words: machines, times, ratios, and tables in Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

Record = dict[str, Any]


def where(environment: Record) -> str:
    """The machine and the versions, in a line."""
    machine, versions = environment["machine"], environment["versions"]
    parts = [machine["processor"], f"{machine['cores']} cores", f"{machine['memory in GiB']} GiB"]
    parts += [f"SIMD {machine['SIMD']}"] if "SIMD" in machine else []
    parts += [machine["GPU"], f"driver {machine['driver']}"] if "GPU" in machine else []
    return f"{', '.join([*parts, machine['system']])}; {', '.join(f'{name} {at}' for name, at in versions.items())}"


def when(records: list[Record]) -> str:
    """The commits and the dates of some records."""
    commits = ", ".join(dict.fromkeys(record["commit"] for record in records))
    dates = sorted({record["date"] for record in records})
    return f"commit {commits}; {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")


def seconds(value: float) -> str:
    """A time with its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def times(ratio: float) -> str:
    """A ratio in three digits or so."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def count(threads: int) -> str:
    """A number of threads."""
    return f"{threads} thread" + "s" * (threads > 1)


def span(values: Iterable[float], show: Callable[[float], str] = times) -> str:
    """The least and the largest of some figures; one of them where they look alike."""
    ordered = sorted(values)
    least, most = show(ordered[0]), show(ordered[-1])
    return least if least == most else f"{least} to {most}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, with columns that line up in the source too."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]

    def line(cells: list[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])
