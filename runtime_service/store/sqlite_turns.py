"""The running turns of the embedded store, and what a transaction is about to write of them.

A short run is accepted, extended and settled within one transaction more often than not. So these writes change
rows in memory first: at the transaction's end each row is written once, in its last state, and all rows of a kind
by one statement. What is known of a turn stays known while it runs, so that the next write under its key need not
read it again; that is true to the file because nobody else writes to it. Every other write asks `write_out` to
come first and then `forget`s the runs that it touches.
"""

from collections.abc import Sequence

import apsw
from msgspec.structs import astuple, replace

from runtime_service.runs import EventDraft, EventRole, Run, RunEvent, RunStatus, Turn, now_ms
from runtime_service.store.base import (
    Change,
    NewRun,
    NewTurn,
    Outcome,
    Request,
    TurnKey,
    TurnLost,
    accepted_run,
    count_messages,
    place_events,
    user_event,
)
from runtime_service.store.sqlite_rows import QUERIES, execute, question_value, replayed, requested, run_from_row

_RUNNING = RunStatus.RUNNING  # named once: in Python 3.11 the name of an enumeration's member is a call
_COLUMNS = 9
_ROWS = 16
_INSERT_EVENTS = QUERIES["insert_event"].rstrip() + ", (?, ?, ?, ?, ?, ?, ?, ?, ?)" * (_ROWS - 1)
"""As `insert_event`, of `_ROWS` at once: a statement costs as much as the row itself."""


class _TurnRow:
    """A turn and its run as they are after the transaction; `stored` says whether the file has their rows."""

    __slots__ = ("changed", "has_draft", "key", "run", "stored")

    def __init__(self, key: int, run: Run, *, stored: bool, has_draft: bool) -> None:
        self.key = key
        self.run = run
        self.stored = stored
        self.has_draft = has_draft
        self.changed = False


