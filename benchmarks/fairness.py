"""Small SSE runs, one after another, while a client reads a very long run as fast as it can, and without that.

What counts is the time from a small run's request to the frame of its first event.
"""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

from benchmarks.effort import Effort
from benchmarks.environment import EVENTS, SETTLE_SECONDS, TEXT, WORD
from benchmarks.figures import Spread, spread
from benchmarks.processes import Server
from benchmarks.product import LONG_LOGS, echo, product, start_request
from benchmarks.report import Section, Target, table
from benchmarks.sse import Follower, follow

_ALONE_SECONDS: Final = 1.0
_UNDER_WAY_SECONDS: Final = 0.05  # from the request of the big run


def measure_fairness(directory: Path, effort: Effort) -> Section:
    """First events without the big run and with it, in turns."""
    events = LONG_LOGS[-1]
    without: list[float] = []
    beside: list[float] = []
    # The reader of the big run is a process of its own, or it would take its turns from the small runs' client.
    with (
        product(directory) as server,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as reader,
    ):
        big = start_request(server, echo(events), WORD, accept="text/event-stream")
        small = start_request(server, echo(EVENTS), TEXT, accept="text/event-stream")
        reader.submit(follow, server, small, EVENTS + 1).result()
        for _ in range(effort.big_runs):
            until = time.monotonic() + _ALONE_SECONDS
            while time.monotonic() < until:
                without.append(_first_event(server, small))
            reading = reader.submit(follow, server, big, events + 1)
            time.sleep(_UNDER_WAY_SECONDS)
            while not reading.done():  # the last one may outlive it
                beside.append(_first_event(server, small))
            reading.result()
            time.sleep(SETTLE_SECONDS / 4)
    return _section(spread(without), spread(beside), events)


def _first_event(server: Server, request: str) -> float:
    """Milliseconds to the first event of a run, which is then read to its end."""
    follower = Follower(server, request)
    milliseconds = 1000 * follower.read_to_event()
    follower.read_to_end()
    return milliseconds


def _section(without: Spread, beside: Spread, events: int) -> Section:
    rows = [
        (name, f"{each.p50:.1f}", f"{each.p99:.1f}", f"{each.longest:.1f}", f"{each.count:,}")
        for name, each in (("alone", without), (f"beside a run of {events:,} events", beside))
    ]
    rows.append(
        (
            "delay",
            f"{beside.p50 - without.p50:.1f}",
            f"{beside.p99 - without.p99:.1f}",
            f"{beside.longest - without.longest:.1f}",
            "",
        )
    )
    return Section(
        "First event of small runs beside a big one",
        table(("small runs", "p50 ms", "p99 ms", "longest ms", "runs"), rows),
        [
            Target(f"Delay by a run of {events:,} events, {name}", "≤ 20 ms", f"{delay:.1f} ms", delay <= 20)
            for name, delay in (("median", beside.p50 - without.p50), ("p99", beside.p99 - without.p99))
        ],
    )
