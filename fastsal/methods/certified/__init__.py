"""Certified ρ̃: the exact minimum, with a stated failure probability, in a fraction of n backward passes.

Notation as in reference.py; first q = 2. One JVP along v gives a = Jv, hence ⟨v, Δ_j⟩ = a_{i*} − a_j of *every* class j. For a
standard normal v these are normal with variance ‖Δ_j‖², so that the sum S_j of their squares over s independent probes is
‖Δ_j‖²·χ²_s, and ‖Δ_j‖² ≤ S_j / (the lower δ' quantile of χ²_s) except with probability δ'. Each class then has a lower bound
L_j = m_j / upper(‖Δ_j‖) of its ratio; classes are evaluated exactly, by VJPs, in ascending order of L_j until the next L_j is
no less than the best exact ratio, which then is ρ̃. What is done, for each example on its own:

1. Basis. g and the gradients of the highest other logits are taken exactly, then a block Krylov range finder adds six
   directions at a time (VJPs of class mixtures: the newest known components of the Δ_j and what the pilots see outside the
   basis, weighted towards small margins). A JVP along each direction of the orthonormalised basis gives every Δ_j's
   components in it. Two pilots, probes from a stream of their own that are projected anew as the basis grows, tell how much
   of each Δ_j lies outside; the basis stops growing when the expected number of passes no longer falls.
2. Plan. From the logits, the known components and the pilots: cumulative counts of probes s_1 < … < s_6, each with its share
   of δ.
3. Probes, projected off the basis, with cumulative sums; after each round go on, or stop, by the expected number of passes.
4. Exact rows, best first: those that are likely to be needed, then one at a time.

Theorem. For each example, the result is ρ̃ and `lower_bound` ≤ ρ̃, except with probability δ at most.

Proof. Let j* be the class that attains ρ̃, the lowest one among equals. The model and x determine it, and likewise the
rounding of the products; neither depends on a probe.

- The basis, all counts and all shares are functions of the model, x and the pilots, hence independent of the probes. Given
  them, a standard normal vector projected off the basis is a standard normal vector of its orthogonal complement. So S_{j*}
  after round t is exactly ‖the part of Δ_{j*} outside the basis‖² times a χ² variable with s_t degrees of freedom, and the
  bound of j* in round t fails with probability δ_t at most, Σ δ_t = δ. With probability at least 1 − δ none of these six
  bounds fails. No union over classes is taken: nothing is said of the bounds of the other classes, and nothing is needed.
- Suppose that none fails. Then L_{j*} ≤ ρ̃ throughout, whichever rounds were used. If j* was evaluated, the best exact ratio is
  ρ̃. If the search ended without it, then best ≤ L_{j*} ≤ ρ̃, and no exact ratio is less than ρ̃: best = ρ̃ again (a tie is
  passed over only in favour of a lower class). `lower_bound` is the least of the best ratio and the L_j of the classes that
  were not evaluated: one of them is ρ̃ or the L_{j*} ≤ ρ̃.
- That argument uses nothing but the bounds of j*, laid down beforehand. When to stop, whether to use a round at all, which
  class to evaluate next are free to depend on the probes.

q = 1. All of this is done with Δ_j / w in place of Δ_j, for weights w > 0 with Σ w² = D: rows are divided by w as they come,
and a JVP for the direction u is taken along u / w, for ⟨u / w, Δ_j⟩ = ⟨u, Δ_j / w⟩. The weights are a function of the rows of
the highest logits, hence of the model and x, and S_{j*} is ‖the part of Δ_{j*} / w outside the basis‖² times a χ² variable.
From an upper bound of that part's norm, from the norm of the known part k and from ‖wk‖_1, `bounds.Summed` has an upper bound
of ‖Δ_{j*}‖_1: a fact about vectors, with no chance in it. So the proof stays as it is. ‖wk‖_1 is asked for where Cauchy and
Schwarz's √D ‖Δ_j / w‖_2 does not settle the class already; the classes' wk are formed a few at a time.

Every example sees the same probes (a private stream, the seed alone decides). The theorem is about one example, its logits and
Jacobian being fixed; that two examples fail together is possible, that either fails is no likelier for it. In return an
example's probes depend on nothing else in the batch, nor on earlier calls.

Rounding. The theorem holds if the products of class j with the basis, and with the probes in the root mean square, are off by
slack_j at most, and those of i* by slack_{i*}: `bounds.widened` adds both slacks to the norms of both parts, and for q = 1 √D
times both to ‖wk‖_1, since ‖we‖_1 ≤ ‖w‖_2 ‖e‖_2 for the error e of k. The slack is fixed before a probe is drawn: it is η
times ‖g_j‖, or ‖g_j / w‖, or the root mean square of these norms of all classes, whichever is larger, and η is the largest
disagreement, in the same units, between a row that was taken exactly and its JVPs, with a factor to spare. One JVP along a
random combination of all directions so far is compared with the same combination of their products: a class where the two
differ by more than its slack, say one whose own gradient cancels, gets no bound, so that its row is taken. Afterwards every
row that is evaluated is compared with the JVPs of its class in float64. An example where they differ by more than η keeps no
bound: it is finished with exact rows.
"""

