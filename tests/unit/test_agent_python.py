"""The `python` agent: what an entrypoint may be, what it may say, and how it ends."""

import asyncio
import sys
import threading
import types
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime_service.agents import (
    AgentError,
    AgentOutput,
    AgentSays,
    Delta,
    HistoryMessage,
    Log,
    Message,
    TurnContext,
)
from runtime_service.agents.python import BlockingTurnContext, PythonAgent, PythonOptions
from runtime_service.runs import EventRole
from tests.support import GivenSurroundings

LIMIT_SECONDS = 10
MODULE = "agent_of_the_tests"


@pytest.fixture
def make_agent(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], PythonAgent]:
    """Return a function that makes an agent of a function, through its entrypoint."""

    def make(function: object) -> PythonAgent:
        module = types.ModuleType(MODULE)
        module.agent = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, MODULE, module)
        return PythonAgent(PythonOptions(f"{MODULE}:agent"))

    return make


def turn_of(text: str = "hello", history: list[HistoryMessage] | None = None) -> TurnContext:
    """A turn with this input, after this history."""

    return TurnContext(input=text, metadata={"k": 1}, run_id="run_1", surroundings=GivenSurroundings(history))


def outputs_of(agent: PythonAgent, turn: TurnContext | None = None) -> list[AgentSays]:
    """Everything that the agent says in one turn."""

    async def collect() -> list[AgentSays]:
        async with asyncio.timeout(LIMIT_SECONDS):
            return [output async for output in agent.run(turn or turn_of())]

    return asyncio.run(collect())


async def async_generator(turn: TurnContext) -> AsyncGenerator[AgentOutput | str]:
    yield Log("thinking")
    yield turn.input


async def async_function(turn: TurnContext) -> str:
    return turn.input


def generator(turn: TurnContext) -> Iterator[AgentOutput | str]:
    yield Log("thinking")
    yield turn.input


def function(turn: TurnContext) -> Message:
    return Message(turn.input)


class AsyncCallable:
    async def __call__(self, turn: TurnContext) -> str:
        return turn.input


@pytest.mark.parametrize(
    ("entrypoint", "outputs"),
    [
        (async_generator, [Log("thinking"), Message("hello")]),
        (async_function, [Message("hello")]),
        (generator, [Log("thinking"), Message("hello")]),
        (function, [Message("hello")]),
        (AsyncCallable(), [Message("hello")]),
    ],
)
def test_python_agent_calls_every_kind_of_function(
    make_agent: Callable[[object], PythonAgent], entrypoint: object, outputs: list[AgentOutput]
) -> None:
    """Outputs come in order, and a plain string is an assistant's message."""
    assert outputs_of(make_agent(entrypoint)) == outputs


@pytest.mark.parametrize("blocking", [False, True])
def test_python_agent_says_at_once_what_it_has_at_once(
    make_agent: Callable[[object], PythonAgent], blocking: bool
) -> None:
    """A tuple of outputs stays one; strings in it are messages, too."""

    def yielding(turn: TurnContext) -> Iterator[object]:
        yield Delta("h"), Delta("ello"), turn.input
        yield ()

    async def async_yielding(turn: TurnContext) -> AsyncGenerator[object]:
        for output in yielding(turn):
            yield output

    said = outputs_of(make_agent(yielding if blocking else async_yielding))
    assert said == [(Delta("h"), Delta("ello"), Message("hello")), ()]


@pytest.mark.parametrize("blocking", [False, True])
def test_python_agent_says_nothing_for_none(make_agent: Callable[[object], PythonAgent], blocking: bool) -> None:
    """A function that returns None has said nothing."""

    async def silent(turn: TurnContext) -> None:
        return None

    assert outputs_of(make_agent((lambda turn: None) if blocking else silent)) == []


