"""Trained on ImageNet: the linearised robustness ρ̃ of photographs, in the 2-norm (p = 2) and in the largest entry (p = ∞).

Network and images are those of bench/baselines/imagenet.py, and every answer is compared with the exact one. An implementation
that looks at a few classes, and certified, takes all fourteen images. One that takes a backward pass for every class takes one
batch; where that would last more than a minute, its time is extrapolated from 2 and 20 classes, for every class costs the same.
All times are taken in one process, for a fresh one is slower, and memory in fresh ones. Figures are those of one image.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastsal
from bench import RESULTS
from bench.baselines import imagenet, models
from bench.baselines.peers import PEERS
from bench.cases.model import METHODS, STEP_LIMIT, VALUE_LIMIT, one_pass
from bench.harness import clock, memory
from bench.harness.case import Case
from bench.harness.clock import quartiles, timed
from bench.harness.store import Record

BATCHES = {  # the size of a batch, and the p of the perturbation
    "batches of 1": (1, 2.0),
    "batches of 4": (4, 2.0),
    "batches of 14": (14, 2.0),
    "batches of 14, p = ∞": (14, math.inf),
}
LONG = 60.0  # seconds: what would take longer is extrapolated
FEW, MANY = 2, 20  # classes to extrapolate from
HELD = 100  # classes for the peak memory of exact rows, of which it holds 40 at a time at most
BUDGET = 40.0  # seconds of timing, about
BASELINE = "fastsal exact, rows"
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
    """Exact rows first, the baseline; then methods of fewer passes, and the peers, installed or not. `norm`: the p of ρ̃."""
    found = {}
    for name in (BASELINE, CERTIFIED, "fastsal candidates, 9"):
        method, classes = METHODS[name]
        what = "all outputs" if classes is None else f"all outputs, {classes} classes"
        found[name] = Way(functools.partial(_analyze, method, norm), VALUE_LIMIT, classes, name == BASELINE, what)
    for name in ("foolbox DeepFool, 10 candidates", "foolbox DeepFool, all", "adv-lib FAB"):
        classes = PEERS[name].classes
        what = "one step" if classes is None else f"one step, {classes} classes"
        found[name] = Way(functools.partial(_step, name, norm), STEP_LIMIT, classes, classes is None, what)
    return found


def subject(tiny: bool) -> tuple[nn.Module, Tensor]:
    """The network and the images, or ones that take no time."""
    if not tiny:
        return imagenet.network(), imagenet.images()
    model, x = models.tiny()
    count = max(batch for batch, _ in BATCHES.values())
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


def checked(way: Way, answer: Tensor, truth: Tensor) -> Record:
    """How far answers [b] are from the exact ones of the first images, and how many are equal to them."""
    least, most = truth[: len(answer)].unbind(1)
    error = torch.maximum(least - answer, answer - (least if way.classes is None else most)).clamp_min(0) / least
    largest = float(error.nan_to_num(nan=torch.inf).max())
    equal = int(((answer / least - 1).abs() <= way.limit).sum())
    status = "right" if largest <= way.limit else "wrong"
    return {"status": status, "error": largest, "equal": equal, "images": len(answer)}


def on_one_batch(
    name: str, way: Way, whole: list[float], truth: Tensor, model: nn.Module, x: Tensor, norm: float, tiny: bool
) -> Record:
    """The figures of a way that takes a backward pass for every class: `whole` seconds in several rounds, by extrapolation.

    What is extrapolated counts as right: its answers are checked where it is run in full, on one image.
    """
    rounds, full = [value / len(x) for value in whole], quartiles(whole)[1] <= LONG
    row: Record = {"extrapolated": quartiles(rounds)[1]}
    if full:
        seconds, (answer, _) = timed(way.run, model, x)
        row |= {"rounds": [seconds / len(x)], **checked(way, answer.double(), truth)}
    else:
        row |= {"status": "right", "rough": True, "rounds": rounds}
        row["what"] = f"{way.what}, extrapolated from {MANY} classes"
    if full or name == BASELINE:
        row["peak memory"] = memory.in_fresh_process(peak_memory, name, len(x), norm, None if full else HELD, tiny)
    return row


def record(case: str, tiny: bool = False) -> Record:
    """The figures of one of BATCHES, in the form of those of `measure` in bench/harness/case.py."""
    batch, norm = BATCHES[case]
    load = clock.OtherLoad()
    model, images = subject(tiny)
    truth = imagenet.truth(model, images, norm, None if tiny else RESULTS / "imagenet_truth.json")
    batches, n = images.split(batch), len(model(images[:1])[0])
    answers: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
    runs: dict[str, Callable[[Sequence[Tensor]], object]] = {ONE_PASS: one_pass(model, batches[0])}
    rows: dict[str, Record] = {}
    for name, way in ways(norm).items():
        rows[name] = row = {"implementation": name, "what": way.what}
        if name in PEERS and (reason := PEERS[name].missing()):
            row |= {"status": "skipped", "reason": reason}
        elif way.every:
            for count in (FEW, MANY):
                cut = FirstClasses(model, count).eval()
                runs[f"{name}, {count}"] = lambda given, way=way, cut=cut: way.run(cut, given[0])
        else:
            runs[name] = lambda given, name=name, way=way: answers.update({name: [way.run(model, x) for x in given]})
    first = {name: timed(run, batches[:1])[0] for name, run in runs.items()}
    times = clock.interleaved(runs, [batches], BUDGET)
    more = clock.interleaved({name: runs[name] for name in (ONE_PASS, CERTIFIED)}, [batches], BUDGET)
    for name in more:
        times[name] += more[name]  # what a pass costs wants more rounds than a comparison with exact rows
    one = quartiles(times[ONE_PASS])[1] / batch
    for name, way in ways(norm).items():
        row = rows[name]
        if "status" in row:
            continue
        passes = n if name == BASELINE else None
        if way.every:
            few, many = (times[f"{name}, {count}"] for count in (FEW, MANY))
            whole = [a + (b - a) / (MANY - FEW) * (n - FEW) for a, b in zip(few, many, strict=False)]
            row |= on_one_batch(name, way, whole, truth, model, batches[0], norm, tiny)
        else:
            row |= checked(way, torch.cat([rho for rho, _ in answers[name]]).double(), truth)
            row["peak memory"] = memory.in_fresh_process(peak_memory, name, batch, norm, None, tiny)
            row["rounds"] = [value / len(images) for value in times[name]]
            if name == CERTIFIED:
                row["start"] = max(0.0, first[name] - batch * quartiles(row["rounds"])[1])
            if counts := [count for _, count in answers[name] if count is not None]:
                passes = torch.cat(counts).double().mean().item()
                row["passes of each"] = torch.cat(counts).tolist()
        if row["status"] == "right":
            row["seconds"] = quartiles(row["rounds"])
            if "seconds" in rows[BASELINE]:
                row["ratio"] = [value / rows[BASELINE]["seconds"][1] for value in row["seconds"]]
            if passes is not None:
                row |= {"passes": passes, "pass": row["seconds"][1] / passes / one}
    other = load.cores()
    return {
        "baseline": BASELINE,
        "bytes": 0,
        "other load in cores": other,
        ONE_PASS: one,
        "results": list(rows.values()),
    }


def cases(quick: bool = False) -> Iterator[Case]:
    """Every size of a batch; with `quick` one of them, of a network and images that take no time."""
    missing = "" if quick else imagenet.missing()
    for name in list(BATCHES)[1:2] if quick else BATCHES:
        yield Case("imagenet", name, figures=functools.partial(record, name, quick), missing=missing)
