"""Data, a finished study and torchvision for the tests of the study."""

import pytest
from study.small import GRID

from fastsal.cli import main
from fastsal.study import attacks, page
from fastsal.study.data import Data, InMemory, load_digits
from fastsal.study.train import single_thread


@pytest.fixture(scope="session", autouse=True)
def _optional_packages():
    for module in ("sklearn", "foolbox", "matplotlib"):
        pytest.importorskip(module)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Everything here is small: a second thread would only wait, for long on a busy machine."""
    with single_thread():
        yield


@pytest.fixture(scope="session")
def digits():
    return load_digits(0)


@pytest.fixture(scope="session")
def few(digits):
    """Little to train on."""
    return Data("few", InMemory(digits.train.x[:200], digits.train.y[:200]), digits.test, 10, (1, 8, 8))


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """The folder of a study with little of everything."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attacks.STEPS, "Carlini-Wagner", 5)
        assert main(["study", *GRID, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def studies(study):
    """The same as read from its folder."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write", lambda studies, out: found.extend(studies))
        assert main(["study", *GRID, "--out", str(study)]) == 0
    return found
