"""Rows of the embedded store to domain values and back, and what is read through any connection.

The SQL is in `sql/sqlite.sql`, each query by its name.
"""

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from runtime_service.errors import InvalidRequest, RequestIdReused, RunNotFound
from runtime_service.runs import TERMINAL, Question, Run, RunEvent, RunStatus, Turn
from runtime_service.store.base import Change, Request, RunPage
from runtime_service.store.columns import LEVELS, MODES, ROLES, STATUSES, named_queries

QUERIES = named_queries("sqlite.sql")
_LIST_BY_STATUS = {
    status: QUERIES["list_runs_by_status" if status in TERMINAL else "list_open_runs"].format(status=status.value)
    for status in RunStatus
}


_decode_question = msgspec.json.Decoder(Question).decode
_encode = msgspec.json.Encoder().encode


def execute(db: apsw.Connection, query: str, bindings: Sequence[Any]) -> apsw.Cursor:
    """Execute a named query of sqlite.sql."""
    return db.execute(QUERIES[query], bindings)


def run_key(db: apsw.Connection, organization: str, server_id: str, run_id: str) -> int:
    """Return the internal key of a run. Raises RunNotFound."""
    key = execute(db, "run_key", (run_id, organization, server_id)).get
    if key is None:
        raise RunNotFound(run_id)
    return int(key)


def find_run(db: apsw.Connection, organization: str, server_id: str, run_id: str, turn: int | None) -> Run:
    """Return a run showing its latest turn, or `turn`, outside of a transaction. Raises RunNotFound."""
    row = execute(db, "run_at_turn", (run_key(db, organization, server_id, run_id), turn)).fetchone()
    if row is None:  # it was deleted since its key was found
        raise RunNotFound(run_id)
    return run_from_row(row)


def run_at_turn(db: apsw.Connection, key: int, turn: int | None = None) -> Run:
    """Return a run that is there, showing its latest turn, or `turn`."""
    return run_from_row(one(execute(db, "run_at_turn", (key, turn)).fetchone()))


def run_from_row(row: tuple[Any, ...]) -> Run:
    """Return the run of a row: ten columns of the run, fourteen of the turn, and the question."""
    turn = Turn(
        number=row[10],
        status=STATUSES[row[11]],
        mode=MODES[row[12]],
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
        ready=bool(row[23]),
    )
    question = None if row[24] is None else _decode_question(row[24])
    return Run(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], turn, row[8], row[9], question=question)


def question_value(question: Question | None) -> bytes | None:
    """Return a question as its column holds it."""
    return None if question is None else _encode(question)


def requested(db: apsw.Connection, organization: str, request: Request | None) -> Change | None:
    """Return what an earlier request of the same id gave, None where there is none. Raises RequestIdReused."""
    if request is None:
        return None
    found = execute(db, "requested_turn", (organization, request.id)).fetchone()
    if found is None:
        return None
    key, turn, fingerprint = found
    return replayed(request, fingerprint, run_at_turn(db, key, turn))


def replayed(request: Request, fingerprint: bytes | None, run: Run) -> Change:
    """Return the answer to a request whose id is that of an earlier one, which had `fingerprint` and showed `run`.

    Raises RequestIdReused unless they are the same.
    """
    if fingerprint is not None and fingerprint != request.fingerprint:
        raise RequestIdReused(request.id)
    return Change(run, replayed=True)


def one(row: tuple[Any, ...] | None) -> tuple[Any, ...]:
    assert row is not None, "what was found in this transaction is there"
    return row


def list_runs(
    db: apsw.Connection,
    organization: str,
    server_id: str,
    status: RunStatus | None,
    token: str | None,
    limit: int,
    limit_characters: int,
) -> RunPage:
    """Return a page of runs, newest first. Raises InvalidRequest for a token that is not ours."""
    before = 2**63 - 1
    if token is not None:
        key = execute(db, "run_key", (token, organization, server_id)).get
        if key is None:
            raise InvalidRequest("page_token", "is not a token that an earlier page gave")
        before = int(key)
    bindings = (organization, server_id, before, limit + 1)
    rows = list(db.execute(QUERIES["list_runs"] if status is None else _LIST_BY_STATUS[status], bindings))
    runs: list[Run] = []
    size = 0
    for row in rows[:limit]:
        run = run_from_row(row)
        size += len(run.turn.input) + len(run.turn.output or "") + len(run.turn.metadata or b"")
        size += len(run.thread_metadata or b"") + len(run.turn.error or "") + 2 * len(run.title or "")
        if size > limit_characters and runs:
            break
        runs.append(run)
    return RunPage(runs, runs[-1].id if len(rows) > len(runs) else None)


def read_events(db: apsw.Connection, run_id: str, after: int, limit: int, limit_bytes: int) -> list[RunEvent]:
    """Return the events after a sequence, at least one where there is one."""
    events: list[RunEvent] = []
    size = 0
    for sequence, turn, role, content, at, log_type, level, metadata in execute(
        db, "events_after", (run_id, after, limit)
    ):
        size += len(content) if content.isascii() else len(content.encode())
        size += len(metadata) if metadata else 0
        if size > limit_bytes and events:
            break
        events.append(RunEvent(sequence, turn, ROLES[role], content, at, log_type, LEVELS[level], metadata))
    return events


def latest_log(db: apsw.Connection, run_id: str, log_type: str, after: int) -> RunEvent | None:
    """Return the newest event of a type behind a sequence."""
    row = execute(db, "latest_log", (run_id, log_type, after)).fetchone()
    if row is None:
        return None
    sequence, turn, role, content, at, _, level, metadata = row
    return RunEvent(sequence, turn, ROLES[role], content, at, log_type, LEVELS[level], metadata)
