"""Live answers: update streams as Server-Sent Events or NDJSON, and the care of open ones.

The frames are pure; `StreamRelay` writes them and knows aiohttp. A stream ends with `stream.completed` or
`stream.error`; one without either was cut.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Literal

from aiohttp import web

from gateway.codec import TERMINAL, encode, event_document, run_document, thread_document
from gateway.errors import ApiError, error_document
from gateway.run_client import UpdateStream
from protos.acp.runs.v1 import run_service_pb2 as rpc

log = logging.getLogger(__name__)

StreamForm = Literal["sse", "ndjson"]

_CONTENT_TYPES: dict[StreamForm, str] = {
    "sse": "text/event-stream; charset=utf-8",
    "ndjson": "application/x-ndjson; charset=utf-8",
}
_FORMS: dict[str, StreamForm | None] = {
    "text/event-stream": "sse",
    "application/x-ndjson": "ndjson",
    "application/json": None,
    "application/*": None,
    "*/*": None,
}
_TICK_SECONDS = 1.0
_SEND_BUFFER_BYTES = 1 << 17
_LINE_BREAKS = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))


# Few clients send more than one.
@lru_cache(maxsize=64)
def stream_form(accept: str | None) -> StreamForm | None:
    """Return the streamed form that an Accept header prefers, None for the collected JSON.

    The highest quality wins, of equals the first (RFC 9110, 12.5.1); what is not known is passed over.
    """
    best, best_quality = None, 0.0
    for part in (accept or "").split(","):
        media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((_quality(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if media_type in _FORMS and quality > best_quality:
            best, best_quality = _FORMS[media_type], quality
    return best


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


class Frames:
    """Turns updates into frames of one form; one document a line, as the official parser wants it."""

    def __init__(self, form: StreamForm) -> None:
        self._sse = form == "sse"
        self._last: tuple[bytes, bytes] = (b"null", b"null")
        self.heartbeat = b": keep-alive\n\n" if self._sse else b"\n"

    def update(self, update: rpc.RunUpdate) -> bytes:
        """Return the frames of one update: the run, its events, the delta; a run that has ended comes last."""
        frames: list[bytes] = []
        if update.HasField("run"):
            run = encode(run_document(update.run, update.thread))
            self._last = (run, encode(thread_document(update.thread)))
            run_frame = self._frame(b'{"type":"run.updated","run":%b}' % run)
            if update.run.status not in TERMINAL:
                frames.append(run_frame)
        for event in update.events:
            document = _one_line(b'{"type":"run.event","event":%b}' % encode(event_document(event)))
            frames.append(b"id: %d\ndata: %b\n\n" % (event.sequence, document) if self._sse else document + b"\n")
        if update.HasField("run") and update.run.status in TERMINAL:
            frames.append(run_frame)
        if update.HasField("delta"):
            delta = update.delta
            frames.append(
                self._frame(
                    encode(
                        {
                            "type": "run.delta",
                            "sequence": delta.sequence,
                            "offset": delta.offset,
                            "text": delta.text,
                        }
                    )
                )
            )
        return b"".join(frames)

    def completed(self) -> bytes:
        """Return the last frame of a stream that went to its end."""
        return self._frame(b'{"type":"stream.completed","run":%b,"thread":%b}' % self._last)

    def error(self, error: ApiError) -> bytes:
        """Return the last frame of a stream that did not."""
        document = {"type": "stream.error"} | error_document(error.status, error.code, error.message, error.details)
        return self._frame(encode(document))

    def _frame(self, document: bytes) -> bytes:
        document = _one_line(document)
        return b"data: %b\n\n" % document if self._sse else document + b"\n"


def _one_line(document: bytes) -> bytes:
    """Return JSON without line breaks: those between its tokens, as metadata may have them, and Unicode's in strings.

    The official client splits lines as `str.splitlines` does; JSON itself escapes the breaks below U+0020 only.
    """
    if b"\n" in document or b"\r" in document:
        document = document.replace(b"\n", b" ").replace(b"\r", b" ")
    if not document.isascii():
        for character, escape in _LINE_BREAKS:
            document = document.replace(character, escape)
    return document


class StreamRelay:
    """Writes one update stream to one client."""

    __slots__ = ("_frames", "_response", "_stopped", "_updates", "has_begun", "idle_ticks", "request")

    def __init__(self, request: web.Request, updates: UpdateStream, frames: Frames) -> None:
        self.request = request
        self._updates = updates
        self._frames = frames
        self._response: web.StreamResponse | None = None
        self._stopped = False
        self.has_begun = False
        self.idle_ticks = 0

    async def run(self, begin: Callable[[rpc.RunUpdate], web.StreamResponse]) -> web.StreamResponse:
        """Relay to the end; `begin` makes the response once the first update is there.

        An error before that is raised (ApiError); later it is the last frame.
        """
        frames = self._frames
        response: web.StreamResponse | None = None
        try:
            try:
                while (update := await self._updates.next()) is not None:
                    data = frames.update(update)
                    if response is None:
                        self.has_begun = True
                        response = begin(update)
                        await response.prepare(self.request)
                        self._bound_send_buffer()
                        self._response = response
                    await self._write(response, data)
                last = frames.completed()
            except ApiError as error:
                if response is None:
                    raise
                last = frames.error(error)
            assert response is not None, "a stream has at least one update"
            self._response = None  # nothing comes behind the end, however long its client takes to read it
            await self._write(response, last)
            await response.write_eof()
        except ConnectionError:
            log.debug("a client left its stream")
            if response is None:
                raise
            self._abort()
        finally:
            self._response = None
            self._updates.stop()
        return response

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        self.idle_ticks = 0
        await response.write(data)  # the connection itself gives up on a client that does not read

    async def beat(self) -> None:
        """Say that the stream is alive."""
        if self._response is not None and not self._stopped:
            with suppress(ConnectionError):
                await self._write(self._response, self._frames.heartbeat)

    def stop(self) -> None:
        """End the stream with `stream.error`, code DRAINING, if anyone is there to read it."""
        self._end(_draining())

    def leave(self) -> None:
        """End the stream of a client that is gone."""
        self._end(ApiError(499, "CLIENT_CLOSED_REQUEST", "The client has gone."))

    def _end(self, error: ApiError) -> None:
        self._stopped = True
        self._updates.fail(error)

    def is_left(self) -> bool:
        """Return whether the client has gone."""
        transport = self.request.transport
        return transport is None or transport.is_closing()

    def _bound_send_buffer(self) -> None:
        """Keep the kernel from taking in megabytes for a client that does not read."""
        transport = self.request.transport
        connection = None if transport is None else transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    def _abort(self) -> None:
        if (transport := self.request.transport) is not None:
            transport.abort()


def _draining() -> ApiError:
    # Made anew each time: an error that is raised keeps hold of all that it passes through.
    return ApiError(503, "DRAINING", "The gateway is stopping; connect again with the last sequence you have.")


class OpenStreams:
    """Every stream of this gateway: one clock beats for all, and finds those whose client is gone."""

    def __init__(self, heartbeat_seconds: float) -> None:
        self._heartbeat_ticks = max(1, round(heartbeat_seconds / _TICK_SECONDS))
        self._open: set[StreamRelay] = set()
        self._clock: asyncio.Task[None] | None = None
        self._stopping = False

    def __len__(self) -> int:
        return len(self._open)

    def start(self) -> None:
        """Start the clock."""
        self._clock = asyncio.create_task(self._tick())

    def stop(self) -> None:
        """End every stream with `stream.error`, code DRAINING; one that is still to come, behind its first update."""
        self._stopping = True
        if self._clock is not None:
            self._clock.cancel()
        for relay in self._open:
            # One that has not begun would be refused, and what it asked for is likely to be accepted.
            if relay.has_begun:
                relay.stop()

    async def relay(
        self,
        request: web.Request,
        updates: UpdateStream,
        form: StreamForm,
        begin: Callable[[rpc.RunUpdate], tuple[int, Mapping[str, str]]],
    ) -> web.StreamResponse:
        """Answer a request with an update stream; `begin` makes its first update into the status and more headers."""

        def response(first: rpc.RunUpdate) -> web.StreamResponse:
            status, headers = begin(first)
            if self._stopping:
                relay.stop()
            return web.StreamResponse(
                status=status,
                headers={
                    "Content-Type": _CONTENT_TYPES[form],
                    "Cache-Control": "no-cache",
                    "X-Accel-Buffering": "no",
                    **headers,
                },
            )

        relay = StreamRelay(request, updates, Frames(form))
        self._open.add(relay)
        try:
            return await relay.run(response)
        finally:
            self._open.discard(relay)

    async def _tick(self) -> None:
        beats: set[asyncio.Task[None]] = set()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            for relay in self._open:
                if relay.is_left():
                    relay.leave()
                    continue
                relay.idle_ticks += 1
                if relay.idle_ticks >= self._heartbeat_ticks:
                    relay.idle_ticks = 0
                    beat = asyncio.create_task(relay.beat())
                    beats.add(beat)
                    beat.add_done_callback(beats.discard)
