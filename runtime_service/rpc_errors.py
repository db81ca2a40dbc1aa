"""The edge between the domain's errors and gRPC: interceptor, status table, and the service token.

A domain error becomes a google.rpc.Status with exactly one ErrorInfo (AIP-193); anything else an opaque INTERNAL.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, Iterable
from inspect import isasyncgenfunction
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1.health_pb2 import DESCRIPTOR as HEALTH

from runtime_service import errors

log = logging.getLogger(__name__)

DOMAIN = "acp.runs.v1"
_STATUS: dict[type[errors.RunServiceError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ServerNotFound: grpc.StatusCode.NOT_FOUND,
    errors.RunNotFound: grpc.StatusCode.NOT_FOUND,
    errors.RequestIdReused: grpc.StatusCode.ALREADY_EXISTS,
    errors.QuestionAnswered: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CapacityExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.AnswerTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SessionFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.AgentUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
}
_CODES = {code.value[0]: code for code in grpc.StatusCode}
# A named tuple of the handler's behaviours, of which one is set; the stubs know it as an opaque class.
_Handler: TypeAlias = Any
_HEALTH_PREFIX = f"/{HEALTH.package}.Health/"


def status_of(error: errors.RunServiceError) -> status_pb2.Status:
    """Return the error as gRPC callers get it."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.description)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_seconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(int(error.retry_after_seconds * 1000))
        details.append(retry)
    return _status(_STATUS[type(error)], error.message, details)


def status_for(error: Exception, correlation_id: str = "", traceparent: str = "") -> status_pb2.Status:
    """Return what a caller is told of a call that raised `error`; one that is not of the domain is logged here."""
    if isinstance(error, errors.RunServiceError):
        return status_of(error)
    log.error("a call failed (request %s, trace %s)", correlation_id or "-", traceparent or "-", exc_info=error)
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN)
    return _status(grpc.StatusCode.INTERNAL, "The runtime service failed; its log has the details.", [info])


def _status(code: grpc.StatusCode, message: str, details: Iterable[Message]) -> status_pb2.Status:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return status


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
    status = status_for(error, metadata.get("x-request-id", ""), metadata.get("traceparent", ""))
    trailer = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(_CODES[status.code], status.message, trailer)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler once, so that what it raises becomes a status; refuses calls without the token."""

    def __init__(self, service_token: str) -> None:
        self._expected = f"Bearer {service_token}".encode()
        self._wrapped: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Return the wrapped handler of the call's method, or one that refuses the call."""
        method: str = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._wrapped[method] = _wrap(handler)
        wrapped = self._wrapped[method]
        if not self._has_token(handler_call_details) and not method.startswith(_HEALTH_PREFIX):
            return _refusing(wrapped)
        return wrapped

    def _has_token(self, details: grpc.HandlerCallDetails) -> bool:
        for key, value in details.invocation_metadata:
            if key == "authorization":
                given = value if isinstance(value, bytes) else value.encode()
                return hmac.compare_digest(given, self._expected)
        return False


def _wrap(handler: _Handler) -> _Handler:
    behaviours = {kind: getattr(handler, kind) for kind in ("unary_unary", "unary_stream", "stream_stream")}
    # Reflection's is a generator; its errors are its own.
    guarded = {kind: _guard(each) for kind, each in behaviours.items() if each and not isasyncgenfunction(each)}
    return handler._replace(**guarded)


def _guard(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            try:
                return await behaviour(request, context)
            except (grpc.aio.AbortError, grpc.aio.InternalError):
                raise
            except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
                await _abort(context, error)
        except grpc.aio.InternalError as error:
            # Nothing can be sent: the caller has gone, as gRPC is about to find out.
            log.info("a call ended before all was sent (%s)", error)
            raise asyncio.CancelledError from error

    return guarded


def _refusing(handler: _Handler) -> _Handler:
    async def refuse(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _abort(context, errors.Unauthenticated("The call needs the service token: authorization: Bearer TOKEN."))

    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    return handler._replace(**{kind: refuse for kind in kinds if getattr(handler, kind) is not None})
