"""The operators as PyTorch sees them: schemas, fake kernels, torch.compile, and the choice of a backend."""

import math

import cases
import numpy as np
import pytest
import torch
import truth
from cases import each_dtype, each_kernel, each_norm, each_target
from torch._subclasses.fake_tensor import FakeTensorMode
from truth import DUAL, long_double

import fastsal
from fastsal.tensor import ops, reference

OPERATORS = ("row_distances", "margin_geometry", "pairwise_margins", "pairwise_backward")
each_operator = pytest.mark.parametrize("name", OPERATORS)


def arguments(name, logits, jacobian, x, norm, backend):
    """Arguments of each operator, the optional ones among them given."""
    n = logits.shape[1]
    w = torch.linspace(-1, 1, n * n, dtype=torch.float64, device=x.device).view(n, n).expand(len(logits), n, n)
    return {
        "row_distances": (jacobian.select(1, 0), jacobian.narrow(1, 1, n - 1), norm, backend),
        "margin_geometry": (logits, jacobian, x, norm, backend),
        "pairwise_margins": (logits, jacobian, x, norm, backend),
        "pairwise_backward": (w + w.mT, w - w.mT, jacobian, x, norm, backend),
    }[name]


@each_target
@each_operator
@each_dtype
def test_opcheck(target, name, dtype):
    inputs = cases.inputs(2, 3, 5, dtype, device=target.device)
    operator = getattr(torch.ops.fastsal, name).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "pairwise_margins":
        checks.pop()  # it holds the NaN of the diagonal against itself; test_compile_fullgraph compares by bits
    torch.library.opcheck(operator, arguments(name, *inputs, 2.0, target.backend), test_utils=checks)


@each_target
@pytest.mark.parametrize("name", ["pairwise_margins", "pairwise_backward"])
def test_opcheck_without_x(target, name):
    logits, jacobian, x = cases.inputs(2, 3, 5, torch.float32, device=target.device)
    given = arguments(name, logits, jacobian, x, math.inf, target.backend)
    absent = (1, 3) if name == "pairwise_backward" else (2,)
    given = tuple(None if k in absent else value for k, value in enumerate(given))
    torch.library.opcheck(getattr(torch.ops.fastsal, name).default, given)


@each_operator
@each_dtype
def test_fake_cuda(name, dtype):
    """The shape functions, on a device that this machine may not have."""
    real = getattr(ops, name)(*arguments(name, *cases.inputs(2, 3, 5, dtype), 2.0, "reference"))
    with FakeTensorMode():
        logits, jacobian, x = (torch.empty(shape, dtype=dtype, device="cuda") for shape in ((2, 3), (2, 3, 5), (2, 5)))
        fake = getattr(ops, name)(*arguments(name, logits, jacobian, x, 2.0, "auto"))
    for got, want in zip(*((out if isinstance(out, tuple) else (out,)) for out in (fake, real)), strict=True):
        assert (got.shape, got.dtype, got.device.type) == (want.shape, want.dtype, "cuda")


@each_kernel
def test_every_scalar_is_written(target, monkeypatch):
    cases.assert_writes_every_scalar(target.backend, monkeypatch, target.device)


@each_target
def test_backward_takes_v_and_x_together(target):
    cases.assert_v_and_x_go_together(target.backend, target.device)


def test_backward_takes_v_and_x_together_on_fake_tensors():
    with FakeTensorMode():
        cases.assert_v_and_x_go_together("auto")


def test_public_functions_on_fake_cuda():
    with FakeTensorMode():
        logits, jacobian, x = (torch.empty(shape, device="cuda") for shape in ((2, 3), (2, 3, 4, 5), (2, 4, 5)))
        geometry = fastsal.margin_geometry(logits, jacobian, x)
        pairs = fastsal.pairwise_margins(logits, jacobian, x)
    assert (geometry.bound.shape, geometry.distances.shape) == ((2,), (2, 3))
    assert geometry.bound.device.type == pairs.alignment.device.type == "cuda"
    assert pairs.alignment.shape == (2, 3, 3)


# --- torch.compile --------------------------------------------------------------------------------------------------


def losses(backend):
    def geometry(logits, jacobian, x):
        result = fastsal.margin_geometry(2 * logits, jacobian, x, backend=backend)
        return result.linearized_robustness, result.alignment, result.bound, result.runner_up

    def pairwise(logits, jacobian, x):
        result = fastsal.pairwise_margins(2 * logits, jacobian, x, backend=backend)
        return result.distance, result.nearest_margin, result.nearest

    return geometry, pairwise


both = pytest.mark.parametrize("index", [0, 1], ids=["margin_geometry", "pairwise_margins"])


