"""What crosses between the host, where decisions are made, and the device that computes: a few numbers at a time.

Which examples a step is about, how many passes they have used, when to stop: all of that lives on the host, in NumPy arrays.
Taking it from a device, one value after the other, would make the host wait each time.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_host(*values: Tensor) -> np.ndarray:
    """Tensors of equal shape [*S] in one copy, float64 [len(values), *S]. The host waits until the device has computed them."""
    found: np.ndarray = torch.stack([value.double() for value in values]).cpu().numpy()
    return found


def to_device(values: Any, device: torch.device) -> Tensor:
    """Numbers of the host on a device; the host does not wait."""
    tensor = torch.as_tensor(values)
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def take(values: Tensor, examples: np.ndarray) -> Tensor:
    """The entries of values [E, ...] for examples, int64 [e], ascending; not copied where these are all."""
    return values if len(examples) == values.shape[0] else values.index_select(0, to_device(examples, values.device))


def put(values: Tensor, examples: np.ndarray, new: Tensor) -> None:
    """Sets the entries of values [E, ...] for examples, int64 [e], ascending, to `new` [e, ...]."""
    if len(examples) == values.shape[0]:
        values.copy_(new)
    else:
        values.index_copy_(0, to_device(examples, values.device), new)
