"""The agents in examples/, each with its own servers.toml, through REST as their users would."""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic_ai.models.function import DeltaToolCall, DeltaToolCalls, FunctionModel

from runtime_service.agents import Delta, Log, Message, TurnContext
from runtime_service.registry import ConfigurationError, load_registry
from tests.acceptance.processes import command
from tests.integration.stack import Answer, Stack, runs, serving
from tests.support import GivenSurroundings, run_async

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def restored_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reading a servers.toml puts its folder on the path; what was found there is forgotten."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("table_booking", "store_keeper", "newsletter", "acp_table_booking"):
        sys.modules.pop(name, None)


def said(answer: Answer) -> list[tuple[str, str | None]]:
    """The events of an answer: what they say, and of which type they are."""
    return [(event["content"], event.get("logType")) for event in answer.events]


def states(answer: Answer) -> tuple[int, str, str]:
    """Status of the answer, the run and its thread."""
    return answer.status, answer.run["status"], answer.run["threadStatus"]


async def reply(stack: Stack, server: str, run: str, content: str) -> Answer:
    """Answer what a run asks, or go on with it."""
    return await stack.call("POST", f"{runs(server)}/{run}/input", {"content": content})


def example(name: str) -> Path:
    """The servers.toml of an example."""
    return EXAMPLES / name / "servers.toml"


ASKS = (202, "running", "permission_asked")
DONE = (200, "completed", "completed")


# -- A function ----------------------------------------------------------------------------------------


def test_function_asks_how_many_and_whether(tmp_path: Path) -> None:
    """A free question, then a permission; with both it books, and logs that."""

    async def main() -> None:
        async with serving(tmp_path, servers=example("function")) as stack:
            first = await stack.start("booking", "a table, please")
            assert states(first) == ASKS
            assert said(first)[1:] == [("For how many people?", "permission_request")]
            run = first.run["id"]
            second = await reply(stack, "booking", run, "we are 4")
            assert states(second) == ASKS
            assert said(second)[1:] == [("Book a table for 4 at eight?", "permission_request")]
            third = await reply(stack, "booking", run, "book")
            assert states(third) == DONE
            assert said(third)[1:] == [
                ("table for 4 at 20:00", "booking"),
                ("A table for 4 is booked for eight o'clock.", None),
            ]

    run_async(main())


def test_function_does_nothing_without_permission(tmp_path: Path) -> None:
    """By the option's name, too."""

    async def main() -> None:
        async with serving(tmp_path, servers=example("function")) as stack:
            first = await stack.start("booking", "a table for 2")
            last = await reply(stack, "booking", first.run["id"], "Leave it")
            assert states(last) == DONE
            assert said(last)[1:] == [("Then I leave it.", None)]

    run_async(main())


# -- pydantic-ai ---------------------------------------------------------------------------------------


def test_pydantic_ai_tool_is_in_the_log_and_the_answer_streams(tmp_path: Path) -> None:
    """The call with its arguments, its result under the same id, the text in pieces, and the usage."""

    async def main() -> None:
        async with serving(tmp_path, servers=example("pydantic_ai_tools")) as stack:
            async with stack.stream("POST", runs("keeper"), {"content": "How much sugar is there?"}) as stream:
                frames = await stream.rest()
            events = [frame.document["event"] for frame in frames if frame.type == "run.event"]
            called, result, message = events[-3:]
            assert (called["logType"], called["metadata"]["name"]) == ("tool_call", "count")
            assert called["metadata"]["arguments"] == {"item": "sugar"}
            assert (result["logType"], result["content"]) == ("tool_result", "There are 3 bags of sugar.")
            assert result["metadata"]["id"] == called["metadata"]["id"]
            assert message["content"] == "There are 3 bags of sugar."
            assert message["metadata"]["model"] == "function::rules"
            assert message["metadata"]["usage"]["output_tokens"] > 0
            assert frames[-1].type == "stream.completed"

    run_async(main())


