"""Everything that a client can get wrong: told in one form, nothing stored, the next request served."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.integration.stack import Answer, Stack, runs, serving
from tests.support import run_async

INVALID, FAILED = "INVALID_JSON", "VALIDATION_FAILED"
BODY_LIMIT = 256 * 1024
STREAM = {"Accept": "text/event-stream"}


@asynccontextmanager
async def unmoved(folder: Path) -> AsyncIterator[tuple[Stack, str]]:
    """Serve with one run, whose path is given; at the end nothing has changed, and the next request is served."""
    async with serving(folder) as stack:
        path = (await stack.start()).headers["Location"]
        before = await _stored(stack, path)
        yield stack, path
        assert await _stored(stack, path) == before
        assert (await stack.start()).status == 201


async def _stored(stack: Stack, path: str) -> tuple[Any, Any]:
    listed = await stack.call("GET", runs("echo"))
    log = await stack.call("GET", path + "/events")
    assert listed.status == log.status == 200
    return listed.json, log.json


def check_refusal(answer: Answer, status: int, code: str, *fields: str) -> None:
    """The flat error document, with these fields named in its details and in its message."""
    document = answer.json
    assert (answer.status, document["code"]) == (status, code), document
    check_document(document)
    assert [detail["field"] for detail in document.get("details", ())] == list(fields)
    for field in fields:
        assert field in document["message"]


def check_document(document: dict[str, Any]) -> None:
    """An error document is flat, its words are for a person."""
    assert document.keys() - {"details"} == {"error", "message", "code"}
    assert document["error"]
    assert len(document["message"]) > 10
    assert re.fullmatch(r"[A-Z][A-Z_]+", document["code"])
    for detail in document.get("details", ()):
        assert detail.keys() == {"field", "message"}
        assert detail["message"]


# -- Bodies --------------------------------------------------------------------------------------------


class Body(NamedTuple):
    """What is sent, and how it is refused."""

    name: str
    sent: bytes
    code: str
    fields: tuple[str, ...] = ()


def fields(name: str, document: object, *named: str) -> Body:
    """A body that is JSON, with a mistake in these fields."""
    return Body(name, json.dumps(document).encode(), FAILED, named)


def text(name: str, sent: str | bytes, *named: str) -> Body:
    """A body that is no JSON as the contract wants it."""
    return Body(name, sent if isinstance(sent, bytes) else sent.encode(), INVALID, named)


def nested(depth: int) -> str:
    """A body that is nested so deep."""
    return '{"content":"x","metadata":' + '{"a":' * (depth - 2) + "{}" + "}" * (depth - 2) + "}"


BODIES = [
    text("empty", ""),
    text("blank", " \n"),
    text("plain text", "hello"),
    text("open object", "{"),
    text("open string", '{"content":"x'),
    text("text behind", '{"content":"x"} x'),
    text("two documents", '{"content":"x"}{"content":"y"}'),
    text("single quotes", "{'content':'x'}"),
    text("trailing comma", '{"content":"x",}'),
    text("comment", '{"content":"x"/* y */}'),
    text("raw line break in a string", '{"content":"a\nb"}'),
    text("raw NUL", '{"content":"a\0b"}'),
    text("byte order mark", b'\xef\xbb\xbf{"content":"x"}'),
    text("invalid UTF-8", b'{"content":"\xff"}'),
    text("cut UTF-8", b'{"content":"\xe2\x82"}'),
    text("surrogate in UTF-8", b'{"content":"\xed\xa0\x80"}'),
    text("UTF-16", '{"content":"x"}'.encode("utf-16")),
    text("high surrogate alone", r'{"content":"\ud83d"}'),
    text("low surrogate alone", r'{"content":"\ude00 x"}'),
    text("surrogates the wrong way round", r'{"content":"\ude00\ud83d"}'),
    text("surrogate in a key", r'{"content":"x","metadata":{"\ud800":1}}'),
    text("surrogate in metadata", r'{"content":"x","metadata":{"a":["\udfff"]}}'),
    text("bad escape", r'{"content":"\x41"}'),
    text("duplicate key", '{"content":"x","content":"y"}', "content"),
    text("duplicate key by an escape", r'{"content":"x","c\u006fntent":"y"}', "content"),
    text("duplicate key in metadata", '{"content":"x","metadata":{"a":{"b":1,"b":1}}}', "b"),
    text("NaN", '{"content":"x","metadata":{"a":NaN}}'),
    text("Infinity", '{"content":"x","metadata":{"a":Infinity}}'),
    text("minus Infinity", '{"content":"x","metadata":{"a":[-Infinity]}}'),
    text("number that is infinite", '{"content":"x","metadata":{"a":1e999}}'),
    text("number of 5,000 digits", '{"content":"x","metadata":{"a":' + "9" * 5_000 + "}}"),
    text("leading zero", '{"content":"x","metadata":{"a":01}}'),
    text("33 levels", nested(33)),
    text("100,000 levels of arrays", "[" * 100_000),
    text("100,000 levels of objects", '{"a":' * 40_000),
    Body("array", b"[]", FAILED),
    Body("string", b'"x"', FAILED),
    Body("number", b"1", FAILED),
    Body("null", b"null", FAILED),
    Body("true", b"true", FAILED),
    fields("no fields", {}, "content"),
    fields("empty content", {"content": ""}, "content"),
    fields("blank content", {"content": " \n\t\u2003"}, "content"),
    fields("null content", {"content": None}, "content"),
    fields("blank content and prompt", {"content": " ", "prompt": ""}, "content"),
    fields("only a mode", {"mode": "sync"}, "content"),
    fields("content that is a number", {"content": 1}, "content"),
    fields("content that is a list", {"content": ["x"]}, "content"),
    fields("content that is an object", {"content": {"text": "x"}}, "content"),
    fields("prompt that is a boolean", {"content": "x", "prompt": False}, "prompt"),
    fields("NUL in content", {"content": "a\0b"}, "content"),
    fields("NUL in prompt", {"prompt": "\0"}, "prompt"),
    fields("mode in capitals", {"content": "x", "mode": "SYNC"}, "mode"),
    fields("unknown mode", {"content": "x", "mode": "stream"}, "mode"),
    fields("empty mode", {"content": "x", "mode": ""}, "mode"),
    fields("mode that is a number", {"content": "x", "mode": 1}, "mode"),
    fields("mode that is a list", {"content": "x", "mode": ["sync"]}, "mode"),
    fields("metadata that is a list", {"content": "x", "metadata": []}, "metadata"),
    fields("metadata that is a string", {"content": "x", "metadata": "{}"}, "metadata"),
    fields("metadata that is a number", {"content": "x", "metadata": 0}, "metadata"),
    fields("metadata that is false", {"content": "x", "metadata": False}, "metadata"),
    fields("metadata of 16 KiB and a byte", {"content": "x", "metadata": {"a": "x" * (16 * 1024 - 8)}}, "metadata"),
    fields("unknown field", {"content": "x", "stream": True}, "stream"),
    fields("field in another case", {"Content": "x"}, "Content"),
    fields("unknown field of an odd name", {"content": "x", "a b\u2028": 1}, "a b\u2028"),
    fields("several mistakes", {"content": 1, "mode": 2, "x": 3, "metadata": 4}, "content", "mode", "x", "metadata"),
]
START_BODIES = [
    fields("title of 257 characters", {"content": "x", "title": "t" * 257}, "title"),
    fields("title that is a number", {"content": "x", "title": 7}, "title"),
    fields("NUL in the title", {"content": "x", "title": "a\0"}, "title"),
]
CONTINUE_BODIES = [fields("title", {"content": "x", "title": "t"}, "title")]
CANCEL_BODIES = [
    fields("field in a cancel", {"content": "x"}, "content"),
    Body("array in a cancel", b"[]", FAILED),
    Body("null in a cancel", b"null", FAILED),
    text("text in a cancel", "cancel"),
    text("blank cancel", " "),
    text("deep cancel", "[" * 1000),
]


def by_name(bodies: list[Body]) -> pytest.MarkDecorator:
    """Parameters, by their names."""
    return pytest.mark.parametrize("body", bodies, ids=[body.name.replace(" ", "-") for body in bodies])


@by_name(BODIES + START_BODIES)
def test_start_refuses(body: Body, tmp_path: Path) -> None:
    """A start with this body is a 400, with the code and the fields named, in either form of answer."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, _):
            for headers in ({}, STREAM, {"Prefer": "respond-async"}):
                answer = await stack.call("POST", runs("echo"), body.sent, headers=headers)
                check_refusal(answer, 400, body.code, *body.fields)

    run_async(main())


