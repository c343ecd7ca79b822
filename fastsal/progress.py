"""How far a long call has come: a bar where a person watches, or a function of the caller's own that is told."""

import contextlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Report = Callable[[float], None]  # called with the share that is done, from 0 to 1
PATIENCE = 3.0  # seconds ahead, from where on a bar appears by itself


def ignore(share: float) -> None:
    """Nobody is told."""


def is_watched() -> bool:
    """Whether standard error is a terminal or a notebook's."""
    shell = importlib.import_module("IPython").get_ipython() if "IPython" in sys.modules else None
    return sys.stderr.isatty() or type(shell).__name__ == "ZMQInteractiveShell"


def bar(wanted: bool | None, **options: Any) -> Any:
    """A bar of tqdm's, where one is wanted, or is not refused and somebody watches, and tqdm is installed; else None."""
    if not (is_watched() if wanted is None else wanted) or importlib.util.find_spec("tqdm") is None:
        return None
    return importlib.import_module("tqdm").tqdm(**options)


@contextlib.contextmanager
def reporting(wanted: bool | Report | None, name: str) -> Iterator[Report]:
    """A function to call with the share that is done.

    Args:
        wanted: True for a bar from the start, False for none. None: where somebody watches, as soon as `PATIENCE` seconds turn
            out to be ahead. Or a function, which is told instead.
        name: What the bar is called.
    """
    if callable(wanted):
        yield wanted
        return
    start, shown = time.monotonic(), None

    def report(share: float) -> None:
        nonlocal shown
        elapsed = time.monotonic() - start
        if shown is None and (wanted or elapsed * (1 - share) > PATIENCE * share):
            shown = bar(wanted, total=1.0, desc=name, leave=False, bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
            if shown is not None:
                shown.start_t -= elapsed
        if shown is not None:
            shown.update(share - shown.n)

    try:
        yield report if wanted or (wanted is None and is_watched()) else ignore
    finally:
        if shown is not None:
            shown.close()
