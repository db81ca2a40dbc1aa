"""Who belongs to a child of the runtime; and, as a script, the guard that kills those when the runtime has ended.

A child carries a mark in its environment, and what it starts inherits that. The script is a process of its own, one
a runtime: its stdin is a pipe from the runtime, and at the end of that, however the runtime ended, it kills whatever
still belongs to the runtime's children. It knows the standard library alone, and little of that, because it lives as
long as the runtime does: `python -I -S process_guard.py MARK`. Linux: it reads /proc.
"""

import os
import signal
import sys
import time

_LIMIT_SECONDS = 10.0
"""How long the guard goes on looking. What cannot be killed by then waits for its disk, or is not ours to kill."""

_PAUSE_SECONDS = 0.05


class Life:
    """A process that lives: its parent, its session, and its start in clock ticks, by which a pid is not taken for
    an earlier one's."""

    __slots__ = ("parent", "session", "start")

    def __init__(self, parent: int, session: int, start: int) -> None:
        self.parent = parent
        self.session = session
        self.start = start


def processes() -> dict[int, Life]:
    """Return each process that lives, by its pid; no zombies. Raises OSError when /proc cannot be read."""
    found: dict[int, Life] = {}
    seen: set[str] = set()
    # Again for those that were started meanwhile, perhaps by one that has gone.
    while new := {name for name in os.listdir("/proc") if name.isdigit()} - seen:
        seen |= new
        for name in new:
            # Behind the name in brackets, which may hold anything: state, parent, group, session; 20th is the start.
            fields = _read(f"/proc/{name}/stat").rpartition(b")")[2].split()
            if fields and fields[0] not in (b"Z", b"X"):
                found[int(name)] = Life(int(fields[1]), int(fields[3]), int(fields[19]))
    return found


def marked(pids: list[int], mark: bytes) -> dict[int, bytes]:
    """Return those processes whose environment has a variable that begins with `mark`, and the rest of its value."""
    found = {}
    for pid in pids:
        _, mark_found, rest = (b"\0" + _read(f"/proc/{pid}/environ")).partition(b"\0" + mark)
        if mark_found:
            found[pid] = rest.partition(b"\0")[0]
    return found


def family(living: dict[int, Life], seeds: set[int], sessions: set[int]) -> set[int]:
    """Return the seeds, what descends from them, and who is in a session of one of them or of `sessions`.

    So also those are found that were started with an empty environment, or have written over it. Each seed is in a
    session that a child of the runtime has made, or a descendant of one: nobody else is.
    """
    members = {pid for pid in seeds if pid in living}
    sessions = sessions | {living[pid].session for pid in members}
    while True:
        more = {
            pid
            for pid, life in living.items()
            if pid not in members and (life.parent in members or life.session in sessions)
        }
        if not more:
            return members
        members |= more
        sessions |= {living[pid].session for pid in more}


def kill(pids: set[int]) -> None:
    """SIGKILL each that is still there."""
    for pid in pids:
        try:  # noqa: SIM105 - the guard does without contextlib
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _read(path: str) -> bytes:
    """Return a file of /proc, empty when its process has gone or is somebody else's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = b""
            while part := os.read(descriptor, 1 << 16):
                content += part
            return content
        finally:
            os.close(descriptor)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""


def _guard(mark: bytes) -> None:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    started = time.monotonic()
    rounds_without = 0
    # Twice, because a child that is just being started has no environment that can be seen for a moment.
    while rounds_without < 2 and time.monotonic() - started < _LIMIT_SECONDS:
        living = processes()
        found = family(living, set(marked(list(living), mark)), set())
        kill(found)
        rounds_without = 0 if found else rounds_without + 1
        time.sleep(_PAUSE_SECONDS)


if __name__ == "__main__":
    _guard(os.fsencode(sys.argv[1]))
