"""What has come of a prompt and nobody has taken yet: between the connection, which fills it, and the turn."""

import asyncio
import time
from collections import deque

from runtime_service.agents.agent_client_protocol.client import Question
from runtime_service.agents.agent_client_protocol.tool_calls import ToolCall
from runtime_service.agents.agent_client_protocol.updates import Said, Transcript
from runtime_service.agents.base import Delta, Log
from runtime_service.runs import LogLevel

_MAX_OUTPUTS_AHEAD = 64
_MAX_CHARACTERS_AHEAD = 1 << 18
_METADATA_CHARACTERS = 1 << 14


class Inbox:
    """What has come of a prompt and nobody has taken yet."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self.quiet_since = time.monotonic()
        self._outputs: list[Said] = []
        self._characters = 0
        self._questions: deque[Question] = deque()
        self._asked: Question | None = None
        self._ready = asyncio.Event()
        self._room = asyncio.Event()
        self._said_strange = False
        self._left = False

    def add(self, outputs: list[Said]) -> None:
        """Keep what the agent says."""
        if outputs:
            self._outputs += outputs
            self._characters += sum(_characters(output) for output in outputs)
            self._ready.set()

    def add_strange(self) -> None:
        """Say once a turn that there are updates that cannot be understood."""
        if not self._said_strange:
            self._said_strange = True
            text = "The agent sends updates that are not of the protocol; they are left out."
            self.add([Log(text, LogLevel.WARNING, "protocol")])

    def known_tool_call(self, tool_call_id: str) -> ToolCall:
        """Return what is known of a tool call by now, to be added to."""
        return self.transcript.tool_call(tool_call_id) or ToolCall(tool_call_id)

    def ask(self, question: Question) -> None:
        """Have a question asked."""
        self._questions.append(question)
        self._ready.set()

    def take(self) -> list[Said]:
        """Return what the agent has said, and let it go on."""
        outputs, self._outputs, self._characters = self._outputs, [], 0
        self._room.set()
        return outputs

    def next_question(self) -> Question | None:
        """Return the question that is to be asked next."""
        self._asked = self._questions.popleft() if self._questions else None
        return self._asked

    async def room(self) -> None:
        """Wait until what the agent has said is taken, where it is much."""
        while not self._left and (
            len(self._outputs) >= _MAX_OUTPUTS_AHEAD or self._characters >= _MAX_CHARACTERS_AHEAD
        ):
            self._room.clear()
            await self._room.wait()

    async def ready(self) -> None:
        """Wait until there is something."""
        await self._ready.wait()
        self._ready.clear()

    def wake(self, _: object = None) -> None:
        """Have a look: the prompt has ended."""
        self._ready.set()

    def leave(self) -> None:
        """Nobody takes anything any more."""
        self._left = True
        self._outputs.clear()
        self._room.set()
        for question in (self._asked, *self._questions):
            if question is not None:
                question.cancel()


def _characters(output: Said) -> int:
    """Return about how much room an output takes."""
    if isinstance(output, Delta):
        return len(output.text)
    return len(output.content) + (_METADATA_CHARACTERS if output.metadata else 0)
