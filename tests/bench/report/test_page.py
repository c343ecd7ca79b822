"""The pages of figures and the README's part: what the stored figures say, nothing else, and readable on a narrow page."""

import json
import re
import shutil

import pytest

from bench import RESULTS, ROOT
from bench.cases import imagenet, model, pairs
from bench.harness import memory
from bench.harness.store import Store
from bench.report import page, tables, words


@pytest.fixture
def home(tmp_path):
    """A folder with a README that wants figures."""
    (tmp_path / "README.md").write_text(f"# x\n\n{page.BEGIN}\nold\n{page.END}\n\ntail\n")
    return tmp_path


@pytest.fixture
def figures(home, measured, work_on_a_jacobian, monkeypatch):
    """The same folder with a few figures of every level."""
    monkeypatch.setattr("bench.harness.store.commit", lambda: "abc")
    monkeypatch.setattr(memory, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(imagenet, "BUDGET", 0.0)
    store, photographs = Store(home / "bench.json").begin(), Store(home / "imagenet.json").begin()
    store.write("a", measured(work_on_a_jacobian()))
    store.write("b", measured(model.work("", tiny=True), "model"))
    store.write("c", measured(pairs.forward((3, 30, 50), tiny=True), "pairs"))
    store.write("d", edge())
    (case,) = imagenet.cases(quick=True)
    photographs.write("4", case.record())
    return home


def records():
    """Every stored record that the page shows implementations of."""
    files = [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in ("bench.json", "imagenet.json")]
    return [record for file in files for record in file["records"].values() if "results" in record]


def edge():
    stored = json.loads((RESULTS / "bench.json").read_text(encoding="utf-8"))["records"]
    return next(record for record in stored.values() if record["level"] == "edge")


PAGES = [f"docs/benchmarks/{name}.md" for name in page.QUESTIONS]


def the_pages():
    """One after the other."""
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in PAGES)


def test_writes_page_readme_and_plots(figures, monkeypatch, capsys):
    readme, written = figures / "README.md", figures / "docs" / "benchmarks.md"
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert page.main(figures, figures) == 1
    assert capsys.readouterr().out.startswith("stale: docs/benchmarks.md, docs/benchmarks/kernel.md, ")
    assert "old" in readme.read_text()
    monkeypatch.setattr("sys.argv", ["report"])
    assert page.main(figures, figures) == 0
    before = readme.read_text(), written.read_text()
    assert before[0].startswith(f"# x\n\n{page.BEGIN}")
    assert before[0].endswith(f"{page.END}\n\ntail\n")
    assert "old" not in before[0]
    assert "EfficientNet-Lite0" in before[0]
    assert before[1].index("## What follows") < before[1].index("## How to measure")
    pages = {path.stem: path.read_text() for path in (figures / "docs" / "benchmarks").iterdir()}
    assert pages.keys() == {"kernel", "passes", "peers"}  # there are no networks of timm
    for name, text in pages.items():
        question, sentence, picture, section = text.split("\n\n")[:4]
        assert question == f"# {page.QUESTIONS[name][0]}"
        assert sentence in before[1]
        assert picture.endswith(f"(../../bench/results/{page.QUESTIONS[name][1][0]}.png)")
        assert text.count(picture.partition("(")[2]) == 1
        assert section.startswith("## ")
        assert f"({page.PAGE.stem}/{name}.md)" in before[1]
    assert "commit abc" in before[0]
    assert {path.name for path in figures.glob("*.png")} == {"imagenet.png", "tensor.png", "pairs.png", "model.png"}
    assert pages["kernel"].count("fastsal triton skipped: ") == 2
    assert page.main(figures, figures) == 0
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert page.main(figures, figures) == 0
    assert (readme.read_text(), written.read_text()) == before


