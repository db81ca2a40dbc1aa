"""A runtime service that knows `RunService.Session` and health alone, and does on it what a test says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gateway.replicas import Replicas
from gateway.run_client import RunClient
from protos.acp.runs.v1 import run_pb2 as pb
from protos.acp.runs.v1 import run_service_pb2 as rpc
from tests.support import eventually

TOKEN = "the-service-token-of-the-tests"
WINDOW = 8

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class FakeSession:
    """One stream as the service sees it: `take` what came, `send` what is to go, `end` it."""

    def __init__(self, context: _Context) -> None:
        self._context = context
        self._commands: asyncio.Queue[rpc.SessionCommand] = asyncio.Queue()
        self._end: asyncio.Future[tuple[grpc.StatusCode, str]] = asyncio.get_running_loop().create_future()
        self._ignored: set[int] = set()
        self.requests: list[rpc.SessionRequest] = []
        self.closed = asyncio.Event()
        self._begun = asyncio.Event()

    async def take(self, operation: str) -> rpc.SessionCommand:
        """The next command, which is this one."""
        command = await self.take_next()
        assert command.WhichOneof("operation") == operation, command
        return command

    async def take_calls(self, count: int) -> dict[str, rpc.SessionCommand]:
        """The next commands by their operation, of which each is another."""
        commands = [await self.take_next() for _ in range(count)]
        found: dict[str, rpc.SessionCommand] = {str(command.WhichOneof("operation")): command for command in commands}
        assert len(found) == count
        return found

    def ignore(self, command: rpc.SessionCommand) -> None:
        """Take nothing more that is about this call."""
        self._ignored.add(command.call)

    async def take_next(self) -> rpc.SessionCommand:
        """The next command."""
        while (command := await self._commands.get()).call in self._ignored:
            pass
        return command

    async def send(self, *updates: rpc.SessionUpdate) -> None:
        """Send updates in one message."""
        await self._begun.wait()  # gRPC takes one message at a time, and the hello may be read before it counts as sent
        await self._context.write(rpc.SessionResponse(updates=updates))

    def end(self, code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "as the test says") -> None:
        """End the stream."""
        self._end.set_result((code, details))

    async def serve(self, hello: rpc.SessionLimits | None) -> None:
        """Read until the stream ends; without `hello` nothing is said."""
        reader = asyncio.create_task(self._read())
        try:
            if hello is not None:
                await self._context.write(rpc.SessionResponse(limits=hello))
            self._begun.set()
            futures: list[asyncio.Future[Any]] = [reader, self._end]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            if self._end.done() and self._end.result()[0] is not grpc.StatusCode.OK:
                await self._context.abort(*self._end.result())
        finally:
            self.closed.set()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self) -> None:
        while (request := await self._context.read()) is not grpc.aio.EOF:
            self.requests.append(request)
            for command in request.commands:
                self._commands.put_nowait(command)


class FakeService:
    """The service; it can be killed and started again at its port. `limits` is the hello of streams to come."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.limits: rpc.SessionLimits | None = rpc.SessionLimits(
            max_calls=1_000, window_updates=WINDOW, max_message_bytes=8 << 20
        )
        self.refuse_with: grpc.StatusCode | None = None
        self.knows_session = True
        self.port = 0
        self._opened: asyncio.Queue[FakeSession] = asyncio.Queue()
        self._server: grpc.aio.Server

    @property
    def target(self) -> str:
        """Where it is."""
        return f"{self.host}:{self.port}"

    async def start(self) -> None:
        """Serve, again at the same port."""
        options = (("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 8 << 20))
        self._server = grpc.aio.server(options=options)
        session = grpc.stream_stream_rpc_method_handler(
            self._session,
            request_deserializer=rpc.SessionRequest.FromString,
            response_serializer=rpc.SessionResponse.SerializeToString,
        )
        methods = {"Session": session} if self.knows_session else {}
        handler = grpc.method_handlers_generic_handler("acp.runs.v1.RunService", methods)
        self._server.add_generic_rpc_handlers((handler,))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self.port = self._server.add_insecure_port(self.target)
        await self._server.start()

    async def say(self, *, serving: bool) -> None:
        """Say that it serves, which it does when it is started, or that it does not."""
        states = health_pb2.HealthCheckResponse
        await self._health.set("", states.SERVING if serving else states.NOT_SERVING)

    async def kill(self) -> None:
        """Cut every connection, as a process that dies does."""
        await self._server.stop(None)

    async def session(self) -> FakeSession:
        """The next stream that was opened."""
        return await self._opened.get()

    async def _session(self, _: object, context: _Context) -> None:
        assert ("authorization", f"Bearer {TOKEN}") in (context.invocation_metadata() or ())
        if self.refuse_with is not None:
            await context.abort(self.refuse_with, "as the test says")
        session = FakeSession(context)
        self._opened.put_nowait(session)
        await session.serve(self.limits)


@asynccontextmanager
async def fake_service() -> AsyncIterator[FakeService]:
    """Serve until the test is over, and until nothing is left of it: gRPC would tell the next loop."""
    async with fake_services(1) as (service,):
        yield service


@asynccontextmanager
async def fake_services(count: int) -> AsyncIterator[list[FakeService]]:
    """Serve as `fake_service` does, at the same port of this many addresses."""
    before = asyncio.all_tasks()
    services = [FakeService(f"127.0.0.{number}") for number in range(1, count + 1)]
    for service in services:
        service.port = services[0].port
        await service.start()
    try:
        yield services
    finally:
        for service in services:
            await service.kill()
    await eventually(lambda: asyncio.all_tasks() <= before)


@asynccontextmanager
async def client_of(
    service: FakeService, *, max_calls: int = 1_000, reconnect_seconds: float = 10.0
) -> AsyncIterator[RunClient]:
    """The gateway's client, connected to it."""
    async with replicas_at(service.target, max_calls=max_calls, reconnect_seconds=reconnect_seconds) as replicas:
        yield RunClient(replicas)


@asynccontextmanager
async def replicas_at(
    targets: str, *, max_calls: int = 1_000, reconnect_seconds: float = 10.0
) -> AsyncIterator[Replicas]:
    """The services at these targets, as the gateway knows them."""
    replicas = Replicas(targets, TOKEN, max_calls, reconnect_seconds)
    replicas.start()
    try:
        yield replicas
    finally:
        await replicas.close()


def run_message(
    status: "pb.RunStatus.ValueType" = pb.RUN_STATUS_RUNNING, turn: int = 1, run_id: str = "run_1"
) -> pb.Run:
    """A run in this status."""
    return pb.Run(id=run_id, server_id="echo", turn=turn, status=status, mode=pb.RUN_MODE_SYNC)


THREAD = pb.Thread(id="thread_1", status=pb.THREAD_STATUS_ACTIVE)


def news(
    *sequences: int, status: "pb.RunStatus.ValueType | None" = None, delta: rpc.ContentDelta | None = None
) -> rpc.RunUpdate:
    """An update with these events, the run where a status is given, and the delta."""
    update = rpc.RunUpdate(
        events=[
            pb.RunEvent(sequence=number, content=f"event {number}", role=pb.EVENT_ROLE_ASSISTANT)
            for number in sequences
        ],
        delta=delta,
    )
    if status is not None:
        update.run.CopyFrom(run_message(status))
        update.thread.CopyFrom(THREAD)
    return update


def update_of(command: rpc.SessionCommand, update: rpc.RunUpdate, *, last: bool = False) -> rpc.SessionUpdate:
    """What a call is sent."""
    return rpc.SessionUpdate(call=command.call, run_update=update, last=last)


def last_of(command: rpc.SessionCommand) -> rpc.SessionUpdate:
    """The end of a call that has nothing more to say."""
    return rpc.SessionUpdate(call=command.call, last=True)


def answer_to(command: rpc.SessionCommand) -> rpc.SessionUpdate:
    """The answer to a call that has one answer; it tells whose it is."""
    update = rpc.SessionUpdate(call=command.call, last=True)
    match command.WhichOneof("operation"):
        case "get_run":
            update.get_run.run.CopyFrom(run_message(run_id=command.get_run.run_id))
            update.get_run.thread.CopyFrom(THREAD)
        case "list_runs":
            update.list_runs.agent_runtime_id = command.list_runs.server.id
        case "list_run_events":
            update.list_run_events.run.CopyFrom(run_message(run_id=command.list_run_events.run_id))
            update.list_run_events.thread.CopyFrom(THREAD)
        case "cancel_run":
            update.cancel_run.run.CopyFrom(run_message(pb.RUN_STATUS_CANCELLED, run_id=command.cancel_run.run_id))
            update.cancel_run.thread.CopyFrom(THREAD)
        case other:
            raise AssertionError(f"{other} has no one answer")
    return update


def error_to(command: rpc.SessionCommand, code: grpc.StatusCode, reason: str, message: str = "") -> rpc.SessionUpdate:
    """What ends a call with an error."""
    number, _ = code.value
    status = status_pb2.Status(code=number, message=message)
    info: Message = error_details_pb2.ErrorInfo(reason=reason, domain="acp.runs.v1")
    status.details.add().Pack(info)
    return rpc.SessionUpdate(call=command.call, last=True, error=status)
