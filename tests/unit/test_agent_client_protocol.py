"""The `agent_client_protocol` agent without a process: what its options may say, and updates as outputs."""

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from acp.schema import SessionNotification, ToolCallStart, Usage

from runtime_service.agent_events import event_from, size_of
from runtime_service.agents import AgentOutput, Delta, HistoryMessage, Log, Message
from runtime_service.agents.agent_client_protocol.agent import history_text
from runtime_service.agents.agent_client_protocol.content import MAX_JSON_BYTES
from runtime_service.agents.agent_client_protocol.directory import Refused, WorkingDirectory
from runtime_service.agents.agent_client_protocol.inbox import Inbox
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions
from runtime_service.agents.agent_client_protocol.tool_calls import ToolCall
from runtime_service.agents.agent_client_protocol.updates import MAX_TEXT_CHARACTERS, UPDATES, Said, Transcript, merged
from runtime_service.runs import EventRole, LogLevel
from tests.support import run_async

MIB = 1 << 20


def options_of(**options: Any) -> AgentClientProtocolOptions:
    """Options as servers.toml gives them."""
    return msgspec.convert({"command": "agent", **options}, AgentClientProtocolOptions)


def text(text: str) -> dict[str, Any]:
    """A text block."""
    return {"type": "text", "text": text}


def chunk(content: str | dict[str, Any], kind: str = "agent_message_chunk", **more: Any) -> dict[str, Any]:
    """A chunk of a message or thought."""
    return {"sessionUpdate": kind, "content": text(content) if isinstance(content, str) else content, **more}


def call(call_id: str = "1", *, new: bool = False, **more: Any) -> dict[str, Any]:
    """A tool call, or an update of one."""
    return {"sessionUpdate": "tool_call" if new else "tool_call_update", "toolCallId": call_id, **more}


def plan(*statuses: str) -> dict[str, Any]:
    """A plan with an entry for each status."""
    entries = [{"content": f"step {n}", "priority": "high", "status": status} for n, status in enumerate(statuses, 1)]
    return {"sessionUpdate": "plan", "entries": entries}


def outputs_of(*updates: dict[str, Any], usage: Usage | None = None) -> list[AgentOutput]:
    """What a turn with these updates says, deltas left out."""
    transcript = Transcript({"term": "the output"}.get)
    said: list[AgentOutput] = []
    for update in updates:
        kind = UPDATES[update["sessionUpdate"]]
        # As the SDK would read the whole notification.
        assert isinstance(SessionNotification.model_validate({"sessionId": "s", "update": update}).update, kind)
        said += transcript.add(kind.model_validate(update))
    said += transcript.end(usage=usage)
    return [output for output in said if not isinstance(output, Delta)]


def only(outputs: list[AgentOutput]) -> Any:
    """The one output that there is."""
    (output,) = outputs
    return output


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"working_directory": "work/{user}"}, "working_directory names {user}; it may name {run_id}"),
        ({"working_directory": "work/{}"}, "working_directory names {}"),
        ({"working_directory": "work/{run_id!r}"}, "takes no format"),
        ({"working_directory": "work/{run_id"}, "expected '}'"),
        ({"working_directory": "work", "remove_working_directory": True}, "needs {run_id}"),
        ({"mcp_servers": [{"name": "a"}]}, "'a' of type 'stdio' needs `command`"),
        ({"mcp_servers": [{"name": "a", "type": "http", "command": "x"}]}, "of type 'http' needs `url`"),
        ({"mcp_servers": [{"name": "a", "type": "acp", "command": "x"}]}, "Invalid enum value"),
        ({"mcp_servers": [{"name": "a", "command": "x"}] * 2}, "the same name"),
        ({"env": {"A=B": "c"}}, "regex"),
        ({"idle_seconds": 0}, "idle_seconds"),
        ({"files": "everywhere"}, "Invalid enum value"),
        ({"comand": "x"}, "unknown field"),
    ],
)
def test_options_say_what_is_wrong(options: dict[str, Any], words: str) -> None:
    """Whoever writes servers.toml reads it when the service starts."""
    with pytest.raises(msgspec.ValidationError) as raised:
        options_of(**options)
    assert words in str(raised.value)