@pytest.mark.parametrize(
    ("choice", "outcome", "level"),
    [
        ("allow", "5 bags of sugar are ordered.", "success"),
        ("reject", "The caller did not allow it.", "error"),
    ],
)
def test_pydantic_ai_tool_that_spends_money_needs_permission(
    tmp_path: Path, choice: str, outcome: str, level: str
) -> None:
    """The call is logged once, before the question; the tool runs only if it is allowed."""

    async def main() -> None:
        async with serving(tmp_path, servers=example("pydantic_ai_tools")) as stack:
            first = await stack.start("keeper", "Order 5 bags of sugar")
            assert states(first) == ASKS
            assert said(first)[1:] == [
                ("order", "tool_call"),
                ('May I call order with {"item":"sugar","quantity":5}?', "permission_request"),
            ]
            assert first.events[2]["metadata"]["toolCallId"] == first.events[1]["metadata"]["id"]
            last = await reply(stack, "keeper", first.run["id"], choice)
            assert states(last) == DONE
            assert said(last)[1:] == [(outcome, "tool_result"), (outcome, None)]
            assert last.events[1]["logLevel"] == level

    run_async(main())


def test_pydantic_ai_answer_is_seen_while_the_model_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first piece is there before the model has said the second."""

    async def main() -> None:
        async with serving(tmp_path, servers=example("pydantic_ai_tools")) as stack:
            go_on = asyncio.Event()

            async def halting(messages: list[Any], info: object) -> AsyncIterator[str]:
                yield "half "
                await go_on.wait()
                yield "and half"

            monkeypatch.setattr(sys.modules["store_keeper"].keeper, "model", FunctionModel(stream_function=halting))
            async with stack.stream("POST", runs("keeper"), {"content": "speak"}) as stream:
                seen = await stream.until(lambda frame: frame.type == "run.delta")
                assert seen[-1].document["text"] == "half "
                go_on.set()
                rest = await stream.rest()
            assert rest[-1].document["run"]["output"] == "half and half"

    run_async(main())


def test_pydantic_ai_words_before_a_call_are_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand before the call; a call that the tool refuses is a result that failed."""

    async def main() -> None:
        async with serving(tmp_path, servers=example("pydantic_ai_tools")) as stack:
            turns: Iterator[list[Any]] = iter(
                [["Let me look.", {1: DeltaToolCall("count", '{"thing": "sugar"}')}], ["I cannot."]]
            )

            async def speaking(messages: list[Any], info: object) -> AsyncIterator[str | DeltaToolCalls]:
                for each in next(turns):
                    yield each

            monkeypatch.setattr(sys.modules["store_keeper"].keeper, "model", FunctionModel(stream_function=speaking))
            answer = await stack.start("keeper", "count")
            shown = [(event["role"], event.get("logType"), event.get("logLevel")) for event in answer.events[1:]]
            assert shown == [
                ("assistant", None, None),
                ("execution_log", "tool_call", "info"),
                ("execution_log", "tool_result", "error"),
                ("assistant", None, None),
            ]
            assert [answer.events[n]["content"] for n in (1, 4)] == ["Let me look.", "I cannot."]

    run_async(main())


