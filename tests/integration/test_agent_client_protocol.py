"""The `agent_client_protocol` agent with real processes that speak the protocol, well and badly."""

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import uvloop

from runtime_service.agent_check import check_agent
from runtime_service.agents import (
    AgentError,
    AgentOutput,
    Answer,
    AnsweredBy,
    Delta,
    Finding,
    HistoryMessage,
    Log,
    Message,
    Option,
    OptionKind,
    TurnContext,
)
from runtime_service.agents.agent_client_protocol.agent import AgentClientProtocolAgent
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions
from runtime_service.registry import Server, load_registry
from runtime_service.runs import EventRole, LogLevel
from tests.support import GivenSurroundings, eventually, run_async

AGENTS = Path(__file__).parents[1] / "acp_agents"
Check = Callable[["Stage"], Awaitable[None]]


class Stage:
    """An agent, the turns that it executes, and the processes of its agents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: list[AgentClientProtocolAgent] = []
        self.pids: set[int] = set()

    def agent(self, script: str, *arguments: str, **options: Any) -> AgentClientProtocolAgent:
        """Another agent that runs one of the scripts."""
        given = {
            "command": sys.executable,
            "args": [str(AGENTS / f"{script}.py"), *arguments],
            "working_directory": str(self.folder / "work" / "{run_id}"),
            "cancel_seconds": 5,
            **options,
        }
        agent = AgentClientProtocolAgent(msgspec.convert(given, AgentClientProtocolOptions))
        self.agents.append(agent)
        return agent

    async def turn(
        self,
        agent: AgentClientProtocolAgent,
        input: object,
        surroundings: GivenSurroundings | None = None,
        *,
        run_id: str = "run_1",
        turn: int = 1,
    ) -> list[AgentOutput]:
        """All that the agent says in a turn, one by one; an input that is no text is the steps of `obedient`."""
        said: list[AgentOutput] = []
        await self.collect(said, agent, input, surroundings, run_id=run_id, turn=turn)
        return said

    async def collect(
        self,
        said: list[AgentOutput],
        agent: AgentClientProtocolAgent,
        input: object,
        surroundings: GivenSurroundings | None = None,
        *,
        run_id: str = "run_1",
        turn: int = 1,
    ) -> None:
        """Add to `said` what the agent says."""
        context = TurnContext(
            input=input if isinstance(input, str) else json.dumps(input),
            metadata={},
            run_id=run_id,
            thread_id=run_id,
            server_id="server",
            turn=turn,
            surroundings=surroundings or GivenSurroundings(),
        )
        async with aclosing(agent.run(context)) as outputs:
            async for output in outputs:
                said += output if isinstance(output, tuple) else (output,)
                self.note_processes()

    def note_processes(self) -> None:
        """Remember whatever runs below this process, to be gone at the end."""
        self.pids |= {process.pid for process in agent_processes()}

    async def close(self) -> None:
        """Close the agents; none of their processes is left."""
        self.note_processes()
        for agent in self.agents:
            await agent.close()
        assert not {pid for pid in self.pids if is_alive(pid)}


def agent_processes() -> list[psutil.Process]:
    """The agents that run below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(str(AGENTS) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def is_alive(pid: int) -> bool:
    """Whether there is such a process that is more than a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Callable[[Check], None]]:
    """Return a function that runs a check on a stage, on the loop of production."""

    def play(check: Check) -> None:
        async def main() -> None:
            stage = Stage(tmp_path)
            try:
                await check(stage)
            finally:
                await stage.close()

        run_async(main(), loop_factory=uvloop.new_event_loop)

    yield play
    assert not agent_processes()


def text_of(said: list[AgentOutput]) -> str:
    """The messages, one after the other; each is what its deltas were."""
    deltas = ""
    messages = ""
    for output in said:
        if isinstance(output, Delta):
            deltas += output.text
        elif isinstance(output, Message):
            messages += output.content
    assert deltas == messages
    return messages


def session_of(said: list[AgentOutput]) -> Log:
    """The entry that says which session there is."""
    (log,) = [output for output in said if isinstance(output, Log) and output.type == "session"]
    return log


def say(*texts: str) -> dict[str, Any]:
    """A step."""
    return {"do": "say", "texts": texts}


def tell(what: str) -> dict[str, Any]:
    """A step."""
    return {"do": "tell", "what": what}


async def failure_of(turn: Awaitable[object]) -> AgentError:
    """How a turn fails."""
    with pytest.raises(AgentError) as raised:
        await turn
    return raised.value


# Turns


def test_turn_is_a_prompt_and_continue_is_the_next_one(play: Callable[[Check], None]) -> None:
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


def test_runs_have_processes_of_their_own(play: Callable[[Check], None]) -> None:
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


def test_updates_of_every_kind_reach_the_turn(play: Callable[[Check], None]) -> None:
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
def test_turn_that_is_stopped_fails_with_what_was_said(play: Callable[[Check], None], reason: str, code: str) -> None:
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


def test_agent_gets_nothing_of_the_runtimes_environment(
    play: Callable[[Check], None], monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_session_is_opened_again_in_a_new_process(play: Callable[[Check], None], how: str) -> None:
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


@pytest.mark.parametrize("arguments", [[], ["--load"]], ids=["cannot", "does not know it"])
def test_session_that_cannot_be_opened_again_begins_with_the_history(
    play: Callable[[Check], None], arguments: list[str]
) -> None:
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


def test_mode_and_model_are_set_where_they_are_offered(play: Callable[[Check], None]) -> None:
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
    play: Callable[[Check], None], arguments: list[str], options: dict[str, Any], code: str, words: str
) -> None:
    """No process stays."""

    async def check(stage: Stage) -> None:
        failure = await failure_of(stage.turn(stage.agent("obedient", *arguments, **options), "x"))
        assert failure.code == code
        assert words in failure.message
        await eventually(lambda: not agent_processes())

    play(check)


def test_session_in_another_mode_than_wanted_is_not_kept(play: Callable[[Check], None]) -> None:
    """The turn that tries again fails again."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", "--modes", mode="x")
        for turn in (1, 2):
            assert (await failure_of(stage.turn(agent, "x", turn=turn))).code == "AGENT_MODE_NOT_OFFERED"

    play(check)


