"""The quantities of fastsal in pure PyTorch, written as the paper writes them: ground truth and fallback.

Notation (Etmann, Lunz, Maass and Schönlieb, ICML 2019, arXiv 1905.04172): Ψ are the logits, g_j the gradient of logit j with
respect to the input x, i* the predicted class, Δ_j = g_{i*} − g_j, m_j = Ψ^{i*} − Ψʲ, and g† = Δ_{j*} for the runner-up j*.
Perturbations are measured in the p-norm, gradients in its dual, the q-norm. Everything is computed in float64 on any device.

Where the paper writes a norm or an inner product, this file first scales each vector by a power of two near its largest entry,
so that no square and no product leaves the range of float64; powers of two change no digit.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

SCALARS = (
    "linearized_robustness",
    "alignment",
    "binarized_logit",
    "binarized_alignment",
    "offset",
    "binarized_offset",
    "direction_gap",
    "bound",
    "homogeneity",
    "binarized_homogeneity",
)


_ZERO = -2200  # the exponent of a zero: below that of any product of two float64


def dual(norm: float) -> float:
    """The q with 1/p + 1/q = 1, for p in {1, 2, inf}."""
    return {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[norm]


def _exponent(v: Tensor, dim: int | None = -1) -> Tensor:
    """Integer e with 2^e <= max|v| < 2^(e+1) along `dim` (`None`: entry by entry); 0 for zero, NaN and infinity."""
    v = v.detach().abs()
    top = v if dim is None else v.amax(dim)
    return torch.where(torch.isfinite(top) & (top > 0), torch.frexp(top).exponent.long() - 1, 0)


def _shift(v: Tensor, exponent: Tensor) -> Tensor:
    """v · 2^exponent, in two exact steps, since 2^exponent itself may lie outside the range of float64."""
    exponent = exponent.clamp(-2044, 2044)
    half = exponent >> 1
    for step in (half, exponent - half):
        v = v * ((step + 1023) << 52).view(torch.float64)
    return v


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b with gradient 0 where b = 0, for norms b (their subgradient at 0 is 0)."""
    zero = b == 0
    return torch.where(zero, (a / b).detach(), a / torch.where(zero, 1.0, b))


def _sum(v: Tensor) -> Tensor:
    """Σ along the last dimension as two halves: torch would share a lone sum out among threads, in another order."""
    halves: Tensor = pad(v, (0, v.shape[-1] % 2)).unflatten(-1, (2, -1))
    return halves.sum(-1).sum(-1)


