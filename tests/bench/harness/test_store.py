"""The file of figures."""

from bench.harness import store


def test_figures_are_kept_case_by_case_and_forgotten_with_the_machine(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    first = store.Store(path)
    first.begin(fresh=False)
    first.put("a", {"level": "tensor"}, "abc")
    again = store.Store(path)
    again.begin(fresh=False)
    assert again.has("a", "abc")
    assert not again.has("a", "abd")
    assert not again.has("a", "abc+")
    elsewhere = {**store.environment(), "machine": {}}
    monkeypatch.setattr(store, "environment", lambda: elsewhere)
    again.begin(fresh=False)
    assert not again.has("a", "abc")
    assert "/" not in path.read_text().replace("GB/s", "")