def test_login_by_a_method_that_the_options_name(play: Callable[[Check], None]) -> None:
    """Before the session is opened; MCP servers go along."""

    async def check(stage: Stage) -> None:
        servers = [{"name": "files", "command": "mcp-files", "env": [{"name": "A", "value": "b"}]}]
        agent = stage.agent("obedient", "--login", login_method="browser", mcp_servers=servers)
        assert text_of(await stage.turn(agent, [tell("servers")])) == '["files"]'

    play(check)


def test_process_ends_when_its_run_is_idle(play: Callable[[Check], None]) -> None:
    """With a directory that was made for it; the next turn has another one."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", idle_seconds=0.05, remove_working_directory=True)
        first = await stage.turn(agent, [tell("pid")])
        await eventually(lambda: not agent_processes() and not (stage.folder / "work" / "run_1").exists())
        second = await stage.turn(agent, [tell("pid")], GivenSurroundings(logs={"session": session_of(first)}), turn=2)
        assert text_of(first) != text_of(second)

    play(check)


def test_directory_of_a_run_stays_unless_its_removal_is_asked_for(play: Callable[[Check], None]) -> None:
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


def test_warm_processes_wait_for_new_runs(play: Callable[[Check], None]) -> None:
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
        killed = agent_processes()
        for process in killed:
            process.kill()
        await eventually(lambda: not any(psutil.pid_exists(process.pid) for process in killed))
        said = await stage.turn(agent, [tell("pid")], run_id="run_3")
        assert is_alive(int(text_of(said)))

    play(check)


def test_session_is_opened_without_a_turn(play: Callable[[Check], None]) -> None:
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
def test_check_says_what_a_session_shows(play: Callable[[Check], None], arguments: list[str], found: list[str]) -> None:
    """Who it is, whether it takes up sessions, and what it offers; nothing is left of it."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", *arguments)
        findings = [finding async for finding in agent.check()]
        assert ([finding.text for finding in findings], {finding.works for finding in findings}) == (found, {True})
        assert not agent_processes()
        assert not (stage.folder / "work" / "check").exists()

    play(check)


def test_check_tells_that_a_login_is_needed(play: Callable[[Check], None]) -> None:
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


# What the agent asks for


