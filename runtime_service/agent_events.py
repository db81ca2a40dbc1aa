"""What an agent says, as events of a log: words checked, text made storable, sizes limited.

Raises AgentError for what cannot be an event.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar, assert_never

import msgspec

from runtime_service.agents import AgentError, Log, Message, ToolCall, ToolResult
from runtime_service.runs import EventDraft, EventRole, LogLevel, now_ms

MAX_EVENT_BYTES = 1 << 20

_Word = TypeVar("_Word", bound=StrEnum)


def event_from(output: Message | Log | ToolCall | ToolResult) -> EventDraft:
    """Return the event that an output becomes."""
    at = now_ms()
    if isinstance(output, Message):
        return EventDraft(
            _known(EventRole, output.role), storable(output.content), at, None, None, _json(output.metadata)
        )
    match output:
        case Log(content, level, log_type, metadata):
            log_type = None if log_type is None else storable(log_type)
            level = _known(LogLevel, level)
            return EventDraft(EventRole.EXECUTION_LOG, storable(content), at, log_type, level, _json(metadata))
        case ToolCall(name, arguments, call_id):
            name = storable(name)
            metadata = {"name": name, "arguments": arguments} | ({"id": call_id} if call_id else {})
            return EventDraft(EventRole.EXECUTION_LOG, name, at, "tool_call", LogLevel.INFO, _json(metadata))
        case ToolResult(name, content, call_id, failed):
            metadata = {"name": storable(name)} | ({"id": call_id} if call_id else {})
            level = LogLevel.ERROR if failed else LogLevel.SUCCESS
            return EventDraft(EventRole.EXECUTION_LOG, storable(content), at, "tool_result", level, _json(metadata))
    assert_never(output)


def size_of(event: EventDraft) -> int:
    """Return about how many bytes an event has. Raises `too_large` when it has too many."""
    size = len(event.content) + len(event.metadata or b"")
    # A code point has four bytes at most: the rest need not be counted.
    if size > MAX_EVENT_BYTES // 4 and utf8_bytes(event.content) + len(event.metadata or b"") > MAX_EVENT_BYTES:
        raise too_large()
    return size


def too_large() -> AgentError:
    """Return the refusal of an event, or of a message in the making, that has too many bytes."""
    return AgentError(
        f"The agent made an event of more than {MAX_EVENT_BYTES} bytes; say it in pieces.", "EVENT_TOO_LARGE"
    )


def storable(text: str) -> str:
    """Return the text with what UTF-8 or a database cannot hold (lone surrogates, NUL) as U+FFFD."""
    if text.isascii():
        return text.replace("\0", "\ufffd") if "\0" in text else text
    return text.replace("\0", "\ufffd").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def utf8_bytes(text: str) -> int:
    """Count the bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())


def _known(kind: type[_Word], word: str) -> _Word:
    """Return the enumeration's member; an agent may give it as text."""
    if isinstance(word, kind):
        return word
    try:
        return kind(word)
    except ValueError:
        words = ", ".join(member.value for member in kind)
        raise AgentError(f"The agent gave {word!r} where one of {words} belongs.", "AGENT_OUTPUT_INVALID") from None


def _json(metadata: Mapping[str, Any] | None) -> bytes | None:
    if metadata is None:
        return None
    try:
        return msgspec.json.encode(dict(metadata))
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise AgentError(f"The agent made an event whose metadata is no JSON object: {error}.") from error
