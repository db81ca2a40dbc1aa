"""A follower of a run: one SSE stream over a blocking socket, read to its last frame and counted."""

import socket
import time
from dataclasses import dataclass
from typing import Final

from benchmarks.processes import Server

_EVENT: Final = b'"run.event"'
_DELTA: Final = b'"run.delta"'
_COMPLETED: Final = b'"stream.completed"'
_ERROR: Final = b'"stream.error"'
_OVERLAP: Final = max(map(len, (_EVENT, _DELTA, _COMPLETED, _ERROR))) - 1
_TIMEOUT_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Followed:
    """What one stream carried; times in seconds from the request, `first` to the first byte of the body."""

    first: float
    whole: float
    events: int
    deltas: int


class Follower:
    """An open stream. Made: connected and asked, with the first bytes of the body read."""

    def __init__(self, server: Server, request: str) -> None:
        self._socket = socket.create_connection((server.host, server.port), _TIMEOUT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._began = time.perf_counter()
        self._socket.sendall(request.encode())
        data = b""
        while not (body := data.partition(b"\r\n\r\n")[2]):
            data += self._receive()
        self._first = time.perf_counter() - self._began
        if not data.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")):
            raise RuntimeError(f"unexpected answer: {data[:1000]!r}")
        self._body = body

    def fileno(self) -> int:
        """For epoll."""
        return self._socket.fileno()

    def read_to_event(self) -> float:
        """Read until the first event's frame has begun; seconds from the request."""
        while _EVENT not in self._body:
            self._body += self._receive()
        return time.perf_counter() - self._began

    def read_to_end(self) -> Followed:
        """Read until the stream says that it is complete, then close it."""
        events = deltas = 0
        data = self._body
        while True:
            # Nothing is counted twice: only a marker that ends beyond the overlap is new.
            events += data.count(_EVENT)
            deltas += data.count(_DELTA)
            if _COMPLETED in data:
                whole = time.perf_counter() - self._began
                self.close()
                return Followed(self._first, whole, events, deltas)
            if _ERROR in data:
                raise RuntimeError(f"the stream failed: {data[-1000:]!r}")
            kept = data[-_OVERLAP:]
            for marker in (_EVENT, _DELTA):
                if (at := kept.rfind(marker)) >= 0:
                    kept = kept[at + len(marker) :]
            data = kept + self._receive()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _receive(self) -> bytes:
        data = self._socket.recv(1 << 18)
        if not data:
            raise RuntimeError("the stream was cut")
        return data


def follow(server: Server, request: str, events: int) -> Followed:
    """One stream from request to end; RuntimeError unless it carried exactly `events` events."""
    followed = Follower(server, request).read_to_end()
    if followed.events != events:
        raise RuntimeError(f"the stream carried {followed.events} events instead of {events}")
    return followed
