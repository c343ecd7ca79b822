"""Given Jacobians that certificates are tested on, and the search that runs on them."""

import torch

from bench.baselines.jacobians import Matrices
from fastsal import Certified
from fastsal.methods.base import Question
from fastsal.methods.certified.probes import Normals
from fastsal.methods.certified.search import Search


def problem(E, n, D, seed=0, decay=0.5, common=3.0, dtype=torch.float64):
    """Jacobians with a common part and singular values that decay; margins that are bunched."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, D + 1, dtype=torch.float64) ** -decay
    rows = torch.randn(E, n, D, generator=generator, dtype=torch.float64) * spectrum
    rows += common * torch.randn(E, 1, D, generator=generator, dtype=torch.float64) * spectrum
    logits = torch.randn(E, n, generator=generator, dtype=torch.float64)
    logits[torch.arange(E), torch.randint(n, (E,), generator=generator)] += 8.0
    return logits.to(dtype), rows.to(dtype)


def search(passes, method=None, norm=2.0, backend="reference"):
    """The search that `certify` runs, before its first step."""
    method = method or Certified()
    normals = Normals(method.seed, passes.dimension, passes.logits.device)
    question = Question(norm, backend=backend)
    return Search(passes, question, method.failure_probability, method.max_passes, normals)


class Recorded(Matrices):
    """Keeps the directions of every JVP."""

    def __post_init__(self):
        super().__post_init__()
        self.calls = []

    def jvp(self, examples, directions):
        self.calls.append(directions)
        return super().jvp(examples, directions)

    def directions(self):
        return torch.cat([directions[0] for directions in self.calls])
