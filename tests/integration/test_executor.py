"""Turns being executed over a real store, by agents that do as the test says."""

import asyncio
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path

import apsw
import pytest

from runtime_service import admission as admission_module
from runtime_service import execution as execution_module
from runtime_service import executor as executor_module
from runtime_service.agents import (
    AgentError,
    AgentOutput,
    AgentSays,
    Delta,
    Log,
    Message,
    ToolCall,
    ToolResult,
    TurnContext,
)
from runtime_service.errors import AgentUnavailable, CapacityExceeded, Draining, RunNotFound, StoreUnavailable
from runtime_service.event_log import FollowOptions
from runtime_service.executor import ExecutorLimits
from runtime_service.runs import EventRole, LogLevel, Run, RunStatus
from runtime_service.store.base import ATTEMPT_BEGINS, Cancel, Change
from runtime_service.store.sqlite import SQLiteStore
from tests.support import (
    ORGANIZATION,
    SERVER,
    Disk,
    Runtime,
    Script,
    ScriptedAgent,
    contents,
    eventually,
    key_of,
    log_of,
    new_run,
    next_turn,
    run_async,
    runtime,
    said,
)

QUEUED, RUNNING = RunStatus.QUEUED, RunStatus.RUNNING
COMPLETED, FAILED, CANCELLED = RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED
SECRET = "password=hunter2"


class EarlyAgent(ScriptedAgent):
    """One whose turns may begin while their run is still being stored."""

    begins_early = True


@pytest.fixture(params=[ScriptedAgent, EarlyAgent])
def kind(request: pytest.FixtureRequest) -> type[ScriptedAgent]:
    """Agents that wait for the commit, and agents that do not."""
    found: type[ScriptedAgent] = request.param
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the store is."""
    return tmp_path / "data" / "runs.sqlite"


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the store again at once."""
    for module in (admission_module, executor_module, execution_module):
        monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)


def says(*outputs: AgentOutput) -> Script:
    """Say these, then end."""

    async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
        for output in outputs:
            yield output

    return script


def waits(event: asyncio.Event, *outputs: AgentOutput) -> Script:
    """Say these, wait for the event, then say the input back."""

    async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
        for output in outputs:
            yield output
        await event.wait()
        yield Message(f"re: {turn.input}")

    return script


def fails(error: BaseException, *outputs: AgentOutput) -> Script:
    """Say these, then raise."""

    async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
        for output in outputs:
            yield output
        raise error

    return script


async def stored(rt: Runtime, run: Run) -> list[str]:
    """What the run's log says."""
    return contents(await log_of(rt.store, run.id))


async def until_said(rt: Runtime, run: Run, text: str) -> None:
    """Return once the log holds the text."""

    async def is_there() -> bool:
        return text in await stored(rt, run)

    await rt.until(is_there)


def is_idle(rt: Runtime) -> bool:
    """Whether nothing of any run is left in memory, and all room is free."""
    executor = rt.executor
    idle = not executor._tasks and not executor._executions and not executor._admission.occupied
    return idle and not rt.event_log._live


async def is_served(rt: Runtime, server_id: str = SERVER) -> bool:
    """Whether the next run is accepted and settled."""
    run = await rt.start("next", server_id=server_id)
    return (await rt.until_status(run, COMPLETED, FAILED)).status in (COMPLETED, FAILED)


# A turn


def test_turn_becomes_events_and_an_outcome(path: Path, kind: type[ScriptedAgent]) -> None:
    """What the agent says is in the log in order; the last message is the output; nothing is left in memory."""

    async def main() -> None:
        agent = kind(
            says(
                Log("thinking", LogLevel.INFO, "thought", {"n": 1}),
                ToolCall("search", {"q": "é"}, "call_1"),
                ToolResult("search", "nothing", "call_1", failed=True),
                Message("first"),
                Delta("sec"),
                Delta("ond"),
                Message("second", {"tokens": 2}),
                Message("a rule", role=EventRole.SYSTEM),
            )
        )
        async with runtime(path, agent) as rt:
            run = await rt.until_status(await rt.start("hi"), COMPLETED)
            assert (run.turn.output, run.turn.error, run.turn.attempt) == ("second", None, 1)
            events = await log_of(rt.store, run.id)
            assert [(e.role.value, e.content, e.log_type, e.log_level, e.metadata) for e in events] == [
                ("user", "hi", None, None, None),
                ("execution_log", "thinking", "thought", LogLevel.INFO, b'{"n":1}'),
                (
                    "execution_log",
                    "search",
                    "tool_call",
                    LogLevel.INFO,
                    '{"name":"search","arguments":{"q":"é"},"id":"call_1"}'.encode(),
                ),
                (
                    "execution_log",
                    "nothing",
                    "tool_result",
                    LogLevel.ERROR,
                    b'{"name":"search","id":"call_1"}',
                ),
                ("assistant", "first", None, None, None),
                ("assistant", "second", None, None, b'{"tokens":2}'),
                ("system", "a rule", None, None, None),
            ]
            await eventually(lambda: is_idle(rt))

    run_async(main())


def test_agent_that_only_streams_has_said_a_message(path: Path, kind: type[ScriptedAgent]) -> None:
    """The end of the turn is the end of its message."""

    async def main() -> None:
        async with runtime(path, kind(says(Delta("a"), Delta("é")))) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED)
            assert run.turn.output == "aé"
            assert await stored(rt, run) == ["hello", "aé"]

    run_async(main())


def test_agent_that_says_nothing_completes(path: Path, kind: type[ScriptedAgent]) -> None:
    """Without an output."""

    async def main() -> None:
        async with runtime(path, kind(says())) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED)
            assert run.turn.output is None
            assert await stored(rt, run) == ["hello"]

    run_async(main())


