"""What works of the agents that are declared, and what is missing: each is started and asked one small turn.

Outside of any run: nothing is stored. Knows agents and the registry; not how its findings are shown.
"""

import asyncio
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from time import monotonic
from typing import Any

from runtime_service.agent_events import event_from, size_of, storable
from runtime_service.agents import (
    AgentError,
    AgentOutput,
    Answer,
    Delta,
    Finding,
    HistoryMessage,
    Log,
    Message,
    Option,
    ToolCall,
    TurnContext,
)
from runtime_service.errors import shown
from runtime_service.questions import QuestionSettings
from runtime_service.registry import Server
from runtime_service.runs import EventRole, new_run_id

INPUT = "This is a check of your setup. Say hello in one word; use no tool and change nothing."
METADATA = {"check": True}
"""The metadata of the turn, by which an agent can know it."""

END_SECONDS = 5.0
"""How long an agent may take to end once its time is over."""

_SHOWN_CHARACTERS = 1_000
_SHOWN_TOOLS = 20

Tell = Callable[[Finding], None]


async def check_agent(server: Server, tell: Tell, limit_seconds: float) -> bool:
    """Check the agent of a server within the limit, and tell each finding once it is known; return whether it works.

    It takes at most `limit_seconds` and `END_SECONDS`, unless the agent holds up the event loop.
    """
    return await _Check(server, tell).within(limit_seconds)


class _Check:
    """The check of one agent."""

    def __init__(self, server: Server, tell: Tell) -> None:
        self._server = server
        self._tell = tell
        self._works = True

    async def within(self, limit_seconds: float) -> bool:
        checking = asyncio.create_task(self._check())
        try:
            await asyncio.wait([checking], timeout=limit_seconds)
            if not checking.done():
                self._miss(f"It has not come to an end after {limit_seconds:g} s.")
            elif checking.cancelled():
                self._miss("Something that it waited for was cancelled.")
        finally:
            checking.cancel()
            await asyncio.wait([checking], timeout=END_SECONDS)
        if not checking.done():
            self._miss(f"It goes on, {END_SECONDS:g} s after it was cancelled.")
        return self._works

    async def _check(self) -> None:
        agent = self._server.agent
        turn = _Turn(self._server, self._find)
        try:
            if reason := agent.unavailable_reason():
                self._miss(reason)
                return
            async with aclosing(agent.check()) as findings:
                async for finding in findings:
                    self._say(finding)
            if self._works:
                await turn.execute()
        except AgentError as error:
            if turn.has_asked:
                # Without an answer it could not go on; with one it might have.
                self._find(f"It ends its turn for want of an answer: {error.message} ({error.code})")
            else:
                self._miss(f"{error.message} ({error.code})")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever an agent raises is a finding
            self._miss(_raised(error))

    def _say(self, finding: Finding) -> None:
        self._works = self._works and finding.works
        # Some of it is from elsewhere, and is not to do what it likes with whoever shows it.
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in finding.text)
        self._tell(Finding(text, finding.works))

    def _find(self, text: str) -> None:
        self._say(Finding(text))

    def _miss(self, text: str) -> None:
        self._say(Finding(text, works=False))


class _Turn:
    """The turn that is executed, and what surrounds its agent; `find` is told what it shows."""

    def __init__(self, server: Server, find: Callable[[str], None]) -> None:
        self.has_asked = False
        self._server = server
        self._find = find
        self._began = monotonic()
        self._first_piece_seconds: float | None = None
        self._draft = ""
        self._answer: str | None = None
        self._tools: dict[str, None] = {}
        self._logs = 0

    async def execute(self) -> None:
        """Execute it, and find what it shows. Raises what the agent does, AgentError for what it may not say."""
        run_id = new_run_id()
        turn = TurnContext(
            input=INPUT,
            metadata=METADATA,
            run_id=run_id,
            thread_id="thread_" + run_id.removeprefix("run_"),
            server_id=self._server.id,
            surroundings=self,
        )
        self._began = monotonic()
        async with aclosing(self._server.agent.run(turn)) as said:
            async for outputs in said:
                for output in outputs if isinstance(outputs, tuple) else (outputs,):
                    self._listen(output)
        self._conclude()

    def _listen(self, output: AgentOutput) -> None:
        if isinstance(output, Delta):
            if self._first_piece_seconds is None:
                self._first_piece_seconds = self._seconds
            if len(self._draft) < _SHOWN_CHARACTERS:
                self._draft += storable(output.text)
            return
        event = event_from(output)
        size_of(event)
        if isinstance(output, Message):
            self._draft = ""
            if event.role is EventRole.ASSISTANT:
                self._answer = event.content
        elif isinstance(output, ToolCall):
            if len(self._tools) <= _SHOWN_TOOLS:
                self._tools.setdefault(event.content[:_SHOWN_CHARACTERS])
        elif isinstance(output, Log):
            self._logs += 1

    @property
    def _seconds(self) -> float:
        return monotonic() - self._began

    def _conclude(self) -> None:
        answer = self._draft or self._answer
        if answer is None:
            self._find(f"It ends its turn after {self._seconds:.1f} s, without a message.")
        else:
            self._find(f"It answers within {self._seconds:.1f} s: {shown(answer)}")
        if self._first_piece_seconds is not None:
            self._find(f"It streams: the first piece came after {self._first_piece_seconds:.1f} s.")
        if self._tools:
            names = [*self._tools][:_SHOWN_TOOLS] + ["…"] * (len(self._tools) > _SHOWN_TOOLS)
            self._find(f"It calls tools: {', '.join(names)}.")
        if self._logs:
            self._find(f"It writes to the execution log; entries: {self._logs}.")

    # The surroundings of its agent

    async def history(self) -> list[HistoryMessage]:
        """Nothing was said before."""
        return []

    async def latest_log(self, log_type: str) -> Log | None:
        """Nothing was logged before."""
        return None

    async def ask(
        self, question: str, options: Sequence[Option], tool_kind: str | None, metadata: Mapping[str, Any] | None
    ) -> Answer:
        """Nobody answers: a permission is denied, whatever the settings of the server would allow."""
        self.has_asked = True
        names = ", ".join(option.name for option in options)
        self._find(f"It asks: {shown(question)}{f' ({names})' if names else ''}; nobody answers in a check.")
        return QuestionSettings().time_out(options)


def _raised(error: BaseException) -> str:
    """Say what an agent raised, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"It raised {type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
