"""Session updates of the protocol as outputs of an agent. Knows no process, no connection and no turn.

Message chunks are deltas, and a message where they end: at a thought, a tool call, another message id or the end of
the turn. A thought becomes one `reasoning` entry, a tool call one `tool_call` entry when it has ended, a plan a `plan`
entry when the agent turns to something else and it differs from the last one. A mode that changes is a `mode` entry,
settings that change a `configuration` entry, a new title of the session a `session_title` entry. What the caller has
said comes back as user message chunks and is left out; so are the commands that the agent offers.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias, assert_never, get_args

from acp.schema import (
    AgentMessageChunk,
    AgentPlanContentUpdate,
    AgentPlanRemovedUpdate,
    AgentPlanUpdate,
    AgentThoughtChunk,
    AvailableCommandsUpdate,
    ConfigOptionUpdate,
    CurrentModeUpdate,
    PlanEntry,
    PlanUpdateFile,
    PlanUpdateItems,
    PlanUpdateMarkdown,
    SessionInfoUpdate,
    SessionNotification,
    ToolCallProgress,
    ToolCallStart,
    Usage,
    UsageUpdate,
    UserMessageChunk,
)

from runtime_service.agents.agent_client_protocol.content import cut, cut_json, description_of, text_of
from runtime_service.agents.agent_client_protocol.tool_calls import FINAL, TerminalOutput, ToolCall
from runtime_service.agents.base import Delta, Log, Message

SessionUpdate: TypeAlias = (
    UserMessageChunk
    | AgentMessageChunk
    | AgentThoughtChunk
    | ToolCallStart
    | ToolCallProgress
    | AgentPlanUpdate
    | AgentPlanContentUpdate
    | AgentPlanRemovedUpdate
    | AvailableCommandsUpdate
    | CurrentModeUpdate
    | ConfigOptionUpdate
    | SessionInfoUpdate
    | UsageUpdate
)

Said: TypeAlias = Message | Delta | Log

UPDATES: dict[str, type[SessionUpdate]] = {
    get_args(kind.model_fields["session_update"].annotation)[0]: kind
    for kind in get_args(SessionNotification.model_fields["update"].annotation)
}
"""Each kind of update by the word that names it."""

MAX_TEXT_CHARACTERS = 200_000
"""A message or thought that is longer becomes several: an event has room for a MiB."""
_MAX_BLOCKS = 50
_MAX_BLOCKS_BYTES = 1 << 16
_MAX_OPEN_TOOL_CALLS = 64
_MAX_ENDED_TOOL_CALLS = 1_024
_MAX_PLANS = 16
_MAX_PLAN_ENTRIES = 100
_MAX_PLAN_CHARACTERS = 16_384
_MAX_ENTRY_CHARACTERS = 500
_MARKS = {"completed": "[x]", "in_progress": "[>]", "pending": "[ ]"}


class Transcript:
    """What the updates of one turn say, in order and of limited size."""

    def __init__(self, terminal_output: TerminalOutput) -> None:
        self._terminal_output = terminal_output
        self._chunk: type[AgentMessageChunk | AgentThoughtChunk] | None = None  # of the text that is open
        self._message_id: str | None = None
        self._texts: list[str] = []
        self._characters = 0
        self._blocks: list[dict[str, Any]] = []
        self._tool_calls: OrderedDict[str, ToolCall] = OrderedDict()
        self._ended_tool_calls: OrderedDict[str, None] = OrderedDict()
        self._plans: dict[str, Log] = {}
        self._said_plans: dict[str, Log] = {}
        self._context: dict[str, Any] | None = None
        self._said_changes: dict[str, Mapping[str, Any]] = {}

    @property
    def has_open_tool_call(self) -> bool:
        """Whether a tool may be at work."""
        return bool(self._tool_calls)

    def tool_call(self, tool_call_id: str) -> ToolCall | None:
        """Return an open tool call."""
        return self._tool_calls.get(tool_call_id)

    def add(self, update: SessionUpdate) -> list[Said]:
        """Return what an update means, beside what it leaves to be said later."""
        match update:
            case AgentMessageChunk() | AgentThoughtChunk():
                return self._add_chunk(update)
            case ToolCallStart() | ToolCallProgress():
                return self._add_tool_call(update)
            case AgentPlanUpdate():
                return self._add_plan("", _plan_of_entries(update.entries))
            case AgentPlanContentUpdate():
                plan = update.plan
                match plan:
                    case PlanUpdateItems():
                        entry = _plan_of_entries(plan.entries, plan.plan_id)
                    case PlanUpdateFile():
                        entry = _plan(f"The plan is in {plan.uri}", {"planId": plan.plan_id, "uri": plan.uri})
                    case PlanUpdateMarkdown():
                        entry = _plan(plan.content, {"planId": plan.plan_id})
                return self._add_plan(plan.plan_id, entry)
            case AgentPlanRemovedUpdate():
                metadata = {"planId": update.plan_id, "removed": True}
                return self._add_plan(update.plan_id, _plan("The plan was removed.", metadata))
            case CurrentModeUpdate():
                mode = cut(update.current_mode_id, _MAX_ENTRY_CHARACTERS)
                return self._change("mode", f"The mode is now {mode!r}.", {"currentModeId": mode})
            case ConfigOptionUpdate():
                return self._change("configuration", *_configuration(update))
            case SessionInfoUpdate():
                title = cut(update.title or "", _MAX_ENTRY_CHARACTERS)
                return self._change("session_title", title, {"title": title}) if title else []
            case UsageUpdate():
                self._context = {"used": update.used, "size": update.size}
                if update.cost is not None:
                    self._context["cost"] = {"amount": update.cost.amount, "currency": update.cost.currency[:16]}
                return []
            case UserMessageChunk() | AvailableCommandsUpdate():
                return []
        assert_never(update)

    def pause(self) -> list[Said]:
        """Return what is left to be said before a question: the end of the open text, and plans that changed."""
        return [*self._end_text(), *self._changed_plans()]

    def end(self, stop_reason: str | None = None, usage: Usage | None = None) -> list[Said]:
        """Return what is left to be said at the end of the turn; the last message carries usage and stop reason."""
        calls = self._open_tool_calls()
        metadata: dict[str, Any] = {} if stop_reason is None else {"stopReason": stop_reason}
        if usage is not None:
            metadata["usage"] = usage.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"field_meta"})
        if self._context is not None:
            metadata["context"] = self._context
        is_message = self._chunk is AgentMessageChunk
        outputs: list[Said] = [*calls, *self._changed_plans(), *self._end_text(metadata if is_message else None)]
        if not any(isinstance(each, Message) for each in outputs) and ("usage" in metadata or "context" in metadata):
            outputs.append(Log("The agent's usage of this turn.", type="usage", metadata=metadata))
        return outputs

    def break_off(self) -> list[Said]:
        """Return what is left to be said when the agent is gone. An open message has no end: it is incomplete."""
        thought = self._end_text() if self._chunk is AgentThoughtChunk else []
        return [*thought, *self._open_tool_calls(), *self._changed_plans()]

    # Texts

    def _add_chunk(self, update: AgentMessageChunk | AgentThoughtChunk) -> list[Said]:
        outputs: list[Said] = []
        is_other = update.message_id is not None and self._message_id not in (None, update.message_id)
        if self._chunk is not type(update) or is_other:
            outputs += self.pause()
            self._chunk = type(update)
        self._message_id = update.message_id or self._message_id
        if (described := description_of(update.content)) is not None and len(self._blocks) < _MAX_BLOCKS:
            self._blocks.append(described)
        text = text_of(update.content)
        while text:
            piece, text = text[: MAX_TEXT_CHARACTERS - self._characters], text[MAX_TEXT_CHARACTERS - self._characters :]
            self._texts.append(piece)
            self._characters += len(piece)
            if self._chunk is AgentMessageChunk:
                outputs.append(Delta(piece))
            if self._characters == MAX_TEXT_CHARACTERS:
                chunk, message_id = self._chunk, self._message_id
                outputs += self._end_text({"continues": True})
                self._chunk, self._message_id = chunk, message_id
        return outputs

    def _end_text(self, more: dict[str, Any] | None = None) -> list[Said]:
        text, chunk, blocks = "".join(self._texts), self._chunk, self._blocks
        self._chunk = self._message_id = None
        self._texts, self._blocks, self._characters = [], [], 0
        if not text:
            return []
        metadata = ({"blocks": cut_json(blocks, _MAX_BLOCKS_BYTES)} if blocks else {}) | (more or {})
        if chunk is AgentMessageChunk:
            return [Message(text, metadata or None)]
        return [Log(text, type="reasoning", metadata=metadata or None)]

    # Tool calls

    def _add_tool_call(self, update: ToolCallStart | ToolCallProgress) -> list[Said]:
        outputs: list[Said] = []
        call_id = update.tool_call_id
        if call_id in self._ended_tool_calls:
            return []
        call = self._tool_calls.get(call_id)
        if call is None:
            outputs += self.pause()
            if len(self._tool_calls) == _MAX_OPEN_TOOL_CALLS:
                _, oldest = self._tool_calls.popitem(last=False)
                outputs.append(oldest.log(self._terminal_output))
            call = self._tool_calls[call_id] = ToolCall(call_id)
        call.learn(update)
        if call.status in FINAL:
            del self._tool_calls[call_id]
            self._ended_tool_calls[call_id] = None
            if len(self._ended_tool_calls) > _MAX_ENDED_TOOL_CALLS:
                self._ended_tool_calls.popitem(last=False)
            outputs.append(call.log(self._terminal_output))
        return outputs

    def _open_tool_calls(self) -> list[Said]:
        calls, self._tool_calls = self._tool_calls, OrderedDict()
        return [call.log(self._terminal_output) for call in calls.values()]

    # Plans and settings

    def _add_plan(self, plan_id: str, plan: Log) -> list[Said]:
        if plan_id not in self._plans and len(self._plans) == _MAX_PLANS:
            return []
        self._plans[plan_id] = plan
        return []

    def _changed_plans(self) -> list[Said]:
        changed: list[Said] = []
        for plan_id, plan in self._plans.items():
            if self._said_plans.get(plan_id) != plan:
                self._said_plans[plan_id] = plan
                changed.append(plan)
        return changed

    def _change(self, log_type: str, text: str, metadata: Mapping[str, Any]) -> list[Said]:
        if self._said_changes.get(log_type) == metadata:
            return []
        self._said_changes[log_type] = metadata
        return [Log(text, type=log_type, metadata=metadata)]


def merged(outputs: list[Said]) -> tuple[Said, ...]:
    """Return the outputs with deltas that follow each other as one."""
    found: list[Said] = []
    texts: list[str] = []
    for output in outputs:
        if isinstance(output, Delta):
            texts.append(output.text)
            continue
        if texts:
            found.append(Delta("".join(texts)))
            texts = []
        found.append(output)
    if texts:
        found.append(Delta("".join(texts)))
    return tuple(found)


def _plan_of_entries(entries: list[PlanEntry], plan_id: str | None = None) -> Log:
    shown = [
        {"content": cut(entry.content, _MAX_ENTRY_CHARACTERS), "priority": entry.priority, "status": entry.status}
        for entry in entries[:_MAX_PLAN_ENTRIES]
    ]
    text = "\n".join(f"{_MARKS[entry['status']]} {entry['content']}" for entry in shown)
    metadata: dict[str, Any] = {"entries": shown}
    if len(entries) > len(shown):
        metadata["entriesLeftOut"] = len(entries) - len(shown)
    return _plan(text, metadata if plan_id is None else {"planId": plan_id, **metadata})


def _plan(text: str, metadata: dict[str, Any]) -> Log:
    for key in ("planId", "uri"):
        if key in metadata:
            metadata[key] = cut(metadata[key], _MAX_ENTRY_CHARACTERS)
    return Log(cut(text, _MAX_PLAN_CHARACTERS), type="plan", metadata=metadata)


def _configuration(update: ConfigOptionUpdate) -> tuple[str, dict[str, Any]]:
    values: dict[str, Any] = {}
    for option in update.config_options[:_MAX_BLOCKS]:
        value = option.current_value
        name = cut(option.id, _MAX_ENTRY_CHARACTERS)
        values[name] = cut(value, _MAX_ENTRY_CHARACTERS) if isinstance(value, str) else value
    text = ", ".join(f"{name} = {value}" for name, value in values.items())
    return (f"The agent's settings are now {text}." if text else "The agent has no settings."), values