def test_agent_is_told_its_turn(path: Path) -> None:
    """Input, metadata, ids, and the messages of the turns before, not its own input."""

    async def main() -> None:
        turns: list[TurnContext] = []
        histories: list[list[tuple[str, str]]] = []

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            turns.append(turn)
            histories.append([(message.role.value, message.content) for message in await turn.history()])
            yield Message(f"re: {turn.input}")

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.until_status(await rt.start("one", metadata=b'{"a":[1]}'), COMPLETED)
            await rt.until_status(await rt.resume(run, "two"), COMPLETED, turn=2)
            first, second = turns
            assert (first.input, first.metadata, first.turn, first.attempt) == ("one", {"a": [1]}, 1, 1)
            assert (first.run_id, first.thread_id, first.server_id) == (run.id, run.thread_id, SERVER)
            assert (second.input, second.metadata, second.turn) == ("two", {"a": [1]}, 2)
            assert histories == [[], [("user", "one"), ("assistant", "re: one")]]

    run_async(main())


def test_deltas_are_seen_at_once_and_events_only_once_stored(path: Path) -> None:
    """A follower reads what grows while nothing of it is in the log, and never an event before its commit."""

    async def main() -> None:
        go = asyncio.Event()

        async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
            yield Delta("half")
            await go.wait()
            yield Message("half and half")

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.start()
            async with aclosing(rt.event_log.follow(run, 0, FollowOptions(deltas=True))) as updates:
                async for update in updates:
                    if update.delta is not None:
                        assert update.delta == (2, 0, "half")
                        assert await stored(rt, run) == ["hello"]
                        go.set()
                    for event in update.events:
                        assert event in await log_of(rt.store, run.id)
            assert await stored(rt, run) == ["hello", "half and half"]

    run_async(main())


def test_input_that_takes_the_drafts_place_moves_it_on(path: Path) -> None:
    """The sequence that a delta names is the one that its event gets in the end."""

    async def main() -> None:
        go = asyncio.Event()

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            if turn.turn == 1:
                yield Delta("ab")
                await go.wait()
                yield Delta("c")
                yield Log("a line")
                yield Delta("d")
                await asyncio.sleep(0.01)
            yield Message("abcd")

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.start()
            texts: dict[int, str] = {}
            async with aclosing(rt.event_log.follow(run, 0, FollowOptions(deltas=True, turn=1))) as updates:
                async for update in updates:
                    if update.delta is not None:
                        sequence, offset, text = update.delta
                        assert offset in (0, len(texts.get(sequence, "")))
                        texts[sequence] = texts.get(sequence, "")[:offset] + text
                        if not go.is_set():
                            assert texts == {2: "ab"}
                            await rt.resume(run, "input")
                            go.set()
            events = [event for event in await log_of(rt.store, run.id) if event.content == "abcd"]
            assert [event.content for event in await log_of(rt.store, run.id)][:3] == ["hello", "input", "a line"]
            last = max(texts)
            assert last == events[0].sequence
            assert "abcd".startswith(texts[last])

    run_async(main())


# Room


def test_at_most_so_many_turns_run_at_once_and_the_rest_in_order(path: Path, kind: type[ScriptedAgent]) -> None:
    """First come, first served."""

    async def main() -> None:
        go = asyncio.Event()
        agent = kind(waits(go))
        limits = ExecutorLimits(max_turns=3, cancel_grace_seconds=0.05)
        async with runtime(path, agent, limits) as rt:
            runs = [await rt.start(str(n)) for n in range(9)]
            await eventually(lambda: agent.running == 3)
            statuses = [(await rt.get(run)).status for run in runs]
            assert statuses == [RUNNING] * 3 + [QUEUED] * 6
            go.set()
            for run in runs:
                done = await rt.until_status(run, COMPLETED)
                assert done.turn.output == f"re: {run.turn.input}"
            assert agent.most_running == 3
            assert agent.inputs == [str(n) for n in range(9)]
            await eventually(lambda: is_idle(rt))

    run_async(main())


def test_many_runs_at_once_are_all_executed(path: Path, kind: type[ScriptedAgent]) -> None:
    """Started together, far more than there is room for."""

    async def main() -> None:
        agent = kind(says(Message("a")))
        async with runtime(path, agent, ExecutorLimits(max_turns=4, cancel_grace_seconds=0.05)) as rt:
            runs = await asyncio.gather(*(rt.start(str(n)) for n in range(200)))
            for run in runs:
                await rt.until_status(run, COMPLETED)
            assert agent.most_running <= 4
            assert sorted(agent.inputs, key=int) == [str(n) for n in range(200)]
            await eventually(lambda: is_idle(rt))

    run_async(main())


def test_full_queue_refuses_and_stores_nothing(path: Path, kind: type[ScriptedAgent]) -> None:
    """CapacityExceeded says when to try again; with room there, runs are accepted again."""

    async def main() -> None:
        go = asyncio.Event()
        limits = ExecutorLimits(max_turns=1, max_queued=2, cancel_grace_seconds=0.05)
        async with runtime(path, kind(waits(go)), limits) as rt:
            runs = [await rt.start(str(n)) for n in range(3)]
            for refused in (rt.start("3"), rt.resume(runs[0])):
                with pytest.raises(CapacityExceeded) as caught:
                    await refused
                assert caught.value.retry_after_seconds
            page = await rt.store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=10)
            assert [run.id for run in page.runs] == [run.id for run in runs][::-1]
            go.set()
            for run in runs:
                await rt.until_status(run, COMPLETED)
            assert await is_served(rt)

    run_async(main())


def test_request_that_was_accepted_before_is_answered_and_takes_no_room(path: Path, kind: type[ScriptedAgent]) -> None:
    """At once, later, and also when there is no room or the agent is away; it is executed once."""

    async def main() -> None:
        go = asyncio.Event()
        limits = ExecutorLimits(max_turns=2, max_queued=0, cancel_grace_seconds=0.05)
        agent = kind(waits(go))
        async with runtime(path, agent, limits) as rt:

            async def start() -> Change:
                return await rt.executor.start_run(new_run("hi", request_id="start"), rt.servers[SERVER])

            both = await asyncio.gather(start(), start())
            assert [change.replayed for change in both] == [False, True]
            run = both[0].run
            assert (await start()).run.id == both[1].run.id == run.id
            # The replays free what they had reserved.
            await eventually(lambda: len(rt.executor._tasks) == 1)
            await rt.start("beside")
            with pytest.raises(CapacityExceeded):
                await rt.start("one too many")
            assert (await start()).replayed
            agent.reason = "It is away."
            assert (await start()).replayed
            with pytest.raises(AgentUnavailable):
                await rt.start("hi")
            agent.reason = None
            go.set()
            await rt.until_status(run, COMPLETED)
            assert (await start()).run.status is COMPLETED
            assert contents(await log_of(rt.store, run.id)).count("hi") == 1
            asked = next_turn(run, request_id="continue")
            for replayed in (False, True):
                change = await rt.executor.continue_run(asked, rt.servers[SERVER])
                assert (change.replayed, change.run.turn.number) == (replayed, 2)
            await rt.until_status(run, COMPLETED)
            page = await rt.store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=10)
            assert len(page.runs) == 2
            assert await is_served(rt)

    run_async(main())


