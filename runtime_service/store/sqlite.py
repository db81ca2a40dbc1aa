"""The embedded store: one SQLite file, one process. See `base` for what it promises.

`synchronous=FULL` over a write-ahead log: a commit is on the disk before it is reported. Writes go through one
writer that shares commits among them; reads have threads and connections of their own.
"""

import asyncio
import fcntl
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import apsw

from runtime_service.errors import StoreUnavailable
from runtime_service.runs import (
    EventDraft,
    EventRole,
    Run,
    RunEvent,
    RunStatus,
)
from runtime_service.store import sqlite_deletions as deletions
from runtime_service.store import sqlite_rows as rows
from runtime_service.store import sqlite_writes as writes
from runtime_service.store.base import (
    Cancel,
    Change,
    Deleted,
    NewAnswer,
    NewRun,
    NewTurn,
    Outcome,
    RunPage,
    StoreListener,
    TurnKey,
)
from runtime_service.store.columns import ROLES, SQL
from runtime_service.store.group_commit import GroupCommitWriter
from runtime_service.store.sqlite_turns import RunningTurns

SCHEMA_VERSION = 4
_READERS = 2
_BUSY_MS = 5_000

_T = TypeVar("_T")


class SQLiteStore:
    """Runs in one SQLite file; `open` makes the file and holds it alone until `close`."""

    def __init__(self, path: Path, connection: apsw.Connection, lock_file: int) -> None:
        self._path = path
        self._connection = connection
        # What an earlier process left running: all that is running now, as nobody has asked for anything yet.
        self._left = frozenset(rows.execute(connection, "running_turns", ()))
        self._deleted_to = (0, 0)  # runs last written to before this time are deleted, up to this key
        self._turns = RunningTurns(connection)
        self._writer = GroupCommitWriter(connection, self._turns)
        self._lock_file = lock_file
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        self._reading = threading.local()
        self._read_connections: list[apsw.Connection] = []

    @classmethod
    async def open(cls, path: Path) -> "SQLiteStore":
        """Open the file at `path`, made when it is missing.

        Raises StoreUnavailable when another process holds it or its schema is of another version.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock_file = _lock(path)
        try:
            connection = _connect(path)
            _prepare_schema(connection, path)
            return cls(path, connection, lock_file)
        except BaseException:
            os.close(lock_file)
            raise

    async def close(self) -> None:
        """Finish the writes that were asked for, then close."""
        loop = asyncio.get_running_loop()
        await self._writer.close()
        await loop.run_in_executor(None, self._readers.shutdown)
        for connection in self._read_connections:
            connection.close()
        # The last one to close, and the only one that may write: it leaves all in one file, and no log beside it.
        await loop.run_in_executor(None, self._connection.close)
        lock_file, self._lock_file = self._lock_file, -1
        with suppress(OSError):  # closed before
            os.close(lock_file)

    # Other processes: there are none, the file is this one's alone

    @property
    def is_available(self) -> bool:
        """Whether the last write was taken."""
        return not self._writer.was_refused

    def listen(self, listener: StoreListener) -> None:
        """Tell nothing: nobody else writes to the file, and what this process holds it cannot lose."""

    async def renew(self) -> None:
        """Find out whether writes are taken again; what is held is held until `close`."""
        if self._writer.was_refused:
            await self._writer.submit(lambda: self._connection.pragma("user_version", SCHEMA_VERSION))

    # Writes

    def start_run(self, new: NewRun, *, claim: bool) -> Awaitable[Change]:
        """Accept a run."""
        return self._writer.submit(partial(self._turns.start_run, new, claim=claim), size=2, on_rows=True)

    def append_events(self, key: TurnKey, events: Sequence[EventDraft]) -> Awaitable[Change]:
        """Put events at the end of a running turn's log."""
        return self._writer.submit(partial(self._turns.append_events, key, events), size=1 + len(events), on_rows=True)

    def finish_turn(self, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome) -> Awaitable[Change]:
        """Append the last events and settle the turn."""
        return self._writer.submit(
            partial(self._turns.finish_turn, key, events, outcome), size=1 + len(events), on_rows=True
        )

    def save_draft(self, key: TurnKey, text: str) -> Awaitable[None]:
        """Keep the text so far of the message in the making."""

        def save() -> None:
            self._turns.draft_saved(key.run_id)
            writes.save_draft(self._connection, key, text)

        return self._writer.submit(save)

    def continue_run(self, new: NewTurn, *, claim: bool) -> Awaitable[Change]:
        """Open the next turn of a run."""
        return self._submit(new.run_id, lambda db: writes.continue_run(db, new, claim))

    def ask_question(
        self, key: TurnKey, events: Sequence[EventDraft], options: Sequence[tuple[str, str]]
    ) -> Awaitable[Change]:
        """Put events at the end of a running turn's log, the last of which asks a question."""
        return self._submit(key.run_id, lambda db: writes.ask_question(db, key, events, options))

    def answer_question(self, answer: NewAnswer) -> Awaitable[Change]:
        """Append the answer to the question of a run."""
        return self._submit(answer.run_id, lambda db: writes.answer_question(db, answer))

    def release_turn(self, key: TurnKey, events: Sequence[EventDraft]) -> Awaitable[Change]:
        """Give a running turn back to the queue."""
        return self._submit(key.run_id, lambda db: writes.release_turn(db, key, events))

    def cancel_run(self, cancel: Cancel, events: Sequence[EventDraft], output: str | None) -> Awaitable[Change]:
        """Settle every open turn as cancelled."""
        return self._submit(cancel.run_id, lambda db: writes.cancel_run(db, cancel, events, output))

    def claim_turns(self, limit: int) -> Awaitable[list[Change]]:
        """Claim queued turns, oldest first."""
        # Nothing is known of a run of which a turn waits for room only: none of its turns is running.
        return self._writer.submit(partial(writes.claim_turns, self._connection, limit))

    async def recover(self, max_attempts: int, may_repeat: Callable[[str], bool]) -> list[Change]:
        """Settle the turns that an earlier process left running; there are none once that is done."""
        if not self._left:
            return []

        def settle() -> list[Change]:
            changes = writes.recover(self._connection, self._left, max_attempts, may_repeat)
            for change in changes:
                self._turns.forget(change.run.id)
            return changes

        changes = await self._writer.submit(settle)
        self._left = frozenset()
        return changes

    async def delete_runs(self, before_ms: int, limit: int) -> Deleted:
        """Delete runs last written to before a time."""
        key = self._deleted_to[1] if self._deleted_to[0] == before_ms else 0
        deleted, ended = Deleted(0, 0, 0), False
        while not any(deleted) and not ended:
            found = await self._read(partial(deletions.old_runs, after=key, before_ms=before_ms, limit=limit))
            delete = partial(deletions.delete_runs, self._connection, found, before_ms, limit)
            deleted, key = await self._writer.submit(delete, size=limit)
            ended = found.ended
        self._deleted_to = (before_ms, key if any(deleted) else 0)
        return deleted

    def delete_requests(self, before_ms: int, limit: int) -> Awaitable[int]:
        """Forget the requests made before a time."""
        return self._writer.submit(partial(deletions.forget_requests, self._connection, before_ms, limit), size=limit)

    def _submit(self, run_id: str, write: Callable[[apsw.Connection], _T]) -> Awaitable[_T]:
        """Submit a write after which what was known of a run may not be true any more."""

        def forget_and_write() -> _T:
            self._turns.forget(run_id)
            return write(self._connection)

        return self._writer.submit(forget_and_write)

    def get_requested(self, new: NewRun | NewTurn) -> Awaitable[Change | None]:
        """Return what an earlier request of the same id gave, one that is being written too."""
        return self._writer.submit(partial(self._turns.requested, new), on_rows=True)

    # Reads

    async def count_queued(self) -> int:
        """Count the turns that wait."""
        return await self._read(lambda db: int(rows.execute(db, "count_queued", ()).get))

    async def get_run(self, organization: str, server_id: str, run_id: str, turn: int | None = None) -> Run:
        """Return a run showing its latest turn, or `turn`."""
        return await self._read(lambda db: rows.find_run(db, organization, server_id, run_id, turn))

    async def list_runs(
        self,
        organization: str,
        server_id: str,
        *,
        status: RunStatus | None,
        token: str | None,
        limit: int,
        limit_characters: int = 1 << 20,
    ) -> RunPage:
        """Return a page of runs, newest first."""
        return await self._read(
            lambda db: rows.list_runs(db, organization, server_id, status, token, limit, limit_characters)
        )

    async def read_events(self, run_id: str, after: int, limit: int, limit_bytes: int) -> list[RunEvent]:
        """Return the events after a sequence."""
        return await self._read(lambda db: rows.read_events(db, run_id, after, limit, limit_bytes))

    async def read_messages(self, run_id: str, before_turn: int, limit: int) -> list[tuple[EventRole, str]]:
        """Return the messages of the turns before, oldest first."""
        newest_first = await self._read(
            lambda db: list(rows.execute(db, "messages_before_turn", (run_id, before_turn, limit)))
        )
        return [(ROLES[role], content) for role, content in reversed(newest_first)]

    async def read_latest_log(self, run_id: str, log_type: str, after: int = 0) -> RunEvent | None:
        """Return the newest event of a type behind a sequence."""
        return await self._read(lambda db: rows.latest_log(db, run_id, log_type, after))

    async def _read(self, read: Callable[[apsw.Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read_here, read)

    def _read_here(self, read: Callable[[apsw.Connection], _T]) -> _T:
        try:
            connection: apsw.Connection | None = getattr(self._reading, "connection", None)
            if connection is None:
                connection = self._reading.connection = _connect(self._path, readonly=True)
                self._read_connections.append(connection)
            return read(connection)
        except apsw.Error as error:
            raise StoreUnavailable(f"The store cannot be read at the moment ({type(error).__name__}).") from error


def _lock(path: Path) -> int:
    lock_file = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock_file)
        raise StoreUnavailable(
            f"{path} is in use by another runtime service. Stop that one, or choose another data directory."
        ) from None
    return lock_file


def _connect(path: Path, *, readonly: bool = False) -> apsw.Connection:
    flags = apsw.SQLITE_OPEN_READONLY if readonly else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
    try:
        if not readonly:
            # What runs hold is for their owner alone; SQLite gives its other files the mode of the first.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = apsw.Connection(str(path), flags=flags, statementcachesize=64)
        connection.set_busy_timeout(_BUSY_MS)
        if not readonly:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -16000")
    except (apsw.Error, OSError) as error:
        raise StoreUnavailable(f"{path} cannot be opened as the run store: {error}.") from error
    return connection


def _prepare_schema(connection: apsw.Connection, path: Path) -> None:
    version = connection.pragma("user_version")
    if not 0 <= version <= SCHEMA_VERSION:
        raise StoreUnavailable(
            f"{path} has schema version {version}; this program knows version {SCHEMA_VERSION}. "
            "Use the program that wrote it, or another data directory."
        )
    scripts = ["schema"] if version == 0 else [f"upgrade_{each}" for each in range(version, SCHEMA_VERSION)]
    with connection:
        for script in scripts:
            connection.execute((SQL / f"sqlite_{script}.sql").read_text())
