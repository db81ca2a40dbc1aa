"""The gateway's side of `RunService.Session`: one stream to one replica, kept open.

Carries the calls that it is given. What it cannot carry to its end, because the stream breaks or the replica refuses
it, goes back to its owner, who knows of others.
"""

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Protocol, TypeAlias

import grpc

from gateway.call import Call
from gateway.errors import ApiError, from_rpc_error, from_status
from protos.acp.runs.v1 import run_service_pb2 as rpc

log = logging.getLogger(__name__)

Stream: TypeAlias = "grpc.aio.StreamStreamCall[rpc.SessionRequest, rpc.SessionResponse]"

_RECONNECT_SECONDS = (0.05, 2.0)
_HELLO_SECONDS = 5.0  # once the replica is reached
_STEADY_SECONDS = 1.0  # so old is a stream that is taken for one that lasts
# What a batch of commands holds beside its last one, at most.
_BATCH_BYTES = 1 << 18
# A stream that ends with one of these would end the next one, too: nobody is kept waiting for it.
_HOPELESS = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INVALID_ARGUMENT,
    }
)
# What a replica says of itself and not of the call: another one may take it.
_OF_THE_REPLICA = frozenset({"DRAINING", "STORE_UNAVAILABLE", "SESSION_FULL"})


class Owner(Protocol):
    """Who gives a session its calls."""

    def session_changed(self) -> None:
        """Hear that the session can take calls now, or no more."""

    def take_back(self, calls: Iterable[Call]) -> None:
        """Take calls whose stream broke."""

    def take_refused(self, call: Call, session: "Session", error: ApiError) -> None:
        """Take a call that the replica did not take, for a reason of its own."""


