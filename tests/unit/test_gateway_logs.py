"""The lines of requests: when they are written, and in what pieces."""

import asyncio
import io
import json
import logging
import subprocess
import sys
from select import PIPE_BUF

import pytest

from gateway.logs import JsonFormatter, RequestLine, RequestLog
from tests.support import run_async


def line(request_id: str) -> RequestLine:
    """A line that is told by its request id."""
    return RequestLine("GET", "/x", 200, None, 0.125, request_id, None, None, "s", None)


class Pipe(io.BytesIO):
    """Remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.writes.append(bytes(data))
        return len(data)


def test_lines_of_a_turn_are_written_together_before_the_next() -> None:
    """One write for the lines of one turn of the loop, with every field, in order."""

    async def scenario() -> None:
        pipe = Pipe()
        log = RequestLog(pipe)
        log.add(line("one"))
        log.add(line("two"))
        assert not pipe.writes
        await asyncio.sleep(0)
        [written] = pipe.writes
        first, second = (json.loads(text) for text in written.splitlines())
        assert (first["request_id"], second["request_id"]) == ("one", "two")
        assert first["timestamp"].endswith("Z")
        assert list(first) == [
            *("method", "route", "status", "code", "duration_ms", "request_id", "organization", "key_id"),
            *("server_id", "run_id", "event", "level", "timestamp"),
        ]
        log.add(line("three"))
        await asyncio.sleep(0)
        assert json.loads(pipe.writes[1])["request_id"] == "three"

    asyncio.run(scenario())


def test_no_write_is_longer_than_a_pipe_takes_at_once() -> None:
    """Whole lines only, none lost, in order."""

    async def scenario() -> None:
        pipe = Pipe()
        log = RequestLog(pipe)
        for number in range(100):
            log.add(line(f"{number:0128d}"))
        await asyncio.sleep(0)
        assert 1 < len(pipe.writes) < 100
        assert all(len(written) <= PIPE_BUF and written.endswith(b"\n") for written in pipe.writes)
        ids = [int(json.loads(text)["request_id"]) for text in b"".join(pipe.writes).splitlines()]
        assert ids == list(range(100))

    asyncio.run(scenario())


def test_what_is_left_at_the_end_is_written() -> None:
    """As `atexit` does it, when the loop has no turn left."""

    async def scenario() -> None:
        log.add(line("last"))
        log.flush()

    pipe = Pipe()
    log = RequestLog(pipe)
    asyncio.run(scenario())
    assert json.loads(pipe.writes[0])["request_id"] == "last"
    assert len(pipe.writes) == 1


@pytest.mark.parametrize("error", [BrokenPipeError("gone"), OSError("the disk is full"), ValueError("closed file")])
@pytest.mark.parametrize("method", ["write", "flush"])
def test_stream_that_cannot_be_written_fails_nobody(
    method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither who adds a line nor the loop learns of it; once it can be written again, it is."""

    def fail(*_: bytes) -> None:
        raise error

    async def main() -> None:
        pipe = Pipe()
        log = RequestLog(pipe)
        with monkeypatch.context() as patch:
            patch.setattr(pipe, method, fail)
            for number in range(100):
                log.add(line(f"{number:0128d}"))
            await asyncio.sleep(0)
            log.add(line("by hand"))
            log.flush()
        pipe.writes.clear()
        log.add(line("again"))
        await asyncio.sleep(0)
        [written] = pipe.writes
        assert json.loads(written)["request_id"] == "again"

    run_async(main())


def test_record_is_one_json_object() -> None:
    """Its words, what it was given besides, its level and time, and what went wrong."""
    record = logging.makeLogRecord(
        {"msg": "met %s", "args": ("x",), "levelname": "ERROR", "request_id": "r", "odd": {1}}
    )
    try:
        raise ValueError("the reason")
    except ValueError:
        record.exc_info = sys.exc_info()
    document = json.loads(JsonFormatter().format(record))
    assert list(document) == ["event", "request_id", "odd", "level", "timestamp", "exception"]
    assert (document["event"], document["request_id"], document["level"]) == ("met x", "r", "error")
    assert document["exception"].endswith("ValueError: the reason")


def test_start_imports_nothing_for_terminals() -> None:
    """What only people at a terminal need is imported when there is one."""
    program = "import sys, gateway.__main__; print({'rich', 'structlog', 'pygments'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
