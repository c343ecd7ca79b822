"""Model level: ρ̃ of a batch from the model, by fastsal, by a whole Jacobian and the eager formula, and by the peers.

Beside the time stand the share of examples whose ρ̃ is wrong and the growth of the peak memory in a fresh process. What looks at
the highest logits only is right if it answers something between ρ̃ and the least ratio of the ten highest; the share of wrong
answers says how often that is not ρ̃ itself.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastsal
from bench.baselines import formulas, models
from bench.baselines.peers import PEERS, TEN
from bench.harness.case import QUICK, Case, Implementation, Work
from fastsal.tensor import reference

VALUE_LIMIT = 1e-3  # relative, of ρ̃: float32 gradients may fall on the other side of a ReLU than float64 ones
STEP_LIMIT = 1e-2  # of the length of a step, read off float32 images
QUICK_MODELS = tuple(models.MODELS)[:2]


def class_rows(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, n] and Jacobian [B, n, D], one backward pass after the other."""
    x = x.clone().requires_grad_()
    logits = model(x)
    rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0].flatten(1) for column in logits.unbind(1)]
    return logits.detach(), torch.stack(rows, 1)


def one_pass(model: nn.Module, x: Tensor) -> Callable[[object], tuple[Tensor, ...]]:
    """A backward pass of one class through a batch that is recorded beforehand: what the price of a pass is measured by."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    cotangent = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    return lambda _: torch.autograd.grad(logits, leaf, cotangent, retain_graph=True)


class Truth:
    """Ratios of every class in float64, computed when first asked for."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._model, self._x = model, x

    @functools.cached_property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """ρ̃ [B], and the least ratio of the nine highest logits besides the predicted one [B]."""
        with torch.no_grad():
            weights = {name: value.double() for name, value in self._model.state_dict().items()}

        def model(x: Tensor) -> Tensor:
            return torch.func.functional_call(self._model, weights, x)

        logits, jacobian = class_rows(model, self._x.double())
        _, _, _, distances = reference.margin_geometry(logits, jacobian, self._x.double().flatten(1))
        highest = logits.topk(min(TEN, logits.shape[1]), 1).indices
        return distances.amin(1), distances.gather(1, highest).amin(1)

    def error(self, robustness: Tensor, limited: bool) -> float:
        """The largest relative error; `limited` answers, from the highest logits only, have none between the two ratios."""
        least, most = self.ratios
        if not limited:
            most = least
        error = torch.maximum(least - robustness, robustness - most).clamp_min(0) / least
        return float(error.nan_to_num(nan=torch.inf).max())

    def wrong(self, limit: float, robustness: Tensor) -> dict[str, float]:
        """The share of wrong answers."""
        off = (robustness / self.ratios[0] - 1).abs()
        return {"wrong answers": float((~(off <= limit)).double().mean())}


def _jacrev(model: nn.Module, x: Tensor) -> Tensor:
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: model(one.unsqueeze(0))[0]))(x)
    return _by_formula(model, jacobian, x)


def _functional(model: nn.Module, x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda batch: model(batch).sum(0), x)  # [n, B, *S]
    return _by_formula(model, jacobian.transpose(0, 1), x)


def _by_formula(model: nn.Module, jacobian: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return formulas.eager(model(x), jacobian.flatten(2), x.flatten(1))["linearized_robustness"]


METHODS: dict[str, tuple[Any, int | None]] = {
    "fastsal exact": (fastsal.Exact(), None),
    "fastsal exact, rows": (fastsal.Exact(memory_limit=0), None),
    "fastsal certified": (fastsal.Certified(), None),
    "fastsal candidates, 9": (fastsal.Candidates(TEN - 1), TEN - 1),
}


def work(name: str, tiny: bool) -> Work:
    """A model of bench/baselines/models.py with a batch of images, and the implementations that work on it."""
    model, x = models.tiny() if tiny else models.load(name)
    truth, implementations, skipped = Truth(model, x), [], {}

    def add(name: str, run: Callable[[Tensor], Tensor], limit: float, classes: int | None, what: str) -> None:
        def check(robustness: Tensor) -> float:
            return truth.error(robustness, classes is not None)

        what += "" if classes is None else f", {classes} classes"
        implementations.append(Implementation(name, run, check, limit, what, functools.partial(truth.wrong, limit)))

    def analyze(x: Tensor, method: Any) -> Tensor:
        return fastsal.analyze(model, x, method=method).linearized_robustness

    for name, (method, classes) in METHODS.items():
        add(name, functools.partial(analyze, method=method), VALUE_LIMIT, classes, "all outputs")
    for name, jacobian in (("torch.func.jacrev", _jacrev), ("autograd.functional.jacobian", _functional)):
        add(f"{name} + eager", functools.partial(jacobian, model), VALUE_LIMIT, None, "all outputs")
    for name, peer in PEERS.items():
        if reason := peer.missing():
            skipped[name] = reason
        else:
            add(name, functools.partial(peer.step, model), STEP_LIMIT, peer.classes, "one step")
    return Work([x], implementations, skipped)


def cases(quick: bool = False) -> Iterator[Case]:
    """The models, with all threads, as one would run them."""
    for name in QUICK_MODELS if quick else models.MODELS:
        budget = QUICK if quick else 60.0
        yield Case("model", name, functools.partial(work, name), budget=budget, memory=not quick)