@by_name(BODIES + CONTINUE_BODIES)
def test_continue_refuses(body: Body, tmp_path: Path) -> None:
    """A continue with this body is a 400, with the code and the fields named."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, path):
            answer = await stack.call("POST", path + "/input", body.sent)
            check_refusal(answer, 400, body.code, *body.fields)

    run_async(main())


@by_name(CANCEL_BODIES)
def test_cancel_refuses(body: Body, tmp_path: Path) -> None:
    """A cancel takes `{}` or nothing."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, path):
            check_refusal(await stack.call("POST", path + "/cancel", body.sent), 400, body.code, *body.fields)

    run_async(main())


def test_problems_named_are_bounded(tmp_path: Path) -> None:
    """A body of thousands of unknown fields gets an answer of bounded size; a long name is cut."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, _):
            answer = await stack.call("POST", runs("echo"), {f"field{number}": 1 for number in range(5_000)})
            assert len(answer.json["details"]) == 16
            answer = await stack.call("POST", runs("echo"), {"n" * 100_000: 1})
            assert answer.status == 400
            assert len(answer.body) < 2_000

    run_async(main())


@pytest.mark.parametrize(
    "body",
    [
        nested(32).encode(),
        json.dumps({"content": "x", "title": "𝔱" * 256, "metadata": {"a": "x" * (16 * 1024 - 9)}}).encode(),
        b'{"content":"' + b"x" * (BODY_LIMIT - 14) + b'"}',
        b' {"content":"x","prompt":null,"title":null,"mode":null,"metadata":null}\r\n',
        rb'{"content":"\ud83d\ude00","metadata":{"a":1.7976931348623157e308,"b":' + b"9" * 4_000 + b"}}",
        b'{"content":"x","metadata":{}}',
    ],
)
def test_limits_can_be_reached(body: bytes, tmp_path: Path) -> None:
    """What is just within the limits is accepted, and comes back."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answer = await stack.call("POST", runs("echo"), body)
            assert answer.status == 201, answer.json
            sent = json.loads(body)
            assert answer.run["input"] == sent["content"]
            assert answer.run.get("title") == sent.get("title")
            assert answer.run.get("metadata") == sent.get("metadata")

    run_async(main())


