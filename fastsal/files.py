"""For commands: atomic writes that spare the user's own files, optional packages, errors in one line."""

import contextlib
import csv
import importlib
import io
import os
import re
import secrets
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch

# Not the user's own code: this package, the installed ones beside torch, the standard library.
_OTHERS = (
    *(f"{Path(file).parent}{os.sep}" for file in (__file__, Path(torch.__file__).parent, os.__file__)),
    "<frozen",
)
MARK = "fastsal wrote this and may replace it"  # in the metadata of every file whose format has any
_ENDS = 1 << 16  # bytes at either end of a file, among which these are
NAMED = 3  # of many things that differ
_OPTIONAL = ("name", "y", "error")  # columns that are not in every table of results
LEFT_BEHIND = re.compile(r"\.(.+)\.\d+\.tmp")  # what `whole_file` leaves when it is killed


class CommandError(ValueError):
    """What the user has to put right, in one line; a command ends with status 2."""


class MissingPackageError(CommandError, ImportError):
    """A package that fastsal needs for what was asked, and can do without otherwise, is not installed."""


def one_line(error: BaseException) -> str:
    """What user code raised, and where in that code: one line, cut where it is long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= 500 else f"{text[:500]} ..."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_OTHERS)]
    return text + (f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else "")


class Blame:
    """Whatever is raised inside, by the user's own files and code, becomes a `CommandError` that names `what` and the place.

    User code may raise anything, SystemExit included; a Ctrl-C passes through.
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
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        lacking = (error.name or library).partition(".")[0]  # perhaps what the library itself imports
        install = install if lacking == library else lacking
        raise MissingPackageError(f"{library} cannot be imported: {error}; pip install {install}") from error
    except RuntimeError as error:  # a torchvision that was built for another torch
        raise CommandError(
            f"{library} cannot be imported beside torch {torch.__version__} ({error}); wants builds of torch and {library} "
            "that belong together"
        ) from error


def is_own(path: Path, columns: Sequence[str] = ()) -> bool:
    """Whether fastsal wrote this file: it bears the mark, or is a CSV with these columns, written as Python's csv does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_ENDS)
        file.seek(-min(path.stat().st_size, _ENDS), os.SEEK_END)
        if MARK.encode() in head or MARK.encode() in file.read():
            return True
    line, end, _ = head.decode(errors="replace").partition("\r\n")

    def always_there(names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in _OPTIONAL]

    return bool(end and columns) and always_there(next(csv.reader([line]), [])) == always_there(columns)


def write_csv(file: IO[bytes], names: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """A table with these names of columns, in UTF-8, into an open file."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows(rows)
    text.detach()


def check_own(path: Path, option: str = "--out", columns: Sequence[str] = ()) -> None:
    """Raises where something stands at this path that fastsal did not write."""
    with Blame(f"{option} {path}"):
        if path.is_dir():
            raise CommandError(f"{option} {path}: is a folder")
        if os.path.lexists(path) and not is_own(path, columns):
            raise CommandError(
                f"{option} {path}: is there already, and fastsal did not write it; move it away, or choose another name"
            )


def check_output(path: Path, endings: tuple[str, ...], option: str = "--out", columns: Sequence[str] = ()) -> None:
    """Says now, not after the work, that a file cannot be written. A CSV of these columns may be replaced."""
    if path.suffix not in endings:
        raise CommandError(f"{option} {path}: the ending decides the format, wants {' or '.join(endings)}")
    check_own(path, option, columns)
    if not os.access(path.parent, os.W_OK):
        raise CommandError(f"{option} {path}: cannot write into the folder {path.parent}")


def check_outside(path: Path, data: str, option: str = "--out") -> None:
    """Raises where a new file or folder would lie in a folder of data, `folder:PATH`, and become a part of the data."""
    kind, _, folder = data.partition(":")
    if kind == "folder" and not path.exists() and path.resolve().is_relative_to(Path(folder).resolve()):
        raise CommandError(f"{option} {path}: lies inside the data, wants a place outside {folder}")


def check_folder(folder: Path, is_own: Callable[[], bool], option: str = "--out") -> None:
    """Raises unless a folder is missing, or empty, or made by fastsal, which `is_own` tells by what the folder holds."""
    with Blame(f"{option} {folder}"):
        if not folder.is_dir() and os.path.lexists(folder):
            raise CommandError(f"{option} {folder}: is no folder")
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        others = [name for name in names if not LEFT_BEHIND.fullmatch(name)]
        if others and not is_own():
            raise CommandError(
                f"{option} {folder}: holds {others[0]}, and fastsal did not make it; wants a new or an empty folder"
            )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two records of what results were made from, by name. Of a record within it, the names are told."""
    said = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old != new and isinstance(new, Mapping):
            old = old if isinstance(old, Mapping) else {}
            differ = [key for key in dict.fromkeys((*new, *old)) if old.get(key) != new.get(key)]
            more = f" and {len(differ) - NAMED} more" if len(differ) > NAMED else ""
            said.append(f"{name} differ in {', '.join(differ[:NAMED])}{more}")
        elif old != new:
            said.append(f"{name} was {old!r}, is {new!r}")
    return "; ".join(said)


def check_same(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], option: str = "--out") -> None:
    """Raises where the results in a folder were made from something else."""
    if before != now:
        changed = changes(before, now)
        raise CommandError(f"{option} {folder}: holds results of something else: {changed}; wants another folder")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` to write into, renamed to it at the end, so that `path` is never there in part.

    Whatever interrupts leaves nothing behind, except SIGKILL and a loss of power, which may leave the file beside. Once this
    has ended, a loss of power does not undo it: the file and its folder are on the disk.
    """
    beside = path.with_name(f".{path.name}.{secrets.randbits(60)}.tmp")
    file = beside.open("xb")
    try:
        with file:
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
def replacing(path: Path, option: str = "--out", columns: Sequence[str] = ()) -> Iterator[IO[bytes]]:
    """`whole_file` for what an option of a command names, unless it is the user's; an error becomes one line that says so."""
    with Blame(f"{option} {path}"):
        check_own(path, option, columns)
        with whole_file(path) as file:
            yield file


def save_figure(figure: Any, path: Path, option: str = "--out", dpi: int = 150) -> None:
    """Writes a figure of matplotlib's in the format of the path's ending, with the mark, and the same bytes each time."""
    metadata = {"Creator": MARK} | ({"Date": None} if path.suffix == ".svg" else {})
    with replacing(path, option) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=dpi, metadata=metadata)
