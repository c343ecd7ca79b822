"""`fastsal demo --digits`: two small networks on scikit-learn's handwritten digits, one trained as usual, one to be robust."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal import plot
from fastsal.analysis import analyze
from fastsal.cli.clock import best_times
from fastsal.files import extra, save_figure
from fastsal.model.linearization import linearize
from fastsal.study.data import Data, InMemory, load_digits
from fastsal.study.train import Recipe, single_thread, train
from fastsal.tensor import ops
from fastsal.tensor.geometry import Geometry, margin_geometry
from fastsal.tensor.tolerance import scaled_errors

PENALTY = 1.0
EPOCHS = 60
BATCH = 64
SHOWN = 8
QUANTITIES = ("linearized_robustness", "alignment", "bound", "homogeneity")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A trained network's accuracy on the test digits, and their geometry."""

    model: nn.Module
    accuracy: float
    geometry: Geometry


def network() -> nn.Sequential:
    """A small CNN: logits [B, 10] from images [B, 1, 8, 8]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def measure(digits: Data[InMemory], penalty: float, seed: int, epochs: int) -> Measured:
    """Trains a network and analyses the whole test split with it."""
    with single_thread():
        model = train(network, digits, Recipe(penalty=penalty), seed=seed, epochs=epochs, batch_size=BATCH)
        geometry = analyze(model, digits.test.x, keep_saliency=True)
    accuracy = (geometry.prediction == digits.test.y).double().mean().item()
    return Measured(model, accuracy, geometry)


def table(plain: Measured, penalised: Measured) -> str:
    """The accuracy and the medians of both networks, side by side."""
    lines = [f"{'':30}{'plain':>12}{'penalised':>12}"]
    lines.append(f"{'test accuracy':30}{plain.accuracy:12.4f}{penalised.accuracy:12.4f}")
    for name in QUANTITIES:
        medians = [getattr(one.geometry, name).median().item() for one in (plain, penalised)]
        lines.append(f"{f'median {name}':30}" + "".join(f"{value:12.4f}" for value in medians))
    return "\n".join(lines)


def accelerated(x: Tensor, models: list[nn.Module]) -> str:
    """Says how far the kernel is from the reference on the Jacobians of x, and how long each of them takes."""
    largest, where = 0.0, ""
    for model in models:
        with linearize(model, x) as graph:
            logits, flat = graph.logits, graph.x.detach()
            classes = torch.arange(logits.shape[1]).unsqueeze(1).expand(-1, len(x))
            jacobian = graph.rows(classes)
        result = margin_geometry(logits, jacobian, flat)
        error, name = max((error, name) for name, error in scaled_errors(result, logits, jacobian, flat, 2.0).items())
        largest, where = max((largest, where), (error, name))
    backend = ops.choose("auto", jacobian)
    fast, eager = best_times((logits, jacobian, flat), 2.0, (backend, "reference"), 20)
    shape = " x ".join(map(str, jacobian.shape))
    return (
        f"largest deviation from the float64 reference: {largest:.1e} of its scale, in {where} (limit 1e-6)\n"
        f"margin_geometry on the Jacobian {shape} (model passes not counted): {1e3 * fast:.3f} ms on the {backend} backend,\n"
        f"{1e3 * eager:.3f} ms on the reference backend (eager torch, float64), {eager / fast:.1f} times as long"
    )


def picture(digits: Data[InMemory], plain: Measured, penalised: Measured, out: Path) -> None:
    """Draws the first test digit of each of eight classes, with the saliency maps of both networks beneath."""
    figure = extra("matplotlib.figure").Figure(figsize=(1.45 * SHOWN + 1.6, 5.6), layout="constrained")
    shown = [int((digits.test.y == digit).nonzero()[0]) for digit in range(SHOWN)]
    maps = {}
    for name, measured in (("plain training", plain), ("double\nbackpropagation", penalised)):
        saliency: Any = measured.geometry.saliency
        maps[name] = dataclasses.replace(measured.geometry, saliency=saliency[shown])
    axes = plot.saliency_grid(digits.test.x[shown], maps, columns=SHOWN, figure=figure)
    for row, geometry in zip(axes[1:], maps.values(), strict=True):
        for ax, index in zip(row, shown, strict=True):
            values = (getattr(geometry, field)[index].item() for field in QUANTITIES[:2])
            ax.set_title("ρ̃ {:.2f}   α {:.2f}".format(*values), fontsize=9)
    figure.suptitle(
        "Digits and the gradients of their predicted logits. ρ̃ linearised robustness, α alignment", fontsize=11
    )
    save_figure(figure, out, dpi=130)


def show(out: Path, seed: int) -> None:
    """Trains both networks, prints what it measured, and draws the picture."""
    digits = load_digits(seed)
    print(f"training two networks on {len(digits.train.x)} digits of 8 x 8 pixels in [0, 1] ...", flush=True)
    plain, penalised = (measure(digits, penalty, seed, EPOCHS) for penalty in (0.0, PENALTY))
    print(f"\n{len(digits.test.x)} test digits, every class's gradient, Euclidean norm, distances in pixel units")
    print(table(plain, penalised), end="\n\n")
    print(accelerated(digits.test.x, [plain.model, penalised.model]))
    picture(digits, plain, penalised, out)
