"""The Triton backend without a GPU: every kernel in the interpreter, and every kernel compiled for real architectures."""

import importlib.util
import itertools
import json
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SPILL_BUDGET = 16  # bytes a thread
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_interpreter(run_python):
    """Values against long double: tests/triton_interpreter.py, in a process whose kernels are numpy programs."""
    file = TESTS / "triton_interpreter.py"
    home = Path(importlib.util.find_spec("fastsal").origin).parent.parent
    result = run_python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS), str(file)),
        TRITON_INTERPRET="1",
        PYTHONPATH=os.pathsep.join((str(home), str(TESTS))),
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_within_the_spill_budget(run_python, tmp_path, capability):
    """Each kernel × dtype × norm as it is launched by default, to machine code."""
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
    for kernel in ("distance_kernel", "example_kernel", "sums_kernel", "pairs_kernel", "pairs_backward_kernel"):
        kinds = {(row["data"], row["constants"]["Q"]) for row in rows if row["kernel"] == kernel}
        assert kinds == set(itertools.product(("fp64", "fp32", "bf16", "fp16"), (2, 1, 0))), kernel
    # ptxas may give up a few bytes outside the loops for one more block on a multiprocessor.
    assert [row for row in rows if row["spilled_bytes"] > SPILL_BUDGET] == []
    assert max(row["shared_bytes"] for row in rows) <= 48 << 10


def test_importing_fastsal_leaves_triton_alone(run_python):
    result = run_python("-c", "import sys, fastsal; print('fastsal.kernels.triton_kernels' in sys.modules)")
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
