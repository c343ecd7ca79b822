"""Digits with margin losses and without: how far images are from the decision boundary afterwards, and the accuracy.

The same CNN of the study, from the same seeds, on the same batches: with cross-entropy alone, and with
`fastsal.losses.margin_loss`, hinged at a target, or `fastsal.losses.cross_lipschitz_loss` added to it. On test images, ρ̃ is the
linearised robustness of `fastsal.analyze`, and ρ the smallest perturbation that any of six attacks finds.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastsal
from bench.harness.case import Case
from bench.harness.clock import timed
from bench.harness.store import Record
from fastsal import losses
from fastsal.study.attacks import ATTACKS, EVERYWHERE, nearest_found
from fastsal.study.data import Data, InMemory, load_digits
from fastsal.study.models import cnn

BATCH, ATTACKED = 64, 100
TARGET = 1.5  # of ρ̃, in units of a pixel's range

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


VARIANTS: dict[str, Loss | None] = {
    "cross-entropy": None,
    f"+ margin_loss, target {TARGET:g}": functools.partial(losses.margin_loss, target=TARGET),
    "+ 0.1 cross_lipschitz_loss": lambda model, x, y: 0.1 * losses.cross_lipschitz_loss(model, x, y),
}


def train(added: Loss | None, data: Data[InMemory], seed: int, epochs: int) -> nn.Module:
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


def measure(model: nn.Module, data: Data[InMemory]) -> dict[str, float]:
    """Accuracy and median ρ̃ on all test images, median ρ on the first hundred."""
    with torch.no_grad():
        accuracy = (model(data.test.x).argmax(1) == data.test.y).double().mean().item()
    rho_tilde = fastsal.analyze(model, data.test.x).linearized_robustness.median().item()
    attacked = data.test.x[:ATTACKED]
    found = [nearest_found(model, attacked, attack, bounds=EVERYWHERE)[1] for attack in ATTACKS]
    rho = torch.stack(found).amin(0).median().item()
    return {"accuracy": round(accuracy, 4), "median ρ̃": round(rho_tilde, 4), "median ρ": round(rho, 4)}


def record(variant: str, seed: int, epochs: int) -> Record:
    """The figures of a network, trained now."""
    data = load_digits(seed=0)
    seconds, model = timed(train, VARIANTS[variant], data, seed, epochs)
    return {
        "loss": variant,
        "seed": seed,
        "epochs": epochs,
        "training seconds": round(seconds, 1),
        **measure(model, data),
    }


def cases(quick: bool = False) -> Iterator[Case]:
    """Two seeds of 40 epochs each; with `quick` one of one epoch. On one thread."""
    for seed in range(1 if quick else 2):
        for variant in VARIANTS:
            figures = functools.partial(record, variant, seed, 1 if quick else 40)
            yield Case("margin_training", f"{variant}, seed {seed}", figures=figures, threads=(1,))
