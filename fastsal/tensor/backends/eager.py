"""The `reference` backend: fastsal.tensor.reference, its float64 results rounded and packed as a kernel's are."""

import torch
from torch import Tensor

from fastsal.tensor import reference
from fastsal.validation import output_dtype

row_distances = reference.row_distances


def unavailable() -> str:
    return ""


def why_not(jacobian: Tensor) -> str:
    return ""


def info() -> dict[str, object]:
    return {}


def margin_geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    out = output_dtype(jacobian.dtype)
    scalars, prediction, runner_up, distances = reference.margin_geometry(logits, jacobian, x, norm)
    packed = torch.stack([scalars[name] for name in reference.SCALARS])
    return packed.to(out), torch.stack((prediction, runner_up)), distances.to(out)


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = output_dtype(jacobian.dtype)
    distance, margin, nearest_margin, nearest, projection = reference.pairwise_margins(logits, jacobian, x, norm)
    projection = distance.new_empty(0) if projection is None else projection
    return distance.to(out), margin.to(out), nearest_margin.to(out), nearest, projection.to(out)


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    grad_jacobian, grad_x = reference.pairwise_backward(w, v, jacobian, x, norm)
    empty = jacobian.new_empty(0)
    return grad_jacobian.to(jacobian.dtype), empty if grad_x is None or x is None else grad_x.to(x.dtype)
