"""Interleaved rounds."""

import time

from bench.harness import clock


def test_every_run_is_in_every_round_and_none_is_always_first_or_always_after_the_same():
    played = []
    runs = {name: lambda _, name=name: played.append(name) or time.sleep(clock.SHORTEST) for name in "abc"}
    times = clock.interleaved(runs, [None], budget=1.0)
    assert [len(seconds) for seconds in times.values()] == [15] * 3
    rounds = ["".join(played[at : at + 3]) for at in range(3, len(played), 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert {one[0] for one in rounds} == set("abc")
    assert {one[at : at + 2] for one in rounds for at in (0, 1)} == {"ab", "ac", "ba", "bc", "ca", "cb"}


def test_short_runs_are_repeated_on_one_input_after_the_other_by_the_clock_that_is_given():
    asked = []

    def ticking(run, inputs, repeats):
        asked.append(repeats)
        for given in inputs[:2]:
            run(given)
        return 1e-3

    seen = []
    times = clock.interleaved({"a": seen.append}, [1, 2], budget=1.0, rounds=4, clock=ticking)
    assert asked == [1, 5, 5, 5, 5]
    assert seen == [1, 2] * 5
    assert times == {"a": [1e-3] * 4}
    assert clock.wall(seen.append, [1, 2], 3) > 0
    assert seen[-3:] == [1, 2, 1]
