"""A client of `RunService.Session`, written from the comments of run_service.proto alone.

It holds the service to them: whatever comes that they do not allow ends the session with a failed assertion, which
`close` and every call of the session raise.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2

from protos.acp.runs.v1 import run_service_pb2 as rpc
from protos.acp.runs.v1 import run_service_pb2_grpc
from tests.support import LIMIT_SECONDS

FOLLOWS = ("start_run", "continue_run", "watch_run")
OPERATIONS = (*FOLLOWS, "get_run", "list_runs", "list_run_events", "cancel_run")
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class CallLostError(Exception):
    """Nothing more is known of the call: it was stopped, or the stream has ended while it was open."""


def error_from(status: status_pb2.Status) -> grpc.aio.AioRpcError:
    """Return the error that the plain RPC would have raised."""
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(_CODES[status.code], grpc.aio.Metadata(), trailers, status.message)


class SessionCall:
    """A call of a session: its updates in the order in which they came."""

    def __init__(self, session: "Session", number: int, operation: str) -> None:
        self.session = session
        self.number = number
        self.operation = operation
        self.arrived: list[rpc.SessionUpdate] = []
        self.taken = 0
        self.unacknowledged = 0
        self.stopped = False
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether its last update has come."""
        return bool(self.arrived) and self.arrived[-1].last

    def arrive(self, update: rpc.SessionUpdate) -> None:
        """Take in an update from the stream."""
        kind = update.WhichOneof("result")
        assert not self.ended, f"{update} came after the last"
        if kind == "run_update":
            assert self.operation in FOLLOWS
            self.unacknowledged += 1
            assert self.unacknowledged <= self.session.limits.window_updates
        elif kind is None:
            assert update.last
            assert self.operation in FOLLOWS
        else:
            assert update.last
            assert kind in ("error", self.operation)
        self.arrived.append(update)
        self._news.set()

    def wake(self) -> None:
        """Let the reader look at the session's end."""
        self._news.set()

    def acknowledge(self, updates: int) -> None:
        """Make room for more."""
        self.unacknowledged -= updates
        self.session.send(rpc.SessionCommand(call=self.number, acknowledge=rpc.AcknowledgeUpdates(updates=updates)))

    def stop(self) -> None:
        """Lose interest."""
        self.stopped = True
        self.session.send(rpc.SessionCommand(call=self.number, stop=rpc.StopCall()))
        self._news.set()

    async def read(self, *, acknowledge: bool = True) -> rpc.SessionUpdate:
        """Return the next update, which may be the last; raises CallLostError when none can come."""
        while self.taken == len(self.arrived):
            self.session.check()
            if self.stopped or self.session.ended.is_set():
                raise CallLostError(self.number)
            self._news.clear()
            await self._news.wait()
        update = self.arrived[self.taken]
        self.taken += 1
        if acknowledge and update.HasField("run_update") and not update.last:
            self.acknowledge(1)
        return update

    async def updates(self, *, acknowledge: bool = True) -> AsyncGenerator[rpc.RunUpdate]:
        """The run's updates, to the end of the call; raises what the call failed with."""
        while True:
            update = await self.read(acknowledge=acknowledge)
            if update.HasField("error"):
                raise error_from(update.error)
            if update.HasField("run_update"):
                yield update.run_update
            if update.last:
                return

    async def answer(self) -> Any:
        """The one answer; raises what the call failed with."""
        update = await self.read()
        if update.HasField("error"):
            raise error_from(update.error)
        return getattr(update, self.operation)

    async def error(self) -> grpc.aio.AioRpcError:
        """What the call failed with, whatever came before."""
        while not (update := await self.read()).HasField("error"):
            assert not update.last, update
        return error_from(update.error)


