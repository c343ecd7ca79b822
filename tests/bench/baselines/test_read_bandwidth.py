"""The reads that kernels are compared with read every number."""

import pytest
import torch

from bench.baselines.read_bandwidth import pure_read, read_in_tiles


@pytest.mark.parametrize(("B", "n", "D"), [(3, 20, 32768), (200, 30, 784)])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_number_is_read(B, n, D, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = torch.randn(B, n), torch.randn(B, n, D).round(decimals=1), torch.randn(B, D).round(decimals=1)
    _, jacobian, x = (each.double() for each in inputs)
    assert pure_read(inputs) == pytest.approx(float(jacobian.sum() + x.sum()), rel=1e-5, abs=0.5)
    first, second = jacobian[:, 0], jacobian[:, 1]
    expected = (first.unsqueeze(1) - jacobian).square().sum() + ((first + second) * x).sum()
    assert read_in_tiles(inputs) == pytest.approx(float(expected), rel=1e-5)


def test_one_example_is_read_in_halves_by_two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    inputs = torch.randn(1, 40), torch.randn(1, 40, 32768), torch.zeros(1, 32768)
    halves = inputs[1].double().reshape(2, 20, -1)
    expected = float((halves[:, :1] - halves).square().sum())
    assert read_in_tiles(inputs) == pytest.approx(expected, rel=1e-5)