def test_options_take_mcp_servers_in_the_protocols_shape() -> None:
    """As they are written for other clients."""
    servers = [
        {"name": "files", "command": "mcp-files", "args": ["."], "env": [{"name": "A", "value": "b"}]},
        {"name": "web", "type": "http", "url": "https://example.org", "headers": [{"name": "X", "value": "y"}]},
        {"name": "old", "type": "sse", "url": "http://127.0.0.1:1"},
    ]
    assert [server.name for server in options_of(mcp_servers=servers).mcp_servers] == ["files", "web", "old"]


def test_options_environment_has_no_secret_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is named goes along, beside the likes of PATH."""
    for name in ("SECRET_OF_THE_SERVICE", "NAMED", "HOME"):
        monkeypatch.setenv(name, f"value of {name}")
    monkeypatch.delenv("NOT_SET", raising=False)
    environment = options_of(inherit_env=["NAMED", "NOT_SET"], env={"OWN": "1"}).environment()
    assert "SECRET_OF_THE_SERVICE" not in environment
    assert "NOT_SET" not in environment
    assert {"NAMED": "value of NAMED", "OWN": "1", "HOME": "value of HOME"}.items() <= environment.items()


def test_options_redact_the_secrets_that_they_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an agent writes to its stderr goes into an error that callers read."""
    monkeypatch.setenv("NAMED", "inherited-secret")
    header = {"name": "Authorization", "value": "Bearer of-mcp"}
    servers = [{"name": "web", "type": "http", "url": "https://example.org", "headers": [header]}]
    options = options_of(env={"OWN": "own-secret", "N": "1"}, inherit_env=["NAMED"], mcp_servers=servers)
    said = options.redacted("own-secret inherited-secret Bearer of-mcp 1")
    assert said == "[OWN] [NAMED] [Authorization] 1"


