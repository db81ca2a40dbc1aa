"""The one pattern for run routes, held against aiohttp's own router."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from gateway.app import make_app
from gateway.config import GatewayConfig
from gateway.http_server import ROUTE_FINDER
from gateway.routes import match_path

CONFIG = GatewayConfig(grpc_target="127.0.0.1:1", service_token="t", api_key="a-key-of-the-tests")

pieces = st.sampled_from(
    [
        *("/v1", "/servers", "/agent-runtimes", "/runtime/agent", "/runs", "/input", "/events", "/cancel", "/echo"),
        *("/", "//", "/%2F", "/%25", "/%72un", "/a%20b", "/%C3%A9", "/%FF", "/{x}", "/%7Bx%7D", "/.", "/..", "/a;b"),
    ]
)
paths = st.lists(pieces, max_size=6).map("".join) | st.tuples(
    st.sampled_from(["/v1/servers/s/runs", "/v1/servers/s/runtime/agent/runs", "/v1/agent-runtimes/s/runs"]),
    st.lists(pieces, max_size=3).map("".join),
).map("".join)


@pytest.fixture(scope="module")
def app() -> web.Application:
    """The application; it is never started."""

    async def make() -> web.Application:
        return make_app(CONFIG)

    return asyncio.run(make())


def test_every_run_route_is_found(app: web.Application) -> None:
    """None of the eighteen is left to the router."""
    found = 0
    for route in app.router.routes():
        assert route.resource is not None
        if "{serverId}" in route.resource.canonical:
            path = route.resource.canonical.format(serverId="a", runId="b")
            match = app[ROUTE_FINDER](make_mocked_request(route.method, path))
            assert match is not None
            assert match[0].route is route
            found += 1
    assert found == 18


@given(path=paths, method=st.sampled_from(["GET", "POST", "PUT"]))
def test_what_is_found_is_what_the_router_finds(app: web.Application, path: str, method: str) -> None:
    """The same route with the same parameters, or nothing."""
    request = make_mocked_request(method, path or "/")
    found = app[ROUTE_FINDER](request)
    routed = asyncio.run(app.router.resolve(request))
    if found is not None:
        assert found[0].route is routed.route
        assert dict(found[0]) == dict(routed)
    elif routed.http_exception is None and "{serverId}" in str(routed.get_info()):
        assert "%" in request.rel_url.path_safe


def test_escapes_that_stay_are_left_to_the_router() -> None:
    """A slash or a percent sign within a part."""
    assert match_path("/v1/servers/a%2Fb/runs") is None
    assert match_path("/v1/servers/a b/runs") == ("/v1/servers/{serverId}/runs", {"serverId": "a b"})
