"""Copies a finished study's results here, and writes its tables into docs/study.md.

    python -m bench study_results FOLDER

FOLDER is that of `fastsal study`. Its report.md, figures and tables go to bench/results/study. Between `<!-- NAME -->` and
`<!-- end -->` docs/study.md says what the tables there say: `study` the verdicts, `experiments` which of them change,
`contrasts` how the networks trained on adversarial examples see darker images, `photographs` the medians of photographs.csv.
"""

import argparse
import re
import shutil
from pathlib import Path

import numpy as np

from bench import RESULTS
from bench.tools.study_experiments import read

FOLDER = RESULTS / "study"
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "study.md"
COPIED = ("report.md", "models.csv", "images.csv", "saliency.png", "robustness.png", "alignment.png", "homogeneity.png",
          "bound.png", "accuracy.png")  # fmt: skip
SYMBOLS = {
    "linearized_robustness": "ρ̃",
    "alignment": "α",
    "gap_term": "gap term",
    "offset_term": "offset term",
    "bound": "bound",
    "cosine": "cosine",
    "homogeneity": "homogeneity",
}


def markdown(rows: list[dict[str, str]]) -> str:
    """A table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def study() -> str:
    """What was trained, and the verdicts, as report.md has them."""
    report = (FOLDER / "report.md").read_text(encoding="utf-8")
    trained = re.search(r"on (\w+): (\d+ networks for each of .*? analysed and attacked\.)", report)
    section = report.partition("## Verdicts\n")[2].partition("\n## ")[0]
    assert trained
    judged = section.strip().partition("\n")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    return f"`--data {trained[1]}`: {trained[2]} {judged}\n\n{table}"


def experiments() -> str:
    """A row a change, a column a claim."""
    judged, rows = read(FOLDER / "experiments_claims.csv"), dict[str, dict[str, str]]()
    for one in judged:
        cells = rows.setdefault(one["change"], {"": one["change"]})
        cells[one["claim"]] = f"{one['confirmed']}, {float(one['number'] or 'nan'):.2f}"
    return f"`--data {judged[0]['data']}`:\n\n{markdown(list(rows.values()))}"


def contrasts() -> str:
    """The cosine of images and saliency maps of the networks trained on adversarial examples, at each contrast."""
    rows = [row for row in read(FOLDER / "experiments.csv") if row["change"] == "adversarial training"]
    shown = ["accuracy", "rho", *(name for name in rows[0] if name.startswith("cosine at")), "degree"]
    titles = {"rho": "ρ"}
    return markdown(
        [{"": row["network"]} | {titles.get(name, name): f"{float(row[name]):.3g}" for name in shown} for row in rows]
    )


def photographs() -> str:
    """The medians of each network over the photographs."""
    rows = read(FOLDER / "photographs.csv")
    table = []
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        medians = {symbol: np.median([float(row[name]) for row in own]) for name, symbol in SYMBOLS.items()}
        table.append({"": network} | {symbol: f"{value:.3g}" for symbol, value in medians.items()})
    return markdown(table)


BLOCKS = {"study": study, "experiments": experiments, "contrasts": contrasts, "photographs": photographs}


def filled(text: str) -> str:
    """The guide with what its blocks say now."""
    for name, block in BLOCKS.items():
        pattern = rf"(<!-- {name} -->\n)(?:.*?\n)??(<!-- end -->)"
        text = re.sub(pattern, lambda found, block=block: f"{found[1]}{block()}\n{found[2]}", text, flags=re.S)  # type: ignore[misc]
    return text


def main() -> int:
    """The command line of `python -m bench study_results`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="of a finished study; without it, the tables are written anew"
    )
    arguments = parser.parse_args()
    if arguments.folder:
        for name in COPIED:
            shutil.copyfile(arguments.folder / name, FOLDER / name)
    GUIDE.write_text(filled(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0
