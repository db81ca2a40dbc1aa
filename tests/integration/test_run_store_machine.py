"""Any order of writes, crashes and reopenings against a simple model of what a RunStore promises."""

import asyncio
import contextlib
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from runtime_service.errors import QuestionAnswered
from runtime_service.runs import TERMINAL, Question, Run, RunStatus
from runtime_service.store.base import (
    Cancel,
    Change,
    Deleted,
    NewAnswer,
    NewRun,
    NewTurn,
    Outcome,
    QuestionOpen,
    TurnKey,
    TurnLost,
)
from tests.stores import KINDS
from tests.support import (
    OPTIONS,
    ORGANIZATION,
    SERVER,
    answer_to,
    cancel_of,
    contents,
    log_of,
    new_run,
    next_turn,
    question,
    said,
)

MAX_ATTEMPTS = 2
OUTCOMES = [Outcome(RunStatus.COMPLETED, "out"), Outcome(RunStatus.FAILED, None, "It broke.", "AGENT_FAILED")]
FOLLOWING: dict[RunStatus, frozenset[RunStatus]] = {
    # A queued turn fails without having run when its agent is gone; a running one is queued again when its
    # runtime was lost or drained.
    RunStatus.QUEUED: frozenset({RunStatus.RUNNING, RunStatus.FAILED, RunStatus.CANCELLED}),
    RunStatus.RUNNING: TERMINAL | {RunStatus.QUEUED},
}
"""Which status may follow which; none follows the others."""
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3), max_size=3)
PICK = st.integers(0, 1_000)

_T = TypeVar("_T")


@dataclass
class TurnModel:
    """A turn as it must be; `keys` are all under which it was ever held."""

    status: RunStatus
    attempt: int
    keys: list[TurnKey] = field(default_factory=list)
    draft: str | None = None
    settled: object = None

    def become(self, status: RunStatus) -> None:
        """Take another status, by the table only."""
        assert status in FOLLOWING[self.status]
        self.status = status


@dataclass
class RunModel:
    """A run as it must be."""

    new: NewRun
    turns: list[TurnModel]
    log: list[tuple[int, str]]
    asked: list[tuple[NewRun | NewTurn | Cancel | NewAnswer, int]]
    """The requests that were accepted, each with the turn that its answer shows."""
    question: Question | None = None

    @property
    def first_open(self) -> int | None:
        """The turn that runs or is next to run."""
        return next((n for n, turn in enumerate(self.turns, 1) if turn.status not in TERMINAL), None)


