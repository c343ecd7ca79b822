"""Plots of `Geometry` results: one quantity against another, saliency maps. Needs matplotlib, on first use only.

Results come one at a time, or as a mapping from a name, which the legend shows, to each. `fastsal.load` gives the results in
a folder that `fastsal.evaluate` wrote. A quantity is the name of a scalar of `Geometry`, or values of your own: [B] for one
result, a mapping from the same names for several. Every function draws on the axes that it is given, or on new ones, and
returns them. The colours can be told apart by colour-blind readers.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastsal import files
from fastsal.tensor.geometry import Geometry

Results = Geometry | Mapping[str, Geometry]
Values = np.ndarray[Any, np.dtype[np.float64]]
Quantity = str | Any  # the name of a scalar of Geometry, or values

# Okabe and Ito's palette, black first.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABELS = {
    "linearized_robustness": "linearised robustness ρ̃ (units of x)",
    "alignment": "alignment α (units of x)",
    "cosine": "cosine |⟨x,g⟩| / (‖x‖ ‖g‖)",
    "binarized_alignment": "binarised alignment α† (units of x)",
    "bound": "bound of ρ̃ (units of x)",
    "homogeneity": "homogeneity |⟨x,g⟩| / (|⟨x,g⟩| + |β|)",
    "binarized_homogeneity": "homogeneity |⟨x,g†⟩| / (|⟨x,g†⟩| + |β†|)",
    "direction_gap": "distance of the saliency directions",
    "offset": "offset β (logit)",
    "binarized_offset": "offset β† (logit)",
    "binarized_logit": "binarised logit Ψ† (logit)",
}
SHOWN, OTHERS = 20, "others"  # classes that are told apart, and all that are not
# In units of x, so that they can be compared with each other.
LENGTHS = {"linearized_robustness", "alignment", "binarized_alignment", "bound"}


def _array(value: Any) -> Values:
    tensor = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
    array: Values = np.asarray(tensor, dtype=np.float64)
    return array


def _named(results: Results, name: str = "") -> dict[str, Geometry]:
    """Every result by its name; one alone has this name."""
    named = dict(results) if isinstance(results, Mapping) else {name: results}
    for one in named.values():
        if not isinstance(one, Geometry):
            raise TypeError(f"results: got {type(one).__name__}, wants a fastsal.Geometry; fastsal.load reads a folder")
    return named


def _values(results: Results, quantity: Quantity) -> dict[str, Values]:
    """The values of a quantity, by the name of each result."""
    named = _named(results)
    if isinstance(quantity, str):
        if quantity not in LABELS:
            raise ValueError(f"quantity: got {quantity!r}, wants the values themselves or one of {list(LABELS)}")
        values = {name: _array(getattr(result, quantity)) for name, result in named.items()}
    elif isinstance(results, Mapping):
        values = {name: _array(quantity[name]) for name in named}
    else:
        values = {"": _array(quantity)}
    for name, result in named.items():
        if values[name].shape != tuple(result.prediction.shape):
            raise ValueError(
                f"quantity: got shape {values[name].shape}{f' for {name!r}' if name else ''}, wants [B] with B = "
                f"{len(result.prediction)}, one value an example"
            )
    return values


def _axes(ax: Any) -> Any:
    return files.extra("matplotlib.pyplot").subplots(layout="constrained")[1] if ax is None else ax


def _label(quantity: Quantity) -> str:
    return LABELS[quantity] if isinstance(quantity, str) else str(getattr(quantity, "name", None) or "")


def _by_class(
    results: Results, by: Any, xs: dict[str, Values], ys: dict[str, Values]
) -> tuple[dict[str, Values], dict[str, Values]]:
    """The values of one result, by the name of each class."""
    if isinstance(results, Mapping):
        raise ValueError(f"by: got {len(results)} results, wants one to tell the classes of")
    if isinstance(by, str) and by not in ("prediction", "runner_up"):
        raise ValueError(f"by: got {by!r}, wants 'prediction', 'runner_up' or classes [B]")
    classes = getattr(results, by) if isinstance(by, str) else by
    classes = np.asarray(classes.detach().cpu() if isinstance(classes, Tensor) else classes)
    ((x, y),) = zip(xs.values(), ys.values(), strict=True)
    if classes.shape != x.shape:
        raise ValueError(f"by: got shape {classes.shape}, wants [B] with B = {len(x)}, one class an example")
    names, counts = np.unique(classes, return_counts=True)
    shown = np.sort(names[np.argsort(-counts, kind="stable")[:SHOWN]])
    groups = {str(name): classes == name for name in shown}
    if len(shown) < len(names):
        groups = {OTHERS: ~np.isin(classes, shown)} | groups
    return {name: x[rows] for name, rows in groups.items()}, {name: y[rows] for name, rows in groups.items()}


def _label_decades(axis: Any, values: dict[str, Values]) -> None:
    """Puts labels at powers of ten, or also at 2 and 5 times those where there are few, so that they never touch."""
    ticker = files.extra("matplotlib.ticker")
    known = np.concatenate([one[np.isfinite(one)] for one in values.values()])
    if known.size and known.max() < 100 * known.min():
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def scatter(
    results: Results,
    x: Quantity = "linearized_robustness",
    y: Quantity = "alignment",
    *,
    diagonal: bool | None = None,
    by: Any = None,
    x_label: str = "",
    y_label: str = "",
    colors: Any = COLORS,
    ax: Any = None,
) -> Any:
    """Draws a point for every example, on logarithmic axes where every value is positive.

    Values that have a `name`, as a column of pandas has, are labelled by it.

    Args:
        results: A `Geometry`, or a mapping from names to several.
        x: The quantity along x.
        y: The quantity along y.
        diagonal: Whether to draw the line where both are equal; None draws it where both are lengths in units of x.
        by: Classes to tell apart, of one result: "prediction", "runner_up", or [B] of your own. The legend names them; where
            there are many, the most frequent ones, and the others are grey.
        x_label: What to write along x; by default what the quantity is called.
        y_label: The same along y.
        colors: One for each result, from the first again where they run out.
        ax: The matplotlib axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: A quantity has no such name, or not one value for each example.
        ImportError: matplotlib is missing.

    Examples:
        >>> import torch, fastsal
        >>> _ = torch.manual_seed(0)
        >>> model, images = torch.nn.Linear(6, 3), torch.randn(50, 6)
        >>> result = fastsal.analyze(model, images)
        >>> ax = fastsal.plot.scatter(result, x=fastsal.deepfool(model, images).distance, y="linearized_robustness")
        >>> ax.get_ylabel()
        'linearised robustness ρ̃ (units of x)'
    """
    ax = _axes(ax)
    xs, ys = _values(results, x), _values(results, y)
    if by is not None:
        xs, ys = _by_class(results, by, xs, ys)
    positive = all(bool((values[np.isfinite(values)] > 0).all()) for side in (xs, ys) for values in side.values())
    if positive:
        ax.set(xscale="log", yscale="log")
        _label_decades(ax.xaxis, xs)
        _label_decades(ax.yaxis, ys)
    for slot, name in enumerate(xs):
        ax.plot(
            xs[name],
            ys[name],
            linestyle="none",
            marker=MARKERS[(slot + slot // len(colors)) % len(MARKERS)],
            markersize=3,
            markeredgewidth=0,
            alpha=0.5,
            color="0.7" if name == OTHERS and by is not None else colors[slot % len(colors)],
            label=name,
            rasterized=sum(map(len, xs.values())) > 2000,
        )
    if diagonal if diagonal is not None else {x, y} <= LENGTHS if isinstance(x, str) and isinstance(y, str) else False:
        ax.axline((1, 1), (2, 2), color="0.4", linewidth=1, zorder=0)
    ax.set_xlabel(x_label or _label(x))
    ax.set_ylabel(y_label or _label(y))
    if len(xs) > 1:
        ax.legend(markerscale=2, title=by if isinstance(by, str) else None)
    return ax


def medians(
    results: Results,
    x: Quantity,
    y: Quantity,
    *,
    label: str = "",
    color: str = COLORS[1],
    marker: str = "o",
    x_bars: bool = True,
    ax: Any = None,
) -> Any:
    """Draws the median of one quantity against the median of another, with bars from the lower to the upper quartile.

    Every result is a point, and a line joins them in their order. NaN is left out.

    Args:
        results: A `Geometry`, or a mapping from names to several.
        x: The quantity along x.
        y: The quantity along y.
        label: The line's, in the legend.
        color: The line's.
        marker: The line's.
        x_bars: Whether there are bars along x too.
        ax: The matplotlib axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError, ImportError: As `scatter`.

    Examples:
        >>> import torch, fastsal
        >>> _ = torch.manual_seed(0)
        >>> results = {name: fastsal.analyze(torch.nn.Linear(6, 3), torch.randn(50, 6)) for name in ("a", "b")}
        >>> ax = fastsal.plot.medians(results, "linearized_robustness", "alignment", label="two linear models")
    """
    ax = _axes(ax)
    quartiles = []
    for values in (_values(results, x), _values(results, y)):
        quartiles.append(np.array([np.nanquantile(one, [0.25, 0.5, 0.75]) for one in values.values()]).T)
    (x_low, x_middle, x_high), (y_low, y_middle, y_high) = quartiles
    drawn = ax.errorbar(
        x_middle,
        y_middle,
        xerr=(x_middle - x_low, x_high - x_middle) if x_bars else None,
        yerr=(y_middle - y_low, y_high - y_middle),
        color=color,
        marker=marker,
        markersize=5,
        linewidth=1.2,
        elinewidth=1.2,
        capsize=2.5,
        label=label or None,
    )
    for bars in (*drawn.lines[1], *drawn.lines[2]):
        bars.set_alpha(0.5)  # behind the medians, not over them
    ax.set_xlabel(_label(x))
    ax.set_ylabel(_label(y))
    return ax


def _saliency(name: str, result: Geometry) -> Tensor:
    _named({name: result})
    if result.saliency is None:
        raise ValueError(f"results: {name!r} holds no saliency, wants analyze(..., keep_saliency=True)")
    return result.saliency


def saliency_grid(x: Tensor, results: Results | Mapping[str, Tensor], *, columns: int = 8, figure: Any = None) -> Any:
    """Draws images above their saliency maps: a row for every result, all in one signed colour scale.

    Each map is g/‖g‖₂, since alignment sees nothing but its direction: red raises the predicted logit, blue lowers it.

    Args:
        x: The images, [B, C, H, W] with C = 1 or 3, or [B, H, W], in [0, 1]. The channels of a map are summed.
        results: From `analyze(model, x, keep_saliency=True)`, or a mapping from names to several, or to maps themselves,
            shaped like x, such as `binarized_saliency`.
        columns: How many examples to show, from the first on.
        figure: The matplotlib figure to draw on.

    Returns:
        The array of the figure's axes.

    Raises:
        ValueError: A result holds no saliency.
        ImportError: matplotlib is missing.

    Examples:
        >>> import torch, fastsal
        >>> _ = torch.manual_seed(0)
        >>> model, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3)), torch.rand(4, 1, 6, 6)
        >>> fastsal.plot.saliency_grid(images, fastsal.analyze(model, images, keep_saliency=True)).shape
        (2, 4)
    """
    if isinstance(results, Mapping):
        named = {name: one if isinstance(one, Tensor) else _saliency(name, one) for name, one in results.items()}
    else:
        named = {"saliency g": _saliency("saliency g", results)}
    columns = min(columns, len(x))
    maps = {}
    for name, saliency in named.items():
        map_ = _array(saliency[:columns])
        map_ = map_ / np.sqrt(np.square(map_).sum(axis=tuple(range(1, map_.ndim)), keepdims=True))
        maps[name] = map_.sum(1) if map_.ndim == 4 else map_
    limit = np.nanquantile(np.abs(np.stack(list(maps.values()))), 0.995)
    if figure is None:
        figure = files.extra("matplotlib.pyplot").figure(
            figsize=(1 + 0.7 * columns, 0.75 * (1 + len(maps))), layout="constrained"
        )
    axes = figure.subplots(1 + len(maps), columns, squeeze=False)
    images = _array(x[:columns])
    for column in range(columns):
        image = images[column]
        if image.ndim == 3:
            image = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        axes[0, column].imshow(image, cmap="gray", vmin=0, vmax=1)
        for row, map_ in enumerate(maps.values(), 1):
            drawn = axes[row, column].imshow(map_[column], cmap="RdBu_r", vmin=-limit, vmax=limit)
    for row, name in enumerate(("image", *maps)):
        axes[row, 0].set_ylabel(name, rotation=0, horizontalalignment="right", verticalalignment="center")
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figure.colorbar(
        drawn, ax=list(axes[1:].flat), location="bottom", shrink=0.6, aspect=40, label="saliency g / ‖g‖₂ (signed)"
    )
    return axes


def _shades(values: Any) -> list[tuple[str, float]]:
    """A colour for each value, and how much of it from 0 to 1: orange above 0, blue below."""
    array = _array(values)
    largest = np.abs(array).max(initial=0.0) or 1.0
    return [(COLORS[2] if value >= 0 else COLORS[1], float(abs(value) / largest)) for value in array]


def tokens_html(tokens: Sequence[str], values: Any) -> str:
    """Text for a notebook, each token on a ground that shows its value: orange above 0, blue below, white at 0.

    Args:
        tokens: The tokens, L of them.
        values: A number for each, [L].

    Returns:
        The HTML.

    Raises:
        ValueError: There is not one value for each token.

    Examples:
        >>> import fastsal
        >>> fastsal.plot.tokens_html(["a", "<b>"], [1.0, 0.0]).count("<span")
        3
    """
    spans = []
    for token, (color, share) in zip(tokens, _shades(values), strict=True):
        ground = ", ".join(str(int(color[place : place + 2], 16)) for place in (1, 3, 5))
        spans.append(f'<span style="background: rgba({ground}, {0.7 * share:.2f})">{html.escape(token)}</span>')
    return f'<span style="white-space: pre-wrap">{"".join(spans)}</span>'


def tokens(tokens: Sequence[str], values: Any, *, width: int = 60, ax: Any = None) -> Any:
    """Draws text, each token on a ground that shows its value: orange above 0, blue below, white at 0.

    Args:
        tokens: The tokens, L of them, such as the `inputs` of `fastsal.integrations.transformers.foils`.
        values: A number for each, [L], such as a foil's `contribution`.
        width: How many characters a line holds.
        ax: The axes to draw on; new ones where it is None.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: There is not one value for each token.

    Examples:
        >>> import fastsal
        >>> ax = fastsal.plot.tokens(["a", " loss", " of", " words"], [0.3, -1.0, 0.0, 2.0])
        >>> [text.get_text() for text in ax.texts]
        ['a', ' loss', ' of', ' words']
    """
    if ax is None:
        lines = 1 + sum(len(token) for token in tokens) // width
        figure = files.extra("matplotlib.pyplot").figure(figsize=(width / 9, 0.3 * (lines + 1)))
        ax = figure.add_axes((0, 0, 1, 1))
    inches = ax.get_window_extent().width / ax.figure.dpi
    line = column = 0
    for token, (color, share) in zip(tokens, _shades(values), strict=True):
        shown = token.replace("\n", "⏎")
        if column + len(shown) > width and column:
            line, column = line + 1, 0
        ax.text(
            column,
            -line,
            shown,
            family="monospace",
            fontsize=72 * inches / width / 0.602,  # what a character of DejaVu Sans Mono is wide, in units of its size
            verticalalignment="center",
            bbox={"facecolor": color, "alpha": 0.7 * share, "edgecolor": "none", "pad": 1},
        )
        column += len(shown)
    ax.set(xlim=(-0.5, width + 0.5), ylim=(-line - 0.7, 0.7))
    ax.axis("off")
    return ax