def test_pydantic_ai_agent_gets_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees what was said in the turns before."""

    async def main() -> None:
        async with serving(tmp_path, servers=example("pydantic_ai_tools")) as stack:
            seen: list[list[str]] = []

            async def listening(messages: list[Any], info: object) -> AsyncIterator[str]:
                seen.append([part.content for message in messages for part in message.parts])
                yield "noted"

            monkeypatch.setattr(sys.modules["store_keeper"].keeper, "model", FunctionModel(stream_function=listening))
            first = await stack.start("keeper", "one")
            await reply(stack, "keeper", first.run["id"], "two")
            assert seen == [["one"], ["one", "noted", "two"]]

    run_async(main())


# -- LangGraph -----------------------------------------------------------------------------------------


def test_langgraph_interrupt_is_a_question_that_resumes_the_graph(tmp_path: Path) -> None:
    """A wish makes another draft, a yes lets it go out; each step is in the log."""

    async def main() -> None:
        async with serving(tmp_path, servers=example("langgraph_approval")) as stack:
            question = ("Shall it go out like this? Say yes, or what to change.", "permission_request")
            first = await stack.start("newsletter", "bread")
            assert states(first) == ASKS
            assert said(first)[1:] == [("This month: bread.", None), question]
            run = first.run["id"]
            second = await reply(stack, "newsletter", run, "with a recipe")
            assert said(second)[1:] == [
                ("review is done", "step"),
                ("This month: bread. (with a recipe)", None),
                question,
            ]
            third = await reply(stack, "newsletter", run, "yes")
            assert states(third) == DONE
            assert said(third)[1:] == [("review is done", "step"), ("send is done", "step")]
            # What was answered was no topic; what the run began with is one.
            fourth = await reply(stack, "newsletter", run, "cake")
            assert said(fourth)[1] == ("This month: bread and cake.", None)

    run_async(main())


def test_langgraph_node_streams_what_it_writes() -> None:
    """A delta a word, then the message; without an answer to its question it ends without sending."""
    registry = load_registry(example("langgraph_approval"))
    agent = registry.servers["newsletter"].agent
    turn = TurnContext(input="bread", metadata={}, run_id="run_1", surroundings=GivenSurroundings())

    async def main() -> list[object]:
        return [output async for output in agent.run(turn)]

    said = run_async(main())
    assert said[:4] == [Delta("This "), Delta("month: "), Delta("bread."), Message("This month: bread.")]
    assert [each.content for each in said[4:] if isinstance(each, Log)] == ["review is done"]


# -- A package -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package of the plug-in is installed: in a folder of its own, without a network."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(EXAMPLES / "plugin", source)
    target = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, source], check=True)
    return target


def test_package_brings_a_kind_of_agent(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found by its entry point, takes its options, and serves runs."""
    monkeypatch.syspath_prepend(str(installed))

    async def main() -> None:
        async with serving(tmp_path, servers=example("plugin")) as stack:
            first = await stack.start("booking", "a table for 5")
            assert said(first)[1:] == [("Book a table for 5 at The Blue Door?", "permission_request")]
            last = await reply(stack, "booking", first.run["id"], "book")
            assert (last.run["status"], last.run["output"]) == (
                "completed",
                "A table for 5 is booked at The Blue Door.",
            )
            again = await stack.start("booking", "a table for 2")
            last = await reply(stack, "booking", again.run["id"], "book")
            assert (last.run["status"], last.run["errorCode"]) == ("failed", "FULLY_BOOKED")
            assert last.run["error"] == "The Blue Door has only 1 seats left."

    run_async(main())


def test_kind_of_a_package_that_is_not_installed_is_unknown() -> None:
    """The example's servers.toml names it; without the package it is no kind."""
    with pytest.raises(ConfigurationError, match="an agent runtime needs `agent`, one of"):
        load_registry(example("plugin"))


# -- Checked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("function", "It asks: 'For how many people?'"),
        ("pydantic_ai_tools", "It answers within"),
        ("langgraph_approval", "It asks: 'Shall it go out like this?"),
        ("plugin", "The Blue Door has 6 free seats."),
    ],
)
def test_example_passes_its_check(installed: Path, tmp_path: Path, name: str, found: str) -> None:
    """`acp-gateway agents check` finds nothing missing, with the package installed."""
    arguments = ("gateway", "agents", "check", "--servers", str(example(name)))
    checked = command(tmp_path, *arguments, environment={"PYTHONPATH": f"{EXAMPLES.parent}:{installed}"})
    assert (checked.returncode, checked.stderr) == (0, "")
    assert f"  works    {found}" in checked.stdout
    assert "All agents work." in checked.stdout
