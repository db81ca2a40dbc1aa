"""Protobuf messages to ACP documents. Pure; knows neither HTTP nor a channel."""

from __future__ import annotations

from functools import lru_cache
from time import gmtime, strftime
from typing import get_args

import msgspec
from msgspec import Raw

from gateway.schema import (
    EventDocument,
    EventRole,
    LogLevel,
    RunDocument,
    RunMode,
    RunStatus,
    ThreadDocument,
    ThreadStatus,
)
from protos.acp.runs.v1 import run_pb2 as pb

encode = msgspec.json.Encoder().encode

_STATUSES: dict[int, RunStatus] = {
    pb.RunStatus.Value(f"RUN_STATUS_{name.upper()}"): name for name in get_args(RunStatus)
}
_MODES: dict[int, RunMode] = {pb.RunMode.Value(f"RUN_MODE_{name.upper()}"): name for name in get_args(RunMode)}
_THREAD_STATUSES: dict[int, ThreadStatus] = {
    pb.ThreadStatus.Value(f"THREAD_STATUS_{name.upper()}"): name for name in get_args(ThreadStatus)
}
_ROLES: dict[int, EventRole] = {pb.EventRole.Value(f"EVENT_ROLE_{name.upper()}"): name for name in get_args(EventRole)}
_LEVELS: dict[int, LogLevel | None] = {pb.LOG_LEVEL_UNSPECIFIED: None} | {
    pb.LogLevel.Value(f"LOG_LEVEL_{name.upper()}"): name for name in get_args(LogLevel)
}
TERMINAL = frozenset({pb.RUN_STATUS_COMPLETED, pb.RUN_STATUS_FAILED, pb.RUN_STATUS_CANCELLED})


def run_document(run: pb.Run, thread: pb.Thread) -> RunDocument:
    """Return the run as clients know it."""
    title = run.title or None
    metadata = run.metadata_json
    completed_at = run.completed_at_unix_ms
    # By position, as in the two below: names cost more than a tenth of the call.
    return RunDocument(
        run.id,
        run.server_id,
        run.thread_id,
        run.input,
        _MODES[run.mode],
        _STATUSES[run.status],
        timestamp(run.created_at_unix_ms),
        True,
        _THREAD_STATUSES[thread.status],
        title,
        run.output or None,
        run.error or None,
        run.error_code or None,
        Raw(metadata) if metadata else None,
        timestamp(completed_at) if completed_at else None,
        run.session_protocol or None,
        title,
    )


def thread_document(thread: pb.Thread) -> ThreadDocument:
    """Return the thread as clients know it."""
    metadata = thread.metadata_json
    return ThreadDocument(
        thread.id,
        _THREAD_STATUSES[thread.status],
        thread.message_count,
        timestamp(thread.created_at_unix_ms),
        timestamp(thread.updated_at_unix_ms),
        thread.title or None,
        Raw(metadata) if metadata else None,
    )


def event_document(event: pb.RunEvent) -> EventDocument:
    """Return the event as clients know it."""
    metadata = event.metadata_json
    return EventDocument(
        event.id,
        event.sequence,
        _ROLES[event.role],
        event.content,
        timestamp(event.created_at_unix_ms),
        event.log_type or None,
        _LEVELS[event.log_level],
        Raw(metadata) if metadata else None,
    )


def status_number(name: str | None) -> pb.RunStatus.ValueType:
    """Return the status that a client names; None is any."""
    return pb.RUN_STATUS_UNSPECIFIED if name is None else pb.RunStatus.Value(f"RUN_STATUS_{name.upper()}")


def status_name(status: pb.RunStatus.ValueType) -> RunStatus:
    """Return the status as clients know it."""
    return _STATUSES[status]


# The events of one turn share a few milliseconds, and so do the runs of a busy moment.
@lru_cache(maxsize=1024)
def timestamp(unix_ms: int) -> str:
    """Return ISO 8601 in UTC with milliseconds, such as 2026-11-21T20:15:00.000Z."""
    seconds, ms = divmod(unix_ms, 1000)
    return f"{_second(seconds)}.{ms:03d}Z"


@lru_cache(maxsize=64)
def _second(seconds: int) -> str:
    return strftime("%Y-%m-%dT%H:%M:%S", gmtime(seconds))
