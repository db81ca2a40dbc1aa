"""The embedded store: one SQLite file, one process. See `base` for what it promises.

`synchronous=FULL` over a write-ahead log: a commit is on the disk before it is reported. Writes go through
one thread that shares commits among them; reads have connections of their own.
"""

import asyncio
import fcntl
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from runtime_service.store import sqlite_rows as rows
from runtime_service.store import sqlite_writes as writes
from runtime_service.store.base import Change, NewRun, NewTurn, Outcome, RunPage, TurnKey
from runtime_service.store.group_commit import GroupCommitWriter

SCHEMA_VERSION = 1
_READERS = 2
_BUSY_MS = 5_000

_T = TypeVar("_T")


class SQLiteStore:
    """Runs in one SQLite file; `open` makes the file and holds it alone until `close`."""

    def __init__(self, path: Path, writer: GroupCommitWriter, lock_file: int) -> None:
        self._path = path
        self._writer = writer
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
        except BaseException:
            os.close(lock_file)
            raise
        return cls(path, GroupCommitWriter(connection), lock_file)

    async def close(self) -> None:
        """Finish the writes that were asked for, then close."""
        await self._writer.close()
        await asyncio.get_running_loop().run_in_executor(None, self._readers.shutdown)
        for connection in self._read_connections:
            connection.close()
        with suppress(OSError):
            os.close(self._lock_file)

    # Writes

    def start_run(self, new: NewRun, *, claim: bool) -> Awaitable[Change]:
        """Accept a run."""
        return self._writer.submit(lambda db: writes.start_run(db, new, claim))

    def continue_run(self, new: NewTurn, *, claim: bool) -> Awaitable[Change]:
        """Open the next turn of a run."""
        return self._writer.submit(lambda db: writes.continue_run(db, new, claim))

    def append_events(self, key: TurnKey, events: Sequence[EventDraft]) -> Awaitable[Change]:
        """Put events at the end of a running turn's log."""
        return self._writer.submit(lambda db: writes.append_events(db, key, events))

    def save_draft(self, key: TurnKey, text: str) -> Awaitable[None]:
        """Keep the text so far of the message in the making."""
        return self._writer.submit(lambda db: writes.save_draft(db, key, text))

    def finish_turn(self, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome) -> Awaitable[Change]:
        """Append the last events and settle the turn."""
        return self._writer.submit(lambda db: writes.finish_turn(db, key, events, outcome))

    def release_turn(self, key: TurnKey, events: Sequence[EventDraft]) -> Awaitable[Change]:
        """Give a running turn back to the queue."""
        return self._writer.submit(lambda db: writes.release_turn(db, key, events))

    def cancel_run(
        self,
        organization: str,
        server_id: str,
        run_id: str,
        events: Sequence[EventDraft],
        output: str | None,
    ) -> Awaitable[Change]:
        """Settle every open turn as cancelled."""
        return self._writer.submit(
            lambda db: writes.cancel_run(db, rows.run_key(db, organization, server_id, run_id), events, output)
        )

    def claim_turns(self, limit: int) -> Awaitable[list[Change]]:
        """Claim queued turns, oldest first."""
        return self._writer.submit(lambda db: writes.claim_turns(db, limit))

    def recover(self, max_attempts: int, may_repeat: Callable[[str], bool]) -> Awaitable[list[Change]]:
        """Settle the turns that a lost runtime left running."""
        return self._writer.submit(lambda db: writes.recover(db, max_attempts, may_repeat))

    # Reads

    async def queued_turns(self) -> dict[str, int]:
        """Count the turns that wait, by the id of their run."""
        return await self._read(lambda db: dict(rows.execute(db, "queued_turns", ())))

    async def get_run(self, organization: str, server_id: str, run_id: str, turn: int | None = None) -> Run:
        """Return a run showing its latest turn, or `turn`."""
        return await self._read(
            lambda db: rows.run_at_turn(db, rows.run_key(db, organization, server_id, run_id), turn)
        )

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
        return [(rows.ROLES[role], content) for role, content in reversed(newest_first)]

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
    if version == 0:
        with connection:
            connection.execute((rows.SQL / "sqlite_schema.sql").read_text())
    elif version != SCHEMA_VERSION:
        raise StoreUnavailable(
            f"{path} has schema version {version}; this program knows version {SCHEMA_VERSION}. "
            "Use the program that wrote it, or another data directory."
        )
