"""The event log in its three forms: JSON in pages, Server-Sent Events, NDJSON; replayed and live."""

import asyncio
import json
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.stack import GATES, Frame, Stack, runs, serving, until
from tests.integration.test_gateway import FAMILIES, check_run, said, sequences
from tests.integration.wire import Wire
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

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = FAMILIES[family]
            for status, first in ((201, 1), (200, 3)):
                async with stack.stream("POST", path, {"content": "a b"}, accept=accept) as stream:
                    headers = stream.response.headers
                    assert stream.response.status == status
                    assert stream.response.content_type == STREAMED[accept]
                    assert headers["Cache-Control"] == "no-cache"
                    assert headers["X-Accel-Buffering"] == "no"
                    assert headers["X-Request-Id"]
                    frames = await stream.rest()
                check_stream(frames)
                assert said(events_of(frames)) == [("user", "a b"), ("assistant", "a b")]
                assert sequences(events_of(frames)) == [first, first + 1]
                end = frames[-1].document
                assert end.keys() == {"type", "run", "thread"}
                assert (end["type"], end["run"]["status"]) == ("stream.completed", "completed")
                check_run(end["run"])
                location = headers["Location"]
                got = (await stack.call("GET", location)).json
                assert (end["run"], end["thread"]) == (got["run"], got["thread"])
                path = location + "/input"

    run_async(main())


@pytest.mark.parametrize("accept", STREAMED)
def test_events_replay_then_follow(accept: str, tmp_path: Path) -> None:
    """A follower gets what is there, then what comes, through later turns, until no turn is open."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("gated", "follow one")
            await stack.call("POST", path + "/input", {"content": "follow two", "mode": "async"})
            async with stack.stream("GET", path + "/events", accept=accept) as stream:
                frames = await stream.until(lambda frame: frame.document.get("event", {}).get("sequence") == 3)
                for name in ("follow one", "follow two"):
                    GATES[name].open.set()
                frames += await stream.rest()
            check_stream(frames)
            assert events_of(frames) == (await stack.call("GET", path + "/events")).events
            assert len(events_of(frames)) == 6
            assert statuses_of(frames)[-1] == frames[-1].document["run"]["status"] == "completed"
            assert frames[-1].document["run"]["output"] == "follow two"

    run_async(main())


@pytest.mark.parametrize("accept", STREAMED)
def test_stream_of_an_ended_run_ends(accept: str, tmp_path: Path) -> None:
    """A run that has ended is replayed whole, its end included, however it ended."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            for server, status in (("talkative", "completed"), ("failing", "failed")):
                started = await stack.start(server)
                async with stack.stream("GET", started.headers["Location"] + "/events", accept=accept) as stream:
                    frames = await stream.rest()
                check_stream(frames)
                assert events_of(frames) == started.events
                assert frames[-1].document == {
                    "type": "stream.completed",
                    "run": started.run,
                    "thread": started.json["thread"],
                }
                assert started.run["status"] == status

    run_async(main())


def test_stream_resumes_after_a_sequence(tmp_path: Path) -> None:
    """`?after=` and `Last-Event-ID` say what the client has; the header, which a browser sends, counts more."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = (await stack.start("flood", "20")).headers["Location"] + "/events"
            for query, headers, first in (
                ("?after=5", {}, 6),
                ("", {"Last_Event_ID": "7"}, 8),
                ("?after=5", {"Last_Event_ID": "7"}, 8),
                ("?after=5", {"Last_Event_ID": ""}, 6),
                ("?after=0", {}, 1),
            ):
                async with stack.stream("GET", path + query, **headers) as stream:
                    frames = await stream.rest()
                check_stream(frames)
                assert sequences(events_of(frames)) == list(range(first, 22))
            async with stack.stream("GET", path + "?after=21") as stream:
                frames = await stream.rest()
            assert [frame.type for frame in frames] == ["run.updated", "stream.completed"]

    run_async(main())


def test_stream_can_be_resumed_anywhere(tmp_path: Path) -> None:
    """A client that reconnects after every few events sees each exactly once."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("slow", " ".join(f"word{number}" for number in range(20))) + "/events"
            await stack.call("POST", path.replace("/events", "/input"), {"content": "more", "mode": "async"})
            seen: list[int] = []
            ended = False
            while not ended:
                async with stack.stream("GET", path, Last_Event_ID=str(seen[-1] if seen else 0)) as stream:
                    frames = await stream.until(lambda frame: frame.id or frame.type.startswith("stream."))
                seen += sequences(events_of(frames))
                ended = frames[-1].type == "stream.completed"
            assert seen == [1, 2, 3, 4]

    run_async(main())


