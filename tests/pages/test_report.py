"""The report says what the results say: both ends, maps, shares, classes and failures; and refuses what does not belong."""

import base64
import io
import re
import shutil
import time

import numpy as np
import pytest
import torch
from evaluation.small import evaluate
from pages.conftest import BAD, CLASSES, N

import fastsal
from fastsal.cli import main
from fastsal.evaluation import shards
from fastsal.evaluation.tables import MISSING
from fastsal.pages import distributions, examples, pictures
from fastsal.pages.page import Page

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(text, number=-1):
    """The cells of a table of a page."""
    table = re.findall("<table.*?</table>", text, re.S)[number]
    rows = (re.findall("<td[^>]*>(.*?)</td>", row, re.S) for row in re.findall("<tr.*?</tr>", table, re.S))
    return [cells for cells in rows if cells]


def test_both_ends_are_those_of_rho(results, written):
    rho = fastsal.load(results).linearized_robustness
    order = rho.argsort()[: N - 1].tolist()  # NaN comes last
    cells = rows_of(written.read_text(encoding="utf-8"), 1)
    assert [row[1] for row in cells] == [f"digit {k}" for k in order[:24] + order[::-1][:24]]
    assert [float(row[8]) for row in cells] == pytest.approx(rho[order[:24] + order[::-1][:24]].tolist(), rel=1e-3)


def test_ends_of_few_examples_never_overlap():
    for n in (0, 1, 24, 30, 48, 60):
        columns = {"linearized_robustness": np.array([*np.random.default_rng(n).random(n), np.nan, np.nan])}
        rows = [row for row, _ in examples.ends(columns)]
        assert len(rows) == len(set(rows)) == min(n, 48)
        assert not {n, n + 1} & set(rows)


@pytest.mark.parametrize("target", [None, "y"])
def test_maps_are_the_gradients_of_analyze(tmp_path, model, target):
    """In float64, of the class that the table says and its runner-up, found without a search; those that were kept alike."""
    draw = torch.Generator().manual_seed(1)
    model = torch.nn.Sequential(*model).double()
    try:
        x, y = torch.rand(60, 1, 6, 6, generator=draw).double(), torch.randint(CLASSES, (60,), generator=draw)
        data, keep = torch.utils.data.TensorDataset(x, y), ["saliency", "binarized_saliency"]
        for name, options in {"plain": {}, "kept": {"keep": keep}}.items():
            evaluate(model, data, tmp_path / name, target=target, **options)
        truth = fastsal.analyze(model, x, target=None if target is None else y, keep_saliency=True)
        found = shards.shards(tmp_path / "plain")
        batches, column = fastsal.evaluation.batches.Batches(data, 1), "prediction" if target is None else "y"
        shown = list(examples.collect(shards.read(found), found, batches, model, column))
        kept = list(examples.collect(shards.read(found), shards.shards(tmp_path / "kept"), batches, None, column))
        assert len(shown) == len(kept) == 48
        for one, other in zip(shown, kept, strict=True):
            for name in keep:
                torch.testing.assert_close(one.arrays[name], getattr(truth, name)[one.row], rtol=0, atol=1e-12)
                torch.testing.assert_close(other.arrays[name].double(), one.arrays[name], rtol=0, atol=1e-6)
    finally:
        model.float()


def test_accuracy_is_counted_in_order_of_rho():
    """Three parts of 20: all wrong, half right, all right; NaN and examples without a class are left out."""
    rng = np.random.default_rng(0)
    rho = np.sort(rng.random(60))
    right = np.repeat([0, 1, 0, 1], [20, 10, 10, 20]).astype(bool)
    order = rng.permutation(62)
    columns = {
        "linearized_robustness": np.array([*rho, np.nan, 0.5])[order],
        "prediction": np.array([*np.where(right, 1, 0), 1, 1])[order],
        "y": np.array([*[1] * 60, 0, -1])[order],
    }
    figure, caption = distributions.accuracy(columns)
    ((line, _, (bars,)),) = figure.axes[0].containers
    middles = [np.median(part) for part in np.split(rho, 3)]
    np.testing.assert_allclose(line.get_xydata(), np.transpose([middles, [0, 0.5, 1]]))
    assert "3 equal parts of 60 examples" in caption
    stats = pytest.importorskip("scipy.stats")
    for segment, k in zip(bars.get_segments(), (0, 10, 20), strict=True):
        want = stats.binomtest(k, 20).proportion_ci(method="wilson")
        np.testing.assert_allclose(segment[:, 1], (want.low, want.high), atol=1e-4)


