"""fastsal analyze: its numbers, its files, and one line for everything that a user can get wrong."""

import csv
import dataclasses
import json
import math
import pickle
import sys

import numpy as np
import pytest
import torch

import fastsal
from fastsal import files
from fastsal.cli import main
from fastsal.evaluation import tables

pytestmark = pytest.mark.usefixtures("one_thread")


MODELS = """
import torch
from torch import nn

def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))

ready = linear()
double = linear().double()
wide = nn.Sequential(nn.Flatten(), nn.Linear(6, 200), nn.Tanh())
score = nn.Sequential(nn.Flatten(), nn.Linear(6, 1))
softmax = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Softmax(1))
number = 3

def untrained():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 4))

def broken():
    raise LookupError("no such\\nconfiguration")

def leaves():
    raise SystemExit(0)

class Late(nn.Linear):
    seen = 0

    def forward(self, x):
        self.seen += len(x)
        if self.seen > 28:  # in the second batch of ten: the first runs 21 to 28
            raise self.error
        return super().forward(x.flatten(1))

def failing():
    torch.manual_seed(0)
    model = Late(6, 4)
    model.error = ArithmeticError("late")
    return model

def interrupted():
    torch.manual_seed(0)
    model = Late(6, 4)
    model.error = KeyboardInterrupt()
    return model
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in: models.py under a name of its own, and data with every kind of value."""
    monkeypatch.chdir(tmp_path)
    name = f"models_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    x = np.random.default_rng(0).standard_normal((23, 2, 3)).astype(np.float32)
    np.save("x.npy", x)
    np.savez("xy.npz", x=x, y=np.arange(23) % 4)
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def run(folder, capsys):
    """`run(out=..., **options)`: the analyze command, with its status, standard output and standard error."""

    def call(**options):
        options = {"model": f"{folder}:linear", "data": "x.npy", "out": "out.csv", **options}
        if ":" not in options["model"]:
            options["model"] = f"{folder}:{options['model']}"
        arguments = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        status = main(["analyze", *arguments])
        return status, *capsys.readouterr()

    return call