def test_permission_is_asked_of_the_caller(play: Callable[[Check], None]) -> None:
    """With what is known of the tool call; what was said before is said before."""

    async def check(stage: Stage) -> None:
        surroundings = GivenSurroundings(answers=[Answer(AnsweredBy.CALLER, option="no")])
        call = {"sessionUpdate": "tool_call", "toolCallId": "call-1", "title": "Run tests", "kind": "execute"}
        steps = [
            say("May I?"),
            {"do": "update", "updates": [call]},
            {"do": "permission", "input": {"command": "pytest"}},
            {"do": "permission", "id": "call-2", "title": "Again", "kind": "edit"},
        ]
        said = await stage.turn(stage.agent("obedient"), steps, surroundings)
        options = (Option("yes", "Yes", OptionKind.ALLOW_ONCE), Option("no", "No", OptionKind.REJECT_ONCE))
        first, second = surroundings.asked
        metadata = {"toolCallId": "call-1", "kind": "execute", "title": "Run tests", "status": "pending"}
        assert first == ("Run tests", options, "execute", metadata | {"rawInput": {"command": "pytest"}})
        assert (second[0], second[2]) == ("Again", "edit")
        # The second was not answered in time.
        assert text_of(said) == "May I?nocancelled"

    play(check)


def test_permission_outside_of_a_turn_is_cancelled(play: Callable[[Check], None]) -> None:
    """There is nobody to be asked."""

    async def check(stage: Stage) -> None:
        surroundings = GivenSurroundings(answers=[Answer(AnsweredBy.CALLER, option="yes")])
        await stage.turn(stage.agent("unruly", "asks later"), "x", surroundings)
        # The process began in its run's directory.
        answer = stage.folder / "work" / "run_1" / "answer"
        await eventually(lambda: answer.exists() and answer.read_text().endswith("\n"))
        assert json.loads(answer.read_text())["result"] == {"outcome": {"outcome": "cancelled"}}
        assert not surroundings.asked

    play(check)


@pytest.mark.parametrize(
    ("schema", "answer", "result"),
    [
        ({"name": {"type": "string", "title": "Your name"}}, Answer(AnsweredBy.CALLER, text="Ada"), {"name": "Ada"}),
        (
            {"color": {"type": "string", "enum": ["red", "blue"]}},
            Answer(AnsweredBy.CALLER, option="blue"),
            {"color": "blue"},
        ),
        ({"name": {"type": "string"}}, Answer(AnsweredBy.TIME_LIMIT), "cancel"),
        ({"age": {"type": "integer"}}, None, "decline"),
        ({"a": {"type": "string"}, "b": {"type": "string"}}, None, "decline"),
    ],
    ids=["text", "choice", "no answer", "number", "two fields"],
)
def test_form_with_one_text_is_a_question(
    play: Callable[[Check], None], schema: dict[str, Any], answer: Answer | None, result: object
) -> None:
    """Any other is declined."""

    async def check(stage: Stage) -> None:
        params = {"mode": "form", "message": "Tell me", "requestedSchema": {"type": "object", "properties": schema}}
        surroundings = GivenSurroundings(answers=[] if answer is None else [answer])
        steps = [{"do": "request", "method": "elicitation/create", "params": params}]
        said = json.loads(text_of(await stage.turn(stage.agent("obedient"), steps, surroundings)))
        assert (said.get("content") or said["action"]) == result
        assert [asked[0] for asked in surroundings.asked] == ([] if answer is None else ["Tell me"])

    play(check)


