"""The CUDA kernels' own source, run on the CPU by tests/cuda_emulation: values, and that who computes changes no bit.

What this cannot show: hardware (warps in lockstep, memory ordering), speed, and what nvcc makes of the source.
"""

import math
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from cases import each_dtype, each_norm
from cuda_emulation import emulated

from fastsal import reference
from fastsal.kernels import cuda

TESTS = Path(__file__).resolve().parent
pytestmark = [
    pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation needs glibc's contexts"),
]


@pytest.fixture(scope="module")
def module_path(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def kernels(module_path, monkeypatch):
    """fastsal.kernels.cuda on the emulation."""
    for name, value in emulated.replacements(emulated.load(module_path)).items():
        monkeypatch.setattr(cuda, name, value)
    return cuda


def run_poisoned(function, *arguments):
    with cases.poisoned():
        return function(*arguments)


def assert_all_same(a, b):
    for one, other in zip(a, b, strict=True):
        cases.assert_same(one, other)


def test_values_of_every_backend(module_path, run_python):
    """The tests that all backends share, in a process whose only target is the emulation."""
    result = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "cuda_emulation.emulated", f"--rootdir={TESTS.parent}"),
        *("-c", str(TESTS.parent / "pyproject.toml"), "-k", "not long_rows"),
        *(str(TESTS / name) for name in ("test_geometry.py", "test_pairwise.py")),
        FASTSAL_EMULATED_CUDA=str(module_path),
        PYTHONPATH=f"{Path(cuda.__file__).resolve().parents[2]}:{TESTS}",
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@each_norm
@each_dtype
@pytest.mark.parametrize(("B", "n", "D"), [(2, 10, 784), (3, 5, 5003), (1, 33, 40)])
def test_one_block_and_six_kernels_agree(kernels, monkeypatch, norm, dtype, B, n, D):
    arguments = (*cases.inputs(B, n, D, dtype), norm)
    results = []
    for fused in (True, False):
        monkeypatch.setattr(cuda, "_fused", lambda *_, fused=fused: fused)
        results.append(run_poisoned(kernels.margin_geometry, *arguments))
    assert_all_same(*results)


@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segments_split_or_not_agree(kernels, monkeypatch, norm, dtype):
    arguments = (*cases.inputs(1, 5, 4100, dtype), norm)
    results = []
    for split in (True, False):
        monkeypatch.setattr(cuda, "_split", lambda *_, split=split: split)
        results.append(run_poisoned(kernels.pairwise_margins, *arguments))
    assert_all_same(*results)


@each_norm
def test_pairs_do_not_depend_on_the_tile(kernels, norm):
    """17 classes take the large tile, 16 the small one."""
    logits, jacobian, x = cases.inputs(1, 17, 100, torch.float32)
    large = kernels.pairwise_margins(logits, jacobian, x, norm)
    small = kernels.pairwise_margins(logits[:, :16], jacobian[:, :16], x, norm)
    for k in (0, 1, 4):
        cases.assert_same(large[k][:, :16, :16], small[k])


@each_dtype
@pytest.mark.parametrize("offset", [1, 3])
def test_alignment_changes_no_bit(kernels, dtype, offset):
    """Rows that start anywhere, among NaN that must not be read."""
    logits, jacobian, x = cases.inputs(2, 6, 4096, dtype)
    moved = torch.full((2, 6, 4096 + 16), math.nan, dtype=dtype)[..., offset : offset + 4096].copy_(jacobian)
    for run in (
        lambda j: kernels.margin_geometry(logits, j, x, 2.0),
        lambda j: (kernels.row_distances(j[:, 2], j, 2.0),),
        lambda j: kernels.pairwise_margins(logits, j, x, 2.0),
    ):
        assert_all_same(run_poisoned(run, jacobian), run_poisoned(run, moved))


def test_an_example_does_not_depend_on_its_batch(kernels):
    logits, jacobian, x = cases.inputs(5, 7, 1500, torch.bfloat16)
    whole = kernels.margin_geometry(logits, jacobian, x, math.inf)
    for b in range(5):
        one = kernels.margin_geometry(logits[b : b + 1], jacobian[b : b + 1], x[b : b + 1], math.inf)
        assert_all_same((whole[0][:, b : b + 1], whole[1][:, b : b + 1], whole[2][b : b + 1]), one)


