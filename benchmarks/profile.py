"""Where a run's time goes: py-spy on both processes under load, its samples summed up by room of the house.

Only samples that hold the interpreter lock count, each for the file that it was in; a sample inside a C library
belongs to the file that called it. A process that was preempted in a system call shows there, too: on two cores,
most of all in gRPC's writes.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.effort import Effort
from benchmarks.environment import BODY, EVENTS
from benchmarks.load import run_load
from benchmarks.product import echo, product, runs_path
from benchmarks.report import Section, table

_CONNECTIONS: Final = 16
_SECONDS: Final = 8
_SAMPLES_A_SECOND: Final = 400
_ROWS: Final = 16
_FRAME: Final = re.compile(r"\(([^()]*)\)$")
_ROOMS: Final = (
    (re.compile(r"^(gateway/\w+|runtime_service/(?:store|agents|\w+))"), r"\1"),
    (re.compile(r"^(?:grpc|protos|google)/.*"), "gRPC and protobuf"),
    (re.compile(r"^(?:aiohttp|multidict|yarl)/.*"), "aiohttp"),
    (re.compile(r"^(?:asyncio|uvloop|concurrent|contextlib|_weakrefset)\b.*"), "event loop and tasks"),
)


def measure_profile(directory: Path, effort: Effort) -> Section:
    """A table a process: rooms by the time that a run spends in them."""
    path = runs_path(echo(EVENTS))
    requests = effort.requests[_CONNECTIONS] * 4
    with product(directory) as server:
        spies = [_spy(pid, directory / f"{pid}.samples") for pid in server.pids]
        load = run_load(server, path, BODY, connections=_CONNECTIONS, requests=requests, warm_up=_CONNECTIONS * 20)
        for spy in spies:
            if spy.wait() != 0:
                raise RuntimeError(f"py-spy failed: {spy.args!r}")
        parts = []
        for name, pid, seconds in zip(("gateway", "runtime service"), server.pids, load.cpu_seconds, strict=True):
            rooms = _rooms((directory / f"{pid}.samples").read_text())
            parts.append(_part(name, rooms, 1e6 * seconds / load.requests))
    return Section(f"Where a sync run's time goes, {_CONNECTIONS} connections", "\n\n".join(parts))


def _spy(pid: int, output: Path) -> "subprocess.Popen[bytes]":
    spy = Path(sys.executable).with_name("py-spy")
    options = ["--pid", str(pid), "--duration", str(_SECONDS), "--rate", str(_SAMPLES_A_SECOND)]
    options += ["--gil", "--function", "--format", "raw", "--output", str(output)]
    return subprocess.Popen([spy, "record", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _rooms(samples: str) -> Counter[str]:
    """Count samples, lines of `frame;frame;… count`, by the room of their innermost frame."""
    rooms: Counter[str] = Counter()
    for line in samples.splitlines():
        frames, _, count = line.rpartition(" ")
        found = _FRAME.search(frames.rpartition(";")[2])
        rooms[_room(found[1] if found else "")] += int(count)
    return rooms


def _room(file: str) -> str:
    for pattern, room in _ROOMS:
        if match := pattern.match(file):
            return match.expand(room)
    return "other libraries"


def _part(name: str, rooms: Mapping[str, int], microseconds: float) -> str:
    whole = sum(rooms.values())
    rows = [
        (room, f"{count / whole:.1%}", f"{microseconds * count / whole:.0f}")
        for room, count in sorted(rooms.items(), key=lambda item: -item[1])
    ][:_ROWS]
    head = (f"{name}, {microseconds:.0f} µs of CPU a run", "share", "µs a run")
    return table(head, rows)
