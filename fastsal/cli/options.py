"""Options that several subcommands take."""

import argparse
import math

import torch

from fastsal.files import Blame, CommandError


def natural(text: str, least: int = 0) -> int:
    """An option's whole number, for argparse."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a whole number from {least}")
    return int(text)


def positive(text: str) -> int:
    """An option's whole number from 1, for argparse."""
    return natural(text, 1)


def check_device(name: str) -> torch.device:
    """The device of this name, once torch has put something there."""
    with Blame(f"--device {name}"):
        device = torch.device(name)
        if device.type == "cuda" and not torch.cuda.is_available():
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
            raise CommandError(f"--device {name}: torch {torch.__version__} finds no GPU (it {built}); wants cpu")
        torch.empty(0, device=device)
        return device


def from_zero(text: str) -> float:
    """An option's number from 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a number from 0")
    return value
