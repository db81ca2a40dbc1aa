"""The event log in its three forms: JSON in pages, Server-Sent Events, NDJSON; replayed and live."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.integration.stack import GATES, Frame, Stack, runs, serving, until
from tests.integration.test_gateway import FAMILIES, check_run, said, sequences
from tests.support import run_async

STREAMED = {"text/event-stream": "text/event-stream", "application/x-ndjson": "application/x-ndjson"}


def events_of(frames: list[Frame]) -> list[dict[str, Any]]:
    """The whole events among the frames."""
    return [frame.document["event"] for frame in frames if frame.type == "run.event"]


def statuses_of(frames: list[Frame]) -> list[str]:
    """The statuses that the frames tell."""
    return [frame.document["run"]["status"] for frame in frames if frame.type == "run.updated"]


def check_stream(frames: list[Frame]) -> None:
    """Every document is one line; only events have ids, their sequence; the last one ends the stream."""
    for frame in frames:
        if frame.type == "run.event":
            assert frame.id in (None, frame.document["event"]["sequence"])
        else:
            assert frame.id is None
    ends = [frame.type for frame in frames if frame.type.startswith("stream.")]
    assert len(ends) == 1
    assert ends == [frames[-1].type]
    numbers = sequences(events_of(frames))
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


# -- JSON ----------------------------------------------------------------------------------------------


def test_log_is_paged_by_after_and_limit(tmp_path: Path) -> None:
    """`after` and `limit` cut pages of any size out of the log, `has_more` says whether it goes on."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = (await stack.start("flood", "2500")).headers["Location"] + "/events"
            for query, expected, has_more in (
                ("", range(1, 2502), False),
                ("?limit=1", range(1, 2), True),
                ("?after=10&limit=1500", range(11, 1511), True),
                ("?after=2490&limit=11", range(2491, 2502), False),
                ("?after=2490&limit=10", range(2491, 2501), True),
                ("?after=2501", range(0), False),
                ("?after=9007199254740991&limit=5", range(0), False),
                ("?limit=9999999999", range(1, 2502), False),
            ):
                page = (await stack.call("GET", path + query)).json
                assert sequences(page["events"]) == list(expected), query
                assert page["has_more"] is has_more, query

    run_async(main())


def test_log_of_ten_thousand_events_is_whole(tmp_path: Path) -> None:
    """A long log comes in pieces, as one valid document with every event once: start, get, JSON, SSE and NDJSON."""
    expected = list(range(1, 10_002))

    async def main() -> None:
        async with serving(tmp_path) as stack:
            started = await stack.start("flood", "10000")
            assert started.status == 201
            assert sequences(started.events) == expected
            assert started.events[-1]["content"] == "line 9999"
            path = started.headers["Location"]
            for query in ("?include=events", "/events"):
                answer = await stack.call("GET", path + query)
                assert answer.headers["Transfer-Encoding"] == "chunked"
                assert sequences(answer.events) == expected
            assert answer.json["has_more"] is False
            for accept in STREAMED:
                async with stack.stream("GET", path + "/events", accept=accept) as stream:
                    frames = await stream.rest()
                check_stream(frames)
                assert sequences(events_of(frames)) == expected

    run_async(main())


def test_log_of_large_events_is_whole(tmp_path: Path) -> None:
    """Megabytes of events, more than any message between the programs may hold, come whole in every form."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            started = await stack.start("heavy", "12")
            assert len(started.events) == 49
            path = started.headers["Location"] + "/events"
            assert (await stack.call("GET", path)).events == started.events
            async with stack.stream("GET", path) as stream:
                assert events_of(await stream.rest()) == started.events

    run_async(main())


def test_wait_holds_a_page_until_there_is_an_event(tmp_path: Path) -> None:
    """A long poll is answered by the next event; with events there, or on a run that has ended, at once."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("gated", "long poll") + "/events"
            await stack.call("GET", path + "?after=1&wait=20")
            polling = asyncio.create_task(stack.call("GET", path + "?after=2&wait=20"))
            assert sequences((await stack.call("GET", path + "?wait=20")).events) == [1, 2]
            assert not polling.done()
            GATES["long poll"].open.set()
            answer = await polling
            assert said(answer.events) == [("assistant", "long poll")]
            assert answer.run["status"] == "completed"
            assert (await stack.call("GET", path + "?after=3&wait=20")).events == []

    run_async(main())


def test_wait_ends_without_an_event(tmp_path: Path) -> None:
    """When nothing comes the page is empty, and the run as it is; no longer than the wait limit."""

    async def main() -> None:
        async with serving(tmp_path, wait_limit_seconds=1) as stack:
            path = await stack.start_async("gated", "long poll in vain") + "/events"
            await GATES["long poll in vain"].reached.wait()
            await stack.call("GET", path + "?after=1&wait=20")
            answer = await stack.call("GET", path + "?after=2&wait=20")
            assert answer.status == 200
            assert answer.events == []
            assert answer.json["has_more"] is False
            assert answer.run["status"] == "running"

    run_async(main())


# -- Streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", STREAMED)
@pytest.mark.parametrize("family", FAMILIES)
def test_start_and_continue_stream_their_turn(family: str, accept: str, tmp_path: Path) -> None:
    """Start and continue stream their own turn, from the user's message to the end of the stream."""
    path = FAMILIES[family]

    async def main() -> None:
        async with serving(tmp_path) as stack:
            for status, operation in ((201, path), (200, "")):
                async with stack.stream("POST", operation or path + "/input", {"content": "a b"}, accept=accept) as stream:
                    response = stream.response
                    assert response.status == status
                    assert response.content_type == STREAMED[accept]
                    assert response.headers["Cache-Control"] == "no-cache"
                    assert response.headers["X-Accel-Buffering"] == "no"
                    assert response.headers["X-Request-Id"]
                    path_of_run = response.headers["Location"]
                    frames = await stream.rest()
                check_stream(frames)
                assert said(events_of(frames)) == [("user", "a b"), ("assistant", "a b")]
                assert frames[0].type == "run.updated"
                end = frames[-1].document
                assert end.keys() == {"type", "run", "thread"}
                check_run(end["run"])
                assert (end["type"], end["run"]["status"]) == ("stream.completed", "completed")
                assert end["run"] == (await stack.call("GET", path_of_run)).run
                assert end["thread"] == (await stack.call("GET", path_of_run)).json["thread"]
                path_of_run += "/input"
                operation = path_of_run

    async def continued() -> None:
        async with serving(tmp_path) as stack:
            first = await stack.call("POST", path, {"content": "first"})
            run_path = first.headers["Location"]
            async with stack.stream("POST", run_path + "/input", {"content": "a b"}, accept=accept) as stream:
                assert stream.response.status == 200
                assert stream.response.headers["Location"] == run_path
                frames = await stream.rest()
            check_stream(frames)
            assert sequences(events_of(frames)) == [3, 4]
            assert said(events_of(frames)) == [("user", "a b"), ("assistant", "a b")]
            assert frames[-1].document["run"] == (await stack.call("GET", run_path)).run

    run_async(continued())
    run_async(_streamed_start(path, accept, tmp_path / "second"))
