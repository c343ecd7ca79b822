"""python -m bench [--quick] [--only WORD] [--fresh]: measures, prints tables, keeps the figures in bench/results/.

python -m bench report [--check]: writes the figures into the README (or fails where the README is not what they say).
python -m bench profile: where the time of a model-level analysis goes.

A case that the file holds already, measured on this machine at this commit, is not measured again: an interrupted run goes on
where it was.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from bench import ROOT, cases, report
from bench.cases import edge
from bench.suite import core, memory
from bench.suite.session import Session
from bench.suite.store import RESULTS
from bench.tools import profiling


def run(arguments: argparse.Namespace) -> int:
    """Measures what is missing."""
    start = time.perf_counter()
    session = Session(arguments.quick, arguments.fresh, arguments.json)
    print(report.where(session.store.environment), flush=True)
    for case in cases.every(arguments.quick):
        if arguments.only in case.title:
            for threads in core.thread_counts(case):
                print(f"\n{report.long_table(session.record(case, threads))}", flush=True)
    if arguments.only in "edge" and not arguments.quick:
        print(f"\n{report.long_table(session.edge())}", flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s; figures in {session.store.path.name}")
    return 0


def peak(arguments: argparse.Namespace) -> int:
    """Prints the peak memory of one contestant of a model level case: what bench/suite/memory.py asks a fresh process for."""
    torch.set_num_threads(arguments.threads)
    case = next(case for case in cases.every(arguments.quick) if case.title == arguments.only)
    for tiny in (True, False):  # first imports and first calls, then the work
        work = case.make(tiny)
        contestant = next(one for one in work.contestants if one.name == arguments.contestant)
        growth = memory.growth(lambda work=work, contestant=contestant: contestant.run(work.inputs[0]))
    print(growth)
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", nargs="?", choices=("run", "report", "profile", "memory", "interpreted"), default="run"
    )
    parser.add_argument("--quick", action="store_true", help="a table in two minutes")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose level or name holds this")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--json", type=Path, help="the file of figures")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file that `report` writes into")
    parser.add_argument("--check", action="store_true", help="`report` only: write nothing, fail where it is stale")
    parser.add_argument("--contestant", help="`memory` only, which the suite calls for itself")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="`memory` only")
    arguments = parser.parse_args()
    if arguments.command == "report":
        return report.write(arguments.json or RESULTS / "bench.json", arguments.readme, arguments.check)
    if arguments.command == "profile":
        print(profiling.table(arguments.only))
        return 0
    if arguments.command == "interpreted":  # bench/cases/edge.py asks a process with Triton's interpreter for it
        print(json.dumps(edge.row(dict(edge.answers())["fastsal triton"])))
        return 0
    return peak(arguments) if arguments.command == "memory" else run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
