"""Domain values as protobuf messages."""

import msgspec
import pytest

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service.convert import add_events, fill_run, fill_thread, fill_update, run_mode, run_status
from runtime_service.live_run import Delta, Update
from runtime_service.runs import EventRole, LogLevel, Question, Run, RunEvent, RunMode, RunStatus, Turn

TURN = Turn(
    number=2,
    status=RunStatus.FAILED,
    mode=RunMode.ASYNC,
    input="hello",
    first_sequence=3,
    created_at_ms=50,
    output="half",
    error="It broke.",
    error_code="AGENT_FAILED",
    metadata=b'{ "b":1}',
    completed_at_ms=70,
    attempt=1,
    epoch=4,
)
RUN = Run("run_1", "default", "assistant", 10, 60, 4, 7, 2, TURN, "A title", b'{"a":1}')
EVENT = RunEvent(7, 2, EventRole.EXECUTION_LOG, "é", 60, "tool_call", LogLevel.WARNING, b"{}")


def run_message(run: Run, session_protocol: str) -> pb.Run:
    """A message that is filled with a run."""
    message = pb.Run()
    fill_run(message, run, session_protocol)
    return message


def thread_message(run: Run) -> pb.Thread:
    """A message that is filled with a run's thread."""
    message = pb.Thread()
    fill_thread(message, run)
    return message


def event_message(run: Run, event: RunEvent) -> pb.RunEvent:
    """The one message that is added for an event."""
    page = rpc.ListRunEventsResponse()
    add_events(page.events, run, [event])
    [message] = page.events
    return message


def update_message(run: Run, update: Update, session_protocol: str) -> rpc.RunUpdate:
    """A message that is filled with an update."""
    message = rpc.RunUpdate()
    fill_update(message, run, update, session_protocol)
    return message


def at_status(status: RunStatus) -> Run:
    """The run in a status."""
    return msgspec.structs.replace(RUN, turn=msgspec.structs.replace(TURN, status=status))


def test_run_message_carries_every_field() -> None:
    """Of the run, and of the turn that it shows."""
    assert run_message(RUN, "in-process") == pb.Run(
        id="run_1",
        server_id="assistant",
        thread_id="thread_1",
        title="A title",
        created_at_unix_ms=10,
        last_sequence=7,
        turn=2,
        status=pb.RUN_STATUS_FAILED,
        mode=pb.RUN_MODE_ASYNC,
        input="hello",
        output="half",
        error="It broke.",
        error_code="AGENT_FAILED",
        metadata_json=b'{ "b":1}',
        completed_at_unix_ms=70,
        session_protocol="in-process",
        turn_first_sequence=3,
    )


def test_run_message_of_a_new_run_leaves_empty_what_is_not_there() -> None:
    """None becomes empty or 0."""
    turn = Turn(1, RunStatus.QUEUED, RunMode.SYNC, "hello", 1, 5)
    message = run_message(Run("run_1", "default", "assistant", 5, 5, 1, 1, 1, turn), "")
    assert (message.title, message.output, message.error, message.error_code) == ("", "", "", "")
    assert (message.metadata_json, message.completed_at_unix_ms) == (b"", 0)


def test_thread_message_carries_every_field() -> None:
    """The thread's own metadata, not the turn's."""
    assert thread_message(RUN) == pb.Thread(
        id="thread_1",
        title="A title",
        status=pb.THREAD_STATUS_FAILED,
        message_count=4,
        metadata_json=b'{"a":1}',
        created_at_unix_ms=10,
        updated_at_unix_ms=60,
    )


def test_event_message_carries_every_field() -> None:
    """With the id that the run gives it."""
    assert event_message(RUN, EVENT) == pb.RunEvent(
        id="event_1_7",
        sequence=7,
        turn=2,
        role=pb.EVENT_ROLE_EXECUTION_LOG,
        content="é",
        log_type="tool_call",
        log_level=pb.LOG_LEVEL_WARNING,
        created_at_unix_ms=60,
        metadata_json=b"{}",
    )
    plain = event_message(RUN, RunEvent(1, 1, EventRole.USER, "", 1))
    assert (plain.log_type, plain.log_level, plain.metadata_json) == ("", pb.LOG_LEVEL_UNSPECIFIED, b"")


