"""The `a2a` agent with the official client, against the official library's server."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from a2a.helpers.proto_helpers import new_data_part, new_raw_part, new_text_part, new_url_part
from a2a.server.agent_execution import RequestContext
from a2a.server.tasks import TaskUpdater
from a2a.types import Role, TaskState

from runtime_service.agent_check import check_agent
from runtime_service.agent_events import event_from, size_of
from runtime_service.agents import (
    AgentError,
    AgentOutput,
    AgentSays,
    Answer,
    AnsweredBy,
    Delta,
    Log,
    Message,
    TurnContext,
)
from runtime_service.agents.a2a.agent import A2AAgent
from runtime_service.agents.a2a.options import A2AOptions
from runtime_service.registry import Server
from runtime_service.runs import LogLevel, Run, RunStatus
from tests.a2a_server import Remote, Script, serving
from tests.support import GivenSurroundings, Runtime, contents, eventually, log_of, run_async, runtime

ANSWER = Answer(AnsweredBy.CALLER, text="blue")


def turn_with(text: str = "hi", surroundings: GivenSurroundings | None = None, **more: Any) -> TurnContext:
    """A turn of the run `run`."""
    given = surroundings or GivenSurroundings()
    return TurnContext(input=text, metadata={}, run_id="run", surroundings=given, **more)


async def outputs_of(agent: A2AAgent, turn: TurnContext | None = None) -> list[AgentOutput]:
    """What an agent says in a turn; all of it can be stored."""
    said: list[AgentOutput] = []
    async with aclosing(agent.run(turn or turn_with())) as outputs:
        async for output in outputs:
            said += output if isinstance(output, tuple) else (output,)
    for each in said:
        if not isinstance(each, Delta):
            size_of(event_from(each))
    return said


def with_agent(
    remote: Remote,
    check: Callable[[A2AAgent], Awaitable[object]],
    *,
    streaming: bool = True,
    binding: str = "JSONRPC",
    version: str = "1.0",
    **options: Any,
) -> None:
    """Run `check` with an agent whose remote one is served."""

    async def main() -> None:
        async with serving(remote, streaming=streaming, binding=binding, version=version) as url:
            agent = A2AAgent(A2AOptions(url, **options))
            try:
                await check(agent)
            finally:
                await agent.close()

    run_async(main())


def answer_of(script: Script, turn: TurnContext | None = None, **how: Any) -> list[AgentOutput]:
    """What the agent says when the remote one does this; the first log, which has the task, is left out."""
    said: list[AgentOutput] = []

    async def check(agent: A2AAgent) -> None:
        said.extend(await outputs_of(agent, turn))

    with_agent(Remote(script), check, **how)
    assert task_log_of(said) == said[0]
    return said[1:]


def task_log_of(said: list[AgentOutput]) -> Log:
    """The log by which a task is found again."""
    (log,) = [output for output in said if isinstance(output, Log) and output.type == "a2a_task"]
    return log


def messages_of(said: list[AgentOutput]) -> list[str]:
    """The whole messages that were said."""
    return [output.content for output in said if isinstance(output, Message)]


def logs_of(said: list[AgentOutput], log_type: str) -> list[Log]:
    """The logs of a type."""
    return [output for output in said if isinstance(output, Log) and output.type == log_type]


async def say_hello(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
    """Answer with a message."""
    await remote.say_only("Hello you", context)


async def count(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
    """Answer with an artifact in three pieces."""
    await remote.begin_task(context)
    await task.start_work(task.new_agent_message([new_text_part("counting")]))
    for n, text in enumerate(["one ", "two ", "three"]):
        await task.add_artifact([new_text_part(text)], "a", "numbers", append=n > 0, last_chunk=n == 2)
    await task.complete()


async def ask_colour(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
    """Ask for a colour, then say it."""
    await remote.begin_task(context)
    if context.current_task is None:
        await task.requires_input(task.new_agent_message([new_text_part("Which colour?")]))
    else:
        await task.start_work()
        await task.complete(task.new_agent_message([new_text_part(f"It is {context.get_user_input()}.")]))


def work_until(done: asyncio.Event) -> Script:
    """Say a first piece, work until `done`, say the rest."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        await task.add_artifact([new_text_part("first, ")], "a")
        await done.wait()
        await task.add_artifact([new_text_part("then")], "a", append=True, last_chunk=True)
        await task.complete()

    return script


