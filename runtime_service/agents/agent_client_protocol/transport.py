"""JSON-RPC messages as lines of a child process: the SDK's `Transport`. Knows nothing of sessions and turns.

The SDK makes a task of each message, and those have neither an order nor a limit. So `session/update`, the only
notification that means anything here, does not reach it: `on_update` is awaited for one after the other, and nothing
more is read until it returns. The agent is held up by its pipe meanwhile, also while too many of its requests are open.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from runtime_service.agents.child_process import ChildProcess, LineTooLong

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 8 << 20
_MAX_STRAY_LINES = 100
_MAX_OPEN_REQUESTS = 64
_WRITE_SECONDS = 10.0
_SHOWN_BYTES = 100
_MANY_BYTES = 1 << 18
_MAX_VALUES = 100_000

OnUpdate = Callable[[Any], Awaitable[None]]
"""Takes the params of a `session/update`."""


class ChildTransport:
    """The messages of one child; `on_update` gets the updates, in order, and `on_end` is called when there are no more.

    A line that is no JSON object is left out, as the SDK does, since agents print to their stdout now and then: but not
    a hundred between two messages, and not one that begins as a message does (`{"`), for that was one. `broken` then
    says what is wrong, and the stream is at its end. `heard_at` is the monotonic time of the last message.
    """

    def __init__(self, child: ChildProcess, on_update: OnUpdate, on_end: Callable[[], None]) -> None:
        self._child = child
        self._on_update = on_update
        self._on_end = on_end
        self._stray_lines = 0
        self._open_requests = 0
        self._request_answered = asyncio.Event()
        self.broken: str | None = None
        self.is_at_end = False
        self.is_not_read = False
        """The agent did not read what was sent to it in time."""
        self.heard_at = time.monotonic()

    @property
    def has_open_request(self) -> bool:
        """Whether the agent waits for an answer."""
        return self._open_requests > 0

    async def send(self, message: dict[str, Any]) -> None:
        """Send a message. Raises ConnectionError when the child takes no request any more, or not in time."""
        if "method" in message:
            await self._write(message)
            return
        try:
            await self._write(message)
        except ConnectionError as error:
            # Nobody waits for this; the end of the child is seen by what comes from it.
            log.debug("an answer did not reach its agent: %s", error)
        finally:
            self._open_requests -= 1
            self._request_answered.set()

    async def _write(self, message: dict[str, Any]) -> None:
        # What the SDK says of wrong params may hold an exception.
        line = msgspec.json.encode(message, enc_hook=str) + b"\n"
        try:
            await self._child.write_line(line, _WRITE_SECONDS)
        except TimeoutError as error:
            self.is_not_read = True
            raise ConnectionError("the agent does not read its stdin") from error

    async def receive(self) -> dict[str, Any] | None:
        """Return the next request or response; None at the end of the stream, or where it is broken."""
        message = await self._next()
        if message is None:
            self.is_at_end = True
            self._on_end()
        return message

    async def _next(self) -> dict[str, Any] | None:
        while True:
            while self._open_requests >= _MAX_OPEN_REQUESTS and self._child.exit_status is None:
                await self._until_answered_or_ended()
            try:
                line = await self._child.read_line()
            except LineTooLong:
                self.broken = f"it wrote a line of more than {MAX_LINE_BYTES:,} bytes"
                return None
            if not line:
                return None
            message = self._decode(line)
            if self.broken is not None:
                return None
            if message is None:
                continue
            self._stray_lines = 0
            self.heard_at = time.monotonic()
            if "id" in message:
                if "method" in message:
                    self._open_requests += 1
                    if isinstance(params := message.get("params"), dict):
                        # The SDK would take what is in there for arguments of its own.
                        params.pop("_meta", None)
                return message
            if message["method"] == "session/update":
                await self._on_update(message.get("params"))

    async def close(self) -> None:
        """Do nothing: whoever started the child ends it."""

    async def _until_answered_or_ended(self) -> None:
        self._request_answered.clear()
        waiting = [asyncio.create_task(each) for each in (self._request_answered.wait(), self._child.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waiting:
                each.cancel()

    def _decode(self, line: bytes) -> dict[str, Any] | None:
        """Return a message; None for a stray line, of which one too many breaks the stream."""
        text = line.strip()
        if not text:
            return None
        try:
            message = _decoded(text)
        except (ValueError, RecursionError):  # msgspec.DecodeError is a ValueError
            if text.startswith(b'{"'):
                self.broken = f"it wrote a line that is broken JSON: {_shown(text)}"
                return None
            message = None
        if isinstance(message, dict) and _is_message(message):
            if not isinstance(message.get("error", {}), dict | None):
                self.broken = f"it answered with an error that is none: {_shown(text)}"
            elif len(text) > _MANY_BYTES and _has_too_many_values(message):
                # The SDK would look at each of them, for seconds.
                self.broken = f"it wrote a message of more than {_MAX_VALUES:,} values: {_shown(text)}"
            return message
        self._stray_lines += 1
        if self._stray_lines > _MAX_STRAY_LINES:
            self.broken = f"it writes lines that are no messages of the protocol, such as {_shown(text)}"
        else:
            log.debug("an agent wrote a line that is no message: %s", _shown(text))
        return None


def _decoded(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        # Half of a surrogate pair, as of an emoji cut in two, is what JavaScript writes and no UTF-8.
        again = json.dumps(json.loads(text), ensure_ascii=False).encode(errors="replace")
        return msgspec.json.decode(again)


def _is_message(message: dict[str, Any]) -> bool:
    if "method" in message:
        return isinstance(message["method"], str) and isinstance(message.get("id", 0), int | str | None)
    return isinstance(message.get("id"), int | str) and ("result" in message or "error" in message)


def _has_too_many_values(message: dict[str, Any]) -> bool:
    left: list[Any] = [message]
    count = 0
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            count += len(value)
            if count > _MAX_VALUES:
                return True
            left += value.values() if isinstance(value, dict) else value
    return False


def _shown(text: bytes) -> str:
    return repr(text[:_SHOWN_BYTES].decode(errors="replace"))