def test_python_agent_reads_history_in_both_worlds(make_agent: Callable[[object], PythonAgent]) -> None:
    """An async agent awaits the history, a blocking one has `blocking_history()`; both see the whole turn."""
    history = [HistoryMessage(EventRole.USER, "before")]

    async def waiting(turn: TurnContext) -> str:
        return f"{(await turn.history())[0].content} {turn.metadata} {turn.run_id}"

    def blocking(turn: BlockingTurnContext) -> str:
        return f"{turn.blocking_history()[0].content} {turn.metadata} {turn.run_id}"

    expected: list[AgentSays] = [Message("before {'k': 1} run_1")]
    assert outputs_of(make_agent(waiting), turn_of(history=history)) == expected
    assert outputs_of(make_agent(blocking), turn_of(history=history)) == expected


@pytest.mark.parametrize("said", [42, None, b"bytes", ["list"], ("fine", ["list"])])
@pytest.mark.parametrize("blocking", [False, True])
def test_python_agent_refuses_other_outputs(
    make_agent: Callable[[object], PythonAgent], said: object, blocking: bool
) -> None:
    """What is neither a string nor an output fails the turn in words that name it."""

    def yielding(turn: TurnContext) -> Iterator[object]:
        yield said

    async def async_yielding(turn: TurnContext) -> AsyncGenerator[object]:
        yield said

    wrong = said[-1] if isinstance(said, tuple) else said
    with pytest.raises(AgentError, match=f"said a {type(wrong).__name__}; may say strings") as caught:
        outputs_of(make_agent(yielding if blocking else async_yielding))
    assert caught.value.code == "AGENT_OUTPUT_INVALID"


@pytest.mark.parametrize("error", [AgentError("no", "NOT_TODAY"), KeyError("x")])
@pytest.mark.parametrize("blocking", [False, True])
def test_python_agent_raises_what_the_function_raised(
    make_agent: Callable[[object], PythonAgent], error: Exception, blocking: bool
) -> None:
    """An error comes after what was said before it, and as it was raised."""

    def failing(turn: TurnContext) -> Iterator[str]:
        yield "before"
        raise error

    async def async_failing(turn: TurnContext) -> AsyncGenerator[str]:
        yield "before"
        raise error

    async def collect() -> None:
        async with aclosing(make_agent(failing if blocking else async_failing).run(turn_of())) as outputs:
            assert await anext(outputs) == Message("before")
            with pytest.raises(type(error)) as caught:
                await anext(outputs)
        assert caught.value is error

    asyncio.run(collect())


@pytest.mark.parametrize("blocking", [False, True])
def test_python_agent_survives_sys_exit(make_agent: Callable[[object], PythonAgent], blocking: bool) -> None:
    """An agent that calls sys.exit() ends its turn, not the service."""

    def leaving(turn: TurnContext) -> None:
        sys.exit(3)

    async def async_leaving(turn: TurnContext) -> None:
        sys.exit(3)

    with pytest.raises(AgentError, match=r"called sys\.exit"):
        outputs_of(make_agent(leaving if blocking else async_leaving))


def test_python_agent_holds_back_a_fast_blocking_agent(make_agent: Callable[[object], PythonAgent]) -> None:
    """An agent that could say 100,000 things is never far ahead of the one who reads them."""
    said = 0
    closed = threading.Event()

    def talkative(turn: TurnContext) -> Iterator[Delta]:
        nonlocal said
        try:
            for _ in range(100_000):
                said += 1
                yield Delta("x")
        finally:
            closed.set()

    async def read_ten() -> None:
        async with aclosing(make_agent(talkative).run(turn_of())) as outputs:
            for number in range(10):
                await anext(outputs)
                assert said <= number + 100
        assert await asyncio.to_thread(closed.wait, LIMIT_SECONDS)
        assert said <= 110

    asyncio.run(read_ten())


def test_python_agent_hands_on_all_of_many_outputs(make_agent: Callable[[object], PythonAgent]) -> None:
    """Nothing is lost or changes places between the thread and the loop."""

    def counting(turn: TurnContext) -> Iterator[str]:
        yield from map(str, range(20_000))

    said = outputs_of(make_agent(counting))
    assert said == [Message(str(number)) for number in range(20_000)]


