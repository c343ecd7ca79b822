"""The section on photographs: its images, its exact answers, and its figures at a tiny size."""

import json

import pytest
import torch

import fastsal
from bench.baselines import imagenet, models
from bench.cases import imagenet as case
from bench.harness import clock, memory
from bench.report import tables


@pytest.fixture
def here(monkeypatch):
    """What a process of its own would do is done in this one, and few rounds."""
    monkeypatch.setattr(memory, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(case, "BUDGET", 0.0)


def row(record, name):
    return next(row for row in record["results"] if row["implementation"] == name)


@pytest.mark.parametrize("name", ["batches of 4", "batches of 14, p = ∞"])
def test_every_answer_is_checked_and_every_figure_is_of_one_image(here, name):
    record = case.record(name, tiny=True)
    batch = case.BATCHES[name][0]
    for found in record["results"]:
        if found["status"] != "skipped":
            assert found["status"] == "right", found
            every = case.ways()[found["implementation"]].every
            assert (found["equal"], found["images"]) == ((batch, batch) if every else (14, 14))
    exact, certified = row(record, case.BASELINE), row(record, case.CERTIFIED)
    assert exact["passes"] == 12
    assert certified["start"] >= 0
    for found in exact, certified:
        assert found["seconds"][1] == pytest.approx(found["pass"] * found["passes"] * record[case.ONE_PASS])


def test_what_would_take_too_long_is_extrapolated_and_marked(here, monkeypatch):
    monkeypatch.setattr(case, "LONG", 0.0)
    record = case.record("batches of 14", tiny=True) | {"case": "batches of 14", "threads": 1}
    exact = row(record, case.BASELINE)
    assert exact["what"].endswith("extrapolated from 20 classes")
    assert exact["seconds"][1] == exact["extrapolated"] > 0
    assert "equal" not in exact
    assert "| ≈ " in tables.photographs([record])


def test_extrapolation_is_linear_in_the_classes(here, monkeypatch):
    monkeypatch.setattr(case, "LONG", 0.0)
    taken = {case.FEW: 3.0, case.MANY: 12.0}
    monkeypatch.setattr(
        case.clock,
        "interleaved",
        lambda runs, inputs, budget: {
            name: [taken.get(int(name.split()[-1]), 1.0) if "," in name and name[-1].isdigit() else 1.0]
            for name, run in runs.items()
            if run(inputs[0]) or True
        },
    )
    record = case.record("batches of 1", tiny=True)  # of 12 classes
    assert row(record, case.BASELINE)["seconds"][1] == pytest.approx(3.0 + (12 - 2) * 0.5)


def test_wrong_answers_get_no_speed(here, monkeypatch):
    truth = imagenet.truth
    monkeypatch.setattr(imagenet, "truth", lambda *arguments: truth(*arguments) * 1.1)
    record = case.record("batches of 14", tiny=True)
    for found in record["results"]:
        assert found["status"] == "skipped" or (found["status"] == "wrong" and "seconds" not in found)


def test_a_process_of_its_own_says_what_memory_it_took(monkeypatch):
    found = memory.in_fresh_process(case.peak_memory, case.CERTIFIED, 4, 2.0, None, True)
    assert 0 < found < 1 << 28
    monkeypatch.setattr(memory, "growth", lambda run: len(run()[0]))  # of the answers to what was run
    assert case.peak_memory(case.CERTIFIED, 4, 2.0, None, tiny=True) == 4


def test_all_times_are_taken_in_the_same_process(here, monkeypatch):
    """In a fresh one exact rows took 1.3 to 1.5 times as long."""
    monkeypatch.setattr(memory, "in_fresh_process", lambda *arguments: 123)
    now = iter(range(1000))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now)))
    found = row(case.record("batches of 4", tiny=True), case.BASELINE)
    assert found["rounds"] == [1 / 4]
    assert (found["peak memory"], found["equal"]) == (123, 4)


def test_exact_answers_are_kept_for_these_weights_and_images(tmp_path, monkeypatch):
    model, x = models.tiny()
    path = tmp_path / "truth.json"
    first = {norm: imagenet.truth(model, x, norm, path) for norm in imagenet.RATIOS}
    for norm, ratios in first.items():
        exact = fastsal.analyze(model.double(), x.double(), norm=norm).linearized_robustness
        model.float()
        torch.testing.assert_close(ratios[:, 0], exact, rtol=1e-6, atol=0.0)
    held = path.read_text()
    for key in imagenet.RATIOS.values():
        path.write_text(json.dumps(json.loads(held) | {key: json.loads(held)[key][:1]}))
        for norm, ratios in first.items():
            assert torch.equal(imagenet.truth(model, x, norm, path), ratios)  # resumes
        assert path.read_text() == held
    calls = []
    monkeypatch.setattr(imagenet, "least", lambda *arguments: calls.append(1) or [1.0, 1.0])
    assert torch.equal(imagenet.truth(model, x, 2.0, path), first[2.0])
    assert not calls
    assert torch.equal(imagenet.truth(model, x * 1.01, 2.0, path), torch.ones(len(x), 2, dtype=torch.float64))
    assert len(calls) == len(x)


def test_fourteen_photographs_of_which_no_two_are_alike():
    pytest.importorskip("skimage")
    images = imagenet.images()
    assert images.shape == (14, 3, 224, 224)
    assert 0.05 <= images.min() < images.max() <= 0.95
    assert torch.pdist(images.flatten(1)).min() > 10
