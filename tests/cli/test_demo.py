"""fastsal demo: the same numbers twice, and the numbers that it measured."""

import pytest
import torch

from fastsal.cli import demo, main
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
            assert main(["demo", "--out", str(folder / name)]) == 0
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
    assert main(["demo", "--out", "picture.txt"]) == 2
    assert capsys.readouterr().err.startswith("fastsal demo: --out picture.txt: the ending decides the format")
