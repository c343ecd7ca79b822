"""Private random numbers, and mixtures of rows in which an error shows that would change the answer."""

import hashlib

import numpy as np
from torch import Tensor

from fastsal.devices import to_device

LARGEST = 16.0  # how much more a class may weigh than another: of 16-bit gradients none overflows


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for a seed and a purpose: Philox with a key that is a hash of both and of this package's name."""
    key = hashlib.blake2b(f"fastsal.Certified {purpose} {seed}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def mixture(ratio: Tensor, least: Tensor, seed: int) -> Tensor:
    """The cotangents of a mixture of all classes, float64 [e, n].

    A class is the nearest in truth only if its gradient is larger than it seems, by the share that its ratio, or the bound of
    it, is above the least ratio. It weighs one over that share, so that an error that large moves the mixture by about a
    gradient, whatever the class; 1 at least, so that a row that has a NaN shows it; and LARGEST at most.

    Args:
        ratio: The ratios of the classes, or lower bounds of them, [e, n].
        least: The least ratio, [e, 1].
        seed: It decides the signs and sizes.
    """
    normal = to_device(stream(seed, "mixture").standard_normal(ratio.shape[1]), ratio.device)
    weight = (1 / (ratio / least - 1)).nan_to_num(1.0).clamp(1.0, LARGEST)
    return weight * (normal + normal.sign())