def test_frames_are_single_lines(tmp_path: Path) -> None:
    """Whatever line breaks texts and metadata hold, a frame is one `data: ` line that parses back to them."""
    text = "a\nb\r\nc\u2028d\u2029e\x85f\x0bg\x1ch: data: {}\n\ni"
    metadata = '{"a":\r\n1,\n"b\u2028":"\u2029"}'
    body = f'{{"content":{json.dumps(text)},"metadata":{metadata}}}'.encode()

    async def main() -> None:
        async with serving(tmp_path) as stack:
            started = await stack.call("POST", runs("slow"), body)
            path = started.headers["Location"] + "/events"
            assert metadata.encode() in started.body
            for accept in STREAMED:
                async with stack.stream("GET", path, accept=accept) as stream:
                    frames = await stream.rest()
                assert said(events_of(frames)) == [("user", text), ("assistant", text)]
                assert (
                    frames[-1].document["run"]["metadata"] == events_of(frames)[0]["metadata"] == json.loads(metadata)
                )
                # As httpx, the official client's library, splits lines.
                for frame in frames:
                    for line in frame.lines:
                        assert line.splitlines() == [line]

    run_async(main())


def test_stream_begins_at_once(tmp_path: Path) -> None:
    """The head and the user's message come while the agent has not said a word, for start, continue and events."""

    async def main() -> None:
        async with serving(tmp_path) as stack, stack.stream("POST", runs("typing"), {"content": "at once"}) as stream:
            frames = await stream.until(lambda frame: frame.type == "run.delta")
            path = stream.response.headers["Location"]
            assert statuses_of(frames) == ["running"]
            async with stack.stream("GET", path + "/events") as other:
                await other.until(lambda frame: frame.type == "run.event")
            GATES["at once"].open.set()
            assert (await stream.rest())[-1].type == "stream.completed"

    run_async(main())


def test_mode_async_does_not_cut_a_stream(tmp_path: Path) -> None:
    """Whoever asks for a stream gets it to the end, whatever the mode and the preferences."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            body = {"content": "a b", "mode": "async"}
            async with stack.stream("POST", runs("slow"), body, Prefer="respond-async") as stream:
                frames = await stream.rest()
            check_stream(frames)
            assert frames[-1].document["run"]["status"] == "completed"

    run_async(main())


def test_sync_wait_limit_does_not_cut_a_stream(tmp_path: Path) -> None:
    """The limit is for answers that are waited for; a stream goes on past it."""

    async def main() -> None:
        async with serving(tmp_path, wait_limit_seconds=0.05) as stack:
            async with stack.stream("POST", runs("slow"), {"content": "one two three four five six"}) as stream:
                frames = await stream.rest()
            assert frames[-1].document["run"]["status"] == "completed"

    run_async(main())


# -- Deltas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", STREAMED)
def test_deltas_grow_the_text_of_an_event(accept: str, tmp_path: Path) -> None:
    """Put together by offsets in code points, the deltas are the text of the event that follows them."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            content = "öne 𝔱wo three föur"
            async with stack.stream("POST", runs("slow"), {"content": content}, accept=accept) as stream:
                frames = await stream.rest()
            check_stream(frames)
            deltas = [frame.document for frame in frames if frame.type == "run.delta"]
            assert len(deltas) > 1
            text = ""
            for delta in deltas:
                assert delta.keys() == {"type", "sequence", "offset", "text"}
                assert (delta["sequence"], delta["offset"]) == (2, len(text))
                text += delta["text"]
            # The event takes the place of what is left.
            assert content.startswith(text)
            assert content == events_of(frames)[-1]["content"]
            last_delta = max(number for number, frame in enumerate(frames) if frame.type == "run.delta")
            assert "run.event" in [frame.type for frame in frames[last_delta:]]

    run_async(main())


