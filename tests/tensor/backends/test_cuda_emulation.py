"""The CUDA kernels' own source, run on the CPU by tests/cuda_emulation: values, and that who computes changes no bit.

What this cannot show: hardware (warps in lockstep, memory ordering), speed, and what nvcc makes of the source.
"""

import contextlib
import itertools
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
from cases import each_dtype, each_norm
from cuda_emulation import emulated
from torch.utils._python_dispatch import TorchDispatchMode
from truth import long_double

from fastsal.tensor import reference
from fastsal.tensor.backends import cuda
from fastsal.validation import output_dtype

TESTS = Path(__file__).resolve().parents[2]
CSRC = TESTS.parent / "csrc"
pytestmark = [
    pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulation needs glibc's contexts"),
]


@pytest.fixture(scope="module")
def module_path(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def kernels(module_path, monkeypatch):
    """fastsal.tensor.backends.cuda on the emulation."""
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
        *(str(TESTS / "tensor" / name) for name in ("test_geometry.py", "test_pairwise.py", "test_tensor_level.py")),
        FASTSAL_EMULATED_CUDA=str(module_path),
        PYTHONPATH=f"{Path(cuda.__file__).resolve().parents[3]}:{TESTS}",
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


EMULATED = cases.Target("cuda", "cpu")


@long_double
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_segments_of_zeros(kernels, norm, dtype):
    """Padding: x, or all differences, are 0 over whole segments; infinities there make NaN."""
    logits, jacobian, x = cases.inputs(4, 5, 6000, dtype)
    jacobian[:, :, 2000:4200] = jacobian[:, :1, 2000:4200]
    x[1:, 4000:] = 0
    x[2, 2500] = math.inf
    jacobian[3, :, 2500] = math.inf
    cases.check_geometry(EMULATED, logits, jacobian, x, norm)


ENDS = {  # scales of normal numbers up to 3, whose norms are finite in float64
    torch.float16: (1e-6, 1, 2e4),
    torch.bfloat16: (1e-38, 1e-25, 1e-14, 1, 1e25, 1e38),
    torch.float32: (1e-38, 1e-25, 1e-14, 1, 1e25, 1e38),
    torch.float64: (1e-307, 1e-170, 1, 1e170, 1e304),
}


@long_double
@each_norm
@each_dtype
def test_products_at_both_ends_of_the_range(kernels, norm, dtype):
    """What squares or products would lose is summed in a wider type, or scaled; differences may overflow theirs too."""
    logits, jacobian, x = cases.inputs(1, 4, 1100, torch.float64)
    scores = logits.to(output_dtype(dtype))
    for scale, x_scale in itertools.product(ENDS[dtype], repeat=2):
        scaled = ((by * v.clamp(-3, 3)).to(dtype) for v, by in ((jacobian, scale), (x, x_scale)))
        cases.check_geometry(EMULATED, scores, *scaled, norm)


@long_double
@each_norm
@each_dtype
@pytest.mark.parametrize("seed", range(4))
def test_constant_rows(kernels, norm, dtype, seed):
    """Every addition of a lane rounds alike: the largest error that its float32 sums can have. Some lanes have other signs."""
    constants = cases.inputs(1, 3, 1, torch.float64, seed)
    logits, jacobian, x = (v.to(dtype) for v in constants)
    jacobian, x = jacobian.repeat(1, 1, 9000), x.repeat(1, 9000)
    jacobian[:, 1:, torch.arange(9000) // 8 % 16 < 3 * seed] *= -1
    cases.check_geometry(EMULATED, logits, jacobian, x, norm)


@long_double
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angle", [0.05, 0.3, 0.6, 0.62, 0.8, 1.5])
def test_direction_gaps_with_and_without_another_reading(kernels, dtype, angle):
    """Gaps on both sides of the limit below which <g, g†> would not do."""
    logits, jacobian, x = cases.inputs(1, 2, 5000, torch.float64)
    g, other = jacobian[0] / jacobian[0].norm(dim=1, keepdim=True)
    rows = torch.stack((g, g - math.cos(angle) * g - math.sin(angle) * (other - (other @ g) * g)))
    rows = rows[[0, 1]] if logits[0, 0] > logits[0, 1] else rows[[1, 0]]
    result = cases.check_geometry(EMULATED, logits.float(), rows[None].to(dtype), x.to(dtype))
    assert abs(result.direction_gap - 2 * math.sin(angle / 2)) < 0.02


@pytest.mark.parametrize(("B", "n", "D"), [(3, 4000, 4), (1, 40, 40000)])
def test_many_rows_and_many_segments(kernels, B, n, D):
    """More rows than a block has threads, and more segments than a warp has lanes."""
    logits, jacobian, x = cases.inputs(B, n, D, torch.float32)
    scalars, indices, distances = run_poisoned(kernels.margin_geometry, logits, jacobian, x, 2.0)
    truth, prediction, runner_up, want = reference.margin_geometry(logits, jacobian, x, 2.0)
    assert torch.equal(indices, torch.stack((prediction, runner_up)))
    torch.testing.assert_close(distances.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(scalars[0].double(), truth["linearized_robustness"], rtol=1e-6, atol=0)


@each_norm
def test_an_example_does_not_depend_on_its_number_of_classes(kernels, norm):
    """Rows of one segment and of many; pairs in one tile and in several; a block of the last kernel goes round or not."""
    for D, count in ((300, 200), (40_000, 9)):
        logits, jacobian, x = cases.inputs(1, count, D, torch.float32)
        logits[:, 7:] -= 100
        jacobian[:, 7:] *= 1e-3
        many, few = ((logits[:, :n], jacobian[:, :n], x, norm) for n in (count, 7))
        results = run_poisoned(kernels.margin_geometry, *many), run_poisoned(kernels.margin_geometry, *few)
        assert_all_same((results[0][0], results[0][1], results[0][2][:, :7]), results[1])
        results = run_poisoned(kernels.pairwise_margins, *many), run_poisoned(kernels.pairwise_margins, *few)
        for k in (0, 1, 4):
            cases.assert_same(results[0][k][:, :7, :7], results[1][k])


@each_dtype
@pytest.mark.parametrize("D", [256, 1500, 4096])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_alignment_changes_no_bit(kernels, dtype, D, offset):
    """Rows and x that start anywhere, among NaN that must not be read."""
    logits, jacobian, x = cases.inputs(2, 6, D, dtype)
    moved = torch.full((2, 6, D + 16), math.nan, dtype=dtype)[..., offset : offset + D].copy_(jacobian)
    moved_x = torch.full((2, D + 16), math.nan, dtype=dtype)[..., offset : offset + D].copy_(x)
    for run in (
        lambda j, x: kernels.margin_geometry(logits, j, x, 2.0),
        lambda j, x: (kernels.row_distances(j[:, 2], j, 2.0),),
        lambda j, x: kernels.pairwise_margins(logits, j, x, 2.0),
    ):
        expected = run_poisoned(run, jacobian, x)
        for rows, inputs in ((moved, x), (jacobian, moved_x), (moved, moved_x)):
            assert_all_same(expected, run_poisoned(run, rows, inputs))


@pytest.mark.parametrize(
    ("dtype", "D"), [(torch.float32, 1152), (torch.float32, 1101), (torch.bfloat16, 3328), (torch.bfloat16, 3301)]
)
def test_nothing_is_read_behind_the_rows(module_path, run_python, dtype, D):
    """Rows that end at a page which nobody may read: a load behind them ends the process."""
    code = f"""
import ctypes, mmap, sys, torch
from cuda_emulation import emulated
from fastsal.tensor.backends import cuda
for name, value in emulated.replacements(emulated.load(sys.argv[1])).items():
    setattr(cuda, name, value)
rows = torch.randn(1, 6, {D}).to({dtype})
size, page = rows.nbytes, mmap.PAGESIZE
pages = mmap.mmap(-1, (size // page + 2) * page)
end = len(pages) - page
libc = ctypes.CDLL(None, use_errno=True)
address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
assert libc.mprotect(ctypes.c_void_p(address + end), page, 0) == 0
at_end = torch.frombuffer(pages, dtype={dtype}, count=rows.numel(), offset=end - size).view(rows.shape).copy_(rows)
logits, x = torch.randn(1, 6), torch.randn(1, {D}).to({dtype})
for one, other in zip(cuda.margin_geometry(logits, rows, x, 2.0), cuda.margin_geometry(logits, at_end, x, 2.0)):
    assert torch.equal(one, other)
print("same")
"""
    result = run_python("-c", code, str(module_path), PYTHONPATH=f"{Path(cuda.__file__).resolve().parents[3]}:{TESTS}")
    assert (result.returncode, result.stdout) == (0, "same\n"), result.stderr


@each_norm
def test_x_in_float32_beside_narrower_rows(kernels, norm):
    """x is as exact as the rows, wherever it starts."""
    logits, jacobian, _ = cases.inputs(2, 6, 256, torch.bfloat16)
    x = cases.inputs(2, 6, 256, torch.float32)[2]
    moved = torch.full((2, 300), math.nan)[:, 1:257].copy_(x)
    expected = run_poisoned(kernels.margin_geometry, logits, jacobian, x, norm)
    assert_all_same(expected, run_poisoned(kernels.margin_geometry, logits, jacobian, moved, norm))
    truth = reference.margin_geometry(logits, jacobian, x, norm)[0]
    torch.testing.assert_close(expected[0][1].double(), truth["alignment"], rtol=1e-6, atol=0)


class NothingIsRead(TorchDispatchMode):
    """Raises where a value of a tensor comes to the host, or a shape depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back(kernels):
    """A GPU would stop for it, and a CUDA graph could not be captured."""
    with NothingIsRead():
        everything(kernels, torch.bfloat16, 2.0)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            torch.ones(1).item()


@each_norm
@pytest.mark.parametrize(("B", "n", "D"), [(5, 7, 1500), (70, 3, 40), (19, 10, 200), (3, 5, 9000)])
def test_an_example_does_not_depend_on_its_batch(kernels, norm, B, n, D):
    """Where rows are short, warps of one block sum several examples, and lanes of one warp finish them."""
    logits, jacobian, x = cases.inputs(B, n, D, torch.bfloat16)
    whole = run_poisoned(kernels.margin_geometry, logits, jacobian, x, norm)
    for b in range(B):
        one = run_poisoned(kernels.margin_geometry, logits[b : b + 1], jacobian[b : b + 1], x[b : b + 1], norm)
        assert_all_same((whole[0][:, b : b + 1], whole[1][:, b : b + 1], whole[2][b : b + 1]), one)


def test_pairs_do_not_depend_on_what_a_block_takes(kernels):
    """Many examples make blocks enough for parts of D; one alone is summed by segments."""
    logits, jacobian, _ = cases.inputs(1, 3, 4200, torch.float32)
    many = run_poisoned(kernels.pairwise_margins, logits.expand(360, -1), jacobian.expand(360, -1, -1), None, 2.0)
    one = run_poisoned(kernels.pairwise_margins, logits, jacobian, None, 2.0)
    for k in range(4):
        cases.assert_same(many[k], one[k].expand_as(many[k]))


def everything(kernels, dtype, norm, D=1100):
    """The bits of every kernel."""
    logits, jacobian, x = cases.inputs(2, 18, D, dtype)
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
@pytest.mark.parametrize("D", [1100, 8200])
def test_order_of_threads_changes_no_bit(kernels, monkeypatch, norm, dtype, D):
    """A missing barrier shows when the last thread and the last block go first. The longer rows take larger blocks."""
    monkeypatch.delenv("FASTSAL_EMULATION_REVERSE", raising=False)
    forward = run_poisoned(everything, kernels, dtype, norm, D)
    monkeypatch.setenv("FASTSAL_EMULATION_REVERSE", "1")
    assert_all_same(forward, run_poisoned(everything, kernels, dtype, norm, D))


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


def test_launches_go_to_the_tensors_device(monkeypatch):
    """Whatever device is the current one: its current stream, and the caller's device again afterwards."""
    current = ["cuda:0"]

    @contextlib.contextmanager
    def device(of):
        before, current[0] = current[0], of
        yield
        current[0] = before

    stream_of = {"cuda:0": 5, "cuda:1": 7}
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=stream_of[current[0]]))
    with cuda._launching(SimpleNamespace(device="cuda:1")) as stream:
        assert (stream, current) == (7, ["cuda:1"])
    assert current == ["cuda:0"]


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


def emulated_program(folder, kernel):
    """Runs a kernel with this body on the emulation."""
    source = folder / "program.cpp"
    source.write_text(
        f"""#include "launch.cuh"
        #include "warp.cuh"
        __global__ void kernel() {{ {kernel} }}
        int main() {{ fastsal::launch(0, "kernel", kernel, 2, 32); }}"""
    )
    includes = [f"-I{path}" for path in (TESTS / "cuda_emulation", CSRC / "cuda", CSRC / "include")]
    program = str(folder / "program")
    subprocess.run([emulated.COMPILER, "-std=c++17", *includes, str(source), "-o", program], check=True)
    return subprocess.run([program], capture_output=True, text=True)


def test_a_divergent_barrier_is_reported(tmp_path):
    """The emulation itself: what hangs or corrupts on a GPU ends the process here."""
    result = emulated_program(tmp_path, "if (threadIdx.x < 16) __ballot_sync(~0u, 1);")
    assert result.returncode != 0
    assert "CUDA emulation: threads wait for others" in result.stderr


def test_shared_memory_that_nobody_wrote_is_reported(tmp_path):
    """What the block before left in it is not there."""
    kernel = """
    __shared__ double value;
    fastsal::begin_unwritten(value);
    if (threadIdx.x == 0 && blockIdx.x == 0) value = 1;
    __syncthreads();
    if (!(value == 1)) emulation::fail("NaN");
    """
    result = emulated_program(tmp_path, kernel)
    assert result.returncode != 0
    assert "CUDA emulation: NaN (block 1, " in result.stderr


@long_double
@each_norm
@each_dtype
def test_products_with_x_that_cancel(kernels, norm, dtype):
    """Rows that are nearly the same, or the same: <x, g_i> and <x, g_j> share the digits that matter."""
    logits, jacobian, x = cases.inputs(2, 4, 500, torch.float64)
    jacobian = jacobian[:, :1] + 2e-3 * jacobian
    jacobian[:, 3] = jacobian[:, 2]
    x = x + 100 * jacobian[:, 0].sign()
    x[1] = 0
    cases.check_pairwise(EMULATED, *(v.to(dtype) for v in (logits, jacobian, x)), norm)
