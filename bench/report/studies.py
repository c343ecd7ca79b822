"""What bench/cases/certified.py and bench/cases/zoo.py found, in tables."""

from collections.abc import Callable
from statistics import median

from bench.baselines.zoo import FAMILIES
from bench.report.words import Record, count, span, table, times

NETWORKS = {
    "narrow": "192 features, loss near zero",
    "wide": "1536 features, loss near zero",
    "plain": "192 features, noisy images",
}
NORMS = ("p = 2", "p = ∞")
Columns = dict[str, Callable[[Record], str]]
UNSTABLE = 1e-3  # a gradient that differs by more, relative to its norm, when its image comes in another batch


def networks(found: dict[str, Record]) -> str:
    """Methods on trained networks, by what the columns are called."""
    methods = list(dict.fromkeys(method for one in found.values() for method in one["passes"]))

    def cell(network: Record, method: str) -> str:
        if method not in network["passes"]:
            return ""
        passes, faster = network["passes"][method], network["times faster than exact rows"][method]
        return f"{passes['median']:.0f} ({passes['p95']:.0f}), {times(faster)}×"

    def missed(network: Record, few: str) -> str:
        return f"{network['candidates'][few]['share wrong']:.1%}, {network['candidates'][few]['largest excess']:.0%}"

    lines: dict[str, Callable[[Record], str]] = {
        "accuracy of the network": lambda one: f"{one['accuracy']:.1%}",
        "certified gives the exact answer": lambda one: f"{one['same runner-up as exact']} of {one['images']}",
    }
    rows = [[method, *(cell(one, method) for one in found.values())] for method in methods]
    rows += [[name, *map(line, found.values())] for name, line in lines.items()]
    rows += [
        [f"{few} candidates: share wrong, worst excess", *(missed(one, few) for one in found.values())]
        for few in ("top-1", "top-5", "top-10")
    ]
    return table(["", *found], rows)


def certified(records: list[Record]) -> list[str]:
    """Trained networks of 1000 classes in both norms, how passes grow with the classes, and how often it errs."""
    parts = {tuple(record["case"].split(", ", 1)): record for record in records}
    trained = {f"{norm}: {words}": parts[norm, name] for norm in NORMS for name, words in NETWORKS.items()}
    batches: Columns = {
        "passes, mean": lambda row: f"{row['passes']:.0f}",
        "times faster": lambda row: times(row["faster"]),
        "rows a pass": lambda row: f"{row['rows a pass']:.2f}",
    }
    limits: Columns = {
        "lower bound": lambda row: f"{row['lower']:.2f} ({row['least lower']:.2f})",
        "value": lambda row: f"{row['value']:.2f} ({row['largest value']:.2f})",
        "certified": lambda row: f"{row['certified']:.0%}",
    }
    growth: Columns = {"": lambda row: f"{row['median']:.0f} ({row['p95']:.0f})"}
    grown = {norm: parts[norm, "growth"]["rows"] for norm in NORMS}
    grown["p = ∞, directions along the coordinates"] = parts[NORMS[1], "growth along the coordinates"]["rows"]
    right, asked = (
        sum(row[key] for some in grown.values() for row in some) for key in ("certified and right", "examples")
    )
    return [
        "Passes an example, median (95th percentile), and how many times faster than exact rows, on networks trained for the "
        f"purpose, {count(records[0]['threads'])}:",
        networks(trained),
        "The first of these networks once its derivative has been traced, by the size of the batch: passes, times faster than "
        "exact rows, and what a pass costs in exact rows of the same batch:",
        _beside("batch", {norm: parts[norm, "batches"]["rows"] for norm in NORMS}, batches),
        "The same network under a limit of passes: the lower bound and the value found, relative to ρ̃, median (worst image):",
        _beside("limit", {norm: parts[norm, "limits"]["rows"] for norm in NORMS}, limits),
        "Passes of certified as the classes n grow, median (95th percentile), on random Jacobians with a falling spectrum; "
        f"{right} of {asked} are certified and right:",
        _beside("n", grown, growth),
        "How often something false was said (a wrong answer called certified, or a lower bound above the truth) of random "
        "Jacobians, at a failure probability of 0.2 that allows one in five, with the 95 % confidence interval, and how many "
        "were certified, without a limit of passes and with one:",
        _calibration({norm: parts[norm, "calibration"]["rows"] for norm in NORMS}),
    ]


