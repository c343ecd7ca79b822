"""Certified ρ̃: the exact minimum, with a stated failure probability, in a fraction of n backward passes.

Notation as in reference.py, q = 2. One JVP along v gives a = Jv, hence ⟨v, Δ_j⟩ = a_{i*} − a_j of *every* class j. For a
standard normal v these are normal with variance ‖Δ_j‖², so that the sum S_j of the squares over s independent probes is
‖Δ_j‖²·χ²_s, and ‖Δ_j‖² ≤ S_j / χ²_{s; δ'} (lower quantile) except with probability δ'. Each class then has a lower bound
L_j = m_j / upper(‖Δ_j‖) of its ratio; classes are evaluated exactly (by VJP) in ascending order of L_j until the next L_j is
no less than the best exact ratio, which then is ρ̃. What is done, for each example on its own:

1. Basis. g and the gradients of the highest other logits are taken exactly, then a block Krylov range finder adds four
   directions at a time (VJPs of class mixtures: the newest known components of the Δ_j, weighted towards small margins). A JVP
   along each direction of the orthonormalised basis gives every Δ_j's components in it. It stops when the predicted total
   number of passes no longer falls.
2. Plan. From the logits and the known components alone: cumulative probe counts s_1 < … < s_4 and their shares of δ.
3. Probes, projected off the basis, with cumulative sums; after each round go on, or stop, by the expected number of passes.
4. Exact rows, best first.

Why the guarantee holds.

- The basis is a function of the model and x; no probe has been drawn when it is complete. Given the basis, a normal vector
  projected off it is a standard normal vector of the orthogonal complement, whatever the basis is: S_j is exactly
  ‖Δ_j^⊥‖²·χ²_s, and ‖Δ_j‖² = (known part)² + ‖Δ_j^⊥‖².
- Step 2 fixes all counts and shares before the first probe, so every (class, round) bound is one of at most 4(n − 1) events
  laid down beforehand, the one of round t failing with probability δ_t / (n − 1), Σ δ_t = δ. With probability at least 1 − δ
  none fails: the union bound asks for no independence between classes (which share probes) or rounds (which share sums).
- On that event all bounds hold at once, so when to stop, whether to use a round at all, which class to evaluate next and every
  price are free to depend on the probes.
- Every example sees the same probes (one private generator, the seed alone). The statement above is about one example, its
  logits and Jacobian being fixed; that two examples fail together is possible, that either fails is no likelier for it. In
  return an example's probes depend on nothing else in the batch, nor on earlier calls.
- Rounding: for every class the vector of JVPs may be off by η·√s·‖g_j‖ in norm (for the basis, without √s), as may the one of
  i*; the bounds are widened by both, which is never less than η(|a_{i*}| + |a_j|) a probe up to the probes' own average. Each
  exactly evaluated row is compared with the JVPs of its class in float64; where they differ by more, or a NaN turned up,
  nothing is called certified.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsal import reference
from fastsal.linearization import Linearization
from fastsal.methods.bounds import schedule, upper_norms
from fastsal.methods.selection import Method, Nearest, Selection
from fastsal.passes import ModelPasses, Passes

TOP = 3  # highest other logits that are evaluated first and span the basis together with g
BLOCK = 4  # range finder directions a step: as good as one at a time, in a quarter of the steps
MAX_STEPS = 24
AHEAD = (1, 2, 4)
CAUTION = 2.0  # the forecast is optimistic: some classes have more of their norm outside the basis than the average
DEPENDENT = 1e-4  # what is left of a row that the basis spans is rounding: no direction worth a JVP
WORTHWHILE = 64  # with no more classes than this left, rows are about as cheap as any probing, and certain
COUNTS = (10, 12, 16, 20, 24, 28, 32, 40, 48, 64, 96)  # first rounds to choose from
TAIL = 8.0  # unknown energy in units of the newest direction's; measured 5 to 14 on trained CNNs. Only a guess for planning
ROUNDOFFS = 64.0  # η in units of the working precision's rounding error
GROUP_BYTES = 1 << 29


@dataclass(frozen=True)
class Certified(Method):
    """ρ̃ itself with probability at least 1 − failure_probability for each example, in far fewer than n passes (norm 2).

    failure_probability: δ in (0, 1), for each example.
    max_passes: the most VJPs and JVPs to spend on an example, at least 2; None for no limit. Where it runs out,
        `linearized_robustness` is an upper bound, `certified` false, and `lower_bound` still holds with probability 1 − δ.
    seed: of the private generator of the probes. The same seed gives the same probes for every example.

    >>> import torch, fastsal
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Tanh(), torch.nn.Linear(50, 200))
    >>> x = torch.randn(2, 30)
    >>> certified = fastsal.analyze(model, x, method=fastsal.Certified(failure_probability=1e-9))
    >>> certified.certified.tolist(), bool((certified.vjps + certified.jvps < 200).all())
    ([True, True], True)
    >>> torch.equal(certified.runner_up, fastsal.analyze(model, x).runner_up)
    True
    """

    name: ClassVar = "certified"
    norms: ClassVar = frozenset((2.0,))

    failure_probability: float = 1e-6
    max_passes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.failure_probability, float) or not 0 < self.failure_probability < 1:
            raise ValueError(
                f"Certified: got failure_probability={self.failure_probability!r}, wants a float in (0, 1)"
            )
        if self.max_passes is not None and (not isinstance(self.max_passes, int) or self.max_passes < 2):
            raise ValueError(f"Certified: got max_passes={self.max_passes!r}, wants None or an integer >= 2")
        if not isinstance(self.seed, int):
            raise ValueError(f"Certified: got seed={self.seed!r}, wants an integer")

    def select(self, graph: Linearization, norm: float, chunk_size: int | None, backend: str) -> Selection:
        """Certifies the batch in groups whose bases fit in memory: at most 52 float64 directions an example, seldom over 20."""
        everyone = torch.arange(len(graph.logits), device=graph.logits.device)
        groups = torch.split(everyone, max(1, GROUP_BYTES // (8 * 20 * graph.x.shape[1])))
        parts = [certify(ModelPasses(graph, group, chunk_size), self, backend) for group in groups]

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        provenance: dict[str, Any] = {name: joined(name) for name in ("vjps", "jvps", "certified")}
        provenance |= {"method": self.name, "distances": None, "failure_probability": self.failure_probability}
        provenance["lower_bound"] = joined("lower_bound").to(graph.logits.dtype)
        return Selection(joined("winners"), joined("pair"), provenance)


@dataclass(frozen=True)
class Certificate:
    """winners int64 [E, 2] (i*, nearest class found), their rows pair [E, 2, D], and the provenance [E] of each example."""

    winners: Tensor
    pair: Tensor
    vjps: Tensor
    jvps: Tensor
    certified: Tensor
    lower_bound: Tensor  # float64


class _Search:
    """The state of a group of E examples. Squares are in units of each example's own gradient scale, float64."""

    def __init__(self, passes: Passes, method: Certified, backend: str) -> None:
        self.passes, self.method = passes, method
        logits = passes.logits
        self.device = logits.device
        E, self.n = logits.shape
        self.nearest = Nearest(logits, 2.0, backend)
        self.prediction, self.margin = self.nearest.prediction, self.nearest.margin
        self.seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, self.prediction.unsqueeze(1), True)
        self.lower = torch.zeros_like(self.margin)
        self.vjps, self.jvps = torch.zeros_like(self.prediction), torch.zeros_like(self.prediction)
        self.sound = torch.ones_like(self.prediction, dtype=torch.bool)
        self.eta = ROUNDOFFS * passes.roundoff
        everyone = torch.arange(E, device=self.device)
        self.vjps += 1
        anchor = self._rows(everyone, self.prediction.unsqueeze(1))
        self.nearest.visit(self.prediction.unsqueeze(1), anchor)
        self.price = 1.0
        self.unit = torch.ones_like(self.margin[:, 0])
        self.basis = anchor.new_zeros(E, 0, passes.dimension, dtype=torch.float64)
        self.components = self.margin.new_zeros(E, 0, self.n)  # J times the basis
        self.probed = self.margin.new_zeros(E, 0, self.n)  # J times the probes, projected
        self.shadow = self.margin.new_zeros(E, 0, 0)  # the probes' components in the basis
        self.counts = torch.zeros_like(self.prediction)  # probes drawn
        self.probes = self.basis.new_zeros(0, passes.dimension)
        self.generator = torch.Generator().manual_seed(method.seed)
        # The highest other logits, the lowest class first among equals. The early rows are checked once there are probes.
        others = reference.other_classes(self.prediction, self.n)
        order = logits.gather(1, others).sort(stable=True, dim=1, descending=True).indices
        self.early = others.gather(1, order[:, : min(TOP, int(self._left(everyone).min()))])
        rows = self.evaluate(everyone, self.early)
        self.early, self.early_rows = (
            torch.cat((self.prediction.unsqueeze(1), self.early), 1),
            torch.cat((anchor, rows), 1),
        )

    def _left(self, e: Tensor) -> Tensor:
        """How many passes the limit leaves each of examples e."""
        limit = self.method.max_passes
        return torch.full_like(e, 1 << 40) if limit is None else limit - (self.vjps + self.jvps)[e]

    def _rows(self, e: Tensor, classes: Tensor) -> Tensor:
        one_hot = self.passes.logits.new_zeros(*classes.shape, self.n).scatter_(2, classes.unsqueeze(2), 1.0)
        return self.passes.vjp(e, one_hot)

    @property
    def best(self) -> Tensor:
        """The best exact ratio so far; NaN once there is one."""
        return self.nearest.distances.amin(1)

    def undecided(self, e: Tensor) -> Tensor:
        """Which classes may still change the answer, [e, n]: L_j below the best ratio; ties only where the class is lower.

        A NaN bound has to be looked at, lowest class first, until a NaN row settles the matter.
        """
        best, lower, runner_up = self.best[e].unsqueeze(1), self.lower[e], self.nearest.runner_up[e]
        before = torch.arange(self.n, device=self.device) < runner_up
        tie = (lower == best) & before & ((self.margin[e] == 0) | (best > 0)) & (best < math.inf)
        unknown = lower.isnan() & (before | ~best.isnan())
        return ~self.seen[e] & ((lower < best) | tie | unknown)

    def evaluate(self, e: Tensor, classes: Tensor) -> Tensor:
        """Takes the exact rows [e, c, D] of classes int64 [e, c] of examples e, and returns them."""
        rows = self._rows(e, classes)
        self.vjps[e] += classes.shape[1]
        self.seen[e.unsqueeze(1), classes] = True
        self.nearest.visit(classes, rows, None if len(e) == len(self.seen) else e)
        self.check(e, classes, rows)
        return rows

    def check(self, e: Tensor, classes: Tensor, rows: Tensor) -> None:
        """Compares rows [e, c, D] with the JVPs of their classes; a disagreement beyond η, or a NaN, is unsound."""
        r, s = self.basis.shape[1], self.probed.shape[1]
        self.sound[e] &= ~rows.isnan().flatten(1).any(1)
        if not r:
            return
        rows = rows.double() / self.unit[e].view(-1, 1, 1)
        size = rows.square().sum(2).sqrt()
        inside = rows @ self.basis[e].mT
        pick = classes.unsqueeze(1)
        gap = inside.mT - self.components[e].gather(2, pick.expand(-1, r, -1))
        good = gap.square().sum(1).sqrt() <= self.eta * size
        if s:
            along = rows @ self.probes[:s].T - inside @ self.shadow[e].mT
            drawn = torch.arange(s, device=self.device) < self.counts[e].unsqueeze(1)
            gap = torch.where(drawn.unsqueeze(2), along.mT - self.probed[e].gather(2, pick.expand(-1, s, -1)), 0.0)
            good &= gap.square().sum(1).sqrt() <= self.eta * self.counts[e].unsqueeze(1).double().sqrt() * size
        self.sound[e] &= good.all(1)

    # Step 1: the basis.

    def span(self, e: Tensor, rows: Tensor) -> bool:
        """Adds rows [e, c, D] to the basis of examples e, orthonormalised, and takes the JVPs; False if the model cannot."""
        basis = self.basis[e]
        directions = basis.new_zeros(rows.shape)
        for slot in range(rows.shape[1]):
            row = rows[:, slot : slot + 1].double()
            length = reference.vector_norm(row, 2.0).unsqueeze(2)
            row = row / torch.where(length > 0, length, 1.0)
            kept = torch.ones_like(length, dtype=torch.bool)
            for _ in range(2):  # twice is enough
                for known in (basis, directions[:, :slot]):
                    row = row - (row @ known.mT) @ known
                length = row.square().sum(2, keepdim=True).sqrt()
                kept &= length > DEPENDENT
                row = torch.where(kept, row / length, 0.0)
            directions[:, slot : slot + 1] = row
        products = self.passes.jvp(e, directions)
        if products is None:
            return False
        self.jvps[e] += directions.shape[1]
        r, c = self.basis.shape[1], directions.shape[1]
        self.basis = torch.cat((self.basis, self.basis.new_zeros(len(self.basis), c, self.basis.shape[2])), 1)
        self.basis[e, r:] = directions
        self.components = torch.cat((self.components, self.components.new_zeros(len(self.basis), c, self.n)), 1)
        self.components[e, r:] = products.double() / self.unit[e].view(-1, 1, 1)
        return True

    def differences(self, e: Tensor, values: Tensor) -> Tensor:
        """a_{i*} − a_j of values [e, k, n]."""
        return values.gather(2, self.prediction[e].view(-1, 1, 1).expand(-1, values.shape[1], 1)) - values

    def weights(self, e: Tensor) -> Tensor:
        """1 / m_j² of the classes not seen, in units of the smallest: how much a class's gradient matters."""
        margin = torch.where(self.seen[e] | ~(self.margin[e] > 0), math.inf, self.margin[e])
        return (margin.amin(1, keepdim=True) / margin).square().nan_to_num(0.0)

    def forecast(self, e: Tensor, unknown: Tensor) -> tuple[Tensor, Tensor]:
        """Expected further passes [e] if the basis stays as it is, and the first round's count that attains them.

        unknown [e]: the guess for the average ‖Δ_j^⊥‖² in units of that of the known part.
        """
        known = self.differences(e, self.components[e]).square().sum(1)
        best, seen, margin = self.best[e], self.seen[e], self.margin[e] / self.unit[e].unsqueeze(1)
        weights = self.weights(e)
        rest = (unknown * (weights * known).sum(1) / weights.sum(1)).unsqueeze(1)
        whole = (known + rest).sqrt()
        target = torch.minimum(best / self.unit[e], torch.where(seen, math.inf, margin / whole).amin(1)).unsqueeze(1)
        costs = [(~seen).sum(1).double()]
        for count in COUNTS:
            quantile = schedule(count, self.method.failure_probability, self.n)[0][1]
            bound = margin / (known + rest * (CAUTION * count / quantile)).sqrt()
            costs.append(count * self.price + (~seen & ~(bound >= target)).sum(1))
        cost, which = torch.stack(costs, 1).min(1)
        return cost, torch.tensor((0, *COUNTS), device=self.device)[which]

    def prepare(self) -> Tensor:
        """Builds the bases and returns the plans: the first rounds' probe counts [E], 0 where rows are cheaper."""
        scale = reference.vector_norm(self.early_rows, 2.0).amax(1)
        usable = torch.isfinite(scale) & torch.isfinite(self.margin).all(1)
        self.lower[~usable] = math.nan
        self.sound &= usable
        self.unit = torch.where(usable & (scale > 0), scale, 1.0)
        everyone = torch.arange(len(usable), device=self.device)
        worthwhile = usable & (self.undecided(everyone).sum(1) > WORTHWHILE)
        e = everyone[worthwhile & (self._left(everyone) > self.early.shape[1] + COUNTS[0])]
        plan = torch.zeros_like(self.prediction)
        if not len(e) or not self.span(e, self.early_rows[e]):
            return plan
        self.check(e, self.early[e], self.early_rows[e])
        known = self.differences(e, self.components[e]).square().sum(1)
        energy = (self.weights(e) * known).sum(1)
        active = torch.arange(len(e), device=self.device)
        for step in range(MAX_STEPS + 1):
            self.price = self.passes.price()
            a = e[active]
            if step:
                newest = self.differences(a, self.components[a, -BLOCK:]).square().sum(1) / BLOCK
                gained = (self.weights(a) * newest).sum(1)
                energy[active] += BLOCK * gained
                rest = TAIL * gained
                cost_now, count = self.forecast(a, rest / energy[active])
                plan[a] = count
                # A step takes its share off the tail; look several steps ahead, for the gain may come late.
                more = torch.zeros_like(active, dtype=torch.bool)
                for steps in AHEAD:
                    left = rest * (1 - BLOCK / TAIL) ** steps
                    cost_then, _ = self.forecast(a, left / (energy[active] + rest - left))
                    more |= cost_then + steps * BLOCK * (1 + self.price) < cost_now
                affordable = self._left(a) > BLOCK * 2 + count.clamp(min=COUNTS[0])
                active = active[more & affordable]
            if step == MAX_STEPS or not len(active):
                break
            a = e[active]
            newest = self.components[a, -BLOCK:] if step else self.components[a, :BLOCK]
            mixture = self.weights(a).square().unsqueeze(1) * self.differences(a, newest)
            cotangents = torch.zeros_like(mixture).scatter_(
                2, self.prediction[a].view(-1, 1, 1).expand_as(mixture[:, :, :1]), mixture.sum(2, keepdim=True)
            )
            cotangents = cotangents - mixture
            largest = cotangents.abs().amax(2, keepdim=True)
            cotangents = cotangents / torch.where(largest > 0, largest, 1.0)
            self.vjps[a] += BLOCK
            rows = self.passes.vjp(a, cotangents.to(self.passes.logits.dtype))
            self.sound[a] &= ~rows.isnan().flatten(1).any(1)
            self.span(a, rows)
        return plan

    # Step 3: the probes.

    def draw(self, count: int) -> None:
        """At least count probes [count, D], drawn one by one: the same whatever is asked for first."""
        while len(self.probes) < count:
            probe = torch.randn(1, self.passes.dimension, dtype=torch.float64, generator=self.generator)
            self.probes = torch.cat((self.probes, probe.to(self.device)))

    def probe(self, e: Tensor, first: int) -> None:
        """All rounds of the plan that begins with `first` probes, for examples e."""
        plan = schedule(first, self.method.failure_probability, self.n)
        known = self.differences(e, self.components[e]).square().sum(1)
        length = self.components[e].square().sum(1)
        sums, squares = torch.zeros_like(known), torch.zeros_like(known)
        done = 0
        for round_, (count, quantile) in enumerate(plan):
            afford = self._left(e) >= count - done
            if not bool(afford.all()):
                known, length, sums, squares, e = (v[afford] for v in (known, length, sums, squares, e))
            if not len(e):
                break
            self.draw(count)
            size = max(1, self.passes.pairs // len(e))
            for part in torch.split(self.probes[done:count], size):
                basis = self.basis[e]
                shadow = part @ basis.mT
                directions = part - shadow @ basis
                products = self.passes.jvp(e, directions)
                assert products is not None  # the basis has gone through
                values = products.double() / self.unit[e].view(-1, 1, 1)
                sums += self.differences(e, values).square().sum(1)
                squares += values.square().sum(1)
                self._record(e, done, values, shadow)
                done += len(part)
            self.jvps[e] += count - int(self.counts[e[0]])
            self.counts[e] = count
            scale = (length + squares / count).sqrt()
            margin = self.margin[e] / self.unit[e].unsqueeze(1)
            upper = upper_norms(known, sums, scale, self.prediction[e], count, quantile, self.eta)
            self.lower[e] = torch.maximum(
                self.lower[e], reference.ratios(self.margin[e], upper * self.unit[e].unsqueeze(1))
            )
            self.sound[e] &= ~upper.isnan().any(1)
            if round_ + 1 == len(plan):
                break
            likely = margin / (known + sums / count).sqrt()
            seen = self.seen[e]
            target = torch.minimum(self.best[e] / self.unit[e], torch.where(seen, math.inf, likely).amin(1)).unsqueeze(
                1
            )
            now = (~seen & ~(self.lower[e] / self.unit[e].unsqueeze(1) >= target)).sum(1).double()
            later = [
                (more - count) * self.price
                + (~seen & ~(margin / (known + sums / count * (more / its)).sqrt() >= target)).sum(1)
                for more, its in plan[round_ + 1 :]
            ]
            go = (torch.stack(later, 1).amin(1) < now) & self.undecided(e).any(1)
            known, length, sums, squares, e = (v[go] for v in (known, length, sums, squares, e))

    def _record(self, e: Tensor, start: int, values: Tensor, shadow: Tensor) -> None:
        stop = start + values.shape[1]
        if stop > self.probed.shape[1]:
            E, more = len(self.probed), stop - self.probed.shape[1]
            self.probed = torch.cat((self.probed, self.probed.new_zeros(E, more, self.n)), 1)
            held = self.shadow.new_zeros(E, stop, self.basis.shape[1])  # the basis is complete by now
            held[:, : self.shadow.shape[1], : self.shadow.shape[2]] = self.shadow
            self.shadow = held
        self.probed[e, start:stop], self.shadow[e, start:stop] = values, shadow

    # Step 4: exact rows.

    def finish(self) -> None:
        """Exact rows, the smallest lower bound first (the smallest margin among equals), as long as any may matter."""
        e = torch.arange(len(self.prediction), device=self.device)
        while True:
            waiting = self.undecided(e)
            keep = waiting.any(1) & (self._left(e) > 0)
            e, waiting = e[keep], waiting[keep]
            if not len(e):
                return
            count = int(torch.minimum(waiting.sum(1), self._left(e)).min())
            count = min(count, max(1, 2 * self.passes.pairs // len(e)))
            by_margin = self.margin[e].sort(stable=True, dim=1).indices
            by_class = torch.arange(self.n, device=self.device).expand_as(by_margin)
            order = torch.where(self.lower[e].isnan().any(1, keepdim=True), by_class, by_margin)
            key = torch.where(waiting, self.lower[e].nan_to_num(-math.inf), math.inf).gather(1, order)
            self.evaluate(e, order.gather(1, key.sort(stable=True, dim=1).indices[:, :count]))


def certify(passes: Passes, method: Certified, backend: str = "auto") -> Certificate:
    """Runs the algorithm of this module on a group of E >= 1 examples; see there for why `certified` may be believed."""
    search = _Search(passes, method, backend)
    plan = search.prepare()
    for first in COUNTS:
        if bool((plan == first).any()):
            search.probe((plan == first).nonzero().squeeze(1), first)
    probed = (search.counts > 0).nonzero().squeeze(1)
    if len(probed):
        search.check(probed, search.early[probed], search.early_rows[probed])
    search.finish()
    everyone = torch.arange(len(plan), device=search.device)
    best = search.best
    bound = torch.minimum(best, torch.where(search.seen, math.inf, search.lower).amin(1))
    return Certificate(
        winners=search.nearest.winners,
        pair=search.nearest.pair,
        vjps=search.vjps,
        jvps=search.jvps,
        certified=search.sound & ~best.isnan() & ~search.undecided(everyone).any(1),
        lower_bound=torch.where(search.sound | best.isnan(), bound, 0.0),
    )
