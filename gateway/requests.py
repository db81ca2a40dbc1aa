"""What is known of a request beside what it asks (ids, caller, run), and the answer to one that fails."""

import re
import secrets
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Final

from aiohttp import web

from gateway.answers import JsonAnswer
from gateway.auth import Caller
from gateway.errors import ApiError, title

# What a caller's own request id may look like: it is logged, and goes into gRPC metadata.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# https://www.w3.org/TR/trace-context/, version 00
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class RequestInfo:
    """One request; every value is fit for a log and for gRPC metadata."""

    __slots__ = ("caller", "on_left", "request_id", "run_id", "traceparent")

    def __init__(self, request: web.BaseRequest) -> None:
        known = request.headers.get("X-Request-Id")
        # The caller's own where that is fit to be one.
        self.request_id = new_request_id() if known is None or _REQUEST_ID.fullmatch(known) is None else known
        trace = request.headers.get("traceparent")
        self.traceparent = trace if trace and _TRACEPARENT.fullmatch(trace) else None
        self.caller: Caller | None = None
        self.run_id: str | None = None
        self.on_left: Callable[[], None] | None = None

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


def when_left(request: web.BaseRequest, do: Callable[[], None]) -> None:
    """Have `do` called when the client goes before its answer; at once, when it has gone."""
    if request.transport is None:
        do()
    else:
        info_of(request).on_left = do


def client_left(request: web.BaseRequest) -> None:
    """Do what `when_left` was told."""
    info = request.get(_INFO)
    if info is not None and info.on_left is not None:
        info.on_left()


def request_id(request: web.BaseRequest) -> str:
    """Return the id of a request, also of one that the application never saw."""
    return (request.get(_INFO) or begin_info(request)).request_id


def error_answer(error: ApiError, request: web.BaseRequest) -> JsonAnswer:
    """The answer that carries the error's document, headers and request id."""
    return JsonAnswer(error.body(), error.status, {"X-Request-Id": request_id(request), **error.headers})


def from_http_exception(exception: web.HTTPException) -> ApiError:
    """The error that says what aiohttp's exception (of 400 or more) says."""
    status = exception.status
    if isinstance(exception, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(exception.allowed_methods))
        return ApiError(
            status,
            "METHOD_NOT_ALLOWED",
            f"This address does not take {exception.method}; it takes {allowed}.",
            headers={"Allow": allowed},
        )
    if status == 404:
        return ApiError(status, "NOT_FOUND", "There is nothing at this address.")
    try:
        code = HTTPStatus(status).name
    except ValueError:
        code = "ERROR"
    return ApiError(status, code, f"{title(status, code)}.")


def _request_ids() -> Iterator[str]:
    """Make ids of 96 random bits each, which come from the system for many of them at once."""
    while True:
        digits = secrets.token_hex(12 * 256)
        for start in range(0, len(digits), 24):
            yield f"req_{digits[start : start + 24]}"


_ids = _request_ids()


def new_request_id() -> str:
    """Make a request id."""
    return next(_ids)
