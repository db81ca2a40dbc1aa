"""Protobuf messages as ACP documents."""

import json
from datetime import UTC, datetime
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import schema
from gateway.codec import (
    TERMINAL,
    encode,
    event_document,
    run_document,
    status_name,
    status_number,
    thread_document,
    timestamp,
)
from protos.acp.runs.v1 import run_pb2 as pb

METADATA = b'{"n": 123456789012345678901234567890,"z":null, "a":{"e":{}},"f":1.0E+2,"u":"\\u00fc"}'


def run(**fields: Any) -> pb.Run:
    """A run with what every run has."""
    always = {
        "id": "run_1",
        "server_id": "echo",
        "thread_id": "thread_1",
        "input": "hello",
        "mode": pb.RUN_MODE_SYNC,
        "status": pb.RUN_STATUS_QUEUED,
        "created_at_unix_ms": 1_000,
    }
    return pb.Run(**{**always, **fields})


def thread(**fields: Any) -> pb.Thread:
    """A thread with what every thread has."""
    always = {"id": "thread_1", "status": pb.THREAD_STATUS_ACTIVE, "message_count": 1, "created_at_unix_ms": 1_000}
    return pb.Thread(**{**always, "updated_at_unix_ms": 2_000, **fields})


def event(**fields: Any) -> pb.RunEvent:
    """An event with what every event has."""
    always = {"id": "event_1", "sequence": 1, "turn": 1, "role": pb.EVENT_ROLE_USER, "created_at_unix_ms": 1_000}
    return pb.RunEvent(**{**always, **fields})


def decoded(document: msgspec.Struct) -> dict[str, Any]:
    """The document as a client reads it."""
    read: dict[str, Any] = json.loads(encode(document))
    return read


def test_run_shows_every_field() -> None:
    """Each field of the message is where the contract wants it."""
    message = run(
        title="T",
        status=pb.RUN_STATUS_FAILED,
        output="O",
        error="E",
        error_code="C",
        metadata_json=b'{"a":1}',
        completed_at_unix_ms=2_500,
        session_protocol="in-process",
    )
    assert decoded(run_document(message, thread(status=pb.THREAD_STATUS_FAILED))) == {
        "id": "run_1",
        "serverId": "echo",
        "threadId": "thread_1",
        "title": "T",
        "input": "hello",
        "output": "O",
        "mode": "sync",
        "status": "failed",
        "error": "E",
        "errorCode": "C",
        "metadata": {"a": 1},
        "createdAt": "1970-01-01T00:00:01.000Z",
        "completedAt": "1970-01-01T00:00:02.500Z",
        "sessionProtocol": "in-process",
        "threadBacked": True,
        "threadStatus": "failed",
        "threadTitle": "T",
    }


def test_thread_and_event_show_every_field() -> None:
    """Threads and events, too."""
    assert decoded(thread_document(thread(title="T", metadata_json=b'{"a":1}', message_count=0))) == {
        "id": "thread_1",
        "title": "T",
        "status": "active",
        "messageCount": 0,
        "metadata": {"a": 1},
        "createdAt": "1970-01-01T00:00:01.000Z",
        "updatedAt": "1970-01-01T00:00:02.000Z",
    }
    message = event(content="C", log_type="L", log_level=pb.LOG_LEVEL_WARN, metadata_json=b"{}", sequence=2**53)
    assert decoded(event_document(message)) == {
        "id": "event_1",
        "sequence": 2**53,
        "role": "user",
        "content": "C",
        "logType": "L",
        "logLevel": "warn",
        "metadata": {},
        "createdAt": "1970-01-01T00:00:01.000Z",
    }


def test_fields_without_a_value_are_left_out() -> None:
    """There is no null in a document, and no empty string but where a field is always there."""
    assert decoded(run_document(run(), thread())).keys() == {
        *("id", "serverId", "threadId", "input", "mode", "status", "createdAt", "threadBacked", "threadStatus"),
    }
    assert decoded(thread_document(thread())).keys() == {"id", "status", "messageCount", "createdAt", "updatedAt"}
    assert decoded(event_document(event())) == {
        "id": "event_1",
        "sequence": 1,
        "role": "user",
        "content": "",
        "createdAt": "1970-01-01T00:00:01.000Z",
    }


