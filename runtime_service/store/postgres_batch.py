"""A batch of writes to PostgreSQL: what goes into one call of `acp.apply`, and what its answer means for each.

A short run is accepted, extended and settled within one batch more often than not. So the writes to a new run or to a
running turn are folded: one row says what all of them leave. The database gives the sequences; what each write did is
worked out from where its row ended. Every other write stands alone, behind those.

Knows the functions of `sql/postgres/`, but no connection.
"""

from typing import Any

import msgspec
from msgspec.structs import replace

from runtime_service.runs import EventDraft, EventRole, Question, Run, RunStatus, Turn, now_ms
from runtime_service.store.base import Change, Outcome, TurnKey, count_messages, place_events
from runtime_service.store.postgres_writes import Asked, Done, Extend, Other, SaveDraft, Start

_MAX_ROWS = 1_000
_MAX_CHARACTERS = 4 << 20
_RUNNING = RunStatus.RUNNING  # named once: in Python 3.11 the name of an enumeration's member is a call


class Held(msgspec.Struct, frozen=True):
    """A turn that this process executes, as its run was last seen; `has_draft` says whether one is stored."""

    run: Run
    has_draft: bool = False

    @property
    def key(self) -> TurnKey:
        """The key under which it may be written to."""
        return TurnKey(self.run.id, self.run.turn.number, self.run.turn.epoch)


class Extended(msgspec.Struct, frozen=True, array_like=True):
    """What came of the turn `n` of a batch: the run as it is behind it, and the question that it had before."""

    n: int
    last_sequence: int
    message_count: int
    last_turn: int
    question: Question | None = None


class Reply(msgspec.Struct, frozen=True):
    """The answer of `acp.apply`."""

    lost: bool = False
    starts: list[Done] = []
    turns: list[Extended] = []
    others: list[Done] = []


class _StartRow(msgspec.Struct):
    n: int
    run: Run
    log: list[EventDraft]
    request: str | None
    draft: str | None


class _TurnRow(msgspec.Struct, omit_defaults=True):
    n: int
    id: str
    number: int
    epoch: int
    log: list[EventDraft]
    messages: int
    at: int | None = None
    outcome: Outcome | None = None
    redraft: bool = False
    draft: str | None = None


class _RequestRow(msgspec.Struct, omit_defaults=True):
    organization: str
    id: str
    fingerprint: bytes
    created_at_ms: int
    n: int | None = None


class _Document(msgspec.Struct, omit_defaults=True):
    """What `acp.apply` is asked; see 0002_turns.sql."""

    requests: list[_RequestRow] = []
    lock: list[str] = []
    starts: list[_StartRow] = []
    turns: list[_TurnRow] = []
    others: list[dict[str, Any]] = []


class _Step(msgspec.Struct, frozen=True):
    """What one write adds to a row, and the turn as it leaves it."""

    asked: Start | Extend
    turn: Turn
    at: int
    events: tuple[EventDraft, ...]
    messages: int


class _Row:
    """A new run or a running turn, and the writes that are folded into it."""

    def __init__(self, run: Run, start: Start | None, *, has_draft: bool) -> None:
        self.key = TurnKey(run.id, run.turn.number, run.turn.epoch)
        self.run = run
        self.start = start
        self.turn = run.turn  # as the last step leaves it
        self.log: list[EventDraft] = []
        self.messages = 0
        self.has_draft = has_draft
        self._at: int | None = None
        self._outcome: Outcome | None = None
        self._draft: str | None = None
        self._redraft = False
        self._steps: list[_Step] = []
        self._drafts: list[SaveDraft] = []
        if start is not None:
            self._add(start, run.turn, run.created_at_ms, (start.event,))

    def add(self, asked: Extend | SaveDraft) -> None:
        """Fold a write into the row; where the turn is not its caller's, it is told so."""
        if asked.key != self.key or self.turn.status is not _RUNNING:
            asked.lose()
        elif isinstance(asked, SaveDraft):
            self.has_draft = self._redraft = True
            self._draft = asked.text
            self._drafts.append(asked)
        else:
            self._extend(asked)

    def _extend(self, asked: Extend) -> None:
        at = now_ms()
        turn = self.turn
        if (outcome := asked.outcome) is not None:
            self._outcome = outcome
            turn = replace(
                turn,
                status=outcome.status,
                output=outcome.output,
                error=outcome.error,
                error_code=outcome.error_code,
                completed_at_ms=at,
            )
        if self.has_draft and any(event.role is EventRole.ASSISTANT for event in asked.events):
            self.has_draft, self._redraft, self._draft = False, True, None
        self._add(asked, turn, at, tuple(asked.events))

    def _add(self, asked: Start | Extend, turn: Turn, at: int, events: tuple[EventDraft, ...]) -> None:
        messages = count_messages(events)
        self._steps.append(_Step(asked, turn, at, events, messages))
        self.turn = turn
        self._at = at
        self.log += events
        self.messages += messages

    def beginning(self, n: int) -> _StartRow:
        """The row of a run that is new, as the steps leave it."""
        assert self.start is not None
        run = replace(
            self.run,
            last_sequence=len(self.log),
            message_count=self.messages,
            updated_at_ms=self._at or self.run.updated_at_ms,
            turn=self.turn,
        )
        known_by = self.start.new.request
        draft = self._draft if self.turn.status is _RUNNING else None
        return _StartRow(n, run, self.log, None if known_by is None else known_by.id, draft)

    def extension(self, n: int) -> _TurnRow:
        """The row of a turn that is there."""
        run_id, number, epoch = self.key
        return _TurnRow(
            n, run_id, number, epoch, self.log, self.messages, self._at, self._outcome, self._redraft, self._draft
        )

    def tell(self, end: Extended) -> Held | None:
        """Tell each write what it did; return the turn as it is held from now on, None when it is settled."""
        sequence = end.last_sequence - len(self.log)
        messages = end.message_count - self.messages
        run = self.run
        for step in self._steps:
            sequence += len(step.events)
            messages += step.messages
            run = replace(
                run,
                last_sequence=sequence,
                message_count=messages,
                updated_at_ms=step.at,
                last_turn=end.last_turn,
                turn=step.turn,
                question=end.question if step.turn.status is _RUNNING else None,
            )
            step.asked.tell(Change(run, place_events(step.events, step.turn.number, sequence)))
        for asked in self._drafts:
            asked.tell(None)
        return Held(run, self.has_draft) if self.turn.status is _RUNNING else None

    def lose(self) -> None:
        """Tell those who extend the turn that it is lost."""
        for step in self._steps:
            if isinstance(step.asked, Extend):
                step.asked.lose()
        for asked in self._drafts:
            asked.lose()


