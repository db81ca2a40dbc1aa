"""The writes that may be asked of PostgreSQL, each with whoever waits for it.

Those to new runs and running turns are plain values, which a batch folds. The others name a function of
`sql/postgres/`, its arguments, and how its answer is read. Knows neither batches nor connections.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from runtime_service.errors import QuestionAnswered, RequestIdReused, RunNotFound, StoreUnavailable
from runtime_service.runs import EventDraft, LogLevel, Question, Run, now_ms
from runtime_service.store.base import (
    ATTEMPT_BEGINS,
    Cancel,
    Change,
    Deleted,
    NewAnswer,
    NewRun,
    NewTurn,
    Outcome,
    QuestionOpen,
    Request,
    TurnKey,
    TurnLost,
    accepted_run,
    incomplete_event,
    log_event,
    runtime_lost,
    user_event,
)
from runtime_service.store.postgres_rows import event_from_row, run_from_row

REFUSED = "The store does not take this write; nothing was changed."
ORPHANS_AT_ONCE = 100

_T = TypeVar("_T")


class Done(msgspec.Struct, frozen=True):
    """What came of a write that stands alone; of a start, its `n`, only what was there in its place."""

    n: int = 0
    shown: list[tuple[dict[str, Any], list[list[Any]]]] = []
    replayed: bool = False
    same: bool = True
    question: Question | None = None
    answered: bool = False
    lost: list[str] = []
    runs: int = 0
    turns: int = 0
    events: int = 0
    requests: int = 0
    after: int | None = None

    def changes(self, own: str) -> list[Change]:
        """Return what was changed, or what the earlier request of the same id changed; `own` is this replica's id."""
        return [
            Change(run_from_row(run, own), tuple([event_from_row(event) for event in events]), self.replayed)
            for run, events in self.shown
        ]


class Asked(Generic[_T]):
    """A write that was asked for.

    `is_patient`: it waits while the database is away. `is_repeatable`: it may be done once more when nobody knows
    whether it was done. `request`: its organization and the id under which it makes itself known.
    """

    is_patient = False
    is_repeatable = True
    rows = 2
    characters = 0
    request: tuple[str, str] | None = None

    def __init__(self) -> None:
        self.future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()

    @property
    def is_told(self) -> bool:
        """Whether it is known what came of it. Of one whose caller does not wait any more it is not."""
        return self.future.done() and not self.future.cancelled()

    def tell(self, result: _T) -> None:
        """Tell what it did. A caller that does not wait any more does not undo it."""
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Tell that it did nothing."""
        if not self.future.done():
            self.future.set_exception(error)


class Start(Asked[Change]):
    """A run to be accepted."""

    def __init__(self, new: NewRun, *, claim: bool) -> None:
        super().__init__()
        self.new = new
        self.run = accepted_run(new, claim=claim)
        self.event = user_event(new)
        self.characters = len(new.input)
        if new.request is not None:
            self.request = (new.organization, new.request.id)

    def tell_other(self, done: Done, own: str) -> None:
        """Tell what is there in its place: of a request that was known, or the run itself, written before."""
        if not done.shown:
            self.fail(StoreUnavailable(REFUSED))
        elif not done.same:
            self.fail(RequestIdReused(self.request[1] if self.request else ""))
        else:
            # Nothing was begun by this write: also of a run that is there, another one executes what is open.
            self.tell(msgspec.structs.replace(done.changes(own)[0], replayed=True))


class Extend(Asked[Change]):
    """Events for a running turn's log, and perhaps its outcome."""

    is_patient = True

    def __init__(self, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome | None = None) -> None:
        super().__init__()
        self.key = key
        self.events = events
        self.outcome = outcome
        self.rows = 1 + len(events)
        self.characters = sum([len(event.content) for event in events])
        if outcome is not None:
            self.characters += len(outcome.output or "")

    def lose(self) -> None:
        """Tell that the turn is not the writer's any more."""
        self.fail(TurnLost())


