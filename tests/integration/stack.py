"""The real gateway over the real runtime service, both in the test's event loop, and agents that do as a test says."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from multidict import CIMultiDictProxy
from yarl import URL

from gateway.app import Gateway
from gateway.auth import KeyFile, Scope
from gateway.config import GatewayConfig
from runtime_service.agents import (
    AgentError,
    AgentOutput,
    Delta,
    Log,
    Message,
    Option,
    OptionKind,
    ToolCall,
    ToolResult,
    TurnContext,
)
from runtime_service.config import RuntimeConfig
from runtime_service.executor import ExecutorLimits
from runtime_service.runs import LogLevel
from runtime_service.server import RuntimeServer
from tests.integration.wire import Wire
from tests.support import LIMIT_SECONDS

TOKEN = "the-service-token-of-the-tests"
TERMINAL = ("completed", "failed", "cancelled")

_AGENTS = ("failing", "broken", "talkative", "flood", "heavy", "gated", "typing", "counting", "asking")
SERVERS = "\n".join(
    [
        """
[servers.echo]
kind = "agent_runtime"
agent = "echo"

[servers."runtime/one"]
kind = "agent_runtime"
agent = "echo"

[servers.slow]
kind = "agent_runtime"
agent = "echo"
options = { word_delay_seconds = 0.02 }

[servers.absent]
kind = "agent_runtime"
agent = "local"
options = { model_path = "no-such-file.gguf" }

[servers.storefront]
kind = "web_app"
agent_runtime = "echo"

[servers.gatehouse]
kind = "function"
agent_runtime = "gated"

[servers.theirs]
kind = "agent_runtime"
agent = "echo"
organization = "other"

[servers.their-shop]
kind = "web_app"
agent_runtime = "theirs"
organization = "other"
""",
        *(
            f"""
[servers.{name}]
kind = "agent_runtime"
agent = "python"
options = {{ entrypoint = "tests.integration.stack:{name}" }}
"""
            for name in _AGENTS
        ),
    ]
)


# -- Agents --------------------------------------------------------------------------------------------


class Gate:
    """Holds up the agents `gated` and `typing` in a turn whose input names it."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.left = asyncio.Event()

    async def wait(self) -> None:
        """Wait until a test opens it."""
        self.reached.set()
        try:
            await self.open.wait()
        finally:
            self.left.set()


GATES: defaultdict[str, Gate] = defaultdict(Gate)
"""By the input of the turn; a name serves one test only."""


