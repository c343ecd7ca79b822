"""The paper's claims, their acceptance criteria, and whether they are confirmed by the networks of each seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from fastsal.study.results import ROUNDING, Result, Study, rank_correlation

CORRELATED = 0.5  # what a rank correlation must be, up or down, to speak for a claim
PAPER, READING, THEORY = "the paper's", "our reading of the paper's figures", "what the theory says"


@dataclass(frozen=True)
class Found:
    """Whether one seed's networks confirm a claim, and the numbers that say so."""

    confirmed: bool
    numbers: dict[str, float]


@dataclass(frozen=True)
class Claim:
    """Whose it is, its acceptance criterion, the figure that shows it, and the function that judges.

    The criterion does not depend on the results: change it before a run, never after.
    """

    text: str
    whose: str
    criterion: str
    figure: str
    judge: Callable[[Study], Found]


@dataclass(frozen=True)
class Verdict:
    """What every seed's networks say of a claim."""

    claim: Claim
    found: tuple[Found, ...]

    @property
    def confirmed(self) -> str:
        """yes where all seeds confirm, no where none does, else how many of them do."""
        count = sum(one.confirmed for one in self.found)
        return {0: "no", len(self.found): "yes"}.get(count, f"in {count} of {len(self.found)} seeds")

    @property
    def evidence(self) -> str:
        """Every number as the median over the seeds, with its smallest and largest."""
        return "; ".join(
            f"{name} {spread([one.numbers[name] for one in self.found])}" for name in self.found[0].numbers
        )


def spread(values: Sequence[float]) -> str:
    """The median, and the smallest and largest where there are several."""
    middle = f"{np.median(values):.2f}"
    return f"{middle} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else middle


def _medians_correlate(study: Study, name: str) -> float:
    working = study.working()
    return rank_correlation([r.median(name) for r in working], [r.median("rho") for r in working])


def _approximates(study: Study) -> Found:
    models = study.working()
    ratios = np.concatenate([r.columns["linearized_robustness"] / r.columns["rho"] for r in models])
    within = [rank_correlation(r.columns["linearized_robustness"], r.columns["rho"]) for r in models]
    low, middle, high = np.nanquantile(ratios, [0.25, 0.5, 0.75])
    return Found(
        bool(np.median(within) >= 0.8 and 2 / 3 < middle < 1.5),
        {
            "rank correlation over a network's images": float(np.median(within)),
            "ρ̃/ρ": middle,
            "its quartiles": low,
            "and": high,
            "rank correlation of the networks' medians": _medians_correlate(study, "linearized_robustness"),
        },
    )


def _growths(study: Study, holds: Callable[[float, float], bool]) -> Found:
    """How many times the medians of the plain model those of the most robust of the robustified ones that work are."""
    plain = study.results[0]
    others: list[Result] = [r for r in study.working() if r is not plain] or study.results[1:]
    most = max(others, key=lambda r: r.median("rho"))
    robustness, alignment, cosine = (most.median(name) / plain.median(name) for name in ("rho", "alignment", "cosine"))
    numbers = {"median ρ grows": robustness, "median α": alignment, "and the median cosine": cosine}
    return Found(holds(robustness, alignment), numbers)


def _follows(study: Study, name: str, sign: int, others: dict[str, str]) -> Found:
    """Whether the median of a quantity rises (sign 1) or falls (-1) with that of ρ, over the models that work."""
    value = _medians_correlate(study, name)
    numbers = {"rank correlation": value}
    return Found(sign * value >= CORRELATED, numbers | {t: _medians_correlate(study, o) for t, o in others.items()})


