"""Reads the bodies of requests, within limits of size and time; what they say is for `bodies`."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.http import HttpProcessingError, HttpVersion11

from gateway.errors import ApiError


async def read_body(
    request: web.Request, limit_bytes: int, timeout_seconds: float, *, may_be_empty: bool = False
) -> bytes:
    """The body of a request that carries JSON.

    With `may_be_empty` a request without a body needs no Content-Type. The timeout is for the whole body.
    Raises ApiError: 413 BODY_TOO_LARGE, 408 REQUEST_TIMEOUT, 400 MALFORMED_REQUEST where it breaks off,
    415 UNSUPPORTED_MEDIA_TYPE.
    """
    if not may_be_empty:
        _require_json(request)
    # Length says nothing about a chunked body, and nothing that can be trusted to be short about any.
    if (request.content_length or 0) > limit_bytes:
        raise _too_large(limit_bytes)
    content = request.content
    try:
        if content.is_eof():
            # The usual case: it came with the head.
            body = content.read_nowait()
        else:
            received = bytearray()
            async with asyncio.timeout(timeout_seconds):
                while chunk := await content.readany():
                    received += chunk
                    if len(received) > limit_bytes:
                        raise _too_large(limit_bytes)
            body = bytes(received)
    except TimeoutError:
        raise ApiError(
            408, "REQUEST_TIMEOUT", "The body did not arrive in time.", headers={"Connection": "close"}
        ) from None
    except (web.RequestPayloadError, HttpProcessingError, OSError):
        # The second is what aiohttp's parser in Python, for platforms without the C one, gives for the first.
        raise ApiError(400, "MALFORMED_REQUEST", "The body broke off.", headers={"Connection": "close"}) from None
    if len(body) > limit_bytes:
        raise _too_large(limit_bytes)
    if body and may_be_empty:
        _require_json(request)
    return body


def make_expect_handler(
    body_limit_bytes: int,
) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
    """The `expect_handler` of routes that take a body: `100 Continue`, unless the body would be refused.

    Raises ApiError: 413 BODY_TOO_LARGE, 417 EXPECTATION_FAILED (RFC 9110, 10.1.1).
    """

    async def handle_expectation(request: web.Request) -> web.StreamResponse | None:
        if request.version < HttpVersion11:
            return None
        if request.headers.get("Expect", "").lower() != "100-continue":
            raise ApiError(417, "EXPECTATION_FAILED", "The only expectation that can be met is 100-continue.")
        if (request.content_length or 0) > body_limit_bytes:
            raise _too_large(body_limit_bytes)
        try:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        except ConnectionError:
            # Nobody is left to read this, and it is no failure of ours.
            raise ApiError(
                400, "MALFORMED_REQUEST", "The request broke off.", headers={"Connection": "close"}
            ) from None
        # By this aiohttp knows whether the answer itself has begun.
        request.writer.output_size = 0
        return None

    return handle_expectation


def _require_json(request: web.Request) -> None:
    """Refuses what is not JSON in UTF-8, by its headers."""
    encoding = request.headers.get("Content-Encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise _unsupported("The body must come without Content-Encoding.")
    if request.headers.get("Content-Type") == "application/json":
        return
    if request.content_type != "application/json":
        raise _unsupported("The Content-Type must be application/json.")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise _unsupported("The charset must be utf-8.")


def _unsupported(message: str) -> ApiError:
    return ApiError(415, "UNSUPPORTED_MEDIA_TYPE", message)


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413,
        "BODY_TOO_LARGE",
        f"The body must have at most {limit_bytes} bytes.",
        headers={"Connection": "close"},
    )
