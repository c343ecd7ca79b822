"""docs/benchmarks.md, which holds every figure, and the README's few: both are written from bench/results/*.json."""

import argparse
import json
import sys
from pathlib import Path

from bench import RESULTS, ROOT
from bench.report import plots, tables
from bench.report.tables import LEVELS, of
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


def headline(store: Store) -> str:
    """The README's part: a few contestants on a few cases."""
    records = list(store.records.values())
    parts = []
    for level, (meaning, contestants) in HEADLINES.items():
        if mine := of(level, records):
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
        if mine := of(name, records):
            parts += [
                f"## {level.title}",
                level.meaning,
                *tables.figures(level, mine),
                f"![{level.title}: bars](../bench/results/{name}.png)",
            ]
    for record in of("edge", records):
        meaning = "What everyone answers for ρ̃: `right`, its multiple of the truth, or what came instead."
        parts += ["## Awkward inputs", meaning, tables.edge(record)]
    if certified:
        plot = "![Passes over classes](../bench/results/certified_growth.png)"
        parts += ["## Exact and certified with 1000 classes", *tables.certified(certified), plot]
    parts += ["## Every case", "All that was measured, with quartiles, errors, other load and who was skipped."]
    for name, level in LEVELS.items():
        if mine := of(name, records):
            first, *others = map(tables.notes, mine)
            everywhere = {who: why for who, why in first.items() if all(other.get(who) == why for other in others)}
            details = (tables.everything(record, everywhere) for record in mine)
            head = f"<details><summary>{level.title}</summary>"
            parts += [head, *tables.reasons(everywhere), *details, "</details>"]
    return "\n\n".join(parts) + "\n"


def documents(results: Path, readme: str) -> dict[Path, str]:
    """What the page and the README (now `readme`) must hold, by their place in the checkout.

    Raises:
        ValueError: there are no figures, or the README does not say where they go.
    """
    store, path = Store(results / "bench.json"), results / "certified.json"
    if not store.records:
        raise ValueError(f"{store.path.name} holds no figures: run `python -m bench` first")
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(END) < readme.index(BEGIN):
        raise ValueError(f"README.md: wants one line `{BEGIN}` and after it one line `{END}`")
    certified = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return {
        PAGE: page(store, certified),
        Path("README.md"): f"{before}{BEGIN}\n\n{headline(store)}\n\n{END}{after}",
    }


def main(results: Path = RESULTS, root: Path = ROOT) -> int:
    """Writes page, README and plots."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        texts = documents(results, (root / "README.md").read_text(encoding="utf-8"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for name, text in texts.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    plots.every(results)
    print(f"wrote {' and '.join(map(str, texts))}")
    return 0
