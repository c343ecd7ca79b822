"""What the paper claims and whether the results bear it out, and what must hold whatever they are."""

import numpy as np

from fastsal.study.results import Result, Study, rank_correlation, summary

CORRELATED = 0.5  # what a rank correlation must be, up or down, to speak for a claim


def _over_models(study: Study, name: str) -> tuple[float, str]:
    """Rank correlation of a median with that of ρ over the models that work, and the same in words, with each family's own."""
    working = study.working()

    def correlation(results: list[Result]) -> float:
        return rank_correlation([r.median(name) for r in results], [r.median("rho") for r in results])

    families = study.families().items()
    own = [
        f"{correlation([r for r in family.values() if r in working]):.2f} ({training})" for training, family in families
    ]
    return correlation(working), f"{correlation(working):.2f}, within each way of training {' and '.join(own)}"


def verdicts(study: Study) -> list[tuple[str, bool, str]]:
    """What the paper says, whether it came out, and the numbers, over the models that keep their accuracy."""
    models = study.working()
    plain = study.results[0]
    ratios = np.concatenate([r.columns["linearized_robustness"] / r.columns["rho"] for r in models])
    low, middle, high = np.nanquantile(ratios, [0.25, 0.5, 0.75])
    within = [rank_correlation(r.columns["linearized_robustness"], r.columns["rho"]) for r in models]
    growth, growth_text = _over_models(study, "alignment")
    falling, falling_text = _over_models(study, "homogeneity")
    robustified = [r for r in models if r is not plain] or study.results[1:]
    most = max(robustified, key=lambda r: r.median("rho"))
    rises = [most.median(name) / plain.median(name) for name in ("alignment", "rho")]
    tight = rank_correlation(
        np.concatenate([r.columns["binarized_homogeneity"] for r in models]),
        np.concatenate([np.abs(np.log(r.columns["binarized_alignment"] / r.columns["rho"])) for r in models]),
    )
    return [
        (
            "ρ̃ approximates ρ",
            bool(np.median(within) >= 0.8 and 2 / 3 < middle < 1.5),
            f"ρ̃/ρ has median {middle:.2f} and quartiles {low:.2f} and {high:.2f}; their rank correlation over the images of a "
            f"model is from {min(within):.2f} to {max(within):.2f}",
        ),
        (
            "Robustified models are more robust, and their saliency maps align more",
            rises[0] > 1 and rises[1] > 1,
            f"from plain to {most.recipe.label}, the most robust, median ρ grows {rises[1]:.2f} times and median α "
            f"{rises[0]:.2f} times",
        ),
        (
            "Alignment grows with robustness",
            growth >= CORRELATED,
            f"the rank correlation of median α and median ρ over the models is {growth_text}",
        ),
        (
            "Homogeneity falls as robustness grows (on grey-level digits)",
            falling <= -CORRELATED,
            f"the rank correlation of median homogeneity and median ρ over the models is {falling_text}",
        ),
        (
            "Alignment grows more slowly than robustness (on grey-level digits)",
            1 < rises[0] < rises[1],
            f"{rises[0]:.2f} times beside {rises[1]:.2f} times, from plain to {most.recipe.label}",
        ),
        (
            "The more homogeneous the binarised logit, the nearer α† to ρ",
            tight <= -CORRELATED,
            f"the rank correlation of homogeneity† and |log(α†/ρ)| over all images is {tight:.2f}",
        ),
    ]


def checks(study: Study) -> list[str]:
    """What must hold, with the numbers that show whether it does."""
    rows = [summary(result) for result in study.results]
    excess = max(row["largest relative excess over the bound"] for row in rows)
    lines = [
        f"ρ̃ ≤ bound for all {study.images} images of all {len(rows)} models: largest (ρ̃ − bound)/bound {excess:.1e}"
        + ("" if excess <= 1e-6 else ", which is not rounding")
    ]
    names = ("largest bias_sum_error", "largest binarized_bias_sum_error")
    errors = [row[name] for row in rows for name in names if name in row]
    if errors:
        lines.append(
            "β and β† beside Σ⟨b, ∂Ψ/∂b⟩, summed over the biases in float64 by another road: largest deviation "
            f"{max(errors):.1e} of |Ψ| + Σ|xₖgₖ| (float32 rounds at 6e-8)"
        )
    return lines
