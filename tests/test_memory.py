"""Memory that runs out: the same work in smaller parts, or an error, and never another answer.

Each test names the mutation that it is there to kill.
"""

import pytest
import torch
from attacked import assert_kept, assert_right, dense, ratios, reported
from networks import network

from fastsal import Certified, Exact, analyze
from fastsal.methods import base
from fastsal.model import products
from fastsal.model.products import ModelPasses

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = Exact(memory_limit=0)


class TestMemory:
    def test_the_anchor_of_a_visit_that_failed_is_forgotten(self, monkeypatch):
        """Kills: the anchor stored before a visit succeeded, after which every row is measured from a wrong one."""
        right, calls = base.ops.row_distances, []

        def short_of_memory(anchor, rows, *options):
            calls.append(rows.shape[1])
            if rows.shape[1] > 3:
                raise torch.OutOfMemoryError("out of memory")
            return right(anchor, rows, *options)

        monkeypatch.setattr(base.ops, "row_distances", short_of_memory)
        model, x = network(classes=30)
        found = analyze(model, x, method=ROWS, chunk_size=16)
        monkeypatch.undo()
        assert max(calls) > 3
        assert_kept(found, ratios(*dense(model, x)), rtol=1e-9)
        assert (found.linearized_robustness > 0).all()

    @pytest.mark.parametrize("ways", [("_forward_mode", "_double_backward"), ("_double_backward", "_forward_mode")])
    def test_products_that_run_out_of_memory_are_taken_a_few_at_a_time(self, monkeypatch, ways):
        """Kills: out of memory swallowed in `jvp`, after which slower ways are taken, or all rows."""
        first, second = ways
        monkeypatch.setattr(products, "FEW", -1.0 if first == "_forward_mode" else 1.0)
        right, taken = getattr(ModelPasses, first), []

        def short_of_memory(self, examples, tangents):
            if len(tangents) > 2:
                raise torch.OutOfMemoryError("out of memory")
            taken.append(len(tangents))
            return right(self, examples, tangents)

        monkeypatch.setattr(ModelPasses, first, short_of_memory)
        monkeypatch.setattr(ModelPasses, second, lambda *_: pytest.fail("another way was taken"))
        model, x = network()
        found, told = reported(assert_right, model, x, rtol=1e-9)
        assert told == []
        assert set(taken) <= {1, 2}
        assert (found.vjps < 120).any()

    @pytest.mark.parametrize("way", ["_forward_mode", "_double_backward", "_vjp"])
    def test_memory_that_is_not_there_is_an_error(self, monkeypatch, way):
        """Kills the same: no answer comes of a pass that never had room."""

        def full(self, *_):
            raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(ModelPasses, way, full)
        if way == "_forward_mode":
            monkeypatch.setattr(ModelPasses, "_double_backward", lambda *_: 1 / 0)
        model, x = network()
        with pytest.raises(torch.OutOfMemoryError):
            analyze(model, x, method=Certified())
