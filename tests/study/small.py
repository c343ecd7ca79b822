"""A study with little of everything, which the tests share."""

from torch import nn

GRID = ["--epochs", "2", "--images", "24", "--strengths", "0.1", "--radii", "0.5"]
LABELS = ["plain", "λ = 0.1", "ε = 0.5"]


def network():
    """Small and without dropout."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