def read_csv(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def make(folder, name="linear"):
    sys.path.insert(0, "")
    try:
        return getattr(__import__(folder), name)
    finally:
        sys.path.remove("")


def scalars(result):
    """The fields of a Geometry that are one value an example."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return {name: value for name, value in fields.items() if isinstance(value, torch.Tensor) and value.dim() == 1}


class TestAnalyze:
    @pytest.mark.parametrize("options", [{}, {"norm": "inf", "chunk_size": 2}, {"method": "candidates", "norm": 1}])
    def test_csv_holds_what_analyze_returns(self, run, folder, options):
        status, out, err = run(**options, batch_size=7)
        assert (status, err) == (0, "")
        rows = read_csv("out.csv")
        x = torch.from_numpy(np.load("x.npy"))
        parts = [fastsal.analyze(make(folder)(), part, **options) for part in x.split(7)]
        assert rows["index"] == [str(i) for i in range(23)]
        for name in scalars(parts[0]):
            want = torch.cat([getattr(part, name) for part in parts])
            got = [json.loads(text.lower()) for text in rows[name]]
            assert torch.equal(torch.tensor(got, dtype=want.dtype), want), name
        assert set(rows["method"]) == {parts[0].method}
        assert {float(text) for text in rows["failure_probability"]} == {0.0}
        assert set(rows) == {"index", "method", "failure_probability", *scalars(parts[0])}
        assert "23 examples of shape (2, 3), 4 classes" in out
        assert "4 backward and 0 forward-mode, for n = 4 classes" in out

    def test_npz_holds_what_analyze_returns(self, run, folder):
        status, out, _ = run(out="out.npz", data="xy.npz", model="ready")
        assert status == 0
        x, y = (torch.from_numpy(np.load("xy.npz")[name]) for name in "xy")
        result = fastsal.analyze(make(folder, "ready"), x)
        with np.load("out.npz") as file:
            for name, want in scalars(result).items():
                assert file[name].dtype == want.numpy().dtype
                assert np.array_equal(file[name], want.numpy()), name
            assert file["index"].tolist() == list(range(23))
        assert f"accuracy {(result.prediction == y).double().mean():.4f}" in out
        quartiles = np.quantile(result.linearized_robustness.numpy(), [0.25, 0.5, 0.75], method="inverted_cdf")
        (line,) = (line for line in out.splitlines() if line.startswith("linearized_robustness"))
        assert line.split()[1:] == [f"{value:.6g}" for value in quartiles]

    def test_not_finite_values_stay_in_their_rows(self, run):
        x = np.load("x.npy")
        x[3, 0, 0] = np.nan
        np.save("x.npy", x)
        status, out, _ = run()
        assert status == 0
        rho = [float(text) for text in read_csv("out.csv")["linearized_robustness"]]
        assert [i for i, value in enumerate(rho) if math.isnan(value)] == [3]
        assert "(1 NaN left out)" in out

    def test_data_takes_the_models_dtype(self, run, folder):
        np.save("x.npy", np.load("x.npy").astype(">f8"))  # the other byte order too
        status, out, _ = run(out="a.npz")
        assert (status, "x is >f8 in the file and was analysed in the model's torch.float32" in out) == (0, True)
        assert run(out="b.npz", model="double")[0] == 0
        with np.load("a.npz") as single, np.load("b.npz") as double:
            assert (single["alignment"].dtype, double["alignment"].dtype) == (np.float32, np.float64)
            np.testing.assert_allclose(single["alignment"], double["alignment"], rtol=1e-4)

    @pytest.mark.parametrize("ending", ["safetensors", "pt"])
    def test_weights(self, run, folder, ending):
        model = make(folder)()
        with torch.no_grad():
            model[1].weight.mul_(2)
        if ending == "pt":
            torch.save(model.state_dict(), "weights.pt")
        else:
            pytest.importorskip("safetensors.torch").save_file(model.state_dict(), "weights.safetensors")
        assert run(weights=f"weights.{ending}", out="out.npz")[0] == 0
        want = fastsal.analyze(model, torch.from_numpy(np.load("x.npy")))
        with np.load("out.npz") as file:
            assert np.array_equal(file["bound"], want.bound.numpy())

    def test_one_array_of_any_name_and_one_score(self, run):
        np.savez("other.npz", images=np.load("x.npy"), y=np.zeros(23, dtype=int))
        status, out, _ = run(data="other.npz", model="score")
        assert (status, "2 classes" in out) == (0, True)

    def test_many_classes_hint(self, run):
        hint = "hint: --method certified"
        assert hint in run(model="wide", method="exact")[1]
        assert hint in run(model="wide", method="exact", norm="inf")[1]
        for options in ({}, {"model": "wide"}, {"model": "wide", "method": "candidates"}, {"model": "wide", "norm": 1}):
            assert hint not in run(**options)[1]

    @pytest.mark.parametrize("norm", [2, "inf"])
    def test_certified(self, run, norm):
        assert run(model="wide", norm=norm, method="exact", out="exact.npz")[0] == 0
        status, out, _ = run(model="wide", norm=norm, method="certified", out="certified.npz")
        assert (status, "certified: 23 of 23 examples" in out) == (0, True)
        with np.load("exact.npz") as exact, np.load("certified.npz") as certified:
            assert np.array_equal(exact["runner_up"], certified["runner_up"])
            assert set(certified["failure_probability"]) == {1e-6}
            assert (certified["jvps"] > 0).any()

    def test_warnings_are_one_line(self, run):
        status, _, err = run(model="softmax")
        assert status == 0
        assert err.startswith("fastsal analyze: warning: logits: every row is non-negative and sums to 1")
        assert err.count("\n") == 1

    def test_an_untrained_network_is_named(self, run, folder):
        status, _, err = run(model="untrained")
        assert status == 0
        assert err == (
            f"fastsal analyze: warning: --model {folder}:untrained: is untrained, with other weights each time it is made; "
            "--weights FILE loads some\n"
        )
        torch.save(make(folder, "untrained")().state_dict(), "weights.pt")
        for options in ({"model": "untrained", "weights": "weights.pt"}, {"model": "linear"}, {"model": "ready"}):
            assert run(**options)[::2] == (0, "")

    def test_model_is_put_into_evaluation_mode(self, run, folder):
        with open(f"{folder}.py", "a") as file:
            file.write("\n\ndropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4))\n")
        assert run(model="dropping")[0] == 0

    def test_earlier_results_are_replaced_only_by_a_whole_file(self, run, tmp_path):
        assert run()[0] == 0
        before = (tmp_path / "out.csv").read_text()
        assert run(model="failing", batch_size=10)[0] == 2
        assert (tmp_path / "out.csv").read_text() == before
        assert run(norm=1)[0] == 0
        assert (tmp_path / "out.csv").read_text() != before


class Exploding:
    """Whoever unpickles this knows it."""

    def __reduce__(self):
        return open, ("unpickled", "w")


def bad_files(folder):
    """Everything that the bad-input cases read."""
    objects = np.array([Exploding()], dtype=object)
    np.save("objects.npy", objects, allow_pickle=True)
    np.savez("objects.npz", x=objects, allow_pickle=True)
    with open("pickled.npy", "wb") as file:
        pickle.dump(Exploding(), file)
    torch.save(Exploding(), "pickled.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"1.weight": torch.zeros(5, 6)}, "partial.pt")
    torch.save({1: torch.zeros(5, 6)}, "keys.pt")
    x = np.load("x.npy")
    np.save("numbers.npy", np.zeros((3, 6), dtype=np.uint8))
    np.save("complex.npy", np.zeros((3, 6), dtype=np.complex64))
    np.save("scalar.npy", np.float32(3))
    np.save("empty.npy", x[:0])
    np.save("narrow.npy", x[:, :, :2])
    np.savez("two.npz", a=x, b=x)
    np.savez("labels.npz", x=x, y=np.zeros(3, dtype=int))
    np.savez("floats.npz", x=x, y=np.zeros(23))
    with open("xy.npz", "rb") as whole, open("cut.npz", "wb") as cut:
        cut.write(whole.read()[:-40])
    with open("xy.npz", "rb") as whole, open("flipped.npz", "wb") as flipped:
        content = bytearray(whole.read())
        content[200] ^= 255  # inside the array x: the checksum says so
        flipped.write(content)
    for name in ("garbage.npy", "garbage.npz", "garbage.pt", "garbage.safetensors"):
        with open(name, "wb") as file:
            file.write(b"neither fish nor fowl")
    with open("cut.npy", "wb") as file, open("x.npy", "rb") as whole:
        file.write(whole.read()[:-5])
    with open("syntax_error_here.py", "w") as file:
        file.write("def f(:\n")


BAD = [
    ({"data": "missing.npy"}, "--data missing.npy: FileNotFoundError"),
    ({"data": "objects.npy"}, "--data objects.npy: ValueError: "),
    ({"data": "objects.npz"}, "--data objects.npz: ValueError: Object arrays cannot be loaded"),
    ({"data": "pickled.npy"}, "--data pickled.npy: ValueError"),
    ({"data": "garbage.npy"}, "--data garbage.npy: "),
    ({"data": "garbage.npz"}, "--data garbage.npz: "),
    ({"data": "cut.npy"}, "--data cut.npy: "),
    ({"data": "cut.npz"}, "--data cut.npz: BadZipFile"),
    ({"data": "flipped.npz"}, "--data flipped.npz: "),
    ({"data": "."}, "--data .: is a folder; the images in it are --data folder:."),
    ({"data": "numbers.npy"}, "--data numbers.npy: x is uint8, wants float16, float32 or float64"),
    ({"data": "complex.npy"}, "x is complex64"),
    ({"data": "scalar.npy"}, "x has shape (), wants [N, ...]"),
    ({"data": "empty.npy"}, "x has shape (0, 2, 3), wants [N, ...] with at least one example"),
    ({"data": "two.npz"}, "holds ['a', 'b'], wants x, or a single array"),
    ({"data": "labels.npz"}, "y has shape (3,)"),
    ({"data": "floats.npz"}, "y has shape (23,) and is float64, wants a whole number"),
    ({"data": "narrow.npy"}, "on x of shape (1, 2, 2): RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ({"model": "nocolon.py", "_exact": True}, "--model nocolon.py: wants package.module:name"),
    ({"model": "no_such_module:net"}, "ModuleNotFoundError: No module named 'no_such_module'"),
    ({"model": "syntax_error_here:net"}, "SyntaxError"),
    ({"model": "missing"}, "AttributeError: module 'models_"),
    ({"model": "number"}, "gives int, wants a torch.nn.Module"),
    ({"model": "nn.Linear"}, "TypeError"),
    ({"model": "torch.nn:ReLU"}, "model: returned shape (1, 2, 3), wants logits [B, n]"),
    ({"model": "broken"}, "LookupError: no such configuration ("),
    ({"model": "leaves"}, "SystemExit: 0"),
    ({"model": "failing", "batch_size": 10}, "examples 10 to 19: ArithmeticError: late ("),
    ({"weights": "missing.pt"}, "--weights missing.pt: FileNotFoundError"),
    ({"weights": "pickled.pt"}, "--weights pickled.pt: is no torch file of tensors alone"),
    ({"weights": "garbage.pt"}, "--weights garbage.pt: "),
    ({"weights": "garbage.safetensors"}, "--weights garbage.safetensors: SafetensorError"),
    ({"weights": "missing.safetensors"}, "--weights missing.safetensors: FileNotFoundError"),
    ({"weights": "tensor.pt"}, "--weights tensor.pt: holds Tensor, wants a state_dict"),
    ({"weights": "partial.pt"}, "--weights partial.pt: RuntimeError: Error(s) in loading state_dict"),
    ({"weights": "keys.pt"}, "--weights keys.pt: "),
    ({"out": "out.txt"}, "--out out.txt: the ending decides the format, wants .csv or .npz"),
    ({"out": "nowhere/out.csv"}, "--out nowhere/out.csv: cannot write into the folder nowhere"),
    ({"out": "folder.csv"}, "--out folder.csv: is a folder"),
    ({"method": "guess"}, "argument --method: invalid choice: 'guess'"),
    ({"norm": "1", "method": "certified"}, "norm: got 1 with method='certified', wants 2 or inf"),
    ({"norm": "3"}, "argument --norm: invalid choice: '3'"),
    ({"batch_size": 0}, "argument --batch-size: got '0', wants a whole number from 1"),
    ({"chunk_size": "many"}, "argument --chunk-size: got 'many'"),
    ({"backend": "abacus"}, "backend: got 'abacus', wants one of"),
    ({"device": "abacus"}, "--device abacus: RuntimeError"),
    ({"device": "cuda"}, f"--device cuda: torch {torch.__version__} finds no GPU (it is built "),
    ({"nonsense": 1}, "unrecognized arguments: --nonsense 1 (see fastsal analyze --help)"),
    ({"batchsize": 3}, "unrecognized arguments: --batchsize 3 (see fastsal analyze --help)"),
    ({"keep": "distances"}, "--keep: --out out.csv is a file, wants a folder to lay arrays into"),
    ({"keep": "alignment"}, "argument --keep: invalid choice: 'alignment'"),
    ({"channels": 2}, "argument --channels: invalid choice: 2"),
    ({"weights": "random"}, "is for timm:NAME and torchvision:NAME; leave it out, and your code decides"),
]


class TestBadInput:
    @pytest.mark.parametrize(("options", "message"), BAD, ids=[f"{next(iter(o))}-{i}" for i, (o, _) in enumerate(BAD)])
    def test_one_line_and_status_2(self, folder, tmp_path, capsys, options, message):
        bad_files(folder)
        (tmp_path / "folder.csv").mkdir()
        options = {"model": "linear", "data": "x.npy", "out": "out.csv", **options}
        exact = options.pop("_exact", False)
        if ":" not in options["model"] and not exact:
            options["model"] = f"{folder}:{options['model']}"
        before = sorted(path.name for path in tmp_path.iterdir())
        path = list(sys.path)
        command = [text for key, value in options.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        assert main(["analyze", *command]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("fastsal analyze: ")
        assert message in err
        assert err.count("\n") == 1
        assert len(err) < 900
        after = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
        assert after == [name for name in before if name != "__pycache__"]  # no output, no leftovers, no "unpickled"
        assert sys.path == path

    def test_no_traceback_from_a_shell(self, folder, run_python):
        result = run_python(
            "-m", "fastsal", "analyze", "--model", f"{folder}:broken", "--data", "x.npy", "--out", "o.csv"
        )
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"fastsal analyze: --model {folder}:broken: LookupError: no such configuration")
        assert f"{folder}.py:" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_missing_extra(self, folder, run, monkeypatch, capsys):
        (open("w.safetensors", "wb")).close()
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        status, _, err = run(weights="w.safetensors")
        assert (status, err.endswith("pip install 'fastsal[demo]'\n"), err.count("\n")) == (2, True, 1)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["demo"]) == 2
        assert capsys.readouterr().err.endswith("pip install 'fastsal[demo]'\n")

    @pytest.mark.parametrize("out", ["out.csv", "out.npz"])
    def test_ctrl_c_leaves_no_file(self, run, tmp_path, monkeypatch, out):
        def interrupt(*_, **__):
            raise KeyboardInterrupt

        status, stdout, err = run(model="interrupted", batch_size=10, out=out)
        assert (status, stdout, err) == (130, "", "fastsal analyze: interrupted\n")
        # and while the file is being written
        if out.endswith("csv"):
            monkeypatch.setattr(files.csv, "writer", interrupt)
        else:
            monkeypatch.setattr(tables.np, "savez", interrupt)
        assert run(out=out)[0] == 130
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    def test_a_failing_disk(self, run, tmp_path, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tables.np, "savez", full)
        status, _, err = run(out="out.npz")
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith("fastsal analyze: --out out.npz: OSError: [Errno 28] No space left on device")
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
