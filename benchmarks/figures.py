"""What is told of many durations: how many there are, their median, their 99th percentile and the longest."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spread:
    """Durations in milliseconds, summed up."""

    count: int
    p50: float
    p99: float
    longest: float


def spread(milliseconds: Sequence[float]) -> Spread:
    """Sum up durations; all zero when there are none."""
    if not milliseconds:
        return Spread(0, 0.0, 0.0, 0.0)
    percentiles = statistics.quantiles([*milliseconds, *milliseconds], n=100, method="inclusive")  # wants two
    return Spread(len(milliseconds), percentiles[49], percentiles[98], max(milliseconds))
