"""The error document, and how each gRPC status becomes one."""

import json

import grpc
import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from gateway.errors import ApiError, error_document, from_rpc_error, from_status

SECRET_DEBUG_TEXT = "ipv4:10.1.2.3:50051: Failed to connect"


def rpc_error(code: grpc.StatusCode, message: str = "", *details: Message) -> grpc.aio.AioRpcError:
    """The error that a stub raises for a google.rpc.Status; without details, as gRPC itself makes it."""
    trailing = grpc.aio.Metadata()
    if details:
        packed = rpc_status(code, message, *details).SerializeToString()
        trailing = grpc.aio.Metadata(("other", "x"), ("grpc-status-details-bin", packed))
    return grpc.aio.AioRpcError(
        code, grpc.aio.Metadata(), trailing, details=message, debug_error_string=SECRET_DEBUG_TEXT
    )


def rpc_status(code: grpc.StatusCode, message: str, *details: Message) -> status_pb2.Status:
    """A google.rpc.Status with these details."""
    packed = []
    for detail in details:
        wrapped = Any()
        wrapped.Pack(detail)
        packed.append(wrapped)
    return status_pb2.Status(code=code.value[0], message=message, details=packed)


def reason(text: str) -> error_details_pb2.ErrorInfo:
    """An ErrorInfo as the runtime gives it."""
    return error_details_pb2.ErrorInfo(reason=text, domain="acp.runs.v1")


# code, HTTP status and code without ErrorInfo, HTTP status and code with the reason SOME_REASON
ROWS = [
    (grpc.StatusCode.CANCELLED, 503, "RUNTIME_UNAVAILABLE", 503, "SOME_REASON"),
    (grpc.StatusCode.UNKNOWN, 500, "INTERNAL", 500, "SOME_REASON"),
    (grpc.StatusCode.INVALID_ARGUMENT, 400, "INVALID_ARGUMENT", 400, "SOME_REASON"),
    (grpc.StatusCode.DEADLINE_EXCEEDED, 504, "DEADLINE_EXCEEDED", 504, "SOME_REASON"),
    (grpc.StatusCode.NOT_FOUND, 404, "NOT_FOUND", 404, "SOME_REASON"),
    (grpc.StatusCode.ALREADY_EXISTS, 409, "ALREADY_EXISTS", 409, "SOME_REASON"),
    (grpc.StatusCode.PERMISSION_DENIED, 502, "RUNTIME_REFUSED_GATEWAY", 403, "SOME_REASON"),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, 502, "RUNTIME_ANSWER_TOO_LARGE", 429, "SOME_REASON"),
    (grpc.StatusCode.FAILED_PRECONDITION, 409, "FAILED_PRECONDITION", 409, "SOME_REASON"),
    (grpc.StatusCode.ABORTED, 409, "ABORTED", 409, "SOME_REASON"),
    (grpc.StatusCode.OUT_OF_RANGE, 400, "OUT_OF_RANGE", 400, "SOME_REASON"),
    (grpc.StatusCode.UNIMPLEMENTED, 502, "RUNTIME_INCOMPATIBLE", 502, "SOME_REASON"),
    (grpc.StatusCode.INTERNAL, 500, "INTERNAL", 500, "SOME_REASON"),
    (grpc.StatusCode.UNAVAILABLE, 503, "RUNTIME_UNAVAILABLE", 503, "SOME_REASON"),
    (grpc.StatusCode.DATA_LOSS, 500, "INTERNAL", 500, "SOME_REASON"),
    (grpc.StatusCode.UNAUTHENTICATED, 502, "RUNTIME_REFUSED_GATEWAY", 502, "RUNTIME_REFUSED_GATEWAY"),
]


def test_the_table_has_a_row_for_each_code() -> None:
    """Nothing but OK is missing from the rows below."""
    assert {row[0] for row in ROWS} == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize(("code", "status", "api_code", "_s", "_c"), ROWS, ids=[row[0].name for row in ROWS])
def test_a_bare_status_becomes_its_row(code: grpc.StatusCode, status: int, api_code: str, _s: int, _c: str) -> None:
    """A status that gRPC itself made gets the default code, and none of gRPC's words get out."""
    error = from_rpc_error(rpc_error(code, "Socket closed by 10.1.2.3"))
    assert (error.status, error.code) == (status, api_code)
    assert error.message
    assert b"10.1.2.3" not in error.body()
    assert ("Retry-After" in error.headers) == (status in (429, 503))


@pytest.mark.parametrize(("code", "_s", "_c", "status", "api_code"), ROWS, ids=[row[0].name for row in ROWS])
def test_a_reason_becomes_the_code(code: grpc.StatusCode, _s: int, _c: str, status: int, api_code: str) -> None:
    """With one ErrorInfo its reason is the code, over both doors; the words of a 500 or 502 stay inside."""
    details = reason("SOME_REASON")
    by_call = from_rpc_error(rpc_error(code, "Words for a person.", details))
    by_session = from_status(rpc_status(code, "Words for a person.", details))
    for error in (by_call, by_session):
        assert (error.status, error.code) == (status, api_code)
        assert (error.message == "Words for a person.") == (status not in (500, 502))
        assert ("Retry-After" in error.headers) == (status in (429, 503))
    assert by_call.body() == by_session.body()


