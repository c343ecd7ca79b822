"""Tests of statistics: when a count of failures speaks against a probability."""

import math

REJECT = 1e-6  # how likely a test of this kind rejects what is true; the seeds are fixed


def chance_at_least(failures, trials, probability):
    """P(Binomial(trials, probability) >= failures), by Chernoff's bound: an upper bound, so that rejecting is safe."""
    rate = failures / trials
    if rate <= probability:
        return 1.0
    part = rate * math.log(rate / probability)
    rest = (1 - rate) * math.log((1 - rate) / (1 - probability)) if rate < 1 else 0.0
    return math.exp(-trials * (part + rest))
