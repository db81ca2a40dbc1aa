"""Many SSE followers in one process, and how late the events of their runs reach them.

An event's lag is the time from its own `createdAt` to the arrival of the last byte of its frame. Both clocks are
this machine's; `createdAt` is cut to milliseconds, so a lag is up to one too long. While it measures, the process
only reads and notes the time; what it read is looked at afterwards.

    python -m benchmarks.crowd < commands > answers
"""

import json
import os
import re
import select
import subprocess
import sys
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from itertools import accumulate
from typing import IO, Final, cast

from benchmarks.processes import Server
from benchmarks.sse import Follower

_EVENT: Final = re.compile(rb'data: \{"type":"run\.event"[^\n]*?"createdAt":"([^"]+)"[^\n]*\n\n')
_READ_AT_ONCE: Final = 1 << 16
_GRACE_SECONDS: Final = 2.0  # an event that comes later than this is missed


class Crowd:
    """Followers that are connected and read what comes, in a process of their own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._commands = cast(IO[bytes], process.stdin)
        self._answers = cast(IO[bytes], process.stdout)

    def ask(self, command: object) -> object:
        """One command, one answer, a line of JSON each."""
        self._commands.write(json.dumps(command).encode() + b"\n")
        self._commands.flush()
        if not (line := self._answers.readline()):
            raise RuntimeError("the followers' process has ended")
        return json.loads(line)

    def lags(self, seconds: float) -> list[float]:
        """Lag in milliseconds of each event that is made in the next `seconds`."""
        return cast(list[float], self.ask(seconds))


@contextmanager
def crowd(server: Server, requests: Sequence[str]) -> Iterator[Crowd]:
    """One follower a request, all of them connected."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.crowd"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            followers = Crowd(process)
            followers.ask({"server": asdict(server), "requests": list(requests)})
            yield followers
        finally:
            process.kill()


def _lags(chunks: Sequence[tuple[int, float, bytes]], begin: float, end: float) -> list[float]:
    """Lag in milliseconds of each event made from `begin` to `end`; `chunks` are (follower, arrival, bytes)."""
    streams: dict[int, list[tuple[float, bytes]]] = defaultdict(list)
    for follower, arrival, data in chunks:
        streams[follower].append((arrival, data))
    lags = []
    for stream in streams.values():
        ends = list(accumulate(len(data) for _, data in stream))
        for event in _EVENT.finditer(b"".join(data for _, data in stream)):
            made = datetime.fromisoformat(event[1].decode()).timestamp()
            if begin <= made < end:
                lags.append(1000 * (stream[bisect_left(ends, event.end())][0] - made))
    return lags


def _main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    server = Server(**job["server"])
    followers = [Follower(server, request) for request in job["requests"]]
    print("true", flush=True)
    epoll = select.epoll()
    commands = sys.stdin.fileno()
    epoll.register(commands, select.EPOLLIN)
    for follower in followers:
        epoll.register(follower.fileno(), select.EPOLLIN)
    clock = time.time
    while True:
        command = b""
        while not command:  # what comes between two measurements is read and forgotten
            for file, _ in epoll.poll():
                data = os.read(file, _READ_AT_ONCE)
                if file == commands:
                    if not data:
                        return
                    command = data
                elif not data:
                    raise RuntimeError("a stream was cut")
        begin = clock()
        end = begin + json.loads(command)
        chunks: list[tuple[int, float, bytes]] = []
        while (left := end + _GRACE_SECONDS - clock()) > 0:
            for file, _ in epoll.poll(left):
                data = os.read(file, _READ_AT_ONCE)
                chunks.append((file, clock(), data))
                if not data:
                    raise RuntimeError("a stream was cut")
        print(json.dumps(_lags(chunks, begin, end)), flush=True)


if __name__ == "__main__":
    _main()