def test_burst_fills_the_room_and_the_queue(path: Path, kind: type[ScriptedAgent]) -> None:
    """Starts that come together take exactly as many places as there are, those that run not counted as waiting."""

    async def main() -> None:
        go = asyncio.Event()
        limits = ExecutorLimits(max_turns=3, max_queued=2, cancel_grace_seconds=0.05)
        async with runtime(path, kind(waits(go)), limits) as rt:
            results = await asyncio.gather(*(rt.start(str(n)) for n in range(7)), return_exceptions=True)
            kinds = [type(result).__name__ for result in results]
            assert kinds == ["Run"] * 5 + ["CapacityExceeded"] * 2
            go.set()
            for run in results:
                if isinstance(run, Run):
                    await rt.until_status(run, COMPLETED)

    run_async(main())


def test_turns_of_one_run_are_executed_in_order(path: Path, kind: type[ScriptedAgent]) -> None:
    """One at a time, although there is room for all."""

    async def main() -> None:
        go = asyncio.Event()
        agent = kind(waits(go))
        async with runtime(path, agent) as rt:
            run = await rt.start("1")
            turns = [await rt.resume(run, str(n)) for n in range(2, 6)]
            assert [turn.status for turn in turns] == [QUEUED] * 4
            other = await rt.start("other")
            await eventually(lambda: agent.running == 2)
            go.set()
            await rt.until_status(run, COMPLETED, turn=5)
            await rt.until_status(other, COMPLETED)
            assert [text for text in agent.inputs if text != "other"] == ["1", "2", "3", "4", "5"]
            assert [(await rt.get(run, n)).turn.output for n in range(1, 6)] == [f"re: {n}" for n in range(1, 6)]
            await eventually(lambda: is_idle(rt))

    run_async(main())


def test_continue_of_an_unknown_run_frees_its_room(path: Path) -> None:
    """RunNotFound, again and again, takes no place from anybody."""

    async def main() -> None:
        async with runtime(path, ScriptedAgent(says()), ExecutorLimits(max_turns=1)) as rt:
            server = rt.servers[SERVER]
            for _ in range(3):
                with pytest.raises(RunNotFound):
                    await rt.executor.continue_run(next_turn(new_run()), server)
            assert is_idle(rt)
            assert await is_served(rt)

    run_async(main())


