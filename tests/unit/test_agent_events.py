"""What an agent says, as events."""

from typing import Any

import pytest

from runtime_service.agent_events import MAX_EVENT_BYTES, event_from, size_of, storable
from runtime_service.agents import AgentError, Log, Message, ToolCall, ToolResult
from runtime_service.runs import EventDraft, EventRole, LogLevel, now_ms

LOG = EventRole.EXECUTION_LOG
DEEP: dict[str, Any] = {}
DEEP["deep"] = DEEP

EVENTS: list[tuple[Message | Log | ToolCall | ToolResult, tuple[object, ...]]] = [
    (Message("a"), (EventRole.ASSISTANT, "a", None, None, None)),
    (Message("", {"tokens": 2}), (EventRole.ASSISTANT, "", None, None, b'{"tokens":2}')),
    (Message("a", {}, "system"), (EventRole.SYSTEM, "a", None, None, b"{}")),  # type: ignore[arg-type]
    (Log("a"), (LOG, "a", None, LogLevel.INFO, None)),
    (Log("a", LogLevel.WARN, "t", {"n": 1}), (LOG, "a", "t", LogLevel.WARN, b'{"n":1}')),
    (Log("a", "error"), (LOG, "a", None, LogLevel.ERROR, None)),  # type: ignore[arg-type]
    (ToolCall("t"), (LOG, "t", "tool_call", LogLevel.INFO, b'{"name":"t","arguments":{}}')),
    (
        ToolCall("t\0", {"n": 1}, "id"),
        (LOG, "t\ufffd", "tool_call", LogLevel.INFO, '{"name":"t\ufffd","arguments":{"n":1},"id":"id"}'.encode()),
    ),
    (ToolResult("t", "a"), (LOG, "a", "tool_result", LogLevel.SUCCESS, b'{"name":"t"}')),
    (ToolResult("t", "a", "id", True), (LOG, "a", "tool_result", LogLevel.ERROR, b'{"name":"t","id":"id"}')),
]


@pytest.mark.parametrize(("output", "expected"), EVENTS)
def test_each_output_is_an_event(output: Message | Log | ToolCall | ToolResult, expected: tuple[object, ...]) -> None:
    """Of now; words of an enumeration may come as text."""
    before = now_ms()
    event = event_from(output)
    assert (event.role, event.content, event.log_type, event.log_level, event.metadata) == expected
    assert isinstance(event.role, EventRole)
    assert before <= event.created_at_ms <= now_ms()


@pytest.mark.parametrize("output", [Message("", role="nobody"), Log("", level="loud")])  # type: ignore[arg-type]
def test_unknown_word_is_refused_with_those_that_are_known(output: Message | Log) -> None:
    """The author of the agent reads what would have been right."""
    with pytest.raises(AgentError, match=r"where one of .+, .+ belongs") as caught:
        event_from(output)
    assert caught.value.code == "AGENT_OUTPUT_INVALID"


@pytest.mark.parametrize("metadata", [{"a": object()}, {"a": "\ud800"}, {1j: 1}, [1], 7, DEEP])
def test_metadata_that_is_no_json_object_is_refused(metadata: Any) -> None:
    """Whatever is wrong with it; of a tool's arguments, too."""
    outputs: list[Message | Log | ToolCall] = [Message("", metadata), Log("", metadata=metadata)]
    if isinstance(metadata, dict):
        outputs.append(ToolCall("t", metadata))
    for output in outputs:
        with pytest.raises(AgentError, match="metadata is no JSON object"):
            event_from(output)


@pytest.mark.parametrize(
    ("content", "metadata", "fits"),
    [
        ("", None, True),
        ("x" * MAX_EVENT_BYTES, None, True),
        ("x" * MAX_EVENT_BYTES, b"1", False),
        ("x", b"1" * MAX_EVENT_BYTES, False),
        ("é" * (MAX_EVENT_BYTES // 2), None, True),
        ("é" * (MAX_EVENT_BYTES // 2) + "x", None, False),
        ("\U0001f600" * (MAX_EVENT_BYTES // 4), None, True),
        ("\U0001f600" * (MAX_EVENT_BYTES // 4) + "x", None, False),
    ],
    ids=range(8),
)
def test_event_has_so_many_bytes_at_most(content: str, metadata: bytes | None, fits: bool) -> None:
    """Its text as UTF-8 and its metadata together."""
    event = EventDraft(EventRole.ASSISTANT, content, 1, metadata=metadata)
    if fits:
        assert size_of(event) <= MAX_EVENT_BYTES
    else:
        with pytest.raises(AgentError) as caught:
            size_of(event)
        assert caught.value.code == "EVENT_TOO_LARGE"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("plain", "plain"),
        ("a\0b", "a\ufffdb"),
        ("é\0", "é\ufffd"),
        ("\ud800", "\ufffd"),
        ("a\udc00b", "a\ufffdb"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\U0001f600é", "\U0001f600é"),
    ],
)
def test_storable_text_keeps_what_can_be_stored(text: str, expected: str) -> None:
    """Lone surrogates and NUL become U+FFFD; a pair that is whole is the one character that it stands for."""
    assert storable(text) == expected