def test_options_make_one_directory_of_each_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever an id holds, it is one folder's name, and no other id's."""
    monkeypatch.chdir(tmp_path)
    options = options_of(working_directory="work/{server_id}/{run_id}")

    def directory_of(run_id: str, server_id: str = "s") -> Path:
        return options.directory_of(run_id=run_id, server_id=server_id, thread_id="t")

    ids = ["run_1", "..", ".", "", "a/b", "a_b", "a%2Fb", "x" * 5_000, "x" * 5_001, "ä"]
    found = [directory_of(run_id) for run_id in ids]
    assert found[0] == tmp_path / "work" / "s" / "run_1"
    assert len({str(path) for path in found}) == len(ids)
    assert all(path.parent == tmp_path / "work" / "s" for path in found)
    for path in found:
        path.mkdir(parents=True)
    assert directory_of("run_1", "../..").parent.parent == tmp_path / "work"
    assert options.common_directory() == tmp_path / "work"
    # An id of somebody else's choice at the beginning is no home either.
    options = options_of(working_directory="{server_id}/{run_id}")
    assert [directory_of("r", server_id).parent.parent for server_id in ("~", "~root", "~root/x")] == [tmp_path] * 3


# Updates


def test_update_of_every_kind_is_known() -> None:
    """Each has a test below; a new version of the SDK that has more of them fails here."""
    assert set(UPDATES) == {
        "user_message_chunk",
        "agent_message_chunk",
        "agent_thought_chunk",
        "tool_call",
        "tool_call_update",
        "plan",
        "plan_update",
        "plan_removed",
        "available_commands_update",
        "current_mode_update",
        "config_option_update",
        "session_info_update",
        "usage_update",
    }


def test_message_chunks_are_deltas_and_one_message() -> None:
    """Each piece is shown at once."""
    transcript = Transcript(lambda _: None)
    kind = UPDATES["agent_message_chunk"]
    assert transcript.add(kind.model_validate(chunk("Hel"))) == [Delta("Hel")]
    assert transcript.add(kind.model_validate(chunk("lo"))) == [Delta("lo")]
    assert transcript.end() == [Message("Hello")]


def test_messages_are_split_where_the_agent_turns_to_something_else() -> None:
    """By thoughts, tool calls and message ids, and in their order; usage and progress of a tool split nothing."""
    outputs = outputs_of(
        chunk("thinking ", "agent_thought_chunk"),
        chunk("hard", "agent_thought_chunk"),
        chunk("one"),
        call("a", new=True, title="A tool", status="pending"),
        chunk("tw"),
        call("a", status="in_progress"),
        {"sessionUpdate": "usage_update", "used": 1, "size": 2},
        chunk("o"),
        chunk("three", messageId="m1"),
        chunk(" and more", messageId="m1"),
        chunk("four", messageId="m2"),
        call("a", status="completed"),
    )
    shown = [(type(output).__name__, output.content) for output in outputs if isinstance(output, Log | Message)]
    assert shown == [
        ("Log", "thinking hard"),
        ("Message", "one"),
        ("Message", "twothree and more"),
        ("Log", "A tool"),
        ("Message", "four"),
    ]
    assert outputs[0] == Log("thinking hard", type="reasoning")


def test_messages_that_are_too_long_become_several() -> None:
    """None is larger than an event may be, and nothing is lost."""
    outputs = outputs_of(chunk("ä" * (2 * MAX_TEXT_CHARACTERS + 1)))
    messages = [output for output in outputs if isinstance(output, Message)]
    assert [len(message.content) for message in messages] == [MAX_TEXT_CHARACTERS, MAX_TEXT_CHARACTERS, 1]
    assert messages[0].metadata == {"continues": True}


def test_deltas_that_are_there_at_once_become_one() -> None:
    """A flood of chunks is few outputs."""
    log = Log("x")
    assert merged([Delta("a"), Delta("b"), log, Delta("c")]) == (Delta("ab"), log, Delta("c"))


def test_content_that_is_no_text_is_described() -> None:
    """A picture of a megabyte is a line in the message, and its kind and size in the metadata."""
    data = "A" * MIB
    outputs = outputs_of(
        chunk({"type": "image", "data": data, "mimeType": "image/png"}),
        chunk({"type": "audio", "data": "AAA=", "mimeType": "audio/wav"}),
        chunk({"type": "resource_link", "uri": "file:///a.txt", "name": "a.txt"}),
        chunk({"type": "resource", "resource": {"uri": "file:///b.txt", "text": "b" * MIB}}),
        chunk({"type": "resource", "resource": {"uri": "file:///c", "blob": data, "mimeType": "application/pdf"}}),
    )
    message = only(outputs)
    assert "[image/png, 786,432 bytes]" in message.content
    assert "[audio/wav, 2 bytes]" in message.content
    assert "[a.txt](file:///a.txt)" in message.content
    assert "[file:///c: application/pdf, 786,432 bytes]" in message.content
    assert len(message.content) < 20_000
    assert [block["type"] for block in message.metadata["blocks"]] == [
        "image",
        "audio",
        "resource_link",
        "resource",
        "resource",
    ]
    assert message.metadata["blocks"][0] == {"type": "image", "mimeType": "image/png", "bytes": 786_432}
    assert message.metadata["blocks"][3] == {"type": "resource", "uri": "file:///b.txt", "bytes": MIB}


def test_tool_call_becomes_one_entry_with_its_final_state() -> None:
    """Whatever was learnt of it on the way; what comes after its end is too late."""
    entry = only(
        outputs_of(
            call(new=True, title="Edit a file", kind="edit", status="pending", rawInput={"path": "/w/a.txt"}),
            call(status="in_progress", locations=[{"path": "/w/a.txt", "line": 3}, {"path": "/w/b.txt"}]),
            call(
                status="completed",
                rawOutput={"ok": True},
                content=[
                    {"type": "content", "content": text("done")},
                    {"type": "diff", "path": "/w/a.txt", "oldText": "one\ntwo\n", "newText": "one\n2\n"},
                    {"type": "diff", "path": "/w/b.txt", "newText": "new\n"},
                    {"type": "terminal", "terminalId": "term"},
                    {"type": "terminal", "terminalId": "unknown"},
                ],
            ),
            call(status="failed"),
        )
    )
    assert (entry.content, entry.level, entry.type) == ("Edit a file", LogLevel.SUCCESS, "tool_call")
    assert entry.metadata == {
        "toolCallId": "1",
        "title": "Edit a file",
        "kind": "edit",
        "status": "completed",
        "locations": [{"path": "/w/a.txt", "line": 3}, {"path": "/w/b.txt"}],
        "rawInput": {"path": "/w/a.txt"},
        "rawOutput": {"ok": True},
        "content": "done",
        "diffs": [
            {"path": "/w/a.txt", "new": False, "diff": "--- /w/a.txt\n+++ /w/a.txt\n@@ -1,2 +1,2 @@\n one\n-two\n+2"},
            {"path": "/w/b.txt", "new": True, "diff": "--- /dev/null\n+++ /w/b.txt\n@@ -0,0 +1 @@\n+new"},
        ],
        "terminals": [{"terminalId": "term", "output": "the output"}],
    }


@pytest.mark.parametrize(
    ("status", "level"),
    [("failed", LogLevel.ERROR), ("completed", LogLevel.SUCCESS), ("in_progress", LogLevel.WARNING)],
)
def test_tool_call_has_the_level_of_its_end(status: str, level: LogLevel) -> None:
    """One that the turn's end has cut off is a warning; one that only an update told of is there, too."""
    entry = only(outputs_of(call(title="Try", status=status)))
    assert (entry.content, entry.level, entry.metadata["status"]) == ("Try", level, status)