def ending(state: TaskState, text: str = "") -> Script:
    """Make a task that comes to this state at once."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        await task.update_status(state, task.new_agent_message([new_text_part(text)]) if text else None)

    return script


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("binding", ["JSONRPC", "HTTP+JSON"])
def test_a2a_agent_says_a_message(binding: str, streaming: bool) -> None:
    """What an agent answers without a task is a message, and needs no deltas."""
    (message,) = answer_of(say_hello, binding=binding, streaming=streaming)
    assert isinstance(message, Message)
    assert message.content == "Hello you"
    assert set(message.metadata or {}) == {"messageId"}


@pytest.mark.parametrize("version", ["1.0", "0.3"])
@pytest.mark.parametrize("binding", ["JSONRPC", "HTTP+JSON"])
def test_a2a_agent_streams_an_artifact(binding: str, version: str) -> None:
    """The pieces of an artifact are deltas, the last one ends the message; a status message is a log."""
    status, *said = answer_of(count, binding=binding, version=version)
    assert isinstance(status, Log)
    assert (status.content, status.type, (status.metadata or {})["state"]) == ("counting", "status", "working")
    metadata = {"taskId": (status.metadata or {})["taskId"], "artifactId": "a", "name": "numbers"}
    assert said == [Delta("one "), Delta("two "), Delta("three"), Message("one two three", metadata)]


@pytest.mark.parametrize("how", [{"streaming": False}, {"options": {"streaming": False}}])
def test_a2a_agent_polls_where_there_is_no_stream(how: dict[str, Any]) -> None:
    """Where the card has no streaming, or the options do not want it, the task is asked for until it has ended."""
    options = how.pop("options", {})

    done = asyncio.Event()

    async def check(agent: A2AAgent) -> None:
        said: list[AgentOutput] = []
        async with aclosing(agent.run(turn_with())) as outputs:
            async for output in outputs:
                said += output if isinstance(output, tuple) else (output,)
                if Delta("first, ") in said:
                    done.set()
        assert messages_of(said) == ["first, then"]
        assert [output for output in said if isinstance(output, Delta)] == [Delta("first, "), Delta("then")]

    with_agent(Remote(work_until(done)), check, **how, **options)


def test_a2a_agent_says_what_files_and_data_are() -> None:
    """Files and data are logs with metadata; what is large is left out, and said to be."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        parts = [
            new_raw_part(b"x" * 3_000_000, "image/png", "cat.png"),
            new_url_part("https://example.com/dog.png", "image/png"),
            new_url_part("data:," + "y" * 20_000),
            new_data_part({"n": 1, "list": [1.5, True, None, "s"]}),
            new_data_part({"large": "z" * 100_000}),
        ]
        await task.add_artifact(parts, "b", "things", metadata={"by": "hand"}, last_chunk=True)
        await task.add_artifact([new_url_part("https://e.com")] * 60, "c", last_chunk=True)
        await task.complete(task.new_agent_message([new_text_part("done"), new_data_part({"m": 2})]))

    things, many, message = answer_of(script)
    assert isinstance(things, Log)
    assert things.type == "artifact"
    assert things.content.startswith("things: cat.png (image/png, 3000000 bytes), file (image/png), ")
    metadata = dict(things.metadata or {})
    assert metadata["metadata"] == {"by": "hand"}
    assert metadata["parts"][:2] == [
        {"kind": "file", "mediaType": "image/png", "filename": "cat.png", "bytes": 3_000_000},
        {"kind": "file", "mediaType": "image/png", "url": "https://example.com/dog.png"},
    ]
    assert metadata["parts"][2]["omittedBytes"] > 20_000
    assert metadata["parts"][3] == {"kind": "data", "data": {"n": 1, "list": [1.5, True, None, "s"]}}
    assert metadata["parts"][4]["omittedBytes"] > 100_000
    assert len(str(metadata)) < 2_000
    assert isinstance(many, Log)
    assert (many.metadata or {})["parts"][50:] == [{"omittedParts": 10}]
    assert isinstance(message, Message)
    assert message.content == "done"
    assert (message.metadata or {})["parts"] == [{"kind": "data", "data": {"m": 2}}]


