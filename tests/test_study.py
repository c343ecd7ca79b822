"""The study: training and its checkpoints, attacks beside closed forms, data formats, and the whole of `fastsal study`."""

import csv
import html.parser
import importlib.util
import math
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.cli import study as command
from fastsal.files import CommandError
from fastsal.study import report
from fastsal.study import train as training
from fastsal.study.attacks import ATTACKS, robustness
from fastsal.study.data import SIDE, Data, Held, load, load_digits
from fastsal.study.measure import accuracy, bias_sums, measure
from fastsal.study.models import cnn, factory
from fastsal.study.train import Recipe, objective, train, worst_nearby

pytest.importorskip("sklearn")
pytest.importorskip("foolbox")
pytest.importorskip("matplotlib")

GRID = ["--epochs", "2", "--images", "24", "--strengths", "0.1", "--radii", "0.5"]
LABELS = ["plain", "λ = 0.1", "ε = 0.5"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Everything here is small: a second thread would only wait, for long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network():
    """Small and without dropout."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


@pytest.fixture(scope="module")
def digits():
    return load_digits(0)


@pytest.fixture(scope="module")
def few(digits):
    """Little to train on."""
    return Data("few", Held(digits.train.x[:200], digits.train.y[:200]), digits.test, 10, (1, 8, 8))


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study with little of everything."""
    out = tmp_path_factory.mktemp("study")
    assert main(["study", *GRID, "--out", str(out)]) == 0
    return out


class Tags(html.parser.HTMLParser):
    """Every tag of a page with its attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


class TestStudy:
    def test_figures(self, study):
        for name in report.FIGURES:
            assert (study / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            svg = (study / f"{name}.svg").read_text(encoding="utf-8")
            assert svg.rstrip().endswith("</svg>")
            assert "viewBox" in svg
        assert not [path for path in study.rglob("*") if path.name.endswith(".tmp")]

    @pytest.mark.parametrize("name", report.FIGURES)
    def test_no_label_covers_another(self, study, name, monkeypatch):
        """Tick labels, axis labels and titles, as drawn."""
        found = []
        monkeypatch.setattr(report, "write", lambda study, out: found.append(study))
        assert main(["study", *GRID, "--out", str(study)]) == 0
        figure, _ = report.FIGURES[name][1](found[0])
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

    def test_page_needs_nothing_else(self, study):
        text = (study / "report.html").read_text(encoding="utf-8")
        page = Tags(text)
        images = [attributes for tag, attributes in page.tags if tag == "img"]
        assert len(images) == len(report.FIGURES)
        assert all(image["src"].startswith("data:image/svg+xml;base64,") and image["alt"] for image in images)
        assert not [attributes for _, attributes in page.tags if {"href", "srcset"} & set(attributes)]
        assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
        assert "url(" not in text
        assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags

    def test_captions_count(self, study):
        captions = re.findall("<figcaption>(.*?)</figcaption>", (study / "report.html").read_text(encoding="utf-8"))
        assert len(captions) == len(report.FIGURES)
        for name, caption in zip(report.FIGURES, captions, strict=True):
            want = {"saliency": "8 test images", "accuracy": "450 test images"}.get(name, "24 test images")
            assert want in caption

    def test_numbers(self, study):
        """A row a model and image, a row a model, medians that are the medians, and accuracy on the whole test split."""
        images, models = rows(study / "images.csv"), rows(study / "models.csv")
        assert [row["model"] for row in models] == LABELS
        assert len(images) == 24 * 3
        page = (study / "report.html").read_text(encoding="utf-8")
        for model in models:
            own = [row for row in images if row["model"] == model["model"]]
            assert [int(row["image"]) for row in own] == list(range(24))
            for name, symbol in report.TABLE.items():
                median = np.median([float(row[name]) for row in own])
                assert float(model[f"median {name}"]) == pytest.approx(median, rel=1e-6)
                assert symbol in page
                assert f"<td>{median:.3f}</td>" in page
            assert (float(model["accuracy"]) * 450) % 1 == pytest.approx(0, abs=1e-9)
            assert sum(int(model[f"smallest by {name}"]) for name in ATTACKS) == 24

    def test_what_must_hold(self, study):
        """ρ is its attack's and the smallest; the terms add up to the bound, which holds; β is the sum over the biases."""
        for row in rows(study / "images.csv"):
            value = {name: float(text) for name, text in row.items() if name not in ("model", "training", "attack")}
            assert value["rho"] == value[f"rho {row['attack']}"] == min(value[f"rho {name}"] for name in ATTACKS)
            assert math.isfinite(value["rho"])
            terms = value["alignment"] + value["gap_term"] + value["offset_term"]
            assert terms == pytest.approx(value["bound"], rel=1e-6)
            assert value["linearized_robustness"] <= value["bound"] * (1 + 1e-6)
            assert abs(value["binarized_degree"]) * value["linearized_robustness"] == pytest.approx(
                value["binarized_alignment"], rel=1e-4, abs=1e-5
            )
            # A float32 forward and backward pass of a few thousand terms a logit.
            assert max(value["bias_sum_error"], value["binarized_bias_sum_error"]) < 1e-5

    def test_goes_on(self, study, monkeypatch, capsys):
        """Nothing is done twice, another strength is trained alone, and other options want another folder."""
        trained, wrote = [], []
        monkeypatch.setattr(
            command, "train", lambda *args, **options: trained.append(args[2]) or train(*args, **options)
        )
        monkeypatch.setattr(report, "write", lambda study, out: wrote.append([r.recipe.label for r in study.results]))
        assert main(["study", *GRID[:-2], "--radii", "--out", str(study)]) == 0
        assert trained == []
        assert main(["study", *GRID, "--strengths", "0.1", "0.2", "--out", str(study)]) == 0
        assert trained == [Recipe(penalty=0.2)]
        assert wrote == [LABELS[:2], ["plain", "λ = 0.1", "λ = 0.2", "ε = 0.5"]]
        capsys.readouterr()
        assert main(["study", *GRID, "--out", str(study), "--seed", "1"]) == 2
        err = capsys.readouterr().err
        assert err == f"fastsal study: --out {study}: holds a study with seed 0, not 1; wants another folder\n"

    def test_prints_the_verdicts_again(self, study, capsys):
        """A second run says the same, and writes the same files but for nothing."""
        names = ("images.csv", "models.csv", "report.html", "accuracy.svg", "accuracy.png")
        before = [(study / name).read_bytes() for name in names]
        assert main(["study", *GRID, "--out", str(study)]) == 0
        assert [(study / name).read_bytes() for name in names] == before
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith(("yes ", "no  ")) for line in lines) == 6
        assert lines[-1] == f"wrote {study / 'report.html'}"
        page = Tags((study / "report.html").read_text(encoding="utf-8")).text
        for line in lines[len(LABELS) : -1]:
            assert line[4:].partition(": ")[2] in page or line in page

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--data", "mnist"], "--data mnist: wants digits, mnist:PATH, cifar10:PATH or folder:PATH"),
            (["--data", "svhn:/x"], "--data svhn:/x: wants digits"),
            (["--model", "resnet"], "--model resnet: wants cnn, torchvision:NAME or timm:NAME"),
            (["--strengths", "-1"], "got '-1', wants a number from 0"),
            (["--radii", "inf"], "got 'inf', wants a number from 0"),
            (["--radii", "0", "--strengths"], "--strengths and --radii: nothing to compare the plain network with"),
            (["--images", "0"], "got '0', wants a whole number from 1"),
            (["--device", "nowhere"], "--device nowhere: "),
        ],
    )
    def test_errors(self, options, message, tmp_path, capsys):
        assert main(["study", "--out", str(tmp_path / "out"), *options]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1

    def test_folder_that_cannot_be(self, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert main(["study", "--out", str(tmp_path / "file")]) == 2
        assert capsys.readouterr().err.startswith(f"fastsal study: --out {tmp_path / 'file'}: ")

    def test_missing_extra(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "foolbox", None)
        assert main(["study", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err.endswith("pip install 'fastsal[demo]'\n")


class TestClaims:
    """The verdicts, on numbers made up so that they are known."""

    def results(self, alpha_power, homogeneity):
        values = np.linspace(0.5, 1.5, 30)
        made = []
        for slot, penalty in enumerate((0.0, 0.1, 1.0, 10.0)):
            rho = values * 2**slot
            columns = dict.fromkeys(report.TABLE, rho) | {"alignment": rho**alpha_power, "attack": np.full(30, "PGD")}
            columns |= {"binarized_homogeneity": values, "binarized_alignment": rho * (1 + values[::-1])}
            columns |= {"homogeneity": np.full(30, homogeneity[slot])}
            score = 0.1 if slot == 3 else 0.9
            made.append(report.Result(Recipe(penalty=penalty), score, columns, torch.zeros(1, 1, 8, 8)))
        return report.Study("made up", 1, 30, torch.zeros(1, 1, 8, 8), made)

    def test_as_in_the_paper(self):
        claims = report.claims(self.results(0.5, (0.9, 0.8, 0.7, 0.99)))
        assert [held for _, held, _ in claims] == [True] * 6
        assert "from plain to λ = 1, the most robust, median ρ grows 4.00 times and median α 2.00 times" in claims[1][2]

    def test_otherwise(self):
        held = [held for _, held, _ in report.claims(self.results(-1, (0.7, 0.8, 0.9, 0.1)))]
        assert held == [True, False, False, False, False, True]
        superlinear = [held for _, held, _ in report.claims(self.results(2, (0.9, 0.8, 0.7, 0.1)))]
        assert superlinear == [True, True, True, True, False, True]

    def test_rank_correlation(self):
        assert report.rank_correlation([1, 2, 3, math.inf, 5], [10, 200, 3000, 0, math.nan]) == pytest.approx(1)
        assert report.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
        assert math.isnan(report.rank_correlation([1, 2], [1, 2]))
        assert math.isnan(report.rank_correlation([1, 1, 1], [1, 2, 3]))


class StopError(Exception):
    pass


class TestTraining:
    RECIPES = (Recipe(), Recipe(penalty=0.3), Recipe(radius=0.4))

    def run(self, few, recipe, checkpoint=None, stop=0, **options):
        """The weights, of a network with dropout; with `stop`, interrupted after so many epochs."""
        done = []

        def after_epoch():
            done.append(1)
            if len(done) == stop:
                raise StopError

        options = {"seed": 3, "epochs": 3, "batch_size": 64, "after_epoch": after_epoch, **options}
        make = lambda: cnn((1, 8, 8), 10, (4, 8), 16)  # noqa: E731
        model = train(make, few, recipe, checkpoint=checkpoint, **options)
        assert not model.training
        return model.state_dict(), len(done)

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
    def test_resumes_where_it_stopped(self, few, tmp_path, recipe):
        """Stopped after any epoch, or within one: the same weights, bit for bit. Finished: not trained again."""
        want, epochs = self.run(few, recipe)
        assert epochs == 3
        path = tmp_path / "checkpoint.pt"
        with pytest.raises(StopError):
            self.run(few, recipe, path, stop=1)
        taken = []

        class Breaking(Held):
            def batch(self, indices):
                taken.append(1)
                if len(taken) == 6:  # of four a epoch
                    raise StopError
                return super().batch(indices)

        broken = Data("few", Breaking(few.train.x, few.train.y), few.test, 10, (1, 8, 8))
        with pytest.raises(StopError):
            self.run(broken, recipe, path)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
        torch.manual_seed(77)  # of the caller: of no account
        got, epochs = self.run(few, recipe, path)
        assert epochs == 1
        again, epochs = self.run(few, recipe, path)
        assert epochs == 0
        for name, value in want.items():
            assert torch.equal(got[name], value)
            assert torch.equal(again[name], value)

    def test_half_written_checkpoint_never_counts(self, few, tmp_path, monkeypatch):
        path = tmp_path / "checkpoint.pt"
        with pytest.raises(StopError):
            self.run(few, Recipe(), path, stop=1)
        before = path.read_bytes()

        def breaks(state, file):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "save", breaks)
        with pytest.raises(KeyboardInterrupt):
            self.run(few, Recipe(), path)
        assert path.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    def test_damaged_checkpoint(self, few, tmp_path):
        (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
        with pytest.raises(CommandError, match=r"^checkpoint .*checkpoint\.pt: "):
            self.run(few, Recipe(), tmp_path / "checkpoint.pt")

    def test_seeds(self, few):
        state = torch.get_rng_state()
        one, same, other = (self.run(few, Recipe(), seed=seed, epochs=1)[0] for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)

    def test_killed(self, tmp_path, study, monkeypatch):
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
        monkeypatch.setattr(report, "write", lambda study, out: out)
        assert main(arguments) == 0
        for name in ("plain", "penalty-0.1"):
            got, want = (np.load(folder / "models" / f"{name}.npz") for folder in (tmp_path / "out", study))
            assert got.files == want.files
            assert all(np.array_equal(got[part], want[part]) for part in want.files)

    def test_worst_nearby(self, few):
        """Within the radius, of higher loss than at random, the model left in the mode it had."""
        torch.manual_seed(0)
        model = cnn((1, 8, 8), 10, (4, 8), 16).train()
        x, y = few.train.batch(torch.arange(50))
        worst = worst_nearby(model, x, y, 0.7)
        assert model.training
        assert not worst.requires_grad
        e = worst - x
        assert (e.flatten(1).norm(dim=1) <= 0.7 * (1 + 1e-6)).all()
        assert e.flatten(1).norm(dim=1).median() > 0.69
        model.eval()
        random = torch.randn_like(x)
        random *= 0.7 / random.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        losses = [nn.functional.cross_entropy(model(x + step), y, reduction="none") for step in (e, random, 0 * e)]
        assert (losses[0] > losses[1]).all()
        assert (losses[0] > losses[2]).all()

    def test_adversarial_objective(self, few, monkeypatch):
        model = network()
        x, y = few.train.batch(torch.arange(10))
        monkeypatch.setattr(training, "worst_nearby", lambda model, x, y, radius: x + radius)
        want = nn.functional.cross_entropy(model(x + 0.25), y)
        torch.testing.assert_close(objective(model, x, y, Recipe(radius=0.25)), want)

    def test_names(self):
        assert [recipe.name for recipe in self.RECIPES] == ["plain", "penalty-0.3", "radius-0.4"]
        assert [recipe.training for recipe in self.RECIPES] == ["plain", "double backpropagation", "adversarial"]
        assert [recipe.label for recipe in self.RECIPES] == ["plain", "λ = 0.3", "ε = 0.4"]

    def test_penalty_is_the_mean_over_examples_of_each_own_loss(self, digits, monkeypatch):
        """One step of plain gradient descent against a penalty computed example by example."""
        few = Data("few", Held(digits.train.x[:6], digits.train.y[:6]), digits.test, 10, (1, 8, 8))
        monkeypatch.setattr(torch.optim, "Adam", lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", lambda *_, **__: torch.optim.SGD([torch.zeros(1)]))
        trained = train(network, few, Recipe(penalty=0.7), seed=3, epochs=1, batch_size=64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = network()
        objective = torch.zeros(())
        for x, y in zip(few.train.x, few.train.y, strict=True):
            x = x.clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0))
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            objective = objective + (loss + 0.7 * gradient.square().sum()) / 6
        objective.backward()
        for name, parameter in model.named_parameters():
            # float32 sums in another order: a few ulp of the gradient's largest entry
            want = parameter.detach() - parameter.grad
            torch.testing.assert_close(trained.get_parameter(name).detach(), want, rtol=1e-5, atol=1e-5)


class TestAttacks:
    @pytest.mark.parametrize("bias", [False, True])
    def test_closed_form(self, bias):
        """Linear and affine binary classifiers: ρ = |Ψ†| / ‖g†‖, ρ̃ the same, and every attack close above it."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=bias)).eval()
        x = torch.rand(20, 1, 4, 4)
        score = (model(x)[:, 1] - model(x)[:, 0]).detach().double()
        rho = score.abs() / (model[1].weight[1] - model[1].weight[0]).detach().double().norm()
        found = robustness(model, x)
        assert (found.each >= rho.unsqueeze(1) * (1 - 1e-5)).all()
        torch.testing.assert_close(found.rho, rho, rtol=1e-4, atol=0)  # bisection: 2⁻¹⁶ of the way; float32
        near = found.each / rho.unsqueeze(1)
        for slot, name in enumerate(ATTACKS):
            assert near[:, slot].isfinite().all(), name
            assert near[:, slot].median() < 1.02, name
        geometry = fastsal.analyze(model, x)
        torch.testing.assert_close(geometry.linearized_robustness.double(), rho, rtol=1e-5, atol=0)

    def test_an_upper_bound_whatever_the_class(self, few):
        """Deterministic for a seed; of the prediction, right or wrong; the generator as it was."""
        torch.manual_seed(1)
        model = network().eval()
        x, _ = few.test.batch(torch.arange(12))
        state = torch.get_rng_state()
        one, two = robustness(model, x, seed=5), robustness(model, x, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(one.each, two.each)
        assert (one.rho > 0).all()
        assert torch.equal(one.rho, one.each.min(1).values)
        assert torch.equal(one.attack, one.each.argmin(1))
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_nothing_found(self):
        """Logits without a gradient: +inf, from every attack."""

        class Flat(nn.Module):
            def forward(self, x):
                return torch.stack((x.flatten(1).sum(1) * 0 + 3, x.flatten(1).sum(1) * 0), 1)

        found = robustness(Flat().eval(), torch.rand(2, 1, 3, 3))
        assert (found.each == math.inf).all()


class TestMeasure:
    def test_bias_sums(self, digits):
        """Another road to β and β†, in float64 on both."""
        torch.manual_seed(0)
        model = cnn((1, 8, 8), 10, (4, 8), 16).double().eval()
        x = digits.test.x[:20].double()
        geometry = fastsal.analyze(model, x)
        sums = bias_sums(model, x)
        own, other = (sums.gather(1, row.unsqueeze(1)).squeeze(1) for row in (geometry.prediction, geometry.runner_up))
        torch.testing.assert_close(geometry.offset, own, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(geometry.binarized_offset, own - other, rtol=1e-12, atol=1e-13)

    def test_no_bias_sums_where_euler_says_nothing(self):
        for layer in (nn.BatchNorm2d(1), nn.GELU()):
            assert bias_sums(nn.Sequential(layer, nn.Flatten(), nn.Linear(9, 2)).eval(), torch.rand(2, 1, 3, 3)) is None

    def test_degrees_of_homogeneity(self, digits):
        """Ψ = ⟨x,g⟩ without biases: 1. Ψ = ‖x‖²: 2."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 10, bias=False), nn.ReLU(), nn.Linear(10, 4, bias=False)
        ).eval()
        x, y = digits.test.batch(torch.arange(8))
        columns, maps = measure(model, x, y, torch.tensor([2, 5]), seed=0)
        np.testing.assert_allclose(columns["degree"], 1, rtol=1e-5)
        np.testing.assert_allclose(columns["homogeneity"], 1, rtol=1e-5)
        assert maps.shape == (2, 1, 8, 8)

        mix = torch.randn(64, 10)

        class Square(nn.Module):
            def forward(self, x):
                return (x.flatten(1) @ mix).square()

        columns, _ = measure(Square().eval(), x, y, torch.tensor([0]), seed=0)
        np.testing.assert_allclose(columns["degree"], 2, rtol=1e-5)
        np.testing.assert_allclose(columns["binarized_degree"], 2, rtol=1e-4)
        assert "bias_sum_error" not in columns

    def test_accuracy_is_of_the_whole_split(self):
        split = Held(torch.arange(600.0).view(-1, 1, 1, 1), torch.zeros(600, dtype=torch.int64))

        def model(x):
            return torch.stack((450 - x.flatten(), x.flatten() * 0), 1)

        # At 450 the logits are equal: the lowest class.
        assert accuracy(model, split, "cpu") == pytest.approx(451 / 600)


class TestModels:
    def test_cnn_of_the_paper(self):
        model = cnn((1, 28, 28), 10)
        assert [type(module).__name__ for module in model] == [*["Conv2d", "ReLU", "MaxPool2d"] * 3, "Flatten", "Linear",
            "ReLU", "Dropout", "Linear"]  # fmt: skip
        assert [module.out_channels for module in model if isinstance(module, nn.Conv2d)] == [32, 64, 128]
        assert model[12].p == 0.5
        assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
        with pytest.raises(CommandError, match="3 poolings leave nothing of images of 4 x 28 pixels"):
            cnn((1, 4, 28), 10)

    def test_by_name(self, digits, monkeypatch):
        assert factory("cnn", digits)()(torch.rand(2, 1, 8, 8)).shape == (2, 10)
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(CommandError, match="; pip install timm"):
            factory("timm:resnet18", digits)

    def test_torchvision(self, torchvision):
        data = Data("colour", None, None, 5, (3, 32, 32))
        assert factory("torchvision:resnet18", data)().eval()(torch.rand(1, 3, 32, 32)).shape == (1, 5)
        with pytest.raises(CommandError, match="--model torchvision:resnet19: "):
            factory("torchvision:resnet19", data)()


@pytest.fixture(scope="module")
def torchvision():
    """torchvision, of which the study needs data sets and models alone.

    A build for CUDA does not load its compiled operators beside a torch for CPUs, and then fails on their names.
    """
    pytest.importorskip("PIL")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        import torchvision.datasets
    except RuntimeError:
        names = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.datasets
        import torchvision.models
    return torchvision


class TestData:
    def test_uses_every_digit(self, digits):
        assert len(digits.train) + len(digits.test) == 1797
        assert (digits.train.x.min(), digits.train.x.max()) == (0, 1)
        both = torch.cat((digits.train.x, digits.test.x)).flatten(1)
        assert len(both.unique(dim=0)) == 1797

    def test_mnist(self, torchvision, tmp_path):
        """Files in MNIST's own format: big-endian sizes, then bytes."""
        raw = tmp_path / "MNIST" / "raw"
        raw.mkdir(parents=True)
        random = np.random.default_rng(0)
        wrote = {}
        for part, count in (("train", 7), ("t10k", 4)):
            x, y = (
                random.integers(0, 256, (count, 28, 28), dtype=np.uint8),
                random.integers(0, 10, count, dtype=np.uint8),
            )
            header = np.array([2051, count, 28, 28], dtype=">i4").tobytes()
            (raw / f"{part}-images-idx3-ubyte").write_bytes(header + x.tobytes())
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(
                np.array([2049, count], dtype=">i4").tobytes() + y.tobytes()
            )
            wrote[part] = x, y
        data = load(f"mnist:{tmp_path}", 0)
        assert (len(data.train), len(data.test), data.classes, data.shape) == (7, 4, 10, (1, 28, 28))
        for split, (x, y) in ((data.train, wrote["train"]), (data.test, wrote["t10k"])):
            images, labels = split.batch(torch.tensor([2, 0]))
            torch.testing.assert_close(images, torch.from_numpy(x[[2, 0], None] / np.float32(255)))
            assert labels.tolist() == y[[2, 0]].tolist()

    def test_cifar10(self, torchvision, tmp_path, monkeypatch):
        """Files in CIFAR-10's own format: pickled rows, three planes of 32 x 32 bytes each. (Their checksums are not ours.)"""
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        random = np.random.default_rng(0)
        parts = [f"data_batch_{i}" for i in range(1, 6)]
        wrote = {}
        for name in (*parts, "test_batch"):
            wrote[name] = random.integers(0, 256, (3, 3072), dtype=np.uint8), random.integers(0, 10, 3).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": wrote[name][0], "labels": wrote[name][1]}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
        cifar = torchvision.datasets.CIFAR10
        monkeypatch.setattr(cifar, "train_list", [[name, None] for name in parts])
        monkeypatch.setattr(cifar, "test_list", [["test_batch", None]])
        monkeypatch.setattr(cifar, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
        data = load(f"cifar10:{tmp_path}", 0)
        assert (len(data.train), len(data.test), data.classes, data.shape) == (15, 3, 10, (3, 32, 32))
        images, labels = data.train.batch(torch.tensor([4]))
        want = wrote["data_batch_2"][0][1].reshape(1, 3, 32, 32) / np.float32(255)
        torch.testing.assert_close(images, torch.from_numpy(want))
        assert labels.tolist() == [wrote["data_batch_2"][1][1]]

    def test_folder(self, torchvision, tmp_path):
        """A folder for each class, images of any size."""
        image = pytest.importorskip("PIL.Image")
        for part in ("train", "val"):
            for label, colour in (("cats", (255, 0, 0)), ("dogs", (0, 0, 255))):
                (tmp_path / part / label).mkdir(parents=True)
                image.new("RGB", (90, 70), colour).save(tmp_path / part / label / "one.png")
        data = load(f"folder:{tmp_path}", 0)
        assert (len(data.train), len(data.test), data.classes, data.shape) == (2, 2, 2, (3, SIDE, SIDE))
        images, labels = data.test.batch(torch.tensor([1, 0]))
        assert labels.tolist() == [1, 0]
        want = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).view(2, 3, 1, 1).expand(2, 3, SIDE, SIDE)
        torch.testing.assert_close(images, want)
        (tmp_path / "train" / "emus").mkdir()
        image.new("RGB", (90, 70)).save(tmp_path / "train" / "emus" / "one.png")
        with pytest.raises(CommandError, match="train and val hold different classes"):
            load(f"folder:{tmp_path}", 0)

    def test_nothing_there(self, torchvision, tmp_path):
        for name in ("mnist", "cifar10", "folder"):
            with pytest.raises(CommandError, match=f"--data {name}:{tmp_path}: "):
                load(f"{name}:{tmp_path}", 0)

    def test_torchvision_that_does_not_load(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        with pytest.raises(CommandError, match=r"pip install torchvision"):
            load(f"mnist:{tmp_path}", 0)
