"""What the command line and the study share: files that are whole or absent, optional packages, errors of one line."""

import contextlib
import importlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

import torch

# Not the user's own code: this package, the installed ones beside torch, the standard library.
_OTHERS = (
    *(f"{Path(file).parent}{os.sep}" for file in (__file__, Path(torch.__file__).parent, os.__file__)),
    "<frozen",
)


class CommandError(Exception):
    """What the user has to put right, in one line; a command ends with status 2."""


def one_line(error: BaseException) -> str:
    """What was raised, by foreign code, and where in that code: one line, cut where it is long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= 500 else f"{text[:500]} ..."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OTHERS)]
    return text + (f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else "")


class Blame:
    """Whatever is raised inside, by the user's own files and code, becomes a `CommandError` that names `what` and the place.

    Foreign code raises anything, SystemExit included; a Ctrl-C passes through.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        if isinstance(error, CommandError) or not isinstance(error, Exception | SystemExit):
            return
        raise CommandError(f"{self.what}: {one_line(error)}") from error


def extra(name: str, install: str = "'fastsal[demo]'") -> ModuleType:
    """The module of this name, or one line on how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CommandError(f"{error}; pip install {install}") from error


def check_output(path: Path, endings: tuple[str, ...], option: str = "--out") -> None:
    """Says now, not after the work, that a file cannot be written."""
    if path.suffix not in endings:
        raise CommandError(f"{option} {path}: the ending decides the format, wants {' or '.join(endings)}")
    if path.is_dir():
        raise CommandError(f"{option} {path}: is a folder")
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{option} {path}: cannot write into the folder {path.parent}")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` to write into, renamed to it at the end, so that `path` is never there in part.

    Whatever interrupts leaves nothing behind, except SIGKILL and a loss of power, which may leave the file beside. Once this
    has ended, a loss of power does not undo it: the file and its folder are on the disk.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def replacing(path: Path, option: str = "--out") -> Iterator[IO[bytes]]:
    """`whole_file` for the file that an option of a command names: an error becomes one line that says so."""
    with Blame(f"{option} {path}"), whole_file(path) as file:
        yield file