def test_caller_that_goes_away_cancels_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ScriptedAgent]
) -> None:
    """The task of a start, and of a continue, is cancelled while the commit is under way; both are executed."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        agent = kind(says(Message("done")))
        async with runtime(path, agent) as rt:
            run: Run | None = None
            for text in ("first", "second"):
                with disk.held():
                    caller = asyncio.create_task(rt.start(text) if run is None else rt.resume(run, text))
                    await eventually(lambda: disk.holding)
                    caller.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await caller

                async def is_done(text: str = text) -> bool:
                    page = await rt.store.list_runs(ORGANIZATION, SERVER, status=COMPLETED, token=None, limit=10)
                    return [run.turn.input for run in page.runs] == [text]

                await rt.until(is_done)
                (run,) = (await rt.store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=10)).runs
                assert run.turn.output == "done"
            assert agent.inputs == ["first", "second"]
            await eventually(lambda: is_idle(rt))

    run_async(main())


# Failing


class Odd:
    """Something that is no output of an agent, and no JSON."""


FAILURES: dict[str, tuple[Script, str, str]] = {
    "AgentError": (fails(AgentError("The model is away.", "MODEL_AWAY")), "MODEL_AWAY", "The model is away."),
    "AgentError without a code": (fails(AgentError("No.")), "AGENT_FAILED", "No."),
    "AgentError with odd characters": (fails(AgentError("a\ud800\0b", "A\ud800\0")), "A", "a"),
    "any exception": (fails(ValueError(SECRET)), "AGENT_FAILED", "The agent raised ValueError"),
    "a time-out of its own": (fails(TimeoutError(SECRET)), "AGENT_FAILED", "The agent raised TimeoutError"),
    "a cancellation of its own": (fails(asyncio.CancelledError()), "AGENT_FAILED", "The agent raised CancelledError"),
    "an exception group": (fails(ExceptionGroup("g", [ValueError(SECRET)])), "AGENT_FAILED", "The agent raised Except"),
    "no output": (says(Odd()), "AGENT_FAILED", "The agent raised"),  # type: ignore[arg-type]
    "no text": (says(Message(7)), "AGENT_FAILED", "The agent raised"),  # type: ignore[arg-type]
    "an event that is too large": (says(Message("x" * (1 << 20) + "x")), "EVENT_TOO_LARGE", "The agent made an event"),
    "too long a stream": (says(*[Delta("x" * 1024)] * 1025), "EVENT_TOO_LARGE", "The agent made an event"),
    "too many bytes streamed": (says(*[Delta("é" * 1024)] * 600), "EVENT_TOO_LARGE", "The agent made an event"),
    "metadata that is no JSON": (says(Message("", {"a": Odd()})), "AGENT_FAILED", "The agent made an event whose meta"),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
@pytest.mark.parametrize("early", [False, True])
def test_agents_failure_is_data(path: Path, failure: tuple[Script, str, str], early: bool) -> None:
    """The turn failed, with a reason; what it had said stays; no secret gets out; the next run is served."""
    script, code, message = failure

    async def talk_and_fail(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        yield Message("so far")
        await asyncio.sleep(0)
        async with aclosing(script(turn)) as outputs:
            async for output in outputs:
                yield output

    async def main() -> None:
        agent = (EarlyAgent if early else ScriptedAgent)(talk_and_fail)
        async with runtime(path, agent) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED, FAILED)
            turn = run.turn
            assert turn.status is FAILED
            assert (turn.error_code or "").startswith(code)
            assert (turn.error or "").startswith(message)
            assert (turn.output or "").startswith(("so far", "x", "é"))
            events = await log_of(rt.store, run.id)
            assert contents(events)[:2] == ["hello", "so far"]
            last = events[-1]
            assert (last.role, last.log_type, last.log_level) == (EventRole.EXECUTION_LOG, "error", LogLevel.ERROR)
            assert last.content == turn.error
            assert SECRET not in repr(events) + repr(turn)
            assert all(len(event.content.encode()) <= 1 << 20 for event in events)
            await eventually(lambda: is_idle(rt))
            assert await is_served(rt)

    run_async(main())


@pytest.mark.parametrize("early", [False, True])
def test_failure_keeps_the_partial_text(path: Path, early: bool) -> None:
    """What was streamed of a message that never ended is an `incomplete` event, and the output."""

    async def main() -> None:
        script = fails(AgentError("Cut.", "MODEL_STREAM_CUT"), Message("one"), Delta("half "), Delta("a sen"))
        async with runtime(path, (EarlyAgent if early else ScriptedAgent)(script)) as rt:
            run = await rt.until_status(await rt.start(), FAILED)
            assert run.turn.output == "half a sen"
            events = await log_of(rt.store, run.id)
            assert [(e.content, e.log_type) for e in events] == [
                ("hello", None),
                ("one", None),
                ("half a sen", "incomplete"),
                ("Cut.", "error"),
            ]

    run_async(main())


def test_turn_that_takes_too_long_times_out(path: Path, kind: type[ScriptedAgent]) -> None:
    """TURN_TIMEOUT names the limit and the server; what was said stays."""

    async def main() -> None:
        agent = kind(waits(asyncio.Event(), Message("one"), Delta("half")))
        async with runtime(path, agent, turn_timeout_seconds=0.05) as rt:
            run = await rt.until_status(await rt.start(), FAILED)
            assert run.turn.error_code == "TURN_TIMEOUT"
            assert "0.05 s" in (run.turn.error or "")
            assert SERVER in (run.turn.error or "")
            assert (await stored(rt, run))[:3] == ["hello", "one", "half"]
            await eventually(lambda: agent.running == 0)
            await eventually(lambda: is_idle(rt))

    run_async(main())


def test_what_an_agent_has_at_once_it_may_say_at_once(path: Path) -> None:
    """A tuple is its members, one behind the other; however many, they do not share one commit."""

    async def main() -> None:
        async def script(_: TurnContext) -> AsyncGenerator[AgentSays]:
            yield (Delta("a"), Message("ab"), Log("line"), Delta("c"))
            yield Delta("d")
            yield ()
            yield tuple(Message(str(n)) for n in range(1_200))
            yield (Delta("e"), Delta("f"))

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED, FAILED)
            assert await stored(rt, run) == ["hello", "ab", "line", *map(str, range(1_200)), "ef"]
            assert run.turn.output == "ef"

    run_async(main())


@pytest.mark.parametrize("awaits", [True, False])
def test_piece_that_is_no_text_fails_the_turn(path: Path, awaits: bool) -> None:
    """Wherever it is read: when the agent awaits, or when it ends."""

    async def main() -> None:
        async def script(_: TurnContext) -> AsyncGenerator[AgentSays]:
            yield Log("before")
            yield Delta(5)  # type: ignore[arg-type]
            if awaits:
                await asyncio.sleep(0.01)
                yield Log("never stored")

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED, FAILED)
            assert (run.status, run.turn.error_code) == (FAILED, "AGENT_FAILED")
            assert (await stored(rt, run))[1] == "before"
            assert "never stored" not in await stored(rt, run)
            assert is_idle(rt)

    run_async(main())


def test_unstorable_characters_are_replaced(path: Path, kind: type[ScriptedAgent]) -> None:
    """Lone surrogates and NUL become U+FFFD wherever an agent puts them; a pair that is whole stays."""

    async def main() -> None:
        odd, even = "a\ud800\0\ud83d\ude00z", "a\ufffd\ufffd\U0001f600z"
        outputs: list[AgentOutput] = [
            Log(odd, LogLevel.INFO, odd),
            ToolCall("t" + odd, {}),
            ToolResult("t", odd),
            Delta(odd),
            Delta("\ud83d"),
            Delta("\ude00"),
            Message(odd),
        ]
        async with runtime(path, kind(says(*outputs))) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED, FAILED)
            assert run.status is COMPLETED
            events = await log_of(rt.store, run.id)
            assert contents(events)[1:] == [even, "t" + even, even, even]
            assert events[1].log_type == even
            assert run.turn.output == even
        half = kind(fails(AgentError("x"), Delta(odd)))
        async with runtime(path, half) as rt:
            run = await rt.until_status(await rt.start(), FAILED)
            assert run.turn.output == even

    run_async(main())


def test_agent_that_is_unavailable_accepts_nothing(path: Path, kind: type[ScriptedAgent]) -> None:
    """The caller is told what to do; nothing is stored and no room is taken."""

    async def main() -> None:
        agent = kind(says())
        async with runtime(path, agent, ExecutorLimits(max_turns=1)) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED)
            agent.reason = "Install it with: pip install it"
            for refused in (rt.start(), rt.resume(run)):
                with pytest.raises(AgentUnavailable, match="pip install it"):
                    await refused
            assert await stored(rt, run) == ["hello"]
            agent.reason = None
            assert await is_served(rt)

    run_async(main())


# Cancelling


def test_cancel_of_a_running_turn_keeps_what_was_said(path: Path, kind: type[ScriptedAgent]) -> None:
    """The partial text is an `incomplete` event and the output; the agent is told, and cleans up."""

    async def main() -> None:
        cleaned = asyncio.Event()

        async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
            try:
                yield Message("one")
                yield Delta("half ")
                yield Delta("a sen")
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.set()

        agent = kind(script)
        async with runtime(path, agent) as rt:
            run = await rt.start()
            follower = rt.event_log.follow(run, 0, FollowOptions(deltas=True))
            async for update in follower:
                if update.delta is not None:
                    break
            await follower.aclose()
            cancelled = await rt.cancel(run)
            assert (cancelled.status, cancelled.turn.output) == (CANCELLED, "half a sen")
            events = await log_of(rt.store, run.id)
            assert [(e.content, e.log_type) for e in events] == [
                ("hello", None),
                ("one", None),
                ("half a sen", "incomplete"),
                ("The run was cancelled.", "cancelled"),
            ]
            await cleaned.wait()
            assert await rt.cancel(run) == cancelled
            await eventually(lambda: is_idle(rt))
            assert await log_of(rt.store, run.id) == events

    run_async(main())


def test_cancel_of_a_queued_turn_never_runs_it(path: Path, kind: type[ScriptedAgent]) -> None:
    """It makes room in the queue, too."""

    async def main() -> None:
        go = asyncio.Event()
        agent = kind(waits(go))
        limits = ExecutorLimits(max_turns=1, max_queued=1, cancel_grace_seconds=0.05)
        async with runtime(path, agent, limits) as rt:
            running, queued = await rt.start("running"), await rt.start("queued")
            assert (await rt.cancel(queued)).status is CANCELLED
            third = await rt.start("third")
            go.set()
            await rt.until_status(running, COMPLETED)
            await rt.until_status(third, COMPLETED)
            assert agent.inputs == ["running", "third"]
            assert (await rt.get(queued)).status is CANCELLED
            await eventually(lambda: is_idle(rt))

    run_async(main())


def test_cancel_settles_the_running_and_the_queued_turns(path: Path, kind: type[ScriptedAgent]) -> None:
    """All of the run's, none of another's."""

    async def main() -> None:
        agent = kind(waits(asyncio.Event()))
        async with runtime(path, agent) as rt:
            run, other = await rt.start(), await rt.start()
            for n in range(3):
                await rt.resume(run, str(n))
            assert (await rt.cancel(run)).turn.number == 4
            assert {(await rt.get(run, n)).status for n in range(1, 5)} == {CANCELLED}
            assert (await rt.get(other)).status is RUNNING
            assert agent.inputs == ["hello", "hello"]
            await rt.cancel(other)
            await eventually(lambda: is_idle(rt))

    run_async(main())


def test_cancel_of_a_settled_run_shows_its_outcome(path: Path, kind: type[ScriptedAgent]) -> None:
    """And changes nothing."""

    async def main() -> None:
        async with runtime(path, kind(says(Message("a")))) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED)
            assert await rt.cancel(run) == run
            with pytest.raises(RunNotFound):
                await rt.executor.cancel_run(Cancel("other", SERVER, run.id))

    run_async(main())


def test_cancel_by_another_organization_does_not_disturb(path: Path) -> None:
    """RunNotFound; the agent goes on talking, nothing that it says is lost."""

    async def main() -> None:
        go = asyncio.Event()
        async with runtime(path, ScriptedAgent(waits(go, Message("one"), Delta("re: "))), None) as rt:
            run = await rt.start()
            for organization, server_id in (("other", SERVER), (ORGANIZATION, "other")):
                with pytest.raises(RunNotFound):
                    await rt.executor.cancel_run(Cancel(organization, server_id, run.id))
            go.set()
            await rt.until_status(run, COMPLETED)
            assert await stored(rt, run) == ["hello", "one", "re: hello"]

    run_async(main())


@pytest.mark.parametrize("seed", range(8))
def test_cancel_at_any_moment_gives_one_outcome(path: Path, seed: int, kind: type[ScriptedAgent]) -> None:
    """Completed with all that was said, or cancelled with a part of it from the beginning; never in between."""

    async def main() -> None:
        whole = ["hello", *(str(n) for n in range(20))]

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            for n in range(20):
                yield Message(str(n))
                for _ in range(int(turn.input == "hello") * (n % 3)):
                    await asyncio.sleep(0)

        async with runtime(path, kind(script)) as rt:
            for pauses in range(seed * 5, seed * 5 + 5):
                run = await rt.start()
                for _ in range(pauses):
                    await asyncio.sleep(0)
                told = await rt.cancel(run)
                events = await stored(rt, run)
                if told.status is COMPLETED:
                    assert events == whole
                else:
                    assert told.status is CANCELLED
                    assert events[:-1] == whole[: len(events) - 1]
                assert await rt.get(run) == told
                await eventually(lambda: is_idle(rt))
                assert await stored(rt, run) == events

    run_async(main())


def ignores(stop: asyncio.Event, *outputs: AgentOutput) -> Script:
    """Say these, then do not end before `stop`, although cancelled once and again; then say more."""

    async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
        if turn.turn > 1:
            yield Message(f"re: {turn.input}")
            return
        for output in outputs:
            yield output
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                await stop.wait()
        yield Message("too late")

    return script


def test_agent_that_ignores_its_cancellation_holds_up_nothing(path: Path, kind: type[ScriptedAgent]) -> None:
    """The outcome stands at once, the room is free after the grace period, and what it says later is dropped."""

    async def main() -> None:
        stop = asyncio.Event()
        agent = kind(ignores(stop, Message("one")))
        limits = ExecutorLimits(max_turns=1, cancel_grace_seconds=0.01)
        async with runtime(path, agent, limits) as rt:
            run = await rt.start()
            await until_said(rt, run, "one")
            assert (await rt.cancel(run)).status is CANCELLED
            events = await stored(rt, run)
            await eventually(lambda: is_idle(rt))
            assert agent.running == 1
            other = await rt.start("other")
            await eventually(lambda: agent.inputs == ["hello", "other"])
            stop.set()
            await rt.until_status(other, COMPLETED)
            await eventually(lambda: agent.running == 0)
            assert await stored(rt, run) == events
            await eventually(lambda: is_idle(rt))

    run_async(main())


def test_cancel_then_continue_at_once(path: Path, kind: type[ScriptedAgent]) -> None:
    """The next turn runs although the agent of the cancelled one has not ended; their events do not mix."""

    async def main() -> None:
        stop = asyncio.Event()
        agent = kind(ignores(stop, Message("one"), Delta("half")))
        async with runtime(path, agent, ExecutorLimits(cancel_grace_seconds=10)) as rt:
            run = await rt.start()
            await until_said(rt, run, "one")
            await rt.cancel(run)
            second = await rt.resume(run, "again")
            assert (second.turn.number, second.status) == (2, RUNNING)
            done = await rt.until_status(run, COMPLETED, turn=2)
            assert done.turn.output == "re: again"
            stop.set()
            await eventually(lambda: is_idle(rt))
            log_types = {event.content: event.turn for event in await log_of(rt.store, run.id)}
            assert log_types == {
                "hello": 1,
                "one": 1,
                "half": 1,
                "The run was cancelled.": 1,
                "again": 2,
                "re: again": 2,
            }

    run_async(main())


# Floods


@pytest.mark.parametrize("awaiting", [False, True])
def test_flood_of_events_is_stored_whole_in_bounded_memory(path: Path, awaiting: bool) -> None:
    """100,000 events of an agent that never waits, or hardly: all there, and few of them pending at any time."""
    count = 100_000 if not awaiting else 10_000

    async def main() -> None:
        most = 0

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            nonlocal most
            message = Message("x")
            for _ in range(count):
                yield message
                most = max(most, len(rt.executor._executions[turn.run_id]._speech.pending))
                if awaiting:
                    await asyncio.sleep(0)

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED)
            assert run.last_sequence == count + 1
            assert len(await log_of(rt.store, run.id)) == count + 1
            assert 0 < most <= 500

    run_async(main())


def test_flood_of_large_events_is_bounded_by_bytes(path: Path) -> None:
    """Few large ones wait, not 500."""

    async def main() -> None:
        most = 0

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            nonlocal most
            for _ in range(60):
                yield Message("x" * 500_000)
                most = max(most, len(rt.executor._executions[turn.run_id]._speech.pending))

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.until_status(await rt.start(), COMPLETED)
            assert run.last_sequence == 61
            assert most <= 3

    run_async(main())


def test_agent_that_never_awaits_lets_the_others_run(path: Path) -> None:
    """Neither another run nor its own cancel waits for it."""

    async def main() -> None:
        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            while turn.input == "endless":
                yield Delta("")
            yield Message("short")

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.start("endless")
            assert await is_served(rt)
            assert (await rt.cancel(run)).status is CANCELLED
            await eventually(lambda: is_idle(rt))

    run_async(main())


# Stopping and starting again


def test_drain_gives_running_turns_back_uncounted(path: Path, kind: type[ScriptedAgent]) -> None:
    """What was said stays, the half message as incomplete; after the restart the same attempt is made again."""

    async def main() -> None:
        agent = kind(waits(asyncio.Event(), Message("one"), Delta("half")))
        limits = ExecutorLimits(max_turns=1, cancel_grace_seconds=0.05)
        async with runtime(path, agent, limits) as rt:
            run = await rt.start("first")
            waiting = await rt.start("second")
            await until_said(rt, run, "one")
            await rt.executor.drain(0)
            for refused in (rt.start(), rt.resume(run)):
                with pytest.raises(Draining):
                    await refused
            released = await rt.get(run)
            assert (released.status, released.turn.attempt) == (QUEUED, 0)
            assert await stored(rt, run) == ["first", "one", "half"]
            assert agent.inputs == ["first"]
            assert agent.running == 0
        attempts: list[tuple[str, int]] = []

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            attempts.append((turn.input, turn.attempt))
            yield Message("again")

        async with runtime(path, kind(script), limits) as rt:
            done = await rt.until_status(run, COMPLETED)
            await rt.until_status(waiting, COMPLETED)
            assert attempts == [("first", 1), ("second", 1)]
            assert done.turn.output == "again"
            assert await stored(rt, run) == ["first", "one", "half", ATTEMPT_BEGINS.format(attempt=1), "again"]

    run_async(main())


@pytest.mark.parametrize(
    ("end", "repeatable", "goes_on"), [("drain", True, True), ("drain", False, False), ("cancel", True, False)]
)
def test_agent_is_told_whether_its_turn_goes_on(path: Path, end: str, repeatable: bool, goes_on: bool) -> None:
    """After a stop it does, if it may be begun again; after a cancel it does not."""
    told: list[bool] = []

    async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
        yield Message("one")
        try:
            await asyncio.Event().wait()
        finally:
            told.append(turn.goes_on)

    async def main() -> None:
        async with runtime(path, ScriptedAgent(script, repeatable=repeatable)) as rt:
            run = await rt.start()
            await until_said(rt, run, "one")
            await (rt.executor.drain(0) if end == "drain" else rt.cancel(run))
            await eventually(lambda: told == [goes_on])

    run_async(main())


def test_drain_lets_turns_end_within_the_grace_period(path: Path, kind: type[ScriptedAgent]) -> None:
    """A turn that ends by itself is completed, and drain returns as soon as nothing runs."""

    async def main() -> None:
        go = asyncio.Event()
        async with runtime(path, kind(waits(go))) as rt:
            run = await rt.start()
            draining = asyncio.create_task(rt.executor.drain(3_600))
            await asyncio.sleep(0)
            assert not draining.done()
            go.set()
            await draining
            assert (await rt.get(run)).status is COMPLETED

    run_async(main())


def test_drain_does_not_wait_for_an_agent_that_ignores_it(path: Path) -> None:
    """Its turn goes back to the queue all the same; what it says later is dropped."""

    async def main() -> None:
        stop = asyncio.Event()
        async with runtime(path, ScriptedAgent(ignores(stop, Message("one")))) as rt:
            run = await rt.start()
            await until_said(rt, run, "one")
            await rt.executor.drain(0)
            assert (await rt.get(run)).status is QUEUED
            stop.set()
            await eventually(lambda: not rt.executor._tasks)
            assert await stored(rt, run) == ["hello", "one"]

    run_async(main())


def test_drain_waits_for_what_is_being_accepted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start whose commit is under way when the drain begins is accepted, and its turn is not lost."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        async with runtime(path, ScriptedAgent(waits(asyncio.Event()))) as rt:
            with disk.held():
                starting = asyncio.create_task(rt.start())
                await eventually(lambda: disk.holding)
                draining = asyncio.create_task(rt.executor.drain(0))
                await asyncio.sleep(0)
            run = await starting
            await draining
            assert (await rt.get(run)).status is QUEUED

    run_async(main())


def crash_image(path: Path, name: str) -> Path:
    """Copy the store's files as they lie on the disk now; returns the copy, over which a store can be opened."""
    copy = path.parent.parent / name
    shutil.copytree(path.parent, copy, ignore=shutil.ignore_patterns("*-shm"))
    return copy / path.name


