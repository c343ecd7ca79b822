"""The quantities of fastsal in pure PyTorch, written as the paper writes them: the ground truth, and the fallback.

Notation (Etmann, Lunz, Maass and Schönlieb, ICML 2019, arXiv 1905.04172). A classifier gives the logits Ψ for an input x. Its
prediction i* is the class of the highest logit, g_j is the gradient of logit j with respect to x, and g = g_{i*} is the
saliency map. For every other class j the margin is m_j = Ψ^{i*} − Ψʲ and its gradient is Δ_j = g − g_j. The runner-up j* is
the class with the smallest m_j / ‖Δ_j‖, and a dagger marks what belongs to it: Ψ† = m_{j*} and g† = Δ_{j*}. Perturbations
are measured in the p-norm, gradients in its dual, the q-norm, with 1/p + 1/q = 1.

Everything is computed in float64, on any device. A gradient of 1e-200 is as good as one of 1: the type `Scaled` below keeps a
power of two beside each vector, so that no square and no product leaves the range of float64. Powers of two change no digit.
"""

import math
from dataclasses import dataclass

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
    "cosine",
)


def dual(norm: float) -> float:
    """The q with 1/p + 1/q = 1, for p in {1, 2, inf}."""
    return {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[norm]


# Arithmetic over the full range.

SORTED = 2048  # values that are sorted sooner than searched for the smallest
_ZERO = -2200  # stands for the exponent of a zero: below that of any product of two float64


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


@dataclass(frozen=True)
class Scaled:
    """Numbers digits · 2^exponent, which may lie far outside the range of float64.

    `digits` are float64 [..., K] and near 1. `exponent`, int64, has the same shape, or [..., 1] where the K entries of a
    vector share a power of two. `scale` and `scale_each` make them from tensors.
    """

    digits: Tensor
    exponent: Tensor

    def number(self) -> Tensor:
        """The numbers as a tensor, float64 [..., K]: zero or infinite where float64 has no room for them."""
        return _shift(self.digits, self.exponent)

    def at(self, exponent: Tensor) -> Tensor:
        """The digits beside another power of two."""
        return _shift(self.digits, self.exponent - exponent)

    def norm(self, q: float) -> "Scaled":
        """‖v‖_q of vectors with one exponent each: [..., 1]."""
        return Scaled(_norm(self.digits, q).unsqueeze(-1), self.exponent)

    def sum(self) -> "Scaled":
        """Σ along the last dimension: [..., 1]."""
        top = _top(self)
        return Scaled(_sum(self.at(top)).unsqueeze(-1), top)

    def __abs__(self) -> "Scaled":
        return Scaled(self.digits.abs(), self.exponent)

    def __sub__(self, other: "Scaled") -> "Scaled":
        top = _top(self, other)
        return Scaled(self.at(top) - other.at(top), top)

    def __mul__(self, other: "Scaled") -> "Scaled":
        return Scaled(self.digits * other.digits, self.exponent + other.exponent)

    def __truediv__(self, other: "Scaled") -> "Scaled":
        return Scaled(_divide(self.digits, other.digits), self.exponent - other.exponent)


def _top(*terms: Scaled) -> Tensor:
    """The exponent at which terms are added: the largest along the last dimension of all, [..., 1].

    A zero has no say in it, however large the factors that made it, unless all are zero.
    """
    of_all = torch.cat([term.exponent.amax(-1, keepdim=True) for term in terms], -1)
    nonzero = [torch.where(term.digits.detach() == 0, _ZERO, term.exponent).amax(-1, keepdim=True) for term in terms]
    top = torch.cat(nonzero, -1).amax(-1, keepdim=True)
    return torch.where(top == _ZERO, of_all.amax(-1, keepdim=True), top)


def _scale(v: Tensor, largest: Tensor) -> Scaled:
    """v with the exponent e at which 2^e <= largest < 2^(e+1); 0 where largest is zero, NaN or infinite."""
    usable = torch.isfinite(largest) & (largest > 0)
    exponent = torch.where(usable, torch.frexp(largest).exponent.long() - 1, 0)
    return Scaled(_shift(v, -exponent), exponent)


def scale(v: Tensor) -> Scaled:
    """Vectors v [..., D] with one exponent each, that of the largest entry."""
    return _scale(v, v.detach().abs().amax(-1, keepdim=True))


def scale_each(v: Tensor) -> Scaled:
    """v with an exponent for every entry."""
    return _scale(v, v.detach().abs())


def inner(x: Tensor, v: Tensor) -> Scaled:
    """⟨x, v⟩ along the last dimension: [..., 1].

    Every product has its own exponent: the largest entry of x times the largest of v may be far above every product.
    """
    return (scale_each(x) * scale_each(v)).sum()


# The quantities.


def vector_norm(v: Tensor, q: float) -> Tensor:
    """‖v‖_q of v [..., D] along the last dimension, without overflow or underflow: float64 [...]."""
    return scale(v.double()).norm(q).number().squeeze(-1)


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


def smallest(values: Tensor, count: int) -> Tensor:
    """Where the `count` smallest of values [E, n] without NaN are, the smallest first, the lowest index among equals: int64."""
    n = values.shape[1]
    if values.numel() <= SORTED:
        return values.sort(stable=True, dim=1).indices[:, :count]
    last = values.topk(count, dim=1, largest=False).values.amax(1, keepdim=True)
    below, equal = values < last, values == last
    wanted = below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))
    index = torch.arange(n, device=values.device)
    found = torch.where(wanted, index, n).topk(count, dim=1, largest=False, sorted=True).values
    return found.gather(1, values.gather(1, found).sort(stable=True, dim=1).indices)


