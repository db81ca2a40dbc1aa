"""The writes of the embedded store, each a function of the connection inside a transaction.

Each raises an exception of its own only before it has changed anything (see `group_commit`).
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import apsw

from runtime_service.runs import (
    TERMINAL,
    EventDraft,
    EventRole,
    LogLevel,
    Run,
    RunEvent,
    RunStatus,
    Turn,
    now_ms,
)
from runtime_service.store.base import (
    Change,
    NewRun,
    NewTurn,
    Outcome,
    TurnKey,
    TurnLost,
    accepted_run,
    count_messages,
    incomplete_event,
    log_event,
    place_events,
    user_event,
)
from runtime_service.store.sqlite_rows import QUERIES, execute, one, run_at_turn, run_from_row, run_key


def start_run(db: apsw.Connection, new: NewRun, claim: bool) -> Change:
    """Store a run with its first turn and its user event."""
    run = accepted_run(new, claim=claim)
    execute(
        db,
        "insert_run",
        (new.id, new.organization, new.server_id, new.title, new.metadata, new.created_at_ms, run.status),
    )
    key = db.last_insert_rowid()
    events = place_events([user_event(new)], 1, 1)
    _insert_turn(db, key, run.turn)
    _insert_events(db, key, events)
    return Change(run, events)


def continue_run(db: apsw.Connection, new: NewTurn, claim: bool) -> Change:
    """Store the next turn of a run. Raises RunNotFound."""
    key = run_key(db, new.organization, new.server_id, new.run_id)
    run = run_at_turn(db, key)
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
        ready=run.status in TERMINAL,
    )
    events = place_events([user_event(new)], turn.number, turn.first_sequence)
    execute(db, "open_next_turn", (key, new.created_at_ms, turn.status))
    _insert_turn(db, key, turn)
    _insert_events(db, key, events)
    return Change(run_at_turn(db, key), events)


def append_events(db: apsw.Connection, key: TurnKey, events: Sequence[EventDraft]) -> Change:
    """Append to the log of a running turn. Raises TurnLost."""
    row = _extend_log(db, "extend_log", key, events, now_ms())
    if any(event.role is EventRole.ASSISTANT for event in events):
        execute(db, "forget_draft", (row[10], key.turn))
    turn = execute(db, "turn", (row[10], key.turn)).fetchone()
    return Change(run_from_row((*row[:10], *one(turn))), _place(db, row, key, events))


def save_draft(db: apsw.Connection, key: TurnKey, text: str) -> None:
    """Keep a draft."""
    execute(db, "save_draft", (*key, text))


def finish_turn(db: apsw.Connection, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome) -> Change:
    """Append the last events and settle the turn. Raises TurnLost."""
    at = now_ms()
    row = _extend_log(db, "extend_log_and_settle", key, events, at, outcome.status)
    turn = _settle_turn(db, row[10], key.turn, outcome, at)
    if row[7] > key.turn:
        execute(db, "make_ready", (row[10], key.turn + 1))
    return Change(run_from_row((*row[:10], *turn)), _place(db, row, key, events))


def release_turn(db: apsw.Connection, key: TurnKey, events: Sequence[EventDraft]) -> Change:
    """Queue a running turn again. Raises TurnLost."""
    row = _extend_log(db, "extend_log_and_settle", key, events, now_ms(), RunStatus.QUEUED)
    attempt = run_at_turn(db, row[10], key.turn).turn.attempt
    execute(db, "requeue_turn", (row[10], key.turn, max(attempt - 1, 0)))
    placed = _place(db, row, key, events)
    return Change(run_at_turn(db, row[10], key.turn), placed)


def cancel_run(db: apsw.Connection, key: int, events: Sequence[EventDraft], output: str | None) -> Change:
    """Settle the open turns of a run as cancelled."""
    run = run_at_turn(db, key)
    if run.status in TERMINAL:
        return Change(run)
    at = now_ms()
    # The earliest open turn is the one that may be running; the rest of the log belongs to it.
    numbers = _open_turns(db, key)
    drafts = [*events, log_event("cancelled", LogLevel.WARN, "The run was cancelled.")]
    for number in numbers:
        execute(db, "take_turn_away", (key, number))
        said = output if number == numbers[0] else None
        _settle_turn(db, key, number, Outcome(RunStatus.CANCELLED, output=said), at)
    change = _write_behind(db, key, run, numbers[0], drafts, RunStatus.CANCELLED, at)
    return Change(run_at_turn(db, key), change.events)


def _open_turns(db: apsw.Connection, key: int) -> list[int]:
    turns = execute(db, "turns_of_run", (key,))
    return [number for number, _ in takewhile(lambda turn: turn[1] not in TERMINAL, turns)][::-1]


def claim_turns(db: apsw.Connection, limit: int) -> list[Change]:
    """Claim queued turns, oldest first."""
    changes = []
    for key, number in list(execute(db, "claimable_turns", (limit,))):
        execute(db, "claim_turn", (key, number))
        run = run_at_turn(db, key, number)
        events = (
            [log_event("attempt", LogLevel.WARN, f"Attempt {run.turn.attempt} begins: the one before was lost.")]
            if run.turn.attempt > 1
            else []
        )
        status = RunStatus.RUNNING if number == run.last_turn else run_at_turn(db, key).status
        changes.append(_write_behind(db, key, run, number, events, status, now_ms()))
    return changes


def recover(db: apsw.Connection, max_attempts: int, may_repeat: Callable[[str], bool]) -> list[Change]:
    """Settle or queue again what a lost runtime left running."""
    changes = []
    for key, number in list(execute(db, "running_turns", ())):
        run = run_at_turn(db, key, number)
        draft = execute(db, "draft", (key, number)).get
        events = [incomplete_event(draft)] if draft else []
        at = now_ms()
        if may_repeat(run.server_id) and run.turn.attempt < max_attempts:
            execute(db, "requeue_turn", (key, number, run.turn.attempt))
            status = RunStatus.QUEUED
        else:
            error = (
                f"The runtime was lost while it executed this turn (attempt {run.turn.attempt}), and the turn "
                "is not begun again. Send the input once more to try again."
            )
            events.append(log_event("runtime_lost", LogLevel.ERROR, error))
            status = RunStatus.FAILED
            _settle_turn(db, key, number, Outcome(status, draft, error, "RUNTIME_LOST"), at)
            execute(db, "make_ready", (key, number + 1))
        if number != run.last_turn:
            status = run_at_turn(db, key).status
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
    execute(
        db,
        "set_run",
        (key, run.last_sequence + len(drafts), run.message_count + count_messages(drafts), at, status),
    )
    return Change(run_at_turn(db, key, number), placed)


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
    row: tuple[Any, ...] | None = execute(db, query, bindings).fetchone()
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


def _settle_turn(db: apsw.Connection, key: int, number: int, outcome: Outcome, at: int) -> tuple[Any, ...]:
    bindings = (key, number, outcome.status, outcome.output, outcome.error, outcome.error_code, at)
    return one(execute(db, "settle_turn", bindings).fetchone())


def _insert_turn(db: apsw.Connection, key: int, turn: Turn) -> None:
    execute(
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
            turn.ready,
        ),
    )


def _insert_events(db: apsw.Connection, key: int, events: Sequence[RunEvent]) -> None:
    if events:
        db.executemany(
            QUERIES["insert_event"],
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
