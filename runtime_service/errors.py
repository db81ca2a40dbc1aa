"""What can go wrong with a request, in the domain's own words; no gRPC in them.

`reason` is the one word that callers of both doors read (`code` in REST, `ErrorInfo.reason` in gRPC); the
message is for a person and may be shown to any caller.
"""

from typing import ClassVar

_NAME_CHARACTERS = 200


class RunServiceError(Exception):
    """Base of all refusals. `retry_after_seconds` is set where trying again may help."""

    reason: ClassVar[str]
    retry_after_seconds: float | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidRequest(RunServiceError):
    """A field does not hold what it must; `field` is its name in the gRPC request."""

    reason = "VALIDATION_FAILED"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field
        self.description = message


class ServerNotFound(RunServiceError):
    """No such server in the caller's organization."""

    reason = "SERVER_NOT_FOUND"


class RunNotFound(RunServiceError):
    """No such run of that server in the caller's organization."""

    reason = "RUN_NOT_FOUND"

    def __init__(self, run_id: str) -> None:
        super().__init__(f"There is no run {shown(run_id)} on this server.")


def shown(name: str) -> str:
    """Return a caller's name for something as a message may repeat it.

    In full length it could push the trailers of the call past gRPC's limit, and be answered by another error.
    """
    return repr(name if len(name) <= _NAME_CHARACTERS else name[:_NAME_CHARACTERS] + "…")


class RequestIdReused(RunServiceError):
    """The id of a request is that of one that asked for something else."""

    reason = "IDEMPOTENCY_KEY_REUSED"

    def __init__(self, request_id: str) -> None:
        super().__init__(f"The id {shown(request_id)} was used for another request; take a new one for each.")


class QuestionAnswered(RunServiceError):
    """An answer to a question that is not open any more."""

    reason = "QUESTION_ANSWERED"

    def __init__(self) -> None:
        super().__init__("The question was answered already, or its time is over; the first answer counts.")


class CapacityExceeded(RunServiceError):
    """The queue is full."""

    reason = "CAPACITY_EXCEEDED"

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class AnswerTooLarge(RunServiceError):
    """An answer is longer than a message may be."""

    reason = "ANSWER_TOO_LARGE"

    def __init__(self) -> None:
        super().__init__("The answer is too large for one message; ask for less at once.")


class SessionFull(RunServiceError):
    """A session has as many open calls as it may have."""

    reason = "SESSION_FULL"
    retry_after_seconds = 1.0

    def __init__(self, max_calls: int) -> None:
        super().__init__(f"{max_calls} calls are open already; try again in a moment.")


class AgentUnavailable(RunServiceError):
    """The server's agent cannot run here; the message says what to do."""

    reason = "AGENT_UNAVAILABLE"


class StoreUnavailable(RunServiceError):
    """The store cannot be used at the moment; the message says whether what was asked for may have taken effect."""

    reason = "STORE_UNAVAILABLE"
    retry_after_seconds = 5.0


class Draining(RunServiceError):
    """This runtime is stopping."""

    reason = "DRAINING"
    retry_after_seconds = 1.0

    def __init__(self) -> None:
        super().__init__("The runtime service is stopping; ask again in a moment.")


class Unauthenticated(RunServiceError):
    """The call does not carry the service token."""

    reason = "UNAUTHENTICATED"
