"""Measures what the files of figures lack, and prints a table for every case.

A case that a file holds already, measured on this machine at this commit, is not measured again: a run that was interrupted or
killed resumes.
"""

import argparse
import time
from pathlib import Path

from bench import RESULTS, cases
from bench.harness.store import Store
from bench.report.tables import everything
from bench.report.words import where


def main(commands: dict[str, tuple[str, str]]) -> int:
    """The command line of `python -m bench`. `commands`, with what they do, are told of."""
    lines = ["levels, which go into files of bench/results:"]
    lines += [f"  {name:18}{level.what} ({level.file})" for name, level in cases.LEVELS.items()]
    lines += ["", "commands, with options of their own (python -m bench COMMAND --help):"]
    lines += [f"  {name:18}{what}" for name, (_, what) in commands.items()]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="\n".join(lines), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("levels", nargs="*", metavar="LEVEL", help=f"by default {' '.join(cases.DEFAULT)}")
    parser.add_argument(
        "--quick", action="store_true", help="small cases, by default two minutes of them, into quick.json"
    )
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose level or name holds this")
    parser.add_argument("--fresh", action="store_true", help="measure again what the files hold")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=f"for {' and '.join(cases.ON_A_GPU)}")
    parser.add_argument("--out", type=Path, help="the file of figures")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.levels) - set(cases.LEVELS)):
        known = ", ".join((*cases.LEVELS, *commands))
        parser.error(f"got {', '.join(map(repr, unknown))}, wants of {known}")
    default = cases.COMPARED if arguments.quick else cases.DEFAULT
    levels = arguments.levels or (default if arguments.device == "cpu" else cases.ON_A_GPU)
    if arguments.device == "cuda" and set(levels) - set(cases.ON_A_GPU):
        parser.error(f"--device cuda: got {' '.join(levels)}, wants of {', '.join(cases.ON_A_GPU)}")
    start, stores, answers = time.perf_counter(), dict[Path, Store](), list[bool]()
    for case in cases.every(levels, arguments.quick, arguments.device):
        path = arguments.out or RESULTS / ("quick.json" if arguments.quick else cases.LEVELS[case.level].file)
        if arguments.only not in case.title:
            continue
        if path not in stores:
            stores[path] = Store(path).begin(arguments.fresh, arguments.device)
            print(where(stores[path].environment), flush=True)
        if case.missing:
            print(f"\n{case.title} skipped: {case.missing}", flush=True)
            continue
        for record in case.records(stores[path]):
            print(f"\n{everything(record)}", flush=True)
            ours = (row for row in record.get("results", ()) if row["implementation"].startswith("fastsal"))
            answers += [row["status"] == "right" for row in ours if row["status"] != "skipped"]
    if answers:
        print(f"\n{sum(answers)} of {len(answers)} answers of fastsal are right")
    files = ", ".join(path.name for path in stores) or "no file"
    print(f"\n{time.perf_counter() - start:.0f} s; figures in {files}")
    return 0
