"""What fastsal did not write it never writes to, whatever the options; what it wrote it replaces, or resumes."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import fastsal
from fastsal.cli import analyze as command
from fastsal.cli import demo, main, study
from fastsal.evaluation.tables import MISSING
from fastsal.study import attacks, figures

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = ("digits.npz", "./digits.npz", "x.npy", "linked.npz", "folder:imgs", "folder:./imgs/", "folder:linked_imgs")
NEW = ("new", "new/", "deep/er", "new.csv", "new.npz", "new.parquet", "empty", "linked_empty")
TAKEN = (
    *(
        "digits.npz",
        "./digits.npz",
        "imgs/../digits.npz",
        "{home}/digits.npz",
        "linked.npz",
        "hard.npz",
        "dangling.npz",
    ),
    *("labels.csv", "resaved.csv", "table.parquet", "pipe.csv", "x.npy", "weights.pt", "weights.csv", "photo.png"),
    *("imgs", "imgs/", "./imgs", "{home}/imgs", "linked_imgs", "imgs/1", "notes", ".", "", "locked", "dangling"),
)
INSIDE = ("imgs/new", "imgs/new.csv", "linked_imgs/new.npz", "imgs/1/new/")  # the folder of images
PICTURES = ("new.png", "new.svg", "new.pdf")
TAKEN_PICTURES = (
    *("photo.png", "{home}/photo.png", "drawing.svg", "paper.pdf", "linked.png", "dangling.png", "notes/mine.png"),
    "imgs/1/a.png",
)
PICTURES_INSIDE = ("imgs/new.png", "linked_imgs/new.svg")


def furnish(home):
    """A folder with files of a user's of every kind that fastsal writes, folders, and links to both."""
    x = np.random.default_rng(0).standard_normal((9, 3, 2, 2)).astype(np.float32)
    np.savez(home / "digits.npz", x=x, y=np.arange(9) % 4)
    np.save(home / "x.npy", x)
    (home / "labels.csv").write_bytes(b"index,y\r\n0,3\r\n")
    (home / "resaved.csv").write_text(",".join(["index", *MISSING]) + "\n0" + ",1" * len(MISSING) + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"index": [0, 1]}), home / "table.parquet")
    torch.save({}, home / "weights.pt")
    torch.save({}, home / "weights.csv")
    for name in ("imgs/1/a.png", "imgs/0/b.png", "photo.png", "notes/mine.png"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((5, 5, 3), len(name), dtype=np.uint8)).save(home / name)
    (home / "drawing.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (home / "paper.pdf").write_bytes(b"%PDF-1.4\n")
    (home / "locked").mkdir()
    (home / "locked" / ".lock").write_text("a tool of the user's")
    (home / "empty").mkdir()
    for link, target in {
        **{"linked.npz": "digits.npz", "linked.png": "photo.png", "linked_imgs": "imgs", "linked_empty": "empty"},
        **{"dangling.npz": "gone.npz", "dangling.png": "gone.png", "dangling": "gone"},
    }.items():
        (home / link).symlink_to(target)
    os.link(home / "digits.npz", home / "hard.npz")
    os.mkfifo(home / "pipe.csv")


def contents(home):
    """Everything below a folder: where a link points, what a file holds, what a folder but for the outermost is."""
    found = {}
    for path in home.rglob("*"):
        name = path.relative_to(home).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = sorted(one.name for one in path.iterdir())
        else:
            found[name] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


def analyze(data, out, *options):
    """A model whose logits are its inputs."""
    size = ["--image-size", "2"] if data.startswith("folder:") else []
    return main(["analyze", "--model", "torch.nn:Flatten", "--data", data, "--out", out, *size, *options])


@pytest.fixture
def home(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestAnalyze:
    @settings(max_examples=150, deadline=None)
    @given(
        data=st.sampled_from(DATA),
        out=st.sampled_from((*NEW, *TAKEN, *INSIDE)),
        plot=st.sampled_from((None, *PICTURES, *TAKEN_PICTURES, *PICTURES_INSIDE)),
        weights=st.sampled_from((None, "weights.pt", "weights.csv")),
    )
    def test_no_combination_changes_a_file_of_the_users(self, data, out, plot, weights):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            home = Path(folder).resolve()
            furnish(home)
            patch.chdir(home)
            before = contents(home)
            options = [] if plot is None else ["--plot", plot.format(home=home)]
            options += [] if weights is None else ["--weights", weights]
            status = analyze(data, out.format(home=home), *options)
            after = contents(home)
            inside = {out, plot} & {*INSIDE, *PICTURES_INSIDE}
            if {out, plot} & {*TAKEN, *TAKEN_PICTURES} or (inside and data.startswith("folder:")):
                assert status == 2
                assert after == before
            else:
                assert status == 0
                folders = {name for name, held in before.items() if isinstance(held, list)}  # may have got new files
                assert all(after[name] == held for name, held in before.items() if name not in folders)
                assert all({*before[name]} <= {*after[name]} for name in folders)

    @pytest.mark.parametrize("out", [*TAKEN, *INSIDE])
    def test_one_line_says_what_is_wanted(self, home, capsys, out):
        assert analyze("folder:imgs", out.format(home=home)) == 2
        stdout, err = capsys.readouterr()
        assert (stdout, err.count("\n")) == ("", 1)
        assert err.startswith(f"fastsal analyze: --out {Path(out.format(home=home))}: ")

    @pytest.mark.parametrize("plot", [*TAKEN_PICTURES, *PICTURES_INSIDE])
    def test_of_pictures_too(self, home, capsys, plot):
        assert analyze("folder:imgs", "new.csv", "--plot", plot.format(home=home)) == 2
        stdout, err = capsys.readouterr()
        assert (stdout, err.count("\n")) == ("", 1)
        assert err.startswith(f"fastsal analyze: --plot {Path(plot.format(home=home))}: ")

    def test_two_options_may_not_name_one_path(self, home, capsys):
        for out, plot in (("new.png/", "new.png"), ("./new.png/", "imgs/../new.png")):
            assert analyze("x.npy", out, "--plot", plot) == 2
            assert capsys.readouterr().err == f"fastsal analyze: --plot {plot}: is --out too, wants another name\n"
        assert not (home / "new.png").exists()

    @pytest.mark.parametrize("out", ["own.csv", "own.npz", "own.parquet"])
    def test_own_results_are_replaced(self, home, out):
        assert analyze("x.npy", out, "--plot", "own.png") == 0
        first = (home / out).read_bytes()
        assert analyze("digits.npz", out, "--plot", "own.png", "--norm", "1") == 0  # with y, and other numbers
        assert (home / out).read_bytes() != first
        assert analyze("x.npy", out, "--plot", "own.png") == 0
        assert (home / out).read_bytes() == first
        for picture in ("own.svg", "own.pdf"):
            for _ in range(2):
                assert analyze("x.npy", out, "--plot", picture) == 0

    def test_a_folder_of_results_is_resumed(self, home, capsys):
        assert analyze("x.npy", "results") == 0
        assert analyze("x.npy", "results", "--plot", "results/picture.png") == 0
        (home / "results" / "notes.txt").write_text("mine")
        before = contents(home)
        assert analyze("x.npy", "results/", "--plot", "results/picture.png") == 0
        assert contents(home) == before
        for shard in (home / "results").glob("*.parquet"):
            shard.unlink()  # to have it done again
        assert analyze("x.npy", "results") == 0
        assert contents(home) == before

    def test_what_appears_meanwhile_is_kept(self, home, capsys, monkeypatch):
        """The user's own file is there before the results are: they are lost, the file is not."""
        in_memory = command.in_memory

        def slow(*args, **options):
            (home / "new.csv").write_text("mine")
            return in_memory(*args, **options)

        monkeypatch.setattr(command, "in_memory", slow)
        assert analyze("x.npy", "new.csv") == 2
        assert (home / "new.csv").read_text() == "mine"
        assert "--out new.csv: " in capsys.readouterr().err


class TestEvaluate:
    @pytest.mark.parametrize("out", ["imgs", "linked_imgs", "notes", ".", "locked"])
    def test_a_folder_of_the_users_is_refused(self, home, out):
        before = contents(home)
        with pytest.raises(ValueError, match=r"^out: \S+ .*wants "):
            fastsal.evaluate(torch.nn.Linear(6, 3), torch.rand(5, 6), out)
        assert contents(home) == before

    def test_what_a_killed_run_left_is_resumed(self, home):
        """SIGKILL, soon after the start, leaves a lock alone, and a file that was never renamed."""
        killed = home / "killed"
        killed.mkdir()
        for left in (".examples-000000000-000000004.parquet.77.tmp", ".fastsal-results"):
            (killed / left).touch()
            assert fastsal.evaluate(torch.nn.Linear(6, 3), torch.rand(5, 6), killed).examples == 5
            assert not list(killed.glob(".*.tmp"))
            for shard in killed.glob("*.parquet"):
                shard.unlink()


class TestDemo:
    @pytest.mark.parametrize("kind", ["photographs", "digits"])
    @pytest.mark.parametrize("out", ["photo.png", "linked.png", "dangling.png", "drawing.svg", "paper.pdf"])
    def test_a_picture_of_the_users_is_refused(self, home, capsys, monkeypatch, out, kind):
        monkeypatch.setattr(getattr(demo, kind), "show", lambda *_: pytest.fail("refused too late"))
        before = contents(home)
        assert main(["demo", "--out", out, *(["--digits"] if kind == "digits" else [])]) == 2
        assert contents(home) == before
        assert capsys.readouterr().err.startswith(f"fastsal demo: --out {out}: ")


class TestStudy:
    @pytest.mark.parametrize("out", ["imgs", "linked_imgs", "notes", ".", "", "digits.npz", "dangling", "options"])
    def test_a_folder_of_the_users_is_refused(self, home, capsys, monkeypatch, out):
        monkeypatch.setattr(study, "train", lambda *_, **__: pytest.fail("refused too late"))
        (home / "options").mkdir()
        (home / "options" / "options.json").write_text(json.dumps({"data": "digits", "images": 1}))
        before = contents(home)
        assert main(["study", "--out", out]) == 2
        assert contents(home) == before
        out_, err = capsys.readouterr()
        assert (out_, err.count("\n")) == ("", 1)
        assert err.startswith(f"fastsal study: --out {out or '.'}: ")

    def test_not_inside_the_data(self, home, capsys, torchvision):
        (home / "imgs").rename(home / "train")
        (home / "val").symlink_to("train")
        before = contents(home)
        assert main(["study", "--data", "folder:.", "--out", "train/study"]) == 2
        assert contents(home) == before
        assert "--out train/study: lies inside the data" in capsys.readouterr().err

    def test_a_report_of_the_users_inside_the_folder_is_kept(self, home, capsys, monkeypatch):
        monkeypatch.setattr(study, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        options = ["study", "--epochs", "1", "--images", "4", "--strengths", "--radii", "1", "--out", "own"]
        assert main(options) == 130
        own = ("report.md", "report.html", "models.csv", "images.csv", "saliency.png", "accuracy.svg")
        monkeypatch.undo()
        monkeypatch.chdir(home)
        monkeypatch.setitem(attacks.STEPS, "Carlini-Wagner", 2)
        empty = lambda studies: (pytest.importorskip("matplotlib.figure").Figure(), "")  # noqa: E731
        monkeypatch.setattr(figures, "FIGURES", {name: (title, empty) for name, (title, _) in figures.FIGURES.items()})
        for name in own:
            (home / "own" / name).write_text("mine")
            assert main(options) == 2
            assert (home / "own" / name).read_text() == "mine"
            assert f"/{name}: " in capsys.readouterr().err
            (home / "own" / name).unlink()
        assert main(options) == 0
        assert main(options) == 0
