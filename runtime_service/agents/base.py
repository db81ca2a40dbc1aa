"""What an agent is: something that turns a `TurnContext` into a stream of `AgentOutput`.

Knows nothing of stores, executors or gRPC. A kind of agent is a subclass of `Agent` in a file of this folder.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from enum import StrEnum
from typing import Any, ClassVar, Protocol, TypeAlias

import msgspec

from runtime_service.runs import EventRole, LogLevel


class Message(msgspec.Struct, frozen=True):
    """A whole message. After deltas it is their end: its content is the complete text of the same event.

    `metadata` becomes the event's JSON object (usage, model, finish reason …).
    """

    content: str
    metadata: Mapping[str, Any] | None = None
    role: EventRole = EventRole.ASSISTANT


class Delta(msgspec.Struct, frozen=True):
    """The next piece of the message in the making: shown at once, stored only by the `Message` that ends it."""

    text: str


class Log(msgspec.Struct, frozen=True):
    """An entry of the execution log; `type` becomes `logType`."""

    content: str
    level: LogLevel = LogLevel.INFO
    type: str | None = None
    metadata: Mapping[str, Any] | None = None


class ToolCall(msgspec.Struct, frozen=True):
    """The agent calls a tool: an execution log entry `tool_call`."""

    name: str
    arguments: Mapping[str, Any] = {}
    id: str | None = None


class ToolResult(msgspec.Struct, frozen=True):
    """What a tool answered: an execution log entry `tool_result`, level error when it failed."""

    name: str
    content: str
    id: str | None = None
    failed: bool = False


AgentOutput: TypeAlias = Message | Delta | Log | ToolCall | ToolResult

AgentSays: TypeAlias = AgentOutput | tuple[AgentOutput, ...]
"""What an agent yields: one output, or several that it has at once, which costs less than one by one."""


class HistoryMessage(msgspec.Struct, frozen=True):
    """One earlier message of the thread."""

    role: EventRole
    content: str


class OptionKind(StrEnum):
    """What choosing an option of a permission means; the words are those of the Agent Client Protocol."""

    ALLOW_ONCE = "allow_once"
    ALLOW_ALWAYS = "allow_always"
    REJECT_ONCE = "reject_once"
    REJECT_ALWAYS = "reject_always"


class Option(msgspec.Struct, frozen=True):
    """One way to answer a question. `id` is unique within it; `kind` is set where a permission is asked for."""

    id: str
    name: str
    kind: OptionKind | None = None


class AnsweredBy(StrEnum):
    """Who decided: the caller, the server's settings at once, or its time limit because the caller did not."""

    CALLER = "caller"
    SETTINGS = "settings"
    TIME_LIMIT = "time_limit"


class Answer(msgspec.Struct, frozen=True):
    """What came of a question: the id of the option chosen, or a text where it had no options.

    Both are None when nobody answered in time, and when the settings decide so but no option says it.
    """

    by: AnsweredBy
    option: str | None = None
    text: str | None = None


class Surroundings(Protocol):
    """What the runtime does for an agent in the middle of its turn; see the methods of `TurnContext`."""

    async def history(self) -> list[HistoryMessage]:
        """Return the earlier messages."""

    async def latest_log(self, log_type: str) -> Log | None:
        """Return the newest log entry of a type."""

    async def ask(
        self, question: str, options: Sequence[Option], tool_kind: str | None, metadata: Mapping[str, Any] | None
    ) -> Answer:
        """Ask the caller."""