class Batch:
    """Writes that share a transaction. `held`: the turns that this process holds, by their runs; kept up to date.

    `is_in_doubt`: it was sent, and nobody knows whether it was applied.
    """

    def __init__(self, held: dict[str, Held]) -> None:
        self.asked: list[Asked[Any]] = []
        self.is_in_doubt = False
        self._held = held
        self._rows: dict[str, _Row] = {}
        self._others: list[Other[Any]] = []
        self._run_ids: set[str] = set()  # of the runs that stand-alone writes name
        self._requests: set[tuple[str, str]] = set()
        self._size = self._characters = 0

    def add(self, asked: Asked[Any]) -> bool:
        """Take a write, or return False where the batch is full, or where it has to come behind the batch."""
        full = self._size + asked.rows > _MAX_ROWS or self._characters + asked.characters > _MAX_CHARACTERS
        if (full and self.asked) or asked.request in self._requests or not self._fold(asked):
            return False
        self.asked.append(asked)
        self._size += asked.rows
        self._characters += asked.characters
        if asked.request is not None:
            self._requests.add(asked.request)
        return True

    def _fold(self, asked: Asked[Any]) -> bool:
        match asked:
            case Start():
                run_id = asked.run.id
                if run_id in self._rows or run_id in self._run_ids:
                    return False
                self._rows[run_id] = _Row(asked.run, asked, has_draft=False)
            case Extend() | SaveDraft():
                run_id = asked.key.run_id
                row = self._rows.get(run_id)
                if run_id in self._run_ids or (row is not None and row.start is not None and run_id in self._held):
                    return False  # of a start that comes again: what is held is none of its own
                if (row := row or self._held_row(asked.key)) is None:
                    asked.lose()
                else:
                    row.add(asked)
            case Other():
                self._others.append(asked)
                if asked.run_id is not None:
                    self._run_ids.add(asked.run_id)
        return True

    def _held_row(self, key: TurnKey) -> _Row | None:
        held = self._held.get(key.run_id)
        if held is None or held.key != key:
            return None
        row = self._rows[key.run_id] = _Row(held.run, None, has_draft=held.has_draft)
        return row

    def encode(self) -> str:
        """Return what `acp.apply` is asked. Raises UnicodeEncodeError for a text that cannot be stored."""
        document = _Document([], list(self._run_ids), [], [], [other.arguments for other in self._others])
        for row in self._rows.values():
            if (start := row.start) is None:
                document.lock.append(row.run.id)
                document.turns.append(row.extension(len(document.turns)))
                continue
            n = len(document.starts)
            document.starts.append(row.beginning(n))
            new = start.new
            if (known_by := new.request) is not None:
                document.requests.append(
                    _RequestRow(new.organization, known_by.id, known_by.fingerprint, new.created_at_ms, n)
                )
        document.requests += [
            _RequestRow(**other.arguments["request"], created_at_ms=other.arguments["at"])
            for other in self._others
            if "request" in other.arguments
        ]
        return msgspec.json.encode(document).decode()

    def settle(self, reply: Reply, own: str) -> None:
        """Tell each write what it did; `own` is the id of the replica that wrote."""
        instead = {done.n: done for done in reply.starts}
        ends = {end.n: end for end in reply.turns}
        starts = turns = 0
        for run_id, row in self._rows.items():
            held = None
            if row.start is None:
                if (end := ends.get(turns)) is None:
                    row.lose()
                else:
                    held = row.tell(end)
                turns += 1
            else:
                done = instead.get(starts)
                starts += 1
                if done is not None:
                    row.start.tell_other(done, own)
                    row.lose()
                    continue  # what is there in its place may be held
                held = row.tell(Extended(starts - 1, len(row.log), row.messages, 1))
            if held is None:
                self._held.pop(run_id, None)
            else:
                self._held[run_id] = held
        for other, done in zip(self._others, reply.others, strict=True):
            self._settle_other(other, done, own)

    def _settle_other(self, other: Other[Any], done: Done, own: str) -> None:
        changes = done.changes(own)
        if not done.replayed:
            for run in [change.run for change in changes]:
                if other.claims and run.status is _RUNNING:
                    self._held[run.id] = Held(run)
                elif not (other.claims or other.keeps) and other.run_id is not None:
                    self._held.pop(run.id, None)
        other.tell_done(done, changes)
