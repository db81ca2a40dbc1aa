"""The HTTP layer over real sockets: what it refuses, in which words, and what it does not wait for."""

import asyncio
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import uvloop
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from gateway import http_connection
from gateway.answers import JsonAnswer
from gateway.errors import ApiError
from gateway.http_connection import Connection, HttpLimits
from gateway.http_server import ROUTE_FINDER, GatewayRunner
from gateway.request_body import make_expect_handler, read_body
from gateway.requests import error_answer, from_http_exception, request_id

BODY_LIMIT_BYTES = 256 * 1024
PATIENCE_SECONDS = 10.0


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> dict[str, Any]:
        """The body as the error document that it must be, with a request id beside it."""
        assert self.headers["content-type"] == "application/json"
        assert re.fullmatch(r"[A-Za-z0-9._:-]+", self.headers["x-request-id"])
        document: dict[str, Any] = json.loads(self.body)
        assert document.keys() - {"details"} == {"error", "message", "code"}
        assert all(type(value) is str for name, value in document.items() if name != "details")
        return document


class Client:
    """A connection on which a test says whatever it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        """Sends bytes as they are."""
        self._writer.write(data)

    def send_at_once(self, data: bytes) -> None:
        """Gives bytes to the kernel, whatever the loop does."""
        assert os.write(self._writer.get_extra_info("socket").fileno(), data) == len(data)

    def look(self) -> bytes:
        """What the kernel has for the client now, or the end. Raises BlockingIOError if it has neither."""
        return os.read(self._writer.get_extra_info("socket").fileno(), 1)

    async def answer(self) -> Answer:
        """The next answer."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        status_line, *lines = head.rstrip("\r\n").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return Answer(int(status_line.split()[1]), headers, body)

    async def rest(self) -> bytes:
        """Everything up to the end of the connection."""
        try:
            return await self._reader.read()
        except ConnectionResetError:
            return b""

    def abort(self) -> None:
        """Goes away without a word."""
        self._writer.transport.abort()


class Server:
    """A running gateway around a small application, and what that application saw."""

    def __init__(self, runner: GatewayRunner, port: int, seen: "Seen") -> None:
        self.runner = runner
        self.port = port
        self.seen = seen
        self._clients: list[Client] = []

    async def connect(self) -> Client:
        """A new connection."""
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        self._clients.append(client)
        return client

    async def ask(self, data: bytes) -> Answer:
        """What the server answers on a connection of its own."""
        client = await self.connect()
        client.send(data)
        answer = await client.answer()
        client.abort()
        return answer

    async def is_well(self) -> bool:
        """Whether the next request is served."""
        return (await self.ask(b"GET /ok HTTP/1.1\r\nHost: x\r\n\r\n")).status == 200

    @property
    def connections(self) -> list[Any]:
        """The server's side of all connections."""
        assert self.runner.server is not None
        return list(self.runner.server.connections)

    @property
    def connection(self) -> RequestHandler:
        """The server's side of the only connection."""
        [connection] = self.connections
        assert isinstance(connection, RequestHandler)
        return connection

    def abort_clients(self) -> None:
        """Ends what tests left open."""
        for client in self._clients:
            client.abort()


