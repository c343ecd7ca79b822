"""The verdicts on the claims, from numbers that were made up so that the verdicts are known."""

import dataclasses

import numpy as np
import pytest
import torch

from fastsal.study import results
from fastsal.study.attacks import ATTACKS
from fastsal.study.claims import checks, spread, variations, verdicts
from fastsal.study.measure import ORIGIN
from fastsal.study.results import Result, Study
from fastsal.study.train import Recipe


def made_up(alpha_power=0.5, homogeneity=(0.9, 0.8, 0.7, 0.99), offset=0.5):
    """Four networks, ρ twice as large from each to the next, the last without its accuracy; α† = ρ̃ + half the offset term."""
    values = np.linspace(0.5, 1.5, 30)
    made = []
    for slot, penalty in enumerate((0.0, 0.1, 1.0, 10.0)):
        rho = values * 2**slot
        terms = values[::-1] * offset
        columns = dict.fromkeys(results.TABLE, rho) | {"alignment": rho**alpha_power, "attack": np.full(30, "DeepFool")}
        columns |= {"offset_term": terms, "binarized_alignment": rho + terms / 2, "bound": 9 * rho}
        columns |= {"homogeneity": np.full(30, homogeneity[slot])}
        columns |= {f"centred {name}": columns[name] for name in ORIGIN} | {"centred alignment": 1 / rho}
        columns |= {f"rho {name}": np.where(np.arange(30) < 10, rho / 2, np.nan) for name in ATTACKS}
        columns |= {"bias_error": np.full(30, 1e-16), "binarized_bias_error": np.full(30, 3e-16)}
        score = 0.1 if slot == 3 else 0.9
        made.append(Result(Recipe(penalty=penalty), score, columns, torch.zeros(1, 1, 8, 8)))
    return Study("made up", 1, 30, torch.zeros(1, 1, 8, 8), made)


def held(*studies):
    return [verdict.confirmed for verdict in verdicts(studies)]


def test_as_in_the_paper():
    found = verdicts([made_up()])
    assert [one.confirmed for one in found] == ["yes"] * 6
    assert found[1].evidence == "median ρ grows 4.00; median α 2.00; and the median cosine 4.00"
    assert found[5].found[0].numbers["rank correlation of the networks' median α† and ρ"] == pytest.approx(1)


def test_otherwise():
    assert held(made_up(-1, (0.7, 0.8, 0.9, 0.1))) == ["yes", "no", "no", "no", "no", "yes"]
    assert held(made_up(2, (0.9, 0.8, 0.7, 0.1))) == ["yes", "yes", "yes", "yes", "no", "yes"]


def test_rounding_has_no_ranks():
    """Networks without biases: homogeneities of 1 and offsets of 0, but for the last bits, are in no order."""
    found = verdicts([made_up(2, (1 - 2e-16, 1 - 4e-16, 1 - 6e-16, 1), offset=1e-15)])
    assert [one.confirmed for one in found] == ["yes", "yes", "yes", "no", "no", "no"]
    for claim in (3, 5):
        assert np.isnan(next(iter(found[claim].found[0].numbers.values())))


def test_theory_is_judged_on_every_image_of_every_network():
    """|ρ̃ − α†| ≤ |β†|/‖g†‖: one image of a network that counts in no other claim breaks it."""
    study = made_up()
    columns = study.results[3].columns
    columns["binarized_alignment"] = columns["binarized_alignment"].copy()
    columns["binarized_alignment"][7] = columns["linearized_robustness"][7] + columns["offset_term"][7] * 1.001
    assert held(study) == ["yes"] * 5 + ["no"]


def test_seeds():
    """Confirmed where all seeds confirm; numbers with their spread."""
    found = verdicts([made_up(), made_up(2), made_up(-1)])
    assert [one.confirmed for one in found] == ["yes", *["in 2 of 3 seeds"] * 2, "yes", "in 1 of 3 seeds", "yes"]
    assert found[2].evidence.startswith("rank correlation 1.00 (-1.00 to 1.00)")
    assert spread([0.123, 0.5, 0.2]) == "0.20 (0.12 to 0.50)"
    assert spread([0.123]) == "0.12"


def test_in_other_circumstances():
    """Centred columns in place of the others, the smallest ρ of all attacks on the images that have it, and all strengths."""
    study = made_up()
    other = {name: found[0] for name, found in variations([study]).items()}
    centred, few, everything = other.values()
    # made_up: a centred alignment falls where the other grows, and nothing else is different.
    assert held(centred) == ["yes", "no", "no", "yes", "no", "yes"]
    assert few.images == 10
    np.testing.assert_allclose(few.results[1].columns["rho"], study.results[1].columns["rho"][:10] / 2)
    assert held(few)[0] == "no"  # ρ̃/ρ is 2
    assert len(everything.working()) == len(study.results) > len(study.working())
    # With the model that lost its accuracy homogeneity no longer falls.
    assert held(everything) == ["yes", "yes", "yes", "no", "yes", "yes"]


def test_checks():
    assert checks([made_up()]) == [
        "ρ̃ ≤ bound in all 120 pairs of an image and a network: largest (ρ̃ − bound)/bound -8.9e-01",
        "β and β† of all 120 pairs beside the sums over the biases, which take no gradient of x: largest deviation 3.0e-16 of "
        "|Ψ| + Σ|xₖgₖ|",
    ]
    study = made_up()
    wrong = dataclasses.replace(study.results[2], columns=study.results[2].columns | {"bound": np.full(30, 1.0)})
    assert checks([dataclasses.replace(study, results=[*study.results[:2], wrong])])[0].endswith(
        "which is not rounding"
    )
