"""python -m bench [--quick] [--only WORD] [--fresh]: measures, prints tables, keeps the figures in bench/results/.

python -m bench report [--check]: writes the figures into the README (or fails where the README is not what they say).

A case that the file holds already, measured on this machine at this commit, is not measured again: an interrupted run goes on
where it was.
"""

import argparse
import gc
import time
from pathlib import Path

import torch
from torch import nn

from bench import ROOT, cases, core, edge, memory, model, report
from bench.store import RESULTS, Store, commit

BUDGET = {False: 12.0, True: 4.0}  # seconds a case and thread count takes, about


def run(arguments: argparse.Namespace) -> int:
    """Measures what is missing."""
    path = arguments.json or RESULTS / ("quick.json" if arguments.quick else "bench.json")
    store, at, start = Store(path), commit(), time.perf_counter()
    store.begin(arguments.fresh)
    print(report.where(store), flush=True)
    for case in cases.every(arguments.quick):
        keys = {f"{case.title}, threads: {threads}": threads for threads in core.thread_counts(case)}
        if arguments.only not in case.title:
            continue
        missing = {key: threads for key, threads in keys.items() if arguments.fresh or not store.has(key, at)}
        work = case.make() if missing else None
        for key in keys:
            if work is not None and key in missing:
                store.put(key, core.measure(case, work, missing[key], BUDGET[arguments.quick]), at)
            print(f"\n{report.long_table(store.records[key])}", flush=True)
        del work
        gc.collect()
    if arguments.only in "edge" and not arguments.quick:
        if arguments.fresh or not store.has("edge", at):
            store.put("edge", edge.record(), at)
        print(f"\n{report.long_table(store.records['edge'])}", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s; figures in {path.name}")
    return 0


def peak(arguments: argparse.Namespace) -> int:
    """Prints the peak memory of one contestant of a model level case: what bench/memory.py asks a fresh process for."""
    torch.set_num_threads(arguments.threads)
    tiny = model.work(nn.Linear(5, 3), torch.rand(2, 5))
    next(c for c in tiny.contestants if c.name == arguments.contestant).run(tiny.inputs[0])  # imports, first calls
    case = next(case for case in cases.every(arguments.quick) if case.title == arguments.only)
    work = case.make()
    contestant = next(c for c in work.contestants if c.name == arguments.contestant)
    print(memory.growth(lambda: contestant.run(work.inputs[0])))
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("run", "report", "memory"), default="run")
    parser.add_argument("--quick", action="store_true", help="a table in two minutes")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose level or name holds this")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file holds already")
    parser.add_argument("--json", type=Path, help="the file of figures")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file that `report` writes into")
    parser.add_argument("--check", action="store_true", help="`report` only: write nothing, fail where it is stale")
    parser.add_argument("--contestant", help="`memory` only, which the suite calls for itself")
    parser.add_argument("--threads", type=int, help="`memory` only")
    arguments = parser.parse_args()
    if arguments.command == "report":
        return report.write(arguments.json or RESULTS / "bench.json", arguments.readme, arguments.check)
    return peak(arguments) if arguments.command == "memory" else run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