def test_histograms_hold_every_finite_value():
    columns = {name: np.array([1e-6, 2.0, 3e4, np.nan, np.inf, 2.0]) for name in distributions.QUANTITIES} | {
        "index": np.arange(6)
    }
    columns["alignment"] = np.full(6, 3.0)
    columns["bound"] = np.array([-np.inf, -1.0, 0.0, 1.0, 1.0, np.nan])
    columns["homogeneity"] = np.full(6, np.nan)
    figure, _ = distributions.histograms(columns)
    counts = [sum(patch.get_data().values.sum() for patch in ax.patches) for ax in figure.axes]
    assert counts == [4, 6, 4, 0]


def test_classes_are_called_by_their_names(written):
    text = written.read_text(encoding="utf-8")
    assert [row[0] for row in rows_of(text, 2)] == ["zero", "one", "two &lt;2&gt;", "three", "four"]
    assert sum(int(row[1]) for row in rows_of(text, 2)) == N - 1
    assert "two <2>" not in text
    assert {row[5] for row in rows_of(text, 1)} <= {"zero", "one", "two &lt;2&gt;", "three", "four"}


def test_folders_name_the_classes_and_a_layer_has_no_maps(tmp_path, model, data):
    names = [f"{'abcde'[int(y)]}/{k}.png" for k, y in enumerate(data.y)]
    labelled = torch.utils.data.TensorDataset(data.x, data.y)
    evaluate(model, labelled, tmp_path / "results", names=names, layer="2")
    page = fastsal.report(tmp_path / "results", data=labelled, model=model, out=tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    assert [row[0] for row in rows_of(text, 2)] == list("abcde")
    assert "image of" in text
    assert "g of" not in text
    assert "layer 2" in text


def test_failures_have_their_reasons(written):
    ((name, reason),) = rows_of(written.read_text(encoding="utf-8"))
    assert name == f"digit {BAD}"
    assert reason.startswith("OSError: this file is truncated &lt;b&gt;")


def test_pictures_are_the_pixels():
    from PIL import Image

    def pixels(uri):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")) / 255

    x = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(pixels(pictures.of_input(x, 0, 1)), x.permute(1, 2, 0), atol=0.5 / 255 + 1e-6)
    grey = pixels(pictures.of_input(4 * x[:1] - 1, -1, 3))
    np.testing.assert_allclose(grey[..., 0], x[0], atol=0.5 / 255 + 1e-6)
    large = pictures.of_input(torch.rand(3, 300, 200), 0, 1)
    assert large.startswith("data:image/webp")
    assert pixels(large).shape == (160, 107, 3)
    light = pixels(pictures.of_map(torch.tensor([[-5.0, -1.0, 0.0, 1.0, 5.0]]))).mean(-1)[0]
    assert (np.diff(light) > 0).all()  # from against to for, by lightness alone
    for bad in (torch.zeros(2, 2), torch.full((2, 2), float("nan")), torch.tensor([[1.0, float("inf")]])):
        pixels(pictures.of_map(bad))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 3), (1, 4, 4, 4)])
def test_other_inputs_have_numbers_alone(tmp_path, shape):
    torch.manual_seed(0)
    x = torch.rand(30, *shape)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 3))
    evaluate(net, x, tmp_path / "results")
    text = fastsal.report(tmp_path / "results", data=x, model=net, out=tmp_path / "report.html").read_text("utf-8")
    assert "<th" in text
    assert "image</th>" not in text
    assert len(rows_of(text, 1)) == 30


def test_only_failures(tmp_path):
    """Where nothing could be analysed, the page says why."""
    columns = {"index": np.arange(3)} | {
        name: np.full(3, missing, dtype=object if missing == "" else None) for name, missing in MISSING.items()
    }
    columns["error"] = np.array(["no such file", "no such file", "too dark"], dtype=object)
    made_from = {"fastsal": "0.1.0", "model": "Net 1", "data": "", "examples": 3, "norm": "2"}
    shards.write(tmp_path, columns, {"made_from": made_from, "shape": [1, 2, 2], "classes": 4, "torch": "2"})
    text = fastsal.report(tmp_path, out=tmp_path.parent / f"{tmp_path.name}.html").read_text(encoding="utf-8")
    assert rows_of(text, -2) == [["no such file", "2"], ["too dark", "1"]]
    assert rows_of(text) == [["0", "no such file"], ["1", "no such file"], ["2", "too dark"]]


def wrong(results, data, model, **given):
    with pytest.raises((ValueError, TypeError)) as raised:
        fastsal.report(results, **{"data": data, "model": model, "out": results.parent / "wrong.html"} | given)
    assert not (results.parent / "wrong.html").exists()
    return str(raised.value)