def test_tool_call_is_cut_where_it_is_large() -> None:
    """It says so, and the event has room."""
    lines = "\n".join(f"line {n}" for n in range(200_000))
    entry = only(
        outputs_of(
            call(
                new=True,
                title="t" * MIB,
                rawInput={"data": "i" * MIB},
                rawOutput="o" * MIB,
                locations=[{"path": "/p" * 1_000}] * 1_000,
                content=[
                    {"type": "content", "content": text("c" * MIB)},
                    *[{"type": "diff", "path": "/a", "oldText": lines, "newText": f"first\n{lines}\nlast"}] * 20,
                ],
            )
        )
    )
    metadata = entry.metadata
    assert "[cut: 1,048,576 characters in all]" in entry.content
    assert "[cut: 1,048,576 characters in all]" in metadata["content"]
    assert metadata["rawInput"]["bytes"] > MIB
    assert len(metadata["rawInput"]["cut"]) == MAX_JSON_BYTES
    assert metadata["diffsLeftOut"] == 12
    assert "[cut: " in metadata["diffs"][0]["diff"]
    assert len(msgspec.json.encode(metadata)) < MIB // 2


@pytest.mark.parametrize("character", ["\U0001f600", "\x01"])
def test_events_have_room_for_any_characters(character: str) -> None:
    """A character may have six bytes: in the log an entry has at most a MiB all the same."""
    large = character * 20_000
    diffs = [{"type": "diff", "path": large, "newText": large}] * 9
    link = {"type": "resource_link", "uri": large, "name": large}
    terminals = [{"type": "terminal", "terminalId": str(number)} for number in range(9)]
    content = [*diffs, *terminals, {"type": "content", "content": link}]
    made = ToolCall("1")
    parsed = UPDATES["tool_call"].model_validate(call(new=True, title=large, content=content, rawInput={"a": large}))
    assert isinstance(parsed, ToolCallStart)
    made.learn(parsed)
    messages = outputs_of(chunk(character * (MAX_TEXT_CHARACTERS - 10_000)), *[chunk(link) for _ in range(60)])
    for output in (made.log(lambda _: character * 8_192), *messages):
        if isinstance(output, Log | Message):
            size_of(event_from(output))


def test_tool_call_is_cut_where_it_is_deep() -> None:
    """Whoever reads the event has a limit of nesting."""
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    entry = only(outputs_of(call(new=True, title="t", rawInput=deep, rawOutput={"a": [{"b": [1]}]})))
    assert entry.metadata["rawInput"]["cut"] in ("", "[" * 901 + "]" * 901)
    assert entry.metadata["rawOutput"] == {"a": [{"b": [1]}]}


def test_diff_of_long_texts_is_one_hunk() -> None:
    """Found in no time; what did not change is left out but for three lines on either side."""
    old = [f"line {n}" for n in range(50_000)]
    new = [*old[:40_000], "changed", *old[40_001:]]
    entry = only(
        outputs_of(
            call(
                new=True,
                title="t",
                content=[{"type": "diff", "path": "/a", "oldText": "\n".join(old), "newText": "\n".join(new)}],
            )
        )
    )
    assert entry.metadata["diffs"][0]["diff"].splitlines() == [
        "--- /a",
        "+++ /a",
        "@@ -39998,7 +39998,7 @@",
        *[f" line {n}" for n in range(39_997, 40_000)],
        "-line 40000",
        "+changed",
        *[f" line {n}" for n in range(40_001, 40_004)],
    ]


def test_tool_calls_that_never_end_are_not_kept_for_ever() -> None:
    """The oldest is said as it is when there are too many."""
    transcript = Transcript(lambda _: None)
    said: list[AgentOutput] = []
    for n in range(1_000):
        said += transcript.add(UPDATES["tool_call"].model_validate(call(str(n), new=True, title=str(n))))
    left = transcript.end()
    assert [output.content for output in [*said, *left] if isinstance(output, Log)] == [str(n) for n in range(1_000)]
    assert len(left) == 64