def test_limits_are_settings(tmp_path: Path) -> None:
    """Smaller limits hold as the settings say."""
    settings: dict[str, Any] = {
        "max_body_bytes": 200,
        "max_json_depth": 3,
        "max_title_characters": 5,
        "max_metadata_bytes": 20,
    }

    async def main() -> None:
        async with serving(tmp_path, **settings) as stack:
            for body, status, code, named in (
                ({"content": "x" * 200}, 413, "BODY_TOO_LARGE", ()),
                ({"content": "x", "metadata": {"a": {"b": {}}}}, 400, INVALID, ()),
                ({"content": "x", "title": "123456"}, 400, FAILED, ("title",)),
                ({"content": "x", "metadata": {"a": "x" * 15}}, 400, FAILED, ("metadata",)),
            ):
                check_refusal(await stack.call("POST", runs("echo"), body), status, code, *named)
            assert (await stack.call("POST", runs("echo"), {"content": "x", "title": "12345"})).status == 201

    run_async(main())


# -- Queries and headers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "headers", "field"),
    [
        *(
            (f"{where}?{query}", {}, query.partition("=")[0])
            for where, queries in (
                (
                    "LIST",
                    (
                        *(
                            f"limit={value}"
                            for value in ("abc", "0", "-1", "1.5", "", "+1", "1e3", "%EF%BC%91", "9" * 20)
                        ),
                        *(f"status={value}" for value in ("xyz", "", "Running", "queued,running", "unspecified")),
                        *(f"pageToken={value}" for value in ("junk", "%00", "-1", "9" * 40, "%C3%BC")),
                    ),
                ),
                ("RUN", (*(f"include={value}" for value in ("all", "", "Events", "events,thread")),)),
                (
                    "RUN/events",
                    (
                        *(f"after={value}" for value in ("-1", "x", "", "1.0", "0x1", "9" * 20)),
                        *(f"limit={value}" for value in ("0", "-5", "x", "")),
                        *(f"wait={value}" for value in ("x", "-1", "0.5", "", "1s")),
                    ),
                ),
            )
            for query in queries
        ),
        ("RUN/events?after=-1", STREAM, "after"),
        ("RUN/events?after=x", {"Accept": "application/x-ndjson"}, "after"),
        *(
            ("RUN/events", {**STREAM, "Last-Event-ID": value}, "Last-Event-ID")
            for value in ("x", "-1", "1.5", "9" * 16)
        ),
    ],
)
def test_query_refuses(path: str, headers: dict[str, str], field: str, tmp_path: Path) -> None:
    """A value of the query, or an event id, that means nothing is a 400 that names it."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, run_path):
            path_there = path.replace("LIST", runs("echo")).replace("RUN", run_path)
            check_refusal(await stack.call("GET", path_there, headers=headers), 400, FAILED, field)

    run_async(main())


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/jsonp"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/octet-stream"},
        {"Content-Type": ""},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_other_media_types_are_refused(headers: dict[str, str], tmp_path: Path) -> None:
    """A body that does not say that it is JSON in UTF-8 is a 415, for start, continue and cancel."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, path):
            for where, body in (
                (runs("echo"), {"content": "x"}),
                (path + "/input", {"content": "x"}),
                (path + "/cancel", {}),
            ):
                answer = await stack.call("POST", where, body, headers=headers)
                check_refusal(answer, 415, "UNSUPPORTED_MEDIA_TYPE")
                assert answer.json["error"] == "Unsupported Media Type"

    run_async(main())