class Seen:
    """Facts that tests wait for."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()
        self.errors: asyncio.Queue[ApiError] = asyncio.Queue()


@asynccontextmanager
async def serving(limits: HttpLimits | None = None, *, body_timeout_seconds: float = 5.0) -> AsyncIterator[Server]:
    """A real server on a port of its own."""
    seen = Seen()

    async def ok(request: web.Request) -> web.StreamResponse:
        return web.Response(text="ok", headers={"X-Request-Id": request_id(request)})

    async def held(request: web.Request) -> web.StreamResponse:
        seen.started.set()
        await seen.go_on.wait()
        return web.Response(text="held")

    async def body(request: web.Request) -> web.StreamResponse:
        seen.started.set()
        try:
            received = await read_body(request, BODY_LIMIT_BYTES, body_timeout_seconds)
        except ApiError as error:
            seen.errors.put_nowait(error)
            raise
        return web.Response(text=str(len(received)))

    async def cancel(request: web.Request) -> web.StreamResponse:
        received = await read_body(request, BODY_LIMIT_BYTES, body_timeout_seconds, may_be_empty=True)
        return web.Response(text=str(len(received)))

    async def broken(request: web.Request) -> web.StreamResponse:
        raise RuntimeError("a secret of ours")

    async def too_slow(request: web.Request) -> web.StreamResponse:
        raise TimeoutError("a secret of ours")

    async def empty_handed(request: web.Request) -> Any:
        return None

    async def broken_stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"a piece")
        raise RuntimeError("a secret of ours")

    async def conflict(request: web.Request) -> web.StreamResponse:
        raise ApiError(409, "ABORTED", "Try again.", headers={"X-More": "yes"})

    async def whole(request: web.Request) -> Any:
        return JsonAnswer(b'{"whole":1}', 201, {"X-More": "yes"})

    async def whole_by_aiohttp(request: web.Request) -> web.StreamResponse:
        return JsonAnswer(b'{"whole":1}', 201, {"X-More": "yes"}).to_response()

    async def huge(request: web.Request) -> Any:
        seen.started.set()
        return JsonAnswer(b" " * (32 << 20))

    async def own_words(request: web.Request) -> web.StreamResponse:
        raise web.HTTPBadRequest(text='{"own":1}', content_type="application/json")

    def find(request: web.Request) -> Any:
        if request.path != "/found":
            return None
        match = web.UrlMappingMatchInfo({"found": "yes"}, next(iter(app.router.routes())))
        match.add_app(app)
        return match, found

    async def found(request: web.Request) -> web.StreamResponse:
        return web.Response(text=request.match_info["found"])

    app = web.Application()
    app[ROUTE_FINDER] = find
    expect_handler = make_expect_handler(BODY_LIMIT_BYTES)
    app.router.add_post("/body", body, expect_handler=expect_handler)
    app.router.add_post("/held", held)
    app.router.add_post("/cancel", cancel, expect_handler=expect_handler)
    for path, handler in {
        "/ok": ok,
        "/held": held,
        "/broken": broken,
        "/too-slow": too_slow,
        "/empty-handed": empty_handed,
        "/broken-stream": broken_stream,
        "/conflict": conflict,
        "/own-words": own_words,
        "/whole": whole,
        "/whole-by-aiohttp": whole_by_aiohttp,
        "/huge": huge,
    }.items():
        app.router.add_get(path, handler)
    runner = GatewayRunner(app, limits or HttpLimits(lingering_seconds=0.5), shutdown_timeout_seconds=PATIENCE_SECONDS)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server = Server(runner, site.port, seen)
    try:
        yield server
    finally:
        seen.go_on.set()
        server.abort_clients()
        await runner.cleanup()


@pytest.fixture(autouse=True, params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def loop_factory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs on both loops: they close connections in different ways."""
    monkeypatch.setattr(f"{__name__}._loop_factory", request.param)


