"""A small network and forms of data, a table as NumPy's columns, and `fastsal.evaluate` with small batches."""

import time

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import fastsal
from fastsal.evaluation import shards

N, BATCH = 45, 8


class Network(nn.Module):
    """A small network that counts its calls, takes its time, and raises on examples that begin with a given value."""

    def __init__(self, pause=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.calls, self.pause, self.hated, self.down = 0, pause, torch.empty(0), False

    def forward(self, x):
        self.calls += 1
        time.sleep(self.pause)
        if self.down:
            raise ArithmeticError("the model is down")
        if torch.isin(x.detach().flatten(1)[:, 0], self.hated).any():
            raise ArithmeticError("cannot take this")
        return self.layers(x)


def evaluate(model, data, out, **options):
    return fastsal.evaluate(model, data, out, **{"batch_size": BATCH, "save_every": 0, "progress": False, **options})


def table(folder):
    return shards.read(shards.shards(folder))


def assert_same(got, want):
    assert list(got) == list(want)
    for name, values in want.items():
        assert got[name].dtype == values.dtype
        np.testing.assert_array_equal(got[name], values, err_msg=name)


class Items(Dataset):
    """Examples as a list holds them; an exception is raised."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]
