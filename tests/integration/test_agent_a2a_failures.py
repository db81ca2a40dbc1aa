"""The `a2a` agent with the official client, against servers that speak the protocol badly or not at all."""

import asyncio
import json
import logging
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web

from runtime_service.agents import AgentError, Answer, AnsweredBy, Delta, Log, Message, TurnContext
from runtime_service.agents.a2a import connection as a2a_connection
from runtime_service.agents.a2a import conversation as a2a_conversation
from runtime_service.agents.a2a.agent import A2AAgent
from runtime_service.agents.a2a.options import A2AOptions
from tests.support import GivenSurroundings, run_async

SECRET = "very-secret-of-the-tests"
VARIABLE = "A2A_SECRET_OF_THE_TESTS"
FLOOD = 100_000

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]
CardHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]

WORKING = {"task": {"id": "t", "contextId": "c", "status": {"state": "TASK_STATE_WORKING"}}}
COMPLETED = {"statusUpdate": {"taskId": "t", "contextId": "c", "status": {"state": "TASK_STATE_COMPLETED"}}}


def piece(text: str, *, append: bool = True) -> dict[str, Any]:
    """A piece of the artifact `a`."""
    artifact = {"artifactId": "a", "parts": [{"text": text}]}
    return {"artifactUpdate": {"taskId": "t", "contextId": "c", "artifact": artifact, "append": append}}


def framed(event: object) -> bytes:
    """A result as an event of the stream; text as it is."""
    data = event if isinstance(event, str) else json.dumps({"jsonrpc": "2.0", "id": 1, "result": event})
    return f"data: {data}\n\n".encode()


async def begin_stream(request: web.Request, *events: object) -> web.StreamResponse:
    """Send events, and leave the stream open."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        await response.write(framed(event))
    return response


def streaming(*events: object) -> Handler:
    """A handler that sends these events and ends."""

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        return await begin_stream(request, *events)

    return handle


def answering(status: int = 200, body: str = "", content_type: str = "application/json") -> Handler:
    """A handler that answers with this."""

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=status, text=body, content_type=content_type)

    return handle


def card_of(request: web.Request, **more: Any) -> dict[str, Any]:
    """The card of the server that is asked."""
    interface = {"url": f"http://{request.host}/a2a", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}
    return {"name": "bad", "capabilities": {"streaming": True}, "supportedInterfaces": [interface]} | more


async def give_card(request: web.Request) -> web.StreamResponse:
    """Answer with the card."""
    return web.json_response(card_of(request))


def given(body: str) -> CardHandler:
    """A handler that gives this for a card."""

    async def give(request: web.Request) -> web.StreamResponse:
        return web.Response(text=body)

    return give


@asynccontextmanager
async def serving(handler: Handler, card: CardHandler = give_card) -> AsyncIterator[str]:
    """Serve an agent whose calls go to `handler`, with the method and the params; gives its base URL."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(request, await request.json())

    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/.well-known/agent-card.json", card)
    app.router.add_post("/a2a", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def ask(url: str, **options: Any) -> list[str]:
    """The messages that an agent at this address says in one turn."""
    agent = A2AAgent(A2AOptions(url, **options))
    turn = TurnContext(input="hi", metadata={}, run_id="run", surroundings=GivenSurroundings())
    try:
        said: list[str] = []
        async for output in agent.run(turn):
            each = output if isinstance(output, tuple) else (output,)
            said += [one.content for one in each if isinstance(one, Message)]
        return said
    finally:
        await agent.close()


def messages_of(handler: Handler, card: CardHandler = give_card, **options: Any) -> list[str]:
    """The messages that the agent says when the remote one is `handler`."""

    async def run() -> list[str]:
        async with serving(handler, card) as url:
            return await ask(url, **options)

    return run_async(run())


def failure_of(handler: Handler, card: CardHandler = give_card, **options: Any) -> AgentError:
    """How the agent fails when the remote one is `handler`."""
    with pytest.raises(AgentError) as caught:
        messages_of(handler, card, **options)
    return caught.value


@pytest.fixture
def _brief_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a2a_conversation, "_TAKE_UP_PAUSES_SECONDS", (0, 0.01, 0.01))


