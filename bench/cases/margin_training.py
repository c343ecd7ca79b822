"""Digits with margin losses and without: how far images are from the decision boundary afterwards, and the accuracy.

    python bench/cases/margin_training.py [--epochs N] [--seeds N] [--out FILE]

The same CNN of the study, from the same seeds, on the same batches: with cross-entropy alone, and with
`fastsal.losses.margin_loss`, hinged at a target, or `fastsal.losses.cross_lipschitz_loss` added to it. On test images, ρ̃ is the
linearised robustness of `fastsal.analyze`, and ρ the smallest perturbation that any of six attacks finds.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastsal
from fastsal import losses
from fastsal.study.attacks import robustness
from fastsal.study.data import Data, Held, load_digits
from fastsal.study.models import cnn

RESULTS = Path(__file__).resolve().parents[1] / "results" / "margin_training.json"
BATCH, ATTACKED = 64, 100
TARGET = 1.5  # of ρ̃, in units of a pixel's range

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def margin(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return losses.margin_loss(model, x, y, target=TARGET)


def cross_lipschitz(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 0.1 * losses.cross_lipschitz_loss(model, x, y)


VARIANTS: dict[str, Loss | None] = {
    "cross-entropy": None,
    f"+ margin_loss, target {TARGET:g}": margin,
    "+ 0.1 cross_lipschitz_loss": cross_lipschitz,
}


def train(added: Loss | None, data: Data[Held], seed: int, epochs: int) -> nn.Module:
    """The network after training. Dropout counts in the cross-entropy; the margins are those of the whole network."""
    torch.manual_seed(seed)
    model = cnn(data.shape, data.classes, widths=(32, 64))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train)).split(BATCH):
            x, y = data.train.batch(batch)
            loss = cross_entropy(model.train()(x), y)
            if added is not None:
                loss = loss + added(model.eval(), x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def measure(model: nn.Module, data: Data[Held]) -> dict[str, float]:
    """Accuracy and median ρ̃ on all test images, median ρ on the first hundred."""
    with torch.no_grad():
        accuracy = (model(data.test.x).argmax(1) == data.test.y).double().mean().item()
    rho_tilde = fastsal.analyze(model, data.test.x).linearized_robustness.median().item()
    rho = robustness(model, data.test.x[:ATTACKED]).rho.median().item()
    return {"accuracy": round(accuracy, 4), "median ρ̃": round(rho_tilde, 4), "median ρ": round(rho, 4)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, records = load_digits(seed=0), []
    print("| loss | seed | accuracy | median ρ̃ | median ρ | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for seed in range(arguments.seeds):
        for name, added in VARIANTS.items():
            start = time.perf_counter()
            model = train(added, data, seed, arguments.epochs)
            record: dict[str, Any] = {
                "loss": name,
                "seed": seed,
                "training seconds": round(time.perf_counter() - start, 1),
            }
            records.append(record | measure(model, data))
            cells = [
                records[-1][key] for key in ("loss", "seed", "accuracy", "median ρ̃", "median ρ", "training seconds")
            ]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            head = {"epochs": arguments.epochs, "torch": version("torch"), "fastsal": version("fastsal")}
            text = json.dumps(head | {"records": records}, indent=1, ensure_ascii=False)
            arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