import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import of, to_device, to_host
from fastsal.methods.base import Method, Nearest, Selection, by_margin, margins
from fastsal.methods.certified.bounds import FIRST, NORMS, SHARES, LeftOver, schedule, widened
from fastsal.model.linearization import Linearization
from fastsal.model.products import ModelPasses, NoJVPError, Passes
from fastsal.tensor import reference

TOP = 3  # highest other logits that are evaluated first and span the basis together with g
BLOCK = 6  # range finder directions a step, PILOTS of them from the pilots: a pass fewer than with 4, and fewer steps
MAX_STEPS = 16
AHEAD = (1, 2, 4)  # how many steps a plan with a limit of passes looks ahead: what they promise may come late
PILOTS = 2
ROOM = TOP + 1 + 2 * BLOCK  # for directions, to begin with
PROJECTED = 4  # probes at once, at least: a large basis is read for all of them
FLATTERED = 1.3  # pilots that have chosen directions see too little outside the basis: 0.5 to 1 times what there is
PRIOR = 4.0  # the average over classes counts as this many pilots in the estimate for one class
DEPENDENT = 1e-4  # what is left of a row that the basis spans is rounding: no direction worth a JVP
WORTHWHILE = 64  # with no more classes than this left, rows are about as cheap as any probing, and certain
SPARE = 8.0  # η in units of the largest disagreement that was seen
UNSTABLE = 0.3  # η from which on bounds say nothing
GROUP_BYTES = 1 << 24  # of a group's bases: what a cache holds, so that a batch of small images is done in a few groups
GROUP_BYTES_ACCELERATOR = 1 << 30  # a device is not filled by one image, and every group has its own rounds