def test_a2a_agent_fails_when_nobody_listens() -> None:
    """A server that is not there is AGENT_UNREACHABLE."""

    async def run() -> None:
        async with serving(streaming()) as url:
            pass
        await ask(url)

    with pytest.raises(AgentError) as caught:
        run_async(run())
    assert caught.value.code == "AGENT_UNREACHABLE"
    assert "url" in caught.value.message


@pytest.mark.parametrize(
    ("status", "of_card", "of_call"),
    [
        (401, "AGENT_AUTHENTICATION_FAILED", "AGENT_AUTHENTICATION_FAILED"),
        (403, "AGENT_AUTHENTICATION_FAILED", "AGENT_AUTHENTICATION_FAILED"),
        (404, "AGENT_CARD_MISSING", "AGENT_NOT_FOUND"),
        (302, "AGENT_REQUEST_INVALID", "AGENT_REQUEST_INVALID"),
        (400, "AGENT_REQUEST_INVALID", "AGENT_REQUEST_INVALID"),
        (429, "AGENT_RATE_LIMITED", "AGENT_RATE_LIMITED"),
        (503, "AGENT_ERROR", "AGENT_ERROR"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
def test_a2a_agent_translates_each_status(status: int, of_card: str, of_call: str, stream: bool) -> None:
    """Of the card and of a call, each has its code and says which status it was."""

    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    for error, code in (
        (failure_of(streaming(), refuse), of_card),
        (failure_of(answering(status), streaming=stream), of_call),
    ):
        assert error.code == code
        assert f"HTTP {status}" in error.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("no json", "no agent card"),
        ("[1]", "no agent card"),
        ('{"name": 5}', "no agent card"),
        ("<html>It works!</html>", "no agent card"),
        ('{"name": "x"}', "no way to speak to it"),
        ('{"supportedInterfaces": [{"url": "http://h", "protocolBinding": "GRPC"}]}', "offers GRPC"),
        ('{"supportedInterfaces": [{"url": "h", "protocolBinding": "JSONRPC"}]}', "offers JSONRPC"),
    ],
)
def test_a2a_agent_fails_on_what_is_no_card(body: str, words: str) -> None:
    """A card that cannot be used is AGENT_CARD_INVALID."""
    error = failure_of(streaming(), given(body))
    assert error.code == "AGENT_CARD_INVALID"
    assert words in error.message


def test_a2a_agent_tells_what_an_unusable_card_offers_in_few_words() -> None:
    """However much that is: the message becomes part of the run."""
    interfaces = [{"url": "ftp://h", "protocolBinding": f"{number:0200}"} for number in range(1_000)]
    error = failure_of(streaming(), given(json.dumps({"supportedInterfaces": interfaces})))
    assert error.code == "AGENT_CARD_INVALID"
    assert "at ftp://h" in error.message
    assert len(error.message) < 500


GARBAGE = [
    "no json",
    "42",
    "[1]",
    '{"result": 3}',
    '{"result": {}}',
    '{"result": {"task": 5}}',
    '{"result": {"task": {"id": {}}}}',
    '{"result": {"artifactUpdate": {"artifact": {"parts": [{"text": 5}]}}}}',
    '{"error": 7}',
    "{}",
    json.dumps({"result": {"task": {"id": "i" * 1000}}}),
    '{"result": {"task": {"metadata": ' + '{"a":' * 500 + "1" + "}" * 500 + "}}}",
]


@pytest.mark.parametrize("body", GARBAGE)
@pytest.mark.parametrize("how", ["stream", "answer", "poll"])
def test_a2a_agent_fails_on_garbage(body: str, how: str) -> None:
    """What is not of the protocol is AGENT_PROTOCOL_ERROR, as an event and as an answer."""
    handler = streaming(body) if how == "stream" else answering(body=body)
    error = failure_of(handler, streaming=how != "poll")
    assert error.code == "AGENT_PROTOCOL_ERROR"


def test_a2a_agent_says_data_that_json_cannot_carry() -> None:
    """Numbers that are none, and what is nested without end, are null; the rest is said."""
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    data = '{"n": NaN, "i": Infinity, "deep": ' + json.dumps(deep) + ', "ok": 1}'
    body = '{"result": {"message": {"messageId": "m", "parts": [{"data": ' + data + "}]}}}"
    assert messages_of(streaming(body)) == ["data"]


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (-32602, "AGENT_REQUEST_INVALID"),
        (-32004, "AGENT_REQUEST_INVALID"),
        (-32603, "AGENT_ERROR"),
        (-32000, "AGENT_ERROR"),
        (-32001, "AGENT_TASK_UNKNOWN"),
        (-32601, "AGENT_PROTOCOL_ERROR"),
    ],
)
@pytest.mark.parametrize("stream", [True, False], ids=["event", "answer"])
def test_a2a_agent_translates_errors_and_keeps_secrets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int, code: str, stream: bool
) -> None:
    """An error of the protocol has a code; a secret that the agent repeats is in neither message nor log."""
    monkeypatch.setenv(VARIABLE, f" {SECRET}\n")
    # The second one is where the message is cut.
    text = f"no good: {SECRET} ".ljust(290, "x") + SECRET
    error = {"code": number, "message": text}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "error": error})
    with caplog.at_level(logging.INFO):
        failure = failure_of(streaming(body) if stream else answering(body=body), api_key_env=VARIABLE)
    assert failure.code == code
    assert SECRET[:6] not in failure.message
    assert SECRET[:6] not in caplog.text


