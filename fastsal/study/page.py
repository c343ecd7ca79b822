"""The page of a study: verdicts, tables, figures and checks, as report.html, which needs no other file, and as report.md."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsal.pages.page import Page
from fastsal.study import figures, results
from fastsal.study.attacks import CHEAP, DEAR
from fastsal.study.claims import Verdict, checks, spread, variations, verdicts
from fastsal.study.measure import FEW
from fastsal.study.results import TABLE, WORKING, Study, summary

LENGTHS = ("ρ", "ρ̃", "α", "α†", "bound", "gap term", "offset term")


def verdict_table(found: Sequence[Verdict]) -> list[dict[str, str]]:
    """A row a claim: whose it is, whether it is confirmed, and the numbers with their spread over the seeds."""
    return [
        {
            "claim": f"{number}. {verdict.claim.text}",
            "confirmed": verdict.confirmed,
            "found": verdict.evidence,
            "whose": verdict.claim.whose,
        }
        for number, verdict in enumerate(found, 1)
    ]


def variation_table(studies: list[Study]) -> list[dict[str, str]]:
    """Whether the claims, by number, are confirmed as measured and in other circumstances, with the first number of each."""
    rows = []
    for name, others in {"as measured": studies, **variations(studies)}.items():
        cells = {}
        for number, verdict in enumerate(verdicts(others), 1):
            first = [next(iter(one.numbers.values())) for one in verdict.found]
            cells[f"claim {number}"] = f"{verdict.confirmed}, {np.median(first):.2f}"
        rows.append({"": name} | cells)
    return rows


def tables(studies: list[Study]) -> list[list[dict[str, str]]]:
    """The networks, the median over the seeds with its spread: lengths, then what has no unit."""
    first, second = [], []
    for same in zip(*(study.results for study in studies), strict=True):
        cells = {symbol: spread([result.median(name) for result in same]) for name, symbol in TABLE.items()}
        head = {"network": same[0].recipe.label}
        accuracy = spread([result.accuracy for result in same])
        first.append(head | {"accuracy": accuracy} | {symbol: cells[symbol] for symbol in LENGTHS})
        second.append(head | {symbol: cell for symbol, cell in cells.items() if symbol not in LENGTHS})
    return [first, second]


def attack_table(studies: list[Study]) -> list[dict[str, str]]:
    """For every strength, on how many images each attack found the smallest perturbation, and what dearer attacks find."""
    rows = []
    for same in zip(*(study.results for study in studies), strict=True):
        found = [summary(result) for result in same]
        row = {"network": same[0].recipe.label}
        row |= {name: str(sum(one[f"smallest by {name}"] for one in found)) for name in CHEAP}
        rows.append(
            row | {"ρ over the smallest of all": spread([one["ρ over the smallest of all attacks"] for one in found])}
        )
    return rows


def write(studies: list[Study], out: Path) -> Path:
    """Figures, tables and report.html of the studies of several seeds into the folder `out`; returns the page."""
    results.write(studies, out)
    drawn = figures.write(studies, out)
    study, found = studies[0], verdicts(studies)
    page = Page("Adversarial robustness and saliency maps")
    page.paragraph(
        f"The study of Etmann, Lunz, Maass and Schönlieb (ICML 2019), repeated by fastsal on {study.data}: "
        f"{len(study.results)} networks for each of {len(studies)} seed{'s' * (len(studies) > 1)}, trained on "
        f"{study.training_images} images; {study.images} of {study.test_images} test images analysed and attacked. Distances "
        f"are Euclidean, in units of x: pixels from 0 to 1. ρ is the smallest perturbation of {len(CHEAP)} attacks "
        f"({', '.join(CHEAP)}) that changes the network's own prediction and keeps every pixel in [0, 1], an upper bound of "
        f"the true robustness; {' and '.join(DEAR)} were tried on {min(FEW, study.images)} images too. α, β and homogeneity "
        "are for x with black at 0, not mean-centred, unless it says otherwise."
    )
    page.figure(drawn.pop("saliency"))
    page.heading("Verdicts")
    counted = [len(one.working()) for one in studies]
    page.paragraph(
        f"Judged are the networks that keep {WORKING:.0%} of the plain one's accuracy, "
        f"{' and '.join(map(str, sorted(set(counted))))} of {len(study.results)} of each seed. The criteria were fixed before "
        "anything was measured. A number is the median over the seeds, with the smallest and largest."
    )
    page.table(verdict_table(found))
    page.items(
        [
            (f"{k}.", f"Confirmed if {verdict.claim.criterion}. Figure: {drawn[verdict.claim.figure].title}.")
            for k, verdict in enumerate(found, 1)
        ]
    )
    page.heading("Verdicts in other circumstances")
    page.paragraph(
        "The same claims, by number, judged by the same criteria on the same networks: with the mean image of the training "
        f"split at 0; with the smallest ρ of all {len(CHEAP + DEAR)} attacks on the images that were tried with each; and with "
        "the networks that lose their accuracy. The number is the first of the claim's in the table above, the median over the "
        "seeds. nan: fewer than three networks."
    )
    page.table(variation_table(studies))
    page.heading("The networks")
    several = ", the median over the seeds with the smallest and largest" if len(studies) > 1 else ""
    page.paragraph(
        f"Medians over {study.images} test images{several}; λ: double backpropagation, ε: adversarial training."
    )
    for rows in tables(studies):
        page.table(rows)
    page.paragraph(
        "Bound: α + gap term ‖x‖·‖ḡ†−ḡ‖ + offset term |β†|/‖g†‖. Cosine: α/‖x‖. Homogeneity: |⟨x,g⟩| / (|⟨x,g⟩| + |β|); "
        "degree: ⟨x,g⟩ / Ψ; † of the binarised logit. Cosine of normals: of g† and the normal of the decision boundary where "
        "DeepFool meets it."
    )
    page.heading("The attacks")
    page.paragraph(
        "On how many images each attack found the smallest perturbation, of all seeds; and, on the images that "
        f"{' and '.join(DEAR)} were tried on too, the median of ρ over the smallest perturbation of all attacks."
    )
    page.table(attack_table(studies))
    page.heading("Checks")
    page.items([("", line) for line in checks(studies)])
    for figure in drawn.values():
        page.heading(figure.title)
        page.figure(figure)
    page.paragraph("The numbers: models.csv has a row a network, images.csv a row a network and image.")
    return page.write(out / "report.html", f"fastsal study: {study.data}", out / "report.md")
