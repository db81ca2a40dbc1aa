"""The rarer writes of the embedded store, each a function of the connection inside a transaction.

Each raises an exception of its own only before it has changed anything (see `group_commit`), and expects the file
to be up to date: what `RunningTurns` had to write is written out.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile

import apsw
from msgspec.structs import astuple, replace

from runtime_service.errors import QuestionAnswered
from runtime_service.runs import (
    TERMINAL,
    EventDraft,
    EventRole,
    LogLevel,
    Question,
    Run,
    RunEvent,
    RunStatus,
    Turn,
    now_ms,
)
from runtime_service.store.base import (
    ATTEMPT_BEGINS,
    Cancel,
    Change,
    NewAnswer,
    NewTurn,
    Outcome,
    QuestionOpen,
    Request,
    TurnKey,
    TurnLost,
    count_messages,
    incomplete_event,
    log_event,
    place_events,
    runtime_lost,
    user_event,
)
from runtime_service.store.sqlite_rows import (
    QUERIES,
    execute,
    question_value,
    requested,
    run_at_turn,
    run_from_row,
    run_key,
)


def continue_run(db: apsw.Connection, new: NewTurn, claim: bool) -> Change:
    """Store the next turn of a run. Raises RunNotFound, RequestIdReused, QuestionOpen, QuestionAnswered."""
    if (known := requested(db, new.organization, new.request)) is not None:
        return known
    key = run_key(db, new.organization, new.server_id, new.run_id)
    run = run_at_turn(db, key)
    if (question := run.question) is not None:
        if question.is_open:
            raise QuestionOpen(question)
        if question.option(new.input) is not None:
            raise QuestionAnswered
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
    execute(db, "insert_turn", (key, *astuple(turn)))
    _insert_events(db, key, events)
    _note_request(db, new.request, run, turn.number, new.created_at_ms)
    return Change(run_at_turn(db, key), events)


def ask_question(
    db: apsw.Connection, key: TurnKey, events: Sequence[EventDraft], options: Sequence[tuple[str, str]]
) -> Change:
    """Append to the log of a running turn; the last event asks what the run asks from now on. Raises TurnLost."""
    row_key, run = _running_turn(db, key)
    if any(event.role is EventRole.ASSISTANT for event in events):
        execute(db, "forget_draft", (row_key, key.turn))
    question = Question(run.last_sequence + len(events), options=tuple(options))
    return _write_behind(db, row_key, run, key.turn, events, now_ms(), question)


def answer_question(db: apsw.Connection, answer: NewAnswer) -> Change:
    """Append an answer, and close the question. Raises RunNotFound, RequestIdReused, QuestionAnswered."""
    if (known := requested(db, answer.organization, answer.request)) is not None:
        return known
    key = run_key(db, answer.organization, answer.server_id, answer.run_id)
    run = run_at_turn(db, key)
    question = run.question
    if question is None or not question.is_open or question.sequence != answer.sequence:
        raise QuestionAnswered
    asking = _open_turns(db, key)[0]
    closed = replace(question, is_open=False)
    change = _write_behind(db, key, run, asking, [answer.event], now_ms(), closed)
    _note_request(db, answer.request, run, asking, answer.event.created_at_ms)
    return change


def save_draft(db: apsw.Connection, key: TurnKey, text: str) -> None:
    """Keep a draft."""
    execute(db, "save_draft", (*key, text))


def release_turn(db: apsw.Connection, key: TurnKey, events: Sequence[EventDraft]) -> Change:
    """Queue a running turn again. Raises TurnLost."""
    row_key, run = _running_turn(db, key)
    execute(db, "requeue_turn", (row_key, key.turn, max(run.turn.attempt - 1, 0)))
    return _write_behind(db, row_key, run, key.turn, events, now_ms())


def _running_turn(db: apsw.Connection, key: TurnKey) -> tuple[int, Run]:
    """Return the run's internal key, and the run showing the running turn that `key` holds. Raises TurnLost."""
    row = execute(db, "running_turn", key).fetchone()
    if row is None:
        raise TurnLost
    return row[25], run_from_row(row)