def test_a2a_agent_says_artifacts_that_take_turns_as_messages_of_their_own() -> None:
    """A message ends where another artifact speaks, or the same one begins anew."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        await task.add_artifact([new_text_part("a1 ")], "a")
        await task.add_artifact([new_text_part("b1 ")], "b")
        await task.add_artifact([new_text_part("a2 ")], "a", append=True)
        await task.add_artifact([new_text_part("a3 ")], "a")
        await task.complete()

    assert messages_of(answer_of(script)) == ["a1 ", "b1 ", "a2 ", "a3 "]


def test_a2a_agent_splits_what_is_too_long_for_an_event() -> None:
    """A text of any length is said, in messages of limited size."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        await task.add_artifact([new_text_part("x" * 1_000_000)], "a", last_chunk=True)
        await task.add_artifact([new_text_part("y" * 100_000)], "b")
        await task.add_artifact([new_text_part("y" * 100_000)], "b", append=True, last_chunk=True)
        await task.start_work(task.new_agent_message([new_text_part("z" * 100_000)]))
        await task.complete()

    said = answer_of(script)
    assert "".join(messages_of(said)) == "x" * 1_000_000 + "y" * 200_000
    assert max(len(message) for message in messages_of(said)) == 180_000
    assert "".join(output.text for output in said if isinstance(output, Delta)) == "y" * 200_000
    (status,) = logs_of(said, "status")
    assert len(status.content) == 16_000
    assert (status.metadata or {})["cut"]


def test_a2a_agent_does_not_say_the_last_artifact_again() -> None:
    """An agent that repeats its answer as it ends is heard once."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        await task.add_artifact([new_text_part("42")], "a", last_chunk=True)
        await task.complete(task.new_agent_message([new_text_part("42")]))

    assert messages_of(answer_of(script)) == ["42"]


def test_a2a_agent_makes_no_event_that_is_too_large() -> None:
    """The longest text, of the longest characters, with the most metadata fits an event."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        text, metadata, data = "\U0001f600" * 400_000, {"k": "\x01" * 16_000}, new_data_part("\x01" * 300)
        files = [new_url_part("https://e.com/\x01", "\x01" * 300, "\x01" * 300)] * 60
        parts = [new_text_part(text), *[data] * 40, *files]
        await task.add_artifact(parts, "\x01" * 1_000, "\x01" * 1_000, metadata, last_chunk=True)
        await task.start_work(task.new_agent_message(parts, metadata))
        await task.complete(task.new_agent_message([new_text_part(text + "."), *parts[1:]], metadata))

    said = answer_of(script)
    assert sum(message.count("\U0001f600") for message in messages_of(said)) == 800_000
    assert len(logs_of(said, "artifact")) == len(logs_of(said, "status")) == 1


@pytest.mark.parametrize("streaming", [True, False])
def test_a2a_agent_asks_what_the_remote_agent_asks(streaming: bool) -> None:
    """`input-required` is a free question; its answer is the next message of the same task and context."""
    remote = Remote(ask_colour)
    surroundings = GivenSurroundings(answers=[ANSWER])

    async def check(agent: A2AAgent) -> None:
        assert messages_of(await outputs_of(agent, turn_with("paint", surroundings))) == ["It is blue."]

    with_agent(remote, check, streaming=streaming)
    ((question, options, _, metadata),) = surroundings.asked
    assert (question, options) == ("Which colour?", ())
    first, second = remote.heard
    assert [message.parts[0].text for message in remote.heard] == ["paint", "blue"]
    assert first.role == second.role == Role.ROLE_USER
    assert second.task_id == first.task_id == (metadata or {})["taskId"]
    assert second.context_id == first.context_id
    assert second.message_id != first.message_id
    assert not remote.cancelled


