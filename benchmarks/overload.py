"""Overload: goodput at the peak, and with three times the connections that the gateway has room for.

Closed loop: a client that is refused with 503 waits as long as its Retry-After says. Open loop: requests come at
three times the peak rate, whatever was answered before; they only need a connection that is free.

    python -m benchmarks.overload < job.json > result.json
"""

import heapq
import json
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from benchmarks.effort import Effort
from benchmarks.environment import BODY, EVENTS
from benchmarks.figures import Spread, spread
from benchmarks.load import Connection, Connections, LoadError, http_request, run_apart
from benchmarks.processes import Server
from benchmarks.product import echo, product, runs_path
from benchmarks.report import Section, Target, table

_CAPACITY: Final = 512  # calls in flight that the gateway is given
_TIMES: Final = 3
_PEAK_CONNECTIONS: Final = (16, 64, 256)
_WARM_UP_SECONDS: Final = 2.0
_RECOVERY_SECONDS: Final = 1.0
_RETRY_AFTER: Final = re.compile(rb"\r\nretry-after: *(\d+)\r", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Job:
    """`request` over `connections` for `seconds`; with `rate`, so many a second in an open loop."""

    host: str
    port: int
    request: str
    connections: int
    seconds: float
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """What came in the time of a job; `unsent` requests of an open loop found no connection free."""

    goodput: float
    answered: Spread
    refused: Spread
    unsent: int


def measure_overload(directory: Path, effort: Effort) -> Section:
    """Peak and overload in turns, then the open loop."""
    seconds, connections = effort.overload_seconds, _TIMES * _CAPACITY
    with product(directory, environment={"ACP_MAX_CALLS": str(_CAPACITY)}) as server:
        tried = {number: _offer(server, number, seconds / 2).goodput for number in _PEAK_CONNECTIONS}
        at_peak = max(tried, key=lambda number: tried[number])
        peaks, overloads = [], []
        for _ in range(effort.overload_rounds):
            peaks.append(_offer(server, at_peak, seconds))
            overloads.append(_offer(server, connections, seconds))
        rate = _TIMES * statistics.median(peak.goodput for peak in peaks)
        flooded = _offer(server, connections, seconds, rate)
    ratio = statistics.median(b.goodput / a.goodput for a, b in zip(peaks, overloads, strict=True))
    refused_p99 = statistics.median(each.refused.p99 for each in overloads)
    refused_longest = max(each.refused.longest for each in overloads)
    refused = sum(each.refused.count for each in overloads)
    rows = [
        *(_row(f"closed loop, {at_peak} connections", each) for each in peaks),
        *(_row(f"closed loop, {connections:,} connections", each) for each in overloads),
        _row(f"open loop, {rate:,.0f} offered a second", flooded),
    ]
    return Section(
        f"Overload: {_TIMES}× the gateway's room for {_CAPACITY:,} calls",
        table(("load", "runs/s", "p50 ms", "p99 ms", "503s", "503 p99 ms", "503 longest ms", "not sent"), rows),
        [
            Target(f"Goodput at {_TIMES}× capacity", "≥ 0.8× the peak", f"{ratio:.2f}×", ratio >= 0.8),
            Target(
                f"Refusals at {_TIMES}× capacity, p99",
                "≤ 100 ms",
                f"{refused_p99:.1f} ms, longest {refused_longest:.1f} ms" if refused else "none refused",
                bool(refused) and refused_p99 <= 100,
            ),
        ],
    )


def _row(load: str, answers: Answers) -> tuple[str, ...]:
    refused = answers.refused
    refusals = (f"{refused.p99:.1f}", f"{refused.longest:.1f}") if refused.count else ("–", "–")
    latency = (f"{answers.answered.p50:.1f}", f"{answers.answered.p99:.1f}")
    return (load, f"{answers.goodput:,.0f}", *latency, f"{refused.count:,}", *refusals, f"{answers.unsent:,}")


def _offer(server: Server, connections: int, seconds: float, rate: float | None = None) -> Answers:
    """One job in a process of its own; then a moment for runs that nobody waits for any more."""
    request = http_request("POST", runs_path(echo(EVENTS)), server.headers, BODY)
    job = Job(server.host, server.port, request, connections, seconds, rate)
    result = run_apart("benchmarks.overload", asdict(job))
    time.sleep(_RECOVERY_SECONDS)
    return Answers(**result | {name: Spread(**result[name]) for name in ("answered", "refused")})


class _Clients:
    """The clients of one job; what is answered between `begin` and `end` counts."""

    def __init__(self, job: Job) -> None:
        self._connections = Connections(job.host, job.port, job.connections)
        self._request = job.request.encode()
        self._seconds = job.seconds
        self._begin = time.perf_counter() + _WARM_UP_SECONDS
        self._end = self._begin + job.seconds
        self._answered: list[float] = []
        self._refused: list[float] = []
        self._unsent = 0

    def closed_loop(self) -> None:
        """Each connection sends as soon as it may."""
        waiting: list[tuple[float, int, Connection]] = []
        for connection in self._connections.all:
            connection.send(self._request)
        while (now := time.perf_counter()) < self._end:
            while waiting and waiting[0][0] <= now:
                heapq.heappop(waiting)[2].send(self._request)
            for connection in self._answers(waiting[0][0] - now if waiting else None):
                if connection.status == b"201":
                    connection.send(self._request)
                else:
                    due = time.perf_counter() + _retry_after(connection)
                    heapq.heappush(waiting, (due, connection.fileno(), connection))

    def open_loop(self, rate: float) -> None:
        """A request is due every 1/`rate` seconds."""
        free = list(self._connections.all)
        due = time.perf_counter()
        while (now := time.perf_counter()) < self._end:
            while due <= now:
                due += 1 / rate
                if free:
                    free.pop().send(self._request)
                elif now >= self._begin:
                    self._unsent += 1
            free += self._answers(due - now)

    def result(self) -> Answers:
        """What was answered."""
        goodput = len(self._answered) / self._seconds
        return Answers(goodput, spread(self._answered), spread(self._refused), self._unsent)

    def _answers(self, seconds: float | None) -> Iterator[Connection]:
        left = self._end - time.perf_counter()
        for connection in self._connections.answered(max(0.0, left if seconds is None else min(seconds, left))):
            now = time.perf_counter()
            if connection.status not in (b"201", b"503"):
                raise LoadError(f"unexpected answer: {connection.status!r} {connection.refusal!r}")
            if now >= self._begin:
                milliseconds = self._answered if connection.status == b"201" else self._refused
                milliseconds.append(1000 * (now - connection.began))
            yield connection


def _retry_after(connection: Connection) -> int:
    if not (found := _RETRY_AFTER.search(connection.refusal)):
        raise LoadError(f"a 503 without Retry-After: {connection.refusal!r}")
    return int(found[1])


def _main() -> None:
    job = Job(**json.load(sys.stdin))
    clients = _Clients(job)
    if job.rate is None:
        clients.closed_loop()
    else:
        clients.open_loop(job.rate)
    json.dump(asdict(clients.result()), sys.stdout)


if __name__ == "__main__":
    _main()
