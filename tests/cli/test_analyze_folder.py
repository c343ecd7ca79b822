"""`fastsal analyze` on folders: results as shards, images and networks by name, bad examples, JSON and a picture."""

import csv
import json
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import nn

import fastsal
from fastsal import files, load
from fastsal.cli import inputs, main, models
from fastsal.evaluation import shards

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = """
import torch
from torch import nn

def net(inputs=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, 3))

def pixels():
    return net(3 * 16 * 16)

def grey():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 3))

class Careful(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        if (x > 100).any():
            raise ArithmeticError("too bright")
        return self.net(x)

class Relaxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = pixels()

    def forward(self, x):
        (step,) = torch.autograd.grad(self.net(x).square().sum(), x, create_graph=True)
        return self.net(x - 0.1 * step)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in, with models under a name of their own, and data."""
    monkeypatch.chdir(tmp_path)
    name = f"networks_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    x = np.random.default_rng(0).random((21, 3, 2, 2)).astype(np.float32)
    np.savez("x.npz", x=x, y=np.arange(21) % 3)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def run(folder, capsys):
    """`run(**options)`: the command's status, standard output and standard error."""

    def call(*flags, **options):
        options = {"model": "net", "data": "x.npz", "out": "results", **options}
        if ":" not in options["model"]:
            options["model"] = f"{folder}:{options['model']}"
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", *str(value).split())]
        status = main(["analyze", *words, *flags])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def photographs(tmp_path):
    """`photographs(names)`: images of noise of several sizes and modes in files of these names."""

    def make(*names):
        rng = np.random.default_rng(0)
        for slot, name in enumerate(names):
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (20 + slot, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels[..., 0] if slot % 2 else pixels).save(path)

    return make


class TestOut:
    def test_folder_file_and_again(self, run, monkeypatch):
        status, out, err = run("--json", batch_size=4, save_every=0)
        assert (status, err) == (0, "")
        summary = json.loads(out)
        assert (summary["examples"], summary["out"], sorted(summary["by_class"])) == (21, "results", ["0", "1", "2"])
        found = shards.shards(__import__("pathlib").Path("results"))
        assert len(found) == 6
        times = [path.stat().st_mtime_ns for path in found]
        status, out, err = run(batch_size=4)
        assert (status, err) == (0, "")
        assert out.endswith("distances are in units of the data as the model takes them\nwrote results\n")
        assert [path.stat().st_mtime_ns for path in found] == times
        want = shards.read(found)
        for out in ("a.npz", "a.csv", "a.parquet"):
            assert run(batch_size=4, out=out)[0] == 0
        columns = pyarrow.parquet.read_table("a.parquet")
        assert columns.column_names == list(want)
        with np.load("a.npz") as file:
            assert set(file.files) == {*want} - {"error"}
            for name in file.files:
                np.testing.assert_array_equal(file[name], want[name])
                np.testing.assert_array_equal(columns[name].to_numpy(), want[name])

    def test_names_of_folders(self, run, tmp_path):
        (tmp_path / "v1.2").mkdir()
        for out in ("v1.2", "v2.0/", "deep/er"):
            assert run(out=out)[0] == 0
            assert len(load(out).prediction) == 21
        (tmp_path / "taken").write_text("")
        for out, message in {
            "taken": "--out taken: is a file; a name without an ending is taken for a folder",
            "out.txt": "--out out.txt: the ending decides the format, wants .csv or .npz or .parquet",
        }.items():
            status, stdout, err = run(out=out)
            assert (status, stdout, err) == (2, "", f"fastsal analyze: {message}\n")

    def test_another_model_is_refused(self, run):
        assert run()[0] == 0
        status, out, err = run(norm=1)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "out: results: holds results of something else: norm was '2', is '1'; wants another folder" in err

    def test_picture_and_plot_of_the_folder(self, run, tmp_path):
        assert run(plot="picture.png")[0] == 0
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
        geometry = load("results")
        fastsal.plot.scatter(geometry, ax=axes)
        want = torch.stack((geometry.linearized_robustness, geometry.alignment))
        np.testing.assert_array_equal(np.stack(axes.lines[0].get_data()), want)
        with pytest.raises(ValueError, match="'saliency g' holds no saliency"):
            fastsal.plot.saliency_grid(torch.rand(21, 3, 2, 2), geometry)
        status, _, err = run(plot="picture.txt")
        assert (status, err) == (
            2,
            "fastsal analyze: --plot picture.txt: the ending decides the format, wants .pdf or .png or .svg\n",
        )


