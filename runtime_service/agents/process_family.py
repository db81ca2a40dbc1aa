"""A child process with all that it starts, which are found wherever they have gone.

A mark in the environment, which is inherited, tells them from everybody else's; the first of them also brings the
guard (`process_guard`) to life. Who has thrown away the mark is known by parent or session; only one who has thrown
away all three of them is not found. It does not know what the children do, nor how one is ended.
"""

import asyncio
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from queue import Empty, SimpleQueue
from typing import IO

from runtime_service.agents import process_guard

# One variable of every child's environment: random for this runtime, then the number of the child.
_NAME = "ACP_RUNTIME_CHILD"
_RUNTIME = f"{secrets.token_hex(16)}."
_MARK = f"{_NAME}={_RUNTIME}"


class Family:
    """A child that is about to be started, and its descendants."""

    def __init__(self) -> None:
        self._number = str(next(_numbers))
        # Pid and start of those that were seen last.
        self._known: set[tuple[int, int]] = set()

    def mark(self) -> Mapping[str, str]:
        """Return what its environment has to have. The guard lives from then on; raises OSError when it cannot."""
        _guard.ensure()
        return {_NAME: f"{_RUNTIME}{self._number}"}

    async def look(self, leader: int, *, kill: bool = False) -> set[int]:
        """Return who of it lives, and SIGKILL them if asked. `leader` is the child, which is not reaped yet.

        Those found once are found again. Takes some milliseconds in a thread. Raises OSError when /proc cannot be read.
        """
        answer: Future[set[int]] = Future()
        _requests.put((self, leader, kill, answer))
        _looking.submit(_answer_requests)
        return await asyncio.wrap_future(answer)

    def find(self, living: dict[int, process_guard.Life], numbers: dict[int, bytes], leader: int) -> set[int]:
        """Return who of those living belongs to it; `numbers` are of those that carry this runtime's mark."""
        seeds = {pid for pid, start in self._known if pid in living and living[pid].start == start}
        seeds.update(pid for pid, number in numbers.items() if number == self._number.encode())
        members = process_guard.family(living, seeds, {leader})
        self._known = {(pid, living[pid].start) for pid in members}
        return members


class _Guard:
    """The process that kills what is left when this one has ended, however it did."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: IO[bytes] | None = None

    def ensure(self) -> None:
        """Start it unless it lives."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._pipe is not None:
            self._pipe.close()
        # Nobody else inherits the writing end, so its end is this process's; and the guard's own environment is empty.
        reading, writing = os.pipe()
        self._pipe = os.fdopen(writing, "wb", buffering=0)
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own
                [sys.executable, "-I", "-S", process_guard.__file__, _MARK],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(reading)


_guard = _Guard()
_numbers = count(1)
_requests: "SimpleQueue[tuple[Family, int, bool, Future[set[int]]]]" = SimpleQueue()
_looking = ThreadPoolExecutor(1, thread_name_prefix="child-processes")


def _answer_requests() -> None:
    """Look at all processes once for everybody who asked by now: that takes as long for a hundred as for one."""
    requests = []
    with suppress(Empty):
        while True:
            requests.append(_requests.get_nowait())
    requests = [request for request in requests if request[-1].set_running_or_notify_cancel()]
    if not requests:
        return
    try:
        living = process_guard.processes()
        numbers = process_guard.marked(list(living), _MARK.encode())
    except OSError as error:
        for *_, answer in requests:
            answer.set_exception(error)
        return
    for family, leader, kill, answer in requests:
        members = family.find(living, numbers, leader)
        if kill:
            process_guard.kill(members)
        answer.set_result(members)
