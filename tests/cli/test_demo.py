"""fastsal demo: of digits the same numbers twice, of photographs those that analyze and deepfool return, and the picture."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastsal
from fastsal.cli import digits as demo
from fastsal.cli import main, photographs
from fastsal.study.data import load_digits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load_digits(0)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """The demo with little training: its output and the picture, twice."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("demo")
    outputs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "EPOCHS", 2)
        for name in ("a.png", "b.png"):
            text = []
            patch.setattr("builtins.print", lambda *parts, text=text, **_: text.append(" ".join(map(str, parts))))
            assert main(["demo", "--digits", "--out", str(folder / name)]) == 0
            outputs.append("\n".join(text))
    return outputs, folder


def test_same_numbers_twice(demo_run):
    outputs, folder = demo_run
    tables = [output.partition("largest deviation")[0] for output in outputs]
    assert tables[0] == tables[1]
    pictures = [(folder / name).read_bytes() for name in ("a.png", "b.png")]
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png"]


def test_prints_what_it_measured(demo_run, digits):
    text = demo_run[0][0]
    for name in ("test accuracy", *(f"median {name}" for name in demo.QUANTITIES)):
        (line,) = (line for line in text.splitlines() if line.startswith(name))
        assert len(line.split()) >= 4
    plain = demo.measure(digits, 0.0, 0, 2)
    (line,) = (line for line in text.splitlines() if line.startswith("median alignment"))
    assert line.split()[2] == f"{plain.geometry.alignment.median().item():.4f}"
    deviation = float(text.partition("float64 reference: ")[2].split()[0])
    assert 0 < deviation <= 1e-6
    assert "ms on the reference backend" in text


def test_training_leaves_threads_and_generator(digits):
    state, threads = torch.get_rng_state(), 2
    torch.set_num_threads(threads)
    a, b = (demo.measure(digits, 0.5, seed, 1) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert not torch.equal(a.geometry.alignment, b.geometry.alignment)


def test_bad_ending(capsys):
    assert main(["demo", "--digits", "--out", "picture.txt"]) == 2
    assert capsys.readouterr().err.startswith("fastsal demo: --out picture.txt: the ending decides the format")


class TestPhotographs:
    @pytest.fixture
    def stub(self, monkeypatch):
        """A linear network of 1000 classes in the place of the one from a package."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(588, 1000)).eval().requires_grad_(False)
        monkeypatch.setattr(photographs, "network", lambda: model)
        return model

    @pytest.fixture
    def files(self, tmp_path):
        """A coloured photograph and one in grey, neither of them square."""
        rng = np.random.default_rng(0)
        for name, shape in (("a.png", (250, 300, 3)), ("b.jpg", (400, 230))):
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
        return [tmp_path / "a.png", tmp_path / "b.jpg"]

    def test_says_what_was_found(self, stub, files, tmp_path, capsys):
        out = tmp_path / "demo.png"
        assert main(["demo", *map(str, files), "--out", str(out)]) == 0
        text, err = capsys.readouterr()
        assert err == ""
        x, called = photographs.load(files), photographs.names()
        assert (x.shape, x.dtype, float(x.min()) >= 0, float(x.max()) <= 1) == (
            (2, 3, 224, 224),
            torch.float32,
            True,
            True,
        )
        exact = fastsal.analyze(stub, x, method="exact")
        for name, one in zip(("a.png", "b.jpg"), exact, strict=True):
            (line,) = (line for line in text.splitlines() if line.startswith(name))
            assert called[int(one.prediction)][:18] in line
            assert called[int(one.runner_up)][:21] in line
            assert f"{one.linearized_robustness.item():9.4f}" in line
            assert f"1.00 ρ̃, into {called[int(one.runner_up)]}" in line  # a linear network's boundary is where it seems
        (passes,) = re.findall(r"method='certified': (\d+) passes a photograph", text)
        assert 0 < int(passes) < 1000
        assert "method='exact': 1000 passes a photograph, some " in text
        assert "extrapolated from 30 passes of one" in text
        with Image.open(out) as picture:
            assert picture.size[0] > 300

    def test_names(self):
        called = photographs.names()
        assert (len(called), len(set(called))) == (1000, 1000)
        assert (called[285], called[967]) == ("Egyptian cat", "espresso")

    def test_the_network_that_comes_in_a_package(self):
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("skimage")
        x = photographs.load([])
        assert x.shape == (6, 3, 224, 224)
        with torch.no_grad():
            found = photographs.network()(x[:2]).argmax(1)
        assert [photographs.names()[which] for which in found] == ["Egyptian cat", "espresso"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere.jpg"], "fastsal demo: nowhere.jpg: FileNotFoundError"),
            (["--digits", "a.jpg"], "fastsal demo: --digits: takes no photographs, got a.jpg"),
        ],
    )
    def test_one_line(self, stub, capsys, arguments, message):
        assert main(["demo", *arguments, "--out", "nothing.png"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(message)
        assert err.count("\n") == 1

    def test_without_the_packages(self, monkeypatch, capsys):
        monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
        assert main(["demo", "--out", "nothing.png"]) == 2
        assert capsys.readouterr().err.endswith("pip install 'fastsal[demo]'\n")