@each_kernel
@both
def test_compile_fullgraph(target, index):
    """One graph, the values of eager mode and its first-order gradients."""
    function = losses(target.backend)[index]
    torch._dynamo.reset()
    inputs = cases.inputs(3, 4, 6, torch.float32, device=target.device)
    leaves, twins = ([v.clone().requires_grad_() for v in inputs] for _ in range(2))
    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves), function(*twins)
    for a, b in zip(got, want, strict=True):
        cases.assert_same(a, b)
    weighted = [sum(v.sum() for v in out if v.is_floating_point()) for out in (got, want)]
    for a, b in zip(
        torch.autograd.grad(weighted[0], leaves, materialize_grads=True),
        torch.autograd.grad(weighted[1], twins, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@each_target
@both
def test_compile_without_gradients(target, index):
    """One graph for every batch size."""
    function = losses(target.backend)[index]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for B in (2, 5):
        inputs = cases.inputs(B, 4, 6, torch.bfloat16, device=target.device)
        with torch.no_grad(), torch.compiler.set_stance("default" if B == 2 else "fail_on_recompile"):
            got = compiled(*inputs)
        for a, b in zip(got, function(*inputs), strict=True):
            cases.assert_same(a, b)


@each_target
def test_autocast_leaves_results_alone(target):
    inputs = cases.inputs(2, 4, 60, torch.float32, device=target.device)
    expected = fastsal.margin_geometry(*inputs, backend=target.backend)
    leaves = [v.clone().requires_grad_() for v in inputs]
    with torch.autocast(target.device, dtype=torch.bfloat16):
        result = fastsal.margin_geometry(*leaves, backend=target.backend)
        grad = torch.autograd.grad(result.bound.sum(), leaves[1])[0]
    cases.assert_same_results(result, expected)
    twins = [v.clone().requires_grad_() for v in inputs]
    plain = fastsal.margin_geometry(*twins, backend=target.backend)
    cases.assert_same(grad, torch.autograd.grad(plain.bound.sum(), twins[1])[0])


# --- the choice of a backend ----------------------------------------------------------------------------------------


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.delenv("FASTSAL_BACKEND", raising=False)
    return monkeypatch


def jacobian_on(device):
    return torch.empty(1, 2, 3, device=device)


def test_automatic_choice(no_environment):
    assert ops.choose("auto", jacobian_on("cpu")) == "cpu"
    assert ops.choose("auto", jacobian_on("meta")) == "reference"
    no_environment.setattr(ops.BACKENDS["cpu"], "why_not", lambda jacobian: "switched off")
    assert ops.choose("auto", jacobian_on("cpu")) == "reference"


def test_environment_names_a_backend(no_environment):
    no_environment.setenv("FASTSAL_BACKEND", "reference")
    assert ops.choose("auto", jacobian_on("cpu")) == "reference"
    assert ops.choose("cpu", jacobian_on("cpu")) == "cpu"
    no_environment.setenv("FASTSAL_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"backend: got 'abacus', wants one of \['auto', 'reference', 'cpu'"):
        fastsal.margin_geometry(*cases.inputs(1, 2, 3, torch.float32))


@pytest.mark.parametrize("call", [fastsal.margin_geometry, fastsal.pairwise_margins])
def test_a_named_backend_that_cannot_run_says_why(no_environment, call):
    inputs = cases.inputs(1, 2, 3, torch.float32)
    with pytest.raises(ValueError, match="backend: got 'nope', wants one of"):
        call(*inputs, backend="nope")
    no_environment.setattr(ops.BACKENDS["cpu"], "why_not", lambda jacobian: "the abacus is broken")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: the abacus is broken"):
        call(*inputs, backend="cpu")
    call(*inputs)


def test_the_cpu_backend_refuses_other_devices():
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run: tensors are on meta, not on the CPU"):
        ops.choose("cpu", jacobian_on("meta"))


def test_info_names_every_backend():
    info = fastsal.info()
    assert list(info["backends"]) == ["reference", "cpu", "cuda", "triton"]
    assert all(isinstance(state, str) and state for state in info["backends"].values())
    assert info["backends"]["reference"] == info["backends"]["cpu"] == "available"
    assert set(info["cpu"]) >= {"simd", "openmp", "threads"}


# --- row_distances --------------------------------------------------------------------------------------------------


@long_double
@each_target
@each_norm
@each_dtype
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30], ids=str)
def test_row_distances(target, norm, dtype, scale):
    """float64 norms of the differences, for anchors that are rows of the Jacobian and for others."""
    if dtype == torch.float16:
        scale = min(max(scale, 1e-6), 1e3)
    _, jacobian, x = cases.inputs(3, 6, 131, dtype, scale=scale)
    for anchor in (jacobian[:, 2], scale * x if scale == 1 else x):
        with cases.poisoned():
            got = ops.row_distances(anchor.to(target.device), jacobian.to(target.device), norm, target.backend)
        assert (got.shape, got.dtype) == ((3, 6), torch.float64)
        apart = truth.difference(truth.to_long(anchor)[:, None], truth.to_long(jacobian))
        want = np.apply_along_axis(truth.vector_norm, 2, apart, DUAL[norm])
        cases.assert_close("row_distances", got, want, want, cases.tolerance(dtype))
    assert reference.dual(norm) == DUAL[norm]
