"""The `agent_client_protocol` agent with real processes: its turns and its sessions."""

import asyncio
import json
from typing import Any

import psutil
import pytest

from runtime_service.agent_check import check_agent
from runtime_service.agents import (
    AgentError,
    AgentOutput,
    Finding,
    HistoryMessage,
    Log,
    Message,
)
from runtime_service.registry import Server
from runtime_service.runs import EventRole, LogLevel
from tests.integration.acp_stage import (
    Play,
    Stage,
    agent_processes,
    failure_of,
    is_alive,
    say,
    session_of,
    tell,
    text_of,
)
from tests.support import GivenSurroundings, eventually

# Turns


def test_turn_is_a_prompt_and_continue_is_the_next_one(play: Play) -> None:
    """In the same process, whose session is told of once."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        first = await stage.turn(agent, [say("Hel", "lo"), {"do": "usage"}])
        session = session_of(first)
        assert session.content == "A session with Obedient Agent was opened."
        assert session.metadata is not None
        assert session.metadata["agent"] == {"name": "obedient", "title": "Obedient Agent", "version": "1.2.3"}
        assert session.metadata["workingDirectory"] == str(stage.folder / "work" / "run_1")
        assert first[-1] == Message(
            "Hello",
            {"stopReason": "end_turn", "usage": {"totalTokens": 7, "inputTokens": 4, "outputTokens": 3}},
        )
        second = await stage.turn(agent, [tell("pid")], GivenSurroundings(logs={"session": session}), turn=2)
        assert text_of(second) == str(agent_processes()[0].pid)
        assert not [output for output in second if isinstance(output, Log)]
        assert len(agent_processes()) == 1

    play(check)


def test_runs_have_processes_of_their_own(play: Play) -> None:
    """And working directories."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        said = await asyncio.gather(
            *(stage.turn(agent, [tell("cwd")], run_id=run_id) for run_id in ("run_1", "run_2", "run_3"))
        )
        assert [json.loads(text_of(each)) for each in said] == [
            str(stage.folder / "work" / run_id) for run_id in ("run_1", "run_2", "run_3")
        ]
        assert len(agent_processes()) == 3

    play(check)


def test_updates_of_every_kind_reach_the_turn(play: Play) -> None:
    """What becomes of each is tested without processes; here they come over the wire, and in order."""
    call = {"toolCallId": "1"}
    updates = [
        {"sessionUpdate": "user_message_chunk", "content": {"type": "text", "text": "you said"}},
        {"sessionUpdate": "agent_thought_chunk", "content": {"type": "text", "text": "thinking"}},
        {"sessionUpdate": "agent_message_chunk", "content": {"type": "text", "text": "one"}},
        {"sessionUpdate": "tool_call", **call, "title": "A tool", "kind": "read"},
        {"sessionUpdate": "tool_call_update", **call, "status": "completed"},
        {"sessionUpdate": "plan", "entries": [{"content": "a", "priority": "low", "status": "pending"}]},
        {"sessionUpdate": "plan_update", "plan": {"type": "markdown", "planId": "p", "content": "# Plan"}},
        {"sessionUpdate": "plan_removed", "planId": "p"},
        {"sessionUpdate": "available_commands_update", "availableCommands": []},
        {"sessionUpdate": "current_mode_update", "currentModeId": "code"},
        {"sessionUpdate": "config_option_update", "configOptions": []},
        {"sessionUpdate": "session_info_update", "title": "A title"},
        {"sessionUpdate": "usage_update", "used": 1, "size": 2},
    ]

    async def check(stage: Stage) -> None:
        said = await stage.turn(stage.agent("obedient"), [{"do": "update", "updates": updates}, say("two")])
        shown = [
            (output.type, output.content) if isinstance(output, Log) else output.content
            for output in said[1:]
            if isinstance(output, Log | Message)
        ]
        assert shown == [
            ("reasoning", "thinking"),
            "one",
            ("tool_call", "A tool"),
            ("mode", "The mode is now 'code'."),
            ("configuration", "The agent has no settings."),
            ("session_title", "A title"),
            ("plan", "[ ] a"),
            ("plan", "The plan was removed."),
            "two",
        ]

    play(check)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("max_tokens", "AGENT_MAX_TOKENS"),
        ("max_turn_requests", "AGENT_MAX_TURN_REQUESTS"),
        ("refusal", "AGENT_REFUSED"),
        ("cancelled", "AGENT_CANCELLED"),
    ],
)
def test_turn_that_is_stopped_fails_with_what_was_said(play: Play, reason: str, code: str) -> None:
    """The session goes on."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        said: list[AgentOutput] = []
        turn = stage.collect(said, agent, [say("so far"), {"do": "stop", "reason": reason}])
        assert (await failure_of(turn)).code == code
        assert said[-1] == Message("so far", {"stopReason": reason})
        (pid,) = [process.pid for process in agent_processes()]
        assert text_of(await stage.turn(agent, [tell("pid")], turn=2)) == str(pid)

    play(check)


def test_agent_gets_nothing_of_the_runtimes_environment(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what its options name."""
    monkeypatch.setenv("SECRET_OF_THE_RUNTIME", "x")
    monkeypatch.setenv("FOR_THE_AGENT", "y")

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", inherit_env=["FOR_THE_AGENT"], env={"OWN": "z"})
        environment = json.loads(text_of(await stage.turn(agent, [tell("env")])))
        assert "SECRET_OF_THE_RUNTIME" not in environment
        assert (environment["FOR_THE_AGENT"], environment["OWN"]) == ("y", "z")

    play(check)


