"""Processes that are measured: starting, CPU time, memory, and their end by pid. Linux only (`/proc`)."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from benchmarks.environment import process_environment

_TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
_STOP_SECONDS: Final = 20.0


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that these processes have used so far, over all threads, ended ones included.

    The kernel scales the sum of both to the scheduler's exact run time, so the error is one tick a process.
    """
    ticks = 0
    for pid in pids:
        # The name, field 2, may hold blanks and brackets; what follows its last bracket begins with field 3.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_SECOND


def memory_kib(pids: Iterable[int], figure: Literal["Pss", "Rss"] = "Pss") -> int:
    """Proportional set size of these processes, together: pages that several share are counted once.

    With "Rss" the resident set size, which counts such pages in each process.
    """
    return sum(
        int(line.split()[1])
        for pid in pids
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith(f"{figure}:")
    )


def open_many_files() -> None:
    """Let this process, and those that it starts, have as many sockets as the system allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(frozen=True, slots=True)
class Server:
    """A target of the load: where it listens, with which key, and the processes behind it."""

    host: str
    port: int
    pids: tuple[int, ...]
    api_key: str = ""
    grpc_target: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What each request carries to be let in."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@contextmanager
def running(
    arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[subprocess.Popen[bytes]]:
    """`python ARGUMENTS` with its output in `log`; ended by SIGTERM, then SIGKILL, when the block is left."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=process_environment() | dict(environment),
        )
    try:
        yield process
    finally:
        _stop(process)


def read_when_written(path: Path, process: subprocess.Popen[bytes], log: Path, seconds: float = 60.0) -> Any:
    """The JSON that `process` writes to `path` once it is ready; RuntimeError with its log if it is not."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads(path.read_text())
        time.sleep(0.02)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{process.args!r} is not ready (exit code {process.poll()}); its log ends:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
