"""The order of the steps of a certificate: widen the basis, plan, draw probes in rounds, take exact rows, best first."""

import math

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import put, take, to_host
from fastsal.methods.base import Nearest, Question
from fastsal.methods.certified import plan
from fastsal.methods.certified.basis import BLOCK, PILOT_PROBES, Basis
from fastsal.methods.certified.chi_square import FIRST, SHARES, LeftOver, schedule
from fastsal.methods.certified.norms import NORM_BOUNDS, widened
from fastsal.methods.certified.probes import Normals, Probes
from fastsal.methods.certified.rounding import Rounding
from fastsal.methods.certified.state import State
from fastsal.model.products import Passes
from fastsal.tensor import reference

CHECK = 1  # pass that rounding is looked at with: a mixture of the classes
LESS = (0.99, 0.9, 0.8, 0.6, 0.4, 0.0)  # factors to lower bounds by, one after the other, where few passes are left
WORTHWHILE = 64  # with no more classes than this left, rows are about as cheap as any probing, and certain


class Search:
    """The search for the nearest class of a group of examples, step by step.

    Which examples a step is about, plans and rounds are on the host. What decides comes there in one copy a round, so that a
    device is waited for once.

    Args:
        passes: The model at the examples.
        question: What is asked of them.
        failure_probability: δ, for each example.
        max_passes: The most passes that an example may use; None for no limit.
        normals: The probes of the seed.
    """

    def __init__(
        self,
        passes: Passes,
        question: Question,
        failure_probability: float,
        max_passes: int | None,
        normals: Normals,
    ) -> None:
        norm = NORM_BOUNDS[question.norm](passes.logits, passes.dimension, question.backend)
        self.state = state = State(passes, Nearest(passes.logits, question), norm, max_passes)
        self.failure_probability, self.normals = failure_probability, normals
        self.basis = Basis(state, normals.pilot_probes)
        self.probes = Probes(state, normals)
        self.rounding = Rounding(state, self.basis, self.probes, normals.seed)
        self.target = torch.full_like(state.unit, torch.inf)  # about ρ̃, once there are probes

    def outlook(self, e: np.ndarray) -> plan.Outlook:
        state = self.state
        margin = take(state.margin, e) / take(state.unit, e).unsqueeze(1)
        return plan.Outlook(state.norm, e, margin, ~take(state.seen, e), take(state.best, e))

    def prepare(self) -> np.ndarray:
        """Builds the bases and returns the plans: the first rounds' counts of probes [E], 0 where rows are cheaper."""
        state, basis, rounding = self.state, self.basis, self.rounding
        state.norm.fit(state.early_rows)
        scale = reference.vector_norm(state.norm.rows(state.examples, state.early_rows), 2.0).amax(1)
        usable = torch.isfinite(scale) & (torch.isfinite(state.margin) | state.seen).all(1)
        state.lower = torch.where(usable.unsqueeze(1), state.lower, torch.nan)
        state.unit = torch.where(usable & (scale > 0), scale, 1.0)
        counts = np.zeros_like(state.vjps)
        # Of classes above a target nothing but rows will do, and these settle it.
        undecided = state.undecided(state.examples) & (state.margin >= 0)
        worthwhile = to_host(usable & (undecided.sum(1) > WORTHWHILE))[0] > 0
        enough = state.left(state.examples) >= state.early.shape[1] + PILOT_PROBES + CHECK + FIRST[0]
        e = state.examples[worthwhile & enough]
        if not len(e):
            return counts
        basis.start(e, take(state.early_rows, e))
        rounding.measure(e)
        active = e[rounding.trust(e)]
        left_over, limited = LeftOver(FIRST, self.failure_probability, state.device), state.max_passes is not None
        inside, outside = basis.parts(active)
        before = state.average(active, inside + outside)
        for step in range(plan.MAX_STEPS + 1):
            # A step is expected to leave as much of the energy outside the basis as the one before it, or the early rows, did.
            energy = state.average(active, outside)
            fall = (energy / before).nan_to_num(0.0).clamp(max=0.97)
            outlook, left = self.outlook(active), state.on_device(state.left(active))
            promise_now, cost_now, count = plan.forecast(outlook, inside, outside, left - CHECK, left_over, limited)
            better = torch.zeros_like(count, dtype=torch.bool)
            for steps in plan.AHEAD if limited else (1,):
                rest = outside * (fall**steps).unsqueeze(1)
                promise, cost, _ = plan.forecast(
                    outlook, inside + (outside - rest), rest, left - CHECK, left_over, limited
                )
                cost += steps * 2 * BLOCK
                better |= (cost <= left) & ((promise > promise_now) | ((promise == promise_now) & (cost < cost_now)))
            counts[active], go = to_host(count, better)
            if step == plan.MAX_STEPS or not go.any():
                break
            before, active = energy[state.on_device(go.nonzero()[0])], active[go > 0]
            basis.widen(active)
            inside, outside = basis.parts(active)
        e = e[counts[e] > 0]
        if step:  # else the bases are those that were looked at
            counts[e[~rounding.trust(e)]] = 0
        return counts

    def probe(self, first: np.ndarray) -> None:
        """Draws the rounds that begin with `first` probes, [E], for each example as long as they are worth it."""
        state, basis, probes = self.state, self.basis, self.probes
        e = state.examples[first > 0]
        table = np.array([schedule(count, self.failure_probability) for count in first[e].tolist()])
        table = table.reshape(len(e), len(SHARES), 2)
        counts, quantiles = table[:, :, 0].astype(np.int64), state.on_device(table[:, :, 1])
        probes.start(basis)
        state.reserved[e] = CHECK
        stage, left, go = np.zeros(len(e), np.int64), state.left(e), np.ones(len(e), bool)
        known = take(basis.known, e)
        sums = torch.zeros_like(known)
        done = 0
        while True:
            go[go] = stage[go] < len(SHARES)
            go[go] = left[go] >= counts[go, stage[go]]
            if not go.all():
                kept = state.on_device(go.nonzero()[0])
                e, counts, stage, left = (value[go] for value in (e, counts, stage, left))
                quantiles, known, sums = (value[kept] for value in (quantiles, known, sums))
            if not len(e):
                return
            end = counts[np.arange(len(e)), stage]
            together = max(1, state.passes.pairs // len(e))
            for stop in [*range(done + together, int(end.min()), together), int(end.min())]:
                sums += state.differences(e, probes.draw(e, basis, done, stop)).square().sum(1)
                done = stop
            at = (end == done).nonzero()[0]
            here, round_ = state.on_device(at), state.on_device(stage[at])
            self.bound(e[at], known[here], sums[here], done, quantiles[here].gather(1, round_.unsqueeze(1)))
            outlook, further = self.outlook(e[at]), state.on_device(counts[at])
            target = outlook.target(known[here], sums[here] / done)
            put(self.target, e[at], target)
            worth = plan.worth_more(
                outlook,
                take(state.lower, e[at]),
                target,
                known[here],
                sums[here],
                done,
                further,
                quantiles[here],
                round_,
            )
            go = np.ones(len(e), bool)
            go[at] = to_host(worth & state.undecided(e[at]).any(1))[0] > 0
            stage[at] += 1

    def bound(self, e: np.ndarray, known: Tensor, sums: Tensor, count: int, quantile: Tensor) -> None:
        """Raises the lower bounds of the ratios of examples e by a round of `count` probes."""
        state = self.state
        rest, (honest, own) = sums / quantile, self.rounding.errors(e)
        error = honest + own
        gain = ((count + PILOT_PROBES) / quantile).sqrt()
        while True:
            upper = state.norm.upper(e, *widened(known, rest, gain, error), error)
            lower = reference.ratios(take(state.margin, e), upper * take(state.unit, e).unsqueeze(1))
            better = lower > take(state.lower, e)
            put(state.lower, e, torch.where(better, lower, take(state.lower, e)))
            put(state.rest, e, torch.where(better, rest, take(state.rest, e)))
            put(state.quantile, e, torch.where(better, quantile, take(state.quantile, e)))
            if not state.norm.MEASURES:
                return
            components = state.differences(e, take(self.basis.components, e))
            if not state.norm.measure(e, state.undecided(e), components, take(self.basis.directions, e)):
                return

    def finish(self) -> None:
        """Exact rows until the answer is decided; the check of the others; all rows where it fails."""
        state, rounding = self.state, self.rounding
        e = state.examples[self.probes.drawn > 0]
        if len(e):
            rounding.check(e, rounding.row_gap(e, take(state.early, e), take(state.early_rows, e)))
        self._rows(state.examples)
        unseen = self._unseen(state.examples)
        e, tied = (state.examples[unseen & some] for some in (self.probes.drawn > 0, self.probes.drawn == 0))
        if len(e):
            # Rows of what cannot be checked, and of all classes where that takes no more passes than checking them.
            target, (tolerance, share, mixture) = self._promised(e)
            waiting, left = ~take(state.seen, e), state.on_device(state.left(e))
            rows = waiting & (~(share <= 0.5) | (mixture.amax(1) + 1 >= waiting.sum(1)).unsqueeze(1))
            rows &= (~state.undecided(e).any(1) & (rows.sum(1) <= left)).unsqueeze(1)
            more = to_host(rows.any(1))[0] > 0
            if more.any():
                put(state.lower, e, take(state.lower, e).masked_fill(rows, 0.0))
                self._rows(e[more])
                if len(e := e[self._unseen(e)]):
                    target, (tolerance, share, mixture) = self._promised(e)
        state.reserved[:] = 0
        if len(e):
            self._verify(e, target, tolerance, share, mixture)
            self._rows(e)
        if len(tied := tied[state.left(tied) > 0]):  # at a distance of 0, unless a row is NaN
            rounding.look(tied)
            self._rows(tied)

    def _unseen(self, e: np.ndarray) -> np.ndarray:
        """Which of examples e have classes that were not evaluated, and none that is NaN: bool [e]."""
        state = self.state
        unseen: np.ndarray = to_host(~take(state.seen, e).all(1) & ~take(state.best, e).isnan())[0] > 0
        return unseen

    def _promised(self, e: np.ndarray) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """What is to be said of examples e, that no ratio is less than this [e], and what it lets products be off by."""
        state = self.state
        lowest = torch.where(take(state.seen, e), math.inf, take(state.lower, e)).amin(1)
        target = torch.minimum(take(state.best, e), lowest)
        return target, self.rounding.tolerances(e, target)

    def _verify(self, e: np.ndarray, target: Tensor, tolerance: Tensor, share: Tensor, mixture: Tensor) -> None:
        """Checks what is to be said of examples e; less is said where too few passes are left to check it."""
        state, left = self.state, self.state.on_device(self.state.left(e))
        less = target
        for factor in (*LESS, None):
            short = (~(share <= 0.5)).any(1) | (mixture.amax(1) >= left)
            shortened, last = to_host(short, mixture.amax(1))
            if factor is None or not shortened.any():
                break
            less = torch.where(short, factor * target, less)
            lower = torch.minimum(take(state.lower, e), less.unsqueeze(1))
            put(state.lower, e, torch.where(short.unsqueeze(1), lower, take(state.lower, e)))
            tolerance, share, mixture = self.rounding.tolerances(e, less)
        self.rounding.verify(e, tolerance, mixture, last.astype(np.int64) + 1)

    def _rows(self, e: np.ndarray) -> None:
        """Exact rows, in the order of `State.first`, as long as any may matter."""
        state = self.state
        while True:
            waiting, lower = state.undecided(e), take(state.lower, e)
            needed = waiting & ~(lower >= take(self.target, e).unsqueeze(1))
            unbounded = waiting & ~(lower > 0)
            number, count, least = to_host(waiting.sum(1), needed.sum(1), unbounded.sum(1)).astype(np.int64)
            keep = (number > 0) & (state.left(e) > 0)
            if not keep.any():
                return
            e = e[keep]
            # Those that are likely to be needed, and all that have no bound; else one, which may make the next needless.
            count = np.maximum(count.clip(1, state.norm.AT_ONCE), least)[keep]
            count = np.minimum(count, state.left(e))
            most = min(plan.common(count), max(1, 2 * state.passes.pairs // len(e)))
            classes, rows = state.evaluate(e, state.first(e, most), np.minimum(count, most))
            if self.probes.drawn[e].any():
                self.rounding.check(e, self.rounding.row_gap(e, classes, rows))