def test_two_reasons_are_none() -> None:
    """AIP-193 says exactly one ErrorInfo; with two, neither is believed."""
    error = from_rpc_error(rpc_error(grpc.StatusCode.NOT_FOUND, "m", reason("A"), reason("B")))
    assert error.code == "NOT_FOUND"


def test_field_violations_get_rest_names() -> None:
    """Fields are named as REST callers know them, in the details and in the message."""
    bad_request = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="metadata_json", description="must be small"),
            error_details_pb2.BadRequest.FieldViolation(field="server.id", description="must not be empty"),
            error_details_pb2.BadRequest.FieldViolation(field="title", description="is too long"),
        ]
    )
    error = from_rpc_error(
        rpc_error(
            grpc.StatusCode.INVALID_ARGUMENT,
            "metadata_json must be small",
            reason("VALIDATION_FAILED"),
            bad_request,
        )
    )
    assert json.loads(error.body()) == {
        "error": "Validation Error",
        "message": "metadata must be small; serverId must not be empty; title is too long",
        "code": "VALIDATION_FAILED",
        "details": [
            {"field": "metadata", "message": "must be small"},
            {"field": "serverId", "message": "must not be empty"},
            {"field": "title", "message": "is too long"},
        ],
    }


@pytest.mark.parametrize(
    ("delay", "header"),
    [
        (Duration(seconds=5), "5"),
        (Duration(seconds=2, nanos=1), "3"),
        (Duration(nanos=1_000_000), "1"),
        (Duration(), "1"),
    ],
)
def test_retry_info_becomes_retry_after(delay: Duration, header: str) -> None:
    """The delay is rounded up to whole seconds and is at least one."""
    error = from_rpc_error(
        rpc_error(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "The queue is full.",
            reason("CAPACITY_EXCEEDED"),
            error_details_pb2.RetryInfo(retry_delay=delay),
        )
    )
    assert (error.status, error.code, error.headers) == (429, "CAPACITY_EXCEEDED", {"Retry-After": header})


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION])
def test_a_reused_idempotency_key_is_422(code: grpc.StatusCode) -> None:
    """The contract gives this one reason a status of its own."""
    error = from_rpc_error(rpc_error(code, "The key was used before.", reason("IDEMPOTENCY_KEY_REUSED")))
    assert (error.status, json.loads(error.body())["error"]) == (422, "Unprocessable Entity")


def test_an_answer_that_is_too_large_is_502() -> None:
    """Not 429, as the caller has done nothing too often; over both doors."""
    details = reason("ANSWER_TOO_LARGE")
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    for error in (from_rpc_error(rpc_error(code, "m", details)), from_status(rpc_status(code, "m", details))):
        assert (error.status, error.code, error.headers) == (502, "ANSWER_TOO_LARGE", {})


def test_broken_details_are_as_good_as_absent() -> None:
    """Details that are no google.rpc.Status, or hold broken messages, do not hide the status."""
    no_status = grpc.aio.AioRpcError(
        grpc.StatusCode.NOT_FOUND,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff\xff")),
    )
    assert from_rpc_error(no_status).code == "NOT_FOUND"
    broken = Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff\xff")
    assert from_status(status_pb2.Status(code=5, details=[broken])).code == "NOT_FOUND"


def test_a_status_without_metadata_is_understood() -> None:
    """An error that never reached a server has no trailing metadata at all."""
    error = from_rpc_error(grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, None, None))
    assert (error.status, error.code, error.headers) == (503, "RUNTIME_UNAVAILABLE", {"Retry-After": "1"})


def test_an_unknown_code_is_internal() -> None:
    """A number that gRPC does not define, and OK, which is no error, are failures of ours."""
    assert from_status(status_pb2.Status(code=99)).status == 500
    assert from_status(status_pb2.Status(code=0)).status == 500


@pytest.mark.parametrize(
    ("status", "title"),
    [
        (400, "Bad Request"),
        (401, "Unauthorized"),
        (402, "Payment Required"),
        (403, "Forbidden"),
        (404, "Not Found"),
        (405, "Method Not Allowed"),
        (409, "Conflict"),
        (413, "Payload Too Large"),
        (415, "Unsupported Media Type"),
        (422, "Unprocessable Entity"),
        (429, "Too Many Requests"),
        (500, "Internal Server Error"),
        (502, "Bad Gateway"),
        (503, "Service Unavailable"),
        (504, "Gateway Timeout"),
        (599, "Error"),
    ],
)
def test_the_error_field_is_the_status_in_words(status: int, title: str) -> None:
    """Each status of the contract has its title; a document without details has no such key."""
    assert error_document(status, "CODE", "m") == {"error": title, "message": "m", "code": "CODE"}


def test_a_lone_surrogate_never_breaks_the_body() -> None:
    """An answer can always be encoded."""
    error = ApiError(400, "X", "a\ud800b", details=[{"field": "\ud800", "message": "m"}])
    assert json.loads(error.body()) == {"error": "Bad Request", "message": "a?b", "code": "X"}
