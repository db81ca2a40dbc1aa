"""The two doors to RunService, the plain RPCs and `Session`, as clients with one surface; and the service behind them.

The service is the whole runtime service as it is composed for production, over a real gRPC channel.
"""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import uvloop
from google.protobuf.message import Message as ProtobufMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection_pb2_grpc

from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from runtime_service.agents import AgentError, AgentOutput, Delta, Message, Option, TurnContext
from runtime_service.config import RuntimeConfig
from runtime_service.executor import ExecutorLimits
from runtime_service.server import RuntimeServer
from tests.integration.session_client import FOLLOWS, Session, SessionCall, session_over
from tests.support import LIMIT_SECONDS, run_async

TOKEN = "a-service-token-of-the-tests"
WITH_TOKEN = (("authorization", f"Bearer {TOKEN}"),)
SECRET = "password=hunter2"
SERVICE = "acp.runs.v1.RunService"
METADATA = b' {"n": 12345678901234567890123, "b":null, "a": {} }\n'

SERVERS = """
[servers.echo]
kind = "agent_runtime"
agent = "echo"

[servers.storefront]
kind = "web_app"
agent_runtime = "echo"

[servers.gated]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.integration.doors:gated" }

[servers.asking]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.integration.doors:asking" }

[servers.failing]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.integration.doors:failing" }

[servers.talkative]
kind = "agent_runtime"
agent = "python"
options = { entrypoint = "tests.integration.doors:talkative" }

[servers.absent]
kind = "agent_runtime"
agent = "local"
options = { model_path = "no-such-file.gguf" }

[servers.theirs]
kind = "agent_runtime"
agent = "echo"
organization = "other"
"""

gate: list[asyncio.Event] = []
at_gate: list[int] = []
"""The attempts of the turns that wait there."""


