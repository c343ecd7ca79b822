"""What `info` and `backend="auto"` say and take where a driver is too old, a device has no code, or Triton no compiler."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

import fastsal
from fastsal.tensor import ops
from fastsal.tensor.backends import cuda, triton

OLD_DRIVER = "CUDA driver version is insufficient for CUDA runtime version"
NO_CODE = "no kernel image is available for execution on the device"


@pytest.fixture
def devices(monkeypatch):
    """Two NVIDIA devices, and what the native module says of each, which a test may change."""
    reasons, current = {0: "", 1: ""}, []

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    native = SimpleNamespace(why_not=lambda: reasons[current[-1]], runtime_version=lambda: 13000)
    for name, value in (("_cuda", native), ("_reason", ""), ("_devices_that_can", set())):
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: True)
    monkeypatch.setattr(triton, "_missing", lambda: "")
    monkeypatch.delenv("FASTSAL_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "cc")
    ops._warn_once.cache_clear()
    return reasons


def jacobian_on(index):
    return SimpleNamespace(device=torch.device("cuda", index), get_device=lambda: index)


def backend_info():
    return fastsal.info()["backends"]


def test_every_device_is_asked(devices):
    assert backend_info()["cuda"] == "available"
    devices[0] = NO_CODE
    cuda._devices_that_can.clear()
    assert backend_info()["cuda"] == "available"
    assert ops.choose("auto", jacobian_on(0)) == "triton"
    assert ops.choose("auto", jacobian_on(1)) == "cuda"
    with pytest.raises(RuntimeError, match=rf"cuda:0 cannot run .* \(CUDA runtime 13.0\): {NO_CODE}"):
        ops.choose("cuda", jacobian_on(0))


def test_only_success_is_remembered(devices):
    devices[0] = "out of memory"
    assert ops.choose("auto", jacobian_on(0)) == "triton"
    devices[0] = ""
    assert ops.choose("auto", jacobian_on(0)) == "cuda"
    devices[0] = "never asked again"
    assert ops.choose("auto", jacobian_on(0)) == "cuda"


def test_an_old_driver(devices):
    devices[0] = devices[1] = OLD_DRIVER
    reason = backend_info()["cuda"]
    assert "cuda:0" in reason
    assert "cuda:1" in reason
    assert OLD_DRIVER in reason
    assert ops.choose("auto", jacobian_on(0)) == "triton"


def test_an_old_driver_and_no_compiler(devices, monkeypatch):
    """The reference, with one warning that says why."""
    devices[0] = devices[1] = OLD_DRIVER
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "no C compiler" in backend_info()["triton"]
    with pytest.warns(RuntimeWarning, match=f"{OLD_DRIVER}; triton: Triton finds no C compiler"):
        assert ops.choose("auto", jacobian_on(0)) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.choose("auto", jacobian_on(0)) == "reference"
    with pytest.raises(RuntimeError, match="no C compiler"):
        ops.choose("triton", jacobian_on(0))
