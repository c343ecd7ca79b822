"""The paper's claims, their acceptance criteria, and whether they are confirmed, as measured and in other circumstances."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fastsal.study.results import FAMILIES, Result, Study, rank_correlation, summary

CORRELATED = 0.5  # what a rank correlation must be, up or down, to speak for a claim


@dataclass(frozen=True)
class Found:
    """Whether a claim is confirmed, its number in short, and what was found in a sentence."""

    confirmed: bool
    number: str
    evidence: str


@dataclass(frozen=True)
class Claim:
    """One of the paper's: its acceptance criterion, the figure that shows it, and the function that judges.

    The criterion does not depend on the results: change it before a run, never after.
    """

    text: str
    criterion: str
    figure: str
    judge: Callable[[Study], Found]


def _robustified(study: Study) -> Result:
    """The most robust of the robustified models that work, or of all where none does."""
    plain = study.results[0]
    return max([r for r in study.working() if r is not plain] or study.results[1:], key=lambda r: r.median("rho"))


def _over_models(study: Study, name: str, sign: int) -> Found:
    """Whether the median of a quantity rises (sign 1) or falls (-1) with that of ρ, over the models that work."""
    working = study.working()

    def correlation(results: list[Result]) -> float:
        return rank_correlation([r.median(name) for r in results], [r.median("rho") for r in results])

    own = [
        f"{correlation([r for r in family.values() if r in working]):.2f} ({training})"
        for training, family in study.families().items()
    ]
    value = correlation(working)
    return Found(
        sign * value >= CORRELATED,
        f"{value:.2f}",
        f"{value:.2f} over the models, within each way of training {' and '.join(own)}",
    )


def _approximates(study: Study) -> Found:
    models = study.working()
    ratios = np.concatenate([r.columns["linearized_robustness"] / r.columns["rho"] for r in models])
    low, middle, high = np.nanquantile(ratios, [0.25, 0.5, 0.75])
    within = [rank_correlation(r.columns["linearized_robustness"], r.columns["rho"]) for r in models]
    return Found(
        bool(np.median(within) >= 0.8 and 2 / 3 < middle < 1.5),
        f"{np.median(within):.2f}; {middle:.2f}",
        f"ρ̃/ρ has median {middle:.2f} and quartiles {low:.2f} and {high:.2f}; their rank correlation over the images of a "
        f"model is {np.median(within):.2f} (from {min(within):.2f} to {max(within):.2f})",
    )


def _growths(study: Study, holds: Callable[[float, float], bool]) -> Found:
    """How many times the medians of the plain model those of the most robust one are."""
    plain, most = study.results[0], _robustified(study)
    robustness, alignment = (most.median(name) / plain.median(name) for name in ("rho", "alignment"))
    return Found(
        holds(robustness, alignment),
        f"{robustness:.2f}; {alignment:.2f}",
        f"from plain to {most.recipe.label}, the most robust, median ρ grows {robustness:.2f} times and median α "
        f"{alignment:.2f} times",
    )


def _homogeneous_is_tight(study: Study) -> Found:
    models = study.working()
    value = rank_correlation(
        np.concatenate([r.columns["binarized_homogeneity"] for r in models]),
        np.concatenate([np.abs(np.log(r.columns["binarized_alignment"] / r.columns["rho"])) for r in models]),
    )
    return Found(value <= -CORRELATED, f"{value:.2f}", f"{value:.2f} over all images of all models")


CLAIMS = (
    Claim(
        "ρ̃ approximates ρ",
        "the median over the models of the rank correlation of ρ̃ and ρ is 0.8 or more, and the median of ρ̃/ρ is between 2/3 "
        "and 3/2",
        "robustness",
        _approximates,
    ),
    Claim(
        "Robustified models are more robust, and their saliency maps align more",
        "from plain to the most robust model the median of ρ and that of α grow",
        "alignment",
        partial(_growths, holds=lambda robustness, alignment: robustness > 1 and alignment > 1),
    ),
    Claim(
        "Alignment grows with robustness",
        f"the rank correlation of median α and median ρ is {CORRELATED} or more",
        "alignment",
        partial(_over_models, name="alignment", sign=1),
    ),
    Claim(
        "Homogeneity falls as robustness grows (on grey-level digits)",
        f"the rank correlation of median homogeneity and median ρ is −{CORRELATED} or less",
        "homogeneity",
        partial(_over_models, name="homogeneity", sign=-1),
    ),
    Claim(
        "Alignment grows more slowly than robustness (on grey-level digits)",
        "from plain to the most robust model the median of α grows, and fewer times than that of ρ",
        "alignment",
        partial(_growths, holds=lambda robustness, alignment: 1 < alignment < robustness),
    ),
    Claim(
        "The more homogeneous the binarised logit, the nearer α† to ρ",
        f"the rank correlation of homogeneity† and |log(α†/ρ)| is −{CORRELATED} or less",
        "homogeneity",
        _homogeneous_is_tight,
    ),
)


def verdicts(study: Study) -> list[tuple[Claim, Found]]:
    """The verdict on each claim, over the models that keep their accuracy."""
    return [(claim, claim.judge(study)) for claim in CLAIMS]


def variations(study: Study) -> dict[str, Study]:
    """The same study in other circumstances, none of which needs another network: are the claims confirmed there?"""
    families = {
        f"{training} alone": replace(study, results=list(study.family(training).values()))
        for training in FAMILIES
        if len(study.families()) > 1
    }
    return {
        "pixels kept in [0, 1]": study.in_box(),
        "x with the mean image at 0": study.centred(),
        "both": study.in_box().centred(),
        **families,
        "every strength, whatever its accuracy": replace(study, floor=0.0),
    }


def checks(study: Study) -> list[str]:
    """What must hold, with the numbers that show whether it does."""
    rows = [summary(result) for result in study.results]
    excess = max(row["largest relative excess over the bound"] for row in rows)
    lines = [
        f"ρ̃ ≤ bound for all {study.images} images of all {len(rows)} models: largest (ρ̃ − bound)/bound {excess:.1e}"
        + ("" if excess <= 1e-6 else ", which is not rounding")
    ]
    if "bias_sum_error" in study.results[0].columns:
        kinds = ("bias_sum_error", "binarized_bias_sum_error")
        exact = max(row[f"largest float64 {kind}"] for row in rows for kind in kinds)
        errors = np.stack([[r.columns[kind] for kind in kinds] for r in study.results]).max(1)
        over = int((errors > 1e-5).sum())
        lines.append(
            f"β and β† of all {study.images} images of all {len(rows)} models beside Σ⟨b, ∂Ψ/∂b⟩, computed from the biases "
            f"alone: largest deviation {exact:.1e} of |Ψ| + Σ|xₖgₖ| in float64, {errors.max():.1e} in float32, which "
            f"rounds at 6e-8"
            + (
                f"; {over} of {errors.size} are above 1e-5, at a kink, where rounding takes another branch"
                if over
                else ""
            )
        )
    return lines
