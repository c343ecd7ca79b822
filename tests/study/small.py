"""A study with little of everything, which the tests share."""

from torch import nn

IMAGES, SEEDS = 8, (0, 1)
GRID = ["--epochs", "1", "--images", str(IMAGES), "--strengths", "0.1", "--radii", "0.5", "--seeds", *map(str, SEEDS)]
LABELS = ["plain", "λ = 0.1", "ε = 0.5"]


def network():
    """Small and without dropout."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