class RunStoreMachine(RuleBasedStateMachine):
    """The rules are the store's methods; the invariants its promises.

    `fences`: what a closed store held is closed to the next one, too, until it is claimed again.
    """

    kind = "sqlite"
    fences = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.stores = KINDS[self.kind](Path(self.folder.name))
        self.runs: dict[str, RunModel] = {}
        self.lost: set[TurnKey] = set()
        self.requests = 0
        self.deletions = 0
        self.left = 0  # rows of deleted runs that are still to be deleted

    def teardown(self) -> None:
        """Close what is open."""
        self.do(self.store.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.folder.cleanup()

    def do(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Wait for it."""
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 10))

    @initialize()
    def open(self) -> None:
        """Begin with an empty store."""
        self.store = self.do(self.stores.connect())

    def pick(self, number: int) -> tuple[str, RunModel]:
        """One of the runs."""
        return list(self.runs.items())[number % len(self.runs)]

    def request_id(self) -> str:
        """An id that no other request has."""
        self.requests += 1
        return str(self.requests)

    def extend(self, model: RunModel, turn: int, change: Change) -> None:
        """Hold the events of a change against the end of the log."""
        first = len(model.log) + 1
        assert [event.sequence for event in change.events] == list(range(first, first + len(change.events)))
        assert {event.turn for event in change.events} <= {turn}
        model.log += [(turn, event.content) for event in change.events]
        assert change.run.last_sequence == len(model.log)

    def hold(self, model: RunModel, run: Run) -> None:
        """Note that a turn is running under a new key."""
        turn = model.turns[run.turn.number - 1]
        key = TurnKey(run.id, run.turn.number, run.turn.epoch)
        assert all(key.epoch > earlier.epoch for earlier in turn.keys)
        turn.keys.append(key)
        assert turn.attempt == run.turn.attempt

    @rule(claim=st.booleans(), text=st.sampled_from(["a", "é\n"]))
    def start_run(self, claim: bool, text: str) -> None:
        """Accept a run."""
        new = new_run(text, request_id=self.request_id())

        async def start() -> Change:
            return await self.store.start_run(new, claim=claim)

        change = self.do(start())
        status = RunStatus.RUNNING if claim else RunStatus.QUEUED
        model = self.runs[new.id] = RunModel(new, [TurnModel(status, int(claim))], [], [(new, 1)])
        self.extend(model, 1, change)
        if claim:
            self.hold(model, change.run)

    @precondition(lambda self: self.runs)
    @rule(number=PICK, claim=st.booleans(), late=st.booleans())
    def continue_run(self, number: int, claim: bool, late: bool) -> None:
        """Open the next turn, which runs only when no other is open; not with what is, or was meant as, an answer."""
        _, model = self.pick(number)
        runs = claim and model.first_open is None
        text = "yes" if late else f"turn {len(model.turns) + 1}"
        new = next_turn(model.new, text, request_id=self.request_id())

        async def resume() -> Change:
            return await self.store.continue_run(new, claim=claim)

        if model.question is not None and (model.question.is_open or (late and model.question.options)):
            with contextlib.suppress(QuestionOpen if model.question.is_open else QuestionAnswered):
                self.do(resume())
                raise AssertionError("the input was taken")
            return
        change = self.do(resume())
        model.asked.append((new, len(model.turns) + 1))
        model.turns.append(TurnModel(RunStatus.RUNNING if runs else RunStatus.QUEUED, int(runs)))
        self.extend(model, len(model.turns), change)
        assert change.run.turn.number == len(model.turns)
        if runs:
            self.hold(model, change.run)

    @precondition(lambda self: self.runs)
    @rule(number=PICK, texts=TEXTS, options=st.sampled_from([OPTIONS, ()]))
    def ask_question(self, number: int, texts: list[str], options: tuple[tuple[str, str], ...]) -> None:
        """Ask in the name of the first open turn."""
        _, model = self.pick(number)
        open_turn = model.first_open
        if open_turn is None or model.turns[open_turn - 1].status is not RunStatus.RUNNING:
            return
        turn = model.turns[open_turn - 1]
        key = turn.keys[-1]
        if self.fences and key in self.lost:
            return

        async def ask() -> Change:
            return await self.store.ask_question(key, [*said(*texts), question()], options)

        change = self.do(ask())
        self.extend(model, open_turn, change)
        turn.draft = None if texts else turn.draft
        model.question = Question(len(model.log), options=options)

    @precondition(lambda self: any(model.question for model in self.runs.values()))
    @rule(number=PICK, earlier=st.booleans())
    def answer_question(self, number: int, earlier: bool) -> None:
        """Answer what a run asks, whoever holds its turn: once, and not what it asked before."""
        models = [model for model in self.runs.values() if model.question is not None]
        model = models[number % len(models)]
        asked = model.question
        assert asked is not None
        run = self.do(self.store.get_run(ORGANIZATION, SERVER, model.new.id))
        shown = replace(run, question=Question(asked.sequence - earlier))
        answer = answer_to(shown, request_id=self.request_id())

        async def send() -> Change:
            return await self.store.answer_question(answer)

        if earlier or not asked.is_open:
            with contextlib.suppress(QuestionAnswered):
                self.do(send())
                raise AssertionError("the answer was taken")
            return
        change = self.do(send())
        assert model.first_open is not None
        self.extend(model, model.first_open, change)
        assert change.run.turn.number == model.first_open
        model.asked.append((answer, model.first_open))
        model.question = Question(asked.sequence, is_open=False, options=asked.options)

    @precondition(lambda self: self.runs)
    @rule(number=PICK, texts=TEXTS, how=st.sampled_from(["append", "finish", "fail", "release", "draft"]))
    def write(self, number: int, texts: list[str], how: str) -> None:
        """Write under the newest key of the first open turn."""
        _, model = self.pick(number)
        open_turn = model.first_open
        if open_turn is None or model.turns[open_turn - 1].status is not RunStatus.RUNNING:
            return
        turn = model.turns[open_turn - 1]
        key = turn.keys[-1]
        if self.fences and key in self.lost:
            return
        if how == "draft":
            turn.draft = "".join(texts)
            self.do(self._save_draft(key, turn.draft))
            return
        change = self.do(self._write(key, texts, how))
        self.extend(model, open_turn, change)
        assert contents(change.events) == texts
        if how != "append":
            model.question = None
        assert change.run.question == model.question
        match how:
            case "append":
                turn.draft = None if texts else turn.draft
            case "release":
                turn.become(RunStatus.QUEUED)
                turn.attempt, turn.draft = turn.attempt - 1, None
            case "finish" | "fail":
                turn.become(RunStatus.COMPLETED if how == "finish" else RunStatus.FAILED)
                turn.settled = change.run.turn

    async def _save_draft(self, key: TurnKey, text: str) -> None:
        await self.store.save_draft(key, text)

    async def _write(self, key: TurnKey, texts: list[str], how: str) -> Change:
        match how:
            case "append":
                return await self.store.append_events(key, said(*texts))
            case "release":
                return await self.store.release_turn(key, said(*texts))
            case _:
                return await self.store.finish_turn(key, said(*texts), OUTCOMES[how == "fail"])

    @precondition(lambda self: self.runs)
    @rule(number=PICK, which=PICK, how=st.sampled_from(["append", "finish", "fail", "release"]))
    def write_late(self, number: int, which: int, how: str) -> None:
        """Write under a key that is not the holder's any more."""
        _, model = self.pick(number)
        keys = [
            key
            for turn in model.turns
            for key in turn.keys
            if turn.status is not RunStatus.RUNNING or key != turn.keys[-1] or (self.fences and key in self.lost)
        ]
        if keys:
            with contextlib.suppress(TurnLost):
                self.do(self._write(keys[which % len(keys)], ["late"], how))
                raise AssertionError("the write was taken")

    @precondition(lambda self: self.runs)
    @rule(number=PICK, texts=TEXTS)
    def cancel_run(self, number: int, texts: list[str]) -> None:
        """Settle every open turn; none that was settled changes."""
        _, model = self.pick(number)
        first = model.first_open
        cancel = cancel_of(model.new, request_id=self.request_id())

        async def cancel_run() -> Change:
            return await self.store.cancel_run(cancel, said(*texts), "said")

        change = self.do(cancel_run())
        model.asked.append((cancel, len(model.turns)))
        if first is None:
            assert change.events == ()
            return
        self.extend(model, first, change)
        turn = model.turns[first - 1]
        kept = [turn.draft] if turn.draft and not texts else texts
        assert contents(change.events)[:-1] == kept
        turn.draft = model.question = None
        for turn in model.turns[first - 1 :]:
            turn.become(RunStatus.CANCELLED)

    @precondition(lambda self: self.runs)
    @rule(number=PICK, which=PICK)
    def ask_again(self, number: int, which: int) -> None:
        """Repeat a request; it is answered with the turn that it showed, as that is now, and nothing is written."""
        run_id, model = self.pick(number)
        request, turn = model.asked[which % len(model.asked)]

        async def ask() -> tuple[Change, Run]:
            match request:
                case NewRun():
                    change = await self.store.start_run(request, claim=True)
                case NewTurn():
                    change = await self.store.continue_run(request, claim=True)
                case Cancel():
                    change = await self.store.cancel_run(request, said("again"), "again")
                case NewAnswer():
                    change = await self.store.answer_question(request)
            return change, await self.store.get_run(ORGANIZATION, SERVER, run_id, turn)

        change, run = self.do(ask())
        assert change == Change(run, (), replayed=True)

    @rule(limit=st.integers(1, 8), times=st.integers(1, 3))
    def delete_runs(self, limit: int, times: int) -> None:
        """Delete some of the runs without an open turn, the earliest first; rows of a long one may be left."""
        self.deletions += 1
        before_ms = (1 << 50) + self.deletions

        async def delete() -> Deleted:
            return await self.store.delete_runs(before_ms, limit)

        for _ in range(times):
            deleted = self.do(delete())
            unused = [run_id for run_id, model in self.runs.items() if model.first_open is None]
            assert sum(deleted) <= limit
            assert any(deleted) == bool(unused or self.left)
            for run_id in unused[: deleted.runs]:
                model = self.runs.pop(run_id)
                self.left += len(model.turns) + len(model.log)
            self.left -= deleted.turns + deleted.events
            assert self.left >= 0

    @rule(limit=st.integers(1, 3))
    def claim_turns(self, limit: int) -> None:
        """Claim what may run: the first open turn of a run, if it is queued."""
        free = {
            run_id
            for run_id, model in self.runs.items()
            if (n := model.first_open) is not None and model.turns[n - 1].status is RunStatus.QUEUED
        }

        async def claim() -> list[Change]:
            return await self.store.claim_turns(limit)

        changes = self.do(claim())
        assert len(changes) == min(limit, len(free))
        for change in changes:
            model = self.runs[change.run.id]
            assert change.run.turn.number == model.first_open
            free.remove(change.run.id)
            turn = model.turns[change.run.turn.number - 1]
            turn.become(RunStatus.RUNNING)
            turn.attempt += 1
            self.extend(model, change.run.turn.number, change)
            self.hold(model, change.run)

    @rule()
    def reopen(self) -> None:
        """Close the store and open it again: what was running is lost."""
        self.do(self.store.close())
        self.store = self.do(self.stores.connect())
        self.lost = {turn.keys[-1] for model in self.runs.values() for turn in model.turns if turn.keys}

    @rule(crash=st.booleans(), may_repeat=st.booleans())
    def recover(self, crash: bool, may_repeat: bool) -> None:
        """What was lost is queued again or fails, and its draft is kept; the rest is running still."""
        if crash:
            self.reopen()

        async def recover() -> list[Change]:
            return await self.store.recover(MAX_ATTEMPTS, lambda _: may_repeat)

        changes = {(change.run.id, change.run.turn.number): change for change in self.do(recover())}
        for run_id, model in self.runs.items():
            for number, turn in enumerate(model.turns, 1):
                if turn.status is not RunStatus.RUNNING or turn.keys[-1] not in self.lost:
                    continue
                change = changes.pop((run_id, number))
                self.extend(model, number, change)
                kept = [event.content for event in change.events if event.log_type == "incomplete"]
                assert kept == ([turn.draft] if turn.draft else [])
                turn.draft = model.question = None
                again = may_repeat and turn.attempt < MAX_ATTEMPTS
                turn.become(RunStatus.QUEUED if again else RunStatus.FAILED)
                assert change.run.turn.status is turn.status
                if not again:
                    assert change.run.turn.error_code == "RUNTIME_LOST"
                    turn.settled = change.run.turn
        assert not changes

    @invariant()
    def store_shows_the_model(self) -> None:
        """The log is gapless and in order, each turn has its status, and settled turns never change."""
        if self.runs:
            self.do(self._compare())

    async def _compare(self) -> None:
        waiting = 0
        for run_id, model in self.runs.items():
            events = await log_of(self.store, run_id)
            assert [(event.turn, event.content) for event in events] == model.log
            for number, turn in enumerate(model.turns, 1):
                run = await self.store.get_run(ORGANIZATION, SERVER, run_id, number)
                stored = run.turn
                assert run.question == model.question
                assert (stored.status, stored.attempt) == (turn.status, turn.attempt)
                assert (stored.completed_at_ms is not None) == (stored.status in TERMINAL)
                assert (stored.error_code is not None) == (stored.status is RunStatus.FAILED)
                assert events[stored.first_sequence - 1].turn == number
                if turn.status in TERMINAL:
                    turn.settled = turn.settled or stored
                    assert stored == turn.settled
                waiting += turn.status is RunStatus.QUEUED
            latest = await self.store.get_run(ORGANIZATION, SERVER, run_id)
            assert (latest.status, latest.last_turn) == (model.turns[-1].status, len(model.turns))
            assert latest.last_sequence == len(model.log)
            assert latest.message_count == sum(event.role in ("user", "assistant") for event in events)
        assert await self.store.count_queued() == waiting
        page = await self.store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=1_000)
        assert [run.id for run in page.runs] == list(self.runs)[::-1]
        for status in RunStatus:
            page = await self.store.list_runs(ORGANIZATION, SERVER, status=status, token=None, limit=1_000)
            expected = [run_id for run_id, model in self.runs.items() if model.turns[-1].status is status]
            assert [run.id for run in page.runs] == expected[::-1]


class PostgresMachine(RunStoreMachine):
    """The same over PostgreSQL."""

    kind = "postgresql"
    fences = True


SETTINGS = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRunStoreMachine = RunStoreMachine.TestCase
TestRunStoreMachine.settings = SETTINGS
TestPostgresMachine = PostgresMachine.TestCase
TestPostgresMachine.settings = settings(SETTINGS, max_examples=15)  # each step asks a server many times
