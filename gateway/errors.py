"""What a REST caller is told when something is refused or fails: the flat error document of `acp-api.md`,
and the one table that turns a gRPC status into it.

Knows nothing of HTTP servers or stubs: it gets an error and gives status, headers and body.
"""

from http import HTTPStatus
from typing import Final, NamedTuple, TypeVar

import grpc
import msgspec
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

# Where http.HTTPStatus has another phrase than the contract, or one that differs between Python versions.
_TITLES: Final = {413: "Payload Too Large", 422: "Unprocessable Entity"}

_MessageType = TypeVar("_MessageType", bound=Message)

_STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"

_encode: Final = msgspec.json.Encoder().encode

# 429 and 503 always carry a Retry-After; this one where the runtime names none.
_DEFAULT_RETRY_AFTER_SECONDS: Final = 1


class ApiError(Exception):
    """A refusal or failure as the REST caller will see it.

    Nothing in it may be secret or foreign: `message` is for a person, `code` for a program, `details` names
    fields as REST calls them. `headers` belong to the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: list[dict[str, str]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details
        self.headers = headers or {}

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"

    def body(self) -> bytes:
        """The error document as JSON."""
        document = error_document(self.status, self.code, self.message, self.details)
        try:
            return _encode(document)
        except UnicodeEncodeError:
            # A lone surrogate in a message must not turn a refusal into a failure.
            message = self.message.encode("utf-8", "replace").decode()
            return _encode(error_document(self.status, self.code, message))


def error_document(
    status: int, code: str, message: str, details: list[dict[str, str]] | None = None
) -> dict[str, object]:
    """The flat error document of the contract, ready to be encoded."""
    document: dict[str, object] = {"error": title(status, code), "message": message, "code": code}
    if details:
        document["details"] = details
    return document


def title(status: int, code: str) -> str:
    """The document's `error`: the status in words."""
    if status == 400 and code == "VALIDATION_FAILED":
        return "Validation Error"
    known = _TITLES.get(status)
    if known is not None:
        return known
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


class _Row(NamedTuple):
    """How one gRPC status is shown. `code` and `message` stand in where the status has no ErrorInfo: then it
    comes from gRPC itself or from something in between, whose words are not for callers.

    `ours`: whatever the status says, the fault lies between gateway and runtime, or inside the runtime.
    The caller can do nothing about it, so the runtime's message is never passed on; nor, where
    `hides_reason`, its reason.
    """

    status: int
    code: str
    message: str
    ours: bool = False
    hides_reason: bool = False


_INTERNAL_MESSAGE: Final = "Something went wrong on our side; the request id will help to find out what."
_UNREACHABLE_MESSAGE: Final = "The runtime service cannot be reached; ask again in a moment."
_REFUSED_MESSAGE: Final = "The runtime service does not accept this gateway; its operator must be told."

# google.rpc.Code names the HTTP status of each; where we differ, the reason stands beside the row.
_TABLE: Final[dict[grpc.StatusCode, _Row]] = {
    # 499 there. A call that the gateway itself gave up never gets here, so the runtime ended it: it stops.
    grpc.StatusCode.CANCELLED: _Row(503, "RUNTIME_UNAVAILABLE", _UNREACHABLE_MESSAGE),
    grpc.StatusCode.UNKNOWN: _Row(500, "INTERNAL", _INTERNAL_MESSAGE, ours=True),
    grpc.StatusCode.INVALID_ARGUMENT: _Row(400, "INVALID_ARGUMENT", "The request is not valid."),
    grpc.StatusCode.DEADLINE_EXCEEDED: _Row(
        504,
        "DEADLINE_EXCEEDED",
        "The runtime service did not answer in time; the request may still take effect.",
    ),
    grpc.StatusCode.NOT_FOUND: _Row(404, "NOT_FOUND", "There is no such resource."),
    grpc.StatusCode.ALREADY_EXISTS: _Row(409, "ALREADY_EXISTS", "The resource exists already."),
    grpc.StatusCode.PERMISSION_DENIED: _Row(403, "PERMISSION_DENIED", "This is not allowed."),
    grpc.StatusCode.RESOURCE_EXHAUSTED: _Row(
        429, "RESOURCE_EXHAUSTED", "There is no room for this request now; ask again in a moment."
    ),
    # 400 there. In the contract 400 is a request that is wrong in itself; one that does not fit the state
    # that things are in is a conflict.
    grpc.StatusCode.FAILED_PRECONDITION: _Row(
        409, "FAILED_PRECONDITION", "The resource is not in a state that allows this."
    ),
    grpc.StatusCode.ABORTED: _Row(409, "ABORTED", "The request collided with another one; ask again."),
    grpc.StatusCode.OUT_OF_RANGE: _Row(400, "OUT_OF_RANGE", "A value lies outside of what is allowed."),
    # 501 there, which would speak about the REST operation. It is the runtime that is too old for us.
    grpc.StatusCode.UNIMPLEMENTED: _Row(
        502, "RUNTIME_INCOMPATIBLE", "The runtime service does not know this operation.", ours=True
    ),
    grpc.StatusCode.INTERNAL: _Row(500, "INTERNAL", _INTERNAL_MESSAGE, ours=True),
    grpc.StatusCode.UNAVAILABLE: _Row(503, "RUNTIME_UNAVAILABLE", _UNREACHABLE_MESSAGE),
    grpc.StatusCode.DATA_LOSS: _Row(500, "INTERNAL", _INTERNAL_MESSAGE, ours=True),
    # 401 there, which would tell callers that their key is wrong, when it is the gateway's token.
    grpc.StatusCode.UNAUTHENTICATED: _Row(
        502, "RUNTIME_REFUSED_GATEWAY", _REFUSED_MESSAGE, ours=True, hides_reason=True
    ),
}

