"""What the runtime asks of a store of runs, and what a store promises. Knows no database.

Promises of every method that writes: when it returns, the change is durable; when it raises, nothing of it is
there; it goes on to its end when the caller's task is cancelled. Sequences are given here, in the transaction.

Several processes may share one store. What a process claims it holds, for as long as it renews that; another one's
turns are its own only once that one is lost. Each hears of what the others write by its `StoreListener`.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec

from runtime_service.runs import (
    EventDraft,
    EventRole,
    LogLevel,
    Question,
    Run,
    RunEvent,
    RunMode,
    RunStatus,
    Turn,
    now_ms,
)

# Named once: in Python 3.11 the name of an enumeration's member is a call.
_COUNTED = (EventRole.ASSISTANT, EventRole.USER)
_RUNNING, _QUEUED = RunStatus.RUNNING, RunStatus.QUEUED


class Request(msgspec.Struct, frozen=True):
    """By what a request is known when it comes again: its caller's name for it, and a digest of all that it asks for.

    One whose `id` the organization has used before changes nothing, and is answered as the earlier one; with another
    `fingerprint` it is refused. Kept for at least 24 hours.
    """

    id: str
    fingerprint: bytes


class NewRun(msgspec.Struct, frozen=True):
    """A run to be accepted, with the input of its first turn."""

    id: str
    organization: str
    server_id: str
    input: str
    mode: RunMode
    created_at_ms: int
    title: str | None = None
    metadata: bytes | None = None
    request: Request | None = None


class NewTurn(msgspec.Struct, frozen=True):
    """Input to a run that exists. Without metadata the turn takes the run's."""

    organization: str
    server_id: str
    run_id: str
    input: str
    mode: RunMode
    created_at_ms: int
    metadata: bytes | None = None
    request: Request | None = None


class Cancel(msgspec.Struct, frozen=True):
    """Asks for the end of a run's open turns."""

    organization: str
    server_id: str
    run_id: str
    request: Request | None = None


class NewAnswer(msgspec.Struct, frozen=True):
    """Answers the open question of a run, if that is still the one of `sequence`; `event` enters the log."""

    organization: str
    server_id: str
    run_id: str
    sequence: int
    event: EventDraft
    request: Request | None = None


class TurnKey(NamedTuple):
    """Names a turn as its executor holds it; writes under another epoch than the stored one are refused."""

    run_id: str
    turn: int
    epoch: int


class Outcome(msgspec.Struct, frozen=True):
    """How a turn ended; `error` and `error_code` are set exactly when it failed."""

    status: RunStatus
    output: str | None = None
    error: str | None = None
    error_code: str | None = None


class Change(msgspec.Struct, frozen=True):
    """What a write did: the run as it is now, showing the turn written to, and the events it added.

    `replayed`: it did nothing, as the request had been accepted before; the run shows the turn that it opened.
    """

    run: Run
    events: tuple[RunEvent, ...] = ()
    replayed: bool = False


class TurnLost(Exception):
    """The turn is no longer the writer's: it was settled or claimed by somebody else. Nothing was written."""


class QuestionOpen(Exception):
    """Input came to a run that waits for an answer: it is one, perhaps. Nothing was written."""

    def __init__(self, question: Question) -> None:
        super().__init__(f"question {question.sequence} is open")
        self.question = question


class RunPage(msgspec.Struct, frozen=True):
    """Some runs, newest first; `next_token` is None on the last page."""

    runs: list[Run]
    next_token: str | None


class Deleted(NamedTuple):
    """How much was deleted."""

    runs: int
    turns: int
    events: int


class StoreListener(Protocol):
    """Who is told what other processes do to the store. Told too often does no harm; now and then it is late."""

    def runs_changed(self, run_ids: Sequence[str]) -> None:
        """Another process wrote to these runs; to any, where none is named."""

    def turns_wait(self) -> None:
        """A turn waits that may be claimed."""

    def held_lost(self) -> None:
        """All that this process held is lost: it did not renew in time. What it claims from now on it holds."""


