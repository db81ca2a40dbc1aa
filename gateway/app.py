"""Composition: middleware, routes, health and metrics, and the lives of the replicas and the streams."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import Protocol

from aiohttp import web

from gateway.auth import KeyRing
from gateway.config import GatewayConfig, SettingError
from gateway.errors import ApiError
from gateway.handlers import Answer, RunHandlers
from gateway.http_connection import HttpLimits
from gateway.http_server import ROUTE_FINDER, GatewayRunner, RouteFinder
from gateway.logs import RequestLine, log_request
from gateway.metrics import Metrics
from gateway.replicas import Replicas
from gateway.request_body import make_expect_handler
from gateway.requests import begin_info, error_answer, from_http_exception
from gateway.routes import match_path, run_routes
from gateway.run_client import RunClient
from gateway.streaming import OpenStreams

# So long the gateway waits for the first runtime service before it takes requests.
_FIRST_REPLICA_SECONDS = 1.0
_QUIET = frozenset({"/health", "/health/live", "/metrics"})

# Time for the answers to requests that were cut short, and for what is left to be broken off.
_LAST_ANSWERS_SECONDS = 2.0
_BREAK_OFF_SECONDS = 0.5

_Handler = Callable[[web.Request], Awaitable[Answer]]


class _Middleware(Protocol):
    def __call__(self, request: web.Request, handler: _Handler) -> Awaitable[Answer]: ...


class _Parts:
    """What the end of a gateway is about."""

    def __init__(self, replicas: Replicas, streams: OpenStreams) -> None:
        self.replicas = replicas
        self.streams = streams
        self.is_ending = False


_PARTS = web.AppKey("parts", _Parts)


def make_app(config: GatewayConfig) -> web.Application:
    """Build the application. Raises KeyFileError or ValueError for keys that cannot be used."""
    keys = KeyRing(config.keys_file, literal_key=config.api_key)
    replicas = Replicas(config.grpc_target, config.service_token, config.max_calls, config.reconnect_seconds)
    streams = OpenStreams(config.heartbeat_seconds)
    metrics = Metrics(lambda: len(streams))
    middleware = _make_middleware(metrics)
    app = web.Application(middlewares=[middleware])  # type: ignore[list-item]  # its types know no JsonAnswer
    expect_handler = make_expect_handler(config.max_body_bytes)
    for route in run_routes(RunHandlers(config, RunClient(replicas), keys, streams, metrics)):
        app.router.add_route(route.method, route.path, route.handler, expect_handler=expect_handler)
    app[ROUTE_FINDER] = _make_route_finder(app, middleware)

    parts = app[_PARTS] = _Parts(replicas, streams)

    async def health(_: web.Request) -> web.Response:
        ready = replicas.is_serving and not parts.is_ending
        document = {"status": "ok" if ready else "unavailable", "ready": ready}
        return web.json_response(document, status=200 if ready else 503)

    async def live(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def metrics_text(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app.router.add_get("/health", health)
    app.router.add_get("/health/live", live)
    app.router.add_get("/metrics", metrics_text)

    async def lives(_: web.Application) -> AsyncIterator[None]:
        replicas.start()
        streams.start()
        await replicas.wait_until_serving(_FIRST_REPLICA_SECONDS)
        yield
        await replicas.close()

    app.cleanup_ctx.append(lives)
    return app


def _make_route_finder(app: web.Application, middleware: _Middleware) -> RouteFinder:
    """Return what finds the routes that `app` has by now and that `match_path` knows."""
    routes = {
        (route.method, route.resource.canonical): (route, partial(middleware, handler=route.handler))
        for route in app.router.routes()
        if route.resource is not None
    }

    def find(request: web.Request) -> tuple[web.UrlMappingMatchInfo, _Handler] | None:
        matched = match_path(request.rel_url.path_safe)
        if matched is None or (found := routes.get((request.method, matched[0]))) is None:
            return None
        match = web.UrlMappingMatchInfo(matched[1], found[0])
        match.add_app(app)
        return match, found[1]

    return find


def _make_middleware(metrics: Metrics) -> _Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: _Handler) -> Answer:
        """Turn errors into documents; count and log every request, however it ends."""
        started = perf_counter()
        info = begin_info(request)
        status, code = 499, None  # what is logged when the client is gone before its answer
        try:
            response: Answer = await _answer(request, handler)
            status = response.status
            if not response.prepared:
                response.headers["X-Request-Id"] = info.request_id
        except ApiError as error:
            status, code = error.status, error.code
            response = error_answer(error, request)
        except ConnectionError:
            raise
        except Exception:
            status = 500
            raise
        finally:
            match = request.match_info
            resource = match.route.resource
            route = resource.canonical if resource is not None else "unmatched"
            seconds = perf_counter() - started
            metrics.request_ended(request.method if resource is not None else "ANY", route, status, seconds)
            if route not in _QUIET:
                caller = info.caller
                log_request(
                    RequestLine(
                        method=request.method,
                        route=route,
                        status=status,
                        code=code,
                        duration_ms=round(seconds * 1000, 3),
                        request_id=info.request_id,
                        organization=None if caller is None else caller.organization,
                        key_id=None if caller is None else caller.key_id,
                        server_id=match.get("serverId"),
                        run_id=info.run_id or match.get("runId"),
                    )
                )
        return response

    return middleware


async def _answer(request: web.Request, handler: _Handler) -> Answer:
    """Return the handler's answer; errors of the router become ApiError."""
    try:
        return await handler(request)
    except web.HTTPException as exception:
        if exception.status < 400:
            raise
        raise from_http_exception(exception) from None


class Gateway:
    """A serving gateway; an async context manager. `url` is where it is reached."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self.url = ""

    async def __aenter__(self) -> "Gateway":
        config = self._config
        limits = HttpLimits(
            connections=config.max_connections,
            keepalive_timeout_seconds=config.idle_seconds,
            write_seconds=config.write_seconds,
        )
        self._runner = GatewayRunner(make_app(config), limits, shutdown_timeout_seconds=_BREAK_OFF_SECONDS)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, config.host, config.port, backlog=1024).start()
        except OSError as error:
            await self._runner.cleanup()
            raise SettingError(
                f"{config.host}:{config.port} cannot be listened on ({error.strerror}); "
                "choose another with --port, or 0 for any"
            ) from error
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._runner.server is not None:
            await self._drain()
            await self._runner.cleanup()

    async def _drain(self) -> None:
        """Stop so that no request fails: who balances is told first, then nobody is let in, then all are answered."""
        parts = self._runner.app[_PARTS]
        parts.is_ending = True
        self._runner.announce_end()
        await asyncio.sleep(self._config.drain_delay_seconds)
        await self._runner.stop_listening()
        parts.streams.stop()
        if not await self._runner.wait_for_answers(self._config.drain_seconds):
            # A wait that is cut short is answered as one that is over.
            parts.replicas.hurry()
            await self._runner.wait_for_answers(_LAST_ANSWERS_SECONDS)
