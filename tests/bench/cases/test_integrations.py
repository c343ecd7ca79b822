"""The drop-ins beside the originals, on a network that takes no time."""

import pytest
import torch

from bench import cases


@pytest.mark.parametrize(
    "title",
    [
        "DeepFool L2, 10 candidates, n = 10",
        "DeepFool Linf, all candidates, n = 100",
        "FAB L2, n = 10",
        "FAB L1, n = 10",
    ],
)
def test_drop_ins_give_the_images_of_the_originals(title, measured):
    (case,) = (case for case in cases.every(["integrations"]) if case.name == title)
    if case.missing:
        pytest.skip(case.missing)
    record = measured(case.make(True), case.level, case.name)
    ours, *originals = record["results"]
    assert (ours["implementation"], ours["status"], ours["success"]) == ("fastsal", "right", 1)
    assert originals
    for original in originals:
        assert (original["status"], original["success"]) == ("right", 1)
        assert ours["median distance"] == pytest.approx(original["median distance"], rel=1e-3) != 0


def test_an_image_that_differs_is_found(measured, monkeypatch):
    (case,) = (case for case in cases.every(["integrations"]) if case.name == "DeepFool L2, 10 candidates, n = 10")
    if case.missing:
        pytest.skip(case.missing)
    work = case.make(True)
    ours = work.implementations[0]
    images = ours.run(work.inputs[0])
    assert ours.check(images) <= ours.limit
    images[1, 0, 0, 0] += 1e-3
    assert ours.check(images) == pytest.approx(1e-3, rel=0.1)
    assert ours.facts(torch.zeros_like(images))["median distance"] > 0.1