class Session:
    """The caller's side of one session."""

    def __init__(self, channel: grpc.aio.Channel, token: str) -> None:
        stub: Any = run_service_pb2_grpc.RunServiceStub(channel)
        self.stream = stub.Session(metadata=(("authorization", f"Bearer {token}"),))
        self.limits = rpc.SessionLimits()
        self.calls: dict[int, SessionCall] = {}
        self.responses: list[rpc.SessionResponse] = []
        self.ended = asyncio.Event()
        self._failure: grpc.aio.AioRpcError | None = None
        self._broken: AssertionError | None = None
        self._commands: list[rpc.SessionCommand] = []
        self._waiting = asyncio.Event()
        self._closing = False
        self._overtaken = False
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Take the service's limits, then begin to read and write."""
        hello = await self.stream.read()
        assert hello is not grpc.aio.EOF
        assert hello.HasField("limits")
        assert not hello.updates
        self.limits = hello.limits
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]

    def call(self, operation: str, request: Message, organization: str = "default", **fields: Any) -> SessionCall:
        """Open a call."""
        call = SessionCall(self, len(self.calls) + 1, operation)
        self.calls[call.number] = call
        content: Mapping[str, Any] = {operation: request}
        self.send(rpc.SessionCommand(call=call.number, organization=organization, **fields, **content))
        return call

    def send(self, *commands: rpc.SessionCommand) -> None:
        """Send commands, together with others that are not sent yet."""
        self._commands += commands
        self._waiting.set()

    async def close(self) -> grpc.StatusCode | None:
        """Close the caller's side once everything is sent; return what `end` does."""
        self._closing = True
        self._waiting.set()
        return await self.end()

    async def end(self) -> grpc.StatusCode | None:
        """Return the status that the stream ends with, once it has.

        None when that is not known: when a stream ends while something is being sent, grpc.aio shows an error of its
        own in place of the status.
        """
        async with asyncio.timeout(LIMIT_SECONDS):
            await self.ended.wait()
            await asyncio.gather(*self._tasks)
        self.check()
        code: grpc.StatusCode = await self.stream.code()
        hidden = self._overtaken and code is grpc.StatusCode.INTERNAL
        return None if hidden else code

    async def failure(self) -> None:
        """Raise what the stream ends with, once it has."""
        await self.end()
        if self._failure is not None:
            raise self._failure

    def check(self) -> None:
        """Raise what the service did against the contract, if anything."""
        if self._broken is not None:
            raise self._broken

    async def _read(self) -> None:
        try:
            while (response := await self.stream.read()) is not grpc.aio.EOF:
                assert not response.HasField("limits")
                assert response.updates
                assert response.ByteSize() <= self.limits.max_message_bytes
                self.responses.append(response)
                for update in response.updates:
                    self.calls[update.call].arrive(update)
        except grpc.aio.AioRpcError as error:
            self._failure = error
        except asyncio.CancelledError:
            pass  # by `stream.cancel`
        except (AssertionError, KeyError) as error:
            self._broken = AssertionError("the service broke the contract of a session")
            self._broken.__cause__ = error
            self.stream.cancel()
        finally:
            self.ended.set()
            self._waiting.set()
            for call in self.calls.values():
                call.wake()

    async def _write(self) -> None:
        try:
            while not self.ended.is_set():
                if self._commands:
                    await self.stream.write(rpc.SessionRequest(commands=self._batch()))
                elif self._closing:
                    await self.stream.done_writing()
                    return
                else:
                    self._waiting.clear()
                    await self._waiting.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            self._overtaken = True  # by the end of the stream

    def _batch(self) -> list[rpc.SessionCommand]:
        """Take as many commands as one message should hold."""
        size = count = 0
        while count < len(self._commands) and size < self.limits.max_message_bytes // 8:
            size += self._commands[count].ByteSize()
            count += 1
        batch, self._commands = self._commands[:count], self._commands[count:]
        return batch


@asynccontextmanager
async def session_over(channel: grpc.aio.Channel, token: str) -> AsyncGenerator[Session]:
    """An open session; closed at the end, unless it has ended by then, and then with OK."""
    session = Session(channel, token)
    await session.open()
    try:
        yield session
    finally:
        code = await session.close()
    assert code in (grpc.StatusCode.OK, None)
