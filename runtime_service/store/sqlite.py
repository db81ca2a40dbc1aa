"""The embedded store: one SQLite file, one process. See `base` for what it promises.

`synchronous=FULL` over a write-ahead log: a commit is on the disk before it is reported. Writes go through
one thread that shares commits among them; reads have connections of their own.
"""

import asyncio
import fcntl
import os
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import apsw

from runtime_service.errors import InvalidRequest, RunNotFound, StoreUnavailable
from runtime_service.runs import (
    TERMINAL,
    EventDraft,
    EventRole,
    LogLevel,
    Run,
    RunEvent,
    RunMode,
    RunStatus,
    Turn,
    now_ms,
)
from runtime_service.store.base import (
    Change,
    NewRun,
    NewTurn,
    Outcome,
    RunPage,
    TurnKey,
    TurnLost,
    accepted_run,
    count_messages,
    incomplete_event,
    log_event,
    place_events,
    user_event,
)
from runtime_service.store.group_commit import GroupCommitWriter

SCHEMA_VERSION = 1
_READERS = 2
_SQL = resources.files("runtime_service.store") / "sql"
_QUERIES = dict(re.findall(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", (_SQL / "sqlite.sql").read_text(), re.M | re.S))
_LIST_BY_STATUS = {
    status: _QUERIES["list_runs_by_status" if status in TERMINAL else "list_open_runs"].format(status=status.value)
    for status in RunStatus
}
_ROLES: dict[str, EventRole] = {role.value: role for role in EventRole}
_LEVELS: dict[str | None, LogLevel | None] = {None: None} | {level.value: level for level in LogLevel}
_STATUSES: dict[str, RunStatus] = {status.value: status for status in RunStatus}
_MODES: dict[str, RunMode] = {mode.value: mode for mode in RunMode}

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
        return self._writer.submit(lambda db: _start_run(db, new, claim))

    def continue_run(self, new: NewTurn, *, claim: bool) -> Awaitable[Change]:
        """Open the next turn of a run."""
        return self._writer.submit(lambda db: _continue_run(db, new, claim))

    def append_events(self, key: TurnKey, events: Sequence[EventDraft]) -> Awaitable[Change]:
        """Put events at the end of a running turn's log."""
        return self._writer.submit(lambda db: _append_events(db, key, events))

    def save_draft(self, key: TurnKey, text: str) -> Awaitable[None]:
        """Keep the text so far of the message in the making."""
        return self._writer.submit(lambda db: _save_draft(db, key, text))

    def finish_turn(self, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome) -> Awaitable[Change]:
        """Append the last events and settle the turn."""
        return self._writer.submit(lambda db: _finish_turn(db, key, events, outcome))

    def release_turn(self, key: TurnKey, events: Sequence[EventDraft]) -> Awaitable[Change]:
        """Give a running turn back to the queue."""
        return self._writer.submit(lambda db: _release_turn(db, key, events))

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
            lambda db: _cancel_run(db, _run_key(db, organization, server_id, run_id), events, output)
        )

    def claim_turns(self, limit: int) -> Awaitable[list[Change]]:
        """Claim queued turns, oldest first."""
        return self._writer.submit(lambda db: _claim_turns(db, limit))

    def recover(self, max_attempts: int, may_repeat: Callable[[str], bool]) -> Awaitable[list[Change]]:
        """Settle the turns that a lost runtime left running."""
        return self._writer.submit(lambda db: _recover(db, max_attempts, may_repeat))

    # Reads

    async def queued_turns(self) -> dict[str, int]:
        """Count the turns that wait, by the id of their run."""
        return await self._read(lambda db: dict(_execute(db, "queued_turns", ())))

    async def get_run(self, organization: str, server_id: str, run_id: str, turn: int | None = None) -> Run:
        """Return a run showing its latest turn, or `turn`."""
        return await self._read(lambda db: _run_at_turn(db, _run_key(db, organization, server_id, run_id), turn))

    async def list_runs(
        self, organization: str, server_id: str, *, status: RunStatus | None, token: str | None, limit: int
    ) -> RunPage:
        """Return a page of runs, newest first."""
        return await self._read(lambda db: _list_runs(db, organization, server_id, status, token, limit))

    async def read_events(self, run_id: str, after: int, limit: int, limit_bytes: int) -> list[RunEvent]:
        """Return the events after a sequence."""
        return await self._read(lambda db: _read_events(db, run_id, after, limit, limit_bytes))

    async def read_messages(self, run_id: str, before_turn: int, limit: int) -> list[tuple[EventRole, str]]:
        """Return the messages of the turns before, oldest first."""
        rows = await self._read(lambda db: list(_execute(db, "messages_before_turn", (run_id, before_turn, limit))))
        return [(_ROLES[role], content) for role, content in reversed(rows)]

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
        connection = apsw.Connection(str(path), flags=flags, statementcachesize=64)
        connection.set_busy_timeout(5_000)
        if not readonly:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA cache_size = -16000")
    except apsw.Error as error:
        raise StoreUnavailable(f"{path} cannot be opened as the run store: {error}.") from error
    return connection


def _prepare_schema(connection: apsw.Connection, path: Path) -> None:
    version = connection.pragma("user_version")
    if version == 0:
        with connection:
            connection.execute((_SQL / "sqlite_schema.sql").read_text())
    elif version != SCHEMA_VERSION:
        raise StoreUnavailable(
            f"{path} has schema version {version}; this program knows version {SCHEMA_VERSION}. "
            "Use the program that wrote it, or another data directory."
        )


def _execute(db: apsw.Connection, query: str, bindings: Sequence[Any]) -> apsw.Cursor:
    return db.execute(_QUERIES[query], bindings)


def _start_run(db: apsw.Connection, new: NewRun, claim: bool) -> Change:
    run = accepted_run(new, claim=claim)
    _execute(
        db,
        "insert_run",
        (new.id, new.organization, new.server_id, new.title, new.metadata, new.created_at_ms, run.status),
    )
    key = db.last_insert_rowid()
    events = place_events([user_event(new)], 1, 1)
    _insert_turn(db, key, run.turn)
    _insert_events(db, key, events)
    return Change(run, events)


def _continue_run(db: apsw.Connection, new: NewTurn, claim: bool) -> Change:
    key = _run_key(db, new.organization, new.server_id, new.run_id)
    run = _run_at_turn(db, key)
    claim = claim and run.status in TERMINAL
    turn = Turn(
        number=run.last_turn + 1,
        status=RunStatus.RUNNING if claim else RunStatus.QUEUED,
        mode=new.mode,
        input=new.input,
        first_sequence=run.last_sequence + 1,
        created_at_ms=new.created_at_ms,
        metadata=run.turn.metadata if new.metadata is None else new.metadata,
        attempt=int(claim),
        epoch=int(claim),
    )
    events = place_events([user_event(new)], turn.number, turn.first_sequence)
    _execute(db, "open_next_turn", (key, new.created_at_ms, turn.status))
    _insert_turn(db, key, turn)
    _insert_events(db, key, events)
    return Change(_run_at_turn(db, key), events)


def _append_events(db: apsw.Connection, key: TurnKey, events: Sequence[EventDraft]) -> Change:
    row = _extend_log(db, "extend_log", key, events, now_ms())
    if any(event.role is EventRole.ASSISTANT for event in events):
        _execute(db, "forget_draft", (row[10], key.turn))
    turn = _execute(db, "turn", (row[10], key.turn)).fetchone()
    return Change(_run_from_row((*row[:10], *_one(turn))), _place(db, row, key, events))


def _finish_turn(db: apsw.Connection, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome) -> Change:
    at = now_ms()
    row = _extend_log(db, "extend_log_and_settle", key, events, at, outcome.status)
    turn = _settle_turn(db, row[10], key.turn, outcome, at)
    return Change(_run_from_row((*row[:10], *turn)), _place(db, row, key, events))


def _release_turn(db: apsw.Connection, key: TurnKey, events: Sequence[EventDraft]) -> Change:
    row = _extend_log(db, "extend_log_and_settle", key, events, now_ms(), RunStatus.QUEUED)
    attempt = _run_at_turn(db, row[10], key.turn).turn.attempt
    _execute(db, "requeue_turn", (row[10], key.turn, max(attempt - 1, 0)))
    placed = _place(db, row, key, events)
    return Change(_run_at_turn(db, row[10], key.turn), placed)


def _cancel_run(db: apsw.Connection, key: int, events: Sequence[EventDraft], output: str | None) -> Change:
    run = _run_at_turn(db, key)
    if run.status in TERMINAL:
        return Change(run)
    at = now_ms()
    # The earliest open turn is the one that may be running; the rest of the log belongs to it.
    numbers = [number for (number,) in _execute(db, "open_turns_of_run", (key,))]
    drafts = [*events, log_event("cancelled", LogLevel.WARN, "The run was cancelled.")]
    for number in numbers:
        _execute(db, "take_turn_away", (key, number))
        said = output if number == numbers[0] else None
        _settle_turn(db, key, number, Outcome(RunStatus.CANCELLED, output=said), at)
    change = _write_behind(db, key, run, numbers[0], drafts, RunStatus.CANCELLED, at)
    return Change(_run_at_turn(db, key), change.events)


def _claim_turns(db: apsw.Connection, limit: int) -> list[Change]:
    changes = []
    for key, number in list(_execute(db, "claimable_turns", (limit,))):
        _execute(db, "claim_turn", (key, number))
        run = _run_at_turn(db, key, number)
        events = (
            [log_event("attempt", LogLevel.WARN, f"Attempt {run.turn.attempt} begins: the one before was lost.")]
            if run.turn.attempt > 1
            else []
        )
        status = RunStatus.RUNNING if number == run.last_turn else _run_at_turn(db, key).status
        changes.append(_write_behind(db, key, run, number, events, status, now_ms()))
    return changes


def _recover(db: apsw.Connection, max_attempts: int, may_repeat: Callable[[str], bool]) -> list[Change]:
    changes = []
    for key, number in list(_execute(db, "running_turns", ())):
        run = _run_at_turn(db, key, number)
        draft = _execute(db, "draft", (key, number)).get
        events = [incomplete_event(draft)] if draft else []
        at = now_ms()
        if may_repeat(run.server_id) and run.turn.attempt < max_attempts:
            _execute(db, "requeue_turn", (key, number, run.turn.attempt))
            status = RunStatus.QUEUED
        else:
            error = (
                f"The runtime was lost while it executed this turn (attempt {run.turn.attempt}), and the turn "
                "is not begun again. Send the input once more to try again."
            )
            events.append(log_event("runtime_lost", LogLevel.ERROR, error))
            status = RunStatus.FAILED
            _settle_turn(db, key, number, Outcome(status, draft, error, "RUNTIME_LOST"), at)
        if number != run.last_turn:
            status = _run_at_turn(db, key).status
        changes.append(_write_behind(db, key, run, number, events, status, at))
    return changes


def _write_behind(
    db: apsw.Connection,
    key: int,
    run: Run,
    number: int,
    drafts: Sequence[EventDraft],
    status: RunStatus,
    at: int,
) -> Change:
    """Append events of turn `number` to the log as `run` shows it, and give the run its status."""
    placed = place_events(drafts, number, run.last_sequence + len(drafts))
    _insert_events(db, key, placed)
    _execute(
        db,
        "set_run",
        (key, run.last_sequence + len(drafts), run.message_count + count_messages(drafts), at, status),
    )
    return Change(_run_at_turn(db, key, number), placed)


def _extend_log(
    db: apsw.Connection,
    query: str,
    key: TurnKey,
    events: Sequence[EventDraft],
    at: int,
    *status: RunStatus,
) -> tuple[Any, ...]:
    """Make room for events of a running turn; return the row of its run, its key last."""
    bindings = (*key, len(events), count_messages(events), at, *status)
    row: tuple[Any, ...] | None = _execute(db, query, bindings).fetchone()
    if row is None:
        raise TurnLost
    return row


def _place(
    db: apsw.Connection, row: tuple[Any, ...], key: TurnKey, events: Sequence[EventDraft]
) -> tuple[RunEvent, ...]:
    """Put the events where `_extend_log`, which gave `row`, made room."""
    placed = place_events(events, key.turn, row[6])
    _insert_events(db, row[10], placed)
    return placed


def _save_draft(db: apsw.Connection, key: TurnKey, text: str) -> None:
    _execute(db, "save_draft", (*key, text))


def _settle_turn(db: apsw.Connection, key: int, number: int, outcome: Outcome, at: int) -> tuple[Any, ...]:
    bindings = (key, number, outcome.status, outcome.output, outcome.error, outcome.error_code, at)
    return _one(_execute(db, "settle_turn", bindings).fetchone())


def _one(row: tuple[Any, ...] | None) -> tuple[Any, ...]:
    assert row is not None, "what was found in this transaction is there"
    return row


def _insert_turn(db: apsw.Connection, key: int, turn: Turn) -> None:
    _execute(
        db,
        "insert_turn",
        (
            key,
            turn.number,
            turn.status,
            turn.mode,
            turn.input,
            turn.first_sequence,
            turn.created_at_ms,
            turn.metadata,
            turn.attempt,
            turn.epoch,
        ),
    )


def _insert_events(db: apsw.Connection, key: int, events: Sequence[RunEvent]) -> None:
    if events:
        db.executemany(
            _QUERIES["insert_event"],
            [
                (
                    key,
                    e.sequence,
                    e.turn,
                    e.role,
                    e.content,
                    e.created_at_ms,
                    e.log_type,
                    e.log_level,
                    e.metadata,
                )
                for e in events
            ],
        )


def _run_key(db: apsw.Connection, organization: str, server_id: str, run_id: str) -> int:
    key = _execute(db, "run_key", (run_id, organization, server_id)).get
    if key is None:
        raise RunNotFound(run_id)
    return int(key)


def _run_at_turn(db: apsw.Connection, key: int, turn: int | None = None) -> Run:
    return _run_from_row(_one(_execute(db, "run_at_turn", (key, turn)).fetchone()))


def _run_from_row(row: tuple[Any, ...]) -> Run:
    turn = Turn(
        number=row[10],
        status=_STATUSES[row[11]],
        mode=_MODES[row[12]],
        input=row[13],
        first_sequence=row[14],
        created_at_ms=row[15],
        output=row[16],
        error=row[17],
        error_code=row[18],
        metadata=row[19],
        completed_at_ms=row[20],
        attempt=row[21],
        epoch=row[22],
    )
    return Run(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], turn, row[8], row[9])