class RunStore(Protocol):
    """Runs, turns and events; see the module's promises. Any method may raise StoreUnavailable."""

    @property
    def is_available(self) -> bool:
        """Whether the store can be used, as far as is known; one that cannot is tried again by itself."""

    def listen(self, listener: StoreListener) -> None:
        """Tell `listener` from now on."""

    def renew(self) -> Awaitable[None]:
        """Hold for another lease what is held. To be asked for several times a lease, also while all is quiet."""

    def start_run(self, new: NewRun, *, claim: bool) -> Awaitable[Change]:
        """Accept a run: its turn 1 and its user event. With `claim` the turn is running at once, epoch 1.

        Raises RequestIdReused.
        """

    def continue_run(self, new: NewTurn, *, claim: bool) -> Awaitable[Change]:
        """Open the next turn. With `claim` it is running at once, unless an earlier turn is open.

        Raises RunNotFound, RequestIdReused; QuestionOpen when the run is asking; QuestionAnswered when the input names
        an option of a question that was closed, in a turn that is still running.
        """

    def ask_question(
        self, key: TurnKey, events: Sequence[EventDraft], options: Sequence[tuple[str, str]]
    ) -> Awaitable[Change]:
        """Put events at the end of the log, the last of which asks a question with these options (ids and names).

        The run has it as its open `question` until it is answered or its turn ends or is queued again. Raises TurnLost.
        """

    def answer_question(self, answer: NewAnswer) -> Awaitable[Change]:
        """Append the answer's event to the turn that asks, and close the question; the change's run shows that turn.

        Raises RunNotFound, RequestIdReused, and QuestionAnswered unless the question is open.
        """

    def append_events(self, key: TurnKey, events: Sequence[EventDraft]) -> Awaitable[Change]:
        """Put events at the end of the log; a message of the agent takes the place of the draft. Raises TurnLost."""

    def save_draft(self, key: TurnKey, text: str) -> Awaitable[None]:
        """Keep the text so far of the message in the making; does nothing when the turn is lost."""

    def finish_turn(self, key: TurnKey, events: Sequence[EventDraft], outcome: Outcome) -> Awaitable[Change]:
        """Append the last events and settle the turn, both or neither. Raises TurnLost."""

    def release_turn(self, key: TurnKey, events: Sequence[EventDraft]) -> Awaitable[Change]:
        """Give a running turn back to the queue, its attempt not counted. Raises TurnLost."""

    def cancel_run(self, cancel: Cancel, events: Sequence[EventDraft], output: str | None) -> Awaitable[Change]:
        """Settle every open turn as cancelled, after appending `events` to the earliest, whose output is `output`.

        Without events the draft that is stored becomes an `incomplete` event, and the output. The change's run shows
        the latest turn; it has no events when nothing was open. Raises RunNotFound, RequestIdReused.
        """

    def claim_turns(self, limit: int) -> Awaitable[list[Change]]:
        """Claim queued turns, oldest first, for the caller to execute; each change's run shows the claimed one.

        One that somebody else cancelled before this process knew of its claim is shown as cancelled.
        """

    def recover(self, max_attempts: int, may_repeat: Callable[[str], bool]) -> Awaitable[list[Change]]:
        """Settle the turns that a lost process left running: queued again, or failed as RUNTIME_LOST.

        `may_repeat` is asked with the server's id. The draft that was left becomes an `incomplete` event. To be asked
        for now and then; a process is lost when it has not renewed for the length of a lease.
        """

    def get_requested(self, new: NewRun | NewTurn) -> Awaitable[Change | None]:
        """Return what an earlier request of the same id gave, None where there is none. Raises RequestIdReused."""

    def delete_runs(self, before_ms: int, limit: int) -> Awaitable[Deleted]:
        """Delete runs that have no open turn and were last written to before a time, the earliest accepted first.

        One transaction of about `limit` rows at most, in which a row counts once more for each 4 KiB that it holds. A
        run goes at once and whole: nothing of it is found any more, and its requests are as unknown ones. Of a long run
        rows may be left behind, which are deleted, and counted, by the next calls. To be asked for again with the same
        time until nothing is counted: then no such run is left but what became one meanwhile, which is found later.
        """

    def delete_requests(self, before_ms: int, limit: int) -> Awaitable[int]:
        """Forget requests made before a time, at most `limit`; return how many, 0 when none is left."""

    async def count_queued(self) -> int:
        """Count the turns that wait."""

    async def get_run(self, organization: str, server_id: str, run_id: str, turn: int | None = None) -> Run:
        """Return a run showing its latest turn, or `turn`. Raises RunNotFound."""

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
        """Return a page of runs, newest first. Raises InvalidRequest for a token that is not ours.

        At most `limit`, and no more once what they hold passes `limit_characters`, but at least one.
        """

    async def read_events(self, run_id: str, after: int, limit: int, limit_bytes: int) -> list[RunEvent]:
        """Return the events after a sequence, in order, at least one where there is one.

        At most `limit`, and no more once their content passes `limit_bytes`.
        """

    async def read_messages(self, run_id: str, before_turn: int, limit: int) -> list[tuple[EventRole, str]]:
        """Return the newest `limit` user and assistant messages of the turns before, oldest first.

        Without answers to questions, which would stand there alone.
        """

    async def read_latest_log(self, run_id: str, log_type: str, after: int = 0) -> RunEvent | None:
        """Return the newest event of the run's log with this type, None where there is none behind a sequence.

        Reads the log from its end to that event, or to the sequence.
        """

    async def close(self) -> None:
        """Finish the writes that were asked for, then close."""


