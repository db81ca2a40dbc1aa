"""The `a2a` agent: a remote agent behind the A2A protocol, by the official library, which is imported when needed."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from runtime_service.agents.a2a.options import A2AOptions
from runtime_service.agents.base import Agent, AgentError, AgentSays, Finding, TurnContext

if TYPE_CHECKING:
    from runtime_service.agents.a2a.connection import Connection


class A2AAgent(Agent):
    """Texts of artifacts and messages are messages, other parts and status messages are logs, `input-required` asks.

    A turn may be begun again when its runtime was lost or stopped: the task goes on without it, and is taken up where
    it is. Only where the log does not have the task yet is the message sent again, under the same id, by which an agent
    can tell; and under another one where the task was cancelled meanwhile.
    """

    Options = A2AOptions
    session_protocol = "a2a"

    def __init__(self, options: A2AOptions) -> None:
        self._options = options
        self._connection: Connection | None = None
        self._opening = asyncio.Lock()

    def unavailable_reason(self) -> str | None:
        """Say so when a variable that is to hold a secret is not set."""
        name = self._options.unusable_variable()
        if name is None:
            return None
        return (
            f"The environment variable {name}, which is to hold a credential for the agent at {self._options.host}, "
            "is not set where the runtime service runs, or holds what is none."
        )

    async def check(self) -> AsyncGenerator[Finding]:
        """Say what the agent's card offers."""
        connection = await self._connect()
        yield Finding(f"It has an agent card: {await connection.describe()}")

    async def run(self, turn: TurnContext) -> AsyncGenerator[AgentSays]:
        """Say the input to the agent, and what it answers; raises AgentError for whatever hinders that."""
        if reason := self.unavailable_reason():
            raise AgentError(reason, "AGENT_UNAVAILABLE")
        connection = await self._connect()
        from runtime_service.agents.a2a.conversation import converse

        async with aclosing(converse(connection, self._options, turn)) as outputs:
            async for said in outputs:
                yield said

    async def close(self) -> None:
        """Close the connections."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connect(self) -> "Connection":
        async with self._opening:
            if self._connection is None:
                # Imports that take most of a second, and certificates: not on the event loop.
                self._connection = await asyncio.to_thread(_make_connection, self._options)
            return self._connection


def _make_connection(options: A2AOptions) -> "Connection":
    from runtime_service.agents.a2a import conversation  # noqa: F401 - the first turn is to find it imported
    from runtime_service.agents.a2a.connection import Connection

    return Connection(options)