def test_deltas_are_caught_up_by_who_comes_late(tmp_path: Path) -> None:
    """A follower that joins in the middle of a message gets its text from the beginning."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("typing", "late") + "/events"
            await GATES["late"].reached.wait()
            async with stack.stream("GET", path, Last_Event_ID="1") as stream:
                frames = await stream.until(lambda frame: frame.type == "run.delta")
                assert frames[-1].document == {"type": "run.delta", "sequence": 2, "offset": 0, "text": "öne 𝔱wo "}
                assert (await stack.call("GET", path)).events[-1]["role"] == "user"
                GATES["late"].open.set()
                rest = await stream.rest()
            assert said(events_of(rest)) == [("assistant", "öne 𝔱wo three")]

    run_async(main())


def test_cancel_ends_streams(tmp_path: Path) -> None:
    """Followers see what was half said as an incomplete event, the cancel in the log, and a completed stream."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            async with stack.stream("POST", runs("typing"), {"content": "cut short"}) as stream:
                frames = await stream.until(lambda frame: frame.type == "run.delta")
                await stack.call("POST", stream.response.headers["Location"] + "/cancel")
                frames += await stream.rest()
            check_stream(frames)
            assert [event.get("logType") for event in events_of(frames)] == [None, "incomplete", "cancelled"]
            assert frames[-1].document["run"]["status"] == "cancelled"

    run_async(main())


# -- Clients that go, and clients that are slow --------------------------------------------------------


@pytest.mark.parametrize("accept", STREAMED)
def test_leaving_a_stream_cancels_nothing(accept: str, tmp_path: Path) -> None:
    """The run of a client that has gone is executed to its end; its stream is let go."""
    name = f"left {accept}"

    async def main() -> None:
        async with serving(tmp_path) as stack:
            async with stack.stream("POST", runs("gated"), {"content": name}, accept=accept) as stream:
                await stream.until(lambda frame: frame.type == "run.event")
                path = stream.response.headers["Location"]
                assert await stack.metric("acp_gateway_open_streams") == 1
                stream.response.close()
            assert (await stack.call("GET", path)).run["status"] == "running"

            async def let_go() -> bool:
                return await stack.metric("acp_gateway_open_streams") == 0

            await until(let_go)
            assert not GATES[name].left.is_set()
            GATES[name].open.set()
            assert (await stack.until_status(path))["status"] == "completed"

    run_async(main())


def test_leaving_before_a_stream_begins_is_counted_as_that(tmp_path: Path) -> None:
    """As 499, and not as a failure of the service."""

    async def main() -> None:
        wire = Wire()
        async with serving(tmp_path, wire=wire) as stack:
            path = await stack.start_async("gated", "left early")
            wire.swallow()
            following = asyncio.create_task(
                stack.call("GET", path + "/events", headers={"Accept": "text/event-stream"})
            )

            async def counted(name: str) -> bool:
                return await stack.metric(name) == 1

            await until(partial(counted, "acp_gateway_open_streams"))
            following.cancel()
            route = 'method="GET",route="/v1/servers/{serverId}/runs/{runId}/events"'
            await until(partial(counted, f'acp_gateway_requests_total{{{route},status="499"}}'))
            assert await stack.metric("acp_gateway_open_streams") == 0
            GATES["left early"].open.set()

    run_async(main())


@pytest.mark.parametrize(("accept", "comment"), [("text/event-stream", b": "), ("application/x-ndjson", b"\n")])
def test_idle_stream_shows_that_it_lives(accept: str, comment: bytes, tmp_path: Path) -> None:
    """While nothing happens a comment line comes now and then, which no parser takes for a document."""
    name = f"idle {accept}"

    async def main() -> None:
        async with (
            serving(tmp_path, heartbeat_seconds=1) as stack,
            stack.stream("POST", runs("gated"), {"content": name}, accept=accept) as stream,
        ):
            await GATES[name].reached.wait()
            received = b""
            separator = b"\n\n" if accept == "text/event-stream" else b"\n"
            while (piece := await stream.response.content.readuntil(separator)) and not piece.startswith(comment):
                received += piece
            assert received.count(b"run.event") == 2
            GATES[name].open.set()
            assert (await stream.rest())[-1].type == "stream.completed"

    run_async(main())


