"""What one would write instead of calling fastsal: float32, norm 2, without care for ties or for very large and small numbers.

Every function takes logits [B, n], jacobian [B, n, D] and x [B, D] and returns the fields of `fastsal.Geometry` it computes.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Formula = Callable[[Tensor, Tensor, Tensor], Outputs]
CDIST_MODES = {"direct": "donot_use_mm_for_euclid_dist", "matmul": "use_mm_for_euclid_dist"}


def eager(logits: Tensor, jacobian: Tensor, x: Tensor) -> Outputs:
    """All outputs."""
    jacobian, x = jacobian.float(), x.float()
    prediction = logits.argmax(1, keepdim=True)
    g = jacobian.take_along_dim(prediction.unsqueeze(2), 1)
    margin = logits.gather(1, prediction) - logits
    distances = (margin / (g - jacobian).square().sum(2).sqrt()).scatter(1, prediction, torch.inf)
    robustness, runner_up = distances.min(1, keepdim=True)
    g_dag = (g - jacobian.take_along_dim(runner_up.unsqueeze(2), 1)).squeeze(1)
    g = g.squeeze(1)
    psi, psi_dag = logits.gather(1, prediction).squeeze(1), margin.gather(1, runner_up).squeeze(1)
    dot, dot_dag, size, size_dag = (x * g).sum(1), (x * g_dag).sum(1), g.norm(dim=1), g_dag.norm(dim=1)
    offset, offset_dag = psi - dot, psi_dag - dot_dag
    gap = (g_dag / size_dag.unsqueeze(1) - g / size.unsqueeze(1)).norm(dim=1)
    alignment, alignment_dag = dot.abs() / size, dot_dag.abs() / size_dag
    return {
        "prediction": prediction.squeeze(1),
        "runner_up": runner_up.squeeze(1),
        "distances": distances,
        "linearized_robustness": robustness.squeeze(1),
        "alignment": alignment,
        "binarized_logit": psi_dag,
        "binarized_alignment": alignment_dag,
        "offset": offset,
        "binarized_offset": offset_dag,
        "direction_gap": gap,
        "bound": alignment + x.norm(dim=1) * gap + offset_dag.abs() / size_dag,
        "homogeneity": dot.abs() / (dot.abs() + offset.abs()),
        "binarized_homogeneity": dot_dag.abs() / (dot_dag.abs() + offset_dag.abs()),
        "cosine": alignment / x.norm(dim=1),
    }


def _least_ratio(logits: Tensor, jacobian: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Outputs:
    """ρ̃ alone, from distance(g [B, 1, D], jacobian) -> [B, n]."""
    prediction = logits.argmax(1, keepdim=True)
    g = jacobian.take_along_dim(prediction.unsqueeze(2), 1)
    ratio = (logits.gather(1, prediction) - logits) / distance(g, jacobian)
    return {"linearized_robustness": ratio.scatter(1, prediction, torch.inf).amin(1)}


def eager_alone(logits: Tensor, jacobian: Tensor, x: Tensor) -> Outputs:
    """ρ̃ alone by differences."""
    return _least_ratio(logits, jacobian.float(), lambda g, rows: (g - rows).square().sum(2).sqrt())


def cdist(name: str, logits: Tensor, jacobian: Tensor, x: Tensor) -> Outputs:
    """ρ̃ alone by torch.cdist: by its differences, or its matrix product (its default for more than 25 rows)."""
    mode = CDIST_MODES[name]
    return _least_ratio(logits, jacobian.float(), lambda g, rows: torch.cdist(g, rows, compute_mode=mode).squeeze(1))


def gram(logits: Tensor, jacobian: Tensor, x: Tensor) -> Outputs:
    """ρ̃ alone from ‖g‖² + ‖g_j‖² − 2⟨g, g_j⟩ with the products by bmm."""

    def distance(g: Tensor, rows: Tensor) -> Tensor:
        cross = torch.bmm(rows, g.transpose(1, 2)).squeeze(2)
        return (g.square().sum(2) + rows.square().sum(2) - 2 * cross).clamp_min(0).sqrt()

    return _least_ratio(logits, jacobian.float(), distance)


def numpy_alone(logits: Tensor, jacobian: Tensor, x: Tensor) -> Outputs:
    """ρ̃ alone in NumPy."""
    scores, rows = logits.numpy(), jacobian.numpy()
    every = np.arange(len(scores))
    prediction = scores.argmax(1)
    difference = rows[every, prediction][:, None] - rows
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (scores[every, prediction][:, None] - scores) / np.sqrt(
            np.einsum("bnd,bnd->bn", difference, difference)
        )
    ratio[every, prediction] = np.inf
    return {"linearized_robustness": torch.from_numpy(ratio.min(1))}


def in_parts(formula: Formula, logits: Tensor, jacobian: Tensor, x: Tensor) -> Outputs:
    """A few examples at a time, so that the formula's temporaries stay near 256 MB."""
    step = max(1, 2**26 // (jacobian.shape[1] * jacobian.shape[2]))
    starts = range(0, len(logits), step)
    parts = [formula(logits[s : s + step], jacobian[s : s + step], x[s : s + step]) for s in starts]
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