def test_python_agent_closes_a_cancelled_generator_at_its_next_yield(
    make_agent: Callable[[object], PythonAgent],
) -> None:
    """Cancelling takes effect at once for the turn, and for the generator where it yields next."""
    proceed, closed, went_on = threading.Event(), threading.Event(), threading.Event()

    def slow(turn: TurnContext) -> Iterator[str]:
        try:
            yield "first"
            proceed.wait(LIMIT_SECONDS)
            yield "second"
            went_on.set()
        finally:
            closed.set()

    async def cancel() -> None:
        read = asyncio.Event()

        async def consume() -> None:
            async for _ in make_agent(slow).run(turn_of()):
                read.set()

        task = asyncio.create_task(consume())
        await read.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not closed.is_set()
        proceed.set()
        assert await asyncio.to_thread(closed.wait, LIMIT_SECONDS)
        assert not went_on.is_set()

    asyncio.run(cancel())


def test_python_agent_closes_a_cancelled_async_generator(
    make_agent: Callable[[object], PythonAgent],
) -> None:
    """An async agent is cancelled where it awaits, and has cleaned up before the turn has ended."""
    cleaned = []

    async def waiting(turn: TurnContext) -> AsyncGenerator[str]:
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    async def cancel() -> None:
        read = asyncio.Event()

        async def consume() -> None:
            async for _ in make_agent(waiting).run(turn_of()):
                read.set()

        task = asyncio.create_task(consume())
        await read.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned == [True]

    asyncio.run(cancel())


def test_python_agent_is_not_held_up_by_a_function_that_never_returns(
    make_agent: Callable[[object], PythonAgent],
) -> None:
    """Its turn ends at its limit, and its thread is one that the process does not wait for."""
    started = threading.Event()
    threads: list[threading.Thread] = []
    never = threading.Event()

    def stuck(turn: TurnContext) -> None:
        threads.append(threading.current_thread())
        started.set()
        never.wait()

    async def run_out_of_time() -> None:
        task = asyncio.create_task(anext(make_agent(stuck).run(turn_of())))
        assert await asyncio.to_thread(started.wait, LIMIT_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    try:
        asyncio.run(run_out_of_time())
        assert threads[0].is_alive()
        assert threads[0].daemon
    finally:
        never.set()
        threads[0].join(LIMIT_SECONDS)


@pytest.mark.parametrize(
    ("source", "entrypoint", "words"),
    [
        ("", "no_such_module_here:agent", "there is no module 'no_such_module_here'"),
        ("", "agent_file.sub:agent", "there is no module 'agent_file.sub'"),
        ("import no_such_dependency", "agent_file:agent", "needs 'no_such_dependency'"),
        ("def agent(:", "agent_file:agent", "importing agent_file raised SyntaxError"),
        ("1 / 0", "agent_file:agent", "raised ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(2)", "agent_file:agent", "raised SystemExit: 2"),
        ("", "agent_file:agent", "the module agent_file has no 'agent'"),
        ("agent = 3", "agent_file:agent", "is no function but a int"),
        ("def agent(): ...", "agent_file:agent", "must be callable with one argument"),
        ("def agent(turn, more): ...", "agent_file:agent", "must be callable with one argument"),
    ],
)
def test_python_agent_says_at_once_what_is_wrong_with_its_entrypoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, entrypoint: str, words: str
) -> None:
    """A mistake is seen when the agent is made, not when it is first asked."""
    (tmp_path / "agent_file.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "agent_file", raising=False)
    with pytest.raises(ValueError, match="entrypoint") as caught:
        PythonAgent(PythonOptions(entrypoint))
    assert words in str(caught.value)


@pytest.mark.parametrize("entrypoint", ["", "module", "module:", ":name", "a b:c", "a:b.c", "a..b:c"])
def test_python_options_refuse_what_is_no_entrypoint(entrypoint: str) -> None:
    """An entrypoint is `package.module:name`."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"entrypoint": entrypoint}, PythonOptions)


def test_python_agent_is_repeatable_unless_said_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """`repeatable` is the option's."""
    module: Any = types.ModuleType(MODULE)
    module.agent = function
    monkeypatch.setitem(sys.modules, MODULE, module)
    assert PythonAgent(PythonOptions(f"{MODULE}:agent")).repeatable
    assert not PythonAgent(PythonOptions(f"{MODULE}:agent", repeatable=False)).repeatable