def test_plan_is_said_when_it_has_changed_and_the_agent_goes_on() -> None:
    """A hundred updates in a row are one entry, and the same plan again is none."""
    outputs = outputs_of(
        *[plan("in_progress", "pending")] * 100,
        plan("completed", "in_progress"),
        chunk("working"),
        plan("completed", "in_progress"),
        call(new=True, title="T", status="completed"),
        plan("completed", "completed"),
    )
    assert [output.content for output in outputs if isinstance(output, Log | Message)] == [
        "[x] step 1\n[>] step 2",
        "working",
        "T",
        "[x] step 1\n[x] step 2",
    ]
    first = outputs[0]
    assert isinstance(first, Log)
    assert first.type == "plan"
    assert first.metadata is not None
    assert first.metadata["entries"][0] == {"content": "step 1", "priority": "high", "status": "completed"}


def test_plans_by_id_are_said_one_by_one() -> None:
    """As entries, as a file, as Markdown, and removed."""
    entries = plan("pending")["entries"]
    outputs = outputs_of(
        {"sessionUpdate": "plan_update", "plan": {"type": "items", "planId": "a", "entries": entries}},
        {"sessionUpdate": "plan_update", "plan": {"type": "file", "planId": "b", "uri": "file:///p.md"}},
        {"sessionUpdate": "plan_update", "plan": {"type": "markdown", "planId": "c", "content": "# Plan"}},
        chunk("x"),
        {"sessionUpdate": "plan_removed", "planId": "b"},
    )
    logs = [(output.content, output.metadata) for output in outputs if isinstance(output, Log)]
    assert logs == [
        ("[ ] step 1", {"planId": "a", "entries": entries}),
        ("The plan is in file:///p.md", {"planId": "b", "uri": "file:///p.md"}),
        ("# Plan", {"planId": "c"}),
        ("The plan was removed.", {"planId": "b", "removed": True}),
    ]


def test_usage_goes_to_the_last_message() -> None:
    """That of the prompt, and how full the context is."""
    update = {"sessionUpdate": "usage_update", "used": 10, "size": 100, "cost": {"amount": 0.5, "currency": "EUR"}}
    usage = Usage(total_tokens=7, input_tokens=4, output_tokens=3)
    outputs = outputs_of(chunk("one"), call(new=True, title="T", status="failed"), chunk("two"), update, usage=usage)
    assert [output.metadata for output in outputs if isinstance(output, Message)] == [
        None,
        {
            "usage": {"totalTokens": 7, "inputTokens": 4, "outputTokens": 3},
            "context": {"used": 10, "size": 100, "cost": {"amount": 0.5, "currency": "EUR"}},
        },
    ]
    entry = only(outputs_of(update))
    assert (entry.type, entry.metadata["context"]["used"]) == ("usage", 10)


def test_changes_of_the_session_are_said() -> None:
    """Its mode, its settings and its title; not the commands on offer, nor what the caller said."""
    setting = {
        "type": "select",
        "id": "m",
        "name": "Model",
        "currentValue": "large",
        "options": [{"value": "large", "name": "Large"}],
    }
    flag = {"type": "boolean", "id": "f", "name": "Fast", "currentValue": True}
    configured = {"sessionUpdate": "config_option_update", "configOptions": [setting, flag]}
    assert outputs_of(
        {"sessionUpdate": "current_mode_update", "currentModeId": "code"},
        configured,
        configured,
        {"sessionUpdate": "session_info_update", "title": "A title"},
        {"sessionUpdate": "session_info_update", "updatedAt": "2026-01-01T00:00:00Z"},
        {"sessionUpdate": "available_commands_update", "availableCommands": [{"name": "a", "description": "b"}]},
        chunk("what the caller said", "user_message_chunk"),
    ) == [
        Log("The mode is now 'code'.", type="mode", metadata={"currentModeId": "code"}),
        Log(
            "The agent's settings are now m = large, f = True.",
            type="configuration",
            metadata={"m": "large", "f": True},
        ),
        Log("A title", type="session_title", metadata={"title": "A title"}),
    ]