class Session:
    """A session with one replica, kept open: when its stream breaks, another one is opened.

    `calls` are those that it carries, by number. `can_take` says whether it takes more: it is connected and the replica
    has not said that it stops. `hopeless` is what the last stream ended with where the next one will, too.
    """

    def __init__(self, name: str, open_stream: Callable[[], Stream], owner: Owner, max_message_bytes: int) -> None:
        self._name = name
        self._open_stream = open_stream
        self._owner = owner
        self._own_max_message_bytes = self._max_message_bytes = max_message_bytes
        self._max_calls = 0
        self._acknowledge_after = 1
        self._numbers = itertools.count(1)
        self.calls: dict[int, Call] = {}
        self.can_take = False
        self.hopeless: grpc.aio.AioRpcError | None = None
        self._outbox: list[rpc.SessionCommand] = []
        self._connected = False
        self._connected_at = math.inf
        self._was_of_use = False
        self._to_send = asyncio.Event()  # the outbox is not empty
        self._stream: Stream | None = None
        self._life: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Open the stream and keep it open."""
        self._loop = asyncio.get_running_loop()
        self._life = self._loop.create_task(self._live())

    async def close(self) -> None:
        """End the stream. Its calls go back to the owner."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])
        self._lose(None)

    def renew(self) -> None:
        """Give the stream up, as if it had broken, and open another one."""
        if self._stream is not None:
            self._stream.cancel()

    @property
    def has_room(self) -> bool:
        """Whether the replica takes one more call."""
        return len(self.calls) < self._max_calls

    @property
    def is_steady(self) -> bool:
        """Whether its stream has been there for some time."""
        return self._loop.time() - self._connected_at >= _STEADY_SECONDS

    def carry(self, call: Call) -> None:
        """Make a call through the stream; `can_take` says whether there is one. Raises ApiError 413."""
        if not fits(call.command, self._max_message_bytes):
            raise too_large()
        number = next(self._numbers)
        call.place = self
        self.calls[number] = call
        self._send(call.begin(number, self._acknowledge_after))

    # What calls ask for

    def acknowledge(self, call: Call, updates: int) -> None:
        """Make room for more updates of a call."""
        if self._connected:
            command = rpc.SessionCommand(call=call.command.call)
            command.acknowledge.updates = updates
            self._send(command)

    def forget(self, call: Call) -> None:
        """Take no more updates of a call."""
        number = call.command.call
        if self.calls.pop(number, None) is not None and self._connected:
            command = rpc.SessionCommand(call=number)
            command.stop.SetInParent()
            self._send(command)

    # The stream

    async def _live(self) -> None:
        shortest, longest = _RECONNECT_SECONDS
        pause = shortest
        while True:
            stream = self._stream = self._open_stream()
            error: grpc.aio.AioRpcError | None = None
            try:
                await stream.wait_for_connection()
                async with asyncio.timeout(_HELLO_SECONDS):
                    hello = await stream.read()
                if isinstance(hello, rpc.SessionResponse):
                    await self._serve(stream, hello.limits)
            except grpc.aio.AioRpcError as broken:
                error = broken
                log.warning("the session with %s broke: %s %s", self._name, broken.code().name, broken.details())
            except TimeoutError:
                log.warning("%s begins no session in %g s; it is asked again", self._name, _HELLO_SECONDS)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                log.warning("the session with %s was given up", self._name)
            except Exception:
                log.exception("the session with %s failed; it is opened again", self._name)
            finally:
                self._stream = None
                stream.cancel()
            # A stream that breaks before it was of any use is tried again ever more slowly.
            pause = shortest if self.is_steady or self._was_of_use else min(pause * 2, longest)
            self._connected_at, self._was_of_use = math.inf, False
            self._lose(error)
            await asyncio.sleep(pause)

    async def _serve(self, stream: Stream, limits: rpc.SessionLimits) -> None:
        self._max_calls = limits.max_calls
        self._max_message_bytes = min(self._own_max_message_bytes, limits.max_message_bytes)
        self._acknowledge_after = max(1, limits.window_updates // 2)
        self._outbox.clear()
        self._connected = self.can_take = True
        self._connected_at = self._loop.time()
        self.hopeless = None
        writer = self._loop.create_task(self._write(stream))
        self._owner.session_changed()
        try:
            while isinstance(response := await stream.read(), rpc.SessionResponse):
                self._take(response)
        finally:
            self._connected = self.can_take = False
            self._owner.session_changed()
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    def _take(self, response: rpc.SessionResponse) -> None:
        for update in response.updates:
            call = self.calls.get(update.call)
            if call is None:
                continue  # it was stopped meanwhile
            if update.last:
                del self.calls[update.call]
            if update.HasField("error"):
                self._refuse(call, from_status(update.error))
                continue
            call.deliver(update)
            self._was_of_use = True

    def _refuse(self, call: Call, error: ApiError) -> None:
        if error.code not in _OF_THE_REPLICA:
            call.end_with(error)
            return
        if error.code == "DRAINING" and self.can_take:
            self.can_take = False
            self._owner.session_changed()
        self._owner.take_refused(call, self, error)

    def _send(self, command: rpc.SessionCommand) -> None:
        self._outbox.append(command)
        self._to_send.set()

    async def _write(self, stream: Stream) -> None:
        while True:
            if not self._outbox:
                self._to_send.clear()
                await self._to_send.wait()
            request = rpc.SessionRequest()
            size = count = 0
            for command in self._outbox:
                request.commands.append(command)
                count += 1
                size += command.ByteSize()
                if size > _BATCH_BYTES:
                    break
            del self._outbox[:count]
            await stream.write(request)

    def _lose(self, error: grpc.aio.AioRpcError | None) -> None:
        """Give back what the stream carried, unless it was that which broke it."""
        calls = list(self.calls.values())
        self.calls.clear()
        self.hopeless = error if error is not None and error.code() in _HOPELESS else None
        if error is not None and error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            for call in calls:
                call.end_with(refused(error))
            calls.clear()
        self._owner.take_back(calls)


def fits(command: rpc.SessionCommand, max_message_bytes: int) -> bool:
    """Return whether a command can be sent in messages of this size."""
    return command.ByteSize() <= max_message_bytes - _BATCH_BYTES


# Errors are made anew for each call: one that is raised keeps hold of all that it passes through.


def too_large() -> ApiError:
    """What to tell about a command that does not fit."""
    return ApiError(413, "BODY_TOO_LARGE", "The request is larger than the runtime service takes.")


def refused(error: grpc.aio.AioRpcError) -> ApiError:
    """What to tell the callers of a stream that ended with `error`."""
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        # It is about what the gateway wrote, not about what a caller did.
        return ApiError(502, "RUNTIME_INCOMPATIBLE", "The runtime service does not understand this gateway.")
    return from_rpc_error(error)
