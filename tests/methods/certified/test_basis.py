"""The basis of a certificate: orthonormal, and the pilot probes' rest beside it."""

import math

import numpy as np
import pytest
import torch
from certificates import problem, search

from bench.baselines.jacobians import Matrices

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_basis_is_orthonormal_though_the_rows_are_nearly_dependent():
    """What is left of a row beside those of its own step is a thousandth of it; rounding grows no more for that."""
    logits, rows = problem(3, 100, 400)
    rows = rows[:, torch.arange(100) // 6 * 6] + 1e-3 * rows
    made = search(Matrices(logits, rows)).basis
    for start in (0, 6, 12):
        made.span(np.arange(3), rows[:, start : start + 6])
    gram = made.directions @ made.directions.mT
    torch.testing.assert_close(gram, torch.eye(18, dtype=torch.float64).expand(3, -1, -1), atol=1e-14, rtol=0.0)


def test_a_step_leaves_the_rest_of_the_pilot_probes_and_the_other_examples():
    """J times what the pilot probes have outside the basis, after every step that an example took; the others keep theirs."""
    logits, rows = problem(3, 100, 400)
    made = search(Matrices(logits, rows)).basis
    made.start(np.arange(3), rows[:, :0])
    for e in (np.arange(3), np.array([0, 2]), np.array([2])):
        made.span(e, rows[e, len(e) * 20 : len(e) * 20 + 18])
    assert made.directions.shape == (3, 54, 400)
    assert (made.directions.square().sum(2) > 0.5).sum(1).tolist() == [36, 18, 54]
    torch.testing.assert_close(made.components, (made.directions @ rows.mT))
    torch.testing.assert_close(made.squares, made.components.square().sum(1))
    torch.testing.assert_close(made.known, made._state.differences(np.arange(3), made.components).square().sum(1))
    beyond = made.pilot_probes - made.pilot_probes @ made.directions.mT @ made.directions
    torch.testing.assert_close(made.residual, beyond @ rows.mT, atol=1e-10, rtol=0.0)


@pytest.mark.parametrize("D", [8, 400])
def test_rows_that_add_nothing_have_no_direction(D):
    """Zeros, copies, mixtures of those before, and rows that are not finite; what the others span is known all the same."""
    torch.manual_seed(0)
    logits, rows = problem(2, 100, D)
    rows[0, 1] = 0.0
    rows[0, 3] = rows[0, 0]
    rows[0, 4] = 2 * rows[0, 0] - rows[0, 2]
    rows[1, 1, 3] = math.nan
    rows[1, 2, 0] = math.inf
    rows[1, 7] = -1e-30 * rows[1, 3]
    made = search(Matrices(logits, rows)).basis
    made.span(np.arange(2), rows[:, :6])
    made.span(np.arange(2), rows[:, 6:8])
    gram = made.directions @ made.directions.mT
    there = gram.diagonal(dim1=1, dim2=2) > 0.5
    assert there.tolist() == [
        [True, False, True, False, False, True, True, True],
        [True] + [False] * 2 + [True] * 4 + [False],
    ]
    torch.testing.assert_close(gram, torch.diag_embed(there.double()), atol=1e-14, rtol=0.0)
    for example, spanned in ((0, [0, 2, 5, 6, 7]), (1, [0, 3, 4, 5, 6])):
        row, directions = rows[example, spanned], made.directions[example]
        torch.testing.assert_close(row @ directions.T @ directions, row)


def test_without_a_factor_there_are_no_directions(monkeypatch):
    """Where rounding leaves a Gram matrix indefinite, the example gets zeros, which are a basis too; others are untouched."""
    logits, rows = problem(2, 100, 50)
    cholesky = torch.linalg.cholesky_ex

    def fails(gram):
        gram = gram.clone()
        gram[1, 2, 2] = -1.0
        return cholesky(gram)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails)
    made = search(Matrices(logits, rows)).basis
    made.span(np.arange(2), rows[:, :4])
    assert (made.directions[1] == 0).all()
    torch.testing.assert_close(made.directions[0] @ made.directions[0].T, torch.eye(4, dtype=torch.float64))
    assert (made.known[1] == 0).all()