def test_refuses_what_does_not_belong(results, data, model):
    other = torch.nn.Sequential(*model[:-1], torch.nn.Linear(16, CLASSES))
    assert wrong(results, data, other).startswith("model: the results were made from something else: parameters differ")
    assert wrong(results, data.x, model).startswith("data: the results were made from something else")
    assert wrong(results, data.x[:9], model).startswith("data: the results were made from something else")
    assert wrong(results, None, model).startswith("model: got one without data")
    assert wrong(results, 3, None).startswith("data: got int, wants")
    assert wrong(results, None, None, classes=["a"]) == "classes: got 1 names, wants one for each of the 5 classes"
    assert wrong(results.parent, None, None).endswith("holds no results of fastsal.evaluate")


def test_a_page_is_replaced_and_another_file_is_not(tmp_path, results, written):
    page = tmp_path / "report.html"
    shutil.copy(written, page)
    fastsal.report(results, out=page)
    assert 0 < page.stat().st_size < written.stat().st_size  # without pictures
    page.write_text("mine")
    with pytest.raises(ValueError, match="fastsal did not write it"):
        fastsal.report(results, out=page)
    assert page.read_text() == "mine"


def test_many_results(tmp_path):
    """5,000 of 1000 classes, a tenth of 50,000: well under a tenth of the 30 s and 5 MB that those may take."""
    rng, n = np.random.default_rng(0), 5000
    kinds = {int: np.int64, bool: np.bool_, str: object}
    columns = {"index": np.arange(n), "name": np.array([f"{k % 1000:04}/{k}.jpg" for k in range(n)], dtype=object)}
    columns |= {"y": np.arange(n) % 1000}
    for name, missing in MISSING.items():
        kind = kinds.get(type(missing))
        columns[name] = rng.lognormal(size=n).astype(np.float32) if kind is None else rng.integers(1000, size=n)
        if kind in (np.bool_, object):
            columns[name] = np.full(n, "certified" if kind is object else True, dtype=kind)
    columns["error"] = np.full(n, "", dtype=object)
    made_from = {"fastsal": "0.1.0", "model": "Net 1", "data": "", "examples": n, "norm": "2"}
    for start in range(0, n, 64):
        part = {name: column[start : start + 64] for name, column in columns.items()}
        shards.write(tmp_path, part, {"made_from": made_from, "shape": [3, 8, 8], "classes": 1000, "torch": "2"})
    start = time.process_time()
    page = fastsal.report(tmp_path, out=tmp_path.parent / f"{tmp_path.name}.html")
    assert time.process_time() - start < 15
    assert page.stat().st_size < 1e6
    assert len(rows_of(page.read_text(encoding="utf-8"), 2)) == 1000


def test_command(tmp_path, monkeypatch, capsys):
    """The same page as the function's, from arrays and a model by name; and one line for what is missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reported_net.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))\n"
    )
    x = np.random.default_rng(0).random((30, 1, 4, 4)).astype(np.float32)
    np.savez("x.npz", x=x, y=np.arange(30) % 3)
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    given = ["--model", "reported_net:net", "--data", "x.npz"]
    assert main(["analyze", *given, "--out", "results"]) == 0
    assert main(["report", "results", *given, "--classes", "names.txt", "--out", "page.html"]) == 0
    assert capsys.readouterr().out.endswith("wrote page.html\n")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img") == 3 + 3 * 30
    assert {row[0] for row in rows_of(text, 2)} == {"cat", "dog", "bird"}
    for words, said in (
        (["."], "RESULTS .: is no folder of results of fastsal analyze"),
        (["results", "--model", "reported_net:net"], "--model: is given without --data, wants both for saliency maps"),
        (
            ["results", "--data", "folder:results"],
            "--data: images want --model, or the --image-size that fastsal analyze was given",
        ),
        (["results", "--classes", "nowhere.txt"], "--classes nowhere.txt: FileNotFoundError: "),
        (["results", "--classes", "imagenet"], "classes: got 1000 names, wants one for each of the 3 classes"),
        (["results", "--out", "page.txt"], "--out page.txt: the ending decides the format, wants .html"),
    ):
        assert main(["report", *words]) == 2
        assert capsys.readouterr().err.startswith(f"fastsal report: {said}")
    assert not (tmp_path / "report.html").exists()


def test_words_stand_at_the_left_and_numbers_at_the_right():
    drawn = Page("a title")
    drawn.table(
        [
            {"first": "1", "number": "nan", "said": "", "range": "0.9"},
            dict.fromkeys("1234", "−2"),
            {"": "", "n": "inf", "w": "in 2 of 3", "r": "1 to 2"},
        ]
    )
    assert "| --- | --: | --- | --: |" in drawn.markdown[-1]
    assert re.findall(r'<td( class="words")?>', drawn.html[-1]) == 3 * [' class="words"', "", ' class="words"', ""]
