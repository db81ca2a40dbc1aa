"""A runtime that is killed leaves no process behind: its guard sees to it."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from runtime_service.agents.child_process import ChildProcess
from tests.support import eventually, run_async

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 5.0

# What the children of a runtime do: one ignores SIGTERM, others start what a process group does not reach.
CHILDREN = [
    "trap '' TERM HUP; echo $$; while :; do sleep 1; done",
    "setsid sleep 600 <&- & echo $!; exec sleep 600",
    "env -i setsid sleep 600 & echo $!; exec sleep 600",
    "(setsid sh -c 'trap \"\" TERM HUP; echo $$; sleep 600; :' &); sleep 600",
    "(setsid sleep 600 & echo $!); exit 0",
]

RUNTIME = """
import asyncio, os, sys
from pathlib import Path
from runtime_service.agents.child_process import ChildProcess

async def start(script):
    environment = {"PATH": os.environ["PATH"]}
    return await ChildProcess.start(["sh", "-c", script], env=environment, cwd=Path("/"), max_line_bytes=1000)

async def main():
    for script in sys.argv[1:]:
        child = await start(script)
        print(child.pid, int(await child.read_line()), flush=True)
        children.append(child)
    await asyncio.to_thread(sys.stdin.read)

async def start_for_ever():
    while True:
        children.append(await start("sleep 600 & exec sleep 600"))

children = []
asyncio.run(main() if sys.argv[1:] else start_for_ever())
"""


@contextmanager
def runtime(*scripts: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that starts a child of each script, says who they are and what they say, and ends with its stdin."""
    with subprocess.Popen(
        [sys.executable, "-c", RUNTIME, *scripts],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def processes_of(process: "subprocess.Popen[str]") -> set[int]:
    """Those that each child of a runtime has named, once all are there."""
    assert process.stdout is not None
    pids = {int(pid) for _ in CHILDREN for pid in process.stdout.readline().split()}
    assert len(pids) == 2 * len(CHILDREN) - 1, "the first one names itself"
    return pids


def living(pids: set[int]) -> set[int]:
    """Which of them live; an orphan is a zombie until somebody reaps it, who is not us."""
    found = set()
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.add(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def guards_of(pid: int) -> list[psutil.Process]:
    """The guards of a runtime that live."""
    children = {child.pid: child for child in psutil.Process(pid).children()}
    return [children[pid] for pid in living(set(children)) if any("process_guard" in arg for arg in arguments_of(pid))]


async def guard_of(pid: int) -> psutil.Process:
    """The only guard of a runtime. For a moment after its start a process has no command line that can be seen."""
    await eventually(lambda: guards_of(pid))
    (guard,) = guards_of(pid)
    return guard


def arguments_of(pid: int) -> list[str]:
    """The command line of a process; a zombie has none."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def marked(mark: str) -> set[int]:
    """Who has a variable in its environment that begins so."""
    found = set()
    for pid in psutil.pids():
        try:
            if f"\0{mark}".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                found.add(pid)
        except (OSError, psutil.Error):
            continue
    return found


async def gone(pids: set[int]) -> None:
    """Wait until none of them lives."""
    async with asyncio.timeout(LIMIT_SECONDS):
        await eventually(lambda: not living(pids))


def test_process_guard_kills_what_a_killed_runtime_leaves() -> None:
    """All of it, wherever it has gone, within 5 s; then it ends itself; another runtime keeps its own."""

    async def main() -> None:
        with runtime(*CHILDREN) as killed, runtime(*CHILDREN) as other:
            left, kept = processes_of(killed), processes_of(other)
            # The last child ends by itself, and is then a zombie of its runtime.
            await eventually(lambda: (len(living(left)), len(living(kept))) == (len(left) - 1, len(kept) - 1))
            guard = await guard_of(killed.pid)
            killed.kill()
            await gone(left | {guard.pid})
            assert len(living(kept)) == len(kept) - 1
            assert await guard_of(other.pid)

    run_async(main())


def test_process_guard_goes_with_a_runtime_that_ends_in_order() -> None:
    """It takes along what the runtime forgot."""

    async def main() -> None:
        with runtime(*CHILDREN) as process:
            pids = processes_of(process)
            guard = await guard_of(process.pid)
            assert process.stdin is not None
            process.stdin.close()
            await gone(pids | {guard.pid})
            assert process.wait(LIMIT_SECONDS) == 0

    run_async(main())


def test_process_guard_finds_children_started_just_before_the_end() -> None:
    """A runtime is killed while it starts one child after the other."""

    async def main() -> None:
        with runtime() as process:
            mark = arguments_of((await guard_of(process.pid)).pid)[-2]
            await eventually(lambda: len(marked(mark)) > 20)
            process.kill()
            async with asyncio.timeout(LIMIT_SECONDS):
                await eventually(lambda: not marked(mark))

    run_async(main())


async def start_child() -> ChildProcess:
    """A child of this process."""
    return await ChildProcess.start(["cat"], env={"PATH": os.environ["PATH"]}, cwd=Path("/"), max_line_bytes=1000)


def test_process_guard_is_one_for_all_and_replaced_when_it_dies() -> None:
    """The next child that starts is guarded again."""

    async def main() -> None:
        children = [await start_child(), await start_child()]
        guard = await guard_of(os.getpid())
        guard.kill()
        await eventually(lambda: not guards_of(os.getpid()))
        children.append(await start_child())
        other = await guard_of(os.getpid())
        assert other.pid != guard.pid
        for child in children:
            await child.end(0)

    run_async(main())


def test_process_guard_holds_nothing_of_the_runtime() -> None:
    """No output, no other descriptor, no mark, no working directory, not its session; and little memory."""

    async def main() -> None:
        child = await start_child()
        guard = await guard_of(os.getpid())
        proc = Path(f"/proc/{guard.pid}")
        await eventually(lambda: ignored_by(guard.pid) >= {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
        targets = {int(each.name): os.readlink(each) for each in (proc / "fd").iterdir()}
        assert targets.pop(0).startswith("pipe:")
        assert targets == {1: "/dev/null", 2: "/dev/null"}
        assert proc.joinpath("environ").read_bytes() == b""
        assert os.readlink(proc / "cwd") == "/"
        assert os.getsid(guard.pid) == guard.pid
        assert guard.memory_info().rss < 16 << 20
        await child.end(0)

    run_async(main())


def ignored_by(pid: int) -> set[signal.Signals]:
    """The signals that a process ignores."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn")]
    bits = int(line.split()[1], 16)
    return {each for each in signal.Signals if bits >> (each - 1) & 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_process_guard_outlives_signals_to_everybody(number: signal.Signals) -> None:
    """A service manager that stops all of a service's processes at once does not take it from the runtime."""

    async def main() -> None:
        with runtime(CHILDREN[0], CHILDREN[0]) as process:
            assert process.stdout is not None
            pids = {int(process.stdout.readline().split()[0]) for _ in range(2)}
            guard = await guard_of(process.pid)
            await eventually(lambda: number in ignored_by(guard.pid))
            guard.send_signal(number)
            process.kill()
            await gone(pids | {guard.pid})

    run_async(main())
