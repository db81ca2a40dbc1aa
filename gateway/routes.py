"""The URL table: 3 families × 6 operations."""

import re
from functools import partial
from typing import Final

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
        # aiohttp's types do not know the JsonAnswer that our connections write.
        web.route(method, path + suffix, partial(operation, connected=connected))  # type: ignore[arg-type]
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


# A part of a path is what aiohttp's own dynamic routes take for one.
_PATH: Final = re.compile(
    f"(?:{'|'.join(path for path, _ in FAMILIES)})(?:/{{part}}(/[a-z]+)?)?".replace("{serverId}", "{part}").replace(
        "{part}", "([^{}/]+)"
    )
)


def match_path(path: str) -> tuple[str, dict[str, str]] | None:
    """Return the route of a path as it stands in this table, and the path's parameters.

    For the usual ones, and at once, where aiohttp's router tries one pattern after the other. What is not found
    here (other paths, paths with an escaped slash or percent sign) is for that router to judge.
    """
    found = _PATH.fullmatch(path)
    if found is None or "%" in path:
        return None
    *servers, run_id, operation = found.groups()
    family = 0 if servers[0] else 1 if servers[1] else 2
    route = FAMILIES[family][0]
    if run_id is None:
        return route, {"serverId": servers[family]}
    return f"{route}{_RUN}{operation or ''}", {"serverId": servers[family], "runId": run_id}
