"""foolbox's DeepFool and torchattacks' FAB beside the drop-ins of fastsal.integrations: time, memory, success, distance.

    python bench/cases/integrations.py [--only WORD] [--threads N] [--out FILE]

Original and drop-in take turns, round by round and in both orders, so that whatever else the machine does hits both; the ratio
is formed within a round, and its median and quartiles count. Each one's peak memory is that of a fresh process, beyond what it
holds after a warm-up. A case that is done is in the file at once; a case that the file has is measured again only with --only.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parents[1] / "results" / "integrations.json"
ROUNDS, BUDGET = 3, 20.0  # rounds at least, and seconds after which no more begin
NORMS = {"L2": 2, "Linf": torch.inf}


def digits_cnn() -> tuple[nn.Module, Tensor, Tensor]:
    """A CNN trained on scikit-learn's digits, and 64 images that it was not trained on."""
    from fastsal.study.data import load_digits

    data = load_digits(seed=0)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.train.x), data.train.y).backward()
        optimizer.step()
    return model.eval(), data.test.x[:64], data.test.y[:64]


def untrained_cnn(classes: int, size: int, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Four convolutions of stride 2 and a linear layer, from a seed; grey noise, labelled as the network sees it."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * (size // 16) ** 2, classes)).eval()
    x = 0.2 + 0.6 * torch.rand(count, 3, size, size)
    return model, x, model(x).argmax(1)


# n -> what is attacked; its name; and how many steps FAB takes, 10 being torchattacks' default
SUBJECTS: dict[int, tuple[Callable[[], tuple[nn.Module, Tensor, Tensor]], str, int]] = {
    10: (digits_cnn, "CNN trained on digits, 64 of 1×8×8", 10),
    100: (lambda: untrained_cnn(100, 32, 8), "untrained CNN, 8 of 3×32×32", 10),
    1000: (lambda: untrained_cnn(1000, 64, 2), "untrained CNN, 2 of 3×64×64", 4),
}


@dataclass(frozen=True)
class Case:
    """An attack in a norm on n classes; DeepFool with as many candidates as given, None for all."""

    attack: str
    norm: str
    n: int
    candidates: int | None = None

    @property
    def title(self) -> str:
        considered = f", {self.candidates or 'all'} candidates" if self.attack == "DeepFool" else ""
        return f"{self.attack} {self.norm}{considered}, n = {self.n}"

    def contestants(self, steps: int | None = None) -> dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
        """The original's images and the drop-in's, from a model, images and labels."""
        if self.attack == "DeepFool":
            import foolbox

            from fastsal.integrations import foolbox as foolbox_drop_in

            def deepfool(module: Any) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
                kind = getattr(module, f"{self.norm}DeepFoolAttack")
                attack = kind(candidates=self.candidates, steps=steps or 50)
                return lambda model, x, y: attack.run(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y)

            return {"original": deepfool(foolbox.attacks), "fastsal": deepfool(foolbox_drop_in)}
        import torchattacks

        from fastsal.integrations import torchattacks as torchattacks_drop_in

        count = steps or SUBJECTS[self.n][2]

        def fab(module: Any) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
            # A single run is what `attack(images, labels)` comes to, but that it fails with L1.
            return lambda model, x, y: module.FAB(model, self.norm, steps=count).attack_single_run(x, y)

        return {"original": fab(torchattacks), "fastsal": fab(torchattacks_drop_in)}


CASES = [
    *(Case("DeepFool", norm, n, few) for n in SUBJECTS for norm in NORMS for few in (10, None)[: 1 if n == 10 else 2]),
    *(Case("FAB", norm, n) for n in SUBJECTS for norm in ("L2", "Linf", "L1")),
]


def peak(case: Case, contestant: str) -> int:
    """Bytes by which the resident set grows at most, beyond what it is after a first step on a tiny model."""
    torch.manual_seed(0)
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(12, 12)).eval()
    x = torch.rand(2, 3, 2, 2)
    case.contestants(steps=1)[contestant](tiny, x, tiny(x).argmax(1))
    subject = SUBJECTS[case.n][0]()
    gc.collect()

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = resident("VmRSS")
    case.contestants(steps=2)[contestant](*subject)
    return resident("VmHWM") - before


