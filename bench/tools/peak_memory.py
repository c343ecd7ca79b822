"""Prints the peak memory of one contestant in one case: bench/harness/memory.py starts this in a fresh process."""

import argparse

import torch

from bench import cases
from bench.harness import memory


def main() -> None:
    """Measures the second of two runs: the first, on tiny inputs, takes what imports and first calls take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", help="its title")
    parser.add_argument("contestant", help="its name")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true", help="look among the cases of a quick run")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    case = next(case for case in cases.every(arguments.quick) if case.title == arguments.case)
    for tiny in (True, False):
        work = case.make(tiny)
        contestant = next(one for one in work.contestants if one.name == arguments.contestant)
        growth = memory.growth(lambda work=work, contestant=contestant: contestant.run(work.inputs[0]))
    print(growth)


if __name__ == "__main__":
    main()
