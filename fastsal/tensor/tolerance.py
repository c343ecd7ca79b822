"""How far results are from the float64 reference, in units of each quantity's own scale.

The scale is the value itself for norms, distances and ρ̃, and the sum of the absolute terms where terms may cancel. Of this
scale fastsal allows itself an error of 1e-6, and of 1e-13 for float64 inputs. The test suite, `fastsal check` and `fastsal
demo` all measure errors this way.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastsal.tensor import reference

SAME_RATIO = 2e-6  # two classes whose ratios differ by less than this, relatively, may stand for each other


def tolerance(dtype: torch.dtype) -> float:
    """The largest scaled error allowed for inputs of this dtype."""
    return 1e-13 if dtype == torch.float64 else 1e-6


def worst(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """The largest |got − want| / scale, for want in float64. It is inf unless infinities and NaN stand in the same places."""
    if got.numel() == 0:
        return 0.0
    finfo = torch.finfo(got.dtype)
    rounded = want.to(got.dtype)
    same = (got.isnan() & want.isnan()) | ((got == rounded) & rounded.isinf())
    error = (got.double() - want).abs()
    subnormal = error <= 4 * finfo.smallest_normal * finfo.eps  # where a float has no digits left to be relative to
    relative = torch.where(subnormal, 0.0, error / scale)
    relative = torch.where(same, 0.0, torch.where(scale.isfinite() | subnormal, relative, math.inf))
    return float(relative.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _chosen(got: Tensor, want: Tensor, ratio: Tensor) -> tuple[float, Tensor]:
    """Judges the index `got` of the smallest entry along the last dimension of `ratio`, where `want` is the right one.

    Returns:
        The error, 0 or inf, and the index at which to compare values: `got` where it may stand for `want`, else `want`.
    """
    inside = got.clamp(0, ratio.shape[-1] - 1)
    here, least = (ratio.gather(-1, index.unsqueeze(-1)).squeeze(-1) for index in (inside, want))
    close = (inside == got) & ((here - least).abs() <= SAME_RATIO * least.abs())
    allowed = (got == want) | close
    return 0.0 if bool(allowed.all()) else math.inf, torch.where(allowed, inside, want)


def _absolute(score: Tensor, v: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """The scales of α and β: Σ|x_k v_k| / ‖v‖_q and |score| + Σ|x_k v_k|, by the reference itself on absolute values."""
    zero = torch.zeros_like(score)
    rows = torch.stack((v.abs(), torch.zeros_like(v)), 1)
    scalars = reference.two_row_scalars(torch.stack((-score.abs(), zero), 1), rows, x.abs(), norm)
    return scalars["alignment"], scalars["offset"].abs()


def _scales(values: dict[str, Tensor], logits: Tensor, rows: Tensor, x: Tensor, norm: float) -> dict[str, Tensor]:
    """The scale of every scalar, from values [B], logits [B, 2], rows [B, 2, D] and x [B, D], all float64."""
    scales = {name: values[name].abs() for name in ("linearized_robustness", "binarized_logit")}
    for prefix, score, v in (
        ("", logits[:, 0], rows[:, 0]),
        ("binarized_", logits[:, 0] - logits[:, 1], rows[:, 0] - rows[:, 1]),
    ):
        alignment, offset = _absolute(score, v, x, norm)
        size = (x * v).sum(-1).abs() + values[f"{prefix}offset"].abs()
        scales |= {f"{prefix}alignment": alignment, f"{prefix}offset": offset, f"{prefix}homogeneity": offset / size}
    scales["cosine"] = scales["alignment"] / reference.vector_norm(x, norm)
    scales["direction_gap"] = torch.ones_like(logits[:, 0])
    # The three terms of the bound: α, ‖x‖_p · gap, and (|Ψ†| + Σ|x_k g†_k|) / ‖g†‖_q.
    scales["bound"] = (
        scales["alignment"]
        + reference.vector_norm(x, norm)
        + scales["linearized_robustness"]
        + scales["binarized_alignment"]
    )
    return scales


def scaled_errors(result: Any, logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> dict[str, float]:
    """The worst scaled error of every quantity of a `Geometry`.

    A wrong `prediction` or `runner_up` counts as inf. A runner-up may differ from the reference's where their ratios differ by
    less than 2e-6; the scalars are then compared at the runner-up that was found. `distances` are left out where they are None.

    Args:
        result: The `Geometry`.
        logits: What it was computed from, [B, n].
        jacobian: Likewise, [B, n, *S].
        x: Likewise, [B, *S].
        norm: Likewise, the p of the perturbation.

    Returns:
        The error of each quantity, by its name.
    """
    logits, jacobian, x = logits.detach(), jacobian.detach().flatten(2), x.detach().flatten(1)
    _, prediction, runner_up, distances = reference.margin_geometry(logits, jacobian, x, norm)
    errors = {"prediction": 0.0 if bool((result.prediction == prediction).all()) else math.inf}
    errors["runner_up"], runner_up = _chosen(result.runner_up, runner_up, distances)

    winners = torch.stack((prediction, runner_up), 1)
    rows = reference.rows_of(jacobian, winners).double()
    scores = logits.gather(1, winners).double()
    values = reference.two_row_scalars(scores, rows, x, norm)
    scales = _scales(values, scores, rows, x.double(), norm)
    for name in reference.SCALARS:
        errors[name] = worst(getattr(result, name).detach(), values[name], scales[name])
    if result.distances is not None:
        errors["distances"] = worst(result.distances, distances, distances.abs())
    return errors


def pairwise_errors(result: Any, logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float) -> dict[str, float]:
    """The worst scaled error of every quantity of a `PairwiseMargins`, as `scaled_errors` measures it."""
    logits, jacobian = logits.detach(), jacobian.detach().flatten(2)
    x = None if x is None else x.detach().flatten(1)
    distance, margin, _, nearest, projection = reference.pairwise_margins(logits, jacobian, x, norm)
    errors = {
        "distance": worst(result.distance.detach(), distance, distance),
        "margin": worst(result.margin.detach(), margin, margin.abs()),
    }
    errors["nearest"], nearest = _chosen(result.nearest, nearest, margin)
    nearest_margin = margin.gather(2, nearest.unsqueeze(2)).squeeze(2)
    errors["nearest_margin"] = worst(result.nearest_margin.detach(), nearest_margin, nearest_margin.abs())
    if x is not None and projection is not None:
        rows, size = jacobian.double(), x.double().abs().unsqueeze(1)
        scale = torch.stack([(size * (row.unsqueeze(1) - rows).abs()).sum(-1) for row in rows.unbind(1)], 1) / distance
        errors["alignment"] = worst(result.alignment.detach(), projection.abs(), scale)
    return errors
