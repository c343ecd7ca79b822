"""fastsal.plot: the points drawn are the numbers given, axes come back, and one line for everything that is wrong."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal import plot

Figure = pytest.importorskip("matplotlib.figure").Figure


@pytest.fixture(autouse=True)
def _closed():
    yield
    pytest.importorskip("matplotlib.pyplot").close("all")


@pytest.fixture
def axes():
    return Figure().subplots()


@pytest.fixture
def images():
    return torch.rand(9, 1, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def results(images):
    """Three models on the same images, with saliency maps."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(25, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(3)]
    return {f"model {i}": fastsal.analyze(model, images, keep_saliency=True) for i, model in enumerate(models)}


def points(line):
    return np.stack(line.get_data())


class TestScatter:
    def test_points_are_the_values(self, results, axes):
        assert plot.scatter(results, ax=axes) is axes
        for (name, result), line in zip(results.items(), axes.lines, strict=False):
            want = torch.stack((result.linearized_robustness, result.alignment)).numpy()
            np.testing.assert_array_equal(points(line), want)
            assert line.get_label() == name
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(results)
        assert axes.get_xlabel() == "linearised robustness ρ̃ (units of x)"
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert len(axes.lines) == 4  # the diagonal: both are lengths

    def test_values_of_ones_own(self, results, axes):
        rho = {name: torch.arange(9) for name in results}  # a zero: no logarithm
        plot.scatter(results, rho, "homogeneity", ax=axes)
        np.testing.assert_array_equal(points(axes.lines[1])[0], np.arange(9))
        assert (axes.get_xscale(), axes.get_xlabel(), len(axes.lines)) == ("linear", "", 3)

    def test_labels_what_it_is_given(self, results, axes):
        (one, *_), values = results.values(), np.arange(1.0, 10)
        plot.scatter(one, values, "alignment", x_label="adversarial distance", ax=axes)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("adversarial distance", "alignment α (units of x)")
        frame = one.to_pandas()
        plot.scatter(one, frame.bound, values, y_label="y", ax=axes)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("bound", "y")

    @pytest.mark.parametrize("by", ["prediction", "own", "tensor"])
    def test_colours_by_class(self, results, axes, by):
        (one, *_) = results.values()
        classes = {"prediction": one.prediction.numpy(), "own": [*"abcabcabc"], "tensor": torch.arange(9) % 2}[by]
        plot.scatter(one, by=by if by == "prediction" else classes, ax=axes)
        classes = np.asarray(classes)
        for name, line in zip(np.unique(classes), axes.lines, strict=False):
            assert line.get_label() == str(name)
            np.testing.assert_array_equal(points(line)[0], one.linearized_robustness.numpy()[classes == name])
        looks = [(line.get_color(), line.get_marker()) for line in axes.lines]
        assert len(set(looks)) == len(looks)

    def test_many_classes(self, axes):
        found = fastsal.analyze(nn.Linear(6, 3), torch.randn(200, 6))
        classes = torch.cat((torch.arange(30), torch.arange(5, 25).repeat(10)))[:200]
        plot.scatter(found, by=classes, diagonal=False, ax=axes)
        labels = [line.get_label() for line in axes.lines]
        assert labels == ["others", *map(str, range(5, 25))]
        assert axes.lines[0].get_color() == "0.7"
        assert sum(len(points(line)[0]) for line in axes.lines) == 200
        looks = [(line.get_color(), line.get_marker()) for line in axes.lines]
        assert len(set(looks)) == 21

    @pytest.mark.parametrize(
        ("by", "message"),
        [("bound", "by: got 'bound', wants 'prediction'"), ([1, 2], r"by: got shape \(2,\), wants \[B\] with B = 9")],
    )
    def test_what_are_no_classes(self, results, axes, by, message):
        (one, *_) = results.values()
        with pytest.raises(ValueError, match=message):
            plot.scatter(one, by=by, ax=axes)
        with pytest.raises(ValueError, match="by: got 3 results, wants one"):
            plot.scatter(results, by="prediction", ax=axes)
        one = plot.scatter(next(iter(results.values())), np.ones(9), "offset", diagonal=True)
        assert one.get_legend() is None
        assert len(one.lines) == 2

    def test_errors(self, results):
        with pytest.raises(ValueError, match="quantity: got 'robustness', wants the values themselves or one of"):
            plot.scatter(results, "robustness")
        with pytest.raises(ValueError, match=r"quantity: got shape \(3,\) for 'model 0', wants \[B\] with B = 9"):
            plot.scatter(results, {name: np.ones(3) for name in results})
        with pytest.raises(ValueError, match=r"quantity: got shape \(3,\), wants"):
            plot.scatter(results["model 0"], np.ones(3))
        with pytest.raises(
            TypeError, match=r"results: got str, wants a fastsal.Geometry; fastsal\.load reads a folder"
        ):
            plot.scatter({"a": "a folder"})


class TestMedians:
    def test_quartiles(self, results, axes):
        """NaN is left out."""
        values = {name: np.append(np.arange(8.0) + i, np.nan) for i, name in enumerate(results)}
        assert plot.medians(results, values, "alignment", ax=axes, label="three") is axes
        line, _, (x_bars, y_bars) = axes.containers[0]
        alignments = np.stack([result.alignment.numpy() for result in results.values()]).astype(float)
        np.testing.assert_allclose(points(line), [[3.5, 4.5, 5.5], np.median(alignments, 1)])
        np.testing.assert_allclose(
            [bar[:, 0] for bar in x_bars.get_segments()], [[1.75 + i, 5.25 + i] for i in range(3)]
        )
        quartiles = np.quantile(alignments, [0.25, 0.75], axis=1).T
        np.testing.assert_allclose([bar[:, 1] for bar in y_bars.get_segments()], quartiles)


class TestSaliencyGrid:
    def test_one_signed_scale(self, results, images):
        axes = plot.saliency_grid(images, results, columns=4, figure=Figure())
        assert axes.shape == (4, 4)
        np.testing.assert_array_equal(axes[0, 2].images[0].get_array(), images[2, 0])
        scales = {ax.images[0].get_clim() for ax in axes[1:].flat}
        assert len(scales) == 1
        low, high = scales.pop()
        assert low == -high
        for row, (name, result) in enumerate(results.items(), 1):
            g = result.saliency[1, 0].double()
            np.testing.assert_allclose(axes[row, 1].images[0].get_array(), g / g.norm(), rtol=1e-12)
            assert axes[row, 0].get_ylabel() == name

    def test_colour_and_single_result(self):
        torch.manual_seed(1)
        model, images = nn.Sequential(nn.Flatten(), nn.Linear(75, 3)), torch.rand(2, 3, 5, 5)
        result = fastsal.analyze(model, images, keep_saliency=True)
        axes = plot.saliency_grid(images, result)
        assert axes.shape == (2, 2)
        np.testing.assert_array_equal(axes[0, 1].images[0].get_array(), images[1].permute(1, 2, 0))
        g = result.saliency[0].double()
        np.testing.assert_allclose(axes[1, 0].images[0].get_array(), (g / g.norm()).sum(0), rtol=1e-12)

    def test_needs_saliency(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
        with pytest.raises(
            ValueError, match=r"'saliency g' holds no saliency, wants analyze\(..., keep_saliency=True\)"
        ):
            plot.saliency_grid(images, fastsal.analyze(model, images))


def test_without_matplotlib(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"matplotlib.*; pip install 'fastsal\[demo\]'"):
        plot.scatter(results)
