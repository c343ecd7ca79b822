"""What is measured: the cases of every level, gathered in one registry; and two studies with tables of their own."""

from collections.abc import Iterator

from bench.cases import model, pairs, tensor
from bench.harness.core import Case


def every(quick: bool = False) -> Iterator[Case]:
    """The cases of a full run, or those of a quick one."""
    for level in (tensor, pairs, model):
        yield from (case for case in level.cases() if case.quick == quick)