def count_messages(events: Sequence[EventDraft]) -> int:
    """Count those that a thread's message count counts."""
    return len([event for event in events if event.role in _COUNTED])


def place_events(events: Sequence[EventDraft], turn: int, last_sequence: int) -> tuple[RunEvent, ...]:
    """Give events their places, so that the last one has `last_sequence`."""
    first = last_sequence - len(events) + 1
    return tuple(
        [
            RunEvent(sequence, turn, e.role, e.content, e.created_at_ms, e.log_type, e.log_level, e.metadata)
            for sequence, e in enumerate(events, first)
        ]
    )


def user_event(new: NewRun | NewTurn) -> EventDraft:
    """Return the event by which the log holds the caller's input."""
    return EventDraft(EventRole.USER, new.input, new.created_at_ms, metadata=new.metadata)


def incomplete_event(text: str) -> EventDraft:
    """Return the event that keeps what an agent had said of a message that it never ended."""
    return EventDraft(EventRole.ASSISTANT, text, now_ms(), log_type="incomplete", log_level=LogLevel.WARN)


PERMISSION_REQUEST = "permission_request"
PERMISSION_RESPONSE = "permission_response"
"""The types of the events by which a question is asked, and answered by whomever."""

RETRY_SECONDS = 1.0
"""Who has to write, and finds the store away, asks again after so long."""

ATTEMPT_BEGINS = "Attempt {attempt} begins: the one before was broken off."
"""What the log says where a turn is begun again; one that was given back in order is not counted."""


def runtime_lost(attempt: int, said: str | None = None) -> Outcome:
    """Return the outcome of a turn that was lost with its runtime and is not begun again; `said` is its draft."""
    error = (
        f"The runtime was lost while it executed this turn (attempt {attempt}), and the turn is not begun again. "
        "Send the input once more to try again."
    )
    return Outcome(RunStatus.FAILED, said, error, "RUNTIME_LOST")


def log_event(log_type: str, level: LogLevel, content: str) -> EventDraft:
    """Return an entry of the execution log that the runtime itself makes."""
    return EventDraft(EventRole.EXECUTION_LOG, content, now_ms(), log_type=log_type, log_level=level)


def accepted_run(new: NewRun, *, claim: bool) -> Run:
    """Return the run that `start_run` stores."""
    turn = Turn(
        number=1,
        status=_RUNNING if claim else _QUEUED,
        mode=new.mode,
        input=new.input,
        first_sequence=1,
        created_at_ms=new.created_at_ms,
        metadata=new.metadata,
        attempt=int(claim),
        epoch=int(claim),
    )
    return Run(
        id=new.id,
        organization=new.organization,
        server_id=new.server_id,
        created_at_ms=new.created_at_ms,
        updated_at_ms=new.created_at_ms,
        message_count=1,
        last_sequence=1,
        last_turn=1,
        turn=turn,
        title=new.title,
        thread_metadata=new.metadata,
    )
