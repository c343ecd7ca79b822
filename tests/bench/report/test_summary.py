"""What the page begins with: its numbers, taken from the stored figures in another way, and what is said of other figures."""

import json
import re

import pytest

from bench import RESULTS, ROOT
from bench.report import summary


def stored(name):
    return list(json.loads((RESULTS / name).read_text(encoding="utf-8"))["records"].values())


@pytest.fixture
def sentence():
    """sentence(words): the one of the page's summary that begins with them."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("## What follows\n")[2]
    lines = text.partition("\n## ")[0].strip().splitlines()
    return lambda start: next(line.removeprefix("- ") for line in lines if line.startswith(f"- {start}"))


def numbers(text):
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def test_photographs(sentence):
    said = sentence("On photographs")
    rows = {name: [] for name in ("fastsal certified", "fastsal candidates, 9", "foolbox DeepFool, all", "adv-lib FAB")}
    for record in stored("imagenet.json"):
        baseline = record["results"][0]["seconds"][1]
        for row in record["results"]:
            if row["implementation"] in rows:
                rows[row["implementation"]].append((row["seconds"][1] / baseline, row))
    fast = [1 / ratio for ratio, _ in rows["fastsal certified"]]
    few = [1 / ratio for ratio, _ in rows["fastsal candidates, 9"]]
    slow = [ratio for name in list(rows)[2:] for ratio, _ in rows[name]]
    passes = [row["passes"] for _, row in rows["fastsal certified"]]
    right = [row["equal"] for _, row in rows["fastsal certified"]]
    wanted = [1000, min(fast), max(fast), min(passes), max(passes), 1000, sum(right), 56, min(few), max(few)]
    assert numbers(said) == pytest.approx([*wanted, min(slow), max(slow)], rel=0.02)


def test_networks(sentence):
    gains = [one["seconds"]["exact rows"] / one["seconds"]["certified"] for one in stored("zoo.json")]
    middle = sorted(gains)[len(gains) // 2]
    wanted = [95, 200, 95, sum(gain > 1 for gain in gains), middle, min(gains), max(gains)]
    assert numbers(sentence("On 95 networks")) == pytest.approx(wanted, rel=0.01)


def test_awkward_inputs(sentence):
    (record,) = (record for record in stored("bench.json") if record["level"] == "edge")
    counts = {
        name: sum(answer != "right" for column, answer in answers.items() if column != "n = 1")
        for name, answers in record["rows"].items()
    }
    others = [count for name, count in counts.items() if "fastsal" not in name]
    assert numbers(sentence("For 14 awkward")) == [14, 0, 3, min(others), max(others)]


def test_wrong_answers_are_counted():
    columns = ["tie", "n = 1"]
    rows = {"fastsal cpu": {"tie": "0", "n = 1": "ValueError"}, "other": {"tie": "right", "n = 1": "ValueError"}}
    record = {"columns": columns, "truth": {"tie": ["0", "0"]}, "rows": rows}
    assert "1 answers of fastsal's 1 backends are wrong, and 0 of" in summary.awkward([record])


def test_a_slower_kernel_is_said_to_be_slower():
    rows = [{"implementation": name, "ratio": [r, r, r]} for name, r in (("fastsal cpu", 1.0), ("other", 0.5))]
    said = summary.pairs([{"results": [row | {"status": "right"} for row in rows]}])
    assert said == "Between all pairs of logits, other ways take 0.50 times as long as fastsal's kernel."


def test_levels_without_figures_are_left_out():
    assert list(summary.follows({})) == []