def test_media_type_may_name_utf_8(tmp_path: Path) -> None:
    """Charset and case do not matter where they say nothing else."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            for value in ("application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'):
                headers = {"Content-Type": value}
                assert (await stack.call("POST", runs("echo"), {"content": "ü"}, headers=headers)).status == 201

    run_async(main())


# -- Addresses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("GET", "/", 404, "NOT_FOUND", None),
        ("GET", "/v1", 404, "NOT_FOUND", None),
        ("GET", "/v1/servers/echo/runs/", 404, "NOT_FOUND", None),
        ("GET", "/v2/servers/echo/runs", 404, "NOT_FOUND", None),
        ("GET", "/v1/servers//runs", 404, "NOT_FOUND", None),
        ("POST", "/v1/servers/echo", 404, "NOT_FOUND", None),
        ("GET", "/../../etc/passwd", 404, "NOT_FOUND", None),
        ("PUT", "/v1/servers/echo/runs", 405, "METHOD_NOT_ALLOWED", "GET, POST"),
        ("DELETE", "/v1/agent-runtimes/echo/runs/run_x", 405, "METHOD_NOT_ALLOWED", "GET"),
        ("GET", "/v1/servers/echo/runs/run_x/input", 405, "METHOD_NOT_ALLOWED", "POST"),
        ("GET", "/v1/servers/echo/runtime/agent/runs/run_x/cancel", 405, "METHOD_NOT_ALLOWED", "POST"),
        ("POST", "/v1/servers/echo/runs/run_x/events", 405, "METHOD_NOT_ALLOWED", "GET"),
        ("PATCH", "/v1/servers/echo/runs/run_x", 405, "METHOD_NOT_ALLOWED", "GET"),
        ("OPTIONS", "/v1/servers/echo/runs", 405, "METHOD_NOT_ALLOWED", "GET, POST"),
        ("POST", "/health", 405, "METHOD_NOT_ALLOWED", "GET, HEAD"),
        *(
            ("GET", f"/v1/servers/{server}/runs", 404, "SERVER_NOT_FOUND", None)
            for server in (
                "nowhere",
                "%00",
                "%2F..%2F",
                "%FF",
                "%ED%A0%80",
                "%E2%80%A8",
                "Echo",
                "x" * 4_000,
                "echo%20",
            )
        ),
        *(
            ("GET", f"/v1/servers/echo/runs/{run}", 404, "RUN_NOT_FOUND", None)
            for run in ("run_x", "%00", "%27%20OR%201=1--", "%FF", "x" * 4_000, "RUN")
        ),
        ("POST", "/v1/servers/echo/runs/run_x/cancel", 404, "RUN_NOT_FOUND", None),
        ("GET", "/v1/servers/echo/runs/run_x/events", 404, "RUN_NOT_FOUND", None),
    ],
)
def test_unknown_addresses_are_told(
    method: str, path: str, status: int, code: str, allow: str | None, tmp_path: Path
) -> None:
    """What is not there is a 404, what is not done there a 405 with Allow; ids of any bytes crash nothing."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, _):
            answer = await stack.call(method, path)
            check_refusal(answer, status, code)
            if allow is not None:
                assert answer.headers["Allow"] == allow

    run_async(main())


