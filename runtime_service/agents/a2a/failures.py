"""What the A2A library and its HTTP client raise, as an `AgentError` that says which failure and what to do.

Neither promises what it raises about an answer that is none: whatever is not known here is a protocol error.
"""

from collections.abc import Iterator

import httpx
from a2a.client import AgentCardResolutionError
from a2a.utils.errors import (
    A2AError,
    ContentTypeNotSupportedError,
    ExtensionSupportRequiredError,
    InternalError,
    InvalidParamsError,
    InvalidRequestError,
    TaskNotFoundError,
    UnsupportedOperationError,
)

from runtime_service.agents.a2a.options import A2AOptions
from runtime_service.agents.base import AgentError

_REFUSALS = (
    ContentTypeNotSupportedError,
    ExtensionSupportRequiredError,
    InvalidParamsError,
    InvalidRequestError,
    UnsupportedOperationError,
)


class StreamCut(AgentError):
    """The agent broke off in the middle; its task may go on."""


class Away(AgentError):
    """The agent, or what stands before it, cannot answer now; its task may go on."""


class TaskUnknown(AgentError):
    """The agent knows no such task (any more)."""


class TooLarge(httpx.RequestError):
    """The agent sent more at once than is taken."""


def failure_of(error: Exception, options: A2AOptions, *, seconds: float, begun: bool) -> AgentError:
    """Translate; the agent had `seconds`, and `begun` says that it had answered already."""
    agent = f"The agent at {options.host}"
    causes = list(_causes(error))
    if any(isinstance(cause, TooLarge) for cause in causes):
        return AgentError(
            f"{agent} sent more at once than is taken: {options.quoted(str(causes[-1]))}.", "AGENT_PROTOCOL_ERROR"
        )
    if isinstance(error, TaskNotFoundError):
        return TaskUnknown(f"{agent} does not know the task any more. Begin again.", "AGENT_TASK_UNKNOWN")
    if isinstance(error, _REFUSALS):
        message = f"{agent} does not take the request: {options.quoted(error.message)}."
        return AgentError(message, "AGENT_REQUEST_INVALID")
    for cause in causes:
        if isinstance(cause, httpx.HTTPStatusError):
            return _of_status(cause.response.status_code, agent, options, isinstance(error, AgentCardResolutionError))
        if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout) and not begun:
            return AgentError(f"{agent} cannot be reached. Check that it runs, and url.", "AGENT_UNREACHABLE")
        if isinstance(cause, httpx.NetworkError | httpx.ProtocolError | httpx.ConnectTimeout):
            return cut(options) if begun else _gone(agent)
        if isinstance(cause, httpx.TimeoutException | TimeoutError):
            return silent(options, seconds)
    if isinstance(error, InternalError) or (isinstance(error, A2AError) and error.message.startswith("JSON-RPC Error")):
        return AgentError(f"{agent} failed: {options.quoted(error.message)}. Try again later.", "AGENT_ERROR")
    if isinstance(error, AgentCardResolutionError):
        message = (
            f"What the agent at {options.host} has at {options.card_path} is no agent card. Check url and card_path."
        )
        return AgentError(message, "AGENT_CARD_INVALID")
    return AgentError(f"What the agent at {options.host} sent is not of the A2A protocol.", "AGENT_PROTOCOL_ERROR")


def silent(options: A2AOptions, seconds: float) -> AgentError:
    """Return the failure of an agent that says nothing."""
    setting = " (timeout_seconds)" if seconds == options.timeout_seconds else ""
    message = f"The agent at {options.host} was silent for {seconds:g} s{setting}. Try again."
    return AgentError(message, "AGENT_SILENT")


def cut(options: A2AOptions) -> StreamCut:
    """Return the failure of a stream that ended before its task did."""
    message = f"The answer of the agent at {options.host} broke off in the middle. Try again."
    return StreamCut(message, "AGENT_STREAM_CUT")


def _of_status(status: int, agent: str, options: A2AOptions, of_card: bool) -> AgentError:
    said = f"(HTTP {status})"
    match status:
        case 401 | 403:
            message = f"{agent} refuses the credentials {said}. Check api_key_env and headers_env."
            return AgentError(message, "AGENT_AUTHENTICATION_FAILED")
        case 404 if of_card:
            message = f"{agent} has no agent card at {options.card_path} {said}. Check url and card_path."
            return AgentError(message, "AGENT_CARD_MISSING")
        case 404:
            message = f"{agent} is not where its card says {said}. Check the address in its card."
            return AgentError(message, "AGENT_NOT_FOUND")
        case 429:
            return Away(f"{agent} is asked too often {said}. Try again later.", "AGENT_RATE_LIMITED")
        case 502 | 503 | 504:
            return Away(f"{agent} failed {said}. Try again later.", "AGENT_ERROR")
        case _ if status < 500:
            message = f"{agent} does not take the request {said}. Check url and the address in its card."
            return AgentError(message, "AGENT_REQUEST_INVALID")
    return AgentError(f"{agent} failed {said}. Try again later.", "AGENT_ERROR")


def _gone(agent: str) -> AgentError:
    return AgentError(f"{agent} closed the connection without an answer. Try again.", "AGENT_UNREACHABLE")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, the first cause last."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
