"""Awkward inputs: what every implementation answers for ρ̃ there.

Peers are given a linear model with this Jacobian and these logits. The logits scale with the gradients, so that ρ̃ stays near
0.1 and no step is clipped. An answer is shown as `right`, as its multiple of the truth, or as what came instead.
"""

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastsal
from bench.baselines import backends, formulas
from bench.baselines.peers import PEERS
from bench.harness import memory
from bench.harness.case import ERRORS, Case
from fastsal.tensor import reference

LIMIT = 1e-2  # relative: the lengths of steps are read off float32 images
SCALES = (1e-7, 1e-9, 1e-12, 1e-15, 1e-20, 1e-23, 1e-25, 1e20)
CLASSES, SIZE = 30, 64  # more rows than torch.cdist's default takes differences for, more classes than DeepFool's ten

Inputs = tuple[Tensor, Tensor, Tensor]
Answer = Callable[[Inputs], Tensor]


def _draw(scale: float = 1.0, n: int = CLASSES) -> Inputs:
    """Two examples whose nearest class is among the ten highest logits, but not the second highest."""
    generator = torch.Generator().manual_seed(3)
    jacobian = torch.randn(2, n, SIZE, generator=generator)
    logits = torch.linspace(1.0, -3.0, n).repeat(2, 1)
    logits[1] = logits[1].flip(0)
    nearest = logits.topk(min(6, n), 1).indices[:, -1]
    for example, j in enumerate(nearest):
        jacobian[example, j] *= 10
    return logits * scale, jacobian * scale, 0.4 + 0.2 * torch.rand(2, SIZE, generator=generator)


def inputs() -> dict[str, Inputs]:
    """Every column of the table."""
    table = {f"gradients of {scale:.0e}".replace("e+", "e").replace("e-0", "e-"): _draw(scale) for scale in SCALES}
    logits, jacobian, x = _draw()
    kept = torch.tensor([1.0, math.nan])
    return table | {
        "rows 1e-4 apart": (1e-4 * logits, jacobian[:, :1] * (1 + 1e-4 * jacobian), x),
        "tie": (logits.scatter(1, logits.topk(2, 1).indices, 1.0), jacobian, x),
        "0/0": (torch.ones_like(logits), torch.zeros_like(jacobian), x),
        "no gradient": (logits, torch.zeros_like(jacobian), x),
        "NaN in one": (logits * kept.view(2, 1), jacobian * kept.view(2, 1, 1), x),
        "a logit of −inf": (logits.scatter(1, logits.argmin(1, keepdim=True), -math.inf), jacobian, x),
        "n = 1": _draw(n=1),
    }


class _Linear(nn.Module):
    """Logits c_i + J_i (y − x_i) of the two examples i, in float32, with no overflow where the logits themselves have none."""

    def __init__(self, given: Inputs) -> None:
        super().__init__()
        self.logits, self.jacobian, self.x = given
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)  # peers ask a model for its device

    def forward(self, y: Tensor) -> Tensor:
        # Peers pass one example at a time, or both, or those they have not fooled yet: the nearest x tells which.
        which = torch.cdist(y.detach().flatten(1), self.x).argmin(1)
        shift = (y.flatten(1) - self.x[which]).unsqueeze(2)
        return self.logits[which] + torch.bmm(self.jacobian[which], shift).squeeze(2)


def _tensor_level(backend: str, given: Inputs) -> Tensor:
    return fastsal.margin_geometry(*given, backend=backend).linearized_robustness


def answers() -> Iterator[tuple[str, Answer | str]]:
    """Every row of the table: how it answers, or why it is not here."""
    yield "fastsal reference", functools.partial(_tensor_level, "reference")
    names, skipped = backends.compiled(torch.empty(1, 2, 3))
    for name in names:
        yield f"fastsal {name}", functools.partial(_tensor_level, name)
    yield from skipped.items()
    plain: dict[str, formulas.Formula] = {
        "eager torch": formulas.eager,
        **{f"torch.cdist, {name}": functools.partial(formulas.cdist, name) for name in formulas.CDIST_MODES},
        "Gram by bmm": formulas.gram,
        "NumPy": formulas.numpy_alone,
    }
    for name, formula in plain.items():
        yield name, lambda given, formula=formula: formula(*given)["linearized_robustness"]
    for name, peer in PEERS.items():
        yield name, peer.missing() or (lambda given, step=peer.step: step(_Linear(given).eval(), given[2]))


def truth(given: Inputs) -> Tensor:
    """ρ̃ [2] in float64."""
    return reference.margin_geometry(*given)[0]["linearized_robustness"]


def _one(found: float, wanted: float) -> str:
    same = found == wanted or (math.isnan(found) and math.isnan(wanted))
    finite = math.isfinite(found) and math.isfinite(wanted)
    if same or (finite and abs(found - wanted) <= (LIMIT * wanted if wanted else 1e-6)):
        return "right"
    return f"{found / wanted:.3g}×" if finite and wanted else f"{found:.3g}"


def cell(answer: Answer, given: Inputs) -> str:
    """The answer for the two examples in a word: `right` if both are, else the first that is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = answer(given).double().flatten().tolist()
    except ERRORS as failure:
        return type(failure).__name__
    if given[0].shape[1] < 2:
        return f"answers {found[0]:.2g}"
    words = [_one(a, b) for a, b in zip(found, truth(given).tolist(), strict=True)]
    return next((word for word in words if word != "right"), "right")


def row(answer: Answer) -> dict[str, str]:
    """What one implementation answers, by column."""
    return {column: cell(answer, given) for column, given in inputs().items()}


def _triton() -> dict[str, str]:
    return row(dict(answers())["fastsal triton"])


def interpreted() -> dict[str, str] | None:
    """The row of Triton where there is no GPU: in its interpreter, which wants a process of its own."""
    if torch.cuda.is_available() or not importlib.util.find_spec("triton"):
        return None
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        return memory.in_fresh_process(_triton)


def record() -> dict[str, Any]:
    """The whole table."""
    columns = inputs()
    rows, skipped = {}, {}
    for name, answer in answers():
        if not isinstance(answer, str):
            rows[name] = row(answer)
        elif name == "fastsal triton" and (found := interpreted()):
            rows["fastsal triton (interpreter)"] = found
        else:
            skipped[name] = answer
    truths = {c: [f"{value:.3g}" for value in truth(g).tolist()] for c, g in columns.items() if g[0].shape[1] > 1}
    return {"columns": list(columns), "truth": truths, "rows": rows, "skipped": skipped}


def cases(quick: bool = False) -> Iterator[Case]:
    """One table."""
    yield Case("edge", "awkward inputs", figures=record)