# Sessions


@pytest.mark.parametrize("how", ["load", "resume"])
def test_session_is_opened_again_in_a_new_process(play: Play, how: str) -> None:
    """What the agent says again of the past is left out."""

    async def check(stage: Stage) -> None:
        session = session_of(await stage.turn(stage.agent("obedient", f"--{how}"), "first"))
        history = [HistoryMessage(EventRole.USER, "first")]
        surroundings = GivenSurroundings(history, logs={"session": session})
        again = stage.agent("obedient", f"--{how}")
        said = await stage.turn(again, [tell("said")], surroundings, turn=2)
        assert json.loads(text_of(said)) == ["first", json.dumps([tell("said")])]
        opened = session_of(said)
        assert (opened.level, opened.metadata and opened.metadata["opened"]) == (LogLevel.INFO, how)
        # The first agent has a process, too, which does not know the second turn.
        surroundings = GivenSurroundings(history, logs={"session": opened})
        said = await stage.turn(stage.agents[0], [tell("said")], surroundings, turn=3)
        assert len(json.loads(text_of(said))) == 3
        assert session_of(said).metadata != opened.metadata

    play(check)


def test_session_by_which_the_agent_breaks_is_tried_once(play: Play) -> None:
    """The turn fails; the next one goes on with the history."""

    async def check(stage: Stage) -> None:
        kept = Log("", type="session", metadata={"sessionId": "heavy", "connection": "x"})
        surroundings = GivenSurroundings([HistoryMessage(EventRole.USER, "hello")], logs={"session": kept})
        agent = stage.agent("obedient", "--load", "--break-load")
        with pytest.raises(AgentError) as caught:
            await stage.turn(agent, "more", surroundings, turn=2)
        assert caught.value.code == "AGENT_CRASHED"
        session = session_of(await stage.turn(agent, "more", surroundings, turn=3))
        assert (session.metadata or {})["opened"] == "history"

    play(check)


def test_session_of_a_turn_that_was_given_back_is_opened_again(play: Play) -> None:
    """A service that is stopped does not count the attempt: the turn seems to be the first, and has a session."""

    async def check(stage: Stage) -> None:
        session = session_of(await stage.turn(stage.agent("obedient", "--load"), "first"))
        again = GivenSurroundings(logs={"session": session})
        said = await stage.turn(stage.agent("obedient", "--load"), [tell("said")], again)
        assert json.loads(text_of(said))[0] == "first"

    play(check)


@pytest.mark.parametrize("arguments", [[], ["--load"]], ids=["cannot", "does not know it"])
def test_session_that_cannot_be_opened_again_begins_with_the_history(play: Play, arguments: list[str]) -> None:
    """The log says so."""

    async def check(stage: Stage) -> None:
        history = [HistoryMessage(EventRole.USER, "my name is Ada"), HistoryMessage(EventRole.ASSISTANT, "hello")]
        lost = Log("", type="session", metadata={"sessionId": "lost", "connection": "x"})
        surroundings = GivenSurroundings(history, logs={"session": lost})
        said = await stage.turn(stage.agent("obedient", *arguments), [{"do": "context"}], surroundings, turn=2)
        assert "User: my name is Ada\n\nAssistant: hello|[" in text_of(said)
        session = session_of(said)
        assert session.level is LogLevel.WARNING
        assert session.content.startswith("A new session")

    play(check)


