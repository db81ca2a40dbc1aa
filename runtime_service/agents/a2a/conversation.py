"""One turn with a remote agent: the message, the questions in between, and the end of the task whatever happens.

All turns of a run share the agent's context, and a turn whose runtime was lost takes up its task: both are known from
the log. Imports the library: import this only where it is needed.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from a2a.types import StreamResponse

from runtime_service.agents.a2a.connection import Connection
from runtime_service.agents.a2a.failures import Away, StreamCut, TaskUnknown, silent
from runtime_service.agents.a2a.options import A2AOptions
from runtime_service.agents.a2a.updates import TASK_LOG, TaskCanceled, Updates
from runtime_service.agents.base import AgentError, AgentSays, Log, TurnContext
from runtime_service.runs import LogLevel

log = logging.getLogger(__name__)

_CANCEL_SECONDS = 3.0
_TAKE_UP_PAUSES_SECONDS = (0.1, 1.0, 3.0)
_LASTING_SECONDS = 10.0
"""A stream that lasted so long was cut for its age or its silence, as proxies do: that is no failure of the agent."""


async def converse(connection: Connection, options: A2AOptions, turn: TurnContext) -> AsyncGenerator[AgentSays]:
    """Give what the agent says in this turn. Its end cancels an open task, unless the turn goes on."""
    remembered = await _remembered(turn, options)
    updates = Updates(options, turn.turn, remembered)
    # The same in each attempt: an agent that has the message already can tell.
    message_id = f"{turn.run_id}-{turn.turn}" if turn.run_id else uuid.uuid4().hex
    lost = remembered.get("taskId") if remembered.get("turn") == turn.turn else None
    try:
        if lost:
            updates.take_up(lost)
            responses = connection.resume(lost)
        else:
            responses = _send(connection, updates, turn.input, message_id)
        while True:
            gone: AgentError | None = None
            try:
                async with aclosing(_outputs(connection, options, updates, responses)) as outputs:
                    async for said in outputs:
                        yield said
            except (TaskUnknown, TaskCanceled) as error:
                if not lost:
                    raise
                gone = error
            if gone is not None:
                updates.begin_again()
                if isinstance(gone, TaskCanceled):
                    # Under its old id the message might be answered with the task that was cancelled.
                    message_id = uuid.uuid4().hex
                yield Log("The agent's task is gone; it is asked again.", LogLevel.WARN, "status", {"taskId": lost})
                responses = _send(connection, updates, turn.input, message_id)
            elif updates.question is None:
                return
            else:
                answer = await turn.ask(updates.question, metadata=updates.question_metadata)
                if answer.text is None:
                    raise AgentError(
                        f"The agent at {options.host} asked something, and nobody answered in time. "
                        "Continue the run with the answer, or say it all at the start.",
                        "QUESTION_UNANSWERED",
                    )
                updates.answered()
                responses = _send(connection, updates, answer.text, uuid.uuid4().hex)
            lost = None
    finally:
        if updates.task_is_open and updates.task_id is not None and not turn.goes_on:
            await _cancel(connection, updates.task_id)


async def _remembered(turn: TurnContext, options: A2AOptions) -> dict[str, Any]:
    """Return what the log has of the run's newest task, if it was with the same agent.

    Also in what seems to be the first attempt: one of a service that was stopped in order is not counted.
    """
    kept = await turn.latest_log(TASK_LOG)
    known = {} if kept is None else dict(kept.metadata or {})
    return known if known.get("url") == options.url else {}


def _send(connection: Connection, updates: Updates, text: str, message_id: str) -> AsyncGenerator[StreamResponse]:
    return connection.send(text, message_id=message_id, context_id=updates.context_id, task_id=updates.task_id)


async def _outputs(
    connection: Connection, options: A2AOptions, updates: Updates, responses: AsyncGenerator[StreamResponse]
) -> AsyncGenerator[AgentSays]:
    """Give what the responses say until they settle something.

    A stream that was cut is taken up: a few times in a row, and as long as the agent may be silent where it lasts.
    """
    loop = asyncio.get_running_loop()
    said_at = loop.time()
    cuts = 0
    while True:
        begun_at, heard = loop.time(), False
        try:
            async with aclosing(responses):
                async for response in responses:
                    heard = True
                    if outputs := updates.add(response):
                        yield outputs
                        cuts, said_at = 0, loop.time()
                    if updates.failure is not None:
                        raise updates.failure
                    if updates.settled:
                        return
        except AgentError as error:
            away = isinstance(error, Away) or error.code == "AGENT_UNREACHABLE"
            # Where nothing was heard yet, what was sent may not have arrived.
            passing = isinstance(error, StreamCut) or (away and (heard or cuts > 0))
            if loop.time() - begun_at > _LASTING_SECONDS:
                cuts = 0
            if not passing or updates.task_id is None or cuts == len(_TAKE_UP_PAUSES_SECONDS):
                raise
            if loop.time() - said_at > options.timeout_seconds:
                raise silent(options, options.timeout_seconds) from error
            task_id = updates.task_id
        await asyncio.sleep(_TAKE_UP_PAUSES_SECONDS[cuts])
        cuts += 1
        responses = connection.resume(task_id)


async def _cancel(connection: Connection, task_id: str) -> None:
    try:
        async with asyncio.timeout(_CANCEL_SECONDS):
            await connection.cancel(task_id)
    except (AgentError, TimeoutError) as error:
        log.info("the task %s of a turn that has ended could not be cancelled: %r", task_id, error)