class TestBadExamples:
    def test_status_1_and_gaps(self, run):
        x = np.load("x.npz")["x"]
        x[[4, 7], 0, 0, 0] = 101
        np.savez("dim.npz", x=x, y=np.arange(21) % 3)
        for out in ("results", "bad.csv", "bad.npz", "bad.parquet"):
            status, text, err = run(model="Careful", data="dim.npz", out=out)
            assert status == 1, err
            assert "not analysed, their rows are null: 2 of 21 examples, 4, 7; the column error says why\n" in text
            for i, line in zip((4, 7), err.splitlines(), strict=True):
                assert line.startswith(f"fastsal analyze: warning: example {i}: ArithmeticError: too bright (")
        with open("bad.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        filled = {name for name, value in rows[4].items() if value}
        assert filled == {"index", "y", "error"}
        assert not rows[5]["error"]
        assert pyarrow.parquet.read_table("bad.parquet")["bound"].null_count == 2
        with np.load("bad.npz") as file:
            assert np.flatnonzero(np.isnan(file["bound"])).tolist() == [4, 7]
            assert np.flatnonzero(file["error"] != "").tolist() == [4, 7]
        status, out, _ = run("--json", model="Careful", data="dim.npz")
        assert (status, json.loads(out)["failed"]) == (1, 2)

    def test_json_says_what_is_not_finite(self, run):
        x = np.load("x.npz")["x"]
        x[:, 0, 0, 0] = np.nan
        np.savez("nan.npz", x=x)
        _, out, _ = run("--json", data="nan.npz")
        summary = json.loads(out, parse_constant=pytest.fail)
        assert summary["all"]["quantities"]["bound"] == {"lower": None, "median": None, "upper": None, "nan": 21}


class TestImages:
    @pytest.mark.parametrize(
        ("names", "y", "note"),
        [
            (("b.png", "a.jpg", "c.txt.webp"), None, "true classes: unknown, since not all images lie in folders of"),
            (("0/b.png", "a.jpg"), None, "true classes: unknown, since not all images lie in folders of their class"),
            (("2/b.png", "0/c.png", "2/a.gif"), [0, 2, 2], "true classes: the numbers that name the 2 folders"),
            (("dog/b.png", "ant/c.png", "cat/x/y.png"), [0, 1, 2], "true classes: the 3 folders in alphabetical order"),
            (
                ("dog/b.png", "ant/c.png"),
                None,
                "true classes: unknown, since 2 folders whose names are no class numbers",
            ),
            (("7/b.png", "0/c.png"), None, "true classes: unknown, since 2 folders whose names are no class numbers"),
        ],
    )
    def test_names_and_classes(self, run, photographs, names, y, note):
        photographs(*names)
        options = {"model": "pixels", "data": "folder:photos", "image_size": 16}
        status, out, err = run(**options)
        assert (status, err) == (0, "")
        found = shards.read(shards.shards(__import__("pathlib").Path("results")))
        assert found["name"].tolist() == sorted(names)
        assert ("y" not in found) if y is None else (found["y"].tolist() == y)
        assert note in out
        assert "examples of shape (3, 16, 16), 3 classes" in out

    def test_a_model_that_takes_gradients_of_its_own(self, run, photographs):
        photographs("a.png", "b.png")
        status, out, err = run(model="Relaxed", data="folder:photos", image_size=16)
        assert (status, err, "examples of shape (3, 16, 16), 3 classes" in out) == (0, "", True)
        assert shards.read(shards.shards(__import__("pathlib").Path("results")))["error"].tolist() == ["", ""]

    def test_grey_levels(self, run, photographs, tmp_path):
        photographs("a.png", "b.png")
        options = {"model": "grey", "data": "folder:photos", "image_size": 16}
        status, out, err = run(**options)
        assert (status, out, err.endswith(":grey: takes images of one channel: --channels 1\n")) == (2, "", True)
        status, out, err = run(**options, channels=1)
        assert (status, err, "examples of shape (1, 16, 16), 3 classes" in out) == (0, "", True)
        x = inputs.Square(16, 1)(Image.open(tmp_path / "photos" / "b.png"))  # grey already
        middle = (
            Image.open(tmp_path / "photos" / "b.png").resize((23, 16), Image.Resampling.BICUBIC).crop((3, 0, 19, 16))
        )
        assert torch.equal(x[0], torch.from_numpy(np.asarray(middle) / np.float32(255)))

    def test_a_torn_image_is_named(self, run, photographs, tmp_path):
        photographs("a.png", "b.jpg", "c.png")
        path = tmp_path / "photos" / "b.jpg"
        path.write_bytes(path.read_bytes()[:300])
        (tmp_path / "photos" / ".hidden.png").write_text("")
        (tmp_path / "photos" / "notes.txt").write_text("")
        status, out, err = run(model="pixels", data="folder:photos", image_size=16)
        assert (status, err.count("\n")) == (1, 1)
        assert err.startswith("fastsal analyze: warning: example 1 (b.jpg): OSError: ")
        assert "their rows are null: 1 of 3 examples, 1 (b.jpg);" in out

    def test_square(self):
        pixels = np.zeros((40, 80, 3), dtype=np.uint8)
        pixels[:, 20:60] = (255, 51, 0)
        x = inputs.Square(20)(Image.fromarray(pixels))
        assert (x.shape, x.dtype) == ((3, 20, 20), torch.float32)
        torch.testing.assert_close(x[:, 5:15, 5:15], torch.tensor([1, 0.2, 0]).view(3, 1, 1).expand(3, 10, 10))
        assert inputs.Square(33)(Image.fromarray(pixels[:7, :5])).shape == (3, 33, 33)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"data": "folder:nowhere"}, "--data folder:nowhere: is no folder"),
            (
                {"data": "folder:photos/empty"},
                "--data folder:photos/empty: holds no image, wants files ending with .bmp,",
            ),
            (
                {"image_size": None},
                "--image-size: is missing; a model of your own does not say how large its images are",
            ),
            ({"image_size": 15}, "on x of shape (1, 3, 15, 15): RuntimeError: mat1 and mat2"),
            ({"image_size": 0}, "argument --image-size: got '0', wants a whole number from 1"),
            ({"workers": -1}, "argument --workers: got '-1', wants a whole number from 0"),
            ({"save_every": -1}, "argument --save-every: got '-1', wants a number from 0"),
            (
                {"weights": "random"},
                "--weights random: is for timm:NAME and torchvision:NAME; leave it out, and your code",
            ),
            ({"mean": "1 2", "std": "1 2 3"}, "--std: got 3 numbers, wants as many as --mean, 2"),
            ({"std": "0"}, "--std: got 0, wants what to divide by"),
        ],
    )
    def test_one_line_and_status_2(self, run, photographs, tmp_path, options, message):
        photographs("a.png")
        (tmp_path / "photos" / "empty").mkdir()
        options = {"model": "pixels", "data": "folder:photos", "image_size": 16, **options}
        status, out, err = run(**{name: value for name, value in options.items() if value is not None})
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
        assert not (tmp_path / "results").exists()


