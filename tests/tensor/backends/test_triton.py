"""The Triton backend without a GPU: every kernel in the interpreter, and every kernel compiled for real architectures."""

import importlib.util
import itertools
import json
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]
HOME = Path(importlib.util.find_spec("fastsal").origin).parent.parent
SPILL_BUDGET = 16  # bytes a thread
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_interpreter(run_python):
    """Values against long double: triton_interpreter.py, in a process whose kernels are numpy programs."""
    file = Path(__file__).with_name("triton_interpreter.py")
    result = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS), str(file)),
        TRITON_INTERPRET="1",
        PYTHONPATH=os.pathsep.join((str(HOME), str(TESTS))),
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_within_the_spill_budget(run_python, tmp_path, capability):
    """Each kernel × dtype × norm as it is launched by default, to machine code."""
    pytest.importorskip("triton", minversion="3.3")  # before, a kernel is compiled from other arguments
    table = tmp_path / "matrix.json"
    result = run_python(
        *(str(TESTS.parent / "bench" / "tools" / "triton_matrix.py"), "--default"),
        *("--capabilities", str(capability), "--json", str(table)),
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads(table.read_text(encoding="utf-8"))["kernels"]
    assert {row["capability"] for row in rows} == {capability}
    for kernel in (
        "row_distances_partials_kernel",
        "margin_geometry_sums_kernel",
        "pairwise_margins_partials_kernel",
        "pairwise_backward_jacobian_kernel",
    ):
        kinds = {(row["data"], row["constants"]["Q"]) for row in rows if row["kernel"] == kernel}
        assert kinds == set(itertools.product(("fp64", "fp32", "bf16", "fp16"), (2, 1, 0))), kernel
    # ptxas may give up a few bytes outside the loops for one more block on a multiprocessor.
    assert [row for row in rows if row["spilled_bytes"] > SPILL_BUDGET] == []
    assert max(row["shared_bytes"] for row in rows) <= 48 << 10


def test_another_batch_compiles_nothing(run_python):
    """The last batch of a data set, one example alone and a few classes less take the kernels that are there."""
    code = (
        "from bench.tools.triton_matrix import caught\n"
        "for shapes in (((64, 10, 784),), ((64, 10, 784), (63, 10, 784), (1, 10, 784), (64, 16, 784), (3, 9, 784))):\n"
        "    print(len(list(caught(shapes))))"
    )
    result = run_python("-c", code, TRITON_INTERPRET="0", PYTHONPATH=os.pathsep.join((str(HOME), str(TESTS.parent))))
    first, all_of_them = result.stdout.split()
    assert first == all_of_them, result.stderr


def test_a_grid_that_is_too_large_is_an_error(run_python):
    """Before the launch, with the kernel's name: the driver says "invalid argument"."""
    code = (
        "from fastsal.tensor.backends.triton_ops import launching, row_distances\n"
        "launching.launch(row_distances.row_distances_combine_kernel, 2**31)"
    )
    result = run_python("-c", code, TRITON_INTERPRET="0")
    assert "RuntimeError: row_distances_combine_kernel: the problem is too large for one grid" in result.stderr


def test_importing_fastsal_leaves_triton_alone(run_python):
    result = run_python("-c", "import sys, fastsal; print('fastsal.tensor.backends.triton_ops' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_without_triton_the_reason_is_told(run_python):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import fastsal, torch\n"
        "print(fastsal.info()['backends']['triton'])\n"
        "fastsal.margin_geometry(torch.ones(1, 2), torch.ones(1, 2, 3), torch.ones(1, 3), backend='triton')"
    )
    result = run_python("-c", code, TRITON_INTERPRET="1")
    assert result.stdout.startswith("the package triton cannot be imported"), result.stderr
    assert "RuntimeError: backend 'triton' cannot run: the package triton cannot be imported" in result.stderr


def test_a_cpu_tensor_is_refused_with_the_reason(run_python):
    code = (
        "import fastsal, torch\n"
        "fastsal.margin_geometry(torch.ones(1, 2), torch.ones(1, 2, 3), torch.ones(1, 3), backend='triton')"
    )
    result = run_python("-c", code, TRITON_INTERPRET="0")
    assert "RuntimeError: backend 'triton' cannot run: tensors are on the CPU" in result.stderr


@pytest.mark.parametrize("interpreter", ["0", "1"])
def test_without_a_device_only_the_interpreter_is_available(run_python, interpreter):
    code = (
        "import fastsal, torch\n"
        "torch.accelerator.is_available = lambda: False\n"
        "print(fastsal.info()['backends']['triton'])"
    )
    result = run_python("-c", code, TRITON_INTERPRET=interpreter)
    wanted = {"0": "torch finds no accelerator, and Triton's interpreter is off (TRITON_INTERPRET=1)", "1": "available"}
    assert result.stdout == wanted[interpreter] + "\n", result.stderr