def test_a2a_agent_sends_its_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The credentials go along with the card's request and with each call."""
    monkeypatch.setenv(VARIABLE, SECRET)
    seen: list[tuple[str | None, str | None]] = []

    def note(request: web.Request) -> None:
        seen.append((request.headers.get("Authorization"), request.headers.get("X-Key")))

    async def card(request: web.Request) -> web.StreamResponse:
        note(request)
        return await give_card(request)

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        note(request)
        return await begin_stream(request, WORKING, COMPLETED)

    messages_of(handle, card, api_key_env=VARIABLE, headers_env={"X-Key": VARIABLE})
    assert seen == [(f"Bearer {SECRET}", SECRET)] * 2


def test_a2a_agent_sends_its_secrets_to_known_hosts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that names another host gets no credentials there, unless the options name it, too."""
    monkeypatch.setenv(VARIABLE, SECRET)

    async def card(request: web.Request) -> web.StreamResponse:
        port = request.host.rpartition(":")[2]
        interface = {"url": f"http://localhost:{port}/a2a", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}
        return web.json_response(card_of(request, supportedInterfaces=[interface]))

    hello = {"message": {"messageId": "m", "parts": [{"text": "hello"}]}}
    error = failure_of(streaming(hello), card, api_key_env=VARIABLE)
    assert error.code == "AGENT_CARD_INVALID"
    assert "secrets_hosts" in error.message
    known = {"api_key_env": VARIABLE, "secrets_hosts": ("localhost",)}
    assert messages_of(streaming(hello), card, **known) == ["hello"]
    assert messages_of(streaming(hello), card) == ["hello"]
    assert not A2AOptions("https://a.example").may_see_secrets("http://a.example/a2a")


def test_a2a_agent_keeps_no_cookies() -> None:
    """All runs share the client: what one of them is given says nothing of the others."""
    seen: list[dict[str, str]] = []

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        seen.append(dict(request.cookies))
        response = web.json_response({"result": {"message": {"messageId": "m"}}})
        response.set_cookie("session", "of the first")
        return response

    async def run() -> None:
        async with serving(handle) as url:
            agent = A2AAgent(A2AOptions(url, streaming=False))
            for _ in range(2):
                async for _ in agent.run(TurnContext(input="hi", metadata={})):
                    pass
            await agent.close()

    run_async(run())
    assert seen == [{}, {}]


@pytest.mark.parametrize("value", [None, "", "  ", "schlüssel", "two\nlines"])
def test_a2a_agent_is_unavailable_without_its_secret(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """A named variable that holds nothing which a header can carry is a reason that names it, and not what it holds."""
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    reason = A2AAgent(A2AOptions("http://a.example", headers_env={"X-Key": VARIABLE})).unavailable_reason()
    assert reason is not None
    assert VARIABLE in reason
    error = failure_of(streaming(), headers_env={"X-Key": VARIABLE})
    assert error.code == "AGENT_UNAVAILABLE"
    monkeypatch.setenv(VARIABLE, SECRET)
    assert A2AAgent(A2AOptions("http://a.example", headers_env={"X-Key": VARIABLE})).unavailable_reason() is None


@pytest.mark.parametrize("events", [None, [], [WORKING], [WORKING, piece("a")]])
def test_a2a_agent_fails_when_the_remote_agent_is_silent(events: list[object] | None) -> None:
    """Silence before the answer, at its beginning and in its middle is AGENT_SILENT, and the task is cancelled."""
    cancelled: list[object] = []

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        if call["method"] == "CancelTask":
            cancelled.append(call["params"])
            return web.json_response({"jsonrpc": "2.0", "id": 1, "result": WORKING["task"]})
        if events is not None:
            await begin_stream(request, *events)
        await asyncio.Event().wait()
        raise AssertionError

    error = failure_of(handle, timeout_seconds=0.3)
    assert error.code == "AGENT_SILENT"
    assert "0.3 s" in error.message
    assert cancelled == ([{"id": "t"}] if events else [])


def test_a2a_agent_fails_when_the_card_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """All turns that wait for the card fail at the end of one time limit, which is not that of an answer."""
    monkeypatch.setattr(a2a_connection, "_CALL_SECONDS", 0.4)

    async def card(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    async def run() -> None:
        async with serving(streaming(), card) as url:
            agent = A2AAgent(A2AOptions(url))

            async def one() -> str:
                with pytest.raises(AgentError) as caught:
                    async for _ in agent.run(TurnContext(input="hi", metadata={})):
                        pass
                assert caught.value.message.endswith("was silent for 0.4 s. Try again.")
                return caught.value.code

            async with asyncio.timeout(10):
                assert await asyncio.gather(*(one() for _ in range(50))) == ["AGENT_SILENT"] * 50
            await agent.close()

    run_async(run())


def test_a2a_agent_fails_when_polling_brings_nothing_new() -> None:
    """A task that never changes is as silent as a stream without events."""

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        result = WORKING if call["method"] == "SendMessage" else WORKING["task"]
        return web.json_response({"jsonrpc": "2.0", "id": 1, "result": result})

    assert failure_of(handle, streaming=False, timeout_seconds=0.5).code == "AGENT_SILENT"


def test_a2a_agent_fails_when_the_remote_agent_hangs_up_at_once() -> None:
    """A connection that is closed without an answer is AGENT_UNREACHABLE: nothing has begun that could be cut."""

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        raise AssertionError

    error = failure_of(handle)
    assert error.code == "AGENT_UNREACHABLE"
    assert "without an answer" in error.message


def test_a2a_agent_reads_the_card_again_after_a_failure() -> None:
    """An agent that has moved is found in the next turn."""
    paths = iter(["gone", "a2a"])

    async def card(request: web.Request) -> web.StreamResponse:
        url = f"http://{request.host}/{next(paths)}"
        interface = {"url": url, "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}
        return web.json_response(card_of(request, supportedInterfaces=[interface]))

    async def run() -> None:
        async with serving(streaming(WORKING, piece("here"), COMPLETED), card) as url:
            agent = A2AAgent(A2AOptions(url))
            said: list[object] = []
            with pytest.raises(AgentError) as caught:
                await anext(agent.run(TurnContext(input="hi", metadata={})))
            assert caught.value.code == "AGENT_NOT_FOUND"
            for _ in range(2):  # the third turn asks for no card
                async for output in agent.run(TurnContext(input="hi", metadata={})):
                    said.extend(output if isinstance(output, tuple) else (output,))
            assert [each.content for each in said if isinstance(each, Message)] == ["here", "here"]
            await agent.close()

    run_async(run())


@pytest.mark.usefixtures("_brief_pauses")
@pytest.mark.parametrize("cleanly", [True, False])
def test_a2a_agent_takes_up_a_stream_that_is_cut(cleanly: bool) -> None:
    """A stream that breaks off in the middle of a task is taken up; what was said is not said twice."""
    methods: list[str] = []

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        methods.append(call["method"])
        if call["method"] == "SendStreamingMessage":
            response = await begin_stream(request, WORKING, piece("one "), piece("two "))
            if not cleanly:
                assert request.transport is not None
                request.transport.close()
            return response
        artifact = {"artifactId": "a", "parts": [{"text": "one "}, {"text": "two "}, {"text": "three "}]}
        return await begin_stream(
            request, {"task": WORKING["task"] | {"artifacts": [artifact]}}, piece("four"), COMPLETED
        )

    assert messages_of(handle) == ["one two three four"]
    assert methods == ["SendStreamingMessage", "SubscribeToTask"]


@pytest.mark.usefixtures("_brief_pauses")
@pytest.mark.parametrize("refusal", [-32601, -32004, 404])
def test_a2a_agent_polls_a_task_whose_stream_cannot_be_taken_up(refusal: int) -> None:
    """Some agents stream only what they are asked at the time: they know no such method, or have no such address."""
    methods: list[str] = []

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        methods.append(call["method"])
        match call["method"]:
            case "SendStreamingMessage":
                return await begin_stream(request, WORKING)
            case "SubscribeToTask" if refusal > 0:
                return web.Response(status=refusal)
            case "SubscribeToTask":
                return web.json_response({"error": {"code": refusal, "message": "no"}})
        artifacts = [piece("there")["artifactUpdate"]["artifact"]]
        task = WORKING["task"] | {"status": {"state": "TASK_STATE_COMPLETED"}, "artifacts": artifacts}
        return web.json_response({"result": task})

    assert messages_of(handle) == ["there"]
    assert methods == ["SendStreamingMessage", "SubscribeToTask", "GetTask"]


@pytest.mark.usefixtures("_brief_pauses")
def test_a2a_agent_fails_on_a_stream_that_is_always_cut() -> None:
    """After a few times in a row the turn fails as AGENT_STREAM_CUT."""
    methods: list[str] = []

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        methods.append(call["method"])
        return await begin_stream(request, WORKING)

    assert failure_of(handle).code == "AGENT_STREAM_CUT"
    assert methods == ["SendStreamingMessage", *["SubscribeToTask"] * 3, "CancelTask"]


@pytest.mark.usefixtures("_brief_pauses")
def test_a2a_agent_waits_for_a_task_whose_streams_are_cut_for_their_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is between may end each stream that is silent for a minute: the agent may be silent for longer."""
    monkeypatch.setattr(a2a_conversation, "_LASTING_SECONDS", 0.0)
    calls = 0

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        return await begin_stream(request, WORKING, *([piece("at last"), COMPLETED] if calls == 10 else []))

    assert messages_of(handle) == ["at last"]
    calls = 11
    assert failure_of(handle, timeout_seconds=0.3).code == "AGENT_SILENT"