def _norm(v: Tensor, q: float) -> Tensor:
    """‖v‖_q along the last dimension, for v whose largest entry is near 1."""
    if q == 1:
        return _sum(v.abs())
    if q == math.inf:
        return v.abs().amax(-1)
    square = _sum(v * v)
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def _dot(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(s, e) with ⟨x, v⟩ = s · 2^e along the last dimension, the largest term near 1; e is `_ZERO` if every term is 0.

    Each term has its own exponent: max|x| · max|v| may be far above every product of entries.
    """
    ex, ev = _exponent(x, None), _exponent(v, None)
    terms = _shift(x, -ex) * _shift(v, -ev)
    e = torch.where(terms.detach() == 0, _ZERO, ex + ev).amax(-1)
    return _sum(_shift(terms, ex + ev - e.unsqueeze(-1))), e


def vector_norm(v: Tensor, q: float) -> Tensor:
    """‖v‖_q of v [..., D] along the last dimension, without overflow or underflow: float64 [...]."""
    v = v.double()
    e = _exponent(v)
    return _shift(_norm(_shift(v, -e.unsqueeze(-1)), q), e)


def row_distances(anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
    """‖anchor − row‖_q of anchor [B, D] and rows [B, c, D]: float64 [B, c]."""
    return vector_norm(anchor.double().unsqueeze(1) - rows.double(), dual(norm))


def ratios(margin: Tensor, distance: Tensor) -> Tensor:
    """margin / distance, with 0/0 = 0: a tie is on the boundary already, whatever the gradients."""
    return torch.where((margin == 0) & (distance == 0), 0.0, _divide(margin, distance))


def nearest(ratio: Tensor, margin: Tensor) -> Tensor:
    """Where the smallest ratio is, along the last dimension: int64.

    The first NaN wins, then the lowest index among equals; where every ratio is +inf, the smallest margin decides.
    """
    return torch.where((ratio == math.inf).all(-1), margin.argmin(-1), ratio.argmin(-1))


def other_classes(own: Tensor, n: int) -> Tensor:
    """All classes but one's own, ascending: int64 [..., n − 1] from [...]."""
    slot = torch.arange(n - 1, device=own.device)
    return slot + (slot >= own.unsqueeze(-1))


def predicted_margins(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The prediction i* (int64 [B], the lowest index among equals) and the margins m_j (float64 [B, n]) of logits [B, n]."""
    prediction = logits.argmax(1)
    scores = logits.double()
    return prediction, scores.gather(1, prediction.unsqueeze(1)) - scores


def nearest_other(ratio: Tensor, margin: Tensor, own: Tensor) -> Tensor:
    """Where the smallest ratio is among all classes but one's own: int64 [...], from [..., n] twice and int64 [...]."""
    others = other_classes(own, ratio.shape[-1])
    return others.gather(-1, nearest(ratio.gather(-1, others), margin.gather(-1, others)).unsqueeze(-1)).squeeze(-1)


def two_row_scalars(logits: Tensor, rows: Tensor, x: Tensor, norm: float) -> dict[str, Tensor]:
    """Every scalar of the system from the winner and the runner-up alone.

    logits [B, 2], rows [B, 2, D] (g, g_{j*}) and x [B, D] give a dict of float64 [B], keyed by `SCALARS`. Differentiable.
    """
    q = dual(norm)
    logits, rows, x = logits.double(), rows.double(), x.double()
    psi = logits[:, 0]
    margin = logits[:, 0] - logits[:, 1]
    g = rows[:, 0]
    g_dag = rows[:, 0] - rows[:, 1]
    ex, eg, ed = _exponent(x), _exponent(g), _exponent(g_dag)
    x_unit, g_unit, dag_unit = (_shift(v, -e.unsqueeze(1)) for v, e in ((x, ex), (g, eg), (g_dag, ed)))
    norm_g, norm_dag = _norm(g_unit, q), _norm(dag_unit, q)

    def parts(score: Tensor, v: Tensor, ev: Tensor, norm_v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α = |⟨x,v⟩|/‖v‖, β = score − ⟨x,v⟩, |β|/‖v‖ and the homogeneity, for a gradient v."""
        dot, e_dot = _dot(x, v)
        e = torch.maximum(torch.where(score.detach() == 0, _ZERO, _exponent(score, None)), e_dot)
        dot_e = _shift(dot, e_dot - e)
        beta = _shift(score, -e) - dot_e
        homogeneity = _divide(dot_e.abs(), dot_e.abs() + beta.abs())
        return (
            _shift(_divide(dot.abs(), norm_v), e_dot - ev),
            _shift(beta, e),
            _shift(_divide(beta.abs(), norm_v), e - ev),
            homogeneity,
        )

    alignment, offset, _, homogeneity = parts(psi, g, eg, norm_g)
    alignment_dag, offset_dag, residual, homogeneity_dag = parts(margin, g_dag, ed, norm_dag)
    gap = _norm(_divide(dag_unit, norm_dag.unsqueeze(1)) - _divide(g_unit, norm_g.unsqueeze(1)), q)
    return {
        "linearized_robustness": ratios(margin, _shift(norm_dag, ed)),
        "alignment": alignment,
        "binarized_logit": margin,
        "binarized_alignment": alignment_dag,
        "offset": offset,
        "binarized_offset": offset_dag,
        "direction_gap": gap,
        "bound": alignment + _shift(_norm(x_unit, norm) * gap, ex) + residual,
        "homogeneity": homogeneity,
        "binarized_homogeneity": homogeneity_dag,
    }


def margin_geometry(
    logits: Tensor, jacobian: Tensor, x: Tensor, norm: float = 2.0
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The whole system from logits [B, n], jacobian [B, n, D] and x [B, D].

    Returns the scalars (dict of float64 [B], keyed by `SCALARS`), prediction and runner_up (int64 [B]) and the distances
    m_j / ‖Δ_j‖_q (float64 [B, n], +inf at the prediction).
    """
    B, _, D = jacobian.shape
    prediction, margin = predicted_margins(logits)
    anchor = jacobian.gather(1, prediction.view(B, 1, 1).expand(B, 1, D)).squeeze(1)
    ratio = ratios(margin, row_distances(anchor, jacobian, norm))
    runner_up = nearest_other(ratio, margin, prediction)
    winners = torch.stack((prediction, runner_up), 1)
    rows = jacobian.gather(1, winners.unsqueeze(2).expand(B, 2, D))
    scalars = two_row_scalars(logits.gather(1, winners), rows, x, norm)
    distances = ratio.scatter(1, prediction.unsqueeze(1), math.inf)
    return scalars, prediction, runner_up, distances


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None = None, norm: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """All logit pairs from logits [B, n], jacobian [B, n, D] and x [B, D] or None.

    Returns distance, margin (float64 [B, n, n]), nearest_margin (float64 [B, n]), nearest (int64 [B, n]) and the
    projection ⟨x, g_i − g_j⟩ / ‖g_i − g_j‖_q (float64 [B, n, n], None without x), whose absolute value is the alignment.
    """
    B, n, _ = jacobian.shape
    q = dual(norm)
    diagonal = torch.eye(n, dtype=torch.bool, device=jacobian.device)
    scores = logits.double()
    distances, projections = [], []
    for i in range(n):
        difference = jacobian[:, i : i + 1].double() - jacobian.double()
        distances.append(vector_norm(difference, q))
        if x is not None:
            ed = _exponent(difference)
            dot, e_dot = _dot(x.double().unsqueeze(1), difference)
            projections.append(_shift(_divide(dot, _norm(_shift(difference, -ed.unsqueeze(2)), q)), e_dot - ed))
    distance = torch.stack(distances, 1).masked_fill(diagonal, 0.0)
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    margin = ratios(difference, distance).masked_fill(diagonal, math.inf)
    which = nearest_other(margin, difference, torch.arange(n, device=jacobian.device).expand(B, n))
    projection = torch.stack(projections, 1).masked_fill(diagonal, math.nan) if projections else None
    return distance, margin, margin.gather(2, which.unsqueeze(2)).squeeze(2), which, projection


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor | None]:
    """The chain rule's last step for `pairwise_margins`, from the weights of each pair.

    w (symmetric) and v (antisymmetric) [B, n, n], jacobian [B, n, D], x [B, D]; v and x both or neither. Returns, in
    float64, Σ_j w_ij φ(g_i − g_j) + Σ_j v_ij x [B, n, D] and Σ_{i<j} v_ij (g_i − g_j) [B, D] (None without v and x), where
    φ(d) is d for q = 2, sign(d) for q = 1, and for q = inf sign(d) on the largest entries, shared evenly among equals.
    """
    q = dual(norm)
    grad_x = None if v is None or x is None else torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    rows = []
    for i in range(jacobian.shape[1]):
        d = jacobian[:, i : i + 1].double() - jacobian.double()
        phi = d if q == 2 else d.sign()
        if q == math.inf:
            top = (d.abs() == d.abs().amax(-1, keepdim=True)).double()
            phi = phi * top / top.sum(-1, keepdim=True)
        row = (w[:, i].unsqueeze(2) * phi).sum(1)
        if grad_x is not None and v is not None and x is not None:
            row = row + v[:, i].sum(1, keepdim=True) * x.double()
            grad_x += 0.5 * (v[:, i].unsqueeze(2) * d).sum(1)
        rows.append(row)
    return torch.stack(rows, 1), grad_x
