"""The `a2a` agent with the official client, against the official library's server."""

from contextlib import aclosing
from typing import Any

from a2a.helpers.proto_helpers import new_data_part, new_raw_part, new_text_part
from a2a.server.agent_execution import RequestContext
from a2a.server.tasks import TaskUpdater

from runtime_service.agents import AgentOutput, Answer, Delta, Log, Message, TurnContext
from runtime_service.agents.a2a import A2AAgent
from runtime_service.agents.a2a_options import A2AOptions
from tests.a2a_server import Remote, Script, serving
from tests.support import GivenSurroundings, run_async


async def outputs_of(agent: A2AAgent, turn: TurnContext) -> list[AgentOutput]:
    """What an agent says in a turn."""
    said: list[AgentOutput] = []
    async with aclosing(agent.run(turn)) as outputs:
        async for output in outputs:
            said += output if isinstance(output, tuple) else (output,)
    return said


def turn_with(text: str = "hi", surroundings: GivenSurroundings | None = None, **more: Any) -> TurnContext:
    """A turn of the run `run`."""
    given = surroundings or GivenSurroundings()
    return TurnContext(input=text, metadata={}, run_id="run", surroundings=given, **more)


def answer_of(script: Script, streaming: bool = True, binding: str = "JSONRPC", **options: Any) -> list[AgentOutput]:
    """What the agent says when the remote one does this."""

    async def run() -> list[AgentOutput]:
        async with serving(Remote(script), streaming=streaming, binding=binding) as url:
            agent = A2AAgent(A2AOptions(url, **options))
            try:
                return await outputs_of(agent, turn_with())
            finally:
                await agent.close()

    return run_async(run())


async def say_hello(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
    """Answer with a message."""
    await remote.say_only("Hello you", context)


async def stream_artifact(remote: Remote, context: RequestContext, task: TaskUpdater) -> None:
    """Answer with an artifact in three pieces."""
    await remote.begin_task(context)
    await task.start_work(task.new_agent_message([new_text_part("thinking")]))
    for n, text in enumerate(["one ", "two ", "three"]):
        await task.add_artifact([new_text_part(text)], "a", "answer", append=n > 0, last_chunk=n == 2)
    await task.add_artifact(
        [new_raw_part(b"x" * 5000, "image/png", "cat.png"), new_data_part({"n": 1})], "b", "things", last_chunk=True
    )
    await task.complete()


def test_a2a_agent_says_a_message() -> None:
    """An agent that makes no task answers with a message."""
    for output in answer_of(say_hello):
        print(output)


def test_a2a_agent_streams_artifacts() -> None:
    """x."""
    for streaming in True, False:
        for output in answer_of(stream_artifact, streaming=streaming):
            print(output)
    for output in answer_of(stream_artifact, binding="HTTP+JSON"):
        print(output)
