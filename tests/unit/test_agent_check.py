"""What a check of an agent finds: what works, what is missing, and that it ends whatever the agent does."""

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from runtime_service import agent_check
from runtime_service.agent_check import check_agent
from runtime_service.agents import (
    Agent,
    AgentError,
    AgentSays,
    Delta,
    Finding,
    Log,
    Message,
    Option,
    OptionKind,
    ToolCall,
    ToolResult,
    TurnContext,
)
from runtime_service.registry import Server
from tests.support import Script, ScriptedAgent, run_async

ALLOW = Option("allow", "Allow it", OptionKind.ALLOW_ONCE)
REJECT = Option("reject", "Reject it", OptionKind.REJECT_ONCE)


def check(agent: Agent | Script, limit_seconds: float = 10) -> tuple[bool, list[str], list[str]]:
    """Check an agent: whether it works, what does, and what is missing; times are left out."""
    if not isinstance(agent, Agent):
        agent = ScriptedAgent(agent)
    found: list[Finding] = []
    works = run_async(check_agent(Server("mine", "default", agent, 60), found.append, limit_seconds))
    texts = [(re.sub(r"\d+\.\d s", "N s", finding.text), finding.works) for finding in found]
    return works, [text for text, fine in texts if fine], [text for text, fine in texts if not fine]


