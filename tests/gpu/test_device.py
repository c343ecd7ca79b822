"""What only a GPU can show: streams, graphs, devices, no synchronisation, and more than 2³¹ elements for real."""

import math
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

import fastsal
from fastsal.tensor import ops, reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
each_backend = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.fixture(autouse=True)
def _needs_backend(backend):
    if why := ops.BACKENDS[backend].unavailable():
        pytest.skip(why)


def run_all(backend, logits, jacobian, x, norm=2.0):
    """Every tensor of margin_geometry, row_distances and pairwise_margins with its backward."""
    w = torch.ones(logits.shape[0], logits.shape[1], logits.shape[1], dtype=torch.float64, device=logits.device)
    return [
        *ops.margin_geometry(logits, jacobian, x, norm, backend),
        ops.row_distances(jacobian[:, 0], jacobian, norm, backend),
        *ops.pairwise_margins(logits, jacobian, x, norm, backend),
        *ops.pairwise_backward(w, w.triu() - w.tril(), jacobian, x, norm, backend),
    ]


def assert_all_same(a, b):
    for one, other in zip(a, b, strict=True):
        cases.assert_same(one, other)


def inputs(*shape, dtype=torch.float32, device="cuda"):
    return cases.inputs(*shape, dtype, device=device)


@each_backend
@cases.each_norm
@cases.each_dtype
@pytest.mark.parametrize("shape", [(3, 10, 784), (2, 17, 40_003)])
def test_repeats_have_the_same_bits(backend, norm, dtype, shape):
    arguments = inputs(*shape, dtype=dtype)
    first = run_all(backend, *arguments, norm)
    for _ in range(20):
        with cases.poisoned():
            assert_all_same(first, run_all(backend, *arguments, norm))


@each_backend
def test_another_stream(backend):
    """The kernels wait for what their stream does first: a long fill of their inputs."""
    arguments = inputs(2, 10, 100_000)
    expected = run_all(backend, *arguments)
    late = [torch.full_like(tensor, math.nan) for tensor in arguments]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, tensor in zip(late, arguments, strict=True):
            to.copy_(tensor)
        got = run_all(backend, *late)
    stream.synchronize()
    assert_all_same(expected, got)


@each_backend
def test_two_streams_at_once(backend):
    """Each has its own scratch memory, and the kernels of one run between those of the other."""
    problems = [inputs(2, 10, 40_000), inputs(1, 40, 20_000)]
    expected = [run_all(backend, *problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for stream, problem in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream), cases.poisoned():
                got.append(run_all(backend, *problem))
    torch.cuda.synchronize()
    for k, results in enumerate(got):
        assert_all_same(expected[k % 2], results)


@each_backend
def test_two_threads_on_one_stream(backend):
    """A kernel of the other thread may run between two of one operation."""
    problems = [inputs(2, 10, 40_000), inputs(1, 40, 20_000)]
    expected = [run_all(backend, *problem) for problem in problems]
    with ThreadPoolExecutor(2) as pool:
        got = pool.map(lambda problem: [run_all(backend, *problem) for _ in range(20)], problems)
    for want, runs in zip(expected, got, strict=True):
        for results in runs:
            assert_all_same(want, results)


@each_backend
@pytest.mark.parametrize("shape", [(3, 10, 784), (1, 10, 150_528)])
def test_graph_capture(backend, shape):
    """A replay sees new inputs, and nothing in a capture may synchronise or allocate outside the graph's pool."""
    first, second = inputs(*shape), [2 * tensor for tensor in inputs(*shape)]
    static = [tensor.clone() for tensor in first]
    expected = run_all(backend, *second)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_all(backend, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run_all(backend, *static)
        public = fastsal.margin_geometry(*static, backend=backend)
    for to, tensor in zip(static, second, strict=True):
        to.copy_(tensor)
    graph.replay()
    torch.cuda.synchronize()
    assert_all_same(expected, got)
    cases.assert_same(expected[0][0], public.linearized_robustness)


@each_backend
def test_no_synchronisation(backend):
    arguments = inputs(2, 10, 4096)
    run_all(backend, *arguments)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(backend, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(backend):
    expected = run_all(backend, *inputs(2, 5, 1000, device="cuda:0"))
    with torch.cuda.device(0):
        got = run_all(backend, *inputs(2, 5, 1000, device="cuda:1"))
        assert torch.cuda.current_device() == 0
    assert_all_same([tensor.cpu() for tensor in expected], [tensor.cpu() for tensor in got])


@each_backend
@pytest.mark.parametrize("shape", [(15, 1000, 150_528), (3_000_000, 2, 400)])
def test_more_elements_than_32_bits_count(backend, shape):
    """The last examples, which only a 64-bit address reaches, are right."""
    B, n, D = shape
    if torch.cuda.mem_get_info()[0] < 2.5 * B * n * D:
        pytest.skip("too little memory")
    generator = torch.Generator("cuda").manual_seed(0)
    jacobian = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    logits = torch.randn(B, n, device="cuda", generator=generator)
    x = torch.randn(B, D, device="cuda", generator=generator)
    result = fastsal.margin_geometry(logits, jacobian, x, backend=backend)
    for b in (0, B // 2, B - 1):
        truth, prediction, runner_up, distances = reference.margin_geometry(
            logits[b : b + 1], jacobian[b : b + 1], x[b : b + 1]
        )
        assert (result.prediction[b], result.runner_up[b]) == (prediction[0], runner_up[0])
        torch.testing.assert_close(result.distances[b].double(), distances[0], rtol=2e-6, atol=0)
        scale = (x[b].double() * jacobian[b, prediction[0]].double()).abs().sum()
        assert abs(result.offset[b].double() - truth["offset"][0]) <= 2e-6 * scale