class TurnContext:
    """What an agent is told of the turn that it executes."""

    __slots__ = ("attempt", "goes_on", "input", "metadata", "run_id", "server_id", "surroundings", "thread_id", "turn")

    def __init__(
        self,
        *,
        input: str,
        metadata: Mapping[str, Any],
        run_id: str = "",
        thread_id: str = "",
        server_id: str = "",
        turn: int = 1,
        attempt: int = 1,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.input = input
        """What the caller says."""
        self.metadata = metadata
        """The caller's JSON object; empty when there is none."""
        self.run_id = run_id
        self.thread_id = thread_id
        self.server_id = server_id
        self.turn = turn
        """1 for the start, 2 for the first continue …"""
        self.attempt = attempt
        """1, and one more each time that the turn had to be begun again."""
        self.goes_on = False
        """Told with CancelledError: the turn is executed again, by another process or later, as where a service stops.

        What it has begun outside need not be ended then, if the next attempt can take that up.
        """
        self.surroundings = surroundings

    async def history(self) -> list[HistoryMessage]:
        """Return the user and assistant messages of the earlier turns, oldest first; not this turn's input."""
        return [] if self.surroundings is None else await self.surroundings.history()

    async def latest_log(self, log_type: str) -> Log | None:
        """Return the newest log entry of this type in the whole run, None where there is none.

        What an agent has to know again after a restart, or on another machine, it says as a `Log` with metadata.
        """
        return None if self.surroundings is None else await self.surroundings.latest_log(log_type)

    async def ask(
        self,
        question: str,
        options: Sequence[Option] = (),
        *,
        tool_kind: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Answer:
        """Ask the caller, and wait for the answer: one of the options, or, without options, any text.

        Options with a kind make it a permission, which the server's settings may decide without the caller; `tool_kind`
        is what they may decide by. `metadata` goes into the event that carries the question. An unanswered question
        ends with the settings' time limit. Several questions of one turn are asked one after the other.

        What the agent has said before is in the log before the question. Raises ValueError for options that share an
        id, AgentError where nobody can be asked.
        """
        if len({option.id for option in options}) < len(options):
            raise ValueError("two options of a question have the same id")
        if self.surroundings is None:
            raise AgentError("Nobody can be asked outside of a run.", "QUESTION_IMPOSSIBLE")
        return await self.surroundings.ask(question, options, tool_kind, metadata)


class Finding(msgspec.Struct, frozen=True):
    """What a check of an agent found, in words: something that works, or is missing, and then what to do about it."""

    text: str
    works: bool = True


class AgentError(Exception):
    """Raised by an agent whose turn failed for a reason that the caller may read and can act on.

    `code` is one upper-case word, such as MODEL_TIMEOUT; it becomes the run's error code. Any other exception
    fails the turn too, but tells the caller no more than its type.
    """

    def __init__(self, message: str, code: str = "AGENT_FAILED") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Agent(ABC):
    """A kind of agent with its options. One instance a server; it may be asked for many turns at once.

    `Options` is the msgspec struct of the `options` table in servers.toml; it is checked when the file is read.
    """

    Options: ClassVar[type[msgspec.Struct]]

    session_protocol: ClassVar[str] = "in-process"
    """The protocol by which the runtime talks to the agent; callers read it as `sessionProtocol`."""

    begins_early: ClassVar[bool] = False
    """Whether a turn may begin while its run is still being stored; if that fails, the turn is dropped.

    Only for agents of which nothing outside this process can tell that they ran.
    """

    repeatable: bool = True
    """Whether a turn may be begun again when its runtime was lost in the middle of it."""

    def unavailable_reason(self) -> str | None:
        """Return why turns cannot be executed here and what to do about it, or None when they can. Cheap."""
        return None

    async def check(self) -> AsyncGenerator[Finding]:
        """Say, for the one who set the agent up, what can be known of it without a turn, each as soon as it is known.

        Such as what the other side of a connection offers; it may take its time. Asked where the agent is available. A
        small turn is executed after it, unless something is missing. Raises what `run` may.
        """
        return
        yield

    @abstractmethod
    def run(self, turn: TurnContext) -> AsyncGenerator[AgentSays]:
        """Execute one turn: an async generator of what the agent says, ended by returning.

        It yields outputs, or tuples of those that it has at once.
        Cancelled by `CancelledError`, raised where it awaits; it has a few seconds to clean up.
        Raises AgentError for a failure that the caller can act on.
        """

    async def close(self) -> None:
        """Release what the agent holds; no turn is running any more."""
        return
