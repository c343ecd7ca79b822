"""The page of a study, report.html: one file that holds verdicts, tables, figures and checks and needs no other."""

import base64
import html
from pathlib import Path

from fastsal.files import replacing
from fastsal.study import figures, results
from fastsal.study.attacks import ATTACKS
from fastsal.study.claims import CORRELATED, checks, verdicts
from fastsal.study.results import TABLE, WORKING, Study, summary

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastsal study: {data}</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; color: #111; background: #fff }}
h1 {{ font-size: 1.5rem; line-height: 1.2 }}
h2 {{ font-size: 1.2rem; margin-top: 2rem }}
figure {{ margin: 0 }}
figure img {{ display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto }}
figcaption {{ color: #333; font-size: .95rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .85rem }}
th, td {{ padding: .2rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: #fff }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _table(rows: list[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def tables(study: Study) -> list[list[dict[str, str]]]:
    """The models, for reading: robustness and the bound, then homogeneity."""
    first, second = [], []
    for result in study.results:
        cells = {symbol: f"{result.median(name):.3f}" for name, symbol in TABLE.items()}
        correlation = summary(result)["rank correlation of linearized_robustness and rho"]
        head = {"model": result.recipe.label, "accuracy": f"{result.accuracy:.3f}"}
        lengths = {symbol: cells[symbol] for symbol in ("ρ", "ρ̃", "α", "α†", "bound", "gap term", "offset term")}
        first.append(head | lengths | {"corr(ρ̃, ρ)": f"{correlation:.2f}"})
        second.append(head | {symbol: cell for symbol, cell in cells.items() if symbol not in lengths})
    return [first, second]


def write(study: Study, out: Path) -> Path:
    """Figures, tables and report.html into the folder `out`; returns the page."""
    results.write(study, out)
    items = "".join(
        f"<li><b>{html.escape(claim)}: {'yes' if held else 'no'}</b>; {html.escape(evidence)}.</li>"
        for claim, held, evidence in verdicts(study)
    )
    count = len(study.working())
    parts = [
        "<h1>Adversarial robustness and saliency maps</h1>",
        f"<p>The study of Etmann, Lunz, Maass and Schönlieb (ICML 2019), reproduced by fastsal on {html.escape(study.data)}: "
        f"{len(study.results)} models trained on {study.training_images} images, and {study.images} of {study.test_images} "
        "test images analysed and attacked. Distances are Euclidean, in units of x: pixels from 0 to 1. ρ is the "
        f"smallest perturbation of {len(ATTACKS)} attacks ({', '.join(ATTACKS)}) that changes the prediction, an upper "
        "bound of the true robustness; pixels may leave [0, 1], as in its definition. α, β and homogeneity are for x with "
        "black at 0, not mean-centred.</p>",
        "<h2>What came out</h2>",
        f"<p>Over the {count} of {len(study.results)} models that keep {WORKING:.0%} of the plain one's accuracy; a rank "
        f"correlation counts from {CORRELATED} on, and ρ̃ approximates ρ where theirs is 0.8 or more and the median of ρ̃/ρ "
        "between 2/3 and 3/2:</p>",
        f"<ul>{items}</ul>",
        "<h2>The models</h2>",
        f"<p>Medians over {study.images} test images; λ: double backpropagation, ε: adversarial training.</p>",
        *map(_table, tables(study)),
        "<p>corr: rank correlation over the images. Bound: α + gap term ‖x‖·‖ḡ†−ḡ‖ + offset term |β†|/‖g†‖. Homogeneity: "
        "|⟨x,g⟩| / (|⟨x,g⟩| + |β|); degree: ⟨x,g⟩ / Ψ; † of the binarised logit.</p>",
    ]
    for title, svg, caption in figures.write(study, out):
        source = base64.b64encode(svg).decode()
        parts.append(
            f"<h2>{html.escape(title)}</h2><figure>"
            f'<img src="data:image/svg+xml;base64,{source}" alt="{html.escape(title)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    parts.append("<h2>Checks</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in checks(study)) + "</ul>")
    parts.append("<p>The numbers: models.csv has a row a model, images.csv a row a model and image.</p>")
    page = out / "report.html"
    with replacing(page) as file:
        file.write(PAGE.format(data=html.escape(study.data), body="\n".join(parts)).encode())
    return page
