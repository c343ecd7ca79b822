"""How answers from a model are checked, and what is left out."""

import dataclasses

import pytest
import torch

from bench.cases import model


def test_a_missing_peer_is_skipped_with_a_line(monkeypatch, measured):
    name, peer = next(iter(model.PEERS.items()))
    monkeypatch.setitem(model.PEERS, name, dataclasses.replace(peer, module="not_there_at_all"))
    record = measured(model.work("", tiny=True))
    (row,) = (row for row in record["results"] if row["implementation"] == name)
    assert row == {"implementation": name, "status": "skipped", "reason": f"not installed (pip install {peer.install})"}


def test_answers_of_the_highest_logits_only_are_right_between_the_two_ratios():
    truth = model.Truth(torch.nn.Linear(5, 3), torch.rand(2, 5))
    truth.ratios = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0])
    assert truth.error(torch.tensor([1.2, 2.0]), limited=True) == 0
    assert truth.error(torch.tensor([1.2, 2.0]), limited=False) == pytest.approx(0.2)
    assert truth.error(torch.tensor([1.0, 1.8]), limited=True) == pytest.approx(0.1)
    assert truth.error(torch.tensor([float("nan"), 2.0]), limited=True) == float("inf")
    assert truth.wrong(1e-3, torch.tensor([1.2, 2.0])) == {"wrong answers": 0.5}