def test_long_ids_are_told_reliably(tmp_path: Path) -> None:
    """An id that fills the request line is a 404 each time; gRPC by chance refuses errors that repeat too much."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, _):
            for _ in range(40):
                for path, code in (
                    (runs("x" * 7_900), "SERVER_NOT_FOUND"),
                    (f"{runs('echo')}/{'%F0%9F%98%80' * 600}", "RUN_NOT_FOUND"),
                ):
                    answer = await stack.call("GET", path)
                    check_refusal(answer, 404, code)
                    assert len(answer.body) < 2_000

    run_async(main())


# -- HTTP itself ---------------------------------------------------------------------------------------


async def _exchange(
    stack: Stack, *pieces: bytes, expected: int = 1
) -> list[tuple[int, Mapping[str, str], dict[str, Any]]]:
    """Send bytes as they are, in pieces; return the answers: status, headers by lower-case name, document.

    Once as many have come as are expected, say that there is no more to come, and read to the end.
    """
    url = stack.url("/")
    reader, writer = await asyncio.open_connection(url.host, url.port)
    answers: list[tuple[int, Mapping[str, str], dict[str, Any]]] = []
    try:
        for piece in pieces:
            writer.write(piece.replace(b"KEY", stack.key.encode()))
            await writer.drain()
        while True:
            if len(answers) == expected:
                writer.write_eof()
            if not (head := await reader.readline()):
                break
            status = int(head.split()[1])
            headers = {}
            while (line := await reader.readline()) not in (b"\r\n", b""):
                name, _, value = line.decode().partition(":")
                headers[name.lower()] = value.strip()
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            answers.append((status, headers, json.loads(body) if body else {}))
    except (ConnectionResetError, BrokenPipeError):
        pass
    finally:
        writer.close()
    return answers


_HEAD = (
    b"POST /v1/servers/echo/runs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer KEY\r\nContent-Type: application/json\r\n"
)
_BODY = b'{"content":"x"}'


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"hello\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100, 400, "MALFORMED_REQUEST"),
        (b"GET / HTTP/9.9\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"G\xc3\x84T / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"GET / HTTP/1.1\r\nHost x\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (b"GET / HTTP/1.1\r\nA: b\0c\r\n\r\n", 400, "MALFORMED_REQUEST"),
        (_HEAD + b"Content-Length: x\r\n\r\n" + _BODY, 400, "MALFORMED_REQUEST"),
        (_HEAD + b"Content-Length: -1\r\n\r\n" + _BODY, 400, "MALFORMED_REQUEST"),
        (_HEAD + b"Content-Length: 15\r\nContent-Length: 16\r\n\r\n" + _BODY, 400, "MALFORMED_REQUEST"),
        (_HEAD + b"Content-Length: 15\r\nTransfer-Encoding: chunked\r\n\r\n" + _BODY, 400, "MALFORMED_REQUEST"),
        (_HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + _BODY, 400, "MALFORMED_REQUEST"),
        (_HEAD + b"A: " + b"x" * 20_000 + b"\r\n\r\n", 431, "HEADERS_TOO_LARGE"),
        (_HEAD + b"".join(b"A%d: x\r\n" % n for n in range(500)) + b"\r\n", 431, "HEADERS_TOO_LARGE"),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431, "HEADERS_TOO_LARGE"),
        (_HEAD + b"Expect: a-miracle\r\nContent-Length: 15\r\n\r\n" + _BODY, 417, "EXPECTATION_FAILED"),
        (_HEAD + b"Content-Length: 262145\r\n\r\n" + b" " * 262145, 413, "BODY_TOO_LARGE"),
        (_HEAD + b"Content-Length: 99999999999\r\n\r\n", 413, "BODY_TOO_LARGE"),
        (_HEAD + b"Expect: 100-continue\r\nContent-Length: 262145\r\n\r\n", 413, "BODY_TOO_LARGE"),
        (
            _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n%b\r\n" % (b" " * 65536) * 5,
            413,
            "BODY_TOO_LARGE",
        ),
        (_HEAD + b"Content-Length: 0\r\n\r\n", 400, "INVALID_JSON"),
        (_HEAD + b"\r\n", 400, "INVALID_JSON"),
    ],
)
def test_http_that_is_refused_is_told(sent: bytes, status: int, code: str, tmp_path: Path) -> None:
    """What the HTTP layer itself refuses gets the flat error document and a request id, too, and no 100 Continue."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, _):
            answers = await _exchange(stack, sent)
            assert len(answers) == 1
            (got, headers, document) = answers[0]
            assert (got, document["code"]) == (status, code)
            check_document(document)
            assert headers["content-type"].startswith("application/json")
            assert headers["x-request-id"]
            if status == 413:
                assert document["error"] == "Payload Too Large"

    run_async(main())