def other_classes(own: Tensor, n: int) -> Tensor:
    """All classes but one's own, ascending: int64 [..., n − 1] from [...]."""
    slot = torch.arange(n - 1, device=own.device)
    return slot + (slot >= own.unsqueeze(-1))


def rows_of(jacobian: Tensor, classes: Tensor) -> Tensor:
    """The gradients [B, k, D] of classes int64 [B, k], from a jacobian [B, n, D]."""
    return jacobian.gather(1, classes.unsqueeze(2).expand(-1, -1, jacobian.shape[2]))


def margins(logits: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The target c (int64 [B]) and its margins m_j = Ψᶜ − Ψʲ (float64 [B, n]) over all classes, from logits [B, n].

    Without a target it is the prediction i*, the class of the highest logit, the lowest index among equals.
    """
    own = logits.argmax(1) if target is None else target
    scores = logits.double()
    return own, scores.gather(1, own.unsqueeze(1)) - scores


def nearest_other(ratio: Tensor, margin: Tensor, own: Tensor) -> Tensor:
    """Where the smallest ratio is among all classes but one's own: int64 [...], from [..., n] twice and int64 [...]."""
    others = other_classes(own, ratio.shape[-1])
    return others.gather(-1, nearest(ratio.gather(-1, others), margin.gather(-1, others)).unsqueeze(-1)).squeeze(-1)


def offset(psi: Tensor, dot: Scaled) -> Scaled:
    """β = Ψ − ⟨x, g⟩, from a logit [..., 1]."""
    top = _top(scale(psi), dot)
    return Scaled(_shift(psi, -top) - dot.at(top), top)


def homogeneity(dot: Scaled, beta: Scaled) -> Tensor:
    """|⟨x, g⟩| / (|⟨x, g⟩| + |β|), which is 1 where β = 0: float64 [..., 1]."""
    top = _top(dot, beta)
    linear, constant = dot.at(top).abs(), beta.at(top).abs()
    return _divide(linear, linear + constant)


def two_row_scalars(logits: Tensor, rows: Tensor, x: Tensor, norm: float) -> dict[str, Tensor]:
    """Every scalar quantity, which the predicted class and the runner-up alone determine. Differentiable.

    Args:
        logits: Ψ^{i*} and Ψ^{j*}, [B, 2].
        rows: g and g_{j*}, [B, 2, D].
        x: The input, [B, D].
        norm: The p of the perturbation.

    Returns:
        float64 [B] for every name in `SCALARS`.
    """
    p, q = norm, dual(norm)
    logits, rows, x = logits.double(), rows.double(), x.double()
    psi, psi_dag = logits[:, :1], logits[:, :1] - logits[:, 1:]  # Ψ^{i*} and Ψ†, [B, 1]
    g, g_dag = rows[:, 0], rows[:, 0] - rows[:, 1]  # [B, D]

    x_scaled, g_scaled, dag_scaled = scale(x), scale(g), scale(g_dag)
    norm_x, norm_g, norm_dag = x_scaled.norm(p), g_scaled.norm(q), dag_scaled.norm(q)
    dot, dot_dag = inner(x, g), inner(x, g_dag)  # ⟨x, g⟩ and ⟨x, g†⟩
    alpha, alpha_dag = abs(dot) / norm_g, abs(dot_dag) / norm_dag
    beta, beta_dag = offset(psi, dot), offset(psi_dag, dot_dag)
    gap = (dag_scaled / norm_dag - g_scaled / norm_g).norm(q)
    quantities = {
        "linearized_robustness": ratios(psi_dag, norm_dag.number()),
        "alignment": alpha.number(),
        "binarized_logit": psi_dag,
        "binarized_alignment": alpha_dag.number(),
        "offset": beta.number(),
        "binarized_offset": beta_dag.number(),
        "direction_gap": gap.number(),
        "bound": alpha.number() + (norm_x * gap).number() + (abs(beta_dag) / norm_dag).number(),
        "homogeneity": homogeneity(dot, beta),
        "binarized_homogeneity": homogeneity(dot_dag, beta_dag),
        "cosine": (alpha / norm_x).number(),
    }
    return {name: quantity.squeeze(1) for name, quantity in quantities.items()}


def margin_geometry(
    logits: Tensor, jacobian: Tensor, x: Tensor, norm: float = 2.0
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """Every quantity from the whole Jacobian.

    Args:
        logits: Ψ, [B, n].
        jacobian: The gradients g_j of every logit, [B, n, D].
        x: The input, [B, D].
        norm: The p of the perturbation.

    Returns:
        The scalars (float64 [B] for every name in `SCALARS`), the prediction and the runner-up (int64 [B] each), and the
        distances m_j / ‖Δ_j‖_q (float64 [B, n], +inf at the prediction).
    """
    prediction, margin = margins(logits)
    anchor = rows_of(jacobian, prediction.unsqueeze(1)).squeeze(1)
    ratio = ratios(margin, row_distances(anchor, jacobian, norm))
    runner_up = nearest_other(ratio, margin, prediction)
    winners = torch.stack((prediction, runner_up), 1)
    scalars = two_row_scalars(logits.gather(1, winners), rows_of(jacobian, winners), x, norm)
    distances = ratio.scatter(1, prediction.unsqueeze(1), math.inf)
    return scalars, prediction, runner_up, distances


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None = None, norm: float = 2.0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The margin of every pair of logits, and how far its gradient points along x.

    Args:
        logits: Ψ, [B, n].
        jacobian: The gradients g_j of every logit, [B, n, D].
        x: The input, [B, D], or None.
        norm: The p of the perturbation.

    Returns:
        The distances ‖g_i − g_j‖_q and the margins (Ψⁱ − Ψʲ) / ‖g_i − g_j‖_q (float64 [B, n, n] each), each class's smallest
        margin (float64 [B, n]) and the other class of it (int64 [B, n]), and the projections ⟨x, g_i − g_j⟩ / ‖g_i − g_j‖_q
        (float64 [B, n, n], None without x), whose absolute value is the alignment.
    """
    B, n, _ = jacobian.shape
    q = dual(norm)
    diagonal = torch.eye(n, dtype=torch.bool, device=jacobian.device)
    scores = logits.double()
    distances, projections = [], []
    for i in range(n):
        delta = jacobian[:, i : i + 1].double() - jacobian.double()  # g_i − g_j for every j
        length = scale(delta).norm(q)
        distances.append(length.number().squeeze(2))
        if x is not None:
            projections.append((inner(x.double().unsqueeze(1), delta) / length).number().squeeze(2))
    distance = torch.stack(distances, 1).masked_fill(diagonal, 0.0)
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    margin = ratios(difference, distance).masked_fill(diagonal, math.inf)
    which = nearest_other(margin, difference, torch.arange(n, device=jacobian.device).expand(B, n))
    projection = torch.stack(projections, 1).masked_fill(diagonal, math.nan) if projections else None
    return distance, margin, margin.gather(2, which.unsqueeze(2)).squeeze(2), which, projection


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor | None]:
    """The last step of the gradient of `pairwise_margins`, from the weight of each pair.

    Args:
        w: How much the result moves with each distance, divided by the distance where q = 2: symmetric, [B, n, n].
        v: How much it moves with each inner product ⟨x, g_i − g_j⟩: antisymmetric, [B, n, n]. v and x both, or neither.
        jacobian: The gradients g_j of every logit, [B, n, D].
        x: The input, [B, D], or None.
        norm: The p of the perturbation.

    Returns:
        The gradient by g_i, Σ_j w_ij φ(g_i − g_j) + Σ_j v_ij x (float64 [B, n, D]), and by x, Σ_{i<j} v_ij (g_i − g_j)
        (float64 [B, D], None without v and x), where φ(d) is d for q = 2, sign(d) for q = 1, and for q = inf sign(d) on the
        largest entries, shared evenly among equals.
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