@pytest.mark.usefixtures("_brief_pauses")
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("stream", [True, False])
def test_a2a_agent_waits_for_a_task_whose_agent_is_away(status: int, stream: bool) -> None:
    """A restart behind a proxy, or a limit on requests, does not end the turn, where the task is known."""
    calls = 0

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        if calls in (2, 3):
            return web.Response(status=status)
        if stream:
            return await begin_stream(request, WORKING, *([piece("back"), COMPLETED] if calls == 4 else []))
        state = {"status": {"state": "TASK_STATE_WORKING" if calls == 1 else "TASK_STATE_COMPLETED"}}
        task = WORKING["task"] | state | {"artifacts": [piece("back")["artifactUpdate"]["artifact"]]}
        return web.json_response({"result": {"task": task} if calls == 1 else task})

    assert messages_of(handle, streaming=stream) == ["back"]
    assert calls == 4


@pytest.mark.usefixtures("_brief_pauses")
def test_a2a_agent_fails_where_an_answer_may_not_have_arrived() -> None:
    """To wait for the task then would be to wait for nothing."""
    asking = {"task": WORKING["task"] | {"status": {"state": "TASK_STATE_INPUT_REQUIRED"}}}
    methods: list[str] = []

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        methods.append(call["method"])
        return await begin_stream(request, asking) if len(methods) == 1 else web.Response(status=503)

    async def run() -> str:
        async with serving(handle) as url:
            agent = A2AAgent(A2AOptions(url))
            answers = GivenSurroundings(answers=[Answer(AnsweredBy.CALLER, text="blue")])
            with pytest.raises(AgentError) as caught:
                async for _ in agent.run(TurnContext(input="hi", metadata={}, surroundings=answers)):
                    pass
            await agent.close()
            return caught.value.code

    assert run_async(run()) == "AGENT_ERROR"
    assert methods == ["SendStreamingMessage", "SendStreamingMessage", "CancelTask"]