def test_crash_loses_no_accepted_run(path: Path, kind: type[ScriptedAgent]) -> None:
    """Queued turns are executed afterwards, the one that was running is begun again, as attempt 2."""

    async def main() -> None:
        limits = ExecutorLimits(max_turns=1, cancel_grace_seconds=0.05)
        async with runtime(path, kind(waits(asyncio.Event(), Message("one"))), limits) as rt:
            run = await rt.start("first")
            await until_said(rt, run, "one")
            others = [await rt.start(str(n)) for n in range(3)]
            more = await rt.resume(run, "more")
            image = crash_image(path, "crashed")
        attempts: list[tuple[str, int]] = []

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            attempts.append((turn.input, turn.attempt))
            yield Message("again")

        async with runtime(image, kind(script), limits) as rt:
            await rt.until_status(more, COMPLETED, turn=2)
            for other in others:
                await rt.until_status(other, COMPLETED)
            assert sorted(attempts) == [("0", 1), ("1", 1), ("2", 1), ("first", 2), ("more", 1)]
            events = await log_of(rt.store, run.id)
            texts = [event.content if event.log_type is None else event.log_type for event in events]
            assert texts == ["first", "one", "more", "attempt", "again", "again"]

    run_async(main())


def test_crash_of_what_may_not_be_repeated_fails_it(path: Path) -> None:
    """RUNTIME_LOST, at once; the agent is not asked again."""

    async def main() -> None:
        async with runtime(path, ScriptedAgent(waits(asyncio.Event(), Message("one")))) as rt:
            run = await rt.start()
            await until_said(rt, run, "one")
            image = crash_image(path, "crashed")
        agent = ScriptedAgent(says(), repeatable=False)
        async with runtime(image, agent) as rt:
            lost = await rt.get(run)
            assert (lost.status, lost.turn.error_code) == (FAILED, "RUNTIME_LOST")
            assert agent.inputs == []
            await rt.until_status(await rt.resume(run), COMPLETED, turn=2)

    run_async(main())


