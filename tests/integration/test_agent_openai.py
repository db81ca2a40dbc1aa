"""The `openai` agent with the real client, against a server that speaks the protocol, well and badly."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web

from runtime_service.agents import AgentError, AgentOutput, Delta, HistoryMessage, Message, TurnContext
from runtime_service.agents.openai import OpenAIAgent, OpenAIOptions
from runtime_service.runs import EventRole
from tests.support import GivenSurroundings

KEY = "sk-test-very-secret"
KEY_VARIABLE = "KEY_OF_THE_TESTS"
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
LIMIT_SECONDS = 30

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def chunk(delta: object, finish_reason: str | None = None, **more: object) -> dict[str, Any]:
    """A chunk of a chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "tiny-2025"}
    return {**head, "choices": [choice], **more}


WELL = [
    chunk({"role": "assistant", "content": ""}),
    chunk({"content": "Hello"}),
    chunk({"content": " you"}),
    chunk({}, "stop"),
    {**chunk({}), "choices": [], "usage": USAGE},
    "[DONE]",
]


async def begin_stream(request: web.Request, *events: object) -> web.StreamResponse:
    """Send events, and leave the stream open."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        text = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {text}\n\n".encode())
    return response


def streaming(*events: object) -> Handler:
    """A handler that sends these events and ends."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await begin_stream(request, *events)

    return handle


def failing(status: int, message: str, code: str | None = None) -> Handler:
    """A handler that answers with an error of the API; the client's retries need not wait."""

    async def handle(request: web.Request) -> web.StreamResponse:
        error = {"message": message, "type": "x", "code": code}
        return web.json_response({"error": error}, status=status, headers={"retry-after-ms": "1"})

    return handle


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    """Serve chat completions with `handler`; gives the base URL."""
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/v1"
    finally:
        await runner.cleanup()


async def ask(
    base_url: str, text: str = "hi", history: list[HistoryMessage] | None = None, **options: Any
) -> list[AgentOutput]:
    """What an agent at `base_url` says in one turn."""

    agent = OpenAIAgent(OpenAIOptions("tiny", base_url, **options))
    turn = TurnContext(input=text, metadata={}, surroundings=GivenSurroundings(history))
    try:
        async with asyncio.timeout(LIMIT_SECONDS):
            return [output async for output in agent.run(turn)]
    finally:
        await agent.close()


def answer_of(handler: Handler, **options: Any) -> list[AgentOutput]:
    """What the agent says when its server is `handler`."""

    async def run() -> list[AgentOutput]:
        async with serving(handler) as base_url:
            return await ask(base_url, **options)

    return asyncio.run(run())


def failure_of(handler: Handler, **options: Any) -> AgentError:
    """How the agent fails when its server is `handler`."""
    with pytest.raises(AgentError) as caught:
        answer_of(handler, **options)
    return caught.value


def test_openai_agent_streams_deltas_and_ends_with_the_message() -> None:
    """Tokens are deltas; the message has the whole text, the model that answered and the usage."""
    metadata = {"model": "tiny-2025", "finish_reason": "stop", "usage": USAGE}
    assert answer_of(streaming(*WELL)) == [
        Delta("Hello"),
        Delta(" you"),
        Message("Hello you", metadata),
    ]


def test_openai_agent_sends_instructions_history_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is what the options, the thread and the input say, with the key of the named variable."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    seen: list[tuple[str | None, Any]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append((request.headers.get("Authorization"), await request.json()))
        return await begin_stream(request, *WELL)

    answer_of(
        handler=handle,
        text="and now?",
        history=[HistoryMessage(EventRole.USER, "a"), HistoryMessage(EventRole.ASSISTANT, "b")],
        instructions="Be brief.",
        api_key_env=KEY_VARIABLE,
        temperature=0.5,
        max_tokens=9,
    )
    assert seen == [
        (
            f"Bearer {KEY}",
            {
                "model": "tiny",
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "and now?"},
                ],
                "temperature": 0.5,
                "max_tokens": 9,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
    ]


def test_openai_agent_keeps_the_environments_key_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `api_key_env` the key in OPENAI_API_KEY does not go to whatever server is configured."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    seen: list[str | None] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        return await begin_stream(request, *WELL)

    answer_of(handle)
    assert seen == ["Bearer none"]