def _list_runs(
    db: apsw.Connection,
    organization: str,
    server_id: str,
    status: RunStatus | None,
    token: str | None,
    limit: int,
) -> RunPage:
    before = 2**63 - 1
    if token is not None:
        key = _execute(db, "run_key", (token, organization, server_id)).get
        if key is None:
            raise InvalidRequest("page_token", "is not a token that an earlier page gave")
        before = int(key)
    bindings = (organization, server_id, before, limit + 1)
    rows = list(db.execute(_QUERIES["list_runs"] if status is None else _LIST_BY_STATUS[status], bindings))
    runs = [_run_from_row(row) for row in rows[:limit]]
    return RunPage(runs, runs[-1].id if len(rows) > limit else None)


def _read_events(db: apsw.Connection, run_id: str, after: int, limit: int, limit_bytes: int) -> list[RunEvent]:
    events: list[RunEvent] = []
    size = 0
    for sequence, turn, role, content, at, log_type, level, metadata in _execute(
        db, "events_after", (run_id, after, limit)
    ):
        size += len(content) if content.isascii() else len(content.encode())
        size += len(metadata) if metadata else 0
        if size > limit_bytes and events:
            break
        events.append(RunEvent(sequence, turn, _ROLES[role], content, at, log_type, _LEVELS[level], metadata))
    return events