@pytest.mark.parametrize("name", get_args(schema.RunStatus))
def test_run_status_is_named(name: str) -> None:
    """Every status goes both ways; three of them are final."""
    number = status_number(name)
    assert status_name(number) == name
    assert decoded(run_document(run(status=number), thread()))["status"] == name
    assert (number in TERMINAL) == (name in ("completed", "failed", "cancelled"))


def test_no_status_is_any() -> None:
    """A list without a status is of all."""
    assert status_number(None) == pb.RUN_STATUS_UNSPECIFIED


@pytest.mark.parametrize("name", get_args(schema.RunMode))
def test_run_mode_is_named(name: str) -> None:
    """Both modes."""
    number = pb.RunMode.Value(f"RUN_MODE_{name.upper()}")
    assert decoded(run_document(run(mode=number), thread()))["mode"] == name


@pytest.mark.parametrize("name", get_args(schema.ThreadStatus))
def test_thread_status_is_named(name: str) -> None:
    """Every status of a thread, in the thread and in its run."""
    message = thread(status=pb.ThreadStatus.Value(f"THREAD_STATUS_{name.upper()}"))
    assert decoded(thread_document(message))["status"] == name
    assert decoded(run_document(run(), message))["threadStatus"] == name


@pytest.mark.parametrize("name", get_args(schema.EventRole))
def test_event_role_is_named(name: str) -> None:
    """Every role."""
    message = event(role=pb.EventRole.Value(f"EVENT_ROLE_{name.upper()}"))
    assert decoded(event_document(message))["role"] == name


@pytest.mark.parametrize("name", get_args(schema.LogLevel))
def test_log_level_is_named(name: str) -> None:
    """Every level, both spellings of a warning."""
    message = event(log_level=pb.LogLevel.Value(f"LOG_LEVEL_{name.upper()}"))
    assert decoded(event_document(message))["logLevel"] == name


@pytest.mark.parametrize(
    ("enum", "names"),
    [
        (pb.RunStatus, schema.RunStatus),
        (pb.RunMode, schema.RunMode),
        (pb.ThreadStatus, schema.ThreadStatus),
        (pb.EventRole, schema.EventRole),
        (pb.LogLevel, schema.LogLevel),
    ],
)
def test_schema_knows_every_value_of_the_protos(enum: Any, names: object) -> None:
    """No value of an enum is missing on the REST side."""
    values = [name for name in enum.keys() if not name.endswith("_UNSPECIFIED")]  # noqa: SIM118 - no mapping
    assert len(values) == len(get_args(names))


def test_metadata_is_copied_to_the_byte() -> None:
    """The caller's text goes through as it is, wherever metadata is."""
    for document in (
        run_document(run(metadata_json=METADATA), thread()),
        thread_document(thread(metadata_json=METADATA)),
        event_document(event(metadata_json=METADATA)),
    ):
        assert b'"metadata":' + METADATA in encode(document)


@given(st.text())
def test_text_comes_back(text: str) -> None:
    """Any text that protobuf can hold is the same after JSON."""
    text = text.encode("utf-8", "replace").decode()
    assert decoded(event_document(event(content=text)))["content"] == text


@pytest.mark.parametrize(
    ("unix_ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (999, "1970-01-01T00:00:00.999Z"),
        (951_782_400_010, "2000-02-29T00:00:00.010Z"),
        (1_795_292_100_100, "2026-11-21T20:15:00.100Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
    ],
)
def test_timestamp_is_iso_8601_in_utc(unix_ms: int, text: str) -> None:
    """Three digits of milliseconds and a Z, always."""
    assert timestamp(unix_ms) == text


@given(st.integers(0, 253_402_300_799_999))
def test_timestamp_is_the_moment(unix_ms: int) -> None:
    """Read back, it is the millisecond that it was."""
    read = datetime.fromisoformat(timestamp(unix_ms))
    assert read.tzinfo == UTC
    assert (read - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1000 == pytest.approx(unix_ms, abs=0.25)
