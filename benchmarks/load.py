"""The load: a closed loop of HTTP/1.1 keep-alive connections in a process of its own.

Each connection has one request in flight and sends the next one as soon as the answer is whole. The answer's
status is checked and its length followed; nothing is parsed beyond that, so that the load takes little of the
machine that it measures. The CPU time of the servers is read by the load itself, right before the first
request and right after the last answer, with the warm-up outside.

    python -m benchmarks.load < job.json > result.json
"""

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, cast

from benchmarks.environment import run_loop
from benchmarks.processes import Server, cpu_seconds

_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Job:
    """`warm_up` and then `requests` times `request` over `connections`; `pids` are the servers' processes."""

    host: str
    port: int
    request: str
    status: int
    connections: int
    requests: int
    warm_up: int
    pids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Load:
    """What one job measured; `cpu_seconds` by process, in the order of the job's `pids`."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_seconds: Sequence[float]

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds

    @property
    def cpu_per_thousand(self) -> float:
        """CPU-seconds of the servers for 1,000 requests."""
        return 1000 * sum(self.cpu_seconds) / self.requests


class LoadError(RuntimeError):
    """An answer was not what the job asks for, or a connection was lost."""


def http_request(method: str, path: str, headers: dict[str, str], body: str = "") -> str:
    """A whole HTTP/1.1 request as text."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
    return "\r\n".join([*lines, "", body])


def run_load(
    server: Server,
    path: str,
    body: str,
    *,
    connections: int,
    requests: int,
    warm_up: int = 0,
    status: int = 201,
) -> Load:
    """POST `body` to `path` in a load process of its own; LoadError when an answer was not `status`."""
    request = http_request("POST", path, server.headers, body)
    job = Job(server.host, server.port, request, status, connections, requests, warm_up, server.pids)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load"], input=json.dumps(asdict(job)).encode(), capture_output=True
    )
    if done.returncode:
        raise LoadError(done.stderr.decode(errors="replace").strip()[-2000:])
    return Load(**json.loads(done.stdout))


class _Connection(asyncio.Protocol):
    """One connection; the shared `_Loop` says whether there is another request to send."""

    def __init__(self, loop: "_Loop") -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._left = 0  # bytes of the body that are still to come; -1: chunked
        self._tail = b""
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def connection_lost(self, exc: Exception | None) -> None:
        self._loop.fail(f"a connection was lost: {exc or 'closed by the server'}")

    def close(self) -> None:
        if self._transport:
            self._transport.abort()

    def send(self) -> None:
        assert self._transport
        self._began = time.perf_counter()
        self._transport.write(self._loop.request)

    def data_received(self, data: bytes) -> None:
        if self._left == 0:
            if self._head:
                data = self._head + data
            end = data.find(_HEAD_END)
            if end < 0:
                self._head = data
                return
            self._head = b""
            if data[9:12] != self._loop.status:
                self._loop.fail(f"unexpected answer: {data[:1000]!r}")
                return
            if length := _LENGTH.search(data, 0, end):
                self._left = int(length[1])
            elif _CHUNKED.search(data, 0, end):
                self._left, self._tail = -1, b""
            else:
                self._loop.fail(f"an answer without a length: {data[:end]!r}")
                return
            data = data[end + 4 :] if self._left >= 0 else data[end + 2 :]
        if self._left < 0:
            self._tail = (self._tail + data)[-7:] if len(data) < 7 else data[-7:]
            if self._tail != _LAST_CHUNK:
                return
        else:
            self._left -= len(data)
            if self._left > 0:
                return
        self._left = 0
        self._loop.answered(self, time.perf_counter() - self._began)


class _Loop:
    """Hands out requests to the connections until there are none left, and collects the latencies."""

    def __init__(self, request: bytes, status: int) -> None:
        self.request = request
        self.status = str(status).encode()
        self._to_send = self._to_come = 0
        self._seconds: list[float] = []
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, connections: Sequence[_Connection], requests: int) -> list[float]:
        """Latency in seconds of each of `requests` answers; LoadError if one of them was wrong."""
        self._done = asyncio.get_running_loop().create_future()
        self._seconds = []
        self._to_come = requests
        first = connections[:requests]
        self._to_send = requests - len(first)
        for connection in first:
            connection.send()
        await self._done
        return self._seconds

    def answered(self, connection: _Connection, seconds: float) -> None:
        self._seconds.append(seconds)
        self._to_come -= 1
        if self._to_send:
            self._to_send -= 1
            connection.send()
        elif not self._to_come and not self._done.done():
            self._done.set_result(None)

    def fail(self, message: str) -> None:
        if not self._done.done():
            self._done.set_exception(LoadError(message))


async def _main() -> None:
    job = Job(**json.load(sys.stdin))
    loop = _Loop(job.request.encode(), job.status)
    connections: list[_Connection] = []
    for _ in range(job.connections):
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(loop), job.host, job.port
        )
        connections.append(connection)
    if job.warm_up:
        await loop.run(connections, job.warm_up)
    cpu, began = [cpu_seconds([pid]) for pid in job.pids], time.perf_counter()
    latencies = await loop.run(connections, job.requests)
    seconds = time.perf_counter() - began
    used = [cpu_seconds([pid]) - before for pid, before in zip(job.pids, cpu, strict=True)]
    percentiles = statistics.quantiles(latencies * 2, n=100, method="inclusive")  # wants two at least
    result = Load(job.requests, seconds, 1000 * percentiles[49], 1000 * percentiles[98], used)
    json.dump(asdict(result), sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # open connections would only be reported as lost


if __name__ == "__main__":
    run_loop(_main())
