"""When to widen a basis, how many probes to draw, when to stop: expectations, by which nothing is proven.

Functions of tensors. The squared norms `known` of the parts of the Δ_j in the basis, `rest` of those outside it, and `sums` of
the products with the probes are [e, n] and in the examples' units.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import to_device
from fastsal.methods.certified.chi_square import FIRST, LeftOver, schedule
from fastsal.methods.certified.norms import Euclidean

MAX_STEPS = 16  # of the range finder
AHEAD = (1, 2, 4)  # how many steps a plan with a limit of passes looks ahead: what they promise may come late


@dataclass(frozen=True)
class Outlook:
    """What is at stake at examples e: the margins [e, n], the classes `waiting` [e, n] for a row, the best ratio so far [e]."""

    norm: Euclidean
    e: np.ndarray
    margin: Tensor
    waiting: Tensor
    best: Tensor

    def target(self, known: Tensor, rest: Tensor) -> Tensor:
        """About ρ̃, [e]: the best ratio so far, or the least that is likely."""
        likely = torch.where(self.waiting, self.margin / self.norm.likely(self.e, known, rest), math.inf).amin(1)
        return torch.minimum(self.best, likely)

    def bound(self, known: Tensor, rest: Tensor) -> Tensor:
        """What the lower bounds of the ratios will be, [e, n]."""
        return self.margin / self.norm.expected(self.e, known, rest)


def forecast(
    at: Outlook, known: Tensor, rest: Tensor, left: Tensor, left_over: LeftOver, limited: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What further passes will achieve, of which `left` [e] are left; without a limit these are more than any example needs.

    Returns the lower bound that the limit of passes allows, relative to the expected ρ̃ (1 where the answer is to be had),
    the expected passes, and the first round's count of probes that attains both, 0 for exact rows alone: [e] each.
    """
    target = at.target(known, rest).unsqueeze(1)
    room = torch.where(at.waiting, at.norm.allowance(at.e, known, at.margin / target) / rest, math.inf)
    counts = to_device((0, *FIRST), left.device)
    cost = torch.cat((at.waiting.sum(1, keepdim=True), left_over.expected(room) + counts[1:]), 1)
    promise = (cost <= left.unsqueeze(1)).double()
    if limited:
        for column, count in enumerate(FIRST, 1):
            quantile = schedule(count, left_over.failure_probability)[0][1]
            bound = torch.where(at.waiting, at.bound(known, rest * (count / quantile)) / target, math.inf)
            rows = (left - count).clamp(0, bound.shape[1] - 1).unsqueeze(1)
            reached = bound.sort(1).values.gather(1, rows).squeeze(1)
            reached = torch.where(left >= count, reached.clamp(max=1.0).nan_to_num(0.0), -1.0)
            promise[:, column] = torch.where(cost[:, column] > left, reached, promise[:, column])
    cost = torch.where(promise == promise.amax(1, keepdim=True), cost, math.inf)
    return promise.amax(1), cost.amin(1), counts[cost.argmin(1)]


def worth_more(
    at: Outlook,
    lower: Tensor,
    target: Tensor,
    known: Tensor,
    sums: Tensor,
    done: int,
    counts: Tensor,
    quantiles: Tensor,
    stage: Tensor,
) -> Tensor:
    """Whether some later round is expected to save more exact rows than its probes cost, [e].

    `lower` [e, n] are the bounds after round `stage` [e] at `done` probes, `target` [e] is about ρ̃; `counts` and `quantiles`
    [e, rounds] are those of all rounds.
    """
    target = target.unsqueeze(1)
    # What the rest of a class has room for, in units of what its sum of squares says of it now.
    room = at.norm.allowance(at.e, known, at.margin / target) / (sums / done)
    room = torch.where(at.waiting, room, math.inf)
    now = (at.waiting & ~(lower >= target)).sum(1, keepdim=True)
    rows = (~(room.unsqueeze(1) >= (counts / quantiles).unsqueeze(2))).sum(2)
    later = torch.arange(counts.shape[1], device=now.device) > stage.unsqueeze(1)
    return (later & (counts - done + rows < now)).any(1)


def common(counts: np.ndarray) -> int:
    """How many rows to take of every example at once where counts int64 [e] are wanted: at most a third of them in vain."""
    each = np.unique(counts)
    filled = np.minimum(counts[:, None], each).sum(0)
    return int(each[3 * filled >= 2 * len(counts) * each].max())
