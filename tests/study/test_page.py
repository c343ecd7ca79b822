"""The page of a study: it needs no other file, and its captions say how many images were used."""

import html
import html.parser
import re

from study.small import IMAGES, LABELS, SEEDS

from fastsal.study import figures
from fastsal.study.claims import spread, verdicts


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


def table(markdown, title):
    """The cells of the first table below a heading."""
    section = markdown.partition(f"## {title}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]


def test_attacks_are_counted(study):
    """Every image of every network has one attack that found the smallest."""
    rows = table((study / "report.md").read_text(encoding="utf-8"), "The attacks")[2:]
    assert {name: sum(map(int, cells[:-1])) for name, *cells in rows} == dict.fromkeys(LABELS, IMAGES * len(SEEDS))


def test_verdicts_and_medians(study, studies):
    markdown = (study / "report.md").read_text(encoding="utf-8")
    for number, (row, verdict) in enumerate(zip(table(markdown, "Verdicts")[2:], verdicts(studies), strict=True), 1):
        assert row == [f"{number}. {verdict.claim.text}", verdict.confirmed, verdict.evidence, verdict.claim.whose]
    (_, _, *rows) = table(markdown, "The networks")
    first = [[study.results[slot].median("rho") for study in studies] for slot in range(len(LABELS))]
    assert [row[2] for row in rows[: len(LABELS)]] == [spread(values) for values in first]


def test_captions_count(study):
    captions = re.findall("<figcaption>(.*?)</figcaption>", (study / "report.html").read_text(encoding="utf-8"))
    assert len(captions) == len(figures.FIGURES)
    for name, caption in zip(figures.FIGURES, captions, strict=True):
        want = {"accuracy": "450 test images"}
        assert want.get(name, f"{IMAGES} test images") in caption