def everything(kernels, dtype, norm):
    """The bits of every kernel."""
    logits, jacobian, x = cases.inputs(2, 18, 1100, dtype)
    jacobian[0] *= 1e-30 if dtype != torch.float16 else 1  # the slow paths too
    w = torch.randn(2, 18, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (
        *kernels.margin_geometry(logits, jacobian, x, norm),
        kernels.row_distances(jacobian[:, 0], jacobian, norm),
        *kernels.pairwise_margins(logits, jacobian[..., :200], x[:, :200], norm),
        *kernels.pairwise_backward(w + w.mT, w - w.mT, jacobian[..., :200], x[:, :200], norm),
    )


@each_norm
@each_dtype
@pytest.mark.parametrize("fused", [True, False])
def test_order_of_threads_changes_no_bit(kernels, monkeypatch, norm, dtype, fused):
    """A missing barrier shows when the last thread and the last block go first."""
    monkeypatch.setattr(cuda, "_fused", lambda *_: fused)
    monkeypatch.delenv("FASTSAL_EMULATION_REVERSE", raising=False)
    forward = run_poisoned(everything, kernels, dtype, norm)
    monkeypatch.setenv("FASTSAL_EMULATION_REVERSE", "1")
    assert_all_same(forward, run_poisoned(everything, kernels, dtype, norm))


@each_norm
@each_dtype
@pytest.mark.parametrize("with_x", [True, False])
def test_pairwise_backward(kernels, norm, dtype, with_x):
    """Against the reference, whose float64 differs only in the order of n additions."""
    _, jacobian, x = cases.inputs(2, 9, 131, dtype)
    jacobian[1, 3] = jacobian[1, 4]
    w, v = torch.randn(2, 2, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, v = (x, v - v.mT) if with_x else (None, None)
    got = run_poisoned(kernels.pairwise_backward, w + w.mT, v, jacobian, x, norm)
    want = reference.pairwise_backward(w + w.mT, v, jacobian, x, norm)
    for one, other in zip(got, want, strict=True):
        if other is None:
            assert one.numel() == 0
            continue
        assert one.dtype == dtype
        # n additions of float64, and one rounding to the result's type
        error = 32 * torch.finfo(torch.float64).eps * other.abs().max() + torch.finfo(dtype).eps * other.abs()
        assert ((one.double() - other).abs() <= error + torch.finfo(dtype).smallest_normal).all()


def test_every_scalar_is_written(kernels, monkeypatch):
    cases.assert_writes_every_scalar("cuda", monkeypatch)


def test_backward_takes_v_and_x_together(kernels):
    cases.assert_v_and_x_go_together("cuda")


@pytest.mark.parametrize("D", [1, 31, 1025])
def test_row_distances(kernels, D):
    _, jacobian, _ = cases.inputs(3, 6, D, torch.float32)
    for norm in cases.NORMS:
        got = run_poisoned(kernels.row_distances, jacobian[:, 1], jacobian, norm)
        torch.testing.assert_close(got, reference.row_distances(jacobian[:, 1], jacobian, norm), rtol=1e-6, atol=0)


def test_a_divergent_barrier_is_reported(tmp_path):
    """The emulation itself: what hangs or corrupts on a GPU ends the process here."""
    source = tmp_path / "divergent.cpp"
    source.write_text(
        """#include <cuda_runtime.h>
        __global__ void kernel() { if (threadIdx.x < 16) __ballot_sync(~0u, 1); }
        int main() {
          cudaLaunchConfig_t config;
          config.blockDim = dim3(32);
          return cudaLaunchKernelEx(&config, kernel);
        }"""
    )
    program = str(tmp_path / "divergent")
    subprocess.run(
        [emulated.COMPILER, "-std=c++17", f"-I{TESTS / 'cuda_emulation'}", str(source), "-o", program], check=True
    )
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode != 0
    assert "CUDA emulation:" in result.stderr
