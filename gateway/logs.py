"""Structured logs: one JSON object a line on standard error, or, at a terminal, lines for a person.

Neither keys nor inputs are ever handed to it.
"""

import asyncio
import atexit
import logging
import sys
from datetime import UTC, datetime
from select import PIPE_BUF
from typing import BinaryIO

import msgspec
import structlog

_requests = structlog.get_logger("gateway.access")


class RequestLine(msgspec.Struct, gc=False):
    """What is logged of a request, in the order of the line."""

    method: str
    route: str
    status: int
    code: str | None
    duration_ms: float
    request_id: str
    organization: str | None
    key_id: str | None
    server_id: str | None
    run_id: str | None
    # As structlog ends its lines.
    event: str = "request"
    level: str = "info"
    timestamp: datetime = msgspec.field(default_factory=lambda: datetime.now(UTC))


class RequestLog:
    """Writes lines of requests in their own quick way: those of one turn of the event loop together.

    They are on their way before the loop waits for anything, and all that are left at the exit of the program. No
    write is longer than what a pipe takes at once, so lines of two processes on one pipe do not mix.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lines: list[bytes] = []
        self._bytes = 0
        self._encode = msgspec.json.Encoder().encode
        atexit.register(self.flush)

    def add(self, line: RequestLine) -> None:
        """Write a line soon. Called in the event loop."""
        text = self._encode(line) + b"\n"
        if not self._lines:
            asyncio.get_running_loop().call_soon(self.flush)
        elif self._bytes + len(text) > PIPE_BUF:
            self._write()
        self._lines.append(text)
        self._bytes += len(text)

    def flush(self) -> None:
        """Write what there is."""
        if self._lines:
            self._write()

    def _write(self) -> None:
        text = b"".join(self._lines)
        self._lines.clear()
        self._bytes = 0
        self._stream.write(text)
        self._stream.flush()


# Set where lines of requests are JSON, and wanted.
_request_log: RequestLog | None = None


def log_request(line: RequestLine) -> None:
    """Log a request that has ended."""
    if _request_log is not None:
        _request_log.add(line)
    else:
        fields = msgspec.structs.asdict(line)
        for name in ("level", "timestamp"):
            del fields[name]
        _requests.info(**fields)


def configure_logs(level: str) -> None:
    """Send structlog's and the standard library's events to standard error. Raises ValueError for no level."""
    global _request_log
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"ACP_LOG_LEVEL must be debug, info, warning or error, not {level!r}")
    stamp = structlog.processors.TimeStamper(fmt="iso")
    renderer: structlog.typing.Processor
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    else:
        renderer = structlog.processors.JSONRenderer(serializer=_json)
        if number <= logging.INFO:
            _request_log = RequestLog(sys.stderr.buffer)
    shared: list[structlog.typing.Processor] = [structlog.processors.add_log_level, stamp]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    logging.basicConfig(level=number, handlers=[handler], force=True)


def _json(event: object, **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=repr).decode()