def test_without_figures_or_markers_nothing_is_written(home, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report"])
    before = (home / "README.md").read_text()
    assert page.main(home, home) == 1
    assert "holds no figures of imagenet, model: " in capsys.readouterr().err
    for name in ("bench.json", "imagenet.json"):
        shutil.copy(RESULTS / name, home)
    for text in (before.replace(page.END, ""), before + page.BEGIN, f"{page.END} {page.BEGIN}"):
        (home / "README.md").write_text(text)
        assert page.main(home, home) == 1
        assert "wants one line" in capsys.readouterr().err
        assert (home / "README.md").read_text() == text
    assert not (home / "docs").exists()


def test_the_page_and_the_readme_say_what_the_figures_say():
    texts = page.documents(RESULTS, (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(map(str, texts)) == sorted(["README.md", "docs/benchmarks.md", *PAGES])
    for name, text in texts.items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name} is stale: run `python -m bench report`"


def test_every_time_error_and_memory_is_on_the_page_in_its_row_and_column():
    text, seen = the_pages(), 0
    for record in records():
        _, _, section = text.partition(f"\n## {tables.SECTIONS[record['level']].title}\n")
        section = section.partition("\n## ")[0]
        every = section.partition("<details>")[2]
        heads, _, *lines = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in every.splitlines() if line.startswith("| ")
        )
        titles = [place for place, line in enumerate(lines) if line[0].startswith("**")]
        start = next(place for place in titles if lines[place][0].startswith(f"**{record['case']}**"))
        end = next((place for place in titles if place > start), None)
        found = {line[0].partition(": ")[0]: dict(zip(heads, line, strict=True)) for line in lines[start + 1 : end]}
        time = next(name for name in heads if name.startswith(words.count(record["threads"])))
        for row in record["results"]:
            if row["status"] == "skipped":
                assert row["implementation"] not in found
                continue
            shown = found[row["implementation"]]
            if "seconds" not in row:
                assert shown[time] == row["status"]
                continue
            seen += 1
            low, middle, high = map(words.times, row["ratio"])
            assert shown[time].startswith(f"{words.seconds(row['seconds'][1])}, {middle}")
            assert shown[time].endswith(f" ({low} to {high})") or row["ratio"][0] == row["ratio"][2]
            if "error" in row:
                assert shown["error"] == f"{row['error']:.1e}"
            if "peak memory" in row:
                assert shown["peak memory"] == f"{row['peak memory'] / 2**20:.0f} MiB"
        assert record["commit"] in section
        assert record["date"] in section
    assert seen > 250


def test_every_wrong_answer_for_an_awkward_input_is_on_the_pages():
    text, record = the_pages().partition("## Awkward inputs")[2].partition("\n## ")[0], edge()
    lines = {
        name: line for line in text.splitlines() if line.startswith("- ") for name in record["rows"] if name in line
    }
    for name, answers in record["rows"].items():
        said = lines[name].partition(f"{name}")[2].partition(": ")[2].replace("gradients of ", "")
        told = {
            column: answer
            for answer, _, columns in (part.rpartition(" for ") for part in said.split("; "))
            for column in columns.split(", ")
        }
        wrong = {column: answer for column, answer in answers.items() if answer != "right"}
        assert told == {column.removeprefix("gradients of "): answer for column, answer in wrong.items()}


def test_every_network_is_on_the_pages():
    text = the_pages().partition("## Certified on networks of timm")[2]
    found = json.loads((RESULTS / "zoo.json").read_text(encoding="utf-8"))["records"].values()
    for record in found:
        gain = record["seconds"]["exact rows"] / record["seconds"]["certified"]
        assert f" {record['case']} {record['passes']:.0f}, {words.times(gain)}×" in text
        assert (f" {record['case']} ({record['instability']:.0e})" in text) == (record["instability"] > 1e-3)


@pytest.mark.parametrize("name", [*PAGES, "README.md"])
def test_no_table_scrolls_sideways(name):
    """A column is at least as wide as its longest word; 800 pixels are what a page of 900 leaves, 8.5 a generous letter."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "README.md":
        text = text.partition(page.BEGIN)[2].partition(page.END)[0]
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert found
    for table in found:
        columns = list(zip(*(line[1:-1].split("|") for line in table.splitlines()), strict=True))
        longest = [
            max(len(word) for cell in (*cells[:1], *cells[2:]) for word in cell.split() or [""]) for cells in columns
        ]
        assert sum(8.5 * length + 27 for length in longest) <= 800, table
        assert name != "README.md" or len(columns) <= 5


def test_everything_in_a_record_is_printed():
    record = {"level": "certified", "case": "p = 2, growth", "threads": 1, "rows": [{"n": 10}, {"n": 30}], "loss": 0.5}
    said = tables.everything(record).splitlines()
    assert said == ["certified: p = 2, growth, 1 thread", "  rows: {'n': 10}", "  rows: {'n': 30}", "  loss: 0.5"]
