"""The `openai` agent: a model behind any server that speaks OpenAI's chat completions.

Translates, at this one edge, what the `openai` library raises into an `AgentError` for the caller; what else
it says goes to the log. The API key goes into neither.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import msgspec

from runtime_service.agents.base import (
    Agent,
    AgentError,
    AgentOutput,
    Delta,
    HistoryMessage,
    Message,
    TurnContext,
)

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionChunk

log = logging.getLogger(__name__)

_RETRIES = 2
_MAX_QUOTED_CHARACTERS = 300


class OpenAIOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`api_key_env` names the environment variable that holds the key; without it no key is sent.

    `timeout_seconds` is how long the model may take to begin its answer, and be silent in the middle of it.
    """

    model: Annotated[str, msgspec.Meta(min_length=1)]
    base_url: Annotated[str, msgspec.Meta(pattern=r"^https?://")] = "https://api.openai.com/v1"
    instructions: str | None = None
    api_key_env: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    timeout_seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 120
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None


class OpenAIAgent(Agent):
    """The instructions, the thread's history and the input go to the model; its tokens are deltas."""

    Options = OpenAIOptions
    session_protocol = "openai-chat-completions"

    def __init__(self, options: OpenAIOptions) -> None:
        self._options = options
        self._client: openai.AsyncOpenAI | None = None
        self._opening = asyncio.Lock()

    def unavailable_reason(self) -> str | None:
        """Say so when the variable that is to hold the API key is not set."""
        name = self._options.api_key_env
        if name is None or os.environ.get(name):
            return None
        return (
            f"The environment variable {name}, which is to hold the API key of the model "
            f"{self._options.model!r}, is not set where the runtime service runs."
        )

    async def run(self, turn: TurnContext) -> AsyncGenerator[AgentOutput]:
        """Ask the model; raises AgentError for whatever hinders its answer."""
        if reason := self.unavailable_reason():
            raise AgentError(reason, "AGENT_UNAVAILABLE")
        messages = chat_messages(self._options.instructions, await turn.history(), turn.input)
        answer = _Answer(self._options.model)
        stream = await self._open_stream(messages)
        async with stream:
            while (chunk := await self._next_chunk(stream, answer)) is not None:
                if text := answer.add(chunk):
                    yield Delta(text)
        yield answer.message()

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _open_stream(self, messages: list[dict[str, str]]) -> "openai.AsyncStream[ChatCompletionChunk]":
        client = await self._open_client()
        options = self._options
        request: dict[str, Any] = {"model": options.model, "messages": messages}
        if options.temperature is not None:
            request["temperature"] = options.temperature
        if options.max_tokens is not None:
            # OpenAI's newer models refuse `max_tokens`; many other servers know only that.
            host = urlsplit(options.base_url).hostname or ""
            name = "max_completion_tokens" if host.endswith("openai.com") else "max_tokens"
            request[name] = options.max_tokens
        import openai

        try:
            # Over the library's own retries, too.
            async with asyncio.timeout(options.timeout_seconds):
                stream: openai.AsyncStream[ChatCompletionChunk] = await client.chat.completions.create(
                    stream=True, stream_options={"include_usage": True}, **request
                )
                return stream
        except (openai.OpenAIError, TimeoutError) as error:
            raise self._failure(error) from error

    async def _next_chunk(
        self, stream: "openai.AsyncStream[ChatCompletionChunk]", answer: "_Answer"
    ) -> "ChatCompletionChunk | None":
        """Return the next chunk, or None after the last one."""
        import openai

        try:
            async with asyncio.timeout(self._options.timeout_seconds):
                return await anext(stream, None)
        except (openai.APIConnectionError, TimeoutError) as error:
            if answer.finish_reason is not None:
                return None  # only the usage is missing
            if isinstance(error, openai.APITimeoutError | TimeoutError):
                raise self._failure(error) from error
            raise _cut(self._options.model) from error
        except openai.OpenAIError as error:
            raise self._failure(error) from error
        except (ValueError, TypeError, AttributeError) as error:  # what came is no JSON, or none of a chunk
            log.warning("the server of the model %s sent no chat completion", self._options.model, exc_info=error)
            raise _garbled(self._options.model) from error

    async def _open_client(self) -> "openai.AsyncOpenAI":
        async with self._opening:
            if self._client is None:
                # Imports that take most of a second, and certificates: not on the event loop.
                self._client = await asyncio.to_thread(self._make_client)
            return self._client

    def _make_client(self) -> "openai.AsyncOpenAI":
        import openai

        client = openai.AsyncOpenAI(
            # Never None: the library would send OPENAI_API_KEY to whatever server base_url names.
            api_key=self._api_key() or "none",
            base_url=self._options.base_url,
            timeout=self._options.timeout_seconds,
            max_retries=_RETRIES,
        )
        _ = client.chat.completions  # imported at the first access
        return client

    def _api_key(self) -> str | None:
        name = self._options.api_key_env
        return None if name is None else os.environ.get(name)

    def _failure(self, error: "openai.OpenAIError | TimeoutError") -> AgentError:
        """Translate what the library raised: a code, and what can be done about it."""
        import openai

        options = self._options
        model = f"The model {options.model!r}"
        host = urlsplit(options.base_url).hostname
        log.warning("the model %s at %s failed: %s", options.model, host, self._redacted(str(error)))
        if isinstance(error, openai.APITimeoutError | TimeoutError):
            message = f"{model} was silent for {options.timeout_seconds:g} s (timeout_seconds). Try again."
            return AgentError(message, "MODEL_TIMEOUT")
        if isinstance(error, openai.APIConnectionError):
            message = f"{model} cannot be reached. Check that its server runs, and its base_url."
            return AgentError(message, "MODEL_UNREACHABLE")
        if not isinstance(error, openai.APIStatusError):
            return AgentError(f"{model} failed{self._quoted(error)}. Try again.", "MODEL_ERROR")
        said = f" (HTTP {error.status_code})"
        match error.status_code:
            case 401 | 403:
                variable = f"that {options.api_key_env} holds" if options.api_key_env else "(see api_key_env)"
                message = f"The server of the model {options.model!r} refuses the API key {variable}{said}."
                return AgentError(message, "MODEL_AUTHENTICATION_FAILED")
            case 404:
                message = f"There is no model {options.model!r} at its base_url{said}{self._quoted(error)}."
                return AgentError(message, "MODEL_NOT_FOUND")
            case 429 if error.code == "insufficient_quota":
                message = f"{model} is not answering: the quota of its API key is used up{said}."
                return AgentError(message, "MODEL_RATE_LIMITED")
            case 429:
                return AgentError(f"{model} is asked too often{said}. Try again later.", "MODEL_RATE_LIMITED")
            case _ if error.code == "context_length_exceeded":
                message = f"The conversation is too long for the model {options.model!r}{self._quoted(error)}."
                return AgentError(message, "CONTEXT_EXCEEDED")
            case status if status < 500:
                message = f"{model} does not take the request{said}{self._quoted(error)}."
                return AgentError(message, "MODEL_REQUEST_INVALID")
        return AgentError(f"{model} failed{said}. Try again later.", "MODEL_ERROR")

    def _quoted(self, error: "openai.OpenAIError") -> str:
        """Return `: …`, what the server itself says of a request, or nothing."""
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        if not isinstance(said, str) or not said.strip():
            return ""
        return ": " + self._redacted(" ".join(said.split()))[:_MAX_QUOTED_CHARACTERS].rstrip(".")

    def _redacted(self, text: str) -> str:
        key = self._api_key()
        return text.replace(key, "[API key]") if key else text


