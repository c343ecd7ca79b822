"""A pytest plugin, `-p gpu.on_gpu`: every test of `cases.each_target` runs on the GPU, on each backend that is for one."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    import cases

    from fastsal import ops

    targets = []
    for name in ("cuda", "triton"):
        why = ops.BACKENDS[name].unavailable()
        marks = [pytest.mark.skip(reason=why)] if why else []
        targets.append(pytest.param(cases.Target(name, "cuda"), marks=marks, id=f"{name}-cuda"))
    cases.TARGETS[:] = cases.KERNELS[:] = targets