@dataclass(frozen=True)
class Certified(Method):
    """ρ̃ itself with probability at least 1 − failure_probability for each example, in far fewer than n passes.

    For perturbations in the 2-norm and in the largest entry (p = 2 and p = inf).

    Args:
        failure_probability: δ in (0, 1), for each example.
        max_passes: The most VJPs and JVPs to spend on an example, at least 2; None for no limit. Where it runs out,
            `linearized_robustness` is an upper bound, `certified` false, and `lower_bound` still holds with probability 1 − δ.
        seed: Any integer. It decides the probes, which are the same for every example; they come from a private stream that
            shares nothing with torch's or NumPy's own, whatever those were seeded with.

    Raises:
        ValueError: An option is out of its range.

    Example:
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
    norms: ClassVar = frozenset(NORMS)

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

    def select(
        self,
        graph: Linearization,
        norm: float,
        chunk_size: int | None,
        backend: str,
        own: Tensor | None = None,
        among: Tensor | None = None,
    ) -> Selection:
        """Certifies the batch in groups, so that nobody waits long for the hardest example, and no more is recorded at a time.

        A group's bases, seldom over 20 float64 directions an example, are to fit a cache, or a part of a device's memory. It
        has two examples at least: passes through one alone take longer, 3 to 10 % of all on EfficientNet-Lite0.
        """
        device = graph.x.device
        held = GROUP_BYTES if device.type == "cpu" else GROUP_BYTES_ACCELERATOR
        size = max(2, held // (8 * 20 * graph.x.shape[1]))
        normals = Normals(self.seed, graph.x.shape[1], device)
        parts, recorded = [], []
        for start in range(0, len(graph.leaf), size):
            stop = min(start + size, len(graph.leaf))
            passes = ModelPasses(graph, np.arange(start, stop), chunk_size)
            wanted, allowed = (None if value is None else value[start:stop] for value in (own, among))
            parts.append(certify(passes, self, backend, norm, normals, wanted, allowed))
            recorded.append(passes.logits)
        logits = torch.cat(recorded)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        provenance: dict[str, Any] = {name: joined(name) for name in ("vjps", "jvps", "certified")}
        provenance |= {"method": self.name, "distances": None, "failure_probability": self.failure_probability}
        provenance["lower_bound"] = joined("lower_bound").to(logits.dtype)
        return Selection(logits, joined("winners"), joined("pair"), provenance)


@dataclass(frozen=True)
class Certificate:
    """winners int64 [E, 2] (i*, nearest class found), their rows pair [E, 2, D], and the provenance [E] of each example."""

    winners: Tensor
    pair: Tensor
    vjps: Tensor
    jvps: Tensor
    certified: Tensor
    lower_bound: Tensor  # float64


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator of its own for a seed and a purpose: Philox with a key that is a hash of both and of this package's name."""
    key = hashlib.blake2b(f"fastsal.Certified {purpose} {seed}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


class Normals:
    """The standard normal vectors [D] that a seed decides: the pilots, and as many probes as are asked for, in one order."""

    def __init__(self, seed: int, dimension: int, device: torch.device) -> None:
        self._dimension, self._device = dimension, device
        self.pilots = self._next(stream(seed, "pilots"), PILOTS)
        self._generator = stream(seed, "probes")
        self._probes = self.pilots[:0]

    def _next(self, generator: np.random.Generator, count: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal((count, self._dimension))).to(self._device)

    def probes(self, count: int) -> Tensor:
        """The first `count` probes, float64 [count, D]: the same whatever was asked for before."""
        if count > len(self._probes):
            self._probes = torch.cat((self._probes, self._next(self._generator, count - len(self._probes))))
        return self._probes[:count]


class _Search:
    """The state of a group of E examples. Squares are in units of each example's own gradient scale, float64.

    `e` is always int64 [e], ascending: the examples that a step is about. The passes that they have used, plans and
    rounds are on the host too. What decides comes there in one copy a round, so that a device is waited for once.
    """

    def __init__(
        self,
        passes: Passes,
        method: Certified,
        backend: str,
        norm: float = 2.0,
        normals: Normals | None = None,
        own: Tensor | None = None,
        among: Tensor | None = None,
    ) -> None:
        self.passes, self.method = passes, method
        self.normals = normals or Normals(method.seed, passes.dimension, passes.logits.device)
        logits = passes.logits
        self.device = logits.device
        E, self.n = logits.shape
        self.nearest = Nearest(*margins(logits, own, among), norm, backend)
        self.norm = NORMS[norm](logits, passes.dimension, backend)
        self.prediction, self.margin = self.nearest.prediction, self.nearest.margin
        self.left_over = LeftOver(FIRST, method.failure_probability, self.device)
        self.seen = self.margin == math.inf  # no candidates: classes that do not count, and logits of −inf
        self.lower = torch.zeros_like(self.margin)
        self.vjps, self.jvps = np.zeros(E, np.int64), np.zeros(E, np.int64)
        self.drawn = np.zeros(E, np.int64)  # how many probes
        self.everyone = np.arange(E)
        # The predicted class and the highest other logits, the lowest first among equals, [E, c]; their rows, [E, c, D], are
        # checked once there are probes.
        early = by_margin(self.margin, self.prediction)[:, : min(TOP, self._left(self.everyone).min() - 1)]
        self.early = torch.cat((self.prediction.unsqueeze(1), early), 1)
        self.early_rows = self.evaluate(self.everyone, self.early)
        self.unit = torch.ones_like(self.margin[:, 0])
        self.rank = 0  # of the bases
        self._basis = self.margin.new_empty(E, ROOM, passes.dimension)
        self._components = self.margin.new_empty(E, ROOM, self.n)
        self.pilots = self.normals.pilots
        self.piloted = self.margin.new_zeros(E, PILOTS, self.n)  # J times the pilots
        self.residual = self.margin.new_zeros(E, PILOTS, self.n)  # J times their parts outside the basis
        self.probed = self.margin.new_zeros(E, 0, self.n)  # J times the probes, projected
        self.shadow = self.margin.new_zeros(E, 0, 0)  # the probes' components in the basis
        self.eta = torch.full_like(self.margin[:, 0], SPARE * torch.finfo(logits.dtype).eps)
        self.typical = torch.zeros_like(self.margin[:, 0])  # about the root mean square of all ‖g_j‖
        self.target = torch.full_like(self.typical, math.inf)  # about ρ̃, once there are probes
        self.odd = torch.zeros_like(self.seen)  # classes whose products disagree among themselves

    def _left(self, e: np.ndarray) -> np.ndarray:
        """How many passes the limit leaves each of examples e."""
        limit = self.method.max_passes
        return np.full(len(e), 1 << 40) if limit is None else limit - self.vjps[e] - self.jvps[e]

    def _device(self, values: Any) -> Tensor:
        return to_device(values, self.device)

    @property
    def basis(self) -> Tensor:
        """The orthonormal directions of every example, [E, r, D]."""
        return self._basis[:, : self.rank]

    @property
    def components(self) -> Tensor:
        """J times the basis, [E, r, n]."""
        return self._components[:, : self.rank]

    def _put(self, held: Tensor, e: np.ndarray, start: int, values: Tensor) -> Tensor:
        """`held` [E, room, ...] with `values` [e, c, ...] from `start` on, where other examples get 0; room stays untouched."""
        stop = start + values.shape[1]
        if stop > held.shape[1]:
            more = held.new_empty(len(held), max(stop, 2 * held.shape[1]), *held.shape[2:])
            more[:, :start] = held[:, :start]
            held = more
        if len(e) < len(held):
            held[:, start:stop] = 0.0
        held[slice(None) if len(e) == len(held) else self._device(e), start:stop] = values
        return held

    def _rows(self, e: np.ndarray, classes: Tensor) -> Tensor:
        one_hot = self.passes.logits.new_zeros(*classes.shape, self.n).scatter_(2, classes.unsqueeze(2), 1.0)
        return self.passes.vjp(e, one_hot)

    def products(self, e: np.ndarray, directions: Tensor) -> Tensor:
        """J times directions [e, k, D], in the examples' units: [e, k, n]."""
        products = self.passes.jvp(e, self.norm.directions(e, directions))
        self.jvps[e] += directions.shape[1]
        return products.double() / of(self.unit, e).view(-1, 1, 1)

    def differences(self, e: np.ndarray, values: Tensor) -> Tensor:
        """a_{i*} − a_j of values [e, k, n]."""
        return values.gather(2, of(self.prediction, e).view(-1, 1, 1).expand(-1, values.shape[1], 1)) - values

    @property
    def best(self) -> Tensor:
        """The best exact ratio so far; NaN once there is one."""
        return self.nearest.distances.amin(1)

    def undecided(self, e: np.ndarray) -> Tensor:
        """Which classes may still change the answer, [e, n]: L_j below the best ratio; ties only where the class is lower.

        A NaN bound has to be looked at, lowest class first, until a NaN row settles the matter.
        """
        best, lower, runner_up = of(self.best, e).unsqueeze(1), of(self.lower, e), of(self.nearest.runner_up, e)
        before = torch.arange(self.n, device=self.device) < runner_up
        tie = (lower == best) & before & ((of(self.margin, e) == 0) | (best > 0)) & (best < math.inf)
        unknown = lower.isnan() & (before | ~best.isnan())
        return ~of(self.seen, e) & ((lower < best) | tie | unknown)

    def evaluate(self, e: np.ndarray, classes: Tensor, counts: np.ndarray | None = None) -> Tensor:
        """Takes the exact rows [e, c, D] of classes int64 [e, c] of examples e, and returns them.

        With `counts`, int64 [e], only so many of each example's are taken, the first ones; the first stands in for the others.

        An example whose rows disagree with its JVPs by more than η, or hold a NaN, loses its bounds: every class is to be seen.
        """
        self.vjps[e] += classes.shape[1] if counts is None else counts
        if counts is not None:
            slots = torch.arange(classes.shape[1], device=self.device)
            classes = torch.where(slots < self._device(counts).unsqueeze(1), classes, classes[:, :1])
        rows = self._rows(e, classes)
        self.seen[self._device(e).unsqueeze(1), classes] = True
        self.nearest.visit(classes, rows, None if len(e) == len(self.seen) else self._device(e))
        self.check(e, classes, rows)
        return rows

    def check(self, e: np.ndarray, classes: Tensor, rows: Tensor) -> None:
        """Takes their bounds from the examples whose rows [e, c, D] disagree with their JVPs by more than η."""
        if self.drawn.any():
            good = self.disagreement(e, classes, rows) <= of(self.eta, e)
            good |= self._device(self.drawn[e] == 0)
            self.lower[self._device(e)] = torch.where(good.unsqueeze(1), of(self.lower, e), 0.0)

    def disagreement(self, e: np.ndarray, classes: Tensor, rows: Tensor) -> Tensor:
        """How far rows [e, c, D] are from the JVPs of their classes, in the units of η: [e], the largest over the classes.

        The larger of two figures: the norm over the basis, and the root mean square over the pilots and the probes; relative to
        the norm of the row, or to the typical one where that is larger.
        """
        rows = self.norm.rows(e, rows) / of(self.unit, e).view(-1, 1, 1)
        inside = rows @ of(self.basis, e).mT
        s = int(self.drawn.max())
        pick = classes.unsqueeze(1)

        def gap(got: Tensor, values: Tensor) -> Tensor:
            return (got - of(values, e).gather(2, pick.expand(-1, values.shape[1], -1)).mT).square()

        outside = gap(rows @ self.pilots.T, self.piloted).sum(2)
        drawn = self._device(self.drawn[e]).unsqueeze(1)
        if s:
            along = gap(rows @ self.normals.probes(s).T - inside @ of(self.shadow[:, :s], e).mT, self.probed[:, :s])
            outside += torch.where(torch.arange(s, device=self.device) < drawn.unsqueeze(2), along, 0.0).sum(2)
        square = torch.maximum(gap(inside, self.components).sum(2), outside / (PILOTS + drawn))
        size = torch.maximum(torch.linalg.vector_norm(rows, dim=2), of(self.typical, e).unsqueeze(1))
        return torch.where(square == 0, 0.0, square.sqrt() / size).amax(1)

    # Step 1: the basis.

    def span(self, e: np.ndarray, rows: Tensor) -> None:
        """Adds rows [e, c, D] to the basis of examples e, orthonormalised, and takes the JVPs."""
        basis, rows = of(self.basis, e), self.norm.rows(e, rows) / of(self.unit, e).view(-1, 1, 1)
        length = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        rows /= torch.where(length > 0, length, 1.0)
        rows.baddbmm_(rows @ basis.mT, basis, alpha=-1)
        directions = torch.zeros_like(rows)
        for slot in range(rows.shape[1]):
            row, known = rows[:, slot : slot + 1], directions[:, :slot]
            kept = torch.ones_like(row[:, :, :1], dtype=torch.bool)
            for _ in range(2):  # twice is enough
                row = torch.baddbmm(row, row @ known.mT, known, alpha=-1)
                length = torch.linalg.vector_norm(row, dim=2, keepdim=True)
                kept &= length > DEPENDENT
                row = torch.where(kept, row / length, 0.0)
            directions[:, slot : slot + 1] = row
        # Again, for what rounding had left has grown with them.
        directions.baddbmm_(directions @ basis.mT, basis, alpha=-1)
        del rows, row, known  # the products want the room
        products = self.products(e, directions)
        self._basis = self._put(self._basis, e, self.rank, directions)
        self._components = self._put(self._components, e, self.rank, products)
        self.residual[self._device(e)] = of(self.residual, e) - (self.pilots @ directions.mT) @ products
        self.rank += directions.shape[1]

    def parts(self, e: np.ndarray) -> tuple[Tensor, Tensor]:
        """The squared norms of the parts of every Δ_j in the basis and outside it, [e, n]; the pilots estimate the second."""
        energy = self.differences(e, of(self.residual, e)).square().sum(1)
        mean = (energy + PRIOR * self._average(e, energy / PILOTS).unsqueeze(1)) / (PRIOR + PILOTS)
        inside = self.differences(e, of(self.components, e)).square().sum(1)
        return inside, mean if self.rank == self.early.shape[1] else FLATTERED * mean

    def weights(self, e: np.ndarray) -> Tensor:
        """1 / m_j⁴ of the classes not seen, in units of the largest: how much a class's gradient matters."""
        margin = of(self.margin, e)
        margin = torch.where(of(self.seen, e) | ~(margin > 0), math.inf, margin)
        return (margin.amin(1, keepdim=True) / margin).pow(4).nan_to_num(0.0)

    def _average(self, e: np.ndarray, values: Tensor) -> Tensor:
        """The average over classes of values [e, n], weighted by how much they matter: [e]."""
        weights = self.weights(e)
        return ((weights * values).sum(1) / weights.sum(1)).nan_to_num(0.0)

    def widen(self, e: np.ndarray) -> None:
        """Adds a step of the range finder to the bases of examples e."""
        newest = torch.cat((of(self.components, e)[:, PILOTS - BLOCK :], of(self.residual, e)), 1)
        mixture = self.weights(e).square().unsqueeze(1) * self.differences(e, newest)
        cotangents = -mixture
        own = of(self.prediction, e).view(-1, 1, 1).expand_as(mixture[:, :, :1])
        cotangents.scatter_(2, own, mixture.sum(2, keepdim=True))
        largest = cotangents.abs().amax(2, keepdim=True)
        cotangents = cotangents / torch.where(largest > 0, largest, 1.0)
        self.vjps[e] += BLOCK
        self.span(e, self.passes.vjp(e, cotangents.to(self.passes.logits.dtype)))

    # Step 2: the plan.

    def forecast(self, e: np.ndarray, inside: Tensor, outside: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What further passes will achieve if only `share` [e] of what is outside the basis now is outside it then.

        `inside` and `outside` are the squared norms of the two parts of every Δ_j now, [e, n].

        Returns the lower bound that the limit of passes allows, relative to the expected ρ̃ (1 where the answer is to be had),
        the expected passes, and the first round's count of probes that attains both, 0 for exact rows alone: [e] each.
        """
        rest = outside * share.unsqueeze(1)
        known = inside + (outside - rest)
        waiting = ~of(self.seen, e)
        margin = of(self.margin, e) / of(self.unit, e).unsqueeze(1)
        likely = torch.where(waiting, margin / self.norm.likely(e, known, rest), math.inf).amin(1)
        target = torch.minimum(of(self.best, e), likely).unsqueeze(1)
        left = self._device(self._left(e) - 1)  # `compare` takes one
        room = torch.where(waiting, self.norm.room(e, known, margin / target) / rest, math.inf)
        cost = torch.cat((waiting.sum(1, keepdim=True), self.left_over.expected(room) + self._device(FIRST)), 1)
        promise = (cost <= left.unsqueeze(1)).double()
        if self.method.max_passes is not None:
            for column, count in enumerate(FIRST, 1):
                quantile = schedule(count, self.method.failure_probability)[0][1]
                bound = margin / self.norm.expected(e, known, rest * (count / quantile)) / target
                rows = (left - count).clamp(0, self.n - 1).unsqueeze(1)
                reached = torch.where(waiting, bound, math.inf).sort(1).values.gather(1, rows).squeeze(1)
                reached = torch.where(left >= count, reached.clamp(max=1.0).nan_to_num(0.0), -1.0)
                promise[:, column] = torch.where(cost[:, column] > left, reached, promise[:, column])
        cost = torch.where(promise == promise.amax(1, keepdim=True), cost, math.inf)
        which = cost.argmin(1)
        return promise.amax(1), cost.amin(1), self._device((0, *FIRST))[which]

    def prepare(self) -> np.ndarray:
        """Builds the bases and returns the plans: the first rounds' counts of probes [E], 0 where rows are cheaper."""
        self.norm.fit(self.early_rows)
        scale = reference.vector_norm(self.norm.rows(self.everyone, self.early_rows), 2.0).amax(1)
        usable = torch.isfinite(scale) & (torch.isfinite(self.margin) | self.seen).all(1)
        self.lower = torch.where(usable.unsqueeze(1), self.lower, math.nan)
        self.unit = torch.where(usable & (scale > 0), scale, 1.0)
        plan = np.zeros_like(self.vjps)
        worthwhile = to_host(usable & (self.undecided(self.everyone).sum(1) > WORTHWHILE))[0] > 0
        e = self.everyone[worthwhile & (self._left(self.everyone) >= self.early.shape[1] + PILOTS + 1 + FIRST[0])]
        if not len(e):
            return plan
        try:
            self.piloted[self._device(e)] = self.products(e, self.pilots.expand(len(e), -1, -1))
            self.residual.copy_(self.piloted)
            self.span(e, of(self.early_rows, e))
        except NoJVPError as error:
            warnings.warn(f"{error}; taking every row", stacklevel=2)
            return plan
        self.typical[self._device(e)] = self.sizes(e).square().mean(1).sqrt()
        active = e[self.trust(e)]
        inside, outside = self.parts(active)
        before = self._average(active, inside + outside)
        for step in range(MAX_STEPS + 1):
            # A step is expected to leave as much of the energy outside the basis as the one before it, or the early rows, did.
            energy = self._average(active, outside)
            fall = (energy / before).nan_to_num(0.0).clamp(max=0.97)
            promise_now, cost_now, count = self.forecast(active, inside, outside, torch.ones_like(fall))
            better, left = torch.zeros_like(count, dtype=torch.bool), self._device(self._left(active))
            for steps in AHEAD if self.method.max_passes is not None else (1,):
                promise, cost, _ = self.forecast(active, inside, outside, fall**steps)
                cost += steps * 2 * BLOCK
                better |= (cost <= left) & ((promise > promise_now) | ((promise == promise_now) & (cost < cost_now)))
            plan[active], go = to_host(count, better)
            if step == MAX_STEPS or not go.any():
                break
            before, active = energy[self._device(go.nonzero()[0])], active[go > 0]
            self.widen(active)
            inside, outside = self.parts(active)
        e = e[plan[e] > 0]
        plan[e[~self.trust(e)]] = 0
        self.compare(e[plan[e] > 0])
        return plan

    # Rounding, known before the first probe.

    def trust(self, e: np.ndarray) -> np.ndarray:
        """Sets η of examples e by the rows known so far, and tells for which of them JVPs can be used at all, [e]."""
        if not len(e):
            return np.zeros(0, bool)
        seen = self.disagreement(e, of(self.early, e), of(self.early_rows, e))
        self.eta[self._device(e)] = torch.maximum(of(self.eta, e), SPARE * seen)
        seen, eta = to_host(seen, of(self.eta, e))
        unstable = eta > UNSTABLE
        if unstable.any():
            warnings.warn(
                f"model: {unstable.sum()} of {len(e)} examples have gradients that differ by up to "
                f"{seen[unstable].max():.1e} of themselves between a backward and a forward-mode pass; they are finished with "
                "exact rows",
                stacklevel=2,
            )
        trusted: np.ndarray = ~unstable & ~np.isnan(seen)
        return trusted

    def compare(self, e: np.ndarray) -> None:
        """Compares one JVP along a random combination of all directions so far with the combination of their products."""
        if not len(e):
            return
        normal = stream(self.method.seed, "combination").standard_normal((1, self.rank + PILOTS))
        mixture = self._device(normal / np.linalg.norm(normal))
        inside, pilots = mixture[:, : self.rank], mixture[:, self.rank :] / math.sqrt(self.passes.dimension)
        products = self.products(e, inside @ of(self.basis, e) + pilots @ self.pilots)
        expected = inside @ of(self.components, e) + pilots @ of(self.piloted, e)
        self.odd[self._device(e)] = (products - expected).squeeze(1).abs() > self.slack(e, self.sizes(e))

    def sizes(self, e: np.ndarray) -> Tensor:
        """About ‖g_j‖ of every class [e, n], from the basis and the pilots."""
        return (of(self.components, e).square().sum(1) + of(self.residual, e).square().mean(1)).sqrt()

    def slack(self, e: np.ndarray, size: Tensor) -> Tensor:
        """How far the products of every class may be off [e, n], from about ‖g_j‖ [e, n]."""
        return of(self.eta, e).unsqueeze(1) * torch.maximum(size, of(self.typical, e).unsqueeze(1))

    # Step 3: the probes.

    def probe(self, plan: np.ndarray) -> None:
        """Draws the rounds that the plan lays down, [E], for each example as long as they are worth it."""
        e = self.everyone[plan > 0]
        rounds = [schedule(first, self.method.failure_probability) for first in plan[e].tolist()]
        table = np.array(rounds).reshape(len(e), len(SHARES), 2)
        counts, quantiles = table[:, :, 0].astype(np.int64), self._device(table[:, :, 1])
        self.shadow = self.shadow.new_zeros(len(self.shadow), 0, self.rank)
        stage, left, go = np.zeros(len(e), np.int64), self._left(e), np.ones(len(e), bool)
        known = self.differences(e, of(self.components, e)).square().sum(1)
        length = of(self.components, e).square().sum(1)
        sums, squares = torch.zeros_like(known), torch.zeros_like(known)
        done = 0
        while True:
            go[go] = stage[go] < len(SHARES)
            go[go] = left[go] >= counts[go, stage[go]]
            if not go.all():
                kept = self._device(go.nonzero()[0])
                e, counts, stage, left = (value[go] for value in (e, counts, stage, left))
                quantiles, known, length, sums, squares = (
                    value[kept] for value in (quantiles, known, length, sums, squares)
                )
            if not len(e):
                return
            end = counts[np.arange(len(e)), stage]
            together = max(PROJECTED, self.passes.pairs // len(e))
            for part in torch.split(self.normals.probes(int(end.min()))[done:], together):
                basis = of(self.basis, e)
                shadow = part @ basis.mT
                values = self.products(e, torch.baddbmm(part.expand(len(e), -1, -1), shadow, basis, alpha=-1))
                self.probed = self._put(self.probed, e, done, values)
                self.shadow = self._put(self.shadow, e, done, shadow)
                sums += self.differences(e, values).square().sum(1)
                squares += values.square().sum(1)
                done += len(part)
            self.drawn[e] = done
            at = (end == done).nonzero()[0]
            here, round_ = self._device(at), self._device(stage[at])
            size = (length[here] + squares[here] / done).sqrt()
            self.bound(e[at], known[here], sums[here], size, done, quantiles[here].gather(1, round_.unsqueeze(1)))
            further = self._device(counts[at])
            worth = self.worth_more(e[at], known[here], sums[here], done, further, quantiles[here], round_)
            go = np.ones(len(e), bool)
            go[at] = to_host(worth)[0] > 0
            stage[at] += 1

    def bound(self, e: np.ndarray, known: Tensor, sums: Tensor, size: Tensor, count: int, quantile: Tensor) -> None:
        """Raises the lower bounds of the ratios of examples e by a round of `count` probes. `size`: about ‖g_j‖, [e, n]."""
        known, rest, slack = widened(known, sums, self.slack(e, size), of(self.prediction, e), count, quantile)
        while True:
            upper = self.norm.upper(e, known, rest, slack)
            lower = reference.ratios(of(self.margin, e), upper * of(self.unit, e).unsqueeze(1))
            lower = torch.where(of(self.odd, e), 0.0, lower)
            self.lower[self._device(e)] = torch.maximum(of(self.lower, e), lower)
            if not self.norm.MEASURES:
                return
            components = self.differences(e, of(self.components, e))
            if not self.norm.measure(e, self.undecided(e), components, of(self.basis, e)):
                return

    def worth_more(
        self, e: np.ndarray, known: Tensor, sums: Tensor, done: int, counts: Tensor, quantiles: Tensor, stage: Tensor
    ) -> Tensor:
        """Whether some later round is expected to save more exact rows than its probes cost, [e]."""
        margin, waiting = of(self.margin, e) / of(self.unit, e).unsqueeze(1), ~of(self.seen, e)
        likely = torch.where(waiting, margin / self.norm.likely(e, known, sums / done), math.inf).amin(1)
        target = torch.minimum(of(self.best, e), likely).unsqueeze(1)
        self.target[self._device(e)] = target.squeeze(1)
        now = (waiting & ~(of(self.lower, e) >= target)).sum(1).double()
        later = torch.full_like(now, math.inf)
        for round_ in range(1, counts.shape[1]):
            count, quantile = counts[:, round_].double(), quantiles[:, round_]
            bound = margin / self.norm.expected(e, known, sums * (count / done / quantile).unsqueeze(1))
            cost = (count - done) + (waiting & ~(bound >= target)).sum(1)
            later = torch.where(stage < round_, torch.minimum(later, cost), later)
        return (later < now) & self.undecided(e).any(1)

    # Step 4: exact rows.

    def finish(self) -> None:
        """Exact rows, the smallest lower bound first (the smallest margin among equals), as long as any may matter."""
        probed = self.everyone[self.drawn > 0]
        if len(probed):
            self.check(probed, of(self.early, probed), of(self.early_rows, probed))
        e = self.everyone
        while True:
            waiting, lower = self.undecided(e), of(self.lower, e)
            needed = waiting & ~(lower >= of(self.target, e).unsqueeze(1))
            unbounded = waiting & ~(lower > 0)
            number, count, least = to_host(waiting.sum(1), needed.sum(1), unbounded.sum(1)).astype(np.int64)
            keep = (number > 0) & (self._left(e) > 0)
            if not keep.any():
                return
            kept = self._device(keep.nonzero()[0])
            e, waiting, lower, margin = e[keep], waiting[kept], lower[kept], of(self.margin, e[keep])
            # Those that are likely to be needed, and all that have no bound; else one, which may make the next needless.
            count = np.maximum(count.clip(1, self.norm.AT_ONCE), least)[keep]
            count = np.minimum(count, self._left(e))
            most = min(_common(count), max(1, 2 * self.passes.pairs // len(e)))
            by_margin = margin.sort(stable=True, dim=1).indices
            by_class = torch.arange(self.n, device=self.device).expand_as(by_margin)
            order = torch.where(lower.isnan().any(1, keepdim=True), by_class, by_margin)
            key = torch.where(waiting, lower.nan_to_num(-math.inf), math.inf).gather(1, order)
            classes = order.gather(1, key.sort(stable=True, dim=1).indices[:, :most])
            self.evaluate(e, classes, np.minimum(count, most))


def _common(counts: np.ndarray) -> int:
    """How many rows to take of every example at once where counts int64 [e] are wanted: at most a third of them in vain."""
    each = np.unique(counts)
    filled = np.minimum(counts[:, None], each).sum(0)
    return int(each[3 * filled >= 2 * len(counts) * each].max())


def certify(
    passes: Passes,
    method: Certified,
    backend: str = "auto",
    norm: float = 2.0,
    normals: Normals | None = None,
    own: Tensor | None = None,
    among: Tensor | None = None,
) -> Certificate:
    """Runs the algorithm of this module on a group of E >= 1 examples; see there for why `certified` may be believed.

    `normals` are those of the method's seed, where several groups share them.
    """
    search = _Search(passes, method, backend, norm, normals, own, among)
    search.probe(search.prepare())
    search.finish()
    best = search.best
    return Certificate(
        winners=search.nearest.winners,
        pair=search.nearest.pair,
        vjps=to_device(search.vjps, search.device),
        jvps=to_device(search.jvps, search.device),
        certified=~best.isnan() & ~search.undecided(search.everyone).any(1),
        lower_bound=torch.minimum(best, torch.where(search.seen, math.inf, search.lower).amin(1)),
    )
