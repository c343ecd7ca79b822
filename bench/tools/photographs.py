"""What EfficientNet-Lite0 to -Lite2 see in photographs: saliency maps of the first, and the paper's quantities of all three.

    python -m bench photographs

Draws bench/results/study/photographs.jpg: photographs of `fastsal demo` with the names of both classes, beneath them g, the
gradient of the predicted logit, and g†, that of its margin over the class that `method="certified"` finds nearest. Writes
photographs.csv beside it: a row a network and photograph. Takes `fastsal[bench]`.
"""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

import fastsal
from bench import RESULTS
from fastsal.cli import photographs
from fastsal.study.results import write_table

SIDES = (224, 240, 260)  # pixels that Lite0 to Lite2 were trained with
SHOWN = (0, 1, 3, 5)  # of the photographs
WIDTH, HEIGHT = 5.0, 4.6  # inches, so that the names are readable on a phone


def rows(k: int, x: torch.Tensor, result: fastsal.Geometry) -> list[dict[str, object]]:
    """What the table says of the photographs x and of EfficientNet-Litek's result."""
    called, length = photographs.names(), x.flatten(1).norm(dim=1)
    return [
        {
            "network": f"EfficientNet-Lite{k}",
            "photograph": name,
            "class": called[int(one.prediction)],
            "nearest": called[int(one.runner_up)],
            "linearized_robustness": one.linearized_robustness.item(),
            "alignment": one.alignment.item(),
            "cosine": one.cosine.item(),
            "homogeneity": one.homogeneity.item(),
            "binarized_homogeneity": one.binarized_homogeneity.item(),
            "gap_term": (size * one.direction_gap).item(),
            # ρ̃ is Ψ† / ‖g†‖
            "offset_term": (one.binarized_offset.abs() * one.linearized_robustness / one.binarized_logit).item(),
            "bound": one.bound.item(),
            "passes": int(one.vjps + one.jvps),
            "certified": bool(one.certified),
        }
        for name, one, size in zip(photographs.SHOWN, result, length, strict=True)
    ]


def draw(x: torch.Tensor, result: fastsal.Geometry, out: Path) -> None:
    """The photographs with the names of both classes, g and g†."""
    import matplotlib
    from matplotlib.figure import Figure

    called = photographs.names()
    maps = {
        "$g$": result,
        "$g$†, against\nthe nearest\nother class": replace(result, saliency=result.binarized_saliency),
    }
    with matplotlib.rc_context({"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.04, wspace=0, hspace=0)
        axes = fastsal.plot.saliency_grid(x, maps, columns=len(x), figure=figure)
        for one, ax in zip(result, axes[0], strict=True):
            predicted, nearest = (textwrap.fill(called[int(which)], 17) for which in (one.prediction, one.runner_up))
            ax.set_title(f"{predicted}\nnearest other:\n{nearest}")
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=220, pil_kwargs={"quality": 85})


def main() -> int:
    """The command line of `python -m bench photographs`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "study" / "photographs.jpg", help="default: %(default)s")
    arguments = parser.parse_args()
    table = []
    for k, side in enumerate(SIDES):
        x = photographs.load([], side)
        result = fastsal.analyze(photographs.network(k), x, method="certified", keep_saliency=True)
        table += rows(k, x, result)
        if not k:
            draw(x[list(SHOWN)], result[list(SHOWN)], arguments.out)
    write_table(arguments.out.with_suffix(".csv"), table)
    for row in table:
        print(", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return 0
