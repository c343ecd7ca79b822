"""Everything that the study knows about one trained network: a column of numbers for each quantity, a row an image."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.adversarial import distances
from fastsal.analysis import analyze
from fastsal.model.calling import Model, call
from fastsal.study.attacks import ATTACKS, robustness, robustness_in_box
from fastsal.study.data import Split
from fastsal.tensor.geometry import Geometry

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
PROVENANCE = ("certified", "lower_bound", "vjps", "jvps")  # of no interest here: every analysis is exact
BATCH = 64
# Depend on where the origin of x is, and are therefore measured twice: with black at 0, and with the mean image at 0.
ORIGIN = (
    *("alignment", "binarized_alignment", "homogeneity", "binarized_homogeneity", "degree", "binarized_degree"),
    *("bound", "gap_term", "offset_term"),
)


def bias_sums(model: nn.Module, x: Tensor) -> Tensor | None:
    """Σ ⟨b, ∂_b Ψʲ⟩ over all biases b, for every image and logit: float64 [B, n]; None where Euler's theorem says nothing.

    For piecewise linear layers it equals Ψʲ − ⟨x, ∇Ψʲ⟩, but is computed without it: as the derivative of the logits as all
    biases grow in proportion.
    """
    if not all(isinstance(module, HOMOGENEOUS) for module in model.modules() if not list(module.children())):
        return None
    model = copy.deepcopy(model).double()
    biases = {name: value for name, value in model.named_parameters() if name.endswith("bias")}
    if not biases:
        return torch.zeros_like(call(model, x.double()))
    weights = {name: value for name, value in model.named_parameters() if name not in biases}

    def logits(changed: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, {**weights, **changed}, (x.double(),))
        return result

    with torch.no_grad():
        sums: Tensor = torch.func.jvp(logits, (biases,), (biases,))[1]
    return sums


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
    seed: int,
    after_attack: Callable[[], None] = lambda: None,
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Columns with a row for every image, and the saliency maps of the images at `shown`.

    The columns are the scalars of `Geometry`, degrees of homogeneity, terms of the bound, what of these changes with the
    origin once more for x − `centre`, deviations from the bias sums, and ρ by every attack.
    """
    parts = [_columns(model, part, centre) for part in x.split(BATCH)]
    maps = analyze(model, x[shown], keep_saliency=True).saliency
    assert maps is not None
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    each = robustness(model, x, seed=seed, after_attack=after_attack)
    columns["rho"] = each.amin(1)
    columns["rho in the box"] = robustness_in_box(model, x)
    columns |= {f"rho {name}": each[:, slot] for slot, name in enumerate(ATTACKS)}
    arrays = {"image": np.arange(len(x)), "class": y.numpy()}
    arrays |= {name: column.detach().cpu().numpy() for name, column in columns.items()}
    arrays["attack"] = np.array(ATTACKS)[each.argmin(1).cpu().numpy()]
    return arrays, maps.cpu().numpy()


def _columns(model: nn.Module, x: Tensor, centre: Tensor) -> dict[str, Tensor]:
    geometry = analyze(model, x, keep_saliency=True)
    columns = quantities(model, x, geometry) | centred_quantities(model, x, centre)
    sums = bias_sums(model, x)
    if sums is not None:
        columns |= _bias_sum_errors(x, geometry, sums)
        # At a kink float32 may take another branch than the sums, which are in float64: then the identity shows here alone.
        exact = analyze(copy.deepcopy(model).double(), x.double(), keep_saliency=True)
        columns |= {f"float64 {name}": error for name, error in _bias_sum_errors(x, exact, sums).items()}
    return columns


def quantities(model: Model, x: Tensor, geometry: Geometry) -> dict[str, Tensor]:
    """The scalars of `Geometry`, degrees of homogeneity, terms of the bound."""
    fields = {field.name: getattr(geometry, field.name) for field in dataclasses.fields(geometry)}
    columns = {
        name: value
        for name, value in fields.items()
        if isinstance(value, Tensor) and value.dim() == 1 and name not in PROVENANCE
    }
    with torch.no_grad():
        logits = call(model, x).double()
    score = logits.gather(1, geometry.prediction.unsqueeze(1)).squeeze(1)
    binarized = geometry.binarized_logit.double()
    offset, binarized_offset = geometry.offset.double(), geometry.binarized_offset.double()
    # ⟨x, g⟩ = Ψ − β, so that the degree of homogeneity ⟨x, g⟩ / Ψ is 1 without an offset.
    columns["degree"] = (score - offset) / score
    columns["binarized_degree"] = (binarized - binarized_offset) / binarized
    assert geometry.binarized_saliency is not None
    zero = torch.zeros_like(x)
    columns["gap_term"] = distances(x, zero, 2) * geometry.direction_gap.double()
    columns["offset_term"] = binarized_offset.abs() / distances(geometry.binarized_saliency, zero, 2)
    return columns


def centred_quantities(model: Model, x: Tensor, centre: Tensor) -> dict[str, Tensor]:
    """What changes with the origin, with `centre` at 0."""

    def centred(z: Tensor) -> Tensor:
        return call(model, z + centre)

    z = x - centre
    found = quantities(centred, z, analyze(centred, z, keep_saliency=True))
    return {f"centred {name}": found[name] for name in ORIGIN}


def _bias_sum_errors(x: Tensor, geometry: Geometry, sums: Tensor) -> dict[str, Tensor]:
    """How far β and β† are from the sums over the biases [B, n], as shares of |Ψ| + Σ|xₖgₖ|."""
    assert geometry.saliency is not None
    assert geometry.binarized_saliency is not None
    own, other = (sums.gather(1, row.unsqueeze(1)).squeeze(1) for row in (geometry.prediction, geometry.runner_up))
    errors = {}
    for name, offset, g, want in (
        ("bias_sum_error", geometry.offset, geometry.saliency, own),
        ("binarized_bias_sum_error", geometry.binarized_offset, geometry.binarized_saliency, own - other),
    ):
        products = (x.double() * g.double()).flatten(1)
        scale = (products.sum(1) + offset.double()).abs() + products.abs().sum(1)
        errors[name] = (offset.double() - want).abs() / scale
    return errors
