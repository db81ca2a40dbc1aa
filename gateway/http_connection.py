"""One connection of the HTTP server, and all of them: what aiohttp leaves out.

Nothing that a client does, or leaves undone, holds a connection for ever, and what is no request is refused with our
JSON document. Knows aiohttp inside and out, and nothing of what the application does. It leans on private parts of
aiohttp (`RequestHandler._messages`, `_waiter`, `_process_keepalive`, …); `tests/integration/test_http_server.py` holds
each of them to what is expected here.
"""

import asyncio
import logging
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

from aiohttp import web
from aiohttp.http import HttpVersion11
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway.answers import JsonAnswer
from gateway.errors import ApiError
from gateway.requests import client_left, error_answer, from_http_exception, new_request_id, request_id

_LOG = logging.getLogger(__name__)

# A connection past the limit is kept this long, so that its client can read why; and not more of them than
# this at once, or they would be no less of a burden than the others.
_TURNING_AWAY_SECONDS: Final = 1.0
_TURNING_AWAY_AT_ONCE: Final = 256

# When no more connections are taken, one that has had no request yet is kept so long: its first one is on its way.
_FIRST_REQUEST_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a connection may take up. Times are in seconds."""

    connections: int = 10_000
    # From the opening of a connection, or from the first byte of a later head, to the head's last byte.
    head_timeout_seconds: float = 30.0
    # How long a connection may lie idle between requests.
    keepalive_timeout_seconds: float = 75.0
    # How long the rest of a body that nobody wanted is read, so that its sender gets to see the answer.
    lingering_seconds: float = 5.0
    # How long an answer may take to be read by its client.
    write_seconds: float = 30.0
    line_bytes: int = 8190
    header_bytes: int = 8190
    headers: int = 128

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0.")


DEFAULT_LIMITS: Final = HttpLimits()


class Connections(web.Server):
    """Makes our connections, and counts them."""

    def __init__(self, handler: Any, *, limits: HttpLimits, **kwargs: Any) -> None:
        super().__init__(handler, **kwargs)
        self.limits = limits
        self.turning_away = 0
        self.is_full = False
        self.is_ending = False

    def ends_with_answer(self, connection: RequestHandler) -> bool:
        """Whether the next answer is the last one of its connection; not while others wait behind it."""
        return self.is_ending and not connection._messages

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)


class Connection(RequestHandler):
    """One connection.

    aiohttp closes it when it has lain idle for the keep-alive time. On top of that, `_head_timer` runs while
    the head of a request is due: from the opening of the connection, and from the first byte of each later
    head that does not come in one piece.
    """

    __slots__ = ("_head_begun", "_head_timer", "_is_turned_away", "_took_offence")

    def __init__(self, server: Connections, **kwargs: Any) -> None:
        super().__init__(server, **kwargs)
        self._head_begun = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_turned_away = False
        # The parser has refused something; what follows on this connection has no meaning.
        self._took_offence = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        server = cast(Connections, self._manager)
        if len(server._connections) >= server.limits.connections:
            self._turn_away(server, cast(asyncio.Transport, transport))
            return
        server.is_full = False
        super().connection_made(transport)
        self._head_timer = self._loop.call_later(server.limits.head_timeout_seconds, self._head_is_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._is_turned_away:
            self._is_turned_away = False
            cast(Connections, self._manager).turning_away -= 1
        self._stop_head_timer()
        request = self._current_request
        super().connection_lost(exc)
        if request is not None:
            client_left(request)

    def data_received(self, data: bytes) -> None:
        if self._took_offence:
            return
        super().data_received(data)
        messages = self._messages
        if messages and type(messages[-1][0]) is _ErrInfo:
            self._took_offence = True
            self._fail_body_under_way()
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            # Still waiting for a request: these bytes are part of a head.
            if data:
                self._head_begun = True
                if self._head_timer is None:
                    seconds = cast(Connections, self._manager).limits.head_timeout_seconds
                    self._head_timer = self._loop.call_later(seconds, self._head_is_late)
        elif self._head_timer is not None:
            self._stop_head_timer()

    def resume_reading(self, resume_parser: bool = True) -> None:
        # aiohttp's readers of bodies call it after every read, paused or not, and it always feeds the parser again.
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def end_when_idle(self, *, had_its_time: bool = False) -> None:
        """Close, unless a request is under way, whose answer ends the connection, or on its way."""
        waiter = self._waiter
        if waiter is None or waiter.done() or self._head_begun:
            return
        if self._request_count or had_its_time:
            if self._say_end():
                self.force_close()
        else:
            self._loop.call_later(_FIRST_REQUEST_SECONDS, partial(self.end_when_idle, had_its_time=True))

    def _say_end(self) -> bool:
        """Tell the client that nothing more is read here, unless a request has arrived that is not read yet.

        At once, other than by closing: a loop reads what has arrived, and closes what is to be closed, a turn later.
        Whatever a client sends until then is a request that fails.
        """
        transport = self.transport
        if transport is None or transport.is_closing() or transport.get_write_buffer_size():
            return True  # the rest of an answer goes first
        own = socket.socket(fileno=transport.get_extra_info("socket").fileno())
        try:
            arrived = own.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            own.shutdown(socket.SHUT_RDWR)
        except OSError:
            return True  # the client has reset it
        else:
            return not arrived
        finally:
            own.detach()
        return True

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        self._stop_head_timer()
        await super().shutdown(timeout)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        answer: Any = resp
        if type(answer) is not JsonAnswer:
            if isinstance(answer, web.HTTPException):
                if answer.status >= 400 and answer.content_type != "application/json":
                    answer = error_answer(from_http_exception(answer), request)
            elif not isinstance(answer, web.StreamResponse):
                answer = self.handle_error(request, 500, TypeError(f"A handler returned {type(answer)}."))
        manager = self._manager
        if (self._took_offence or manager is None or cast(Connections, manager).is_ending) and not self._messages:
            # Nothing behind this can be understood, or will be answered.
            self._close = True
        if type(answer) is JsonAnswer:
            if not self._close and self._is_usual(request, answer):
                return await self._write_answer(answer)
            answer = answer.to_response()
        return await super().finish_response(request, answer, start_time)

    def _is_usual(self, request: web.BaseRequest, answer: JsonAnswer) -> bool:
        """Whether an answer is no more than its bytes: nothing of it hangs on the request, nothing comes of it."""
        message = request._message
        return (
            answer.keep_alive
            and not message.should_close
            and message.version == HttpVersion11
            and message.method != "HEAD"
            and not self._upgraded
        )

    async def _write_answer(self, answer: JsonAnswer) -> tuple[web.StreamResponse, bool]:
        """Does what `finish_response` does, for a usual answer, of which aiohttp needs `keep_alive` alone."""
        written = cast(web.StreamResponse, answer)
        transport = self.transport
        if transport is None or transport.is_closing():
            return written, True
        transport.write(answer.to_bytes())
        if self._paused:
            try:
                await self._drain_helper()
            except ConnectionError:
                return written, True
        return written, False

    async def _drain_helper(self) -> None:
        """Waits for the client to read. A time-out only here, as only few answers have to wait for their clients."""
        manager = self._manager
        try:
            async with asyncio.timeout(None if manager is None else cast(Connections, manager).limits.write_seconds):
                await super()._drain_helper()
        except TimeoutError:
            if self.transport is not None:
                self.transport.abort()
            raise ConnectionResetError("The client does not read its answer.") from None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a request whose handler raised `exc`."""
        # aiohttp does not pass on a TimeoutError, which it takes for its own.
        exc = exc or sys.exception()
        if isinstance(exc, ApiError):
            error = exc
        else:
            _LOG.error(
                "A request failed: %s %s",
                request.method,
                request.path,
                exc_info=exc,
                extra={"request_id": request_id(request)},
            )
            error = ApiError(
                500,
                "INTERNAL",
                "Something went wrong on our side; the request id will help to find out what.",
                headers={"Connection": "close"},
            )
        if request.writer.output_size > 0:
            # An answer has begun; all that is left is to break it off. aiohttp closes the connection.
            raise ConnectionError("The answer had begun.")
        return cast(web.StreamResponse, error_answer(error, request))

    def _make_error_handler(self, err_info: _ErrInfo) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        """Answers what the parser refuses, and what `_head_is_late` does."""
        error = err_info.exc if isinstance(err_info.exc, ApiError) else _parser_refusal(err_info.exc)

        async def refuse(request: web.BaseRequest) -> web.StreamResponse:
            # The parser's own words repeat what was sent, which may hold a key.
            _LOG.info(
                "Refused what is no request: %s (%s)",
                error.code,
                type(err_info.exc).__name__,
                extra={"request_id": request_id(request)},
            )
            return cast(web.StreamResponse, error_answer(error, request))

        return refuse

    def _process_keepalive(self) -> None:
        if self._head_timer is not None:
            # The head of the next request is on its way, with a time-out of its own.
            self._keepalive_handle = None
            return
        waiter = self._waiter
        is_over = self._loop.time() >= self._next_keepalive_close_time and waiter is not None and not waiter.done()
        if is_over and not self._say_end():
            self._keepalive_handle = None
            return
        super()._process_keepalive()

    def _head_is_late(self) -> None:
        self._head_timer = None
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if not self._head_begun:
            self.force_close()
            return
        self._took_offence = True
        error = ApiError(
            408,
            "REQUEST_TIMEOUT",
            "The head of the request did not arrive in time.",
            headers={"Connection": "close"},
        )
        self._request_count += 1
        self._messages.append((_ErrInfo(status=408, exc=error, message=error.message), EMPTY_PAYLOAD))
        waiter.set_result(None)

    def _stop_head_timer(self) -> None:
        self._head_begun = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _fail_body_under_way(self) -> None:
        """Tells the reader of a body that it broke off, when that is what the parser took offence at.

        aiohttp's C parser leaves the reader waiting for ever, and answers the error as a request of its own.
        """
        if len(self._messages) > 1:
            payload = self._messages[-2][1]
        elif self._current_request is not None:
            payload = self._current_request.content
        else:
            return
        if payload.is_eof():
            return
        self._messages.pop()
        payload.set_exception(web.RequestPayloadError("The body is malformed."))
        # Or aiohttp would wait for the rest of it.
        payload.feed_eof()

    def _turn_away(self, server: Connections, transport: asyncio.Transport) -> None:
        """Says that there is no room, to a connection that aiohttp never gets to know."""
        # data_received() drops what comes from now on.
        self._force_close = True
        if not server.is_full:
            server.is_full = True
            _LOG.warning("All %d connections are in use; more are refused.", server.limits.connections)
        if server.turning_away >= _TURNING_AWAY_AT_ONCE:
            transport.abort()
            return
        server.turning_away += 1
        self._is_turned_away = True
        self._head_timer = self._loop.call_later(_TURNING_AWAY_SECONDS, transport.abort)
        transport.write(_no_room())
        # Not close(): a request that is on its way would meet a closed socket, and the reset that follows
        # could overtake the answer.
        if transport.can_write_eof():
            transport.write_eof()


def _parser_refusal(refused: BaseException) -> ApiError:
    """What to tell about bytes that aiohttp's parser did not take."""
    if isinstance(refused, LineTooLong) or "Too many headers" in str(refused):
        return ApiError(
            431,
            "HEADERS_TOO_LARGE",
            "The request line, a header, or the number of headers is too large.",
            headers={"Connection": "close"},
        )
    return ApiError(400, "MALFORMED_REQUEST", "This is not a valid HTTP/1.1 request.", headers={"Connection": "close"})


def _no_room() -> bytes:
    """An answer made by hand, for a connection that has no request yet."""
    body = ApiError(503, "TOO_MANY_CONNECTIONS", "All connections are in use; try again in a moment.").body()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"X-Request-Id: {new_request_id()}\r\n"
        "Retry-After: 1\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body
