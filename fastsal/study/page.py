"""The page of a study: verdicts, tables, figures and checks, as report.html, which needs no other file, and as report.md."""

from pathlib import Path

from fastsal.pages.page import Page
from fastsal.study import figures, results
from fastsal.study.attacks import ATTACKS
from fastsal.study.claims import checks, variations, verdicts
from fastsal.study.results import TABLE, WORKING, Study, summary


def tables(study: Study) -> list[list[dict[str, str]]]:
    """The models, for reading: robustness and the bound, then homogeneity."""
    first, second = [], []
    for result in study.results:
        cells = {symbol: f"{result.median(name):.3f}" for name, symbol in TABLE.items()}
        correlation = summary(result)["rank correlation of linearized_robustness and rho"]
        head = {"model": result.recipe.label, "accuracy": f"{result.accuracy:.3f}"}
        lengths = {
            symbol: cells[symbol] for symbol in ("ρ", "ρ in [0, 1]", "ρ̃", "α", "α†", "bound", "gap term", "offset term")
        }
        first.append(head | lengths | {"corr(ρ̃, ρ)": f"{correlation:.2f}"})
        second.append(head | {symbol: cell for symbol, cell in cells.items() if symbol not in lengths})
    return [first, second]


def attack_table(study: Study) -> list[dict[str, str]]:
    """How often each attack found the smallest perturbation of an image, model by model and altogether."""
    rows = []
    for result in study.results:
        row = summary(result)
        rows.append({"model": result.recipe.label} | {name: row[f"smallest by {name}"] for name in ATTACKS})
    total = {"model": "all"} | {name: sum(row[name] for row in rows) for name in ATTACKS}
    return [{name: str(cell) for name, cell in row.items()} for row in (*rows, total)]


def variation_table(study: Study) -> list[dict[str, str]]:
    """Whether the claims, by number, are confirmed as measured and in other circumstances, with the number that decides."""
    rows = []
    for name, other in {"as measured": study, **variations(study)}.items():
        found = [found for _, found in verdicts(other)]
        numbers = [one.number.replace(" ", "\N{NO-BREAK SPACE}") for one in found]
        cells = {
            f"claim {k}": f"{'yes' if one.confirmed else 'no'} ({number})"
            for k, (one, number) in enumerate(zip(found, numbers, strict=True), 1)
        }
        rows.append({"": name} | cells)
    return rows


def write(study: Study, out: Path) -> Path:
    """Figures, tables and report.html into the folder `out`; returns the page."""
    results.write(study, out)
    drawn = figures.write(study, out)
    page = Page("Adversarial robustness and saliency maps")
    page.paragraph(
        f"The study of Etmann, Lunz, Maass and Schönlieb (ICML 2019), reproduced by fastsal on {study.data}: "
        f"{len(study.results)} models trained on {study.training_images} images, and {study.images} of {study.test_images} "
        "test images analysed and attacked. Distances are Euclidean, in units of x: pixels from 0 to 1. ρ is the "
        f"smallest perturbation of {len(ATTACKS)} attacks ({', '.join(ATTACKS)}) that changes the prediction, an upper "
        "bound of the true robustness; pixels may leave [0, 1], as in its definition. α, β and homogeneity are for x with "
        "black at 0, not mean-centred, unless it says otherwise."
    )
    page.figure(drawn.pop("saliency"))
    page.heading("Verdicts")
    page.paragraph(
        f"Judged are the {len(study.working())} of {len(study.results)} models that keep {WORKING:.0%} of the plain one's "
        "accuracy. The acceptance criteria were fixed before anything was measured."
    )
    items = []
    for number, (claim, found) in enumerate(verdicts(study), 1):
        text = f"Found: {found.evidence}. Criterion: {claim.criterion}. Figure: {drawn[claim.figure].title}."
        items.append((f"{number}. {claim.text}: {'yes' if found.confirmed else 'no'}.", text))
    page.items(items)
    page.heading("Verdicts in other circumstances")
    page.paragraph(
        "The same claims, by number, judged by the same criteria on the same networks: with ρ of perturbations that keep "
        "every pixel in [0, 1], as DDN finds it, since the code that came with the paper attacks digits in this box; with the "
        "mean image of the training split at 0; with both; on one way of training alone; and with the models that lose their "
        "accuracy. In brackets is the number "
        "that decides, or the two numbers: of claim 1 the rank correlation and the ratio, of claims 2 and 5 the growth of ρ "
        "and of α. No number (nan): fewer than three models."
    )
    page.table(variation_table(study))
    page.heading("The models")
    page.paragraph(f"Medians over {study.images} test images; λ: double backpropagation, ε: adversarial training.")
    for rows in tables(study):
        page.table(rows)
    page.paragraph(
        "corr: rank correlation over the images. Bound: α + gap term ‖x‖·‖ḡ†−ḡ‖ + offset term |β†|/‖g†‖. Homogeneity: "
        "|⟨x,g⟩| / (|⟨x,g⟩| + |β|); degree: ⟨x,g⟩ / Ψ; † of the binarised logit."
    )
    page.heading("The attacks")
    page.paragraph("How many images each attack found the smallest perturbation of.")
    page.table(attack_table(study))
    page.heading("Checks")
    page.items([("", line) for line in checks(study)])
    for figure in drawn.values():
        page.heading(figure.title)
        page.figure(figure)
    page.paragraph("The numbers: models.csv has a row a model, images.csv a row a model and image.")
    return page.write(out / "report.html", f"fastsal study: {study.data}", out / "report.md")
