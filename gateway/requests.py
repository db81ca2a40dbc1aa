"""What is known of a request beside what it asks: ids, caller, run. Filled on the way, read by log and metrics."""

import re

from aiohttp import web

from gateway.auth import Caller
from gateway.http_server import request_id

# https://www.w3.org/TR/trace-context/, version 00
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class RequestInfo:
    """One request; every value is fit for a log and for gRPC metadata."""

    __slots__ = ("caller", "request_id", "run_id", "traceparent")

    def __init__(self, request: web.BaseRequest) -> None:
        self.request_id = request_id(request)
        trace = request.headers.get("traceparent")
        self.traceparent = trace if trace and _TRACEPARENT.fullmatch(trace) else None
        self.caller: Caller | None = None
        self.run_id: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers that every answer carries."""
        return {"X-Request-Id": self.request_id}


_INFO = web.RequestKey("info", RequestInfo)


def begin_info(request: web.BaseRequest) -> RequestInfo:
    """Make the request's info; `info_of` finds it from then on."""
    info = request[_INFO] = RequestInfo(request)
    return info


def info_of(request: web.BaseRequest) -> RequestInfo:
    """Return what `begin_info` made."""
    return request[_INFO]