@pytest.mark.parametrize("streaming", [True, False])
def test_a2a_agent_fails_when_nobody_answers(streaming: bool) -> None:
    """The task of a question without an answer is cancelled, and the turn says what to do."""
    remote = Remote(ask_colour)

    async def check(agent: A2AAgent) -> None:
        with pytest.raises(AgentError) as caught:
            await outputs_of(agent)
        assert caught.value.code == "QUESTION_UNANSWERED"
        assert "Continue the run with the answer" in caught.value.message

    with_agent(remote, check, streaming=streaming)
    assert remote.cancelled == [remote.heard[0].task_id]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        (TaskState.TASK_STATE_FAILED, "AGENT_TASK_FAILED", "failed"),
        (TaskState.TASK_STATE_REJECTED, "AGENT_REFUSED", "refused the task"),
        (TaskState.TASK_STATE_AUTH_REQUIRED, "AGENT_LOGIN_REQUIRED", "authentication"),
        (TaskState.TASK_STATE_CANCELED, "AGENT_CANCELLED", "cancelled the task"),
    ],
)
@pytest.mark.parametrize("text", ["", "the moon is out."])
def test_a2a_agent_fails_as_the_task_does(state: TaskState, code: str, words: str, text: str, streaming: bool) -> None:
    """Each end that is no success has a code, the agent's own words and what to do."""
    remote = Remote(ending(state, text))

    async def check(agent: A2AAgent) -> None:
        with pytest.raises(AgentError) as caught:
            await outputs_of(agent)
        assert caught.value.code == code
        assert words in caught.value.message
        assert (": the moon is out. " if text else "does not say why. ") in caught.value.message

    with_agent(remote, check, streaming=streaming)


