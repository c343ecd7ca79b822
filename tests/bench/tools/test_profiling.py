"""Where time goes."""

import pytest

from bench.baselines import models
from bench.cases import model
from bench.tools import profiling


@pytest.mark.parametrize("method", list(model.METHODS))
def test_the_profile_counts_every_moment_once(method, monkeypatch):
    monkeypatch.setattr(profiling.models, "load", lambda _: models.tiny())
    elapsed, seconds = profiling.profile("", model.METHODS[method][0])
    assert all(value > 0 for part, value in seconds.items() if part != "probes")
    assert sum(seconds.values()) <= elapsed
