"""Agents that speak the Agent Client Protocol and do not end as they should: cancelled, broken, silent, flooding."""

import asyncio
import gc
import json
import logging
import os
import signal
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime_service.agents import (
    AgentError,
    AgentOutput,
    Answer,
    Delta,
    Log,
    Message,
    TurnContext,
)
from runtime_service.agents.agent_client_protocol.agent import AgentClientProtocolAgent
from runtime_service.agents.agent_client_protocol.options import AgentClientProtocolOptions
from runtime_service.registry import load_registry
from runtime_service.runs import LogLevel
from tests.integration.acp_stage import Play, Stage, agent_processes, failure_of, is_alive, say, tell, text_of
from tests.support import GivenSurroundings, eventually, run_async

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


def test_cancel_that_is_obeyed_keeps_the_session(play: Play) -> None:
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
def test_cancel_that_is_not_obeyed_ends_the_process(play: Play, step: dict[str, Any], until: str) -> None:
    """After its time; the turn itself is not held up, and the next one has another process."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", "--no-stop", cancel_seconds=0.1)
        await cancelled(stage, agent, [step], until)
        (pid,) = [process.pid for process in agent_processes()]
        assert text_of(await stage.turn(agent, [tell("pid")], turn=2)) != str(pid)
        assert not is_alive(pid)

    play(check)


def test_cancel_that_is_answered_by_an_error_ends_the_process(play: Play) -> None:
    """Nobody knows what it would do next."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        await cancelled(stage, agent, [{"do": "wait", "fails": True}], "waiting")
        (pid,) = [process.pid for process in agent_processes()]
        assert text_of(await stage.turn(agent, [tell("pid")], turn=2)) != str(pid)

    play(check)


def test_cancel_ends_the_commands_of_its_turn(play: Play) -> None:
    """Those of earlier turns go on, as does the process."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        marks = [stage.folder / name for name in ("earlier", "now")]
        starts = [
            {"do": "start terminal", "command": "sh", "args": ["-c", f"echo $$ > {mark}; exec sleep 600"]}
            for mark in marks
        ]
        await stage.turn(agent, [starts[0]])
        await cancelled(stage, agent, [starts[1], {"do": "wait"}], "waiting")
        await eventually(lambda: all(mark.exists() and mark.read_text() for mark in marks))
        earlier, now = [int(mark.read_text()) for mark in marks]
        stage.pids |= {earlier, now}
        await eventually(lambda: not is_alive(now))
        assert is_alive(earlier)
        (pid,) = [process.pid for process in agent_processes()]
        assert text_of(await stage.turn(agent, [tell("pid")], turn=3)) == str(pid)

    play(check)


class Waiting(GivenSurroundings):
    """A caller who never answers."""

    async def ask(self, *question: Any) -> Answer:
        """Wait for ever."""
        self.asked.append(question)
        await asyncio.Event().wait()
        raise AssertionError


def test_cancel_answers_an_open_question(play: Play) -> None:
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


def test_agent_that_dies_while_it_asks_fails_its_turn(play: Play) -> None:
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


def test_agent_that_dies_with_many_questions_fails_its_turn(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    """With so many that nothing more is read from it; what it cannot be told any more is no news for the log."""

    async def check(stage: Stage) -> None:
        surroundings = Waiting()
        turn = asyncio.create_task(stage.turn(stage.agent("unruly", "asks much"), "x", surroundings))
        await eventually(lambda: surroundings.asked)
        (process,) = agent_processes()
        process.kill()
        assert (await failure_of(turn)).code == "AGENT_CRASHED"

    play(check)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_starts_at_once_are_limited(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cancel_while_the_process_starts_ends_it(play: Play) -> None:
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
        ("many values", {}, "AGENT_PROTOCOL_ERROR", "more than 100,000 values"),
        ("long line", {}, "AGENT_PROTOCOL_ERROR", "more than 8,388,608 bytes"),
        ("closes", {}, "AGENT_CRASHED", "closed its output"),
        ("hangs", {"silence_seconds": 0.2}, "AGENT_SILENT", "silent for 0.2 s (silence_seconds)"),
        ("crashes with children", {}, "AGENT_CRASHED", "the signal SIGSEGV"),
    ],
)
def test_agent_that_breaks_fails_its_turn_in_words(
    play: Play, way: str, options: dict[str, Any], code: str, words: str
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


def test_agent_that_never_reads_fails_its_turn(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
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
        ("other session", "[-32602, -32602, -32602, -32601]hello"),
        ("emoji", "half ?hello"),
        ("many requests", "300 answers, hello"),
    ],
)
def test_what_is_only_strange_is_left_out(play: Play, way: str, said: str) -> None:
    """Lines that are no messages, updates that are none, requests that are answered with errors."""

    async def check(stage: Stage) -> None:
        outputs = await stage.turn(stage.agent("unruly", way), "x")
        assert text_of(outputs) == said
        warned = [output.content for output in outputs if isinstance(output, Log) and output.type == "protocol"]
        assert len(warned) == (way == "wrong updates")

    play(check)


def test_agent_that_answers_an_error_keeps_its_session(play: Play) -> None:
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
def test_agent_that_ends_in_the_middle_fails_its_turn(play: Play, step: dict[str, Any], words: str) -> None:
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


def test_directory_that_cannot_be_made_fails_the_turn(play: Play) -> None:
    """It says what to look at."""

    async def check(stage: Stage) -> None:
        (stage.folder / "work").mkdir()
        (stage.folder / "work" / "run_1").touch()
        failure = await failure_of(stage.turn(stage.agent("obedient"), "x"))
        assert failure.code == "AGENT_WORKING_DIRECTORY"

    play(check)


def test_silence_is_not_counted_while_a_tool_runs(play: Play) -> None:
    """Nor while a terminal is waited for."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", silence_seconds=0.2)
        steps = [{"do": "terminal", "command": "sleep 0.6; echo done"}]
        assert "done" in text_of(await stage.turn(agent, steps))

    play(check)


def test_thought_that_silence_cuts_off_is_said(play: Play) -> None:
    """It may tell why the agent is silent."""

    async def check(stage: Stage) -> None:
        said: list[AgentOutput] = []
        turn = stage.collect(said, stage.agent("unruly", "thinks", silence_seconds=0.2), "x")
        assert (await failure_of(turn)).code == "AGENT_SILENT"
        assert said[-1] == Log("hello", type="reasoning")

    play(check)


def test_flood_leaves_memory_flat(play: Play) -> None:
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


def test_flood_that_nobody_reads_stays_with_the_agent(play: Play) -> None:
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
