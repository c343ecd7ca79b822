"""What a certificate counts and knows of a group of examples: products, exact rows, lower bounds, and what is undecided."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import put, take, to_device
from fastsal.methods.base import Nearest
from fastsal.methods.certified.norms import Euclidean
from fastsal.model.products import Passes
from fastsal.tensor import reference

TOP = 3  # highest other logits that are evaluated first and span the basis together with g


class State:
    """A group of E examples: what has been computed of them, and what that leaves open.

    `e` is always int64 [e], ascending: the examples that a step is about. They and the passes that they have used are on the
    host, everything else on the device. Products are in units of each example's own gradient scale, float64.

    Args:
        passes: The model at the examples.
        nearest: The nearest row so far, which knows the margins.
        norm: The norm that gradients are measured in.
        max_passes: The most passes that an example may use; None for no limit.

    Attributes:
        n: How many classes there are.
        examples: All of the group, int64 [E].
        seen: The classes that are settled, bool [E, n]: those evaluated exactly, and those of margin +inf, which are no
            candidates.
        lower: A lower bound of the ratio of every class, float64 [E, n]; NaN where nothing is known to hold.
        rest, quantile: S_j / x and x of the round of probes that bounds the class best, float64 [E, n]; +inf and 1 before.
        unit: The examples' gradient scales, float64 [E].
        vjps, jvps: The passes used, int64 [E]; reserved: those kept back for a check.
        early: The predicted class and the highest other logits, the lowest first among equals, int64 [E, c].
        early_rows: Their rows, [E, c, D].
    """

    def __init__(self, passes: Passes, nearest: Nearest, norm: Euclidean, max_passes: int | None) -> None:
        self.passes, self.nearest, self.norm, self.max_passes = passes, nearest, norm, max_passes
        self.prediction, self.margin = nearest.prediction, nearest.margin
        self.device = self.margin.device
        E, self.n = self.margin.shape
        self.examples = np.arange(E)
        self.seen = self.margin == math.inf
        # Of a boundary that x lies beyond nothing is known: a bound of the gradient bounds its distance from the wrong side.
        self.lower = torch.zeros_like(self.margin).masked_fill(self.margin < 0, -math.inf)
        self.rest, self.quantile = torch.full_like(self.margin, math.inf), torch.ones_like(self.margin)
        self.unit = torch.ones_like(self.margin[:, 0])
        self.vjps, self.jvps, self.reserved = np.zeros((3, E), np.int64)
        highest = nearest.by_margin(int(min(TOP, self.left(self.examples).min() - 1)))
        self.early, self.early_rows = self.evaluate(
            self.examples, torch.cat((self.prediction.unsqueeze(1), highest), 1)
        )

    def left(self, e: np.ndarray) -> np.ndarray:
        """How many passes the limit leaves each of examples e."""
        limit = self.max_passes
        return np.full(len(e), 1 << 40) if limit is None else limit - self.vjps[e] - self.jvps[e] - self.reserved[e]

    def on_device(self, values: Any) -> Tensor:
        return to_device(values, self.device)

    def per_unit(self, e: np.ndarray, values: Tensor) -> Tensor:
        """Values [e, k, ...] in the examples' units."""
        return values / take(self.unit, e).view(-1, 1, 1)

    def in_units(self, e: np.ndarray, rows: Tensor) -> Tensor:
        """Rows [e, c, D] as the certificate works with them: in the examples' units and the norm's weights, float64."""
        return self.per_unit(e, self.norm.rows(e, rows))

    def products(self, e: np.ndarray, directions: Tensor) -> Tensor:
        """J times directions [e, k, D], in the examples' units: [e, k, n]."""
        products = self.passes.jvp(e, self.norm.directions(e, directions))
        self.jvps[e] += directions.shape[1]
        return self.per_unit(e, products.double())

    def mixtures(self, e: np.ndarray, cotangents: Tensor) -> Tensor:
        """Mixtures of rows: cotangents [e, c, n] times J, [e, c, D]."""
        self.vjps[e] += cotangents.shape[1]
        return self.passes.vjp(e, cotangents.to(self.passes.logits.dtype))

    def differences(self, e: np.ndarray, values: Tensor) -> Tensor:
        """a_{i*} − a_j of values [e, k, n]."""
        return values.gather(2, take(self.prediction, e).view(-1, 1, 1).expand(-1, values.shape[1], 1)) - values

    def evaluate(self, e: np.ndarray, classes: Tensor, counts: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Takes the exact rows of classes int64 [e, c] of examples e, and returns the classes and the rows, [e, c, D].

        With `counts`, int64 [e], only so many of each example's are taken, the first ones; the first stands in for the others.
        """
        self.vjps[e] += classes.shape[1] if counts is None else counts
        if counts is not None:
            slots = torch.arange(classes.shape[1], device=self.device)
            classes = torch.where(slots < self.on_device(counts).unsqueeze(1), classes, classes[:, :1])
        one_hot = self.passes.logits.new_zeros(*classes.shape, self.n).scatter_(2, classes.unsqueeze(2), 1.0)
        rows = self.passes.vjp(e, one_hot)
        put(self.seen, e, take(self.seen, e).scatter(1, classes, True))
        self.nearest.visit(classes, rows, None if len(e) == len(self.seen) else self.on_device(e))
        return classes, rows

    @property
    def best(self) -> Tensor:
        """The best exact ratio so far, [E]; NaN once there is one."""
        return self.nearest.distances.amin(1)

    def undecided(self, e: np.ndarray) -> Tensor:
        """Which classes may still change the answer, [e, n]: L_j below the best ratio; ties only where the class is lower.

        A NaN bound has to be looked at, lowest class first, until a NaN row settles the matter.
        """
        best, lower, runner_up = take(self.best, e).unsqueeze(1), take(self.lower, e), take(self.nearest.runner_up, e)
        before = torch.arange(self.n, device=self.device) < runner_up
        tie = (lower == best) & before & ((take(self.margin, e) <= 0) | (best > 0)) & (best < math.inf)
        unknown = lower.isnan() & (before | ~best.isnan())
        return ~take(self.seen, e) & ((lower < best) | tie | unknown)

    def first(self, e: np.ndarray, count: int) -> Tensor:
        """The `count` undecided classes to evaluate next, [e, count]; where an example has fewer, others follow.

        Those without a bound come first, by margin (by class where one is NaN), then those of the smallest bounds.
        """
        lower, margin = take(self.lower, e), take(self.margin, e)
        by_margin = (margin / (1 + margin.abs()) - 1).nan_to_num(-2.0)  # below 0, and less where the margin is
        by_margin = by_margin.masked_fill(lower.isnan().any(1, keepdim=True), -2.0)
        key = torch.where(lower > 0, lower, by_margin).masked_fill(~self.undecided(e), math.inf)
        return reference.smallest(key, min(count, self.n))

    def weights(self, e: np.ndarray) -> Tensor:
        """1 / m_j⁴ of the classes not seen, in units of the largest: how much a class's gradient matters, [e, n]."""
        margin = take(self.margin, e)
        margin = torch.where(take(self.seen, e) | ~(margin > 0), math.inf, margin)
        return (margin.amin(1, keepdim=True) / margin).pow(4).nan_to_num(0.0)

    def average(self, e: np.ndarray, values: Tensor) -> Tensor:
        """The average over classes of values [e, n], weighted by how much they matter: [e]."""
        weights = self.weights(e)
        return ((weights * values).sum(1) / weights.sum(1)).nan_to_num(0.0)


def write(held: Tensor, e: np.ndarray, start: int, values: Tensor) -> Tensor:
    """`held` [E, room, ...] with `values` [e, c, ...] from `start` on, where other examples get 0; room stays untouched."""
    stop = start + values.shape[1]
    if stop > held.shape[1]:
        more = held.new_empty(len(held), max(stop, 2 * held.shape[1]), *held.shape[2:])
        more[:, :start] = held[:, :start]
        held = more
    if len(e) < len(held):
        held[:, start:stop] = 0.0
    held[slice(None) if len(e) == len(held) else to_device(e, held.device), start:stop] = values
    return held
