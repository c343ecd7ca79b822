"""Data and a network for the tests of whole data sets, which are small: one thread."""

import pytest
import torch
from evaluation.small import N, Network
from torch.utils.data import TensorDataset


@pytest.fixture
def x():
    return torch.randn(N, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data(x):
    return TensorDataset(x, torch.arange(N) % 4)


@pytest.fixture
def model():
    return Network()
