"""The file of figures."""

import pytest

from bench.harness import store


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """opened(commit, machine, fresh): the store of one file, in a run of its own."""
    path = tmp_path / "bench.json"

    def begin(commit="abc", machine="this", fresh=False):
        monkeypatch.setattr(store, "commit", lambda: commit)
        monkeypatch.setattr(store, "environment", lambda device: {"machine": machine, "device": device})
        return store.Store(path).begin(fresh)

    return begin


def test_a_run_resumes_at_the_same_commit_on_the_same_machine(opened):
    made = []

    def make():
        made.append(1)
        return {"figure": len(made)}

    assert opened().keep("a", make)["figure"] == 1
    assert opened().keep("a", make) == {"figure": 1, "commit": "abc", "date": opened().records["a"]["date"]}
    assert opened("abd").keep("a", make)["figure"] == 2
    assert opened("abd").keep("b", make)["figure"] == 3
    assert set(opened("abd").records) == {"a", "b"}
    again = opened("abd", fresh=True)
    assert [again.keep("a", make)["figure"] for _ in range(2)] == [4, 4]
    assert opened("abd+").keep("a", make)["figure"] == 5
    assert opened("abd+").keep("a", make)["figure"] == 6
    assert opened("abd+").keep("b", make)["figure"] == 7
    assert not opened("abd+", machine="another").records


def test_a_command_that_failed_is_tried_again(opened):
    assert opened().keep("build", lambda: {"code": 1})["code"] == 1
    assert opened().keep("build", lambda: {"code": 0})["code"] == 0
    assert opened().keep("build", lambda: pytest.fail("done again"))["code"] == 0


def test_nothing_is_written_before_something_is_measured(opened):
    opened().write("a", {})
    written = opened().path.read_text()
    opened(machine="another")
    assert opened().path.read_text() == written


def test_no_path_of_this_machine_is_stored(tmp_path):
    found = store.Store(tmp_path / "bench.json").begin()
    found.write("a", {})
    assert "/" not in found.path.read_text()