def test_files_are_served_inside_of_the_directory(play: Callable[[Check], None]) -> None:
    """And refused outside of it, with the reason."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        work = stage.folder / "work" / "run_1"

        async def ask(method: str, **params: Any) -> Any:
            step = {"do": "request", "method": f"fs/{method}_text_file", "params": params}
            return json.loads(text_of(await stage.turn(agent, [step])))

        assert await ask("write", path=str(work / "new" / "a.txt"), content="1\n2\n3\n") == {}
        assert await ask("read", path=str(work / "new" / "a.txt"), line=2, limit=1) == {"content": "2\n"}
        missing = await ask("read", path=str(work / "b.txt"))
        assert (missing["code"], missing["message"]) == (-32002, f"There is no file {work / 'b.txt'}.")
        outside = await ask("write", path=str(stage.folder / "x"), content="x")
        assert outside["code"] == -32602
        assert "outside of the working directory" in outside["message"]
        assert not (stage.folder / "x").exists()
        assert (await ask("read", path=str(work)))["code"] in (-32602, -32603)

    play(check)


def test_terminals_run_in_the_directory(play: Callable[[Check], None]) -> None:
    """A program with arguments or a line for the shell; both outputs are one, of which the newest is kept."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")

        async def run(**step: Any) -> Any:
            return json.loads(text_of(await stage.turn(agent, [{"do": "terminal", **step}])))

        script = "import sys, os; print(os.getcwd(), os.environ['X']); print('err', file=sys.stderr); sys.exit(3)"
        code, number, output, truncated = await run(command=sys.executable, args=["-c", script], env={"X": "y"})
        assert (code, number, truncated) == (3, None, False)
        assert set(output.splitlines()) == {f"{stage.folder / 'work' / 'run_1'} y", "err"}
        assert await run(command="echo a b | tr ab cd; cat") == [0, None, "c d\n", False]
        assert await run(command="printf", args=["äöü"], limit=3) == [0, None, "ü", True]
        code, number, output, truncated = await run(command="yes | head -c 50000000")
        assert (code, len(output), truncated) == (0, 131_072, True)
        assert (await run(command="sleep 600", kill=True))[:2] == [None, "SIGTERM"]
        said = await stage.turn(agent, [{"do": "terminal", "command": "echo seen", "call": True}])
        (log,) = [output for output in said if isinstance(output, Log)]
        assert log.metadata is not None
        assert log.metadata["terminals"][0]["output"] == "seen\n"

    play(check)


def test_terminals_end_with_the_session(play: Callable[[Check], None]) -> None:
    """With all that they have started."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        marks = [stage.folder / name for name in ("one", "two")]
        script = f"sh -c 'echo $$ > {marks[0]}; exec sleep 600' & setsid sh -c 'echo $$ > {marks[1]}; exec sleep 600'"
        await stage.turn(agent, [{"do": "start terminal", "command": "sh", "args": ["-c", script]}])
        await eventually(lambda: all(mark.exists() and mark.read_text() for mark in marks))
        pids = [int(mark.read_text()) for mark in marks]
        assert all(is_alive(pid) for pid in pids)
        await agent.close()
        assert not any(is_alive(pid) for pid in pids)

    play(check)


def test_settings_refuse_files_and_terminals(play: Callable[[Check], None]) -> None:
    """An agent that asks all the same is told so."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", files="refuse", terminals="refuse")
        read = {"do": "request", "method": "fs/read_text_file", "params": {"path": "x"}}
        run = {"do": "request", "method": "terminal/create", "params": {"command": "ls"}}
        for step in (read, run):
            assert json.loads(text_of(await stage.turn(agent, [step])))["code"] == -32601

    play(check)


# Cancels


async def cancelled(stage: Stage, agent: AgentClientProtocolAgent, steps: object, until: str) -> list[AgentOutput]:
    """A turn that is cancelled once the agent has said something."""
    said: list[AgentOutput] = []
    turn = asyncio.create_task(stage.collect(said, agent, steps))
    await eventually(lambda: any(isinstance(each, Delta) and until in each.text for each in said))
    turn.cancel()
    with pytest.raises(asyncio.CancelledError):
        await turn
    return said


def test_cancel_that_is_obeyed_keeps_the_session(play: Callable[[Check], None]) -> None:
    """The next turn has the same process."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        await cancelled(stage, agent, [{"do": "wait"}], "waiting")
        (pid,) = [process.pid for process in agent_processes()]
        assert text_of(await stage.turn(agent, [tell("pid")], turn=2)) == str(pid)

    play(check)


@pytest.mark.parametrize(
    ("step", "until"),
    [({"do": "wait"}, "waiting"), ({"do": "hang"}, "…"), ({"do": "flood", "count": 1_000_000}, "0 ")],
    ids=["waits", "hangs", "floods"],
)
def test_cancel_that_is_not_obeyed_ends_the_process(
    play: Callable[[Check], None], step: dict[str, Any], until: str
) -> None:
    """After its time; the turn itself is not held up, and the next one has another process."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", "--no-stop", cancel_seconds=0.1)
        await cancelled(stage, agent, [step], until)
        (pid,) = [process.pid for process in agent_processes()]
        assert text_of(await stage.turn(agent, [tell("pid")], turn=2)) != str(pid)
        assert not is_alive(pid)

    play(check)


