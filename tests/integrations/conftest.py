"""A classifier of digits, trained in seconds and once, and images that it was not trained on."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastsal.study.data import load_digits


@dataclass(frozen=True)
class Digits:
    """`model` in evaluation mode; images [64, 1, 8, 8] with pixels in [0, 1] and their labels [64]."""

    model: nn.Module
    images: Tensor
    labels: Tensor


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """All tests here are of small operations."""


@pytest.fixture(scope="session")
def trained():
    """What `digits` hands out copies of."""
    data = load_digits(seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 12, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(108, 32), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        cross_entropy(model(data.train.x), data.train.y).backward()
        optimizer.step()
    optimizer.zero_grad()
    accuracy = (model(data.test.x).argmax(1) == data.test.y).float().mean()
    assert accuracy > 0.9
    return model.eval(), data.test.x[:64].clone(), data.test.y[:64].clone()


@pytest.fixture
def digits(trained):
    return Digits(*copy.deepcopy(trained))


@pytest.fixture
def run_script(digits):
    """`run_script(script, before, after, **given)`: what a script binds with one line of it and with another.

    The script is given the digits' model, images and labels, and what else it wants.
    """

    def run(script, before, after, **given):
        assert script.count(before) == 1
        bound = []
        for text in (script, script.replace(before, after)):
            names = {"model": digits.model, "images": digits.images, "labels": digits.labels, **given}
            exec(compile(text, "script", "exec"), names)
            bound.append(names)
        return bound

    return run