def test_crash_loses_little_of_the_text_in_the_making(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft is kept as it grows, and is an `incomplete` event after the crash."""
    monkeypatch.setattr(execution_module, "_DRAFT_SECONDS", 0.01)

    def draft() -> str | None:
        # By the store's own library: another copy of SQLite in this process would undo its locks.
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        found = connection.execute("SELECT draft FROM turns").get
        connection.close()
        assert found is None or isinstance(found, str)
        return found

    async def main() -> None:
        step = asyncio.Event()

        async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
            yield Delta("one ")
            yield Delta("two ")
            await step.wait()
            step.clear()
            yield Delta("three")
            await step.wait()
            step.clear()
            yield Message("one two three")
            await step.wait()

        async with runtime(path, ScriptedAgent(script)) as rt:
            run = await rt.start()
            await eventually(lambda: draft() == "one two ")
            step.set()
            await eventually(lambda: draft() == "one two three")
            image = crash_image(path, "half")
            step.set()
            await until_said(rt, run, "one two three")
            assert draft() is None
            whole = crash_image(path, "whole")
            step.set()
            await rt.until_status(run, COMPLETED)
        for at, log_type in ((image, "incomplete"), (whole, None)):
            async with runtime(at, ScriptedAgent(says(), repeatable=False)) as rt:
                events = await log_of(rt.store, run.id)
                texts = [(event.content, event.log_type) for event in events[:-1]]
                assert texts == [("hello", None), ("one two three", log_type)]

    run_async(main())


def test_server_that_is_not_declared_any_more_fails_its_turns(path: Path, kind: type[ScriptedAgent]) -> None:
    """A queued turn fails as SERVER_NOT_FOUND, one that ran as RUNTIME_LOST; others are served."""

    async def main() -> None:
        store = await SQLiteStore.open(path)
        queued = (await store.start_run(new_run(server_id="gone"), claim=False)).run
        running = (await store.start_run(new_run(server_id="gone"), claim=True)).run
        await store.close()
        agent = kind(says())
        async with runtime(path, agent, ExecutorLimits(max_turns=1)) as rt:
            failed = await rt.until_status(queued, FAILED)
            assert failed.turn.error_code == "SERVER_NOT_FOUND"
            assert "'gone'" in (failed.turn.error or "")
            assert (await log_of(rt.store, queued.id))[-1].log_type == "error"
            assert (await rt.get(running)).turn.error_code == "RUNTIME_LOST"
            await eventually(lambda: is_idle(rt))
            assert await is_served(rt)

    run_async(main())


# A store that fails


@pytest.mark.usefixtures("quick_retries")
def test_store_that_fails_for_a_while_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ScriptedAgent]
) -> None:
    """Whatever the moment at which commits begin to fail, and for how long: once they do not, all is stored once."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
            for n in range(6):
                yield Message(str(n))
                for _pause in range(n):
                    await asyncio.sleep(0.001)

        async with runtime(path, kind(script), ExecutorLimits(max_turns=1, cancel_grace_seconds=0.05)) as rt:
            for moment in range(7):
                run = await rt.start()
                waiting = await rt.start("waits")
                if moment:
                    await until_said(rt, run, str(moment - 1))
                disk.refuse = 7
                for each in (run, waiting):
                    await rt.until_status(each, COMPLETED)
                    assert (await stored(rt, each))[1:] == [str(n) for n in range(6)]
                assert disk.refuse == 0
            await eventually(lambda: is_idle(rt))

    run_async(main())


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_store_that_refuses_a_start_accepts_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ScriptedAgent], failures: int
) -> None:
    """Not even where the agent began early: its turn is dropped, its room is free."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        agent = kind(waits(asyncio.Event(), Message("one"), Delta("half")))
        async with runtime(path, agent, ExecutorLimits(max_turns=1, cancel_grace_seconds=0.05)) as rt:
            for _ in range(3):
                disk.refuse = failures + 5
                with pytest.raises(StoreUnavailable):
                    await rt.start()
                disk.refuse = 0
                await eventually(lambda: is_idle(rt))
                assert agent.running == 0
            page = await rt.store.list_runs(ORGANIZATION, SERVER, status=None, token=None, limit=10)
            assert page.runs == []
            run = await rt.start()
            await until_said(rt, run, "one")
            await rt.cancel(run)

    run_async(main())


@pytest.mark.usefixtures("quick_retries")
def test_cancel_that_cannot_be_written_leaves_the_turn_running(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ScriptedAgent]
) -> None:
    """StoreUnavailable; the agent talks on meanwhile, and everything is there in the end, the streamed text too."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        step = asyncio.Event()

        async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
            yield Message("one")
            yield Delta("a")
            await step.wait()
            yield Delta("b")
            yield Message("abc")
            yield Message("two")
            yield Delta("d")

        async with runtime(path, kind(script)) as rt:
            run = await rt.start()
            await until_said(rt, run, "one")
            with disk.held():
                cancelling = asyncio.create_task(rt.cancel(run))
                await eventually(lambda: disk.holding)
                step.set()
                for _ in range(20):
                    await asyncio.sleep(0)
                disk.refuse = 2
            with pytest.raises(StoreUnavailable):
                await cancelling
            disk.refuse = 0
            done = await rt.until_status(run, COMPLETED)
            assert done.turn.output == "d"
            assert await stored(rt, run) == ["hello", "one", "abc", "two", "d"]
            await eventually(lambda: is_idle(rt))

    run_async(main())


