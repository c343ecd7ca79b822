"""What `fastsal.evaluate` costs besides its model: memory, time outside of `analyze`, and what a second process brings.

Two of the three take the network and the photographs of bench/baselines/imagenet.py. Times depend on what else the machine
does: measure them on one that does nothing else.
"""

import functools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastsal
from bench.baselines import imagenet
from bench.harness import memory
from bench.harness.case import Case
from bench.harness.clock import timed
from bench.harness.store import Record
from fastsal.evaluation import batches


class Noise(Dataset[Any]):
    """Images of noise, made when they are asked for."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)), index % 10


def photographs(count: int) -> Tensor:
    """As many as wanted, the fifteenth being the first again."""
    return imagenet.images()[torch.arange(count) % 14]


def resident(examples: int) -> Record:
    """Resident size after every batch of a run over many examples, and its slope."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()
    sizes: list[float] = []
    plain = batches.analyze

    def watched(*values: Any, **options: Any) -> fastsal.Geometry:
        result = plain(*values, **options)
        sizes.append(memory.resident() / 2**20)
        return result

    with mock.patch.object(batches, "analyze", watched), tempfile.TemporaryDirectory() as out:
        fastsal.evaluate(model, Noise(examples), Path(out, "run"), batch_size=50, save_every=1)
    done = 50 * np.arange(1, len(sizes) + 1)
    later = done > 0.2 * done[-1]
    return {
        "examples": examples,
        "MiB after the first batch": sizes[0],
        "MiB after a fifth": sizes[len(sizes) // 5],
        "MiB after the last batch": sizes[-1],
        "MiB more for 1,000 examples": float(np.polyfit(done[later], np.array(sizes)[later], 1)[0] * 1000),
    }


def overhead(images: int) -> Record:
    """The share of the processor time that is spent outside `analyze`."""
    model, data = imagenet.network(), photographs(images)
    inside = 0.0
    plain = batches.analyze

    def watched(*values: Any, **options: Any) -> fastsal.Geometry:
        nonlocal inside
        start = time.process_time()
        result = plain(*values, **options)
        inside += time.process_time() - start
        return result

    with mock.patch.object(batches, "analyze", watched), tempfile.TemporaryDirectory() as out:
        start = time.process_time()
        fastsal.evaluate(model, data, Path(out, "run"), method="certified", batch_size=4, save_every=0)
        total = time.process_time() - start
    return {"images": images, "seconds of CPU time": total, "share outside analyze": 1 - inside / total}


def _worker(folder: str, images: int, processes: int, rank: int) -> tuple[float, float]:
    """Seconds, and seconds of CPU time, of one of several processes with a thread each."""
    from torch import distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    evaluate = functools.partial(fastsal.evaluate, imagenet.network(), method="certified", batch_size=4)
    evaluate(photographs(4 * processes), Path(folder, "warm"))
    dist.barrier()
    start = time.process_time()
    seconds, _ = timed(evaluate, photographs(images), Path(folder, "run"))
    used = time.process_time() - start
    dist.destroy_process_group()
    return seconds, used


def speed(images: int) -> Record:
    """Images a second of one process and of two."""
    found: Record = {"images": images}
    for processes in (1, 2):
        context = multiprocessing.get_context("spawn")
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.dict(os.environ, GLOO_SOCKET_IFNAME="lo"),
            ProcessPoolExecutor(processes, context) as pool,
        ):
            work = functools.partial(_worker, folder, images, processes)
            seconds, used = zip(*pool.map(work, range(processes)), strict=True)
        found[f"images a second, processes: {processes}"] = images / max(seconds)
        found[f"seconds of CPU time an image, processes: {processes}"] = sum(used) / images
    return found


def cases(quick: bool = False) -> Iterator[Case]:
    """Memory of a small network, overhead and speed on EfficientNet-Lite0, on one thread."""
    missing = imagenet.missing()
    count = 8 if quick else 64
    figures = {
        "memory": (functools.partial(resident, 500 if quick else 10_000), ""),
        "overhead": (functools.partial(overhead, count), missing),
        "speed": (functools.partial(speed, count), missing),
    }
    for name, (measured, why) in figures.items():
        yield Case("data_sets", name, figures=measured, threads=(1,), missing=why)