def test_history_is_text_with_the_newest_kept() -> None:
    """For an agent that does not know the conversation."""
    history = [HistoryMessage(EventRole.USER, "hello"), HistoryMessage(EventRole.ASSISTANT, "hi")]
    assert history_text(history).endswith("\n\nUser: hello\n\nAssistant: hi")
    long = history_text([HistoryMessage(EventRole.USER, "x" * 200_000), *history])
    assert long.endswith("[what came before is left out]\n\nUser: hello\n\nAssistant: hi")


# Files


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "link", "folder/../../secret", "a\0b", "nowhere/../../x", "../workshop/x"]
)
def test_files_outside_of_the_directory_are_refused(tmp_path: Path, path: str) -> None:
    """By dots, by an absolute path, by a link."""
    (tmp_path / "secret").write_text("secret")
    directory = WorkingDirectory.make(tmp_path / "work")
    (directory.path / "folder").mkdir()
    (directory.path / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(Refused):
        directory.read_text(path, None, None)
    with pytest.raises(Refused):
        directory.write_text(path, "x")
    assert (tmp_path / "secret").read_text() == "secret"


def test_files_are_read_by_line_and_limit(tmp_path: Path) -> None:
    """Lines count from 1."""
    directory = WorkingDirectory.make(tmp_path / "work")
    directory.write_text("new/folder/a.txt", "1\n2\n3\n4")
    assert directory.read_text("new/folder/a.txt", None, None) == "1\n2\n3\n4"
    assert directory.read_text(str(tmp_path / "work/new/folder/a.txt"), 2, 2) == "2\n3\n"
    assert directory.read_text("new/folder/a.txt", 4, None) == "4"
    assert directory.read_text("new/folder/a.txt", 9, 1) == ""
    directory.write_text("new/folder/a.txt", "5")
    assert directory.read_text("new/folder/a.txt", 0, None) == "5"


def test_files_that_are_none_or_too_large_are_refused(tmp_path: Path) -> None:
    """A pipe nobody writes to, a picture, five megabytes."""
    directory = WorkingDirectory.make(tmp_path / "work")
    os.mkfifo(directory.path / "pipe")
    (directory.path / "picture").write_bytes(b"\x89PNG\xff")
    (directory.path / "large").write_text("line\n" * MIB)
    for name, words in (("pipe", "no regular file"), ("picture", "no text in UTF-8"), ("large", "by line and limit")):
        with pytest.raises(Refused) as refused:
            directory.read_text(name, None, None)
        assert words in str(refused.value)
    assert directory.read_text("large", 1_000_000, 1) == "line\n"
    (directory.path / "long lines").write_text(f"{'x' * 5 * MIB}\nsecond\n")
    assert directory.read_text("long lines", 2, 1) == "second\n"
    # It takes no room on the disk, and minutes to read.
    (directory.path / "endless").touch()
    os.truncate(directory.path / "endless", 1 << 40)
    for line in (None, 2):
        with pytest.raises(Refused):
            directory.read_text("endless", line, 1)
    with pytest.raises(Refused):
        directory.write_text("x", "x" * 5 * MIB)
    with pytest.raises((Refused, OSError)):
        directory.write_text("pipe", "x")


def test_directory_is_removed_only_if_it_was_made(tmp_path: Path) -> None:
    """What was there before belongs to somebody else."""
    (tmp_path / "there").mkdir()
    for name, left in (("there", True), ("made/for/it", False)):
        WorkingDirectory.make(tmp_path / name).remove()
        assert (tmp_path / name).exists() is left
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        WorkingDirectory.make(tmp_path / "file")


# The inbox


def test_inbox_holds_up_an_agent_that_nobody_listens_to() -> None:
    """By the number of outputs and by their size; a turn that is left holds up nobody."""

    async def check(*outputs: Said) -> None:
        inbox = Inbox(Transcript(lambda _: None))
        await inbox.room()
        inbox.add(list(outputs))
        waiting = asyncio.create_task(inbox.room())
        for _ in range(3):
            await asyncio.sleep(0)
        assert not waiting.done()
        assert inbox.take() == list(outputs)
        await waiting
        inbox.add(list(outputs))
        waiting = asyncio.create_task(inbox.room())
        await asyncio.sleep(0)
        inbox.leave()
        await waiting
        assert inbox.take() == []

    run_async(check(*[Delta("x")] * 64))
    run_async(check(Message("x" * (1 << 18))))
    run_async(check(*[Log("x", metadata={"k": "v"})] * 17))
