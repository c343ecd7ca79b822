"""A run of the suite."""

import json

from bench.harness import core, session


def test_a_session_measures_what_the_file_lacks_and_nothing_twice(tmp_path, monkeypatch, work_on_a_jacobian):
    made = []
    case = core.Case("tensor", "tiny", lambda tiny: made.append(tiny) or work_on_a_jacobian())
    monkeypatch.setattr(session, "commit", lambda: "abc")
    monkeypatch.setattr(session, "QUICK_BUDGET", 0.0)
    path = tmp_path / "bench.json"
    first = session.Session(quick=True, path=path)
    record = first.record(case, 1)
    assert first.record(case, 1) is record
    assert session.Session(quick=True, path=path).record(case, 1) == json.loads(json.dumps(record))
    assert made == [False]
    session.Session(quick=True, path=path, fresh=True).record(case, 1)
    monkeypatch.setattr(session, "commit", lambda: "abd")
    session.Session(quick=True, path=path).record(case, 1)
    assert made == [False] * 3