def _beside(key: str, found: dict[str, list[Record]], columns: Columns) -> str:
    """Lists of rows that agree in `key`, side by side."""
    heads = [f"{name}: {column}" if column else name for name in found for column in columns]
    rows = [
        [f"{same[0][key]:.0f}", *(show(row) for row in same for show in columns.values())]
        for same in zip(*found.values(), strict=True)
    ]
    return table([key, *heads], rows)


def _calibration(found: dict[str, list[Record]]) -> str:
    """A line for each kind of Jacobians, with a limit and without side by side."""
    lines: dict[str, list[str]] = {}
    for norm, rows in found.items():
        for row in rows:
            low, high = row["interval"]
            lines.setdefault(f"{row['kind'].replace('_', ' ')}, {norm}", []).extend(
                (
                    f"{row['certified']} of {row['trials']}",
                    f"{row['misses'] / row['trials']:.1%} ({low:.1%} to {high:.1%})",
                )
            )
    limits = list(dict.fromkeys(row["max_passes"] for rows in found.values() for row in rows))
    heads = [
        f"{f'limit {limit}' if limit else 'no limit'}: {what}" for limit in limits for what in ("certified", "false")
    ]
    return table(["Jacobians", *heads], [[name, *cells] for name, cells in lines.items()])


def faster(found: Record) -> float:
    """How many times as fast as exact rows a network of timm is certified."""
    return float(found["seconds"]["exact rows"] / found["seconds"]["certified"])


def _family(name: str, some: list[Record]) -> list[str]:
    """A row of a table: median (least to largest) of every figure."""

    def cell(values: list[float], show: Callable[[float], str] = times) -> str:
        return f"{show(median(values))} ({span(values, show)})"

    return [
        name,
        str(len(some)),
        cell([found["passes"] for found in some], lambda value: f"{value:.0f}"),
        *(cell([found[key] for found in some]) for key in ("pass", "exact pass")),
        cell([faster(found) for found in some]),
    ]


def zoo(records: list[Record]) -> list[str]:
    """Networks of timm: families side by side, and every network in a few words."""
    whole = [found for found in records if "failed" not in found]
    ((examples, classes),) = {(found["examples"], found["classes"]) for found in whole}
    equal, certain = (sum(found[key] == found["examples"] for found in whole) for key in ("equal", "certified"))
    some = {family: [found for found in whole if found["case"] in names] for family, names in FAMILIES.items()}
    remarks = {
        "The gradient of an image differs when another image shares its batch, relative to its norm": [
            f"{found['case']} ({found['instability']:.0e})" for found in whole if found["instability"] > UNSTABLE
        ],
        "Warned of": [f"{found['case']} ({'; '.join(found['warnings'])})" for found in whole if found["warnings"]],
        "Failed": [f"{found['case']}, {found['failed']} ({found['where']})" for found in records if "failed" in found],
    }
    head = ["family", "networks", "passes", "price of a pass", "price of an exact row", "times as fast as exact rows"]
    return [
        f"{len(records)} networks with seeded random weights, {classes} classes and {examples} random images of the smallest "
        f"size that they take. The answers of {equal} are equal to those of exact rows, {certain} are certified. The price of "
        "a pass is its time in units of a backward pass of one class through a recorded batch, for each image of it. Medians, "
        "and from the least to the largest:",
        table(head, [_family(family, found) for family, found in some.items() if found]),
        *(f"{remark}: {', '.join(names)}." for remark, names in remarks.items() if names),
        "<details><summary>Every network: passes, and how many times as fast as exact rows</summary>",
        *(
            f"{family}: " + "; ".join(f"{one['case']} {one['passes']:.0f}, {times(faster(one))}×" for one in found)
            for family, found in some.items()
            if found
        ),
        "</details>",
    ]
