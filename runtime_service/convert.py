"""Domain values to and from protobuf messages. Pure.

Messages are filled where they stand: one that is put into another is copied, by way of its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service.live_run import Delta, Update
from runtime_service.runs import TERMINAL, EventRole, LogLevel, Run, RunEvent, RunMode, RunStatus

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer as MessageList

    _HasState = rpc.RunUpdate | rpc.GetRunResponse | rpc.ListRunEventsResponse | rpc.CancelRunResponse

_STATUS = {status: pb.RunStatus.Value(f"RUN_STATUS_{status.name}") for status in RunStatus}
_STATUS_BACK = {number: status for status, number in _STATUS.items()}
_MODE = {mode: pb.RunMode.Value(f"RUN_MODE_{mode.name}") for mode in RunMode}
_ROLE = {role: pb.EventRole.Value(f"EVENT_ROLE_{role.name}") for role in EventRole}
_LEVEL = {level: pb.LogLevel.Value(f"LOG_LEVEL_{level.name}") for level in LogLevel}
_ROLE_BACK = {number: role for role, number in _ROLE.items()}
_LEVEL_BACK = {number: level for level, number in _LEVEL.items()}
_THREAD_STATUS = {
    RunStatus.QUEUED: pb.THREAD_STATUS_ACTIVE,
    RunStatus.RUNNING: pb.THREAD_STATUS_RUNNING,
    RunStatus.COMPLETED: pb.THREAD_STATUS_COMPLETED,
    RunStatus.FAILED: pb.THREAD_STATUS_FAILED,
    RunStatus.CANCELLED: pb.THREAD_STATUS_CANCELLED,
}


def fill_run(message: pb.Run, run: Run, session_protocol: str) -> None:
    """Put the run, as it shows its turn, into an empty message."""
    turn = run.turn
    message.id = run.id
    message.server_id = run.server_id
    message.thread_id = run.thread_id
    message.created_at_unix_ms = run.created_at_ms
    message.last_sequence = run.last_sequence
    message.turn = turn.number
    message.status = _STATUS[turn.status]
    message.mode = _MODE[turn.mode]
    message.input = turn.input
    message.session_protocol = session_protocol
    message.turn_first_sequence = turn.first_sequence
    if run.question is not None and _asks(run):
        message.question_sequence = run.question.sequence
    if run.title:
        message.title = run.title
    if turn.output:
        message.output = turn.output
    if turn.error:
        message.error = turn.error
    if turn.error_code:
        message.error_code = turn.error_code
    if turn.metadata:
        message.metadata_json = turn.metadata
    if turn.completed_at_ms:
        message.completed_at_unix_ms = turn.completed_at_ms


def fill_thread(message: pb.Thread, run: Run) -> None:
    """Put the run's thread into an empty message."""
    message.id = run.thread_id
    message.status = pb.THREAD_STATUS_PERMISSION_ASKED if _asks(run) else _THREAD_STATUS[run.turn.status]
    message.message_count = run.message_count
    message.created_at_unix_ms = run.created_at_ms
    message.updated_at_unix_ms = run.updated_at_ms
    if run.title:
        message.title = run.title
    if run.thread_metadata:
        message.metadata_json = run.thread_metadata


def _asks(run: Run) -> bool:
    """Return whether the run is shown as one that asks; an earlier turn that is over does not."""
    return run.is_asking and run.turn.status not in TERMINAL


def fill_state(message: _HasState, run: Run, session_protocol: str) -> None:
    """Put the run and its thread into a message that shows both."""
    fill_run(message.run, run, session_protocol)
    fill_thread(message.thread, run)


def add_events(messages: MessageList[pb.RunEvent], run: Run, events: Iterable[RunEvent]) -> None:
    """Add events of the run's log to a list of messages."""
    prefix = run.event_id_prefix
    add = messages.add
    for event in events:
        message = add()
        sequence = event.sequence
        message.id = f"{prefix}{sequence}"
        message.sequence = sequence
        message.turn = event.turn
        message.role = _ROLE[event.role]
        message.content = event.content
        message.created_at_unix_ms = event.created_at_ms
        if event.log_type:
            message.log_type = event.log_type
        if event.log_level is not None:
            message.log_level = _LEVEL[event.log_level]
        if event.metadata:
            message.metadata_json = event.metadata


def fill_update(message: rpc.RunUpdate, run: Run, update: Update, session_protocol: str) -> None:
    """Put an update of the followed run, which names it, into an empty message."""
    if update.run is not None:
        fill_state(message, update.run, session_protocol)
    add_events(message.events, run, update.events)
    if update.delta is not None:
        message.delta.sequence, message.delta.offset, message.delta.text = update.delta


def update_from(message: rpc.RunUpdate, run: Run) -> Update:
    """Return the update of a message about `run`; of the run itself, no more than that it is shown again."""
    delta = Delta(*[getattr(message.delta, name) for name in Delta._fields]) if message.HasField("delta") else None
    return Update(run if message.HasField("run") else None, tuple([_event_from(e) for e in message.events]), delta)


def _event_from(message: pb.RunEvent) -> RunEvent:
    return RunEvent(
        message.sequence,
        message.turn,
        _ROLE_BACK[message.role],
        message.content,
        message.created_at_unix_ms,
        message.log_type or None,
        _LEVEL_BACK.get(message.log_level),
        message.metadata_json or None,
    )


def run_mode(mode: pb.RunMode.ValueType) -> RunMode:
    """Return the mode asked for; unspecified is sync."""
    return RunMode.ASYNC if mode == pb.RUN_MODE_ASYNC else RunMode.SYNC


def run_status(status: pb.RunStatus.ValueType) -> RunStatus | None:
    """Return the status asked for; unspecified is None, for any."""
    return _STATUS_BACK.get(status)