async def asking(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Ask which way, go there."""
    answer = await turn.ask("Which way?", [Option("left", "Left"), Option("right", "Right")])
    yield Message(f"went {answer.option}")


async def gated(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say a message and half of another, then wait for the test."""
    yield Message("one", {"tokens": 3})
    yield Delta("ha")
    yield Delta("lf")
    at_gate.append(turn.attempt)
    try:
        await gate[-1].wait()
    finally:
        at_gate.remove(turn.attempt)
    yield Message(f"re: {turn.input}")


async def failing(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Fail as the input says."""
    yield Message("so far")
    if turn.input == "AgentError":
        raise AgentError("The model is away; try again.", "MODEL_AWAY")
    raise RuntimeError(SECRET)


async def talkative(turn: TurnContext) -> AsyncGenerator[AgentOutput]:
    """Say as many messages as the input names."""
    for number in range(int(turn.input)):
        yield Message(str(number))


class Client:
    """A caller of one organization; its calls are those of gRPC, whichever door they go through."""

    organization_field = "x-acp-organization"

    def __init__(self, channel: grpc.aio.Channel, organization: str | None = "default") -> None:
        self.channel = channel
        self.organization = organization

    def as_caller(self, organization: str | None) -> "Client":
        """Another caller over the same channel."""
        return Client(self.channel, organization)

    def call(self, method: str, request: ProtobufMessage) -> Any:
        """Call a method; what it returns is a call to be awaited or iterated over."""
        stub: Any = run_service_pb2_grpc.RunServiceStub(self.channel)
        organization = () if self.organization is None else (("x-acp-organization", self.organization),)
        return getattr(stub, method)(request, metadata=(*WITH_TOKEN, *organization), timeout=LIMIT_SECONDS)

    async def updates(self, method: str, request: ProtobufMessage) -> list[rpc.RunUpdate]:
        """All updates of a stream, to its end."""
        return [response.update async for response in self.call(method, request)]

    async def start(self, text: str = "hello world", server: str = "echo", **fields: Any) -> pb.Run:
        """Start a run in mode async."""
        fields.setdefault("mode", pb.RUN_MODE_ASYNC)
        updates = await self.updates("StartRun", start_request(text, server, **fields))
        return updates[-1].run

    async def get(self, run: pb.Run) -> pb.Run:
        """Read a run."""
        return (await self.state(run)).run

    async def state(self, run: pb.Run) -> rpc.GetRunResponse:
        """Read a run and its thread."""
        request = rpc.GetRunRequest(server=reference(run.server_id), run_id=run.id)
        response: rpc.GetRunResponse = await self.call("GetRun", request)
        return response

    async def events(self, run: pb.Run, **fields: Any) -> rpc.ListRunEventsResponse:
        """Read a page of a run's log."""
        request = rpc.ListRunEventsRequest(server=reference(run.server_id), run_id=run.id, **fields)
        response: rpc.ListRunEventsResponse = await self.call("ListRunEvents", request)
        return response

    async def watch(self, run: pb.Run, **fields: Any) -> list[rpc.RunUpdate]:
        """Follow a run to its end."""
        return await self.updates("WatchRun", watch_request(run, **fields))

    async def cancel(self, run: pb.Run) -> rpc.CancelRunResponse:
        """Cancel a run."""
        request = rpc.CancelRunRequest(server=reference(run.server_id), run_id=run.id)
        response: rpc.CancelRunResponse = await self.call("CancelRun", request)
        return response

    async def until_said(self, run: pb.Run, last_sequence: int) -> None:
        """Return once the log is that long."""
        after = 0
        while after < last_sequence:
            page = await self.events(run, after_sequence=after, wait_ms=1_000)
            after = page.events[-1].sequence if page.events else after


class SessionClient(Client):
    """The same over one session."""

    organization_field = "organization"

    def __init__(self, channel: grpc.aio.Channel, session: Session, organization: str | None = "default") -> None:
        super().__init__(channel, organization)
        self.session = session

    def as_caller(self, organization: str | None) -> Client:
        """Another caller over the same session."""
        return SessionClient(self.channel, self.session, organization)

    def call(self, method: str, request: ProtobufMessage) -> Any:
        """Open a call of the session, in the clothes of one of gRPC."""
        operation = OPERATION[method]
        call = self.session.call(operation, request, self.organization or "")
        return _Stream(call, getattr(rpc, method + "Response")) if operation in FOLLOWS else call.answer()


class _Stream:
    """A call of a session as gRPC has one that is answered with a stream."""

    def __init__(self, call: SessionCall, response_type: Any) -> None:
        self._call = call
        self._responses = self._wrapped(response_type)

    async def _wrapped(self, response_type: Any) -> AsyncGenerator[Any]:
        async for update in self._call.updates():
            yield response_type(update=update)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._responses

    async def read(self) -> Any:
        return await anext(self._responses)

    def cancel(self) -> None:
        self._call.stop()

    async def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.CANCELLED if self._call.stopped else grpc.StatusCode.OK


def reference(server: str, *, connected: bool = False) -> rpc.ServerReference:
    """Name a server."""
    return rpc.ServerReference(id=server, connected=connected)


def start_request(text: str = "hello world", server: str = "echo", **fields: Any) -> rpc.StartRunRequest:
    """Ask for a run."""
    return rpc.StartRunRequest(server=reference(server), input=text, **fields)


def continue_request(run: pb.Run, text: str = "more", **fields: Any) -> rpc.ContinueRunRequest:
    """Ask for the next turn."""
    return rpc.ContinueRunRequest(server=reference(run.server_id), run_id=run.id, input=text, **fields)


def watch_request(run: pb.Run, **fields: Any) -> rpc.WatchRunRequest:
    """Ask for a run's updates."""
    return rpc.WatchRunRequest(server=reference(run.server_id), run_id=run.id, **fields)


def events_of(updates: list[rpc.RunUpdate]) -> list[pb.RunEvent]:
    """All events, in the order in which they came."""
    return [event for update in updates for event in update.events]


def contents_of(updates: list[rpc.RunUpdate]) -> list[str]:
    """What the events say."""
    return [event.content for event in events_of(updates)]


def requests_of(server: rpc.ServerReference, run_id: str) -> dict[str, ProtobufMessage]:
    """A request for each method of both doors, by its name."""
    return {
        "StartRun": rpc.StartRunRequest(server=server, input="hi"),
        "ContinueRun": rpc.ContinueRunRequest(server=server, run_id=run_id, input="hi"),
        "WatchRun": rpc.WatchRunRequest(server=server, run_id=run_id),
        "GetRun": rpc.GetRunRequest(server=server, run_id=run_id),
        "ListRuns": rpc.ListRunsRequest(server=server),
        "ListRunEvents": rpc.ListRunEventsRequest(server=server, run_id=run_id),
        "CancelRun": rpc.CancelRunRequest(server=server, run_id=run_id),
    }


METHODS = sorted(requests_of(reference("echo"), ""))
OPERATION = {method: re.sub("(?<!^)([A-Z])", r"_\1", method).lower() for method in METHODS}
ONE_DOOR = pytest.mark.parametrize("door", ["plain"])
"""For what is no matter of the door."""


@dataclass
class Refusal:
    """What a caller learns of an error."""

    code: grpc.StatusCode
    reason: str
    message: str
    field: str | None = None
    retry_seconds: float | None = None


async def end_of(call: Awaitable[object] | AsyncIterable[object]) -> None:
    """Wait until a call has ended."""
    if isinstance(call, AsyncIterable):
        async for _ in call:
            pass
    else:
        await call


async def refusal(call: Awaitable[object] | AsyncIterable[object]) -> Refusal:
    """Return the error of a call, which has exactly one ErrorInfo and says the same in each place."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await end_of(call)
    error = caught.value
    trailers = dict(error.trailing_metadata() or ())
    packed = trailers["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    status = status_pb2.Status.FromString(packed)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info = [
        error_details_pb2.ErrorInfo() for detail in status.details if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)
    ]
    assert len(info) == 1
    assert status.details[0].Unpack(info[0])
    assert info[0].domain == "acp.runs.v1"
    found = Refusal(error.code(), info[0].reason, status.message)
    for detail in status.details:
        bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(bad):
            (violation,) = bad.field_violations
            found.field = violation.field
            assert violation.description in found.message
        if detail.Unpack(retry):
            found.retry_seconds = retry.retry_delay.ToMilliseconds() / 1000
    assert (found.field is not None) == (found.code is grpc.StatusCode.INVALID_ARGUMENT)
    return found


def reflection_stub(channel: Any) -> Any:
    """Ask what services there are."""
    return reflection_pb2_grpc.ServerReflectionStub(channel)


class Service:
    """Where the runtime service of a test has its data; it can be run again over the same. Its gate is closed."""

    def __init__(self, folder: Path, door: str = "plain") -> None:
        gate[:] = [asyncio.Event()]
        self.door = door
        (folder / "servers.toml").write_text(SERVERS)
        self.config = RuntimeConfig(
            data_dir=folder / "data",
            service_token=TOKEN,
            listen="127.0.0.1:0",
            servers=folder / "servers.toml",
            drain_seconds=0,
            executor=ExecutorLimits(cancel_grace_seconds=0.05),
        )

    @asynccontextmanager
    async def open(self, **settings: Any) -> AsyncIterator[Client]:
        """The running service, and a caller."""
        server = await self.serve(**settings)
        try:
            async with self.connect(server) as client:
                yield client
        finally:
            await server.__aexit__(None, None, None)

    async def serve(self, **settings: Any) -> RuntimeServer:
        """The running service, to be stopped by the test."""
        return await RuntimeServer(msgspec.structs.replace(self.config, **settings)).__aenter__()

    @asynccontextmanager
    async def connect(self, server: RuntimeServer) -> AsyncIterator[Client]:
        """A caller."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            if self.door == "plain":
                yield Client(channel)
            else:
                async with session_over(channel, TOKEN) as session:
                    yield SessionClient(channel, session)

    def run(self, check: Callable[[Client], Coroutine[Any, Any, None]], **settings: Any) -> None:
        """Run `check` against the running service."""

        async def main() -> None:
            async with self.open(**settings) as client:
                await check(client)

        in_loop(main())


def in_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run it in the loop that the service has in production."""
    run_async(main, loop_factory=uvloop.new_event_loop)
