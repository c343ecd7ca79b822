"""The verdicts on the paper's claims, from numbers that were made up so that the verdicts are known."""

import dataclasses

import numpy as np
import torch

from fastsal.study import results
from fastsal.study.claims import variations, verdicts
from fastsal.study.measure import ORIGIN
from fastsal.study.results import Result, Study
from fastsal.study.train import Recipe


def made_up(alpha_power, homogeneity):
    values = np.linspace(0.5, 1.5, 30)
    made = []
    for slot, penalty in enumerate((0.0, 0.1, 1.0, 10.0)):
        rho = values * 2**slot
        columns = dict.fromkeys(results.TABLE, rho) | {"alignment": rho**alpha_power, "attack": np.full(30, "PGD")}
        columns |= {"binarized_homogeneity": values, "binarized_alignment": rho * (1 + values[::-1])}
        columns |= {"homogeneity": np.full(30, homogeneity[slot])}
        columns |= {f"centred {name}": columns[name] for name in ORIGIN} | {"centred alignment": 1 / rho}
        columns |= {"rho in the box": 1 / rho}
        score = 0.1 if slot == 3 else 0.9
        made.append(Result(Recipe(penalty=penalty), score, columns, torch.zeros(1, 1, 8, 8)))
    return Study("made up", 1, 30, torch.zeros(1, 1, 8, 8), made)


def held(study):
    return [found.confirmed for _, found in verdicts(study)]


def test_as_in_the_paper():
    found = verdicts(made_up(0.5, (0.9, 0.8, 0.7, 0.99)))
    assert [one.confirmed for _, one in found] == [True] * 6
    assert found[1][1].evidence == (
        "from plain to λ = 1, the most robust, median ρ grows 4.00 times and median α 2.00 times"
    )


def test_otherwise():
    assert held(made_up(-1, (0.7, 0.8, 0.9, 0.1))) == [True, False, False, False, False, True]
    assert held(made_up(2, (0.9, 0.8, 0.7, 0.1))) == [True, True, True, True, False, True]


def test_in_other_circumstances():
    """Centred columns in place of the others, one way of training alone, and models whatever their accuracy."""
    study = made_up(0.5, (0.9, 0.8, 0.7, 0.99))
    adversarial = [Result(Recipe(radius=r.recipe.penalty or 1), 0.9, r.columns, r.saliency) for r in study.results[1:]]
    other = variations(dataclasses.replace(study, results=study.results + adversarial))
    names = ["double backpropagation alone", "adversarial alone", "every strength, whatever its accuracy"]
    origins = ["pixels kept in [0, 1]", "x with the mean image at 0", "both"]
    assert list(other) == [*origins, *names]
    assert list(variations(study)) == [*origins, names[-1]]
    # made_up: a centred alignment falls where the other grows, ρ in the box falls too, and nothing else is different.
    assert held(other["pixels kept in [0, 1]"])[1:5] == [False, False, False, False]
    assert held(variations(study)["x with the mean image at 0"]) == [True, False, False, True, False, True]
    assert held(variations(study)["both"])[2]
    assert [r.recipe.strength for r in other[names[0]].results] == [0, 0.1, 1, 10]
    assert [r.recipe.radius for r in other[names[1]].results] == [0, 0.1, 1, 10]
    assert len(other[names[2]].working()) == len(other[names[2]].results) > len(study.working())
    # With the model that lost its accuracy homogeneity no longer falls.
    assert held(variations(study)[names[2]]) == [True, True, True, False, True, True]
