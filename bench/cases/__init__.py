"""What is measured: a module for each level, found by its name."""

import importlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from bench.harness.case import Case


class Level(NamedTuple):
    """Where the figures of a level are stored, under bench/results, and what they are."""

    file: str
    what: str


LEVELS = {
    "tensor": Level("bench.json", "all quantities from a given Jacobian"),
    "pairs": Level("bench.json", "distances and margins of all pairs of logits"),
    "model": Level("bench.json", "ρ̃ of a batch, from a model"),
    "edge": Level("bench.json", "answers for awkward inputs"),
    "imagenet": Level("imagenet.json", "photographs and a network trained on ImageNet, ten minutes"),
    "zoo": Level("zoo.json", "certified beside exact rows on timm's networks, one of every kind, half an hour"),
    "certified": Level(
        "certified.json", "certified on networks of 1000 classes; trains them first, which takes minutes"
    ),
    "integrations": Level("integrations.json", "the drop-ins beside foolbox's DeepFool and torchattacks' FAB"),
    "margin_training": Level("margin_training.json", "digits with margin losses and without"),
    "data_sets": Level("data_sets.json", "what `fastsal.evaluate` costs besides its model"),
}
COMPARED = ("tensor", "pairs", "model")  # what a quick run measures
DEFAULT = (*COMPARED, "edge", "imagenet")
ON_A_GPU = ("tensor", "pairs")


def every(levels: Iterable[str] = COMPARED, quick: bool = False, device: str = "cpu") -> Iterator[Case]:
    """The cases of some levels; with `quick` small ones."""
    for level in levels:
        module = importlib.import_module(f"bench.cases.{level}")
        yield from module.cases(quick) if device == "cpu" else module.cases(quick, device)
