"""Child processes that speak in lines over their stdin and stdout, and are never left behind.

It knows nothing of agents and of what the lines mean. A child that is ended takes with it whatever it started, and so
does the end of the runtime, also by SIGKILL: see `process_family`. Linux: it needs pidfd and /proc.

Neither asyncio's nor uvloop's subprocesses, because uvloop forks the whole runtime on the loop (48 ms with 1.5 GB,
against 1 ms of `subprocess`, which uses vfork), asyncio 3.11 has a thread a child, and both reap a child when it dies,
so that its process group may be a stranger's by the time that it is killed.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO
from weakref import WeakKeyDictionary

from runtime_service.agents.process_family import Family

log = logging.getLogger(__name__)

_READ_BYTES = 1 << 14
"""As much as is read, and gone through line by line, before others have their turn."""
_PIPE_BYTES = 1 << 16
"""What a pipe holds: the last words of a child that has ended are read at once."""
_ERRORS_BYTES = 4096
_KILL_SECONDS = 10.0
"""How long an end waits for what it has killed. A process that waits for its disk dies later."""

# Held while a child is started.
_starting: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class LineTooLong(ValueError):
    """The child wrote a line longer than it may be; nothing can be read after it."""


class ChildProcess:
    """A process in a session of its own. Whoever starts it must `end` it, also when it died by itself.

    One task at a time may read. A call that was cancelled or timed out leaves everything usable.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", family: Family, max_line_bytes: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._pidfd = os.pidfd_open(process.pid)
        self.pid = process.pid
        self._process = process
        self._family = family
        self._max_line_bytes = max_line_bytes
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._stdin = _PipeEnd(process.stdin, loop.add_writer, loop.remove_writer)
        self._stdout = _PipeEnd(process.stdout, loop.add_reader, loop.remove_reader)
        self._stderr = _PipeEnd(process.stderr, loop.add_reader, loop.remove_reader)
        loop.add_reader(process.stderr, self._read_errors)
        self._read = bytearray()
        self._unwritten = memoryview(b"")
        self._writing = asyncio.Lock()
        self._errors = b""
        self._exited: asyncio.Future[int] = loop.create_future()
        self._ending: asyncio.Task[None] | None = None
        loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    async def start(
        cls, command: Sequence[str], *, env: Mapping[str, str], cwd: Path, max_line_bytes: int
    ) -> "ChildProcess":
        """Start `command` with exactly this environment; a name without a slash is looked up on its PATH.

        Raises OSError in words for the one who configured it: FileNotFoundError, NotADirectoryError or
        PermissionError where it is one of these.
        """
        if sys.platform != "linux":
            raise OSError("Child processes that are never left behind need Linux.")
        # One at a time, and between two the loop has its turn.
        async with _starting.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            await asyncio.sleep(0)
            family = Family()
            process = _start(command, env, cwd, family)
            try:
                return cls(process, family, max_line_bytes)
            except BaseException:
                with process:
                    process.kill()
                raise

    async def read_line(self) -> bytes:
        """Return the next line of stdout with its newline, or what is left at its end without one, then b"".

        It ends with stdout, or with the child when others hold stdout open; and by `end`. Raises LineTooLong.
        The child is read only as fast as this is called: a pipe that is full holds it up.
        """
        searched = 0
        while True:
            newline = self._read.find(b"\n", searched)
            length = newline + 1 or len(self._read)
            if length > self._max_line_bytes:
                raise LineTooLong(f"The process wrote a line of more than {self._max_line_bytes} bytes.")
            if newline >= 0 or not await self._read_more():
                line = bytes(self._read[:length])
                del self._read[:length]
                return line
            searched = length

    async def read(self) -> bytes:
        """Return what there is of stdout, at least a byte, then b"" at its end, which is that of `read_line`."""
        while not self._read and await self._read_more():
            pass
        data = bytes(self._read)
        self._read.clear()
        return data

    async def write_line(self, line: bytes, timeout_seconds: float) -> None:
        """Write a line, which brings its newline, after those that others are writing.

        Raises TimeoutError when the child has not read enough by then, BrokenPipeError when it no longer can. The
        rest of a line that was interrupted goes out before the next one.
        """
        async with asyncio.timeout(timeout_seconds), self._writing:
            await self._write_out()
            self._unwritten = memoryview(line)
            await self._write_out()

    @property
    def last_errors(self) -> str:
        """The last few KiB of its stderr."""
        return self._errors.decode("utf-8", "replace")

    @property
    def exit_status(self) -> int | None:
        """Its exit status, the negative number of the signal that ended it, or None while it lives."""
        return self._exited.result() if self._exited.done() else None

    async def wait(self) -> int:
        """Wait for its exit and return the status. Others that it started may go on."""
        return await asyncio.shield(self._exited)

    async def end(self, grace_seconds: float) -> None:
        """End it and all that it started; return when none is left.

        Its stdin is closed and its group gets SIGTERM; after its exit, or `grace_seconds`, whatever is left gets
        SIGKILL, wherever it has gone. Goes on when the caller is cancelled; the first call's grace holds for all.
        """
        if self._ending is None:
            self._ending = self._loop.create_task(self._end(grace_seconds), name=f"end-child-{self.pid}")
        await asyncio.shield(self._ending)

    async def _end(self, grace_seconds: float) -> None:
        left: set[int] = set()
        try:
            self._stdin.close()
            if not self._exited.done():
                # Whom it has started in other sessions can be seen as long as it lives.
                await self._family.look(self.pid)
                self._signal_group(signal.SIGTERM)
                with suppress(TimeoutError):
                    async with asyncio.timeout(grace_seconds):
                        await self.wait()
            self._signal_group(signal.SIGKILL)
            async with asyncio.timeout(_KILL_SECONDS):
                while left := await self._family.look(self.pid, kill=True):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.002)
                await self.wait()
        except TimeoutError:
            log.error("processes that cannot be killed: %s", sorted(left))
        except OSError as error:
            log.error("what a child process has left could not be looked for", exc_info=error)
        finally:
            # Also when the loop ends before this has; then the guard sees to the rest.
            self._signal_group(signal.SIGKILL)
            self._close()

    def _signal_group(self, number: signal.Signals) -> None:
        """The group is its own as long as it is not reaped, dead or alive."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _close(self) -> None:
        self._read_errors()
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()
        self._read.clear()
        if self._exited.done():
            self._process.wait()

    async def _read_more(self) -> bool:
        """Read what there is, at least something; False at the end."""
        if self._exited.done():
            await asyncio.sleep(0)  # what is left is there at once, and others have their turn
        else:
            await self._stdout.ready()
        try:
            data = self._stdout.read(_READ_BYTES)
        except BlockingIOError:
            return not self._exited.done()
        if not data:
            self._stdout.close()
        self._read += data
        return bool(data)

    async def _write_out(self) -> None:
        while self._unwritten:
            if self._exited.done():
                raise BrokenPipeError("The process has ended.")
            try:
                self._unwritten = self._unwritten[self._stdin.write(self._unwritten) :]
            except BlockingIOError:
                await self._stdin.ready()

    def _read_errors(self) -> None:
        with suppress(BlockingIOError):
            data = self._stderr.read(_PIPE_BYTES)
            self._errors = (self._errors + data)[-_ERRORS_BYTES:]
            if not data:
                self._stderr.close()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # It is looked at and left to be reaped by its end: until then its pid and group cannot become another's.
        result = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert result is not None
        self._exited.set_result(result.si_status if result.si_code == os.CLD_EXITED else -result.si_status)
        self._read_errors()
        self._stdin.wake()
        self._stdout.wake()


class _PipeEnd:
    """This end of a pipe to or from a child. `read` and `write` never wait; a closed pipe has come to its end."""

    def __init__(
        self, file: IO[bytes], watch: Callable[[int, Callable[[], None]], object], unwatch: Callable[[int], object]
    ) -> None:
        self._file = file
        self._watch = watch
        self._unwatch = unwatch
        self._waiting: asyncio.Future[None] | None = None
        os.set_blocking(file.fileno(), False)

    def read(self, at_most: int) -> bytes:
        """Return what there is, b"" at the end. Raises BlockingIOError."""
        return b"" if self._file.closed else os.read(self._file.fileno(), at_most)

    def write(self, data: memoryview) -> int:
        """Return how much has gone. Raises BlockingIOError, BrokenPipeError."""
        if self._file.closed:
            raise BrokenPipeError("The pipe is closed.")
        return os.write(self._file.fileno(), data)

    async def ready(self) -> None:
        """Wait until the pipe can be read or written, is closed, or somebody calls `wake`."""
        if self._file.closed:
            return
        assert self._waiting is None, "one at a time"
        self._waiting = asyncio.get_running_loop().create_future()
        self._watch(self._file.fileno(), self.wake)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if not self._file.closed:
                self._unwatch(self._file.fileno())

    def wake(self) -> None:
        """End the waiting of `ready`."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def close(self) -> None:
        """Safe to call twice."""
        if not self._file.closed:
            self._unwatch(self._file.fileno())
            self._file.close()
            self.wake()


def _start(command: Sequence[str], env: Mapping[str, str], cwd: Path, family: Family) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(  # noqa: S603 - as it is configured
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**env, **family.mark()},
            cwd=cwd,
            start_new_session=True,
        )
    except OSError as error:
        raise type(error)(_why(error, command[0], cwd)) from error


def _why(error: OSError, program: str, cwd: Path) -> str:
    """Say it to the one who configured the command."""
    if error.filename is not None and os.fspath(error.filename) == os.fspath(cwd):
        if isinstance(error, FileNotFoundError):
            return f"The working directory {cwd} does not exist."
        if isinstance(error, NotADirectoryError):
            return f"The working directory {cwd} is no directory."
        return f"The working directory {cwd} may not be entered."
    if isinstance(error, FileNotFoundError):
        place = "is not there, or what it is a script for is not" if "/" in program else "was not found on the PATH"
        return f"The command {program} {place}."
    if isinstance(error, PermissionError):
        return f"The command {program} is not executable."
    return f"The command {program} could not be started: {error.strerror}."