def test_openai_agent_is_unavailable_without_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A named variable that is not set is a reason that names it, and turns fail with it."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    reason = OpenAIAgent(OpenAIOptions("tiny", api_key_env=KEY_VARIABLE)).unavailable_reason()
    assert reason is not None
    assert KEY_VARIABLE in reason
    error = failure_of(streaming(*WELL), api_key_env=KEY_VARIABLE)
    assert (error.code, error.message) == ("AGENT_UNAVAILABLE", reason)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    assert OpenAIAgent(OpenAIOptions("tiny", api_key_env=KEY_VARIABLE)).unavailable_reason() is None


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([chunk({"refusal": "I can"}), chunk({"refusal": "not."}), chunk({}, "stop")], "refused: I cannot."),
        ([chunk({"content": "Well"}), chunk({}, "content_filter")], "content filter"),
    ],
)
def test_openai_agent_fails_on_a_refusal(events: list[object], words: str) -> None:
    """A refusal is no answer."""
    error = failure_of(streaming(*events, "[DONE]"))
    assert error.code == "MODEL_REFUSED"
    assert words in error.message


@pytest.mark.parametrize(
    ("status", "code", "expected", "words"),
    [
        (401, "invalid_api_key", "MODEL_AUTHENTICATION_FAILED", "refuses the API key"),
        (403, None, "MODEL_AUTHENTICATION_FAILED", "refuses the API key"),
        (404, "model_not_found", "MODEL_NOT_FOUND", "no model 'tiny'"),
        (429, "rate_limit_exceeded", "MODEL_RATE_LIMITED", "too often"),
        (429, "insufficient_quota", "MODEL_RATE_LIMITED", "quota"),
        (400, None, "MODEL_REQUEST_INVALID", "the server's words"),
        (400, "context_length_exceeded", "CONTEXT_EXCEEDED", "too long"),
        (500, None, "MODEL_ERROR", "HTTP 500"),
        (503, None, "MODEL_ERROR", "HTTP 503"),
    ],
)
def test_openai_agent_translates_each_status(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    code: str | None,
    expected: str,
    words: str,
) -> None:
    """Each has a code of its own and says what to do; the key is in neither message nor log."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with caplog.at_level(logging.INFO):
        error = failure_of(failing(status, f"the server's words, {KEY}", code), api_key_env=KEY_VARIABLE)
    assert error.code == expected
    assert words in error.message
    assert KEY not in error.message
    assert KEY not in caplog.text
    assert "the server's words" in caplog.text


def test_openai_agent_asks_again_when_it_is_asked_to() -> None:
    """A passing 429 costs a retry, not the turn."""
    answers = iter([failing(429, "later"), failing(503, "later"), streaming(*WELL)])

    async def handle(request: web.Request) -> web.StreamResponse:
        return await next(answers)(request)

    assert isinstance(answer_of(handle)[-1], Message)


def test_openai_agent_fails_when_nobody_listens() -> None:
    """A server that is not there is MODEL_UNREACHABLE."""

    async def run() -> None:
        async with serving(streaming(*WELL)) as base_url:
            pass
        await ask(base_url)

    with pytest.raises(AgentError) as caught:
        asyncio.run(run())
    assert caught.value.code == "MODEL_UNREACHABLE"


@pytest.mark.parametrize("events", [None, [], WELL[:2]])
def test_openai_agent_fails_when_the_model_is_silent(events: list[object] | None) -> None:
    """Silence before the answer, at its beginning and in its middle is MODEL_TIMEOUT."""

    async def handle(request: web.Request) -> web.StreamResponse:
        if events is not None:
            await begin_stream(request, *events)
        await asyncio.Event().wait()
        raise AssertionError

    error = failure_of(handle, timeout_seconds=0.3)
    assert error.code == "MODEL_TIMEOUT"
    assert "0.3 s" in error.message


@pytest.mark.parametrize("cleanly", [True, False])
def test_openai_agent_fails_on_a_stream_that_is_cut(cleanly: bool) -> None:
    """An answer without its finish reason is MODEL_STREAM_CUT, however its connection ended."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = await begin_stream(request, *WELL[:3])
        if not cleanly:
            assert request.transport is not None
            request.transport.abort()
        return response

    assert failure_of(handle).code == "MODEL_STREAM_CUT"


