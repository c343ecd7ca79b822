"""docs/benchmarks.md, which holds every figure, and the few that the README shows: both from bench/results/*.json.

python -m bench report            writes both, and the plots
python -m bench report --check    writes nothing, and fails where one of them is not what the figures say
"""

import argparse
import json
import re
from pathlib import Path

from bench import RESULTS, ROOT
from bench.report import plots, tables
from bench.report.tables import LEVELS
from bench.report.words import Record, count, when, where
from bench.suite.store import Store

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
PAGE = Path("docs", "benchmarks.md")

INTRODUCTION = """# Benchmarks

`python -m bench report` writes this page from the figures in `bench/results/`; what is changed here by hand is lost.

```
pip install -c constraints.txt '.[bench]'
python -m bench --quick     # two minutes: a table
python -m bench             # everything, half an hour
python -m bench certified   # the networks of 1000 classes; trains them first, which takes minutes
python -m bench report      # writes this page
```

Everyone does the same work in turns, in one process, and no speed is reported before the answer has been checked against
float64. The figures are medians over rounds, the ratios medians of the ratios within a round. A run that was interrupted goes
on where it was. `pytest bench` runs the same cases under pytest-benchmark, to be stored and compared.

Peers that are not installed are skipped. `pip install --no-deps -c constraints.txt torchattacks adv-lib` adds two that do not
install in the usual way: one wants a version of requests from 2020, the other a package that no longer builds."""

# What the README shows of a level: what it is, and who does it.
HEADLINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "model": (
        "ρ̃ of a batch from the model: time, and how many times that of `fastsal exact`",
        (
            "fastsal exact",
            "fastsal certified",
            "torch.func.jacrev + eager",
            "autograd.functional.jacobian + eager",
            "foolbox DeepFool, all",
            "torchattacks FAB",
            "ART DeepFool, all",
            "adv-lib FAB",
        ),
    ),
    "tensor": (
        "All quantities from a given Jacobian (B, n, D) in float32: GB/s, and the fraction of a pure read's",
        ("pure read", "fastsal cpu", "torch.compile", "eager torch"),
    ),
}


def _of(level: str, records: list[Record]) -> list[Record]:
    return [record for record in records if record["level"] == level]


def headline(store: Store) -> str:
    """The README's part: a few contestants on a few cases."""
    records = list(store.records.values())
    parts = []
    for level, (meaning, contestants) in HEADLINES.items():
        if mine := _of(level, records):
            threads = mine[0]["threads"]
            some = [record for record in mine if record["threads"] == threads and "bfloat16" not in record["case"]]
            figure = next(iter(LEVELS[level].figures.values()))
            parts += [f"{meaning}; {count(threads)}:", tables.side_by_side(some[-4:], figure, contestants)]
    machine = store.environment["machine"]
    parts.append(
        f"{machine['processor']}, {when(records)}. [All figures]({PAGE}), with errors, memory and awkward inputs."
    )
    return "\n\n".join(parts)


def page(store: Store, certified: Record | None) -> str:
    """The whole of docs/benchmarks.md."""
    records = list(store.records.values())
    parts = [INTRODUCTION, f"Measured on {where(store.environment)}; {when(records)}."]
    for name, level in LEVELS.items():
        if mine := _of(name, records):
            parts += [
                f"## {level.title}",
                level.meaning,
                *tables.figures(level, mine),
                f"![{level.title}: bars](../bench/results/{name}.png)",
            ]
    for record in _of("edge", records):
        meaning = "What everyone answers for ρ̃: `right`, its multiple of the truth, or what came instead."
        parts += ["## Awkward inputs", meaning, tables.edge(record)]
    if certified:
        plot = "![Passes over classes](../bench/results/certified_growth.png)"
        parts += ["## Exact and certified with 1000 classes", *tables.certified(certified), plot]
    parts += ["## Every case", "All that was measured, with quartiles, errors, other load and who was skipped."]
    for name, level in LEVELS.items():
        if mine := _of(name, records):
            first, *others = map(tables.notes, mine)
            everywhere = {who: why for who, why in first.items() if all(other.get(who) == why for other in others)}
            details = (tables.everything(record, everywhere) for record in mine)
            head = f"<details><summary>{level.title}</summary>"
            parts += [head, *tables.reasons(everywhere), *details, "</details>"]
    return "\n\n".join(parts) + "\n"


def write(results: Path, root: Path, check: bool) -> int:
    """Writes page, README and plots; 1 where there is nothing to write or, with `check`, where one is stale."""
    store, path = Store(results / "bench.json"), results / "certified.json"
    certified = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if not store.records:
        print(f"{store.path.name} holds no figures: run `python -m bench` first")
        return 1
    readme = (root / "README.md").read_text(encoding="utf-8")
    marked = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or not marked.search(readme):
        print(f"README.md: wants one line `{BEGIN}` and after it one line `{END}`")
        return 1
    part = f"{BEGIN}\n\n{headline(store)}\n\n{END}"
    stale = []
    for name, text in {PAGE: page(store, certified), Path("README.md"): marked.sub(lambda _: part, readme)}.items():
        if not (root / name).exists() or (root / name).read_text(encoding="utf-8") != text:
            stale.append(str(name))
            if not check:
                (root / name).parent.mkdir(exist_ok=True)
                (root / name).write_text(text, encoding="utf-8")
    if not check:
        for level in LEVELS:
            if mine := _of(level, list(store.records.values())):
                most = max(record["threads"] for record in mine)
                plots.bars(level, [record for record in mine if record["threads"] == most], results / f"{level}.png")
        if certified:
            plots.growth(certified["growth"], results / "certified_growth.png")
    if not stale:
        print("all is up to date with the figures")
    elif check:
        print(f"{', '.join(stale)}: stale, run `python -m bench report`")
    else:
        print(f"wrote {', '.join(stale)}")
    return int(check and bool(stale))


def main() -> int:
    """The command line of `python -m bench report`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where something is stale")
    return write(RESULTS, ROOT, parser.parse_args().check)
