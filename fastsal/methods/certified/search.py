"""The order of the steps of a certificate: widen the basis, plan, draw probes in rounds, take exact rows, best first."""

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import take, to_host
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

# Passes that rounding is looked at with: a random combination of the directions, and a mixture of the classes.
CHECKS = 2
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
        enough = state.left(state.examples) >= state.early.shape[1] + PILOT_PROBES + CHECKS + FIRST[0]
        e = state.examples[worthwhile & enough]
        if not len(e):
            return counts
        basis.see(e)
        basis.span(e, take(state.early_rows, e))
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
            promise_now, cost_now, count = plan.forecast(outlook, inside, outside, left - CHECKS, left_over, limited)
            better = torch.zeros_like(count, dtype=torch.bool)
            for steps in plan.AHEAD if limited else (1,):
                rest = outside * (fall**steps).unsqueeze(1)
                promise, cost, _ = plan.forecast(
                    outlook, inside + (outside - rest), rest, left - CHECKS, left_over, limited
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
        counts[e[~rounding.trust(e)]] = 0
        rounding.compare(e[counts[e] > 0])
        return counts

    def probe(self, first: np.ndarray) -> None:
        """Draws the rounds that begin with `first` probes, [E], for each example as long as they are worth it."""
        state, basis, probes = self.state, self.basis, self.probes
        e = state.examples[first > 0]
        table = np.array([schedule(count, self.failure_probability) for count in first[e].tolist()])
        table = table.reshape(len(e), len(SHARES), 2)
        counts, quantiles = table[:, :, 0].astype(np.int64), state.on_device(table[:, :, 1])
        probes.start(basis)
        state.reserved[e] = 1
        stage, left, go = np.zeros(len(e), np.int64), state.left(e), np.ones(len(e), bool)
        known = state.differences(e, take(basis.components, e)).square().sum(1)
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
            self.target[state.on_device(e[at])] = target
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
        own, typical = take(self.rounding.own, e), take(self.rounding.typical, e)
        known, rest, slack = widened(known, sums, self.rounding.slack(e), own, typical, count, quantile)
        while True:
            upper = state.norm.upper(e, known, rest, slack)
            lower = reference.ratios(take(state.margin, e), upper * take(state.unit, e).unsqueeze(1))
            lower = torch.where(take(self.rounding.inconsistent, e), 0.0, lower)
            state.lower[state.on_device(e)] = torch.maximum(take(state.lower, e), lower)
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
        if len(e):
            e = e[to_host(~take(state.seen, e).all(1) & ~take(state.best, e).isnan())[0] > 0]
        state.reserved[:] = 0
        if len(e):
            rounding.verify(e)
            self._rows(e)

    def _rows(self, e: np.ndarray) -> None:
        """Exact rows, the smallest lower bound first (the smallest margin among equals), as long as any may matter."""
        state = self.state
        while True:
            waiting, lower = state.undecided(e), take(state.lower, e)
            needed = waiting & ~(lower >= take(self.target, e).unsqueeze(1))
            unbounded = waiting & ~(lower > 0)
            number, count, least = to_host(waiting.sum(1), needed.sum(1), unbounded.sum(1)).astype(np.int64)
            keep = (number > 0) & (state.left(e) > 0)
            if not keep.any():
                return
            kept = state.on_device(keep.nonzero()[0])
            e, waiting, lower, margin = e[keep], waiting[kept], lower[kept], take(state.margin, e[keep])
            # Those that are likely to be needed, and all that have no bound; else one, which may make the next needless.
            count = np.maximum(count.clip(1, state.norm.AT_ONCE), least)[keep]
            count = np.minimum(count, state.left(e))
            most = min(plan.common(count), max(1, 2 * state.passes.pairs // len(e)))
            by_margin = margin.sort(stable=True, dim=1).indices
            by_class = torch.arange(state.n, device=state.device).expand_as(by_margin)
            order = torch.where(lower.isnan().any(1, keepdim=True), by_class, by_margin)
            key = torch.where(waiting, lower.nan_to_num(-torch.inf), torch.inf).gather(1, order)
            classes = order.gather(1, key.sort(stable=True, dim=1).indices[:, :most])
            classes, rows = state.evaluate(e, classes, np.minimum(count, most))
            if self.probes.drawn[e].any():
                self.rounding.check(e, self.rounding.row_gap(e, classes, rows))
