"""The load: a closed loop of HTTP/1.1 keep-alive connections in a process of its own.

Each connection has one request in flight and sends the next one as soon as the answer is whole. The answer's
status is checked and its length followed; nothing is parsed beyond that, and no event loop is used, so that the
load takes little of the machine that it measures. The CPU time of the servers is read by the load itself, right
before the first request and right after the last answer, with the warm-up outside.

    python -m benchmarks.load < job.json > result.json
"""

import json
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from benchmarks.figures import Spread, spread
from benchmarks.processes import Server, cpu_seconds

_HEAD_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"
_RECEIVED_AT_ONCE: Final = 1 << 16
_CONNECTED_AT_ONCE: Final = 64  # a listen queue holds 128


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
    """What one job measured; `cpu_seconds` by process, in the order of the job's `pids`, and of the load itself."""

    requests: int
    seconds: float
    latency: Spread
    cpu_seconds: Sequence[float]
    own_cpu_seconds: float

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
    result = run_apart("benchmarks.load", asdict(job))
    return Load(**result | {"latency": Spread(**result["latency"])})


def run_apart(module: str, job: dict[str, Any]) -> Any:
    """Run a module in a process of its own, a job in, its result out; LoadError with what it said when it failed."""
    done = subprocess.run([sys.executable, "-m", module], input=json.dumps(job).encode(), capture_output=True)
    if done.returncode:
        raise LoadError(done.stderr.decode(errors="replace").strip()[-2000:])
    return json.loads(done.stdout)


class Connection:
    """One connection; `status` is of the answer that came last, `refusal` the begin of the last that was no success."""

    __slots__ = ("_head", "_left", "_receive", "_send", "_socket", "_tail", "began", "refusal", "status")

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._receive = self._socket.recv
        self._send = self._socket.send
        self._head = b""
        self._left = 0  # bytes of the body that are still to come; -1: chunked
        self._tail = b""
        self.began = 0.0
        self.status = b""
        self.refusal = b""

    def fileno(self) -> int:
        """For epoll."""
        return self._socket.fileno()

    def send(self, request: bytes) -> None:
        """Send a request; it is small, and the answer before it has been read."""
        self.began = time.perf_counter()
        self._send(request)

    def receive(self) -> bool:
        """Read what is there; return whether the answer is whole."""
        data = self._receive(_RECEIVED_AT_ONCE)
        if not data:
            raise LoadError("a connection was closed by the server")
        left = self._left
        if left == 0:
            if self._head:
                data = self._head + data
            end = data.find(_HEAD_END)
            if end < 0:
                self._head = data
                return False
            self._head = b""
            self.status = data[9:12]
            if self.status[:1] != b"2":
                self.refusal = data[:1000]
            if length := _LENGTH.search(data, 0, end + 2):
                left = int(length[1]) + end + 4
            elif _CHUNKED.search(data, 0, end + 2):
                left, self._tail, data = -1, b"", data[end + 2 :]
            else:
                raise LoadError(f"an answer without a length: {data[:end]!r}")
        if left < 0:
            self._tail = (self._tail + data[-7:])[-7:]
            self._left = 0 if self._tail == _LAST_CHUNK else -1
        else:
            self._left = left - len(data)
        return self._left == 0


class Connections:
    """Open connections, and which of them have something to read."""

    def __init__(self, host: str, port: int, number: int) -> None:
        self.all: list[Connection] = []
        self._epoll = select.epoll()
        self._by_file: dict[int, Connection] = {}
        for _ in range(number):
            if len(self.all) % _CONNECTED_AT_ONCE == _CONNECTED_AT_ONCE - 1:
                time.sleep(0.02)
            connection = Connection(host, port)
            self.all.append(connection)
            self._by_file[connection.fileno()] = connection
            self._epoll.register(connection.fileno(), select.EPOLLIN)

    def answered(self, seconds: float | None = None) -> Iterator[Connection]:
        """Wait for bytes, `seconds` at most; each connection whose answer is whole now, as soon as it has been read."""
        by_file = self._by_file
        for file, _ in self._epoll.poll(seconds):
            connection = by_file[file]
            if connection.receive():
                yield connection


def _send_all(connections: Connections, request: bytes, status: bytes, requests: int) -> list[float]:
    """Latency in milliseconds of each of `requests` answers; LoadError if one of them was wrong."""
    clock = time.perf_counter
    milliseconds: list[float] = []
    first = connections.all[:requests]
    to_send, to_come = requests - len(first), requests
    for connection in first:
        connection.send(request)
    while to_come:
        for connection in connections.answered():
            milliseconds.append(1000 * (clock() - connection.began))
            if connection.status != status:
                raise LoadError(f"unexpected answer: {connection.status!r} {connection.refusal!r}")
            to_come -= 1
            if to_send:
                to_send -= 1
                connection.send(request)
    return milliseconds


def _main() -> None:
    job = Job(**json.load(sys.stdin))
    request, status = job.request.encode(), str(job.status).encode()
    connections = Connections(job.host, job.port, job.connections)
    if job.warm_up:
        _send_all(connections, request, status, job.warm_up)
    cpu, own, began = [cpu_seconds([pid]) for pid in job.pids], time.process_time(), time.perf_counter()
    milliseconds = _send_all(connections, request, status, job.requests)
    seconds, own = time.perf_counter() - began, time.process_time() - own
    used = [cpu_seconds([pid]) - before for pid, before in zip(job.pids, cpu, strict=True)]
    json.dump(asdict(Load(job.requests, seconds, spread(milliseconds), used, own)), sys.stdout)


if __name__ == "__main__":
    _main()
