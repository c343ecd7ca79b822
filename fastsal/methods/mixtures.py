"""Private random numbers, and mixtures of rows in which an error of any class shows."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import to_device


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for a seed and a purpose: Philox with a key that is a hash of both and of this package's name."""
    key = hashlib.blake2b(f"fastsal.Certified {purpose} {seed}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def mixture(n: int, seed: int, device: torch.device) -> Tensor:
    """The weights of n classes in a mixture of their rows: float64 [n], of random signs, 1 at least in size."""
    normal = to_device(stream(seed, "mixture").standard_normal(n), device)
    return normal + normal.sign()
