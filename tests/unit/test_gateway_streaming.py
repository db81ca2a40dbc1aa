"""The frames of live answers, and which form a client asks for."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ApiError
from gateway.streaming import Frames, StreamForm, StreamRelay, stream_form
from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from tests.support import run_async
from tests.unit.test_gateway_codec import event, run, thread

FORMS: list[StreamForm] = ["sse", "ndjson"]


def documents_of(form: StreamForm, data: bytes) -> list[tuple[int | None, dict[str, Any]]]:
    """The ids and documents of frames, of which each is as it must be."""
    assert data.endswith(b"\n\n" if form == "sse" else b"\n")
    found = []
    for frame in data.decode().split("\n\n" if form == "sse" else "\n")[:-1]:
        *head, line = frame.split("\n")
        assert line.splitlines() == [line]
        if form == "sse":
            assert line.startswith("data: ")
            line = line.removeprefix("data: ")
        assert len(head) <= (1 if form == "sse" else 0)
        found.append((int(head[0].removeprefix("id: ")) if head else None, json.loads(line)))
    return found


def types_of(form: StreamForm, data: bytes) -> list[str]:
    """What the frames are."""
    return [document["type"] for _, document in documents_of(form, data)]


@pytest.mark.parametrize("form", FORMS)
def test_update_is_told_in_order(form: StreamForm) -> None:
    """The run, its events, then the delta; only events have an id, their sequence."""
    update = rpc.RunUpdate(
        run=run(status=pb.RUN_STATUS_RUNNING),
        thread=thread(status=pb.THREAD_STATUS_RUNNING),
        events=[event(sequence=4), event(sequence=5, content="x")],
        delta=rpc.ContentDelta(sequence=6, offset=2, text="y"),
    )
    found = documents_of(form, Frames(form).update(update))
    assert [document["type"] for _, document in found] == ["run.updated", "run.event", "run.event", "run.delta"]
    assert [id_ for id_, _ in found] == ([None, 4, 5, None] if form == "sse" else [None] * 4)
    assert found[0][1]["run"]["status"] == found[0][1]["run"]["threadStatus"] == "running"
    assert found[2][1]["event"]["content"] == "x"
    assert found[3][1] == {"type": "run.delta", "sequence": 6, "offset": 2, "text": "y"}


@pytest.mark.parametrize("form", FORMS)
def test_ended_run_is_told_behind_its_events(form: StreamForm) -> None:
    """Who acts on a run that has ended has seen all its events by then; stream.completed comes last."""
    frames = Frames(form)
    update = rpc.RunUpdate(run=run(status=pb.RUN_STATUS_COMPLETED), thread=thread(), events=[event()])
    assert types_of(form, frames.update(update)) == ["run.event", "run.updated"]
    assert types_of(form, frames.completed()) == ["stream.completed"]


@pytest.mark.parametrize("form", FORMS)
def test_completed_shows_the_last_run_and_thread(form: StreamForm) -> None:
    """Updates without a run do not make it forget."""
    frames = Frames(form)
    frames.update(rpc.RunUpdate(run=run(output="old"), thread=thread()))
    frames.update(rpc.RunUpdate(run=run(output="new"), thread=thread(message_count=7)))
    frames.update(rpc.RunUpdate(events=[event()]))
    ((id_, document),) = documents_of(form, frames.completed())
    assert id_ is None
    assert document.keys() == {"type", "run", "thread"}
    assert document["run"]["output"] == "new"
    assert document["thread"]["messageCount"] == 7


@pytest.mark.parametrize("form", FORMS)
def test_error_is_the_flat_document(form: StreamForm) -> None:
    """What went wrong in the middle is told in the words of an error answer."""
    error = ApiError(503, "DRAINING", "The runtime service is stopping.", details=[{"field": "a", "message": "b"}])
    ((id_, document),) = documents_of(form, Frames(form).error(error))
    assert id_ is None
    assert document == {
        "type": "stream.error",
        "error": "Service Unavailable",
        "message": "The runtime service is stopping.",
        "code": "DRAINING",
        "details": [{"field": "a", "message": "b"}],
    }


@pytest.mark.parametrize("form", FORMS)
def test_empty_update_is_nothing(form: StreamForm) -> None:
    """No frame without a document."""
    assert Frames(form).update(rpc.RunUpdate()) == b""


@pytest.mark.parametrize("form", FORMS)
@given(text=st.text(st.sampled_from("a\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\\\"'é€𝔱:\x7f\0")))
def test_line_breaks_stay_inside(form: StreamForm, text: str) -> None:
    """Whatever breaks lines, in texts, keys and metadata, each frame is one line that reads back to it."""
    metadata = json.dumps({text: [text, {"a": text}]}, indent="\r\n ", ensure_ascii=False)
    update = rpc.RunUpdate(
        run=run(input=text, metadata_json=metadata.encode()),
        thread=thread(title=text),
        events=[event(content=text, log_type=text, metadata_json=metadata.encode())],
        delta=rpc.ContentDelta(text=text),
    )
    frames = Frames(form)
    found = [document for _, document in documents_of(form, frames.update(update) + frames.completed())]
    assert found[0]["run"]["input"] == found[1]["event"]["content"] == found[2]["text"] == text
    assert found[0]["run"]["metadata"] == found[1]["event"]["metadata"] == json.loads(metadata)
    assert found[3]["thread"].get("title", "") == text


def test_heartbeats_are_no_documents() -> None:
    """A comment in SSE, a blank line in NDJSON."""
    assert Frames("sse").heartbeat == b": keep-alive\n\n"
    assert Frames("ndjson").heartbeat == b"\n"


@pytest.mark.parametrize("form", FORMS)
def test_nothing_comes_behind_the_end(form: StreamForm) -> None:
    """A client that is slow to read the end of its stream is sent no heartbeat meanwhile: it would be no part of it."""
    written: list[bytes] = []

    class Updates:
        def __init__(self) -> None:
            self.left = [rpc.RunUpdate(run=run(), thread=thread())]

        async def next(self) -> rpc.RunUpdate | None:
            return self.left.pop() if self.left else None

        def stop(self) -> None:
            pass

    class Response:
        async def prepare(self, _: object) -> None:
            pass

        async def write(self, data: bytes) -> None:
            written.append(data)
            await beat_once()

        async def write_eof(self) -> None:
            written.append(b"the end")
            await beat_once()

    async def beat_once() -> None:
        if written[-1] != Frames(form).heartbeat:
            await relay.beat()

    request: Any = SimpleNamespace(transport=None)
    updates: Any = Updates()
    response: Any = Response()
    relay = StreamRelay(request, updates, Frames(form))
    run_async(relay.run(lambda _: response))
    assert written[1] == Frames(form).heartbeat
    assert types_of(form, written[2]) == ["stream.completed"]
    assert written[3:] == [b"the end"]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, None),
        ("", None),
        ("*/*", None),
        ("application/json", None),
        ("application/*", None),
        ("text/html,application/xhtml+xml,*/*;q=0.8", None),
        ("text/plain", None),
        ("text/*", None),
        ("text/event-stream", "sse"),
        ("TEXT/EVENT-STREAM", "sse"),
        ("text/event-stream; charset=utf-8", "sse"),
        ("text/html, text/event-stream", "sse"),
        ("text/event-stream, application/json", "sse"),
        ("application/json, text/event-stream", None),
        ("application/json;q=0.5, text/event-stream", "sse"),
        ("text/event-stream;q=0.5, application/json", None),
        ("text/event-stream;q=0", None),
        ("text/event-stream;q=0.000, application/x-ndjson;q=0.1", "ndjson"),
        ("text/event-stream;q=x", None),
        ("text/event-stream;q=nan", None),
        ("application/x-ndjson", "ndjson"),
        ("application/x-ndjson, text/event-stream", "ndjson"),
        (",,;,text/event-stream", "sse"),
    ],
)
def test_accept_decides_the_form(accept: str | None, expected: StreamForm | None) -> None:
    """The best quality wins, of equals the first; what is not known is passed over."""
    assert stream_form(accept) == expected
