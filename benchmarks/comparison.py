"""What is compared of loads that took turns: the figures of a load, and their ratios."""

import statistics
from collections.abc import Callable, Sequence
from typing import Final

from benchmarks.load import Load

Figure = Callable[[Load], float]

SERVICE: Final = "– of the service"
FIGURES: Final[tuple[tuple[str, Figure, str], ...]] = (
    ("runs/s", lambda load: load.per_second, ",.0f"),
    ("p50 ms", lambda load: load.latency.p50, ".2f"),
    ("p99 ms", lambda load: load.latency.p99, ".2f"),
    ("CPU-s / 1,000 runs", lambda load: load.cpu_per_thousand, ".3f"),
    ("– of the gateway", lambda load: 1000 * load.cpu_seconds[0] / load.requests, ".3f"),
    (SERVICE, lambda load: 1000 * sum(load.cpu_seconds[1:]) / load.requests, ".3f"),
    ("– of the load, besides", lambda load: 1000 * load.own_cpu_seconds / load.requests, ".3f"),
)


def ratio(figure: Figure, loads: Sequence[Load], reference: Sequence[Load]) -> float:
    """Median over the rounds of loads/reference, so that what slows a whole round down cancels out."""
    return statistics.median(figure(b) / figure(a) for a, b in zip(reference, loads, strict=True))
