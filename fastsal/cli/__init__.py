"""The command line: `fastsal demo | study | analyze | report | check | info`, also `python -m fastsal`.

Each subcommand is a module of this folder with two functions, `add_arguments` and `run`. Its docstring is its help.
"""

import argparse
import sys
from typing import NoReturn

import fastsal
from fastsal.cli import analyze, check, demo, info, report, study
from fastsal.files import CommandError

COMMANDS = {"demo": demo, "study": study, "analyze": analyze, "report": report, "check": check, "info": info}


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastsal",
        description="Linearised robustness of classifiers and alignment of their saliency maps, accelerated.",
        epilog="start with: fastsal demo",
    )
    parser.add_argument("--version", action="version", version=f"fastsal {fastsal.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        assert command.__doc__ is not None
        summary, _, details = command.__doc__.partition("\n")
        command.add_arguments(
            commands.add_parser(
                name,
                help=summary,
                description=f"{summary}\n{details}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The words behind `fastsal`; None takes those of the process.

    Returns:
        The exit status: 0, 1 where `check` finds a result out of tolerance or `analyze` a bad example, 130 for Ctrl-C, and 2
        where nothing could be done, for which one line on standard error says why.
    """
    parser = _parser()
    try:
        arguments, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.prog = " ".join(filter(None, ("fastsal", arguments.command)))
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as done:  # argparse's way to end: --help and --version are 0, a usage error 2
        return int(done.code or 0)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        status: int = COMMANDS[arguments.command].run(arguments)
        return status
    except CommandError as error:
        print(f"fastsal {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"fastsal {arguments.command}: interrupted", file=sys.stderr)
        return 130
