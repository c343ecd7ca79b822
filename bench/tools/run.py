"""Measures what the file of figures lacks, and prints a table for every case.

A case that the file holds already, measured on this machine at this commit, is not measured again: an interrupted run goes on
where it was.
"""

import argparse
import time
from pathlib import Path

from bench import cases
from bench.cases import edge, imagenet
from bench.harness import core
from bench.harness.session import Session
from bench.report.tables import everything
from bench.report.words import where


def main() -> int:
    """The command line of `python -m bench`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a table in two minutes")
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose level or name holds this")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--json", type=Path, help="the file of figures")
    arguments = parser.parse_args()
    start = time.perf_counter()
    session = Session(arguments.quick, arguments.fresh, arguments.json)
    print(where(session.store.environment), flush=True)
    for case in cases.every(arguments.quick):
        if arguments.only in case.title:
            for threads in core.thread_counts(case):
                print(f"\n{everything(session.record(case, threads))}", flush=True)
    if arguments.only in "edge" and not arguments.quick:
        print(f"\n{everything(session.keep('edge', edge.record))}", flush=True)
    if arguments.only in imagenet.LEVEL and not arguments.quick:
        imagenet.section(arguments.fresh)
    print(f"\n{time.perf_counter() - start:.0f} s; figures in {session.store.path.name}")
    return 0
