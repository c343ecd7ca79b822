"""How far results are from float64, as the tests, `fastsal check` and `fastsal demo` measure it."""

import dataclasses
import math

import pytest
import torch

import fastsal
from fastsal.tensor import reference, tolerance


def inputs():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(size, generator=generator) for size in ((4, 5), (4, 5, 7), (4, 7)))


def test_is_linear_in_the_error():
    logits, jacobian, x = inputs()
    result = fastsal.margin_geometry(logits.double(), jacobian.double(), x.double(), backend="reference")
    assert max(tolerance.scaled_errors(result, logits, jacobian, x, 2.0).values()) < 1e-15
    for name in reference.SCALARS:
        off = dataclasses.replace(result, **{name: getattr(result, name) * (1 + 1e-8)})
        errors = tolerance.scaled_errors(off, logits, jacobian, x, 2.0)
        assert errors[name] == max(errors.values())
        assert 1e-11 < errors[name] < 1.01e-8, name


def test_scales_are_those_of_the_contract():
    """An offset of exactly the scale, by hand, counts as 1."""
    logits, jacobian, x = (v.double() for v in inputs())
    result = fastsal.margin_geometry(logits, jacobian, x, backend="reference")
    rows = torch.arange(4)
    g, psi = jacobian[rows, result.prediction], logits[rows, result.prediction]
    size = (x * g).abs().sum(1)
    dot = (x * g).sum(1).abs()
    d = g - jacobian[rows, result.runner_up]
    size_dag = (x * d).abs().sum(1)
    margin = psi - logits[rows, result.runner_up]
    scales = {
        "linearized_robustness": margin / d.norm(dim=1),
        "alignment": size / g.norm(dim=1),
        "binarized_alignment": size_dag / d.norm(dim=1),
        "offset": psi.abs() + size,
        "binarized_offset": margin + size_dag,
        "direction_gap": torch.ones(4),
        "bound": size / g.norm(dim=1) + x.norm(dim=1) + (margin + size_dag) / d.norm(dim=1),
        "homogeneity": (psi.abs() + size) / (dot + (psi - (x * g).sum(1)).abs()),
    }
    for name, scale in scales.items():
        off = dataclasses.replace(result, **{name: getattr(result, name) + scale})
        assert tolerance.scaled_errors(off, logits, jacobian, x, 2.0)[name] == pytest.approx(1, rel=1e-12), name


def test_nan_and_infinity_must_be_in_place():
    want = torch.tensor([math.nan, math.inf, 1.0], dtype=torch.float64)
    assert tolerance.worst(want.float(), want, want.abs()) == 0
    for wrong in ([0, math.inf, 1], [math.nan, -math.inf, 1], [math.nan, 1, 1], [math.nan, math.inf, math.nan]):
        assert tolerance.worst(torch.tensor(wrong), want, want.abs()) == math.inf
    assert tolerance.worst(torch.tensor([1.0]), torch.zeros(1).double(), torch.zeros(1).double()) == math.inf
    assert tolerance.worst(torch.tensor([]), torch.zeros(0).double(), torch.zeros(0).double()) == 0
    beyond = torch.tensor([1e300], dtype=torch.float64)
    assert tolerance.worst(torch.tensor([math.inf]), beyond, beyond) == 0


def test_runner_up_may_differ_between_equals_only():
    logits = torch.tensor([[3.0, 2.0, 2.0, 0.0]])
    jacobian = torch.zeros(1, 4, 3)
    jacobian[0, 0, 0] = 1
    x = torch.ones(1, 3)
    result = fastsal.margin_geometry(logits, jacobian, x, backend="reference")
    assert result.runner_up.item() == 1
    for j, allowed in ((1, True), (2, True), (3, False), (0, False), (4, False), (-1, False)):
        moved = dataclasses.replace(result, runner_up=torch.tensor([j]))
        errors = tolerance.scaled_errors(moved, logits, jacobian, x, 2.0)
        assert errors["runner_up"] == (0 if allowed else math.inf), j
        assert errors["linearized_robustness"] < 1e-7