class Waiting(GivenSurroundings):
    """A caller who never answers."""

    async def ask(self, *question: Any) -> Answer:
        """Wait for ever."""
        self.asked.append(question)
        await asyncio.Event().wait()
        raise AssertionError


def test_agent_that_dies_while_it_asks_fails_its_turn(play: Callable[[Check], None]) -> None:
    """At once: an answer would be of no use."""

    async def check(stage: Stage) -> None:
        surroundings = Waiting()
        turn = asyncio.create_task(stage.turn(stage.agent("obedient"), [{"do": "permission"}], surroundings))
        await eventually(lambda: surroundings.asked)
        (process,) = agent_processes()
        process.kill()
        with pytest.raises(AgentError) as caught:
            await turn
        assert caught.value.code == "AGENT_CRASHED"

    play(check)


def test_starts_at_once_are_limited(play: Callable[[Check], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait, and their time to start has not begun yet."""
    monkeypatch.setattr("runtime_service.agents.agent_client_protocol.agent._STARTS_AT_ONCE", 1)

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        turns = [asyncio.create_task(stage.turn(agent, "hello", run_id=f"run_{number}")) for number in range(3)]
        most = 0
        while not all(turn.done() for turn in turns):
            starting = [run for run in agent._runs.values() if run.session is not None and not run.session.is_open]
            most = max(most, len(starting))
            await asyncio.sleep(0.005)
        assert most == 1
        assert [text_of(turn.result()) for turn in turns] == ["hello"] * 3

    play(check)


def test_cancel_answers_an_open_question(play: Callable[[Check], None]) -> None:
    """As cancelled, so that the agent can end its turn."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        surroundings = Waiting()
        turn = asyncio.create_task(stage.turn(agent, [{"do": "permission"}, say("x")], surroundings))
        await eventually(lambda: surroundings.asked)
        (pid,) = [process.pid for process in agent_processes()]
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert text_of(await stage.turn(agent, [tell("pid")], turn=2)) == str(pid)

    play(check)


def test_cancel_while_the_process_starts_ends_it(play: Callable[[Check], None]) -> None:
    """Nothing is left of it."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("unruly", "mute")
        turn = asyncio.create_task(stage.turn(agent, "x"))
        await eventually(agent_processes)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        await eventually(lambda: not agent_processes())

    play(check)


# What goes wrong


@pytest.mark.parametrize(
    ("way", "options", "code", "words"),
    [
        ("exits", {"env": {"X": "own-secret"}}, "AGENT_CRASHED", "the exit status 3: no such model: [X]"),
        ("mute", {"start_seconds": 0.3}, "AGENT_START_TIMEOUT", "within 0.3 s (start_seconds)"),
        ("wrong session", {}, "AGENT_PROTOCOL_ERROR", "in NewSessionResponse, sessionId"),
        ("wrong answer", {}, "AGENT_PROTOCOL_ERROR", "in PromptResponse, stopReason"),
        ("wrong error", {}, "AGENT_PROTOCOL_ERROR", "an error that is none"),
        ("broken", {}, "AGENT_PROTOCOL_ERROR", "broken JSON"),
        ("noise", {}, "AGENT_PROTOCOL_ERROR", "'a line that somebody printed'"),
        ("long line", {}, "AGENT_PROTOCOL_ERROR", "more than 8,388,608 bytes"),
        ("closes", {}, "AGENT_CRASHED", "closed its output"),
        ("hangs", {"silence_seconds": 0.2}, "AGENT_SILENT", "silent for 0.2 s (silence_seconds)"),
        ("crashes with children", {}, "AGENT_CRASHED", "the signal SIGSEGV"),
    ],
)
def test_agent_that_breaks_fails_its_turn_in_words(
    play: Callable[[Check], None], way: str, options: dict[str, Any], code: str, words: str
) -> None:
    """No process is left, another run goes on, and so does the run itself with another process."""

    async def check(stage: Stage) -> None:
        other = stage.agent("obedient")
        await stage.turn(other, "x", run_id="other")
        (pid,) = [process.pid for process in agent_processes()]
        agent = stage.agent("unruly", way, **options)
        for _ in range(2):
            said: list[AgentOutput] = []
            failure = await failure_of(stage.collect(said, agent, "x"))
            assert failure.code == code
            assert words in failure.message
            if way == "crashes with children":
                (child,) = [int(output.text) for output in said if isinstance(output, Delta)]
                stage.pids.add(child)
        await eventually(lambda: {process.pid for process in agent_processes()} == {pid})
        await eventually(lambda: [each for each in stage.pids if is_alive(each)] == [pid])
        assert text_of(await stage.turn(other, [tell("pid")], run_id="other", turn=2)) == str(pid)

    play(check)


def test_agent_that_never_reads_fails_its_turn(play: Callable[[Check], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a prompt is larger than its pipe."""
    monkeypatch.setattr("runtime_service.agents.agent_client_protocol.transport._WRITE_SECONDS", 0.3)

    async def check(stage: Stage) -> None:
        failure = await failure_of(stage.turn(stage.agent("unruly", "deaf"), "x" * 1_000_000))
        assert failure.code == "AGENT_SILENT"
        assert "does not read" in failure.message
        await eventually(lambda: not agent_processes())

    play(check)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("no object", "hello"),
        ("chatty", "hello"),
        ("wrong updates", "hello"),
        ("other session", "[-32602, -32602, -32601]hello"),
        ("emoji", "half ?hello"),
        ("many requests", "300 answers, hello"),
    ],
)
def test_what_is_only_strange_is_left_out(play: Callable[[Check], None], way: str, said: str) -> None:
    """Lines that are no messages, updates that are none, requests that are answered with errors."""

    async def check(stage: Stage) -> None:
        outputs = await stage.turn(stage.agent("unruly", way), "x")
        assert text_of(outputs) == said
        warned = [output.content for output in outputs if isinstance(output, Log) and output.type == "protocol"]
        assert len(warned) == (way == "wrong updates")

    play(check)


