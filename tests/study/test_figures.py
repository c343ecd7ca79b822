"""The figures of a study: files that are whole, and labels that can be read."""

import pytest

from fastsal.pages import drawing
from fastsal.study import figures


def test_figures(study):
    for name in figures.FIGURES:
        assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (study / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.rstrip().endswith("</svg>")
        assert "viewBox" in svg
    assert not [path for path in study.rglob("*") if path.name.endswith(".tmp")]


def test_the_same_file_again(study, studies, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {"accuracy": figures.FIGURES["accuracy"]})
    figures.write(studies, tmp_path)
    for name in ("accuracy.svg", "accuracy.png"):
        assert (tmp_path / name).read_bytes() == (study / name).read_bytes()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_no_label_covers_another(studies, name):
    """Tick labels, axis labels and titles, as drawn."""
    with drawing.style():
        figure, _ = figures.FIGURES[name][1](studies)
        canvas = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        canvas.draw()
    texts = []
    for ax in figure.axes:
        limits = [(axis.get_view_interval(), axis) for axis in (ax.xaxis, ax.yaxis)]
        for (low, high), axis in limits:
            ticks = [tick for tick in axis.get_major_ticks() + axis.get_minor_ticks() if tick.label1.get_visible()]
            texts += [tick.label1 for tick in ticks if min(low, high) <= tick.get_loc() <= max(low, high)]
        texts += [ax.xaxis.label, ax.yaxis.label, ax.title]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text().strip()]
    assert len(boxes) > 3
    inside = figure.bbox.padded(1)
    for slot, (text, box) in enumerate(boxes):
        assert inside.contains(*box.min), text
        assert inside.contains(*box.max), text
        for other, other_box in boxes[:slot]:
            assert not box.overlaps(other_box), (text, other)
