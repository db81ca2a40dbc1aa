"""Errors on the wire, under the doubles of grpcio-testing: no socket, a clock that stands still.

grpcio-testing drives synchronous servicers only, so RunService itself is tested over a real channel
(tests/integration/test_run_service.py). Here a servicer that runs the interceptor's handlers in a loop of its own
shows what reaches a caller for each error of the domain.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc_testing
import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from protos.acp.runs.v1 import run_pb2
from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service import errors
from runtime_service.rpc_errors import DOMAIN, ErrorInterceptor, status_of

SERVICE = rpc.DESCRIPTOR.services_by_name["RunService"]
TOKEN = "a-service-token-of-the-tests"
SECRET = "password=hunter2"

CASES: list[tuple[errors.RunServiceError, grpc.StatusCode, str]] = [
    (errors.InvalidRequest("input", "must hold text"), grpc.StatusCode.INVALID_ARGUMENT, "VALIDATION_FAILED"),
    (errors.ServerNotFound("There is no such."), grpc.StatusCode.NOT_FOUND, "SERVER_NOT_FOUND"),
    (errors.RunNotFound("run_1"), grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"),
    (errors.CapacityExceeded("Full.", 1.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_EXCEEDED"),
    (errors.RequestIdReused("once"), grpc.StatusCode.ALREADY_EXISTS, "IDEMPOTENCY_KEY_REUSED"),
    (errors.QuestionAnswered(), grpc.StatusCode.FAILED_PRECONDITION, "QUESTION_ANSWERED"),
    (errors.AnswerTooLarge(), grpc.StatusCode.RESOURCE_EXHAUSTED, "ANSWER_TOO_LARGE"),
    (errors.SessionFull(3), grpc.StatusCode.RESOURCE_EXHAUSTED, "SESSION_FULL"),
    (errors.AgentUnavailable("Install it."), grpc.StatusCode.UNAVAILABLE, "AGENT_UNAVAILABLE"),
    (errors.StoreUnavailable("The disk is full."), grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE"),
    (errors.Draining(), grpc.StatusCode.UNAVAILABLE, "DRAINING"),
    (errors.Unauthenticated("No token."), grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
]
Behaviour = Callable[[Any, Any], Awaitable[Any]]


class _AioContext:
    """What a handler sees of a synchronous context."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context

    def invocation_metadata(self) -> Any:
        """What the caller sent."""
        return self._context.invocation_metadata()

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any) -> None:
        """End the call; not by the double's own abort, which drops trailing metadata."""
        self._context.set_trailing_metadata(trailing_metadata)
        self._context.set_code(code)
        self._context.set_details(details)
        raise grpc.aio.AbortError


class _Bridge:
    """A synchronous servicer whose GetRun is an asynchronous handler behind the interceptor."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._handler: Any = grpc.unary_unary_rpc_method_handler(behaviour)
        self._interceptor = ErrorInterceptor(TOKEN)

    def GetRun(self, request: rpc.GetRunRequest, context: grpc.ServicerContext) -> Any:
        """Answer as the asynchronous server would."""
        return asyncio.run(self._answer(request, context))

    async def _answer(self, request: rpc.GetRunRequest, context: grpc.ServicerContext) -> Any:
        async def continuation(_: Any) -> Any:
            return self._handler

        class Details:
            method = f"/{SERVICE.full_name}/GetRun"
            invocation_metadata = context.invocation_metadata()

        handler: Any = await self._interceptor.intercept_service(continuation, Details())
        try:
            return await handler.unary_unary(request, _AioContext(context))
        except grpc.aio.AbortError:
            return rpc.GetRunResponse()


def call(behaviour: Behaviour, *metadata: tuple[str, str]) -> tuple[Any, Any, grpc.StatusCode, str]:
    """Return response, trailing metadata, code and details of one GetRun."""
    server = grpc_testing.server_from_dictionary({SERVICE: _Bridge(behaviour)}, grpc_testing.strict_fake_time(0))
    method = SERVICE.methods_by_name["GetRun"]
    response, trailing_metadata, code, details = server.invoke_unary_unary(
        method, metadata or (("authorization", f"Bearer {TOKEN}"),), rpc.GetRunRequest(run_id="run_1"), None
    ).termination()
    # The double adds an entry of its own, as gRPC may.
    return response, [entry for entry in trailing_metadata if entry[0] == "grpc-status-details-bin"], code, details


def status_in(trailing_metadata: Any) -> status_pb2.Status:
    """The google.rpc.Status that a caller finds."""
    ((_, value),) = trailing_metadata
    return status_pb2.Status.FromString(value)


def raises(error: Exception) -> Behaviour:
    """A handler that raises."""

    async def behaviour(_request: Any, _context: Any) -> Any:
        raise error

    return behaviour


def test_every_domain_error_has_a_case() -> None:
    """The table below leaves none out, and neither does the interceptor's."""
    assert {type(error) for error, _, _ in CASES} == set(errors.RunServiceError.__subclasses__())


