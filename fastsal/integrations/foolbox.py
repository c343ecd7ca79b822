"""foolbox's DeepFool attacks by fastsal: the same arguments and the same walk, the candidates' gradients from one pass.

    from foolbox.attacks import L2DeepFoolAttack                # before
    from fastsal.integrations.foolbox import L2DeepFoolAttack   # after

At every step foolbox runs the model forwards and backwards for every candidate class, with all examples. Here it runs forwards
once, its gradients are taken many at a time, and an example that is through costs nothing any more.

The perturbations are foolbox's up to rounding, but where foolbox errs. It adds 1e-8 to the norms that it divides by: with
gradients of about that size or less it takes the wrong class, and steps that are too short. And where the two highest logits
tie, it walks away from the class with the higher index, which is not the predicted one.
"""

import math
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastsal import methods
from fastsal.adversarial import walk
from fastsal.integrations import Logits, peer
from fastsal.model.linearization import linearize

with peer("foolbox", "foolbox"):
    import foolbox
    from eagerpy.astensor import astensor, astensor_
    from foolbox.attacks import deepfool
    from foolbox.attacks.base import get_criterion, raise_if_kwargs, verify_input_bounds
    from foolbox.models.base import Model

__all__ = ["L2DeepFoolAttack", "LinfDeepFoolAttack"]

T = TypeVar("T")
LOSSES = ("logits", "crossentropy")  # of which the differences are the same
STABILITY = 1e-4  # foolbox's: how much farther than the linearised boundary a step goes


def _is_targeted(criterion: object) -> bool:
    """Whether the criterion, or a part of one that was joined by `&`, asks for a certain class."""
    parts = [value for name, value in vars(criterion).items() if name in ("a", "b")]
    return isinstance(criterion, foolbox.criteria.TargetedMisclassification) or any(
        _is_targeted(part) for part in parts
    )


def _logits_and_network(model: Model, x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """The logits of a foolbox model, and the network in it, which is the first module that a forward pass calls."""
    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, inputs: called.append(module))
    try:
        with torch.no_grad():
            return model(x), next(iter(called), None)
    finally:
        handle.remove()


class _DeepFool(deepfool.DeepFoolAttack):
    """What the two norms share: the arguments of foolbox's attack and `method`, and the walk."""

    norm: float  # the p of the perturbation

    def __init__(
        self,
        *,
        steps: int = 50,
        candidates: int | None = 10,
        overshoot: float = 0.02,
        loss: Literal["logits", "crossentropy"] = "logits",
        method: str | methods.Method = "candidates",
    ) -> None:
        super().__init__(steps=steps, candidates=candidates, overshoot=overshoot, loss=loss)
        methods.resolve(method, self.norm)
        self.method = method

    def run(self, model: Model, inputs: T, criterion: Any, *, early_stop: float | None = None, **kwargs: Any) -> T:
        """Perturbs the inputs until the criterion holds; called by foolbox, with the arguments of foolbox's attacks."""
        raise_if_kwargs(kwargs)
        tensor, restore_type = astensor_(inputs)
        x = tensor.raw
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs: got {type(x).__name__}, wants PyTorch tensors; foolbox.attacks takes others")
        verify_input_bounds(tensor, model)
        criterion = get_criterion(criterion)
        if _is_targeted(criterion):
            raise ValueError(
                "unsupported criterion: got a targeted one, and DeepFool walks to whichever class is nearest"
            )
        if self.loss not in LOSSES:
            raise ValueError(f"expected loss to be 'logits' or 'crossentropy', got '{self.loss}'")
        logits, network = _logits_and_network(model, x)
        method, classes = methods.resolve(self.method, self.norm), None
        if self.method == "candidates":
            count = logits.shape[1] if self.candidates is None else min(self.candidates, logits.shape[1])
            if count < 2:
                raise ValueError(f"candidates: got {self.candidates} and {logits.shape[1]} classes, wants 2 at least")
            method = methods.Auto() if self.candidates is None else methods.Candidates(count - 1)
            highest = logits.sort(stable=True, dim=1, descending=True).indices[:, :count]
            classes = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, highest, True)

        def finished(points: Tensor, scores: Tensor) -> Tensor:
            adversarial: Tensor = criterion(astensor(points), astensor(scores)).raw
            return adversarial

        with linearize(Logits(model, network), x.detach()) as begin:
            found, _ = walk(
                begin,
                logits.argmax(1),
                self.norm,
                method,
                finished=finished,
                length=lambda distance, point: distance + STABILITY,
                max_steps=self.steps,
                overshoot=self.overshoot,
                bounds=model.bounds,
                classes=classes,
            )
        result: T = restore_type(astensor(found))
        return result


class L2DeepFoolAttack(_DeepFool, deepfool.L2DeepFoolAttack):
    """DeepFool for the Euclidean norm: the walk to the nearest linearised boundary, until the criterion holds.

    The arguments are those of `foolbox.attacks.L2DeepFoolAttack`, and `method`.

    Args:
        steps: The most steps to take.
        candidates: How many of the input's highest logits a step considers, the predicted class among them; None for all.
        overshoot: How much farther than the linearised boundary to go.
        loss: "logits" or "crossentropy", which come to the same here.
        method: "candidates" (default) for those above, or any method of `fastsal.analyze`; "auto" for all classes, which
            `candidates=None` means too.

    Raises:
        ValueError: A targeted criterion, a model in training mode or one that mixes the examples of a batch, and whatever
            foolbox raises.

    >>> import foolbox, torch
    >>> linear = torch.nn.Linear(2, 3, bias=False).requires_grad_(False)
    >>> _ = linear.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]))
    >>> model, x = foolbox.PyTorchModel(linear, bounds=(0, 9)), torch.tensor([[3.0, 4.0]])
    >>> attack = L2DeepFoolAttack()
    >>> perturbed, _, success = attack(model, x, torch.tensor([2]), epsilons=None)
    >>> success.tolist(), round((perturbed - x).norm().item(), 3)
    ([True], 2.281)
    """

    norm = 2.0


class LinfDeepFoolAttack(_DeepFool, deepfool.LinfDeepFoolAttack):
    """DeepFool for the largest change of an entry: the walk to the nearest linearised boundary, until the criterion holds.

    The arguments are those of `foolbox.attacks.LinfDeepFoolAttack`, and `method`. All else is as in `L2DeepFoolAttack`; the
    example there prints ([True], 1.7) here.
    """

    norm = math.inf
