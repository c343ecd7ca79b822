"""What makes the host wait for a device: nothing at tensor level, and a decision a round in a certificate.

At tensor level, a CUDA graph can capture the calls: fake tensors have no values, so that reading one raises. (What
fastsal/tensor/backends/cuda.py does itself is in test_cuda_emulation.py.) A certificate has to read something, so that its
tensors have values there, are said to be on a device, and count who reads them.
"""

from collections import Counter
from functools import partialmethod

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

import fastsal
from bench.baselines.jacobians import KINDS, Matrices, distances
from fastsal.devices import to_device, to_host
from fastsal.methods import certified
from fastsal.methods.base import Question
from fastsal.methods.certified.basis import Basis
from fastsal.methods.certified.norms import NORM_BOUNDS
from fastsal.methods.certified.rounding import Rounding
from fastsal.methods.certified.search import Search
from fastsal.methods.certified.state import State


def fake_inputs(device, dtype):
    shapes = ((4, 10), (4, 10, 3, 8, 8), (4, 3, 8, 8))
    return [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("norm", [2, 1, "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_reads_nothing(norm, dtype):
    with FakeTensorMode():
        logits, jacobian, x = fake_inputs("cuda", dtype)
        geometry = fastsal.margin_geometry(logits, jacobian, x, norm=norm)
        pairs = fastsal.pairwise_margins(logits, jacobian, x, norm=norm)
        assert geometry.bound.device == pairs.alignment.device == jacobian.device
        with pytest.raises(DataDependentOutputException):  # reading does raise
            bool(geometry.bound.isnan().any())


@pytest.mark.parametrize("norm", [2, 1, "inf"])
def test_backward_reads_nothing(norm):
    with FakeTensorMode():  # of the CPU: autograd wants a torch with CUDA for the other
        logits, jacobian, x = (tensor.requires_grad_() for tensor in fake_inputs("cpu", torch.float32))
        geometry = fastsal.margin_geometry(logits, jacobian, x, norm=norm)
        pairs = fastsal.pairwise_margins(logits, jacobian, x, norm=norm)
        (geometry.bound.sum() + pairs.nearest_margin.sum() + pairs.alignment.sum()).backward()
        assert jacobian.grad.shape == jacobian.shape


class OnDevice(torch.Tensor):
    """A tensor said to be on a device. Reading its values raises, but by `cpu`, and so do the host's arrays beside it."""

    READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__")
    READS += ("nonzero", "masked_select", "unique", "equal", "allclose")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = function.__name__
        assert name not in cls.READS, f"{name} reads values of the device"
        for value in tree_flatten((args, kwargs))[0]:
            host = isinstance(value, torch.Tensor | np.ndarray) and not isinstance(value, OnDevice) and value.ndim > 0
            assert not host, f"{name} takes an array of the host"
        if name in ("__getitem__", "__setitem__"):
            for index in tree_flatten(args[1])[0]:
                assert getattr(index, "dtype", None) != torch.bool, f"{name} has to count the entries of a mask"
        return super().__torch_function__(function, types, args, kwargs or {})


class Device(TorchFunctionMode):
    """Inside, tensors that are made on a device, or moved to one, are there; `waits` counts those that come back."""

    waits = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        moved = function is torch.Tensor.to and any(isinstance(value, torch.device) for value in args)
        if moved or (kwargs.get("device") is not None):
            return result.as_subclass(OnDevice)
        if function is torch.Tensor.cpu and isinstance(result, OnDevice):
            self.waits += 1
            return result.as_subclass(torch.Tensor)
        return result


@pytest.mark.parametrize("max_passes", [None, 40])
@pytest.mark.parametrize("norm", KINDS)
def test_a_certificate_waits_once_a_round(monkeypatch, norm, max_passes):
    """One decision before there is a basis, two on rounding, one a step of the basis, a round of probes and a round of rows.

    And three for the check of the rows that were not evaluated, where it is needed, whether rows are to be taken instead, and
    whether all is well; and one for what classes tolerate (two for p = ∞), where passes are few for each that is tried.
    """
    calls = Counter()
    for owner, name in (
        (Rounding, "trust"),
        (Basis, "widen"),
        (Search, "bound"),
        (Rounding, "tolerances"),
        (Rounding, "verify"),
        (State, "evaluate"),
        (NORM_BOUNDS[norm], "measure"),
    ):

        def counted(*args, name, right):
            calls[name] += 1
            return right(*args)

        monkeypatch.setattr(owner, name, partialmethod(counted, name=name, right=getattr(owner, name)))
    logits, rows = KINDS[norm]["heavy_tails"](torch.Generator().manual_seed(0), 6)
    with Device() as device:
        there = Matrices(logits.as_subclass(OnDevice), rows.as_subclass(OnDevice))
        found = certified.certify(there, fastsal.Certified(max_passes=max_passes), Question(norm, backend="reference"))
    winners, sure = (value.as_subclass(torch.Tensor) for value in (found.winners, found.certified))
    assert torch.equal(winners[sure, 1], distances(logits, rows, norm).argmin(1)[sure])
    assert sure.all() or max_passes
    assert calls["bound"] > 0
    steps, rounds_of_rows = calls["widen"] + 1, calls["evaluate"] - 1
    decisions = (
        1 + calls["trust"] + steps + calls["bound"] + rounds_of_rows + 1 + 3 * calls["verify"] + calls["tolerances"]
    )
    assert device.waits == decisions + (calls["measure"] + calls["tolerances"] if norm != 2 else 0)


def test_the_stub_notices_who_reads():
    value = torch.arange(6.0).as_subclass(OnDevice)
    with Device() as device:
        for read in (
            lambda: value.item(),
            lambda: bool((value > 3).any()),
            lambda: value[value > 3],
            lambda: value[torch.tensor([1])],
            lambda: value[np.array([1])],
            lambda: (value > 3).nonzero(),
            lambda: value + torch.ones(6),
            lambda: value.tolist(),
        ):
            with pytest.raises(AssertionError):
                read()
        assert device.waits == 0
        value[to_device(np.array([1]), value.device)] = 0.0
        assert to_host(value)[0, 1] == 0.0
        assert device.waits == 1
