"""How the figures of a page are drawn: one width, one style, a legend that covers nothing."""

from typing import Any

from fastsal.files import extra

WIDTH = 4.2  # inches, of every figure: on a phone's screen the labels are then as large as the text
STYLE = {
    "svg.hashsalt": "fastsal",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def new(height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure so many inches high, and its panels one below the other (None for no row)."""
    figure = extra("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # inches: a panel's title stands clear of the labels above it
    return figure, figure.subplots(rows, squeeze=False)[:, 0] if rows else None


def style() -> Any:
    """The style, as a context to draw and write in."""
    return extra("matplotlib").rc_context(STYLE)


def legend(figure: Any, ax: Any, columns: int) -> None:
    """The legend of a panel, above the figure, where it covers nothing."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=8)