@pytest.mark.usefixtures("_brief_pauses")
def test_a2a_agent_takes_up_a_stream_as_often_as_it_brings_something() -> None:
    """An agent, or what is between, that ends each stream after a while does no harm."""
    calls = 0

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        return await begin_stream(request, WORKING, piece(f"{calls} "), *([COMPLETED] if calls == 10 else []))

    assert messages_of(handle) == ["1 2 3 4 5 6 7 8 9 10 "]


def test_a2a_agent_sends_a_lost_message_again_only_once() -> None:
    """A task that is cancelled over there again and again ends the turn."""
    methods: list[str] = []

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        methods.append(call["method"])
        canceled = {"task": WORKING["task"] | {"status": {"state": "TASK_STATE_CANCELED"}}}
        return await begin_stream(request, canceled)

    async def run() -> str:
        async with serving(handle) as url:
            agent = A2AAgent(A2AOptions(url))
            kept = {"a2a_task": Log("", metadata={"taskId": "t", "contextId": "c", "turn": 1, "url": url})}
            turn = TurnContext(input="hi", metadata={}, attempt=2, surroundings=GivenSurroundings(logs=kept))
            with pytest.raises(AgentError) as caught:
                async for _ in agent.run(turn):
                    pass
            await agent.close()
            return caught.value.code

    assert run_async(run()) == "AGENT_CANCELLED"
    assert methods == ["SubscribeToTask", "SendStreamingMessage"]