@pytest.mark.parametrize("begun", [False, True])
def test_session_that_was_told_nothing_yet_is_not_used(play: Play, begun: bool) -> None:
    """The history could not be read; when it can, it is given to the agent."""

    class Forgetful(GivenSurroundings):
        async def history(self) -> list[HistoryMessage]:
            raise OSError

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        logs = {"session": session_of(await stage.turn(agent, "my name is Ada"))} if begun else {}
        for process in agent_processes():
            process.kill()
            await eventually(lambda: agent._runs["run_1"].session is None)
        with pytest.raises(OSError):  # noqa: PT011 - as it is raised
            await stage.turn(agent, "x", Forgetful(logs=logs), turn=2)
        surroundings = GivenSurroundings([HistoryMessage(EventRole.USER, "my name is Ada")], logs=logs)
        said = await stage.turn(agent, [{"do": "context"}], surroundings, turn=3)
        assert "User: my name is Ada" in text_of(said)

    play(check)


def test_mode_and_model_are_set_where_they_are_offered(play: Play) -> None:
    """By id or by name."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", "--modes", "--models", mode="Write Code", model="large")
        assert text_of(await stage.turn(agent, [tell("mode"), tell("model")])) == '"code""large"'

    play(check)


@pytest.mark.parametrize(
    ("arguments", "options", "code", "words"),
    [
        (["--modes"], {"mode": "x"}, "AGENT_MODE_NOT_OFFERED", "no mode 'x'. It offers: ask, code."),
        (["--models"], {"model": "x"}, "AGENT_MODEL_NOT_OFFERED", "It offers: small, large."),
        ([], {"mode": "x"}, "AGENT_MODE_NOT_OFFERED", "It offers: none."),
        (
            [],
            {"mcp_servers": [{"name": "web", "type": "http", "url": "http://127.0.0.1:1"}]},
            "AGENT_MCP_NOT_SUPPORTED",
            "'web'",
        ),
        (["--login"], {}, "AGENT_LOGIN_REQUIRED", "Log in with a browser (login_method = 'browser')"),
        (["--version", "9"], {}, "AGENT_PROTOCOL_ERROR", "version 9, not 1"),
    ],
)
def test_session_that_cannot_be_opened_as_wanted_fails_in_words(
    play: Play, arguments: list[str], options: dict[str, Any], code: str, words: str
) -> None:
    """No process stays."""

    async def check(stage: Stage) -> None:
        failure = await failure_of(stage.turn(stage.agent("obedient", *arguments, **options), "x"))
        assert failure.code == code
        assert words in failure.message
        await eventually(lambda: not agent_processes())

    play(check)


def test_session_in_another_mode_than_wanted_is_not_kept(play: Play) -> None:
    """The turn that tries again fails again."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", "--modes", mode="x")
        for turn in (1, 2):
            assert (await failure_of(stage.turn(agent, "x", turn=turn))).code == "AGENT_MODE_NOT_OFFERED"

    play(check)


def test_login_by_a_method_that_the_options_name(play: Play) -> None:
    """Before the session is opened; MCP servers go along."""

    async def check(stage: Stage) -> None:
        servers = [{"name": "files", "command": "mcp-files", "env": [{"name": "A", "value": "b"}]}]
        agent = stage.agent("obedient", "--login", login_method="browser", mcp_servers=servers)
        assert text_of(await stage.turn(agent, [tell("servers")])) == '["files"]'

    play(check)


def test_process_ends_when_its_run_is_idle(play: Play) -> None:
    """With a directory that was made for it; the next turn has another one."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", idle_seconds=0.05, remove_working_directory=True)
        first = await stage.turn(agent, [tell("pid")])
        await eventually(lambda: not agent_processes() and not (stage.folder / "work" / "run_1").exists())
        second = await stage.turn(agent, [tell("pid")], GivenSurroundings(logs={"session": session_of(first)}), turn=2)
        assert text_of(first) != text_of(second)

    play(check)


def test_directory_of_a_run_stays_unless_its_removal_is_asked_for(play: Play) -> None:
    """And then only if it was made for the run."""

    async def check(stage: Stage) -> None:
        work = stage.folder / "work"
        (work / "there").mkdir(parents=True)
        keeping = stage.agent("obedient")
        removing = stage.agent("obedient", remove_working_directory=True)
        await stage.turn(keeping, "x", run_id="kept")
        for run_id in ("removed", "there"):
            await stage.turn(removing, "x", run_id=run_id)
        await stage.close()
        assert sorted(path.name for path in work.iterdir()) == ["kept", "there"]

    play(check)


def test_directory_that_was_made_before_a_restart_is_removed(play: Play) -> None:
    """The log says that it was made for the run."""

    async def check(stage: Stage) -> None:
        before, after = [stage.agent("obedient", remove_working_directory=removes) for removes in (False, True)]
        session = session_of(await stage.turn(before, "x"))
        await before.close()
        assert (stage.folder / "work" / "run_1").exists()
        await stage.turn(after, "x", GivenSurroundings(logs={"session": session}), turn=2)
        await after.close()
        assert not (stage.folder / "work" / "run_1").exists()

    play(check)


def test_directory_of_a_turn_is_not_removed_by_an_earlier_idle_end(play: Play) -> None:
    """A turn came while the run was being ended, and was cancelled before that was done."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", idle_seconds=0.5, remove_working_directory=True)
        surroundings = GivenSurroundings(logs={"session": session_of(await stage.turn(agent, "x"))})
        run = agent._runs["run_1"]
        await eventually(lambda: run.idle is None)
        retiring = run.settling
        assert retiring is not None
        stopped = asyncio.create_task(stage.turn(agent, "x", surroundings, turn=2))
        await asyncio.sleep(0)
        stopped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stopped
        await asyncio.wait([retiring])
        await asyncio.sleep(0)
        steps = [{"do": "terminal", "command": "sleep 1; pwd"}]
        assert str(stage.folder / "work" / "run_1") in text_of(await stage.turn(agent, steps, surroundings, turn=3))
        assert agent._runs == {"run_1": run}

    play(check)