class SaveDraft(Asked[None]):
    """The text so far of the message in the making of a running turn."""

    is_patient = True
    rows = 1

    def __init__(self, key: TurnKey, text: str) -> None:
        super().__init__()
        self.key = key
        self.text = text
        self.characters = len(text)

    def lose(self) -> None:
        """Do nothing, as is promised of a turn that is not the writer's any more."""
        self.tell(None)


class Other(Asked[_T]):
    """A write that stands alone in a batch.

    `read` makes the result of what it changed. `claims`: running turns that it shows are held from then on. `keeps`: a
    turn that was held is held still.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        read: Callable[[Done, list[Change]], _T],
        *,
        request: tuple[str, Request] | None = None,
        missing: Exception | None = None,
        claims: bool = False,
        keeps: bool = False,
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.claims = claims
        self.keeps = keeps
        self._read = read
        self._missing = missing
        if request is not None:
            organization, asked = request
            self.request = (organization, asked.id)
            known_by = {"organization": organization, "id": asked.id, "fingerprint": asked.fingerprint}
            arguments["request" if arguments["write"] != "find_request" else "wanted"] = known_by

    @property
    def run_id(self) -> str | None:
        """The run that it writes to; None where the database finds that out."""
        run_id: str | None = self.arguments.get("id")
        return run_id

    def tell_done(self, done: Done, changes: list[Change]) -> None:
        """Tell what came of it."""
        if not done.same:
            self.fail(RequestIdReused(self.request[1] if self.request else ""))
        elif done.question is not None:
            self.fail(QuestionOpen(done.question))
        elif done.answered:
            self.fail(QuestionAnswered())
        elif self._missing is not None and not changes:
            # There was no such run, or there is none any more: it was deleted before the answer came.
            self.fail(self._missing)
        else:
            self.tell(self._read(done, changes))


def continue_run(new: NewTurn, *, claim: bool) -> Other[Change]:
    """Open the next turn of a run."""
    arguments = {
        "write": "continue_run",
        "id": _findable(new.run_id),
        "organization": new.organization,
        "server_id": new.server_id,
        "claim": claim,
        "mode": new.mode,
        "input": new.input,
        "blanks": len(new.input) - len(new.input.lstrip()),
        "characters": len(new.input.strip()),
        "at": new.created_at_ms,
        "log": [user_event(new)],
    }
    if new.metadata is not None:
        arguments["metadata"] = new.metadata
    asked = Other(arguments, _one, request=_known_by(new), missing=RunNotFound(new.run_id), claims=True)
    asked.characters = len(new.input)
    # Without an id it cannot be known again.
    asked.is_repeatable = new.request is not None
    return asked


def ask_question(key: TurnKey, events: Sequence[EventDraft], options: Sequence[tuple[str, str]]) -> Other[Change]:
    """Put events at the end of a running turn's log, the last of which asks a question."""
    arguments = _write_to_turn("ask_question", key, events)
    arguments["options"] = options
    asked = Other(arguments, _one, missing=TurnLost(), keeps=True)
    asked.is_patient = True
    return asked


def answer_question(answer: NewAnswer) -> Other[Change]:
    """Append the answer to the question of a run."""
    arguments = {
        "write": "answer_question",
        "id": _findable(answer.run_id),
        "organization": answer.organization,
        "server_id": answer.server_id,
        "sequence": answer.sequence,
        "at": answer.event.created_at_ms,
        "log": [answer.event],
    }
    asked = Other(arguments, _one, request=_known_by(answer), missing=RunNotFound(answer.run_id), keeps=True)
    asked.characters = len(answer.event.content)
    # Without an id it cannot be known again: one that was taken would be refused.
    asked.is_repeatable = answer.request is not None
    return asked


def release_turn(key: TurnKey, events: Sequence[EventDraft]) -> Other[Change]:
    """Give a running turn back to the queue."""
    asked = Other(_write_to_turn("release_turn", key, events), _one, missing=TurnLost())
    asked.is_patient = True
    return asked