async def failing(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say something, then fail for a reason."""
    yield Message("I try.")
    raise AgentError("The disk is full.", "DISK_FULL")


async def broken(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Raise what nobody outside must read."""
    yield Delta("half a se")
    raise RuntimeError("the inner secret")


async def talkative(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say one of everything."""
    yield Log("thinking", LogLevel.WARN, "thought", {"depth": 2})
    yield ToolCall("search", {"query": "ü"}, "call_1")
    yield ToolResult("search", "nothing", "call_1")
    yield ToolResult("search", "no network", "call_2", failed=True)
    for level in LogLevel:
        yield Log(level.value, level)
    yield Delta("Hel")
    yield Delta("lo")
    yield Message("Hello", {"usage": {"total_tokens": 2**60}, "none": None})


async def flood(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Log as many lines as the input says."""
    for number in range(int(turn.input)):
        yield Log(f"line {number}")


async def heavy(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say as many megabytes as the input says, a quarter at a time."""
    for number in range(4 * int(turn.input)):
        yield Message(f"{number:06d}" + "x" * ((1 << 18) - 6))


async def gated(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say something, wait at the gate, say the input."""
    yield Message("waiting")
    await GATES[turn.input].wait()
    yield Message(turn.input)


async def typing(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Begin a message, wait at the gate, end it."""
    yield Delta("öne ")
    yield Delta("𝔱wo ")
    await GATES[turn.input].wait()
    yield Delta("three")
    yield Message("öne 𝔱wo three")


async def counting(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say what the turn is told."""
    history = [f"{message.role.value}: {message.content}" for message in await turn.history()]
    yield Message(json.dumps({"turn": turn.turn, "history": history, "metadata": turn.metadata}))


async def asking(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Ask for a permission, and for a text; say both answers."""
    options = [
        Option("allow", "Allow once", OptionKind.ALLOW_ONCE),
        Option("reject", "Reject", OptionKind.REJECT_ONCE),
    ]
    permission = await turn.ask("Delete a.txt?", options, tool_kind="delete")
    name = await turn.ask("What is your name?")
    yield Message(f"{permission.option} {name.text}")


# -- The two programs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, which is JSON and says so."""
        assert self.headers["Content-Type"].split(";")[0] == "application/json"
        return json.loads(self.body)

    @property
    def run(self) -> dict[str, Any]:
        """The run of an envelope."""
        run: dict[str, Any] = self.json["run"]
        return run

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of an envelope."""
        events: list[dict[str, Any]] = self.json["events"]
        return events


@dataclass(frozen=True)
class Frame:
    """One frame of a stream: `lines` as they came, the document that they carry, and its id."""

    lines: tuple[str, ...]
    document: dict[str, Any]
    id: int | None

    @property
    def type(self) -> str:
        """What the document is."""
        type_: str = self.document["type"]
        return type_


class Stream:
    """An answer that is read as it comes."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def frames(self) -> AsyncIterator[Frame]:
        """Yield frames to the end of the stream; blank NDJSON lines and SSE comments are passed over."""
        is_sse = self.response.content_type == "text/event-stream"
        lines: list[str] = []
        while line := await self.response.content.readuntil(b"\n"):
            text = line.decode().removesuffix("\n")
            if not is_sse:
                if text:
                    yield Frame((text,), json.loads(text), None)
            elif text:
                lines.append(text)
            else:
                if not lines[0].startswith(":"):
                    yield _frame(lines)
                lines.clear()
        assert not lines, "the last frame is whole"

    async def rest(self) -> list[Frame]:
        """All frames to the end."""
        return [frame async for frame in self.frames()]

    async def until(self, fact: Callable[[Frame], object]) -> list[Frame]:
        """The frames up to the first of which the fact holds."""
        frames = []
        async for frame in self.frames():
            frames.append(frame)
            if fact(frame):
                return frames
        raise AssertionError(f"the stream ended before: {frames}")


def _frame(lines: list[str]) -> Frame:
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    ids = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
    assert len(data) == 1
    assert len(data) + len(ids) == len(lines)
    return Frame(tuple(lines), json.loads(data[0]), int(ids[0]) if ids else None)


class Front:
    """A gateway, and a client of its. `key` is of the organization "default" and may do everything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = KeyFile(folder / "keys.json")
        self.key = self.make_key()
        self.http: aiohttp.ClientSession
        self.gateway: Gateway

    def make_key(self, organization: str = "default", *scopes: Scope) -> str:
        """Return a new key."""
        return self.keys.create("test", organization, scopes or ("*",))[0]

    def url(self, path: str) -> URL:
        """The URL of a path, which is taken as it stands."""
        return URL(self.gateway.url + path, encoded=True)

    def authorized(self, headers: Mapping[str, str] | None, key: str | None) -> dict[str, str]:
        """The headers with the key, unless that is empty."""
        key = self.key if key is None else key
        return {**({"Authorization": f"Bearer {key}"} if key else {}), **(headers or {})}

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Answer:
        """Make a request; `body` is JSON, or bytes that are sent as JSON. Every answer carries a request id."""
        headers = self.authorized(headers, key)
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **headers}
        async with self.http.request(method, self.url(path), data=data, headers=headers) as response:
            answer = Answer(response.status, response.headers, await response.read())
        assert answer.headers["X-Request-Id"]
        return answer

    @asynccontextmanager
    async def stream(
        self, method: str, path: str, body: object = None, *, accept: str = "text/event-stream", **headers: str
    ) -> AsyncIterator[Stream]:
        """Make a request whose answer is read as it comes; headers with _ for -."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named = self.authorized({"Accept": accept, **named}, None)
        async with self.http.request(method, self.url(path), json=body, headers=named) as response:
            yield Stream(response)

    async def start(self, server: str = "echo", content: str = "hello", **fields: object) -> Answer:
        """Start a run."""
        return await self.call("POST", runs(server), {"content": content, **fields})

    async def start_async(self, server: str, content: str, **fields: object) -> str:
        """Start a run in mode async; return its path."""
        answer = await self.start(server, content, mode="async", **fields)
        assert answer.status == 202
        return answer.headers["Location"]

    async def until_status(self, path: str, *statuses: str) -> dict[str, Any]:
        """The run at `path` once it has one of these statuses (else one that never changes)."""

        async def reached() -> bool:
            return (await self.call("GET", path)).run["status"] in (statuses or TERMINAL)

        await until(reached)
        return (await self.call("GET", path)).run

    async def metric(self, name: str) -> float:
        """The value of one line of GET /metrics, 0 where there is none."""
        text = (await self.call("GET", "/metrics", key="")).body.decode()
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.rpartition(" ")[0] == name)


class Stack(Front):
    """Both programs, and a client of theirs."""

    def __init__(self, folder: Path, runtime: RuntimeConfig) -> None:
        super().__init__(folder)
        self.runtime: RuntimeServer
        self._runtime_config = runtime

    @property
    def target(self) -> str:
        """Where the runtime service is."""
        return f"127.0.0.1:{self.runtime.port}"

    async def start_runtime(self) -> None:
        """Start the runtime service, again at the same port."""
        self.runtime = await RuntimeServer(self._runtime_config).__aenter__()
        self._runtime_config = msgspec.structs.replace(self._runtime_config, listen=self.target)

    async def stop_runtime(self) -> None:
        """Stop it as SIGTERM does."""
        await self.runtime.__aexit__(None, None, None)


def runs(server: str) -> str:
    """The path of a server's runs."""
    return f"/v1/servers/{server}/runs"


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Return once the fact holds; fails after the limit."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while not await fact():  # noqa: ASYNC110 - facts of any kind, told by nobody
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(
    folder: Path,
    limits: ExecutorLimits | None = None,
    *,
    servers: str | Path = SERVERS,
    wire: Wire | None = None,
    **settings: Any,
) -> AsyncIterator[Stack]:
    """Serve with these settings of the gateway, over a data directory in `folder`, through the wire if there is one.

    `servers` is a servers.toml, or what is to be in one.
    """
    if isinstance(servers, Path):
        toml = servers
    else:
        toml = folder / "servers.toml"
        toml.write_text(servers)
    runtime = RuntimeConfig(
        data_dir=folder / "data",
        service_token=TOKEN,
        listen="127.0.0.1:0",
        servers=toml,
        drain_seconds=0,
        executor=limits or ExecutorLimits(cancel_grace_seconds=0.2),
    )
    stack = Stack(folder, runtime)
    await stack.start_runtime()
    try:
        async with _fronted(stack, stack.target if wire is None else await wire.start(stack.target), settings):
            yield stack
    finally:
        if wire is not None:
            await wire.stop()
        await stack.stop_runtime()


@asynccontextmanager
async def fronting(folder: Path, targets: str, **settings: Any) -> AsyncIterator[Front]:
    """Serve with these settings of the gateway, before the runtime services at these targets."""
    front = Front(folder)
    async with _fronted(front, targets, settings):
        yield front


@asynccontextmanager
async def _fronted(front: Front, targets: str, settings: Mapping[str, Any]) -> AsyncIterator[None]:
    config = GatewayConfig(
        grpc_target=targets,
        service_token=TOKEN,
        keys_file=front.keys.path,
        port=0,
        **{"drain_seconds": 2.0, **settings},
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        Gateway(config) as front.gateway,
        aiohttp.ClientSession(connector=connector, read_bufsize=1 << 21) as front.http,
    ):
        yield
