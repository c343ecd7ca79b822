"""What EfficientNet-Lite0 sees in four photographs: saliency maps of the predicted class, and against the nearest other class.

    python -m bench photographs

Draws bench/results/study/photographs.jpg: photographs with the names of both classes, beneath them g, the gradient of the
predicted logit, and g†, that of its margin over the class that `method="certified"` finds nearest. Prints ρ̃, α, α†, the passes.
Takes the packages that bench/baselines/imagenet.py names, and timm, which knows the classes' names.
"""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

import fastsal
from bench import RESULTS

SHOWN = (0, 2, 6, 7)  # of the benchmark's photographs: a cat, a flower, a cup, a rocket
WIDTH, HEIGHT = 5.0, 4.6  # inches, so that the names are readable on a phone


def main() -> int:
    """The command line of `python -m bench photographs`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "study" / "photographs.jpg", help="default: %(default)s")
    arguments = parser.parse_args()

    import matplotlib
    from matplotlib.figure import Figure
    from timm.data import ImageNetInfo

    from bench.baselines.imagenet import images, network

    names = ImageNetInfo()
    x = images()[list(SHOWN)]
    result = fastsal.analyze(network(), x, method="certified", keep_saliency=True)
    rows = {
        "$g$": result,
        "$g$†, against\nthe nearest\nother class": replace(result, saliency=result.binarized_saliency),
    }
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0, hspace=0)
        axes = fastsal.plot.saliency_grid(x, rows, columns=len(x), figure=figure)
        for slot, ax in enumerate(axes[0]):
            classes = (int(which[slot]) for which in (result.prediction, result.runner_up))
            predicted, nearest = (names.index_to_description(which).split(",")[0] for which in classes)
            ax.set_title(f"{textwrap.fill(predicted, 17)}\nnearest other:\n{textwrap.fill(nearest, 17)}")
            values = ", ".join(
                f"{symbol} {getattr(result, name)[slot].item():.3f}"
                for symbol, name in {
                    "ρ̃": "linearized_robustness",
                    "α": "alignment",
                    "α†": "binarized_alignment",
                }.items()
            )
            certified = "certified" if result.certified[slot] else "not certified"
            passes = int(result.vjps[slot] + result.jvps[slot])
            print(f"{predicted}, nearest {nearest}: {values}, {certified} in {passes} passes")
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(arguments.out, dpi=220, pil_kwargs={"quality": 85})
    return 0
