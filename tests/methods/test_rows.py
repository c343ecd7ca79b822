"""Rows class by class: every class, or the highest logits only, and what they cost."""

import re

import pytest
import torch
from networks import make, spy

from fastsal import Candidates, analyze


def test_provenance_of_exact():
    model, x = make("mlp")
    result = analyze(model, x, method="exact")
    assert result.method == "exact"
    assert result.vjps.tolist() == [23] * len(x)
    assert result.jvps.tolist() == [0] * len(x)
    assert result.certified.all()
    assert torch.equal(result.lower_bound, result.linearized_robustness)
    assert result.failure_probability == 0.0
    assert (result.distances.min(1).values == result.linearized_robustness).all()


def test_passes_are_counted(monkeypatch):
    model, x = make("mlp")
    passes = spy(monkeypatch)
    analyze(model, x, chunk_size=5)
    assert passes[0] == 1  # the check that examples do not mix
    assert passes[1:] == [5, 5, 5, 5, 3]


def test_candidates():
    model, x = make("mlp", torch.float64)
    exact = analyze(model, x)
    for k in (1, 3, 22, 50):
        result = analyze(model, x, method=Candidates(k), chunk_size=2)
        order = model(x).argsort(1, descending=True)[:, 1 : k + 1]
        best, where = exact.distances.gather(1, order).min(1)
        torch.testing.assert_close(result.linearized_robustness, best, rtol=1e-11, atol=0.0)
        assert torch.equal(result.runner_up, order.gather(1, where.unsqueeze(1)).squeeze(1))
        assert result.method == "candidates"
        assert result.vjps.tolist() == [min(k, 22) + 1] * len(x)
        assert not result.certified.any()
        assert result.lower_bound.tolist() == [0.0] * len(x)
        assert result.distances is None
    assert torch.equal(result.runner_up, exact.runner_up)
    assert analyze(model, x, method="candidates").vjps.tolist() == [11] * len(x)


@pytest.mark.parametrize("k", [0, -1, 2.0, "3"])
def test_candidates_wants_a_count(k):
    with pytest.raises(ValueError, match=re.escape(f"Candidates: got k={k!r}, wants an integer >= 1")):
        Candidates(k)
