"""Plots of figures, as PNG."""

from pathlib import Path
from typing import Any

from bench.baselines.zoo import FAMILIES
from bench.report.studies import faster
from bench.report.tables import SECTIONS
from bench.report.words import Record, count, times


def _figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, without pyplot, which would ask for a display and keep every figure."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def every(found: dict[str, list[Record]], folder: Path) -> None:
    """All plots of figures by level, into a folder; of cases that ran on several numbers of threads the highest."""
    for level in SECTIONS:
        if mine := found.get(level):
            most = max(record["threads"] for record in mine)
            bars(level, [record for record in mine if record["threads"] == most], folder / f"{level}.png")
    if networks := [record for record in found.get("zoo", ()) if "failed" not in record]:
        zoo(networks, folder / "zoo.png")
    parts = {record["case"]: record for record in found.get("certified", ())}
    if parts:
        growth(parts["p = 2, growth"]["rows"], folder / "certified_growth.png")
        limits(parts["p = 2, limits"]["rows"], folder / "certified_limits.png")


def bars(level: str, records: list[Record], path: Path) -> None:
    """Times relative to the baseline, one panel for each case."""
    names = list(
        dict.fromkeys(row["implementation"] for record in records for row in record["results"] if "ratio" in row)
    )
    across = min(2, len(records))  # a telephone shows two beside each other
    down = -(-len(records) // across)
    figure = _figure(2.2 + 2.6 * across, 0.7 + down * (0.7 + 0.22 * len(names)))
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, record in zip(grid.flat, records, strict=False):
        found = {row["implementation"]: row for row in record["results"]}
        for place, name in enumerate(names):
            row = found.get(name, {"status": ""})
            if "ratio" in row:
                low, middle, high = row["ratio"]
                color = "tab:blue" if name.startswith("fastsal") else "0.6"
                axes.barh(place, middle, color=color, xerr=[[middle - low], [high - middle]], error_kw={"lw": 0.8})
                axes.annotate(times(middle), (high, place), (3, 0), textcoords="offset points", va="center", size=7)
            elif row["status"] in ("wrong", "failed"):
                axes.annotate(row["status"], (1, place), (3, 0), textcoords="offset points", va="center", size=7)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.margins(x=0.25)
        axes.set_yticks(range(len(names)), names, size=8)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_title(record["case"], size=8)
        axes.tick_params(axis="x", labelsize=7)
    for axes in grid.flat[len(records) :]:
        axes.axis("off")
    threads = count(records[0]["threads"])
    figure.supxlabel(f"{SECTIONS[level].axis}\n{threads}; log scale; lines join the quartiles", size=8)
    figure.savefig(path, dpi=110)


def zoo(records: list[Record], path: Path) -> None:
    """Passes of certified on every network, and how many times as fast as exact rows that is, by family."""
    figure = _figure(6, 4)
    axes = figure.subplots()
    for marker, (family, names) in zip("osD^v", FAMILIES.items(), strict=True):
        some = [record for record in records if record["case"] in names]
        passes = [record["passes"] for record in some]
        axes.plot(passes, [faster(record) for record in some], marker, label=family, alpha=0.7, markersize=5)
    axes.axhline(1, color="black", lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel=f"passes of certified, of {records[0]['classes']} classes")
    axes.set_ylabel("times as fast as exact rows")
    for axis, ticks in ((axes.xaxis, (10, 20, 30, 50, 100, 200)), (axes.yaxis, (0.2, 0.5, 1, 2, 5, 10))):
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_minor_formatter("")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def growth(rows: list[Record], path: Path) -> None:
    """Passes of certified as classes grow, beside those of exact rows."""
    figure = _figure(5, 3.5)
    axes = figure.subplots()
    classes = [row["n"] for row in rows]
    axes.loglog(classes, classes, "--", label="exact rows")
    axes.loglog(classes, [row["median"] for row in rows], "o-", label="certified, median")
    axes.loglog(classes, [row["p95"] for row in rows], "^:", label="certified, 95th percentile")
    axes.set(xlabel="classes n", ylabel="passes an example")
    axes.legend()
    figure.savefig(path, dpi=120)


def limits(rows: list[Record], path: Path) -> None:
    """What is known of ρ̃ under a limit of passes: from the lower bound to the value found."""
    figure = _figure(5, 3.5)
    axes = figure.subplots()
    allowed = [row["limit"] for row in rows]
    axes.fill_between(
        allowed, [row["lower"] for row in rows], [row["value"] for row in rows], alpha=0.25, label="median"
    )
    axes.plot(allowed, [row["least lower"] for row in rows], "v:", label="lower bound, worst image")
    axes.plot(allowed, [row["largest value"] for row in rows], "^:", label="value found, worst image")
    axes.axhline(1, color="black", lw=0.8)
    axes.set(xlabel="limit of passes", ylabel="relative to ρ̃", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
