"""Questions of agents, over both stores: asked, answered by whoever is first, decided by settings or time."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from runtime_service import asking, execution
from runtime_service.agents import (
    Agent,
    AgentError,
    AgentSays,
    Answer,
    AnsweredBy,
    Delta,
    Log,
    Message,
    Option,
    OptionKind,
    TurnContext,
)
from runtime_service.errors import InvalidRequest, QuestionAnswered, RunServiceError, StoreUnavailable
from runtime_service.event_log import FollowOptions
from runtime_service.executor import ExecutorLimits
from runtime_service.live_run import LiveRun, Update
from runtime_service.questions import QuestionSettings, answer_event
from runtime_service.runs import TERMINAL, EventDraft, EventRole, Question, Run, RunEvent, RunStatus
from runtime_service.store.base import Change, NewAnswer, NewTurn, TurnKey, TurnLost, accepted_run
from runtime_service.validation import checked_request
from tests.stores import Stores
from tests.support import (
    LIMIT_SECONDS,
    Runtime,
    ScriptedAgent,
    contents,
    eventually,
    log_of,
    new_run,
    next_turn,
    run_async,
    runtime,
)

ALLOW = Option("yes", "Allow", OptionKind.ALLOW_ONCE)
REJECT = Option("no", "Reject", OptionKind.REJECT_ONCE)
SOON = QuestionSettings(timeout_seconds=0.05)


@pytest.fixture(autouse=True)
def looks_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told is not what is found by looking now and then."""
    monkeypatch.setattr(asking, "_LOOK_SECONDS", 10 * LIMIT_SECONDS)


async def asks(turn: TurnContext) -> AsyncGenerator[AgentSays]:
    """Ask for a permission, say what came of it."""
    yield Log("before")
    yield Delta("half ")
    answer = await turn.ask("May I?", [ALLOW, REJECT], tool_kind="edit", metadata={"path": "a.txt"})
    yield Message(f"half {answer.option} by {answer.by}")