@pytest.mark.usefixtures("quick_retries")
def test_turn_times_out_behind_a_cancel_that_cannot_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ScriptedAgent]
) -> None:
    """TURN_TIMEOUT also where the agent waited for the cancel when its time was over; its room is free."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        step = asyncio.Event()

        async def script(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
            yield Message("one")
            await step.wait()
            while turn.input == "talk":
                yield Log("on and on")

        async with runtime(path, kind(script)) as rt:
            run = await rt.start("talk")
            await until_said(rt, run, "one")
            execution = rt.executor._executions[run.id]
            with disk.held():
                cancelling = asyncio.create_task(rt.cancel(run))
                await eventually(lambda: disk.holding)
                step.set()
                await eventually(lambda: execution._unheld is not None)
                execution.expire()
                await eventually(lambda: execution._settling)
                disk.refuse = 2
            with pytest.raises(StoreUnavailable):
                await cancelling
            disk.refuse = 0
            done = await rt.until_status(run, FAILED)
            assert done.turn.error_code == "TURN_TIMEOUT"
            await eventually(lambda: is_idle(rt))
            assert await is_served(rt)

    run_async(main())


@pytest.mark.usefixtures("quick_retries")
def test_server_not_declared_is_settled_once_the_store_takes_writes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage at that moment does not leave the turn running for ever."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        store = await SQLiteStore.open(path)
        queued = (await store.start_run(new_run(server_id="gone"), claim=False)).run
        await store.close()
        async with runtime(path, ScriptedAgent(says())) as rt:
            await rt.until_status(queued, RUNNING, FAILED)
            disk.refuse = 3
            await rt.until_status(queued, FAILED)
            disk.refuse = 0
            await eventually(lambda: is_idle(rt))

    run_async(main())


@pytest.mark.usefixtures("quick_retries")
def test_drain_ends_while_the_store_takes_no_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be given back stays as running in the store, and is recovered by the next start."""
    disk = Disk(monkeypatch)

    async def main() -> None:
        async with runtime(path, ScriptedAgent(waits(asyncio.Event(), Message("one"), Message("two")))) as rt:
            run = await rt.start()
            await until_said(rt, run, "two")
            quiet = await rt.start()
            await until_said(rt, quiet, "two")
            disk.refuse = 1_000_000
            rt.executor._executions[run.id]._add(Message("three"))
            await asyncio.wait_for(rt.executor.drain(0.05), 10)
            disk.refuse = 0
            assert (await rt.get(run)).status is RUNNING
        async with runtime(path, ScriptedAgent(says(Message("again")))) as rt:
            for each in (run, quiet):
                assert (await rt.until_status(each, COMPLETED)).turn.attempt == 2

    run_async(main())


