"""The verdicts on the paper's claims, from numbers that were made up so that the verdicts are known."""

import numpy as np
import torch

from fastsal.study import results
from fastsal.study.claims import verdicts
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
        score = 0.1 if slot == 3 else 0.9
        made.append(Result(Recipe(penalty=penalty), score, columns, torch.zeros(1, 1, 8, 8)))
    return Study("made up", 1, 30, torch.zeros(1, 1, 8, 8), made)


def test_as_in_the_paper():
    found = verdicts(made_up(0.5, (0.9, 0.8, 0.7, 0.99)))
    assert [held for _, held, _ in found] == [True] * 6
    assert "from plain to λ = 1, the most robust, median ρ grows 4.00 times and median α 2.00 times" in found[1][2]


def test_otherwise():
    held = [held for _, held, _ in verdicts(made_up(-1, (0.7, 0.8, 0.9, 0.1)))]
    assert held == [True, False, False, False, False, True]
    superlinear = [held for _, held, _ in verdicts(made_up(2, (0.9, 0.8, 0.7, 0.1)))]
    assert superlinear == [True, True, True, True, False, True]