@pytest.mark.parametrize("status", RunStatus)
def test_every_status_has_its_name_in_the_contract(status: RunStatus) -> None:
    """Of the run and back; of the thread by the table of the API."""
    number = run_message(at_status(status), "").status
    assert pb.RunStatus.Name(number) == f"RUN_STATUS_{status.name}"
    assert run_status(number) is status
    thread = pb.ThreadStatus.Name(thread_message(at_status(status)).status).removeprefix("THREAD_STATUS_")
    assert thread == {"QUEUED": "ACTIVE"}.get(status.name, status.name)


@pytest.mark.parametrize("mode", RunMode)
def test_every_mode_has_its_name_in_the_contract(mode: RunMode) -> None:
    """And comes back; unspecified is sync."""
    run = msgspec.structs.replace(RUN, turn=msgspec.structs.replace(TURN, mode=mode))
    number = run_message(run, "").mode
    assert pb.RunMode.Name(number) == f"RUN_MODE_{mode.name}"
    assert run_mode(number) is mode
    assert run_mode(pb.RUN_MODE_UNSPECIFIED) is RunMode.SYNC


@pytest.mark.parametrize("role", EventRole)
def test_every_role_has_its_name_in_the_contract(role: EventRole) -> None:
    """One to one."""
    message = event_message(RUN, msgspec.structs.replace(EVENT, role=role))
    assert pb.EventRole.Name(message.role) == f"EVENT_ROLE_{role.name}"


@pytest.mark.parametrize("level", LogLevel)
def test_every_level_has_its_name_in_the_contract(level: LogLevel) -> None:
    """One to one, `warn` and `warning` kept apart."""
    message = event_message(RUN, msgspec.structs.replace(EVENT, log_level=level))
    assert pb.LogLevel.Name(message.log_level) == f"LOG_LEVEL_{level.name}"


def test_no_status_is_any() -> None:
    """A list without a status is a list of all."""
    assert run_status(pb.RUN_STATUS_UNSPECIFIED) is None


def test_update_message_says_what_is_new_and_no_more() -> None:
    """The run and its thread come together or not at all; so does a delta."""
    assert update_message(RUN, Update(), "p") == rpc.RunUpdate()
    message = update_message(RUN, Update(events=(EVENT, EVENT)), "p")
    assert [event.sequence for event in message.events] == [7, 7]
    assert not message.HasField("run")
    assert not message.HasField("thread")
    message = update_message(RUN, Update(run=at_status(RunStatus.RUNNING)), "p")
    assert (message.run.status, message.thread.status) == (pb.RUN_STATUS_RUNNING, pb.THREAD_STATUS_RUNNING)
    assert message.run.session_protocol == "p"
    message = update_message(RUN, Update(delta=Delta(8, 0, "é")), "p")
    assert message.HasField("delta")
    assert message.delta == rpc.ContentDelta(sequence=8, offset=0, text="é")


@pytest.mark.parametrize("status", RunStatus)
def test_run_asks_as_long_as_the_turn_shown_is_not_over(status: RunStatus) -> None:
    """An earlier turn, which is over, is not shown as asking what a later one asks."""
    asking = msgspec.structs.replace(at_status(status), question=Question(7))
    is_open = status in (RunStatus.QUEUED, RunStatus.RUNNING)
    assert run_message(asking, "").question_sequence == (7 if is_open else 0)
    assert (thread_message(asking).status == pb.THREAD_STATUS_PERMISSION_ASKED) is is_open
    answered = msgspec.structs.replace(asking, question=Question(7, is_open=False))
    assert run_message(answered, "").question_sequence == 0
    assert thread_message(answered).status != pb.THREAD_STATUS_PERMISSION_ASKED