def test_turn_that_was_taken_away_writes_nothing_more(path: Path) -> None:
    """Settled behind its back, the agent is stopped at its next word, and the room is free."""

    async def main() -> None:
        go = asyncio.Event()

        async def script(_: TurnContext) -> AsyncGenerator[AgentOutput]:
            yield Message("one")
            await go.wait()
            while True:
                yield Message("late")
                await asyncio.sleep(0)

        agent = ScriptedAgent(script)
        async with runtime(path, agent) as rt:
            run = await rt.start()
            await until_said(rt, run, "one")
            await rt.store.cancel_run(Cancel(ORGANIZATION, SERVER, run.id), said("taken"), None)
            go.set()
            await eventually(lambda: agent.running == 0)
            await eventually(lambda: is_idle(rt))
            assert (await stored(rt, run))[1:3] == ["one", "taken"]
            assert "late" not in await stored(rt, run)
            assert key_of(run).turn == 1

    run_async(main())


Ask = Callable[[Runtime, Run], Awaitable[object]]


def test_no_request_waits_for_an_agent(path: Path, kind: type[ScriptedAgent]) -> None:
    """Start, continue and cancel answer while the agent does nothing at all."""

    async def main() -> None:
        async with runtime(path, kind(waits(asyncio.Event()))) as rt:
            run = await asyncio.wait_for(rt.start(), 5)
            await asyncio.wait_for(rt.resume(run), 5)
            assert (await asyncio.wait_for(rt.cancel(run), 5)).status is CANCELLED

    run_async(main())
