"""The agents of the tests under faults: they do what their input asks for, mark it, and note that they began."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator

import msgspec

from runtime_service.agents import AgentOutput, Delta, Message, TurnContext
from tests.acceptance.history import Begun, Mark, task_of

JOURNAL = "TESTS_JOURNAL"
"""The variable of the environment that names the file of notes, one JSON object a line."""


async def steps(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say as many messages as are asked for, half of each as a delta first."""
    _note(turn)
    task = task_of(turn.input)
    for step in range(task.steps):
        text = f"{task.name}: {step}"
        yield Delta(text[:-1])
        await asyncio.sleep(task.seconds)
        mark = Mark(turn.attempt, os.getpid(), step)
        yield Message(text, msgspec.structs.asdict(mark))


async def endless(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Begin a message and never end it."""
    _note(turn)
    yield Delta("half ")
    await asyncio.Event().wait()


def _note(turn: TurnContext) -> None:
    begun = Begun(turn.run_id, turn.turn, turn.attempt, os.getpid(), time.time())
    # One write of a line at the end of a file is whole, whoever else writes.
    file = os.open(os.environ[JOURNAL], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, msgspec.json.encode(begun) + b"\n")
    finally:
        os.close(file)