def test_a2a_agent_keeps_what_was_said_before_a_failure() -> None:
    """What came with the failure in one snapshot is said, too."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        await task.add_artifact([new_text_part("as far as it goes")], "a")
        await task.failed()

    said: list[AgentOutput] = []

    async def check(agent: A2AAgent) -> None:
        async with aclosing(agent.run(turn_with())) as outputs:
            async for output in outputs:
                said.extend(output if isinstance(output, tuple) else (output,))

    with pytest.raises(AgentError):
        with_agent(Remote(script), check, streaming=False)
    assert messages_of(said) == ["as far as it goes"]


def test_a2a_agent_fails_when_the_remote_agent_raises() -> None:
    """An exception over there is a failed turn here."""

    async def script(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
        await remote.begin_task(context)
        raise RuntimeError("out of cheese")

    async def check(agent: A2AAgent) -> None:
        with pytest.raises(AgentError) as caught:
            await outputs_of(agent)
        assert caught.value.code in ("AGENT_TASK_FAILED", "AGENT_ERROR")

    with_agent(Remote(script), check)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("by", ["cancel", "close"])
def test_a2a_agent_cancels_the_task_with_its_turn(by: str, streaming: bool) -> None:
    """A turn that is cancelled or closed ends its task over there, before it has ended itself."""
    remote = Remote(work_until(asyncio.Event()))

    async def check(agent: A2AAgent) -> None:
        heard = asyncio.Event()

        async def consume() -> None:
            async with aclosing(agent.run(turn_with())) as outputs:
                async for output in outputs:
                    if Delta("first, ") in (output if isinstance(output, tuple) else (output,)):
                        heard.set()
                        if by == "close":
                            return

        turn = asyncio.create_task(consume())
        await heard.wait()
        if by == "cancel":
            turn.cancel()
            with pytest.raises(asyncio.CancelledError):
                await turn
        await turn if by == "close" else None
        assert remote.cancelled == [remote.heard[0].task_id]

    with_agent(remote, check, streaming=streaming)


@pytest.mark.parametrize("script", [count, say_hello])
def test_a2a_agent_continues_in_the_same_context(script: Script) -> None:
    """The next turn is in the context that the log has, in a task of its own; also in a process of its own."""
    remote = Remote(script)

    async def check(agent: A2AAgent) -> None:
        kept = task_log_of(await outputs_of(agent))
        again = A2AAgent(agent._options)
        try:
            for number, each in enumerate([agent, again], 2):
                surroundings = GivenSurroundings(logs={"a2a_task": kept})
                await outputs_of(each, turn_with("more", surroundings, turn=number))
        finally:
            await again.close()
        first, *others = remote.heard
        assert [other.context_id for other in others] == [first.context_id] * 2
        assert len({message.task_id for message in remote.heard}) == 3
        assert [message.message_id for message in remote.heard] == ["run-1", "run-2", "run-3"]

    with_agent(remote, check)


def test_a2a_agent_begins_a_new_context_with_another_agent() -> None:
    """A context that another agent gave means nothing to this one."""
    remote = Remote(say_hello)
    elsewhere = {"taskId": "t", "contextId": "theirs", "turn": 2, "url": "https://elsewhere.example"}

    async def check(agent: A2AAgent) -> None:
        surroundings = GivenSurroundings(logs={"a2a_task": Log("", metadata=elsewhere)})
        await outputs_of(agent, turn_with("more", surroundings, turn=2, attempt=2))
        assert remote.heard[0].context_id != "theirs"

    with_agent(remote, check)


async def lose(agent: A2AAgent) -> tuple[AsyncGenerator[AgentSays], Log]:
    """Begin a turn and stop reading it, as a runtime does that is lost; give it, and the log that is left."""
    outputs = agent.run(turn_with())
    async for output in outputs:
        said = output if isinstance(output, tuple) else (output,)
        if logs := [each for each in said if isinstance(each, Log) and each.type == "a2a_task"]:
            return outputs, logs[0]
    raise AssertionError


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("meanwhile", ["works", "ended"])
def test_a2a_agent_takes_up_the_task_of_a_lost_runtime(meanwhile: str, streaming: bool) -> None:
    """The next attempt says what the task has said and will say, whether it has ended; nothing is sent again."""
    done = asyncio.Event()
    remote = Remote(work_until(done))

    async def check(agent: A2AAgent) -> None:
        lost, kept = await lose(agent)
        if meanwhile == "ended":
            done.set()
            task_id = remote.heard[0].task_id
            await eventually(lambda: remote.done == [task_id])
        surroundings = GivenSurroundings(logs={"a2a_task": kept})
        said: list[AgentOutput] = []
        async with aclosing(agent.run(turn_with("hi", surroundings, attempt=2))) as outputs:
            async for output in outputs:
                said += output if isinstance(output, tuple) else (output,)
                done.set()
        assert messages_of(said) == ["first, then"]
        assert not logs_of(said, "a2a_task")
        assert len(remote.heard) == 1
        await lost.aclose()

    with_agent(remote, check, streaming=streaming)


def test_a2a_agent_asks_the_question_of_a_lost_runtime_again() -> None:
    """A task that waits for input waits for it in the next attempt, too."""
    remote = Remote(ask_colour)

    async def check(agent: A2AAgent) -> None:
        lost, kept = await lose(agent)
        surroundings = GivenSurroundings(logs={"a2a_task": kept}, answers=[ANSWER])
        said = await outputs_of(agent, turn_with("hi", surroundings, attempt=2))
        assert messages_of(said) == ["It is blue."]
        assert [asked[0] for asked in surroundings.asked] == ["Which colour?"]
        await lost.aclose()

    with_agent(remote, check, streaming=False)


@pytest.mark.parametrize("streaming", [True, False])
def test_a2a_agent_sends_again_what_the_remote_agent_has_lost(streaming: bool) -> None:
    """A task that is not known any more is begun again, under the same message id, and the log says so."""
    remote = Remote(count)

    async def check(agent: A2AAgent) -> None:
        known = {"taskId": "gone", "contextId": "c", "turn": 3, "url": agent._options.url}
        surroundings = GivenSurroundings(logs={"a2a_task": Log("", metadata=known)})
        said = await outputs_of(agent, turn_with("hi", surroundings, turn=3, attempt=2))
        assert messages_of(said) == ["one two three"]
        assert said[0] == Log(
            "The agent's task is gone; it is asked again.", LogLevel.WARN, "status", {"taskId": "gone"}
        )
        assert [(each.message_id, each.context_id) for each in remote.heard] == [("run-3", "c")]

    with_agent(remote, check, streaming=streaming)


def test_a2a_agent_sends_again_what_was_cancelled_meanwhile() -> None:
    """The next attempt begins another task."""
    done = asyncio.Event()
    remote = Remote(work_until(done))

    async def check(agent: A2AAgent) -> None:
        stopped, kept = await lose(agent)
        await stopped.aclose()
        assert len(remote.cancelled) == 1
        done.set()
        surroundings = GivenSurroundings(logs={"a2a_task": kept})
        said = await outputs_of(agent, turn_with("hi", surroundings, attempt=2))
        assert messages_of(said) == ["first, then"]
        first, second = remote.heard
        assert (second.parts[0].text, second.context_id) == (first.parts[0].text, first.context_id)
        assert second.message_id != first.message_id

    with_agent(remote, check)


def test_a2a_agent_takes_up_the_task_of_a_stopped_runtime(tmp_path: Path) -> None:
    """The task goes on while nobody is there; nothing is sent again."""
    done = asyncio.Event()
    remote = Remote(work_until(done))

    async def check(agent: A2AAgent) -> None:
        place = tmp_path / "runs.db"
        async with runtime(place, agent) as there:
            run = await there.start("work")

            async def known() -> bool:
                return await there.store.read_latest_log(run.id, "a2a_task") is not None

            await there.until(known)
        assert not remote.cancelled
        again = A2AAgent(agent._options)
        async with runtime(place, again) as there:
            done.set()
            assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "first, then"
        await again.close()
        assert len(remote.heard) == 1

    with_agent(remote, check)


def test_a2a_agent_answers_many_turns_at_once() -> None:
    """One connection serves all turns, also those that come while it is being made."""

    async def check(agent: A2AAgent) -> None:
        answers = await asyncio.gather(*(outputs_of(agent) for _ in range(20)))
        assert [messages_of(said) for said in answers] == [["one two three"]] * 20

    with_agent(Remote(count), check)


@pytest.mark.parametrize(("streaming", "manner"), [(True, "streams"), (False, "again and again")])
def test_a2a_agent_is_checked(streaming: bool, manner: str) -> None:
    """A check says what the card offers, then what a turn shows."""
    found: list[str] = []

    async def check(agent: A2AAgent) -> None:
        server = Server("mine", "default", agent, 60)
        assert await check_agent(server, lambda finding: found.append(finding.text), 10)

    with_agent(Remote(count), check, streaming=streaming)
    assert found[0].startswith("It has an agent card: 'remote', version '1', by JSONRPC 1.0; ")
    assert manner in found[0]
    assert "one two three" in "".join(found)


def asked_of(there: Runtime, run: Run) -> Callable[[], Awaitable[bool]]:
    """Whether the run asks its caller something."""

    async def asked() -> bool:
        return (await there.get(run)).is_asking

    return asked


def test_a2a_agent_in_a_runtime(tmp_path: Path) -> None:
    """The question is the run's, its context is found in the store after a restart, a cancel reaches the task."""
    remote = Remote(ask_colour)

    async def check(agent: A2AAgent) -> None:
        place = tmp_path / "runs.db"
        async with runtime(place, agent) as there:
            run = await there.start("paint")
            await there.until(asked_of(there, run))
            await there.resume(run, "blue")
            assert (await there.until_status(run, RunStatus.COMPLETED)).turn.output == "It is blue."
            said = contents(await log_of(there.store, run.id))
            assert [said[0], *said[2:]] == ["paint", "Which colour?", "blue", "It is blue."]
        again = A2AAgent(agent._options)
        async with runtime(place, again) as there:
            await there.resume(run, "once more")
            await there.until(asked_of(there, run))
            assert remote.heard[-1].context_id == remote.heard[0].context_id
            await there.cancel(run)
            await eventually(lambda: remote.cancelled == [remote.heard[-1].task_id])
        await again.close()

    with_agent(remote, check)
