"""Domain values to and from protobuf messages. Pure."""

from __future__ import annotations

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service.event_log import Update
from runtime_service.runs import EventRole, LogLevel, Run, RunEvent, RunMode, RunStatus

_STATUS = {status: pb.RunStatus.Value(f"RUN_STATUS_{status.name}") for status in RunStatus}
_STATUS_BACK = {number: status for status, number in _STATUS.items()}
_MODE = {mode: pb.RunMode.Value(f"RUN_MODE_{mode.name}") for mode in RunMode}
_ROLE = {role: pb.EventRole.Value(f"EVENT_ROLE_{role.name}") for role in EventRole}
_LEVEL: dict[LogLevel | None, pb.LogLevel.ValueType] = {None: pb.LOG_LEVEL_UNSPECIFIED} | {
    level: pb.LogLevel.Value(f"LOG_LEVEL_{level.name}") for level in LogLevel
}
_THREAD_STATUS = {
    RunStatus.QUEUED: pb.THREAD_STATUS_ACTIVE,
    RunStatus.RUNNING: pb.THREAD_STATUS_RUNNING,
    RunStatus.COMPLETED: pb.THREAD_STATUS_COMPLETED,
    RunStatus.FAILED: pb.THREAD_STATUS_FAILED,
    RunStatus.CANCELLED: pb.THREAD_STATUS_CANCELLED,
}


def run_message(run: Run, session_protocol: str) -> pb.Run:
    """Return the run as it shows its turn."""
    turn = run.turn
    return pb.Run(
        id=run.id,
        server_id=run.server_id,
        thread_id=run.thread_id,
        title=run.title or "",
        created_at_unix_ms=run.created_at_ms,
        last_sequence=run.last_sequence,
        turn=turn.number,
        status=_STATUS[turn.status],
        mode=_MODE[turn.mode],
        input=turn.input,
        output=turn.output or "",
        error=turn.error or "",
        error_code=turn.error_code or "",
        metadata_json=turn.metadata or b"",
        completed_at_unix_ms=turn.completed_at_ms or 0,
        session_protocol=session_protocol,
        turn_first_sequence=turn.first_sequence,
    )


def thread_message(run: Run) -> pb.Thread:
    """Return the run's thread."""
    return pb.Thread(
        id=run.thread_id,
        title=run.title or "",
        status=_THREAD_STATUS[run.turn.status],
        message_count=run.message_count,
        metadata_json=run.thread_metadata or b"",
        created_at_unix_ms=run.created_at_ms,
        updated_at_unix_ms=run.updated_at_ms,
    )


def event_message(run: Run, event: RunEvent) -> pb.RunEvent:
    """Return an event of the run's log."""
    return pb.RunEvent(
        id=run.event_id(event.sequence),
        sequence=event.sequence,
        turn=event.turn,
        role=_ROLE[event.role],
        content=event.content,
        log_type=event.log_type or "",
        log_level=_LEVEL[event.log_level],
        created_at_unix_ms=event.created_at_ms,
        metadata_json=event.metadata or b"",
    )


def update_message(run: Run, update: Update, session_protocol: str) -> rpc.RunUpdate:
    """Return an update of the followed run, which names it."""
    message = rpc.RunUpdate(events=[event_message(run, event) for event in update.events])
    if update.run is not None:
        message.run.CopyFrom(run_message(update.run, session_protocol))
        message.thread.CopyFrom(thread_message(update.run))
    if update.delta is not None:
        sequence, offset, text = update.delta
        message.delta.CopyFrom(rpc.ContentDelta(sequence=sequence, offset=offset, text=text))
    return message


def run_mode(mode: pb.RunMode.ValueType) -> RunMode:
    """Return the mode asked for; unspecified is sync."""
    return RunMode.ASYNC if mode == pb.RUN_MODE_ASYNC else RunMode.SYNC


def run_status(status: pb.RunStatus.ValueType) -> RunStatus | None:
    """Return the status asked for; unspecified is None, for any."""
    return _STATUS_BACK.get(status)
