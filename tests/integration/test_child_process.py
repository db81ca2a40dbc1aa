"""Child processes: lines in and out, limits, and that none is left behind."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from runtime_service.agents.child_process import ChildProcess, LineTooLong
from tests.support import LoopFactory, eventually, run_async

RunChecked = Callable[[Coroutine[Any, Any, None]], None]

ENVIRONMENT = {"PATH": os.environ["PATH"]}
MIB = 1 << 20
LIMIT_SECONDS = 10.0
PYTHON = (sys.executable, "-I", "-S", "-u", "-c")

# Says its pid, and goes where a process group does not reach: a session of its own, its parent gone.
DAEMON = """
import os, sys, time
if os.fork():
    os.wait()
    os._exit(0)
os.setsid()
if pid := os.fork():
    os.write(1, b"%d\\n" % pid)
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> RunChecked:
    """`run_async` on each kind of event loop."""
    loop_factory: LoopFactory = request.param
    return lambda main: run_async(main, loop_factory=loop_factory)


@asynccontextmanager
async def child_of(*command: str, grace_seconds: float = 0.0, max_line_bytes: int = MIB) -> AsyncIterator[ChildProcess]:
    """A child, ended at the end, and then dead and reaped."""
    child = await ChildProcess.start(command, env=ENVIRONMENT, cwd=Path("/"), max_line_bytes=max_line_bytes)
    try:
        yield child
    finally:
        await child.end(grace_seconds)
        assert not psutil.pid_exists(child.pid)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; an orphan is a zombie until somebody reaps it, who is not us."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def rss_bytes() -> int:
    """The memory of this process."""
    return int(psutil.Process().memory_info().rss)


def test_child_process_answers_line_by_line(run: RunChecked) -> None:
    """Lines come as they went, one longer than a pipe, one empty, and one without an end."""

    async def main() -> None:
        async with child_of("sh", "-c", "cat; printf rest", grace_seconds=LIMIT_SECONDS) as child:
            lines = [b"one\n", b"\n", b"x" * 500_000 + b"\n", "é\r\n".encode()]
            writing = [asyncio.create_task(child.write_line(line, LIMIT_SECONDS)) for line in lines]
            assert [await child.read_line() for _ in lines] == lines
            await asyncio.gather(*writing)
            assert child.exit_status is None
            child._stdin.close()
            assert await child.read_line() == b"rest"
            assert await child.read_line() == b""
            assert await child.wait() == 0

    run(main())


@pytest.mark.parametrize(
    ("command", "cwd", "kind", "words"),
    [
        ("acp-no-such", "/", FileNotFoundError, "The command acp-no-such was not found on the PATH."),
        ("/acp-no-such", "/", FileNotFoundError, "The command /acp-no-such is not there"),
        ("/etc/passwd", "/", PermissionError, "The command /etc/passwd is not executable."),
        ("cat", "/acp-no-such", FileNotFoundError, "The working directory /acp-no-such does not exist."),
        ("cat", "/etc/passwd", NotADirectoryError, "The working directory /etc/passwd is no directory."),
    ],
)
def test_child_process_says_why_it_does_not_start(
    run: RunChecked, command: str, cwd: str, kind: type[OSError], words: str
) -> None:
    """The words name what has to be put right."""

    async def main() -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(kind, match=words):
            await ChildProcess.start([command], env=ENVIRONMENT, cwd=Path(cwd), max_line_bytes=MIB)
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 1, "more than the guard's pipe"

    run(main())


def test_child_process_without_a_kind_of_program_says_so(run: RunChecked, tmp_path: Path) -> None:
    """What the kernel cannot execute is told in the kernel's words."""
    program = tmp_path / "program"
    program.write_bytes(b"\0\1\2")
    program.chmod(0o700)

    async def main() -> None:
        with pytest.raises(OSError, match=f"The command {program} could not be started: Exec format error."):
            await ChildProcess.start([str(program)], env=ENVIRONMENT, cwd=Path("/"), max_line_bytes=MIB)

    run(main())


