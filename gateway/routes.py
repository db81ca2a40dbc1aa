"""The URL table: 3 families × 6 operations."""

from functools import partial

from aiohttp import web

from gateway.handlers import RunHandlers

_RUN = "/{runId}"
FAMILIES: tuple[tuple[str, bool], ...] = (
    ("/v1/servers/{serverId}/runs", False),
    ("/v1/servers/{serverId}/runtime/agent/runs", True),
    ("/v1/agent-runtimes/{serverId}/runs", False),
)
"""The path of a family's runs, and whether its server is a resource connected to an agent runtime."""


def run_routes(handlers: RunHandlers) -> list[web.RouteDef]:
    """Return the eighteen routes."""
    return [
        web.route(method, path + suffix, partial(operation, connected=connected))
        for path, connected in FAMILIES
        for method, suffix, operation in (
            ("POST", "", handlers.start),
            ("GET", "", handlers.list),
            ("GET", _RUN, handlers.get),
            ("POST", f"{_RUN}/input", handlers.continue_),
            ("GET", f"{_RUN}/events", handlers.events),
            ("POST", f"{_RUN}/cancel", handlers.cancel),
        )
    ]