def cancel_run(cancel: Cancel, events: Sequence[EventDraft], output: str | None) -> Other[Change]:
    """Settle every open turn of a run as cancelled."""
    arguments = {
        "write": "cancel_run",
        "id": _findable(cancel.run_id),
        "organization": cancel.organization,
        "server_id": cancel.server_id,
        "at": now_ms(),
        "log": [*events, log_event("cancelled", LogLevel.WARN, "The run was cancelled.")],
        "output": output,
    }
    if not events:
        arguments["incomplete"] = incomplete_event("")
    asked = Other(arguments, _one, request=_known_by(cancel), missing=RunNotFound(cancel.run_id))
    # Without an id it cannot be known again, and would end what came behind it.
    asked.is_repeatable = cancel.request is not None
    return asked


def claim_turns(limit: int) -> Other[list[Change]]:
    """Claim queued turns, oldest first."""
    arguments = {
        "write": "claim_turns",
        "limit": limit,
        "at": now_ms(),
        "again": log_event("attempt", LogLevel.WARN, ATTEMPT_BEGINS),
    }
    return Other(arguments, _all, claims=True)


def find_request(new: NewRun | NewTurn, request: Request) -> Other[Change | None]:
    """Find what an earlier request of the same id gave."""
    return Other({"write": "find_request"}, _first, request=(new.organization, request))


def find_orphans() -> Other[list[Change]]:
    """Find some of the turns that a lost process left running."""
    return Other({"write": "find_orphans", "limit": ORPHANS_AT_ONCE}, _all)


def requeue_orphan(run: Run) -> Other[Change | None]:
    """Queue again a turn that a lost process left running, unless somebody else has seen to it."""
    return Other(_orphan(run, []), _first)


def fail_orphan(run: Run) -> Other[Change | None]:
    """Fail a turn that a lost process left running, unless somebody else has seen to it."""
    outcome = runtime_lost(run.turn.attempt)
    arguments = _orphan(run, [log_event("runtime_lost", LogLevel.ERROR, outcome.error or "")])
    arguments["outcome"] = outcome
    return Other(arguments, _first)


def find_lost(held: Sequence[TurnKey]) -> Other[list[str]]:
    """Find which of the turns held are not any more, by the ids of their runs. Renews the lease, as each write does."""
    turns = [{"id": key.run_id, "number": key.turn, "epoch": key.epoch} for key in held]
    return Other({"write": "find_lost", "turns": turns}, lambda done, _: done.lost)


def delete_runs(before_ms: int, limit: int, after: int) -> Other[tuple[Deleted, int | None]]:
    """Delete runs behind the key `after`; the second result is the key to go on behind, None at the end."""
    return Other(
        {"write": "delete_runs", "before_ms": before_ms, "limit": limit, "after": after},
        lambda done, _: (Deleted(done.runs, done.turns, done.events), done.after),
    )


def delete_requests(before_ms: int, limit: int) -> Other[int]:
    """Forget the requests made before a time."""
    return Other({"write": "delete_requests", "before_ms": before_ms, "limit": limit}, lambda done, _: done.requests)


def _orphan(run: Run, log: list[EventDraft]) -> dict[str, Any]:
    return {
        "write": "settle_orphan",
        "id": run.id,
        "number": run.turn.number,
        "epoch": run.turn.epoch,
        "at": now_ms(),
        "log": log,
        "incomplete": incomplete_event(""),
    }


def _write_to_turn(write: str, key: TurnKey, events: Sequence[EventDraft]) -> dict[str, Any]:
    return {
        "write": write,
        "id": key.run_id,
        "number": key.turn,
        "epoch": key.epoch,
        "at": now_ms(),
        "log": events,
    }


def _findable(run_id: str) -> str:
    """Return a caller's name of a run as the database can look for it: no run has a NUL in its name."""
    return run_id.replace("\0", "?")


def _known_by(asked: NewTurn | Cancel | NewAnswer) -> tuple[str, Request] | None:
    return None if asked.request is None else (asked.organization, asked.request)


def _one(_: Done, changes: list[Change]) -> Change:
    (change,) = changes
    return change


def _first(_: Done, changes: list[Change]) -> Change | None:
    return changes[0] if changes else None


def _all(_: Done, changes: list[Change]) -> list[Change]:
    return changes