def test_request_that_breaks_off_starts_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half a body, half a chunked one and half a head are never taken for a whole request, nor for our failure."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, _):
            for sent in (
                _HEAD + b"Content-Length: 100\r\n\r\n" + _BODY,
                _HEAD + b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + _BODY,
                _HEAD + b"Content-Le",
                _HEAD + b"Content-Length: 15\r\nExpect: 100-continue\r\n\r\n",
            ):
                assert [status for status, _, _ in await _exchange(stack, sent, expected=0)] in ([], [400])

    run_async(main())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_expected_body_is_asked_for(tmp_path: Path) -> None:
    """`Expect: 100-continue` with a body of fair size gets the 100, then the answer."""

    async def main() -> None:
        async with serving(tmp_path) as stack:
            answers = await _exchange(
                stack, _HEAD + b"Expect: 100-continue\r\nContent-Length: 15\r\n\r\n", _BODY, expected=2
            )
            assert [status for status, _, _ in answers] == [100, 201]

    run_async(main())


def test_refused_organizations_and_keys_store_nothing(tmp_path: Path) -> None:
    """A start without a valid key, or for another organization, leaves no trace."""

    async def main() -> None:
        async with unmoved(tmp_path) as (stack, _):
            body = {"content": "x"}
            check_refusal(await stack.call("POST", runs("echo"), body, key=""), 401, "UNAUTHENTICATED")
            headers = {"X-Computer-Agents-Organization": "other"}
            answer = await stack.call("POST", runs("echo"), body, headers=headers)
            check_refusal(answer, 403, "ORGANIZATION_MISMATCH")

    run_async(main())
