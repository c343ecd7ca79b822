"""FAB (AutoAttack's, as torchattacks has it) by fastsal: the same attack, without the Jacobian in memory.

    import torchattacks                              # before
    from fastsal.integrations import torchattacks    # after

torchattacks takes the gradients of all n classes one at a time, and holds them, [n, B, D], beside their differences to the
label's, [B, n, D]. Here a run is that of `fastsal.fab`, which keeps the nearest row alone. Restarts, seeds, targets and what
else steers the runs is torchattacks' own code: the same seed gives the same images up to rounding.

Different is what torchattacks gets wrong: gradients far below 1e-8, which its projections take for zero, and `norm="L1"`, with
which its attack raises UnboundLocalError. The targeted modes take a single gradient a step; they stay torchattacks'.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastsal import methods
from fastsal.adaptive import descend, random_start
from fastsal.integrations import Logits, peer
from fastsal.methods.base import Question
from fastsal.model.linearization import linearize

with peer("torchattacks", "--no-deps torchattacks; fastsal.fab, the same attack, needs nothing"):
    import torchattacks

__all__ = ["FAB"]

NORMS = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}


class FAB(torchattacks.FAB):
    """FAB, the fast adaptive boundary attack (Croce and Hein, ICML 2020, arXiv 1907.02044).

    The arguments are those of `torchattacks.FAB`, and one more.

    Args:
        method: How the nearest boundary is found: "auto" (default) or any method of `fastsal.analyze`.

    Raises:
        ValueError: A norm that is not "Linf", "L2" or "L1", and a model that mixes the examples of a batch.

    >>> import torch
    >>> linear = torch.nn.Linear(2, 3, bias=False).requires_grad_(False)
    >>> _ = linear.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]))
    >>> x = torch.tensor([[0.3, 0.4]])
    >>> perturbed = FAB(linear, norm="L2", eps=1.0)(x, torch.tensor([2]))
    >>> linear(perturbed).argmax(1).tolist(), round((perturbed - x).norm().item(), 2)
    ([0], 0.22)
    """

    def __init__(
        self, model: Any, norm: str = "Linf", *args: Any, method: str | methods.Method = "auto", **kwargs: Any
    ):
        if norm not in NORMS:
            raise ValueError(f"norm: got {norm!r}, wants one of {list(NORMS)}")
        super().__init__(model, norm, *args, **kwargs)
        self.method = methods.resolve(method, NORMS[norm])

    def attack_single_run(self, x: Tensor, y: Tensor | None = None, use_rand_start: bool = False) -> Tensor:
        """The images [B, *S] with those replaced that one run moves out of their class, by however much."""
        images: Tensor = x.detach().clone().float().to(self.device)
        prediction = self._get_predicted_label(images)
        labels = prediction if y is None else y.detach().to(prediction)
        right = (prediction == labels).nonzero().squeeze(1)
        if not len(right):
            return images
        own, norm, box = images[right], NORMS[self.norm], (0.0, 1.0)
        start = random_start(own, self.eps, norm, box) if use_rand_start else own
        with linearize(Logits(self.get_logits, self.model), own) as begin:
            images[right], _ = descend(
                begin,
                start,
                Question(norm, target=labels[right]),
                self.method,
                steps=self.steps,
                alpha_max=self.alpha_max,
                eta=self.eta,
                beta=self.beta,
                bounds=box,
            )
        return images

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """The images [B, *S] with those replaced that the attack moves out of their class within `eps`."""
        if self.norm != "L1":
            perturbed: Tensor = super().perturb(x, y)
            return perturbed
        torch.manual_seed(self.seed)
        perturbed, standing = x.clone(), self._get_predicted_label(x) == y
        targets: list[Any] = [None]
        if self.multi_targeted:
            targets = list(range(2, self.n_target_classes + 2))
        elif self.targeted:
            targets = [self.get_target_label(x, y)]
        for target in targets:
            for restart in range(self.n_restarts):
                left = standing.nonzero().squeeze(1)
                if not len(left):
                    return perturbed
                self.target_class = target[left] if isinstance(target, Tensor) else target
                run = self.attack_single_run if target is None else self.attack_single_run_targeted
                found = run(x[left], y[left], use_rand_start=restart > 0)
                within = (found - x[left]).flatten(1).abs().sum(1) <= self.eps
                fooled = within & (self._get_predicted_label(found) != y[left])
                perturbed[left[fooled]], standing[left[fooled]] = found[fooled], False
        return perturbed
