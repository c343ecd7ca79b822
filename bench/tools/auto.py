"""What the default method takes as classes grow: passes and seconds beside exact, on an untrained CNN of 3 x 64 x 64 images.

    python -m bench auto            # 10 to 10,000 classes, minutes
    python -m bench auto 10 100     # these

Prints a table: the method that `auto` took, its passes an image on average and at most, its seconds an image, those of `exact`
in the same rounds, and whether the nearest classes are the same.
"""

import argparse

import torch

import fastsal
from bench.baselines.models import cnn
from bench.harness.clock import interleaved

CLASSES = (10, 30, 100, 101, 300, 1000, 3000, 10000)
IMAGES = 2
SECONDS = 6.0  # for both methods together


def row(classes: int) -> list[str]:
    """What is measured for a number of classes."""
    torch.manual_seed(classes)
    model, x = cnn(classes, 64).eval().requires_grad_(False), torch.rand(IMAGES, 3, 64, 64)
    found = {
        name: fastsal.analyze(model, x, method=name) for name in ("auto", "exact")
    }  # and what a first call prepares
    times = interleaved(
        {name: lambda z, name=name: fastsal.analyze(model, z, method=name) for name in found}, [x], SECONDS
    )
    auto, exact = (sorted(times[name])[len(times[name]) // 2] / IMAGES for name in ("auto", "exact"))
    passes = found["auto"].vjps + found["auto"].jvps
    same = int((found["auto"].runner_up == found["exact"].runner_up).sum())
    return [
        f"{classes:,}",
        found["auto"].method,
        f"{passes.double().mean():.0f} ({passes.max()})",
        f"{auto:.3g} s",
        f"{int(found['exact'].vjps.max()):,}",
        f"{exact:.3g} s",
        f"{exact / auto:.2g}",
        f"{same} of {IMAGES}",
    ]


def main() -> int:
    """The command line of `python -m bench auto`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classes", nargs="*", type=int, default=CLASSES, metavar="N", help="numbers of classes")
    arguments = parser.parse_args()
    head = ("n", "auto is", "passes (most)", "auto", "exact passes", "exact", "times as fast", "same")
    print(f"| {' | '.join(head)} |\n|{'---:|' * len(head)}")
    for classes in arguments.classes:
        print(f"| {' | '.join(row(classes))} |", flush=True)
    return 0