# Without ErrorInfo these are no decision of the runtime about the caller: a proxy between us refused the call, or
# gRPC found a message too large.
_FROM_BETWEEN: Final = {
    grpc.StatusCode.PERMISSION_DENIED: _TABLE[grpc.StatusCode.UNAUTHENTICATED],
    grpc.StatusCode.RESOURCE_EXHAUSTED: _Row(
        502, "RUNTIME_ANSWER_TOO_LARGE", "The answer of the runtime service is too large to be passed on.", ours=True
    ),
}

# Reasons that the contract gives an HTTP status of their own, whichever gRPC status carries them.
_STATUS_BY_REASON: Final = {"IDEMPOTENCY_KEY_REUSED": 422, "ANSWER_TOO_LARGE": 502}

# Fields of the gRPC requests by the names that REST callers know them by; others are the same in both.
_REST_FIELDS: Final = {
    "input": "content",
    "metadata_json": "metadata",
    "server": "serverId",
    "server.id": "serverId",
    "run_id": "runId",
    "page_size": "limit",
    "page_token": "pageToken",
    "after_sequence": "after",
    "wait_ms": "wait",
    "stream.wait_ms": "wait",
    "idempotency_key": "Idempotency-Key",
    "request_id": "Idempotency-Key",
}

_CODES_BY_NUMBER: Final = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc_error(error: grpc.aio.AioRpcError) -> ApiError:
    """What to tell the REST caller about a call that ended with `error`."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                status = status_pb2.Status()
            break
    # The call's own code decides: it is what gRPC acted on.
    return _from_parts(error.code(), status)


def from_status(status: status_pb2.Status) -> ApiError:
    """What to tell the REST caller about one command of a session that ended with `status`."""
    return _from_parts(_CODES_BY_NUMBER.get(status.code, grpc.StatusCode.UNKNOWN), status)


def from_code(code: grpc.StatusCode) -> ApiError:
    """What to tell the REST caller about a call that ended with `code`, and nothing more is known."""
    return _from_parts(code, status_pb2.Status())


def _from_parts(code: grpc.StatusCode, status: status_pb2.Status) -> ApiError:
    row = _TABLE.get(code, _TABLE[grpc.StatusCode.UNKNOWN])
    infos = _unpack(status, error_details_pb2.ErrorInfo)
    reason = infos[0].reason if len(infos) == 1 else ""
    if not reason:
        row = _FROM_BETWEEN.get(code, row)
        return ApiError(row.status, row.code, row.message, headers=_retry_headers(row.status, status))
    if row.ours:
        return ApiError(row.status, row.code if row.hides_reason else reason, row.message)

    details = [
        {"field": _REST_FIELDS.get(violation.field, violation.field), "message": violation.description}
        for bad_request in _unpack(status, error_details_pb2.BadRequest)
        for violation in bad_request.field_violations
    ]
    # The runtime's own message speaks of the gRPC names of fields, so it is said again with ours.
    message = "; ".join(f"{detail['field']} {detail['message']}" for detail in details) or status.message
    http_status = _STATUS_BY_REASON.get(reason, row.status)
    return ApiError(
        http_status,
        reason,
        message or row.message,
        details=details or None,
        headers=_retry_headers(http_status, status),
    )


def _retry_headers(http_status: int, status: status_pb2.Status) -> dict[str, str]:
    """Retry-After in whole seconds: what the runtime asks for, rounded up; always one on 429 and 503."""
    for info in _unpack(status, error_details_pb2.RetryInfo):
        delay = info.retry_delay
        return {"Retry-After": str(max(1, delay.seconds + (delay.nanos > 0)))}
    return {"Retry-After": str(_DEFAULT_RETRY_AFTER_SECONDS)} if http_status in (429, 503) else {}


def _unpack(status: status_pb2.Status, kind: type[_MessageType]) -> list[_MessageType]:
    """The details of one kind; those that cannot be read are as good as absent."""
    found = []
    for detail in status.details:
        message = kind()
        try:
            if detail.Unpack(message):
                found.append(message)
        except DecodeError:
            continue
    return found
