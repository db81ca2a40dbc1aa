"""`RunService.Session`: many calls over one stream. run_service.proto says what a caller may rely on.

A call is a task that puts what it has into the session's outbox; one writer sends what is there, as much at once as
a message should hold. A call has one item there at most, so that all get their turn, and those with little to say go
before those with much. Nothing is queued for a caller who reads slowly: its calls wait for `acknowledge`, as cursors
into the log.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import grpc
import msgspec

from protos.acp.runs.v1 import run_service_pb2 as rpc
from runtime_service.errors import AnswerTooLarge, Draining, InvalidRequest, SessionFull
from runtime_service.operations import Operations, RunNews
from runtime_service.rpc_errors import status_for

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
# What one message should hold, in bytes, about: of many calls, as each has one item in it. Of bulk, which its
# caller is long at work on, it holds one item before what is small, and more behind it up to this.
_MESSAGE_BYTES = 1 << 18
_BULK_BYTES = 1 << 16
_BULK_EVENTS = 32
_ENDING_SECONDS = 0.8  # less than a stopping server gives to the calls that are under way
_FOLLOWS = ("start_run", "continue_run", "watch_run")
# News, or what fills a message with an answer or an error.
_Said: TypeAlias = RunNews | Callable[[rpc.SessionUpdate], None]


class SessionLimits(msgspec.Struct, frozen=True):
    """What a session holds its caller to; see SessionLimits in run_service.proto."""

    max_calls: int = 10_000
    window_updates: int = 4


class _Call:
    """A call; what it has `said` is made into a message when it is sent."""

    __slots__ = ("last", "number", "room", "said", "stopped", "task", "unacknowledged", "waits")

    def __init__(self, number: int) -> None:
        self.number = number
        self.task: asyncio.Task[None] | None = None
        self.waits = False  # in the outbox
        self.said: _Said | None = None
        self.last = False
        self.unacknowledged = 0
        self.room: asyncio.Future[None] | None = None  # set where the call may go on
        self.stopped = False


class Sessions:
    """All sessions of this process."""

    def __init__(self, operations: Operations, limits: SessionLimits, max_message_bytes: int) -> None:
        self._operations = operations
        self._limits = limits
        self._max_message_bytes = max_message_bytes
        self._closing = asyncio.Event()

    async def serve(self, context: _Context) -> None:
        """Serve one session to its end. Raises InvalidRequest when the caller breaks its rules."""
        hello = rpc.SessionResponse()
        hello.limits.max_calls = self._limits.max_calls
        hello.limits.window_updates = self._limits.window_updates
        hello.limits.max_message_bytes = self._max_message_bytes
        await context.write(hello)
        await _Session(self._operations, self._limits, self._max_message_bytes, context).serve(self._closing)

    def close(self) -> None:
        """End every session once its calls have ended, which by now they are about to."""
        self._closing.set()


class _Session:
    def __init__(
        self, operations: Operations, limits: SessionLimits, max_message_bytes: int, context: _Context
    ) -> None:
        self._operations = operations
        self._limits = limits
        self._max_update_bytes = max_message_bytes - 2 * _MESSAGE_BYTES  # beside what came before it
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, _Call] = {}  # until their `last` is sent
        self._outbox: deque[_Call] = deque()  # calls with little to say
        self._bulk: deque[_Call] = deque()  # calls with much to say
        self._to_send = asyncio.Event()  # there is something for the writer to see to
        self._ending = False

    async def serve(self, closing: asyncio.Event) -> None:
        tasks = [asyncio.create_task(part) for part in (self._read(), self._write(), closing.wait())]
        reader, writer, _ = tasks
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if reader.done() or writer.done():
                (reader if reader.done() else writer).result()
            else:
                await self._finish(writer)
        finally:
            tasks += [call.task for call in self._calls.values() if call.task is not None]
            for call in list(self._calls.values()):
                self._stop(call)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _finish(self, writer: asyncio.Task[Any]) -> None:
        """Let the calls end that are open, and send what they say."""
        self._ending = True
        for call in self._calls.values():
            _go_on(call)
        self._to_send.set()
        await asyncio.wait([writer], timeout=_ENDING_SECONDS)

    async def _read(self) -> None:
        while (request := await self._context.read()) is not grpc.aio.EOF:
            for command in request.commands:
                self._take(command)

    def _take(self, command: rpc.SessionCommand) -> None:
        operation = command.WhichOneof("operation")
        if operation is None:
            raise InvalidRequest("commands.operation", "must be set to one that is known here")
        if command.call < 1:
            raise InvalidRequest("commands.call", "must be above 0")
        call = self._calls.get(command.call)
        if operation == "stop":
            if call is not None:
                self._stop(call)
        elif operation == "acknowledge":
            if call is not None:
                call.unacknowledged = max(0, call.unacknowledged - command.acknowledge.updates)
                _go_on(call)
        elif call is not None:
            raise InvalidRequest("commands.call", "must not be that of an open call")
        else:
            self._open(command, operation)

    def _open(self, command: rpc.SessionCommand, operation: str) -> None:
        call = _Call(command.call)
        if len(self._calls) >= self._limits.max_calls:
            self._fail(call, SessionFull(self._limits.max_calls), command)
            return
        self._calls[call.number] = call
        serve = self._follow if operation in _FOLLOWS else self._answer
        call.task = self._loop.create_task(serve(call, command, operation))

    def _stop(self, call: _Call) -> None:
        self._forget(call)
        call.stopped = True
        if call.task is not None:
            call.task.cancel()
        self._to_send.set()

    def _forget(self, call: _Call) -> None:
        if self._calls.get(call.number) is call:
            del self._calls[call.number]

    # Calls

    async def _follow(self, call: _Call, command: rpc.SessionCommand, operation: str) -> None:
        """Send what a run goes through, as fast as the caller takes it in."""
        try:
            follow = getattr(self._operations, operation)
            await follow(_organization(command), getattr(command, operation), partial(self._send, call))
            call.last = True
            if not call.waits:
                self._put(call, None)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            while call.waits:
                await _pause(call)
            self._fail(call, error, command)

    async def _send(self, call: _Call, news: RunNews) -> None:
        """Send an update once the call may."""
        while call.waits or call.unacknowledged >= self._limits.window_updates:
            if self._ending and not call.waits:
                raise Draining
            await _pause(call)
        call.unacknowledged += 1
        self._put(call, news)

    async def _answer(self, call: _Call, command: rpc.SessionCommand, operation: str) -> None:
        """Send the one answer of an operation."""
        try:
            ask = getattr(self._operations, operation)
            answer = await ask(_organization(command), getattr(command, operation))
            call.last = True
            self._put(call, lambda update: getattr(update, operation).CopyFrom(answer))
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status
            self._fail(call, error, command)

    def _fail(self, call: _Call, error: Exception, command: rpc.SessionCommand) -> None:
        status = status_for(error, command.correlation_id, command.traceparent)
        call.last = True
        self._put(call, lambda update: update.error.CopyFrom(status))

    # The outbox

    def _put(self, call: _Call, said: _Said | None) -> None:
        call.said = said
        call.waits = True
        is_bulk = isinstance(said, RunNews) and len(said.update.events) > _BULK_EVENTS
        (self._bulk if is_bulk else self._outbox).append(call)
        self._to_send.set()

    async def _write(self) -> None:
        while self._calls or self._outbox or self._bulk or not self._ending:
            if not (self._outbox or self._bulk):
                self._to_send.clear()
                await self._to_send.wait()
            response = self._next_response()
            if response.updates:
                await self._context.write(response)

    def _next_response(self) -> rpc.SessionResponse:
        response = rpc.SessionResponse()
        bulk = self._add_next(response, self._bulk) if self._bulk else 0
        size = bulk
        while self._outbox and size < _MESSAGE_BYTES:
            size += self._add_next(response, self._outbox)
        while self._bulk and bulk < _BULK_BYTES and size < _MESSAGE_BYTES:
            written = self._add_next(response, self._bulk)
            bulk += written
            size += written
        return response

    def _add_next(self, response: rpc.SessionResponse, waiting: deque[_Call]) -> int:
        """Add what the next call has said, unless it was stopped meanwhile; return its size in bytes."""
        call = waiting.popleft()
        call.waits = False
        if call.stopped:
            return 0
        update = response.updates.add()
        update.call = call.number
        if call.last:
            update.last = True
            self._forget(call)
        if isinstance(call.said, RunNews):
            call.said.fill(update.run_update)
        elif call.said is not None:
            call.said(update)
        call.said = None
        written = update.ByteSize()
        if written > self._max_update_bytes:
            written = self._refuse(call, update)
        _go_on(call)
        return written

    def _refuse(self, call: _Call, update: rpc.SessionUpdate) -> int:
        """Put an error in the place of what no message holds: that would end the session for all. Return its size."""
        self._stop(call)
        update.Clear()
        update.call = call.number
        update.last = True
        update.error.CopyFrom(status_for(AnswerTooLarge()))
        return update.ByteSize()


async def _pause(call: _Call) -> None:
    call.room = asyncio.get_running_loop().create_future()
    await call.room


def _go_on(call: _Call) -> None:
    if call.room is not None and not call.room.done():
        call.room.set_result(None)


def _organization(command: rpc.SessionCommand) -> str:
    if not command.organization:
        raise InvalidRequest("organization", "must be set")
    return command.organization
