"""The domain: runs, turns and the events of their log, as values that never change.

Knows no gRPC, no store and no agent. Times are milliseconds since the Unix epoch; `metadata` is the JSON
text of an object exactly as it came.
"""

import secrets
import time
from enum import StrEnum

import msgspec


class RunStatus(StrEnum):
    """Where a turn stands; a run shows its latest turn's."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    __hash__ = str.__hash__  # that of an enumeration is Python, and sets of statuses are asked often


TERMINAL = frozenset({RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.CANCELLED})


class RunMode(StrEnum):
    """Whether the caller that opened a turn waits for its end."""

    SYNC = "sync"
    ASYNC = "async"


class EventRole(StrEnum):
    """Who speaks in an event."""

    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"
    EXECUTION_LOG = "execution_log"


class LogLevel(StrEnum):
    """How an event is to be shown."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"
    SUCCESS = "success"
    WARNING = "warning"


class EventDraft(msgspec.Struct, frozen=True):
    """An event before the store has given it its place in the log."""

    role: EventRole
    content: str
    created_at_ms: int
    log_type: str | None = None
    log_level: LogLevel | None = None
    metadata: bytes | None = None


class RunEvent(msgspec.Struct, frozen=True):
    """One entry of a run's log: `sequence` is 1, 2, 3 … within the run, across turns."""

    sequence: int
    turn: int
    role: EventRole
    content: str
    created_at_ms: int
    log_type: str | None = None
    log_level: LogLevel | None = None
    metadata: bytes | None = None


class Turn(msgspec.Struct, frozen=True):
    """One input and what became of it.

    `attempt` counts how often an agent was started on it. `epoch` goes up by one with each claim: a write under
    an older epoch than the stored one changes nothing. `ready`: no earlier turn of the run is open.
    """

    number: int
    status: RunStatus
    mode: RunMode
    input: str
    first_sequence: int
    created_at_ms: int
    output: str | None = None
    error: str | None = None
    error_code: str | None = None
    metadata: bytes | None = None
    completed_at_ms: int | None = None
    attempt: int = 0
    epoch: int = 0
    ready: bool = True


class Question(msgspec.Struct, frozen=True, array_like=True):
    """What the running turn of a run has asked last: `sequence` is that of its event.

    `options` are ids and names; without any, a text is the answer. It is open until it is answered, or decided in
    another way; a closed one is known until its turn ends.
    """

    sequence: int
    is_open: bool = True
    options: tuple[tuple[str, str], ...] = ()

    def option(self, text: str) -> str | None:
        """Return the id of the option that a text names by id or name; None when it names none."""
        text = text.strip()
        ids = [option_id for option_id, _ in self.options]
        return text if text in ids else next((id_ for id_, name in self.options if name == text), None)


class Run(msgspec.Struct, frozen=True):
    """A conversation with one agent runtime, showing one of its turns: the latest unless said otherwise.

    `holder` is the address of the runtime service that executes a turn of the run now, where that is not this one.
    `question` belongs to the running turn, whichever turn is shown.
    """

    id: str
    organization: str
    server_id: str
    created_at_ms: int
    updated_at_ms: int
    message_count: int
    last_sequence: int
    last_turn: int
    turn: Turn
    title: str | None = None
    thread_metadata: bytes | None = None
    holder: str | None = None
    question: Question | None = None

    @property
    def status(self) -> RunStatus:
        """Status of the turn shown."""
        return self.turn.status

    @property
    def is_asking(self) -> bool:
        """Whether the running turn waits for an answer of the caller."""
        return self.question is not None and self.question.is_open

    @property
    def thread_id(self) -> str:
        """A run has one thread, made with it and named alike."""
        return "thread_" + self.id.removeprefix("run_")

    @property
    def event_id_prefix(self) -> str:
        """What the id of each event begins with, its sequence following: unique, and the same at every reading."""
        return f"event_{self.id.removeprefix('run_')}_"


def new_run_id() -> str:
    """Return `run_` and 32 hex digits that sort by time: 48 bits of milliseconds, then 80 random bits."""
    return f"run_{now_ms():012x}{secrets.token_hex(10)}"


def now_ms() -> int:
    """Return the time in milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000
