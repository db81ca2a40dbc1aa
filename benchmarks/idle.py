"""Memory of an idle SSE follower: what followers of one run add to those that are there already."""

import time
from pathlib import Path

from benchmarks.effort import Effort
from benchmarks.environment import SETTLE_SECONDS, TEXT
from benchmarks.processes import memory_kib
from benchmarks.product import IDLE, events_request, product, start_run
from benchmarks.report import Section, Target, table
from benchmarks.sse import Follower


def measure_idle(directory: Path, effort: Effort) -> Section:
    """KiB a follower, by process."""
    number = effort.idle_followers
    followers: list[Follower] = []
    with product(directory) as server:
        request = events_request(server, IDLE, start_run(server, IDLE, TEXT))
        try:
            followers += (Follower(server, request) for _ in range(number // 5))
            time.sleep(SETTLE_SECONDS)
            before = [memory_kib([pid]) for pid in server.pids]
            followers += (Follower(server, request) for _ in range(number))
            time.sleep(SETTLE_SECONDS)
            after = [memory_kib([pid]) for pid in server.pids]
        finally:
            for follower in followers:
                follower.close()
    gateway, runtime = ((b - a) / number for a, b in zip(before, after, strict=True))
    whole = gateway + runtime
    rows = (("gateway", f"{gateway:.1f}"), ("runtime service", f"{runtime:.1f}"), ("together", f"{whole:.1f}"))
    return Section(
        f"{number} idle SSE followers of a run that goes on",
        table(("process", "KiB a follower"), rows),
        [Target("An idle follower", "≤ 40 KiB", f"{whole:.1f} KiB", whole <= 40)],
    )
