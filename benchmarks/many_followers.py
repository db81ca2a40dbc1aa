"""Many SSE followers of as many runs, an event a second each: how late events come, what a follower takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.crowd import crowd
from benchmarks.effort import Effort
from benchmarks.environment import SETTLE_SECONDS
from benchmarks.figures import Spread, spread
from benchmarks.processes import memory_kib
from benchmarks.product import product, ticking_runs
from benchmarks.report import Section, Target, table


@dataclass(frozen=True, slots=True)
class _Followed:
    lag: Spread  # of each event
    kib: Sequence[float]  # a follower, by process


def measure_many_followers(directory: Path, effort: Effort) -> Section:
    """Events spread evenly over the second, and all of them at its beginning."""
    number = effort.many_followers
    evenly = _follow(directory / "evenly", [n / number for n in range(number)], effort.many_seconds)
    at_once = _follow(directory / "at-once", [0.0] * number, effort.many_seconds)
    expected = number * effort.many_seconds
    rows = [
        (
            name,
            f"{each.lag.p50:.1f}",
            f"{each.lag.p99:.1f}",
            f"{each.lag.longest:.1f}",
            f"{each.lag.count / expected:.1%}",
            " + ".join(f"{kib:.1f}" for kib in each.kib),
        )
        for name, each in (("spread over the second", evenly), ("all at once", at_once))
    ]
    p99 = evenly.lag.p99
    return Section(
        f"{number:,} SSE followers of {number:,} runs, an event a second each",
        table(
            ("events", "p50 lag ms", "p99 lag ms", "longest ms", "arrived", "KiB a follower, gateway + service"), rows
        ),
        [Target(f"Lag of {number:,} followers, p99", "≤ 50 ms", f"{p99:.1f} ms", p99 <= 50)],
    )


def _follow(directory: Path, phases: Sequence[float], seconds: float) -> _Followed:
    """A run each phase; memory is what their followers add to the running runs."""
    directory.mkdir()
    room = str(2 * len(phases))
    with product(directory, environment={"ACP_MAX_TURNS": room, "ACP_MAX_CALLS": room}) as server:
        requests = ticking_runs(server, phases)
        time.sleep(SETTLE_SECONDS)
        before = [memory_kib([pid]) for pid in server.pids]
        with crowd(server, requests) as followers:
            time.sleep(SETTLE_SECONDS)
            lags = followers.lags(seconds)
            after = [memory_kib([pid]) for pid in server.pids]
    return _Followed(spread(lags), [(b - a) / len(phases) for a, b in zip(before, after, strict=True)])