def test_a2a_agent_reads_an_old_card_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that has moved is found; one that has not is not asked for its card in each turn."""
    cards = 0

    async def card(request: web.Request) -> web.StreamResponse:
        nonlocal cards
        cards += 1
        return await give_card(request)

    async def run() -> None:
        async with serving(streaming(WORKING, COMPLETED), card) as url:
            agent = A2AAgent(A2AOptions(url))
            for seconds in (300.0, 300.0, -1.0):
                monkeypatch.setattr(a2a_connection, "_CARD_SECONDS", seconds)
                async for _ in agent.run(TurnContext(input="hi", metadata={})):
                    pass
            await agent.close()

    run_async(run())
    assert cards == 2


def test_a2a_agent_reads_the_card_for_all_who_wait() -> None:
    """A turn that is cancelled meanwhile takes nothing from the others."""
    asked, given = asyncio.Event(), asyncio.Event()
    cards = 0

    async def card(request: web.Request) -> web.StreamResponse:
        nonlocal cards
        cards += 1
        asked.set()
        await given.wait()
        return await give_card(request)

    async def run() -> None:
        async with serving(streaming(WORKING, COMPLETED), card) as url:
            agent = A2AAgent(A2AOptions(url))
            first, second = (
                asyncio.ensure_future(anext(agent.run(TurnContext(input="hi", metadata={})))) for _ in range(2)
            )
            await asked.wait()
            first.cancel()
            await asyncio.wait([first])
            given.set()
            assert await second
            await agent.close()

    run_async(run())
    assert cards == 1


def test_a2a_agent_does_not_cancel_what_a_message_ends() -> None:
    """With a message an agent has said all, whatever task it had told of before."""
    methods: list[str] = []

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        methods.append(call["method"])
        message = {"message": {"messageId": "m", "taskId": "t", "parts": [{"text": "hello"}]}}
        return await begin_stream(request, WORKING, message)

    assert messages_of(handle) == ["hello"]
    assert methods == ["SendStreamingMessage"]


def test_a2a_agent_is_closed_while_it_waits_for_a_card() -> None:
    """Nobody waits for an agent that hangs when the service stops, and nothing is left behind."""
    asked = asyncio.Event()

    async def card(request: web.Request) -> web.StreamResponse:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def run() -> None:
        async with serving(streaming(), card) as url:
            agent = A2AAgent(A2AOptions(url))
            turn = asyncio.ensure_future(anext(agent.run(TurnContext(input="hi", metadata={}))))
            await asked.wait()
            assert [task for task in asyncio.all_tasks() if "Connection" in repr(task.get_coro())]
            turn.cancel()
            with pytest.raises(asyncio.CancelledError):
                await turn
            await agent.close()
            assert not [task for task in asyncio.all_tasks() if "Connection" in repr(task.get_coro())]

    run_async(run())


@pytest.mark.parametrize("events", [[], [piece("a") | {"artifactUpdate": {"artifact": {"parts": [{"text": "a"}]}}}]])
def test_a2a_agent_fails_on_a_stream_that_is_cut_without_a_task(events: list[object]) -> None:
    """Where no task is known there is nothing to take up."""
    assert failure_of(streaming(*events)).code == "AGENT_STREAM_CUT"


@pytest.mark.parametrize("size", [1, 2, 3, 1_000])
def test_a2a_agent_takes_in_what_looks_like_the_end_of_a_line(size: int) -> None:
    """Characters that end lines elsewhere are text in an event, also where they come in pieces."""
    text = "a\u2028b\u2029\u2028c\x85d\x0ce ä€\u2027"

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request)
        message = {"message": {"messageId": "m", "parts": [{"text": text}]}}
        event = b"data: " + json.dumps({"result": message}, ensure_ascii=False).encode() + b"\n\n"
        for start in range(0, len(event), size):
            await response.write(event[start : start + size])
            await asyncio.sleep(0.001)  # or the pieces come as one
        return response

    assert messages_of(handle) == [text]


@pytest.mark.parametrize("stream", [True, False])
def test_a2a_agent_does_not_take_in_more_values_than_it_can_read_at_once(stream: bool) -> None:
    """To read a million small ones would hold up all other runs."""
    parts = [{"data": [1] * 300_000}]
    body = json.dumps({"result": {"message": {"messageId": "m", "parts": parts}}})
    error = failure_of(streaming(body) if stream else answering(body=body), streaming=stream)
    assert error.code == "AGENT_PROTOCOL_ERROR"
    assert "262144 values" in error.message


@pytest.mark.parametrize("what", ["line", "lines", "answer", "packed"])
def test_a2a_agent_does_not_take_in_what_is_too_large(what: str) -> None:
    """An event, an answer and what is packed have a limit: a protocol error that says so."""

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        if what == "packed":
            response = web.Response(body=b"{}", content_type="application/json")
            response.headers["Content-Encoding"] = "gzip"
            return response
        content_type = "application/json" if what == "answer" else "text/event-stream"
        stream = web.StreamResponse(headers={"Content-Type": content_type})
        await stream.prepare(request)
        block = {"line": b"x" * (1 << 20), "lines": b"data: x\n" * (1 << 17), "answer": b" \n\n\n" * (1 << 18)}[what]
        for _ in range(1_000):
            await stream.write(block)
        return stream

    error = failure_of(handle, streaming=what != "answer")
    assert error.code == "AGENT_PROTOCOL_ERROR"
    assert "more at once than is taken" in error.message


def test_a2a_agent_stays_small_in_a_flood() -> None:
    """A hundred thousand updates pass at the speed of who reads them; nothing of them is kept."""

    async def handle(request: web.Request, call: dict[str, Any]) -> web.StreamResponse:
        response = await begin_stream(request, WORKING)
        block = framed(piece("0123456789" * 10)) * 1_000
        for _ in range(FLOOD // 1_000):
            await response.write(block)
        await response.write(framed(COMPLETED))
        return response

    async def run() -> None:
        async with serving(handle) as url:
            agent = A2AAgent(A2AOptions(url))
            before, deltas, characters = 0, 0, 0
            async for output in agent.run(TurnContext(input="hi", metadata={})):
                for each in output if isinstance(output, tuple) else (output,):
                    deltas += isinstance(each, Delta)
                    characters += len(each.content) if isinstance(each, Message) else 0
                if deltas == 1_000:
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert deltas >= FLOOD
            assert characters == 100 * FLOOD
            assert grown_kib < 20 << 10
            await agent.close()

    # Longer than the other tests may: the library takes its time to read that much.
    asyncio.run(asyncio.wait_for(run(), 300))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"url": "localhost:9999"},
        {"url": "http://"},
        {"url": "http://a:port"},
        {"url": "http://user:password@a.example"},
        {"url": "http://a.example?key=secret"},
        {"url": "http://a.example", "card_path": "card.json"},
        {"url": "http://a.example", "headers_env": {"a header": "X"}},
        {"url": "http://a.example", "headers_env": {"authorization": "X"}, "api_key_env": "Y"},
        {"url": "http://a.example", "protocol_binding": "GRPC"},
        {"url": "http://a.example", "timeout_seconds": 0},
        {"url": "http://a.example", "api_key": "secret"},
    ],
)
def test_a2a_options_refuse_what_cannot_work(options: dict[str, object]) -> None:
    """What is missing, wrong or unknown is told when the file is read."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, A2AOptions)


def test_a2a_agent_imports_the_library_when_it_is_needed() -> None:
    """A service pays for it with the first turn, not at its start."""
    code = (
        "import sys; from runtime_service.agents.a2a.agent import A2AAgent as A; A(A.Options('http://a.example'));"
        "assert not {'a2a', 'httpx', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
