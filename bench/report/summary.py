"""What follows from the stored figures, in sentences whose every number is computed from them."""

from collections.abc import Iterable, Iterator
from statistics import median

from bench.report.studies import NETWORKS, NORMS, faster
from bench.report.tables import NEAR
from bench.report.words import Record, count, span, times


def rows(records: Iterable[Record], name: str) -> list[Record]:
    """The rows of an implementation, of every record that has a time for it."""
    return [row for one in records for row in one["results"] if row["implementation"] == name and "ratio" in row]


def ratios(found: list[Record]) -> list[float]:
    """How many times the baseline's time rows have."""
    return [row["ratio"][1] for row in found]


def gains(found: list[Record]) -> list[float]:
    """How many times as fast as the baseline rows are."""
    return [1 / ratio for ratio in ratios(found)]


def others(records: list[Record]) -> list[Record]:
    """The rows of what is not fastsal's and looks at every class."""
    names = dict.fromkeys(row["implementation"] for one in records for row in one["results"])
    found = [row for name in names if not name.startswith("fastsal") for row in rows(records, name)]
    return [row for row in found if "9 classes" not in row.get("what", "")]


def short(value: float) -> str:
    """Two digits."""
    return f"{value:.2g}"


def whole(value: float) -> str:
    """Without decimals."""
    return f"{value:.0f}"


def photographs(records: list[Record]) -> str:
    """Certified and top-k candidates on ImageNet."""
    certified = rows(records, "fastsal certified")
    equal, asked = (sum(row[key] for row in certified) for key in ("equal", "images"))
    passes = span([row["passes"] for row in certified], whole)
    return (
        f"On photographs and a network of 1000 classes, `certified` is {span(gains(certified))} times as fast as exact rows, "
        f"in {passes} passes an image instead of 1000, and {equal} of {asked} answers are exact. Nine candidates are "
        f"{span(gains(rows(records, 'fastsal candidates, 9')))} times as fast and certify nothing. Attacks that look at every "
        f"class take {span(ratios(others(records)))} times as long as exact rows."
    )


def candidates(records: list[Record]) -> str:
    """How often top-k candidates are wrong, and certified."""
    found = [record for record in records if record["case"].split(", ")[1] in NETWORKS]
    few = [record["candidates"]["top-10"] for record in found]
    right, images = (sum(record[key] for record in found) for key in ("same runner-up as exact", "images"))
    calibration = [row for one in records if one["case"].endswith("calibration") for row in one["rows"]]
    share, medians = [100 * one["share wrong"] for one in few], []
    fast = [one["times faster than exact rows"]["certified"] for one in found]
    for norm in NORMS:
        passes = [one["passes"]["certified"]["median"] for one in found if one["case"].startswith(norm)]
        medians.append(f"{span(passes, whole)} ({norm})")
    return (
        f"On small networks of 1000 classes, trained for the purpose, `certified` takes medians of {' and '.join(medians)} "
        f"passes, is {span(fast)} times as fast as exact rows, and finds the nearest class in {right} of {images} cases. The "
        f"ten highest logits besides the predicted one miss it in {span(share, lambda value: f'{value:.3g}')} % of cases, and "
        f"overestimate ρ̃ by up to {max(one['largest excess'] for one in few):.0%}. Of statements about random Jacobians that "
        f"may be false in 20 % of cases, at most {max(row['misses'] / row['trials'] for row in calibration):.1%} are."
    )


def networks(records: list[Record]) -> str:
    """Certified on timm's networks."""
    found = [record for record in records if "failed" not in record]
    right = sum(record["equal"] == record["certified"] == record["examples"] for record in found)
    gain = [faster(record) for record in found]
    return (
        f"On {len(records)} networks of timm with random weights and {found[0]['classes']} classes, {right} have equal and "
        f"certified answers only. With so few classes and the smallest images `certified` gains less: it is faster than exact "
        f"rows on {sum(value > 1 for value in gain)}, {times(median(gain))} times at the median, from {span(gain)} times."
    )


def models(records: list[Record]) -> str:
    """Methods and baselines on the models of the model level."""
    said = [f"{times(*ratios(rows([record], 'fastsal certified')))} on {record['case']}" for record in records]
    wrong = sorted({row["implementation"] for one in records for row in one["results"] if row["status"] == "wrong"})
    theirs, ours = others(records), rows(records, "fastsal exact")
    memory = [max((row.get("peak memory") or 0) / 2**20 for row in some) for some in (theirs, ours)]
    return (
        f"From a model, `certified` takes these multiples of the time of `exact`: {'; '.join(said)}. Other ways to every class "
        f"take {span(ratios(theirs))}"
        + (f", and up to {memory[0]:.0f} MiB where `exact` takes {memory[1]:.0f}." if all(memory) else ".")
        + (f" Wrong answers come from {', '.join(wrong)}." if wrong else "")
    )


def jacobians(records: list[Record]) -> str:
    """The kernel beside what memory allows."""
    large = [record for record in records if record["bytes"] > 1e8]
    said = []
    for threads in sorted({record["threads"] for record in large}):
        some = [record for record in large if record["threads"] == threads]
        names = "fastsal cpu", "torch.compile", "torch.cdist, direct", "eager torch"
        found = [f"{name} {span(gains(rows(some, name)), short)}" for name in names if rows(some, name)]
        said.append(f"{'; '.join(found)} ({count(threads)})")
    return f"From a large Jacobian, as fractions of the speed of a pure read: {'; '.join(said)}."


def pairs(records: list[Record]) -> str:
    """All pairs of logits, and what products of rows lose."""
    names = dict.fromkeys(row["implementation"] for row in others(records))
    lost = [name for name in names if any(row.get(NEAR, 0) > 1e-2 for row in rows(records, name))]
    return (
        f"Between all pairs of logits, other ways take {span(ratios(others(records)))} times as long as fastsal's kernel."
        + (f" The distances of near-identical rows are lost by {', '.join(lost)}." if lost else "")
    )


def awkward(records: list[Record]) -> str:
    """Answers for awkward inputs with two classes or more."""
    (record,) = records
    wrong = {
        name: sum(answers[column] != "right" for column in record["truth"]) for name, answers in record["rows"].items()
    }
    ours, theirs = (
        [count for name, count in wrong.items() if name.startswith("fastsal") == mine] for mine in (True, False)
    )
    return (
        f"For {len(record['truth'])} awkward inputs, {sum(ours)} answers of fastsal's {len(ours)} backends are wrong, and "
        f"{span(theirs, whole)} of every other implementation."
    )


SAY = {
    "imagenet": photographs,
    "certified": candidates,
    "zoo": networks,
    "model": models,
    "tensor": jacobians,
    "pairs": pairs,
    "edge": awkward,
}


def follows(found: dict[str, list[Record]]) -> Iterator[str]:
    """What is to be said of every level that has figures."""
    for level, say in SAY.items():
        if level in found:
            yield f"- {say(found[level])}"
