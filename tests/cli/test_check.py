"""fastsal check: it passes, and it finds a backend that is wrong."""

import math

import pytest
import torch

from fastsal.cli import check, main
from fastsal.tensor import ops, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def test_all_within_tolerance(capsys, monkeypatch):
    # The interpreter takes minutes, and has tests of its own.
    monkeypatch.delitem(ops.BACKENDS, "triton", raising=False)
    assert main(["check", "--quick", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    for backend in ("reference", *(name for name, module in ops.BACKENDS.items() if name == "cpu")):
        lines = [line for line in out.splitlines() if line.startswith(backend)]
        assert len(lines) == 12 or "not available" in lines[0]
    assert out.endswith("all within tolerance\n")


def test_unavailable_says_why(capsys, monkeypatch):
    class Missing:
        unavailable = staticmethod(lambda: "no such machine")
        why_not = staticmethod(lambda jacobian: "no such machine")
        info = staticmethod(dict)

    monkeypatch.setattr(check, "DTYPES", ())
    monkeypatch.setattr(ops, "BACKENDS", {"abacus": Missing})
    assert main(["check"]) == 0
    assert "abacus     not available: no such machine" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["value", "index", "nan", "distance", "pairs", "row_distances"])
def test_catches_a_broken_backend(capsys, monkeypatch, what):
    class Broken:
        unavailable = staticmethod(lambda: "")
        why_not = staticmethod(lambda jacobian: "")
        info = staticmethod(dict)

        @staticmethod
        def margin_geometry(logits, jacobian, x, norm):
            out = torch.float64 if jacobian.dtype == torch.float64 else torch.float32
            named, prediction, runner_up, distances = reference.margin_geometry(logits, jacobian, x, norm)
            values = torch.stack([named[key] for key in reference.SCALARS]).to(out)
            distances = distances.to(out)
            if what == "value":
                values[5] *= 1 + 4e-6
            if what == "nan":
                values[3, -1] = math.nan
            if what == "index" and logits.shape[1] > 2:
                runner_up = (runner_up + 1) % logits.shape[1]
            if what == "distance":
                distances *= 1 + 4e-6
            return values, torch.stack((prediction, runner_up)), distances

        @staticmethod
        def pairwise_margins(logits, jacobian, x, norm):
            found = list(ops.pairwise_margins(logits, jacobian, x, norm, "reference"))
            if what == "pairs":
                found[4] = found[4] * (1 + 4e-6)
            return tuple(found)

        @staticmethod
        def row_distances(anchor, rows, norm):
            return reference.row_distances(anchor, rows, norm) * (1 + (what == "row_distances") * 4e-6)

    monkeypatch.setattr(check, "DTYPES", (torch.float32,))
    monkeypatch.setattr(check, "NORMS", (2.0,))
    monkeypatch.setattr(check, "SHAPES", ((3, 5, 33),))
    monkeypatch.setattr(ops, "BACKENDS", {"reference": ops.BACKENDS["reference"], "broken": Broken})
    assert main(["check", "--seed", "3", "--quick"]) == 1
    out = capsys.readouterr().out
    assert "OUT OF TOLERANCE" in out
    assert out.endswith("1 out of tolerance\n")


def test_new_inputs_every_time(capsys, monkeypatch):
    monkeypatch.setattr(check, "DTYPES", ())
    seeds = set()
    for _ in range(2):
        main(["check"])
        seeds.add(capsys.readouterr().out.split(";")[0])
    assert len(seeds) == 2


def test_speed_is_relative_to_the_reference(monkeypatch):
    monkeypatch.setattr(check, "best_times", lambda *_: [6.0, 2.0])
    assert check._speed("cpu", torch.float32, 2.0, "cpu", 0) == 3.0
