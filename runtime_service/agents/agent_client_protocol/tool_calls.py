"""A tool call of the agent: what is known of it so far, of limited size, and the log entry that it becomes."""

from collections.abc import Callable
from difflib import unified_diff
from itertools import takewhile
from typing import Any

import msgspec
from acp.schema import (
    ContentToolCallContent,
    FileEditToolCallContent,
    TerminalToolCallContent,
    ToolCallProgress,
    ToolCallStart,
    ToolCallUpdate,
)

from runtime_service.agents.agent_client_protocol.content import cut, cut_json, description_of, text_of
from runtime_service.agents.base import Log
from runtime_service.runs import LogLevel

_MAX_TITLE_CHARACTERS = 1_000
_MAX_TEXT_CHARACTERS = 16_384
_MAX_DIFF_CHARACTERS = 16_384
_MAX_ITEMS = 8
_MAX_LOCATIONS = 50
_MAX_COMPARED_LINES = 2_000
_MAX_METADATA_BYTES = 1 << 19
_MAX_PART_BYTES = 1 << 15
_CONTEXT_LINES = 3

TerminalOutput = Callable[[str], str | None]
"""Returns the output of a terminal by its id, None where there is no such terminal."""

FINAL = ("completed", "failed")


class ToolCall:
    """One tool call, by its id; `status` is the protocol's word."""

    __slots__ = ("_metadata", "_terminals", "status", "title")

    def __init__(self, tool_call_id: str) -> None:
        self.title = "tool"
        self.status = "pending"
        self._metadata: dict[str, Any] = {"toolCallId": cut(tool_call_id, _MAX_TITLE_CHARACTERS)}
        self._terminals: list[str] = []

    def learn(self, update: ToolCallStart | ToolCallProgress | ToolCallUpdate) -> None:
        """Take what an update says; what it leaves out stays as it was."""
        if update.title:
            self.title = cut(update.title, _MAX_TITLE_CHARACTERS)
        if update.status is not None:
            self.status = update.status
        if update.kind is not None:
            self._metadata["kind"] = update.kind
        if update.locations is not None:
            self._metadata["locations"] = [
                {"path": cut(each.path, _MAX_TITLE_CHARACTERS)} | ({} if each.line is None else {"line": each.line})
                for each in update.locations[:_MAX_LOCATIONS]
            ]
        if update.raw_input is not None:
            self._metadata["rawInput"] = cut_json(update.raw_input)
        if update.raw_output is not None:
            self._metadata["rawOutput"] = cut_json(update.raw_output)
        if update.content is not None:
            self._learn_content(update.content)

    @property
    def kind(self) -> str | None:
        """The protocol's word for what the tool does."""
        return self._metadata.get("kind")

    def metadata(self, terminal_output: TerminalOutput) -> dict[str, Any]:
        """Return all that is known of the call."""
        found = self._metadata | {"title": self.title, "status": self.status}
        outputs = [(each, terminal_output(each)) for each in self._terminals]
        if terminals := [
            {"terminalId": terminal_id, "output": output} for terminal_id, output in outputs if output is not None
        ]:
            found["terminals"] = terminals
        # Each part is short in characters; in bytes all of them together may be more than an event has room for.
        if len(msgspec.json.encode(found)) > _MAX_METADATA_BYTES:
            found = {key: cut_json(value, _MAX_PART_BYTES) for key, value in found.items()}
        return found

    def log(self, terminal_output: TerminalOutput) -> Log:
        """Return the log entry; a call that has not ended is a warning."""
        level = {"completed": LogLevel.SUCCESS, "failed": LogLevel.ERROR}.get(self.status, LogLevel.WARNING)
        return Log(self.title, level, "tool_call", self.metadata(terminal_output))

    def _learn_content(
        self, content: list[ContentToolCallContent | FileEditToolCallContent | TerminalToolCallContent]
    ) -> None:
        texts: list[str] = []
        blocks: list[dict[str, Any]] = []
        diffs: list[dict[str, Any]] = []
        self._terminals = []
        for each in content:
            match each:
                case ContentToolCallContent():
                    texts.append(text_of(each.content))
                    if (described := description_of(each.content)) is not None and len(blocks) < _MAX_ITEMS:
                        blocks.append(described)
                case FileEditToolCallContent() if len(diffs) < _MAX_ITEMS:
                    diffs.append(_diff(each))
                case TerminalToolCallContent() if len(self._terminals) < _MAX_ITEMS:
                    self._terminals.append(cut(each.terminal_id, _MAX_TITLE_CHARACTERS))
        found = {"content": cut("\n".join(texts), _MAX_TEXT_CHARACTERS), "blocks": blocks, "diffs": diffs}
        for key, value in found.items():
            if value:
                self._metadata[key] = value
            else:
                self._metadata.pop(key, None)
        edits = sum(isinstance(each, FileEditToolCallContent) for each in content)
        if edits > len(diffs):
            self._metadata["diffsLeftOut"] = edits - len(diffs)


def _diff(edit: FileEditToolCallContent) -> dict[str, Any]:
    path = cut(edit.path, _MAX_TITLE_CHARACTERS)
    old, new = (edit.old_text or "").splitlines(), edit.new_text.splitlines()
    before = "/dev/null" if edit.old_text is None else path
    if len(old) + len(new) <= _MAX_COMPARED_LINES:
        lines = list(unified_diff(old, new, before, path, n=_CONTEXT_LINES, lineterm=""))
    else:
        lines = _one_hunk(old, new, before, path)
    return {"path": path, "new": edit.old_text is None, "diff": cut("\n".join(lines), _MAX_DIFF_CHARACTERS)}


def _one_hunk(old: list[str], new: list[str], before: str, after: str) -> list[str]:
    """Return a unified diff of one hunk, found in linear time: comparing long texts well takes seconds."""
    same_first = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False)))
    shorter = min(len(old), len(new)) - same_first
    backwards = zip(reversed(old), reversed(new), strict=False)
    same_last = min(shorter, sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards)))
    begin = max(0, same_first - _CONTEXT_LINES)
    old_end, new_end = len(old) - same_last, len(new) - same_last
    behind = old[old_end : old_end + _CONTEXT_LINES]
    counts = f"-{begin + 1},{old_end + len(behind) - begin} +{begin + 1},{new_end + len(behind) - begin}"
    return [
        f"--- {before}",
        f"+++ {after}",
        f"@@ {counts} @@",
        *(f" {line}" for line in old[begin:same_first]),
        *(f"-{line}" for line in old[same_first:old_end]),
        *(f"+{line}" for line in new[same_first:new_end]),
        *(f" {line}" for line in behind),
    ]
