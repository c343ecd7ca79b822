"""One linearised step of each peer, as its users call it: the distance it moves every example [B].

All of them return perturbed images and none returns ρ̃: the distance is how far the step moved the image, before overshooting.
A peer is imported when it is first used, and skipped with a reason where it is not installed.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

STABILISER = 1e-4  # what foolbox and adv-lib add to the distance of the class they chose
FAB_OVERSHOOT = 1.05


@dataclass(frozen=True)
class Peer:
    """One step of a peer, in the 2-norm unless another is asked for.

    `classes` is how many of the highest logits besides the predicted one it looks at; None: all.
    """

    module: str
    install: str
    step: Callable[..., Tensor]
    classes: int | None = None

    def missing(self) -> str:
        """Why it is not here; empty if it is."""
        return "" if importlib.util.find_spec(self.module) else f"not installed (pip install {self.install})"


def _moved(images: Tensor, x: Tensor, norm: float = 2.0) -> Tensor:
    return (images - x).flatten(1).double().norm(dim=1, p=norm)


def _labels(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


class _LastInput(nn.Module):
    """The model, with a memory of its last input: FAB tries every step on the model, but returns it only where it fooled it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach().clone()
        return self.model(x)


def foolbox_deepfool(model: nn.Module, x: Tensor, candidates: int | None, norm: float = 2.0) -> Tensor:
    foolbox = importlib.import_module("foolbox")
    wrapped = foolbox.PyTorchModel(model, bounds=(-1e6, 1e6))
    kind = foolbox.attacks.L2DeepFoolAttack if norm == 2 else foolbox.attacks.LinfDeepFoolAttack
    attack = kind(steps=1, candidates=candidates, overshoot=0.0)
    images = attack.run(wrapped, x, foolbox.criteria.Misclassification(_labels(model, x)))
    return (_moved(images, x, norm) - STABILISER).clamp_min(0)


def torchattacks_deepfool(model: nn.Module, x: Tensor) -> Tensor:
    attack = importlib.import_module("torchattacks").DeepFool(model, steps=1, overshoot=0.0)
    return _moved(attack(x, _labels(model, x)), x)


def torchattacks_fab(model: nn.Module, x: Tensor) -> Tensor:
    recorded = _LastInput(model)
    attack = importlib.import_module("torchattacks").FAB(recorded, norm="L2", steps=1, eta=FAB_OVERSHOOT)
    attack.attack_single_run(x, _labels(model, x))
    return _moved(recorded.last, x) / FAB_OVERSHOOT


def art_deepfool(model: nn.Module, x: Tensor, gradients: int) -> Tensor:
    # With fewer gradients than classes ART 1.20 mistakes the place of the predicted class among the chosen ones for its number,
    # and subtracts another class's logit. The suite reports that as wrong.
    estimators = importlib.import_module("art.estimators.classification")
    attacks = importlib.import_module("art.attacks.evasion")
    logging.getLogger("art").setLevel(logging.ERROR)  # it warns at every call that it will not clip
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    wrapped = estimators.PyTorchClassifier(model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), classes, device_type="cpu")
    attack = attacks.DeepFool(wrapped, max_iter=1, epsilon=0.0, nb_grads=gradients, batch_size=len(x), verbose=False)
    return _moved(torch.from_numpy(attack.generate(x.numpy())), x)


@contextmanager
def adv_lib() -> Iterator[Any]:
    """adv-lib, which on import asks for a plotting server and for torchvision's models, neither of which is used here."""
    with mock.patch.dict(sys.modules):
        for name in ("visdom", "torchvision", "torchvision.models"):
            sys.modules.setdefault(name, ModuleType(name))
        sys.modules["torchvision"].models = sys.modules["torchvision.models"]  # type: ignore[attr-defined]
        yield importlib.import_module("adv_lib.attacks")


def adv_lib_deepfool(model: nn.Module, x: Tensor) -> Tensor:
    with adv_lib() as attacks:
        images = attacks.df(model, x, _labels(model, x), steps=1, overshoot=0.0, return_unsuccessful=True)
    return (_moved(images, x) - STABILISER).clamp_min(0)


def adv_lib_fab(model: nn.Module, x: Tensor, norm: float = 2.0) -> Tensor:
    recorded = _LastInput(model)
    with adv_lib() as attacks:
        attacks.fab(recorded, x, _labels(model, x), norm=norm, n_iter=1, η=FAB_OVERSHOOT)
    return _moved(recorded.last, x, norm) / FAB_OVERSHOOT


TEN, EVERY = 10, 10**6
ATTACKS = "--no-deps torchattacks"  # it wants a version of requests from 2020
ADV_LIB = "--no-deps adv-lib"  # one of its dependencies does not build with current setuptools
PEERS: dict[str, Peer] = {
    "foolbox DeepFool, 10 candidates": Peer("foolbox", "foolbox", partial(foolbox_deepfool, candidates=TEN), TEN - 1),
    "foolbox DeepFool, all": Peer("foolbox", "foolbox", partial(foolbox_deepfool, candidates=None)),
    "torchattacks DeepFool": Peer("torchattacks", ATTACKS, torchattacks_deepfool),
    "torchattacks FAB": Peer("torchattacks", ATTACKS, torchattacks_fab),
    "ART DeepFool, 10 gradients": Peer(
        "art", "adversarial-robustness-toolbox", lambda m, x: art_deepfool(m, x, TEN), TEN - 1
    ),
    "ART DeepFool, all": Peer("art", "adversarial-robustness-toolbox", lambda m, x: art_deepfool(m, x, EVERY)),
    "adv-lib DeepFool": Peer("adv_lib", ADV_LIB, adv_lib_deepfool),
    "adv-lib FAB": Peer("adv_lib", ADV_LIB, adv_lib_fab),
}