def test_slow_reader_is_cut_and_holds_up_nobody(tmp_path: Path) -> None:
    """A reader that takes nothing is cut after the write limit; run, other followers and its own log are whole."""

    async def main() -> None:
        async with serving(tmp_path, write_seconds=0.5) as stack:
            path = (await stack.start_async("heavy", "32")) + "/events"
            reader, writer = await _unread(stack, path)
            async with stack.stream("GET", path) as stream:
                frames = await stream.rest()
            check_stream(frames)
            assert len(events_of(frames)) == 129

            async def cut() -> bool:
                return await stack.metric("acp_gateway_open_streams") == 0

            await until(cut)
            received = bytearray()
            try:
                while piece := await reader.read(1 << 20):
                    received += piece
            except ConnectionResetError:
                pass
            assert b"stream.completed" not in received
            writer.close()
            assert len((await stack.call("GET", path)).events) == 129

    run_async(main())


async def _unread(stack: Stack, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that asked for a stream and takes next to nothing of it."""
    plug = socket.socket()
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plug.setblocking(False)
    url = stack.url(path)
    await asyncio.get_running_loop().sock_connect(plug, (url.host, url.port))
    reader, writer = await asyncio.open_connection(sock=plug, limit=4096)
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stack.key}\r\nAccept: text/event-stream\r\n\r\n"
    writer.write(head.encode())
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


# -- Which form ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        ("text/html", "application/json"),
        ("application/json, text/event-stream", "application/json"),
        ("text/event-stream, application/json", "text/event-stream"),
        ("TEXT/Event-Stream;charset=utf-8", "text/event-stream"),
        ("application/x-ndjson", "application/x-ndjson"),
    ],
)
def test_accept_chooses_the_form(accept: str, expected: str, tmp_path: Path) -> None:
    """One URL, three forms; JSON for whoever has no wish."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = (await stack.start()).headers["Location"] + "/events"
            async with stack.stream("GET", path, accept=accept) as stream:
                assert stream.response.content_type == expected
                assert b"hello" in await stream.response.read()

    run_async(main())


@pytest.mark.parametrize("accept", STREAMED)
def test_refusals_of_streams_are_documents(accept: str, tmp_path: Path) -> None:
    """What is refused before the first byte has its HTTP status and the flat error document."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            headers = {"Accept": accept}
            for answer, status, code in (
                (await stack.call("GET", runs("echo") + "/run_x/events", headers=headers), 404, "RUN_NOT_FOUND"),
                (
                    await stack.call("POST", runs("echo") + "/run_x/input", {"content": "x"}, headers=headers),
                    404,
                    "RUN_NOT_FOUND",
                ),
                (await stack.call("POST", runs("nowhere"), {"content": "x"}, headers=headers), 404, "SERVER_NOT_FOUND"),
                (await stack.call("POST", runs("echo"), {"content": ""}, headers=headers), 400, "VALIDATION_FAILED"),
                (
                    await stack.call("GET", runs("echo") + "/run_x/events", headers=headers, key=""),
                    401,
                    "UNAUTHENTICATED",
                ),
            ):
                assert (answer.status, answer.json["code"]) == (status, code)

    run_async(main())


def test_accept_of_several_lines_is_one_list(tmp_path: Path) -> None:
    """As a proxy may send it that adds its own."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = await stack.start_async("echo", "hello")
            accept = [("Accept", "text/html"), ("Accept", "text/event-stream"), ("X-API-Key", stack.key)]
            async with stack.http.get(stack.url(path + "/events"), headers=accept) as answer:
                assert answer.content_type == "text/event-stream"

    run_async(main())


def test_ndjson_and_sse_carry_the_same_documents(tmp_path: Path) -> None:
    """The two streamed forms differ in their frames only."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            path = (await stack.start("talkative")).headers["Location"] + "/events"
            documents = []
            for accept in STREAMED:
                async with stack.stream("GET", path, accept=accept) as stream:
                    documents.append([json.dumps(frame.document) for frame in await stream.rest()])
            assert documents[0] == documents[1]

    run_async(main())
