"""Options that several subcommands take."""

import argparse
import math


def natural(text: str) -> int:
    """An option's whole number from 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a whole number from 0")
    return int(text)


def from_zero(text: str) -> float:
    """An option's number from 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a number from 0")
    return value


def positive(text: str) -> int:
    """Reads an option that is a whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a whole number from 1")
    return int(text)