def test_check_tells_what_a_turn_shows() -> None:
    """The answer and its time, streaming, tools, and the log."""

    async def able(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        yield Log("thinking"), ToolCall("look"), ToolResult("look", "fine"), ToolCall("look"), ToolCall("think")
        yield Delta("Hel")
        yield Delta("lo"), Message("Hello")

    assert check(able) == (
        True,
        [
            "It answers within N s: 'Hello'",
            "It streams: the first piece came after N s.",
            "It calls tools: look, think.",
            "It writes to the execution log; entries: 1.",
        ],
        [],
    )


def test_check_names_no_more_tools_than_can_be_read() -> None:
    """However many an agent calls, and however long their names are."""

    async def busy(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        for number in range(1_000):
            yield ToolCall(f"{number}{'x' * 10_000}")

    works, found, _ = check(busy)
    assert works
    assert found[1].count(", ") == 20
    assert found[1].endswith(", ….")
    assert len(found[1]) < 21_000


def test_check_shows_a_message_that_only_streams_shortened_and_without_control_characters() -> None:
    """However long it is, and whatever it would do to a terminal."""

    async def streaming(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        for _ in range(10_000):
            yield Delta("\x1b[2J")

    works, found, _ = check(streaming)
    assert works
    assert found[0].startswith(r"It answers within N s: '\x1b[2J\x1b[2J")
    assert len(found[0]) < 1_000


def test_check_accepts_an_agent_that_says_nothing() -> None:
    """That is how its turn ends."""

    async def silent(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        return
        yield

    assert check(silent) == (True, ["It ends its turn after N s, without a message."], [])


def test_check_gives_the_agent_a_turn_outside_of_any_run() -> None:
    """One by itself, by whose metadata an agent can know that it is checked."""
    seen: list[Any] = []

    async def curious(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        seen.append((await turn.history(), await turn.latest_log("session"), turn.metadata, turn.turn, turn.server_id))
        assert turn.thread_id.removeprefix("thread_") == turn.run_id.removeprefix("run_")
        yield Message(turn.run_id)

    assert check(curious)[0]
    assert check(curious)[0]
    assert seen == [([], None, {"check": True}, 1, "mine")] * 2


def test_check_answers_no_question_and_allows_nothing() -> None:
    """A permission is denied, a free question gets no text; that it asks is no miss."""

    async def asking(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        permission = await turn.ask("Delete a.txt?", [ALLOW, REJECT])
        name = await turn.ask("What is your name?")
        yield Message(f"{permission.option} {name.text}")

    assert check(asking) == (
        True,
        [
            "It asks: 'Delete a.txt?' (Allow it, Reject it); nobody answers in a check.",
            "It asks: 'What is your name?'; nobody answers in a check.",
            "It answers within N s: 'reject None'",
        ],
        [],
    )


def test_check_takes_a_failure_for_want_of_an_answer_as_such() -> None:
    """With one it might have gone on; without a question the same failure is a miss."""

    async def insisting(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        if (await turn.ask("Go on?", [ALLOW, REJECT])).option != "allow":
            raise AgentError("You did not allow it.", "DENIED")
        yield Message("done")

    works, found, missing = check(insisting)
    assert (works, missing) == (True, [])
    assert found[-1] == "It ends its turn for want of an answer: You did not allow it. (DENIED)"

    async def refusing(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        raise AgentError("The model is away\x1b[2J.\n", "MODEL_AWAY")
        yield

    assert check(refusing) == (False, [], [r"The model is away\x1b[2J.\n (MODEL_AWAY)"])


def test_check_tells_what_the_agent_raised_and_where() -> None:
    """It is for the one who wrote it."""

    async def broken(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        raise ValueError("no such thing")
        yield

    works, _, (missing,) = check(broken)
    assert not works
    assert re.fullmatch(r"It raised ValueError: no such thing \(test_agent_check\.py, line \d+\)", missing)

    async def leaving(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        raise SystemExit(3)
        yield

    assert check(leaving)[2][0].startswith("It raised SystemExit: 3 (")

    async def cancelled(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        raise asyncio.CancelledError
        yield

    assert check(cancelled) == (False, [], ["Something that it waited for was cancelled."])


def test_check_refuses_what_a_run_would_refuse() -> None:
    """An event that is too large, or whose metadata is no JSON."""

    async def heavy(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        yield Message("x" * (1 << 21))

    assert "(EVENT_TOO_LARGE)" in check(heavy)[2][0]

    async def strange(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        yield Log("x", metadata={"a": object()})

    assert "whose metadata is no JSON object" in check(strange)[2][0]


def test_check_of_an_agent_that_is_unavailable_executes_no_turn() -> None:
    """Its reason is the finding."""

    async def unreached(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        yield Message("hello")

    agent = ScriptedAgent(unreached)
    agent.reason = "The model is not installed."
    assert check(agent) == (False, [], ["The model is not installed."])
    assert agent.inputs == []


def test_check_tells_what_the_kind_knows_before_the_turn() -> None:
    """A miss among it keeps the turn from being executed; what was found before is told."""

    class Knowing(ScriptedAgent):
        findings = (Finding("It speaks version 1."), Finding("It offers the modes ask and code."))

        async def check(self) -> AsyncGenerator[Finding]:
            for finding in self.findings:
                yield finding

    async def hello(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        yield Message("hello")

    agent = Knowing(hello)
    assert check(agent) == (
        True,
        ["It speaks version 1.", "It offers the modes ask and code.", "It answers within N s: 'hello'"],
        [],
    )
    agent.findings = (Finding("It speaks version 1."), Finding("Log in with `agent login`.", works=False))
    assert check(agent) == (False, ["It speaks version 1."], ["Log in with `agent login`."])
    assert len(agent.inputs) == 1


def test_check_ends_with_its_time_limit() -> None:
    """The turn is cancelled, and may clean up."""
    cleaned: list[bool] = []

    async def endless(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        try:
            yield Delta("a")
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    assert check(endless, 0.05) == (False, [], ["It has not come to an end after 0.05 s."])
    assert cleaned == [True]


def test_check_ends_though_the_agent_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes no notice of its cancellation is told, and left behind."""
    monkeypatch.setattr(agent_check, "END_SECONDS", 0.05)
    let = asyncio.Event()

    async def stubborn(turn: TurnContext) -> AsyncGenerator[AgentSays]:
        while not let.is_set():
            try:
                await let.wait()
            except asyncio.CancelledError:
                continue
        yield Message("at last")

    async def main() -> list[str]:
        found: list[Finding] = []
        assert not await check_agent(Server("mine", "default", ScriptedAgent(stubborn), 60), found.append, 0.05)
        let.set()
        return [finding.text for finding in found]

    assert run_async(main()) == [
        "It has not come to an end after 0.05 s.",
        "It goes on, 0.05 s after it was cancelled.",
    ]
