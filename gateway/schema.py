"""The ACP JSON documents that the gateway answers with, as msgspec types: acp-api.md, "Answers".

A field without a value is left out; the fields without a default are always there.
"""

from typing import Literal

import msgspec

RunStatus = Literal["queued", "running", "completed", "failed", "cancelled"]
RunMode = Literal["sync", "async"]
ThreadStatus = Literal[
    "active", "running", "permission_asked", "completed", "failed", "archived", "cancelled", "deleted"
]
EventRole = Literal["user", "assistant", "system", "execution_log"]
LogLevel = Literal["info", "warn", "error", "success", "warning"]


class RunDocument(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A run, showing its latest turn; in the answer to a start or continue, that turn."""

    id: str
    serverId: str
    threadId: str
    input: str
    mode: RunMode
    status: RunStatus
    createdAt: str
    threadBacked: bool
    threadStatus: ThreadStatus
    title: str | None = None
    output: str | None = None
    error: str | None = None
    errorCode: str | None = None
    metadata: msgspec.Raw | None = None
    completedAt: str | None = None
    sessionProtocol: str | None = None
    threadTitle: str | None = None


class ThreadDocument(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A run's thread."""

    id: str
    status: ThreadStatus
    messageCount: int
    createdAt: str
    updatedAt: str
    title: str | None = None
    metadata: msgspec.Raw | None = None


class EventDocument(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One entry of a run's log."""

    id: str
    sequence: int
    role: EventRole
    content: str
    createdAt: str
    logType: str | None = None
    logLevel: LogLevel | None = None
    metadata: msgspec.Raw | None = None


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A run with its thread and, where they belong to the answer, its events; `has_more` in a page of the log."""

    serverId: str
    agentRuntimeId: str | None = None
    run: RunDocument
    thread: ThreadDocument
    events: list[EventDocument] | None = None
    has_more: bool | None = None


class RunList(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A page of runs, newest first; `data` and `runs` are the same, for clients read either."""

    serverId: str
    object: str
    data: list[RunDocument]
    runs: list[RunDocument]
    has_more: bool
    agentRuntimeId: str | None = None
    nextPageToken: str | None = None