def in_fresh_process(case: Case, contestant: str, threads: int) -> int | None:
    """`peak`, or None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--peak", case.title, contestant, "--threads", str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(case: Case, threads: int) -> dict[str, Any]:
    """The record of a case."""
    make, subject, _ = SUBJECTS[case.n]
    model, x, y = make()
    contestants = case.contestants()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    images: dict[str, Tensor] = {}
    start = time.perf_counter()
    for name, run in case.contestants(steps=1).items():
        images[name] = run(model, x, y)  # to warm up
    while len(times["original"]) < ROUNDS or time.perf_counter() - start < BUDGET:
        for name in sorted(contestants, reverse=len(times["original"]) % 2 == 0):
            begin = time.perf_counter()
            images[name] = contestants[name](model, x, y)
            times[name].append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(times["original"], times["fastsal"], strict=True)]
    record: dict[str, Any] = {"case": case.title, "subject": subject, "threads": threads, "rounds": len(ratios)}
    record["times as fast"] = [float(f"{value:.3g}") for value in quantiles(ratios, n=4, method="inclusive")]
    right = model(x).argmax(1) == y
    for name in contestants:
        fooled = right & (model(images[name]).argmax(1) != y)
        p = NORMS.get(case.norm, 1)
        distance = torch.linalg.vector_norm((images[name] - x).flatten(1), p, dim=1)[fooled]
        record[name] = {
            "seconds": float(f"{median(times[name]):.3g}"),
            "peak MiB": None if (size := in_fresh_process(case, name, threads)) is None else round(size / 2**20),
            "success": round((fooled.sum() / right.sum()).item(), 3),
            "median distance": float(f"{distance.median().item():.5g}"),
        }
    same = (images["fastsal"] - images["original"]).flatten(1).abs().amax(1) <= 1e-4
    record["same images"] = round(same.float().mean().item(), 3)
    return record


def environment() -> dict[str, Any]:
    names = ("torch", "fastsal", "foolbox", "torchattacks")
    return {"machine": platform.machine(), "cores": os.cpu_count()} | {name: version(name) for name in names}


def row(record: dict[str, Any]) -> str:
    """A line of the table."""
    low, middle, high = record["times as fast"]
    cells = [record["case"], f"{middle:.3g}× ({low:.3g} to {high:.3g})"]
    for key, unit in (("seconds", " s"), ("peak MiB", " MiB"), ("success", ""), ("median distance", "")):
        cells += [f"{record[name][key]}{unit}" for name in ("original", "fastsal")]
    return f"| {' | '.join(cells)} | {record['same images']:.0%} |"


HEAD = (
    "| attack | fastsal is faster | time: original | fastsal | peak: original | fastsal | success: original | fastsal "
    "| median distance: original | fastsal | same images |\n|" + " --- |" * 11
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="cases whose title holds this, measured anew")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of figures")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "CONTESTANT"), help="what a fresh process is asked for")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(next(case for case in CASES if case.title == arguments.peak[0]), arguments.peak[1]))
        return
    held = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"records": []}
    records = {record["case"]: record for record in held["records"]}
    print(HEAD)
    for case in CASES:
        if case.title not in records or (arguments.only and arguments.only in case.title):
            if arguments.only not in case.title:
                continue
            records[case.title] = measure(case, arguments.threads)
            ordered = [records[one.title] for one in CASES if one.title in records]
            text = json.dumps({"environment": environment(), "records": ordered}, indent=1, ensure_ascii=False)
            arguments.out.write_text(text + "\n", encoding="utf-8")
        print(row(records[case.title]), flush=True)


if __name__ == "__main__":
    main()
