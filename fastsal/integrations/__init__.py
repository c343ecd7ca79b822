"""Drop-ins for other libraries: a module for each, of its name, imported only when asked for.

`fastsal.integrations.foolbox`, `.torchattacks` and `.captum` have classes of the names and arguments that the library's own
have, so that a script changes in one import line.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def peer(name: str, install: str) -> Iterator[None]:
    """Says what to install where the library of this name is not there to be imported inside."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(
            f"fastsal.integrations.{name} needs {name}, which is not installed: pip install {install}"
        ) from error


class Logits(nn.Module):
    """A function that a library wraps around a network, as a module that has the network in it.

    From the network, `fastsal.analyze` learns how many rows to take at once, and whether features are a shorter way.
    """

    def __init__(self, function: Callable[..., Any], network: object) -> None:
        super().__init__()
        self.function = function
        if isinstance(network, nn.Module):
            self.network = network

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)