class TestNormalisation:
    def test_is_part_of_the_model(self, run, folder):
        assert run(mean="0.5 0.4 0.3", std="0.25")[0] == 0
        sys.path.insert(0, "")
        try:
            net = __import__(folder).net()
        finally:
            sys.path.remove("")
        x = torch.from_numpy(np.load("x.npz")["x"])

        def normalised(x):
            return net((x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.25)

        want = fastsal.analyze(normalised, x)
        got = load("results")
        assert torch.equal(got.linearized_robustness, want.linearized_robustness)
        assert torch.equal(got.alignment, want.alignment)
        # four times nearer in these units than where the model takes x as it is normalised
        plain = fastsal.analyze(net, (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.25)
        torch.testing.assert_close(4 * got.linearized_robustness, plain.linearized_robustness)

    def test_any_number_of_dimensions_and_dtype(self):
        model = models.Normalized(nn.Flatten(), [1.0, 2.0], [2.0, 4.0])
        assert model(torch.tensor([[3.0, 4.0]], dtype=torch.float64)).tolist() == [[1.0, 0.5]]
        assert model(torch.full((1, 2, 1, 1, 1), 3.0)).tolist() == [[1.0, 0.25]]


class TestNetworksByName:
    def test_torchvision(self, torchvision, run, photographs):
        photographs("a.png", "b.png", "c.png")
        options = {"model": "torchvision:squeezenet1_1", "weights": "random", "data": "folder:photos"}
        status, out, err = run(**options, method="candidates", batch_size=2)
        assert (status, err) == (0, "")
        assert "3 examples of shape (3, 224, 224), 1000 classes" in out
        assert (
            "distances are in pixels in [0, 1]: the normalisation of torchvision:squeezenet1_1, mean 0.485, 0.456, 0.406 "
            "and standard deviation 0.229, 0.224, 0.225, is part of the model"
        ) in out
        loaded = models.load("torchvision:squeezenet1_1", "random", None, None)
        image = Image.open("photos/a.png").convert("RGB")
        preset = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.transforms()
        x = loaded.transform(image)
        assert 0 <= x.min() < x.max() <= 1
        torch.testing.assert_close(loaded.model(x[None]), loaded.model.model(preset(image)[None]))
        assert run(**options, method="candidates", batch_size=2) == (0, out, "")  # the same random weights again

    def test_timm(self, torchvision, run, photographs):
        timm = pytest.importorskip("timm")
        photographs("a.png", "b.png")
        options = {"model": "timm:tf_efficientnet_lite0", "data": "folder:photos", "method": "candidates"}
        torch.manual_seed(5)
        net = timm.create_model("tf_efficientnet_lite0").eval()
        torch.save(net.state_dict(), "weights.pt")
        status, out, err = run(**options, weights="weights.pt")
        assert (status, err) == (0, "")
        assert "normalisation of timm:tf_efficientnet_lite0, mean 0.5, 0.5, 0.5 and standard deviation 0.5," in out
        own = timm.data.create_transform(**timm.data.resolve_model_data_config(net), is_training=False)
        x = torch.stack([own(Image.open(f"photos/{name}.png").convert("RGB")) for name in "ab"])
        want = fastsal.analyze(net, x, method="candidates")
        torch.testing.assert_close(load("results").linearized_robustness, 0.5 * want.linearized_robustness)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model": "torchvision:resnet19"}, "--model torchvision:resnet19: "),
            ({"model": "timm:resnet19"}, "--model timm:resnet19: RuntimeError: Unknown model (resnet19)"),
            ({"mean": "1"}, "--mean, --std: torchvision:resnet18 brings its own normalisation"),
            ({"image_size": 3}, "--image-size: torchvision:resnet18 brings its own"),
            ({"channels": 1}, "--channels: torchvision:resnet18 brings its own"),
            ({"weights": "missing.pt"}, "--weights missing.pt: FileNotFoundError"),
        ],
    )
    def test_one_line_and_status_2(self, torchvision, run, photographs, options, message):
        photographs("a.png")
        defaults = {"model": "torchvision:resnet18", "weights": "random", "data": "folder:photos"}
        status, out, err = run(**defaults | options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err

    def test_without_the_libraries(self, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        status, _, err = run(model="timm:resnet18")
        assert (status, err.endswith("; pip install timm\n"), err.count("\n")) == (2, True, 1)

        def lacking(name):
            raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

        monkeypatch.setattr(files.importlib, "import_module", lacking)
        status, _, err = run(model="timm:resnet18")
        assert (status, "timm cannot be imported: No module named 'torchvision'; pip install torchvision" in err) == (
            2,
            True,
        )

        def broken(name):
            raise RuntimeError("operator torchvision::nms does not exist")

        monkeypatch.setattr(files.importlib, "import_module", broken)
        status, _, err = run(model="torchvision:resnet18")
        assert status == 2
        assert err == (
            f"fastsal analyze: torchvision cannot be imported beside torch {torch.__version__} (operator torchvision::nms does "
            "not exist); wants builds of torch and torchvision that belong together\n"
        )