def test_warm_processes_are_waited_for_outside_of_the_starts_at_once(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a turn that starts could wait for a process that waits for it."""
    monkeypatch.setattr("runtime_service.agents.agent_client_protocol.agent._STARTS_AT_ONCE", 1)

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", warm_processes=2)
        turns = [stage.turn(agent, "hello", run_id=f"run_{number}") for number in range(4)]
        assert [text_of(said) for said in await asyncio.gather(*turns)] == ["hello"] * 4

    play(check)


def test_warm_processes_wait_for_new_runs(play: Play) -> None:
    """One that is taken is replaced, and one that has died is not given to anybody."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", warm_processes=1)
        await stage.turn(agent, "x")
        await eventually(lambda: len(agent_processes()) == 2)
        (warm,) = {process.pid for process in agent_processes()} - {
            int(text_of(await stage.turn(agent, [tell("pid")])))
        }
        assert text_of(await stage.turn(agent, [tell("pid")], run_id="run_2")) == str(warm)
        await eventually(lambda: len(agent_processes()) == 3)
        await eventually(lambda: all(warm.done() for warm in agent._warm))
        killed = agent_processes()
        for process in killed:
            process.kill()
        await eventually(lambda: not any(psutil.pid_exists(process.pid) for process in killed))
        said = await stage.turn(agent, [tell("pid")], run_id="run_3")
        assert is_alive(int(text_of(said)))

    play(check)


def test_session_is_opened_without_a_turn(play: Play) -> None:
    """As a check of the configuration does."""

    async def check(stage: Stage) -> None:
        session = await stage.agent("obedient").open_session(run_id="check", server_id="s", thread_id="t")
        assert session.agent["name"] == "obedient"
        await session.end()
        failure = await failure_of(
            stage.agent("obedient", "--login").open_session(run_id="check", server_id="s", thread_id="t")
        )
        assert failure.code == "AGENT_LOGIN_REQUIRED"
        assert not agent_processes()

    play(check)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (
            ["--load", "--modes", "--models"],
            [
                "It speaks version 1 of the Agent Client Protocol, and opens a session: Obedient Agent 1.2.3",
                "It loads earlier sessions: a run goes on in them after a restart.",
                "It offers the modes ask, code; by itself it takes ask.",
                "It offers the models small, large; by itself it takes small.",
            ],
        ),
        (
            ["--resume"],
            [
                "It speaks version 1 of the Agent Client Protocol, and opens a session: Obedient Agent 1.2.3",
                "It resumes earlier sessions: a run goes on in them after a restart.",
            ],
        ),
        (
            [],
            [
                "It speaks version 1 of the Agent Client Protocol, and opens a session: Obedient Agent 1.2.3",
                "It takes up no earlier session: after a restart it is given the conversation as context.",
            ],
        ),
    ],
)
def test_check_says_what_a_session_shows(play: Play, arguments: list[str], found: list[str]) -> None:
    """Who it is, whether it takes up sessions, and what it offers; nothing is left of it."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", *arguments)
        findings = [finding async for finding in agent.check()]
        assert ([finding.text for finding in findings], {finding.works for finding in findings}) == (found, {True})
        assert not agent_processes()
        assert not (stage.folder / "work" / "check").exists()

    play(check)


def test_check_tells_that_a_login_is_needed(play: Play) -> None:
    """As a turn would, and executes none."""

    async def check(stage: Stage) -> None:
        found: list[Finding] = []
        server = Server("mine", "default", stage.agent("obedient", "--login"), 60)
        assert not await check_agent(server, found.append, 20)
        (missing,) = found
        assert not missing.works
        assert missing.text.endswith("(AGENT_LOGIN_REQUIRED)")
        assert list(stage.folder.glob("work/*")) == []

    play(check)