_loop_factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a scenario, which must not take for ever."""

    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await scenario()

    with asyncio.Runner(loop_factory=_loop_factory) as runner:
        runner.run(bounded())


async def until(fact: Callable[[], bool]) -> None:
    """Lets the loop turn until something is so; the scenario's own limit bounds it."""
    while not fact():  # noqa: ASYNC110 - the facts are aiohttp's, which has no events for them
        await asyncio.sleep(0.001)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A POST with a length, as JSON unless a header says otherwise."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    if not any(header.lower().startswith("content-type") for header in headers):
        lines.append("Content-Type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + body


CHUNKED_HEAD = b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
GET_OK = b"GET /ok HTTP/1.1\r\nHost: x\r\n\r\n"


# -- What the parser refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"GARBAGE\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03secret-key\r\n", 400, "MALFORMED_REQUEST"),
        (b"GET /ok HTTP/9.9\r\nHost: x\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"GET /ok HTTP/1.1\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"GET /ok HTTP/1.1\r\nHost: x\r\nAuth\x00orization: secret-key\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"GET /ok HTTP/1.1\r\nHost: x\r\nno colon secret-key\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (
            b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12",
            400,
            "MALFORMED_REQUEST",
        ),
        (
            CHUNKED_HEAD.replace(b"Host: x", b"Host: x\r\nContent-Length: 1") + b"0\r\n\r\n",
            400,
            "MALFORMED_REQUEST",
        ),
        (CHUNKED_HEAD + b"zz\r\n", 400, "MALFORMED_REQUEST"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "HEADERS_TOO_LARGE"),
        (b"GET /ok HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 431, "HEADERS_TOO_LARGE"),
        (b"GET /ok HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 200 + b"\r\n", 431, "HEADERS_TOO_LARGE"),
    ],
)
def test_parser_refusal_is_our_document(data: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is flat JSON with a request id, ends the connection, and leaves no traceback or input in the log."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            client.send(data)
            answer = await client.answer()
            assert (answer.status, answer.document["code"]) == (status, code)
            assert answer.headers["connection"] == "close"
            assert await client.rest() == b""
            assert await server.is_well()

    with caplog.at_level(logging.DEBUG):
        run(scenario)
    assert not [record for record in caplog.records if record.exc_info]
    assert [record.levelname for record in caplog.records if record.name == "gateway.http_connection"] == ["INFO"]
    assert "secret-key" not in caplog.text


def test_parser_refusal_behind_a_request_waits_its_turn() -> None:
    """Answers keep the order of what was sent, on a connection that then ends."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            client.send(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
            await server.seen.started.wait()
            client.send(b"GARBAGE\r\n\r\n")
            server.seen.go_on.set()
            assert (await client.answer()).body == b"held"
            assert (await client.answer()).document["code"] == "MALFORMED_REQUEST"
            assert await client.rest() == b""

    run(scenario)


@pytest.mark.parametrize("broken", [b"zz\r\n", b"3\r\nabcd\r\n", b"ffffffffffffffffff\r\n"])
def test_broken_chunk_ends_the_reading(broken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """A body that turns bad while it is read gets one answer, at once, and the connection ends."""

    async def scenario() -> None:
        async with serving(HttpLimits(lingering_seconds=60), body_timeout_seconds=60) as server:
            client = await server.connect()
            client.send(CHUNKED_HEAD + b"3\r\nabc\r\n")
            await server.seen.started.wait()
            client.send(broken)
            answer = await client.answer()
            assert (answer.status, answer.document["code"]) == (400, "MALFORMED_REQUEST")
            assert await client.rest() == b""
            assert await server.is_well()

    run(scenario)
    assert not [record for record in caplog.records if record.exc_info]


def test_broken_chunk_behind_a_request_is_that_requests_error() -> None:
    """The same when the handler has not begun yet, because an earlier request is still at work."""

    async def scenario() -> None:
        async with serving(HttpLimits(lingering_seconds=60), body_timeout_seconds=60) as server:
            client = await server.connect()
            client.send(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
            await server.seen.started.wait()
            client.send(CHUNKED_HEAD)
            connection = server.connection
            await until(lambda: len(connection._messages) == 1)
            client.send(b"zz\r\n")
            await until(lambda: connection._messages[0][1].exception() is not None)
            server.seen.go_on.set()
            assert (await client.answer()).body == b"held"
            assert (await client.answer()).document["message"] == "The body broke off."
            assert await client.rest() == b""

    run(scenario)


def test_broken_chunk_that_nobody_reads_ends_the_connection() -> None:
    """A handler that ignores its body answers once; nothing after the break is taken for a request."""

    async def scenario() -> None:
        async with serving(HttpLimits(lingering_seconds=60)) as server:
            client = await server.connect()
            client.send(CHUNKED_HEAD.replace(b"/body", b"/held"))
            await server.seen.started.wait()
            request = server.connection._current_request
            assert request is not None
            for _ in range(2):
                client.send(b"zz\r\n\r\n" + GET_OK)
                await until(lambda: request.content.exception() is not None)
                # A whole round trip, so that the second piece has arrived as well.
                assert await server.is_well()
            server.seen.go_on.set()
            assert (await client.answer()).body == b"held"
            assert await client.rest() == b""

    run(scenario)


def test_cut_connection_ends_the_reading() -> None:
    """A client that goes away in the middle of its body leaves nobody waiting."""

    async def scenario() -> None:
        async with serving(body_timeout_seconds=60) as server:
            client = await server.connect()
            client.send(post("/body", b"{}").replace(b"Content-Length: 2", b"Content-Length: 9"))
            await server.seen.started.wait()
            client.abort()
            assert (await server.seen.errors.get()).code == "MALFORMED_REQUEST"
            await until(lambda: server.runner.open_connections == 0)

    run(scenario)


# -- Time-outs -----------------------------------------------------------------------------------------


def test_silent_connection_is_closed() -> None:
    """One that never says anything is closed without an answer after the time for a head."""

    async def scenario() -> None:
        async with serving(HttpLimits(head_timeout_seconds=0.05)) as server:
            client = await server.connect()
            assert await client.rest() == b""
            await until(lambda: server.runner.open_connections == 0)

    run(scenario)


def test_half_a_head_is_cut() -> None:
    """A head that does not come to its end is answered 408, on the first request and on a later one."""

    async def scenario() -> None:
        async with serving(HttpLimits(head_timeout_seconds=0.1)) as server:
            client = await server.connect()
            client.send(GET_OK[:-2])
            answer = await client.answer()
            assert (answer.status, answer.document["code"]) == (408, "REQUEST_TIMEOUT")
            assert await client.rest() == b""

            client = await server.connect()
            client.send(GET_OK)
            assert (await client.answer()).status == 200
            client.send(GET_OK[:-2])
            assert (await client.answer()).document["code"] == "REQUEST_TIMEOUT"
            assert await client.rest() == b""

    run(scenario)


@pytest.mark.parametrize("first", [b"", GET_OK])
def test_dripping_head_is_cut(first: bytes) -> None:
    """A byte now and then buys no time, on the first request or a later one."""

    async def scenario() -> None:
        async with serving(HttpLimits(head_timeout_seconds=0.2)) as server:
            client = await server.connect()
            if first:
                client.send(first)
                assert (await client.answer()).status == 200
            client.send(b"GET /ok HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            answered = asyncio.ensure_future(client.answer())
            while not answered.done():
                client.send(b"a")
                await asyncio.wait([answered], timeout=0.01)
            assert answered.result().document["code"] == "REQUEST_TIMEOUT"

    run(scenario)


def test_head_in_pieces_is_served() -> None:
    """A head may come in pieces within its time; its timer does not outlive it."""

    async def scenario() -> None:
        async with serving(HttpLimits(head_timeout_seconds=0.3)) as server:
            client = await server.connect()
            for _ in range(3):
                client.send(GET_OK[:20])
                await asyncio.sleep(0)
                client.send(GET_OK[20:])
                assert (await client.answer()).status == 200
            client.send(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n")
            await server.seen.started.wait()
            asyncio.get_running_loop().call_later(0.5, server.seen.go_on.set)
            assert (await client.answer()).body == b"held"

    run(scenario)


def test_idle_connection_is_closed() -> None:
    """Between requests a connection may lie idle for the keep-alive time, and no longer."""

    async def scenario() -> None:
        async with serving(HttpLimits(keepalive_timeout_seconds=0.1)) as server:
            client = await server.connect()
            for _ in range(2):
                client.send(GET_OK)
                assert (await client.answer()).status == 200
            assert await client.rest() == b""
            await until(lambda: server.runner.open_connections == 0)

    run(scenario)


def test_head_that_begins_late_has_its_full_time() -> None:
    """A head that has begun is not cut by the end of the keep-alive time."""

    async def scenario() -> None:
        async with serving(HttpLimits(keepalive_timeout_seconds=0.1, head_timeout_seconds=5)) as server:
            client = await server.connect()
            client.send(GET_OK)
            assert (await client.answer()).status == 200
            client.send(GET_OK[:20])
            connection = server.connection
            await until(lambda: connection._keepalive_handle is None)
            client.send(GET_OK[20:])
            assert (await client.answer()).status == 200
            assert await client.rest() == b""

    run(scenario)


def test_body_that_does_not_arrive_is_given_up() -> None:
    """The time is for the whole body, so dripping does not help."""

    async def scenario() -> None:
        async with serving(body_timeout_seconds=0.2) as server:
            client = await server.connect()
            client.send(post("/body", b"{").replace(b"Content-Length: 1", b"Content-Length: 100000"))
            answered = asyncio.ensure_future(client.answer())
            while not answered.done():
                client.send(b" ")
                await asyncio.wait([answered], timeout=0.01)
            assert (answered.result().status, answered.result().document["code"]) == (408, "REQUEST_TIMEOUT")
            assert answered.result().headers["connection"] == "close"
            assert await server.is_well()

    run(scenario)


# -- The limit on connections --------------------------------------------------------------------------


def test_connections_past_the_limit_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """They read why and when to come back; room that is made is used; the log says it once."""

    async def scenario() -> None:
        async with serving(HttpLimits(connections=2)) as server:
            clients = [await server.connect() for _ in range(2)]
            await until(lambda: server.runner.open_connections == 2)
            for _ in range(3):
                refused = await server.connect()
                refused.send(GET_OK)
                answer = await refused.answer()
                assert (answer.status, answer.document["code"]) == (503, "TOO_MANY_CONNECTIONS")
                assert answer.headers["retry-after"] == "1"
                assert await refused.rest() == b""
                refused.abort()
            assert server.runner.open_connections == 2
            clients[0].send(GET_OK)
            assert (await clients[0].answer()).status == 200
            clients[0].abort()
            await until(lambda: server.runner.open_connections == 1)
            assert await server.is_well()

    run(scenario)
    assert len([record for record in caplog.records if "connections are in use" in record.message]) == 1


def test_refused_connection_that_stays_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that neither reads nor leaves is not kept; and only so many are refused politely."""
    monkeypatch.setattr("gateway.http_connection._TURNING_AWAY_SECONDS", 0.05)
    monkeypatch.setattr("gateway.http_connection._TURNING_AWAY_AT_ONCE", 1)

    async def scenario() -> None:
        async with serving(HttpLimits(connections=1)) as server:
            await server.connect()
            await until(lambda: server.runner.open_connections == 1)
            polite, curt = await server.connect(), await server.connect()
            assert await curt.rest() == b""
            assert (await polite.rest()).startswith(b"HTTP/1.1 503 ")
            inner = server.runner.server
            assert inner is not None
            await until(lambda: getattr(inner, "turning_away") == 0)  # noqa: B009

    run(scenario)


@pytest.mark.parametrize("name", ["connections", "head_timeout_seconds", "header_bytes"])
def test_limits_must_be_positive(name: str) -> None:
    """Settings are checked when built."""
    with pytest.raises(ValueError, match=name):
        HttpLimits(**{name: 0})


# -- Expectations --------------------------------------------------------------------------------------


def test_expectation_of_a_body_that_fits_is_met() -> None:
    """100 Continue comes before the body is sent, and the answer after it."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            client.send(post("/body", b"{}", "Expect: 100-Continue")[:-2])
            assert (await client.answer()).status == 100
            client.send(b"{}")
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"2")

    run(scenario)


def test_refusal_after_100_continue_is_our_document() -> None:
    """The invitation is no part of the answer, so the answer can still be a refusal."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            client.send(post("/body", b"{}", "Expect: 100-continue", "Content-Type: text/plain")[:-2])
            assert (await client.answer()).status == 100
            answer = await client.answer()
            assert (answer.status, answer.document["code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")

    run(scenario)


@pytest.mark.parametrize(
    ("expectation", "length", "status", "code"),
    [
        ("100-continue", BODY_LIMIT_BYTES + 1, 413, "BODY_TOO_LARGE"),
        ("a miracle", 2, 417, "EXPECTATION_FAILED"),
    ],
)
def test_expectation_that_cannot_be_met_is_refused(expectation: str, length: int, status: int, code: str) -> None:
    """No 100 invites what would be refused."""

    async def scenario() -> None:
        async with serving() as server:
            head = post("/body", b"", f"Expect: {expectation}")
            answer = await server.ask(head.replace(b"Content-Length: 0", b"Content-Length: %d" % length))
            assert (answer.status, answer.document["code"]) == (status, code)
            assert await server.is_well()

    run(scenario)


def test_expectation_is_nothing_to_http_1_0() -> None:
    """RFC 9110: a server ignores it there."""

    async def scenario() -> None:
        async with serving() as server:
            data = post("/body", b"{}", "Expect: a miracle").replace(b"HTTP/1.1", b"HTTP/1.0")
            assert (await server.ask(data)).body == b"2"

    run(scenario)


def test_expectation_at_an_unknown_address_is_our_document() -> None:
    """aiohttp's own handler of expectations speaks there, outside of all middlewares."""

    async def scenario() -> None:
        async with serving() as server:
            answer = await server.ask(post("/nowhere", b"{}", "Expect: a miracle"))
            assert (answer.status, answer.document["code"]) == (417, "EXPECTATION_FAILED")

    run(scenario)


# -- What leaves the application -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/broken", "/too-slow", "/empty-handed"])
def test_unhandled_exception_is_an_opaque_500(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """The caller learns a request id, the log learns the rest, once."""

    async def scenario() -> None:
        async with serving() as server:
            answer = await server.ask(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: abc\r\n\r\n".encode())
            assert (answer.status, answer.document["code"]) == (500, "INTERNAL")
            assert b"secret" not in answer.body
            assert answer.headers["x-request-id"] == "abc"
            assert await server.is_well()

    run(scenario)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info
    assert getattr(record, "request_id") == "abc"  # noqa: B009


def test_exception_after_the_first_byte_breaks_the_answer_off(caplog: pytest.LogCaptureFixture) -> None:
    """An answer that has begun is cut, so that nobody takes it for a whole one."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            client.send(b"GET /broken-stream HTTP/1.1\r\nHost: x\r\n\r\n")
            everything = await client.rest()
            assert everything.endswith(b"7\r\na piece\r\n")
            assert everything.count(b"HTTP/1.1 ") == 1

    run(scenario)
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_api_error_is_its_document(caplog: pytest.LogCaptureFixture) -> None:
    """A refusal is no failure: the connection lives on, and the log stays clean."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            client.send(b"GET /conflict HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await client.answer()
            assert answer.status == 409
            assert answer.document == {"error": "Conflict", "message": "Try again.", "code": "ABORTED"}
            assert answer.headers["x-more"] == "yes"
            client.send(GET_OK)
            assert (await client.answer()).status == 200

    run(scenario)
    assert not caplog.records


def test_routers_refusals_are_our_documents() -> None:
    """Unknown addresses and methods; but JSON that a handler raised on purpose stays as it is."""

    async def scenario() -> None:
        async with serving() as server:
            answer = await server.ask(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (answer.status, answer.document["code"]) == (404, "NOT_FOUND")
            answer = await server.ask(b"DELETE /ok HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (answer.status, answer.document["code"]) == (405, "METHOD_NOT_ALLOWED")
            assert answer.headers["allow"] == "GET, HEAD"
            answer = await server.ask(b"GET /own-words HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (answer.status, answer.body) == (400, b'{"own":1}')

    run(scenario)


def test_http_exception_has_the_name_of_its_status() -> None:
    """Those that nobody expects are told by their status."""
    error = from_http_exception(web.HTTPGone())
    assert (error.status, error.code, error.message) == (410, "GONE", "Gone.")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("req-1.a:B_2", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("\xfc", False),
        ("", False),
    ],
)
def test_request_id_is_the_callers_where_it_is_fit(sent: str, kept: bool) -> None:
    """What could not be logged or passed on is replaced."""

    async def scenario() -> None:
        async with serving() as server:
            head = f"GET /ok HTTP/1.1\r\nHost: x\r\nX-Request-Id: {sent}\r\n\r\n".encode("latin-1")
            answered = (await server.ask(head)).headers["x-request-id"]
            assert (answered == sent) == kept
            assert kept or re.fullmatch("req_[0-9a-f]{24}", answered)

    run(scenario)


# -- Answers and routes of our own ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        "GET {} HTTP/1.1\r\nHost: x\r\n",
        "GET {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n",
        "GET {} HTTP/1.0\r\n",
        "GET {} HTTP/1.0\r\nConnection: keep-alive\r\n",
        "HEAD {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n",
        "GET {} HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n",
    ],
)
def test_json_answer_reads_as_if_aiohttp_had_written_it(head: str) -> None:
    """The same status line, headers and body, whatever the request says of its connection."""

    async def scenario() -> None:
        async with serving() as server:
            answers = []
            for path in ("/whole", "/whole-by-aiohttp"):
                client = await server.connect()
                client.send((head.format(path) + "\r\n").encode())
                if "close" in head or head[-5:] == "1.0\r\n":
                    answer = await client.rest()
                else:
                    whole = await client.answer()
                    answer = b"".join(
                        [
                            b"%d" % whole.status,
                            *(f"{n}: {v}\r\n".encode() for n, v in whole.headers.items()),
                            whole.body,
                        ]
                    )
                answers.append(
                    sorted(re.sub(rb"date: .*?\r\n", b"", answer, flags=re.IGNORECASE).lower().split(b"\r\n"))
                )
            assert answers[0] == answers[1]
            assert any(b"x-more: yes" in line for line in answers[0])

    run(scenario)


def test_answers_follow_each_other_on_one_connection() -> None:
    """In the order of the requests, also when these came at once."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            whole = b"GET /whole HTTP/1.1\r\nHost: x\r\n\r\n"
            client.send(whole + GET_OK + whole)
            assert [(await client.answer()).status for _ in range(3)] == [201, 200, 201]

    run(scenario)


def test_header_that_breaks_lines_is_never_written() -> None:
    """As in aiohttp's own responses."""
    with pytest.raises(ValueError, match="X-More"):
        JsonAnswer(b"{}", 200, {"X-More": "a\r\nb"}).to_bytes()


def test_client_that_does_not_read_its_answer_is_cut() -> None:
    """Its connection ends after the time for writing, and is no longer counted."""

    async def scenario() -> None:
        async with serving(HttpLimits(write_seconds=0.2)) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
            writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
            await server.seen.started.wait()
            assert server.runner.open_connections == 1
            await until(lambda: server.runner.open_connections == 0)
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(32 << 20)
            writer.close()

    run(scenario)


def test_route_that_the_application_finds_needs_no_router() -> None:
    """Its match is the request's; what is not found is the router's."""

    async def scenario() -> None:
        async with serving() as server:
            assert (await server.ask(b"GET /found HTTP/1.1\r\nHost: x\r\n\r\n")).body == b"yes"
            expecting = b"GET /found HTTP/1.1\r\nHost: x\r\nExpect: more\r\n\r\n"
            assert (await server.ask(expecting)).status == 417
            assert (await server.ask(GET_OK)).body == b"ok"

    run(scenario)


# -- Bodies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (post("/body", b"{}"), 200, ""),
        (post("/body", b"{}", "Content-Type: Application/JSON; Charset=UTF-8"), 200, ""),
        (post("/body", b"{}", 'Content-Type: application/json;charset="utf8"'), 200, ""),
        (post("/body", b"{}", "Content-Encoding: identity"), 200, ""),
        (post("/body", b"{}", "Content-Type: text/plain"), 415, "UNSUPPORTED_MEDIA_TYPE"),
        (post("/body", b"{}", "Content-Type: application/jsonx"), 415, "UNSUPPORTED_MEDIA_TYPE"),
        (post("/body", b"{}", "Content-Type:"), 415, "UNSUPPORTED_MEDIA_TYPE"),
        (post("/body", b"{}", "Content-Type: \xff"), 415, "UNSUPPORTED_MEDIA_TYPE"),
        (
            post("/body", b"{}", "Content-Type: application/json; charset=latin-1"),
            415,
            "UNSUPPORTED_MEDIA_TYPE",
        ),
        (post("/body", b"{}", "Content-Encoding: gzip"), 415, "UNSUPPORTED_MEDIA_TYPE"),
        (post("/body", b"{}", "Content-Encoding: \xff"), 415, "UNSUPPORTED_MEDIA_TYPE"),
        (b"POST /body HTTP/1.1\r\nHost: x\r\n\r\n", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (b"POST /cancel HTTP/1.1\r\nHost: x\r\n\r\n", 200, ""),
        (b"POST /cancel HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", 200, ""),
        (
            b"POST /cancel HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            200,
            "",
        ),
        (post("/cancel", b"{}"), 200, ""),
        (post("/cancel", b"{}", "Content-Type: text/plain"), 415, "UNSUPPORTED_MEDIA_TYPE"),
        (CHUNKED_HEAD + b"2\r\n{}\r\n0\r\n\r\n", 200, ""),
    ],
)
def test_body_must_be_json(data: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture) -> None:
    """By its headers, and only where there is one."""

    async def scenario() -> None:
        async with serving() as server:
            answer = await server.ask(data)
            assert answer.status == status
            assert status == 200 or answer.document["code"] == code

    run(scenario)
    assert not caplog.records


@pytest.mark.parametrize("excess", [0, 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_body_is_bounded(excess: int, chunked: bool) -> None:
    """The limit itself passes, one byte more does not, whether or not the length was told."""
    body = b" " * (BODY_LIMIT_BYTES + excess)

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            if chunked:
                client.send(CHUNKED_HEAD)
                for start in range(0, len(body), 10_000):
                    piece = body[start : start + 10_000]
                    client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
                client.send(b"0\r\n\r\n")
            else:
                client.send(post("/body", body))
            answer = await client.answer()
            if excess:
                assert (answer.status, answer.document["code"]) == (413, "BODY_TOO_LARGE")
                assert answer.headers["connection"] == "close"
                assert await client.rest() == b""
            else:
                assert (answer.status, answer.body) == (200, str(BODY_LIMIT_BYTES).encode())
            assert await server.is_well()

    run(scenario)


def test_endless_chunked_body_is_cut_off() -> None:
    """One that never ends is refused as soon as it has grown past the limit."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            client.send(CHUNKED_HEAD)
            answered = asyncio.ensure_future(client.answer())
            while not answered.done():
                client.send(b"1000\r\n" + b" " * 0x1000 + b"\r\n")
                await asyncio.wait([answered], timeout=0.001)
            assert answered.result().document["code"] == "BODY_TOO_LARGE"

    run(scenario)


def test_middleware_can_answer_as_the_server_does() -> None:
    """`error_answer` serves both, so that a document never depends on where it was made."""

    async def scenario() -> None:
        @web.middleware
        async def errors(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            try:
                return await handler(request)
            except ApiError as error:
                return error_answer(error, request).to_response()

        async def refuse(request: web.Request) -> web.StreamResponse:
            await read_body(request, 1, 1.0)
            raise AssertionError

        app = web.Application(middlewares=[errors])
        app.router.add_post("/", refuse)
        runner = GatewayRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            answer = await Server(runner, site.port, Seen()).ask(post("/", b"{}"))
            assert (answer.status, answer.document["code"]) == (413, "BODY_TOO_LARGE")
            assert answer.headers["connection"] == "close"
        finally:
            await runner.cleanup()

    run(scenario)


# -- The end -------------------------------------------------------------------------------------------


def test_request_that_arrives_as_the_idle_time_ends_is_answered() -> None:
    """What the kernel has by then counts as there in time, however busy the loop was."""

    async def scenario() -> None:
        async with serving(HttpLimits(keepalive_timeout_seconds=0.1)) as server:
            client = await server.connect()
            client.send(GET_OK)
            assert (await client.answer()).status == 200
            client.send(GET_OK)
            # The loop is busy until the time is over; it reads the request after that.
            time.sleep(0.15)  # noqa: ASYNC251 - that is the point
            assert (await client.answer()).status == 200
            assert await client.rest() == b""

    run(scenario)


@pytest.mark.parametrize("path", ["/ok", "/whole", "/conflict", "/found", "/nowhere", "/huge"])
def test_answers_end_their_connections_once_the_end_is_announced(path: str) -> None:
    """Each says so, on connections that were there and on new ones, which are taken as before."""
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()

    async def scenario() -> None:
        async with serving() as server:
            idle = await server.connect()
            idle.send(request)
            assert "connection" not in (await idle.answer()).headers
            server.runner.announce_end()
            for client in (idle, await server.connect()):
                client.send(request)
                assert (await client.answer()).headers["connection"] == "close"
                assert await client.rest() == b""

    run(scenario)


def test_requests_behind_each_other_are_all_answered_at_the_end() -> None:
    """The last answer ends the connection, not one before it."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            server.runner.announce_end()
            client.send(GET_OK * 3)
            answers = [await client.answer() for _ in range(3)]
            assert [answer.headers.get("connection") for answer in answers] == [None, None, "close"]
            assert await client.rest() == b""

    run(scenario)


def test_server_that_stops_listening_answers_what_is_there() -> None:
    """Idle connections are closed; what is under way, has begun, or is the first of its connection, is answered."""
    held = b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n"

    async def scenario() -> None:
        async with serving() as server:
            idle, busy, begun, fresh, sent = [await server.connect() for _ in range(5)]
            for client in (idle, begun, sent):
                client.send(GET_OK)
                assert (await client.answer()).status == 200
            busy.send(held)
            await server.seen.started.wait()
            begun.send(GET_OK[:10])
            await until(lambda: sum(connection._head_begun for connection in server.connections) == 1)
            await until(lambda: server.runner.open_connections == 5)
            sent.send(GET_OK)
            await server.runner.stop_listening()
            assert await idle.rest() == b""
            with pytest.raises(ConnectionRefusedError):
                await server.connect()
            assert not await server.runner.wait_for_answers(0.01)
            begun.send(GET_OK[10:])
            fresh.send(GET_OK)
            server.seen.go_on.set()
            for client in (busy, begun, fresh, sent):
                answer = await client.answer()
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert await client.rest() == b""
            assert await server.runner.wait_for_answers(PATIENCE_SECONDS)

    run(scenario)


def test_request_that_is_not_read_yet_keeps_its_connection() -> None:
    """Also one that comes behind the last look of the loop: it is answered, and that ends the connection."""

    async def scenario() -> None:
        async with serving() as server:
            late, idle = await server.connect(), await server.connect()
            for client in (late, idle):
                client.send(GET_OK)
                assert (await client.answer()).status == 200
            server.runner.announce_end()
            late.send_at_once(GET_OK)
            for connection in server.connections:
                assert isinstance(connection, Connection)
                connection.end_when_idle()
            assert await idle.rest() == b""
            answer = await late.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")

    run(scenario)


def test_idle_connection_ends_at_once() -> None:
    """Its client, who may be about to ask on it, knows before the loop has its next turn."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            client.send(GET_OK)
            assert (await client.answer()).status == 200
            connection = server.connection
            assert isinstance(connection, Connection)
            connection.end_when_idle()
            assert client.look() == b""

    run(scenario)


def test_answer_that_is_still_on_its_way_is_not_cut_short() -> None:
    """The connection is idle then, and ends behind its answer."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            await until(lambda: server.runner.open_connections == 1)
            connection = server.connection
            assert isinstance(connection, Connection)
            assert connection.transport is not None
            connection.transport.set_write_buffer_limits(1 << 26)
            client.send(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
            await server.seen.started.wait()
            await until(lambda: connection._waiter is not None)
            connection.end_when_idle()
            answer = await client.answer()
            assert len(answer.body) == int(answer.headers["content-length"])

    run(scenario)


def test_answer_behind_one_that_is_still_on_its_way_is_written() -> None:
    """A client may ask before it has read; what it has not read yet costs it no answer."""

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            await until(lambda: server.runner.open_connections == 1)
            connection = server.connection
            assert connection.transport is not None
            connection.transport.set_write_buffer_limits(1 << 26)
            client.send(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
            client.send(b"GET /whole HTTP/1.1\r\nHost: x\r\n\r\n")
            huge, other = await client.answer(), await client.answer()
            assert len(huge.body) == int(huge.headers["content-length"])
            assert (other.status, other.body) == (201, b'{"whole":1}')

    run(scenario)


def test_connection_that_never_asks_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a moment for its first request when the server stops listening."""
    monkeypatch.setattr(http_connection, "_FIRST_REQUEST_SECONDS", 0.05)

    async def scenario() -> None:
        async with serving() as server:
            client = await server.connect()
            await until(lambda: server.runner.open_connections == 1)
            await server.runner.stop_listening()
            assert await server.runner.wait_for_answers(PATIENCE_SECONDS)
            assert await client.rest() == b""

    run(scenario)


def test_answer_that_nobody_reads_is_waited_for_in_peace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to do while a server stops has the processor: it does not look for the client all the time."""
    looks = 0

    async def wait(*args: Any, **kwargs: Any) -> Any:
        nonlocal looks
        looks += 1
        return await wait_by_asyncio(*args, **kwargs)

    wait_by_asyncio = asyncio.wait

    async def scenario() -> None:
        async with serving() as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1024)
            await until(lambda: server.runner.open_connections == 1)
            connection = server.connection
            assert connection.transport is not None
            connection.transport.set_write_buffer_limits(1 << 26)
            writer.write(b"GET /huge HTTP/1.1\r\nHost: x\r\n\r\n")
            await server.seen.started.wait()
            await until(lambda: connection._waiter is not None)
            await server.runner.stop_listening()
            monkeypatch.setattr(asyncio, "wait", wait)
            assert not await server.runner.wait_for_answers(0.3)
            assert looks <= 3
            writer.transport.abort()

    run(scenario)


def test_nobody_fails_while_a_server_stops() -> None:
    """Clients who go on asking on connections that they keep, until they are refused at the door, are all answered."""

    async def go_on(server: Server) -> int:
        answered = 0
        while True:
            try:
                client = await server.connect()
            except ConnectionRefusedError:
                return answered
            connection = None
            while connection != "close":
                client.send(GET_OK)
                answer = await client.answer()
                connection = answer.headers.get("connection")
                answered += 1

    async def scenario() -> None:
        async with serving() as server:
            clients = [asyncio.create_task(go_on(server)) for _ in range(20)]
            await asyncio.sleep(0.1)
            server.runner.announce_end()
            await asyncio.sleep(0.05)
            await server.runner.stop_listening()
            assert await server.runner.wait_for_answers(PATIENCE_SECONDS)
            assert min(await asyncio.gather(*clients)) > 1

    run(scenario)
