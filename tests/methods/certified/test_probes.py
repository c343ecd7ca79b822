"""The private streams of probes, and what is done before the first of them is drawn."""

import itertools

import numpy as np
import pytest
import torch
from certificates import Recorded, problem
from torch import nn

from fastsal import Certified, Exact, analyze
from fastsal.methods.base import Question
from fastsal.methods.certified import certify
from fastsal.methods.certified.basis import BLOCK, PILOT_PROBES
from fastsal.methods.certified.chi_square import FIRST
from fastsal.methods.certified.state import TOP
from fastsal.methods.mixtures import stream

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn_like_the_probes(seed):
    """A model with weights from torch's stream of that seed; if they were the probes, these would not see the nearest class."""
    torch.manual_seed(seed % 2**64)
    weight = nn.init.orthogonal_(torch.empty(400, 1024, dtype=torch.float64))
    weight[300:] *= 2
    model = nn.Linear(1024, 400)
    bias = 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(2))
    bias[0], bias[300:] = 9.0, bias[300:] - 0.5
    model.weight.data, model.bias.data = weight.float(), bias
    return model, torch.zeros(1, 1024)


class TestProbes:
    @pytest.mark.parametrize("seed", [0, 1, 2**70])
    def test_weights_drawn_with_the_same_seed_are_not_the_probes(self, seed):
        model, x = drawn_like_the_probes(seed)
        exact = analyze(model, x, method=Exact(memory_limit=0))
        found = analyze(model, x, method=Certified(seed=seed))
        assert found.certified.item()
        assert torch.equal(found.runner_up, exact.runner_up)
        assert found.lower_bound.item() <= exact.linearized_robustness.item() * (1 + 1e-6)

    def test_streams_differ_by_seed_and_purpose(self):
        """Every bit of the seed counts, negative seeds too; no two streams share a number, nor one with the public ones."""
        seeds = (0, 1, -1, 2**32, 2**64, 2**70, 2**70 + 1)
        streams = [stream(seed, purpose) for seed in seeds for purpose in ("probes", "pilots", "mixture")]
        drawn = [set(generator.standard_normal(64).tolist()) for generator in streams]
        drawn += [set(np.random.default_rng(seed).standard_normal(64).tolist()) for seed in (0, 1)]
        drawn += [
            set(torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist())
            for seed in (0, 1)
        ]
        assert all(not one & other for one, other in itertools.combinations(drawn, 2))
        assert drawn[0] == set(stream(0, "probes").standard_normal(64).tolist())

    def test_the_seed_decides_the_probes(self):
        logits, rows = problem(1, 400, 200)
        taken = []
        for seed in (0, 0, 1):
            passes = Recorded(logits, rows)
            certify(passes, Certified(seed=seed), Question(2.0))
            taken.append(passes.directions())
        assert torch.equal(taken[0], taken[1])
        assert not torch.equal(taken[0][-1], taken[2][-1])  # a probe
        assert not torch.equal(taken[0][0], taken[2][0])  # a pilot probe

    def test_the_basis_is_complete_before_the_first_probe(self):
        """Pilot probes, known rows, the range finder's rows; then probes, and never a basis again."""
        logits, rows = problem(1, 400, 200)
        passes = Recorded(logits, rows)
        found = certify(passes, Certified(), Question(2.0))
        calls = [directions[0] for directions in passes.calls]
        directions = passes.directions()
        assert len(directions) == found.jvps.item()
        last = next(k for k, call in enumerate(calls) if k > 0 and call[0].norm() > 2)  # the basis is of unit vectors
        pilots, early = calls[0].split((PILOT_PROBES, TOP + 1))
        basis, probes = torch.cat((early, *calls[1:last])), torch.cat(calls[last:])
        assert last > 1
        assert all(len(call) == BLOCK for call in calls[1:last])
        assert len(probes) >= FIRST[0]
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-12, rtol=0.0)
        assert torch.equal(pilots, torch.from_numpy(stream(0, "pilots").standard_normal((PILOT_PROBES, 200))))
        fresh = torch.from_numpy(stream(0, "probes").standard_normal((len(probes), 200)))
        torch.testing.assert_close(probes, fresh - fresh @ basis.T @ basis, atol=1e-12, rtol=0.0)