class RunningTurns:
    """The writes to new runs and running turns, each inside a transaction that ends with `write_out`.

    Each raises an exception of its own only before it has changed anything, and writes nothing itself.
    """

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db
        self._known: dict[str, _TurnRow] = {}  # running turns by their run; settled ones until they are written
        self._new: list[_TurnRow] = []
        self._requests: dict[tuple[str, str], tuple[Request, _TurnRow]] = {}  # of new runs, by organization and id
        self._changed: list[_TurnRow] = []
        self._ready: list[tuple[int, int]] = []
        self._drafts_ended: list[tuple[int, int]] = []
        self._events: list[object] = []  # the values of their rows, one row behind the other
        self._last_key: int | None = None  # of a run; None: the file knows

    # Writes

    def start_run(self, new: NewRun, *, claim: bool) -> Change:
        """Add a run with its first turn and its user event. Raises RequestIdReused."""
        if (known := self.requested(new)) is not None:
            return known
        run = accepted_run(new, claim=claim)
        key: int = (execute(self._db, "last_run_key", ()).get if self._last_key is None else self._last_key) + 1
        self._last_key = key
        row = _TurnRow(key, run, stored=False, has_draft=False)
        self._new.append(row)
        if new.request is not None:
            self._requests[new.organization, new.request.id] = (new.request, row)
        if claim:
            self._known[run.id] = row
        events = place_events([user_event(new)], 1, 1)
        self._events += (key, *astuple(events[0]))
        return Change(run, events)

    def append_events(self, key: TurnKey, events: Sequence[EventDraft]) -> Change:
        """Append to the log of a running turn. Raises TurnLost."""
        row = self._row(key)
        placed = self._extend(row, events, now_ms(), row.run.turn)
        if row.has_draft and any(event.role is EventRole.ASSISTANT for event in events):
            row.has_draft = False
            self._drafts_ended.append((row.key, key.turn))
        return Change(row.run, placed)

    def finish_turn(self, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome) -> Change:
        """Append the last events and settle the turn. Raises TurnLost."""
        row = self._row(key)
        at = now_ms()
        turn = replace(
            row.run.turn,
            status=outcome.status,
            output=outcome.output,
            error=outcome.error,
            error_code=outcome.error_code,
            completed_at_ms=at,
        )
        placed = self._extend(row, events, at, turn)
        if row.run.last_turn > key.turn:
            self._ready.append((row.key, key.turn + 1))
        return Change(row.run, placed)

    def requested(self, new: NewRun | NewTurn) -> Change | None:
        """Return what an earlier request of the same id gave, None where there is none. Raises RequestIdReused.

        What this transaction is about to write of an older run is not in it yet.
        """
        if new.request is None:
            return None
        found = self._requests.get((new.organization, new.request.id))
        if found is None:
            return requested(self._db, new.organization, new.request)
        earlier, row = found
        return replayed(new.request, earlier.fingerprint, row.run)

    # The transaction

    def write_out(self) -> None:
        """Write what is not written yet."""
        if self._new:
            self._write_each("insert_run", [_run_values(row) for row in self._new])
            self._write_each("insert_turn", [(row.key, *astuple(row.run.turn)) for row in self._new])
            if self._requests:
                self._write_each("insert_request", [_request_values(*known) for known in self._requests.values()])
            for row in self._new:
                row.stored = True
                self._forget_settled(row)
            self._new.clear()
            self._requests.clear()
        if self._changed:
            self._write_changed()
        if self._events:
            self._write_events()

    def forget(self, run_id: str) -> None:
        """Know nothing of a run that is about to be written to by other means."""
        self._known.pop(run_id, None)

    def forget_all(self) -> None:
        """Drop what was not written out, and know nothing: the transaction is rolled back."""
        for rows in (
            self._known,
            self._new,
            self._requests,
            self._changed,
            self._ready,
            self._drafts_ended,
            self._events,
        ):
            rows.clear()
        self._last_key = None

    def draft_saved(self, run_id: str) -> None:
        """Learn that the running turn of a run has a draft in the file."""
        if (row := self._known.get(run_id)) is not None:
            row.has_draft = True

    def _row(self, key: TurnKey) -> _TurnRow:
        """Return the running turn that `key` holds. Raises TurnLost."""
        row = self._known.get(key.run_id)
        # Of a turn that is not known, nothing waits to be written.
        if row is None or row.run.turn.number != key.turn or row.run.turn.epoch != key.epoch:
            found = execute(self._db, "running_turn", key).fetchone()
            if found is None:
                raise TurnLost
            row = _TurnRow(found[25], run_from_row(found), stored=True, has_draft=bool(found[26]))
            self._known[key.run_id] = row
        elif row.run.status is not _RUNNING:
            raise TurnLost
        return row

    def _forget_settled(self, row: _TurnRow) -> None:
        if row.run.status is not _RUNNING:
            self._known.pop(row.run.id, None)

    def _extend(self, row: _TurnRow, drafts: Sequence[EventDraft], at: int, turn: Turn) -> tuple[RunEvent, ...]:
        """Add events to the log of a run, which shows `turn` from now on."""
        run = row.run
        last_sequence = run.last_sequence + len(drafts)
        events = place_events(drafts, turn.number, last_sequence)
        row.run = replace(
            run,
            last_sequence=last_sequence,
            message_count=run.message_count + count_messages(drafts),
            updated_at_ms=at,
            turn=turn,
            question=run.question if turn.status is _RUNNING else None,
        )
        for event in events:
            self._events += (row.key, *astuple(event))
        if row.stored and not row.changed:
            row.changed = True
            self._changed.append(row)
        return events

    def _write_changed(self) -> None:
        extended, settled = [], []
        for row in self._changed:
            row.changed = False
            run = row.run
            question = question_value(run.question)
            extended.append((row.key, run.last_sequence, run.message_count, run.updated_at_ms, question))
            if run.status is not _RUNNING:
                settled.append(row)
            self._forget_settled(row)
        self._changed.clear()
        self._write_each("extend_log", extended)
        if self._drafts_ended:
            self._write_each("forget_draft", self._drafts_ended)
            self._drafts_ended.clear()
        if settled:
            self._write_each("settle_turn", [_settled_values(row) for row in settled])
            self._write_each("settle_run", [(row.key, row.run.turn.number, row.run.status) for row in settled])
        if self._ready:
            self._write_each("make_ready", self._ready)
            self._ready.clear()

    def _write_events(self) -> None:
        values, self._events = self._events, []
        width = _ROWS * _COLUMNS
        end = len(values) - len(values) % width
        self._db.executemany(_INSERT_EVENTS, [values[at : at + width] for at in range(0, end, width)])
        self._write_each("insert_event", [values[at : at + _COLUMNS] for at in range(end, len(values), _COLUMNS)])

    def _write_each(self, query: str, rows: Sequence[Sequence[object]]) -> None:
        self._db.executemany(QUERIES[query], rows)


def _run_values(row: _TurnRow) -> tuple[object, ...]:
    run = row.run
    return (
        row.key,
        run.id,
        run.organization,
        run.server_id,
        run.title,
        run.thread_metadata,
        run.created_at_ms,
        run.updated_at_ms,
        run.message_count,
        run.last_sequence,
        run.last_turn,
        run.status,
    )


def _request_values(request: Request, row: _TurnRow) -> tuple[object, ...]:
    run = row.run
    return (run.organization, request.id, request.fingerprint, run.id, 1, run.created_at_ms)


def _settled_values(row: _TurnRow) -> tuple[object, ...]:
    turn = row.run.turn
    return (row.key, turn.number, turn.status, turn.output, turn.error, turn.error_code, turn.completed_at_ms)
