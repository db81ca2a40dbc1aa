"""One SSE follower of a long run: events a second, of a run that has finished and of one while it goes on."""

import statistics
from pathlib import Path

from benchmarks.effort import Effort
from benchmarks.environment import WORD
from benchmarks.product import echo, events_request, finished_run, product, start_request
from benchmarks.report import Section, Target, table
from benchmarks.sse import follow


def measure_follower(directory: Path, effort: Effort) -> Section:
    """Both streams by the length of the run; the target is the replay of the longest."""
    rows = []
    rate = 0.0
    with product(directory) as server:
        for length in effort.follower_events:
            events = length + 1
            replay = events_request(server, echo(length), finished_run(server, echo(length), WORD))
            live = start_request(server, echo(length), WORD, accept="text/event-stream")
            replays = [follow(server, replay, events) for _ in range(effort.follows)]
            lives = [follow(server, live, events) for _ in range(max(1, effort.follows // 3))]
            rate, live_rate = (statistics.median(events / each.whole for each in some) for some in (replays, lives))
            deltas = statistics.median(each.deltas for each in lives)
            rows.append((f"{events:,}, replay of a finished run", f"{rate:,.0f}", "0"))
            rows.append((f"{events:,}, live, from its start, stored meanwhile", f"{live_rate:,.0f}", f"{deltas:,.0f}"))
    what = f"One follower's replay of {effort.follower_events[-1]:,} events"
    return Section(
        "One SSE follower",
        table(("events", "events/s", "deltas beside them"), rows),
        [Target(what, "≥ 100,000 events/s", f"{rate:,.0f}", rate >= 100_000)],
    )
