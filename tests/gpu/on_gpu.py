"""A pytest plugin, `-p gpu.on_gpu`: every test of `cases.each_target` runs on the GPU, on each backend that is for one.

FASTSAL_TEST_SECONDS: tests that have not begun by then are skipped, so that those that have are told of.
"""

import os
import time

import pytest

# Rows 2³¹ elements apart on a sparse file, which no GPU has; test_more_elements_than_32_bits_count is in their place.
ON_THE_CPU_ONLY = "test_offsets_beyond_32_bits"
END = time.monotonic() + float(os.environ.get("FASTSAL_TEST_SECONDS", "inf"))


def pytest_configure(config: pytest.Config) -> None:
    import cases

    from fastsal.tensor import ops

    targets = []
    for name in ("cuda", "triton"):
        why = ops.BACKENDS[name].unavailable()
        marks = [pytest.mark.skip(reason=why)] if why else []
        targets.append(pytest.param(cases.Target(name, "cuda"), marks=marks, id=f"{name}-cuda"))
    cases.TARGETS[:] = cases.KERNELS[:] = targets


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not item.name.startswith(ON_THE_CPU_ONLY)]


def pytest_runtest_setup() -> None:
    if time.monotonic() > END:
        pytest.skip("out of time")
