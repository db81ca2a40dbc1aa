"""A stage for agents that speak the Agent Client Protocol: real processes, the turns that they execute, none left."""

import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from runtime_service.agents import (
    AgentError,
    AgentOutput,
    Delta,
    Log,
    Message,
    TurnContext,
)
from runtime_service.agents.agent_client_protocol.agent import AgentClientProtocolAgent
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions
from tests.support import GivenSurroundings

AGENTS = Path(__file__).parents[1] / "acp_agents"
Check = Callable[["Stage"], Awaitable[None]]
Play = Callable[[Check], None]
"""Runs a check on a stage."""


class Stage:
    """An agent, the turns that it executes, and the processes of its agents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: list[AgentClientProtocolAgent] = []
        self.pids: set[int] = set()

    def agent(self, script: str, *arguments: str, **options: Any) -> AgentClientProtocolAgent:
        """Another agent that runs one of the scripts."""
        given = {
            "command": sys.executable,
            "args": [str(AGENTS / f"{script}.py"), *arguments],
            "working_directory": str(self.folder / "work" / "{run_id}"),
            "cancel_seconds": 5,
            **options,
        }
        agent = AgentClientProtocolAgent(msgspec.convert(given, AgentClientProtocolOptions))
        self.agents.append(agent)
        return agent

    async def turn(
        self,
        agent: AgentClientProtocolAgent,
        input: object,
        surroundings: GivenSurroundings | None = None,
        *,
        run_id: str = "run_1",
        turn: int = 1,
    ) -> list[AgentOutput]:
        """All that the agent says in a turn, one by one; an input that is no text is the steps of `obedient`."""
        said: list[AgentOutput] = []
        await self.collect(said, agent, input, surroundings, run_id=run_id, turn=turn)
        return said

    async def collect(
        self,
        said: list[AgentOutput],
        agent: AgentClientProtocolAgent,
        input: object,
        surroundings: GivenSurroundings | None = None,
        *,
        run_id: str = "run_1",
        turn: int = 1,
    ) -> None:
        """Add to `said` what the agent says."""
        context = TurnContext(
            input=input if isinstance(input, str) else json.dumps(input),
            metadata={},
            run_id=run_id,
            thread_id=run_id,
            server_id="server",
            turn=turn,
            surroundings=surroundings or GivenSurroundings(),
        )
        async with aclosing(agent.run(context)) as outputs:
            async for output in outputs:
                said += output if isinstance(output, tuple) else (output,)
                self.note_processes()

    def note_processes(self) -> None:
        """Remember whatever runs below this process, to be gone at the end."""
        self.pids |= {process.pid for process in agent_processes()}

    async def close(self) -> None:
        """Close the agents; none of their processes is left."""
        self.note_processes()
        for agent in self.agents:
            await agent.close()
        assert not {pid for pid in self.pids if is_alive(pid)}


def agent_processes() -> list[psutil.Process]:
    """The agents that run below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(str(AGENTS) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def is_alive(pid: int) -> bool:
    """Whether there is such a process that is more than a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def text_of(said: list[AgentOutput]) -> str:
    """The messages, one after the other; each is what its deltas were."""
    deltas = ""
    messages = ""
    for output in said:
        if isinstance(output, Delta):
            deltas += output.text
        elif isinstance(output, Message):
            messages += output.content
    assert deltas == messages
    return messages


def session_of(said: list[AgentOutput]) -> Log:
    """The entry that says which session there is."""
    (log,) = [output for output in said if isinstance(output, Log) and output.type == "session"]
    return log


def say(*texts: str) -> dict[str, Any]:
    """A step."""
    return {"do": "say", "texts": texts}


def tell(what: str) -> dict[str, Any]:
    """A step."""
    return {"do": "tell", "what": what}


async def failure_of(turn: Awaitable[object]) -> AgentError:
    """How a turn fails."""
    with pytest.raises(AgentError) as raised:
        await turn
    return raised.value