def cancel_run(db: apsw.Connection, cancel: Cancel, events: Sequence[EventDraft], output: str | None) -> Change:
    """Settle the open turns of a run as cancelled. Raises RunNotFound, RequestIdReused."""
    if (known := requested(db, cancel.organization, cancel.request)) is not None:
        return known
    key = run_key(db, cancel.organization, cancel.server_id, cancel.run_id)
    run = run_at_turn(db, key)
    at = now_ms()
    _note_request(db, cancel.request, run, run.last_turn, at)
    if run.status in TERMINAL:
        return Change(run)
    # The earliest open turn is the one that may be running; the rest of the log belongs to it.
    numbers = _open_turns(db, key)
    if not events and (draft := execute(db, "draft", (key, numbers[0])).get):
        events, output = [incomplete_event(draft)], draft
    drafts = [*events, log_event("cancelled", LogLevel.WARN, "The run was cancelled.")]
    for number in numbers:
        execute(db, "take_turn_away", (key, number))
        said = output if number == numbers[0] else None
        _settle_turn(db, key, number, Outcome(RunStatus.CANCELLED, output=said), at)
    change = _write_behind(db, key, run, numbers[0], drafts, at)
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
            [log_event("attempt", LogLevel.WARN, ATTEMPT_BEGINS.format(attempt=run.turn.attempt))]
            if run.turn.epoch > 1
            else []
        )
        changes.append(_write_behind(db, key, run, number, events, now_ms()))
    return changes


def recover(
    db: apsw.Connection,
    left: Collection[tuple[int, int, int]],
    max_attempts: int,
    may_repeat: Callable[[str], bool],
) -> list[Change]:
    """Settle or queue again those of the turns `left` (run key, number, epoch) that are running still."""
    changes = []
    for key, number, epoch in list(execute(db, "running_turns", ())):
        if (key, number, epoch) not in left:
            continue
        run = run_at_turn(db, key, number)
        draft = execute(db, "draft", (key, number)).get
        events = [incomplete_event(draft)] if draft else []
        at = now_ms()
        if may_repeat(run.server_id) and run.turn.attempt < max_attempts:
            execute(db, "requeue_turn", (key, number, run.turn.attempt))
        else:
            outcome = runtime_lost(run.turn.attempt, draft)
            events.append(log_event("runtime_lost", LogLevel.ERROR, outcome.error or ""))
            _settle_turn(db, key, number, outcome, at)
            execute(db, "make_ready", (key, number + 1))
        changes.append(_write_behind(db, key, run, number, events, at))
    return changes


def _write_behind(
    db: apsw.Connection,
    key: int,
    run: Run,
    number: int,
    drafts: Sequence[EventDraft],
    at: int,
    question: Question | None = None,
) -> Change:
    """Append events of turn `number` to the log as `run` shows it, and give the run its status and its question."""
    placed = place_events(drafts, number, run.last_sequence + len(drafts))
    _insert_events(db, key, placed)
    message_count = run.message_count + count_messages(drafts)
    execute(db, "set_run", (key, run.last_sequence + len(drafts), message_count, at, question_value(question)))
    return Change(run_at_turn(db, key, number), placed)


def _settle_turn(db: apsw.Connection, key: int, number: int, outcome: Outcome, at: int) -> None:
    execute(db, "settle_turn", (key, number, outcome.status, outcome.output, outcome.error, outcome.error_code, at))


def _note_request(db: apsw.Connection, request: Request | None, run: Run, number: int, at: int) -> None:
    """Store by what a request is known, and the turn that its answer shows."""
    if request is not None:
        execute(db, "insert_request", (run.organization, request.id, request.fingerprint, run.id, number, at))


def _insert_events(db: apsw.Connection, key: int, events: Sequence[RunEvent]) -> None:
    if events:
        db.executemany(QUERIES["insert_event"], [(key, *astuple(event)) for event in events])
