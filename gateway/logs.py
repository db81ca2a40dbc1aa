"""Structured logs: one JSON object a line on standard error, or, at a terminal, lines for a person.

Neither keys nor inputs are ever handed to it.
"""

import asyncio
import atexit
import logging
import sys
from contextlib import suppress
from datetime import UTC, datetime
from select import PIPE_BUF
from typing import Any, BinaryIO, Final

import msgspec

_requests = logging.getLogger("gateway.access")


def _now() -> datetime:
    return datetime.now(UTC)


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
    # The end of every line.
    event: str = "request"
    level: str = "info"
    timestamp: datetime = msgspec.field(default_factory=_now)


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
        # As logging does it: a log that cannot be written is no failure of who is logged.
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


class JsonFormatter(logging.Formatter):
    """A record as one JSON object, with what it was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {"event": record.getMessage()}
        fields |= {name: value for name, value in record.__dict__.items() if name not in _EVERY_RECORD_HAS}
        fields |= {"level": record.levelname.lower(), "timestamp": _now()}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=repr).decode()


_EVERY_RECORD_HAS: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "taskName"}

# Set where lines of requests are JSON, and wanted.
_request_log: RequestLog | None = None


def log_request(line: RequestLine) -> None:
    """Log a request that has ended."""
    if _request_log is not None:
        _request_log.add(line)
    elif _requests.isEnabledFor(logging.INFO):
        fields = msgspec.structs.asdict(line)
        # Every record has these by itself.
        for name in ("event", "level", "timestamp"):
            del fields[name]
        _requests.info(line.event, extra=fields)


def configure_logs(level: str) -> None:
    """Send all that is logged to standard error. Raises ValueError for no level."""
    global _request_log
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"ACP_LOG_LEVEL must be debug, info, warning or error, not {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    if sys.stderr.isatty():
        handler.setFormatter(_for_a_person())
    else:
        handler.setFormatter(JsonFormatter())
        if number <= logging.INFO:
            _request_log = RequestLog(sys.stderr.buffer)
    logging.basicConfig(level=number, handlers=[handler], force=True)


def _for_a_person() -> logging.Formatter:
    # Imported for a terminal only: with what it brings along it takes a fifth of the gateway's start.
    import structlog

    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            structlog.stdlib.ExtraAdder(),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
        ],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(),
        ],
    )
