"""How far a long call has come: a bar where a person watches and seconds are ahead, or a function that is told."""

import sys
import types

import pytest
import torch

import fastsal
from fastsal import progress

pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


@pytest.fixture
def bars(monkeypatch):
    """The options of every bar that was made, and what it was told."""
    made = []

    class Bar:
        def __init__(self, **options):
            self.options, self.n, self.start_t, self.closed = options, 0.0, 0.0, False
            made.append(self)

        def update(self, more):
            self.n += more

        def close(self):
            self.closed = True

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar, __spec__=object()))
    return made


@pytest.mark.parametrize(
    ("wanted", "ahead", "count"), [(None, 2.9, 0), (None, 3.1, 1), (True, 0.1, 1), (False, 100, 0)]
)
def test_a_bar_appears_where_seconds_are_ahead(clock, watched, bars, wanted, ahead, count):
    with progress.reporting(wanted, "analyze") as report:
        clock.now = 1.0
        report(1 / (1 + ahead))
        report(0.9)
        assert [round(bar.n, 6) for bar in bars] == [0.9] * count
    assert all(bar.closed for bar in bars)
    assert len(bars) == count


def test_nobody_watches(clock, bars):
    assert not sys.stderr.isatty()
    with progress.reporting(None, "analyze") as report:
        clock.now = 100.0
        report(0.01)
    assert bars == []


def test_a_notebook_is_watched(monkeypatch):
    assert not progress.is_watched()
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert progress.is_watched()


def test_without_tqdm(clock, watched, monkeypatch):
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    with progress.reporting(True, "analyze") as report:
        report(0.5)


@pytest.mark.parametrize(
    ("method", "shares"),
    [
        (fastsal.Exact(memory_limit=0), [0.25, 0.5, 0.75, 1.0]),
        (fastsal.Exact(memory_limit=4 * 4 * 5 * 2), [2 / 6, 4 / 6, 1.0]),
        (fastsal.Candidates(7), [0.5, 1.0]),
    ],
)
def test_methods_tell_what_is_done(method, shares):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 16)), torch.randn(6, 5)
    told = []
    fastsal.analyze(model, x, method=method, chunk_size=4, progress=told.append)
    assert told == pytest.approx(shares)


def test_certified_tells_of_every_group(monkeypatch):
    monkeypatch.setattr("fastsal.methods.certified.GROUP_BYTES", 1)
    torch.manual_seed(0)
    model, told = torch.nn.Sequential(torch.nn.Linear(5, 150), torch.nn.Tanh()), []
    fastsal.analyze(model, torch.randn(6, 5), progress=told.append)
    assert told == pytest.approx([1 / 3, 2 / 3, 1])


def test_analyze_shows_a_bar(capsys):
    fastsal.analyze(torch.nn.Linear(5, 4), torch.randn(6, 5), progress=True, chunk_size=1)
    out, err = capsys.readouterr()
    assert (out, "analyze:   0%|" in err) == ("", True)
    fastsal.analyze(torch.nn.Linear(5, 4), torch.randn(6, 5), chunk_size=1)
    assert capsys.readouterr() == ("", "")