class _Answer:
    """What has come of an answer so far."""

    def __init__(self, model: str) -> None:
        self.finish_reason: str | None = None
        self._asked = model
        self._model = model
        self._texts: list[str] = []
        self._refusal: list[str] = []
        self._usage: dict[str, int] | None = None
        self._began = False

    def add(self, chunk: "ChatCompletionChunk") -> str:
        """Take a chunk in; return its text. The library does not check what was sent, so this does."""
        text = ""
        try:
            self._model = str(chunk.model or self._model)
            if chunk.usage is not None:
                usage = chunk.usage
                self._usage = {
                    "prompt_tokens": int(usage.prompt_tokens),
                    "completion_tokens": int(usage.completion_tokens),
                    "total_tokens": int(usage.total_tokens),
                }
            for choice in chunk.choices or ():
                self._began = True
                self.finish_reason = choice.finish_reason or self.finish_reason
                delta = choice.delta
                text += (delta and delta.content) or ""
                self._refusal.append((delta and delta.refusal) or "")
        except (AttributeError, TypeError, ValueError) as error:
            raise _garbled(self._asked) from error
        self._texts.append(text)
        return text

    def message(self) -> Message:
        """Return the whole answer. Raises AgentError when it is none: refused, cut off, empty."""
        refusal = "".join(self._refusal).strip()
        if refusal or self.finish_reason == "content_filter":
            why = f": {refusal}" if refusal else ": its content filter stopped the answer."
            raise AgentError(f"The model {self._asked!r} refused{why}", "MODEL_REFUSED")
        if not self._began:
            raise _garbled(self._asked)
        if self.finish_reason is None:
            raise _cut(self._asked)
        content = "".join(self._texts)
        if not content.strip():
            message = f"The model {self._asked!r} gave an empty answer (finish reason {self.finish_reason!r})."
            raise AgentError(message, "MODEL_EMPTY_ANSWER")
        metadata: dict[str, Any] = {"model": self._model, "finish_reason": self.finish_reason}
        if self._usage is not None:
            metadata["usage"] = self._usage
        return Message(content, metadata)


def chat_messages(instructions: str | None, history: Iterable[HistoryMessage], input: str) -> list[dict[str, str]]:
    """Return the messages of a chat completion: instructions, history, input."""
    messages = [{"role": "system", "content": instructions}] if instructions else []
    messages += [{"role": said.role.value, "content": said.content} for said in history]
    return [*messages, {"role": "user", "content": input}]


def _cut(model: str) -> AgentError:
    message = f"The answer of the model {model!r} broke off in the middle. Try again."
    return AgentError(message, "MODEL_STREAM_CUT")


def _garbled(model: str) -> AgentError:
    message = f"What the server of the model {model!r} sent is no chat completion. Check its base_url."
    return AgentError(message, "MODEL_ERROR")