def test_child_process_has_the_environment_given_and_a_mark(run: RunChecked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the runtime's own environment goes along."""
    monkeypatch.setenv("RUNTIME_SECRET", "secret")

    async def main() -> None:
        async with child_of("env") as child:
            lines = []
            while line := await child.read_line():
                lines.append(line.decode().rstrip())
            assert f"PATH={ENVIRONMENT['PATH']}" in lines
            assert sorted(line.partition("=")[0] for line in lines) == ["ACP_RUNTIME_CHILD", "PATH"]

    run(main())


def test_child_process_dead_at_start_leaves_its_status_and_words(run: RunChecked) -> None:
    """Reading ends, writing breaks, and ending it twice is no error."""

    async def main() -> None:
        async with child_of("sh", "-c", "echo broken >&2; exit 3") as child:
            assert await child.read_line() == b""
            assert await child.wait() == 3
            assert child.exit_status == 3
            assert child.last_errors == "broken\n"
            with pytest.raises(BrokenPipeError):
                await child.write_line(b"x\n", LIMIT_SECONDS)
            await child.end(0)
        assert child.exit_status == 3
        assert child.last_errors == "broken\n"
        assert await child.read_line() == b""

    run(main())


def test_child_process_killed_by_a_signal_has_its_negative_number(run: RunChecked) -> None:
    """As `subprocess` has it."""

    async def main() -> None:
        async with child_of("cat") as child:
            os.kill(child.pid, signal.SIGKILL)
            assert await child.wait() == -signal.SIGKILL

    run(main())


def test_child_process_may_end_in_its_own_way(run: RunChecked) -> None:
    """SIGTERM comes first, and its grace is not waited for in vain."""

    async def main() -> None:
        async with child_of("sh", "-c", "trap 'exit 7' TERM; echo; while :; do sleep 0.01; done") as child:
            await child.read_line()
            started = time.monotonic()
            await child.end(600)
            assert child.exit_status == 7
            assert time.monotonic() - started < LIMIT_SECONDS

    run(main())


def test_child_process_that_ignores_sigterm_is_killed_after_the_grace(run: RunChecked) -> None:
    """Not before it and not long after."""

    async def main() -> None:
        async with child_of("sh", "-c", "trap '' TERM; echo; while :; do sleep 0.01; done") as child:
            await child.read_line()
            started = time.monotonic()
            await child.end(0.3)
            assert child.exit_status == -signal.SIGKILL
            assert 0.29 < time.monotonic() - started < LIMIT_SECONDS

    run(main())


@pytest.mark.parametrize(
    "family",
    [
        "(trap '' TERM; exec sleep 600) & echo $!; wait",
        "setsid sleep 600 & echo $!; wait",
        "env -i setsid sleep 600 & echo $!; wait",
        "env -i PATH=\"$PATH\" setsid sh -c '(sleep 600 & echo $!); sleep 600' & wait",
        f"'{sys.executable}' -I -S -c '{DAEMON}'; sleep 600",
    ],
    ids=["same group", "own session", "own session, no environment", "no parent either", "daemon with the pipes"],
)
def test_child_process_takes_along_what_it_started(run: RunChecked, family: str) -> None:
    """Wherever they have gone."""

    async def main() -> None:
        async with child_of("sh", "-c", family) as child:
            pid = int(await child.read_line())
            assert not is_gone(pid)
            # So that the child, which ends at once, has gone when the others are killed.
            await child.end(LIMIT_SECONDS)
            assert is_gone(pid)

    run(main())


def test_child_process_that_died_takes_along_what_it_left(run: RunChecked) -> None:
    """Reading ends with the child, although its daemon holds stdout open, and its end finds the daemon."""

    async def main() -> None:
        async with child_of("sh", "-c", f"'{sys.executable}' -I -S -c '{DAEMON}'; echo last; exit 5") as child:
            pid = int(await child.read_line())
            assert await child.read_line() == b"last\n"
            assert await child.read_line() == b""
            assert await child.wait() == 5
            assert not is_gone(pid)
            await child.end(0)
            assert is_gone(pid)

    run(main())


def test_child_process_leaves_others_alone(run: RunChecked) -> None:
    """The end of one is nobody else's."""

    async def main() -> None:
        async with child_of("cat") as one, child_of("cat") as other:
            await one.end(0)
            await other.write_line(b"still here\n", LIMIT_SECONDS)
            assert await other.read_line() == b"still here\n"

    run(main())


def test_child_process_is_ended_although_the_caller_goes(run: RunChecked) -> None:
    """The task that ends it may be cancelled at any time."""

    async def main() -> None:
        async with child_of("sh", "-c", "trap '' TERM; echo; while :; do sleep 0.01; done") as child:
            await child.read_line()
            ending = asyncio.create_task(child.end(0.1))
            await asyncio.sleep(0)
            ending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await ending
            await eventually(lambda: is_gone(child.pid))

    run(main())


def test_child_process_that_closes_stdout_lives_on(run: RunChecked) -> None:
    """The end of its output is not its end."""

    async def main() -> None:
        async with child_of("sh", "-c", "echo last; exec 1>&-; read line; exit 4") as child:
            assert await child.read_line() == b"last\n"
            assert await child.read_line() == b""
            assert await child.read_line() == b""
            assert child.exit_status is None
            await child.write_line(b"go\n", LIMIT_SECONDS)
            assert await child.wait() == 4

    run(main())


def test_child_process_that_closes_stdin_breaks_the_pipe(run: RunChecked) -> None:
    """Also while a write waits."""

    async def main() -> None:
        async with child_of("sh", "-c", "read line; exec 0<&-; echo closed; sleep 600") as child:
            with pytest.raises(BrokenPipeError):
                await child.write_line(b"\n" + b"x" * MIB + b"\n", LIMIT_SECONDS)
            assert await child.read_line() == b"closed\n"
            with pytest.raises(BrokenPipeError):
                await child.write_line(b"x\n", LIMIT_SECONDS)
            assert child.exit_status is None

    run(main())


def test_child_process_that_dies_ends_a_write_that_waits(run: RunChecked) -> None:
    """Although somebody else, who does not read, holds its stdin open."""

    async def main() -> None:
        async with child_of("sh", "-c", "exec 3<&0; sleep 600 <&3 & echo; exec sleep 600") as child:
            await child.read_line()
            writing = asyncio.create_task(child.write_line(b"x" * MIB + b"\n", LIMIT_SECONDS))
            await eventually(lambda: child._unwritten and len(child._unwritten) < MIB)
            os.kill(child.pid, signal.SIGKILL)
            with pytest.raises(BrokenPipeError):
                await writing

    run(main())


def test_child_process_that_does_not_read_is_given_up_in_time(run: RunChecked) -> None:
    """What was interrupted in the middle of a line is made whole, if it reads after all."""
    reads_later = (
        "import signal, sys; signal.sigwait([signal.SIGUSR1])\n"
        "for line in sys.stdin: print(len(line), line[0], flush=True)"
    )
    script = f"import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); print('ready')\n{reads_later}"

    async def main() -> None:
        async with child_of(*PYTHON, script) as child:
            await child.read_line()
            with pytest.raises(TimeoutError):
                await child.write_line(b"a" * MIB + b"\n", 0.05)
            with pytest.raises(TimeoutError):
                await child.write_line(b"b" * MIB + b"\n", 0.05)
            os.kill(child.pid, signal.SIGUSR1)
            await child.write_line(b"c\n", LIMIT_SECONDS)
            assert await child.read_line() == b"%d a\n" % (MIB + 1)
            assert await child.read_line() == b"2 c\n"

    run(main())


def test_child_process_is_read_on_after_a_reader_that_was_cancelled(run: RunChecked) -> None:
    """Half a line is not lost."""

    async def main() -> None:
        async with child_of("sh", "-c", "printf half; read line; echo whole") as child:
            reading = asyncio.create_task(child.read_line())
            await eventually(lambda: child._read == b"half")
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await child.write_line(b"\n", LIMIT_SECONDS)
            assert await child.read_line() == b"halfwhole\n"

    run(main())


def test_child_process_ended_ends_a_reader(run: RunChecked) -> None:
    """A reader that waits is told, not left."""

    async def main() -> None:
        async with child_of("sleep", "600") as child:
            reading = asyncio.create_task(child.read_line())
            await asyncio.sleep(0)
            await child.end(0)
            assert await reading == b""

    run(main())


def test_child_process_may_not_write_a_line_without_end(run: RunChecked) -> None:
    """200 MB in one line take no memory here."""
    script = "import os\nfor _ in range(200): os.write(1, b'x' * 1_000_000)\nos.write(1, b'\\n')"

    async def main() -> None:
        async with child_of(*PYTHON, script) as child:
            before = rss_bytes()
            for _ in range(2):
                with pytest.raises(LineTooLong, match="a line of more than 1048576 bytes"):
                    await child.read_line()
            assert rss_bytes() - before < 8 * MIB

    run(main())


def test_child_process_line_limit_counts_the_newline(run: RunChecked) -> None:
    """A line of just the limit is read, one byte more is not, however it comes."""

    async def main() -> None:
        async with child_of("printf", "12345\\n67890x\\n", max_line_bytes=6) as child:
            assert await child.read_line() == b"12345\n"
            with pytest.raises(LineTooLong):
                await child.read_line()

    run(main())


def test_child_process_that_floods_is_held_up_by_its_pipe(run: RunChecked) -> None:
    """It writes only as fast as it is read, nothing is lost, and others have their turn."""
    lines, length = 20_000, 1000
    script = f"import os\nfor n in range({lines}): os.write(1, b'%0{length - 1}d\\n' % n)"

    async def main() -> None:
        async with child_of(*PYTHON, script) as child:
            process = psutil.Process(child.pid)
            assert await child.read_line() == b"0" * (length - 1) + b"\n"
            before = rss_bytes()
            # One pipe full but for a line, and one read.
            await eventually(lambda: process.io_counters().write_chars >= 64 * length)
            await eventually(lambda: process.status() == psutil.STATUS_SLEEPING)
            assert process.io_counters().write_chars < MIB // 2
            for number in range(1, lines):
                assert int(await child.read_line()) == number
            assert await child.read_line() == b""
            assert rss_bytes() - before < 4 * MIB

    run(main())


def test_child_process_reader_of_a_flood_lets_others_run(run: RunChecked) -> None:
    """A reader that always finds something still gives the loop its turn."""

    async def main() -> None:
        async with child_of("yes") as child:
            read = 0

            async def count() -> None:
                nonlocal read
                while read < 1_000_000 and await child.read_line():
                    read += 1

            reading = asyncio.create_task(count())
            for _ in range(20):
                await asyncio.sleep(0)
            assert read < 500_000
            await child.end(0)
            await reading

    run(main())


def test_child_process_never_waits_for_its_stderr_to_be_read(run: RunChecked) -> None:
    """Of 5 MB the last few KiB are kept, broken characters replaced."""
    script = "import os\nfor _ in range(5): os.write(2, b'e' * 1_000_000)\nos.write(2, b'the \\xff end'); print('done')"

    async def main() -> None:
        async with child_of(*PYTHON, script) as child:
            assert await child.read_line() == b"done\n"
            await child.wait()
            assert child.last_errors.endswith("eethe \ufffd end")
            assert len(child.last_errors) <= 4096

    run(main())


def test_child_process_that_closes_stderr_is_not_asked_again(run: RunChecked) -> None:
    """A pipe at its end is always ready: it would keep the loop busy."""

    async def main() -> None:
        async with child_of("sh", "-c", "echo last >&2; exec 2>&-; exec sleep 600") as child:
            await eventually(lambda: child._stderr._file.closed)
            assert child.last_errors == "last\n"
            assert child.exit_status is None

    run(main())


def test_child_process_has_its_last_words_read_with_its_exit(run: RunChecked) -> None:
    """However many they are, and whatever the loop comes to first."""

    async def main() -> None:
        async with child_of("sh", "-c", "head -c 60000 /dev/zero >&2; echo end >&2; exit 1") as child:
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222 - so that all is there at once
            assert await child.wait() == 1
            assert child.last_errors.endswith("\0end\n")

    run(main())


def test_child_processes_by_the_hundred_cost_little(run: RunChecked) -> None:
    """Started at once, spoken with, and ended at once; under 256 KiB each in this process."""

    async def start() -> ChildProcess:
        return await ChildProcess.start(["cat"], env=ENVIRONMENT, cwd=Path("/"), max_line_bytes=MIB)

    async def speak(child: ChildProcess) -> None:
        await child.write_line(b"%d\n" % child.pid, LIMIT_SECONDS)
        assert int(await child.read_line()) == child.pid

    async def main() -> None:
        descriptors = len(os.listdir("/proc/self/fd"))
        before = rss_bytes()
        children = await asyncio.gather(*[start() for _ in range(100)])
        await asyncio.gather(*map(speak, children))
        assert rss_bytes() - before < 25 * MIB
        await asyncio.gather(*[child.end(LIMIT_SECONDS) for child in children])
        assert not [child.pid for child in children if psutil.pid_exists(child.pid)]
        assert len(os.listdir("/proc/self/fd")) <= descriptors + 1, "more than the guard's pipe"

    run(main())
