"""‖Δ_j‖₂ of every class from the Gram matrix G of a wide head's feature gradients, with a bound of its rounding.

Where Δ_j = dᵀJ_f with d = w_{i*} − w_j [F], ‖Δ_j‖² = dᵀGd with G = J_f J_fᵀ [F, F]. That takes F²·D + n·F² operations in the
place of the n·F·D that form every row: for a vocabulary of 50,000 tokens it is the way. But it loses digits where the parts of
Δ_j cancel, so nothing is decided by it. In float64, an inner product of length k is off by at most k·u / (1 − k·u) of the sum
of the absolute products, u = 2⁻⁵³, whatever the order of the additions (Higham, Accuracy and Stability of Numerical Algorithms,
section 3.1). With s_f = ‖J_f‖₂ of each feature, the error of dᵀGd is at most that, for k = D + 2F + 8, times (Σ_f |d_f| s_f)².
What the bound leaves open is told, and its rows are to be formed.
"""

import torch
from torch import Tensor

from fastsal.tensor import reference

UNIT = 2.0**-53
COLUMNS = 1 << 15  # of J_f that are float64 at a time
TILE = 1 << 12  # classes at a time
KNOWN = 2.0**-23  # a relative error of the squared norm that float32 does not show


def screen(weight: Tensor, jacobian: Tensor, own: Tensor, margin: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the Δ_j of one example, and of which classes the rows have to be formed.

    Args:
        weight: The head's, [n, F].
        jacobian: J_f, [F, D], finite where the result is to say anything.
        own: The class i*, int64 [].
        margin: m_j, float64 [n].
        candidates: Which classes may be the nearest, bool [n].

    Returns:
        ‖Δ_j‖₂, float64 [n], and bool [n]: true where that is too inexact for float32, or where it may be that j is nearest.
    """
    n, F = weight.shape
    gram = torch.zeros(F, F, dtype=torch.float64, device=weight.device)
    for part in jacobian.split(COLUMNS, 1):
        part = part.double()
        gram.addmm_(part, part.T)
    size = gram.diagonal().clamp(min=0).sqrt()
    square, error = torch.empty_like(margin), torch.empty_like(margin)
    winner, terms = weight[own].double(), jacobian.shape[1] + 2 * F + 8
    for start in range(0, n, TILE):
        difference = winner - weight[start : start + TILE].double()
        square[start : start + TILE] = ((difference @ gram) * difference).sum(1)
        error[start : start + TILE] = (difference.abs() @ size).square()
    error *= terms * UNIT / (1 - 2 * terms * UNIT)
    low, high = (square - error).clamp(min=0).sqrt(), (square + error).clamp(min=0).sqrt()
    near = reference.ratios(margin, torch.where(margin < 0, low, high))
    far = reference.ratios(margin, torch.where(margin < 0, high, low))
    least = torch.where(candidates, far, torch.inf).amin()
    return square.clamp(min=0).sqrt(), ~(error <= KNOWN * square) | (candidates & ~(near > least))
