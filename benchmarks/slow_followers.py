"""Healthy SSE followers beside stalled ones: what those who never read do to the lag of the others, and to memory.

The stalled ones follow a run that is far ahead of them and goes on with some hundred events a second. It runs
while the healthy ones are alone, too, so that the difference is what stalled followers cost.
"""

import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.crowd import crowd
from benchmarks.effort import Effort
from benchmarks.environment import SETTLE_SECONDS, WORD
from benchmarks.figures import spread
from benchmarks.processes import Server, memory_kib
from benchmarks.product import FLOOD, events_request, product, start_run, ticking_runs
from benchmarks.report import Section, Target, table

_RECEIVE_BUFFER_BYTES: Final = 4096
_SEGMENT_BYTES: Final = 1400  # as on a network; with loopback's 64 KiB the kernel would take 2.5 MiB a stream
_HEAD_START_SECONDS: Final = 10.0


def measure_slow_followers(directory: Path, effort: Effort) -> Section:
    """Lag of the healthy ones alone and beside the stalled ones, in turns; growth of memory in the same time."""
    number = effort.slow_followers
    lags: dict[str, list[float]] = {"alone": [], f"beside {number} stalled ones": []}
    growth_mib = dict.fromkeys(lags, 0.0)
    with product(directory, environment={"ACP_MAX_TURNS": str(2 * number)}) as server:
        flood = events_request(server, FLOOD, start_run(server, FLOOD, WORD))
        requests = ticking_runs(server, [n / number for n in range(number)])
        time.sleep(_HEAD_START_SECONDS)
        with crowd(server, requests) as followers:
            for _ in range(effort.slow_rounds):
                for (name, each), stalled in zip(lags.items(), (0, number), strict=True):
                    before = memory_kib(server.pids)
                    with ExitStack() as open_streams:
                        for _ in range(stalled):
                            open_streams.enter_context(_stalled(server, flood))
                        time.sleep(SETTLE_SECONDS)
                        each += followers.lags(effort.slow_seconds)
                        growth_mib[name] = max(growth_mib[name], (memory_kib(server.pids) - before) / 1024)
                    time.sleep(SETTLE_SECONDS)
    spreads = {name: spread(each) for name, each in lags.items()}
    rows = [
        (
            name,
            f"{each.p50:.1f}",
            f"{each.p99:.1f}",
            f"{each.longest:.1f}",
            f"{each.count:,}",
            f"{growth_mib[name]:.1f}",
        )
        for name, each in spreads.items()
    ]
    alone, beside = (each.p99 for each in spreads.values())
    return Section(
        f"{number} healthy SSE followers beside stalled ones",
        table(("healthy ones", "p50 lag ms", "p99 lag ms", "longest ms", "events", "memory grows by MiB"), rows),
        [
            Target(
                f"Lag beside {number} stalled followers, p99",
                "≤ 2× alone",
                f"{beside:.1f} ms, alone {alone:.1f} ms",
                beside <= 2 * alone,
            )
        ],
    )


def _stalled(server: Server, request: str) -> socket.socket:
    """A stream that was asked for and is never read."""
    stream = socket.socket()
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT_BYTES)
    stream.connect((server.host, server.port))
    stream.sendall(request.encode())
    return stream
