"""Everything that the study knows about one trained network: a column of numbers for each quantity, a row an image."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.adversarial import boundary_normal, distances
from fastsal.analysis import analyze
from fastsal.biases import bias_contributions
from fastsal.model.calling import call
from fastsal.study.attacks import BOX, CHEAP, DEAR, nearest_found
from fastsal.study.data import Split
from fastsal.tensor.geometry import Geometry, of_pair

HOMOGENEOUS = (
    nn.Conv2d,
    nn.Linear,
    nn.ReLU,
    nn.LeakyReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.Flatten,
    nn.Dropout,
    nn.Identity,
)
BATCH = 100
FEW = 200  # images that the dear attacks try, in whole batches
SCALARS = (
    *("prediction", "runner_up", "linearized_robustness", "alignment", "binarized_alignment", "cosine"),
    *("homogeneity", "binarized_homogeneity", "degree", "binarized_degree", "bound", "gap_term", "offset_term"),
)
# Of these, what depends on where the origin of x is, and is measured twice: with black at 0, and with the mean image at 0.
ORIGIN = ("alignment", "binarized_alignment", "cosine", "homogeneity", "binarized_homogeneity", "bound", "offset_term")


def accuracy(model: nn.Module, split: Split, device: str) -> float:
    """The share of a split that is classified correctly."""
    correct = 0
    with torch.no_grad():
        for indices in torch.arange(len(split)).split(256):
            x, y = split.batch(indices)
            correct += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    return correct / len(split)


def mean_image(split: Split) -> Tensor:
    """The mean [1, C, H, W] of a split's images."""
    total = sum(
        split.batch(indices)[0].double().sum(0, keepdim=True) for indices in torch.arange(len(split)).split(256)
    )
    return (torch.as_tensor(total) / len(split)).float()


def measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    shown: Tensor,
    centre: Tensor,
    *,
    bounds: tuple[float, float] = BOX,
    few: int = FEW,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Columns with a row for every image, and the saliency maps of the images at `shown`.

    The columns are `SCALARS`, in float64; those of `ORIGIN` once more for x − `centre`; the cosine of g† and the normal of the
    boundary where DeepFool meets it; how far β and β† are from the sums over the biases; the distance that every attack finds
    within `bounds`, NaN where it was not tried, as the dear attacks are on `few`; and ρ, the smallest of those that every image
    has been tried with.
    """
    parts = []
    for start in range(0, len(x), BATCH):
        parts.append(_columns(model, x[start : start + BATCH], centre, bounds, dear=start < few))
        after_batch()
    maps = analyze(model, x[shown], keep_saliency=True).saliency
    assert maps is not None
    columns = {"image": np.arange(len(x)), "class": y.numpy()}
    columns |= {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    columns["attack"] = np.array(CHEAP)[np.argmin([columns[f"rho {name}"] for name in CHEAP], 0)]
    return columns, maps.cpu().numpy()


def _columns(
    model: nn.Module, x: Tensor, centre: Tensor, bounds: tuple[float, float], *, dear: bool
) -> dict[str, Tensor]:
    exact, z = copy.deepcopy(model).double(), x.double()
    geometry = analyze(exact, z, keep_saliency=True)
    with torch.no_grad():
        logits = call(exact, z).double()
    scores = logits.gather(1, torch.stack((geometry.prediction, geometry.runner_up), 1))
    columns = quantities(scores, z, geometry)
    found = quantities(scores, z - centre.double(), geometry)
    columns |= {f"centred {name}": found[name] for name in ORIGIN}
    if all(isinstance(module, HOMOGENEOUS) for module in model.modules() if not list(module.children())):
        columns |= _bias_errors(z, geometry, sum(bias_contributions(exact, z).values(), torch.zeros_like(logits)))
    for name in CHEAP + DEAR:
        if name in CHEAP or dear:
            point, columns[f"rho {name}"] = nearest_found(model, x, name, bounds=bounds)
        else:
            columns[f"rho {name}"] = torch.full_like(columns["alignment"], math.nan)
        if name == "DeepFool":
            normal = boundary_normal(exact, point.double(), geometry.prediction)
            assert geometry.binarized_saliency is not None
            columns["boundary cosine"] = torch.cosine_similarity(
                normal.flatten(1), geometry.binarized_saliency.flatten(1), eps=0
            )
    columns["rho"] = torch.stack([columns[f"rho {name}"] for name in CHEAP]).amin(0)
    return columns


def quantities(scores: Tensor, x: Tensor, geometry: Geometry) -> dict[str, Tensor]:
    """`SCALARS`, float64 [B], of x [B, *S] wherever its origin is, from Ψ^{i*} and Ψ^{j*} [B, 2] and the two saliency maps."""
    assert geometry.saliency is not None
    assert geometry.binarized_saliency is not None
    g, g_dagger, zero = geometry.saliency, geometry.binarized_saliency, torch.zeros_like(x)
    pair = torch.stack((g, g - g_dagger), 1).flatten(2)
    here = of_pair(scores, pair, x.flatten(1), 2)
    columns = {name: getattr(here, name) for name in SCALARS if hasattr(here, name)}
    columns |= {"prediction": geometry.prediction, "runner_up": geometry.runner_up}
    # ⟨x, g⟩ = Ψ − β, so that the degree of homogeneity ⟨x, g⟩ / Ψ is 1 without an offset.
    columns["degree"] = 1 - here.offset / scores[:, 0]
    columns["binarized_degree"] = 1 - here.binarized_offset / here.binarized_logit
    columns["gap_term"] = distances(x, zero, 2) * here.direction_gap
    columns["offset_term"] = here.binarized_offset.abs() / distances(g_dagger, zero, 2)
    return columns


def _bias_errors(x: Tensor, geometry: Geometry, sums: Tensor) -> dict[str, Tensor]:
    """How far β and β† are from the sums over the biases [B, n], as shares of |Ψ| + Σ|xₖgₖ|."""
    assert geometry.saliency is not None
    assert geometry.binarized_saliency is not None
    own, other = (sums.gather(1, row.unsqueeze(1)).squeeze(1) for row in (geometry.prediction, geometry.runner_up))
    errors = {}
    for name, offset, g, want in (
        ("bias_error", geometry.offset, geometry.saliency, own),
        ("binarized_bias_error", geometry.binarized_offset, geometry.binarized_saliency, own - other),
    ):
        products = (x * g).flatten(1)
        scale = (products.sum(1) + offset).abs() + products.abs().sum(1)
        errors[name] = (offset - want).abs() / scale
    return errors