def test_agent_that_answers_an_error_keeps_its_session(play: Callable[[Check], None]) -> None:
    """Its words reach the caller."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", env={"X": "own-secret"})
        step = {"do": "error", "code": -32603, "message": "Internal error", "data": {"details": "no own-secret left"}}
        failure = await failure_of(stage.turn(agent, [say("a"), step]))
        assert failure.code == "AGENT_ERROR"
        assert "failed: Internal error: no [X] left (-32603)" in failure.message
        step = {"do": "error", "code": -32000, "message": "Authentication required"}
        assert (await failure_of(stage.turn(agent, [step], turn=2))).code == "AGENT_LOGIN_REQUIRED"
        assert text_of(await stage.turn(agent, "x", turn=3)) == "x"

    play(check)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"do": "exit", "status": 0, "last": "bye\n"}, "the exit status 0: bye"),
        ({"do": "signal", "number": int(signal.SIGKILL)}, "the signal SIGKILL"),
    ],
)
def test_agent_that_ends_in_the_middle_fails_its_turn(
    play: Callable[[Check], None], step: dict[str, Any], words: str
) -> None:
    """What it has said is kept."""

    async def check(stage: Stage) -> None:
        said: list[AgentOutput] = []
        call = {"sessionUpdate": "tool_call", "toolCallId": "1", "title": "T"}
        agent = stage.agent("obedient")
        turn = stage.collect(said, agent, [{"do": "update", "updates": [call]}, say("so far"), step])
        failure = await failure_of(turn)
        assert failure.code == "AGENT_CRASHED"
        assert words in failure.message
        # As a draft that no message ends, which the runtime keeps as incomplete.
        assert [output for output in said if isinstance(output, Delta | Message)] == [Delta("so far")]
        assert isinstance(said[-1], Log)
        assert said[-1].level is LogLevel.WARNING
        # That of a later turn dies between two turns: it has another one.
        said = await stage.turn(agent, [tell("pid")], turn=2)
        pid = int(text_of(said))
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not psutil.pid_exists(pid))
        assert text_of(await stage.turn(agent, [tell("pid")], turn=3)) != text_of(said)

    play(check)


def test_command_that_is_not_there_is_told_before_a_turn(tmp_path: Path) -> None:
    """And fails one with what to do."""

    async def check() -> None:
        options = AgentClientProtocolOptions(command="no-such-agent", working_directory=str(tmp_path / "{run_id}"))
        agent = AgentClientProtocolAgent(options)
        reason = agent.unavailable_reason()
        assert reason is not None
        assert "'no-such-agent'" in reason
        failure = await failure_of(anext(agent.run(TurnContext(input="x", metadata={}))))
        assert (failure.code, failure.message) == ("AGENT_NOT_FOUND", reason)
        await agent.close()

    run_async(check())


def test_directory_that_cannot_be_made_fails_the_turn(play: Callable[[Check], None]) -> None:
    """It says what to look at."""

    async def check(stage: Stage) -> None:
        (stage.folder / "work").mkdir()
        (stage.folder / "work" / "run_1").touch()
        failure = await failure_of(stage.turn(stage.agent("obedient"), "x"))
        assert failure.code == "AGENT_WORKING_DIRECTORY"

    play(check)


def test_silence_is_not_counted_while_a_tool_runs(play: Callable[[Check], None]) -> None:
    """Nor while a terminal is waited for."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", silence_seconds=0.2)
        steps = [{"do": "terminal", "command": "sleep 0.6; echo done"}]
        assert "done" in text_of(await stage.turn(agent, steps))

    play(check)