def asks_until(held: asyncio.Event) -> Callable[[TurnContext], AsyncGenerator[AgentSays]]:
    """A script that asks for a permission and says what came of it, and ends when the test lets it."""

    async def asks_and_stays(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        async for said in asks(turn):
            yield said
        await held.wait()

    return asks_and_stays


async def asks_freely(turn: TurnContext) -> AsyncGenerator[AgentSays]:
    """Ask for a text, say it."""
    answer = await turn.ask("What is your name?")
    yield Message(f"{answer.text} by {answer.by}")


async def until_asking(there: Runtime, run: Run) -> Run:
    """Return the run once it asks."""
    found: list[Run] = []

    async def asking() -> bool:
        found[:] = [await there.get(run)]
        assert found[0].status not in TERMINAL or found[0].last_turn > 1, found
        return found[0].is_asking

    await there.until(asking)
    return found[0]


def playing(
    stores: Stores | Path,
    script: Callable[[TurnContext], AsyncGenerator[AgentSays]],
    check: Callable[[Runtime], Any],
    settings: QuestionSettings | None = None,
    limits: ExecutorLimits | None = None,
) -> None:
    """Run `check` with a runtime whose agent follows the script."""

    async def main() -> None:
        agent: Agent = ScriptedAgent(script)
        async with runtime(stores, agent, limits, questions=settings) as there:
            await check(there)

    run_async(main())


def test_question_is_in_the_log_and_the_answer_ends_it(stores: Stores) -> None:
    """Behind what the agent had said; the run is running and asks; then the answer, then the rest."""

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        assert run.question is not None
        assert run.question.options == (("yes", "Allow"), ("no", "Reject"))
        events = await log_of(there.store, run.id)
        assert contents(events) == ["hello", "before", "May I?"]
        question = events[2]
        assert (question.sequence, question.log_type) == (run.question.sequence, "permission_request")
        assert json.loads(question.metadata or b"") == {
            "path": "a.txt",
            "options": [
                {"id": "yes", "name": "Allow", "kind": "allow_once"},
                {"id": "no", "name": "Reject", "kind": "reject_once"},
            ],
            "toolKind": "edit",
            "timeoutSeconds": 600,
        }
        answered = await there.resume(run, "yes")
        assert (answered.turn.number, answered.last_turn, answered.is_asking) == (1, 1, False)
        done = await there.until_status(run, RunStatus.COMPLETED)
        assert (done.turn.output, done.question) == ("half yes by caller", None)
        events = await log_of(there.store, run.id)
        assert contents(events)[3:] == ["yes", "half yes by caller"]
        assert (events[3].role, events[3].turn, events[3].log_type) == (EventRole.USER, 1, "permission_response")
        second = await there.resume(run, "yes")
        assert second.turn.number == 2
        assert await there.store.read_messages(run.id, 2, 10) == [
            (EventRole.USER, "hello"),
            (EventRole.ASSISTANT, "half yes by caller"),
        ]

    playing(stores, asks, check)


def test_free_question_takes_any_text(stores: Stores) -> None:
    """As it came."""

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        await there.resume(run, " Ada\n")
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == " Ada\n by caller"

    playing(stores, asks_freely, check)


def test_wrong_answer_is_refused_and_the_question_stays(stores: Stores) -> None:
    """Nothing is written; the next one may be right."""

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        with pytest.raises(InvalidRequest, match="yes, no"):
            await there.resume(run, "perhaps")
        assert len(await log_of(there.store, run.id)) == 3
        await there.resume(run, "Reject")
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "half no by caller"

    playing(stores, asks, check)


def test_first_answer_counts(stores: Stores) -> None:
    """Of ten at once one is taken; none becomes a turn of its own."""
    held = asyncio.Event()

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        answers = await asyncio.gather(
            *(there.resume(run, ("yes", "no")[n % 2]) for n in range(10)), return_exceptions=True
        )
        assert sorted(type(answer).__name__ for answer in answers) == ["QuestionAnswered"] * 9 + ["Run"]
        with pytest.raises(QuestionAnswered):
            await there.resume(run, "yes")
        # What is no option is input, as ever.
        assert (await there.resume(run, "and then?")).turn.number == 2
        held.set()
        await there.until_status(run, RunStatus.RUNNING, turn=2)

    playing(stores, asks_until(held), check)


def test_answer_that_comes_again_by_its_request_id_is_the_same(stores: Stores) -> None:
    """Also when the turn is over."""

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        server = there.servers[run.server_id]
        request = checked_request("once", b"", "continue", run.server_id, run.id, "yes", None)
        new = next_turn(run, "yes")
        new = NewTurn(new.organization, new.server_id, run.id, "yes", new.mode, new.created_at_ms, None, request)
        first = await there.executor.continue_run(new, server)
        again = await there.executor.continue_run(new, server)
        assert (first.replayed, again.replayed) == (False, True)
        await there.until_status(run, RunStatus.COMPLETED)
        late = await there.executor.continue_run(new, server)
        assert (late.replayed, late.run.turn.number, late.run.last_turn) == (True, 1, 1)
        assert contents(await log_of(there.store, run.id)).count("yes") == 1

    playing(stores, asks, check)


@pytest.mark.parametrize(
    ("on_timeout", "output"), [("deny", "half no by time_limit"), ("allow", "half yes by time_limit")]
)
def test_time_limit_decides(stores: Stores, on_timeout: Any, output: str) -> None:
    """And says so; the question is closed."""

    async def check(there: Runtime) -> None:
        run = await there.start()
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == output
        decision = (await log_of(there.store, run.id))[3]
        assert (decision.role, decision.log_type) == (EventRole.EXECUTION_LOG, "permission_decision")
        assert decision.content.startswith("Nobody answered within 0.05 s: ")

    playing(stores, asks, check, QuestionSettings(timeout_seconds=0.05, on_timeout=on_timeout))


def test_free_question_without_an_answer_is_told_so(stores: Stores) -> None:
    """The agent goes on without."""

    async def check(there: Runtime) -> None:
        run = await there.start()
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "None by time_limit"

    playing(stores, asks_freely, check, SOON)


def test_answer_that_is_first_by_a_hair_counts(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit finds the question answered, and the agent gets the answer."""

    async def check(there: Runtime) -> None:
        answer_question = there.store.answer_question

        async def answer_late(answer: NewAnswer) -> Change:
            if answer.event.role is EventRole.EXECUTION_LOG and (await there.get(run)).is_asking:
                await there.resume(run, "yes")
            return await answer_question(answer)

        monkeypatch.setattr(there.store, "answer_question", answer_late)
        run = await there.start()
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "half yes by caller"

    playing(stores, asks, check, SOON)


def test_answer_that_is_read_late_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store was away until the time was over; what it had taken before is what holds."""
    monkeypatch.setattr(asking, "RETRY_SECONDS", 0.01)
    looks = iter(range(20))

    async def check(there: Runtime) -> None:
        read_latest_log = there.store.read_latest_log

        async def read(run_id: str, log_type: str, after: int) -> RunEvent | None:
            if next(looks, None) is not None:
                raise StoreUnavailable("away")
            return await read_latest_log(run_id, log_type, after)

        monkeypatch.setattr(there.store, "read_latest_log", read)
        run = await until_asking(there, await there.start())
        await there.resume(run, "yes")
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "half yes by caller"
        assert next(looks, None) is None

    playing(tmp_path / "runs.db", asks, check, QuestionSettings(timeout_seconds=0.1))


def test_answer_of_which_nobody_tells_is_found(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now and then the store is looked at all the same."""
    monkeypatch.setattr(asking, "_LOOK_SECONDS", 0.01)

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        assert run.question is not None
        event = answer_event(run.question, next_turn(run, "yes"))
        await there.store.answer_question(
            NewAnswer(run.organization, run.server_id, run.id, run.question.sequence, event)
        )
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "half yes by caller"

    playing(stores, asks, check)


def test_store_is_read_once_for_each_word_of_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for an answer looks when there is something new, not all the time."""
    looks: list[str] = []

    async def check(there: Runtime) -> None:
        read_latest_log = there.store.read_latest_log

        async def read(run_id: str, log_type: str, after: int) -> RunEvent | None:
            looks.append(log_type)
            return await read_latest_log(run_id, log_type, after)

        monkeypatch.setattr(there.store, "read_latest_log", read)
        run = await until_asking(there, await there.start())
        for number in (1, 2):
            there.executor.runs_changed([run.id])
            await eventually(lambda number=number: len(looks) == number)  # type: ignore[misc]
            for _ in range(10):
                await there.get(run)
            assert len(looks) == number

    playing(tmp_path / "runs.db", asks, check)


def test_settings_decide_without_the_caller(stores: Stores) -> None:
    """In order with what the agent says; no question is open at any time."""

    async def check(there: Runtime) -> None:
        run = await there.start()
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "half yes by settings"
        events = await log_of(there.store, run.id)
        assert contents(events)[1:3] == ["before", "Allowed by the server's settings: May I?"]

    playing(stores, asks, check, QuestionSettings(allow_tool_kinds=("edit",)))


def test_questions_of_one_turn_come_one_after_the_other(stores: Stores) -> None:
    """Each gets its own answer."""

    async def asks_at_once(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        answers = await asyncio.gather(*(turn.ask(f"number {n}?") for n in range(3)))
        yield Message(" ".join(str(answer.text) for answer in answers))

    async def check(there: Runtime) -> None:
        run = await there.start()
        for number in range(3):
            asking = await until_asking(there, run)
            assert contents(await log_of(there.store, run.id))[-1] == f"number {number}?"
            await there.resume(asking, f"answer {number}")
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "answer 0 answer 1 answer 2"

    playing(stores, asks_at_once, check)


def test_cancel_ends_a_question(stores: Stores) -> None:
    """No answer is taken any more: input opens a turn."""
    left = asyncio.Event()

    async def asks_and_is_left(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        try:
            await turn.ask("May I?", [ALLOW, REJECT])
            yield Message("never")
        finally:
            left.set()

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        cancelled = await there.cancel(run)
        assert (cancelled.status, cancelled.question) == (RunStatus.CANCELLED, None)
        await left.wait()
        assert (await there.resume(run, "yes")).turn.number == 2

    playing(stores, asks_and_is_left, check)


def test_full_queue_refuses_input_but_no_answer(stores: Stores) -> None:
    """An answer needs no room; what comes behind it does."""
    held = asyncio.Event()

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        await there.start("waits")
        with pytest.raises(RunServiceError, match="waiting already"):
            await there.start("too much")
        await there.resume(run, "yes")
        for late in ("yes", "perhaps"):
            with pytest.raises(RunServiceError, match="waiting already"):
                await there.resume(run, late)
        held.set()
        assert (await there.until_status(run, RunStatus.COMPLETED, turn=1)).turn.output == "half yes by caller"

    playing(
        stores, asks_until(held), check, limits=ExecutorLimits(max_turns=1, max_queued=1, cancel_grace_seconds=0.05)
    )


def test_followers_see_the_question_and_a_collector_is_answered_at_once(stores: Stores) -> None:
    """A live follower goes on behind it; a collector has what there is, and the run that asks."""

    async def check(there: Runtime) -> None:
        run = await there.start()
        collected: list[Update] = []

        async def take(update: Update) -> None:
            collected.append(update)

        async def follow() -> list[Update]:
            return [update async for update in there.event_log.follow(run, 0, FollowOptions())]

        following = asyncio.create_task(follow())
        await there.event_log.collect(run, 0, take)
        assert [event.content for update in collected for event in update.events] == ["hello", "before", "May I?"]
        asking = collected[-1].run
        assert asking is not None
        assert asking.is_asking
        answered = await there.resume(run, "yes")
        rest: list[Update] = []

        async def take_rest(update: Update) -> None:
            rest.append(update)

        await there.event_log.collect(answered, answered.last_sequence - 1, take_rest)
        assert [event.content for update in rest for event in update.events] == ["yes", "half yes by caller"]
        states = [(update.run.status, update.run.is_asking) for update in await following if update.run is not None]
        assert (RunStatus.RUNNING, True) in states
        assert states[-1] == (RunStatus.COMPLETED, False)

    playing(stores, asks, check)


def test_question_too_long_fails_the_turn(tmp_path: Path) -> None:
    """As any event of an agent that is too long."""

    async def asks_much(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        await turn.ask("x" * (1 << 20) + "x")
        yield Message("never")

    async def check(there: Runtime) -> None:
        run = await there.start()
        assert (await there.until_status(run, RunStatus.FAILED)).turn.error_code == "EVENT_TOO_LARGE"

    playing(tmp_path / "runs.db", asks_much, check)


def test_option_ids_come_back_as_the_agent_gave_them(tmp_path: Path) -> None:
    """Also where the log cannot hold them."""

    async def asks_oddly(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        answer = await turn.ask("Which?", [Option("a\0", "A"), Option("b", "B")])
        yield Message(repr(answer.option))

    async def check(there: Runtime) -> None:
        run = await until_asking(there, await there.start())
        await there.resume(run, "A")
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == r"'a\x00'"

    playing(tmp_path / "runs.db", asks_oddly, check)


def test_question_ends_with_its_turn(tmp_path: Path) -> None:
    """Who still waits for the answer is told at once; nobody waits for ever."""
    told: list[object] = []
    waiting: list[asyncio.Task[None]] = []

    async def leaves_a_question(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        async def wait() -> None:
            try:
                await turn.ask("Anybody?")
            except AgentError as error:
                told.append(error.code)

        waiting.append(asyncio.create_task(wait()))
        run_asks = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, run_asks.set)
        await run_asks.wait()
        yield Message("done")

    async def check(there: Runtime) -> None:
        run = await there.start()
        done = await there.until_status(run, RunStatus.COMPLETED)
        assert done.question is None
        await asyncio.wait(waiting)
        assert told == ["TURN_ENDED"]

    playing(tmp_path / "runs.db", leaves_a_question, check)


@pytest.mark.parametrize("when", ["open", "in flight"])
def test_question_that_its_agent_gives_up_is_withdrawn(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The log says so; the run asks no longer, and what comes then is input."""
    give_up, end = asyncio.Event(), asyncio.Event()

    async def gives_up(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        question = asyncio.create_task(turn.ask("May I?", [ALLOW, REJECT]))
        await give_up.wait()
        question.cancel()
        await asyncio.wait([question])
        await end.wait()
        yield Message(f"done, {question.cancelled()}")

    async def check(there: Runtime) -> None:
        if when == "in flight":
            ask_question = there.store.ask_question

            async def ask_and_be_given_up(*arguments: Any) -> Change:
                change = await ask_question(*arguments)
                give_up.set()
                for _ in range(5):  # until the agent has given up, in the loop's next turns
                    await asyncio.sleep(0)
                return change

            monkeypatch.setattr(there.store, "ask_question", ask_and_be_given_up)
            run = await there.start()
        else:
            run = await until_asking(there, await there.start())
            give_up.set()

        async def withdrawn() -> bool:
            return contents(await log_of(there.store, run.id))[1:] == [
                "May I?",
                "The agent does not wait for an answer any more.",
            ]

        if when == "open":
            answer_question = there.store.answer_question

            async def refuse_once(answer: NewAnswer) -> Change:
                monkeypatch.setattr(there.store, "answer_question", answer_question)
                raise StoreUnavailable("away")

            monkeypatch.setattr(asking, "RETRY_SECONDS", 0.01)
            monkeypatch.setattr(there.store, "answer_question", refuse_once)
        await there.until(withdrawn)
        decision = (await log_of(there.store, run.id))[2]
        assert decision.log_type == "permission_decision"
        assert json.loads(decision.metadata or b"") == {"question": 2, "by": "agent"}
        assert not (await there.get(run)).is_asking
        assert (await there.resume(run, "more")).turn.number == 2
        end.set()
        assert (await there.until_status(run, RunStatus.COMPLETED, turn=1)).turn.output == "done, True"

    playing(stores, gives_up, check)


@pytest.mark.parametrize("said", [[], ["said"]])
def test_question_that_is_given_up_at_once_is_never_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Neither with what the agent says nor without; and nothing is written in its place."""
    written: list[int] = []

    async def gives_up(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        question = asyncio.create_task(turn.ask("May I?"))
        await asyncio.sleep(0)
        question.cancel()
        for text in said:
            yield Log(text)
        await asyncio.wait([question])
        for _ in range(5):
            await asyncio.sleep(0)
        yield Message("done")

    async def check(there: Runtime) -> None:
        append_events = there.store.append_events

        async def append(key: TurnKey, events: Sequence[EventDraft]) -> Change:
            written.append(len(events))
            return await append_events(key, events)

        monkeypatch.setattr(there.store, "append_events", append)
        run = await there.start()
        await there.until_status(run, RunStatus.COMPLETED)
        assert contents(await log_of(there.store, run.id)) == ["hello", *said, "done"]
        assert written == [1] * len(said)

    playing(tmp_path / "runs.db", gives_up, check)


def test_question_behind_one_that_was_given_up_unstored_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the store refuses the first one only when the second one waits already; the first is forgotten."""
    monkeypatch.setattr(execution, "RETRY_SECONDS", 0.01)
    refused = asyncio.Event()

    async def asks_twice(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        first = asyncio.create_task(turn.ask("First?"))
        await refused.wait()
        first.cancel()
        answer = await turn.ask("Second?")
        yield Message(f"{answer.text}")

    async def check(there: Runtime) -> None:
        ask_question = there.store.ask_question

        async def refuse_once(*arguments: Any) -> Change:
            if refused.is_set():
                return await ask_question(*arguments)
            refused.set()
            for _ in range(5):  # until the second one waits
                await asyncio.sleep(0)
            raise StoreUnavailable("away")

        monkeypatch.setattr(there.store, "ask_question", refuse_once)
        run = await until_asking(there, await there.start())
        assert contents(await log_of(there.store, run.id)) == ["hello", "Second?"]
        await there.resume(run, "yes")
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "yes"

    playing(tmp_path / "runs.db", asks_twice, check)


@pytest.mark.parametrize("error", [TurnLost(), StoreUnavailable("away"), None])
def test_question_that_is_being_stored_when_its_turn_ends_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Whatever becomes of the write; a blocking agent would wait for ever otherwise, and its thread with it."""
    told: list[asyncio.Task[Answer]] = []
    asked, end = asyncio.Event(), asyncio.Event()

    async def asks_elsewhere(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        told.append(asyncio.create_task(turn.ask("May I?")))
        await asyncio.Event().wait()
        yield Message("never")

    async def check(there: Runtime) -> None:
        ask_question = there.store.ask_question

        async def ask_late(*arguments: Any) -> Change:
            asked.set()
            await end.wait()
            if error is not None:
                raise error
            return await ask_question(*arguments)

        monkeypatch.setattr(there.store, "ask_question", ask_late)
        run = await there.start()
        await asked.wait()
        await there.cancel(run)
        end.set()
        await asyncio.wait(told)
        refusal = told[0].exception()
        assert isinstance(refusal, AgentError)
        assert refusal.code == "TURN_ENDED"
        assert contents(await log_of(there.store, run.id)) == ["hello", "The run was cancelled."]

    playing(tmp_path / "runs.db", asks_elsewhere, check)


def test_question_of_a_turn_that_others_have_taken_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before its agent has ended, which may wait for just that."""
    told: list[asyncio.Task[Answer]] = []

    async def waits_for_its_question(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        told.append(asyncio.create_task(turn.ask("May I?")))
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.wait(told)
        yield Message("never")

    async def lose(*_: object) -> Change:
        raise TurnLost

    async def check(there: Runtime) -> None:
        monkeypatch.setattr(there.store, "ask_question", lose)
        await there.start()
        await eventually(lambda: bool(told) and told[0].done())
        assert isinstance(told[0].exception(), AgentError)

    playing(tmp_path / "runs.db", waits_for_its_question, check)


def test_question_is_asked_once_the_store_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the agent had said before, once."""
    monkeypatch.setattr(execution, "RETRY_SECONDS", 0.01)

    async def check(there: Runtime) -> None:
        ask_question = there.store.ask_question

        async def refuse_once(*_: object) -> Change:
            monkeypatch.setattr(there.store, "ask_question", ask_question)
            raise StoreUnavailable("away")

        monkeypatch.setattr(there.store, "ask_question", refuse_once)
        run = await until_asking(there, await there.start())
        assert contents(await log_of(there.store, run.id)) == ["hello", "before", "May I?"]
        await there.resume(run, "yes")
        assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "half yes by caller"

    playing(tmp_path / "runs.db", asks, check)


def test_agent_that_was_left_behind_asks_nobody(tmp_path: Path) -> None:
    """It goes on after its cancel, and is told that its turn has ended."""
    told: list[str] = []

    async def stays(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            try:
                await turn.ask("May I stay?")
            except AgentError as error:
                told.append(error.code)
        yield Message("never")

    async def check(there: Runtime) -> None:
        run = await there.start()
        await there.until_status(run, RunStatus.RUNNING)
        await there.cancel(run)
        await eventually(lambda: told == ["TURN_ENDED"])

    playing(tmp_path / "runs.db", stays, check, limits=ExecutorLimits(cancel_grace_seconds=60))


def test_followers_of_a_queued_turn_see_the_question_before_it(stores: Stores) -> None:
    """The run asks, whichever of its turns is followed; and does no longer once that is answered."""
    go = asyncio.Event()

    async def asks_later(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        if turn.turn == 1:
            await go.wait()
            await turn.ask("May I?", [ALLOW])
            await asyncio.Event().wait()
        yield Message("never")

    async def check(there: Runtime) -> None:
        run = await there.start()
        second = await there.resume(run, "second")
        told: list[tuple[RunStatus, bool]] = []

        async def follow() -> None:
            async for update in there.event_log.follow(second, 0, FollowOptions(turn=2)):
                told.extend([(run.status, run.is_asking) for run in [update.run] if run is not None])

        following = asyncio.create_task(follow())
        await eventually(lambda: told == [(RunStatus.QUEUED, False)])
        go.set()
        await eventually(lambda: told[1:] == [(RunStatus.QUEUED, True)])
        await there.resume(run, "yes")
        await eventually(lambda: told[2:] == [(RunStatus.QUEUED, False)])
        following.cancel()

    playing(stores, asks_later, check)


def test_collector_of_a_queued_turn_waits_for_that(stores: Stores) -> None:
    """What is asked before it is not its own."""
    go = asyncio.Event()

    async def asks_first(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        if turn.turn == 1:
            await go.wait()
            await turn.ask("May I?", [ALLOW])
        yield Message(f"done {turn.turn}")

    async def check(there: Runtime) -> None:
        run = await there.start()
        second = await there.resume(run, "second")
        collected: list[Update] = []

        async def take(update: Update) -> None:
            collected.append(update)

        collecting = asyncio.create_task(there.event_log.collect(second, second.turn.first_sequence - 1, take))
        go.set()
        await until_asking(there, run)
        await there.resume(run, "yes")
        await collecting
        last = collected[-1].run
        assert last is not None
        assert (last.status, last.turn.output) == (RunStatus.COMPLETED, "done 2")

    playing(stores, asks_first, check)


def test_question_of_a_late_change_is_not_what_a_newer_view_shows() -> None:
    """It was read from the store behind that change: the question has been answered since."""
    new = new_run()
    first = replace(accepted_run(new, claim=True), last_turn=2, last_sequence=3, question=Question(3))
    second = replace(first, turn=replace(first.turn, number=2, status=RunStatus.QUEUED), question=None)
    answered = replace(second, last_sequence=4, question=Question(3, is_open=False))
    live = LiveRun()
    live.show(2, answered)
    live.publish(Change(first))
    assert live.view(2) == answered
    live.show(3, second)
    live.publish(Change(first))
    assert live.view(3) == replace(second, question=first.question)


def test_latest_log_is_what_the_agent_said_in_an_earlier_turn(stores: Stores) -> None:
    """The newest of its type, with its metadata; None where there is none."""
    found: list[Log | None] = []

    async def remembers(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        found.append(await turn.latest_log("session"))
        yield Log(f"session {turn.turn}", type="session", metadata={"id": turn.turn})
        yield Message("done")

    async def check(there: Runtime) -> None:
        run = await there.start()
        await there.until_status(run, RunStatus.COMPLETED)
        for turn in (2, 3):
            await there.resume(run, "more")
            await there.until_status(run, RunStatus.COMPLETED, turn=turn)
        assert found[0] is None
        assert [log and (log.content, log.metadata) for log in found[1:]] == [
            ("session 1", {"id": 1}),
            ("session 2", {"id": 2}),
        ]

    playing(stores, remembers, check)


def test_turn_of_a_lost_runtime_asks_again(tmp_path: Path) -> None:
    """The recovery rule: it is begun again, without an open question until it asks."""

    async def main() -> None:
        path = tmp_path / "runs.db"
        async with runtime(path, ScriptedAgent(asks)) as there:
            run = await until_asking(there, await there.start())
        async with runtime(path, ScriptedAgent(asks)) as there:
            again = await until_asking(there, run)
            assert again.question is not None
            assert run.question is not None
            assert again.question.sequence > run.question.sequence
            await there.resume(run, "yes")
            assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "half yes by caller"

    run_async(main())


def test_unasked_context_says_so() -> None:
    """Outside of a run there is nobody to ask."""

    async def main() -> None:
        turn = TurnContext(input="hello", metadata={})
        assert await turn.latest_log("session") is None
        with pytest.raises(AgentError) as caught:
            await turn.ask("Anybody?")
        assert caught.value.code == "QUESTION_IMPOSSIBLE"
        with pytest.raises(ValueError, match="same id"):
            await turn.ask("Which?", [ALLOW, ALLOW])
        assert Answer(AnsweredBy.CALLER).option is None

    run_async(main())
