"""docs/benchmarks.md and the README's part: what the stored figures say, nothing else, and readable on a narrow page."""

import json
import re

import pytest

from bench import RESULTS, ROOT
from bench.cases import imagenet, model, pairs
from bench.harness.store import Store
from bench.report import page


@pytest.fixture
def home(tmp_path):
    """A folder with a README that wants figures."""
    (tmp_path / "README.md").write_text(f"# x\n\n{page.BEGIN}\nold\n{page.END}\n\ntail\n")
    return tmp_path


@pytest.fixture
def figures(home, measured, work_on_a_jacobian, monkeypatch):
    """The same folder with a few figures of every level."""
    store = Store(home / "bench.json")
    store.begin(fresh=True)
    store.put("a", measured(work_on_a_jacobian()), "abc")
    store.put("b", {**measured(model.work("", tiny=True)), "level": "model"}, "abc")
    store.put("c", {**measured(pairs.forward((3, 30, 50), tiny=True)), "level": "pairs"}, "abc")
    photographs = Store(home / "imagenet.json")
    photographs.begin(fresh=True)
    monkeypatch.setattr(imagenet, "in_fresh_process", imagenet.peak_memory)
    monkeypatch.setattr(imagenet, "BUDGET", 0.0)
    photographs.put("4", imagenet.record("batches of 4", tiny=True), "abc")
    store.put("edge", json.loads((RESULTS / "bench.json").read_text(encoding="utf-8"))["records"]["edge"], "abc")
    return home


def test_writes_page_readme_and_plots(figures, monkeypatch, capsys):
    readme, written = figures / "README.md", figures / "docs" / "benchmarks.md"
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert page.main(figures, figures) == 1
    assert capsys.readouterr().out.startswith("stale: docs/benchmarks.md, README.md; ")
    assert "old" in readme.read_text()
    monkeypatch.setattr("sys.argv", ["report"])
    assert page.main(figures, figures) == 0
    before = readme.read_text(), written.read_text()
    assert before[0].startswith(f"# x\n\n{page.BEGIN}")
    assert before[0].endswith(f"{page.END}\n\ntail\n")
    assert "old" not in before[0]
    assert "EfficientNet-Lite0" in before[0]
    assert before[1].index("## Trained on ImageNet") < before[1].index("## From a Jacobian")
    assert "commit abc" in before[0]
    assert {path.name for path in figures.glob("*.png")} == {"imagenet.png", "tensor.png", "pairs.png", "model.png"}
    assert before[1].count("fastsal triton skipped: ") == 2
    assert page.main(figures, figures) == 0
    monkeypatch.setattr("sys.argv", ["report", "--check"])
    assert page.main(figures, figures) == 0
    assert (readme.read_text(), written.read_text()) == before


def test_without_figures_or_markers_nothing_is_written(home, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report"])
    before = (home / "README.md").read_text()
    assert page.main(home, home) == 1
    assert "holds no figures" in capsys.readouterr().err
    (home / "bench.json").write_bytes((RESULTS / "bench.json").read_bytes())
    for text in (before.replace(page.END, ""), before + page.BEGIN, f"{page.END} {page.BEGIN}"):
        (home / "README.md").write_text(text)
        assert page.main(home, home) == 1
        assert "wants one line" in capsys.readouterr().err
        assert (home / "README.md").read_text() == text
    assert not (home / "docs").exists()


def test_the_page_and_the_readme_say_what_the_figures_say():
    texts = page.documents(RESULTS, (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(map(str, texts)) == ["README.md", "docs/benchmarks.md"]
    for name, text in texts.items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name} is stale: run `python -m bench report`"


def test_every_figure_is_on_the_page():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    files = [json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in ("bench.json", "imagenet.json")]
    records = [record for file in files for record in file["records"].values()]
    timed = [row for record in records if record["level"] != "edge" for row in record["results"] if "seconds" in row]
    details = text.partition("## Every case")[2]
    assert len(re.findall(r"^\|.*\| +[\d.]+ (?:s|ms|µs) \|", details, re.M)) == len(timed) > 100
    for record in records:
        if record["level"] != "edge":
            assert f"{record['level']}: {record['case']}, {record['threads']} thread" in details
            assert f"commit {record['commit']}; {record['date']}" in details


@pytest.mark.parametrize("name", ["docs/benchmarks.md", "README.md"])
def test_no_table_scrolls_sideways(name):
    """A column is at least as wide as its longest word; 800 pixels are what a page of 900 leaves, 8.5 a generous letter."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "README.md":
        text = text.partition(page.BEGIN)[2].partition(page.END)[0]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert tables
    for table in tables:
        columns = list(zip(*(line[1:-1].split("|") for line in table.splitlines()), strict=True))
        words = [
            max(len(word) for cell in (*cells[:1], *cells[2:]) for word in cell.split() or [""]) for cells in columns
        ]
        assert sum(8.5 * length + 27 for length in words) <= 800, table
        assert name != "README.md" or len(columns) <= 5