@pytest.mark.parametrize(("error", "code", "reason"), CASES, ids=[reason for _, _, reason in CASES])
def test_domain_error_becomes_its_status(error: errors.RunServiceError, code: grpc.StatusCode, reason: str) -> None:
    """Code, message, exactly one ErrorInfo, the field of an invalid request, and a time where trying again helps."""
    _, trailing_metadata, got, details = call(raises(error))
    status = status_in(trailing_metadata)
    assert (got, details) == (code, error.message)
    assert (status.code, status.message) == (code.value[0], error.message)
    assert status == status_of(error)
    kinds = [detail.TypeName() for detail in status.details]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason, DOMAIN)
    expected = ["google.rpc.ErrorInfo"]
    if isinstance(error, errors.InvalidRequest):
        expected.append("google.rpc.BadRequest")
        bad = error_details_pb2.BadRequest()
        assert status.details[1].Unpack(bad)
        assert [(v.field, v.description) for v in bad.field_violations] == [("input", "must hold text")]
    if error.retry_after_seconds is not None:
        expected.append("google.rpc.RetryInfo")
        retry = error_details_pb2.RetryInfo()
        assert status.details[-1].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() == error.retry_after_seconds * 1000
    assert kinds == expected


@pytest.mark.parametrize("error", [ValueError(SECRET), KeyError(SECRET), AssertionError(SECRET), TimeoutError(SECRET)])
def test_any_other_exception_is_opaque(error: Exception) -> None:
    """INTERNAL, and nothing of what it says."""
    _, trailing_metadata, code, details = call(raises(error))
    status = status_in(trailing_metadata)
    assert (code, status.code) == (grpc.StatusCode.INTERNAL, code_pb2.INTERNAL)
    assert details == status.message
    assert SECRET not in str(status)
    assert type(error).__name__ not in str(status)
    info = error_details_pb2.ErrorInfo()
    assert [detail.Unpack(info) for detail in status.details] == [True]
    assert (info.reason, info.domain) == ("INTERNAL", DOMAIN)


@pytest.mark.parametrize(
    "metadata",
    [
        ("x", "y"),
        ("authorization", ""),
        ("authorization", TOKEN),
        ("authorization", f"bearer {TOKEN}"),
        ("authorization", f"Bearer {TOKEN} "),
        ("authorization", "Bearer é"),
    ],
)
def test_call_without_the_token_does_not_reach_the_handler(metadata: tuple[str, str]) -> None:
    """It is refused in words that show how the token is given, and not the token."""

    async def behaviour(_request: Any, _context: Any) -> Any:
        raise AssertionError("it was called")

    _, trailing_metadata, code, details = call(behaviour, metadata)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "authorization: Bearer TOKEN" in details
    assert TOKEN not in str(status_in(trailing_metadata))


def test_answer_passes_as_it_is() -> None:
    """The interceptor adds nothing to what goes well."""

    async def behaviour(request: Any, _context: Any) -> Any:
        return rpc.GetRunResponse(run=run_pb2.Run(id=request.run_id))

    response, trailing_metadata, code, _ = call(behaviour)
    assert (response.run.id, code) == ("run_1", grpc.StatusCode.OK)
    assert not trailing_metadata
