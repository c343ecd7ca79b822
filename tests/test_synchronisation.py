"""No value of a tensor comes to the host at tensor level: a GPU never waits for it, and a CUDA graph can capture the calls.

Fake tensors have no values, so that reading one raises. What fastsal/kernels/cuda.py does itself is in test_cuda_emulation.py.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastsal


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
