"""Serves an `aiohttp.web.Application` on connections that are held to their limits, and ends so that no request fails.

Knows aiohttp, and nothing of what the application does.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Final, cast

from aiohttp import web

from gateway.http_connection import DEFAULT_LIMITS, Connection, Connections, HttpLimits

_LOG = logging.getLogger(__name__)

_TURNS_TO_BEGIN: Final = 4
_FLUSH_SECONDS: Final = 0.01

RouteFinder = Callable[[web.Request], tuple[web.UrlMappingMatchInfo, Callable[[web.Request], Awaitable[Any]]] | None]
ROUTE_FINDER: Final = web.AppKey[RouteFinder]("route_finder")
"""Where an application may keep what finds routes faster than aiohttp's router: a route's match with the handler
to be called, middleware and all; None leaves a request to the router. The match has the application added."""


class GatewayRunner(web.AppRunner):
    """Runs an application behind these limits. Use it like `web.AppRunner`: `setup()`, sites, `cleanup()`.

    An `ApiError` that leaves the application becomes its document; any other exception an opaque 500, logged
    once; an `HTTPException` of 400 or more, which aiohttp raises for an unknown URL, a document too.
    """

    __slots__ = ("_limits",)

    def __init__(
        self,
        app: web.Application,
        limits: HttpLimits = DEFAULT_LIMITS,
        *,
        shutdown_timeout_seconds: float = 60.0,
    ) -> None:
        super().__init__(
            app,
            shutdown_timeout=shutdown_timeout_seconds,
            access_log=None,
            logger=_LOG,
            keepalive_timeout=limits.keepalive_timeout_seconds,
            lingering_time=limits.lingering_seconds,
            max_line_size=limits.line_bytes,
            max_field_size=limits.header_bytes,
            max_headers=limits.headers,
            # No compressed body is ever read; so none is ever blown up either.
            auto_decompress=False,
        )
        self._limits = limits
        app.on_response_prepare.append(self._end_connection)

    def announce_end(self) -> None:
        """From now on each answer ends its connection, and says so; connections are still taken."""
        self._own_server.is_ending = True

    async def stop_listening(self) -> None:
        """Take no more connections, and close the idle ones. A request that has arrived by now is answered."""
        server = self._own_server
        server.is_ending = True
        loop = asyncio.get_running_loop()
        listeners = [listener for site in self.sites for listener in cast(asyncio.Server, site._server).sockets]
        # A server of asyncio's own loop loses those that it is about to let in when it is closed.
        for listener in listeners:
            loop.remove_reader(listener.fileno())
        await _let_begin()
        # Clients wait at the door, let in by the kernel alone; it throws them out when the door closes.
        doors = [socket.socket(fileno=os.dup(listener.fileno())) for listener in listeners]
        for site in self.sites:
            await site.stop()
        let_in = [connection for door in doors for connection in _let_in(door)]
        for connection in let_in:
            await loop.connect_accepted_socket(server, connection)
        await _let_begin()
        for each in server.connections:
            cast(Connection, each).end_when_idle()

    async def wait_for_answers(self, seconds: float) -> bool:
        """Wait until no connection is left, for so long; return whether that is so."""
        deadline = asyncio.get_running_loop().time() + seconds
        while connections := self._own_server.connections:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            handlers = (connection._task_handler for connection in connections)
            tasks = [handler for handler in handlers if handler is not None and not handler.done()]
            # One whose task is over has its last answer on the way to its client.
            await (asyncio.wait(tasks, timeout=left) if tasks else asyncio.sleep(_FLUSH_SECONDS))
        return True

    @property
    def _own_server(self) -> Connections:
        return cast(Connections, self._server)

    async def _end_connection(self, request: web.Request, response: web.StreamResponse) -> None:
        if self._own_server.ends_with_answer(request.protocol):
            response.headers["Connection"] = "close"
            response.force_close()

    @property
    def open_connections(self) -> int:
        """How many connections count towards the limit: also those of clients that are gone, while a handler
        still works for them."""
        return 0 if self._server is None else len(self._server._connections)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        finder = self.app.get(ROUTE_FINDER)
        return Connections(
            made.request_handler if finder is None else partial(_handle, finder, made.request_handler),
            request_factory=made.request_factory,
            loop=made._loop,
            limits=self._limits,
            **made._kwargs,
        )


def _handle(find: RouteFinder, by_router: Callable[[web.Request], Awaitable[Any]], request: web.Request) -> Any:
    """`Application._handle` in short, for requests whose route is found; returns what is to be awaited."""
    # The router's way knows how to meet expectations.
    found = None if "Expect" in request.headers else find(request)
    if found is None:
        return by_router(request)
    request._match_info, handler = found
    return handler(request)


async def _let_begin() -> None:
    """Return once what has arrived is under way: a turn of the loop takes it in, the next ones begin it."""
    for _ in range(_TURNS_TO_BEGIN):
        await asyncio.sleep(0)


def _let_in(door: socket.socket) -> Iterator[socket.socket]:
    """Accept whoever waits at a listening socket, and close it at once."""
    with door:
        door.setblocking(False)
        while True:
            try:
                yield door.accept()[0]
            except OSError:
                return  # nobody is left, or there is no room for more