def _theory(study: Study) -> Found:
    """|ρ̃ − α†| ≤ |β†|/‖g†‖ on every image, and how |α† − ρ| goes with that."""
    everyone = [r.columns for r in study.results]
    exceeds = [
        (np.abs(c["linearized_robustness"] - c["binarized_alignment"]) - c["offset_term"])
        / (c["binarized_alignment"] + c["offset_term"])
        for c in everyone
    ]
    columns = [r.columns for r in study.working()]
    distances = [np.abs(c["binarized_alignment"] - c["rho"]) for c in columns]
    # Of a network without biases all of it is rounding.
    offsets = [
        np.where(c["offset_term"] <= ROUNDING * c["linearized_robustness"], 0, c["offset_term"]) for c in columns
    ]
    within = [rank_correlation(*pair) for pair in zip(distances, offsets, strict=True)]
    ratios = [np.nanmedian(d) / (np.nanmedian(o) or np.nan) for d, o in zip(distances, offsets, strict=True)]
    return Found(
        bool(np.nanmax(exceeds) <= ROUNDING and np.median(within) >= CORRELATED),
        {
            "rank correlation over a network's images": float(np.median(within)),
            "median abs(α† − ρ) over median abs(β†)/‖g†‖": float(np.median(ratios)),
            "rank correlation of the networks' median α† and ρ": _medians_correlate(study, "binarized_alignment"),
        },
    )


CLAIMS = (
    Claim(
        "ρ̃ approximates ρ",
        PAPER,
        "the median over the networks of the rank correlation of ρ̃ and ρ is 0.8 or more, and the median of ρ̃/ρ is between 2/3 "
        "and 3/2",
        "robustness",
        _approximates,
    ),
    Claim(
        "Robustified networks are more robust, and their saliency maps align more",
        PAPER,
        "from plain to the most robust network the median of ρ and that of α grow",
        "alignment",
        partial(_growths, holds=lambda robustness, alignment: robustness > 1 and alignment > 1),
    ),
    Claim(
        "Alignment grows with robustness",
        PAPER,
        f"the rank correlation of median α and median ρ is {CORRELATED} or more",
        "alignment",
        partial(_follows, name="alignment", sign=1, others={"of the cosine": "cosine"}),
    ),
    Claim(
        "Homogeneity falls as robustness grows",
        READING,
        f"the rank correlation of median homogeneity and median ρ is −{CORRELATED} or less",
        "homogeneity",
        partial(_follows, name="homogeneity", sign=-1, others={"of homogeneity†": "binarized_homogeneity"}),
    ),
    Claim(
        "Alignment grows more slowly than robustness",
        READING,
        "from plain to the most robust network the median of α grows, and fewer times than that of ρ",
        "alignment",
        partial(_growths, holds=lambda robustness, alignment: 1 < alignment < robustness),
    ),
    Claim(
        "α† is as near to ρ as the biases are small",
        THEORY,
        "|ρ̃ − α†| ≤ |β†|/‖g†‖ on every image, and the median over the networks of the rank correlation of |α† − ρ| and "
        f"|β†|/‖g†‖ is {CORRELATED} or more",
        "bound",
        _theory,
    ),
)


def verdicts(studies: Sequence[Study]) -> list[Verdict]:
    """The verdict on each claim of the studies of several seeds, over the models that keep their accuracy."""
    return [Verdict(claim, tuple(claim.judge(study) for study in studies)) for claim in CLAIMS]


def variations(studies: Sequence[Study]) -> dict[str, list[Study]]:
    """The same networks in other circumstances, none of which needs another network."""
    return {
        "x with the mean image at 0": [study.centred() for study in studies],
        "the smallest ρ of all attacks, on fewer images": [study.few() for study in studies],
        "every strength, whatever its accuracy": [replace(study, floor=0.0) for study in studies],
    }


def checks(studies: Sequence[Study]) -> list[str]:
    """What must hold, with the numbers that show whether it does."""
    models = [result.columns for study in studies for result in study.results]
    images = sum(len(columns["rho"]) for columns in models)
    excess = max(float(np.nanmax((c["linearized_robustness"] - c["bound"]) / c["bound"])) for c in models)
    lines = [
        f"ρ̃ ≤ bound in all {images} pairs of an image and a network: largest (ρ̃ − bound)/bound {excess:.1e}"
        + ("" if excess <= ROUNDING else ", which is not rounding")
    ]
    if "bias_error" in models[0]:
        kinds = ("bias_error", "binarized_bias_error")
        largest = max(float(np.nanmax(columns[kind])) for columns in models for kind in kinds)
        lines.append(
            f"β and β† of all {images} pairs beside the sums over the biases, which take no gradient of x: largest deviation "
            f"{largest:.1e} of |Ψ| + Σ|xₖgₖ|"
        )
    return lines
