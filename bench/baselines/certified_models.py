"""The 1000-class networks of bench/cases/certified.py: synthetic images, three small CNNs and their training.

An image is one of 1000 random smooth prototypes, shifted by up to 4 pixels, scaled in contrast, with noise. `narrow` has
F = 192 features (F < n), `wide` F = 1536 (F > n), both trained to a loss near zero on mild noise; `plain` is `narrow` on so
much noise that it errs now and then, as ordinary networks do.
"""

import time
from pathlib import Path

import torch
from torch import Tensor, nn

CLASSES, SIZE = 1000, 32
NOISE = {"narrow": 0.6, "wide": 0.6, "plain": 2.5}
STEPS = {"narrow": 1500, "wide": 700, "plain": 1500}


class Images:
    """Draws labelled images [b, 3, 32, 32] from its own generator."""

    def __init__(self, kind: str, seed: int) -> None:
        prototypes = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self._prototypes = nn.functional.interpolate(prototypes, size=(SIZE, SIZE), mode="bicubic")
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = NOISE[kind]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(CLASSES, (count,), generator=self._generator)
        shift = torch.randint(-4, 5, (count, 2), generator=self._generator)
        grid = torch.arange(SIZE)
        rows = (grid + shift[:, :1]) % SIZE
        columns = (grid + shift[:, 1:]) % SIZE
        images = self._prototypes[labels]
        images = images.gather(2, rows.view(-1, 1, SIZE, 1).expand_as(images))
        images = images.gather(3, columns.view(-1, 1, 1, SIZE).expand_as(images))
        contrast = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=self._generator)
        return contrast * images + self._noise * torch.randn(images.shape, generator=self._generator), labels


def network(kind: str) -> nn.Sequential:
    """conv-BatchNorm-ReLU blocks, then F features and the linear head to 1000 classes."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    trunk = [*block(3, 32, 2), *block(32, 64, 2), *block(64, 96, 1)]
    if kind == "wide":
        return nn.Sequential(*trunk, *block(96, 96, 2), nn.Flatten(), nn.Linear(96 * 16, CLASSES))
    return nn.Sequential(*trunk, *block(96, 192, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, CLASSES))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    model.eval()
    with torch.no_grad():
        logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    return (logits.argmax(1) == labels).double().mean().item(), loss


def train(kind: str, steps: int, batch: int = 128) -> nn.Module:
    torch.manual_seed(0)
    model = network(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    source, test = Images(kind, 1), Images(kind, 2).draw(1000)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        model.train()
        images, labels = source.draw(batch)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            right, held_out = accuracy(model, *test)
            seconds = time.perf_counter() - start
            print(f"{kind} step {step}: {seconds:.0f} s, accuracy {right:.3f}, loss {held_out:.3f}", flush=True)
    return model.eval()


def load(kind: str, folder: Path) -> nn.Module:
    """The trained network, trained now if the folder does not hold it."""
    file = folder / f"certified_{kind}.pt"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(train(kind, STEPS[kind]).state_dict(), file)
    model = network(kind)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()
