"""What was seen of runs, from outside and in the store, as values: the material of the checker.

Knows no process, no HTTP and no database. Times are seconds since the Unix epoch, by one clock; an input names its
turn, for no two turns of a history are given the same one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec

TERMINAL = ("completed", "failed", "cancelled")

Operation = Literal["start", "continue", "cancel", "get", "events"]
Surface = Literal["answer", "cancel", "get", "log", "stream"]


class Task(msgspec.Struct, frozen=True):
    """What an agent of these tests is asked for, as the JSON of an input: `steps` messages, `seconds` before each."""

    name: str
    steps: int
    seconds: float

    @property
    def input(self) -> str:
        """The text that is sent."""
        return msgspec.json.encode(self).decode()


def task_of(text: str) -> Task:
    """Return what an input asks for."""
    return msgspec.json.decode(text, type=Task)


class Mark(msgspec.Struct, frozen=True):
    """What such a message says of itself in its metadata: the `step` of the attempt, and the process that made it."""

    attempt: int
    pid: int
    step: int


class Event(msgspec.Struct, frozen=True):
    """One entry of a log, from any surface. `metadata` is the JSON text with its keys in order."""

    sequence: int
    role: str
    content: str
    created_at: float
    log_type: str | None = None
    log_level: str | None = None
    metadata: str | None = None

    @property
    def mark(self) -> Mark | None:
        """The mark of a message that an agent of these tests has ended."""
        if self.role != "assistant" or self.metadata is None:
            return None
        return msgspec.json.decode(self.metadata, type=Mark)


class Shown(msgspec.Struct, frozen=True):
    """A turn as something showed it."""

    run_id: str
    input: str
    status: str
    output: str | None = None
    error: str | None = None
    error_code: str | None = None
    completed_at: float | None = None

    @property
    def name(self) -> tuple[str, str]:
        """By what the turn is known."""
        return self.run_id, self.input


class Request(msgspec.Struct, frozen=True):
    """One HTTP request and what became of it; repetitions share their key. `status` 0: there was no answer.

    `refused`: nobody listened, so nothing can have come of it. `code` is that of an error document, or the name of
    the exception; `turn` is the one that a start or continue opened.
    """

    operation: Operation
    gateway: str
    asked_at: float
    ended_at: float
    status: int
    code: str = ""
    refused: bool = False
    key: str | None = None
    input: str | None = None
    turn: tuple[str, str] | None = None
    replayed: bool = False


class Reading(msgspec.Struct, frozen=True):
    """A turn as it was shown to one who had asked at `asked_at`."""

    surface: Surface
    gateway: str
    asked_at: float
    seen_at: float
    shown: Shown


class Excerpt(msgspec.Struct, frozen=True):
    """Events of a run as one answer or one connection of a stream gave them.

    They were asked for from behind sequence `after`, where it is known. `ended`: the answer says that it reaches the
    end of the turn whose input is `turn`; with `log` that of the log. `said`: what the deltas added up to, each with
    the sequence that the event was to have.
    """

    surface: Surface
    gateway: str
    run_id: str
    events: tuple[Event, ...]
    after: int | None = None
    turn: str | None = None
    ended: bool = False
    said: tuple[tuple[int, str], ...] = ()


class StoredTurn(msgspec.Struct, frozen=True):
    """A turn in the store."""

    run_id: str
    server_id: str
    number: int
    shown: Shown
    attempt: int
    epoch: int
    draft: str | None


class StoredRun(msgspec.Struct, frozen=True):
    """A run in the store, with its log by turn."""

    run_id: str
    last_sequence: int
    last_turn: int
    message_count: int
    events: tuple[tuple[int, Event], ...]


class Sample(msgspec.Struct, frozen=True):
    """How a turn stood in the store at some moment."""

    run_id: str
    number: int
    status: str
    epoch: int


class Begun(msgspec.Struct, frozen=True):
    """An agent noted that it was started."""

    run_id: str
    turn: int
    attempt: int
    pid: int
    at: float


@dataclass
class History:
    """All that was seen, in the order in which it was; samples likewise."""

    requests: list[Request] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    excerpts: list[Excerpt] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    turns: list[StoredTurn] = field(default_factory=list)
    runs: list[StoredRun] = field(default_factory=list)


def event_of(document: Mapping[str, Any]) -> Event:
    """Return the event of an ACP document."""
    metadata = document.get("metadata")
    return Event(
        document["sequence"],
        document["role"],
        document["content"],
        seconds_of(document["createdAt"]),
        document.get("logType"),
        document.get("logLevel"),
        None if metadata is None else ordered(metadata),
    )


def shown_of(document: Mapping[str, Any]) -> Shown:
    """Return the turn that a run of the ACP documents shows."""
    completed_at = document.get("completedAt")
    return Shown(
        document["id"],
        document["input"],
        document["status"],
        document.get("output"),
        document.get("error"),
        document.get("errorCode"),
        None if completed_at is None else seconds_of(completed_at),
    )


def ordered(metadata: object) -> str:
    """Return an object as the one JSON text by which it is compared."""
    return msgspec.json.encode(metadata, order="deterministic").decode()


def seconds_of(time: str) -> float:
    """Return a time of the ACP documents."""
    return datetime.fromisoformat(time).timestamp()
