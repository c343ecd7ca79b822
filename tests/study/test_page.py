"""The page of a study: it needs no other file, and its captions say how many images were used."""

import csv
import html
import html.parser
import re
from pathlib import Path

import pytest
from study.small import LABELS

from fastsal.study import figures

NUMBER = r"-?\d+\.\d+(?:e-?\d+)?"


class Tags(html.parser.HTMLParser):
    """Every tag of a page with its attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_page_needs_nothing_else(study):
    text = (study / "report.html").read_text(encoding="utf-8")
    page = Tags(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == len(figures.FIGURES)
    assert all(image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] for image in images)
    assert not [attributes for _, attributes in page.tags if {"href", "srcset"} & set(attributes)]
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe")]
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"type": "module"}
    ]  # its text is in the page
    assert "url(" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_markdown_says_the_same(study):
    """Every paragraph, item and cell of report.html is in report.md, whose figures are files beside it."""
    markdown = (study / "report.md").read_text(encoding="utf-8")
    text = re.search("<body>(.*)<script", (study / "report.html").read_text(encoding="utf-8"), re.S)[1]
    parts = [html.unescape(part) for part in re.split("<[^>]*>", text)]
    assert len(parts) > 100
    assert not [part for part in parts if part.strip() not in markdown]
    files = re.findall(r"^!\[.+\]\((.+)\)$", markdown, re.M)
    assert [file.removesuffix(".png") for file in files] == list(figures.FIGURES)
    assert all((study / file).exists() for file in files)


def test_attacks_are_counted(study):
    """Every image of every model has one attack that found the smallest."""
    markdown = (study / "report.md").read_text(encoding="utf-8")
    section = markdown.partition("## The attacks")[2].partition("\n##")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    counts = {name: sum(map(int, cells)) for name, *cells in rows[2:]}
    assert counts == dict.fromkeys(LABELS, 24) | {"all": 24 * len(LABELS)}


def test_captions_count(study):
    captions = re.findall("<figcaption>(.*?)</figcaption>", (study / "report.html").read_text(encoding="utf-8"))
    assert len(captions) == len(figures.FIGURES)
    for name, caption in zip(figures.FIGURES, captions, strict=True):
        want = {"saliency": "5 test images", "saliency_all": "8 test images", "accuracy": "450 test images"}.get(
            name, "24 test images"
        )
        assert want in caption


@pytest.mark.parametrize(
    ("title", "tables", "least"),
    [
        ("Results on MNIST", ("report.md",), 25),
        ("Why alignment falls", ("experiments.csv", "experiments_claims.csv"), 25),
    ],
)
def test_the_guide_says_what_the_committed_tables_say(title, tables, least):
    """Every decimal of a section of the guide is one of the tables' numbers, rounded."""
    results = Path(__file__).resolve().parents[2] / "bench" / "results" / "study"
    text = "".join((results / name).read_text(encoding="utf-8") for name in tables).replace("−", "-")
    there = [float(number) for number in re.findall(NUMBER, text)]
    quoted = re.findall(NUMBER, _guide(title))
    assert len(quoted) > least
    for number in quoted:
        digits = len(number.partition(".")[2])
        assert ("e" in number and float(number) in there) or any(f"{one:.{digits}f}" == number for one in there), number


def test_the_guide_counts_the_attacks_as_the_committed_report_does():
    report = Path(__file__).resolve().parents[2] / "bench" / "results" / "study" / "report.md"
    counts = re.search(r"DDN found .*? none", _guide("Results on MNIST"), re.S)[0]
    assert {"514", "260", "14", "12"} <= set(re.findall(r"\d+", counts)) & set(
        re.findall(r"\d+", report.read_text("utf-8"))
    )


def test_the_guide_confirms_what_the_committed_table_confirms():
    """Of every change, the numbers of the claims that are confirmed, with black and with the mean image at 0."""
    table = Path(__file__).resolve().parents[2] / "bench" / "results" / "study" / "experiments_claims.csv"
    want = {}
    with table.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            want.setdefault(row["change"], {}).setdefault(row["at 0"], []).append(row["confirmed"] == "yes")
    bullets = re.findall(r"^- \*\*(.+?)[:,]\*\*(.+?)(?=^- |^$)", _guide("Why alignment falls"), re.M | re.S)
    found = {name[0].lower() + name[1:]: " ".join(text.split()) for name, text in bullets}
    assert found.keys() == want.keys() - {"as in the study"}
    for change, text in found.items():
        black, mean = (
            ", ".join(str(k) for k, yes in enumerate(want[change][at], 1) if yes) for at in ("black", "mean image")
        )
        assert text.endswith(f"Confirmed: {black}; mean image at 0: {mean}."), change


def _guide(title):
    """A section of docs/study.md."""
    guide = (Path(__file__).resolve().parents[2] / "docs" / "study.md").read_text(encoding="utf-8").replace("−", "-")
    return guide.partition(f"## {title}")[2].partition("\n## ")[0]
