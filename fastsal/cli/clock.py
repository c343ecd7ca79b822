"""How long `margin_geometry` takes on several backends, for the commands that say so."""

import time

import torch
from torch import Tensor

from fastsal.tensor.geometry import margin_geometry


def best_times(
    inputs: tuple[Tensor, Tensor, Tensor], norm: float, backends: tuple[str, ...], repeats: int = 5
) -> list[float]:
    """The shortest time on each backend, in seconds, timed in interleaved rounds, of which the first is not counted."""
    times: dict[str, list[float]] = {backend: [] for backend in backends}
    for _ in range(repeats + 1):
        for backend, taken in times.items():
            start = time.perf_counter()
            margin_geometry(*inputs, norm=norm, backend=backend)
            if inputs[1].is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [min(taken[1:]) for taken in times.values()]
