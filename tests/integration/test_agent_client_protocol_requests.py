"""What an agent that speaks the Agent Client Protocol may ask for: permissions, answers, files, terminals."""

import json
import logging
import sys
from typing import Any

import pytest

from runtime_service.agents import (
    Answer,
    AnsweredBy,
    Log,
    Option,
    OptionKind,
)
from tests.integration.acp_stage import Play, Stage, is_alive, say, text_of
from tests.support import GivenSurroundings, eventually


def test_permission_is_asked_of_the_caller(play: Play) -> None:
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


@pytest.mark.parametrize(
    ("way", "result"),
    [("asks later", {"outcome": {"outcome": "cancelled"}}), ("asks later in a form", {"action": "cancel"})],
)
def test_question_outside_of_a_turn_is_cancelled(play: Play, way: str, result: object) -> None:
    """There is nobody to be asked."""

    async def check(stage: Stage) -> None:
        surroundings = GivenSurroundings(answers=[Answer(AnsweredBy.CALLER, option="yes")])
        await stage.turn(stage.agent("unruly", way), "x", surroundings)
        # The process began in its run's directory.
        answer = stage.folder / "work" / "run_1" / "answer"
        await eventually(lambda: answer.exists() and answer.read_text().endswith("\n"))
        assert json.loads(answer.read_text())["result"] == result
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
    play: Play, schema: dict[str, Any], answer: Answer | None, result: object
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


def test_files_are_served_inside_of_the_directory(play: Play) -> None:
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


def test_terminals_run_in_the_directory(play: Play) -> None:
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


def test_terminals_that_end_or_are_asked_for_strangely(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    """The agent is told so, and the log of the service says nothing."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient")
        said = await stage.turn(agent, [{"do": "terminal", "command": "kill -40 $$"}])
        assert json.loads(text_of(said))[:2] == [None, "40"]
        for name in ("", "A=B"):
            params = {"command": "true", "env": [{"name": name, "value": "x"}]}
            said = await stage.turn(agent, [{"do": "request", "method": "terminal/create", "params": params}])
            assert json.loads(text_of(said))["code"] == -32602

    play(check)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_terminals_are_few_and_know_no_secret(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at once; a command sees of the environment what the agent does."""
    monkeypatch.setenv("SECRET_OF_THE_RUNTIME", "x")

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", env={"OWN": "z"})
        code, _, output, _ = json.loads(text_of(await stage.turn(agent, [{"do": "terminal", "command": "env"}])))
        assert code == 0
        assert "OWN=z" in output.splitlines()
        assert "SECRET_OF_THE_RUNTIME" not in output
        start = {"do": "request", "method": "terminal/create", "params": {"command": "true"}}
        ask = [json.loads(text_of(await stage.turn(agent, [start]))) for _ in range(9)]
        assert ["terminalId" in each for each in ask] == [True] * 8 + [False]
        assert ask[-1]["code"] == -32602

    play(check)


def test_terminals_end_with_the_session(play: Play) -> None:
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


def test_settings_refuse_files_and_terminals(play: Play) -> None:
    """An agent that asks all the same is told so."""

    async def check(stage: Stage) -> None:
        agent = stage.agent("obedient", files="refuse", terminals="refuse")
        read = {"do": "request", "method": "fs/read_text_file", "params": {"path": "x"}}
        run = {"do": "request", "method": "terminal/create", "params": {"command": "ls"}}
        for step in (read, run):
            assert json.loads(text_of(await stage.turn(agent, [step])))["code"] == -32601

    play(check)
