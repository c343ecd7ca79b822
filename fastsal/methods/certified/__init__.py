"""Certified ρ̃: the exact minimum, with a stated failure probability, in a fraction of n backward passes.

One JVP along a standard normal v gives ⟨v, Δ_j⟩ of every class j. Sums of their squares bound every ‖Δ_j‖ from above, hence
every ratio m_j / ‖Δ_j‖ from below, with a known probability; classes are evaluated exactly, by VJPs, in ascending order of the
bounds until the next is no less than the best ratio found, which then is ρ̃. docs/certified.md has the theorem and its proof.

The modules, from the ground up: `state` (products and rows that are counted, what is undecided), `basis`, `probes`, `rounding`,
`plan`, and `search`, the order of the steps; `chi_square` and `norms` are the mathematics.
"""

import secrets
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import to_device, to_host
from fastsal.methods.base import Method, Question, Selection
from fastsal.methods.certified.norms import NORM_BOUNDS
from fastsal.methods.certified.probes import Normals
from fastsal.methods.certified.search import Search
from fastsal.model.linearization import Linearization
from fastsal.model.products import ModelPasses, NoJVPError, Passes

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
            shares nothing with torch's or NumPy's own, whatever those were seeded with. A seed that is known beforehand is
            public: a model can be made for which its probes fail. Where models may be hostile, None draws one from the system.

    Raises:
        ValueError: An option is out of its range.

    Examples:
        >>> import torch, fastsal
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Tanh(), torch.nn.Linear(50, 200))
        >>> x = torch.randn(2, 30)
        >>> certified = fastsal.analyze(model, x, method=fastsal.Certified(failure_probability=1e-9))
        >>> certified.certified.tolist(), bool((certified.vjps + certified.jvps < 200).all())
        ([True, True], True)
        >>> torch.equal(certified.runner_up, fastsal.analyze(model, x, method="exact").runner_up)
        True
    """

    name: ClassVar = "certified"
    norms: ClassVar = frozenset(NORM_BOUNDS)

    failure_probability: float = 1e-6
    max_passes: int | None = None
    seed: int | None = 0

    def __post_init__(self) -> None:
        if not isinstance(self.failure_probability, float) or not 0 < self.failure_probability < 1:
            raise ValueError(
                f"Certified: got failure_probability={self.failure_probability!r}, wants a float in (0, 1)"
            )
        if self.max_passes is not None and (not isinstance(self.max_passes, int) or self.max_passes < 2):
            raise ValueError(f"Certified: got max_passes={self.max_passes!r}, wants None or an integer >= 2")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"Certified: got seed={self.seed!r}, wants an integer or None")

    def select(self, graph: Linearization, question: Question) -> Selection:
        """Certifies the batch in groups, to bound latency and memory: no example waits for many others.

        A group's bases, seldom over 20 float64 directions an example, are to fit a cache, or a part of a device's memory. It
        has two examples at least: passes through one alone take longer, 3 to 10 % of all on EfficientNet-Lite0.
        """
        device = graph.x.device
        held = GROUP_BYTES if device.type == "cpu" else GROUP_BYTES_ACCELERATOR
        size = max(2, held // (8 * 20 * graph.x.shape[1]))
        seed = secrets.randbits(128) if self.seed is None else self.seed
        normals = Normals(seed, graph.x.shape[1], device)
        parts, recorded = [], []
        for start in range(0, len(graph.leaf), size):
            stop = min(start + size, len(graph.leaf))
            passes = ModelPasses(graph, np.arange(start, stop), question.chunk_size)
            parts.append(certify(passes, self, question.at(slice(start, stop)), normals))
            recorded.append(passes.logits)
            question.report(stop / len(graph.leaf))
        logits = torch.cat(recorded)

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        (apart,) = to_host(joined("disagreement"))
        if (apart > 0).any():
            passes.distrust()
            warnings.warn(
                f"model: {(apart > 0).sum()} of {len(apart)} examples have gradients that differ by up to {apart.max():.1e} of "
                "themselves between a backward and a forward-mode pass (a custom function or hook, a part without gradients, a "
                "kink such as nn.PReLU's at 0, or precision); they are finished with exact rows",
                stacklevel=2,
            )
        provenance: dict[str, Any] = {name: joined(name) for name in ("vjps", "jvps", "certified")}
        provenance |= {"method": self.name, "distances": None, "failure_probability": self.failure_probability}
        provenance["lower_bound"] = rounded_down(joined("lower_bound"), logits.dtype)
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
    disagreement: Tensor  # of backward and forward-mode passes, where it is too large


def rounded_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 values in another dtype, none of them above what it was."""
    nearest = values.to(dtype)
    return torch.where(
        nearest.double() > values, torch.nextafter(nearest, torch.full_like(nearest, -torch.inf)), nearest
    )


def certify(passes: Passes, method: Certified, question: Question, normals: Normals | None = None) -> Certificate:
    """Certifies a group of E >= 1 examples.

    Args:
        passes: The model at the examples.
        method: The options.
        question: What is asked of them.
        normals: The probes of the method's seed, where several groups share them.
    """
    normals = normals or Normals(method.seed or 0, passes.dimension, passes.logits.device)
    search = Search(passes, question, method.failure_probability, method.max_passes, normals)
    try:
        search.probe(search.prepare())
    except NoJVPError as error:
        warnings.warn(f"{error}; taking exact rows", stacklevel=2)
    search.finish()
    state = search.state
    return Certificate(
        winners=state.nearest.winners,
        pair=state.nearest.pair,
        vjps=to_device(state.vjps, state.device),
        jvps=to_device(state.jvps, state.device),
        certified=~state.best.isnan() & ~state.undecided(state.examples).any(1),
        lower_bound=torch.minimum(state.best, torch.where(state.seen, torch.inf, state.lower).amin(1)),
        disagreement=search.rounding.disagreement,
    )
