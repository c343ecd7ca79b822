"""The least and the most robust examples of a table: their numbers, and their images and saliency maps where there are data."""

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal.evaluation import shards
from fastsal.evaluation.batches import Batches
from fastsal.evaluation.tables import NO_CLASS, Columns
from fastsal.files import one_line
from fastsal.model.calling import Model
from fastsal.model.linearization import linearize
from fastsal.pages import page, pictures
from fastsal.pages.distributions import QUANTITIES

SHOWN = 24  # from either end
PICTURES = {"image": "image", "saliency": "g", "binarized_saliency": "g†"}

Names = Callable[[int], str]


@dataclass(frozen=True)
class Example:
    """An example: its row in the table, its place from its end ("least 1"), its arrays by name, and what went wrong."""

    row: int
    place: str
    arrays: dict[str, Tensor]
    problem: str = ""


def ends(columns: Columns) -> list[tuple[int, str]]:
    """The rows of the least and of the most robust examples with their places. NaN is at neither end."""
    rho = columns["linearized_robustness"]
    rows = np.flatnonzero(~np.isnan(rho))
    rows = rows[np.argsort(rho[rows], kind="stable")]
    least, most = rows[:SHOWN], rows[SHOWN:][-SHOWN:][::-1]
    return [
        (int(row), f"{end} {k}") for end, part in (("least", least), ("most", most)) for k, row in enumerate(part, 1)
    ]


def collect(
    columns: Columns, found: Sequence[Path], batches: Batches | None, model: Model | None, target: str
) -> Iterator[Example]:
    """The examples at both ends, one at a time. Maps are those that were kept, else the model's."""
    for row, place in ends(columns):
        index = int(columns["index"][row])
        arrays: dict[str, Tensor] = {}
        problem = ""
        try:
            if batches is not None:
                arrays["image"] = batches.example(index)[0]
            for name in ("saliency", "binarized_saliency"):
                if (kept := shards.read_kept_one(found, name, index)) is not None:
                    arrays[name] = kept
            if model is not None and "binarized_saliency" not in arrays:
                classes = [int(columns[name][row]) for name in (target, "runner_up")]
                arrays |= maps(model, arrays["image"], classes)
        except Exception as error:  # of the data's or the model's own code; the numbers are there all the same
            problem = one_line(error)
        yield Example(row, place, arrays, problem)


def maps(model: Model, x: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
    """g and g† of one input [*S] for the class and its runner-up, which the table knows: two backward passes, no search."""
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    x = x.unsqueeze(0) if parameter is None else x.unsqueeze(0).to(parameter)
    with linearize(model, x) as graph:
        g, other = graph.rows(torch.tensor(classes, device=x.device).unsqueeze(1))[0].cpu()
    return {"saliency": g.reshape(x.shape[1:]), "binarized_saliency": (g - other).reshape(x.shape[1:])}


def limits(images: Sequence[Tensor]) -> tuple[float, float]:
    """What is black and what is white: 0 and 1 where all values are between, else the least and the largest."""
    known = [one[one.isfinite()] for one in images]
    low, high = (
        min((float(one.min()) for one in known if one.numel()), default=0.0),
        max((float(one.max()) for one in known if one.numel()), default=1.0),
    )
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _picture(name: str, array: Tensor, called: str, bounds: tuple[float, float]) -> str:
    source = pictures.of_input(array, *bounds) if name == "image" else pictures.of_map(array)
    small = max(array.shape[-2:]) <= pictures.PIXELATED
    alt = html.escape(f"{PICTURES[name]} of {called}")
    return f'<img{" class=pixels" if small else ""} src="{source}" alt="{alt}">'


def table(columns: Columns, examples: Sequence[Example], called: Names) -> str:
    """The examples as a table that can be sorted and filtered; on a narrow screen each is a card."""
    drawn = [
        name
        for name in PICTURES
        if any(pictures.is_image(tuple(one.arrays.get(name, torch.empty(0)).shape)) for one in examples)
    ]
    bounds = limits([one.arrays["image"] for one in examples if "image" in one.arrays])
    labelled = "y" in columns
    heads = ["end", "example", *(PICTURES[name] for name in drawn), "predicted", "nearest"]
    heads += ["true"] * labelled + [*QUANTITIES.values(), "passes"]
    rows = []
    for one in examples:
        cell: dict[str, Any] = {name: column[one.row] for name, column in columns.items()}
        name = cell.get("name") or str(cell["index"])
        tags = [one.place.split()[0]]
        problem = f"<br><small>{html.escape(one.problem)}</small>" if one.problem else ""
        cells = [one.place, html.escape(name) + problem]
        for kind in drawn:
            array = one.arrays.get(kind)
            cells.append("" if array is None else _picture(kind, array, name, bounds))
        cells += [html.escape(called(int(cell[kind]))) for kind in ("prediction", "runner_up")]
        if labelled:
            known, right = cell["y"] != NO_CLASS, cell["y"] == cell["prediction"]
            cells.append(f"{'✓' if right else '✗'} {html.escape(called(int(cell['y'])))}" if known else "")
            tags += ["right" if right else "wrong"] * bool(known)
        cells += [f"{cell[kind]:.4g}" for kind in QUANTITIES] + [str(cell["vjps"] + cell["jvps"])]
        labels = zip(heads, cells, strict=True)
        rows.append(
            f'<tr role="row" data-tags="{" ".join(tags)}">'
            + "".join(f'<td role="cell" data-label="{label}">{text}</td>' for label, text in labels)
            + "</tr>"
        )
    choices = {"both ends": "", "the least robust": "least", "the most robust": "most"}
    selects = _select("which", choices)
    if labelled:
        selects += _select("prediction", {"right or wrong": "", "right": "right", "wrong": "wrong"})
    fixed = set(PICTURES.values())
    head = "".join(
        f'<th role="columnheader" scope="col"{" data-fixed" if name in fixed else ""}>{name}</th>' for name in heads
    )
    return (
        f'<div class="broad"><form class="filter" hidden>{selects}{page.SEARCH}'
        '</form><div class="wide" tabindex="0" role="region" aria-label="least and most robust examples">'
        f'<table class="cards" role="table"><thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(rows)}</tbody></table></div></div>'
    )


def _select(label: str, choices: dict[str, str]) -> str:
    options = "".join(f'<option value="{value}">{text}</option>' for text, value in choices.items())
    return f"<label>{label} <select>{options}</select></label> "