def test_thought_that_silence_cuts_off_is_said(play: Callable[[Check], None]) -> None:
    """It may tell why the agent is silent."""

    async def check(stage: Stage) -> None:
        said: list[AgentOutput] = []
        turn = stage.collect(said, stage.agent("unruly", "thinks", silence_seconds=0.2), "x")
        assert (await failure_of(turn)).code == "AGENT_SILENT"
        assert said[-1] == Log("hello", type="reasoning")

    play(check)


def test_flood_leaves_memory_flat(play: Callable[[Check], None]) -> None:
    """100,000 updates to a reader who takes his time: the agent waits, and all are there, in order."""
    count = 100_000

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        await stage.turn(agent, "x")
        gc.collect()
        before = psutil.Process().memory_info().rss
        most, numbers, messages = before, 0, 0
        context = TurnContext(input=json.dumps([{"do": "flood", "count": count}]), metadata={}, run_id="run_1", turn=2)
        rest = ""
        async with aclosing(agent.run(context)) as outputs:
            async for said in outputs:
                for output in said if isinstance(said, tuple) else (said,):
                    if isinstance(output, Message):
                        messages += 1
                    elif isinstance(output, Delta):
                        *whole, rest = (rest + output.text).split(" ")
                        assert [int(each) for each in whole] == list(range(numbers, numbers + len(whole)))
                        numbers += len(whole)
                if numbers % 1_000 < 64:
                    most = max(most, psutil.Process().memory_info().rss)
        assert numbers == count
        assert messages == 3
        assert most - before < 8 << 20

    play(check)


def test_flood_that_nobody_reads_stays_with_the_agent(play: Callable[[Check], None]) -> None:
    """It is held up by its pipe, before it has said a tenth of it."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        await stage.turn(agent, "x")
        (process,) = agent_processes()
        written: list[int] = []

        def is_still() -> bool:
            written.append(process.io_counters().write_chars)
            return written[-50:] == [written[-1]] * 50

        steps = json.dumps([{"do": "flood", "count": 100_000}])
        async with aclosing(agent.run(TurnContext(input=steps, metadata={}, run_id="run_1", turn=2))) as outputs:
            await anext(outputs)
            await eventually(is_still)
        assert written[-1] - written[0] < 1 << 20

    play(check)


def test_registry_knows_the_kind(tmp_path: Path) -> None:
    """A server of servers.toml is such an agent."""
    path = tmp_path / "servers.toml"
    path.write_text(
        '[servers.coder]\nkind = "agent_runtime"\nagent = "agent_client_protocol"\n'
        '[servers.coder.options]\ncommand = "sh"\nargs = ["-c", "exit"]\n'
        '[[servers.coder.options.mcp_servers]]\nname = "files"\ncommand = "mcp-files"\n'
    )
    server = load_registry(path).resolve("default", "coder", connected=False)
    assert server.agent.session_protocol == "agent-client-protocol"
    assert server.agent.unavailable_reason() is None