def test_openai_agent_is_content_with_an_answer_without_its_usage() -> None:
    """A connection that breaks after the finish reason has lost nothing but the usage."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = await begin_stream(request, *WELL[:4])
        assert request.transport is not None
        # What was written goes out before the end; `abort()` could drop it.
        request.transport.close()
        return response

    message = answer_of(handle)[-1]
    assert message == Message("Hello you", {"model": "tiny-2025", "finish_reason": "stop"})


@pytest.mark.parametrize(
    "events",
    [
        ["no json"],
        ["42"],
        ["[1]"],
        ['{"choices": 3}'],
        ['{"choices": [4]}'],
        [chunk("text")],
        [chunk({"content": {"a": 1}})],
        [{**chunk({}), "usage": {"prompt_tokens": "x"}}],
        [],
        ["[DONE]"],
    ],
)
def test_openai_agent_fails_on_what_is_no_chat_completion(events: list[object]) -> None:
    """Garbage is MODEL_ERROR, in words that point to the base_url."""
    error = failure_of(streaming(*events))
    assert error.code == "MODEL_ERROR"
    assert "base_url" in error.message


def test_openai_agent_fails_on_a_web_page() -> None:
    """A 200 of another kind of server is no answer."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>It works!</html>", content_type="text/html")

    assert failure_of(handle).code == "MODEL_ERROR"


def test_openai_agent_fails_on_an_error_in_the_stream() -> None:
    """An error event ends the turn with the server's words."""
    error = failure_of(streaming(*WELL[:2], {"error": {"message": "the GPU is on fire"}}))
    assert error.code == "MODEL_ERROR"
    assert "the GPU is on fire" in error.message


def test_openai_agent_fails_on_an_empty_answer() -> None:
    """Nothing said is MODEL_EMPTY_ANSWER, with the finish reason."""
    error = failure_of(streaming(chunk({"content": " "}), chunk({}, "length"), "[DONE]"))
    assert error.code == "MODEL_EMPTY_ANSWER"
    assert "'length'" in error.message


@pytest.mark.parametrize("by", ["cancel", "close"])
def test_openai_agent_hangs_up_when_its_turn_ends_early(by: str) -> None:
    """A turn that is cancelled or closed drops its connection, so that the model may stop."""

    async def run() -> None:
        gone = asyncio.Event()

        async def handle(request: web.Request) -> web.StreamResponse:
            try:
                await begin_stream(request, *WELL[:2])
                await asyncio.Event().wait()
            finally:
                gone.set()
            raise AssertionError

        async with asyncio.timeout(LIMIT_SECONDS), serving(handle) as base_url:
            agent = OpenAIAgent(OpenAIOptions("tiny", base_url))
            read = asyncio.Event()

            async def consume() -> None:
                turn = TurnContext(input="hi", metadata={})
                async with aclosing(agent.run(turn)) as outputs:
                    await anext(outputs)
                    read.set()
                    if by == "cancel":
                        await anext(outputs)

            task = asyncio.create_task(consume())
            await read.wait()
            if by == "cancel":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await task if by == "close" else None
            await gone.wait()
            await agent.close()

    asyncio.run(run())


def test_openai_agent_answers_many_turns_at_once() -> None:
    """One client serves all turns, also those that come while it is being made."""

    async def run() -> list[list[AgentOutput]]:
        async with serving(streaming(*WELL)) as base_url:
            agent = OpenAIAgent(OpenAIOptions("tiny", base_url))

            async def one() -> list[AgentOutput]:
                outputs: AsyncGenerator[AgentOutput] = agent.run(TurnContext(input="hi", metadata={}))
                return [output async for output in outputs]

            try:
                return await asyncio.gather(*(one() for _ in range(20)))
            finally:
                await agent.close()

    assert all(len(outputs) == 3 for outputs in asyncio.run(run()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model": ""},
        {"model": "m", "base_url": "localhost:11434"},
        {"model": "m", "timeout_seconds": 0},
        {"model": "m", "temperatur": 1},
    ],
)
def test_openai_options_refuse_what_cannot_work(options: dict[str, object]) -> None:
    """A mistake in servers.toml is seen when it is read."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, OpenAIOptions)
